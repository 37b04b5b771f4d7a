"""Boxes of VOC folders, Diverse Weather, CARLA and the generated streets, and bad files."""

import os
from pathlib import Path
import pickle
import re
import subprocess
import sys
import time
import zipfile

import numpy as np
from PIL import Image
import pytest

from jaxdg.data import annotations, box_fields
from jaxdg.data.boxes import (
    CARLA,
    COUNTS,
    DIVERSE_WEATHER,
    STREETS_THINGS,
    BoxFiles,
    BoxOptions,
    open_box_files,
    open_boxes,
)
from jaxdg.data.datasets import Dataset, StreetsOptions
from jaxdg.data.labels import CITYSCAPES
from jaxdg.streets import render as streets

OWN = BoxOptions(classes=("Cat", "dog"))


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch) -> Path:
    """Each test keeps its outcomes in a folder of its own."""
    monkeypatch.setenv("JAXDG_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def xml(
    objects: str = "",
    size: str = "<size><width>60</width><height>40</height><depth>3</depth></size>",
) -> str:
    return f"<annotation>\n<filename>x</filename>{size}{objects}</annotation>"


def thing(
    name: str, *corners: float, difficult: str = "<difficult>0</difficult>", part: str = ""
) -> str:
    box = "".join(
        f"<{key}>{value}</{key}>"
        for key, value in zip(("xmin", "ymin", "xmax", "ymax"), corners, strict=True)
    )
    return f"<object><name>{name}</name>{difficult}<bndbox>{box}</bndbox>{part}</object>"


def write_voc(
    folder: Path, files: dict[str, str], size: tuple[int, int] = (40, 60), **lists: list[str]
) -> None:
    """A VOC2007 folder with noise for images, and the lists in `ImageSets/Main`."""
    for kind in ("JPEGImages", "Annotations", "ImageSets/Main"):
        (folder / kind).mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        noise = np.random.default_rng(len(name)).integers(0, 256, (*size, 3), dtype=np.uint8)
        Image.fromarray(noise).save(folder / "JPEGImages" / f"{name}.jpg")
        (folder / "Annotations" / f"{name}.xml").write_text(text)
    for name, stems in lists.items():
        (folder / "ImageSets/Main" / f"{name}.txt").write_text(
            "".join(f"{stem}\n" for stem in stems)
        )


def settle(root: Path) -> None:
    """Moves all times back, as if nothing had changed for a minute."""
    for folder, _, names in os.walk(root):
        for path in (folder, *(os.path.join(folder, name) for name in names)):
            os.utime(path, (time.time() - 60, time.time() - 60))


def pets(tmp_path: Path, files: dict[str, str], **options) -> BoxFiles:
    """Opens `files` as images to train on."""
    write_voc(tmp_path / "pets/VOC2007", files, trainval=list(files), test=[])
    return open_box_files("pets", root=str(tmp_path), train=True, own=OWN, **options)


def slow_voc(text: str) -> list[tuple[str, list[float]]]:
    """Names and boxes by regular expressions."""
    found = []
    for body in re.findall(r"<object>(.*?)</object>", text, re.DOTALL):
        name = re.findall(r"<name>\s*(\S+)\s*</name>", body)[0]
        x0, y0, x1, y1 = (
            float(re.findall(rf"<{key}>(.*?)</{key}>", body)[0])
            for key in ("xmin", "ymin", "xmax", "ymax")
        )
        found.append((name, [max(x0 - 1, 0), max(y0 - 1, 0), x1, y1]))
    return found


def test_carla_equals_a_slow_reader_and_has_the_published_counts(data_path):
    """All 4395 real boxes equal those that regular expressions find; domains share no image."""
    root = data_path("carla_towns").parent
    seen = []
    boxes = 0
    for domain, train in (("carla", True), ("carla", False), ("town05", False)):
        dataset = open_box_files(domain, root=str(root), train=train)
        assert isinstance(dataset, Dataset)
        assert (len(dataset), dataset.labels) == (COUNTS[domain, train], CARLA)
        for i in range(len(dataset)):
            path = Path(dataset.name(i))
            expected = slow_voc(
                (path.parent.parent / "Annotations" / f"{path.stem}.xml").read_text()
            )
            found = dataset.boxes(i)
            assert [CARLA.names[k] for k in found["classes"]] == [name for name, _ in expected]
            np.testing.assert_array_equal(
                found["boxes"], np.array([box for _, box in expected], np.float32).reshape(-1, 4)
            )
            assert not found["difficult"].any()
            assert not found["crowd"].any()
            assert dataset.size(i) == (380, 640)
            boxes += len(expected)
        seen += [dataset.name(i) for i in range(len(dataset))]
        assert {Path(name).parts[-4] for name in seen[-len(dataset) :]} == (
            {"town05"} if domain == "town05" else {"town01", "town02", "town03", "town04"}
        )
    assert (len(set(seen)), boxes) == (1028, 4395)


def test_samples_hold_arrays_of_the_agreed_types_and_survive_pickling(data_path):
    """Checks types and shapes of a real sample and of an image without objects."""
    dataset = pickle.loads(
        pickle.dumps(open_boxes("town05", root=str(data_path("carla_towns").parent), train=False))
    )
    counts = [len(dataset.boxes(i)["boxes"]) for i in range(40)]
    for i in (int(np.argmax(counts)), int(np.argmin(counts))):
        sample = dataset[i]
        assert {key: (array.dtype, array.shape) for key, array in sample.items()} == {
            "image": (np.dtype(np.uint8), (380, 640, 3)),
            "boxes": (np.dtype(np.float32), (counts[i], 4)),
            "classes": (np.dtype(np.int32), (counts[i],)),
            "difficult": (np.dtype(bool), (counts[i],)),
            "crowd": (np.dtype(bool), (counts[i],)),
            "areas": (np.dtype(np.float32), (counts[i],)),
        }


def test_readers_import_no_jax(data_path):
    """A worker process that unpickles a dataset and reads from it has neither jax nor flax."""
    dataset = open_boxes("town05", root=str(data_path("carla_towns").parent), train=False)
    code = (
        "import pickle, sys; d = pickle.load(sys.stdin.buffer); d[0]; "
        "assert not {'jax', 'flax', 'tensorflow_datasets'} & set(sys.modules), sorted(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], input=pickle.dumps(dataset), check=True)


def test_convention():
    """VOC's inclusive pixels from 1 become [x0, x1); one pixel beyond the image is clipped."""
    written = np.array([[1, 1, 60, 40], [5, 6, 5, 6], [0, -1, 61, 41], [2.5, 3, 7.25, 9]])
    boxes, wrong = box_fields.fit(written, np.array([[40, 60]] * 4), first=1)
    assert not wrong
    np.testing.assert_array_equal(
        boxes,
        np.array([[0, 0, 60, 40], [4, 5, 5, 6], [0, 0, 60, 40], [1.5, 2, 7.25, 9]], np.float32),
    )
    boxes, wrong = box_fields.fit(
        np.array([[0, 0, 60, 40], [-0.5, 0, 60.5, 1]]), np.array([[40, 60]] * 2), first=0
    )
    assert not wrong
    np.testing.assert_array_equal(boxes, np.array([[0, 0, 60, 40], [0, 0, 60, 1]], np.float32))


def test_voc_folder_by_its_options(tmp_path):
    """Lists set the order; difficult objects, parts, upper-case names and small boxes are read."""
    person = thing(
        "CAT ",
        3,
        4,
        3,
        4,
        difficult="<difficult>1</difficult>",
        part="<part><name>head</name><bndbox></bndbox></part>",
    )
    files = {
        "b": xml(person + thing("dog", 1, 1, 60, 40, difficult="")),
        "a": xml(),
        "out": "no annotation",
    }
    write_voc(tmp_path / "pets/VOC2007", files, trainval=["b ", "a  1"], test=["a"])
    train, test = (open_boxes("pets", root=str(tmp_path), train=t, own=OWN) for t in (True, False))
    assert [Path(train.name(i)).stem for i in range(len(train))] == ["b", "a"]
    assert (len(test), test.labels.names) == (1, ("Cat", "dog"))
    sample = train[0]
    np.testing.assert_array_equal(sample["boxes"], [[2, 3, 3, 4], [0, 0, 60, 40]])
    assert (sample["classes"].tolist(), sample["difficult"].tolist()) == ([0, 1], [True, False])
    assert train[1]["boxes"].shape == (0, 4)

    everything = BoxOptions(lists=("", ""), classes=OWN.classes)
    (tmp_path / "pets/VOC2007/Annotations/out.xml").unlink()
    with pytest.raises(ValueError, match=r"out\.jpg has no annotation;"):
        open_boxes("pets", root=str(tmp_path), train=True, own=everything)
    (tmp_path / "pets/VOC2007/JPEGImages/out.jpg").unlink()
    dataset = open_boxes("pets", root=str(tmp_path), train=True, own=everything)
    assert [Path(dataset.name(i)).stem for i in range(len(dataset))] == ["a", "b"]
    with pytest.raises(ValueError, match=r"data\.boxes\.classes is empty"):
        open_boxes("pets", root=str(tmp_path), train=True, own=BoxOptions())


THING = thing("dog", 1, 1, 9, 9)
CORNERS = "<xmin>1</xmin><ymin>1</ymin><xmax>2</xmax><ymax>2</ymax>"
PART = f"<part><name>head</name><bndbox>{CORNERS}</bndbox></part>"
SAME = {
    "as it is": xml(THING),
    "namespace": (
        xml(THING).replace("<annotation>", '<annotation xmlns="http://host.xtuc.uestc.edu.cn/">')
    ),
    "upper case": re.sub(r"</?\w+>", lambda tag: tag[0].upper(), xml(THING)),
    "parts": xml(thing("dog", 1, 1, 9, 9, part=PART + PART)),
    "BOM": "\ufeff" + xml(THING),
}


@pytest.mark.parametrize("case", SAME)
def test_the_same_thing_however_it_is_written(tmp_path, case):
    """Namespaces, upper-case tags, parts with boxes and a byte-order mark change nothing."""
    sample = pets(tmp_path, {"a": SAME[case]})[0]
    assert (sample["boxes"].tolist(), sample["classes"].tolist(), sample["areas"].tolist()) == (
        [[0, 0, 9, 9]],
        [1],
        [81],
    )


@pytest.mark.parametrize("yes", ["1", "1 ", "1.0", "True", "true", "yes", " YES\n"])
def test_difficult_in_every_spelling(tmp_path, yes):
    """All spellings of yes mark an object as difficult; all spellings of no, and none, do not."""
    said = (yes, "0", "0.0", "False", "no", "")
    objects = [
        thing("dog", 1, 1, 9, 9, difficult=f"<difficult>{value}</difficult>") for value in said
    ]
    sample = pets(
        tmp_path, {"a": xml("".join(objects) + THING.replace("<difficult>0</difficult>", ""))}
    )[0]
    assert sample["difficult"].tolist() == [True] + [False] * 6


WRONG = {
    "another file": (
        "<html><body>404</body></html>",
        " is no file of VOC's: it begins with <html> instead of <annotation>",
    ),
    "many files": (
        f"<annotations>{xml(THING)}</annotations>",
        "it begins with <annotations> instead of <annotation>",
    ),
    "objects deeper": (
        xml(f"<objects>{THING}</objects>"),
        ": holds an <object> that is not directly in <annotation>",
    ),
    "objects by another name": (
        xml(THING.replace("object", "item")),
        ": holds a <bndbox> that is not directly in an <object>",
    ),
    "two boxes": (
        xml(THING.replace("</object>", "<bndbox/></object>")),
        "object 1 has 2 <bndbox>; which one counts is not known",
    ),
    "two names": (
        xml(THING.replace("</object>", "<name>cat</name></object>")),
        "object 1 has 2 <name>; which one counts",
    ),
    "a corner twice": (
        xml(THING.replace("<ymin>", "<xmin>5</xmin><ymin>")),
        "object 1 has a <bndbox> that states one of its corners twice",
    ),
    "a part's box alone": (
        xml(f"<object><name>dog</name>{PART}</object>"),
        "object 1 has no <bndbox>, only <part>",
    ),
    "a polygon alone": (
        xml("<object><name>dog</name><polygon/></object>"),
        "object 1 has no <bndbox>, only <polygon>",
    ),
    "neither yes nor no": (
        xml(thing("dog", 1, 1, 9, 9, difficult="<difficult>2</difficult>")),
        "object 1 has a <difficult> of '2', which is neither yes (1) nor no (0)",
    ),
    "decimal comma": (
        xml(THING.replace("<xmin>1<", "<xmin>1,5<")),
        "object 1 has no box of four numbers (xmin is '1,5')",
    ),
    "a corner missing": (
        xml(THING.replace("<ymin>1</ymin>", "")),
        "object 1 has no box of four numbers (no ymin)",
    ),
    "sides swapped": (
        xml(size="<size><width>40</width><height>60</height></size>"),
        (
            "says 40x60 but its image is 60x40; they are swapped, or the image was turned after it"
            " was annotated"
        ),
    ),
    "no xml": ("<annotation><object>", "does not parse as XML"),
    "no text": ("", "does not parse as XML"),
    "another size": (
        xml(size="<size><width>80</width><height>40</height></size>"),
        "says 80x40 but its image is 60x40",
    ),
    "unknown class": (
        xml(thing("dog", 1, 1, 9, 9) + thing("horse", 1, 1, 9, 9)),
        "object 2 has the unknown class 'horse'",
    ),
    "no name": (xml("<object><bndbox/></object>"), "object 1 has no name"),
    "no box": (xml("<object><name>dog</name></object>"), "object 1 has no <bndbox>"),
    "no number": (
        xml(thing("dog", 1, 1, 9, 9).replace(">9<", ">nine<")),
        "object 1 has no box of four numbers",
    ),
    "infinity": (xml(thing("dog", 1, 1, 1e999, 9)), "object 1 has no box of four numbers"),
    "negative": (xml(thing("dog", 9, 1, 3, 9)), "object 1 has a box of -5x9 pixels"),
    "zero": (xml(thing("dog", 9, 5, 12, 4)), "object 1 has a box of 4x0 pixels"),
    "outside": (
        xml(thing("dog", 1, 1, 62, 40)),
        "object 1 has a box outside the image (x 1 to 62, y 1 to 40 of 60x40)",
    ),
    "left of it": (xml(thing("dog", -2, 1, 5, 9)), "object 1 has a box outside the image"),
    "beside it": (xml(thing("dog", 61, 1, 61, 9)), "object 1 has a box outside the image"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_annotations_are_named(tmp_path, case):
    """The path and the number of the object are named at the start, in the defects and when read.

    A skipped file is no error.
    """
    text, told = WRONG[case]
    path = tmp_path / "pets/VOC2007/Annotations/bad.xml"
    files = {"good": xml(thing("dog", 1, 1, 9, 9)), "bad": text}
    with pytest.raises(
        ValueError, match=re.escape(str(path)) + ".*" + re.escape(told) + ".*data.skip"
    ) as error:
        pets(tmp_path, files)
    assert "\n" not in str(error.value)
    dataset = pets(tmp_path, files, defects=(defects := []))
    assert len(dataset) == 2
    assert {defect.path for defect in defects} == {str(path)}
    assert told in defects[0].text
    with pytest.raises(ValueError, match=re.escape(told)):
        dataset[1]
    (tmp_path / "skip.txt").write_text("pets/VOC2007/Annotations/bad.xml\n")
    assert len(pets(tmp_path, files, skip=str(tmp_path / "skip.txt"))) == 1


LINES = {
    "a\n": ["a"],
    "my image\na\n": ["my image", "a"],
    "a 1\nb -1\nmy image  0\n": ["a", "b", "my image"],
    "c 1\n": ["c 1"],  # an image of that name goes before a flag
    "a\t1\n": ["a"],
    "a.jpg\nb.xml\n": ["a", "b"],
    "sub/d\n./sub/e.jpg\nsub\\f\n": ["sub/d", "sub/e", "sub/f"],
    "\ufeffa\r\n\r\nb\r\n": ["a", "b"],
    "# which\na\na 1\n  b\n": ["a", "b"],
}


@pytest.mark.parametrize("lines", LINES)
def test_lines_of_lists(tmp_path, lines):
    """Spaces in names, flags, extensions, sub-folders, line ends, comments and repetitions work."""
    for name in ("a", "b", "c", "c 1", "my image", "sub/d", "sub/e", "sub/f"):
        for kind in ("JPEGImages", "Annotations"):
            (tmp_path / "pets/VOC2007" / kind / "sub").mkdir(parents=True, exist_ok=True)
        write_voc(tmp_path / "pets/VOC2007", {name: xml(THING)})
    (tmp_path / "pets/VOC2007/ImageSets/Main/trainval.txt").write_text(lines, newline="")
    dataset = open_box_files("pets", root=str(tmp_path), train=True, own=OWN)
    folder = tmp_path / "pets/VOC2007/JPEGImages"
    assert [
        Path(dataset.name(i)).relative_to(folder).with_suffix("").as_posix()
        for i in range(len(dataset))
    ] == LINES[lines]


def test_lines_that_name_nothing_are_told_by_number(tmp_path):
    """Unknown flags, extensions and folders, typos and other encodings are errors."""
    pets(tmp_path, {"a": xml(THING)})
    listed = tmp_path / "pets/VOC2007/ImageSets/Main/trainval.txt"
    for line in ("a 2", "a car", "a.png", "/home/me/a.jpg", "b"):
        listed.write_text(f"a\n{line}\n")
        with pytest.raises(
            ValueError,
            match=re.escape(
                f"{listed}: line 2 lists {line}, which is neither an image nor an annotation"
            ),
        ):
            open_box_files("pets", root=str(tmp_path), train=True, own=OWN)
    listed.write_bytes("a\n".encode("utf-16"))
    with pytest.raises(ValueError, match=re.escape(f"{listed} is no text in UTF-8")):
        open_box_files("pets", root=str(tmp_path), train=True, own=OWN)


def test_two_images_of_one_name_are_named_both(tmp_path):
    """It is unknown which image the annotation belongs to; leaving one out decides it."""
    pets(tmp_path, {"a": xml(THING), "b": xml()})
    folder = tmp_path / "pets/VOC2007/JPEGImages"
    Image.fromarray(np.zeros((40, 60, 3), np.uint8)).save(folder / "a.png")
    with pytest.raises(
        ValueError, match=re.escape(f"{folder}/a.jpg and {folder}/a.png have one name; keep one")
    ):
        pets(tmp_path, {"a": xml(THING), "b": xml()})
    (tmp_path / "skip.txt").write_text("pets/VOC2007/JPEGImages/a.jpg\n")
    dataset = open_box_files(
        "pets", root=str(tmp_path), train=True, own=OWN, skip=str(tmp_path / "skip.txt")
    )
    assert [Path(dataset.name(i)).name for i in range(2)] == ["a.png", "b.jpg"]


def test_classes_that_differ_by_case_alone_are_refused(tmp_path):
    """VOC's names ignore case, so one of the two classes would never occur."""
    write_voc(tmp_path / "pets/VOC2007", {"a": xml(THING)}, trainval=["a"])
    with pytest.raises(
        ValueError, match="the classes Dog, dog differ in the case of their letters alone"
    ):
        open_box_files(
            "pets", root=str(tmp_path), train=True, own=BoxOptions(classes=("Dog", "cat", "dog"))
        )


def test_missing_and_broken_images_are_named(tmp_path):
    """A missing partner or list, a name without files and a truncated image are errors."""
    files = {name: xml(thing("dog", 1, 1, 9, 9)) for name in ("a", "b", "c", "d")}
    folder = tmp_path / "pets/VOC2007"
    pets(tmp_path, files)
    (folder / "JPEGImages/a.jpg").unlink()
    (folder / "Annotations/b.xml").unlink()
    (folder / "JPEGImages/c.jpg").write_bytes((folder / "JPEGImages/c.jpg").read_bytes()[:-500])
    (folder / "ImageSets/Main/trainval.txt").write_text("a\nb\nc\nd\nnobody\n")
    with pytest.raises(ValueError, match="line 5 lists nobody, which is neither") as error:
        open_box_files("pets", root=str(tmp_path), train=True, own=OWN)
    for told in (
        r"a\.xml has no image",
        r"b\.jpg has no annotation",
        r"c\.jpg: truncated",
        r"trainval\.txt: line 5 lists nobody",
    ):
        assert re.search(told, str(error.value)), told
    (folder / "ImageSets/Main/trainval.txt").unlink()
    with pytest.raises(FileNotFoundError, match=r"ImageSets/Main/trainval\.txt does not exist"):
        open_box_files("pets", root=str(tmp_path), train=True, own=OWN)


def test_a_second_start_reads_nothing_and_notices_changes(tmp_path, monkeypatch):
    """The outcome of a check is recalled until a file comes or goes or a list changes.

    Corrected XML counts without a new check.
    """
    files = {name: xml(thing("dog", 1, 1, 9, 9)) for name in ("a", "b")}
    write_voc(tmp_path / "pets/VOC2007", files, trainval=["a", "b"])
    settle(tmp_path / "pets")
    first = open_box_files("pets", root=str(tmp_path), train=True, own=OWN)
    looked = []
    look = annotations.look_at
    monkeypatch.setattr(annotations, "look_at", lambda path: looked.append(path) or look(path))
    again = open_box_files("pets", root=str(tmp_path), train=True, own=OWN)
    assert not looked
    assert (again.pairs.images, again.pairs.labels) == (first.pairs.images, first.pairs.labels)
    np.testing.assert_array_equal(again.pairs.sizes, first.pairs.sizes)
    (tmp_path / "pets/VOC2007/Annotations/a.xml").write_text(xml(thing("dog", 1, 1, 8, 8)))
    np.testing.assert_array_equal(again.boxes(0)["boxes"], [[0, 0, 8, 8]])
    (tmp_path / "pets/VOC2007/ImageSets/Main/trainval.txt").write_text("a\n")
    assert len(open_box_files("pets", root=str(tmp_path), train=True, own=OWN)) == len(looked) == 1
    for file in (tmp_path / "cache").iterdir():
        file.write_bytes(b"damaged")
    assert len(open_box_files("pets", root=str(tmp_path), train=True, own=OWN)) == 1


LAYOUTS = {
    "daytime_clear": (
        "daytime_clear",
        "Daytime-Clear",
        "daytime_sunny",
        "Daytime_Sunny/daytime_clear",
    ),
    "night_sunny": ("night_sunny", "Night-Sunny", "Night-Sunny/night_sunny"),
    "dusk_rainy": ("dusk_rainy", "dusk-rainy", "Dusk-rainy"),
    "night_rainy": ("night_rainy", "Night_Rainy", "Night-rainy/night_rainy"),
    "daytime_foggy": ("daytime_foggy", "Daytime_Foggy", "Daytime-Foggy/daytime_foggy"),
}


@pytest.mark.parametrize(
    "spelling", [(domain, layout) for domain, layouts in LAYOUTS.items() for layout in layouts]
)
@pytest.mark.parametrize("packed", [False, True])
def test_diverse_weather(tmp_path, spelling, packed):
    """Every spelling in use is found, unpacked or in an archive.

    daytime_clear is tested on its test.txt, the others on train.txt.
    """
    domain, layout = spelling
    folder = tmp_path / "diverse_weather"
    files = {
        name: xml("".join(thing(k, 1, 1, 9, 9) for k in DIVERSE_WEATHER.names))
        for name in ("a", "b", "c")
    }
    write_voc(folder / layout / "VOC2007", files, train=["a", "b"], test=["c"])
    if packed:
        with zipfile.ZipFile(tmp_path / "all.zip", "w") as archive:
            for path in sorted(folder.rglob("*.*")):
                archive.write(path, path.relative_to(folder))
        for path in (folder / layout.split("/")[0]).rglob("*.*"):
            path.unlink()
        (folder / layout.split("/")[0]).rename(tmp_path / "empty")
        (tmp_path / "all.zip").rename(folder / "all.zip")
    dataset = open_boxes(domain, root=str(tmp_path), train=False)
    assert [Path(dataset.name(i)).stem for i in range(len(dataset))] == (
        ["c"] if domain == "daytime_clear" else ["a", "b"]
    )
    sample = dataset[0]
    assert sample["classes"].tolist() == list(range(7))
    assert DIVERSE_WEATHER.names == ("bus", "bike", "car", "motor", "person", "rider", "truck")
    if domain == "daytime_clear":
        assert len(open_boxes(domain, root=str(tmp_path), train=True)) == 2
    else:
        with pytest.raises(ValueError, match=f"{domain}' is kept unseen"):
            open_boxes(domain, root=str(tmp_path), train=True)


def test_unknown_domains_and_folders(tmp_path):
    """An unknown name, a dataset without instances and a missing folder give a remedy."""
    with pytest.raises(
        ValueError,
        match=r"unknown domain 'nigth_rainy'; known are clear, .*night_rainy.*data\.boxes",
    ):
        open_boxes("nigth_rainy", root=str(tmp_path), train=False)
    with pytest.raises(ValueError, match="gta5 has no boxes, as it is published without instances"):
        open_boxes("gta5", root=str(tmp_path), train=True)
    with pytest.raises(
        FileNotFoundError, match="diverse_weather should hold night_rainy/VOC2007/JPEGImages"
    ):
        open_boxes("night_rainy", root=str(tmp_path), train=False)
    with pytest.raises(FileNotFoundError, match=r"data root .* does not exist"):
        open_boxes("carla", root=str(tmp_path / "nowhere"), train=False)


def test_domains_mix(tmp_path):
    """Two domains of the same classes follow each other; others are refused."""
    write_voc(tmp_path / "pets/VOC2007", {"a": xml(thing("dog", 1, 1, 9, 9))}, trainval=["a"])
    write_voc(tmp_path / "zoo/VOC2007", {"b": xml()}, trainval=["b"])
    dataset = open_boxes("pets+zoo", root=str(tmp_path), train=True, own=OWN)
    assert ([Path(dataset.name(i)).stem for i in range(2)], len(dataset[1]["boxes"])) == (
        ["a", "b"],
        0,
    )
    with pytest.raises(ValueError, match="cannot be mixed, their classes differ"):
        open_boxes("pets+clear", root=str(tmp_path), train=True, own=OWN)


def test_streets_boxes_are_those_of_the_scenes():
    """The boxes are the renderer's, the same in every weather, and inside the picture."""
    options = StreetsOptions(size=(64, 128), images=3, val_images=2, seed=5)
    clear, fog = (
        open_boxes(domain, root="nowhere", train=False, streets=options)
        for domain in ("clear", "fog")
    )
    assert (len(clear), clear.labels) == (2, STREETS_THINGS)
    for i in range(2):
        scene = streets.render(11, i, "clear", size=(64, 128))
        sample = clear[i]
        assert [CITYSCAPES.names[k] for k in scene.box_labels] == [
            clear.labels.names[k] for k in sample["classes"]
        ]
        np.testing.assert_array_equal(sample["boxes"], scene.boxes)
        np.testing.assert_array_equal(sample["image"], scene.image)
        assert len(sample["boxes"]) == len(sample["crowd"]) == len(sample["difficult"]) > 0
        for key in ("boxes", "classes"):
            np.testing.assert_array_equal(fog[i][key], clear[i][key])
    assert (fog[0]["image"] != clear[0]["image"]).any()


def test_hidden_files_are_no_images_and_names_are_composed(tmp_path):
    """`._a.jpg` and notebook checkpoints do not count; a name may be composed in several ways."""
    base = tmp_path / "pets/VOC2007"
    write_voc(base, {"Zu\u0308rich": xml(thing("dog", 1, 1, 9, 9))}, trainval=["Z\xfcrich"])
    (base / "Annotations/Zu\u0308rich.xml").rename(base / "Annotations/Z\xfcrich.xml")
    for name in (
        "JPEGImages/._a.jpg",
        "Annotations/._a.xml",
        "JPEGImages/.ipynb_checkpoints/a.jpg",
    ):
        (base / name).parent.mkdir(exist_ok=True)
        (base / name).write_text("hidden")
    for own in (OWN, BoxOptions(lists=("", ""), classes=OWN.classes)):
        dataset = open_boxes("pets", root=str(tmp_path), train=True, own=own)
        assert [Path(dataset.name(i)).name for i in range(len(dataset))] == ["Zu\u0308rich.jpg"]
