"""Makes tests/golden/sam.npz: outputs of timm's SAM image encoder.

Run by hand where torch and timm are installed:

    python tests/oracles/golden_sam.py

One small random encoder with the names of SAM's authors, its weights drawn from those names (the
tests draw the same), and the maps after every block at several image sizes.

timm's own models have a LayerNorm epsilon of 1e-5; the authors' 1e-6 is set here. Positions are
resized with torch's plain bicubic before they reach timm, whose own resize is antialiased; relative
positions are interpolated by timm, whose code there is the authors'.
"""

from collections.abc import Sequence
from functools import partial
from pathlib import Path
import sys
from typing import Any

import numpy as np
import torch  # pyright: ignore[reportMissingImports]
from torch.nn import functional as F  # pyright: ignore[reportMissingImports]

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from tests.oracles import stand_ins  # noqa: F401  before what follows

# isort: split

from timm.models.vision_transformer_sam import (  # pyright: ignore[reportMissingImports]
    VisionTransformerSAM,
)

from tests.backbones.drawn import drawn, wave

GOLDEN = Path(__file__).resolve().parents[2] / "tests" / "golden"
PREFIX = "image_encoder."
# Trained at 8x8 tokens; windows before, between and after two blocks that look everywhere.
SMALL: dict[str, Any] = dict(
    img_size=32,
    patch_size=4,
    embed_dim=16,
    depth=6,
    num_heads=2,
    window_size=3,
    global_attn_indexes=(2, 4),
)
# Image sizes: as trained; fewer rows and more columns; sides that the patch does not divide;
# narrower than a window.
SIZES = ((32, 32), (16, 36), (23, 30), (44, 8))


def theirs(name: str) -> str:
    """What SAM's authors call the tensor that has this name in timm."""
    return PREFIX + name.replace("mlp.fc", "mlp.lin")


@torch.inference_mode()
def maps(
    images: np.ndarray, blocks: Sequence[int], **architecture: Any
) -> tuple[dict[str, np.ndarray], list[np.ndarray]]:
    """The random weights by the authors' names, and timm's maps [b, h / p, w / p, c] after each of
    `blocks`.
    """
    norm: Any = partial(torch.nn.LayerNorm, eps=1e-6)
    model: Any = VisionTransformerSAM(
        use_rel_pos=True, num_classes=0, norm_layer=norm, **architecture
    ).eval()
    weights = {
        theirs(name): drawn(theirs(name), tuple(tensor.shape))
        for name, tensor in model.state_dict().items()
    }
    model.load_state_dict(
        {name: torch.from_numpy(weights[theirs(name)]) for name in model.state_dict()}, strict=True
    )
    patch = architecture["patch_size"]
    rows, columns = (side // patch for side in images.shape[1:3])
    positions = F.interpolate(
        model.pos_embed.permute(0, 3, 1, 2),
        size=(rows, columns),
        mode="bicubic",
        align_corners=False,
    )
    model.pos_embed = torch.nn.Parameter(positions.permute(0, 2, 3, 1))
    seen: dict[int, np.ndarray] = {}
    for i in blocks:
        model.blocks[i].register_forward_hook(
            lambda module, inputs, output, i=i: seen.update({i: output.numpy()})
        )
    model(
        torch.from_numpy(images[:, : rows * patch, : columns * patch]).permute(0, 3, 1, 2)
    )  # timm refuses a remainder
    return weights, [seen[i] for i in blocks]


def full_size(config: Any, images: np.ndarray) -> tuple[dict[str, np.ndarray], list[np.ndarray]]:
    """For scripts/parity_encoders.py: random weights of the encoder of `config`, and its features
    at the taps.
    """
    architecture = dict(
        img_size=config.image_size[0],
        patch_size=config.patch_size,
        embed_dim=config.width,
        depth=config.depth,
    )
    architecture |= dict(
        num_heads=config.heads, window_size=config.window, global_attn_indexes=config.global_blocks
    )
    return maps(images, config.taps, **architecture)


def main() -> None:
    """Writes the file."""
    arrays = {
        f"maps/{h}x{w}": np.stack(maps(wave(h, w), range(SMALL["depth"]), **SMALL)[1])
        for h, w in SIZES
    }
    path = GOLDEN / "sam.npz"
    np.savez_compressed(path, **arrays)  # pyright: ignore[reportArgumentType]
    print(f"{path.name}: {path.stat().st_size} bytes")


if __name__ == "__main__":
    main()
