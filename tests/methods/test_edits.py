"""Edits of features: the laws of both forms, what mining finds, runs that draw from its files."""

import copy
import dataclasses
import hashlib
from pathlib import Path
from typing import Any

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxdg
from jaxdg import methods, weights
from jaxdg.backbones import ClipResnetConfig, VitConfig, create, zoo
from jaxdg.backbones.resizing import adaptive_pool
from jaxdg.commands import command_line as cli
from jaxdg.commands import mine, miner
from jaxdg.commands.abstract_step import abstract_step
from jaxdg.config import Config, MeshConfig, validated
from jaxdg.detection.detector import Detector, DetectorConfig
from jaxdg.detection.rcnn.detectors import C4Config
from jaxdg.methods import edits, mining
from jaxdg.methods.edits import EditsOptions, MiningOptions
from jaxdg.tasks import run_state as tasks
from jaxdg.text.clip_text import TEXT_TOWERS, ClipText, ClipTextConfig, normalize
from jaxdg.text.templates import IMAGENET
from jaxdg.training import sharding
from tests.runs import StopAfter, start

IMAGE = ClipResnetConfig(
    image_size=(64, 64),
    blocks=(1, 1, 1, 1),
    widths=(16, 32, 48, 64),
    pool_grid=2,
    embedding=12,
)
TOWER = ClipTextConfig(16, 2, 12, "quick_gelu", None, depth=1)
VIT = VitConfig(width=16, depth=3, heads=2, patch_size=8, taps=(0, 1, 2))
PROMPTS = ("a foggy day", "a night", "snow everywhere")
ONE = sharding.make_mesh(MeshConfig(1, 1), jax.devices()[:1])


@pytest.fixture(scope="module", autouse=True)
def small():
    """A small CLIP and a small ViT in the zoo."""
    zoo.ZOO["tinyclip"] = zoo.Entry(IMAGE)
    zoo.ZOO["tiny8"] = zoo.Entry(VIT)
    TEXT_TOWERS["tinyclip_text"] = TOWER
    yield
    del zoo.ZOO["tinyclip"], zoo.ZOO["tiny8"], TEXT_TOWERS["tinyclip_text"]


@pytest.fixture(scope="module")
def stored(small, tmp_path_factory):
    """A folder with the files of all three, random."""
    folder = tmp_path_factory.mktemp("weights")
    for name in ("tinyclip", "tiny8"):
        encoder = create(name, image_size=(64, 64))
        weights.save(weights.tensors(encoder), folder / f"{name}.safetensors", {"model": name})
    tower = ClipText(TOWER, rngs=nnx.Rngs(2))
    about = {"model": "tinyclip_text"}
    weights.save(weights.tensors(tower), folder / "text.safetensors", about)
    return folder


def experiment(folder: Path, encoder: str = "tinyclip", task: Any = "segmentation") -> Config:
    """A run on streets with edits."""
    c = Config(steps=2, batch_size=8, log_every=1, eval_every=0, checkpoint_every=1, task=task)
    c.data.crop = c.data.streets.size = c.evaluation.stride = (64, 64)
    c.data.streets.images = 8
    c.data.streets.val_images = 2
    c.model.encoder = encoder
    c.model.weights = str(folder / f"{encoder}.safetensors")
    c.model.pyramid = "none"
    c.evaluation.domains = ("clear",)
    c.optimizer.learning_rate = 1e-2
    if task == "detection":
        c.model.decoder = "fcos"
        c.model.fcos.channels = 8
        c.model.fcos.groups = 2
        c.model.fcos.convs = 1
        c.model.fcos.levels = (2,)
    elif encoder == "tinyclip":
        c.model.decoder = "segformer"
    e = c.edits
    e.mining = MiningOptions(steps=3, batch=2, crops=2, crop=48, size=64, learning_rate=0.05)
    e.mining.text_weights = str(folder / "text.safetensors")
    if encoder == "tiny8":
        e.place = 1
        e.guide = "images"
        e.prompts = ("fog", "brightness")
        e.mining.pictures = 4
    else:
        e.prompts = PROMPTS
        e.source = "a day"
    return c


def tower(folder: Path, name: str, place: int) -> mining.Tower:
    """A frozen encoder with its embedding."""
    options = EditsOptions(place=place, guide="images", mining=MiningOptions(size=64))
    return mining.load_tower(name, str(folder / f"{name}.safetensors"), options, None)


def images(count: int, seed: int = 0) -> Any:
    """Normalised pictures, smooth enough to differ in more than noise."""
    coarse = np.random.default_rng(seed).normal(size=(count, 8, 8, 3))
    return jnp.asarray(coarse.repeat(8, 1).repeat(8, 2), jnp.float32)


def unit(x: np.ndarray) -> np.ndarray:
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


# --- Laws of both forms ---------------------------------------------------------------------------


def test_own_statistics_change_nothing_and_others_are_reached(optimized):
    """To the last bit; AdaIN gives the wanted mean, and the wanted deviation with its epsilon; it
    forgets scale and shift of a channel, and twice is once.
    """
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(2, 1, (2, 7, 9, 5)), jnp.float32)
    style = jnp.asarray(rng.uniform(0.5, 2, (2, 2, 5)), jnp.float32)
    same = jax.jit(lambda x: edits.restyled(x, edits.own_statistics(x), relu=False))
    np.testing.assert_array_equal(same(x), x)
    restyle = jax.jit(lambda x, style: edits.restyled(x, style, relu=False))
    y = np.asarray(restyle(x, style), np.float64)
    np.testing.assert_allclose(y.mean((1, 2)), style[:, 0], atol=1e-5)
    variance = np.var(np.asarray(x, np.float64), axis=(1, 2), ddof=1)
    deviation = style[:, 1] * np.sqrt(variance / (variance + 1e-5))
    np.testing.assert_allclose(y.std((1, 2), ddof=1), deviation, rtol=1e-5)
    np.testing.assert_allclose(restyle(jnp.float32(y), style), y, atol=1e-4)
    np.testing.assert_allclose(restyle(3 * x + 1, style), y, atol=1e-4)


def test_flat_channels_and_deviations_of_zero():
    """A constant channel gets the wanted mean and a finite gradient; a deviation of 0, or below,
    makes every channel constant; the ReLU cuts.
    """
    x = jnp.ones((1, 4, 4, 3))
    style = jnp.asarray([[[-1.0, 2.0, 0.5], [3.0, 0.0, -2.0]]])
    y = edits.restyled(x, style, relu=False)
    np.testing.assert_allclose(y, np.broadcast_to([-1.0, 2.0, 0.5], (1, 4, 4, 3)), rtol=1e-6)
    slope = jax.grad(lambda x: edits.restyled(x, style, relu=True).sum())(x)
    assert np.isfinite(slope).all()
    varied = x * jnp.arange(4.0)[:, None, None]
    flat = edits.restyled(varied, style, relu=True)
    np.testing.assert_allclose(flat[..., 1:], y[..., 1:], rtol=1e-6)
    assert float(flat[..., 0].min()) == 0.0 < float(flat[..., 0].max())


def test_an_offset_is_its_mean_at_every_position():
    """What training adds is the mean over positions of what was mined."""
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=(2, 3, 4, 5)), jnp.float32)
    offset = jnp.asarray(rng.normal(size=(2, 5)), jnp.float32)
    np.testing.assert_allclose(
        edits.shifted(x, offset) - x, np.broadcast_to(offset[:, None, None], x.shape), atol=1e-6
    )


def test_variance_and_pooling_are_torchs(golden):
    """Golden, of torch: unbiased variance, and adaptive pooling by windows of uneven sizes."""
    stored = np.load(golden / "edits.npz")
    for i in range(3):
        x = jnp.asarray(stored[f"input{i}"])
        mean, deviation = jnp.moveaxis(edits.own_statistics(x), 1, 0)
        np.testing.assert_allclose(mean, stored[f"mean{i}"], rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(deviation**2 - 1e-5, stored[f"variance{i}"], rtol=1e-5)
        pooled = adaptive_pool(x, 5)
        np.testing.assert_allclose(pooled, stored[f"pooled{i}"], rtol=1e-5, atol=1e-6)


# --- Mining ---------------------------------------------------------------------------------------


def test_the_loss_of_offsets_is_the_formula():
    """Against NumPy, on 3 prompts, 2 crops and 48 channels; the target has unit length."""
    rng = np.random.default_rng(0)
    plain = unit(rng.normal(size=(2, 48)))
    moved = unit(rng.normal(size=(3, 2, 48)))
    texts = rng.normal(size=(3, 48))
    source = rng.normal(size=48)
    toward = mining.directions(texts, source, PROMPTS)
    np.testing.assert_allclose(mining.directions(5 * texts, source / 9, PROMPTS), toward, rtol=1e-5)
    for j in range(3):
        direction = unit(unit(texts[j]) - unit(source))
        wanted = unit(plain + direction)
        cosines = [1 - moved[j, i] @ wanted[i] for i in range(2)]
        expected = sum(cosines) / 2 + 0.7 * sum(abs(moved[j] - plain).ravel()) / 96
        given = (jnp.float32(x) for x in (moved[j], plain, toward[j]))
        found = mining.offset_loss(*given, pull=0.7)
        assert float(found) == pytest.approx(expected, rel=1e-5)
    with pytest.raises(ValueError, match="'a night' has the embedding of the source"):
        mining.directions(np.stack([texts[0], 3 * source]), source, ("a foggy day", "a night"))


@pytest.fixture(scope="module")
def clip(stored):
    """The small CLIP's tower behind stage 2, split, and three directions."""
    split = nnx.split(tower(stored, "tinyclip", 2))
    toward = unit(np.random.default_rng(3).normal(size=(3, 12))).astype(np.float32)
    return *split, toward


def test_offsets_of_prompts_do_not_touch_each_other_or_the_encoder(clip):
    """Two prompts mined together are each mined alone; losses fall; nothing else moves; each offset
    moves embeddings of other pictures along its own direction and not the others'.
    """
    graph, state, toward = clip
    before = jax.tree.map(np.array, state)
    options = EditsOptions(place=2, mining=MiningOptions(learning_rate=0.05, pull=0.1))

    @jax.jit
    def mined(state, toward):
        tower = nnx.merge(graph, state)
        offsets = jnp.zeros((len(toward), 4, 4, 48))
        start = offsets, mining.offset_optimizer(options.mining).init(offsets)

        def step(carry, _):
            return mining.offset_step(tower, carry, images(4), toward, options.mining)

        (offsets, _), losses = jax.lax.scan(step, start, None, length=30)
        others = images(4, seed=1)
        found = mining.alignment(tower, others, offsets.mean((1, 2)), toward, options)
        return offsets, losses, found

    offsets, losses, found = mined(state, toward)
    alone, _, _ = mined(state, toward[1:2])
    np.testing.assert_allclose(alone[0], offsets[1], rtol=1e-4, atol=1e-5)
    assert np.all(losses[-1] < 0.8 * losses[0]), losses
    assert np.all(np.diagonal(found) > 0.2)
    assert np.all(np.argmax(found, axis=1) == np.arange(3)), found
    jax.tree.map(np.testing.assert_array_equal, jax.tree.map(np.array, state), before)


def test_the_second_term_of_offsets_begins_at_zero():
    """Without an offset it is 0 and so is its gradient, exactly: nothing pulls yet."""
    plain, direction = normalize(jnp.asarray(np.random.default_rng(0).normal(size=(2, 3, 48))))
    both = [
        jax.value_and_grad(mining.offset_loss)(plain, plain, direction[0], pull)
        for pull in (0.0, 5.0)
    ]
    jax.tree.map(np.testing.assert_array_equal, *both)


def test_the_part_before_the_place_is_not_computed_again(clip):
    """An embedding of what is held costs less than a fifth of one of images (the compiler's count),
    and is equal.
    """
    graph, state, _ = clip
    whole = jax.jit(lambda s, x: nnx.merge(graph, s).embed(nnx.merge(graph, s).held(x)))
    behind = jax.jit(lambda s, x: nnx.merge(graph, s).embed(x))
    held = jax.jit(lambda s, x: nnx.merge(graph, s).held(x))(state, images(2))
    np.testing.assert_allclose(behind(state, held), whole(state, images(2)), atol=1e-6)
    flops = [
        f.lower(state, x).compile().cost_analysis()["flops"]  # pyright: ignore[reportOptionalSubscript]  a cost is known on CPU
        for f, x in ((behind, held), (whole, images(2)))
    ]
    assert flops[0] < flops[1] / 5, flops


def test_statistics_are_mined_for_each_image_alone(stored):
    """Losses fall for every image; two images together are each alone, and so are prompts; a
    deviation is never negative; the slope is that of finite differences.
    """
    graph: Any
    graph, state = nnx.split(tower(stored, "tinyclip", 0))
    targets = unit(np.random.default_rng(3).normal(size=(2, 12))).astype(np.float32)
    options = MiningOptions(steps=20, learning_rate=1.0, pool=14, relu=True)

    @jax.jit
    def mined(state, x, targets):
        return mining.mine_styles(nnx.merge(graph, state), x, targets, options)

    styles, losses = mined(state, images(2), targets)
    assert styles.shape == (2, 2, 2, 16)
    assert np.all(losses[1] < losses[0]), losses
    assert float(styles[:, :, 1].min()) >= 0
    for row in range(2):
        twice = images(2)[jnp.asarray([row, row])]
        alone, _ = mined(state, twice, targets)
        np.testing.assert_allclose(alone[:, 0], styles[:, row], rtol=1e-4, atol=1e-5)

    tower_: Any = nnx.merge(graph, state)
    held = tower_.held(images(2))
    own = edits.own_statistics(held)
    way = jnp.asarray(np.random.default_rng(5).normal(size=own.shape), jnp.float32)

    @jax.jit
    def loss(style):
        return mining.style_losses(tower_, style, held, jnp.asarray(targets[0]), options).sum()

    # Away from its own statistics, where the ReLU has its kink.
    at = own + 0.1
    step = 2e-4
    slope = float((loss(at + step * way) - loss(at - step * way)) / (2 * step))
    assert slope == pytest.approx(float(jnp.sum(jax.grad(loss)(at) * way)), rel=0.06)


def test_the_templates_are_those_of_imagenet():
    """All 80 and no others: the sha256 of the published ones, sorted, one a line."""
    digest = hashlib.sha256("\n".join(sorted(IMAGENET)).encode()).hexdigest()
    assert digest == "a8a4822f2921936e2ef07cf2e7a5df69be9532aab2f3f4880156bb03563e2467"


def test_templates_are_averaged_as_they_are(stored):
    """The mean of raw embeddings is not that of unit ones; both have unit length."""
    text = ClipText(TOWER, rngs=nnx.Rngs(2))
    templates = ("{}", "a very bad photo of {} and more", "it is {}!")
    raw = mining.text_targets(PROMPTS, templates, str(stored / "text.safetensors"))
    each = text.embeddings(PROMPTS, templates)
    np.testing.assert_allclose(np.linalg.norm([raw, each], axis=-1), 1, rtol=1e-5)
    assert np.abs(raw - each).max() > 1e-4
    raw, each = (text.embeddings(PROMPTS, ("{}",), unit) for unit in (False, True))
    np.testing.assert_allclose(raw, each, atol=1e-6)


@pytest.fixture(scope="module")
def mined(stored):
    """Files that the command wrote: offsets of the small CLIP by text, statistics of the small ViT
    by pictures, each beside its configuration.
    """
    found = {}
    chosen: Any = (("offset", "tinyclip"), ("statistics", "tiny8"))
    for name, encoder in chosen:
        c = experiment(stored, encoder)
        c.edits.form = name
        if name == "statistics":
            c.edits.mining = dataclasses.replace(c.edits.mining, images=3, learning_rate=1.0)
        c.edits.file = str(stored / f"{name}.safetensors")
        mine.mine(c, Path(c.edits.file), cli.console(), cli.Interrupt())
        found[name] = c
    return found


def test_the_command_goes_on_where_it_was_stopped(mined, tmp_path, monkeypatch, capsys):
    """Stopped after one step or image, it writes the same numbers; it says what they are of; it
    refuses to go on with another mining, and to replace one.
    """
    monkeypatch.setattr(miner, "SAVE_EVERY", 0.0)
    for name, c in mined.items():
        out = tmp_path / f"{name}.safetensors"
        with pytest.raises(cli.Stop):
            mine.mine(c, out, cli.console(), StopAfter(0))
        assert not out.exists()
        other = dataclasses.replace(c, seed=1)
        with pytest.raises(ValueError, match="of another mining, which differs in seed"):
            mine.mine(other, out, cli.console(), StopAfter(9))
        mine.mine(c, out, cli.console(), StopAfter(9))
        whole = weights.read(c.edits.file)
        for key, tensor in weights.read(out).items():
            np.testing.assert_array_equal(tensor, whole[key])
        assert edits.about(out) == edits.about(c.edits.file)
        with pytest.raises(ValueError, match="is there, of another mining"):
            mine.mine(other, out, cli.console(), StopAfter(9))
        assert list(tmp_path.glob("*.unfinished")) == []
    said = edits.about(mined["offset"].edits.file)
    assert said["embedding"] == "attention pool"
    assert said["loss_after"].keys() == set(PROMPTS)
    assert all(said["loss_after"][p] < said["loss_before"][p] for p in PROMPTS)
    said = edits.about(mined["statistics"].edits.file)
    assert "patches" in said["embedding"]
    assert said["guide"] == "images"
    shapes = {
        name: next(iter(weights.read(c.edits.file).values())).shape for name, c in mined.items()
    }
    assert shapes == {"offset": (3, 4, 4, 48), "statistics": (2, 3, 2, 16)}


def test_controls_keep_lengths_and_values(mined, tmp_path):
    """Random offsets have the lengths of the mined means; permuted ones their values; the
    statistics of pictures are not mined. Training takes them as it takes mined ones.
    """
    c = mined["offset"]
    own = edits.read(c.edits, c.model.encoder, c.model.weights)
    for control in ("random", "permuted"):
        out = tmp_path / f"{control}.safetensors"
        mine.derived(out, Path(c.edits.file), control, c.edits, 0)
        o = dataclasses.replace(c.edits, file=str(out))
        found = edits.read(o, c.model.encoder, c.model.weights)
        np.testing.assert_allclose(*(np.linalg.norm(x, axis=-1) for x in (found, own)), rtol=1e-5)
        assert np.abs(found - own).max() > 1e-3
        if control == "permuted":
            np.testing.assert_allclose(np.sort(found), np.sort(own), rtol=1e-5, atol=1e-7)
    c = mined["statistics"]
    out = tmp_path / "pictures.safetensors"
    mine.mine(c, out, cli.console(), StopAfter(9), "pictures")
    o = dataclasses.replace(c.edits, file=str(out))
    found = edits.read(o, c.model.encoder, c.model.weights)
    assert found.shape == (2, 3, 2, 16)
    assert edits.about(out)["control"] == "pictures"
    with pytest.raises(ValueError, match="--control random is of offsets"):
        mine.derived(tmp_path / "no.safetensors", out, "random", c.edits, 0)


# --- Training -------------------------------------------------------------------------------------


def test_edits_of_something_else_are_refused(mined, stored, tmp_path):
    """By name: another encoder, weights, place, form, source, and prompts; no file; no edits."""
    c = mined["offset"]
    changes = {
        "encoder tinyclip, not clip_rn50": {"encoder": "clip_rn50"},
        "encoder_sha256 [0-9a-f]{64}, not": {"weights": str(stored / "tiny8.safetensors")},
        "place 2, not 1": {"place": 1},
        "form offset, not statistics": {"form": "statistics"},
        "source a day, not dawn": {"source": "dawn"},
        "the prompts 'a foggy day', .*, not 'rain'": {"prompts": ("a night", "rain")},
        "no edits at absent": {"file": "absent"},
        "holds no edits": {"file": str(stored / "text.safetensors")},
    }
    for message, change in changes.items():
        places = {"encoder": c.model.encoder, "weights": c.model.weights}
        own = {key: change[key] for key in change if key not in places}
        places |= {key: change[key] for key in change if key in places}
        o = dataclasses.replace(c.edits, **own)
        with pytest.raises((ValueError, FileNotFoundError), match=message):
            edits.read(o, places["encoder"], places["weights"])
    one = dataclasses.replace(c.edits, prompts=("a night",))
    rows = edits.read(one, c.model.encoder, c.model.weights)
    whole = edits.read(c.edits, c.model.encoder, c.model.weights)
    np.testing.assert_array_equal(rows, whole[1:2])


def test_settings_that_do_not_fit_are_told(mined):
    """Each names the field and what is allowed."""
    c = mined["offset"]
    for message, change in {
        "edits.file of jaxdg mine": {"file": None},
        "edits.place is 4; allowed: 0 to 3, a stage": {"place": 4},
        "at least one, each named once": {"prompts": ()},
        "'a day', which is edits.source too": {"prompts": ("a night", "a day")},
        "edits.source is None; allowed: the prompt": {"source": None},
        "edits.source is 'a day'; allowed: None": {"form": "statistics"},
        "edits.prompts has 'a foggy day'; allowed with": {"guide": "images", "source": None},
        "are of statistics": {"relu": True},
    }.items():
        other = copy.deepcopy(c)
        other.edits = dataclasses.replace(c.edits, on=True, **change)
        with pytest.raises(ValueError, match=message):
            validated(other)
    other = copy.deepcopy(c)
    other.edits.on = other.tldr.on = True
    with pytest.raises(ValueError, match=r"allowed: False with tldr\.on"):
        validated(other)


def test_draws_are_of_seed_and_step_and_half_of_the_batches_are_edited():
    """Whole batches are edited or not, half of 400 within three deviations; rows draw their own
    prompt and image, or all one; eight devices draw what one does.
    """
    key = jax.random.key(7)
    pool = jnp.arange(5 * 3 * 2 * 4.0).reshape(5, 3, 2, 4)
    options = EditsOptions(form="statistics", share="image")
    steps = jnp.arange(400)

    def at(step, options=options):
        return edits.draw(pool, jax.random.fold_in(key, step), 8, options)

    found = jax.jit(jax.vmap(at))(steps)
    on = np.asarray(found["edited"])
    assert np.all(on.all(1) == on.any(1))
    assert abs(on[:, 0].mean() - 0.5) < 3 * 0.5 / 20
    which = np.asarray(found["edit"])[..., 0, 0] / 8  # 3 * prompt + image
    counts = np.bincount(which.astype(int).ravel(), minlength=15)
    assert counts.min() > 400 * 8 / 15 * 0.7
    assert (np.ptp(which, axis=1) > 0).mean() > 0.95
    together = jax.vmap(lambda step: at(step, EditsOptions(form="statistics", share="batch")))
    assert np.all(np.ptp(np.asarray(together(steps[:9])["edit"]), axis=1) == 0)
    mesh = sharding.make_mesh(MeshConfig(8, 1))
    spread = jax.jit(at, out_shardings=sharding.batch_sharding(mesh))(5)
    np.testing.assert_array_equal(spread["edit"], found["edit"][5])


def batch_of(c: Config) -> dict[str, Any]:
    """A batch of pictures with label maps or boxes."""
    rng = np.random.default_rng(0)
    batch = {"image": rng.integers(0, 256, (8, 64, 64, 3)).astype(np.uint8)}
    if c.task == "segmentation":
        return {**batch, "label": (batch["image"][..., 0] % 19).astype(np.uint8)}
    corners = rng.uniform(0, 40, (8, 3, 2))
    boxes = np.concatenate([corners, corners + rng.uniform(4, 20, (8, 3, 2))], -1)
    return batch | {
        "boxes": boxes.astype(np.float32),
        "classes": rng.integers(0, 3, (8, 3)).astype(np.int32),
        "valid": np.ones((8, 3), bool),
        "crowd": np.zeros((8, 3), bool),
        "difficult": np.zeros((8, 3), bool),
    }


def own(self: Any, batch: Any) -> Any:
    """Edits by a map's own statistics, of the images that are edited."""

    def change(x: Any) -> Any:
        y = edits.restyled(x, edits.own_statistics(x), relu=True)
        return jnp.where(batch["edited"][:, None, None, None], y, x)

    return {0: change}


@pytest.mark.parametrize("form", ["offset", "statistics"])
def test_edits_that_change_nothing_leave_losses_and_gradients(form, mined, stored, monkeypatch):
    """To the last bit, in one program, as if no image were edited: zero offsets in a detector on a
    ViT; in a segmenter the statistics that the map has, behind a frozen stage. That is, up to the
    rounding of another program, a run that knows no edits. Other edits change both.
    """
    if form == "offset":
        c = experiment(stored, "tiny8", "detection")
        edit = np.zeros((8, 16), np.float32)
    else:
        c = experiment(stored, "tinyclip")
        c.model.freeze = "first 1"
        c.edits.source = None
        edit = np.ones((8, 2, 16), np.float32)
        c.edits.place = 0
    c.edits.on = True
    c.edits.form = form
    c.edits.file = "none"
    c = validated(c)
    task: Any = tasks.make_task(c, methods.active(c))
    plain: Any = tasks.make_task(c, ())
    plan = tasks.Blueprint.of(task, c.model.freeze)
    like, optimizer = tasks.abstract_state(plan, c, ONE, task.methods)
    state = tasks.initial_state(task, plan, like, optimizer)
    batch = batch_of(c)

    def slopes(task: Any) -> Any:
        def loss(trained, batch):
            whole = (trained, state.frozen, state.statistics)
            model = nnx.merge(plan.graph, *whole, copy=True)
            denominator = task.loss_denominator(model, batch)
            terms = task.losses(model, batch, denominator, jax.random.key(1))
            return sum(terms.values()), terms

        found = jax.jit(jax.value_and_grad(loss, has_aux=True))
        return lambda batch: jax.tree.leaves(found(state.trained, batch))

    off = {**batch, "edit": edit + 1, "edited": np.zeros(8, bool)}
    on = {**batch, "edit": edit, "edited": np.ones(8, bool)}
    run = slopes(task)
    expected = run(off)
    for one, other in zip(slopes(plain)(batch), expected, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-3, atol=1e-6)
    changed = run({**on, "edit": edit + 1})
    assert changed[0] != expected[0]
    if form == "statistics":
        monkeypatch.setattr(edits.Edits, "edits", own)
        run = slopes(task)
        expected = run(off)
    for one, other in zip(run(on), expected, strict=True):
        np.testing.assert_array_equal(one, other)


def test_a_run_draws_edits_goes_on_and_its_model_knows_nothing_of_them(
    mined, stored, tmp_path, monkeypatch
):
    """One step and one more are two, to the last bit, and differ from a run without edits; the
    model evaluates to the last bit as the same weights in a model that never heard of edits, after
    the files are gone.
    """
    monkeypatch.setattr(sharding, "make_mesh", lambda *_: ONE)
    c = copy.deepcopy(mined["offset"])
    weights_copy = tmp_path / "encoder.safetensors"
    weights_copy.write_bytes(Path(str(c.model.weights)).read_bytes())
    file_copy = tmp_path / "edits.safetensors"
    file_copy.write_bytes(Path(str(c.edits.file)).read_bytes())
    c.model.weights, c.edits.file = str(weights_copy), str(file_copy)
    c.edits.on = True
    c.edits.probability = 1.0
    c = validated(c)
    planned = abstract_step(c, ONE).batch
    assert planned["edit"].shape == (8, 48)
    rows = start(c, tmp_path / "whole")
    start(c, tmp_path / "parts", steps=1)
    assert start(c, tmp_path / "parts") == rows
    found = tasks.stored_tensors(tmp_path / "whole")
    for name, tensor in tasks.stored_tensors(tmp_path / "parts").items():
        np.testing.assert_array_equal(tensor, found[name])
    weights_copy.unlink()
    file_copy.unlink()
    image = batch_of(c)["image"][0]
    label = jaxdg.load(tmp_path / "whole").predict(image)

    c.model.weights = mined["offset"].model.weights
    c.edits = EditsOptions()
    plain: Any = tasks.make_task(c)
    plan = tasks.Blueprint.of(plain, "none")
    model: Any = nnx.eval_shape(lambda: plain.model(nnx.Rngs(0)))
    assert weights.shapes(model).keys() == found.keys()
    weights.fill(model, found, "the run")
    np.testing.assert_array_equal(plain.predictor(plan.graph)(plan.split(model), image), label)
    c.steps = 1
    c.optimizer.warmup_steps = 0
    assert start(c, tmp_path / "plain")[0]["loss"] != rows[0]["loss"]


def test_an_edited_stage_is_what_decoders_read():
    """An edit behind a stage is in the map of its tap and in all later ones, so in a segmenter's
    finest map and in the map of stage 3 that a C4 detector reads; contexts follow one another;
    class token and padding of a ViT stay.
    """
    graph, state = nnx.split(create("tinyclip", image_size=(64, 64)))

    @jax.jit
    def run(amount):
        encoder = nnx.merge(graph, state)
        with encoder.editing({0: lambda x: x + amount}), encoder.editing({0: lambda x: 2 * x}):
            return encoder(images(2))

    before, after = run(0.0), run(1.0)
    np.testing.assert_allclose(after[0], before[0] + 2, rtol=1e-6)
    for one, other in zip(after[1:], before[1:], strict=True):
        assert np.any(one != other)

    head = C4Config()
    c = DetectorConfig(num_classes=2, encoder="tinyclip", image_size=(64, 64), head=head)
    detector = nnx.eval_shape(lambda: Detector(c, rngs=nnx.Rngs(0)))
    assert detector.backbone.config.taps[detector.read[0]] == 2
    seen = []

    def encode(detector):
        with detector.backbone.editing({2: lambda x: seen.append(x.shape) or x}):
            return detector.encode(images(2))

    nnx.eval_shape(encode, detector)
    assert seen == [(2, 4, 4, 48)]

    vit_graph, vit_state = nnx.split(create("tiny8", image_size=(64, 64)))

    @jax.jit
    def tokens(amount):
        vit: Any = nnx.merge(vit_graph, vit_state)
        with vit.editing({1: lambda x: x + amount}):
            return vit.tokens(images(2))[1]

    before, after = tokens(0.0), tokens(1.0)
    np.testing.assert_array_equal(after[:, 0], before[:, 0])
    np.testing.assert_allclose(after[:, 1:], before[:, 1:] + 1, rtol=1e-5, atol=1e-6)
    short = create("tiny8", image_size=(64, 64), taps=(2,))
    with pytest.raises(ValueError, match="block 1 cannot be edited, as no segment ends"):
        short.editing({1: lambda x: x}).__enter__()
    with pytest.raises(ValueError, match="stage 7 is not built"):
        nnx.merge(graph, state).editing({7: lambda x: x}).__enter__()
