"""Reads study.json and computes the figures of a report."""

from collections.abc import Mapping, Sequence
import dataclasses
import json
from pathlib import Path
import statistics
from typing import Any

from jaxdg.evaluation import results
from jaxdg.studies.report.published import TABLES, Published
from jaxdg.studies.summary import mean_and_spread

Figure = Mapping[str, Any]  # mean, spread, n, as `mean_and_spread` makes them
Group = Mapping[str, Any]
# In the order of a report.
STUDIES = ("pretraining", "freezing", "methods", "corruptions", "transfer", "seeds")
# Columns that are no domains, and their heads.
MEANS = {"mean_unseen": "mean unseen", "rPD": "rPD"}


@dataclasses.dataclass(frozen=True)
class Study:
    """A study: its folder, and study.json."""

    folder: Path
    json: Mapping[str, Any]

    @property
    def name(self) -> str:
        """Which study."""
        return self.json["study"]

    @property
    def score(self) -> str:
        """The name of the score: mIoU or mAP50."""
        return self.json["score"]

    @property
    def groups(self) -> Sequence[Group]:
        """The planned groups of runs that differ in their seed alone."""
        return self.json["groups"]

    def finished(self, group: Group | None = None) -> list[Mapping[str, Any]]:
        """The finished runs of a group, or of all groups."""
        runs = [run for run in self.json["runs"] if run["status"] == "finished"]
        return [run for run in runs if group is None or run["group"] == group["group"]]

    def entries(self) -> dict[str, Mapping[str, Any]]:
        """The entry of each domain in results.json, from the first run that has it."""
        entries: dict[str, Mapping[str, Any]] = {}
        for run in self.finished():
            for name, entry in run["results"]["domains"].items():
                entries.setdefault(name, entry)
        return entries

    def domains(self, parts: bool = False) -> list[str]:
        """The domains in the order of evaluation, or the parts of others, such as `acdc/fog`."""
        return [
            name
            for name, entry in self.entries().items()
            if (entry["part_of"] is not None) == parts
        ]

    def sources(self, group: Group) -> list[str]:
        """The domains that the runs of a group are trained on."""
        runs = (run for run in self.json["runs"] if run["group"] == group["group"])
        return next(runs)["source"].split("+")

    def seen(self, group: Group, domain: str) -> bool:
        """Whether the runs of a group were trained on images of a domain or of its dataset."""
        judged = [
            run["results"]["domains"][domain]
            for run in self.finished(group)
            if domain in run["results"]["domains"]
        ]
        return any(entry["seen"] for entry in judged) if judged else domain in self.sources(group)

    def trained_on(self, group: Group, domain: str) -> str:
        """How many images of a domain the group was trained on, `100 of 171`; "" if none."""
        entries = [run["results"]["domains"].get(domain) for run in self.finished(group)]
        return next((share for entry in entries if entry and (share := results.share(entry))), "")

    def without_truth(self) -> list[str]:
        """Domains without a score, as they have no truth."""
        return [name for name, entry in self.entries().items() if entry[self.score] is None]

    def remarks(self) -> list[str]:
        """The lines that a reader of the scores needs."""
        return results.remarks_of(
            {
                group["group"]: [run["results"] for run in self.finished(group)]
                for group in self.groups
            }
        )

    def values(self, group: Group, column: str) -> list[float]:
        """The values of the finished runs of a group.

        Args:
            group: of runs.
            column: a domain, `mean_unseen`, `rPD`, or `seen` for the mean of the seen domains.
        """
        values = []
        for run in self.finished(group):
            domains = run["results"]["domains"]
            if column == "seen":
                scored = {
                    name: entry for name, entry in domains.items() if entry[self.score] is not None
                }
                own = [scored[name][self.score] for name in results.reference(scored)]
                values.append(statistics.fmean(own) if own else None)
            elif column in MEANS:
                values.append(run["results"][column])
            else:
                values.append(domains.get(column, {}).get(self.score))
        return [value for value in values if value is not None]

    def figure(self, group: Group, column: str) -> Figure:
        """Mean, spread and number of these values, from study.json if it has them."""
        if column == "seen":
            return mean_and_spread(self.values(group, column))
        figure = group[column] if column in MEANS else group["domains"].get(column)
        return figure or mean_and_spread([])

    def ranked(self, column: str = "mean_unseen") -> list[Group]:
        """The groups that have a figure in a column, the highest first."""
        groups = [group for group in self.groups if self.figure(group, column)["n"]]
        return sorted(groups, key=lambda group: -self.figure(group, column)["mean"])

    # Corruptions: a run's scores on a domain are {"clean": score, KIND: [score at severity 1, ..]}.

    def kinds(self) -> list[str]:
        """Kinds of corruption."""
        cells = [
            scores
            for run in self.json["runs"]
            for scores in (run.get("corruptions") or {}).values()
        ]
        return list(dict.fromkeys(kind for scores in cells for kind in scores if kind != "clean"))

    def trained_under(self, group: Group) -> list[str]:
        """The evaluated kinds that runs of a group were trained under."""
        runs = [run.get("trained_under", ()) for run in self.finished(group)]
        return [kind for kind in self.kinds() if any(kind in kinds for kinds in runs)]

    def severities(self) -> list[int]:
        """The evaluated severities."""
        return sorted(
            {severity for run in self.json["runs"] for severity in run.get("severities", ())}
        )

    def corrupted(
        self,
        group: Group,
        domain: str,
        severity: int | None = None,
        kind: str | None = None,
        relative: bool = False,
    ) -> Figure:
        """The score of a group on corrupted images; runs without all scores of a mean are left out.

        Args:
            group: of runs.
            domain: of the images.
            severity: 0 is clean, then from 1; None for the mean over all.
            kind: of corruption; None for the mean over all.
            relative: in % of the score on clean images.
        """
        means = []
        for run in self.finished(group):
            scores = (run.get("corruptions") or {}).get(domain, {})
            clean = scores.get("clean")
            kinds = self.kinds() if kind is None else [kind]
            severities = self.severities() if severity is None else [severity]
            values = [clean]
            if severity != 0:
                values = [_at(scores.get(k, ()), s) for k in kinds for s in severities]
            known = [v for v in values if v is not None]
            if known and len(known) == len(values) and (clean or not relative):
                means.append(statistics.fmean(known) * (100 / clean if relative else 1))
        return mean_and_spread(means)

    def cost(self, group: Group, what: str) -> Figure:
        """Mean and spread of a cost of the finished runs of a group: a key of their `cost`."""
        return mean_and_spread((run.get("cost") or {}).get(what) for run in self.finished(group))

    def limited(self) -> list[int]:
        """The limits on the number of evaluated images; [] if all were."""
        return sorted({run["results"].get("max_images") or 0 for run in self.finished()} - {0})

    def published(self) -> list[Published]:
        """The published tables of the study: of its own source, else of the first table's."""
        tables = [t for t in TABLES if t.study == self.name and t.task == self.json["task"]]
        return [t for t in tables if t.source == self.json["source"]] or [
            t for t in tables if t.source == tables[0].source
        ]

    def comparable(self, table: Published) -> bool:
        """Whether a published table has our task, protocol, sources and (whole) domains."""
        ours = set(self.domains())
        sources = {source for group in self.groups for source in self.sources(group)}
        if (
            table.task != self.json["task"]
            or table.protocol != self.json["protocol"]
            or not table.domains
            or self.limited()
        ):
            return False
        theirs = set(table.domains)
        return (
            ours == theirs and sources <= theirs
            if table.source is None
            else sources == {table.source} and ours | sources == theirs | sources
        )


def _at(values: Sequence[float | None], severity: int) -> float | None:
    return values[severity - 1] if severity <= len(values) else None


def load(folder: Path) -> Study:
    """Reads the study of a folder.

    Raises:
        FileNotFoundError: the folder holds no study.json.
        ValueError: it is no study's.
    """
    path = folder / "study.json"
    if not path.is_file():
        raise FileNotFoundError(
            f"{folder} holds neither study.json nor config.json; give the folder of a study or of a"
            " run (its --workdir)"
        )
    try:
        content = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(
            f"{path} is not JSON ({error}); write it again with --collect of the study's command"
        ) from None
    fields = content.keys() if isinstance(content, dict) else set()
    needed = "study task score protocol source config command versions runs groups"
    if lacks := sorted(set(needed.split()) - fields):
        raise ValueError(
            f"{path} lacks {', '.join(lacks)}; write it again with --collect of the study's command"
        )
    if content["study"] not in STUDIES:
        raise ValueError(f"{path} is of a study {content['study']!r}; allowed: {' '.join(STUDIES)}")
    return Study(folder, content)
