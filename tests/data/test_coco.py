"""Boxes in COCO's annotation files, ACDC's among them.

They are compared with pycocotools where it is installed, and with the written values.
"""

import json
from pathlib import Path
import re
from typing import Any
import zipfile

import numpy as np
from PIL import Image
import pytest

from jaxdg.data import annotations
from jaxdg.data.boxes import THINGS, BoxFiles, BoxOptions, open_box_files, open_boxes
from jaxdg.evaluation.average_precision import AveragePrecision, Detections, Truth
from tests.data.test_boxes import settle

OWN = BoxOptions(images=("photos", "photos"), annotations=("instances.json", "instances.json"))


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch) -> None:
    """Each test keeps its outcomes in a folder of its own."""
    monkeypatch.setenv("JAXDG_CACHE", str(tmp_path / "cache"))


def content(count: int = 4, seed: int = 0) -> dict:
    """Images of several sizes in sub-folders, unordered categories, mixed boxes, some crowds.

    One image has no boxes.
    """
    rng = np.random.default_rng(seed)
    sizes = rng.integers(20, 60, (count, 2)).tolist()
    images = [
        {"id": 100 - i, "file_name": f"s{i % 2}/{i}.png", "height": h, "width": w}
        for i, (h, w) in enumerate(sizes)
    ]
    rows = []
    for k in range(30):
        e = images[int(rng.integers(1, count))]
        low, high = np.sort(rng.random((2, 2)), 0).round(3) * [e["width"], e["height"]]
        rows.append(
            {
                "id": k + 7,
                "image_id": e["id"],
                "category_id": int(rng.choice([3, 90, 17])),
                "bbox": [*low, *(high - low)],
            }
        )
        rows[-1] |= {"iscrowd": int(rng.random() < 0.2)} if k % 3 else {}
    categories = [
        {"id": 90, "name": "toothbrush"},
        {"id": 3, "name": "car"},
        {"id": 17, "name": "cat"},
    ]
    return {"images": images, "annotations": rows, "categories": categories}


def write(root: Path, truth: dict, file: str = "instances.json", images: str = "photos") -> None:
    (root / file).parent.mkdir(parents=True, exist_ok=True)
    (root / file).write_text(json.dumps(truth))
    for e in truth["images"]:
        path = root / images / e["file_name"]
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.full((e["height"], e["width"], 3), e["id"] % 256, np.uint8)).save(path)


def open_own(root: Path, own: BoxOptions = OWN, **options) -> BoxFiles:
    return open_box_files("photos", root=str(root), train=True, own=own, **options)


def test_equals_what_is_written(tmp_path):
    """Images keep their order, classes follow category ids, and boxes keep the file's order."""
    truth = content()
    write(tmp_path, truth)
    dataset = open_own(tmp_path)
    assert dataset.labels.names == ("car", "cat", "toothbrush")
    assert [
        Path(dataset.name(i)).relative_to(tmp_path / "photos").as_posix() for i in range(4)
    ] == [e["file_name"] for e in truth["images"]]
    for i, e in enumerate(truth["images"]):
        sample = dataset[i]
        mine = [a for a in truth["annotations"] if a["image_id"] == e["id"]]
        assert sample["image"].shape == (*dataset.size(i), 3) == (e["height"], e["width"], 3)
        assert (sample["image"] == e["id"]).all()
        expected = [[x, y, x + w, y + h] for x, y, w, h in (a["bbox"] for a in mine)]
        np.testing.assert_allclose(sample["boxes"], np.array(expected).reshape(-1, 4), atol=1e-5)
        assert sample["classes"].tolist() == [{3: 0, 17: 1, 90: 2}[a["category_id"]] for a in mine]
        assert sample["crowd"].tolist() == [a.get("iscrowd", 0) == 1 for a in mine]
        assert sample["difficult"].tolist() == [False] * len(mine)
    assert len(dataset.boxes(0)["boxes"]) == 0


def test_equals_pycocotools(tmp_path, capsys):
    """Images, boxes, categories and crowds equal those that pycocotools reads."""
    coco = pytest.importorskip("pycocotools.coco")
    write(tmp_path, content(6, seed=3))
    dataset = open_own(tmp_path)
    oracle = coco.COCO(str(tmp_path / "instances.json"))
    images = list(oracle.imgs.values())
    assert [Path(dataset.name(i)).name for i in range(6)] == [
        Path(e["file_name"]).name for e in images
    ]
    assert [c["name"] for c in oracle.loadCats(sorted(oracle.getCatIds()))] == list(
        dataset.labels.names
    )
    category = {k: i for i, k in enumerate(sorted(oracle.getCatIds()))}
    for i, e in enumerate(images):
        mine = oracle.loadAnns(oracle.getAnnIds(e["id"]))
        found = dataset.boxes(i)
        xywh = np.concatenate(
            [found["boxes"][:, :2], found["boxes"][:, 2:] - found["boxes"][:, :2]], 1
        )
        np.testing.assert_allclose(
            xywh, np.array([a["bbox"] for a in mine]).reshape(-1, 4), atol=1e-5
        )
        assert found["classes"].tolist() == [category[a["category_id"]] for a in mine]
        assert found["crowd"].tolist() == [bool(a.get("iscrowd", 0)) for a in mine]


def test_classes_of_the_options_count(tmp_path):
    """The options set the order of the classes; a class that they lack is refused."""
    truth = content()
    write(tmp_path, truth)

    def named(*classes):
        return BoxOptions(OWN.images, OWN.annotations, classes=classes)

    dataset = open_own(tmp_path, named("dog", "toothbrush", "cat", "car"))
    expected = [
        {3: 3, 17: 2, 90: 1}[a["category_id"]] for a in truth["annotations"] if a["image_id"] == 99
    ]
    assert dataset.boxes(1)["classes"].tolist() == expected
    told = (
        r"instances\.json: annotation 14 and 8 more are of the category 'toothbrush', which is none"
        r" of the classes car, cat; name it in"
    )
    with pytest.raises(ValueError, match=told):
        open_own(tmp_path, named("car", "cat"))


def test_a_second_start_parses_nothing_and_notices_changes(tmp_path, monkeypatch):
    """The parsed file is recalled until the annotation file changes in place."""
    truth = content()
    write(tmp_path, truth)
    settle(tmp_path)
    first = open_own(tmp_path)
    looked = []
    look = annotations.look_at
    monkeypatch.setattr(annotations, "look_at", lambda path: looked.append(path) or look(path))
    again = open_own(tmp_path)
    assert not looked
    for i in range(4):
        for key, array in first.boxes(i).items():
            np.testing.assert_array_equal(array, again.boxes(i)[key])
            assert array.dtype == again.boxes(i)[key].dtype
    truth["annotations"] = truth["annotations"][:3]
    (tmp_path / "instances.json").write_text(json.dumps(truth))
    assert sum(len(open_own(tmp_path).boxes(i)["boxes"]) for i in range(4)) == 3


BOX = {
    "zero": ([1, 1, 0, 5], "has a box of 0x5 pixels"),
    "negative": ([5, 5, -2, 3], "has a box of -2x3 pixels"),
    "outside": ([5, 5, 200, 3], "has a box outside the image (x 5 to 205, y 5 to 8 of "),
    "no box": ([1, 2, 3], "has no box of four numbers"),
    "text": (["1", 2, 3, 4], "has no box of four numbers"),
    "nothing": (None, "has no box of four numbers"),
}


@pytest.mark.parametrize("case", BOX)
def test_wrong_boxes_are_named(tmp_path, case):
    """The image, file and annotation id are named, and other boxes remain.

    A skipped image is no error.
    """
    truth = content()
    box, told = BOX[case]
    truth["annotations"][4]["bbox"] = box
    write(tmp_path, truth)
    image = next(e for e in truth["images"] if e["id"] == truth["annotations"][4]["image_id"])[
        "file_name"
    ]
    where = f"{tmp_path}/photos/{image}: annotation 11 of instances.json {told}"
    with pytest.raises(ValueError, match=re.escape(where)):
        open_own(tmp_path)
    dataset = open_own(tmp_path, defects=(defects := []))
    assert [defect.path + defect.text for defect in defects] == [
        next(d.path + d.text for d in defects if (d.path + d.text).startswith(where))
    ]
    assert sum(len(dataset.boxes(i)["boxes"]) for i in range(4)) == 29
    (tmp_path / "skip.txt").write_text(f"photos/{image}\n")
    dataset = open_own(tmp_path, skip=str(tmp_path / "skip.txt"))
    assert len(dataset) == 3
    assert sum(len(dataset.boxes(i)["boxes"]) for i in range(3)) == sum(
        a["image_id"] != truth["annotations"][4]["image_id"] for a in truth["annotations"]
    )


def test_wrong_files_are_named(tmp_path):
    """Missing and unknown images, other sizes and files that are not COCO's are errors."""
    truth = content()
    write(tmp_path, truth)
    (tmp_path / "photos/s1/3.png").unlink()
    Image.fromarray(np.zeros((9, 8, 3), np.uint8)).save(tmp_path / "photos/s0/2.png")
    truth["annotations"][0]["image_id"] = 5
    (tmp_path / "instances.json").write_text(json.dumps(truth))
    with pytest.raises(ValueError, match=r"data\.skip") as error:
        open_own(tmp_path)
    e = truth["images"][2]
    for told in (
        r"photos/s1/3\.png is listed by instances\.json as image 97, but does not exist",
        rf"photos/s0/2\.png is 8x9 but instances\.json says {e['width']}x{e['height']}",
        r"instances\.json: annotation 7 is of image 5, which is not listed",
    ):
        assert re.search(told, str(error.value)), told
    for text in ("[]", "{}", '{"images": [3], "annotations": [], "categories": []}', "{"):
        (tmp_path / "instances.json").write_text(text)
        with pytest.raises(ValueError, match=r"instances\.json: no COCO annotation file"):
            open_own(tmp_path)
    (tmp_path / "instances.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"instances\.json does not exist"):
        open_own(tmp_path)


def acdc(root: Path, condition: str, split: str, others: tuple[str, ...] = ()) -> None:
    """Writes one condition in the publisher's layout, one person in each image.

    Its file may list the images of others too.
    """
    ids = (24, 25, 26, 27, 28, 31, 32, 33)
    truth: dict = {
        "images": [],
        "annotations": [],
        "categories": [{"id": i, "name": n} for i, n in zip(ids, THINGS.names, strict=True)][::-1],
    }
    for i, name in enumerate((condition, *others)):
        file = f"{name}/{split}/GOPR0{i}/GOPR0{i}_frame_000{i}_rgb_anon.png"
        truth["images"].append({"id": i, "file_name": file, "height": 20, "width": 30})
        truth["annotations"].append(
            {"id": i + 1, "image_id": i, "category_id": 24, "bbox": [i, 2, 3, 4], "iscrowd": i % 2}
        )
    write(
        root,
        truth,
        f"gt_detection/{condition}/instancesonly_{condition}_{split}_gt_detection.json",
        "rgb_anon",
    )


@pytest.mark.parametrize("packed", [False, True])
def test_acdc(tmp_path, packed):
    """Conditions alone and together are read, unpacked or in archives.

    The training file of rain lists the other conditions too, which do not count.
    """
    conditions = ("fog", "night", "rain", "snow")
    for condition in conditions:
        acdc(tmp_path / "acdc", condition, "val")
        acdc(
            tmp_path / "acdc",
            condition,
            "train",
            others=("fog", "night", "snow") if condition == "rain" else (),
        )
    if packed:
        for name in ("rgb_anon", "gt_detection"):
            with zipfile.ZipFile(tmp_path / f"acdc/{name}_trainvaltest.zip", "w") as archive:
                for path in sorted((tmp_path / "acdc" / name).rglob("*.*")):
                    archive.write(path, path.relative_to(tmp_path / "acdc"))
            (tmp_path / "acdc" / name).rename(tmp_path / name)
    for train in (True, False):
        dataset = open_boxes("acdc", root=str(tmp_path), train=train)
        assert ([Path(dataset.name(i)).parts[-4] for i in range(len(dataset))], dataset.labels) == (
            list(conditions),
            THINGS,
        )
        rain = open_boxes("acdc/rain", root=str(tmp_path), train=train)
        assert len(rain) == 1
        sample = rain[0]
        np.testing.assert_array_equal(sample["boxes"], [[0, 2, 3, 6]])
        assert (THINGS.names[sample["classes"][0]], sample["image"].shape) == (
            "person",
            (20, 30, 3),
        )


def test_names_composed_differently_are_the_same_names(tmp_path):
    """Names in the JSON file, in the settings and on disk may be composed in different ways."""
    truth = content(count=2)
    for e in truth["images"]:
        e["file_name"] = f"Zu\u0308rich/{e['file_name']}"
    write(tmp_path, truth, "Zu\u0308rich.json", "Zu\u0308rich photos")
    composed = json.dumps(truth, ensure_ascii=False).replace("u\u0308", "\xfc")
    (tmp_path / "Zu\u0308rich.json").write_text(composed)
    own = BoxOptions(
        images=("Z\xfcrich photos", "Z\xfcrich photos"),
        annotations=("Z\xfcrich.json", "Z\xfcrich.json"),
    )
    dataset = open_own(tmp_path, own)
    assert [dataset.name(i) for i in range(2)] == [
        f"{tmp_path}/Zu\u0308rich photos/{e['file_name']}" for e in truth["images"]
    ]


def test_an_annotation_file_in_two_places_is_an_error(tmp_path):
    """ACDC's boxes lie in two archives with different JSON files; neither is preferred."""
    for archive in ("gt_detection.zip", "gt_detection (1).zip"):
        (tmp_path / "acdc").mkdir(exist_ok=True)
        with zipfile.ZipFile(tmp_path / "acdc" / archive, "w") as file:
            file.writestr(
                "gt_detection/fog/instancesonly_fog_val_gt_detection.json", json.dumps(content())
            )
    with pytest.raises(
        ValueError,
        match=(
            r"gt_detection \(1\)\.zip/.*\.json and .*gt_detection\.zip/.*\.json are two candidates"
        ),
    ):
        open_boxes("acdc/fog", root=str(tmp_path), train=False)


def small() -> dict:
    """Two images of 60x40 pixels with a box each."""
    sides = {"width": 60, "height": 40}
    return {
        "images": [
            {"id": 1, "file_name": "a.png", **sides},
            {"id": 2, "file_name": "b.png", **sides},
        ],
        "categories": [{"id": 3, "name": "car"}, {"id": 5, "name": "cat"}],
        "annotations": [
            {
                "id": 1,
                "image_id": 1,
                "category_id": 3,
                "bbox": [1, 2, 10, 10],
                "area": 50,
                "iscrowd": 0,
            },
            {
                "id": 2,
                "image_id": 2,
                "category_id": 5,
                "bbox": [5, 5, 20, 20],
                "area": 300.5,
                "iscrowd": 0,
            },
        ],
    }


def write_small(
    root: Path, truth: dict | list | str | bytes, images: tuple[str, str] = ("a.png", "b.png")
) -> BoxOptions:
    """Writes the two images and a file as it is."""
    for name in images:
        (root / "photos" / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.zeros((40, 60, 3), np.uint8)).save(root / "photos" / name)
    text = truth if isinstance(truth, str | bytes) else json.dumps(truth)
    (root / "instances.json").write_bytes(text if isinstance(text, bytes) else text.encode())
    return BoxOptions(OWN.images, OWN.annotations, classes=("car", "cat"))


def changed(where: str, value: Any) -> dict:
    """`small` with another value at a path such as `images.0.id`; `...` removes the key."""
    truth: dict = small()
    *path, last = (int(key) if key.isdigit() else key for key in where.split("."))
    entry: Any = truth
    for key in path:
        entry = entry[key]
    if value is ...:
        del entry[last]
    else:
        entry[last] = value
    return truth


FAULTS = [
    ("images.1.id", 1, ": the images 'a.png' and 'b.png' have one id, 1; renumber"),
    ("images.1.file_name", "a.png", ": the images 1 and 2 are one file, a.png; make them one"),
    ("images.1.file_name", "./a.png", ": the images 1 and 2 are one file, ./a.png; make them one"),
    ("images.1.file_name", 7, ": image 2 has the file_name 7"),
    ("images.1.file_name", "", ": image 2 has the file_name ''"),
    ("categories.1.id", 3, ": the categories 'car' and 'cat' have one id, 3"),
    ("categories.1.name", "car", ": the categories 3 and 5 have one name, 'car'"),
    ("categories.1.name", " ", ": category 5 has the name ' '"),
    (
        "categories.0.name",
        "Car",
        (
            ": annotation 1 is of the category 'Car', which is none of the classes car, cat; name"
            " it in data.boxes.classes"
        ),
    ),
    (
        "annotations.1.image_id",
        "2",
        (
            ": annotation 2 is of image '2' (a text, where the file has the number 2), which is not"
            " listed"
        ),
    ),
    (
        "images.1.id",
        "2",
        (
            ": annotation 2 is of image 2 (a number, where the file has the text '2'), which is not"
            " listed"
        ),
    ),
    (
        "annotations.1.image_id",
        True,
        ": annotation 2 has the image_id True; an id is a whole number or a text",
    ),
    ("annotations.1.image_id", [2], ": annotation 2 has the image_id [2]"),
    (
        "annotations.1.category_id",
        9,
        ": annotation 2 of instances.json has the unknown class 9 (known are 3 car, 5 cat)",
    ),
    (
        "annotations.1.category_id",
        "5",
        "has the unknown class '5' (a text, where the file has the number 5)",
    ),
    ("annotations.1.category_id", 5.5, ": annotation 2 of instances.json has the category_id 5.5"),
    (
        "annotations.1.bbox",
        [True, 2, 3, 4],
        ": annotation 2 of instances.json has no box of four numbers",
    ),
    (
        "annotations.1.bbox",
        [float("nan"), 2, 3, 4],
        ": annotation 2 of instances.json has no box of four numbers",
    ),
    (
        "annotations.1.bbox",
        [10**400, 2, 3, 4],
        ": annotation 2 of instances.json has no box of four numbers",
    ),
    (
        "annotations.1.iscrowd",
        "maybe",
        (
            ": annotation 2 of instances.json has the iscrowd 'maybe', which is neither yes (1) nor"
            " no (0)"
        ),
    ),
    ("annotations.1.iscrowd", 2, "has the iscrowd 2, which is neither yes"),
    ("annotations.1.iscrowd", [], "has the iscrowd [], which is neither yes"),
    ("annotations.1.ignore", "some", "has the ignore 'some', which is neither yes"),
    (
        "annotations.1.area",
        -1,
        (
            ": annotation 2 of instances.json has the area -1; allowed is a number of square pixels"
            " from 0"
        ),
    ),
    ("annotations.1.area", "300", "has the area '300'; allowed"),
    ("annotations.1.area", float("nan"), "has the area nan; allowed"),
    ("annotations", {"1": {}}, ": no COCO annotation file ('annotations' is no list of objects)"),
    *[
        ("images.1.width", v, f": image 2 (b.png) has the width {v!r}; allowed is a whole number")
        for v in (0, -1, "60", 60.5, True)
    ],
    *[
        (key, ..., f": no COCO annotation file (it has no '{key}', only ")
        for key in ("images", "annotations", "categories")
    ],
    *[(f"images.1.{key}", ..., f": image 2 has no {key}") for key in ("file_name",)],
    *[(f"images.1.{key}", ..., f": image 2 (b.png) has no {key}") for key in ("width", "height")],
    *[
        (f"{kind}s.1.id", ..., f": {kind} number 2 (counted from 1) has no id")
        for kind in ("annotation", "image")
    ],
    ("categories.1.id", ..., ": category number 2 (counted from 1) has no id"),
    ("categories.1.name", ..., ": category 5 has no name"),
    ("annotations.1.image_id", ..., ": annotation 2 has no image_id"),
    ("annotations.1.category_id", ..., ": annotation 2 of instances.json has no category_id"),
    ("annotations.1.bbox", ..., ": annotation 2 of instances.json has no bbox"),
]


@pytest.mark.parametrize(
    ("where", "value", "told"),
    FAULTS,
    ids=[f"{where} {value!r}"[:50] for where, value, _ in FAULTS],
)
def test_what_is_said_twice_or_not_at_all_is_named(tmp_path, where, value, told):
    """Entries that clash, ids of another type, missing keys and wrong values are named."""
    own = write_small(tmp_path, changed(where, value))
    with pytest.raises(ValueError, match=re.escape(told)) as error:
        open_own(tmp_path, own)
    assert "\n" not in str(error.value)
    defects: list = []
    if "no COCO annotation file" not in told:
        open_own(tmp_path, own, defects=defects)
        assert any(told in defect.path + defect.text for defect in defects)


FORMS = {
    "results": (json.dumps([{"image_id": 1, "score": 1}]), "a list, as files of results are"),
    "a key twice": (
        json.dumps(small())[:-1] + ', "annotations": []}',
        "the key 'annotations' occurs twice in one object",
    ),
    "a key twice, deeper": (
        json.dumps(small()).replace('"id": 2,', '"id": 2, "id": 3,', 1),
        "the key 'id' occurs twice in the object of id 3",
    ),
    "JSON lines": (
        "\n".join(json.dumps(a) for a in small()["annotations"]),
        "a file with one JSON value a line is not read",
    ),
    "cut": (json.dumps(small())[:-9], "no COCO annotation file"),
    "bytes": (b"\x89PNG\xff\xfe\x00", "no COCO annotation file"),
}


@pytest.mark.parametrize("case", FORMS)
def test_files_of_another_form_say_which(tmp_path, case):
    """A list, repeated keys, several values, half a file and another format are errors."""
    text, told = FORMS[case]
    own = write_small(tmp_path, text)
    with pytest.raises(
        ValueError, match=re.escape(f"{tmp_path}/instances.json: no COCO annotation file")
    ) as error:
        open_own(tmp_path, own)
    assert told in str(error.value)


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_texts_of_every_encoding_of_json(tmp_path, encoding):
    """A byte-order mark changes nothing."""
    own = write_small(tmp_path, json.dumps(small()).encode(encoding))
    assert open_own(tmp_path, own).boxes(0)["boxes"].tolist() == [[1, 2, 11, 12]]


def test_flags_in_every_spelling(tmp_path):
    """All spellings of yes and no are read; `ignore` and `difficult` both mark difficult boxes."""
    yes = ("1", 1, 1.0, True, "true", " Yes ")
    no = ("0", 0, 0.0, False, "false", "no", "", None)
    truth = small()
    rows = [(value, "iscrowd") for value in yes + no] + [
        (1, "ignore"),
        ("true", "difficult"),
        (0, "ignore"),
    ]
    truth["annotations"] = [
        {"id": i, "image_id": 1, "category_id": 3, "bbox": [i, 2, 3, 4], key: value}
        for i, (value, key) in enumerate(rows)
    ]
    found = open_own(tmp_path, write_small(tmp_path, truth)).boxes(0)
    assert found["crowd"].tolist() == [True] * 6 + [False] * 11
    assert found["difficult"].tolist() == [False] * 14 + [True, True, False]


def test_ids_that_are_equal_numbers_or_texts(tmp_path):
    """Whole floats and texts are ids; annotations of two images may share an id."""
    truth = changed("annotations.1.category_id", 5.0)
    truth["annotations"][1]["id"] = 1
    assert open_own(tmp_path, write_small(tmp_path, truth)).boxes(1)["classes"].tolist() == [1]
    truth["annotations"].append({**truth["annotations"][0]})
    with pytest.raises(ValueError, match="annotation 1 occurs twice; take one out"):
        open_own(tmp_path, write_small(tmp_path, truth))
    truth["annotations"].pop()
    for key, kind in (
        ("id", "images"),
        ("image_id", "annotations"),
        ("id", "categories"),
        ("category_id", "annotations"),
    ):
        for entry in truth[kind]:
            entry[key] = f"n{entry[key]:g}"
    assert open_own(tmp_path, write_small(tmp_path, truth)).boxes(1)["boxes"].tolist() == [
        [5, 5, 25, 25]
    ]


NAMES = {
    "./a.png": "a.png",
    ".\\a.png": "a.png",
    "s\\a.png": "s/a.png",
    "photos/a.png": "a.png",
    "s/../a.png": "a.png",
    "photos/photos/a.png": "photos/a.png",
}


@pytest.mark.parametrize("name", NAMES)
def test_names_that_mean_one_file_find_it(tmp_path, name):
    """A name may have dots, backslashes and the image folder's own name in front."""
    own = write_small(tmp_path, changed("images.0.file_name", name), (NAMES[name], "b.png"))
    assert open_own(tmp_path, own).name(0) == f"{tmp_path}/photos/{NAMES[name]}"


@pytest.mark.parametrize(
    "name", ["x/a.png", "/home/me/a.png", "http://host/photos/a.png", "C:\\photos\\a.png", "A.PNG"]
)
def test_names_of_files_elsewhere_are_not_guessed(tmp_path, name):
    """The error names the file that may be meant; an absolute path of the file is read."""
    own = write_small(tmp_path, changed("images.0.file_name", name))
    with pytest.raises(
        ValueError,
        match=(
            r"is listed by instances\.json as image 1, but does not exist.*if a\.png is meant,"
            r" write that"
        ),
    ):
        open_own(tmp_path, own)
    own = write_small(tmp_path, changed("images.0.file_name", f"{tmp_path}/photos/a.png"))
    assert open_own(tmp_path, own).boxes(0)["boxes"].tolist() == [[1, 2, 11, 12]]


def test_archives_say_the_same(tmp_path):
    """Boxes, areas and errors from a zip archive equal those from the folder."""
    own = write_small(tmp_path, small())
    packed = BoxOptions(
        ("all.zip/photos", "all.zip/photos"),
        ("all.zip/instances.json", "all.zip/instances.json"),
        classes=own.classes,
    )

    def pack() -> None:
        with zipfile.ZipFile(tmp_path / "all.zip", "w") as archive:
            for name in ("instances.json", "photos/a.png", "photos/b.png"):
                archive.write(tmp_path / name, name)

    pack()
    for i in range(2):
        for key, array in open_own(tmp_path, own).boxes(i).items():
            np.testing.assert_array_equal(open_own(tmp_path, packed).boxes(i)[key], array)
    write_small(tmp_path, changed("images.1.id", 1))
    pack()
    with pytest.raises(
        ValueError,
        match=r"all\.zip/instances\.json: the images 'a\.png' and 'b\.png' have one id, 1",
    ):
        open_own(tmp_path, packed)


def test_areas_are_those_of_the_file(tmp_path):
    """An area may be 0 or above the box's; without one, or with null, it is the box's.

    Rounding moves none across a border of COCO's sizes.
    """
    areas = [0, 12.5, 900, 1024, 1024.00001, 1023.99999, 9216.0001, None, ...]
    truth = small()
    truth["annotations"] = [
        {"id": i, "image_id": 2, "category_id": 3, "bbox": [i, 1, 4, 5], "area": area}
        for i, area in enumerate(areas)
    ]
    del truth["annotations"][-1]["area"]
    found = open_own(tmp_path, write_small(tmp_path, truth)).boxes(1)["areas"]
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, [*areas[:-2], 20, 20], rtol=1e-6)
    assert (np.sign(found[3:7] - np.array([1024, 1024, 1024, 9216], np.float32))).tolist() == [
        0,
        1,
        -1,
        1,
    ]


@pytest.mark.parametrize("seed", range(3))
def test_twelve_numbers_equal_pycocotools_on_the_file(tmp_path, seed, capsys):
    """The scores equal those of pycocotools on the same file with areas, crowds and sizes.

    Without the file's areas the scores by size differ, so the test would notice if they were not
    read.
    """
    coco = pytest.importorskip("pycocotools.coco")
    cocoeval = pytest.importorskip("pycocotools.cocoeval")
    truth = content(8, seed)
    rng = np.random.default_rng(seed)
    truth["images"] = [
        {**e, "width": 400, "height": 300, "id": i + 1} for i, e in enumerate(truth["images"])
    ]
    truth["annotations"] = []
    results = []
    for k in range(160):
        image = int(rng.integers(1, 9))
        category = int(rng.choice([3, 90, 17]))
        sides = np.exp(rng.uniform(np.log(8), np.log(200), 2)).round(2)
        x, y = (rng.random(2) * ([400, 300] - sides)).round(2).tolist()
        w, h = sides.tolist()
        area = round(float(w * h * rng.uniform(0.1, 1)), 3)
        row = {"image_id": image, "category_id": category, "bbox": [x, y, w, h]}
        truth["annotations"].append(
            {
                **row,
                "id": k + 1,
                "area": area,
                "iscrowd": int(rng.random() < 0.15),
                "ignore": int(k % 5 == 0),
            }
        )
        for _ in range(int(rng.integers(0, 3))):
            shift = rng.normal(scale=0.1, size=2) * sides
            box = [x + float(shift[0]), y + float(shift[1]), w, h]
            results.append(
                {
                    **row,
                    "bbox": np.array(box, np.float32).astype(float).tolist(),
                    "score": float(rng.random(dtype=np.float32)),
                }
            )
    write(tmp_path, truth)
    dataset = open_own(tmp_path)
    scores = {given: AveragePrecision(dataset.labels.names) for given in (True, False)}
    ids = sorted(c["id"] for c in truth["categories"])
    for i, e in enumerate(truth["images"]):
        mine = [r for r in results if r["image_id"] == e["id"]]
        boxes = np.array([r["bbox"] for r in mine]).reshape(-1, 4)
        found = Detections(
            np.concatenate([boxes[:, :2], boxes[:, :2] + boxes[:, 2:]], 1),
            np.array([r["score"] for r in mine]),
            np.array([ids.index(r["category_id"]) for r in mine], np.int32),
        )
        fields = dataset.boxes(i)
        for given, score in scores.items():
            areas = fields["areas"] if given else None
            score.add(Truth(**{**fields, "areas": areas}), found)
    oracle = coco.COCO(str(tmp_path / "instances.json"))
    judge = cocoeval.COCOeval(oracle, oracle.loadRes(results), "bbox")
    judge.evaluate()
    judge.accumulate()
    judge.summarize()
    numbers = {
        given: np.array([-1 if v is None else v / 100 for v in s.results()["coco"].values()])
        for given, s in scores.items()
    }
    np.testing.assert_allclose(numbers[True], judge.stats, rtol=0, atol=1e-9)
    assert np.abs(numbers[False] - judge.stats)[3:6].max() > 0.01


def test_lists_of_names_are_refused(tmp_path):
    """A JSON file lists its images itself, so another list would be ignored silently."""
    own = write_small(tmp_path, small())
    own.lists = ("train.txt", "val.txt")
    with pytest.raises(
        ValueError,
        match=r"data\.boxes\.lists names train\.txt, but only of VOC's or YOLO's files",
    ):
        open_own(tmp_path, own)
    own.lists = ("", "")
    assert len(open_own(tmp_path, own)) == 2


def test_files_that_order_their_categories_otherwise(tmp_path):
    """With named classes both files mean the same; without, each has its own order."""
    own = write_small(tmp_path, small())
    other = small()
    other["categories"] = [{"id": 9, "name": "car"}, {"id": 4, "name": "cat"}]
    for row, category in zip(other["annotations"], (9, 4), strict=True):
        row["category_id"] = category
    (tmp_path / "one.json").write_text((tmp_path / "instances.json").read_text())
    (tmp_path / "two.json").write_text(json.dumps(other))
    own = BoxOptions(OWN.images, ("{domain}.json", "{domain}.json"), classes=("cat", "car"))
    options: dict[str, Any] = {"root": str(tmp_path), "train": True}
    mixed = open_boxes("one+two", **options, own=own)
    assert [mixed[i]["classes"].tolist() for i in range(4)] == [[1], [0], [1], [0]]
    with pytest.raises(
        ValueError,
        match="'one' and 'two' cannot be mixed, their classes differ: car, cat and cat, car",
    ):
        open_boxes("one+two", **options, own=BoxOptions(OWN.images, own.annotations))
