"""Which pre-training carries furthest: the encoders of an experiment's `get_study()`, fine-tuned
and frozen.

    python -m jaxdg.studies.pretraining --config configs/study_tiny.py --workdir runs/pretraining

An encoder from scratch is not frozen: it has learned nothing that could be kept.
"""

from collections.abc import Mapping

from jaxdg.config import Config
from jaxdg.studies import study
from jaxdg.studies.study import Settings, StudyOptions


def plan(base: Config, options: StudyOptions) -> Mapping[str, Settings]:
    """See `study.Plan`."""
    encoders = options.encoders or {
        base.model.encoder: {},
        "from scratch": {"model.weights": None, "model.start": None},
    }
    groups: dict[str, Settings] = {}
    for encoder, settings in encoders.items():
        model = study.configured(base, settings).model
        groups[f"{encoder}, tuned"] = {**settings, "model.freeze": "none"}
        if model.weights or model.start:
            groups[f"{encoder}, frozen"] = {**settings, "model.freeze": "all"}
    return groups


if __name__ == "__main__":
    study.main("pretraining", plan)
