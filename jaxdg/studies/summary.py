"""Summarises the runs of a study: mean and spread over seeds, and a table of them."""

from collections.abc import Iterable, Mapping, Sequence
import statistics
from typing import Any

from rich.console import Console
from rich.table import Table

from jaxdg.evaluation import results as results_lib


def summary(runs: Sequence[Mapping[str, Any]], score: str) -> dict[str, Any]:
    """The figures of a group over its finished runs.

    Args:
        runs: entries of study.json that differ in their seed.
        score: mIoU or mAP50.

    Returns:
        `n`, the finished runs; `of`, the planned runs; and mean, spread and n for each domain, for
        the mean of the unseen domains and for rPD.
    """
    finished = [run["results"] for run in runs if run["results"] is not None]
    domains = dict.fromkeys(name for results in finished for name in results["domains"])
    figures = {}
    for name in domains:
        scores = [r["domains"][name][score] for r in finished if name in r["domains"]]
        figures[name] = mean_and_spread(scores)
    return {
        "n": len(finished),
        "of": len(runs),
        "domains": figures,
        "mean_unseen": mean_and_spread(results["mean_unseen"] for results in finished),
        "rPD": mean_and_spread(results["rPD"] for results in finished),
    }


def mean_and_spread(values: Iterable[float | None]) -> dict[str, Any]:
    """Mean, sample standard deviation (None for fewer than two) and number of the known values."""
    known = [value for value in values if value is not None]
    return {
        "mean": statistics.fmean(known) if known else None,
        "spread": statistics.stdev(known) if len(known) > 1 else None,
        "n": len(known),
    }


def show(study: Mapping[str, Any], console: Console) -> None:
    """Prints the groups of a study.json as a table."""
    groups = study["groups"]
    domains = dict.fromkeys(name for group in groups for name in group["domains"])
    title = f"{study['score']} in %, protocol {study['protocol']}, mean ± spread over seeds"
    table = Table(title=title, title_justify="left")
    table.add_column("", no_wrap=True)
    for name in (*domains, "mean unseen", "rPD", "runs"):
        table.add_column(name, justify="right")
    for group in groups:
        figures = [group["domains"].get(name) for name in domains]
        figures += [group["mean_unseen"], group["rPD"]]
        cells = [_cell(figure) if group["n"] else "missing" for figure in figures]
        n = group["n"]
        planned = group["of"]
        table.add_row(group["group"], *cells, str(n) if n == planned else f"{n} of {planned}")
    console.print(table)
    finished: dict[str, list[Any]] = {group["group"]: [] for group in groups}
    for run in study["runs"]:
        if run["results"]:
            finished[run["group"]].append(run["results"])
    for line in results_lib.remarks_of(finished):
        console.print(line)


def _cell(figure: Mapping[str, Any] | None) -> str:
    if figure is None or figure["mean"] is None:
        return "-"
    spread = "" if figure["spread"] is None else f" ± {figure['spread']:.1f}"
    return f"{figure['mean']:.1f}{spread}"
