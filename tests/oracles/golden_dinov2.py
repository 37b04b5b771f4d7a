"""Makes tests/golden/dinov2.npz: what the authors' DINOv2 computes, for the tests of the encoder to
reproduce.

Run by hand where torch is installed: `python tests/oracles/golden_dinov2.py CLONE`, a clone of
facebookresearch/dinov2. With and without registers, as its `hub/backbones.py` sets up the published
encoders:

- tokens: of a small random encoder, its weights drawn from their names, after every block at
  several image sizes;
- positions: trained for 37x37 patches, resized to other grids.

`full_size`, for which no clone is at hand, runs timm on positions that are resized in the authors'
two ways.
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
SMALL: dict[str, Any] = dict(img_size=20, patch_size=4, embed_dim=24, depth=3, num_heads=2)
KINDS: dict[str, dict[str, Any]] = {
    "plain": dict(num_register_tokens=0, interpolate_antialias=False, interpolate_offset=0.1),
    "registers": dict(num_register_tokens=4, interpolate_antialias=True, interpolate_offset=0.0),
}
SIZES = (
    (20, 20),
    (36, 36),
    (16, 32),
    (12, 20),
)  # as trained; enlarged; not square; fewer rows alone
# Of 14-pixel patches: crops of 504x504 and 518x518, not square and of these a side as trained,
# shrunk.
GRIDS = ((36, 36), (37, 37), (37, 50), (18, 73), (16, 16))


@torch.inference_mode()
def theirs(kind: str, images: np.ndarray) -> list[np.ndarray]:
    """The authors' tokens [b, n, c] after every block."""
    from dinov2.models.vision_transformer import (  # pyright: ignore[reportMissingImports]
        DinoVisionTransformer,
    )

    model = DinoVisionTransformer(init_values=1.0, block_chunks=0, **SMALL, **KINDS[kind]).eval()
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    model.load_state_dict(
        {name: torch.from_numpy(drawn(name, shape)) for name, shape in shapes.items()}, strict=True
    )
    seen: list[np.ndarray] = []
    for block in model.blocks:
        block.register_forward_hook(lambda module, inputs, output: seen.append(output.numpy()))
    model(torch.from_numpy(images).permute(0, 3, 1, 2))
    return seen


@torch.inference_mode()
def their_positions(kind: str, grid: tuple[int, int]) -> np.ndarray:
    """The authors' positions [1 + rows * columns] of one channel at another grid."""
    from dinov2.models.vision_transformer import (  # pyright: ignore[reportMissingImports]
        DinoVisionTransformer,
    )

    model = DinoVisionTransformer(
        img_size=518,
        patch_size=14,
        embed_dim=1,
        depth=1,
        num_heads=1,
        block_chunks=0,
        **KINDS[kind],
    )
    model.pos_embed.data = torch.from_numpy(drawn("pos_embed", (1, 1 + 37 * 37, 1)))
    count = grid[0] * grid[1]
    return model.interpolate_pos_encoding(
        torch.zeros(1, 1 + count, 1), grid[0] * 14, grid[1] * 14
    ).numpy()[0, :, 0]


def resized(positions: np.ndarray, grid: tuple[int, int], registers: int) -> np.ndarray:
    """[1, 1 + n * n, c] to [1, 1 + rows * columns, c] in the authors' way for encoders with so many
    registers.
    """
    side = round((positions.shape[1] - 1) ** 0.5)
    if grid == (side, side):
        return positions
    square = torch.from_numpy(positions[:, 1:]).reshape(1, side, side, -1).permute(0, 3, 1, 2)
    if registers:
        patches = F.interpolate(square, size=grid, mode="bicubic", antialias=True)
    else:
        patches = F.interpolate(
            square, scale_factor=tuple((n + 0.1) / side for n in grid), mode="bicubic"
        )
    return np.concatenate([positions[:, :1], patches.flatten(2).permute(0, 2, 1).numpy()], axis=1)


@torch.inference_mode()
def timm_tokens(
    images: np.ndarray, config: Any, blocks: Sequence[int]
) -> tuple[dict[str, np.ndarray], list[np.ndarray]]:
    """The random weights of the encoder of `config` by the authors' names, and timm's tokens [b, n,
    c] after each of `blocks`.
    """
    sizes: dict[str, Any] = dict(
        patch_size=config.patch_size,
        embed_dim=config.width,
        depth=config.depth,
        num_heads=config.heads,
    )
    sizes |= dict(no_embed_class=True, reg_tokens=config.registers) if config.registers else {}
    model = VisionTransformer(
        img_size=images.shape[1:3], init_values=1e-5, num_classes=0, **sizes
    ).eval()
    shapes = {
        name.replace("reg_token", "register_tokens"): tuple(tensor.shape)
        for name, tensor in model.state_dict().items()
    }
    shapes["pos_embed"] = 1, 1 + config.grid[0] * config.grid[1], config.width
    weights = {name: drawn(name, shape) for name, shape in shapes.items()}
    given = weights | {
        "pos_embed": resized(weights["pos_embed"], model.patch_embed.grid_size, config.registers)
    }
    if config.registers:
        given |= {
            "reg_token": given.pop("register_tokens"),
            "cls_token": given["cls_token"] + given["pos_embed"][:, :1],
        }
        given["pos_embed"] = given["pos_embed"][:, 1:]
    model.load_state_dict(
        {name: torch.from_numpy(tensor) for name, tensor in given.items()}, strict=True
    )
    seen: list[np.ndarray] = []
    chosen = list(model.blocks.children())
    for i in blocks:
        chosen[i].register_forward_hook(lambda module, inputs, output: seen.append(output.numpy()))
    model(torch.from_numpy(images).permute(0, 3, 1, 2))
    return weights, seen


def full_size(config: Any, images: np.ndarray) -> tuple[dict[str, np.ndarray], list[np.ndarray]]:
    """For scripts/parity_encoders.py: random weights of the encoder of `config`, and its features
    at the taps.
    """
    weights, seen = timm_tokens(images, config, config.taps)
    return weights, stand_ins.as_maps(seen, config, images)


def main() -> None:
    """Writes the file."""
    sys.path.insert(0, sys.argv[1])
    arrays = {
        f"{kind}/tokens/{h}x{w}": np.stack(theirs(kind, wave(h, w)))
        for kind in KINDS
        for h, w in SIZES
    }
    arrays |= {
        f"{kind}/positions/{h}x{w}": their_positions(kind, (h, w))
        for kind in KINDS
        for h, w in GRIDS
    }
    np.savez_compressed(GOLDEN / "dinov2.npz", **arrays)  # pyright: ignore[reportArgumentType]
    print(f"dinov2.npz: {(GOLDEN / 'dinov2.npz').stat().st_size} bytes")


if __name__ == "__main__":
    main()
