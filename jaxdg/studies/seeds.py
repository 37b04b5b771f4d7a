"""How much chance there is in an experiment: the same run with several seeds.

    jaxdg study seeds --config study_tiny --workdir runs/seeds

The spread is the sample standard deviation.
"""

from collections.abc import Mapping

from jaxdg.config import Config
from jaxdg.studies import command
from jaxdg.studies.study import Settings, StudyOptions


def plan(base: Config, options: StudyOptions) -> Mapping[str, Settings]:
    """See `study.Plan`; the seeds are those of `options.seeds`."""
    return {base.model.encoder: {}}


if __name__ == "__main__":
    command.main("seeds", plan)
