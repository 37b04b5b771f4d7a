"""YOLO's text files: a line `class x_center y_center width height` for every object.

The numbers are parts of the image's width and height, 0 to 1. A line of more numbers is an outline,
`class x1 y1 x2 y2 ..`, and its box is around its points. As Ultralytics has it, of lines with one
class and one box the first counts, and an image without a file shows no object. It differs from
Ultralytics in two things. The order of lines is kept. In a file that has outlines too, a line of
five numbers is still a box, as Ultralytics' own converter from COCO writes it, where its reader
takes the four numbers for two points.
"""

from collections.abc import Sequence
import math

import numpy as np

from jaxdg.data import storage
from jaxdg.data.box_fields import Boxes, areas_of, fit
from jaxdg.data.index import Defect

NAMES = "classes.txt"  # where labelling tools write the names of the classes, one a line


def read(
    path: str, size: tuple[int, int], classes: Sequence[str]
) -> tuple[Boxes, str, list[Defect]]:
    """The boxes of a file, an empty text, and its defects; as `voc_xml.read`.

    Args:
        path: as `storage.read` takes it; "" for an image without a file.
        size: height and width of the image, pixels.
        classes: names of the classes by their ids.

    Returns:
        The boxes; "", as these files do not say which image they belong to; the defects.
    """
    wrong: list[str] = []
    found: dict[tuple[float, ...], tuple[int, int, list[float]]] = {}
    for number, said in _lines(path, wrong) if path else ():
        corners, fault = _corners(said, size, classes)
        if fault:
            wrong.append(f": line {number} {fault}")
            continue
        class_id = int(float(said[0]))
        key = (class_id, *np.array(corners, np.float32).tolist())
        found.setdefault(key, (number, class_id, corners))
    numbers = [number for number, *_ in found.values()]
    corners = np.array([row for *_, row in found.values()], np.float64).reshape(-1, 4)
    sizes = np.array([size] * len(found), np.int32).reshape(-1, 2)
    boxes, misfits = fit(corners, sizes, first=0)
    wrong += [f": line {numbers[i]} {what}" for i, what in misfits]
    none = np.zeros(len(found), bool)
    result: Boxes = {
        "boxes": boxes,
        "classes": np.array([class_id for _, class_id, _ in found.values()], np.int32),
        "difficult": none,
        "crowd": none.copy(),
        "areas": areas_of(boxes),
    }
    return result, "", [Defect(path, text) for text in wrong]


def check_names(path: str, classes: Sequence[str]) -> None:
    """Holds the classes against those in a labelling tool's `classes.txt`.

    Other names there are no error, as tools list what they know.

    Args:
        path: of the file.
        classes: names of the classes by their ids.

    Raises:
        ValueError: the file has the same names in another order.
    """
    lines = storage.read(path).decode("utf-8-sig", errors="replace").splitlines()
    theirs = [name for line in lines if (name := line.strip().lower())]
    mine = [name.lower() for name in classes]
    if theirs != mine and sorted(theirs) == sorted(mine):
        raise ValueError(
            f"{path} has the classes of data.boxes.classes in another order,"
            f" {', '.join(theirs)}; the ids in the files beside it are by that order: change"
            " data.boxes.classes, or move the file away if it is not so"
        )


def _lines(path: str, wrong: list[str]) -> list[tuple[int, list[str]]]:
    """The words of every line that is not empty, with its number."""
    try:
        text = storage.read(path).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        wrong.append(f" is no text in UTF-8 ({error.reason} at byte {error.start})")
        return []
    except ValueError as error:
        wrong.append(str(error).removeprefix(path))
        return []
    lines = enumerate(text.splitlines(), start=1)
    return [(number, line.split()) for number, line in lines if line.strip()]


def _corners(
    said: Sequence[str], size: tuple[int, int], classes: Sequence[str]
) -> tuple[list[float], str]:
    """x0 y0 x1 y1 in pixels of the words in a line; and the reason if they are no object."""
    values = [_number(word) for word in said]
    if fault := _form_fault(said, values) or _class_fault(said[0], values[0], classes):
        return [], fault
    h, w = size
    is_box = len(values) == 5
    for i, value in enumerate(values[1:], start=1):
        side = w if i % 2 else h
        # A box from one pixel outside to one pixel outside has two pixels more than the image.
        beyond = 2 if is_box and i > 2 else 1
        if not -1 <= value * side <= side + beyond:
            return [], (
                f"has the value {said[i]}, which is not normalised: allowed are 0 to 1, parts of"
                " the image's width or height"
            )
    across, down = np.array(values[1::2]) * w, np.array(values[2::2]) * h
    if is_box:
        x, wide = across.tolist()
        y, high = down.tolist()
        return [x - wide / 2, y - high / 2, x + wide / 2, y + high / 2], ""
    return [float(v) for v in (across.min(), down.min(), across.max(), down.max())], ""


def _form_fault(said: Sequence[str], values: Sequence[float]) -> str:
    if len(values) == 6:
        return (
            "has six numbers, as a prediction with its score has; name the folder of the labels,"
            " or take the last number off every line"
        )
    if len(values) < 5 or len(values) % 2 == 0:
        return (
            f"has {len(values)} words; a line is a class and x y width height, or a class and x y"
            " of three or more points"
        )
    for word, value in zip(said, values, strict=True):
        if not math.isfinite(value):
            return f"has {word!r}, which is no number"
    return ""


def _class_fault(word: str, value: float, classes: Sequence[str]) -> str:
    if value.is_integer() and 0 <= value < len(classes):
        return ""
    names = ", ".join(f"{k} {name}" for k, name in enumerate(classes))
    return f"has the class {word}; known are {names}"


def _number(word: str) -> float:
    try:
        return float(word) if "_" not in word else math.nan
    except ValueError:
        return math.nan
