"""Declares torchvision's compiled operators, to be imported before timm, open_clip or transformers.

These import torchvision. Nothing here calls its operators, so where its build lacks them a
declaration is enough.
"""

from collections.abc import Iterable
from typing import Any

import numpy as np
import torch  # pyright: ignore[reportMissingImports]

try:
    # torch ends the process if an operator is declared here and then by torchvision, so a working
    # torchvision comes first.
    import torchvision  # noqa: F401  # pyright: ignore[reportMissingImports]
except (ImportError, RuntimeError):
    schemas = torch.library.Library("torchvision", "FRAGMENT")
    for _name in ("nms", "qnms"):
        schemas.define(f"{_name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")


def as_maps(tokens: Iterable[np.ndarray], config: Any, images: np.ndarray) -> list[np.ndarray]:
    """Tokens [b, prefix + n, c] without the prefix, as [b, h / p, w / p, c]."""
    rows, columns = (side // config.patch_size for side in images.shape[1:3])
    return [t[:, config.prefix :].reshape(t.shape[0], rows, columns, -1) for t in tokens]
