"""Which layers to keep as they were pre-trained: the first blocks of the encoder frozen, the last
ones, and none.

    python -m jaxdg.studies.freezing --config configs/study_tiny.py --workdir runs/freezing

Frozen first blocks take the embeddings with them; 12 of 12 frozen last blocks do not, and leave
these alone to be trained.
"""

from collections.abc import Mapping

from jaxdg.config import Config
from jaxdg.studies import study
from jaxdg.studies.study import Settings, StudyOptions


def plan(base: Config, options: StudyOptions) -> Mapping[str, Settings]:
    """See `study.Plan`."""
    frozen = [f"first {n}" for n in options.freeze_first] + [
        f"last {n}" for n in options.freeze_last
    ]
    return {f"{freeze} frozen": {"model.freeze": freeze} for freeze in ("none", *frozen)}


if __name__ == "__main__":
    study.main("freezing", plan)
