"""The region proposal network (Ren et al. 2015) with the settings of ViTDet.

Names, targets and proposals follow detectron2. Different: the losses of an image are divided by the
number of anchors to sample, even where fewer exist.
"""

from collections.abc import Sequence
import dataclasses
from typing import Annotated, Any, NamedTuple

from annotated_types import MinLen
from flax import nnx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Float32, Key

from jaxdg.backbones.layers import Conv
from jaxdg.detection import boxes as boxlib
from jaxdg.detection.anchors import RATIOS, anchors
from jaxdg.detection.arrays import Targets, take
from jaxdg.detection.losses import masked_sum, sigmoid_cross_entropy, smooth_l1
from jaxdg.detection.nms import nms
from jaxdg.detection.rcnn.sampling import POSITIVE, assign, sample
from jaxdg.ranges import Count, CountOrZero, Positive, Share

normal = nnx.initializers.normal(0.01)


@dataclasses.dataclass(unsafe_hash=True)
class RpnConfig:
    """Region proposals.

    Attributes:
        convs: 3x3 convolutions before the predictions. Default 2.
        sizes: roots of the areas of anchors in pixels, for each level. Default: 32, 64, 128, 256,
            512, one a level.
        ratios: height to width of the anchors of each size. Default 0.5, 1, 2.
        rounded: half the sides of anchors are whole pixels, as in torchvision. Default False.
        thresholds: an anchor with less IoU than the first is negative, with at least the second
            positive; between them it is ignored. Default 0.3, 0.7.
        samples: anchors sampled for the losses of an image. Default 256.
        positive: largest share of positive ones among them. Default 0.5.
        before: most proposals of a level that NMS chooses from, in training and in inference.
            Default 2000, 1000.
        after: most proposals of an image after NMS, in training and in inference. Default 1000,
            1000.
        nms: IoU above which the better of two proposals of a level suppresses the other. Default
            0.7.
    """

    convs: CountOrZero = 2
    sizes: tuple[Annotated[tuple[Positive, ...], MinLen(1)], ...] = (
        (32.0,),
        (64.0,),
        (128.0,),
        (256.0,),
        (512.0,),
    )
    ratios: tuple[float, ...] = RATIOS
    rounded: bool = False
    thresholds: tuple[float, float] = (0.3, 0.7)
    samples: Count = 256
    positive: float = 0.5
    before: tuple[Count, Count] = (2000, 1000)
    after: tuple[Count, Count] = (1000, 1000)
    nms: Share = 0.7


class RpnOutput(NamedTuple):
    """Predictions for all anchors, one array a level, in the order of `anchors`.

    Attributes:
        logits: that it holds an object.
        offsets: of the object's box from the anchor.
    """

    logits: tuple[Float32[Array, "b _"], ...]
    offsets: tuple[Float32[Array, "b _ 4"], ...]


class Proposals(NamedTuple):
    """Boxes that may hold an object, best first.

    Attributes:
        boxes: in pixels, inside the image.
        valid: slots that hold a box.
    """

    boxes: Float32[Array, "b r 4"]
    valid: Bool[Array, "b r"]


class RpnHead(nnx.Module):
    """The layers, shared by all levels."""

    def __init__(self, channels: int, convs: int, per_cell: int, *, dtype: str, rngs: nnx.Rngs):
        kw: Any = dict(kernel_init=normal, dtype=jnp.dtype(dtype), rngs=rngs)
        self.conv = nnx.Dict(
            {f"conv{i}": Conv(channels, channels, (3, 3), **kw) for i in range(convs)}
        )
        self.objectness_logits = Conv(channels, per_cell, (1, 1), **kw)
        self.anchor_deltas = Conv(channels, 4 * per_cell, (1, 1), **kw)

    def __call__(
        self, x: Float[Array, "b h w c"]
    ) -> tuple[Float32[Array, "b n"], Float32[Array, "b n 4"]]:
        for conv in self.conv.values():
            x = jax.nn.relu(conv(x))
        logits = self.objectness_logits(x).astype(jnp.float32)
        offsets = self.anchor_deltas(x).astype(jnp.float32)
        return logits.reshape(len(x), -1), offsets.reshape(len(x), -1, 4)


class Rpn(nnx.Module):
    """Levels of a pyramid to proposals."""

    def __init__(
        self,
        config: RpnConfig,
        channels: int,
        shapes: Sequence[tuple[int, int]],
        strides: Sequence[int | float],
        *,
        dtype: str,
        rngs: nnx.Rngs,
    ):
        """Builds the network with random parameters.

        Args:
            config: sizes.
            channels: of every level.
            shapes: rows and columns of each level, finest first.
            strides: pixels a feature of each level.
            dtype: compute dtype; predictions are float32.
            rngs: initialises the parameters.

        Raises:
            ValueError: anchors for another number of levels, or not as many on each.
        """
        counts = {len(sizes) for sizes in config.sizes}
        if len(config.sizes) != len(shapes) or len(counts) != 1:
            raise ValueError(
                f"sizes of anchors are {config.sizes}; allowed: as many for each of the"
                f" {len(shapes)} levels"
            )
        self.config = config
        self.shapes = tuple(shapes)
        self.strides = tuple(strides)
        self.rpn_head = RpnHead(
            channels, config.convs, counts.pop() * len(config.ratios), dtype=dtype, rngs=rngs
        )

    def __call__(self, features: tuple[Float[Array, "b _ _ c"], ...]) -> RpnOutput:
        """Predictions from one map a level, finest first."""
        return RpnOutput(*zip(*map(self.rpn_head, features), strict=True))

    def anchors(self) -> tuple[Float32[Array, "_ 4"], ...]:
        """The anchors of each level."""
        c = self.config
        return anchors(self.shapes, self.strides, c.sizes, c.ratios, rounded=c.rounded)

    def losses(
        self, output: RpnOutput, targets: Targets, images: Float32[Array, ""], key: Key[Array, ""]
    ) -> dict[str, Float32[Array, ""]]:
        """The terms "rpn_class" (cross entropy) and "rpn_box" (L1).

        Args:
            output: for a part of the batch.
            targets: of the same part.
            images: of the global batch.
            key: samples the anchors.
        """
        c = self.config
        grid = jnp.concatenate(self.anchors())
        logits = jnp.concatenate(output.logits, 1)
        offsets = jnp.concatenate(output.offsets, 1)
        boxes = jnp.broadcast_to(grid, (len(logits), *grid.shape))
        index, label = assign(boxes, targets.boxes, targets.valid, c.thresholds, low_quality=True)
        chosen, sampled = sample(key, label, c.samples, c.positive)
        positive = sampled & (take(label, chosen) == POSITIVE)
        wanted = boxlib.encode(take(targets.boxes, take(index, chosen)), grid[chosen])
        entropy = sigmoid_cross_entropy(take(logits, chosen), positive.astype(jnp.float32))
        distance = jnp.sum(smooth_l1(take(offsets, chosen), wanted), axis=-1)
        total = c.samples * images
        return {
            "rpn_class": masked_sum(entropy, sampled) / total,
            "rpn_box": masked_sum(distance, positive) / total,
        }

    def proposals(
        self, output: RpnOutput, image_sizes: Float32[Array, "b 2"], train: bool
    ) -> Proposals:
        """The best boxes after NMS of each level. No gradient.

        Args:
            output: predictions.
            image_sizes: height and width of each image in pixels, without padding.
            train: take the numbers of boxes for training.
        """
        c = self.config
        mode = 0 if train else 1
        widest = min(c.before[mode], max(x.shape[1] for x in output.logits))

        def level(grid, logits, offsets):
            scores, best = jax.lax.top_k(logits, min(widest, logits.shape[1]))
            boxes = boxlib.decode(take(offsets, best), grid[best])
            boxes = boxlib.clip(boxes, image_sizes[:, None])
            pad = (0, 0), (0, widest - best.shape[1])
            valid = boxlib.non_empty(boxes)
            return jnp.pad(boxes, (*pad, (0, 0))), jnp.pad(scores, pad), jnp.pad(valid, pad)

        levels = map(level, self.anchors(), *jax.lax.stop_gradient(output))
        # [b, l, widest]
        boxes, scores, valid = (jnp.stack(x, axis=1) for x in zip(*levels, strict=True))
        kept, valid = nms(boxes, scores, valid, c.nms, min(c.after[mode], widest))
        b = len(kept)
        boxes = jnp.take_along_axis(boxes, kept[..., None], axis=2).reshape(b, -1, 4)
        scores = jnp.where(valid, jnp.take_along_axis(scores, kept, axis=2), -jnp.inf)
        scores = scores.reshape(b, -1)
        scores, best = jax.lax.top_k(scores, min(c.after[mode], scores.shape[1]))
        return Proposals(take(boxes, best), scores > -jnp.inf)
