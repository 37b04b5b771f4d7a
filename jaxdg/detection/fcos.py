"""A light detector in one stage, after FCOS (Tian et al. 2019) and ATSS (Zhang et al. 2020): each
point of a pyramid tells what is there.

Two towers of convolutions, shared by all levels, predict for every point the class, a box and how
well that box fits. Different from FCOS:

- A box is told as offsets from a square around the point (as ATSS tells them) and not as distances
  to its four sides. A box that no point lies in can be told as well, and the first prediction is a
  box of about the right size.
- A true box is looked for on one level, by its longer side alone. It has the points close to its
  centre, and before those are given away every box has had a point of its own, so that none is left
  out that shares its place with smaller ones, or lies between points.
- Fit is the IoU of the predicted box with the true one, instead of how central the point is.
"""

from collections.abc import Sequence
import dataclasses
import math
from typing import Any, NamedTuple

from flax import nnx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32, Int32, Key
import numpy as np

from jaxdg.detection import boxes as boxlib
from jaxdg.detection.anchors import points
from jaxdg.detection.arrays import Detected, Targets, take
from jaxdg.detection.head import Head, HeadConfig
from jaxdg.detection.losses import giou_loss, masked_sum, sigmoid_cross_entropy, sigmoid_focal_loss
from jaxdg.detection.nms import nms

SQUARE = 8  # features, the side of the square that a box is told from
LARGEST = 16  # features, the longer side of the largest box of a level
RADIUS = 1.5  # features from the centre of a box to the points that predict it, along either axis
PRIOR = 0.01  # probability of every class before training

normal = nnx.initializers.normal(0.01)


@dataclasses.dataclass(unsafe_hash=True)
class FcosConfig(HeadConfig):
    """Sizes of the light single-stage head; the defaults are those of a small machine, FCOS has 256
    channels and 4 convolutions.

    Attributes:
        channels: of the pyramid and the towers; a multiple of `groups`. Default 128.
        convs: convolutions of each tower. Default 2.
        groups: of the GroupNorm after each. Default 32.
        levels: of the pyramid, 0 to 3 with 4 to 32 pixels a feature, beside one more that is
            coarser. Default 1, 2, 3.
        score_threshold: least score of a detection. Default 0.05.
        candidates: best ones of an image that suppression chooses from. Default 1000.
        nms: IoU above which the better of two boxes of a class suppresses the other. Default 0.6.
        detections: most boxes found in an image. Default 100.
    """

    channels: int = 128
    convs: int = 2
    groups: int = 32
    levels: tuple[int, ...] = (1, 2, 3)
    score_threshold: float = 0.05
    candidates: int = 1000
    nms: float = 0.6
    detections: int = 100

    @property
    def pyramid_channels(self) -> int:
        """See `HeadConfig.pyramid_channels`."""
        return self.channels

    def build(
        self,
        backbone: nnx.Module,
        num_classes: int,
        shapes: Sequence[tuple[int, int]],
        strides: Sequence[int | float],
        *,
        image_size: tuple[int, int],
        dtype: str,
        rngs: nnx.Rngs,
    ) -> "Fcos":
        """See `HeadConfig.build`."""
        return Fcos(self, num_classes, shapes, strides, dtype=dtype, rngs=rngs)


class FcosOutput(NamedTuple):
    """Predictions of all points, finest level first.

    Attributes:
        class_logits: of each class by itself.
        offsets: of the box from the point's square.
        fit_logits: of the IoU with the true box.
    """

    class_logits: Float32[Array, "b n k"]
    offsets: Float32[Array, "b n 4"]
    fit_logits: Float32[Array, "b n"]


class Fcos(Head):
    """Levels of a pyramid to the boxes of things."""

    def __init__(
        self,
        config: FcosConfig,
        num_classes: int,
        shapes: Sequence[tuple[int, int]],
        strides: Sequence[int | float],
        *,
        dtype: str,
        rngs: nnx.Rngs,
    ):
        """Builds the head with random parameters.

        Args:
            config: sizes.
            num_classes: k.
            shapes: rows and columns of each level, finest first.
            strides: pixels a feature of each level.
            dtype: compute dtype; predictions are float32.
            rngs: initialises the parameters.

        Raises:
            ValueError: channels that the groups do not divide.
        """
        c = config.channels
        if c % config.groups:
            raise ValueError(
                f"channels of the single-stage head are {c}; they must divide by groups,"
                f" {config.groups}"
            )
        self.config = config
        self.num_classes = num_classes
        self.shapes = tuple(shapes)
        self.strides = tuple(strides)
        kw: Any = dict(kernel_size=(3, 3), kernel_init=normal, dtype=jnp.dtype(dtype), rngs=rngs)

        def tower():
            def pair():
                return (
                    nnx.Conv(c, c, **kw),
                    nnx.GroupNorm(
                        c, config.groups, epsilon=1e-5, use_fast_variance=False, rngs=rngs
                    ),
                )

            return nnx.List(
                [layer for _ in range(config.convs) for layer in (*pair(), jax.nn.relu)]
            )

        self.cls_tower = tower()
        self.bbox_tower = tower()
        rare = nnx.initializers.constant(-math.log((1 - PRIOR) / PRIOR))
        self.cls_logits = nnx.Conv(c, num_classes, bias_init=rare, **kw)
        self.bbox_pred = nnx.Conv(c, 4, **kw)
        self.fit = nnx.Conv(c, 1, **kw)

    def __call__(
        self,
        features: tuple[Float[Array, "b _ _ c"], ...],
        key: Key[Array, ""] | None = None,
        train: bool = False,
    ) -> FcosOutput:
        """The maps of all levels, finest first, to predictions; the same in training."""

        def level(x):
            classes = boxes = x
            for layer in self.cls_tower:
                classes = layer(classes)
            for layer in self.bbox_tower:
                boxes = layer(boxes)

            def flat(y):
                return y.reshape(y.shape[0], -1, y.shape[-1]).astype(jnp.float32)

            return (
                flat(self.cls_logits(classes)),
                flat(self.bbox_pred(boxes)),
                flat(self.fit(boxes))[..., 0],
            )

        return FcosOutput(
            *(jnp.concatenate(parts, axis=1) for parts in zip(*map(level, features), strict=True))
        )

    @property
    def squares(self) -> Float32[Array, "n 4"]:
        """The squares around all points, which box offsets refer to."""
        squares = []
        for centres, stride in zip(points(self.shapes, self.strides), self.strides, strict=True):
            half = stride * SQUARE / 2
            squares.append(jnp.concatenate([centres - half, centres + half], axis=-1))
        return jnp.concatenate(squares)

    def assign(self, targets: Targets) -> Int32[Array, "b n"]:
        """The true box that each point predicts, -1 for none."""
        return assign_points(targets, points(self.shapes, self.strides), self.strides)

    def loss_denominator(self, targets: Targets) -> Float32[Array, ""]:
        """What losses are divided by: the points of the global batch that predict a box (at least
        1).
        """
        return jnp.maximum(jnp.sum(self.assign(targets) >= 0), 1).astype(jnp.float32)

    def losses(
        self,
        output: FcosOutput,
        targets: Targets,
        denominator: Float32[Array, ""],
        key: Key[Array, ""] | None = None,
    ) -> dict[str, Float32[Array, ""]]:
        """The terms "class" (focal), "box" (generalised IoU) and "fit" (cross entropy); nothing is
        drawn, so `key` is not used.
        """
        index = self.assign(targets)
        positive = index >= 0
        index = jnp.maximum(index, 0)
        wanted = jax.nn.one_hot(
            jnp.where(positive, take(targets.classes, index), -1), self.num_classes
        )  # -1 is none of them
        truth = take(targets.boxes, index)
        predicted = boxlib.decode(output.offsets, self.squares)
        fit = jax.lax.stop_gradient(boxlib.iou(predicted, truth))
        return {
            "class": jnp.sum(sigmoid_focal_loss(output.class_logits, wanted)) / denominator,
            "box": masked_sum(giou_loss(predicted, truth), positive) / denominator,
            "fit": (
                masked_sum(sigmoid_cross_entropy(output.fit_logits, fit), positive) / denominator
            ),
        }

    def detections(self, output: FcosOutput, image_sizes: Float32[Array, "b 2"]) -> Detected:
        """What is found; a box's score is the geometric mean of the probabilities of its class and
        of its fit.

        Args:
            output: of the head.
            image_sizes: height and width of each image in pixels, without padding.
        """
        c = self.config
        scores = jnp.sqrt(
            jax.nn.sigmoid(output.class_logits) * jax.nn.sigmoid(output.fit_logits)[..., None]
        )
        inside = boxlib.clip(boxlib.decode(output.offsets, self.squares), image_sizes[:, None])
        scores = jnp.where(boxlib.non_empty(inside)[..., None], scores, 0.0).reshape(
            len(scores), -1
        )
        scores, place = jax.lax.top_k(scores, min(c.candidates, scores.shape[1]))
        boxes = take(inside, place // self.num_classes)
        classes = place % self.num_classes
        kept, valid = nms(boxes, scores, scores > c.score_threshold, c.nms, c.detections, classes)
        return Detected.of(take(boxes, kept), take(scores, kept), take(classes, kept), valid)


def assign_points(
    targets: Targets, grid: Sequence[Float[Array, "_ 2"]], strides: Sequence[float]
) -> Int32[Array, "b n"]:
    """Which true box each point predicts.

    A box is looked for on the finest level whose features its longer side is not too many of. Boxes
    choose, the smallest first: each takes the free point of its level that is nearest to its
    centre, as long as there is one. What is left of the points inside a box and near its centre is
    then given to it, where several want one again to the smallest.

    Args:
        targets: true boxes.
        grid: places of the points of each level, finest first, in pixels.
        strides: pixels a feature of each level.

    Returns:
        Indices of boxes, -1 for none.
    """
    counts = [len(level) for level in grid]
    x, y = jnp.concatenate(list(grid)).T
    point_level = np.repeat(np.arange(len(grid)), counts)
    reach = RADIUS * np.repeat(np.asarray(strides, np.float32), counts)
    limits = LARGEST * np.asarray(strides[:-1], np.float32)

    def image(boxes, valid):
        def choose(owners, box):
            chosen, given = owners
            x0, y0, x1, y1 = boxes[box]
            mine = valid[box] & (point_level == jnp.sum(jnp.maximum(x1 - x0, y1 - y0) > limits))
            across = jnp.abs(x - (x0 + x1) / 2)
            down = jnp.abs(y - (y0 + y1) / 2)
            free = mine & (chosen < 0)
            nearest = jnp.argmin(jnp.where(free, across**2 + down**2, jnp.inf)) == jnp.arange(
                len(x)
            )
            near = (
                mine
                & (x > x0)
                & (x < x1)
                & (y > y0)
                & (y < y1)
                & (jnp.maximum(across, down) < reach)
            )
            return (
                jnp.where(free & nearest, box, chosen),
                jnp.where(near & (given < 0), box, given),
            ), None

        nobody = jnp.full(len(x), -1, jnp.int32)
        order = jnp.argsort(boxlib.area(boxes), stable=True).astype(jnp.int32)
        (chosen, given), _ = jax.lax.scan(choose, (nobody, nobody), order)
        return jnp.where(chosen >= 0, chosen, given)

    return jax.vmap(image)(targets.boxes, targets.valid)
