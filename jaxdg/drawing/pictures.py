"""Pictures of label maps and boxes for people: colours, overlays with a legend, and panels that
show where a prediction is wrong.

Everything takes plain arrays, colours and names, so it serves any dataset. NumPy, OpenCV and Pillow
do the drawing.
"""

from collections.abc import Sequence
import functools
from typing import NamedTuple

import cv2
from jaxtyping import Bool, Float, Integer, UInt8
import numpy as np
from PIL import Image, ImageDraw, ImageFont

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


class LegendRow(NamedTuple):
    """One line of a legend: a class that occurs, its colour, and its share in [0, 1] of the pixels
    that have a class, or of the boxes.
    """

    name: str
    color: Color
    share: float


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
    return np.array([*colors, (0, 0, 0)], np.uint8)[_ids(label, len(colors), ignore)]


def legend_rows(
    label: LabelMap, colors: Sequence[Color], names: Sequence[str], ignore: int = 255
) -> list[LegendRow]:
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
    _same_number(colors, names)
    counts = np.bincount(_ids(label, len(colors), ignore).ravel(), minlength=len(colors) + 1)[:-1]
    present = [k for k in sorted(range(len(names)), key=lambda k: -counts[k]) if counts[k]]
    return [
        LegendRow(names[k], _plain(colors[k]), float(counts[k] / counts.sum())) for k in present
    ]


def overlay(
    image: Picture,
    label: LabelMap,
    colors: Sequence[Color],
    names: Sequence[str],
    alpha: float = 0.55,
    ignore: int = 255,
) -> UInt8[np.ndarray, "h2 w2 3"]:
    """The image tinted by class, classes parted by a thin dark line, with a legend of the classes
    present below it.

    Args:
        image: RGB.
        label: class ids of the image's size.
        colors: (red, green, blue) of each class.
        names: name of each class.
        alpha: strength of the tint, from 0 (the image) to 1 (flat colours).
        ignore: id of the pixels without a class; they keep the image's own colour.

    Returns:
        RGB: the picture on top, in the image's size, centred if the legend is wider; the legend
            below.

    Raises:
        ValueError: image and label differ in size, an id has no colour, or names and colours differ
            in number.
    """
    _same_size(image, label=label)
    rows = legend_rows(label, colors, names, ignore)
    texts = [f"{row.share:.1%}" if row.share >= 0.001 else "<0.1%" for row in rows]
    return _stack(
        [
            _tint(image, label, colors, alpha, ignore),
            _legend(rows, texts, image.shape[1], _font_size(image.shape[1])),
        ]
    )


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
    return _stack(
        [strip, _legend(rows, [""] * len(rows), strip.shape[1], _font_size(captioned[0].shape[1]))]
    )


def box_overlay(
    image: Picture,
    boxes: Boxes,
    classes: Classes,
    colors: Sequence[Color],
    names: Sequence[str],
    scores: Scores | None = None,
) -> UInt8[np.ndarray, "h2 w2 3"]:
    """The image with framed boxes, tagged with class and score, and below it a legend of the
    classes present and their number of boxes.

    A frame lies on its box's own border pixels, in the class's colour, with a thin line of contrast
    around it. A tag stands above, below or in its box, where it hides least of all boxes, and
    wholly in the picture; where no place is free of other tags and leaves half of each box to be
    seen, there is no tag. What has a higher score, or without scores is smaller, comes first and
    its frame lies on top.

    Args:
        image: RGB.
        boxes: x0 y0 x1 y1 in pixels of the image, covering [x0, x1) x [y0, y1); what is outside the
            image is cut off.
        classes: class of each box.
        colors: (red, green, blue) of each class.
        names: name of each class.
        scores: of each box; None where there are none, as of the truth.

    Returns:
        RGB: the picture on top, in the image's size, centred if the legend is wider; the legend
            below.

    Raises:
        ValueError: a class has no colour, names and colours differ in number, or boxes, classes and
            scores do.
    """
    picture = _draw_boxes(image, boxes, classes, colors, names, scores)
    rows, counts = _box_rows(classes, colors, names)
    return _stack([picture, _legend(rows, counts, image.shape[1], _font_size(image.shape[1]))])


def box_panel(
    image: Picture,
    truth: tuple[Boxes, Classes],
    detections: tuple[Boxes, Classes, Scores],
    colors: Sequence[Color],
    names: Sequence[str],
    tile_width: int = 480,
) -> UInt8[np.ndarray, "h2 w2 3"]:
    """Image, true boxes and detections side by side, each with a caption, and one legend below.

    Args:
        image: RGB.
        truth: boxes in pixels of the image and classes, as in `box_overlay`.
        detections: boxes, classes and scores; all of them are drawn.
        colors: (red, green, blue) of each class.
        names: name of each class.
        tile_width: widest tile in pixels; larger images are shrunk to it.

    Returns:
        RGB.

    Raises:
        ValueError: as in `box_overlay`.
    """
    tile = _shrink(image, tile_width)
    scale = np.tile([tile.shape[1] / image.shape[1], tile.shape[0] / image.shape[0]], 2)
    tiles = {
        "image": tile,
        f"truth: {len(truth[0])}": _draw_boxes(
            tile, truth[0] * scale, truth[1], colors, names, None
        ),
        f"detections: {len(detections[0])}": _draw_boxes(
            tile, detections[0] * scale, detections[1], colors, names, detections[2]
        ),
    }
    strip = _join([_captioned(tile, caption) for caption, tile in tiles.items()])
    rows, _ = _box_rows(np.concatenate([truth[1], detections[1]]), colors, names)
    return _stack(
        [strip, _legend(rows, [""] * len(rows), strip.shape[1], _font_size(tile.shape[1]))]
    )


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
        raise ValueError(
            f"the label map holds id {ids[bad][0]}, but there are {num_classes} colours, for"
            f" 0..{num_classes - 1}"
        )
    return ids


def _plain(color: Sequence[int]) -> Color:
    red, green, blue = (int(value) for value in color)
    return red, green, blue


def _same_number(colors: Sequence[Color], names: Sequence[str]) -> None:
    if len(names) != len(colors):
        raise ValueError(
            f"{len(colors)} colours but {len(names)} names; each class needs one of both"
        )


def _same_size(image: np.ndarray, **labels: np.ndarray) -> None:
    for name, label in labels.items():
        if label.shape != image.shape[:2]:
            raise ValueError(
                f"the {name} is {label.shape[1]}x{label.shape[0]} pixels, the image"
                f" {image.shape[1]}x{image.shape[0]}; they must be equal"
            )


def _to_uint8(picture: np.ndarray) -> np.ndarray:
    return np.clip(np.rint(picture), 0, 255).astype(np.uint8)


def _borders(label: np.ndarray, thickness: int) -> Bool[np.ndarray, "h w"]:
    """Pixels whose right or lower neighbour has another id; a thicker line grows up and to the
    left.
    """
    edge = np.zeros(label.shape, bool)
    edge[:, :-1] |= label[:, :-1] != label[:, 1:]
    edge[:-1] |= label[:-1] != label[1:]
    if thickness == 1:
        return edge
    return cv2.dilate(edge.astype(np.uint8), np.ones((thickness, thickness), np.uint8)).astype(bool)


def _tint(
    image: np.ndarray, label: np.ndarray, colors: Sequence[Color], alpha: float, ignore: int
) -> np.ndarray:
    blended = (1 - alpha) * image + alpha * colorize(label, colors, ignore)
    # The line scales with the picture, so that it is as thin on a large one shown on the same
    # screen.
    edge = _borders(label, max(1, round(image.shape[1] / 1000)))
    blended = np.where(edge[..., None], 0.35 * blended, blended)
    return np.where((label == ignore)[..., None], image, _to_uint8(blended))


def _shrink(picture: np.ndarray, width: int) -> np.ndarray:
    h, w = picture.shape[:2]
    return (
        picture
        if w <= width
        else cv2.resize(
            picture, (width, max(round(h * width / w), 1)), interpolation=cv2.INTER_AREA
        )
    )


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
    """Swatch, name and value of each row in letters of `size` pixels, in as many equal columns as
    fit; at least one column wide.
    """
    font = _font(size)
    swatch = round(1.1 * size)
    pad = round(0.8 * size)
    names_width = max((font.getlength(row.name) for row in rows), default=0)
    values_width = max((font.getlength(value) for value in values), default=0)
    between = pad // 2 if values_width else 0
    entry = round(swatch + pad // 2 + names_width + between + values_width)
    fitting = max(1, (width - pad) // (entry + pad))
    lines = -(-len(rows) // fitting)
    columns = (
        -(-len(rows) // lines) if rows else 1
    )  # as few as the lines need, so that the last line is not nearly empty
    width = max(width, entry + 2 * pad)
    step = (width - pad) // columns
    line_height = round(1.7 * size)
    legend = Image.fromarray(_canvas(lines * line_height + pad if rows else 0, width))
    draw = ImageDraw.Draw(legend)
    for i, (row, value) in enumerate(zip(rows, values, strict=True)):
        x = pad + (i % columns) * step
        y = pad // 2 + (i // columns) * line_height + line_height // 2
        box = (x, y - swatch // 2, x + swatch, y - swatch // 2 + swatch)
        draw.rounded_rectangle(box, radius=max(2, swatch // 5), fill=row.color, outline=MUTED)
        draw.text((x + swatch + pad // 2, y), row.name, font=font, fill=TEXT, anchor="lm")
        draw.text((x + entry, y), value, font=font, fill=MUTED, anchor="rm")
    return np.asarray(legend)


def _draw_boxes(
    image: np.ndarray,
    boxes: np.ndarray,
    classes: np.ndarray,
    colors: Sequence[Color],
    names: Sequence[str],
    scores: np.ndarray | None,
) -> np.ndarray:
    """`box_overlay` without its legend."""
    _same_number(colors, names)
    numbers = {
        "boxes": len(boxes),
        "classes": len(classes),
        "scores": len(boxes if scores is None else scores),
    }
    if len(set(numbers.values())) > 1:
        raise ValueError(
            f"{', '.join(f'{n} {what}' for what, n in numbers.items())}; each box has one of each"
        )
    unknown = (classes < 0) | (classes >= len(colors))
    if unknown.any():
        raise ValueError(
            f"a box is of class {classes[unknown][0]}, but there are {len(colors)} colours, for"
            f" 0..{len(colors) - 1}"
        )
    h, w = image.shape[:2]
    edges = np.clip(np.rint(boxes), 0, [w, h, w, h]).astype(int)
    order = np.argsort(
        np.prod(edges[:, 2:] - edges[:, :2], axis=1) if scores is None else -scores, kind="stable"
    )
    shown = [int(i) for i in order if (edges[i, 2:] > edges[i, :2]).all()]
    size = _font_size(w)
    ids = [int(k) for k in classes]
    texts = {i: names[ids[i]] + ("" if scores is None else f" {scores[i]:.2f}") for i in shown}
    tags = _place_tags(
        edges,
        {
            i: (round(_font(size).getlength(text)) + size, round(1.4 * size))
            for i, text in texts.items()
        },
        (h, w),
    )
    picture = Image.fromarray(image)
    draw = ImageDraw.Draw(picture)
    tints = {k: _plain(colors[k]) for k in set(ids)}
    contrasts = {
        k: (0, 0, 0) if np.dot(color, (0.299, 0.587, 0.114)) > 128 else (255, 255, 255)
        for k, color in tints.items()
    }
    for i in reversed(shown):
        x0, y0, x1, y1 = edges[i].tolist()
        thickness = min(
            max(1, round(w / 400)), max(1, min(x1 - x0, y1 - y0) // 6)
        )  # a small box stays open
        draw.rectangle((x0 - 1, y0 - 1, x1, y1), outline=contrasts[ids[i]])
        draw.rectangle((x0, y0, x1 - 1, y1 - 1), outline=tints[ids[i]], width=thickness)
    for i, (x0, y0, x1, y1) in tags.items():  # above all frames
        draw.rectangle((x0, y0, x1 - 1, y1 - 1), fill=tints[ids[i]])
        draw.text(
            (x0 + size // 2, (y0 + y1) // 2),
            texts[i],
            font=_font(size),
            fill=contrasts[ids[i]],
            anchor="lm",
        )
    return np.asarray(picture)


def _place_tags(
    boxes: np.ndarray, sizes: dict[int, tuple[int, int]], picture: tuple[int, int]
) -> dict[int, tuple[int, int, int, int]]:
    """Where the tag of each box stands, x0 y0 x1 y1, if there is room for it.

    Args:
        boxes: all boxes, whole pixels inside the picture.
        sizes: width and height of the tag of each box, the most important first.
        picture: height and width.
    """
    tags: dict[int, tuple[int, int, int, int]] = {}
    areas = np.maximum(np.prod(boxes[:, 2:] - boxes[:, :2], axis=1), 1)
    for i, (w, h) in sizes.items():
        x0, y0, x1, y1 = boxes[i].tolist()
        corners = [(x0, y0 - h), (x1 - w, y0 - h), (x0, y1), (x1 - w, y1), (x0, y0)]
        places = np.clip(corners, 0, np.maximum([picture[1] - w, picture[0] - h], 0))
        places = np.concatenate([places, places + np.array([w, h])], axis=1)
        hidden = _overlaps(places, boxes) / areas
        free = (places[:, 2:] <= picture[::-1]).all(axis=1) & (hidden <= 0.5).all(axis=1)
        free &= ~_overlaps(places, np.array([*tags.values()]).reshape(-1, 4)).any(axis=1)
        if free.any():
            a, b, c, d = places[np.argmin(np.where(free, hidden.sum(axis=1), np.inf))].tolist()
            tags[i] = (a, b, c, d)
    return tags


def _overlaps(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Pixels that each box of `a` [n, 4] shares with each of `b` [m, 4]: [n, m]."""
    sides = np.minimum(a[:, None, 2:], b[:, 2:]) - np.maximum(a[:, None, :2], b[:, :2])
    return np.clip(sides, 0, None).prod(axis=2)


def _box_rows(
    classes: np.ndarray, colors: Sequence[Color], names: Sequence[str]
) -> tuple[list[LegendRow], list[str]]:
    """Legend of boxes: the classes that occur, the most frequent first, and how many boxes each
    has.
    """
    counts = np.bincount(classes, minlength=len(names)).tolist()
    present = [k for k in sorted(range(len(names)), key=lambda k: -counts[k]) if counts[k]]
    return [LegendRow(names[k], _plain(colors[k]), counts[k] / len(classes)) for k in present], [
        str(counts[k]) for k in present
    ]
