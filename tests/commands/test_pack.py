"""A packed model is the workdir's in one file: the same pixels, scores, start of a run and export,
away from the machine, and without the library of checkpoints.
"""

import dataclasses
import hashlib
import inspect
import json
from pathlib import Path
import re
import shutil
import subprocess
import sys
import types

from flax import nnx
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy

import jaxdg
from jaxdg import config as config_lib
from jaxdg import evaluate, methods, weights
from jaxdg.backbones import VitConfig, create, zoo
from jaxdg.commands import export, model_card
from jaxdg.commands.pack import noted, pack
from jaxdg.config import Config, MeshConfig
from jaxdg.evaluation.overlap import TrainedOn
from jaxdg.tasks import packed
from jaxdg.tasks import run_state as tasks
from jaxdg.training import sharding
from jaxdg.training.checkpoint import Checkpoints

TINY = dict(width=16, depth=3, heads=2, patch_size=8, taps=(2,))
# Loads a packed model where nothing of orbax can be imported, and predicts.
WITHOUT_ORBAX = f"""
import sys

class Blocked:
    def find_spec(self, name, path, target=None):
        if name.partition(".")[0] == "orbax":
            raise ImportError(name + " is blocked")

sys.meta_path.insert(0, Blocked())
import numpy as np
import jaxdg
from jaxdg.backbones import VitConfig, zoo
from jaxdg.commands import export
zoo.ZOO["tiny8"] = zoo.Entry(VitConfig(**{TINY}))
file, images, out = sys.argv[1:]
model = jaxdg.load(file)
np.save(out, [model.predict(image) for image in np.load(images)])
export.export(model, (32, 64), ["cpu"])
try:
    import orbax
except ImportError:
    print("no orbax, and", *sorted(name for name in sys.modules if "orbax" in name))
"""


@pytest.fixture(scope="module", autouse=True)
def small():
    """A small encoder in the zoo, and one device: checkpoints of eight compile for each."""
    with pytest.MonkeyPatch.context() as patch:
        entry = zoo.Entry(VitConfig(**TINY), licence="Apache-2.0")  # pyright: ignore[reportArgumentType]
        patch.setitem(zoo.ZOO, "tiny8", entry)
        first = jax.devices()[:1]
        patch.setattr(jax, "devices", lambda: first)
        yield


def streets(**changes) -> Config:
    """A small run on streets; changes by dotted name, with __ for dots."""
    c = Config(steps=2, batch_size=2, log_every=1, eval_every=2, checkpoint_every=1)
    c.data.crop = c.data.streets.size = (32, 64)
    c.evaluation.stride = (24, 48)
    c.data.streets.images = 4
    c.data.streets.val_images = 2
    c.model.encoder = "tiny8"
    c.model.pyramid = "none"
    c.model.decoder = "segformer"
    c.model.segformer.hidden = 16
    c.evaluation.domains = ("clear", "fog")
    for field, value in changes.items():
        holder, _, name = field.replace("__", ".").rpartition(".")
        setattr(config_lib.get(c, holder) if holder else c, name, value)
    return config_lib.validated(c)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("pack")


def saved(c: Config, workdir: Path) -> Path:
    """A workdir with a checkpoint of drawn parameters, as a run with these methods saves it."""
    active = methods.active(c)
    task = tasks.make_task(c, active)
    mesh = sharding.make_mesh(MeshConfig(1, 1), jax.devices()[:1])
    plan = tasks.Blueprint.of(task, c.model.freeze)
    like, _ = tasks.abstract_state(plan, c, mesh, active)
    rng = np.random.default_rng(0)

    def drawn(tree):
        return jax.tree.map(lambda s: jnp.asarray(rng.normal(size=s.shape).astype(s.dtype)), tree)

    state = dataclasses.replace(drawn(like), step=jnp.asarray(c.steps, jnp.int32))
    checkpoints = Checkpoints(workdir)
    checkpoints.save(state, None if plan.finished is None else drawn(plan.finished.abstract))
    checkpoints.close()
    config_lib.save(c, workdir)
    return workdir


def judge(checkpoint: Path, out: Path | None) -> dict:
    """Runs `evaluate` in this process; the results.json."""
    names = re.findall(r"^    (_[A-Z_]+) = ", inspect.getsource(evaluate), re.MULTILINE)  # flags
    values = dict.fromkeys(names) | {"_CHECKPOINT": str(checkpoint), "_OUT": out and str(out)}
    with pytest.MonkeyPatch.context() as patch:
        for name, value in values.items():
            flag = types.SimpleNamespace(value=value)
            patch.setattr(evaluate, name, flag, raising=False)
        patch.setattr(evaluate.runtime, "set_up", lambda: None)
        inspect.unwrap(evaluate.main)(["evaluate"])  # alone, not as one of several processes
    out = out or checkpoint / "evaluation_2"
    return json.loads((out / "results.json").read_text())


@pytest.fixture(scope="module")
def run(folder) -> Path:
    """The judged workdir of a run with an average, a frozen block, statistics, an encoder's weights
    to start from, and a note of what it was trained on.
    """
    encoder = create("tiny8", image_size=(32, 64), rngs=nnx.Rngs(1))
    about = {"model": "tiny8", "source": "tiny.pth", "sha256": "0" * 64, "jaxdg": "0"}
    weights.save(weights.tensors(encoder), folder / "encoder.safetensors", about)
    c = streets(
        model__weights=str(folder / "encoder.safetensors"),
        model__freeze="first 1",
        average__on=True,
    )
    workdir = saved(c, folder / "run")
    task = tasks.make_task(c)
    TrainedOn.of(task.open("clear", train=True), c.data.root).save(workdir)
    judge(workdir, None)
    return workdir


@pytest.fixture(scope="module")
def file(run, folder) -> Path:
    """The packed run, in another folder than it was written to."""
    pack(run, folder / "model.safetensors")
    (folder / "elsewhere").mkdir()
    shutil.move(folder / "model.safetensors", folder / "elsewhere" / "model.safetensors")
    return folder / "elsewhere" / "model.safetensors"


@pytest.fixture(scope="module")
def images() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (2, 40, 70, 3)).astype(np.uint8)


def same(one, other) -> None:
    """Two trees have the same structure and bits."""
    assert jax.tree.structure(one) == jax.tree.structure(other)
    jax.tree.map(np.testing.assert_array_equal, one, other)


def test_it_predicts_and_exports_the_bits_of_the_workdir(run, file, images, tmp_path):
    """State, label maps and the exported program."""
    expected, model = jaxdg.load(run), jaxdg.load(file)
    same(model.state, expected.state)
    assert (model.step, model.labels) == (2, expected.labels)
    for image in images:
        np.testing.assert_array_equal(model.predict(image), expected.predict(image))
    # On eight devices every array lies where that of a run does.
    mesh = sharding.make_mesh(MeshConfig(2, 4), jax.local_devices())
    _, divided, _ = tasks.opened(file).restore(model.task, mesh)
    plan = tasks.Blueprint.of(model.task, "first 1")
    like, _ = tasks.abstract_state(plan, model.task.config, mesh)
    places = like.trained, like.frozen, like.statistics
    for leaf, place in zip(jax.tree.leaves(divided), jax.tree.leaves(places), strict=True):
        assert leaf.sharding == place.sharding
    same(divided, expected.state)
    programs = [export.export(m, (32, 64), ["cpu"]).serialize() for m in (model, expected)]
    assert programs[0] == programs[1]


def test_it_needs_no_orbax(run, file, images, tmp_path):
    """Loading, predicting and exporting in a process in which no module of orbax can be
    imported.
    """
    np.save(tmp_path / "images.npy", images)
    arguments = [file, tmp_path / "images.npy", tmp_path / "labels.npy"]
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_ORBAX, *map(str, arguments)], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "no orbax, and"
    model = jaxdg.load(run)
    expected = [model.predict(image) for image in images]
    np.testing.assert_array_equal(np.load(tmp_path / "labels.npy"), expected)


def test_it_is_judged_as_the_workdir_is(run, file, tmp_path):
    """results.json has the same scores, marks of what was trained on, and fingerprint; --out is
    asked for, as no folder is the file's own.
    """
    expected = json.loads((run / "evaluation_2/results.json").read_text())
    assert judge(file, tmp_path / "file") == expected
    assert packed.read(file).results == (expected,)
    assert (expected["seen_by"], expected["domains"]["clear"]["seen"]) == ("images", True)
    assert expected["domains"]["clear"]["mIoU"] > 0
    with pytest.raises(ValueError, match=r"--out is needed: .*model\.safetensors is a file"):
        judge(file, None)


def test_a_run_starts_from_it_as_from_the_workdir(run, file):
    """`model.start` fills a model alike, and knows the images that were trained on; a packed model
    is packed again to the same bytes.
    """
    found = []
    for start in (run, file):
        task = tasks.make_task(streets(model__start=str(start)))
        model = nnx.eval_shape(lambda task=task: task.model(nnx.Rngs(0)))
        tasks.load_start(task, model)
        images = evaluate.started_from(task.config).images
        found.append((weights.tensors(model), images.names, images.contents))
    same(*found)
    again = file.with_name("again.safetensors")
    pack(file, again)
    assert again.read_bytes() == file.read_bytes()
    again.unlink()


def test_it_says_where_it_comes_from_and_nothing_of_the_machine(run, file, folder):
    """The card has data, scores, start and versions; no path of the machine is in the file; tensors
    have the public names.
    """
    about = packed.read(file)
    judged = json.loads((run / "evaluation_2/results.json").read_text())
    digest = hashlib.sha256((folder / "encoder.safetensors").read_bytes()).hexdigest()
    assert about.card["started_from"]["weights"] == {
        "file": "encoder.safetensors",
        "model": "tiny8",
        "sha256": digest,
        "published_file": "tiny.pth",
        "published_sha256": "0" * 64,
        "licence": "Apache-2.0",
    }
    assert about.card["trained_on"] == {"domains": ["clear"], "images": 4}
    (scores,) = about.card["scores"]
    assert {name: entry["mIoU"] for name, entry in scores["domains"].items()} == {
        name: entry["mIoU"] for name, entry in judged["domains"].items()
    }
    assert about.card["versions"]["jax"] == jax.__version__
    assert about.card["methods"] == ["average"]
    raw = file.read_bytes()
    assert str(folder).encode() not in raw
    assert about.config.model.weights == "encoder.safetensors"
    names = weights.shapes(nnx.merge(jaxdg.load(file).graph, *jaxdg.load(file).state)).keys()
    assert safetensors.numpy.load(raw).keys() == names
    assert "backbone.blocks.2.attn.qkv.kernel" in names


def test_half_precision_rounds_parameters_and_says_so(file, tmp_path):
    """Parameters are the nearest bfloat16 numbers, statistics stay, the card tells the error, and
    the model computes as configured; what float16 cannot hold is refused.
    """
    half = tmp_path / "half.safetensors"
    about = pack(file, half, "bfloat16")
    whole, stored = weights.read(file), weights.read(half)
    statistics = {name for name in whole if name.endswith((".mean", ".var"))}
    assert statistics
    errors = []
    for name, exact in whole.items():
        if name in statistics:
            np.testing.assert_array_equal(stored[name], exact)
        else:
            np.testing.assert_array_equal(stored[name], exact.astype(ml_dtypes.bfloat16))
            lost = exact.astype(np.float64) - stored[name].astype(np.float64)
            errors.append(np.linalg.norm(lost) / max(np.linalg.norm(exact), 1e-30))
    assert about.card["rounded"]["dtype"] == "bfloat16"
    assert about.card["rounded"]["largest_relative_error"] == pytest.approx(max(errors), rel=1e-6)
    assert 2**-11 < max(errors) <= 2**-8
    assert half.stat().st_size < 0.7 * file.stat().st_size
    loaded = jaxdg.load(half)
    assert {leaf.dtype for leaf in jax.tree.leaves(loaded.state)} == {jnp.dtype("float32")}
    same(weights.tensors(nnx.merge(loaded.graph, *loaded.state)), packed.tensors(half))
    with pytest.raises(ValueError, match="too large for float16; give --dtype bfloat16"):
        packed.rounded({"a": np.array([1e5], np.float32)}, ["a"], "float16")


@pytest.mark.parametrize(
    "changes",
    [
        {
            "task": "detection",
            "model__decoder": "fcos",
            "model__fcos__channels": 8,
            "model__fcos__groups": 2,
            "model__fcos__convs": 1,
            "model__fcos__levels": (1, 2),
        },
        {"rein__on": True, "rein__link": False},
    ],
    ids=["detection", "rein"],
)
def test_detectors_and_methods_that_last(changes, tmp_path):
    """A detector, and a model with Rein's tokens, have the bits of their workdirs; nobody noted
    what these were trained on.
    """
    workdir = saved(streets(**changes), tmp_path / "run")
    about = pack(workdir, tmp_path / "model.safetensors")
    expected, model = jaxdg.load(workdir), jaxdg.load(tmp_path / "model.safetensors")
    same(model.state, expected.state)
    assert model.labels == expected.labels
    assert about.trained_on is None
    assert tasks.opened(tmp_path / "model.safetensors").trained_on() is None
    if "rein__on" in changes:
        assert any(".rein." in name for name in weights.read(tmp_path / "model.safetensors"))


def test_a_start_that_is_gone_leaves_names(tmp_path):
    """A run that noted nothing but started from another is known by the names of both sources; of a
    start that is gone the card says so.
    """
    before, run = tmp_path / "before", tmp_path / "run"
    for folder, c in (
        (before, streets(data__source="night")),
        (run, streets(model__start=str(before))),
    ):
        folder.mkdir()
        config_lib.save(c, folder)
    assert noted(tasks.opened(before)) is None
    assert noted(tasks.opened(run)) == TrainedOn(("clear", "night"))
    assert model_card.origin(tasks.opened(run)) == {"model": "before", "started_from": {}}
    shutil.rmtree(before)
    assert noted(tasks.opened(run)) == TrainedOn(("clear",))
    gone = "was not there when the model was packed"
    assert model_card.origin(tasks.opened(run)) == {"model": "before", "note": gone}


def test_what_is_no_packed_model_is_refused_in_one_line(file, folder, tmp_path):
    """Another program's file, an encoder's weights, a newer form, a cut or changed file, none at
    all; and a packed model where an encoder's weights belong.
    """
    content = file.read_bytes()
    start = 8 + int.from_bytes(content[:8], "little")
    newer = content.replace(b'"jaxdg_model": "1"', b'"jaxdg_model": "2"')
    assert newer != content
    foreign = safetensors.numpy.save({"a": np.zeros(2, np.float32)})
    flipped = bytearray(content)
    flipped[start + 5] ^= 1
    cases = {
        "foreign": (foreign, "is a safetensors file of another program and no trained model"),
        "encoder": (
            (folder / "encoder.safetensors").read_bytes(),
            "holds the weights of tiny8, which are no trained model; give it as model.weights",
        ),
        "newer": (newer, r"was packed by jaxdg .* in form 2, .* reads form 1; install the newest"),
        "cut": (content[:-100], "is damaged .* copy or download it again"),
        "flipped": (bytes(flipped), "do not add up to their sha256.* copy or download it again"),
        "broken": (content.replace(b'"config"', b'"konfig"'), "its metadata are incomplete"),
    }
    for name, (written, message) in cases.items():
        path = tmp_path / f"{name}.safetensors"
        path.write_bytes(written)
        with pytest.raises(ValueError, match=message) as error:
            jaxdg.load(path)
        assert str(error.value).startswith(str(path))
        assert "\n" not in str(error.value)
    with pytest.raises(FileNotFoundError, match=r"no trained model at .*; give a workdir"):
        jaxdg.load(tmp_path / "nothing.safetensors")
    (tmp_path / "model.pth").write_bytes(b"torch")
    with pytest.raises(
        ValueError, match=r"model\.pth is no trained model of jaxdg; give a workdir"
    ):
        jaxdg.load(tmp_path / "model.pth")
    encoder = create("tiny8", image_size=(32, 64))
    with pytest.raises(ValueError, match=r"is a whole trained model.*; give it as model\.start"):
        weights.load(encoder, file)


def test_packing_replaces_nothing_but_a_packed_model(run, file, folder, tmp_path):
    """Another file stays; a name that is none of a safetensors file is refused."""
    with pytest.raises(ValueError, match="is there and is no packed model"):
        pack(run, folder / "encoder.safetensors")
    with pytest.raises(ValueError, match=r"ends in \.safetensors"):
        pack(run, tmp_path / "model.pt")
