"""The report says what study.json says, in three forms, and nothing else."""

import json
import os
from pathlib import Path
import re
import statistics
import subprocess
import sys
from xml.etree import ElementTree

import numpy as np
from PIL import Image
import pytest

from jaxdg.data.labels import CAMVID
from jaxdg.report import document, latex, markdown
from jaxdg.report.document import Cell, TableRow
from jaxdg.report.tiles import _judged
from jaxdg.studies.report import published, report, study_json, study_tables
from jaxdg.studies.summary import summary
from tests.report.reader import Reader

DOMAINS = ("camvid", "day", "dusk")
GROUPS = {
    "pretraining": {
        "augreg_ti16, tuned": {"model.encoder": "augreg_ti16", "model.freeze": "none"},
        "augreg_ti16, frozen": {"model.encoder": "augreg_ti16", "model.freeze": "all"},
        "from scratch, tuned": {"model.weights": None, "model.freeze": "none"},
    },
    "freezing": {
        f"{f} frozen": {"model.freeze": f}
        for f in ("none", "first 4", "first 8", "first 12", "last 4", "last 8", "last 12")
    },
    "methods": {"tuned": {}, "SoMA": {"low_rank.on": True}},
    "corruptions": {"plain": {}, "RandAugment": {"data.randaugment": [2, 5.0]}},
    "transfer": {f"from {d}": {"data.source": d} for d in DOMAINS},
    "seeds": {"as configured": {}},
}
KINDS = ("gaussian_noise", "fog", "jpeg_compression")


def write_study(
    folder: Path,
    name: str,
    *,
    seeds=(0, 1, 2),
    missing=(),
    task="segmentation",
    source="camvid",
    domains=DOMAINS,
    protocol="native",
    images=0,
    max_images=None,
):
    """A study's folder as the studies write it, without the runs in `missing`, with so many
    `images` a domain.
    """
    rng = np.random.default_rng(len(name))
    score, of_class = ("mIoU", "IoU") if task == "segmentation" else ("mAP50", "AP50")
    labels = CAMVID.names if task == "segmentation" else ("car", "person")
    runs = []
    for i, (group, settings) in enumerate(GROUPS[name].items()):
        trained_on = settings.get("data.source", source)
        level = {
            domain: 55.0 - 7 * i - 11 * (domain != trained_on) - 3 * j
            for j, domain in enumerate(domains)
        }
        for seed in seeds:
            run = re.sub(r"[^\w.]+", "_", f"{group} seed{seed}")
            scores = {
                domain: float(max(level[domain] + rng.normal(0, 0.8), 2.0)) for domain in domains
            }
            unseen = [s for domain, s in scores.items() if domain != trained_on]
            own = scores.get(trained_on)
            results = {
                "task": task,
                "source": trained_on,
                "protocol": protocol,
                "max_images": max_images,
                "step": 300,
                "domains": {
                    d: {
                        score: s,
                        of_class: dict.fromkeys(labels, s),
                        "images": 30,
                        "seen": d == trained_on,
                        "part_of": None,
                    }
                    for d, s in scores.items()
                },
                "mean_unseen": statistics.fmean(unseen),
                "rPD": None if own is None else 100 * statistics.fmean(unseen) / own,
            }
            done = run not in missing
            runs.append(
                {
                    "name": run,
                    "group": group,
                    "settings": settings,
                    "seed": seed,
                    "source": trained_on,
                    "command": (
                        "python -m jaxdg.train --config configs/tiny.py --workdir"
                        f" runs/{name}/runs/{run} --config.seed={seed}"
                    ),
                    "status": "finished" if done else "missing",
                    "step": 300 if done else None,
                    "results": results if done else None,
                }
            )
            if name == "methods" and done:
                runs[-1]["cost"] = {
                    "parameters": 4_866_048 + i,
                    "bytes": 3_210_000_000,
                    "seconds_per_step": 0.5 + seed,
                }
            if name == "corruptions" and done:
                drop = {kind: 0.80 - 0.1 * k - 0.05 * (1 - i) for k, kind in enumerate(KINDS)}
                runs[-1]["severities"] = [1, 2, 3, 4, 5]
                runs[-1]["corruptions"] = {
                    d: {
                        "clean": s,
                        **{
                            kind: [s * drop[kind] ** (n / 2) for n in range(1, 6)] for kind in KINDS
                        },
                    }
                    for d, s in scores.items()
                }
            if done and images:
                keep_pictures(
                    folder / "runs" / run / "qualitative",
                    domains,
                    images,
                    task,
                    wrong=0.1 + 0.15 * i,
                    seed=seed,
                )
    groups = [
        {"group": g, "settings": s, **summary([r for r in runs if r["group"] == g], score)}
        for g, s in GROUPS[name].items()
    ]
    everything = {
        "study": name,
        "task": task,
        "score": score,
        "protocol": protocol,
        "source": source,
        "config": "configs/tiny.py",
        "command": f"python -m jaxdg.studies.{name} --config=configs/tiny.py --workdir=runs/{name}",
        "versions": {"jaxdg": "0.1.0", "jax": "0.10.2", "flax": "0.12.8", "python": "3.11.2"},
        "runs": runs,
        "groups": groups,
    }
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "study.json").write_text(json.dumps(everything, indent=2))
    return everything


def keep_pictures(folder: Path, domains, images: int, task: str, wrong: float, seed: int) -> None:
    """Pictures as runs keep them: a sky, a road, houses, and a share of wrong blocks."""
    folder.mkdir(parents=True, exist_ok=True)
    for domain in domains:
        for i in range(images):
            rng = np.random.default_rng(i)
            truth = np.zeros((90, 120), np.uint8)
            truth[55:] = 3
            for x in range(0, 120, 20):
                truth[rng.integers(15, 45) : 55, x : x + 20] = 1 + 4 * (x % 3 == 0)
            truth[60:75, 30:55] = 8
            truth[85:] = 255
            image = (
                np.array([*CAMVID.colors, (0, 0, 0)], np.uint8)[np.minimum(truth, 11)]
                * (0.3 if domain == "dusk" else 0.8)
            ).astype(np.uint8)
            bad = np.kron(
                np.random.default_rng(seed).random((9, 12)) < wrong, np.ones((10, 10), bool)
            )
            arrays = {
                "truth": truth,
                "prediction": np.where(bad, 5, np.where(truth == 255, 3, truth)).astype(np.uint8),
            }
            if task == "detection":
                true = np.array([[30, 60, 55, 75], [80, 40, 90, 60]], np.float32)
                found = true + np.array([[1, 1, 0, 0], [40, 0, 40, 0]], np.float32)
                arrays = {
                    "truth_boxes": true,
                    "truth_classes": np.array([0, 1]),
                    "boxes": found,
                    "classes": np.array([0, 1]),
                }
                arrays["scores"] = np.array([0.9, 0.6], np.float32)
            np.savez_compressed(folder / f"{domain}_{i}.npz", image=image, **arrays)


@pytest.fixture(scope="module")
def everything(tmp_path_factory):
    """All studies in one report, some runs missing: the study.json files by name, and the
    folder of the report.
    """
    root = tmp_path_factory.mktemp("studies")
    missing = {
        "pretraining": (
            "augreg_ti16_frozen_seed1",
            *(f"from_scratch_tuned_seed{i}" for i in range(3)),
        ),
        "freezing": ("first_8_frozen_seed0", "last_8_frozen_seed0"),
    }
    seeds = {"freezing": (0,), "transfer": (0,), "corruptions": (0, 1)}
    studies = {
        name: write_study(
            root / name,
            name,
            seeds=seeds.get(name, (0, 1, 2)),
            missing=missing.get(name, ()),
            images=int(name == "pretraining"),
        )
        for name in reversed(GROUPS)
    }
    report.write([root / name for name in studies], root / "out")
    return studies, root / "out"


def test_the_page_tells_what_methods_cost(everything):
    """Trained parameters, memory and time of every group, the time with its spread over seeds."""
    page = Reader((everything[1] / "report.html").read_text())
    table = next(t for t in page.tables if t[0][-1] == "s a step")
    assert table[0] == ["", "trained parameters, M", "memory, GB", "s a step"]
    assert table[1:] == [[name, "4.87", "3.21", "1.50 ± 1.00"] for name in ("tuned", "SoMA")]


def expected(figure, runs: int) -> str:
    """How a figure is printed."""
    if figure["mean"] is None:
        return study_tables.NONE if runs else "missing"
    spread = "" if figure["spread"] is None else f" ± {figure['spread']:.1f}"
    return f"{figure['mean']:.1f}{spread}"


def test_figures_of_the_page_are_those_of_study_json(everything):
    """Mean, spread and number of every group and domain, read back from the page, are those that
    study.json holds.
    """
    studies, out = everything
    page = Reader((out / "report.html").read_text())
    for name in ("pretraining", "freezing", "seeds"):
        table = next(
            t
            for t in page.tables
            if [row[0] for row in t[1 : 1 + len(GROUPS[name])]] == list(GROUPS[name])
        )
        assert table[0] == ["", "n", "camvid (source)", "day", "dusk", "mean unseen", "rPD"]
        for group, row in zip(studies[name]["groups"], table[1:], strict=True):
            figures = [group["domains"].get(d, {"mean": None, "spread": None}) for d in DOMAINS] + [
                group["mean_unseen"],
                group["rPD"],
            ]
            assert row[1] == f"{group['n']} of {group['of']}"
            assert [cell.replace("**", "") for cell in row[2:]] == [
                expected(figure, group["n"]) for figure in figures
            ]


def md_rows(text: str) -> list[list[str]]:
    """Cells of the tables in Markdown; bold ones begin with **."""
    lines = [
        line[2:-2]
        for line in text.split("\n")
        if line.startswith("| ") and "---" not in line and "report_pictures" not in line
    ]

    def clean(cell):
        return re.sub(r"\\(.)", r"\1", re.sub(r"(?<!\\)\*\*(.*?)(?<!\\)\*\*", r"**\1", cell))

    return [[clean(cell) for cell in line.split(" | ")] for line in lines]


def tex_rows(text: str) -> list[list[str]]:
    """The same of LaTeX."""
    lines = [
        line.removesuffix(r" \tabularnewline")
        for line in text.split("\n")
        if line.endswith(r" \tabularnewline")
    ]
    swaps = {
        "{[}": "[",
        "{]}": "]",
        r"\textbf{": "**",
        r"\emph{": "",
        r"{\scriptsize ": "",
        "}": "",
        r"$\pm$": "±",
        "--": study_tables.NONE,
    }

    def clean(cell: str) -> str:
        for old, new in swaps.items():
            cell = cell.replace(old, new)
        return re.sub(r"\\([&%$#_{])", r"\1", cell)

    return [[clean(cell) for cell in re.split(r" (?<!\\)& ", line)] for line in lines]


def test_markdown_and_latex_have_the_same_cells(everything):
    """Every row of every table of the page stands in report.md and in tables.tex with the same
    figures and the same bold ones.
    """
    _, out = everything
    rows = [
        [cell.strip() for cell in row]
        for table in Reader((out / "report.html").read_text()).tables
        for row in table
    ]
    latex = tex_rows((out / "tables.tex").read_text())
    assert latex == rows
    assert [row for row in md_rows((out / "report.md").read_text()) if row in rows] == rows
    assert sum(cell.startswith("**") for row in rows for cell in row) > 20


def strokes(svg: str) -> list[tuple[str, str]]:
    """The paths of a plot that are drawn as lines, and the names of their colours."""
    return re.findall(r'<path d="([^"]*)" style="fill: none; stroke: var\(--(\w+)\)', svg)


def test_missing_runs_are_missing(everything):
    """A group without a finished run has no figure anywhere, one with some has n, and runs that are
    missing are named.
    """
    _, out = everything
    text = (out / "report.html").read_text()
    page = Reader(text)
    table = next(
        t
        for t in page.tables
        if t[0][:3] == ["", "n", "camvid (source)"] and t[1][0] == "augreg_ti16, tuned"
    )
    scratch = table[3]
    frozen = table[2]
    assert scratch == ["from scratch, tuned", "0 of 3", *["missing"] * 5]
    assert frozen[1] == "2 of 3"
    assert "missing" not in frozen
    runs = {row[0]: row for t in page.tables if t[0][1] == "seed" for row in t[1:]}
    assert runs["from_scratch_tuned_seed0"][2:] == ["missing"] * 3
    assert (
        "from_scratch_tuned_seed2" in text[text.index("did not finish and are") :].split("</p>")[0]
    )
    bars = next(svg for svg in re.findall(r"<svg.*?</svg>", text) if ">mean unseen<" in svg)
    assert ">missing (0 of 3 runs)<" in bars
    assert bars.count("<title>") == 2  # of a bar each
    curve = next(
        svg for svg in re.findall(r"<svg.*?</svg>", text) if ">The first blocks frozen<" in svg
    )
    assert curve.count(">missing<") == 1
    path = next(d for d, color in strokes(curve) if color == "c0")
    assert [path.count("M"), path.count("L")] == [2, 1]  # 0, 4, a gap, 12


def test_a_study_without_a_finished_run_has_a_report(tmp_path):
    """Nothing finished, nothing claimed."""
    missing = [f"as_configured_seed{i}" for i in range(3)]
    write_study(tmp_path / "a", "seeds", missing=missing)
    write_study(
        tmp_path / "b",
        "corruptions",
        missing=[f"{g}_seed{i}" for g in GROUPS["corruptions"] for i in range(3)],
    )
    report.write([tmp_path / "a", tmp_path / "b"], tmp_path / "out")
    text = (tmp_path / "out" / "report.html").read_text()
    assert text.count("No run has finished") == 2
    assert "0 finished of 3 planned" in text
    Reader(text)


def test_corruption_figures(everything):
    """Means over kinds and severities, what is kept of clean, and spread over seeds equal a direct
    computation.
    """
    studies, out = everything
    page = Reader((out / "report.html").read_text())
    heads = ["", "n", "clean", *(f"severity {s}" for s in range(1, 6)), "mean", "kept in %"]
    table = next(t for t in page.tables if t[0] == heads)
    runs = [
        run["corruptions"]["camvid"]
        for run in studies["corruptions"]["runs"]
        if run["group"] == "plain"
    ]
    grids = np.array([[run[kind] for kind in KINDS] for run in runs])
    clean = np.array([run["clean"] for run in runs])
    kept = 100 * grids.mean((1, 2)) / clean
    figures = [clean, *grids.mean(1).T, grids.mean((1, 2)), kept]
    assert [cell.replace("**", "") for cell in table[1][2:]] == [
        f"{f.mean():.1f} ± {f.std(ddof=1):.1f}" for f in figures
    ]


def test_a_gap_in_the_corruptions_is_not_averaged_over(tmp_path):
    """A severity with one missing cell has no mean over kinds, nor has the mean over severities,
    while other severities stand.
    """
    folder = tmp_path / "c"
    content = write_study(folder, "corruptions", seeds=(0,))
    content["runs"][0]["corruptions"]["day"]["fog"][2] = None
    (folder / "study.json").write_text(json.dumps(content))
    study = study_json.load(folder)
    plain = study.groups[0]

    def at(**how):
        return study.corrupted(plain, "day", **how)["mean"]

    assert at(severity=3) is None
    assert at() is None
    assert at(relative=True) is None
    assert at(kind="fog") is None
    scores = content["runs"][0]["corruptions"]["day"]
    assert at(severity=2) == pytest.approx(statistics.fmean(scores[kind][1] for kind in KINDS))
    report.write([folder], tmp_path / "out")
    table = next(
        t
        for t in Reader((tmp_path / "out" / "report.html").read_text()).tables
        if t[0][2:4] == ["clean", "severity 1"] and t[1][5] == "missing"
    )
    assert table[1][8:] == ["missing", "missing"]


def test_kinds_trained_under_are_named_beside_their_scores(tmp_path):
    """Under each table of corrupted images, for the group that saw some of the judged kinds, and
    for no other.
    """
    folder = tmp_path / "c"
    content = write_study(folder, "corruptions", seeds=(0,))
    content["runs"][0]["trained_under"] = ["jpeg_compression", "contrast", "gaussian_noise"]
    (folder / "study.json").write_text(json.dumps(content))
    report.write([folder], tmp_path / "out")
    page = (tmp_path / "out" / "report.md").read_text()
    said = f"†{content['runs'][0]['group']} was trained under gaussian noise, jpeg compression."
    domains = len(content["runs"][0]["corruptions"])
    assert page.count(said) == 2 * domains
    assert page.count("was trained under") == 2 * domains


def test_bold_is_the_best_alone():
    """Of each column the highest figure, all that print alike, none where it has no rival, and
    nothing that is no score.
    """

    def row(name, *texts):
        return TableRow(name, (Cell("3 of 3", competes=False), *map(Cell, texts)))

    rows = study_tables.embolden(
        [
            row("a", "9.9", "46.4", "5.0"),
            row("b", "46.3", "46.4", study_tables.NONE),
            row("c", "46.2", "missing", "missing"),
        ]
    )
    assert [[cell.best for cell in r.cells] for r in rows] == [
        [False, False, True, False],
        [False, True, True, False],
        [False] * 4,
    ]


def test_bold_in_the_page_is_the_best_of_its_column(everything):
    """In every table of scores the bold cells of a column are exactly the highest, by their printed
    figures.
    """
    _, out = everything

    def number(cell):
        return float(re.match(r"\**([\d.]+)", cell).group(1))

    for table in Reader((out / "report.html").read_text()).tables:
        if table[0][1:2] != ["n"] or any(
            "*" in cell.lstrip("*") for row in table[1:] for cell in row
        ):
            continue
        for column in range(2, len(table[0])):
            cells = [row[column] for row in table[1:] if re.match(r"\**\d", row[column])]
            best = {number(cell) for cell in cells if cell.startswith("**")}
            assert best == ({max(map(number, cells))} if len(cells) > 1 else set())


def test_own_sources_do_not_compete_in_a_transfer_matrix(everything):
    """What a model has on the domain it was trained on is marked and never bold."""
    _, out = everything
    tables = Reader((out / "report.html").read_text()).tables
    table = next(t for t in tables if [row[0] for row in t[1:]] == [f"from {d}" for d in DOMAINS])
    for i, row in enumerate(table[1:]):
        assert ["*" in cell.lstrip("*") for cell in row[2:5]] == [i == j for j in range(3)]
        assert not row[2 + i].startswith("**")
    assert sum(row[2].startswith("**") for row in table[1:]) == 1


def test_published_figures_are_compared_only_where_all_is_the_same(tmp_path):
    """Same task, source, domains and protocol, all images: one table, one winner.

    Else a table of its own that says so.
    """
    four = ("cityscapes", "bdd100k", "mapillary", "acdc")
    same = dict(source="gta5", domains=four, protocol="vltseg", seeds=(0,))
    cases = (
        ({}, True),
        ({"protocol": "rein"}, False),
        ({"source": "synthia"}, True),
        ({"source": "camvid"}, False),
        ({"domains": four[:3]}, False),
        ({"max_images": 30}, False),
    )
    for change, merged in cases:
        folder = tmp_path / "-".join(map(str, change.values() or ["same"]))
        write_study(folder, "pretraining", **(same | change))
        report.write([folder], folder / "out")
        page = (folder / "out" / "report.html").read_text()
        table = next(
            t for t in Reader(page).tables if t[1][0] == "augreg_ti16, tuned" and t[0][1] == "n"
        )
        theirs = [row for row in table if row[0].startswith("EVA-02-CLIP")]
        assert bool(theirs) == merged
        assert ("Not to be compared" in page) == (
            not merged or change.get("source", "gta5") == "gta5"
        )  # newer methods: several protocols
        if merged and not change:
            best = next(row for row in table if row[0].startswith("EVA-02-CLIP L/14 ["))
            assert best[2:7] == ["**65.3", "**58.3", "**66.0", "**62.6", "**63.1"]
            assert not any(cell.startswith("**") for row in table[1:4] for cell in row[:7])


def test_published_tables_are_those_of_their_source():
    """Rows are as wide as their tables, printed means of domains agree with the domains, and rPD
    with its row.
    """
    for table in published.TABLES:
        for row in table.rows:
            values = dict(zip(table.columns, row.values, strict=True))
            assert all(v is None or 0 < v < 110 for v in row.values)
            unseen = [values[d] for d in table.domains if d not in (table.source, row.source)]
            if values.get("mean_unseen") is not None:
                # G-NAS and its like are rounded before they are averaged
                assert statistics.fmean(unseen) == pytest.approx(values["mean_unseen"], abs=0.11), (
                    row.name
                )
            if "rPD" in values and table.task == "segmentation":
                assert 100 * statistics.fmean(unseen) / values[row.source] == pytest.approx(
                    values["rPD"], abs=0.11
                ), row.name


def test_rows_that_were_measured_otherwise_say_so(tmp_path):
    """Diverse Weather: how each row was measured stands below its table, and what was judged by
    another rule stands in a table that is not to be compared.
    """
    domains = ("night_sunny", "dusk_rainy", "night_rainy", "daytime_foggy")
    weather = dict(source="daytime_clear", protocol="voc07", task="detection", seeds=(0,))
    study = study_json.Study(
        tmp_path,
        {
            "study": "pretraining",
            "groups": [{"group": "ours"}],
            "runs": [
                {
                    "group": "ours",
                    "status": "finished",
                    "source": "daytime_clear",
                    "results": {"domains": {name: {"part_of": None} for name in domains}},
                }
            ],
            **weather,
        },
    )
    same, otherwise = study.published()
    assert [study.comparable(table) for table in (same, otherwise)] == [True, False]
    assert "CLIP the Gap: 600 x 1067 pixels; two runs" in same.remarks
    assert same.remarks.startswith(same.note)
    (table,) = study_tables.separate_tables(study, study_tables.Citations())
    assert table.caption.startswith("Published, on other data or by another protocol: Diverse")
    assert "PØDA, corrected: a model for each column" in table.note
    assert "Cauvis: true boxes under 32 pixels do not count" in table.note
    assert [row.head for row in table.rows] == [row.name for row in otherwise.rows]


def test_page_is_well_formed_and_alone(everything):
    """Every element is closed, links within lead somewhere, nothing is loaded from elsewhere, no
    script; SVG is XML.
    """
    _, out = everything
    text = (out / "report.html").read_text()
    page = Reader(text)
    assert page.open == []
    assert len(set(page.ids)) == len(page.ids)
    assert page.loaded
    assert all(source.startswith("data:image/") for source in page.loaded)
    assert "url(" not in text
    assert "@import" not in text
    known = {
        source.url for table in published.TABLES for row in table.rows for source in (row.cite,)
    }
    for link in page.links:
        assert link[1:] in page.ids if link.startswith("#") else link in known
    assert set(re.findall(r'https?://[^\s"<]+', text)) - known == {"http://www.w3.org/2000/svg"}
    drawn = re.findall(r"<svg.*?</svg>", text)
    assert len(drawn) > 10
    for svg in drawn:
        assert ElementTree.fromstring(svg).attrib["aria-label"]


def test_pictures_show_the_runs(everything):
    """A row has image, truth, a prediction of each finished model, and errors; the share of right
    pixels is that of the arrays.
    """
    _, out = everything
    text = (out / "report.md").read_text()
    folder = out.parent / "pretraining" / "runs"
    for run, group in (
        ("augreg_ti16_tuned_seed0", "augreg_ti16, tuned"),
        ("augreg_ti16_frozen_seed0", "augreg_ti16, frozen"),
    ):
        arrays = np.load(folder / run / "qualitative" / "dusk_0.npz")
        right = 100 * np.mean((arrays["truth"] == arrays["prediction"])[arrays["truth"] != 255])
        assert f"{group}: {right:.0f} % of pixels right" in text.replace("\\", "")
    files = sorted(path.name for path in (out / "report_pictures").glob("*_dusk_*"))
    assert [name[-7:] for name in files] == ["0_0.jpg", "0_1.png", "0_2.png", "0_3.png", "0_4.jpg"]
    truth = np.asarray(Image.open(out / "report_pictures" / files[1]).convert("RGB"))
    np.testing.assert_array_equal(truth[0, 0], CAMVID.colors[0])
    np.testing.assert_array_equal(truth[-1, 0], (0, 0, 0))
    for name in re.findall(r"\]\((report_pictures/[^)]+)\)", text):
        assert (out / name).is_file()
    for path in (out / "report_pictures").glob("*.svg"):
        ElementTree.parse(path)


def test_detection_report(tmp_path):
    """Boxes are drawn, AP50 is the score, and the errors are those counted by hand: one found, one
    false, one missed.
    """
    write_study(tmp_path, "pretraining", task="detection", seeds=(0,), images=1)
    report.write([tmp_path], tmp_path / "out")
    text = (tmp_path / "out" / "report.html").read_text()
    assert "detection, mAP50 in %" in text
    assert len([s for s in Reader(text).loaded if s.startswith("data:image/jpeg")]) == 3 * 6
    arrays = dict(
        np.load(tmp_path / "runs" / "augreg_ti16_tuned_seed0" / "qualitative" / "day_0.npz")
    )
    boxes, outcomes = _judged(arrays)
    assert outcomes.tolist() == [0, 2, 1]
    np.testing.assert_array_equal(boxes[2], arrays["truth_boxes"][1])
    nothing = {key: value[:0] for key, value in arrays.items()}
    assert _judged(nothing)[1].tolist() == []
    assert _judged(nothing | {key: arrays[key] for key in ("truth_boxes", "truth_classes")})[
        1
    ].tolist() == [1, 1]


def test_names_are_escaped_everywhere(tmp_path):
    """A group of every special character is text in the page, in Markdown and in LaTeX, and breaks
    no table.
    """
    name = r"[a]&b <i>50%</i> #1_$x$ {y} ~ ^ \z | `q` *s*"
    content = write_study(tmp_path, "seeds", seeds=(0, 1))
    for entry in (*content["runs"], *content["groups"]):
        entry["group"] = name
    (tmp_path / "study.json").write_text(json.dumps(content))
    report.write([tmp_path], tmp_path / "out")
    page = Reader((tmp_path / "out" / "report.html").read_text())
    assert page.tables[0][1][0] == name
    row = next(
        line
        for line in (tmp_path / "out" / "tables.tex").read_text().split("\n")
        if line.startswith("{[}a")
    )
    head = row.split(" & ")[0]
    signs = (
        r"\textasciitilde{} \textasciicircum{} \textbackslash{}z $|$"
        r" \textasciigrave{}q\textasciigrave{} *s*"
    )
    assert head == r"{[}a{]}\&b $<$i$>$50\%$<$/i$>$ \#1\_\$x\$ \{y\} " + signs
    md = next(
        line
        for line in (tmp_path / "out" / "report.md").read_text().split("\n")
        if line.startswith(r"| \[a\]&b")
    )
    assert r"\<i\>50%\</i\> \#1\_\$x\$ {y} \~ ^ \\z \| \`q\` \*s\*" in md
    for svg in re.findall(r"<svg.*?</svg>", (tmp_path / "out" / "report.html").read_text()):
        assert name in "".join(ElementTree.fromstring(svg).itertext())


@pytest.mark.parametrize(
    ("text", "tex", "md"),
    [
        ("road, route", "road, route", "road, route"),
        ("a--b---c", "a-{}-b-{}-{}-c", "a--b---c"),
        ("*a*", "{*}a*", r"\*a\*"),
        ('"a"', "''a''", '"a"'),
        ("é道", "e道", "é道"),
        ("R&amp;D :smile: 1:2", r"R\&amp;D :smile: 1:2", r"R\&amp;D \:smile: 1:2"),
    ],
)
def test_text_is_shown_as_it_is(text, tex, md):
    """Neither is a dash, a star behind the end of a row, an entity or a picture made of a name, nor
    is one lost.
    """
    assert latex.escaped(text) == tex
    assert markdown.escaped(text) == md


def test_markdown_around_any_text():
    """Code holds backticks, and a link leads to a file whose name has spaces and brackets."""
    facts = document.Facts((("Command", "a `b` ``c``"),), ("Command",))
    shell = document.Commands("all:", ("a ```b```",))
    shown = document.Plots((("bars_a (b) [c]", "<svg></svg>"),), "plots")
    report = document.Document("t", (), (document.Section("s", "s", (facts, shell, shown)),))
    text, files = markdown.text_and_pictures(report, "pictures")
    assert "- Command: ``` a `b` ``c`` ```" in text
    assert "\n````\na ```b```\n````" in text
    assert "](pictures/s_bars_a%20%28b%29%20%5Bc%5D.svg)" in text
    assert list(files) == ["s_bars_a (b) [c].svg"]


def test_same_folders_same_bytes(everything, tmp_path):
    """Written again, whatever the order of the folders, every file is the same to the byte, and an
    old picture is gone.
    """
    studies, out = everything
    (tmp_path / "report_pictures").mkdir()
    (tmp_path / "report_pictures" / "study9_old.svg").write_text("old")
    report.write([out.parent / name for name in sorted(studies)], tmp_path)

    def files(folder):
        return {
            str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()
        }

    assert files(tmp_path) == files(out)


def test_findings_follow_the_figures(everything):
    """The sentences name the group with the highest mean, its figure and the missing runs, and
    doubt what a single run says.
    """
    studies, out = everything
    text = (out / "report.md").read_text().replace("\\", "")
    best = max(
        (g for g in studies["pretraining"]["groups"] if g["n"]),
        key=lambda g: g["mean_unseen"]["mean"],
    )
    mean = best["mean_unseen"]
    assert (
        f"“{best['group']}”, {mean['mean']:.1f} mIoU (n = {mean['n']}, spread {mean['spread']:.1f})"
        in text
    )
    freezing = text[text.index("## Frozen blocks") : text.index("## Corrupted")]
    assert "of single runs, so it may be chance" in freezing
    titles = re.findall(r"^## (.*)$", text, re.MULTILINE)
    order = [
        "Pre-training",
        "Frozen blocks",
        "Methods",
        "Corrupted images",
        "From one domain to others",
        "Seeds",
        "Sources of published figures",
    ]
    assert [title.split(":")[0] for title in titles] == order


def test_commands_seeds_versions_and_protocol_are_in_the_report(everything):
    """Whoever reads it can run it again: every command as typed, the seeds, the versions and the
    protocol.
    """
    studies, out = everything
    md = (out / "report.md").read_text()
    for study in studies.values():
        assert f"`{study['command']}`" in md
        for run in study["runs"]:
            assert f"\n{run['command']}\n" in md
    assert "- Seeds: 0, 1, 2" in md
    assert "- Protocol: native" in md
    assert "jax 0.10.2" in md


def test_command(tmp_path):
    """The verb takes folders and --out in any order, and says in one line what is wrong with a
    folder.
    """
    write_study(tmp_path / "s", "seeds")
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).resolve().parents[2])}

    def call(*arguments):
        return subprocess.run(
            [sys.executable, "-m", "jaxdg.studies.report", *arguments],
            capture_output=True,
            text=True,
            env=environment,
            cwd=tmp_path,
        )

    done = call("s", "--out", "here")
    assert done.returncode == 0, done.stderr
    assert sorted(p.name for p in (tmp_path / "here").iterdir()) == [
        "report.html",
        "report.md",
        "report_pictures",
        "tables.tex",
    ]
    failed = call("nowhere")
    assert failed.returncode == 1
    assert (
        failed.stderr
        == "error: nowhere holds neither study.json nor config.json; give the folder of a study or"
        " of a run (its --workdir)\n"
    )


def test_what_is_no_study_is_refused(tmp_path):
    """A broken or foreign study.json is named, with what it lacks."""
    (tmp_path / "study.json").write_text("{")
    with pytest.raises(ValueError, match=r"study\.json is not JSON"):
        study_json.load(tmp_path)
    (tmp_path / "study.json").write_text('{"study": "seeds"}')
    with pytest.raises(ValueError, match="lacks command, config, groups"):
        study_json.load(tmp_path)
    content = write_study(tmp_path, "seeds")
    (tmp_path / "study.json").write_text(json.dumps(content | {"study": "other"}))
    with pytest.raises(ValueError, match="is of a study 'other'; allowed: pretraining"):
        study_json.load(tmp_path)


def test_scores_on_images_trained_on_are_marked_everywhere(tmp_path):
    """A dagger at the score, and how many of how many in notes and captions; a domain without truth
    says so.
    """
    for name in ("transfer", "pretraining", "corruptions"):
        study = write_study(tmp_path / name, name, seeds=(0,))
        for run in study["runs"]:
            domains = run["results"]["domains"]
            for entry in domains.values():
                entry |= {"trained_on": 0, "classes": len(CAMVID.names), "without_truth": []}
            domains["day"] |= {"seen": True, "trained_on": 10}
            domains["dusk"] |= {
                "mIoU": None,
                "IoU": dict.fromkeys(CAMVID.names),
                "without_truth": list(CAMVID.names),
                "classes": 0,
            }
        for group in study["groups"]:
            group |= summary([r for r in study["runs"] if r["group"] == group["group"]], "mIoU")
        (tmp_path / name / "study.json").write_text(json.dumps(study))
    report.write(
        [tmp_path / name for name in ("transfer", "pretraining", "corruptions")], tmp_path / "out"
    )
    text = (tmp_path / "out" / "report.html").read_text()
    page = Reader(text)
    sections = re.split(r"<section", text)[1:]
    told = "day: judged on images it was trained on (10 of 30)"
    none = "dusk: no truth, so it has no score and is in no mean"
    scores = [
        t
        for t in page.tables
        if t[0][1:5]
        in (["n", "camvid", "day", "dusk"], ["n", "camvid (source)", "day (seen)", "dusk"])
    ]
    assert len(scores) == 2
    for table in scores:
        for row in table[1:]:
            assert row[3].endswith("†")
            assert "†" not in row[2]
            assert row[4] == "no truth"
    assert all("*†" in row[3] for row in next(t for t in scores if t[0][2] == "camvid")[1:])
    for section in sections[:3]:  # the last are references
        noted = re.findall(r'<p class="note">(.*?)</p>|<figcaption>(.*?)</figcaption>', section)
        assert sum(told in note + caption for note, caption in noted) >= 2
        assert any(none in note + caption for note, caption in noted)
    assert ">dusk, corrupted" not in text
    assert "of corruption (3)" in text
    assert not any("on dusk, mean over kinds" in section for section in sections)
    latex = (tmp_path / "out" / "tables.tex").read_text()
    assert r"$\dagger$" in latex
    assert latex.isascii()
    assert (
        "†day: judged on images it was trained on (10 of 30)."
        in (tmp_path / "out" / "report.md").read_text()
    )
