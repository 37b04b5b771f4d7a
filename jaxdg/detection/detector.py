"""Encoder, pyramid and head put together: normalised images in, boxes out."""

from collections.abc import Mapping
import dataclasses
from typing import Any

from flax import nnx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32, Key
import numpy as np

from jaxdg import backbones
from jaxdg.detection.arrays import Detected, Targets
from jaxdg.detection.head import HeadConfig
from jaxdg.detection.pyramid import Fpn, SimplePyramid


@dataclasses.dataclass(unsafe_hash=True, kw_only=True)
class DetectorConfig(backbones.EncoderOptions):
    """A detector; fields of `EncoderOptions`, whose `taps` it does not read, and those that follow.

    Attributes:
        num_classes: k.
        image_size: height and width in pixels of the images it is trained on and predicts; any, the
            rest of a patch is padded.
        head: its kind and sizes. A pyramid is ViTDet's on a plain encoder and an FPN on a
            hierarchical one.
        observed: blocks whose features `encode` returns beside those that are read.
        boundaries: further blocks after which stacked segments end.
    """

    num_classes: int
    image_size: tuple[int, int]
    head: HeadConfig
    observed: tuple[int, ...] = ()
    boundaries: tuple[int, ...] = ()


class Detector(nnx.Module):
    """Images to the head's output; `losses` and `detect` make use of it."""

    def __init__(self, config: DetectorConfig, *, rngs: nnx.Rngs):
        """Builds the model with random parameters; encoder weights are loaded into `backbone`
        afterwards.

        Raises:
            ValueError: a head that does not go with the encoder, or sizes that do not fit together.
        """
        self.config = c = config
        encoder = backbones.entry(c.encoder).config
        staged = isinstance(encoder, backbones.StagedConfig)
        levels = c.head.levels
        if (
            not levels
            or list(levels) != list(range(levels[0], levels[-1] + 1))
            or levels[0] < 0
            or levels[-1] > 3
        ):
            raise ValueError(
                f"levels of the pyramid are {levels}; allowed: neighbours of 0, 1, 2, 3, ascending"
            )
        taps, self.read, self.observed = backbones.join_taps(c.head.taps(encoder), c.observed)
        patch = 16 if staged else c.patch_size or max(encoder.strides)
        strides = [patch * 2.0 ** (level - 2) for level in levels]
        unit = max(patch, int(strides[-1]))
        height, width = (-(-side // unit) * unit for side in c.image_size)
        self.image_size = height, width
        self.backbone = backbones.build(
            c, taps=taps, image_size=self.image_size, boundaries=c.boundaries, rngs=rngs
        )
        shapes = [(int(height / stride), int(width / stride)) for stride in strides]
        self.neck = self._pyramid(staged, rngs)
        if self.neck is not None:
            rows, columns = shapes[-1]
            shapes.append((-(-rows // 2), -(-columns // 2)))
            strides.append(2 * strides[-1])
        self.head = c.head.build(
            self.backbone,
            c.num_classes,
            shapes,
            strides,
            image_size=c.image_size,
            dtype=c.dtype,
            rngs=rngs,
        )

    def _pyramid(self, staged: bool, rngs: nnx.Rngs) -> Fpn | SimplePyramid | None:
        """The pyramid between encoder and head: an FPN on an encoder with stages, else ViTDet's;
        None where the head needs none.
        """
        c = self.config
        width = self.config.head.pyramid_channels
        channels = tuple(self.backbone.channels[i] for i in self.read)
        if width is None:
            return None
        if staged:
            return Fpn(channels, c.head.levels, width, dtype=c.dtype, rngs=rngs)
        return SimplePyramid(channels[0], c.head.levels, width, dtype=c.dtype, rngs=rngs)

    def __call__(
        self,
        images: Float[Array, "b h w 3"],
        key: Key[Array, ""] | None = None,
        train: bool = False,
    ) -> Any:
        """The head's output.

        Args:
            images: [b, h, w, 3] normalised for the encoder, of `config.image_size`.
            key: random key that turns drop path on.
            train: use (and update) the batch's own statistics where there are any.

        Raises:
            ValueError: images of another size.
        """
        if images.shape[1:3] != self.config.image_size:
            raise ValueError(
                f"the detector was built for images of {self.config.image_size} pixels and got"
                f" {images.shape[1:3]}"
            )
        return self.decode(self.encode(images, key), key, train)

    def encode(
        self, images: Float[Array, "b h w 3"], key: Key[Array, ""] | None = None
    ) -> tuple[Float[Array, "b _ _ _"], ...]:
        """Features of all taps: those that are read (`read` are their places) and observed
        (`observed`); arguments as for the model.
        """
        missing = [
            (0, whole - side)
            for whole, side in zip(self.image_size, self.config.image_size, strict=True)
        ]
        return self.backbone(jnp.pad(images, ((0, 0), *missing, (0, 0))), key)

    def decode(
        self,
        features: tuple[Float[Array, "b _ _ _"], ...],
        key: Key[Array, ""] | None = None,
        train: bool = False,
    ) -> Any:
        """The head's output from features of all taps; other arguments as those of the model."""
        features = tuple(features[i] for i in self.read)
        features = features[:1] if self.neck is None else self.neck(features)
        return self.head(features, None if key is None else jax.random.fold_in(key, 1), train)

    def loss_denominator(self, batch: Mapping[str, Array]) -> Float32[Array, ""]:
        """What the losses of a global batch are divided by; see `Targets.of`."""
        return self.head.loss_denominator(Targets.of(batch))

    def losses(
        self,
        output: Any,
        batch: Mapping[str, Array],
        denominator: Float32[Array, ""],
        key: Key[Array, ""],
    ) -> dict[str, Float32[Array, ""]]:
        """Named loss terms of a part of a batch; they add up to the loss, and those of all parts to
        that of the batch.

        Args:
            output: of the model.
            batch: `boxes`, `classes`, `valid` and maybe `crowd`; see `Targets.of`.
            denominator: of the global batch.
            key: draws what losses are computed of.
        """
        return self.head.losses(output, Targets.of(batch), denominator, key)

    def detect(
        self, images: Float[Array, "b h w 3"], image_sizes: Float[Array, "b 2"] | None = None
    ) -> Detected:
        """Finds things.

        Args:
            images: [b, h, w, 3] normalised for the encoder, of `config.image_size`.
            image_sizes: height and width in pixels of the image in the upper left corner of each,
                the rest of which is padding: its content has no influence. None: they have no
                padding.

        Returns:
            Boxes in pixels of the input.
        """
        b, h, w, _ = images.shape
        sizes = jnp.broadcast_to(
            jnp.asarray((h, w) if image_sizes is None else image_sizes, jnp.float32), (b, 2)
        )
        rows, columns = (jnp.arange(side) < sizes[:, i, None] for i, side in enumerate((h, w)))
        images = jnp.where((rows[:, :, None] & columns[:, None])[..., None], images, 0.0)
        return self.head.detections(self(images), sizes)

    def set_texts(self, embeddings: Float[Array | np.ndarray, "k e"]) -> None:
        """Fills the text classifier.

        Args:
            embeddings: of the class names, of any length, as `jaxdg.backbones.text_embeddings`
                gives them.

        Raises:
            ValueError: there is no text classifier, or it is for other sizes.
        """
        self.head.set_texts(embeddings)

    def adapt(self, name: str, tensor: np.ndarray) -> np.ndarray | None:
        """Fits a tensor stored by a detector for another image size to this one, as the encoder
        does.
        """
        part, _, rest = name.partition(".")
        return self.backbone.adapt(rest, tensor) if part == "backbone" else tensor

    def unused(self, name: str) -> bool:
        """Whether training leaves this parameter alone: no feature depends on it, and the head does
        not read it.
        """
        part, _, rest = name.partition(".")
        return part == "backbone" and self.backbone.unused(rest) and not self.config.head.uses(rest)
