"""What a confusion matrix says beside IoU, and the files that keep it.

The scores and their names are those of mmsegmentation's `IoUMetric` with mIoU, mDice and mFscore
(open-mmlab/mmsegmentation), and detectron2's fwIoU (facebookresearch/detectron2). A mean is taken
over the classes whose score is defined. As there, a class without any hit has no Fscore where it
has the Dice 0: `mDice` counts such a class and `mFscore` leaves it out. Different from
mmsegmentation: counts are integers, which it adds in float32, and nothing is rounded.
"""

import csv
import io
from pathlib import Path
from typing import Any

from jaxtyping import Array, Float64, Int64, Integer
import numpy as np

from jaxdg import files
from jaxdg.evaluation.mean_iou import iou

FOLDER = "confusion"  # beside results.json


def class_scores(
    confusion: Integer[Array | np.ndarray, "k k"],
) -> dict[str, Float64[np.ndarray, "k"]]:
    """Scores of each class in [0, 1], nan where they are not defined.

    Args:
        confusion: counts, rows the truth; see `iou`.

    Returns:
        `Acc` and `Recall`, which are the same: hits in the pixels of the class. `Precision`: hits
        in the pixels predicted as the class. `Dice`: twice the hits in the sum of both. `Fscore`:
        the harmonic mean of precision and recall, defined where a pixel is a hit.
    """
    counts = np.asarray(confusion).astype(np.int64)
    hits = np.diagonal(counts)
    true = counts.sum(axis=1)
    found = counts.sum(axis=0)
    recall = _ratio(hits, true)
    dice = _ratio(2 * hits, true + found)
    return {
        "Acc": recall,
        "Dice": dice,
        "Fscore": np.where(hits > 0, dice, np.nan),
        "Precision": _ratio(hits, found),
        "Recall": recall,
    }


def numbers(
    confusion: Integer[Array | np.ndarray, "k k"], names: tuple[str, ...]
) -> dict[str, Any]:
    """The entries of a domain in results.json, in percent; None where they are not defined.

    Args:
        confusion: counts, rows the truth; see `iou`.
        names: of the classes.

    Returns:
        `aAcc`: hits in all pixels. `fwIoU`: the mean IoU of the classes, each with its share of the
        true pixels. `mAcc`, `mDice`, `mFscore`, `mPrecision`, `mRecall`: means of the scores of
        classes. `Acc`, `Dice`, `Fscore`, `Precision`, `Recall`: these by name.
    """
    counts = np.asarray(confusion).astype(np.int64)
    of_class = class_scores(counts)
    true = counts.sum(axis=1)
    weighted = np.where(true > 0, iou(counts), 0.0) @ true
    all_ = counts.sum()
    means = {
        f"m{name}": percent(values[~np.isnan(values)].mean()) if (~np.isnan(values)).any() else None
        for name, values in of_class.items()
    }
    return {
        "aAcc": percent(np.trace(counts) / all_) if all_ else None,
        "fwIoU": percent(weighted / all_) if all_ else None,
        **means,
        **{name: by_class(values, names) for name, values in of_class.items()},
    }


def percent(value: float | np.floating) -> float | None:
    """A share in percent; None for nan."""
    return None if np.isnan(value) else 100 * float(value)


def by_class(values: Float64[np.ndarray, "k"], names: tuple[str, ...]) -> dict[str, float | None]:
    """Shares of the classes in percent by name; None for nan."""
    return {name: percent(value) for name, value in zip(names, values, strict=True)}


def write_confusion(
    folder: Path, domain: str, names: tuple[str, ...], confusion: Int64[np.ndarray, "k k"]
) -> None:
    """Writes `confusion/DOMAIN.npz` and `.csv`.

    Args:
        folder: of results.json.
        domain: name of the files; `acdc/night` lies in a folder `acdc`.
        names: of the classes.
        confusion: counts of pixels, rows the truth.
    """
    path = files.of_domain(folder / FOLDER, domain, ".npz")
    path.parent.mkdir(parents=True, exist_ok=True)
    packed = io.BytesIO()
    np.savez_compressed(packed, confusion=confusion, classes=np.array(names))
    files.write(path, packed.getvalue())
    table = io.StringIO()
    rows = csv.writer(table, lineterminator="\n")
    rows.writerow(("truth", *names))
    for name, counts in zip(names, confusion.tolist(), strict=True):
        rows.writerow((name, *counts))
    files.write(files.of_domain(folder / FOLDER, domain, ".csv"), table.getvalue())


def read_confusion(
    folder: Path, domain: str
) -> tuple[tuple[str, ...], Int64[np.ndarray, "k k"]] | None:
    """The classes and the counts that `write_confusion` wrote; None if there are none.

    Args:
        folder: of results.json.
        domain: its name there.
    """
    path = files.of_domain(folder / FOLDER, domain, ".npz")
    if not path.is_file():
        return None
    with np.load(path) as stored:
        return tuple(stored["classes"].tolist()), stored["confusion"]


def _ratio(part: Int64[np.ndarray, "k"], whole: Int64[np.ndarray, "k"]) -> Float64[np.ndarray, "k"]:
    """Part in whole; nan where the whole is nothing."""
    return np.divide(part, whole, out=np.full(len(whole), np.nan), where=whole > 0)
