"""Pictures of label maps for people: colours, overlays with a legend, and panels that show where a prediction is wrong.

Everything takes plain arrays, colours and names, so it serves any dataset. NumPy, OpenCV and Pillow do the drawing.
"""

from collections.abc import Sequence
import functools
from typing import NamedTuple

import cv2
from jaxtyping import Bool, Integer, UInt8
import numpy as np
from PIL import Image, ImageDraw, ImageFont

Color = tuple[int, int, int]
Picture = UInt8[np.ndarray, "h w 3"]
LabelMap = Integer[np.ndarray, "_ _"]

BACKGROUND, TEXT, MUTED, WRONG = (23, 25, 30), (236, 238, 242), (152, 158, 170), (255, 48, 64)


class LegendRow(NamedTuple):
    """One line of a legend: a class that occurs, its colour, and its share in [0, 1] of the pixels that have a class."""

    name: str
    color: Color
    share: float


def colorize(label: LabelMap, colors: Sequence[Color], ignore: int = 255) -> UInt8[np.ndarray, "h2 w2 3"]:
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
    return np.array([*colors, (0, 0, 0)], np.uint8)[_ids(label, len(colors), ignore)]


def legend_rows(label: LabelMap, colors: Sequence[Color], names: Sequence[str], ignore: int = 255) -> list[LegendRow]:
    """The classes that occur, the largest first; those of equal share in the order of their ids.

    Args:
        label: class ids [h, w].
        colors: (red, green, blue) of each class.
        names: name of each class.
        ignore: id of the pixels without a class; they are listed nowhere.

    Returns:
        One row a class that occurs; their shares sum to 1.

    Raises:
        ValueError: an id has no colour, or there are more or fewer names than colours.
    """
    if len(names) != len(colors):
        raise ValueError(f"{len(colors)} colours but {len(names)} names; each class needs one of both")
    counts = np.bincount(_ids(label, len(colors), ignore).ravel(), minlength=len(colors) + 1)[:-1]
    present = [k for k in sorted(range(len(names)), key=lambda k: -counts[k]) if counts[k]]
    return [LegendRow(names[k], _plain(colors[k]), float(counts[k] / counts.sum())) for k in present]


def overlay(
    image: Picture,
    label: LabelMap,
    colors: Sequence[Color],
    names: Sequence[str],
    alpha: float = 0.55,
    ignore: int = 255,
) -> UInt8[np.ndarray, "h2 w2 3"]:
    """The image tinted by class, classes parted by a thin dark line, with a legend of the classes present below it.

    Args:
        image: RGB.
        label: class ids of the image's size.
        colors: (red, green, blue) of each class.
        names: name of each class.
        alpha: strength of the tint, from 0 (the image) to 1 (flat colours).
        ignore: id of the pixels without a class; they keep the image's own colour.

    Returns:
        RGB: the picture on top, in the image's size, centred if the legend is wider; the legend below.

    Raises:
        ValueError: image and label differ in size, an id has no colour, or names and colours differ in number.
    """
    _same_size(image, label=label)
    rows = legend_rows(label, colors, names, ignore)
    texts = [f"{row.share:.1%}" if row.share >= 0.001 else "<0.1%" for row in rows]
    return _stack([_tint(image, label, colors, alpha, ignore), _legend(rows, texts, image.shape[1], _font_size(image.shape[1]))])


def panel(
    image: Picture,
    truth: LabelMap,
    prediction: LabelMap,
    colors: Sequence[Color],
    names: Sequence[str],
    ignore: int = 255,
    tile_width: int = 480,
) -> UInt8[np.ndarray, "h2 w2 3"]:
    """Image, truth, prediction and errors side by side, each with a caption, and one legend below.

    In the last tile wrong pixels glow red on the grey image, and pixels without truth are dark.

    Args:
        image: RGB.
        truth: true class ids of the image's size.
        prediction: predicted class ids of the image's size.
        colors: (red, green, blue) of each class.
        names: name of each class.
        ignore: id of the pixels without truth.
        tile_width: widest tile in pixels; larger images are shrunk to it.

    Returns:
        RGB.

    Raises:
        ValueError: the sizes differ, an id has no colour, or names and colours differ in number.
    """
    _same_size(image, truth=truth, prediction=prediction)
    rows = legend_rows(np.concatenate([truth, prediction]), colors, names, ignore)
    valid = truth != ignore
    wrong = valid & (truth != prediction)
    error_share = wrong.sum() / max(valid.sum(), 1)
    grey = np.repeat(cv2.cvtColor(image, cv2.COLOR_RGB2GRAY)[..., None], 3, axis=2)
    dimmed = np.where(valid[..., None], grey * 0.5 + 40, grey * 0.15)
    errors = _to_uint8(np.where(wrong[..., None], 0.15 * grey + 0.85 * np.array(WRONG), dimmed))
    tiles = {
        "image": image,
        "truth": colorize(truth, colors, ignore),
        "prediction": colorize(prediction, colors, ignore),
        f"{error_share:.1%} wrong": errors,
    }
    captioned = [_captioned(_shrink(tile, tile_width), caption) for caption, tile in tiles.items()]
    strip = _join(captioned)
    return _stack([strip, _legend(rows, [""] * len(rows), strip.shape[1], _font_size(captioned[0].shape[1]))])


def grid(rows: Sequence[UInt8[np.ndarray, "_ _ 3"]], gap: int = 12) -> UInt8[np.ndarray, "h2 w2 3"]:
    """Pictures, such as panels, below one another.

    Args:
        rows: RGB pictures of any sizes; narrower ones are centred.
        gap: pixels between two rows.

    Returns:
        RGB as wide as the widest row.

    Raises:
        ValueError: there is no row.
    """
    if not rows:
        raise ValueError("grid needs at least one picture")
    return _stack(rows, gap)


def _ids(label: np.ndarray, num_classes: int, ignore: int) -> np.ndarray:
    """Class ids as an index in which ignored pixels follow the last class."""
    ids = np.where(label == ignore, num_classes, label.astype(np.int64))
    bad = (label != ignore) & ((ids < 0) | (ids >= num_classes))
    if bad.any():
        raise ValueError(f"the label map holds id {ids[bad][0]}, but there are {num_classes} colours, for 0..{num_classes - 1}")
    return ids


def _plain(color: Sequence[int]) -> Color:
    red, green, blue = (int(value) for value in color)
    return red, green, blue


def _same_size(image: np.ndarray, **labels: np.ndarray) -> None:
    for name, label in labels.items():
        if label.shape != image.shape[:2]:
            raise ValueError(
                f"the {name} is {label.shape[1]}x{label.shape[0]} pixels, the image {image.shape[1]}x{image.shape[0]}; they must be equal"
            )


def _to_uint8(picture: np.ndarray) -> np.ndarray:
    return np.clip(np.rint(picture), 0, 255).astype(np.uint8)


def _borders(label: np.ndarray, thickness: int) -> Bool[np.ndarray, "h w"]:
    """Pixels whose right or lower neighbour has another id; a thicker line grows up and to the left."""
    edge = np.zeros(label.shape, bool)
    edge[:, :-1] |= label[:, :-1] != label[:, 1:]
    edge[:-1] |= label[:-1] != label[1:]
    if thickness == 1:
        return edge
    return cv2.dilate(edge.astype(np.uint8), np.ones((thickness, thickness), np.uint8)).astype(bool)


def _tint(image: np.ndarray, label: np.ndarray, colors: Sequence[Color], alpha: float, ignore: int) -> np.ndarray:
    blended = (1 - alpha) * image + alpha * colorize(label, colors, ignore)
    # The line scales with the picture, so that it is as thin on a large one shown on the same screen.
    edge = _borders(label, max(1, round(image.shape[1] / 1000)))
    blended = np.where(edge[..., None], 0.35 * blended, blended)
    return np.where((label == ignore)[..., None], image, _to_uint8(blended))


def _shrink(picture: np.ndarray, width: int) -> np.ndarray:
    h, w = picture.shape[:2]
    return picture if w <= width else cv2.resize(picture, (width, max(round(h * width / w), 1)), interpolation=cv2.INTER_AREA)


def _canvas(height: int, width: int) -> np.ndarray:
    return np.full((height, width, 3), BACKGROUND, np.uint8)


def _stack(rows: Sequence[np.ndarray], gap: int = 0) -> np.ndarray:
    width = max(row.shape[1] for row in rows)
    canvas = _canvas(sum(row.shape[0] for row in rows) + gap * (len(rows) - 1), width)
    top = 0
    for row in rows:
        left = (width - row.shape[1]) // 2
        canvas[top : top + row.shape[0], left : left + row.shape[1]] = row
        top += row.shape[0] + gap
    return canvas


def _join(tiles: Sequence[np.ndarray], gap: int = 4) -> np.ndarray:
    """Tiles of one height side by side: rows of the turned picture."""
    return _stack([tile.swapaxes(0, 1) for tile in tiles], gap).swapaxes(0, 1)


def _font_size(width: int) -> int:
    """Letters of 11 pixels on small pictures, growing slower than the picture."""
    return max(11, round(7 + width / 85))


@functools.cache
def _font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(size=size)


def _captioned(tile: np.ndarray, caption: str) -> np.ndarray:
    size = _font_size(tile.shape[1])
    strip = Image.fromarray(_canvas(2 * size, tile.shape[1]))
    ImageDraw.Draw(strip).text((size // 2, size), caption, font=_font(size), fill=TEXT, anchor="lm")
    return _stack([np.asarray(strip), tile])


def _legend(rows: Sequence[LegendRow], values: Sequence[str], width: int, size: int) -> np.ndarray:
    """Swatch, name and value of each row in letters of `size` pixels, in as many equal columns as fit; at least one column wide."""
    font, swatch, pad = _font(size), round(1.1 * size), round(0.8 * size)
    names_width = max((font.getlength(row.name) for row in rows), default=0)
    values_width = max((font.getlength(value) for value in values), default=0)
    between = pad // 2 if values_width else 0
    entry = round(swatch + pad // 2 + names_width + between + values_width)
    fitting = max(1, (width - pad) // (entry + pad))
    lines = -(-len(rows) // fitting)
    columns = -(-len(rows) // lines) if rows else 1  # as few as the lines need, so that the last line is not nearly empty
    width = max(width, entry + 2 * pad)
    step = (width - pad) // columns
    line_height = round(1.7 * size)
    legend = Image.fromarray(_canvas(lines * line_height + pad if rows else 0, width))
    draw = ImageDraw.Draw(legend)
    for i, (row, value) in enumerate(zip(rows, values, strict=True)):
        x, y = pad + (i % columns) * step, pad // 2 + (i // columns) * line_height + line_height // 2
        box = (x, y - swatch // 2, x + swatch, y - swatch // 2 + swatch)
        draw.rounded_rectangle(box, radius=max(2, swatch // 5), fill=row.color, outline=MUTED)
        draw.text((x + swatch + pad // 2, y), row.name, font=font, fill=TEXT, anchor="lm")
        draw.text((x + entry, y), value, font=font, fill=MUTED, anchor="rm")
    return np.asarray(legend)
