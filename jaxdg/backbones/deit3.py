"""DeiT-III (Touvron et al. 2022): the plain vision transformer with LayerScale.

Unlike in `jaxdg.backbones.vit`, each channel of a branch has a scale, and only patches have
positions: the class token is added after them. Attribute names are timm's. Positions of another
grid are resized as in DeiT's fine-tuning, by plain bicubic interpolation.
"""

import dataclasses

from flax import nnx
import jax.numpy as jnp
from jaxtyping import Array, Float
import numpy as np

from jaxdg.backbones import resizing, stacking
from jaxdg.backbones.layers import spread
from jaxdg.backbones.vit import Attention, Mlp, PatchEmbed, Vit, VitConfig

INITIAL_SCALE = 1e-4


@dataclasses.dataclass(frozen=True)
class Deit3Config(VitConfig):
    """A DeiT-III encoder; fields of `VitConfig`."""

    def build(self, *, rngs: nnx.Rngs) -> "Deit3":
        """See `EncoderConfig.build`."""
        return Deit3(self, rngs=rngs)


class LayerScale(nnx.Module):
    """A learned factor for each channel of a branch (Touvron et al. 2021), small at first."""

    def __init__(self, channels: int, initial: float):
        self.gamma = nnx.Param(jnp.full(channels, initial))

    def __call__(self, x: Float[Array, "b n c"]) -> Float[Array, "b n c"]:
        return x * spread(self.gamma[...], x)


class Block(nnx.Module):
    """Attention and MLP, each behind a LayerNorm, scaled by channel, and a residual."""

    def __init__(self, config: VitConfig, initial_scale: float, *, rngs: nnx.Rngs):
        self.norm1 = nnx.LayerNorm(config.width, epsilon=1e-6, rngs=rngs)
        self.attn = Attention(config, rngs=rngs)
        self.ls1 = LayerScale(config.width, initial_scale)
        self.norm2 = nnx.LayerNorm(config.width, epsilon=1e-6, rngs=rngs)
        self.mlp = Mlp(config, rngs=rngs)
        self.ls2 = LayerScale(config.width, initial_scale)

    def __call__(
        self, x: Float[Array, "b n c"], keep: Float[Array, "2 b 1 1"]
    ) -> Float[Array, "b n c"]:
        """`keep` scales the two branches (drop path)."""
        x = x + keep[0].astype(x.dtype) * self.ls1(self.attn(self.norm1(x)))
        return x + keep[1].astype(x.dtype) * self.ls2(self.mlp(self.norm2(x)))


class Deit3(Vit):
    """Image to features at the taps; called as `Vit` is."""

    config: Deit3Config

    def __init__(self, config: Deit3Config, *, rngs: nnx.Rngs):
        """Builds the encoder with random parameters; `jaxdg.backbones.create` loads weights."""
        self.config = config
        rows, columns = config.grid
        init = nnx.initializers.truncated_normal(0.02)
        self.cls_token = nnx.Param(init(rngs.params(), (1, 1, config.width)))
        self.pos_embed = nnx.Param(init(rngs.params(), (1, rows * columns, config.width)))
        self.patch_embed = PatchEmbed(config, rngs=rngs)

        def make_block(rngs, _):
            return Block(config, INITIAL_SCALE, rngs=rngs)

        self.blocks = stacking.Stack(
            make_block,
            config.used,
            config.ends,
            remat=config.remat,
            unroll=config.unroll,
            rngs=rngs,
        )

    def embed(self, images: Float[Array | np.ndarray, "b h w 3"]) -> Float[Array, "b n c"]:
        """The tokens that enter the first block: class token, and patches with their positions."""
        x = self.patch_embed(jnp.asarray(images))
        cls = jnp.broadcast_to(self.cls_token[...], (x.shape[0], 1, self.config.width))
        return jnp.concatenate([cls.astype(x.dtype), x + spread(self.pos_embed[...], x)], axis=1)

    def adapt(self, name: str, tensor: np.ndarray) -> np.ndarray | None:
        """As `Vit.adapt`, for positions without a row for the class token."""
        return (
            resizing.resize_positions(tensor, self.config.grid, prefix=0)
            if name == "pos_embed"
            else super().adapt(name, tensor)
        )
