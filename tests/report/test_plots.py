"""Plots say what their values are."""

import logging
import re
from xml.etree import ElementTree

import numpy as np
import pytest

from jaxdg.report import plots
from jaxdg.report.plots import Bar, BarGroup, Line, Point


def groups(svg: str) -> dict[str, list[list[tuple[float, float]]]]:
    """The corners of the paths of everything that shows a text under the pointer, by this text."""
    found = {}
    for group in ElementTree.fromstring(svg).iter("{http://www.w3.org/2000/svg}g"):
        title = group.find("{http://www.w3.org/2000/svg}title")
        if title is not None:
            found[title.text] = [
                [(float(x), float(y)) for x, y in re.findall(r"(-?[\d.]+) (-?[\d.]+)", text)]
                for path in group.iter("{http://www.w3.org/2000/svg}path")
                for text in [path.get("transform") or path.get("d")]
            ]
    return found


def test_markers_lie_where_their_values_say():
    """Distances between markers are in the ratio of the values, on both axes."""
    points = tuple(Point(x, y) for x, y in ((0, 10.0), (1, 20.0), (4, 40.0)))
    svg = plots.lines("t", [Line("a", points)], "x", "y", [(0, "none"), (4, "4")])
    at = {text: np.array(paths[0][0]) for text, paths in groups(svg).items()}
    assert list(at) == ["a, x none: 10.0", "a, x 1: 20.0", "a, x 4: 40.0"]
    first, second, third = at.values()
    np.testing.assert_allclose((second - first) / (third - first), [1 / 4, 1 / 3], atol=0.005)


def test_bars_are_as_long_as_their_values_say():
    """A bar of three times the value is three times as long, from the same zero."""
    svg = plots.bars(
        "t", [BarGroup("g", (Bar(10.0, None, "10"), Bar(30.0, 2.0, "30 ± 2")))], ("a", "b"), "%"
    )
    sides = {text: [x for x, _ in paths[0]] for text, paths in groups(svg).items()}
    assert list(sides) == ["g, a: 10", "g, b: 30 ± 2"]
    short, long = sides.values()
    assert min(short) == pytest.approx(min(long), abs=0.01)
    assert np.ptp(long) / np.ptp(short) == pytest.approx(3, abs=0.01)


def test_colours_are_names_and_text_is_text(caplog):
    """Every colour can change with the screen, letters are no shapes and no mathematics, nothing
    refers to an id, and no font is missed.
    """
    with caplog.at_level(logging.WARNING):
        points = tuple(Point(i, 1.0 + i) for i in range(500))
        svg = plots.lines("a <b> & $x$ 道", [Line(f"{i}_$y$", points) for i in range(8)], "s", "")
        svg += plots.bars("$t$", [BarGroup("g", (Bar(1.0, 0.5, "1", (0.5, 1.5)),))], (), "%")
    assert not caplog.records
    assert not re.findall(r"#[0-9a-fA-F]{3,6}\b", svg)
    assert "url(" not in svg
    assert " id=" not in svg
    defined = set(re.findall(r"--(\w+):", plots.STYLE))
    assert set(re.findall(r"var\(--(\w+)\)", svg)) <= defined
    for text in ("a &lt;b&gt; &amp; $x$ 道", "7_$y$", "$t$"):
        assert f">{text}</text>" in svg


def test_same_values_give_the_same_bytes():
    """Nothing in a plot tells when it was drawn."""
    draw = [plots.lines("t", [Line("a", (Point(0, 1.0), Point(1, 2.0)))], "x", "y") for _ in "ab"]
    assert draw[0] == draw[1]


def test_a_logarithmic_axis_has_round_plain_marks():
    """A loss that falls by decades is marked at 1, 2 and 5 of each."""
    points = tuple(Point(i, 10.0 ** (1 - i)) for i in range(4))
    svg = plots.lines("t", [Line("a", points)], "x", "y", marked=False, logarithmic=True)
    assert {"0.01", "0.05", "0.2", "1", "10"} <= set(re.findall(r">([\d.]+)</text>", svg))
