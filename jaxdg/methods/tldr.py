"""TLDR, texture learning domain randomisation (Kim et al., ICCV 2023), for either task: training on
images in random styles besides.

Every image of a batch is there twice, as it is and in the style of a random picture, and the task's
loss is the mean of both. Two terms look at Gram matrices of the encoder's features, that is, at
textures. Regularisation: those of an image shall be those that the encoder gave it before training.
Generalisation: those of a stylised image shall be those of its style, wherever they exceed the
original's by a threshold (random style masking). Both fade to nothing over the run. Weights,
threshold, fading and layers are those of the authors' code (ssssshwan/TLDR,
gta2cs_stylizations_warm_deeplabv3plus_resnet50.py). What differs from it:

- Styles are transferred by AdaIN on bands of the image (`methods.stylize`); theirs is PhotoWCT with
  a trained VGG.
- Styles are generated pictures, or those of the folder `data.pictures`; theirs are ImageNet's
  validation images. They are normalised for the encoder like any other image; theirs are not.
- Layers are the last blocks of the encoder's quarters, or its stages. A token's features are
  brought to mean 0 and variance 1 first, as residual streams of transformers have no scale in
  common that weights and the threshold could refer to; ResNets' stages do.
- A term is the mean over images; theirs is one norm over the whole batch, which depends on how it
  is divided.

The encoder as it was before training is no part of the model: nothing but training needs it, and
`model.weights` holds it. It looks at a batch before the step does, so that neither checkpoints nor
whatever reads them know of it.
"""

from collections.abc import Callable, Mapping, Sequence
import dataclasses
from typing import Any

from flax import nnx
import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float, Key, Shaped

from jaxdg import weights
from jaxdg.methods.method import Batch, Features, Kept, Method, MethodOptions, tap_places
from jaxdg.methods.stylize import stylize
from jaxdg.training import sharding

VIEWS = ("image", "stylized", "style")


@dataclasses.dataclass(unsafe_hash=True)
class TldrOptions(MethodOptions):
    """TLDR, a comparison that trains on images in random styles besides; needs `model.weights`. See
    `jaxdg/methods/tldr.py`.

    Attributes:
        on: whether it is used; a step then sends three times as many images through the encoder.
            Default False.
        regularization: weights of how much the textures of images may change, of the encoder's
            quarters or stages, shallow to deep; the deepest may be left out. Default 0.005, 0.0005,
            0.00005, 0.000005.
        generalization: likewise of how well textures of stylised images become those of their
            styles. Default 0.005, 0.0005.
        threshold: by how much an entry of a Gram matrix must exceed the original's, for the style
            to show in it. Default 0.1.
    """

    regularization: tuple[float, ...] = (0.005, 0.0005, 0.00005, 0.000005)
    generalization: tuple[float, ...] = (0.005, 0.0005)
    threshold: float = 0.1

    def check(self, config: Any, name: str) -> None:
        """See `MethodOptions.check`."""
        for field in ("regularization", "generalization"):
            given = getattr(self, field)
            if len(given) > 4 or min(given, default=0) < 0:
                raise ValueError(
                    f"{name}.{field} is {given}; allowed: at most 4 weights of 0 or more"
                )
        if self.threshold < 0:
            raise ValueError(f"{name}.threshold is {self.threshold}; allowed: 0 or more")
        if self.on and config.model.weights is None:
            raise ValueError(
                f"{name}.on is True; allowed: False without model.weights, the encoder whose"
                " textures are to be kept"
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

    def preparation(self, task: Any, model: Any, mesh: Mesh) -> Callable[[Batch, int], Batch]:
        """See `Method.preparation`."""
        return preparation(self.config, self.options, model, task.distort, task.normalize, mesh)

    def images(self, images: Float[Array, "b h w 3"], batch: Batch) -> Float[Array, "n h w 3"]:
        """See `Method.images`: original, stylised image and style by turns."""
        return interleave(images, batch["stylized"], batch["style"])

    def targets(self, batch: Batch) -> Batch:
        """See `Method.targets`: those of images and of stylised ones by turns."""
        return twice(batch)

    def observe(
        self, features: Features, places: Sequence[int], batch: Batch
    ) -> tuple[Kept, dict[str, Float[Array, ""]]]:
        """See `Method.observe`: the two terms; the decoder does not see styles."""
        return without_styles(features), terms(
            [features[place] for place in places], batch, self.options
        )


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
    """The Frobenius norm of what differs, over the channels; where nothing differs its gradient is
    0.
    """
    squares = jnp.sum(jnp.where(mask, one - other, 0.0) ** 2, (1, 2))
    differs = squares > 0
    return jnp.where(differs, jnp.sqrt(jnp.where(differs, squares, 1.0)), 0.0) / one.shape[-1]


def style_mask(
    original: Float[Array, "b c c"], stylized: Float[Array, "b c c"], threshold: float
) -> Bool[Array, "b c c"]:
    """Where a style shows: entries of a stylised image's Gram matrix that exceed the original's;
    nothing is learned through it.
    """
    return jax.lax.stop_gradient(stylized - original) > threshold


def interleave(*arrays: Shaped[Array, "b *s"]) -> Shaped[Array, "n *s"]:
    """Rows of all arrays by turns; neighbours stay on the device that holds them."""
    return jnp.stack(arrays, axis=1).reshape(-1, *arrays[0].shape[1:])


def twice(batch: Batch) -> Batch:
    """What a task's losses are computed of, for images and stylised ones by turns."""
    return {key: interleave(x, x) for key, x in batch.items() if key not in VIEWS}


def without_styles(
    features: Sequence[Float[Array, "n _ _ _"]],
) -> tuple[Float[Array, "m _ _ _"], ...]:
    """Features of original, stylised image and style by turns, without the last of each three."""
    return tuple(x.reshape(-1, 3, *x.shape[1:])[:, :2].reshape(-1, *x.shape[1:]) for x in features)


def preparation(
    config: Any,
    options: TldrOptions,
    model: Any,
    distort: Callable[[Array, Key[Array, ""]], Array],
    normalize: Callable[[Array], Array],
    mesh: Mesh,
) -> Callable[[Batch, int], Batch]:
    """Loads the encoder as it was before training, and says what is done to a batch before its
    step.

    Args:
        config: of the run.
        options: the settings.
        model: abstract.
        distort: photometric augmentation, (images, key) to RGB in 0..255.
        normalize: RGB in 0..255 as the encoder takes it.
        mesh: where batches lie.

    Returns:
        (batch with `image` and `style` uint8 [b, h, w, 3], step from 0) to the same batch with
        `image` augmented, `style` and `stylized` float32 in 0..255; the Gram matrices `gram0`, ..
        of the images, float32 [b, c, c]; and `share`, the share of each image in the two terms,
        float32 [b].

    Raises:
        FileNotFoundError: no such weights.
        ValueError: they do not fit.
    """
    graph, shapes = nnx.split(model.backbone)
    places = sharding.parameter_shardings(mesh, shapes)
    before: Any = nnx.merge(
        graph,
        jax.tree.map(
            lambda s, at: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=at), shapes, places
        ),
    )
    weights.load(before, config.model.weights or "")
    observed = list(
        zip(tap_places(model, quarters(before.config.depth)), options.regularization, strict=False)
    )
    height, width = before.config.image_size
    key = jax.random.fold_in(
        jax.random.key(config.seed), 2**31 + 1
    )  # stream 2 of the seed; 0 is the steps', 1 the initialisation's

    @jax.jit(out_shardings=sharding.batch_sharding(mesh))
    def prepared(state: nnx.State, batch: Batch, step: Array) -> Batch:
        image = distort(batch["image"], jax.random.fold_in(key, step))
        style = batch["style"].astype(jnp.float32)
        b, h, w, _ = image.shape
        features = nnx.merge(graph, state)(
            jnp.pad(normalize(image), ((0, 0), (0, height - h), (0, width - w), (0, 0)))
        )
        grams = {f"gram{i}": gram(features[place]) for i, (place, _) in enumerate(observed)}
        share = jnp.full(b, (1 - step / config.steps) / b)
        return {
            **batch,
            "image": image,
            "style": style,
            "stylized": stylize(image, style),
            "share": share,
            **grams,
        }

    state = nnx.state(before)
    return lambda batch, step: prepared(state, batch, jnp.asarray(step, jnp.int32))


def terms(
    features: Sequence[Float[Array, "n _ _ _"]], batch: Mapping[str, Array], options: TldrOptions
) -> dict[str, Float[Array, ""]]:
    """The two terms; those of a batch are the sums of those of its parts.

    Args:
        features: that are observed, shallow to deep, of original, stylised image and style by
            turns.
        batch: as prepared, or a part of it.
        options: of the run.
    """
    o = options
    share = batch["share"]
    regularization = generalization = jnp.zeros_like(share)
    for i, x in enumerate(features[: max(len(o.regularization), len(o.generalization))]):
        original, stylized, style = jnp.moveaxis(
            gram(x).reshape(-1, 3, x.shape[-1], x.shape[-1]), 1, 0
        )
        if i < len(o.regularization):
            regularization += o.regularization[i] * distance(original, batch[f"gram{i}"])
        if i < len(o.generalization):
            generalization += o.generalization[i] * distance(
                style, stylized, style_mask(original, stylized, o.threshold)
            )
    return {
        "texture_regularization": jnp.sum(share * regularization),
        "texture_generalization": jnp.sum(share * generalization),
    }
