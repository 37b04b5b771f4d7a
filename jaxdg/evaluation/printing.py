"""Prints results.json as tables."""

from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

from jaxdg.evaluation import results as results_lib


def print_results(results: dict[str, Any], console: Console) -> None:
    """Prints a table of classes and domains, the means, and remarks; reads older results too."""
    domains = results["domains"]
    score = results_lib.score_name(results)
    of_class = score.removeprefix("m")
    table = Table(
        title=(
            f"{of_class} in % at step {results['step']}, trained on {results['source']}, protocol"
            f" {results['protocol']}"
        ),
        title_justify="left",
    )
    table.add_column("class", no_wrap=True)
    for name, entry in domains.items():
        table.add_column(
            name + results_lib.mark(name, entry, results["source"]),
            justify="right",
            overflow="fold",
        )

    for label in next(iter(domains.values()))[of_class]:
        table.add_row(label, *(_cell(entry[of_class][label]) for entry in domains.values()))
    table.add_section()
    table.add_row(
        score,
        *(_cell(entry[score], results_lib.NO_TRUTH) for entry in domains.values()),
        style="bold",
    )
    for subset in next(iter(domains.values())).get("subsets", ()):
        table.add_row(
            f"mIoU of {subset}",
            *(_cell(entry["subsets"].get(subset)) for entry in domains.values()),
        )
    if any("classes" in entry for entry in domains.values()):
        table.add_row(
            "classes counted", *(str(entry.get("classes", "-")) for entry in domains.values())
        )
    if any(entry.get("trained_on") for entry in domains.values()):
        table.add_row(
            "images trained on", *(results_lib.share(entry) or "0" for entry in domains.values())
        )
    console.print(table)
    if results["mean_unseen"] is not None:
        rpd = "" if results["rPD"] is None else f"   rPD {results['rPD']:.1f} %"
        console.print(
            f"mean of unseen domains {results['mean_unseen']:.1f}{rpd}   protocol"
            f" {results['protocol']}"
        )
    for line in results_lib.remarks(results):
        console.print(line)
    if results.get("max_images"):
        console.print(f"judged on at most {results['max_images']} images of each domain")


# What a table of numbers shows of each domain, where results.json has it.
NUMBERS = (
    *("aAcc", "mAcc", "mPrecision", "mDice", "fwIoU", "mBoundaryIoU", "ECE"),
    *("AP", "AP75", "AR100"),
)


def print_numbers(results: Mapping[str, Any], console: Console) -> None:
    """Prints the domains' further numbers, and how much each class loses on unseen domains."""
    domains = {
        name: {**entry.get("coco", {}), **entry} for name, entry in results["domains"].items()
    }
    table = Table(title="further numbers in %", title_justify="left")
    table.add_column("number", no_wrap=True)
    for name in domains:
        heading = name + results_lib.mark(name, domains[name], results["source"])
        table.add_column(heading, justify="right", overflow="fold")
    for number in NUMBERS:
        if any(number in entry for entry in domains.values()):
            table.add_row(number, *(_cell(entry.get(number)) for entry in domains.values()))
    console.print(table)
    if gaps := results.get("class_gap"):
        of_class = results_lib.score_name(results).removeprefix("m")
        title = f"{of_class} lost on unseen domains, in points"
        table = Table(title=title, title_justify="left")
        table.add_column("class", no_wrap=True)
        table.add_column("gap", justify="right")
        for label, gap in gaps.items():
            table.add_row(label, _cell(gap))
        console.print(table)


def print_protocols(judged: Sequence[dict[str, Any]], console: Console) -> None:
    """Prints a table with a row for each protocol that one model was judged under, and remarks.

    Args:
        judged: the contents of a results.json for each protocol.
        console: where to.
    """
    first = judged[0]
    score = results_lib.score_name(first)
    title = f"{score} in % at step {first['step']}, trained on {first['source']}"
    table = Table(title=title, title_justify="left")
    table.add_column("protocol", no_wrap=True)
    names = list(dict.fromkeys(name for results in judged for name in results["domains"]))
    for name in names:
        entry = next(r["domains"][name] for r in judged if name in r["domains"])
        heading = name + results_lib.mark(name, entry, first["source"])
        table.add_column(heading, justify="right", overflow="fold")
    table.add_column("mean of unseen", justify="right")
    table.add_column("rPD", justify="right")
    for results in judged:
        entries = (results["domains"].get(name) for name in names)
        table.add_row(
            results["protocol"],
            *("-" if e is None else _cell(e[score], results_lib.NO_TRUTH) for e in entries),
            _cell(results["mean_unseen"]),
            _cell(results["rPD"]),
        )
    console.print(table)
    for line in results_lib.remarks_of({results["protocol"]: [results] for results in judged}):
        console.print(line)
    if first.get("max_images"):
        console.print(f"judged on at most {first['max_images']} images of each domain")


def _cell(value: float | None, none: str = "-") -> str:
    return none if value is None else f"{value:.1f}"
