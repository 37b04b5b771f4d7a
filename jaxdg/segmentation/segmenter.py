"""Encoder, optional pyramid and decoder put together: normalised images in, class scores out."""

import dataclasses
from typing import Any

from flax import nnx
import jax
from jaxtyping import Array, Float, Int32, Key
import numpy as np

from jaxdg import backbones
from jaxdg.segmentation.decoder import DecoderConfig
from jaxdg.segmentation.linear import LinearConfig


@dataclasses.dataclass(unsafe_hash=True, kw_only=True)
class SegmenterConfig(backbones.EncoderOptions):
    """A semantic segmentation model: the fields of `EncoderOptions`, and these.

    Attributes:
        num_classes: k.
        image_size: height and width in pixels of what the encoder sees, such as the windows of
            prediction.
        decoder: its kind and sizes; None: the linear one.
        pyramid: "none" reads the taps as they are; "layer" or "batch" builds four levels of a plain
            encoder with that normalisation, "interpolate" four levels without parameters. The
            levels of a hierarchical encoder are always read as they are.
        observed: blocks whose features `encode` also returns, for a loss on them.
        boundaries: further blocks after which stacked segments end.
    """

    num_classes: int
    image_size: tuple[int, int]
    decoder: DecoderConfig | None = None
    pyramid: str = "none"
    observed: tuple[int, ...] = ()
    boundaries: tuple[int, ...] = ()


class Segmenter(nnx.Module):
    """Images to the decoder's output; `head` turns that into class scores or a loss.

    Attributes:
        queries: None, or a module that gives Mask2Former its queries from the encoder, see
            `Mask2Former.__call__`. A training method sets it.
    """

    queries: Any = None

    def __init__(self, config: SegmenterConfig, *, rngs: nnx.Rngs):
        """Builds the model with random parameters; weights are loaded into `backbone` afterwards.

        Raises:
            ValueError: a pyramid that the taps or the image size do not allow, or a decoder without
                the pyramid it needs or with maps of sizes that it cannot join.
        """
        c = config
        self.config = config
        decoder = (c.decoder or LinearConfig(c.num_classes, c.dtype)).sized(c.image_size)
        read = c.taps or decoder.taps(backbones.entry(c.encoder).config)
        taps, self.read = backbones.join_taps(sorted(read), c.observed)
        self.backbone = backbones.build(
            c, taps=taps, image_size=c.image_size, boundaries=c.boundaries, rngs=rngs
        )
        channels = tuple(self.backbone.channels[i] for i in self.read)
        strides = tuple(self.backbone.config.strides[i] for i in self.read)
        hierarchical = isinstance(self.backbone.config, backbones.StagedConfig)
        builds_levels = c.pyramid != "none" and not hierarchical
        if builds_levels:
            check_pyramid(c, len(channels), strides[-1])
        if decoder.needs_levels and not builds_levels and not (hierarchical and len(channels) == 4):
            raise ValueError(
                f"model.decoder {decoder.name} reads four levels of different sizes, and"
                f" {c.encoder} gives {len(channels)} with {', '.join(map(str, strides))} pixels a"
                " feature; set model.pyramid to layer, batch or interpolate, or model.taps to ()"
            )
        if decoder.joins and builds_levels:
            raise ValueError(
                f"model.decoder {decoder.name} joins maps of one size, and model.pyramid"
                f" {c.pyramid!r} makes four sizes of them; set model.pyramid to none"
            )
        if decoder.joins and len(set(strides)) > 1:
            raise ValueError(
                f"model.decoder {decoder.name} joins maps of one size, and {c.encoder} gives"
                f" {len(channels)} with {', '.join(map(str, strides))} pixels a feature; set"
                " model.taps to some of one size"
            )
        self.reads_class_token = decoder.reads_class_token
        last = self.backbone.config.depth - 1
        if decoder.reads_class_token and self.backbone.config.taps[-1] != last:
            raise ValueError(
                f"model.decoder {decoder.name} reads the class token after the last block, {last},"
                f" and model.taps is {c.taps}; let it end there, or set it to ()"
            )
        pyramid = None
        if builds_levels and c.pyramid == "interpolate":
            pyramid = backbones.Interpolation()
        elif builds_levels:
            pyramid = backbones.Pyramid(channels[0], c.pyramid, dtype=c.dtype, rngs=rngs)
        # Assigned once: the first value says whether an attribute holds parameters.
        self.pyramid = pyramid
        self.head = decoder.build(channels, encoder=c.encoder, rngs=rngs)

    def __call__(
        self,
        images: Float[Array, "b h w 3"],
        key: Key[Array, ""] | None = None,
        train: bool = False,
    ) -> Any:
        """The decoder's output, which `head.scores` and `head.loss` take.

        Args:
            images: [b, h, w, 3] normalised for the encoder, of `config.image_size`; with a key
                crops, of which the decoder chooses its view.
            key: random key that turns drop path and dropout on.
            train: use (and update) the batch's own statistics where there are any.
        """
        return self.decode(self.encode(images, key), key, train)

    def encode(
        self, images: Float[Array, "b h w 3"], key: Key[Array, ""] | None = None
    ) -> tuple[Float[Array, "n _ _ _"], ...]:
        """Features of all taps, of which `read` gives the indices for `decode`.

        With a key they are those of the decoder's views of the images. The class token after the
        last block follows, [n, 1, 1, c], if the decoder reads it.
        """
        with jax.named_scope("encoder"):
            if key is not None:
                images = self.head.view(images, _head_key(key))
            if not self.reads_class_token:
                return self.backbone(images, key)
            assert isinstance(self.backbone, backbones.Vit)
            tokens = self.backbone.tokens(images, key)
            return *self.backbone.maps(tokens), tokens[-1][:, :1, None]

    def decode(
        self,
        features: tuple[Float[Array, "b _ _ _"], ...],
        key: Key[Array, ""] | None = None,
        train: bool = False,
    ) -> Any:
        """The decoder's output from the features of all taps."""
        taps = tuple(features[i] for i in self.read)
        more = (taps[-1], features[-1]) if self.reads_class_token else ()
        if self.pyramid is not None:
            with jax.named_scope("pyramid"):
                taps = self.pyramid(taps, train)
        with jax.named_scope("decoder"):
            features = self.head.adapt_features(self.backbone, (*taps, *more))
            drop_key = None if key is None else _head_key(key)
            if self.queries is None:
                return self.head(features, drop_key, train)
            queries = self.queries(self.backbone)
            return self.head(features, drop_key, train, queries=queries)  # pyright: ignore[reportCallIssue]

    def adapt(self, name: str, tensor: np.ndarray) -> np.ndarray | None:
        """Resizes a tensor stored for another image size, as the encoder does."""
        part, _, rest = name.partition(".")
        return self.backbone.adapt(rest, tensor) if part == "backbone" else tensor

    def unused(self, name: str) -> bool:
        """Whether nothing trained depends on this parameter, or the decoder keeps it as loaded.

        That holds for all, if the head is not trained.
        """
        part, _, rest = name.partition(".")
        if not self.head.trained or (part == "head" and self.head.frozen(rest)):
            return True
        return part == "backbone" and self.backbone.unused(rest)

    def scores(self, images: Float[Array, "b h w 3"]) -> Float[Array, "b h w k"]:
        """Class scores at the images' own size; the highest is the predicted class."""
        _, h, w, _ = images.shape
        return self.head.scores(self(images), (h, w))

    def image_scores(
        self,
        images: Float[Array, "b h w 3"],
        window: tuple[int, int],
        stride: tuple[int, int],
        windows_per_call: int | None = None,
        sizes: Int32[Array, "b 2"] | None = None,
    ) -> Float[Array, "b h w k"]:
        """Class scores of whole images of any size, by windows; see `sliding_window`."""
        windows = (window, stride, windows_per_call, sizes)
        return self.head.image_scores(self, images, *windows)


def _head_key(key: Key[Array, ""]) -> Key[Array, ""]:
    """The decoder's key: its draws are others than the encoder's."""
    return jax.random.fold_in(key, 1)


def check_pyramid(config: SegmenterConfig, taps: int, stride: int) -> None:
    """Checks that the taps and the image size allow the pyramid.

    Args:
        config: of the model.
        taps: number of feature maps.
        stride: pixels of a feature of the deepest one.

    Raises:
        ValueError: what to set instead.
    """
    c = config
    if taps != 4:
        raise ValueError(
            f"model.pyramid is {c.pyramid!r}, which reads four taps; model.taps is {c.taps}"
        )
    if min(c.image_size) < 2 * stride:
        h, w = c.image_size
        raise ValueError(
            f"model.pyramid is {c.pyramid!r}, which halves the deepest map; data.crop {h}x{w} is"
            f" too small for it, it must be at least {2 * stride}x{2 * stride}"
        )
