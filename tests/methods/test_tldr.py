"""TLDR: its terms against loops over channels and images, and runs of both tasks with all
augmentations of the comparison.
"""

import copy
from pathlib import Path
from typing import Any

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxdg
from jaxdg import config, methods, weights
from jaxdg.backbones import VitConfig, create, join_taps, zoo
from jaxdg.commands.abstract_step import abstract_step
from jaxdg.config import Config, MeshConfig, validated
from jaxdg.detection.detector import Detector, DetectorConfig
from jaxdg.methods import tldr
from jaxdg.methods.tldr import TldrOptions
from jaxdg.tasks import run_state as tasks
from jaxdg.tasks.detection import head_config
from jaxdg.training import sharding
from tests.runs import start


def slow_gram(features: np.ndarray) -> np.ndarray:
    """[h, w, c] to [c, c], by sums over all tokens."""
    tokens = features.reshape(-1, features.shape[-1]).astype(np.float64)
    tokens = [(t - t.mean()) / np.sqrt(t.var() + 1e-6) for t in tokens]
    c = len(tokens[0])
    return np.array(
        [[sum(t[i] * t[j] for t in tokens) / len(tokens) for j in range(c)] for i in range(c)]
    )


def slow_distance(one: np.ndarray, other: np.ndarray, mask: np.ndarray) -> float:
    c = len(one)
    return (
        sum((one[i, j] - other[i, j]) ** 2 for i in range(c) for j in range(c) if mask[i, j]) ** 0.5
        / c
    )


def test_terms_are_sums_over_images_layers_and_channels():
    """Both terms, of four layers of different sizes of which two are weighted for generalisation,
    with part of all entries masked.
    """
    rng = np.random.default_rng(0)
    options = TldrOptions(True, (0.5, 0.4, 0.3, 0.2), (0.7, 0.6), 0.1)
    shapes = [(3, 2, 5), (3, 2, 5), (2, 2, 6), (1, 2, 4)]
    features = [rng.normal(1, 2, (6, *shape)).astype(np.float32) for shape in shapes]
    before = [rng.normal(0, 1, (2, shape[-1], shape[-1])).astype(np.float32) for shape in shapes]
    batch = {
        "share": np.array([0.3, 0.1], np.float32),
        **{f"gram{i}": gram for i, gram in enumerate(before)},
    }
    regularization = generalization = masked = 0.0
    for i, x in enumerate(features):
        for image in range(2):
            original, stylized, style = (slow_gram(x[3 * image + view]) for view in range(3))
            share = float(batch["share"][image])
            everything = np.ones(original.shape, bool)
            regularization += (
                share
                * options.regularization[i]
                * slow_distance(original, before[i][image], everything)
            )
            if i < 2:
                mask = stylized - original > 0.1
                masked += mask.mean() / 4
                generalization += (
                    share * options.generalization[i] * slow_distance(style, stylized, mask)
                )
    found = jax.jit(lambda features, batch: tldr.terms(features, batch, options))(features, batch)
    assert 0.1 < masked < 0.9
    assert float(found["texture_regularization"]) == pytest.approx(regularization, rel=1e-4)
    assert float(found["texture_generalization"]) == pytest.approx(generalization, rel=1e-4)


def test_terms_of_equal_textures_have_no_gradient():
    """An untrained encoder is the one before training: the norm's gradient is 0 there and not
    undefined; elsewhere it is the norm's.
    """
    one = np.random.default_rng(0).normal(size=(2, 3, 3)).astype(np.float32)
    slope = jax.jit(jax.grad(lambda x: tldr.distance(x, jnp.asarray(one)).sum()))
    np.testing.assert_array_equal(slope(one), np.zeros((2, 3, 3)))
    moved = one.copy()
    moved[0, 1, 2] += 2
    expected = np.zeros((2, 3, 3))
    expected[0, 1, 2] = 1 / 3
    np.testing.assert_allclose(slope(moved), expected, atol=1e-6)


def test_layers_are_quarters_and_stages():
    """The last block of each quarter, of any depth; observing adds taps before the last that is
    read and leaves what is read in place.
    """
    assert [tldr.quarters(depth) for depth in (4, 12, 24, 2)] == [
        (0, 1, 2, 3),
        (2, 5, 8, 11),
        (5, 11, 17, 23),
        (0, 1),
    ]
    taps = (5, 9, 11, 14, 17, 19, 23)
    assert join_taps((9, 14, 19, 23), (5, 11, 17, 23)) == (taps, (1, 3, 5, 6))
    assert join_taps((7,), (2, 5, 8, 11)) == ((2, 5, 7), (2,))
    assert join_taps((2, 5), ()) == ((2, 5), (0, 1))


@pytest.fixture(scope="module", autouse=True)
def small():
    """A small encoder in the zoo; what one run compiles serves the next."""
    zoo.ZOO["tiny8"] = zoo.Entry(VitConfig(width=16, depth=2, heads=2, patch_size=8, taps=(0, 1)))
    yield
    del zoo.ZOO["tiny8"]


def tiny(task: str, folder: Path) -> Config:
    """A run on streets from weights that it stores in the folder, with everything on."""
    c = Config(steps=4, batch_size=2, log_every=1, eval_every=0, checkpoint_every=2, task=task)
    c.data.crop = c.data.streets.size = (36, 64)  # padded by a detector
    c.data.streets.images = 8
    c.data.streets.val_images = 2
    c.data.randaugment = (2, 9.0)
    c.data.pixmix = (4, 4.0)
    c.tldr.on = True
    c.model.encoder = "tiny8"
    c.model.weights = str(folder / "before.safetensors")
    c.model.pyramid = "none"
    c.optimizer.learning_rate = 1e-2
    c.optimizer.encoder_factor = 1.0
    c.optimizer.clip = 1.0
    c.evaluation.stride = (36, 64)
    if task == "detection":
        c.model.decoder = "fcos"
        c.model.fcos.channels = 8
        c.model.fcos.groups = 2
        c.model.fcos.convs = 1
        c.model.fcos.levels = (2,)
    else:
        c.data.crop = c.evaluation.stride = (32, 64)
    c.evaluation.domains = ("clear",)
    if not Path(c.model.weights).exists():
        encoder = create("tiny8", image_size=(64, 64), rngs=nnx.Rngs(1))
        weights.save(weights.tensors(encoder), c.model.weights, {"model": "tiny8"})
    return validated(c)


@pytest.mark.parametrize("task", ["segmentation", "detection"])
def test_runs_with_everything_on(task, tmp_path, monkeypatch, capsys):
    """With RandAugment, PixMix and TLDR, terms start at 0 where nothing has changed yet and add up
    to the loss; 2 + 2 steps are 4 steps.

    The model is predicted with after the weights before training are gone, and its checkpoint holds
    nothing of them.
    """
    one = sharding.make_mesh(MeshConfig(1, 1), jax.devices()[:1])
    monkeypatch.setattr(sharding, "make_mesh", lambda *_: one)
    c = tiny(task, tmp_path)
    rows = start(c, tmp_path / "whole")
    assert rows[0]["texture_regularization"] < 1e-6 < rows[1]["texture_regularization"]
    assert rows[0]["texture_generalization"] > 1e-6
    others = ("step", "loss", "learning_rate", "gradient_norm")
    for row in rows:
        assert row["loss"] == pytest.approx(
            sum(value for key, value in row.items() if key not in others), rel=1e-5
        )
    stored = tasks.stored_tensors(tmp_path / "whole")
    if task == "segmentation":  # how a run resumes does not depend on the task
        start(c, tmp_path / "parts", steps=2)
        assert start(c, tmp_path / "parts") == rows
        assert "resuming from step 2" in capsys.readouterr().out
        for name, tensor in tasks.stored_tensors(tmp_path / "parts").items():
            np.testing.assert_array_equal(tensor, stored[name])
    Path(str(c.model.weights)).unlink()
    jaxdg.load(tmp_path / "whole").predict(np.zeros((36, 64, 3), np.uint8))
    c = copy.deepcopy(c)
    c.tldr.on = False
    assert (
        stored.keys()
        == weights.shapes(nnx.eval_shape(lambda: tasks.make_task(c).model(nnx.Rngs(0)))).keys()
    )


@pytest.mark.parametrize("task", ["segmentation", "detection"])
def test_the_loss_is_the_mean_of_images_and_stylised_ones(task, tmp_path):
    """Without the terms it is half the loss of a run without TLDR on the images and half that on
    the stylised ones.

    In two parts, or on eight devices, all losses are those of the whole batch on one.
    """
    c = tiny(task, tmp_path)
    devices = sharding.make_mesh(MeshConfig(1, 1), jax.devices()[:1])
    run = tasks.make_task(c, methods.active(c))
    plan = tasks.Blueprint.of(run, "none")
    like, optimizer = tasks.abstract_state(plan, c, devices, run.methods)
    state = tasks.initial_state(run, plan, like, optimizer)
    state.trained = jax.tree.map(
        lambda x: jax.device_put(1.1 * np.asarray(x) + np.float32(0.01), x.sharding), state.trained
    )  # textures change
    rng = np.random.default_rng(0)
    h, w = c.data.crop
    fields = {
        name: rng.integers(0, 256, (8, h, w, 3)).astype(np.uint8) for name in ("image", "style")
    }
    if task == "segmentation":
        fields["label"] = np.where(
            rng.random((8, h, w)) < np.linspace(0.1, 1, 8)[:, None, None],
            fields["image"][..., 0] % 19,
            255,
        ).astype(np.uint8)
    else:
        corners = rng.uniform(0, 20, (8, 3, 2))
        fields |= {
            "boxes": (
                np.concatenate([corners, corners + rng.uniform(4, 16, (8, 3, 2))], -1).astype(
                    np.float32
                )
            ),
            "classes": rng.integers(0, 3, (8, 3)).astype(np.int32),
            "valid": rng.random((8, 3)) < 0.7,
            "crowd": np.zeros((8, 3), bool),
            "difficult": np.zeros((8, 3), bool),
        }
    prepared = jax.device_get(run.preparation(devices)(sharding.to_devices(fields, devices), 2))
    np.testing.assert_allclose(prepared["share"], np.full(8, (1 - 2 / 4) / 8), rtol=1e-6)
    planned = abstract_step(c, devices).batch
    assert prepared.keys() <= planned.keys()
    for name in {"image", "style"} | prepared.keys() - fields.keys():
        x, y = prepared[name], planned[name]
        assert (x.shape[1:], x.dtype) == (y.shape[1:], y.dtype), name
    key = jax.random.key(3)

    def losses(task: Any, plan: tasks.Blueprint) -> Any:
        """Loss terms of a part of a batch: (state, part, whole batch)."""

        def compute(state, part, whole):
            model = nnx.merge(plan.graph, *state)
            return task.losses(model, part, task.loss_denominator(model, whole), key)

        return jax.jit(compute)

    measure = losses(run, plan)
    model_state = (state.trained, state.frozen, state.statistics)
    terms = jax.device_get(measure(model_state, prepared, prepared))

    plain_config = copy.deepcopy(c)
    plain_config.tldr.on = False
    plain: Any = tasks.make_task(plain_config)
    plain.distort = lambda images, key: images  # they have been distorted
    other = tasks.Blueprint.of(plain, "none")
    model: Any = nnx.eval_shape(lambda: plain.model(nnx.Rngs(0)))
    weights.fill(model, weights.tensors(nnx.merge(plan.graph, *model_state)), "the run")
    alone = losses(plain, other)
    split = other.split(model)
    halves = [
        alone(split, batch, batch)
        for batch in ({**prepared, "image": prepared[view]} for view in ("image", "stylized"))
    ]
    for name in halves[0]:
        assert float(terms[name]) == pytest.approx(
            sum(float(half[name]) for half in halves) / 2, rel=1e-4
        ), name
    assert set(terms) - set(halves[0]) == {"texture_regularization", "texture_generalization"}

    if task == "detection":
        parts = [
            measure(model_state, {name: x[i::2] for name, x in prepared.items()}, prepared)
            for i in range(2)
        ]
        found = jax.tree.map(lambda a, b: a + b, *jax.device_get(parts))
    else:
        everywhere = sharding.make_mesh(MeshConfig(2, 4))
        spread = run.preparation(everywhere)(sharding.to_devices(fields, everywhere), 2)
        for name in prepared:
            np.testing.assert_allclose(spread[name], prepared[name], rtol=1e-4, atol=1e-3)
        like, _ = tasks.abstract_state(plan, c, everywhere, run.methods)
        places = jax.tree.map(
            lambda leaf: leaf.sharding, (like.trained, like.frozen, like.statistics)
        )
        found = measure(jax.device_put(model_state, places), spread, spread)
    for name in terms:
        assert float(found[name]) == pytest.approx(float(terms[name]), rel=1e-4), name


def test_what_tldr_needs(tmp_path):
    """Without an encoder whose textures are kept, or without training, it is refused."""
    c = tiny("segmentation", tmp_path)
    c.model.decoder = "clip_text"
    c.model.text_weights = "text.safetensors"
    c.steps = 0
    with pytest.raises(
        ValueError, match=r"tldr\.on is True; allowed: False with model\.decoder clip_text"
    ):
        validated(c)
    c = tiny("segmentation", tmp_path)
    c.model.weights = None
    with pytest.raises(
        ValueError, match=r"tldr\.on is True; allowed: False without model\.weights"
    ):
        validated(c)


def test_observing_leaves_a_two_stage_detector_as_it_is():
    """A detector on a CLIP ResNet's third stage has the same parameters and outputs when its first
    stages are observed as well (shapes).
    """
    found = []
    for observed in ((), (0, 1, 2, 3)):
        head = head_config(config.ModelConfig(decoder="faster_rcnn_c4"))
        c = DetectorConfig(
            num_classes=2, encoder="clip_rn50", image_size=(64, 96), head=head, observed=observed
        )
        model = nnx.eval_shape(lambda c=c: Detector(c, rngs=nnx.Rngs(0)))
        features = nnx.eval_shape(lambda m: m.encode(jnp.zeros((1, 64, 96, 3))), model)
        output = nnx.eval_shape(lambda m: m(jnp.zeros((1, 64, 96, 3))), model)
        found.append((weights.shapes(model), [leaf.shape for leaf in jax.tree.leaves(output)]))
        widths = [x.shape[-1] for x in features]
        assert widths == ([256, 512, 1024, 2048] if observed else [1024, 2048])
        assert [widths[i] for i in model.read] == [1024, 2048]
    assert found[0] == found[1]
