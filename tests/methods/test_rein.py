"""Rein: the authors' own outputs, its laws, and whole runs."""

import dataclasses
from pathlib import Path
from typing import Any
import zlib

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxdg
from jaxdg import methods, weights
from jaxdg.backbones import VitConfig, create, zoo
from jaxdg.config import Config, MeshConfig, validated
from jaxdg.methods import rein
from jaxdg.tasks import run_state as tasks
from jaxdg.training import sharding
from tests.runs import start

GOLDEN = Path(__file__).parents[1] / "golden" / "rein.npz"
# Sizes of the golden file.
BLOCKS = 3
WIDTH = 24
TOKENS = 5
RANK = 4
HIDDEN = 6
IMAGES = 2
PATCHES = 7


def drawn(name: str, shape: tuple[int, ...], size: float = 0.5) -> np.ndarray:
    """The numbers of the golden file, by torch's name and shape."""
    rng = np.random.default_rng(zlib.crc32(name.encode()))
    return np.asarray(size * rng.standard_normal(shape), np.float32)


class Backbone(nnx.Module):
    """Blocks that are the identity, each with its tokens in one segment."""

    def __init__(self, tokens):
        self.blocks = nnx.Module()
        segment = nnx.Module()
        segment.rein = tokens
        self.blocks.segments = nnx.Dict({"0": segment})


def filled(module: nnx.Module, within: str = "") -> None:
    """Gives the parameters of a module the numbers of the golden file."""
    for path, leaf in nnx.to_flat_state(nnx.state(module, nnx.Param)):
        name = within + ".".join(map(str, path))
        is_kernel = name.endswith("kernel")
        shape = leaf.shape[::-1] if is_kernel else leaf.shape
        tensor = drawn(name.replace("kernel", "weight"), tuple(shape))
        leaf[...] = jnp.asarray(tensor.T if is_kernel else tensor)


@pytest.mark.parametrize("kind", ["lora", "whole"])
def test_outputs_and_gradients_are_those_of_the_authors_code(kind):
    """Features after every block, queries, and all gradients, beside a class token and padding."""
    golden = {
        name.removeprefix(f"{kind}."): value
        for name, value in np.load(GOLDEN).items()
        if name.startswith(kind)
    }
    prefix = 1 if kind == "lora" else 0
    options = rein.ReinOptions(tokens=TOKENS, rank=RANK if prefix else 0, zero_start=not prefix)
    config = dataclasses.replace(
        VitConfig(width=WIDTH, patch_size=1, image_size=(1, PATCHES)), depth=BLOCKS
    )
    rngs = nnx.Rngs(0)
    after = rein.Refinement(options, config, rngs=rngs)
    # The class token of a ViT is there in one case and not in the other.
    after.prefix = prefix
    backbone = Backbone(rein.Tokens(BLOCKS, options, WIDTH, rngs=rngs))
    link = rein.Link(options, WIDTH, HIDDEN, rngs=rngs)
    model = nnx.Dict(after=after, tokens=backbone.blocks.segments["0"].rein, link=link)
    for part in (after, model["tokens"], link):
        filled(part)
    graph, state = nnx.split(model)

    def run(state):
        model = nnx.merge(graph, state)
        x = jnp.asarray(drawn("features", (IMAGES, PATCHES + prefix, WIDTH), 1.0))
        x = jnp.pad(x, ((0, 0), (0, 3), (0, 0)), constant_values=7)
        found = {}
        total = 0.0
        for i in range(BLOCKS):
            tokens = jax.tree.map(lambda leaf, i=i: leaf[i], nnx.state(model["tokens"]))
            block = nnx.Module()
            block.rein = nnx.merge(nnx.graphdef(model["tokens"]), tokens)
            x = model["after"](block, x)
            assert x.shape[1] == PATCHES + prefix + 3
            found[f"features.{i}"] = x[:, :-3]
            found[f"padding.{i}"] = x[:, -3:]
            total += jnp.sum(x[:, :-3] ** 2)
        if kind == "lora":
            backbone = Backbone(model["tokens"])
            found["positions"], found["first"] = model["link"](backbone)
            total += jnp.sum(found["positions"] ** 2) + jnp.sum(found["first"] ** 2)
        return total, found

    (_, found), gradients = jax.jit(jax.value_and_grad(run, has_aux=True))(state)
    for i in range(BLOCKS):
        np.testing.assert_array_equal(found.pop(f"padding.{i}"), 7)
    for path, leaf in nnx.to_flat_state(gradients):
        name = ".".join(map(str, path[1:]))
        if kind == "lora" or path[0] != "link":
            torch_name = f"gradient.{name.replace('kernel', 'weight')}"
            found[torch_name] = leaf[...].T if "kernel" in name else leaf[...]
    assert found.keys() == golden.keys()
    for name, value in found.items():
        scale = np.abs(golden[name]).max()
        np.testing.assert_allclose(value, golden[name], atol=2e-5 * scale, rtol=1e-4, err_msg=name)


@pytest.fixture
def small(monkeypatch):
    """A small encoder in the zoo."""
    entry = zoo.Entry(VitConfig(width=16, depth=3, heads=2, patch_size=8, taps=(0, 1, 2)))
    monkeypatch.setitem(zoo.ZOO, "tiny8", entry)


def experiment(folder: Path, **settings) -> Config:
    """A run on streets with Rein, from weights that it stores in the folder."""
    c = Config(steps=4, batch_size=8, log_every=1, eval_every=0, checkpoint_every=2)
    c.data.crop = c.data.streets.size = c.evaluation.stride = (32, 64)
    c.data.streets.images = 8
    c.data.streets.val_images = 2
    c.rein = rein.ReinOptions(on=True, tokens=5, rank=2, link=False)
    c.model.encoder = "tiny8"
    c.model.weights = str(folder / "before.safetensors")
    c.model.pyramid = "none"
    c.optimizer.learning_rate = 1e-2
    c.optimizer.encoder_factor = 1.0
    c.optimizer.clip = 1.0
    c.evaluation.domains = ("clear",)
    for name, value in settings.items():
        setattr(c.rein, name, value)
    if not Path(c.model.weights).exists():
        encoder = create("tiny8", image_size=(32, 64), rngs=nnx.Rngs(1))
        weights.save(weights.tensors(encoder), c.model.weights, {"model": "tiny8"})
    return c


def model_of(c: Config) -> Any:
    """The model of a run before its first step."""
    task = tasks.make_task(c, methods.active(c))
    blueprint = tasks.Blueprint.of(task, "none")
    one = sharding.make_mesh(MeshConfig(1, 1), jax.devices()[:1])
    like, optimizer = tasks.abstract_state(blueprint, c, one, task.methods)
    state = tasks.initial_state(task, blueprint, like, optimizer)
    return nnx.merge(blueprint.graph, state.trained, state.frozen, state.statistics)


def test_every_block_is_followed_by_its_own_tokens(small, tmp_path):
    """Features at all taps equal blocks and refinements called one after another; a zero start
    changes no bit of the plain encoder's.
    """
    images = jnp.asarray(np.random.default_rng(0).normal(size=(2, 32, 64, 3)), jnp.float32)
    features = nnx.jit(lambda backbone: backbone(images))
    refined = model_of(experiment(tmp_path)).backbone
    refined.blocks.after.scale[...] = jnp.asarray(0.5)  # a thousandth would hide a mistake

    @nnx.jit
    def by_hand(backbone):
        config = backbone.config
        x = backbone.embed(images)
        n = x.shape[1]
        x = jnp.pad(x, ((0, 0), (0, config.padding), (0, 0)))
        found = []
        for block in (backbone.blocks.single(i) for i in range(3)):
            x = backbone.blocks.after(block, block(x, jnp.ones((2, 2, 1, 1))))
            found.append(x[:, 1:n].reshape(2, *config.grid, -1))
        return tuple(found)

    for got, want in zip(features(refined), by_hand(refined), strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)

    plain = create(
        "tiny8", image_size=(32, 64), weights=tmp_path / "before.safetensors", rngs=nnx.Rngs(0)
    )
    zero = model_of(experiment(tmp_path, zero_start=True)).backbone
    for got, want in zip(features(zero), features(plain), strict=True):
        np.testing.assert_array_equal(got, want)


def test_a_run_resumes_keeps_the_encoder_and_is_loaded_with_its_tokens(
    small, tmp_path, monkeypatch
):
    """2 + 2 steps are 4 steps to the last bit; no weight of the encoder moves by one, and every
    number of Rein does; prediction builds the model with them.
    """
    one = sharding.make_mesh(MeshConfig(1, 1), jax.devices()[:1])
    monkeypatch.setattr(sharding, "make_mesh", lambda *_: one)
    c = validated(experiment(tmp_path))
    rows = start(c, tmp_path / "whole")
    stored = tasks.stored_tensors(tmp_path / "whole")
    encoder = weights.read(str(c.model.weights))
    for name, tensor in encoder.items():
        np.testing.assert_array_equal(tensor, stored[f"backbone.{name}"])
    assert stored["backbone.blocks.2.rein.learnable_tokens_a"].shape == (5, 2)
    fresh = weights.tensors(model_of(c))
    assert fresh.keys() == stored.keys()
    still = {name for name in stored if np.array_equal(stored[name], fresh[name])}
    assert still == {f"backbone.{name}" for name in encoder}

    start(c, tmp_path / "parts", steps=2)
    assert start(c, tmp_path / "parts") == rows
    for name, tensor in tasks.stored_tensors(tmp_path / "parts").items():
        np.testing.assert_array_equal(tensor, stored[name])

    model = jaxdg.load(tmp_path / "whole")
    loaded: Any = nnx.merge(model.graph, *model.state)
    for name, tensor in weights.tensors(loaded).items():
        np.testing.assert_array_equal(tensor, stored[name])
    assert model.predict(np.zeros((32, 64, 3), np.uint8)).shape == (32, 64)


def test_the_queries_of_mask2former_come_from_the_tokens(small, tmp_path, monkeypatch):
    """The head has no queries of its own, and its output follows those that the link gives."""
    monkeypatch.setitem(
        zoo.ZOO,
        "tiny8",
        zoo.Entry(VitConfig(width=16, depth=4, heads=2, patch_size=8, taps=(0, 1, 2, 3))),
    )
    c = experiment(tmp_path, link=True, tokens=19)
    c.model.pyramid = "layer"
    c.model.decoder = "mask2former"
    head = c.model.mask2former
    head.queries = 19
    head.hidden = 32
    head.heads = 2
    head.pixel_layers = head.layers = 1
    head.pixel_ffn = head.ffn = 32
    model = model_of(validated(c))
    names = weights.shapes(model)
    assert "head.query_feat" not in names
    assert "head.query_embed" not in names
    assert names["queries.querys2feat.kernel"] == (32, 32)
    rng = np.random.default_rng(0)
    features = tuple(
        jnp.asarray(rng.normal(size=(2, 8 >> i, 16 >> i, 16)), jnp.float32) for i in range(4)
    )
    decode = nnx.jit(lambda model, queries: model.head(features, queries=queries).mask_embeds)

    @nnx.jit
    def whole(model):
        model.pyramid = None
        return model.decode(features).mask_embeds

    queries = model.queries(model.backbone)
    np.testing.assert_allclose(whole(model), decode(model, queries), rtol=1e-5, atol=1e-5)
    drawn_queries = jnp.asarray(rng.normal(size=(3, 19, 32)), jnp.float32)
    first, positions, others = drawn_queries
    got = decode(model, (positions, first))
    assert np.abs(got - decode(model, (others, first)))[1].max() > 1e-3
    assert np.abs(got - decode(model, (positions, others)))[0].max() > 1e-3


def test_eight_devices_train_as_one(small, tmp_path, monkeypatch):
    """The losses of two steps, parameters divided over the devices."""
    c = validated(experiment(tmp_path))
    c.steps = 2
    meshes = {
        "one": sharding.make_mesh(MeshConfig(1, 1), jax.devices()[:1]),
        "eight": sharding.make_mesh(MeshConfig(2, 4), jax.devices()),
    }
    losses = {}
    for name, mesh in meshes.items():
        monkeypatch.setattr(sharding, "make_mesh", lambda *_, mesh=mesh: mesh)
        losses[name] = [row["loss"] for row in start(c, tmp_path / name)]
    assert len(losses["one"]) == 2
    np.testing.assert_allclose(losses["eight"], losses["one"], rtol=1e-4)


@pytest.mark.parametrize(
    ("encoder", "link", "count"),
    [
        ("dinov2_l14", True, 2_990_081),
        ("dinov2_l14", False, 2_530_817),
        ("eva02_clip_l14", True, 2_990_081),
        ("sam_h16", True, 4_510_721),
    ],
)
def test_as_many_parameters_as_published(encoder, link, count):
    """Those that Rein adds, but for the layer that the authors count with the head."""
    config = dataclasses.replace(zoo.entry(encoder).config, image_size=(224, 224))

    def added():
        blocks = config.depth
        options = rein.ReinOptions()
        rngs = nnx.Rngs(0)
        parts = [rein.Tokens(blocks, options, config.width, rngs=rngs)]
        parts.append(rein.Refinement(options, config, rngs=rngs))
        if link:
            parts.append(rein.Link(options, config.width, 256, rngs=rngs))
            parts[-1].querys2feat = None
        return nnx.List(parts)

    shapes = weights.shapes(nnx.eval_shape(added))
    assert sum(int(np.prod(shape)) for shape in shapes.values()) == count


def test_settings_that_do_not_fit_are_told(small, tmp_path):
    """Another encoder, another decoder, another number of queries."""
    c = experiment(tmp_path)
    c.rein.link = True
    with pytest.raises(ValueError, match=r"rein\.link is True with model\.decoder 'linear'"):
        validated(c)
    c.model.decoder = "mask2former"
    c.model.pyramid = "layer"
    with pytest.raises(ValueError, match=r"rein\.tokens is 5; allowed: 100"):
        validated(c)
    c = experiment(tmp_path)
    c.model.encoder = "mit_b0"
    with pytest.raises(ValueError, match=r"rein\.on is True with model\.encoder 'mit_b0'"):
        validated(c)
