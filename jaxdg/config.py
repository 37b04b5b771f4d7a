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

from jaxdg import files, methods, paths
from jaxdg.backbones import EncoderOptions
from jaxdg.data import protocols
from jaxdg.data.boxes import BoxOptions
from jaxdg.data.datasets import FolderOptions, StreetsOptions
from jaxdg.data.labels import check_names
from jaxdg.detection.fcos import FcosConfig
from jaxdg.detection.head import HeadConfig
from jaxdg.detection.rcnn import C4Config, RcnnConfig, single_stage
from jaxdg.methods.tldr import TldrOptions
from jaxdg.segmentation.clip_text import ClipTextOptions
from jaxdg.segmentation.decoder import DecoderOptions
from jaxdg.segmentation.linear import LinearOptions
from jaxdg.segmentation.mask2former import Mask2FormerOptions
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
    task: tuple(name for name, hint in typing.get_type_hints(ModelConfig).items() if isinstance(hint, type) and issubclass(hint, kind))
    for task, kind in (("segmentation", DecoderOptions), ("detection", HeadConfig))
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
    ("model.segformer.hidden", "at least 1", lambda v: v >= 1),
    *(
        (f"model.mask2former.{field.name}", "at least 1", lambda v: v >= 1)
        for field in dataclasses.fields(Mask2FormerOptions)
        if field.type is int
    ),
    *((f"model.fcos.{name}", "at least 1", lambda v: v >= 1) for name in ("channels", "convs", "groups", "candidates", "detections")),
    *(
        rule
        for head in ("faster_rcnn", "cascade_rcnn", "faster_rcnn_c4")
        for rule in (
            *((f"model.{head}.{name}", "at least 1", lambda v: v >= 1) for name in ("rpn.samples", "roi.proposals", "roi.detections")),
            *((f"model.{head}.roi.{name}", "at least 1", lambda v: v >= 1) for name in ("channels", "hidden", "size")),
            *((f"model.{head}.{name}", "0 or more", lambda v: v >= 0) for name in ("rpn.convs", "roi.convs", "roi.fcs")),
            *((f"model.{head}.rpn.{name}", "two numbers of at least 1", lambda v: min(v) >= 1) for name in ("before", "after")),
            *((f"model.{head}.{name}", "0 to 1", lambda v: 0 <= v <= 1) for name in ("rpn.nms", "roi.score_threshold", "roi.nms")),
            (
                f"model.{head}.rpn.sizes",
                "sides of more than 0 pixels",
                lambda v: min((min(sides, default=0) for sides in v), default=0) > 0,
            ),
        )
    ),
    *((f"model.fcos.{name}", "0 to 1", lambda v: 0 <= v <= 1) for name in ("score_threshold", "nms")),
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
    config = coerce(config, type(config), "")  # an experiment may add methods in a class of its own
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
    for name, options in methods.settings(config).items():
        options.check(config, name)
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
    head = getattr(m, m.decoder)
    head.check(f"model.{m.decoder}")
    if m.text_weights:
        head.with_texts()


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
    wanted = {"steps": 0, "model.start": None, "model.taps": (), "model.pyramid": "none"} | {
        f"{name}.on": False for name in methods.settings(config)
    }
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
    """The message for a misspelt field, or one that has another name now."""
    if field == "model.segformer_channels":
        return f"{field} is called model.segformer.hidden now"
    if field == "model.rcnn":
        return (
            f"{field} is called model.faster_rcnn, model.cascade_rcnn or model.faster_rcnn_c4 now, by the decoder; proposals are set "
            "in .rpn (convs, sizes, samples, before, after) and box heads in .roi"
        )
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


# Where the settings of two-stage detectors are that `model.rcnn` held once, one list for three detectors.
_RCNN = {
    "rpn": {"rpn_convs": "convs", "rpn_samples": "samples", "before": "before", "after": "after"},
    "roi": {name: name for name in ("channels", "convs", "fcs", "hidden", "proposals", "score_threshold", "nms", "detections")},
}


def _renamed(content: dict[str, Any], kind: type[Config]) -> dict[str, Any]:
    """A stored configuration by the names that its fields have now.

    Methods of the experiment's own (`jaxdg.methods`) are left out: they change training alone, and only their file knows them.
    """
    known = {field.name for field in dataclasses.fields(kind)}
    content = {name: part for name, part in content.items() if name in known or not (isinstance(part, dict) and "on" in part)}
    model = dict(content.get("model") or {})
    if "segformer_channels" in model:
        model["segformer"] = {"hidden": model.pop("segformer_channels")}
    if "rcnn" in model:
        old = model.pop("rcnn")
        parts = {part: {new: old[name] for name, new in names.items() if name in old} for part, names in _RCNN.items()}
        one_stage = {"stages": [[0.5, 10.0]], "class_agnostic": False}
        for head, roi in (("cascade_rcnn", {}), ("faster_rcnn", one_stage), ("faster_rcnn_c4", {**one_stage, "size": 14})):
            model[head] = {"rpn": dict(parts["rpn"]), "roi": {**parts["roi"], **roi}}
            if "anchors" in old:
                c4 = head == "faster_rcnn_c4"
                model[head]["rpn"]["sizes"] = [old["anchors"]] if c4 else [[size] for size in old["anchors"]]
            kept = ("attention_pool",) if head == "faster_rcnn_c4" else ("channels", "levels")
            model[head] |= {name: old[name] for name in kept if name in old}
    return {**content, "model": model} if model else content


def load(workdir: str | Path, kind: type[Config] = Config) -> Config:
    """The configuration stored in a workdir.

    Args:
        workdir: of a run.
        kind: of an experiment that adds methods of its own; without it they are left out.

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
        return validated(coerce(_once_empty(_renamed(content, kind)), kind, ""))
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
