"""Sums by row: in order, and in integers, against float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdg.segmentation.mask2former import scatter_sum as module

BOTH = pytest.mark.parametrize("scatter_sum", [module._in_order, module._in_integers])


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


@BOTH
def test_equals_the_definition(scatter_sum):
    """Within float32's rounding of the largest sum of a channel, whatever the channel's size."""
    inputs = drawn()
    want = slow(9, *inputs)
    got = scatter_sum(9, *(jnp.asarray(x) for x in inputs))
    largest = np.abs(want).max(axis=0)
    np.testing.assert_array_less(np.abs(got - want).max(axis=0), 5e-7 * largest + 1e-30)
    np.testing.assert_array_equal(got[:, 4], 0)


@BOTH
def test_all_in_one_row_do_not_overflow(scatter_sum):
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
    once = module._in_integers(9, rows, weights, vectors)
    again = module._in_integers(9, rows[order], weights[order], vectors[order])
    np.testing.assert_array_equal(once, again)
    floats = module._in_order(9, rows, weights, vectors)
    shuffled = module._in_order(9, rows[order], weights[order], vectors[order])
    assert np.any(floats != shuffled)


@pytest.mark.parametrize("value", [np.nan, np.inf])
@BOTH
def test_what_is_not_finite_stays_visible(scatter_sum, value):
    """Such a number leaves no sum of its row and channel finite; other channels are as before."""
    rows, weights, vectors = drawn()
    vectors[3, 1, 0] = value
    got = np.asarray(scatter_sum(9, *(jnp.asarray(x) for x in (rows, weights, vectors))))
    assert not np.isfinite(got[rows[0, 3, 1], 0])
    assert np.isfinite(got[:, 1:]).all()


def test_integers_are_summed_for_gpus():
    """The program of a GPU has no scatter of floats, that of a CPU no other."""
    args = (jnp.zeros((2, 3), jnp.int32), jnp.zeros((2, 3)), jnp.zeros((2, 3, 4)))

    def text(platform):
        traced = jax.jit(lambda *args: module.scatter_sum(5, *args)).trace(*args)
        return traced.lower(lowering_platforms=(platform,)).as_text()

    assert "scatter" in text("cpu")
    assert "tensor<5x4xi32>" not in text("cpu")
    assert "tensor<5x4xi32>" in text("cuda")
