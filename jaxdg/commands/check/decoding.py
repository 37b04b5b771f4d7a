"""Opens splits, decodes their images and labels, and counts the classes."""

from collections.abc import Sequence
import dataclasses
import math

import cv2
from jaxtyping import Int64
import numpy as np
from rich.console import Console
from rich.progress import track
from rich.text import Text

from jaxdg.commands.check.selection import Split, Subject, has_file
from jaxdg.data import class_check
from jaxdg.data.boxes import BoxFiles
from jaxdg.data.class_check import Seen
from jaxdg.data.class_counts import Look, id_classes, look
from jaxdg.data.datasets import Files
from jaxdg.data.images import read_image
from jaxdg.data.index import Defect
from jaxdg.data.labels import IGNORE
from jaxdg.data.workers import read_ahead

SAMPLE = 20  # images of a split that are decoded without --all
IdCounts = tuple[np.ndarray, np.ndarray]  # ids, and how often each occurs


@dataclasses.dataclass
class OpenedSplit:
    """A split that could be opened, and what is known of its files.

    Attributes:
        split: which.
        dataset: its images, broken ones included.
        broken: the defects of its files.
        intact: images that were decoded without a defect.
        with_class: the intact images whose labels show a class.
        counts: pixels by train id, or boxes by class, of the decoded images.
        ids: of the decoded images, pixels by the ids of the label files, or boxes without crowds by
            class.
        flagged: difficult boxes of the decoded images, and boxes around crowds.
    """

    split: Split
    dataset: Files
    broken: list[Defect]
    intact: list[int] = dataclasses.field(default_factory=list)
    with_class: list[int] = dataclasses.field(default_factory=list)
    counts: Int64[np.ndarray, "256"] = dataclasses.field(
        default_factory=lambda: np.zeros(256, np.int64)
    )
    ids: Int64[np.ndarray, "65536"] = dataclasses.field(
        default_factory=lambda: np.zeros(65536, np.int64)
    )
    flagged: Int64[np.ndarray, "2"] = dataclasses.field(
        default_factory=lambda: np.zeros(2, np.int64)
    )

    def not_broken(self) -> list[int]:
        """The images whose files have no known defect."""
        broken = {path for path, _ in self.broken}
        pairs = zip(self.dataset.pairs.images, self.dataset.pairs.labels, strict=True)
        return [i for i, pair in enumerate(pairs) if broken.isdisjoint(pair)]


def open_splits(
    subject: Subject, console: Console
) -> tuple[list[OpenedSplit], list[Defect], list[str]]:
    """Pairs the files of a dataset.

    Returns:
        The splits that could be opened, the defects that are of no single file, and warnings.
    """
    opened: list[OpenedSplit] = []
    broken: list[Defect] = []
    missing: list[tuple[Split, str]] = []
    with console.status(Text(f"{subject.name}: pairing files")):
        for split in subject.splits:
            defects: list[Defect] = []
            try:
                opened.append(OpenedSplit(split, split.open(defects=defects), defects))
            except FileNotFoundError as error:
                missing.append((split, str(error)))
            except (ValueError, OSError) as error:
                broken += [*defects, Defect("", str(error))]
    warnings = [
        f"{o.split.name} has {len(o.dataset)} images, published are {o.split.count}"
        for o in opened
        if o.split.count not in (None, len(o.dataset))
    ]
    for split, text in missing:
        # A user may have left a split out, but only as a whole.
        if opened and not any(has_file(subject.folder, images) for images in split.images):
            warnings.append(f"{split.name} is missing: {text}")
        else:
            broken.append(Defect("", text))
    return opened, broken, warnings


def decode(
    name: str, opened: Sequence[OpenedSplit], everything: bool, workers: int, console: Console
) -> None:
    """Decodes images that have no known defect, and adds the findings to their splits."""
    items: list[tuple[int, int]] = []
    for k, o in enumerate(opened):
        images = o.not_broken()
        items += [(k, i) for i in (images if everything else evenly_spaced(images, SAMPLE))]
    if not items:
        return
    decoder = _Decoder([o.dataset for o in opened], items)
    results = read_ahead(decoder, len(items), workers)
    results = track(
        results, name, len(items), console=console, transient=True, disable=not console.is_terminal
    )
    for (k, i), (counts, (ids, id_counts), flagged, defects) in zip(items, results, strict=True):
        o = opened[k]
        o.counts += counts
        o.flagged += flagged
        o.ids[ids] += id_counts
        o.broken += defects
        if not defects:
            o.intact.append(i)
            if counts[:IGNORE].any():
                o.with_class.append(i)


@dataclasses.dataclass
class _Decoder:
    """Decodes an image and its label; a class, so that worker processes can import it by name."""

    datasets: list[Files]
    items: list[tuple[int, int]]

    def __call__(
        self, j: int
    ) -> tuple[Int64[np.ndarray, "256"], IdCounts, Int64[np.ndarray, "2"], list[Defect]]:
        k, i = self.items[j]
        dataset = self.datasets[k]
        counts = np.zeros(256, np.int64)
        ids = (np.zeros(0, np.int64), np.zeros(0, np.int64))
        flagged = np.zeros(2, np.int64)
        defects = []
        image = dataset.name(i)
        try:
            read_image(image)
        except (ValueError, cv2.error) as error:
            defects.append(_defect(image, error))
        try:
            counts, ids, flagged = _label_counts(dataset, i)
        except (ValueError, cv2.error) as error:
            defects.append(_defect(dataset.pairs.labels[i] or image, error))
        return counts, ids, flagged, defects


def _label_counts(
    dataset: Files, i: int
) -> tuple[Int64[np.ndarray, "256"], IdCounts, Int64[np.ndarray, "2"]]:
    """What the label of image `i` adds to `counts`, `ids` and `flagged` of an `OpenedSplit`."""
    if isinstance(dataset, BoxFiles):
        truth = dataset.boxes(i)
        counts = np.bincount(truth["classes"], minlength=256)
        flagged = np.array([np.count_nonzero(truth[key]) for key in ("difficult", "crowd")])
        return counts, np.unique(truth["classes"][~truth["crowd"]], return_counts=True), flagged
    ids, id_counts = dataset.ids(i)
    classes = id_classes(dataset)[ids]
    if (classes < 0).any():
        dataset.label(i)  # raises the error that names the ids and the file
    counts = np.zeros(256, np.int64)
    np.add.at(counts, classes, id_counts)
    return counts, (ids, id_counts), np.zeros(2, np.int64)


def seen_classes(subject: Subject, opened: Sequence[OpenedSplit], console: Console) -> list[Seen]:
    """The classes that the labels of each split show.

    More labels are read where a class was not seen, and all of them where that decides whether the
    split is broken.
    """
    decoded = [o for o in opened if o.intact]
    shown = []
    for o in decoded:
        ids = np.flatnonzero(o.ids)
        shown.append(Seen(o.dataset, Look(len(o.intact), ids, o.ids[ids]), o.split.name))
    if not shown:
        return []
    # One published split may have a class that another lacks.
    every_split = subject.own or not class_check.union(shown).all()
    with console.status(Text(f"{subject.name}: looking for classes")):
        return [
            _read_more(o, one, len(shown))
            if (not one.classes.all() if every_split else class_check.fault([one]) is not None)
            else one
            for o, one in zip(decoded, shown, strict=True)
        ]


def _read_more(o: OpenedSplit, shown: Seen, splits: int) -> Seen:
    """What more labels show; all labels of a split are read if it still lacks classes."""
    images = o.not_broken()
    if shown.look is None or shown.look.images >= len(images):
        return shown
    seconds = class_check.SECONDS / splits
    seen = look(o.dataset, most=class_check.MOST, seconds=seconds, images=images, defects=o.broken)
    shown = dataclasses.replace(shown, look=seen)
    if class_check.fault([shown]) and seen.images < len(images):
        most = len(images)
        seen = look(o.dataset, most=most, seconds=math.inf, images=images, defects=o.broken)
        shown = dataclasses.replace(shown, look=seen)
    if seen.odd >= 0:
        try:
            o.dataset.label(seen.odd)
        except ValueError as error:  # names the ids
            o.broken.append(_defect(o.dataset.pairs.labels[seen.odd], error))
    return shown


def _defect(path: str, error: Exception) -> Defect:
    text = str(error) if str(error).startswith(path) else f"{path}: {type(error).__name__}: {error}"
    return Defect(path, " ".join(text.removeprefix(path).split("; ")[0].split("\n")))


def evenly_spaced(items: list[int], count: int) -> list[int]:
    """At most `count` of the items, the first and the last among them."""
    if not items:
        return []
    return [items[i] for i in sorted({round(i) for i in np.linspace(0, len(items) - 1, count)})]
