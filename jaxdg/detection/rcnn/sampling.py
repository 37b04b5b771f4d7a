"""Which boxes a detector is trained on: anchors or proposals, assigned to true boxes and sampled.

They follow detectron2's `Matcher` and `subsample_labels`, with a fixed number of slots in place of
index lists. Different: a true box that no box overlaps has no positives, where detectron2 makes
every box positive.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int32, Key

from jaxdg.detection.boxes import pairwise_iou

IGNORED = -1
NEGATIVE = 0
POSITIVE = 1


@jax.named_scope("matching")
def assign(
    boxes: Float[Array, "*b n 4"],
    truth: Float[Array, "*b m 4"],
    valid: Bool[Array, "*b m"],
    thresholds: tuple[float, float],
    *,
    low_quality: bool = False,
) -> tuple[Int32[Array, "*b n"], Int32[Array, "*b n"]]:
    """Assigns each box to the true box that it overlaps most. No gradient.

    Args:
        boxes: anchors or proposals.
        truth: true boxes.
        valid: slots of `truth` that hold a box; without any, all boxes are negative.
        thresholds: a box of less IoU than the first is negative, of at least the second positive;
            between them it is ignored.
        low_quality: the boxes with the highest IoU of a true box are positive at any IoU above 0,
            as in Faster R-CNN's proposal network. The index of such a box may be another true box,
            with which its IoU is higher.

    Returns:
        Index of the true box, the first of equal ones, and a label: 1 positive, 0 negative, -1
        ignored.

    Raises:
        ValueError: the thresholds do not ascend.
    """
    low, high = thresholds
    if not low <= high:
        raise ValueError(
            f"assignment thresholds are {low} and {high}; the first must not exceed the second"
        )
    overlap = pairwise_iou(*jax.lax.stop_gradient((truth, boxes)))
    overlap = jnp.where(valid[..., None], overlap, 0.0)
    best = jnp.max(overlap, axis=-2, initial=0.0)
    label = jnp.where(best >= high, POSITIVE, jnp.where(best < low, NEGATIVE, IGNORED))
    if low_quality:
        most = jnp.max(overlap, axis=-1, keepdims=True, initial=0.0)
        label = jnp.where(jnp.any((overlap == most) & (most > 0), axis=-2), POSITIVE, label)
    index = jnp.argmax(overlap, axis=-2) if truth.shape[-2] else jnp.zeros(best.shape)
    return index.astype(jnp.int32), label.astype(jnp.int32)


def sample(
    key: Key[Array, ""], label: Int32[Array, "*b n"], count: int, positive_share: float
) -> tuple[Int32[Array, "*b count"], Bool[Array, "*b count"]]:
    """Samples boxes: positive ones up to a share, negative ones for the rest.

    Args:
        key: for the draw.
        label: 1 positive, 0 negative, -1 ignored.
        count: boxes to draw.
        positive_share: largest share of positive ones, rounded down.

    Returns:
        Distinct indices, first of positive, then of negative boxes, each in random order; and which
        slots hold a box. Where boxes are too few, the slots at the end hold any index.
    """
    n = label.shape[-1]
    quota = int(count * positive_share)
    noise = jax.random.uniform(key, label.shape)

    def draw(of, most):
        value, index = jax.lax.top_k(jnp.where(label == of, noise, -1.0), min(most, n))
        pad = [(0, 0)] * (label.ndim - 1) + [(0, most - min(most, n))]
        return jnp.pad(index, pad), jnp.sum(value >= 0, axis=-1, keepdims=True)

    positive, positives = draw(POSITIVE, quota)
    negative, negatives = draw(NEGATIVE, count)
    slot = jnp.arange(count)
    place = jnp.where(slot < positives, slot, quota + slot - positives)
    index = jnp.take_along_axis(jnp.concatenate([positive, negative], axis=-1), place, axis=-1)
    return index.astype(jnp.int32), slot < positives + negatives
