"""Values of boxes that VOC's and COCO's files have in common: flags, corners and areas."""

from typing import Any

from jaxtyping import Float, Float32, Integer
import numpy as np

# `boxes`, `classes`, `difficult`, `crowd` and `areas` of one image, see `boxes.py`.
Boxes = dict[str, np.ndarray]

YES = ("1", "1.0", "true", "yes", "t", "y")
NO = ("", "0", "0.0", "false", "no", "f", "n")
BORDERS = (32.0**2, 96.0**2)  # between COCO's small, medium and large, square pixels


def flag(value: Any) -> bool | None:
    """The truth value that a file states as a number, a text or a truth value.

    Args:
        value: as written; None and "" mean no.

    Returns:
        Whether it says yes; None if it says neither yes nor no.
    """
    if value is None or type(value) is int:  # as almost all files have it
        return bool(value) if value in (None, 0, 1) else None
    text = str(value).strip().lower()
    return True if text in YES else False if text in NO else None


def areas_of(boxes: Float[np.ndarray, "n 4"]) -> Float32[np.ndarray, " n"]:
    """Square pixels of boxes x0 y0 x1 y1, used where the areas of the objects are unknown."""
    wide = boxes.astype(np.float64)
    return rounded((wide[:, 2] - wide[:, 0]) * (wide[:, 3] - wide[:, 1]))


def rounded(areas: Float[np.ndarray, " n"]) -> Float32[np.ndarray, " n"]:
    """Areas in float32 that stay on their side of the borders of COCO's sizes.

    A border itself counts on both sides.
    """
    result = areas.astype(np.float32)
    for border in BORDERS:
        moved = (result == border) & (areas != border)
        side = np.where(areas[moved] < border, 0, 2 * border).astype(np.float32)
        result[moved] = np.nextafter(np.float32(border), side)
    return result


def fit(
    corners: Float[np.ndarray, "n 4"], sizes: Integer[np.ndarray, "n 2"], *, first: int
) -> tuple[Float32[np.ndarray, "n 4"], list[tuple[int, str]]]:
    """Boxes from corners as they are written.

    Args:
        corners: smallest and largest x and y; the largest pixel is part of the box if pixels count
            from 1.
        sizes: height and width of the image, one a box.
        first: number of the first pixel, 0 or 1.

    Returns:
        x0 y0 x1 y1 in pixels, clipped to the image; and the row and fault of each box that is
        empty, not finite, or more than one pixel outside.
    """
    limits = sizes[:, ::-1]
    with np.errstate(all="ignore"):  # a file may hold any number
        low = (corners[:, :2] - first).astype(np.float32)
        high = corners[:, 2:].astype(np.float32)
        boxes = np.concatenate([low.clip(0, limits), high.clip(0, limits)], 1, dtype=np.float32)
        positive = np.min(high - low, axis=1) > 0
        near = (corners[:, :2] >= -1).all(1) & (corners[:, 2:] <= limits + 1).all(1)
        inside = near & (boxes[:, 2:] > boxes[:, :2]).all(1)
    wrong = []
    for i in np.flatnonzero(~(positive & inside)).tolist():
        x0, y0, x1, y1 = corners[i].tolist()
        h, w = sizes[i].tolist()
        if not np.isfinite(corners[i]).all():
            what = "has no box of four numbers"
        elif not positive[i]:
            what = f"has a box of {x1 - x0 + first:g}x{y1 - y0 + first:g} pixels"
        else:
            place = f"x {x0:g} to {x1:g}, y {y0:g} to {y1:g} of {w}x{h}"
            what = f"has a box outside the image ({place})"
        wrong.append((i, what))
    return boxes, wrong
