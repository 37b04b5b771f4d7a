"""Multi-head attention by the fastest way of each platform, and windows of maps."""

from functools import partial
from typing import Any

import jax
from jax.ad_checkpoint import checkpoint_name
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from jaxdg.backbones.cudnn import cudnn_attention


def attention(
    q: Float[Array, "b q heads d"],
    k: Float[Array, "b n heads d"],
    v: Float[Array, "b n heads d"],
    mask: Bool[Array, "b q n"] | None = None,
    *,
    padding: int = 0,
) -> Float[Array, "b q heads d"]:
    """Multi-head attention, `softmax(q k^T / sqrt(d)) v`; logits and softmax are float32.

    A traced program holds the way of every platform, and a compiled one only that of its own.

    Args:
        q: queries.
        k: keys.
        v: values.
        mask: where a query may look, in all heads; at one key at least.
        padding: so many keys at the end fill up their number, and no query looks at them.

    Raises:
        ValueError: there are both mask and padding; the mask can hide the padding itself.
    """
    if padding and mask is not None:
        raise ValueError("attention takes a mask or padding; let the mask hide the padded keys")
    n = k.shape[1] - padding
    if padding:
        # cuDNN need not define the gradients of keys that it masks, and a NaN there would spread.
        real = jnp.arange(k.shape[1])[:, None, None] < n
        k = jnp.where(real, k, 0)
        v = jnp.where(real, v, 0)
    q, k, v = (checkpoint_name(x, "attention input") for x in (q, k, v))
    cuda = {}
    if q.dtype.itemsize == 2 and q.shape[-1] % 8 == 0 and q.shape[-1] <= 128:
        cuda["cuda"] = partial(cudnn_attention, padding=padding)

    def without_padding(way):
        return lambda q, k, v, mask: way(q, k[:, :n], v[:, :n], mask)

    return jax.lax.platform_dependent(
        q,
        k,
        v,
        mask,
        cpu=without_padding(_head_by_head),
        default=without_padding(_stored),
        **cuda,
    )


def _all_heads(
    q: Float[Array, "b q heads d"],
    k: Float[Array, "b n heads d"],
    v: Float[Array, "b n heads d"],
    mask: Bool[Array, "b q n"] | None = None,
) -> Float[Array, "b q heads d"]:
    return jax.nn.dot_product_attention(q, k, v, mask=None if mask is None else mask[:, None])


def _stored(q: Array, k: Array, v: Array, mask: Array | None) -> Array:
    """`_without_storing` whose result is stored, so that it is not computed anew as well."""
    return checkpoint_name(_without_storing(q, k, v, mask), "attention output")


@jax.custom_vjp
def _without_storing(
    q: Float[Array, "b q heads d"],
    k: Float[Array, "b n heads d"],
    v: Float[Array, "b n heads d"],
    mask: Bool[Array, "b q n"] | None = None,
) -> Float[Array, "b q heads d"]:
    """Attention of all heads at once; the backward pass computes logits and softmax anew.

    They are n times n for every head: in float32 and of 24 layers at 1296 tokens they took 58 GB of
    a GPU for a batch of 16. To compute them again is one product of five.
    """
    return _all_heads(q, k, v, mask)


def _forward(q: Array, k: Array, v: Array, mask: Array | None) -> tuple[Array, Any]:
    return _without_storing(q, k, v, mask), (q, k, v, mask)


def _backward(inputs: Any, gradient: Array) -> tuple[Array, Array, Array, None]:
    q, k, v, mask = inputs
    # Without the barrier the compiler would find the forward pass's softmax, and keep it until now.
    q, k, v, gradient = jax.lax.optimization_barrier((q, k, v, gradient))
    _, gradients = jax.vjp(lambda q, k, v: _all_heads(q, k, v, mask), q, k, v)
    return *gradients(gradient), None


_without_storing.defvjp(_forward, _backward)


def _head_by_head(
    q: Float[Array, "b q heads d"],
    k: Float[Array, "b n heads d"],
    v: Float[Array, "b n heads d"],
    mask: Bool[Array, "b q n"] | None = None,
) -> Float[Array, "b q heads d"]:
    """Attention for CPUs, where the logits of one head fit into the cache.

    16 heads of 1297 tokens took 0.085 s of CPU time, all heads at once 0.24 s, and PyTorch's fused
    attention 0.093 s (November 2026).
    """

    def head(inputs: tuple[Array, Array, Array]) -> Array:
        q, k, v = inputs
        logits = (
            jnp.einsum("bqd,bnd->bqn", q, k, preferred_element_type=jnp.float32)
            * q.shape[-1] ** -0.5
        )
        logits = logits if mask is None else jnp.where(mask, logits, jnp.finfo(jnp.float32).min)
        return jnp.einsum("bqn,bnd->bqd", jax.nn.softmax(logits).astype(v.dtype), v)

    return jnp.moveaxis(jax.lax.map(head, tuple(jnp.moveaxis(x, 2, 0) for x in (q, k, v))), 0, 2)


def for_all_tokens(
    cos: Float[Array, "p d"], sin: Float[Array, "p d"], prefix: int, n: int
) -> tuple[Float[Array, "n d"], Float[Array, "n d"]]:
    """Rotary tables of patches, for all n tokens.

    The `prefix` tokens before the patches, and padding behind them, are rotated by no angle.
    """
    others = ((prefix, n - prefix - cos.shape[0]), (0, 0))
    return jnp.pad(cos, others, constant_values=1), jnp.pad(sin, others)


def to_windows(maps: Float[Array, "b h w c"], window: int) -> Float[Array, "windows n c"]:
    """Cuts maps into windows, row by row, zeros added at the bottom and right; n = window^2."""
    b, h, w, c = maps.shape
    maps = jnp.pad(maps, ((0, 0), (0, -h % window), (0, -w % window), (0, 0)))
    return (
        maps.reshape(b, maps.shape[1] // window, window, -1, window, c)
        .swapaxes(2, 3)
        .reshape(-1, window * window, c)
    )


def from_windows(
    windows: Float[Array, "windows n c"], grid: tuple[int, int], window: int
) -> Float[Array, "b h w c"]:
    """The inverse of `to_windows` for maps of `grid`."""
    rows, columns = (-(-side // window) for side in grid)
    maps = windows.reshape(-1, rows, columns, window, window, windows.shape[-1]).swapaxes(2, 3)
    return maps.reshape(-1, rows * window, columns * window, windows.shape[-1])[
        :, : grid[0], : grid[1]
    ]
