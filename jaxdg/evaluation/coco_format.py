"""Truth and detections of a domain as COCO's JSON files, which pycocotools and other tools read.

`NAME_truth.json` is an annotation file, `NAME.json` its results file. Boxes are x y width height.
Classes count from 1 there, as do images and annotations (pycocotools takes annotation 0 for no
match). Crowd regions are `iscrowd`; a difficult box has `"difficult": 1`, a key that COCO does not
know and its tools do not read, so that they count such a box as any other: as `AveragePrecision`
does by COCO's rule. Numbers keep all their digits, so that pycocotools gives the same scores.
"""

from collections.abc import Sequence
import json
from pathlib import Path
from typing import Any

import numpy as np

from jaxdg.evaluation.average_precision import Detections, Truth, box_areas
from jaxdg.files import of_domain, write


def write_coco(
    folder: Path,
    domain: str,
    names: Sequence[str],
    files: Sequence[str],
    sizes: Sequence[tuple[int, int]],
    truths: Sequence[Truth],
    detections: Sequence[Detections],
) -> None:
    """Writes `DOMAIN_truth.json` and `DOMAIN.json`; missing folders are made, also those that a
    domain such as `acdc/night` implies.

    Args:
        folder: where to.
        domain: name of the files.
        names: of the classes.
        files: name of each image.
        sizes: height and width of each image in pixels.
        truths: of each image.
        detections: of each image.

    Raises:
        ValueError: there are not as many files, sizes, truths and detections.
    """
    if not len(files) == len(sizes) == len(truths) == len(detections):
        raise ValueError(
            f"{domain}: {len(files)} files, {len(sizes)} sizes, {len(truths)} truths and"
            f" {len(detections)} detections; each image has one"
        )
    annotations = []
    results = []
    for image_id, (truth, found) in enumerate(zip(truths, detections, strict=True), start=1):
        areas = box_areas(truth.boxes) if truth.areas is None else truth.areas
        rows = (
            _xywh(truth.boxes),
            truth.classes.tolist(),
            areas.tolist(),
            truth.crowd.tolist(),
            truth.difficult.tolist(),
        )
        for bbox, k, area, crowd, difficult in zip(*rows, strict=True):
            row = {
                "id": len(annotations) + 1,
                "image_id": image_id,
                "category_id": k + 1,
                "bbox": bbox,
                "area": area,
            }
            annotations.append(row | {"iscrowd": int(crowd), "difficult": int(difficult)})
        for bbox, k, score in zip(
            _xywh(found.boxes), found.classes.tolist(), found.scores.tolist(), strict=True
        ):
            results.append(
                {"image_id": image_id, "category_id": k + 1, "bbox": bbox, "score": score}
            )
    annotation_file = {
        "info": {"description": domain},
        "images": [
            {"id": i, "file_name": file, "height": h, "width": w}
            for i, (file, (h, w)) in enumerate(zip(files, sizes, strict=True), start=1)
        ],
        "categories": [{"id": k, "name": name} for k, name in enumerate(names, start=1)],
        "annotations": annotations,
    }
    for ending, content in (("_truth.json", annotation_file), (".json", results)):
        path = of_domain(folder, domain, ending)
        path.parent.mkdir(parents=True, exist_ok=True)
        write(path, json.dumps(content))


def read_coco(
    truth_file: Path, detections_file: Path
) -> tuple[tuple[str, ...], list[Truth], list[Detections]]:
    """Reads what `write_coco` or another tool wrote, in the order of pycocotools: classes and
    images by their ids.

    Args:
        truth_file: annotations; `area`, `iscrowd` and `difficult` may be absent.
        detections_file: results.

    Returns:
        Names of the classes, then the truth and the detections of each image, in float64.

    Raises:
        FileNotFoundError: a file is absent.
        ValueError: a file is not JSON, lacks a key, has two entries of one id or a flag that is
            neither 0 nor 1, or names an image or a class that the truth does not list.
    """
    content = _read(truth_file)
    results = _read(detections_file)
    try:
        categories = sorted(content["categories"], key=lambda c: c["id"])
        class_of = _places(truth_file, "categories", [c["id"] for c in categories])
        image_of = _places(truth_file, "images", sorted(image["id"] for image in content["images"]))
        names = tuple(c["name"] for c in categories)
        true = _by_image(truth_file, content["annotations"], image_of, class_of)
    except (KeyError, TypeError) as error:
        raise ValueError(f"{truth_file}: not a COCO annotation file: {error!r}") from error
    try:
        found = _by_image(detections_file, results, image_of, class_of, "score")
        detections = [
            Detections(boxes, np.array([r["score"] for r in rows], float), classes)
            for boxes, classes, rows in found
        ]
    except (KeyError, TypeError) as error:
        raise ValueError(f"{detections_file}: not a COCO results file: {error!r}") from error
    truths = []
    for boxes, classes, rows in true:
        difficult, crowd = (
            np.array([_flag(truth_file, r, key) for r in rows], bool)
            for key in ("difficult", "iscrowd")
        )
        areas = np.array([r.get("area", r["bbox"][2] * r["bbox"][3]) for r in rows], float)
        truths.append(Truth(boxes, classes, difficult, crowd, areas))
    return names, truths, detections


def _xywh(boxes: np.ndarray) -> list[list[float]]:
    wide = boxes.astype(np.float64)  # the difference of two float32 is exact in float64
    return np.concatenate([wide[:, :2], wide[:, 2:] - wide[:, :2]], axis=1).tolist()


def _read(path: Path) -> Any:
    try:
        return json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}: not JSON: {error}") from error


def _places(path: Path, kind: str, ids: list[int]) -> dict[int, int]:
    """The place of each id in a list."""
    places = {id_: i for i, id_ in enumerate(ids)}
    if len(places) < len(ids):
        twice = next(id_ for id_ in ids if ids.count(id_) > 1)
        raise ValueError(f"{path}: two of the {kind} have one id, {twice}; renumber one")
    return places


def _flag(path: Path, row: dict[str, Any], key: str) -> bool:
    """Whether a flag is set; text is read too, as "0" is no yes."""
    said = {"0": False, "false": False, "0.0": False, "1": True, "true": True, "1.0": True}
    text = str(row.get(key) or 0).strip().lower()
    if text not in said:
        raise ValueError(
            f"{path}: an annotation of image {row['image_id']} has the {key} {row[key]!r}; allowed"
            " are 0 and 1"
        )
    return said[text]


def _by_image(
    path: Path,
    rows: list[dict[str, Any]],
    image_of: dict[int, int],
    class_of: dict[int, int],
    *more: str,
) -> list[tuple[np.ndarray, np.ndarray, list[dict[str, Any]]]]:
    """Boxes x0 y0 x1 y1, classes and rows of each image; a row needs `more` keys too."""
    images: list[list[dict[str, Any]]] = [[] for _ in image_of]
    for number, row in enumerate(rows, start=1):
        if lacking := [key for key in ("image_id", "category_id", "bbox", *more) if key not in row]:
            raise ValueError(f"{path}: entry {number} (counted from 1) has no {lacking[0]!r}")
        for key, known in (("image_id", image_of), ("category_id", class_of)):
            if row[key] not in known:
                raise ValueError(f"{path}: {key} {row[key]} is not in the annotation file")
        images[image_of[row["image_id"]]].append(row)
    boxes = [np.array([r["bbox"] for r in rows], float).reshape(-1, 4) for rows in images]
    return [
        (
            np.concatenate([b[:, :2], b[:, :2] + b[:, 2:]], axis=1),
            np.array([class_of[r["category_id"]] for r in rows], np.int64),
            rows,
        )
        for b, rows in zip(boxes, images, strict=True)
    ]
