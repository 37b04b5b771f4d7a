"""Makes tests/golden/clip_resnet.npz: outputs of open_clip's ResNet.

Run by hand where torch and open_clip are installed:

    python tests/oracles/golden_clip_resnet.py

One small random encoder under open_clip's names, its features after every stage, the embedding of
its attention pool, and for every pixel of the deepest map the pool's value projection projected
again (MaskCLIP), at several image sizes. The pool's positions are resized with torch's plain
bicubic where a map is not of their size. Weights are not stored: `drawn` makes each from its name,
here and in the tests.
"""

from pathlib import Path
import sys
from typing import Any
import zlib

import numpy as np
import torch  # pyright: ignore[reportMissingImports]
from torch.nn import functional as F  # pyright: ignore[reportMissingImports]

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from tests.oracles import stand_ins  # noqa: F401  before what follows

# isort: split

from open_clip.modified_resnet import ModifiedResNet  # pyright: ignore[reportMissingImports]

GOLDEN = Path(__file__).resolve().parents[2] / "tests" / "golden"
SIZES = ((96, 96), (64, 96), (77, 101))  # as trained, not square, odd
SMALL: dict[str, Any] = dict(layers=[2, 1, 3, 1], output_dim=6, heads=2, image_size=96, width=4)


def wave(height: int, width: int) -> np.ndarray:
    """A smooth picture by formula, [1, h, w, 3] in about -1..1; the tests compute the same."""
    y, x, c = np.ogrid[0:height, 0:width, 0:3]
    return (
        np.sin(0.33 * y + 0.5 * c) * np.cos(0.21 * x - 0.9 * c) + 0.3 * np.sin(0.9 * x + 1.7 * y)
    ).astype(np.float32)[None]


def drawn(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """The random tensor of a name, those of BatchNorm far from 0 and 1."""
    numbers = np.random.default_rng(zlib.crc32(name.encode())).standard_normal(shape)
    if name.endswith("running_var"):
        return np.exp(0.5 * numbers).astype(np.float32)
    if len(shape) > 1:
        return (
            numbers * (1 if "positional" in name else 1.2 / np.sqrt(np.prod(shape[1:])))
        ).astype(np.float32)
    quieter = 0.25 if "bn3.weight" in name else 1  # or residuals would grow with depth
    return (quieter * (0.3 * numbers + name.endswith("weight"))).astype(np.float32)


def build(**sizes: Any) -> tuple[ModifiedResNet, dict[str, np.ndarray]]:
    """A random encoder, and its weights below `visual.` without the counters of batches."""
    with torch.device("meta"):
        shapes = {
            f"visual.{name}": tuple(tensor.shape)
            for name, tensor in ModifiedResNet(**sizes).state_dict().items()
        }
    weights = {name: drawn(name, shape) for name, shape in shapes.items() if shape}
    model = ModifiedResNet(**sizes).eval()
    state = {
        name.removeprefix("visual."): torch.from_numpy(tensor) for name, tensor in weights.items()
    }
    counters = model.load_state_dict(state, strict=False).missing_keys
    assert all(name.endswith("num_batches_tracked") for name in counters)
    return model, weights


@torch.inference_mode()
def outputs(
    model: ModifiedResNet, images: np.ndarray
) -> tuple[list[np.ndarray], np.ndarray, np.ndarray]:
    """Features of every stage [b, h, w, c], the embedding [b, e], and one of every pixel of the
    deepest map [b, h, w, e].
    """
    x = model.stem(torch.from_numpy(images).permute(0, 3, 1, 2))
    stages = []
    for layer in (model.layer1, model.layer2, model.layer3, model.layer4):
        x = layer(x)
        stages.append(x.permute(0, 2, 3, 1).numpy())
    pool = model.attnpool
    learned = pool.positional_embedding.data
    side = round((len(learned) - 1) ** 0.5)
    square = learned[1:].reshape(1, side, side, -1).permute(0, 3, 1, 2)
    resized = F.interpolate(
        square, size=x.shape[2:], mode="bicubic", align_corners=False, antialias=False
    )
    pool.positional_embedding.data = torch.cat([learned[:1], resized[0].flatten(1).T])
    embedding = pool(x).numpy()
    pool.positional_embedding.data = learned
    return stages, embedding, pool.c_proj(pool.v_proj(x.permute(0, 2, 3, 1))).numpy()


def full_size(config: Any, images: np.ndarray) -> tuple[dict[str, np.ndarray], list[np.ndarray]]:
    """For scripts/parity_encoders.py: random weights of the encoder of `config`, and its features
    at the taps.
    """
    width = config.widths[0] // 4
    sizes = dict(
        layers=config.blocks,
        output_dim=config.embedding,
        heads=width // 2,
        image_size=32 * config.pool_grid,
        width=width,
    )
    model, weights = build(**sizes)
    stages, _, _ = outputs(model, images)
    return weights, [stages[tap] for tap in config.taps]


def main() -> None:
    """Writes the file."""
    model, weights = build(**SMALL)
    arrays: dict[str, np.ndarray] = {
        "names": np.asarray(
            [f"{name} {' '.join(map(str, t.shape))}" for name, t in weights.items()]
        )
    }
    for h, w in SIZES:
        stages, embedding, dense = outputs(model, wave(h, w))
        arrays |= {f"{h}x{w}/stage{i}": features for i, features in enumerate(stages)}
        arrays |= {f"{h}x{w}/pool": embedding, f"{h}x{w}/dense": dense}
        print(h, w, [f"{x.std():.2f} {x.shape}" for x in (*stages, embedding, dense)])
    path = GOLDEN / "clip_resnet.npz"
    np.savez_compressed(path, **arrays)  # pyright: ignore[reportArgumentType]
    print(f"{path.name}: {path.stat().st_size} bytes")


if __name__ == "__main__":
    main()
