"""The colours of classes, and the types that pictures share.

Everything in `jaxdg.drawing` takes plain arrays, colours and names, so it serves any dataset.
NumPy, OpenCV and Pillow do the drawing.
"""

from collections.abc import Sequence

from jaxtyping import Float, Integer, UInt8
import numpy as np

Color = tuple[int, int, int]
Picture = UInt8[np.ndarray, "h w 3"]
LabelMap = Integer[np.ndarray, "_ _"]
Boxes = Float[np.ndarray, "_ 4"]
Classes = Integer[np.ndarray, "_"]
Scores = Float[np.ndarray, "_"]

BACKGROUND = (23, 25, 30)
TEXT = (236, 238, 242)
MUTED = (152, 158, 170)
WRONG = (255, 48, 64)


def colorize(
    label: LabelMap, colors: Sequence[Color], ignore: int = 255
) -> UInt8[np.ndarray, "h2 w2 3"]:
    """Paints each class in its colour.

    Args:
        label: class ids [h, w].
        colors: (red, green, blue) in 0..255 of class 0, 1, ..
        ignore: id of the pixels without a class; they become black.

    Returns:
        RGB of the label's size.

    Raises:
        ValueError: an id has no colour.
    """
    return np.array([*colors, (0, 0, 0)], np.uint8)[class_ids(label, len(colors), ignore)]


def class_ids(label: np.ndarray, num_classes: int, ignore: int) -> np.ndarray:
    """Class ids as an index in which ignored pixels follow the last class."""
    ids = np.where(label == ignore, num_classes, label.astype(np.int64))
    bad = (label != ignore) & ((ids < 0) | (ids >= num_classes))
    if bad.any():
        raise ValueError(
            f"the label map holds id {ids[bad][0]}, but there are {num_classes} colours, for"
            f" 0..{num_classes - 1}"
        )
    return ids


def rgb(color: Sequence[int]) -> Color:
    red, green, blue = (int(value) for value in color)
    return red, green, blue


def check_numbers(colors: Sequence[Color], names: Sequence[str]) -> None:
    if len(names) != len(colors):
        raise ValueError(
            f"{len(colors)} colours but {len(names)} names; each class needs one of both"
        )
