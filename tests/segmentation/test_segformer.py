"""SegFormer's decoder, alone and with its encoder, against transformers (golden file made by
tests/oracles/golden_segformer.py) and NumPy.
"""

import re
import zlib

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdg import weights
from jaxdg.backbones import MitConfig, zoo
from jaxdg.config import Config, MeshConfig, validated
from jaxdg.conversion import mapping, mit
from jaxdg.segmentation import (
    LinearHead,
    SegformerConfig,
    SegformerHead,
    Segmenter,
    SegmenterConfig,
    resize_scores,
)
from jaxdg.tasks import run_state as tasks
from jaxdg.training import sharding

SIZES = ((64, 96), (77, 101))
ENCODER = MitConfig(blocks=(2, 1, 3, 1), widths=(8, 16, 20, 32))


def wave(height, width):
    """The golden file's picture by its formula, [1, h, w, 3]."""
    y, x, c = np.ogrid[0:height, 0:width, 0:3]
    return (
        np.sin(0.33 * y + 0.5 * c) * np.cos(0.21 * x - 0.9 * c) + 0.3 * np.sin(0.9 * x + 1.7 * y)
    ).astype(np.float32)[None]


def drawn(name, shape):
    """The golden file's weights by their formula."""
    numbers = np.random.default_rng(zlib.crc32(name.encode())).standard_normal(shape)
    if name.endswith("running_var"):
        return np.exp(0.5 * numbers).astype(np.float32)
    numbers = (
        numbers * 1.2 / np.sqrt(np.prod(shape[1:]))
        if len(shape) > 1
        else 0.3 * numbers + name.endswith("weight")
    )
    small = r"encoder.*(proj|self\.sr|output\.dense|dense2|patch_embeddings\.\d\.layer_norm)\."
    return (numbers * (3e-3 if re.search(small, name) else 1)).astype(np.float32)


@pytest.fixture(scope="module")
def archive(golden):
    with np.load(golden / "segformer.npz") as file:
        return dict(file)


@pytest.fixture(scope="module")
def source(archive):
    """The golden segmenter's tensors by their published names."""
    shapes = {name: tuple(map(int, shape)) for name, *shape in map(str.split, archive["names"])}
    return {name: drawn(name, shape) for name, shape in shapes.items()}


@pytest.fixture(scope="module")
def head_tensors(source):
    """Those of its decoder by our names, renamed and transposed by hand."""
    own = {
        name.removeprefix("decode_head."): tensor
        for name, tensor in source.items()
        if name.startswith("decode_head.")
    }
    tensors = {
        "linear_fuse.kernel": own["linear_fuse.weight"][:, :, 0, 0].T,
        "classifier.kernel": own["classifier.weight"][:, :, 0, 0].T,
    }
    tensors |= {f"linear_c.{i}.kernel": own[f"linear_c.{i}.proj.weight"].T for i in range(4)}
    tensors |= {f"linear_c.{i}.bias": own[f"linear_c.{i}.proj.bias"] for i in range(4)} | {
        "classifier.bias": own["classifier.bias"]
    }
    norm = {"scale": "weight", "bias": "bias", "mean": "running_mean", "var": "running_var"}
    return tensors | {
        f"batch_norm.{ours}": own[f"batch_norm.{theirs}"] for ours, theirs in norm.items()
    }


@pytest.fixture(scope="module")
def head(head_tensors):
    """The golden decoder."""
    head = nnx.eval_shape(
        lambda: SegformerHead(
            SegformerConfig(num_classes=5, hidden=12), ENCODER.channels, rngs=nnx.Rngs(0)
        )
    )
    weights.fill(head, head_tensors, "the golden file")
    return head


@pytest.mark.parametrize("size", SIZES)
def test_scores_equal_transformers(head, archive, size):
    """Class scores from the golden features equal transformers', though levels are mixed before
    they are enlarged.
    """
    features = tuple(
        jnp.asarray(archive["nvlabs/{}x{}/stage{}".format(*size, i)]) for i in range(4)
    )
    np.testing.assert_allclose(
        head(features), archive["nvlabs/{}x{}/scores".format(*size)], rtol=0, atol=1e-4
    )


def test_the_whole_model_equals_transformers(head_tensors, source, archive, monkeypatch):
    """Encoder and decoder as a segmenter, at an odd size and whatever the pyramid setting: scores
    equal transformers'.
    """
    monkeypatch.setitem(zoo.ZOO, "golden_mit", zoo.Entry(ENCODER))
    config = SegmenterConfig(
        num_classes=5,
        encoder="golden_mit",
        image_size=SIZES[1],
        decoder=SegformerConfig(num_classes=5, hidden=12),
        pyramid="layer",
    )
    model = nnx.eval_shape(lambda: Segmenter(config, rngs=nnx.Rngs(0)))
    encoder = mapping.to_flax(
        model.backbone, mit.layouts(), list(source), source.__getitem__
    ).tensors
    tensors = {f"backbone.{name}": tensor for name, tensor in encoder.items()}
    weights.fill(
        model,
        tensors | {f"head.{name}": tensor for name, tensor in head_tensors.items()},
        "the golden file",
    )
    graph, state = nnx.split(model)
    scores, large = jax.jit(lambda s, x: (nnx.merge(graph, s)(x), nnx.merge(graph, s).scores(x)))(
        state, jnp.asarray(wave(*SIZES[1]))
    )
    np.testing.assert_allclose(scores, archive["nvlabs/77x101/scores"], rtol=0, atol=1e-4)
    np.testing.assert_allclose(
        large,
        resize_scores(jnp.asarray(archive["nvlabs/77x101/scores"]), SIZES[1]),
        rtol=0,
        atol=1e-4,
    )


def test_training_normalises_with_the_global_batch(head, head_tensors):
    """On eight devices with two rows each: output and running statistics are those of all rows
    together, concatenated as in the paper.
    """
    rng = np.random.default_rng(0)
    # Rows differ much in mean, so that statistics over a device's own rows would be others.
    features = [
        (rng.normal(size=(16, s, s + 1, c)) + 3 * rng.normal(size=(16, 1, 1, 1))).astype(np.float32)
        for s, c in zip((8, 4, 2, 1), ENCODER.channels, strict=True)
    ]
    t = head_tensors
    embedded = [
        x @ t[f"linear_c.{i}.kernel"] + t[f"linear_c.{i}.bias"] for i, x in enumerate(features)
    ]
    whole = np.concatenate(
        [resize_scores(jnp.asarray(x), (8, 9)) for x in reversed(embedded)],
        axis=-1,
        dtype=np.float64,
    )
    mixed = whole @ t["linear_fuse.kernel"]
    mean = mixed.mean((0, 1, 2))
    var = mixed.var((0, 1, 2))
    normal = np.maximum(
        (mixed - mean) / np.sqrt(var + 1e-5) * t["batch_norm.scale"] + t["batch_norm.bias"], 0
    )
    expected = normal @ t["classifier.kernel"] + t["classifier.bias"]

    graph, state = nnx.split(head)
    mesh = sharding.make_mesh(MeshConfig(8, 1))

    @jax.jit
    def run(state, features):
        model = nnx.merge(graph, state, copy=True)
        return model(features, train=True), nnx.state(model, nnx.BatchStat)

    placed = sharding.to_devices({str(i): x for i, x in enumerate(features)}, mesh)
    state = jax.device_put(state, sharding.replicated(mesh))
    scores, statistics = run(state, tuple(placed.values()))
    np.testing.assert_allclose(scores, expected, rtol=0, atol=2e-4)
    for name, batch in (("mean", mean), ("var", var)):
        expected = 0.9 * t[f"batch_norm.{name}"] + 0.1 * batch
        np.testing.assert_allclose(
            statistics["batch_norm"][name][...], expected, rtol=1e-4, atol=1e-5
        )


def test_dropout_drops_whole_channels_of_samples():
    """Seen through a classifier that copies channels: with a key a tenth of them are 0 in a sample,
    the others larger by a ninth.
    """
    head = nnx.eval_shape(
        lambda: SegformerHead(SegformerConfig(64, hidden=64), (64,), rngs=nnx.Rngs(0))
    )
    eye = np.eye(64, dtype=np.float32)
    one = np.ones(64, np.float32)
    zero = np.zeros(64, np.float32)
    linear = {
        "linear_c.0.kernel": eye,
        "linear_c.0.bias": zero,
        "linear_fuse.kernel": eye,
        "classifier.kernel": eye,
        "classifier.bias": zero,
    }
    norm = {"scale": one, "bias": zero, "mean": zero, "var": one - np.float32(1e-5)}
    weights.fill(
        head, linear | {f"batch_norm.{name}": tensor for name, tensor in norm.items()}, "this test"
    )
    x = jnp.asarray(np.random.default_rng(0).uniform(1, 2, (20, 2, 3, 64)), jnp.float32)
    np.testing.assert_allclose(head((x,)), x, rtol=1e-5)
    ratio = np.asarray(head((x,), jax.random.key(0))) / np.asarray(x)
    kept = ratio[:, 0, 0] > 0
    np.testing.assert_allclose(
        ratio, np.broadcast_to(np.where(kept, 1 / 0.9, 0)[:, None, None], ratio.shape), rtol=1e-5
    )
    assert 0.87 < kept.mean() < 0.93
    assert len(np.unique(kept, axis=0)) > 15, "samples draw apart"


def test_loss_is_that_of_the_linear_head():
    """Both decoders' scores, divisor and loss are one function."""
    for name in ("scores", "loss_denominator", "loss"):
        assert getattr(SegformerHead, name) is getattr(LinearHead, name)


def test_bfloat16_compute_is_close(head, head_tensors, archive):
    """Half precision in the matrix products stays within 2 % of the scores; parameters and scores
    are float32.
    """
    half = nnx.eval_shape(
        lambda: SegformerHead(
            SegformerConfig(5, hidden=12, dtype="bfloat16"), ENCODER.channels, rngs=nnx.Rngs(0)
        )
    )
    weights.fill(half, head_tensors, "the golden file")
    features = tuple(jnp.asarray(archive[f"nvlabs/64x96/stage{i}"]) for i in range(4))
    scores = half(features)
    expected = head(features)
    assert scores.dtype == jnp.float32
    assert 0 < np.linalg.norm(scores - expected) < 2e-2 * np.linalg.norm(expected)


@pytest.mark.parametrize(
    ("encoder", "pyramid", "channels", "finest"),
    [
        ("mit_b0", "layer", (32, 64, 160, 256), (25, 40)),
        ("clip_rn50", "none", (256, 512, 1024, 2048), (25, 40)),
        ("augreg_ti16", "layer", (192,) * 4, (24, 40)),
        ("augreg_ti16", "none", (192,) * 4, (6, 10)),
    ],
)
def test_any_encoder_with_levels_serves(encoder, pyramid, channels, finest):
    """The decoder reads MiT, CLIP's ResNet, and a plain encoder with or without a pyramid; scores
    have the finest level's size.
    """
    config = Config()
    config.model.encoder = encoder
    config.model.pyramid = pyramid
    config.model.decoder = "segformer"
    config.data.crop = (100, 160)
    config.model.segformer.hidden = 24
    model = nnx.eval_shape(lambda: tasks.make_task(validated(config)).model(nnx.Rngs(0)))
    shapes = weights.shapes(model.head)
    assert [shapes[f"linear_c.{i}.kernel"] for i in range(4)] == [(c, 24) for c in channels]
    graph, state = nnx.split(model)
    for train in (False, True):

        def call(s, x, train=train):
            return nnx.merge(graph, s, copy=True)(x, jax.random.key(0), train)

        output = jax.eval_shape(call, state, jax.ShapeDtypeStruct((2, 100, 160, 3), jnp.float32))
        assert (output.shape, output.dtype) == ((2, *finest, 19), jnp.float32)
