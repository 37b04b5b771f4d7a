"""Which blocks to freeze: the first ones of the encoder, the last ones, or none.

    jaxdg study freezing --config study_tiny --workdir runs/freezing

Freezing first blocks also freezes the embeddings. Freezing last blocks does not: with all 12 blocks
frozen, the embeddings are still trained.
"""

from collections.abc import Mapping

from jaxdg.config import Config
from jaxdg.studies import command
from jaxdg.studies.study import Settings, StudyOptions


def plan(base: Config, options: StudyOptions) -> Mapping[str, Settings]:
    """See `study.Plan`."""
    frozen = [f"first {n}" for n in options.freeze_first] + [
        f"last {n}" for n in options.freeze_last
    ]
    return {f"{freeze} frozen": {"model.freeze": freeze} for freeze in ("none", *frozen)}


if __name__ == "__main__":
    command.main("freezing", plan)
