"""AdamW with a learning rate and a weight decay for every parameter, chosen by name, and what stays frozen.

The order is that of torch's AdamW: gradients clipped by their global norm, Adam's direction, decay added, then the step's and
the parameter's own rate. Stacked blocks get one factor a layer.
"""

from collections.abc import Iterable
import re

from flax import nnx
import jax
import optax

from jaxdg import weights
from jaxdg.config import OptimizerConfig

ENCODER = "backbone."
# What "first N" and "last N" count: blocks from 0, or of hierarchical encoders stages from 1.
COUNTED = r"backbone\.(?:blocks\.(?P<block>\d+)|(?:patch_embed|block|norm|layer)(?P<stage>\d))\."
STACKED = r"(backbone\.(?:blocks|(?:block|layer)\d)\.)(\d+)(\..*)"


def learning_rate(config: OptimizerConfig, steps: int) -> optax.Schedule:
    """Step to rate: linear warm-up, constant, then polynomial decay that reaches 0 after the last step."""
    before = config.warmup_steps + config.hold_steps
    decay = optax.polynomial_schedule(config.learning_rate, 0.0, config.power, steps - before, config.hold_steps)
    if config.power == 0:
        decay = optax.constant_schedule(config.learning_rate)
    if not config.warmup_steps:
        return decay
    warmup = optax.linear_schedule(0.0, config.learning_rate, config.warmup_steps)
    return optax.join_schedules([warmup, decay], [config.warmup_steps])


def make_optimizer(config: OptimizerConfig, steps: int, params: nnx.State, encoder_factor: float) -> optax.GradientTransformation:
    """The run's optimiser.

    Args:
        config: rates, decay, clipping and their factors by name.
        steps: of the whole run; the schedule ends there.
        params: the trained parameters (abstract or not), stacked segments whole.
        encoder_factor: multiplies the rate of parameters called `backbone.*`.
    """

    def rate(name: str) -> float:
        return weights.first_match(name, config.learning_rate_factors, 1.0) * (encoder_factor if name.startswith(ENCODER) else 1.0)

    rates = weights.tree_by_name(params, rate)
    decays = weights.tree_by_name(params, lambda name: config.weight_decay * weights.first_match(name, config.weight_decay_factors, 1.0))

    def decay_and_scale(updates, state, params):
        return jax.tree.map(lambda u, p, d, r: r * (u + d * p), updates, params, decays, rates), state

    return optax.chain(
        optax.clip_by_global_norm(config.clip) if config.clip else optax.identity(),
        optax.scale_by_adam(*config.betas, eps=config.epsilon),
        optax.GradientTransformation(lambda _: optax.EmptyState(), decay_and_scale),  # pyright: ignore[reportArgumentType]
        optax.scale_by_learning_rate(learning_rate(config, steps)),
    )


def frozen_names(freeze: str, names: Iterable[str]) -> set[str]:
    """Which parameters stay as loaded.

    Args:
        freeze: "none", "all" (the encoder), "first N" (embeddings and first N blocks), "last N" (last N blocks), or a regular
            expression searched in the names. Of hierarchical encoders N counts stages.
        names: all parameters, by per-block name.

    Raises:
        ValueError: nothing or everything matches, more blocks than there are, or no regular expression.
    """
    names = list(names)
    found = {name: match for name in names if (match := re.match(COUNTED, name))}
    block = {name: int(match["block"]) if match["block"] else int(match["stage"]) - 1 for name, match in found.items()}
    depth = max(block.values(), default=-1) + 1
    if freeze == "none":
        return set()
    if freeze == "all":
        return {name for name in names if name.startswith(ENCODER)}
    if counted := re.fullmatch(r"(first|last) (\d+)", freeze):
        n = int(counted[2])
        if n > depth:
            unit = "stages" if any(match["stage"] for match in found.values()) else "blocks"
            raise ValueError(f"model.freeze is {freeze!r}; allowed: at most {depth}, the encoder's {unit}")
        if counted[1] == "first":
            return {name for name in names if name.startswith(ENCODER) and block.get(name, -1) < n}
        return {name for name, i in block.items() if i >= depth - n}
    try:
        chosen = {name for name in names if re.search(freeze, name)}
    except re.error as error:
        raise ValueError(f"model.freeze is {freeze!r}; allowed: none, all, first N, last N or a regular expression ({error})") from None
    if not chosen:
        raise ValueError(f"model.freeze {freeze!r} matches no parameter; names look like {names[0]}")
    if len(chosen) == len(names):
        raise ValueError(f"model.freeze {freeze!r} matches every parameter; leave some to be trained")
    return chosen


def freeze_boundaries(frozen: set[str], names: Iterable[str]) -> tuple[int, ...]:
    """Encoder blocks after which a stacked segment must end, because the next block is frozen otherwise than this one.

    Blocks are counted through all stages of a hierarchical encoder.
    """
    found = [match for name in names if (match := re.match(STACKED, name))]
    depths: dict[str, int] = {}
    for stack, i, _ in sorted(match.groups() for match in found):
        depths[stack] = max(depths.get(stack, 0), int(i) + 1)
    ends, first = set(), 0
    for stack, depth in depths.items():
        for name, i, rest in ((match[0], int(match[2]), match[3]) for match in found if match[1] == stack):
            if i and (f"{stack}{i - 1}{rest}" in frozen) != (name in frozen):
                ends.add(first + i - 1)
        first += depth
    return tuple(sorted(ends))
