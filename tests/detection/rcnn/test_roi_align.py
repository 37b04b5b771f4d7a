"""RoIAlign against torchvision (golden), a slow NumPy version and finite differences."""

import functools

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec
import numpy as np
import pytest

from jaxdg.detection.rcnn.roi_align import pyramid_level, roi_align
from tests.detection import cases

pool = jax.jit(roi_align, static_argnums=(2, 3), static_argnames=("samples", "aligned"))
level_of = jax.jit(pyramid_level, static_argnums=1)


@functools.partial(jax.jit, static_argnums=(3, 4), static_argnames=("samples", "aligned"))
def pooled_and_pulled(levels, boxes, towards, strides, size, **options):
    """Features of boxes, and what their gradient sends to the levels."""
    pooled, pull = jax.vjp(
        lambda levels: roi_align(levels, boxes, strides, size, **options), levels
    )
    return pooled, pull(towards)[0]


def inputs():
    """Maps and boxes that torchvision was given, and the boxes the right way round."""
    maps, boxes = cases.roi_inputs()
    return (
        [np.float32(level) for level in maps],
        np.float32(boxes),
        np.float32(cases.upright(boxes)),
    )


def slow(feature, box, stride, size, samples, aligned):
    """The definition for one box on one map [h, w, c], sample by sample, in float64."""
    h, w, _ = feature.shape
    x0, y0, x1, y1 = np.asarray(box, np.float64) / stride - (0.5 if aligned else 0)
    height, width = (y1 - y0, x1 - x0) if aligned else (max(y1 - y0, 1), max(x1 - x0, 1))
    count_y, count_x = (
        samples or int(np.ceil(side / bins))
        for side, bins in zip((height, width), size, strict=True)
    )
    out = np.zeros((*size, feature.shape[2]))
    for i, j in np.ndindex(*size):
        for k, m in np.ndindex(max(count_y, 0), max(count_x, 0)):
            y = y0 + (i + (k + 0.5) / count_y) * height / size[0]
            x = x0 + (j + (m + 0.5) / count_x) * width / size[1]
            if -1 <= y <= h and -1 <= x <= w:
                y = np.clip(y, 0, h - 1)
                x = np.clip(x, 0, w - 1)
                for row in {int(y), min(int(y) + 1, h - 1)}:
                    for column in {int(x), min(int(x) + 1, w - 1)}:
                        out[i, j] += (
                            (1 - abs(y - row)) * (1 - abs(x - column)) * feature[row, column]
                        )
    return out / max(count_y * count_x, 1)


@pytest.mark.usefixtures("platform")
@pytest.mark.parametrize(
    "kind", range(len(cases.ROI_KINDS)), ids=[str(kind) for kind in cases.ROI_KINDS]
)
def test_equals_torchvision(golden, kind):
    """160 boxes inside, across and outside the border, empty and turned over: pooled features and
    their gradient to 1e-5.
    """
    size, samples, aligned = cases.ROI_KINDS[kind]
    (_, level, _), boxes, upright = inputs()
    boxes = boxes if samples else upright
    with np.load(golden / "detection.npz") as file:
        want = file[f"roi_{kind}"]
        gradient = file[f"roi_gradient_{kind}"]
    flat = cases.towards(f"roi {kind}", (2 * cases.ROIS, *size, cases.CHANNELS))
    pooled, (pulled,) = pooled_and_pulled(
        [level],
        boxes,
        np.float32(flat).reshape(want.shape),
        cases.STRIDES[1:2],
        size,
        samples=samples or None,
        aligned=aligned,
    )
    np.testing.assert_allclose(pooled, want, rtol=0, atol=1e-5)
    np.testing.assert_allclose(
        pulled,
        gradient,
        rtol=0,
        atol=1e-5 * np.abs(gradient).max(),
    )


@pytest.mark.usefixtures("platform")
def test_pyramid_equals_torchvision(golden):
    """Boxes spread over three levels as `MultiScaleRoIAlign` spreads them, features and the
    gradients of every level to 1e-5.
    """
    levels, _, boxes = inputs()
    assert np.bincount(np.ravel(level_of(boxes, cases.STRIDES)), minlength=3).min() > 8
    towards = np.float32(cases.towards("pyramid", (2 * cases.ROIS, 2, 2, cases.CHANNELS)))
    with np.load(golden / "detection.npz") as file:
        pooled, pulled = pooled_and_pulled(
            levels,
            boxes,
            towards.reshape(file["pyramid"].shape),
            cases.STRIDES,
            (2, 2),
            aligned=False,
        )
        np.testing.assert_allclose(pooled, file["pyramid"], rtol=0, atol=1e-5)
        for i, gradient in enumerate(pulled):
            want = file[f"pyramid_gradient_{i}"]
            np.testing.assert_allclose(gradient, want, rtol=0, atol=1e-5 * np.abs(want).max())


def test_equals_the_definition():
    """Strides that are no powers of two, boxes far longer than high, every border: the slow
    version's features to 1e-4.
    """
    rng = np.random.default_rng(0)
    strides = (3.5, 7.0, 14.0)
    levels = [
        rng.normal(size=(1, int(98 / s), int(126 / s), 3)).astype(np.float32) for s in strides
    ]
    corner = rng.uniform(-40, 120, (60, 2))
    boxes = np.concatenate([corner, corner + np.exp(rng.uniform(1, 5.5, (60, 2)))], axis=1)
    boxes[:10] = rng.uniform(-150, 250, (10, 4)) * [0.2, 0.2, 0.1, 0.1] + [0, 0, 200, 210]
    boxes = boxes.astype(np.float32)[None]
    index = np.asarray(level_of(boxes, strides))[0]
    assert len(set(index)) == 3
    for size, samples, aligned in (((3, 2), None, True), ((2, 3), 2, True), ((2, 2), None, False)):
        got = pool(
            levels,
            boxes,
            strides,
            size,
            samples=samples,
            aligned=aligned,
        )
        want = [
            slow(levels[i][0], box, strides[i], size, samples, aligned)
            for i, box in zip(index, boxes[0], strict=True)
        ]
        np.testing.assert_allclose(got[0], want, rtol=0, atol=1e-4)


@pytest.mark.usefixtures("platform")
def test_gradient_is_the_slope():
    """The gradient equals central differences along random directions: adaptive, and with samples
    on the very border.
    """
    levels, _, boxes = inputs()
    boxes = np.concatenate(
        [boxes[:, :20], np.float32([[[-6.0, -6, 98, 74], [0, 0, 92, 68]]] * 2)], axis=1
    )
    towards = np.float32(cases.towards("slope", (2, 22, 2, 2, cases.CHANNELS)))

    def loss_of(levels):
        pooled = roi_align(levels, jnp.asarray(boxes), cases.STRIDES, (2, 2), samples=None)
        return jnp.sum(pooled**2 * towards)

    loss = jax.jit(loss_of)
    direction = [
        np.float32(cases.towards(f"direction {i}", level.shape)) for i, level in enumerate(levels)
    ]
    ahead, behind = (
        loss([x + np.float32(step) * d for x, d in zip(levels, direction, strict=True)])
        for step in (0.25, -0.25)
    )
    gradient = jax.jit(jax.grad(loss_of))(levels)
    slope = sum(np.sum(np.asarray(g) * d) for g, d in zip(gradient, direction, strict=True))
    np.testing.assert_allclose(slope, (ahead - behind) / 0.5, rtol=1e-3)


def test_levels_are_those_of_fpn():
    """For strides 4 to 32 a box of area s^2 is read at level floor(4 + log2(s / 224)), bounded;
    exactly where the logarithm is whole.
    """
    side = np.concatenate(
        [np.exp(np.random.default_rng(1).uniform(0, 8, 3000)), 28.0 * 2 ** np.arange(8), [0]]
    )
    boxes = np.stack([0 * side + 5, 0 * side, side + 5, side], axis=-1).astype(np.float32)
    with np.errstate(divide="ignore"):
        want = np.clip(np.floor(4 + np.log2(side / 224)), 2, 5) - 2
    np.testing.assert_array_equal(level_of(boxes, (4, 8, 16, 32)), want)


def test_boxes_are_read_alone():
    """Order, padding (immense, or not a number) and whole shifts of map and box together change no
    box's features; nor does the batch.
    """
    rng = np.random.default_rng(2)
    levels, _, boxes = inputs()

    def read(levels, boxes):
        return np.asarray(pool(levels, boxes, cases.STRIDES, (2, 2), samples=2))

    want = read(levels, boxes)
    order = rng.permutation(boxes.shape[1])
    padding = np.float32(
        [[[np.nan, 0, 9, 9], [-1e9, -1e9, 1e9, 1e9], [0, 0, np.inf, np.inf], [0, 0, 0, 0]]] * 2
    )
    got = read(levels, np.concatenate([padding[:, :3], boxes[:, order], padding[:, 3:]], axis=1))
    np.testing.assert_allclose(got[:, 3:-1], want[:, order], rtol=0, atol=1e-6)
    assert np.isfinite(got).all()
    np.testing.assert_allclose(
        read([level[1:] for level in levels], boxes[1:])[0], want[1], rtol=0, atol=1e-6
    )
    wide = [
        np.pad(x, ((0, 0), (8 // 2**i, 0), (4 // 2**i, 0), (0, 0))) for i, x in enumerate(levels)
    ]
    shifted = read(wide, boxes + np.float32([16, 32, 16, 32]))
    inside = np.asarray(
        (boxes.min(-1) > 8) & (boxes[..., 2] > boxes[..., 0]) & (boxes[..., 3] > boxes[..., 1])
    )
    assert inside.sum() > 20
    np.testing.assert_allclose(shifted[inside], want[inside], rtol=0, atol=1e-5)


def test_adaptive_sampling_ends():
    """A box of 1e9 pixels, one that is infinite and one that is not a number neither hold the loop
    up nor touch the other boxes.
    """
    levels, _, boxes = inputs()
    level = [levels[2]]
    boxes = boxes[:, :20]
    far = boxes.copy()
    far[:, 1:4] = [[-1e9, -1e9, 1e9, 1e9], [0, 0, np.inf, np.inf], [np.nan, 0, 9, 9]]
    want, got = (np.asarray(pool(level, x, (16,), (2, 2), samples=None)) for x in (boxes, far))
    np.testing.assert_allclose(
        np.delete(got, [1, 2, 3], 1), np.delete(want, [1, 2, 3], 1), rtol=0, atol=1e-6
    )
    assert np.isfinite(got).all()


def test_types_devices_and_padding_of_gradients():
    """bfloat16 maps give bfloat16; a batch over devices gives the same; boxes get no gradient and
    unused ones, not a number, harm none.
    """
    levels, _, boxes = inputs()
    full = pool(levels, boxes, cases.STRIDES, (2, 2))
    half = pool([level.astype(jnp.bfloat16) for level in levels], boxes, cases.STRIDES, (2, 2))
    assert half.dtype == jnp.bfloat16
    np.testing.assert_allclose(np.asarray(half, np.float32), full, atol=0.02)
    boxes[:, 3] = np.nan
    used = np.ones((boxes.shape[1], 1, 1, 1), np.float32)
    used[3] = 0
    gradient = jax.jit(
        jax.grad(
            lambda levels, boxes: jnp.sum(
                used * roi_align(levels, boxes, cases.STRIDES, (2, 2)) ** 2
            ),
            (0, 1),
        )
    )
    to_levels, to_boxes = gradient(levels, boxes)
    assert not np.any(to_boxes)
    assert all(np.isfinite(to_level).all() for to_level in to_levels)
    sharding = NamedSharding(Mesh(np.array(jax.devices()[:2]), ("data",)), PartitionSpec("data"))
    spread, _ = gradient(*jax.device_put((levels, boxes), sharding))
    for got, want in zip(spread, to_levels, strict=True):
        np.testing.assert_allclose(got, want, rtol=0, atol=1e-5)
    with pytest.raises(ValueError, match="3 levels of features need as many strides, not 1"):
        pool(levels, boxes, (4,), (2, 2))
