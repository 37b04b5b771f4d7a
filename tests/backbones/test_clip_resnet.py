"""CLIP's ResNet against open_clip, its frozen BatchNorm and its attention pool.

The golden file is made by tests/oracles/golden_clip_resnet.py.
"""

import zlib

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdg import backbones, weights
from jaxdg.backbones import ClipResnet, ClipResnetConfig, resizing
from jaxdg.conversion import clip_resnet, mapping

SIZES = ((96, 96), (64, 96), (77, 101))  # as trained, not square, odd
TRAINED = ClipResnetConfig(
    image_size=(96, 96), blocks=(2, 1, 3, 1), widths=(16, 32, 64, 128), pool_grid=3, embedding=6
)


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
    if len(shape) > 1:
        return (
            numbers * (1 if "positional" in name else 1.2 / np.sqrt(np.prod(shape[1:])))
        ).astype(np.float32)
    return (
        (0.25 if "bn3.weight" in name else 1) * (0.3 * numbers + name.endswith("weight"))
    ).astype(np.float32)


@pytest.fixture(scope="module")
def archive(golden):
    with np.load(golden / "clip_resnet.npz") as file:
        return dict(file)


@pytest.fixture(scope="module")
def file(archive, tmp_path_factory):
    """The golden encoder by its published names, through the conversion, as a jaxdg file."""
    shapes = {name: tuple(map(int, shape)) for name, *shape in map(str.split, archive["names"])}
    module = nnx.eval_shape(lambda: ClipResnet(TRAINED, rngs=nnx.Rngs(0)))
    converted = mapping.to_flax(
        module, clip_resnet.layouts(), list(shapes), lambda name: drawn(name, shapes[name])
    )
    assert not converted.left_out
    path = tmp_path_factory.mktemp("clip_resnet") / "random.safetensors"
    weights.save(converted.tensors, path, {})
    return path


@pytest.fixture(scope="module")
def build(file):
    """`build(taps=.., ..)`: an encoder that differs from the golden one in these fields, with its
    weights.
    """

    def make(**fields):
        encoder = nnx.eval_shape(
            lambda: ClipResnet(ClipResnetConfig(**{**vars(TRAINED), **fields}), rngs=nnx.Rngs(0))
        )
        weights.load(encoder, file)
        return encoder

    return make


def run(encoder, images):
    """Features, embedding and dense embeddings, compiled as the training code does it: pure state
    in, arrays out.
    """
    graph, state = nnx.split(encoder)

    @jax.jit
    def call(state, images):
        model = nnx.merge(graph, state)
        features = model(images)
        return (
            (features, model.pool(features[-1]), model.pool_dense(features[-1]))
            if model.attnpool
            else (features, None, None)
        )

    return call(state, jnp.asarray(images))


@pytest.mark.parametrize("size", SIZES)
def test_stages_and_pool_equal_open_clip(build, archive, size):
    """Every stage's features and the pool's embedding, its positions resized if need be, equal
    open_clip's; so do the dense embeddings.
    """
    features, embedding, dense = run(build(image_size=size), wave(*size))
    h, w = size
    for i, got in enumerate(features):
        np.testing.assert_allclose(got, archive[f"{h}x{w}/stage{i}"], rtol=0, atol=1e-4)
    np.testing.assert_allclose(embedding, archive[f"{h}x{w}/pool"], rtol=0, atol=1e-4)
    np.testing.assert_allclose(dense, archive[f"{h}x{w}/dense"], rtol=0, atol=1e-4)


def test_the_pool_reads_its_positions(build):
    """Other positions give another embedding at any size, and those at another size are what
    `resize_positions` makes of them.
    """
    encoder = build()
    pool = encoder.attnpool
    x = jnp.asarray(np.random.default_rng(0).normal(size=(2, 2, 4, 128)), jnp.float32)
    learned = np.asarray(pool.positional_embedding[...])
    np.testing.assert_allclose(
        pool.positions(2, 4), resizing.resize_positions(learned[None], (2, 4), 1)[0], atol=1e-6
    )
    before = encoder.pool(x)
    pool.positional_embedding[...] = jnp.asarray(learned[::-1])
    assert np.abs(before - encoder.pool(x)).max() > 0.05


def test_equal_pixels_make_the_pool_dense(build):
    """Without positions, on a map of one colour, attending changes nothing: the embedding is that
    of each pixel by itself.
    """
    encoder = build()
    encoder.attnpool.positional_embedding[...] = jnp.zeros((10, 128))
    x = jnp.broadcast_to(
        jnp.asarray(np.random.default_rng(0).normal(size=(2, 1, 1, 128)), jnp.float32),
        (2, 3, 2, 128),
    )
    dense = encoder.pool_dense(x)
    np.testing.assert_allclose(
        dense, np.broadcast_to(encoder.pool(x)[:, None, None], dense.shape), atol=1e-5
    )


def test_taps_boundaries_and_recomputation_change_no_value(build, archive):
    """Stages up to the last tap alone are built, without the pool; stacks end where freezing
    changes: equal features.
    """
    encoder = build(taps=(0, 2), boundaries=(0, 2, 4), remat=True)
    assert (encoder.channels, encoder.config.strides) == ((16, 64), (4, 16))
    assert {name.split(".")[0] for name in weights.shapes(encoder)} == {
        f"{p}{i}" for p in ("conv", "bn", "layer") for i in (1, 2, 3)
    }
    assert [getattr(encoder, f"layer{i}").ends for i in (1, 2, 3)] == [(0, 1), (0,), (0, 1, 2)]
    features, _, _ = run(
        build(image_size=(64, 96), taps=(0, 2), boundaries=(0, 2, 4), remat=True), wave(64, 96)
    )
    for tap, got in zip((0, 2), features, strict=True):
        np.testing.assert_allclose(got, archive[f"64x96/stage{tap}"], rtol=0, atol=1e-4)
    with pytest.raises(
        ValueError,
        match=(
            r"the attention pool reads the last stage, which this encoder with taps \(0, 2\) does"
            r" not have"
        ),
    ):
        encoder.pool(features[-1])


def test_batch_norm_is_no_parameter(build):
    """Scale, bias and statistics are saved and loaded, but are no parameters, and a pass over a
    batch changes none of them.
    """
    encoder = build()
    names = {
        name for name in weights.shapes(encoder) if ".bn" in f".{name}" or ".downsample.1." in name
    }
    assert {name.rpartition(".")[2] for name in names} == {"scale", "bias", "mean", "var"}
    assert len(names) == 4 * (3 + 7 * 3 + 4)
    parameters = set(weights.slots(nnx.state(encoder, nnx.Param)))
    assert not names & parameters
    assert parameters | names == weights.shapes(encoder).keys()
    graph, state = nnx.split(encoder)

    def passed(state, images):
        model = nnx.merge(graph, state, copy=True)
        model(images)
        return nnx.state(model, nnx.BatchStat)

    jaxpr = jax.make_jaxpr(passed)(state, jnp.zeros((1, 96, 96, 3)))
    assert set(jaxpr.jaxpr.outvars) <= set(jaxpr.jaxpr.invars), (
        "statistics come out as they went in"
    )


def test_all_convolutions_learn(build):
    """Gradients are finite and not zero but for the pool, which no feature reads and `unread`
    names; steps along them lower the loss.
    """
    encoder = build(image_size=(64, 64))
    graph, params, rest = nnx.split(encoder, nnx.Param, ...)
    images = jnp.asarray(np.concatenate([wave(64, 64), -wave(64, 64)]))
    target = jnp.asarray([0.0, 1.0]).reshape(2, 1, 1, 1)

    @jax.jit
    def step(params):
        def loss(params):
            return sum(jnp.mean((f - target) ** 2) for f in nnx.merge(graph, params, rest)(images))

        value, grads = jax.value_and_grad(loss)(params)
        return value, grads, jax.tree.map(lambda p, g: p - 0.1 * g, params, grads)

    losses = []
    for i in range(20):
        value, grads, params = step(params)
        losses.append(float(value))
        for name, (path, *_) in weights.slots(grads).items() if i == 0 else ():
            gradient = dict(nnx.to_flat_state(grads))[path][...]
            assert np.isfinite(gradient).all()
            assert (
                (np.abs(gradient).max() == 0)
                == encoder.unused(name)
                == name.startswith("attnpool.")
            ), name
    assert losses[-1] < 0.8 * losses[0], losses


def test_drop_path_is_refused():
    """These networks have none: the message says so."""
    with pytest.raises(
        ValueError, match=r"drop_path is 0\.1, and CLIP's ResNets skip no branches; set it to 0"
    ):
        backbones.create("clip_rn50", drop_path=0.1)


def test_bfloat16_compute_is_close(build, archive):
    """Half precision in the convolutions: within 3 % of the float32 features; all stored tensors
    stay float32.
    """
    encoder = build(dtype="bfloat16")
    assert {tensor.dtype for tensor in weights.tensors(encoder).values()} == {np.dtype(np.float32)}
    features, embedding, _ = run(encoder, wave(96, 96))
    for got, name in zip(
        (*features, embedding), ("stage0", "stage1", "stage2", "stage3", "pool"), strict=True
    ):
        expected = archive[f"96x96/{name}"]
        assert got.dtype == jnp.bfloat16
        error = np.linalg.norm(np.asarray(got, np.float32) - expected) / np.linalg.norm(expected)
        assert 0 < error < 3e-2, (name, error)


def test_the_zoo_has_the_published_sizes():
    """Channels, embedding and parameters in millions (as torch counts them, BatchNorm's scale and
    bias too), and CLIP's normalisation.
    """
    for name, embedding, millions in (("clip_rn50", 1024, 38.3), ("clip_rn101", 512, 56.3)):
        module = nnx.eval_shape(lambda name=name: backbones.create(name))
        shapes = {
            name: shape
            for name, shape in weights.shapes(module).items()
            if not name.endswith((".mean", ".var"))
        }
        assert shapes["attnpool.c_proj.kernel"] == (2048, embedding)
        assert module.channels == (256, 512, 1024, 2048)
        assert abs(sum(int(np.prod(shape)) for shape in shapes.values()) / 1e6 - millions) < 0.06
        np.testing.assert_allclose(
            255 * np.array(module.config.mean), (122.7709, 116.7460, 104.0937), rtol=1e-5
        )
