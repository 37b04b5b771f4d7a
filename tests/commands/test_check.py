"""`python -m jaxdg.data.check`: every kind of defect is named with its path, and a run goes on
without what is named.
"""

import hashlib
import io
import json
import os
from pathlib import Path
import re
import shutil
import subprocess
from xml.etree import ElementTree
import zipfile

import cv2
import numpy as np
from PIL import Image
import pytest
from rich.console import Console

from jaxdg.commands import check
from jaxdg.commands.check import rewritten
from jaxdg.data import records
from jaxdg.data.boxes import COUNTS, BoxOptions, open_boxes
from jaxdg.data.datasets import FolderOptions, StreetsOptions
from jaxdg.data.domains import open_domain, open_files
from jaxdg.data.labels import CITYSCAPES
from tests import forked
from tests.data import trees


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """Each test has an index folder of its own."""
    monkeypatch.setenv("JAXDG_CACHE", str(tmp_path / "cache"))


def command(*arguments: object) -> subprocess.CompletedProcess[str]:
    return forked.run("jaxdg.data.check", *map(str, arguments))


def run(root: Path, *names: str, **options) -> tuple[bool, str]:
    """The command in this process: whether nothing is broken, and what it prints."""
    printed = io.StringIO()
    defaults = {"out": root / "sheets", "everything": False, "workers": 0, "skip_list": None}
    whole = check.main(
        names,
        root=str(root),
        console=Console(file=printed, soft_wrap=True),
        **{**defaults, **options},
    )
    return whole, printed.getvalue()


def voc(
    folder: Path, objects: dict[str, list[tuple[str, int, int, int, int]]], listed: str
) -> None:
    """Images of 60x40 pixels with objects (class, xmin, ymin, xmax, ymax) in VOC2007's layout."""
    base = folder / "VOC2007"
    for name, things in objects.items():
        boxes = (
            "".join(
                f"<{k}>{v}</{k}>"
                for k, v in zip(("xmin", "ymin", "xmax", "ymax"), box, strict=True)
            )
            for _, *box in things
        )
        inner = "".join(
            f"<object><name>{t[0]}</name><bndbox>{b}</bndbox></object>"
            for t, b in zip(things, boxes, strict=True)
        )
        trees.write(
            base, f"JPEGImages/{name}.jpg", trees.encode(np.full((40, 60, 3), 90, np.uint8), "JPEG")
        )
        trees.write(base, f"Annotations/{name}.xml", f"<annotation>{inner}</annotation>".encode())
    trees.write(base, f"ImageSets/Main/{listed}.txt", "\n".join(objects).encode())


# What is broken, relative to the data root, and what is said of it.
BROKEN = {
    "missing label": ("gta5/images/00001.png", " has no label (*.png)"),
    "missing image": ("gta5/labels/00002.png", " has no image (*.png)"),
    "truncated PNG": ("gta5/images/00003.png", ": truncated (no PNG end chunk)"),
    "sizes differ": ("gta5/labels/00004.png", " is 40x20 but its image is 40x24"),
    "id outside the table": (
        "gta5/labels/00005.png",
        ": 1 pixels have label ids outside the id map: 35",
    ),
    "RGB label": (
        "gta5/labels/00006.png",
        ": a label must be a grey or palette image of class ids, this one is RGB",
    ),
    "damaged inside": ("gta5/images/00007.png", ": damaged ("),
    "0-byte JPEG": ("wilddash2/images/aa0000_100000.jpg", ": empty (0 bytes)"),
    "spaces and Unicode": (
        "cityscapes/gtFine/train/Zürich West 道/aachen_000001_000019_gtFine_labelIds.png",
        ": truncated (",
    ),
    "checksum in an archive": (
        "bdd100k/bdd100k_images_10k.zip/images/10k/val/00000001-d4dff0ad.jpg",
        ": damaged (Bad CRC-32",
    ),
    "box outside": (
        "diverse_weather/daytime_clear/VOC2007/Annotations/outside.xml",
        ": object 2 has a box outside the image (x 50 to 70, y 5 to 9 of 60x40)",
    ),
    "negative size": (
        "diverse_weather/daytime_clear/VOC2007/Annotations/negative.xml",
        ": object 1 has a box of -9x5 pixels",
    ),
    "no size": (
        "diverse_weather/daytime_clear/VOC2007/Annotations/zero.xml",
        ": object 1 has a box of 0x5 pixels",
    ),
    "unknown class": (
        "diverse_weather/daytime_clear/VOC2007/Annotations/class.xml",
        ": object 1 has the unknown class 'tram'",
    ),
    "no XML": (
        "diverse_weather/daytime_clear/VOC2007/Annotations/parse.xml",
        ": does not parse as XML (",
    ),
    "annotation without image": (
        "diverse_weather/daytime_clear/VOC2007/Annotations/lonely.xml",
        " has no image",
    ),
    "image without annotation": (
        "diverse_weather/daytime_clear/VOC2007/JPEGImages/bare.jpg",
        " has no annotation",
    ),
}


def make_broken(root: Path) -> None:
    """Trees with each of these defects once, and whole images beside them."""
    rng = np.random.default_rng(0)
    gta5 = trees.make("gta5", root, rng, count=12)
    Path(gta5[0].label).unlink()
    Path(gta5[1].image).unlink()
    Path(gta5[2].image).write_bytes(Path(gta5[2].image).read_bytes()[:-30])
    Path(gta5[3].label).write_bytes(trees.indexed(gta5[3].ids[:-4]))
    gta5[4].ids[2, 3] = 35
    Path(gta5[4].label).write_bytes(trees.indexed(gta5[4].ids))
    Path(gta5[5].label).write_bytes(trees.encode(gta5[5].pixels, "PNG"))
    data = bytearray(Path(gta5[6].image).read_bytes())
    data[data.find(b"IDAT") + 30] ^= 1
    Path(gta5[6].image).write_bytes(data)

    trees.make("wilddash2", root, rng, count=3)
    (root / BROKEN["0-byte JPEG"][0]).write_bytes(b"")

    trees.make("cityscapes", root, rng)
    for folder in ("leftImg8bit", "gtFine"):
        (root / f"cityscapes/{folder}/train/aachen").rename(
            root / f"cityscapes/{folder}/train/Zürich West 道"
        )
    label = root / BROKEN["spaces and Unicode"][0]
    label.write_bytes(label.read_bytes()[:-30])

    items = trees.make("bdd100k", root, rng, zipped=True, count=2)
    archive = root / "bdd100k/bdd100k_images_10k.zip"
    with zipfile.ZipFile(archive, "w") as file:  # not deflated, so that the checksum alone tells
        for item in items:
            file.writestr(item.image.split(".zip/bdd100k/")[1], trees.encode(item.pixels, "JPEG"))
    data = bytearray(archive.read_bytes())
    data[data.rfind(b"\xff\xd9") - 5] ^= 1
    archive.write_bytes(data)

    trees.make("acdc", root, rng)
    (root / "acdc").rename(root / "x")
    (root / "acdc/one").mkdir(parents=True)
    (root / "x").rename(root / "acdc/one/two")

    car = ("car", 5, 5, 20, 9)
    objects = {
        "good": [car],
        "outside": [car, ("car", 50, 5, 70, 9)],
        "negative": [("car", 20, 5, 10, 9)],
        "zero": [("car", 20, 5, 19, 9)],
    }
    objects |= {
        "class": [("tram", 5, 5, 20, 9)],
        "parse": [car],
        "lonely": [car],
        "bare": [car],
        "better": [car],
    }
    clear = root / "diverse_weather/daytime_clear"
    voc(clear, objects, "train")
    (clear / "VOC2007/Annotations/parse.xml").write_text("<annotation><object>")
    (clear / "VOC2007/JPEGImages/lonely.jpg").unlink()
    (clear / "VOC2007/Annotations/bare.xml").unlink()


@pytest.fixture(scope="module")
def checked(tmp_path_factory) -> tuple[Path, Path, subprocess.CompletedProcess[str]]:
    """A data root with all defects, the skip list written for it, and what the command said."""
    base = tmp_path_factory.mktemp("check")
    root = base / "my dätä"
    make_broken(root)
    done = command(
        "--data_root", root, "--out", base / "sheets", "--write_skip_list", base / "skip list.txt"
    )
    return root, base / "skip list.txt", done


@pytest.mark.parametrize("defect", BROKEN)
def test_a_defect_is_named_with_its_path(checked, defect):
    """One run of the command lists each defect once, with the path of its file."""
    root, _, done = checked
    path, text = BROKEN[defect]
    assert done.stdout.count(f"broken: {root}/{path}{text}") == 1


def test_nothing_else_is_called_broken_and_the_exit_code_is_1(checked):
    """But for the folders a level too deep, which are found; counts and splits that are missing are
    warnings.
    """
    root, skip, done = checked
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    lines = [
        line.removeprefix("broken: ")
        for line in done.stdout.splitlines()
        if line.startswith("broken: ")
    ]
    rest = [
        line
        for line in lines
        if not any(line.startswith(f"{root}/{path}{text}") for path, text in BROKEN.values())
    ]
    assert len(lines) == len(BROKEN) + len(rest)
    assert rest
    for line in rest:
        assert line.startswith(f"{root}/acdc should hold rgb_anon/")
        assert f"but {root}/acdc/one/two/rgb_anon/" in line
    assert "warning: gta5/all has 10 images, published are 24966" in done.stdout
    assert f"warning: daytime_clear/val is missing: {root}/diverse_weather/" in done.stdout
    assert f"{len(lines)} broken, " in done.stdout.splitlines()[-1]
    assert {path.name for path in (skip.parent / "sheets").iterdir()} == {
        f"{name}.png" for name in ("gta5", "wilddash2", "cityscapes", "bdd100k", "diverse_weather")
    }


def test_a_run_goes_on_without_what_is_on_the_skip_list(checked):
    """The list is exactly the broken files, each below its reason; with it every dataset opens and
    every sample can be read.
    """
    root, skip, _ = checked
    lines = skip.read_text(encoding="utf-8").splitlines()
    assert sorted(line for line in lines if not line.startswith("#")) == sorted(
        path for path, _ in BROKEN.values()
    )
    for path, text in BROKEN.values():
        assert lines[lines.index(path) - 1].startswith(f"# {text.lstrip(': ')}")
    options = {"root": str(root), "streets": StreetsOptions(), "folder": None}
    left = {
        ("gta5", True): 5,
        ("wilddash2", True): 2,
        ("cityscapes", True): 3,
        ("bdd100k", False): 1,
    }
    for (domain, train), count in left.items():
        with pytest.raises(ValueError, match=r"data\.skip"):
            open_domain(domain, train=train, **options)
        dataset = open_domain(domain, train=train, skip=str(skip), **options)
        assert len([dataset[i] for i in range(len(dataset))]) == count
    boxes = open_boxes("daytime_clear", root=str(root), train=True, skip=str(skip))
    assert [Path(boxes.name(i)).stem for i in range(len(boxes))] == ["good", "better"]


def test_whole_trees_pass_with_all_images_read_by_processes(tmp_path):
    """The exit code is 0 though no count is the published one; --all decodes every image."""
    root = tmp_path / "data"
    items = trees.make("gta5", root, np.random.default_rng(1), count=30)
    done = command(
        "--data_root", root, "--out", tmp_path / "sheets", "--all", "--workers", 2, "gta5"
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert ["gta5/all", "30", "24966", "40x24", "30", "0"] in [
        line.split() for line in done.stdout.splitlines()
    ]
    assert done.stdout.endswith("0 broken, 1 warning; every file was decoded\n")
    Path(items[1].label).write_bytes(trees.indexed(np.full_like(items[1].ids, 40)))
    assert run(root)[0]
    whole, printed = run(root, everything=True)
    assert not whole
    assert (
        f"broken: {items[1].label}: 960 pixels have label ids outside the id map: 40\n" in printed
    )


def test_shares_of_classes_are_those_of_the_label_files(tmp_path):
    """They equal a count of the written ids over all images, mapped by hand; boxes are counted by
    class.
    """
    items = trees.make("gta5", tmp_path, np.random.default_rng(2), count=5)
    voc(
        tmp_path / "diverse_weather/night_rainy",
        {"a": [("car", 5, 5, 20, 9), ("bus", 1, 1, 8, 8)], "b": [("car", 5, 5, 9, 9)]},
        "train",
    )
    _, printed = run(tmp_path)
    shares, boxes = printed.rsplit("boxes ", 1)
    ids = np.concatenate([item.ids.ravel() for item in items])
    cells = {
        line.split("■")[1].rsplit(maxsplit=1)[0].strip(): line.split()[-1]
        for line in shares.splitlines()
        if "■" in line
    }
    for i, name in ((7, "road"), (33, "bicycle"), (24, "person")):
        assert cells[name] == f"{100 * np.mean(ids == i):.2f}"
    ignored = ~np.isin(ids, [7, 8, 11, 12, 13, 17, *range(19, 29), 31, 32, 33])
    assert cells["ignored"] == f"{100 * np.mean(ignored):.2f}"
    cells = {line.split()[1]: line.split()[2] for line in boxes.splitlines() if "■" in line}
    assert cells == {
        "bus": "1",
        "bike": "-",
        "car": "2",
        "motor": "-",
        "person": "-",
        "rider": "-",
        "truck": "-",
    }


@pytest.mark.parametrize("zipped", [False, True], ids=["folder", "zip"])
def test_whole_trees_of_every_dataset_pass(tmp_path, zipped):
    """Nothing is broken in any published layout, every split of which is listed with its count."""
    items = [
        i
        for name in trees.NAMES
        for i in trees.make(name, tmp_path, np.random.default_rng(3), zipped=zipped)
    ]
    whole, printed = run(tmp_path)
    assert whole, printed
    for domain, split in {(item.domain, item.split) for item in items}:
        count = sum((item.domain, item.split) == (domain, split) for item in items)
        assert any(
            line.split()[:2] == [f"{domain}/{split}", str(count)] for line in printed.splitlines()
        ), (domain, split)
    assert {path.stem for path in (tmp_path / "sheets").iterdir()} >= {*trees.NAMES}


def test_parts_of_a_dataset_by_name(tmp_path):
    """A condition, a split, a split of a condition: those and no others."""
    trees.make("acdc", tmp_path, np.random.default_rng(4))
    for name, splits in {
        "acdc/night": ["acdc/night/train", "acdc/night/val", "acdc/night/test"],
        "acdc/test": [f"acdc/{c}/test" for c in ("fog", "night", "rain", "snow")],
        "acdc/fog/train": ["acdc/fog/train"],
    }.items():
        found = check.subjects([name], root=str(tmp_path))
        assert [[split.name for split in subject.splits] for subject in found] == [splits]
    assert run(tmp_path, "acdc/night")[0]


def test_a_missing_split_is_a_warning_and_missing_labels_are_not(tmp_path):
    """A split may be left out by choice; images whose label folder is not there cannot be trained
    on.
    """
    trees.make("cityscapes", tmp_path, np.random.default_rng(5))
    shutil.rmtree(tmp_path / "cityscapes/leftImg8bit/train")
    whole, printed = run(tmp_path)
    assert whole
    assert (
        f"warning: cityscapes/train is missing: {tmp_path}/cityscapes should hold leftImg8bit/train"
        in printed
    )
    shutil.rmtree(tmp_path / "cityscapes/gtFine")
    whole, printed = run(tmp_path)
    assert not whole
    assert f"broken: {tmp_path}/cityscapes should hold gtFine/val" in printed


def test_instances_are_checked_where_they_are(tmp_path):
    """Boxes of a dataset of label maps are a dataset of their own, whose broken files are named
    too.
    """
    for item in trees.make("cityscapes", tmp_path, np.random.default_rng(6)):
        ids = np.zeros((24, 40), np.uint16)
        ids[4:9, 5:20] = 26001
        data = (
            trees.encode(ids, "PNG")
            if not item.image.endswith("aachen_000001_000019_leftImg8bit.png")
            else trees.grey(ids)
        )
        Path(item.label.replace("labelIds", "instanceIds")).write_bytes(data)
    whole, printed = run(tmp_path, "cityscapes")
    assert not whole
    path = f"{tmp_path}/cityscapes/gtFine/train/aachen/aachen_000001_000019_gtFine_instanceIds.png"
    assert f"broken: {path}: a label with instances must be a 16-bit grey image" in printed
    assert [line.split()[2:] for line in printed.splitlines() if "■ car" in line][1] == [
        "3",
        "2",
    ]  # train, val
    assert (tmp_path / "sheets/cityscapes_boxes.png").is_file()


def test_own_folders_and_boxes(tmp_path):
    """Data described by a configuration: label folders, and COCO's JSON with a box outside and an
    image that is not there.
    """
    for split in ("train", "val"):
        trees.write(
            tmp_path, f"rgb/{split}/a.png", trees.encode(np.zeros((24, 40, 3), np.uint8), "PNG")
        )
        trees.write(
            tmp_path,
            f"gt/{split}/a.png",
            trees.grey(
                np.arange(960).reshape(24, 40) % 3 if split == "train" else np.full((24, 40), 9)
            ),
        )
    folder = FolderOptions(images="rgb/{split}", labels="gt/{split}", classes=("a", "b", "c"))
    images = [
        {"id": i, "file_name": f"{name}.png", "width": 40, "height": 24}
        for i, name in enumerate("ab")
    ]
    box = {"id": 7, "image_id": 0, "category_id": 1, "bbox": [30, 2, 15, 3]}
    content = {"images": images, "categories": [{"id": 1, "name": "dog"}], "annotations": [box]}
    (tmp_path / "boxes.json").write_text(json.dumps(content))
    boxes = BoxOptions(
        images=("rgb/train", "rgb/train"), annotations=("boxes.json", "boxes.json"), lists=("", "")
    )
    whole, printed = run(tmp_path, "town", folder=folder, boxes=boxes, skip_list=tmp_path / "skip")
    assert not whole
    broken = {
        line.removeprefix(f"broken: {tmp_path}/")
        for line in printed.splitlines()
        if line.startswith("broken: ")
    }
    assert broken == {
        "gt/val/a.png: 960 pixels have label ids outside the id map: 9",
        (
            "rgb/train/a.png: annotation 7 of boxes.json has a box outside the image (x 30 to 45, y"
            " 2 to 5 of 40x24)"
        ),
        "rgb/train/b.png is listed by boxes.json as image 1, but does not exist",
    }
    listed = [
        line for line in (tmp_path / "skip").read_text().splitlines() if not line.startswith("#")
    ]
    assert sorted(listed) == ["gt/val/a.png", "rgb/train/a.png", "rgb/train/b.png"]


def masks(root: Path, domain: str, maps: list[list[int]]) -> None:
    """Label maps of 10 x 20 pixels that show the given ids in turn, and images."""
    for i, ids in enumerate(maps):
        trees.write(
            root,
            f"{domain}/images/{i:03}.png",
            trees.encode(np.zeros((10, 20, 3), np.uint8), "PNG"),
        )
        trees.write(
            root, f"{domain}/labels/{i:03}.png", trees.grey(np.resize(ids, 200).reshape(10, 20))
        )


def test_classes_of_own_folders(tmp_path):
    """One class, no label, a class that never occurs: broken, with the ids of the files; a folder
    to judge on may lack classes.
    """

    def folder(**options):
        return FolderOptions("{domain}/images", "{domain}/labels", **options)

    masks(tmp_path, "walls", [[0, 255]] * 3)
    two = {"classes": ("background", "crack")}
    ids = "ids in the label files of walls/all: 0 50.0 % (background), 255 50.0 % (ignored)"
    whole, printed = run(tmp_path, "walls", folder=folder(**two))
    assert not whole
    assert f"\n{ids}\n" in printed
    way = 'if 255 marks crack, set classes=("background", "crack"), id_map={255: 1} in data.folder'
    only = (
        "only background occurs in the labels of walls/all, in all 3 images: a model that answers"
        " nothing else scores 100"
    )
    assert f"broken: {only}; {ids}; {way}\n" in printed
    assert "1 broken, 0 warnings" in printed
    assert (
        "has the single class crack" in run(tmp_path, "walls", folder=folder(classes=("crack",)))[1]
    )
    whole, printed = run(tmp_path, "walls", folder=folder(**two, id_map={255: 1}))
    assert whole
    assert (
        "ids in the label files of walls/all: 0 50.0 % (background), 255 50.0 % (crack)\n"
        in printed
    )
    whole, printed = run(tmp_path, "walls", folder=folder(**two, id_map={0: 255, 255: 255}))
    assert not whole
    assert "broken: no label of walls/all shows a class, in all 3 images" in printed

    three = folder(classes=("a", "b", "c"), id_map={0: 0, 255: 1})
    whole, printed = run(tmp_path, "walls", folder=three)
    assert not whole
    assert "broken: c never occurs in walls/all, in all 3 images" in printed
    assert "; data.folder.id_map maps no id to c\n" in printed
    for options in {"folder": three}, {"folder": folder(**two)}:
        whole, printed = run(tmp_path, "walls", judged_only=("walls",), **options)
        assert whole
        assert "0 broken, 1 warning;" in printed


def test_a_sample_that_lacks_a_class_is_followed_by_a_look_at_more(tmp_path):
    """A class in one of 200 label maps, none of the 20 that are decoded, occurs; and what is
    damaged among the others is found.
    """
    folder = FolderOptions("{domain}/images", "{domain}/labels", classes=("a", "b", "c"))
    masks(tmp_path, "walls", [[0, 1]] * 77 + [[2]] + [[0, 1]] * 122)
    assert run(tmp_path, "walls", folder=folder)[0]
    masks(tmp_path, "bare", [[0]] * 77 + [[1]] + [[0]] * 122)
    whole, printed = run(tmp_path, "bare", folder=folder)
    assert not whole
    assert "broken: c never occurs in bare/all, in all 200 images" in printed
    label = tmp_path / "bare/labels/050.png"
    label.write_bytes(trees.grey(np.full((10, 20), 9)))
    broken = [
        line
        for line in run(tmp_path, "bare", folder=folder)[1].splitlines()
        if line.startswith("broken: ")
    ]
    assert broken[0].startswith(f"broken: {label}: 200 pixels have label ids outside the id map: 9")
    assert broken[1].startswith("broken: c never occurs in bare/all")


def test_classes_of_published_datasets_and_of_boxes(tmp_path):
    """What no split has is a warning, one class alone is broken; no box is broken, a class without
    one a warning.
    """
    items = trees.make("acdc", tmp_path, np.random.default_rng(8))
    for item in items:
        if item.label:
            gone = (3, 5) if item.split == "train" else (5,)
            Path(item.label).write_bytes(
                trees.grey(np.where(np.isin(item.ids, gone), 255, item.ids))
            )
    whole, printed = run(tmp_path)
    assert whole
    warnings = [
        line for line in printed.splitlines() if line.startswith("warning: ") and "never" in line
    ]
    assert len(warnings) == 1
    assert warnings[0].startswith("warning: pole never occurs in acdc/fog/train+acdc/night/train+")
    for item in items:
        if item.label and item.domain == "acdc/night" and item.split == "val":
            Path(item.label).write_bytes(trees.grey(np.zeros_like(item.ids)))
    whole, printed = run(tmp_path)
    assert not whole
    assert "broken: only road occurs in the labels of acdc/night/val, in all 2 images" in printed

    voc(tmp_path / "diverse_weather/night_rainy", {"a": [("car", 5, 5, 20, 9)]}, "train")
    voc(tmp_path / "diverse_weather/dusk_rainy", {"a": []}, "train")
    assert (
        "warning: bus, bike, motor, person, rider, truck never occur in night_rainy/val"
        in run(tmp_path, "night_rainy")[1]
    )
    whole, printed = run(tmp_path, "dusk_rainy")
    assert not whole
    assert "broken: dusk_rainy/val has no box to learn from in all 1 image" in printed


def test_classes_of_records(tmp_path):
    """Records of one's own masks are broken as the masks are, by the names of the classes."""
    from jaxdg.commands.prepare import prepare

    masks(tmp_path / "in", "walls", [[0, 255]] * 3)
    masks(tmp_path / "in", "roads", [[0, 1]] * 3)
    for name in ("walls", "roads"):
        folder = FolderOptions(
            "{domain}/images", "{domain}/labels", classes=("background", "crack")
        )
        files = open_domain(
            name, root=str(tmp_path / "in"), train=True, streets=StreetsOptions(), folder=folder
        )
        prepare(name, {"train": files}, root=str(tmp_path / "in"), out=str(tmp_path / "out"))
    whole, printed = run(tmp_path / "out", "walls")
    assert not whole
    shares = r"; classes in walls/train: background 50\.0 %, ignored 50\.0 %"
    assert re.search(
        r"broken: only background occurs in the labels of walls/train, in all 3 images:"
        rf" .*{shares}\n",
        printed,
    )
    assert run(tmp_path / "out", "roads")[0]


def test_difficult_boxes_and_crowds_are_counted(tmp_path):
    """Beside all boxes of the decoded images; where all are crowds nothing can be learnt, and where
    all are difficult VOC counts none.
    """
    sides = {"width": 40, "height": 24}
    images = [{"id": i, "file_name": f"{i}.png", **sides} for i in (1, 2)]
    for e in images:
        trees.write(
            tmp_path, f"rgb/{e['file_name']}", trees.encode(np.zeros((24, 40, 3), np.uint8), "PNG")
        )
    rows = [
        {
            "id": i,
            "image_id": 1 + i % 2,
            "category_id": 1,
            "bbox": [i, 2, 5, 3],
            "iscrowd": i % 3 == 0,
        }
        for i in range(7)
    ]
    rows[1]["ignore"] = 1
    content = {"images": images, "categories": [{"id": 1, "name": "dog"}], "annotations": rows}
    boxes = BoxOptions(
        images=("rgb", "rgb"), annotations=("boxes.json", "boxes.json"), lists=("", "")
    )

    def told(**same: object) -> tuple[bool, str]:
        (tmp_path / "boxes.json").write_text(
            json.dumps(content | {"annotations": [row | same for row in rows]})
        )
        return run(tmp_path, "town", boxes=boxes)

    whole, printed = told()
    assert whole
    assert ["town/all", "2", "-", "40x24", "2", "7", "1", "3", "0"] in [
        line.split() for line in printed.splitlines()
    ]
    assert [line.split()[-1] for line in printed.splitlines() if "■ dog" in line] == ["7"]
    whole, printed = told(iscrowd="1")
    assert not whole
    assert "broken: town/all has no box to learn from in all 2 images" in printed
    whole, printed = told(iscrowd="0", difficult=True)
    assert whole
    assert (
        "warning: all 7 boxes in 2 images of town/all are difficult, of which VOC's AP counts none"
        in printed
    )


def test_annotations_of_another_kind_are_broken(tmp_path):
    """A page instead of XML, a line of a list with a junk word, images of one name; a JSON file
    joined by hand and one without a list.
    """
    folder = tmp_path / "diverse_weather/night_rainy"
    voc(folder, {"a": [("car", 5, 5, 20, 9)], "b": [("car", 5, 5, 20, 9)], "c": []}, "train")
    base = folder / "VOC2007"
    (base / "Annotations/a.xml").write_text("<html><body>404</body></html>")
    trees.write(base, "JPEGImages/b.png", trees.encode(np.full((40, 60, 3), 90, np.uint8), "PNG"))
    (base / "ImageSets/Main/train.txt").write_text("a 1\nb -1\nc sunny\n")
    whole, printed = run(tmp_path)
    assert not whole
    for line in (
        f"{base}/Annotations/a.xml is no file of VOC's: it begins with <html>",
        f"{base}/JPEGImages/b.jpg and {base}/JPEGImages/b.png have one name",
        f"{base}/ImageSets/Main/train.txt: line 3 lists c sunny, which is neither",
    ):
        assert f"broken: {line}" in printed
    images = [
        {"id": 1, "file_name": name, "width": 60, "height": 40} for name in ("b.jpg", "c.jpg")
    ]
    content: dict = {"images": images, "categories": [{"id": 1, "name": "car"}], "annotations": []}
    boxes = BoxOptions(
        images=("photos", "photos"), annotations=("t.json", "t.json"), lists=("", "")
    )
    (base / "JPEGImages").rename(tmp_path / "photos")
    for change, told in (
        ({}, "the images 'b.jpg' and 'c.jpg' have one id, 1"),
        ({"images": 3}, "no COCO annotation file ('images' is no"),
    ):
        (tmp_path / "t.json").write_text(json.dumps(content | change))
        whole, printed = run(tmp_path, "town", boxes=boxes)
        assert not whole
        assert f"broken: {tmp_path}/t.json: {told}" in printed


def test_annotations_that_name_another_image_are_told(tmp_path):
    """Only where that image exists too: in a renamed dataset no annotation names its own image."""
    folder = tmp_path / "diverse_weather/night_rainy"
    voc(folder, {name: [("car", 5, 5, 20, 9)] for name in "abc"}, "train")
    for name, said in (("a", "b.jpg"), ("b", "C:\\photos\\a.png"), ("c", "other.jpg")):
        path = folder / f"VOC2007/Annotations/{name}.xml"
        path.write_text(
            path.read_text().replace("<annotation>", f"<annotation><filename>{said}</filename>")
        )
    whole, printed = run(tmp_path)
    assert whole
    path = folder / "VOC2007/Annotations/a.xml"
    assert (
        f"2 of 3 annotations name another image than their own in <filename>, such as {path} with"
        " b; they count for" in printed
    )


def test_records_are_verified(tmp_path):
    """A changed byte of a shard is found by its digest, unfinished records are broken; what there
    are records of needs no files.
    """
    for name in ("gta5", "acdc/night"):
        folder = tmp_path / name / records.VERSION
        folder.mkdir(parents=True)
        (folder / "x-train.array_record-00000-of-00001").write_bytes(b"shard")
        files = {"x-train.array_record-00000-of-00001": [5, hashlib.sha256(b"shard").hexdigest()]}
        (folder / records.METADATA).write_text(json.dumps({"files": files}))
        (folder / records.COMPLETE).write_text("{}")
    whole, printed = run(tmp_path)
    assert whole
    assert printed.count(": whole\n") == 2
    assert "broken: " not in printed
    shard = tmp_path / "acdc/night" / records.VERSION / "x-train.array_record-00000-of-00001"
    shard.write_bytes(b"shart")
    (tmp_path / "gta5" / records.VERSION / records.COMPLETE).rename(
        tmp_path / "gta5" / records.VERSION / records.UNFINISHED
    )
    whole, printed = run(tmp_path)
    assert not whole
    assert f"broken: {shard} is truncated or altered" in printed
    assert f"broken: {tmp_path}/gta5/{records.VERSION} holds no finished records" in printed
    assert run(tmp_path, "gta5")[1].count("records of") == 1


def test_the_contact_sheet_shows_labels_and_boxes_in_their_colours(tmp_path):
    """On black images the tint of a road and the frame of a car are found where they were written,
    and nowhere above.
    """
    black = trees.encode(np.zeros((200, 960, 3), np.uint8), "PNG")
    ids = np.zeros((200, 960), np.uint8)
    ids[100:] = 7
    trees.write(tmp_path / "gta5", "images/1.png", black)
    trees.write(tmp_path / "gta5", "labels/1.png", trees.indexed(ids))
    run(tmp_path)
    sheet = np.asarray(Image.open(tmp_path / "sheets/gta5.png")).astype(int)
    road = np.abs(sheet - 0.55 * np.array(CITYSCAPES.colors[0])).max(axis=2) < 1
    rows, columns = np.nonzero(road)
    assert (columns.min(), columns.max()) == (0, 479)  # half of 960
    assert rows.max() - rows.min() in (
        48,
        49,
    )  # the lower half of 100 rows, but for the line on the border

    voc(
        tmp_path / "diverse_weather/night_rainy",
        {"empty": [], "a": [("car", 11, 11, 40, 30)], "none": []},
        "train",
    )
    for image in (tmp_path / "diverse_weather/night_rainy/VOC2007/JPEGImages").iterdir():
        image.write_bytes(trees.encode(np.zeros((40, 60, 3), np.uint8), "JPEG"))
    run(tmp_path)
    sheet = np.asarray(Image.open(tmp_path / "sheets/diverse_weather.png")).astype(int)
    car = (sheet[:66] == CITYSCAPES.colors[13]).all(
        axis=2
    )  # a caption of 26 rows and the picture: the one image that has a box
    assert car[26 + 29, 20:35].all()  # the lower edge of the box
    assert not car[26 + 31 :].any()


def test_what_cannot_be_checked_is_said(tmp_path, monkeypatch):
    """No data root, an unknown name, a root without datasets, and folders that are none."""
    with pytest.raises(
        FileNotFoundError,
        match=r"data root /.*/nowhere does not exist; set JAXDG_DATA or --data_root",
    ):
        run(tmp_path / "nowhere")
    with pytest.raises(
        ValueError,
        match=r"unknown dataset 'gta'; known are camvid, gta5, .*carla_towns and their domains",
    ):
        run(tmp_path, "gta")
    (tmp_path / "other").mkdir()
    with pytest.raises(
        FileNotFoundError, match=r"has no folder of a known dataset \(camvid, .*\), only other"
    ):
        run(tmp_path)
    trees.make("gta5", tmp_path, np.random.default_rng(7))
    (tmp_path / "gta5").rename(tmp_path / "GTA-5")
    whole, printed = run(tmp_path)
    assert not whole
    assert (
        f"broken: {tmp_path}/gta5 should hold images, unpacked or in a zip archive, but"
        f" {tmp_path}/GTA-5/images was found" in printed
    )
    assert "not checked, as these are folders of no known dataset: other\n" in printed
    monkeypatch.chdir(tmp_path)
    os.rename("GTA-5", "gta5")
    assert run(Path())[0]


def test_real_data(data_path, tmp_path):
    """CamVid and CARLA pass without a warning: the published counts are met."""
    root = data_path("camvid").parent
    data_path("carla_towns")
    whole, printed = run(root, "camvid", "carla_towns", out=tmp_path)
    assert whole
    assert "0 broken, 0 warnings" in printed
    for line in (
        "camvid/train      305         305   480x360",
        "town05/val       249         249   640x380",
    ):
        assert line in printed
    assert {path.name for path in tmp_path.glob("*.png")} == {"camvid.png", "carla_towns.png"}


def test_what_was_passed_over_is_counted(tmp_path):
    """Hidden entries and links that lead back are told with an example, in both tasks, and are
    nothing broken.
    """
    trees.make("gta5", tmp_path, np.random.default_rng(0))
    trees.write(tmp_path / "gta5", "images/.ipynb_checkpoints/00001-checkpoint.png", b"")
    trees.write(tmp_path / "gta5", "labels/Thumbs.db", b"")
    (tmp_path / "gta5/images/back").symlink_to("..")
    clear = tmp_path / "diverse_weather/daytime_clear"
    voc(clear, {"one": [("car", 1, 1, 9, 9)]}, "train")
    trees.write(clear, "VOC2007/JPEGImages/._one.jpg", b"")
    whole, printed = run(tmp_path)
    assert whole
    assert (
        f"2 hidden or system entries skipped, such as {tmp_path}/gta5/images/.ipynb_checkpoints"
        in printed
    )
    assert (
        f"1 link skipped that lead to folders listed already, such as {tmp_path}/gta5/images/back"
        in printed
    )
    assert (
        f"1 hidden or system entry skipped, such as {clear}/VOC2007/JPEGImages/._one.jpg" in printed
    )
    assert "broken: " not in printed.split("diverse_weather")[0]


def test_a_dataset_that_is_there_twice_is_broken(tmp_path):
    """The check names both candidates; another spelling of a dataset's folder is said to be read by
    nothing.
    """
    trees.make("gta5", tmp_path, np.random.default_rng(0), zipped=True)
    shutil.copy(tmp_path / "gta5/01_images.zip", tmp_path / "gta5/01_images (1).zip")
    (tmp_path / "GTA-5").mkdir()
    whole, printed = run(tmp_path)
    assert not whole
    twice = "gta5/01_images (1).zip/images/00001.png and "
    assert (
        f"broken: {tmp_path}/{twice}{tmp_path}/gta5/01_images.zip/images/00001.png are two"
        " candidates" in printed
    )
    assert "not checked, as these are folders of no known dataset: GTA-5" in printed


def test_files_of_others_are_not_replaced(tmp_path):
    """A skip list or contact sheet of an earlier check is written anew; another file of its name
    stays and is named.
    """
    trees.make("gta5", tmp_path, np.random.default_rng(0), count=2)
    sheets = tmp_path / "sheets"
    skip = tmp_path / "skip.txt"
    for _ in range(2):
        assert f"contact sheet: {sheets}/gta5.png" in run(tmp_path, "gta5", skip_list=skip)[1]
    Image.new("RGB", (3, 3)).save(sheets / "gta5.png")
    kept = (sheets / "gta5.png").read_bytes()
    assert (
        f"contact sheet not written: {sheets}/gta5.png is there and is none"
        in run(tmp_path, "gta5")[1]
    )
    assert (sheets / "gta5.png").read_bytes() == kept
    skip.write_text("my notes")
    with pytest.raises(
        ValueError, match=r"skip\.txt is there and is no list that --write_skip_list wrote; move it"
    ):
        run(tmp_path, "gta5", skip_list=skip)
    assert skip.read_text() == "my notes"


def test_images_and_labels_that_are_not_what_they_seem_are_named(tmp_path):
    """Own folders: what would train to a plausible, wrong result is said before any training, from
    folders and from an archive.
    """
    rng = np.random.default_rng(0)
    base = tmp_path / "root" / "town"
    pixels = np.asarray(
        Image.fromarray(rng.integers(0, 256, (12, 16, 3), np.uint8)).resize(
            (160, 120), Image.Resampling.BICUBIC
        )
    )
    ids = np.arange(120 * 160).reshape(120, 160) % 3
    jpeg = trees.encode(pixels, "JPEG")
    label = trees.grey(ids)
    half_turn = Image.Exif()
    half_turn[0x0112] = 3
    turned = io.BytesIO()
    permuted = io.BytesIO()
    Image.fromarray(pixels).save(turned, "JPEG", exif=half_turn)
    palette = Image.fromarray(ids.astype(np.uint8))
    palette.putpalette([244, 35, 232, 128, 64, 128, 70, 130, 180])
    palette.save(permuted, "PNG")
    deep = cv2.imencode(".png", rng.integers(0, 4096, (120, 160)).astype(np.uint16))[1].tobytes()
    files = {  # image, label, what is said of which
        "film": (jpeg + bytes(5000), label, None),
        "png": (trees.encode(pixels, "PNG"), label, None),
        "hole": (jpeg[:2000] + bytes(700) + jpeg[2700:], label, "images/hole.jpg: damaged ("),
        "early_end": (
            jpeg[:3000] + b"\xff\xd9",
            label,
            "images/early_end.jpg: damaged (Corrupt JPEG data: premature end of data segment)",
        ),
        "cut": (jpeg[:3000], label, "images/cut.jpg: truncated (no JPEG end marker)"),
        "turned": (
            turned.getvalue(),
            label,
            (
                "images/turned.jpg: its orientation (EXIF 3: turned by 180 degrees) leaves open"
                " whether the label"
            ),
        ),
        "deep": (
            deep,
            label,
            "images/deep.jpg: a 16-bit image of which no value uses more than 12 bits",
        ),
        "lossy": (
            jpeg,
            trees.encode(ids.astype(np.uint8), "JPEG"),
            "labels/lossy.png: a label must not be a JPEG image",
        ),
        "permuted": (
            jpeg,
            permuted.getvalue(),
            (
                "labels/permuted.png: its palette gives index 0 the colour of walk (id 1), 1 the"
                " colour of road"
            ),
        ),
    }
    for name, (image, truth, _) in files.items():
        for kind, data in ((f"images/{name}.jpg", image), (f"labels/{name}.png", truth)):
            trees.write(base, kind, data)
            trees.write(tmp_path / "root", kind, data, "zipped.zip")
    colors = ((128, 64, 128), (244, 35, 232), (70, 130, 180))
    for domain, place in (("town", "town"), ("zipped", "zipped.zip")):
        folder = FolderOptions(
            images=f"{place}/images",
            labels=f"{place}/labels",
            classes=("road", "walk", "sky"),
            colors=colors,
        )
        whole, printed = run(tmp_path / "root", domain, folder=folder)
        assert not whole
        told = [told for _, _, told in files.values() if told]
        for text in told:
            assert printed.count(f"broken: {tmp_path}/root/{place}/{text}") == 1, text
        assert printed.count("broken: ") == len(told)


def test_splits_that_hold_the_same_images_are_told(tmp_path):
    """Two domains of one's own, of which one has a copy of an image of the other: the warning
    counts it; others share nothing.
    """
    rng = np.random.default_rng(0)
    for domain in ("a", "b", "c"):
        for kind, shape in (("images", (8, 8, 3)), ("labels", (8, 8))):
            (tmp_path / kind / domain).mkdir(parents=True)
            for i in range(3):
                pixels = rng.integers(0, 2 if kind == "labels" else 256, shape).astype(np.uint8)
                Image.fromarray(pixels).save(tmp_path / kind / domain / f"{domain}{i}.png")
    (tmp_path / "images/b/b1.png").write_bytes((tmp_path / "images/a/a2.png").read_bytes())
    options = FolderOptions(classes=("x", "y"))
    opened = {
        d: open_files(d, root=str(tmp_path), train=True, folder=options, defects=[])
        for d in ("a", "b", "c")
    }
    (line,) = check.shared_images(opened, str(tmp_path))
    assert line.startswith("1 of the 3 images of a are images of b;")


def moved(path: Path) -> None:
    """What the loader of CLIP the Gap does to a file of Diverse Weather."""
    tree = ElementTree.parse(path)
    for thing in tree.findall("object"):
        for key in ("pose", "truncated", "difficult"):
            if thing.find(key) is None:
                ElementTree.SubElement(thing, key).text = "0"
        for corner in thing.find("bndbox"):
            corner.text = str(int(max(0, float(corner.text) - 1)))
    tree.write(path)


def test_files_that_another_loader_wrote_back_are_noticed(tmp_path):
    """Of five files three were, which the elements behind their boxes tell; the list that the
    loader keeps tells it of a whole domain; a copy of neither kind is not suspected.
    """
    car = ("car", 5, 5, 20, 9)
    root = tmp_path / "data"
    night, dusk, fog = (
        root / "diverse_weather" / name for name in ("night_rainy", "dusk_rainy", "daytime_foggy")
    )
    for folder in (night, dusk, fog):
        voc(folder, {name: [car] if name != "e" else [] for name in "abcdef"}, "train")
    sound, printed = run(root)
    assert sound
    assert "written back" not in printed
    for name in "abc":
        moved(night / f"VOC2007/Annotations/{name}.xml")
    (fog / "cache").mkdir()
    (fog / "cache/daytime_foggy_train.pkl").write_bytes(b"")
    sound, printed = run(root, everything=True)
    assert sound  # nothing is refused
    (first, second) = [line for line in printed.splitlines() if "written back" in line]
    assert first.startswith("warning: night_rainy/val was probably written back by the loader of")
    assert "(3 of 5 files have what it adds to them)" in first
    assert second.startswith("warning: daytime_foggy/val was probably written back by")
    assert f"({fog}/cache/daytime_foggy_train.pkl is there)" in second


def test_whole_corners_beside_decimals_are_noticed(tmp_path):
    """The loader cuts decimals off: a domain without any beside one that has them."""
    voc(tmp_path / "diverse_weather/night_rainy", {"a": [("car", 5, 5, 20, 9)]}, "train")
    other = tmp_path / "diverse_weather/dusk_rainy"
    voc(other, {name: [("car", 5.25, 5, 20, 9)] for name in "ab"}, "train")  # pyright: ignore
    _, printed = run(tmp_path)
    (line,) = [line for line in printed.splitlines() if "written back" in line]
    assert "whole numbers in 1 of 3 files, most of them in night_rainy/val" in line


def test_numbers_of_boxes_are_compared_with_the_published_ones(tmp_path, monkeypatch):
    """Where no image is missing: in all from the index, by class where all were decoded; equal ones
    are not spoken of.
    """
    things = {"a": [("car", 5, 5, 20, 9), ("bus", 1, 1, 8, 8)], "b": [("car", 5, 5, 9, 9)], "c": []}
    voc(tmp_path / "diverse_weather/night_rainy", things, "train")
    monkeypatch.setitem(COUNTS, ("night_rainy", False), 3)
    monkeypatch.setitem(rewritten.BOXES, "night_rainy/val", ((1, 0, 2, 0, 0, 0, 0), 2))
    assert "other annotations" not in run(tmp_path, everything=True)[1]
    monkeypatch.setitem(rewritten.BOXES, "night_rainy/val", ((1, 0, 3, 0, 0, 0, 0), 3))
    _, printed = run(tmp_path)
    assert (
        "warning: night_rainy/val has 3 boxes (published 4), 2 images with a box (published 3):"
        " other annotations\n"
    ) in printed
    _, printed = run(tmp_path, everything=True)
    assert "night_rainy/val has 2 of car (published 3), 2 images with a box" in printed
