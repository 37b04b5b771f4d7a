"""True and detected boxes of a batch, with a fixed number of slots an image."""

from collections.abc import Mapping
from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float32, Int, Int32, Shaped

from jaxdg.detection import boxes as boxlib


class Targets(NamedTuple):
    """The true boxes of a batch that a detector learns from; other slots hold 0.

    Attributes:
        boxes: x0 y0 x1 y1 in pixels.
        classes: from 0.
        valid: slots that hold a box.
    """

    boxes: Float32[Array, "b m 4"]
    classes: Int32[Array, "b m"]
    valid: Bool[Array, "b m"]

    @classmethod
    def of(cls, batch: Mapping[str, Array]) -> "Targets":
        """Reads a batch.

        Args:
            batch: `boxes` [b, m, 4], `classes` and `valid` [b, m]. A box whose `crowd` [b, m] is
                true covers a group and is left out.
        """
        valid = batch["valid"] & boxlib.non_empty(batch["boxes"])
        if "crowd" in batch:
            valid &= ~batch["crowd"]
        boxes = jnp.where(valid[..., None], batch["boxes"], 0.0).astype(jnp.float32)
        return cls(boxes, jnp.where(valid, batch["classes"], 0).astype(jnp.int32), valid)


class Detected(NamedTuple):
    """Detected boxes by descending score, the same number of slots for every image.

    Attributes:
        boxes: x0 y0 x1 y1 in pixels, inside the image.
        scores: 0 to 1.
        classes: from 0.
        valid: slots that hold a box; the content of the others is 0.
    """

    boxes: Float32[Array, "b d 4"]
    scores: Float32[Array, "b d"]
    classes: Int32[Array, "b d"]
    valid: Bool[Array, "b d"]

    @classmethod
    def of(cls, boxes: Array, scores: Array, classes: Array, valid: Array) -> "Detected":
        """The detections, with 0 in the slots that are not valid."""

        def clear(x):
            return jnp.where(valid.reshape(*valid.shape, *[1] * (x.ndim - 2)), x, 0)

        return cls(clear(boxes), clear(scores), clear(classes).astype(jnp.int32), valid)


def take(x: Shaped[Array, "b n *c"], index: Int[Array, "b r"]) -> Shaped[Array, "b r *c"]:
    """Picks rows of each image."""
    index = index.reshape(*index.shape, *[1] * (x.ndim - 2))
    return jnp.take_along_axis(x, index, axis=1, mode="promise_in_bounds")
