"""DINOv3's vision transformer against transformers, and the laws of its rotation.

The golden file is made by tests/oracles/golden_dinov3.py.
"""

import dataclasses

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdg import backbones, weights
from jaxdg.backbones import Dinov3, Dinov3Config
from jaxdg.backbones.dinov3 import rotary_tables, rotate
from jaxdg.conversion import dinov3
from tests.backbones.drawn import random_file, run, trained_steps, wave

SIZES = (
    (20, 20),
    (36, 36),
    (16, 32),
    (23, 30),
)  # the last has sides that the patch does not divide
TRAINED = Dinov3Config(
    image_size=(20, 20), patch_size=4, width=32, depth=3, heads=2, taps=(0, 1, 2)
)


@pytest.fixture(scope="module")
def build(tmp_path_factory):
    """`build(taps=.., ..)`: an encoder that differs from the trained one in these fields, with the
    golden weights.
    """

    def make(config):
        return nnx.eval_shape(lambda: Dinov3(config, rngs=nnx.Rngs(0)))

    (layout,) = (layout for layout in dinov3.layouts(TRAINED) if layout.name == "transformers")
    path = random_file(
        make(TRAINED), layout, tmp_path_factory.mktemp("dinov3") / "random.safetensors"
    )

    def loaded(**fields):
        encoder = make(Dinov3Config(**{**vars(TRAINED), **fields}))
        weights.load(encoder, path)
        return encoder

    return loaded


@pytest.mark.parametrize("size", SIZES, ids=lambda size: "{}x{}".format(*size))
def test_tokens_equal_transformers(build, golden, size):
    """Every block's tokens, class token and registers included, equal transformers' at square,
    oblong and undivided sizes.
    """
    with np.load(golden / "dinov3.npz") as archive:
        expected = archive["tokens/{}x{}".format(*size)]
    np.testing.assert_allclose(
        np.stack(run(build(image_size=size), wave(*size))), expected, rtol=0, atol=1e-4
    )


@pytest.mark.parametrize("size", SIZES, ids=lambda size: "{}x{}".format(*size))
def test_rotary_tables_equal_transformers(golden, size):
    """Cosines and sines of every patch are transformers', which holds each twice, once for either
    half of a head's channels.
    """
    with np.load(golden / "dinov3.npz") as archive:
        expected = archive["rotation/{}x{}".format(*size)]
    tables = np.stack(jax.jit(lambda: rotary_tables((size[0] // 4, size[1] // 4), 16))())
    np.testing.assert_allclose(
        np.concatenate([tables, tables], axis=-1), expected, rtol=0, atol=1e-5
    )


def test_rotation_is_a_complex_product():
    """Channels j and j + d/2 turn as complex numbers by 2 pi centre / 100**(j / (d/4)), y before x;
    the first tokens and padding stay.
    """
    grid = (3, 5)
    dim = 12
    x = np.random.default_rng(0).standard_normal((2, 5 + 15 + 4, 3, dim)).astype(np.float32)
    expected = x.copy()
    for row in range(grid[0]):
        for column in range(grid[1]):
            for j in range(dim // 2):
                centre = (row + 0.5) / grid[0] if j < dim // 4 else (column + 0.5) / grid[1]
                angle = 2 * np.pi * (2 * centre - 1) / 100 ** (j % (dim // 4) / (dim // 4))
                token = x[:, 5 + row * grid[1] + column]
                turned = (token[..., j] + 1j * token[..., j + dim // 2]) * np.exp(1j * angle)
                expected[:, 5 + row * grid[1] + column, :, j] = turned.real
                expected[:, 5 + row * grid[1] + column, :, j + dim // 2] = turned.imag
    got = np.asarray(jax.jit(lambda x: rotate(x, *rotary_tables(grid, dim), 5))(x))
    np.testing.assert_allclose(got, expected, atol=1e-5)
    np.testing.assert_array_equal(got[:, :5], x[:, :5])
    np.testing.assert_array_equal(got[:, 20:], x[:, 20:])


def test_features_are_the_patch_tokens_as_a_map(build, golden):
    """Calling the encoder gives the tokens of the patches alone, row by row."""
    with np.load(golden / "dinov3.npz") as archive:
        expected = archive["tokens/16x32"]
    features = run(build(image_size=(16, 32), taps=(0, 2)), wave(16, 32), method="__call__")
    assert [f.shape for f in features] == [(1, 4, 8, 32)] * 2
    for feature, tap in zip(features, (0, 2), strict=True):
        np.testing.assert_allclose(feature[0].reshape(32, 32), expected[tap, 0, 5:], atol=1e-4)


def test_a_dropped_branch_adds_nothing(build):
    """Blocks whose branches drop path leaves out pass their input through; one branch scaled by 3
    adds three times as much.
    """
    encoder = build(taps=(0,))
    graph, state = nnx.split(encoder.blocks)
    x = jnp.asarray(run(encoder, wave(20, 20))[0])
    blocks = jax.jit(lambda scale: nnx.merge(graph, state)(x, scale)[0])
    none = jnp.zeros((1, 2, 1, 1, 1))
    np.testing.assert_array_equal(blocks(none), x)
    for branch in (0, 1):
        once = blocks(none.at[:, branch].set(1.0)) - x
        assert np.abs(once).max() > 0.1
        np.testing.assert_allclose(
            blocks(none.at[:, branch].set(3.0)) - x, 3 * once, rtol=1e-4, atol=1e-5
        )


def test_bfloat16_compute_is_close(build, golden):
    """Half precision in the matrix products, rotation in float32: within 2 % of transformers'
    float32 tokens.
    """
    with np.load(golden / "dinov3.npz") as archive:
        exact = archive["tokens/20x20"]
    encoder = build(dtype="bfloat16")
    assert {tensor.dtype for tensor in weights.tensors(encoder).values()} == {np.dtype(np.float32)}
    tokens = run(encoder, wave(20, 20))
    assert {t.dtype for t in tokens} == {jnp.dtype("bfloat16")}
    error = np.linalg.norm(
        np.stack([np.asarray(t, np.float32) for t in tokens]) - exact
    ) / np.linalg.norm(exact)
    assert 0 < error < 2e-2, error


def test_it_trains_with_and_without_remat(build):
    """Every parameter has a finite gradient that is not zero, the same with recomputed blocks, and
    descent lowers the loss.
    """
    losses, gradients = trained_steps(build(taps=(1,)), wave(20, 20))
    assert losses[-1] < 0.8 * losses[0], losses
    _, again = trained_steps(build(taps=(1,), remat=True), wave(20, 20), steps=1)
    for (path, gradient), other in zip(
        jax.tree_util.tree_leaves_with_path(gradients), jax.tree.leaves(again), strict=True
    ):
        scale = np.abs(gradient).max()
        assert 0 < scale < np.inf, jax.tree_util.keystr(path)
        np.testing.assert_allclose(gradient / scale, other / scale, atol=1e-4)


def test_the_zoo_states_the_published_encoders(monkeypatch):
    """Sizes, registers and statistics are the authors'; there are no learned positions; from
    scratch branches start at 1e-5.
    """
    for name, width, depth, heads in (("dinov3_b16", 768, 12, 12), ("dinov3_l16", 1024, 24, 16)):
        config = backbones.entry(name).config
        assert (config.width, config.depth, config.heads, config.patch_size, config.prefix) == (
            width,
            depth,
            heads,
            16,
            5,
        )
        np.testing.assert_allclose(255 * np.array(config.mean), (123.675, 116.28, 103.53))
    monkeypatch.setitem(
        backbones.ZOO, "tiny", backbones.zoo.Entry(dataclasses.replace(TRAINED, taps=(2,)))
    )
    scratch = weights.tensors(backbones.create("tiny"))
    assert {name for name in scratch if "blocks" not in name} == {
        "cls_token", "storage_tokens", "patch_embed.proj.kernel", "patch_embed.proj.bias"
    }  # fmt: skip
    for i in range(3):
        np.testing.assert_allclose(scratch[f"blocks.{i}.ls2.gamma"], 1e-5)
