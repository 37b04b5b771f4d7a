"""Boxes in YOLO's text files: against VOC's and COCO's forms of the same boxes, and bad lines."""

import json
import os
from pathlib import Path

import numpy as np
from PIL import Image
import pytest

from jaxdg.data import yolo_txt
from jaxdg.data.boxes import BoxFiles, BoxOptions, open_box_files, open_boxes
from jaxdg.data.class_counts import truth_ids

CLASSES = ("car", "Bus", "dog")
OWN = BoxOptions(("images", "images"), ("labels", "labels"), ("", ""), CLASSES)
H, W = 40, 60


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch) -> None:
    """Each test keeps its outcomes in a folder of its own."""
    monkeypatch.setenv("JAXDG_CACHE", str(tmp_path / "cache"))


def write(root: Path, files: dict[str, str | None], labels: str = "labels") -> Path:
    """Images with a text file each; none where the text is None."""
    for name, text in files.items():
        image = root / "images" / f"{name}.png"
        image.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.full((H, W, 3), len(name), np.uint8)).save(image)
        (root / labels).mkdir(exist_ok=True)
        if text is not None:
            label = root / labels / f"{name}.txt"
            label.parent.mkdir(parents=True, exist_ok=True)
            label.write_text(text)
    return root


def opened(root: Path, own: BoxOptions = OWN, **options) -> BoxFiles:
    return open_box_files("yard", root=str(root), train=True, own=own, **options)


def test_the_same_boxes_in_three_forms_give_the_same_arrays(tmp_path):
    """VOC's, COCO's and YOLO's files of one set of random boxes give equal arrays, bit for bit."""
    rng = np.random.default_rng(0)
    truth = []
    for i in range(8):
        edges = [np.sort(rng.choice(n + 1, (2, 2), replace=False), 0) for n in (W, H)]
        boxes = [(x0, y0, x1, y1) for (x0, x1), (y0, y1) in zip(*(e.T for e in edges), strict=True)]
        truth.append((f"s{i % 2}/{i}", boxes[: i % 3], rng.integers(0, 3, i % 3).tolist()))
    texts = {}
    annotations = []
    for i, (name, boxes, classes) in enumerate(truth):
        things = lines = ""
        for (x0, y0, x1, y1), k in zip(boxes, classes, strict=True):
            corners = zip(("xmin", "ymin", "xmax", "ymax"), (x0 + 1, y0 + 1, x1, y1), strict=True)
            inner = "".join(f"<{key}>{value}</{key}>" for key, value in corners)
            things += f"<object><name>{CLASSES[k]}</name><bndbox>{inner}</bndbox></object>"
            middle = f"{float((x0 + x1) / 2 / W)} {float((y0 + y1) / 2 / H)}"
            lines += f"{k} {middle} {float((x1 - x0) / W)} {float((y1 - y0) / H)}\n"
            bbox = [int(v) for v in (x0, y0, x1 - x0, y1 - y0)]
            annotations.append({"image_id": i, "category_id": k + 1, "bbox": bbox})
        texts[name] = lines if boxes else None
        xml = tmp_path / "xml" / f"{name}.xml"
        xml.parent.mkdir(parents=True, exist_ok=True)
        xml.write_text(f"<annotation>{things}</annotation>")
    write(tmp_path, texts)
    images = [
        {"id": i, "file_name": f"{name}.png", "height": H, "width": W}
        for i, (name, *_) in enumerate(truth)
    ]
    coco = {
        "images": sorted(images, key=lambda e: e["file_name"]),
        "annotations": [{"id": j, **a} for j, a in enumerate(annotations)],
        "categories": [{"id": k + 1, "name": name} for k, name in enumerate(CLASSES)],
    }
    (tmp_path / "coco.json").write_text(json.dumps(coco))
    yolo = opened(tmp_path)
    others = [
        opened(tmp_path, BoxOptions(OWN.images, (place, place), ("", ""), CLASSES))
        for place in ("xml", "coco.json")
    ]
    assert len(yolo) == 8
    assert yolo.box_counts is not None
    for i in range(len(yolo)):
        for other in others:
            assert other.name(i) == yolo.name(i)
            assert other.box_counts is not None
            assert other.box_counts[i] == yolo.box_counts[i] == len(yolo.boxes(i)["boxes"])
            for key, value in other[i].items():
                np.testing.assert_array_equal(yolo[i][key], value)
                assert yolo[i][key].dtype == value.dtype


def slow_ultralytics(text: str) -> list[list[float]]:
    """Class and x0 y0 x1 y1 in pixels, sorted, as Ultralytics finds them in a file of one kind."""
    rows = np.array([line.split() for line in text.splitlines()], object)
    if any(len(row) > 5 for row in rows):
        found = []
        for row in rows:
            points = np.array(row[1:], np.float32).reshape(-1, 2)
            found.append([float(row[0]), *points.min(0), *points.max(0)])
        found = np.array(found)
    else:
        box = rows.astype(np.float32)
        half = box[:, 3:] / 2
        found = np.concatenate([box[:, :1], box[:, 1:3] - half, box[:, 1:3] + half], 1)
    return (np.unique(found, axis=0) * [1, W, H, W, H]).tolist()


POLYGONS = "\n".join(
    [
        "0 0.1 0.1 0.5 0.2 0.3 0.9",
        "2 0.25 0.5 0.75 0.5 0.75 0.75 0.25 0.75",
        "0 0.1 0.1 0.5 0.2 0.3 0.9",
        "0 0.5 0.9 0.1 0.1 0.3 0.2",  # another outline in the same box
    ]
)
BOXES = "2 0.5 0.5 0.25 0.5\n0 .3 .4 .1 .2\n2 0.5 0.5 0.25 0.5\n1 0.5 0.5 0.25 0.5\n"


@pytest.mark.parametrize("text", [POLYGONS, BOXES])
def test_outlines_and_lines_that_occur_twice(tmp_path, text):
    """Outlines give the box around them, and one class and box count once, as in Ultralytics."""
    found = opened(write(tmp_path, {"a": text})).boxes(0)
    rows = np.concatenate([found["classes"][:, None], found["boxes"]], 1).tolist()
    assert len(rows) < len(text.splitlines())
    np.testing.assert_allclose(sorted(rows), slow_ultralytics(text), rtol=1e-6)
    first = [int(line[0]) for line in dict.fromkeys(text.splitlines())]
    assert found["classes"].tolist() == first[: len(rows)]  # the order of the file
    assert not found["crowd"].any()
    assert not found["difficult"].any()


def test_a_line_of_five_is_a_box_beside_outlines_too(tmp_path):
    """A line means the same whatever the other lines are; spaces, tabs and a BOM change nothing."""
    text = "\ufeff 1.0\t0.5 0.5  0.5 0.5 \r\n\n" + POLYGONS
    found = opened(write(tmp_path, {"a": text})).boxes(0)
    np.testing.assert_array_equal(found["boxes"][0], [15, 10, 45, 30])
    assert found["classes"][0] == 1


def test_up_to_a_pixel_outside_is_clipped(tmp_path):
    """Rounding of writers moves a box by less than a pixel, which is clipped as in other forms."""
    beyond = 1 / W * 0.99
    text = f"0 0.5 0.5 {1 + 2 * beyond} 1\n1 {-beyond} 0 0.5 {1 + beyond} 0.5 0.5"
    found = opened(write(tmp_path, {"a": text})).boxes(0)
    np.testing.assert_allclose(found["boxes"], [[0, 0, W, H], [0, 0, 30, H]], rtol=1e-6)


WRONG = {
    "pixels": ("1 30 20 10 10", "has the value 30, which is not normalised"),
    "percent": ("0 0.5 0.5 50 0.5", "has the value 50, which is not normalised"),
    "outline in pixels": ("0 0.5 0.5 0.6 0.6 7 0.1", "has the value 7, which is not normalised"),
    "a negative point": ("0 -0.5 0.5 0.6 0.6 0.7 0.1", "has the value -0.5, which is not"),
    "a score": ("0 0.5 0.5 0.1 0.1 0.9", "has six numbers, as a prediction with its score has"),
    "keypoints": ("0 0.5 0.5 0.1 0.1 0.2 0.2 2", "has 8 words; a line is a class and"),
    "too few": ("0 0.5 0.5 0.1", "has 4 words; a line is a class and"),
    "a class beyond": ("3 0.5 0.5 0.1 0.1", "has the class 3; known are 0 car, 1 Bus, 2 dog"),
    "a negative class": ("-1 0.5 0.5 0.1 0.1", "has the class -1; known are"),
    "half a class": ("0.5 0.5 0.5 0.1 0.1", "has the class 0.5; known are"),
    "a name": ("car 0.5 0.5 0.1 0.1", "has 'car', which is no number"),
    "a comma": ("0 0,5 0.5 0.1 0.1", "has '0,5', which is no number"),
    "nan": ("0 nan 0.5 0.1 0.1", "has 'nan', which is no number"),
    "no width": ("0 0.5 0.5 0 0.1", "has a box of 0x4 pixels"),
    "outside": ("0 0.95 0.5 0.2 0.2", "has a box outside the image (x 51 to 63, y 16 to 24 of"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_lines_are_named(tmp_path, case):
    """Each fault is told with path and line, at the start and when the image is read."""
    line, told = WRONG[case]
    good = "0 0.5 0.5 0.1 0.1\n\n"
    root = write(tmp_path, {"a": good + line + "\n", "b": good})
    with pytest.raises(ValueError, match=r"data\.skip") as error:
        opened(root)
    assert f"{root}/labels/a.txt: line 3 {told}" in str(error.value)
    assert "correct these files, or leave them out with data.skip" in str(error.value)
    (root / "labels/a.txt").write_text(good)
    dataset = opened(root)
    (root / "labels/a.txt").write_text(line)
    with pytest.raises(ValueError, match=r"a\.txt: line 1 ") as error:
        dataset[0]
    assert told in str(error.value)


def test_other_files_than_text_are_named(tmp_path):
    root = write(tmp_path, {"a": "0 0.5 0.5 0.1 0.1", "b": None})
    (root / "labels/b.txt").write_bytes(b"\xff\xfe0\x00")
    with pytest.raises(ValueError, match=r"b\.txt is no text in UTF-8 \(invalid start byte"):
        opened(root)


def test_images_without_a_file_have_no_boxes(tmp_path):
    """They count as images without boxes, with a note, unless no image has a file."""
    root = write(tmp_path, {"a": "1 0.5 0.5 0.1 0.1", "b": None, "c": ""})
    dataset = opened(root)
    assert [len(dataset[i]["boxes"]) for i in range(3)] == [1, 0, 0]
    assert [sum(truth_ids(dataset, i)[1]) for i in range(3)] == [1, 0, 0]
    path = dataset.name(1)
    assert dataset.pairs.notes == (f"1 of 3 images has no text file and so no boxes, as {path}",)
    (root / "labels/a.txt").rename(root / "labels/z.txt")
    (root / "labels/c.txt").unlink()
    with pytest.raises(
        ValueError, match=r"z\.txt has no image; .*/labels has a text file for none"
    ):
        opened(root)


def test_the_form_is_told_by_the_files(tmp_path):
    """XML and text for images in one folder are refused; other text files beside XML are not."""
    root = write(tmp_path, {"a": "1 0.5 0.5 0.1 0.1"})
    (root / "labels/a.xml").write_text("<annotation></annotation>")
    with pytest.raises(ValueError, match=r"a\.txt and .*a\.xml are annotations of two forms"):
        opened(root)
    (root / "labels/a.txt").rename(root / "labels/readme.txt")
    assert len(opened(root).boxes(0)["boxes"]) == 0
    (root / "labels").rename(root / "gone")
    with pytest.raises(FileNotFoundError, match="labels does not exist"):
        opened(root)


def test_images_and_files_in_one_folder_with_names_of_classes(tmp_path):
    """`classes.txt` is no annotation; the same names in another order are refused."""
    root = write(tmp_path, {"a": "1 0.5 0.5 0.1 0.1", "b": None}, labels="images")
    own = BoxOptions(OWN.images, OWN.images, ("", ""), CLASSES)
    for names in ("car\nbus\ndog\n", "person\ncar\n"):
        (root / "images" / yolo_txt.NAMES).write_text(names)
        assert opened(root, own).boxes(0)["classes"].tolist() == [1]
        (root / "images" / str(len(names))).touch()  # a new look
    (root / "images" / yolo_txt.NAMES).write_text("bus\ncar\ndog")
    (root / "images" / "new").touch()
    with pytest.raises(
        ValueError, match=r"classes\.txt has the classes of .* order, bus, car, dog"
    ):
        opened(root, own)


def test_lists_and_skip_lists(tmp_path):
    """A list names the images that count; a skip list leaves out an image by its text file."""
    box = "0 0.5 0.5 0.1 0.1\n"
    root = write(tmp_path, {"a": box, "b": box + "1 0.1 0.1 0.1 0.1", "c": None})
    (root / "few.txt").write_text("c\nb\n")
    own = BoxOptions(OWN.images, OWN.annotations, ("few.txt", "few.txt"), CLASSES)
    dataset = opened(root, own)
    assert [Path(dataset.name(i)).stem for i in range(2)] == ["c", "b"]
    (root / "skip.txt").write_text("labels/b.txt\n")
    rest = opened(root, skip=str(root / "skip.txt"))
    assert [Path(rest.name(i)).stem for i in range(len(rest))] == ["a", "c"]
    (root / "few.txt").write_text("c\nb\nz\n")
    with pytest.raises(ValueError, match=r"line 3 lists z, .*; correct the file$"):
        opened(root, own)


def test_records_hold_the_same(tmp_path):
    """`prepare` writes images with and without a text file, and records give the same arrays."""
    from jaxdg.commands.prepare import prepare

    root = write(tmp_path / "files", {"a": BOXES, "b": None})
    files = opened(root)
    prepare("yard", {"train": files}, root=str(root), out=str(tmp_path / "out"))
    records = open_boxes("yard", root=str(tmp_path / "out"), train=True, own=OWN)
    for i in range(2):
        assert records[i].keys() == files[i].keys()
        for key, value in files[i].items():
            np.testing.assert_array_equal(records[i][key], value)


def test_a_second_start_reads_no_file_and_notices_new_ones(tmp_path, monkeypatch):
    """The outcome of the check is kept until the folder changes."""
    root = write(tmp_path, {"a": "0 0.5 0.5 0.1 0.1", "b": None})
    for place in (root / "images", root / "labels", *root.rglob("*.*")):
        os.utime(place, (1, 1))
    opened(root)
    with monkeypatch.context() as patched:
        patched.setattr(yolo_txt, "read", None)
        assert opened(root).box_counts.tolist() == [1, 0]  # type: ignore
    (root / "labels/b.txt").write_text("0 0.5 0.5 0.1 0.1")
    assert opened(root).box_counts.tolist() == [1, 1]  # type: ignore
