"""What several encoders share: stacked blocks that are scanned from tap to tap, drop path, and resizing of learned positions.

Blocks of one shape are held as segments, each one block whose parameters carry a leading layer axis, so 24 layers compile as a
few scanned bodies. Files and every regular expression see per-block names all the same (`jaxdg.weights`).
"""

from collections.abc import Callable, Sequence

from flax import nnx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key
import numpy as np


class Stack(nnx.Module):
    """`depth` equal blocks in segments that end at `ends`, each segment run by one `jax.lax.scan`."""

    def __init__(self, make_block: Callable[[nnx.Rngs], nnx.Module], depth: int, ends: Sequence[int], *, remat: bool, rngs: nnx.Rngs):
        """Args:
        make_block: builds one block from its rngs.
        depth: number of blocks.
        ends: last block (from 0) of each segment; `depth - 1` is added where it is missing.
        remat: recompute the blocks in the backward pass instead of storing their activations.
        rngs: initialises the parameters.
        """
        self.ends = tuple(sorted({*ends, depth - 1}))
        self.remat = remat
        starts = (0, *(end + 1 for end in self.ends[:-1]))
        # A segment is called by its first block, so that any part of the parameters tells which blocks it holds.
        self.segments = nnx.Dict(
            {
                str(start): nnx.split_rngs(splits=end + 1 - start)(nnx.vmap(make_block, axis_size=end + 1 - start))(rngs)
                for start, end in zip(starts, self.ends, strict=True)
            }
        )

    def __call__(self, x: Array, scales: Array | None, *shared) -> dict[int, Array]:
        """Runs all blocks as `block(x, scale, *shared)`, one row of `scales` each; returns each segment's output by its last block.

        Without `scales`, as `block(x, *shared)`.
        """
        outputs, start = {}, 0
        for end in self.ends:
            graph, layers = nnx.split(self.segments[str(start)])

            def layer(x, inputs, graph=graph):
                state, *scale = inputs
                return nnx.merge(graph, state)(x, *scale, *shared), None

            # Inside a scan the usual guard against common-subexpression elimination only costs time.
            body = jax.checkpoint(layer, prevent_cse=False) if self.remat else layer
            x, _ = jax.lax.scan(body, x, (layers,) if scales is None else (layers, scales[start : end + 1]))
            outputs[end], start = x, end + 1
        return outputs


def drop_path_scales(key: Key[Array, ""] | None, rate: float, depth: int, batch: int) -> Float[Array, "depth 2 b 1 1"]:
    """Branch scales of stochastic depth (Huang et al. 2016): 1 in inference, else 0 or 1/(1-p), p growing linearly from 0 to `rate`.

    Args:
        key: random key; None turns drop path off.
        rate: probability of dropping a branch of the last block.
        depth: number of blocks.
        batch: samples, each with its own draws.

    Returns:
        One scale for each block, branch (attention, MLP) and sample.
    """
    shape = (depth, 2, batch, 1, 1)
    if key is None or rate == 0.0:
        return jnp.ones(shape)
    kept = 1.0 - jnp.linspace(0.0, rate, depth).reshape(-1, 1, 1, 1, 1)
    return jax.random.bernoulli(key, kept, shape) / kept


def resize_positions(positions: np.ndarray, grid: tuple[int, int], prefix: int) -> np.ndarray:
    """Resizes learned position embeddings to another token grid: plain bicubic, half-pixel centres, a = -0.75, no antialiasing.

    Equal to torch's `F.interpolate(mode="bicubic", align_corners=False)`, which EVA, CLIP, DeiT and MoCo code use;
    `jax.image.resize` is another operation (a = -0.5, antialiased when shrinking).

    Args:
        positions: [1, prefix + n, c]. A square number n is taken for a square grid, as all pre-trainings use; any other n must fit.
        grid: rows and columns wanted.
        prefix: leading rows that belong to no patch (the class token) and stay as they are.

    Returns:
        [1, prefix + rows * columns, c], float32.

    Raises:
        ValueError: the source grid is not square.
    """
    rows, columns = grid
    patches = positions[0, prefix:].astype(np.float32)
    side = round(len(patches) ** 0.5)
    if (side, side) == grid or (side * side != len(patches) and len(patches) == rows * columns):
        return positions.astype(np.float32)
    if side * side != len(patches):
        raise ValueError(
            f"{len(patches)} patch positions are no square grid and do not fit {rows}x{columns}; give the image size they were made for"
        )
    square = patches.reshape(side, side, -1)
    resized = np.einsum("iy,jx,yxc->ijc", cubic_matrix(side, rows), cubic_matrix(side, columns), square, optimize=True)
    return np.concatenate([positions[0, :prefix].astype(np.float32), resized.reshape(rows * columns, -1)], dtype=np.float32)[None]


def cubic_matrix(source: int, target: int) -> np.ndarray:
    """Rows of weights [target, source] of plain bicubic interpolation along one axis (Keys 1981, a = -0.75, edges repeated)."""
    a = -0.75
    centre = (np.arange(target) + 0.5) * source / target - 0.5
    matrix = np.zeros((target, source))
    for offset in (-1, 0, 1, 2):
        index = np.floor(centre).astype(int) + offset
        t = np.abs(centre - index)
        near = ((a + 2) * t - (a + 3)) * t * t + 1
        far = ((a * t - 5 * a) * t + 8 * a) * t - 4 * a
        np.add.at(matrix, (np.arange(target), index.clip(0, source - 1)), np.where(t <= 1, near, far))
    return matrix
