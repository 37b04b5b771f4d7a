"""What every detection head offers: its settings, and a module from features to boxes and a loss.

A new head is one file with both. `jaxdg/config/settings.py` lists the settings of all heads; no
other file knows them by name.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

from flax import nnx
from jaxtyping import Array, Float, Float32, Int32, Key
import numpy as np

from jaxdg import backbones
from jaxdg.detection.arrays import Detected, Targets


class HeadContext(NamedTuple):
    """What a head is built for.

    Attributes:
        backbone: the encoder, whose modules a head may share.
        num_classes: k.
        shapes: rows and columns of each level, finest first.
        strides: pixels a feature of each level.
        image_size: height and width of training images in pixels.
        dtype: compute dtype; predictions are float32.
    """

    backbone: nnx.Module
    num_classes: int
    shapes: Sequence[tuple[int, int]]
    strides: Sequence[int | float]
    image_size: tuple[int, int]
    dtype: str


class Judged(NamedTuple):
    """The places whose classes a head's losses compare with the truth.

    Attributes:
        boxes: in pixels, proposals; a point is a box without sides.
        points: whether they are points.
        logits: of each of c choices that are independent of one another, those of its o outcomes.
        truth: the right outcome of each choice.
        share: of a place in the mean that the loss is; 0 where it does not count. The shares of the
            parts of a batch belong to one mean.
        offsets: of the box of each place from the place, in the head's own units; where there are
            several, those of the right class.
        box_share: of a place in the mean over the places that have a box; 0 where it has none.
    """

    boxes: Float32[Array, "b p 4"]
    points: bool
    logits: Float32[Array, "b p c o"]
    truth: Int32[Array, "b p c"]
    share: Float32[Array, "b p"]
    offsets: Float32[Array, "b p 4"]
    box_share: Float32[Array, "b p"]


class HeadConfig:
    """The settings of a head; each is a dataclass.

    Attributes:
        levels: of the pyramid on which boxes are predicted: consecutive and ascending, from 0 to 3,
            with 4 to 32 pixels a feature.
    """

    levels: tuple[int, ...]

    def check(self, name: str) -> None:
        """Checks that the sizes go together.

        Args:
            name: of these settings in the configuration, for the message.

        Raises:
            ValueError: which do not, and what is allowed.
        """

    def with_texts(self) -> "HeadConfig":
        """These settings with a classifier made of the class names' embeddings.

        Raises:
            ValueError: this head has no such classifier.
        """
        raise ValueError(
            "model.text_weights is set; allowed: None but with model.decoder faster_rcnn_c4 and its"
            " attention_pool"
        )

    @property
    def scenes(self) -> tuple[str, ...]:
        """Sentences about scenes whose embeddings the head reads, see `Head.set_scenes`."""
        return ()

    @property
    def scene_file(self) -> str | None:
        """A file of vectors that stand in for the embeddings of `scenes`."""
        return None

    @property
    def pyramid_channels(self) -> int | None:
        """Channels of the pyramid before the head; None: it reads the encoder's own maps."""
        raise NotImplementedError

    def taps(self, encoder: backbones.EncoderConfig) -> tuple[int, ...]:
        """The blocks or stages of the encoder that the detector reads."""
        return self.levels if isinstance(encoder, backbones.StagedConfig) else (encoder.depth - 1,)

    def build(self, context: HeadContext, *, rngs: nnx.Rngs) -> "Head":
        """The head with random parameters, drawn from `rngs`.

        Raises:
            ValueError: settings that do not fit together, or not with the encoder.
        """
        raise NotImplementedError

    def uses(self, name: str) -> bool:
        """Whether the head reads this parameter of the encoder, given that no feature does."""
        return False


class Head(nnx.Module):
    """Features to an output, which `losses` and `detections` take."""

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

    def loss_denominator(self, targets: Targets) -> Any:
        """What losses are divided by, from the true boxes of the global batch: scalars."""
        raise NotImplementedError

    def losses(
        self, output: Any, targets: Targets, denominator: Any, key: Key[Array, ""]
    ) -> dict[str, Float32[Array, ""]]:
        """Named loss terms of a part of a batch, which add up to the loss.

        Args:
            output: of the head.
            targets: the true boxes.
            denominator: `loss_denominator` of the global batch.
            key: for random draws, as of the anchors that count.
        """
        raise NotImplementedError

    @property
    def choices(self) -> tuple[int, int]:
        """How many choices the class of a place consists of, and their outcomes; see `Judged`."""
        raise NotImplementedError

    def judge(
        self, output: Any, targets: Targets, denominator: Any, key: Key[Array, ""]
    ) -> tuple[dict[str, Float32[Array, ""]], Judged | None]:
        """What `losses` returns, and the places that they judge; None if the head does not tell."""
        return self.losses(output, targets, denominator, key), None

    def rejudge(self, output: Any, judged: Judged) -> Judged:
        """The same proposals judged in other features, in training; for a head that has proposals.

        Args:
            output: of the head, for the other features.
            judged: of `judge`, a row for each of the output. Truth and shares stay.
        """
        raise NotImplementedError

    def reread(
        self,
        output: Any,
        features: tuple[Float[Array, "b _ _ c"], ...],
        key: Key[Array, ""] | None = None,
        train: bool = False,
    ) -> Any:
        """An output whose boxes are read from other features; proposals stay.

        Args:
            output: of the head.
            features: one map a level, finest first.
            key: as in a call.
            train: as in a call.
        """
        return self(features, key, train)

    def detections(self, output: Any, image_sizes: Float32[Array, "b 2"]) -> Detected:
        """The detected boxes.

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

    def set_scenes(self, embeddings: Float[Array | np.ndarray, "p e"]) -> None:
        """Fills in the embeddings of `HeadConfig.scenes`.

        Raises:
            ValueError: the head reads no scenes, or other sizes.
        """
        raise ValueError("this detector reads no scenes; set gates.scenes of a gated head")
