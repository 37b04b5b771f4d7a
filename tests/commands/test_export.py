"""Exported models against `predict`, run by an interpreter that cannot import this package."""

import json
import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdg import config as config_lib
from jaxdg.commands import command_line as cli
from jaxdg.commands import export
from jaxdg.config import Config, MeshConfig
from jaxdg.config import workdir as workdir_lib
from jaxdg.tasks.loading import Model
from jaxdg.tasks.run_state import Blueprint, abstract_state, make_task
from jaxdg.training import sharding
from jaxdg.training.checkpoint import Checkpoints
from tests import forked

# A loop that takes the queries of 4 heads, 33 tokens of an image and a width of 32 one by one.
HEAD_LOOP = re.compile(r"stablehlo\.while.*tensor<4x1x33x32xbf16>")
ALONE = """
import sys
for name in ("jaxdg", "flax", "orbax"):
    sys.modules[name] = None  # importing one of them fails
import jax, numpy as np
import jax.export
file, images, out = sys.argv[1:]
model = jax.export.deserialize(open(file, "rb").read())
outputs = {}
for i, image in enumerate(np.load(images)):
    output = model.call(image)
    parts = output if isinstance(output, dict) else {"": output}
    outputs |= {f"{i}{part}": array for part, array in parts.items()}
np.savez(out, **outputs)
"""


def config(decoder, dtype="float32"):
    """Of a tiny model."""
    c = Config(
        steps=1, task="detection" if decoder == "fcos" else "segmentation", mesh=MeshConfig(1, 1)
    )
    c.data.crop = (32, 64)
    c.evaluation.stride = (24, 48)
    c.model.decoder = decoder
    c.model.dtype = dtype
    if decoder == "linear":
        c.model.pyramid = "none"
        c.model.taps = (3,)
    head = c.model.mask2former
    head.hidden = 32
    head.heads = 2
    head.queries = 20
    head.pixel_layers = 1
    head.layers = 1
    head.points = 64
    c.model.fcos.channels = 32
    c.model.fcos.score_threshold = 0.0
    return config_lib.validated(c)


def drawn(like):
    """Random parameters, much sooner there than the model's own initialisation is compiled."""
    rng = np.random.default_rng(2)

    def draw(path, s):
        name = jax.tree_util.keystr(path)
        if "kernel" in name or "embed" in name:
            return jnp.asarray(
                rng.normal(0, s.shape[-2] ** -0.5 if len(s.shape) > 1 else 1.0, s.shape), s.dtype
            )
        return jnp.full(s.shape, float("scale" in name), s.dtype)

    return jax.tree_util.tree_map_with_path(draw, like)


def model_with(decoder, dtype="float32", unroll=False):
    """A model as `jaxdg.load` gives it."""
    c = config(decoder, dtype)
    c.model.unroll = c.model.mask2former.unroll = unroll
    task = make_task(c)
    plan = Blueprint.of(task, "none")
    return Model(task, plan.graph, drawn(plan.abstract), 1)


def alone(tmp_path, file, images):
    """What the exported program makes of images where only JAX and NumPy can be imported."""
    np.save(tmp_path / "images.npy", images)
    arguments = [sys.executable, "-c", ALONE, file, tmp_path / "images.npy", tmp_path / "found.npz"]
    done = subprocess.run(list(map(str, arguments)), capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    return dict(np.load(tmp_path / "found.npz"))


def noise(*shape):
    return np.random.default_rng(0).integers(0, 256, shape).astype(np.uint8)


def test_an_exported_segmenter_is_predict_without_the_source(tmp_path):
    """The file gives the very label maps of `predict`, of an image of several windows; what is
    beside it tells what they mean.
    """
    model = model_with("mask2former")
    images = noise(2, 50, 90, 3)
    exported = export.export(model, (50, 90))
    beside = export.write(model, exported, tmp_path / "model.stablehlo")
    found = alone(tmp_path, tmp_path / "model.stablehlo", images)
    for i, image in enumerate(images):
        expected = model.predict(image)
        assert len(np.unique(expected)) > 1
        np.testing.assert_array_equal(found[str(i)], expected)
    said = json.loads(beside.read_text())
    assert said["classes"][:2] == ["road", "sidewalk"]
    assert said["colors"][0] == [128, 64, 128]
    assert said["input"]["shape"] == [50, 90, 3]
    assert said["output"] == {"shape": [50, 90], "dtype": "uint8"}
    assert (said["protocol"], said["window"], said["platforms"]) == (
        "native",
        [32, 64],
        ["cpu", "cuda"],
    )


def test_an_exported_detector_is_predict_without_the_source(tmp_path):
    """Boxes, scores and classes are those of `predict`, of an image that does not fill the
    detector's size.
    """
    model = model_with("fcos")
    image = noise(32, 40, 3)
    beside = export.write(model, export.export(model, (32, 40)), tmp_path / "model.stablehlo")
    found = alone(tmp_path, tmp_path / "model.stablehlo", image[None])
    expected = model.predict(image)
    n = len(expected.scores)
    assert n > 10
    assert not np.any(found["0scores"][n:])
    # The weights are constants of the exported program, with which the compiler computes in another
    # order.
    np.testing.assert_allclose(found["0scores"][:n], expected.scores, atol=1e-6)
    np.testing.assert_allclose(found["0boxes"][:n], expected.boxes, atol=1e-3)
    np.testing.assert_array_equal(found["0classes"][:n], expected.classes)
    assert set(json.loads(beside.read_text())["output"]) == {"boxes", "scores", "classes"}
    with pytest.raises(ValueError, match="size is 64x64; allowed: what fills 32x64"):
        export.export(model, (64, 64))


def test_a_batch_of_any_length():
    """One program takes one image and three, and sees in each what `predict` sees."""
    model = model_with("linear")
    images = noise(3, 32, 64, 3)
    exported = export.export(model, (32, 64), ["cpu"], batch=True)
    for part in (images[:1], images):
        np.testing.assert_array_equal(exported.call(part), [model.predict(image) for image in part])


def test_each_platform_has_its_own_attention(tmp_path):
    """In half precision an artefact made here holds cuDNN's kernel for CUDA and the loop over heads
    for CPUs, each alone or both in one file; that file runs here.
    """
    model = model_with("linear", "bfloat16")
    images = noise(2, 32, 64, 3)
    for platforms in (["cpu"], ["cuda"], ["cpu", "cuda"]):
        exported = export.export(model, (32, 64), platforms, batch=len(platforms) == 2)
        text = exported.mlir_module()
        assert ("fmhaSoftmax" in text) == ("cuda" in platforms)
        assert bool(HEAD_LOOP.search(text)) == ("cpu" in platforms)
    export.write(model, exported, tmp_path / "model.stablehlo")
    found = alone(tmp_path, tmp_path / "model.stablehlo", images[None])
    np.testing.assert_array_equal(found["0"], [model.predict(image) for image in images])


def test_the_command(tmp_path):
    """`python -m jaxdg.export` writes both files of a workdir's checkpoint and says so."""
    c = config("linear")
    run = tmp_path / "run"
    workdir_lib.claim(c, run)
    mesh = sharding.make_mesh(c.mesh, jax.devices()[:1])
    checkpoints = Checkpoints(run)
    checkpoints.save(drawn(abstract_state(Blueprint.of(make_task(c), "none"), c, mesh)[0]))
    checkpoints.close()
    out = tmp_path / "m.stablehlo"
    done = forked.run(
        "jaxdg.export", "--checkpoint", str(run), "--out", str(out), "--platform", "cpu"
    )
    assert done.returncode == 0, done.stderr
    assert "images uint8 [32, 64, 3], for cpu" in done.stdout
    assert (tmp_path / "m.json").is_file()
    with pytest.raises(ValueError, match="--size is '32'; allowed: height x width"):
        cli.parse_size("size", "32")


def test_an_export_replaces_nothing_but_an_export(tmp_path):
    """Neither a run's config.json beside it, nor a file of its name, nor a folder; an earlier
    export is replaced.
    """
    described = json.dumps(dict.fromkeys(("task", "input", "output", "platforms", "versions")))
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "photo.png").write_bytes(b"mine")
    (tmp_path / "folder.json").mkdir()
    for name, replaced in (
        ("config.stablehlo", "config.json"),
        ("photo.png", "photo.png"),
        ("folder", "folder.json"),
    ):
        with pytest.raises(
            ValueError,
            match=(
                rf"would replace /.*/{replaced}, which is there and is none of an export; give"
                r" another name"
            ),
        ):
            export.check_out(tmp_path / name)
    with pytest.raises(ValueError, match="its description goes to a file of that name"):
        export.check_out(tmp_path / "model.json")
    (tmp_path / "model.json").write_text(described)
    (tmp_path / "model.stablehlo").write_bytes(b"earlier")
    for name in ("model.stablehlo", "new.stablehlo"):
        assert export.check_out(tmp_path / name) == (tmp_path / name).with_suffix(".json")
