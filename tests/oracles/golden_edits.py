"""Writes tests/golden/edits.npz: torch's unbiased variance and adaptive average pooling.

python -m tests.oracles.golden_edits
"""

from pathlib import Path

import numpy as np
import torch  # pyright: ignore[reportMissingImports]

GOLDEN = Path(__file__).resolve().parents[1] / "golden" / "edits.npz"
SIDES = ((19, 23), (12, 12), (5, 7))  # rows and columns, pooled to 5: uneven, overlapping windows


def main() -> None:
    rng = np.random.default_rng(0)
    stored = {}
    for i, (rows, columns) in enumerate(SIDES):
        x = rng.normal(0.5, 2, (2, rows, columns, 3)).astype(np.float32)
        maps = torch.from_numpy(x).permute(0, 3, 1, 2)
        pooled = torch.nn.functional.adaptive_avg_pool2d(maps, (5, 5))
        flat = maps.flatten(2)
        stored |= {
            f"input{i}": x,
            f"pooled{i}": pooled.permute(0, 2, 3, 1).numpy(),
            f"variance{i}": torch.var(flat, dim=2).numpy(),
            f"mean{i}": flat.mean(dim=2).numpy(),
        }
    np.savez_compressed(GOLDEN, **stored)


if __name__ == "__main__":
    main()
