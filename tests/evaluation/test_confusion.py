"""Scores of a confusion matrix against mmsegmentation, detectron2 and exact fractions; its files;
what every domain keeps.
"""

import csv
from fractions import Fraction
import io

import numpy as np
import pytest
from rich.console import Console

from jaxdg.evaluation import confusion
from jaxdg.evaluation.printing import print_numbers
from jaxdg.evaluation.results import class_gaps
from tests.evaluation.label_maps import CASES, matrix, stored

NAMES = ("road", "car", "train", "bus, coach", "sky")


@pytest.mark.parametrize("case", CASES)
def test_scores_equal_mmsegmentation_and_detectron2(golden, case):
    """Every score of every class and their means are the two tools', undefined where theirs are:
    random maps, classes that are nowhere, never true or never found, everything ignored, one class.
    """
    data = np.load(golden / "numbers.npz")
    counts = matrix(stored(data, case))
    found = confusion.numbers(counts, NAMES)
    for name in ("Acc", "Dice", "Fscore", "Precision", "Recall"):
        expected = 100 * data[f"{case}/{name}"]
        values = [np.nan if v is None else v for v in found[name].values()]
        np.testing.assert_allclose(values, expected, rtol=1e-6)  # it computes in float32
        if np.isnan(expected).all():
            assert found[f"m{name}"] is None
        else:
            assert found[f"m{name}"] == pytest.approx(np.nanmean(expected), rel=1e-6)
    for name, expected in (("aAcc", 100 * data[f"{case}/aAcc"]), ("fwIoU", data[f"{case}/fwIoU"])):
        if case == "ignored":
            assert found[name] is None
        else:
            assert found[name] == pytest.approx(float(expected), rel=1e-6)


def test_large_counts_equal_exact_fractions():
    """Counts past 2^40 give the fractions of Python integers to 1e-13."""
    counts = np.random.default_rng(0).integers(0, 2**40, (5, 5))
    exact = [[int(v) for v in row] for row in counts]
    hits = [Fraction(exact[k][k]) for k in range(5)]
    true = [sum(row) for row in exact]
    found = [sum(row[k] for row in exact) for k in range(5)]
    numbers = confusion.numbers(counts, NAMES)
    total = sum(true)
    ious = [h / (t + f - h) for h, t, f in zip(hits, true, found, strict=True)]
    expected = {
        "aAcc": sum(hits) / total,
        "fwIoU": sum(i * t / total for i, t in zip(ious, true, strict=True)),
        "mAcc": sum(h / t for h, t in zip(hits, true, strict=True)) / 5,
        "mPrecision": sum(h / f for h, f in zip(hits, found, strict=True)) / 5,
        "mDice": sum(2 * h / (t + f) for h, t, f in zip(hits, true, found, strict=True)) / 5,
    }
    for name, value in expected.items():
        assert numbers[name] == pytest.approx(100 * float(value), rel=1e-13)
    assert numbers["mRecall"] == numbers["mAcc"]
    assert numbers["mFscore"] == numbers["mDice"]


def test_the_files_keep_every_count(tmp_path):
    """Counts past 2^53 come back from the npz; the CSV has them too, and names with commas; the
    domain `acdc/night` has a folder, and one that is a path stays inside.
    """
    counts = np.arange(25).reshape(5, 5) + 2**60
    for domain in ("acdc/night", "../elsewhere/town"):
        confusion.write_confusion(tmp_path, domain, NAMES, counts)
        names, read = confusion.read_confusion(tmp_path, domain)
        assert names == NAMES
        assert read.dtype == np.int64
        np.testing.assert_array_equal(read, counts)
    assert sorted(p.relative_to(tmp_path).as_posix() for p in tmp_path.rglob("*.*")) == [
        f"confusion/{name}.{kind}"
        for name in ("acdc/night", "elsewhere/town")
        for kind in ("csv", "npz")
    ]
    rows = list(csv.reader(io.StringIO((tmp_path / "confusion/acdc/night.csv").read_text())))
    assert rows[0] == ["truth", *NAMES]
    for row, name, expected in zip(rows[1:], NAMES, counts.tolist(), strict=True):
        assert row == [name, *map(str, expected)]
    assert confusion.read_confusion(tmp_path, "acdc") is None


def test_the_gap_of_a_class_is_seen_less_unseen():
    """Means over the domains in which a class has truth: one that is predicted without truth would
    count as 0; without truth on one side there is no gap, and without a side there is none at all.
    """
    domains = {
        "day": {"IoU": {"road": 90.0, "car": 60.0, "train": 50.0}, "without_truth": []},
        "noon": {"IoU": {"road": 80.0, "car": 70.0, "train": None}, "without_truth": ["train"]},
        "night": {"IoU": {"road": 60.0, "car": 0.0, "train": 0.0}, "without_truth": ["train"]},
        "fog": {"IoU": {"road": 50.0, "car": 20.0, "train": None}, "without_truth": ["train"]},
    }
    found = class_gaps(domains, ["day", "noon"], ["night", "fog"], "mIoU")
    assert found == {"road": 30.0, "car": 55.0, "train": None}
    assert class_gaps(domains, ["day"], [], "mIoU") == {}
    assert class_gaps(domains, [], ["fog"], "mIoU") == {}


def test_the_table_of_numbers_shows_what_is_there():
    """A row for each number that some domain has, a dash where one lacks it, and the gaps."""
    entry = {**confusion.numbers(np.diag([3, 1]) + 1, ("a", "b")), "seen": False, "ECE": 12.34}
    results = {"task": "segmentation", "source": "day", "class_gap": {"a": 7.06, "b": None}}
    results["domains"] = {"night": entry, "fog": {"mIoU": None, "seen": False}}
    console = Console(record=True, width=100, file=io.StringIO())
    print_numbers(results, console)
    rows = [line.split() for line in console.export_text().splitlines()]
    assert ["│", "aAcc", "│", "75.0", "│", "-", "│"] in rows
    assert ["│", "ECE", "│", "12.3", "│", "-", "│"] in rows
    assert ["│", "a", "│", "7.1", "│"] in rows
    assert ["│", "b", "│", "-", "│"] in rows
    assert not any("mBoundaryIoU" in row for row in rows)
