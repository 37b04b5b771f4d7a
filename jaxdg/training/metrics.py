"""Reads the rows of a run's `metrics.jsonl`, even if a crash broke some lines."""

from collections.abc import Mapping, Sequence
import json
from pathlib import Path
from typing import Any


def read_metrics(workdir: str | Path) -> list[dict[str, Any]]:
    """The rows of a run's `metrics.jsonl`; empty without such a file. Skips broken lines."""
    return read_rows(Path(workdir) / "metrics.jsonl")[0]


def read_rows(path: Path) -> tuple[list[dict[str, Any]], list[int]]:
    """The rows of a file, and the numbers of its broken lines.

    A last line without an end does not count as broken: the run died while writing it.
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


def paces(rows: Sequence[Mapping[str, Any]], last: int) -> list[tuple[int, int, float]]:
    """How long the steps of training took, without compilation, evaluation and checkpoints.

    Args:
        rows: of metrics.jsonl.
        last: the last step that counts.

    Returns:
        Stretches of steps in order: the step before the first, the last, and the seconds that each
        took. A step without a time of its own has that of the next row, or of the last one. Empty
        where no row has a time.
    """
    timed = [
        (row["step"], row["seconds_per_step"])
        for row in rows
        if "seconds_per_step" in row and row["step"] <= last
    ]
    if timed:
        timed[-1] = last, timed[-1][1]
    before = [0, *(step for step, _ in timed)]
    return [(start, end, pace) for start, (end, pace) in zip(before, timed, strict=False)]


def _row(line: bytes) -> dict[str, Any] | None:
    """The row in a line; None if there is none."""
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return row if isinstance(row, dict) and type(row.get("step")) is int else None
