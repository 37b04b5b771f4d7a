"""Pictures of what the models of a study see: image, truth, predictions, and where the best of them
is wrong.

Drawn from `runs/NAME/qualitative/DOMAIN_I.npz`: `image` uint8 [h, w, 3] with, for segmentation,
`truth` and `prediction` uint8 [h, w], or, for detection, `truth_boxes` [n, 4], `truth_classes` [n],
`boxes` [m, 4], `scores` [m], `classes` [m].
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

MODELS = 4
IMAGES = 2
WIDTH = 240  # predictions side by side, images a domain, and pixels across a picture
_WRONG = (255, 200, 0)
SURE = 0.3  # least score of a box that is drawn
_OUTCOMES = LabelSet(("found", "missed", "false"), ((0, 158, 115), (230, 159, 0), (213, 94, 0)))


def pictures(study: Study) -> list[Pictures]:
    """A grid for each domain that runs have kept images of."""
    models = _models(study)
    grids = []
    for domain, entry in study.entries().items():
        pattern = re.compile(rf"{re.escape(domain.replace('/', '_'))}_\d+\.npz")
        names = sorted(
            {
                file.name
                for _, folder in models
                for file in folder.glob("*.npz")
                if pattern.fullmatch(file.name)
            },
            key=_number,
        )
        labels = _labels(list(entry["AP50" if study.score == "mAP50" else "IoU"]))
        draw = _boxes if study.score == "mAP50" else _label_maps
        rows = []
        present = set()
        for name in names[:IMAGES]:
            kept = [
                (label, dict(np.load(folder / name)))
                for label, folder in models
                if (folder / name).is_file()
            ]
            tiles, classes = draw(kept, labels)
            rows.append(tuple(tiles))
            present |= classes
        if rows:
            legend = (
                tuple((labels.names[k], labels.colors[k]) for k in sorted(present))
                if draw is _label_maps
                else ()
            )
            which = results.mark(domain, entry, study.json["source"]).strip(" ()") or "unseen"
            which = (
                f"{which}; {results.JUDGED}: {told}" if (told := results.share(entry)) else which
            )
            grids.append(
                Pictures(
                    domain.replace("/", "_"),
                    tuple(rows),
                    f"Images of {domain} ({which}).{_HOW[draw]}",
                    legend,
                )
            )
    return grids


def _models(study: Study) -> list[tuple[str, Path]]:
    """Names and picture folders of the models to show: the best on unseen domains first, the others
    spread over the ranking.
    """
    ranked = study.ranked() or [group for group in study.groups if study.finished(group)]
    if len(ranked) == 1:  # seeds side by side
        found = [(f"seed {run['seed']}", run["name"]) for run in study.finished(ranked[0])]
    else:
        found = [(group["group"], study.finished(group)[0]["name"]) for group in ranked]
    keep = (
        np.unique(np.linspace(0, len(found) - 1, min(MODELS, len(found))).round().astype(int))
        if found
        else []
    )
    return [(found[i][0], study.folder / "runs" / found[i][1] / "qualitative") for i in keep]


def _number(name: str) -> int:
    return int(name.removesuffix(".npz").rsplit("_", 1)[1])


def _labels(names: list[str]) -> LabelSet:
    """The classes with the colours they are known by."""
    return next(
        (known for known in (CAMVID, CITYSCAPES) if list(known.names) == names),
        LabelSet(tuple(names), palette(len(names))),
    )


def _label_maps(
    kept: Sequence[tuple[str, dict[str, np.ndarray]]], labels: LabelSet
) -> tuple[list[Tile], set[int]]:
    """Tiles of one image, and the classes in them."""
    image = kept[0][1]["image"]
    truth = kept[0][1]["truth"]
    valid = truth != IGNORE
    tiles = [_photo("image", image), _map("truth", truth, labels)]
    for name, arrays in kept:
        right = (arrays["prediction"] == truth)[valid].mean() if valid.any() else 0.0
        tiles.append(
            _map(f"{name}: {100 * right:.0f} % of pixels right", arrays["prediction"], labels)
        )
    wrong = valid & (kept[0][1]["prediction"] != truth)
    grey = np.repeat(cv2.cvtColor(image, cv2.COLOR_RGB2GRAY)[..., None], 3, axis=2)
    shaded = np.where(
        valid[..., None], 0.35 * grey + 30, 0.1 * grey
    )  # darker than what is wrong, for eyes that tell no colours
    errors = np.where(wrong[..., None], 0.1 * grey + 0.9 * np.array(_WRONG), shaded).astype(
        np.uint8
    )
    tiles.append(_photo(f"errors of {kept[0][0]}", errors))
    return tiles, set(
        np.unique([arrays[key] for _, arrays in kept for key in ("truth", "prediction")]).tolist()
    ) - {IGNORE}


def _boxes(
    kept: Sequence[tuple[str, dict[str, np.ndarray]]], labels: LabelSet
) -> tuple[list[Tile], set[int]]:
    """Tiles of one image; each has its own legend."""
    first = kept[0][1]
    scale = min(
        1.0, 2 * WIDTH / first["image"].shape[1]
    )  # twice as large as shown, for the tags to be read
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
    for name, a in kept:
        sure = a["scores"] >= SURE
        tiles.append(
            drawn(
                name,
                a["boxes"][sure],
                a["classes"][sure],
                labels,
                a["scores"][sure].astype(np.float32),
            )
        )
    boxes, outcomes = _judged(first)
    tiles.append(drawn(f"errors of {kept[0][0]}", boxes, outcomes, _OUTCOMES))
    return tiles, set()


def _judged(a: dict[str, np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Boxes with what became of them, 0 found, 1 missed, 2 false: the surest first find the true
    box of their class they overlap most.
    """
    order = [i for i in np.argsort(-a["scores"], kind="stable") if a["scores"][i] >= SURE]
    free = np.ones(len(a["truth_boxes"]), bool)
    outcomes = []
    for i in order:
        t = a["truth_boxes"].reshape(-1, 4)
        b = a["boxes"][i]
        shared = np.prod(
            np.clip(np.minimum(t[:, 2:], b[2:]) - np.maximum(t[:, :2], b[:2]), 0, None), axis=1
        )
        union = np.prod(t[:, 2:] - t[:, :2], axis=1) + np.prod(b[2:] - b[:2]) - shared
        iou = np.where(
            free & (a["truth_classes"] == a["classes"][i]), shared / np.maximum(union, 1e-9), 0
        )
        hit = len(iou) > 0 and iou.max() >= 0.5
        outcomes.append(0 if hit else 2)
        if hit:
            free[iou.argmax()] = False
    boxes = np.concatenate(
        [a["boxes"][order].reshape(-1, 4), a["truth_boxes"].reshape(-1, 4)[free]]
    )
    return boxes, np.array(outcomes + [1] * int(free.sum()), np.int64)


_HOW = {
    _label_maps: (
        " In the last picture wrong pixels are yellow, and those without truth nearly black."
    ),
    _boxes: (
        f" Boxes of a score of at least {SURE:g}. Errors: found are those on a true box of the"
        " class (IoU 0.5)."
    ),
}


def _photo(caption: str, picture: np.ndarray, width: int = WIDTH) -> Tile:
    h, w = picture.shape[:2]
    small = (
        picture
        if w <= width
        else cv2.resize(
            picture, (width, max(1, round(h * width / w))), interpolation=cv2.INTER_AREA
        )
    )
    return Tile(caption, _encoded(Image.fromarray(small), "JPEG", quality=82, optimize=True), "jpg")


def _map(caption: str, label: np.ndarray, labels: LabelSet) -> Tile:
    """A label map in few bytes: ids with a palette; what has no class is black."""
    h, w = label.shape
    small = (
        label
        if w <= WIDTH
        else cv2.resize(
            label, (WIDTH, max(1, round(h * WIDTH / w))), interpolation=cv2.INTER_NEAREST
        )
    )
    picture = Image.fromarray(small)
    picture.putpalette(
        [channel for color in labels.colors for channel in color]
        + [0] * (768 - 3 * len(labels.colors))
    )
    return Tile(caption, _encoded(picture, "PNG", optimize=True), "png")


def _encoded(picture: Image.Image, kind: str, **options: bool | int) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, kind, **options)
    return buffer.getvalue()
