"""The average of the weights: mmengine's numbers, and laws of whole runs."""

import dataclasses
import functools
import json
from pathlib import Path

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxdg
from jaxdg import config as config_lib
from jaxdg import methods, train, weights
from jaxdg.backbones import VitConfig, zoo
from jaxdg.config import Config, MeshConfig, validated
from jaxdg.config import workdir as workdir_lib
from jaxdg.methods.average import AverageOptions, AverageState
from jaxdg.tasks import run_state as tasks
from jaxdg.training import optimizer as optimizer_lib
from jaxdg.training import sharding
from jaxdg.training.checkpoint import Checkpoints
from tests.conftest import GOLDEN
from tests.runs import start

START = 2
MOMENTUM = 0.25
STEPS = 5


@pytest.mark.parametrize(("start", "name"), [(4, ""), (0, "_from_0"), (1, "_from_1")])
def test_equals_mmengine(start, name):
    """Twelve steps of EMAHook, by `golden_average.py`: equal to the weights up to the start, of
    which the first update is a copy, then to 1e-6 of the average.
    """
    golden = np.load(GOLDEN / "average.npz")
    method = AverageOptions(True, 0.3, start).build(None)
    transformation = method.transformation()

    @jax.jit
    def step(state, before, after):
        updates, state = transformation.update(after - before, state, before)
        return updates, state, method.averaged(state, after)

    before = jnp.zeros(6)
    state = transformation.init(before)
    for i, after in enumerate(golden["weights"].astype(np.float32), 1):
        updates, state, average = step(state, before, after)
        np.testing.assert_array_equal(updates, jnp.asarray(after) - before)
        np.testing.assert_allclose(average, golden[f"averages{name}"][i - 1], rtol=1e-6, atol=1e-6)
        assert (average == after).all() == (i <= max(start, 1))
        before = after


@pytest.fixture
def small(monkeypatch):
    """A small encoder in the zoo."""
    monkeypatch.setitem(
        zoo.ZOO, "tiny8", zoo.Entry(VitConfig(width=16, depth=3, heads=2, patch_size=8, taps=(2,)))
    )


def mesh_of(data: int, fsdp: int) -> jax.sharding.Mesh:
    return sharding.make_mesh(MeshConfig(data, fsdp), jax.devices()[: data * fsdp])


def run_config(kind: str = "segmentation", **average) -> Config:
    """A run on streets whose head has running statistics; every step is saved."""
    c = Config(steps=STEPS, batch_size=8, log_every=1, eval_every=0, checkpoint_every=1)
    c.keep_checkpoints = STEPS
    c.data.crop = c.data.streets.size = c.evaluation.stride = (32, 64)
    c.data.streets.images = 8
    c.data.streets.val_images = 2
    c.model.encoder = "tiny8"
    c.model.pyramid = "none"
    c.model.decoder = "segformer"
    c.model.segformer.hidden = 16
    if kind == "rein":
        c.rein.on = True
        c.rein.link = False
    elif kind == "detection":
        c.task = "detection"
        c.model.decoder = "fcos"
        c.model.fcos.channels = 32
    c.optimizer.learning_rate = 1e-2
    c.evaluation.domains = ("clear",)
    c.average = AverageOptions(**average)
    return validated(c)


def trained_weights(c: Config, workdir: Path) -> list[dict[str, np.ndarray]]:
    """The model from which each checkpoint of a run would be trained on, by per-block name."""
    task = tasks.make_task(c, methods.active(c))
    plan = tasks.Blueprint.of(task, "none")
    like, _ = tasks.abstract_state(plan, c, mesh_of(1, 1), task.methods)
    checkpoints = Checkpoints(workdir, read_only=True)
    found = []
    for step in checkpoints.steps():
        state = checkpoints.restore(like, step)
        assert state is not None
        model = nnx.merge(plan.graph, state.trained, state.frozen, state.statistics)
        found.append(weights.tensors(model))
    checkpoints.close()
    return found


def test_a_run_is_judged_and_read_by_its_average_and_resumes(small, tmp_path, monkeypatch):
    """Up to the start a checkpoint's model is the weights bit for bit, then their average by the
    formula; statistics are the training's; 3 + 2 steps are 5 steps, and those of a run without the
    average.

    `train` evaluates the average, and `jaxdg.load`, which export, predict and evaluate start from,
    finds it.
    """
    c = run_config(on=True, momentum=MOMENTUM, start=START)
    c.eval_every = STEPS
    mesh = mesh_of(1, 1)
    monkeypatch.setattr(sharding, "make_mesh", lambda *_: mesh)
    judged = []
    evaluate = train.evaluate_domains

    def remember(evaluator, model, *rest):
        judged.append(jax.device_get(model))
        return evaluate(evaluator, model, *rest)

    monkeypatch.setattr(train, "evaluate_domains", remember)
    rows = start(c, tmp_path / "whole")
    trained = trained_weights(c, tmp_path / "whole")
    found = [
        tasks.stored_tensors(tmp_path / "whole" / "checkpoints" / str(step))
        for step in range(1, STEPS + 1)
    ]
    expected: dict[str, np.ndarray] = {}
    for step, (own, raw) in enumerate(zip(found, trained, strict=True), 1):
        assert own.keys() == raw.keys()
        for name, weight in raw.items():
            exact = step <= START or name.endswith((".mean", ".var"))
            old = weight if exact else expected[name]
            expected[name] = old + MOMENTUM * (weight.astype(np.float64) - old)
            np.testing.assert_allclose(own[name], expected[name], rtol=1e-6, atol=1e-7)
            assert (own[name] == weight).all() or not exact, (name, step)
    moved = [name for name in found[-1] if (found[-1][name] != trained[-1][name]).any()]
    assert {name.partition(".")[0] for name in moved} == {"backbone", "head"}

    c.eval_every = 0
    start(c, tmp_path / "parts", steps=3)
    assert start(c, tmp_path / "parts") == [row for row in rows if "loss" in row]
    resumed = tasks.stored_tensors(tmp_path / "parts")
    jax.tree.map(np.testing.assert_array_equal, resumed, found[-1])

    # Another program, which may round differently.
    for one, other in zip(start(run_config(), tmp_path / "plain"), rows, strict=False):
        assert one["loss"] == pytest.approx(other["loss"], rel=1e-6), one["step"]

    model = jaxdg.load(tmp_path / "whole")
    for state in (*judged, model.state):
        tensors = weights.tensors(nnx.merge(model.graph, *state))
        jax.tree.map(np.testing.assert_array_equal, tensors, found[-1])
    assert len(judged) == 1


def test_eight_devices_divide_the_average_and_agree_with_one(small):
    """The average lies as the parameters do, stays so, and holds the numbers of one device's."""
    c = run_config(on=True, momentum=MOMENTUM, start=START)
    task = tasks.make_task(c, methods.active(c))
    plan = tasks.Blueprint.of(task, "none")
    averages = []
    for mesh in (mesh_of(1, 1), mesh_of(2, 4)):
        like, optimizer = tasks.abstract_state(plan, c, mesh, task.methods)
        places = jax.tree.map(lambda leaf: leaf.sharding, like)
        rng = np.random.default_rng(0)

        def noise(like=like, rng=rng):
            def fill(leaf):
                return jax.device_put(rng.normal(size=leaf.shape).astype(leaf.dtype), leaf.sharding)

            return jax.tree.map(fill, like.trained)

        @functools.partial(jax.jit, out_shardings=(places.trained, places.opt_state))
        def step(grads, params, state, optimizer=optimizer):
            updates, state = optimizer.update(grads, state, params)
            return optax.apply_updates(params, updates), state

        trained = noise()
        state = jax.jit(optimizer.init, out_shardings=places.opt_state)(trained)
        for _ in range(4):
            trained, state = step(noise(), trained, state)
        (own,) = optimizer_lib.method_states(state, task.methods)
        for average, weight in zip(
            jax.tree.leaves(own.average), jax.tree.leaves(trained), strict=True
        ):
            assert average.sharding == weight.sharding
        averages.append(own.average)
    divided = [
        leaf.sharding.shard_shape(leaf.shape) != leaf.shape for leaf in jax.tree.leaves(own.average)
    ]
    assert sum(divided) > len(divided) / 4
    for one, eight in zip(*map(jax.tree.leaves, averages), strict=True):
        np.testing.assert_allclose(eight, one, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize(("kind", "freeze"), [("detection", "first 1"), ("rein", "none")])
def test_detectors_and_models_of_lasting_methods_have_one_too(small, kind, freeze):
    """The finished model has the average as its parameters, what is frozen, and the training's
    statistics; it is built as the evaluation builds it.
    """
    c = run_config(kind, on=True, momentum=MOMENTUM, start=START)
    task = tasks.make_task(c, methods.active(c))
    plan = tasks.Blueprint.of(task, freeze)
    like, _ = tasks.abstract_state(plan, c, mesh_of(1, 1), task.methods)
    rng = np.random.default_rng(0)
    state = jax.tree.map(lambda s: rng.normal(size=s.shape).astype(s.dtype), like)
    own = AverageState(np.asarray(START + 1, np.int32), state.opt_state[-1].average)
    assert jax.tree.structure(own.average) == jax.tree.structure(state.trained)
    state.opt_state = (*state.opt_state[:-1], own)
    trained, frozen, statistics = jax.jit(lambda state: plan.finish(task, state))(state)
    assert plan.finished is not None
    assert jax.tree.structure((trained, frozen)) == jax.tree.structure(plan.finished.abstract[:2])
    expected = jax.tree.map(
        lambda a, w: (1 - MOMENTUM) * a + MOMENTUM * w, own.average, state.trained
    )
    assert jax.tree.leaves(frozen)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), trained, expected)
    jax.tree.map(
        np.testing.assert_array_equal, (frozen, statistics), (state.frozen, state.statistics)
    )


def test_a_start_after_the_end_is_refused():
    """In one line with the field and what is allowed; the last step may be the first."""
    c = Config(steps=10)
    c.average = AverageOptions(True, start=10)
    assert validated(c).average.start == 10
    c.average.start = 11
    with pytest.raises(ValueError, match=r"^average\.start is 11; allowed: at most steps 10$"):
        validated(c)


def test_runs_of_older_versions_go_on(tmp_path):
    """A workdir whose config.json knows nothing of averages and schedules holds the same run as the
    defaults, which keep no average.
    """
    c = validated(Config())
    stored = dataclasses.asdict(c)
    del stored["average"]
    for name in (
        "min_learning_rate",
        "layer_decay",
        "warmup_factor",
        "schedule",
        "final_weight_decay",
    ):
        del stored["optimizer"][name]
    (tmp_path / "config.json").write_text(json.dumps(stored))
    assert workdir_lib.differences(config_lib.load(tmp_path), c) == []
    assert methods.active(c) == ()
