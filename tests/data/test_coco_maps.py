"""Label maps of COCO files: against pycocotools' masks drawn slowly, and what is refused."""

import builtins
import json
import os
from pathlib import Path
import pickle
from typing import Any

import numpy as np
from PIL import Image
from pycocotools import mask
from pycocotools.coco import COCO
import pytest

from jaxdg.data import class_check, coco_maps
from jaxdg.data.class_counts import class_pixels, truth_ids
from jaxdg.data.coco_maps import CocoMaps, lengths_of
from jaxdg.data.datasets import Dataset, FolderOptions, StreetsOptions
from jaxdg.data.domains import open_domain

CLASSES = ("car", "road", "dog")
OWN = FolderOptions("photos", "truth.json", classes=CLASSES)
IDS = {7: "dog", 1000: "car", 3: "road"}


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch) -> None:
    """Each test keeps its outcomes in a folder of its own."""
    monkeypatch.setenv("JAXDG_CACHE", str(tmp_path / "cache"))


def content(seed: int = 0, count: int = 30) -> dict[str, Any]:
    """Four images, one of them bare, with polygons, both kinds of run lengths, and crowds."""
    rng = np.random.default_rng(seed)
    images = [
        {"id": 10 + i, "file_name": f"{i}.png", "height": h, "width": w}
        for i, (h, w) in enumerate(rng.integers(8, 40, (4, 2)).tolist())
    ]
    rows = []
    for k in range(count):
        e = images[int(rng.integers(1, 4))]
        h, w = e["height"], e["width"]
        drawn = np.asfortranarray(rng.random((h, w)) < rng.random() / 2, np.uint8)
        compressed: Any = mask.encode(drawn)
        compressed["counts"] = compressed["counts"].decode()
        plain = np.flatnonzero(np.diff(drawn.ravel("F"), prepend=0, append=2))
        lengths = np.diff(plain, prepend=0).tolist()
        polygons = [(rng.random((n, 2)) * [w, h]).round(2).ravel().tolist() for n in (3, 5)]
        forms = (polygons[: 1 + k % 2], compressed, {"size": [h, w], "counts": lengths})
        rows.append(
            {
                "id": k,
                "image_id": e["id"],
                "category_id": int(rng.choice(list(IDS))),
                "segmentation": forms[k % 3],
                "iscrowd": int(k % 7 == 0),
            }
        )
    categories = [{"id": i, "name": name} for i, name in IDS.items()]
    return {"images": images, "annotations": rows, "categories": categories}


def write(root: Path, truth: dict[str, Any], labels: str = "truth.json") -> Path:
    (root / "photos").mkdir(parents=True, exist_ok=True)
    (root / labels).write_text(json.dumps(truth))
    for e in truth["images"]:
        pixels = np.full((e["height"], e["width"], 3), e["id"], np.uint8)
        Image.fromarray(pixels).save(root / "photos" / e["file_name"])
    return root


def opened(root: Path, own: FolderOptions = OWN, **options) -> CocoMaps:
    options = {"train": True, "streets": StreetsOptions(), "folder": own} | options
    found = open_domain("yard", root=str(root), **options)
    assert isinstance(found, CocoMaps)
    return found


def slow_map(oracle: COCO, image: int, classes: dict[int, int], background: int) -> np.ndarray:
    """The annotations of an image, each drawn by `annToMask`, sorted in plain Python."""
    masks = [(oracle.annToMask(a), a) for a in oracle.loadAnns(oracle.getAnnIds(image))]
    e = oracle.imgs[image]
    found = np.full((e["height"], e["width"]), background)
    for inside, a in sorted(masks, key=lambda pair: -int(pair[0].sum())):
        found[inside == 1] = 255 if a["iscrowd"] else classes[a["category_id"]]
    return found


# pycocotools' own code on NumPy 2.
@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
def test_equals_pycocotools_drawn_slowly(tmp_path):
    """Maps of polygons and of both kinds of run lengths are pycocotools' masks, larger ones below.

    What no annotation covers is ignored, or of the class `background` wherever it stands.
    """
    oracle = COCO(str(write(tmp_path, content()) / "truth.json"))
    for classes in (CLASSES, ("dog", "Background", "road", "car")):
        dataset = opened(tmp_path, FolderOptions("photos", "truth.json", classes=classes))
        assert isinstance(dataset, Dataset)
        train_ids = {i: classes.index(name) for i, name in IDS.items()}
        for i, image in enumerate(oracle.imgs):
            expected = slow_map(oracle, image, train_ids, 255 if classes == CLASSES else 1)
            sample = dataset[i]
            np.testing.assert_array_equal(sample["label"], expected)
            assert (sample["image"] == image).all()
            assert sample["label"].dtype == np.uint8
            ids, counts = truth_ids(dataset, i)
            want = np.unique(expected, return_counts=True)
            np.testing.assert_array_equal((ids, counts), want)
            np.testing.assert_array_equal(
                class_pixels(dataset)[i], [(expected == k).sum() for k in range(len(classes))]
            )
        again = pickle.loads(pickle.dumps(dataset))
        np.testing.assert_array_equal(again.label(2), dataset.label(2))


def square(x: int, y: int, side: int, category: int, **more: Any) -> dict[str, Any]:
    corners = [x, y, x + side, y, x + side, y + side, x, y + side]
    return {"image_id": 1, "category_id": category, "segmentation": [corners], **more}


def scene(*annotations: dict[str, Any]) -> dict[str, Any]:
    return {
        "images": [{"id": 1, "file_name": "1.png", "height": 8, "width": 10}],
        "annotations": [{"id": k, **a} for k, a in enumerate(annotations, start=1)],
        "categories": [{"id": i, "name": name} for i, name in IDS.items()],
    }


def test_what_lies_on_top(tmp_path):
    """Of squares drawn by hand the smaller is on top, of equal ones the later; a wrong `area` in
    the file changes nothing, and a crowd is ignored where nothing smaller covers it.
    """
    truth = scene(
        square(0, 0, 2, 7, area=999),
        square(0, 0, 4, 3, area=1),
        square(4, 0, 3, 3),
        square(5, 0, 3, 1000),
        square(0, 4, 4, 7, iscrowd="true"),
        square(0, 4, 1, 1000),
    )
    found = opened(write(tmp_path, truth)).label(0)
    expected = ["22111000.."] * 2 + ["11111000..", "1111......", "0........."] + ["." * 10] * 3
    told = ["".join("." if v == 255 else str(v) for v in row) for row in found.tolist()]
    assert told == expected


def test_categories_by_number(tmp_path):
    """An `id_map` maps categories by their ids, several to one class; `ignore` lists ids too."""
    truth = scene(square(0, 0, 2, 7), square(2, 0, 2, 1000), square(4, 0, 2, 3))
    root = write(tmp_path, truth)
    own = FolderOptions("photos", "truth.json", classes=("background", "thing"))
    own.id_map = {7: 1, 1000: 1}
    with pytest.raises(
        ValueError,
        match=r"annotation 3 is of the category 'road', which is none of the classes background,"
        r" thing; map its id in data\.folder\.id_map, list its id in data\.folder\.ignore, or",
    ):
        opened(root, own)
    own.ignore = (3,)
    assert opened(root, own).label(0)[0].tolist() == [1, 1, 1, 1, 255, 255, 0, 0, 0, 0]
    named = FolderOptions("photos", "truth.json", classes=("dog", "car"), ignore=(3,))
    assert opened(root, named).label(0)[0].tolist() == [0, 0, 1, 1, *[255] * 6]
    with pytest.raises(ValueError, match=r"'road', .* dog, car; name it in data\.folder\.classes,"):
        opened(root, FolderOptions("photos", "truth.json", classes=("dog", "car")))
    own.id_map[3] = 2
    with pytest.raises(ValueError, match=r"id_map maps to train ids \[2\]"):
        opened(root, own)


SIZE = {"size": [8, 10]}
WRONG = {
    "none": ({"segmentation": []}, "has no segmentation, of which a label map is drawn"),
    "a text": ({"segmentation": "x"}, "has the segmentation 'x', neither polygons nor run lengths"),
    "a flat list": ({"segmentation": [1, 1, 5, 1, 5, 5]}, "has the polygon 1; allowed is"),
    "words": ({"segmentation": [["a"] * 6]}, "has the polygon ['a', 'a', 'a', 'a', 'a', 'a'];"),
    "nan": ({"segmentation": [[float("nan")] * 6]}, "has the polygon [nan, nan, nan, nan, nan, n"),
    "two points": ({"segmentation": [[1, 1, 3, 3]]}, "has a polygon of 4 numbers; allowed are x"),
    "odd": ({"segmentation": [[1, 1, 3, 3, 4, 4, 5]]}, "has a polygon of 7 numbers; allowed are x"),
    "far away": (
        {"segmentation": [[1, 1, 5, 1, 5, 9.5]]},
        "has a polygon outside the image (x 1 to 5, y 1 to 9.5 of 10x8)",
    ),
    "another size": (
        {"segmentation": {"size": [10, 8], "counts": [80]}},
        "has run lengths of the size [10, 8] (height, width) in an image 10x8",
    ),
    "too few": (
        {"segmentation": {**SIZE, "counts": [7, 72]}},
        "has run lengths of 79 pixels in an",
    ),
    "too many": ({"segmentation": {**SIZE, "counts": "`3"}}, "has run lengths of 112 pixels in an"),
    "negative": (
        {"segmentation": {**SIZE, "counts": [-1, 81]}},
        "has the run lengths [-1, 81], wh",
    ),
    "cut": ({"segmentation": {**SIZE, "counts": "`"}}, "has the run lengths '`', which are none"),
    "no letters": ({"segmentation": {**SIZE, "counts": "\u00e4"}}, "has the run lengths '\u00e4',"),
    "no counts": ({"segmentation": SIZE}, "has the run lengths None, which are none of COCO's"),
    "a flag": ({"iscrowd": "maybe"}, "has the iscrowd 'maybe', which is neither yes (1) nor no"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_regions_are_named(tmp_path, case):
    """Each fault is told with its image and annotation before a run begins."""
    change, told = WRONG[case]
    root = write(tmp_path, scene(square(0, 0, 2, 7), square(1, 1, 3, 3) | change))
    with pytest.raises(ValueError, match=r"1\.png: annotation 2 of truth\.json ") as error:
        opened(root)
    assert f"annotation 2 of truth.json {told}" in str(error.value)


def test_run_lengths_are_decoded_as_pycocotools_encodes_them():
    """Lengths of all magnitudes come out of the compressed form as they went in."""
    rng = np.random.default_rng(1)
    for high in (2, 40, 3000, 200000):
        lengths = rng.integers(1, high, 40).tolist()
        size = [sum(lengths), 1]
        text: Any = mask.frPyObjects({"size": size, "counts": lengths}, *size)["counts"]
        found = lengths_of(text)
        assert found is not None
        assert found.tolist() == lengths


def test_what_else_is_refused(tmp_path, monkeypatch):
    """Suffixes that would mean nothing, one class alone, and a missing pycocotools."""
    root = write(tmp_path, scene(square(0, 0, 2, 7)))
    suffixes = FolderOptions("photos", "truth.json", image_suffix=".png", classes=CLASSES)
    with pytest.raises(ValueError, match=r"truth\.json, which names its images: leave data\.f"):
        opened(root, suffixes)
    alone = opened(root, FolderOptions("photos", "truth.json", classes=("dog",)))
    wrong = class_check.fault(class_check.show(alone, 10, 10.0))
    assert wrong is not None
    assert wrong.endswith(
        'set classes=("background", "dog") in data.folder if what no annotation covers is'
        " background"
    )
    real = builtins.__import__

    def without(name: str, *rest: Any) -> Any:
        if name.startswith("pycocotools"):
            raise ModuleNotFoundError(name)
        return real(name, *rest)

    monkeypatch.setattr(builtins, "__import__", without)
    monkeypatch.setenv("JAXDG_CACHE", str(tmp_path / "another"))
    with pytest.raises(ValueError, match=r'need pycocotools: `pip install "jaxdg\[coco\]"`'):
        opened(root)


def test_records_and_skip_lists(tmp_path):
    """`prepare` writes the same maps; other classes are noticed; skipped images are left out."""
    from jaxdg.commands.prepare import prepare

    root = write(tmp_path / "files", content(1))
    files = opened(root)
    prepare("yard", {"train": files}, root=str(root), out=str(tmp_path / "out"))
    options = {"root": str(tmp_path / "out"), "train": True, "streets": StreetsOptions()}
    records = open_domain("yard", folder=OWN, **options)
    for i in range(4):
        np.testing.assert_array_equal(records[i]["label"], files.label(i))
    other = FolderOptions("photos", "truth.json", classes=CLASSES, id_map={7: 0, 1000: 1, 3: 2})
    with pytest.raises(ValueError, match="written with other classes or label ids"):
        open_domain("yard", folder=other, **options)
    (root / "skip.txt").write_text("photos/1.png\n")
    rest = opened(root, skip=str(root / "skip.txt"))
    assert [Path(rest.name(i)).name for i in range(3)] == ["0.png", "2.png", "3.png"]
    np.testing.assert_array_equal(rest.label(1), files.label(2))


def test_a_second_start_draws_nothing_and_notices_changes(tmp_path, monkeypatch):
    """The regions are kept until the file changes."""
    root = write(tmp_path, scene(square(0, 0, 2, 7)))
    for place in (root / "photos", *root.rglob("*.*")):
        os.utime(place, (1, 1))
    first = opened(root).label(0)
    with monkeypatch.context() as patched:
        patched.setattr(coco_maps, "_rasterised", None)
        np.testing.assert_array_equal(opened(root).label(0), first)
    write(root, scene(square(0, 0, 2, 3)))
    assert (opened(root).label(0) != first).sum() == 4
