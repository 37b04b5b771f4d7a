"""Sums by row in integers, against float64."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdg.backbones.scatter_sum import scatter_sum
from jaxdg.detection.rcnn.roi_align import roi_align
from jaxdg.segmentation.mask2former import losses
from jaxdg.segmentation.mask2former.deformable_attention import deformable_attention


def drawn(size=9, shape=(4, 50, 3), d=5, seed=0):
    """Rows, weights and vectors; the vectors are the same along the first axis."""
    rng = np.random.default_rng(seed)
    rows = rng.integers(0, size, shape).astype(np.int32)
    weights = rng.normal(size=shape).astype(np.float32)
    vectors = rng.normal(size=(*shape[1:], d)).astype(np.float32) * [1, 1e-6, 1e6, 1, 0]
    return rows, weights, vectors.astype(np.float32)


def slow(size, rows, weights, vectors):
    """The definition, in float64."""
    total = np.zeros((size, vectors.shape[-1]))
    np.add.at(total, rows, weights[..., None].astype(np.float64) * vectors)
    return total


def test_equals_the_definition():
    """Within float32's rounding of the largest sum of a channel, whatever the channel's size."""
    inputs = drawn()
    want = slow(9, *inputs)
    got = scatter_sum(9, *(jnp.asarray(x) for x in inputs))
    largest = np.abs(want).max(axis=0)
    np.testing.assert_array_less(np.abs(got - want).max(axis=0), 5e-7 * largest + 1e-30)
    np.testing.assert_array_equal(got[:, 4], 0)


def test_all_in_one_row_do_not_overflow():
    """Equal terms that all fall on one row are the largest sum that there can be."""
    rows = jnp.full(100_000, 2, jnp.int32)
    got = scatter_sum(4, rows, jnp.ones(100_000), jnp.full((100_000, 1), -3.0))
    np.testing.assert_allclose(got[:, 0], [0, 0, -300_000, 0], rtol=1e-4)


def test_integers_do_not_depend_on_the_order():
    """Shuffled terms have the same sum, bit for bit; float sums have not."""
    rng = np.random.default_rng(0)
    rows = jnp.asarray(rng.integers(0, 9, 5000, np.int32))
    weights = jnp.asarray(rng.normal(size=5000), jnp.float32)
    vectors = jnp.asarray(rng.normal(size=(5000, 5)), jnp.float32)
    order = np.random.default_rng(1).permutation(len(rows))
    once = scatter_sum(9, rows, weights, vectors)
    again = scatter_sum(9, rows[order], weights[order], vectors[order])
    np.testing.assert_array_equal(once, again)

    def floats(rows, weights, vectors):
        return jnp.zeros((9, 5)).at[rows].add(weights[:, None] * vectors)

    shuffled = floats(rows[order], weights[order], vectors[order])
    assert np.any(floats(rows, weights, vectors) != shuffled)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_what_is_not_finite_stays_visible(value):
    """Such a number leaves no sum of its row and channel finite; other channels are as before."""
    rows, weights, vectors = drawn()
    vectors[3, 1, 0] = value
    got = np.asarray(scatter_sum(9, *(jnp.asarray(x) for x in (rows, weights, vectors))))
    assert not np.isfinite(got[rows[0, 3, 1], 0])
    assert np.isfinite(got[:, 1:]).all()


def to_values(values, locations, weights):
    """The gradient of deformable attention with respect to the values."""
    shapes = ((3, 4), (2, 2))

    def total(values):
        return jnp.sum(deformable_attention(values, shapes, locations, weights))

    return jax.grad(total)(values)


def to_masks(masks, points):
    """The gradient of sampled masks."""
    return jax.grad(lambda masks: jnp.sum(losses.sample_masks(masks, points)))(masks)


def to_features(features):
    """The gradient of RoIAlign with respect to a map of features."""
    boxes = jnp.array([[[1.0, 2.0, 9.0, 14.0], [0.0, 0.0, 30.0, 30.0]]])

    def total(features):
        return jnp.sum(roi_align([features], boxes, (4,), size=(2, 2), samples=2))

    return jax.grad(total)(features)


@pytest.mark.parametrize(
    ("gradient", "shapes"),
    [
        (to_features, [(1, 8, 8, 3)]),
        (to_values, [(1, 16, 2, 3), (1, 5, 2, 2, 1, 2), (1, 5, 2, 2, 1)]),
        (to_masks, [(2, 6, 5), (2, 9, 2)]),
    ],
)
def test_gradients_are_summed_in_integers_for_gpus(gradient, shapes):
    """The program of a GPU adds integers where that of a CPU adds floats, and nothing else."""
    traced = jax.jit(gradient).trace(*(jnp.zeros(shape) for shape in shapes))

    def added(platform):
        text = traced.lower(lowering_platforms=(platform,)).as_text()
        scatters = re.findall(r'"stablehlo.scatter".*?-> tensor<[\dx]*(\w+)>', text, re.DOTALL)
        return set(scatters)

    assert added("cpu") == {"f32"}
    assert added("cuda") == {"i32"}
