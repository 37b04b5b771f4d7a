"""Boxes around the instances of label images, tight around an object's visible pixels.

Their classes are the eight things of `CITYSCAPES`. Pixels of a thing that belong to no instance are
a crowd, one box a class.
"""

from collections.abc import Callable

from jaxtyping import Float32, Integer
import numpy as np

from jaxdg.data.box_fields import Boxes
from jaxdg.data.images import read_channels
from jaxdg.data.labels import CITYSCAPES_IDS, SYNTHIA_IDS

FIRST = 11
COUNT = 8  # train ids of the things: person, rider, car, truck, bus, train, motorcycle, bicycle
# Type and name of a label image by its number of channels.
FORMS = {1: (np.uint16, "16-bit grey"), 3: (np.uint16, "16-bit RGB"), 4: (np.uint8, "8-bit RGBA")}


def read(path: str, channels: int) -> np.ndarray:
    """Decodes a label image.

    Args:
        path: as `storage.read` takes it.
        channels: a key of `FORMS`.

    Returns:
        [h, w], or [h, w, channels] in the order blue, green, red, alpha.

    Raises:
        ValueError: the file is unreadable, truncated, damaged or of another form; names it.
    """
    dtype, form = FORMS[channels]
    label = read_channels(path)
    if label.dtype != dtype or label.shape[2:] != ((channels,) if channels > 1 else ()):
        raise ValueError(
            f"{path}: a label with instances must be a {form} image; use the instance files"
        )
    return label


def cityscapes(label: Integer[np.ndarray, "h w"], path: str) -> Boxes:
    """Boxes of `*_gtFine_instanceIds.png`.

    The value of an instance is class id * 1000 + number, that of a crowd the class id.

    Args:
        label: as read.
        path: of the file.
    """
    ids, boxes, areas = extents(np.where(label >= min(THING_IDS), label, 0))
    table = np.full(65536, -1, np.int32)
    table[list(THING_IDS)] = list(THING_IDS.values())
    return _boxes(boxes, areas, table[np.where(ids >= 1000, ids // 1000, ids)], ids < 1000)


def bdd100k(label: Integer[np.ndarray, "h w 4"], path: str) -> Boxes:
    """Boxes of a bitmask.

    Its channels red, green, blue, alpha hold category (from 1), attributes (1 ignored, 2 crowd, ..)
    and two bytes of instance id. An ignored instance is marked as a crowd, as neither counts.

    Args:
        label: as read.
        path: of the file, for the error.

    Raises:
        ValueError: a category outside 0 to 8.
    """
    if (red := label[..., 2]).max() > COUNT:
        raise ValueError(
            f"{path}: holds category {red.max()}; allowed are 0 to {COUNT}; fetch the file again"
        )
    # From the highest byte down: alpha, red, green, blue.
    words = np.ascontiguousarray(label).view("<u4")[..., 0]
    ids, boxes, areas = extents(np.where(red > 0, words, 0))
    return _boxes(boxes, areas, (ids >> 16 & 255).astype(np.int32) - 1, (ids >> 8 & 3) > 0)


def synthia(label: Integer[np.ndarray, "h w 3"], path: str) -> Boxes:
    """Boxes of a label of SYNTHIA: the class in red, the number of the instance in green.

    Args:
        label: as read.
        path: of the file, for the error.

    Raises:
        ValueError: a class outside 0 to 22.
    """
    green = label[..., 1].astype(np.int64)
    red = label[..., 2]
    if red.max() > 22:
        raise ValueError(
            f"{path}: holds class {red.max()}; allowed are 0 to 22; fetch the file again"
        )
    table = np.full(23, -1, np.int64)
    table[list(SYNTHIA_IDS)] = [train - FIRST for train in SYNTHIA_IDS.values()]
    thing = table[red]
    ids, boxes, areas = extents(np.where(thing >= 0, thing + 1 << 16 | green, 0))
    return _boxes(boxes, areas, (ids >> 16) - 1, ids & 65535 == 0)


THING_IDS = {i: train - FIRST for i, train in CITYSCAPES_IDS.items() if train >= FIRST}
# By dataset: the number of channels of its label images, and the function that reads them.
READERS: dict[str, tuple[int, Callable[[np.ndarray, str], Boxes]]] = {
    "cityscapes": (1, cityscapes),
    "bdd100k": (4, bdd100k),
    "synthia": (3, synthia),
}


def extents(
    ids: Integer[np.ndarray, "h w"],
) -> tuple[Integer[np.ndarray, " n"], Float32[np.ndarray, "n 4"], Float32[np.ndarray, " n"]]:
    """Tight boxes around the pixels of each id, and the number of these pixels.

    Args:
        ids: 0 where there is nothing.

    Returns:
        The ids in ascending order, x0 y0 x1 y1 in pixels of each, and the number of its pixels.
    """
    h, w = ids.shape
    # Where runs of equal pixels begin; there are far fewer runs than pixels.
    edges = np.ones((h, w), bool)
    edges[:, 1:] = ids[:, 1:] != ids[:, :-1]
    start = np.flatnonzero(edges)
    stop = np.append(start[1:], h * w)
    owner = ids.ravel()[start]
    keep = np.flatnonzero(owner)
    keep = keep[np.argsort(owner[keep], kind="stable")]
    owner = owner[keep]
    rows = start[keep] // w
    left = start[keep] % w
    right = (stop[keep] - 1) % w + 1
    first = np.flatnonzero(np.diff(owner, prepend=0))
    if not len(first):
        return owner, np.zeros((0, 4), np.float32), np.zeros(0, np.float32)
    low = [np.minimum.reduceat(at, first) for at in (left, rows)]
    high = [np.maximum.reduceat(at, first) for at in (right, rows + 1)]
    pixels = np.add.reduceat(right - left, first)
    return owner[first], np.stack([*low, *high], 1).astype(np.float32), pixels.astype(np.float32)


def _boxes(boxes: np.ndarray, areas: np.ndarray, classes: np.ndarray, crowd: np.ndarray) -> Boxes:
    """The boxes whose class is a thing."""
    none = np.zeros(len(boxes), bool)
    fields = {
        "boxes": boxes,
        "classes": classes.astype(np.int32),
        "difficult": none,
        "crowd": crowd,
        "areas": areas,
    }
    return {key: field[classes >= 0] for key, field in fields.items()}
