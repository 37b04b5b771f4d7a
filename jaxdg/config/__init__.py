"""The configuration of a run: its dataclasses, reading, overriding and checking them, and the
workdir's own files.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from jaxdg.config.checking import typed, validated
    from jaxdg.config.fields import annotation, common, flat, get, tree_of
    from jaxdg.config.neighbours import let_import
    from jaxdg.config.settings import (
        DECODERS,
        PROTOCOLS,
        Config,
        DataConfig,
        EvaluationConfig,
        Mask2FormerOptions,
        MeshConfig,
        ModelConfig,
        OptimizerConfig,
    )
    from jaxdg.config.stored import (
        experiment,
        experiment_file,
        from_file,
        load,
        of_content,
        save,
    )

__all__ = [
    "DECODERS",
    "PROTOCOLS",
    "Config",
    "DataConfig",
    "EvaluationConfig",
    "Mask2FormerOptions",
    "MeshConfig",
    "ModelConfig",
    "OptimizerConfig",
    "annotation",
    "common",
    "experiment",
    "experiment_file",
    "flat",
    "from_file",
    "get",
    "let_import",
    "load",
    "of_content",
    "save",
    "tree_of",
    "typed",
    "validated",
]

_PLACES = ("settings", "fields", "checking", "stored")


def __getattr__(name: str) -> Any:
    """Imports what is asked for on first use: settings bring in all model code, which commands that
    look at files do not need.
    """
    if name in __all__:
        for place in _PLACES:
            module = importlib.import_module(f"jaxdg.config.{place}")
            if hasattr(module, name):
                return getattr(module, name)
    raise AttributeError(f"module 'jaxdg.config' has no attribute {name!r}")
