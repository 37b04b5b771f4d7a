"""Verifies the records below a data root for `jaxdg check`."""

from collections.abc import Sequence
import glob
import json
import math
import os
from pathlib import Path

from rich.console import Console
from rich.text import Text

from jaxdg.commands.check.tables import list_broken
from jaxdg.data import class_check, published, records
from jaxdg.data.class_check import Seen
from jaxdg.data.class_counts import look
from jaxdg.data.index import Defect


def check_records(
    names: Sequence[str], root: str, console: Console, everything: bool = False
) -> dict[str, list[Defect]]:
    """Verifies the records below a data root and prints the findings.

    Args:
        names: of datasets and domains; none for all.
        root: data root.
        console: where to print.
        everything: read every label, also after all classes were seen.

    Returns:
        The defects of every domain that has records.
    """
    base = glob.escape(root)
    directories = {
        os.path.dirname(path)
        for depth in ("*", "*/*")
        for marker in (records.COMPLETE, records.UNFINISHED)
        for path in glob.glob(f"{base}/{depth}/{records.VERSION}/{marker}")
    }
    result: dict[str, list[Defect]] = {}
    for directory in sorted(directories):
        domain = os.path.relpath(os.path.dirname(directory), root)
        if names and not domain.startswith(tuple(names)):
            continue
        try:
            broken = [Defect("", wrong) for wrong in records.verify(directory)]
        except (ValueError, OSError) as error:
            broken = [Defect("", str(error))]
        state = "broken" if broken else "whole"
        title = (f"records of {domain}", "bold")
        console.print(Text.assemble(title, f"  {directory}: {state}"))
        result[domain] = broken or _broken_classes(directory, domain, everything, console)
        list_broken(result[domain], console)
        console.print()
    return result


def _broken_classes(
    directory: str, domain: str, everything: bool, console: Console
) -> list[Defect]:
    """The defects in the classes of intact records; prints the other findings."""
    metadata = json.loads(Path(directory, records.METADATA).read_text(encoding="utf-8"))
    if "classes" not in metadata:
        return []  # another program wrote the records; training reports that
    shown = []
    for split in dict.fromkeys(metadata["splits"].values()):
        dataset = records.Records(directory, split)
        most = len(dataset) if everything else class_check.MOST
        seconds = math.inf if everything else class_check.SECONDS
        shown.append(Seen(dataset, look(dataset, most=most, seconds=seconds), f"{domain}/{split}"))
    broken, lines = class_check.findings(shown, own=published.find(domain) is None)
    for line, is_warning in lines:
        console.print(Text.assemble(("warning: ", "yellow") if is_warning else "", line))
    return [Defect("", line) for line in broken]
