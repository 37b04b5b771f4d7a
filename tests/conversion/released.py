"""Stand-ins for released files: every tensor's numbers are drawn from its name and shape alone.

Used by the tests and by tests/oracles/golden_released.py, which runs the authors' code on them.
"""

from collections.abc import Mapping
import re
import zlib

import numpy as np

# Sizes of the golden files.
WINDOW = 80
STRIDE = 53
PICTURE = (100, 131)
WIDTH = 48
HEADS = 2
DEPTH = 4
HIDDEN = 64
QUERIES = 24
PIXEL_LAYERS = 1
LAYERS = 2
FFN = 96
RANK = 4
FIRST = 2  # block with low-rank adapters
PATCH = 14  # of the encoder's file
GRID = 6  # likewise
# Of tqdm's.
TQDM_WINDOW = 96  # 6x6 patches of 14 or 16 pixels
TQDM_STRIDE = 64
TQDM_DEPTH = 6
TQDM_TAPS = (1, 2, 3, 5)
TEXT_WIDTH = 32
TEXT_HEADS = 2
TEXT_DEPTH = 2
EMBEDDING = 40
CONTEXT_WIDTH = 24
PIXEL_FFN = 80

# Of weights by part, so that the queries differ and several classes win pixels.
GAINS = (
    ("text_encoder", 3.0),
    ("transformer_decoder", 0.6),
    ("mask_embed", 1.2),
    ("cls_embed", 5.0),
    ("backbone", 1.0),
    ("", 1.5),
)
TABLES = r"token_embedding|query_|level_|pos_embed|cls_token|learnable_tokens|class_embedding"


def drawn(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """The tensor of a name, float32; scales are positive, tables of the size of features."""
    x = np.asarray(np.random.default_rng(zlib.crc32(name.encode())).standard_normal(shape))
    if len(shape) < 2:
        is_positive = re.search(r"weight|gamma|scale|running_var", name)
        x = np.exp(0.3 * x) if is_positive else 0.1 * x
    elif not re.search(TABLES, name):
        x *= next(gain for part, gain in GAINS if part in name) / np.sqrt(np.prod(shape[1:]))
    return np.asarray(x, np.float32)


def encoder_file(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, np.ndarray]:
    """The file of a frozen encoder."""
    return {name: drawn(f"backbone.{name}", shape) for name, shape in shapes.items()}


def soma_file(
    shapes: Mapping[str, tuple[int, ...]], encoder: Mapping[str, np.ndarray], first: int
) -> dict[str, np.ndarray]:
    """A file of SoMA: the biases that training froze are those of the encoder's file."""
    found = {}
    for name, shape in shapes.items():
        own = name.removeprefix("backbone.model.")
        block = re.match(r"blocks\.(\d+)\.(attn\.[qkv]|attn\.proj|mlp\.fc[12])\.", own)
        found[name] = drawn(name, shape)
        if name == own or not own.endswith("bias") or (block and int(block[1]) >= first):
            continue
        if match := re.fullmatch(r"(blocks\.\d+\.attn\.)([qkv])\.bias", own):
            fused = encoder[f"{match[1]}qkv.bias"]
            found[name] = np.split(fused, 3)["qkv".index(match[2])]
        else:
            found[name] = encoder[own]
    return found


def picture(height: int, width: int) -> np.ndarray:
    """Coloured waves, uint8 RGB [h, w, 3]."""
    y, x, c = np.ogrid[0:height, 0:width, 0:3]
    wave = np.sin(0.13 * y + 0.5 * c) * np.cos(0.11 * x - 0.9 * c)
    wave = wave + 0.4 * np.sin(0.05 * x + 0.07 * y + 2 * c)
    return np.clip(128 + 90 * wave, 0, 255).astype(np.uint8)


def named_shapes(archive: Mapping[str, np.ndarray], prefix: str) -> dict[str, tuple[int, ...]]:
    """The names and shapes that a golden file holds below a prefix."""
    shapes = (
        tuple(int(n) for n in text.split(",") if n) for text in archive[f"{prefix}shapes"].tolist()
    )
    return dict(zip(archive[f"{prefix}names"].tolist(), shapes, strict=True))
