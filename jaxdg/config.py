"""The configuration of a run: mutable dataclasses of JSON types, overridden on the command line, validated after parsing.

A file below `configs/` defines `get_config() -> Config`. Every field is documented here with its unit and default.
"""

from collections.abc import Iterator
import dataclasses
import difflib
import importlib.util
import json
import math
import os
from pathlib import Path
import re
import sys
import types
import typing
from typing import Any

from jaxdg import files, paths
from jaxdg.data import protocols
from jaxdg.data.boxes import BoxOptions
from jaxdg.data.datasets import FolderOptions, StreetsOptions
from jaxdg.data.labels import check_names


@dataclasses.dataclass
class MeshConfig:
    """How devices are arranged; the product must be the number of devices, -1 meaning "the rest".

    Attributes:
        data: copies of the model, each with its own part of the batch. Default -1.
        fsdp: devices among which one copy's parameters, gradients and optimiser state are divided. Default 1.
    """

    data: int = -1
    fsdp: int = 1


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


@dataclasses.dataclass
class Mask2FormerOptions:
    """Sizes of the Mask2Former decoder; the defaults are VLTSeg's.

    Attributes:
        hidden: channels of everything inside; a multiple of 32 and of `heads`. Default 256.
        queries: masks predicted for an image; at least the number of classes. Default 100.
        heads: of all attention. Default 8.
        pixel_layers: of deformable attention in the pixel decoder. Default 6.
        pixel_ffn: channels inside their MLPs. Default 1024.
        layers: of the transformer decoder. Default 9.
        ffn: channels inside their MLPs. Default 2048.
        sampling_points: read by a head of the deformable attention on each level. Default 4.
        points: at which matching and losses compare masks. Default 12544.
        published_init: start as the authors' code does: most kernels by Xavier, sampling points on a compass. False: every kernel,
            and where sampling points lie, within 1 / sqrt(fan_in), as transformers' modules start when they are built one by one.
            Default True.
    """

    hidden: int = 256
    queries: int = 100
    heads: int = 8
    pixel_layers: int = 6
    pixel_ffn: int = 1024
    layers: int = 9
    ffn: int = 2048
    sampling_points: int = 4
    points: int = 12544
    published_init: bool = True


@dataclasses.dataclass
class FcosOptions:
    """Sizes of the light single-stage head of detectors.

    Attributes:
        channels: of the pyramid and the towers; a multiple of `groups`. Default 128.
        convs: convolutions of each tower. Default 2.
        groups: of the GroupNorm after each. Default 32.
        levels: of the pyramid, 0 to 3 with 4 to 32 pixels a feature, beside one more that is coarser. Default 1, 2, 3.
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


@dataclasses.dataclass
class RcnnOptions:
    """Sizes of two-stage detectors; the defaults are ViTDet's.

    Attributes:
        channels: of the pyramid and of convolutions in the box heads. Default 256.
        levels: of the pyramid that boxes are pooled from, 0 to 3 with 4 to 32 pixels a feature. Default 0, 1, 2, 3.
        anchors: roots of the areas of anchors in pixels, one for each level and one more; those of C4 are all on one level.
            Default 32, 64, 128, 256, 512.
        rpn_convs: convolutions of the proposal network. Default 2.
        rpn_samples: anchors drawn for the losses of an image. Default 256.
        before: best proposals of a level that suppression chooses from, in training and in inference. Default 2000, 1000.
        after: best proposals of an image that are left of them. Default 1000, 1000.
        convs: convolutions of a box head. Default 4.
        fcs: linear layers of a box head. Default 1.
        hidden: channels of those. Default 1024.
        proposals: drawn for the losses of an image. Default 512.
        score_threshold: least score of a detection. Default 0.05.
        nms: IoU above which the better of two boxes of a class suppresses the other. Default 0.5.
        detections: most boxes found in an image. Default 100.
        attention_pool: of C4: the encoder's attention pool makes a vector of a proposal, and not the mean. Default True.
    """

    channels: int = 256
    levels: tuple[int, ...] = (0, 1, 2, 3)
    anchors: tuple[float, ...] = (32.0, 64.0, 128.0, 256.0, 512.0)
    rpn_convs: int = 2
    rpn_samples: int = 256
    before: tuple[int, int] = (2000, 1000)
    after: tuple[int, int] = (1000, 1000)
    convs: int = 4
    fcs: int = 1
    hidden: int = 1024
    proposals: int = 512
    score_threshold: float = 0.05
    nms: float = 0.5
    detections: int = 100
    attention_pool: bool = True


@dataclasses.dataclass
class ModelConfig:
    """What is trained.

    Attributes:
        encoder: a name of the zoo (`jaxdg.backbones.ZOO`). Default scratch_ti8.
        weights: converted weights of the encoder; None trains from scratch. Default None.
        text_weights: converted text tower beside the encoder, for the decoder clip_text, or to classify by class names in faster_rcnn_c4.
            Default None.
        start: workdir of another run, or one step in it, whose whole model this one starts from instead of `weights`. Default None.
        taps: blocks whose features are read, from 0; () for the zoo's choice. Default ().
        patch_size: side of the encoder's patches in pixels; None for that of its pre-training. Default None.
        patch_resize: how the kernel of stored patches of another size is resized: flexi (FlexiViT's pseudo-inverse) or bicubic. Default
            flexi.
        window: rows and columns of tokens in the windows that most blocks of EVA-02 attend in, for large images (ViTDet: 16); 0: every
            block attends to the whole image. Default 0.
        pyramid: none, or four levels with layer or batch normalisation; encoders with levels of their own need none and get none.
            Detectors have their own instead, ViTDet's or an FPN. Default layer.
        decoder: linear, segformer (MLP), mask2former, which needs a pyramid, or clip_text: CLIP's features against class names, without
            a step of training. Of detection fcos (light, one stage), faster_rcnn, cascade_rcnn, or faster_rcnn_c4, which looks at proposals
            with the last stage of a CLIP ResNet. Default linear.
        mask2former: sizes of that decoder.
        fcos: sizes of that decoder.
        rcnn: sizes of the two-stage detectors.
        segformer_channels: inside the segformer decoder; SegFormer has 256 on mit_b0 and mit_b1, and 768 on larger ones. Default 256.
        freeze: what stays as loaded: none, all (the encoder), `first N` (embeddings and first N blocks), `last N` (last N blocks),
            or a regular expression searched in parameter names such as `backbone.blocks.3.attn.qkv.kernel`. N counts the stages of a
            hierarchical encoder. Default none.
        drop_path: probability of skipping the branches of the encoder's last block. Default 0.
        remat: recompute encoder blocks in the backward pass: less memory, a third more time. Default False.
        dtype: compute type, float32 or bfloat16; parameters stay float32. Default float32.
    """

    encoder: str = "scratch_ti8"
    weights: str | None = None
    text_weights: str | None = None
    start: str | None = None
    taps: tuple[int, ...] = ()
    patch_size: int | None = None
    patch_resize: str = "flexi"
    window: int = 0
    pyramid: str = "layer"
    decoder: str = "linear"
    mask2former: Mask2FormerOptions = dataclasses.field(default_factory=Mask2FormerOptions)
    fcos: FcosOptions = dataclasses.field(default_factory=FcosOptions)
    rcnn: RcnnOptions = dataclasses.field(default_factory=RcnnOptions)
    segformer_channels: int = 256
    freeze: str = "none"
    drop_path: float = 0.0
    remat: bool = False
    dtype: str = "float32"


@dataclasses.dataclass
class OptimizerConfig:
    """AdamW with a polynomial schedule.

    Attributes:
        learning_rate: peak. Default 1e-4.
        encoder_factor: of the encoder's learning rate when it starts from `model.weights`; from scratch it is 1. Default 0.1.
        warmup_steps: steps of linear warm-up from 0. Default 0.
        hold_steps: steps at the peak after that, before the decay begins. Default 0.
        power: of the polynomial decay to 0 at the last step; 0 keeps the rate constant. Default 0.9.
        betas: decay of AdamW's moments. Default 0.9, 0.999.
        epsilon: of AdamW. Default 1e-8.
        weight_decay: decoupled, multiplied by the learning rate. Default 0.05.
        clip: largest global L2 norm of the gradient; 0 turns clipping off. Default 0.01.
        accumulate: parts a batch is computed in, one after another, for less memory; the result is that of the whole. Default 1.
        learning_rate_factors: (regex, factor) pairs; the first regex found in a parameter's name counts. Default ().
        weight_decay_factors: likewise. Default: no decay on norms, layer scales, class and register tokens, and embeddings of
            positions, queries and levels.
    """

    learning_rate: float = 1e-4
    encoder_factor: float = 0.1
    warmup_steps: int = 0
    hold_steps: int = 0
    power: float = 0.9
    betas: tuple[float, float] = (0.9, 0.999)
    epsilon: float = 1e-8
    weight_decay: float = 0.05
    clip: float = 0.01
    accumulate: int = 1
    learning_rate_factors: tuple[tuple[str, float], ...] = ()
    weight_decay_factors: tuple[tuple[str, float], ...] = (
        (r"norm|_ln\.|gamma$|(cls_token|(register|storage)_tokens|(pos|query|level)_embed|query_feat)$", 0.0),
    )


@dataclasses.dataclass
class TldrOptions:
    """TLDR, a comparison that trains on images in random styles besides; needs `model.weights`. See `jaxdg/tldr.py`.

    Attributes:
        on: whether it is used; a step then sends three times as many images through the encoder. Default False.
        regularization: weights of how much the textures of images may change, of the encoder's quarters or stages, shallow to deep; the
            deepest may be left out. Default 0.005, 0.0005, 0.00005, 0.000005.
        generalization: likewise of how well textures of stylised images become those of their styles. Default 0.005, 0.0005.
        threshold: by how much an entry of a Gram matrix must exceed the original's, for the style to show in it. Default 0.1.
    """

    on: bool = False
    regularization: tuple[float, ...] = (0.005, 0.0005, 0.00005, 0.000005)
    generalization: tuple[float, ...] = (0.005, 0.0005)
    threshold: float = 0.1


@dataclasses.dataclass
class EvaluationConfig:
    """Zero-shot evaluation.

    Attributes:
        domains: evaluated in this order; the source among them is marked as seen.
        protocol: of segmentation image sizes, windows and label maps: native (images at their own size), vltseg, rein, or with test-time
            augmentation cityscapes_test, acdc_test; see `data/protocols.py`. Of detection whose AP50 is the score: voc07, voc12 or coco;
            see `detection/average_precision.py`. If empty, which is the default, the first of these.
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
    "segmentation": ("linear", "segformer", "mask2former", "clip_text"),
    "detection": ("fcos", "faster_rcnn", "cascade_rcnn", "faster_rcnn_c4"),
}
PROTOCOLS = {"segmentation": protocols.NAMES, "detection": ("voc07", "voc12", "coco")}


def _are_factors(pairs: tuple[tuple[str, float], ...]) -> bool:
    try:
        return all(re.compile(pattern) and factor >= 0 for pattern, factor in pairs)
    except re.error:
        return False


# (field, what is allowed, test); types are checked from the annotations. Choices stand here because flags cannot parse Literal.
_RULES: tuple[tuple[str, str, Any], ...] = (
    ("steps", "0 (with model.decoder clip_text) or more", lambda v: v >= 0),
    ("batch_size", "at least 1", lambda v: v >= 1),
    ("seed", "0 to 2^31 - 1", lambda v: 0 <= v < 2**31),
    ("log_every", "at least 1", lambda v: v >= 1),
    ("eval_every", "0 (never) or more", lambda v: v >= 0),
    ("checkpoint_every", "at least 1", lambda v: v >= 1),
    ("keep_checkpoints", "at least 1", lambda v: v >= 1),
    ("task", " or ".join(DECODERS), lambda v: v in DECODERS),
    ("model.patch_size", "None or at least 1 pixel", lambda v: v is None or v >= 1),
    ("model.patch_resize", "flexi or bicubic", lambda v: v in ("flexi", "bicubic")),
    ("model.window", "0 (off) or more", lambda v: v >= 0),
    ("model.pyramid", "none, layer or batch", lambda v: v in ("none", "layer", "batch")),
    ("model.segformer_channels", "at least 1", lambda v: v >= 1),
    *(
        (f"model.mask2former.{field.name}", "at least 1", lambda v: v >= 1)
        for field in dataclasses.fields(Mask2FormerOptions)
        if field.type is int
    ),
    *((f"model.fcos.{name}", "at least 1", lambda v: v >= 1) for name in ("channels", "convs", "groups", "candidates", "detections")),
    *((f"model.rcnn.{name}", "at least 1", lambda v: v >= 1) for name in ("channels", "rpn_samples", "hidden", "proposals", "detections")),
    *((f"model.rcnn.{name}", "0 or more", lambda v: v >= 0) for name in ("rpn_convs", "convs", "fcs")),
    *((f"model.rcnn.{name}", "two numbers of at least 1", lambda v: min(v) >= 1) for name in ("before", "after")),
    *((f"model.{head}.{name}", "0 to 1", lambda v: 0 <= v <= 1) for head in ("fcos", "rcnn") for name in ("score_threshold", "nms")),
    ("model.rcnn.anchors", "sides of more than 0 pixels", lambda v: min(v, default=0) > 0),
    ("model.dtype", "float32 or bfloat16", lambda v: v in ("float32", "bfloat16")),
    ("mesh.data", "-1 (the rest) or at least 1", lambda v: v == -1 or v >= 1),
    ("mesh.fsdp", "-1 (the rest) or at least 1", lambda v: v == -1 or v >= 1),
    ("data.source_weights", "positive numbers", lambda v: all(w > 0 for w in v)),
    ("data.mapillary_labels", "vltseg or rein", lambda v: v in ("vltseg", "rein")),
    ("data.workers", "0 or more", lambda v: v >= 0),
    ("data.crop", "two sides of at least 1 pixel", lambda v: min(v) >= 1),
    ("data.scale", "two positive factors, smallest first", lambda v: 0 < v[0] <= v[1]),
    ("data.flip", "0 to 1", lambda v: 0 <= v <= 1),
    ("data.resize", "None or two sides of at least 1 pixel", lambda v: v is None or min(v) >= 1),
    ("data.max_class_share", "above 0 up to 1", lambda v: 0 < v <= 1),
    ("data.rare_class_temperature", "0 (off) or more", lambda v: v >= 0),
    ("data.rare_class_min_pixels", "at least 1", lambda v: v >= 1),
    ("data.randaugment", "0 or more operations, a magnitude of 0 to 10", lambda v: v[0] >= 0 and 0 <= v[1] <= 10),
    ("data.pixmix", "0 rounds (off), or more and a beta above 0", lambda v: v[0] == 0 or (v[0] > 0 and v[1] > 0)),
    ("data.distortion_probability", "0 to 1", lambda v: 0 <= v <= 1),
    ("data.brightness", "0 to 255", lambda v: 0 <= v <= 255),
    ("data.contrast", "0 to 1", lambda v: 0 <= v <= 1),
    ("data.saturation", "0 to 1", lambda v: 0 <= v <= 1),
    ("data.hue", "0 to 90, half a turn", lambda v: 0 <= v <= 90),
    ("data.max_boxes", "at least 1", lambda v: v >= 1),
    ("data.streets.size", "two sides of at least 32 pixels", lambda v: min(v) >= 32),
    ("data.streets.images", "at least 1", lambda v: v >= 1),
    ("data.streets.val_images", "at least 1", lambda v: v >= 1),
    ("data.streets.seed", "0 or more", lambda v: v >= 0),
    ("model.drop_path", "0 to below 1", lambda v: 0 <= v < 1),
    ("optimizer.learning_rate", "above 0", lambda v: v > 0),
    ("optimizer.encoder_factor", "0 or more", lambda v: v >= 0),
    ("optimizer.warmup_steps", "0 or more", lambda v: v >= 0),
    ("optimizer.hold_steps", "0 or more", lambda v: v >= 0),
    ("optimizer.power", "0 or more", lambda v: v >= 0),
    ("optimizer.betas", "two numbers of 0 to below 1", lambda v: all(0 <= x < 1 for x in v)),
    ("optimizer.epsilon", "above 0", lambda v: v > 0),
    ("optimizer.weight_decay", "0 or more", lambda v: v >= 0),
    ("optimizer.clip", "0 (off) or more", lambda v: v >= 0),
    ("optimizer.accumulate", "at least 1", lambda v: v >= 1),
    ("optimizer.learning_rate_factors", "(regular expression, factor of 0 or more) pairs", _are_factors),
    ("optimizer.weight_decay_factors", "(regular expression, factor of 0 or more) pairs", _are_factors),
    *(
        (f"tldr.{name}", "at most 4 weights of 0 or more", lambda v: len(v) <= 4 and min(v, default=0) >= 0)
        for name in ("regularization", "generalization")
    ),
    ("tldr.threshold", "0 or more", lambda v: v >= 0),
    ("evaluation.domains", "at least one", lambda v: len(v) >= 1),
    ("evaluation.stride", "two steps of at least 1 pixel", lambda v: min(v) >= 1),
    ("evaluation.batch_size", "at least 1", lambda v: v >= 1),
    ("evaluation.windows_per_call", "at least 1", lambda v: v >= 1),
    ("evaluation.max_images", "0 (all) or more", lambda v: v >= 0),
)


# What a field that names a file or a folder may be; only the data root may be a URL.
_PATHS = {
    "data.root": "a folder, or the URL of one with records",
    "data.skip": "None or a file",
    "data.pictures": "None or a folder",
    "model.weights": "None or a file",
    "model.text_weights": "None or a file",
    "model.start": "None or a workdir",
}

# Texts that are documented to mean something when they are empty. An empty regular expression is found in every name.
_MAY_BE_EMPTY = re.compile(r"evaluation\.protocol|data\.folder\.\w+_suffix|data\.boxes\.lists\[\d\]|optimizer\.\w+_factors\[.*")


def _check_texts(config: Config) -> None:
    """Expands paths in `config`, and refuses texts that name nothing, or two classes alike."""
    for field, allowed in _PATHS.items():
        owner, _, name = field.rpartition(".")
        holder = get(config, owner)
        if (path := getattr(holder, name)) is not None:
            setattr(holder, name, paths.given(path, field, allowed=allowed, urls=field == "data.root"))
    for field, text in _texts(dataclasses.asdict(config)):
        if not text.strip() and not _MAY_BE_EMPTY.fullmatch(field):
            raise ValueError(f"{field} is {text!r}; allowed: text that is not empty")
    for field in ("data.source", "evaluation.domains"):
        value = get(config, field)
        for domain in (value,) if isinstance(value, str) else value:
            if not all(part.strip() for part in domain.split("+")):
                raise ValueError(f"{field} is {value!r}; allowed: names of domains, several joined by +, none of them empty")
    taken: dict[str, str] = {}
    for domain in config.evaluation.domains:
        other = taken.setdefault(domain.replace("/", "_"), domain)
        if other != domain:
            raise ValueError(f"evaluation.domains has {other!r} and {domain!r}, whose files would have one name; rename one")
    if config.data.folder is not None:
        check_names(config.data.folder.classes, "data.folder.classes")
    if config.data.boxes is not None:
        # The XML files of VOC name them in any case.
        check_names(config.data.boxes.classes, "data.boxes.classes", any_case=True)


def _once_empty(content: dict[str, Any]) -> dict[str, Any]:
    """The contents of config.json with what an empty path meant where one was still allowed: none, or the current folder."""
    for field, allowed in _PATHS.items():
        owner, _, name = field.partition(".")
        holder = content.get(owner)
        if isinstance(holder, dict) and holder.get(name) == "":
            holder[name] = None if allowed.startswith("None") else "."
    return content


def _texts(tree: Any, field: str = "") -> Iterator[tuple[str, str]]:
    """Every text in a tree of dicts and tuples, and where it is."""
    if isinstance(tree, str):
        yield field, tree
    elif isinstance(tree, dict):
        for key, value in tree.items():
            yield from _texts(value, f"{field}.{key}" if field else str(key))
    elif isinstance(tree, tuple):
        for i, value in enumerate(tree):
            yield from _texts(value, f"{field}[{i}]")


def validated(config: Config) -> Config:
    """A checked copy of `config` with every value of its declared type.

    Raises:
        ValueError: a wrong value or combination; the message says which field and what is allowed.
    """
    config = coerce(config, Config, "")
    _check_texts(config)
    for field, allowed, test in _RULES:
        value = get(config, field)
        if not test(value):
            raise ValueError(f"{field} is {value}; allowed: {allowed}")
    _check_task(config)
    if config.batch_size % config.optimizer.accumulate:
        raise ValueError(f"optimizer.accumulate is {config.optimizer.accumulate}; allowed: a divisor of batch_size {config.batch_size}")
    untrained = config.model.decoder == "clip_text"
    if untrained:
        _check_untrained(config)
    elif not config.steps:
        raise ValueError(f"steps is 0; allowed: at least 1 with model.decoder {config.model.decoder}, which has to be trained")
    o = config.optimizer
    if not untrained and o.warmup_steps + o.hold_steps >= config.steps:
        before = f"optimizer.warmup_steps is {o.warmup_steps} and hold_steps is {o.hold_steps}"
        raise ValueError(f"{before}; allowed: together less than steps {config.steps}")
    if config.tldr.on and config.model.weights is None:
        raise ValueError("tldr.on is True; allowed: False without model.weights, the encoder whose textures are to be kept")
    sources, weights = config.data.source.split("+"), config.data.source_weights
    if weights and len(weights) != len(sources):
        raise ValueError(f"data.source_weights is {weights}; allowed: () or one weight for each of {', '.join(sources)}")
    if config.data.keep_ratio and config.data.resize is None:
        raise ValueError("data.keep_ratio is True; allowed: False, as data.resize is None")
    crop, stride = config.data.crop, config.evaluation.stride
    if config.task == "segmentation" and (stride[0] > crop[0] or stride[1] > crop[1]):
        raise ValueError(f"evaluation.stride is {stride}; allowed: at most data.crop {crop}, or windows would leave gaps")
    return config


def _check_task(config: Config) -> None:
    """Decoder and protocol are the task's; settings that detection could not heed are refused."""
    task, e, m = config.task, config.evaluation, config.model
    e.protocol = e.protocol or PROTOCOLS[task][0]
    for field, choices in (("model.decoder", DECODERS[task]), ("evaluation.protocol", PROTOCOLS[task])):
        if get(config, field) not in choices:
            raise ValueError(f"{field} is {get(config, field)}; allowed: {', '.join(choices)}, with task {task}")
    if task == "segmentation":
        return
    _want(config, {"data.rare_class_temperature": 0, "data.max_class_share": 1}, "task detection, as there are no label maps")
    _want(config, {"model.taps": ()}, "task detection, whose pyramid reads the last block, or the stages of its levels")
    if m.text_weights and not (m.decoder == "faster_rcnn_c4" and m.rcnn.attention_pool):
        raise ValueError(
            f"model.text_weights is {m.text_weights}; allowed: None but with model.decoder faster_rcnn_c4 and its attention_pool"
        )
    if m.decoder in ("faster_rcnn", "cascade_rcnn") and len(m.rcnn.anchors) != len(m.rcnn.levels) + 1:
        raise ValueError(f"model.rcnn.anchors is {m.rcnn.anchors}; allowed: one for each of model.rcnn.levels {m.rcnn.levels} and one more")


def _want(config: Config, wanted: dict[str, Any], reason: str) -> None:
    for field, value in wanted.items():
        if get(config, field) != value:
            raise ValueError(f"{field} is {get(config, field)}; allowed: {value} with {reason}")


def _check_untrained(config: Config) -> None:
    """The decoder clip_text takes all from two files and trains nothing; settings that it could not heed are refused."""
    m = config.model
    for field in ("weights", "text_weights"):
        if getattr(m, field) is None:
            raise ValueError(f"model.{field} is None; model.decoder clip_text needs a converted file, see configs/camvid_clip_zero_shot.py")
    wanted = {"steps": 0, "model.start": None, "model.taps": (), "model.pyramid": "none", "tldr.on": False}
    _want(config, wanted, "model.decoder clip_text, which trains nothing")


def get(config: Any, field: str) -> Any:
    """The value at a dotted `field` such as "optimizer.clip"."""
    for part in field.split("."):
        config = getattr(config, part)
    return config


def flat(tree: dict, prefix: str = "") -> dict[str, Any]:
    """The values in a tree of dicts by dotted name."""
    found: dict[str, Any] = {}
    for key, value in tree.items():
        found |= flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return found


def common(config: Any) -> dict[str, Any]:
    """The fields of a configuration that all processes of a run must share: all but where the data lie and who reads them."""
    fields = flat(dataclasses.asdict(config))
    return {field: value for field, value in fields.items() if field not in ("data.root", "data.workers")}


def coerce(value: Any, annotation: Any, where: str) -> Any:
    """`value` as `annotation` says, from dataclasses or JSON; ValueError names the field `where` and what is allowed."""
    origin, args = typing.get_origin(annotation), typing.get_args(annotation)
    fail = ValueError(f"{where or 'the configuration'} is {value!r}; allowed: {_describe(annotation)}")
    if origin in (typing.Union, types.UnionType):
        if value is None or value == "None":
            return None
        return coerce(value, next(a for a in args if a is not types.NoneType), where)
    if dataclasses.is_dataclass(annotation):
        if dataclasses.is_dataclass(value) and not isinstance(value, type):
            value = {f.name: getattr(value, f.name) for f in dataclasses.fields(value)} | vars(value)
        if not isinstance(value, dict):
            raise fail
        hints = typing.get_type_hints(annotation)
        prefix = where + "." if where else ""
        for key in value:
            if key not in hints:
                raise ValueError(unknown_field(prefix + key, key, hints))
        make: Any = annotation
        return make(**{key: coerce(v, hints[key], prefix + key) for key, v in value.items()})
    if origin is tuple:
        if not isinstance(value, (list, tuple)):
            raise fail
        if len(args) == 2 and args[1] is Ellipsis:
            return tuple(coerce(v, args[0], f"{where}[{i}]") for i, v in enumerate(value))
        if len(value) != len(args):
            raise fail
        return tuple(coerce(v, a, f"{where}[{i}]") for i, (v, a) in enumerate(zip(value, args, strict=True)))
    if origin is dict:
        if not isinstance(value, dict):
            raise fail
        return {coerce(k, args[0], where): coerce(v, args[1], f"{where}[{k!r}]") for k, v in value.items()}
    try:
        if annotation is bool:
            if not isinstance(value, bool):
                raise fail
            return value
        if annotation is int:
            if isinstance(value, bool) or (isinstance(value, float) and value != int(value)):
                raise fail
            return int(value)
        if annotation is float:
            if isinstance(value, bool):
                raise fail
            number = float(value)
            if not math.isfinite(number):
                raise fail
            return number
    except (TypeError, ValueError, OverflowError):
        raise fail from None
    if annotation is str and not isinstance(value, str):
        raise fail
    return value


def _describe(annotation: Any) -> str:
    origin, args = typing.get_origin(annotation), typing.get_args(annotation)
    if origin in (typing.Union, types.UnionType):
        return " or ".join("None" if a is types.NoneType else _describe(a) for a in args)
    if origin is tuple:
        return f"any number of {_describe(args[0])}" if args[-1] is Ellipsis else f"{len(args)} of {_describe(args[0])}"
    if origin is dict:
        return f"a dict from {_describe(args[0])} to {_describe(args[1])}"
    names = {int: "an integer", float: "a number", bool: "True or False", str: "text"}
    return names.get(annotation, getattr(annotation, "__name__", str(annotation)))


def unknown_field(field: str, key: str, known: Any) -> str:
    """The message for a misspelt field."""
    close = difflib.get_close_matches(key, list(known), n=1, cutoff=0.5)
    prefix = field[: len(field) - len(key)]
    return f"unknown field {field}; " + (
        f"did you mean {prefix}{close[0]}?" if close else f"allowed: {' '.join(prefix + k for k in sorted(known))}"
    )


def annotation(field: str) -> Any:
    """The type of a dotted `field` of the configuration.

    Raises:
        ValueError: an unknown field, with the closest known one.
    """
    parts, found = field.split("."), Config
    for i, part in enumerate(parts):
        holder = part_type(found)
        if not dataclasses.is_dataclass(holder):
            owner = ".".join(parts[:i])
            raise ValueError(f"unknown field {field}; {owner} has no parts, give --config.{owner}=VALUE")
        hints = typing.get_type_hints(holder)
        if part not in hints:
            raise ValueError(unknown_field(".".join(parts[: i + 1]), part, hints))
        found = hints[part]
    return found


def part_type(annotation: Any) -> Any:
    """The dataclass that a field holds, or may hold instead of None; else the annotation itself."""
    return next((a for a in typing.get_args(annotation) if dataclasses.is_dataclass(a)), annotation)


def let_import(path: str | Path) -> None:
    """Lets an experiment file import others beside it as `from configs.other import get_config`, wherever the command is run."""
    folder = str(Path(path).resolve().parent.parent)
    if folder not in sys.path:
        sys.path.append(folder)


def from_file(path: str | Path) -> Config:
    """The validated `get_config()` of a file below configs/."""
    return validated(experiment(path).get_config())


def experiment(path: str | Path) -> Any:
    """The module that a file below configs/ is."""
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no config file {path}; see configs/ for those that exist")
    let_import(path)
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def save(config: Config, workdir: str | Path) -> None:
    """Writes `config.json` into the workdir, whole or not at all."""
    files.write(Path(workdir) / "config.json", json.dumps(dataclasses.asdict(config), indent=2) + "\n")


def load(workdir: str | Path) -> Config:
    """The configuration stored in a workdir.

    Raises:
        FileNotFoundError: the folder holds no config.json.
        Broken: it is empty, cut or no JSON object.
        ValueError: it is no valid configuration.
    """
    path = Path(workdir) / "config.json"
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist; give the workdir of a training run (the folder given to --workdir)")
    try:
        content = files.read_json(path)
        if not isinstance(content, dict):
            raise files.Broken(f"{path}: broken (no JSON object)")
    except files.Broken as error:
        raise files.Broken(f"{error}; run the command that trains it again, which writes it anew and keeps the checkpoints") from None
    try:
        return validated(coerce(_once_empty(content), Config, ""))
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
