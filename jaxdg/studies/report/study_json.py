"""What study.json says, in the figures that a report needs."""

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
STUDIES = (
    "pretraining",
    "freezing",
    "corruptions",
    "transfer",
    "seeds",
)  # in the order of a report
MEANS = {"mean_unseen": "mean unseen", "rPD": "rPD"}  # columns that are no domains, and their heads


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
        """What a domain is judged by: mIoU or mAP50."""
        return self.json["score"]

    @property
    def groups(self) -> Sequence[Group]:
        """What runs of several seeds are averaged over, as planned."""
        return self.json["groups"]

    def finished(self, group: Group | None = None) -> list[Mapping[str, Any]]:
        """The runs that came to their end, of a group or of all."""

        def mine(run):
            return group is None or run["group"] == group["group"]

        return [run for run in self.json["runs"] if run["status"] == "finished" and mine(run)]

    def entries(self) -> dict[str, Mapping[str, Any]]:
        """An entry of results.json for every domain, from the first run that has it."""
        found: dict[str, Mapping[str, Any]] = {}
        for run in self.finished():
            found |= {
                name: entry
                for name, entry in run["results"]["domains"].items()
                if name not in found
            }
        return found

    def domains(self, parts: bool = False) -> list[str]:
        """Whole domains in the order of evaluation, or their parts, such as `acdc/fog`."""
        return [
            name
            for name, entry in self.entries().items()
            if (entry["part_of"] is not None) == parts
        ]

    def sources(self, group: Group) -> list[str]:
        """The domains that the runs of a group are trained on."""
        return next(
            run["source"] for run in self.json["runs"] if run["group"] == group["group"]
        ).split("+")

    def seen(self, group: Group, domain: str) -> bool:
        """Whether the runs of a group were trained on a domain: on its images, or on others of its
        dataset.
        """
        judged = [
            run["results"]["domains"][domain]
            for run in self.finished(group)
            if domain in run["results"]["domains"]
        ]
        return any(entry["seen"] for entry in judged) if judged else domain in self.sources(group)

    def trained_on(self, group: Group, domain: str) -> str:
        """How many of the images that a group is judged on in a domain it was trained on, `100 of
        171`; "" if none, or nobody knows.
        """
        entries = [run["results"]["domains"].get(domain) for run in self.finished(group)]
        return next((told for entry in entries if entry and (told := results.share(entry))), "")

    def without_truth(self) -> list[str]:
        """Domains that have no score, as they have no truth."""
        return [name for name, entry in self.entries().items() if entry[self.score] is None]

    def remarks(self) -> list[str]:
        """What must be known to read the scores, a line each."""
        return results.remarks_of(
            {
                group["group"]: [run["results"] for run in self.finished(group)]
                for group in self.groups
            }
        )

    def values(self, group: Group, column: str) -> list[float]:
        """What each finished run of a group has on a domain, as `mean_unseen`, as `rPD`, or, as
        `seen`, on the domains trained on.
        """
        found = []
        for run in self.finished(group):
            domains = run["results"]["domains"]
            if column == "seen":
                scored = {
                    name: entry for name, entry in domains.items() if entry[self.score] is not None
                }
                own = [scored[name][self.score] for name in results.reference(scored)]
                found.append(statistics.fmean(own) if own else None)
            else:
                found.append(
                    run["results"][column]
                    if column in MEANS
                    else domains.get(column, {}).get(self.score)
                )
        return [value for value in found if value is not None]

    def figure(self, group: Group, column: str) -> Figure:
        """Mean, spread and number of these values; those of study.json where it has them."""
        if column == "seen":
            return mean_and_spread(self.values(group, column))
        return (
            group[column] if column in MEANS else group["domains"].get(column)
        ) or mean_and_spread([])

    def ranked(self, column: str = "mean_unseen") -> list[Group]:
        """The groups that have a figure in a column, the highest first."""
        return sorted(
            (g for g in self.groups if self.figure(g, column)["n"]),
            key=lambda g: -self.figure(g, column)["mean"],
        )

    # --- Corruptions: the scores of a run on a domain are {"clean": score, KIND: [score at severity

    def kinds(self) -> list[str]:
        """Kinds of corruption."""
        cells = [
            scores
            for run in self.json["runs"]
            for scores in (run.get("corruptions") or {}).values()
        ]
        return list(dict.fromkeys(kind for scores in cells for kind in scores if kind != "clean"))

    def severities(self) -> list[int]:
        """Those that are judged."""
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
        """The score on corrupted images over the finished runs of a group; a run with a gap among
        what is averaged does not count.

        Args:
            group: of runs.
            domain: whose images.
            severity: 0 is clean, from 1 on; None for the mean over all.
            kind: of corruption; None for the mean over all.
            relative: in % of the score on clean images.
        """
        found = []
        for run in self.finished(group):
            scores = (run.get("corruptions") or {}).get(domain, {})
            clean = scores.get("clean")
            kinds = self.kinds() if kind is None else [kind]
            which = self.severities() if severity is None else [severity]
            values = (
                [clean]
                if severity == 0
                else [_at(scores.get(k, ()), s) for k in kinds for s in which]
            )
            complete = [v for v in values if v is not None]
            if complete and len(complete) == len(values) and not (relative and not clean):
                found.append(
                    statistics.fmean(complete) * (100 / clean if relative and clean else 1)
                )
        return mean_and_spread(found)

    def limited(self) -> list[int]:
        """How many images of a domain runs are judged on at most, where not on all."""
        return sorted({run["results"].get("max_images") or 0 for run in self.finished()} - {0})

    # --- Published figures ------------------------------------------------------------------------

    def published(self) -> list[Published]:
        """The tables that belong to the study: of its own source, if there are such, else of the
        first one's.
        """
        tables = [t for t in TABLES if t.study == self.name and t.task == self.json["task"]]
        return [t for t in tables if t.source == self.json["source"]] or [
            t for t in tables if t.source == tables[0].source
        ]

    def comparable(self, table: Published) -> bool:
        """Whether our figures may be compared with those of a published table: same task, protocol,
        sources, and domains, judged whole.
        """
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
            f"{path} does not exist; give the folder of a study (its --workdir)"
        )
    try:
        content = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(
            f"{path} is no JSON ({error}); write it again with --collect of the study's command"
        ) from None
    needed = {
        "study",
        "task",
        "score",
        "protocol",
        "source",
        "config",
        "command",
        "versions",
        "runs",
        "groups",
    }
    if not isinstance(content, dict) or not needed <= content.keys():
        lacks = sorted(needed - (content.keys() if isinstance(content, dict) else set()))
        raise ValueError(
            f"{path} lacks {', '.join(lacks)}; write it again with --collect of the study's command"
        )
    if content["study"] not in STUDIES:
        raise ValueError(f"{path} is of a study {content['study']!r}; allowed: {' '.join(STUDIES)}")
    return Study(folder, content)
