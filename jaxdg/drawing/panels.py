"""Panels: an image, the truth and a prediction side by side, with captions and one legend."""

from collections.abc import Sequence

import cv2
from jaxtyping import UInt8
import numpy as np
from PIL import Image, ImageDraw

from jaxdg.drawing.legends import (
    blank,
    box_rows,
    draw_legend,
    font_size,
    legend_rows,
    load_font,
    stack,
)
from jaxdg.drawing.overlays import check_sizes, draw_boxes, to_uint8
from jaxdg.drawing.palettes import (
    TEXT,
    WRONG,
    Boxes,
    Classes,
    Color,
    LabelMap,
    Picture,
    Scores,
    colorize,
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

    In the last tile wrong pixels are red on the grey image, and pixels without truth are dark.

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
    check_sizes(image, truth=truth, prediction=prediction)
    rows = legend_rows(np.concatenate([truth, prediction]), colors, names, ignore)
    valid = truth != ignore
    wrong = valid & (truth != prediction)
    error_share = wrong.sum() / max(valid.sum(), 1)
    grey = np.repeat(cv2.cvtColor(image, cv2.COLOR_RGB2GRAY)[..., None], 3, axis=2)
    dimmed = np.where(valid[..., None], grey * 0.5 + 40, grey * 0.15)
    errors = to_uint8(np.where(wrong[..., None], 0.15 * grey + 0.85 * np.array(WRONG), dimmed))
    tiles = {
        "image": image,
        "truth": colorize(truth, colors, ignore),
        "prediction": colorize(prediction, colors, ignore),
        f"{error_share:.1%} wrong": errors,
    }
    captioned = [_captioned(_shrink(tile, tile_width), caption) for caption, tile in tiles.items()]
    strip = _join(captioned)
    size = font_size(captioned[0].shape[1])
    return stack([strip, draw_legend(rows, [""] * len(rows), strip.shape[1], size)])


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
    true_boxes, true_classes = truth
    boxes, classes, scores = detections
    tile = _shrink(image, tile_width)
    scale = np.tile([tile.shape[1] / image.shape[1], tile.shape[0] / image.shape[0]], 2)
    left = draw_boxes(tile, true_boxes * scale, true_classes, colors, names, None)
    right = draw_boxes(tile, boxes * scale, classes, colors, names, scores)
    tiles = {
        "image": tile,
        f"truth: {len(true_boxes)}": left,
        f"detections: {len(boxes)}": right,
    }
    strip = _join([_captioned(tile, caption) for caption, tile in tiles.items()])
    rows, _ = box_rows(np.concatenate([true_classes, classes]), colors, names)
    size = font_size(tile.shape[1])
    return stack([strip, draw_legend(rows, [""] * len(rows), strip.shape[1], size)])


def grid(rows: Sequence[UInt8[np.ndarray, "_ _ 3"]], gap: int = 12) -> UInt8[np.ndarray, "h2 w2 3"]:
    """Pictures such as panels below one another.

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
    return stack(rows, gap)


def _shrink(picture: np.ndarray, width: int) -> np.ndarray:
    h, w = picture.shape[:2]
    if w <= width:
        return picture
    size = (width, max(round(h * width / w), 1))
    return cv2.resize(picture, size, interpolation=cv2.INTER_AREA)


def _join(tiles: Sequence[np.ndarray], gap: int = 4) -> np.ndarray:
    """Tiles of one height side by side."""
    return stack([tile.swapaxes(0, 1) for tile in tiles], gap).swapaxes(0, 1)


def _captioned(tile: np.ndarray, caption: str) -> np.ndarray:
    size = font_size(tile.shape[1])
    strip = Image.fromarray(blank(2 * size, tile.shape[1]))
    ImageDraw.Draw(strip).text(
        (size // 2, size), caption, font=load_font(size), fill=TEXT, anchor="lm"
    )
    return stack([np.asarray(strip), tile])
