"""Stable Diffusion 1.x and 2.x (Rombach et al. 2022) as an encoder: features of its UNet's decoder.

An image goes through the VAE's encoder to a latent of an eighth of its size, and once through the
UNet that was trained to denoise such latents. As in VPD (Zhao et al. 2023), features are read after
four of its decoder's blocks, and where asked for the maps of its attention to the condition are
appended to two of them. Attribute names and numbers are diffusers'. Different from it: the two
projections around a transformer are linear in every version, and only what features depend on is
built.

The UNet attends to a condition of k rows, which is a stored array: what CLIP makes of the empty
prompt or of class names (`jaxdg.text.condition`). VPD adds to it what it learns.
"""

from collections.abc import Sequence
import dataclasses
import re
from typing import Any

from flax import nnx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32, Key
import numpy as np

from jaxdg import weights
from jaxdg.backbones import stacking
from jaxdg.backbones.attention import attention
from jaxdg.backbones.encoder import Encoder, StagedConfig
from jaxdg.backbones.layers import TORCH, Conv, Linear, spread

SIDE = 64  # a side of what the UNet sees is a multiple of so many pixels
STEPS = 1000  # of the noise that the UNet was trained to remove
LATENT = 4  # channels of a latent
GROUPS = 32  # of every GroupNorm
MAPPED = (16, 32)  # strides whose features get attention maps


@dataclasses.dataclass(frozen=True)
class LatentDiffusionConfig(StagedConfig):
    """A latent diffusion model; fields of `StagedConfig`, whose stages are the four levels of the
    UNet from stride 8 to 64, and:

    Attributes:
        blocks: residual blocks of each level of the UNet's encoder; its decoder has one more.
        widths: channels of each level.
        heads: attention heads of each level.
        vae_widths: channels of each level of the VAE's encoder.
        context: rows and channels of the condition.
        learned: whether an MLP of the condition is added to it, as in VPD.
        maps: whether the maps of the attention to the condition follow the features of strides 16
            and 32: k channels.
        scale: of the latent; VPD takes 1, where Stable Diffusion was trained with 0.18215.
        time: step, from 0 to 999, of whose noise the UNet is told.
        noise: whether that noise is added to the latent: the same draws for every image, so that
            features depend on the image alone. False: none, as in VPD.
    """

    blocks: tuple[int, int, int, int] = (2, 2, 2, 2)
    widths: tuple[int, int, int, int] = (320, 640, 1280, 1280)
    heads: tuple[int, int, int, int] = (8, 8, 8, 8)
    vae_widths: tuple[int, int, int, int] = (128, 256, 512, 512)
    context: tuple[int, int] = (77, 768)
    learned: bool = False
    maps: bool = False
    scale: float = 0.18215
    time: int = 1
    noise: bool = False

    def build(self, *, rngs: nnx.Rngs) -> "LatentDiffusion":
        """See `EncoderConfig.build`."""
        return LatentDiffusion(self, rngs=rngs)

    @property
    def strides(self) -> tuple[int, ...]:
        """See `EncoderConfig.strides`."""
        return tuple(8 << tap for tap in self.taps)

    @property
    def channels(self) -> tuple[int, ...]:
        """See `EncoderConfig.channels`."""
        rows = self.context[0] if self.maps else 0
        return tuple(
            self.widths[tap] + (rows if stride in MAPPED else 0)
            for tap, stride in zip(self.taps, self.strides, strict=True)
        )

    @property
    def last(self) -> tuple[int, int]:
        """The last block of the UNet's decoder that is built: its level, coarsest first, and its
        number there.
        """
        level = 3 - self.taps[0]
        return level, self.read(level)

    def read(self, level: int) -> int:
        """The block of a level of the decoder, coarsest first, whose output is a feature.

        It is the last but one, and the last of the finest level: VPD's output blocks 1, 4, 7, 11.
        """
        return self.blocks[3 - level] - (level < 3)


def noise_left() -> Float32[np.ndarray, " steps"]:
    """The share of a latent's variance that is still the image's after each step of noise.

    Its root multiplies the latent, and that of the rest multiplies the noise.
    """
    first, last = 0.00085, 0.012  # variance that the first and the last step add
    added = np.linspace(first**0.5, last**0.5, STEPS) ** 2
    return np.cumprod(1 - added).astype(np.float32)


class Keys(nnx.Rngs):
    """Random keys for hundreds of layers.

    `nnx.Rngs` counts in arrays. In a traced program each count looks through all that was traced
    before, which took 11 s of a reduced model's 12.
    """

    def __init__(self, key: Key[Array, ""]):
        self.key = key
        self.drawn = 0

    def params(self) -> Key[Array, ""]:
        """The next key."""
        self.drawn += 1
        return jax.random.fold_in(self.key, self.drawn)


def group_norm(channels: int, epsilon: float, rngs: nnx.Rngs) -> nnx.GroupNorm:
    """As torch computes it."""
    return nnx.GroupNorm(channels, GROUPS, epsilon=epsilon, use_fast_variance=False, rngs=rngs)


def layer_norm(channels: int, rngs: nnx.Rngs) -> nnx.LayerNorm:
    """As torch computes it."""
    return nnx.LayerNorm(channels, epsilon=1e-5, use_fast_variance=False, rngs=rngs)


def convolution(
    inside: int, outside: int, dtype: str, rngs: nnx.Rngs, side: int = 3, **options: Any
) -> Conv:
    """A convolution padded alike on all sides, as in torch."""
    options = {"padding": side // 2, **options}
    kw: Any = dict(kernel_init=TORCH, dtype=jnp.dtype(dtype), rngs=rngs)
    return Conv(inside, outside, (side, side), **kw, **options)


def linear(inside: int, outside: int, dtype: str, rngs: nnx.Rngs, **options: Any) -> Linear:
    """A linear layer that starts as torch's."""
    kw: Any = dict(kernel_init=TORCH, dtype=jnp.dtype(dtype), rngs=rngs)
    return Linear(inside, outside, **kw, **options)


def activated(norm: nnx.GroupNorm, x: Float[Array, "b h w c"]) -> Float[Array, "b h w c"]:
    """SiLU of the normalised features."""
    return jax.nn.silu(norm(x)).astype(x.dtype)


class ResnetBlock(nnx.Module):
    """Two convolutions, between which the UNet adds its embedding of the time, and a residual."""

    def __init__(
        self,
        inside: int,
        outside: int,
        time: int | None,
        *,
        epsilon: float,
        dtype: str,
        rngs: nnx.Rngs,
    ):
        self.norm1 = group_norm(inside, epsilon, rngs)
        self.conv1 = convolution(inside, outside, dtype, rngs)
        self.time_emb_proj = None if time is None else linear(time, outside, dtype, rngs)
        self.norm2 = group_norm(outside, epsilon, rngs)
        self.conv2 = convolution(outside, outside, dtype, rngs)
        self.conv_shortcut = (
            None if inside == outside else convolution(inside, outside, dtype, rngs, side=1)
        )

    def __call__(
        self, x: Float[Array, "b h w _"], time: Float[Array, "1 t"] | None = None
    ) -> Float[Array, "b h w c"]:
        y = self.conv1(activated(self.norm1, x))
        if self.time_emb_proj is not None and time is not None:
            added = self.time_emb_proj(jax.nn.silu(time))
            y = y + spread(added.astype(jnp.float32)[:, None, None], y)
        y = self.conv2(activated(self.norm2, y))
        return y + (x if self.conv_shortcut is None else self.conv_shortcut(x))


class Attention(nnx.Module):
    """Multi-head attention of tokens to one another, or to a condition of other channels."""

    def __init__(
        self,
        channels: int,
        heads: int,
        condition: int | None = None,
        *,
        bias: bool = False,
        dtype: str,
        rngs: nnx.Rngs,
    ):
        read = channels if condition is None else condition
        self.heads = heads
        self.to_q = linear(channels, channels, dtype, rngs, use_bias=bias)
        self.to_k = linear(read, channels, dtype, rngs, use_bias=bias)
        self.to_v = linear(read, channels, dtype, rngs, use_bias=bias)
        self.to_out = nnx.List([linear(channels, channels, dtype, rngs)])

    def __call__(
        self, x: Float[Array, "b n c"], condition: Float[Array, "k d"] | None = None
    ) -> Float[Array, "b n c"]:
        q = self.split(self.to_q(x))
        if condition is None:
            k, v = self.split(self.to_k(x)), self.split(self.to_v(x))
        else:
            k, v = (self.split(self.shared(to(condition), len(x))) for to in (self.to_k, self.to_v))
        return self.to_out[0](attention(q, k, v).reshape(x.shape))

    def map(
        self, x: Float[Array, "b n c"], condition: Float[Array, "k d"]
    ) -> Float[Array, "b n k"]:
        """How much each token attends to each row of the condition: the mean over the heads."""
        q = self.split(self.to_q(x))
        k = self.to_k(condition).reshape(len(condition), self.heads, -1)
        logits = jnp.einsum("bqhd,khd->bhqk", q, k, preferred_element_type=jnp.float32)
        return jax.nn.softmax(logits * q.shape[-1] ** -0.5).mean(1).astype(x.dtype)

    def split(self, x: Float[Array, "b n c"]) -> Float[Array, "b n heads d"]:
        """Channels by head."""
        return x.reshape(*x.shape[:2], self.heads, -1)

    def shared(self, x: Float[Array, "k c"], batch: int) -> Float[Array, "b k c"]:
        """The same rows for every image; their gradients are summed in float32."""
        return jnp.broadcast_to(x.astype(jnp.float32), (batch, *x.shape)).astype(x.dtype)


class VaeAttention(Attention):
    """Attention of pixels with one head, its norm and the residual."""

    def __init__(self, channels: int, *, dtype: str, rngs: nnx.Rngs):
        super().__init__(channels, 1, bias=True, dtype=dtype, rngs=rngs)
        self.group_norm = group_norm(channels, 1e-6, rngs)

    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h w c"]:
        b, h, w, c = x.shape
        y = self.group_norm(x).astype(x.dtype).reshape(b, h * w, c)
        return x + super().__call__(y).reshape(x.shape)


class Geglu(nnx.Module):
    """A linear layer of which one half of the channels gates the other by GELU."""

    def __init__(self, channels: int, inner: int, *, dtype: str, rngs: nnx.Rngs):
        self.proj = linear(channels, 2 * inner, dtype, rngs)

    def __call__(self, x: Float[Array, "b n _"]) -> Float[Array, "b n c"]:
        y, gate = jnp.split(self.proj(x), 2, axis=-1)
        return y * jax.nn.gelu(gate, approximate=False)


class FeedForward(nnx.Module):
    """The MLP of a transformer's block; the number between its layers was a dropout's."""

    def __init__(self, channels: int, *, dtype: str, rngs: nnx.Rngs):
        inner = 4 * channels
        self.net = nnx.Dict(
            {
                "0": Geglu(channels, inner, dtype=dtype, rngs=rngs),
                "2": linear(inner, channels, dtype, rngs),
            }
        )

    def __call__(self, x: Float[Array, "b n c"]) -> Float[Array, "b n c"]:
        return self.net["2"](self.net["0"](x))


class TransformerBlock(nnx.Module):
    """Attention to the other tokens and to the condition, and an MLP, each with a residual."""

    def __init__(self, channels: int, heads: int, condition: int, *, dtype: str, rngs: nnx.Rngs):
        kw: Any = dict(dtype=dtype, rngs=rngs)
        self.norm1 = layer_norm(channels, rngs)
        self.attn1 = Attention(channels, heads, **kw)
        self.norm2 = layer_norm(channels, rngs)
        self.attn2 = Attention(channels, heads, condition, **kw)
        self.norm3 = layer_norm(channels, rngs)
        self.ff = FeedForward(channels, **kw)

    def __call__(
        self, x: Float[Array, "b n c"], condition: Float[Array, "k d"], maps: bool
    ) -> tuple[Float[Array, "b n c"], Float[Array, "b n k"] | None]:
        """The tokens, and with `maps` how much they attend to the condition."""
        x = x + self.attn1(self.norm1(x))
        y = self.norm2(x)
        x = x + self.attn2(y, condition)
        return x + self.ff(self.norm3(x)), self.attn2.map(y, condition) if maps else None


class Transformer(nnx.Module):
    """A transformer of one block over the pixels, and a residual."""

    def __init__(self, channels: int, heads: int, condition: int, *, dtype: str, rngs: nnx.Rngs):
        self.norm = group_norm(channels, 1e-6, rngs)
        self.proj_in = linear(channels, channels, dtype, rngs)
        self.transformer_blocks = nnx.List(
            [TransformerBlock(channels, heads, condition, dtype=dtype, rngs=rngs)]
        )
        self.proj_out = linear(channels, channels, dtype, rngs)

    def __call__(
        self, x: Float[Array, "b h w c"], condition: Float[Array, "k d"], maps: bool = False
    ) -> tuple[Float[Array, "b h w c"], Float[Array, "b h w k"] | None]:
        """The features, and with `maps` how much each pixel attends to the condition."""
        b, h, w, c = x.shape
        y = self.proj_in(self.norm(x).astype(x.dtype).reshape(b, h * w, c))
        y, attended = self.transformer_blocks[0](y, condition, maps)
        x = x + self.proj_out(y).reshape(x.shape)
        return x, None if attended is None else attended.reshape(b, h, w, -1)


class Sampler(nnx.Module):
    """The convolution that halves a map, or follows its enlargement.

    The VAE's pads a row at the bottom and a column at the right alone.
    """

    def __init__(self, channels: int, *, dtype: str, rngs: nnx.Rngs, **options: Any):
        self.conv = convolution(channels, channels, dtype, rngs, **options)

    def __call__(self, x: Float[Array, "b _ _ c"]) -> Float[Array, "b h w c"]:
        return self.conv(x)


def doubled(x: Float[Array, "b h w c"]) -> Float[Array, "b _ _ c"]:
    """Every pixel four times; its gradients are summed in float32."""
    b, h, w, c = x.shape
    single = x.astype(jnp.float32)[:, :, None, :, None]
    return jnp.broadcast_to(single, (b, h, 2, w, 2, c)).astype(x.dtype).reshape(b, 2 * h, 2 * w, c)


class Level(nnx.Module):
    """Residual blocks of one resolution, transformers behind them, and the way to the next one.

    What a level has none of is None.
    """

    attentions: Any
    downsamplers: Any
    upsamplers: Any

    def __init__(
        self,
        resnets: Sequence[nnx.Module],
        attentions: Sequence[nnx.Module] = (),
        downsampler: nnx.Module | None = None,
        upsampler: nnx.Module | None = None,
    ):
        self.resnets = nnx.List(resnets)
        self.attentions = nnx.List(attentions) if attentions else None
        self.downsamplers = None if downsampler is None else nnx.List([downsampler])
        self.upsamplers = None if upsampler is None else nnx.List([upsampler])


def run(block: nnx.Module, remat: bool, *inputs: Array, **options: Any) -> Any:
    """A block's output; the backward pass finds its matrix products stored, or nothing (`remat`).

    Its parameters are gathered as those of stacked blocks are.
    """
    graph, state = nnx.split(block)

    def body(state: nnx.State, *inputs: Array) -> Any:
        module: Any = nnx.merge(graph, stacking.gathered(state))
        return module(*inputs, **options)

    policy = None if remat else stacking.stores_product
    return jax.checkpoint(body, policy=policy)(state, *inputs)


class VaeEncoder(nnx.Module):
    """Image to the mean and the log variance of its latent, an eighth as large, before the last
    layer.
    """

    def __init__(self, widths: tuple[int, ...], *, dtype: str, rngs: nnx.Rngs):
        kw: Any = dict(dtype=dtype, rngs=rngs)
        self.conv_in = convolution(3, widths[0], dtype, rngs)
        down = []
        for i, (inside, outside) in enumerate(zip((widths[0], *widths), widths, strict=False)):
            blocks = [
                ResnetBlock(channels, outside, None, epsilon=1e-6, **kw)
                for channels in (inside, outside)
            ]
            corner = ((0, 1), (0, 1))
            halve = Sampler(outside, strides=2, padding=corner, **kw) if i < 3 else None
            down.append(Level(blocks, downsampler=halve))
        self.down_blocks = nnx.List(down)
        c = widths[-1]
        middle = [ResnetBlock(c, c, None, epsilon=1e-6, **kw) for _ in range(2)]
        self.mid_block = Level(middle, [VaeAttention(c, **kw)])
        self.conv_norm_out = group_norm(c, 1e-6, rngs)
        self.conv_out = convolution(c, 2 * LATENT, dtype, rngs)

    def __call__(self, x: Float[Array, "b _ _ 3"], remat: bool) -> Float[Array, "b h w c"]:
        x = run(self.conv_in, remat, x)
        for level in self.down_blocks:
            for block in (*level.resnets, *(level.downsamplers or ())):
                x = run(block, remat, x)
        first, second = self.mid_block.resnets
        for block in (first, self.mid_block.attentions[0], second):
            x = run(block, remat, x)
        return self.conv_out(activated(self.conv_norm_out, x))


class Vae(nnx.Module):
    """The encoder of the autoencoder."""

    def __init__(self, widths: tuple[int, ...], *, dtype: str, rngs: nnx.Rngs):
        self.encoder = VaeEncoder(widths, dtype=dtype, rngs=rngs)
        self.quant_conv = convolution(2 * LATENT, 2 * LATENT, dtype, rngs, side=1)

    def __call__(self, images: Float[Array, "b _ _ 3"], remat: bool) -> Float[Array, "b h w 4"]:
        """The mean of each image's latent."""
        return self.quant_conv(self.encoder(images, remat))[..., :LATENT]


class TimeEmbedding(nnx.Module):
    """The step of the noise, as sines and cosines and through an MLP; in float32."""

    def __init__(self, channels: int, *, rngs: nnx.Rngs):
        self.linear_1 = linear(channels, 4 * channels, "float32", rngs)
        self.linear_2 = linear(4 * channels, 4 * channels, "float32", rngs)

    def __call__(self, time: int) -> Float[Array, "1 t"]:
        half = self.linear_1.in_features // 2
        angles = time * np.exp(-np.log(10000.0) * np.arange(half) / half)
        waves = np.concatenate([np.cos(angles), np.sin(angles)]).astype(np.float32)
        return self.linear_2(jax.nn.silu(self.linear_1(jnp.asarray(waves)[None])))


class UNet(nnx.Module):
    """Latents to features of four strides, from its decoder."""

    def __init__(self, config: LatentDiffusionConfig, *, rngs: nnx.Rngs):
        c = config
        self.config = config
        kw: Any = dict(dtype=c.dtype, rngs=rngs)
        time = 4 * c.widths[0]

        def resnet(inside: int, outside: int) -> ResnetBlock:
            return ResnetBlock(inside, outside, time, epsilon=1e-5, **kw)

        def transformer(tap: int) -> Transformer:
            return Transformer(c.widths[tap], c.heads[tap], c.context[1], **kw)

        self.time_embedding = TimeEmbedding(c.widths[0], rngs=rngs)
        self.conv_in = convolution(LATENT, c.widths[0], c.dtype, rngs)
        # Channels of all that the decoder reads of the encoder, the newest last.
        skips = [c.widths[0]]
        down = []
        for tap, width in enumerate(c.widths):
            inside = skips[-1]
            resnets = [resnet(inside if j == 0 else width, width) for j in range(c.blocks[tap])]
            attends = [transformer(tap) for _ in resnets] if tap < 3 else []
            halve = Sampler(width, strides=2, **kw) if tap < 3 else None
            down.append(Level(resnets, attends, downsampler=halve))
            skips += [width] * (len(resnets) + (tap < 3))
        self.down_blocks = nnx.List(down)
        inside = c.widths[3]
        self.mid_block = Level([resnet(inside, inside), resnet(inside, inside)], [transformer(3)])
        up = []
        last_level, last_block = c.last
        for level in range(last_level + 1):
            tap = 3 - level
            width = c.widths[tap]
            ends = level == last_level
            resnets = []
            for _ in range(last_block + 1 if ends else c.blocks[tap] + 1):
                resnets.append(resnet(inside + skips.pop(), width))
                inside = width
            attends = [transformer(tap) for _ in resnets] if tap < 3 else []
            double = None if ends else Sampler(width, **kw)
            up.append(Level(resnets, attends, upsampler=double))
        self.up_blocks = nnx.List(up)

    def __call__(
        self, x: Float[Array, "b h w 4"], condition: Float[Array, "k d"]
    ) -> tuple[Float[Array, "b _ _ _"], ...]:
        """Features of the taps, finest first."""
        c = self.config
        time = self.time_embedding(c.time)
        # For each tap that gets attention maps, those of all blocks of its size.
        maps: dict[int, list[Array]] = {
            tap: []
            for tap, stride in zip(c.taps, c.strides, strict=True)
            if c.maps and stride in MAPPED
        }

        def pair(level: Level, j: int, tap: int, x: Array) -> Array:
            """A residual block, and the transformer behind it if there is one."""
            x = run(level.resnets[j], c.remat, x, time)
            if level.attentions is None:
                return x
            x, attended = run(level.attentions[j], c.remat, x, condition, maps=tap in maps)
            if attended is not None:
                maps[tap].append(attended)
            return x

        x = run(self.conv_in, c.remat, x)
        skips = [x]
        for tap, level in enumerate(self.down_blocks):
            for j in range(len(level.resnets)):
                x = pair(level, j, tap, x)
                skips.append(x)
            if level.downsamplers is not None:
                x = run(level.downsamplers[0], c.remat, x)
                skips.append(x)
        first, second = self.mid_block.resnets
        x = run(first, c.remat, x, time)
        x, _ = run(self.mid_block.attentions[0], c.remat, x, condition)
        x = run(second, c.remat, x, time)
        features = {}
        for i, level in enumerate(self.up_blocks):
            for j in range(len(level.resnets)):
                x = pair(level, j, 3 - i, jnp.concatenate([x, skips.pop()], axis=-1))
                if j == c.read(i):
                    features[3 - i] = x
            if level.upsamplers is not None:
                x = run(level.upsamplers[0], c.remat, doubled(x))
        for tap, attended in maps.items():
            features[tap] = jnp.concatenate([features[tap], sum(attended) / len(attended)], axis=-1)
        return tuple(features[tap] for tap in c.taps)


class TextAdapter(nnx.Module):
    """VPD's MLP of the condition; the number between its layers was an activation's."""

    def __init__(self, channels: int, *, rngs: nnx.Rngs):
        self.fc = nnx.Dict({i: linear(channels, channels, "float32", rngs) for i in ("0", "2")})

    def __call__(self, x: Float[Array, "k d"]) -> Float[Array, "k d"]:
        return self.fc["2"](jax.nn.gelu(self.fc["0"](x), approximate=False))


class LatentDiffusion(Encoder):
    """Image to features of the UNet's decoder."""

    config: LatentDiffusionConfig

    def __init__(self, config: LatentDiffusionConfig, *, rngs: nnx.Rngs):
        """Builds the encoder with random parameters; `jaxdg.backbones.create` loads weights.

        Raises:
            ValueError: drop path, of which these networks have none; a step that there is not;
                attention maps without the finest features, behind which the last of them are made.
        """
        self.config = c = config
        if c.drop_path:
            raise ValueError(
                f"drop_path is {c.drop_path}, and Stable Diffusion skips no branches; set it to 0"
            )
        if not 0 <= c.time < STEPS:
            raise ValueError(f"time is {c.time}; allowed: 0 to {STEPS - 1}")
        if c.maps and c.taps[0] != 0:
            raise ValueError(
                f"taps {c.taps} leave out the finest features, without which not all attention maps"
                " are made; begin with 0, or leave taps (model.taps) out"
            )
        rngs = Keys(rngs.params())
        self.vae = Vae(c.vae_widths, dtype=c.dtype, rngs=rngs)
        self.unet = UNet(c, rngs=rngs)
        init = nnx.initializers.normal(1.0)
        self.context = nnx.Param(init(rngs.params(), c.context))
        width = c.context[1]
        self.text_adapter = TextAdapter(width, rngs=rngs) if c.learned else None
        self.gamma = nnx.Param(jnp.full(width, 1e-4)) if c.learned else None

    def __call__(
        self, images: Float[Array | np.ndarray, "b h w 3"], key: Key[Array, ""] | None = None
    ) -> tuple[Float[Array, "b _ _ _"], ...]:
        """Features of the UNet's decoder; the VAE gets no gradient.

        Args:
            images: [b, h, w, 3] normalised with `config.mean` and `config.std`, of
                `config.image_size`. Zeros at the bottom and right fill up sides to multiples of 64
                pixels; features that would lie outside of the image are cut off.
            key: not used; nothing is drawn in training.

        Returns:
            One [b, h / stride, w / stride, c] for each tap, sides rounded up, finest first.
        """
        self.check_size(images)
        _, h, w, _ = images.shape
        images = jnp.pad(jnp.asarray(images), ((0, 0), (0, -h % SIDE), (0, -w % SIDE), (0, 0)))
        features = self.unet(self.latent(images), self.condition())
        return tuple(
            feature[:, : -(-h // stride), : -(-w // stride)]
            for feature, stride in zip(features, self.config.strides, strict=True)
        )

    def latent(self, images: Float[Array, "b _ _ 3"]) -> Float[Array, "b h w 4"]:
        """What the UNet sees of images whose sides are multiples of 64 pixels."""
        c = self.config
        mean = self.vae(images.astype(c.dtype), c.remat)
        x = jax.lax.stop_gradient(mean) * c.scale
        if not c.noise:
            return x
        left = float(noise_left()[c.time])
        noise = jax.random.normal(jax.random.key(0), (1, *x.shape[1:]))
        return (left**0.5 * x + (1 - left) ** 0.5 * noise).astype(x.dtype)

    def condition(self) -> Float[Array, "k d"]:
        """What the UNet attends to beside the image."""
        context = self.context[...]
        if self.text_adapter is None or self.gamma is None:
            return context
        return context + self.gamma[...] * self.text_adapter(context)

    def adapt(self, name: str, tensor: np.ndarray) -> np.ndarray | None:
        """See `Encoder.adapt`: drops what comes after the finest tap."""
        found = re.match(r"unet\.up_blocks\.(\d+)\.(resnets|attentions|upsamplers)\.(\d+)\.", name)
        if found is None:
            return tensor
        level, part, block = int(found[1]), found[2], int(found[3])
        last_level, last_block = self.config.last
        built = level < last_level
        if level == last_level:
            built = part != "upsamplers" and block <= last_block
        return tensor if built else None

    def unit_of(self, name: str) -> int | None:
        """See `Encoder.unit_of`: the UNet's encoder is stages 0 to 3, its middle is 4, and its
        decoder 5 to 8, coarsest first.
        """
        found = re.match(r"unet\.(down_blocks\.\d|mid_block|up_blocks\.\d)\.", name)
        if found is None:
            return None
        part, _, level = found[1].partition(".")
        return {"down_blocks": 0, "mid_block": 4, "up_blocks": 5}[part] + int(level or 0)

    def unused(self, name: str) -> bool:
        """See `Encoder.unused`: the VAE and the stored condition, which get no gradient."""
        return name.startswith("vae.") or name == "context"


def fresh(config: LatentDiffusionConfig) -> dict[str, np.ndarray]:
    """The start of what no pre-training has: the MLP of a learned condition and its factor."""
    if not config.learned:
        return {}
    width = config.context[1]
    adapter = weights.tensors(TextAdapter(width, rngs=nnx.Rngs(0)))
    tensors = {f"text_adapter.{name}": tensor for name, tensor in adapter.items()}
    return {**tensors, "gamma": np.full(width, 1e-4, np.float32)}
