"""The rows of a run's `metrics.jsonl`, read back whatever a crash left of them."""

import json
from pathlib import Path
from typing import Any


def read_metrics(workdir: str | Path) -> list[dict[str, Any]]:
    """The rows of a run's `metrics.jsonl`, none if there is no such file; lines that are no rows
    are left out.
    """
    return read_rows(Path(workdir) / "metrics.jsonl")[0]


def read_rows(path: Path) -> tuple[list[dict[str, Any]], list[int]]:
    """The rows of a file, and the numbers of the lines that are none, but for a last one that was
    being written when the run died.
    """
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        return [], []
    *lines, last = content.split(b"\n")
    rows = []
    broken = []
    for number, line in enumerate([*lines, last], 1):
        row = _row(line)
        if row is not None:
            rows.append(row)
        elif (number <= len(lines) and line.strip()) or b"\0" in line:
            broken.append(number)
    return rows, broken


def _row(line: bytes) -> dict[str, Any] | None:
    """What a line says, None if it is no row."""
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return row if isinstance(row, dict) and type(row.get("step")) is int else None
