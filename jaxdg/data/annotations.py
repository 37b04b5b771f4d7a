"""Boxes in annotation files: VOC's XML, one file an image, and COCO's JSON, one file for many images.

Both are checked before a run begins, in parallel, and what was found is kept (see `cache.py`): later runs touch neither the images nor the
XML files. A JSON file is kept parsed, as that of COCO takes long; an XML file is parsed again, and checked again, whenever its image is
read, so that corrections count. Coordinates up to one pixel beyond the image are clipped, as writers disagree whether they count pixels
from 0 or 1; all else that is wrong is refused with its path and the number of the object.
"""

from collections.abc import Collection, Sequence
from concurrent.futures import ThreadPoolExecutor
import dataclasses
import json
import math
import os
from typing import Any
from xml.etree import ElementTree

from jaxtyping import Bool, Float, Float32, Int32, Integer
import numpy as np

from jaxdg.data import index, storage
from jaxdg.data.cache import cached, decoded, encoded
from jaxdg.data.index import Defect

VERSION = 3  # of what is kept
Boxes = dict[str, np.ndarray]  # `boxes`, `classes`, `difficult` and `crowd` of one image, see `boxes.py`


@dataclasses.dataclass(frozen=True)
class VocPart:
    """Images with an XML file each; folders are relative to the dataset's, alternatives of which the first that exists counts.

    Attributes:
        images: image folder.
        annotations: folder of the XML files.
        lists: folder of the lists of images; none if empty.
        listed: the list that counts, one name without extension a line; all images if empty.
    """

    images: tuple[str, ...]
    annotations: tuple[str, ...]
    lists: tuple[str, ...] = ()
    listed: str = ""


@dataclasses.dataclass(frozen=True)
class CocoPart:
    """Images with one JSON file; folders are relative to the dataset's.

    Attributes:
        images: image folder.
        annotations: folder of the JSON file.
        file: its path in that folder.
        start: beginning of the file names that count, which is not part of their paths below `images`.
    """

    images: str
    annotations: str
    file: str
    start: str = ""


@dataclasses.dataclass(frozen=True)
class CocoBoxes:
    """The content of COCO annotation files.

    Attributes:
        names: class names by the ids of their categories.
        pairs: images without labels.
        boxes: of all images in order: x0 y0 x1 y1 in pixels.
        classes: index into `names`, one a box.
        crowd: whether a box is around a crowd.
        ends: for each image, the number of boxes of it and the images before.
    """

    names: tuple[str, ...]
    pairs: index.Pairs
    boxes: Float32[np.ndarray, "m 4"]
    classes: Int32[np.ndarray, " m"]
    crowd: Bool[np.ndarray, " m"]
    ends: Integer[np.ndarray, " n"]

    def of(self, i: int) -> Boxes:
        """The boxes of image `i`."""
        mine = slice(int(self.ends[i - 1]) if i else 0, int(self.ends[i]))
        boxes, classes, crowd = self.boxes[mine].copy(), self.classes[mine].copy(), self.crowd[mine].copy()
        return {"boxes": boxes, "classes": classes, "difficult": np.zeros(len(boxes), bool), "crowd": crowd}


def index_voc(
    tree: storage.Tree,
    parts: Sequence[VocPart],
    classes: tuple[str, ...],
    skip: Collection[str] = (),
    defects: list[Defect] | None = None,
) -> index.Pairs:
    """Pairs images with their XML files and checks both, or recalls the outcome of an earlier check.

    Args:
        tree: the dataset's files.
        parts: what is wanted of them.
        classes: names that objects may have.
        skip: paths of files to leave out with their partners.
        defects: receives what is wrong with files instead of an error; nothing is recalled then.

    Returns:
        The pairs, ordered as listed, without list by path.

    Raises:
        FileNotFoundError: a folder or list does not exist.
        ValueError: missing, unreadable or truncated files, or what `read_voc` refuses; names all of them.
    """

    def make() -> dict[str, np.ndarray]:
        wrong: list[Defect] = []
        pairs = [pair for part in parts for pair in _pair(tree, part, frozenset(skip), wrong)]
        with ThreadPoolExecutor(index.THREADS) as pool:
            checked = list(pool.map(lambda pair: _check_pair(pair[0], pair[1], classes), pairs))
        _report(wrong + [defect for _, found in checked for defect in found], defects)
        if not pairs:
            raise ValueError(f"no images of {os.path.abspath(tree.base)} are left; see its lists, and data.skip")
        images, labels = zip(*pairs, strict=True)
        sizes, fingerprints = index.arrays([header for header, _ in checked])
        return {"images": encoded(images), "labels": encoded(labels), "sizes": sizes, "fingerprints": fingerprints}

    kept = make() if defects is not None else cached(_key("voc", tree, parts, classes, skip), tree.modified, make)
    return index.Pairs(decoded(kept["images"]), decoded(kept["labels"]), kept["sizes"], kept["fingerprints"], tree.passed.told())


def read_voc(path: str, size: tuple[int, int], classes: tuple[str, ...]) -> Boxes:
    """The boxes in an XML file.

    Args:
        path: as `storage.read` takes it.
        size: height and width of the image, pixels.
        classes: names that objects may have, whatever the case of their letters.

    Raises:
        ValueError: a file that does not parse or states another size, or objects of unknown class, without four numbers, of no size, or
            outside the image; names all of them.
    """
    boxes, wrong = _parse_voc(path, size, classes)
    _report(wrong, None)
    return boxes


def index_coco(
    tree: storage.Tree,
    parts: Sequence[CocoPart],
    classes: tuple[str, ...] = (),
    skip: Collection[str] = (),
    defects: list[Defect] | None = None,
) -> CocoBoxes:
    """Reads annotation files and checks them and their images, or recalls the outcome of an earlier check.

    Args:
        tree: the dataset's files.
        parts: what is wanted of them.
        classes: names that categories may have; () for those of the first file, ordered by id.
        skip: paths of images to leave out.
        defects: receives what is wrong with images and their boxes instead of an error; nothing is recalled then.

    Returns:
        Everything, images ordered as listed; without the boxes that have defects.

    Raises:
        FileNotFoundError: a folder or annotation file does not exist.
        ValueError: an annotation file of another form; missing, unreadable or truncated images, sizes other than stated, or boxes of an
            unknown class or image, without four numbers, of no size, or outside the image; names all of them.
    """

    def make() -> dict[str, np.ndarray]:
        wrong: list[Defect] = []
        names, read = classes, []
        for part in parts:
            path = _file(tree, (part.annotations,), part.file)
            try:
                content = json.loads(storage.read(path))
                names = names or tuple(c["name"] for c in sorted(content["categories"], key=lambda c: c["id"]))
                read.append(_read_coco(tree, part, path, content, names, frozenset(skip), wrong))
            except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError, AttributeError) as error:
                raise ValueError(f"{path}: no COCO annotation file ({type(error).__name__}: {error}); fetch it again") from error
        _report(wrong, defects)
        images, arrays = [image for images, _ in read for image in images], [arrays for _, arrays in read]
        if not images:
            raise ValueError(f"no images of {os.path.abspath(tree.base)} are left; see {', '.join(p.file for p in parts)}, and data.skip")
        joined = {key: np.concatenate([array[key] for array in arrays]) for key in arrays[0]}
        return joined | {"images": encoded(images), "names": encoded(names)}

    kept = make() if defects is not None else cached(_key("coco", tree, parts, classes, skip), tree.modified, make)
    pairs = index.Pairs(images := decoded(kept["images"]), [""] * len(images), kept["sizes"], kept["fingerprints"], tree.passed.told())
    return CocoBoxes(tuple(decoded(kept["names"])), pairs, kept["boxes"], kept["classes"], kept["crowd"], kept["counts"].cumsum())


def _key(kind: str, tree: storage.Tree, parts: Sequence[Any], classes: tuple[str, ...], skip: Collection[str]) -> list[Any]:
    place = [tree.base, os.path.realpath(tree.base), tree.exact]
    return [kind, VERSION, place, [dataclasses.astuple(part) for part in parts], classes, sorted(skip)]


def _file(tree: storage.Tree, folders: tuple[str, ...], name: str) -> str:
    """The path of a file in the first of `folders` that exists."""
    return tree.file(folders, name)


def _pair(tree: storage.Tree, part: VocPart, skip: frozenset[str], wrong: list[Defect]) -> list[tuple[str, str]]:
    images, annotations = (
        {stem: path for name, path in tree.files(*folders).items() for stem, end in [os.path.splitext(name)] if end.lower() in suffixes}
        for folders, suffixes in ((part.images, index.IMAGE_SUFFIXES), (part.annotations, (".xml",)))
    )
    stems = sorted(images.keys() | annotations.keys())
    if part.listed:
        path = _file(tree, part.lists, part.listed)
        # A list of a single class says behind each name whether it occurs there.
        stems = list(dict.fromkeys(line.split()[0] for line in storage.composed(storage.read(path).decode()).splitlines() if line.strip()))
        wrong += [
            Defect(path, f" lists {stem}, which is neither an image nor an annotation")
            for stem in stems
            if stem not in images.keys() | annotations.keys()
        ]
    stems = [stem for stem in stems if images.get(stem) not in skip and annotations.get(stem) not in skip]
    wrong += [Defect(images[stem], " has no annotation") for stem in stems if stem in images and stem not in annotations]
    wrong += [Defect(annotations[stem], " has no image") for stem in stems if stem in annotations and stem not in images]
    return [(images[stem], annotations[stem]) for stem in stems if stem in images and stem in annotations]


def _check_pair(image: str, annotation: str, classes: tuple[str, ...]) -> tuple[index.Header, list[Defect]]:
    header, wrong = _look(image)
    return header, wrong or _parse_voc(annotation, header.size, classes)[1]


def _look(image: str) -> tuple[index.Header, list[Defect]]:
    """What the header of an image says, and what is wrong with the file."""
    return index.check_pair((image, ""))


def _parse_voc(path: str, size: tuple[int, int], classes: tuple[str, ...]) -> tuple[Boxes, list[Defect]]:
    """The boxes of a file, and what is wrong in it."""
    wrong: list[str] = []
    try:
        root = ElementTree.fromstring(storage.read(path))
    except (ElementTree.ParseError, LookupError, ValueError) as error:  # also an unknown encoding, an unreadable file
        told = str(error)
        wrong.append(told.removeprefix(path) if told.startswith(path) else f": does not parse as XML ({told})")
        root = ElementTree.Element("annotation")
    h, w = size
    stated = [_number(root.findtext(f"size/{key}") or "0") for key in ("width", "height")]
    if any(stated) and stated != [w, h]:  # some writers state 0x0
        wrong.append(f": says {stated[0]:g}x{stated[1]:g} but its image is {w}x{h}")
    objects, ids = root.findall("object"), {name.lower(): k for k, name in enumerate(classes)}
    names = [(o.findtext("name") or "").strip() for o in objects]
    unknown = [(i, name) for i, name in enumerate(names) if name.lower() not in ids]
    wrong += [f": object {i + 1} has the unknown class {name!r} (known are {', '.join(classes)})" for i, name in unknown]
    corners = [[_number(o.findtext(f"bndbox/{key}")) for key in ("xmin", "ymin", "xmax", "ymax")] for o in objects]
    boxes, misfits = fit(np.array(corners, np.float64).reshape(-1, 4), np.array([size] * len(objects), np.int32).reshape(-1, 2), first=1)
    wrong += [f": object {i + 1} {what}" for i, what in misfits]
    result: Boxes = {
        "boxes": boxes,
        "classes": np.array([ids.get(name.lower(), 0) for name in names], np.int32),
        "difficult": np.array([(o.findtext("difficult") or "").strip() == "1" for o in objects], bool),
        "crowd": np.zeros(len(objects), bool),
    }
    return result, [Defect(path, text) for text in wrong]


def _number(text: str | None) -> float:
    try:
        return float(text or "nan")
    except ValueError:
        return math.nan


def _read_coco(
    tree: storage.Tree,
    part: CocoPart,
    path: str,
    content: dict[str, Any],
    names: tuple[str, ...],
    skip: frozenset[str],
    wrong: list[Defect],
) -> tuple[list[str], dict[str, np.ndarray]]:
    """The images of a file, and their sizes, boxes and numbers of boxes; notes what is wrong."""
    files, folder, file = tree.files(part.images), tree.places(part.images)[0], os.path.basename(path)
    names_of = {e["id"]: e["file_name"].removeprefix(part.start) for e in content["images"] if e["file_name"].startswith(part.start)}
    images = {i: files.get(storage.composed(name), os.path.join(folder, name)) for i, name in names_of.items()}
    images = {i: image for i, image in images.items() if image not in skip}
    with ThreadPoolExecutor(index.THREADS) as pool:
        looked = dict(zip(images, pool.map(_look, images.values()), strict=True))
    for e in content["images"]:
        header, found = looked.get(e["id"], (index.Header(e["height"], e["width"], 0), []))
        (h, w) = header.size
        if not found and (w, h) != (e["width"], e["height"]):
            found.append(Defect(images[e["id"]], f" is {w}x{h} but {file} says {e['width']}x{e['height']}"))
        wrong += found
    sizes, fingerprints = index.arrays([header for header, _ in looked.values()])

    ids = {c["id"]: names.index(c["name"]) if c["name"] in names else -1 for c in content["categories"]}
    known, place = {e["id"] for e in content["images"]}, {image_id: i for i, image_id in enumerate(images)}
    rows: list[tuple[int, int, bool, list[float]]] = []  # image, class, crowd, corners
    told: list[dict[str, Any]] = []  # which annotation a row is of
    name = lambda a, what: Defect(images[a["image_id"]], f": annotation {a['id']} of {file} {what}")
    for a in content["annotations"]:
        image_id, k = a["image_id"], ids.get(a["category_id"], -1)
        if image_id not in known:
            wrong.append(Defect(path, f": annotation {a['id']} is of image {image_id}, which is not listed"))
        elif image_id not in images or looked[image_id][1]:
            continue
        elif k < 0:
            wrong.append(name(a, f"has the unknown class {a['category_id']} (known are {', '.join(names)})"))
        else:
            numbers = isinstance(b := a["bbox"], list) and len(b) == 4 and all(isinstance(v, int | float) for v in b)
            x, y, w, h = b if numbers else [math.nan] * 4
            rows.append((place[image_id], k, bool(a.get("iscrowd", 0)), [x, y, x + w, y + h]))
            told.append(a)
    owner, classes = (np.array([row[k] for row in rows], np.int32) for k in (0, 1))
    boxes, misfits = fit(np.array([row[3] for row in rows], np.float64).reshape(-1, 4), sizes[owner], first=0)
    wrong += [name(told[i], what) for i, what in misfits]
    order = np.argsort(owner, kind="stable")
    order = order[~np.isin(order, [i for i, _ in misfits])]
    return list(images.values()), {
        "sizes": sizes,
        "fingerprints": fingerprints,
        "counts": np.bincount(owner[order], minlength=len(images)),
        "boxes": boxes[order],
        "classes": classes[order],
        "crowd": np.array([row[2] for row in rows], bool)[order],
    }


def fit(
    corners: Float[np.ndarray, "n 4"], sizes: Integer[np.ndarray, "n 2"], *, first: int
) -> tuple[Float32[np.ndarray, "n 4"], list[tuple[int, str]]]:
    """Boxes from corners as they are written.

    Args:
        corners: smallest and largest x and y; the largest pixel is part of the box if pixels count from 1.
        sizes: height and width of the image, one a box.
        first: number of the first pixel, 0 or 1.

    Returns:
        x0 y0 x1 y1 in pixels, clipped to the image; and the rows and faults of those that are no box or more than one pixel outside.
    """
    limits = sizes[:, ::-1]
    with np.errstate(all="ignore"):  # a file may hold any number
        low, high = (corners[:, :2] - first).astype(np.float32), corners[:, 2:].astype(np.float32)
        boxes = np.concatenate([low.clip(0, limits), high.clip(0, limits)], 1, dtype=np.float32)
        positive = np.min(high - low, axis=1) > 0
        inside = np.min(np.concatenate([corners[:, :2] >= -1, corners[:, 2:] <= limits + 1, boxes[:, 2:] > boxes[:, :2]], 1), axis=1)
    wrong = []
    for i in np.flatnonzero(~(positive & inside)).tolist():
        (x0, y0, x1, y1), (h, w) = corners[i].tolist(), sizes[i].tolist()
        if not np.isfinite(corners[i]).all():
            what = "has no box of four numbers"
        elif not positive[i]:
            what = f"has a box of {x1 - x0 + first:g}x{y1 - y0 + first:g} pixels"
        else:
            what = f"has a box outside the image (x {x0:g} to {x1:g}, y {y0:g} to {y1:g} of {w}x{h})"
        wrong.append((i, what))
    return boxes, wrong


def _report(wrong: Sequence[Defect], defects: list[Defect] | None, limit: int = 10) -> None:
    """Adds to the defects, or raises an error where there is no such list."""
    if defects is not None:
        defects += wrong
    elif wrong:
        more = f"; and {len(wrong) - limit} more ({len(wrong)} in all)" if len(wrong) > limit else ""
        told = "; ".join(path + text for path, text in wrong[:limit])
        raise ValueError(f"{told}{more}; correct these files, or leave them out with data.skip")
