"""The image towers of EVA-CLIP-8B and EVA-CLIP-18B (Sun et al. 2024), to plan the size of a run.

A plain vision transformer with RMSNorm in place of LayerNorm, a projection to queries, keys and
values without bias, and an MLP of five times the width. The larger one normalises after attention
and MLP instead of before. There are no rotary positions. Attribute names are those of
baaivision/EVA (EVA-CLIP-18B/shinji). Published checkpoints (33 and 37 GB) are not converted.
"""

import dataclasses

from flax import nnx
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxdg.backbones import stacking, vit
from jaxdg.backbones.layers import Linear
from jaxdg.backbones.vit import PatchEmbed, Vit, VitConfig

RATIO = 5  # of the MLP's inner width to the encoder's


@dataclasses.dataclass(frozen=True)
class EvaClipConfig(VitConfig):
    """An EVA-CLIP image tower of 8 or 18 billion parameters: `VitConfig`, and their difference.

    Attributes:
        postnorm: the norms follow attention and MLP (18B) instead of preceding them (8B).
    """

    postnorm: bool = False

    def build(self, *, rngs: nnx.Rngs) -> "EvaClip":
        """See `EncoderConfig.build`."""
        return EvaClip(self, rngs=rngs)


class Attention(vit.Attention):
    """Multi-head self-attention with one fused projection without bias."""

    def __init__(self, config: EvaClipConfig, *, rngs: nnx.Rngs):
        c = config.width
        dtype = jnp.dtype(config.dtype)
        self.heads = config.heads
        self.padding = config.padding
        self.qkv = Linear(c, 3 * c, use_bias=False, dtype=dtype, rngs=rngs)
        self.proj = Linear(c, c, dtype=dtype, rngs=rngs)


class Mlp(vit.Mlp):
    """Two linear layers with GELU between."""

    def __init__(self, config: EvaClipConfig, *, rngs: nnx.Rngs):
        c = config.width
        dtype = jnp.dtype(config.dtype)
        self.fc1 = Linear(c, RATIO * c, dtype=dtype, rngs=rngs)
        self.fc2 = Linear(RATIO * c, c, dtype=dtype, rngs=rngs)


class Block(nnx.Module):
    """Attention and MLP, each before or behind an RMSNorm, and a residual."""

    def __init__(self, config: EvaClipConfig, *, rngs: nnx.Rngs):
        self.postnorm = config.postnorm
        self.norm1 = nnx.RMSNorm(config.width, epsilon=1e-6, rngs=rngs)
        self.attn = Attention(config, rngs=rngs)
        self.norm2 = nnx.RMSNorm(config.width, epsilon=1e-6, rngs=rngs)
        self.mlp = Mlp(config, rngs=rngs)

    def __call__(
        self, x: Float[Array, "b n c"], keep: Float[Array, "2 b 1 1"]
    ) -> Float[Array, "b n c"]:
        """`keep` scales the two branches (drop path)."""
        for i, (norm, branch) in enumerate(((self.norm1, self.attn), (self.norm2, self.mlp))):
            x = x + keep[i].astype(x.dtype) * (
                norm(branch(x)) if self.postnorm else branch(norm(x))
            ).astype(x.dtype)
        return x


class EvaClip(Vit):
    """Image to features at the taps; called as `Vit` is."""

    config: EvaClipConfig

    def __init__(self, config: EvaClipConfig, *, rngs: nnx.Rngs):
        """Builds the encoder with random parameters; use `nnx.eval_shape` for shapes only."""
        self.config = config
        init = nnx.initializers.truncated_normal(0.02)
        self.cls_token = nnx.Param(init(rngs.params(), (1, 1, config.width)))
        self.pos_embed = nnx.Param(
            init(rngs.params(), (1, 1 + config.grid[0] * config.grid[1], config.width))
        )
        self.patch_embed = PatchEmbed(config, rngs=rngs)
        self.blocks = stacking.Stack(
            lambda rngs, _: Block(config, rngs=rngs),
            config.used,
            config.ends,
            remat=config.remat,
            unroll=config.unroll,
            rngs=rngs,
        )
