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
from jaxdg.detection.interface import HeadConfig, HeadContext, Judged
from jaxdg.detection.pyramid import Fpn, SimplePyramid


@dataclasses.dataclass(unsafe_hash=True, kw_only=True)
class DetectorConfig(backbones.EncoderOptions):
    """A detector: the fields of `EncoderOptions`, of which `taps` is not used, and these.

    Attributes:
        num_classes: k.
        image_size: height and width in pixels of its images; any size, padded to whole patches.
        head: its kind and sizes. Its pyramid is ViTDet's on a plain encoder and an FPN on a
            hierarchical one.
        observed: blocks whose features `encode` also returns, for a loss on them.
        boundaries: further blocks after which stacked segments end.
    """

    num_classes: int
    image_size: tuple[int, int]
    head: HeadConfig
    observed: tuple[int, ...] = ()
    boundaries: tuple[int, ...] = ()


class Detector(nnx.Module):
    """Images to the head's output, which `losses` and `detect` use.

    Attributes:
        refinement: None, or a module that a training method sets: what it makes of the first map
            that the pyramid or the head reads takes its place. If its `proposes_only` is true,
            proposals alone come from there. In training the method calls it, between `encode` and
            `decode`.
    """

    refinement: Any = None

    def __init__(self, config: DetectorConfig, *, rngs: nnx.Rngs):
        """Builds the model with random parameters; weights are loaded into `backbone` afterwards.

        Raises:
            ValueError: a head that does not go with the encoder, or sizes that do not fit together.
        """
        self.config = c = config
        encoder = backbones.entry(c.encoder).config
        staged = isinstance(encoder, backbones.StagedConfig)
        levels = c.head.levels
        gapless = levels and levels == tuple(range(levels[0], levels[-1] + 1))
        if not (gapless and set(levels) <= {0, 1, 2, 3}):
            raise ValueError(
                f"levels of the pyramid are {levels}; allowed: consecutive ones of 0, 1, 2, 3,"
                " ascending"
            )
        taps, self.read = backbones.join_taps(c.head.taps(encoder), c.observed)
        # The stride of level 2, from which those of the others follow.
        if staged:
            (patch,) = dataclasses.replace(encoder, taps=(2,)).strides
        else:
            patch = c.patch_size or max(encoder.strides)
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
        context = HeadContext(self.backbone, c.num_classes, shapes, strides, c.image_size, c.dtype)
        self.head = c.head.build(context, rngs=rngs)

    def _pyramid(self, staged: bool, rngs: nnx.Rngs) -> Fpn | SimplePyramid | None:
        """An FPN on an encoder with stages, else ViTDet's; None where the head needs none."""
        head = self.config.head
        if head.pyramid_channels is None:
            return None
        channels = tuple(self.backbone.channels[i] for i in self.read)
        kw: Any = dict(width=head.pyramid_channels, dtype=self.config.dtype, rngs=rngs)
        if staged:
            return Fpn(channels, head.levels, **kw)
        return SimplePyramid(channels[0], head.levels, **kw)

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
        features = self.encode(images, key)
        if self.refinement is None:
            return self.decode(features, key, train)
        with jax.named_scope("refinement"):
            first = self.refinement(features[self.read[0]], key, train)
        output = self.decode(self.with_first(features, first), key, train)
        if not self.refinement.proposes_only:
            return output
        return self.reread(output, features, key, train)

    def encode(
        self, images: Float[Array, "b h w 3"], key: Key[Array, ""] | None = None
    ) -> tuple[Float[Array, "b _ _ _"], ...]:
        """Features of all taps, of which `read` gives the indices for `decode`."""
        height, width = np.subtract(self.image_size, self.config.image_size).tolist()
        images = jnp.pad(images, ((0, 0), (0, height), (0, width), (0, 0)))
        with jax.named_scope("encoder"):
            return self.backbone(images, key)

    def decode(
        self,
        features: tuple[Float[Array, "b _ _ _"], ...],
        key: Key[Array, ""] | None = None,
        train: bool = False,
    ) -> Any:
        """The head's output from the features of all taps."""
        features = self.levels(features)
        with jax.named_scope("decoder"):
            return self.head(features, _head_key(key), train)

    def reread(
        self,
        output: Any,
        features: tuple[Float[Array, "b _ _ _"], ...],
        key: Key[Array, ""] | None = None,
        train: bool = False,
    ) -> Any:
        """An output whose boxes are read from other features of all taps; see `Head.reread`."""
        features = self.levels(features)
        with jax.named_scope("decoder"):
            return self.head.reread(output, features, _head_key(key), train)

    def levels(
        self, features: tuple[Float[Array, "b _ _ _"], ...]
    ) -> tuple[Float[Array, "b _ _ _"], ...]:
        """What the head reads, from the features of all taps."""
        features = tuple(features[i] for i in self.read)
        with jax.named_scope("pyramid"):
            return features[:1] if self.neck is None else self.neck(features)

    def with_first(
        self, features: tuple[Float[Array, "b _ _ _"], ...], first: Float[Array, "b _ _ _"]
    ) -> tuple[Float[Array, "b _ _ _"], ...]:
        """The features of all taps with another map as the first that is read."""
        at = self.read[0]
        return (*features[:at], first, *features[at + 1 :])

    def loss_denominator(self, batch: Mapping[str, Array]) -> Any:
        """What the losses of a global batch are divided by; `batch` as for `Targets.of`."""
        return self.head.loss_denominator(Targets.of(batch))

    def losses(
        self,
        output: Any,
        batch: Mapping[str, Array],
        denominator: Any,
        key: Key[Array, ""],
    ) -> dict[str, Float32[Array, ""]]:
        """See `Head.losses`; the losses of all parts of a batch add up to that of the batch.

        Args:
            output: of the model.
            batch: `boxes`, `classes`, `valid` and maybe `crowd`; see `Targets.of`.
            denominator: of the global batch.
            key: for random draws.
        """
        return self.head.losses(output, Targets.of(batch), denominator, key)

    def judge(
        self,
        output: Any,
        batch: Mapping[str, Array],
        denominator: Any,
        key: Key[Array, ""],
    ) -> tuple[dict[str, Float32[Array, ""]], Judged | None]:
        """See `Head.judge`; the arguments are those of `losses`."""
        return self.head.judge(output, Targets.of(batch), denominator, key)

    def detect(
        self, images: Float[Array, "b h w 3"], image_sizes: Float[Array, "b 2"] | None = None
    ) -> Detected:
        """Detects boxes.

        Args:
            images: [b, h, w, 3] normalised for the encoder, of `config.image_size`.
            image_sizes: height and width in pixels of each image, which lies in the upper left
                corner. The rest is padding, whose content has no influence. None: no padding.

        Returns:
            Boxes in pixels of the input.
        """
        b, h, w, _ = images.shape
        sizes = jnp.asarray((h, w) if image_sizes is None else image_sizes, jnp.float32)
        sizes = jnp.broadcast_to(sizes, (b, 2))
        rows = jnp.arange(h) < sizes[:, :1]
        columns = jnp.arange(w) < sizes[:, 1:]
        images = jnp.where((rows[:, :, None] & columns[:, None])[..., None], images, 0.0)
        output = self(images)
        with jax.named_scope("detections"):
            return self.head.detections(output, sizes)

    def set_texts(self, embeddings: Float[Array | np.ndarray, "k e"]) -> None:
        """Fills the text classifier.

        Args:
            embeddings: of the class names, of any norm, as `jaxdg.backbones.text_embeddings`
                returns them.

        Raises:
            ValueError: there is no text classifier, or it is for other sizes.
        """
        self.head.set_texts(embeddings)

    def set_scenes(self, embeddings: Float[Array | np.ndarray, "p e"]) -> None:
        """Fills in the embeddings of the scenes that the head reads; see `Head.set_scenes`."""
        self.head.set_scenes(embeddings)

    def adapt(self, name: str, tensor: np.ndarray) -> np.ndarray | None:
        """Resizes a tensor stored for another image size, as the encoder does."""
        part, _, rest = name.partition(".")
        return self.backbone.adapt(rest, tensor) if part == "backbone" else tensor

    def unused(self, name: str) -> bool:
        """Whether nothing depends on this parameter, neither a feature nor the head."""
        part, _, rest = name.partition(".")
        return part == "backbone" and self.backbone.unused(rest) and not self.config.head.uses(rest)


def _head_key(key: Key[Array, ""] | None) -> Key[Array, ""] | None:
    """The head's key: its draws are others than the encoder's."""
    return None if key is None else jax.random.fold_in(key, 1)
