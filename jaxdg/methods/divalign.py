"""DivAlign (Danish et al., CVPR 2024): each image beside a corrupted copy, whose detections agree.

The detection losses are means over both views; a two-stage detector makes and samples proposals of
its own for each. Two more terms compare the views in the places that the image itself learns from:
the divergence KL(copy || image) of class probabilities, and smooth L1 between the offsets of the
boxes of positive places. In two stages these places are the proposals sampled for the image, which
the box head judges in the copy's features too. Gradients flow into both views. Corruptions, weights
and terms follow the authors' code (msohaildanish/DivAlign, `ROIBoxHead`). Differences:

- The crop is corrupted, and not the image of the file, which is resized afterwards there.
- Both views get the photometric augmentation of the run, with the same draws; theirs has none.
- FCOS, for which no code was published, compares the points that predict a box: the divergence is
  summed over its classes, which are independent of one another.
- In two stages the divergence is divided by the number of proposals to sample, as the losses are,
  even where fewer exist. The distance of boxes is a mean over the positive proposals of each image,
  and then over images, also over those without any; theirs is one over those of the two images on a
  GPU. A cascade, which they do not have, compares what its last stage says.
- The divergence is a sum of p log(p / q) - p + q. The part p - q sums up to 0. With it no summand
  is negative, and equal views have no gradient at all.
"""

from collections.abc import Callable
import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jaxtyping import Array, Float, Float32, Key, Shaped

from jaxdg.data.augment.corruptions import ALL_KINDS
from jaxdg.detection.interface import Judged
from jaxdg.detection.losses import smooth_l1
from jaxdg.detection.rcnn.gated import OfGates
from jaxdg.methods.method import Batch, Method, MethodOptions, interleave
from jaxdg.ranges import PositiveOrZero
from jaxdg.training import sharding

BETA = 1 / 9  # of smooth L1
CORRUPTIONS = (
    "defocus_blur",
    "glass_blur",
    "gaussian_blur",
    "motion_blur",
    "speckle_noise",
    "shot_noise",
    "impulse_noise",
    "gaussian_noise",
    "jpeg_compression",
    "pixelate",
    "elastic_transform",
    "brightness",
    "saturate",
    "contrast",
    "high_pass_filter",
    "phase_scaling",
)


@dataclasses.dataclass(unsafe_hash=True)
class DivalignOptions(MethodOptions):
    """DivAlign trains a detector on corrupted copies too; see `jaxdg/methods/divalign.py`.

    Attributes:
        on: whether it is used. A step then sends twice as many images through the detector. Default
            False.
        corruptions: kinds of which one is drawn for each copy, at a severity of 1 to 5; () copies
            images as they are. Default: the 16 of the authors; fog, frost, snow and zoom blur are
            not among them.
        class_weight: of the divergence of class probabilities; 0 with `box_weight` 0 for corrupted
            copies alone. Default 1.
        box_weight: of the distance of boxes. Default 1.
    """

    corruptions: tuple[str, ...] = CORRUPTIONS
    class_weight: PositiveOrZero = 1.0
    box_weight: PositiveOrZero = 1.0

    def check(self, config: Any, name: str) -> None:
        """See `MethodOptions.check`."""
        unknown = [kind for kind in self.corruptions if kind not in ALL_KINDS]
        if unknown or len(set(self.corruptions)) < len(self.corruptions):
            raise ValueError(
                f"{name}.corruptions is {self.corruptions}; allowed: different ones of"
                f" {', '.join(ALL_KINDS)}"
            )
        if self.on and config.task != "detection":
            raise ValueError(
                f"{name}.on is True with task {config.task!r}; allowed: False, as it compares boxes"
            )
        decoder = config.model.decoder
        aligned = self.on and bool(self.class_weight or self.box_weight)
        if aligned and isinstance(getattr(config.model, decoder), OfGates):
            raise ValueError(
                f"{name}.class_weight is {self.class_weight} and box_weight {self.box_weight} with"
                f" model.decoder {decoder!r}; allowed: both 0, as gates are drawn for each view"
            )
        for other in ("tldr", "sdgod"):
            if self.on and getattr(config, other).on:
                raise ValueError(
                    f"{name}.on and {other}.on are True; allowed: one of them, as the former trains"
                    " on further images in the rows of a batch"
                )

    def build(self, config: Any) -> "Divalign":
        """See `MethodOptions.build`."""
        return Divalign(self, config)


class Divalign(Method):
    """DivAlign in one run."""

    def __init__(self, options: DivalignOptions, config: Any):
        """Args:
        options: the settings.
        config: of the run.
        """
        self.options = options
        self.config = config
        self.corruptions = options.corruptions

    def preparation(
        self, task: Any, model: Any, mesh: Mesh
    ) -> Callable[[Batch, int], Batch] | None:
        """See `Method.preparation`: augments image and copy with the same draws."""
        if not self.corruptions:
            return None
        # Stream 5 of the seed; streams 2 to 4 are other methods'.
        key = jax.random.fold_in(jax.random.key(self.config.seed), 2**31 + 4)

        @jax.jit(out_shardings=sharding.batch_sharding(mesh))
        def prepared(batch: Batch, step: Any) -> Batch:
            views = {
                name: task.augmented({**batch, "image": batch[name]}, jax.random.fold_in(key, step))
                for name in ("image", "corrupted")
            }
            return {**batch, **views}

        return prepared

    def images(self, images: Float[Array, "b h w 3"], batch: Batch) -> Float[Array, "n h w 3"]:
        """See `Method.images`: image and copy in turn."""
        return interleave(images, batch.get("corrupted", images))

    def targets(self, batch: Batch) -> Batch:
        """See `Method.targets`: each row twice."""
        return {
            key: interleave(x, x) for key, x in batch.items() if key not in ("image", "corrupted")
        }

    def compare(
        self,
        model: Any,
        kept: Any,
        output: Any,
        judged: Judged | None,
        batch: Batch,
        denominator: Any,
        key: Key[Array, ""],
    ) -> dict[str, Float32[Array, ""]]:
        """See `Method.compare`: the two terms.

        Raises:
            ValueError: the head does not tell what it says of places.
        """
        o = self.options
        if not (o.class_weight or o.box_weight):
            return {}
        if judged is None:
            raise ValueError(
                f"divalign: model.decoder {self.config.model.decoder!r} does not tell what it says"
                " of places (`Head.judge`); allowed: one that does, or divalign.class_weight and"
                " divalign.box_weight 0"
            )
        image, copy = views(normalised(judged))
        if not judged.points:
            of_copies = jax.tree.map(lambda x: by_view(x)[1], output)
            copy = normalised(model.head.rejudge(of_copies, image))
        distance = jnp.mean(smooth_l1(copy.offsets, image.offsets, BETA), axis=-1)
        apart = divergence(copy.logits, image.logits)
        # Shares are of a mean over the places of both views.
        return {
            "class_alignment": o.class_weight * jnp.sum(2 * image.share * apart),
            "box_alignment": o.box_weight * jnp.sum(2 * image.box_share * distance),
        }


def by_view(x: Shaped[Array, "n *s"]) -> Shaped[Array, "2 b *s"]:
    """The rows of images, and those of their copies."""
    return jnp.moveaxis(x.reshape(-1, 2, *x.shape[1:]), 1, 0)


def views(judged: Judged) -> tuple[Judged, Judged]:
    """The places in images, and those in their copies."""
    arrays = {name: by_view(x) for name, x in judged._asdict().items() if name != "points"}
    image, copy = ({name: x[view] for name, x in arrays.items()} for view in (0, 1))
    return judged._replace(**image), judged._replace(**copy)


def normalised(judged: Judged) -> Judged:
    """With logarithms of probabilities as logits."""
    return judged._replace(logits=jax.nn.log_softmax(judged.logits))


def divergence(p: Float32[Array, "*n c o"], q: Float32[Array, "*n c o"]) -> Float32[Array, "*n"]:
    """KL(p || q) of logarithms of probabilities, summed over c independent choices."""
    return jnp.sum(jnp.exp(p) * (p - q) - jnp.exp(p) + jnp.exp(q), axis=(-2, -1))
