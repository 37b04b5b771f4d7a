"""Draws images of a study: image, truth, the models' predictions, and the best model's errors.

A run stores them as `runs/NAME/qualitative/DOMAIN_I.npz`. Each holds `image` uint8 [h, w, 3]. For
segmentation it also holds `truth` and `prediction` uint8 [h, w]; for detection `truth_boxes`
[n, 4], `truth_classes` [n], `boxes` [m, 4], `scores` [m] and `classes` [m].
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
from jaxdg.evaluation import results
from jaxdg.studies.report.document import Pictures, Tile
from jaxdg.studies.report.study_json import Study

MODELS = 4  # side by side
IMAGES = 2  # of a domain
WIDTH = 240  # of a picture, pixels
MIN_SCORE = 0.3  # of a box that is drawn
_WRONG = (255, 200, 0)
_Arrays = dict[str, np.ndarray]  # of one file
_OUTCOMES = LabelSet(("found", "missed", "false"), ((0, 158, 115), (230, 159, 0), (213, 94, 0)))


def pictures(study: Study) -> list[Pictures]:
    """A grid for each domain of which the runs stored images."""
    models = _models(study)
    grids = []
    for domain, entry in study.entries().items():
        pattern = re.compile(rf"{re.escape(domain.replace('/', '_'))}_\d+\.npz")
        files = {file.name for _, folder in models for file in folder.glob("*.npz")}
        names = sorted(filter(pattern.fullmatch, files), key=_number)
        labels = _labels(list(entry["AP50" if study.score == "mAP50" else "IoU"]))
        draw = _boxes if study.score == "mAP50" else _label_maps
        rows = []
        present = set()
        for name in names[:IMAGES]:
            stored = [
                (label, dict(np.load(folder / name)))
                for label, folder in models
                if (folder / name).is_file()
            ]
            tiles, classes = draw(stored, labels)
            rows.append(tuple(tiles))
            present |= classes
        if rows:
            legend = tuple((labels.names[k], labels.colors[k]) for k in sorted(present))
            which = results.mark(domain, entry, study.json["source"]).strip(" ()") or "unseen"
            if share := results.share(entry):
                which = f"{which}; {results.JUDGED}: {share}"
            caption = f"Images of {domain} ({which}).{_HOW[draw]}"
            grids.append(Pictures(domain.replace("/", "_"), tuple(rows), caption, legend))
    return grids


def _models(study: Study) -> list[tuple[str, Path]]:
    """Names and picture folders of the models to show.

    The best on unseen domains comes first; the others are spread over the ranking.
    """
    ranked = study.ranked() or [group for group in study.groups if study.finished(group)]
    if not ranked:
        return []
    if len(ranked) == 1:  # seeds side by side
        models = [(f"seed {run['seed']}", run["name"]) for run in study.finished(ranked[0])]
    else:
        models = [(group["group"], study.finished(group)[0]["name"]) for group in ranked]
    places = np.linspace(0, len(models) - 1, min(MODELS, len(models))).round().astype(int)
    return [
        (models[i][0], study.folder / "runs" / models[i][1] / "qualitative")
        for i in np.unique(places)
    ]


def _number(name: str) -> int:
    return int(name.removesuffix(".npz").rsplit("_", 1)[1])


def _labels(names: list[str]) -> LabelSet:
    """The classes with their usual colours."""
    return next(
        (known for known in (CAMVID, CITYSCAPES) if list(known.names) == names),
        LabelSet(tuple(names), palette(len(names))),
    )


def _label_maps(
    stored: Sequence[tuple[str, _Arrays]], labels: LabelSet
) -> tuple[list[Tile], set[int]]:
    """Tiles of one image, and the classes in them."""
    best, first = stored[0]
    image = first["image"]
    truth = first["truth"]
    valid = truth != IGNORE
    tiles = [_photo("image", image), _map("truth", truth, labels)]
    classes = set(np.unique(truth).tolist())
    for name, arrays in stored:
        prediction = arrays["prediction"]
        right = (prediction == truth)[valid].mean() if valid.any() else 0.0
        tiles.append(_map(f"{name}: {100 * right:.0f} % of pixels right", prediction, labels))
        classes |= set(np.unique(prediction).tolist())
    wrong = valid & (first["prediction"] != truth)
    grey = np.repeat(cv2.cvtColor(image, cv2.COLOR_RGB2GRAY)[..., None], 3, axis=2)
    # Errors are also brighter, so that they are visible without colour vision.
    shaded = np.where(valid[..., None], 0.35 * grey + 30, 0.1 * grey)
    errors = np.where(wrong[..., None], 0.1 * grey + 0.9 * np.array(_WRONG), shaded)
    tiles.append(_photo(f"errors of {best}", errors.astype(np.uint8)))
    return tiles, classes - {IGNORE}


def _boxes(stored: Sequence[tuple[str, _Arrays]], labels: LabelSet) -> tuple[list[Tile], set[int]]:
    """Tiles of one image; tags name the classes, so that none needs a legend."""
    best, first = stored[0]
    # Twice the size of other pictures, so that the tags can be read.
    scale = min(1.0, 2 * WIDTH / first["image"].shape[1])
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
        return _photo(caption, picture, 2 * WIDTH)

    tiles = [
        _photo("image", first["image"], 2 * WIDTH),
        drawn("truth", first["truth_boxes"], first["truth_classes"], labels),
    ]
    for name, arrays in stored:
        shown = arrays["scores"] >= MIN_SCORE
        boxes, classes, scores = (arrays[key][shown] for key in ("boxes", "classes", "scores"))
        tiles.append(drawn(name, boxes, classes, labels, scores.astype(np.float32)))
    boxes, outcomes = _judged(first)
    tiles.append(drawn(f"errors of {best}", boxes, outcomes, _OUTCOMES))
    return tiles, set()


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


def _photo(caption: str, picture: np.ndarray, width: int = WIDTH) -> Tile:
    h, w = picture.shape[:2]
    if w > width:
        size = (width, max(1, round(h * width / w)))
        picture = cv2.resize(picture, size, interpolation=cv2.INTER_AREA)
    data = _encoded(Image.fromarray(picture), "JPEG", quality=82, optimize=True)
    return Tile(caption, data, "jpg")


def _map(caption: str, label: np.ndarray, labels: LabelSet) -> Tile:
    """A label map in few bytes: ids with a palette; pixels without a class are black."""
    h, w = label.shape
    if w > WIDTH:
        size = (WIDTH, max(1, round(h * WIDTH / w)))
        label = cv2.resize(label, size, interpolation=cv2.INTER_NEAREST)
    picture = Image.fromarray(label)
    channels = [channel for color in labels.colors for channel in color]
    picture.putpalette(channels + [0] * (768 - len(channels)))
    return Tile(caption, _encoded(picture, "PNG", optimize=True), "png")


def _encoded(picture: Image.Image, kind: str, **options: bool | int) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, kind, **options)
    return buffer.getvalue()
