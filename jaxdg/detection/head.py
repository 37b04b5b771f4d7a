"""What every detector's head offers, whatever it computes: features in, boxes and a loss out.

A new head is one file: its settings that build it, and the module. `jaxdg/config/settings.py` lists
the settings of all heads, and that list is all that knows them by name.
"""

from collections.abc import Sequence
from typing import Any

from flax import nnx
from jaxtyping import Array, Float, Float32, Key
import numpy as np

from jaxdg import backbones
from jaxdg.detection.arrays import Detected, Targets


class HeadConfig:
    """A head before it is built; each is a dataclass.

    Attributes:
        levels: of the pyramid that boxes are looked for on, from 0 to 3 with 4 to 32 pixels a
            feature; neighbours, ascending.
    """

    levels: tuple[int, ...]

    def check(self, name: str) -> None:
        """Refuses sizes that do not go together.

        Args:
            name: of these settings in the configuration, for the message.

        Raises:
            ValueError: which, and what is allowed.
        """

    def with_texts(self) -> "HeadConfig":
        """These settings with classes told by the embeddings of their names.

        Raises:
            ValueError: this head has no such classifier.
        """
        raise ValueError(
            "model.text_weights is set; allowed: None but with model.decoder faster_rcnn_c4 and its"
            " attention_pool"
        )

    @property
    def pyramid_channels(self) -> int | None:
        """Channels of the pyramid between encoder and head; None: the head reads the encoder's own
        maps.
        """
        raise NotImplementedError

    def taps(self, encoder: backbones.EncoderConfig) -> tuple[int, ...]:
        """The blocks or stages of the encoder that the detector reads."""
        return self.levels if isinstance(encoder, backbones.StagedConfig) else (encoder.depth - 1,)

    def build(
        self,
        backbone: backbones.Encoder,
        num_classes: int,
        shapes: Sequence[tuple[int, int]],
        strides: Sequence[int | float],
        *,
        image_size: tuple[int, int],
        dtype: str,
        rngs: nnx.Rngs,
    ) -> "Head":
        """The head with random parameters.

        Args:
            backbone: the encoder, of which a head may share modules.
            num_classes: k.
            shapes: rows and columns of each level, finest first.
            strides: pixels a feature of each level.
            image_size: height and width of training images in pixels.
            dtype: compute dtype; predictions are float32.
            rngs: initialises the parameters.

        Raises:
            ValueError: settings that do not fit together, or not with the encoder.
        """
        raise NotImplementedError

    def uses(self, name: str) -> bool:
        """Whether the head reads a parameter of the encoder (by its name there) that no feature
        depends on.
        """
        return False


class Head(nnx.Module):
    """Features to an output that `losses` and `detections` take."""

    def __call__(
        self,
        features: tuple[Float[Array, "b _ _ c"], ...],
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

    def loss_denominator(self, targets: Targets) -> Float32[Array, ""]:
        """What losses are divided by, from the true boxes of the global batch."""
        raise NotImplementedError

    def losses(
        self, output: Any, targets: Targets, denominator: Float32[Array, ""], key: Key[Array, ""]
    ) -> dict[str, Float32[Array, ""]]:
        """Named loss terms of a part of a batch, which add up to the loss.

        Args:
            output: of the head.
            targets: the true boxes.
            denominator: `loss_denominator` of the global batch.
            key: draws what losses are computed of.
        """
        raise NotImplementedError

    def detections(self, output: Any, image_sizes: Float32[Array, "b 2"]) -> Detected:
        """What is found.

        Args:
            output: of the head.
            image_sizes: height and width of each image in pixels, without padding.
        """
        raise NotImplementedError

    def set_texts(self, embeddings: Float[Array | np.ndarray, "k e"]) -> None:
        """Fills the text classifier with the embeddings of the class names.

        Raises:
            ValueError: there is none, or it is for other sizes.
        """
        raise ValueError("this detector has no text classifier; set text_classifier of a C4 head")
