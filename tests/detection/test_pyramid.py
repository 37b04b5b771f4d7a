"""Feature pyramids against torchvision and torch (golden)."""

import functools

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np

from jaxdg.detection.pyramid import Fpn, SimplePyramid
from tests.detection import models


def test_fpn_equals_torchvision(golden):
    """Three stages to four levels, channel for channel."""
    pyramid = nnx.jit(
        lambda: Fpn(models.STAGES, (0, 1, 2), models.CHANNELS, dtype="float32", rngs=nnx.Rngs(0))
    )()
    for i in range(3):
        models.fill(getattr(pyramid, f"fpn_lateral{i + 2}"), f"inner_blocks.{i}.0")
        models.fill(getattr(pyramid, f"fpn_output{i + 2}"), f"layer_blocks.{i}.0")
    levels = jax.jit(lambda stages: pyramid(stages))(models.stages())
    with np.load(golden / "detectors.npz") as file:
        assert len(levels) == 4
        for i, level in enumerate(levels):
            np.testing.assert_allclose(level, file[f"fpn_{i}"], rtol=1e-4, atol=1e-5)


def test_simple_pyramid_equals_torch(golden):
    """One map to five levels with detectron2's layer names, and to only the two coarsest."""
    x = (jnp.asarray(models.normal("deepest", (2, 6, 4, 16))),)
    for built in ((0, 1, 2, 3), (2, 3)):
        make = functools.partial(SimplePyramid, 16, built, models.CHANNELS, dtype="float32")
        pyramid = nnx.jit(lambda make=make: make(rngs=nnx.Rngs(0)))()
        for level in built:
            for i, layer in enumerate(getattr(pyramid, f"simfp_{level + 2}")):
                if isinstance(layer, nnx.Conv | nnx.LayerNorm):
                    models.fill(layer, f"simfp_{level + 2}.{i}")
                elif isinstance(layer, nnx.Module):  # torch: in, out, rows, columns
                    c, out = layer.kernel.shape[2:]
                    models.fill(
                        layer,
                        f"simfp_{level + 2}.{i}",
                        (c, out, 2, 2),
                        lambda w: w.transpose(2, 3, 0, 1),
                    )
        with np.load(golden / "detectors.npz") as file:
            outputs = jax.jit(lambda x, pyramid=pyramid: pyramid(x))(x)
            assert len(outputs) == len(built) + 1
            for level, output in zip((*built, 4), outputs, strict=True):
                np.testing.assert_allclose(output, file[f"simple_{level}"], rtol=1e-4, atol=2e-5)
