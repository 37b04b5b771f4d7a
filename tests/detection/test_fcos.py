"""The single-stage head against torchvision (golden), slow NumPy versions, and laws."""

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdg.detection.anchors import points
from jaxdg.detection.arrays import Targets
from jaxdg.detection.fcos import FcosConfig, FcosOutput, assign_points
from jaxdg.detection.interface import HeadContext
from tests.detection import models
from tests.detection.test_nms import slow as slow_nms

SHAPES = [(12, 16), (6, 8), (3, 4)]
STRIDES = [4.0, 8.0, 16.0]
IMAGE = (48, 64)
COUNT = 12 * 16 + 6 * 8 + 3 * 4


def make(classes=3, **options):
    """A head for 48 x 64 images."""
    context = HeadContext(nnx.Module(), classes, SHAPES, STRIDES, IMAGE, "float32")
    config = FcosConfig(channels=models.FCOS_CHANNELS, **options)
    return nnx.jit(lambda: config.build(context, rngs=nnx.Rngs(0)))()


def some_targets(boxes, classes=None, slots=None):
    """One image, padded to a number of slots."""
    missing = (slots or len(boxes)) - len(boxes)
    classes = np.zeros(len(boxes)) if classes is None else classes
    rows = np.concatenate([boxes, np.zeros((missing, 4))]).astype(np.float32)
    valid = np.arange(len(rows)) < len(boxes)
    return Targets(
        jnp.asarray(rows)[None],
        jnp.asarray(np.pad(classes, (0, missing)), jnp.int32)[None],
        jnp.asarray(valid)[None],
    )


def random_boxes(name, n):
    """Of all sizes, many tiny, in and around the image."""
    corner = np.abs(models.normal(f"{name} corner", (n, 2))) * [30, 20]
    return np.concatenate(
        [corner, corner + 0.5 + 60 * np.abs(models.normal(f"{name} side", (n, 2))) ** 3], axis=1
    ).astype(np.float32)


def random_output(name, images=1, classes=3):
    """Predictions of a head that sees noise."""

    def draw(part, *shape):
        return jnp.asarray(models.normal(f"{name} {part}", (images, COUNT, *shape)))

    return FcosOutput(draw("class", classes), 0.3 * draw("offsets", 4), draw("fit"))


def test_towers_equal_torchvision(golden):
    """Convolutions, GroupNorm and the three predictions of each point; levels one after another,
    rows first.
    """
    head = make(models.CLASSES)
    for ours, theirs in (
        (head.cls_tower, "classification_head"),
        (head.bbox_tower, "regression_head"),
    ):
        for i in (0, 1, 3, 4):
            models.fill(ours[i], f"fcos.{theirs}.conv.{i}")
    models.fill(head.cls_logits, "fcos.classification_head.cls_logits")
    models.fill(head.bbox_pred, "fcos.regression_head.bbox_reg")
    models.fill(head.fit, "fcos.regression_head.bbox_ctrness")
    x = jnp.asarray(models.normal("fcos", (2, 9, 7, models.FCOS_CHANNELS)))
    output = jax.jit(lambda x: head((x, x[:, :2, :3])))(x)
    with np.load(golden / "detectors.npz") as file:
        for got, name in zip(output, ("class", "box", "fit"), strict=True):
            want = file[f"fcos_{name}"].reshape(2, 63, -1)
            assert got.shape[1] == 63 + 6
            np.testing.assert_allclose(got[:, :63].reshape(want.shape), want, rtol=1e-4, atol=1e-4)


def slow_assign(boxes):
    """The rule, box by box and point by point."""
    grid = [
        (x, y, i)
        for i, p in enumerate(points(SHAPES, STRIDES))
        for x, y in np.asarray(p, np.float64)
    ]
    chosen = [-1] * len(grid)
    given = [-1] * len(grid)
    for m in np.argsort((boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])):
        x0, y0, x1, y1 = boxes[m].astype(np.float64)
        level = next((i for i, s in enumerate(STRIDES[:-1]) if max(x1 - x0, y1 - y0) <= 16 * s), 2)
        away = [(abs(x - (x0 + x1) / 2), abs(y - (y0 + y1) / 2)) for x, y, _ in grid]
        free = [n for n, point in enumerate(grid) if point[2] == level and chosen[n] < 0]
        if free:
            chosen[min(free, key=lambda n: np.hypot(*away[n]))] = m
        for n, (x, y, i) in enumerate(grid):
            if (
                i == level
                and given[n] < 0
                and x0 < x < x1
                and y0 < y < y1
                and max(away[n]) < 1.5 * STRIDES[i]
            ):
                given[n] = m
    return np.array([c if c >= 0 else g for c, g in zip(chosen, given, strict=True)])


def test_assignment_equals_a_slow_one():
    """Levels, centres, the nearest free point, and who comes first, on random boxes with other
    padding.
    """
    run = jax.jit(lambda targets: assign_points(targets, points(SHAPES, STRIDES), STRIDES))
    for i, n in enumerate((0, 1, 5, 30)):
        boxes = random_boxes(f"assign {i}", n)
        got = np.asarray(run(some_targets(boxes, slots=30)))[0]
        np.testing.assert_array_equal(got, slow_assign(boxes))
    assert (got >= 0).sum() > 30


def test_no_box_is_lost():
    """Boxes of any size, between points or around them, at the border, inside others, in the same
    place: each has a point.
    """
    centre = np.stack(np.meshgrid(np.arange(2, 64, 4.0), np.arange(2, 48, 4.0)), axis=-1).reshape(
        -1, 2
    ) + 1.7 * models.normal("c", (192, 2)).clip(-1, 1)
    half = np.abs(models.normal("half", (192, 2))) * 2 + 0.1
    tiny = np.concatenate([centre - half, centre + half], axis=1)
    whole = np.array(
        [[0, 0, 64, 48], [1, 1, 63, 47], [0, 0, 64, 48], [40, 30, 64, 48], [0, 0, 200, 300]]
    )
    boxes = np.concatenate([tiny[::2], whole]).astype(np.float32)
    head = make()
    got = np.asarray(jax.jit(lambda targets: head.assign(targets))(some_targets(boxes, slots=300)))[
        0
    ]
    assert set(got) >= set(range(len(boxes)))


def slow_losses(output, targets, index):
    """Focal, GIoU and fit losses of one image, in float64, not divided."""
    logits, offsets, fits = (np.asarray(x[0], np.float64) for x in output)
    boxes = np.asarray(targets.boxes[0], np.float64)
    classes = np.asarray(targets.classes[0])
    grid = np.concatenate(
        [
            np.concatenate([p, np.full((len(p), 1), s)], axis=1)
            for p, s in zip(points(SHAPES, STRIDES), STRIDES, strict=True)
        ]
    )
    terms = np.zeros(3)
    for n, m in enumerate(index):
        for k, logit in enumerate(logits[n]):
            p = 1 / (1 + np.exp(-logit))
            terms[0] -= (
                0.25 * (1 - p) ** 2 * np.log(p)
                if m >= 0 and classes[m] == k
                else 0.75 * p**2 * np.log(1 - p)
            )
        if m < 0:
            continue
        x, y, s = grid[n].astype(np.float64)
        w, h = 8 * s * np.exp(offsets[n, 2:])
        cx = x + 8 * s * offsets[n, 0]
        cy = y + 8 * s * offsets[n, 1]
        a = (cx - w / 2, cy - h / 2, cx + w / 2, cy + h / 2)
        b = boxes[m]
        both = max(min(a[2], b[2]) - max(a[0], b[0]), 0) * max(min(a[3], b[3]) - max(a[1], b[1]), 0)
        union = w * h + (b[2] - b[0]) * (b[3] - b[1]) - both
        hull = (max(a[2], b[2]) - min(a[0], b[0])) * (max(a[3], b[3]) - min(a[1], b[1]))
        terms[1] += 1 - both / union + (hull - union) / hull
        p = 1 / (1 + np.exp(-fits[n]))
        fit = both / union
        terms[2] -= fit * np.log(p) + (1 - fit) * np.log(1 - p)
    return terms


def test_losses_equal_slow_ones_and_parts_add_up():
    """The three terms in float64; those of two images with the denominator of both add up to those
    of the batch; padding counts nothing.
    """
    head = make()
    alone = [
        some_targets(random_boxes(f"loss {i}", n), np.arange(n) % 3, slots=7)
        for i, n in enumerate((6, 0))
    ]
    targets = Targets(*(jnp.concatenate(parts) for parts in zip(*alone, strict=True)))
    outputs = [random_output(f"image {i}") for i in range(2)]
    whole = FcosOutput(*(jnp.concatenate(parts) for parts in zip(*outputs, strict=True)))
    denominator = jax.jit(lambda targets: head.loss_denominator(targets))(targets)
    losses = jax.jit(lambda *args: head.losses(*args))
    index = [slow_assign(np.asarray(t.boxes[0])[np.asarray(t.valid[0])]) for t in alone]
    count = float(denominator.points)
    assert count == sum((i >= 0).sum() for i in index) > 6
    want = sum(slow_losses(*args) for args in zip(outputs, alone, index, strict=True)) / count
    got = losses(whole, targets, denominator)
    np.testing.assert_allclose([got[name] for name in ("class", "box", "fit")], want, rtol=1e-5)
    parts = [losses(output, t, denominator) for output, t in zip(outputs, alone, strict=True)]
    for name, value in got.items():
        np.testing.assert_allclose(sum(float(part[name]) for part in parts), value, rtol=1e-6)


def test_a_logit_penalty_is_a_mean_over_all_points():
    """0.1 times the mean of all squared logits, counted from that of a probability of 0.01; its
    parts add up, and the other terms stay as they are to the last bit.
    """
    plain, penalised = make(), make(logit_penalty=0.1)
    targets = some_targets(random_boxes("penalty", 6), np.arange(6) % 3, slots=7)
    targets = Targets(*(jnp.concatenate([x, x]) for x in targets))
    output = random_output("penalty", 2)
    rows = [jax.tree.map(lambda x, i=i: x[i : i + 1], (output, targets)) for i in range(2)]

    @jax.jit
    def terms():
        denominator = plain.loss_denominator(targets)
        parts = [penalised.losses(*row, denominator)["logits"] for row in rows]
        without = plain.losses(output, targets, denominator)
        return without, penalised.losses(output, targets, denominator), parts

    without, terms, parts = terms()
    squared = (np.asarray(output.class_logits, np.float64) - np.log(0.01 / 0.99)) ** 2
    np.testing.assert_allclose(terms.pop("logits"), 0.1 * squared.mean(), rtol=1e-5)
    np.testing.assert_allclose(sum(parts), 0.1 * squared.mean(), rtol=1e-5)
    assert terms == without


def test_detections_equal_a_slow_version():
    """The 40 best pairs of point and class, cut off at the image, suppressed by class."""
    head = make(candidates=40, detections=15, score_threshold=0.6)
    output = random_output("found", 2)
    sizes = np.float32([[48, 64], [30, 33]])
    found = jax.jit(lambda output: head.detections(output, jnp.asarray(sizes)))(output)
    squares = np.asarray(head.squares, np.float64)
    for i, (h, w) in enumerate(sizes):

        def sigmoid(x, i=i):
            return 1 / (1 + np.exp(-np.asarray(x[i], np.float64)))

        scores = np.sqrt(sigmoid(output.class_logits) * sigmoid(output.fit_logits)[:, None])
        offsets = np.asarray(output.offsets[i], np.float64)
        side = squares[:, 2:] - squares[:, :2]
        centre = (squares[:, :2] + squares[:, 2:]) / 2 + side * offsets[:, :2]
        half = side * np.exp(offsets[:, 2:]) / 2
        boxes = np.clip(
            np.concatenate([centre - half, centre + half], axis=1), 0, [w, h, w, h]
        ).astype(np.float32)
        scores[(boxes[:, 2:] <= boxes[:, :2]).any(axis=1)] = 0
        best = np.argsort(-scores.ravel())[:40]
        kept = slow_nms(
            boxes[best // 3], scores.ravel()[best], scores.ravel()[best] > 0.6, 0.6, best % 3
        )[:15]
        valid = np.asarray(found.valid[i])
        assert valid.sum() == len(kept) > 4
        np.testing.assert_allclose(found.scores[i][valid], scores.ravel()[best[kept]], atol=1e-6)
        np.testing.assert_array_equal(found.classes[i][valid], best[kept] % 3)
        np.testing.assert_allclose(found.boxes[i][valid], boxes[best[kept] // 3], atol=1e-3)


def test_before_training_nothing_is_likely():
    """Every class has a probability of about 0.01 everywhere, and boxes are about the squares
    around the points.
    """
    head = make()
    maps = tuple(
        jnp.asarray(models.normal(f"map {i}", (1, *shape, models.FCOS_CHANNELS)))
        for i, shape in enumerate(SHAPES)
    )
    output = jax.jit(lambda maps: head(maps))(maps)
    p = jax.nn.sigmoid(output.class_logits)
    assert 0.005 < float(p.min()) < 0.01 < float(p.max()) < 0.02
    assert np.abs(output.offsets).mean() < 0.15


def test_groups_that_do_not_divide_are_refused():
    """The error names both numbers."""
    context = HeadContext(nnx.Module(), 3, SHAPES, STRIDES, IMAGE, "float32")
    with pytest.raises(ValueError, match=r"40.*32"):
        FcosConfig(channels=40).build(context, rngs=nnx.Rngs(0))
