"""DINOv2 against its authors' code, with and without registers.

The golden file is made by tests/oracles/golden_dinov2.py.
"""

import dataclasses
import math

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdg import backbones, weights
from jaxdg.backbones import Dinov2, Dinov2Config
from jaxdg.backbones.dinov2 import SwiGlu
from jaxdg.conversion import dinov2
from tests.backbones.drawn import drawn, random_file, run, trained_steps, wave

SIZES = (
    (20, 20),
    (36, 36),
    (16, 32),
    (12, 20),
)  # as trained; enlarged; not square; fewer rows alone
SMALL = dict(image_size=(20, 20), patch_size=4, width=24, depth=3, heads=2, taps=(0, 1, 2))
KINDS = {"plain": Dinov2Config(**SMALL), "registers": Dinov2Config(**SMALL, registers=4)}


@pytest.fixture(scope="module")
def build(tmp_path_factory):
    """`build(kind, taps=.., ..)`: an encoder that differs from the trained one in these fields,
    with the golden weights.
    """

    def make(config):
        return nnx.eval_shape(lambda: Dinov2(config, rngs=nnx.Rngs(0)))

    folder = tmp_path_factory.mktemp("dinov2")
    paths = {
        k: random_file(make(c), dinov2.layouts(c)[0], folder / f"{k}.safetensors")
        for k, c in KINDS.items()
    }

    def loaded(kind, **fields):
        encoder = make(Dinov2Config(**{**vars(KINDS[kind]), **fields}))
        weights.load(encoder, paths[kind])
        return encoder

    return loaded


@pytest.mark.parametrize("size", SIZES, ids=lambda size: "{}x{}".format(*size))
@pytest.mark.parametrize("kind", KINDS)
def test_tokens_equal_the_authors(build, golden, kind, size):
    """Every block's tokens, class token and registers included, equal the original's at native,
    enlarged and oblong sizes.
    """
    with np.load(golden / "dinov2.npz") as archive:
        expected = archive["{}/tokens/{}x{}".format(kind, *size)]
    np.testing.assert_allclose(
        np.stack(run(build(kind, image_size=size), wave(*size))), expected, rtol=0, atol=1e-4
    )


@pytest.mark.parametrize(
    "grid",
    [(36, 36), (37, 37), (37, 50), (18, 73), (16, 16)],
    ids=lambda grid: "{}x{}".format(*grid),
)
@pytest.mark.parametrize("kind", KINDS)
def test_positions_are_resized_as_the_authors_do_it(golden, kind, grid):
    """37x37 positions at crops of 504x504 and 518x518 and at oblong grids equal the original's
    rule, of which there are two.
    """
    with np.load(golden / "dinov2.npz") as archive:
        expected = archive["{}/positions/{}x{}".format(kind, *grid)]
        other = archive[
            "{}/positions/{}x{}".format("plain" if kind == "registers" else "registers", *grid)
        ]
    config = Dinov2Config(
        **{**vars(KINDS[kind]), "image_size": (14 * grid[0], 14 * grid[1]), "patch_size": 14}
    )
    encoder = nnx.eval_shape(lambda: Dinov2(config, rngs=nnx.Rngs(0)))
    fitted = encoder.adapt("pos_embed", drawn("pos_embed", (1, 1 + 37 * 37, 1)))
    np.testing.assert_allclose(fitted[0, :, 0], expected, rtol=0, atol=1e-5)
    assert (np.abs(expected - other).max() > 1e-3) == (grid != (37, 37)), (
        "the two rules are not the same"
    )


@pytest.mark.parametrize("kind", KINDS)
def test_features_are_the_patch_tokens_as_a_map(build, golden, kind):
    """Calling the encoder gives the tokens of the patches alone, row by row."""
    with np.load(golden / "dinov2.npz") as archive:
        expected = archive[f"{kind}/tokens/16x32"]
    features = run(build(kind, image_size=(16, 32), taps=(0, 2)), wave(16, 32), method="__call__")
    assert [f.shape for f in features] == [(1, 4, 8, 24)] * 2
    for feature, tap in zip(features, (0, 2), strict=True):
        np.testing.assert_allclose(feature[0].reshape(32, 24), expected[tap, 0, -32:], atol=1e-4)


def test_bfloat16_compute_is_close(build, golden):
    """Half precision in the matrix products: within 2 % of the original's float32 tokens."""
    with np.load(golden / "dinov2.npz") as archive:
        exact = archive["registers/tokens/20x20"]
    tokens = run(build("registers", dtype="bfloat16"), wave(20, 20))
    assert {t.dtype for t in tokens} == {jnp.dtype("bfloat16")}
    error = np.linalg.norm(
        np.stack([np.asarray(t, np.float32) for t in tokens]) - exact
    ) / np.linalg.norm(exact)
    assert 0 < error < 2e-2, error


def test_it_trains(build):
    """Every parameter, registers too, has a finite gradient that is not zero, and gradient descent
    lowers a loss on the features.
    """
    losses, gradients = trained_steps(build("registers", taps=(1,)), wave(20, 20))
    assert losses[-1] < 0.8 * losses[0], losses
    for path, gradient in jax.tree_util.tree_leaves_with_path(gradients):
        assert 0 < np.abs(gradient).max() < np.inf, jax.tree_util.keystr(path)


def test_the_zoo_states_the_published_encoders(monkeypatch):
    """Sizes, positions and statistics are the authors'; from scratch branches start at 1e-5, as in
    their training.
    """
    for size, width, depth, heads in (("s", 384, 12, 6), ("b", 768, 12, 12), ("l", 1024, 24, 16)):
        for suffix, registers in (("", 0), ("_reg", 4)):
            config = backbones.entry(f"dinov2_{size}14{suffix}").config
            assert (
                config.width,
                config.depth,
                config.heads,
                config.patch_size,
                config.registers,
            ) == (width, depth, heads, 14, registers)
            assert (config.grid, config.prefix) == ((37, 37), 1 + registers)
            np.testing.assert_allclose(255 * np.array(config.mean), (123.675, 116.28, 103.53))
    monkeypatch.setitem(
        backbones.ZOO,
        "tiny",
        backbones.zoo.Entry(dataclasses.replace(KINDS["registers"], taps=(2,))),
    )
    scratch = weights.tensors(backbones.create("tiny"))
    assert scratch["register_tokens"].shape == (1, 4, 24)
    for i in range(3):
        np.testing.assert_allclose(scratch[f"blocks.{i}.ls1.gamma"], 1e-5)


def test_the_largest_is_the_published_one():
    """ViT-g has as many parameters as timm's vit_giant_patch14_dinov2 without its final norm, and
    its MLP gates as in NumPy.
    """
    state = nnx.state(nnx.eval_shape(lambda: backbones.create("dinov2_g14")), nnx.Param)
    assert sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(state)) == 1136479232 - 2 * 1536
    config = backbones.Dinov2GiantConfig(width=6, heads=1)
    mlp = nnx.jit(lambda: SwiGlu(config, rngs=nnx.Rngs(0)))()
    assert (mlp.w12.kernel.shape, mlp.w3.kernel.shape) == ((6, 32), (16, 6))
    x = np.random.default_rng(0).normal(size=(1, 3, 6)).astype(np.float32)
    gate, value = np.split(x @ np.asarray(mlp.w12.kernel[...]), 2, axis=-1)
    expected = gate / (1 + np.exp(-gate)) * value @ np.asarray(mlp.w3.kernel[...])
    found = jax.jit(lambda x: mlp(x))(x)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)
