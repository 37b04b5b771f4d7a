"""Two-stage detectors (Ren et al. 2015): proposals, then box heads that classify and refine them.

They work on a pyramid, as in ViTDet, or on one map (C4).
"""

from collections.abc import Sequence
import dataclasses
from typing import Annotated, Any, ClassVar, NamedTuple

from annotated_types import MinLen
from flax import nnx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32, Key
import numpy as np

from jaxdg.backbones import ClipResnet, EncoderConfig
from jaxdg.detection.arrays import Detected, Targets
from jaxdg.detection.interface import Head, HeadConfig, HeadContext, Judged
from jaxdg.detection.rcnn.roi_heads import (
    CASCADE,
    BoxHead,
    BoxPredictor,
    Res5Head,
    RoiHead,
    RoiHeads,
    RoiHeadsConfig,
    TextScore,
)
from jaxdg.detection.rcnn.rpn import Proposals, Rpn, RpnConfig, RpnOutput
from jaxdg.text.clip_text import TEMPLATES


@dataclasses.dataclass(unsafe_hash=True)
class RcnnConfig(HeadConfig):
    """Sizes of a two-stage head on a pyramid; the defaults are ViTDet's with a cascade.

    Attributes:
        rpn: the region proposal network.
        roi: the box heads.
        channels: of the pyramid. Default 256.
        levels: of the pyramid that boxes are pooled from, 0 to 3 with 4 to 32 pixels a feature;
            proposals read one more that is coarser. Default 0, 1, 2, 3.
    """

    rpn: RpnConfig = dataclasses.field(default_factory=RpnConfig)
    roi: RoiHeadsConfig = dataclasses.field(default_factory=RoiHeadsConfig)
    channels: int = 256
    levels: tuple[int, ...] = (0, 1, 2, 3)

    def check(self, name: str) -> None:
        """See `HeadConfig.check`."""
        if len(self.rpn.sizes) != len(self.levels) + 1:
            raise ValueError(
                f"{name}.rpn.sizes is {self.rpn.sizes}; allowed: one for each of {name}.levels"
                f" {self.levels} and one more"
            )

    @property
    def pyramid_channels(self) -> int:
        """See `HeadConfig.pyramid_channels`."""
        return self.channels

    def build(self, context: HeadContext, *, rngs: nnx.Rngs) -> "Rcnn":
        """See `HeadConfig.build`."""
        channels = self.channels
        heads = [
            BoxHead(self.roi, channels, dtype=context.dtype, rngs=rngs) for _ in self.roi.stages
        ]
        return Rcnn(self, heads, channels, len(self.levels), context, rngs=rngs)


@dataclasses.dataclass(unsafe_hash=True)
class C4Config(HeadConfig):
    """Sizes of a two-stage head on the third stage of a CLIP ResNet; the last is its box head.

    Attributes:
        rpn: the region proposal network.
        roi: the box head; its convolutions and linear layers are not used.
        attention_pool: the class of a proposal is read from the encoder's attention pool; False:
            from the mean of its features, as its box is. Default True.
        text_classifier: scores are cosines to the embeddings of class names (`Detector.set_texts`),
            which needs the attention pool. A run with `model.text_weights` turns it on. Default
            False.
        templates: sentences with {} in place of a class name, which the text tower reads; the
            embeddings of a name are averaged. Default: "a photo of a {}." alone.
    """

    rpn: RpnConfig = dataclasses.field(
        default_factory=lambda: RpnConfig(convs=1, sizes=((32.0, 64.0, 128.0, 256.0, 512.0),))
    )
    roi: RoiHeadsConfig = dataclasses.field(
        default_factory=lambda: RoiHeadsConfig(stages=CASCADE[:1], size=14, class_agnostic=False)
    )
    attention_pool: bool = True
    text_classifier: bool = False
    templates: Annotated[tuple[str, ...], MinLen(1)] = TEMPLATES
    levels: ClassVar[tuple[int, ...]] = (2,)

    def check(self, name: str) -> None:
        """See `HeadConfig.check`."""
        for template in self.templates:
            if "{}" not in template:
                raise ValueError(
                    f"{name}.templates has {template!r}; allowed: sentences with {{}} in place of"
                    " the class name"
                )

    def with_texts(self) -> HeadConfig:
        """See `HeadConfig.with_texts`."""
        if not self.attention_pool:
            return super().with_texts()
        return dataclasses.replace(self, text_classifier=True)

    @property
    def pyramid_channels(self) -> None:
        """See `HeadConfig.pyramid_channels`."""
        return None

    def taps(self, encoder: EncoderConfig) -> tuple[int, ...]:
        """See `HeadConfig.taps`; the last stage is the box head, which sees only proposals."""
        return 2, 3

    def uses(self, name: str) -> bool:
        """See `HeadConfig.uses`: the attention pool."""
        return self.attention_pool and name.startswith("attnpool.")

    def build(self, context: HeadContext, *, rngs: nnx.Rngs) -> "Rcnn":
        """See `HeadConfig.build`."""
        backbone = context.backbone
        if not isinstance(backbone, ClipResnet):
            raise ValueError(
                "a C4 head looks at proposals with the last stage of a CLIP ResNet; take clip_rn50,"
                " clip_rn101 or a pyramid"
            )
        if len(self.roi.stages) > 1 or (self.text_classifier and not self.attention_pool):
            raise ValueError(
                "a C4 head has one stage, and its text classifier needs attention_pool"
            )
        head = self.box_head(context, rngs=rngs)
        text = None
        if self.text_classifier:
            text = self.text_score(head.channels[0], context, rngs=rngs)
        channels = backbone.config.widths[2]
        return Rcnn(self, [head], channels, 1, context, text=text, rngs=rngs)

    def box_head(self, context: HeadContext, *, rngs: nnx.Rngs) -> Res5Head:
        """The head of the only stage."""
        return Res5Head(context.backbone, self.attention_pool)  # pyright: ignore[reportArgumentType]

    def text_score(self, channels: int, context: HeadContext, *, rngs: nnx.Rngs) -> TextScore:
        """Class scores by text, of vectors of so many channels."""
        return TextScore(channels, context.num_classes)


class RcnnOutput(NamedTuple):
    """What `losses` and `detections` start from.

    Attributes:
        features: levels that boxes are pooled from.
        rpn: predictions of the proposal network.
        proposals: made of them in training; None otherwise.
    """

    features: tuple[Float[Array, "b _ _ c"], ...]
    rpn: RpnOutput
    proposals: Proposals | None = None


class Rcnn(Head):
    """Features to boxes."""

    def __init__(
        self,
        config: RcnnConfig | C4Config,
        heads: Sequence[RoiHead],
        channels: int,
        pooled: int,
        context: HeadContext,
        *,
        text: TextScore | None = None,
        rngs: nnx.Rngs,
    ):
        """Builds the head with random parameters.

        Args:
            config: sizes.
            heads: of each stage, pooled features to `Vectors`.
            channels: of each level.
            pooled: how many of the finest levels boxes are pooled from.
            context: what the head is built for.
            text: scores that are cosines to the embeddings of class names, of the only stage.
            rngs: initialises the parameters.

        Raises:
            ValueError: settings that do not fit together.
        """
        kw: Any = dict(dtype=context.dtype, rngs=rngs)
        self.image_size = context.image_size
        self.num_classes = context.num_classes
        self.pooled = pooled
        self.proposal_generator = Rpn(config.rpn, channels, context.shapes, context.strides, **kw)
        kw |= dict(class_agnostic=config.roi.class_agnostic, text=text)
        predictors = [BoxPredictor(head.channels, context.num_classes, **kw) for head in heads]
        self.roi_heads = RoiHeads(config.roi, heads, predictors, context.strides[:pooled])

    def __call__(
        self,
        features: tuple[Float[Array, "b _ _ c"], ...],
        key: Key[Array, ""] | None = None,
        train: bool = False,
    ) -> RcnnOutput:
        """See `Head.__call__`; the same in training, with proposals."""
        output = RcnnOutput(features[: self.pooled], self.proposal_generator(features))
        return output._replace(proposals=self.proposals(output)) if train else output

    def proposals(self, output: RcnnOutput) -> Proposals:
        """Those for the losses, in whole images."""
        if output.proposals is not None:
            return output.proposals
        images = len(output.features[0])
        sizes = jnp.broadcast_to(jnp.asarray(self.image_size, jnp.float32), (images, 2))
        return self.proposal_generator.proposals(output.rpn, sizes, train=True)

    def reread(
        self,
        output: RcnnOutput,
        features: tuple[Float[Array, "b _ _ c"], ...],
        key: Key[Array, ""] | None = None,
        train: bool = False,
    ) -> RcnnOutput:
        """See `Head.reread`."""
        return output._replace(features=features[: self.pooled])

    def loss_denominator(self, targets: Targets) -> Float32[Array, ""]:
        """The number of images of the global batch."""
        return jnp.asarray(len(targets.valid), jnp.float32)

    def losses(
        self,
        output: RcnnOutput,
        targets: Targets,
        denominator: Float32[Array, ""],
        key: Key[Array, ""],
    ) -> dict[str, Float32[Array, ""]]:
        """The terms of `Rpn.losses` and `RoiHeads.losses`; `key` draws anchors and proposals."""
        return self.judge(output, targets, denominator, key)[0]

    @property
    def choices(self) -> tuple[int, int]:
        """See `Head.choices`: one class of all, or background."""
        return 1, self.num_classes + 1

    def judge(
        self,
        output: RcnnOutput,
        targets: Targets,
        denominator: Float32[Array, ""],
        key: Key[Array, ""],
    ) -> tuple[dict[str, Float32[Array, ""]], Judged]:
        """See `Head.judge`: the sampled proposals, as the last stage sees them."""
        anchor_key, box_key = jax.random.split(key)
        sizes = jnp.broadcast_to(jnp.asarray(self.image_size, jnp.float32), (len(targets.valid), 2))
        proposals = self.proposals(output)
        rpn_losses = self.proposal_generator.losses(output.rpn, targets, denominator, anchor_key)
        roi_losses, judged = self.roi_heads.judge(
            output.features, proposals, targets, sizes, denominator, box_key
        )
        return rpn_losses | roi_losses, judged

    def rejudge(self, output: RcnnOutput, judged: Judged) -> Judged:
        """See `Head.rejudge`."""
        return self.roi_heads.rejudge(output.features, judged)

    def detections(self, output: RcnnOutput, image_sizes: Float32[Array, "b 2"]) -> Detected:
        """See `Head.detections`."""
        proposals = self.proposal_generator.proposals(output.rpn, image_sizes, train=False)
        return self.roi_heads.detections(output.features, proposals, image_sizes)

    def set_texts(self, embeddings: Float[Array | np.ndarray, "k e"]) -> None:
        """See `Head.set_texts`."""
        score = self.roi_heads.box_predictor[0].cls_score
        if not isinstance(score, TextScore):
            super().set_texts(embeddings)
            return
        if score.texts[...].shape != embeddings.shape:
            raise ValueError(
                f"the text classifier holds embeddings {score.texts[...].shape} and got"
                f" {embeddings.shape}"
            )
        score.texts[...] = jnp.asarray(embeddings, jnp.float32)

    def set_scenes(self, embeddings: Float[Array | np.ndarray, "p e"]) -> None:
        """See `Head.set_scenes`."""
        scenes = self.roi_heads.box_head[0].scenes
        if scenes is None:
            super().set_scenes(embeddings)
        elif scenes[...].shape != embeddings.shape:
            raise ValueError(
                f"the head holds embeddings of scenes {scenes[...].shape} and got"
                f" {embeddings.shape}"
            )
        else:
            scenes[...] = jnp.asarray(embeddings, jnp.float32)


def single_stage() -> RcnnConfig:
    """Faster R-CNN's sizes: one stage, with a box for each class."""
    return RcnnConfig(roi=RoiHeadsConfig(stages=CASCADE[:1], class_agnostic=False))
