"""DINOv3's vision transformer (Siméoni et al. 2025): LayerScale, registers and rotary positions.

Attribute names are those of facebookresearch/dinov3. Rotary tables are computed for any grid of
tokens and never loaded: patch centres lie in -1..1 along each side, and periods run from 1 to 100
in float32, as in timm and transformers. (The authors' files hold periods rounded to bfloat16.) Only
queries and values have a bias; the authors' code has one for keys too, and masks it.
"""

import dataclasses
from functools import partial

from flax import nnx
import jax.numpy as jnp
from jaxtyping import Array, Float
import numpy as np

from jaxdg.backbones import attention, stacking
from jaxdg.backbones.deit3 import LayerScale
from jaxdg.backbones.layers import Linear, spread
from jaxdg.backbones.vit import Mlp, PatchEmbed, Vit, VitConfig

BASE = 100.0
EPSILON = 1e-5
INITIAL_SCALE = 1e-5


@dataclasses.dataclass(frozen=True)
class Dinov3Config(VitConfig):
    """A DINOv3 encoder; fields of `VitConfig`, and one more.

    Attributes:
        registers: tokens beside the class token.
    """

    registers: int = 4

    def build(self, *, rngs: nnx.Rngs) -> "Dinov3":
        """See `EncoderConfig.build`."""
        return Dinov3(self, rngs=rngs)

    @property
    def prefix(self) -> int:
        """Tokens before those of the patches: the class token and the registers."""
        return 1 + self.registers


def rotary_tables(
    grid: tuple[int, int], dim: int
) -> tuple[Float[Array, "p d"], Float[Array, "p d"]]:
    """Cosines and sines by which pairs of a head's channels are turned.

    Args:
        grid: rows and columns of tokens.
        dim: channels of a head; a quarter of them are frequencies for y, a quarter for x, and each
            turns one pair.

    Returns:
        Two of [rows * columns, dim / 2], y before x.
    """
    periods = BASE ** (jnp.arange(dim // 4, dtype=jnp.float32) / (dim // 4))
    centres = [2 * (jnp.arange(side, dtype=jnp.float32) + 0.5) / side - 1 for side in grid]
    y, x = (2 * jnp.pi * centre[:, None] / periods for centre in centres)
    y = jnp.broadcast_to(y[:, None], (*grid, dim // 4))
    x = jnp.broadcast_to(x, (*grid, dim // 4))
    both = jnp.concatenate([y, x], axis=-1).reshape(-1, dim // 2)
    return jnp.cos(both), jnp.sin(both)


def rotate(
    x: Float[Array, "b n heads c"], cos: Float[Array, "p d"], sin: Float[Array, "p d"], prefix: int
) -> Float[Array, "b n heads c"]:
    """Rotates channels (0, d), (1, d + 1), .. of the patch tokens.

    The `prefix` tokens before them, and padding behind them, are rotated by no angle.
    """
    cos, sin = (t[:, None] for t in attention.for_all_tokens(cos, sin, prefix, x.shape[1]))
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    rotated = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return rotated.astype(x.dtype)


class Attention(nnx.Module):
    """Self-attention with rotary positions; queries and values have a bias, keys do not."""

    def __init__(self, config: Dinov3Config, *, rngs: nnx.Rngs):
        c = config.width
        linear = partial(Linear, dtype=jnp.dtype(config.dtype), rngs=rngs)
        self.heads = config.heads
        self.prefix = config.prefix
        self.padding = config.padding
        self.qkv = linear(c, 3 * c, use_bias=False)
        self.qv_bias = nnx.Param(jnp.zeros((2, c)))
        self.proj = linear(c, c)

    def __call__(
        self, x: Float[Array, "b n c"], cos: Float[Array, "p d"], sin: Float[Array, "p d"]
    ) -> Float[Array, "b n c"]:
        q, k, v = jnp.split(self.qkv(x), 3, axis=-1)
        q = q + spread(self.qv_bias[0], q)
        v = v + spread(self.qv_bias[1], v)
        q, k, v = (t.reshape(*t.shape[:2], self.heads, -1) for t in (q, k, v))
        q = rotate(q, cos, sin, self.prefix)
        k = rotate(k, cos, sin, self.prefix)
        return self.proj(attention.attention(q, k, v, padding=self.padding).reshape(x.shape))


class Block(nnx.Module):
    """Attention and MLP, each behind a LayerNorm, scaled by channel, and a residual."""

    def __init__(self, config: Dinov3Config, *, rngs: nnx.Rngs):
        self.norm1 = nnx.LayerNorm(config.width, epsilon=EPSILON, rngs=rngs)
        self.attn = Attention(config, rngs=rngs)
        self.ls1 = LayerScale(config.width, INITIAL_SCALE)
        self.norm2 = nnx.LayerNorm(config.width, epsilon=EPSILON, rngs=rngs)
        self.mlp = Mlp(config, rngs=rngs)
        self.ls2 = LayerScale(config.width, INITIAL_SCALE)

    def __call__(
        self,
        x: Float[Array, "b n c"],
        keep: Float[Array, "2 b 1 1"],
        cos: Float[Array, "p d"],
        sin: Float[Array, "p d"],
    ) -> Float[Array, "b n c"]:
        """`keep` scales the two branches (drop path); `cos` and `sin` are the rotary tables."""
        x = x + keep[0].astype(x.dtype) * self.ls1(self.attn(self.norm1(x), cos, sin))
        return x + keep[1].astype(x.dtype) * self.ls2(self.mlp(self.norm2(x)))


class Blocks(stacking.Stack):
    """The stacked blocks, every one of which gets the rotary tables of the encoder's grid."""

    def __init__(self, config: Dinov3Config, *, rngs: nnx.Rngs):
        super().__init__(
            lambda rngs, _: Block(config, rngs=rngs),
            config.used,
            config.ends,
            remat=config.remat,
            unroll=config.unroll,
            rngs=rngs,
        )
        self.grid = config.grid
        self.head_dim = config.width // config.heads

    def __call__(
        self, x: Float[Array, "b n c"], scales: Float[Array, "depth 2 b 1 1"]
    ) -> dict[int, Array]:
        return super().__call__(x, scales, *rotary_tables(self.grid, self.head_dim))


class Dinov3(Vit):
    """Image to features at the taps; called as `Vit` is."""

    config: Dinov3Config

    def __init__(self, config: Dinov3Config, *, rngs: nnx.Rngs):
        """Builds the encoder with random parameters; `jaxdg.backbones.create` loads weights."""
        self.config = config
        init = nnx.initializers.normal(0.02)
        self.cls_token = nnx.Param(init(rngs.params(), (1, 1, config.width)))
        self.storage_tokens = nnx.Param(init(rngs.params(), (1, config.registers, config.width)))
        self.patch_embed = PatchEmbed(config, rngs=rngs)
        self.blocks = Blocks(config, rngs=rngs)

    def embed(self, images: Float[Array | np.ndarray, "b h w 3"]) -> Float[Array, "b n c"]:
        """The input of the first block: class token, registers and patches, without positions."""
        x = self.patch_embed(jnp.asarray(images))
        first = jnp.concatenate([self.cls_token[...], self.storage_tokens[...]], axis=1)
        first = jnp.broadcast_to(first, (x.shape[0], *first.shape[1:]))
        return jnp.concatenate([first.astype(x.dtype), x], axis=1)
