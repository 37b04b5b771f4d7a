"""A study: training runs that differ in one thing, made one after another or as independent jobs,
and what they say, collected.

    python -m jaxdg.studies.freezing --config configs/study_tiny.py --workdir runs/freezing

Run it again and it goes on: finished runs are left alone, interrupted ones resumed, missing ones
trained. In the study's folder

    runs/NAME/     is the workdir of each run, made by `python -m jaxdg.train` study.json     is
    what is known so far: every run with its settings, command and results, and mean and spread over
    seeds. A run that did
                   not come to its end is "missing". It depends on the finished runs alone: no
                   times, no absolute paths.

Not taken care of: a run that takes several machines. `--list` prints every run's command, to be
started by other means.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
import dataclasses
import fcntl
import functools
from importlib.metadata import version
import json
import os
from pathlib import Path
import platform
import re
import shlex
import signal
import statistics
import subprocess
import sys
import time
from typing import IO, Any

from absl import flags, logging
from rich.console import Console
from rich.table import Table

import jaxdg
from jaxdg import config as config_lib
from jaxdg import files
from jaxdg.commands import command_line as cli
from jaxdg.commands.command_line import Interrupt, Stop
from jaxdg.config import Config, locks, overrides
from jaxdg.config import workdir as workdir_lib
from jaxdg.evaluation import results as results_lib

Settings = Mapping[str, Any]  # field of the configuration to value, such as {"model.freeze": "all"}


@dataclasses.dataclass(frozen=True)
class StudyOptions:
    """What the studies of an experiment compare. An experiment file may define `get_study() ->
    StudyOptions` beside `get_config()`.

    They are no part of a run's configuration: changing them adds or drops runs, and leaves those
    that stay in both alone.

    Attributes:
        encoders: of `pretraining`: settings by the encoder's name in tables. Default: the
            experiment's encoder as it is, and from scratch.
        freeze_first: of `freezing`: numbers of first blocks to freeze, the embeddings with them.
            Default 1 to 12.
        freeze_last: of `freezing`: numbers of last blocks to freeze. Default 1 to 12.
        sources: of `transfer`: settings by the domain that is trained on. Default: the domains of
            `evaluation.domains`, without any.
        seeds: of `seeds`. Default 0, 1, 2.
        models: of `corruptions`: settings by the name in tables. Default: the experiment as it is.
        kinds: of `corruptions`: kinds of corruption, () for all 15. Default ().
        severities: of `corruptions`. Default 1 to 5.
        repeat: seeds of every run of all studies but `seeds`. Default 0 alone.
        settings: by the name of a study, what it changes in all of its runs.
    """

    encoders: Mapping[str, Settings] = dataclasses.field(default_factory=dict)
    freeze_first: Sequence[int] = tuple(range(1, 13))
    freeze_last: Sequence[int] = tuple(range(1, 13))
    sources: Mapping[str, Settings] = dataclasses.field(default_factory=dict)
    seeds: Sequence[int] = (0, 1, 2)
    models: Mapping[str, Settings] = dataclasses.field(default_factory=dict)
    kinds: Sequence[str] = ()
    severities: Sequence[int] = (1, 2, 3, 4, 5)
    repeat: Sequence[int] = (0,)
    settings: Mapping[str, Settings] = dataclasses.field(default_factory=dict)


# What a study compares: settings by group; the runs of a group differ in their seed alone.
Plan = Callable[[Config, StudyOptions], Mapping[str, Settings]]


@dataclasses.dataclass(frozen=True)
class Run:
    """A training run of a study.

    Attributes:
        group: what it has in common with runs of other seeds; speaks for itself in tables.
        settings: against the experiment file, besides the seed.
        seed: of the run.
    """

    group: str
    settings: Settings
    seed: int

    @property
    def name(self) -> str:
        """Of its folder."""
        return re.sub(r"[^\w.]+", "_", f"{self.group} seed{self.seed}")


class Study:
    """The runs of a study and its folder.

    Attributes:
        flags: of the study's own command, besides those that all studies have.
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
        given: what the command line changes in all runs.
        base: the experiment with that.
        options: what to compare.
        folder: of the study; need not exist.

        Raises:
            ValueError: an unknown field, a value that is not allowed, two runs of one name, or a
                folder that holds other runs than these.
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
        if twice := sorted({n for n in names if names.count(n) > 1}):
            raise ValueError(
                f"study {name} plans several runs called {', '.join(twice)}; give encoders, models"
                " or seeds other names"
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
            config = self.config(
                run
            )  # of every run, so that a wrong setting is found before any training
            old = workdir_lib.stored(workdir)
            if (
                old is not None
                and workdir_lib.saved(workdir)
                and (changed := workdir_lib.differences(old, config))
            ):
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
        """What trains a run, without the interpreter; `show` writes paths."""
        changes = {**self.given, **run.settings, "seed": run.seed}
        options = ["--config", show(self.file), "--workdir", show(str(self.workdir(run)))]
        return [
            "-m",
            "jaxdg.train",
            *options,
            *(
                f"--config.{field}={show(overrides.text_of(value))}"
                for field, value in changes.items()
            ),
        ]

    def results(self, run: Run) -> dict[str, Any] | None:
        """The contents of results.json of a run that has come to its end, else None."""
        workdir = self.workdir(run)
        steps = self.config(run).steps
        results = workdir_lib.results(workdir / "results.json")
        whole = (
            results is not None
            and results["step"] == steps
            and (workdir / "checkpoints" / str(steps)).is_dir()
        )
        return results if whole else None

    def status(self, run: Run) -> str:
        """How far a run is, in words."""
        if self.results(run) is not None:
            return "finished"
        if (error := self.error(run)) is not None:
            return f"failed: {error}"
        steps = [
            int(path.name)
            for path in self.workdir(run).glob("checkpoints/*")
            if path.name.isdigit()
        ]
        return f"interrupted at step {max(steps)}" if steps else "missing"

    def error(self, run: Run) -> str | None:
        """What ended the last attempt at a run too early, None if nothing did."""
        file = self.workdir(run) / "error.txt"
        lines = (
            [line.strip() for line in file.read_text(errors="replace").splitlines()]
            if file.is_file()
            else []
        )
        lines = [line for line in lines if line.startswith("error: ")] or [
            line for line in lines if line
        ]
        return lines[-1].removeprefix("error: ") if lines else None

    def train(self, run: Run, console: Console, interrupt: Interrupt) -> bool:
        """Trains a run to its end, in a process of its own; whether it has come there.

        A run that another process trains is waited for: that of another study, or one that outlived
        a study that was killed.

        Raises:
            Stop: the study was asked to stop; so was the training, which has saved.
        """
        workdir = self.workdir(run)
        workdir.mkdir(parents=True, exist_ok=True)
        with (workdir / "study.lock").open("w") as lock:
            said = False
            # The process that trains holds it too, and keeps it if this one is killed. One that was
            # started by hand holds its own.
            while not _lock(lock) or locks.holder(workdir / "lock") is not None:
                if not said:
                    console.print(f"{run.name}: waits for another process that trains it")
                said = True
                interrupt.check()
                time.sleep(0.2)
            if self.results(run) is None:
                self._start(run, lock, interrupt)
        if self.results(run) is not None:
            return True
        interrupt.check()
        console.print(
            f"{run.name} did not come to its end: {self.error(run) or 'it was stopped'}",
            style="red",
        )
        return False

    def _start(self, run: Run, lock: IO[str], interrupt: Interrupt) -> None:
        """Trains a run as far as it goes, and leaves what ended it too early in error.txt."""
        file = self.workdir(run) / "error.txt"
        with file.open("w") as errors:
            process = subprocess.Popen(
                [sys.executable, *self.command(run)], stderr=errors, pass_fds=[lock.fileno()]
            )
        asked = False
        while process.poll() is None:
            if interrupt.asked and not asked:
                process.send_signal(signal.SIGTERM)  # a Ctrl-C it has got from the terminal already
                asked = True
            time.sleep(0.1)
        if process.returncode == 0 or asked:
            file.unlink()
        elif self.error(run) is None:
            file.write_text(f"it ended with exit code {process.returncode} and without a word")

    def collect(self, entry: Callable[[Run], Mapping[str, Any]] = lambda run: {}) -> dict[str, Any]:
        """Writes study.json, whole or not at all.

        Args:
            entry: what else to note of a run.

        Returns:
            Its contents.
        """
        score = "mAP50" if self.base.task == "detection" else "mIoU"
        shown = [f"--config={local(self.file)}", f"--workdir={local(str(self.folder))}"]
        shown += [
            *self.flags,
            *(
                f"--config.{field}={local(overrides.text_of(value))}"
                for field, value in self.given.items()
            ),
        ]
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
        everything = {
            "study": self.name,
            "task": self.base.task,
            "score": score,
            "protocol": self.base.evaluation.protocol,
            "source": self.base.data.source,
            "config": local(self.file),
            "command": shlex.join(["python", "-m", f"jaxdg.studies.{self.name}", *shown]),
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
        files.write(self.folder / "study.json", json.dumps(everything, indent=2) + "\n")
        return everything


def summary(runs: Sequence[Mapping[str, Any]], score: str) -> dict[str, Any]:
    """A group's figures over its finished runs.

    Args:
        runs: entries of study.json that differ in their seed.
        score: of a domain: mIoU or mAP50.

    Returns:
        `n` finished of so many planned (`of`), and for each domain, for the mean of those never
        seen and for rPD: mean, spread and n.
    """
    finished = [run["results"] for run in runs if run["results"] is not None]
    domains = dict.fromkeys(name for results in finished for name in results["domains"])
    return {
        "n": len(finished),
        "of": len(runs),
        "domains": {
            name: mean_and_spread(
                r["domains"][name][score] for r in finished if name in r["domains"]
            )
            for name in domains
        },
        **{
            key: mean_and_spread(results[key] for results in finished)
            for key in ("mean_unseen", "rPD")
        },
    }


def mean_and_spread(values: Iterable[float | None]) -> dict[str, Any]:
    """Mean, sample standard deviation (None for fewer than two) and number of the values there are."""
    known = [value for value in values if value is not None]
    return {
        "mean": statistics.fmean(known) if known else None,
        "spread": statistics.stdev(known) if len(known) > 1 else None,
        "n": len(known),
    }


def configured(base: Config, settings: Settings) -> Config:
    """A checked copy of a configuration with other settings; a wrong one is a ValueError."""
    return config_lib.validated(overrides.applied(base, settings))


def _lock(file: IO[str]) -> bool:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def local(text: str) -> str:
    """A path as it may be published: relative, or its last part; other text as it is."""
    if not text.startswith("/"):
        return text
    path = Path(os.path.normpath(text))
    return str(path.relative_to(Path.cwd())) if path.is_relative_to(Path.cwd()) else path.name


def show(everything: Mapping[str, Any], console: Console) -> None:
    """A table of the groups of study.json."""
    groups = everything["groups"]
    domains = dict.fromkeys(name for group in groups for name in group["domains"])
    table = Table(
        title=(
            f"{everything['score']} in %, protocol {everything['protocol']}, mean ± spread over"
            " seeds"
        ),
        title_justify="left",
    )
    table.add_column("", no_wrap=True)
    for name in (*domains, "mean unseen", "rPD", "runs"):
        table.add_column(name, justify="right")
    for group in groups:
        figures = [
            *(group["domains"].get(name) for name in domains),
            group["mean_unseen"],
            group["rPD"],
        ]
        cells = (
            ["-" if f is None or f["mean"] is None else _figure(f) for f in figures]
            if group["n"]
            else ["missing"] * len(figures)
        )
        table.add_row(
            group["group"],
            *cells,
            str(group["n"]) if group["n"] == group["of"] else f"{group['n']} of {group['of']}",
        )
    console.print(table)
    finished = {
        g["group"]: [
            run["results"]
            for run in everything["runs"]
            if run["group"] == g["group"] and run["results"]
        ]
        for g in groups
    }
    for line in results_lib.remarks_of(finished):
        console.print(line)


def _figure(figure: Mapping[str, Any]) -> str:
    return f"{figure['mean']:.1f}" + (
        "" if figure["spread"] is None else f" ± {figure['spread']:.1f}"
    )


def main(
    name: str,
    plan: Plan,
    *,
    judge: Callable[[Any, Sequence[Run], Console, Interrupt], None] = lambda *_: None,
    entry: Callable[[Any, Run], Mapping[str, Any]] = lambda *_: {},
    make: Callable[..., Study] = Study,
) -> None:
    """The command `python -m jaxdg.studies.NAME`.

    Args:
        name: of the study.
        plan: what it compares.
        judge: what else is done with those of the runs that are finished, after training; raises
            `cli.Stop` if asked to stop.
        entry: what that adds to a run in study.json.
        make: the study of the arguments of `Study`.
    """
    experiment = cli.define_config()
    flags.FLAGS.register_key_flag_for_module(sys.argv[0], flags.FLAGS["config"])
    key: dict[str, Any] = {"module_name": sys.argv[0]}  # --help shows these
    workdir = cli.define_path(
        "workdir", "Folder of the study: made if needed, gone on with if it holds it."
    )
    only = flags.DEFINE_integer(
        "run",
        None,
        "Make this run alone, counted from 0 as --list shows them.",
        lower_bound=0,
        **key,
    )
    listed = flags.DEFINE_bool(
        "list", False, "Print the runs, how far they are, and their commands; do nothing.", **key
    )
    collect = flags.DEFINE_bool(
        "collect", False, "Write study.json of what there is; make no run.", **key
    )

    def command(arguments: Sequence[str]) -> None:
        if len(arguments) > 1:
            raise ValueError(f"unexpected argument {arguments[1]!r}; see --help")
        base = experiment.value
        if base is None or workdir.value is None:
            raise ValueError(
                "--config FILE and --workdir DIR are needed, such as --config configs/study_tiny.py"
                " --workdir runs/study"
            )
        file = experiment.file
        given = experiment.given
        options = getattr(config_lib.experiment(file.split(":")[0]), "get_study", StudyOptions)()
        study = make(
            name,
            plan,
            file=file,
            given=given,
            base=base,
            options=options,
            folder=Path(workdir.value),
        )
        console = cli.console()
        if only.value is not None and only.value >= len(study.runs):
            raise ValueError(f"--run is {only.value}; allowed: 0 to {len(study.runs) - 1}")
        if listed.value:
            for i, run in enumerate(study.runs):
                console.print(
                    f"{i}  {run.name}  {study.status(run)}\n  "
                    f" {shlex.join(['python', *study.command(run)])}"
                )
            return
        runs = (
            [] if collect.value else study.runs if only.value is None else [study.runs[only.value]]
        )
        # A job that makes one run of many writes no study.json: others do the same at the same
        # time.
        keep = (
            (lambda: {})
            if only.value is not None
            else functools.partial(study.collect, functools.partial(entry, study))
        )
        try:
            carry_out(study, runs, functools.partial(judge, study), keep, console, Interrupt())
        except Stop:
            console.print("stopped; run the same command to go on")
            return
        if everything := keep():
            show(everything, console)
            console.print(f"written to {study.folder}/study.json")
        if missing := [
            f"{run.name} ({study.status(run)})" for run in runs if study.results(run) is None
        ]:
            raise ValueError(
                f"{len(missing)} of {len(runs)} runs are missing: {', '.join(missing)}; the same"
                " command tries them again"
            )

    cli.run(command)


def carry_out(
    study: Study,
    runs: Sequence[Run],
    judge: Callable[[Sequence[Run], Console, Interrupt], None],
    keep: Callable[[], Any],
    console: Console,
    interrupt: Interrupt,
) -> None:
    """Trains those of the runs that are not finished, one after another, and judges what came to
    its end.

    Args:
        study: theirs.
        runs: what to make.
        judge: see `main`.
        keep: called before the first run and after each.
        console: where to print.
        interrupt: what asks to stop.

    Raises:
        Stop: asked to.
    """
    keep()
    for i, run in enumerate(runs, 1):
        status = study.status(run)
        console.print(f"run {i} of {len(runs)}: {run.name}, {status}", style="bold")
        if status != "finished":
            interrupt.check()
            study.train(run, console, interrupt)
            keep()
    judge([run for run in runs if study.results(run) is not None], console, interrupt)
