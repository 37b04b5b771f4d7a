"""Which pre-training generalises best: encoders of `get_study()`, fine-tuned and frozen.

    jaxdg study pretraining --config study_tiny --workdir runs/pretraining

An encoder from scratch is only trained, as freezing it would keep random weights.
"""

from collections.abc import Mapping

from jaxdg.config import Config
from jaxdg.studies import command
from jaxdg.studies.study import Settings, StudyOptions, configured


def plan(base: Config, options: StudyOptions) -> Mapping[str, Settings]:
    """See `study.Plan`."""
    encoders = options.encoders or {
        base.model.encoder: {},
        "from scratch": {"model.weights": None, "model.start": None},
    }
    groups: dict[str, Settings] = {}
    for encoder, settings in encoders.items():
        model = configured(base, settings).model
        groups[f"{encoder}, tuned"] = {**settings, "model.freeze": "none"}
        if model.weights or model.start:
            groups[f"{encoder}, frozen"] = {**settings, "model.freeze": "all"}
    return groups


if __name__ == "__main__":
    command.main("pretraining", plan)
