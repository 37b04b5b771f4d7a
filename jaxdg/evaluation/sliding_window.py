"""Class scores of images of any size from a model that sees windows of one size.

Windows are placed as in mmsegmentation's `slide` inference: a fixed stride, the last window moved
back to end at the border, and scores averaged where windows overlap. Different from it: an image
smaller than the window is padded at the bottom and on the right, so the model always sees one
shape, and the windows of a batch go through it together.

Images of many sizes share one compiled program: they are padded to a common shape, their own sizes
are traced values, and where windows lie, how many there are and how scores are resized follows from
those. What stands in the padding reaches no score inside the image.
"""

from collections.abc import Callable
import itertools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Float32, Int32, Num, UInt8
import numpy as np


def window_starts(size: int, window: int, stride: int) -> tuple[int, ...]:
    """Where the windows along one side of an image start.

    Args:
        size: length of the image's side, in pixels.
        window: length of the window.
        stride: distance between two starts; the last may be nearer to the one before, to end at the
            border.

    Returns:
        Starts in pixels, ascending; (0,) if the window covers the side.

    Raises:
        ValueError: a length is not positive, or the stride exceeds the window and would leave
            pixels out.
    """
    if size < 1 or not 1 <= stride <= window:
        raise ValueError(
            f"size {size}, window {window}, stride {stride}: the size must be at least 1 and the"
            " stride from 1 to the window"
        )
    last = max(size - window, 0)
    count = (last + stride - 1) // stride + 1
    return tuple(min(i * stride, last) for i in range(count))


def shared_side(size: int, window: int, stride: int) -> int:
    """Length that a side is padded to, so that images of many sizes share one program: that of 1,
    2, 3, 4, 6, 8, 12, 16, .. windows.

    As padding makes no window more, only memory grows with it.
    """
    needed = len(window_starts(size, window, stride))
    shared = (math.ceil(2 ** (i / 2)) for i in itertools.count())
    return window + (next(count for count in shared if count >= needed) - 1) * stride


def sliding_window(
    predict: Callable[[Float[Array, "n wh ww c"]], Float[Array, "n wh ww k"]],
    images: Float[Array, "b h w c"],
    window: tuple[int, int],
    stride: tuple[int, int],
    windows_per_call: int | None = None,
    sizes: Int32[Array, "b 2"] | None = None,
    wanted: Callable[[Int32[Array, "b m 2"]], Bool[Array, "b m"]] | None = None,
) -> Float32[Array, "b h w k"]:
    """Class scores of whole images, averaged over the windows that see a pixel.

    Args:
        predict: class scores of a stack of windows; pure, traced once, always called with the same
            shape.
        images: normalised images; missing pixels are padded with 0, the mean.
        window: height and width of a window.
        stride: vertical and horizontal distance between windows.
        windows_per_call: most windows in one call of `predict`, which bounds the memory; None: all
            windows of the batch at once. A call takes as many windows of every image, so that a
            batch sharded over devices stays where it is: the number is rounded down to a multiple
            of the batch, and is one window an image at least.
        sizes: height and width of every image, whatever lies below and right of it being padding;
            None: as large as the array. There are as many calls as the image with the most windows
            needs.
        wanted: which windows are predicted, by their first rows and columns; the scores of others
            count as 0. None: all. A call is filled with windows that are wanted, so an accelerator
            computes as few full calls as they need: a choice in every call would compute all of
            them, and a branch would skip only calls without any.

    Returns:
        Scores in float32, of the array's size; what lies in the padding means nothing.

    Raises:
        ValueError: a stride exceeds its window, `windows_per_call` is not positive, or `predict`
            returns another size than the window.
    """
    if windows_per_call is not None and windows_per_call < 1:
        raise ValueError(
            f"windows_per_call is {windows_per_call}; it must be at least 1, or None for all"
            " windows at once"
        )
    b, h, w, c = images.shape
    wh, ww = window
    most = len(window_starts(h, wh, stride[0])), len(window_starts(w, ww, stride[1]))
    per_call = (
        most[0] * most[1]
        if windows_per_call is None
        else min(max(windows_per_call // b, 1), most[0] * most[1])
    )
    if sizes is not None:
        images = jnp.where(_inside(sizes, h, w)[..., None], images, 0)
    own = np.full((b, 2), (h, w), np.int32) if sizes is None else sizes
    step = np.array(stride, np.int32)
    last = (own - np.array(window, np.int32)).clip(0)
    count = (last + step - 1) // step + 1  # windows along each side
    places = count[:, 0] * count[:, 1]

    def starts_of(place: Int32[Array, "*b m"]) -> Int32[Array, "b m 2"]:
        """First rows and columns of windows by their numbers, row by row of the image."""
        steps = jnp.stack([place // count[:, 1:], place % count[:, 1:]], axis=-1)
        return jnp.minimum(steps * step, last[:, None])

    if wanted is None:
        order = None
    else:
        number = jnp.broadcast_to(jnp.arange(most[0] * most[1]), (b, most[0] * most[1]))
        chosen = wanted(starts_of(number)) & (number < places[:, None])
        order = jnp.argsort(~chosen, axis=1, stable=True)
        places = chosen.sum(axis=1)
    calls = -(-places.max() // per_call)

    padded = jnp.pad(images, ((0, 0), (0, max(wh - h, 0)), (0, max(ww - w, 0)), (0, 0)))
    scores = jax.eval_shape(predict, jax.ShapeDtypeStruct((b * per_call, wh, ww, c), images.dtype))
    if scores.shape[:3] != (b * per_call, wh, ww):
        raise ValueError(
            f"predict returned scores of shape {scores.shape} for windows of shape"
            f" {(b * per_call, wh, ww, c)}: sizes must agree"
        )
    k = scores.shape[-1]

    def call(i, total):
        place = i * per_call + jnp.arange(per_call)
        # [b, per_call, 2]; places beyond the last one are dropped below
        starts = starts_of(place if order is None else jnp.take(order, place, axis=1, mode="clip"))

        def cut(image, start):
            return jax.lax.dynamic_slice(image, (start[0], start[1], 0), (wh, ww, c))

        windows = jax.vmap(jax.vmap(cut, (None, 0)))(
            padded, starts
        )  # the batch leads, so flattening it keeps a sharding
        scores = (
            predict(windows.reshape(b * per_call, wh, ww, c))
            .reshape(b, per_call, wh, ww, k)
            .astype(jnp.float32)
        )
        scores = jnp.where((place < places[:, None])[..., None, None, None], scores, 0.0)

        def add(total, start, scores):
            at = (start[0], start[1], 0)
            return jax.lax.dynamic_update_slice(
                total, jax.lax.dynamic_slice(total, at, (wh, ww, k)) + scores, at
            )

        return jax.lax.fori_loop(
            0, per_call, lambda j, total: jax.vmap(add)(total, starts[:, j], scores[:, j]), total
        )

    # Adding inside the loop, rather than stacking what calls return, holds the scores of one call
    # and of the images, never of all windows.
    total = jax.lax.fori_loop(0, calls, call, jnp.zeros((*padded.shape[:3], k), jnp.float32))
    seen = []
    for axis in (0, 1):  # windows lie on a grid, so how many see a pixel is a product
        start = jnp.minimum(jnp.arange(most[axis]) * stride[axis], last[:, axis, None])[..., None]
        pixel = jnp.arange(padded.shape[1 + axis])
        covered = (
            (pixel >= start)
            & (pixel < start + window[axis])
            & (jnp.arange(most[axis]) < count[:, axis, None])[..., None]
        )
        seen.append(covered.sum(axis=1))
    return (total / jnp.maximum(seen[0][:, :, None] * seen[1][:, None, :], 1)[..., None])[:, :h, :w]


def _inside(sizes: Int32[Array, "b 2"], h: int, w: int) -> Bool[Array, "b h w"]:
    """Which pixels of an array of h x w belong to an image of `sizes`."""
    return (jnp.arange(h)[:, None] < sizes[:, 0, None, None]) & (
        jnp.arange(w) < sizes[:, 1, None, None]
    )


def mirror(images: Num[Array, "b h w c"], sizes: Int32[Array, "b 2"]) -> Num[Array, "b h w c"]:
    """Flips images left to right inside their own widths; the padding stays where it is."""
    x = jnp.arange(images.shape[2])
    source = jnp.where(x < sizes[:, 1:], sizes[:, 1:] - 1 - x, x)
    return jax.vmap(lambda image, i: jnp.take(image, i, axis=1, mode="clip"))(images, source)


def resize_scores(
    scores: Float[Array, "b h w k"],
    size: tuple[int, int],
    sizes: tuple[Int32[Array, "b 2"], Int32[Array, "b 2"]] | None = None,
) -> Float32[Array, "b h2 w2 k"]:
    """Resizes class scores bilinearly, as torch's `F.interpolate(mode="bilinear",
    align_corners=False)`.

    Pixel centres are aligned, the border is repeated, and nothing is smoothed when shrinking. Two
    neighbours are gathered a side: `jax.image.resize` multiplies by dense matrices instead, which
    took eight times as long on CPU.

    Args:
        scores: scores or logits of any float type.
        size: height and width of the result, static.
        sizes: every image's own height and width before and after, whatever lies below and right of
            them being padding; None: as large as the arrays. Below 2^15 pixels.

    Returns:
        The scores in float32 at `size`; what lies in the padding means nothing.

    Raises:
        ValueError: `size` is not positive.
    """
    if min(size) < 1:
        raise ValueError(f"cannot resize to {size}: height and width must be at least 1")
    scores = scores.astype(jnp.float32)
    for axis, length in enumerate(size):
        n = scores.shape[axis + 1]
        if sizes is None and n == length:
            continue
        before, after = (
            (np.full((1, 1), n), np.full((1, 1), length))
            if sizes is None
            else (s[:, axis, None] for s in sizes)
        )
        scores = _interpolate(scores, axis + 1, np.arange(length), before, after)
    return scores


def _interpolate(
    x: Float32[Array, "b _ _ k"], axis: int, at: Any, before: Any, after: Any
) -> Float32[Array, "b _ _ k"]:
    """Values at the positions `at` [n] of an axis resized from `before` to `after` pixels, [b or 1,
    1].

    The centre of pixel i lies at ((2 i + 1) before - after) / (2 after): in integers, sizes that
    are traced give the very same shares.
    """
    centre = ((2 * at + 1) * before - after).clip(0)
    low = (centre // (2 * after)).clip(None, before - 1)
    share = (centre % (2 * after)).astype(np.float32) / (2 * after).astype(np.float32)
    high = (low + 1).clip(None, before - 1)
    share = share.reshape(len(share), *[1] * (axis - 1), -1, *[1] * (3 - axis))
    if len(low) > 1:

        def take(i):
            return jax.vmap(lambda image, i: jnp.take(image, i, axis=axis - 1, mode="clip"))(x, i)

        return take(low) * (1 - share) + take(high) * share

    def read(x):
        """The same for every image."""
        below, above = (jnp.take(x, i[0], axis=axis, mode="clip") for i in (low, high))
        return below * (1 - share) + above * share

    ordered = _with_ordered_gradient(read, x.shape[axis], axis)
    return jax.lax.platform_dependent(x, cpu=read, default=ordered)


def _with_ordered_gradient(
    read: Callable[[Array], Array], n: int, axis: int
) -> Callable[[Array], Array]:
    """`read`, linear along an axis of n, with a gradient that a GPU does not scatter.

    A scatter there adds in any order, so that no run would be like another. The gradient is a
    product with the matrix of `read` instead.
    """

    def forward(x):
        return read(x), None

    def backward(_, gradient):
        shape = [n, *(n if i == axis else 1 for i in range(1, 4))]
        matrix = read(jnp.eye(n).reshape(shape)).reshape(n, -1)
        exact = jax.lax.Precision.HIGHEST
        product = jnp.tensordot(gradient, matrix, (axis, 1), precision=exact)
        return (jnp.moveaxis(product, -1, axis),)

    ordered = jax.custom_vjp(read)
    ordered.defvjp(forward, backward)
    return ordered


STRIP = 64  # label rows resized at once


def label_map(
    scores: Float[Array, "b h w k"],
    size: tuple[int, int],
    sizes: tuple[Int32[Array, "b 2"], Int32[Array, "b 2"]],
) -> UInt8[Array, "b h2 w2"]:
    """The class of highest score at the size of the labels: `argmax` of `resize_scores`, which
    never exists as a whole.

    Args:
        scores: class scores at the images' size.
        size: height and width of the array of labels, static.
        sizes: every image's own height and width, and its label's.

    Returns:
        Class ids; what lies in the padding means nothing.
    """
    return at_labels(lambda rows: jnp.argmax(rows, axis=-1).astype(jnp.uint8), scores, size, sizes)


def at_labels(
    of: Callable[[Float32[Array, "b n w k"]], Num[Array, "b n w"]],
    scores: Float[Array, "b h w k"],
    size: tuple[int, int],
    sizes: tuple[Int32[Array, "b 2"], Int32[Array, "b 2"]],
) -> Num[Array, "b h2 w2"]:
    """What a function makes of the scores of every pixel at the size of the labels; the arguments
    as for `label_map`.
    """
    h, w = size
    before, after = sizes

    def strip(y):
        rows = _interpolate(scores, 1, y + jnp.arange(STRIP), before[:, :1], after[:, :1])
        return of(_interpolate(rows, 2, np.arange(w), before[:, 1:], after[:, 1:]))

    strips = jax.lax.map(strip, jnp.arange(0, h, STRIP))  # [s, b, rows, w]
    return jnp.moveaxis(strips, 0, 1).reshape(scores.shape[0], -1, w)[:, :h]
