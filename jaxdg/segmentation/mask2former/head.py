"""Mask2Former (Cheng et al. 2022, arXiv 2112.01527): queries refine masks layer by layer.

In each layer a query attends only to where its last mask was. Parameter names and results follow
facebookresearch/Mask2Former. Different from it: attention masks are coarse, so they are computed
from resized mask features. Resizing is linear, so they are the same up to rounding, and inference
computes full masks only for the last layer.
"""

from collections.abc import Callable, Iterator, Sequence
import dataclasses
from functools import partial

from flax import nnx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Float32, Key, UInt8
import numpy as np

from jaxdg.backbones.attention import attention
from jaxdg.backbones.layers import Linear, spread
from jaxdg.evaluation.sliding_window import resize_scores
from jaxdg.ranges import Count
from jaxdg.segmentation.decoder import Decoder, DecoderConfig, DecoderOptions
from jaxdg.segmentation.mask2former.deformable_attention import kernel_init
from jaxdg.segmentation.mask2former.layers import layer_norm, relu
from jaxdg.segmentation.mask2former.losses import (
    LossDenominator,
    mask2former_loss,
    mask2former_loss_denominator,
    mask_logits,
)
from jaxdg.segmentation.mask2former.pixel_decoder import (
    GROUPS,
    LEVELS,
    PixelDecoder,
    sine_positions,
)

# Positions of queries, and their first features or None for the head's own; each for all images or
# for every one.
Queries = tuple[Float[Array, "*images q c"], Float[Array, "*batch q c"] | None]


@dataclasses.dataclass(unsafe_hash=True, kw_only=True)
class MaskDecoderOptions(DecoderOptions):
    """What a decoder by Mask2Former's layers may set, whatever its queries are.

    Attributes:
        hidden: channels of everything inside; a multiple of 32 and of `heads`. Default 256.
        heads: of all attention. Default 8.
        pixel_layers: of deformable attention in the pixel decoder. Default 6.
        pixel_ffn: channels inside their MLPs. Default 1024.
        layers: of the transformer decoder; there is one prediction more. Default 9.
        ffn: channels inside their MLPs. Default 2048.
        sampling_points: read by a head of the deformable attention on each level. Default 4.
        points: at which matching and losses compare masks. Default 12544.
        published_init: initialise as the authors' code: most kernels by Xavier, sampling points in
            the eight directions of a compass. False: all uniform within 1 / sqrt(fan_in), torch's
            default. Default True.
        unroll: compile each layer of the pixel decoder by itself. It takes longer to compile; a GPU
            then moves less memory in a step. Default False.
    """

    hidden: Count = 256
    heads: Count = 8
    pixel_layers: Count = 6
    pixel_ffn: Count = 1024
    layers: Count = 9
    ffn: Count = 2048
    sampling_points: Count = 4
    points: Count = 12544
    published_init: bool = True
    unroll: bool = False


@dataclasses.dataclass(unsafe_hash=True, kw_only=True)
class Mask2FormerOptions(MaskDecoderOptions):
    """Sizes of the Mask2Former decoder; the defaults are VLTSeg's.

    Attributes:
        queries: masks predicted for an image; at least the number of classes. Default 100.
    """

    queries: Count = 100

    def config(self, classes: Sequence[str], dtype: str) -> "Mask2FormerConfig":
        """See `DecoderOptions.config`."""
        k = len(classes)
        if self.queries < k:
            raise ValueError(
                f"model.mask2former.queries is {self.queries}; allowed: at least one for each of"
                f" the {k} classes"
            )
        return Mask2FormerConfig(num_classes=k, dtype=dtype, **vars(self))


@dataclasses.dataclass(unsafe_hash=True)
class Mask2FormerConfig(Mask2FormerOptions, DecoderConfig):
    """A Mask2Former head: the fields of `Mask2FormerOptions`, and these of the run.

    Attributes:
        num_classes: k.
        dtype: compute dtype; predictions are float32.
    """

    num_classes: int
    dtype: str = dataclasses.field(default="float32", kw_only=True)

    name = "mask2former"
    needs_levels = True

    def build(self, channels: Sequence[int], *, encoder: str, rngs: nnx.Rngs) -> "Mask2Former":
        """See `DecoderConfig.build`."""
        return Mask2Former(self, channels, rngs=rngs)


class Attention(nnx.Module):
    """Multi-head attention whose three input projections are one parameter, as torch's."""

    def __init__(self, config: Mask2FormerConfig, *, rngs: nnx.Rngs):
        c = config.hidden
        init = kernel_init(config.published_init)
        linear = partial(Linear, kernel_init=init, dtype=jnp.dtype(config.dtype), rngs=rngs)
        self.heads = config.heads
        self.dtype = jnp.dtype(config.dtype)
        self.in_proj = linear(c, 3 * c)
        self.out_proj = linear(c, c)

    def __call__(
        self,
        queries: Float[Array, "b q c"],
        keys: Float[Array, "b n c"],
        values: Float[Array, "b n c"],
        mask: Bool[Array, "b q n"] | None = None,
    ) -> Float[Array, "b q c"]:
        """`mask` is true where a query may look."""
        kernels = jnp.split(self.in_proj.kernel[...], 3, axis=1)
        assert self.in_proj.bias is not None
        biases = jnp.split(self.in_proj.bias[...], 3)

        def project(x, kernel, bias):
            y = x.astype(self.dtype) @ kernel.astype(self.dtype)
            return y + spread(bias, y)

        q, k, v = (
            project(x, *p) for x, *p in zip((queries, keys, values), kernels, biases, strict=True)
        )
        q, k, v = (x.reshape(*x.shape[:2], self.heads, -1) for x in (q, k, v))
        return self.out_proj(attention(q, k, v, mask).reshape(queries.shape))


class Layer(nnx.Module):
    """Masked cross-attention, self-attention and MLP, each with a residual and a LayerNorm."""

    def __init__(self, config: Mask2FormerConfig, *, rngs: nnx.Rngs):
        c = config.hidden
        init = kernel_init(config.published_init)
        linear = partial(Linear, kernel_init=init, dtype=jnp.dtype(config.dtype), rngs=rngs)
        self.cross_attn = Attention(config, rngs=rngs)
        self.cross_norm = layer_norm(c, config.dtype, rngs)
        self.self_attn = Attention(config, rngs=rngs)
        self.self_norm = layer_norm(c, config.dtype, rngs)
        self.linear1 = linear(c, config.ffn)
        self.linear2 = linear(config.ffn, c)
        self.ffn_norm = layer_norm(c, config.dtype, rngs)

    def __call__(
        self,
        x: Float[Array, "b q c"],
        query_positions: Float[Array, "*images q c"],
        memory: Float[Array, "b n c"],
        positions: Float[np.ndarray, "n c"],
        mask: Bool[Array, "b q n"],
    ) -> Float[Array, "b q c"]:
        x = self.cross_norm(
            x + self.cross_attn(x + query_positions, memory + positions, memory, mask)
        )
        x = self.self_norm(x + self.self_attn(x + query_positions, x + query_positions, x))
        return self.ffn_norm(x + self.linear2(relu(self.linear1(x))))


class MaskEmbed(nnx.Module):
    """The three-layer MLP whose output for a query, times the mask features, is its mask."""

    def __init__(self, config: Mask2FormerConfig, *, rngs: nnx.Rngs):
        c = config.hidden
        linear = partial(
            Linear,
            kernel_init=kernel_init(published=False),
            dtype=jnp.dtype(config.dtype),
            rngs=rngs,
        )
        self.layers = nnx.List([linear(c, c) for _ in range(3)])

    def __call__(self, x: Float[Array, "b q c"]) -> Float[Array, "b q c"]:
        first, second, last = self.layers
        return last(relu(second(relu(first(x)))))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Predictions:
    """What the queries predict, once before the first layer and once after each.

    `class_logits, mask_logits = predictions` computes the masks. Training and inference need few of
    them, so the head itself leaves them as factors.

    Attributes:
        class_logits: of each prediction l; the last class is "no object".
        mask_embeds: their products with `mask_features` are the mask logits.
        mask_features: of the finest feature map's size.
    """

    class_logits: Float32[Array, "l b q k1"]
    mask_embeds: Float[Array, "l b q c"]
    mask_features: Float[Array, "b h w c"]

    def __iter__(self) -> Iterator[Array]:
        """Yields the class logits, then the mask logits [l, b, q, h, w]; both are float32."""
        yield self.class_logits
        yield mask_logits(self.mask_embeds, self.mask_features)


class Mask2Former(Decoder):
    """Four feature maps to a class and a mask for every query, at first and after each layer."""

    def __init__(
        self,
        config: Mask2FormerConfig,
        channels: Sequence[int],
        *,
        pixel_decoder: Callable[..., PixelDecoder] = PixelDecoder,
        rngs: nnx.Rngs,
    ):
        """Builds the head with random parameters.

        Args:
            config: sizes.
            channels: of the four feature maps, finest first.
            pixel_decoder: builds it as `PixelDecoder` is built.
            rngs: initialises the parameters.

        Raises:
            ValueError: sizes that do not fit together.
        """
        c = config
        if len(channels) != LEVELS + 1:
            raise ValueError(
                f"Mask2Former reads four feature maps, finest first; got channels {tuple(channels)}"
            )
        if c.hidden % GROUPS or c.hidden % c.heads:
            raise ValueError(
                f"hidden is {c.hidden}; allowed: multiples of {GROUPS} (groups of its norms) and of"
                f" heads, {c.heads}"
            )
        self.config = config
        self.pixel_decoder = pixel_decoder(
            channels,
            c.hidden,
            c.heads,
            c.pixel_layers,
            c.pixel_ffn,
            c.sampling_points,
            published_init=c.published_init,
            unroll=c.unroll,
            dtype=c.dtype,
            rngs=rngs,
        )

        def normal(n):
            return nnx.Param(jax.random.normal(rngs.params(), (n, c.hidden)))

        self.query_feat = normal(c.queries)
        self.query_embed = normal(c.queries)
        self.level_embed = normal(LEVELS)
        self.layers = nnx.List([Layer(c, rngs=rngs) for _ in range(c.layers)])
        self.decoder_norm = layer_norm(c.hidden, c.dtype, rngs)
        self.class_embed = Linear(
            c.hidden,
            c.num_classes + 1,
            kernel_init=kernel_init(published=False),
            dtype=jnp.dtype(c.dtype),
            rngs=rngs,
        )
        self.mask_embed = MaskEmbed(c, rngs=rngs)

    def __call__(
        self,
        features: tuple[Float[Array, "b _ _ _"], ...],
        key: Key[Array, ""] | None = None,
        train: bool = False,
        queries: Queries | None = None,
    ) -> Predictions:
        """Predicts classes, and masks of the finest map's size.

        Args:
            features: four maps, finest first.
            key: not used: nothing is random.
            train: not used: nothing differs in training.
            queries: their positions and first features, for all images or for each; None where
                they are the head's own parameters.
        """
        with jax.named_scope("pixel_decoder"):
            maps = self.pixel_decoder(features)
        return self.decode(*maps, queries=queries)

    def without_queries(self, *, features: bool) -> None:
        """Removes the queries' own positions, and their first features too, as others are given.

        Parameters that nothing reads would only decay.
        """
        del self.query_embed
        if features:
            del self.query_feat

    def decode(
        self,
        mask_features: Float[Array, "b h w c"],
        levels: tuple[Float[Array, "b _ _ c"], ...],
        attention_masks: Sequence[Bool[Array, "b q _"]] | None = None,
        queries: Queries | None = None,
    ) -> Predictions:
        """The transformer decoder.

        Args:
            mask_features: their products with the queries are the masks.
            levels: three, coarsest first.
            attention_masks: for each layer, to replace those of the predicted masks in comparisons.
            queries: see `__call__`.
        """
        b, _, _, c = mask_features.shape
        shapes = [(level.shape[1], level.shape[2]) for level in levels]
        memories = [
            x + spread(embed, x)
            for x, embed in zip(
                [x.reshape(b, -1, c) for x in levels], self.level_embed[...], strict=True
            )
        ]
        positions = [sine_positions(h, w, c).reshape(-1, c) for h, w in shapes]
        coarse = [
            resize_scores(jax.lax.stop_gradient(mask_features), shape).reshape(b, -1, c)
            for shape in shapes
        ]
        query_positions, first = queries or (self.query_embed[...], None)
        first = self.query_feat[...] if first is None else first
        x = jnp.broadcast_to(first, (b, *first.shape[-2:]))
        normed = self.decoder_norm(x)
        outputs = [normed]
        embeds = [self.mask_embed(normed)]
        for i, layer in enumerate(self.layers):
            level = i % LEVELS
            mask = (
                attended_pixels(jax.lax.stop_gradient(embeds[-1]), coarse[level])
                if attention_masks is None
                else attention_masks[i]
            )
            x = layer(x, query_positions, memories[level], positions[level], mask)
            normed = self.decoder_norm(x)
            outputs.append(normed)
            embeds.append(self.mask_embed(normed))
        class_logits = self.class_embed(jnp.stack(outputs)).astype(jnp.float32)
        return Predictions(class_logits, jnp.stack(embeds), mask_features)

    def scores(self, output: Predictions, size: tuple[int, int]) -> Float32[Array, "b H W k"]:
        """Class scores at an image size: the last masks, weighted by their class probabilities."""
        masks = mask_logits(output.mask_embeds[-1], output.mask_features)
        masks = jax.nn.sigmoid(resize_scores(jnp.moveaxis(masks, 1, -1), size))
        classes = jax.nn.softmax(output.class_logits[-1])[..., :-1]
        return jnp.einsum("bqk,bhwq->bhwk", classes, masks)

    def probabilities(self, scores: Float[Array, "b h w k"]) -> Float32[Array, "b h w k"]:
        """Class scores as probabilities: their shares of the sum over the classes.

        The scores add up what every query claims of a pixel, so they are at least 0 and no logits.
        A pixel that no query claims has equal shares.
        """
        scores = scores.astype(jnp.float32)
        total = scores.sum(axis=-1, keepdims=True)
        return jnp.where(total > 0, scores / total, 1 / scores.shape[-1])

    def loss_denominator(self, label: UInt8[Array, "b H W"]) -> LossDenominator:
        """What the loss terms are divided by, from the labels of the global batch."""
        return mask2former_loss_denominator(label, self.config.num_classes, self.config.queries)

    def loss(
        self,
        output: Predictions,
        label: UInt8[Array, "b H W"],
        denominator: LossDenominator,
        key: Key[Array, ""],
    ) -> dict[str, Float[Array, ""]]:
        """Class, mask and dice loss of all predictions; see `mask2former_loss`."""
        return mask2former_loss(
            output.class_logits,
            output.mask_embeds,
            output.mask_features,
            label,
            denominator,
            key,
            points=self.config.points,
        )


def attended_pixels(
    embed: Float[Array, "b q c"], coarse: Float[Array, "b n c"]
) -> Bool[Array, "b q n"]:
    """Where a query looks: at pixels its mask holds with probability 0.5 or more, or everywhere if
    there are none.
    """
    outside = jnp.einsum("bqc,bnc->bqn", embed.astype(jnp.float32), coarse) < 0
    return ~outside | jnp.all(outside, axis=-1, keepdims=True)
