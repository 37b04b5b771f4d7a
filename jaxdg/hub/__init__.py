"""Weights by name: published files are fetched, verified, converted and kept."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from jaxdg.hub.store import get

__all__ = ["get"]


def __getattr__(name: str) -> Any:
    """Imports `get` on first use: it brings in all encoders, which a download does not need."""
    if name in __all__:
        return getattr(importlib.import_module("jaxdg.hub.store"), name)
    raise AttributeError(f"module 'jaxdg.hub' has no attribute {name!r}")
