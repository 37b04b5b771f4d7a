"""Declares torchvision's compiled operators, to be imported before timm, open_clip or transformers.

These import torchvision. Nothing here calls its operators, so a declaration is enough.
"""

from collections.abc import Iterable
import contextlib
from typing import Any

import numpy as np
import torch  # pyright: ignore[reportMissingImports]

schemas = torch.library.Library("torchvision", "FRAGMENT")
for _name in ("nms", "qnms"):
    with contextlib.suppress(RuntimeError):  # a working torchvision has declared it
        schemas.define(f"{_name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")


def as_maps(tokens: Iterable[np.ndarray], config: Any, images: np.ndarray) -> list[np.ndarray]:
    """Tokens [b, prefix + n, c] without the prefix, as [b, h / p, w / p, c]."""
    rows, columns = (side // config.patch_size for side in images.shape[1:3])
    return [t[:, config.prefix :].reshape(t.shape[0], rows, columns, -1) for t in tokens]
