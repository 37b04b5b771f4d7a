"""Charts of what was judged, as PNG by matplotlib: confusion matrices, reliability, precision
against recall.

Matplotlib is imported when something is drawn; evaluation draws no chart.
"""

from collections.abc import Sequence
import io
from typing import TYPE_CHECKING, Any

from jaxtyping import Float, Integer
import numpy as np

if TYPE_CHECKING:
    from matplotlib.figure import Figure

DPI = 144
CELL = 0.42  # inches a class
BLUE = "#1f5fa8"
ORANGE = "#d9772b"
GREY = "#8a8f99"
MOST_NAMED = 20  # curves that a legend can tell apart


def confusion(title: str, names: Sequence[str], counts: Integer[np.ndarray, "k k"]) -> bytes:
    """A confusion matrix, every row in percent of its true pixels.

    Args:
        title: above it.
        names: of the classes.
        counts: rows the truth; a class without truth has an empty row that says so.

    Returns:
        PNG.
    """
    k = len(names)
    true = counts.sum(axis=1)
    share = 100 * counts / np.maximum(true, 1)[:, None]
    side = CELL * k
    longest = 0.075 * max(map(len, names))
    left, top = longest + 0.75, longest + 0.55
    figure = _figure(left + side + 0.25, top + side + 0.3)
    width, height = figure.get_size_inches()
    axes = figure.add_axes((left / width, 0.2 / height, side / width, side / height))
    axes.imshow(share, cmap="Blues", vmin=0, vmax=100)
    for row, column in np.ndindex(k, k):
        # What rounds to 0 is left out, so that the rest can be seen.
        if (value := share[row, column]) >= 0.5:
            color = "white" if value > 55 else "black"
            place: dict[str, Any] = dict(ha="center", va="center", fontsize=8, color=color)
            axes.text(column, row, f"{value:.0f}", **place)
    for row in np.flatnonzero(true == 0).tolist():
        axes.axhspan(row - 0.5, row + 0.5, color="#eeeeee")
        axes.text((k - 1) / 2, row, "no truth", ha="center", va="center", fontsize=8, color=GREY)
    axes.set_xticks(range(k), names, rotation=90)
    axes.set_yticks(range(k), names)
    axes.xaxis.tick_top()
    axes.xaxis.set_label_position("top")
    axes.set_xlabel("prediction, % of the true pixels", color=GREY, labelpad=6)
    axes.set_ylabel("truth", color=GREY)
    axes.tick_params(length=0, labelsize=9)
    axes.set_xticks(np.arange(k + 1) - 0.5, minor=True)
    axes.set_yticks(np.arange(k + 1) - 0.5, minor=True)
    axes.grid(which="minor", color="white", linewidth=1)
    axes.tick_params(which="minor", length=0)
    figure.text(0.15 / width, 1 - 0.15 / height, title, va="top", fontsize=11, weight="bold")
    return _png(figure)


def reliability(
    title: str,
    pixels: Sequence[int],
    confidence: Sequence[float | None],
    accuracy: Sequence[float | None],
) -> bytes:
    """Accuracy by confidence, beside the line where they are equal; below, the share of pixels.

    Args:
        title: above it.
        pixels: of each bin; the bins are equally wide.
        confidence: mean of each bin in percent, None without pixels.
        accuracy: of each bin in percent, None without pixels.

    Returns:
        PNG.
    """
    bins = len(pixels)
    figure = _figure(4.6, 5.2)
    upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
    starts = 100 * np.arange(bins) / bins
    wide: dict[str, Any] = dict(width=100 / bins, align="edge", edgecolor="white")
    known = [i for i in range(bins) if pixels[i]]
    upper.bar(
        starts[known], [accuracy[i] or 0 for i in known], color=BLUE, label="accuracy", **wide
    )
    upper.plot(
        [0, 100], [0, 100], color=GREY, linewidth=1, linestyle="--", label="as sure as right"
    )
    middle = [confidence[i] for i in known]
    upper.plot(middle, middle, "o", color=ORANGE, markersize=4, label="mean confidence")
    upper.set(xlim=(0, 100), ylim=(0, 100), ylabel="accuracy, %")
    upper.legend(loc="upper left", frameon=False, fontsize=9)
    share = 100 * np.array(pixels) / max(sum(pixels), 1)
    lower.bar(starts, share, color=GREY, **wide)
    lower.set(xlabel="confidence, %", ylabel="pixels, %", ylim=(0, max(share.max() * 1.1, 1)))
    upper.set_title(title, loc="left", fontsize=11, weight="bold")
    for axes in (upper, lower):
        axes.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    return _png(figure)


def precision_recall(
    title: str,
    names: Sequence[str],
    curves: Sequence[tuple[Float[np.ndarray, "_"], Float[np.ndarray, "_"]]],
) -> bytes:
    """Precision against recall of each class.

    Args:
        title: above it.
        names: of the classes.
        curves: recall and precision of each, in [0, 1]; a class without any is left out.

    Returns:
        PNG.
    """
    drawn = [(name, *curve) for name, curve in zip(names, curves, strict=True) if len(curve[0])]
    named = len(drawn) <= MOST_NAMED
    figure = _figure(6.4 if named else 4.8, 4.6)
    axes = figure.subplots()
    from matplotlib import colormaps

    colors = colormaps["tab20"].colors  # pyright: ignore[reportAttributeAccessIssue]
    for i, (name, recall, precision) in enumerate(drawn):
        look: dict[str, Any] = dict(color=colors[i % 20] if named else GREY, label=name)
        axes.plot(100 * recall, 100 * precision, linewidth=1.5 if named else 0.6, **look)
    axes.set(xlim=(0, 100), ylim=(0, 102), xlabel="recall, %", ylabel="precision, %")
    axes.set_title(title, loc="left", fontsize=11, weight="bold")
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(color="#e6e6e6", linewidth=0.6)
    if drawn and named:
        axes.legend(loc="upper left", bbox_to_anchor=(1.01, 1), frameon=False, fontsize=9)
    figure.tight_layout()
    return _png(figure)


def _figure(width: float, height: float) -> "Figure":
    """An empty figure, in inches, that belongs to no window."""
    from matplotlib.figure import Figure

    return Figure((width, height), dpi=DPI)


def _png(figure: "Figure") -> bytes:
    """The figure as a file; the same figure gives the same bytes."""
    file = io.BytesIO()
    figure.savefig(file, format="png", metadata={"Software": None})
    return file.getvalue()
