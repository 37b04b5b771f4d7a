"""Checkpoints come back bit for bit, damaged ones are passed over, and nothing that is not damaged
is lost.
"""

import dataclasses
import gc
import json
import shutil

from flax import nnx
import jax
import jax.numpy as jnp
from jax.sharding import Mesh
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest

from jaxdg.config import MeshConfig
from jaxdg.training import sharding
from jaxdg.training.checkpoint import Checkpoints
from jaxdg.training.fingerprint import fingerprint
from jaxdg.training.step import TrainState

# Orbax leaves coroutines behind where a read fails, which complain when they are collected.
pytestmark = [
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
    pytest.mark.usefixtures("broken_reads_forgotten"),
]

OPTIMIZER = optax.adam(0.1)


class Toy(nnx.Module):
    """What is trained, what is frozen, and a running mean."""

    def __init__(self, width: int):
        self.kernel = nnx.Param(jnp.zeros((3, 16, width)))
        self.bias = nnx.Param(jnp.zeros(width))
        self.old_kernel = nnx.Param(jnp.zeros((16, width)))
        self.mean = nnx.BatchStat(jnp.zeros(width))


def abstract(mesh: Mesh, width: int = 24) -> TrainState:
    """Shapes with their places on a mesh."""
    model = nnx.eval_shape(lambda: Toy(width))

    def old(path, _):
        return path[-1] == "old_kernel"

    _, frozen, trained, rest = nnx.split(model, old, nnx.Param, ...)
    moments = jax.eval_shape(OPTIMIZER.init, trained)
    at = sharding.parameter_shardings(mesh, trained)
    whole = sharding.replicated(mesh)
    places = TrainState(
        whole,
        at,
        sharding.parameter_shardings(mesh, frozen),
        jax.tree.map(lambda _: whole, rest),
        sharding.optimizer_shardings(mesh, OPTIMIZER, trained, at),
    )
    shapes = TrainState(jax.ShapeDtypeStruct((), np.int32), trained, frozen, rest, moments)
    return jax.tree.map(
        lambda leaf, at: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=at), shapes, places
    )


def values(like: TrainState, step: int) -> TrainState:
    """Noise of a step."""
    rng = np.random.default_rng(step)
    state = jax.tree.map(
        lambda leaf: jax.device_put(rng.normal(size=leaf.shape).astype(leaf.dtype), leaf.sharding),
        like,
    )
    return dataclasses.replace(state, step=jax.device_put(jnp.int32(step), like.step.sharding))


def same(a: TrainState, b: TrainState) -> None:
    """Bit for bit, placed as the second."""
    assert jax.tree.structure(a) == jax.tree.structure(b)
    assert [np.asarray(x).tobytes() for x in jax.tree.leaves(a)] == [
        np.asarray(y).tobytes() for y in jax.tree.leaves(b)
    ]
    assert all(
        x.sharding.is_equivalent_to(y.sharding, x.ndim)
        for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    )


@pytest.fixture(scope="module")
def meshes():
    return {
        name: sharding.make_mesh(config)
        for name, config in (("data", MeshConfig(8, 1)), ("fsdp", MeshConfig(1, 8)))
    }


@pytest.fixture(scope="module")
def one():
    """The state's shapes on one device."""
    return abstract(sharding.make_mesh(MeshConfig(1, 1), jax.devices()[:1]))


@pytest.fixture(scope="module")
def saved(one, tmp_path_factory):
    """A workdir with the checkpoints of steps 1, 2 and 3."""
    workdir = tmp_path_factory.mktemp("saved")
    checkpoints = Checkpoints(workdir, keep=3)
    for step in (1, 2, 3):
        checkpoints.save(values(one, step))
    checkpoints.close()
    return workdir


@pytest.fixture
def workdir(saved, tmp_path):
    """A copy of it to be damaged."""
    shutil.copytree(saved, tmp_path / "run")
    yield tmp_path / "run"
    gc.collect()  # here, not in a later test


@pytest.fixture
def opened():
    """Opens checkpoint folders and closes them in the end."""
    managers = []

    def open_one(workdir, keep=3):
        managers.append(Checkpoints(workdir, keep))
        return managers[-1]

    yield open_one
    for manager in managers:
        manager.close()


def array_files(workdir, step, item):
    """The files that hold arrays, largest first."""
    files = [p for p in (workdir / "checkpoints" / str(step) / item).rglob("d/*") if p.is_file()]
    return sorted(files, key=lambda p: -p.stat().st_size)


@pytest.mark.parametrize(("saved_on", "restored_on"), [("data", "fsdp"), ("fsdp", "data")])
def test_bit_identical_across_meshes(meshes, saved_on, restored_on, tmp_path, opened):
    """Saved on one mesh and restored on another: the same bits, lying where the other mesh wants
    them.
    """
    checkpoints = opened(tmp_path)
    checkpoints.save(values(abstract(meshes[saved_on]), 7))
    checkpoints.wait()
    like = abstract(meshes[restored_on])
    same(opened(tmp_path).restore(like), values(like, 7))
    if restored_on == "fsdp":
        kernel = next(iter(jax.tree.leaves(checkpoints.restore(like).trained["kernel"])))
        assert {shard.data.shape for shard in kernel.addressable_shards} == {(3, 16, 3)}


def test_what_is_saved_may_be_donated(one, tmp_path, opened):
    """`save` stores a state as it was, even if steps overwrite its buffers at once."""
    checkpoints = opened(tmp_path, keep=5)
    following = jax.jit(lambda s: jax.tree.map(lambda x: x + 1, s), donate_argnums=0)
    state = values(one, 0)
    for step in range(4):
        checkpoints.save(state)
        state = following(state)
        assert int(state.step) == step + 1
    checkpoints.wait()
    expected = values(one, 0)
    for step in range(4):
        same(opened(tmp_path, keep=5).restore(one, step), expected)
        expected = jax.tree.map(lambda x: x + 1, expected)


def test_newest_few_and_the_best_are_kept(one, tmp_path, opened):
    """Of seven steps the newest two stay and the best of those scored, also for a manager opened
    later.
    """
    checkpoints = opened(tmp_path, keep=2)
    assert checkpoints.best() is None
    for step, score in ((1, 30.0), (2, 50.0), (3, 40.0), (4, None), (5, None)):
        checkpoints.save(values(one, step))
        if score is not None:
            checkpoints.scored(step, score)
    checkpoints.wait()
    assert checkpoints.steps() == [2, 4, 5]
    assert checkpoints.best() == (2, 50.0)
    checkpoints.close()
    again = opened(tmp_path, keep=2)
    assert again.best() == (2, 50.0)
    again.save(values(one, 6))
    again.scored(6, 50.0)  # as good and newer
    again.save(values(one, 7))
    again.save(values(one, 8))
    again.wait()
    assert again.steps() == [6, 7, 8]
    same(again.restore(one, 6), values(one, 6))


def test_a_stored_step_is_left_as_it_is(one, workdir, opened):
    """Saving a step again changes nothing."""
    checkpoints = opened(workdir)
    checkpoints.save(dataclasses.replace(values(one, 9), step=jnp.int32(3)))
    checkpoints.wait()
    same(checkpoints.restore(one, 3), values(one, 3))


def test_nothing_and_missing_steps(one, workdir, tmp_path, opened):
    """An empty folder gives None; a step that is not there is refused with those that are."""
    assert opened(tmp_path / "new").restore(one) is None
    assert opened(tmp_path / "new").restore_model(one) is None
    with pytest.raises(
        ValueError, match=r"checkpoints has no checkpoint of step 4; it has 1, 2, 3$"
    ):
        opened(workdir).restore(one, 4)


def flip(path, place=0.5):
    data = bytearray(path.read_bytes())
    data[int(len(data) * place)] ^= 1
    path.write_bytes(data)


def truncate(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def delete(path):
    path.unlink()


@pytest.mark.parametrize("item", ["model", "optimizer"])
@pytest.mark.parametrize("damage", [flip, truncate, delete])
def test_a_damaged_checkpoint_is_passed_over(one, workdir, opened, damage, item):
    """One bit, half a file or a file less in the newest: the one before is used, the bad one kept
    aside, its step can be saved again.
    """
    damage(array_files(workdir, 3, item)[0])
    checkpoints = opened(workdir)
    said = []
    same(checkpoints.restore(one, say=said.append), values(one, 2))
    assert len(said) == 2
    assert f"checkpoint {workdir}/checkpoints/3 is corrupted (" in said[0]
    assert said[0].endswith("; falling back to step 2")
    assert said[1] == f"corrupted checkpoint moved to {workdir}/corrupted_checkpoint_3"
    assert (workdir / "corrupted_checkpoint_3" / item).is_dir()
    assert checkpoints.steps() == [1, 2]

    checkpoints.save(values(one, 3))
    checkpoints.wait()
    same(opened(workdir).restore(one, say=pytest.fail), values(one, 3))


def test_no_flipped_bit_goes_unnoticed(one, workdir, opened):
    """Whichever file of the model has a bit flipped: an error, or, where the bit has no meaning,
    exactly what was saved.
    """
    state = values(one, 3)
    found = 0
    checkpoints = opened(workdir)
    for path in array_files(workdir, 3, "model"):
        before = path.read_bytes()
        for place in (0.1, 0.5, 0.9):
            flip(path, place)
            try:
                stored = checkpoints.restore_model(one, 3)
            except ValueError as error:
                assert "checkpoints/3 is corrupted (" in str(error)  # noqa: PT017  either is right
                found += 1
            else:
                same(dataclasses.replace(state, **stored), state)
            path.write_bytes(before)
    assert found >= 4
    same(dataclasses.replace(state, **checkpoints.restore_model(one, 3)), state)


def test_evaluation_moves_nothing(one, workdir, opened):
    """`restore_model` falls back as well but leaves the folder alone; it may be read-only, or a
    training run's.
    """
    flip(array_files(workdir, 3, "model")[0])
    said = []
    stored = opened(workdir).restore_model(one, say=said.append)
    assert int(stored["step"]) == 2
    assert len(said) == 1
    assert "falling back to step 2" in said[0]
    assert opened(workdir).steps() == [1, 2, 3]
    assert not list(workdir.glob("corrupted*"))


def test_an_asked_for_step_does_not_fall_back(one, workdir, opened):
    """A damaged optimiser of the step that was asked for is an error, not another step."""
    flip(array_files(workdir, 3, "optimizer")[0])
    with pytest.raises(ValueError, match=r"checkpoints/3 is corrupted .*; choose another step$"):
        opened(workdir).restore(one, 3)
    assert opened(workdir).steps() == [1, 2, 3]


def test_all_damaged_is_one_line_and_loses_nothing(one, workdir, opened):
    """If no checkpoint can be read, the error names the newest and what to do, and every checkpoint
    stays.
    """
    for step in (1, 2, 3):
        truncate(array_files(workdir, step, "model")[0])
    with pytest.raises(
        ValueError,
        match=(
            r"no readable checkpoint: .*checkpoints/3 is corrupted .*; start again in a new"
            r" workdir$"
        ),
    ) as error:
        opened(workdir).restore(one, say=pytest.fail)
    assert "\n" not in str(error.value)
    assert opened(workdir).steps() == [1, 2, 3]


def test_another_models_checkpoint_is_refused(saved, opened):
    """Another width, another split into trained and frozen: one line with checkpoint, parameter and
    both shapes; nothing is moved.
    """
    mesh = sharding.make_mesh(MeshConfig(1, 1), jax.devices()[:1])
    wider = abstract(mesh, width=32)
    where = r"checkpoints/3 belongs to another model \("
    for restore in (opened(saved).restore, opened(saved).restore_model):
        told = (
            r"frozen\.old_kernel\.value is \(16, 24\) there and \(16, 32\) in this model\); give"
            r" the settings of its own run$"
        )
        with pytest.raises(ValueError, match=where + told):
            restore(wider, say=pytest.fail)
    like = abstract(mesh)
    unfrozen = dataclasses.replace(
        like, trained=nnx.merge_state(like.trained, like.frozen), frozen=nnx.State({})
    )
    with pytest.raises(
        ValueError,
        match=where + r"frozen\.old_kernel\.value is \(16, 24\) there and absent in this model\)",
    ) as error:
        opened(saved).restore(unfrozen, say=pytest.fail)
    assert "\n" not in str(error.value)
    counts = dataclasses.replace(
        like, step=jax.ShapeDtypeStruct((), np.float32, sharding=like.step.sharding)
    )
    with pytest.raises(
        ValueError, match=where + r"step is int32 there and float32 in this model\)"
    ):
        opened(saved).restore_model(counts, say=pytest.fail)
    moments = dataclasses.replace(like, opt_state=())
    with pytest.raises(
        ValueError,
        match=where + r"opt_state\.\[0\]\.count is \(\) there and absent in this model\)",
    ):
        opened(saved).restore(moments, say=pytest.fail)
    assert opened(saved).steps() == [1, 2, 3]
    assert not list(saved.glob("corrupted*"))


def test_the_model_alone(one, workdir, opened):
    """Evaluation needs no optimiser: it is restored where the optimiser's part is gone."""
    shutil.rmtree(workdir / "checkpoints" / "3" / "optimizer")
    stored = opened(workdir).restore_model(one)
    expected = values(one, 3)
    assert stored.keys() == {"step", "trained", "frozen", "statistics"}
    for name, tree in stored.items():
        jax.tree.map(np.testing.assert_array_equal, tree, getattr(expected, name))


def test_best_score_survives_a_kill(one, workdir, opened):
    """The score is written whole: a half-written file beside it is ignored."""
    opened(workdir).scored(2, 12.5)
    (workdir / "checkpoints" / "best.partial").write_text("{")
    assert opened(workdir).best() == (2, 12.5)
    assert json.loads((workdir / "checkpoints" / "best.json").read_text()) == {
        "step": 2,
        "score": 12.5,
    }


@pytest.mark.parametrize(
    "damage",
    [b"", b"\0" * 30, b'{"step": 2', b"[]", b'{"step": "2", "score": 1}', b"\xff"],
    ids=range(6),
)
def test_a_broken_best_score_is_taken_from_the_metrics(one, workdir, opened, damage):
    """What a crash left of best.json is set aside; the best of the rows judged on the source stands
    in its place, the newer of equals.
    """
    rows = [
        {"step": step, "domain": domain, "mIoU": score, "decides": domain == "clear"}
        for step, domain, score in (
            (1, "clear", 12.5),
            (1, "fog", 90.0),
            (2, "clear", 12.5),
            (3, "clear", 7.0),
        )
    ]
    (workdir / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    best = workdir / "checkpoints" / "best.json"
    best.write_bytes(damage)
    assert (
        Checkpoints(workdir, read_only=True).best() is None
    )  # beside a run that trains nothing is touched
    assert best.read_bytes() == damage
    said = []
    assert Checkpoints(workdir, say=said.append).best() == (2, 12.5)
    assert len(said) == 1
    assert said[0].startswith(f"{best}: broken (")
    assert json.loads(best.read_text()) == {"step": 2, "score": 12.5}
    assert best.with_name("best.json.broken").read_bytes() == damage
    assert opened(workdir).steps() == [1, 2, 3]


PATHS = (
    "a[1]",
    "a*b",
    "a**b",
    "q?",
    "sp ace",
    "p%41#",
    "quo'te\"",
    "unié",
    "-lead",
    "co:lon",
    "new\nline",
    "$x;{y}|",
    "~",
)


@pytest.mark.parametrize("name", PATHS)
def test_any_path_will_do(one, tmp_path, opened, name):
    """Characters that mean something to a search or a shell mean nothing in a path: what is saved
    there is there, and nowhere else.
    """
    checkpoints = opened(tmp_path / name / "run")
    checkpoints.save(values(one, 4))
    checkpoints.wait()
    same(opened(tmp_path / name / "run").restore(one), values(one, 4))
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_a_path_is_no_pattern(one, tmp_path, opened):
    """A folder `a*` beside `ab`, which holds another run's half-written checkpoint of the same
    step, saves its own arrays alone.
    """
    for name, step in (("ab", 1), ("a*", 2)):
        checkpoints = opened(tmp_path / name)
        checkpoints.save(
            dataclasses.replace(
                values(one, step), step=jax.device_put(jnp.int32(7), one.step.sharding)
            )
        )
        checkpoints.wait()
        if name == "ab":
            (tmp_path / "ab/checkpoints/7/model").rename(
                tmp_path / "ab/checkpoints/7/model.orbax-checkpoint-tmp"
            )
            (tmp_path / "ab/checkpoints/7").rename(
                tmp_path / "ab/checkpoints/7.orbax-checkpoint-tmp"
            )
    stored = opened(tmp_path / "a*").restore(one)
    np.testing.assert_array_equal(
        jax.tree.leaves(stored.trained)[0], jax.tree.leaves(values(one, 2).trained)[0]
    )


@pytest.mark.parametrize("name", ["back\\slash", "gs:", "s3:", "\udcff"])
def test_paths_that_cannot_hold_checkpoints_are_refused(tmp_path, name):
    """The storage library would write elsewhere: one line says which folder to rename, before
    anything is made.
    """
    with pytest.raises(ValueError, match=r"rename the folder$") as error:
        Checkpoints(tmp_path / name / "run")
    assert "\n" not in str(error.value)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "path", ["model/_METADATA", "model/manifest.ocdbt", "optimizer/manifest.ocdbt"]
)
def test_what_the_system_does_not_let_be_read_is_not_corrupted(one, workdir, opened, path):
    """No permission, a network that is away (here a link to itself): said as such, nothing is
    moved, no step is trained anew.
    """
    file = workdir / "checkpoints/3" / path
    file.rename(file.with_name("kept"))
    file.symlink_to(file)
    told = (
        rf"^checkpoint {workdir}/checkpoints/3 cannot be read \({file}: Too many levels of symbolic"
        r" links\); it was left as it is; once"
    )
    with pytest.raises(OSError, match=told):
        opened(workdir).restore(one, say=pytest.fail)
    file.unlink()
    file.with_name("kept").rename(file)
    same(opened(workdir).restore(one, say=pytest.fail), values(one, 3))


def test_too_little_memory_is_not_corruption(one, workdir, opened, monkeypatch):
    """A device that cannot hold a checkpoint says so; falling back would lose steps and help
    nothing.
    """
    checkpoints = opened(workdir)

    def restore(*_, **__):
        raise RuntimeError("RESOURCE_EXHAUSTED: Out of memory while trying to allocate 17 bytes")

    monkeypatch.setattr(checkpoints._manager, "restore", restore)
    with pytest.raises(
        OSError, match=r"checkpoints/3 does not fit into memory \(RuntimeError: RESOURCE_EXHAUSTED"
    ):
        checkpoints.restore(one, say=pytest.fail)


def test_reading_beside_a_run_that_trains(one, workdir, opened, monkeypatch):
    """The checkpoint being read is removed, as by a run that keeps its newest: the newer one is
    read, and nothing is called corrupted.
    """
    trains = opened(workdir)
    reads = Checkpoints(workdir, read_only=True)
    read = reads._read

    def slowly(step, item, like):
        if step == 3:
            trains.save(values(one, 8))
            trains.wait()
            shutil.rmtree(workdir / "checkpoints/3")
        return read(step, item, like)

    monkeypatch.setattr(reads, "_read", slowly)
    assert int(reads.restore_model(one, say=pytest.fail)["step"]) == 8
    monkeypatch.setattr(
        reads,
        "_read",
        lambda step, item, like: shutil.rmtree(workdir / "checkpoints/8") or read(step, item, like),
    )
    with pytest.raises(
        ValueError,
        match=(
            r"checkpoints/8 was removed while it was read, by a run that keeps the newest; try"
            r" again$"
        ),
    ):
        reads.restore_model(one, 8, say=pytest.fail)
    reads.close()


def test_only_a_run_that_trains_clears_up(one, workdir, opened):
    """What is half written is left alone by a reader, since a run may be writing it, and removed by
    the run that comes next.
    """
    half = workdir / "checkpoints/9.orbax-checkpoint-tmp"
    shutil.copytree(workdir / "checkpoints/3", half)
    reads = Checkpoints(workdir, read_only=True)
    assert reads.steps() == [1, 2, 3]
    reads.restore_model(one)
    reads.close()
    assert half.is_dir()
    trains = opened(workdir)
    trains.save(values(one, 9))
    trains.wait()
    assert not half.exists()
    same(trains.restore(one), values(one, 9))


def test_a_last_checkpoint_is_read_back(one, workdir, opened):
    """What came to the disk is what a run ends with; if it is not what was saved, it is kept aside
    and the error names it.
    """
    checkpoints = opened(workdir)
    same(checkpoints.reread(one, 3), values(one, 3))
    flip(array_files(workdir, 3, "optimizer")[0])
    told = (
        r"checkpoint of step 3 cannot be read back \(.*\); it is in"
        rf" {workdir}/corrupted_checkpoint_3; .*\(1, 2\)$"
    )
    with pytest.raises(ValueError, match=told) as error:
        checkpoints.reread(one, 3)
    assert "\n" not in str(error.value)
    assert checkpoints.steps() == [1, 2]


def test_a_disk_that_fills_while_writing_is_one_line(one, workdir, monkeypatch):
    """The room looked at before was taken by others: the storage library's errors become one line,
    what was saved before stays whole.
    """
    checkpoints = Checkpoints(workdir, keep=3)

    def wait():
        raise ValueError(
            "FAILED: Error writing local file [OS error 28: ENOSPC No space left on device]"
        )

    with monkeypatch.context() as patch:
        patch.setattr(checkpoints._manager, "wait_until_finished", wait)
        with pytest.raises(
            OSError,
            match=(
                r"^disk full: a checkpoint did not fit into .*checkpoints; .* whole \(1, 2, 3\);"
                r" free some space"
            ),
        ):
            checkpoints.wait()
    checkpoints.close()


def slow_fingerprint(arrays):
    """The same sum by Python integers."""
    total = 0
    for i, array in enumerate(arrays):
        words = (
            array.view({1: np.uint8, 2: np.uint16, 4: np.uint32}[array.dtype.itemsize])
            .reshape(-1)
            .tolist()
        )
        total += (2 * i + 1) * sum((2 * at + 1) * word for at, word in enumerate(words))
    return total % 2**32


def test_fingerprint(meshes):
    """It is the sum computed by hand, on every mesh, and any one bit, two swapped values or two
    swapped arrays change it.
    """
    rng = np.random.default_rng(0)
    kernel, other = rng.normal(size=(2, 3, 16, 8)).astype(np.float32)
    half = rng.normal(size=(5, 3)).astype(jnp.bfloat16)
    count = np.array(7, np.int32)
    tree = {"a": kernel, "b": other, "c": half, "d": count}
    expected = slow_fingerprint([kernel, other, half, count])
    assert int(fingerprint(jax.tree.map(jnp.asarray, tree))) == expected
    for mesh in meshes.values():
        divided = jax.device_put(
            jnp.asarray(kernel), jax.NamedSharding(mesh, jax.P(None, "data", "fsdp"))
        )
        assert int(fingerprint({**jax.tree.map(jnp.asarray, tree), "a": divided})) == expected
    assert (
        int(fingerprint(jax.tree.map(jnp.asarray, {**tree, "a": other, "b": kernel}))) != expected
    )
    swapped = kernel.copy()
    swapped[0, 0, 0] = kernel[2, 5, 1]
    swapped[2, 5, 1] = kernel[0, 0, 0]
    assert int(fingerprint(jax.tree.map(jnp.asarray, {**tree, "a": swapped}))) != expected
    for bit in range(32):
        flipped = kernel.copy()
        flipped.view(np.uint32)[1, 2, 3] ^= np.uint32(1 << bit)
        assert int(fingerprint(jax.tree.map(jnp.asarray, {**tree, "a": flipped}))) != expected
    assert int(fingerprint({})) == 0


def test_a_fingerprint_of_many_arrays_has_no_chain_of_additions():
    """XLA for CPUs compiles such a chain in a time that grows with the cube of its length."""
    arrays = [np.full(3, i, np.float32) for i in range(100)]
    assert int(fingerprint([jnp.asarray(a) for a in arrays])) == slow_fingerprint(arrays)
    assert "u32[] = add" not in str(jax.make_jaxpr(fingerprint)(arrays))


def test_a_checkpoint_that_vanishes_while_it_is_listed_is_no_error(tmp_path, monkeypatch):
    """A run beside may remove it; a folder that is never there is told all the same."""
    made = ocp.CheckpointManager
    failures = [FileNotFoundError("checkpoints/9")] * 2

    def manager(*arguments, **options):
        if failures:
            raise failures.pop()
        return made(*arguments, **options)

    (tmp_path / "checkpoints").mkdir()
    monkeypatch.setattr(ocp, "CheckpointManager", manager)
    assert Checkpoints(tmp_path, read_only=True).steps() == []
    failures += [FileNotFoundError("checkpoints/9")] * 9
    with pytest.raises(FileNotFoundError, match="checkpoints/9"):
        Checkpoints(tmp_path, read_only=True)
