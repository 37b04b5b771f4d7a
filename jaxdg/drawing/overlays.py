"""Overlays: an image tinted by class or with framed boxes, and a legend below it."""

from collections.abc import Sequence

import cv2
from jaxtyping import Bool, UInt8
import numpy as np
from PIL import Image, ImageDraw

from jaxdg.drawing.legends import box_rows, draw_legend, font_size, legend_rows, load_font, stack
from jaxdg.drawing.palettes import (
    Boxes,
    Classes,
    Color,
    LabelMap,
    Picture,
    Scores,
    check_numbers,
    class_ids,
    rgb,
)


def overlay(
    image: Picture,
    label: LabelMap,
    colors: Sequence[Color],
    names: Sequence[str],
    alpha: float = 0.55,
    ignore: int = 255,
) -> UInt8[np.ndarray, "h2 w2 3"]:
    """The image tinted by class, and below it a legend of the classes that occur.

    A thin dark line separates the classes.

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
    rows = legend_rows(label, colors, names, ignore)
    texts = [f"{row.share:.1%}" if row.share >= 0.001 else "<0.1%" for row in rows]
    legend = draw_legend(rows, texts, image.shape[1], font_size(image.shape[1]))
    return stack([tint(image, label, colors, alpha, ignore), legend])


def box_overlay(
    image: Picture,
    boxes: Boxes,
    classes: Classes,
    colors: Sequence[Color],
    names: Sequence[str],
    scores: Scores | None = None,
) -> UInt8[np.ndarray, "h2 w2 3"]:
    """The image with framed and tagged boxes, and below it a legend of their classes.

    A tag says class and score; the legend says how many boxes each class has. A frame lies on the
    border pixels of its box, in the class's colour, with a thin line of contrast around it.

    A tag stands above, below or in its box, wherever it hides least of all boxes. It is drawn only
    if some place inside the picture is free of other tags and leaves half of each box visible.
    Boxes of higher score come first and lie on top; without scores, smaller ones do.

    Args:
        image: RGB.
        boxes: x0 y0 x1 y1 in pixels of the image, covering [x0, x1) x [y0, y1); parts outside the
            image are cut off.
        classes: class of each box.
        colors: (red, green, blue) of each class.
        names: name of each class.
        scores: of each box; None for the truth, which has none.

    Returns:
        RGB: the picture on top, in the image's size, centred if the legend is wider; the legend
            below.

    Raises:
        ValueError: a class has no colour, names and colours differ in number, or boxes, classes and
            scores do.
    """
    picture = draw_boxes(image, boxes, classes, colors, names, scores)
    rows, counts = box_rows(classes, colors, names)
    return stack([picture, draw_legend(rows, counts, image.shape[1], font_size(image.shape[1]))])


def check_sizes(image: np.ndarray, **labels: np.ndarray) -> None:
    for name, label in labels.items():
        if label.shape != image.shape[:2]:
            raise ValueError(
                f"the {name} is {label.shape[1]}x{label.shape[0]} pixels, the image"
                f" {image.shape[1]}x{image.shape[0]}; they must be equal"
            )


def to_uint8(picture: np.ndarray) -> np.ndarray:
    return np.clip(np.rint(picture), 0, 255).astype(np.uint8)


def _borders(label: np.ndarray, thickness: int) -> Bool[np.ndarray, "h w"]:
    """Pixels whose right or lower neighbour has another id; a thick line grows up and left."""
    edge = np.zeros(label.shape, bool)
    edge[:, :-1] |= label[:, :-1] != label[:, 1:]
    edge[:-1] |= label[:-1] != label[1:]
    if thickness == 1:
        return edge
    return cv2.dilate(edge.astype(np.uint8), np.ones((thickness, thickness), np.uint8)).astype(bool)


def tint(
    image: Picture,
    label: LabelMap,
    colors: Sequence[Color],
    alpha: float = 0.55,
    ignore: int = 255,
) -> UInt8[np.ndarray, "h w 3"]:
    """`overlay` without its legend.

    Args:
        image: RGB.
        label: class ids of the image's size.
        colors: (red, green, blue) of each class.
        alpha: strength of the tint.
        ignore: id of the pixels without a class.

    Raises:
        ValueError: image and label differ in size, or an id has no colour.
    """
    check_sizes(image, label=label)
    ids = class_ids(label, len(colors), ignore)
    # The line scales with the picture, so that it looks equally thin when shown at the same size.
    edge = _borders(label, max(1, round(image.shape[1] / 1000)))
    # A value in 0..255 has few results, which are looked up: 30 times as fast as to compute them.
    paints = np.array([*colors, (0, 0, 0)], np.float64)
    blended = (1 - alpha) * np.arange(256)[:, None] + alpha * paints[:, None]  # [k + 1, 256, 3]
    table = to_uint8(np.stack([blended, 0.35 * blended])).reshape(-1, 3)
    row = (edge * len(paints) + ids) * 256
    channels = [np.take(table[:, c], row + image[..., c]) for c in range(3)]
    return np.where((label == ignore)[..., None], image, np.stack(channels, axis=-1))


def draw_boxes(
    image: np.ndarray,
    boxes: np.ndarray,
    classes: np.ndarray,
    colors: Sequence[Color],
    names: Sequence[str],
    scores: np.ndarray | None,
) -> np.ndarray:
    """`box_overlay` without its legend."""
    check_numbers(colors, names)
    numbers = {"boxes": len(boxes), "classes": len(classes)}
    numbers["scores"] = len(boxes if scores is None else scores)
    if len(set(numbers.values())) > 1:
        counts = ", ".join(f"{n} {what}" for what, n in numbers.items())
        raise ValueError(f"{counts}; each box needs one class and one score")
    unknown = (classes < 0) | (classes >= len(colors))
    if unknown.any():
        raise ValueError(
            f"a box is of class {classes[unknown][0]}, but there are {len(colors)} colours, for"
            f" 0..{len(colors) - 1}"
        )
    h, w = image.shape[:2]
    edges = np.clip(np.rint(boxes), 0, [w, h, w, h]).astype(int)
    areas = np.prod(edges[:, 2:] - edges[:, :2], axis=1)
    order = np.argsort(areas if scores is None else -scores, kind="stable")
    shown = [int(i) for i in order if (edges[i, 2:] > edges[i, :2]).all()]
    size = font_size(w)
    ids = [int(k) for k in classes]
    texts = {i: names[ids[i]] + ("" if scores is None else f" {scores[i]:.2f}") for i in shown}
    font = load_font(size)
    widths = {i: round(font.getlength(text)) + size for i, text in texts.items()}
    sizes = {i: (width, round(1.4 * size)) for i, width in widths.items()}
    tags = _place_tags(edges, sizes, (h, w))
    picture = Image.fromarray(image)
    draw = ImageDraw.Draw(picture)
    tints = {k: rgb(colors[k]) for k in set(ids)}
    bright = {k for k, color in tints.items() if np.dot(color, (0.299, 0.587, 0.114)) > 128}
    contrasts = {k: (0, 0, 0) if k in bright else (255, 255, 255) for k in tints}
    for i in reversed(shown):
        x0, y0, x1, y1 = edges[i].tolist()
        inside = max(1, min(x1 - x0, y1 - y0) // 6)  # leaves the inside of a small box visible
        thickness = min(max(1, round(w / 400)), inside)
        draw.rectangle((x0 - 1, y0 - 1, x1, y1), outline=contrasts[ids[i]])
        draw.rectangle((x0, y0, x1 - 1, y1 - 1), outline=tints[ids[i]], width=thickness)
    for i, (x0, y0, x1, y1) in tags.items():  # above all frames
        draw.rectangle((x0, y0, x1 - 1, y1 - 1), fill=tints[ids[i]])
        at = (x0 + size // 2, (y0 + y1) // 2)
        draw.text(at, texts[i], font=font, fill=contrasts[ids[i]], anchor="lm")
    return np.asarray(picture)


def _place_tags(
    boxes: np.ndarray, sizes: dict[int, tuple[int, int]], picture: tuple[int, int]
) -> dict[int, tuple[int, int, int, int]]:
    """The place x0 y0 x1 y1 of the tag of each box for which there is room.

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
    """Pixels [n, m] that each box of `a` [n, 4] shares with each box of `b` [m, 4]."""
    sides = np.minimum(a[:, None, 2:], b[:, 2:]) - np.maximum(a[:, None, :2], b[:, :2])
    return np.clip(sides, 0, None).prod(axis=2)
