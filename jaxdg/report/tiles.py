"""Small pictures of an image: truth, predictions, and what is wrong with the first of them.

A run stores images as `qualitative/DOMAIN_I.npz` and, its worst first, as `worst/DOMAIN_I.npz`.
Each holds `image` uint8 [h, w, 3]. For segmentation it also holds `truth` and `prediction` uint8
[h, w]; for detection `truth_boxes` [n, 4], `truth_classes` [n], `boxes` [m, 4], `scores` [m] and
`classes` [m].
"""

from collections.abc import Sequence
import io
from pathlib import Path
import re

import cv2
import numpy as np
from PIL import Image

from jaxdg.data.labels import CAMVID, CITYSCAPES, IGNORE, LabelSet, palette
from jaxdg.drawing.overlays import box_overlay
from jaxdg.report.document import Pictures, Tile

WIDTH = 240  # of a picture, pixels
MIN_SCORE = 0.3  # of a box that is drawn
_WRONG = (255, 200, 0)
_Arrays = dict[str, np.ndarray]  # of one file
_OUTCOMES = LabelSet(("found", "missed", "false"), ((0, 158, 115), (230, 159, 0), (213, 94, 0)))


def files_of(folder: Path, domain: str) -> list[str]:
    """The names of a domain's files in a folder, in the order of their numbers."""
    pattern = re.compile(rf"{re.escape(domain.replace('/', '_'))}_\d+\.npz")
    return sorted((f.name for f in folder.glob("*.npz") if pattern.fullmatch(f.name)), key=number)


def number(name: str) -> int:
    """The number in the name of a file."""
    return int(name.removesuffix(".npz").rsplit("_", 1)[1])


def grid(
    name: str,
    images: Sequence[Sequence[tuple[str, Path]]],
    classes: Sequence[str],
    caption: str,
    *,
    boxes: bool,
    width: int = WIDTH,
) -> Pictures:
    """A row for each image.

    Args:
        name: of the pictures.
        images: of each, the models and their files; the errors are those of the first model.
        classes: their names.
        caption: what is shown; how to read it is added.
        boxes: whether it is detection.
        width: of a picture, in pixels.
    """
    labels = _labels(list(classes))
    draw = _boxes if boxes else _label_maps
    rows = []
    present: set[int] = set()
    for models in images:
        tiles, found = draw([(model, dict(np.load(f))) for model, f in models], labels, width)
        rows.append(tuple(tiles))
        present |= found
    legend = tuple((labels.names[k], labels.colors[k]) for k in sorted(present))
    return Pictures(name, tuple(rows), caption + _HOW[draw], legend)


def _labels(names: list[str]) -> LabelSet:
    """The classes with their usual colours."""
    return next(
        (known for known in (CAMVID, CITYSCAPES) if list(known.names) == names),
        LabelSet(tuple(names), palette(len(names))),
    )


def _label_maps(
    stored: Sequence[tuple[str, _Arrays]], labels: LabelSet, width: int
) -> tuple[list[Tile], set[int]]:
    """Tiles of one image, and the classes in them."""
    _, first = stored[0]
    image = first["image"]
    truth = first["truth"]
    valid = truth != IGNORE
    tiles = [_photo(_name_of(first), image, width), _map("truth", truth, labels, width)]
    classes = set(np.unique(truth).tolist())
    for name, arrays in stored:
        prediction = arrays["prediction"]
        right = (prediction == truth)[valid].mean() if valid.any() else 0.0
        caption = f"{name}: {100 * right:.0f} % of pixels right"
        tiles.append(_map(caption, prediction, labels, width))
        classes |= set(np.unique(prediction).tolist())
    wrong = valid & (first["prediction"] != truth)
    grey = np.repeat(cv2.cvtColor(image, cv2.COLOR_RGB2GRAY)[..., None], 3, axis=2)
    # Errors are also brighter, so that they are visible without colour vision.
    shaded = np.where(valid[..., None], 0.35 * grey + 30, 0.1 * grey)
    errors = np.where(wrong[..., None], 0.1 * grey + 0.9 * np.array(_WRONG), shaded)
    tiles.append(_photo(_errors_of(stored), errors.astype(np.uint8), width))
    return tiles, classes - {IGNORE}


def _boxes(
    stored: Sequence[tuple[str, _Arrays]], labels: LabelSet, width: int
) -> tuple[list[Tile], set[int]]:
    """Tiles of one image; tags name the classes, so that none needs a legend."""
    _, first = stored[0]
    # Twice the size of other pictures, so that the tags can be read.
    scale = min(1.0, 2 * width / first["image"].shape[1])
    image = cv2.resize(first["image"], None, fx=scale, fy=scale, interpolation=cv2.INTER_AREA)

    def drawn(
        caption: str,
        boxes: np.ndarray,
        classes: np.ndarray,
        colors: LabelSet,
        scores: np.ndarray | None = None,
    ) -> Tile:
        where = (boxes * scale).astype(np.float32)
        which = classes.astype(np.int64)
        picture = box_overlay(image, where, which, colors.colors, colors.names, scores)
        return _photo(caption, picture, 2 * width)

    tiles = [
        _photo(_name_of(first), first["image"], 2 * width),
        drawn("truth", first["truth_boxes"], first["truth_classes"], labels),
    ]
    for name, arrays in stored:
        shown = arrays["scores"] >= MIN_SCORE
        boxes, classes, scores = (arrays[key][shown] for key in ("boxes", "classes", "scores"))
        tiles.append(drawn(name, boxes, classes, labels, scores.astype(np.float32)))
    boxes, outcomes = _judged(first)
    tiles.append(drawn(_errors_of(stored), boxes, outcomes, _OUTCOMES))
    return tiles, set()


def _name_of(arrays: _Arrays) -> str:
    """`image`, or `image` and the last part of its name in the dataset."""
    return " ".join(["image", *str(arrays.get("name", "")).rsplit("/", 1)[-1].split()])


def _errors_of(stored: Sequence[tuple[str, _Arrays]]) -> str:
    return f"errors of {stored[0][0]}" if len(stored) > 1 else "errors"


def _judged(a: _Arrays) -> tuple[np.ndarray, np.ndarray]:
    """Boxes and their outcomes: 0 found, 1 missed, 2 false.

    In the order of their scores, boxes are matched with the true box of their class that they
    overlap most.
    """
    order = [i for i in np.argsort(-a["scores"], kind="stable") if a["scores"][i] >= MIN_SCORE]
    free = np.ones(len(a["truth_boxes"]), bool)
    outcomes = []
    for i in order:
        t = a["truth_boxes"].reshape(-1, 4)
        b = a["boxes"][i]
        sides = np.minimum(t[:, 2:], b[2:]) - np.maximum(t[:, :2], b[:2])
        shared = np.prod(np.clip(sides, 0, None), axis=1)
        union = np.prod(t[:, 2:] - t[:, :2], axis=1) + np.prod(b[2:] - b[:2]) - shared
        same_class = free & (a["truth_classes"] == a["classes"][i])
        iou = np.where(same_class, shared / np.maximum(union, 1e-9), 0)
        hit = len(iou) > 0 and iou.max() >= 0.5
        outcomes.append(0 if hit else 2)
        if hit:
            free[iou.argmax()] = False
    missed = a["truth_boxes"].reshape(-1, 4)[free]
    boxes = np.concatenate([a["boxes"][order].reshape(-1, 4), missed])
    return boxes, np.array(outcomes + [1] * int(free.sum()), np.int64)


_HOW = {
    _label_maps: (
        " In the last picture wrong pixels are yellow, and those without truth nearly black."
    ),
    _boxes: (
        f" Boxes of a score of at least {MIN_SCORE:g}. Errors: found are those on a true box of the"
        " class (IoU 0.5)."
    ),
}


def _photo(caption: str, picture: np.ndarray, width: int) -> Tile:
    h, w = picture.shape[:2]
    if w > width:
        size = (width, max(1, round(h * width / w)))
        picture = cv2.resize(picture, size, interpolation=cv2.INTER_AREA)
    data = _encoded(Image.fromarray(picture), "JPEG", quality=82, optimize=True)
    return Tile(caption, data, "jpg")


def _map(caption: str, label: np.ndarray, labels: LabelSet, width: int) -> Tile:
    """A label map in few bytes: ids with a palette; pixels without a class are black."""
    h, w = label.shape
    if w > width:
        size = (width, max(1, round(h * width / w)))
        label = cv2.resize(label, size, interpolation=cv2.INTER_NEAREST)
    picture = Image.fromarray(label)
    channels = [channel for color in labels.colors for channel in color]
    picture.putpalette(channels + [0] * (768 - len(channels)))
    return Tile(caption, _encoded(picture, "PNG", optimize=True), "png")


def _encoded(picture: Image.Image, kind: str, **options: bool | int) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, kind, **options)
    return buffer.getvalue()
