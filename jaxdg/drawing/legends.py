"""Legends: which classes a picture shows, in which colours and how often."""

from collections.abc import Sequence
import functools
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from jaxdg.drawing.palettes import (
    BACKGROUND,
    MUTED,
    TEXT,
    Color,
    LabelMap,
    check_numbers,
    class_ids,
    rgb,
)


class LegendRow(NamedTuple):
    """One line of a legend: a class, its colour, and its share (0 to 1) of pixels or of boxes.

    Pixels without a class do not count.
    """

    name: str
    color: Color
    share: float


def legend_rows(
    label: LabelMap, colors: Sequence[Color], names: Sequence[str], ignore: int = 255
) -> list[LegendRow]:
    """The classes of a label map, the largest first, equal ones in the order of their ids.

    Args:
        label: class ids [h, w].
        colors: (red, green, blue) of each class.
        names: name of each class.
        ignore: id of the pixels without a class; they do not count.

    Returns:
        One row for each class that occurs; their shares sum to 1.

    Raises:
        ValueError: an id has no colour, or there are more or fewer names than colours.
    """
    check_numbers(colors, names)
    counts = np.bincount(class_ids(label, len(colors), ignore).ravel(), minlength=len(colors) + 1)[
        :-1
    ]
    return _rows(counts.tolist(), colors, names)


def box_rows(
    classes: np.ndarray, colors: Sequence[Color], names: Sequence[str]
) -> tuple[list[LegendRow], list[str]]:
    """The classes of boxes, the most frequent first, and how many boxes each has."""
    counts = np.bincount(classes, minlength=len(names)).tolist()
    return _rows(counts, colors, names), [str(n) for n in sorted(counts, reverse=True) if n]


def _rows(counts: list[int], colors: Sequence[Color], names: Sequence[str]) -> list[LegendRow]:
    present = [k for k in sorted(range(len(names)), key=lambda k: -counts[k]) if counts[k]]
    total = sum(counts)
    return [LegendRow(names[k], rgb(colors[k]), counts[k] / total) for k in present]


def draw_legend(
    rows: Sequence[LegendRow], values: Sequence[str], width: int, size: int
) -> np.ndarray:
    """Swatch, name and value of each row, in as many columns of equal width as fit.

    Letters have `size` pixels. The legend is wider than `width` if one column needs it.
    """
    font = load_font(size)
    swatch = round(1.1 * size)
    pad = round(0.8 * size)
    names_width = max((font.getlength(row.name) for row in rows), default=0)
    values_width = max((font.getlength(value) for value in values), default=0)
    between = pad // 2 if values_width else 0
    entry = round(swatch + pad // 2 + names_width + between + values_width)
    fitting = max(1, (width - pad) // (entry + pad))
    lines = -(-len(rows) // fitting)
    # As few columns as the lines need, so that the last line is not nearly empty.
    columns = -(-len(rows) // lines) if rows else 1
    width = max(width, entry + 2 * pad)
    step = (width - pad) // columns
    line_height = round(1.7 * size)
    legend = Image.fromarray(blank(lines * line_height + pad if rows else 0, width))
    draw = ImageDraw.Draw(legend)
    for i, (row, value) in enumerate(zip(rows, values, strict=True)):
        x = pad + (i % columns) * step
        y = pad // 2 + (i // columns) * line_height + line_height // 2
        box = (x, y - swatch // 2, x + swatch, y - swatch // 2 + swatch)
        draw.rounded_rectangle(box, radius=max(2, swatch // 5), fill=row.color, outline=MUTED)
        draw.text((x + swatch + pad // 2, y), row.name, font=font, fill=TEXT, anchor="lm")
        draw.text((x + entry, y), value, font=font, fill=MUTED, anchor="rm")
    return np.asarray(legend)


def font_size(width: int) -> int:
    """Height of letters: 11 pixels on small pictures, growing slower than the picture."""
    return max(11, round(7 + width / 85))


@functools.cache
def load_font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(size=size)


def blank(height: int, width: int) -> np.ndarray:
    """A picture of the background colour."""
    return np.full((height, width, 3), BACKGROUND, np.uint8)


def stack(rows: Sequence[np.ndarray], gap: int = 0) -> np.ndarray:
    """Pictures below one another, narrower ones centred."""
    width = max(row.shape[1] for row in rows)
    canvas = blank(sum(row.shape[0] for row in rows) + gap * (len(rows) - 1), width)
    top = 0
    for row in rows:
        left = (width - row.shape[1]) // 2
        canvas[top : top + row.shape[0], left : left + row.shape[1]] = row
        top += row.shape[0] + gap
    return canvas
