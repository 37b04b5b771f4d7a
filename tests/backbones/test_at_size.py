"""An encoder at another image size against one that was built for it."""

import dataclasses

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdg import weights
from jaxdg.backbones import (
    Dinov2Config,
    Dinov3Config,
    Eva02Config,
    SamConfig,
    VitConfig,
    at_size,
)

SMALL = dict(width=24, depth=2, heads=2, patch_size=8, taps=(0, 1), image_size=(32, 32))
CONFIGS = {
    "vit in half precision": VitConfig(**SMALL, dtype="bfloat16"),
    "dinov2": Dinov2Config(**SMALL),
    "eva02": Eva02Config(**SMALL),
    "dinov3": Dinov3Config(**SMALL),
    "sam": SamConfig(**SMALL, window=3, global_blocks=(1,)),
}


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_features_are_those_of_an_encoder_of_that_size(config):
    """Positions of 4x4 patches, resized when a file is read and resized in the program, give the
    same features; the encoder itself still takes its own size alone.
    """
    rng = np.random.default_rng(0)
    encoder = nnx.eval_shape(lambda: config.build(rngs=nnx.Rngs(0)))
    tensors = {
        name: rng.normal(0, 0.3, shape).astype(np.float32)
        for name, shape in weights.shapes(encoder).items()
    }
    weights.fill(encoder, tensors, "this test")
    config = dataclasses.replace(config, image_size=(40, 72))
    other = nnx.eval_shape(lambda: config.build(rngs=nnx.Rngs(0)))
    weights.fill(other, tensors, "this test")
    images = jnp.asarray(rng.normal(size=(1, 40, 72, 3)), jnp.float32)
    graph, state = nnx.split(encoder)
    found = jax.jit(lambda s, x: at_size(nnx.merge(graph, s), (40, 72))(x))(state, images)
    graph_other, state_other = nnx.split(other)
    expected = jax.jit(lambda s, x: nnx.merge(graph_other, s)(x))(state_other, images)
    for x, y in zip(found, expected, strict=True):
        np.testing.assert_allclose(np.asarray(x, np.float32), np.asarray(y, np.float32), atol=1e-4)
    with pytest.raises(ValueError, match="built for 32x32 images and got 40x72"):
        encoder(images)


def test_what_methods_add_stays():
    """A module that a method has put into the blocks is called at the other size too."""
    encoder = VitConfig(**SMALL).build(rngs=nnx.Rngs(0))
    images = jnp.ones((1, 40, 72, 3))

    def features():
        graph, state = nnx.split(encoder)
        return jax.jit(lambda s, x: at_size(nnx.merge(graph, s), (40, 72))(x)[-1])(state, images)

    plain = features()

    class Doubled(nnx.Module):
        def __init__(self, inner):
            self.inner = inner

        def __call__(self, x):
            return 2 * self.inner(x)

    mlp = encoder.blocks.segments["0"].mlp
    mlp.fc2 = Doubled(mlp.fc2)
    assert jnp.abs(features() - plain).max() > 1e-3


def test_positions_that_are_not_resized_are_refused():
    """An encoder that draws positions of another grid at random: one line says so."""
    config = Eva02Config(**SMALL, random_positions=True)
    graph, state = nnx.split(nnx.eval_shape(lambda: config.build(rngs=nnx.Rngs(0))))
    with pytest.raises(
        ValueError, match=r"Eva02 does not resize pos_embed, so it takes images of \(40, 72\) only"
    ):
        jax.eval_shape(lambda s: nnx.split(at_size(nnx.merge(graph, s), (40, 72)))[1], state)
