"""Makes tests/golden/curves.npz: pycocotools' precision and scores at 101 recalls.

The boxes are those of tests/golden/average_precision.npz. Run by hand where pycocotools (last
2.0.11) is installed:

    python tests/oracles/golden_curves.py

Of each case: `precision` and `score` [10, 101, k] by IoU, recall and class, of all areas and the
best 100 detections an image; nan where pycocotools says -1.
"""

from pathlib import Path
import sys

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from tests.detection import scenes
from tests.evaluation.test_average_precision import CURVES, stored

GOLDEN = Path(__file__).resolve().parents[2] / "tests" / "golden"


def main() -> None:
    """Asks pycocotools and writes the file."""
    data = np.load(GOLDEN / "average_precision.npz")
    found = {}
    for case in CURVES:
        truths, detections = stored(data, case)
        judge = scenes.pycocotools_judge(truths, detections, 5)
        without_truth = judge.eval["precision"][..., 0, 2] < 0
        for name, key in (("precision", "precision"), ("score", "scores")):
            values = judge.eval[key][..., 0, 2]
            found[f"{case}/{name}"] = np.where(without_truth, np.nan, values)
    out = GOLDEN / "curves.npz"
    np.savez_compressed(out, **found)
    print(f"{out}: {out.stat().st_size} bytes")


if __name__ == "__main__":
    main()
