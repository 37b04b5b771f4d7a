"""Makes tests/golden/eva02_*.npz: outputs of timm's EVA-02.

Run by hand where torch and timm are installed:

    python tests/oracles/golden_eva02.py

For each family of published checkpoints one small random encoder under timm's names, and all its
tokens after every block at several image sizes:

- eva02_clip.npz: sub-LN in attention and MLP, as EVA-02-CLIP.
- eva02_mim_l.npz: sub-LN in the MLP alone, as EVA-02 MIM-L.
- eva02_mim_ti.npz: fused projections without sub-LN, as EVA-02 MIM-Ti and MIM-S.

Positions are resized with torch's plain bicubic, as EVA's own code does, before they reach timm,
whose own resize is antialiased.
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

from timm.models.eva import Eva  # pyright: ignore[reportMissingImports]

GOLDEN = Path(__file__).resolve().parents[2] / "tests" / "golden"
PATCH = 4
TRAINED = 5  # pixels of a patch; rows and columns of the random encoders' own grid
# Image sizes: as trained, enlarged, shrunk, not square, and sides that the patch does not divide.
SIZES = ((20, 20), (36, 36), (12, 12), (16, 32), (23, 30))
FAMILIES: dict[str, tuple[tuple[tuple[int, int], ...], dict[str, Any]]] = {
    "clip": (
        SIZES,
        dict(embed_dim=24, num_heads=2, qkv_fused=False, scale_mlp=True, scale_attn_inner=True),
    ),
    "mim_l": (SIZES[::3], dict(embed_dim=16, num_heads=2, qkv_fused=False, scale_mlp=True)),
    "mim_ti": (SIZES[::3], dict(embed_dim=16, num_heads=2)),
}


def wave(height: int, width: int) -> np.ndarray:
    """A smooth picture by formula, [1, h, w, 3] in about -1..1; the tests compute the same."""
    y, x, c = np.ogrid[0:height, 0:width, 0:3]
    return (
        np.sin(0.33 * y + 0.5 * c) * np.cos(0.21 * x - 0.9 * c) + 0.3 * np.sin(0.9 * x + 1.7 * y)
    ).astype(np.float32)[None]


def encoder(image_size: tuple[int, int], **family: Any) -> Eva:
    """A random encoder of timm for images of this size; rotary positions count on the 16x16 grid of
    EVA's pre-training.
    """
    fixed = dict(
        mlp_ratio=8 / 3,
        swiglu_mlp=True,
        use_rot_pos_emb=True,
        ref_feat_shape=(16, 16),
        num_classes=0,
    )
    return Eva(img_size=image_size, **(dict(patch_size=PATCH, depth=4) | fixed | family)).eval()  # pyright: ignore[reportArgumentType]


def random_weights(model: Eva, rng: np.random.Generator) -> dict[str, np.ndarray]:
    """Weights that make attention far from uniform; numbers that float16 holds, so that the file
    packs well.
    """
    tensors = {}
    for name, parameter in model.state_dict().items():
        shape = tuple(parameter.shape)
        scale = 1.2 / np.sqrt(np.prod(shape[1:])) if len(shape) > 1 and shape[0] > 1 else 0.3
        centre = 1.0 if "norm" in name and name.endswith("weight") else 0.0
        tensors[name] = (
            (centre + scale * rng.standard_normal(shape)).astype(np.float16).astype(np.float32)
        )
    return tensors


def bicubic(positions: np.ndarray, grid: tuple[int, int]) -> np.ndarray:
    """[1, 1 + n * n, c] to [1, 1 + rows * columns, c] by torch's plain bicubic."""
    side = round((positions.shape[1] - 1) ** 0.5)
    square = torch.from_numpy(positions[:, 1:]).reshape(1, side, side, -1).permute(0, 3, 1, 2)
    resized = F.interpolate(square, size=grid, mode="bicubic", align_corners=False, antialias=False)
    return np.concatenate([positions[:, :1], resized.flatten(2).permute(0, 2, 1).numpy()], axis=1)


@torch.inference_mode()
def tokens(weights: dict[str, np.ndarray], images: np.ndarray, **family: Any) -> np.ndarray:
    """All tokens after every block, [blocks, b, n, c], of timm's encoder built for the images'
    size.
    """
    height, width = images.shape[1:3]
    model = encoder((height, width), **family)
    weights = weights | {"pos_embed": bicubic(weights["pos_embed"], model.patch_embed.grid_size)}
    model.load_state_dict(
        {name: torch.from_numpy(tensor) for name, tensor in weights.items()}, strict=True
    )
    seen: list[np.ndarray] = []
    for block in model.blocks.children():
        block.register_forward_hook(lambda module, inputs, output: seen.append(output.numpy()))
    model.forward_features(torch.from_numpy(images).permute(0, 3, 1, 2))
    return np.stack(seen)


def full_size(config: Any, images: np.ndarray) -> tuple[dict[str, np.ndarray], list[np.ndarray]]:
    """For scripts/parity_encoders.py: random weights of the encoder of `config`, and its features
    at the taps.
    """
    family = dict(
        patch_size=config.patch_size,
        embed_dim=config.width,
        depth=config.depth,
        num_heads=config.heads,
    )
    family |= dict(
        qkv_fused=not config.subln, scale_mlp=config.subln, scale_attn_inner=config.inner_attn_ln
    )
    weights = random_weights(encoder(config.image_size, **family), np.random.default_rng(0))
    seen = tokens(weights, images, **family)
    return weights, stand_ins.as_maps([seen[tap] for tap in config.taps], config, images)


def main() -> None:
    """Writes the three files."""
    for seed, (name, (sizes, family)) in enumerate(FAMILIES.items()):
        weights = random_weights(
            encoder((PATCH * TRAINED, PATCH * TRAINED), **family), np.random.default_rng(seed)
        )
        arrays = {f"weights/{key}": tensor for key, tensor in weights.items()}
        arrays |= {f"tokens/{h}x{w}": tokens(weights, wave(h, w), **family) for h, w in sizes}
        path = GOLDEN / f"eva02_{name}.npz"
        np.savez_compressed(path, **arrays)  # pyright: ignore[reportArgumentType]
        print(f"{path.name}: {path.stat().st_size} bytes")


if __name__ == "__main__":
    main()
