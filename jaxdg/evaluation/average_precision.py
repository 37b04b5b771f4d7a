"""Average precision of detections by the three rules in use: `voc07`, `voc12` and `coco`.

- `voc07`, the rule of Diverse Weather: AP at IoU 0.5 as VOC's development kit computes it, the mean
  of the best precision at recalls of at least 0, 0.1, .., 1. Each detection belongs to the true box
  of its class with the highest IoU. If that is above 0.5 (not equal), it is a true positive, unless
  one with a higher score belongs to the box: duplicates are false positives. On a `difficult` box
  it counts neither way.
- `voc12`: the same matches, but the area under the curve.
- `coco`: as in pycocotools (Lin et al. 2014). There are ten thresholds of IoU from 0.5 to 0.95
  (which a match may equal). A detection takes the best box that is still free; the best 100
  detections of a class in an image count. Precision is read at 101 recalls, and `COCO_NUMBERS`
  names the twelve results.

VOC counts pixels: its boxes are 1-based and inclusive, and a width is xmax - xmin + 1. Here a box
covers [x0, x1), which VOC's file states as (x0 + 1, y0 + 1, x1, y1), for truth and detections alike
(as detectron2's `PascalVOCDetectionEvaluator` writes it). Widths and intersections are then the
same numbers in both forms, so one IoU serves all rules. Unlike that evaluator, nothing is rounded
(it keeps 3 digits of a score and 1 of a coordinate, which makes ties), and equal scores keep the
order in which they were added. The code of CLIP the Gap trains on truth that ends one pixel earlier
and is evaluated on detections that begin one pixel later; this is not followed.

VOC has no crowd regions: they count as difficult boxes. COCO has no difficult boxes: they count as
other boxes.
"""

from collections.abc import Sequence
import dataclasses
import io
from pathlib import Path
from typing import Any, Literal, NamedTuple

from jaxtyping import Bool, Float, Float64, Int64, Integer
import numpy as np

from jaxdg import files

CURVES = "curves"  # beside results.json
Protocol = Literal["voc07", "voc12", "coco"]
COCO_NUMBERS = (
    "AP", "AP50", "AP75", "AP_small", "AP_medium", "AP_large",
    "AR1", "AR10", "AR100", "AR_small", "AR_medium", "AR_large",
)  # fmt: skip

# VOC's code adds 0.1 too, with the same rounding: 3 of 10 boxes do not reach 0.30000000000000004.
VOC_RECALLS = np.arange(0.0, 1.1, 0.1)
COCO_RECALLS = np.linspace(0.0, 1.0, 101)
COCO_IOU = np.linspace(0.5, 0.95, 10)
# All, small, medium, large; ends included.
COCO_AREAS = ((0.0, 1e10), (0.0, 32.0**2), (32.0**2, 96.0**2), (96.0**2, 1e10))
COCO_DETECTIONS = 100


@dataclasses.dataclass(frozen=True)
class Truth:
    """The true boxes of one image.

    Attributes:
        boxes: x0 y0 x1 y1 in pixels; a box covers [x0, x1) x [y0, y1).
        classes: from 0.
        difficult: boxes that count neither when missed nor when detected under VOC's rules.
        crowd: regions of many objects, in which detections count neither way.
        areas: square pixels, by which COCO tells small, medium and large: of the object's mask
            where a dataset has it. None: of the boxes.
    """

    boxes: Float[np.ndarray, "_ 4"]
    classes: Integer[np.ndarray, "_"]
    difficult: Bool[np.ndarray, "_"]
    crowd: Bool[np.ndarray, "_"]
    areas: Float[np.ndarray, "_"] | None = None


@dataclasses.dataclass(frozen=True)
class Detections:
    """The detected boxes of one image.

    Attributes:
        boxes: x0 y0 x1 y1 in pixels, as in `Truth`.
        scores: higher is surer; in any order.
        classes: from 0.
    """

    boxes: Float[np.ndarray, "_ 4"]
    scores: Float[np.ndarray, "_"]
    classes: Integer[np.ndarray, "_"]


@dataclasses.dataclass(frozen=True)
class Curves:
    """Precision against recall, in [0, 1].

    Attributes:
        classes: their names.
        detection_class: of every detection that counts, of classes with truth, one class after
            another and each by falling score: its class, from 0.
        score: of these.
        recall: when all from this score up are taken, at IoU 0.5.
        precision: the same; not smoothed.
        coco_iou: the thresholds of IoU of what follows.
        coco_recall: the 101 recalls that COCO reads precision at.
        coco_precision: the best precision at such a recall or a higher one, 0 where it is not
            reached, nan for a class without truth.
        coco_score: of the detection that reaches it.
    """

    classes: np.ndarray
    detection_class: Int64[np.ndarray, "n"]
    score: Float64[np.ndarray, "n"]
    recall: Float64[np.ndarray, "n"]
    precision: Float64[np.ndarray, "n"]
    coco_iou: Float64[np.ndarray, "i"]
    coco_recall: Float64[np.ndarray, "p"]
    coco_precision: Float64[np.ndarray, "k i p"]
    coco_score: Float64[np.ndarray, "k i p"]

    def write(self, folder: Path, domain: str) -> None:
        """Writes `curves/DOMAIN.npz`, which holds the attributes by name.

        Args:
            folder: of results.json.
            domain: name of the file; `acdc/night` lies in a folder `acdc`.
        """
        packed = io.BytesIO()
        np.savez_compressed(packed, **dataclasses.asdict(self))
        path = files.of_domain(folder / CURVES, domain, ".npz")
        path.parent.mkdir(parents=True, exist_ok=True)
        files.write(path, packed.getvalue())

    @classmethod
    def read(cls, folder: Path, domain: str) -> "Curves | None":
        """What `write` wrote; None if there is nothing."""
        path = files.of_domain(folder / CURVES, domain, ".npz")
        if not path.is_file():
            return None
        with np.load(path) as stored:
            return cls(**stored)


def box_areas(boxes: Float[np.ndarray, "n 4"]) -> Float64[np.ndarray, "n"]:
    """Square pixels of each box."""
    wide = boxes.astype(np.float64)
    return (wide[:, 2] - wide[:, 0]) * (wide[:, 3] - wide[:, 1])


class AveragePrecision:
    """Gathers the boxes of one image after another; `results` scores them.

    Attributes:
        names: of the classes.
        truths: of each image so far.
        detections: of each image so far.
    """

    def __init__(self, names: Sequence[str]):
        """Args:
        names: of the classes, in the order of their numbers.
        """
        self.names = tuple(names)
        self.truths: list[Truth] = []
        self.detections: list[Detections] = []
        self._pairs: list[tuple[np.ndarray, ...]] = []
        self._known: tuple[int, tuple[_Boxes, _VocScores, _CocoScores]] | None = None

    def add(self, truth: Truth, detections: Detections) -> None:
        """Adds one image, which may have no boxes.

        Args:
            truth: its true boxes.
            detections: its detected boxes.

        Raises:
            ValueError: the arrays differ in length, a number is not finite, a box ends before it
                begins, an area is below 0, or a class has no name.
        """
        where = f"image {len(self.truths)} (counted from 0)"
        areas = {} if truth.areas is None else {"areas": truth.areas}
        flags = {"difficult": truth.difficult, "crowd": truth.crowd}
        true = {"boxes": truth.boxes, "classes": truth.classes}
        _check(f"{where}: truth", len(self.names), **true, **flags, **areas)
        detected = {"boxes": detections.boxes, "classes": detections.classes}
        _check(f"{where}: detections", len(self.names), **detected, scores=detections.scores)
        self.truths.append(truth)
        self.detections.append(detections)
        self._pairs.append(_pairs(truth, detections))

    def results(self, protocol: Protocol = "voc07") -> dict[str, Any]:
        """Scores of all images so far, in percent.

        Args:
            protocol: whose AP at IoU 0.5 is the main result.

        Returns:
            `mAP50`: mean over the classes that occur. `AP50`: of each class by name. `protocols`:
            both by each of the three rules. `coco`: the numbers of `COCO_NUMBERS`. A value is None
            where no true box counts.
        """
        _, voc, coco = self._scored()
        every, *sizes = np.moveaxis(coco.precision, 1, 0)
        at50 = every[:, 0]  # COCO_IOU[0] is 0.5, COCO_IOU[5] is 0.75
        numbers = [every, at50, every[:, 5], *sizes, *np.moveaxis(coco.recall, 1, 0)]
        protocols = {}
        for rule, values in {"voc07": voc.ap07, "voc12": voc.ap12, "coco": at50}.items():
            classes = zip(self.names, map(_mean, values), strict=True)
            protocols[rule] = {"mAP50": _mean(values), "AP50": dict(classes)}
        return {
            **protocols[protocol],
            "protocols": protocols,
            "coco": dict(zip(COCO_NUMBERS, map(_mean, numbers), strict=True)),
        }

    def curves(self, protocol: Protocol = "voc07") -> "Curves":
        """Precision against recall of all images so far.

        Args:
            protocol: whose matches at IoU 0.5 the single detections follow.
        """
        boxes, voc, coco = self._scored()
        names = np.array(self.names)
        if protocol == "coco":
            hits, counted, optional = coco.hits, coco.counted, boxes.crowd
        else:
            hits, counted, optional = voc.hits, voc.counted, boxes.difficult | boxes.crowd
        positives = np.bincount(boxes.true_classes[~optional], minlength=len(names))
        rows = [np.zeros(0, np.int64)]
        recall, precision = [np.zeros(0)], [np.zeros(0)]
        for k in np.flatnonzero(positives):
            mine = np.flatnonzero(counted & (boxes.classes == k))
            true = np.cumsum(hits[mine])
            rows.append(mine)
            recall.append(true / positives[k])
            precision.append(true / np.arange(1, len(mine) + 1))
        row = np.concatenate(rows)
        return Curves(
            classes=names,
            detection_class=boxes.classes[row],
            score=boxes.scores[row],
            recall=np.concatenate(recall),
            precision=np.concatenate(precision),
            coco_iou=COCO_IOU,
            coco_recall=COCO_RECALLS,
            coco_precision=coco.curves,
            coco_score=coco.reached,
        )

    def _scored(self) -> tuple["_Boxes", "_VocScores", "_CocoScores"]:
        """The boxes of all images and their scores, computed once for as many images."""
        if self._known is None or self._known[0] != len(self.truths):
            boxes = self._flat()
            scores = _voc(boxes, len(self.names)), _coco(boxes, len(self.names))
            self._known = (len(self.truths), (boxes, *scores))
        return self._known[1]

    def _flat(self) -> "_Boxes":
        """The boxes of all images; detections by falling score, equal ones as they were added."""

        def join(arrays, dtype):
            return np.concatenate([np.zeros(0, dtype), *arrays]).astype(dtype)

        scores = join((d.scores for d in self.detections), np.float64)
        order = np.argsort(-scores, kind="stable")
        place = np.empty_like(order)
        place[order] = np.arange(len(order))
        classes = join((d.classes for d in self.detections), np.int64)[order]
        image = np.repeat(
            np.arange(len(self.detections)), [len(d.scores) for d in self.detections]
        )[order]
        detected, true = [
            np.cumsum([0, *(len(x.boxes) for x in sets)]) for sets in (self.detections, self.truths)
        ]
        pairs = [
            (d + detected[i], t + true[i], iou, share)
            for i, (d, t, iou, share) in enumerate(self._pairs)
        ]
        pair_detection, pair_truth, iou, share = ([p[k] for p in pairs] for k in range(4))
        return _Boxes(
            classes=classes,
            scores=scores[order],
            areas=join((box_areas(d.boxes) for d in self.detections), np.float64)[order],
            ranks=_ranks(image * len(self.names) + classes),
            true_classes=join((t.classes for t in self.truths), np.int64),
            true_areas=join(
                (box_areas(t.boxes) if t.areas is None else t.areas for t in self.truths),
                np.float64,
            ),
            difficult=join((t.difficult for t in self.truths), bool),
            crowd=join((t.crowd for t in self.truths), bool),
            pair_detection=place[join(pair_detection, np.int64)],
            pair_truth=join(pair_truth, np.int64),
            iou=join(iou, np.float64),
            share=join(share, np.float64),
        )


class _Boxes(NamedTuple):
    """n detections by falling score, m true boxes, and the p pairs that some rule can match."""

    classes: Int64[np.ndarray, "n"]
    scores: Float64[np.ndarray, "n"]
    areas: Float64[np.ndarray, "n"]
    ranks: Int64[np.ndarray, "n"]  # by falling score, within the same class and image
    true_classes: Int64[np.ndarray, "m"]
    true_areas: Float64[np.ndarray, "m"]
    difficult: Bool[np.ndarray, "m"]
    crowd: Bool[np.ndarray, "m"]
    pair_detection: Int64[np.ndarray, "p"]
    pair_truth: Int64[np.ndarray, "p"]
    iou: Float64[np.ndarray, "p"]
    share: Float64[np.ndarray, "p"]  # IoU; with a crowd region the detection's share inside it


class _VocScores(NamedTuple):
    """Of each class, nan where no true box counts; and of each detection."""

    ap07: Float64[np.ndarray, "k"]
    ap12: Float64[np.ndarray, "k"]
    hits: Bool[np.ndarray, "n"]
    counted: Bool[np.ndarray, "n"]


class _CocoScores(NamedTuple):
    """Of each class, nan where no true box counts; and of each detection at IoU 0.5."""

    precision: Float64[np.ndarray, "k 4 10"]  # AP by area and IoU
    recall: Float64[np.ndarray, "k 6 10"]  # best 1, 10, 100; small, medium, large; by IoU
    curves: Float64[np.ndarray, "k 10 101"]  # of all areas, by IoU
    reached: Float64[np.ndarray, "k 10 101"]  # the score of the detection that reaches a recall
    hits: Bool[np.ndarray, "n"]
    counted: Bool[np.ndarray, "n"]


def _check(what: str, num_classes: int, **arrays: np.ndarray) -> None:
    lengths = {name: len(array) for name, array in arrays.items()}
    if len(set(lengths.values())) > 1:
        raise ValueError(
            f"{what}: one entry a box is needed, but the lengths are"
            f" {', '.join(f'{n} {k}' for n, k in lengths.items())}"
        )
    for name, array in arrays.items():
        if not np.isfinite(array).all():
            raise ValueError(
                f"{what}: {name} hold a value that is not finite: {array[~np.isfinite(array)][0]}"
            )
    boxes = arrays["boxes"]
    classes = arrays["classes"]
    if (arrays.get("areas", boxes[:0]) < 0).any():
        raise ValueError(f"{what}: the area {arrays['areas'].min():g} is below 0")
    turned = (boxes[:, 2:] < boxes[:, :2]).any(axis=1)
    if turned.any():
        raise ValueError(
            f"{what}: the box {boxes[turned][0].tolist()} ends before it begins; boxes are x0 y0"
            " x1 y1"
        )
    unknown = (classes < 0) | (classes >= num_classes)
    if unknown.any():
        raise ValueError(
            f"{what}: class {classes[unknown][0]}, but there are {num_classes} classes,"
            f" 0..{num_classes - 1}"
        )


def _pairs(truth: Truth, detections: Detections) -> tuple[np.ndarray, ...]:
    """Detections, true boxes, IoU and share of the pairs of an image, as in `_Boxes`."""
    d, t = np.nonzero(detections.classes[:, None] == truth.classes)
    found = detections.boxes[d].astype(np.float64)
    true = truth.boxes[t].astype(np.float64)
    sides = np.minimum(found[:, 2:], true[:, 2:]) - np.maximum(found[:, :2], true[:, :2])
    both = np.clip(sides, 0, None).prod(axis=1)

    def divide(area):
        return np.divide(both, area, out=np.zeros_like(both), where=both > 0)

    iou = divide(box_areas(found) + box_areas(true) - both)
    share = np.where(truth.crowd[t], divide(box_areas(found)), iou)
    near = share >= COCO_IOU[0]
    return d[near], t[near], iou[near], share[near]


def _ranks(groups: Int64[np.ndarray, "n"]) -> Int64[np.ndarray, "n"]:
    """How many earlier entries have the same value."""
    order = np.argsort(groups, kind="stable")
    ordered = groups[order]
    ranks = np.empty_like(order)
    ranks[order] = np.arange(len(order)) - np.searchsorted(ordered, ordered)
    return ranks


def _curve(
    hits: Bool[np.ndarray, "n"], counted: Bool[np.ndarray, "n"], positives: int
) -> tuple[np.ndarray, np.ndarray]:
    """Recall after each detection, and the best precision at that recall or a higher one."""
    true = np.cumsum(hits)
    all_ = np.cumsum(counted)
    precision = true / np.maximum(all_, 1)
    return true / positives, np.maximum.accumulate(precision[::-1])[::-1]


def _at(points: np.ndarray, recall: np.ndarray, values: np.ndarray) -> np.ndarray:
    """Values, such as the precision, at given recalls; 0 where a recall is not reached."""
    return np.append(values, 0.0)[np.searchsorted(recall, points)]


def _voc(boxes: _Boxes, num_classes: int) -> _VocScores:
    """AP of each class by the rules of 2007 and of 2012."""
    enough = boxes.iou > 0.5
    d = boxes.pair_detection[enough]
    t = boxes.pair_truth[enough]
    order = np.lexsort((t, -boxes.iou[enough], d))
    d, best = np.unique(d[order], return_index=True)
    t = t[order][best]  # the true box of each detection that has one, the first of equals
    first = np.zeros(len(d), bool)
    first[np.unique(t, return_index=True)[1]] = True
    optional = boxes.difficult | boxes.crowd
    hits = np.zeros(len(boxes.classes), bool)
    counted = np.ones(len(boxes.classes), bool)
    hits[d] = first & ~optional[t]
    counted[d] = ~optional[t]
    ap07, ap12 = np.full((2, num_classes), np.nan)
    for k in range(num_classes):
        mine = boxes.classes == k
        if positives := int(np.count_nonzero(~optional[boxes.true_classes == k])):
            recall, precision = _curve(hits[mine], counted[mine], positives)
            ap07[k] = _at(VOC_RECALLS, recall, precision).mean()
            ap12[k] = np.diff(recall, prepend=0.0) @ precision
    return _VocScores(ap07, ap12, hits, counted)


def _coco(boxes: _Boxes, num_classes: int) -> _CocoScores:
    """AP and AR of each class, area and IoU."""
    precision = np.full((num_classes, 4, 10), np.nan)
    recall = np.full((num_classes, 6, 10), np.nan)
    curves, reached = np.full((2, num_classes, 10, len(COCO_RECALLS)), np.nan)
    at50 = None
    allowed = boxes.ranks < COCO_DETECTIONS
    of_class = [np.flatnonzero(allowed & (boxes.classes == k)) for k in range(num_classes)]
    for a, (least, most) in enumerate(COCO_AREAS):
        outside = (boxes.areas < least) | (boxes.areas > most)
        optional = boxes.crowd | (boxes.true_areas < least) | (boxes.true_areas > most)
        positives = np.bincount(boxes.true_classes[~optional], minlength=num_classes).tolist()
        # Each detection prefers boxes that count, then the greater overlap, then the later box.
        order = np.lexsort(
            (-boxes.pair_truth, -boxes.share, optional[boxes.pair_truth], boxes.pair_detection)
        )
        order = order[allowed[boxes.pair_detection[order]]]
        for i, least_iou in enumerate(COCO_IOU):
            pairs = order[boxes.share[order] >= least_iou]
            detections = boxes.pair_detection[pairs]
            match = _match(detections, boxes.pair_truth[pairs], boxes.crowd, len(boxes.classes))
            counted = ~outside
            hits = match >= 0
            counted[hits] = ~optional[match[hits]]
            hits &= counted
            at50 = at50 or (hits, counted & allowed)
            for k in np.flatnonzero(positives):
                mine = of_class[k]
                curve = _curve(hits[mine], counted[mine], positives[k])
                read = _at(COCO_RECALLS, *curve)
                precision[k, a, i] = read.mean()
                if a == 0:
                    curves[k, i] = read
                    reached[k, i] = _at(COCO_RECALLS, curve[0], boxes.scores[mine])
                    for j, most_ranks in enumerate((1, 10, 100)):
                        best = hits[mine] & (boxes.ranks[mine] < most_ranks)
                        recall[k, j, i] = np.count_nonzero(best) / positives[k]
                else:
                    recall[k, 2 + a, i] = np.count_nonzero(hits[mine]) / positives[k]
    assert at50 is not None  # of all areas, at the first IoU
    return _CocoScores(precision, recall, curves, reached, *at50)


def _match(
    d: Int64[np.ndarray, "p"], t: Int64[np.ndarray, "p"], shared: Bool[np.ndarray, "m"], n: int
) -> Int64[np.ndarray, "n"]:
    """The true box of each of `n` detections, which choose by falling score; -1 for none.

    The result is computed by deferred acceptance (Gale and Shapley 1962). All detections choose at
    once, every box keeps the one with the highest score, and the others move on to their next
    preference. As all boxes rank the detections alike, this equals choosing one after another.

    Args:
        d: detections of the allowed pairs, ascending; a lower number is a higher score.
        t: their true boxes, in the order of each detection's preference.
        shared: true boxes that any number of detections may have.
        n: number of detections.
    """
    match = np.full(n, -1)
    choosing, wish = np.unique(d, return_index=True)
    end = np.append(wish[1:], len(d))
    while True:
        wanted = t[wish]
        holder = np.full(len(shared), n)
        np.minimum.at(holder, wanted, choosing)
        refused = (holder[wanted] != choosing) & ~shared[wanted]
        if not refused.any():
            match[choosing] = wanted
            return match
        wish = wish + refused
        left = wish < end
        choosing = choosing[left]
        wish = wish[left]
        end = end[left]


def _mean(values: np.ndarray | np.float64) -> float | None:
    """Percent; None where every value is nan."""
    values = np.asarray(values)
    known = values[~np.isnan(values)]
    return 100 * float(known.mean()) if known.size else None
