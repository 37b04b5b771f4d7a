"""tqdm, the textual query-driven mask transformer (Pak et al., ECCV 2024), on CLIP's towers.

A query is a class's name with learned context, embedded by CLIP's frozen text tower and refined by
what the image tower sees. Mask2Former's decoder turns it into that class's mask; no query is
matched with anything. The pixel decoder's tokens attend to the texts too. Two terms of the loss
keep text and image in CLIP's joint space:

- textual: each query is nearest to the frozen tower's embedding of its own class name;
- vision_language: each patch is nearest to the query of its class.

A third, that the global feature stays near that of the image tower before training, needs that
tower: `methods/visual_anchor.py`.

Results follow the authors' code (ByeongHyunPak/tqdm), attribute names theirs where Mask2Former has
none. Different from it:

- Kernels of Mask2Former's layers start by Xavier's uniform rule, theirs by the normal one of the
  same variance.
- CLIP's class token has its position once, as CLIP was trained; theirs adds the token once more.
  The conversion of a released file doubles it.
- The text tower's table of tokens is not kept: only the rows of the class names are.
"""

from collections.abc import Sequence
import dataclasses
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from flax import nnx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32, Int32, Key, UInt8
import numpy as np

from jaxdg import backbones, weights
from jaxdg.evaluation.sliding_window import resize_scores
from jaxdg.ranges import Count, CountOrZero, PositiveOrZero
from jaxdg.segmentation.clip_text import load_tower, tower_of
from jaxdg.segmentation.linear import cross_entropy
from jaxdg.segmentation.mask2former.deformable_attention import Shapes, kernel_init
from jaxdg.segmentation.mask2former.head import (
    Attention,
    Mask2Former,
    Mask2FormerConfig,
    MaskDecoderOptions,
    Predictions,
)
from jaxdg.segmentation.mask2former.layers import layer_norm, relu
from jaxdg.segmentation.mask2former.losses import (
    LossDenominator,
    mask2former_loss,
    mask_logits,
)
from jaxdg.segmentation.mask2former.pixel_decoder import Layer, PixelDecoder
from jaxdg.segmentation.tqdm.context_decoder import ContextDecoder
from jaxdg.text import tokenizer
from jaxdg.text.clip_text import TEXT_TOWERS, ClipTextConfig, Projection, TextTransformer, normalize

ANCHOR = "a clean origami of a {}"  # the prompt whose embedding a query stays near
TEMPERATURE = 0.07  # of the vision-language term


@dataclasses.dataclass(unsafe_hash=True, kw_only=True)
class TqdmOptions(MaskDecoderOptions):
    """Text queries for a CLIP encoder; `model.text_weights` names the converted text tower.

    Attributes:
        contexts: tokens learned before every class name; 0: the names alone. Default 8.
        context_layers: of the context decoder, in which texts look at the image. Default 3.
        context_width: channels inside it; a multiple of `context_heads`. Default 256.
        context_heads: of its attention. Default 4.
        gamma: start of what its output is multiplied by. None draws each channel from a normal
            distribution of deviation 1, cut at 2, as the authors' code; their paper has 0.0001.
            Default None.
        textual: weight of the term that keeps queries near their class names. Default 1.
        vision_language: weight of the term that draws patches to their class's query. Default 1.
    """

    contexts: CountOrZero = 8
    context_layers: Count = 3
    context_width: Count = 256
    context_heads: Count = 4
    gamma: PositiveOrZero | None = None
    textual: PositiveOrZero = 1.0
    vision_language: PositiveOrZero = 1.0

    needs_text = True

    def config(self, classes: Sequence[str], dtype: str) -> "TqdmConfig":
        """See `DecoderOptions.config`."""
        k = len(classes)
        return TqdmConfig(k, names=tuple(classes), queries=k, dtype=dtype, **vars(self))


@dataclasses.dataclass(unsafe_hash=True)
class TqdmConfig(TqdmOptions, Mask2FormerConfig):
    """A tqdm head: the fields of `TqdmOptions` and `Mask2FormerConfig`, and this of the run.

    Attributes:
        names: of the classes; there is one query for each.
    """

    names: tuple[str, ...] = dataclasses.field(kw_only=True)

    name = "tqdm"
    reads_class_token = True

    def taps(self, encoder: backbones.EncoderConfig) -> tuple[int, ...]:
        """See `DecoderConfig.taps`: the authors', 7, 11, 15 and 23 of 24 blocks."""
        depth = encoder.depth
        if depth < 6:  # they would not be four
            return encoder.taps
        return depth // 3 - 1, depth // 2 - 1, 2 * depth // 3 - 1, depth - 1

    def build(self, channels: Sequence[int], *, encoder: str, rngs: nnx.Rngs) -> "TqdmHead":
        """See `DecoderConfig.build`."""
        return TqdmHead(self, channels, encoder=encoder, rngs=rngs)


class NameEncoder(TextTransformer):
    """CLIP's frozen text tower for the class names, with learned context before each name."""

    def __init__(
        self, tower: ClipTextConfig, names: Sequence[str], contexts: int, *, rngs: nnx.Rngs
    ):
        """Builds it with random parameters; `load` fills it.

        Raises:
            ValueError: a name and its context are longer than a text may be.
        """
        ids = name_ids(names)
        words = ids.shape[1]
        if contexts + words > tokenizer.LENGTH:
            raise ValueError(
                f"model.tqdm.contexts is {contexts}; allowed: at most {tokenizer.LENGTH - words},"
                f" as a class name takes up to {words} of {tokenizer.LENGTH} tokens"
            )
        super().__init__(tower, contexts + words, rngs=rngs)
        self.names = tuple(names)
        # The end token has the highest id.
        self.ends = tuple(contexts + int(end) for end in ids.argmax(axis=1))
        self.tokens = nnx.BatchStat(jnp.zeros((*ids.shape, tower.width)))
        self.anchors = nnx.BatchStat(jnp.zeros((len(ids), tower.embedding)))

    def __call__(self, contexts: Float[Array, "m c"]) -> Float[Array, "k e"]:
        """Embeddings of the names, not normalised; the context follows the start token."""
        tokens = self.tokens[...]
        contexts = jnp.broadcast_to(contexts, (len(tokens), *contexts.shape))
        tokens = jnp.concatenate([tokens[:, :1], contexts, tokens[:, 1:]], axis=1)
        return self.encode(tokens, np.asarray(self.ends, np.int32))

    def load(self, path: str | Path, tower: str) -> None:
        """Fills it from a converted text tower; see `clip_text.load_tower` for what it raises."""
        whole = load_tower(path, tower)
        stored = weights.tensors(whole)
        length = self.positional_embedding.shape[0]
        own = {
            name: tensor[:length] if name == "positional_embedding" else tensor
            for name, tensor in stored.items()
            if not name.startswith(("token_embedding", "logit_scale", "image_projection."))
        }
        own["tokens"] = stored["token_embedding"][name_ids(self.names)]
        own["anchors"] = whole.embeddings(self.names, (ANCHOR,))
        weights.fill(self, own, path)


def name_ids(names: Sequence[str]) -> Int32[np.ndarray, "k n"]:
    """Token ids of class names, with start, end, and zeros up to the longest."""
    ids = tokenizer.tokenize(names)
    return ids[:, : int(ids.argmax(axis=1).max()) + 1]


class TextLayer(Layer):
    """A layer of the pixel decoder whose tokens attend to the texts before their MLP."""

    def __init__(self, config: TqdmConfig, *sizes: int, rngs: nnx.Rngs, **options: Any):
        super().__init__(*sizes, rngs=rngs, **options)
        self.cross_attn = Attention(config, rngs=rngs)
        self.cross_norm = layer_norm(config.hidden, config.dtype, rngs)

    def __call__(
        self,
        x: Float[Array, "b n c"],
        positions: Float[Array, "n c"],
        shapes: Shapes,
        keys: Float[Array, "b k c"],
        values: Float[Array, "b k c"],
    ) -> Float[Array, "b n c"]:
        dtype = x.dtype
        x = self.attend_points(x, positions, shapes)
        read = self.cross_attn(x + positions, keys, values)
        return self.widen(self.cross_norm(x + read).astype(dtype))


class TextPixelDecoder(PixelDecoder):
    """Mask2Former's pixel decoder that reads texts too."""

    def __init__(
        self, config: TqdmConfig, embedding: int, *sizes: Any, rngs: nnx.Rngs, **options: Any
    ):
        c = config.hidden
        super().__init__(*sizes, layer=partial(TextLayer, config), rngs=rngs, **options)
        self.text_proj = linear(embedding, c, rngs)
        self.text_pos_embed = nnx.Param(jax.random.normal(rngs.params(), (config.num_classes, c)))
        self.post_norm = layer_norm(c, config.dtype, rngs)

    def attend(
        self,
        tokens: Float[Array, "b n c"],
        positions: Float[Array, "n c"],
        shapes: Shapes,
        texts: Float[Array, "b k e"],
    ) -> Float[Array, "b n c"]:
        """See `PixelDecoder.attend`; `texts` are the queries in the joint space."""
        values = self.text_proj(texts)
        keys = values + self.text_pos_embed[...]
        dtype = tokens.dtype
        tokens = super().attend(tokens, positions, shapes, keys.astype(dtype), values.astype(dtype))
        return self.post_norm(tokens).astype(dtype)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TextPredictions(Predictions):
    """What the queries predict, and all that lies in CLIP's joint space; see `Predictions`.

    Attributes:
        texts: the queries, e channels each.
        image: the image tower's global feature, that of the class token.
        patches: the image tower's features of patches.
    """

    texts: Float32[Array, "b k e"]
    image: Float32[Array, "b e"]
    patches: Float32[Array, "b gh gw e"]


class TextDenominator(NamedTuple):
    """What the loss terms of the global batch are divided by.

    Attributes:
        mask2former: of Mask2Former's terms.
        images: their number.
        pixels: their number in all label maps. Unlabelled ones count, as in mmsegmentation 0.x.
    """

    mask2former: LossDenominator
    images: Float32[Array, ""]
    pixels: Float32[Array, ""]


class TqdmHead(Mask2Former):
    """Pyramid levels and the last block's tokens to a class and a mask for every class name.

    It holds the last norm and the projection of the image tower, `image_projection`, which train as
    the encoder does, and the text tower, `text`, which stays as loaded.
    """

    config: TqdmConfig

    def __init__(
        self, config: TqdmConfig, channels: Sequence[int], *, encoder: str, rngs: nnx.Rngs
    ):
        """Builds the head with random parameters; `load_text` fills the towers' parts.

        Args:
            config: classes and sizes.
            channels: of the four feature maps, finest first.
            encoder: name in the zoo.
            rngs: initialises the parameters.

        Raises:
            ValueError: sizes that do not fit together, or an encoder without a text tower or
                without a class token.
        """
        c = config
        self.tower = tower_of(encoder, c.name)
        tower = TEXT_TOWERS[self.tower]
        e = tower.embedding
        if tower.image_projection is None:
            raise ValueError(
                f"model.decoder {c.name} reads a class token, and model.encoder {encoder} has none;"
                " allowed: a CLIP ViT"
            )
        if c.context_width % c.context_heads:
            raise ValueError(
                f"model.tqdm.context_width is {c.context_width}; allowed: a multiple of"
                f" context_heads, {c.context_heads}"
            )
        super().__init__(c, channels, pixel_decoder=partial(TextPixelDecoder, c, e), rngs=rngs)
        del self.query_feat
        self.image_projection = Projection(tower.image_projection, rngs=rngs)
        self.text = NameEncoder(tower, c.names, c.contexts, rngs=rngs)
        self.contexts = nnx.Param(cut_normal(rngs, (c.contexts, tower.width)))
        self.context_decoder = ContextDecoder(
            e, c.context_width, c.context_heads, c.context_layers, rngs=rngs
        )
        self.gamma = nnx.Param(
            cut_normal(rngs, (e,)) if c.gamma is None else jnp.full((e,), c.gamma)
        )
        self.text_proj = nnx.List([linear(e, c.hidden, rngs), linear(c.hidden, c.hidden, rngs)])

    def __call__(
        self,
        features: tuple[Float[Array, "b _ _ _"], ...],
        key: Key[Array, ""] | None = None,
        train: bool = False,
    ) -> TextPredictions:
        """Predicts classes, and masks of the finest map's size.

        Args:
            features: four maps, finest first; the last block's map; and its class token, as a map
                of one pixel.
            key: turns the context decoder's dropout on.
            train: not used: nothing differs in training but dropout.
        """
        *levels, last, class_token = features
        b, h, w, c = last.shape
        tokens = [class_token.reshape(b, 1, c), last.reshape(b, h * w, c)]
        image = self.image_projection(jnp.concatenate(tokens, axis=1).astype(jnp.float32))
        with jax.named_scope("texts"):
            texts = self.text_queries(image, key)
            widen, narrow = self.text_proj
            first = narrow(relu(widen(texts)))
        with jax.named_scope("pixel_decoder"):
            maps = self.pixel_decoder(tuple(levels), texts)
        found = self.decode(*maps, queries=(self.query_embed[...], first))
        patches = image[:, 1:].reshape(b, h, w, -1)
        return TextPredictions(**vars(found), texts=texts, image=image[:, 0], patches=patches)

    def text_queries(
        self, image: Float[Array, "b n e"], key: Key[Array, ""] | None = None
    ) -> Float[Array, "b k e"]:
        """The queries in the joint space: names in their context, changed by what is seen.

        Args:
            image: all tokens of the image tower in the joint space, the class token first.
            key: turns dropout on.
        """
        names = self.text(self.contexts[...])
        texts = jnp.broadcast_to(names, (len(image), *names.shape))
        return texts + self.gamma[...] * self.context_decoder(texts, image, key)

    def scores(self, output: Predictions, size: tuple[int, int]) -> Float32[Array, "b H W k"]:
        """Class scores at an image size. As in the authors' code they are resized, where
        Mask2Former resizes the masks' logits.
        """
        masks = mask_logits(output.mask_embeds[-1], output.mask_features)
        classes = jax.nn.softmax(output.class_logits[-1])[..., :-1]
        return resize_scores(jnp.einsum("bqk,bqhw->bhwk", classes, jax.nn.sigmoid(masks)), size)

    def loss_denominator(self, label: UInt8[Array, "b H W"]) -> TextDenominator:  # pyright: ignore[reportIncompatibleMethodOverride]
        """What the loss terms are divided by, from the labels of the global batch."""
        return TextDenominator(
            super().loss_denominator(label),
            jnp.asarray(label.shape[0], jnp.float32),
            jnp.asarray(label.size, jnp.float32),
        )

    def loss(  # pyright: ignore[reportIncompatibleMethodOverride]
        self,
        output: TextPredictions,
        label: UInt8[Array, "b H W"],
        denominator: TextDenominator,
        key: Key[Array, ""],
    ) -> dict[str, Float[Array, ""]]:
        """Mask2Former's terms, each class matched with its own query, and the two terms of text."""
        c = self.config
        k = c.num_classes
        terms = mask2former_loss(
            output.class_logits,
            output.mask_embeds,
            output.mask_features,
            label,
            denominator.mask2former,
            key,
            points=c.points,
            query=jnp.arange(k),
        )
        texts = normalize(output.texts)
        if c.textual:
            log_p = jax.nn.log_softmax(texts @ self.text.anchors[...].T)
            own = jnp.sum(jnp.trace(log_p, axis1=1, axis2=2))
            terms["textual"] = -c.textual * own / (denominator.images * k)
        if c.vision_language:
            scores = jnp.einsum("bhwe,bke->bhwk", normalize(output.patches), texts) / TEMPERATURE
            entropy = cross_entropy(scores, label)
            terms["vision_language"] = c.vision_language * entropy / denominator.pixels
        return terms

    def frozen(self, name: str) -> bool:
        """See `Decoder.frozen`: the text tower."""
        return name.startswith("text.")

    def load_text(self, path: str | Path) -> None:
        """See `Decoder.load_text`: fills the text tower and the image tower's projection."""
        self.text.load(path, self.tower)
        weights.fill(self.image_projection, projection_tensors(path), path)


def projection_tensors(path: str | Path) -> dict[str, np.ndarray]:
    """The image tower's last norm and projection, from a converted text tower."""
    prefix = "image_projection."
    return {
        name.removeprefix(prefix): tensor
        for name, tensor in weights.read(path).items()
        if name.startswith(prefix)
    }


def linear(inputs: int, outputs: int, rngs: nnx.Rngs) -> nnx.Linear:
    """A linear layer in float32, whose kernel starts as torch's."""
    return nnx.Linear(inputs, outputs, kernel_init=kernel_init(published=False), rngs=rngs)


def cut_normal(rngs: nnx.Rngs, shape: tuple[int, ...]) -> Float[Array, "*shape"]:
    """Numbers from a normal distribution of deviation 1, cut at 2."""
    return jax.random.truncated_normal(rngs.params(), -2.0, 2.0, shape)
