"""Reads what a run's workdir holds, finished or not, and what a packed model says."""

from collections.abc import Mapping
import dataclasses
import datetime
import json
from pathlib import Path
import re
from typing import Any

from jaxdg import files
from jaxdg.config import workdir as workdir_lib
from jaxdg.evaluation import results as results_lib
from jaxdg.tasks import packed
from jaxdg.training import history
from jaxdg.training.metrics import paces, read_metrics, read_rows

_EVALUATION = re.compile(r"evaluation_(\d+).*")


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """A folder with a results.json, or what a packed model says of one.

    Attributes:
        folder: that holds it, and `confusion/`, `curves/`, `qualitative/`, `worst/`; None of a
            packed model.
        name: of the folder, or the protocol of a packed model; empty for the run's own.
        results: the contents of results.json.
    """

    folder: Path | None
    name: str
    results: Mapping[str, Any]

    @property
    def score(self) -> str:
        """What a domain is judged by: mIoU or mAP50."""
        return results_lib.score_name(self.results)

    @property
    def of_class(self) -> str:
        """The same of a class: IoU or AP50."""
        return self.score.removeprefix("m")

    @property
    def domains(self) -> Mapping[str, Mapping[str, Any]]:
        """The entry of each domain."""
        return self.results["domains"]


@dataclasses.dataclass(frozen=True)
class Run:
    """A run.

    Attributes:
        folder: the workdir, or the file of a packed model.
        config: the contents of config.json.
        rows: of metrics.jsonl.
        evaluations: the run's own first, then those of `evaluate`.
        starts: of history.jsonl, each with `until`: its end, or None if it was killed or goes on.
        changes: of changes.jsonl.
        card: of a packed model, which has no rows, starts and changes; empty of a workdir.
    """

    folder: Path
    config: Mapping[str, Any]
    rows: list[dict[str, Any]]
    evaluations: list[Evaluation]
    starts: list[dict[str, Any]]
    changes: list[dict[str, Any]]
    card: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def step(self) -> int:
        """The last step that is known to be done."""
        return max((row["step"] for row in self.rows), default=self.card.get("step", 0))

    @property
    def training(self) -> list[dict[str, Any]]:
        """The rows of training."""
        return [row for row in self.rows if "loss" in row]

    def seconds(self) -> float:
        """Seconds in training steps, without compilation, evaluation and checkpoints."""
        return sum(
            seconds * (last - before) for before, last, seconds in paces(self.rows, self.step)
        )

    def wall_seconds(self) -> float | None:
        """Seconds from start to end, all starts together; None if an end is not known."""
        if not self.starts or any(start["until"] is None for start in self.starts):
            return None
        return sum(
            (_time(start["until"]["time"]) - _time(start["time"])).total_seconds()
            for start in self.starts
        )


def read(workdir: Path) -> Run:
    """The run of a workdir, or of a packed model.

    Raises:
        FileNotFoundError: it holds no config.json.
        ValueError: its config.json is broken, or the file is no packed model.
    """
    if workdir.is_file():
        return _packed(workdir)
    path = workdir / "config.json"
    config = files.read_json(path)
    if config is None:
        raise FileNotFoundError(f"{path} does not exist; give the workdir of a run")
    if not isinstance(config, dict):
        raise files.Broken(f"{path}: broken (no JSON object)")
    folders = [f for f in workdir.glob("evaluation_*") if _EVALUATION.fullmatch(f.name)]
    evaluations = [
        Evaluation(folder, name, results)
        for name, folder in [("", workdir), *sorted((f.name, f) for f in folders)]
        if (results := workdir_lib.results(folder / "results.json")) and results["domains"]
    ]
    starts: list[dict[str, Any]] = []
    for row in read_rows(workdir / history.FILE)[0]:
        if row["event"] == "start":
            if not row["step"]:  # what was done before is not in this run
                starts.clear()
            starts.append({**row, "until": None})
        elif starts:
            starts[-1]["until"] = row
    changes = read_rows(workdir / "changes.jsonl")[0]
    return Run(workdir, config, read_metrics(workdir), evaluations, starts, changes)


def _packed(path: Path) -> Run:
    whole = packed.read(path)
    evaluations = [
        Evaluation(None, results["protocol"] if i else "", results)
        for i, results in enumerate(whole.results)
    ]
    config = json.loads(json.dumps(dataclasses.asdict(whole.config)))
    return Run(path, config, [], evaluations, [], [], {**whole.card, "step": whole.step})


def _time(text: str) -> datetime.datetime:
    return datetime.datetime.fromisoformat(text)
