"""An encoder at another image size against one that was built for it."""

import dataclasses
import types

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
from jaxdg.methods.rein import Rein, ReinOptions

SMALL = dict(width=24, depth=2, heads=2, patch_size=8, taps=(0, 1), image_size=(32, 32))
CONFIGS = {
    "vit in half precision": VitConfig(**SMALL, dtype="bfloat16"),
    "dinov2": Dinov2Config(**SMALL),
    "eva02": Eva02Config(**SMALL),
    "dinov3": Dinov3Config(**SMALL),
    "sam": SamConfig(**SMALL, window=3, global_blocks=(1,)),
}


def same_at_another_size(make):
    """Positions of 4x4 patches, resized when a file is read and resized in the program, give the
    same features of 5x9 patches.

    Args:
        make: an encoder of an image size.

    Returns:
        The encoder of 4x4 patches.
    """
    rng = np.random.default_rng(0)
    encoder, other = (nnx.eval_shape(lambda s=s: make(s)) for s in ((32, 32), (40, 72)))
    tensors = {
        name: rng.normal(0, 0.3, shape).astype(np.float32)
        for name, shape in weights.shapes(encoder).items()
    }
    for module in (encoder, other):
        weights.fill(module, tensors, "this test")
    images = jnp.asarray(rng.normal(size=(1, 40, 72, 3)), jnp.float32)
    graph, state = nnx.split(encoder)
    found = jax.jit(lambda s, x: at_size(nnx.merge(graph, s), (40, 72))(x))(state, images)
    graph, state = nnx.split(other)
    expected = jax.jit(lambda s, x: nnx.merge(graph, s)(x))(state, images)
    for x, y in zip(found, expected, strict=True):
        np.testing.assert_allclose(np.asarray(x, np.float32), np.asarray(y, np.float32), atol=1e-4)
    return encoder


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_features_are_those_of_an_encoder_of_that_size(config):
    """Of every kind of positions; the encoder itself still takes its own size alone."""
    encoder = same_at_another_size(
        lambda size: dataclasses.replace(config, image_size=size).build(rngs=nnx.Rngs(0))
    )
    with pytest.raises(ValueError, match="built for 32x32 images and got 40x72"):
        encoder(jnp.zeros((1, 40, 72, 3)))


def test_what_methods_add_is_there_at_the_other_size():
    """Rein refines the tokens of patches: at another size those of all its patches."""

    def make(size):
        config = dataclasses.replace(CONFIGS["dinov2"], image_size=size)
        encoder = config.build(rngs=nnx.Rngs(0))
        rein = Rein(ReinOptions(tokens=6, rank=2, link=False))
        rein.extend(types.SimpleNamespace(backbone=encoder), nnx.Rngs(1))
        return encoder

    same_at_another_size(make)


def test_positions_that_are_not_resized_are_refused():
    """An encoder that draws positions of another grid at random: one line says so."""
    config = Eva02Config(**SMALL, random_positions=True)
    graph, state = nnx.split(nnx.eval_shape(lambda: config.build(rngs=nnx.Rngs(0))))
    with pytest.raises(
        ValueError, match=r"Eva02 does not resize pos_embed, so it takes images of \(40, 72\) only"
    ):
        jax.eval_shape(lambda s: nnx.split(at_size(nnx.merge(graph, s), (40, 72)))[1], state)
