"""How well a model transfers between datasets: a run for every source, evaluated on every target.

    jaxdg study transfer --config study_tiny --workdir runs/transfer

The targets are the experiment's `evaluation.domains`. rPD of a source is the mean over the other
targets in percent of the score on the source itself.
"""

from collections.abc import Mapping

from jaxdg.config import Config
from jaxdg.studies import command
from jaxdg.studies.study import Settings, StudyOptions


def plan(base: Config, options: StudyOptions) -> Mapping[str, Settings]:
    """See `study.Plan`."""
    sources = options.sources or {domain: {} for domain in base.evaluation.domains}
    return {
        f"from {source}": {"data.source": source, **settings}
        for source, settings in sources.items()
    }


if __name__ == "__main__":
    command.main("transfer", plan)
