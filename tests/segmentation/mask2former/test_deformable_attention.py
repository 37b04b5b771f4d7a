"""Deformable attention against transformers (golden), slow NumPy and finite differences."""

import math

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdg.segmentation.mask2former import deformable_attention as module
from jaxdg.segmentation.mask2former.deformable_attention import DeformableAttention, pixel_centres

LEVELS = ((5, 7), (3, 4), (2, 2))
TINY = ((3, 2), (1, 4))

pytestmark = pytest.mark.usefixtures("platform")


def deformable_attention(values, shapes, locations, weights):
    """The function that is tested, given NumPy arrays and torch's locations.

    0 and 1 are the outer edges of a map, as in `grid_sample(align_corners=False)`.
    """
    sizes = np.asarray(shapes, np.float32)[:, None, ::-1]
    places = jnp.asarray(locations) * sizes - 0.5
    return module.deformable_attention(jnp.asarray(values), shapes, places, jnp.asarray(weights))


def slow(values, shapes, locations, weights):
    """The definition, point by point: the four pixels around a point by their shares of it, none
    outside the map.
    """
    b, _, heads, d = values.shape
    out = np.zeros((b, locations.shape[1], heads, d))
    for i, q, head, level, p in np.ndindex(*locations.shape[:-1]):
        h, w = shapes[level]
        start = sum(rows * columns for rows, columns in shapes[:level])
        x, y = locations[i, q, head, level, p] * (w, h) - 0.5
        for row in (math.floor(y), math.floor(y) + 1):
            for column in (math.floor(x), math.floor(x) + 1):
                if 0 <= row < h and 0 <= column < w:
                    share = (1 - abs(y - row)) * (1 - abs(x - column))
                    out[i, q, head] += (
                        weights[i, q, head, level, p]
                        * share
                        * values[i, start + row * w + column, head]
                    )
    return out.reshape(b, -1, heads * d)


def inputs(normal):
    """What the oracle was given; a good part of the points lies outside the maps."""
    shape = (2, 11, 4, len(LEVELS), 3)
    locations = 0.5 + 0.5 * normal("locations", (*shape, 2))
    assert 0.3 < np.mean((locations < 0) | (locations > 1)) < 0.7
    return (
        normal("values", (2, sum(h * w for h, w in LEVELS), 4, 6)),
        locations,
        normal("weights", shape),
    )


def test_output_and_gradients_equal_the_oracle(golden, normal):
    """Output within 1e-5, and the gradients of a weighted sum of it with respect to values, places
    and weights, as torch's.
    """
    values, locations, weights = inputs(normal)
    with np.load(golden / "mask2former_attention.npz") as file:
        want = dict(file)
    np.testing.assert_allclose(
        deformable_attention(values, LEVELS, locations, weights), want["output"], rtol=0, atol=1e-5
    )
    towards = normal("towards", want["output"].shape)

    def loss(v, x, w):
        return jnp.sum(deformable_attention(v, LEVELS, x, w) * towards)

    gradients = jax.jit(jax.grad(loss, (0, 1, 2)))(values, locations, weights)
    for got, name in zip(gradients, ("to_values", "to_locations", "to_weights"), strict=True):
        np.testing.assert_allclose(
            got, want[name], rtol=1e-5, atol=1e-5 * np.abs(want[name]).max(), err_msg=name
        )


def test_points_on_centres_and_edges_equal_the_definition():
    """Centres, outer edges and corners, just outside and far outside, where rounding decides which
    pixels are read.
    """
    rng = np.random.default_rng(0)
    values = rng.standard_normal((1, 10, 2, 3), np.float32)
    spots = [0.0, 1.0, 0.25, 0.5, 0.125, 0.875, -0.2, 1.2, -40.0, 50.0]
    places = np.asarray([(x, y) for x in spots for y in spots], np.float32)
    locations = np.broadcast_to(places[:, None, None, None], (len(places), 2, 2, 1, 2))[None]
    weights = rng.standard_normal(locations.shape[:-1], np.float32)
    got = deformable_attention(values, TINY, locations, weights)
    np.testing.assert_allclose(got, slow(values, TINY, locations, weights), rtol=0, atol=1e-5)
    far = np.abs(places).max(-1) > 2
    assert far.sum() > 10
    np.testing.assert_array_equal(np.asarray(got)[0, far], 0)


def test_a_point_on_a_pixel_reads_that_pixel():
    """Each pixel's centre on its own level gives back that pixel's values."""
    values = np.random.default_rng(1).standard_normal((1, 10, 1, 5), np.float32)
    locations = np.broadcast_to(
        pixel_centres(TINY)[None, :, None, None, None], (1, 10, 1, 2, 1, 2)
    ).astype(np.float32)
    own = np.repeat(np.eye(2, dtype=np.float32), (6, 4), axis=0)[None, :, None, :, None]
    np.testing.assert_allclose(
        deformable_attention(values, TINY, locations, own)[0], values[0, :, 0], rtol=0, atol=1e-5
    )


def test_gradients_equal_finite_differences():
    """The backward pass of its own: between pixel borders the output is linear in every number, so
    differences are exact.
    """
    rng = np.random.default_rng(2)
    values = rng.standard_normal((1, 10, 1, 2), np.float32)
    # 0.3 to 0.7 of the way between two centres, or outside by as much, so a small step crosses no
    # border.
    sizes = np.asarray(TINY, np.float32)[:, None, ::-1]
    steps = rng.integers(-2, sizes.astype(int) + 1, (1, 3, 1, 2, 2, 2)) + rng.uniform(
        0.3, 0.7, (1, 3, 1, 2, 2, 2)
    )
    locations = ((steps + 0.5) / sizes).astype(np.float32)
    weights = rng.standard_normal((1, 3, 1, 2, 2), np.float32)
    towards = rng.standard_normal((1, 3, 2)).astype(np.float32)
    arguments = [values, locations, weights]

    def loss(*a):
        return jnp.sum(deformable_attention(a[0], TINY, *a[1:]) * towards)

    gradients = jax.jit(jax.grad(loss, (0, 1, 2)))(*arguments)
    for which, gradient in enumerate(gradients):
        for at in np.ndindex(*gradient.shape):
            sides = []
            for step in (0.02, -0.02):
                moved = [a.astype(np.float64) for a in arguments]
                moved[which][at] += step
                sides.append(np.sum(slow(moved[0], TINY, *moved[1:]) * towards))
            np.testing.assert_allclose(
                gradient[at], (sides[0] - sides[1]) / 0.04, rtol=1e-4, atol=1e-4
            )


def test_far_points_have_no_gradient_and_break_nothing(normal):
    """Places past any integer, even infinite, read nothing, and their gradients are 0, not NaN."""
    values, locations, weights = inputs(normal)

    def loss(*a):
        return jnp.sum(deformable_attention(a[0], LEVELS, *a[1:]))

    value_and_gradients = jax.jit(jax.value_and_grad(loss, (0, 1, 2)))
    for far in (3e9, -3e20, np.inf):
        gone = np.full_like(locations, far)
        output, gradients = value_and_gradients(values, gone, weights)
        assert output == 0
        for gradient in gradients:
            np.testing.assert_array_equal(gradient, 0)


def test_half_precision_values_are_summed_in_float32(normal):
    """Values in bfloat16 give what their rounded numbers give in float32, up to its last bits;
    their gradient is bfloat16.
    """
    values, locations, weights = inputs(normal)
    half = jnp.asarray(values, jnp.bfloat16)
    run = jax.jit(lambda v: deformable_attention(v, LEVELS, locations, weights))
    np.testing.assert_allclose(
        run(half), run(half.astype(jnp.float32)), rtol=1e-5, atol=1e-6
    )  # sums in bfloat16 would miss by 1e-3
    gradient = jax.jit(jax.grad(lambda v: jnp.sum(run(v) ** 2)))
    gradients = [gradient(v) for v in (half, half.astype(jnp.float32))]
    assert gradients[0].dtype == jnp.bfloat16
    np.testing.assert_array_equal(gradients[0], gradients[1].astype(jnp.bfloat16))


def test_first_offsets_are_those_of_deformable_detr():
    """Untrained, head i of 8 looks in direction i of a compass, its points 1 to 4 pixels away, all
    weights equal.
    """
    layer = DeformableAttention(16, 8, 3, 4, dtype="float32", rngs=nnx.Rngs(0))
    offsets = np.asarray(layer.sampling_offsets.bias[...]).reshape(8, 3, 4, 2)
    compass = [(1, 0), (1, 1), (0, 1), (-1, 1), (-1, 0), (-1, -1), (0, -1), (1, -1)]
    for head, level, point in np.ndindex(8, 3, 4):
        np.testing.assert_allclose(
            offsets[head, level, point], np.multiply(compass[head], point + 1), atol=1e-5
        )
    for part in (
        layer.sampling_offsets.kernel,
        layer.attention_weights.kernel,
        layer.attention_weights.bias,
    ):
        np.testing.assert_array_equal(part[...], 0)


def test_levels_that_do_not_add_up_are_refused(normal):
    """The message names the levels and both counts."""
    values, locations, weights = inputs(normal)
    with pytest.raises(ValueError, match="levels of 5x7 3x4 2x3 have 53 pixels, the values 51"):
        deformable_attention(values, ((5, 7), (3, 4), (2, 3)), locations, weights)
