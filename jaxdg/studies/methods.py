"""What switches on top of an encoder are worth: methods of `get_study()` under one budget and one
protocol.

    jaxdg study methods --config study_tiny --workdir runs/methods

Every method trains every encoder for the same number of steps. In study.json a run has

    "cost": {"parameters": trained ones, "bytes": predicted, "seconds_per_step": measured}

`bytes` are what `jaxdg plan` predicts for each device of the machine: state, batch and temporaries
of the program for CPUs, an upper bound for accelerators. `seconds_per_step` is the median over the
run's rows of metrics.jsonl but the first. Both depend on the machine, so rows of one machine
compare.
"""

from collections.abc import Mapping, Sequence
import json
import statistics
from typing import Any

import jax
from rich.console import Console

from jaxdg import files, methods
from jaxdg.backbones import VitConfig, zoo
from jaxdg.commands import process as runtime
from jaxdg.commands.command_line import Interrupt
from jaxdg.commands.plan import plan as planned
from jaxdg.config import Config
from jaxdg.studies import command
from jaxdg.studies.study import Run, Settings, Study, StudyOptions, configured
from jaxdg.tasks.run_state import Blueprint, make_task
from jaxdg.training.metrics import read_metrics


def plan(base: Config, options: StudyOptions) -> Mapping[str, Settings]:
    """See `study.Plan`."""
    encoders = options.encoders or {"": {}}
    return {
        f"{encoder}, {method}" if encoder else method: {**settings, **switches}
        for encoder, settings in encoders.items()
        for method, switches in (options.methods or defaults(configured(base, settings))).items()
    }


def defaults(config: Config) -> dict[str, Settings]:
    """Methods that the encoder can take, each as its authors use it where that is one setting."""
    own_rate = {"optimizer.encoder_factor": 1.0}
    start = config.steps // 4
    common: dict[str, Settings] = {
        "tuned": {},
        "frozen": {"model.freeze": "all"},
        "average": {"average.on": True, "average.momentum": 0.01, "average.start": start},
    }
    if not isinstance(zoo.entry(config.model.encoder).config, VitConfig):
        return common
    linked = config.model.decoder == "mask2former"
    tokens = {"rein.tokens": config.model.mask2former.queries} if linked else {}
    soma = {"low_rank.on": True, "low_rank.start": "soma", "low_rank.biases": True}
    return common | {
        "LoRA": {"low_rank.on": True, "low_rank.rank": 8, **own_rate},
        "SoMA": {**soma, "optimizer.encoder_factor": 0.5},
        "Rein": {"rein.on": True, "rein.link": linked, **tokens, **own_rate},
    }


def cost(study: Study, run: Run) -> dict[str, Any] | None:
    """What a finished run cost; None if nobody has counted it."""
    path = study.workdir(run) / "cost.json"
    counted = files.recall(
        path, lambda content: isinstance(content, dict) and {"parameters", "bytes"} <= set(content)
    )
    if counted is None:
        return None
    rows = [row["seconds_per_step"] for row in read_metrics(study.workdir(run)) if "loss" in row]
    seconds = statistics.median(rows[1:]) if len(rows) > 1 else None
    return {**counted, "seconds_per_step": seconds}


def entry(study: Study, run: Run) -> Mapping[str, Any]:
    """The fields that this study adds to a run in study.json."""
    return {"cost": None if study.results(run) is None else cost(study, run)}


def judge(study: Study, runs: Sequence[Run], console: Console, interrupt: Interrupt) -> None:
    """Counts parameters and bytes of finished runs; runs of one group have the same.

    Raises:
        Stop: if asked to stop.
    """
    counted: dict[str, Mapping[str, Any]] = {}
    for run in runs:
        if cost(study, run) is not None:
            continue
        interrupt.check()
        if run.group not in counted:
            console.print(f"{run.group}: counts parameters and bytes")
            runtime.set_up()
            config = study.config(run)
            task = make_task(config, methods.active(config))
            trained, _, _ = Blueprint.of(task, config.model.freeze).abstract
            counted[run.group] = {
                "parameters": sum(leaf.size for leaf in jax.tree.leaves(trained)),
                "bytes": planned(config).total,
            }
        path = study.workdir(run) / "cost.json"
        files.write(path, json.dumps(counted[run.group], indent=2) + "\n")


if __name__ == "__main__":
    command.main("methods", plan, judge=judge, entry=entry)
