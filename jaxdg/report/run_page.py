"""The page of one run, finished or not: scores, pictures, what is taken for what, curves of
training, and what was run on what.

    jaxdg report runs/streets                        # writes runs/streets/report/report.html
    jaxdg report streets.safetensors                 # of a packed model: its scores and its card

All figures come from the files of the workdir; the same files give the same bytes. The folders
that `evaluate` has written there (`evaluation_STEP..`) have a section each.
"""

from collections.abc import Iterator, Mapping, Sequence
import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np

from jaxdg import config as config_lib
from jaxdg.evaluation import results as results_lib
from jaxdg.evaluation.average_precision import Curves
from jaxdg.evaluation.confusion import read_confusion
from jaxdg.report import plots, tiles, writing
from jaxdg.report.document import (
    Block,
    Cell,
    Document,
    Facts,
    Pictures,
    Plots,
    Section,
    Table,
    TableRow,
    Text,
)
from jaxdg.report.run import Evaluation, Run, read

OUT = "report"  # folder in the workdir
NONE = "–"  # where there is no such figure  # noqa: RUF001
IMAGES = 3  # of a domain, of the worst and of the evenly spread ones each
WIDTH = 360  # of a picture, pixels
POINTS = 300  # of a curve
_LEAST = 5.0  # per cent of a class taken for another that is worth a sentence
_NAMED = 5  # classes in a sentence
# What an entry of a domain has beside its scores.
_NO_SCORES = ("images", "trained_on", "classes")


def write(workdir: Path, out: Path | None = None) -> list[Path]:
    """Writes the page of a run.

    Args:
        workdir: of the run, or the file of a packed model.
        out: folder; `report` in the workdir, or `NAME_report` beside the file, if None.

    Returns:
        The written texts, the page first.

    Raises:
        FileNotFoundError: `workdir` holds no run.
    """
    return writing.write(make(read(workdir)), own_folder(workdir) if out is None else out)


def own_folder(path: Path) -> Path:
    """Where the page of a workdir or of a packed file goes."""
    return path.with_name(f"{path.stem}_{OUT}") if path.is_file() else path / OUT


def make(run: Run) -> Document:
    """The page of a run."""
    sections: list[tuple[str, Sequence[Block]]] = []
    for evaluation in run.evaluations:
        parts = {
            "Scores": [*_scores(evaluation), *_curves(evaluation)],
            "Pictures": _pictures(evaluation),
            "What is taken for what": _confusions(evaluation),
        }
        if evaluation.name:
            together = [block for blocks in parts.values() for block in blocks]
            parts = {f"Judged again: {evaluation.name}": together}
        sections += parts.items()
    if not run.card:
        sections.append(("Training", _training(run)))
    sections.append(("What was run", _about(run)))
    shown = [(title, tuple(blocks)) for title, blocks in sections if blocks]
    numbered = [Section(f"run{i}", title, blocks) for i, (title, blocks) in enumerate(shown, 1)]
    title = f"{'Model' if run.card else 'Run'} {run.folder.resolve().name}"
    return Document(title, tuple(map(Text, _introduction(run))), tuple(numbered))


def _introduction(run: Run) -> Iterator[str]:
    c = config_lib.flat(dict(run.config))
    steps = c.get("steps", 0)
    done = (
        f"{run.step} steps"
        if run.step >= steps or run.card
        else f"{run.step} of {steps} steps, and not finished"
    )
    yield (
        f"{c.get('model.encoder')} with {c.get('model.decoder')}, trained on"
        f" {c.get('data.source')}: {done}."
    )
    if run.evaluations:
        yield _told(run.evaluations[0])
    else:
        yield "It was not judged on any domain yet."


def _told(evaluation: Evaluation) -> str:
    """The scores of an evaluation in words."""
    r = evaluation.results
    score = evaluation.score
    scored = {
        name: entry
        for name, entry in evaluation.domains.items()
        if entry[score] is not None and entry["part_of"] is None
    }
    seen = [name for name in scored if scored[name]["seen"]]
    unseen = sorted((n for n in scored if n not in seen), key=lambda n: scored[n][score])
    told = [
        f"{score} {scored[name][score]:.1f} on {name}"
        f"{results_lib.mark(name, scored[name], r['source'])}"
        for name in seen
    ]
    if unseen and r["mean_unseen"] is not None:
        where = f"on average over {len(unseen)} unseen domains"
        hardest = f"; the hardest is {unseen[0]}, {scored[unseen[0]][score]:.1f}"
        if len(unseen) == 1:
            where, hardest = f"on {unseen[0]}, which it never saw", ""
        part = "" if r["rPD"] is None else f", {r['rPD']:.0f} % of the seen (rPD)"
        what = "" if seen else f"{score} "
        told.append(f"{what}{r['mean_unseen']:.1f} {where}{part}{hardest}")
    if not told:
        told.append("No domain that was judged has truth")
    return f"{'; '.join(told)} (step {r['step']}, protocol {r['protocol']})."


# Scores ------------------------------------------------------------------------------------------


def _scores(evaluation: Evaluation) -> list[Block]:
    domains = evaluation.domains
    gaps = results_lib.figures(domains, evaluation.score)["class_gap"]
    lost = sorted(((gap, name) for name, gap in gaps.items() if gap), reverse=True)
    blocks: list[Block] = [Text(_told(evaluation))] if evaluation.name else []
    if lost:
        named = ", ".join(f"{name} {gap:.1f}" for gap, name in lost[:_NAMED])
        blocks.append(
            Text(
                f"What classes lose on unseen domains, in points of {evaluation.of_class}: {named}."
            )
        )
    bars = [
        plots.BarGroup(
            name, (plots.Bar(entry[evaluation.score], None, _printed(entry, evaluation)),)
        )
        for name, entry in domains.items()
    ]
    if len(bars) > 1:
        svg = plots.bars("Domains", bars, (), f"{evaluation.score} in %")
        blocks.append(Plots(((f"domains{evaluation.name}", svg),), "Every domain that was judged."))
    return [*blocks, _domain_table(evaluation), _class_table(evaluation, gaps)]


def _printed(entry: Mapping[str, Any], evaluation: Evaluation) -> str:
    value = entry[evaluation.score]
    return results_lib.NO_TRUTH if value is None else f"{value:.1f}"


def _domain_table(evaluation: Evaluation) -> Table:
    """Every domain with all numbers that its entry has, and the mean over unseen ones."""
    r = evaluation.results
    entries = evaluation.domains
    score = evaluation.score
    numbers = [
        key
        for key in dict.fromkeys(key for entry in entries.values() for key in entry)
        if any(isinstance(entry.get(key), float) for entry in entries.values())
    ]
    columns = [score, *(key for key in numbers if key not in (score, *_NO_SCORES))]
    more = {n: {**(e.get("subsets") or {}), **(e.get("coco") or {})} for n, e in entries.items()}
    further = dict.fromkeys(key for part in more.values() for key in part)
    rows = []
    for name, entry in entries.items():
        values = [entry.get(key) for key in columns]
        values += [more[name].get(key) for key in further]
        first, *others = values
        head = name + results_lib.mark(name, entry, r["source"])
        cells = [_figure(first, results_lib.NO_TRUTH), *map(_figure, others)]
        rows.append(TableRow(head, (*cells, Cell(str(entry["images"]), competes=False))))
    if r["mean_unseen"] is not None:
        empty = [Cell("")] * (len(columns) + len(further))
        rows.append(TableRow("mean unseen", (_figure(r["mean_unseen"]), *empty)))
    note = " ".join(f"{line}." for line in results_lib.remarks(r))
    if r["rPD"] is not None:
        note = f"rPD, the mean unseen in % of the seen: {r['rPD']:.1f}. {note}".strip()
    heads = ("", *columns, *further, "images")
    return Table("Domains, in %", heads, tuple(rows), note)


def _class_table(evaluation: Evaluation, gaps: Mapping[str, float | None]) -> Table:
    """Every class on every domain, and what it loses on unseen ones."""
    domains = evaluation.domains
    classes = dict.fromkeys(c for e in domains.values() for c in e[evaluation.of_class])
    rows = []
    for label in classes:
        values = [entry[evaluation.of_class].get(label) for entry in domains.values()]
        cells = [
            dataclasses.replace(_figure(v), shade=0.0 if v is None else v / 100) for v in values
        ]
        if gaps:
            gap = gaps.get(label)
            cells.append(Cell(NONE if gap is None else f"{gap:+.1f}", competes=False))
        rows.append(TableRow(label, tuple(cells)))
    source = evaluation.results["source"]
    heads = [name + results_lib.mark(name, entry, source) for name, entry in domains.items()]
    note = "gap: mean over seen domains less mean over unseen ones, in points." if gaps else ""
    columns = ("", *heads, *(["gap"] if gaps else []))
    return Table(f"{evaluation.of_class} of classes, in %", columns, tuple(rows), note)


def _figure(value: float | None, none: str = NONE) -> Cell:
    return Cell(none if value is None else f"{value:.1f}")


# Curves ------------------------------------------------------------------------------------------


def _curves(evaluation: Evaluation) -> list[Plots]:
    """Reliability, where it was asked for, and precision against recall, of detection."""
    drawn = []
    told = []
    reliable = [
        plots.Line(
            name,
            tuple(
                plots.Point(sure, right)
                for sure, right in zip(r["confidence"], r["accuracy"], strict=True)
                if sure is not None
            ),
        )
        for name, entry in evaluation.domains.items()
        if (r := entry.get("reliability"))
    ]
    if reliable:
        labels = ("mean confidence in %", "accuracy in %")
        svg = plots.lines("Reliability", reliable, *labels, equal=100)
        drawn.append((f"reliability{evaluation.name}", svg))
        told.append(
            "Reliability: pixels by their confidence; below the broken line the model is surer"
            " than it is right, by ECE on average."
        )
    read = {
        name: curves
        for name in evaluation.domains
        if evaluation.folder and (curves := Curves.read(evaluation.folder, name)) is not None
    }
    if read:
        title, *labels = "Precision against recall", "recall in %", "precision in %"
        of_classes = {name: _precisions(curves) for name, curves in read.items()}
        means = [plots.Line(name, _mean(lines)) for name, lines in of_classes.items()]
        svg = plots.lines(title, means, *labels, marked=False)
        drawn.append((f"precision{evaluation.name}", svg))
        for name, lines in of_classes.items():
            if 1 < len(lines) <= plots.MOST_LINES:
                svg = plots.lines(f"{title}: {name}", lines, *labels, marked=False)
                drawn.append((f"precision{evaluation.name}_{name.replace('/', '_')}", svg))
        told.append(
            "Precision: at IoU 0.5, as COCO reads it at its 101 recalls; the mean over classes with"
            " truth, and of each."
        )
    return [Plots(tuple(drawn), " ".join(told))] if drawn else []


def _precisions(curves: Curves) -> list[plots.Line]:
    """Of each class with truth, at IoU 0.5."""
    at50 = curves.coco_precision[:, int(np.argmin(np.abs(curves.coco_iou - 0.5)))]
    recalls = (100 * curves.coco_recall).tolist()
    return [
        plots.Line(str(name), tuple(map(plots.Point, recalls, (100 * values).tolist())))
        for name, values in zip(curves.classes, at50, strict=True)
        if not np.isnan(values).any()
    ]


def _mean(lines: Sequence[plots.Line]) -> tuple[plots.Point, ...]:
    """The mean of curves over the same places."""
    return tuple(
        plots.Point(points[0].x, sum(p.y for p in points) / len(points))
        for points in zip(*(line.points for line in lines), strict=True)
    )


# What is taken for what --------------------------------------------------------------------------


def _confusions(evaluation: Evaluation) -> list[Block]:
    blocks: list[Block] = []
    for name in evaluation.domains:
        if evaluation.folder and (stored := read_confusion(evaluation.folder, name)) is not None:
            blocks += _confusion(name, *stored)
    return blocks


def _confusion(domain: str, classes: Sequence[str], counts: np.ndarray) -> list[Block]:
    """The table of a domain, and its largest entries in a sentence."""
    true = counts.sum(axis=1)
    shares = 100 * counts / np.maximum(true, 1)[:, None]
    wrong = np.where(np.eye(len(classes), dtype=bool), 0.0, shares)
    order = np.argsort(-wrong, axis=None, kind="stable")[:_NAMED]
    worst = [divmod(int(i), len(classes)) for i in order if wrong.flat[i] >= _LEAST]
    named = [f"{classes[i]} for {classes[j]} ({wrong[i, j]:.0f} %)" for i, j in worst]
    rows = []
    for i, label in enumerate(classes):
        cells = [
            Cell(f"{v:.0f}" if v >= 0.5 else "", shade=v / 100, competes=False) for v in shares[i]
        ]
        pixels = Cell(f"{100 * true[i] / max(true.sum(), 1):.1f}", competes=False)
        rows.append(TableRow(label, (pixels, *cells)))
    table = Table(
        f"{domain}: of the true pixels of a row's class, % that are predicted as the column's",
        ("", "of all pixels", *classes),
        tuple(rows),
        "Empty: less than 0.5 %.",
        narrow=True,
    )
    told = f"On {domain} most often taken for another: {', '.join(named)}."
    return [Text(told), table] if named else [table]


# Pictures ----------------------------------------------------------------------------------------


def _pictures(evaluation: Evaluation) -> list[Pictures]:
    """The worst images of every domain, then those that are evenly spread over it."""
    grids = []
    for domain, entry in evaluation.domains.items():
        if evaluation.folder is None:
            continue
        which = results_lib.mark(domain, entry, evaluation.results["source"]).strip(" ()")
        for folder, what in (("worst", "Worst images"), ("qualitative", "Images")):
            found = evaluation.folder / folder
            images = [
                [("prediction", found / name)] for name in tiles.files_of(found, domain)[:IMAGES]
            ]
            if images:
                name = f"{folder}{evaluation.name}_{domain.replace('/', '_')}"
                caption = f"{what} of {domain} ({which or 'unseen'})."
                boxes = evaluation.score == "mAP50"
                labels = list(entry[evaluation.of_class])
                grids.append(tiles.grid(name, images, labels, caption, boxes=boxes, width=WIDTH))
    return grids


# Training ----------------------------------------------------------------------------------------


def _training(run: Run) -> list[Block]:
    rows = run.training
    if not rows:
        return [Text("No step is logged yet.")]
    known = {"step", "loss", "learning_rate", "seconds_per_step", "images_per_second"}
    terms = [key for key in rows[-1] if key not in known and key != "gradient_norm"]
    curves = {
        "Loss": ["loss", *(terms if len(terms) > 1 else [])],
        "Learning rate": ["learning_rate"],
        "Images a second": ["images_per_second"],
        "Norm of the gradient": ["gradient_norm"],
    }
    drawn = []
    size = -(-len(rows) // POINTS)
    for title, keys in curves.items():
        series = [_curve(key, rows, size) for key in keys]
        series = [line for line in series if line.points]
        if series:
            values = [p.y for line in series for p in line.points if p.y is not None]
            wide = 0 < 20 * min(values) < max(values) and title in ("Loss", "Norm of the gradient")
            label = "logarithmic" if wide else ""
            svg = plots.lines(title, series, "step", label, marked=False, logarithmic=wide)
            drawn.append((title.lower().replace(" ", "_"), svg))
    caption = "By step." if size == 1 else f"By step; a point is the mean of {size} logged rows."
    if (scores := _score_curves(run)) is not None:
        drawn.insert(0, ("scores", scores))
    return [Plots(tuple(drawn), caption)]


def _curve(key: str, rows: Sequence[Mapping[str, Any]], size: int) -> plots.Line:
    """The means of so many rows each."""
    having = [row for row in rows if isinstance(row.get(key), int | float)]
    parts = [having[i : i + size] for i in range(0, len(having), size)]
    points = (
        plots.Point(part[-1]["step"], sum(row[key] for row in part) / len(part)) for part in parts
    )
    return plots.Line(key.replace("_", " "), tuple(points))


def _score_curves(run: Run) -> str | None:
    """The score of every domain by step; None if it was judged once at most."""
    judged = [row for row in run.rows if "domain" in row]
    name = results_lib.score_name(run.config)
    if len({row["step"] for row in judged}) < 2:
        return None
    series = [
        plots.Line(
            domain,
            tuple(
                plots.Point(row["step"], row.get(name)) for row in judged if row["domain"] == domain
            ),
        )
        for domain in dict.fromkeys(row["domain"] for row in judged)
    ]
    return plots.lines("Scores", series, "step", f"{name} in %")


# What was run ------------------------------------------------------------------------------------


def _about(run: Run) -> list[Block]:
    facts: dict[str, str] = {}
    facts["Steps"] = f"{run.step} of {run.config.get('steps')}"
    if run.training:
        facts["Time in training steps"] = _duration(run.seconds())
    if (whole := run.wall_seconds()) is not None:
        facts["Time in all"] = f"{_duration(whole)}, with compilation, evaluation and checkpoints"
    if run.starts:
        last = run.starts[-1]
        facts["Begun"] = run.starts[0]["time"]
        if len(run.starts) > 1:
            at = ", ".join(str(start["step"]) for start in run.starts[1:])
            facts["Gone on"] = f"at step {at}"
        facts["Machine"] = f"{last['host']}: {last['devices']}, {last['cores']} cores"
        if last["processes"] > 1:
            facts["Processes"] = str(last["processes"])
        facts["Versions"] = ", ".join(f"{n} {number}" for n, number in last["versions"].items())
        facts["Command"] = last["command"]
    for key, value in config_lib.flat({k: v for k, v in run.card.items() if k != "scores"}).items():
        facts[key.replace("_", " ").replace(".", ": ")] = _value(value).text
    blocks: list[Block] = [Facts(tuple(facts.items()), ("Command",)), _differences(run)]
    if run.changes:
        rows = [
            TableRow(c["field"], tuple(map(_value, (c["step"], c.get("old"), c.get("new")))))
            for c in run.changes
        ]
        heads = ("field", "from step", "before", "now")
        blocks.append(Table("What was changed on the way", heads, tuple(rows)))
    return blocks


def _differences(run: Run) -> Table:
    """The fields of config.json that differ from the defaults, and where the data lie, whose
    default is another on each machine.
    """
    config = config_lib.flat(dict(run.config))
    defaults = config_lib.flat(json.loads(json.dumps(dataclasses.asdict(config_lib.Config()))))
    defaults["data.root"] = ""
    rows = [
        TableRow(field, (_value(value), _value(defaults.get(field, ""))))
        for field, value in config.items()
        if field not in defaults or value != defaults[field]
    ]
    return Table(
        "Settings that differ from the defaults", ("field", "value", "default"), tuple(rows)
    )


def _value(value: Any) -> Cell:
    return Cell(value if isinstance(value, str) else json.dumps(value), competes=False)


def _duration(seconds: float) -> str:
    """`2 h 03 min`, `4 min 10 s` or `12 s`."""
    whole = round(seconds)
    if whole >= 3600:
        return f"{whole // 3600} h {whole % 3600 // 60:02d} min"
    return f"{whole // 60} min {whole % 60:02d} s" if whole >= 60 else f"{whole} s"
