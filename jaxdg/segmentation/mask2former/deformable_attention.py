"""Multi-scale deformable attention (Zhu et al. 2021, arXiv 2010.04159): every token reads a few
points of every level.

No compiled extension: a point lies between four pixels, so an output is a weighted sum of rows of a
table, and that sum has a backward pass of its own. All gathered rows of a layer would take
`levels * points * 4` times the values (5 GB for 16 crops 512x512 of VLTSeg), so no platform stores
them. Between the passes only the places and weights of the points are stored.
"""

from collections.abc import Sequence
from functools import partial
import math
from typing import Any

from flax import nnx
import jax
from jax.ad_checkpoint import checkpoint_name
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32, Int32
import numpy as np

from jaxdg.backbones.layers import TORCH, Linear
from jaxdg.backbones.scatter_sum import scatter_sum

Shapes = Sequence[tuple[int, int]]  # rows and columns of each level

IN_BOUNDS = "promise_in_bounds"  # of row numbers: places are clipped to the frame before


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def read_points(
    shapes: Shapes,
    table: Float[Array, "rows d"],
    x: Float32[Array, "s m heads"],
    y: Float32[Array, "s m heads"],
    weights: Float32[Array, "s m heads"],
) -> Float32[Array, "m heads d"]:
    """Sums what the table holds at the points s of each token, by weight; in float32.

    For the 1.03 M points of 16 channels of 8 images 256x256 this took 0.03 s of CPU time and 0.14 s
    for the gradients; differentiated by JAX a multiple (November 2026).

    Args:
        shapes: of the levels, each of which has the same number of points.
        table: the heads of a pixel after one another, the pixels of a level row by row and framed
            by pixels of zeros.
        x: where the points are, in pixels from the centre of the level's first one.
        y: likewise.
        weights: of the points.
    """
    return jax.lax.platform_dependent(
        table,
        x,
        y,
        weights,
        cpu=partial(_read_one_by_one, shapes),
        default=partial(_read_at_once, shapes),
    )


def _read_forward(shapes, table, x, y, weights):
    return read_points(shapes, table, x, y, weights), (table, x, y, weights)


def _read_backward(shapes, saved, gradient):
    return jax.lax.platform_dependent(
        *saved,
        gradient,
        cpu=partial(_differentiate_one_by_one, shapes),
        default=partial(_differentiate_at_once, shapes),
    )


read_points.defvjp(_read_forward, _read_backward)


def _read_at_once(shapes, table, x, y, weights):
    """On a GPU one kernel a level gathers all pixels that a token reads and adds them up.

    It is written as a sum of products, for XLA would store the rows that a reduction reads. The
    barrier parts the levels: a kernel that reads them all is more than XLA fuses.
    """
    total = jnp.zeros((*x.shape[1:], table.shape[1]), jnp.float32)
    level = _levels(shapes, x)
    points = len(x) // len(shapes)
    for start in range(0, len(x), points):
        group = slice(start, start + points)
        inputs = (total, x[group], y[group], weights[group])
        total, left, top, weight = jax.lax.optimization_barrier(inputs)
        rows, right, low = _corners(left, top, *(each[group] for each in level))
        for row, share in zip(rows, corner_shares(right, low), strict=True):
            for i in range(points):
                total += _read(table, row[i]) * (weight[i] * share[i])[..., None]
    return total


def _differentiate_at_once(shapes, table, x, y, weights, gradient):
    level = _levels(shapes, x)
    rows, right, low = _corners(x, y, *level)
    rows = jnp.stack(rows)
    shares = jnp.stack(corner_shares(right, low)) * weights
    to_table = scatter_sum(len(table), rows, shares, gradient)
    to_corners = jnp.sum(_read(table, rows) * gradient, axis=-1)
    to_rest = _to_points(x, y, weights, to_corners, right, low, *level[:2])
    return to_table.astype(table.dtype), *to_rest


def _read_one_by_one(shapes, table, x, y, weights):
    """On CPU the points of a token take turns, and one copy of the values is held."""

    def add(total, inputs):
        x, y, weight, *level = inputs
        rows, right, low = _corners(x, y, *level)
        above, below = (
            _read(table, left) * (1 - right[..., None]) + _read(table, beside) * right[..., None]
            for left, beside in (rows[:2], rows[2:])
        )
        value = above * (1 - low[..., None]) + below * low[..., None]
        return total + weight[..., None] * value, None

    start = jnp.zeros((*x.shape[1:], table.shape[1]), jnp.float32)
    return jax.lax.scan(add, start, (x, y, weights, *_levels(shapes, x)))[0]


def _differentiate_one_by_one(shapes, table, x, y, weights, gradient):
    def add(total, inputs):
        x, y, weight, *level = inputs
        rows, right, low = _corners(x, y, *level)
        to_corners = []
        for row, share in zip(rows, corner_shares(right, low), strict=True):
            to_corners.append(jnp.sum(_read(table, row) * gradient, axis=-1))
            total = total.at[row].add((weight * share)[..., None] * gradient, mode=IN_BOUNDS)
        return total, _to_points(x, y, weight, to_corners, right, low, *level[:2])

    start = jnp.zeros(table.shape, jnp.float32)
    to_table, to_rest = jax.lax.scan(add, start, (x, y, weights, *_levels(shapes, x)))
    return to_table.astype(table.dtype), *to_rest


def corner_shares(right: Array, low: Array) -> tuple[Array, ...]:
    """Shares of a point's four pixels: upper left, upper right, lower left, lower right."""
    return (1 - low) * (1 - right), (1 - low) * right, low * (1 - right), low * right


def _to_points(x, y, weight, to_corners, right, low, width, height):
    """Gradients of places and weights, from the gradient's product with each of the four pixels.

    A point beyond the frame reads nothing, wherever it moves.
    """
    left, beside, under, across = to_corners
    above = left + (beside - left) * right
    below = under + (across - under) * right
    along = weight * ((beside - left) * (1 - low) + (across - under) * low)
    to_x = jnp.where((x > -1) & (x < width), along, 0.0)
    to_y = jnp.where((y > -1) & (y < height), weight * (below - above), 0.0)
    return to_x, to_y, above * (1 - low) + below * low


def _levels(shapes: Shapes, x: Float32[Array, "s m heads"]) -> tuple[np.ndarray, ...]:
    """Width, height and first pixel of the level of each of the points s, as [s, 1, 1]."""
    height, width = np.asarray(shapes, np.float32).T
    first = np.cumsum([0, *((h + 2) * (w + 2) for h, w in shapes[:-1])], dtype=np.int32)
    points = len(x) // len(shapes)
    return tuple(np.repeat(each, points)[:, None, None] for each in (width, height, first))


def _corners(
    x: Float32[Array, "*s m heads"],
    y: Float32[Array, "*s m heads"],
    width: Any,
    height: Any,
    first: Any,
) -> tuple[
    tuple[Array, ...],
    Float32[Array, "*s m heads"],
    Float32[Array, "*s m heads"],
]:
    """Rows of the four pixels around points of a level (upper left, upper right, lower left, lower
    right), and the shares of those on the right and of the lower ones.
    """
    heads = x.shape[-1]
    across = width.astype(jnp.int32) + 2
    x = jnp.clip(x, -1.0, width)
    y = jnp.clip(y, -1.0, height)  # beyond the frame is as good as on it
    left = jnp.minimum(jnp.floor(x), width - 1)
    top = jnp.minimum(jnp.floor(y), height - 1)
    pixel = first + (top.astype(jnp.int32) + 1) * across + left.astype(jnp.int32) + 1
    row = pixel * heads + np.arange(heads, dtype=np.int32)
    return (row, row + heads, row + across * heads, row + (across + 1) * heads), x - left, y - top


def _read(
    table: Float[Array, "rows d"], row: Int32[Array, "*n m heads"]
) -> Float32[Array, "*n m heads d"]:
    return table.at[row].get(mode=IN_BOUNDS).astype(jnp.float32)


def deformable_attention(
    values: Float[Array, "b n heads d"],
    shapes: Shapes,
    places: Float32[Array, "b m heads l p 2"],
    weights: Float32[Array, "b m heads l p"],
) -> Float32[Array, "b m c"]:
    """Values read bilinearly at points of every level and added up by weight, the heads side by
    side.

    Args:
        values: all levels after one another, each row by row.
        shapes: rows and columns of each level; n is the sum of their products.
        places: (x, y) of the points in pixels of their level; the centre of the first pixel is
            (0, 0). Pixels outside the map count as 0.
        weights: of the points.

    Returns:
        [b, m, heads * d] in float32.

    Raises:
        ValueError: `shapes` do not add up to n.
    """
    b, n, heads, d = values.shape
    m = places.shape[1]
    if sum(h * w for h, w in shapes) != n:
        raise ValueError(
            f"levels of {' '.join(f'{h}x{w}' for h, w in shapes)} have"
            f" {sum(h * w for h, w in shapes)} pixels, the values {n}"
        )
    levels = jnp.split(
        values.reshape(b, n, heads * d), np.cumsum([h * w for h, w in shapes])[:-1], axis=1
    )
    framed = [
        jnp.pad(level.reshape(b, h, w, -1), ((0, 0), (1, 1), (1, 1), (0, 0))).reshape(b, -1, d)
        for level, (h, w) in zip(levels, shapes, strict=True)
    ]
    x, y = jnp.moveaxis(places, (5, 3, 4), (0, 1, 2)).reshape(2, -1, b, m, heads)
    weights = jnp.moveaxis(weights, (3, 4), (0, 1)).reshape(-1, b, m, heads)
    read = jax.vmap(partial(read_points, tuple(shapes)), (0, 1, 1, 1))(
        jnp.concatenate(framed, axis=1), x, y, weights
    )
    return read.reshape(b, m, heads * d)


class DeformableAttention(nnx.Module):
    """Tokens of all levels read all levels, at places and with weights that each chooses."""

    def __init__(
        self,
        channels: int,
        heads: int,
        levels: int,
        points: int,
        *,
        published_init: bool = True,
        dtype: str,
        rngs: nnx.Rngs,
    ):
        """Args:
        channels: c of the tokens; `heads` must divide it.
        heads: groups of channels that choose their own points.
        levels: l.
        points: p, read by each head on each level.
        published_init: start with equal weights and each head looking in a direction of its own;
            otherwise at random, near by.
        dtype: compute dtype of the values; places and weights are float32.
        rngs: initialises the parameters.
        """
        self.heads = heads
        self.levels = levels
        self.points = points
        places = heads * levels * points
        init = kernel_init(published_init)
        choose = nnx.initializers.zeros if published_init else init

        def look(key, shape, dtype):
            """Where the heads look at the start."""
            if published_init:
                return _compass(heads, levels, points)
            return jax.random.uniform(key, shape, dtype, -1, 1) * channels**-0.5

        self.sampling_offsets = nnx.Linear(
            channels, 2 * places, kernel_init=choose, bias_init=look, rngs=rngs
        )
        self.attention_weights = nnx.Linear(channels, places, kernel_init=choose, rngs=rngs)
        self.value_proj = Linear(
            channels, channels, kernel_init=init, dtype=jnp.dtype(dtype), rngs=rngs
        )
        self.output_proj = Linear(
            channels, channels, kernel_init=init, dtype=jnp.dtype(dtype), rngs=rngs
        )

    def __call__(
        self, tokens: Float[Array, "b n c"], positions: Float[Array, "n c"], shapes: Shapes
    ) -> Float[Array, "b n c"]:
        """`positions` are added where places and weights are chosen, not to the values; `shapes`
        are those of the levels.
        """
        b, n, _ = tokens.shape
        queries = (tokens + positions).astype(self.value_proj.dtype)

        # One product chooses places and weights. It is of the compute dtype; its sums and what
        # follows are float32.
        both = (self.sampling_offsets, self.attention_weights)
        kernel = jnp.concatenate([linear.kernel[...] for linear in both], axis=1)
        biases = [linear.bias for linear in both]
        bias = jnp.concatenate([bias[...] for bias in biases if bias is not None])
        kernel = kernel.astype(queries.dtype)
        chosen = jnp.dot(queries, kernel, preferred_element_type=jnp.float32) + bias
        offsets, weights = jnp.split(chosen, [self.sampling_offsets.out_features], axis=-1)
        offsets = offsets.reshape(b, n, self.heads, self.levels, self.points, 2)
        weights = jax.nn.softmax(weights.reshape(b, n, self.heads, -1))
        sizes = np.asarray(shapes, np.float32)[:, ::-1]
        centres = pixel_centres(shapes)[:, None] * sizes - 0.5
        values = self.value_proj(tokens).reshape(b, n, self.heads, -1)
        read = deformable_attention(
            values,
            shapes,
            offsets + centres[:, None, :, None],
            weights.reshape(b, n, self.heads, self.levels, self.points),
        )
        # As good as a product to `stacking.stores_product`.
        read = checkpoint_name(read.astype(self.output_proj.dtype), "read")
        return self.output_proj(read)


def pixel_centres(shapes: Shapes) -> np.ndarray:
    """(x, y) of every pixel of every level, [n, 2] in 0..1."""
    grids = [
        np.stack(np.meshgrid((np.arange(w) + 0.5) / w, (np.arange(h) + 0.5) / h), axis=-1).reshape(
            -1, 2
        )
        for h, w in shapes
    ]
    return np.concatenate(grids).astype(np.float32)


def kernel_init(published: bool) -> jax.nn.initializers.Initializer:
    """Xavier's uniform distribution, as Mask2Former's authors start most layers, or torch's
    default, within 1 / sqrt(fan_in).
    """
    return nnx.initializers.xavier_uniform() if published else TORCH


def _compass(heads: int, levels: int, points: int) -> jax.Array:
    """First offsets: every head looks in its own direction, its i-th point i pixels away."""
    angles = np.arange(heads) * (2 * math.pi / heads)
    directions = np.stack([np.cos(angles), np.sin(angles)], axis=-1)
    directions /= np.abs(directions).max(axis=-1, keepdims=True)
    offsets = directions[:, None, None] * np.arange(1, points + 1)[:, None]
    return jnp.asarray(
        np.broadcast_to(offsets, (heads, levels, points, 2)).reshape(-1), jnp.float32
    )
