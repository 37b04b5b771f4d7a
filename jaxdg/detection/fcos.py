"""A light single-stage detector, after FCOS (Tian et al. 2019) and ATSS (Zhang et al. 2020).

Two towers of convolutions, shared by all levels of a pyramid, predict for every point the class, a
box and how well that box fits. Different from FCOS:

- A box is predicted as offsets from a square around the point, as in ATSS, and not as distances to
  its four sides. So a point outside a box can predict it, and the untrained head predicts boxes of
  about the right size.
- The longer side of a true box chooses the one level that predicts it, by the points close to the
  box's centre. Before that, each box is given a point of its own. So no box is left out because it
  lies between points, or shares its place with smaller boxes.
- Fit is the IoU of the predicted box with the true one, instead of how central the point is.
"""

from collections.abc import Sequence
import dataclasses
from functools import partial
import math
from typing import NamedTuple

from flax import nnx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32, Int32, Key
import numpy as np

from jaxdg.backbones.layers import Conv
from jaxdg.detection import boxes as boxlib
from jaxdg.detection.anchors import points
from jaxdg.detection.arrays import Detected, Targets, take
from jaxdg.detection.interface import Head, HeadConfig, HeadContext, Judged
from jaxdg.detection.losses import giou_loss, masked_sum, sigmoid_cross_entropy, sigmoid_focal_loss
from jaxdg.detection.nms import nms
from jaxdg.ranges import Count, PositiveOrZero, Share

# In features of the level: the side of the square that box offsets refer to, the longer side of the
# largest box, and how far along either axis a point that predicts a box may be from its centre.
SQUARE = 8
LARGEST = 16
RADIUS = 1.5
PRIOR = 0.01  # probability of every class before training
PRIOR_LOGIT = -math.log((1 - PRIOR) / PRIOR)

normal = nnx.initializers.normal(0.01)


@dataclasses.dataclass(unsafe_hash=True)
class FcosConfig(HeadConfig):
    """Sizes of the light single-stage head.

    The defaults suit a small machine; FCOS has 256 channels and 4 convolutions.

    Attributes:
        channels: of the pyramid and the towers; a multiple of `groups`. Default 128.
        convs: convolutions of each tower. Default 2.
        groups: of the GroupNorm after each. Default 32.
        levels: of the pyramid, 0 to 3 with 4 to 32 pixels a feature, beside one more that is
            coarser. Default 1, 2, 3.
        score_threshold: least score of a detection. Default 0.05.
        candidates: most scores of an image that NMS chooses from, the best. Default 1000.
        nms: IoU above which the better of two boxes of a class suppresses the other. Default 0.6.
        detections: most boxes detected in an image. Default 100.
        logit_penalty: weight of the mean squared class logit of all points, counted from the logit
            before training: G-NAS's G-loss, whose logits start at 0. Default 0.
    """

    channels: Count = 128
    convs: Count = 2
    groups: Count = 32
    levels: tuple[int, ...] = (1, 2, 3)
    score_threshold: Share = 0.05
    candidates: Count = 1000
    nms: Share = 0.6
    detections: Count = 100
    logit_penalty: PositiveOrZero = 0.0

    @property
    def pyramid_channels(self) -> int:
        """See `HeadConfig.pyramid_channels`."""
        return self.channels

    def build(self, context: HeadContext, *, rngs: nnx.Rngs) -> "Fcos":
        """See `HeadConfig.build`."""
        return Fcos(self, context, rngs=rngs)


class FcosOutput(NamedTuple):
    """Predictions of all points, finest level first.

    Attributes:
        class_logits: of each class, independent of the others.
        offsets: of the box from the point's square.
        fit_logits: of the IoU with the true box.
    """

    class_logits: Float32[Array, "b n k"]
    offsets: Float32[Array, "b n 4"]
    fit_logits: Float32[Array, "b n"]


class FcosDenominator(NamedTuple):
    """What the loss terms of a global batch are divided by.

    Attributes:
        points: that predict a box, at least 1.
        images: of the batch.
    """

    points: Float32[Array, ""]
    images: Float32[Array, ""]


class Fcos(Head):
    """Levels of a pyramid to boxes."""

    def __init__(self, config: FcosConfig, context: HeadContext, *, rngs: nnx.Rngs):
        """See `HeadConfig.build`.

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
        self.num_classes = context.num_classes
        self.shapes = tuple(context.shapes)
        self.strides = tuple(context.strides)
        dtype = jnp.dtype(context.dtype)
        conv = partial(Conv, c, kernel_size=(3, 3), kernel_init=normal, dtype=dtype, rngs=rngs)
        norm = partial(nnx.GroupNorm, c, config.groups, epsilon=1e-5, use_fast_variance=False)

        def tower():
            layers = []
            for _ in range(config.convs):
                layers += [conv(c), norm(rngs=rngs), jax.nn.relu]
            return nnx.List(layers)

        self.cls_tower = tower()
        self.bbox_tower = tower()
        rare = nnx.initializers.constant(PRIOR_LOGIT)
        self.cls_logits = conv(context.num_classes, bias_init=rare)
        self.bbox_pred = conv(4)
        self.fit = conv(1)

    def __call__(
        self,
        features: tuple[Float[Array, "b _ _ c"], ...],
        key: Key[Array, ""] | None = None,
        train: bool = False,
    ) -> FcosOutput:
        """Predictions from one map a level, finest first; the same in training."""

        def flat(x):
            return x.reshape(x.shape[0], -1, x.shape[-1]).astype(jnp.float32)

        def level(x):
            classes = boxes = x
            for layer in self.cls_tower:
                classes = layer(classes)
            for layer in self.bbox_tower:
                boxes = layer(boxes)
            fit = flat(self.fit(boxes))[..., 0]
            return flat(self.cls_logits(classes)), flat(self.bbox_pred(boxes)), fit

        levels = zip(*map(level, features), strict=True)
        return FcosOutput(*(jnp.concatenate(parts, axis=1) for parts in levels))

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

    def loss_denominator(self, targets: Targets) -> FcosDenominator:
        """See `Head.loss_denominator`."""
        count = jnp.maximum(jnp.sum(self.assign(targets) >= 0), 1).astype(jnp.float32)
        return FcosDenominator(count, jnp.asarray(len(targets.valid), jnp.float32))

    def losses(
        self,
        output: FcosOutput,
        targets: Targets,
        denominator: FcosDenominator,
        key: Key[Array, ""] | None = None,
    ) -> dict[str, Float32[Array, ""]]:
        """The terms "class" (focal), "box" (generalised IoU) and "fit" (cross entropy).

        With `logit_penalty` there is the term "logits" too. `key` is not used: nothing is random.
        """
        return self.judge(output, targets, denominator, key)[0]

    @property
    def choices(self) -> tuple[int, int]:
        """See `Head.choices`: whether it is of each class."""
        return self.num_classes, 2

    def judge(
        self,
        output: FcosOutput,
        targets: Targets,
        denominator: FcosDenominator,
        key: Key[Array, ""] | None = None,
    ) -> tuple[dict[str, Float32[Array, ""]], Judged]:
        """See `Head.judge`: the points that predict a box count."""
        index = self.assign(targets)
        positive = index >= 0
        index = jnp.maximum(index, 0)
        # Class -1, of points without a box, has a row of zeros.
        classes = jnp.where(positive, take(targets.classes, index), -1)
        true_classes = jax.nn.one_hot(classes, self.num_classes)
        truth = take(targets.boxes, index)
        predicted = boxlib.decode(output.offsets, self.squares)
        fit = jax.lax.stop_gradient(boxlib.iou(predicted, truth))
        fit_loss = sigmoid_cross_entropy(output.fit_logits, fit)
        count = denominator.points
        terms = {
            "class": jnp.sum(sigmoid_focal_loss(output.class_logits, true_classes)) / count,
            "box": masked_sum(giou_loss(predicted, truth), positive) / count,
            "fit": masked_sum(fit_loss, positive) / count,
        }
        weight = self.config.logit_penalty
        if weight:
            squared = jnp.mean((output.class_logits - PRIOR_LOGIT) ** 2, axis=(1, 2))
            terms["logits"] = weight * jnp.sum(squared) / denominator.images
        share = jnp.where(positive, 1 / count, 0.0)
        places = jnp.tile(jnp.concatenate(points(self.shapes, self.strides)), 2)
        return terms, Judged(
            boxes=jnp.broadcast_to(places, (len(positive), *places.shape)),
            points=True,
            logits=jnp.stack([output.class_logits, jnp.zeros_like(output.class_logits)], axis=-1),
            truth=jnp.where(true_classes > 0, 0, 1).astype(jnp.int32),
            share=share,
            offsets=output.offsets,
            box_share=share,
        )

    def detections(self, output: FcosOutput, image_sizes: Float32[Array, "b 2"]) -> Detected:
        """See `Head.detections`; a score is the geometric mean of class and fit probabilities."""
        c = self.config
        fit = jax.nn.sigmoid(output.fit_logits)[..., None]
        scores = jnp.sqrt(jax.nn.sigmoid(output.class_logits) * fit)
        inside = boxlib.clip(boxlib.decode(output.offsets, self.squares), image_sizes[:, None])
        scores = jnp.where(boxlib.non_empty(inside)[..., None], scores, 0.0)
        scores = scores.reshape(len(scores), -1)
        scores, place = jax.lax.top_k(scores, min(c.candidates, scores.shape[1]))
        boxes = take(inside, place // self.num_classes)
        classes = place % self.num_classes
        kept, valid = nms(boxes, scores, scores > c.score_threshold, c.nms, c.detections, classes)
        return Detected.of(take(boxes, kept), take(scores, kept), take(classes, kept), valid)


@jax.named_scope("matching")
def assign_points(
    targets: Targets, grid: Sequence[Float[Array, "_ 2"]], strides: Sequence[float]
) -> Int32[Array, "b n"]:
    """Which true box each point predicts.

    A box belongs to the finest level on which its longer side is at most `LARGEST` features. Each
    box, the smallest first, takes the free point of its level that is nearest to its centre, if
    there is one. Each point left over then predicts the smallest box of its level that contains it
    and has its centre within `RADIUS`.

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
        def assign_box(assigned, box):
            nearest, inside = assigned  # the box of each point by the first and by the second rule
            x0, y0, x1, y1 = boxes[box]
            level = jnp.sum(jnp.maximum(x1 - x0, y1 - y0) > limits)
            on_level = valid[box] & (point_level == level)
            across = jnp.abs(x - (x0 + x1) / 2)
            down = jnp.abs(y - (y0 + y1) / 2)
            free = on_level & (nearest < 0)
            best = jnp.argmin(jnp.where(free, across**2 + down**2, jnp.inf))
            contained = (x > x0) & (x < x1) & (y > y0) & (y < y1)
            near = on_level & contained & (jnp.maximum(across, down) < reach)
            nearest = jnp.where(free & (jnp.arange(len(x)) == best), box, nearest)
            inside = jnp.where(near & (inside < 0), box, inside)
            return (nearest, inside), None

        none = jnp.full(len(x), -1, jnp.int32)
        order = jnp.argsort(boxlib.area(boxes), stable=True).astype(jnp.int32)
        (nearest, inside), _ = jax.lax.scan(assign_box, (none, none), order)
        return jnp.where(nearest >= 0, nearest, inside)

    return jax.vmap(image)(targets.boxes, targets.valid)
