"""DeiT-III against timm, and the laws of LayerScale.

The golden file is made by tests/oracles/golden_deit3.py.
"""

import dataclasses

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdg import backbones, weights
from jaxdg.backbones import Deit3, Deit3Config
from jaxdg.conversion import deit3
from tests.backbones.drawn import random_file, run, trained_steps, wave

SIZES = (
    (20, 20),
    (36, 36),
    (16, 32),
    (23, 30),
)  # as trained; enlarged; not square; sides that the patch does not divide
TRAINED = Deit3Config(image_size=(20, 20), patch_size=4, width=24, depth=3, heads=2, taps=(0, 1, 2))


@pytest.fixture(scope="module")
def build(tmp_path_factory):
    """`build(taps=.., ..)`: an encoder that differs from the trained one in these fields, with the
    golden weights.
    """

    def make(config):
        return nnx.eval_shape(lambda: Deit3(config, rngs=nnx.Rngs(0)))

    path = random_file(
        make(TRAINED), deit3.layouts()[0], tmp_path_factory.mktemp("deit3") / "random.safetensors"
    )

    def loaded(**fields):
        encoder = make(Deit3Config(**{**vars(TRAINED), **fields}))
        weights.load(encoder, path)
        return encoder

    return loaded


@pytest.mark.parametrize("size", SIZES, ids=lambda size: "{}x{}".format(*size))
def test_tokens_equal_timm(build, golden, size):
    """Every block's tokens, class token included, equal timm's at native, enlarged, oblong and
    undivided sizes.
    """
    with np.load(golden / "deit3.npz") as archive:
        expected = archive["tokens/{}x{}".format(*size)]
    np.testing.assert_allclose(
        np.stack(run(build(image_size=size), wave(*size))), expected, rtol=0, atol=1e-4
    )


def test_features_are_the_patch_tokens_as_a_map(build, golden):
    """Calling the encoder gives the tokens without the class token, row by row."""
    with np.load(golden / "deit3.npz") as archive:
        expected = archive["tokens/16x32"]
    features = run(build(image_size=(16, 32), taps=(0, 2)), wave(16, 32), method="__call__")
    assert [f.shape for f in features] == [(1, 4, 8, 24)] * 2
    for feature, tap in zip(features, (0, 2), strict=True):
        np.testing.assert_allclose(feature[0].reshape(32, 24), expected[tap, 0, 1:], atol=1e-4)


def test_branches_are_scaled_by_channel(build):
    """Tripled `gamma` of the attention triples what its branch adds; a branch that drop path leaves
    out adds nothing.
    """
    encoder = build(taps=(0,))
    graph, state = nnx.split(encoder.blocks)
    x = jnp.asarray(run(encoder, wave(20, 20))[0])
    scale = jnp.zeros((1, 2, 1, 1, 1))
    attention = scale.at[:, 0].set(1.0)
    blocks = jax.jit(lambda state, scale: nnx.merge(graph, state)(x, scale)[0])
    np.testing.assert_array_equal(blocks(state, scale), x)
    once = blocks(state, attention) - x
    tripled = jax.tree_util.tree_map_with_path(
        lambda path, p: 3 * p if "'ls1'" in jax.tree_util.keystr(path) else p, state
    )
    np.testing.assert_allclose(blocks(tripled, attention) - x, 3 * once, rtol=1e-4, atol=1e-5)
    assert np.abs(once).max() > 0.1


def test_bfloat16_compute_is_close(build, golden):
    """Half precision in the matrix products, float32 parameters: within 2 % of timm's float32
    tokens.
    """
    with np.load(golden / "deit3.npz") as archive:
        exact = archive["tokens/20x20"]
    encoder = build(dtype="bfloat16")
    assert {tensor.dtype for tensor in weights.tensors(encoder).values()} == {np.dtype(np.float32)}
    tokens = run(encoder, wave(20, 20))
    assert {t.dtype for t in tokens} == {jnp.dtype("bfloat16")}
    error = np.linalg.norm(
        np.stack([np.asarray(t, np.float32) for t in tokens]) - exact
    ) / np.linalg.norm(exact)
    assert 0 < error < 2e-2, error


def test_it_trains(build):
    """Every parameter has a finite gradient that is not zero, and gradient descent lowers a loss on
    the features.
    """
    losses, gradients = trained_steps(build(taps=(1,)), wave(20, 20))
    assert losses[-1] < 0.8 * losses[0], losses
    for path, gradient in jax.tree_util.tree_leaves_with_path(gradients):
        assert 0 < np.abs(gradient).max() < np.inf, jax.tree_util.keystr(path)


def test_the_zoo_states_the_published_encoders(monkeypatch):
    """Sizes and statistics are the authors'; from scratch branches start at 1e-4, as theirs."""
    for name, width, depth, heads in (("deit3_b16", 768, 12, 12), ("deit3_l16", 1024, 24, 16)):
        config = backbones.entry(name).config
        assert (config.width, config.depth, config.heads, config.patch_size, config.image_size) == (
            width,
            depth,
            heads,
            16,
            (224, 224),
        )
        np.testing.assert_allclose(255 * np.array(config.mean), (123.675, 116.28, 103.53))
    monkeypatch.setitem(
        backbones.ZOO, "tiny", backbones.zoo.Entry(dataclasses.replace(TRAINED, taps=(2,)))
    )
    scratch = weights.tensors(backbones.create("tiny"))
    for i in range(3):
        np.testing.assert_allclose(scratch[f"blocks.{i}.ls1.gamma"], 1e-4)
        np.testing.assert_allclose(scratch[f"blocks.{i}.ls2.gamma"], 1e-4)
