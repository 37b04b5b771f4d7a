"""NMS against torchvision (golden), a slow NumPy version of the definition, and laws."""

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec
import numpy as np
import pytest

from jaxdg.detection.nms import TILE, nms
from tests.detection import cases


def suppress(boxes, scores, valid, threshold, size, classes=None):
    """The function that is tested, given NumPy arrays."""
    return nms(
        *(jnp.asarray(x) for x in (boxes, scores, valid)),
        threshold,
        size,
        None if classes is None else jnp.asarray(classes),
    )


def slow(boxes, scores, valid, threshold, classes=None):
    """The definition, box by box: IoU in float32 as torchvision's, compared in float64."""
    classes = np.zeros(len(boxes)) if classes is None else classes
    sides = np.maximum(boxes[:, 2:] - boxes[:, :2], np.float32(0))
    areas = sides[:, 0] * sides[:, 1]
    kept = []
    for i in np.argsort(-scores, kind="stable"):
        if not valid[i]:
            continue
        others = np.array([j for j in kept if classes[j] == classes[i]], int)
        low = np.maximum(boxes[i, :2], boxes[others, :2])
        high = np.minimum(boxes[i, 2:], boxes[others, 2:])
        both = np.prod(np.maximum(high - low, np.float32(0)), axis=-1)
        with np.errstate(invalid="ignore"):
            overlap = both / (areas[i] + areas[others] - both)
        if not (overlap.astype(np.float64) > threshold).any():
            kept.append(int(i))
    return kept


def listed(result):
    """The kept indices of each problem, which must stand before the empty slots."""
    index, valid = (np.asarray(x) for x in result)
    assert index.dtype == np.int32
    assert not index[~valid].any()
    assert (np.diff(valid.astype(int), axis=-1) <= 0).all()
    return [i[v].tolist() for i, v in zip(np.atleast_2d(index), np.atleast_2d(valid), strict=True)]


def by_threshold(problems):
    """Stacked small cases of each threshold: threshold, their numbers, boxes, scores, validity,
    classes.
    """
    for threshold in cases.THRESHOLDS:
        numbers = [i for i, problem in enumerate(problems) if problem[3] == threshold]
        boxes, scores, counts, _, classes = (
            np.stack(x) for x in zip(*(problems[i] for i in numbers), strict=True)
        )
        yield (
            float(threshold),
            numbers,
            boxes,
            scores,
            np.arange(cases.NMS_SIZE) < counts[:, None],
            classes,
        )


def test_equals_torchvision(golden):
    """2394 cases at thresholds 0.05 to 0.95, with ties, empty, turned-over and identical boxes, and
    none: same boxes, same order.

    Padding holds boxes and high scores too. Of class-wise cases, those on whole pixels, which
    torchvision computes without rounding.
    """
    with np.load(golden / "detection.npz") as file:
        kept = file["kept"]
        kept_of_class = file["kept_of_class"]
    problems = list(cases.nms_cases())
    assert len(problems) == 2394
    whole = np.cumsum([not (boxes % 1).any() for boxes, *_ in problems]) - 1
    for threshold, numbers, boxes, scores, valid, classes in by_threshold(problems):
        for row, got in zip(
            kept[numbers], listed(suppress(boxes, scores, valid, threshold, 32)), strict=True
        ):
            assert got == row[row < 255].tolist()
        for i, got in zip(
            numbers, listed(suppress(boxes, scores, valid, threshold, 32, classes)), strict=True
        ):
            if not (problems[i][0] % 1).any():
                row = kept_of_class[whole[i]]
                assert got == row[row < 255].tolist()


def test_large_cases_equal_torchvision(golden):
    """The same on 1000 boxes, where what one tile drops reaches the next, with chains that need as
    many rounds as a tile has boxes.
    """
    with np.load(golden / "detection.npz") as file:
        packed = file["large"]
    for mask, (boxes, scores, threshold) in zip(packed, cases.large_nms_cases(), strict=True):
        assert len(boxes) > 7 * TILE
        (got,) = listed(suppress(boxes, scores, np.ones(1000, bool), threshold, 1000))
        order = np.argsort(-scores, kind="stable")
        assert got == order[np.unpackbits(mask, count=1000)[order] > 0].tolist()


def test_equals_the_definition():
    """540 cases of two tiles equal the slow version, classes and all, for thresholds between the
    golden ones.
    """
    rng = np.random.default_rng(0)
    n = TILE + 22
    total = 0
    for threshold in (0.0, 0.07, 1 / 3, 0.45, 0.57, 2 / 3, 0.7, 0.93, 1.0):
        corner = np.where(
            rng.random((60, 1, 1)) < 0.5,
            rng.integers(0, 20, (60, n, 2)),
            rng.uniform(0, 40, (60, n, 2)),
        )
        side = np.where(
            rng.random((60, 1, 1)) < 0.5,
            rng.integers(0, 12, (60, n, 2)),
            rng.uniform(0, 20, (60, n, 2)),
        )
        boxes = np.concatenate([corner, corner + side], axis=-1).astype(np.float32)
        scores = np.round(rng.random((60, n)), 2).astype(np.float32)
        valid = rng.random((60, n)) < rng.random((60, 1))
        classes = rng.integers(0, 3, (60, n)).astype(np.int32)
        for problem, got in enumerate(
            listed(suppress(boxes, scores, valid, threshold, n, classes))
        ):
            inputs = boxes[problem], scores[problem], valid[problem], threshold, classes[problem]
            assert got == slow(*inputs)
            total += 1
    assert total == 540


def test_a_threshold_is_compared_exactly():
    """IoUs of k/20 computed in float32 against thresholds k/20, which float32 cannot hold: as in
    float64, either way of rounding.
    """
    kept = []
    for k, threshold in enumerate(cases.THRESHOLDS, 1):
        boxes = np.array([[0, 0, 20, 1], [0, 0, k, 1]], np.float32)
        expected = not float(np.float32(k) / np.float32(20)) > threshold
        (got,) = listed(
            suppress(boxes, np.array([0.9, 0.8], np.float32), np.ones(2, bool), float(threshold), 2)
        )
        assert (len(got) == 2) == expected
        kept.append(expected)
    assert 3 < sum(kept) < 16  # a comparison in float32 would keep all


def test_padding_order_and_place_change_nothing():
    """Random padding among the boxes, another order of boxes without ties, whole shifts and doubled
    sizes leave the same boxes.
    """
    rng = np.random.default_rng(1)
    n = 100
    m = 300
    for threshold in (0.3, 0.7):
        corner = rng.integers(0, 64, (n, 2))
        boxes = np.concatenate([corner, corner + rng.integers(1, 48, (n, 2))], axis=1).astype(
            np.float32
        )
        scores = rng.permutation(n).astype(np.float32)
        (expected,) = listed(suppress(boxes, scores, np.ones(n, bool), threshold, n))
        assert 5 < len(expected) < n
        for change in (lambda x: x, lambda x: x + 17, lambda x: 2 * x):
            place = rng.permutation(m)[:n]
            all_boxes = rng.uniform(0, 90, (m, 4)).astype(np.float32)
            all_scores = rng.uniform(0, 200, m).astype(np.float32)
            all_boxes[rng.random(m) < 0.3] = np.nan
            all_scores[rng.random(m) < 0.3] = np.nan
            all_boxes[place] = change(boxes)
            all_scores[place] = scores
            (got,) = listed(
                suppress(all_boxes, all_scores, np.isin(np.arange(m), place), threshold, n)
            )
            assert got == place[expected].tolist()


def test_number_of_results():
    """Fewer slots hold the best ones, more slots than boxes stay empty, no valid box and no box at
    all give none.
    """
    boxes, scores, *_ = next(cases.nms_cases())
    valid = np.ones(len(scores), bool)
    full = slow(boxes, scores, valid, 0.5)
    assert len(full) > 5
    assert listed(suppress(boxes, scores, valid, 0.5, 5)) == [full[:5]]
    assert listed(suppress(boxes, scores, valid, 0.5, 60)) == [full]
    assert listed(suppress(boxes, scores, ~valid, 0.5, 60)) == [[]]
    assert listed(suppress(boxes[:0], scores[:0], valid[:0], 0.5, 3)) == [[]]
    with pytest.raises(ValueError, match=r"threshold of NMS is 1\.5"):
        suppress(boxes, scores, valid, 1.5, 5)


def test_a_batch_is_its_problems():
    """Leading axes, and a batch spread over devices, give what each problem gives alone, with one
    program whatever the boxes are.
    """
    problems = list(cases.nms_cases())[::150]
    boxes, scores, valid = (
        np.stack(x)
        for x in zip(*((b, s, np.arange(32) < c) for b, s, c, *_ in problems), strict=True)
    )
    alone = [
        listed(suppress(*inputs, 0.4, 32))[0] for inputs in zip(boxes, scores, valid, strict=True)
    ]
    assert len(problems) == 16
    assert listed(suppress(boxes, scores, valid, 0.4, 32)) == alone
    sharding = NamedSharding(Mesh(np.array(jax.devices()), ("data",)), PartitionSpec("data"))
    compiled = jax.jit(lambda *inputs: nms(*inputs, 0.4, 32))
    assert listed(compiled(*jax.device_put((boxes, scores, valid), sharding))) == alone
    compiled(*jax.device_put((boxes[::-1], scores[::-1], np.zeros_like(valid)), sharding))
    assert compiled._cache_size() == 1


def test_no_gradient():
    """Picking scores by the result is differentiated as if the indices were constants."""
    boxes, scores, *_ = next(cases.nms_cases())

    def loss(scores, boxes):
        index, valid = nms(boxes, scores, jnp.ones(32, bool), 0.5, 32)
        return (scores[index] * valid).sum()

    to_scores, to_boxes = jax.jit(jax.grad(loss, (0, 1)))(scores, boxes)
    np.testing.assert_array_equal(
        to_scores, np.isin(np.arange(32), slow(boxes, scores, np.ones(32, bool), 0.5))
    )
    assert not to_boxes.any()
