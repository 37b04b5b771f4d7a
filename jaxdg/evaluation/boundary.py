"""Boundary IoU of classes (Cheng et al. 2021): IoU of the pixels near the edges of masks.

The boundary of a mask is that of `mask_to_boundary` in the authors' code
(bowenc0221/boundary-iou-api): its pixels that lie at most 0.02 of the image's diagonal from a pixel
outside the mask or outside the image, in rows and in columns. Truth and prediction have their own
boundaries in the whole image. As in the authors' panoptic evaluation, pixels without truth count
in no intersection and no union, and truth that borders on them has a boundary there.

The authors judge segments, instances or panoptic ones, of single images: each counts as found by
the smaller of its two IoUs. They have no score of classes. Here a mask is all that a class has in
an image, whose intersection and union equal theirs for one segment. Intersections and unions are
then added over the dataset, as for IoU.
"""

from collections.abc import Callable, Sequence
import math
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float64, Int32, Int64, Integer
import numpy as np

from jaxdg.evaluation.confusion import by_class, percent
from jaxdg.evaluation.mean_iou import is_counted

RATIO = 0.02  # of the image's diagonal


def reach(size: Sequence[int]) -> int:
    """How far a boundary reaches into a mask, in pixels.

    Args:
        size: height and width of the image.
    """
    h, w = size
    return max(1, round(RATIO * math.sqrt(h * h + w * w)))


def boundaries(
    label: Integer[Array, "h w"], size: Int32[Array, "2"], distance: Int32[Array, ""], most: int
) -> Bool[Array, "h w"]:
    """Which pixels are on the boundary of their own class: some pixel of the square around them has
    another class or lies outside the image.

    Args:
        label: class ids; any other number is a class too.
        size: height and width of the image, whatever lies below and right of it being padding.
        distance: `reach` of the image.
        most: of the largest image that the array can hold, static.
    """
    h, w = label.shape
    inside = (jnp.arange(h)[:, None] < size[0]) & (jnp.arange(w) < size[1])
    classes = jnp.where(inside, label.astype(jnp.int16), -1)
    lowest = highest = jnp.pad(classes, most, constant_values=-1)
    for axis in (0, 1):
        lowest = _within(jnp.minimum, lowest, axis, distance, most)
        highest = _within(jnp.maximum, highest, axis, distance, most)
    return lowest != highest


def _within(
    pick: Callable[[Array, Array], Array], x: Array, axis: int, distance: Array, most: int
) -> Array:
    """The least or greatest of the values within a distance along an axis, which loses `most` at
    both ends.

    Spans of 1, 2, 4, .. values are joined from two of half the length; the last two overlap.
    """
    n = x.shape[axis] - 2 * most
    length = 2 * distance + 1
    span = 1
    own = jnp.ones_like(length)
    while 2 * span <= 2 * most + 1:
        joined = pick(x, jnp.roll(x, -span, axis))  # what comes round the end is never read
        x = jnp.where(2 * span <= length, joined, x)
        own = jnp.where(2 * span <= length, 2 * span, own)
        span *= 2
    first = most - distance

    def spans(start: Array) -> Array:
        return jax.lax.dynamic_slice_in_dim(x, start, n, axis)

    return pick(spans(first), spans(first + length - own))


def boundary_counts(
    prediction: Integer[Array, "h w"],
    label: Integer[Array, "h w"],
    size: Int32[Array, "2"],
    distance: Int32[Array, ""],
    num_classes: int,
    most: int,
) -> Int32[Array, "k 2"]:
    """Pixels in the intersection and in the union of the boundaries of each class in one image.

    Args:
        prediction: class ids.
        label: true class ids; the same pixels count as in `confusion_matrix`.
        size: see `boundaries`, as for what follows.
        distance: of the image.
        num_classes: k.
        most: of all images.
    """
    counted = is_counted(prediction, label, num_classes)
    true, found = (
        counted & boundaries(classes, size, distance, most) for classes in (label, prediction)
    )

    def pixels(of: Array, where: Array) -> Array:
        # One bin more takes what is not counted.
        bins = jnp.where(where, of.astype(jnp.int32), num_classes).reshape(-1)
        return jnp.bincount(bins, length=num_classes + 1)[:-1].astype(jnp.int32)

    same = label.astype(jnp.int32) == prediction.astype(jnp.int32)
    both = pixels(label, true & found & same)
    return jnp.stack([both, pixels(label, true) + pixels(prediction, found) - both], axis=-1)


def boundary_iou(counts: Int64[np.ndarray, "k 2"]) -> Float64[np.ndarray, "k"]:
    """Boundary IoU of each class in [0, 1], nan without any boundary.

    Args:
        counts: the sum of `boundary_counts` over the images.
    """
    both, either = counts.T
    return np.divide(both, either, out=np.full(len(counts), np.nan), where=either > 0)


def numbers(counts: Int64[np.ndarray, "k 2"], names: tuple[str, ...]) -> dict[str, Any]:
    """The entries of a domain in results.json, in percent.

    Args:
        counts: see `boundary_iou`.
        names: of the classes.

    Returns:
        `BoundaryIoU` of each class by name, None without any boundary, and their mean,
        `mBoundaryIoU`.
    """
    iou = boundary_iou(counts)
    known = iou[~np.isnan(iou)]
    mean = percent(known.mean()) if known.size else None
    return {"mBoundaryIoU": mean, "BoundaryIoU": by_class(iou, names)}
