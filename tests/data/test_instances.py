"""Boxes around the instances of label images, compared with a plain loop over the pixels."""

from pathlib import Path
import re

import cv2
import numpy as np
from PIL import Image
import pytest

from jaxdg.data import instances
from jaxdg.data.boxes import THINGS, BoxFiles, open_box_files

H = 24
W = 40
STEMS = {
    "cityscapes": (
        "leftImg8bit/{split}/ulm/ulm_0_0_leftImg8bit.png",
        "gtFine/{split}/ulm/ulm_0_0_gtFine_instanceIds.png",
    ),
    "bdd100k": ("images/10k/{split}/0a-1.jpg", "labels/ins_seg/bitmasks/{split}/0a-1.png"),
    "synthia": ("RGB/0000000.png", "GT/LABELS/0000000.png"),
}


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch) -> None:
    """Each test keeps its outcomes in a folder of its own."""
    monkeypatch.setenv("JAXDG_CACHE", str(tmp_path / "cache"))


def slow(label: np.ndarray) -> dict[tuple[int, ...], list[int]]:
    """The extent of every value of a label image, pixel by pixel."""
    found: dict[tuple[int, ...], list[int]] = {}
    for y in range(label.shape[0]):
        for x in range(label.shape[1]):
            box = found.setdefault(tuple(np.atleast_1d(label[y, x]).tolist()), [x, y, x + 1, y + 1])
            found[tuple(np.atleast_1d(label[y, x]).tolist())] = [
                min(box[0], x),
                min(box[1], y),
                max(box[2], x + 1),
                max(box[3], y + 1),
            ]
    return found


def blobs(rng: np.random.Generator, values: list) -> np.ndarray:
    """Overlapping rectangles and single pixels of the given values, the first as background."""
    label = np.zeros((H, W, *np.shape(values[0])), np.int64) + np.array(values[0])
    for value in values[1:]:
        for _ in range(2):
            y, x, h, w = rng.integers((0, 0, 1, 1), (H, W, 9, 12))
            label[y : y + h, x : x + w] = value
    return label


def save(root: Path, dataset: str, label: np.ndarray, split: str = "train") -> BoxFiles:
    """Writes a tree of one image; the label has the publisher's channels, red first."""
    image, path = (root / dataset / name.format(split=split) for name in STEMS[dataset])
    for file in (image, path):
        file.parent.mkdir(parents=True, exist_ok=True)
    cv2.imwrite(str(image), np.zeros((*label.shape[:2], 3), np.uint8))
    order = {2: slice(None), 3: [2, 1, 0], 4: [2, 1, 0, 3]}[
        label.shape[2] if label.ndim == 3 else 2
    ]
    cv2.imwrite(str(path), label[..., order] if label.ndim == 3 else label)
    return open_box_files(dataset, root=str(root), train=split == "train")


def check(dataset: BoxFiles, expected: list[tuple[str, bool, list[int], int]]) -> None:
    sample = dataset[0]
    assert sample["image"].shape == (H, W, 3)
    assert (sample["boxes"].dtype, sample["classes"].dtype) == (np.float32, np.int32)
    assert (sample["crowd"].dtype, sample["difficult"].tolist()) == (bool, [False] * len(expected))
    fields = (sample[key].tolist() for key in ("crowd", "boxes", "areas"))
    found = zip((THINGS.names[k] for k in sample["classes"]), *fields, strict=True)
    assert sorted(found) == sorted(expected)


@pytest.mark.parametrize("seed", range(4))
def test_cityscapes(tmp_path, seed):
    """The eight things have boxes, crowds by class id; stuff and other objects have none."""
    things = {
        24: "person",
        25: "rider",
        26: "car",
        27: "truck",
        28: "bus",
        31: "train",
        32: "motorcycle",
        33: "bicycle",
    }
    values = [
        7,
        0,
        23,
        24,
        24000,
        24001,
        25003,
        26,
        26000,
        26017,
        27000,
        28001,
        29,
        29001,
        30000,
        31000,
        32000,
        33,
        33002,
    ]
    label = blobs(np.random.default_rng(seed), values).astype(np.uint16)
    expected = []
    for (value,), box in slow(label).items():
        name = things.get(value // 1000 if value >= 1000 else value)
        expected += [(name, value < 1000, box, np.sum(label == value))] if name else []
    assert any(crowd for _, crowd, _, _ in expected)
    check(save(tmp_path, "cityscapes", label, "val" if seed else "train"), expected)


@pytest.mark.parametrize("seed", range(4))
def test_bdd100k(tmp_path, seed):
    """Instance ids have two bytes; ignored objects and crowds are flagged, others are not."""
    names = [None, "person", "rider", "car", "truck", "bus", "train", "motorcycle", "bicycle"]
    values = [
        [0, 0, 0, 0],
        [1, 0, 0, 1],
        [1, 8, 0, 2],
        [2, 4, 1, 2],
        [3, 1, 0, 3],
        [3, 2, 2, 3],
        [4, 12, 0, 4],
        [5, 0, 0, 255],
    ]
    values += [[6, 3, 1, 0], [7, 0, 0, 7], [8, 0, 255, 255]]
    label = blobs(np.random.default_rng(seed), values).astype(np.uint8)
    pixels = {v: np.sum((label == v).all(2)) for v in slow(label)}
    expected = [
        (names[v[0]], v[1] % 4 > 0, box, pixels[v]) for v, box in slow(label).items() if v[0]
    ]
    check(save(tmp_path, "bdd100k", label, "val" if seed else "train"), expected)


@pytest.mark.parametrize("seed", range(4))
def test_synthia(tmp_path, seed):
    """Red holds classes and green instances; a thing without a number is a crowd.

    Buildings have no boxes.
    """
    things = {
        10: "person",
        17: "rider",
        8: "car",
        18: "truck",
        19: "bus",
        20: "train",
        12: "motorcycle",
        11: "bicycle",
    }
    values = [
        [3, 0, 0],
        [2, 5, 0],
        [8, 300, 0],
        [8, 301, 0],
        [8, 0, 0],
        [10, 40000, 0],
        [10, 7, 0],
        [17, 7, 0],
        [19, 1, 0],
    ]
    values += [[12, 2, 0], [11, 3, 0], [0, 9, 0]]
    label = blobs(np.random.default_rng(seed), values).astype(np.uint16)
    pixels = {v: np.sum((label == v).all(2)) for v in slow(label)}
    expected = [
        (things[v[0]], v[1] == 0, box, pixels[v])
        for v, box in slow(label).items()
        if v[0] in things
    ]
    check(save(tmp_path, "synthia", label, "val" if seed else "train"), expected)


def test_extents_on_large_images_and_on_nothing():
    """There may be as many ids as pixels, the largest id, or an empty image."""
    ids, boxes, pixels = instances.extents(np.arange(12).reshape(3, 4))
    assert (ids.tolist(), pixels.tolist()) == (list(range(1, 12)), [1] * 11)
    np.testing.assert_array_equal(
        boxes, [[k % 4, k // 4, k % 4 + 1, k // 4 + 1] for k in range(1, 12)]
    )
    ids, boxes, pixels = instances.extents(np.full((2, 3), 65535, np.uint16))
    assert (ids.tolist(), boxes.tolist(), pixels.tolist()) == ([65535], [[0, 0, 3, 2]], [6])
    assert instances.extents(np.zeros((2, 3), np.uint16))[1].shape == (0, 4)


@pytest.mark.parametrize(
    ("dataset", "value", "told"),
    [
        ("bdd100k", [9, 0, 0, 1], "holds category 9; allowed are 0 to 8"),
        ("synthia", [23, 0, 0], "holds class 23; allowed are 0 to 22"),
    ],
)
def test_strange_classes_are_named(tmp_path, dataset, value, told):
    """A class outside the publisher's table is an error with the path."""
    label = np.zeros(
        (H, W, len(value)), np.uint8 if dataset == "bdd100k" else np.uint16
    ) + np.array(value, np.uint8)
    files = save(tmp_path, dataset, label.astype(np.uint8 if dataset == "bdd100k" else np.uint16))
    with pytest.raises(ValueError, match=re.escape(f"{files.pairs.labels[0]}: {told}")):
        files[0]


@pytest.mark.parametrize("dataset", STEMS)
def test_labels_of_another_form_and_damaged_ones_are_named(tmp_path, dataset):
    """8-bit grey, damage, another size and a missing partner are errors that name the file."""
    files = save(tmp_path, dataset, np.zeros((H, W), np.uint8))
    path = Path(files.pairs.labels[0])
    with pytest.raises(
        ValueError,
        match=re.escape(str(path)) + r": a label with instances must be a (16|8)-bit \w+ image",
    ):
        files[0]
    data = bytearray(path.read_bytes())
    data[45:50] = b"break"
    path.write_bytes(data)
    with pytest.raises(ValueError, match=re.escape(str(path)) + ": damaged"):
        files[0]
    channels, dtype = {
        "cityscapes": ((), np.uint16),
        "bdd100k": ((4,), np.uint8),
        "synthia": ((3,), np.uint16),
    }[dataset]
    cv2.imwrite(str(path), np.zeros((H, W + 1, *channels), dtype))
    with pytest.raises(ValueError, match=re.escape(str(path)) + " is 41x24 but was 40x24"):
        files[0]
    found: list = []
    open_box_files(dataset, root=str(tmp_path), train=True, defects=found)
    assert [(defect.path, defect.text) for defect in found] == [
        (str(path), " is 41x24 but its image is 40x24")
    ]
    path.unlink()
    path.with_name(path.name.replace("0", "1", 1)).write_bytes(data)
    with pytest.raises(ValueError, match="has no label"):
        open_box_files(dataset, root=str(tmp_path), train=True)


@pytest.mark.parametrize("dataset", STEMS)
@pytest.mark.parametrize("kind", ["JPEG", "WEBP"])
def test_lossy_labels_are_refused_at_the_start_and_when_read(tmp_path, dataset, kind):
    """A JPEG or WebP label is refused whatever its name; other formats must become PNG."""
    form = {
        "cityscapes": np.zeros((H, W), np.uint16),
        "bdd100k": np.zeros((H, W, 4), np.uint8),
        "synthia": np.zeros((H, W, 3), np.uint16),
    }
    files = save(tmp_path, dataset, form[dataset])
    assert files[0]["boxes"].shape == (0, 4)
    path = Path(files.pairs.labels[0])
    Image.fromarray(np.zeros((H, W, 3), np.uint8)).save(path, kind)
    with pytest.raises(
        ValueError,
        match=re.escape(
            f"{path}: a label must not be a {'WebP' if kind == 'WEBP' else kind} image"
        ),
    ):
        files[0]
    found: list = []
    open_box_files(dataset, root=str(tmp_path), train=True, defects=found)
    assert [defect.path for defect in found] == [str(path)]
    Image.fromarray(np.zeros((H, W, 3), np.uint8)).save(path, "TIFF")
    with pytest.raises(
        ValueError,
        match=re.escape(
            f"{path}: a label of several channels or 16 bits must be a PNG file, this one is TIFF"
        ),
    ):
        files[0]
