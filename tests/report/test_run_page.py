"""The page of a run says what the files of its workdir say, finished or not."""

import dataclasses
import json
from pathlib import Path
import re

import numpy as np
import pytest

from jaxdg import config as config_lib
from jaxdg.config import Config
from jaxdg.data.labels import CAMVID
from jaxdg.evaluation import mean_iou, results
from jaxdg.evaluation.average_precision import Curves
from jaxdg.evaluation.confusion import numbers, write_confusion
from jaxdg.report import run, run_page
from jaxdg.studies.report import report
from jaxdg.tasks import packed
from tests.report.reader import Reader

CLASSES = CAMVID.names
DOMAINS = {"day": True, "dusk": False, "night/far": False}  # and whether each is seen
SCORES = ("mIoU", "aAcc", "fwIoU", "mAcc", "mDice", "mFscore", "mPrecision", "mRecall")
STEPS = 900
EVERY = 10


def matrix(domain: str) -> np.ndarray:
    """Counts of a domain; nothing is of the last class."""
    counts = np.random.default_rng(len(domain)).integers(0, 500, (len(CLASSES), len(CLASSES)))
    counts += np.diag(np.full(len(CLASSES), 3000))
    counts[-1] = 0
    return counts


def write_scores(folder: Path, protocol: str, step: int) -> dict:
    """results.json and the matrices of some domains."""
    entries = {}
    folder.mkdir(parents=True, exist_ok=True)
    for name, seen in DOMAINS.items():
        counts = matrix(name)
        iou = 100 * mean_iou.iou(counts)
        entries[name] = {
            "mIoU": float(np.nanmean(iou)),
            "IoU": dict(zip(CLASSES, iou.tolist(), strict=True)),
            "images": 30,
            "subsets": {},
            "without_truth": [CLASSES[-1]],
            **numbers(counts, CLASSES),
            "seen": seen,
            "trained_on": 0,
            "part_of": None,
        }
        write_confusion(folder, name, CLASSES, counts)
    about = dict(task="segmentation", source="day", protocol=protocol, max_images=None, step=step)
    content = {**about, **results.figures(entries, "mIoU")}
    (folder / "results.json").write_text(json.dumps(content))
    return content


def write_images(folder: Path, domain: str, wrong: list[float]) -> None:
    """Pictures of one class and a share of wrong pixels each, with some without truth."""
    folder.mkdir(exist_ok=True)
    for i, share in enumerate(wrong):
        truth = np.full((50, 100), 1, np.uint8)
        truth[:10] = 255
        prediction = np.full((50, 100), 1, np.uint8)
        prediction[:, : round(100 * share)] = 2
        name = np.array(f"/data/{domain}/frame{i}.png")
        image = np.zeros((50, 100, 3), np.uint8)
        arrays = dict(image=image, truth=truth, prediction=prediction, name=name)
        np.savez(folder / f"{domain.replace('/', '_')}_{i}.npz", **arrays)


def write_run(folder: Path, steps: int = STEPS) -> dict:
    """A workdir after so many steps, started twice."""
    folder.mkdir()
    c = Config(steps=STEPS, batch_size=6, log_every=EVERY)
    c.data = dataclasses.replace(c.data, source="day", root="/data")
    config_lib.save(c, folder)
    rows = [
        {
            "step": step,
            "loss": 5.0 * 0.99**step + 0.01,
            "learning_rate": 1e-3 * (1 - step / STEPS),
            "seconds_per_step": 0.5,
            "images_per_second": 12.0,
            "cross_entropy": 4.0 * 0.99**step,
            "dice": 1.0 * 0.99**step + 0.01,
        }
        for step in range(EVERY, steps + 1, EVERY)
    ]
    rows += [{"step": 450, "domain": d, "mIoU": 30.0 + i} for i, d in enumerate(DOMAINS)]
    start = dict(
        event="start",
        command="python -m jaxdg.train --config x.py",
        host="node7",
        devices="2 x H200",
        cores=16,
        processes=1,
        versions={"jaxdg": "0.1.0", "jax": "0.10.2"},
    )
    history = [
        {**start, "step": 0, "time": "2026-11-30T10:00:00+00:00"},
        {"event": "end", "step": 450, "time": "2026-11-30T11:00:00+00:00"},
        {**start, "step": 450, "time": "2026-11-30T23:30:00+00:00"},
    ]
    content = {}
    if steps == STEPS:
        history.append({"event": "end", "step": STEPS, "time": "2026-12-01T00:35:00+00:00"})
        content = write_scores(folder, "native", STEPS)
        rows += [
            {"step": STEPS, "domain": d, "mIoU": e["mIoU"]} for d, e in content["domains"].items()
        ]
    for name, lines in (("metrics.jsonl", rows), ("history.jsonl", history)):
        (folder / name).write_text("".join(json.dumps(line) + "\n" for line in lines))
    return content


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The workdir of a finished run, what its results.json says, and its page."""
    folder = tmp_path_factory.mktemp("runs") / "streets <b>"
    content = write_run(folder)
    write_images(folder / "qualitative", "dusk", [0.2, 0.3])
    write_images(folder / "worst", "dusk", [0.9, 0.7, 0.5])
    write_images(folder / "worst", "night/far", [1.0])
    write_scores(folder / "evaluation_900_vltseg", "vltseg", STEPS)
    change = {"step": 450, "field": "optimizer.accumulate", "old": 1, "new": 2}
    (folder / "changes.jsonl").write_text(json.dumps(change) + "\n")
    written = run_page.write(folder)
    assert written[0] == folder / "report" / "report.html"
    return folder, content, written[0].read_text()


def table(page: str, heads: list[str]) -> list[list[str]]:
    """The rows of the first table whose heads begin so."""
    return next(t for t in Reader(page).tables if t[0][: len(heads)] == heads)[1:]


def printed(value: float | None) -> str:
    return run_page.NONE if value is None else f"{value:.1f}"


def test_scores_of_the_page_are_those_of_results_json(finished):
    """Every number of every domain and class, the mean and the gaps, read back from the page."""
    _, content, page = finished
    domains = content["domains"]
    assert table(page, ["", "mIoU"]) == [
        *(
            [f"{d} (source)" if d == "day" else d, *(printed(e[s]) for s in SCORES), "30"]
            for d, e in domains.items()
        ),
        ["mean unseen", printed(content["mean_unseen"]), *[""] * len(SCORES)],
    ]
    assert f"in % of the seen: {content['rPD']:.1f}." in page
    rows = table(page, ["", "day (source)", "dusk", "night/far", "gap"])
    for label, row in zip(CLASSES, rows, strict=True):
        gap = content["class_gap"][label]
        told = run_page.NONE if gap is None else f"{gap:+.1f}"
        assert row == [label, *(printed(e["IoU"][label]) for e in domains.values()), told]
    lost = max((gap, label) for label, gap in content["class_gap"].items() if gap is not None)
    assert f"in points of IoU: {lost[1]} {lost[0]:.1f}," in page


def test_confusions_are_shares_of_the_true_pixels(finished):
    """Each row of a matrix in % of its class, and the largest of them in words."""
    _, _, page = finished
    tables = [t for t in Reader(page).tables if t[0][1:2] == ["of all pixels"]]
    assert len(tables) == 2 * len(DOMAINS)  # of the run, and of the other protocol
    for domain, rows in zip(DOMAINS, tables, strict=False):
        counts = matrix(domain)
        for i, row in enumerate(rows[1:]):
            shares = [100 * n / max(counts[i].sum(), 1) for n in counts[i]]
            expected = [f"{v:.0f}" if v >= 0.5 else "" for v in shares]
            assert row == [CLASSES[i], f"{100 * counts[i].sum() / counts.sum():.1f}", *expected]
        wrong = {
            (CLASSES[i], CLASSES[j]): 100 * counts[i, j] / max(counts[i].sum(), 1)
            for i, j in np.ndindex(counts.shape)
            if i != j
        }
        (truth, found), share = max(wrong.items(), key=lambda item: item[1])
        assert (
            f"On {domain} most often taken for another: {truth} for {found} ({share:.0f} %)" in page
        )


def test_the_worst_images_come_first(finished):
    """Of each domain the worst in their order, then those evenly spread, each with the share of
    right pixels among those with truth and its name.
    """
    _, _, page = finished
    told = re.findall(r"<figcaption>prediction: (\d+) % of pixels right</figcaption>", page)
    assert told == ["10", "30", "50", "80", "70", "0"]
    captions = re.findall(r'class="above">((?:Worst i|I)mages of [^.]*)\.', page)
    assert captions == [
        "Worst images of dusk (unseen)",
        "Images of dusk (unseen)",
        "Worst images of night/far (unseen)",
    ]
    assert "<figcaption>image frame0.png</figcaption>" in page


def test_what_was_run_is_told(finished):
    """Times are added up over both starts; settings are those that differ from the defaults."""
    _, _, page = finished
    facts = dict(re.findall(r"<dt>(.*?)</dt><dd>(?:<code>)?(.*?)(?:</code>)?</dd>", page))
    assert facts["Time in training steps"] == "7 min 30 s"  # 900 steps of half a second
    assert facts["Time in all"].startswith("2 h 05 min,")
    assert facts["Gone on"] == "at step 450"
    assert facts["Machine"] == "node7: 2 x H200, 16 cores"
    assert facts["Versions"] == "jaxdg 0.1.0, jax 0.10.2"
    assert facts["Command"] == "python -m jaxdg.train --config x.py"
    default = Config()
    settings = {row[0]: row[1:] for row in table(page, ["field", "value", "default"])}
    assert settings.pop("data.root") == ["/data", ""]  # by default that of each machine
    assert settings == {
        "steps": ["900", str(default.steps)],
        "batch_size": ["6", str(default.batch_size)],
        **({"log_every": ["10", str(default.log_every)]} if default.log_every != EVERY else {}),
        "data.source": ["day", default.data.source],
    }
    assert table(page, ["field", "from step"]) == [["optimizer.accumulate", "450", "1", "2"]]


def test_curves_and_sections(finished):
    """Curves of the loss with its terms, of the rates and of the scores; an evaluation by another
    protocol has a section of its own.
    """
    _, _, page = finished
    titles = re.findall(r'aria-label="([^"]*)"', page)
    for title in (
        "Domains. mIoU in %",
        "Scores. mIoU in % by step",
        "Loss. logarithmic by step",
        "Learning rate by step",
        "Images a second by step",
    ):
        assert title in titles
    loss = page[page.index('aria-label="Loss') :].split("</svg>")[0]
    assert {"loss", "cross entropy", "dice"} <= set(re.findall(r">([a-z ]+)</text>", loss))
    assert re.findall(r"<h2>(.*?)</h2>", page) == [
        "Scores",
        "Pictures",
        "What is taken for what",
        "Judged again: evaluation_900_vltseg",
        "Training",
        "What was run",
    ]


def test_page_is_well_formed_and_alone(finished):
    """Every element is closed, names are escaped, links lead somewhere, nothing is loaded from
    elsewhere; written again it is the same to the byte.
    """
    folder, _, page = finished
    reader = Reader(page)
    assert reader.open == []
    assert len(set(reader.ids)) == len(reader.ids)
    assert all(link[1:] in reader.ids for link in reader.links)
    assert all(source.startswith("data:image/") for source in reader.loaded)
    assert "<h1>Run streets &lt;b&gt;</h1>" in page
    first = {f: f.read_bytes() for f in (folder / "report").rglob("*") if f.is_file()}
    run_page.write(folder)
    assert {f: f.read_bytes() for f in (folder / "report").rglob("*") if f.is_file()} == first


def test_a_run_that_trains_has_a_page(tmp_path):
    """Before its first row, and in the middle: no score is claimed, and a killed start has no
    length.
    """
    write_run(tmp_path / "run", steps=0)
    page = report.write([tmp_path / "run"], tmp_path / "out")[0].read_text()
    assert "not judged on any domain yet" in page
    assert "No step is logged yet" in page
    (tmp_path / "run" / "metrics.jsonl").unlink()
    (tmp_path / "run" / "history.jsonl").unlink()
    write_run(tmp_path / "other", steps=500)
    page = report.write([tmp_path / "other"], tmp_path / "out")[0].read_text()
    assert "500 of 900 steps, and not finished" in page
    assert "Time in all" not in page
    assert "Time in training steps</dt><dd>4 min 10 s" in page
    assert run.read(tmp_path / "run").step == 0


def test_reliability_and_a_packed_model(tmp_path):
    """Bins are drawn where they have pixels; a packed model shows its scores and its card, and
    nothing of the folder that it lies in.
    """
    content = write_scores(tmp_path, "native", STEPS)
    bins = {"pixels": [5, 0, 7], "confidence": [20.0, None, 90.0], "accuracy": [10.0, None, 80.0]}
    for entry in content["domains"].values():
        entry |= {"ECE": 10.0, "reliability": bins}
    model = packed.Packed(
        config=Config(),
        labels=CAMVID,
        step=STEPS,
        segment_ends=(),
        frozen=frozenset(),
        trained_on=None,
        results=(content,),
        card={"encoder": "x", "versions": {"jax": "0.10.2"}, "scores": []},
    )
    packed.write(tmp_path / "m.safetensors", model, {"a": np.zeros(2, np.float32)})
    write_images(tmp_path / "worst", "dusk", [0.5])
    page = run_page.write(tmp_path / "m.safetensors")[0]
    assert page == tmp_path / "m_report" / "report.html"
    text = page.read_text()
    svg = text[text.index('aria-label="Reliability') :].split("</svg>")[0]
    assert re.findall(r"<title>dusk, ([^<]*)</title>", svg) == [
        "mean confidence in % 20: 10.0",
        "mean confidence in % 90: 80.0",
    ]
    assert table(text, ["", "mIoU"])[0][1:] == [
        *(printed(content["domains"]["day"][s]) for s in SCORES),
        "10.0",
        "30",
    ]
    assert "<dt>versions: jax</dt><dd>0.10.2</dd>" in text
    assert re.findall(r"<h2>(.*?)</h2>", text) == ["Scores", "What was run"]


def test_nothing_is_said_of_domains_without_truth(tmp_path):
    """Where no domain has truth there is a page without a score; of one unseen domain there is no
    average.
    """
    write_run(tmp_path / "run")
    content = json.loads((tmp_path / "run" / "results.json").read_text())
    entry = {
        **content["domains"]["dusk"],
        "mIoU": None,
        "IoU": dict.fromkeys(CLASSES),
        "aAcc": None,
        "without_truth": list(CLASSES),
    }
    for domains, told in (
        ({"dusk": entry}, "No domain that was judged has truth (step 900,"),
        (
            {name: content["domains"][name] for name in ("day", "dusk")},
            " on dusk, which it never saw, ",
        ),
    ):
        figures = results.figures(domains, "mIoU")
        (tmp_path / "run" / "results.json").write_text(json.dumps({**content, **figures}))
        page = run_page.write(tmp_path / "run")[0].read_text()
        assert told in page
        assert table(page, ["", "mIoU"])[0][0] == ("day (source)" if len(domains) > 1 else "dusk")
    assert "hardest" not in page


def test_precision_is_the_mean_over_classes_with_truth(tmp_path):
    """Of three classes the one without truth has no curve and does not count."""
    precision = np.full((3, 2, 101), np.nan)
    precision[:2, 0] = [[1.0], [0.5]]
    precision[:2, 1] = 0.0
    nothing = np.zeros(0)
    Curves(
        classes=np.array(["a", "b", "c"]),
        detection_class=nothing.astype(np.int64),
        score=nothing,
        recall=nothing,
        precision=nothing,
        coco_iou=np.array([0.5, 0.55]),
        coco_recall=np.linspace(0, 1, 101),
        coco_precision=precision,
        coco_score=precision,
    ).write(tmp_path, "day")
    curves = Curves.read(tmp_path, "day")
    assert curves is not None
    lines = run_page._precisions(curves)
    assert [line.label for line in lines] == ["a", "b"]
    assert [{p.y for p in line.points} for line in lines] == [{100.0}, {50.0}]
    points = run_page._mean(lines)
    assert [p.y for p in points] == [75.0] * 101
    assert (points[0].x, points[-1].x) == (0.0, 100.0)


def test_many_rows_become_means_of_equal_parts(tmp_path):
    """A curve of 3 000 rows has 300 points, each the mean of ten rows at the last of them."""
    rows = [{"step": 5 * (i + 1), "loss": float(i)} for i in range(3000)]
    line = run_page._curve("loss", rows, 10)
    assert len(line.points) == 300
    assert [(p.x, p.y) for p in line.points[:2]] == [(50, 4.5), (100, 14.5)]


def test_two_runs_are_refused(tmp_path):
    """A report of two runs says what to do; a folder of neither kind is named."""
    for name in "ab":
        write_run(tmp_path / name)
    with pytest.raises(ValueError, match="one run or several studies"):
        report.write([tmp_path / "a", tmp_path / "b"], tmp_path / "out")
    with pytest.raises(FileNotFoundError, match=r"neither study\.json nor config\.json"):
        report.write([tmp_path], tmp_path / "out")
