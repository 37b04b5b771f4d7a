"""How far a model carries from one dataset to another: a run for every source, judged on every
target.

    python -m jaxdg.studies.transfer --config configs/study_tiny.py --workdir runs/transfer

The targets are the experiment's `evaluation.domains`. rPD, of each source, is the mean over the
targets that are not the source, in percent of the source's own.
"""

from collections.abc import Mapping

from jaxdg.config import Config
from jaxdg.studies import study
from jaxdg.studies.study import Settings, StudyOptions


def plan(base: Config, options: StudyOptions) -> Mapping[str, Settings]:
    """See `study.Plan`."""
    sources = options.sources or {domain: {} for domain in base.evaluation.domains}
    return {
        f"from {source}": {"data.source": source, **settings}
        for source, settings in sources.items()
    }


if __name__ == "__main__":
    study.main("transfer", plan)
