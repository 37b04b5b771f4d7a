"""`--config.FIELD=VALUE`: values from texts of the command line, and texts from values.

- Several texts or numbers are parted by commas, `night,fog`. A text that holds commas stands in
  quotes as in a CSV file, `'"road, route",sky'`, or all of them in a JSON list, `'["road, route",
  "sky"]'`. `()` is none.
- `None` is None where the field may be None. A part of the configuration, or a dict, is a JSON
  object: `'{"7": 0}'`.
- `--config.FIELD` alone is True and `--noconfig.FIELD` is False, of fields that are one or the
  other.

Only here is a text ever split: configuration files and config.json hold lists.
"""

import ast
from collections.abc import Mapping, Sequence
import csv
import dataclasses
import json
import re
import types
import typing
from typing import TYPE_CHECKING, Any

from jaxdg import config as config_lib

if TYPE_CHECKING:
    from jaxdg.config import Config


def take(
    arguments: Sequence[str], kind: "type[Config] | None" = None
) -> tuple[list[str], dict[str, Any]]:
    """Parts the arguments of a command from what they change in its configuration.

    Args:
        arguments: all of them; after `--` nothing is a flag.
        kind: the class of the configuration; `Config` if None.

    Returns:
        The other arguments, and values by dotted field, which `applied` checks; of a field that is
        given twice the last.

    Raises:
        ValueError: an unknown field, a field without a value, or quotes that do not close.
    """
    rest: list[str] = []
    given: dict[str, Any] = {}
    waiting = iter(arguments)
    for argument in waiting:
        if argument == "--":
            rest += [argument, *waiting]
            break
        found = re.match(r"--?(no)?config\.([^=]*)(?:=(.*))?$", argument, re.DOTALL)
        if found is None:
            rest.append(argument)
            continue
        negated, field, text = found.groups()
        annotation = config_lib.annotation(field, kind or config_lib.Config)
        if negated and text is not None:
            raise ValueError(f"{argument}; allowed: --noconfig.{field}, or --config.{field}=VALUE")
        if negated or (annotation is bool and text is None):
            text = "false" if negated else "true"
        elif text is None:
            text = next(waiting, None)
            if text is None:
                raise ValueError(f"--config.{field} has no value; give --config.{field}=VALUE")
        given.pop(field, None)
        given[field] = parse(text, annotation, field)
    return rest, given


def parse(text: str, annotation: Any, field: str) -> Any:
    """A value as the command line writes it; numbers stay texts, which pydantic reads.

    Args:
        text: see the module's first lines.
        annotation: type of the value.
        field: whose, for the error message.

    Raises:
        ValueError: quotes that do not close.
    """
    if typing.get_origin(annotation) in (typing.Union, types.UnionType):
        if text == "None":
            return None
        annotation = next(a for a in typing.get_args(annotation) if a is not types.NoneType)
    if typing.get_origin(annotation) is tuple:
        return _items(text, field)
    if typing.get_origin(annotation) is dict or dataclasses.is_dataclass(annotation):
        return _literal(text)
    return text


def text_of(value: Any) -> str:
    """A value as `parse` reads it."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        value = dataclasses.asdict(value)
    if isinstance(value, dict):
        return json.dumps(value, ensure_ascii=False)
    if not isinstance(value, (tuple, list)):
        return str(value)
    if not value:
        return "()"
    joined = ",".join(map(str, value))
    plain = all(
        isinstance(item, (int, float))
        or (isinstance(item, str) and re.fullmatch(r"\w[\w/+.-]*", item))
        for item in value
    )
    return joined if plain else json.dumps(value, ensure_ascii=False)


def applied(config: "Config", given: Mapping[str, Any]) -> "Config":
    """A copy of a configuration with other values; a part that was None is made of its defaults
    where a field of it is given.

    Raises:
        ValueError: an unknown field, or a value that is not of its type.
    """
    tree = config_lib.tree_of(config)
    for field, value in given.items():
        config_lib.annotation(field, type(config))
        *parts, last = field.split(".")
        holder = tree
        for part in parts:
            holder[part] = holder.get(part) or {}
            holder = holder[part]
        holder[last] = value
    return config_lib.typed(tree, type(config))


def _items(text: str, field: str) -> Any:
    """The texts of a list; or what its literal holds, which need not be a list."""
    if text.strip() in ("", "()"):
        return ()
    # A name may begin like a literal, such as [red]; then it is none.
    if text.strip()[0] in "[('" and isinstance(found := _literal(text), (list, tuple)):
        return found
    try:
        (row,) = csv.reader([text], skipinitialspace=True, strict=True)
    except csv.Error as error:
        raise ValueError(
            f"{field} is {text!r}; allowed: values parted by commas, quoted as in CSV, or a JSON"
            f" list ({error})"
        ) from None
    items = [item.strip() for item in row]
    return (
        items[:-1] if text.rstrip().endswith(",") else items
    )  # as in a tuple, a comma may stand at the end


def _literal(text: str) -> Any:
    """What a text means in JSON, else in Python, else itself."""
    for read in (json.loads, ast.literal_eval):
        try:
            return read(text.strip())
        except (ValueError, SyntaxError, MemoryError, RecursionError):
            continue
    return text
