"""Makes tests/golden/segformer.npz: outputs of transformers' SegFormer.

Run by hand where torch and transformers are installed (last with torch 2.13 and transformers 5.23):

    python tests/oracles/golden_segformer.py

One small random segmenter in a file of published names, its features after every stage and its
class scores at several image sizes, and both once more with transformers' own epsilons. Elsewhere
epsilons are those of NVlabs/SegFormer: 1e-6 in blocks and after stages, where transformers has 1e-5
throughout. Weights are not stored: `drawn` makes each from its published name, here and in the
tests.
"""

from pathlib import Path
import re
import sys
import tempfile
from typing import Any
import zlib

import numpy as np
import torch  # pyright: ignore[reportMissingImports]

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from tests.oracles import stand_ins  # noqa: F401  before what follows

# isort: split

from safetensors.numpy import load_file, save_file
from transformers import (  # pyright: ignore[reportMissingImports]
    SegformerConfig,
    SegformerForSemanticSegmentation,
)

GOLDEN = Path(__file__).resolve().parents[2] / "tests" / "golden"
SIZES = ((64, 96), (77, 101))  # halving exactly, and not
SMALL: dict[str, Any] = dict(
    depths=(2, 1, 3, 1),
    hidden_sizes=(8, 16, 20, 32),
    num_attention_heads=(1, 2, 5, 8),
    decoder_hidden_size=12,
    num_labels=5,
)


def wave(height: int, width: int) -> np.ndarray:
    """A smooth picture by formula, [1, h, w, 3] in about -1..1; the tests compute the same."""
    y, x, c = np.ogrid[0:height, 0:width, 0:3]
    return (
        np.sin(0.33 * y + 0.5 * c) * np.cos(0.21 * x - 0.9 * c) + 0.3 * np.sin(0.9 * x + 1.7 * y)
    ).astype(np.float32)[None]


def drawn(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """The random tensor of a published name.

    What enters a norm is small enough (variances near 1e-5) for its epsilon to count.
    """
    numbers = np.random.default_rng(zlib.crc32(name.encode())).standard_normal(shape)
    if name.endswith("running_var"):
        return np.exp(0.5 * numbers).astype(np.float32)
    if len(shape) > 1:
        numbers *= 1.2 / np.sqrt(np.prod(shape[1:]))
    else:
        numbers = 0.3 * numbers + (name.endswith("weight"))
    small = r"encoder.*(proj|self\.sr|output\.dense|dense2|patch_embeddings\.\d\.layer_norm)\."
    return (numbers * (3e-3 if re.search(small, name) else 1)).astype(np.float32)


def build(
    config: SegformerConfig,
) -> tuple[SegformerForSemanticSegmentation, dict[str, np.ndarray]]:
    """The segmenter with random weights, loaded by the library from a file of their published
    names, and those weights.
    """
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.safetensors"
        SegformerForSemanticSegmentation(config).save_pretrained(folder)
        shapes = {
            name: tensor.shape
            for name, tensor in load_file(path).items()
            if not name.endswith("num_batches_tracked")
        }
        weights = {name: drawn(name, shape) for name, shape in shapes.items()}
        save_file(weights, path, {"format": "pt"})
        loaded: Any = SegformerForSemanticSegmentation.from_pretrained(
            folder, output_loading_info=True
        )
        model, report = loaded
        assert all(name.endswith("num_batches_tracked") for name in report["missing_keys"])
        assert not any(
            report[kind] for kind in ("unexpected_keys", "mismatched_keys", "error_msgs")
        ), report
    return model.eval(), weights


def as_nvlabs(model: torch.nn.Module) -> None:
    """Sets the epsilons of NVlabs/SegFormer."""
    parts: list[tuple[str, Any]] = list(model.named_modules())
    for name, module in parts:
        if name.endswith(("layernorm_before", "layernorm_after")) or (
            name.count(".") == 3 and name.endswith("layer_norm")
        ):
            module.eps = 1e-6


@torch.inference_mode()
def outputs(
    model: SegformerForSemanticSegmentation, images: np.ndarray
) -> tuple[list[np.ndarray], np.ndarray]:
    """Features of every stage and class scores, [b, h, w, c] each."""
    output = model(torch.from_numpy(images).permute(0, 3, 1, 2), output_hidden_states=True)
    maps = [
        features.permute(0, 2, 3, 1).numpy() for features in (*output.hidden_states, output.logits)
    ]
    return maps[:-1], maps[-1]


def full_size(config: Any, images: np.ndarray) -> tuple[dict[str, np.ndarray], list[np.ndarray]]:
    """For scripts/parity_encoders.py: random weights of the encoder of `config`, with a decoder,
    and its features at the taps.
    """
    sizes: dict[str, Any] = dict(
        depths=config.blocks, hidden_sizes=config.widths, num_attention_heads=config.heads
    )
    model, weights = build(SegformerConfig(**sizes))
    as_nvlabs(model)
    stages, _ = outputs(model, images)
    return weights, [stages[tap] for tap in config.taps]


def main() -> None:
    """Writes the file."""
    model, weights = build(SegformerConfig(**SMALL))
    arrays: dict[str, np.ndarray] = {
        "names": np.asarray(
            [f"{name} {' '.join(map(str, t.shape))}" for name, t in weights.items()]
        )
    }
    for kind in ("transformers", "nvlabs"):
        if kind == "nvlabs":
            as_nvlabs(model)
        for h, w in SIZES if kind == "nvlabs" else SIZES[:1]:
            stages, scores = outputs(model, wave(h, w))
            arrays |= {
                f"{kind}/{h}x{w}/stage{i}": features for i, features in enumerate(stages)
            } | {f"{kind}/{h}x{w}/scores": scores}
            print(kind, h, w, [f"{x.std():.2f}" for x in (*stages, scores)])
    for i in range(4):
        theirs, ours = (arrays[f"{kind}/64x96/stage{i}"] for kind in ("transformers", "nvlabs"))
        print(f"stage {i}: other epsilons change it by up to {np.abs(theirs - ours).max():.2f}")
    path = GOLDEN / "segformer.npz"
    np.savez_compressed(path, **arrays)  # pyright: ignore[reportArgumentType]
    print(f"{path.name}: {path.stat().st_size} bytes")


if __name__ == "__main__":
    main()
