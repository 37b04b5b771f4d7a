"""Average precision against three public evaluations, a slow version of VOC's development kit, and
counts by hand.

The golden file holds what pycocotools, detectron2 and mean-average-precision say;
tests/oracles/golden_average_precision.py makes it.
"""

import dataclasses

import numpy as np
import pytest

from jaxdg.evaluation.average_precision import (
    COCO_NUMBERS,
    AveragePrecision,
    Curves,
    Detections,
    Truth,
)
from tests.detection import scenes

CASES = (
    "mixed",
    "plain",
    "ties",
    "doubled",
    "many",
    "edges",
    "tenths",
    "difficult",
    "crowd",
    "no_detections",
    "no_truth",
)
CURVES = ("mixed", "ties", "many", "crowd", "no_detections", "no_truth")


def gathered(truths, detections, num_classes=5):
    """All boxes of whole sets."""
    scores = AveragePrecision([f"class {k}" for k in range(num_classes)])
    for truth, found in zip(truths, detections, strict=True):
        scores.add(truth, found)
    return scores


def judged(truths, detections, num_classes=5):
    """Results of whole sets."""
    return gathered(truths, detections, num_classes).results()


def numbers(values):
    """Values of a dictionary as an array, None as nan."""
    return np.array([np.nan if v is None else v for v in values.values()])


def stored(data, case):
    """Truths and detections of a golden case."""
    sets = []
    for kind, form in (("truth", Truth), ("found", Detections)):
        ends = np.cumsum(data[f"{case}/{kind}/count"])[:-1]
        columns = [
            np.split(data[f"{case}/{kind}/{field.name}"], ends)
            for field in dataclasses.fields(form)
        ]
        sets.append([form(*row) for row in zip(*columns, strict=True)])
    return sets


def one(true, found, scores, *, difficult=None, crowd=None):
    """An image of one class."""
    n = len(true)
    flags = [np.array(f or [False] * n, bool) for f in (difficult, crowd)]

    def as_boxes(rows):
        return np.array(rows, np.float32).reshape(-1, 4)

    truth = Truth(as_boxes(true), np.zeros(n, np.int32), *flags)
    return truth, Detections(
        as_boxes(found), np.array(scores, np.float32), np.zeros(len(found), np.int32)
    )


def devkit_curve(truths, detections, k):
    """Scores, recalls and precisions of the detections of a class that count, and how many true
    boxes there are, as VOC's development kit's text says it: in inclusive 1-based pixels, one box
    after another.
    """
    queue = []
    hit = []
    positives = 0
    for i, (truth, found) in enumerate(zip(truths, detections, strict=True)):
        optional = truth.difficult | truth.crowd
        positives += int((~optional[truth.classes == k]).sum())
        hit.append([False] * len(truth.classes))
        for box, score, c in zip(
            found.boxes.tolist(), found.scores.tolist(), found.classes, strict=True
        ):
            if c == k:
                queue.append((-score, len(queue), i, (box[0] + 1, box[1] + 1, box[2], box[3])))
    true = false = 0
    curve = []
    for score, _, i, box in sorted(queue):
        best = None
        best_iou = 0.0
        for j, (other, c) in enumerate(
            zip(truths[i].boxes.tolist(), truths[i].classes, strict=True)
        ):
            xmin = other[0] + 1
            ymin = other[1] + 1
            xmax = other[2]
            ymax = other[3]
            width = min(box[2], xmax) - max(box[0], xmin) + 1
            height = min(box[3], ymax) - max(box[1], ymin) + 1
            if c != k or width <= 0 or height <= 0:
                continue
            both = width * height
            either = (
                (box[2] - box[0] + 1) * (box[3] - box[1] + 1)
                + (xmax - xmin + 1) * (ymax - ymin + 1)
                - both
            )
            if both / either > best_iou:
                best = j
                best_iou = both / either
        if best is not None and best_iou > 0.5:
            if truths[i].difficult[best] or truths[i].crowd[best]:
                continue
            true = true + (not hit[i][best])
            false = false + hit[i][best]
            hit[i][best] = True
        else:
            false += 1
        curve.append((-score, true / max(positives, 1), true / (true + false)))
    return curve, positives


def devkit(truths, detections, k, eleven_points):
    """VOC's AP of a class from `devkit_curve`."""
    curve, positives = devkit_curve(truths, detections, k)
    if positives == 0:
        return np.nan
    _, recalls, precisions = zip(*curve, strict=True)
    if eleven_points:

        def best_from(t):
            return max((p for r, p in zip(recalls, precisions, strict=True) if r >= t), default=0.0)

        return 100 * sum(best_from(t) for t in np.arange(0.0, 1.1, 0.1)) / 11
    area = 0.0
    before = 0.0
    for i, recall in enumerate(recalls):
        area += (recall - before) * max(precisions[i:])
        before = recall
    return 100 * area


@pytest.mark.parametrize("case", CASES)
def test_all_twelve_numbers_equal_pycocotools(golden, case):
    """The twelve numbers, and AP50 of each class, are pycocotools' to 1e-9, and None exactly where
    it says -1.
    """
    data = np.load(golden / "average_precision.npz")
    result = judged(*stored(data, case))
    assert tuple(result["coco"]) == COCO_NUMBERS
    np.testing.assert_allclose(numbers(result["coco"]), data[f"{case}/coco"], rtol=0, atol=1e-9)
    np.testing.assert_allclose(
        numbers(result["protocols"]["coco"]["AP50"]), data[f"{case}/coco_AP50"], rtol=0, atol=1e-9
    )


@pytest.mark.parametrize("case", [case for case in CASES if case != "ties"])
@pytest.mark.parametrize("rule", ["voc07", "voc12"])
def test_voc_equals_detectron2(golden, case, rule):
    """AP of each class is that of detectron2's VOC evaluation on VOC's files to 1e-9, and None
    where all boxes are difficult or crowd.
    """
    data = np.load(golden / "average_precision.npz")
    result = judged(*stored(data, case))["protocols"][rule]
    np.testing.assert_allclose(numbers(result["AP50"]), data[f"{case}/{rule}"], rtol=0, atol=1e-9)


def test_equals_a_second_package(golden):
    """mean-average-precision, which computes in float32 and shares no code with the others, gives
    the same VOC and COCO numbers.
    """
    data = np.load(golden / "average_precision.npz")
    result = judged(*stored(data, "plain"))
    for rule in ("voc07", "voc12"):
        np.testing.assert_allclose(
            numbers(result["protocols"][rule]["AP50"]), data[f"plain_{rule}"], rtol=1e-6
        )
    np.testing.assert_allclose(result["coco"]["AP"], data["plain_coco_AP"], rtol=1e-6)


@pytest.mark.parametrize("ties", [False, True])
def test_voc_equals_the_development_kit(ties):
    """A loop in inclusive pixels gives the same AP on thousands of boxes, difficult, crowd, doubled
    and equally scored ones among them.
    """
    rng = np.random.default_rng(1)
    drawn = [scenes.image(rng, 3, most=20) for _ in range(150)]
    truths = [t for t, _ in drawn]
    detections = [d for _, d in drawn]
    if ties:
        detections = [dataclasses.replace(d, scores=np.ceil(d.scores * 3) / 3) for d in detections]
    assert sum(len(d.scores) for d in detections) > 2000
    result = judged(truths, detections, 3)["protocols"]
    for rule, eleven_points in (("voc07", True), ("voc12", False)):
        expected = [devkit(truths, detections, k, eleven_points) for k in range(3)]
        np.testing.assert_allclose(numbers(result[rule]["AP50"]), expected, rtol=0, atol=1e-9)


@pytest.mark.parametrize("case", CURVES)
def test_curves_equal_pycocotools(golden, case):
    """Precision at 101 recalls, and the scores that reach them, are pycocotools' for every class
    and IoU; the single detections at IoU 0.5 give the same precision.
    """
    curves = gathered(*stored(np.load(golden / "average_precision.npz"), case)).curves("coco")
    expected = np.load(golden / "curves.npz")
    assert curves.classes.tolist() == [f"class {k}" for k in range(5)]
    for name in ("precision", "score"):
        np.testing.assert_allclose(
            getattr(curves, f"coco_{name}"),
            np.moveaxis(expected[f"{case}/{name}"], 2, 0),
            rtol=0,
            atol=1e-12,
        )
    for k, precision in enumerate(curves.coco_precision[:, 0]):
        mine = curves.detection_class == k
        if np.isnan(precision).any():
            assert not mine.any()
            continue
        best = [
            curves.precision[mine & (curves.recall >= recall)].max(initial=0)
            for recall in curves.coco_recall
        ]
        np.testing.assert_allclose(precision, best, rtol=0, atol=1e-12)


def test_single_detections_equal_the_development_kit(tmp_path):
    """Score, recall and precision of every detection that counts are those of a loop over boxes,
    also when read back from the file; classes without truth have none.
    """
    rng = np.random.default_rng(2)
    drawn = list(zip(*[scenes.image(rng, 3, most=20) for _ in range(60)], strict=True))
    drawn[0] = [dataclasses.replace(t, difficult=t.difficult | (t.classes == 2)) for t in drawn[0]]
    gathered(*drawn, 3).curves().write(tmp_path, "acdc/fog")
    curves = Curves.read(tmp_path, "acdc/fog")
    assert Curves.read(tmp_path, "acdc") is None
    for k in range(3):
        mine = curves.detection_class == k
        found = np.stack([curves.score, curves.recall, curves.precision], axis=1)[mine]
        expected, positives = devkit_curve(*drawn, k)
        assert positives == 0 or len(found) > 100
        np.testing.assert_allclose(found, expected if positives else np.zeros((0, 3)), atol=1e-12)


@pytest.mark.parametrize("seed", range(3))
def test_pycocotools_live(seed):
    """On newly drawn scenes of float boxes, scored with and without ties, the twelve numbers are
    pycocotools' to 1e-9.
    """
    pytest.importorskip(
        "pycocotools", reason="pycocotools is not installed; its golden file is tested in any case"
    )
    rng = np.random.default_rng(100 + seed)
    drawn = [scenes.image(rng, 3, most=25) for _ in range(40)]
    truths = [
        dataclasses.replace(t, boxes=t.boxes + rng.random(2, np.float32).repeat(2)[[0, 2, 0, 2]])
        for t, _ in drawn
    ]
    detections = [
        d if seed else dataclasses.replace(d, scores=np.ceil(d.scores * 4) / 4) for _, d in drawn
    ]
    expected, ap50 = scenes.pycocotools_scores(truths, detections, 3)
    result = judged(truths, detections, 3)
    np.testing.assert_allclose(numbers(result["coco"]), expected, rtol=0, atol=1e-9)
    np.testing.assert_allclose(
        numbers(result["protocols"]["coco"]["AP50"]), ap50, rtol=0, atol=1e-9
    )


def test_one_hit_of_two_boxes_by_hand():
    """Recall 1/2 at precision 1 is 6 of 11 points, half the area, and 51 of 101 points; the main
    result follows the protocol.
    """
    truth, found = one([[0, 0, 10, 10], [20, 0, 30, 10]], [[0, 0, 10, 10]], [0.9])
    scores = AveragePrecision(["car", "bus"])
    scores.add(truth, found)
    expected = {"voc07": 100 * 6 / 11, "voc12": 50.0, "coco": 100 * 51 / 101}
    for rule, value in expected.items():
        result = scores.results(rule)
        assert result["mAP50"] == pytest.approx(
            value, abs=1e-12
        )  # the mean over the classes that occur
        assert result["AP50"] == {"car": pytest.approx(value, abs=1e-12), "bus": None}
        assert result["protocols"][rule] == {"mAP50": result["mAP50"], "AP50": result["AP50"]}
    assert scores.results()["mAP50"] == scores.results("voc07")["mAP50"]


def test_half_an_overlap_is_a_match_for_coco_alone():
    """IoU 0.5 is a match for COCO and none for VOC; with one pixel more it is one for both."""
    for height, voc in ((5, 0.0), (6, 100.0)):
        result = judged(
            *zip(one([[3, 2, 13, 12]], [[3, 2, 13, 2 + height]], [0.5]), strict=True), 1
        )["protocols"]
        assert (result["voc07"]["mAP50"], result["voc12"]["mAP50"]) == pytest.approx((voc, voc))
        assert result["coco"]["mAP50"] == pytest.approx(100)


def test_a_detection_sticks_to_its_best_box_for_voc_and_moves_on_for_coco():
    """The second of two detections that both overlap box A most is false for VOC; COCO gives it box
    B, which it also overlaps enough.
    """
    truth, found = one(
        [[0, 0, 100, 100], [20, 0, 120, 100]], [[0, 0, 100, 100], [8, 0, 108, 100]], [0.9, 0.8]
    )
    result = judged([truth], [found], 1)["protocols"]
    assert result["voc12"]["mAP50"] == pytest.approx(50)
    assert result["coco"]["mAP50"] == pytest.approx(100)


def test_difficult_and_crowd_boxes_are_not_held_against_a_detector():
    """Neither missing nor finding them, ever so often, changes VOC's AP; COCO forgives any number
    of detections in a crowd region alone.
    """
    box = [0, 0, 40, 40]
    other = [100, 0, 140, 40]
    inside = [102, 2, 118, 38]  # less than half of the region, but wholly in it
    for flag in ("difficult", "crowd"):
        truth, found = one(
            [other, box], [other, other, box], [0.9, 0.8, 0.7], **{flag: [True, False]}
        )
        assert judged([truth], [found], 1)["mAP50"] == pytest.approx(100)
    truth, found = one([other, box], [inside, inside, box], [0.9, 0.8, 0.7], crowd=[True, False])
    result = judged([truth], [found], 1)["protocols"]
    assert result["coco"]["mAP50"] == pytest.approx(100)
    assert result["voc12"]["mAP50"] == pytest.approx(100 / 3)
    truth, found = one([other, box], [box], [0.7], difficult=[True, False])
    result = judged([truth], [found], 1)["protocols"]
    assert result["voc12"]["mAP50"] == pytest.approx(100)
    assert result["coco"]["mAP50"] == pytest.approx(100 * 51 / 101)


def test_no_image_and_no_class_that_occurs():
    """Without any image, and without any true box, every score is None."""
    scores = AveragePrecision(["car"])
    for _ in range(2):
        result = scores.results()
        assert result["mAP50"] is None
        assert result["AP50"] == {"car": None}
        assert set(result["coco"].values()) == {None}
        scores.add(*one([], [[0, 0, 5, 5]], [0.5]))


def test_areas_default_to_those_of_the_boxes():
    """A box of 40 x 40 is COCO's medium by its own area, and small by the area of its mask."""
    truth, found = one([[0, 0, 40, 40]], [[0, 0, 40, 40]], [0.5])
    assert (
        judged([truth], [found], 1)["coco"]["AP_medium"],
        judged([truth], [found], 1)["coco"]["AP_small"],
    ) == (pytest.approx(100), None)
    thin = judged([dataclasses.replace(truth, areas=np.array([500.0]))], [found], 1)["coco"]
    assert (thin["AP_medium"], thin["AP_small"]) == (None, pytest.approx(100))


@pytest.mark.parametrize(
    ("truth", "found", "message"),
    [
        (
            {},
            {"scores": np.array([np.nan])},
            "image 1 .*detections: scores hold a value that is not finite: nan",
        ),
        (
            {},
            {"boxes": np.array([[5.0, 0, 2, 3]])},
            "image 1 .*detections: the box .* ends before it begins",
        ),
        ({}, {"classes": np.array([7])}, "image 1 .*detections: class 7, but there are 2 classes"),
        (
            {},
            {"scores": np.array([0.5, 0.6])},
            "image 1 .*detections: one entry a box .* boxes 1, classes 1, scores 2",
        ),
        ({"classes": np.array([-1])}, {}, "image 1 .*truth: class -1"),
        ({"areas": np.array([-1.0])}, {}, "image 1 .*truth: the area -1 is below 0"),
        ({"difficult": np.zeros(3, bool)}, {}, "image 1 .*truth: one entry a box .* difficult 3"),
    ],
)
def test_mistakes_are_said(truth, found, message):
    """Numbers no score can be made of are refused, naming the image and what is wrong, and leave
    nothing behind.
    """
    good = one([[0, 0, 4, 4]], [[0, 0, 4, 4]], [0.5])
    scores = AveragePrecision(["car", "bus"])
    scores.add(*good)
    with pytest.raises(ValueError, match=message):
        scores.add(dataclasses.replace(good[0], **truth), dataclasses.replace(good[1], **found))
    assert scores.results()["mAP50"] == pytest.approx(100)
    assert len(scores.truths) == len(scores.detections) == 1
