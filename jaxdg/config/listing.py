"""The fields of a configuration with what their docstrings say, for `--help` and the site."""

from collections.abc import Iterator
import dataclasses
import inspect
import re
import shlex
import textwrap
import typing
from typing import Any, NamedTuple

from jaxdg.config.fields import part_type
from jaxdg.config.overrides import text_of
from jaxdg.config.settings import Config


class Field(NamedTuple):
    """One field.

    Attributes:
        name: dotted, from the top of the configuration.
        value: that it has.
        words: what its docstring says, without the default.
        part: the dataclass that it holds, or may hold instead of None; None of other fields.
    """

    name: str
    value: Any
    words: str
    part: type | None


class Part(NamedTuple):
    """One dataclass in the configuration.

    Attributes:
        name: dotted; empty for the configuration itself.
        summary: first paragraph of its docstring.
        fields: of it, in their order.
    """

    name: str
    summary: str
    fields: list[Field]


def parts(kind: type, value: Any, name: str = "") -> Iterator[Part]:
    """A dataclass of the configuration, then those that it holds.

    Args:
        kind: the dataclass.
        value: an object of it.
        name: dotted.

    Raises:
        ValueError: a field has no documentation.
    """
    documented = attributes(kind)
    hints = typing.get_type_hints(kind)
    fields = []
    for field in dataclasses.fields(kind):
        if field.name not in documented:
            raise ValueError(f"{kind.__module__}.{kind.__name__}.{field.name} has no documentation")
        part = part_type(hints[field.name])
        fields.append(
            Field(
                f"{name}.{field.name}" if name else field.name,
                getattr(value, field.name),
                re.sub(r"\s*Default (?:[^.]|\.\d)*\.$", "", documented[field.name]),
                part if isinstance(part, type) and dataclasses.is_dataclass(part) else None,
            )
        )
    yield Part(name, summary(kind), fields)
    for field in fields:
        if field.part is not None:
            yield from parts(
                field.part, field.part() if field.value is None else field.value, field.name
            )


def attributes(kind: type) -> dict[str, str]:
    """What the docstrings of a dataclass and its parents say of its fields."""
    documented: dict[str, str] = {}
    for parent in reversed(kind.__mro__):
        text = inspect.cleandoc(parent.__dict__.get("__doc__") or "")
        _, _, section = text.partition("Attributes:\n")
        for entry in re.split(r"\n    (?=\w+:)", "\n" + section.split("\n\n")[0]):
            name, colon, words = entry.strip().partition(":")
            if colon:
                documented[name] = " ".join(words.split())
    return documented


def summary(thing: Any) -> str:
    """The first paragraph of a docstring."""
    return " ".join((inspect.getdoc(thing) or "").split("\n\n")[0].split())


def help_text(config: Config, width: int) -> str:
    """Every field as the flag that would give it its value, with its documentation below.

    Args:
        config: whose values are shown.
        width: columns of the terminal.
    """
    lines = []
    for part in parts(type(config), config):
        lines += ["", *textwrap.wrap(f"{part.name or 'config'}: {part.summary}", width), ""]
        for field in part.fields:
            if field.part is None or field.value is None:
                lines.append(f"  --config.{field.name}={shlex.quote(text_of(field.value))}")
                lines += textwrap.wrap(
                    field.words, width, initial_indent=" " * 6, subsequent_indent=" " * 6
                )
    return "\n".join(lines)
