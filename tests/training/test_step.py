"""One optimiser step: what it computes does not depend on how it is cut up, and its randomness on
(key, step) alone.
"""

import dataclasses
import itertools
import math
import re

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxdg.backbones import Pyramid
from jaxdg.config import MeshConfig
from jaxdg.segmentation import LinearHead
from jaxdg.training import sharding
from jaxdg.training.step import TrainState, make_step


def scale_of(tree):
    return np.sqrt(sum((np.asarray(x, np.float64) ** 2).sum() for x in jax.tree.leaves(tree)))


@pytest.fixture(scope="module")
def plain(make_run):
    """A run without randomness, clipping or decay, and its step."""
    run = make_run(steps=60, optimizer={"clip": 0.0, "learning_rate": 2e-2, "weight_decay": 0.0})
    return run, run.step()


def test_accumulation_is_the_whole_batch(plain):
    """Four parts of rows with 0 to all of their pixels ignored give the loss and the gradients of
    the batch in one piece.

    Averaging the parts' own means would not: the test computes that too and finds it elsewhere.
    """
    run, step = plain
    batch = run.batch()
    results = []
    for one in (step, run.step(4)):
        state, metrics = one(run.state(), batch)
        (adam,) = [s for s in state.opt_state if isinstance(s, optax.ScaleByAdamState)]
        results.append(
            (metrics, dict(nnx.to_flat_state(adam.mu)))
        )  # a tenth of the gradients, as nothing is clipped
    (whole, whole_grads), (parts, part_grads) = results
    assert float(parts["loss"]) == pytest.approx(float(whole["loss"]), rel=1e-6)
    assert float(parts["cross_entropy"]) == pytest.approx(float(whole["loss"]), rel=1e-6)
    assert float(parts["gradient_norm"]) == pytest.approx(float(whole["gradient_norm"]), rel=1e-5)
    assert float(whole["gradient_norm"]) == pytest.approx(10 * scale_of(whole_grads), rel=1e-4)
    for path, leaf in whole_grads.items():
        assert scale_of(part_grads[path][...] - leaf[...]) <= 1e-5 * scale_of(leaf) + 1e-9, path

    def own_mean(i):
        """The loss of part i alone: all other rows are ignored."""
        label = np.where((np.arange(8) % 4 == i)[:, None, None], batch["label"], 255).astype(
            np.uint8
        )
        return float(
            step(run.state(), {**batch, **sharding.to_devices({"label": label}, run.mesh)})[1][
                "loss"
            ]
        )

    assert abs(np.mean([own_mean(i) for i in range(4)]) - float(whole["loss"])) > 1e-3


class Noisy(nnx.Module):
    """A weight that noise is added to, and a BatchStat that counts."""

    def __init__(self):
        self.weight = nnx.Param(jnp.ones(3))
        self.count = nnx.BatchStat(jnp.zeros(()))


def noisy_losses(model, batch, denominator, key):
    model.count[...] += 1
    noise = jax.random.normal(key, model.weight.shape)
    return {
        "data": jnp.sum(batch["x"] * model.weight[...]) / denominator,
        "noise": jnp.sum(noise * model.weight[...]),
    }


def noisy(accumulate=1, seed=0):
    """Step and first state of it, on one device."""
    graph, trained, statistics = nnx.split(Noisy(), nnx.Param, ...)
    optimizer = optax.sgd(1.0)
    state = TrainState(
        jnp.zeros((), jnp.int32), trained, nnx.State({}), statistics, optimizer.init(trained)
    )
    at = jax.tree.map(lambda _: jax.sharding.SingleDeviceSharding(jax.devices()[0]), state)

    def count(model, batch):
        return jnp.float32(batch["x"].shape[0])

    return (
        make_step(graph, optimizer, count, noisy_losses, jax.random.key(seed), at, accumulate),
        state,
    )


def copy(tree):
    return jax.tree.map(jnp.copy, tree)


def weight(state):
    return np.asarray(state.trained["weight"][...])


@pytest.mark.parametrize("accumulate", [1, 2])
def test_randomness_depends_on_key_and_step_alone(accumulate):
    """Going on from a copied state repeats the run bit for bit; another step or another key draws
    other noise.
    """
    batch = {"x": jnp.zeros((4, 3))}  # all that moves the weight is noise
    step, start = noisy(accumulate)
    states = [start]
    for _ in range(4):
        states.append(step(copy(states[-1]), batch)[0])
    moves = [weight(b) - weight(a) for a, b in itertools.pairwise(states)]
    assert len({move.tobytes() for move in moves}) == 4

    step, _ = noisy(accumulate)  # a new process
    resumed = copy(states[2])
    for i in (3, 4):
        resumed, _ = step(resumed, batch)
        np.testing.assert_array_equal(weight(resumed), weight(states[i]))
    other, _ = noisy(accumulate, seed=1)
    assert (weight(other(copy(start), batch)[0]) != weight(states[1])).all()


def test_a_step_by_hand():
    """Loss, its terms, gradient norm, the next parameters and the step's number, by arithmetic;
    statistics go from part to part.
    """
    x = jnp.asarray(np.random.default_rng(0).normal(size=(4, 3)), jnp.float32)
    step, state = noisy()
    noise = np.asarray(jax.random.normal(jax.random.fold_in(jax.random.key(0), 0), (3,)))
    gradient = np.asarray(x).mean(0) + noise
    following, metrics = step(copy(state), {"x": x})
    np.testing.assert_allclose(weight(following), 1 - gradient, rtol=1e-5)
    np.testing.assert_allclose(float(metrics["data"]), np.asarray(x).sum() / 4, rtol=1e-5)
    np.testing.assert_allclose(
        float(metrics["loss"]), float(metrics["data"]) + float(metrics["noise"]), rtol=1e-6
    )
    np.testing.assert_allclose(
        float(metrics["gradient_norm"]), np.sqrt((gradient**2).sum()), rtol=1e-5
    )
    assert int(following.step) == 1
    assert float(following.statistics["count"][...]) == 1
    assert float(noisy(4)[0](copy(state), {"x": x})[0].statistics["count"][...]) == 4


def test_one_batch_is_learnt(plain):
    """Sixty steps on one batch bring the loss from the guess of three classes to near 0, and
    compile once.
    """
    run, step = plain
    state = run.state()
    # Labels that a patch can tell: the left half is 0, the right half 1 or 2 by the image.
    label = np.broadcast_to(
        np.where(np.arange(16) < 8, 0, np.arange(8)[:, None] % 2 + 1)[:, None], (8, 16, 16)
    ).astype(np.uint8)
    image = np.asarray(run.batch()["image"]) // 8 + 60 * label[..., None]
    batch = sharding.to_devices({"image": image, "label": label}, run.mesh)
    losses = []
    for _ in range(60):
        state, metrics = step(state, batch)
        losses.append(float(metrics["loss"]))
    assert losses[0] > math.log(3)
    assert losses[-1] < 0.15, losses
    assert step._cache_size() == 1  # pyright: ignore[reportFunctionMemberAccess]


def test_bfloat16_compute_trains_float32_parameters(make_run, plain):
    """Compute in bfloat16, with augmentation: parameters and moments stay float32, the loss is near
    float32's and falls.

    The draws of the augmentation follow the step: equal parameters at another step meet other
    images.
    """
    augmented = {"brightness": 4.0, "contrast": 0.02}
    run = make_run(
        model={"dtype": "bfloat16"}, data=augmented, optimizer={"learning_rate": 1e-2, "clip": 1.0}
    )
    step = run.step()
    state = run.state()
    batch = run.batch()
    jaxpr = str(jax.make_jaxpr(step)(state, batch))
    assert re.search(r"bf16\[[\d,]+\] = dot_general", jaxpr)
    losses = []
    for _ in range(5):
        state, metrics = step(state, batch)
        losses.append(float(metrics["loss"]))
    assert {leaf.dtype for leaf in jax.tree.leaves((state.trained, state.opt_state))} == {
        np.dtype(np.float32),
        np.dtype(np.int32),
    }
    assert losses[-1] < losses[0]
    assert losses[0] == pytest.approx(float(plain[1](plain[0].state(), batch)[1]["loss"]), rel=0.03)
    other = dataclasses.replace(run.state(), step=state.step)
    assert float(step(other, batch)[1]["loss"]) != losses[0]


class Levels(nnx.Module):
    """A pyramid with BatchNorm and a linear head on features that are given."""

    def __init__(self, rngs: nnx.Rngs):
        self.pyramid = Pyramid(8, "batch", rngs=rngs)
        self.head = LinearHead(3, (8,) * 4, rngs=rngs)


@pytest.mark.parametrize("accumulate", [1, 2])
def test_batch_statistics_are_those_of_the_global_batch(accumulate):
    """Running mean and variance move by a tenth towards those over all rows on all eight devices,
    in NumPy.
    """
    mesh = sharding.make_mesh(MeshConfig(8, 1))
    graph, trained, statistics = nnx.split(Levels(nnx.Rngs(0)), nnx.Param, ...)
    optimizer = optax.sgd(0.0)
    state = TrainState(
        jnp.zeros((), jnp.int32), trained, nnx.State({}), statistics, optimizer.init(trained)
    )
    whole = sharding.replicated(mesh)
    at = jax.tree.map(lambda _: whole, state)
    state = jax.device_put(state, at)
    rng = np.random.default_rng(0)
    # Rows differ much in mean, so that statistics over a device's own rows would be others.
    x = (rng.normal(size=(16, 2, 2, 8)) + 3 * rng.normal(size=(16, 1, 1, 1))).astype(np.float32)
    batch = sharding.to_devices(
        {"x": x, "label": rng.integers(0, 3, (16, 8, 8)).astype(np.uint8)}, mesh
    )

    def losses(model, batch, denominator, key):
        return model.head.loss(
            model.head(model.pyramid((batch["x"],) * 4, True)), batch["label"], denominator
        )

    step = make_step(
        graph,
        optimizer,
        lambda m, b: m.head.loss_denominator(b["label"]),
        losses,
        jax.random.key(0),
        at,
        accumulate,
    )
    kernel, bias = (
        np.asarray(trained["pyramid"]["fpn1_up1"][name][...]) for name in ("kernel", "bias")
    )
    mean = np.zeros(8)
    var = np.ones(8)
    for _ in range(2):
        state, _ = step(state, batch)
        for part in range(accumulate):
            doubled = np.einsum("bhwc,ijco->bhiwjo", x[part::accumulate], kernel) + bias
            mean = 0.9 * mean + 0.1 * doubled.mean((0, 1, 2, 3, 4))
            var = 0.9 * var + 0.1 * doubled.var((0, 1, 2, 3, 4))
        norm = state.statistics["pyramid"]["fpn1_norm"]
        np.testing.assert_allclose(norm["mean"][...], mean, atol=1e-5)
        np.testing.assert_allclose(norm["var"][...], var, rtol=1e-4)


def test_linear_head_loss_is_cross_entropy():
    """Pixel by pixel in NumPy: minus the log probability of the label, over labelled pixels,
    divided by their number in the batch.
    """
    rng = np.random.default_rng(0)
    head = LinearHead(5, (4,), rngs=nnx.Rngs(0))
    output = 3 * rng.normal(size=(2, 6, 7, 5)).astype(np.float32)
    label = rng.integers(0, 5, (2, 6, 7)).astype(np.uint8)
    label[rng.random(label.shape) < 0.3] = 255
    total = 0.0
    count = 0
    for b, y, x in np.ndindex(*label.shape):
        if label[b, y, x] != 255:
            p = np.exp(output[b, y, x].astype(np.float64))
            total -= np.log(p[label[b, y, x]] / p.sum())
            count += 1

    @jax.jit
    def loss_of(output, label):
        denominator = head.loss_denominator(label)
        return head.loss(output, label, denominator), denominator

    loss, denominator = loss_of(output, label)
    assert float(denominator) == count
    assert loss.keys() == {"cross_entropy"}
    assert float(loss["cross_entropy"]) == pytest.approx(total / count, rel=1e-5)

    nothing = np.full((2, 6, 7), 255, np.uint8)
    loss, denominator = loss_of(output, nothing)
    assert float(denominator) == 1
    assert float(loss["cross_entropy"]) == 0
    gradient = jax.jit(jax.grad(lambda o: loss_of(o, nothing)[0]["cross_entropy"]))(output)
    np.testing.assert_array_equal(gradient, 0)


def test_the_state_is_data_only():
    """A state goes through jax.tree untouched: step, parameters, statistics and moments are leaves,
    nothing else is.
    """
    _, state = noisy()
    again = jax.tree.map(lambda x: x, state)
    assert jax.tree.structure(again) == jax.tree.structure(state)
    assert len(jax.tree.leaves(state)) == 3
    assert {f.name for f in dataclasses.fields(TrainState)} == {
        "step",
        "trained",
        "frozen",
        "statistics",
        "opt_state",
    }
