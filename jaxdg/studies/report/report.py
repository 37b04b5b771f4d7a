"""Shows studies as one page, with published figures beside ours, or a run; also as Markdown and
LaTeX.

    jaxdg report runs/pretraining runs/freezing --out runs/report
    jaxdg report runs/streets                       # a run: see jaxdg/report/run_page.py
    jaxdg report streets.safetensors                # a packed model

The command writes `report.html`, which needs no other file, `report.md` with `report_pictures/`,
and `tables.tex`. All figures come from study.json, the pictures from the runs, and the rest is
cited. The same folders give the same bytes.

- A figure is the mean over the finished runs that differ only in their seed, with the number of
  these runs and their sample standard deviation.
- A run that did not finish is shown as missing.
- The best of a column is bold among rows that may be compared. Published rows share a table with
  ours only if task, protocol, sources and domains are ours; otherwise they have their own table.
"""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from absl import flags

from jaxdg.commands import command_line as cli
from jaxdg.config import paths
from jaxdg.evaluation import results
from jaxdg.report import run_page, writing
from jaxdg.report.document import (
    Block,
    Commands,
    Document,
    Facts,
    Plots,
    References,
    Section,
    Text,
)
from jaxdg.studies.report import study_plots, study_tables
from jaxdg.studies.report.findings import QUESTIONS, findings
from jaxdg.studies.report.qualitative import pictures
from jaxdg.studies.report.study_json import STUDIES, Study, load

_TITLES = {
    "pretraining": "Pre-training",
    "freezing": "Frozen blocks",
    "methods": "Methods",
    "corruptions": "Corrupted images",
    "transfer": "From one domain to others",
    "seeds": "Seeds",
}
_RULES = (
    "A figure is the mean over n finished runs that differ in their seed alone; ± is their sample"
    " standard deviation, and left out where a single run has finished. Bold is the highest of a"
    " column among rows that may be compared, and says nothing of chance. A run that did not finish"
    " is shown as missing; nothing is put in its place. Published rows carry the number of their"
    " source; where they were made on other data or by another protocol they stand in a table of"
    " their own."
)


def _facts(study: Study) -> Facts:
    j = study.json
    judged = []
    for name, entry in study.entries().items():
        if entry["part_of"] is None:
            about = f"{entry['images']} images"
            which = results.mark(name, entry, j["source"]).strip(" ()")
            if which and study.name != "transfer":
                about += f", {which}"
            judged.append(f"{name} ({about})")
    limits = [f"at most {limit} images of a domain" for limit in study.limited()]
    facts = {
        "Task and score": f"{j['task']}, {study.score} in %",
        "Trained on": ", ".join(dict.fromkeys(run["source"] for run in j["runs"])),
        "Judged on": ", ".join(judged),
        "Protocol": ", ".join([j["protocol"], *limits]),
        "Seeds": ", ".join(map(str, sorted({run["seed"] for run in j["runs"]}))),
        "Runs": f"{len(study.finished())} finished of {len(j['runs'])} planned",
        "Experiment": j["config"],
        "Versions": ", ".join(f"{name} {number}" for name, number in j["versions"].items()),
        "Command": j["command"],
    }
    return Facts(tuple(facts.items()), ("Experiment", "Command"))


def _section(study: Study, key: str, title: str, citations: study_tables.Citations) -> Section:
    blocks: list[Block] = [Text(QUESTIONS[study.name]), *map(Text, findings(study))]
    separate = study_tables.separate_tables(study, citations)
    if study.name == "corruptions":
        blocks += [
            study_plots.severity_plots(study),
            *study_tables.corruption_tables(study),
            study_plots.published_severities(study),
            *separate,
        ]
    elif study.finished():
        blocks += study_tables.score_tables(study, citations)
        blocks.append(
            study_plots.freezing_plots(study)
            if study.name == "freezing"
            else study_plots.domain_bars(study)
        )
        if study.name == "methods":
            blocks.append(study_tables.cost_table(study))
        if study.name in ("pretraining", "methods", "transfer") and any(
            study.values(group, "seen") for group in study.groups
        ):
            blocks.append(study_plots.gap_bars(study))
        if study.name == "freezing" and separate:
            blocks.append(study_plots.published_freezing())
        blocks += separate
    blocks += [*pictures(study), _facts(study), study_tables.run_table(study)]
    blocks.append(
        Commands("Every run by itself:", tuple(run["command"] for run in study.json["runs"]))
    )
    return Section(
        key, title, tuple(b for b in blocks if not (isinstance(b, Plots) and not b.plots))
    )


def make(studies: Sequence[Study]) -> Document:
    """The report of studies, in the order of `STUDIES`."""
    ordered = sorted(studies, key=lambda study: STUDIES.index(study.name))
    titles = [
        f"{_TITLES[s.name]}: {s.json['source'] if s.name != 'transfer' else s.json['task']}"
        for s in ordered
    ]
    titles = [
        f"{t}, {s.folder.name}" if Counter(titles)[t] > 1 else t
        for t, s in zip(titles, ordered, strict=True)
    ]
    citations = study_tables.Citations()
    sections = [
        _section(s, f"study{i}", title, citations)
        for i, (s, title) in enumerate(zip(ordered, titles, strict=True), 1)
    ]
    if citations.sources:
        references = References(tuple((source.name, source.url) for source in citations.sources))
        sections.append(Section("sources", "Sources of published figures", (references,)))
    return Document("Domain generalisation: studies", (Text(_RULES),), tuple(sections))


def write(folders: Sequence[Path], out: Path) -> list[Path]:
    """Writes the report of the studies in some folders, or of the run in one.

    Args:
        folders: of studies, or the workdir of a run, or the file of a packed model.
        out: folder; an earlier report there is replaced, with its pictures.

    Returns:
        The written texts.

    Raises:
        FileNotFoundError: a folder holds neither a study nor a run.
        ValueError: a study.json lacks fields or is not JSON; or there are several runs.
    """
    runs = [f for f in folders if f.is_file() or (f / "config.json").is_file()]
    if not runs:
        return writing.write(make([load(folder) for folder in folders]), out)
    if len(folders) > 1:
        raise ValueError(
            f"{runs[0]} holds a run, and a report shows one run or several studies; give it alone,"
            " or compare runs by a study"
        )
    return run_page.write(runs[0], out)


def main(arguments: Sequence[str]) -> None:
    """Writes the report of the folders that the arguments name."""
    if len(arguments) < 2:
        raise ValueError(
            "name the folder of a run, or of a study or more: jaxdg report DIR... --out FOLDER"
        )
    what = "the folder of a run or study"
    folders = [Path(paths.given(argument, what)) for argument in arguments[1:]]
    out = run_page.own_folder(folders[0]) if _OUT.value is None else Path(_OUT.value)
    for path in write(folders, out):
        print(f"written {path}")


if __name__ == "__main__":
    _OUT = cli.define_path(
        "out", "Folder for the report; DIR/report of the first folder, or FILE_report, if left out."
    )
    flags.FLAGS.set_gnu_getopt(True)  # --out may follow the folders
    cli.run(main)
