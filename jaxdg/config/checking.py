"""Checks a configuration: types by the annotations of its fields, ranges by a table, and what does
not go together.
"""

from collections.abc import Iterator
import dataclasses
import difflib
import math
import re
import types
import typing
from typing import Any

from jaxdg import methods
from jaxdg.config import paths
from jaxdg.config.settings import DECODERS, PROTOCOLS, Config
from jaxdg.data.labels import check_names
from jaxdg.segmentation.mask2former.head import Mask2FormerOptions


def _are_factors(pairs: tuple[tuple[str, float], ...]) -> bool:
    try:
        return all(re.compile(pattern) and factor >= 0 for pattern, factor in pairs)
    except re.error:
        return False


# (field, what is allowed, test); types are checked from the annotations. Choices stand here because
# flags cannot parse Literal.
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
    *(
        (f"model.fcos.{name}", "at least 1", lambda v: v >= 1)
        for name in ("channels", "convs", "groups", "candidates", "detections")
    ),
    *(
        rule
        for head in ("faster_rcnn", "cascade_rcnn", "faster_rcnn_c4")
        for rule in (
            *(
                (f"model.{head}.{name}", "at least 1", lambda v: v >= 1)
                for name in ("rpn.samples", "roi.proposals", "roi.detections")
            ),
            *(
                (f"model.{head}.roi.{name}", "at least 1", lambda v: v >= 1)
                for name in ("channels", "hidden", "size")
            ),
            *(
                (f"model.{head}.{name}", "0 or more", lambda v: v >= 0)
                for name in ("rpn.convs", "roi.convs", "roi.fcs")
            ),
            *(
                (f"model.{head}.rpn.{name}", "two numbers of at least 1", lambda v: min(v) >= 1)
                for name in ("before", "after")
            ),
            *(
                (f"model.{head}.{name}", "0 to 1", lambda v: 0 <= v <= 1)
                for name in ("rpn.nms", "roi.score_threshold", "roi.nms")
            ),
            (
                f"model.{head}.rpn.sizes",
                "sides of more than 0 pixels",
                lambda v: min((min(sides, default=0) for sides in v), default=0) > 0,
            ),
        )
    ),
    *(
        (f"model.fcos.{name}", "0 to 1", lambda v: 0 <= v <= 1)
        for name in ("score_threshold", "nms")
    ),
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
    (
        "data.randaugment",
        "0 or more operations, a magnitude of 0 to 10",
        lambda v: v[0] >= 0 and 0 <= v[1] <= 10,
    ),
    (
        "data.pixmix",
        "0 rounds (off), or more and a beta above 0",
        lambda v: v[0] == 0 or (v[0] > 0 and v[1] > 0),
    ),
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
    (
        "optimizer.learning_rate_factors",
        "(regular expression, factor of 0 or more) pairs",
        _are_factors,
    ),
    (
        "optimizer.weight_decay_factors",
        "(regular expression, factor of 0 or more) pairs",
        _are_factors,
    ),
    ("evaluation.domains", "at least one", lambda v: len(v) >= 1),
    ("evaluation.stride", "two steps of at least 1 pixel", lambda v: min(v) >= 1),
    ("evaluation.batch_size", "at least 1", lambda v: v >= 1),
    ("evaluation.windows_per_call", "at least 1", lambda v: v >= 1),
    ("evaluation.max_images", "0 (all) or more", lambda v: v >= 0),
)


# What a field that names a file or a folder may be; only the data root may be a URL.
PATHS = {
    "data.root": "a folder, or the URL of one with records",
    "data.skip": "None or a file",
    "data.pictures": "None or a folder",
    "model.weights": "None or a file",
    "model.text_weights": "None or a file",
    "model.start": "None or a workdir",
}

# Texts that are documented to mean something when they are empty. An empty regular expression is
# found in every name.
_MAY_BE_EMPTY = re.compile(
    r"evaluation\.protocol|data\.folder\.\w+_suffix|data\.boxes\.lists\[\d\]|optimizer\.\w+_factors\[.*"
)


def _check_texts(config: Config) -> None:
    """Expands paths in `config`, and refuses texts that name nothing, or two classes alike."""
    for field, allowed in PATHS.items():
        owner, _, name = field.rpartition(".")
        holder = get(config, owner)
        if (path := getattr(holder, name)) is not None:
            setattr(
                holder, name, paths.given(path, field, allowed=allowed, urls=field == "data.root")
            )
    for field, text in _texts(dataclasses.asdict(config)):
        if not text.strip() and not _MAY_BE_EMPTY.fullmatch(field):
            raise ValueError(f"{field} is {text!r}; allowed: text that is not empty")
    for field in ("data.source", "evaluation.domains"):
        value = get(config, field)
        for domain in (value,) if isinstance(value, str) else value:
            if not all(part.strip() for part in domain.split("+")):
                raise ValueError(
                    f"{field} is {value!r}; allowed: names of domains, several joined by +, none of"
                    " them empty"
                )
    taken: dict[str, str] = {}
    for domain in config.evaluation.domains:
        other = taken.setdefault(domain.replace("/", "_"), domain)
        if other != domain:
            raise ValueError(
                f"evaluation.domains has {other!r} and {domain!r}, whose files would have one name;"
                " rename one"
            )
    if config.data.folder is not None:
        check_names(config.data.folder.classes, "data.folder.classes")
    if config.data.boxes is not None:
        # The XML files of VOC name them in any case.
        check_names(config.data.boxes.classes, "data.boxes.classes", any_case=True)


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
        raise ValueError(
            f"optimizer.accumulate is {config.optimizer.accumulate}; allowed: a divisor of"
            f" batch_size {config.batch_size}"
        )
    untrained = config.model.decoder == "clip_text"
    if untrained:
        _check_untrained(config)
    elif not config.steps:
        raise ValueError(
            f"steps is 0; allowed: at least 1 with model.decoder {config.model.decoder}, which has"
            " to be trained"
        )
    o = config.optimizer
    if not untrained and o.warmup_steps + o.hold_steps >= config.steps:
        before = f"optimizer.warmup_steps is {o.warmup_steps} and hold_steps is {o.hold_steps}"
        raise ValueError(f"{before}; allowed: together less than steps {config.steps}")
    for name, options in methods.settings(config).items():
        options.check(config, name)
    sources = config.data.source.split("+")
    weights = config.data.source_weights
    if weights and len(weights) != len(sources):
        raise ValueError(
            f"data.source_weights is {weights}; allowed: () or one weight for each of"
            f" {', '.join(sources)}"
        )
    if config.data.keep_ratio and config.data.resize is None:
        raise ValueError("data.keep_ratio is True; allowed: False, as data.resize is None")
    crop = config.data.crop
    stride = config.evaluation.stride
    if config.task == "segmentation" and (stride[0] > crop[0] or stride[1] > crop[1]):
        raise ValueError(
            f"evaluation.stride is {stride}; allowed: at most data.crop {crop}, or windows would"
            " leave gaps"
        )
    return config


def _check_task(config: Config) -> None:
    """Decoder and protocol are the task's; settings that detection could not heed are refused."""
    task = config.task
    e = config.evaluation
    m = config.model
    e.protocol = e.protocol or PROTOCOLS[task][0]
    for field, choices in (
        ("model.decoder", DECODERS[task]),
        ("evaluation.protocol", PROTOCOLS[task]),
    ):
        if get(config, field) not in choices:
            raise ValueError(
                f"{field} is {get(config, field)}; allowed: {', '.join(choices)}, with task {task}"
            )
    if task == "segmentation":
        return
    _want(
        config,
        {"data.rare_class_temperature": 0, "data.max_class_share": 1},
        "task detection, as there are no label maps",
    )
    _want(
        config,
        {"model.taps": ()},
        "task detection, whose pyramid reads the last block, or the stages of its levels",
    )
    head = getattr(m, m.decoder)
    head.check(f"model.{m.decoder}")
    if m.text_weights:
        head.with_texts()


def _want(config: Config, wanted: dict[str, Any], reason: str) -> None:
    for field, value in wanted.items():
        if get(config, field) != value:
            raise ValueError(f"{field} is {get(config, field)}; allowed: {value} with {reason}")


def _check_untrained(config: Config) -> None:
    """The decoder clip_text takes all from two files and trains nothing; settings that it could not
    heed are refused.
    """
    m = config.model
    for field in ("weights", "text_weights"):
        if getattr(m, field) is None:
            raise ValueError(
                f"model.{field} is None; model.decoder clip_text needs a converted file, see"
                " configs/camvid_clip_zero_shot.py"
            )
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
        found |= (
            flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
        )
    return found


def common(config: Any) -> dict[str, Any]:
    """The fields of a configuration that all processes of a run must share: all but where the data
    lie and who reads them.
    """
    fields = flat(dataclasses.asdict(config))
    return {
        field: value
        for field, value in fields.items()
        if field not in ("data.root", "data.workers")
    }


def coerce(value: Any, annotation: Any, where: str) -> Any:
    """`value` as `annotation` says, from dataclasses or JSON; ValueError names the field `where`
    and what is allowed.
    """
    origin = typing.get_origin(annotation)
    args = typing.get_args(annotation)
    fail = ValueError(
        f"{where or 'the configuration'} is {value!r}; allowed: {_describe(annotation)}"
    )
    if origin in (typing.Union, types.UnionType):
        if value is None or value == "None":
            return None
        return coerce(value, next(a for a in args if a is not types.NoneType), where)
    if dataclasses.is_dataclass(annotation):
        if dataclasses.is_dataclass(value) and not isinstance(value, type):
            value = {f.name: getattr(value, f.name) for f in dataclasses.fields(value)} | vars(
                value
            )
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
        return tuple(
            coerce(v, a, f"{where}[{i}]") for i, (v, a) in enumerate(zip(value, args, strict=True))
        )
    if origin is dict:
        if not isinstance(value, dict):
            raise fail
        return {
            coerce(k, args[0], where): coerce(v, args[1], f"{where}[{k!r}]")
            for k, v in value.items()
        }
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
    origin = typing.get_origin(annotation)
    args = typing.get_args(annotation)
    if origin in (typing.Union, types.UnionType):
        return " or ".join("None" if a is types.NoneType else _describe(a) for a in args)
    if origin is tuple:
        return (
            f"any number of {_describe(args[0])}"
            if args[-1] is Ellipsis
            else f"{len(args)} of {_describe(args[0])}"
        )
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
            f"{field} is called model.faster_rcnn, model.cascade_rcnn or model.faster_rcnn_c4 now,"
            " by the decoder; proposals are set in .rpn (convs, sizes, samples, before, after) and"
            " box heads in .roi"
        )
    close = difflib.get_close_matches(key, list(known), n=1, cutoff=0.5)
    prefix = field[: len(field) - len(key)]
    return f"unknown field {field}; " + (
        f"did you mean {prefix}{close[0]}?"
        if close
        else f"allowed: {' '.join(prefix + k for k in sorted(known))}"
    )


def annotation(field: str) -> Any:
    """The type of a dotted `field` of the configuration.

    Raises:
        ValueError: an unknown field, with the closest known one.
    """
    parts = field.split(".")
    found = Config
    for i, part in enumerate(parts):
        holder = part_type(found)
        if not dataclasses.is_dataclass(holder):
            owner = ".".join(parts[:i])
            raise ValueError(
                f"unknown field {field}; {owner} has no parts, give --config.{owner}=VALUE"
            )
        hints = typing.get_type_hints(holder)
        if part not in hints:
            raise ValueError(unknown_field(".".join(parts[: i + 1]), part, hints))
        found = hints[part]
    return found


def part_type(annotation: Any) -> Any:
    """The dataclass that a field holds, or may hold instead of None; else the annotation itself."""
    return next((a for a in typing.get_args(annotation) if dataclasses.is_dataclass(a)), annotation)
