"""Makes tests/golden/dinov3.npz: outputs of transformers' DINOv3.

Run by hand where torch and transformers are installed:

    python tests/oracles/golden_dinov3.py

One small random encoder, its weights drawn from the names in the files that transformers loads, all
tokens after every block at several image sizes, and the rotary tables.
"""

from collections.abc import Sequence
from pathlib import Path
import sys
from typing import Any

import numpy as np
import torch  # pyright: ignore[reportMissingImports]

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from tests.oracles import stand_ins  # before what follows

# isort: split

from transformers import DINOv3ViTConfig, DINOv3ViTModel  # pyright: ignore[reportMissingImports]

from tests.backbones.drawn import drawn, wave

GOLDEN = Path(__file__).resolve().parents[2] / "tests" / "golden"
SMALL: dict[str, Any] = dict(
    patch_size=4, hidden_size=32, intermediate_size=128, num_hidden_layers=3, num_attention_heads=2
)
SIZES = (
    (20, 20),
    (36, 36),
    (16, 32),
    (23, 30),
)  # the last has sides that the patch does not divide


@torch.inference_mode()
def outputs(
    images: np.ndarray, blocks: Sequence[int], **sizes: Any
) -> tuple[dict[str, np.ndarray], list[np.ndarray], np.ndarray]:
    """The random weights by the names in files, the tokens [b, n, c] after each of `blocks`, and
    [cosines, sines] of the rotation.
    """
    model = DINOv3ViTModel(DINOv3ViTConfig(num_register_tokens=4, **sizes)).eval()
    in_files = {name: name.removeprefix("model.") for name in model.state_dict()}
    weights = {
        in_files[name]: drawn(in_files[name], tuple(tensor.shape))
        for name, tensor in model.state_dict().items()
    }
    model.load_state_dict(
        {name: torch.from_numpy(weights[stored]) for name, stored in in_files.items()}, strict=True
    )
    seen: list[np.ndarray] = []
    for i in blocks:
        model.model.layer[i].register_forward_hook(
            lambda module, inputs, output: seen.append(output.numpy())
        )
    pixels = torch.from_numpy(images).permute(0, 3, 1, 2)
    model(pixels)
    rotation = np.stack([table.numpy() for table in model.rope_embeddings(pixels)])
    return weights, seen, rotation


def full_size(config: Any, images: np.ndarray) -> tuple[dict[str, np.ndarray], list[np.ndarray]]:
    """For scripts/parity_encoders.py: random weights of the encoder of `config`, and its features
    at the taps.
    """
    sizes = dict(
        patch_size=config.patch_size, hidden_size=config.width, intermediate_size=4 * config.width
    )
    weights, seen, _ = outputs(
        images,
        config.taps,
        num_hidden_layers=config.depth,
        num_attention_heads=config.heads,
        **sizes,
    )
    return weights, stand_ins.as_maps(seen, config, images)


def main() -> None:
    """Writes the file."""
    arrays: dict[str, np.ndarray] = {}
    for h, w in SIZES:
        _, seen, rotation = outputs(wave(h, w), range(SMALL["num_hidden_layers"]), **SMALL)
        arrays |= {f"tokens/{h}x{w}": np.stack(seen), f"rotation/{h}x{w}": rotation}
    np.savez_compressed(GOLDEN / "dinov3.npz", **arrays)  # pyright: ignore[reportArgumentType]
    print(f"dinov3.npz: {(GOLDEN / 'dinov3.npz').stat().st_size} bytes")


if __name__ == "__main__":
    main()
