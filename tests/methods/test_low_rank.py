"""Low-rank adapters against their authors' layers (golden file, made by
tests/oracles/golden_low_rank.py), their laws on every family of encoders, and runs of both tasks.
"""

import copy
import dataclasses
from pathlib import Path
import re
from typing import Any
import zlib

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxdg
from jaxdg import methods, train, weights
from jaxdg.backbones import VitConfig, create, zoo
from jaxdg.backbones.layers import Linear
from jaxdg.commands import plan
from jaxdg.config import Config, MeshConfig, validated
from jaxdg.methods import low_rank
from jaxdg.methods.low_rank import LowRank, LowRankOptions
from jaxdg.tasks import run_state as tasks
from jaxdg.training import sharding
from tests.conftest import GOLDEN
from tests.runs import start
from tests.small_zoo import reduced

SOMA = ("attn.q", "attn.k", "attn.v", "attn.proj", "mlp.fc1", "mlp.fc2")


def drawn(name: str, *shape: int) -> np.ndarray:
    """Random numbers of a name, as for the golden file."""
    return np.random.default_rng(zlib.crc32(name.encode())).normal(size=shape).astype(np.float32)


def layer(word: str, name: str, outside: int, inside: int) -> nnx.Linear:
    """The golden file's layer of that name, stacked for one block."""
    made = nnx.Linear(inside, outside, rngs=nnx.Rngs(0))
    made.kernel = nnx.Param(jnp.asarray(drawn(f"{word} {name}", outside, inside).T[None]))
    made.bias = nnx.Param(jnp.asarray(drawn(f"bias {name}", outside)[None]))
    return made


def single(adapted: Any) -> Any:
    """A layer of one stacked block without the layer axis."""
    graph, state = nnx.split(adapted)
    return nnx.merge(graph, jax.tree.map(lambda leaf: leaf[0], state))


def adapted(
    plain: nnx.Linear, thirds: tuple[str, ...] = ("",), **options: Any
) -> low_rank.LowRankLinear:
    """A layer with adapters, as the golden file has them unless told otherwise."""
    o = LowRankOptions(**{"on": True, "rank": 3, "alpha": 6.0, **options})
    return low_rank.adapted(o, plain, thirds, jax.random.split(jax.random.key(0), 1))


def near(found: Any, expected: Any, tolerance: float) -> None:
    """Compares with an absolute tolerance relative to the largest expected number."""
    expected = np.asarray(expected)
    np.testing.assert_allclose(found, expected, rtol=0, atol=tolerance * np.abs(expected).max())


@pytest.mark.parametrize("start", ["soma", "soma_released"])
def test_soma_starts_as_its_authors_layers(start, monkeypatch):
    """B A, the frozen weight and the output of each layer; a fused layer holds q, k and v.

    For the released start the golden file's random matrices replace the drawn ones.
    """
    golden = np.load(GOLDEN / "low_rank.npz")
    prefix = start.removeprefix("soma_")
    sizes = {"fc1": (20, 12), "fc2": (12, 20)} | dict.fromkeys("qkv", (12, 12))

    def made(name, word):
        return drawn(f"{word} {name}", *sizes[name]).T

    for names in (("q", "k", "v"), ("fc1",), ("fc2",)):
        if start == "soma_released":
            random = iter([jnp.asarray(made(name, "random")[None]) for name in names])
            monkeypatch.setattr(low_rank, "uniform", lambda *_, random=random: next(random))
        outside, inside = sizes[names[0]]
        plain = layer("loaded", names[0], outside, inside)
        if len(names) == 3:
            plain = nnx.Linear(inside, 3 * outside, rngs=nnx.Rngs(0))
            kernels = [made(name, "loaded") for name in names]
            plain.kernel = nnx.Param(jnp.asarray(np.concatenate(kernels, 1)[None]))
            biases = [drawn(f"bias {name}", outside) for name in names]
            plain.bias = nnx.Param(jnp.asarray(np.concatenate(biases)[None]))
        new = adapted(plain, names if len(names) == 3 else ("",), start=start)
        assert [pair.rank for pair in new.pairs] == [3] * len(names)
        one = single(new)
        for i, name in enumerate(names):
            columns = slice(i * outside, (i + 1) * outside)
            near(one.product()[:, columns], 2 * golden[f"{prefix} {name} ba"].T, 1e-5)
            near(one.kernel[:, columns], golden[f"{prefix} {name} weight"].T, 1e-5)
            y = one(jnp.asarray(drawn(f"x {name}", 5, inside)))
            near(y[:, columns], golden[f"{prefix} {name} y"], 1e-5)


def test_lora_computes_what_peft_does():
    """The output of a fused layer with one pair, and the gradients of input and factors."""
    golden = np.load(GOLDEN / "low_rank.npz")
    graph, state = nnx.split(single(adapted(layer("loaded", "qkv", 36, 12))))
    towards = drawn("towards", 5, 36)

    def run(a, b, x):
        one = nnx.merge(graph, state)
        one.lora_a = nnx.Param(a.T)
        one.lora_b = nnx.Param(b.T)
        y = one(x)
        return jnp.sum(y * towards), y

    values = (drawn("a", 3, 12), drawn("b", 36, 3), drawn("x qkv", 5, 12))
    (_, y), gradients = jax.value_and_grad(run, (0, 1, 2), has_aux=True)(*map(jnp.asarray, values))
    near(y, golden["peft y"], 1e-5)
    for found, name in zip(gradients, ("da", "db", "dx"), strict=True):
        near(found, golden[f"peft {name}"], 1e-5)


def test_recycle_starts_as_its_authors_layers():
    """The frozen weight and the product of both pairs, of a wide and of a tall layer."""
    golden = np.load(GOLDEN / "low_rank.npz")
    for name, outside, inside in (("fc1", 20, 12), ("fc2", 12, 20)):
        plain = layer("loaded", name, outside, inside)
        one = single(adapted(plain, start="recycle", rank=4, sub_rank=1))
        near(one.kernel, golden[f"recycle {name} weight"].T, 1e-5)
        near(one.lora_a[...] @ one.lora_b[...], golden[f"recycle {name} main"].T, 1e-5)
        near(one.sub_lora_a[...] @ one.sub_lora_b[...], golden[f"recycle {name} sub"].T, 1e-5)


def test_released_start_is_the_smallest_part_of_torchs_first_weights():
    """The drawn matrix lies within 1 / sqrt(in); what is kept of it is small, differs by block and
    does not depend on the loaded weight.
    """
    o = LowRankOptions(start="soma_released", rank=2)
    keys = jax.random.split(jax.random.key(0), 2)
    kernel = jnp.ones((2, 64, 32))
    a, b = low_rank.first_factors(o, kernel, keys, 2, False)
    again, _ = low_rank.first_factors(o, 5 * kernel, keys, 2, False)
    np.testing.assert_array_equal(a, again)
    everything = LowRankOptions(start="soma_released", rank=32)
    whole = jnp.matmul(*low_rank.first_factors(everything, kernel, keys, 32, False))
    assert 0.95 / 8 < np.abs(whole).max() < 1.001 / 8
    assert np.std(whole) == pytest.approx(1 / 8 / 3**0.5, rel=0.03)
    values = np.linalg.svd(np.asarray(whole), compute_uv=False)
    found = np.linalg.svd(np.asarray(a @ b), compute_uv=False)
    np.testing.assert_allclose(found[:, :2], values[:, -2:], rtol=1e-3)
    assert np.abs(a[0] - a[1]).max() > 0.01


FAMILIES = [  # that hold or call their layers in ways of their own
    "augreg_ti16",
    "eva02_clip_l14",
    "eva02_ti14",
    "sam_b16",
    "dinov2_g14",
    "dinov3_l16",
]


def built(config: Any) -> Any:
    """An encoder as the backbone of a model, with layer scales as large as trained ones."""
    model: Any = nnx.Dict(backbone=config.build(rngs=nnx.Rngs(1)))
    move(model, ("gamma",), 1.0)
    return model


def move(model: Any, names: tuple[str, ...], by: float) -> None:
    """Adds a number to all parameters of these names."""
    for path, leaf in nnx.to_flat_state(nnx.state(model, nnx.Param)):
        if path[-1].endswith(names):
            leaf[...] += by


def extended(model: Any, method: LowRank) -> Any:
    """A copy with adapters."""
    model = nnx.clone(model)
    method.extend(model, nnx.Rngs(0))
    return model


def picture(b: int = 2) -> jax.Array:
    return jnp.asarray(np.random.default_rng(0).normal(size=(b, 12, 12, 3)).astype(np.float32))


@pytest.mark.parametrize("name", FAMILIES)
def test_laws_of_every_family(name):
    """SoMA at its start changes an encoder's features by rounding only; a folded encoder computes
    what the adapted one did, and has its names.
    """
    config: Any = reduced(zoo.entry(name).config, depth=1)
    run = jax.jit(lambda model: model.backbone(picture())[0])
    products = tuple(low_rank.linears(config))
    if "attn.qkv" in products:
        products = (*sorted({*products} - {"attn.qkv"}), "attn.v", "attn.q")
    o = LowRankOptions(on=True, start="soma", rank=2, alpha=3.0, products=products)
    method = LowRank(o, config)
    plain = built(config)
    expected = run(plain)
    model = extended(plain, method)
    near(run(model), expected, 1e-5)
    move(model, ("lora_a", "lora_b"), 0.1)
    changed = run(model)
    assert np.abs(changed - expected).max() > 0.05 * np.abs(expected).max()
    method.finish(model, None)
    assert weights.shapes(model) == weights.shapes(plain)
    near(run(model), changed, 1e-5)


def test_lora_at_its_start_changes_no_bit():
    """The features of two scanned blocks, all of whose layers are adapted.

    They are computed operation by operation, since compilers may round two programs otherwise.
    """
    config = VitConfig(width=24, depth=2, heads=2, patch_size=4, taps=(1,), image_size=(12, 12))
    plain = built(config)
    model = extended(plain, LowRank(LowRankOptions(on=True, rank=2), config))
    with jax.disable_jit():
        np.testing.assert_array_equal(model.backbone(picture())[0], plain.backbone(picture())[0])


def test_every_plain_vit_of_the_zoo_is_adapted():
    """Layers are found by the names that they have in a block, in all encoders but those with
    stages (shapes); each adapter has the sides of its kernel.
    """
    found = {}
    for name, entry in zoo.ZOO.items():
        if isinstance(entry.config, VitConfig):
            config: Any = reduced(entry.config, depth=1)
            method = LowRank(LowRankOptions(on=True, rank=3), config)

            def make(config=config, method=method):
                model: Any = nnx.Dict(backbone=config.build(rngs=nnx.Rngs(0)))
                method.extend(model, nnx.Rngs(0))
                return model

            shapes = weights.shapes(nnx.eval_shape(make))
            found[name] = tuple(method.chosen)
            for layer in method.chosen:
                inside, outside = shapes[f"backbone.blocks.0.{layer}.kernel"]
                assert shapes[f"backbone.blocks.0.{layer}.lora_a"] == (inside, 3)
                assert shapes[f"backbone.blocks.0.{layer}.lora_b"] == (3, outside)
    assert len(found) > 30
    split = ("attn.k_proj", "attn.proj", "attn.q_proj", "attn.v_proj", "mlp.w1", "mlp.w2", "mlp.w3")
    gated = ("attn.proj", "attn.qkv", "mlp.w12", "mlp.w3")
    assert found["eva02_l14"] == found["eva02_clip_l14"] == split
    assert found["eva02_s14"] == found["dinov2_g14"] == gated
    assert set(found.values()) == {
        split,
        gated,
        ("attn.proj", "attn.qkv", "mlp.fc1", "mlp.fc2"),
    }


def test_biases_of_adapted_layers_get_exact_gradients_in_half_precision():
    """The gradient is the number of tokens; in bfloat16 a sum of ones ends at 256."""
    plain = Linear(4, 3, dtype=jnp.bfloat16, rngs=nnx.Rngs(0))
    pair = low_rank.Pair("", 0, 3, 2)
    layer = low_rank.LowRankLinear(plain, {pair: (jnp.ones((4, 2)), jnp.zeros((2, 3)))}, 1.0, 0.0)
    x = jnp.ones((2, 512, 4), jnp.bfloat16)
    gradient = jax.jit(nnx.grad(lambda layer: jnp.sum(layer(x).astype(jnp.float32))))
    np.testing.assert_array_equal(gradient(layer).bias[...], np.full(3, 1024))


@pytest.mark.parametrize("name", ["eva02_clip_l14", "eva02_ti14"])
def test_half_precision_heeds_adapters(name):
    """In bfloat16 an adapted encoder is as near to float32 as a plain one."""
    config: Any = reduced(zoo.entry(name).config, depth=1)
    method = LowRank(LowRankOptions(on=True, rank=2), config)
    run = jax.jit(lambda model: model.backbone(picture(1))[0].astype(jnp.float32))
    found = {}
    for dtype in ("float32", "bfloat16"):
        model = extended(built(dataclasses.replace(config, dtype=dtype)), method)
        move(model, ("lora_a", "lora_b"), 0.2)
        found[dtype, "adapted"] = run(model)
        method.finish(model, None)
        found[dtype, "plain"] = run(model)
    exact = found["float32", "plain"]
    near(found["float32", "adapted"], exact, 1e-5)
    near(found["bfloat16", "plain"], exact, 0.03)
    near(found["bfloat16", "adapted"], exact, 0.03)


def trained(encoder: str, **options: Any) -> dict[str, tuple[int, ...]]:
    """Names and shapes of an encoder's trained parameters."""
    o = LowRankOptions(on=True, **options)
    config: Any = zoo.entry(encoder).config
    method = LowRank(o, config)
    ends = method.boundaries(config.depth)

    def build():
        rngs = nnx.Rngs(0)
        built = dataclasses.replace(config, boundaries=ends).build(rngs=rngs)
        model: Any = nnx.Dict(backbone=built)
        method.extend(model, rngs)
        return model

    shapes = weights.shapes(nnx.eval_shape(build))
    return {name: shape for name, shape in shapes.items() if method.trains(name, True)}


def count(shapes: dict[str, tuple[int, ...]]) -> int:
    return sum(int(np.prod(shape)) for shape in shapes.values())


def test_counts_of_published_models():
    """Parameters that the papers report, of adapters and biases; and where they are."""
    soma = trained("dinov2_l14", start="soma", rank=16, first_block=8, products=SOMA, biases=True)
    adapters = {name: shape for name, shape in soma.items() if "lora" in name}
    assert count(adapters) == 4_718_592
    assert count(soma) == 4_866_048
    assert {int(name.split(".")[2]) for name in soma} == set(range(8, 24))
    assert soma["backbone.blocks.8.attn.qkv.q_lora_a"] == (1024, 16)
    assert soma["backbone.blocks.8.attn.qkv.q_lora_b"] == (16, 1024)
    assert {name.split(".", 3)[3] for name in soma if "lora" not in name} == {
        "attn.qkv.bias",
        "attn.proj.bias",
        "mlp.fc1.bias",
        "mlp.fc2.bias",
    }
    qkv = ("attn.qkv",)
    assert count(trained("dinov2_l14", rank=8, products=qkv)) == 786_432
    assert count(trained("dinov2_l14", rank=32, products=qkv)) == 3_145_728
    split = ("attn.q_proj", "attn.k_proj", "attn.v_proj")
    eva = trained("eva02_l14", rank=8, products=split, biases=True)
    assert count({name: shape for name, shape in eva.items() if "lora" in name}) == 1_179_648
    assert {name.split(".", 3)[3] for name in eva if "lora" not in name} == {
        "attn.q_bias",
        "attn.v_bias",
    }
    recycle = trained("dinov2_l14", start="recycle", rank=36, sub_rank=4)
    assert count({n: s for n, s in recycle.items() if "sub_" in n}) / 1e6 == pytest.approx(
        1.6, 0.02
    )
    assert count(recycle) / 1e6 == pytest.approx(14.2, 0.005)


@pytest.fixture(scope="module", autouse=True)
def small():
    """A small encoder in the zoo; what one run compiles serves the next."""
    zoo.ZOO["tiny8"] = zoo.Entry(VitConfig(width=16, depth=3, heads=2, patch_size=8, taps=(2,)))
    yield
    del zoo.ZOO["tiny8"]


def tiny(folder: Path, task: str = "segmentation") -> Config:
    """A run on streets from weights that it stores in the folder, with all of the method on."""
    c = Config(steps=4, batch_size=8, log_every=1, eval_every=0, checkpoint_every=2, task=task)
    c.data.crop = c.data.streets.size = c.evaluation.stride = (32, 64)
    c.data.streets.images = 8
    c.data.streets.val_images = 2
    c.low_rank = LowRankOptions(
        on=True, start="soma", rank=2, dropout=0.2, products=SOMA, first_block=1
    )
    c.low_rank.biases = True
    c.model.encoder = "tiny8"
    c.model.weights = str(folder / "before.safetensors")
    c.model.pyramid = "none"
    c.model.freeze = "all"
    c.optimizer.learning_rate = 1e-2
    c.optimizer.encoder_factor = 1.0
    c.optimizer.clip = 1.0
    c.evaluation.domains = ("clear",)
    if task == "detection":
        c.model.decoder = "fcos"
        c.model.fcos.channels = 8
        c.model.fcos.groups = 2
        c.model.fcos.convs = 1
        c.model.fcos.levels = (2,)
    if not Path(c.model.weights).exists():
        encoder = create("tiny8", image_size=(32, 64), rngs=nnx.Rngs(1))
        weights.save(weights.tensors(encoder), c.model.weights, {"model": "tiny8"})
    return validated(c)


@pytest.mark.parametrize("task", ["segmentation", "detection"])
def test_runs_train_adapters_alone_and_resume(task, tmp_path, monkeypatch):
    """Of the encoder only adapted layers have changed after 4 steps, and their biases; the workdir
    is a plain model that is predicted with; 2 + 2 steps are 4 steps, dropout included.
    """
    one = sharding.make_mesh(MeshConfig(1, 1), jax.devices()[:1])
    monkeypatch.setattr(sharding, "make_mesh", lambda *_: one)
    c = tiny(tmp_path, task)
    rows = start(c, tmp_path / "whole")
    stored = tasks.stored_tensors(tmp_path / "whole")
    before = {f"backbone.{name}": x for name, x in weights.read(c.model.weights or "").items()}
    assert {name for name in stored if name.startswith("backbone.")} == before.keys()
    changed = {name for name, x in before.items() if not np.array_equal(x, stored[name])}
    layers = ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")
    assert changed == {
        f"backbone.blocks.{i}.{layer}.{part}"
        for i in (1, 2)
        for layer in layers
        for part in ("kernel", "bias")
    }
    if task == "segmentation":
        jaxdg.load(tmp_path / "whole").predict(np.zeros((32, 64, 3), np.uint8))
        start(c, tmp_path / "parts", steps=2)
        assert start(c, tmp_path / "parts") == rows
        for name, tensor in tasks.stored_tensors(tmp_path / "parts").items():
            np.testing.assert_array_equal(tensor, stored[name])


def test_steps_leave_frozen_parameters_alone_on_any_devices(tmp_path):
    """Three steps on eight devices that divide adapters change no bit of what is frozen; loss and
    gradient are those of one device, dropout included.
    """
    c = tiny(tmp_path)
    task = tasks.make_task(c, methods.active(c))
    rng = np.random.default_rng(0)
    fields = {
        "image": rng.integers(0, 256, (8, 32, 64, 3)).astype(np.uint8),
        "label": rng.integers(0, 19, (8, 32, 64)).astype(np.uint8),
    }
    found = []
    for mesh in (
        sharding.make_mesh(MeshConfig(1, 1), jax.devices()[:1]),
        sharding.make_mesh(MeshConfig(2, 4)),
    ):
        blueprint = tasks.Blueprint.of(task, c.model.freeze)
        like, optimizer = tasks.abstract_state(blueprint, c, mesh, task.methods)
        state = tasks.initial_state(task, blueprint, like, optimizer)
        frozen = jax.device_get(state.frozen)
        trained = jax.device_get(state.trained)
        at = jax.tree.map(lambda leaf: leaf.sharding, like)
        step = train.make_step(
            blueprint.graph, optimizer, task.loss_denominator, task.losses, jax.random.key(0), at
        )
        batch = sharding.to_devices(fields, mesh)
        metrics = []
        for _ in range(3):
            state, terms = step(state, batch)
            metrics.append(jax.device_get(terms))
        jax.tree.map(np.testing.assert_array_equal, jax.device_get(state.frozen), frozen)
        moved = jax.tree.map(
            lambda a, b: np.abs(np.asarray(a) - b).max(), jax.device_get(state.trained), trained
        )
        assert min(jax.tree.leaves(moved)) > 1e-6
        found.append(metrics)
        divided = {
            name: slot.path for name, slot in weights.slots(state.trained).items() if "lora" in name
        }
        whole = dict(nnx.to_flat_state(state.trained))
        for path in divided.values():
            leaf = whole[path][...]
            assert leaf.sharding.shard_shape(leaf.shape) != leaf.shape or mesh.size == 1
    for one, eight in zip(*found, strict=True):
        assert eight["loss"] == pytest.approx(one["loss"], rel=1e-4)
    for name in ("loss", "gradient_norm"):
        assert found[1][0][name] == pytest.approx(found[0][0][name], rel=1e-5)


def test_dropout_is_drawn_by_step_and_block_in_training_alone():
    """Inputs are dropped at the rate and the rest scaled up, otherwise in every block and for every
    key; nothing of it stays in the model.
    """
    method = LowRank(
        LowRankOptions(on=True, rank=4, dropout=0.25, products=("attn.proj",)),
        VitConfig(width=64, depth=3, heads=2, taps=(2,), image_size=(16, 16)),
    )
    config = VitConfig(width=64, depth=3, heads=2, taps=(2,), image_size=(16, 16))
    model = extended(built(config), method)
    graph = nnx.split(model)[0]
    layer = model.backbone.blocks.segments["0"].attn.proj
    layer.kernel[...] = jnp.zeros_like(layer.kernel[...])
    layer.lora_a[...] = jnp.broadcast_to(jnp.eye(64, 4), (3, 64, 4))
    layer.lora_b[...] = jnp.broadcast_to(jnp.eye(4, 64), (3, 4, 64))
    x = jnp.ones((300, 64))
    seen = []
    for key in (1, 1, 2):
        with method.drawing(model, jax.random.key(key)):
            parts, state = nnx.split(layer)
            for block in range(3):
                one = nnx.merge(parts, jax.tree.map(lambda leaf, i=block: leaf[i], state))
                seen.append(np.asarray(one(x))[:, :4])
    assert nnx.split(model)[0] == graph
    kept = np.array(seen[:3] + seen[6:])
    assert set(np.unique(kept).tolist()) == {0.0, float(np.float32(1 / 0.75))}
    assert np.mean(kept > 0) == pytest.approx(0.75, abs=0.02)
    np.testing.assert_array_equal(seen[:3], seen[3:6])
    for i in range(5):
        assert all(np.mean(kept[i] != kept[j]) > 0.3 for j in range(i))
    np.testing.assert_array_equal(single(layer)(x)[:, :4], np.ones((300, 4)))


def test_the_start_does_not_depend_on_where_segments_end():
    """Other taps draw the same adapters; blocks out of range have none."""
    config = VitConfig(width=16, depth=4, heads=2, taps=(3,), image_size=(16, 16))
    method = LowRank(LowRankOptions(on=True, rank=2, first_block=1, last_block=2), config)
    assert method.boundaries(4) == (0, 2)
    found = []
    for taps in ((3,), (1, 3)):
        c = dataclasses.replace(config, taps=taps, boundaries=(0, 2))
        tensors = weights.tensors(extended(built(c), method))
        found.append({name: x for name, x in tensors.items() if "lora" in name})
    assert found[0].keys() == found[1].keys()
    assert {name.split(".")[2] for name in found[0]} == {"1", "2"}
    for name, tensor in found[0].items():
        np.testing.assert_array_equal(tensor, found[1][name])


def test_plans_without_weights():
    """The planner compiles the step with adapters; the optimiser holds nothing for frozen ones."""
    c = Config(batch_size=8)
    c.data.crop = c.evaluation.stride = (32, 64)
    c.model.encoder = "tiny8"
    c.model.pyramid = "none"
    c.low_rank = LowRankOptions(on=True, start="soma", rank=2, products=SOMA)
    c.model.weights = "none.safetensors"
    p = plan.plan(validated(c))
    assert p.optimizer < 2.1 * p.gradients
    assert p.gradients < p.parameters / 2


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            dict(products=("attn.out",)),
            "low_rank.products has 'attn.out'; allowed: attn.proj, attn.qkv (or its thirds attn.q,"
            " attn.k, attn.v), mlp.fc1, mlp.fc2",
        ),
        (
            dict(products=("attn.qkv", "attn.q")),
            "low_rank.products is ('attn.qkv', 'attn.q'); allowed: attn.qkv once, or each of its"
            " thirds once",
        ),
        (
            dict(last_block=3),
            "low_rank adapts blocks 0 to 3; allowed: first_block <= last_block <= 2, as tiny8 has 3"
            " blocks",
        ),
        (dict(first_block=2, last_block=1), "low_rank adapts blocks 2 to 1; allowed: first_block"),
        (
            dict(rank=17, products=("attn.v",)),
            "low_rank.rank is 17; allowed: at most 16, the smaller side of the matrix of attn.qkv,"
            " 16x48, of which v is a third",
        ),
        (
            dict(rank=17),
            "low_rank.rank is 17; allowed: at most 16, the smaller side of the matrix of attn.proj,"
            " 16x16",
        ),
        (
            dict(sub_rank=4),
            "low_rank.sub_rank is 4; allowed: 0, or with low_rank.start recycle less than"
            " low_rank.rank 16",
        ),
    ],
)
def test_bad_settings(changes, message):
    """One line names the field, the value and what is allowed."""
    c = Config()
    c.model.encoder = "tiny8"
    c.low_rank = LowRankOptions(on=True, **changes)
    with pytest.raises(ValueError, match=re.escape(message)):
        validated(c)


def test_blocks_that_are_not_there():
    """Adapters past the last block that is read, on an encoder with stages, and beside another
    method that freezes the encoder are refused.
    """
    c = Config()
    c.model.encoder = "tiny8"
    c.model.pyramid = "none"
    c.model.taps = (1,)
    c.low_rank = LowRankOptions(on=True, first_block=2)
    c = validated(c)
    task = tasks.make_task(c, methods.active(c))
    with pytest.raises(ValueError, match=r"blocks 2 to 2, and none after block 1 is read"):
        tasks.Blueprint.of(task, "none")
    c = copy.deepcopy(c)
    c.rein.on = True
    c.rein.link = False
    with pytest.raises(ValueError, match=r"low_rank\.on is True with rein\.on; allowed: one"):
        validated(c)
    c.rein.on = False
    c.model.encoder = "mit_b0"
    with pytest.raises(ValueError, match=r"low_rank\.on is True; allowed: False with .* mit_b0"):
        validated(c)


def test_an_average_is_taken_of_factors_before_they_fold(tmp_path):
    """The finished kernel is the frozen one plus the product of the averaged factors, not the
    average of products.
    """
    c = tiny(tmp_path)
    c.average.on = True
    c.average.momentum = 0.5
    c = validated(c)
    task = tasks.make_task(c, methods.active(c))
    mesh = sharding.make_mesh(MeshConfig(1, 1), jax.devices()[:1])
    blueprint = tasks.Blueprint.of(task, c.model.freeze)
    like, optimizer = tasks.abstract_state(blueprint, c, mesh, task.methods)
    state = tasks.initial_state(task, blueprint, like, optimizer)
    average = state.opt_state[-1]._replace(
        count=jnp.asarray(5), average=jax.tree.map(lambda x: x + 0.5, state.trained)
    )
    state.opt_state = (*state.opt_state[:-1], average)
    start: Any = nnx.merge(blueprint.graph, state.trained, state.frozen, state.statistics)
    assert blueprint.finished is not None
    plain: Any = nnx.merge(blueprint.finished.graph, *blueprint.finish(task, state))
    before, after = (model.backbone.blocks.segments["1"].mlp.fc2 for model in (start, plain))
    a, b = (np.asarray(x[...]) + 0.25 for x in (before.lora_a, before.lora_b))
    np.testing.assert_allclose(after.kernel[...], before.kernel[...] + a @ b, atol=1e-6)
