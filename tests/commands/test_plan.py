"""The planner against programs whose exchange is known, and against the bytes that real arrays
take.
"""

import dataclasses
import os
from pathlib import Path
import subprocess
import sys

from flax import nnx
import jax
from jax.sharding import Mesh, PartitionSpec
import numpy as np
import pytest

from jaxdg import config as config_lib
from jaxdg.backbones import create
from jaxdg.commands import abstract_step, accelerators, collectives, plan
from jaxdg.commands.flops import count
from jaxdg.config import Config, MeshConfig
from jaxdg.methods import Method, MethodOptions
from jaxdg.tasks.run_state import Blueprint, abstract_state, make_task
from jaxdg.training import sharding


def test_collectives_are_counted_through_loops():
    """A program with a known exchange in a loop in a loop: how often each runs, its bytes, and who
    exchanges with whom.
    """
    mesh = Mesh(np.array(jax.devices()).reshape(2, 4), ("data", "fsdp"))

    def part(x):
        def inner(x, _):
            return jax.lax.psum(x, "data") * 0.5, None

        def outer(x, _):
            x, _ = jax.lax.scan(inner, x, None, length=3)
            return (
                jax.lax.all_gather(x, "fsdp").sum(0)
                + jax.lax.ppermute(x, "data", [(0, 1), (1, 0)]),
                None,
            )

        x, _ = jax.lax.scan(outer, x, None, length=5)
        return jax.lax.psum(x.astype(np.float16), ("data", "fsdp"))

    spec = PartitionSpec(("data", "fsdp"))
    program = jax.jit(
        jax.shard_map(part, mesh=mesh, in_specs=spec, out_specs=PartitionSpec(), check_vma=False)
    )
    text = program.lower(jax.ShapeDtypeStruct((8 * 16, 25), np.float32)).compile().as_text()
    found, unknown = collectives.collectives(text)
    assert unknown == 0
    rows = {(c.kind, c.groups.shape[1]): (c.times, c.size) for c in found}
    last = rows.pop(("all-reduce", 8))
    assert last in ((1, 16 * 25 * 2), (1, 16 * 25 * 4))  # some CPUs add float16 as float32
    assert rows == {
        ("all-reduce", 2): (15, 1600),
        ("all-gather", 4): (5, 6400),
        ("collective-permute", 2): (5, 1600),
    }
    groups = {(c.kind, c.groups.shape[1]): sorted(map(sorted, c.groups.tolist())) for c in found}
    assert groups["all-reduce", 2] == [[0, 4], [1, 5], [2, 6], [3, 7]]
    assert groups["all-gather", 4] == [[0, 1, 2, 3], [4, 5, 6, 7]]


def test_a_loop_of_unknown_length_counts_once():
    """What runs until the data say so is counted once, and said."""
    mesh = Mesh(np.array(jax.devices()), ("data",))

    def part(x):
        return jax.lax.while_loop(lambda x: x.sum() < 100, lambda x: jax.lax.psum(x, "data"), x)

    program = jax.jit(
        jax.shard_map(
            part, mesh=mesh, in_specs=PartitionSpec(), out_specs=PartitionSpec(), check_vma=False
        )
    )
    (found,), unknown = collectives.collectives(
        program.lower(jax.ShapeDtypeStruct((4,), np.float32)).compile().as_text()
    )
    assert (found.times, found.size, unknown) == (1, 16, 1)


def test_groups_in_every_form():
    """The forms in which XLA writes who exchanges with whom all say the same."""
    columns = [[0, 4], [1, 5], [2, 6], [3, 7]]
    for text in (
        "replica_groups={{0,4},{1,5},{2,6},{3,7}}, to_apply=%add",
        "replica_groups=[4,2]<=[2,4]T(1,0), use_global_device_ids=true",
        "replica_groups=mesh['a'=2,'b'=4] {'a'}, use_global_device_ids=true",
        "replica_groups=mesh['a'=1,'b'=4,'c'=2], device_ids=([2,4]T(1,0)) {'c'}",
    ):
        assert collectives.replica_groups(text).tolist() == columns, text
    assert collectives.replica_groups("replica_groups=[2,4]<=[8]").tolist() == [
        [0, 1, 2, 3],
        [4, 5, 6, 7],
    ]
    with pytest.raises(ValueError, match="cannot read which devices"):
        collectives.replica_groups("replica_groups=all")


def test_seconds_of_an_exchange_are_those_of_rings():
    """All-reduce sends twice what gathering does; a group that leaves its node is as fast as the
    network cards it has in each.
    """
    chip = accelerators.ACCELERATORS["h100"]
    within = np.arange(64).reshape(8, 8)
    across = np.arange(64).reshape(8, 8).T
    both = np.arange(64).reshape(1, 64)

    def seconds(kind, groups):
        return collectives.Collective(kind, 10, 8 * 10**9, groups).seconds(chip)

    np.testing.assert_allclose(seconds("all-gather", within), 10 * 7e9 / (0.8 * 450e9))
    np.testing.assert_allclose(seconds("reduce-scatter", within), 10 * 7e9 / (0.8 * 450e9))
    np.testing.assert_allclose(seconds("all-reduce", within), 10 * 14e9 / (0.8 * 450e9))
    np.testing.assert_allclose(seconds("all-gather", across), 10 * 7e9 / (0.8 * 50e9))
    np.testing.assert_allclose(seconds("all-gather", both), 10 * 63 / 64 * 8e9 / (0.8 * 400e9))


def tiny(task):
    c = Config(batch_size=8, task=task, mesh=MeshConfig(2, 4))
    c.data.crop = (32, 32)
    c.evaluation.stride = (32, 32)
    c.model.pyramid = "none"
    c.model.freeze = "first 2"
    c.model.decoder = "linear" if task == "segmentation" else "fcos"
    c.model.taps = (3,) if task == "segmentation" else ()
    return config_lib.validated(c)


def test_planned_bytes_are_those_of_a_real_state():
    """Parameters and optimiser take on each of eight devices what the arrays of a run take there;
    what divides is divided.
    """
    config = tiny("segmentation")
    p = plan.plan(config)
    task = make_task(config)
    model = Blueprint.of(task, config.model.freeze)
    like, _ = abstract_state(model, config, sharding.make_mesh(config.mesh))
    state = jax.tree.map(
        lambda leaf: jax.device_put(np.zeros(leaf.shape, leaf.dtype), leaf.sharding), like
    )
    for device in jax.devices():

        def held(tree, device=device):
            return sum(
                s.data.nbytes
                for x in jax.tree.leaves(tree)
                for s in x.addressable_shards
                if s.device == device
            )

        assert held((state.trained, state.frozen)) == p.parameters
        assert held(state.opt_state) == p.optimizer
    total = sum(x.nbytes for x in jax.tree.leaves((state.trained, state.frozen)))
    assert p.parameter_count * 4 == total > 3 * p.parameters
    assert p.gradients < p.parameters  # some are frozen
    assert p.temporaries > p.gradients
    assert p.flops > 0
    assert any(c.kind == "all-reduce" for c in p.collectives)


@dataclasses.dataclass(unsafe_hash=True)
class DimOptions(MethodOptions):
    """Images become darker in later steps."""

    def build(self, config):
        return Dim()


class Dim(Method):
    def preparation(self, task, model, mesh):
        def prepare(batch, step):
            brightness = 1.0 if step < 10 else 0.5
            return {**batch, "image": brightness * batch["image"].astype(np.float32)}

        return prepare


@dataclasses.dataclass
class Experiment(Config):
    dim: DimOptions = dataclasses.field(default_factory=DimOptions)


def test_methods_are_planned_without_their_weights():
    """TLDR holds a second encoder, divided like the first. A preparation that holds nothing and
    asks for the number of the step is planned too.
    """
    config = Experiment(**vars(tiny("segmentation")))
    config.tldr.on = config.dim.on = True
    config.model.weights = "no_such_file.safetensors"
    p = plan.plan(config)
    mesh = sharding.make_mesh(config.mesh)
    encoder = create("scratch_ti8", image_size=config.data.crop, taps=(3,), rngs=nnx.Rngs(0))
    state = nnx.state(encoder)
    held = jax.device_put(state, sharding.parameter_shardings(mesh, state))
    one = jax.devices()[0]
    arrays = [
        s.data for x in jax.tree.leaves(held) for s in x.addressable_shards if s.device == one
    ]
    assert p.preparation == sum(x.nbytes for x in arrays) > 0
    assert p.total == p.parameters + p.optimizer + p.rest + p.preparation + p.temporaries
    # Devices exchange parameters and gradients, no features.
    assert {c.kind for c in p.collectives} <= {"all-gather", "all-reduce", "reduce-scatter"}
    # Both preparations make float32 images, of which a device has one.
    views = 3 * 32 * 32 * 3 * 4
    assert p.rest > views + 4 * encoder.config.width**2 * 4
    first = count(lambda images: encoder(images), np.zeros((8, 32, 32, 3), np.float32))
    text = plan.report(config, p, 8, ["h100"], 0.4)
    config.tldr.on = config.dim.on = False
    step = abstract_step.abstract_step(config, mesh)
    assert not step.preparations
    # The encoder before training, and gradients through it for three images instead of one.
    assert p.flops - count(step.function, step.state, step.batch) > 3 * first
    assert "methods' preparation" in text
    none = dataclasses.replace(p, preparation=0)
    assert "methods' preparation" not in plan.report(config, none, 8, ["h100"], 0.4)


def test_detectors_take_the_planned_batch():
    """The shapes of a detection batch are those its losses are made of."""
    task = make_task(tiny("detection"))

    def losses(batch):
        model = task.model(nnx.Rngs(0))
        return task.losses(model, batch, task.loss_denominator(model, batch), jax.random.key(0))

    terms = jax.eval_shape(
        losses, abstract_step.abstract_batch(task, sharding.make_mesh(task.config.mesh))
    )
    assert terms
    assert all(term.shape == () for term in terms.values())


@pytest.mark.parametrize("task", ["segmentation", "detection"])
def test_devices_that_infer_exchange_parameters_alone(task):
    """Each device computes its own images: no features are sent, and of numbers only whether all
    boxes of a tile are settled.
    """
    config = tiny(task)
    config.evaluation.batch_size = 8
    mesh = sharding.make_mesh(config.mesh)
    step = abstract_step.abstract_inference(config, mesh, (32, 32))
    found, _ = collectives.collectives(step.compile(plan.QUICK).as_text())
    sent = {c.kind: c.size for c in found if c.kind != "all-gather"}
    assert task == "detection" or not sent
    assert set(sent) <= {"all-reduce"}
    assert all(size <= 16 for size in sent.values())


def test_the_command():
    """The command plans for devices that are not here, raises a batch that does not divide, and
    says what does not fit.
    """
    root = Path(__file__).resolve().parents[2]
    command = [
        sys.executable,
        "scripts/plan.py",
        "--config",
        "configs/streets_tiny.py",
        "--config.model.decoder=linear",
        "--config.model.pyramid=none",
        "--config.model.taps=3",
    ]
    arguments = [
        "--devices=16",
        "--mesh=data=4,fsdp=4",
        "--accelerator=tpu_v5e",
        "--config.model.dtype=bfloat16",
    ]
    environment = {key: value for key, value in os.environ.items() if key != "XLA_FLAGS"}
    done = subprocess.run(
        [*command, *arguments], cwd=root, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert "batch_size 2 cannot be divided among 16 devices: planned with 16" in done.stdout
    assert "16 devices, mesh data=4 fsdp=4" in done.stdout
    assert "tpu_v5e  fits 16,000.0 MB" in done.stdout
    with pytest.raises(ValueError, match="--mesh is 'data:4'; allowed: such as data=8,fsdp=8"):
        plan.parse_mesh("data:4")
    large = plan.Plan(10**9, 10**9, 2 * 10**9, 0, 12 * 10**9, 10**9, 1e15, [], 0, 1.0)
    assert "DOES NOT FIT 16,000.0 MB: 94 %" in plan.report(
        tiny("segmentation"), large, 8, ["tpu_v5e"], 0.4
    )
