"""AdamW with rates and weight decays chosen by parameter name, and the choice of frozen parameters.

The order is that of torch's AdamW: clip gradients by their global norm, take Adam's direction, add
the decay, multiply by the step's and the parameter's own rate. Stacked blocks get one factor a
layer.
"""

from collections.abc import Iterable, Mapping, Sequence
import dataclasses
import re
from typing import Any, Protocol, runtime_checkable

from flax import nnx
import jax
import optax

from jaxdg import weights
from jaxdg.ranges import Count, CountOrZero, Positive, PositiveOrZero, ShareBelowOne

ENCODER = "backbone."


@dataclasses.dataclass
class OptimizerConfig:
    """AdamW with a polynomial schedule.

    Attributes:
        learning_rate: peak. Default 1e-4.
        encoder_factor: multiplies the encoder's learning rate if it starts from `model.weights`;
            from scratch the factor is 1. Default 0.1.
        warmup_steps: steps of linear warm-up from 0. Default 0.
        hold_steps: steps at the peak between warm-up and decay. Default 0.
        power: of the polynomial decay to 0 at the last step; 0 keeps the rate constant. Default
            0.9.
        betas: decay of AdamW's moments. Default 0.9, 0.999.
        epsilon: of AdamW. Default 1e-8.
        weight_decay: decoupled, multiplied by the learning rate. Default 0.05.
        clip: largest global L2 norm of the gradient; 0 turns clipping off. Default 0.01.
        accumulate: parts in which a batch is computed, one after another, to save memory; the
            result is that of one part. Default 1.
        learning_rate_factors: (regex, factor) pairs; the first regex that matches somewhere in a
            parameter's name counts. Default ().
        weight_decay_factors: likewise. Default: no decay on norms, layer scales, class and register
            tokens, and embeddings of positions, queries and levels.
    """

    learning_rate: Positive = 1e-4
    encoder_factor: PositiveOrZero = 0.1
    warmup_steps: CountOrZero = 0
    hold_steps: CountOrZero = 0
    power: PositiveOrZero = 0.9
    betas: tuple[ShareBelowOne, ShareBelowOne] = (0.9, 0.999)
    epsilon: Positive = 1e-8
    weight_decay: PositiveOrZero = 0.05
    clip: PositiveOrZero = 0.01
    accumulate: Count = 1
    learning_rate_factors: tuple[tuple[str, PositiveOrZero], ...] = ()
    weight_decay_factors: tuple[tuple[str, PositiveOrZero], ...] = (
        (
            r"norm|_ln\.|gamma$|(cls_token|(register|storage)_tokens|(pos|query|level)_embed|query_feat)$",
            0.0,
        ),
    )


@runtime_checkable
class Counted(Protocol):
    """An encoder that tells `model.freeze` to which block or stage a parameter belongs."""

    config: Any

    def unit_of(self, name: str) -> int | None:
        """The block or stage, from 0; None if it belongs to none."""
        ...


def learning_rate(config: OptimizerConfig, steps: int) -> optax.Schedule:
    """Step to rate: linear warm-up, constant, then polynomial decay to 0 after the last step."""
    before = config.warmup_steps + config.hold_steps
    decay = optax.polynomial_schedule(
        config.learning_rate, 0.0, config.power, steps - before, config.hold_steps
    )
    if config.power == 0:
        decay = optax.constant_schedule(config.learning_rate)
    if not config.warmup_steps:
        return decay
    warmup = optax.linear_schedule(0.0, config.learning_rate, config.warmup_steps)
    return optax.join_schedules([warmup, decay], [config.warmup_steps])


def make_optimizer(
    config: OptimizerConfig,
    steps: int,
    params: nnx.State,
    encoder_factor: float,
    methods: Sequence[Any] = (),
) -> optax.GradientTransformation:
    """The run's optimiser.

    Args:
        config: rates, decay, clipping and their factors by name.
        steps: of the whole run; the schedule ends there.
        params: the trained parameters (abstract or not), stacked segments whole.
        encoder_factor: multiplies the rate of parameters called `backbone.*`.
        methods: whose transformations follow the optimiser's own.
    """

    def rate(name: str) -> float:
        factor = encoder_factor if name.startswith(ENCODER) else 1.0
        return weights.first_match(name, config.learning_rate_factors, 1.0) * factor

    def decay(name: str) -> float:
        return config.weight_decay * weights.first_match(name, config.weight_decay_factors, 1.0)

    rates = weights.tree_by_name(params, rate)
    decays = weights.tree_by_name(params, decay)

    def decay_and_scale(updates, state, params):
        scaled = jax.tree.map(lambda u, p, d, r: r * (u + d * p), updates, params, decays, rates)
        return scaled, state

    return optax.chain(
        optax.clip_by_global_norm(config.clip) if config.clip else optax.identity(),
        optax.scale_by_adam(*config.betas, eps=config.epsilon),
        optax.GradientTransformation(lambda _: optax.EmptyState(), decay_and_scale),  # pyright: ignore[reportArgumentType]
        optax.scale_by_learning_rate(learning_rate(config, steps)),
        *(transformation for method in methods if (transformation := method.transformation())),
    )


def method_states(opt_state: Any, methods: Sequence[Any]) -> list[Any]:
    """The state of each method's transformation in the optimiser's; None for a method without."""
    transforms = [method.transformation() is not None for method in methods]
    states = iter(opt_state[len(opt_state) - transforms.count(True) :])
    return [next(states) if has_state else None for has_state in transforms]


def frozen_names(freeze: str, names: Iterable[str], encoder: Counted) -> set[str]:
    """The parameters that stay as loaded.

    Args:
        freeze: "none", "all" (the encoder), "first N" (embeddings and first N blocks), "last N"
            (last N blocks), or a regular expression searched in the names. In hierarchical encoders
            N counts stages.
        names: of all parameters, per block.
        encoder: of the model.

    Raises:
        ValueError: nothing or everything matches, N is too large, or the regular expression is
            wrong.
    """
    names = list(names)
    if freeze == "none":
        return set()
    if freeze == "all":
        return {name for name in names if name.startswith(ENCODER)}
    if counted := re.fullmatch(r"(first|last) (\d+)", freeze):
        units = {
            name: encoder.unit_of(name.removeprefix(ENCODER))
            for name in names
            if name.startswith(ENCODER)
        }
        depth = max((unit for unit in units.values() if unit is not None), default=-1) + 1
        n = int(counted[2])
        if n > depth:
            raise ValueError(
                f"model.freeze is {freeze!r}; allowed: at most {depth}, the encoder's"
                f" {encoder.config.unit}s"
            )
        if counted[1] == "first":
            return {name for name, unit in units.items() if unit is None or unit < n}
        return {name for name, unit in units.items() if unit is not None and unit >= depth - n}
    try:
        chosen = {name for name in names if re.search(freeze, name)}
    except re.error as error:
        raise ValueError(
            f"model.freeze is {freeze!r}; allowed: none, all, first N, last N or a regular"
            f" expression ({error})"
        ) from None
    if not chosen:
        raise ValueError(
            f"model.freeze {freeze!r} matches no parameter; names look like {names[0]}"
        )
    if len(chosen) == len(names):
        raise ValueError(
            f"model.freeze {freeze!r} matches every parameter; leave some to be trained"
        )
    return chosen


def freeze_boundaries(frozen: set[str], slots: Mapping[str, weights.Slot]) -> tuple[int, ...]:
    """Encoder blocks after which a segment ends, as other parameters are frozen in the next block.

    Blocks are counted through all stages of a hierarchical encoder.

    Args:
        frozen: names of the frozen parameters.
        slots: of all parameters, by per-block name.
    """
    # For each stack: (name in the block, block) to full name.
    stacks: dict[str, dict[tuple[str, int], str]] = {}
    for name, slot in slots.items():
        if name.startswith(ENCODER) and slot.stack is not None:
            block, _, rest = name.removeprefix(f"{slot.stack}.").partition(".")
            stacks.setdefault(slot.stack, {})[rest, int(block)] = name
    ends = set()
    first = 0
    for stack in sorted(stacks):
        for (rest, block), name in stacks[stack].items():
            if block and (stacks[stack][rest, block - 1] in frozen) != (name in frozen):
                ends.add(first + block - 1)
        first += max(block for _, block in stacks[stack]) + 1
    return tuple(sorted(ends))
