"""The fields of a configuration by their dotted names, such as `optimizer.clip`."""

import dataclasses
import difflib
import typing
from typing import Any

from jaxdg.config.settings import Config


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


def tree_of(value: Any) -> Any:
    """A configuration as dicts, with the attributes that an experiment file has made up."""
    if dataclasses.is_dataclass(value):
        return {name: tree_of(part) for name, part in vars(value).items()}
    return value


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


def annotation(field: str, kind: type[Config] = Config) -> Any:
    """The type of a dotted `field` of a configuration.

    Raises:
        ValueError: an unknown field, with the closest known one.
    """
    parts = field.split(".")
    found = kind
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
