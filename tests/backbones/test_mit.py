"""The Mix Transformer against transformers, its stages and its reduced keys.

The golden file is made by tests/oracles/golden_segformer.py.
"""

import re
import zlib

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdg import backbones, weights
from jaxdg.backbones import Mit, MitConfig
from jaxdg.backbones.mit import Depthwise
from jaxdg.conversion import mapping, mit

SIZES = ((64, 96), (77, 101))  # halving exactly, and not
TRAINED = MitConfig(image_size=(64, 96), blocks=(2, 1, 3, 1), widths=(8, 16, 20, 32))


def wave(height, width):
    """The golden file's picture by its formula, [1, h, w, 3]."""
    y, x, c = np.ogrid[0:height, 0:width, 0:3]
    return (
        np.sin(0.33 * y + 0.5 * c) * np.cos(0.21 * x - 0.9 * c) + 0.3 * np.sin(0.9 * x + 1.7 * y)
    ).astype(np.float32)[None]


def drawn(name, shape):
    """The golden file's weights of the encoder by their formula."""
    numbers = np.random.default_rng(zlib.crc32(name.encode())).standard_normal(shape)
    numbers = (
        numbers * 1.2 / np.sqrt(np.prod(shape[1:]))
        if len(shape) > 1
        else 0.3 * numbers + name.endswith("weight")
    )
    small = r"(proj|self\.sr|output\.dense|dense2|patch_embeddings\.\d\.layer_norm)\."
    return (numbers * (3e-3 if re.search(small, name) else 1)).astype(np.float32)


def run(encoder, images, key=None):
    """The encoder's outputs, compiled as the training code does it: pure state in, arrays out."""
    graph, state = nnx.split(encoder)
    return jax.jit(lambda state, images: nnx.merge(graph, state)(images, key))(
        state, jnp.asarray(images)
    )


@pytest.fixture(scope="module")
def archive(golden):
    with np.load(golden / "segformer.npz") as file:
        return dict(file)


@pytest.fixture(scope="module")
def file(archive, tmp_path_factory):
    """The golden encoder by its published names, through the conversion, as a jaxdg file."""
    shapes = {name: tuple(map(int, shape)) for name, *shape in map(str.split, archive["names"])}
    module = nnx.eval_shape(lambda: Mit(TRAINED, rngs=nnx.Rngs(0)))
    converted = mapping.to_flax(
        module, mit.layouts(), list(shapes), lambda name: drawn(name, shapes[name])
    )
    assert converted.layout.name == "transformers"
    assert all(name.startswith("decode_head.") for name in converted.left_out)
    path = tmp_path_factory.mktemp("mit") / "random.safetensors"
    weights.save(converted.tensors, path, {})
    return path


@pytest.fixture(scope="module")
def build(file):
    """`build(taps=.., ..)`: an encoder that differs from the golden one in these fields, with its
    weights.
    """

    def make(**fields):
        encoder = nnx.eval_shape(
            lambda: Mit(MitConfig(**{**vars(TRAINED), **fields}), rngs=nnx.Rngs(0))
        )
        weights.load(encoder, file)
        return encoder

    return make


@pytest.mark.parametrize("size", SIZES)
def test_stages_equal_transformers(build, archive, size):
    """Every stage's features equal transformers' with the epsilons of NVlabs/SegFormer, also where
    sides do not halve.
    """
    features = run(build(image_size=size), wave(*size))
    for i, got in enumerate(features):
        np.testing.assert_allclose(
            got, archive["nvlabs/{}x{}/stage{}".format(*size, i)], rtol=0, atol=1e-4
        )


def test_epsilons_count(archive):
    """With transformers' own epsilons the golden features are others by far, so the comparison
    above tells which are computed.
    """
    for i in range(4):
        assert (
            np.abs(
                archive[f"nvlabs/64x96/stage{i}"] - archive[f"transformers/64x96/stage{i}"]
            ).max()
            > 0.1
        )


def test_taps_boundaries_and_recomputation_change_no_value(build, archive):
    """Stages up to the last tap alone are built, stacks end where freezing changes (blocks counted
    through all stages): equal features.
    """
    encoder = build(taps=(0, 2), boundaries=(0, 2, 4, 6), remat=True)
    assert (encoder.channels, encoder.config.strides) == ((8, 20), (4, 16))
    assert {name.split(".")[0] for name in weights.shapes(encoder)} == {
        f"{p}{i}" for p in ("patch_embed", "block", "norm") for i in (1, 2, 3)
    }
    assert [getattr(encoder, f"block{i}").ends for i in (1, 2, 3)] == [(0, 1), (0,), (1, 2)]
    for tap, got in zip((0, 2), run(encoder, wave(64, 96)), strict=True):
        np.testing.assert_allclose(got, archive[f"nvlabs/64x96/stage{tap}"], rtol=0, atol=1e-4)


def test_depthwise_convolution_equals_its_definition():
    """Each channel's 3x3 kernel over the zero-padded map, by loops."""
    rng = np.random.default_rng(0)
    layer = Depthwise(3, rngs=nnx.Rngs(0))
    kernel = rng.normal(size=(3, 3, 1, 3))
    bias = rng.normal(size=3)
    x = rng.normal(size=(1, 4, 5, 3))
    layer.kernel[...] = jnp.asarray(kernel, jnp.float32)
    layer.bias[...] = jnp.asarray(bias, jnp.float32)
    expected = np.zeros(x.shape) + bias
    for y, z, i, j in np.ndindex(4, 5, 3, 3):
        if 0 <= y + i - 1 < 4 and 0 <= z + j - 1 < 5:
            expected[0, y, z] += x[0, y + i - 1, z + j - 1] * kernel[i, j, 0]
    np.testing.assert_allclose(layer(jnp.asarray(x, jnp.float32)), expected, atol=1e-5)


def test_drop_path_drops_branches_of_samples(build):
    """With a key equal samples come out differently, and the more so the deeper the stage."""
    features = run(
        build(drop_path=0.9, taps=(0, 2)), np.repeat(wave(64, 96), 8, axis=0), jax.random.key(1)
    )
    first, last = (len(np.unique(np.asarray(f).sum((1, 2, 3)).round(3))) for f in features)
    assert 1 <= first < last


def test_bfloat16_compute_is_close(build, archive):
    """Half precision in the matrix products, float32 parameters: within 6 % of the float32
    features.
    """
    encoder = build(dtype="bfloat16")
    assert {tensor.dtype for tensor in weights.tensors(encoder).values()} == {np.dtype(np.float32)}
    for i, features in enumerate(run(encoder, wave(64, 96))):
        expected = archive[f"nvlabs/64x96/stage{i}"]
        assert features.dtype == jnp.bfloat16
        error = np.linalg.norm(np.asarray(features, np.float32) - expected) / np.linalg.norm(
            expected
        )
        assert 0 < error < 6e-2, (i, error)


def test_all_parameters_learn():
    """Gradients of two stages, with reduced keys and without, are finite and nowhere all zero, and
    steps along them lower the loss.
    """
    config = MitConfig(
        image_size=(64, 72),
        blocks=(2, 1, 1, 1),
        widths=(8, 16, 20, 32),
        reductions=(8, 1, 2, 1),
        drop_path=0.1,
        taps=(0, 1),
    )
    graph, state = nnx.split(nnx.eval_shape(lambda: Mit(config, rngs=nnx.Rngs(0))))
    rng = np.random.default_rng(0)

    def fill(p):
        return (
            rng.normal(size=p.shape) / np.sqrt(np.prod(p.shape[1:-1])) + (len(p.shape) < 3)
        ).astype(np.float32)

    state = jax.tree.map(fill, state)
    images = jnp.asarray(np.concatenate([wave(64, 72), -wave(64, 72)]))
    sign = jnp.asarray([1.0, -1.0]).reshape(2, 1, 1, 1)

    @jax.jit
    def step(state, key):
        def loss(state):
            return sum(jnp.mean((f - sign) ** 2) for f in nnx.merge(graph, state)(images, key))

        value, grads = jax.value_and_grad(loss)(state)
        return value, grads, jax.tree.map(lambda p, g: p - 0.05 * g, state, grads)

    losses = []
    for i in range(20):
        value, grads, state = step(state, jax.random.key(i))
        losses.append(float(value))
        for path, leaf in nnx.to_flat_state(grads) if i == 0 else ():
            assert np.isfinite(leaf[...]).all(), path
            assert np.abs(leaf[...]).max() > 0, path
    assert losses[-1] < 0.8 * losses[0], losses


def test_sizes_that_do_not_fit_are_refused(build):
    """Images of another size than built for, and images too small for one reduced key: one line
    with what is right.
    """
    with pytest.raises(
        ValueError,
        match=r"built for 64x96 images and got 64x64; create it with image_size=\(64, 64\)",
    ):
        build()(jnp.zeros((1, 64, 64, 3)))
    with pytest.raises(
        ValueError,
        match=(
            r"image_size 16x64 is too small for this encoder, whose keys join squares of 32 pixels"
        ),
    ):
        backbones.create("mit_b0", image_size=(16, 64), taps=(0, 1))
    graph, state = nnx.split(
        nnx.eval_shape(lambda: Mit(MitConfig(image_size=(29, 33)), rngs=nnx.Rngs(0)))
    )
    features = jax.eval_shape(
        lambda s, x: nnx.merge(graph, s)(x),
        state,
        jax.ShapeDtypeStruct((1, 29, 33, 3), jnp.float32),
    )
    assert [f.shape for f in features] == [
        (1, 8, 9, 32),
        (1, 4, 5, 64),
        (1, 2, 3, 160),
        (1, 1, 2, 256),
    ]


def test_the_zoo_has_the_published_sizes():
    """Parameters of the encoders in millions, as the paper states them (table 1a, b; encoder
    alone).
    """
    published = {
        "mit_b0": 3.4,
        "mit_b1": 13.1,
        "mit_b2": 24.2,
        "mit_b3": 44.0,
        "mit_b4": 60.8,
        "mit_b5": 81.4,
    }
    for name, millions in published.items():
        module = nnx.eval_shape(lambda name=name: backbones.create(name))
        count = sum(int(np.prod(shape)) for shape in weights.shapes(module).values())
        assert abs(count / 1e6 - millions) < 0.11, (name, count)
        np.testing.assert_allclose(
            255 * np.array(module.config.mean), (123.675, 116.28, 103.53), rtol=1e-6
        )
