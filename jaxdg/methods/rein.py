"""Rein (Wei et al., CVPR 2024): learned tokens refine a frozen encoder after every block.

After block i each patch token f attends to the block's m learned tokens T_i, and

    f' = f + scale * W2 (softmax(f T_i^T / sqrt(c)) W1 T_i + f)

The first learned token takes part in the softmax alone: a token that needs no refinement looks at
it. T_i is a product of two small matrices, and all blocks share W1, W2 and the scale. Mask2Former's
queries are made of the learned tokens too: each has the maximum, the mean and the last of its
values over the blocks.

Formulas, names and starts follow the authors' code (w1oves/Rein, `LoRAReins` and
`ReinMask2FormerHead`). The modules stay in the trained model, for they cannot be folded into it.
"""

import dataclasses
import math
from typing import Any

from flax import nnx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float
import numpy as np

from jaxdg.backbones import VitConfig, zoo
from jaxdg.backbones.layers import Linear, spread
from jaxdg.methods.method import Method, MethodOptions
from jaxdg.ranges import Count, CountOrZero

SCALE = 0.001  # of the refinement at the start
PATCH = 16  # the side of patches in the authors' rule for the start of tokens, for every encoder


@dataclasses.dataclass(unsafe_hash=True)
class ReinOptions(MethodOptions):
    """Rein freezes the encoder and refines its features by learned tokens; see
    `jaxdg/methods/rein.py`.

    Attributes:
        on: whether it is used; the encoder must be a plain ViT. Default False.
        tokens: learned for each block. With `link` there are as many queries. Default 100.
        rank: of the tokens as a matrix; 0 learns them whole. Default 16.
        link: Mask2Former's queries come from the tokens; False with other decoders. Default True.
        link_features: with `link`, the queries' first features come from the tokens too, and not
            their positions alone. Default True.
        zero_start: the refinement starts at zero and has no scale, as in the paper's algorithm; the
            authors' code starts it small. Default False.
    """

    tokens: Count = 100
    rank: CountOrZero = 16
    link: bool = True
    link_features: bool = True
    zero_start: bool = False

    def check(self, config: Any, name: str) -> None:
        """See `MethodOptions.check`."""
        if not self.on:
            return
        m = config.model
        if not isinstance(zoo.entry(m.encoder).config, VitConfig):
            raise ValueError(
                f"{name}.on is True with model.encoder {m.encoder!r}; allowed: False, or a plain"
                " ViT, as Rein refines its tokens after every block"
            )
        if self.link and m.decoder != "mask2former":
            raise ValueError(
                f"{name}.link is True with model.decoder {m.decoder!r}; allowed: False, as"
                " mask2former alone has queries"
            )
        if self.link and m.mask2former.queries != self.tokens:
            raise ValueError(
                f"{name}.tokens is {self.tokens}; allowed: {m.mask2former.queries}, the number of"
                " model.mask2former.queries, which are made of them"
            )

    def build(self, config: Any) -> "Rein":
        """See `MethodOptions.build`."""
        return Rein(self)


class Rein(Method):
    """Rein in one run."""

    lasts = True

    def __init__(self, options: ReinOptions):
        """`options` are the settings."""
        self.options = options

    def extend(self, model: Any, rngs: nnx.Rngs) -> None:
        """See `Method.extend`: tokens in every block, what they share, and the link."""
        o = self.options
        c = model.backbone.config
        blocks = model.backbone.blocks
        for segment in blocks.segments.values():
            count = jax.tree.leaves(nnx.state(segment))[0].shape[0]
            segment.rein = Tokens(count, o, c.width, rngs=rngs)
        blocks.after = Refinement(o, c, rngs=rngs)
        if o.link:
            model.queries = Link(o, c.width, model.head.config.hidden, rngs=rngs)
            model.head.without_queries(features=o.link_features)

    def trains(self, name: str, trained: bool) -> bool:
        """See `Method.trains`: of the encoder its own parameters alone."""
        if name.startswith("backbone."):
            return ".rein." in name or name.startswith("backbone.blocks.after.")
        return trained


class Tokens(nnx.Module):
    """The learned tokens of a segment's blocks; their layer axis is the segment's."""

    def __init__(self, blocks: int, options: ReinOptions, width: int, *, rngs: nnx.Rngs):
        m = options.tokens
        r = options.rank
        bound = (6 / (3 * PATCH**2 + ((width * r) ** 0.5 if r else width))) ** 0.5
        if r:
            self.learnable_tokens_a = uniform(rngs, (blocks, m, r), bound)
            self.learnable_tokens_b = uniform(rngs, (blocks, r, width), bound)
        else:
            self.learnable_tokens = uniform(rngs, (blocks, m, width), bound)

    def __call__(self) -> Float[Array, "*blocks m c"]:
        """The tokens of one block, or of each of them where the layer axis is there."""
        if hasattr(self, "learnable_tokens"):
            return self.learnable_tokens[...]
        return self.learnable_tokens_a[...] @ self.learnable_tokens_b[...]


class Refinement(nnx.Module):
    """What follows every block; all blocks share its parameters."""

    def __init__(self, options: ReinOptions, config: VitConfig, *, rngs: nnx.Rngs):
        c = config.width
        dtype = jnp.dtype(config.dtype)
        self.scale = None if options.zero_start else nnx.Param(jnp.asarray(SCALE))
        self.mlp_token2feat = linear(c, c, dtype, rngs)
        self.mlp_delta_f = linear(c, c, dtype, rngs)
        if options.zero_start:
            zeros = nnx.initializers.zeros
            self.mlp_delta_f = Linear(c, c, kernel_init=zeros, dtype=dtype, rngs=rngs)
        self.config = config
        self.prefix = config.prefix

    def __call__(self, block: Any, x: Float[Array, "b n c"]) -> Float[Array, "b n c"]:
        """The output of a block, its patch tokens refined; class token and padding stay."""
        tokens = block.rein().astype(x.dtype)
        logits = jnp.einsum("bnc,mc->bnm", x, tokens, preferred_element_type=jnp.float32)
        shares = jax.nn.softmax(logits * x.shape[-1] ** -0.5)[..., 1:].astype(x.dtype)
        change = jnp.einsum("bnm,mc->bnc", shares, self.mlp_token2feat(tokens[1:]))
        change = self.mlp_delta_f(change + x)
        if self.scale is not None:
            change = change * spread(self.scale[...], change)
        place = np.arange(x.shape[1])[:, None]
        patches = math.prod(self.config.grid)
        is_patch = (place >= self.prefix) & (place < self.prefix + patches)
        return x + jnp.where(is_patch, change, 0)


class Link(nnx.Module):
    """Mask2Former's queries from the learned tokens of all blocks."""

    def __init__(self, options: ReinOptions, width: int, hidden: int, *, rngs: nnx.Rngs):
        dtype = jnp.dtype(jnp.float32)
        self.transform = linear(width, hidden, dtype, rngs)
        self.merge = linear(3 * hidden, hidden, dtype, rngs)
        self.querys2feat = linear(hidden, hidden, dtype, rngs) if options.link_features else None

    def __call__(
        self, backbone: Any
    ) -> tuple[Float[Array, "m hidden"], Float[Array, "m hidden"] | None]:
        """The queries' positions and their first features; None for the decoder's own features."""
        segments = backbone.blocks.segments
        tokens = [segments[name].rein() for name in sorted(segments, key=int)]
        x = self.transform(jnp.concatenate(tokens))
        # The three values of a channel are neighbours.
        values = jnp.stack([x.max(0), x.mean(0), x[-1]], axis=-1)
        positions = self.merge(values.reshape(len(values), -1))
        return positions, None if self.querys2feat is None else self.querys2feat(positions)


def linear(inputs: int, outputs: int, dtype: jnp.dtype, rngs: nnx.Rngs) -> nnx.Linear:
    """A linear layer that starts as torch's: all uniform within 1 / sqrt(inputs)."""

    def start(key, shape, dtype):
        return jax.random.uniform(key, shape, dtype, -(inputs**-0.5), inputs**-0.5)

    return Linear(inputs, outputs, kernel_init=start, bias_init=start, dtype=dtype, rngs=rngs)


def uniform(rngs: nnx.Rngs, shape: tuple[int, ...], bound: float) -> nnx.Param:
    """A parameter drawn uniformly within `bound`."""
    return nnx.Param(jax.random.uniform(rngs.params(), shape, minval=-bound, maxval=bound))
