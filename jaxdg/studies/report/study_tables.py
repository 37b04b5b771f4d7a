"""The tables of a study: scores, published figures, corruptions and runs."""

from collections.abc import Callable, Iterable, Sequence
import dataclasses

from jaxdg.evaluation import results
from jaxdg.report.document import MISSING, Cell, Table, TableRow
from jaxdg.studies.report.findings import corrupted_domains
from jaxdg.studies.report.published import Published, Source
from jaxdg.studies.report.study_json import MEANS, Figure, Group, Study

TRAINED = "†"  # behind scores on images that the run was trained on
NONE = "–"  # where a finished run has no such figure  # noqa: RUF001
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


def cell(figure: Figure, runs: int, digits: int = 1, none: str = NONE) -> Cell:
    """A mean with its spread, or "missing" if no run is finished.

    Args:
        figure: mean, spread and n.
        runs: finished runs of the row; n is written into the cell if it differs.
        digits: after the point.
        none: printed if finished runs have no such figure.
    """
    if figure["mean"] is None:
        return Cell(none if runs else MISSING)
    spread = "" if figure["spread"] is None else f"± {figure['spread']:.{digits}f}"
    number = f"(n = {figure['n']})" if figure["n"] != runs else ""
    return Cell(f"{figure['mean']:.{digits}f}", f"{spread} {number}".strip())


def embolden(
    rows: Sequence[TableRow], out: Callable[[TableRow, int], bool] = lambda row, i: False
) -> list[TableRow]:
    """The rows with the highest figures of each column bold; a single figure is not.

    Args:
        rows: that may be compared.
        out: whether the i-th cell of a row does not compete.
    """
    cells = [list(row.cells) for row in rows]
    for i in range(max(map(len, cells), default=0)):
        values = {
            r: float(row[i].text)
            for r, row in enumerate(cells)
            if row[i].ranked and not out(rows[r], i)
        }
        for r, value in values.items():
            if len(values) > 1 and value == max(values.values()):
                cells[r][i] = dataclasses.replace(cells[r][i], best=True)
    return [
        dataclasses.replace(row, cells=tuple(own)) for row, own in zip(rows, cells, strict=True)
    ]


def _number_of_runs(study: Study, group: Group) -> Cell:
    return Cell(f"{len(study.finished(group))} of {group['of']}", competes=False)


def _own_row(study: Study, group: Group, columns: Sequence[str]) -> TableRow:
    runs = len(study.finished(group))
    without_truth = study.without_truth()
    cells = [_number_of_runs(study, group)]
    for column in columns:
        none = results.NO_TRUTH if column in without_truth else NONE
        cells.append(cell(study.figure(group, column), runs, none=none))
    return TableRow(group["group"], tuple(cells))


def _published_rows(
    table: Published, columns: Sequence[str], citations: Citations
) -> list[TableRow]:
    rows = []
    for row in table.rows:
        values = dict(zip(table.columns, row.values, strict=True))
        figures = [values.get(column) for column in columns]
        cells = tuple(Cell(NONE if v is None else f"{v:.1f}") for v in figures)
        rows.append(TableRow(row.name, cells, citations.number(row.cite)))
    return rows


def score_tables(study: Study, citations: Citations) -> list[Table]:
    """Our groups on every domain, beside comparable published rows, and on parts of domains."""
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
            f" {table.remarks}".strip()
        )
    groups = {group["group"]: group for group in study.groups}

    def own(row: TableRow, i: int) -> bool:
        """Whether the i-th cell of a row is the score on a domain trained on."""
        if not 0 < i <= len(domains):
            return False
        domain = domains[i - 1]
        if row.head in groups:
            return study.seen(groups[row.head], domain)
        return domain in source.get(row.head, [])

    heads = domains
    if study.name != "transfer":
        rows = embolden(rows)
        entries = study.entries()
        heads = [name + results.mark(name, entries[name], study.json["source"]) for name in domains]
    else:
        if notes:  # the rows of one source compete
            rows = [
                row
                for one in dict.fromkeys(map(tuple, source.values()))
                for row in embolden([r for r in rows if tuple(source[r.head]) == one])
            ]
            rivals = "rows of one source"
        else:  # the sources compete, each on the domains of the others
            rows = embolden(rows, own)
            rivals = "the others"
        rows = [
            _marked(row, "*", [i for i in range(len(row.cells)) if own(row, i)]) for row in rows
        ]
        notes.insert(0, f"*: the domain trained on; bold among {rivals}.")
    rows = [_marked_where_trained_on(study, row, domains, first=1) for row in rows]
    note = (
        "n: finished runs of those planned; ±: their sample standard deviation. rPD: mean unseen in"
        " % of the score on the source."
    )
    remarks = _remarks(study)
    note = " ".join([note, *notes, *remarks])
    columns = ("", "n", *heads, *MEANS.values())
    tables = [Table(f"{study.score} in %", columns, tuple(rows), note)]
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
    """A row with a sign behind the scores on images trained on; cell `first` is of domain 0."""
    group = next((group for group in study.groups if group["group"] == row.head), None)
    if group is None or row.cite is not None:
        return row
    return _marked(
        row,
        TRAINED,
        [first + i for i, domain in enumerate(domains) if study.trained_on(group, domain)],
    )


def _remarks(study: Study) -> list[str]:
    """The sentences that a reader of the scores needs."""
    return [f"{TRAINED if results.JUDGED in line else ''}{line}." for line in study.remarks()]


def separate_tables(study: Study, citations: Citations) -> list[Table]:
    """The published figures that may not be compared with ours."""
    tables = []
    for table in study.published():
        if study.comparable(table):
            continue
        ours = f"protocol {study.json['protocol']}"
        if table.source:
            ours = f"trained on {study.json['source']}, {ours}"
        rows = _published_rows(table, table.columns, citations)
        sources = {row.name: row.source for row in table.rows}
        rows = [
            row
            for one in dict.fromkeys(sources.values())
            for row in embolden([r for r in rows if sources[r.head] == one])
        ]
        caption = f"Published, on other data or by another protocol: {table.title}"
        columns = ("", *(MEANS.get(name, name) for name in table.columns))
        note = f"Not to be compared with our figures above ({ours}). {table.remarks}".strip()
        tables.append(Table(caption, columns, tuple(rows), note))
    return tables


def cost_table(study: Study) -> Table:
    """Trained parameters, memory and time of every group."""
    units = {"parameters": 1e6, "bytes": 1e9, "seconds_per_step": 1.0}
    rows = []
    for group in study.groups:
        runs = len(study.finished(group))
        cells = []
        for what, unit in units.items():
            figure = study.cost(group, what)
            scaled = {k: v / unit if v and k != "n" else v for k, v in figure.items()}
            spread = scaled["spread"] if what == "seconds_per_step" else None
            one = cell({**scaled, "spread": spread}, runs, digits=2)
            cells.append(dataclasses.replace(one, competes=False))
        rows.append(TableRow(group["group"], tuple(cells)))
    note = (
        "Memory: predicted for one device, of the program for CPUs. Time: the median of a run,"
        " input included, on the machine that trained it."
    )
    columns = ("", "trained parameters, M", "memory, GB", "s a step")
    return Table("What they cost", columns, tuple(rows), note)


def corruption_tables(study: Study) -> list[Table]:
    tables = []
    severities = study.severities()
    trained = [
        f"{TRAINED}{group['group']} was trained under {', '.join(kinds).replace('_', ' ')}."
        for group in study.groups
        if (kinds := study.trained_under(group))
    ]
    for domain in corrupted_domains(study):
        rows = []
        for group in study.groups:
            runs = len(study.finished(group))
            figures = [study.corrupted(group, domain, severity=s) for s in (0, *severities)]
            figures.append(study.corrupted(group, domain))
            figures.append(study.corrupted(group, domain, relative=True))
            cells = (_evaluated(figure, runs) for figure in figures)
            rows.append(TableRow(group["group"], (_number_of_runs(study, group), *cells)))
        caption = (
            f"{study.score} in % on {domain}, mean over kinds of corruption ({len(study.kinds())})"
        )
        note = (
            "kept: mean over all kinds and severities in % of clean. A mean with a gap among its"
            " parts is missing."
        )
        note = " ".join(
            [note, *trained, *(line for line in _remarks(study) if f"{domain}: " in line)]
        )
        heads = ("", "n", "clean", *(f"severity {s}" for s in severities), "mean", "kept in %")
        tables.append(Table(caption, heads, tuple(embolden(rows)), note))
        rows = []
        for kind in _in_families(study.kinds()):
            cells = [
                _evaluated(study.corrupted(group, domain, kind=kind), len(study.finished(group)))
                for group in study.groups
            ]
            row = TableRow("", tuple(cells))
            rows.append(dataclasses.replace(_best_of_row(row), head=kind.replace("_", " ")))
        caption = (
            f"{study.score} in % on {domain} by kind of corruption, mean over {len(severities)}"
            " severities"
        )
        heads = ("", *(group["group"] for group in study.groups))
        note = " ".join(["Bold: the best of a row.", *trained])
        tables.append(Table(caption, heads, tuple(rows), note))
    return tables


def _evaluated(figure: Figure, runs: int) -> Cell:
    """As `cell`, but "missing" also if a finished run was not evaluated on corrupted images."""
    return cell(figure, runs) if figure["n"] else Cell(MISSING)


def _best_of_row(row: TableRow) -> TableRow:
    turned = embolden([TableRow("", (own,)) for own in row.cells])
    return dataclasses.replace(row, cells=tuple(one.cells[0] for one in turned))


def _in_families(kinds: Iterable[str]) -> list[str]:
    order = [kind for family in _FAMILIES.values() for kind in family]
    return sorted(kinds, key=lambda kind: order.index(kind) if kind in order else len(order))


def run_table(study: Study) -> Table:
    """Every planned run."""
    rows = []
    for run in study.json["runs"]:
        texts = [MISSING] * 3
        if run["status"] == "finished":
            entries = run["results"]["domains"].items()
            scored = {name: entry for name, entry in entries if entry[study.score] is not None}
            unseen = run["results"]["mean_unseen"]
            source = NONE
            if own := results.reference(scored):
                source = f"{sum(scored[name][study.score] for name in own) / len(own):.1f}"
                if any(results.share(scored[name]) for name in own):
                    source += TRAINED
            texts = [str(run["step"]), source, NONE if unseen is None else f"{unseen:.1f}"]
        rows.append(TableRow(run["name"], tuple(map(Cell, (str(run["seed"]), *texts)))))
    note = " ".join(line for line in _remarks(study) if line.startswith(TRAINED))
    columns = ("", "seed", "step", "source", "mean unseen")
    return Table(f"The runs: {study.score} in %", columns, tuple(rows), note)
