"""Draws plots as SVG by matplotlib: curves over numbers, and horizontal bars with whiskers.

A plot works as a file and inside a page. `STYLE` colours it for light and dark screens and for
paper: colours in the SVG are names that it defines. They differ with any colour vision; series
also differ in marker or filling, and each has a label. The same values give the same bytes.
"""

from collections.abc import Callable, Sequence
import dataclasses
import functools
from html import escape
import io
import math
import re
from typing import TYPE_CHECKING, Any
import warnings

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Number = float | int
_LIGHT = ("#0072b2", "#c44e00", "#00795a", "#b0387f", "#806300", "#5d4db8", "#4d4d4d")
_DARK = ("#5ab4e8", "#ff9050", "#3ccb9b", "#f08cc4", "#dcbc40", "#aea2fa", "#bdbdbd")
_INK = {
    "ink": ("#1c1e22", "#e9eaee"),
    "muted": ("#5c616b", "#a3a8b3"),
    "line": ("#d4d7dd", "#40444d"),
    "paper": ("#ffffff", "#16181d"),
}
INK, MUTED, LINE, PAPER = (light for light, _ in _INK.values())
_MARKERS = "os^DvP_"
_DASHES = ("solid", (0, (6, 3)), (0, (2, 3)))
MOST_LINES = len(_LIGHT) * len(_DASHES)  # that differ
_BAR = 14  # height in pixels
_TITLED = "title: "  # begins the id of what shows a text under the pointer


def _variables(which: int) -> str:
    named = {
        **{name: pair[which] for name, pair in _INK.items()},
        **{f"c{i}": color for i, color in enumerate((_LIGHT, _DARK)[which])},
    }
    return "".join(f"--{name}:{color};" for name, color in named.items())


STYLE = (
    f":root{{color-scheme:light dark;{_variables(0)}}}@media screen and"
    f" (prefers-color-scheme:dark){{:root{{{_variables(1)}}}}}.plot text"
    '{font-family:"Helvetica Neue",Helvetica,Arial,"Liberation Sans",sans-serif;'
    "font-variant-numeric:tabular-nums}"
)


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


def _in_our_look(draw: Callable[..., str]) -> Callable[..., str]:
    """Makes matplotlib, which is imported on first use, draw as `_LOOK` says."""

    @functools.wraps(draw)
    def drawn(*arguments: Any, **named: Any) -> str:
        from matplotlib import rc_context

        with rc_context(_LOOK):
            return draw(*arguments, **named)

    return drawn


@_in_our_look
def lines(
    title: str,
    series: Sequence[Line],
    x_label: str,
    y_label: str,
    x_ticks: Sequence[tuple[Number, str]] = (),
    *,
    marked: bool = True,
    logarithmic: bool = False,
    equal: Number = 0,
) -> str:
    """Curves over a numeric axis, with gaps at missing values.

    Args:
        title: above the plot.
        series: curves; colours, markers and dashes follow their order. A single one has no legend.
        x_label: below the plot, with the unit.
        y_label: above the axis, with the unit.
        x_ticks: position and text of each mark of the horizontal axis; () for round numbers.
        marked: whether points have markers; the others are too many.
        logarithmic: the vertical axis.
        equal: the end of both axes, which begin at 0, with the line on which they are equal; 0 for
            axes that fit the values.

    Returns:
        SVG.
    """
    axes = _axes(300, 300 if equal else 210)
    if equal:
        axes.plot([0, equal], [0, equal], color=MUTED, linewidth=1, linestyle=(0, (4, 3)))
        axes.set(xlim=(0, equal), ylim=(0, equal))
    for i, line in enumerate(series):
        points = sorted(line.points, key=lambda p: p.x)
        look: dict[str, Any] = dict(
            color=_LIGHT[i % len(_LIGHT)],
            linestyle=_DASHES[i // len(_LIGHT) % len(_DASHES)],
            marker=_MARKERS[i % len(_MARKERS)] if marked else "",
        )
        at = [p.x for p in points]
        axes.plot(at, [math.nan if p.y is None else p.y for p in points], **look, label=line.label)
        for p in points if marked else ():
            if p.y is None:
                continue
            spread = "" if p.spread is None else f" ± {p.spread:.1f}"
            where = next((text for x, text in x_ticks if x == p.x), f"{p.x:g}")
            axes.errorbar(
                p.x, p.y, p.spread or None, color=look["color"], capsize=3, elinewidth=1.5
            )
            axes.plot(
                p.x,
                p.y,
                **{**look, "linestyle": "none"},
                gid=f"{_TITLED}{line.label}, {x_label} {where}: {p.y:.1f}{spread}",
            )
    for x in sorted({p.x for line in series for p in line.points if p.y is None}):
        place: dict[str, Any] = dict(rotation=90, ha="center", va="bottom", color=MUTED)
        axes.text(x, 0.03, "missing", transform=axes.get_xaxis_transform(), **place)
    if logarithmic:
        axes.set_yscale("log")
        _round_marks(axes)
    if x_ticks:
        axes.set_xticks([x for x, _ in x_ticks], [text for _, text in x_ticks])
    axes.yaxis.grid()
    axes.spines["bottom"].set_visible(True)
    axes.set_xlabel(x_label)
    axes.set_title(y_label, loc="left", color=MUTED)
    _heading(axes, title, 34 if y_label else 10)
    if len(series) > 1:
        axes.legend(loc="upper left", bbox_to_anchor=(-0.12, -0.14 if equal else -0.2))
    return _svg(axes, f"{title}. {y_label} by {x_label}" if y_label else f"{title} by {x_label}")


@_in_our_look
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
    height = sum(28 + 18 * len(group.bars) for group in groups)
    axes = _axes(240, height)
    y = 0
    for group in groups:
        axes.annotate(group.label, (0, y), **_beside(0, -14))
        y += 23
        for i, bar in enumerate(group.bars):
            middle = y + _BAR / 2
            if bar.value is None:
                axes.annotate(bar.text, (0, middle), **_beside(4, -4), color=MUTED)
            else:
                said = f"{group.label}, {names[i]}" if names else group.label
                (drawn,) = axes.barh(middle, bar.value, _BAR, **_filling(i))
                drawn.set_gid(f"{_TITLED}{said}: {bar.text}")
                axes.plot(bar.seeds, [middle] * len(bar.seeds), **_DOTS)
                right = max(bar.value + (bar.spread or 0), *bar.seeds, bar.value)
                if bar.spread:
                    left = bar.value - max(bar.value - bar.spread, 0)
                    whisker: dict[str, Any] = dict(color=INK, capsize=4, elinewidth=1.5, zorder=3)
                    axes.errorbar(bar.value, middle, xerr=[[left], [bar.spread]], **whisker)
                axes.annotate(bar.text, (right, middle), **_beside(7, -4))
            y += 18
        y += 5
    axes.set(ylim=(height, 0), yticks=[])
    axes.set_xlim(0)
    axes.xaxis.grid()
    axes.spines["left"].set_visible(True)
    axes.set_xlabel(axis)
    legend = 0
    if len(names) > 1:
        from matplotlib.patches import Patch

        swatches = [Patch(**_filling(i), label=name) for i, name in enumerate(names)]
        legend = 20 * len(names) + 6
        top = 1 + legend / height
        axes.legend(handles=swatches, loc="upper left", bbox_to_anchor=(-0.02, top))
    _heading(axes, title, 10 + legend)
    return _svg(axes, f"{title}. {axis}")


def file(svg: str) -> str:
    """A plot with its colours, as the content of a file."""
    head, rest = svg.split(">", 1)
    return f"{head}><style>{STYLE}</style>{rest}\n"


_DOTS: dict[str, Any] = dict(
    linestyle="none",
    marker="o",
    markersize=4.6,
    markerfacecolor=PAPER,
    markeredgecolor=INK,
    markeredgewidth=1,
    zorder=4,
)


def _filling(i: int) -> dict[str, Any]:
    """The look of series i: filled, outlined, and then filled in the other colours."""
    k = i % (len(_LIGHT) + 1)
    edge = _LIGHT[max(k - 1, 0)]
    return dict(facecolor=PAPER if k == 1 else edge, edgecolor=edge, linewidth=1.5, zorder=2)


def _beside(right: Number, up: Number) -> dict[str, Any]:
    """Where a text stands: so many pixels from its place."""
    return dict(xytext=(right, up), textcoords="offset points", annotation_clip=False)


def _axes(width: Number, height: Number) -> "Axes":
    """Empty axes of this size in pixels; what stands around them has room."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width / 72, height / 72)).add_axes((0, 0, 1, 1))


_LOOK: Any = {
    "axes.edgecolor": MUTED,
    "axes.facecolor": "none",
    "axes.labelcolor": MUTED,
    "axes.labelsize": 13,
    "axes.spines.bottom": False,
    "axes.spines.left": False,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlesize": 13,
    "axes.unicode_minus": False,
    "axes.axisbelow": True,
    "font.size": 13,
    "grid.color": LINE,
    "grid.linewidth": 1,
    "legend.frameon": False,
    "legend.handlelength": 1.6,
    "legend.labelcolor": INK,
    "legend.labelspacing": 0.3,
    "lines.linewidth": 2,
    "lines.markersize": 7,
    "text.color": INK,
    "text.parse_math": False,
    "xtick.color": MUTED,
    "xtick.labelsize": 12,
    "ytick.color": MUTED,
    "ytick.labelsize": 12,
    "ytick.left": False,
    "svg.fonttype": "none",
    "svg.hashsalt": "jaxdg",
    "path.simplify": False,
}


def _heading(axes: "Axes", title: str, up: Number) -> None:
    """The title at the left edge, so many pixels above the axes."""
    place: dict[str, Any] = dict(xycoords="axes fraction", fontweight="bold")
    axes.annotate(title, (0, 1), **_beside(0, up), **place)


def _round_marks(axes: "Axes") -> None:
    """Marks a logarithmic axis at 1, 2 and 5 of every decade, as plain numbers."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())


def _svg(axes: "Axes", label: str) -> str:
    """The figure as text: without what names the program, with colours by name."""
    buffer = io.StringIO()
    figure: Any = axes.figure
    for artist in figure.findobj(lambda a: a.get_clip_on()):
        artist.set_clip_on(False)
    nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
    options: dict[str, Any] = dict(metadata=nothing, transparent=True, bbox_inches="tight")
    with warnings.catch_warnings():
        # Its font may lack a letter, but the text stays text and the reader's font is another.
        warnings.filterwarnings("ignore", "Glyph .* missing")
        figure.savefig(buffer, format="svg", pad_inches=4 / 72, **options)
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :]
    size = re.search(r'viewBox="0 0 ([\d.]+) ([\d.]+)"', svg)
    assert size is not None
    w, h = (math.ceil(float(side)) for side in size.groups())
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" class="plot" viewBox="0 0 {w} {h}" width="{w}"'
        f' height="{h}" role="img" aria-label="{escape(label)}">'
    )
    body = re.sub(r"\s+", " ", svg[svg.index(">") + 1 :])
    markers = dict(re.findall(r'<path id="(\w+)" d="([^"]*)"', body))
    body = re.sub(
        r'<use xlink:href="#(\w+)" x="([^"]*)" y="([^"]*)"',
        lambda use: f'<path d="{markers[use[1]]}" transform="translate({use[2]} {use[3]})"',
        body,
    )
    for pattern, new in _CHANGES:
        body = re.sub(pattern, new, body)
    return head + body.strip()


def _named(color: re.Match[str]) -> str:
    return f"var(--{_NAMES[color[0]]})" if color[0] in _NAMES else color[0]


_NAMES = {
    **{light: name for name, (light, _) in _INK.items()},
    **{color: f"c{i}" for i, color in enumerate(_LIGHT)},
}
_CHANGES: tuple[tuple[str, str | Callable[[re.Match[str]], str]], ...] = (
    (rf'<g id="{_TITLED}([^"]*)">', r"<g><title>\1</title>"),
    (r'<g id="[^"]*"', "<g"),
    (r"<g/>", ""),
    (r"<!--.*?-->", ""),
    (r"#[0-9a-f]{6}\b", _named),
    (r"<defs>.*?</defs>", ""),  # markers, which no two plots of a page may share by name
    (r" font-family: [^;\"]*;", ""),
    (r' transform="rotate\(-0 [^"]*"', ""),
    (r" ?(<[^>]*?) ?(/?>) ?", r"\1\2"),
)
