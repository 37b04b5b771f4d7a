"""What the entries of results.json say: which domains are compared, and what must be known to read
their scores.

Results of older versions lack some entries; nothing is said then of what these would tell.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

Entry = Mapping[str, Any]  # of a domain
JUDGED = "judged on images it was trained on"  # said beside every such score
NO_TRUTH = "no truth"  # stands in place of a score


def score_name(results: Mapping[str, Any]) -> str:
    """What a domain is judged by, from anything that says the task."""
    return "mAP50" if results["task"] == "detection" else "mIoU"


def reference(domains: Mapping[str, Entry]) -> list[str]:
    """The seen domains that the unseen ones are compared with: those judged on no image trained on,
    or all if there are none such.
    """
    seen = [name for name, entry in domains.items() if entry["seen"] and entry["part_of"] is None]
    return [name for name in seen if not domains[name].get("trained_on")] or seen


def share(entry: Entry) -> str:
    """How many of a domain's judged images were trained on, `100 of 171`; "" if none were, or
    nobody knows.
    """
    return f"{entry['trained_on']} of {entry['images']}" if entry.get("trained_on") else ""


def mark(name: str, entry: Entry, source: str) -> str:
    """What stands behind the name of a seen domain."""
    if not entry["seen"]:
        return ""
    return " (source)" if name in source.split("+") else " (seen)"


def classes_differ(domains: Mapping[str, Entry]) -> dict[str, list[str]]:
    """The classes that have truth in some of the domains and not in others, and those others."""
    lacks: dict[str, list[str]] = {}
    for name, entry in domains.items():
        for label in entry.get("without_truth", ()):
            lacks.setdefault(label, []).append(name)
    return {label: names for label, names in lacks.items() if len(names) < len(domains)}


def class_gaps(
    domains: Mapping[str, Entry], seen: Sequence[str], unseen: Sequence[str], score: str
) -> dict[str, float | None]:
    """How much worse each class is on the unseen domains: its mean on the seen ones less its mean
    on the unseen ones, in points of percent.

    A domain counts for the classes that have truth in it. None where a class has truth on one side
    alone.

    Args:
        domains: their entries.
        seen: those that the others are compared with, see `reference`.
        unseen: the others.
        score: `score_name`.
    """
    of_class = score.removeprefix("m")

    def mean(label: str, names: Sequence[str]) -> float | None:
        values = [
            domains[name][of_class][label]
            for name in names
            if label not in domains[name].get("without_truth", ())
        ]
        values = [value for value in values if value is not None]
        return float(np.mean(values)) if values else None

    gaps: dict[str, float | None] = {}
    for label in domains[seen[0]][of_class] if seen and unseen else ():
        own, theirs = mean(label, seen), mean(label, unseen)
        gaps[label] = None if own is None or theirs is None else own - theirs
    return gaps


def figures(domains: Mapping[str, Entry], score: str) -> dict[str, Any]:
    """The part of results.json that follows from its domains, and these.

    Args:
        domains: their entries, of this version or an older one.
        score: `score_name`.
    """
    scores = {
        name: entry[score]
        for name, entry in domains.items()
        if entry[score] is not None and entry["part_of"] is None
    }
    seen = reference({name: domains[name] for name in scores})
    unseen = [name for name in scores if not domains[name]["seen"]]

    def mean(names):
        return float(np.mean([scores[name] for name in names])) if names else None

    mean_unseen = mean(unseen)
    mean_seen = mean(seen)
    return {
        "domains": dict(domains),
        "mean_unseen": mean_unseen,
        "rPD": 100 * mean_unseen / mean_seen if mean_unseen is not None and mean_seen else None,
        "seen_by": (
            "names"
            if any(entry.get("trained_on") is None for entry in domains.values())
            else "images"
        ),
        "classes_differ": classes_differ({name: domains[name] for name in (*seen, *unseen)}),
        "class_gap": class_gaps(domains, seen, unseen, score),
    }


def foreign(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """Why two results do not belong into one file, a phrase for each reason; what an older version
    did not write is no reason.
    """
    keys = [
        key
        for key in ("task", "source", "protocol", "max_images", "step", "model")
        if key in old and key in new
    ]
    return [f"{key}: {old[key]!r} there, {new[key]!r} now" for key in keys if old[key] != new[key]]


def merged(old: Mapping[str, Any], new: Mapping[str, Any]) -> dict[str, Any]:
    """Results of one model on the domains of both, the newer where both have one; means are taken
    anew.
    """
    domains = {**old["domains"], **new["domains"]}
    for name, entry in old["domains"].items():
        # A part stays one though it was judged again alone, as long as the whole is there.
        if entry["part_of"] in domains:
            domains[name] = {**domains[name], "part_of": entry["part_of"]}
    return {**new, **figures(domains, score_name(new))}


def remarks(results: Mapping[str, Any]) -> list[str]:
    """What must be known to read the scores of a run, a line each."""
    domains = results["domains"]
    score = score_name(results)
    lines = [
        f"{name}: {JUDGED} ({told})" for name, entry in domains.items() if (told := share(entry))
    ]
    lines += [
        f"{name}: {NO_TRUTH}, so it has no score and is in no mean"
        for name, entry in domains.items()
        if entry[score] is None
    ]
    if results.get("seen_by") == "names":
        lines.append("whether a domain was trained on was told by its name alone")
    for name, entry in domains.items():
        wrong = [
            label
            for label in entry.get("without_truth", ())
            if entry[score.removeprefix("m")][label] is not None
        ]
        if wrong:
            what = f"{', '.join(wrong)} predicted but without truth"
            lines.append(
                f"{name}: {what}; counted as 0 in its mean, as the official evaluation of"
                " Cityscapes does"
            )
    if differ := results.get("classes_differ"):
        lacking: dict[tuple[str, ...], list[str]] = {}
        for label, names in differ.items():
            lacking.setdefault(tuple(names), []).append(label)
        told = "; ".join(
            f"{', '.join(labels)} without truth in {', '.join(names)}"
            for names, labels in lacking.items()
        )
        lines.append(f"the mean of unseen domains and rPD compare different classes: {told}")
    return lines


def remarks_of(runs: Mapping[str, Sequence[Mapping[str, Any]]]) -> list[str]:
    """The same of several groups of runs by name; a line that not all groups have names those that
    have it.
    """
    said: dict[str, list[str]] = {}
    for group, results in runs.items():
        for line in dict.fromkeys(line for one in results for line in remarks(one)):
            said.setdefault(line, []).append(group)
    judged = [group for group, results in runs.items() if results]
    return [
        line if groups == judged else f"{', '.join(groups)}: {line}"
        for line, groups in said.items()
    ]
