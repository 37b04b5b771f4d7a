"""Charts: what they show where, for many and few classes, and that the files are drawn."""

import io
import json

import numpy as np
from PIL import Image
import pytest

from jaxdg.commands.draw import draw
from jaxdg.drawing import charts
from jaxdg.evaluation.average_precision import AveragePrecision, Detections, Truth
from jaxdg.evaluation.confusion import write_confusion


def opened(png: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(png)).convert("RGB")).astype(int)


@pytest.mark.parametrize("k", [2, 19])
def test_cells_are_as_dark_as_their_share_of_the_row(k):
    """The cells of a row differ as their percentages do, whatever the row's pixels: rows of 10 and
    of 10 million pixels look the same; a class without truth has a grey row.
    """
    counts = np.zeros((k, k), np.int64)
    counts[0, :2] = 8_000_000, 2_000_000
    counts[1, :2] = 8, 2
    names = [f"a class {i}" for i in range(k)]
    picture = opened(charts.confusion("domain", names, counts))
    cell = charts.CELL * charts.DPI
    height, width = picture.shape[:2]
    # From the lower right corner: the margins are 0.25 and 0.2 inches.
    x0 = width - 0.25 * charts.DPI - k * cell
    y0 = height - 0.2 * charts.DPI - k * cell

    def shade(row, column):  # off the number in the middle
        return picture[round(y0 + (row + 0.15) * cell), round(x0 + (column + 0.15) * cell)]

    for column in range(k):
        np.testing.assert_array_equal(shade(0, column), shade(1, column))
    assert shade(0, 0).sum() < shade(0, 1).sum() - 100
    if k > 2:
        assert shade(0, 1).sum() < shade(0, 2).sum() - 50
        assert shade(2, 2).tolist() == [0xEE] * 3


def test_the_files_of_results_are_drawn(tmp_path):
    """Every domain that kept something gets its charts, parts in a folder of their own; the same
    files are the same bytes again, and a folder without any is an error.
    """
    with pytest.raises(FileNotFoundError, match=r"has no results\.json"):
        draw(tmp_path)
    bins = {"pixels": [0, 4], "confidence": [None, 80.0], "accuracy": [None, 50.0]}
    entry = {"mIoU": 40.0, "ECE": 30.0, "reliability": bins}
    empty = {"mIoU": None, "ECE": None, "reliability": {}}
    domains = {"acdc": entry, "acdc/night": {"mIoU": 1.0}, "fog": empty}
    results = tmp_path / "results.json"
    results.write_text(json.dumps({"step": 1, "domains": {"fog": empty}}))
    with pytest.raises(ValueError, match="keeps neither"):
        draw(tmp_path)
    results.write_text(json.dumps({"step": 1, "domains": domains}))
    for name in ("acdc", "acdc/night", "fog"):
        write_confusion(tmp_path, name, ("road", "car"), np.zeros((2, 2), np.int64))
    drawn = {path.relative_to(tmp_path).as_posix(): path.read_bytes() for path in draw(tmp_path)}
    assert set(drawn) == {
        "confusion/acdc.png",
        "confusion/acdc/night.png",
        "confusion/fog.png",
        "reliability/acdc.png",
    }
    assert {p.relative_to(tmp_path).as_posix(): p.read_bytes() for p in draw(tmp_path)} == drawn


def test_curves_are_drawn_where_they_lead(tmp_path):
    """One box of two is found at once: precision 100 % up to a recall of 50 %, and no further."""
    scores = AveragePrecision(("car", "bus"))
    box = np.array([[0, 0, 10, 10], [20, 0, 30, 10]], np.float32)
    flags = np.zeros(2, bool)
    found = Detections(np.repeat(box[:1], 2, 0), np.array([0.9, 0.5], np.float32), flags * 1)
    scores.add(Truth(box, flags * 1, flags, flags), found)
    scores.curves().write(tmp_path, "night")
    results = {"step": 1, "domains": {"night": {"mAP50": None}}}
    (tmp_path / "results.json").write_text(json.dumps(results))
    (path,) = draw(tmp_path)
    assert path.relative_to(tmp_path).as_posix() == "curves/night.png"
    picture = opened(path.read_bytes())
    blue = np.argwhere(abs(picture - [0x1F, 0x77, 0xB4]).sum(-1) < 30)
    assert len(blue) > 20
