"""EVA-02 (Fang et al. 2023) and EVA-02-CLIP (Sun et al. 2023), the encoder of VLTSeg.

A plain vision transformer with rotary positions beside the learned ones, a gated MLP (SwiGLU) and
extra LayerNorms ("sub-LN") before the attention's output projection and inside the MLP. Attribute
names are those of baaivision/EVA. Rotary tables are computed for any grid of tokens and never
loaded. Learned positions are resized as in EVA's code, by plain bicubic interpolation.

For large images most blocks may attend within windows, as in ViTDet (Li et al. 2022) and EVA-02's
detectors: only the last block of each quarter attends to the whole image. Parameters are the same.
EVA-02's detectors have no class token. Here every window gets a copy of it, and their outputs for
it are averaged.
"""

import dataclasses
from functools import partial

from flax import nnx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float
import numpy as np

from jaxdg.backbones import attention, stacking
from jaxdg.backbones.encoder import EncoderConfig, EncoderOptions
from jaxdg.backbones.vit import PatchEmbed, Vit, VitConfig

PRETRAINED_GRID = 16  # side of the pre-training's grid; rotary positions are scaled to it
THETA = 10_000.0


@dataclasses.dataclass(frozen=True)
class Eva02Config(VitConfig):
    """An EVA-02 encoder: `VitConfig`, and the differences of its published variants.

    Attributes:
        subln: separate projections and a LayerNorm in the MLP (MIM-L, CLIP); else fused projections
            and no LayerNorm (MIM-Ti, MIM-S).
        inner_attn_ln: LayerNorm on the joined heads before the output projection (CLIP).
        random_positions: loads weights as the public VLTSeg re-implementation, to reproduce its
            results: learned positions of another grid are drawn at random instead of resized, and
            a stored `inner_attn_ln` is ignored.
        window: rows and columns of tokens in a window of attention (EVA-02's detectors: 16); 0: all
            blocks attend to the whole image.
    """

    subln: bool = True
    inner_attn_ln: bool = True
    random_positions: bool = False
    window: int = 0

    def build(self, *, rngs: nnx.Rngs) -> "Eva02":
        """See `EncoderConfig.build`."""
        return Eva02(self, rngs=rngs)

    def configured(
        self, options: EncoderOptions, image_size: tuple[int, int], boundaries: tuple[int, ...]
    ) -> EncoderConfig:
        """See `EncoderConfig.configured`; takes a window."""
        config = super().configured(dataclasses.replace(options, window=0), image_size, boundaries)
        return dataclasses.replace(config, window=options.window)

    @property
    def global_blocks(self) -> tuple[int, ...]:
        """Blocks that attend to the whole image even with windows: the last of each quarter."""
        return tuple(sorted({(quarter + 1) * self.depth // 4 - 1 for quarter in range(4)}))

    @property
    def ends(self) -> tuple[int, ...]:
        """Blocks after which segments end: taps, boundaries, and each change of the window."""
        if not self.window:
            return super().ends
        changes = (end for block in self.global_blocks for end in (block - 1, block))
        return (*super().ends, *(end for end in changes if 0 <= end < self.used))

    @property
    def hidden(self) -> int:
        """Channels inside the MLP."""
        return 8 * self.width // 3  # EVA's code computes int(2.6667 * width)


def rotary_tables(
    grid: tuple[int, int], dim: int
) -> tuple[Float[Array, "n d"], Float[Array, "n d"]]:
    """Cosines and sines of the angles that rotate pairs of a head's channels.

    Args:
        grid: rows and columns of tokens, scaled to the pre-training's 16x16: positions are
            `arange(rows) / rows * 16`.
        dim: channels of a head. There are `dim / 4` frequencies for y and as many for x; each
            rotates one pair.

    Returns:
        Two arrays [rows * columns, dim / 2], y before x.
    """
    frequencies = THETA ** -(jnp.arange(dim // 4, dtype=jnp.float32) / (dim // 4))
    angles = [
        jnp.arange(side, dtype=jnp.float32)[:, None] / side * PRETRAINED_GRID * frequencies
        for side in grid
    ]
    y = jnp.broadcast_to(angles[0][:, None], (*grid, dim // 4))
    x = jnp.broadcast_to(angles[1], (*grid, dim // 4))
    both = jnp.concatenate([y, x], axis=-1).reshape(-1, dim // 2)
    return jnp.cos(both), jnp.sin(both)


def rotate(
    x: Float[Array, "b n heads c"], cos: Float[Array, "p d"], sin: Float[Array, "p d"]
) -> Float[Array, "b n heads c"]:
    """Rotates channels (0, 1), (2, 3), .. of the patch tokens; the class token stays as it is."""
    pairs = x[:, 1:].astype(jnp.float32).reshape(x.shape[0], -1, x.shape[2], cos.shape[1], 2)
    even = pairs[..., 0]
    odd = pairs[..., 1]
    cos = cos[:, None]
    sin = sin[:, None]
    turned = jnp.stack([even * cos - odd * sin, odd * cos + even * sin], axis=-1)
    return jnp.concatenate([x[:, :1], turned.reshape(x[:, 1:].shape).astype(x.dtype)], axis=1)


class Attention(nnx.Module):
    """Self-attention with rotary positions; queries and values have a bias, keys do not."""

    def __init__(self, config: Eva02Config, *, rngs: nnx.Rngs):
        c = config.width
        linear = partial(nnx.Linear, dtype=jnp.dtype(config.dtype), rngs=rngs)
        self.heads = config.heads
        self.subln = config.subln
        if config.subln:
            self.q_proj, self.k_proj, self.v_proj = (linear(c, c, use_bias=False) for _ in range(3))
        else:
            self.qkv = linear(c, 3 * c, use_bias=False)
        self.q_bias = nnx.Param(jnp.zeros(c))
        self.v_bias = nnx.Param(jnp.zeros(c))
        self.inner_attn_ln = (
            nnx.LayerNorm(c, epsilon=1e-6, rngs=rngs) if config.inner_attn_ln else None
        )
        self.proj = linear(c, c)

    def __call__(
        self, x: Float[Array, "b n c"], cos: Float[Array, "p d"], sin: Float[Array, "p d"]
    ) -> Float[Array, "b n c"]:
        q, k, v = (
            (self.q_proj(x), self.k_proj(x), self.v_proj(x))
            if self.subln
            else jnp.split(self.qkv(x), 3, axis=-1)
        )
        q = q + self.q_bias[...].astype(q.dtype)
        v = v + self.v_bias[...].astype(v.dtype)
        q, k, v = (t.reshape(*t.shape[:2], self.heads, -1) for t in (q, k, v))
        y = attention.attention(rotate(q, cos, sin), rotate(k, cos, sin), v).reshape(x.shape)
        return self.proj(y if self.inner_attn_ln is None else self.inner_attn_ln(y))

    def values(self, x: Float[Array, "b n c"]) -> Float[Array, "b n c"]:
        """The output if each token attended only to itself: its projected value."""
        v = self.v_proj(x) if self.subln else jnp.split(self.qkv(x), 3, axis=-1)[2]
        v = v + self.v_bias[...].astype(v.dtype)
        return self.proj(v if self.inner_attn_ln is None else self.inner_attn_ln(v))


class WindowAttention(Attention):
    """Attention within windows, with their own rotary tables; zeros fill windows at the edges."""

    def __init__(self, config: Eva02Config, *, rngs: nnx.Rngs):
        super().__init__(config, rngs=rngs)
        self.grid = config.grid
        self.window = config.window

    def __call__(
        self, x: Float[Array, "b n c"], cos: Float[Array, "p d"], sin: Float[Array, "p d"]
    ) -> Float[Array, "b n c"]:
        b, _, c = x.shape
        windows = attention.to_windows(x[:, 1:].reshape(b, *self.grid, c), self.window)
        token = jnp.repeat(x[:, :1], len(windows) // b, axis=0)
        tables = rotary_tables((self.window, self.window), 2 * cos.shape[1])
        y = super().__call__(jnp.concatenate([token, windows], axis=1), *tables)
        patches = attention.from_windows(y[:, 1:], self.grid, self.window).reshape(b, -1, c)
        token = y[:, :1].reshape(b, -1, c).mean(axis=1, keepdims=True)
        return jnp.concatenate([token, patches], axis=1)


class SwiGlu(nnx.Module):
    """The gated MLP: `w3(LayerNorm(silu(w1 x) * (w2 x)))`, or w1 and w2 fused and no norm."""

    def __init__(self, config: Eva02Config, *, rngs: nnx.Rngs):
        c = config.width
        hidden = config.hidden
        linear = partial(nnx.Linear, dtype=jnp.dtype(config.dtype), rngs=rngs)
        self.subln = config.subln
        self.dtype = jnp.dtype(config.dtype)
        # A GPU multiplies matrices of half precision whose sides are multiples of 8, and would pad
        # the hidden channels (2730 in the large model) for each of the products.
        self.added = -hidden % 8 if self.dtype.itemsize == 2 else 0
        if config.subln:
            self.w1 = linear(c, hidden)
            self.w2 = linear(c, hidden)
            self.ffn_ln = nnx.LayerNorm(hidden, epsilon=1e-6, rngs=rngs)
        else:
            self.w12 = linear(c, 2 * hidden)
        self.w3 = linear(hidden, c)

    def __call__(self, x: Float[Array, "b n c"]) -> Float[Array, "b n c"]:
        if not self.subln:
            gate, value = jnp.split(self.w12(x), 2, axis=-1)
            return self.w3(jax.nn.silu(gate) * value)
        if self.added:
            return self._padded(x)
        return self.w3(self.ffn_ln(jax.nn.silu(self.w1(x)) * self.w2(x)))

    def _padded(self, x: Float[Array, "b n c"]) -> Float[Array, "b n c"]:
        """The same with hidden channels of zeros added, which the norm does not count."""

        def pad(param, axis, dtype=jnp.float32):
            widths = [(0, self.added if i == axis else 0) for i in range(param.ndim)]
            return jnp.pad(param[...].astype(dtype), widths)

        dtype = self.dtype
        gate, value = (
            x.astype(dtype) @ pad(linear.kernel, 1, dtype) + pad(linear.bias, 0, dtype)
            for linear in (self.w1, self.w2)
        )
        y = (jax.nn.silu(gate) * value).astype(jnp.float32)
        hidden = self.w3.in_features
        mean = jnp.sum(y, axis=-1, keepdims=True) / hidden
        variance = jnp.sum(y * y, axis=-1, keepdims=True) / hidden - mean * mean
        scale = jax.lax.rsqrt(jnp.maximum(variance, 0) + self.ffn_ln.epsilon)
        y = (y - mean) * scale * pad(self.ffn_ln.scale, 0) + pad(self.ffn_ln.bias, 0)
        assert self.w3.bias is not None
        return y.astype(dtype) @ pad(self.w3.kernel, 0, dtype) + self.w3.bias[...].astype(dtype)


class Block(nnx.Module):
    """Attention, global or in windows, and MLP, each with a LayerNorm before and a residual."""

    def __init__(self, config: Eva02Config, is_global: bool = True, *, rngs: nnx.Rngs):
        self.norm1 = nnx.LayerNorm(config.width, epsilon=1e-6, rngs=rngs)
        self.attn = (Attention if is_global else WindowAttention)(config, rngs=rngs)
        self.norm2 = nnx.LayerNorm(config.width, epsilon=1e-6, rngs=rngs)
        self.mlp = SwiGlu(config, rngs=rngs)

    def __call__(
        self,
        x: Float[Array, "b n c"],
        keep: Float[Array, "2 b 1 1"],
        cos: Float[Array, "p d"],
        sin: Float[Array, "p d"],
    ) -> Float[Array, "b n c"]:
        """`keep` scales the two branches (drop path); `cos` and `sin` are the rotary tables."""
        x = x + keep[0].astype(x.dtype) * self.attn(self.norm1(x), cos, sin)
        return x + keep[1].astype(x.dtype) * self.mlp(self.norm2(x))


class Blocks(stacking.Stack):
    """The stacked blocks; each gets the rotary tables of the encoder's grid."""

    def __init__(self, config: Eva02Config, *, rngs: nnx.Rngs):
        def make(rngs, first):
            is_global = not config.window or first in config.global_blocks
            return Block(config, is_global, rngs=rngs)

        super().__init__(
            make, config.used, config.ends, remat=config.remat, unroll=config.unroll, rngs=rngs
        )
        self.grid = config.grid
        self.head_dim = config.width // config.heads

    def __call__(
        self, x: Float[Array, "b n c"], scales: Float[Array, "depth 2 b 1 1"]
    ) -> dict[int, Array]:
        return super().__call__(x, scales, *rotary_tables(self.grid, self.head_dim))


class Eva02(Vit):
    """Image to features at the taps; called as `Vit` is."""

    config: Eva02Config

    def __init__(self, config: Eva02Config, *, rngs: nnx.Rngs):
        """Builds the encoder with random parameters; `jaxdg.backbones.create` loads weights."""
        self.config = config
        init = nnx.initializers.truncated_normal(0.02)
        self.cls_token = nnx.Param(init(rngs.params(), (1, 1, config.width)))
        self.pos_embed = nnx.Param(
            init(rngs.params(), (1, 1 + config.grid[0] * config.grid[1], config.width))
        )
        self.patch_embed = PatchEmbed(config, rngs=rngs)
        self.blocks = Blocks(config, rngs=rngs)

    def adapt(self, name: str, tensor: np.ndarray) -> np.ndarray | None:
        """See `Vit.adapt`, and `Eva02Config.random_positions` for its two deviations."""
        fitted = super().adapt(name, tensor)
        if not self.config.random_positions or fitted is None:
            return fitted
        if ".inner_attn_ln." in name:
            return None
        if name == "pos_embed" and fitted.shape != tensor.shape:
            # mmengine's load warns of another shape and leaves random positions. The seed is fixed,
            # so that a file always gives the same encoder.
            return np.random.default_rng(0).normal(0.0, 0.02, fitted.shape).astype(np.float32)
        return fitted
