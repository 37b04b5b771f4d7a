"""Class scores of an image of any size from a model that sees windows of one size.

Windows are placed as in mmsegmentation's `slide` inference: a fixed stride, the last window moved back to end at the border, and
scores averaged where windows overlap. Different from it: an image smaller than the window is padded at the bottom and on the right,
so the model always sees one shape, and the windows of a batch go through it together.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32
import numpy as np


def window_starts(size: int, window: int, stride: int) -> tuple[int, ...]:
    """Where the windows along one side of an image start.

    Args:
        size: length of the image's side, in pixels.
        window: length of the window.
        stride: distance between two starts; the last may be nearer to the one before, to end at the border.

    Returns:
        Starts in pixels, ascending; (0,) if the window covers the side.

    Raises:
        ValueError: a length is not positive, or the stride exceeds the window and would leave pixels out.
    """
    if size < 1 or not 1 <= stride <= window:
        raise ValueError(f"size {size}, window {window}, stride {stride}: the size must be at least 1 and the stride from 1 to the window")
    last = max(size - window, 0)
    count = (last + stride - 1) // stride + 1
    return tuple(min(i * stride, last) for i in range(count))


def sliding_window(
    predict: Callable[[Float[Array, "n wh ww c"]], Float[Array, "n wh ww k"]],
    images: Float[Array, "b h w c"],
    window: tuple[int, int],
    stride: tuple[int, int],
    windows_per_call: int | None = None,
) -> Float32[Array, "b h w k"]:
    """Class scores of whole images, averaged over the windows that see a pixel.

    Args:
        predict: class scores of a stack of windows; pure, traced once, always called with the same shape.
        images: normalised images; missing pixels are padded with 0, the mean.
        window: height and width of a window.
        stride: vertical and horizontal distance between windows.
        windows_per_call: most windows in one call of `predict`, which bounds the memory; None: all windows of the batch at once.
            A call takes the same places of every image, so that a batch sharded over devices stays where it is: the number is
            rounded down to a multiple of the batch, and is one window an image at least.

    Returns:
        Scores in float32, of the images' size.

    Raises:
        ValueError: a stride exceeds its window, `windows_per_call` is not positive, or `predict` returns another size than the window.
    """
    if windows_per_call is not None and windows_per_call < 1:
        raise ValueError(f"windows_per_call is {windows_per_call}; it must be at least 1, or None for all windows at once")
    (b, h, w, c), (wh, ww) = images.shape, window
    places = [(y, x) for y in window_starts(h, wh, stride[0]) for x in window_starts(w, ww, stride[1])]
    per_call = len(places) if windows_per_call is None else min(max(windows_per_call // b, 1), len(places))
    calls = -(-len(places) // per_call)
    padding = calls * per_call - len(places)
    # The last call is filled up with the first place, whose scores are dropped.
    starts = jnp.asarray(places + places[:1] * padding, jnp.int32).reshape(calls, per_call, 2)
    valid = (jnp.arange(calls * per_call) < len(places)).reshape(calls, per_call)

    padded = jnp.pad(images, ((0, 0), (0, max(wh - h, 0)), (0, max(ww - w, 0)), (0, 0)))
    scores = jax.eval_shape(predict, jax.ShapeDtypeStruct((b * per_call, wh, ww, c), images.dtype))
    if scores.shape[:3] != (b * per_call, wh, ww):
        raise ValueError(
            f"predict returned scores of shape {scores.shape} for windows of shape {(b * per_call, wh, ww, c)}: sizes must agree"
        )
    k = scores.shape[-1]

    def call(total, inputs):
        starts, valid = inputs
        cut = lambda start: jax.lax.dynamic_slice(padded, (0, start[0], start[1], 0), (b, wh, ww, c))
        windows = jax.vmap(cut, out_axes=1)(starts)  # the batch leads, so flattening it with the places keeps a sharding
        scores = predict(windows.reshape(b * per_call, wh, ww, c)).reshape(b, per_call, wh, ww, k).astype(jnp.float32)

        def add(i, total):
            at = (0, starts[i, 0], starts[i, 1], 0)
            here = jax.lax.dynamic_slice(total, at, (b, wh, ww, k))
            return jax.lax.dynamic_update_slice(total, here + jnp.where(valid[i], scores[:, i], 0.0), at)

        return jax.lax.fori_loop(0, per_call, add, total), None

    # Adding inside the scan, rather than stacking its outputs, holds the scores of one call and of the images, never of all windows.
    total, _ = jax.lax.scan(call, jnp.zeros((*padded.shape[:3], k), jnp.float32), (starts, valid))
    seen = np.zeros(padded.shape[1:3], np.float32)
    for y, x in places:
        seen[y : y + wh, x : x + ww] += 1
    return (total / seen[..., None])[:, :h, :w]


def resize_scores(scores: Float[Array, "b h w k"], size: tuple[int, int]) -> Float32[Array, "b h2 w2 k"]:
    """Resizes class scores bilinearly, as torch's `F.interpolate(mode="bilinear", align_corners=False)`.

    Pixel centres are aligned, the border is repeated, and nothing is smoothed when shrinking. Two neighbours are gathered a side:
    `jax.image.resize` multiplies by dense matrices instead, which took eight times as long on CPU.

    Args:
        scores: scores or logits of any float type.
        size: height and width of the result, static.

    Returns:
        The scores in float32 at `size`.

    Raises:
        ValueError: `size` is not positive.
    """
    if min(size) < 1:
        raise ValueError(f"cannot resize to {size}: height and width must be at least 1")
    scores = scores.astype(jnp.float32)
    for axis, length in zip((1, 2), size, strict=True):
        n = scores.shape[axis]
        if n == length:
            continue
        centre = np.maximum((np.arange(length) + 0.5) * n / length - 0.5, 0)
        low = np.floor(centre).astype(np.int32)
        high = np.minimum(low + 1, n - 1)
        share = (centre - low).astype(np.float32).reshape(-1, *[1] * (3 - axis))
        scores = jnp.take(scores, low, axis=axis) * (1 - share) + jnp.take(scores, high, axis=axis) * share
    return scores
