"""Checks before the first step that the labels show the classes to learn and to judge by.

A model that has seen only one class answers with it and scores 100; a class that never occurs is
never learnt. The usual cause is ids that have no class: a mask saved as 0 and 255 has one class,
because 255 is ignored by default.

Reading all labels takes too long for the start of a run. So ever more of them are looked at until
every class was seen. An error that ends the run is raised only after all labels have been read.
"""

from collections.abc import Callable, Mapping, Sequence
import dataclasses
import functools

from jaxtyping import Bool
import numpy as np
from rich.text import Text

from jaxdg.data import published
from jaxdg.data.boxes import BoxFiles, StreetsBoxes
from jaxdg.data.class_counts import Look, count, id_classes, is_mapped, look, parts_of
from jaxdg.data.coco_maps import BACKGROUND, CocoMaps
from jaxdg.data.datasets import Dataset, Files, Streets, Subset
from jaxdg.data.labels import IGNORE
from jaxdg.data.records import Records

MOST = 2000  # images of a source to look at
SECONDS = 60.0
DOMAIN_MOST = 100  # the same for a domain to judge on
DOMAIN_SECONDS = 10.0
LISTED = 8  # ids or classes in a message


@dataclasses.dataclass(frozen=True)
class Seen:
    """The classes seen in the labels of a dataset that is not a mixture.

    Attributes:
        dataset: its images.
        look: the ids seen; None for generated streets, which show every class.
        name: for messages; empty for that of the dataset's domain.
    """

    dataset: Dataset
    look: Look | None
    name: str = ""

    def __str__(self) -> str:
        return self.name or self.dataset.domain

    @functools.cached_property
    def classes(self) -> Bool[np.ndarray, " k"]:
        """Whether each class was seen."""
        k = len(self.dataset.labels.names)
        if self.look is None:
            return np.ones(k, bool)
        return np.isin(np.arange(k), id_classes(self.dataset)[self.look.ids])

    @property
    def complete(self) -> bool:
        """Whether all images were looked at."""
        return self.look is None or self.look.images == len(self.dataset)

    @property
    def boxes(self) -> bool:
        """Whether there are boxes instead of label maps."""
        inner = _inner(self.dataset)
        return isinstance(inner, BoxFiles | StreetsBoxes) or (
            isinstance(inner, Records) and inner.boxes
        )

    @property
    def unlabelled(self) -> bool:
        """Whether there are images without labels, as in a published test split."""
        inner = _inner(self.dataset)
        return isinstance(inner, Files) and not self.boxes and inner.unlabelled


def show(dataset: Dataset, most: int, seconds: float) -> list[Seen]:
    """Looks at the labels of each part of a dataset, see `class_counts.look`.

    Raises:
        ValueError: a label is damaged, or holds ids that have no class.
    """
    found = [
        Seen(part, None if _is_generated(part) else look(part, most=most, seconds=seconds))
        for part in parts_of(dataset)
    ]
    for one in found:
        if one.look is not None and one.look.odd >= 0 and len(dataset.labels.names) > 1:
            try:
                one.dataset[one.look.odd]
            except ValueError as error:
                raise ValueError(f"{error}; {ids_seen(one)}") from error
    return found


def before_training(
    source: Dataset, domains: Mapping[str, Dataset], say: Callable[[Text], None]
) -> None:
    """Prints the faults of the classes in the data that a run trains on and is judged on.

    Args:
        source: the images to train on.
        domains: the images to judge on.
        say: prints a line.

    Raises:
        ValueError: nothing in the source is labelled, or only one class of a label map.
    """
    shown = show(source, MOST, SECONDS)
    if fault(shown) and not all(one.complete for one in shown):
        left = sum(len(one.dataset) - one.look.images for one in shown if one.look is not None)
        line = f"{source.domain}: no more than one class so far; looks at the other {left} labels,"
        say(Text(f"{line} once for all runs"))
        shown = [
            one if one.complete else Seen(one.dataset, count(one.dataset).look) for one in shown
        ]
    if wrong := fault(shown):
        raise ValueError(wrong)
    lines = missing(shown)
    for name, dataset in domains.items():
        lines += _against(shown, name, show(dataset, DOMAIN_MOST, DOMAIN_SECONDS))
    for line, is_warning in lines:
        warning = Text.assemble(("warning: ", "bold yellow"), line)
        say(warning if is_warning else Text(f"note: {line}"))


def findings(
    shown: Sequence[Seen], *, own: bool, judged_only: bool = False
) -> tuple[list[str], list[tuple[str, bool]]]:
    """The messages about the splits of a dataset that may be trained on.

    Args:
        shown: the classes seen in each split, the one to train on first.
        own: whether it is the user's own folder: its label maps are broken if a class never occurs.
            For a published dataset, for boxes, and for a split to judge on that is only a warning.
        judged_only: it is not trained on, so every message is a warning.

    Returns:
        The errors; and other lines, each with whether it is a warning.
    """
    shown = [one for one in shown if not one.unlabelled] or list(shown)
    faults = {k: wrong for k, one in enumerate(shown) if (wrong := fault([one]))}
    sound = [one for k, one in enumerate(shown) if k not in faults]
    lines: list[tuple[str, bool]] = []
    broken = list(faults.values())
    if own and sound and not sound[0].boxes:
        lacking = [missing([one]) for one in sound]
        if sound[0] is shown[0]:
            broken += [line for line, _ in lacking.pop(0)]
        lines += [line for of_one in lacking for line in of_one]
    elif sound:
        lines += missing(sound)
    return ([], [(line, True) for line in broken] + lines) if judged_only else (broken, lines)


def fault(shown: Sequence[Seen]) -> str | None:
    """The reason why nothing can be learnt from a source, if so."""
    first = shown[0]
    seen = union(shown)
    names = first.dataset.labels.names
    source = _name(shown)
    if first.boxes and seen.any():
        return None
    if first.boxes:
        return f"{source} has no box to learn from in {_looked(shown)}; see the annotation files"
    told = "; ".join([*map(ids_seen, shown), *filter(None, [_way_out(first)])])
    if len(names) == 1:
        return (
            f"{source} has the single class {names[0]}, and a model of one class always scores 100;"
            f" {told}"
        )
    if not seen.any():
        return f"no label of {source} shows a class, in {_looked(shown)}; {told}"
    if seen.sum() == 1:
        only = names[int(seen.argmax())]
        return (
            f"only {only} occurs in the labels of {source}, in {_looked(shown)}: a model that"
            f" answers nothing else scores 100; {told}"
        )
    return None


def missing(shown: Sequence[Seen]) -> list[tuple[str, bool]]:
    """A line for each fault, and whether it is a warning.

    Faults are classes that never occur, and parts without any class.
    """
    names = shown[0].dataset.labels.names
    absent = ~union(shown)
    lines = [
        (f"{one} shows no class at all in {_looked([one])}; {ids_seen(one)}", True)
        for one in shown
        if len(shown) > 1 and not one.classes.any()
    ]
    if not absent.any():
        return lines
    lacking = [name for name, gone in zip(names, absent, strict=True) if gone]
    if set(lacking) <= {name for one in shown for name in known_to_lack(one.dataset.domain)}:
        return [*lines, (f"{_name(shown)} has no {_some(lacking)}, as published", False)]
    occur = "occurs" if len(lacking) == 1 else "occur"
    told = f"{_some(lacking)} never {occur} in {_name(shown)}, in {_looked(shown)}"
    parts = [told + ": a model cannot learn what it never sees", *map(ids_seen, shown)]
    if not shown[0].boxes and not published.find(shown[0].dataset.domain):
        unmapped = [
            name
            for name in lacking
            if not any(_has_id(one.dataset, names.index(name)) for one in shown)
        ]
        if unmapped:
            parts.append(f"data.folder.id_map maps no id to {_some(unmapped)}")
    if way := _way_out(shown[0]):
        parts.append(way)
    return [*lines, ("; ".join(parts), True)]


def known_to_lack(domain: str) -> tuple[str, ...]:
    """Classes that never occur in the publisher's labels of a domain."""
    dataset = published.find(domain)
    return dataset.lacks if dataset else ()


def ids_seen(shown: Seen) -> str:
    """The share of each id in the labels.

    It reads as `ids in the label files: 0 93.1 % (background), 255 6.9 % (ignored)`.
    """
    if shown.look is None:
        return f"{shown} is generated"
    if shown.unlabelled:
        return f"{shown} has no label files"
    ids = shown.look.ids
    counts = shown.look.counts
    names = shown.dataset.labels.names
    if shown.boxes:
        pairs = zip(ids.tolist(), counts.tolist(), strict=True)
        return "boxes: " + (_some([f"{names[k]} {n}" for k, n in pairs]) or "none")
    meaning = {**dict(enumerate(names)), IGNORE: "ignored", -1: "no class"}
    classes = id_classes(shown.dataset)
    order = np.argsort(-counts, kind="stable")
    shares = 100 * counts[order] / max(1, counts.sum())
    percent = [f"{share:.1f} %" if share >= 0.95 else f"{share:.2g} %" for share in shares]
    ids = ids[order]
    means = [meaning.get(int(k), "no class") for k in classes[ids]]
    if is_mapped(shown.dataset):
        told = [f"{name} {share}" for name, share in zip(means, percent, strict=True)]
        return f"classes in {shown}: {_some(told)}"
    told = [f"{i} {share} ({name})" for i, share, name in zip(ids, percent, means, strict=True)]
    return f"ids in the label files of {shown}: {_some(told)}"


def _against(source: Sequence[Seen], name: str, shown: Sequence[Seen]) -> list[tuple[str, bool]]:
    """Lines about how the classes of a domain and of the source affect the domain's score."""
    names = shown[0].dataset.labels.names
    seen = union(shown)
    learnt = union(source)
    if names != source[0].dataset.labels.names:
        return []  # `Task.check_labels` refuses the domain
    looked = _looked(shown)
    score = "AP50" if shown[0].boxes else "IoU"
    told = "; ".join(map(ids_seen, shown))
    if not seen.any():
        return [(f"{name} has nothing to judge by in {looked}; {told}", True)]
    if not shown[0].boxes and seen.sum() == 1 and len(names) > 1:
        only = names[int(seen.argmax())]
        line = f"only {only} occurs in {name}, in {looked}, so that its mIoU says nothing; {told}"
        return [(line, True)]
    lines = []
    if (new := seen & ~learnt).any():
        what = _some([names[k] for k in np.flatnonzero(new)])
        line = (
            f"{name} has {what}, of which {_name(source)} shows none: the {score} there counts in"
            " its mean all the same"
        )
        lines.append((line, True))
    if (gone := learnt & ~seen).any():
        what = _some([names[k] for k in np.flatnonzero(gone)])
        rest = "" if shown[0].boxes else ", unless the model predicts it there, which counts as 0"
        line = f"{what} not seen in {name}, in {looked}: what a domain lacks stays out of its mean"
        lines.append((f"{line}{rest}", False))
    return lines


def union(shown: Sequence[Seen]) -> Bool[np.ndarray, " k"]:
    """Whether each class was seen in any of them."""
    return np.logical_or.reduce([one.classes for one in shown])


def _name(shown: Sequence[Seen]) -> str:
    return "+".join(map(str, shown))


def _looked(shown: Sequence[Seen]) -> str:
    """The number of images that a statement is about."""
    looked = sum(len(one.dataset) if one.look is None else one.look.images for one in shown)
    total = sum(len(one.dataset) for one in shown)
    if looked < total:
        return f"{looked} of {total} images looked at"
    return "all 1 image" if total == 1 else f"all {total} images"


def _is_generated(dataset: Dataset) -> bool:
    return isinstance(_inner(dataset), Streets)


def _inner(dataset: Dataset) -> Dataset:
    return dataset.dataset if isinstance(dataset, Subset) else dataset


def _has_id(dataset: Dataset, train_id: int) -> bool:
    return bool((id_classes(dataset) == train_id).any())


def _way_out(shown: Seen) -> str:
    """The settings for the user's own mask of a background and one class."""
    names = shown.dataset.labels.names
    dataset = shown.dataset
    if isinstance(_inner(dataset), CocoMaps) and len(names) == 1:
        return (
            f'set classes=("{BACKGROUND}", "{names[0]}") in data.folder if what no annotation'
            " covers is background"
        )
    if shown.look is None or len(names) > 2 or is_mapped(dataset) or published.find(dataset.domain):
        return ""
    foreground = [i for i in shown.look.ids.tolist() if i]
    background, class_name = ("background", *names)[-2:]
    classes = f'classes=("{background}", "{class_name}")'
    if len(foreground) == 1 and foreground != [1]:
        id_map = f"id_map={{{foreground[0]}: 1}}"
        return f"if {foreground[0]} marks {class_name}, set {classes}, {id_map} in data.folder"
    if len(names) > 1:
        return ""
    if foreground == [1]:
        return f"if 1 marks {class_name}, set {classes} in data.folder"
    return (
        f"a class and its background are {classes} of data.folder, whose id_map says which id is"
        " which"
    )


def _some(items: Sequence[str]) -> str:
    return ", ".join(items[:LISTED]) + (
        f" and {len(items) - LISTED} more" if len(items) > LISTED else ""
    )
