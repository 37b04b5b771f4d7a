"""VFMNet's decoder against its authors' module.

The golden file holds outputs, statistics and gradients of `LinearHead` in tpy001/VFMSeg at
6b019b90, run with torch 2.14 in eval and train mode on the weights and taps that `drawn` makes,
without dropout.
"""

import zlib

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdg import weights
from jaxdg.backbones import MitConfig, VitConfig, zoo
from jaxdg.config import Config, MeshConfig, validated
from jaxdg.segmentation import Segmenter, SegmenterConfig, UpscalingConfig, UpscalingHead
from jaxdg.tasks import run_state as tasks
from jaxdg.training import sharding

WIDTH = 64
TAPS = 3
# Published name and shape, and what it is here.
TENSORS = {
    "fusion_conv.conv.weight": ((64, 192, 1, 1), "fusion_conv.kernel"),
    "fusion_conv.gn.weight": ((64,), "fusion_norm.scale"),
    "fusion_conv.gn.bias": ((64,), "fusion_norm.bias"),
    "output_upscaling.0.weight": ((64, 32, 2, 2), "upscaling1.kernel"),
    "output_upscaling.0.bias": ((32,), "upscaling1.bias"),
    "output_upscaling.1.weight": ((32,), "upscaling1_norm.scale"),
    "output_upscaling.1.bias": ((32,), "upscaling1_norm.bias"),
    "output_upscaling.1.running_mean": ((32,), "upscaling1_norm.mean"),
    "output_upscaling.1.running_var": ((32,), "upscaling1_norm.var"),
    "output_upscaling.3.weight": ((32, 16, 2, 2), "upscaling2.kernel"),
    "output_upscaling.3.bias": ((16,), "upscaling2.bias"),
    "conv_seg.weight": ((5, 16, 1, 1), "classifier.kernel"),
    "conv_seg.bias": ((5,), "classifier.bias"),
}


def drawn(name, shape):
    """The golden file's weights and taps by their formula."""
    numbers = np.random.default_rng(zlib.crc32(name.encode())).standard_normal(shape)
    if name.endswith("running_var"):
        return np.exp(0.5 * numbers).astype(np.float32)
    if len(shape) > 1:
        return (numbers * 1.2 / np.sqrt(shape[1])).astype(np.float32)
    return (0.3 * numbers + name.endswith("weight")).astype(np.float32)


def moved(name, tensor):
    """A tensor with the axes that it has here."""
    if name.startswith("output_upscaling") and tensor.ndim == 4:
        return tensor.transpose(2, 3, 0, 1)
    return tensor[:, :, 0, 0].T if tensor.ndim == 4 else tensor


def make_head(dtype="float32"):
    """The golden decoder."""
    config = UpscalingConfig(num_classes=5, width=WIDTH, dtype=dtype)
    head = nnx.eval_shape(lambda: UpscalingHead(config, (WIDTH,) * TAPS, rngs=nnx.Rngs(0)))
    tensors = {ours: moved(n, drawn(n, shape)) for n, (shape, ours) in TENSORS.items()}
    weights.fill(head, tensors, "the golden file")
    return head


@pytest.fixture(scope="module")
def archive(golden):
    with np.load(golden / "upscaling.npz") as file:
        return dict(file)


@pytest.fixture(scope="module")
def taps():
    """The golden file's taps, [b, h, w, c]."""
    maps = (8 * drawn(f"tap{i}", (2, WIDTH, 3, 4)) for i in range(TAPS))
    return tuple(jnp.asarray(x.transpose(0, 2, 3, 1)) for x in maps)


@jax.jit(static_argnames=("graph", "train"))
def run(graph, state, taps, key=None, train=False):
    """Output, and statistics after it."""
    model = nnx.merge(graph, state, copy=True)
    return model(taps, key, train), nnx.state(model, nnx.BatchStat)


@jax.jit(static_argnums=0)
def gradients(graph, params, statistics, taps, label):
    """The loss in training and its gradients by parameters and taps."""

    def loss(params, taps):
        head = nnx.merge(graph, params, statistics, copy=True)
        return head.loss(head(taps, train=True), label, head.loss_denominator(label))[
            "cross_entropy"
        ]

    return jax.value_and_grad(loss, argnums=(0, 1))(params, taps)


def test_scores_and_statistics_equal_the_authors(archive, taps):
    """Class scores in evaluation and in training, and the running statistics after a step."""
    graph, state = nnx.split(make_head())
    scores, _ = run(graph, state, taps)
    np.testing.assert_allclose(scores, archive["eval"], rtol=0, atol=1e-5)
    scores, statistics = run(graph, state, taps, train=True)
    np.testing.assert_allclose(scores, archive["train"], rtol=0, atol=1e-5)
    norm = statistics["upscaling1_norm"]
    np.testing.assert_allclose(norm["mean"][...], archive["mean"], rtol=0, atol=1e-6)
    before = drawn("output_upscaling.1.running_var", (32,))
    n = 2 * 6 * 8  # torch's running variance is that of a sample
    step = (norm["var"][...] - 0.9 * before) * n / (n - 1)
    np.testing.assert_allclose(0.9 * before + step, archive["var"], rtol=1e-5)


def test_gradients_equal_the_authors(archive, taps):
    """The loss and its gradients are theirs times the labelled share of the pixels."""
    graph, params, statistics = nnx.split(make_head(), nnx.Param, ...)
    label = jnp.asarray(archive["label"])
    share = (archive["label"] != 255).mean()
    assert 0.6 < share < 0.8
    loss, (found, by_taps) = gradients(graph, params, statistics, taps, label)
    np.testing.assert_allclose(loss * share, archive["loss"], rtol=1e-5)
    found = weights.tensors(nnx.merge(graph, found, statistics))
    for name, (_, ours) in TENSORS.items():
        if "running" in name:
            continue
        expected = moved(name, archive[f"grad/{name}"])
        if name == "output_upscaling.0.bias":  # the normalisation takes it away
            np.testing.assert_allclose(found[ours], 0, atol=1e-7)
            continue
        assert np.linalg.norm(found[ours] * share - expected) < 1e-4 * np.linalg.norm(expected)
    for i, x in enumerate(by_taps):
        expected = archive[f"grad/tap{i}"].transpose(0, 2, 3, 1)
        assert np.linalg.norm(x * share - expected) < 1e-4 * np.linalg.norm(expected)


def test_published_size():
    """19 classes on four taps of 1024 channels: the parameters of VFMNet's head."""
    head = nnx.eval_shape(
        lambda: UpscalingHead(UpscalingConfig(num_classes=19), (1024,) * 4, rngs=nnx.Rngs(0))
    )
    params = jax.tree.leaves(nnx.state(head, nnx.Param))
    assert sum(leaf.size for leaf in params) == 6_824_467


def test_dropout_is_unbiased(taps):
    """Before the linear classifier: over many keys scores average to those without a key, and each
    key gives others.
    """
    graph, state = nnx.split(make_head())
    plain, _ = run(graph, state, taps)
    keys = jax.random.split(jax.random.key(0), 1000)
    drops = jax.jit(jax.vmap(lambda key: nnx.merge(graph, state)(taps, key)))(keys)
    spread = drops.std(axis=0)
    assert spread.min() > 0
    np.testing.assert_array_less(np.abs(drops.mean(axis=0) - plain), 5 * spread / 1000**0.5)


def test_bfloat16_compute_is_close(taps):
    """Half precision stays within 2 % of the scores; parameters and scores are float32."""
    expected, _ = run(*nnx.split(make_head()), taps)
    graph, state = nnx.split(make_head("bfloat16"))
    scores, _ = run(graph, state, tuple(x.astype(jnp.bfloat16) for x in taps))
    assert scores.dtype == jnp.float32
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(state))
    assert 0 < np.linalg.norm(scores - expected) < 2e-2 * np.linalg.norm(expected)


def test_eight_devices_agree():
    """With a row each, the loss and its gradients are those of one device that holds all rows: the
    statistics are the global batch's.
    """
    rng = np.random.default_rng(0)
    # Rows differ much in mean, so that statistics over a device's own row would be others.
    maps = tuple(
        (rng.normal(size=(8, 3, 4, WIDTH)) + 3 * rng.normal(size=(8, 1, 1, 1))).astype(np.float32)
        for _ in range(TAPS)
    )
    label = rng.integers(0, 5, (8, 12, 16)).astype(np.uint8)
    label[:, :5] = 255
    # In float64: a bias before a norm has no gradient but what rounding leaves.
    with jax.enable_x64(True):
        maps = tuple(x.astype(np.float64) for x in maps)
        graph, params, statistics = nnx.split(make_head("float64"), nnx.Param, ...)
        params, statistics = jax.tree.map(lambda x: np.asarray(x, np.float64), (params, statistics))
        expected_loss, expected = gradients(graph, params, statistics, maps, label)
        mesh = sharding.make_mesh(MeshConfig(8, 1))
        state = jax.device_put((params, statistics), sharding.replicated(mesh))
        placed = sharding.to_devices(
            {"label": label} | {f"tap{i}": x for i, x in enumerate(maps)}, mesh
        )
        label = placed.pop("label")
        loss, found = gradients(graph, *state, tuple(placed.values()), label)
    np.testing.assert_allclose(loss, expected_loss, rtol=1e-5)

    def close(found, expected):
        assert found.dtype == expected.dtype == np.float64
        np.testing.assert_allclose(
            found, expected, rtol=0, atol=1e-5 * np.abs(expected).max() + 1e-8
        )

    jax.tree.map(close, found, expected)


@pytest.fixture
def tiny(monkeypatch):
    """Small encoders of both kinds in the zoo."""
    vit = VitConfig(width=16, depth=4, heads=2, patch_size=8, taps=(0, 1, 2, 3))
    mit = MitConfig(blocks=(1, 1, 1, 1), widths=(8, 16, 20, 32))
    monkeypatch.setitem(zoo.ZOO, "tiny_plain", zoo.Entry(vit))
    monkeypatch.setitem(zoo.ZOO, "tiny_levels", zoo.Entry(mit))


@pytest.mark.parametrize(
    ("encoder", "taps", "joined", "finest"),
    [
        ("tiny_plain", (), 64, (32, 48)),
        ("tiny_plain", (1, 3), 32, (32, 48)),
        ("tiny_levels", (2,), 20, (16, 24)),
    ],
)
def test_any_maps_of_one_size_serve(tiny, encoder, taps, joined, finest):
    """By the run's settings: all taps of a plain encoder, some, or one stage of another; scores are
    four times as fine.
    """
    config = Config()
    config.model.encoder = encoder
    config.model.taps = taps
    config.model.pyramid = "none"
    config.model.decoder = "upscaling"
    config.model.upscaling.width = 96
    config.data.crop = (64, 96)
    model = nnx.eval_shape(lambda: tasks.make_task(validated(config)).model(nnx.Rngs(0)))
    shapes = weights.shapes(model.head)
    assert shapes["fusion_conv.kernel"] == (joined, 96)
    assert shapes["upscaling2.kernel"] == (2, 2, 48, 24)
    graph, state = nnx.split(model)
    images = jax.ShapeDtypeStruct((2, 64, 96, 3), jnp.float32)
    scores = jax.eval_shape(lambda s, x: nnx.merge(graph, s)(x), state, images)
    assert (scores.shape, scores.dtype) == ((2, *finest, 19), jnp.float32)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"pyramid": "layer"},
            r"decoder upscaling joins maps of one size, and model\.pyramid 'layer' makes four sizes"
            r" of them; set model\.pyramid to none",
        ),
        (
            {"encoder": "tiny_levels"},
            r"decoder upscaling joins maps of one size, and tiny_levels gives 4 with 4, 8, 16, 32"
            r" pixels a feature; set model\.taps to some of one size",
        ),
        (
            {"decoder": UpscalingConfig(num_classes=7, width=48)},
            r"model\.upscaling\.width is 48; allowed: multiples of 32",
        ),
    ],
)
def test_what_does_not_fit_is_refused(tiny, fields, message):
    """A pyramid, maps of several sizes, a width that the groups do not divide: one line."""
    decoder = UpscalingConfig(num_classes=7, width=32)
    options = dict(num_classes=7, encoder="tiny_plain", image_size=(32, 32), decoder=decoder)
    with pytest.raises(ValueError, match=message):
        nnx.eval_shape(lambda: Segmenter(SegmenterConfig(**options | fields), rngs=nnx.Rngs(0)))
