"""MGRNet: class scores of the whole image at low resolution, refined in windows at the full one.

It follows tpy001/VFMSeg (`VFMHead`, `MaskTransformerDecoder`, `MsVFMEncoderDecoder`). The coarse
scores are those of `upscaling`. In training the encoder sees two views of a crop, the whole at half
its size and a window of half its sides. The coarse scores of that window, without a gradient, are
context for the refinement of its features. In inference the coarse pass sees the whole image,
squashed to one size, and windows are refined where few pixels of it are certain.

Different from it: each crop draws a window of its own, where the authors draw one for the batch.
Losses are means over labelled pixels; a window counts on average a quarter of its crop's. Heads
attend in the encoder's precision.
"""

from collections.abc import Sequence
import dataclasses
from functools import partial
from typing import Any, NamedTuple

from flax import nnx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int32, Key, Shaped, UInt8
import numpy as np

from jaxdg import backbones
from jaxdg.backbones.attention import attention
from jaxdg.backbones.layers import TORCH, Conv, Linear, dropout
from jaxdg.evaluation.sliding_window import resize_scores, sliding_window
from jaxdg.ranges import Count, PositiveOrZero, Share, Size
from jaxdg.segmentation.decoder import Decoder, DecoderConfig, DecoderOptions
from jaxdg.segmentation.linear import IGNORE, drop_channels
from jaxdg.segmentation.upscaling import GROUPS, UpscalingConfig, UpscalingHead, group_norm

DROPOUT = 0.1  # inside the blocks
STEP = 32  # pixels between the places that a training window may have


@dataclasses.dataclass(unsafe_hash=True, kw_only=True)
class MgrnetOptions(DecoderOptions):
    """Sizes of MGRNet; the defaults are the authors'.

    The encoder sees squares of half the sides of `data.crop`: with crops of 1024x1024 the coarse
    view and the windows have 512x512 pixels.

    Attributes:
        width: of the decoder that gives the coarse scores, see `model.upscaling`. Default 1024.
        hidden: channels of the refinement, a multiple of 128. Default 256.
        layers: of the refinement. Default 3.
        heads: of its attention. Default 8.
        head_channels: of each head. Default 64.
        masked: share of the tokens of a window that training hides from the refinement. Default
            0.2.
        refinement_weight: of its loss beside that of the coarse scores. Default 1.
        whole: height and width, in windows, that inference squashes the whole image to for the
            coarse pass. Default 1x2.
        certain: probability of its class above which a pixel counts as certain. Default 0.968.
        certain_share: windows with a smaller share of certain pixels are refined. Default 0.8.
    """

    width: Count = 1024
    hidden: Count = 256
    layers: Count = 3
    heads: Count = 8
    head_channels: Count = 64
    masked: Share = 0.2
    refinement_weight: PositiveOrZero = 1.0
    whole: Size = (1, 2)
    certain: Share = 0.968
    certain_share: Share = 0.8

    def window(self, crop: tuple[int, int]) -> tuple[int, int]:
        """See `DecoderOptions.window`."""
        h, w = crop
        if h != w or h % 4:
            raise ValueError(
                f"data.crop is {h}x{w}; allowed with model.decoder mgrnet: squares whose sides are"
                " multiples of 4, of which the encoder sees a quarter at once"
            )
        return h // 2, w // 2

    def config(self, classes: Sequence[str], dtype: str) -> "MgrnetConfig":
        """See `DecoderOptions.config`."""
        return MgrnetConfig(num_classes=len(classes), dtype=dtype, **vars(self))


@dataclasses.dataclass(unsafe_hash=True)
class MgrnetConfig(MgrnetOptions, DecoderConfig):
    """The head of MGRNet: the fields of `MgrnetOptions`, and these of the run.

    Attributes:
        num_classes: k.
        dtype: compute dtype; normalisation and scores are float32.
        image_size: height and width in pixels of what the encoder sees.
    """

    name = "mgrnet"
    joins = True

    num_classes: int
    dtype: str = dataclasses.field(default="float32", kw_only=True)
    image_size: Size = dataclasses.field(default=(512, 512), kw_only=True)

    def sized(self, image_size: tuple[int, int]) -> "MgrnetConfig":
        """See `DecoderConfig.sized`."""
        return dataclasses.replace(self, image_size=image_size)

    def build(self, channels: Sequence[int], *, encoder: str, rngs: nnx.Rngs) -> "MgrnetHead":
        """See `DecoderConfig.build`."""
        return MgrnetHead(self, channels, rngs=rngs)


class MgrnetOutput(NamedTuple):
    """The class scores of crops in training.

    Attributes:
        coarse: of the whole crop, four for each feature along each side.
        refined: of a window of the crop, at the resolution of the features.
        starts: first row and column of the window in its crop, in pixels.
    """

    coarse: Float[Array, "b h4 w4 k"]
    refined: Float[Array, "b h w k"]
    starts: Int32[Array, "b 2"]


class MgrnetHead(Decoder):
    """Feature maps of one size to coarse class scores and, with these, to refined ones."""

    views = 2

    def __init__(self, config: MgrnetConfig, channels: Sequence[int], *, rngs: nnx.Rngs):
        """Builds the head with random parameters.

        Args:
            config: sizes.
            channels: of each feature map.
            rngs: initialises the parameters.

        Raises:
            ValueError: the groups of a normalisation do not divide its channels.
        """
        self.config = c = config
        for field, number in (("width", GROUPS), ("hidden", 4 * GROUPS)):
            if getattr(c, field) % number:
                raise ValueError(
                    f"model.mgrnet.{field} is {getattr(c, field)}; allowed: multiples of {number},"
                    " for the groups of its normalisation"
                )
        coarse = UpscalingConfig(num_classes=c.num_classes, width=c.width, dtype=c.dtype)
        self.coarse = UpscalingHead(coarse, channels, rngs=rngs)
        self.refinement = Refinement(c, channels, rngs=rngs)

    def view(
        self, images: Float[Array, "b h w c"], key: Key[Array, ""]
    ) -> Float[Array, "n h2 w2 c"]:
        """See `Decoder.view`: the whole crop at half its size, and a window of half its sides."""
        size = self.config.image_size
        starts = window_starts(key, len(images), size)
        # Stacked so, both views of a crop stay on its device.
        views = jnp.stack([resize_scores(images, size), cut(images, starts, size)], axis=1)
        return views.reshape(-1, *size, images.shape[-1])

    def __call__(
        self,
        features: tuple[Float[Array, "b h w _"], ...],
        key: Key[Array, ""] | None = None,
        train: bool = False,
    ) -> Any:
        """Class scores (logits), float32: the coarse ones, or with a key a `MgrnetOutput`.

        Args:
            features: maps of one size, in the order of the taps; with a key those of both views.
            key: random key of `view`, that turns dropout and the hiding of tokens on.
            train: see `UpscalingHead`.
        """
        if key is None:
            return self.coarse(features, None, train)
        h, w = self.config.image_size
        pairs = [x.reshape(-1, 2, *x.shape[1:]) for x in features]
        coarse_key, key_of_blocks = jax.random.split(jax.random.fold_in(key, 1))
        coarse = self.coarse(tuple(x[:, 0] for x in pairs), coarse_key, train)
        starts = window_starts(key, len(coarse), (h, w))
        whole = resize_scores(jax.lax.stop_gradient(coarse), (h, w))
        context = cut(whole, starts // 2, (h // 2, w // 2))
        refined = self.refinement(tuple(x[:, 1] for x in pairs), context, key_of_blocks)
        return MgrnetOutput(coarse, refined, starts)

    def scores(
        self, output: Float[Array, "b h w k"], size: tuple[int, int]
    ) -> Float[Array, "b H W k"]:
        """The coarse class scores at an image size; `image_scores` gives refined ones."""
        return resize_scores(output, size)

    def image_scores(
        self,
        model: Any,
        images: Float[Array, "b h w c"],
        window: tuple[int, int],
        stride: tuple[int, int],
        windows_per_call: int | None = None,
        sizes: Int32[Array, "b 2"] | None = None,
    ) -> Float[Array, "b h w k"]:
        """See `Decoder.image_scores`: coarse scores, and refined ones in windows that need them."""
        c = self.config
        b, h, w, channels = images.shape

        def of_each(size: Sequence[int]) -> Int32[Array, "b 2"]:
            return jnp.broadcast_to(jnp.array(size, jnp.int32), (b, 2))

        own = of_each((h, w)) if sizes is None else sizes
        squashed = (c.whole[0] * c.image_size[0], c.whole[1] * c.image_size[1])
        given = resize_scores(images, squashed, (own, of_each(squashed)))
        with jax.named_scope("encoder"):
            features = backbones.at_size(model.backbone, squashed)(given)
        with jax.named_scope("decoder"):
            coarse = self.coarse(tuple(features[i] for i in model.read))
            coarse = resize_scores(coarse, (h, w), (of_each(coarse.shape[1:3]), own))

        def uncertain(starts):
            return share_inside(certain(coarse, c.certain), own, starts, window) < c.certain_share

        def change(windows):
            """What the refinement changes about the coarse scores, which come with the pixels."""
            pixels, context = jnp.split(windows, [channels], axis=-1)
            features = model.encode(pixels)
            with jax.named_scope("decoder"):
                refined = self.refinement(tuple(features[i] for i in model.read), context)
                return resize_scores(refined, window) - context

        together = jnp.concatenate([images, coarse], axis=-1)
        return coarse + sliding_window(
            change, together, window, stride, windows_per_call, sizes, uncertain
        )

    def loss_denominator(self, label: UInt8[Array, "b H W"]) -> dict[str, Float[Array, ""]]:
        """The labelled pixels of the coarse views, and a quarter of those of the crops: so many
        are on average in the windows, which are not drawn yet.
        """
        labelled = jnp.sum(label != IGNORE).astype(jnp.float32)
        return {
            "coarse": self.coarse.loss_denominator(label[:, ::2, ::2]),
            "refined": jnp.maximum(labelled / 4, 1),
        }

    def loss(
        self,
        output: MgrnetOutput,
        label: UInt8[Array, "b H W"],
        denominator: dict[str, Float[Array, ""]],
        key: Key[Array, ""] | None = None,
    ) -> dict[str, Float[Array, ""]]:
        """Cross entropy of both views; `key` is not used: all is drawn."""
        inside = cut(label[..., None], output.starts, self.config.image_size)[..., 0]
        terms = self.coarse.loss(output.coarse, label[:, ::2, ::2], denominator["coarse"])
        refined = self.coarse.loss(output.refined, inside, denominator["refined"])
        weight = self.config.refinement_weight
        return {**terms, "refinement": weight * refined["cross_entropy"]}


def window_starts(key: Key[Array, ""], crops: int, size: tuple[int, int]) -> Int32[Array, "b 2"]:
    """First rows and columns of windows of `size`, one in each crop of twice its sides."""
    places = np.maximum((np.array(size) + 1) // STEP, 1)
    return STEP * jax.random.randint(jax.random.fold_in(key, 0), (crops, 2), 0, places)


def cut(
    images: Shaped[Array, "b h w c"], starts: Int32[Array, "b 2"], size: tuple[int, int]
) -> Any:
    """A window of each image."""

    def window(image, start):
        at = (start[0], start[1], 0)
        return jax.lax.dynamic_slice(image, at, (*size, image.shape[-1]))

    return jax.vmap(window)(images, starts)


def certain(scores: Float[Array, "b h w k"], probability: float) -> Bool[Array, "b h w"]:
    """Whether the class of a pixel is more probable than that."""
    return jnp.max(jax.nn.softmax(scores), axis=-1) > probability


def share_inside(
    pixels: Bool[Array, "b h w"],
    sizes: Int32[Array, "b 2"],
    starts: Int32[Array, "b m 2"],
    window: tuple[int, int],
) -> Float[Array, "b m"]:
    """The share of the pixels of windows for which something holds, in each image.

    Args:
        pixels: where it holds.
        sizes: of the images, whatever lies below and right of them being padding.
        starts: first rows and columns of the windows, which leave an image only where it is
            smaller.
        window: height and width of a window.
    """
    _, h, w = pixels.shape
    inside = (jnp.arange(h)[:, None] < sizes[:, 0, None, None]) & (
        jnp.arange(w) < sizes[:, 1, None, None]
    )
    # The number of such pixels above and left of each corner: four corners tell a window's.
    table = (pixels & inside).astype(jnp.int32).cumsum(axis=1).cumsum(axis=2)
    table = jnp.pad(table, ((0, 0), (1, 0), (1, 0)))
    top, left = starts[..., 0], starts[..., 1]
    bottom = jnp.minimum(top + window[0], sizes[:, :1])
    right = jnp.minimum(left + window[1], sizes[:, 1:])
    read = jax.vmap(lambda table, y, x: table[y, x])
    number = read(table, bottom, right) - read(table, top, right)
    number += read(table, top, left) - read(table, bottom, left)
    return number / ((bottom - top) * (right - left))


class Refinement(nnx.Module):
    """Tokens of a window attend to each other and to those of its coarse class scores."""

    def __init__(self, config: MgrnetConfig, channels: Sequence[int], *, rngs: nnx.Rngs):
        self.config = c = config
        self.dtype = dtype = jnp.dtype(c.dtype)
        n = c.hidden
        conv = partial(Conv, kernel_init=TORCH, padding="VALID", dtype=dtype, rngs=rngs)
        halve = partial(conv, kernel_size=(2, 2), strides=(2, 2))
        norm = partial(group_norm, rngs=rngs)
        self.fuse = Linear(sum(channels), n, kernel_init=TORCH, dtype=dtype, rngs=rngs)
        self.fuse_norm = norm(n)
        self.embed1 = halve(c.num_classes, n // 4)
        self.embed1_norm = norm(n // 4)
        self.embed2 = halve(n // 4, n // 2)
        self.embed2_norm = norm(n // 2)
        self.embed3 = Linear(n // 2, n, kernel_init=TORCH, dtype=dtype, rngs=rngs)
        self.embed3_norm = norm(n)
        self.mask_token = nnx.Param(nnx.initializers.normal(1.0)(rngs.params(), (n,)))
        self.norm = norm(n, epsilon=1e-6)
        self.blocks = nnx.List([Block(c, rngs=rngs) for _ in range(c.layers)])
        self.classifier = Linear(
            n,
            c.num_classes,
            kernel_init=nnx.initializers.normal(0.01),
            dtype=dtype,
            rngs=rngs,
        )

    def __call__(
        self,
        features: tuple[Float[Array, "b h w _"], ...],
        context: Float[Array, "b _ _ k"],
        key: Key[Array, ""] | None = None,
    ) -> Float[Array, "b h w k"]:
        """Class scores (logits) at the resolution of the features, float32.

        Args:
            features: maps of one size, in the order of the taps.
            context: coarse class scores of the same windows, of any size.
            key: random key that turns dropout and the hiding of tokens on.
        """
        x = self.fuse_norm(self.fuse(jnp.concatenate(features, axis=-1)))
        x = gelu(x)
        b, h, w, c = x.shape
        hide_key, channel_key, *keys = (
            [None] * (2 + len(self.blocks))
            if key is None
            else jax.random.split(key, 2 + len(self.blocks))
        )
        if hide_key is not None:
            hidden = jax.random.bernoulli(hide_key, self.config.masked, (b, h, w, 1))
            x = jnp.where(hidden, self.mask_token[...], x)
        context = self.embed(resize_scores(context, (4 * h, 4 * w))).reshape(b, h * w, c)
        x = self.norm(x).astype(self.dtype).reshape(b, h * w, c)
        for block, block_key in zip(self.blocks, keys, strict=True):
            x = block(x, context, block_key)
        x = drop_channels(x.reshape(b, h, w, c), channel_key)
        return self.classifier(x).astype(jnp.float32)

    def embed(self, scores: Float[Array, "b h4 w4 k"]) -> Float[Array, "b h w c"]:
        """Class scores, four a token along each side, to a token."""
        x = gelu(self.embed1_norm(self.embed1(scores)))
        x = gelu(self.embed2_norm(self.embed2(x)))
        return self.embed3_norm(self.embed3(x)).astype(self.dtype)


class Block(nnx.Module):
    """Self-attention, attention to the context, and a gated MLP, each with a residual."""

    def __init__(self, config: MgrnetConfig, *, rngs: nnx.Rngs):
        c = config.hidden
        norm = partial(nnx.LayerNorm, c, epsilon=1e-5, use_fast_variance=False, rngs=rngs)
        linear = partial(Linear, kernel_init=TORCH, dtype=jnp.dtype(config.dtype), rngs=rngs)
        self.norm1 = norm()
        self.attn1 = Attention(config, rngs=rngs)
        self.norm2 = norm()
        self.attn2 = Attention(config, rngs=rngs)
        self.norm3 = norm()
        self.fc1 = linear(c, 8 * c)
        self.fc2 = linear(4 * c, c)

    def __call__(
        self,
        x: Float[Array, "b n c"],
        context: Float[Array, "b m c"],
        key: Key[Array, ""] | None,
    ) -> Float[Array, "b n c"]:
        """Tokens to tokens; a key turns dropout on."""
        keys = (None,) * 3 if key is None else jax.random.split(key, 3)
        y = self.norm1(x)
        x = x + dropout(self.attn1(y, y), keys[0], DROPOUT)
        x = x + dropout(self.attn2(self.norm2(x), context), keys[1], DROPOUT)
        value, gate = jnp.split(self.fc1(self.norm3(x)), 2, axis=-1)
        return x + self.fc2(dropout(value * gelu(gate), keys[2], DROPOUT))


class Attention(nnx.Module):
    """Multi-head attention whose heads are as wide as one likes."""

    def __init__(self, config: MgrnetConfig, *, rngs: nnx.Rngs):
        linear = partial(Linear, kernel_init=TORCH, dtype=jnp.dtype(config.dtype), rngs=rngs)
        inner = config.heads * config.head_channels
        self.heads = config.heads
        self.to_q = linear(config.hidden, inner, use_bias=False)
        self.to_k = linear(config.hidden, inner, use_bias=False)
        self.to_v = linear(config.hidden, inner, use_bias=False)
        self.to_out = linear(inner, config.hidden)

    def __call__(
        self, x: Float[Array, "b n c"], context: Float[Array, "b m c"]
    ) -> Float[Array, "b n c"]:
        def heads(y):
            return y.reshape(*y.shape[:2], self.heads, -1)

        y = attention(heads(self.to_q(x)), heads(self.to_k(context)), heads(self.to_v(context)))
        return self.to_out(y.reshape(*y.shape[:2], -1))


def gelu(x: Float[Array, "*n"]) -> Float[Array, "*n"]:
    """The exact GELU."""
    return jax.nn.gelu(x, approximate=False)
