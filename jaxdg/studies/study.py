"""A study: training runs that differ in one setting, and a summary of their results.

    jaxdg study freezing --config study_tiny --workdir runs/freezing

Run the command again to continue: it keeps finished runs, resumes interrupted ones and trains
missing ones. The study's folder holds

    runs/NAME/     the workdir of each run, trained by `python -m jaxdg.train`
    study.json     every run with its settings, command and results, and mean and spread over seeds

A run that did not finish is "missing" in study.json, which depends on the finished runs alone: it
holds no absolute paths, and no times but those that the runs' own files hold. A study does not
start runs on several machines; `--list` prints the command of each run for another launcher.
"""

from collections.abc import Callable, Mapping, Sequence
import dataclasses
import fcntl
from importlib.metadata import version
import json
import os
from pathlib import Path
import platform
import re
import shlex
import signal
import subprocess
import sys
import time
from typing import IO, Any

from absl import logging
from rich.console import Console

import jaxdg
from jaxdg import config as config_lib
from jaxdg import files
from jaxdg.commands.command_line import Interrupt
from jaxdg.config import Config, locks, overrides
from jaxdg.config import workdir as workdir_lib
from jaxdg.studies.summary import summary

Settings = Mapping[str, Any]  # field of the configuration to value, such as {"model.freeze": "all"}


@dataclasses.dataclass(frozen=True)
class StudyOptions:
    """What the studies of an experiment compare.

    An experiment file may define `get_study() -> StudyOptions` beside `get_config()`. The options
    are not part of a run's configuration: changing them adds or drops runs and keeps the others.

    Attributes:
        encoders: of `pretraining` and `methods`: settings by the encoder's name in tables. Default:
            the experiment's encoder, for `pretraining` also from scratch.
        methods: of `methods`: settings by the method's name in tables. Default: fine-tuning, a
            frozen encoder, an average of the weights, LoRA, SoMA and Rein.
        freeze_first: of `freezing`: numbers of first blocks to freeze, with the embeddings.
            Default 1 to 12.
        freeze_last: of `freezing`: numbers of last blocks to freeze. Default 1 to 12.
        sources: of `transfer`: settings by source domain. Default: each of `evaluation.domains`,
            without settings.
        seeds: of `seeds`. Default 0, 1, 2.
        models: of `corruptions`: settings by the name in tables. Default: the experiment itself.
        kinds: of `corruptions`: kinds of corruption, () for all 15. Default ().
        severities: of `corruptions`. Default 1 to 5.
        repeat: seeds of every run of all studies but `seeds`. Default 0 alone.
        settings: changes to all runs of a study, by the study's name.
    """

    encoders: Mapping[str, Settings] = dataclasses.field(default_factory=dict)
    methods: Mapping[str, Settings] = dataclasses.field(default_factory=dict)
    freeze_first: Sequence[int] = tuple(range(1, 13))
    freeze_last: Sequence[int] = tuple(range(1, 13))
    sources: Mapping[str, Settings] = dataclasses.field(default_factory=dict)
    seeds: Sequence[int] = (0, 1, 2)
    models: Mapping[str, Settings] = dataclasses.field(default_factory=dict)
    kinds: Sequence[str] = ()
    severities: Sequence[int] = (1, 2, 3, 4, 5)
    repeat: Sequence[int] = (0,)
    settings: Mapping[str, Settings] = dataclasses.field(default_factory=dict)


# Gives the settings of each group of a study. The runs of a group differ in their seed alone.
Plan = Callable[[Config, StudyOptions], Mapping[str, Settings]]


@dataclasses.dataclass(frozen=True)
class Run:
    """A training run of a study.

    Attributes:
        group: name of the runs that differ in their seed alone, as tables show it.
        settings: changes to the experiment file, without the seed.
        seed: of the run.
    """

    group: str
    settings: Settings
    seed: int

    @property
    def name(self) -> str:
        """Name of its folder."""
        return re.sub(r"[^\w.]+", "_", f"{self.group} seed{self.seed}")


class Study:
    """The runs of a study and its folder.

    Attributes:
        flags: as given on the command line, besides those that all studies have.
    """

    flags: Sequence[str] = ()

    def __init__(
        self,
        name: str,
        plan: Plan,
        *,
        file: str,
        given: Settings,
        base: Config,
        options: StudyOptions,
        folder: Path,
    ):
        """Args:
        name: of the study: pretraining, freezing, ..
        plan: what it compares.
        file: the experiment file as given, perhaps with `:ARGUMENT` behind it.
        given: changes that the command line makes to all runs.
        base: the experiment with these changes.
        options: what to compare.
        folder: of the study; need not exist.

        Raises:
            ValueError: a field is unknown, a value is not allowed, two runs have one name, or the
                folder holds other runs.
        """
        self.name = name
        self.file = file
        self.given = given
        self.options = options
        self.folder = folder
        common = options.settings.get(name, {})
        self.base = configured(base, common)
        if not self.base.eval_every:
            raise ValueError(
                "eval_every is 0; allowed: at least 1 in a study, which compares results"
            )
        seeds = options.seeds if name == "seeds" else options.repeat
        groups = plan(self.base, options)
        self.runs = [
            Run(group, {**common, **settings}, seed)
            for group, settings in groups.items()
            for seed in seeds
        ]
        names = [run.name for run in self.runs]
        if repeated := sorted({n for n in names if names.count(n) > 1}):
            raise ValueError(
                f"study {name} plans several runs called {', '.join(repeated)}; give encoders,"
                " models or seeds other names"
            )
        self._check_folder()

    def _check_folder(self) -> None:
        other = files.recall(
            self.folder / "study.json",
            lambda study: isinstance(study, dict) and "study" in study,
            logging.warning,
        )
        if other is not None and other["study"] != self.name:
            raise ValueError(
                f"{self.folder} holds the study {other['study']}; give another --workdir"
            )
        for run in self.runs:
            workdir = self.workdir(run)
            config = self.config(run)  # finds wrong settings of all runs before any is trained
            old = workdir_lib.stored(workdir)
            if old is None or not workdir_lib.saved(workdir):
                continue
            if changed := workdir_lib.differences(old, config):
                raise ValueError(
                    f"{workdir} holds another run: {'; '.join(changed)}; give its settings or"
                    " another --workdir, or delete it"
                )

    def workdir(self, run: Run) -> Path:
        """The folder of a run."""
        return self.folder / "runs" / run.name

    def config(self, run: Run) -> Config:
        """The configuration of a run."""
        return configured(self.base, {**run.settings, "seed": run.seed})

    def command(self, run: Run, show: Callable[[str], str] = str) -> list[str]:
        """The arguments of Python that train a run; `show` writes paths."""
        workdir = show(str(self.workdir(run)))
        changes = {**self.given, **run.settings, "seed": run.seed}
        options = ["--config", show(self.file), "--workdir", workdir, *_flags(changes, show)]
        return ["-m", "jaxdg.train", *options]

    def results(self, run: Run) -> dict[str, Any] | None:
        """The content of a finished run's results.json; None if the run is not finished."""
        workdir = self.workdir(run)
        steps = self.config(run).steps
        results = workdir_lib.results(workdir / "results.json")
        if results is None or results["step"] != steps:
            return None
        return results if (workdir / "checkpoints" / str(steps)).is_dir() else None

    def status(self, run: Run) -> str:
        """The state of a run, in words."""
        if self.results(run) is not None:
            return "finished"
        if (error := self.error(run)) is not None:
            return f"failed: {error}"
        names = [path.name for path in self.workdir(run).glob("checkpoints/*")]
        steps = [int(name) for name in names if name.isdigit()]
        return f"interrupted at step {max(steps)}" if steps else "missing"

    def error(self, run: Run) -> str | None:
        """The error that ended the last attempt at a run; None if there was none."""
        file = self.workdir(run) / "error.txt"
        if not file.is_file():
            return None
        lines = [line.strip() for line in file.read_text(errors="replace").splitlines()]
        lines = [line for line in lines if line]
        errors = [line for line in lines if line.startswith("error: ")] or lines
        return errors[-1].removeprefix("error: ") if errors else None

    def train(self, run: Run, console: Console, interrupt: Interrupt) -> bool:
        """Trains a run in a process of its own; returns whether it finished.

        If another process trains the run, this waits for it: one of another study, or one that
        outlived a study that was killed.

        Raises:
            Stop: the study was asked to stop; the training has saved and stopped too.
        """
        workdir = self.workdir(run)
        workdir.mkdir(parents=True, exist_ok=True)
        with (workdir / "study.lock").open("w") as lock:
            waiting = False
            # The training process inherits this lock and keeps it if the study is killed. Training
            # that a user started holds `workdir/lock` alone.
            while not _lock(lock) or locks.holder(workdir / "lock") is not None:
                if not waiting:
                    console.print(f"{run.name}: waits for another process that trains it")
                waiting = True
                interrupt.check()
                time.sleep(0.2)
            if self.results(run) is None:
                self._start(run, lock, interrupt)
        if self.results(run) is not None:
            return True
        interrupt.check()
        reason = self.error(run) or "it was stopped"
        console.print(f"{run.name} did not come to its end: {reason}", style="red")
        return False

    def _start(self, run: Run, lock: IO[str], interrupt: Interrupt) -> None:
        """Trains a run; leaves the error that ended it in error.txt."""
        file = self.workdir(run) / "error.txt"
        with file.open("w") as errors:
            process = subprocess.Popen(
                [sys.executable, *self.command(run)], stderr=errors, pass_fds=[lock.fileno()]
            )
        asked = False
        while process.poll() is None:
            if interrupt.asked and not asked:
                process.send_signal(signal.SIGTERM)  # the terminal sends it a Ctrl-C, but no others
                asked = True
            time.sleep(0.1)
        if process.returncode == 0 or asked:
            file.unlink()
        elif self.error(run) is None:
            file.write_text(f"it ended with exit code {process.returncode} and without a word")

    def collect(self, entry: Callable[[Run], Mapping[str, Any]] = lambda run: {}) -> dict[str, Any]:
        """Writes study.json in one step and returns its content.

        Args:
            entry: further fields of a run.
        """
        score = "mAP50" if self.base.task == "detection" else "mIoU"
        arguments = [f"--config={local(self.file)}", f"--workdir={local(str(self.folder))}"]
        arguments += [*self.flags, *_flags(self.given, local)]
        groups = {run.group: run.settings for run in self.runs}
        runs = []
        for run in self.runs:
            results = self.results(run)
            runs.append(
                {
                    "name": run.name,
                    "group": run.group,
                    "settings": dict(run.settings),
                    "seed": run.seed,
                    "source": self.config(run).data.source,
                    "command": shlex.join(["python", *self.command(run, local)]),
                    "status": "missing" if results is None else "finished",
                    "step": None if results is None else results["step"],
                    "results": results,
                    **entry(run),
                }
            )
        content = {
            "study": self.name,
            "task": self.base.task,
            "score": score,
            "protocol": self.base.evaluation.label,
            "source": self.base.data.source,
            "config": local(self.file),
            "command": shlex.join(["python", "-m", f"jaxdg.studies.{self.name}", *arguments]),
            "versions": {
                "jaxdg": jaxdg.__version__,
                **{name: version(name) for name in ("jax", "flax")},
                "python": platform.python_version(),
            },
            "runs": runs,
            "groups": [
                {
                    "group": group,
                    "settings": dict(settings),
                    **summary([r for r in runs if r["group"] == group], score),
                }
                for group, settings in groups.items()
            ],
        }
        self.folder.mkdir(parents=True, exist_ok=True)
        files.write(self.folder / "study.json", json.dumps(content, indent=2) + "\n")
        return content


def _flags(changes: Settings, show: Callable[[str], str]) -> list[str]:
    """The overrides that make these changes."""
    return [f"--config.{field}={show(overrides.text_of(v))}" for field, v in changes.items()]


def configured(base: Config, settings: Settings) -> Config:
    """A checked copy of a configuration with other settings; ValueError if one is wrong."""
    return config_lib.validated(overrides.applied(base, settings))


def _lock(file: IO[str]) -> bool:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def local(text: str) -> str:
    """A path as it may be published: relative, or its last part; other text is unchanged."""
    if not text.startswith("/"):
        return text
    path = Path(os.path.normpath(text))
    return str(path.relative_to(Path.cwd())) if path.is_relative_to(Path.cwd()) else path.name
