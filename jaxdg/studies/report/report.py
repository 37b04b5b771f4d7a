"""Studies as one page for people, with the published figures beside ours; also as Markdown, and as
LaTeX tables.

    python -m jaxdg.studies.report runs/pretraining runs/freezing --out runs/report

writes `report.html`, which needs no other file, `report.md` with `report_pictures/`, and
`tables.tex`. Everything in them comes from study.json and the pictures that runs keep, or is cited;
the same folders give the same bytes.

- A figure is the mean over the finished runs that differ in their seed alone, with their number and
  sample standard deviation.
- A run that did not finish is shown as missing, and nothing is put in its place.
- The best of a column is bold among rows of one setting. Published rows stand in one table with
  ours only where task, protocol, sources and domains are ours too; else in a table of their own
  that says so.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
import dataclasses
from pathlib import Path

from absl import flags

from jaxdg.commands import command_line as cli
from jaxdg.config import paths
from jaxdg.evaluation import results
from jaxdg.studies.report import document, plots
from jaxdg.studies.report.document import (
    MISSING,
    Block,
    Cell,
    Commands,
    Document,
    Facts,
    Plots,
    References,
    Section,
    Table,
    TableRow,
    Text,
)
from jaxdg.studies.report.findings import QUESTIONS, corrupted_domains, findings
from jaxdg.studies.report.published import (
    FREEZING_FIRST,
    FREEZING_LAST,
    FREEZING_NONE,
    Published,
    Source,
)
from jaxdg.studies.report.qualitative import pictures
from jaxdg.studies.report.reading import MEANS, STUDIES, Figure, Group, Study, load

PICTURES = "report_pictures"  # beside report.md
TRAINED = "†"  # behind scores on images that were trained on
NONE = "–"  # where there is no such figure  # noqa: RUF001
_TITLES = {
    "pretraining": "Pre-training",
    "freezing": "Frozen blocks",
    "corruptions": "Corrupted images",
    "transfer": "From one domain to others",
    "seeds": "Seeds",
}
_RULES = """\
A figure is the mean over n finished runs that differ in their seed alone; ± is their sample standard deviation, and left out where a single
run has finished. Bold is the highest of a column among rows that may be compared, and says nothing of chance. A run that did not finish is
shown as missing; nothing is put in its place. Published rows carry the number of their source; where they were made on other data or by
another protocol they stand in a table of their own.""".replace("\n", " ")
_FAMILIES = {
    "noise": ("gaussian_noise", "shot_noise", "impulse_noise"),
    "blur": ("defocus_blur", "glass_blur", "motion_blur", "zoom_blur"),
    "weather": ("snow", "frost", "fog", "brightness"),
    "digital": ("contrast", "elastic_transform", "pixelate", "jpeg_compression"),
}


class Citations:
    """Numbers sources in the order in which they are cited."""

    def __init__(self):
        self.sources: list[Source] = []

    def number(self, source: Source) -> int:
        """The number of a source, from 1."""
        if source not in self.sources:
            self.sources.append(source)
        return self.sources.index(source) + 1


# --- Tables ---------------------------------------------------------------------------------------


def cell(figure: Figure, runs: int, digits: int = 1, none: str = NONE) -> Cell:
    """A mean with its spread; missing where no run is finished, a dash where finished runs have no
    such figure.

    Args:
        figure: mean, spread and n.
        runs: finished runs of the row, which its own column says; another n is written into the
            cell.
        digits: after the point.
        none: what stands where finished runs have no such figure.
    """
    if figure["mean"] is None:
        return Cell(none if runs else MISSING)
    spread = "" if figure["spread"] is None else f"± {figure['spread']:.{digits}f}"
    number = f"(n = {figure['n']})" if figure["n"] != runs else ""
    return Cell(f"{figure['mean']:.{digits}f}", f"{spread} {number}".strip())


def embolden(
    rows: Sequence[TableRow], out: Callable[[TableRow, int], bool] = lambda row, i: False
) -> list[TableRow]:
    """The rows with the highest figure of each column bold; of figures that print alike all, and
    none where there is but one.

    Args:
        rows: of one setting.
        out: whether the i-th cell of a row is out of competition.
    """
    cells = [list(row.cells) for row in rows]
    for i in range(max(map(len, cells), default=0)):
        known = {
            r: float(own[i].text)
            for r, own in enumerate(cells)
            if own[i].ranked and not out(rows[r], i)
        }
        for r, value in known.items():
            if len(known) > 1 and value == max(known.values()):
                cells[r][i] = dataclasses.replace(cells[r][i], best=True)
    return [
        dataclasses.replace(row, cells=tuple(own)) for row, own in zip(rows, cells, strict=True)
    ]


def _number_of_runs(study: Study, group: Group) -> Cell:
    return Cell(f"{len(study.finished(group))} of {group['of']}", competes=False)


def _own_row(study: Study, group: Group, columns: Sequence[str]) -> TableRow:
    runs = len(study.finished(group))
    lacking = study.without_truth()

    def none(column):
        return results.NO_TRUTH if column in lacking else NONE

    figures = (cell(study.figure(group, column), runs, none=none(column)) for column in columns)
    return TableRow(group["group"], (_number_of_runs(study, group), *figures))


def _published_rows(
    table: Published, columns: Sequence[str], citations: Citations
) -> list[TableRow]:
    rows = []
    for row in table.rows:
        known = dict(zip(table.columns, row.values, strict=True))
        figures = [known.get(column) for column in columns]
        rows.append(
            TableRow(
                row.name,
                tuple(Cell(NONE if v is None else f"{v:.1f}") for v in figures),
                citations.number(row.cite),
            )
        )
    return rows


def _score_tables(study: Study, citations: Citations) -> list[Table]:
    """Our groups on every domain, with the published rows that may be compared, and the groups on
    parts of domains.
    """
    domains = study.domains()
    columns = [*domains, *MEANS]
    source = {group["group"]: study.sources(group) for group in study.groups}
    rows = [_own_row(study, group, columns) for group in study.groups]
    notes = []
    for table in filter(study.comparable, study.published()):
        rows += [
            dataclasses.replace(row, cells=(Cell(NONE), *row.cells))
            for row in _published_rows(table, columns, citations)
        ]
        source |= {row.name: [row.source] for row in table.rows if row.source}
        notes.append(
            "Rows with a number in brackets are published, on the same data by the same protocol."
            f" {table.note}".strip()
        )
    groups = {group["group"]: group for group in study.groups}

    def own(row: TableRow, i: int) -> bool:
        """Whether the i-th cell of a row is the score on a domain trained on."""
        domain = domains[i - 1] if 0 < i <= len(domains) else None
        return domain is not None and (
            study.seen(groups[row.head], domain)
            if row.head in groups
            else domain in source.get(row.head, [])
        )

    heads = domains
    if study.name != "transfer":
        rows = embolden(rows)
        heads = [
            name + results.mark(name, study.entries()[name], study.json["source"])
            for name in domains
        ]
    else:
        if notes:  # several rows of each source: they compete
            rows = [
                row
                for one in dict.fromkeys(map(tuple, source.values()))
                for row in embolden([r for r in rows if tuple(source[r.head]) == one])
            ]
        else:  # the sources compete, each on what is not its own
            rows = embolden(rows, own)
        rows = [
            _marked(row, "*", [i for i in range(len(row.cells)) if own(row, i)]) for row in rows
        ]
        notes.insert(
            0,
            (
                "*: the domain trained on; bold among the others."
                if not notes
                else "*: the domain trained on; bold among rows of one source."
            ),
        )
    rows = [_marked_where_trained_on(study, row, domains, first=1) for row in rows]
    note = (
        "n: finished runs of those planned; ±: their sample standard deviation. rPD: mean unseen in"
        " % of the score on the source."
    )
    remarks = _remarks(study)
    tables = [
        Table(
            f"{study.score} in %",
            ("", "n", *heads, *MEANS.values()),
            tuple(rows),
            " ".join([note, *notes, *remarks]),
        )
    ]
    if parts := study.domains(parts=True):
        rows = [
            _marked_where_trained_on(study, row, parts, 1)
            for row in embolden([_own_row(study, group, parts) for group in study.groups])
        ]
        note = " ".join(["Parts do not enter the means.", *remarks])
        tables.append(
            Table(f"{study.score} in % on parts of domains", ("", "n", *parts), tuple(rows), note)
        )
    return tables


def _marked(row: TableRow, sign: str, places: Sequence[int]) -> TableRow:
    """A row with a sign behind the scores in some of its cells."""
    cells = (
        dataclasses.replace(c, text=c.text + sign) if i in places and c.ranked else c
        for i, c in enumerate(row.cells)
    )
    return dataclasses.replace(row, cells=tuple(cells))


def _marked_where_trained_on(
    study: Study, row: TableRow, domains: Sequence[str], first: int
) -> TableRow:
    """A row with a sign behind the scores on images trained on; the cell `first` is that of the
    first domain. Notes say how many.
    """
    group = next((group for group in study.groups if group["group"] == row.head), None)
    if group is None or row.cite is not None:
        return row
    return _marked(
        row,
        TRAINED,
        [first + i for i, domain in enumerate(domains) if study.trained_on(group, domain)],
    )


def _remarks(study: Study) -> list[str]:
    """What must be known to read the scores, a sentence each."""
    return [f"{TRAINED if results.JUDGED in line else ''}{line}." for line in study.remarks()]


def _separate_tables(study: Study, citations: Citations) -> list[Table]:
    """The published figures that may not be compared with ours."""
    tables = []
    for table in study.published():
        if study.comparable(table):
            continue
        here = ", ".join(
            [f"trained on {study.json['source']}"] * bool(table.source)
            + [f"protocol {study.json['protocol']}"]
        )
        rows = _published_rows(table, table.columns, citations)
        blocks = {row.name: row.source for row in table.rows}
        rows = [
            row
            for one in dict.fromkeys(blocks.values())
            for row in embolden([r for r in rows if blocks[r.head] == one])
        ]
        tables.append(
            Table(
                f"Published, on other data or by another protocol: {table.title}",
                ("", *(MEANS.get(name, name) for name in table.columns)),
                tuple(rows),
                f"Not to be compared with our figures above ({here}). {table.note}".strip(),
            )
        )
    return tables


def _corruption_tables(study: Study) -> list[Table]:
    tables = []
    severities = study.severities()
    for domain in corrupted_domains(study):
        rows = []
        kinds = []
        for group in study.groups:
            runs = len(study.finished(group))

            def at(group=group, domain=domain, **how):
                return study.corrupted(group, domain, **how)

            figures = [at(severity=s) for s in (0, *severities)] + [at(), at(relative=True)]
            rows.append(
                TableRow(
                    group["group"],
                    (
                        _number_of_runs(study, group),
                        *(_complete(figure, runs) for figure in figures),
                    ),
                )
            )
        caption = (
            f"{study.score} in % on {domain}, mean over kinds of corruption ({len(study.kinds())})"
        )
        note = (
            "kept: mean over all kinds and severities in % of clean. A mean with a gap among its"
            " parts is missing."
        )
        note = " ".join([note, *(line for line in _remarks(study) if f"{domain}: " in line)])
        heads = ("", "n", "clean", *(f"severity {s}" for s in severities), "mean", "kept in %")
        tables.append(Table(caption, heads, tuple(embolden(rows)), note))
        for kind in _in_families(study.kinds()):
            figures = [
                (study.corrupted(group, domain, kind=kind), len(study.finished(group)))
                for group in study.groups
            ]
            kinds.append(
                TableRow(kind.replace("_", " "), tuple(_complete(*figure) for figure in figures))
            )
        caption = (
            f"{study.score} in % on {domain} by kind of corruption, mean over {len(severities)}"
            " severities"
        )
        tables.append(
            Table(
                caption,
                ("", *(group["group"] for group in study.groups)),
                tuple(map(_best_of_row, kinds)),
                "Bold: the best of a row.",
            )
        )
    return tables


def _complete(figure: Figure, runs: int) -> Cell:
    """As `cell`, but what is not there has not been evaluated yet."""
    return cell(figure, runs) if figure["n"] else Cell(MISSING)


def _best_of_row(row: TableRow) -> TableRow:
    turned = embolden([TableRow("", (own,)) for own in row.cells])
    return dataclasses.replace(row, cells=tuple(one.cells[0] for one in turned))


def _in_families(kinds: Iterable[str]) -> list[str]:
    order = [kind for family in _FAMILIES.values() for kind in family]
    return sorted(kinds, key=lambda kind: order.index(kind) if kind in order else len(order))


def _run_table(study: Study) -> Table:
    """Every planned run."""
    rows = []
    for run in study.json["runs"]:
        done = run["status"] == "finished"
        entries = run["results"]["domains"] if done else {}
        scored = {name: entry for name, entry in entries.items() if entry[study.score] is not None}
        own = results.reference(scored)
        unseen = run["results"]["mean_unseen"] if done else None
        figures = [
            sum(scored[name][study.score] for name in own) / len(own) if own else None,
            unseen,
        ]
        signs = [TRAINED * any(results.share(scored[name]) != "" for name in own), ""]
        cells = [
            Cell(str(run["step"]) if done else MISSING),
            *(
                Cell(MISSING if not done else NONE if v is None else f"{v:.1f}{sign}")
                for v, sign in zip(figures, signs, strict=True)
            ),
        ]
        rows.append(TableRow(run["name"], (Cell(str(run["seed"])), *cells)))
    note = " ".join(line for line in _remarks(study) if line.startswith(TRAINED))
    return Table(
        f"The runs: {study.score} in %",
        ("", "seed", "step", "source", "mean unseen"),
        tuple(rows),
        note,
    )


# --- Plots ----------------------------------------------------------------------------------------


def _bar(study: Study, group: Group, column: str, more: str = "") -> plots.Bar:
    figure = study.figure(group, column)
    planned = group["of"]
    if figure["mean"] is None:
        none = results.NO_TRUTH if column in study.without_truth() else "not judged"
        return plots.Bar(
            None, None, f"{MISSING} (0 of {planned} runs)" if not study.finished(group) else none
        )
    spread = "" if figure["spread"] is None else f" ± {figure['spread']:.1f}"
    of = "" if figure["n"] == planned else f" of {planned}"
    values = study.values(group, column)
    text = f"{figure['mean']:.1f}{spread} (n = {figure['n']}{of}){more}"
    return plots.Bar(
        figure["mean"], figure["spread"], text, tuple(values) if len(values) > 1 else ()
    )


def _domain_bars(study: Study) -> Plots:
    """Every group on every domain, one plot a domain."""
    drawn = []
    for column in ("mean_unseen", *study.domains()):
        groups = [
            plots.BarGroup(group["group"], (_bar(study, group, column),)) for group in study.groups
        ]
        drawn.append(
            (
                f"bars_{_file(column)}",
                plots.bars(MEANS.get(column, column), groups, (), f"{study.score} in %"),
            )
        )
    caption = (
        "Mean over seeds; whiskers: sample standard deviation; dots: single runs. No whisker, no"
        " spread: one run."
    )
    return Plots(tuple(drawn), _captioned(study, caption))


def _captioned(study: Study, caption: str) -> str:
    """A caption of plots, and what must be known to read them."""
    return " ".join([caption, *(f"{line}." for line in study.remarks())])


def _gap_bars(study: Study) -> Plots:
    """The source domain against the mean of the unseen ones."""
    groups = []
    for group in study.groups:
        rpd = study.figure(group, "rPD")["mean"]
        more = "" if rpd is None else f", rPD {rpd:.0f} %"
        groups.append(
            plots.BarGroup(
                group["group"],
                (_bar(study, group, "seen"), _bar(study, group, "mean_unseen", more)),
            )
        )
    drawn = plots.bars(
        "The gap between domains",
        groups,
        ("domain trained on", "mean of unseen domains"),
        f"{study.score} in %",
    )
    caption = (
        "What is lost from the domain trained on to domains never seen. rPD: the second bar in % of"
        " the first."
    )
    return Plots((("gap", drawn),), _captioned(study, caption))


def _frozen(group: Group) -> tuple[str, int] | None:
    """Which blocks of a group are frozen and how many, as (first or last, n); ("", 0) for none."""
    which, _, number = group["settings"].get("model.freeze", "none").partition(" ")
    if which == "none":
        return "", 0
    return (which, int(number)) if which in ("first", "last") and number.isdigit() else None


def _freezing_plots(study: Study) -> Plots:
    frozen = {place: group for group in study.groups if (place := _frozen(group))}
    drawn = []
    for which in ("first", "last"):
        counts = sorted(n for kind, n in frozen if kind in ("", which))
        series = []
        for column in (*study.domains(), "mean_unseen"):
            points = [
                (n, study.figure(frozen[("", 0) if n == 0 else (which, n)], column)) for n in counts
            ]
            series.append(
                plots.Line(
                    MEANS.get(column, column),
                    tuple(plots.Point(n, f["mean"], f["spread"]) for n, f in points),
                )
            )
        if counts not in ([], [0]):
            axis = f"{which} blocks frozen (number)"
            drawn.append(
                (
                    f"{which}_frozen",
                    plots.lines(
                        f"The {which} blocks frozen",
                        series,
                        axis,
                        f"{study.score} in %",
                        [(n, str(n)) for n in counts],
                    ),
                )
            )
    caption = (
        "Mean over seeds by the number of frozen blocks; whiskers: sample standard deviation. The"
        " axis does not begin at 0."
    )
    return Plots(tuple(drawn), _captioned(study, caption))


def _published_freezing() -> Plots:
    drawn = []
    for which, table in (("first", FREEZING_FIRST), ("last", FREEZING_LAST)):
        series = [
            plots.Line(d, tuple(plots.Point(n, y) for n, y in enumerate((FREEZING_NONE[d], *ys))))
            for d, ys in table.items()
        ]
        ticks = [(n, str(n)) for n in range(0, 13, 2)]
        drawn.append(
            (
                f"published_{which}",
                plots.lines(
                    f"Published: the {which} blocks frozen",
                    series,
                    f"{which} blocks frozen (number)",
                    "mIoU in %",
                    ticks,
                ),
            )
        )
    return Plots(
        tuple(drawn),
        "Published, read off the poster's plot: EVA-02-CLIP B/16 trained on GTA5, one run each as"
        " far as is known.",
    )


def _severity_plots(study: Study) -> Plots:
    severities = [0, *study.severities()]
    drawn = []
    ticks = [(s, "clean" if s == 0 else str(s)) for s in severities]
    for domain in corrupted_domains(study):
        series = []
        for group in study.groups:
            figures = [study.corrupted(group, domain, severity=s) for s in severities]
            series.append(
                plots.Line(
                    group["group"],
                    tuple(
                        plots.Point(s, f["mean"], f["spread"])
                        for s, f in zip(severities, figures, strict=True)
                    ),
                )
            )
        drawn.append(
            (
                f"severity_{_file(domain)}",
                plots.lines(domain, series, "severity", f"{study.score} in %", ticks),
            )
        )
    caption = (
        f"Mean over {len(study.kinds())} kinds of corruption by severity; whiskers: spread over"
        " seeds. The axis does not begin at 0."
    )
    return Plots(tuple(drawn), _captioned(study, caption))


def _published_severities(study: Study) -> Plots:
    drawn = []
    for table in study.published():
        series = [
            plots.Line(
                row.name,
                tuple(
                    plots.Point(int(s), y) for s, y in zip(table.columns, row.values, strict=True)
                ),
            )
            for row in table.rows
        ]
        drawn.append(
            (
                "published",
                plots.lines(
                    "Published",
                    series,
                    "severity",
                    f"{study.score} in %",
                    [(int(s), s) for s in table.columns],
                ),
            )
        )
    return Plots(
        tuple(drawn),
        "Published, read off the poster's plot: other models on other data, not to be compared with"
        " ours in height.",
    )


# --- The report -----------------------------------------------------------------------------------


def _facts(study: Study) -> Facts:
    j = study.json
    judged = []
    for name, entry in study.entries().items():
        which = (
            "" if study.name == "transfer" else results.mark(name, entry, j["source"]).strip(" ()")
        )
        if entry["part_of"] is None:
            count = f"{entry['images']} images"
            judged.append(f"{name} ({', '.join(filter(None, (count, which)))})")
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


def _section(study: Study, key: str, title: str, citations: Citations) -> Section:
    blocks: list[Block] = [Text(QUESTIONS[study.name]), *map(Text, findings(study))]
    separate = _separate_tables(study, citations)
    if study.name == "corruptions":
        blocks += [
            _severity_plots(study),
            *_corruption_tables(study),
            _published_severities(study),
            *separate,
        ]
    elif study.finished():
        blocks += _score_tables(study, citations)
        blocks.append(_freezing_plots(study) if study.name == "freezing" else _domain_bars(study))
        if study.name in ("pretraining", "transfer") and any(
            study.values(group, "seen") for group in study.groups
        ):
            blocks.append(_gap_bars(study))
        if study.name == "freezing" and separate:
            blocks.append(_published_freezing())
        blocks += separate
    blocks += [*pictures(study), _facts(study), _run_table(study)]
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
    citations = Citations()
    sections = [
        _section(s, f"study{i}", title, citations)
        for i, (s, title) in enumerate(zip(ordered, titles, strict=True), 1)
    ]
    if citations.sources:
        references = References(tuple((source.name, source.url) for source in citations.sources))
        sections.append(Section("sources", "Sources of published figures", (references,)))
    return Document("Domain generalisation: studies", (Text(_RULES),), tuple(sections))


def write(folders: Sequence[Path], out: Path) -> list[Path]:
    """Writes the report of the studies in some folders.

    Args:
        folders: of studies.
        out: where to write; an earlier report there is replaced, with its pictures.

    Returns:
        The files to look at.

    Raises:
        FileNotFoundError: a folder holds no study.
        ValueError: a study.json is not to be understood.
    """
    report = make([load(folder) for folder in folders])
    text, files = document.markdown(report, PICTURES)
    shown = out / PICTURES
    shown.mkdir(parents=True, exist_ok=True)
    for old in shown.glob("study*_*"):
        old.unlink()
    for name, data in files.items():
        (shown / name).write_bytes(data)
    written = {
        "report.html": document.html(report),
        "report.md": text,
        "tables.tex": document.latex(report),
    }
    for name, content in written.items():
        (out / name).write_text(content, encoding="utf-8")
    return [out / name for name in written]


def _file(name: str) -> str:
    return name.replace("/", "_")


def main(arguments: Sequence[str]) -> None:
    """Writes the report of the folders that the arguments name."""
    if len(arguments) < 2:
        raise ValueError(
            "name at least one folder of a study: python -m jaxdg.studies.report DIR... --out"
            " FOLDER"
        )
    folders = [Path(paths.given(argument, "the folder of a study")) for argument in arguments[1:]]
    for path in write(folders, Path(_OUT.value or folders[0] / "report")):
        print(f"written {path}")


if __name__ == "__main__":
    _OUT = cli.define_path(
        "out", "Folder for the report; DIR/report of the first study if left out."
    )
    flags.FLAGS.set_gnu_getopt(True)  # --out may follow the folders
    cli.run(main)
