"""TLDR, texture learning domain randomisation (Kim et al., ICCV 2023), for either task: training on images in random styles besides.

Every image of a batch is there twice, as it is and in the style of a random picture, and the task's loss is the mean of both. Two terms
look at Gram matrices of the encoder's features, that is, at textures. Regularisation: those of an image shall be those that the encoder
gave it before training. Generalisation: those of a stylised image shall be those of its style, wherever they exceed the original's by a
threshold (random style masking). Both fade to nothing over the run. Weights, threshold, fading and layers are those of the authors' code
(ssssshwan/TLDR, gta2cs_stylizations_warm_deeplabv3plus_resnet50.py). What differs from it:

- Styles are transferred by AdaIN on bands of the image (`training.stylize`); theirs is PhotoWCT with a trained VGG.
- Styles are generated pictures, or those of the folder `data.pictures`; theirs are ImageNet's validation images. They are normalised for
  the encoder like any other image; theirs are not.
- Layers are the last blocks of the encoder's quarters, or its stages. A token's features are brought to mean 0 and variance 1 first, as
  residual streams of transformers have no scale in common that weights and the threshold could refer to; ResNets' stages do.
- A term is the mean over images; theirs is one norm over the whole batch, which depends on how it is divided.

The encoder as it was before training is no part of the model: nothing but training needs it, and `model.weights` holds it. It looks at a
batch before the step does, so that neither checkpoints nor whatever reads them know of it.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from flax import nnx
import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float, Key, Shaped

from jaxdg import weights
from jaxdg.config import Config, TldrOptions
from jaxdg.training import sharding
from jaxdg.training.step import Batch
from jaxdg.training.stylize import stylize

VIEWS = ("image", "stylized", "style")


def watched(depth: int) -> tuple[int, ...]:
    """The last block of each quarter, or each of four stages."""
    return tuple(sorted({(quarter + 1) * depth // 4 - 1 for quarter in range(4)} - {-1}))


def gram(features: Float[Array, "b h w c"]) -> Float[Array, "b c c"]:
    """How channels go together, over all tokens, each of which is brought to mean 0 and variance 1."""
    tokens = features.reshape(features.shape[0], -1, features.shape[-1]).astype(jnp.float32)
    tokens = jax.nn.standardize(tokens, epsilon=1e-6)
    return jnp.einsum("bnc,bnd->bcd", tokens, tokens) / tokens.shape[1]


def distance(one: Float[Array, "b c c"], other: Float[Array, "b c c"], mask: Bool[Array, "b c c"] | bool = True) -> Float[Array, " b"]:
    """The Frobenius norm of what differs, over the channels; where nothing differs its gradient is 0."""
    squares = jnp.sum(jnp.where(mask, one - other, 0.0) ** 2, (1, 2))
    differs = squares > 0
    return jnp.where(differs, jnp.sqrt(jnp.where(differs, squares, 1.0)), 0.0) / one.shape[-1]


def style_mask(original: Float[Array, "b c c"], stylized: Float[Array, "b c c"], threshold: float) -> Bool[Array, "b c c"]:
    """Where a style shows: entries of a stylised image's Gram matrix that exceed the original's; nothing is learned through it."""
    return jax.lax.stop_gradient(stylized - original) > threshold


def interleave(*arrays: Shaped[Array, "b *s"]) -> Shaped[Array, "n *s"]:
    """Rows of all arrays by turns; neighbours stay on the device that holds them."""
    return jnp.stack(arrays, axis=1).reshape(-1, *arrays[0].shape[1:])


def twice(batch: Batch) -> Batch:
    """What a task's losses are computed of, for images and stylised ones by turns."""
    return {key: interleave(x, x) for key, x in batch.items() if key not in VIEWS}


def without_styles(features: Sequence[Float[Array, "n _ _ _"]]) -> tuple[Float[Array, "m _ _ _"], ...]:
    """Features of original, stylised image and style by turns, without the last of each three."""
    return tuple(x.reshape(-1, 3, *x.shape[1:])[:, :2].reshape(-1, *x.shape[1:]) for x in features)


def preparation(
    config: Config,
    model: Any,
    distort: Callable[[Array, Key[Array, ""]], Array],
    normalize: Callable[[Array], Array],
    mesh: Mesh,
) -> Callable[[Batch, int], Batch]:
    """Loads the encoder as it was before training, and says what is done to a batch before its step.

    Args:
        config: of the run.
        model: abstract, with the attributes `backbone` and `watched`.
        distort: photometric augmentation, (images, key) to RGB in 0..255.
        normalize: RGB in 0..255 as the encoder takes it.
        mesh: where batches lie.

    Returns:
        (batch with `image` and `style` uint8 [b, h, w, 3], step from 0) to the same batch with `image` augmented, `style` and `stylized`
        float32 in 0..255; the Gram matrices `gram0`, .. of the images, float32 [b, c, c]; and `share`, the share of each image in the
        two terms, float32 [b].

    Raises:
        FileNotFoundError: no such weights.
        ValueError: they do not fit.
    """
    graph, shapes = nnx.split(model.backbone)
    places = sharding.parameter_shardings(mesh, shapes)
    before: Any = nnx.merge(graph, jax.tree.map(lambda s, at: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=at), shapes, places))
    weights.load(before, config.model.weights or "")
    watched = list(zip(model.watched, config.tldr.regularization, strict=False))
    height, width = before.config.image_size
    key = jax.random.fold_in(jax.random.key(config.seed), 2**31 + 1)  # stream 2 of the seed; 0 is the steps', 1 the initialisation's

    @jax.jit(out_shardings=sharding.batch_sharding(mesh))
    def prepared(state: nnx.State, batch: Batch, step: Array) -> Batch:
        image, style = distort(batch["image"], jax.random.fold_in(key, step)), batch["style"].astype(jnp.float32)
        b, h, w, _ = image.shape
        features = nnx.merge(graph, state)(jnp.pad(normalize(image), ((0, 0), (0, height - h), (0, width - w), (0, 0))))
        grams = {f"gram{i}": gram(features[place]) for i, (place, _) in enumerate(watched)}
        share = jnp.full(b, (1 - step / config.steps) / b)
        return {**batch, "image": image, "style": style, "stylized": stylize(image, style), "share": share, **grams}

    state = nnx.state(before)
    return lambda batch, step: prepared(state, batch, jnp.asarray(step, jnp.int32))


def terms(features: Sequence[Float[Array, "n _ _ _"]], batch: Mapping[str, Array], options: TldrOptions) -> dict[str, Float[Array, ""]]:
    """The two terms; those of a batch are the sums of those of its parts.

    Args:
        features: that are watched, shallow to deep, of original, stylised image and style by turns.
        batch: as prepared, or a part of it.
        options: of the run.
    """
    o, share = options, batch["share"]
    regularization = generalization = jnp.zeros_like(share)
    for i, x in enumerate(features[: max(len(o.regularization), len(o.generalization))]):
        original, stylized, style = jnp.moveaxis(gram(x).reshape(-1, 3, x.shape[-1], x.shape[-1]), 1, 0)
        if i < len(o.regularization):
            regularization += o.regularization[i] * distance(original, batch[f"gram{i}"])
        if i < len(o.generalization):
            generalization += o.generalization[i] * distance(style, stylized, style_mask(original, stylized, o.threshold))
    return {"texture_regularization": jnp.sum(share * regularization), "texture_generalization": jnp.sum(share * generalization)}
