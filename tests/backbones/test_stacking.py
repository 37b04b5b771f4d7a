"""Stacked blocks: what their backward pass finds stored."""

import jax
from jax.ad_checkpoint import checkpoint_name
import jax.numpy as jnp

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
