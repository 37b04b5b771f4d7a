"""Boundary IoU against the authors' code and against every pair of pixels."""

import functools

import jax
import numpy as np
import pytest

from jaxdg.evaluation.boundary import boundaries, boundary_counts, boundary_iou, reach
from tests.evaluation.label_maps import CASES, CLASSES, stored


@pytest.fixture(scope="module")
def counted(golden):
    """A function of a case to the counts of each image, all sizes padded into one batch."""
    data = np.load(golden / "numbers.npz")
    sizes = data["sizes"]
    shape = tuple(sizes.max(axis=0).tolist())
    most = reach(shape)
    distances = np.array([reach(size) for size in sizes.tolist()], np.int32)
    count = functools.partial(boundary_counts, num_classes=CLASSES, most=most)
    count = jax.jit(jax.vmap(count))

    def of(case):
        batch = np.full((2, len(sizes), *shape), 3, np.uint8)  # the padding is of some class
        for i, (truth, prediction) in enumerate(stored(data, case)):
            for kind, image in enumerate((prediction, truth)):
                batch[kind, i, : image.shape[0], : image.shape[1]] = image
            batch[1, i, image.shape[0] :] = 255
            batch[1, i, :, image.shape[1] :] = 255
        return np.asarray(count(*batch, sizes.astype(np.int32), distances)), data[
            f"{case}/boundary"
        ]

    return of


@pytest.mark.parametrize("case", CASES)
def test_counts_equal_the_authors_code(counted, case):
    """Intersection and union of every class in every image are the authors': several sizes in one
    batch, distances that round to the even number, absent classes, ignored regions, one class.
    """
    found, expected = counted(case)
    np.testing.assert_array_equal(found, expected)
    total = found.astype(np.int64).sum(axis=0)
    iou = boundary_iou(total)
    for k in range(CLASSES):
        if total[k, 1]:
            assert iou[k] == total[k, 0] / total[k, 1]
        else:
            assert np.isnan(iou[k])
    if case == "ignored":
        assert np.isnan(iou).all()


def test_the_golden_sizes_differ_in_distance():
    """1.5 and 2.5 pixels round to 2, and the smallest distance is 1."""
    sizes = ((24, 33), (60, 90), (121, 170), (45, 60), (75, 100), (4, 4), (1024, 2048))
    assert [reach(size) for size in sizes] == [1, 2, 4, 2, 2, 1, 46]


@pytest.mark.parametrize("distance", [1, 2, 3, 4, 7])
def test_boundaries_equal_a_look_at_every_square(distance):
    """A pixel is on the boundary if its square holds another class or leaves the image: for every
    distance up to the largest, in an image that does not fill its array.
    """
    rng = np.random.default_rng(distance)
    label = np.repeat(np.repeat(rng.integers(0, 3, (2, 3)), 20, axis=0), 20, axis=1)
    label[3, 3] = 255
    h, w = 36, 55
    mark = jax.jit(boundaries, static_argnums=3)
    size = np.array([h, w], np.int32)
    found = np.asarray(mark(label.astype(np.uint8), size, np.int32(distance), 7))[:h, :w]
    around = np.pad(label[:h, :w], distance, constant_values=-1)
    for y, x in np.ndindex(h, w):
        square = around[y : y + 2 * distance + 1, x : x + 2 * distance + 1]
        assert found[y, x] == (square != label[y, x]).any()
    assert not found.all()
