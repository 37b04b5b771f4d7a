"""One experiment's configuration: mutable dataclasses of JSON types that hold the settings of the modules as these define them.

A file below `configs/` defines `get_config() -> Config`. Every field is documented where it is defined, with its unit and default.
"""

import dataclasses
import os
import typing

from jaxdg.backbones import EncoderOptions
from jaxdg.data.boxes import BoxOptions
from jaxdg.data.datasets import FolderOptions, StreetsOptions
from jaxdg.detection.fcos import FcosConfig
from jaxdg.detection.head import HeadConfig
from jaxdg.detection.rcnn.detectors import C4Config, RcnnConfig, single_stage
from jaxdg.evaluation import protocols
from jaxdg.methods.tldr import TldrOptions
from jaxdg.segmentation.clip_text import ClipTextOptions
from jaxdg.segmentation.decoder import DecoderOptions
from jaxdg.segmentation.linear import LinearOptions
from jaxdg.segmentation.mask2former.head import Mask2FormerOptions
from jaxdg.segmentation.segformer import SegformerOptions
from jaxdg.training.optimizer import OptimizerConfig
from jaxdg.training.sharding import MeshConfig


@dataclasses.dataclass
class DataConfig:
    """What is trained on, and how samples are made from it.

    Attributes:
        source: the domain trained on: `clear` (generated streets), `gta5`, `camvid` or another published dataset, a domain described by
            `folder`, or several joined by `+`. Default clear.
        source_weights: how often each of several sources is drawn; () for by their numbers of images. Default ().
        skip: text file of paths to leave out with their partners, one a line, relative to `root` or absolute; None if unused. Default None.
        mapillary_labels: which classes the ids of Mapillary Vistas mean, those of vltseg or of rein. Default vltseg.
        root: folder that holds the datasets as downloaded. Default: $JAXDG_DATA, else `data`.
        workers: processes that read and augment; 0 does it in threads of the main process. Default 0.
        crop: height and width in pixels of training crops and of the model's windows. Default 128x128.
        resize: height and width in pixels of every image before the random scale; None keeps its own. Default None.
        keep_ratio: resize to the largest size of the image's own ratio that fits into `resize`. Default False.
        scale: smallest and largest factor of the random resize before the crop. Default 0.75 to 1.5.
        flip: probability of a horizontal flip. Default 0.5.
        max_class_share: a crop is redrawn (at most 10 times) while one class covers this share of it; 1 turns it off. Default 1.
        rare_class_temperature: of rare-class sampling; the lower, the more the rarest classes are preferred (DAFormer: 0.01). 0 turns it
            off and shows every image once an epoch. Default 0.
        rare_class_min_pixels: of the drawn class in an image that is drawn for it. Default 3000.
        randaugment: number of operations of RandAugment and their magnitude, 0 to 10. Default 0, 0.
        pixmix: most rounds of PixMix, its k, and beta, the larger of which the less is mixed in; 4, 4 are its authors'. Default 0, 0.
        pictures: folder of images that PixMix mixes in and TLDR takes styles from; None generates fractals. Default None.
        distortion_probability: of each change of brightness, contrast, saturation and hue. 1 with the latter two at 0 changes contrast and
            brightness at once, else it is mmsegmentation's PhotoMetricDistortion, whose strengths are 32, 0.5, 0.5, 18 and probability 0.5.
            Default 1.
        brightness: largest random shift of all pixel values, in units of 0..255. Default 24.
        contrast: largest random relative change of contrast. Default 0.25.
        saturation: largest random relative change of saturation. Default 0.
        hue: largest random turn of the hue, in OpenCV's units of 2 degrees. Default 0.
        max_boxes: boxes are padded to so many an image. Default 100.
        streets: the generated dataset.
        folder: any other dataset as pairs of image and label folders; None if unused.
        boxes: any other dataset as images with boxes, in VOC or COCO form; None if unused.
    """

    source: str = "clear"
    source_weights: tuple[float, ...] = ()
    skip: str | None = None
    mapillary_labels: str = "vltseg"
    root: str = dataclasses.field(default_factory=lambda: os.environ.get("JAXDG_DATA") or "data")
    workers: int = 0
    crop: tuple[int, int] = (128, 128)
    resize: tuple[int, int] | None = None
    keep_ratio: bool = False
    scale: tuple[float, float] = (0.75, 1.5)
    flip: float = 0.5
    max_class_share: float = 1.0
    rare_class_temperature: float = 0.0
    rare_class_min_pixels: int = 3000
    randaugment: tuple[int, float] = (0, 0.0)
    pixmix: tuple[int, float] = (0, 0.0)
    pictures: str | None = None
    distortion_probability: float = 1.0
    brightness: float = 24.0
    contrast: float = 0.25
    saturation: float = 0.0
    hue: float = 0.0
    max_boxes: int = 100
    streets: StreetsOptions = dataclasses.field(default_factory=StreetsOptions)
    folder: FolderOptions | None = None
    boxes: BoxOptions | None = None


@dataclasses.dataclass(unsafe_hash=True, kw_only=True)
class ModelConfig(EncoderOptions):
    """What is trained. The fields of `EncoderOptions` say what the encoder is, and those of the chosen decoder are heeded.

    Attributes:
        weights: converted weights of the encoder; None trains from scratch. Default None.
        text_weights: converted text tower beside the encoder, for the decoder clip_text, or to classify by class names in faster_rcnn_c4.
            Default None.
        start: workdir of another run, or one step in it, whose whole model this one starts from instead of `weights`. Default None.
        pyramid: none, or four levels with layer or batch normalisation; encoders with levels of their own need none and get none.
            Detectors have their own instead, ViTDet's or an FPN. Default layer.
        decoder: linear, segformer (MLP), mask2former, which needs a pyramid, or clip_text: CLIP's features against class names, without
            a step of training. Of detection fcos (light, one stage), faster_rcnn, cascade_rcnn, or faster_rcnn_c4, which looks at proposals
            with the last stage of a CLIP ResNet. Default linear.
        freeze: what stays as loaded: none, all (the encoder), `first N` (embeddings and first N blocks), `last N` (last N blocks),
            or a regular expression searched in parameter names such as `backbone.blocks.3.attn.qkv.kernel`. N counts the stages of a
            hierarchical encoder. Default none.
        linear: settings of that decoder.
        segformer: settings of that decoder.
        mask2former: settings of that decoder.
        clip_text: settings of that decoder.
        fcos: settings of that detector.
        faster_rcnn: settings of that detector.
        cascade_rcnn: settings of that detector.
        faster_rcnn_c4: settings of that detector.
    """

    weights: str | None = None
    text_weights: str | None = None
    start: str | None = None
    pyramid: str = "layer"
    decoder: str = "linear"
    freeze: str = "none"
    # Every decoder and detector by the name that `decoder` knows it by.
    linear: LinearOptions = dataclasses.field(default_factory=LinearOptions)
    segformer: SegformerOptions = dataclasses.field(default_factory=SegformerOptions)
    mask2former: Mask2FormerOptions = dataclasses.field(default_factory=Mask2FormerOptions)
    clip_text: ClipTextOptions = dataclasses.field(default_factory=ClipTextOptions)
    fcos: FcosConfig = dataclasses.field(default_factory=FcosConfig)
    faster_rcnn: RcnnConfig = dataclasses.field(default_factory=single_stage)
    cascade_rcnn: RcnnConfig = dataclasses.field(default_factory=RcnnConfig)
    faster_rcnn_c4: C4Config = dataclasses.field(default_factory=C4Config)


@dataclasses.dataclass
class EvaluationConfig:
    """Zero-shot evaluation.

    Attributes:
        domains: evaluated in this order; the source among them is marked as seen.
        protocol: of segmentation image sizes, windows and label maps: native (images at their own size), vltseg, rein, or with
            test-time augmentation cityscapes_test, acdc_test; see `evaluation/protocols.py`. Of detection whose AP50 is the score:
            voc07, voc12 or coco; see `evaluation/average_precision.py`. If empty, which is the default, the first of these.
        stride: rows and columns in pixels between windows of the size of `data.crop` under native; the others have their own. Default
            64x64.
        batch_size: images a step, over all devices. Default 4.
        windows_per_call: windows computed at once; bounds memory. Default 8.
        max_images: of each domain so many are judged, evenly spread, for quick comparisons; results say so. 0 for all. Default 0.
    """

    domains: tuple[str, ...] = ("clear", "night", "rain", "fog", "dusk_rain")
    protocol: str = ""
    stride: tuple[int, int] = (64, 64)
    batch_size: int = 4
    windows_per_call: int = 8
    max_images: int = 0


@dataclasses.dataclass
class Config:
    """One experiment.

    Attributes:
        steps: optimiser steps of the run; 0 with the decoder clip_text, which is judged as it is. Default 1000.
        batch_size: crops a step, over all devices and hosts. Default 8.
        seed: of initialisation, sampling and augmentation. Default 0.
        log_every: steps between rows of metrics.jsonl. Default 10.
        eval_every: steps between evaluations; 0: no evaluation at all, otherwise also at the end. Default 500.
        checkpoint_every: steps between checkpoints; one is always written at the end. Default 100.
        keep_checkpoints: newest checkpoints kept, besides the best on the source domain. Default 2.
        task: segmentation or detection. Default segmentation.
        mesh: devices.
        data: what is trained on.
        model: what is trained.
        optimizer: how.
        tldr: a comparison, off by default.
        evaluation: on what it is judged.
    """

    steps: int = 1000
    batch_size: int = 8
    seed: int = 0
    log_every: int = 10
    eval_every: int = 500
    checkpoint_every: int = 100
    keep_checkpoints: int = 2
    task: str = "segmentation"
    mesh: MeshConfig = dataclasses.field(default_factory=MeshConfig)
    data: DataConfig = dataclasses.field(default_factory=DataConfig)
    model: ModelConfig = dataclasses.field(default_factory=ModelConfig)
    optimizer: OptimizerConfig = dataclasses.field(default_factory=OptimizerConfig)
    tldr: TldrOptions = dataclasses.field(default_factory=TldrOptions)
    evaluation: EvaluationConfig = dataclasses.field(default_factory=EvaluationConfig)


# What a task allows for model.decoder, and for evaluation.protocol, of which the first is the default.
DECODERS = {
    task: tuple(name for name, hint in typing.get_type_hints(ModelConfig).items() if isinstance(hint, type) and issubclass(hint, kind))
    for task, kind in (("segmentation", DecoderOptions), ("detection", HeadConfig))
}
PROTOCOLS = {"segmentation": protocols.NAMES, "detection": ("voc07", "voc12", "coco")}
