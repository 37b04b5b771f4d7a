"""The command of a study: trains its runs, evaluates them further if need be, and sums them up."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
import shlex
import sys
from typing import Any

from absl import flags
from rich.console import Console

from jaxdg import config as config_lib
from jaxdg.commands import command_line as cli
from jaxdg.commands.command_line import Interrupt, Stop
from jaxdg.studies.study import Plan, Run, Study, StudyOptions
from jaxdg.studies.summary import show


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
        judge: evaluates the finished runs further, after training; raises `Stop` if asked to stop.
        entry: the fields that this adds to a run in study.json.
        make: returns the study; takes the arguments of `Study`.
    """
    experiment = cli.define_config()
    key: dict[str, Any] = {"module_name": sys.argv[0]}  # --help shows these
    workdir = cli.define_path(
        "workdir", "Folder of the study: created if needed, continued if it holds the study."
    )
    only = flags.DEFINE_integer(
        "run",
        None,
        "Train this run alone, counted from 0 as --list shows them.",
        lower_bound=0,
        **key,
    )
    listed = flags.DEFINE_bool(
        "list", False, "Print the runs, their states and their commands; train nothing.", **key
    )
    collect = flags.DEFINE_bool(
        "collect", False, "Write study.json of the finished runs; train nothing.", **key
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
        options = getattr(config_lib.experiment(file.split(":")[0]), "get_study", StudyOptions)()
        study = make(
            name,
            plan,
            file=file,
            given=experiment.given,
            base=base,
            options=options,
            folder=Path(workdir.value),
        )
        console = cli.console()
        if only.value is not None and only.value >= len(study.runs):
            raise ValueError(f"--run is {only.value}; allowed: 0 to {len(study.runs) - 1}")
        if listed.value:
            for i, run in enumerate(study.runs):
                command = shlex.join(["python", *study.command(run)])
                console.print(f"{i}  {run.name}  {study.status(run)}\n   {command}")
            return
        runs = study.runs if only.value is None else [study.runs[only.value]]
        if collect.value:
            runs = []

        def save() -> dict[str, Any]:
            # Jobs of one run each run at the same time, so they leave study.json to --collect.
            return {} if only.value is not None else study.collect(partial(entry, study))

        try:
            carry_out(study, runs, partial(judge, study), save, console, Interrupt())
        except Stop:
            console.print("stopped; run the same command to go on")
            return
        if collected := save():
            show(collected, console)
            console.print(f"written to {study.folder}/study.json")
        unfinished = [run for run in runs if study.results(run) is None]
        if missing := [f"{run.name} ({study.status(run)})" for run in unfinished]:
            raise ValueError(
                f"{len(missing)} of {len(runs)} runs are missing: {', '.join(missing)}; the same"
                " command tries them again"
            )

    cli.run(command)


def carry_out(
    study: Study,
    runs: Sequence[Run],
    judge: Callable[[Sequence[Run], Console, Interrupt], None],
    save: Callable[[], Any],
    console: Console,
    interrupt: Interrupt,
) -> None:
    """Trains the unfinished runs, one after another, and judges the finished ones.

    Args:
        study: of the runs.
        runs: to train.
        judge: see `main`.
        save: called before the first run and after each.
        console: where to print.
        interrupt: asks to stop.

    Raises:
        Stop: if asked to stop.
    """
    save()
    for i, run in enumerate(runs, 1):
        status = study.status(run)
        console.print(f"run {i} of {len(runs)}: {run.name}, {status}", style="bold")
        if status != "finished":
            interrupt.check()
            study.train(run, console, interrupt)
            save()
    judge([run for run in runs if study.results(run) is not None], console, interrupt)
