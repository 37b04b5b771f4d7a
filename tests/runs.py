"""Runs that tests start in their own process."""

from pathlib import Path

from jaxdg import train
from jaxdg.commands import command_line as cli
from jaxdg.config import Config
from jaxdg.training.metrics import read_metrics


class StopAfter(cli.Interrupt):
    """Asks a run to stop after so many steps."""

    def __init__(self, steps: int):
        self.left = steps

    @property
    def asked(self) -> bool:
        self.left -= 1
        return self.left < 0


def start(c: Config, workdir: Path, steps: int = 10**6) -> list[dict]:
    """Trains; the rows of metrics.jsonl without what depends on the clock.

    Args:
        c: of the run.
        workdir: of the run.
        steps: to stop after, if it is not at its end before.
    """
    train.train(c, workdir, cli.console(), StopAfter(steps))
    clock = ("seconds_per_step", "images_per_second")
    return [{k: v for k, v in row.items() if k not in clock} for row in read_metrics(workdir)]
