"""Confusion matrix and intersection over union, as the official Cityscapes evaluation counts them.

A class's IoU is TP / (TP + FP + FN), taken from one matrix over the whole test set and never
averaged over images. Pixels whose truth is ignored count nowhere, not even as false positives.
Counting runs on the device in int32, one matrix a batch; the set's total is the sum of those on the
host in int64, because a large set passes 2^31 pixels.
"""

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float64, Int32, Integer
import numpy as np


def confusion_matrix(
    prediction: Integer[Array | np.ndarray, "..."],
    label: Integer[Array | np.ndarray, "..."],
    num_classes: int,
    ignore: int = 255,
) -> Int32[Array, "k k"]:
    """Counts how often each true class was predicted as each class.

    A pixel counts only if its label and its prediction both lie in [0, num_classes) and its label
    is not `ignore`; every other value is left out silently, since a traced function cannot raise.
    Readers check label ids when they read them. The padding of a last batch is left out by setting
    its labels to `ignore`.

    Args:
        prediction: class ids of any shape and integer type.
        label: true class ids, of the same shape.
        num_classes: k; static under `jax.jit`.
        ignore: label of the pixels that have no truth.

    Returns:
        The matrix; rows are the truth, columns the prediction. Counts are exact below 2^31 a call.

    Raises:
        ValueError: the shapes differ.
    """
    if prediction.shape != label.shape:
        raise ValueError(
            f"prediction {prediction.shape} and label {label.shape} must have the same shape"
        )
    predicted = jnp.asarray(prediction).astype(jnp.int32).reshape(-1)
    true = jnp.asarray(label).astype(jnp.int32).reshape(-1)
    counted = is_counted(predicted, true, num_classes, ignore)
    # One bin more takes what is not counted. On CPU a bincount is 20 times faster than one-hot
    # matrix products, and it is exact.
    bins = jnp.where(counted, true * num_classes + predicted, num_classes**2)
    return (
        jnp.bincount(bins, length=num_classes**2 + 1)[:-1]
        .reshape(num_classes, num_classes)
        .astype(jnp.int32)
    )


def is_counted(
    prediction: Integer[Array, "*n"],
    label: Integer[Array, "*n"],
    num_classes: int,
    ignore: int = 255,
) -> Bool[Array, "*n"]:
    """Which pixels `confusion_matrix` counts, from the same arguments."""
    prediction = prediction.astype(jnp.int32)
    label = label.astype(jnp.int32)
    return (
        (label != ignore)
        & (label >= 0)
        & (label < num_classes)
        & (prediction >= 0)
        & (prediction < num_classes)
    )


def iou(confusion: Integer[Array | np.ndarray, "k k"]) -> Float64[np.ndarray, "k"]:
    """Intersection over union of each class.

    Args:
        confusion: counts, rows the truth; the sum of any number of matrices, in int64 if it may
            pass 2^31.

    Returns:
        IoU of each class in [0, 1]; nan where a class is neither in the truth nor in the
        prediction. `np.nanmean` of it is the mIoU.

    Raises:
        ValueError: a count is negative, so an int32 sum has overflowed.
    """
    counts = np.asarray(confusion).astype(np.int64)
    if (counts < 0).any():
        raise ValueError(
            "the confusion matrix has negative counts: an int32 sum overflowed; add the matrices of"
            " the batches in int64"
        )
    hit = np.diagonal(counts)
    union = counts.sum(axis=0) + counts.sum(axis=1) - hit
    return np.divide(hit, union, out=np.full(len(counts), np.nan), where=union > 0)
