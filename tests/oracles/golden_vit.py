"""Makes tests/golden/vit_*.npz and pyramid.npz: outputs of timm and torch.

Run by hand where torch and timm are installed:

    python tests/oracles/golden_vit.py WEIGHTS.safetensors STREET.jpg

The weights are timm's `vit_tiny_patch16_224.augreg_in21k_ft_in1k`, the image is CamVid's
`test/Seq05VD_f00000.jpg`.

- vit_random.npz: a small random encoder (timm's names) and all its tokens after blocks 0 to 3 at
  several image sizes.
- vit_positions.npz: learned positions resized to several grids.
- vit_tiny_logits.npz: the pre-trained ViT-Ti on a real image: tokens after five blocks (some in
  full, all by their norm) and the logits.
- pyramid.npz: four levels from four maps, in both kinds of normalisation.

Positions are resized here with torch's plain bicubic before they reach timm, whose own resize is
antialiased.
"""

from pathlib import Path
import sys
from typing import Any

import numpy as np
from PIL import Image
from safetensors.numpy import load_file
import torch  # pyright: ignore[reportMissingImports]
from torch.nn import functional as F  # pyright: ignore[reportMissingImports]

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from tests.oracles import stand_ins  # before what follows

# isort: split

from timm.models.vision_transformer import (  # pyright: ignore[reportMissingImports]
    VisionTransformer,
)

GOLDEN = Path(__file__).resolve().parents[2] / "tests" / "golden"
TRAINED = 5  # rows and columns of the random encoder's own grid
# Also 28x7: as many positions as 14x14 has, and yet others.
GRIDS = ((14, 14), (32, 32), (7, 7), (9, 20), (28, 14), (28, 7), (1, 3), (15, 13))
# Image sizes: as trained, enlarged, shrunk, not square, and sides that the patch does not divide.
SIZES = ((80, 80), (128, 128), (48, 48), (48, 112), (70, 100))


def wave(height: int, width: int) -> np.ndarray:
    """A smooth picture by formula, [2, h, w, 3] in about -1..1; the tests compute the same."""
    b, y, x, c = np.ogrid[0:2, 0:height, 0:width, 0:3]
    return (
        np.sin(0.11 * y * (1 + b) + 0.5 * c) * np.cos(0.07 * x - 0.9 * c)
        + 0.3 * np.sin(0.9 * x + 1.7 * y + b)
    ).astype(np.float32)


def bicubic(positions: np.ndarray, grid: tuple[int, int]) -> np.ndarray:
    """[1, 1 + n * n, c] to [1, 1 + rows * columns, c] by torch's plain bicubic."""
    side = round((positions.shape[1] - 1) ** 0.5)
    square = torch.from_numpy(positions[:, 1:]).reshape(1, side, side, -1).permute(0, 3, 1, 2)
    resized = F.interpolate(square, size=grid, mode="bicubic", align_corners=False, antialias=False)
    return np.concatenate([positions[:, :1], resized.flatten(2).permute(0, 2, 1).numpy()], axis=1)


@torch.inference_mode()
def timm_tokens(
    weights: dict[str, np.ndarray], images: np.ndarray, blocks: tuple[int, ...], **architecture
):
    """Tokens after `blocks`, and the output, of timm's encoder built for the images' size."""
    height, width = images.shape[1:3]
    model = VisionTransformer(img_size=(height, width), **architecture).eval()
    weights = weights | {"pos_embed": bicubic(weights["pos_embed"], model.patch_embed.grid_size)}
    model.load_state_dict(
        {name: torch.from_numpy(tensor) for name, tensor in weights.items()}, strict=True
    )
    seen: list[np.ndarray] = []
    chosen = list(model.blocks.children())
    for block in blocks:
        chosen[block].register_forward_hook(
            lambda module, inputs, output: seen.append(output.numpy())
        )
    output = model(torch.from_numpy(images).permute(0, 3, 1, 2))
    return seen, output.numpy()


def random_weights(
    width: int, depth: int, patch: int, grid: int, rng: np.random.Generator
) -> dict[str, np.ndarray]:
    """A random encoder whose attention is far from uniform; numbers that float16 holds, so that the
    file packs well.
    """
    shapes = {
        "cls_token": (1, 1, width),
        "pos_embed": (1, 1 + grid**2, width),
        "patch_embed.proj.weight": (width, 3, patch, patch),
    }
    shapes |= {"patch_embed.proj.bias": (width,)}
    for i in range(depth):
        for name, inputs, outputs in (
            ("attn.qkv", 1, 3),
            ("attn.proj", 1, 1),
            ("mlp.fc1", 1, 4),
            ("mlp.fc2", 4, 1),
        ):
            shapes |= {
                f"blocks.{i}.{name}.weight": (outputs * width, inputs * width),
                f"blocks.{i}.{name}.bias": (outputs * width,),
            }
        for name in ("norm1", "norm2"):
            shapes |= {f"blocks.{i}.{name}.weight": (width,), f"blocks.{i}.{name}.bias": (width,)}
    tensors = {}
    for name, shape in shapes.items():
        scale = 1.5 / np.sqrt(np.prod(shape[1:])) if len(shape) > 1 and shape[0] > 1 else 0.3
        centre = 1.0 if "norm" in name and name.endswith("weight") else 0.0
        tensors[name] = (
            (centre + scale * rng.standard_normal(shape)).astype(np.float16).astype(np.float32)
        )
    return tensors


def full_size(config: Any, images: np.ndarray) -> tuple[dict[str, np.ndarray], list[np.ndarray]]:
    """For scripts/parity_encoders.py: random weights of the encoder of `config`, and its features
    at the taps.
    """
    weights = random_weights(
        config.width, config.depth, config.patch_size, config.grid[0], np.random.default_rng(0)
    )
    weights |= {
        "norm.weight": np.ones(config.width, np.float32),
        "norm.bias": np.zeros(config.width, np.float32),
    }
    sizes = {
        "patch_size": config.patch_size,
        "embed_dim": config.width,
        "depth": config.depth,
        "num_heads": config.heads,
    }
    tokens, _ = timm_tokens(weights, images, config.taps, num_classes=0, **sizes)
    return weights, stand_ins.as_maps(tokens, config, images)


def make_random() -> dict[str, np.ndarray]:
    """The random encoder and its tokens."""
    weights = random_weights(
        width=24, depth=4, patch=16, grid=TRAINED, rng=np.random.default_rng(0)
    )
    unused = {"norm.weight": np.ones(24, np.float32), "norm.bias": np.zeros(24, np.float32)}
    arrays = {f"weights/{name}": tensor for name, tensor in weights.items()}
    for height, width in SIZES:
        images = wave(height, width)[:1] if (height, width) != SIZES[0] else wave(height, width)
        tokens, _ = timm_tokens(
            weights | unused,
            images,
            (0, 1, 2, 3),
            patch_size=16,
            embed_dim=24,
            depth=4,
            num_heads=2,
            num_classes=0,
        )
        arrays[f"tokens/{height}x{width}"] = np.stack(tokens)
    return arrays


def make_positions() -> dict[str, np.ndarray]:
    """Positions of a 14x14 grid at other grids."""
    positions = np.random.default_rng(1).standard_normal((1, 197, 2)).astype(np.float32)
    return {"positions": positions} | {
        f"{rows}x{columns}": bicubic(positions, (rows, columns)) for rows, columns in GRIDS
    }


def make_pretrained(weights: Path, street: Path) -> dict[str, np.ndarray]:
    """The pre-trained ViT-Ti on the centre of a street."""
    pixels = np.asarray(Image.open(street))
    top = (pixels.shape[0] - 224) // 2
    left = (pixels.shape[1] - 224) // 2
    images = (
        pixels[None, top : top + 224, left : left + 224] / np.float32(255) - np.float32(0.5)
    ) / np.float32(0.5)
    blocks = (0, 2, 5, 8, 11)
    tokens, logits = timm_tokens(
        load_file(weights),
        images,
        blocks,
        patch_size=16,
        embed_dim=192,
        depth=12,
        num_heads=3,
        num_classes=1000,
    )
    stacked = np.concatenate(tokens)
    some = np.array([0, *range(1, 197, 15)])  # the class token and some patches
    return {
        "blocks": np.array(blocks),
        "some": some,
        "tokens": stacked[:, some],
        "norms": np.linalg.norm(stacked, axis=-1),
        "logits": logits[0],
    }


@torch.no_grad()
def make_pyramid() -> dict[str, np.ndarray]:
    """Torch's layers as the pyramid stacks them, on maps of odd sides."""
    torch.manual_seed(0)
    c = 4
    up1, up2, fpn2 = (torch.nn.ConvTranspose2d(c, c, 2, stride=2) for _ in range(3))
    norms = {"batch": torch.nn.BatchNorm2d(c), "layer": torch.nn.LayerNorm(c, eps=1e-6)}
    arrays: dict[str, np.ndarray] = {}
    for name, layer in (("fpn1_up1", up1), ("fpn1_up2", up2), ("fpn2", fpn2)):
        arrays |= {
            f"{name}.weight": layer.state_dict()["weight"].numpy(),
            f"{name}.bias": layer.state_dict()["bias"].numpy(),
        }
    scale = 1 + 0.3 * torch.randn(c)
    bias = torch.randn(c)
    mean = torch.randn(c)
    var = 0.5 + torch.rand(c)
    for norm in norms.values():
        norm.load_state_dict({"weight": scale, "bias": bias}, strict=False)
    norms["batch"].load_state_dict(
        {"weight": scale, "bias": bias, "running_mean": mean, "running_var": var}, strict=False
    )
    arrays |= {
        "norm.weight": scale.numpy(),
        "norm.bias": bias.numpy(),
        "norm.mean": mean.numpy(),
        "norm.var": var.numpy(),
    }
    maps = [torch.randn(2, c, 3, 5) for _ in range(4)]
    arrays["maps"] = np.stack([x.permute(0, 2, 3, 1).numpy() for x in maps])
    for kind, train in (("layer", False), ("batch", False), ("batch", True)):
        norm = norms[kind].train(train)
        y = up1(maps[0])
        before = y
        y = norm(y) if kind == "batch" else norm(y.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        levels = up2(F.gelu(y)), fpn2(maps[1]), maps[2], F.max_pool2d(maps[3], 2)
        for i, level in enumerate(levels):
            if i == 0 or kind == "layer":  # only the first level has a norm
                arrays[f"level{i}/{kind}{'/train' * train}"] = level.permute(0, 2, 3, 1).numpy()
        if train:
            arrays["mean/after"] = norm.state_dict()["running_mean"].numpy().copy()
            arrays["var/batch"] = before.var((0, 2, 3), correction=0).numpy()
    return arrays


def main() -> None:
    """Writes the four files."""
    pretrained = make_pretrained(Path(sys.argv[1]), Path(sys.argv[2]))
    for name, arrays in (
        ("vit_random", make_random()),
        ("vit_positions", make_positions()),
        ("vit_tiny_logits", pretrained),
        ("pyramid", make_pyramid()),
    ):
        np.savez_compressed(GOLDEN / f"{name}.npz", **arrays)  # pyright: ignore[reportArgumentType]
        print(f"{name}.npz: {(GOLDEN / f'{name}.npz').stat().st_size} bytes")


if __name__ == "__main__":
    main()
