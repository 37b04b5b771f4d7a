"""What is traced without walking all that was traced before."""

from flax import nnx
import jax
from jax.core import Tracer
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdg.backbones.layers import Linear
from jaxdg.backbones.stacking import Stack
from jaxdg.tracing import BatchNorm, Rngs, Statistic


class Model(nnx.Module):
    """A layer, a stack of two and a norm."""

    def __init__(self, norm, rngs):
        self.first = Linear(3, 4, rngs=rngs)
        self.stack = Stack(lambda rngs, _: Linear(4, 4, rngs=rngs), 2, (), remat=False, rngs=rngs)
        self.last = Linear(4, 4, rngs=rngs)
        self.norm = norm(4, use_fast_variance=False, rngs=rngs)


def drawn(norm, rngs, key):
    return jax.jit(lambda: nnx.split(Model(norm, rngs(key)))[1])()


def leaves(tree):
    return [np.asarray(leaf) for leaf in jax.tree.leaves(tree)]


@pytest.mark.parametrize("key", [3, jax.random.key(3)], ids=["seed", "key"])
def test_a_model_has_the_numbers_and_names_of_flax(key):
    ours = drawn(BatchNorm, Rngs, key)
    theirs = drawn(nnx.BatchNorm, nnx.Rngs, key)
    assert list(nnx.to_pure_dict(ours)) == list(nnx.to_pure_dict(theirs))
    for one, other in zip(leaves(ours), leaves(theirs), strict=True):
        np.testing.assert_array_equal(one, other)


def trained(norm, x):
    """Gradient, result, mean and variance of a training step."""
    graph, state = nnx.split(norm(4, momentum=0.9, use_fast_variance=False, rngs=nnx.Rngs(0)))

    @jax.jit
    def step(state, x):
        def loss(x):
            module = nnx.merge(graph, state, copy=True)
            y = module(x, use_running_average=False)
            return jnp.sum(y**3), (y, nnx.state(module, nnx.BatchStat))

        return jax.grad(loss, has_aux=True)(x)

    return leaves(step(state, x))


def test_batch_norm_is_that_of_flax():
    x = jax.random.normal(jax.random.key(1), (5, 2, 2, 4))
    results = [trained(norm, x) for norm in (BatchNorm, nnx.BatchNorm)]
    for one, other in zip(*results, strict=True):
        np.testing.assert_array_equal(one, other)
    _, _, mean, variance = results[0]
    assert np.all(mean != 0)
    assert np.all(variance != 1)


def test_no_traced_array_is_asked_for_its_sharding(monkeypatch):
    """JAX words the answer at length; flax's own classes ask, ours do not."""

    def refuse(self):
        raise AssertionError("asked for the sharding of a traced array")

    x = jnp.ones((5, 2, 2, 4))
    monkeypatch.setattr(Tracer, "sharding", property(refuse))
    drawn(BatchNorm, Rngs, 0)
    trained(BatchNorm, x)
    with pytest.raises(AssertionError, match="asked for"):
        drawn(nnx.BatchNorm, nnx.Rngs, 0)
    with pytest.raises(AssertionError, match="asked for"):
        trained(nnx.BatchNorm, x)


def test_a_statistic_keeps_its_type_and_takes_parts():
    class Holder(nnx.Module):
        def __init__(self):
            self.mean = Statistic(jnp.zeros(3))

    @jax.jit
    def write(value):
        holder = Holder()
        holder.mean[...] = value
        holder.mean[1] = value[0] + 7
        return holder.mean.get_value()

    result = write(jnp.array([2.0, 3.0, 4.0], jnp.bfloat16))
    assert result.dtype == jnp.float32
    np.testing.assert_array_equal(result, [2.0, 9.0, 4.0])
