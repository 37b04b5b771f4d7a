"""The image tower of SigLIP (Zhai et al. 2023) and SigLIP 2 (Tschannen et al. 2025).

It follows google-research/big_vision: a plain vision transformer without a class token, whose MLPs
compute GELU by the tanh formula. Dense features are read before the final norm and the
attention-pool head ("MAPHead", timm's `attn_pool`), so both are left out. Attribute names are
timm's. timm computes exact GELU in some models of the first SigLIP (up to patch 16); here all
follow the authors.
"""

import dataclasses
from functools import partial

from flax import nnx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float
import numpy as np

from jaxdg.backbones import resizing, stacking, vit
from jaxdg.backbones.layers import spread
from jaxdg.backbones.vit import Attention, PatchEmbed, Vit, VitConfig


@dataclasses.dataclass(frozen=True)
class SiglipConfig(VitConfig):
    """A SigLIP image tower; fields of `VitConfig`."""

    def build(self, *, rngs: nnx.Rngs) -> "Siglip":
        """See `EncoderConfig.build`."""
        return Siglip(self, rngs=rngs)

    @property
    def prefix(self) -> int:
        """Tokens before those of the patches: none."""
        return 0


class Mlp(vit.Mlp):
    """Two linear layers with GELU by its tanh formula between."""

    def __call__(self, x: Float[Array, "b n c"]) -> Float[Array, "b n c"]:
        return self.fc2(jax.nn.gelu(self.fc1(x), approximate=True))


class Block(vit.Block):
    """Attention and MLP, each behind a LayerNorm and a residual."""

    def __init__(self, config: VitConfig, *, rngs: nnx.Rngs):
        self.norm1 = nnx.LayerNorm(config.width, epsilon=1e-6, rngs=rngs)
        self.attn = Attention(config, rngs=rngs)
        self.norm2 = nnx.LayerNorm(config.width, epsilon=1e-6, rngs=rngs)
        self.mlp = Mlp(config, rngs=rngs)


class Siglip(Vit):
    """Image to features at the taps; called as `Vit` is."""

    config: SiglipConfig

    def __init__(self, config: SiglipConfig, *, rngs: nnx.Rngs):
        """Builds the encoder with random parameters; `jaxdg.backbones.create` loads weights."""
        self.config = config
        rows, columns = config.grid
        init = nnx.initializers.normal(config.width**-0.5)
        self.pos_embed = nnx.Param(init(rngs.params(), (1, rows * columns, config.width)))
        self.patch_embed = PatchEmbed(config, rngs=rngs)
        self.blocks = stacking.Stack(
            lambda rngs, _: Block(config, rngs=rngs),
            config.used,
            config.ends,
            remat=config.remat,
            unroll=config.unroll,
            rngs=rngs,
        )

    def embed(self, images: Float[Array | np.ndarray, "b h w 3"]) -> Float[Array, "b n c"]:
        """The tokens that enter the first block: patches with their positions."""
        x = self.patch_embed(jnp.asarray(images))
        return x + spread(self.pos_embed[...], x)

    def adapt(self, name: str, tensor: np.ndarray) -> np.ndarray | None:
        """See `Vit.adapt`, but resizes positions as big_vision's `resample_posemb`.

        That is bilinear with fixed corners (`scipy.ndimage.zoom` of order 1). At some pairs of
        sizes, such as 32 to 16, scipy's zoom rounds the last row and column to just outside the
        grid and fills them with zeros. This code avoids that fault.
        """
        if name == "pos_embed":
            matrix = partial(resizing.linear_matrix, corners=True)
            return resizing.resize_positions(tensor, self.config.grid, self.config.prefix, matrix)
        return super().adapt(name, tensor)
