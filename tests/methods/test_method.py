"""Two methods of an experiment's own, each complete here: an adapter in every block that folds in
at the end, and a loss of features.

Nothing else in the package names them, so what works here works for any method in one file.
"""

import dataclasses
from typing import Any

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxdg
from jaxdg import methods, weights
from jaxdg.backbones import VitConfig, create, zoo
from jaxdg.config import Config, MeshConfig, validated
from jaxdg.methods import Method, MethodOptions
from jaxdg.tasks import run_state as tasks
from jaxdg.training import sharding
from tests.runs import start

RANK = 2


@dataclasses.dataclass(unsafe_hash=True)
class AdapterOptions(MethodOptions):
    """A low-rank term beside a layer of every block, the encoder being frozen; it becomes part of
    the layer when training ends.
    """

    def build(self, config: Any) -> "Adapter":
        return Adapter()


class AdaptedLinear(nnx.Module):
    """A linear layer of stacked blocks plus a low-rank term; the layer keeps its names."""

    def __init__(self, layer: nnx.Linear, rngs: nnx.Rngs):
        layers, inside, outside = layer.kernel.shape
        self.kernel = layer.kernel
        self.bias = layer.bias
        self.down = nnx.Param(
            jax.random.normal(rngs.params(), (layers, inside, RANK)) / inside**0.5
        )
        self.up = nnx.Param(jnp.zeros((layers, RANK, outside)))

    def __call__(self, x):
        return x @ (self.kernel[...] + self.down[...] @ self.up[...]) + self.bias[...]


class Adapter(Method):
    changes_model = True

    def extend(self, model, rngs):
        for segment in model.backbone.blocks.segments.values():
            segment.attn.proj = AdaptedLinear(segment.attn.proj, rngs)

    def trains(self, name, trained):
        return name.endswith((".down", ".up")) or (trained and not name.startswith("backbone."))

    def finish(self, model, state):
        for segment in model.backbone.blocks.segments.values():
            layer = segment.attn.proj
            plain = nnx.eval_shape(lambda: nnx.Linear(1, 1, rngs=nnx.Rngs(0)))
            plain.kernel = nnx.Param(layer.kernel[...] + layer.down[...] @ layer.up[...])
            plain.bias = layer.bias
            segment.attn.proj = plain


@dataclasses.dataclass(unsafe_hash=True)
class CalmOptions(MethodOptions):
    """A loss of the size of a block's features."""

    weight: float = 0.1

    def build(self, config: Any) -> "Calm":
        return Calm(self)


class Calm(Method):
    def __init__(self, options):
        self.options = options

    def observed(self, depth):
        return (0,)

    def observe(self, features, places, batch):
        (place,) = places
        return features, {
            "calm": self.options.weight * jnp.sum(jnp.mean(features[place] ** 2, (1, 2, 3))) / 8
        }


@dataclasses.dataclass
class Experiment(Config):
    adapter: AdapterOptions = dataclasses.field(default_factory=AdapterOptions)
    calm: CalmOptions = dataclasses.field(default_factory=CalmOptions)


@pytest.fixture(autouse=True)
def small(monkeypatch):
    """A small encoder in the zoo, one device."""
    monkeypatch.setitem(
        zoo.ZOO,
        "tiny8",
        zoo.Entry(VitConfig(width=16, depth=3, heads=2, patch_size=8, taps=(1, 2))),
    )
    one = sharding.make_mesh(MeshConfig(1, 1), jax.devices()[:1])
    monkeypatch.setattr(sharding, "make_mesh", lambda *_: one)


def experiment(folder) -> Experiment:
    """A run on streets from weights that it stores in the folder, with both methods on."""
    c = Experiment(steps=4, batch_size=8, log_every=1, eval_every=0, checkpoint_every=2)
    c.data.crop = c.data.streets.size = c.evaluation.stride = (32, 64)
    c.data.streets.images = 8
    c.data.streets.val_images = 2
    c.adapter.on = c.calm.on = True
    c.model.encoder = "tiny8"
    c.model.weights = str(folder / "before.safetensors")
    c.model.pyramid = "none"
    c.optimizer.learning_rate = 1e-2
    c.optimizer.clip = 1.0
    c.evaluation.domains = ("clear",)
    encoder = create("tiny8", image_size=(32, 64), taps=(1, 2), rngs=nnx.Rngs(1))
    weights.save(weights.tensors(encoder), c.model.weights, {"model": "tiny8"})
    return validated(c)


def test_an_adapter_trains_folds_and_resumes_and_a_loss_of_features_counts(tmp_path):
    """Only adapters and head learn; what is left has plain names, computes the same, and 2 + 2
    steps are 4 steps.

    The workdir is loaded by code that knows neither method.
    """
    c = experiment(tmp_path)
    rows = start(c, tmp_path / "whole")
    assert all(row["calm"] > 0 for row in rows)
    assert rows[0]["loss"] == pytest.approx(rows[0]["cross_entropy"] + rows[0]["calm"], rel=1e-5)
    stored = tasks.stored_tensors(tmp_path / "whole")
    before = weights.read(c.model.weights)
    changed = {
        name
        for name, tensor in before.items()
        if not np.array_equal(tensor, stored[f"backbone.{name}"])
    }
    assert changed == {f"blocks.{i}.attn.proj.kernel" for i in range(3)}
    assert not any("down" in name or ".up" in name for name in stored)
    assert jaxdg.load(tmp_path / "whole").predict(np.zeros((32, 64, 3), np.uint8)).shape == (32, 64)

    start(c, tmp_path / "parts", steps=2)
    assert start(c, tmp_path / "parts") == rows
    for name, tensor in tasks.stored_tensors(tmp_path / "parts").items():
        np.testing.assert_array_equal(tensor, stored[name])


def test_the_folded_model_computes_what_the_adapted_one_does(tmp_path):
    """Scores of a model whose adapters are not zero, before and after they are folded in."""
    c = experiment(tmp_path)
    task = tasks.make_task(c, methods.active(c))
    blueprint = tasks.Blueprint.of(task, "none")
    like, optimizer = tasks.abstract_state(blueprint, c, sharding.make_mesh(c.mesh), task.methods)
    state = tasks.initial_state(task, blueprint, like, optimizer)
    state.trained = jax.tree.map(lambda x: x + 0.1, state.trained)
    images = np.random.default_rng(0).normal(size=(2, 32, 64, 3)).astype(np.float32)
    adapted: Any = nnx.merge(
        blueprint.graph, state.trained, state.frozen, state.statistics, copy=True
    )
    assert blueprint.finished is not None
    plain: Any = nnx.merge(blueprint.finished.graph, *blueprint.finish(task, state))
    scores = nnx.jit(lambda model: model.scores(jnp.asarray(images)))
    np.testing.assert_allclose(scores(plain), scores(adapted), rtol=1e-4, atol=1e-4)
    assert "backbone.blocks.1.attn.proj.down" in weights.shapes(adapted)
    assert "backbone.blocks.1.attn.proj.down" not in weights.shapes(plain)
