"""Encoder, optional pyramid and decoder put together: normalised images in, class scores out."""

import dataclasses
from typing import Any

from flax import nnx
import jax
from jaxtyping import Array, Float, Key
import numpy as np

from jaxdg import backbones
from jaxdg.segmentation import clip_text
from jaxdg.segmentation.clip_text import ClipTextHead, ClipTextHeadConfig
from jaxdg.segmentation.linear import LinearHead
from jaxdg.segmentation.mask2former import Mask2Former, Mask2FormerConfig
from jaxdg.segmentation.segformer import SegformerConfig, SegformerHead


@dataclasses.dataclass(frozen=True)
class SegmenterConfig:
    """A semantic segmentation model.

    Attributes:
        num_classes: k.
        encoder: name in the zoo.
        image_size: height and width in pixels of the crops it is trained on and the windows it predicts.
        taps: blocks whose features are read, from 0; () for the last block of each quarter.
        decoder: of another kind than the linear one, which None is.
        patch_size: side of the encoder's patches in pixels; None for that of its pre-training.
        patch_resize: how a stored kernel of other patches is resized, "flexi" or "bicubic".
        window: rows and columns of tokens in EVA-02's windows; 0: none.
        pyramid: "none" reads the taps as they are; "layer" or "batch" builds four levels of a plain encoder with that normalisation.
            A hierarchical encoder has its own levels, which are always read as they are.
        watched: blocks whose features `encode` returns beside those that are read.
        boundaries: further blocks after which stacked segments end.
        drop_path: of the encoder's last block in training.
        remat: recompute encoder blocks in the backward pass.
        dtype: compute dtype.
    """

    num_classes: int
    encoder: str
    image_size: tuple[int, int]
    decoder: Mask2FormerConfig | SegformerConfig | ClipTextHeadConfig | None = None
    taps: tuple[int, ...] = ()
    patch_size: int | None = None
    patch_resize: str = "flexi"
    window: int = 0
    pyramid: str = "none"
    watched: tuple[int, ...] = ()
    boundaries: tuple[int, ...] = ()
    drop_path: float = 0.0
    remat: bool = False
    dtype: str = "float32"


class Segmenter(nnx.Module):
    """Images to the decoder's output; `head` turns that into class scores or a loss."""

    def __init__(self, config: SegmenterConfig, *, rngs: nnx.Rngs):
        """Builds the model with random parameters; encoder weights are loaded into `backbone` afterwards.

        Raises:
            ValueError: a pyramid that the taps or the image size do not allow, or a decoder without the pyramid it needs.
        """
        c = config
        self.config = config
        read = clip_text.taps(c.encoder) if isinstance(c.decoder, ClipTextHeadConfig) else c.taps or backbones.entry(c.encoder).config.taps
        taps, self.read, self.watched = backbones.join_taps(sorted(read), c.watched)
        self.backbone = backbones.create(
            c.encoder,
            image_size=c.image_size,
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
        channels, strides = (tuple(x[i] for i in self.read) for x in (self.backbone.channels, self.backbone.config.strides))
        hierarchical = isinstance(self.backbone.config, backbones.StagedConfig)
        if c.pyramid != "none" and not hierarchical:
            if len(channels) != 4:
                raise ValueError(f"model.pyramid is {c.pyramid!r}, which reads four taps; model.taps is {c.taps}")
            if min(c.image_size) < (side := 2 * strides[-1]):
                (h, w) = c.image_size
                raise ValueError(
                    f"model.pyramid is {c.pyramid!r}, which halves the deepest map; data.crop {h}x{w} is too small for it, "
                    f"it must be at least {side}x{side}"
                )
        built = c.pyramid != "none" and not hierarchical
        self.pyramid = backbones.Pyramid(channels[0], c.pyramid, dtype=c.dtype, rngs=rngs) if built else None
        if c.decoder is None:
            self.head = LinearHead(c.num_classes, channels, dtype=c.dtype, rngs=rngs)
        elif isinstance(c.decoder, SegformerConfig):
            self.head = SegformerHead(c.decoder, channels, rngs=rngs)
        elif isinstance(c.decoder, ClipTextHeadConfig):
            self.head = ClipTextHead(c.decoder, c.encoder, rngs=rngs)
        elif not (built or (hierarchical and len(channels) == 4)):
            raise ValueError(
                f"model.decoder mask2former reads four levels of different sizes, and {c.encoder} gives {len(channels)} with "
                f"{', '.join(map(str, strides))} pixels a feature; set model.pyramid to layer or batch, or model.taps to ()"
            )
        else:
            self.head = Mask2Former(c.decoder, channels, rngs=rngs)

    def __call__(self, images: Float[Array, "b h w 3"], key: Key[Array, ""] | None = None, train: bool = False) -> Any:
        """The decoder's output, which `head.scores` and `head.loss` take.

        Args:
            images: [b, h, w, 3] normalised for the encoder, of `config.image_size`.
            key: random key that turns drop path and dropout on.
            train: use (and update) the batch's own statistics where there are any.
        """
        if isinstance(self.head, ClipTextHead):
            return self.head(clip_text.values(self.backbone, images))
        return self.decode(self.encode(images, key), key, train)

    def encode(self, images: Float[Array, "b h w 3"], key: Key[Array, ""] | None = None) -> tuple[Float[Array, "b _ _ _"], ...]:
        """Features of all taps, read (`read` are their places) and watched (`watched`); arguments as those of the model."""
        return self.backbone(images, key)

    def decode(self, features: tuple[Float[Array, "b _ _ _"], ...], key: Key[Array, ""] | None = None, train: bool = False) -> Any:
        """The decoder's output from features of all taps; other arguments as those of the model."""
        features = tuple(features[i] for i in self.read)
        if self.pyramid is not None:
            features = self.pyramid(features, train)
        if isinstance(self.head, SegformerHead):  # the other decoders do the same in training
            return self.head(features, None if key is None else jax.random.fold_in(key, 1), train)
        head: Any = self.head
        return head(features)

    def adapt(self, name: str, tensor: np.ndarray) -> np.ndarray | None:
        """Fits a tensor stored by a segmenter for another image size to this one, as the encoder does."""
        part, _, rest = name.partition(".")
        return self.backbone.adapt(rest, tensor) if part == "backbone" else tensor

    def unread(self, name: str) -> bool:
        """Whether training leaves this parameter alone: the encoder says so, or the decoder, that nothing is trained."""
        part, _, rest = name.partition(".")
        return isinstance(self.head, ClipTextHead) or (part == "backbone" and self.backbone.unread(rest))

    def scores(self, images: Float[Array, "b h w 3"]) -> Float[Array, "b h w k"]:
        """Class scores at the images' own size; the highest is the predicted class."""
        _, h, w, _ = images.shape
        return self.head.scores(self(images), (h, w))
