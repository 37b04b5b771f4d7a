"""Makes tests/golden/jaccard.npz: random label maps and their IoU by torchmetrics.

Run by hand where torchmetrics is installed:

    python tests/oracles/golden_jaccard.py
"""

from pathlib import Path

import numpy as np
import torch  # pyright: ignore[reportMissingImports]
from torchmetrics.classification import (  # pyright: ignore[reportMissingImports]
    MulticlassJaccardIndex,
)

OUT = Path(__file__).resolve().parents[2] / "tests" / "golden" / "jaccard.npz"


def main() -> None:
    """Draws the cases and writes the file."""
    rng = np.random.default_rng(0)
    truth, prediction = rng.integers(0, 19, (2, 2, 5, 24, 36), dtype=np.uint8)  # 2 sets of 5 images
    agree = rng.random(truth.shape) < 0.6
    prediction[agree] = truth[agree]
    truth[rng.random(truth.shape) < 0.2] = 255
    # Set 1: two classes occur nowhere, one is never true, one never predicted.
    truth[1][np.isin(truth[1], (9, 14, 16))] = 255
    prediction[1][np.isin(prediction[1], (9, 14, 3))] = 0
    scores = {}
    for average in ("none", "macro"):
        metrics = [MulticlassJaccardIndex(19, average=average, ignore_index=255) for _ in truth]
        for metric, images, labels in zip(metrics, prediction, truth, strict=True):
            for p, t in zip(images, labels, strict=True):
                metric.update(torch.from_numpy(p)[None], torch.from_numpy(t.astype(np.int64))[None])
        scores[average] = np.stack([metric.compute().numpy() for metric in metrics])
    np.savez_compressed(
        OUT, truth=truth, prediction=prediction, iou=scores["none"], mean=scores["macro"]
    )


if __name__ == "__main__":
    main()
