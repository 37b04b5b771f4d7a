"""Mask2Former's pixel decoder (Cheng et al. 2022, arXiv 2112.01527).

Deformable attention connects three coarse levels. The finest of them is then added to a fourth,
fine level, which becomes the mask features.

Attribute names follow facebookresearch/Mask2Former; every 1x1 convolution is a linear layer here.
"""

from collections.abc import Callable, Sequence
from functools import partial
import math
from typing import Any

from flax import nnx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float
import numpy as np

from jaxdg.backbones.layers import Conv, Linear
from jaxdg.backbones.stacking import Stack
from jaxdg.evaluation.sliding_window import resize_scores
from jaxdg.segmentation.mask2former.deformable_attention import (
    DeformableAttention,
    Shapes,
    kernel_init,
)
from jaxdg.segmentation.mask2former.layers import layer_norm, relu, row_major

GROUPS = 32  # of every GroupNorm
LEVELS = 3  # coarse ones, at strides 32, 16 and 8


class ConvNorm(nnx.Module):
    """A convolution of odd width that keeps the size, and GroupNorm."""

    def __init__(
        self,
        channels: int,
        width: int,
        kernel: int,
        *,
        use_bias: bool,
        published_init: bool,
        dtype: str,
        rngs: nnx.Rngs,
    ):
        options: Any = dict(
            use_bias=use_bias,
            kernel_init=kernel_init(published_init),
            dtype=jnp.dtype(dtype),
            rngs=rngs,
        )
        self.conv = (
            Linear(channels, width, **options)
            if kernel == 1
            else Conv(channels, width, (kernel, kernel), **options)
        )
        fast = jnp.dtype(dtype).itemsize == 2  # see `layer_norm`
        self.norm = nnx.GroupNorm(width, GROUPS, epsilon=1e-5, use_fast_variance=fast, rngs=rngs)

    def __call__(self, x: Float[Array, "b h w _"]) -> Float[Array, "b h w c"]:
        def normalized(x):
            return self.norm(x).astype(self.conv.dtype)

        if jnp.dtype(self.conv.dtype).itemsize == 2:
            # The norm is float32 and so twice as large: the backward pass computes it anew.
            normalized = jax.checkpoint(normalized)
        return normalized(self.conv(x))


class Layer(nnx.Module):
    """Deformable attention and MLP, each with a residual and a LayerNorm."""

    def __init__(
        self,
        channels: int,
        heads: int,
        ffn: int,
        points: int,
        *,
        published_init: bool,
        dtype: str,
        rngs: nnx.Rngs,
    ):
        linear = partial(
            Linear, kernel_init=kernel_init(published_init), dtype=jnp.dtype(dtype), rngs=rngs
        )
        self.self_attn = DeformableAttention(
            channels, heads, LEVELS, points, published_init=published_init, dtype=dtype, rngs=rngs
        )
        self.norm1 = layer_norm(channels, dtype, rngs)
        self.linear1 = linear(channels, ffn)
        self.linear2 = linear(ffn, channels)
        self.norm2 = layer_norm(channels, dtype, rngs)

    def __call__(
        self, x: Float[Array, "b n c"], positions: Float[Array, "n c"], shapes: Shapes
    ) -> Float[Array, "b n c"]:
        return self.widen(self.attend_points(x, positions, shapes))

    def attend_points(
        self, x: Float[Array, "b n c"], positions: Float[Array, "n c"], shapes: Shapes
    ) -> Float[Array, "b n c"]:
        """The first half, deformable attention."""
        dtype = x.dtype
        x = row_major(x)
        return self.norm1(x + self.self_attn(x, positions, shapes)).astype(dtype)

    def widen(self, x: Float[Array, "b n c"]) -> Float[Array, "b n c"]:
        """The second half, the MLP."""
        return self.norm2(x + self.linear2(relu(self.linear1(x)))).astype(x.dtype)


class PixelDecoder(nnx.Module):
    """Four feature maps to mask features, and to three levels that the queries attend to."""

    def __init__(
        self,
        channels: Sequence[int],
        hidden: int,
        heads: int,
        layers: int,
        ffn: int,
        points: int,
        *,
        published_init: bool = True,
        unroll: bool = False,
        layer: Callable[..., nnx.Module] = Layer,
        dtype: str,
        rngs: nnx.Rngs,
    ):
        """Args:
        channels: of the four feature maps, finest first.
        hidden: c, channels inside and of everything returned; a multiple of 32.
        heads: of the deformable attention.
        layers: of the deformable attention.
        ffn: channels inside a layer's MLP.
        points: read by each head on each level.
        published_init: as in `Mask2FormerConfig`.
        unroll: compile each layer by itself; see `stacking.Stack`.
        layer: builds one as `Layer` is built; it is called as that, with what `attend` gets more.
        dtype: compute dtype.
        rngs: initialises the parameters.
        """
        fine, *coarse = channels
        norm = partial(ConvNorm, published_init=published_init, dtype=dtype, rngs=rngs)
        self.input_proj = nnx.List([norm(c, hidden, 1, use_bias=True) for c in reversed(coarse)])
        self.level_embed = nnx.Param(jax.random.normal(rngs.params(), (LEVELS, hidden)))

        def make(rngs, _):
            return layer(
                hidden, heads, ffn, points, published_init=published_init, dtype=dtype, rngs=rngs
            )

        self.layers = Stack(make, layers, (), remat=False, unroll=unroll, rngs=rngs)
        self.adapter_1 = norm(fine, hidden, 1, use_bias=False)
        self.layer_1 = norm(hidden, hidden, 3, use_bias=False)
        self.mask_features = Linear(
            hidden,
            hidden,
            kernel_init=kernel_init(published_init),
            dtype=jnp.dtype(dtype),
            rngs=rngs,
        )

    def __call__(
        self, features: tuple[Float[Array, "b _ _ _"], ...], *more: Any
    ) -> tuple[Float[Array, "b h w c"], tuple[Float[Array, "b _ _ c"], ...]]:
        """Mask features of the finest map's size and three levels, coarsest first.

        The features are four maps, finest first; `attend` gets what is given more.
        """
        fine, *coarse = features
        levels = [project(x) for project, x in zip(self.input_proj, reversed(coarse), strict=True)]
        shapes = [(x.shape[1], x.shape[2]) for x in levels]

        def flat(xs):
            return jnp.concatenate([x.reshape(*x.shape[:-3], -1, x.shape[-1]) for x in xs], axis=-2)

        c = self.level_embed.shape[-1]
        embeds = zip(shapes, self.level_embed[...], strict=True)
        positions = flat([sine_positions(*shape, c) + embed for shape, embed in embeds])
        tokens = self.attend(flat(levels), positions, shapes, *more)
        ends = np.cumsum([h * w for h, w in shapes])[:-1]
        levels = [
            x.reshape(-1, *shape, x.shape[-1])
            for x, shape in zip(jnp.split(tokens, ends, axis=1), shapes, strict=True)
        ]
        finest = self.adapter_1(fine)
        level = resize_scores(levels[-1], (finest.shape[1], finest.shape[2]))
        joined = finest + level.astype(finest.dtype)
        return self.mask_features(relu(self.layer_1(joined))), tuple(levels)

    def attend(
        self, tokens: Float[Array, "b n c"], positions: Float[Array, "n c"], shapes: Shapes, *more
    ) -> Float[Array, "b n c"]:
        """The tokens of all levels after all layers."""
        (tokens,) = self.layers(tokens, None, positions, shapes, *more).values()
        return tokens


def sine_positions(height: int, width: int, channels: int) -> np.ndarray:
    """Sines and cosines of a pixel's row and column, float32 [h, w, c].

    Rows fill the first half of the channels, columns the second; pixel centres count from 1 and the
    last is 2 pi (DETR, normalised).
    """
    half = channels // 2
    periods = 10_000.0 ** (2 * (np.arange(half) // 2) / half)
    y, x = (np.arange(1, side + 1) / (side + 1e-6) * (2 * math.pi) for side in (height, width))
    waves = []
    for angle in (y[:, None, None] / periods, x[None, :, None] / periods):
        wave = np.where(np.arange(half) % 2, np.cos(angle), np.sin(angle))
        waves.append(np.broadcast_to(wave, (height, width, half)))
    return np.concatenate(waves, axis=-1).astype(np.float32)
