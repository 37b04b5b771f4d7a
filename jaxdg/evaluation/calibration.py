"""Whether a model is as sure as it is right: reliability by confidence, and its expected error.

The pixels of a domain are sorted into bins by their confidence, the probability of the predicted
class. The expected calibration error (Naeini et al. 2015, Guo et al. 2017) is the difference of
mean confidence and accuracy in a bin, averaged over the bins by their pixels. The bins are equally
wide; each begins with its lower edge, and the last holds 1 too (torchmetrics gives 1 a bin of its
own).

Counting runs on the device and is exact, so that the numbers depend neither on the order of pixels
nor on how many devices there are: a confidence counts as a whole number of 2^-24, half a step of
float32 below 1, and whole numbers are added.
"""

from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float32, Int64, Integer, UInt32
import numpy as np

from jaxdg.evaluation.confusion import percent
from jaxdg.evaluation.mean_iou import is_counted

BITS = 24  # of a confidence
PART = 12  # of them in each of two sums
HALF = 16  # bits of a sum over a row


def reliability_counts(
    confidence: Float32[Array, "h w"],
    prediction: Integer[Array, "h w"],
    label: Integer[Array, "h w"],
    num_classes: int,
    bins: int,
) -> UInt32[Array, "bins 4 2"]:
    """What the pixels of one image add to `reliability`.

    Args:
        confidence: probability of the predicted class, in [0, 1].
        prediction: class ids.
        label: true class ids; the same pixels count as in `confusion_matrix`.
        num_classes: k.
        bins: how many, below 256.

    Returns:
        Of each bin the pixels, the hits, and the sums of the lower and of the upper bits of the
        confidences, each as its lower and upper bits. Exact for sides below 2^16 pixels.
    """
    h = label.shape[0]
    whole = jnp.round(confidence * 2**BITS).astype(jnp.uint32)
    counted = is_counted(prediction, label, num_classes)
    # One bin more takes what is not counted.
    own = jnp.where(counted, jnp.minimum(whole * bins >> BITS, bins - 1), bins)
    values = (
        jnp.ones_like(whole),
        (prediction.astype(jnp.int32) == label.astype(jnp.int32)).astype(jnp.uint32),
        whole & (2**PART - 1),
        whole >> PART,
    )
    # Sums over a row stay below 2^32, and so do those of their halves over all rows.
    places = jnp.arange(h, dtype=jnp.uint32)[:, None] * (bins + 1) + own
    rows = jnp.zeros((h * (bins + 1), 4), jnp.uint32)
    rows = rows.at[places.reshape(-1)].add(jnp.stack(values, axis=-1).reshape(-1, 4))
    rows = rows.reshape(h, bins + 1, 4)[:, :bins]
    halves = jnp.stack([rows & (2**HALF - 1), rows >> HALF], axis=-1)
    return halves.sum(axis=0, dtype=jnp.uint32)


def reliability(counts: Int64[np.ndarray, "bins 4 2"]) -> dict[str, Any]:
    """The entries of a domain in results.json.

    Args:
        counts: the sum of `reliability_counts` over its images.

    Returns:
        `ECE`: the expected calibration error in percent, None without pixels. `reliability`: of
        each bin `pixels`, and in percent the mean `confidence` and the `accuracy`, None without
        pixels.
    """
    pixels, hits, low, high = np.moveaxis(counts[..., 0] + (counts[..., 1] << HALF), 1, 0)
    sure = (low + (high << PART)) / 2**BITS
    all_ = pixels.sum()

    def mean(sums: np.ndarray) -> list[float | None]:
        return [percent(s / n) if n else None for s, n in zip(sums, pixels, strict=True)]

    return {
        "ECE": percent(np.abs(sure - hits).sum() / all_) if all_ else None,
        "reliability": {
            "pixels": pixels.tolist(),
            "confidence": mean(sure),
            "accuracy": mean(hits),
        },
    }
