"""Looks at datasets as downloaded: what is there, what is missing, what is broken, and what the
labels show.

python -m jaxdg.data.check --data_root data
python -m jaxdg.data.check --data_root data --all --write_skip_list skip.txt gta5 acdc/night

Files are paired and their headers and ends read, as at the start of training, and then images and
labels are decoded: some of every split, or with --all every one. What is broken is listed with its
path, all of it, and makes the exit code 1. A split that is not there, or has another number of
images than its publisher states, is a warning. Records are compared with the digests taken when
they were written. A contact sheet of every dataset shows what breaks no rule, such as labels read
by the wrong table.
"""

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
import dataclasses
import functools
import glob
import itertools
import json
import math
import os
from pathlib import Path
import re
import sys
from typing import Any

from absl import flags
import cv2
import grain
from jaxtyping import Int64, UInt8
import numpy as np
from PIL import Image, ImageDraw, ImageFont, PngImagePlugin
from rich.box import SIMPLE
from rich.console import Console
from rich.progress import track
from rich.table import Column, Table
from rich.text import Text

from jaxdg.data import class_check, published, records, storage
from jaxdg.data.boxes import COUNTS, BoxFiles, BoxOptions, open_box_files
from jaxdg.data.class_check import Shown
from jaxdg.data.class_counts import Look, look
from jaxdg.data.datasets import Files, FolderOptions
from jaxdg.data.domains import open_files
from jaxdg.data.images import read_image
from jaxdg.data.index import Defect
from jaxdg.data.labels import IGNORE
from jaxdg.data.skip import HEADER
from jaxdg.data.tree import Tree
from jaxdg.data.workers import read_ahead
from jaxdg.drawing.overlays import box_overlay, overlay
from jaxdg.drawing.palettes import BACKGROUND, TEXT
from jaxdg.drawing.panels import grid
from jaxdg.evaluation.overlap import Images

SOFTWARE = "jaxdg.data.check"  # which contact sheets say they were written by
SAMPLE = 20  # images of a split that are decoded without --all
SHOWN = 3
TILE = (
    480  # images of a split on a contact sheet, and their width in pixels if theirs is not smaller
)

# Datasets with boxes alone: their folders and domains.
BOX_FOLDERS = {
    "diverse_weather": (
        "daytime_clear",
        "night_sunny",
        "dusk_rainy",
        "night_rainy",
        "daytime_foggy",
    ),
    "carla_towns": ("carla", "town05"),
}
# Datasets with label maps that have boxes too where there are such files: a folder, and the end of
# their names.
BOX_LABELS = {
    "cityscapes": ("gtFine", "_instanceIds.png"),
    "bdd100k": ("labels/ins_seg", ".png"),
    "synthia": ("GT/LABELS", ".png"),
    "acdc": ("gt_detection", ".json"),
}


@dataclasses.dataclass(frozen=True)
class Split:
    """Images that are checked together.

    Attributes:
        name: for people.
        open: opens them as `open_files` does; takes its `defects`.
        count: number of images that the publisher states, if one does.
        images: image folders below that of the dataset; () if it may have one of several names.
    """

    name: str
    open: Callable[..., Files]
    count: int | None = None
    images: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class Subject:
    """A dataset to check.

    Attributes:
        name: for people; with `boxes` behind it where label maps have the name.
        folder: where its files are.
        splits: what it consists of.
        own: described by the configuration and not published.
        judged_only: no source of the configuration, so that it may lack classes.
    """

    name: str
    folder: str
    splits: tuple[Split, ...]
    own: bool = False
    judged_only: bool = False


@dataclasses.dataclass
class Opened:
    """A split that could be opened.

    Attributes:
        split: which.
        dataset: its images, broken ones included.
        broken: what is wrong with files.
        intact: images that were decoded and have nothing wrong.
        telling: those of them that show a class.
        counts: pixels by train id, or boxes by class, of the images that were decoded.
        ids: pixels by the ids of the label files, or boxes without crowds by class, of the same
            images.
        flagged: boxes of the same images that are difficult, and those around crowds.
    """

    split: Split
    dataset: Files
    broken: list[Defect]
    intact: list[int] = dataclasses.field(default_factory=list)
    telling: list[int] = dataclasses.field(default_factory=list)
    counts: Int64[np.ndarray, "256"] = dataclasses.field(
        default_factory=lambda: np.zeros(256, np.int64)
    )
    ids: Int64[np.ndarray, "65536"] = dataclasses.field(
        default_factory=lambda: np.zeros(65536, np.int64)
    )
    flagged: Int64[np.ndarray, "2"] = dataclasses.field(
        default_factory=lambda: np.zeros(2, np.int64)
    )


def subjects(
    names: Sequence[str],
    *,
    root: str,
    folder: FolderOptions | None = None,
    boxes: BoxOptions | None = None,
    mapillary_labels: str = "vltseg",
    recorded: Collection[str] = (),
    judged_only: Collection[str] = (),
) -> list[Subject]:
    """What there is to check.

    Args:
        names: of datasets and domains, or of what `folder` and `boxes` describe.
        root: data root.
        folder: as for `open_files`.
        boxes: as `own` for `open_boxes`.
        mapillary_labels: as for `open_files`.
        recorded: domains of which there are records, so that the files need not be there.
        judged_only: domains of one's own that no run trains on.

    Raises:
        ValueError: an unknown name.
    """
    found: list[Subject] = []
    for name in names:
        mine = (
            _published(name, root, mapillary_labels)
            or _voc(name, root)
            or _own(name, root, folder, boxes, name in judged_only)
        )
        if any(f"{domain}/".startswith(f"{name}/") for domain in recorded):
            mine = [
                s
                for s in mine
                if any(
                    os.path.isdir(s.folder) and all(_holds(s.folder, i) for i in t.images)
                    for t in s.splits
                )
            ]
        elif not mine:
            known = ", ".join((*published.PUBLISHED, *BOX_FOLDERS))
            raise ValueError(
                f"unknown dataset {name!r}; known are {known} and their domains; for others give"
                " --config with data.folder or data.boxes"
            )
        found += mine
    return found


def _there(root: str) -> tuple[list[str], list[str]]:
    """The known datasets that have a folder below the data root, even if it is spelt otherwise; and
    folders of nothing known.
    """

    def plain(name):
        return re.sub(r"\W|_", "", name).lower()

    folders = storage.subfolders(root)
    known = {plain(name): name for name in (*published.PUBLISHED, *BOX_FOLDERS)}
    mine = {known[plain(folder)] for folder in folders if plain(folder) in known}
    # Of a dataset whose folder is there by its own name, no other spelling is read.
    others = [
        folder
        for folder in folders
        if plain(folder) not in known
        or (folder != known[plain(folder)] and known[plain(folder)] in folders)
    ]
    return [name for name in known.values() if name in mine], others


def _published(name: str, root: str, mapillary_labels: str) -> list[Subject]:
    dataset = published.find(name)
    if dataset is None:
        return []
    base = os.path.join(root, dataset.name)
    domain, split = (name, "") if name in dataset.domains else os.path.split(name)
    parts: dict[tuple[str, str], list[published.Part]] = {}
    for part in dataset.parts:
        mine = domain == dataset.name or f"{part.domain}/".startswith(f"{domain}/")
        if mine and (
            part.split == split if split else not part.listed
        ):  # what a list of GTA5 names is in `all` too
            parts.setdefault((part.domain, part.split), []).append(part)
    label_maps = []
    things = []
    for (d, s), these in parts.items():
        stated = sum(part.count for part in these), tuple(part.images for part in these)
        opening = functools.partial(
            open_files,
            f"{d}/{s}",
            root=root,
            train=False,
            folder=None,
            mapillary_labels=mapillary_labels,
        )
        label_maps.append(Split(f"{d}/{s}", opening, *stated))
        if s != "test":
            things.append(
                Split(
                    f"{d}/{s}",
                    functools.partial(open_box_files, d, root=root, train=s != "val"),
                    *stated,
                )
            )
    found = [Subject(name, base, tuple(label_maps))]
    if things and dataset.name in BOX_LABELS and _holds(base, *BOX_LABELS[dataset.name]):
        found.append(Subject(f"{name} boxes", base, tuple(things)))
    return found


def _voc(name: str, root: str) -> list[Subject]:
    for folder, domains in BOX_FOLDERS.items():
        splits = [
            Split(
                f"{d}/{'train' if train else 'val'}",
                functools.partial(open_box_files, d, root=root, train=train),
                count,
            )
            for (d, train), count in COUNTS.items()
            if d in domains and name in (folder, d)
        ]
        if splits:
            return [Subject(name, os.path.join(root, folder), tuple(splits))]
    return []


def _own(
    name: str, root: str, folder: FolderOptions | None, boxes: BoxOptions | None, judged_only: bool
) -> list[Subject]:
    def subject(title: str, opening: Callable[..., Files], splits: tuple[str, ...]) -> Subject:
        opened = tuple(
            Split(f"{name}/{s}", functools.partial(opening, train=s != "val")) for s in splits
        )
        return Subject(title, root, opened, own=True, judged_only=judged_only)

    found = []
    if folder:
        splits = ("train", "val") if "{split}" in folder.images + folder.labels else ("all",)
        found.append(
            subject(name, functools.partial(open_files, name, root=root, folder=folder), splits)
        )
    if boxes:
        splits = (
            ("train", "val")
            if any(a != b for a, b in (boxes.images, boxes.annotations, boxes.lists))
            else ("all",)
        )
        found.append(
            subject(
                f"{name} boxes",
                functools.partial(open_box_files, name, root=root, own=boxes),
                splits,
            )
        )
    return found


def _holds(base: str, folder: str, suffix: str = "") -> bool:
    """Whether a folder below that of a dataset has such files."""
    try:
        return any(name.endswith(suffix) for name in Tree(base).files(folder))
    except (FileNotFoundError, ValueError):
        return False


def check(
    subject: Subject,
    *,
    everything: bool,
    workers: int,
    console: Console,
    out: Path,
    splits: dict[str, Files],
) -> tuple[list[Defect], list[str]]:
    """Checks a dataset and prints what it finds.

    Args:
        subject: the dataset.
        everything: decode every image instead of `SAMPLE` a split.
        workers: processes that decode; 0 for threads of this process.
        console: where to print.
        out: folder for the contact sheet.
        splits: receives every split that could be opened, by its name.

    Returns:
        What is broken, each thing once, without a path where it is no single file; and the
        warnings.
    """
    opened, broken, warnings = _open(subject, console)
    splits.update({o.split.name: o.dataset for o in opened})
    _decode(subject.name, opened, everything, workers, console)
    shown = _shown(subject, opened, console)
    lacking, lines = (
        class_check.findings(shown, own=subject.own, judged_only=subject.judged_only)
        if shown
        else ([], [])
    )
    warnings += [line for line, is_warning in lines if is_warning]
    warnings += [
        f"all {o.flagged[0]} boxes in {len(o.intact)} images of {o.split.name} are difficult, of"
        " which VOC's AP counts none"
        for o in opened
        if 0 < o.counts.sum() == o.flagged[0]
    ]
    broken = list(
        dict.fromkeys(
            [
                *broken,
                *(defect for o in opened for defect in o.broken),
                *(Defect("", line) for line in lacking),
            ]
        )
    )
    console.print(Text.assemble((subject.name, "bold"), f"  {subject.folder}"))
    if opened:
        console.print(_table(opened))
        console.print()
    if any(o.counts.any() for o in opened):
        console.print(_histogram(opened))
        console.print()
    for one in shown if subject.own else ():
        console.print(Text(class_check.ids_seen(one)))
    if any(o.intact for o in opened):
        rows = [(o.split.name, o.dataset, _spread(o.telling or o.intact, SHOWN)) for o in opened]
        console.print(
            Text(
                save_sheet(
                    out / (re.sub(r"[^\w-]", "_", subject.name) + ".png"), contact_sheet(rows)
                )
            )
        )
    for note in dict.fromkeys(note for o in opened for note in o.dataset.pairs.notes):
        console.print(Text(note))
    for line in (line for line, is_warning in lines if not is_warning):
        console.print(Text(line))
    for warning in warnings:
        console.print(Text.assemble(("warning: ", "yellow"), warning))
    _list_broken(broken, console)
    console.print()
    return broken, warnings


def shared_images(splits: Mapping[str, Files], root: str) -> list[str]:
    """What to say of splits that hold the same images, told by their places and by what the files
    hold.

    Args:
        splits: what was opened, by name.
        root: data root.
    """
    images = {name: Images.of(dataset, root) for name, dataset in splits.items()}
    lines = []
    for one, other in itertools.combinations(images, 2):
        if count := int(images[one].among(images[other]).sum()):
            lines.append(
                f"{count} of the {len(images[one])} images of {one} are images of {other}; a model"
                " that is trained on one of the two has seen the other"
            )
    return lines


def _list_broken(broken: Iterable[Defect], console: Console) -> None:
    for path, text in broken:
        console.print(Text.assemble(("broken: ", "red"), path, text))


def _open(subject: Subject, console: Console) -> tuple[list[Opened], list[Defect], list[str]]:
    """Pairs the files; also what is broken but no single file, and the warnings."""
    opened: list[Opened] = []
    broken: list[Defect] = []
    lost: list[tuple[Split, str]] = []
    with console.status(Text(f"{subject.name}: pairing files")):
        for split in subject.splits:
            defects: list[Defect] = []
            try:
                opened.append(Opened(split, split.open(defects=defects), defects))
            except FileNotFoundError as error:
                lost.append((split, str(error)))
            except (ValueError, OSError) as error:
                broken += [*defects, Defect("", str(error))]
    warnings = [
        f"{o.split.name} has {len(o.dataset)} images, published are {o.split.count}"
        for o in opened
        if o.split.count not in (None, len(o.dataset))
    ]
    for split, text in lost:
        # A split may be left out by choice, but then as a whole.
        if opened and not any(_holds(subject.folder, images) for images in split.images):
            warnings.append(f"{split.name} is missing: {text}")
        else:
            broken.append(Defect("", text))
    return opened, broken, warnings


def _decode(
    name: str, opened: Sequence[Opened], everything: bool, workers: int, console: Console
) -> None:
    """Decodes what nothing is known to be wrong with, and adds to what is known."""
    items: list[tuple[int, int]] = []
    for k, o in enumerate(opened):
        rest = _whole(o)
        items += [(k, i) for i in (rest if everything else _spread(rest, SAMPLE))]
    if not items:
        return
    looks = read_ahead(
        grain.MapDataset.range(len(items)).map(_Look([o.dataset for o in opened], items)), workers
    )
    looks = track(
        looks, name, len(items), console=console, transient=True, disable=not console.is_terminal
    )
    for (k, i), (counts, (ids, found), flagged, wrong) in zip(items, looks, strict=True):
        opened[k].counts += counts
        opened[k].flagged += flagged
        opened[k].ids[ids] += found
        opened[k].broken += wrong
        opened[k].intact += [] if wrong else [i]
        opened[k].telling += [i] if counts[:IGNORE].any() and not wrong else []


@dataclasses.dataclass
class _Look:
    """Decodes an image and what is known about it; a class and not a closure, so that it reaches
    worker processes by name.
    """

    datasets: list[Files]
    items: list[tuple[int, int]]

    def __call__(
        self, j: int
    ) -> tuple[
        Int64[np.ndarray, "256"],
        tuple[np.ndarray, np.ndarray],
        Int64[np.ndarray, "2"],
        list[Defect],
    ]:
        k, i = self.items[j]
        dataset = self.datasets[k]
        counts = np.zeros(256, np.int64)
        wrong = []
        ids = (np.zeros(0, np.int64), np.zeros(0, np.int64))
        flagged = np.zeros(2, np.int64)
        image = dataset.name(i)
        label = dataset.pairs.labels[i] or dataset.name(i)
        try:
            read_image(image)
        except (ValueError, cv2.error) as error:
            wrong.append(_defect(image, error))
        try:
            counts, ids, flagged = _truth(dataset, i)
        except (ValueError, cv2.error) as error:
            wrong.append(_defect(label, error))
        return counts, ids, flagged, wrong


def _truth(
    dataset: Files, i: int
) -> tuple[Int64[np.ndarray, "256"], tuple[np.ndarray, np.ndarray], Int64[np.ndarray, "2"]]:
    """Of the label of image `i` what `Opened.counts`, `ids` and `flagged` say, the second as ids
    and the count of each.
    """
    if isinstance(dataset, BoxFiles):
        truth = dataset.boxes(i)
        counts = np.bincount(truth["classes"], minlength=256)
        flagged = np.array([np.count_nonzero(truth[key]) for key in ("difficult", "crowd")])
        return counts, np.unique(truth["classes"][~truth["crowd"]], return_counts=True), flagged
    ids, found = dataset.ids(i)
    classes = dataset.table[ids]
    if (classes < 0).any():
        dataset.label(i)  # the error that says which ids, and where
    counts = np.zeros(256, np.int64)
    np.add.at(counts, classes, found)
    return counts, (ids, found), np.zeros(2, np.int64)


def _shown(subject: Subject, opened: Sequence[Opened], console: Console) -> list[Shown]:
    """What the labels of the splits show; looks at more of them where a class was not seen, and at
    all where nothing else will tell.
    """
    decoded = [o for o in opened if o.intact]
    shown = []
    for o in decoded:
        ids = np.flatnonzero(o.ids)
        shown.append(Shown(o.dataset, Look(len(o.intact), ids, o.ids[ids]), o.split.name))
    if not shown:
        return []
    each = (
        subject.own or not class_check.union(shown).all()
    )  # what one published split lacks another may have
    doubtful = [
        not one.classes.all() if each else class_check.fault([one]) is not None for one in shown
    ]
    with console.status(Text(f"{subject.name}: looking for classes")):
        return [
            _look_further(o, one, len(shown)) if doubt else one
            for o, one, doubt in zip(decoded, shown, doubtful, strict=True)
        ]


def _look_further(o: Opened, shown: Shown, parts: int) -> Shown:
    """What more labels show, as before training; a split with too few classes is read to its end."""
    rest = _whole(o)
    if shown.look is None or shown.look.images >= len(rest):
        return shown
    seconds = class_check.SECONDS / parts
    further = look(o.dataset, most=class_check.MOST, seconds=seconds, images=rest, defects=o.broken)
    found = dataclasses.replace(shown, look=further)
    if class_check.fault([found]) and further.images < len(rest):
        found = dataclasses.replace(
            shown,
            look=look(o.dataset, most=len(rest), seconds=math.inf, images=rest, defects=o.broken),
        )
    if found.look is not None and found.look.odd >= 0:
        try:
            o.dataset.label(found.look.odd)
        except ValueError as error:  # says which ids
            o.broken.append(_defect(o.dataset.pairs.labels[found.look.odd], error))
    return found


def _whole(o: Opened) -> list[int]:
    """Images with whose files nothing is known to be wrong."""
    broken = {path for path, _ in o.broken}
    return [
        i
        for i, pair in enumerate(zip(o.dataset.pairs.images, o.dataset.pairs.labels, strict=True))
        if broken.isdisjoint(pair)
    ]


def _defect(path: str, error: Exception) -> Defect:
    text = str(error) if str(error).startswith(path) else f"{path}: {type(error).__name__}: {error}"
    return Defect(path, " ".join(text.removeprefix(path).split("; ")[0].split("\n")))


def _spread(items: list[int], count: int) -> list[int]:
    """So many of the items, from the first to the last."""
    return (
        [items[i] for i in sorted({round(i) for i in np.linspace(0, len(items) - 1, count)})]
        if items
        else []
    )


def _table(opened: Iterable[Opened]) -> Table:
    opened = list(opened)
    boxes = (
        ("boxes", "difficult", "crowds")
        if any(isinstance(o.dataset, BoxFiles) for o in opened)
        else ()
    )
    table = Table(
        *(
            Column(name, justify="right")
            for name in ("", "images", "published", "pixels", "decoded", *boxes, "broken files")
        ),
        box=SIMPLE,
        show_edge=False,
    )
    table.columns[0].justify = "left"
    for o in opened:
        sizes, counts = np.unique(o.dataset.pairs.sizes, axis=0, return_counts=True)
        found = len(o.dataset)
        h, w = sizes[counts.argmax()].tolist() if found else (0, 0)
        pixels = f"{w}x{h}" + (f" and {len(sizes) - 1} others" if len(sizes) > 1 else "")
        images = Text(str(found), style="" if o.split.count in (None, found) else "yellow")
        broken = len({path for path, _ in o.broken})
        stated = "-" if o.split.count is None else str(o.split.count)
        seen = (str(n) for n in (o.counts.sum(), *o.flagged)[: len(boxes)])
        last = Text(str(broken), style="red" if broken else "")
        table.add_row(Text(o.split.name), images, stated, pixels, str(len(o.intact)), *seen, last)
    return table


def _histogram(opened: Sequence[Opened]) -> Table:
    """Shares of pixels, or numbers of boxes, by class and split."""
    labelled = [o for o in opened if isinstance(o.dataset, BoxFiles) or any(o.dataset.pairs.labels)]
    labels = opened[0].dataset.labels
    boxes = isinstance(opened[0].dataset, BoxFiles)
    table = Table(
        "boxes" if boxes else "% of pixels",
        *(Column(Text(o.split.name), justify="right") for o in labelled),
        box=SIMPLE,
        show_edge=False,
    )
    rows = list(zip(range(len(labels.names)), labels.names, labels.colors, strict=True))
    for k, name, color in rows if boxes else [*rows, (IGNORE, "ignored", (0, 0, 0))]:
        cells = [
            str(o.counts[k]) if boxes else f"{100 * o.counts[k] / max(1, o.counts.sum()):.2f}"
            for o in labelled
        ]
        swatch = ("■ ", f"rgb({color[0]},{color[1]},{color[2]})")
        table.add_row(
            Text.assemble(swatch, name),
            *(cell if o.counts[k] else "-" for o, cell in zip(labelled, cells, strict=True)),
        )
    return table


def save_sheet(file: Path, sheet: UInt8[np.ndarray, "h w 3"]) -> str:
    """Saves a contact sheet, unless it would replace another picture; returns a line about it."""
    file.parent.mkdir(parents=True, exist_ok=True)
    if file.exists() and _software(file) != SOFTWARE:
        return (
            f"contact sheet not written: {file} is there and is none that this command wrote; move"
            " it, or give another --out"
        )
    mark = PngImagePlugin.PngInfo()
    mark.add_text("Software", SOFTWARE)
    partial = file.with_name(f".{file.name}.partial")
    Image.fromarray(sheet).save(partial, "PNG", pnginfo=mark)
    os.replace(partial, file)
    return f"contact sheet: {file}"


def _software(file: Path) -> str | None:
    """What a picture says it was written by."""
    try:
        with Image.open(file) as picture:
            return picture.info.get("Software")
    except OSError:
        return None


def contact_sheet(rows: Iterable[tuple[str, Files, list[int]]]) -> UInt8[np.ndarray, "h w 3"]:
    """Images with their label maps or boxes drawn over them, and a legend each.

    Args:
        rows: name of a split, its dataset, and what to show of it.

    Returns:
        RGB, one row a split.
    """
    return grid(
        [_join([_tile(name, dataset, i) for i in shown]) for name, dataset, shown in rows if shown]
    )


def _tile(name: str, dataset: Files, i: int) -> UInt8[np.ndarray, "h w 3"]:
    sample = dataset[i]
    labels = dataset.labels
    scale = min(1.0, TILE / sample["image"].shape[1])
    size = (
        TILE if scale < 1 else sample["image"].shape[1],
        max(1, round(sample["image"].shape[0] * scale)),
    )
    image = np.asarray(cv2.resize(sample["image"], size, interpolation=cv2.INTER_AREA), np.uint8)
    if "boxes" in sample:
        picture = box_overlay(
            image, sample["boxes"] * scale, sample["classes"], labels.colors, labels.names
        )
    else:
        label = np.asarray(
            cv2.resize(sample["label"], size, interpolation=cv2.INTER_NEAREST), np.uint8
        )
        picture = overlay(image, label, labels.colors, labels.names)
    caption = Image.new("RGB", (picture.shape[1], 26), BACKGROUND)
    text = f"{name}  {os.path.basename(dataset.name(i))}"
    ImageDraw.Draw(caption).text(
        (2, 13), text, font=ImageFont.load_default(13), fill=TEXT, anchor="lm"
    )
    return np.concatenate([np.asarray(caption), picture])


def _join(tiles: Sequence[UInt8[np.ndarray, "_ _ 3"]], gap: int = 12) -> UInt8[np.ndarray, "h w 3"]:
    """Pictures side by side, their upper edges in line."""
    heights = [tile.shape[0] for tile in tiles]
    widths = [tile.shape[1] for tile in tiles]
    canvas = np.full((max(heights), sum(widths) + gap * (len(tiles) - 1), 3), BACKGROUND, np.uint8)
    for k, tile in enumerate(tiles):
        left = sum(widths[:k]) + gap * k
        canvas[: heights[k], left : left + widths[k]] = tile
    return canvas


def check_records(
    names: Sequence[str], root: str, console: Console, everything: bool = False
) -> dict[str, list[Defect]]:
    """Verifies the records below a data root and prints what it finds.

    Args:
        names: of datasets and domains; none for all.
        root: data root.
        console: where to print.
        everything: look at every label, also where all classes were seen.

    Returns:
        What is broken in the records of each domain that has some.
    """
    markers = (records.COMPLETE, records.UNFINISHED)
    depths = ("*", "*/*")
    paths = [
        p
        for depth in depths
        for marker in markers
        for p in glob.glob(f"{glob.escape(root)}/{depth}/{records.VERSION}/{marker}")
    ]
    found: dict[str, list[Defect]] = {}
    for directory in sorted({os.path.dirname(path) for path in paths}):
        domain = os.path.relpath(os.path.dirname(directory), root)
        if names and not domain.startswith(tuple(names)):
            continue
        try:
            found[domain] = [Defect("", wrong) for wrong in records.verify(directory)]
        except (ValueError, OSError) as error:
            found[domain] = [Defect("", str(error))]
        console.print(
            Text.assemble(
                (f"records of {domain}", "bold"),
                f"  {directory}: {'broken' if found[domain] else 'whole'}",
            )
        )
        if not found[domain]:
            found[domain] += _classes_of_records(directory, domain, everything, console)
        _list_broken(found[domain], console)
        console.print()
    return found


def _classes_of_records(
    directory: str, domain: str, everything: bool, console: Console
) -> list[Defect]:
    """What is wrong with the classes that whole records show; prints what else there is to say."""
    metadata = json.loads(Path(directory, records.METADATA).read_text(encoding="utf-8"))
    if "classes" not in metadata:
        return []  # not written by `prepare`, which training says
    shown = []
    for split in dict.fromkeys(metadata["splits"].values()):
        dataset = records.Records(directory, split)
        most, seconds = (
            (len(dataset), math.inf) if everything else (class_check.MOST, class_check.SECONDS)
        )
        shown.append(Shown(dataset, look(dataset, most=most, seconds=seconds), f"{domain}/{split}"))
    broken, lines = class_check.findings(shown, own=published.find(domain) is None)
    for line, is_warning in lines:
        console.print(Text.assemble(("warning: ", "yellow") if is_warning else "", line))
    return [Defect("", line) for line in broken]


def _is_replaceable(file: Path) -> bool:
    """Whether a file is a list that `write_skip_list` wrote, or empty."""
    content = file.read_bytes() if file.is_file() else None
    return content is not None and content.startswith(HEADER.encode()[: len(content)])


def write_skip_list(file: Path, broken: Iterable[Defect], root: str) -> int:
    """Writes the broken files as `data.skip` reads them, each below what is wrong with it.

    Args:
        file: is replaced if it is such a list.
        broken: what `check` returns; that which is no single image or annotation cannot be left
            out.
        root: data root.

    Returns:
        Number of files.
    """
    reasons: dict[str, list[str]] = {}
    for path, text in broken:
        if path and not path.lower().endswith(
            (".txt", ".json")
        ):  # lists of images and COCO's files hold many images
            line = os.path.relpath(path, root)
            line = f"./{line}" if line.startswith("#") else line  # or it would be a comment
            reasons.setdefault(line, []).append(f"# {' '.join(text.lstrip(':').split())}\n")
    file.parent.mkdir(parents=True, exist_ok=True)
    lines = (line for path, why in reasons.items() for line in (*why, f"{path}\n"))
    file.write_text("".join((HEADER, *lines)), encoding="utf-8", errors="surrogateescape")
    return len(reasons)


def main(
    names: Sequence[str],
    *,
    root: str,
    out: Path,
    everything: bool,
    workers: int,
    skip_list: Path | None,
    console: Console,
    **options: Any,
) -> bool:
    """The command; see the flags below.

    Returns:
        Whether nothing is broken.
    """
    if not os.path.isdir(root):
        raise FileNotFoundError(
            f"data root {os.path.abspath(root)} does not exist; set JAXDG_DATA or --data_root"
        )
    if skip_list and skip_list.exists() and not _is_replaceable(skip_list):
        raise ValueError(
            f"{skip_list} is there and is no list that --write_skip_list wrote; move it, or name"
            " another file"
        )
    root = os.path.normpath(root)
    if not console.is_terminal:
        console.width = 240  # nobody reads it as it is printed: nothing is cut off
    recorded = check_records(names, root, console, everything)
    there, others = _there(root)
    everyone = subjects(names or there, root=root, recorded=recorded, **options)
    if not everyone and not recorded:
        known = ", ".join((*published.PUBLISHED, *BOX_FOLDERS))
        raise FileNotFoundError(
            f"{os.path.abspath(root)} has no folder of a known dataset ({known}), only"
            f" {', '.join(others) or 'none'}"
        )
    broken = [defect for defects in recorded.values() for defect in defects]
    warnings: list[str] = []
    splits: dict[str, Files] = {}
    for subject in everyone:
        found = check(
            subject, everything=everything, workers=workers, console=console, out=out, splits=splits
        )
        broken += found[0]
        warnings += found[1]
    for line in shared_images(splits, root):
        console.print(Text.assemble(("warning: ", "yellow"), line))
        warnings.append(line)
    if not names and (
        others := [
            folder for folder in others if not any(d.split("/")[0] == folder for d in recorded)
        ]
    ):
        console.print(
            Text(f"not checked, as these are folders of no known dataset: {', '.join(others)}")
        )
    if skip_list:
        count = write_skip_list(skip_list, broken, root)
        console.print(
            Text(
                f"{skip_list} lists {count} files to leave out; train with"
                f" --config.data.skip={skip_list}"
            )
        )
    decoded = "every file was" if everything else f"up to {SAMPLE} images a split were"
    summary = (
        f"{len(broken)} broken, {len(warnings)} warning{'s' * (len(warnings) != 1)}; {decoded}"
        " decoded"
    )
    console.print(Text(summary, style="red" if broken else "green"))
    return not broken


if __name__ == "__main__":
    from jaxdg.commands import (
        check as this,
    )  # by this name worker processes find what they run, not by __main__
    from jaxdg.commands import command_line as cli
    from jaxdg.config.data import DataConfig

    _ROOT = cli.define_path(
        "data_root", "Folder of the datasets; $JAXDG_DATA, else `data`, if left out."
    )
    _ALL = flags.DEFINE_bool(
        "all", False, f"Decode every image and label instead of {SAMPLE} a split."
    )
    _OUT = cli.define_path("out", "Folder for the contact sheets.", default="check")
    _WORKERS = flags.DEFINE_integer(
        "workers",
        None,
        "Processes that decode, 0 for threads; all cores with --all if left out.",
        lower_bound=0,
    )
    _SKIP = cli.define_path(
        "write_skip_list",
        "File to write the broken files to, as the configuration's data.skip reads it.",
    )
    _CONFIG = cli.define_config()  # for data.folder, data.boxes and data.mapillary_labels
    flags.declare_key_flag("config")

    def _judged_only() -> frozenset[str]:
        """The domains of the configuration that it does not train on."""
        config = _CONFIG.value
        return (
            frozenset(config.evaluation.domains) - set(config.data.source.split("+"))
            if config
            else frozenset()
        )

    def _main(arguments: list[str]) -> None:
        data = _CONFIG.value.data if _CONFIG.value else DataConfig()
        whole = this.main(
            arguments[1:],
            root=_ROOT.value or data.root,
            out=Path(_OUT.value),
            everything=_ALL.value,
            workers=(
                _WORKERS.value if _WORKERS.value is not None else (os.cpu_count() or 1) * _ALL.value
            ),
            skip_list=Path(_SKIP.value) if _SKIP.value else None,
            console=cli.console(),
            folder=data.folder,
            boxes=data.boxes,
            mapillary_labels=data.mapillary_labels,
            judged_only=_judged_only(),
        )
        sys.exit(0 if whole else 1)

    cli.run(_main)
