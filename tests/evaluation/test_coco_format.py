"""COCO's JSON files: what they hold, that pycocotools scores them the same, and that they read
back.
"""

import contextlib
import io
import json

import numpy as np
import pytest

from jaxdg.evaluation.average_precision import COCO_NUMBERS, AveragePrecision, Detections, Truth
from jaxdg.evaluation.coco_format import read_coco, write_coco
from tests.detection import scenes

NAMES = ("car", "bus", "person")


@pytest.fixture
def drawn():
    """30 images of float32 boxes: truths and detections, the first without any area of a mask."""
    rng = np.random.default_rng(3)
    images = [scenes.image(rng, len(NAMES)) for _ in range(30)]

    def jitter(boxes):
        return boxes + rng.random(2, np.float32)[[0, 1, 0, 1]]

    truths = [
        Truth(jitter(t.boxes), t.classes, t.difficult, t.crowd, t.areas if i else None)
        for i, (t, _) in enumerate(images)
    ]
    return truths, [Detections(jitter(d.boxes), d.scores, d.classes) for _, d in images]


def write(folder, truths, detections):
    """Writes the files of domain `night`; gives their paths."""
    n = len(truths)
    write_coco(
        folder, "night", NAMES, [f"{i}.jpg" for i in range(n)], [(240, 320)] * n, truths, detections
    )
    return folder / "night_truth.json", folder / "night.json"


def coco_numbers(names, truths, detections):
    """The twelve numbers, None as -1 as in pycocotools."""
    scores = AveragePrecision(names)
    for truth, found in zip(truths, detections, strict=True):
        scores.add(truth, found)
    return [-1 if v is None else v / 100 for v in scores.results()["coco"].values()]


def test_pycocotools_loads_both_files_and_gives_the_same_numbers(tmp_path, drawn):
    """What `AveragePrecision` says in memory is what pycocotools says of the two files, to 1e-9."""
    coco = pytest.importorskip("pycocotools.coco", reason="pycocotools is not installed")
    cocoeval = pytest.importorskip("pycocotools.cocoeval", reason="pycocotools is not installed")
    truth_file, detections_file = write(tmp_path, *drawn)
    with contextlib.redirect_stdout(io.StringIO()):
        truth = coco.COCO(str(truth_file))
        judge = cocoeval.COCOeval(truth, truth.loadRes(str(detections_file)), "bbox")
        judge.evaluate()
        judge.accumulate()
        judge.summarize()
    np.testing.assert_allclose(coco_numbers(NAMES, *drawn), judge.stats, rtol=0, atol=1e-9)
    assert len(judge.stats) == len(COCO_NUMBERS)


def test_files_read_back(tmp_path, drawn):
    """Names, boxes, classes, scores and flags are those written, exactly; areas are the boxes'
    where there were none.
    """
    names, truths, detections = read_coco(*write(tmp_path, *drawn))
    assert names == NAMES
    for read, written in zip(truths, drawn[0], strict=True):
        for field in ("boxes", "classes", "difficult", "crowd"):
            np.testing.assert_array_equal(getattr(read, field), getattr(written, field))
        box = written.boxes.astype(float)
        areas = (
            (box[:, 2] - box[:, 0]) * (box[:, 3] - box[:, 1])
            if written.areas is None
            else written.areas
        )
        np.testing.assert_array_equal(read.areas, areas)
    for read, written in zip(detections, drawn[1], strict=True):
        for field in ("boxes", "classes", "scores"):
            np.testing.assert_array_equal(getattr(read, field), getattr(written, field))
    assert coco_numbers(names, truths, detections) == coco_numbers(NAMES, *drawn)


@pytest.mark.parametrize("domain", ["/elsewhere/town", "../elsewhere/./town"])
def test_a_domain_that_is_a_path_is_written_inside(tmp_path, drawn, domain):
    """Below the folder of results, and not beside the images; class names of any characters are
    kept.
    """
    names = [f"{name}, [red] %" for name in NAMES]
    write_coco(tmp_path / "out", domain, names, ["a.jpg"], [(240, 320)], drawn[0][:1], drawn[1][:1])
    assert sorted(p.relative_to(tmp_path).as_posix() for p in tmp_path.rglob("*.json")) == [
        "out/elsewhere/town.json",
        "out/elsewhere/town_truth.json",
    ]
    assert read_coco(
        tmp_path / "out/elsewhere/town_truth.json", tmp_path / "out/elsewhere/town.json"
    )[0] == tuple(names)


def test_the_files_say_exactly_this(tmp_path):
    """Keys, 1-based ids, x y width height, and a domain with a slash in its name; an image without
    boxes stays listed.
    """
    empty = np.zeros((0, 4), np.float32), np.zeros(0, np.int64)
    truths = [
        Truth(*empty, np.zeros(0, bool), np.zeros(0, bool)),
        Truth(
            np.array([[1, 2, 11, 5], [0, 0, 2, 2.5]], np.float32),
            np.array([2, 0], np.uint8),
            np.array([True, False]),
            np.array([False, True]),
        ),
    ]
    found = [
        Detections(empty[0], np.zeros(0, np.float32), empty[1]),
        Detections(truths[1].boxes[:1], np.array([0.5]), np.array([1])),
    ]
    write_coco(
        tmp_path / "detections",
        "acdc/night",
        NAMES,
        ["a.png", "b.png"],
        [(4, 6), (8, 12)],
        truths,
        found,
    )
    annotations = json.loads((tmp_path / "detections" / "acdc" / "night_truth.json").read_text())
    assert annotations["images"] == [
        {"id": 1, "file_name": "a.png", "height": 4, "width": 6},
        {"id": 2, "file_name": "b.png", "height": 8, "width": 12},
    ]
    assert annotations["categories"] == [
        {"id": 1, "name": "car"},
        {"id": 2, "name": "bus"},
        {"id": 3, "name": "person"},
    ]
    assert annotations["annotations"] == [
        {
            "id": 1,
            "image_id": 2,
            "category_id": 3,
            "bbox": [1, 2, 10, 3],
            "area": 30,
            "iscrowd": 0,
            "difficult": 1,
        },
        {
            "id": 2,
            "image_id": 2,
            "category_id": 1,
            "bbox": [0, 0, 2, 2.5],
            "area": 5,
            "iscrowd": 1,
            "difficult": 0,
        },
    ]
    results = json.loads((tmp_path / "detections" / "acdc" / "night.json").read_text())
    assert results == [{"image_id": 2, "category_id": 2, "bbox": [1, 2, 10, 3], "score": 0.5}]


def test_files_of_others_are_read_by_their_ids(tmp_path):
    """Ids with gaps and in any order, and annotations without area and flags: classes and images
    come in the order of their ids.
    """
    truth = {
        "images": [{"id": 70}, {"id": 5}],
        "categories": [{"id": 90, "name": "z"}, {"id": 3, "name": "a"}],
        "annotations": [{"id": 1, "image_id": 70, "category_id": 90, "bbox": [1, 1, 3, 4]}],
    }
    found = [{"image_id": 5, "category_id": 3, "bbox": [0, 0, 2, 2], "score": 0.25}]
    (tmp_path / "t.json").write_text(json.dumps(truth))
    (tmp_path / "d.json").write_text(json.dumps(found))
    names, truths, detections = read_coco(tmp_path / "t.json", tmp_path / "d.json")
    assert names == ("a", "z")
    assert [t.boxes.tolist() for t in truths] == [[], [[1, 1, 4, 5]]]
    assert (truths[1].classes, truths[1].areas, truths[1].crowd, truths[1].difficult) == (
        [1],
        [12],
        [False],
        [False],
    )
    assert [d.boxes.tolist() for d in detections] == [[[0, 0, 2, 2]], []]
    assert (detections[0].scores, detections[0].classes) == ([0.25], [0])


def test_mistakes_are_said(tmp_path, drawn):
    """An absent file, broken JSON, a missing key, an unknown class and unequal lists are refused
    with the file's name and the reason.
    """
    truth_file, detections_file = write(tmp_path, *drawn)
    with pytest.raises(FileNotFoundError, match=r"nowhere\.json"):
        read_coco(tmp_path / "nowhere.json", detections_file)
    other = tmp_path / "other.json"
    wrong = {
        "[": r"other\.json: not JSON",
        '[{"image_id": 1, "category_id": 1, "bbox": [0, 0, 1, 1]}]': r"other\.json: .*'score'",
        '[{"image_id": 1, "category_id": 4, "bbox": [0, 0, 1, 1], "score": 1}]': (
            r"other\.json: category_id 4 is not in"
        ),
        '{"image_id": 1}': r"other\.json: not a COCO results file",
    }
    for text, message in wrong.items():
        other.write_text(text)
        with pytest.raises(ValueError, match=message):
            read_coco(truth_file, other)
    other.write_text("[]")
    with pytest.raises(ValueError, match=r"other\.json: not a COCO annotation file"):
        read_coco(other, detections_file)
    with pytest.raises(ValueError, match="night: 1 files, 1 sizes, 30 truths and 30 detections"):
        write_coco(tmp_path, "night", NAMES, ["a"], [(1, 1)], *drawn)


def test_entries_of_one_id_and_flags_that_are_none_are_refused(tmp_path, drawn):
    """Two images or classes of one id and a missing key are named; flags written as text are what
    they say.
    """
    truth_file, detections_file = write(tmp_path, *drawn)
    whole = json.loads(truth_file.read_text())
    for key in ("images", "categories"):
        doubled = {**whole, key: [*whole[key], whole[key][0]]}
        truth_file.write_text(json.dumps(doubled))
        with pytest.raises(
            ValueError, match=rf"night_truth\.json: two of the {key} have one id, 1; renumber one"
        ):
            read_coco(truth_file, detections_file)
    rows = [
        {
            **row,
            "iscrowd": str(row["iscrowd"]),
            "difficult": "True" if row["difficult"] else "false",
        }
        for row in whole["annotations"]
    ]
    truth_file.write_text(json.dumps({**whole, "annotations": rows}))
    for truth, expected in zip(read_coco(truth_file, detections_file)[1], drawn[0], strict=True):
        np.testing.assert_array_equal(truth.crowd, expected.crowd)
        np.testing.assert_array_equal(truth.difficult, expected.difficult)
    for change, told in (
        ({"iscrowd": "some"}, "has the iscrowd 'some'; allowed are 0 and 1"),
        ({"bbox": ...}, "entry 1 .* has no 'bbox'"),
    ):
        row = {
            key: value
            for key, value in {**whole["annotations"][0], **change}.items()
            if value is not ...
        }
        truth_file.write_text(json.dumps({**whole, "annotations": [row]}))
        with pytest.raises(ValueError, match=told):
            read_coco(truth_file, detections_file)
