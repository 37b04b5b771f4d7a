"""Multi-scale deformable attention (Zhu et al. 2021, arXiv 2010.04159): every token reads a few points of every level.

No compiled extension: a point lies between four pixels, so an output is a weighted sum of rows of a table, and that sum has a backward
pass of its own. Gathering all rows of a layer at once would take `levels * points * 4` times the values (5 GB for 16 crops 512x512 of
VLTSeg); both passes go through the rows one after another instead and hold one copy.
"""

from collections.abc import Sequence
import math

from flax import nnx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32, Int32
import numpy as np

Shapes = Sequence[tuple[int, int]]  # rows and columns of each level

CLIPPED = "promise_in_bounds"  # of row numbers: they are clipped where they are made


@jax.custom_vjp
def weighted_rows(table: Float[Array, "n c"], rows: Int32[Array, "s m"], weights: Float32[Array, "s m"]) -> Float32[Array, "m c"]:
    """The sum over s of `weights[s, m] * table[rows[s, m]]`, in float32.

    For 4.1 M rows of 16 channels this took 0.03 s on 2 CPU cores and 0.10 s for the gradients; gathered at once and differentiated by
    JAX, 0.18 to 0.35 s (2026-11-22).

    Args:
        table: rows to be read.
        rows: row numbers, in range.
        weights: of each row.
    """

    def add(total, inputs):
        row, weight = inputs
        return total + weight[:, None] * table.at[row].get(mode=CLIPPED).astype(jnp.float32), None

    return jax.lax.scan(add, jnp.zeros((rows.shape[1], table.shape[1]), jnp.float32), (rows, weights))[0]


def _weighted_rows_forward(table, rows, weights):
    return weighted_rows(table, rows, weights), (table, rows, weights)


def _weighted_rows_backward(saved, gradient):
    table, rows, weights = saved

    def add(total, inputs):
        row, weight = inputs
        read = table.at[row].get(mode=CLIPPED).astype(jnp.float32)
        return total.at[row].add(weight[:, None] * gradient, mode=CLIPPED), jnp.sum(read * gradient, axis=-1)

    to_table, to_weights = jax.lax.scan(add, jnp.zeros(table.shape, jnp.float32), (rows, weights))
    return to_table.astype(table.dtype), None, to_weights


weighted_rows.defvjp(_weighted_rows_forward, _weighted_rows_backward)


def deformable_attention(
    values: Float[Array, "b n heads d"],
    shapes: Shapes,
    locations: Float32[Array | np.ndarray, "b m heads l p 2"],
    weights: Float32[Array, "b m heads l p"],
) -> Float32[Array, "b m c"]:
    """Values read bilinearly at points of every level and added up by weight, the heads side by side.

    Args:
        values: all levels after one another, each row by row.
        shapes: rows and columns of each level; n is the sum of their products.
        locations: (x, y) of the points, 0 and 1 being the outer edges of the map (torch's grid_sample with align_corners=False);
            pixels outside the map count as 0.
        weights: of the points.

    Returns:
        [b, m, heads * d] in float32.

    Raises:
        ValueError: `shapes` do not add up to n.
    """
    (b, n, heads, d), m = values.shape, locations.shape[1]
    if sum(h * w for h, w in shapes) != n:
        raise ValueError(f"levels of {' '.join(f'{h}x{w}' for h, w in shapes)} have {sum(h * w for h, w in shapes)} pixels, the values {n}")
    # A row of the table is one head at one pixel; everything is laid out as the sum wants it: [b, l, p, m, heads].
    x, y = jnp.moveaxis(locations, (5, 3, 4), (0, 2, 3))
    weights = jnp.moveaxis(weights, (3, 4), (1, 2))
    height, width = np.asarray(shapes, np.float32).T.reshape(2, -1, 1, 1, 1)
    start = np.cumsum([0, *(h * w for h, w in shapes[:-1])], dtype=np.int32).reshape(-1, 1, 1, 1)
    # Far outside is as good as just outside, and keeps the integers in range.
    x, y = jnp.clip(x * width - 0.5, -2.0, width + 1), jnp.clip(y * height - 0.5, -2.0, height + 1)
    left, top = jnp.floor(x), jnp.floor(y)
    right, low = x - left, y - top  # shares of the pixels on that side
    rows, shares = [], []
    for pixel_y, share_y in ((top, 1 - low), (top + 1, low)):
        for pixel_x, share_x in ((left, 1 - right), (left + 1, right)):
            inside = (pixel_x >= 0) & (pixel_x < width) & (pixel_y >= 0) & (pixel_y < height)
            shares.append(jnp.where(inside, share_x * share_y, 0.0) * weights)
            pixel = jnp.clip(pixel_y, 0, height - 1) * width + jnp.clip(pixel_x, 0, width - 1)
            rows.append((start + pixel.astype(jnp.int32)) * heads + np.arange(heads, dtype=np.int32))
    flat = lambda corners: jnp.stack(corners, axis=1).reshape(b, -1, m * heads)
    read = jax.vmap(weighted_rows)(values.reshape(b, n * heads, d), flat(rows), flat(shares))
    return read.reshape(b, m, heads * d)


class DeformableAttention(nnx.Module):
    """Tokens of all levels reading all levels, at places and with weights that each token chooses."""

    def __init__(self, channels: int, heads: int, levels: int, points: int, *, dtype: str, rngs: nnx.Rngs):
        """Args:
        channels: c of the tokens; `heads` must divide it.
        heads: groups of channels that choose their own points.
        levels: l.
        points: p, read by each head on each level.
        dtype: compute dtype of the values; places and weights are float32.
        rngs: initialises the parameters.
        """
        self.heads, self.levels, self.points = heads, levels, points
        xavier = nnx.initializers.xavier_uniform()
        zeros, places = nnx.initializers.zeros, heads * levels * points
        compass = lambda *_: _compass(heads, levels, points)
        self.sampling_offsets = nnx.Linear(channels, 2 * places, kernel_init=zeros, bias_init=compass, rngs=rngs)
        self.attention_weights = nnx.Linear(channels, places, kernel_init=zeros, rngs=rngs)
        self.value_proj = nnx.Linear(channels, channels, kernel_init=xavier, dtype=jnp.dtype(dtype), rngs=rngs)
        self.output_proj = nnx.Linear(channels, channels, kernel_init=xavier, dtype=jnp.dtype(dtype), rngs=rngs)

    def __call__(self, tokens: Float[Array, "b n c"], positions: Float[Array, "n c"], shapes: Shapes) -> Float[Array, "b n c"]:
        """`positions` are added where places and weights are chosen, not to the values; `shapes` are those of the levels."""
        b, n, _ = tokens.shape
        queries = (tokens + positions).astype(jnp.float32)
        offsets = self.sampling_offsets(queries).reshape(b, n, self.heads, self.levels, self.points, 2)
        weights = jax.nn.softmax(self.attention_weights(queries).reshape(b, n, self.heads, -1))
        sizes = np.asarray(shapes, np.float32)[:, None, ::-1]
        locations = pixel_centres(shapes)[:, None, None, None] + offsets / sizes  # offsets count in pixels of the level read
        values = self.value_proj(tokens).reshape(b, n, self.heads, -1)
        read = deformable_attention(values, shapes, locations, weights.reshape(b, n, self.heads, self.levels, self.points))
        return self.output_proj(read)


def pixel_centres(shapes: Shapes) -> np.ndarray:
    """(x, y) of every pixel of every level, [n, 2] in 0..1."""
    grids = [np.stack(np.meshgrid((np.arange(w) + 0.5) / w, (np.arange(h) + 0.5) / h), axis=-1).reshape(-1, 2) for h, w in shapes]
    return np.concatenate(grids).astype(np.float32)


def _compass(heads: int, levels: int, points: int) -> jax.Array:
    """First offsets: every head looks in its own direction, its i-th point i pixels away."""
    angles = np.arange(heads) * (2 * math.pi / heads)
    directions = np.stack([np.cos(angles), np.sin(angles)], axis=-1)
    directions /= np.abs(directions).max(axis=-1, keepdims=True)
    offsets = directions[:, None, None] * np.arange(1, points + 1)[:, None]
    return jnp.asarray(np.broadcast_to(offsets, (heads, levels, points, 2)).reshape(-1), jnp.float32)
