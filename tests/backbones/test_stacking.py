"""Stacked blocks: what their backward pass finds stored, and blocks compiled one by one."""

from flax import nnx
import jax
from jax.ad_checkpoint import checkpoint_name
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdg.backbones import stacking


def test_the_backward_pass_finds_products_and_marked_results_stored():
    """Neither is computed twice; what lies between them is."""

    def block(x, w):
        return jnp.tanh(checkpoint_name(jax.lax.erf(x @ w), "marked") @ w) @ w

    x = w = jnp.eye(4)
    jaxpr = str(
        jax.make_jaxpr(
            jax.grad(lambda w: jnp.sum(jax.checkpoint(block, policy=stacking.stores_product)(x, w)))
        )(w)
    )

    def count(name):
        return jaxpr.count(f"= {name} ") + jaxpr.count(f"= {name}[")

    assert count("dot_general") == 3 + 5, (
        "three products, and the gradient of each for both factors but the first"
    )
    assert (count("erf"), count("tanh")) == (1, 2)


def test_float32_results_of_half_precision_are_computed_anew():
    """They are twice as large as what other products leave; in float32 every product is stored."""

    def block(x, w):
        return jnp.tanh(jnp.dot(x, w, preferred_element_type=jnp.float32))

    def products(dtype):
        x = w = jnp.eye(4, dtype=dtype)
        run = jax.checkpoint(block, policy=stacking.stores_product)
        return str(jax.make_jaxpr(jax.grad(lambda w: jnp.sum(run(x, w))))(w)).count(" dot_general[")

    assert (products("float32"), products("bfloat16")) == (2, 3)


def test_kernels_alone_are_cast_and_only_to_half_precision():
    """Their gradients stay float32, as the parameters are."""
    state = nnx.state(
        nnx.Sequential(nnx.Linear(2, 3, rngs=nnx.Rngs(0)), nnx.LayerNorm(3, rngs=nnx.Rngs(0)))
    )

    def types(state):
        return {path[-1]: leaf.dtype.name for path, leaf in nnx.to_flat_state(state)}

    single = {"kernel": "float32", "bias": "float32", "scale": "float32"}
    half = jnp.dtype("bfloat16")
    assert types(stacking.cast_kernels(state, jnp.dtype("float32"))) == single
    assert types(stacking.cast_kernels(state, half)) == single | {"kernel": "bfloat16"}

    def loss(state):
        leaves = jax.tree.leaves(stacking.cast_kernels(state, half))
        return sum(jnp.sum(leaf.astype(jnp.float32) ** 2) for leaf in leaves)

    assert types(jax.grad(loss)(state)) == single


class Block(nnx.Module):
    """Adds something of its input to it."""

    def __init__(self, rngs):
        self.linear = nnx.Linear(5, 5, rngs=rngs)

    def __call__(self, x, scale):
        return x + scale * jnp.tanh(self.linear(x))


@pytest.mark.parametrize("remat", [False, True])
def test_unrolled_blocks_compute_the_same(remat):
    """Outputs of all segments and gradients are those of the scan; no loop is left."""
    scales = jnp.linspace(0.5, 1, 5)
    x = jnp.asarray(np.random.default_rng(0).normal(size=(3, 5)), jnp.float32)

    def made(unroll):
        stack = stacking.Stack(
            lambda rngs, _: Block(rngs), 5, (2,), remat=remat, unroll=unroll, rngs=nnx.Rngs(0)
        )
        graph, state = nnx.split(stack)

        def loss(state, x):
            outputs = nnx.merge(graph, state)(x, scales)
            return sum(jnp.sum(jnp.sin(output)) for output in outputs.values()), outputs

        run = jax.jit(jax.value_and_grad(loss, (0, 1), has_aux=True))
        return run(state, x), run.lower(state, x).as_text()

    (scanned, with_loop), (unrolled, without) = made(False), made(True)
    for one, other in zip(jax.tree.leaves(scanned), jax.tree.leaves(unrolled), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-6, atol=1e-6)
    assert "stablehlo.while" in with_loop
    assert "stablehlo.while" not in without
