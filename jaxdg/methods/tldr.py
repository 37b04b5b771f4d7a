"""TLDR, texture learning domain randomisation (Kim et al., ICCV 2023), for both tasks.

The batch holds each image twice, as it is and in the style of a random picture. The task's loss is
the mean over both. Two more terms compare Gram matrices of the encoder's features, that is,
textures. Regularisation draws an image's matrices to those of the encoder before training.
Generalisation draws a stylised image's matrices to those of its style, wherever they exceed the
original's by a threshold (random style masking). Both terms fade to 0 over the run. Weights,
threshold, fading and layers follow the authors' code (ssssshwan/TLDR,
gta2cs_stylizations_warm_deeplabv3plus_resnet50.py). Differences:

- AdaIN on bands of the image transfers styles (`methods.stylize`); the authors use PhotoWCT with a
  trained VGG.
- Styles are generated pictures, or those of the folder `data.pictures`; the authors take ImageNet's
  validation images. Here styles are normalised for the encoder like any image; theirs are not.
- Layers are the encoder's stages, or the last blocks of its quarters. Each token's features are
  standardised first, because the residual streams of transformers share no scale that weights and
  threshold could refer to; the stages of ResNets do.
- A term is the mean over images; theirs is one norm over the whole batch, which depends on how the
  batch is divided.

The encoder before training is no part of the model, and `model.weights` holds it. It sees a batch
before the step, so checkpoints and their readers know nothing of it.
"""

from collections.abc import Callable, Mapping, Sequence
import dataclasses
from typing import Annotated, Any

from annotated_types import MaxLen
from flax import nnx
import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float, Key

from jaxdg import weights
from jaxdg.methods.method import (
    Batch,
    Decoded,
    Features,
    Method,
    MethodOptions,
    Preparation,
    interleave,
    tap_places,
)
from jaxdg.methods.stylize import stylize
from jaxdg.ranges import PositiveOrZero
from jaxdg.training import sharding

VIEWS = ("image", "stylized", "style")


@dataclasses.dataclass(unsafe_hash=True)
class TldrOptions(MethodOptions):
    """TLDR trains on images in random styles too; see `jaxdg/methods/tldr.py`.

    Attributes:
        on: whether it is used; needs `model.weights`. A step then sends three times as many images
            through the encoder. Default False.
        regularization: weights of the term that keeps the textures of images, one for each quarter
            or stage of the encoder, shallow to deep; the deepest may be left out. Default 0.005,
            0.0005, 0.00005, 0.000005.
        generalization: likewise, of the term that draws the textures of stylised images to those of
            their styles. Default 0.005, 0.0005.
        threshold: an entry of a Gram matrix belongs to the style if it exceeds the original's by
            more than this. Default 0.1.
    """

    regularization: Annotated[tuple[PositiveOrZero, ...], MaxLen(4)] = (
        0.005,
        0.0005,
        0.00005,
        0.000005,
    )
    generalization: Annotated[tuple[PositiveOrZero, ...], MaxLen(4)] = (0.005, 0.0005)
    threshold: PositiveOrZero = 0.1

    def check(self, config: Any, name: str) -> None:
        """See `MethodOptions.check`."""
        if self.on and config.model.weights is None:
            raise ValueError(
                f"{name}.on is True; allowed: False without model.weights, the encoder whose"
                " textures the method keeps"
            )

    def build(self, config: Any) -> "Tldr":
        """See `MethodOptions.build`."""
        return Tldr(self, config)


class Tldr(Method):
    """TLDR in one run."""

    wants_pictures = True

    def __init__(self, options: TldrOptions, config: Any):
        """Args:
        options: the settings.
        config: of the run.
        """
        self.options = options
        self.config = config

    def observed(self, depth: int) -> tuple[int, ...]:
        """See `Method.observed`."""
        return quarters(depth)

    def preparation(self, task: Any, model: Any, mesh: Mesh) -> Preparation:
        """See `Method.preparation`."""
        return preparation(self.config, self.options, model, task.augmented, task.normalize, mesh)

    def images(self, images: Float[Array, "b h w 3"], batch: Batch) -> Float[Array, "n h w 3"]:
        """See `Method.images`: original, stylised image and style in turn."""
        return interleave(images, batch["stylized"], batch["style"])

    def targets(self, batch: Batch) -> Batch:
        """See `Method.targets`: each row twice, for the original and the stylised image."""
        return {key: interleave(x, x) for key, x in batch.items() if key not in VIEWS}

    def observe(
        self, features: Features, places: Sequence[int], batch: Batch
    ) -> tuple[Decoded, dict[str, Float[Array, ""]]]:
        """See `Method.observe`: the two terms; the decoder does not get the styles."""
        observed = [features[place] for place in places]
        return without_styles(features), terms(observed, batch, self.options)


def quarters(depth: int) -> tuple[int, ...]:
    """The last block of each quarter, or each of four stages."""
    return tuple(sorted({(quarter + 1) * depth // 4 - 1 for quarter in range(4)} - {-1}))


def gram(features: Float[Array, "b h w c"]) -> Float[Array, "b c c"]:
    """Channel products, averaged over tokens; each token has mean 0 and variance 1."""
    tokens = features.reshape(features.shape[0], -1, features.shape[-1]).astype(jnp.float32)
    tokens = jax.nn.standardize(tokens, epsilon=1e-6)
    return jnp.einsum("bnc,bnd->bcd", tokens, tokens) / tokens.shape[1]


def distance(
    one: Float[Array, "b c c"],
    other: Float[Array, "b c c"],
    mask: Bool[Array, "b c c"] | bool = True,
) -> Float[Array, " b"]:
    """The Frobenius norm of the difference, divided by the channels; its gradient at 0 is 0."""
    squares = jnp.sum(jnp.where(mask, one - other, 0.0) ** 2, (1, 2))
    differs = squares > 0
    return jnp.where(differs, jnp.sqrt(jnp.where(differs, squares, 1.0)), 0.0) / one.shape[-1]


def style_mask(
    original: Float[Array, "b c c"], stylized: Float[Array, "b c c"], threshold: float
) -> Bool[Array, "b c c"]:
    """Entries of a stylised image's Gram matrix that belong to the style; has no gradient."""
    return jax.lax.stop_gradient(stylized - original) > threshold


def without_styles(
    features: Sequence[Float[Array, "n _ _ _"]],
) -> tuple[Float[Array, "m _ _ _"], ...]:
    """Features of original and stylised images; drops each third row, that of a style."""
    return tuple(x.reshape(-1, 3, *x.shape[1:])[:, :2].reshape(-1, *x.shape[1:]) for x in features)


def preparation(
    config: Any,
    options: TldrOptions,
    model: Any,
    augmented: Callable[[Batch, Key[Array, ""]], Array],
    normalize: Callable[[Array], Array],
    mesh: Mesh,
) -> Preparation:
    """Prepares a batch with the encoder before training.

    Args:
        config: of the run.
        options: the settings.
        model: abstract.
        augmented: photometric augmentation: (batch, key) to images, RGB in 0..255.
        normalize: RGB in 0..255 to the encoder's input.
        mesh: where batches lie.

    Returns:
        A function of (encoder, batch with `image` and `style` uint8 [b, h, w, 3], step from 0). It
        returns the batch with `image` augmented, `style` and `stylized` float32 in 0..255; the Gram
        matrices `gram0`, .. of the images, float32 [b, c, c]; and `share`, the weight of each image
        in the two terms, float32 [b]. Loading raises FileNotFoundError if there are no weights, and
        ValueError if they do not fit.
    """
    graph, shapes = nnx.split(model.backbone)
    places = sharding.parameter_shardings(mesh, shapes)
    placed = jax.tree.map(
        lambda s, at: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=at), shapes, places
    )
    encoder = model.backbone.config
    observed = tap_places(model, quarters(encoder.depth))[: len(options.regularization)]
    height, width = encoder.image_size
    # Stream 2 of the seed; stream 0 is the steps', stream 1 the initialisation's.
    key = jax.random.fold_in(jax.random.key(config.seed), 2**31 + 1)

    @jax.jit(out_shardings=sharding.batch_sharding(mesh))
    def prepared(state: nnx.State, batch: Batch, step: Any) -> Batch:
        image = augmented(batch, jax.random.fold_in(key, step))
        style = batch["style"].astype(jnp.float32)
        b, h, w, _ = image.shape
        padding = (0, 0), (0, height - h), (0, width - w), (0, 0)
        with sharding.gathered(state, mesh) as whole:
            before: Any = nnx.merge(graph, whole)
            features = before(jnp.pad(normalize(image), padding))
        grams = {f"gram{i}": gram(features[place]) for i, place in enumerate(observed)}
        share = jnp.full(b, (1 - step / config.steps) / b)
        return {
            **batch,
            "image": image,
            "style": style,
            "stylized": stylize(image, style),
            "share": share,
            **grams,
        }

    def load() -> nnx.State:
        before: Any = nnx.merge(graph, placed)
        weights.load(before, config.model.weights or "")
        return nnx.state(before)

    return Preparation(prepared, placed, load)


def terms(
    features: Sequence[Float[Array, "n _ _ _"]], batch: Mapping[str, Array], options: TldrOptions
) -> dict[str, Float[Array, ""]]:
    """The two terms; the terms of a batch are the sums over its parts.

    Args:
        features: of the observed blocks, shallow to deep; rows are original, stylised image and
            style in turn.
        batch: prepared, or a part of it.
        options: of the run.
    """
    o = options
    share = batch["share"]
    regularization = generalization = jnp.zeros_like(share)
    for i, x in enumerate(features[: max(len(o.regularization), len(o.generalization))]):
        c = x.shape[-1]
        original, stylized, style = jnp.moveaxis(gram(x).reshape(-1, 3, c, c), 1, 0)
        if i < len(o.regularization):
            regularization += o.regularization[i] * distance(original, batch[f"gram{i}"])
        if i < len(o.generalization):
            mask = style_mask(original, stylized, o.threshold)
            generalization += o.generalization[i] * distance(style, stylized, mask)
    return {
        "texture_regularization": jnp.sum(share * regularization),
        "texture_generalization": jnp.sum(share * generalization),
    }
