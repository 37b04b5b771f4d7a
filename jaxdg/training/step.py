"""The state of a run and one optimiser step over it, as a plain jitted function that runs on any
mesh.
"""

from collections.abc import Callable
import dataclasses
from functools import partial
from typing import Any

from flax import nnx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key
import optax

from jaxdg.training import sharding

Batch = dict[str, Array]
Losses = Callable[[Any, Batch, Any, Key[Array, ""]], dict[str, Float[Array, ""]]]


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["step", "trained", "frozen", "statistics", "opt_state"],
    meta_fields=[],
)
@dataclasses.dataclass
class TrainState:
    """All that a checkpoint holds. The data state is `step`: batch i depends on (seed, i) alone.

    It may hold the shapes of arrays, or their shardings, in the arrays' place.

    Attributes:
        step: optimiser steps done, int32 [].
        trained: parameters the optimiser moves.
        frozen: parameters loaded and left alone; the optimiser holds nothing for them.
        statistics: everything that is no parameter, such as BatchNorm's running means.
        opt_state: of the optimiser.
    """

    step: Any
    trained: nnx.State
    frozen: nnx.State
    statistics: nnx.State
    opt_state: optax.OptState


def make_step(
    graph: nnx.GraphDef,
    optimizer: optax.GradientTransformation,
    loss_denominator: Callable[[Any, Batch], Any],
    losses: Losses,
    key: Key[Array, ""],
    shardings: Any,
    accumulate: int = 1,
) -> Callable[[TrainState, Batch], tuple[TrainState, dict[str, Array]]]:
    """Builds the jitted, donating training step.

    Args:
        graph: of the model, as `nnx.split` gave it.
        optimizer: over `TrainState.trained`.
        loss_denominator: (model, batch) to what the losses of the whole batch are divided by.
        losses: (model, part of the batch, loss_denominator, key) to named loss terms; those of a
            batch are the sums over its parts.
        key: all randomness is `fold_in(key, step)`.
        shardings: where the parts of the state lie, a tree like it. The next state lies there too;
            left to itself, the compiler would divide some parameters otherwise after the first step
            and compile the second one anew.
        accumulate: parts of equal size that the batch is computed in, one after another.

    Returns:
        (state, batch) -> (next state, {"loss", "gradient_norm", terms..}); the given state is
        consumed.
    """

    @partial(jax.jit, donate_argnums=0, out_shardings=(shardings, None))
    def step(state: TrainState, batch: Batch) -> tuple[TrainState, dict[str, Array]]:
        trained, frozen = sharding.gather(
            (state.trained, state.frozen), (shardings.trained, shardings.frozen)
        )
        whole = dataclasses.replace(state, trained=trained, frozen=frozen)
        step_key = jax.random.fold_in(key, state.step)
        with sharding.mesh_of(shardings):
            grads, statistics, terms = gradients(
                graph, whole, batch, loss_denominator, losses, step_key, accumulate
            )
        grads = sharding.gather(grads, shardings.trained)
        updates, opt_state = optimizer.update(grads, state.opt_state, state.trained)
        moved: Any = optax.apply_updates(state.trained, updates)
        metrics = {"loss": sum(terms.values()), "gradient_norm": optax.tree.norm(grads), **terms}
        following = TrainState(state.step + 1, moved, state.frozen, statistics, opt_state)
        return following, metrics

    return step


def gradients(
    graph: nnx.GraphDef,
    state: TrainState,
    batch: Batch,
    loss_denominator,
    losses: Losses,
    key: Key[Array, ""],
    accumulate: int,
) -> tuple[nnx.State, nnx.State, dict[str, Array]]:
    """Gradient of the summed losses for `state.trained`, the statistics after the batch, and each
    loss term.
    """
    total = loss_denominator(nnx.merge(graph, state.trained, state.frozen, state.statistics), batch)

    def loss(trained, statistics, part, key):
        model = nnx.merge(
            graph, trained, state.frozen, statistics, copy=True
        )  # or statistics could not be updated in here
        terms = losses(model, part, total, key)
        return sum(terms.values()), (nnx.state(model, nnx.Not(nnx.Param)), terms)

    def one(carry, inputs):
        grads, statistics, terms = carry
        part, key = inputs
        (_, (statistics, new)), g = jax.value_and_grad(loss, has_aux=True)(
            state.trained, statistics, part, key
        )
        return (
            jax.tree.map(jnp.add, grads, g),
            statistics,
            jax.tree.map(jnp.add, terms, new),
        ), None

    if accumulate == 1:
        (_, (statistics, terms)), grads = jax.value_and_grad(loss, has_aux=True)(
            state.trained, state.statistics, batch, key
        )
        return grads, statistics, terms
    # Every part takes every `accumulate`-th row, so each device keeps working on the rows it holds.
    parts = jax.tree.map(
        lambda x: jnp.moveaxis(x.reshape(-1, accumulate, *x.shape[1:]), 1, 0), batch
    )
    keys = jax.random.split(key, accumulate)
    first = jax.tree.map(lambda x: x[0], parts)
    shapes = jax.eval_shape(loss, state.trained, state.statistics, first, key)[1][1]
    zeros = (
        jax.tree.map(jnp.zeros_like, state.trained),
        state.statistics,
        jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes),
    )
    return jax.lax.scan(one, zeros, (parts, keys))[0]
