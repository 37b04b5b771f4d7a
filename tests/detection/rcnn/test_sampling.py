"""Assignment against torchvision (golden) and slow NumPy; random draws against their law."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdg.detection import assign, sample
from tests.detection import cases

match = jax.jit(assign, static_argnums=3, static_argnames="low_quality")
draw = jax.jit(sample, static_argnums=(2, 3))


def slow(boxes, truth, valid, thresholds, low_quality):
    """The definition, pair by pair, in float64: whole boxes only, whose overlaps are apart where
    they differ.
    """
    overlap = np.zeros((len(truth), len(boxes)))
    for i, j in np.ndindex(overlap.shape):
        sides = np.minimum(truth[i, 2:], boxes[j, 2:]) - np.maximum(truth[i, :2], boxes[j, :2])
        if valid[i] and (sides > 0).all():
            both = np.prod(sides.astype(np.float64))
            overlap[i, j] = both / (
                np.prod(truth[i, 2:] - truth[i, :2]) + np.prod(boxes[j, 2:] - boxes[j, :2]) - both
            )
    index = np.zeros(len(boxes), int)
    label = np.zeros(len(boxes), int)
    for j in range(len(boxes)):
        best = overlap[:, j].max(initial=0)
        index[j] = np.argmax(overlap[:, j]) if len(truth) else 0
        label[j] = 1 if best >= thresholds[1] else -1 if best >= thresholds[0] else 0
        if low_quality and any(
            overlap[i, j] > 0 and overlap[i, j] > overlap[i].max() - 1e-9 for i in range(len(truth))
        ):
            label[j] = 1
    return index, label


def test_equals_torchvision(golden):
    """150 images of whole boxes with many equal overlaps, with and without low-quality matches,
    padded with boxes that do not exist.
    """
    with np.load(golden / "detection.npz") as file:
        matched = file["matched"]
    labels = set()
    for want, (boxes, truth, thresholds) in zip(matched, cases.matching_cases(), strict=True):
        padded = np.concatenate([truth, boxes[: 8 - len(truth)]])
        for low_quality in (False, True):
            index, label = match(
                boxes, padded, np.arange(8) < len(truth), thresholds, low_quality=low_quality
            )
            row = want[int(low_quality)]
            np.testing.assert_array_equal(label, np.where(row >= 0, 1, np.where(row == -1, 0, -1)))
            np.testing.assert_array_equal(np.asarray(index)[row >= 0], row[row >= 0])
            labels |= set(np.asarray(label).tolist())
    assert labels == {-1, 0, 1}


def test_equals_the_definition():
    """Batches with true boxes that are absent, empty, or overlap nothing, padding in between, and
    images without any: the slow version.
    """
    rng = np.random.default_rng(0)
    corner = rng.integers(0, 60, (40, 37, 2))
    boxes = np.concatenate([corner, corner + rng.integers(0, 30, (40, 37, 2))], axis=-1).astype(
        np.float32
    )
    truth = boxes[:, 30:]
    boxes = boxes[:, :30]
    valid = rng.random((40, 7)) < np.linspace(0, 1, 40)[:, None]
    assert not valid[0].any()
    for thresholds, low_quality in (((0.3, 0.7), True), ((0.3, 0.7), False), ((0.5, 0.5), False)):
        index, label = match(boxes, truth, valid, thresholds, low_quality=low_quality)
        want = [
            slow(b, t, v, thresholds, low_quality)
            for b, t, v in zip(boxes, truth, valid, strict=True)
        ]
        np.testing.assert_array_equal(index, [i for i, _ in want])
        np.testing.assert_array_equal(label, [x for _, x in want])
        assert not np.asarray(label)[0].any()
    index, label = match(boxes, truth[:, :0], valid[:, :0], (0.5, 0.5))
    assert not index.any()
    assert not label.any()
    with pytest.raises(ValueError, match=r"thresholds are 0\.7 and 0\.3"):
        assign(jnp.asarray(boxes), jnp.asarray(truth), jnp.asarray(valid), (0.7, 0.3))


def test_draws_hold_what_they_promise():
    """Positive ones up to their share, then negative ones, none twice, never ignored ones; slots
    stay empty only where boxes run out.
    """
    rng = np.random.default_rng(1)
    positives = rng.integers(0, 40, 100)
    negatives = rng.integers(0, 40, 100)
    positives[:3] = (0, 0, 40)
    negatives[:3] = (0, 40, 0)
    label = np.stack(
        [
            rng.permutation([1] * p + [0] * n + [-1] * (90 - p - n))
            for p, n in zip(positives, negatives, strict=True)
        ]
    )
    label = label.astype(np.int32)
    for count, share in ((32, 0.5), (31, 0.25), (120, 0.5), (8, 0.0)):
        index, valid = (np.asarray(x) for x in draw(jax.random.key(count), label, count, share))
        assert index.shape == valid.shape == (100, count)
        for row, i, v, p, n in zip(label, index, valid, positives, negatives, strict=True):
            kept = i[v]
            took = min(p, int(count * share))
            assert len(set(kept)) == len(kept) == took + min(n, count - took)
            assert v[: len(kept)].all()
            assert (row[kept[:took]] == 1).all()
            assert (row[kept[took:]] == 0).all()


def test_every_box_is_as_likely():
    """Over 4000 keys each positive box is drawn equally often, and each negative one, within five
    standard deviations; keys repeat.
    """
    label = np.array([1] * 12 + [0] * 20 + [-1] * 4, np.int32)
    keys = jax.random.split(jax.random.key(0), 4000)
    index, valid = jax.jit(jax.vmap(lambda key: sample(key, jnp.asarray(label), 16, 0.5)))(keys)
    assert valid.all()
    share = np.bincount(np.ravel(index), minlength=36) / 4000
    want = np.array([8 / 12] * 12 + [8 / 20] * 20 + [0] * 4)
    assert (np.abs(share - want) <= 5 * np.sqrt(want * (1 - want) / 4000)).all()
    first = np.bincount(np.asarray(index)[:, 0], minlength=36)[:12] / 4000
    assert (np.abs(first - 1 / 12) <= 5 * np.sqrt(1 / 12 * 11 / 12 / 4000)).all()
    again, _ = sample(keys[7], jnp.asarray(label), 16, 0.5)
    np.testing.assert_array_equal(again, index[7])
