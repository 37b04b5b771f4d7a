"""Sums of vectors by row, the same in every run on a GPU.

A GPU adds the numbers of a scatter in any order, and float sums depend on the order. Integer sums
do not. So the vectors are rounded to multiples of a step first, as small as an int32 allows.
"""

import math

import jax.numpy as jnp
from jaxtyping import Array, Float32, Int32


def scatter_sum(
    size: int,
    rows: Int32[Array, "*n"],
    weights: Float32[Array, "*n"],
    vectors: Float32[Array, "*#n d"],
) -> Float32[Array, "size d"]:
    """Adds up `weights * vectors` by row.

    Each term is rounded to a multiple of a step, which is about 2^-30 of the largest sum of
    absolute values that a row may have in this channel. With NaN or infinity the whole channel is
    not finite.

    Args:
        size: number of rows.
        rows: where each vector is added, from 0; none may lie outside. At most 2^30.
        weights: of the vectors.
        vectors: [.., d]; broadcast to the shape of `rows`.
    """
    # Counted in parts of the heaviest weight, rounded up, the weights of a row are an integer too.
    parts = 2**30 // math.prod(rows.shape)
    part = jnp.maximum(jnp.max(jnp.abs(weights)), 1e-30) / parts
    counts = jnp.ceil(jnp.abs(weights) / part).astype(jnp.int32)
    counts = jnp.zeros(size, jnp.int32).at[rows].add(counts, mode="promise_in_bounds")
    weight = jnp.max(counts).astype(jnp.float32) * part
    longest = jnp.max(jnp.abs(vectors), axis=tuple(range(vectors.ndim - 1)))
    step = jnp.maximum(weight * longest / 2**30, 1e-37)
    terms = jnp.round(weights[..., None] * (vectors / step)).astype(jnp.int32)
    total = jnp.zeros((size, vectors.shape[-1]), jnp.int32)
    return total.at[rows].add(terms, mode="promise_in_bounds").astype(jnp.float32) * step
