"""Makes tests/golden/deit3.npz: outputs of timm's DeiT-III.

Run by hand where torch and timm are installed:

    python tests/oracles/golden_deit3.py

One small random encoder, its weights drawn from the names that its authors give them, and all
tokens after every block at several image sizes.

Positions are resized with torch's plain bicubic, as DeiT's fine-tuning does it, before they reach
timm, whose own resize is antialiased.
"""

from collections.abc import Sequence
from pathlib import Path
import sys
from typing import Any

import numpy as np
import torch  # pyright: ignore[reportMissingImports]
from torch.nn import functional as F  # pyright: ignore[reportMissingImports]

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from tests.oracles import stand_ins  # before what follows

# isort: split

from timm.models.vision_transformer import (  # pyright: ignore[reportMissingImports]
    VisionTransformer,
)

from tests.backbones.drawn import drawn, wave

GOLDEN = Path(__file__).resolve().parents[2] / "tests" / "golden"
TRAINED = 20  # pixels of a side
SMALL: dict[str, Any] = dict(patch_size=4, embed_dim=24, depth=3, num_heads=2)
SIZES = (
    (20, 20),
    (36, 36),
    (16, 32),
    (23, 30),
)  # as trained; enlarged; not square; sides that the patch does not divide


def theirs(name: str) -> str:
    """What DeiT's authors call the tensor that has this name in timm."""
    return name.replace("ls1.gamma", "gamma_1").replace("ls2.gamma", "gamma_2")


def bicubic(positions: np.ndarray, grid: tuple[int, int]) -> np.ndarray:
    """[1, n * n, c] to [1, rows * columns, c] by torch's plain bicubic."""
    side = round(positions.shape[1] ** 0.5)
    square = torch.from_numpy(positions).reshape(1, side, side, -1).permute(0, 3, 1, 2)
    return (
        F.interpolate(square, size=grid, mode="bicubic", align_corners=False)
        .flatten(2)
        .permute(0, 2, 1)
        .numpy()
    )


@torch.inference_mode()
def tokens(
    images: np.ndarray, blocks: Sequence[int], trained: int, **sizes: Any
) -> tuple[dict[str, np.ndarray], list[np.ndarray]]:
    """The random weights by the authors' names, trained at this image size, and timm's tokens [b,
    n, c] after each of `blocks`.
    """
    patch = sizes["patch_size"]
    grid = images.shape[1] // patch, images.shape[2] // patch
    height = grid[0] * patch
    width = grid[1] * patch  # timm refuses a remainder
    model = VisionTransformer(
        img_size=(height, width), no_embed_class=True, init_values=1e-4, num_classes=0, **sizes
    ).eval()
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    shapes["pos_embed"] = 1, (trained // patch) ** 2, sizes["embed_dim"]
    weights = {theirs(name): drawn(theirs(name), shape) for name, shape in shapes.items()}
    given = {name: weights[theirs(name)] for name in shapes} | {
        "pos_embed": bicubic(weights["pos_embed"], grid)
    }
    model.load_state_dict(
        {name: torch.from_numpy(tensor) for name, tensor in given.items()}, strict=True
    )
    seen: list[np.ndarray] = []
    chosen = list(model.blocks.children())
    for i in blocks:
        chosen[i].register_forward_hook(lambda module, inputs, output: seen.append(output.numpy()))
    model(torch.from_numpy(images[:, :height, :width]).permute(0, 3, 1, 2))
    return weights, seen


def full_size(config: Any, images: np.ndarray) -> tuple[dict[str, np.ndarray], list[np.ndarray]]:
    """For scripts/parity_encoders.py: random weights of the encoder of `config`, and its features
    at the taps.
    """
    sizes = dict(
        patch_size=config.patch_size,
        embed_dim=config.width,
        depth=config.depth,
        num_heads=config.heads,
    )
    weights, seen = tokens(images, config.taps, config.image_size[0], **sizes)
    return weights, stand_ins.as_maps(seen, config, images)


def main() -> None:
    """Writes the file."""
    arrays = {
        f"tokens/{h}x{w}": np.stack(tokens(wave(h, w), range(SMALL["depth"]), TRAINED, **SMALL)[1])
        for h, w in SIZES
    }
    np.savez_compressed(GOLDEN / "deit3.npz", **arrays)  # pyright: ignore[reportArgumentType]
    print(f"deit3.npz: {(GOLDEN / 'deit3.npz').stat().st_size} bytes")


if __name__ == "__main__":
    main()
