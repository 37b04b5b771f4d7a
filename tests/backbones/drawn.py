"""What golden files of encoders are computed from, by formula: pictures and weights; and how the
tests run an encoder on them.
"""

import zlib

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np

from jaxdg import weights
from jaxdg.conversion import mapping


def wave(height, width):
    """A smooth picture, [1, h, w, 3] in about -1..1."""
    y, x, c = np.ogrid[0:height, 0:width, 0:3]
    return (
        np.sin(0.33 * y + 0.5 * c) * np.cos(0.21 * x - 0.9 * c) + 0.3 * np.sin(0.9 * x + 1.7 * y)
    ).astype(np.float32)[None]


def drawn(name, shape):
    """The random tensor of a name, such that attention is far from uniform and no norm or scale is
    trivial.
    """
    scale = 1.2 / np.sqrt(np.prod(shape[1:])) if len(shape) > 1 and shape[0] > 1 else 0.3
    centre = 1.0 if "norm" in name and name.endswith("weight") else 0.0
    return (
        centre + scale * np.random.default_rng(zlib.crc32(name.encode())).standard_normal(shape)
    ).astype(np.float32)


def run(encoder, images, key=None, method="tokens"):
    """The encoder's outputs, compiled as the training code does it: pure state in, arrays out."""
    graph, state = nnx.split(encoder)
    return jax.jit(lambda state, images: getattr(nnx.merge(graph, state), method)(images, key))(
        state, jnp.asarray(images)
    )


def random_file(module, layout, path):
    """Writes a checkpoint of random tensors named by `layout`, converted for `module`."""
    source = {
        name: drawn(name, shape) for name, shape in mapping.source_shapes(module, layout).items()
    }
    weights.save(
        mapping.to_flax(module, (layout,), list(source), source.__getitem__).tensors, path, {}
    )
    return path


def trained_steps(encoder, images, steps=20):
    """Losses of plain gradient descent on the features, and the first step's gradients: what every
    trainable encoder must be able to do.
    """
    graph, state = nnx.split(encoder)

    def loss(state):
        features = nnx.merge(graph, state)(images)
        return sum(jnp.mean((f.astype(jnp.float32) - 1) ** 2) for f in features)

    @jax.jit
    def step(state):
        value, gradients = jax.value_and_grad(loss)(state)
        return value, gradients, jax.tree.map(lambda p, g: p - 0.02 * g, state, gradients)

    losses = []
    first = None
    for _ in range(steps):
        value, gradients, state = step(state)
        first = gradients if first is None else first
        losses.append(float(value))
    return losses, first
