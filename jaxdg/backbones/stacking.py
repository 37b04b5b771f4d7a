"""Blocks of one shape, stacked and scanned from tap to tap; stochastic depth.

Neighbours of one shape are held as segments. A segment is one block whose parameters carry a
leading layer axis, so 24 layers compile as a few scanned bodies. Files and regular expressions see
the names of single blocks all the same (`jaxdg.weights`).
"""

from collections.abc import Callable, Sequence
from typing import Any

from flax import nnx
import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Key

# The backward pass of a block finds the results of these stored. "name" stands for what
# `jax.ad_checkpoint.checkpoint_name` marks.
STORED = ("dot_general", "conv_general_dilated", "dot_product_attention_fwd_wrapper", "name")


def stores_product(primitive: Any, *inputs: Any, **parameters: Any) -> bool:
    """A policy of `jax.checkpoint`: stores matrix products, and computes all else anew.

    Products of half-precision matrices whose result is float32 are computed anew as well: they are
    large, and cheap beside others.
    """
    result = parameters.get("preferred_element_type")
    if result is not None and jnp.dtype(result).itemsize > inputs[0].dtype.itemsize:
        return False
    return primitive.name in STORED


class Stack(nnx.Module):
    """`depth` blocks in segments of equal blocks; each segment is one `jax.lax.scan`.

    Attributes:
        after: None, or a module whose output for (block, output of the block) replaces the latter
            after every block. A training method sets it; what differs from block to block it keeps
            in the block.
        edits: None, or functions by the last blocks of segments: what one makes of the output of
            its segment replaces it. `Encoder.editing` sets them.
    """

    after: Any = None
    edits: Any = None

    def __init__(
        self,
        make_block: Callable[[nnx.Rngs, int], nnx.Module],
        depth: int,
        ends: Sequence[int],
        *,
        remat: bool,
        unroll: bool = False,
        rngs: nnx.Rngs,
    ):
        """Builds the blocks with random parameters.

        Args:
            make_block: builds one block from its rngs and the first block (from 0) of its segment.
            depth: number of blocks.
            ends: last block (from 0) of each segment; `depth - 1` is added if it is missing.
            remat: recompute the blocks in the backward pass instead of storing their activations.
            unroll: compile each block of a segment by itself. That takes longer to compile, and a
                GPU moves less memory: a scan copies what it stores into one array for all blocks.
            rngs: initialises the parameters.
        """
        self.unroll = unroll
        self.ends = tuple(sorted({*ends, depth - 1}))
        self.remat = remat
        starts = (0, *(end + 1 for end in self.ends[:-1]))

        def segment(start: int, count: int) -> nnx.Module:
            return nnx.split_rngs(splits=count)(
                nnx.vmap(lambda rngs: make_block(rngs, start), axis_size=count)
            )(rngs)

        # A segment is named after its first block, so each parameter's path tells its blocks.
        self.segments = nnx.Dict(
            {
                str(start): segment(start, end + 1 - start)
                for start, end in zip(starts, self.ends, strict=True)
            }
        )

    def single(self, block: int) -> nnx.Module:
        """A block (from 0) as a module without the layer axis."""
        start = max(first for first in map(int, self.segments) if first <= block)
        graph, state = nnx.split(self.segments[str(start)])
        return nnx.merge(graph, jax.tree.map(lambda leaf: leaf[block - start], state))

    def __call__(self, x: Array, scales: Array | None, *shared) -> dict[int, Array]:
        """Runs all blocks; returns each segment's output by its last block.

        A block is called as `block(x, scale, *shared)` with its row of `scales`, or as `block(x,
        *shared)` without `scales`.
        """
        outputs = {}
        start = 0
        for end in self.ends:
            graph, layers = nnx.split(self.segments[str(start)])
            layers = cast_kernels(layers, x.dtype)

            def layer(x, inputs, graph=graph):
                state, *scale = inputs
                block = nnx.merge(graph, gathered(state))
                x = block(x, *scale, *shared)
                return x if self.after is None else self.after(block, x), None

            # A scan stacks whatever the backward pass reads of its blocks. The products alone are
            # less than half of that, and with them it takes 14 % less time on CPU. Outside a scan
            # common-subexpression elimination would store what is to be computed anew; inside one
            # the usual guard against it only costs time.
            guarded = self.unroll or (self.remat and end == start)
            policy = None if self.remat else stores_product
            body = jax.checkpoint(layer, prevent_cse=guarded, policy=policy)
            inputs = (layers,) if scales is None else (layers, scales[start : end + 1])
            if end == start:  # a block alone may change the size of x, which a scan may not
                x, _ = body(x, jax.tree.map(lambda leaf: leaf[0], inputs))
            else:
                x, _ = jax.lax.scan(body, x, inputs, unroll=self.unroll)
            if self.edits and end in self.edits:
                x = self.edits[end](x)
            outputs[end] = x
            start = end + 1
        return outputs


def cast_kernels(state: nnx.State, dtype: jnp.dtype) -> nnx.State:
    """The kernels in half precision if that is the features'; the other parameters as they are.

    Blocks cast their kernels themselves, in the forward and again in the backward pass. Cast once
    and before, they are half as much to slice, to gather from other devices and to read again.
    """
    if dtype.itemsize != 2:
        return state

    def cast(path, leaf):
        return leaf.astype(dtype) if jax.tree_util.DictKey("kernel") in path else leaf

    return jax.tree.map_with_path(cast, state)


def gathered(state: nnx.State) -> nnx.State:
    """The parameters of a block, gathered on every device of the mesh that divides them.

    The mesh is that of `jax.sharding.use_abstract_mesh`; without one the parameters stay as they
    are. So one block is gathered at a time, and its gradients are summed likewise. Left to itself,
    the partitioner may divide features and their gradients like the parameters instead, and move
    them about; in jax 0.10.2 some gradients were wrong then.
    """
    if jax.sharding.get_abstract_mesh().empty:
        return state
    return jax.lax.with_sharding_constraint(state, PartitionSpec())


def drop_path_scales(
    key: Key[Array, ""] | None, rate: float, depth: int, batch: int
) -> Float[Array, "depth 2 b 1 1"]:
    """Branch scales of stochastic depth (Huang et al. 2016).

    A scale is 1 in inference, else 0 or 1/(1-p); p grows linearly from 0 to `rate`.

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
    survival = 1.0 - jnp.linspace(0.0, rate, depth).reshape(-1, 1, 1, 1, 1)
    return jax.random.bernoulli(key, survival, shape) / survival
