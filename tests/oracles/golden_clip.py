"""Makes tests/golden/clip_vit.npz: outputs of open_clip's vision transformer.

Run by hand where torch and open_clip are installed:

    python tests/oracles/golden_clip.py

One small random encoder under open_clip's names, all its tokens after every block at several image
sizes with QuickGELU, and at its own size with GELU.

Positions are resized with torch's plain bicubic before they reach open_clip, whose own resize is
antialiased.
"""

from pathlib import Path
import sys
from typing import Any

import numpy as np
import torch  # pyright: ignore[reportMissingImports]
from torch.nn import functional as F  # pyright: ignore[reportMissingImports]

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from tests.oracles import stand_ins  # before what follows

# isort: split

from open_clip.transformer import (  # pyright: ignore[reportMissingImports]
    QuickGELU,
    VisionTransformer,
)

GOLDEN = Path(__file__).resolve().parents[2] / "tests" / "golden"
PATCH = 4
TRAINED = 5
WIDTH = 16  # pixels of a patch; rows and columns of the random encoder's own grid; channels
# Image sizes: as trained, enlarged, shrunk, not square, and sides that the patch does not divide.
SIZES = ((20, 20), (36, 36), (12, 12), (16, 32), (23, 30))


def wave(height: int, width: int) -> np.ndarray:
    """A smooth picture by formula, [1, h, w, 3] in about -1..1; the tests compute the same."""
    y, x, c = np.ogrid[0:height, 0:width, 0:3]
    return (
        np.sin(0.33 * y + 0.5 * c) * np.cos(0.21 * x - 0.9 * c) + 0.3 * np.sin(0.9 * x + 1.7 * y)
    ).astype(np.float32)[None]


def encoder(
    image_size: tuple[int, int], activation: type, **architecture: Any
) -> VisionTransformer:
    """A random encoder of open_clip for images of this size; a small one unless `architecture` says
    otherwise.
    """
    small = dict(patch_size=PATCH, width=WIDTH, layers=4, heads=2)
    fixed = dict(mlp_ratio=4.0, output_dim=8, act_layer=activation)
    return VisionTransformer(image_size=image_size, **(small | fixed | architecture)).eval()  # pyright: ignore[reportArgumentType]


def random_weights(model: VisionTransformer, rng: np.random.Generator) -> dict[str, np.ndarray]:
    """Weights that make attention far from uniform; numbers that float16 holds, so that the file
    packs well.
    """
    tensors = {}
    for name, parameter in model.state_dict().items():
        shape = tuple(parameter.shape)
        scale = 0.3 if len(shape) == 1 or "embedding" in name else 1.2 / np.sqrt(np.prod(shape[1:]))
        centre = 1.0 if "ln_" in name and name.endswith("weight") else 0.0
        tensors[name] = (
            (centre + scale * rng.standard_normal(shape)).astype(np.float16).astype(np.float32)
        )
    return tensors


def bicubic(positions: np.ndarray, grid: tuple[int, int]) -> np.ndarray:
    """[1 + n * n, c] to [1 + rows * columns, c] by torch's plain bicubic."""
    side = round((len(positions) - 1) ** 0.5)
    square = torch.from_numpy(positions[1:]).reshape(1, side, side, -1).permute(0, 3, 1, 2)
    resized = F.interpolate(square, size=grid, mode="bicubic", align_corners=False, antialias=False)
    return np.concatenate([positions[:1], resized[0].flatten(1).T.numpy()])


@torch.inference_mode()
def tokens(
    weights: dict[str, np.ndarray], images: np.ndarray, activation: type, **architecture: Any
) -> np.ndarray:
    """All tokens after every block, [blocks, b, n, c], of open_clip's encoder built for the images'
    size.
    """
    height, width = images.shape[1:3]
    model = encoder((height, width), activation, **architecture)
    weights = weights | {
        "positional_embedding": bicubic(weights["positional_embedding"], model.grid_size)
    }
    model.load_state_dict(
        {name: torch.from_numpy(tensor) for name, tensor in weights.items()}, strict=True
    )
    seen: list[np.ndarray] = []
    for block in model.transformer.resblocks:
        block.register_forward_hook(lambda module, inputs, output: seen.append(output.numpy()))
    model(torch.from_numpy(images).permute(0, 3, 1, 2))
    return np.stack(seen)


def full_size(config: Any, images: np.ndarray) -> tuple[dict[str, np.ndarray], list[np.ndarray]]:
    """For scripts/parity_encoders.py: random weights of the encoder of `config`, and its features
    at the taps.
    """
    architecture = dict(
        patch_size=config.patch_size, width=config.width, layers=config.depth, heads=config.heads
    )
    activation = QuickGELU if config.activation == "quick_gelu" else torch.nn.GELU
    weights = random_weights(
        encoder(config.image_size, activation, **architecture), np.random.default_rng(0)
    )
    seen = tokens(weights, images, activation, **architecture)
    return {f"visual.{name}": tensor for name, tensor in weights.items()}, stand_ins.as_maps(
        [seen[t] for t in config.taps], config, images
    )


def main() -> None:
    """Writes the file."""
    weights = random_weights(
        encoder((PATCH * TRAINED, PATCH * TRAINED), QuickGELU), np.random.default_rng(0)
    )
    arrays = {f"weights/visual.{name}": tensor for name, tensor in weights.items()}
    arrays |= {f"quick_gelu/{h}x{w}": tokens(weights, wave(h, w), QuickGELU) for h, w in SIZES}
    arrays |= {f"gelu/{h}x{w}": tokens(weights, wave(h, w), torch.nn.GELU) for h, w in SIZES[:1]}
    path = GOLDEN / "clip_vit.npz"
    np.savez_compressed(path, **arrays)  # pyright: ignore[reportArgumentType]
    print(f"{path.name}: {path.stat().st_size} bytes")


if __name__ == "__main__":
    main()
