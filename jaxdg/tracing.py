"""Random numbers and running statistics whose updates JAX traces in no time.

Flax (0.12) compares the shardings of the old and the new array when `variable[...] = value` is
written. An array that is being traced has none: it raises an error, and to word that error JAX
(0.10) walks everything traced so far. A model draws a random key for each of its parameters, and in
training each BatchNorm writes two statistics, so the time to trace grew with the square of the
model. `benchmarks/RESULTS.md` says by how much.
"""

from typing import Any

from flax import nnx
from jax.core import Tracer
from jaxtyping import Array, Key


class _Replaced(nnx.Variable):
    """A variable that takes a traced array of its own shape and type as it is."""

    def __setitem__(self, key: Any, value: Any) -> None:
        old = self.get_value()
        whole = key is ... and isinstance(value, Tracer)
        if whole and (value.shape, value.dtype) == (old.shape, old.dtype):
            self.set_value(value)
        else:
            super().__setitem__(key, value)


class Statistic(_Replaced, nnx.BatchStat):
    """An `nnx.BatchStat` that a training step writes."""


class _Count(_Replaced, nnx.RngCount):
    """How many keys a stream has given."""


class Rngs(nnx.Rngs):
    """`nnx.Rngs` of one key or seed, with the same random numbers."""

    def __init__(self, seed: int | Key[Array, ""]):
        super().__init__(seed)
        stream = self.default
        stream.count = _Count(stream.count.get_value(), tag=stream.tag)


class BatchNorm(nnx.BatchNorm):
    """`nnx.BatchNorm`, which it equals."""

    def __init__(self, *sizes: Any, **options: Any):
        super().__init__(*sizes, **options)
        self.mean = Statistic(self.mean.get_value())
        self.var = Statistic(self.var.get_value())
