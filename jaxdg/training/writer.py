"""`metrics.jsonl` and TensorBoard events of a run, written so that a resumed run reads as if it had never stopped."""

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
from tensorboardX import SummaryWriter, summary


class Writer:
    """Appends one flushed JSON object a row and mirrors its numbers to TensorBoard."""

    def __init__(self, workdir: str | Path, resume_step: int, on: bool = True):
        """Args:
        workdir: of the run.
        resume_step: step the run goes on from; rows past it, and a half-written last line, are dropped.
        on: False writes nothing at all, as in all processes of a run but one.
        """
        self._on = on
        if not on:
            return
        self.path = Path(workdir) / "metrics.jsonl"
        kept = [row for row in read_metrics(workdir) if row["step"] <= resume_step] if self.path.exists() else []
        partial = self.path.with_suffix(".partial")
        partial.write_text("".join(json.dumps(row) + "\n" for row in kept))
        os.replace(partial, self.path)
        self._file = self.path.open("a")
        # purge_step hides events past it from earlier, killed runs.
        self._events = SummaryWriter(str(Path(workdir) / "tensorboard"), purge_step=resume_step + 1, flush_secs=10)

    def rows(self, *rows: dict[str, Any]) -> None:
        """Writes rows, all or none of them; `row["step"]` places one, `row["domain"]`, where present, groups it."""
        if not self._on:
            return
        self._file.write("".join(json.dumps(row) + "\n" for row in rows))
        self._file.flush()
        for row in rows:
            group = f"evaluation/{row['domain']}" if "domain" in row else "training"
            for key, value in row.items():
                if key != "step" and isinstance(value, (int, float)):
                    self._show(f"{group}/{key}", summary.scalar("", value), row["step"])

    def picture(self, name: str, image: np.ndarray, step: int) -> None:
        """Shows an RGB picture [h, w, 3] uint8 in TensorBoard."""
        if self._on:
            self._show(name, summary.image("", image, dataformats="HWC"), step)

    def _show(self, tag: str, event: Any, step: int) -> None:
        """Adds an event under a name of any characters, which `add_scalar` and `add_image` would replace by underscores."""
        event.value[0].tag = tag
        file: Any = self._events.file_writer
        file.add_summary(event, step)

    def close(self) -> None:
        """Flushes and closes both."""
        if self._on:
            self._file.close()
            self._events.close()


def read_metrics(workdir: str | Path) -> list[dict[str, Any]]:
    """The rows of a run's `metrics.jsonl`; a line that was being written when the run died is left out."""
    rows = []
    for line in (Path(workdir) / "metrics.jsonl").read_text().splitlines():
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return rows
