"""What several encoders share: stacked blocks that are scanned from tap to tap, drop path, resizing
of learned positions and patches.

Neighbours of one shape are held as segments, each one block whose parameters carry a leading layer
axis, so 24 layers compile as a few scanned bodies. Files and every regular expression see per-block
names all the same (`jaxdg.weights`).
"""

from collections.abc import Callable, Sequence
from typing import Any

from flax import nnx
import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Bool, Float, Key
import numpy as np

# Whose results the backward pass of a block finds stored; "name" marks those of
# `jax.ad_checkpoint.checkpoint_name`.
KEPT = ("dot_general", "conv_general_dilated", "dot_product_attention_fwd_wrapper", "name")


def kept(primitive: Any, *_: Any, **__: Any) -> bool:
    """The rule of `jax.checkpoint` by which products of matrices are stored and what lies between
    them is computed anew.
    """
    return primitive.name in KEPT


class Stack(nnx.Module):
    """`depth` blocks in segments of equal ones that end at `ends`, each segment run by one
    `jax.lax.scan`.
    """

    def __init__(
        self,
        make_block: Callable[[nnx.Rngs, int], nnx.Module],
        depth: int,
        ends: Sequence[int],
        *,
        remat: bool,
        rngs: nnx.Rngs,
    ):
        """Args:
        make_block: builds one block from its rngs and the first block (from 0) of its segment, all
            of whose blocks are equal.
        depth: number of blocks.
        ends: last block (from 0) of each segment; `depth - 1` is added where it is missing.
        remat: recompute the blocks in the backward pass instead of storing their activations.
        rngs: initialises the parameters.
        """
        self.ends = tuple(sorted({*ends, depth - 1}))
        self.remat = remat
        starts = (0, *(end + 1 for end in self.ends[:-1]))

        def segment(start: int, count: int) -> nnx.Module:
            return nnx.split_rngs(splits=count)(
                nnx.vmap(lambda rngs: make_block(rngs, start), axis_size=count)
            )(rngs)

        # A segment is called by its first block, so that any part of the parameters tells which
        # blocks it holds.
        self.segments = nnx.Dict(
            {
                str(start): segment(start, end + 1 - start)
                for start, end in zip(starts, self.ends, strict=True)
            }
        )

    def single(self, block: int) -> nnx.Module:
        """A block (from 0) that is a segment of its own, as a module without the layer axis."""
        graph, state = nnx.split(self.segments[str(block)])
        return nnx.merge(graph, jax.tree.map(lambda leaf: leaf[0], state))

    def __call__(self, x: Array, scales: Array | None, *shared) -> dict[int, Array]:
        """Runs all blocks as `block(x, scale, *shared)`, one row of `scales` each; returns each
        segment's output by its last block.

        Without `scales`, as `block(x, *shared)`.
        """
        outputs = {}
        start = 0
        for end in self.ends:
            graph, layers = nnx.split(self.segments[str(start)])

            def layer(x, inputs, graph=graph):
                state, *scale = inputs
                return nnx.merge(graph, whole(state))(x, *scale, *shared), None

            # A scan stacks whatever the backward pass reads of its blocks. The products alone are
            # less than half of that, and with them it takes 14 % less time on CPU. Inside a scan
            # the usual guard against common-subexpression elimination only costs time.
            body = jax.checkpoint(
                layer, prevent_cse=self.remat and end == start, policy=None if self.remat else kept
            )
            inputs = (layers,) if scales is None else (layers, scales[start : end + 1])
            if end == start:  # a block alone may change the size of x, which a scan may not
                x, _ = body(x, jax.tree.map(lambda leaf: leaf[0], inputs))
            else:
                x, _ = jax.lax.scan(body, x, inputs)
            outputs[end] = x
            start = end + 1
        return outputs


def attention(
    q: Float[Array, "b q heads d"],
    k: Float[Array, "b n heads d"],
    v: Float[Array, "b n heads d"],
    mask: Bool[Array, "b q n"] | None = None,
) -> Float[Array, "b q heads d"]:
    """Multi-head attention, `softmax(q k^T / sqrt(d)) v`; logits and softmax are float32.

    On GPUs in half precision it is cuDNN's fused kernel. On CPU the heads go one after another,
    since the logits of one fit into the cache: 16 heads of 1297 tokens took 0.085 s of CPU time,
    all at once 0.24 s, and PyTorch's fused attention 0.093 s (November 2026).

    Args:
        q: queries.
        k: keys.
        v: values.
        mask: where a query may look, in all heads; at one key at least.
    """
    if jax.default_backend() != "cpu":
        if (
            jax.default_backend() == "gpu"
            and mask is None
            and q.dtype.itemsize == 2
            and q.shape[-1] % 8 == 0
            and q.shape[-1] <= 128
        ):
            return _fused_attention(q, k, v)
        return jax.nn.dot_product_attention(q, k, v, mask=None if mask is None else mask[:, None])

    def head(inputs: tuple[Array, Array, Array]) -> Array:
        q, k, v = inputs
        logits = (
            jnp.einsum("bqd,bnd->bqn", q, k, preferred_element_type=jnp.float32)
            * q.shape[-1] ** -0.5
        )
        logits = logits if mask is None else jnp.where(mask, logits, jnp.finfo(jnp.float32).min)
        return jnp.einsum("bqn,bnd->bqd", jax.nn.softmax(logits).astype(v.dtype), v)

    return jnp.moveaxis(jax.lax.map(head, tuple(jnp.moveaxis(x, 2, 0) for x in (q, k, v))), 0, 2)


def _fused_attention(
    q: Float[Array, "b q heads d"], k: Float[Array, "b n heads d"], v: Float[Array, "b n heads d"]
) -> Array:
    """That of cuDNN, whose backward pass, as jax calls it, takes even numbers of tokens alone: an
    odd one is filled up and masked.
    """
    b, m = q.shape[:2]
    n = k.shape[1]
    if m % 2 == n % 2 == 0:
        return jax.nn.dot_product_attention(q, k, v, implementation="cudnn")
    q, k, v = (jnp.pad(x, ((0, 0), (0, x.shape[1] % 2), (0, 0), (0, 0))) for x in (q, k, v))
    lengths: Any = dict(
        query_seq_lengths=jnp.full(b, m, jnp.int32), key_value_seq_lengths=jnp.full(b, n, jnp.int32)
    )
    return jax.nn.dot_product_attention(q, k, v, **lengths, implementation="cudnn")[:, :m]


def whole(state: nnx.State) -> nnx.State:
    """The parameters of a block on every device, where a mesh is set
    (`jax.sharding.use_abstract_mesh`) that they may be divided over.

    So they are gathered one block at a time, and their gradients summed likewise. Left to itself,
    the partitioner may divide features and their gradients like the parameters instead, and move
    them about; in jax 0.10.2 some gradients were wrong then.
    """
    return (
        state
        if jax.sharding.get_abstract_mesh().empty
        else jax.lax.with_sharding_constraint(state, PartitionSpec())
    )


def drop_path_scales(
    key: Key[Array, ""] | None, rate: float, depth: int, batch: int
) -> Float[Array, "depth 2 b 1 1"]:
    """Branch scales of stochastic depth (Huang et al. 2016): 1 in inference, else 0 or 1/(1-p), p
    growing linearly from 0 to `rate`.

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


def cubic_matrix(source: int, target: int, offset: float = 0.0) -> np.ndarray:
    """Rows of weights [target, source] of plain bicubic interpolation along one axis (Keys 1981, a
    = -0.75, edges repeated).

    With an `offset` the scale is that of a target so much larger, as where torch is given a scale
    factor instead of a size.
    """
    a = -0.75
    centre = (np.arange(target) + 0.5) * source / (target + offset) - 0.5
    matrix = np.zeros((target, source))
    for step in (-1, 0, 1, 2):
        index = np.floor(centre).astype(int) + step
        t = np.abs(centre - index)
        near = ((a + 2) * t - (a + 3)) * t * t + 1
        far = ((a * t - 5 * a) * t + 8 * a) * t - 4 * a
        np.add.at(
            matrix, (np.arange(target), index.clip(0, source - 1)), np.where(t <= 1, near, far)
        )
    return matrix


def resize_positions(
    positions: np.ndarray,
    grid: tuple[int, int],
    prefix: int,
    matrix: Callable[[int, int], np.ndarray] = cubic_matrix,
) -> np.ndarray:
    """Resizes learned position embeddings to another token grid: plain bicubic, half-pixel centres,
    a = -0.75, no antialiasing.

    Equal to torch's `F.interpolate(mode="bicubic", align_corners=False)`, which EVA, CLIP, DeiT and
    MoCo code use; `jax.image.resize` is another operation (a = -0.5, antialiased when shrinking).

    Args:
        positions: [1, prefix + n, c]. A square number n is taken for a square grid, as all
            pre-trainings use; any other n must fit.
        grid: rows and columns wanted.
        prefix: leading rows that belong to no patch (the class token) and stay as they are.
        matrix: source and target side to weights [target, source] along one axis, of families that
            interpolate otherwise.

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
            f"{len(patches)} patch positions are no square grid and do not fit {rows}x{columns};"
            " give the image size they were made for"
        )
    square = patches.reshape(side, side, -1)
    resized = np.einsum(
        "iy,jx,yxc->ijc", matrix(side, rows), matrix(side, columns), square, optimize=True
    )
    return np.concatenate(
        [positions[0, :prefix].astype(np.float32), resized.reshape(rows * columns, -1)],
        dtype=np.float32,
    )[None]


def linear_matrix(source: int, target: int, corners: bool = False) -> np.ndarray:
    """Rows of weights [target, source] of plain linear interpolation along one axis.

    Args:
        source: samples given.
        target: samples wanted.
        corners: the first and last samples stay where they are (torch's `align_corners=True`); else
            samples are centres of equal parts of one length, edges repeated.
    """
    steps = np.arange(target)
    at = (
        steps * (source - 1) / max(target - 1, 1)
        if corners
        else ((steps + 0.5) * source / target - 0.5).clip(0, source - 1)
    )
    return np.maximum(1 - np.abs(at[:, None] - np.arange(source)), 0.0)


PATCH_RESIZES = ("flexi", "bicubic")


def resize_patch(kernel: np.ndarray, size: int, method: str) -> np.ndarray:
    """Resizes the kernel that turns a square patch into a token.

    "flexi" is FlexiViT's (Beyer et al. 2023), with the bilinear interpolation (no antialiasing) of
    its authors' code in big_vision; timm's `resample_patch_embed` does the same with another
    interpolation. It multiplies by the pseudo-inverse of what the interpolation does to the pixels
    of a patch: the token of an enlarged patch is then that of the patch itself.

    "bicubic" enlarges or shrinks the kernel as if it were a picture, by torch's plain bicubic, and
    scales by nothing: published domain-generalization code converts DINOv2 from 14 to 16 pixels so.
    Tokens grow with the patch's area, in that case by 16^2 / 14^2.

    Args:
        kernel: [p, p, 3, c].
        size: pixels of the new patch's side.
        method: one of `PATCH_RESIZES`.

    Returns:
        [size, size, 3, c], float32.
    """
    source = kernel.shape[0]
    axis = (
        np.linalg.pinv(linear_matrix(source, size).T)
        if method == "flexi"
        else cubic_matrix(source, size)
    )
    return np.einsum(
        "iy,jx,yxco->ijco", axis, axis, kernel.astype(np.float64), optimize=True
    ).astype(np.float32)
