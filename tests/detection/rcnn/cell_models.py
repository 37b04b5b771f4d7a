"""What tests/golden/cells.npz is made from: inputs and weights that are drawn by name and shape."""

from flax import nnx
import jax.numpy as jnp
import numpy as np

from jaxdg.detection.rcnn.genotype import OPERATIONS
from tests.detection.models import normal

CHANNELS = 4
BOXES = 3
CASES = [(name, stride, n) for name in OPERATIONS[1:] for stride in (1, 2) for n in (4, 2)]
WIDTH = 4  # of the map of a whole head, whose linear layers have 16 times as many outputs
STEM = 6
OUT = 5
POOLED = (BOXES, 3, 3, 5)
# Every operation, at stride 2 and at stride 1 where it may have either.
GENOTYPE = (
    ("sep_conv_5x5", 1),
    ("max_pool_3x3", 0),
    ("dil_conv_3x3", 2),
    ("skip_connect", 0),
    ("avg_pool_3x3", 3),
    ("sep_conv_3x3", 1),
    ("dil_conv_5x5", 4),
    ("skip_connect", 2),
)


def map_of(name, n):
    """The input of an operation, [boxes, n, n, channels]."""
    return normal(f"{name} {n}", (BOXES, n, n, CHANNELS))


def number(name, shape):
    """The parameter of a name, in the order of axes that it has here."""
    if name.endswith("alpha_reduce"):
        return normal(name, shape)
    if len(shape) == 1:
        return np.float32(0.3) * normal(name, shape) + np.float32(name.endswith("scale"))
    return np.float32(1.4 / np.sqrt(np.prod(shape[:-1]))) * normal(name, shape)


def fill(module):
    """Gives every parameter of a module, which may be abstract, the numbers of its name; running
    statistics are those before training.
    """
    for path, leaf in nnx.to_flat_state(nnx.state(module)):
        name = ".".join(map(str, path))
        if isinstance(leaf, nnx.Param):
            leaf.set_value(jnp.asarray(number(name, leaf.shape)))
        else:
            leaf.set_value(jnp.full(leaf.shape, float(name.endswith("var"))))
    return module
