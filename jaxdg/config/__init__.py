"""The configuration of a run: its dataclasses, reading, overriding and checking them, and the workdir's own files."""

from jaxdg.config.checking import annotation, coerce, common, flat, get, part_type, unknown_field, validated
from jaxdg.config.experiment import (
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
from jaxdg.config.neighbours import let_import
from jaxdg.config.stored import experiment, experiment_file, from_file, load, save

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
    "coerce",
    "common",
    "experiment",
    "experiment_file",
    "flat",
    "from_file",
    "get",
    "let_import",
    "load",
    "part_type",
    "save",
    "unknown_field",
    "validated",
]
