"""Overlaps and offsets of boxes against torchvision (golden), areas counted pixel by pixel, and
laws.
"""

import jax
import jax.numpy as jnp
import numpy as np

from jaxdg.detection import boxes as operators
from tests.detection import cases

area, giou, iou, pairwise_giou, pairwise_iou = (
    jax.jit(getattr(operators, name))
    for name in ("area", "giou", "iou", "pairwise_giou", "pairwise_iou")
)
encode, decode = (
    jax.jit(f, static_argnames="weights") for f in (operators.encode, operators.decode)
)
clip = operators.clip
non_empty = operators.non_empty
WEIGHTS = (10.0, 10.0, 5.0, 5.0)


def given(name, n=500):
    """Boxes that torchvision was given."""
    return jnp.asarray(cases.proper_boxes(name, n, 50, 90))


def whole_boxes(rng, n):
    """Boxes on whole pixels from 0 to 12, of which some are empty or turned over."""
    return jnp.asarray(rng.integers(0, 13, (n, 4)), jnp.float32)


def test_equal_torchvision(golden):
    """IoU and GIoU of 2500 pairs, encoding, decoding (two classes, sides at the limit), clipping:
    torchvision's, to float32's rounding.
    """
    with np.load(golden / "detection.npz") as file:
        want = dict(file)
    a = given("a", 50)
    b = given("b", 50)
    np.testing.assert_allclose(pairwise_iou(a, b), want["iou"], rtol=1e-6, atol=1e-7)
    np.testing.assert_allclose(pairwise_giou(a, b), want["giou"], rtol=1e-5, atol=1e-6)
    boxes = given("left")
    anchors = given("right")
    np.testing.assert_allclose(
        encode(boxes, anchors, weights=WEIGHTS), want["encoded"], rtol=1e-5, atol=1e-5
    )
    offsets = jnp.asarray(cases.towards("offsets", (500, 8)) * 30).reshape(500, 2, 4)
    assert 0.1 < float(jnp.mean(offsets[..., 2:] / 5 > operators.SCALE_LIMIT)) < 0.9
    decoded = decode(offsets, anchors[:, None], weights=WEIGHTS)
    np.testing.assert_allclose(decoded.reshape(500, 8), want["decoded"], rtol=1e-5, atol=1e-4)
    np.testing.assert_array_equal(clip(boxes, (40, 48)), want["clipped"])


def test_giou_and_its_gradient_equal_torchvision(golden):
    """The loss 1 - GIoU of 500 pairs, and its gradient, as `generalized_box_iou_loss`; and finite
    gradients from empty boxes.
    """
    with np.load(golden / "detection.npz") as file:
        want = file["giou_loss"]
        gradient = file["giou_gradient"]

    def loss(a, b):
        return jnp.sum(1 - giou(a, b))

    np.testing.assert_allclose(1 - giou(given("left"), given("right")), want, rtol=1e-5, atol=1e-6)
    gradient_of = jax.jit(jax.grad(loss))
    to_left = gradient_of(given("left"), given("right"))
    np.testing.assert_allclose(to_left, gradient, rtol=1e-4, atol=1e-6 * np.abs(gradient).max())
    degenerate = whole_boxes(np.random.default_rng(0), 200) // 6
    assert jnp.all(jnp.isfinite(gradient_of(degenerate, degenerate[::-1])))
    assert jnp.all(jnp.isfinite(gradient_of(degenerate, degenerate)))


def test_overlaps_count_pixels():
    """Boxes on whole pixels have the areas, intersections, unions and hulls that a count of pixels
    finds; empty ones have none.
    """
    rng = np.random.default_rng(1)
    a = whole_boxes(rng, 40)
    b = whole_boxes(rng, 30)
    pixel = np.stack(np.meshgrid(np.arange(13), np.arange(13)), axis=-1).reshape(-1, 2)

    def covers(boxes):
        return ((pixel >= boxes[:, None, :2]) & (pixel < boxes[:, None, 2:])).all(-1)

    in_a = covers(np.asarray(a))
    in_b = covers(np.asarray(b))
    assert 5 < (in_a.sum(1) == 0).sum() < 35
    np.testing.assert_array_equal(area(a), in_a.sum(1))
    np.testing.assert_array_equal(non_empty(a), in_a.any(1))
    both = (in_a[:, None] & in_b).sum(-1)
    either = (in_a[:, None] | in_b).sum(-1)
    np.testing.assert_allclose(pairwise_iou(a, b), both / np.maximum(either, 1), rtol=1e-6)
    proper_a = a[in_a.any(1)]
    proper_b = b[in_b.any(1)]
    hull = jnp.concatenate(
        [
            jnp.minimum(proper_a[:, None, :2], proper_b[None, :, :2]),
            jnp.maximum(proper_a[:, None, 2:], proper_b[None, :, 2:]),
        ],
        axis=-1,
    )
    hull = covers(np.asarray(hull).reshape(-1, 4)).sum(-1).reshape(len(proper_a), -1)
    both, either = (x[in_a.any(1)][:, in_b.any(1)] for x in (both, either))
    np.testing.assert_allclose(
        pairwise_giou(proper_a, proper_b),
        both / either - (hull - either) / hull,
        rtol=1e-5,
        atol=1e-6,
    )


def test_overlaps_have_the_same_bits_everywhere():
    """On random boxes IoU has the bits of NumPy's float32, alone, in pairs, and inside a larger
    program with its maximum.
    """
    a, b = (np.asarray(given(name, 300)) for name in ("here", "there"))

    def sides(x):
        return x[..., 2:] - x[..., :2]

    both = np.prod(
        np.maximum(
            np.minimum(a[:, None, 2:], b[:, 2:]) - np.maximum(a[:, None, :2], b[:, :2]),
            np.float32(0),
        ),
        axis=-1,
    )
    expected = both / (np.prod(sides(a), axis=-1)[:, None] + np.prod(sides(b), axis=-1) - both)
    assert expected.dtype == np.float32
    np.testing.assert_array_equal(pairwise_iou(a, b), expected)
    np.testing.assert_array_equal(iou(a, b), np.diagonal(expected))

    @jax.jit
    def ties(a, b):
        overlap = pairwise_iou(a, b)
        return jnp.sum(overlap == jnp.max(overlap, axis=1, keepdims=True), axis=1)

    np.testing.assert_array_equal(
        ties(a, b), (expected == expected.max(axis=1, keepdims=True)).sum(axis=1)
    )


def test_overlap_laws():
    """IoU and GIoU are symmetric, 1 with itself, and do not change with place or size."""
    a = given("left")
    b = given("right")
    for measure in (iou, giou):
        np.testing.assert_array_equal(measure(a, b), measure(b, a))
        np.testing.assert_array_equal(measure(a, a), 1)
        np.testing.assert_allclose(
            measure(3 * a + 7, 3 * b + 7), measure(a, b), rtol=1e-4, atol=1e-5
        )


def test_decode_undoes_encode():
    """Boxes come back within 1e-3 pixels for any weights, where no side grows beyond the limit;
    empty boxes and anchors stay finite.
    """
    boxes = given("left")
    anchors = given("right")
    for weights in ((1.0, 1.0, 1.0, 1.0), (30.0, 20.0, 15.0, 10.0)):
        again = decode(encode(boxes, anchors, weights=weights), anchors, weights=weights)
        grown = jnp.max(
            jnp.stack(operators.sides(boxes)) / jnp.stack(operators.sides(anchors)), axis=0
        )
        assert float(jnp.mean(grown < 62)) > 0.9
        np.testing.assert_allclose(again[grown < 62], boxes[grown < 62], rtol=0, atol=1e-3)
    rng = np.random.default_rng(2)
    empty = whole_boxes(rng, 300) // 4
    other = whole_boxes(rng, 300) // 4

    def loss(a):
        return jnp.sum(encode(a, other) ** 2)

    assert jnp.all(jnp.isfinite(jax.value_and_grad(loss)(empty)[1]))
    assert jnp.all(jnp.isfinite(encode(empty, other)))


def test_clip_to_each_image():
    """Every image of a batch has its own size; a box outside becomes empty; low precision is read
    as float32.
    """
    boxes = jnp.asarray([[[-5, -6, 70, 80], [100, 100, 120, 130]]] * 2, jnp.bfloat16)
    clipped = clip(boxes, jnp.asarray([[[40.0, 50.0]], [[90.0, 60.0]]]))
    np.testing.assert_array_equal(
        clipped, [[[0, 0, 50, 40], [50, 40, 50, 40]], [[0, 0, 60, 80], [60, 90, 60, 90]]]
    )
    np.testing.assert_array_equal(non_empty(clipped), [[True, False]] * 2)
    corners = jnp.asarray([[0, 0, 3, 5], [0, 0, jnp.inf, 5], [0, jnp.nan, 3, 5], [5, 0, 0, 5]])
    np.testing.assert_array_equal(non_empty(corners), [True, False, False, False])
    np.testing.assert_array_equal(non_empty(corners, least=3.0), [False] * 4)
