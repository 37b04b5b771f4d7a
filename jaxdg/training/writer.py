"""Writes a run's `metrics.jsonl` and TensorBoard events.

A resumed run drops the rows past its step, so its files read as if it had never stopped.
"""

from collections.abc import Callable, Sequence
import json
from pathlib import Path
import socket
import struct
import time
from typing import Any

from absl import logging
import numpy as np
from tensorboardX import summary

# Importing their module creates `Event` and `SessionLog`, so pyright does not see them.
from tensorboardX.proto.event_pb2 import (
    Event,  # pyright: ignore[reportAttributeAccessIssue]
    SessionLog,  # pyright: ignore[reportAttributeAccessIssue]
)
from tensorboardX.record_writer import masked_crc32c

from jaxdg import files
from jaxdg.training.loggers import Logger
from jaxdg.training.metrics import read_rows

FLUSH = 10  # seconds between two flushes of TensorBoard's events


class Writer:
    """Appends one flushed JSON object a row, and mirrors its numbers to TensorBoard and loggers."""

    def __init__(
        self,
        workdir: str | Path,
        resume_step: int,
        on: bool = True,
        say: Callable[[str], None] = logging.warning,
        loggers: Sequence[Logger] = (),
    ):
        """Opens the files.

        Args:
            workdir: of the run.
            resume_step: step from which the run resumes; later rows and broken lines are dropped.
            on: False writes nothing, for all processes but one.
            say: receives a line about broken lines of metrics.jsonl; the old file is kept aside.
            loggers: receive the same; closed with this.

        Raises:
            OSError: the disk is full, or the folder is not writable. The methods raise this too.
        """
        self._on = on
        self._loggers = tuple(loggers)
        if not on:
            return
        self.path = Path(workdir).absolute() / "metrics.jsonl"
        rows, broken = read_rows(self.path)
        if broken:
            aside = files.set_aside(self.path).name
            say(
                f"{self.path}: broken at line {', '.join(map(str, broken))}; it is kept as {aside}"
                " and goes on without these lines"
            )
        files.write(
            self.path, "".join(json.dumps(row) + "\n" for row in rows if row["step"] <= resume_step)
        )
        with files.naming(self.path):
            self._file = self.path.open("a")
        self._events = _Events(self.path.parent / "tensorboard", resume_step)

    def rows(self, *rows: dict[str, Any]) -> None:
        """Writes all rows or none; `row["domain"]`, if there is one, groups a row."""
        if not self._on:
            return
        with files.naming(self.path):
            self._file.write("".join(json.dumps(row) + "\n" for row in rows))
            self._file.flush()
        for row in rows:
            group = f"evaluation/{row['domain']}" if "domain" in row else "training"
            for key, value in row.items():
                number = isinstance(value, (int, float)) and not isinstance(value, bool)
                if number and key != "step":
                    self._show(f"{group}/{key}", summary.scalar("", value), row["step"])
        for logger in self._loggers:
            logger.rows(*rows)

    def picture(self, name: str, image: np.ndarray, step: int) -> None:
        """Shows an RGB picture [h, w, 3] uint8 in TensorBoard and loggers."""
        if self._on:
            self._show(name, summary.image("", image, dataformats="HWC"), step)
            for logger in self._loggers:
                logger.picture(name, image, step)

    def _show(self, tag: str, event: Any, step: int) -> None:
        """Adds an event; sets its tag here, as tensorboardX would replace some characters."""
        event.value[0].tag = tag
        self._events.add(step, summary=event)

    def close(self) -> None:
        """Flushes and closes both files and the loggers."""
        for logger in self._loggers:
            logger.close()
        if not self._on:
            return
        try:
            with files.naming(self.path):
                self._file.close()
        finally:
            self._events.close()


class _Events:
    """TensorBoard's file of events.

    The calling thread writes it, so a full disk ends the run and not just a writer thread.
    """

    def __init__(self, folder: Path, resume_step: int):
        self.path = folder / f"events.out.tfevents.{time.time():.0f}.{socket.gethostname()}"
        with files.naming(self.path):
            folder.mkdir(parents=True, exist_ok=True)
            self._file = self.path.open("ab")
        self._flushed = 0.0
        self.add(0, file_version="brain.Event:2")
        # Hides events past this step from earlier, killed runs.
        self.add(resume_step + 1, session_log=SessionLog(status=SessionLog.START))

    def add(self, step: int, **what: Any) -> None:
        """Appends an event; flushes the file every `FLUSH` seconds."""
        data = Event(wall_time=time.time(), step=step, **what).SerializeToString()
        length = struct.pack("<Q", len(data))
        with files.naming(self.path):
            for part in (length, data):
                self._file.write(part + struct.pack("<I", masked_crc32c(part)))
            if time.monotonic() > self._flushed + FLUSH:
                self._file.flush()
                self._flushed = time.monotonic()

    def close(self) -> None:
        """Flushes and closes the file."""
        with files.naming(self.path):
            self._file.close()
