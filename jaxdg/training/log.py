"""A run's log: rows of metrics.jsonl, the progress bar and the check for a non-finite loss."""

from collections.abc import Callable, Iterator, Sequence
import contextlib
import math
import time
from typing import Any

import jax
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from jaxdg.training.writer import Writer


def due(step: int, every: int, last: int) -> bool:
    """Whether something done every `every` steps and at the last is due; never if `every` is 0."""
    return every > 0 and (step % every == 0 or step == last)


class Log:
    """Logs a run without making the devices wait.

    The metrics of a step are fetched after the next step has been dispatched. The host waits for
    them then, so at most two batches are on the devices, however fast data are read.
    """

    def __init__(
        self,
        writer: Writer,
        console: Console,
        *,
        start: int,
        steps: int,
        every: int,
        batch_size: int,
        rate: Callable[[int], Any],
        files: Callable[[int], Sequence[str]],
    ):
        """Starts the clock.

        Args:
            writer: receives the rows.
            console: shows the progress bar, or a line for each row if it is no terminal.
            start: steps done so far.
            steps: of the run.
            every: steps between two rows.
            batch_size: images a step.
            rate: number of a step, from 0, to its learning rate.
            files: number of a step, from 0, to the files of its batch.
        """
        self.writer = writer
        self.console = console
        self.steps = steps
        self.every = every
        self.batch_size = batch_size
        self.rate = rate
        self.files = files
        self.pending: list[tuple[int, dict[str, jax.Array]]] = []
        self.last = start
        self.clock = time.perf_counter()
        self.compiled = False
        columns = (
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[note]}", markup=False),
            TimeRemainingColumn(),
        )
        self.bar = Progress(*columns, console=console, disable=not console.is_terminal)
        self.task = self.bar.add_task("training", total=steps, completed=start, note="")

    def __enter__(self) -> "Log":
        self.bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.bar.stop()

    def say(self, line: str) -> None:
        """Prints a line above the bar."""
        self.console.print(line, highlight=False)

    def step(self, step: int, metrics: dict[str, jax.Array]) -> None:
        """Takes the metrics of the step that was just dispatched."""
        if not self.compiled:
            jax.block_until_ready(metrics)
            self.compiled = True
            self.clock = time.perf_counter()
            self.last = step
        if self.pending:
            jax.block_until_ready(self.pending[-1])
            if due(self.pending[-1][0], self.every, self.steps):
                self.flush()
        self.pending.append((step, metrics))
        self.bar.update(self.task, completed=step)

    def flush(self) -> None:
        """Fetches the pending metrics, checks every loss and writes the rows that are due.

        Raises:
            ValueError: a loss is not finite; the message names the step and the files of its batch.
        """
        pending = jax.device_get(self.pending)
        self.pending = []
        for step, metrics in pending:
            if not math.isfinite(metrics["loss"]):
                raise ValueError(
                    f"the loss of step {step} is {float(metrics['loss'])}; its batch:"
                    f" {', '.join(self.files(step - 1))}; lower optimizer.learning_rate or look at"
                    " these files; checkpoints before this step are untouched"
                )
            if due(step, self.every, self.steps):
                self._row(step, {key: float(value) for key, value in metrics.items()})

    def _row(self, step: int, metrics: dict[str, float]) -> None:
        loss = metrics.pop("loss")
        row = {"step": step, "loss": loss, "learning_rate": float(self.rate(step - 1))}
        note = f"loss {loss:.3f}"
        left = ""
        now = time.perf_counter()
        if step > self.last:  # else the step compiled, and its time says nothing
            seconds = (now - self.clock) / (step - self.last)
            speed = self.batch_size / seconds
            row |= {"seconds_per_step": seconds, "images_per_second": speed}
            note += f"  {speed:.1f} images/s"
            left = f"  ETA {seconds * (self.steps - step) / 60:.1f} min"
        self.clock = now
        self.last = step
        self.writer.rows({**row, **metrics})
        self.bar.update(self.task, note=note)
        if not self.console.is_terminal:
            self.say(f"step {step}/{self.steps}  {note}{left}")

    @contextlib.contextmanager
    def pause(self) -> Iterator[None]:
        """Stops the clock, for checkpoints and evaluations; nothing may be pending."""
        since = time.perf_counter()
        try:
            yield
        finally:
            self.clock += time.perf_counter() - since
