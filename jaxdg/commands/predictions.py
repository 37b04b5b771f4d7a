"""How `predict` writes a prediction: label maps, probabilities, boxes and overlays."""

from collections.abc import Callable
import io
import json
from pathlib import Path
import sys

import numpy as np
from PIL import Image

from jaxdg.commands import outputs
from jaxdg.data.labels import LabelSet
from jaxdg.drawing.overlays import box_overlay, overlay
from jaxdg.evaluation.average_precision import Detections

SCORES = ("_scores.npz", "_confidence.png")  # behind a name, with --scores
Write = Callable[[Path, bytes], None]


def write_label(
    target: Path, image: np.ndarray, label: np.ndarray, labels: LabelSet, write: Write | None = None
) -> str:
    """Writes a label map uint8 [h, w] as `TARGET.png` and `TARGET_overlay.jpg`; returns a line."""
    write = write or outputs.Outputs(target.parent).write
    write(Path(f"{target}.png"), encoded(label, "PNG"))
    write(
        Path(f"{target}_overlay.jpg"),
        encoded(overlay(image, label, labels.colors, labels.names), "JPEG"),
    )
    counts = np.bincount(label.ravel(), minlength=len(labels.names))
    return f"{target}.png  {classes_line(counts, labels)}"


def classes_line(counts: np.ndarray, labels: LabelSet) -> str:
    """The three most frequent classes and their shares."""
    ids = np.flatnonzero(counts)
    shares = sorted(zip(counts[ids] / counts.sum(), ids, strict=True), reverse=True)[:3]
    return ", ".join(f"{labels.names[i]} {100 * share:.0f} %" for share, i in shares)


def write_scores(target: Path, scores: np.ndarray, labels: LabelSet, write: Write) -> None:
    """Writes probabilities float32 [h, w, k] as `TARGET_scores.npz` and `TARGET_confidence.png`."""
    packed = io.BytesIO()
    np.savez_compressed(packed, scores=scores.astype(np.float16), classes=np.array(labels.names))
    write(Path(f"{target}{SCORES[0]}"), packed.getvalue())
    confidence = np.rint(255 * scores.max(axis=-1)).astype(np.uint8)
    write(Path(f"{target}{SCORES[1]}"), encoded(confidence, "PNG"))


def write_boxes(
    target: Path,
    image: np.ndarray,
    found: Detections,
    labels: LabelSet,
    score_threshold: float,
    write: Write | None = None,
) -> str:
    """Writes boxes with at least this score as `TARGET.json` and `TARGET_overlay.jpg`."""
    write = write or outputs.Outputs(target.parent).write
    sure = sure_boxes(found, score_threshold)
    write(Path(f"{target}.json"), entries(sure, labels))
    write(
        Path(f"{target}_overlay.jpg"),
        encoded(
            box_overlay(image, sure.boxes, sure.classes, labels.colors, labels.names, sure.scores),
            "JPEG",
        ),
    )
    return f"{target}.json  {boxes_line(np.bincount(sure.classes, minlength=1), labels)}"


def sure_boxes(found: Detections, score_threshold: float) -> Detections:
    """The boxes with at least this score."""
    sure = found.scores >= score_threshold
    return Detections(found.boxes[sure], found.scores[sure], found.classes[sure])


def entries(found: Detections, labels: LabelSet) -> bytes:
    """Boxes as JSON."""
    boxes = found.boxes.tolist()
    entries = [
        {
            "category": labels.names[k],
            "category_id": k + 1,
            "bbox": [x0, y0, x1 - x0, y1 - y0],
            "score": score,
        }
        for (x0, y0, x1, y1), score, k in zip(
            boxes, found.scores.tolist(), found.classes.tolist(), strict=True
        )
    ]
    return json.dumps(entries).encode()


def boxes_line(counts: np.ndarray, labels: LabelSet) -> str:
    """How many boxes of each class."""
    named = zip(counts.tolist(), labels.names, strict=False)
    return ", ".join(f"{count} {name}" for count, name in named if count) or "nothing"


def say(line: str) -> None:
    """Tells a person something that is no result."""
    print(line, file=sys.stderr, flush=True)


def encoded(picture: np.ndarray, form: str) -> bytes:
    data = io.BytesIO()
    Image.fromarray(picture).save(data, form, quality=92)
    return data.getvalue()
