"""Drawn scenes of boxes, and what pycocotools says of them: for the tests of average precision and
for the script of their golden file.
"""

import contextlib
import io

import numpy as np

from jaxdg.evaluation.average_precision import Detections, Truth


def boxes(rng, n, size):
    """Boxes of integers inside an image of `size` (height, width), sides from 4 pixels to the
    whole, small ones more often.
    """
    limit = np.array([size[1], size[0]])
    sides = np.minimum(np.exp(rng.uniform(np.log(4), np.log(400), (n, 2))).astype(int), limit)
    start = (rng.random((n, 2)) * (limit - sides + 1)).astype(int)
    return np.concatenate([start, start + sides], axis=1)


def image(rng, num_classes, *, most=12, size=(240, 320)):
    """Integer truth and half-integer detections of one image: near copies, copies of copies, wrong
    classes, chance.
    """
    n = int(rng.integers(0, most + 1))
    true = boxes(rng, n, size)
    classes = rng.integers(0, num_classes, n)
    picks = rng.integers(0, n, int(rng.integers(0, 3 * n + 1))) if n else np.zeros(0, int)
    sides = np.tile(true[:, 2:] - true[:, :2], 2)[picks]
    near = (
        true[picks]
        + np.round(
            2
            * rng.normal(size=(len(picks), 4))
            * sides
            * rng.choice([0, 0.02, 0.1, 0.2], (len(picks), 1))
        )
        / 2
    )
    near = np.stack(
        [
            near[:, 0],
            near[:, 1],
            np.maximum(near[:, 2], near[:, 0]),
            np.maximum(near[:, 3], near[:, 1]),
        ],
        axis=1,
    )
    chance = boxes(rng, int(rng.integers(0, 8)), size) + rng.choice([0, 0.5])
    found = np.concatenate([near, chance])
    guessed = np.concatenate([classes[picks], rng.integers(0, num_classes, len(chance))])
    guessed = np.where(
        rng.random(len(found)) < 0.1, rng.integers(0, num_classes, len(found)), guessed
    )
    truth = Truth(
        true.astype(np.float32),
        classes.astype(np.int32),
        rng.random(n) < 0.15,
        rng.random(n) < 0.1,
        box_area_shares(rng, true),
    )
    return truth, Detections(
        found.astype(np.float32), rng.random(len(found), np.float32), guessed.astype(np.int32)
    )


def box_area_shares(rng, true):
    """Areas as of masks: a part of each box."""
    return np.prod(true[:, 2:] - true[:, :2], axis=1) * rng.uniform(0.4, 1, len(true))


def pycocotools_judge(truths, detections, num_classes):
    """Pycocotools' evaluation of the boxes, accumulated."""
    from pycocotools.coco import COCO  # pyright: ignore[reportMissingImports]
    from pycocotools.cocoeval import COCOeval  # pyright: ignore[reportMissingImports]

    listed = {
        "info": {},
        "images": [{"id": i} for i in range(len(truths))],
        "categories": [{"id": k, "name": str(k)} for k in range(num_classes)],
    }

    def xywh(b):
        return np.concatenate([b[:, :2], b[:, 2:] - b[:, :2]], axis=1).astype(float).tolist()

    true = COCO()
    found = COCO()
    true.dataset = {**listed, "annotations": []}
    found.dataset = {**listed, "annotations": []}
    for i, (t, d) in enumerate(zip(truths, detections, strict=True)):
        for box, k, crowd, area in zip(xywh(t.boxes), t.classes, t.crowd, t.areas, strict=True):
            row = {
                "image_id": i,
                "category_id": int(k),
                "bbox": box,
                "area": float(area),
                "iscrowd": int(crowd),
            }
            true.dataset["annotations"].append({"id": len(true.dataset["annotations"]) + 1, **row})
        for box, k, score in zip(xywh(d.boxes), d.classes, d.scores, strict=True):
            row = {
                "image_id": i,
                "category_id": int(k),
                "bbox": box,
                "area": box[2] * box[3],
                "iscrowd": 0,
                "score": float(score),
            }
            found.dataset["annotations"].append(
                {"id": len(found.dataset["annotations"]) + 1, **row}
            )
    with contextlib.redirect_stdout(io.StringIO()):
        true.createIndex()
        found.createIndex()
        judge = COCOeval(true, found, "bbox")
        judge.evaluate()
        judge.accumulate()
    return judge


def pycocotools_scores(truths, detections, num_classes):
    """The twelve numbers, and AP50 of each class, in percent; nan where pycocotools says -1."""
    judge = pycocotools_judge(truths, detections, num_classes)
    with contextlib.redirect_stdout(io.StringIO()):
        judge.summarize()
    ap50 = judge.eval["precision"][0, :, :, 0, 2].mean(axis=0)
    stats = np.asarray(judge.stats, float)
    ap50 = np.where(ap50 < 0, np.nan, ap50)
    return 100 * np.where(stats < 0, np.nan, stats), 100 * ap50
