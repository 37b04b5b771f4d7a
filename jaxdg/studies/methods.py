"""What switches on top of an encoder are worth: methods of `get_study()` under one budget and one
protocol.

    jaxdg study methods --config study_tiny --workdir runs/methods

Every method trains every encoder for the same number of steps. In study.json a run has

    "cost": {"parameters": trained ones, "bytes": predicted, "seconds_per_step": measured}

`bytes` are what `jaxdg plan` predicts for one device: state, batch and temporaries of the program
for CPUs, an upper bound for accelerators. `seconds_per_step` is the median over the run's rows of
metrics.jsonl but the first. Both depend on the machine, so rows of one machine compare.
"""

from collections.abc import Mapping, Sequence
import dataclasses
import json
import statistics
from typing import Any

from rich.console import Console

from jaxdg import files
from jaxdg.commands import process as runtime
from jaxdg.commands.command_line import Interrupt
from jaxdg.commands.plan import plan as planned
from jaxdg.config import Config, MeshConfig
from jaxdg.studies import command
from jaxdg.studies.study import Run, Settings, Study, StudyOptions
from jaxdg.training.metrics import read_metrics


def plan(base: Config, options: StudyOptions) -> Mapping[str, Settings]:
    """See `study.Plan`."""
    methods = options.methods or defaults(base)
    if not options.encoders:
        return methods
    return {
        f"{encoder}, {method}": {**settings, **switches}
        for encoder, settings in options.encoders.items()
        for method, switches in methods.items()
    }


def defaults(base: Config) -> dict[str, Settings]:
    """Methods that any plain ViT can take, each as its authors use it where that is one setting."""
    own_rate = {"optimizer.encoder_factor": 1.0}
    linked = base.model.decoder == "mask2former"
    tokens = {"rein.tokens": base.model.mask2former.queries} if linked else {}
    return {
        "tuned": {},
        "frozen": {"model.freeze": "all"},
        "average": {"average.on": True, "average.momentum": 0.01, "average.start": base.steps // 4},
        "LoRA": {"low_rank.on": True, "low_rank.rank": 8, **own_rate},
        "SoMA": {
            "low_rank.on": True,
            "low_rank.start": "soma",
            "low_rank.biases": True,
            "optimizer.encoder_factor": 0.5,
        },
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
            p = planned(dataclasses.replace(study.config(run), mesh=MeshConfig(1, 1)))
            counted[run.group] = {"parameters": p.gradients // 4, "bytes": p.total}
        path = study.workdir(run) / "cost.json"
        files.write(path, json.dumps(counted[run.group], indent=2) + "\n")


if __name__ == "__main__":
    command.main("methods", plan, judge=judge, entry=entry)
