"""Domain-generalised dense perception in JAX: encoder -> decoder -> one source domain -> zero-shot
on unseen domains.
"""

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from jaxdg import backbones, detection, hub, segmentation, weights
    from jaxdg.tasks.loading import load

__version__ = "0.1.0"
__all__ = ["backbones", "detection", "hub", "load", "segmentation", "weights"]


def __getattr__(name: str):
    """Imports `backbones`, `detection`, `hub`, `segmentation`, `weights` and `load` on first use
    (PEP 562), so `import jaxdg` is quick.
    """
    if name == "load":
        return importlib.import_module("jaxdg.tasks.loading").load
    if name in __all__:
        return importlib.import_module(f"jaxdg.{name}")
    raise AttributeError(f"module 'jaxdg' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
