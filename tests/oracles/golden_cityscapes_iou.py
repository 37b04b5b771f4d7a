"""Makes tests/golden/cityscapes_iou.npz: random label maps and their official Cityscapes IoU.

Run by hand where `cityscapesscripts` is installed:

    python tests/oracles/golden_cityscapes_iou.py

The official code reads PNG files of Cityscapes label ids, so train ids become label ids, and
ignored pixels become any of the ids that it ignores.
"""

from pathlib import Path
import tempfile

from cityscapesscripts.evaluation import (  # pyright: ignore[reportMissingImports]
    evalPixelLevelSemanticLabeling as official,
)
from cityscapesscripts.helpers.labels import (  # pyright: ignore[reportMissingImports]
    labels,
    trainId2label,
)
import numpy as np
from PIL import Image

OUT = Path(__file__).resolve().parents[2] / "tests" / "golden" / "cityscapes_iou.npz"
IDS = np.array([trainId2label[i].id for i in range(19)], np.uint8)
NAMES = [trainId2label[i].name for i in range(19)]
IGNORED = np.array([label.id for label in labels if label.ignoreInEval and label.id >= 0], np.uint8)


def official_iou(truth: np.ndarray, prediction: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """IoU of the 19 classes over a set of images [n, h, w] of train ids (255 ignored), by the
    official code.
    """
    truth_ids = np.where(truth == 255, rng.choice(IGNORED, truth.shape), IDS[np.minimum(truth, 18)])
    vars(official.args).update(evalInstLevelScore=False, JSONOutput=False, quiet=True)
    with tempfile.TemporaryDirectory() as folder:
        pairs = []
        for i, (t, p) in enumerate(zip(truth_ids, IDS[prediction], strict=True)):
            pairs.append((f"{folder}/{i}_prediction.png", f"{folder}/{i}_truth.png"))
            Image.fromarray(p).save(pairs[-1][0])
            Image.fromarray(t).save(pairs[-1][1])
        result = official.evaluateImgLists(
            [p for p, _ in pairs], [t for _, t in pairs], official.args
        )
    return np.array([result["classScores"][name] for name in NAMES])


def official_iou_of_counts(counts: np.ndarray) -> np.ndarray:
    """IoU of a given matrix of train ids, by the official code: a way past the pixels that fit in
    memory.
    """
    matrix = official.generateMatrix(official.args)
    matrix[np.ix_(IDS, IDS)] = counts
    return np.array([official.getIouScoreForLabel(int(i), matrix, official.args) for i in IDS])


def main() -> None:
    """Draws the cases and writes the file."""
    rng = np.random.default_rng(0)
    truth, prediction = rng.integers(0, 19, (2, 3, 4, 40, 56), dtype=np.uint8)  # 3 sets of 4 images
    agree = rng.random(truth.shape) < 0.7
    prediction[agree] = truth[agree]
    truth[rng.random(truth.shape) < 0.1] = 255
    truth[:, :, 30:] = 255  # whole regions too, such as the car's bonnet
    # Set 1: terrain occurs nowhere, train is predicted but never true, wall is true but never
    # predicted.
    truth[1][np.isin(truth[1], (9, 16))] = 255
    prediction[1][np.isin(prediction[1], (9, 3))] = 0
    # Set 2: most classes are absent, and one of them (bus) is predicted on ignored pixels only,
    # which must not count.
    truth[2] = np.where(truth[2] < 5, truth[2], 255)
    prediction[2] = np.where(truth[2] < 5, prediction[2] % 5, 15)
    counts = rng.integers(0, 2**33, (19, 19))
    np.savez_compressed(
        OUT,
        truth=truth,
        prediction=prediction,
        iou=np.stack([official_iou(t, p, rng) for t, p in zip(truth, prediction, strict=True)]),
        large_counts=counts,
        large_iou=official_iou_of_counts(counts),
    )
    print(f"{OUT}: {OUT.stat().st_size} bytes")


if __name__ == "__main__":
    main()
