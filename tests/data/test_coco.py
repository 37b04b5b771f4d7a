"""Boxes in COCO's annotation files, ACDC's among them: against pycocotools where it is installed, and against what was written."""

import json
from pathlib import Path
import re
import zipfile

import numpy as np
from PIL import Image
import pytest

from jaxdg.data import annotations
from jaxdg.data.boxes import THINGS, BoxFiles, BoxOptions, open_box_files, open_boxes
from tests.data.test_boxes import settle

OWN = BoxOptions(images=("photos", "photos"), annotations=("instances.json", "instances.json"))


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch) -> None:
    """Each test keeps its outcomes in a folder of its own."""
    monkeypatch.setenv("JAXDG_CACHE", str(tmp_path / "cache"))


def content(count: int = 4, seed: int = 0) -> dict:
    """Images of several sizes in sub-folders, categories out of order, boxes of images mixed, some crowds, one image without boxes."""
    rng = np.random.default_rng(seed)
    sizes = rng.integers(20, 60, (count, 2)).tolist()
    images = [{"id": 100 - i, "file_name": f"s{i % 2}/{i}.png", "height": h, "width": w} for i, (h, w) in enumerate(sizes)]
    rows = []
    for k in range(30):
        e = images[int(rng.integers(1, count))]
        low, high = np.sort(rng.random((2, 2)), 0).round(3) * [e["width"], e["height"]]
        rows.append({"id": k + 7, "image_id": e["id"], "category_id": int(rng.choice([3, 90, 17])), "bbox": [*low, *(high - low)]})
        rows[-1] |= {"iscrowd": int(rng.random() < 0.2)} if k % 3 else {}
    categories = [{"id": 90, "name": "toothbrush"}, {"id": 3, "name": "car"}, {"id": 17, "name": "cat"}]
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
    """Images as listed, classes by category id from 0, boxes as corners in the order of the file, crowds flagged."""
    truth = content()
    write(tmp_path, truth)
    dataset = open_own(tmp_path)
    assert dataset.labels.names == ("car", "cat", "toothbrush")
    assert [Path(dataset.name(i)).relative_to(tmp_path / "photos").as_posix() for i in range(4)] == [
        e["file_name"] for e in truth["images"]
    ]
    for i, e in enumerate(truth["images"]):
        sample, mine = dataset[i], [a for a in truth["annotations"] if a["image_id"] == e["id"]]
        assert sample["image"].shape == (*dataset.size(i), 3) == (e["height"], e["width"], 3)
        assert (sample["image"] == e["id"]).all()
        expected = [[x, y, x + w, y + h] for x, y, w, h in (a["bbox"] for a in mine)]
        np.testing.assert_allclose(sample["boxes"], np.array(expected).reshape(-1, 4), atol=1e-5)
        assert sample["classes"].tolist() == [{3: 0, 17: 1, 90: 2}[a["category_id"]] for a in mine]
        assert sample["crowd"].tolist() == [a.get("iscrowd", 0) == 1 for a in mine]
        assert sample["difficult"].tolist() == [False] * len(mine)
    assert len(dataset.boxes(0)["boxes"]) == 0


def test_equals_pycocotools(tmp_path, capsys):
    """Images, boxes, categories and crowds of every image are those that pycocotools finds."""
    coco = pytest.importorskip("pycocotools.coco")
    write(tmp_path, content(6, seed=3))
    dataset, oracle = open_own(tmp_path), coco.COCO(str(tmp_path / "instances.json"))
    images = list(oracle.imgs.values())
    assert [Path(dataset.name(i)).name for i in range(6)] == [Path(e["file_name"]).name for e in images]
    assert [c["name"] for c in oracle.loadCats(sorted(oracle.getCatIds()))] == list(dataset.labels.names)
    category = {k: i for i, k in enumerate(sorted(oracle.getCatIds()))}
    for i, e in enumerate(images):
        mine, found = oracle.loadAnns(oracle.getAnnIds(e["id"])), dataset.boxes(i)
        xywh = np.concatenate([found["boxes"][:, :2], found["boxes"][:, 2:] - found["boxes"][:, :2]], 1)
        np.testing.assert_allclose(xywh, np.array([a["bbox"] for a in mine]).reshape(-1, 4), atol=1e-5)
        assert found["classes"].tolist() == [category[a["category_id"]] for a in mine]
        assert found["crowd"].tolist() == [bool(a.get("iscrowd", 0)) for a in mine]


def test_classes_of_the_options_count(tmp_path):
    """Classes may be named in an order of one's own; one that is not named is refused."""
    truth = content()
    write(tmp_path, truth)
    named = lambda *classes: BoxOptions(OWN.images, OWN.annotations, classes=classes)
    dataset = open_own(tmp_path, named("dog", "toothbrush", "cat", "car"))
    expected = [{3: 3, 17: 2, 90: 1}[a["category_id"]] for a in truth["annotations"] if a["image_id"] == 99]
    assert dataset.boxes(1)["classes"].tolist() == expected
    with pytest.raises(ValueError, match=r"s\d/\d\.png: annotation \d+ of instances\.json has the unknown class 90 \(known are car, cat\)"):
        open_own(tmp_path, named("car", "cat"))


def test_a_second_start_parses_nothing_and_notices_changes(tmp_path, monkeypatch):
    """What was read is recalled until the annotation file changes in place."""
    truth = content()
    write(tmp_path, truth)
    settle(tmp_path)
    first = open_own(tmp_path)
    looked, look = [], annotations._look
    monkeypatch.setattr(annotations, "_look", lambda path: looked.append(path) or look(path))
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
    """With image, file and annotation id; listed as defects the others remain, and skipping the image goes on without it."""
    truth = content()
    box, told = BOX[case]
    truth["annotations"][4]["bbox"] = box
    write(tmp_path, truth)
    image = next(e for e in truth["images"] if e["id"] == truth["annotations"][4]["image_id"])["file_name"]
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
    """A missing image, another size, an annotation of no image, a file of another form, text that is no JSON, no file at all."""
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
        r"photos/s1/3\.png: unreadable \(FileNotFoundError",
        rf"photos/s0/2\.png is 8x9 but instances\.json says {e['width']}x{e['height']}",
        r"instances\.json: annotation 7 is of image 5, which is not listed",
    ):
        assert re.search(told, str(error.value)), told
    for text in ("[]", "{}", '{"images": [{}], "annotations": [], "categories": []}', "{"):
        (tmp_path / "instances.json").write_text(text)
        with pytest.raises(ValueError, match=r"instances\.json: no COCO annotation file"):
            open_own(tmp_path)
    (tmp_path / "instances.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"instances\.json does not exist"):
        open_own(tmp_path)


def acdc(root: Path, condition: str, split: str, others: tuple[str, ...] = ()) -> None:
    """One condition in the publisher's layout, one person in each image; its file may list the images of others too."""
    ids = (24, 25, 26, 27, 28, 31, 32, 33)
    truth: dict = {
        "images": [],
        "annotations": [],
        "categories": [{"id": i, "name": n} for i, n in zip(ids, THINGS.names, strict=True)][::-1],
    }
    for i, name in enumerate((condition, *others)):
        file = f"{name}/{split}/GOPR0{i}/GOPR0{i}_frame_000{i}_rgb_anon.png"
        truth["images"].append({"id": i, "file_name": file, "height": 20, "width": 30})
        truth["annotations"].append({"id": i + 1, "image_id": i, "category_id": 24, "bbox": [i, 2, 3, 4], "iscrowd": i % 2})
    write(root, truth, f"gt_detection/{condition}/instancesonly_{condition}_{split}_gt_detection.json", "rgb_anon")


@pytest.mark.parametrize("packed", [False, True])
def test_acdc(tmp_path, packed):
    """Conditions alone and together, unpacked or in archives; rain's training file lists the other conditions too, which it must not."""
    conditions = ("fog", "night", "rain", "snow")
    for condition in conditions:
        acdc(tmp_path / "acdc", condition, "val")
        acdc(tmp_path / "acdc", condition, "train", others=("fog", "night", "snow") if condition == "rain" else ())
    if packed:
        for name in ("rgb_anon", "gt_detection"):
            with zipfile.ZipFile(tmp_path / f"acdc/{name}_trainvaltest.zip", "w") as archive:
                for path in sorted((tmp_path / "acdc" / name).rglob("*.*")):
                    archive.write(path, path.relative_to(tmp_path / "acdc"))
            (tmp_path / "acdc" / name).rename(tmp_path / name)
    for train in (True, False):
        dataset = open_boxes("acdc", root=str(tmp_path), train=train)
        assert ([Path(dataset.name(i)).parts[-4] for i in range(len(dataset))], dataset.labels) == (list(conditions), THINGS)
        rain = open_boxes("acdc/rain", root=str(tmp_path), train=train)
        assert len(rain) == 1
        sample = rain[0]
        np.testing.assert_array_equal(sample["boxes"], [[0, 2, 3, 6]])
        assert (THINGS.names[sample["classes"][0]], sample["image"].shape) == ("person", (20, 30, 3))


def test_names_composed_differently_are_the_same_names(tmp_path):
    """The JSON file spells composed what the disk holds decomposed, the settings the other way round."""
    truth = content(count=2)
    for e in truth["images"]:
        e["file_name"] = f"Zu\u0308rich/{e['file_name']}"
    write(tmp_path, truth, "Zu\u0308rich.json", "Zu\u0308rich photos")
    composed = json.dumps(truth, ensure_ascii=False).replace("u\u0308", "\xfc")
    (tmp_path / "Zu\u0308rich.json").write_text(composed)
    own = BoxOptions(images=("Z\xfcrich photos",) * 2, annotations=("Z\xfcrich.json",) * 2)
    dataset = open_own(tmp_path, own)
    assert [dataset.name(i) for i in range(2)] == [f"{tmp_path}/Zu\u0308rich photos/{e['file_name']}" for e in truth["images"]]


def test_an_annotation_file_in_two_places_is_an_error(tmp_path):
    """ACDC's boxes in two archives of which one was fetched twice; the JSON file of the first was read."""
    for archive in ("gt_detection.zip", "gt_detection (1).zip"):
        (tmp_path / "acdc").mkdir(exist_ok=True)
        with zipfile.ZipFile(tmp_path / "acdc" / archive, "w") as file:
            file.writestr("gt_detection/fog/instancesonly_fog_val_gt_detection.json", json.dumps(content()))
    with pytest.raises(ValueError, match=r"gt_detection \(1\)\.zip/.*\.json and .*gt_detection\.zip/.*\.json are two candidates"):
        open_boxes("acdc/fog", root=str(tmp_path), train=False)
