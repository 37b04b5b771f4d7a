"""Checks a configuration: pydantic compares each value with the annotation of its field; the
functions here compare values with each other.
"""

from collections.abc import Iterator
import dataclasses
import functools
import re
from typing import Any

import pydantic

from jaxdg import methods
from jaxdg.config import paths
from jaxdg.config.fields import annotation, get, tree_of
from jaxdg.config.settings import DECODERS, PROTOCOLS, Config
from jaxdg.data.labels import check_names
from jaxdg.evaluation import protocols
from jaxdg.training.optimizer import OptimizerConfig


def _are_regexes(pairs: tuple[tuple[str, float], ...]) -> bool:
    try:
        return all(re.compile(pattern) for pattern, _ in pairs)
    except re.error:
        return False


# What annotations cannot say: (field, what is allowed, test).
_RULES: tuple[tuple[str, str, Any], ...] = (
    ("model.patch_resize", "flexi or bicubic", lambda v: v in ("flexi", "bicubic")),
    ("mesh.data", "-1 (the rest) or at least 1", lambda v: v == -1 or v >= 1),
    ("mesh.fsdp", "-1 (the rest) or at least 1", lambda v: v == -1 or v >= 1),
    ("data.scale", "two factors, smallest first", lambda v: v[0] <= v[1]),
    ("data.pixmix", "0 rounds (off), or more and a beta above 0", lambda v: v[0] == 0 or v[1] > 0),
    ("optimizer.learning_rate_factors", "(regular expression, factor) pairs", _are_regexes),
    ("optimizer.weight_decay_factors", "(regular expression, factor) pairs", _are_regexes),
)


# What a field that names a file or a folder may be; only the data root may be a URL, and what is
# known as a file of the Hugging Face hub by its name.
PATHS = {
    "data.root": "a folder, or the URL of one with records",
    "data.skip": "None or a file",
    "data.pictures": "None or a folder",
    "model.weights": "None or a file",
    "model.text_weights": "None or a file",
    "model.start": "None, a workdir or a packed model",
    "model.gated_c4.gates.file": "None or a file",
    "model.gated_rcnn.gates.file": "None or a file",
    "edits.file": "None or a file",
    "edits.mining.text_weights": "None or a file",
}
HUB = ("model.weights", "model.text_weights", "model.start")

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
            kinds = {"urls": field == "data.root", "hub": field in HUB}
            setattr(holder, name, paths.given(path, field, allowed=allowed, **kinds))
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
    # An experiment may add methods in a class of its own.
    config = typed(tree_of(config), type(config))
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
    else:
        _check_schedule(config.optimizer, config.steps)
    for name, options in methods.settings(config).items():
        options.check(config, name)
    sources = config.data.source.split("+")
    weights = config.data.source_weights
    if weights and len(weights) != len(sources):
        raise ValueError(
            f"data.source_weights is {weights}; allowed: () or one weight for each of"
            f" {', '.join(sources)}"
        )
    _check_augmentation(config)
    if config.task == "segmentation":
        crop = config.data.crop
        stride = config.evaluation.stride
        window = getattr(config.model, config.model.decoder).window(crop)
        if stride[0] > window[0] or stride[1] > window[1]:
            limit = "data.crop" if window == crop else f"the windows of {config.model.decoder}"
            raise ValueError(
                f"evaluation.stride is {stride}; allowed: at most {limit} {window}, or windows"
                " would leave gaps"
            )
    return config


def _check_augmentation(config: Config) -> None:
    """Settings of crops that exclude each other, or that nothing would heed."""
    d = config.data
    if d.shortest_sides:
        reason = "data.shortest_sides, which says the size of every image"
        _want(config, {"data.resize": None, "data.scale": (1.0, 1.0)}, reason)
        most = max(d.shortest_sides)
        if d.longest_side is not None and d.longest_side < most:
            raise ValueError(
                f"data.longest_side is {d.longest_side}; allowed: at least {most}, the largest of"
                " data.shortest_sides"
            )
    elif d.longest_side is not None:
        raise ValueError(
            f"data.longest_side is {d.longest_side}; allowed: None, as data.shortest_sides is ()"
        )
    if d.keep_ratio and d.resize is None:
        raise ValueError("data.keep_ratio is True; allowed: False, as data.resize is None")
    if d.padding == "corner" and d.randaugment[0]:
        raise ValueError(
            "data.padding is 'corner'; allowed: 'around' with data.randaugment, which moves images"
            " into the padding"
        )
    if d.rare_class_min_crop_ratio is not None and not d.rare_class_temperature:
        raise ValueError(
            f"data.rare_class_min_crop_ratio is {d.rare_class_min_crop_ratio}; allowed: None, as"
            " data.rare_class_temperature is 0"
        )


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
    if e.tta and (task != "segmentation" or e.protocol in protocols.AUGMENTED):
        why = f"protocol {e.protocol}, which averages over sizes already"
        if task != "segmentation":
            why = f"task {task}"
        raise ValueError(f"evaluation.tta is True; allowed: False, with {why}")
    for name in ("calibration", "boundary"):
        if getattr(e, name) and task != "segmentation":
            raise ValueError(f"evaluation.{name} is True; allowed: False, with task {task}")
    if task == "segmentation":
        if getattr(m, m.decoder).needs_text and m.text_weights is None and m.start is None:
            raise ValueError(
                f"model.text_weights is None; model.decoder {m.decoder} needs the converted text"
                " tower beside the encoder, see --model ENCODER_text of jaxdg convert, or auto"
            )
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
    elif head.scenes and head.scene_file is None and m.start is None:
        raise ValueError(
            f"model.{m.decoder}.gates.scenes is {head.scenes}; allowed: () without"
            " model.text_weights or gates.file, which embed them"
        )


def _check_schedule(o: OptimizerConfig, steps: int) -> None:
    """The parts of the learning rate's schedule fit together and into the run."""
    if o.rule == "sgd" and o.final_weight_decay is not None:
        raise ValueError(
            f"optimizer.final_weight_decay is {o.final_weight_decay}; allowed: None with"
            " optimizer.rule sgd, whose weight decay stays"
        )
    if o.warmup_steps + o.hold_steps >= steps:
        before = f"optimizer.warmup_steps is {o.warmup_steps} and hold_steps is {o.hold_steps}"
        raise ValueError(f"{before}; allowed: together less than steps {steps}")
    if o.schedule == "mmengine" and o.warmup_steps == 1:
        raise ValueError(
            "optimizer.warmup_steps is 1; allowed: 0 or at least 2 with optimizer.schedule"
            " mmengine, where the first step is at warmup_factor and the last at the peak"
        )
    if o.warmup_factor and not o.warmup_steps:
        raise ValueError(
            f"optimizer.warmup_factor is {o.warmup_factor}; allowed: 0 without"
            " optimizer.warmup_steps"
        )
    if o.min_learning_rate > o.learning_rate:
        raise ValueError(
            f"optimizer.min_learning_rate is {o.min_learning_rate}; allowed: at most"
            f" optimizer.learning_rate, {o.learning_rate}"
        )


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


_adapter = functools.cache(pydantic.TypeAdapter)


def typed(tree: Any, kind: type[Config] = Config) -> Config:
    """A configuration whose values have the types of their fields and lie in their ranges.

    Args:
        tree: of dicts, as from `tree_of` or JSON. Texts of numbers are read as numbers.
        kind: the class of the configuration.

    Raises:
        ValueError: an unknown field or a wrong value; the message says which and what is allowed.
    """
    try:
        return _adapter(kind).validate_python(tree)
    except pydantic.ValidationError as error:
        first = error.errors(include_url=False)[0]
    place = [part for part in first["loc"] if part != "[key]"]
    if first["type"] == "unexpected_keyword_argument":
        annotation(".".join(map(str, place)), kind)  # raises
    allowed = re.sub(
        r"^(Input should be|Tuple should have) | after validation, not \d+$", "", first["msg"]
    )
    if first["type"] == "missing":  # no field is required, so it is an entry of a tuple
        allowed = f"at least {int(place.pop()) + 1} items"
    field = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in place)
    # The command line gives numbers as texts: those that are read as numbers need no quotes.
    value = first["input"] if "_than" in first["type"] else repr(first["input"])
    raise ValueError(f"{field[1:] or 'the configuration'} is {value}; allowed: {allowed}")
