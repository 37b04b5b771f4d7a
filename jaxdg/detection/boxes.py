"""Boxes: areas, overlaps, and the offsets by which a detector moves an anchor.

A box is (x0, y0, x1, y1) in pixels, continuous: it covers [x0, x1) x [y0, y1). A box whose width or
height is not positive is empty: its area and its overlap with anything are 0, where torchvision
divides 0 by 0. All is float32 and broadcasts over leading axes.

Areas go through `jnp.where` so that the compiler cannot fuse the products with the sums around
them. An overlap then has the same bits wherever it is computed, on which ties between anchors and
comparisons with a threshold depend.
"""

import math

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Float32

# A decoded side is at most 62.5 times its anchor's, as in detectron2 and torchvision.
SCALE_LIMIT = math.log(1000 / 16)

Weights = tuple[float, float, float, float]


def sides(boxes: Float[Array, "*n 4"]) -> tuple[Float32[Array, "*n"], Float32[Array, "*n"]]:
    """Widths and heights; negative where the corners are swapped."""
    x0, y0, x1, y1 = _corners(boxes)
    return x1 - x0, y1 - y0


def area(boxes: Float[Array, "*n 4"]) -> Float32[Array, "*n"]:
    """Areas in square pixels; 0 for an empty box."""
    return _product(*sides(boxes))


def non_empty(boxes: Float[Array, "*n 4"], least: float = 0.0) -> Bool[Array, "*n"]:
    """Whether all corners are finite and both sides are longer than `least` pixels."""
    width, height = sides(boxes)
    return jnp.all(jnp.isfinite(boxes), axis=-1) & (width > least) & (height > least)


def clip(
    boxes: Float[Array, "*n 4"], size: tuple[int, int] | Float[Array, "*#n 2"]
) -> Float32[Array, "*n 4"]:
    """Boxes cut off at the image's border.

    Args:
        boxes: in pixels.
        size: height and width of the image; an array gives each box its own, as `sizes[:, None]`
            [b, 1, 2] does for boxes [b, n, 4].
    """
    height, width = jnp.moveaxis(jnp.asarray(size, jnp.float32), -1, 0)
    limits = jnp.stack([width, height, width, height], axis=-1)
    return jnp.clip(boxes.astype(jnp.float32), 0.0, limits)


def iou(a: Float[Array, "*#n 4"], b: Float[Array, "*#n 4"]) -> Float32[Array, "*n"]:
    """Intersection over union of boxes in the same place, 0 to 1; 0 if one is empty."""
    intersection, union = _overlap(a, b)
    return intersection / jnp.where(union > 0, union, 1.0)


def pairwise_iou(a: Float[Array, "*b n 4"], b: Float[Array, "*b m 4"]) -> Float32[Array, "*b n m"]:
    """Intersection over union of every box of `a` with every box of `b`."""
    return iou(a[..., :, None, :], b[..., None, :, :])


def giou(a: Float[Array, "*#n 4"], b: Float[Array, "*#n 4"]) -> Float32[Array, "*n"]:
    """Generalised IoU (Rezatofighi et al. 2019) of boxes in the same place, -1 to 1.

    It is the IoU less the share of the hull that neither box covers.
    """
    intersection, union = _overlap(a, b)
    ax0, ay0, ax1, ay1 = _corners(a)
    bx0, by0, bx1, by1 = _corners(b)
    hull = _product(
        jnp.maximum(ax1, bx1) - jnp.minimum(ax0, bx0), jnp.maximum(ay1, by1) - jnp.minimum(ay0, by0)
    )
    uncovered = (hull - union) / jnp.where(hull > 0, hull, 1.0)
    return intersection / jnp.where(union > 0, union, 1.0) - uncovered


def pairwise_giou(a: Float[Array, "*b n 4"], b: Float[Array, "*b m 4"]) -> Float32[Array, "*b n m"]:
    """Generalised IoU of every box of `a` with every box of `b`."""
    return giou(a[..., :, None, :], b[..., None, :, :])


def encode(
    boxes: Float[Array, "*#n 4"],
    anchors: Float[Array, "*#n 4"],
    weights: Weights = (1.0, 1.0, 1.0, 1.0),
) -> Float32[Array, "*n 4"]:
    """Offsets from anchors to boxes (Girshick et al. 2014), as detectron2's `Box2BoxTransform`.

    Args:
        boxes: targets.
        anchors: anchors or proposals.
        weights: of the four offsets; a box head takes (10, 10, 5, 5).

    Returns:
        Shift of the centre in sides of the anchor, and the logarithm of the ratio of sides, each
        times its weight. Finite, but without meaning, where a box or an anchor is empty.
    """

    def centre_and_positive_sides(boxes):
        x, y, *sides = _centres(boxes)
        return x, y, *(jnp.where(side > 0, side, 1.0) for side in sides)

    x, y, width, height = centre_and_positive_sides(boxes)
    anchor_x, anchor_y, anchor_width, anchor_height = centre_and_positive_sides(anchors)
    shifts = (x - anchor_x) / anchor_width, (y - anchor_y) / anchor_height
    scales = jnp.log(width / anchor_width), jnp.log(height / anchor_height)
    offsets = zip(weights, (*shifts, *scales), strict=True)
    return jnp.stack([weight * offset for weight, offset in offsets], axis=-1)


def decode(
    offsets: Float[Array, "*#n 4"],
    anchors: Float[Array, "*#n 4"],
    weights: Weights = (1.0, 1.0, 1.0, 1.0),
) -> Float32[Array, "*n 4"]:
    """Boxes at offsets from anchors, the inverse of `encode` up to `SCALE_LIMIT`.

    Args:
        offsets: as `encode` returns them. For those of k classes, [.., n, k, 4], anchors are
            [.., n, 1, 4].
        anchors: anchors or proposals.
        weights: as given to `encode`.
    """
    anchor_x, anchor_y, anchor_width, anchor_height = _centres(anchors)
    dx, dy, dw, dh = (offset / w for offset, w in zip(_corners(offsets), weights, strict=True))
    x = dx * anchor_width + anchor_x
    y = dy * anchor_height + anchor_y
    half_width = 0.5 * jnp.exp(jnp.minimum(dw, SCALE_LIMIT)) * anchor_width
    half_height = 0.5 * jnp.exp(jnp.minimum(dh, SCALE_LIMIT)) * anchor_height
    return jnp.stack([x - half_width, y - half_height, x + half_width, y + half_height], axis=-1)


def _corners(boxes: Array) -> tuple[Array, Array, Array, Array]:
    x0, y0, x1, y1 = jnp.moveaxis(boxes.astype(jnp.float32), -1, 0)
    return x0, y0, x1, y1


def _centres(boxes: Array) -> tuple[Array, Array, Array, Array]:
    """Centre and sides."""
    x0, y0, *_ = _corners(boxes)
    width, height = sides(boxes)
    return x0 + 0.5 * width, y0 + 0.5 * height, width, height


def _product(width: Array, height: Array) -> Array:
    return jnp.where((width > 0) & (height > 0), width * height, 0.0)


def _overlap(a: Array, b: Array) -> tuple[Array, Array]:
    """Intersection and union."""
    ax0, ay0, ax1, ay1 = _corners(a)
    bx0, by0, bx1, by1 = _corners(b)
    intersection = _product(
        jnp.minimum(ax1, bx1) - jnp.maximum(ax0, bx0), jnp.minimum(ay1, by1) - jnp.maximum(ay0, by0)
    )
    return intersection, area(a) + area(b) - intersection
