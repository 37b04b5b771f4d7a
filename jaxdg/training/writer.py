"""`metrics.jsonl` and TensorBoard events of a run, written so that a resumed run reads as if it had
never stopped.
"""

from collections.abc import Callable
import json
from pathlib import Path
import socket
import struct
import time
from typing import Any

from absl import logging
import numpy as np
from tensorboardX import summary

# `Event` and `SessionLog` are made when their module is imported.
from tensorboardX.proto.event_pb2 import (
    Event,  # pyright: ignore[reportAttributeAccessIssue]
    SessionLog,  # pyright: ignore[reportAttributeAccessIssue]
)
from tensorboardX.record_writer import masked_crc32c

from jaxdg import files
from jaxdg.training.metrics import read_rows

FLUSH = 10  # seconds after which TensorBoard's events are on the disk


class Writer:
    """Appends one flushed JSON object a row and mirrors its numbers to TensorBoard."""

    def __init__(
        self,
        workdir: str | Path,
        resume_step: int,
        on: bool = True,
        say: Callable[[str], None] = logging.warning,
    ):
        """Args:
        workdir: of the run.
        resume_step: step the run goes on from; rows past it, and lines that are no rows, are
            dropped.
        on: False writes nothing at all, as in all processes of a run but one.
        say: receives a line where lines of metrics.jsonl are broken; the file is then kept aside as
            it was.

        Raises:
            OSError: the disk is full, or the folder cannot be written to; so do the methods.
        """
        self._on = on
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
        """Writes rows, all or none of them; `row["step"]` places one, `row["domain"]`, where
        present, groups it.
        """
        if not self._on:
            return
        with files.naming(self.path):
            self._file.write("".join(json.dumps(row) + "\n" for row in rows))
            self._file.flush()
        for row in rows:
            group = f"evaluation/{row['domain']}" if "domain" in row else "training"
            for key, value in row.items():
                if (
                    key != "step"
                    and isinstance(value, (int, float))
                    and not isinstance(value, bool)
                ):
                    self._show(f"{group}/{key}", summary.scalar("", value), row["step"])

    def picture(self, name: str, image: np.ndarray, step: int) -> None:
        """Shows an RGB picture [h, w, 3] uint8 in TensorBoard."""
        if self._on:
            self._show(name, summary.image("", image, dataformats="HWC"), step)

    def _show(self, tag: str, event: Any, step: int) -> None:
        """Adds an event under a name of any characters, which tensorboardX would replace by
        underscores.
        """
        event.value[0].tag = tag
        self._events.add(step, summary=event)

    def close(self) -> None:
        """Flushes and closes both."""
        if not self._on:
            return
        try:
            with files.naming(self.path):
                self._file.close()
        finally:
            self._events.close()


class _Events:
    """TensorBoard's file of events, written by the thread that calls, so that a full disk ends the
    run and not a thread of its own.
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
        """Appends an event, and every `FLUSH` seconds sees to it that all reach the disk."""
        data = Event(wall_time=time.time(), step=step, **what).SerializeToString()
        length = struct.pack("<Q", len(data))
        with files.naming(self.path):
            self._file.write(
                length
                + struct.pack("<I", masked_crc32c(length))
                + data
                + struct.pack("<I", masked_crc32c(data))
            )
            if time.monotonic() > self._flushed + FLUSH:
                self._file.flush()
                self._flushed = time.monotonic()

    def close(self) -> None:
        """Flushes and closes the file."""
        with files.naming(self.path):
            self._file.close()
