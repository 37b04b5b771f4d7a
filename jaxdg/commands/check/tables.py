"""Tables of splits as `jaxdg check` prints them."""

from collections.abc import Iterable, Sequence

import numpy as np
from rich.box import SIMPLE
from rich.console import Console
from rich.table import Column, Table
from rich.text import Text

from jaxdg.commands.check.decoding import OpenedSplit
from jaxdg.data.boxes import BoxFiles
from jaxdg.data.index import Defect
from jaxdg.data.labels import IGNORE


def of_files(opened: Sequence[OpenedSplit]) -> Table:
    """Images, sizes and broken files of each split."""
    boxes = []
    if any(isinstance(o.dataset, BoxFiles) for o in opened):
        boxes = ["boxes", "difficult", "crowds"]
    heads = ("images", "published", "pixels", "decoded", *boxes, "broken files")
    columns = (Column(name, justify="right") for name in heads)
    table = Table("", *columns, box=SIMPLE, show_edge=False)
    for o in opened:
        sizes, counts = np.unique(o.dataset.pairs.sizes, axis=0, return_counts=True)
        images = len(o.dataset)
        h, w = sizes[counts.argmax()].tolist() if images else (0, 0)
        broken = len({path for path, _ in o.broken})
        box_counts = (o.counts.sum(), *o.flagged) if boxes else ()
        table.add_row(
            Text(o.split.name),
            Text(str(images), style="" if o.split.count in (None, images) else "yellow"),
            "-" if o.split.count is None else str(o.split.count),
            f"{w}x{h}" + (f" and {len(sizes) - 1} others" if len(sizes) > 1 else ""),
            str(len(o.intact)),
            *map(str, box_counts),
            Text(str(broken), style="red" if broken else ""),
        )
    return table


def of_classes(opened: Sequence[OpenedSplit]) -> Table:
    """Shares of pixels, or numbers of boxes, by class and split."""
    labelled = [o for o in opened if isinstance(o.dataset, BoxFiles) or not o.dataset.unlabelled]
    labels = opened[0].dataset.labels
    boxes = isinstance(opened[0].dataset, BoxFiles)
    columns = (Column(Text(o.split.name), justify="right") for o in labelled)
    table = Table("boxes" if boxes else "% of pixels", *columns, box=SIMPLE, show_edge=False)
    rows = list(zip(range(len(labels.names)), labels.names, labels.colors, strict=True))
    if not boxes:
        rows.append((IGNORE, "ignored", (0, 0, 0)))
    for k, name, (r, g, b) in rows:
        cells = []
        for o in labelled:
            share = (
                str(o.counts[k]) if boxes else f"{100 * o.counts[k] / max(1, o.counts.sum()):.2f}"
            )
            cells.append(share if o.counts[k] else "-")
        table.add_row(Text.assemble(("■ ", f"rgb({r},{g},{b})"), name), *cells)
    return table


def list_broken(broken: Iterable[Defect], console: Console) -> None:
    """Prints a line for each defect."""
    for path, text in broken:
        console.print(Text.assemble(("broken: ", "red"), path, text))
