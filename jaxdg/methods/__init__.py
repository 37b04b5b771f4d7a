"""Methods change the training and not the architecture; each has a file.

A field of the configuration whose type is a `MethodOptions` is a method. An experiment file adds
its own by a subclass of `Config` with such a field. Training calls the methods that are on through
`Method` only; evaluation, prediction, export and conversion know nothing of them. A method whose
modules stay in the model lasts: whoever builds the model's task gets it by `lasting`.
"""

from collections.abc import Iterable
import dataclasses
from typing import Any

from jaxdg.methods.method import Method, MethodOptions, Preparation

__all__ = ["Method", "MethodOptions", "Preparation", "active", "corruptions", "lasting", "settings"]


def settings(config: Any) -> dict[str, MethodOptions]:
    """The settings of all methods of a configuration, by the names of their fields."""
    values = {field.name: getattr(config, field.name) for field in dataclasses.fields(config)}
    return {name: value for name, value in values.items() if isinstance(value, MethodOptions)}


def active(config: Any) -> tuple[Method, ...]:
    """The methods that a configuration turns on, in the order of its fields."""
    return tuple(options.build(config) for options in settings(config).values() if options.on)


def corruptions(methods: Iterable[Method]) -> tuple[str, ...]:
    """The kinds of corruption that methods show the model in training."""
    return tuple(dict.fromkeys(kind for method in methods for kind in method.corruptions))


def lasting(config: Any) -> tuple[Method, ...]:
    """What remains of the methods of a configuration whose modules stay in the trained model."""
    return tuple(method.remains() for method in active(config) if method.lasts)
