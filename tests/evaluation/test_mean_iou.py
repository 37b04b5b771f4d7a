"""Confusion matrix and IoU against the official Cityscapes evaluation, plain Python counts and
exact fractions.
"""

from fractions import Fraction

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec
import numpy as np
import pytest

from jaxdg.evaluation.mean_iou import confusion_matrix, iou


def counted(prediction, label, num_classes, ignore):
    """The matrix by one dictionary-like count a pixel."""
    matrix = np.zeros((num_classes, num_classes), np.int64)
    for p, t in zip(prediction.ravel().tolist(), label.ravel().tolist(), strict=True):
        if t != ignore and 0 <= t < num_classes and 0 <= p < num_classes:
            matrix[t, p] += 1
    return matrix


def test_equals_the_official_cityscapes_evaluation(golden):
    """IoU of three sets of images is the official code's to 1e-9: ignored regions, absent, never
    predicted and never true classes.
    """
    data = np.load(golden / "cityscapes_iou.npz")
    count = jax.jit(confusion_matrix, static_argnums=2)
    assert np.isnan(data["iou"]).any()
    assert (data["iou"] == 0).any()
    for truth, prediction, expected in zip(
        data["truth"], data["prediction"], data["iou"], strict=True
    ):
        total = sum(
            np.asarray(count(p, t, 19)).astype(np.int64)
            for p, t in zip(prediction, truth, strict=True)
        )
        np.testing.assert_allclose(
            iou(total), expected, rtol=0, atol=1e-9
        )  # nan only where the official code says nan


def test_equals_torchmetrics_over_a_dataset(golden):
    """IoU of every class and their mean, over two sets of images, are torchmetrics' Jaccard index,
    updated image by image.
    """
    data = np.load(golden / "jaccard.npz")
    for truth, prediction, expected, mean in zip(
        data["truth"], data["prediction"], data["iou"], data["mean"], strict=True
    ):
        total = sum(
            np.asarray(confusion_matrix(p, t, 19)).astype(np.int64)
            for p, t in zip(prediction, truth, strict=True)
        )
        found = iou(total)
        np.testing.assert_allclose(
            np.nan_to_num(found), expected, rtol=0, atol=1e-6
        )  # it gives 0 for a class that occurs nowhere,
        np.testing.assert_allclose(
            np.nanmean(found), mean, rtol=0, atol=1e-6
        )  # and leaves it out of the mean
    assert np.isnan(found).any()


def test_sums_past_two_to_the_31_equal_the_official_evaluation(golden):
    """Counts of 2^33 a cell give the official code's scores."""
    data = np.load(golden / "cityscapes_iou.npz")
    assert data["large_counts"].max() > 2**31
    np.testing.assert_allclose(iou(data["large_counts"]), data["large_iou"], rtol=0, atol=1e-9)


def test_batches_added_in_int64_equal_exact_fractions():
    """Sixty thousand batches summed on the host pass 2^31 in one cell, and their IoU is the
    fraction of Python integers.
    """
    rng = np.random.default_rng(0)
    prediction, label = rng.integers(0, 3, (2, 64, 1000))
    prediction[label == 0] = 0
    batch = np.asarray(confusion_matrix(prediction, label, 3))
    total = np.zeros((3, 3), np.int64)
    exact = [[0] * 3 for _ in range(3)]
    for _ in range(10):
        total += batch.astype(np.int64) * 20_000
        exact = [
            [a + int(b) * 20_000 for a, b in zip(row, new, strict=True)]
            for row, new in zip(exact, batch, strict=True)
        ]
    assert total.max() > 2**31
    assert total.tolist() == exact
    for k, value in enumerate(iou(total)):
        expected = Fraction(exact[k][k], sum(exact[k]) + sum(row[k] for row in exact) - exact[k][k])
        assert abs(Fraction(float(value)) - expected) < Fraction(1, 10**15)


@pytest.mark.parametrize("ignore", [255, 0, 2])
def test_counts_every_pixel_once_and_only_inside_the_classes(ignore):
    """The matrix equals a loop over pixels, with ids outside the classes, negative ids and any
    `ignore`.
    """
    rng = np.random.default_rng(1)
    prediction, label = rng.integers(-2, 7, (2, 2, 33, 17), dtype=np.int32)
    label[0, :5] = ignore
    matrix = confusion_matrix(prediction, label, 5, ignore=ignore)
    assert matrix.dtype == np.int32
    np.testing.assert_array_equal(matrix, counted(prediction, label, 5, ignore))


def test_rows_are_the_truth_for_every_integer_type():
    """Two pixels of class 0 taken for class 1 stand in row 0, column 1, whatever the integer type
    (uint8 must not wrap).
    """
    for dtype in (np.uint8, np.uint16, np.int8, np.int32):
        matrix = np.asarray(
            confusion_matrix(np.array([1, 1, 29], dtype), np.array([0, 0, 29], dtype), 30)
        )
        assert matrix[0, 1] == 2
        assert matrix[29, 29] == 1
        assert matrix.sum() == 3


def test_a_sharded_batch_counts_like_one_device():
    """A batch spread over the devices gives the same matrix as the same pixels on one."""
    rng = np.random.default_rng(2)
    prediction, label = rng.integers(0, 6, (2, 8, 16, 24), dtype=np.int32)
    sharding = NamedSharding(Mesh(np.array(jax.devices()), ("data",)), PartitionSpec("data"))
    matrix = jax.jit(confusion_matrix, static_argnums=2)(
        jax.device_put(prediction, sharding), jax.device_put(label, sharding), 6
    )
    np.testing.assert_array_equal(matrix, counted(prediction, label, 6, 255))


def test_mistakes_are_said():
    """Maps of two shapes and an overflowed matrix are refused, each with its reason."""
    with pytest.raises(ValueError, match="same shape"):
        confusion_matrix(np.zeros((4, 6), np.int32), np.zeros((6, 4), np.int32), 3)
    with np.errstate(over="ignore"):
        overflowed = np.full((2, 2), 2**30, np.int32) * np.int32(2)
    with pytest.raises(ValueError, match="int64"):
        iou(overflowed)
