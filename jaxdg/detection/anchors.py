"""Anchors of a pyramid, and the points that anchor-free heads predict from.

Anchors are laid as in detectron2's `DefaultAnchorGenerator`: their sides are not rounded, and by
default the first is centred on the image's corner (offset 0, as in ViTDet and Mask R-CNN).
torchvision's detectors round the half sides.
"""

from collections.abc import Sequence

import jax.numpy as jnp
from jaxtyping import Array, Float32
import numpy as np

RATIOS = (0.5, 1.0, 2.0)


def points(
    shapes: Sequence[tuple[int, int]], strides: Sequence[int | float], offset: float = 0.5
) -> tuple[Float32[Array, "_ 2"], ...]:
    """The place of every cell in the image, row by row.

    Args:
        shapes: rows and columns of each level.
        strides: pixels in a cell of each level.
        offset: of a point from the upper left corner of its cell, in cells; 0.5 is the centre, as
            in FCOS (Tian et al. 2019).

    Returns:
        (x, y) in pixels, one array a level.
    """

    def level(shape, stride):
        y, x = ((jnp.arange(n, dtype=jnp.float32) + offset) * stride for n in shape)
        return jnp.stack(jnp.meshgrid(x, y), axis=-1).reshape(-1, 2)

    return tuple(level(shape, stride) for shape, stride in zip(shapes, strides, strict=True))


def anchors(
    shapes: Sequence[tuple[int, int]],
    strides: Sequence[int | float],
    sizes: Sequence[Sequence[int | float]],
    ratios: Sequence[int | float] = RATIOS,
    *,
    offset: float = 0.0,
    rounded: bool = False,
) -> tuple[Float32[Array, "_ 4"], ...]:
    """The anchors of every cell, row by row; in a cell, all ratios of a size, then the next size.

    Args:
        shapes: rows and columns of each level.
        strides: pixels in a cell of each level.
        sizes: square roots of the anchors' areas in pixels, for each level.
        ratios: height to width.
        offset: of the centres from the upper left corner of their cells, in cells.
        rounded: half the sides are whole pixels, as in torchvision.

    Returns:
        Boxes in pixels, one array a level; those at the border reach beyond the image.
    """

    def level(centres, sizes):
        roots = [(size, ratio**0.5) for size in sizes for ratio in ratios]
        half = np.array([[size / root / 2, size * root / 2] for size, root in roots], np.float32)
        half = np.round(half) if rounded else half
        boxes = jnp.tile(centres, 2)[:, None] + np.concatenate([-half, half], axis=1)
        return boxes.reshape(-1, 4)

    return tuple(level(*pair) for pair in zip(points(shapes, strides, offset), sizes, strict=True))
