"""Which datasets and splits `jaxdg check` looks at."""

from collections.abc import Callable, Collection, Sequence
import dataclasses
from functools import partial
import os
import re

from jaxdg.data import published, storage
from jaxdg.data.boxes import COUNTS, BoxOptions, open_box_files
from jaxdg.data.datasets import Files, FolderOptions
from jaxdg.data.domains import open_files
from jaxdg.data.tree import Tree

# Datasets that have boxes and no label maps: their folders and domains.
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
# Datasets with label maps that may have boxes too: a folder, and how the names of the files in it
# end.
BOX_LABELS = {
    "cityscapes": ("gtFine", "_instanceIds.png"),
    "bdd100k": ("labels/ins_seg", ".png"),
    "synthia": ("GT/LABELS", ".png"),
    "acdc": ("gt_detection", ".json"),
}
KNOWN = (*published.PUBLISHED, *BOX_FOLDERS)


@dataclasses.dataclass(frozen=True)
class Split:
    """Images that are checked together.

    Attributes:
        name: as printed.
        open: opens them as `open_files` does; takes its `defects`.
        count: published number of images; None if there is none.
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
        name: as printed; " boxes" is appended where there are label maps of the same name.
        folder: of the files.
        splits: of the dataset.
        own: described by the configuration and not published.
        judged_only: no source of the configuration, so that it may lack classes.
    """

    name: str
    folder: str
    splits: tuple[Split, ...]
    own: bool = False
    judged_only: bool = False


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
    """The datasets to check.

    Args:
        names: of datasets and domains, or of what `folder` and `boxes` describe.
        root: data root.
        folder: as for `open_files`.
        boxes: as `own` for `open_boxes`.
        mapillary_labels: as for `open_files`.
        recorded: domains that have records, so that their files may be missing.
        judged_only: domains of the configuration that no run trains on.

    Raises:
        ValueError: an unknown name.
    """
    result: list[Subject] = []
    for name in names:
        named = (
            _published(name, root, mapillary_labels)
            or _voc(name, root)
            or _own(name, root, folder, boxes, name in judged_only)
        )
        if any(f"{domain}/".startswith(f"{name}/") for domain in recorded):
            named = [subject for subject in named if _has_files(subject)]
        elif not named:
            raise ValueError(
                f"unknown dataset {name!r}; known are {', '.join(KNOWN)} and their domains; for"
                " others give --config with data.folder or data.boxes"
            )
        result += named
    return result


def dataset_folders(root: str) -> tuple[list[str], list[str]]:
    """The known datasets that have a folder below the data root, and the other folders.

    Case and signs in the name of a folder do not matter; the exact name comes first.
    """

    def plain(name):
        return re.sub(r"\W|_", "", name).lower()

    folders = storage.subfolders(root)
    by_plain_name = {plain(name): name for name in KNOWN}
    datasets = {folder: by_plain_name.get(plain(folder)) for folder in folders}
    others = [
        folder
        for folder, dataset in datasets.items()
        if dataset is None or (folder != dataset and dataset in folders)
    ]
    return [name for name in KNOWN if name in datasets.values()], others


def has_file(base: str, folder: str, suffix: str = "") -> bool:
    """Whether a folder below that of a dataset has a file whose name ends so."""
    try:
        return any(name.endswith(suffix) for name in Tree(base).files(folder))
    except (FileNotFoundError, ValueError):
        return False


def _has_files(subject: Subject) -> bool:
    return os.path.isdir(subject.folder) and any(
        all(has_file(subject.folder, folder) for folder in split.images) for split in subject.splits
    )


def _published(name: str, root: str, mapillary_labels: str) -> list[Subject]:
    dataset = published.find(name)
    if dataset is None:
        return []
    base = os.path.join(root, dataset.name)
    domain, split = (name, "") if name in dataset.domains else os.path.split(name)
    parts: dict[tuple[str, str], list[published.Part]] = {}
    for part in dataset.parts:
        named = domain == dataset.name or f"{part.domain}/".startswith(f"{domain}/")
        # GTA5's `all` has every image, so that its listed splits are checked only by name.
        if named and (part.split == split if split else not part.listed):
            parts.setdefault((part.domain, part.split), []).append(part)
    label_maps = []
    boxes = []
    for (d, s), these in parts.items():
        stated = sum(part.count for part in these), tuple(part.images for part in these)
        open_label_maps = partial(
            open_files,
            f"{d}/{s}",
            root=root,
            train=False,
            folder=None,
            mapillary_labels=mapillary_labels,
        )
        label_maps.append(Split(f"{d}/{s}", open_label_maps, *stated))
        if s != "test":
            open_boxes = partial(open_box_files, d, root=root, train=s != "val")
            boxes.append(Split(f"{d}/{s}", open_boxes, *stated))
    result = [Subject(name, base, tuple(label_maps))]
    if boxes and dataset.name in BOX_LABELS and has_file(base, *BOX_LABELS[dataset.name]):
        result.append(Subject(f"{name} boxes", base, tuple(boxes)))
    return result


def _voc(name: str, root: str) -> list[Subject]:
    for folder, domains in BOX_FOLDERS.items():
        splits = [
            Split(
                f"{d}/{'train' if train else 'val'}",
                partial(open_box_files, d, root=root, train=train),
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
    def subject(title: str, opening: Callable[..., Files], has_val: bool) -> Subject:
        splits = tuple(
            Split(f"{name}/{split}", partial(opening, train=split != "val"))
            for split in (("train", "val") if has_val else ("all",))
        )
        return Subject(title, root, splits, own=True, judged_only=judged_only)

    result = []
    if folder:
        opening = partial(open_files, name, root=root, folder=folder)
        has_val = "{split}" in folder.images + folder.labels
        result.append(subject(name, opening, has_val))
    if boxes:
        opening = partial(open_box_files, name, root=root, own=boxes)
        pairs = (boxes.images, boxes.annotations, boxes.lists)
        result.append(subject(f"{name} boxes", opening, any(a != b for a, b in pairs)))
    return result
