"""What is said beside scores: of images trained on, of domains without truth, of classes that
differ; and of older results nothing new.
"""

import io
import json
from pathlib import Path

import pytest
from rich.console import Console

from jaxdg.commands import command_line as cli
from jaxdg.config import EvaluationConfig
from jaxdg.evaluate import own_folder, write_results
from jaxdg.evaluation import results
from jaxdg.evaluation.printing import print_protocols, print_results

CLASSES = ("road", "car", "train")


def entry(score, seen=False, trained=0, lacks=(), part=None, iou=None) -> dict:
    """A domain of 171 images in results.json."""
    iou = {name: None if name in lacks else score for name in CLASSES} | (iou or {})
    known = [v for v in iou.values() if v is not None]
    return {
        "mIoU": score,
        "IoU": iou,
        "images": 171,
        "subsets": {},
        "classes": len(known),
        "without_truth": list(lacks),
        "seen": seen,
        "trained_on": trained,
        "part_of": part,
    }


def everything(domains: dict, **changes) -> dict:
    """The contents of results.json."""
    differ = results.classes_differ(
        {name: e for name, e in domains.items() if e["mIoU"] is not None}
    )
    common = {
        "task": "segmentation",
        "source": "camvid_day",
        "protocol": "native",
        "max_images": None,
        "step": 3,
        "seen_by": "images",
    }
    return {
        **common,
        "domains": domains,
        "mean_unseen": 40.0,
        "rPD": 80.0,
        "classes_differ": differ,
        **changes,
    }


def printed(contents: dict) -> str:
    """The table and what is below it."""
    console = Console(record=True, width=200, file=io.StringIO())
    print_results(contents, console)
    return console.export_text()


DOMAINS = {
    "camvid_day": entry(50.0, seen=True),
    "day": entry(60.0, seen=True, trained=100),
    "dusk": entry(40.0, lacks=("train",)),
    "fog": entry(44.0, lacks=("train", "car"), iou={"car": 0.0}),
    "test": entry(None, lacks=CLASSES),
}


def test_remarks():
    """Each thing that falsifies a reading is one line that names the domain; of clean results there
    is none.
    """
    assert results.remarks(everything(DOMAINS)) == [
        "day: judged on images it was trained on (100 of 171)",
        "test: no truth, so it has no score and is in no mean",
        (
            "fog: car predicted but without truth; counted as 0 in its mean, as the official"
            " evaluation of Cityscapes does"
        ),
        (
            "the mean of unseen domains and rPD compare different classes: train without truth in"
            " dusk, fog; car without truth in fog"
        ),
    ]
    clean = {
        "camvid_day": entry(50.0, seen=True, lacks=("train",)),
        "dusk": entry(40.0, lacks=("train",)),
    }
    assert results.remarks(everything(clean)) == []
    assert results.remarks(everything(clean, seen_by="names")) == [
        "whether a domain was trained on was told by its name alone"
    ]


def test_the_table_says_it_beside_the_scores():
    """Heads tell source from seen, a domain without truth has no number, and rows count classes and
    images trained on.
    """
    text = printed(everything(DOMAINS))
    rows = {
        line.split("│")[1].strip(): [cell.strip() for cell in line.split("│")[2:-1]]
        for line in text.splitlines()
        if "│" in line
    }
    head = next(line for line in text.splitlines() if "class" in line and "camvid_day" in line)
    assert [cell.strip() for cell in head.split("┃")[2:-1]] == [
        "camvid_day (source)",
        "day (seen)",
        "dusk",
        "fog",
        "test",
    ]
    assert rows["mIoU"] == ["50.0", "60.0", "40.0", "44.0", "no truth"]
    assert rows["classes counted"] == ["3", "3", "2", "2", "0"]
    assert rows["images trained on"] == ["0", "100 of 171", "0", "0", "0"]
    for line in results.remarks(everything(DOMAINS)):
        assert line in text


def test_results_of_older_versions_open():
    """Without the newer entries a table says what it always said."""
    new = ("classes", "without_truth", "trained_on")
    old = everything(
        {name: {k: v for k, v in e.items() if k not in new} for name, e in clean_domains().items()},
        classes_differ={},
    )
    text = printed(
        {key: value for key, value in old.items() if key not in ("seen_by", "classes_differ")}
    )
    assert "camvid_day (source)" in text
    assert "40.0" in text
    assert not any(word in text for word in ("trained on (", "counted", "truth", "told"))
    assert results.remarks_of({"a": [old]}) == []


def clean_domains() -> dict:
    """Nothing to remark."""
    return {"camvid_day": entry(50.0, seen=True), "dusk": entry(40.0)}


def test_remarks_of_groups_name_those_that_they_are_about():
    """A remark of all groups stands once, others name their groups; without runs there is none."""
    a = everything(DOMAINS)
    b = everything({**DOMAINS, "day": entry(60.0)})
    said = results.remarks_of({"from day": [a, a], "from dusk": [b], "from fog": []})
    assert said[0] == "from day: day: judged on images it was trained on (100 of 171)"
    assert said[1] == "test: no truth, so it has no score and is in no mean"
    assert len(said) == len(results.remarks(a))


def test_the_reference_is_judged_on_no_image_trained_on():
    """Seen domains that were not trained on count alone where there are such; parts never; entries
    of older versions as they were.
    """

    def one(seen, trained=0, part=None):
        return {"seen": seen, "trained_on": trained, "part_of": part}

    assert results.reference(
        {"a": one(True), "b": one(True, 5), "c": one(False), "d": one(True, 0, "a")}
    ) == ["a"]
    assert results.reference({"b": one(True, 5), "c": one(False)}) == ["b"]
    assert results.reference(
        {"a": {"seen": True, "part_of": None}, "b": {"seen": True, "part_of": None}}
    ) == ["a", "b"]


@pytest.mark.parametrize(
    ("name", "source", "seen", "expected"),
    [("a", "a+b", True, " (source)"), ("c", "a+b", True, " (seen)"), ("c", "a", False, "")],
)
def test_marks(name, source, seen, expected):
    """The source is called so, what is seen for another reason otherwise."""
    assert results.mark(name, {"seen": seen}, source) == expected


def test_names_are_no_markup(capsys):
    """Markup, emoji codes and signs in the names of classes and domains are printed as they are, in
    heads, rows, titles and remarks.
    """
    names = ("road, route", "[red]a/b[/red]", "50 % :smile: [/x]")
    domain = "town [b], c"
    of = {domain: {**entry(50.0, seen=True, trained=3), "IoU": dict.fromkeys(names, 50.0)}}
    print_results(everything(of, source=domain), cli.console())
    shown = capsys.readouterr().out
    assert f"trained on {domain}, protocol" in shown
    for name in (*names, domain):
        assert f" {name} " in shown, shown


def judged(domains: dict, **changes) -> dict:
    """The contents of results.json as they are written."""
    return everything(domains, model="0a", **changes) | results.figures(domains, "mIoU")


def test_a_second_evaluation_keeps_the_domains_of_the_first(tmp_path):
    """Judged on other domains, both are there and the means are those of all; judged on the same,
    the newer counts.
    """
    write_results(judged({"day": entry(60.0, seen=True), "dusk": entry(40.0)}), {}, tmp_path)
    returned = write_results(
        judged({"fog": entry(20.0), "day": entry(80.0, seen=True)}), {}, tmp_path
    )
    kept = json.loads((tmp_path / "results.json").read_text())
    assert returned == kept
    assert {name: e["mIoU"] for name, e in kept["domains"].items()} == {
        "day": 80.0,
        "dusk": 40.0,
        "fog": 20.0,
    }
    assert (kept["mean_unseen"], kept["rPD"]) == (30.0, 37.5)
    assert [path.name for path in tmp_path.iterdir()] == ["results.json"]


def test_a_part_judged_again_alone_stays_a_part(tmp_path):
    """acdc/night after acdc does not enter the mean beside the whole it lies in; before it, the
    whole's evaluation says so.
    """
    parts = {"acdc": entry(40.0), "acdc/night": entry(30.0, part="acdc")}
    for order in ([parts, {"acdc/night": entry(30.0)}], [{"acdc/night": entry(30.0)}, parts]):
        folder = tmp_path / str(len(list(tmp_path.iterdir())))
        for domains in order:
            write_results(judged(domains), {}, folder)
        kept = json.loads((folder / "results.json").read_text())
        assert kept["domains"]["acdc/night"]["part_of"] == "acdc"
        assert kept["mean_unseen"] == 40.0


@pytest.mark.parametrize(
    "change",
    [
        {"protocol": "rein"},
        {"max_images": 9},
        {"step": 4},
        {"source": "gta5"},
        {"task": "detection"},
        {"model": "0b"},
    ],
    ids=str,
)
def test_results_of_other_meaning_are_foreign(change):
    """Another protocol, number of images, step, source, task or model is named; what an older
    version did not write is no difference.
    """
    old = judged({"dusk": entry(40.0)})
    ((key, value),) = change.items()
    assert results.foreign(old, {**old, **change}) == [f"{key}: {old[key]!r} there, {value!r} now"]
    assert results.foreign({k: v for k, v in old.items() if k != key}, {**old, **change}) == []
    assert results.foreign(old, old) == []


def test_a_protocol_of_its_own_has_a_folder_of_its_own():
    """What is judged otherwise than the run judges itself does not meet its results."""
    run = EvaluationConfig(protocol="native", max_images=0)

    def folder(**asked):
        return own_folder(
            Path("run"), 5, run, EvaluationConfig(**{"protocol": "native", "max_images": 0} | asked)
        ).name

    assert folder() == folder(domains=("fog",), batch_size=1) == "evaluation_5"
    assert folder(protocol="rein") == "evaluation_5_rein"
    assert folder(max_images=9) == "evaluation_5_9_images"
    assert (
        own_folder(Path("run"), 5, EvaluationConfig(protocol="rein", max_images=9), run).name
        == "evaluation_5_native_all_images"
    )


def test_several_protocols_are_rows_of_one_table():
    """A row each with its scores, means and rPD; a remark that holds for one alone names it."""
    domains = {name: DOMAINS[name] for name in ("camvid_day", "day", "dusk")}
    one = everything(domains, protocol="rein")
    other = {"camvid_day": domains["camvid_day"], "dusk": entry(43.21)}
    console = Console(record=True, width=200, file=io.StringIO())
    print_protocols([one, everything(other, protocol="soma", mean_unseen=43.21, rPD=None)], console)
    text = console.export_text()
    rows = {
        cells[0]: cells[1:]
        for line in text.splitlines()
        if len(cells := [cell.strip() for cell in line.strip("│┃").split("│")]) > 3
    }
    assert rows["rein"] == ["50.0", "60.0", "40.0", "40.0", "80.0"]
    assert rows["soma"] == ["50.0", "-", "43.2", "43.2", "-"]
    assert "camvid_day (source)" in text
    assert "rein: day: judged on images it was trained on (100 of 171)" in text


def test_broken_results_are_written_anew(tmp_path):
    """What a crash left there is no obstacle and nothing of it is kept."""
    (tmp_path / "results.json").write_bytes(b"")
    write_results(judged({"dusk": entry(40.0)}), {}, tmp_path)
    assert json.loads((tmp_path / "results.json").read_text())["mean_unseen"] == 40.0
