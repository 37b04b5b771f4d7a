"""CLIP's vision transformer (Radford et al. 2021), as OpenAI and open_clip publish it.

A plain vision transformer with a LayerNorm before the first block, patches without bias, and
epsilon 1e-5. OpenAI trained with the activation x * sigmoid(1.702 x), "QuickGELU", most of
open_clip's own models with GELU by its exact formula. No tensor tells which, so a converted file
records it, and one made for the other activation is refused at load. Attribute names are those of
timm's ViT.
"""

from collections.abc import Mapping
import dataclasses
from typing import Literal

from flax import nnx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float
import numpy as np

from jaxdg.backbones import stacking
from jaxdg.backbones.layers import Linear
from jaxdg.backbones.vit import Attention, Vit, VitConfig

EPSILON = 1e-5


@dataclasses.dataclass(frozen=True)
class ClipVitConfig(VitConfig):
    """A CLIP image tower; fields of `VitConfig`, and one that belongs to the weights.

    Attributes:
        activation: of the MLP, "quick_gelu" or "gelu".
    """

    activation: Literal["quick_gelu", "gelu"] = "quick_gelu"

    def build(self, *, rngs: nnx.Rngs) -> "ClipVit":
        """See `EncoderConfig.build`."""
        return ClipVit(self, rngs=rngs)


class Mlp(nnx.Module):
    """Two linear layers with the activation between."""

    def __init__(self, config: ClipVitConfig, *, rngs: nnx.Rngs):
        c = config.width
        dtype = jnp.dtype(config.dtype)
        self.activation = config.activation
        self.fc1 = Linear(c, 4 * c, dtype=dtype, rngs=rngs)
        self.fc2 = Linear(4 * c, c, dtype=dtype, rngs=rngs)

    def __call__(self, x: Float[Array, "b n c"]) -> Float[Array, "b n c"]:
        y = self.fc1(x)
        return self.fc2(
            y * jax.nn.sigmoid(1.702 * y)
            if self.activation == "quick_gelu"
            else jax.nn.gelu(y, approximate=False)
        )


class Block(nnx.Module):
    """Attention and MLP, each behind a LayerNorm and a residual."""

    def __init__(self, config: ClipVitConfig, *, rngs: nnx.Rngs):
        self.norm1 = nnx.LayerNorm(config.width, epsilon=EPSILON, rngs=rngs)
        self.attn = Attention(config, rngs=rngs)
        self.norm2 = nnx.LayerNorm(config.width, epsilon=EPSILON, rngs=rngs)
        self.mlp = Mlp(config, rngs=rngs)

    def __call__(
        self, x: Float[Array, "b n c"], keep: Float[Array, "2 b 1 1"]
    ) -> Float[Array, "b n c"]:
        """`keep` scales the two branches (drop path)."""
        x = x + keep[0].astype(x.dtype) * self.attn(self.norm1(x))
        return x + keep[1].astype(x.dtype) * self.mlp(self.norm2(x))


class PatchEmbed(nnx.Module):
    """Non-overlapping patches, each projected to a token without a bias."""

    def __init__(self, config: ClipVitConfig, *, rngs: nnx.Rngs):
        patch = (config.patch_size, config.patch_size)
        dtype = jnp.dtype(config.dtype)
        self.proj = nnx.Conv(
            3,
            config.width,
            patch,
            strides=patch,
            padding="VALID",
            use_bias=False,
            dtype=dtype,
            rngs=rngs,
        )

    def __call__(self, images: Float[Array, "b h w 3"]) -> Float[Array, "b n c"]:
        x = self.proj(images)
        return x.reshape(x.shape[0], -1, x.shape[-1])


class ClipVit(Vit):
    """Image to features at the taps; called as `Vit` is."""

    config: ClipVitConfig

    def __init__(self, config: ClipVitConfig, *, rngs: nnx.Rngs):
        """Builds the encoder with random parameters; `jaxdg.backbones.create` loads weights."""
        self.config = config
        rows, columns = config.grid
        init = nnx.initializers.normal(config.width**-0.5)
        self.cls_token = nnx.Param(init(rngs.params(), (1, 1, config.width)))
        self.pos_embed = nnx.Param(init(rngs.params(), (1, 1 + rows * columns, config.width)))
        self.patch_embed = PatchEmbed(config, rngs=rngs)
        self.norm_pre = nnx.LayerNorm(config.width, epsilon=EPSILON, rngs=rngs)
        self.blocks = stacking.Stack(
            lambda rngs, _: Block(config, rngs=rngs),
            config.used,
            config.ends,
            remat=config.remat,
            unroll=config.unroll,
            rngs=rngs,
        )

    def embed(self, images: Float[Array | np.ndarray, "b h w 3"]) -> Float[Array, "b n c"]:
        """As `Vit.embed`, with a LayerNorm before the first block."""
        x = super().embed(images)
        return self.norm_pre(x).astype(x.dtype)

    def check(self, about: Mapping[str, str]) -> None:
        """Refuses weights that were trained with another activation.

        Args:
            about: what the file says of itself.

        Raises:
            ValueError: its conversion recorded another activation, or none.
        """
        mine = self.config.activation
        theirs = about.get("activation")
        if theirs != mine:
            raise ValueError(
                f"these weights were converted as {about.get('model', 'no known encoder')} for the"
                f" activation {theirs or 'nobody knows'}, and this encoder computes {mine}; create"
                " the encoder that they were converted for"
            )
