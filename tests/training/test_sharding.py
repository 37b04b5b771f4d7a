"""One program on several meshes: the same gradients, losses and scores, with parameters and moments
really divided.
"""

import math
from pathlib import Path

from flax import nnx
import jax
import numpy as np
import optax
import pytest

from jaxdg import config, segmentation
from jaxdg.config import Mask2FormerOptions, MeshConfig
from jaxdg.data.datasets import StreetsOptions
from jaxdg.tasks import run_state as tasks
from jaxdg.training import sharding
from jaxdg.training.checkpoint import Checkpoints

MESHES = {
    "1": MeshConfig(1, 1),
    "data=8": MeshConfig(8, 1),
    "fsdp=8": MeshConfig(1, 8),
    "4x2": MeshConfig(4, 2),
}


def adam(state):
    (found,) = [s for s in state.opt_state if isinstance(s, optax.ScaleByAdamState)]
    return found


def first_gradients(state):
    """Of a state after its first step without clipping, by path: the first moments are a tenth of
    them.
    """
    return {
        path: 10 * np.asarray(leaf, np.float64) for path, leaf in nnx.to_flat_state(adam(state).mu)
    }


@pytest.fixture(scope="module")
def runs(make_run, tmp_path_factory):
    """Per mesh: the losses of six steps, the gradients of the first, the last state, how often the
    step was compiled, and the run with its step.

    The state after three steps with fsdp=8 is saved in `saved`.
    """
    results = {"saved": tmp_path_factory.mktemp("saved")}
    for name, mesh in MESHES.items():
        run = make_run(mesh, optimizer={"clip": 0.0, "learning_rate": 1e-2})
        step = run.step()
        state = run.state()
        losses = []
        gradients = {}
        for i in range(6):
            state, metrics = step(state, run.batch(i))
            losses.append(float(metrics["loss"]))
            if (name, i) == ("fsdp=8", 2):
                checkpoints = Checkpoints(results["saved"])
                checkpoints.save(state)
                checkpoints.close()
            if i == 0:
                gradients = first_gradients(state)
        results[name] = {
            "losses": losses,
            "gradients": gradients,
            "state": state,
            "compiled": step._cache_size(),
            "run": (run, step),
        }
    return results


@pytest.mark.parametrize("name", list(MESHES)[1:])
def test_gradients_and_losses_agree(runs, name):
    """Gradients at equal parameters agree with one device's to 1e-5 of each array's norm, the
    losses of six steps to 1e-4.
    """
    one = runs["1"]
    other = runs[name]
    np.testing.assert_allclose(other["losses"], one["losses"], rtol=1e-4)
    assert one["losses"][5] != one["losses"][0]
    assert other["gradients"].keys() == one["gradients"].keys()
    for path, expected in one["gradients"].items():
        norm = np.linalg.norm(expected)
        # A key's bias shifts all scores of a query alike: its gradient is rounding only.
        if path[-2:] == ("qkv", "bias"):
            keys = slice(16, 32)
            assert np.linalg.norm(other["gradients"][path][..., keys]) < 1e-5 * norm
        assert norm > 0, path
        assert np.linalg.norm(other["gradients"][path] - expected) <= 1e-5 * norm, path


@pytest.mark.parametrize("name", list(MESHES))
def test_one_program(runs, name):
    """Six steps compile once: the state a step returns lies as the one it was given."""
    assert runs[name]["compiled"] == 1


@pytest.mark.parametrize("mesh", [MeshConfig(1, 2), MeshConfig(1, 1)], ids=["2", "1"])
def test_saved_on_eight_resumed_on_fewer(runs, make_run, mesh):
    """A run saved on eight devices goes on with two and with one: the losses of its next steps are
    those it had on eight, to 1e-4.
    """
    if mesh == MESHES["1"]:
        run, step = runs["1"]["run"]
    else:
        run = make_run(mesh, optimizer={"clip": 0.0, "learning_rate": 1e-2})
        step = run.step()
    checkpoints = Checkpoints(runs["saved"])
    state = checkpoints.restore(run.like)
    losses = []
    checkpoints.close()
    assert int(state.step) == 3
    assert all(leaf.sharding.mesh.size == mesh.fsdp for leaf in jax.tree.leaves(state))
    for i in range(3, 6):
        state, metrics = step(state, run.batch(i))
        losses.append(float(metrics["loss"]))
    np.testing.assert_allclose(losses, runs["fsdp=8"]["losses"][3:], rtol=1e-4)


def test_the_same_scores_on_every_mesh(make_run, monkeypatch):
    """Eleven images, which no mesh divides: every mesh counts the same confusion matrix, all pixels
    of it, exactly.
    """
    seen = {}
    iou = segmentation.iou
    for name, mesh in MESHES.items():
        run = make_run(mesh, evaluation={"batch_size": 4})
        run.config.data.streets = StreetsOptions(size=(48, 64), images=2, val_images=11)

        def count(confusion, name=name):
            return (seen.setdefault(name, confusion), iou(confusion))[1]

        monkeypatch.setattr(segmentation, "iou", count)
        state = run.state()
        evaluate = run.task.evaluator(run.plan.graph, run.mesh)
        evaluate(
            (state.trained, state.frozen, state.statistics),
            run.task.open("night", train=False),
            lambda: None,
        )
    assert 0.9 * 11 * 48 * 64 < seen["1"].sum() <= 11 * 48 * 64
    assert (seen["1"].sum(axis=0) > 0).sum() > 3
    for name, confusion in seen.items():
        np.testing.assert_array_equal(confusion, seen["1"], err_msg=name)


@pytest.mark.parametrize(
    "experiment", ["gta5_eva02", "streets_tiny", "camvid_vit_tiny", "streets_boxes"]
)
def test_eight_devices_hold_an_eighth_each(experiment):
    """With fsdp=8 a device holds at most 1/7 of the bytes of parameters and optimiser."""
    c = config.from_file(Path(__file__).resolve().parents[2] / "configs" / f"{experiment}.py")
    blueprint = tasks.Blueprint.of(tasks.make_task(c), c.model.freeze)
    like, _ = tasks.abstract_state(blueprint, c, sharding.make_mesh(MeshConfig(1, 8)))
    total = 0
    held = 0
    for leaf in jax.tree.leaves((like.trained, like.frozen, like.opt_state)):
        total += math.prod(leaf.shape) * leaf.dtype.itemsize
        held += math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
    assert held <= total / 7


def test_mask2former_agrees_on_eight_devices(make_run):
    """Its losses are normalised over the global batch: three steps on data=4, fsdp=2 lose what they
    lose on one device.

    Gradients agree to 1e-5, but for biases that a normalisation takes away, whose gradients are 0
    up to rounding. Where the partitioner was free to divide features as parameters are, those of
    all that the deformable attention reads were wrong on this mesh.
    """
    sizes = Mask2FormerOptions(
        hidden=32, queries=20, heads=4, pixel_layers=1, pixel_ffn=16, layers=2, ffn=16, points=64
    )
    model = {
        "decoder": "mask2former",
        "mask2former": sizes,
        "pyramid": "batch",
        "taps": (1, 2, 3, 4),
    }
    side = (32, 32)  # the norm of a coarsest level of one pixel would give 0
    losses = {}
    gradients = {}
    for name in ("1", "4x2"):
        optimizer = {"learning_rate": 1e-3, "clip": 0.0}
        run = make_run(
            MESHES[name],
            model=model,
            optimizer=optimizer,
            data={"crop": side},
            evaluation={"stride": side},
        )
        step = run.step()
        state = run.state()
        losses[name] = []
        for i in range(3):
            state, metrics = step(state, run.batch(i))
            losses[name].append(
                [float(metrics[term]) for term in ("loss", "class", "mask", "dice")]
            )
            if i == 0:
                gradients[name] = first_gradients(state)
        assert step._cache_size() == 1
    np.testing.assert_allclose(losses["4x2"], losses["1"], rtol=1e-4)
    assert losses["1"][2] != losses["1"][0]
    norms = {path: np.linalg.norm(gradient) for path, gradient in gradients["1"].items()}
    for path in [path for path, norm in norms.items() if norm > 1e-6]:
        assert (
            np.linalg.norm(gradients["4x2"][path] - gradients["1"][path]) <= 1e-5 * norms[path]
        ), path
    assert not [(path, norm) for path, norm in norms.items() if norm <= 1e-6 and path[-1] != "bias"]


@pytest.mark.parametrize(("name", "parts"), [("1", 1), ("data=8", 1), ("fsdp=8", 8), ("4x2", 2)])
def test_parameters_and_moments_are_divided(runs, name, parts):
    """Kernels and position embeddings lie in `fsdp` parts, of their last axis where it divides,
    moments with them.

    The eight blocks are one segment, whose layer axis eight devices would divide as well.
    """
    state = runs[name]["state"]
    divided = 0
    for tree in (state.trained, adam(state).mu, adam(state).nu):
        for path, leaf in nnx.to_flat_state(tree):
            array = leaf[...]
            last = str(path[-1])
            split = last.endswith(("kernel", "pos_embed"))
            expected = list(array.shape)
            if split:
                expected[-1 if array.shape[-1] % parts == 0 else -2] //= parts
            assert {shard.data.shape for shard in array.addressable_shards} == {tuple(expected)}, (
                path
            )
            divided += split
            if split and "segments" in path:
                assert array.shape[0] == 8
    # Patch embedding, positions, four kernels of the blocks, and the classifier's, by its rows
    # where its 19 columns do not divide.
    assert divided == 3 * (1 + 1 + 4 + 1)


def test_where_an_axis_does_not_divide():
    """The last other axis that does is divided, never the layer axis; where there is none, the
    parameter stays whole.
    """

    def block(*shape):
        return nnx.Dict(segments=nnx.Dict({"0": nnx.Dict(kernel=nnx.Param(np.zeros(shape)))}))

    def at(state):
        return next(
            iter(
                jax.tree.leaves(
                    sharding.parameter_shardings(sharding.make_mesh(MeshConfig(1, 8)), state)
                )
            )
        ).spec

    P = jax.sharding.PartitionSpec

    def single(*shape):
        return nnx.state(nnx.Dict(kernel=nnx.Param(np.zeros(shape))))

    assert at(single(3, 3, 16, 19)) == P(None, None, "fsdp", None)
    assert at(single(8, 3, 7, 19)) == P("fsdp", None, None, None)
    assert at(single(8, 24)) == P(None, "fsdp")
    assert at(single(7, 19)) == P(None, None)
    assert at(nnx.state(block(8, 16, 19))) == P(None, "fsdp", None)
    assert at(nnx.state(block(8, 7, 19))) == P(None, None, None)


def test_first_rule_counts_and_names_trailing_axes():
    """Rules are tried in order on per-block names; a spec is laid on the last axes and cut to those
    there are.
    """
    mesh = sharding.make_mesh(MeshConfig(4, 2))
    state = nnx.state(nnx.eval_shape(lambda: nnx.Linear(4, 6, rngs=nnx.Rngs(0))), nnx.Param)

    def spec(rules):
        return {
            path[-1]: at.spec
            for path, at in nnx.to_flat_state(sharding.parameter_shardings(mesh, state, rules))
        }

    P = jax.sharding.PartitionSpec
    assert spec(()) == {"kernel": P(None, None), "bias": P(None)}
    assert spec(((r"kernel$", ("data", "fsdp")), (r".", ("fsdp",)))) == {
        "kernel": P("data", "fsdp"),
        "bias": P("fsdp"),
    }
    assert spec(((r".", (None, "fsdp")),)) == {"kernel": P(None, "fsdp"), "bias": P("fsdp")}
    assert spec(((r".", ("fsdp", "data")),)) == {
        "kernel": P("fsdp", None),
        "bias": P(None),
    }  # 4 does not divide 6


@pytest.mark.parametrize(
    ("config", "shape"),
    [
        ((-1, 1), (8, 1)),
        ((1, -1), (1, 8)),
        ((-1, 2), (4, 2)),
        ((2, -1), (2, 4)),
        ((8, 1), (8, 1)),
        ((2, 4), (2, 4)),
        ((-1, -1), (8, 1)),
    ],
)
def test_meshes(config, shape):
    """-1 is the rest of the eight devices; every device is used once."""
    mesh = sharding.make_mesh(MeshConfig(*config))
    assert (mesh.shape["data"], mesh.shape["fsdp"]) == shape
    assert sorted(d.id for d in mesh.devices.reshape(-1)) == list(range(8))


@pytest.mark.parametrize("config", [(3, -1), (-1, 3), (1, 1), (4, 4), (16, -1), (-1, 16)])
def test_meshes_that_cannot_be(config):
    """A product other than the number of devices is refused with both and what -1 means."""
    message = (
        rf"mesh is data={config[0]}, fsdp={config[1]}; allowed: a product equal to the number of"
        r" devices, 8 \(-1 = the rest\)"
    )
    with pytest.raises(ValueError, match=message):
        sharding.make_mesh(MeshConfig(*config))


@pytest.mark.parametrize("mesh", MESHES.values(), ids=MESHES)
def test_rows_are_reassembled(mesh):
    """A batch on the devices is the batch on the host, one block of rows a device, in the order of
    the mesh.
    """
    rows = np.arange(16 * 3 * 2, dtype=np.float32).reshape(16, 3, 2)
    devices = sharding.make_mesh(mesh, jax.devices()[: mesh.data * mesh.fsdp])
    batch = sharding.to_devices({"x": rows, "y": rows[:, 0, 0].astype(np.uint8)}, devices)
    np.testing.assert_array_equal(batch["x"], rows)
    np.testing.assert_array_equal(batch["y"], rows[:, 0, 0])
    each = 16 // devices.size
    for i, device in enumerate(devices.devices.reshape(-1)):
        (shard,) = [s for s in batch["x"].addressable_shards if s.device == device]
        np.testing.assert_array_equal(shard.data, rows[i * each : (i + 1) * each])
