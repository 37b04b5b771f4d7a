"""Draws plots as SVG text: lines with labels at their ends, and horizontal bars with whiskers.

A plot works as a file and inside a page. `STYLE` colours it for light and dark screens and for
paper. The colours differ with any colour vision; series also differ in marker or filling, and each
has a label.
"""

from collections.abc import Sequence
import dataclasses
from html import escape
import math

Number = float | int
_LIGHT = ("#0072b2", "#c44e00", "#00795a", "#b0387f", "#806300", "#5d4db8", "#4d4d4d")
_DARK = ("#5ab4e8", "#ff9050", "#3ccb9b", "#f08cc4", "#dcbc40", "#aea2fa", "#bdbdbd")
_INK = {
    "ink": ("#1c1e22", "#e9eaee"),
    "muted": ("#5c616b", "#a3a8b3"),
    "line": ("#d4d7dd", "#40444d"),
    "paper": ("#ffffff", "#16181d"),
}


def _variables(which: int) -> str:
    named = {
        **{name: pair[which] for name, pair in _INK.items()},
        **{f"c{i}": color for i, color in enumerate((_LIGHT, _DARK)[which])},
    }
    return "".join(f"--{name}:{color};" for name, color in named.items())


STYLE = (
    f":root{{color-scheme:light dark;{_variables(0)}}}@media screen and"
    f' (prefers-color-scheme:dark){{:root{{{_variables(1)}}}}}.plot text{{font:13px "Helvetica'
    ' Neue",Helvetica,Arial,"Liberation'
    ' Sans",sans-serif;fill:var(--ink);font-variant-numeric:tabular-nums}.plot'
    " .title{font-weight:600}.plot .muted,.plot .tick{fill:var(--muted)}.plot"
    " .tick{font-size:12px}.plot .grid{stroke:var(--line);stroke-width:1}.plot"
    " .axis{stroke:var(--muted);stroke-width:1}.plot"
    " .curve{fill:none;stroke-width:2;stroke-linejoin:round}.plot"
    " .whisker{stroke-width:1.5;fill:none}.plot"
    " .seed{fill:var(--paper);stroke:var(--ink);stroke-width:1}.plot"
    " .lead{stroke:var(--line);stroke-width:1;fill:none}.plot"
    " .error{stroke:var(--ink);stroke-width:1.5;fill:none}"
    + "".join(
        f".plot .s{i}{{stroke:var(--c{i})}}.plot .f{i}{{fill:var(--c{i});stroke:var(--c{i})}}"
        f".plot .o{i}{{fill:var(--paper);stroke:var(--c{i});stroke-width:1.5}}"
        for i in range(len(_LIGHT))
    )
)
_MARKERS = (
    "M-4,0A4,4 0 1 0 4,0A4,4 0 1 0 -4,0Z",  # circle
    "M-3.6,-3.6H3.6V3.6H-3.6Z",  # square
    "M0,-4.6L4.4,3.4H-4.4Z",  # triangle
    "M0,-5L5,0L0,5L-5,0Z",  # diamond
    "M0,4.6L4.4,-3.4H-4.4Z",  # triangle on its tip
    "M-1.5,-4.5H1.5V-1.5H4.5V1.5H1.5V4.5H-1.5V1.5H-4.5V-1.5H-1.5Z",  # plus
    "M-5,-2H5V2H-5Z",  # bar
)
_DASHES = ("none", "6 3", "2 3")


@dataclasses.dataclass(frozen=True)
class Point:
    """A point of a curve.

    Attributes:
        x: in units of the axis.
        y: None if it is missing.
        spread: half the length of the whisker; None for no whisker.
    """

    x: Number
    y: Number | None
    spread: Number | None = None


@dataclasses.dataclass(frozen=True)
class Line:
    """A curve with its label."""

    label: str
    points: tuple[Point, ...]


@dataclasses.dataclass(frozen=True)
class Bar:
    """A bar of a group.

    Attributes:
        value: None if it is missing.
        spread: half the length of the whisker; None for no whisker.
        text: written at its end.
        seeds: single values, drawn as dots; () for none.
    """

    value: Number | None
    spread: Number | None
    text: str
    seeds: tuple[Number, ...] = ()


@dataclasses.dataclass(frozen=True)
class BarGroup:
    """Bars below one label, one a series."""

    label: str
    bars: tuple[Bar, ...]


def lines(
    title: str,
    series: Sequence[Line],
    x_label: str,
    y_label: str,
    x_ticks: Sequence[tuple[Number, str]],
) -> str:
    """Curves over a numeric axis, labelled at their right ends, with gaps at missing values.

    Args:
        title: above the plot.
        series: curves; colours, markers and dashes follow their order.
        x_label: below the plot, with the unit.
        y_label: above the axis, with the unit.
        x_ticks: position and text of each mark of the horizontal axis, which ends at the first and
            the last.

    Returns:
        SVG.
    """
    left = 44
    top = 56
    width = 300
    height = 210
    known = [(p.y, p.spread or 0.0) for line in series for p in line.points if p.y is not None]
    lowest = min((y - s for y, s in known), default=0.0)
    highest = max((y + s for y, s in known), default=1.0)
    low, high, step = _span(lowest, highest)
    x0 = x_ticks[0][0]
    x1 = x_ticks[-1][0]

    def px(x):
        return left + 8 + (width - 16) * (x - x0) / ((x1 - x0) or 1)

    def py(y):
        return top + height * (high - y) / (high - low)

    parts = [_text(left - 36, 18, title, "title"), _text(left - 36, 40, y_label, "muted")]
    for i in range(round((high - low) / step) + 1):
        y = low + i * step
        parts += [
            _segment(left, py(y), left + width, py(y), "grid"),
            _text(left - 8, py(y) + 4, _number(y, step), "tick", "end"),
        ]
    parts.append(_segment(left, top + height, left + width, top + height, "axis"))
    for x, text in x_ticks:
        parts.append(_segment(px(x), top + height, px(x), top + height + 4, "axis"))
        parts.append(_text(px(x), top + height + 18, text, "tick", "middle"))
    parts.append(_text(left + width / 2, top + height + 38, x_label, "muted", "middle"))
    gaps = sorted({p.x for line in series for p in line.points if p.y is None})
    for gap in gaps:
        x = px(gap) + 4
        y = top + height - 6
        turned = f' transform="rotate(-90 {_n(x)} {_n(y)})"'
        parts.append(_text(x, y, "missing", "tick", extra=turned))
    ends = []
    for i, line in enumerate(series):
        k = i % len(_LIGHT)
        points = sorted(line.points, key=lambda p: p.x)
        path = ""
        pen = "M"
        for p in points:
            if p.y is None:
                pen = "M"
            else:
                path += f"{pen}{_n(px(p.x))},{_n(py(p.y))}"
                pen = "L"
        dashes = _DASHES[i // len(_LIGHT) % len(_DASHES)]
        parts.append(f'<path class="curve s{k}" d="{path}" stroke-dasharray="{dashes}"/>')
        for p in points:
            if p.y is None:
                continue
            if p.spread:
                whisker = _whisker(px(p.x), py(p.y - p.spread), py(p.y + p.spread))
                parts.append(f'<path class="whisker s{k}" d="{whisker}"/>')
            spread = "" if p.spread is None else f" ± {p.spread:.1f}"
            title_text = f"{line.label}, {x_label} {_tick(p.x, x_ticks)}: {p.y:.1f}{spread}"
            parts.append(_marker(k, px(p.x), py(p.y), title_text))
        drawn = [(px(p.x), py(p.y)) for p in points if p.y is not None]
        x, y = drawn[-1] if drawn else (left + width, top + height)
        ends.append((y, x, i, line.label))
    ends.sort()
    labels_at = left + width + 22
    places = _apart([y for y, *_ in ends], 17, top, top + height)
    for place, (y, x, i, label) in zip(places, ends, strict=True):
        k = i % len(_LIGHT)
        parts.append(f'<path class="lead" d="M{_n(x + 6)},{_n(y)}L{labels_at - 12},{_n(place)}"/>')
        parts.append(_marker(k, labels_at - 4, place, line.label))
        parts.append(_text(labels_at + 6, place + 4.5, label))
    right = labels_at + 10 + max((_width(line.label) for line in series), default=0)
    return _svg(
        max(right, left - 36 + _width(title, 1.1) + 8),
        max(top + height + 48, top + 17 * len(series)),
        f"{title}. {y_label} by {x_label}",
        parts,
    )


def bars(title: str, groups: Sequence[BarGroup], names: Sequence[str], axis: str) -> str:
    """Groups of horizontal bars from zero, each with a whisker, dots for single values, and a text.

    Args:
        title: above the plot.
        groups: from the top; each has a bar for each series.
        names: of the series; a legend shows them if there are several. The first is filled, the
            second outlined, the others filled in other colours.
        axis: the measured quantity, with its unit.

    Returns:
        SVG.
    """
    width = 240
    room = 20 + max((_width(bar.text) for g in groups for bar in g.bars), default=0)
    values = [
        v
        for g in groups
        for bar in g.bars
        if bar.value is not None
        for v in (bar.value + (bar.spread or 0), *bar.seeds)
    ]
    _, high, step = _span(0.0, max(values, default=1.0))

    def x(value):
        return 8 + width * value / high

    y = 26.0
    parts = [_text(8, 18, title, "title")]
    if len(names) > 1:
        at = 8.0
        for i, name in enumerate(names):
            if at > 8 and at + 18 + _width(name) > 8 + width + room:
                at = 8.0
                y = y + 20
            parts += [
                f'<rect class="{_fill(i)}" x="{_n(at)}" y="{_n(y + 4)}" width="12" height="12"/>',
                _text(at + 18, y + 15, name, "muted"),
            ]
            at += 34 + _width(name)
        y += 24
    top = y
    body = []
    for group in groups:
        body.append(_text(8, y + 17, group.label))
        y += 23
        for i, bar in enumerate(group.bars):
            middle = y + 7
            if bar.value is None:
                body.append(_text(12, middle + 4.5, bar.text, "muted"))
            else:
                label = f"{group.label}, {names[i]}" if names else group.label
                body.append(
                    f'<rect class="{_fill(i)}" x="8" y="{_n(y)}"'
                    f' width="{_n(max(x(bar.value) - 8, 0.5))}" height="14">'
                    f"<title>{escape(f'{label}: {bar.text}')}</title></rect>"
                )
                body += [
                    f'<circle class="seed" cx="{_n(x(v))}" cy="{_n(middle)}" r="2.3"/>'
                    for v in bar.seeds
                ]
                if bar.spread:
                    a = x(max(bar.value - bar.spread, 0))
                    b = x(bar.value + bar.spread)
                    whisker = f"M{_n(a)},{_n(middle)}H{_n(b)}"
                    ends = f"M{_n(a)},{_n(middle - 4)}v8M{_n(b)},{_n(middle - 4)}v8"
                    body.append(f'<path class="error" d="{whisker}{ends}"/>')
                right = max(bar.value + (bar.spread or 0), *bar.seeds, bar.value)
                body.append(_text(x(right) + 7, middle + 4.5, bar.text))
            y += 18
        y += 5
    for i in range(round(high / step) + 1):
        at = x(i * step)
        parts += [
            _segment(at, top + 4, at, y, "grid"),
            _text(at, y + 16, _number(i * step, step), "tick", "middle"),
        ]
    parts += [
        _segment(8, top + 4, 8, y, "axis"),
        *body,
        _text(8 + width / 2, y + 36, axis, "muted", "middle"),
    ]
    labels = max((_width(g.label) for g in groups), default=0)
    return _svg(
        max(8 + width + room, 16 + labels, 16 + _width(title, 1.1)),
        y + 46,
        f"{title}. {axis}",
        parts,
    )


def file(svg: str) -> str:
    """A plot with its colours, as the content of a file."""
    head, rest = svg.split(">", 1)
    return f"{head}><style>{STYLE}</style>{rest}\n"


def _svg(width: Number, height: Number, label: str, parts: Sequence[str]) -> str:
    w = math.ceil(width) + 6
    h = math.ceil(height)  # from -6 on: room for half of the first mark's number
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" class="plot" viewBox="-6 0 {w} {h}" width="{w}"'
        f' height="{h}" role="img" aria-label="{escape(label)}">{"".join(parts)}</svg>'
    )


def _text(
    x: Number, y: Number, text: str, kind: str = "", anchor: str = "start", extra: str = ""
) -> str:
    attributes = (
        (f' class="{kind}"' if kind else "")
        + (f' text-anchor="{anchor}"' if anchor != "start" else "")
        + extra
    )
    return f'<text x="{_n(x)}" y="{_n(y)}"{attributes}>{escape(text)}</text>'


def _segment(x0: Number, y0: Number, x1: Number, y1: Number, kind: str) -> str:
    return f'<line class="{kind}" x1="{_n(x0)}" y1="{_n(y0)}" x2="{_n(x1)}" y2="{_n(y1)}"/>'


def _marker(k: int, x: Number, y: Number, title: str) -> str:
    return (
        f'<path class="f{k}" transform="translate({_n(x)} {_n(y)})"'
        f' d="{_MARKERS[k]}"><title>{escape(title)}</title></path>'
    )


def _whisker(x: Number, y0: Number, y1: Number) -> str:
    return f"M{_n(x)},{_n(y0)}V{_n(y1)}M{_n(x - 3)},{_n(y0)}h6M{_n(x - 3)},{_n(y1)}h6"


def _fill(i: int) -> str:
    """The class of series i: filled, outlined, and then filled in the other colours."""
    return ("f0", "o0", *(f"f{k}" for k in range(1, len(_LIGHT))))[i % (len(_LIGHT) + 1)]


def _n(value: Number) -> str:
    return f"{value:.1f}".removesuffix(".0")


def _number(value: Number, step: Number) -> str:
    return f"{value:.{max(0, -math.floor(math.log10(step) + 1e-9))}f}"


def _tick(x: Number, ticks: Sequence[tuple[Number, str]]) -> str:
    return next((text for at, text in ticks if at == x), _n(x))


def _width(text: str, factor: Number = 1.0) -> float:
    """An upper estimate of the width of a text of 13 pixels."""
    return 8.5 * factor * len(text)


def _span(low: Number, high: Number) -> tuple[Number, Number, Number]:
    """Round ends of an axis around a range, and the step of its 4 to 8 marks."""
    size = max(high - low, 1.0)
    step = next(m * 10.0**e for e in range(-2, 9) for m in (1, 2, 5) if size / (m * 10.0**e) <= 6)
    return (
        math.floor(low / step + 1e-9) * step,
        math.ceil(max(high, low + step) / step - 1e-9) * step,
        step,
    )


def _apart(places: Sequence[Number], gap: Number, low: Number, high: Number) -> list[Number]:
    """Sorted places, moved by two sweeps so that neighbours are `gap` apart, from `low` on."""
    moved: list[Number] = []
    for y in places:
        moved.append(max(y, low if not moved else moved[-1] + gap))
    for i in reversed(range(len(moved))):
        limit = high if i == len(moved) - 1 else moved[i + 1] - gap
        moved[i] = max(min(moved[i], limit), low + i * gap)
    return moved
