"""Losses of detectors, element by element: the caller masks, weighs, sums and divides.

A loss term is `masked_sum(values, mask) / denominator`, with the denominator of the global batch.
So padding and parts of a batch need no rule of their own.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Float32, Int

from jaxdg.detection.boxes import giou


def smooth_l1(
    prediction: Float[Array, "*n"], target: Float[Array, "*n"], beta: float = 0.0
) -> Float32[Array, "*n"]:
    """Smooth L1 (Girshick 2015): quadratic up to an error of `beta`, then linear.

    With `beta` 0, as in detectron2's heads, it is plain L1.
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
    """Focal loss (Lin et al. 2017): binary cross entropy with low weight on sure, right answers.

    Args:
        logits: one a class and place.
        target: 1 where the class is, else 0.
        alpha: weight of targets 1; the weight of others is 1 - alpha.
        gamma: power of the probability of the wrong answer.
    """
    wrong = jax.nn.sigmoid(jnp.where(target > 0, -1, 1) * logits.astype(jnp.float32))
    weight = jnp.where(target > 0, alpha, 1 - alpha) * wrong**gamma
    return weight * sigmoid_cross_entropy(logits, target)


def cross_entropy(logits: Float[Array, "*n k"], target: Int[Array, "*n"]) -> Float32[Array, "*n"]:
    """Cross entropy of softmax scores; class ids must be in range, even where they are masked."""
    log_p = jax.nn.log_softmax(logits.astype(jnp.float32))
    return -jnp.take_along_axis(log_p, target[..., None], axis=-1)[..., 0]


def masked_sum(values: Float[Array, "*n"], mask: Bool[Array, "*n"]) -> Float32[Array, ""]:
    """Sum of the values under the mask; the others, even nan, reach neither it nor its gradient."""
    return jnp.sum(jnp.where(mask, values, 0.0))


def minus_smaller(loss: Float32[Array, ""], penalty: Float32[Array, ""]) -> Float32[Array, ""]:
    """G-NAS's box loss: less a penalty if that is smaller, else as it is (wufan-cse/gnas, L1GLoss).

    The sign is that of the authors' code, which so rewards large predictions while the loss is
    large. Where the two meet, the value jumps by the penalty.
    """
    return jnp.where(loss > penalty, loss - penalty, loss)
