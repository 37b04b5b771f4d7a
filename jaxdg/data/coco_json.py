"""COCO's annotation files: lists of `images`, `categories` and `annotations` joined by ids.

They are read as pycocotools reads them (Lin et al. 2014): ids may be numbers or texts, an image may
have no annotations, and `area` is that of the object and not of its box. Where pycocotools would
lose data silently (two entries of one id, an annotation of no image, a key that occurs twice), the
entry is named as a defect. `difficult` and `ignore` mark difficult boxes. COCO's own evaluation
does not read them, but writers use them for VOC's truth in this form.
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
    except (ValueError, RecursionError) as error:  # not JSON, or not text
        lines = ""
        if str(error).startswith("Extra data"):
            lines = "; a file with one JSON value a line is not read"
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
            fault = f"{key!r} is no list of objects"
            if key not in content:
                fault = f"it has no {key!r}, only {', '.join(content) or 'nothing'}"
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
    """The names of the categories, ordered by id, without those that `read` refuses."""
    entries = [e for e in content["categories"] if not _id_fault(e, "id")]
    found = {e["id"]: e["name"] for e in entries if _is_name(e.get("name"))}
    ids = sorted(found, key=lambda i: (isinstance(i, str), i))  # numbers first
    return tuple(dict.fromkeys(found[i] for i in ids))


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
    """Reads the boxes of a file and checks its images.

    Args:
        tree: the dataset's files.
        part: the images and the file.
        path: of the file.
        content: the file, as loaded.
        names: names that categories may have.
        skip: paths of images to leave out.
        look: gives the header and the defects of an image file.
        wrong: receives the defects.

    Returns:
        The paths of its images in the order of the file, and their `sizes`, `fingerprints`,
        `counts` (numbers of boxes), `boxes`, `classes`, `difficult`, `crowd` and `areas`, without
        the boxes that have defects.
    """
    ids = {name: k for k, name in enumerate(names)}
    found = read_entries(
        tree,
        part,
        path,
        content,
        names=names,
        class_of=lambda _, name: ids.get(name),
        remedy="name it in data.boxes.classes",
        skip=skip,
        look=look,
        wrong=wrong,
    )
    rows = _rows(found)
    arrays = {"sizes": found.sizes, "fingerprints": found.fingerprints, **_arrays(rows, found)}
    return list(found.images.values()), arrays


@dataclasses.dataclass(frozen=True)
class Entries:
    """The images of a file and their annotations.

    Attributes:
        images: paths by ids, in the order of the file.
        sizes: height and width of each, pixels.
        fingerprints: of the image files.
        annotations: those of images without defects, each with its class.
        add: adds a defect of an annotation.
    """

    images: Mapping[Hashable, str]
    sizes: np.ndarray
    fingerprints: np.ndarray
    annotations: Sequence[tuple[Entry, int]]
    add: Callable[[Entry, str], None]

    def owners(self, entries: Sequence[Entry]) -> np.ndarray:
        """The places of the images of some annotations, int32 [n]."""
        place = {i: k for k, i in enumerate(self.images)}
        return np.array([place[e["image_id"]] for e in entries], np.int32)


def read_entries(
    tree: Tree,
    part: CocoPart,
    path: str,
    content: Mapping[str, list[Entry]],
    *,
    names: Sequence[str],
    class_of: Callable[[Hashable, str], int | None],
    remedy: str,
    skip: Collection[str],
    look: Look,
    wrong: list[Defect],
) -> Entries:
    """Checks the images of a file, and to which image and class each annotation belongs.

    Args:
        tree: as for `read`.
        part: as for `read`.
        path: as for `read`.
        content: as for `read`.
        names: names of the classes.
        class_of: the class of a category, by its id and name; None if it has none.
        remedy: what a person can do about a category without class.
        skip: as for `read`.
        look: as for `read`.
        wrong: as for `read`.
    """
    reader = _Reader(path, names, class_of, remedy, wrong)
    classes = reader.categories(content["categories"])
    listed, images = reader.images(content["images"], _Places(tree, part), part.start, skip)
    with ThreadPoolExecutor(index.THREADS) as pool:
        looked = dict(zip(images, pool.map(look, images.values()), strict=True))
    for i, (header, found) in looked.items():
        wrong += found or reader.size_fault(images[i], header.size, listed[i])
    sound = {i: image for i, image in images.items() if not looked[i][1]}
    sizes, fingerprints = index.arrays([header for header, _ in looked.values()])
    entries = reader.annotations(content["annotations"], set(listed), sound, classes)
    return Entries(
        images, sizes, fingerprints, entries, lambda e, text: reader.add_to(e, images, text)
    )


class _Row(NamedTuple):
    """One box as it is written."""

    entry: Entry
    class_id: int
    corners: tuple[float, float, float, float]
    difficult: bool
    crowd: bool
    area: float


def _rows(found: Entries) -> list[_Row]:
    rows = []
    for e, class_id in found.annotations:
        if fault := _values_fault(e):
            found.add(e, fault)
            continue
        difficult = bool(flag(e.get("difficult")) or flag(e.get("ignore")))
        crowd = bool(flag(e.get("iscrowd")))
        area = math.nan if e.get("area") is None else float(e["area"])
        rows.append(_Row(e, class_id, _corners(e["bbox"]), difficult, crowd, area))
    return rows


def _arrays(rows: list[_Row], found: Entries) -> dict[str, np.ndarray]:
    owner = found.owners([row.entry for row in rows])
    corners = np.array([row.corners for row in rows], np.float64).reshape(-1, 4)
    boxes, misfits = fit(corners, found.sizes[owner], first=0)
    for i, what in misfits:
        found.add(rows[i].entry, what)
    order = np.argsort(owner, kind="stable")
    order = order[~np.isin(order, [i for i, _ in misfits])]
    stated = np.array([row.area for row in rows], np.float64)
    return {
        "counts": np.bincount(owner[order], minlength=len(found.images)),
        "boxes": boxes[order],
        "classes": np.array([row.class_id for row in rows], np.int32)[order],
        "difficult": np.array([row.difficult for row in rows], bool)[order],
        "crowd": np.array([row.crowd for row in rows], bool)[order],
        "areas": np.where(np.isnan(stated), areas_of(boxes), rounded(stated))[order],
    }


@dataclasses.dataclass(frozen=True)
class _Reader:
    """Reads the lists of a file and collects its defects."""

    path: str
    names: Sequence[str]
    class_of: Callable[[Hashable, str], int | None]
    remedy: str
    wrong: list[Defect]

    def add(self, text: str) -> None:
        """Adds a defect of the file."""
        self.wrong.append(Defect(self.path, f": {text}"))

    def add_to(self, e: Entry, images: Mapping[Hashable, str], text: str) -> None:
        """Adds a defect of an annotation of one of `images`."""
        where = f"annotation {e['id']} of {os.path.basename(self.path)}"
        self.wrong.append(Defect(images[e["image_id"]], f": {where} {text}"))

    def categories(self, entries: list[Entry]) -> dict[Hashable, str]:
        """The name of each category by its id."""
        found: dict[Hashable, str] = {}
        for n, e in enumerate(entries, start=1):
            fault = _id_fault(e, "id")
            if not fault and not _is_name(e.get("name")):
                fault = f"has {_stated(e, 'name')}; a name is a text"
            if fault:
                self.add(f"{_title('category', e, n)} {fault}")
                continue
            if e["id"] in found:
                self.add(
                    f"the categories {found[e['id']]!r} and {e['name']!r} have one id, {e['id']};"
                    " give one another"
                )
            elif e["name"] in found.values():
                first = next(i for i, name in found.items() if name == e["name"])
                self.add(
                    f"the categories {first} and {e['id']} have one name, {e['name']!r}; rename"
                    " one, or make them one"
                )
            found.setdefault(e["id"], e["name"])
        return found

    def images(
        self, entries: list[Entry], places: "_Places", start: str, skip: Collection[str]
    ) -> tuple[dict[Hashable, Entry], dict[Hashable, str]]:
        """All entries by their ids, and the paths of the images that count and exist."""
        listed: dict[Hashable, Entry] = {}
        found: dict[Hashable, str] = {}
        owners: dict[str, Hashable] = {}
        for n, e in enumerate(entries, start=1):
            name: Any = e.get("file_name")
            if fault := _image_fault(e):
                self.add(f"{_title('image', e, n)} {fault}")
                if not _id_fault(e, "id"):
                    listed.setdefault(e["id"], e)
                continue
            if e["id"] in listed:
                first = listed[e["id"]].get("file_name")
                self.add(
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
                where = f"{os.path.basename(self.path)} as image {e['id']}"
                self.wrong.append(Defect(image, f" is listed by {where}, but {fault}"))
            elif image in owners:
                self.add(
                    f"the images {owners[image]} and {e['id']} are one file, {name}; make them one,"
                    " with the annotations of both"
                )
            else:
                found[e["id"]] = image
                owners[image] = e["id"]
        return listed, found

    def size_fault(self, image: str, size: tuple[int, int], e: Entry) -> list[Defect]:
        """The defect of an entry that states another size than the file has."""
        h, w = size
        stated = (e["height"], e["width"])
        if stated == (h, w):
            return []
        turned = ""
        if stated == (w, h):
            turned = "; they are swapped, or the image was turned after it was annotated"
        said = f"{os.path.basename(self.path)} says {stated[1]}x{stated[0]}"
        return [Defect(image, f" is {w}x{h} but {said}{turned}")]

    def annotations(
        self,
        entries: list[Entry],
        listed: Collection[Hashable],
        images: Mapping[Hashable, str],
        classes: Mapping[Hashable, str],
    ) -> list[tuple[Entry, int]]:
        """Those of `images` with their classes; `listed` are the ids of all images."""
        found: list[tuple[Entry, int]] = []
        seen: dict[tuple[Hashable, Hashable], Any] = {}
        foreign: dict[str, list[Any]] = {}
        known = ", ".join(f"{i} {name}" for i, name in classes.items())
        for n, e in enumerate(entries, start=1):
            if fault := _id_fault(e, "id") or _id_fault(e, "image_id"):
                self.add(f"{_title('annotation', e, n)} {fault}")
                continue
            known_as = (e["id"], e["image_id"])
            if known_as in seen and seen[known_as] == e.get("bbox"):
                self.add(f"annotation {e['id']} occurs twice; take one out")
            seen[known_as] = e.get("bbox")
            if e["image_id"] not in listed:
                image = _unknown_id(e["image_id"], listed)
                self.add(f"annotation {e['id']} is of image {image}, which is not listed")
                continue
            if e["image_id"] not in images:
                continue
            category = None if _id_fault(e, "category_id") else classes.get(e["category_id"])
            if category is None:
                fault = _id_fault(e, "category_id")
                name = "" if fault else _unknown_id(e["category_id"], classes)
                fault = fault or f"has the unknown class {name} (known are {known})"
                self.add_to(e, images, fault)
                continue
            class_id = self.class_of(e["category_id"], category)
            if class_id is None:
                foreign.setdefault(category, []).append(e["id"])
            else:
                found.append((e, class_id))
        for category, mine in foreign.items():
            are = f"and {len(mine) - 1} more are" if len(mine) > 1 else "is"
            self.add(
                f"annotation {mine[0]} {are} of the category {category!r}, which is none of the"
                f" classes {', '.join(self.names)}; {self.remedy}, or take its annotations out of"
                " the file"
            )
        return found


class _Places:
    """Finds the files of the images by the names in the JSON file."""

    def __init__(self, tree: Tree, part: CocoPart):
        self.files = tree.files(part.images)
        self.folder = tree.places(part.images)[0]

    def of(self, name: str) -> tuple[str, str]:
        """The path of an image, and the reason if there is no such file.

        A name is relative to the image folder. A name with backslashes or dots, or with the image
        folder's own name in front, means the same file. Other names are refused, because several
        files may have the same name.
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
        wanted = parts[-1].lower()
        alike = [own for own in self.files if own.rpartition("/")[2].lower() == wanted]
        hint = f"; if {alike[0]} is meant, write that as its file_name" if alike else ""
        spelt = "" if plain == name else f" ({name})"
        return path, f"does not exist{spelt}{hint}"


def _id_fault(e: Entry, key: str) -> str:
    """The reason why a value is not an id; "" if it is one."""
    value = e.get(key)
    if type(value) in (int, str) or (isinstance(value, float) and value.is_integer()):
        return ""
    return f"has {_stated(e, key)}; an id is a whole number or a text"


def _image_fault(e: Entry) -> str:
    if fault := _id_fault(e, "id"):
        return fault
    if not _is_name(e.get("file_name")):
        return f"has {_stated(e, 'file_name')}"
    for key in ("width", "height"):
        value: Any = e.get(key)
        whole = type(value) is int or (isinstance(value, float) and value.is_integer())
        if not whole or value < 1:
            said = f"({e['file_name']}) has {_stated(e, key)}"
            return f"{said}; allowed is a whole number of pixels from 1"
    return ""


def _values_fault(e: Entry) -> str:
    """The fault of the box, the flags or the area of an annotation; "" if there is none."""
    if "bbox" not in e:
        return "has no bbox"
    for key in ("iscrowd", "difficult", "ignore"):
        if flag(e.get(key)) is None:
            return f"has {_stated(e, key)}, which is neither yes (1) nor no (0)"
    area = e.get("area")
    if area is not None and not (_is_number(area) and area >= 0):
        return f"has {_stated(e, 'area')}; allowed is a number of square pixels from 0"
    return ""


def _corners(bbox: Any) -> tuple[float, float, float, float]:
    """x0 y0 x1 y1 of x y width height; nan unless these are four numbers."""
    if not isinstance(bbox, list) or len(bbox) != 4 or not all(_is_number(v) for v in bbox):
        return math.nan, math.nan, math.nan, math.nan
    x, y, w, h = map(float, bbox)
    return x, y, x + w, y + h


def _is_number(value: Any) -> bool:
    """Whether a value is a number that a float can hold; True and False are not numbers."""
    if type(value) is float:
        return math.isfinite(value)
    return type(value) is int and abs(value) < 1 << 53


def _is_name(value: Any) -> bool:
    return isinstance(value, str) and bool(value.strip())


def _title(kind: str, e: Entry, n: int) -> str:
    """The name of an entry in a message: `annotation 17`, or its place in the list."""
    return f"{kind} number {n} (counted from 1)" if _id_fault(e, "id") else f"{kind} {e['id']}"


def _stated(e: Entry, key: str) -> str:
    return f"the {key} {short(e[key])}" if key in e else f"no {key}"


def _unknown_id(value: Any, known: Collection[Hashable]) -> str:
    """An unknown id in a message, with a hint if it is known as another type."""
    if isinstance(value, str):
        other = int(value) if value.isdecimal() else value
        hint = f" (a text, where the file has the number {other})" if other in known else ""
        return f"{value!r}{hint}"
    other = f"{value:g}" if isinstance(value, float) else str(value)
    hint = f" (a number, where the file has the text {other!r})" if other in known else ""
    return f"{value}{hint}"
