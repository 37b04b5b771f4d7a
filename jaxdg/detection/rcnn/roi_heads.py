"""Box heads: the class and the refined box of a proposal, in a cascade (Cai and Vasconcelos 2018).

Names, targets and results follow detectron2. Different: the losses of an image are divided by the
number of proposals to sample, even where fewer exist.
"""

from collections.abc import Sequence
import dataclasses
from functools import partial

from flax import nnx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Float32, Int32, Key
import numpy as np

from jaxdg.backbones import ClipResnet
from jaxdg.backbones.layers import Linear
from jaxdg.detection import boxes as boxlib
from jaxdg.detection.arrays import Detected, Targets, take
from jaxdg.detection.interface import Judged
from jaxdg.detection.losses import cross_entropy, masked_sum, minus_smaller, smooth_l1
from jaxdg.detection.nms import nms
from jaxdg.detection.pyramid import ConvNorm, msra, xavier
from jaxdg.detection.rcnn.roi_align import roi_align
from jaxdg.detection.rcnn.rpn import Proposals
from jaxdg.detection.rcnn.sampling import IGNORED, POSITIVE, assign, sample
from jaxdg.ranges import Count, CountOrZero, PositiveOrZero, Share

TEMPERATURE = 100.0  # factor of the cosines to texts, CLIP's at the end of its training
CASCADE = ((0.5, 10.0), (0.6, 20.0), (0.7, 30.0))

# What a head makes of r boxes: vectors to read their classes and their offsets from.
Vectors = tuple[Float[Array, "r _"], Float[Array, "r _"]]


@dataclasses.dataclass(unsafe_hash=True)
class RoiHeadsConfig:
    """Box heads.

    Attributes:
        stages: of the cascade: the least IoU of a positive proposal, and the weight of the centre's
            offsets; the sides' offsets have half of it. One stage is a head without a cascade.
            Default: 0.5 10, 0.6 20, 0.7 30.
        size: rows and columns of features that a box is pooled to. Default 7.
        samples: as in `roi_align`. Default None.
        aligned: as in `roi_align`; False in torchvision's detectors. Default True.
        channels: of the convolutions. Default 256.
        convs: 3x3 ones with LayerNorm. Default 4.
        fcs: linear layers after them. Default 1.
        hidden: channels of those. Default 1024.
        class_agnostic: one box for all classes; otherwise one for each, which a cascade does not
            allow. Default True.
        proposals: sampled for the losses of an image. Default 512.
        positive: largest share of positive ones among them. Default 0.25.
        score_threshold: least score of a detection. Default 0.05.
        nms: IoU above which the better of two boxes of a class suppresses the other. Default 0.5.
        detections: most boxes detected in an image. Default 100.
        logit_penalty: weight of the mean squared class score of all sampled proposals, beside the
            cross entropy; 0.5 in G-NAS (its G-loss). Default 0.
        penalty_box: G-NAS's box loss, with the same weight: the mean squared offset of the positive
            proposals is subtracted where the loss is larger. Parts of a batch compare their own.
            Default False.
    """

    stages: tuple[tuple[float, float], ...] = CASCADE
    size: Count = 7
    samples: int | None = None
    aligned: bool = True
    channels: Count = 256
    convs: CountOrZero = 4
    fcs: CountOrZero = 1
    hidden: Count = 1024
    class_agnostic: bool = True
    proposals: Count = 512
    positive: float = 0.25
    score_threshold: Share = 0.05
    nms: Share = 0.5
    detections: Count = 100
    logit_penalty: PositiveOrZero = 0.0
    penalty_box: bool = False


class RoiHead(nnx.Module):
    """What a two-stage detector makes of the pooled features of boxes.

    Attributes:
        channels: of the two vectors.
        scenes: embeddings of the scenes that it reads, if any.
    """

    channels: tuple[int, int]
    scenes: nnx.BatchStat | None = None

    def __call__(
        self,
        x: Float[Array, "r s s _"],
        key: Key[Array, ""] | None = None,
        train: bool = False,
        valid: Bool[Array, " r"] | None = None,
    ) -> Vectors:
        """Vectors to read classes and offsets from.

        Args:
            x: pooled features.
            key: random key for what is drawn in training.
            train: use (and update) the statistics of these boxes where there are any.
            valid: the boxes that count in statistics; None for all.
        """
        raise NotImplementedError

    def terms(self, share: Float32[Array, ""]) -> dict[str, Float32[Array, ""]]:
        """Loss terms of the head's own, from the boxes of its last call in training.

        Args:
            share: of the images of the global batch that these boxes are from.
        """
        return {}


class BoxHead(RoiHead):
    """Convolutions and linear layers.

    The order of fc1's inputs is rows, columns, channels; torch's is channels, rows, columns.
    """

    def __init__(self, config: RoiHeadsConfig, channels: int, *, dtype: str, rngs: nnx.Rngs):
        c = config
        conv = partial(ConvNorm, kernel_init=msra, dtype=dtype, rngs=rngs)
        linear = partial(Linear, kernel_init=xavier, dtype=jnp.dtype(dtype), rngs=rngs)
        for i in range(c.convs):
            setattr(self, f"conv{i + 1}", conv(channels, c.channels, 3))
            channels = c.channels
        self.convs = c.convs
        self.fcs = c.fcs
        channels *= c.size**2
        for i in range(c.fcs):
            setattr(self, f"fc{i + 1}", linear(channels, c.hidden))
            channels = c.hidden
        self.channels = channels, channels

    def __call__(
        self,
        x: Float[Array, "r s s _"],
        key: Key[Array, ""] | None = None,
        train: bool = False,
        valid: Bool[Array, " r"] | None = None,
    ) -> Vectors:
        for i in range(self.convs):
            x = jax.nn.relu(getattr(self, f"conv{i + 1}")(x))
        x = x.reshape(len(x), -1)
        for i in range(self.fcs):
            x = jax.nn.relu(getattr(self, f"fc{i + 1}")(x))
        return x, x


class Res5Head(RoiHead):
    """The encoder's own last stage, of a CLIP ResNet.

    A box is refined from the mean of its features. Its class is read from the encoder's attention
    pool, as in CLIP the Gap (vidit09/domaingen), or from the mean too.
    """

    def __init__(self, backbone: ClipResnet, attention_pool: bool):
        config = backbone.config
        self.res5 = getattr(backbone, "layer4")  # noqa: B009  made by `setattr`
        self.last = config.blocks[3] - 1
        self.attnpool = backbone.attnpool if attention_pool else None
        width = config.widths[3]
        self.channels = (config.embedding if attention_pool else width), width

    def __call__(
        self,
        x: Float[Array, "r s s _"],
        key: Key[Array, ""] | None = None,
        train: bool = False,
        valid: Bool[Array, " r"] | None = None,
    ) -> Vectors:
        return self.read(self.res5(x, None)[self.last])

    def read(self, x: Float[Array, "r _ _ _"]) -> Vectors:
        """The vectors of maps of the last stage."""
        mean = x.mean((1, 2))
        return (mean if self.attnpool is None else self.attnpool(x)), mean


def unit(x: Float[Array, "*n c"]) -> Float32[Array, "*n c"]:
    """Vectors of length 1; 0 stays 0."""
    x = x.astype(jnp.float32)
    return x * jax.lax.rsqrt(jnp.sum(x * x, axis=-1, keepdims=True) + 1e-12)


class TextScore(nnx.Module):
    """Cosines to the class names' embeddings, times 100; background has 0 (Zhong et al. 2022)."""

    def __init__(self, channels: int, num_classes: int):
        self.texts = nnx.BatchStat(jnp.zeros((num_classes, channels)))

    def __call__(self, x: Float[Array, "r c"]) -> Float32[Array, "r k1"]:
        cosines = unit(x) @ unit(self.texts[...]).T
        return jnp.pad(TEMPERATURE * cosines, ((0, 0), (0, 1)))


class BoxPredictor(nnx.Module):
    """Class scores, the last for background, and box offsets."""

    def __init__(
        self,
        channels: tuple[int, int],
        num_classes: int,
        *,
        class_agnostic: bool,
        text: TextScore | None = None,
        dtype: str,
        rngs: nnx.Rngs,
    ):
        """Args:
        channels: of the vectors that classes and boxes are read from.
        num_classes: k.
        class_agnostic: one box for all classes.
        text: scores that are cosines to the embeddings of class names; None: a linear layer.
        dtype: compute dtype.
        rngs: initialises the parameters.
        """

        def linear(inside, out, deviation):
            init = nnx.initializers.normal(deviation)
            return Linear(inside, out, kernel_init=init, dtype=jnp.dtype(dtype), rngs=rngs)

        of_class, of_box = channels
        self.cls_score = linear(of_class, num_classes + 1, 0.01) if text is None else text
        self.bbox_pred = linear(of_box, 4 if class_agnostic else 4 * num_classes, 0.001)

    def __call__(self, vectors: Vectors) -> tuple[Float32[Array, "r k1"], Float32[Array, "r o 4"]]:
        of_class, of_box = vectors
        offsets = self.bbox_pred(of_box).astype(jnp.float32).reshape(len(of_box), -1, 4)
        return self.cls_score(of_class).astype(jnp.float32), offsets


class RoiHeads(nnx.Module):
    """Features and proposals to classes and boxes."""

    def __init__(
        self,
        config: RoiHeadsConfig,
        heads: Sequence[RoiHead],
        predictors: Sequence[BoxPredictor],
        strides: Sequence[int | float],
    ):
        """Joins the stages.

        Args:
            config: sizes.
            heads: of each stage.
            predictors: of each stage.
            strides: pixels a feature of each level that boxes are pooled from.

        Raises:
            ValueError: a cascade with a box for each class.
        """
        if len(config.stages) > 1 and not config.class_agnostic:
            raise ValueError(
                "a cascade refines one box for all classes: set class_agnostic, or leave one stage"
            )
        self.config = config
        self.strides = tuple(strides)
        self.box_head = nnx.List(heads)
        self.box_predictor = nnx.List(predictors)

    def predict(
        self,
        stage: int,
        features: tuple[Float[Array, "b _ _ _"], ...],
        boxes: Float32[Array, "b r 4"],
        key: Key[Array, ""] | None = None,
        train: bool = False,
        valid: Bool[Array, "b r"] | None = None,
    ) -> tuple[Float32[Array, "b r k1"], Float32[Array, "b r o 4"]]:
        """Class scores and box offsets of one stage.

        With n stages, each contributes 1/n of its gradient to the features.

        Args:
            stage: of the cascade.
            features: levels that boxes are pooled from.
            boxes: in pixels.
            key: random key for what a head draws in training.
            train: use (and update) the statistics of these boxes where there are any.
            valid: the boxes that count in statistics; None for all.
        """
        c = self.config
        pooled = roi_align(
            features, boxes, self.strides, (c.size, c.size), samples=c.samples, aligned=c.aligned
        )
        share = 1 / len(c.stages)
        pooled = pooled * share + jax.lax.stop_gradient(pooled) * (1 - share)
        counted = None if valid is None else valid.reshape(-1)
        vectors = self.box_head[stage](pooled.reshape(-1, *pooled.shape[2:]), key, train, counted)
        logits, offsets = self.box_predictor[stage](vectors)
        b, r, _ = boxes.shape
        return logits.reshape(b, r, -1), offsets.reshape(b, r, -1, 4)

    def weights(self, stage: int) -> boxlib.Weights:
        """Weights of the four offsets."""
        weight = self.config.stages[stage][1]
        return weight, weight, weight / 2, weight / 2

    def losses(
        self,
        features: tuple[Float[Array, "b _ _ _"], ...],
        proposals: Proposals,
        targets: Targets,
        image_sizes: Float32[Array, "b 2"],
        images: Float32[Array, ""],
        key: Key[Array, ""],
    ) -> dict[str, Float32[Array, ""]]:
        """The terms "class" (cross entropy) and "box" (L1), summed over the stages.

        With `logit_penalty` there is the term "logits" too; heads may have terms of their own.

        Args:
            features: levels that boxes are pooled from.
            proposals: for a part of the batch; the true boxes are added to them.
            targets: of the same part.
            image_sizes: height and width of each image in pixels.
            images: of the global batch.
            key: samples the proposals, and is for what a head draws.
        """
        return self.judge(features, proposals, targets, image_sizes, images, key)[0]

    def judge(
        self,
        features: tuple[Float[Array, "b _ _ _"], ...],
        proposals: Proposals,
        targets: Targets,
        image_sizes: Float32[Array, "b 2"],
        images: Float32[Array, ""],
        key: Key[Array, ""],
    ) -> tuple[dict[str, Float32[Array, ""]], Judged]:
        """What `losses` returns, and the sampled proposals as the last stage sees them."""
        c = self.config
        total = {"class": jnp.zeros(()), "box": jnp.zeros(())}
        if c.logit_penalty:
            total["logits"] = jnp.zeros(())
        boxes = jnp.concatenate([proposals.boxes, targets.boxes], axis=1)
        exists = jnp.concatenate([proposals.valid, targets.valid], axis=1)
        denominator = c.proposals * images
        threshold = c.stages[0][0]
        _, label = assign(boxes, targets.boxes, targets.valid, (threshold, threshold))
        chosen, counts = sample(key, jnp.where(exists, label, IGNORED), c.proposals, c.positive)
        boxes = take(boxes, chosen)
        for stage, (threshold, _) in enumerate(c.stages):
            index, label = assign(boxes, targets.boxes, targets.valid, (threshold, threshold))
            positive = counts & (label == POSITIVE)
            head_key = jax.random.fold_in(key, stage)
            logits, offsets = self.predict(stage, features, boxes, head_key, True, counts)
            background = logits.shape[-1] - 1
            classes = jnp.where(positive, take(targets.classes, index), background)
            wanted = boxlib.encode(take(targets.boxes, index), boxes, self.weights(stage))
            own = self.of_class(offsets, classes)
            distance = jnp.sum(smooth_l1(own, wanted), axis=-1)
            total["class"] += masked_sum(cross_entropy(logits, classes), counts) / denominator
            box = masked_sum(distance, positive) / denominator
            if c.logit_penalty:
                squared = jnp.mean(logits**2, axis=-1)
                total["logits"] += c.logit_penalty * masked_sum(squared, counts) / denominator
            if c.logit_penalty and c.penalty_box:
                squared = masked_sum(jnp.mean(own**2, axis=-1), positive)
                penalty = c.logit_penalty * squared / jnp.maximum(jnp.sum(positive), 1)
                box = minus_smaller(box, penalty * (len(boxes) / images))
            total["box"] += box
            judged = Judged(
                boxes=boxes,
                points=False,
                logits=logits[:, :, None],
                truth=classes[:, :, None],
                share=jnp.where(counts, 1 / denominator, 0.0),
                offsets=own,
                box_share=positive / (jnp.maximum(jnp.sum(positive, 1, keepdims=True), 1) * images),
            )
            if stage + 1 < len(c.stages):
                boxes = self.move(stage, offsets, boxes, image_sizes)[:, :, 0]
                counts &= boxlib.non_empty(boxes)
        for head in self.box_head:
            for name, value in head.terms(len(boxes) / images).items():
                total[name] = total.get(name, 0.0) + value
        return total, judged

    def rejudge(self, features: tuple[Float[Array, "b _ _ _"], ...], judged: Judged) -> Judged:
        """The boxes of `judge` as the last stage sees them in other features."""
        last = len(self.config.stages) - 1
        logits, offsets = self.predict(
            last, features, judged.boxes, train=True, valid=judged.share > 0
        )
        own = self.of_class(offsets, judged.truth[..., 0])
        return judged._replace(logits=logits[:, :, None], offsets=own)

    def of_class(
        self, offsets: Float32[Array, "b r o 4"], classes: Int32[Array, "b r"]
    ) -> Float32[Array, "b r 4"]:
        """The offsets that belong to a class; for background, some."""
        which = jnp.where(classes < offsets.shape[2], classes, 0)
        return jnp.take_along_axis(offsets, which[..., None, None], axis=2)[:, :, 0]

    def move(
        self,
        stage: int,
        offsets: Float32[Array, "b r o 4"],
        boxes: Float32[Array, "b r 4"],
        image_sizes: Float32[Array, "b 2"],
    ) -> Float32[Array, "b r o 4"]:
        """Boxes moved by the offsets of a stage and clipped to the image. No gradient."""
        offsets = jax.lax.stop_gradient(offsets)
        moved = boxlib.decode(offsets, boxes[:, :, None], self.weights(stage))
        return boxlib.clip(moved, image_sizes[:, None, None])

    def detections(
        self,
        features: tuple[Float[Array, "b _ _ _"], ...],
        proposals: Proposals,
        image_sizes: Float32[Array, "b 2"],
    ) -> Detected:
        """Boxes of the last stage; a score is the mean of the probabilities of all stages.

        Args:
            features: levels that boxes are pooled from.
            proposals: in which objects are detected.
            image_sizes: height and width of each image in pixels, without padding.
        """
        c = self.config
        boxes = proposals.boxes
        scores = []
        for stage in range(len(c.stages)):
            logits, offsets = self.predict(stage, features, boxes)
            scores.append(jax.nn.softmax(logits)[..., :-1])
            moved = self.move(stage, offsets, boxes, image_sizes)
            boxes = moved[:, :, 0]
        # NMS runs on each class with all boxes, not only with those whose best class it is.
        by_class = jnp.moveaxis(sum(scores) / len(scores), -1, 1)  # b k r
        b, k, r = by_class.shape
        moved = jnp.broadcast_to(jnp.moveaxis(moved, 2, 1), (b, k, r, 4))
        valid = proposals.valid[:, None] & (by_class > c.score_threshold) & boxlib.non_empty(moved)
        kept, valid = nms(moved, by_class, valid, c.nms, c.detections)
        by_class = jnp.where(valid, jnp.take_along_axis(by_class, kept, axis=2), -1.0)
        scores, best = jax.lax.top_k(by_class.reshape(b, -1), c.detections)
        boxes = jnp.take_along_axis(moved, kept[..., None], axis=2).reshape(b, -1, 4)
        classes = jnp.broadcast_to(np.arange(k)[:, None], kept.shape).reshape(b, -1)
        return Detected.of(take(boxes, best), scores, take(classes, best), scores > 0)
