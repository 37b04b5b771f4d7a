"""A run's history: when, where and by which command it was started, and when it ended in order.

`history.jsonl` has an object for each: `event` (start or end), `step`, `time` (UTC); a start also
has `command`, `host`, `devices`, `cores`, `processes` and `versions`. A start without an end was
killed.
"""

import datetime
from importlib.metadata import version
import json
import os
from pathlib import Path
import platform
import shlex
import sys
from typing import Any

import jax

import jaxdg
from jaxdg import files
from jaxdg.training.metrics import paces, read_metrics, read_rows

FILE = "history.jsonl"
_VERSIONS = ("jax", "flax", "optax", "numpy")


def started(workdir: Path, step: int) -> None:
    """Notes that this process goes on from a step."""
    kinds = sorted({device.device_kind for device in jax.devices()})
    _note(
        workdir,
        event="start",
        step=step,
        time=_now(),
        command=_command(),
        host=platform.node(),
        devices=f"{jax.device_count()} x {', '.join(kinds)}",
        cores=os.cpu_count(),
        processes=jax.process_count(),
        versions={
            "jaxdg": jaxdg.__version__,
            **{name: version(name) for name in _VERSIONS},
            "python": platform.python_version(),
        },
    )


def ended(workdir: Path, step: int) -> None:
    """Notes that this process ended in order after a step."""
    _note(workdir, event="end", step=step, time=_now())


def device_hours(workdir: Path, step: int) -> float | None:
    """Hours of devices that the steps of a run took: their times in `metrics.jsonl` x devices.

    See `metrics.paces`; no step counts that a killed run did in vain. After a change of devices,
    each step counts with those that it ran on.

    Args:
        workdir: of the run.
        step: the last step that counts.

    Returns:
        The hours; 0 for no steps; None where no row has a time, or the devices are unknown.
    """
    starts = [
        (note["step"], int(str(note["devices"]).split()[0]))
        for note in read_rows(workdir / FILE)[0]
        if note.get("event") == "start"
    ]
    if not step:
        return 0.0
    stretches = paces(read_metrics(workdir), step)
    if not stretches or not starts:
        return None
    seconds = 0.0
    for before, last, pace in stretches:
        # Rows past the step of a later start were written anew, by that one.
        devices = [count for start, count in starts if start < last][-1:] or [starts[0][1]]
        seconds += pace * (last - before) * devices[0]
    return seconds / 3600


def _command() -> str:
    """What was typed, or can be typed to the same end."""
    program, *arguments = sys.argv
    if Path(program).name in ("train.py", "jaxdg train"):
        return shlex.join(["jaxdg", "train", *arguments])
    return shlex.join(sys.orig_argv)


def _note(workdir: Path, **what: Any) -> None:
    path = workdir / FILE
    with files.naming(path), path.open("a") as file:
        file.write(json.dumps(what) + "\n")


def _now() -> str:
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
