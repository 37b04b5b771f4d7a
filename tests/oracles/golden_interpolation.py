"""Makes tests/golden/interpolation.npz: maps resized by torch, as Rein and SoMA make their pyramid.

Run by hand where torch is installed:

    python tests/oracles/golden_interpolation.py

The file holds four maps with odd sides, torch's four levels of them, and for each map the gradient
of the sum of its level times fixed numbers.
"""

from pathlib import Path

import numpy as np
import torch  # pyright: ignore[reportMissingImports]
from torch.nn import functional as F  # pyright: ignore[reportMissingImports]

GOLDEN = Path(__file__).resolve().parents[2] / "tests" / "golden" / "interpolation.npz"
SIZE = (2, 5, 7, 3)  # images, rows, columns, channels
SCALES = (4, 2, 1, 0.5)


def main() -> None:
    """Writes the file."""
    rng = np.random.default_rng(0)
    arrays = {}
    for i, scale in enumerate(SCALES):
        x = rng.standard_normal(SIZE).astype(np.float32)
        leaf = torch.from_numpy(x).requires_grad_()
        level = F.interpolate(
            leaf.permute(0, 3, 1, 2), scale_factor=scale, mode="bilinear", align_corners=False
        ).permute(0, 2, 3, 1)
        factors = rng.standard_normal(level.shape).astype(np.float32)
        (level * torch.from_numpy(factors)).sum().backward()
        assert leaf.grad is not None
        arrays |= {f"map{i}": x, f"factors{i}": factors}
        arrays |= {f"level{i}": level.detach().numpy(), f"gradient{i}": leaf.grad.numpy()}
    np.savez_compressed(GOLDEN, **arrays)  # pyright: ignore[reportArgumentType]
    print(f"{GOLDEN.name}: {GOLDEN.stat().st_size} bytes")


if __name__ == "__main__":
    main()
