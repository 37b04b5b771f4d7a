"""One experiment's configuration: mutable dataclasses of JSON types that hold the settings of the
modules as these define them.

A file below `configs/` defines `get_config() -> Config`. Every field is documented where it is
defined, with its unit and default.
"""

import dataclasses
import typing
from typing import Annotated, Literal

from annotated_types import Interval, MinLen

from jaxdg.backbones import EncoderOptions
from jaxdg.config.data import DataConfig
from jaxdg.detection.fcos import FcosConfig
from jaxdg.detection.interface import HeadConfig
from jaxdg.detection.rcnn.cells import CellRcnnConfig
from jaxdg.detection.rcnn.detectors import C4Config, RcnnConfig, single_stage
from jaxdg.detection.rcnn.gated import GatedC4Config, GatedRcnnConfig
from jaxdg.evaluation import protocols
from jaxdg.methods.average import AverageOptions
from jaxdg.methods.divalign import DivalignOptions
from jaxdg.methods.edits import EditsOptions
from jaxdg.methods.low_rank import LowRankOptions
from jaxdg.methods.rein import ReinOptions
from jaxdg.methods.sdgod import SdgodOptions
from jaxdg.methods.tldr import TldrOptions
from jaxdg.methods.visual_anchor import VisualAnchorOptions
from jaxdg.ranges import Count, CountOrZero, Size
from jaxdg.segmentation.clip_text import ClipTextOptions
from jaxdg.segmentation.decoder import DecoderOptions
from jaxdg.segmentation.linear import LinearOptions
from jaxdg.segmentation.mask2former.head import Mask2FormerOptions
from jaxdg.segmentation.mgrnet import MgrnetOptions
from jaxdg.segmentation.segformer import SegformerOptions
from jaxdg.segmentation.tqdm.head import TqdmOptions
from jaxdg.segmentation.upscaling import UpscalingOptions
from jaxdg.training.optimizer import OptimizerConfig
from jaxdg.training.sharding import MeshConfig


@dataclasses.dataclass(unsafe_hash=True, kw_only=True)
class ModelConfig(EncoderOptions):
    """What is trained. The fields of `EncoderOptions` say what the encoder is, and those of the
    chosen decoder are heeded.

    Attributes:
        weights: converted weights of the encoder; auto fetches and converts the published file of
            its name, and hf://OWNER/REPO/FILE fetches a converted one. None trains from scratch.
            Default None.
        text_weights: converted text tower beside the encoder, or auto, for the decoders clip_text
            and tqdm, or to classify by class names in faster_rcnn_c4 and gated_c4. Default None.
        start: workdir of another run, one step in it, or a packed model, also hf://OWNER/REPO/FILE,
            whose whole model this one starts from instead of `weights`. Default None.
        pyramid: none, or four levels with layer or batch normalisation, or four by interpolation
            without parameters (interpolate); encoders with levels of their own need none and get
            none. Detectors have their own instead, ViTDet's or an FPN. Default layer.
        decoder: linear, segformer (MLP), with pyramid none upscaling (transposed convolutions) or
            mgrnet, which refines the scores of upscaling in windows; with a pyramid mask2former or
            tqdm, whose queries are class names read by CLIP. Or clip_text: CLIP's features against
            class names, without a step of training. Of detection fcos (light, one stage),
            faster_rcnn, cascade_rcnn, cell_rcnn, whose box head ends in cells that are searched or
            given, or faster_rcnn_c4, which looks at proposals with the last stage of a CLIP ResNet;
            gated_c4 and gated_rcnn mask what faster_rcnn_c4 and faster_rcnn see. Default linear.
        freeze: what stays as loaded: none, all (the encoder), `first N` (embeddings and first N
            blocks), `last N` (last N blocks), or a regular expression searched in parameter names
            such as `backbone.blocks.3.attn.qkv.kernel`. N counts the stages of a hierarchical
            encoder. Default none.
        linear: settings of that decoder.
        segformer: settings of that decoder.
        upscaling: settings of that decoder.
        mgrnet: settings of that decoder.
        mask2former: settings of that decoder.
        tqdm: settings of that decoder.
        clip_text: settings of that decoder.
        fcos: settings of that detector.
        faster_rcnn: settings of that detector.
        cascade_rcnn: settings of that detector.
        cell_rcnn: settings of that detector.
        faster_rcnn_c4: settings of that detector.
        gated_c4: settings of that detector.
        gated_rcnn: settings of that detector.
    """

    weights: str | None = None
    text_weights: str | None = None
    start: str | None = None
    pyramid: Literal["none", "layer", "batch", "interpolate"] = "layer"
    decoder: str = "linear"
    freeze: str = "none"
    # Every decoder and detector by the name that `decoder` knows it by.
    linear: LinearOptions = dataclasses.field(default_factory=LinearOptions)
    segformer: SegformerOptions = dataclasses.field(default_factory=SegformerOptions)
    upscaling: UpscalingOptions = dataclasses.field(default_factory=UpscalingOptions)
    mgrnet: MgrnetOptions = dataclasses.field(default_factory=MgrnetOptions)
    mask2former: Mask2FormerOptions = dataclasses.field(default_factory=Mask2FormerOptions)
    tqdm: TqdmOptions = dataclasses.field(default_factory=TqdmOptions)
    clip_text: ClipTextOptions = dataclasses.field(default_factory=ClipTextOptions)
    fcos: FcosConfig = dataclasses.field(default_factory=FcosConfig)
    faster_rcnn: RcnnConfig = dataclasses.field(default_factory=single_stage)
    cascade_rcnn: RcnnConfig = dataclasses.field(default_factory=RcnnConfig)
    cell_rcnn: CellRcnnConfig = dataclasses.field(default_factory=CellRcnnConfig)
    faster_rcnn_c4: C4Config = dataclasses.field(default_factory=C4Config)
    gated_c4: GatedC4Config = dataclasses.field(default_factory=GatedC4Config)
    gated_rcnn: GatedRcnnConfig = dataclasses.field(default_factory=GatedRcnnConfig)


@dataclasses.dataclass
class EvaluationConfig:
    """Zero-shot evaluation.

    Attributes:
        domains: evaluated in this order; the source among them is marked as seen.
        protocol: of segmentation image sizes, windows and label maps: native (images at their own
            size), vltseg, rein, soma, tqdm, mgrnet, or with test-time augmentation cityscapes_test,
            acdc_test; see `evaluation/protocols.py`. Of detection whose AP50 is the score: voc07,
            voc12 or coco; see `evaluation/average_precision.py`. If empty, which is the default,
            the first of these.
        tta: of segmentation, test-time augmentation: class probabilities are averaged over six
            sizes from 0.5 to 1.75 of the protocol's, each also mirrored, as mmsegmentation does.
            Results carry the protocol's name with _tta behind it. Default False.
        stride: rows and columns in pixels between windows of the size of `data.crop` under native;
            the others have their own. Default 64x64.
        batch_size: images a step, over all devices. Default 4.
        windows_per_call: windows computed at once; bounds memory. Default 8.
        max_images: of each domain so many are judged, evenly spread, for quick comparisons; results
            say so. 0 for all. Default 0.
        calibration: of segmentation, whether results hold the expected calibration error and the
            reliability of each domain. Default False.
        calibration_bins: of confidence, equally wide. Default 15.
        boundary: of segmentation, whether results hold the Boundary IoU of each class and domain.
            Default False.
    """

    domains: Annotated[tuple[str, ...], MinLen(1)] = ("clear", "night", "rain", "fog", "dusk_rain")
    protocol: str = ""
    tta: bool = False
    stride: Size = (64, 64)
    batch_size: Count = 4
    windows_per_call: Count = 8
    max_images: CountOrZero = 0
    calibration: bool = False
    calibration_bins: Annotated[int, Interval(ge=1, lt=256)] = 15
    boundary: bool = False

    @property
    def label(self) -> str:
        """The name of the protocol that results carry."""
        return self.protocol + (protocols.TTA if self.tta else "")


@dataclasses.dataclass
class Config:
    """One experiment.

    Attributes:
        steps: optimiser steps of the run; 0 with the decoder clip_text, which is judged as it is.
            Default 1000.
        batch_size: crops a step, over all devices and hosts. Default 8.
        seed: of initialisation, sampling and augmentation. Default 0.
        log_every: steps between rows of metrics.jsonl. Default 10.
        eval_every: steps between evaluations; 0: no evaluation at all, otherwise also at the end.
            Default 500.
        checkpoint_every: steps between checkpoints; one is always written at the end. Default 100.
        keep_checkpoints: newest checkpoints kept, besides the best on the source domain. Default 2.
        loggers: services that get what metrics.jsonl gets: wandb (Weights & Biases), mlflow; each
            needs the extra of its name. Default ().
        task: segmentation or detection. Default segmentation.
        mesh: devices.
        data: what is trained on.
        model: what is trained.
        optimizer: how.
        average: an average of the weights, off by default.
        tldr: a comparison, off by default.
        low_rank: adapters of a frozen encoder, off by default.
        rein: a frozen encoder refined by learned tokens, off by default.
        visual_anchor: with the decoder tqdm, global features that stay near those before training,
            off by default.
        sdgod: of detection, features cleared of their domain that teach shallower ones, off by
            default.
        edits: features edited as mined offsets or statistics say, off by default.
        divalign: of detection, corrupted copies whose detections agree, off by default.
        evaluation: on what it is judged.
    """

    steps: CountOrZero = 1000
    batch_size: Count = 8
    seed: Annotated[int, Interval(ge=0, lt=2**31)] = 0
    log_every: Count = 10
    eval_every: CountOrZero = 500
    checkpoint_every: Count = 100
    keep_checkpoints: Count = 2
    loggers: tuple[Literal["wandb", "mlflow"], ...] = ()
    task: Literal["segmentation", "detection"] = "segmentation"
    mesh: MeshConfig = dataclasses.field(default_factory=MeshConfig)
    data: DataConfig = dataclasses.field(default_factory=DataConfig)
    model: ModelConfig = dataclasses.field(default_factory=ModelConfig)
    optimizer: OptimizerConfig = dataclasses.field(default_factory=OptimizerConfig)
    # Methods end in this order; adapters fold after their average is taken.
    average: AverageOptions = dataclasses.field(default_factory=AverageOptions)
    tldr: TldrOptions = dataclasses.field(default_factory=TldrOptions)
    low_rank: LowRankOptions = dataclasses.field(default_factory=LowRankOptions)
    rein: ReinOptions = dataclasses.field(default_factory=ReinOptions)
    visual_anchor: VisualAnchorOptions = dataclasses.field(default_factory=VisualAnchorOptions)
    sdgod: SdgodOptions = dataclasses.field(default_factory=SdgodOptions)
    edits: EditsOptions = dataclasses.field(default_factory=EditsOptions)
    divalign: DivalignOptions = dataclasses.field(default_factory=DivalignOptions)
    evaluation: EvaluationConfig = dataclasses.field(default_factory=EvaluationConfig)

    # How pydantic checks a configuration and the parts in it (`checking.typed`).
    __pydantic_config__ = {"extra": "forbid", "allow_inf_nan": False}  # noqa: RUF012


# What a task allows for model.decoder, and for evaluation.protocol, of which the first is the
# default.
DECODERS = {
    task: tuple(
        name
        for name, hint in typing.get_type_hints(ModelConfig).items()
        if isinstance(hint, type) and issubclass(hint, kind)
    )
    for task, kind in (("segmentation", DecoderOptions), ("detection", HeadConfig))
}
PROTOCOLS = {"segmentation": protocols.NAMES, "detection": ("voc07", "voc12", "coco")}
