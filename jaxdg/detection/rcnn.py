"""Detectors in two stages (Ren et al. 2015): proposals, then heads that look at each. On a pyramid, as ViTDet, or on one map (C4)."""

from collections.abc import Sequence
import dataclasses
from typing import Any, NamedTuple

from flax import nnx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32, Key

from jaxdg.backbones import ClipResnet
from jaxdg.detection.head import Detected, Targets
from jaxdg.detection.roi_heads import CASCADE, BoxHead, BoxPredictor, Res5Head, RoiHeads, RoiHeadsConfig
from jaxdg.detection.rpn import Rpn, RpnConfig, RpnOutput


@dataclasses.dataclass(frozen=True)
class RcnnConfig:
    """A two-stage head on a pyramid; the defaults are ViTDet's with a cascade.

    Attributes:
        rpn: where things may be.
        roi: what they are.
        channels: of the pyramid.
        levels: of the pyramid, from 0 to 3, that boxes are pooled from; proposals read the additional coarsest one as well.
    """

    rpn: RpnConfig = dataclasses.field(default_factory=RpnConfig)
    roi: RoiHeadsConfig = dataclasses.field(default_factory=RoiHeadsConfig)
    channels: int = 256
    levels: tuple[int, ...] = (0, 1, 2, 3)


@dataclasses.dataclass(frozen=True)
class C4Config:
    """A two-stage head on the third stage of a CLIP ResNet, whose last stage looks at each proposal.

    Attributes:
        rpn: where things may be.
        roi: what they are; its convolutions and linear layers are not used.
        attention_pool: the encoder's pool makes a vector of a proposal; otherwise the mean does.
        text_classifier: scores are cosines to the embeddings of class names (`Detector.set_texts`), which needs the attention pool.
    """

    rpn: RpnConfig = dataclasses.field(default_factory=lambda: RpnConfig(convs=1, sizes=((32.0, 64.0, 128.0, 256.0, 512.0),)))
    roi: RoiHeadsConfig = dataclasses.field(default_factory=lambda: RoiHeadsConfig(stages=CASCADE[:1], size=14))
    attention_pool: bool = True
    text_classifier: bool = False


class RcnnOutput(NamedTuple):
    """What the heads start from.

    Attributes:
        features: levels that boxes are pooled from.
        rpn: predictions of the proposal network.
    """

    features: tuple[Float[Array, "b _ _ c"], ...]
    rpn: RpnOutput


class Rcnn(nnx.Module):
    """Features to the boxes of things."""

    def __init__(
        self,
        config: RcnnConfig | C4Config,
        num_classes: int,
        backbone: nnx.Module,
        shapes: Sequence[tuple[int, int]],
        strides: Sequence[int | float],
        *,
        image_size: tuple[int, int],
        dtype: str,
        rngs: nnx.Rngs,
    ):
        """Builds the head with random parameters.

        Args:
            config: sizes.
            num_classes: k.
            backbone: whose last stage a C4 head shares.
            shapes: rows and columns of each level, finest first.
            strides: pixels a feature of each level.
            image_size: height and width of training images in pixels.
            dtype: compute dtype; predictions are float32.
            rngs: initialises the parameters.

        Raises:
            ValueError: settings that do not fit together.
        """
        roi, stages = config.roi, len(config.roi.stages)
        kw: Any = dict(dtype=dtype, rngs=rngs)
        text = False
        if isinstance(config, C4Config):
            if not isinstance(backbone, ClipResnet):
                raise ValueError(
                    "a C4 head looks at proposals with the last stage of a CLIP ResNet; take clip_rn50, clip_rn101 or a pyramid"
                )
            if stages > 1 or (config.text_classifier and not config.attention_pool):
                raise ValueError("a C4 head has one stage, and its text classifier needs attention_pool")
            heads, text = [Res5Head(backbone, config.attention_pool)], config.text_classifier
            channels, self.pooled = backbone.config.widths[2], 1
        else:
            channels, self.pooled = config.channels, len(config.levels)
            heads = [BoxHead(roi, channels, **kw) for _ in range(stages)]
        self.image_size = image_size
        self.proposal_generator = Rpn(config.rpn, channels, shapes, strides, **kw)
        predictors = [BoxPredictor(head.channels, num_classes, class_agnostic=roi.class_agnostic, text=text, **kw) for head in heads]
        self.roi_heads = RoiHeads(roi, heads, predictors, strides[: self.pooled])

    def __call__(self, features: tuple[Float[Array, "b _ _ c"], ...]) -> RcnnOutput:
        """The maps of all levels, finest first."""
        return RcnnOutput(features[: self.pooled], self.proposal_generator(features))

    def normalizer(self, targets: Targets) -> Float32[Array, ""]:
        """What losses are divided by: the images of the global batch."""
        return jnp.asarray(len(targets.valid), jnp.float32)

    def losses(
        self, output: RcnnOutput, targets: Targets, normalizer: Float32[Array, ""], key: Key[Array, ""]
    ) -> dict[str, Float32[Array, ""]]:
        """The terms of `Rpn.losses` and `RoiHeads.losses`; `key` draws anchors and proposals."""
        anchor_key, box_key = jax.random.split(key)
        sizes = jnp.broadcast_to(jnp.asarray(self.image_size, jnp.float32), (len(targets.valid), 2))
        proposals = self.proposal_generator.proposals(output.rpn, sizes, train=True)
        return {
            **self.proposal_generator.losses(output.rpn, targets, normalizer, anchor_key),
            **self.roi_heads.losses(output.features, proposals, targets, sizes, normalizer, box_key),
        }

    def detections(self, output: RcnnOutput, image_sizes: Float32[Array, "b 2"]) -> Detected:
        """What is found.

        Args:
            output: of the head.
            image_sizes: height and width of each image in pixels, without padding.
        """
        proposals = self.proposal_generator.proposals(output.rpn, image_sizes, train=False)
        return self.roi_heads.detections(output.features, proposals, image_sizes)
