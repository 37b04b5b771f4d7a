"""Whole runs of tqdm, with its visual regulariser."""

import dataclasses
import json
from pathlib import Path
import shutil
from typing import Any

from flax import nnx
import jax
import numpy as np
import pytest

import jaxdg
from jaxdg import methods, train, weights
from jaxdg.backbones import ClipVitConfig, create, zoo
from jaxdg.commands import command_line as cli
from jaxdg.config import Config, MeshConfig, stored, validated
from jaxdg.data.labels import CITYSCAPES
from jaxdg.tasks import run_state as tasks
from jaxdg.text.clip_text import TEXT_TOWERS, ClipText, ClipTextConfig, ProjectionConfig
from jaxdg.training import sharding
from jaxdg.training.metrics import read_metrics
from jaxdg.training.step import make_step

TOWER = ClipTextConfig(16, 2, 12, "quick_gelu", ProjectionConfig(16, 12), depth=1)


IMAGE = ClipVitConfig(width=16, depth=4, heads=2, patch_size=8, taps=(0, 1, 2, 3))


@pytest.fixture(autouse=True)
def small(monkeypatch):
    """Both towers of a small CLIP in the zoo."""
    monkeypatch.setitem(zoo.ZOO, "tiny8", zoo.Entry(IMAGE))
    monkeypatch.setitem(TEXT_TOWERS, "tiny8_text", TOWER)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Converted files of both towers with random weights: image, text."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(zoo.ZOO, "tiny8", zoo.Entry(IMAGE))
        folder = tmp_path_factory.mktemp("towers")
        image = folder / "image.safetensors"
        encoder = create("tiny8", image_size=(32, 64), rngs=nnx.Rngs(1))
        about = {"model": "tiny8", "activation": "quick_gelu"}
        weights.save(weights.tensors(encoder), image, about)
        text = folder / "text.safetensors"
        tower = ClipText(TOWER, rngs=nnx.Rngs(2))
        weights.save(weights.tensors(tower), text, {"model": "tiny8_text"})
    return image, text


@pytest.fixture(scope="module")
def config(files):
    """A run on streets with all terms of tqdm; tests change copies of it."""
    c = Config(steps=2, batch_size=8, log_every=1, eval_every=0, checkpoint_every=1)
    c.data.crop = c.data.streets.size = c.evaluation.stride = (32, 64)
    c.data.streets.images = 8
    c.data.streets.val_images = 2
    c.model.encoder = "tiny8"
    c.model.weights, c.model.text_weights = map(str, files)
    c.model.decoder = "tqdm"
    c.model.pyramid = "interpolate"
    sizes: dict[str, Any] = dict(
        contexts=2,
        context_layers=1,
        context_width=8,
        context_heads=2,
        hidden=32,
        heads=2,
        pixel_layers=1,
        pixel_ffn=16,
        layers=1,
        ffn=16,
        points=32,
    )
    c.model.tqdm = dataclasses.replace(c.model.tqdm, **sizes)
    c.visual_anchor.on = True
    c.optimizer.learning_rate = 1e-2
    c.evaluation.domains = ("clear",)
    return c


def start(c: Config, workdir: Path) -> list[dict]:
    """Trains in this process on one device; the rows without what depends on the clock."""
    mesh = sharding.make_mesh(MeshConfig(1, 1), jax.devices()[:1])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sharding, "make_mesh", lambda *_: mesh)
        train.train(validated(c), workdir, cli.console(), cli.Interrupt())
    clock = ("seconds_per_step", "images_per_second")
    return [{k: v for k, v in row.items() if k not in clock} for row in read_metrics(workdir)]


@pytest.fixture(scope="module")
def whole(config, tmp_path_factory):
    """A run on one device: its workdir and its rows."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(zoo.ZOO, "tiny8", zoo.Entry(IMAGE))
        patch.setitem(TEXT_TOWERS, "tiny8_text", TOWER)
        workdir = tmp_path_factory.mktemp("runs") / "whole"
        return workdir, start(config, workdir)


def test_the_text_tower_stays_and_all_else_moves(config, whole):
    """At the first step the encoder is the one before training, so the visual term is 0."""
    workdir, rows = whole
    terms = {"class", "mask", "dice", "textual", "vision_language", "visual"}
    np.testing.assert_allclose(sum(rows[0][term] for term in terms), rows[0]["loss"], rtol=1e-5)
    assert rows[0]["visual"] < 1e-10
    assert rows[1]["visual"] > 1e-6
    stored = tasks.stored_tensors(workdir)
    text = weights.read(config.model.text_weights)
    for name in ("blocks.0.attn.qkv.kernel", "ln_final.scale", "text_projection"):
        np.testing.assert_array_equal(stored[f"head.text.{name}"], text[name], err_msg=name)
    # "traffic light" has four tokens, and two contexts are learned.
    np.testing.assert_array_equal(
        stored["head.text.positional_embedding"], text["positional_embedding"][:6]
    )
    before = {f"backbone.{name}": x for name, x in weights.read(config.model.weights).items()}
    before |= {f"head.{n}": x for n, x in text.items() if n.startswith("image_projection.")}
    for name, tensor in before.items():
        assert np.any(stored[name] != tensor), name
    assert "head.query_feat" not in stored


def test_the_projection_moves_at_the_encoders_rate(config, whole):
    """The first of AdamW's steps is the rate itself, whatever the gradient: that of the image
    tower's projection is a tenth of the head's.
    """
    workdir, _ = whole
    stored = tasks.stored_tensors(workdir / "checkpoints" / "1")
    text = weights.read(config.model.text_weights)
    moved = stored["head.image_projection.proj.kernel"] - text["image_projection.proj.kernel"]
    np.testing.assert_allclose(np.median(np.abs(moved)), 1e-3, rtol=0.05)


def test_a_run_goes_on_and_predicts_without_the_files(config, whole, tmp_path, monkeypatch):
    """A step after a checkpoint is that of the run that never stopped, to the last bit."""
    workdir, rows = whole
    stored = tasks.stored_tensors(workdir)
    shutil.copytree(workdir, tmp_path / "part")
    shutil.rmtree(tmp_path / "part" / "checkpoints" / "2")
    assert start(config, tmp_path / "part") == rows
    for name, tensor in tasks.stored_tensors(tmp_path / "part").items():
        np.testing.assert_array_equal(tensor, stored[name], err_msg=name)

    saved = json.loads((tmp_path / "part" / "config.json").read_text())
    saved["model"] |= dict.fromkeys(("weights", "text_weights"), "absent.safetensors")
    (tmp_path / "part" / "config.json").write_text(json.dumps(saved))
    model = jaxdg.load(tmp_path / "part")
    label: Any = model.predict(np.zeros((40, 70, 3), np.uint8))
    assert label.shape == (40, 70)
    assert label.max() < len(CITYSCAPES.names)


def steps(c: Config, mesh: Any, batch: dict[str, np.ndarray]) -> list[dict[str, Any]]:
    """The loss terms of two steps on one batch."""
    task = tasks.make_task(c, methods.active(c))
    blueprint = tasks.Blueprint.of(task, "none")
    like, optimizer = tasks.abstract_state(blueprint, c, mesh, task.methods)
    state = tasks.initial_state(task, blueprint, like, optimizer)
    places = jax.tree.map(lambda leaf: leaf.sharding, like)
    prepare = task.preparation(mesh)
    step = make_step(
        blueprint.graph, optimizer, task.loss_denominator, task.losses, jax.random.key(0), places
    )
    found = []
    for i in range(2):
        state, metrics = step(state, prepare(sharding.to_devices(batch, mesh), i))
        found.append(jax.device_get(metrics))
    return found


def test_eight_devices_train_as_one(config):
    """All loss terms of two steps, with parameters divided over the devices, those of what prepares
    a batch too.
    """
    c = validated(config)
    rng = np.random.default_rng(0)
    batch = {
        "image": rng.integers(0, 256, (8, 32, 64, 3)).astype(np.uint8),
        "label": rng.integers(0, 19, (8, 4, 8)).astype(np.uint8).repeat(8, 1).repeat(8, 2),
    }
    batch["label"][:3, :9] = 255
    one = sharding.make_mesh(MeshConfig(1, 1), jax.devices()[:1])
    eight = sharding.make_mesh(MeshConfig(2, 4), jax.devices())
    pairs = zip(steps(c, eight, batch), steps(c, one, batch), strict=True)
    for got, want in pairs:
        assert got.keys() == want.keys()
        for term in ("class", "mask", "dice", "textual", "vision_language", "loss"):
            np.testing.assert_allclose(got[term], want[term], rtol=1e-4, err_msg=term)
        np.testing.assert_allclose(got["visual"], want["visual"], rtol=1e-3, atol=1e-8)


def test_settings_that_do_not_fit_are_told(config):
    """Another decoder, missing files, another encoder, taps without the last block, and context
    that leaves no room for names or that its heads cannot divide.
    """

    def model(c: Config) -> Any:
        c = validated(c)
        return nnx.eval_shape(lambda: tasks.make_task(c, methods.active(c)).model(nnx.Rngs(0)))

    def refused(match: str, **fields: Any) -> None:
        c = dataclasses.replace(config)
        c.model = dataclasses.replace(config.model)
        c.model.tqdm = dataclasses.replace(config.model.tqdm)
        for name, value in fields.items():
            within, _, field = name.rpartition("__")
            setattr(c.model.tqdm if within else c.model, field, value)
        with pytest.raises(ValueError, match=match):
            model(c)

    refused(r"visual_anchor\.on is True with model\.decoder 'linear'", decoder="linear")
    refused(r"text_weights is None; model\.decoder tqdm needs", text_weights=None)
    refused(r"visual_anchor\.on is True; allowed: False without model\.weights", weights=None)
    text = r"model\.decoder tqdm needs an encoder with a text tower"
    refused(text, encoder="scratch_ti8", taps=(0, 1, 2, 3))
    refused(
        r"model\.decoder tqdm reads a class token, and .* clip_rn50",
        encoder="clip_rn50",
        taps=(0, 1, 2, 3),
    )
    last = r"class token after the last block, 11, and model\.taps"
    refused(last, encoder="clip_b16", taps=(0, 1, 2, 3))
    refused(r"contexts is 74; allowed: at most 73, as a class name", tqdm__contexts=74)
    refused(r"context_width is 8; allowed: a multiple of .* 3", tqdm__context_heads=3)


def test_a_run_does_not_start_from_texts_of_other_classes(config, tmp_path):
    """They would stay in the model, and its queries would mean the other run's classes."""
    stored.save(config, tmp_path)
    other = dataclasses.replace(config, model=dataclasses.replace(config.model))
    other.data = dataclasses.replace(config.data, source="camvid")
    other.model.start = str(tmp_path)
    with pytest.raises(ValueError, match="holds texts of the classes road, "):
        tasks.load_start(tasks.make_task(other), None)
