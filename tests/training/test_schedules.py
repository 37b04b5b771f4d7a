"""Rates and weight decays of each step against mmengine and mmcv, and layer-wise rates by hand.

`golden_average.py` made the numbers, with the settings below.
"""

import dataclasses
import re

from flax import nnx
import jax
import numpy as np
import optax
import pytest

from jaxdg.backbones import zoo
from jaxdg.config import Config, OptimizerConfig, validated
from jaxdg.methods.average import AverageOptions
from jaxdg.training.optimizer import layer_factors, learning_rate, make_optimizer, method_states
from tests.conftest import GOLDEN

STEPS = 20
GROUPS = "abc"
CONFIG = OptimizerConfig(
    learning_rate=1e-3,
    min_learning_rate=1e-5,
    warmup_steps=4,
    warmup_factor=0.01,
    power=0.9,
    schedule="mmengine",
    weight_decay=0.05,
    final_weight_decay=1e-5,
    betas=(0.8, 0.9),
    clip=0.0,
    learning_rate_factors=tuple(zip(GROUPS, (1.0, 0.1, 0.001), strict=True)),
    weight_decay_factors=tuple(zip(GROUPS, (1.0, 2.0, 0.0), strict=True)),
)


@pytest.fixture(scope="module")
def golden():
    return np.load(GOLDEN / "average.npz")


def parameters(values):
    """A state of three parameters, a group each."""
    return nnx.state(nnx.Dict({name: nnx.Param(x) for name, x in zip(GROUPS, values, strict=True)}))


def updates(config: OptimizerConfig, gradient: float) -> np.ndarray:
    """Minus the updates of parameters that are 1, [steps, groups]."""
    params = parameters(np.ones(3, np.float32))
    optimizer = make_optimizer(config, STEPS, params, 1.0)
    update = jax.jit(optimizer.update)
    state = optimizer.init(params)
    grads = jax.tree.map(lambda p: np.full_like(p, gradient), params)
    found = []
    for _ in range(STEPS):
        changes, state = update(grads, state, params)
        found.append([-float(changes[name].get_value()) for name in GROUPS])
    return np.array(found)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("mmengine_rates", {}),
        ("mmengine_plain_rates", {"warmup_steps": 0, "min_learning_rate": 0.0}),
        ("mmcv_rates", {"schedule": "mmcv"}),
    ],
)
def test_rates_are_those_of_the_libraries(golden, name, options):
    """Of every step and group, also of one that begins below the floor; mmengine's last step has
    the floor itself, or 0 exactly.

    Without moments Adam's direction is 1 and the update the rate.
    """
    still = {"betas": (0.0, 0.0), "weight_decay": 0.0, "final_weight_decay": None}
    config = dataclasses.replace(CONFIG, **still, **options)
    expected = golden[name]
    np.testing.assert_allclose(updates(config, 1.0), expected, rtol=2e-6, atol=1e-10)
    schedule = jax.jit(learning_rate(config, STEPS))
    np.testing.assert_allclose(
        [schedule(step) for step in range(STEPS)], expected[:, 0], rtol=1e-6, atol=1e-10
    )
    if name == "mmengine_plain_rates":
        assert schedule(STEPS - 1) == 0


def test_weight_decay_follows_a_cosine(golden):
    """Of every step and group it is mmengine's, and one that begins at 0 rises.

    Without a gradient the update is the rate times the decay.
    """
    config = dataclasses.replace(
        CONFIG, warmup_steps=0, warmup_factor=0.0, power=0.0, learning_rate_factors=()
    )
    found = updates(config, 0.0) / config.learning_rate
    np.testing.assert_allclose(found, golden["decays"], rtol=1e-6)
    assert golden["decays"][0, 2] == 0 < golden["decays"][-1, 2]


def test_a_warmup_from_a_part_of_the_peak():
    """The default schedule starts at this part and reaches the peak the step after warm-up,
    whatever the floor is.
    """
    config = OptimizerConfig(
        learning_rate=2.0, warmup_steps=4, warmup_factor=0.25, min_learning_rate=0.5, power=1.0
    )
    schedule = learning_rate(config, 10)
    expected = [*(2 * np.linspace(0.25, 1, 5)[:4]), *np.linspace(2, 0.5, 7)]
    np.testing.assert_allclose([schedule(i) for i in range(11)], expected, rtol=1e-6)


def test_adamw_with_everything(golden):
    """Eight steps of AdamW with warm-up, floors, cosine weight decay and an average, in float64:
    all parameters and averages are mmengine's and torch's.
    """
    config = dataclasses.replace(CONFIG, warmup_steps=2)
    average = AverageOptions(True, 0.3, 4).build(None)
    with jax.enable_x64(True):
        first = golden["values"]
        params = parameters(first)
        optimizer = make_optimizer(config, len(golden["gradients"]), params, 1.0, [average])

        @jax.jit
        def step(grads, state, params):
            changes, state = optimizer.update(grads, state, params)
            params = optax.apply_updates(params, changes)
            (own,) = method_states(state, [average])
            return params, state, average.averaged(own, params)

        state = optimizer.init(params)
        for grads, trained, averaged in zip(
            golden["gradients"], golden["trained"], golden["trained_averages"], strict=True
        ):
            params, state, mean = step(parameters(grads), state, params)
            for found, expected in ((params, trained), (mean, averaged)):
                moved = np.stack([found[name].get_value() for name in GROUPS]) - first
                for own, theirs in zip(moved, expected - first, strict=True):
                    size = np.abs(theirs).max()  # rates and factors by name are float32
                    np.testing.assert_allclose(own, theirs, rtol=0, atol=1e-6 * size)


def rate_factors(run) -> dict[str, float]:
    """By parameter, from the updates of one step with a gradient of 1."""
    params = jax.tree.map(lambda leaf: np.ones(leaf.shape, np.float32), run.like.trained)
    state = jax.jit(run.optimizer.init)(params)
    changes = jax.jit(run.optimizer.update)(params, state, params)[0]
    found = {}
    for path, leaf in nnx.to_flat_state(changes):
        name = ".".join(map(str, path))
        stacked = re.fullmatch(r"(.*)\.segments\.(\d+)\.(.*)", name)
        for i, part in enumerate(np.asarray(leaf) if stacked else [np.asarray(leaf)]):
            name_of_block = f"{stacked[1]}.{int(stacked[2]) + i}.{stacked[3]}" if stacked else name
            found[name_of_block] = -float(part.flat[0]) / run.config.optimizer.learning_rate
            assert (part == part.flat[0]).all()
    return found


def test_layers_have_rates_of_their_own_as_in_beit(make_run):
    """A run's optimiser: 8 blocks, where the last has the factor once, the embeddings nine times,
    and the head has the rate itself; frozen blocks count.
    """
    decay = 0.75
    found = rate_factors(
        make_run(
            model={"freeze": "first 2"},
            optimizer={"layer_decay": decay, "weight_decay": 0.0, "clip": 0.0},
        )
    )
    assert {name.split(".")[2] for name in found if ".blocks." in name} == set("234567")
    for name, factor in found.items():
        block = re.match(r"backbone\.blocks\.(\d)\.", name)
        expected = decay ** (8 - int(block[1])) if block else 1.0
        assert factor == pytest.approx(expected, rel=1e-5), name
    encoder = nnx.eval_shape(lambda: make_run().task.model(nnx.Rngs(0)).backbone)
    factors = layer_factors(decay, encoder)
    assert factors("patch_embed.proj.kernel") == factors("pos_embed") == decay**9


def test_stages_count_in_hierarchical_encoders():
    """MiT and CLIP's ResNet: the factor once for each stage, once more for the stem, none for the
    pool after the last stage.
    """
    encoders = {
        name: nnx.eval_shape(lambda name=name: zoo.entry(name).config.build(rngs=nnx.Rngs(0)))
        for name in ("mit_b0", "clip_rn50")
    }
    mit = layer_factors(0.5, encoders["mit_b0"])
    assert mit("patch_embed1.proj.kernel") == mit("block1.0.attn.q.kernel") == 0.5**4
    assert mit("block4.1.attn.q.kernel") == mit("norm4.scale") == 0.5
    resnet = layer_factors(0.5, encoders["clip_rn50"])
    assert resnet("layer2.1.conv1.kernel") == 0.5**3
    assert resnet("conv1.kernel") == resnet("bn1.scale") == 0.5**5
    assert resnet("attnpool.q_proj.kernel") == 1
    assert resnet("an.adapter") == layer_factors(1.0, None)("conv1.kernel") == 1


def test_a_warmup_of_one_step_is_refused_for_mmengine():
    """It would be at its start and at the peak at once; two steps are allowed."""
    c = Config()
    c.optimizer.schedule = "mmengine"
    c.optimizer.warmup_steps = 2
    validated(c)
    c.optimizer.warmup_steps = 1
    with pytest.raises(
        ValueError, match=r"^optimizer\.warmup_steps is 1; allowed: 0 or at least 2"
    ):
        validated(c)


def test_checkpoints_of_older_runs_fit():
    """The states of the optimiser keep their places and types with and without the new settings, so
    that runs of older versions go on.
    """
    params = parameters(np.ones(3, np.float32))
    for config in (OptimizerConfig(), CONFIG, dataclasses.replace(CONFIG, clip=1.0)):
        state = make_optimizer(config, STEPS, params, 1.0).init(params)
        assert [type(part) for part in state] == [
            optax.EmptyState,
            optax.ScaleByAdamState,
            optax.EmptyState,
            optax.ScaleByScheduleState,
        ]
