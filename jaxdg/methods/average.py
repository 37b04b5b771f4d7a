"""An exponential moving average of the trained weights, as mmengine's EMAHook takes it.

With w the weights after step n, the average after that step is

    a[n] = w[n]                                          up to step `start`, at least the first
    a[n] = (1 - momentum) a[n - 1] + momentum w[n]       from then on

The average is the model that is evaluated, exported, and read from a workdir. Training goes on with
the weights themselves, and its checkpoints hold both. Running statistics, such as BatchNorm's, are
those of the training. Source: open-mmlab/mmengine `mmengine/hooks/ema_hook.py` and
`mmengine/model/averaged_model.py`.
"""

import dataclasses
from typing import Annotated, Any, NamedTuple

from annotated_types import Interval
from flax import nnx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Int32
import optax

from jaxdg.methods.method import Method, MethodOptions
from jaxdg.ranges import CountOrZero


@dataclasses.dataclass(unsafe_hash=True)
class AverageOptions(MethodOptions):
    """An exponential moving average of the trained weights is the result of the run; see
    `jaxdg/methods/average.py`.

    Attributes:
        on: whether it is used; needs the memory of one more copy of what is trained. Default False.
        momentum: the part of the newest weights in the average. Default 0.0002.
        start: the first steps, after each of which the average is a copy of the weights. Default 0.
    """

    momentum: Annotated[float, Interval(gt=0, lt=1)] = 0.0002
    start: CountOrZero = 0

    def check(self, config: Any, name: str) -> None:
        """See `MethodOptions.check`."""
        if self.on and self.start > config.steps:
            raise ValueError(f"{name}.start is {self.start}; allowed: at most steps {config.steps}")

    def build(self, config: Any) -> "Average":
        """See `MethodOptions.build`."""
        return Average(self)


class AverageState(NamedTuple):
    """What is kept between steps.

    Attributes:
        count: steps done.
        average: of the weights before the last step, so that a step reads the weights that it is
            given and needs no others; `Average.finish` adds the newest.
    """

    count: Int32[Array, ""]
    average: Any


class Average(Method):
    """The average in one run."""

    changes_model = True

    def __init__(self, options: AverageOptions):
        """Args:
        options: the settings.
        """
        self.options = options

    def averaged(self, state: AverageState, trained: Any) -> Any:
        """The average with the newest weights, trees of parameters."""
        averages = state.count > max(self.options.start, 1)

        def update(average: Array, weight: Array) -> Array:
            moved = average + self.options.momentum * (weight - average)
            return jnp.where(averages, moved, weight)

        return jax.tree.map(update, state.average, trained)

    def transformation(self) -> optax.GradientTransformation:
        """See `Method.transformation`: changes no update."""

        def init(params):
            return AverageState(jnp.zeros((), jnp.int32), jax.tree.map(jnp.zeros_like, params))

        def update(updates, state, params=None):
            average = self.averaged(state, params)
            return updates, AverageState(state.count + 1, average)

        return optax.GradientTransformation(init, update)

    def finish(self, model: Any, state: AverageState) -> None:
        """See `Method.finish`."""
        paths = {path for path, _ in nnx.to_flat_state(state.average)}
        trained = nnx.state(model, lambda path, _: path in paths)
        nnx.update(model, self.averaged(state, trained))
