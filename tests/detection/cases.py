"""What torchvision was asked for tests/golden/detection.npz, drawn by name so that the file need
not hold it.
"""

import zlib

import numpy as np

NMS_SIZE = 32
NMS_REPEATS = 18
THRESHOLDS = np.arange(1, 20) / 20
MAPS = ((2, 17, 23), (2, 9, 12), (2, 5, 6))
STRIDES = (4, 8, 16)  # of RoIAlign: images, rows, columns
CHANNELS = 2
ROIS = 80
# bins along height and width, samples (0: adaptive), aligned
ROI_KINDS = (
    ((3, 2), 2, True),
    ((3, 2), 2, False),
    ((3, 2), 0, True),
    ((3, 2), 0, False),
    ((2, 3), 1, True),
    ((4, 5), 3, False),
)


def uniform(name, shape=()):
    """Numbers in [0, 1) that belong to a name.

    NumPy fixes the raw stream of a bit generator for all versions, not what is made of it.
    """
    raw = np.random.PCG64(zlib.crc32(name.encode())).random_raw(int(np.prod(shape)))
    return (np.asarray(raw, np.uint64) >> np.uint64(11)).reshape(shape) * 2.0**-53


def whole(name, limit, shape):
    """Whole numbers from 0 to limit - 1."""
    return np.floor(uniform(name, shape) * limit)


def proper_boxes(name, n, extent, longest):
    """Boxes with positive sides, many of them beyond 0 and `extent`."""
    numbers = uniform(name, (n, 4))
    corner = numbers[:, :2] * 1.4 * extent - 0.2 * extent
    return np.concatenate([corner, corner + 1 + longest * numbers[:, 2:] ** 2], axis=1).astype(
        np.float32
    )


def nms_boxes(kind, n, name):
    """Boxes [n, 4] of a kind, for NMS."""
    if kind == "whole":  # many equal overlaps, some of them at a threshold, and empty boxes
        corner = whole(name, 8, (n, 2))
        return np.concatenate([corner, corner + whole(name + "s", 8, (n, 2))], axis=1)
    if kind == "any corners":  # as often as not turned over
        return whole(name, 12, (n, 4))
    if kind == "scattered":
        return proper_boxes(name, n, 60, 60)
    if kind == "crowded":
        return proper_boxes(name, n, 20, 80)
    if kind == "around one":
        return [10, 20, 50, 90] + 30 * (uniform(name, (n, 4)) - 0.5)
    if kind == "identical":
        return np.tile([3, 4, 9, 17], (n, 1))
    assert kind == "chain"  # each overlaps the next by much and the one after it by less
    start = 3 * np.arange(n)[:, None]
    return np.concatenate(
        [start, np.zeros((n, 1)), start + 7 + np.floor(20 * uniform(name)), np.ones((n, 1))], axis=1
    )


KINDS = ("whole", "any corners", "scattered", "crowded", "around one", "identical", "chain")


def nms_scores(name, n):
    """Scores with many ties, or none, or descending."""
    which = uniform(name + "?")
    scores = whole(name, 6, n) / 8 if which < 0.5 else uniform(name, n)
    return (np.sort(scores)[::-1] if which > 0.8 else scores).astype(np.float32)


def nms_cases():
    """All small cases, each of `NMS_SIZE` slots: boxes, scores, how many slots hold a box,
    threshold, classes.
    """
    for kind in KINDS:
        for i, threshold in enumerate(THRESHOLDS):
            for repeat in range(NMS_REPEATS):
                name = f"{kind} {i} {repeat}"
                boxes = np.asarray(nms_boxes(kind, NMS_SIZE, name), np.float32)
                count = int(whole(name + "n", NMS_SIZE + 1, ())) if repeat % 3 else NMS_SIZE
                yield (
                    boxes,
                    nms_scores(name + "p", NMS_SIZE),
                    count,
                    float(threshold),
                    whole(name + "c", 3, NMS_SIZE).astype(np.int32),
                )


def large_nms_cases():
    """Cases of a thousand boxes."""
    for kind in KINDS:
        for i, threshold in enumerate(THRESHOLDS[::3]):
            name = f"large {kind} {i}"
            yield (
                np.asarray(nms_boxes(kind, 1000, name), np.float32),
                nms_scores(name + "p", 1000),
                float(threshold),
            )


def roi_inputs():
    """Feature maps [b, h, w, c] of three levels, boxes [b, r, 4] in pixels: random, on whole cells,
    empty, turned over, far outside.
    """
    maps = [
        (2 * uniform(f"map {i}", (*shape, CHANNELS)) - 1).astype(np.float32)
        for i, shape in enumerate(MAPS)
    ]
    boxes = np.stack([proper_boxes(f"rois {i}", ROIS, 90, 250) for i in range(2)])
    boxes[:, :12] = 4 * whole("whole rois", 24, (2, 12, 4)) - 8
    boxes[:, 12] = 30
    boxes[:, 13] = [-500, -400, -300, -300]
    boxes[:, 14] = [-150, 10, 150, 30]
    boxes[:, 15] = [-2, -2, 92, 68]
    boxes[:, 16] = [0, 0, 92, 68]
    boxes[:, 40:, 2:] = boxes[:, 40:, :2] + 370 * uniform("long rois", (2, ROIS - 40, 2))
    return maps, boxes


def upright(boxes):
    """Swaps corners into ascending order: torchvision's adaptive sampling fails on other boxes."""
    corners = boxes.reshape(*boxes.shape[:-1], 2, 2)
    return np.concatenate([corners.min(axis=-2), corners.max(axis=-2)], axis=-1)


def towards(name, shape):
    """What a result is multiplied with before its gradient is taken."""
    return (2 * uniform("towards " + name, shape) - 1).astype(np.float32)


def matching_cases():
    """Whole boxes that all overlap: anchors [n, 4], truth [m, 4], thresholds."""
    for i in range(150):
        sizes = 3 + whole(f"matching {i}", 6, (26, 2))
        corner = whole(f"matching corner {i}", 3, (26, 2))
        boxes = np.concatenate([corner, corner + sizes], axis=1).astype(np.float32)
        yield boxes[:20], boxes[20 : 21 + i % 6], ((0.3, 0.7), (0.5, 0.5), (0.4, 0.95))[i % 3]
