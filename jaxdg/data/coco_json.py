"""COCO's annotation files: lists of `images`, `categories` and `annotations` that name each other
by ids.

They are read as pycocotools reads them (Lin et al. 2014): ids may be numbers or texts, an image may
be without annotations, `area` is that of the object and not of its box. Where pycocotools would
lose something without a word (two entries of one id, an annotation of no image, a key that occurs
twice), the entry is named instead. `difficult` and `ignore`, which COCO's own evaluation does not
read, mark difficult boxes: writers of VOC's truth in this form use them.
"""

from collections.abc import Callable, Collection, Hashable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
import dataclasses
import json
import math
import os
import posixpath
from reprlib import repr as short
from typing import Any, NamedTuple

import numpy as np

from jaxdg.data import index, storage
from jaxdg.data.box_fields import areas_of, fit, flag, rounded
from jaxdg.data.index import Defect
from jaxdg.data.tree import Tree

Entry = dict[str, Any]
Look = Callable[[str], tuple[index.Header, list[Defect]]]
LISTS = ("images", "annotations", "categories")


@dataclasses.dataclass(frozen=True)
class CocoPart:
    """Images with one JSON file; folders are relative to the dataset's.

    Attributes:
        images: image folder.
        annotations: folder of the JSON file.
        file: its path in that folder.
        start: beginning of the file names that count, which is not part of their paths below
            `images`.
    """

    images: str
    annotations: str
    file: str
    start: str = ""


def load(path: str) -> dict[str, list[Entry]]:
    """The three lists of a file.

    Args:
        path: as `storage.read` takes it.

    Raises:
        ValueError: the file is unreadable, is not JSON, lacks a list, or holds a key twice in one
            place.
    """
    data = storage.read(path)
    try:
        content = json.loads(data, object_pairs_hook=_object)
    except (ValueError, RecursionError) as error:  # no JSON, no text
        lines = (
            "; a file with one JSON value a line is not read"
            if str(error).startswith("Extra data")
            else ""
        )
        raise ValueError(
            f"{path}: no COCO annotation file ({error}{lines}); correct it, or fetch it again"
        ) from error
    if not isinstance(content, dict):
        raise ValueError(
            f"{path}: no COCO annotation file (a list, as files of results are); name the file with"
            f" {', '.join(LISTS)}"
        )
    for key in LISTS:
        entries = content.get(key)
        if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
            fault = (
                f"{key!r} is no list of objects"
                if key in content
                else f"it has no {key!r}, only {', '.join(content) or 'nothing'}"
            )
            raise ValueError(
                f"{path}: no COCO annotation file ({fault}); correct it, or fetch it again"
            )
    return content


def _object(pairs: list[tuple[str, Any]]) -> Entry:
    entry = dict(pairs)
    if len(entry) < len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in keys if keys.count(key) > 1)
        where = f"the object of id {short(entry['id'])}" if "id" in entry else "one object"
        raise ValueError(f"the key {twice!r} occurs twice in {where}")
    return entry


def category_names(content: Mapping[str, list[Entry]]) -> tuple[str, ...]:
    """The names of the categories, ordered by id; those that `read` refuses are left out."""
    found = {
        e["id"]: e["name"]
        for e in content["categories"]
        if not _id_fault(e, "id") and _is_name(e.get("name"))
    }
    return tuple(
        dict.fromkeys(found[i] for i in sorted(found, key=lambda i: (isinstance(i, str), i)))
    )


def read(
    tree: Tree,
    part: CocoPart,
    path: str,
    content: Mapping[str, list[Entry]],
    *,
    names: Sequence[str],
    skip: Collection[str],
    look: Look,
    wrong: list[Defect],
) -> tuple[list[str], dict[str, np.ndarray]]:
    """What a file says.

    Args:
        tree: the dataset's files.
        part: what is wanted of them.
        path: of the file.
        content: the file, as loaded.
        names: names that categories may have.
        skip: paths of images to leave out.
        look: gives the header of an image file, and what is wrong with it.
        wrong: receives what is wrong.

    Returns:
        The paths of its images in the order of the file, and their `sizes`, `fingerprints`,
        `counts` (numbers of boxes), `boxes`, `classes`, `difficult`, `crowd` and `areas`, without
        the boxes that have defects.
    """
    reader = _Reader(path, names, wrong)
    classes = reader.categories(content["categories"])
    listed, images = reader.images(content["images"], _Places(tree, part), part.start, skip)
    with ThreadPoolExecutor(index.THREADS) as pool:
        looked = dict(zip(images, pool.map(look, images.values()), strict=True))
    for i, (header, found) in looked.items():
        wrong += found or reader.size_fault(images[i], header.size, listed[i])
    kept = {i: image for i, image in images.items() if not looked[i][1]}
    sizes, fingerprints = index.arrays([header for header, _ in looked.values()])
    rows = reader.annotations(content["annotations"], set(listed), kept, classes)
    return list(images.values()), {
        "sizes": sizes,
        "fingerprints": fingerprints,
        **_arrays(rows, images, sizes, reader),
    }


class _Row(NamedTuple):
    """One box as it is written."""

    entry: Entry
    class_id: int
    corners: tuple[float, float, float, float]
    difficult: bool
    crowd: bool
    area: float


def _arrays(
    rows: list[_Row], images: Mapping[Hashable, str], sizes: np.ndarray, reader: "_Reader"
) -> dict[str, np.ndarray]:
    place = {i: k for k, i in enumerate(images)}
    owner = np.array([place[row.entry["image_id"]] for row in rows], np.int32)
    boxes, misfits = fit(
        np.array([row.corners for row in rows], np.float64).reshape(-1, 4), sizes[owner], first=0
    )
    for i, what in misfits:
        reader.say_of(rows[i].entry, images, what)
    order = np.argsort(owner, kind="stable")
    order = order[~np.isin(order, [i for i, _ in misfits])]
    stated = np.array([row.area for row in rows], np.float64)
    return {
        "counts": np.bincount(owner[order], minlength=len(images)),
        "boxes": boxes[order],
        "classes": np.array([row.class_id for row in rows], np.int32)[order],
        "difficult": np.array([row.difficult for row in rows], bool)[order],
        "crowd": np.array([row.crowd for row in rows], bool)[order],
        "areas": np.where(np.isnan(stated), areas_of(boxes), rounded(stated))[order],
    }


@dataclasses.dataclass(frozen=True)
class _Reader:
    """Turns the lists of a file into what they mean, and notes what they do not say or say twice."""

    path: str
    names: Sequence[str]
    wrong: list[Defect]

    def say(self, text: str) -> None:
        """Notes what is wrong with the file."""
        self.wrong.append(Defect(self.path, f": {text}"))

    def say_of(self, e: Entry, images: Mapping[Hashable, str], text: str) -> None:
        """Notes what is wrong with an annotation of one of `images`."""
        self.wrong.append(
            Defect(
                images[e["image_id"]],
                f": annotation {e['id']} of {os.path.basename(self.path)} {text}",
            )
        )

    def categories(self, entries: list[Entry]) -> dict[Hashable, str]:
        """The name of each category by its id."""
        found: dict[Hashable, str] = {}
        for n, e in enumerate(entries, start=1):
            title = _title("category", e, n)
            if fault := _id_fault(e, "id") or (
                "" if _is_name(e.get("name")) else f"has {_said(e, 'name')}; a name is a text"
            ):
                self.say(f"{title} {fault}")
                continue
            if e["id"] in found:
                self.say(
                    f"the categories {found[e['id']]!r} and {e['name']!r} have one id, {e['id']};"
                    " give one another"
                )
            elif e["name"] in found.values():
                first = next(i for i, name in found.items() if name == e["name"])
                self.say(
                    f"the categories {first} and {e['id']} have one name, {e['name']!r}; rename"
                    " one, or make them one"
                )
            found.setdefault(e["id"], e["name"])
        return found

    def images(
        self, entries: list[Entry], places: "_Places", start: str, skip: Collection[str]
    ) -> tuple[dict[Hashable, Entry], dict[Hashable, str]]:
        """All entries by their ids, and the paths of those that are wanted and found."""
        listed: dict[Hashable, Entry] = {}
        found: dict[Hashable, str] = {}
        owners: dict[str, Hashable] = {}
        for n, e in enumerate(entries, start=1):
            name: Any = e.get("file_name")
            if fault := _image_fault(e):
                self.say(f"{_title('image', e, n)} {fault}")
                if not _id_fault(e, "id"):
                    listed.setdefault(e["id"], e)
                continue
            if e["id"] in listed:
                first = listed[e["id"]].get("file_name")
                self.say(
                    f"the images {first!r} and {name!r} have one id, {e['id']}; renumber those of"
                    " one of the files that were joined"
                )
                continue
            listed[e["id"]] = e
            if not name.startswith(start):
                continue
            image, fault = places.of(name.removeprefix(start))
            if image in skip:
                continue
            if fault:
                self.wrong.append(
                    Defect(
                        image,
                        f" is listed by {os.path.basename(self.path)} as image {e['id']}, but"
                        f" {fault}",
                    )
                )
            elif image in owners:
                self.say(
                    f"the images {owners[image]} and {e['id']} are one file, {name}; make them one,"
                    " with the annotations of both"
                )
            else:
                found[e["id"]] = image
                owners[image] = e["id"]
        return listed, found

    def size_fault(self, image: str, size: tuple[int, int], e: Entry) -> list[Defect]:
        """What is wrong with the size that an entry states."""
        h, w = size
        stated = (e["height"], e["width"])
        if stated == (h, w):
            return []
        turned = (
            "; they are swapped, or the image was turned after it was annotated"
            if stated == (w, h)
            else ""
        )
        return [
            Defect(
                image,
                f" is {w}x{h} but {os.path.basename(self.path)} says"
                f" {stated[1]}x{stated[0]}{turned}",
            )
        ]

    def annotations(
        self,
        entries: list[Entry],
        listed: Collection[Hashable],
        images: Mapping[Hashable, str],
        classes: Mapping[Hashable, str],
    ) -> list[_Row]:
        """The boxes in `images`; `listed` are the ids of all images."""
        rows: list[_Row] = []
        seen: dict[tuple[Hashable, Hashable], Any] = {}
        foreign: dict[str, list[Any]] = {}
        ids = {name: k for k, name in enumerate(self.names)}
        known = ", ".join(f"{i} {name}" for i, name in classes.items())
        for n, e in enumerate(entries, start=1):
            if fault := _id_fault(e, "id") or _id_fault(e, "image_id"):
                self.say(f"{_title('annotation', e, n)} {fault}")
                continue
            known_as = (e["id"], e["image_id"])
            if known_as in seen and seen[known_as] == e.get("bbox"):
                self.say(f"annotation {e['id']} occurs twice; take one out")
            seen[known_as] = e.get("bbox")
            if e["image_id"] not in listed:
                self.say(
                    f"annotation {e['id']} is of image {_spelt(e['image_id'], listed)}, which is"
                    " not listed"
                )
                continue
            if e["image_id"] not in images:
                continue
            category = None if _id_fault(e, "category_id") else classes.get(e["category_id"])
            if category is not None and category not in ids:
                foreign.setdefault(category, []).append(e["id"])
                continue
            fault = _id_fault(e, "category_id")
            if not fault and category is None:
                fault = (
                    f"has the unknown class {_spelt(e['category_id'], classes)} (known are {known})"
                )
            if fault := fault or _values_fault(e):
                self.say_of(e, images, fault)
                continue
            assert category is not None  # or there had been a fault
            difficult = bool(flag(e.get("difficult")) or flag(e.get("ignore")))
            area = math.nan if e.get("area") is None else float(e["area"])
            rows.append(
                _Row(
                    e,
                    ids[category],
                    _corners(e["bbox"]),
                    difficult,
                    bool(flag(e.get("iscrowd"))),
                    area,
                )
            )
        for category, mine in foreign.items():
            self.say(
                "annotation"
                f" {mine[0]}{f' and {len(mine) - 1} more are' if len(mine) > 1 else ' is'} of the"
                f" category {category!r}, which is none of the classes {', '.join(self.names)};"
                " name it in data.boxes.classes, or take its annotations out of the file"
            )
        return rows


class _Places:
    """Finds the file that a name means."""

    def __init__(self, tree: Tree, part: CocoPart):
        self.files = tree.files(part.images)
        self.folder = tree.places(part.images)[0]

    def of(self, name: str) -> tuple[str, str]:
        """The path of an image, and why it is none.

        A name is relative to the image folder. One that is written with backslashes, dots or the
        image folder's own name in front means the same file; of others nobody knows which of
        several files of a name they mean.
        """
        if (own := storage.composed(name)) in self.files:
            return self.files[own], ""
        plain = posixpath.normpath(own.replace("\\", "/"))
        if plain in self.files:
            return self.files[plain], ""
        parts = plain.split("/")
        above = os.path.abspath(self.folder).split("/")
        for k in range(1, len(parts)):
            rest = "/".join(parts[k:])
            if parts[:k] == above[-k:] and rest in self.files:
                return self.files[rest], ""
        path = os.path.join(self.folder, plain)
        if os.path.isfile(path):
            return path, ""
        alike = [own for own in self.files if own.rpartition("/")[2].lower() == parts[-1].lower()][
            :1
        ]
        hint = f"; if {alike[0]} is meant, write that as its file_name" if alike else ""
        spelt = "" if plain == name else f" ({name})"
        return path, f"does not exist{spelt}{hint}"


def _id_fault(e: Entry, key: str) -> str:
    """Why a value cannot name an entry; "" if it can."""
    value = e.get(key)
    if type(value) in (int, str) or (isinstance(value, float) and value.is_integer()):
        return ""
    return f"has {_said(e, key)}; an id is a whole number or a text"


def _image_fault(e: Entry) -> str:
    if fault := _id_fault(e, "id"):
        return fault
    if not _is_name(e.get("file_name")):
        return f"has {_said(e, 'file_name')}"
    for key in ("width", "height"):
        value: Any = e.get(key)
        whole = type(value) is int or (isinstance(value, float) and value.is_integer())
        if not whole or value < 1:
            return (
                f"({e['file_name']}) has {_said(e, key)}; allowed is a whole number of pixels"
                " from 1"
            )
    return ""


def _values_fault(e: Entry) -> str:
    """What is wrong with the box, the flags or the area of an annotation."""
    if "bbox" not in e:
        return "has no bbox"
    for key in ("iscrowd", "difficult", "ignore"):
        if flag(e.get(key)) is None:
            return f"has {_said(e, key)}, which is neither yes (1) nor no (0)"
    area = e.get("area")
    if area is not None and not (_is_number(area) and area >= 0):
        return f"has {_said(e, 'area')}; allowed is a number of square pixels from 0"
    return ""


def _corners(bbox: Any) -> tuple[float, float, float, float]:
    """x0 y0 x1 y1 of x y width height; nan if these are no four numbers."""
    if not isinstance(bbox, list) or len(bbox) != 4 or not all(_is_number(v) for v in bbox):
        return math.nan, math.nan, math.nan, math.nan
    x, y, w, h = map(float, bbox)
    return x, y, x + w, y + h


def _is_number(value: Any) -> bool:
    """Whether a value is a number that floats hold; True and False are none."""
    if type(value) is float:
        return math.isfinite(value)
    return type(value) is int and abs(value) < 1 << 53


def _is_name(value: Any) -> bool:
    return isinstance(value, str) and bool(value.strip())


def _title(kind: str, e: Entry, n: int) -> str:
    """`annotation 17`, or its place in the list where its id is not to be had."""
    return f"{kind} number {n} (counted from 1)" if _id_fault(e, "id") else f"{kind} {e['id']}"


def _said(e: Entry, key: str) -> str:
    return f"the {key} {short(e[key])}" if key in e else f"no {key}"


def _spelt(value: Any, known: Collection[Hashable]) -> str:
    """An id that is not known, and whether it is known as another type."""
    if isinstance(value, str):
        other = int(value) if value.isdecimal() else value
        return (
            f"{value!r} (a text, where the file has the number {other})"
            if other in known
            else repr(value)
        )
    other = f"{value:g}" if isinstance(value, float) else str(value)
    return (
        f"{value} (a number, where the file has the text {other!r})"
        if other in known
        else str(value)
    )
