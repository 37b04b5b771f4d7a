"""What every decoder offers, whatever it computes: features in, class scores and a loss out.

A new decoder is one file: its settings, its config that builds it, and the module.
`jaxdg/config/settings.py` lists the settings of all decoders; no other file knows them by name.
"""

from collections.abc import Sequence
import dataclasses
from pathlib import Path
from typing import Any

from flax import nnx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32, Int32, Key, UInt8

from jaxdg import backbones
from jaxdg.evaluation.sliding_window import sliding_window


@dataclasses.dataclass(unsafe_hash=True)
class DecoderOptions:
    """The settings of a decoder that a run may change; each decoder documents its own.

    `needs_text` says whether it needs the converted text tower that `model.text_weights` names.
    """

    needs_text = False

    def window(self, crop: tuple[int, int]) -> tuple[int, int]:
        """Height and width of what the encoder sees at once, in pixels: by default the crop.

        Args:
            crop: `data.crop`, the size of the images of a training batch.

        Raises:
            ValueError: crops that the decoder cannot use.
        """
        return crop

    def config(self, classes: Sequence[str], dtype: str) -> "DecoderConfig":
        """These settings joined with those of the run.

        Args:
            classes: their names.
            dtype: compute dtype.

        Raises:
            ValueError: settings that do not go with the classes.
        """
        raise NotImplementedError


class DecoderConfig:
    """A decoder before it is built; each is a frozen or hashable dataclass.

    Attributes:
        name: its value of `model.decoder`, for messages.
        needs_levels: whether it reads four maps of different sizes rather than maps of any sizes.
        joins: whether it reads maps of one size, of which there may be any number.
        reads_class_token: whether it also reads, behind the maps, the last block's map and its
            class token as a map of one pixel.
    """

    name = ""
    needs_levels = False
    joins = False
    reads_class_token = False

    def taps(self, encoder: backbones.EncoderConfig) -> tuple[int, ...]:
        """The blocks or stages that it reads where `model.taps` names none."""
        return encoder.taps

    def sized(self, image_size: tuple[int, int]) -> "DecoderConfig":
        """This decoder behind an encoder that sees images of this height and width, in pixels."""
        return self

    def build(self, channels: Sequence[int], *, encoder: str, rngs: nnx.Rngs) -> "Decoder":
        """The decoder with random parameters.

        Args:
            channels: of each feature map that it reads, finest first.
            encoder: name in the zoo.
            rngs: initialises the parameters.

        Raises:
            ValueError: settings that do not fit together, or not with the encoder.
        """
        raise NotImplementedError


class Decoder(nnx.Module):
    """Features to an output that `scores` and `loss` take.

    Attributes:
        trained: whether training changes its parameters and those of the encoder.
        views: images that `view` makes of each.
    """

    trained = True
    views = 1

    def view(
        self, images: Float[Array, "b h w c"], key: Key[Array, ""]
    ) -> Float[Array, "n h2 w2 c"]:
        """What the encoder sees of the crops of a training batch: by default the crops.

        Args:
            images: normalised crops.
            key: the key that `__call__` will get with the features.

        Returns:
            `views` images for each crop, one after another.
        """
        return images

    def __call__(
        self,
        features: tuple[Float[Array, "b _ _ _"], ...],
        key: Key[Array, ""] | None = None,
        train: bool = False,
    ) -> Any:
        """The output.

        Args:
            features: one map a level, finest first.
            key: random key that turns dropout on.
            train: use (and update) the batch's own statistics where there are any.
        """
        raise NotImplementedError

    def scores(self, output: Any, size: tuple[int, int]) -> Float[Array, "b H W k"]:
        """Class scores at an image size (height and width); the highest is the predicted class."""
        raise NotImplementedError

    def image_scores(
        self,
        model: Any,
        images: Float[Array, "b h w c"],
        window: tuple[int, int],
        stride: tuple[int, int],
        windows_per_call: int | None = None,
        sizes: Int32[Array, "b 2"] | None = None,
    ) -> Float[Array, "b h w k"]:
        """Class scores of whole images; by default the mean of those of their windows.

        Args:
            model: the segmenter of this head.
            images: see `sliding_window`, as for all that follows.
            window: height and width of a window.
            stride: from one window to the next.
            windows_per_call: most windows at once.
            sizes: of the images.
        """
        return sliding_window(model.scores, images, window, stride, windows_per_call, sizes)

    def probabilities(self, scores: Float[Array, "b h w k"]) -> Float32[Array, "b h w k"]:
        """Class scores as probabilities, which add up to 1: by default their softmax, as of logits.

        A decoder whose scores are no logits has its own.

        Args:
            scores: from `scores` or `image_scores`.
        """
        return jax.nn.softmax(scores.astype(jnp.float32))

    def loss_denominator(self, label: UInt8[Array, "b H W"]) -> Any:
        """A tree of scalars that the loss terms are divided by, from the global batch's labels."""
        raise NotImplementedError

    def loss(
        self, output: Any, label: UInt8[Array, "b H W"], denominator: Any, key: Key[Array, ""]
    ) -> dict[str, Float[Array, ""]]:
        """Named loss terms of a part of a batch, which add up to the loss.

        Args:
            output: of the decoder.
            label: class ids, 255 where nothing is labelled.
            denominator: `loss_denominator` of the global batch.
            key: for random draws, as of the points that the loss compares.
        """
        raise NotImplementedError

    def frozen(self, name: str) -> bool:
        """Whether a parameter of this decoder stays as loaded in every training."""
        return False

    def adapt_features(
        self, backbone: backbones.Encoder, features: tuple[Float[Array, "b _ _ _"], ...]
    ) -> tuple[Float[Array, "b _ _ _"], ...]:
        """Turns the features at the taps into those that the decoder reads; by default the same."""
        return features

    def load_text(self, path: str | Path) -> None:
        """Fills what comes from a converted text tower.

        Raises:
            ValueError: this decoder reads no text.
        """
        raise ValueError(
            f"model.text_weights is {path}; allowed: None, as this decoder reads no text"
        )
