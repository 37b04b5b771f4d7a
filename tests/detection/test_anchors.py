"""Anchors against torchvision (golden) and a slow version of detectron2's layout; points."""

import numpy as np
import pytest

from jaxdg.detection import anchors, points


def test_rounded_anchors_equal_torchvision(golden):
    """Two levels of a 40 x 48 image, the anchors' order included, exactly."""
    with np.load(golden / "detection.npz") as file:
        want = file["anchors"]
    got = anchors(((5, 6), (3, 4)), (8, 13), ((32,), (64,)), rounded=True)
    assert want.shape == (126, 4)
    # torchvision divides the image's sides by the map's, so the strides of the second level differ:
    # 13 down, 12 across.
    back = np.tile(np.arange(4), 3).repeat(3)[:, None] * np.float32([1, 0, 1, 0])
    np.testing.assert_array_equal(np.concatenate([got[0], got[1] - back]), want)


def test_anchors_equal_the_definition():
    """Several sizes on a level, ratios, a stride that is not whole, an offset: each anchor has its
    centre, area and ratio, in order.
    """
    for offset in (0.0, 0.5):
        levels = anchors(
            ((2, 3), (1, 2)), (3.5, 7), ((32, 50), (64, 100)), (0.5, 1, 2), offset=offset
        )
        for level, rows, columns, stride, sizes in zip(
            levels, (2, 1), (3, 2), (3.5, 7), ((32, 50), (64, 100)), strict=True
        ):
            assert level.shape == (rows * columns * 6, 4)
            want = [
                ((j + offset) * stride, (i + offset) * stride, size**2, ratio)
                for i in range(rows)
                for j in range(columns)
                for size in sizes
                for ratio in (0.5, 1, 2)
            ]
            x0, y0, x1, y1 = np.asarray(level).T
            got = np.stack(
                [(x0 + x1) / 2, (y0 + y1) / 2, (x1 - x0) * (y1 - y0), (y1 - y0) / (x1 - x0)], axis=1
            )
            np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)


def test_points_are_centres_of_cells():
    """(x, y) row by row, in pixels; levels and strides must pair."""
    first, second = points(((2, 3), (1, 1)), (8, 16))
    np.testing.assert_array_equal(first, [[4, 4], [12, 4], [20, 4], [4, 12], [12, 12], [20, 12]])
    np.testing.assert_array_equal(second, [[8, 8]])
    with pytest.raises(ValueError, match="shorter"):
        points(((2, 3), (1, 1)), (8,))
