"""The label maps of tests/golden/numbers.npz."""

import numpy as np

CASES = ("random", "degenerate", "ignored", "one_class")
CLASSES = 5
Pairs = list[tuple[np.ndarray, np.ndarray]]  # truth and prediction of each image


def stored(data, case: str) -> Pairs:
    """The images of a case, of several sizes."""
    ends = np.cumsum(data["sizes"].prod(axis=1))[:-1]
    maps = [np.split(data[f"{case}/{kind}"], ends) for kind in ("truth", "prediction")]
    return [
        (truth.reshape(size), prediction.reshape(size))
        for truth, prediction, size in zip(*maps, data["sizes"].tolist(), strict=True)
    ]


def matrix(pairs: Pairs) -> np.ndarray:
    """Counts by NumPy, rows the truth."""
    total = np.zeros((CLASSES, CLASSES), np.int64)
    for truth, prediction in pairs:
        np.add.at(total, (truth[truth != 255], prediction[truth != 255]), 1)
    return total
