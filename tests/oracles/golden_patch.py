"""Makes tests/golden/patch.npz: patch kernels resized by timm and torch.

Run by hand where torch and timm are installed:

    python tests/oracles/golden_patch.py

FlexiViT's resize is timm's `resample_patch_embed` with the interpolation of big_vision's own
`resample_patchemb` (bilinear without antialiasing; timm's default is another one), the other is
torch's plain bicubic.
"""

from pathlib import Path
import sys

import numpy as np
import torch  # pyright: ignore[reportMissingImports]
from torch.nn import functional as F  # pyright: ignore[reportMissingImports]

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from tests.oracles import stand_ins  # noqa: F401  before what follows

# isort: split

from timm.layers.patch_embed import resample_patch_embed  # pyright: ignore[reportMissingImports]

from tests.backbones.drawn import drawn

GOLDEN = Path(__file__).resolve().parents[2] / "tests" / "golden"
SIZES = ((14, 16), (16, 14), (16, 8), (8, 16), (5, 12))


def main() -> None:
    """Writes the file."""
    arrays = {}
    for source, target in SIZES:
        kernel = torch.from_numpy(
            drawn("patch_embed.proj.weight", (4, 3, source, source))
        )  # torch's axes
        flexi = resample_patch_embed(
            kernel, [target, target], interpolation="bilinear", antialias=False
        )
        bicubic = F.interpolate(kernel, size=(target, target), mode="bicubic", align_corners=False)
        arrays |= {
            f"flexi/{source}to{target}": flexi.numpy(),
            f"bicubic/{source}to{target}": bicubic.numpy(),
        }
    path = GOLDEN / "patch.npz"
    np.savez_compressed(path, **arrays)  # pyright: ignore[reportArgumentType]
    print(f"{path.name}: {path.stat().st_size} bytes")


if __name__ == "__main__":
    main()
