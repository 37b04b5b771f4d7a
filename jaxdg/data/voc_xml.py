"""VOC's XML files: one `annotation`, with an `object` of a `name` and a `bndbox` for every thing.

The case and the namespace of tags do not matter. Where VOC's form is ambiguous the file is refused:
a guess could give a box in the wrong place, a wrong class, or an image without objects.
"""

from collections import Counter
from collections.abc import Sequence
import math
import os
from xml.etree import ElementTree

import numpy as np

from jaxdg.data import storage
from jaxdg.data.box_fields import Boxes, areas_of, fit, flag
from jaxdg.data.index import Defect

CORNERS = ("xmin", "ymin", "xmax", "ymax")


def read(
    path: str, size: tuple[int, int], classes: Sequence[str]
) -> tuple[Boxes, str, list[Defect]]:
    """The boxes of a file, the name in its <filename>, and its defects.

    Args:
        path: as `storage.read` takes it.
        size: height and width of the image, pixels.
        classes: names that objects may have, whatever the case of their letters.

    Returns:
        The boxes; the name, without folder and extension, of the image that the file says they
        belong to; the defects.
    """
    wrong: list[str] = []
    try:
        root = _root(path)
    except ValueError as error:
        wrong.append(str(error).removeprefix(path))
        root = ElementTree.Element("annotation")
    wrong += _size_fault(root, size)
    objects = root.findall("object")
    wrong += _misplaced(root, objects)
    numbered = list(enumerate(objects, start=1))
    wrong += [f": object {i} {fault}" for i, thing in numbered for fault in _object_faults(thing)]
    ids = {name.lower(): k for k, name in enumerate(classes)}
    names = [_text(thing, "name") for thing in objects]
    known = f"known are {', '.join(classes)}"
    for i, name in enumerate(names, start=1):
        if name and name.lower() not in ids:
            wrong.append(f": object {i} has the unknown class {name!r} ({known})")
    corners = [[_number(thing.findtext(f"bndbox/{key}")) for key in CORNERS] for thing in objects]
    sizes = np.array([size] * len(objects), np.int32).reshape(-1, 2)
    boxes, misfits = fit(np.array(corners, np.float64).reshape(-1, 4), sizes, first=1)
    for i, what in misfits:
        if objects[i].find("bndbox") is not None:
            wrong.append(f": object {i + 1} {what}{_bad_corner(objects[i])}")
    difficult = [flag(thing.findtext("difficult")) or False for thing in objects]
    result: Boxes = {
        "boxes": boxes,
        "classes": np.array([ids.get(name.lower(), 0) for name in names], np.int32),
        "difficult": np.array(difficult, bool),
        "crowd": np.zeros(len(objects), bool),
        "areas": areas_of(boxes),
    }
    said, _ = os.path.splitext(_text(root, "filename").replace("\\", "/").rpartition("/")[2])
    return result, said, [Defect(path, text) for text in wrong]


def _root(path: str) -> ElementTree.Element:
    """The parsed file, its tags in lower case and without namespaces.

    Raises:
        ValueError: it is not readable, not XML, or the XML of something else; the message begins
            with the path.
    """
    data = storage.read(path)
    try:
        root = ElementTree.fromstring(data)
    except (ElementTree.ParseError, LookupError, ValueError) as error:  # also an unknown encoding
        raise ValueError(f"{path}: does not parse as XML ({error})") from error
    for element in root.iter():
        element.tag = element.tag.rpartition("}")[2].lower()
    if root.tag != "annotation":
        raise ValueError(
            f"{path} is no file of VOC's: it begins with <{root.tag}> instead of <annotation>"
        )
    return root


def _size_fault(root: ElementTree.Element, size: tuple[int, int]) -> list[str]:
    h, w = size
    stated = [_number(root.findtext(f"size/{key}") or "0") for key in ("width", "height")]
    if not any(stated) or stated == [w, h]:  # some writers state 0x0
        return []
    turned = ""
    if stated == [h, w]:
        turned = "; they are swapped, or the image was turned after it was annotated"
    return [f": says {stated[0]:g}x{stated[1]:g} but its image is {w}x{h}{turned}"]


def _misplaced(root: ElementTree.Element, objects: Sequence[ElementTree.Element]) -> list[str]:
    """Objects and boxes in the wrong place, which would otherwise be ignored."""
    own = sum(len(thing.findall("bndbox")) for thing in objects)
    of_parts = sum(len(thing.findall("part/bndbox")) for thing in objects)
    if sum(1 for _ in root.iter("object")) > len(objects):
        return [": holds an <object> that is not directly in <annotation>"]
    if sum(1 for _ in root.iter("bndbox")) > own + of_parts:
        return [": holds a <bndbox> that is not directly in an <object>"]
    return []


def _object_faults(thing: ElementTree.Element) -> list[str]:
    tags = Counter(child.tag for child in thing)
    faults = [
        f"has {tags[key]} <{key}>; which one counts is not known"
        for key in ("name", "bndbox", "difficult")
        if tags[key] > 1
    ]
    if not _text(thing, "name"):
        faults.append("has no name")
    frame = thing.find("bndbox")
    if frame is None:
        others = [key for key in tags if key in ("polygon", "robndbox", "segm", "part")]
        faults.append(f"has no <bndbox>{', only <' + others[0] + '>' if others else ''}")
    elif len(frame.findall("*")) > len({child.tag for child in frame}):
        faults.append("has a <bndbox> that states one of its corners twice")
    said = thing.findtext("difficult")
    if flag(said) is None:
        faults.append(f"has a <difficult> of {said!r}, which is neither yes (1) nor no (0)")
    return faults


def _bad_corner(thing: ElementTree.Element) -> str:
    """The first corner of an object that is not a number."""
    for key in CORNERS:
        said = thing.findtext(f"bndbox/{key}")
        if not math.isfinite(_number(said)):
            return f" ({key} is {said!r})" if said else f" (no {key})"
    return ""


def _text(element: ElementTree.Element, tag: str) -> str:
    return (element.findtext(tag) or "").strip()


def _number(text: str | None) -> float:
    try:
        return float(text) if text and "_" not in text else math.nan
    except ValueError:
        return math.nan
