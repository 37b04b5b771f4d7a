"""Makes tests/golden/numbers.npz: label maps and confidences, judged by four public tools.

Run by hand where torchmetrics (last 1.9.0) and OpenCV are installed, with the file
mmseg/evaluation/metrics/iou_metric.py of mmsegmentation (last 1.2.2) and checkouts of detectron2
(last 02b5c4e2) and of bowenc0221/boundary-iou-api (last 37d2558), of which single functions run:

    python tests/oracles/golden_numbers.py IOU_METRIC DETECTRON2 BOUNDARY_IOU

- CASE/NAME: the scores of mmsegmentation's `IoUMetric` on the images of a case, in [0, 1].
- CASE/fwIoU: detectron2's, in percent.
- CASE/boundary: intersection and union of the boundaries of every class in every image, by the
  authors' `mask_to_boundary` and what their panoptic evaluation makes of it: the truth's boundary
  and the prediction's, without those pixels of the latter that have no truth.
- calibration/CASE/ece: torchmetrics' error of 15 bins.
"""

import ast
from collections import OrderedDict
from pathlib import Path
import sys
from types import SimpleNamespace
from typing import Any

import cv2
import numpy as np
import torch  # pyright: ignore[reportMissingImports]
from torchmetrics.classification import (  # pyright: ignore[reportMissingImports]
    MulticlassCalibrationError,
)

OUT = Path(__file__).resolve().parents[2] / "tests" / "golden" / "numbers.npz"
CLASSES = 5
# 0.02 of the diagonals of the last two is 1.5 and 2.5 pixels, which round to the even number.
SIZES = ((24, 33), (60, 90), (121, 170), (45, 60), (75, 100))


def functions(file: Path, names: tuple[str, ...], known: dict[str, Any]) -> dict[str, Any]:
    """Functions or methods of a file, without what it imports."""
    found = {}
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.FunctionDef) and node.name in names:
            node.decorator_list = []
            for argument in (*node.args.args, *node.args.kwonlyargs):
                argument.annotation = None
            node.returns = None
            exec(compile(ast.Module([node], []), str(file), "exec"), known)
            found[node.name] = known[node.name]
    return found


def blobs(rng: np.random.Generator, size: tuple[int, int], classes: int) -> np.ndarray:
    """A map of a few large regions."""
    small = rng.integers(0, classes, (5, 7)).astype(np.uint8)
    return cv2.resize(small, size[::-1], interpolation=cv2.INTER_NEAREST)


def label_maps() -> dict[str, tuple[list[np.ndarray], list[np.ndarray]]]:
    """Truths and predictions of every case."""
    rng = np.random.default_rng(0)
    cases = {}
    for name in ("random", "degenerate"):
        truths, predictions = [], []
        for size in SIZES:
            truth = blobs(rng, size, CLASSES)
            shifted = np.roll(truth, rng.integers(1, 4, 2), (0, 1))
            wrong = rng.random(size) < 0.1
            prediction = np.where(wrong, rng.integers(0, CLASSES, size), shifted).astype(np.uint8)
            truth[rng.random(size) < 0.05] = 255
            truth[: size[0] // 4, : size[1] // 3] = 255
            if name == "degenerate":
                truth[np.isin(truth, (1, 3))] = 255  # class 1 is nowhere, class 3 only predicted,
                prediction[np.isin(prediction, (1, 4))] = 0  # class 4 only true
            truths.append(truth)
            predictions.append(prediction)
        cases[name] = truths, predictions
    truths, predictions = cases["random"]
    cases["ignored"] = [np.full_like(t, 255) for t in truths], predictions
    one = [np.full_like(t, 2) for t in truths]
    cases["one_class"] = one, one
    return cases


def confidences() -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Probabilities [n, k] and true classes [n] of every case; no probability is 1, which
    torchmetrics gives a bin of its own.
    """
    rng = np.random.default_rng(1)
    cases = {}
    for name, sharpness in (("sharp", 4.0), ("flat", 0.3)):
        logits = sharpness * rng.normal(size=(1000, CLASSES))
        probabilities = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
        truth = np.where(rng.random(1000) < 0.6, logits.argmax(1), rng.integers(0, CLASSES, 1000))
        truth[rng.random(1000) < 0.2] = 255
        cases[name] = probabilities.astype(np.float32).clip(0, 0.9999), truth
    return cases


def main(iou_metric: Path, detectron2: Path, boundary_iou: Path) -> None:
    """Draws the cases, asks the tools and writes the file."""
    stored: dict[str, Any] = {"sizes": np.array(SIZES)}
    cases = label_maps()
    known = {"torch": torch, "OrderedDict": OrderedDict, "np": np}
    mmseg = functions(iou_metric, ("intersect_and_union", "total_area_to_metrics"), known)
    shim = SimpleNamespace(**{name: getattr(np, name) for name in dir(np) if name != "float"})
    shim.float = np.float64  # NumPy has lost that name
    names = {"np": shim, "OrderedDict": dict}
    file = detectron2 / "detectron2" / "evaluation" / "sem_seg_evaluation.py"
    evaluate = functions(file, ("evaluate",), names)["evaluate"]
    file = boundary_iou / "boundary_iou" / "utils" / "boundary_utils.py"
    to_boundary = functions(file, ("mask_to_boundary",), {"np": np, "cv2": cv2})["mask_to_boundary"]
    for name, (truths, predictions) in cases.items():
        stored[f"{name}/truth"] = np.concatenate([t.ravel() for t in truths])
        stored[f"{name}/prediction"] = np.concatenate([p.ravel() for p in predictions])
        areas = [
            mmseg["intersect_and_union"](torch.from_numpy(p), torch.from_numpy(t), CLASSES, 255)
            for t, p in zip(truths, predictions, strict=True)
        ]
        summed = [sum(area) for area in zip(*areas, strict=True)]
        found = mmseg["total_area_to_metrics"](*summed, ["mIoU", "mDice", "mFscore"])
        stored |= {f"{name}/{key}": value for key, value in found.items()}

        counts = np.zeros((CLASSES + 1, CLASSES + 1), np.int64)
        for t, p in zip(truths, predictions, strict=True):
            np.add.at(counts, (p.astype(int), np.where(t == 255, CLASSES, t).astype(int)), 1)
        evaluator = SimpleNamespace(
            _distributed=False,
            _output_dir=None,
            _num_classes=CLASSES,
            _conf_matrix=counts,
            _compute_boundary_iou=False,
            _class_names=tuple("abcde"),
            _logger=SimpleNamespace(info=lambda _: None),
        )
        with np.errstate(invalid="ignore"):
            stored[f"{name}/fwIoU"] = np.array(evaluate(evaluator)["sem_seg"]["fwIoU"])

        pairs = np.zeros((len(truths), CLASSES, 2), np.int64)
        for i, (t, p) in enumerate(zip(truths, predictions, strict=True)):
            for k in range(CLASSES):
                true, guessed = (to_boundary((x == k).astype(np.uint8)) > 0 for x in (t, p))
                both = np.count_nonzero(true & guessed)
                outside = np.count_nonzero(guessed & (t == 255))
                pairs[i, k] = both, np.sum(true) + np.sum(guessed) - both - outside
        stored[f"{name}/boundary"] = pairs

    for name, (probabilities, truth) in confidences().items():
        error = MulticlassCalibrationError(CLASSES, n_bins=15, norm="l1", ignore_index=255)
        error.update(torch.from_numpy(probabilities), torch.from_numpy(truth))
        stored |= {
            f"calibration/{name}/probabilities": probabilities,
            f"calibration/{name}/truth": truth.astype(np.uint8),
            f"calibration/{name}/ece": error.compute().numpy(),
        }
    np.savez_compressed(OUT, **stored)
    print(f"{OUT}: {OUT.stat().st_size} bytes")


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
