"""Losses of detectors, element by element: the caller masks, weighs, sums and divides.

So that padding and parts of a batch need no rule of their own: a term is `masked_sum(values, mask)
/ denominator`, the denominator being that of the global batch.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Float32, Int

from jaxdg.detection.boxes import giou


def smooth_l1(
    prediction: Float[Array, "*n"], target: Float[Array, "*n"], beta: float = 0.0
) -> Float32[Array, "*n"]:
    """Smooth L1 (Girshick 2015): quadratic to an error of `beta`, linear beyond; with 0, as
    detectron2's heads have it, plain L1.
    """
    error = jnp.abs(prediction.astype(jnp.float32) - target)
    if beta == 0:
        return error
    return jnp.where(error < beta, 0.5 * error**2 / beta, error - 0.5 * beta)


def giou_loss(
    prediction: Float[Array, "*n 4"], target: Float[Array, "*n 4"]
) -> Float32[Array, "*n"]:
    """1 - GIoU of boxes in the same place."""
    return 1 - giou(prediction, target)


def sigmoid_cross_entropy(
    logits: Float[Array, "*n"], target: Float[Array, "*n"]
) -> Float32[Array, "*n"]:
    """Binary cross entropy with targets in 0 to 1."""
    logits = logits.astype(jnp.float32)
    return jax.nn.softplus(logits) - logits * target


def sigmoid_focal_loss(
    logits: Float[Array, "*n"], target: Float[Array, "*n"], alpha: float = 0.25, gamma: float = 2.0
) -> Float32[Array, "*n"]:
    """Focal loss (Lin et al. 2017): binary cross entropy of which the sure and right answers count
    little.

    Args:
        logits: one a class and place.
        target: 1 where the class is, else 0.
        alpha: weight of targets 1; others weigh 1 - alpha.
        gamma: power of the probability of the wrong answer.
    """
    wrong = jax.nn.sigmoid(jnp.where(target > 0, -1, 1) * logits.astype(jnp.float32))
    return (
        jnp.where(target > 0, alpha, 1 - alpha)
        * wrong**gamma
        * sigmoid_cross_entropy(logits, target)
    )


def cross_entropy(logits: Float[Array, "*n k"], target: Int[Array, "*n"]) -> Float32[Array, "*n"]:
    """Cross entropy of softmax scores with class ids, which must be in range, also where they will
    be masked.
    """
    log_p = jax.nn.log_softmax(logits.astype(jnp.float32))
    return -jnp.take_along_axis(log_p, target[..., None], axis=-1)[..., 0]


def masked_sum(values: Float[Array, "*n"], mask: Bool[Array, "*n"]) -> Float32[Array, ""]:
    """Sum of the values under the mask.

    What the others are, not a number included, reaches neither the sum nor its gradient to them.
    """
    return jnp.sum(jnp.where(mask, values, 0.0))
