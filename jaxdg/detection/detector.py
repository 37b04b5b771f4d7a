"""Encoder, pyramid and head put together: normalised images in, boxes out."""

from collections.abc import Mapping
import dataclasses
from typing import Any

from flax import nnx
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32, Key
import numpy as np

from jaxdg import backbones
from jaxdg.detection.fcos import Fcos, FcosConfig
from jaxdg.detection.head import Detected, Targets
from jaxdg.detection.pyramid import Fpn, SimplePyramid
from jaxdg.detection.rcnn import C4Config, Rcnn, RcnnConfig
from jaxdg.detection.roi_heads import TextScore


@dataclasses.dataclass(frozen=True)
class DetectorConfig:
    """A detector.

    Attributes:
        num_classes: k.
        encoder: name in the zoo.
        image_size: height and width in pixels of the images it is trained on and predicts; any, the rest of a patch is padded.
        head: its kind and sizes. A pyramid is ViTDet's on a plain encoder and an FPN on a hierarchical one.
        patch_size: side of the encoder's patches in pixels; None for that of its pre-training.
        patch_resize: how a stored kernel of other patches is resized, "flexi" or "bicubic".
        window: rows and columns of tokens in EVA-02's windows; 0: none.
        watched: blocks whose features `encode` returns beside those that are read.
        boundaries: further blocks after which stacked segments end.
        drop_path: of the encoder's last block in training.
        remat: recompute encoder blocks in the backward pass.
        dtype: compute dtype.
    """

    num_classes: int
    encoder: str
    image_size: tuple[int, int]
    head: FcosConfig | RcnnConfig | C4Config
    patch_size: int | None = None
    patch_resize: str = "flexi"
    window: int = 0
    watched: tuple[int, ...] = ()
    boundaries: tuple[int, ...] = ()
    drop_path: float = 0.0
    remat: bool = False
    dtype: str = "float32"


class Detector(nnx.Module):
    """Images to the head's output; `losses` and `detect` make use of it."""

    def __init__(self, config: DetectorConfig, *, rngs: nnx.Rngs):
        """Builds the model with random parameters; encoder weights are loaded into `backbone` afterwards.

        Raises:
            ValueError: a head that does not go with the encoder, or sizes that do not fit together.
        """
        self.config = c = config
        encoder = backbones.entry(c.encoder).config
        staged = isinstance(encoder, backbones.StagedConfig)
        levels = (2,) if isinstance(c.head, C4Config) else c.head.levels
        if not levels or list(levels) != list(range(levels[0], levels[-1] + 1)) or levels[0] < 0 or levels[-1] > 3:
            raise ValueError(f"levels of the pyramid are {levels}; allowed: neighbours of 0, 1, 2, 3, ascending")
        # The last stage of a C4 head is built, and looks at proposals alone.
        read = (2, 3) if isinstance(c.head, C4Config) else levels if staged else (encoder.depth - 1,)
        taps, self.read, self.watched = backbones.join_taps(read, c.watched)
        patch = 16 if staged else c.patch_size or max(encoder.strides)
        strides = [patch * 2.0 ** (level - 2) for level in levels]
        unit = max(patch, int(strides[-1]))
        height, width = (-(-side // unit) * unit for side in c.image_size)
        self.image_size = height, width
        self.backbone = backbones.create(
            c.encoder,
            image_size=self.image_size,
            patch_size=c.patch_size,
            patch_resize=c.patch_resize,
            window=c.window,
            taps=taps,
            boundaries=c.boundaries,
            drop_path=c.drop_path,
            remat=c.remat,
            dtype=c.dtype,
            rngs=rngs,
        )
        shapes = [(int(height / stride), int(width / stride)) for stride in strides]
        kw: Any = dict(dtype=c.dtype, rngs=rngs)
        if isinstance(c.head, C4Config):
            self.neck = None
        else:
            channels = tuple(self.backbone.channels[i] for i in self.read)
            self.neck = (
                Fpn(channels, levels, c.head.channels, **kw) if staged else SimplePyramid(channels[0], levels, c.head.channels, **kw)
            )
            rows, columns = shapes[-1]
            shapes.append((-(-rows // 2), -(-columns // 2)))
            strides.append(2 * strides[-1])
        if isinstance(c.head, FcosConfig):
            self.head = Fcos(c.head, c.num_classes, shapes, strides, **kw)
        else:
            self.head = Rcnn(c.head, c.num_classes, self.backbone, shapes, strides, image_size=c.image_size, **kw)

    def __call__(self, images: Float[Array, "b h w 3"], key: Key[Array, ""] | None = None, train: bool = False) -> Any:
        """The head's output.

        Args:
            images: [b, h, w, 3] normalised for the encoder, of `config.image_size`.
            key: random key that turns drop path on.
            train: there is nothing that differs in training but for drop path.

        Raises:
            ValueError: images of another size.
        """
        if images.shape[1:3] != self.config.image_size:
            raise ValueError(f"the detector was built for images of {self.config.image_size} pixels and got {images.shape[1:3]}")
        return self.decode(self.encode(images, key))

    def encode(self, images: Float[Array, "b h w 3"], key: Key[Array, ""] | None = None) -> tuple[Float[Array, "b _ _ _"], ...]:
        """Features of all taps, read (`read` are their places) and watched (`watched`); arguments as those of the model."""
        missing = [(0, whole - side) for whole, side in zip(self.image_size, self.config.image_size, strict=True)]
        return self.backbone(jnp.pad(images, ((0, 0), *missing, (0, 0))), key)

    def decode(self, features: tuple[Float[Array, "b _ _ _"], ...], key: Key[Array, ""] | None = None, train: bool = False) -> Any:
        """The head's output from features of all taps; nothing is drawn, and nothing differs in training."""
        features = tuple(features[i] for i in self.read)
        return self.head(features[:1] if self.neck is None else self.neck(features))

    def normalizer(self, batch: Mapping[str, Array]) -> Float32[Array, ""]:
        """What the losses of a global batch are divided by; see `Targets.of`."""
        return self.head.normalizer(Targets.of(batch))

    def losses(
        self, output: Any, batch: Mapping[str, Array], normalizer: Float32[Array, ""], key: Key[Array, ""]
    ) -> dict[str, Float32[Array, ""]]:
        """Named loss terms of a part of a batch; they add up to the loss, and those of all parts to that of the batch.

        Args:
            output: of the model.
            batch: `boxes`, `classes`, `valid` and maybe `crowd`; see `Targets.of`.
            normalizer: of the global batch.
            key: draws what losses are computed of.
        """
        return self.head.losses(output, Targets.of(batch), normalizer, key)

    def detect(self, images: Float[Array, "b h w 3"], image_sizes: Float[Array, "b 2"] | None = None) -> Detected:
        """Finds things.

        Args:
            images: [b, h, w, 3] normalised for the encoder, of `config.image_size`.
            image_sizes: height and width in pixels of the image in the upper left corner of each, the rest of which is padding: its
                content has no influence. None: they have no padding.

        Returns:
            Boxes in pixels of the input.
        """
        b, h, w, _ = images.shape
        sizes = jnp.broadcast_to(jnp.asarray((h, w) if image_sizes is None else image_sizes, jnp.float32), (b, 2))
        rows, columns = (jnp.arange(side) < sizes[:, i, None] for i, side in enumerate((h, w)))
        images = jnp.where((rows[:, :, None] & columns[:, None])[..., None], images, 0.0)
        return self.head.detections(self(images), sizes)

    def set_texts(self, embeddings: Float[Array | np.ndarray, "k e"]) -> None:
        """Fills the text classifier.

        Args:
            embeddings: of the class names, of any length, as `jaxdg.backbones.text_embeddings` gives them.

        Raises:
            ValueError: there is no text classifier, or it is for other sizes.
        """
        score = self.head.roi_heads.box_predictor[0].cls_score if isinstance(self.head, Rcnn) else None
        if not isinstance(score, TextScore):
            raise ValueError("this detector has no text classifier; set text_classifier of a C4 head")
        if score.texts[...].shape != embeddings.shape:
            raise ValueError(f"the text classifier holds embeddings {score.texts[...].shape} and got {embeddings.shape}")
        score.texts[...] = jnp.asarray(embeddings, jnp.float32)

    def adapt(self, name: str, tensor: np.ndarray) -> np.ndarray | None:
        """Fits a tensor stored by a detector for another image size to this one, as the encoder does."""
        part, _, rest = name.partition(".")
        return self.backbone.adapt(rest, tensor) if part == "backbone" else tensor

    def unread(self, name: str) -> bool:
        """Whether training leaves this parameter alone: what the encoder says so of, but for the pool of a C4 head."""
        part, _, rest = name.partition(".")
        pooled = isinstance(self.config.head, C4Config) and self.config.head.attention_pool
        return part == "backbone" and self.backbone.unread(rest) and not (pooled and rest.startswith("attnpool."))
