"""How robust models are: evaluates them on 15 kinds of image corruption at five severities.

    jaxdg study corruptions --config study_tiny --workdir DIR
    jaxdg study corruptions --config study_tiny --workdir DIR --checkpoint runs/a,runs/b

The first command trains the models of `get_study()` and then evaluates them; the second evaluates
runs that exist. Images of all domains in `evaluation.domains` are corrupted at their own size,
before any other step (`data/augment/corruptions.py`). A cell is one kind at one severity on one
domain. It is stored in the run's workdir as `corruptions_STEP/DOMAIN/KIND_SEVERITY.json` and is
evaluated once. In study.json a run has

    "severities":  the evaluated ones, such as [1, 3]
    "corruptions": {DOMAIN: {"clean": score, KIND: [score at severity 1, ..]}}, null where missing
    "trained_under": the evaluated kinds that a method showed it in training, such as ["contrast"]

Robustness in percent is the mean over all kinds and severities, relative to the clean images. A
mean is reported only if none of its cells is missing.
"""

from collections.abc import Mapping, Sequence
import contextlib
import dataclasses
import json
import os
from pathlib import Path
import re
import statistics
import time
from typing import Any

from absl import flags
from rich.console import Console
from rich.table import Table

from jaxdg import config as config_lib
from jaxdg import files, methods
from jaxdg.commands import command_line as cli
from jaxdg.commands import process as runtime
from jaxdg.commands.command_line import Interrupt
from jaxdg.config import Config, MeshConfig, paths
from jaxdg.config.overrides import text_of
from jaxdg.data.augment.corruptions import KINDS, SEVERITIES, Corrupted
from jaxdg.evaluate import open_domains
from jaxdg.evaluation.results import NO_TRUTH
from jaxdg.studies.command import main
from jaxdg.studies.study import Plan, Run, Settings, Study, StudyOptions, configured, local
from jaxdg.tasks.run_state import Workdir, make_task, opened
from jaxdg.training import sharding

Scores = dict[str, Any]  # {"clean": score, KIND: [score by severity]}, None where not judged


def plan(base: Config, options: StudyOptions) -> Mapping[str, Settings]:
    """See `study.Plan`."""
    return options.models or {base.model.encoder: {}}


class Corruptions(Study):
    """The study.

    Attributes:
        max_images: evaluated images of a domain, 0 for all; None for each run's
            `evaluation.max_images`.
    """

    max_images: int | None = None

    @property
    def kinds(self) -> Sequence[str]:
        """The evaluated kinds."""
        return self.options.kinds or KINDS

    def cells(self) -> list[tuple[str, int]]:
        """The evaluated kinds and severities; clean images come first."""
        corrupted = [
            (kind, severity) for kind in self.kinds for severity in self.options.severities
        ]
        return [("clean", 0), *corrupted]

    def judged(self, run: Run) -> Config:
        """The configuration that a run is evaluated with."""
        config = self.config(run)
        images = config.evaluation.max_images if self.max_images is None else self.max_images
        return dataclasses.replace(
            config, evaluation=dataclasses.replace(config.evaluation, max_images=images)
        )

    def cell(self, run: Run, domain: str, kind: str, severity: int) -> Path:
        """The file of a cell's outcome."""
        name = f"{kind}_{severity}" if severity else kind
        folder = self.workdir(run) / f"corruptions_{self.config(run).steps}"
        return folder / domain.replace("/", "_") / f"{name}.json"

    def outcome(self, run: Run, domain: str, kind: str, severity: int) -> Mapping[str, Any] | None:
        """The outcome of a cell; None if it was not evaluated on these images."""
        outcome = files.recall(
            self.cell(run, domain, kind, severity),
            lambda cell: isinstance(cell, dict) and {"score", "max_images"} <= cell.keys(),
        )
        images = self.judged(run).evaluation.max_images or None
        return outcome if outcome is not None and outcome["max_images"] == images else None

    def score(self, run: Run, domain: str, kind: str, severity: int) -> float | None:
        """The score of a cell; None if it was not evaluated on these images or has no truth."""
        outcome = self.outcome(run, domain, kind, severity)
        return None if outcome is None else outcome["score"]

    def scores(self, run: Run, domain: str) -> Scores:
        """The scores of a run on a domain."""

        def at(kind, severity):
            if severity not in self.options.severities:
                return None
            return self.score(run, domain, kind, severity)

        by_kind = {
            kind: [at(kind, severity) for severity in range(1, max(self.options.severities) + 1)]
            for kind in self.kinds
        }
        return {"clean": self.score(run, domain, "clean", 0), **by_kind}

    def trained_under(self, run: Run) -> list[str]:
        """The evaluated kinds that a run was trained under, or the run that it started from."""
        shown = _shown(self.config(run))
        return [kind for kind in self.kinds if kind in shown]

    def check(self) -> None:
        """Raises ValueError if a kind or a severity does not exist."""
        o = self.options
        if unknown := sorted(set(o.kinds) - set(KINDS)):
            raise ValueError(
                f"unknown kinds of corruption {', '.join(unknown)} in StudyOptions; known are"
                f" {', '.join(KINDS)}"
            )
        if not o.severities or set(o.severities) - set(SEVERITIES):
            raise ValueError(
                f"StudyOptions.severities is {tuple(o.severities)}; allowed: some of 1 to 5"
            )


class Trained(Corruptions):
    """The study of finished runs in any folders; overrides change how they are evaluated."""

    def __init__(self, checkpoints: Sequence[str], name: str, plan: Plan, **given: Any):
        """Args:
        checkpoints: workdirs; runs form a group if their folders' names differ only in a final
            `seedN`.
        name: see `Study`.
        plan: not used.
        given: see `Study`.

        Raises:
            FileNotFoundError: a workdir does not exist.
            ValueError: a run is not finished, the runs have several tasks or protocols, or two have
                one name.
        """
        self.name = name
        self.file = given["file"]
        self.given = given["given"]
        self.options = given["options"]
        self.folder = given["folder"]
        self.runs = []
        self._found = {}
        self._check_folder()
        for workdir in (
            Path(paths.given(checkpoint, "--checkpoint")) for checkpoint in checkpoints
        ):
            config = configured(config_lib.load(workdir), self.given)
            # The data root of this machine, not the one the run was trained on.
            root = self.given.get("data.root") or os.environ.get("JAXDG_DATA") or config.data.root
            config.data = dataclasses.replace(config.data, root=root)
            group = re.sub(r"[ _]*seed\d+$", "", workdir.resolve().name) or workdir.resolve().name
            run = Run(group, {}, config.seed)
            if run.name in self._found:
                raise ValueError(
                    f"--checkpoint names two runs {run.name}: {self._found[run.name][0]} and"
                    f" {workdir}; rename a folder"
                )
            self.runs.append(run)
            self._found[run.name] = workdir, config
            if self.results(run) is None:
                raise ValueError(
                    f"{workdir} holds no run that was trained and evaluated to its end; go on with"
                    " it first"
                )
        self.base = self.config(self.runs[0])
        judged = {(c.task, c.evaluation.label) for _, c in self._found.values()}
        if len(judged) > 1:
            kinds = " and ".join(map(" ".join, sorted(judged)))
            raise ValueError(
                f"--checkpoint names runs judged as {kinds}; their scores do not compare"
            )

    def workdir(self, run: Run) -> Path:
        return self._found[run.name][0]

    def config(self, run: Run) -> Config:
        return self._found[run.name][1]

    def command(self, run: Run, show: Any = str) -> list[str]:
        return ["-m", "jaxdg.evaluate", "--checkpoint", show(str(self.workdir(run)))]


def _shown(config: Config) -> set[str]:
    """The kinds of corruption that training showed; without those of a run that is gone."""
    kinds = set(methods.corruptions(methods.active(config)))
    if config.model.start is not None:
        with contextlib.suppress(OSError, ValueError):
            kinds |= _shown(opened(config.model.start).config)
    return kinds


def judge(study: Corruptions, runs: Sequence[Run], console: Console, interrupt: Interrupt) -> None:
    """Evaluates the missing cells of the runs and prints them.

    Raises:
        Stop: if asked to stop; evaluated cells are stored.
    """
    for run in runs:
        config = study.judged(run)
        missing = [
            (domain, kind, severity)
            for domain in config.evaluation.domains
            for kind, severity in study.cells()
            if study.outcome(run, domain, kind, severity) is None
        ]
        if not missing:
            continue
        runtime.set_up()
        task = make_task(config)
        mesh = sharding.make_mesh(MeshConfig())
        domains = open_domains(task)
        model, state, _ = Workdir(study.workdir(run), config.steps).restore(task, mesh)
        evaluate = task.evaluator(model.graph, mesh)  # compiles once, for the first cell
        start = time.perf_counter()
        for i, (domain, kind, severity) in enumerate(missing, 1):
            dataset = Corrupted(domains[domain], kind, severity) if severity else domains[domain]
            result = evaluate(state, dataset, interrupt.check)
            outcome = {
                "score": result.score,
                "max_images": config.evaluation.max_images or None,
                **result.metrics,
            }
            _write(study.cell(run, domain, kind, severity), outcome)
            left = (time.perf_counter() - start) / i * (len(missing) - i) / 60
            what = f"{domain} {kind} {severity}" if severity else f"{domain} clean"
            told = NO_TRUTH if result.score is None else f"{result.score:.1f} {task.score_name}"
            console.print(
                f"{run.name}: {what}: {told}  ({i} of {len(missing)}, ETA {left:.1f} min)"
            )
    show(study, runs, console)


def _write(path: Path, content: Mapping[str, Any]) -> None:
    """Writes a JSON file in one step."""
    path.parent.mkdir(parents=True, exist_ok=True)
    files.write(path, json.dumps(content, indent=2) + "\n")


def summary(scores: Scores, severities: Sequence[int]) -> dict[str, Any]:
    """Means of a run on a domain; None for a mean that lacks a score.

    Args:
        scores: of `Corruptions.scores`.
        severities: the evaluated ones.

    Returns:
        `clean`; `severity`, the mean over kinds for each severity; `mean`, the mean of these;
        `relative`, this mean in percent of `clean`.
    """
    kinds = [values for kind, values in scores.items() if kind != "clean"]
    by_severity = {
        severity: _mean([values[severity - 1] for values in kinds]) for severity in severities
    }
    mean = _mean(list(by_severity.values()))
    clean = scores["clean"]
    relative = 100 * mean / clean if mean is not None and clean else None
    return {"clean": clean, "severity": by_severity, "mean": mean, "relative": relative}


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return statistics.fmean(known) if known and len(known) == len(values) else None


def show(study: Corruptions, runs: Sequence[Run], console: Console) -> None:
    """Prints a table for each domain, with a row for each run."""
    domains = dict.fromkeys(
        domain for run in runs for domain in study.config(run).evaluation.domains
    )

    def cell(value):
        return "-" if value is None else f"{value:.1f}"

    for domain in domains:
        table = Table(
            title=f"{domain}, corrupted: mean over {len(study.kinds)} kinds, in %",
            title_justify="left",
        )
        for head in (
            "run",
            "clean",
            *(f"severity {severity}" for severity in study.options.severities),
            "mean",
            "relative to clean",
        ):
            table.add_column(head, justify="left" if head == "run" else "right", no_wrap=True)
        for run in runs:
            means = summary(study.scores(run, domain), study.options.severities)
            figures = (
                means["clean"],
                *means["severity"].values(),
                means["mean"],
                means["relative"],
            )
            table.add_row(run.name, *map(cell, figures))
        console.print(table)
    for run in runs:
        if kinds := study.trained_under(run):
            console.print(f"{run.name} was trained under {', '.join(kinds)}: not unseen kinds")


def entry(study: Corruptions, run: Run) -> dict[str, Any]:
    """The fields of a run in study.json that only this study has."""
    domains = study.config(run).evaluation.domains
    return {
        "severities": list(study.options.severities),
        "trained_under": study.trained_under(run),
        "corruptions": {domain: study.scores(run, domain) for domain in domains},
    }


def make(*arguments: Any, **given: Any) -> Corruptions:
    """The study that the flags describe."""
    if _CHECKPOINT.value:
        made = Trained(_CHECKPOINT.value, *arguments, **given)
    else:
        made = Corruptions(*arguments, **given)
    made.check()
    made.max_images = _MAX_IMAGES.value
    checkpoints = text_of([local(checkpoint) for checkpoint in _CHECKPOINT.value or ()])
    named = {
        "checkpoint": checkpoints if _CHECKPOINT.value else None,
        "max_images": made.max_images,
    }
    made.flags = [f"--{name}={value}" for name, value in named.items() if value is not None]
    return made


if __name__ == "__main__":
    _CHECKPOINT = cli.define_list(
        "checkpoint", "Workdirs of finished runs, by comma, to evaluate instead of training."
    )
    _MAX_IMAGES = flags.DEFINE_integer(
        "max_images",
        None,
        "Evaluate so many images of a domain, evenly spaced; 0 for all.",
        lower_bound=0,
    )
    main("corruptions", plan, judge=judge, entry=entry, make=make)
