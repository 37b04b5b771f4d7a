"""Boxes in annotation files: VOC's XML or YOLO's text, one file an image, and COCO's JSON.

All are checked before a run begins, in parallel, and the outcome is kept (see `cache.py`), so later
runs touch neither the images nor their files. A JSON file is kept parsed, because parsing COCO's
takes long. The file of an image is parsed and checked again whenever the image is read, so that
corrections count. Coordinates up to one pixel beyond the image are clipped, because writers
disagree whether pixels count from 0 or 1. Any other fault is refused with its path and the number
of the object or line. `voc_xml.py`, `yolo_txt.py` and `coco_json.py` say what files of either form
may hold.
"""

from collections.abc import Collection, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
import dataclasses
import os
import posixpath
import types
from typing import Any

from jaxtyping import Bool, Float32, Int32, Integer
import numpy as np

from jaxdg.data import coco_json, index, storage, voc_xml, yolo_txt
from jaxdg.data.box_fields import Boxes
from jaxdg.data.cache import cached, decoded, encoded
from jaxdg.data.coco_json import CocoPart
from jaxdg.data.index import Defect
from jaxdg.data.tree import Tree

VERSION = 8  # of the kept arrays
FLAGS = ("-1", "0", "1")  # behind a name in the list of a single class: absent, difficult, present


@dataclasses.dataclass(frozen=True)
class FilesPart:
    """Images with a file each: VOC's XML or YOLO's text, whichever the folder holds.

    Folders are relative to the dataset's. They are alternatives, of which the first that exists
    counts.

    Attributes:
        images: image folder.
        annotations: folder of the annotation files.
        lists: folder of the lists of images; none if empty.
        listed: the list that counts, one name without extension a line; all images if empty.
    """

    images: tuple[str, ...]
    annotations: tuple[str, ...]
    lists: tuple[str, ...] = ()
    listed: str = ""


@dataclasses.dataclass(frozen=True)
class CocoBoxes:
    """The content of COCO annotation files.

    Attributes:
        names: class names by the ids of their categories.
        pairs: images without labels.
        boxes: of all images in order: x0 y0 x1 y1 in pixels.
        classes: index into `names`, one a box.
        difficult: whether a box is marked as difficult.
        crowd: whether a box is around a crowd.
        areas: square pixels of the object in a box, as the file says, else of the box.
        ends: for each image, the number of boxes of it and the images before.
    """

    names: tuple[str, ...]
    pairs: index.Pairs
    boxes: Float32[np.ndarray, "m 4"]
    classes: Int32[np.ndarray, " m"]
    difficult: Bool[np.ndarray, " m"]
    crowd: Bool[np.ndarray, " m"]
    areas: Float32[np.ndarray, " m"]
    ends: Integer[np.ndarray, " n"]

    def of(self, i: int) -> Boxes:
        """The boxes of image `i`."""
        mine = slice(int(self.ends[i - 1]) if i else 0, int(self.ends[i]))
        return {
            key: getattr(self, key)[mine].copy()
            for key in ("boxes", "classes", "difficult", "crowd", "areas")
        }


def index_files(
    tree: Tree,
    parts: Sequence[FilesPart],
    classes: tuple[str, ...],
    skip: Collection[str] = (),
    defects: list[Defect] | None = None,
) -> tuple[index.Pairs, Int32[np.ndarray, " n"]]:
    """Pairs images with their annotation files and checks both, or recalls an earlier check.

    Args:
        tree: the dataset's files.
        parts: the images and their files.
        classes: names that objects may have, in YOLO's files by their ids.
        skip: paths of files to leave out with their partners.
        defects: receives the faults of files, which then are no errors; nothing is recalled.

    Returns:
        The pairs, ordered as listed, without list by path; and the number of boxes of each. An
        image of YOLO's without a file has no boxes, and "" for the path of its file.

    Raises:
        FileNotFoundError: a folder or list does not exist.
        ValueError: missing, unreadable or truncated files, several of one name, lines of a list
            that name no image, or what `read_file` refuses; names all of them. Or classes that are
            told apart only by the case of their letters, a folder with files of both forms, or one
            of YOLO's in which no image has a file.
    """
    lower = [name.lower() for name in classes]
    if twice := [name for name in classes if lower.count(name.lower()) > 1]:
        raise ValueError(
            f"the classes {', '.join(twice)} differ in the case of their letters alone, which VOC's"
            " files do not; rename one"
        )

    def make() -> dict[str, np.ndarray]:
        wrong: list[Defect] = []
        lists: list[str] = []
        pairs: list[tuple[str, str]] = []
        for part in parts:
            pairs += _pair(tree, part, classes, frozenset(skip), wrong, lists)
        with ThreadPoolExecutor(index.THREADS) as pool:
            checked = list(pool.map(lambda pair: _check_pair(pair[0], pair[1], classes), pairs))
        wrong += [defect for *_, found in checked for defect in found]
        report(wrong, defects, lists)
        if not pairs:
            raise ValueError(
                f"no images of {os.path.abspath(tree.base)} are left; see its lists, and data.skip"
            )
        images, labels = zip(*pairs, strict=True)
        sizes, fingerprints = index.arrays([header for header, *_ in checked])
        counts = np.array([count for _, count, *_ in checked], np.int32)
        return {
            "images": encoded(images),
            "labels": encoded(labels),
            "sizes": sizes,
            "fingerprints": fingerprints,
            "counts": counts,
            "notes": encoded(_misnamed(pairs, [said for *_, said, _ in checked]) + _bare(pairs)),
        }

    key = cache_key("files", tree, parts, classes, skip)
    arrays = cached(key, tree.modified, make) if defects is None else make()
    notes = (*tree.skipped.notes(), *decoded(arrays["notes"]))
    texts = decoded(arrays["images"]), decoded(arrays["labels"])
    pairs = index.Pairs(*texts, arrays["sizes"], arrays["fingerprints"], notes)
    return pairs, arrays["counts"]


def read_file(path: str, size: tuple[int, int], classes: tuple[str, ...]) -> Boxes:
    """The boxes in a file of VOC's or YOLO's.

    Args:
        path: as `storage.read` takes it; "" for an image of YOLO's without a file.
        size: height and width of the image, pixels.
        classes: names that objects may have, whatever the case of their letters; in YOLO's files by
            their ids.

    Raises:
        ValueError: a file that does not parse, is of another form or states another size, or
            objects of unknown class, without a name or one box of four numbers, of no size, or
            outside the image; names all of them.
    """
    boxes, _, wrong = _form(path).read(path, size, classes)
    report(wrong, None)
    return boxes


def index_coco(
    tree: Tree,
    parts: Sequence[CocoPart],
    classes: tuple[str, ...] = (),
    skip: Collection[str] = (),
    defects: list[Defect] | None = None,
) -> CocoBoxes:
    """Reads and checks annotation files and their images, or recalls an earlier check.

    Args:
        tree: the dataset's files.
        parts: the images and their JSON files.
        classes: names that categories may have; () for those of the first file, ordered by id.
        skip: paths of images to leave out.
        defects: receives the faults of images and their boxes, which then are no errors; nothing is
            recalled.

    Returns:
        All images in the order of the lists, without the boxes that have defects.

    Raises:
        FileNotFoundError: a folder or annotation file does not exist.
        ValueError: an annotation file of another form; entries that lack a key or share an id or a
            name; missing, unreadable or truncated images, sizes other than stated, or boxes of an
            unknown class or image, without four numbers, of no size, outside the image, or with
            flags and areas that are none; names all of them.
    """

    def make() -> dict[str, np.ndarray]:
        wrong: list[Defect] = []
        names = classes
        read = []
        for part in parts:
            path = tree.file((part.annotations,), part.file)
            content = coco_json.load(path)
            names = names or coco_json.category_names(content)
            options: dict[str, Any] = {"names": names, "look": look_at, "wrong": wrong}
            options["skip"] = frozenset(skip)
            read.append(coco_json.read(tree, part, path, content, **options))
        report(wrong, defects)
        images = [image for images, _ in read for image in images]
        arrays = [arrays for _, arrays in read]
        if not images:
            raise ValueError(
                f"no images of {os.path.abspath(tree.base)} are left; see"
                f" {', '.join(p.file for p in parts)}, and data.skip"
            )
        joined = {key: np.concatenate([array[key] for array in arrays]) for key in arrays[0]}
        return joined | {"images": encoded(images), "names": encoded(names)}

    key = cache_key("coco", tree, parts, classes, skip)
    arrays = cached(key, tree.modified, make) if defects is None else make()
    images = decoded(arrays["images"])
    notes = tree.skipped.notes()
    labels = [""] * len(images)
    pairs = index.Pairs(images, labels, arrays["sizes"], arrays["fingerprints"], notes)
    fields = {key: arrays[key] for key in ("boxes", "classes", "difficult", "crowd", "areas")}
    names = tuple(decoded(arrays["names"]))
    return CocoBoxes(names=names, pairs=pairs, **fields, ends=arrays["counts"].cumsum())


def cache_key(
    kind: str, tree: Tree, parts: Sequence[Any], classes: Any, skip: Collection[str]
) -> list[Any]:
    """Identifies the outcome of a check, for `cached`; `classes` is any JSON value."""
    place = [tree.base, os.path.realpath(tree.base), tree.exact]
    wanted = [dataclasses.astuple(part) for part in parts]
    return [kind, VERSION, place, wanted, classes, sorted(skip)]


def _form(path: str) -> types.ModuleType:
    """The reader of an annotation file; "" is one of YOLO's that does not exist."""
    return voc_xml if path.lower().endswith(".xml") else yolo_txt


def _annotations(
    tree: Tree, part: FilesPart, images: Collection[str], classes: Sequence[str]
) -> tuple[dict[str, list[str]], bool]:
    """The annotation files by the names that they share with images, and whether they are YOLO's.

    A text file beside XML files that shares the name of no image is something else.

    Raises:
        ValueError: there are both forms, or classes in another order than `classes`.
    """
    xml = _by_stem(tree, part.annotations, (".xml",))
    texts = _by_stem(tree, part.annotations, (".txt",))
    names = [stem for stem in texts if f"{posixpath.basename(stem)}.txt" == yolo_txt.NAMES]
    named = [path for stem in names for path in texts.pop(stem)]
    if not xml:
        for path in named:
            yolo_txt.check_names(path, classes)
        return texts, bool(texts)
    if both := sorted(texts.keys() & set(images)):
        raise ValueError(
            f"{texts[both[0]][0]} and {next(iter(xml.values()))[0]} are annotations of two forms,"
            " YOLO's and VOC's; which count is not known: keep one form in the folder"
        )
    return xml, False


def _pair(
    tree: Tree,
    part: FilesPart,
    classes: Sequence[str],
    skip: frozenset[str],
    wrong: list[Defect],
    lists: list[str],
) -> list[tuple[str, str]]:
    """The images and annotation files of a part; adds to the defects and to the lists it read."""
    images = _by_stem(tree, part.images, index.IMAGE_SUFFIXES)
    annotations, is_yolo = _annotations(tree, part, images, classes)
    if part.listed:
        lists.append(tree.file(part.lists, part.listed))
        stems = _listed(lists[-1], images, annotations, wrong)
    else:
        stems = sorted(images.keys() | annotations.keys())
    pairs = []
    for stem in stems:
        found = [files.get(stem, []) for files in (images, annotations)]
        mine, theirs = ([path for path in paths if path not in skip] for paths in found)
        if any(paths and not left for paths, left in zip(found, (mine, theirs), strict=True)):
            continue
        for paths in (mine, theirs):
            if len(paths) > 1:
                wrong.append(Defect(paths[0], f" and {paths[1]} have one name; keep one of them"))
        if not theirs and is_yolo:
            pairs.append((mine[0], ""))
        elif not theirs:
            wrong.append(Defect(mine[0], " has no annotation"))
        elif not mine:
            wrong.append(Defect(theirs[0], " has no image"))
        else:
            pairs.append((mine[0], theirs[0]))
    if pairs and not any(label for _, label in pairs):
        folder = os.path.abspath(tree.places(*part.annotations)[0])
        wrong.append(
            Defect(folder, f" has a text file for none of {len(pairs)} images, so nothing is known")
        )
    return pairs


def _by_stem(
    tree: Tree, folders: tuple[str, ...], suffixes: tuple[str, ...]
) -> dict[str, list[str]]:
    """The files below a folder by their relative paths without extension."""
    found: dict[str, list[str]] = {}
    for name, path in sorted(tree.files(*folders).items()):
        stem, end = os.path.splitext(name)
        if end.lower() in suffixes:
            found.setdefault(stem, []).append(path)
    return found


def _listed(
    path: str,
    images: Mapping[str, Sequence[str]],
    annotations: Mapping[str, Sequence[str]],
    wrong: list[Defect],
) -> list[str]:
    """The names in a list, each once; adds a defect for each line that names no file.

    A line is a name, with or without extension. A name may hold spaces, and a flag of `FLAGS` may
    follow it; all flags say that the image belongs to the list. Empty lines do not count, nor do
    lines that begin with # and name no file.
    """
    try:
        lines = storage.composed(storage.read(path).decode("utf-8-sig")).splitlines()
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{path} is no text in UTF-8 ({error.reason} at byte {error.start}); save it as that"
        ) from error
    stems: list[str] = []
    for number, line in enumerate(map(str.strip, lines), start=1):
        name, _, last = line.rpartition(" ") if " " in line else line.rpartition("\t")
        stem = _stem(line, images, annotations)
        if stem is None and last in FLAGS:
            stem = _stem(name.strip(), images, annotations)
        if stem is not None:
            stems.append(stem)
        elif line and not line.startswith("#"):
            text = f": line {number} lists {line}, which is neither an image nor an annotation"
            wrong.append(Defect(path, text))
    return list(dict.fromkeys(stems))


def _stem(
    name: str, images: Mapping[str, Sequence[str]], annotations: Mapping[str, Sequence[str]]
) -> str | None:
    """The path without extension of the file that a name in a list means, if there is one."""
    if not name:
        return None
    plain = posixpath.normpath(name.replace("\\", "/"))
    for spelt in (name, plain):
        if spelt in images or spelt in annotations:
            return spelt
    stem, _ = os.path.splitext(plain)
    own = [*images.get(stem, ()), *annotations.get(stem, ())]
    return stem if any(os.path.basename(path) == os.path.basename(plain) for path in own) else None


def _check_pair(
    image: str, annotation: str, classes: tuple[str, ...]
) -> tuple[index.Header, int, str, list[Defect]]:
    """The header, the number of boxes, the image named in the annotation, and the defects."""
    header, wrong = look_at(image)
    boxes, said, found = _form(annotation).read(annotation, header.size, classes)
    return header, len(boxes["boxes"]), said, wrong or found


def _misnamed(pairs: Sequence[tuple[str, str]], said: Sequence[str]) -> tuple[str, ...]:
    """A line about annotations that name another image of the dataset in their <filename>.

    Such files may have been renamed or mixed up.
    """
    stems = [os.path.splitext(os.path.basename(image))[0] for image, _ in pairs]
    known = set(stems)
    others = [i for i, name in enumerate(said) if name != stems[i] and name in known]
    if not others:
        return ()
    image, annotation = pairs[others[0]]
    name = said[others[0]]
    line = (
        f"{len(others)} of {len(pairs)} annotations name another image than their own in"
        f" <filename>, such as {annotation} with {name}; they count for the image of their own"
        f" name, {os.path.basename(image)} there: look whether files were mixed up"
    )
    return (line,)


def _bare(pairs: Sequence[tuple[str, str]]) -> tuple[str, ...]:
    """A line about images without a file, which count as images without boxes."""
    bare = [image for image, annotation in pairs if not annotation]
    if not bare:
        return ()
    has = "has" if len(bare) == 1 else "have"
    line = f"{len(bare)} of {len(pairs)} images {has} no text file and so no boxes, as {bare[0]}"
    return (line,)


def look_at(image: str) -> tuple[index.Header, list[Defect]]:
    """The header of an image, and the defects of the file."""
    return index.check_pair((image, ""), boxes=True)


def report(
    wrong: Sequence[Defect],
    defects: list[Defect] | None,
    lists: Collection[str] = (),
    limit: int = 10,
) -> None:
    """Adds to the defects, or raises an error if there is no list of them.

    `lists` are files about many images beside JSON files, as lists of their names.
    """
    if defects is not None:
        defects += wrong
    elif wrong:
        count = len(wrong)
        more = f"; and {count - limit} more ({count} in all)" if count > limit else ""
        told = "; ".join(path + text for path, text in wrong[:limit])
        # A file about many images cannot be left out.
        listing = all(path.lower().endswith(".json") or path in lists for path, _ in wrong)
        remedy = "the file" if listing else "these files, or leave them out with data.skip"
        raise ValueError(f"{told}{more}; correct {remedy}")
