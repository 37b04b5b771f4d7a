"""AdamW or SGD with rates and weight decays chosen by parameter name, and the choice of frozen
parameters.

The order is that of torch's AdamW: clip gradients by their global norm, take Adam's direction, add
the decay, multiply by the step's and the parameter's own rate. With SGD it is that of torch's SGD:
clip, add the decay to the gradient, take the momentum, multiply by the rate. Stacked blocks get one
factor a layer.

Published recipes end their schedules in ways that differ by a step (`OptimizerConfig.schedule`).
The rate of a parameter at a step is

    warm-up * (floor + (factor * peak - floor) * what is left of the decay) * 0.1 ^ drops so far

with its own factor, as mmcv and mmengine schedule each group by itself.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
import dataclasses
import re
from typing import Annotated, Any, Literal, Protocol, runtime_checkable

from annotated_types import Interval
from flax import nnx
import jax
import jax.numpy as jnp
import optax

from jaxdg import weights
from jaxdg.ranges import Count, CountOrZero, Positive, PositiveOrZero, Share, ShareBelowOne
from jaxdg.tracing import Rngs

ENCODER = "backbone."
DROP = 0.1  # factor of the rate at each of `OptimizerConfig.drops`
# The last norm and projection of an image tower, which the decoder holds that reads them.
TOWER = (ENCODER, "head.image_projection.")


@dataclasses.dataclass
class OptimizerConfig:
    """AdamW or SGD with a polynomial schedule.

    Attributes:
        rule: adamw, or sgd: momentum is the first of `betas`, and the weight decay is added to the
            gradient, as torch's SGD does it. Default adamw.
        learning_rate: peak. Default 1e-4.
        encoder_factor: multiplies the encoder's learning rate if it starts from `model.weights`;
            from scratch the factor is 1. Default 0.1.
        min_learning_rate: where the decay ends. Each parameter's rate ends there, whatever its
            factor, so that one with a lower rate rises to it. Default 0.
        layer_decay: multiplies the rate once for every block (of a hierarchical encoder: stage)
            between a parameter and the encoder's output, its own included; once more for the
            embeddings before the first block, as in BEiT. 1 turns it off. Default 1.
        warmup_steps: steps of linear warm-up. Default 0.
        warmup_factor: of the peak, where warm-up starts. Default 0.
        hold_steps: steps at the peak between warm-up and decay. Default 0.
        power: of the polynomial decay; 0 keeps the rate constant. Default 0.9.
        drops: numbers of steps after which the rate is a tenth of what it would be; the step after
            so many is the first at it, as with detectron2's and torch's milestones. Default ().
        schedule: the library whose ends of schedules are meant. jaxdg: the step after warm-up is
            the first at the peak, and a step after the last one would be the first at the end of
            the decay. mmengine: the last step of warm-up is at the peak, and the last step of the
            run at the end of the decay. mmcv: as jaxdg, but the decay begins with the run, or after
            `hold_steps`, and warm-up multiplies it. Default jaxdg.
        betas: decay of AdamW's moments; the first is SGD's momentum. Default 0.9, 0.999.
        epsilon: of AdamW. Default 1e-8.
        weight_decay: multiplied by the learning rate; decoupled with AdamW. Default 0.05.
        final_weight_decay: towards which the weight decay of every parameter goes along half a
            cosine over the run, also where it begins at 0; None keeps it. Default None.
        clip: largest global L2 norm of the gradient; 0 turns clipping off. Default 0.01.
        accumulate: parts in which a batch is computed, one after another, to save memory; the
            result is that of one part. Default 1.
        learning_rate_factors: (regex, factor) pairs; the first regex that matches somewhere in a
            parameter's name counts. Default ().
        weight_decay_factors: likewise. Default: no decay on norms, layer scales, class and register
            tokens, and embeddings of positions, queries and levels.
    """

    rule: Literal["adamw", "sgd"] = "adamw"
    learning_rate: Positive = 1e-4
    encoder_factor: PositiveOrZero = 0.1
    min_learning_rate: PositiveOrZero = 0.0
    layer_decay: Annotated[float, Interval(gt=0, le=1)] = 1.0
    warmup_steps: CountOrZero = 0
    warmup_factor: Share = 0.0
    hold_steps: CountOrZero = 0
    power: PositiveOrZero = 0.9
    drops: tuple[Count, ...] = ()
    schedule: Literal["jaxdg", "mmengine", "mmcv"] = "jaxdg"
    betas: tuple[ShareBelowOne, ShareBelowOne] = (0.9, 0.999)
    epsilon: Positive = 1e-8
    weight_decay: PositiveOrZero = 0.05
    final_weight_decay: PositiveOrZero | None = None
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
    """An encoder that tells to which block or stage a parameter belongs."""

    config: Any

    def unit_of(self, name: str) -> int | None:
        """The block or stage, from 0; None if it belongs to none."""
        ...


def polynomial(config: OptimizerConfig, steps: int, peak: float, floor: float) -> optax.Schedule:
    """Step to the decay from `peak` to `floor`, without warm-up."""
    start = config.hold_steps + (0 if config.schedule == "mmcv" else config.warmup_steps)
    end = steps - 1 if config.schedule == "mmengine" else steps
    n = max(end - start, 1)

    def schedule(step: Any) -> Any:
        done = jnp.clip(step - start, 0, n)
        # The division may be compiled to a product, with which the last step would miss 0 on either
        # side; a negative number has no power.
        left = jnp.where(done < n, 1 - done / n, 0.0)
        return (peak - floor) * left**config.power + floor

    return schedule


def learning_rate(config: OptimizerConfig, steps: int) -> optax.Schedule:
    """Step to the rate of parameters whose factor is 1."""
    undropped = _undropped(config, steps)
    if not config.drops:
        return undropped

    def schedule(step: Any) -> Any:
        passed = sum(jnp.where(step < drop, 0, 1) for drop in config.drops)
        # A power would be compiled to other last bits.
        return (
            undropped(step) * jnp.asarray([DROP**n for n in range(len(config.drops) + 1)])[passed]
        )

    return schedule


def _undropped(config: OptimizerConfig, steps: int) -> optax.Schedule:
    """`learning_rate` without `OptimizerConfig.drops`."""
    peak = config.learning_rate
    n = config.warmup_steps
    decay = polynomial(config, steps, peak, config.min_learning_rate)
    if not n:
        return decay

    def warmup(step: Any, peak: float) -> Any:
        rise = optax.linear_schedule(0.0, peak, n - 1 if config.schedule == "mmengine" else n)
        return config.warmup_factor * peak + (1 - config.warmup_factor) * rise(step)

    if config.schedule == "mmcv":
        return lambda step: warmup(step, 1.0) * decay(step)

    def schedule(step: Any) -> Any:
        return jnp.where(step < n, warmup(step, peak), decay(step))

    return schedule


def make_optimizer(
    config: OptimizerConfig,
    steps: int,
    params: nnx.State,
    encoder_factor: float,
    methods: Sequence[Any] = (),
    encoder: Any = None,
) -> optax.GradientTransformation:
    """The run's optimiser.

    Args:
        config: rates, decay, clipping and their factors by name.
        steps: of the whole run; the schedule ends there.
        params: the trained parameters (abstract or not), stacked segments whole.
        encoder_factor: multiplies the rate of parameters called `backbone.*`, and of the last norm
            and projection of the image tower, where a decoder holds them.
        methods: whose transformations follow the optimiser's own.
        encoder: of the model, may be abstract; for `layer_decay`.
    """
    layer_factor = layer_factors(config.layer_decay, encoder)

    def rate(name: str) -> float:
        factor = encoder_factor if name.startswith(TOWER) else 1.0
        if name.startswith(ENCODER):
            factor *= layer_factor(name.removeprefix(ENCODER))
        return weights.first_match(name, config.learning_rate_factors, 1.0) * factor

    def decay(name: str) -> float:
        return config.weight_decay * weights.first_match(name, config.weight_decay_factors, 1.0)

    rates = weights.tree_by_name(params, rate)
    decays = weights.tree_by_name(params, decay)
    schedule = learning_rate(config, steps)

    def rates_at(step: jax.Array) -> Any:
        """Factors of the schedule, with which each parameter ends at `min_learning_rate`."""
        floor = config.min_learning_rate / config.learning_rate
        if not floor:
            return rates
        left = polynomial(config, steps, 1.0, 0.0)(step)
        return jax.tree.map(
            lambda r: (floor + (r - floor) * left) / (floor + (1 - floor) * left), rates
        )

    def decays_at(step: jax.Array) -> Any:
        final = config.final_weight_decay
        if final is None:
            return decays
        # (1 + cos(pi t / T)) / 2 and (1 - cos(pi t / T)) / 2, which lose no digits in this form.
        old = jnp.sin(jnp.pi / 2 * ((steps - step) / steps)) ** 2
        new = jnp.sin(jnp.pi / 2 * (step / steps)) ** 2
        return jax.tree.map(lambda d: d * old + final * new, decays)

    sgd = config.rule == "sgd"

    def decay_and_scale(updates, state, params):
        step = state.count
        rate = -1 * schedule(step)  # a negation would be compiled to other last bits
        if sgd:
            scaled = jax.tree.map(lambda u, r: rate * (r * u), updates, rates_at(step))
        else:
            scaled = jax.tree.map(
                lambda u, p, d, r: rate * (r * (u + d * p)),
                updates,
                params,
                decays_at(step),
                rates_at(step),
            )
        return scaled, optax.ScaleByScheduleState(optax.safe_increment(step))

    def first_step(params):
        return optax.ScaleByScheduleState(jnp.zeros((), jnp.int32))

    def add_decay(updates, params):
        return jax.tree.map(lambda g, p, d: g + d * p, updates, params, decays)

    if sgd:
        rule = (optax.stateless(add_decay), optax.trace(config.betas[0]))
    else:
        # Checkpoints count the states, and once had an empty one here.
        rule = (optax.scale_by_adam(*config.betas, eps=config.epsilon), optax.identity())
    return optax.chain(
        optax.clip_by_global_norm(config.clip) if config.clip else optax.identity(),
        *rule,
        optax.GradientTransformation(first_step, decay_and_scale),  # pyright: ignore[reportArgumentType]
        *(transformation for method in methods if (transformation := method.transformation())),
    )


def layer_factors(layer_decay: float, encoder: Any) -> Callable[[str], float]:
    """A parameter's name within the encoder to its factor of layer-wise decay.

    The same as BEiT's for plain encoders: `layer_decay` to the power of depth - i for block i, and
    of depth + 1 for embeddings.

    Modules that methods have added keep their rate, and so does what follows the features, such as
    the pool of CLIP's ResNets.

    Args:
        layer_decay: the factor from one block to the one before.
        encoder: may be abstract; None without layer-wise decay.
    """
    if layer_decay == 1:
        return lambda name: 1.0
    plain = nnx.eval_shape(lambda: encoder.config.build(rngs=Rngs(0)))
    units = {name: plain.unit_of(name) for name in weights.shapes(plain) if not plain.unused(name)}
    depth = max((unit for unit in units.values() if unit is not None), default=-1) + 1

    def factor(name: str) -> float:
        if name not in units:
            return 1.0
        unit = units[name]
        return layer_decay ** (depth + 1 if unit is None else depth - unit)

    return factor


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
        return {name for name in names if name.startswith(TOWER)}
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
            # A method may have extended this block alone; then a segment ends there anyway.
            before = stacks[stack].get((rest, block - 1), name)
            if (before in frozen) != (name in frozen):
                ends.add(first + block - 1)
        first += max(block for _, block in stacks[stack]) + 1
    return tuple(sorted(ends))
