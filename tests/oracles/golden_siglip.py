"""Makes tests/golden/siglip.npz: outputs of timm's SigLIP image tower.

Run by hand where torch, timm, transformers and scipy are installed:

    python tests/oracles/golden_siglip.py

One small random encoder, its weights drawn from timm's names, and all tokens after every block at
several image sizes. GELU is computed by its tanh formula, as the authors do it; timm's own
definitions of the first SigLIP do not. Positions are resized with `scipy.ndimage.zoom`, as
big_vision does it, before they reach timm. Of B/16 at 224x224, also every name and shape in timm
and, text tower included, in transformers.
"""

from collections.abc import Sequence
from pathlib import Path
import sys
from typing import Any

import numpy as np
import scipy.ndimage  # pyright: ignore[reportMissingImports]
import torch  # pyright: ignore[reportMissingImports]

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from tests.oracles import stand_ins  # before what follows

# isort: split

import timm  # pyright: ignore[reportMissingImports]
from timm.models.vision_transformer import (  # pyright: ignore[reportMissingImports]
    VisionTransformer,
)
import transformers  # pyright: ignore[reportMissingImports]

from tests.backbones.drawn import drawn, wave

GOLDEN = Path(__file__).resolve().parents[2] / "tests" / "golden"
SMALL: dict[str, Any] = dict(img_size=20, patch_size=4, embed_dim=24, depth=4, num_heads=2)
SIZES = (
    (20, 20),
    (36, 36),
    (12, 12),
    (16, 32),
    (23, 30),
)  # as trained, enlarged, shrunk, not square, not divided by the patch
GRIDS = ((7, 7), (14, 14), (32, 64), (20, 9), (1, 3))  # to which positions of 16x16 are resized


def zoomed(positions: np.ndarray, grid: tuple[int, int]) -> np.ndarray:
    """[1, n * n, c] to [1, rows * columns, c] as big_vision's `resample_posemb`, which knows square
    grids alone.

    Raises:
        ValueError: a grid at which scipy's rounding errors put zeros into the last row or column.
    """
    side = round(positions.shape[1] ** 0.5)

    def resize(square):
        return np.asarray(scipy.ndimage.zoom(square, (grid[0] / side, grid[1] / side, 1), order=1))

    if not np.allclose(resize(np.ones((side, side, 1))), 1):
        raise ValueError(
            f"scipy resizes {side}x{side} to {grid} with zeros at the border; choose other sizes"
        )
    return resize(positions.reshape(side, side, -1)).reshape(1, grid[0] * grid[1], -1)


@torch.inference_mode()
def tokens(
    images: np.ndarray, blocks: Sequence[int], **architecture: Any
) -> tuple[dict[str, np.ndarray], list[np.ndarray]]:
    """The random weights by timm's names, and timm's tokens [b, n, c] after each of `blocks`."""
    model: Any = VisionTransformer(
        class_token=False, global_pool="map", act_layer="gelu_tanh", num_classes=0, **architecture
    ).eval()
    weights = {
        name: drawn(name, tuple(tensor.shape)) for name, tensor in model.state_dict().items()
    }
    model.load_state_dict(
        {name: torch.from_numpy(tensor) for name, tensor in weights.items()}, strict=True
    )
    grid = tuple(side // architecture["patch_size"] for side in images.shape[1:3])
    model.pos_embed = torch.nn.Parameter(torch.from_numpy(zoomed(weights["pos_embed"], grid)))
    model.patch_embed.img_size = images.shape[1:3]
    model.patch_embed.strict_img_size = False
    seen: dict[int, np.ndarray] = {}
    for i in blocks:
        model.blocks[i].register_forward_hook(
            lambda module, inputs, output, i=i: seen.update({i: output.numpy()})
        )
    rows, columns = (side * architecture["patch_size"] for side in grid)
    model(
        torch.from_numpy(images[:, :rows, :columns]).permute(0, 3, 1, 2)
    )  # timm refuses a remainder
    return weights, [seen[i] for i in blocks]


def full_size(config: Any, images: np.ndarray) -> tuple[dict[str, np.ndarray], list[np.ndarray]]:
    """For scripts/parity_encoders.py: random weights of the encoder of `config`, and its features
    at the taps.
    """
    sizes = dict(img_size=config.image_size, patch_size=config.patch_size)
    weights, seen = tokens(
        images,
        config.taps,
        **sizes,
        embed_dim=config.width,
        depth=config.depth,
        num_heads=config.heads,
    )
    return weights, stand_ins.as_maps(seen, config, images)


def names(model: torch.nn.Module) -> np.ndarray:
    """Every tensor of a model as text: its name and its sides."""
    return np.array(
        [" ".join((name, *map(str, tensor.shape))) for name, tensor in model.state_dict().items()]
    )


def main() -> None:
    """Writes the file."""
    arrays = {
        f"tokens/{h}x{w}": np.stack(tokens(wave(h, w), range(SMALL["depth"]), **SMALL)[1])
        for h, w in SIZES
    }
    positions = drawn("positions", (1, 256, 2))
    arrays |= {
        f"positions/{rows}x{columns}": zoomed(positions, (rows, columns)) for rows, columns in GRIDS
    }
    with torch.device("meta"):
        arrays["names/timm"] = names(
            timm.create_model("vit_base_patch16_siglip_224", num_classes=0)
        )
        arrays["names/transformers"] = names(transformers.SiglipModel(transformers.SiglipConfig()))
    path = GOLDEN / "siglip.npz"
    np.savez_compressed(path, **arrays)  # pyright: ignore[reportArgumentType]
    print(f"{path.name}: {path.stat().st_size} bytes")


if __name__ == "__main__":
    main()
