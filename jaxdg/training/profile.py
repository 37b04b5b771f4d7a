"""Traces a few training steps for TensorBoard's profile page and for ui.perfetto.dev."""

from collections.abc import Callable
from pathlib import Path
import re
from typing import Any

import jax


def parse_steps(text: str | None, last: int) -> range:
    """The steps that "FIRST:LAST" names in a run of `last` steps; none if `text` is None.

    Raises:
        ValueError: the text names no steps of this run.
    """
    if text is None:
        return range(0)
    match = re.fullmatch(r"(\d+):(\d+)", text)
    if match is None or not 1 <= int(match[1]) <= int(match[2]) <= last:
        raise ValueError(
            f"--profile_steps is {text!r}; allowed: FIRST:LAST, such as 10:12, from step 1 to the"
            f" run's last, {last}"
        )
    return range(int(match[1]), int(match[2]) + 1)


def profiled(
    step_fn: Callable[..., tuple[Any, Any]], steps: range, start: int, folder: Path
) -> Callable[..., tuple[Any, Any]]:
    """`step_fn`, which also traces devices and host during `steps`, loading included.

    The first step compiles. A trace that begins after it is smaller and shows typical steps.

    Args:
        step_fn: (state, batch) -> (state, metrics).
        steps: to be traced; a resumed run leaves out those already done.
        start: steps done so far.
        folder: `plugins/profile/TIME/` below it gets HOST.xplane.pb for `tensorboard --logdir
            FOLDER` (with tensorboard-plugin-profile) and HOST.trace.json.gz for ui.perfetto.dev.
    """
    steps = range(max(steps.start, start + 1), steps.stop)
    step = start
    if not steps:
        return step_fn

    def run(state: Any, batch: Any) -> tuple[Any, Any]:
        nonlocal step
        step += 1
        if step == steps[0]:
            jax.profiler.start_trace(folder)
        with jax.profiler.StepTraceAnnotation("train", step_num=step):
            following = step_fn(state, batch)
        if step == steps[-1]:
            jax.block_until_ready(following)
            jax.profiler.stop_trace()
        return following

    return run
