"""What the encoder gets of a training batch."""

import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdg.commands.abstract_step import abstract_batch
from jaxdg.config import Config, validated
from jaxdg.data.augment.transforms import PAD_COLOR
from jaxdg.tasks.run_state import make_task
from jaxdg.training import sharding


def task_of(**data):
    """A task with mmsegmentation's distortion."""
    c = Config(batch_size=8)
    c.data.crop = c.evaluation.stride = (24, 32)
    c.data.distortion_probability = 0.5
    c.data.brightness = 32.0
    c.data.contrast = c.data.saturation = 0.5
    c.data.hue = 18.0
    for name, value in data.items():
        setattr(c.data, name, value)
    return make_task(validated(c))


def encoded(task, batch):
    """The images that a model is given."""
    model = types.SimpleNamespace(
        encode=lambda images, key: images, decode=lambda features, key, train: features
    )

    @jax.jit
    def outputs(batch):
        return task.outputs(model, batch, jax.random.key(0), jax.random.key(1))[0]

    return np.asarray(outputs(batch))


@pytest.mark.parametrize("shortest_sides", [(), (12, 24)])
def test_padding_in_the_corner_is_0_for_the_encoder(shortest_sides):
    """Exactly 0 below and right of the image after distortion and normalisation, where padding
    around it would be distorted; the image itself is the same. Plans know the batch.
    """
    scale = {"scale": (1.0, 1.0), "shortest_sides": shortest_sides}
    corner = task_of(padding="corner", **scale)
    around = task_of(**scale)
    rng = np.random.default_rng(0)
    inside = rng.integers(1, (25, 33), (8, 2)).astype(np.int32)
    image = rng.integers(0, 256, (8, 24, 32, 3)).astype(np.uint8)
    for one, (h, w) in zip(image, inside, strict=True):
        one[h:] = one[:, w:] = PAD_COLOR
    batch = {"image": jnp.asarray(image), "label": jnp.zeros((8, 24, 32), jnp.uint8)}
    before = encoded(around, batch)
    got = encoded(corner, {**batch, "inside": jnp.asarray(inside)})
    distorted = []
    for one, other, (h, w) in zip(got, before, inside, strict=True):
        np.testing.assert_array_equal(one[:h, :w], other[:h, :w])
        assert not one[h:].any()
        assert not one[:, w:].any()
        distorted.append(np.abs(other[h:]).max(initial=0))
    assert max(distorted) > 0.1

    mesh = sharding.make_mesh(corner.config.mesh)
    planned = {k: (x.shape, x.dtype) for k, x in abstract_batch(corner, mesh).items()}
    assert planned == {
        **{k: (x.shape, x.dtype) for k, x in batch.items()},
        "inside": ((8, 2), np.dtype(np.int32)),
    }
    assert abstract_batch(around, mesh).keys() == batch.keys()
