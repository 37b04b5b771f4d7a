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
from jax.ad_checkpoint import checkpoint_name
import jax.numpy as jnp
from jaxtyping import Array, Float
import numpy as np

from jaxdg.backbones import attention, stacking
from jaxdg.backbones.encoder import EncoderConfig, EncoderOptions
from jaxdg.backbones.layers import Linear, spread
from jaxdg.backbones.vit import PatchEmbed, Vit, VitConfig

PRETRAINED_GRID = 16  # side of the pre-training's grid; rotary positions are scaled to it
THETA = 10_000.0
ALIGNED = 8  # a GPU multiplies matrices of half precision whose sides are multiples of this


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
    def padding(self) -> int:
        """See `VitConfig.padding`; windows cut the tokens otherwise."""
        return 0 if self.window else super().padding

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
    """Rotates channels (0, 1), (2, 3), .. of the patch tokens.

    The class token, which is the first, and padding, which is last, are rotated by no angle.
    """
    cos, sin = (t[:, None, :, None] for t in attention.for_all_tokens(cos, sin, 1, x.shape[1]))
    pairs = x.astype(jnp.float32).reshape(*x.shape[:3], -1, 2)
    rotated = pairs * cos + pairs[..., ::-1] * (sin * jnp.array([-1.0, 1.0]))
    return rotated.reshape(x.shape).astype(x.dtype)


def product(
    x: Float[Array, "b n c"], kernel: Float[Array, "c d"], bias: Float[Array, " d"]
) -> Float[Array, "b n d"]:
    """`x @ kernel + bias` in the kernel's half precision.

    The bias is one more row of the kernel. So a GPU gets its gradient from the product, and need
    not read the gradient of the results once more to sum it.
    """
    ones = jax.nn.one_hot(0, ALIGNED, dtype=kernel.dtype)
    rows = jnp.concatenate([kernel, ones[:, None] * bias.astype(kernel.dtype)])
    ones = jnp.broadcast_to(ones, (*x.shape[:2], ALIGNED))
    return jnp.concatenate([x.astype(kernel.dtype), ones], axis=-1) @ rows


def normalized_product(
    x: Float[Array, "b n c"], norm: nnx.LayerNorm, linear: nnx.Linear
) -> Float[Array, "b n d"]:
    """`linear(norm(x))` in half precision; channels of `x` beyond the norm's are zeros.

    The product comes first and is divided by the standard deviation, so normalised features are
    never written. The norm's scale and the mean are taken out of the kernel: with columns of mean 0
    it gives the same for `x` as for `x` less its mean.
    """
    assert norm.scale is not None
    assert norm.bias is not None
    assert linear.bias is not None
    n = norm.num_features
    x = x.astype(jnp.float32)
    mean = checkpoint_name(jnp.sum(x, axis=-1, keepdims=True) / n, "mean")
    square = checkpoint_name(jnp.sum(x * x, axis=-1, keepdims=True) / n, "mean square")
    scale = jax.lax.rsqrt(jnp.maximum(square - mean * mean, 0) + norm.epsilon)
    kernel = linear.kernel[...].astype(jnp.float32)
    bias = norm.bias[...] @ kernel + linear.bias[...]
    kernel = norm.scale[...][:, None] * kernel
    kernel = (kernel - jnp.mean(kernel, axis=0)).astype(linear.dtype)
    kernel = jnp.pad(kernel, ((0, x.shape[-1] - n), (0, 0)))
    kernel = checkpoint_name(kernel, "kernel")
    bias = checkpoint_name(bias, "bias")
    return (scale * (x.astype(linear.dtype) @ kernel) + bias).astype(linear.dtype)


def are_plain(*layers: nnx.Linear) -> bool:
    """Whether these are linear layers and no more, whose kernels may be joined.

    A method of training may have put others in their places, which only compute when called.
    """
    return all(type(layer) is Linear for layer in layers)


class Attention(nnx.Module):
    """Self-attention with rotary positions; queries and values have a bias, keys do not."""

    def __init__(self, config: Eva02Config, *, rngs: nnx.Rngs):
        c = config.width
        linear = partial(Linear, dtype=jnp.dtype(config.dtype), rngs=rngs)
        self.half = jnp.dtype(config.dtype).itemsize == 2
        self.heads = config.heads
        self.padding = config.padding
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
        if self.half and are_plain(*self._projections()):
            bias = jnp.concatenate([self.q_bias[...], jnp.zeros(x.shape[-1]), self.v_bias[...]])
            q, k, v = jnp.split(product(x, self._kernel(), bias), 3, axis=-1)
        else:
            q, k, v = (
                (self.q_proj(x), self.k_proj(x), self.v_proj(x))
                if self.subln
                else jnp.split(self.qkv(x), 3, axis=-1)
            )
            q = q + spread(self.q_bias[...], q)
            v = v + spread(self.v_bias[...], v)
        q, k, v = (t.reshape(*t.shape[:2], self.heads, -1) for t in (q, k, v))
        q = rotate(q, cos, sin)
        k = rotate(k, cos, sin)
        y = attention.attention(q, k, v, padding=self.padding).reshape(x.shape)
        return self.proj(y if self.inner_attn_ln is None else self.inner_attn_ln(y))

    def _projections(self) -> tuple[nnx.Linear, ...]:
        return (self.q_proj, self.k_proj, self.v_proj) if self.subln else (self.qkv,)

    def _kernel(self) -> Float[Array, "c d"]:
        """The three projections as one."""
        kernels = [linear.kernel[...].astype(linear.dtype) for linear in self._projections()]
        return jnp.concatenate(kernels, axis=1)

    def values(self, x: Float[Array, "b n c"]) -> Float[Array, "b n c"]:
        """The output if each token attended only to itself: its projected value."""
        v = self.v_proj(x) if self.subln else jnp.split(self.qkv(x), 3, axis=-1)[2]
        v = v + spread(self.v_bias[...], v)
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
        linear = partial(Linear, dtype=jnp.dtype(config.dtype), rngs=rngs)
        self.subln = config.subln
        self.dtype = jnp.dtype(config.dtype)
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
        if self.dtype.itemsize == 2 and are_plain(self.w1, self.w2, self.w3):
            return self._in_half_precision(x)
        return self.w3(self.ffn_ln(jax.nn.silu(self.w1(x)) * self.w2(x)))

    def _in_half_precision(self, x: Float[Array, "b n c"]) -> Float[Array, "b n c"]:
        """The same in two products, with hidden channels of zeros up to a multiple of 8.

        A GPU would add them (to the large model's 2730) for each product.
        """
        added = -self.w3.in_features % ALIGNED

        def joined(name: str) -> Array:
            parts = [getattr(linear, name)[...] for linear in (self.w1, self.w2)]
            widths = [(0, 0)] * (parts[0].ndim - 1) + [(0, added)]
            return jnp.concatenate([jnp.pad(p.astype(self.dtype), widths) for p in parts], axis=-1)

        gate, value = jnp.split(product(x, joined("kernel"), joined("bias")), 2, axis=-1)
        return normalized_product(jax.nn.silu(gate) * value, self.ffn_ln, self.w3)


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
