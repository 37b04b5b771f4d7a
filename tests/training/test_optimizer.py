"""The optimiser against AdamW in NumPy, one array a block, and what `freeze` freezes."""

import dataclasses
import math
import re

from flax import nnx
import jax
import numpy as np
import optax
import pytest

from jaxdg import weights
from jaxdg.backbones import Vit, VitConfig
from jaxdg.config import OptimizerConfig
from jaxdg.training.optimizer import freeze_boundaries, frozen_names, learning_rate, make_optimizer

CONFIG = OptimizerConfig(
    learning_rate=0.05,
    warmup_steps=2,
    weight_decay=0.3,
    clip=1.0,
    betas=(0.8, 0.95),
    epsilon=1e-6,
    learning_rate_factors=(
        (r"blocks\.[01]\.", 0.1),
        (r"blocks\.2\.attn", 0.5),
        (r"blocks\.", 0.7),
        ("^head", 3.0),
    ),
    weight_decay_factors=((r"bias$|norm", 0.0), (r"blocks\.3\.", 2.0)),
)
STEPS = 6
ENCODER_FACTOR = 0.25


class Small(nnx.Module):
    """An encoder of four blocks in two segments, and a head."""

    def __init__(self, rngs: nnx.Rngs):
        self.backbone = Vit(
            VitConfig(image_size=(16, 16), patch_size=8, width=16, depth=4, heads=2, taps=(1, 3)),
            rngs=rngs,
        )
        self.head = nnx.Linear(16, 5, rngs=rngs)


@pytest.fixture(scope="module")
def state():
    """Abstract parameters filled with noise."""
    rng = np.random.default_rng(0)
    abstract = nnx.state(nnx.eval_shape(lambda: Small(nnx.Rngs(0))), nnx.Param)
    return jax.tree.map(lambda leaf: rng.normal(size=leaf.shape).astype(np.float32), abstract)


def per_block(state):
    """Float64 copies by per-block name, made from the layout of `Stack`: a segment is called by its
    first block.
    """
    named = {}
    for path, leaf in nnx.to_flat_state(state):
        array = np.array(leaf, np.float64)
        name = ".".join(map(str, path))
        found = re.fullmatch(r"(.*)\.segments\.(\d+)\.(.*)", name)
        for i, part in enumerate(array if found else [array]):
            named[f"{found[1]}.{int(found[2]) + i}.{found[3]}" if found else name] = part
    return named


def gradients_of(state, step):
    """Noise; every second step it is far below the clipping norm."""
    rng = np.random.default_rng(step + 1)
    size = 1e-4 if step % 2 else 1.0
    return jax.tree.map(lambda leaf: (size * rng.normal(size=leaf.shape)).astype(np.float32), state)


def rate(step):
    """Linear warm-up from 0, then (1 - progress)^0.9, as a formula."""
    if step < CONFIG.warmup_steps:
        return CONFIG.learning_rate * step / CONFIG.warmup_steps
    return (
        CONFIG.learning_rate
        * (1 - (step - CONFIG.warmup_steps) / (STEPS - CONFIG.warmup_steps)) ** 0.9
    )


def factors(name):
    """Of a parameter's learning rate and weight decay, written out by hand for `CONFIG`."""
    block = int(name.split(".")[2]) if ".blocks." in name else None
    own = {None: 1.0, 0: 0.1, 1: 0.1, 2: 0.5 if ".attn." in name else 0.7, 3: 0.7}[block]
    own *= ENCODER_FACTOR if name.startswith("backbone.") else 3.0
    plain = name.endswith("bias") or "norm" in name
    return own, 0.0 if plain else 2.0 if block == 3 else 1.0


def test_equals_adamw_in_numpy(state):
    """Six steps with factors by block, warm-up, decay times rate, clipping: parameters equal a loop
    over plain arrays.
    """
    optimizer = make_optimizer(CONFIG, STEPS, state, ENCODER_FACTOR)
    update = jax.jit(
        lambda g, s, p: (lambda u, s: (optax.apply_updates(p, u), s))(*optimizer.update(g, s, p))
    )
    moments = optimizer.init(state)
    params = state
    expected = per_block(state)
    first, second = ({name: np.zeros_like(p) for name, p in expected.items()} for _ in range(2))
    b1, b2 = CONFIG.betas
    clipped = []
    for step in range(STEPS):
        grads = gradients_of(state, step)
        params, moments = update(grads, moments, params)
        named = per_block(grads)
        norm = math.sqrt(sum((g**2).sum() for g in named.values()))
        clipped.append(norm > CONFIG.clip)
        for name, g in named.items():
            g = g * min(1.0, CONFIG.clip / norm)
            first[name] = b1 * first[name] + (1 - b1) * g
            second[name] = b2 * second[name] + (1 - b2) * g**2
            direction = (
                first[name]
                / (1 - b1 ** (step + 1))
                / (np.sqrt(second[name] / (1 - b2 ** (step + 1))) + CONFIG.epsilon)
            )
            own, decay = factors(name)
            expected[name] -= (
                rate(step) * own * (direction + decay * CONFIG.weight_decay * expected[name])
            )
        for name, value in per_block(params).items():
            np.testing.assert_allclose(
                value, expected[name], rtol=1e-5, atol=1e-6, err_msg=f"{name} after step {step}"
            )
    assert clipped == [True, False] * 3
    assert (
        len(expected) == 5 + 4 * 12 + 1
    )  # 3 embeddings (4 arrays) and the head (2), 12 arrays a block


def test_equals_torch(state):
    """The same six steps by torch.optim.AdamW with a group a parameter."""
    torch = pytest.importorskip("torch")
    optimizer = make_optimizer(CONFIG, STEPS, state, ENCODER_FACTOR)
    update = jax.jit(
        lambda g, s, p: (lambda u, s: (optax.apply_updates(p, u), s))(*optimizer.update(g, s, p))
    )
    moments = optimizer.init(state)
    params = state
    theirs = {
        name: torch.nn.Parameter(torch.tensor(value, dtype=torch.float64))
        for name, value in per_block(state).items()
    }
    groups = [
        {"params": [p], "weight_decay": CONFIG.weight_decay * factors(name)[1]}
        for name, p in theirs.items()
    ]
    adamw = torch.optim.AdamW(groups, lr=1.0, betas=CONFIG.betas, eps=CONFIG.epsilon)
    for step in range(STEPS):
        grads = gradients_of(state, step)
        params, moments = update(grads, moments, params)
        for (name, g), group in zip(per_block(grads).items(), adamw.param_groups, strict=True):
            theirs[name].grad = torch.tensor(g)
            group["lr"] = rate(step) * factors(name)[0]
        torch.nn.utils.clip_grad_norm_(theirs.values(), CONFIG.clip)
        adamw.step()
    for name, value in per_block(params).items():
        np.testing.assert_allclose(
            value, theirs[name].detach().numpy(), rtol=1e-5, atol=1e-5, err_msg=name
        )


def test_sgd_equals_numpy_and_torch(state):
    """Six steps of SGD: clipping, decay in the gradient, momentum, factors by name, and a drop of
    the rate, in plain arrays and by torch.optim.SGD where it is installed.
    """
    config = dataclasses.replace(CONFIG, rule="sgd", power=0.0, warmup_steps=0, drops=(2, 5))
    optimizer = make_optimizer(config, STEPS, state, ENCODER_FACTOR)
    update = jax.jit(
        lambda g, s, p: (lambda u, s: (optax.apply_updates(p, u), s))(*optimizer.update(g, s, p))
    )
    moments = optimizer.init(state)
    params = state
    expected = per_block(state)
    speed = {name: np.zeros_like(p) for name, p in expected.items()}
    rates = [0.05, 0.05, 0.005, 0.005, 0.005, 0.0005]
    np.testing.assert_allclose(
        [learning_rate(config, STEPS)(i) for i in range(STEPS)], rates, rtol=1e-6
    )
    try:
        import torch
    except ImportError:
        torch = sgd = theirs = None
    else:
        theirs = {name: torch.nn.Parameter(torch.tensor(p)) for name, p in expected.items()}
        groups = [
            {"params": [p], "weight_decay": config.weight_decay * factors(name)[1]}
            for name, p in theirs.items()
        ]
        sgd = torch.optim.SGD(groups, lr=1.0, momentum=config.betas[0])
    for step, rate in enumerate(rates):
        grads = gradients_of(state, step)
        params, moments = update(grads, moments, params)
        named = per_block(grads)
        norm = math.sqrt(sum((g**2).sum() for g in named.values()))
        for name, g in named.items():
            own, decay = factors(name)
            g = g * min(1.0, config.clip / norm) + decay * config.weight_decay * expected[name]
            speed[name] = config.betas[0] * speed[name] + g
            expected[name] = expected[name] - rate * own * speed[name]
        if torch and sgd and theirs:
            for (name, g), group in zip(named.items(), sgd.param_groups, strict=True):
                theirs[name].grad = torch.tensor(g)
                group["lr"] = rate * factors(name)[0]
            torch.nn.utils.clip_grad_norm_(theirs.values(), config.clip)
            sgd.step()
    for name, value in per_block(params).items():
        np.testing.assert_allclose(value, expected[name], rtol=1e-5, atol=1e-6, err_msg=name)
        if theirs:
            np.testing.assert_allclose(theirs[name].detach(), expected[name], rtol=1e-6)


def test_drops_multiply_what_the_schedule_says():
    """Two drops at one step are a hundredth, a drop past the end is none, and what is left of the
    decay counts too.
    """
    config = OptimizerConfig(learning_rate=2.0, power=1.0, drops=(2, 2, 90))
    plain = dataclasses.replace(config, drops=())
    found = [float(learning_rate(config, 4)(i)) for i in range(4)]
    rates = [float(learning_rate(plain, 4)(i)) for i in range(4)]
    np.testing.assert_allclose(found, [rates[0], rates[1], rates[2] / 100, rates[3] / 100])


def test_schedule_holds_the_rate_before_the_decay():
    """Warm-up, then a constant rate, then the polynomial over what is left; without warm-up the
    rate is held from the start.
    """
    config = OptimizerConfig(learning_rate=2.0, warmup_steps=2, hold_steps=3, power=0.9)
    decay = [2 * (1 - i / 5) ** 0.9 for i in range(5)]
    schedule = learning_rate(config, 10)
    np.testing.assert_allclose([schedule(i) for i in range(10)], [0, 1, 2, 2, 2, *decay], rtol=1e-6)
    schedule = learning_rate(dataclasses.replace(config, warmup_steps=0), 8)
    np.testing.assert_allclose([schedule(i) for i in range(8)], [2, 2, 2, *decay], rtol=1e-6)


def test_schedule():
    """The rate of each step is the formula; it would reach 0 at step `STEPS`; power 0 keeps it
    constant, no warm-up starts high.
    """
    schedule = learning_rate(CONFIG, STEPS)
    np.testing.assert_allclose(
        [schedule(i) for i in range(STEPS)], [rate(i) for i in range(STEPS)], rtol=1e-6
    )
    assert float(schedule(STEPS)) == 0
    assert float(schedule(STEPS - 1)) > 0
    constant = learning_rate(OptimizerConfig(learning_rate=0.5, power=0.0), 3)
    assert [float(constant(i)) for i in range(4)] == [0.5] * 4
    assert float(learning_rate(OptimizerConfig(learning_rate=0.5), 3)(0)) == 0.5


def test_no_clipping_where_clip_is_zero():
    """With clip 0 the first moments after a step are the gradients times 1 - beta1, whatever their
    norm.
    """
    state = nnx.state(nnx.Linear(4, 3, rngs=nnx.Rngs(0)), nnx.Param)
    config = OptimizerConfig(clip=0.0)
    optimizer = make_optimizer(config, STEPS, state, 1.0)
    grads = jax.tree.map(lambda g: 1000 * g, gradients_of(state, 0))
    (moments,) = [
        s.mu
        for s in optimizer.update(grads, optimizer.init(state), state)[1]
        if isinstance(s, optax.ScaleByAdamState)
    ]
    jax.tree.map(lambda m, g: np.testing.assert_allclose(m, 0.1 * g, rtol=1e-5), moments, grads)


def encoder(name):
    return name.startswith("backbone.")


class Blocks:
    """An encoder of four blocks, as `model.freeze` sees it."""

    class config:
        unit = "block"

    @staticmethod
    def unit_of(name):
        return int(name.split(".")[1]) if name.startswith("blocks.") else None


def below(n):
    return lambda name: encoder(name) and not any(f".blocks.{i}." in name for i in range(n, 4))


@pytest.mark.parametrize(
    ("freeze", "expected", "boundaries"),
    [
        ("none", lambda name: False, ()),
        ("all", encoder, ()),
        ("first 0", below(0), ()),
        ("first 1", below(1), (0,)),
        ("first 3", below(3), (2,)),
        ("first 4", below(4), ()),
        ("last 1", lambda name: ".blocks.3." in name, (2,)),
        (
            "last 3",
            lambda name: encoder(name) and ".blocks." in name and ".blocks.0." not in name,
            (0,),
        ),
        ("last 4", lambda name: ".blocks." in name, ()),
        (r"norm\d", lambda name: ".norm1." in name or ".norm2." in name, ()),
        (
            r"blocks\.1\.attn\.qkv",
            lambda name: name.startswith("backbone.blocks.1.attn.qkv."),
            (0, 1),
        ),
        ("^head", lambda name: name.startswith("head."), ()),
    ],
)
def test_what_is_frozen_and_where_segments_end(state, freeze, expected, boundaries):
    """The names of each way of freezing, and the blocks before which freezing changes, are those
    written out by hand.
    """
    names = list(per_block(state))
    frozen = frozen_names(freeze, names, Blocks)
    assert frozen == {name for name in names if expected(name)}
    assert freeze_boundaries(frozen, weights.slots(state)) == boundaries


@pytest.mark.parametrize(
    ("freeze", "message"),
    [
        ("first 5", r"model\.freeze is 'first 5'; allowed: at most 4, the encoder's blocks"),
        ("last 5", r"model\.freeze is 'last 5'; allowed: at most 4"),
        (
            "(",
            (
                r"model\.freeze is '\('; allowed: none, all, first N, last N or a regular"
                r" expression \("
            ),
        ),
        (
            "backbone_",
            r"model\.freeze 'backbone_' matches no parameter; names look like backbone\.",
        ),
        ("first two", r"model\.freeze 'first two' matches no parameter"),
        (".", r"model\.freeze '\.' matches every parameter; leave some to be trained"),
    ],
)
def test_freezing_that_cannot_be_is_refused(state, freeze, message):
    """More blocks than there are, no regular expression, one that finds nothing or everything: one
    line with the field.
    """
    with pytest.raises(ValueError, match=message):
        frozen_names(freeze, list(per_block(state)), Blocks)


def test_frozen_parameters_stay_and_have_no_moments(make_run):
    """After three steps frozen parameters are bit-identical, all others have moved, and moments
    exist for the latter alone.
    """
    run = make_run(model={"freeze": "first 2"}, optimizer={"learning_rate": 1e-2})
    state = run.state()
    step = run.step()
    batch = run.batch()
    before = per_block(nnx.merge_state(state.trained, state.frozen))
    for _ in range(3):
        state, _ = step(state, batch)
    frozen = per_block(state.frozen)
    trained = per_block(state.trained)
    assert frozen.keys() == {
        name for name in before if re.search(r"^backbone\.(?!blocks\.[2-7])", name)
    }
    assert trained.keys() == before.keys() - frozen.keys()
    for name, value in frozen.items():
        np.testing.assert_array_equal(value, before[name], err_msg=name)
    for name, value in trained.items():
        assert (value != before[name]).any(), name
    (adam,) = [s for s in state.opt_state if isinstance(s, optax.ScaleByAdamState)]
    assert per_block(adam.mu).keys() == per_block(adam.nu).keys() == trained.keys()


def test_a_part_of_some_blocks_is_frozen(make_run):
    """A regular expression that cuts through segments: every array is on one side, and moments are
    shaped for one side alone.
    """
    run = make_run(model={"freeze": r"blocks\.3\.mlp|blocks\.[56]\.attn\.qkv"})

    def ones(tree):
        return per_block(jax.tree.map(lambda leaf: np.ones(leaf.shape), tree))

    frozen = ones(run.like.frozen)
    trained = ones(run.like.trained)
    expected = {
        f"backbone.blocks.3.mlp.{fc}.{kind}" for fc in ("fc1", "fc2") for kind in ("kernel", "bias")
    }
    expected |= {
        f"backbone.blocks.{i}.attn.qkv.{kind}" for i in (5, 6) for kind in ("kernel", "bias")
    }
    assert frozen.keys() == run.plan.frozen == expected
    whole = ones(make_run().like.trained)
    assert {name: a.shape for name, a in {**frozen, **trained}.items()} == {
        name: a.shape for name, a in whole.items()
    }
    (adam,) = [s for s in run.like.opt_state if isinstance(s, optax.ScaleByAdamState)]
    assert ones(adam.mu).keys() == ones(adam.nu).keys() == trained.keys() == whole.keys() - expected
