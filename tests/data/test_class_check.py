"""Labels are checked before a run: ids without a class, single classes, missing classes."""

import json
import os
from pathlib import Path
import re
import shutil
import subprocess
import sys
from typing import Any

import numpy as np
import pytest

from jaxdg.data import class_check, class_counts
from jaxdg.data.boxes import BoxOptions, open_boxes
from jaxdg.data.class_check import before_training
from jaxdg.data.class_counts import count, look, truth_ids
from jaxdg.data.datasets import Dataset, FolderOptions, StreetsOptions, Subset
from jaxdg.data.domains import open_domain
from tests.data import trees

BINARY = ("background", "crack")


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """Each test has an index folder of its own."""
    monkeypatch.setenv("JAXDG_CACHE", str(tmp_path / "cache"))


def write(root: Path, domain: str, maps: list[list[int]], archive: str = "") -> None:
    """Writes images, and label maps of 200 pixels.

    The first 20 show the given ids in turn, all others the first id.
    """
    for i, ids in enumerate(maps):
        label = np.resize(ids, 200)
        label[20:] = ids[0]
        label = label.reshape(10, 20).astype(np.uint8)
        inside = f"{archive}.zip" if archive else ""
        trees.write(
            root,
            f"{domain}/images/{i:04}.png",
            trees.encode(np.zeros((10, 20, 3), np.uint8), "PNG"),
            inside,
        )
        trees.write(root, f"{domain}/labels/{i:04}.png", trees.grey(label), inside)


def folder(archive: str = "", **options) -> FolderOptions:
    place = f"{archive}.zip/" if archive else ""
    return FolderOptions(f"{place}{{domain}}/images", f"{place}{{domain}}/labels", **options)


def opened(root: Path, domain: str, **options) -> Any:
    return open_domain(
        domain,
        root=str(root),
        train=True,
        streets=StreetsOptions(images=2),
        folder=folder(**options),
    )


def said(source: Dataset, **domains: Dataset) -> list[str]:
    lines = []
    before_training(source, domains, lambda line: lines.append(line.plain))
    return lines


MASK = {"maps": [[0, 255]] * 3, "domain": "walls"}
SHOWN = "ids in the label files of walls: 0 95.0 % (background), 255 5.0 % (ignored)"
WAY = 'if 255 marks crack, set classes=("background", "crack"), id_map={255: 1} in data.folder'


@pytest.mark.parametrize("archive", ["", "masks"], ids=["folder", "zip"])
def test_a_mask_of_0_and_255_is_refused_and_the_way_it_shows_works(tmp_path, archive):
    """The message has the shares of the ids and the documented settings, which then work."""
    write(tmp_path, archive=archive, **MASK)
    only = (
        "only background occurs in the labels of walls, in all 3 images: .*;"
        f" {re.escape(f'{SHOWN}; {WAY}')}$"
    )
    with pytest.raises(ValueError, match=only):
        said(opened(tmp_path, "walls", classes=BINARY, archive=archive))
    single = (
        "walls has the single class crack, and .*;"
        f" {re.escape(SHOWN.replace('background', 'crack'))}; {re.escape(WAY)}$"
    )
    with pytest.raises(ValueError, match=single):
        said(opened(tmp_path, "walls", classes=("crack",), archive=archive))
    dataset = opened(tmp_path, "walls", classes=BINARY, id_map={255: 1}, archive=archive)
    assert said(dataset, walls=dataset) == []
    np.testing.assert_array_equal(
        np.unique(dataset[0]["label"], return_counts=True), [[0, 1], [190, 10]]
    )


@pytest.mark.parametrize(
    ("maps", "options", "message"),
    [
        (
            [[0], [0]],
            {"classes": BINARY},
            "only background occurs in the labels of walls, in all 2 images",
        ),
        (
            [[0, 1]],
            {"classes": ("crack",)},
            (
                r"ids .*: 0 .*, 1 5\.0 % \(no class\); if 1 marks crack, set"
                r' classes=\("background", "crack"\)'
            ),
        ),
        (
            [[0, 1]],
            {"classes": BINARY, "id_map": {0: 255, 1: 255}},
            r"no label of walls shows a class, .*0 95.0 % \(ignored\), 1 ",
        ),
        ([[0, 1]], {"classes": BINARY, "id_map": {0: 0, 1: 0}}, "only background occurs"),
        (
            [[255]],
            {"classes": ("a", "b", "c")},
            r"no label of walls shows a class, in all 1 image; ids .*: 255 100\.0 % \(ignored\)$",
        ),
        (
            [[0, 0, 128, 255]],
            {"classes": BINARY},
            r"0000\.png: 5 pixels have label ids .*128; .*0 .*, 128 2\.5 % \(no class\)",
        ),
    ],
)
def test_what_nothing_can_be_learnt_from_ends_a_run(tmp_path, maps, options, message):
    """One class, no class, and ids without a class are errors that name the ids in the files."""
    write(tmp_path, "walls", maps)
    with pytest.raises(ValueError, match=message):
        said(opened(tmp_path, "walls", **options))


def test_a_class_that_never_occurs_is_a_warning_with_what_was_seen(tmp_path):
    """The warning names the class, the number of images, and an id map that leaves it out."""
    write(tmp_path, "walls", [[0, 1]] * 4)
    (line,) = said(opened(tmp_path, "walls", classes=("a", "b", "c")))
    assert line.startswith(
        "warning: c never occurs in walls, in all 4 images: a model cannot learn what it never"
        " sees; ids in the label files"
    )
    assert "0 95.0 % (a), 1 5.0 % (b)" in line
    (line,) = said(opened(tmp_path, "walls", classes=("a", "b", "c"), id_map={0: 0, 1: 2}))
    assert line.startswith("warning: b never occurs")
    assert line.endswith("; data.folder.id_map maps no id to b")


def test_looking_stops_when_every_class_was_seen_and_doubts_end_only_with_the_last_label(
    tmp_path, monkeypatch
):
    """16 of 200 images are enough if they show all classes; all are read if they show one.

    A rare class in the last images is found.
    """
    read = []
    monkeypatch.setattr(
        class_counts, "truth_ids", lambda dataset, i: read.append(i) or truth_ids(dataset, i)
    )
    write(tmp_path, "walls", [[0, 1]] * 200)
    said(opened(tmp_path, "walls", classes=BINARY))
    assert len(read) == 16
    assert {0, 199} <= set(read)
    monkeypatch.setattr(class_check, "MOST", 20)
    write(tmp_path, "rare", [[0]] * 30 + [[0, 1]] + [[0]] * 9)
    read.clear()
    (line,) = said(opened(tmp_path, "rare", classes=BINARY))
    assert line.startswith("rare: no more than one class so far; looks at the other 20 labels")
    assert set(read) == set(range(40))
    (line,) = said(opened(tmp_path, "walls", classes=("a", "b", "c")))
    assert "c never occurs in walls, in 20 of 200 images looked at" in line


def age(folder: Path) -> None:
    """Moves times back, because files that changed within two seconds are not cached."""
    for path in [folder, *folder.rglob("*")]:
        os.utime(path, ns=(10**18, 10**18))


def test_the_second_start_reads_no_label_and_a_corrected_one_is_seen(tmp_path, monkeypatch):
    """An outcome is kept as long as the label files that were looked at do not change."""
    write(tmp_path / "d", "walls", [[0, 1]] * 3)
    age(tmp_path / "d")
    options = {"classes": ("a", "b", "c")}
    first = said(opened(tmp_path / "d", "walls", **options))
    monkeypatch.setattr(class_counts, "_Read", None)
    assert said(opened(tmp_path / "d", "walls", **options)) == first
    monkeypatch.undo()
    monkeypatch.setenv("JAXDG_CACHE", str(tmp_path / "cache"))
    path = tmp_path / "d/walls/labels/0001.png"
    path.write_bytes(trees.grey(np.tile(np.array([0, 2], np.uint8), (10, 10))))
    assert said(opened(tmp_path / "d", "walls", **options)) == []


def test_domains_are_held_against_the_source(tmp_path):
    """Before the first step there are lines about domains that differ from the source.

    They have one class, no label, an id without a class, an extra class, or lack one.
    """
    for name, ids in {
        "walls": [0, 1],
        "flat": [0],
        "void": [255],
        "rich": [0, 1, 2],
        "poor": [1, 2],
        "odd": [0, 9],
    }.items():
        write(tmp_path, name, [ids] * 3)
    options = {"classes": ("a", "b", "c")}

    def domain(name):
        return {name: opened(tmp_path, name, **options)}

    lines = said(
        opened(tmp_path, "walls", **options),
        **domain("flat"),
        **domain("void"),
        **domain("rich"),
        **domain("poor"),
    )[1:]
    assert lines[0].startswith(
        "warning: only a occurs in flat, in all 3 images, so that its mIoU says nothing; ids in"
    )
    assert lines[1].startswith(
        "warning: void has nothing to judge by in all 3 images; ids in the label files of void: 255"
        " 100.0 % (ignored)"
    )
    assert lines[2:] == [
        (
            "warning: rich has c, of which walls shows none: the IoU there counts in its mean all"
            " the same"
        ),
        (
            "warning: poor has c, of which walls shows none: the IoU there counts in its mean all"
            " the same"
        ),
        (
            "note: a not seen in poor, in all 3 images: what a domain lacks stays out of its mean, "
            "unless the model predicts it there, which counts as 0"
        ),
    ]
    with pytest.raises(ValueError, match=r"odd/labels/0000\.png: .*9"):
        said(opened(tmp_path, "walls", **options), **domain("odd"))


def test_a_mixture_is_judged_as_a_whole_and_named_by_part(tmp_path):
    """A class may come from any part; streets have all; subsets use the tables of their parts."""
    write(tmp_path, "one", [[0, 1]] * 2)
    write(tmp_path, "two", [[0, 2]] * 2)
    options = {"classes": ("a", "b", "c")}
    assert said(opened(tmp_path, "one+two", **options)) == []
    lines = said(
        opened(tmp_path, "one", **options),
        **{"one+two": Subset(opened(tmp_path, "one+two", **options), 3)},
    )
    assert lines[0].startswith("warning: c never occurs in one")
    assert lines[1:] == [
        "warning: one+two has c, of which one shows none: the IoU there counts in its mean all the"
        " same"
    ]
    write(tmp_path, "void", [[255]])
    (line,) = said(opened(tmp_path, "one+two+void", **options))
    assert line.startswith("warning: void shows no class at all in all 1 image")
    write(tmp_path, "more", [[1]])
    (line,) = said(opened(tmp_path, "one+more", **options))
    assert "c never occurs in one+more, in all 3 images" in line
    assert "; ids in the label files of one: 0 " in line
    assert "; ids in the label files of more: 1 100.0 % (b)" in line
    cityscapes = open_domain(
        "one+clear",
        root=str(tmp_path),
        train=True,
        streets=StreetsOptions(images=2),
        folder=folder(),
    )
    assert said(cityscapes) == []


def test_what_synthia_is_known_to_lack_is_a_note(tmp_path):
    """A class that the publisher never labelled gives a short note, another one a warning."""
    items = trees.make("synthia", tmp_path, np.random.default_rng(0))
    for gone, begins in (
        ((), None),
        ((16, 18, 20), "note: synthia has no terrain, truck, train, as published"),
        ((3, 16), "warning: road, terrain"),
    ):
        shutil.rmtree(tmp_path / "cache", ignore_errors=True)
        for item in items:
            Path(item.label).write_bytes(
                trees.red(np.where(np.isin(item.ids, gone), 0, item.ids).astype(np.uint16))
            )
        lines = said(
            open_domain(
                "synthia", root=str(tmp_path), train=True, streets=StreetsOptions(), folder=None
            )
        )
        assert [line[: len(begins or "")] for line in lines] == ([begins] if begins else [])


def test_images_without_labels_are_no_source(tmp_path):
    """Cityscapes' test images have no label files."""
    trees.make("cityscapes", tmp_path, np.random.default_rng(0))
    with pytest.raises(
        ValueError,
        match=(
            "no label of cityscapes/test shows a class, in all 2 images; cityscapes/test has no"
            " label files"
        ),
    ):
        said(
            open_domain(
                "cityscapes/test",
                root=str(tmp_path),
                train=True,
                streets=StreetsOptions(),
                folder=None,
            )
        )


def coco(
    root: Path, name: str, boxes: list[tuple[int, int]], classes: tuple[str, ...] = ("car", "bus")
) -> Dataset:
    """Writes an image with boxes of (class, crowd)."""
    trees.write(root, f"{name}/a.png", trees.encode(np.zeros((40, 60, 3), np.uint8), "PNG"))
    categories = [{"id": k, "name": c} for k, c in enumerate(classes)]
    rows = [
        {"id": i, "image_id": 1, "category_id": k, "iscrowd": c, "bbox": [2, 2, 9, 9]}
        for i, (k, c) in enumerate(boxes)
    ]
    images = [{"id": 1, "file_name": "a.png", "width": 60, "height": 40}]
    (root / f"{name}.json").write_text(
        json.dumps({"images": images, "categories": categories, "annotations": rows})
    )
    own = BoxOptions(
        ("{domain}", "{domain}"), ("{domain}.json", "{domain}.json"), ("", ""), classes
    )
    return open_boxes(name, root=str(root), train=True, own=own)


def voc(root: Path, name: str, things: list[str]) -> Dataset:
    box = "<bndbox><xmin>2</xmin><ymin>2</ymin><xmax>9</xmax><ymax>9</ymax></bndbox>"
    objects = "".join(f"<object><name>{t}</name>{box}</object>" for t in things)
    trees.write(root, f"{name}/a.png", trees.encode(np.zeros((40, 60, 3), np.uint8), "PNG"))
    trees.write(root, f"{name}_xml/a.xml", f"<annotation>{objects}</annotation>".encode())
    own = BoxOptions(
        ("{domain}", "{domain}"), ("{domain}_xml", "{domain}_xml"), ("", ""), ("car", "bus")
    )
    return open_boxes(name, root=str(root), train=True, own=own)


def test_boxes(tmp_path):
    """No box, or only crowds, is an error; a class without boxes is a warning.

    A single class is fine.
    """
    with pytest.raises(
        ValueError, match="town has no box to learn from in all 1 image; see the annotation files"
    ):
        said(coco(tmp_path, "town", []))
    with pytest.raises(ValueError, match="fair has no box to learn from"):
        said(coco(tmp_path, "fair", [(0, 1)]))
    with pytest.raises(ValueError, match="wood has no box to learn from"):
        said(voc(tmp_path, "wood", []))
    for source in (
        coco(tmp_path, "road", [(0, 0), (0, 0), (1, 1)]),
        voc(tmp_path, "road2", ["car", "car"]),
    ):
        (line,) = said(source)
        told = (
            f"bus never occurs in {source.domain}, in all 1 image: a model cannot learn what it"
            " never sees; boxes: car 2"
        )
        assert line == f"warning: {told}"
    assert said(coco(tmp_path, "one", [(0, 0)], ("car",))) == []
    none = coco(tmp_path, "empty", [])
    both = coco(tmp_path, "both", [(0, 0), (1, 0)])
    assert said(both, empty=none, both=both) == [
        "warning: empty has nothing to judge by in all 1 image; boxes: none"
    ]
    lines = said(coco(tmp_path, "cars", [(0, 0)]), both=both)
    assert (
        lines[1]
        == "warning: both has bus, of which cars shows none: the AP50 there counts in its mean all"
        " the same"
    )


def test_records(tmp_path):
    """Label maps and boxes from `prepare` are judged by their content and the names of classes."""
    from jaxdg.commands.prepare import prepare

    write(tmp_path / "in", "walls", [[0, 255]] * 2)
    source = opened(tmp_path / "in", "walls", classes=BINARY)
    prepare("walls", {"train": source}, root=str(tmp_path / "in"), out=str(tmp_path / "out"))
    records = open_domain(
        "walls",
        root=str(tmp_path / "out"),
        train=True,
        streets=StreetsOptions(),
        folder=folder(classes=BINARY),
    )
    with pytest.raises(
        ValueError,
        match=r"only background occurs .*; classes in walls: background 95\.0 %, ignored 5\.0 %$",
    ):
        said(records)
    np.testing.assert_array_equal(count(records).classes, [[190, 0]] * 2)
    boxes = coco(tmp_path / "in", "town", [(0, 0), (0, 0)])
    prepare("town", {"train": boxes}, root=str(tmp_path / "in"), out=str(tmp_path / "out"))
    (line,) = said(open_boxes("town", root=str(tmp_path / "out"), train=True))
    assert line.startswith(
        "warning: bus never occurs in town, in all 1 image: a model cannot learn what it never"
        " sees; boxes: car 2"
    )


def test_older_records_open_with_what_the_id_map_means_now(tmp_path):
    """An id without a class then may have one now; an id of another class refuses the records."""
    from jaxdg.commands.prepare import prepare

    write(tmp_path / "in", "walls", [[7, 22]] * 2)
    source = opened(tmp_path / "in", "walls", classes=("a", "b", "c"), id_map={7: 0, 22: 1})
    source.table[2] = -1  # as it was
    prepare("walls", {"train": source}, root=str(tmp_path / "in"), out=str(tmp_path / "out"))

    def records(**options):
        return open_domain(
            "walls",
            root=str(tmp_path / "out"),
            train=True,
            streets=StreetsOptions(),
            folder=folder(classes=("a", "b", "c"), **options),
        )

    assert len(records(id_map={7: 0, 22: 1})) == 2
    with pytest.raises(ValueError, match="other classes or label ids"):
        records(id_map={7: 1, 22: 0})


def test_a_look_at_damage(tmp_path):
    """A damaged label ends a run before its first step, or is added to a list of defects."""
    write(tmp_path, "walls", [[0, 1]] * 3)
    dataset = opened(tmp_path, "walls", classes=BINARY)
    path = tmp_path / "walls/labels/0001.png"
    path.write_bytes(path.read_bytes()[:-30])
    with pytest.raises(ValueError, match=r"labels/0001\.png: .*"):
        said(dataset)
    defects = []
    found = look(dataset, most=9, seconds=9.0, images=range(3), defects=defects)
    assert (found.images, [Path(d.path).name for d in defects]) == (3, ["0001.png"])


def test_a_run_ends_before_its_first_step(tmp_path):
    """The command: one line, exit code 1, no metrics."""
    write(tmp_path / "data", "walls", [[0, 255]] * 3)
    (tmp_path / "c.py").write_text(f"""
from jaxdg.config import Config
from jaxdg.data.datasets import FolderOptions
def get_config():
    c = Config(steps=1, batch_size=8, eval_every=0)
    c.data.root, c.data.source = {str(tmp_path / "data")!r}, "walls"
    c.data.folder = FolderOptions("{{domain}}/images", "{{domain}}/labels")
    c.data.folder.classes = ("background", "crack")
    return c
""")
    line = [
        sys.executable,
        "-m",
        "jaxdg.train",
        "--config",
        str(tmp_path / "c.py"),
        "--workdir",
        str(tmp_path / "run"),
    ]
    done = subprocess.run(line, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr.startswith("error: only background occurs in the labels of walls")
    assert len(done.stderr.splitlines()) == 1
    assert WAY in done.stderr
    assert not (tmp_path / "run/metrics.jsonl").exists()
