"""The state of a run, and one optimiser step over it: a jitted function that runs on any mesh."""

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

    Instead of arrays it may hold their shapes or their shardings.

    Attributes:
        step: optimiser steps done, int32 [].
        trained: parameters that the optimiser updates.
        frozen: parameters that stay as loaded; the optimiser has no state for them.
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
        graph: of the model, from `nnx.split`.
        optimizer: over `TrainState.trained`.
        loss_denominator: (model, batch) to the denominator of the losses of the whole batch.
        losses: (model, part of the batch, denominator, key) to named loss terms; the terms of a
            batch are the sums over its parts.
        key: all randomness is `fold_in(key, step)`.
        shardings: of the state, a tree like it. The next state keeps them; otherwise the compiler
            would divide some parameters in another way after the first step and compile the second
            step anew.
        accumulate: parts of equal size in which the batch is computed, one after another.

    Returns:
        (state, batch) -> (next state, {"loss", "gradient_norm", terms, `shown`..}); the given state
        is consumed.
    """

    @partial(jax.jit, donate_argnums=0, out_shardings=(shardings, None))
    def step(state: TrainState, batch: Batch) -> tuple[TrainState, dict[str, Array]]:
        trained, frozen = sharding.gather(
            (state.trained, state.frozen), (shardings.trained, shardings.frozen)
        )
        gathered = dataclasses.replace(state, trained=trained, frozen=frozen)
        step_key = jax.random.fold_in(key, state.step)
        with sharding.mesh_of(shardings):
            grads, statistics, terms = gradients(
                graph, gathered, batch, loss_denominator, losses, step_key, accumulate
            )
        grads = sharding.gather(grads, shardings.trained)
        with jax.named_scope("optimizer"):
            updates, opt_state = optimizer.update(grads, state.opt_state, state.trained)
            updated: Any = optax.apply_updates(state.trained, updates)
            norm = optax.tree.norm(grads)
        metrics = {"loss": sum(terms.values()), "gradient_norm": norm, **terms}
        metrics |= shown(statistics)
        return TrainState(state.step + 1, updated, state.frozen, statistics, opt_state), metrics

    return step


def shown(statistics: nnx.State) -> dict[str, Array]:
    """Means of the statistics that rows of metrics show: `nnx.BatchStat(.., metric=NAME)`."""
    named = [(v.get_metadata().get("metric"), v) for _, v in nnx.to_flat_state(statistics)]
    return {name: variable[...].mean() for name, variable in named if name}


def gradients(
    graph: nnx.GraphDef,
    state: TrainState,
    batch: Batch,
    loss_denominator,
    losses: Losses,
    key: Key[Array, ""],
    accumulate: int,
) -> tuple[nnx.State, nnx.State, dict[str, Array]]:
    """The gradient of the losses' sum, the statistics after the batch, and each loss term."""
    model = nnx.merge(graph, state.trained, state.frozen, state.statistics)
    with jax.named_scope("losses"):
        denominator = loss_denominator(model, batch)

    def loss(trained, statistics, part, key):
        # Only a copy can update its statistics in here.
        model = nnx.merge(graph, trained, state.frozen, statistics, copy=True)
        terms = losses(model, part, denominator, key)
        return sum(terms.values()), (nnx.state(model, nnx.Not(nnx.Param)), terms)

    value_and_grad = jax.value_and_grad(loss, has_aux=True)
    if accumulate == 1:
        (_, (statistics, terms)), grads = value_and_grad(
            state.trained, state.statistics, batch, key
        )
        return grads, statistics, terms

    def add(carry, inputs):
        grads, statistics, terms = carry
        (_, (statistics, new_terms)), new_grads = value_and_grad(state.trained, statistics, *inputs)
        grads = jax.tree.map(jnp.add, grads, new_grads)
        return (grads, statistics, jax.tree.map(jnp.add, terms, new_terms)), None

    # Each part takes every `accumulate`-th row, so each device keeps the rows it holds.
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
    return jax.lax.scan(add, zeros, (parts, keys))[0]
