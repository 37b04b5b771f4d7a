"""SigLIP's image tower against timm and big_vision.

The golden files are made by golden_siglip.py and golden_big_vision.py in tests/oracles.
"""

import functools

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdg import backbones, weights
from jaxdg.backbones import Siglip, SiglipConfig, Vit, VitConfig, stacking
from jaxdg.backbones.siglip import Block
from jaxdg.conversion import mapping, siglip, vit
from tests.backbones.drawn import drawn, run, wave

SIZES = (
    (20, 20),
    (36, 36),
    (12, 12),
    (16, 32),
    (23, 30),
)  # as trained, enlarged, shrunk, not square, not divided by the patch
SMALL = dict(image_size=(20, 20), patch_size=4, width=24, depth=4, heads=2, taps=(0, 1, 2, 3))
TRAINED = SiglipConfig(**SMALL)
LAYOUTS = {"siglip": siglip.layouts(TRAINED)[0], "vit": vit.timm()}


class ExactSiglip(Siglip):
    """With GELU by its exact formula."""

    def __init__(self, config, *, rngs):
        super().__init__(config, rngs=rngs)
        self.blocks = stacking.Stack(
            lambda rngs, _: backbones.vit.Block(config, rngs=rngs),
            config.used,
            config.ends,
            remat=False,
            rngs=rngs,
        )


class TanhVit(Vit):
    """The plain ViT with GELU by its tanh formula, as big_vision computes it."""

    def __init__(self, config, *, rngs):
        super().__init__(config, rngs=rngs)
        self.blocks = stacking.Stack(
            lambda rngs, _: Block(config, rngs=rngs),
            config.used,
            config.ends,
            remat=False,
            rngs=rngs,
        )


def made(family, config):
    """An encoder without numbers."""
    return nnx.eval_shape(lambda: family(config, rngs=nnx.Rngs(0)))


@functools.cache
def tensors(family, layout_name, trained):
    """The golden random encoder of timm's names, made for `trained`."""
    layout = LAYOUTS[layout_name]
    module = made(family, trained)
    shapes = mapping.source_shapes(module, layout)
    return mapping.to_flax(
        module, [layout], list(shapes), lambda name: drawn(name, shapes[name])
    ).tensors


def filled(family, layout, trained, config=None):
    """Those tensors in an encoder of `config`."""
    encoder = made(family, config or trained)
    weights.fill(encoder, dict(tensors(family, layout, trained)), "golden")
    return encoder


def build(family=Siglip, **fields):
    """An encoder that differs from the trained one in these fields, with the golden weights."""
    return filled(family, "siglip", TRAINED, SiglipConfig(**{**vars(TRAINED), **fields}))


@pytest.fixture(scope="module")
def reference():
    """The trained encoder's tokens after each block on the golden picture."""
    return np.stack(run(build(), wave(20, 20)))


@pytest.mark.parametrize("size", SIZES, ids=lambda size: "{}x{}".format(*size))
def test_tokens_equal_timm(golden, size):
    """Every block's tokens equal timm's at native, enlarged, shrunk, oblong and undivided sizes."""
    with np.load(golden / "siglip.npz") as archive:
        expected = archive["tokens/{}x{}".format(*size)]
    tokens = run(build(image_size=size), wave(*size))
    np.testing.assert_allclose(np.stack(tokens), expected, rtol=0, atol=1e-4)


def test_gelu_by_its_exact_formula_is_told_apart(golden):
    """Were it computed, the comparison above would fail."""
    with np.load(golden / "siglip.npz") as archive:
        expected = archive["tokens/20x20"]
    assert np.abs(np.stack(run(build(ExactSiglip), wave(20, 20))) - expected).max() > 3e-4


def test_features_are_the_tokens_as_a_map(golden):
    """All tokens are patches, row by row; there is no class token to skip."""
    with np.load(golden / "siglip.npz") as archive:
        expected = archive["tokens/16x32"]
    encoder = build(image_size=(16, 32), taps=(1, 3))
    features = run(encoder, wave(16, 32), method="__call__")
    assert [f.shape for f in features] == [(1, 4, 8, 24)] * 2
    for feature, tap in zip(features, (1, 3), strict=True):
        np.testing.assert_allclose(feature[0].reshape(32, 24), expected[tap, 0], atol=1e-4)
    assert "cls_token" not in weights.tensors(encoder)


def test_positions_equal_scipys_zoom(golden):
    """Resized positions equal big_vision's, enlarged, shrunk and oblong."""
    encoder = build()
    positions = drawn("positions", (1, 256, 2))
    with np.load(golden / "siglip.npz") as archive:
        grids = [name.split("/")[1] for name in archive.files if name.startswith("positions/")]
        assert {"7x7", "32x64", "1x3"} <= set(grids)
        for grid in grids:
            rows, columns = map(int, grid.split("x"))
            encoder.config = SiglipConfig(
                **{**vars(TRAINED), "image_size": (4 * rows, 4 * columns)}
            )
            got = encoder.adapt("pos_embed", positions)
            assert got is not None
            np.testing.assert_allclose(got, archive[f"positions/{grid}"], atol=1e-5, err_msg=grid)


def test_corners_of_positions_stay_where_they_are():
    """Also from 32x32 to 16x16, where scipy's rounding puts zeros into the last row and column."""
    positions = drawn("positions", (1, 1024, 2))
    encoder = build()
    encoder.config = SiglipConfig(**{**vars(TRAINED), "image_size": (64, 64)})
    resized = encoder.adapt("pos_embed", positions)
    assert resized is not None
    before = positions.reshape(32, 32, 2)
    after = resized.reshape(16, 16, 2)
    np.testing.assert_allclose(after[::15, ::15], before[::31, ::31], atol=1e-6)


@pytest.mark.parametrize(
    "size", [(20, 20), (16, 32), (36, 36)], ids=lambda size: "{}x{}".format(*size)
)
def test_tokens_equal_big_visions_own_model(golden, size):
    """big_vision's code, given the `.npz` that conversion writes, computes the same tokens, also
    where it resizes the positions itself.
    """
    with np.load(golden / "big_vision.npz") as archive:
        expected = archive["siglip/{}x{}".format(*size)]
    trained = SiglipConfig(**{**SMALL, "image_size": (20, 20) if size == (36, 36) else size})
    encoder = filled(Siglip, "siglip", trained, SiglipConfig(**{**SMALL, "image_size": size}))
    np.testing.assert_allclose(np.stack(run(encoder, wave(*size))), expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("size", [(20, 20), (16, 32)], ids=lambda size: "{}x{}".format(*size))
def test_the_plain_vit_equals_big_visions_own_model_but_for_gelu(golden, size):
    """With GELU by big_vision's tanh formula the tokens are the same, class token included; by the
    plain ViT's they differ by little.
    """
    with np.load(golden / "big_vision.npz") as archive:
        expected = archive["vit/{}x{}".format(*size)]
    config = VitConfig(**{**SMALL, "image_size": size})
    np.testing.assert_allclose(
        np.stack(run(filled(TanhVit, "vit", config), wave(*size))), expected, rtol=0, atol=1e-4
    )
    difference = np.stack(run(filled(Vit, "vit", config), wave(*size))) - expected
    assert 1e-6 < np.linalg.norm(difference) / np.linalg.norm(expected) < 1e-3


def test_bfloat16_compute_is_close(reference):
    """bfloat16 changes the tokens by less than 2 %; parameters stay float32."""
    encoder = build(dtype="bfloat16")
    assert {tensor.dtype for tensor in weights.tensors(encoder).values()} == {np.dtype(np.float32)}
    tokens = np.stack([np.asarray(t, np.float32) for t in run(encoder, wave(20, 20))])
    assert 0 < np.linalg.norm(tokens - reference) / np.linalg.norm(reference) < 2e-2


@pytest.mark.parametrize("segments", [dict(taps=(1, 3), boundaries=(0, 2)), dict(taps=(0, 2))])
def test_where_segments_end_changes_no_value(reference, segments):
    """Taps and freeze boundaries cut the stack differently, and shared blocks give the same tokens;
    later blocks are not built.
    """
    encoder = build(**segments)
    blocks = {name.split(".")[1] for name in weights.tensors(encoder) if name.startswith("blocks.")}
    assert blocks == {str(i) for i in range(segments["taps"][-1] + 1)}
    for tap, tokens in zip(segments["taps"], run(encoder, wave(20, 20)), strict=True):
        np.testing.assert_allclose(tokens, reference[tap], rtol=1e-5, atol=1e-5)


def test_every_parameter_gets_a_gradient_and_steps_along_it_lower_the_loss():
    """Gradients of all parameters are finite and not all zero, and gradient descent from the golden
    weights learns a target.
    """
    graph, state = nnx.split(build(image_size=(16, 32), taps=(3,)))
    images = jnp.asarray(wave(16, 32))
    target = jnp.asarray(drawn("target", (1, 4, 8, 24)))

    @jax.jit
    def step(state):
        def loss(state):
            return jnp.mean((nnx.merge(graph, state)(images)[-1] - target) ** 2)

        value, gradients = jax.value_and_grad(loss)(state)
        return value, gradients, jax.tree.map(lambda p, g: p - 2e-2 * g, state, gradients)

    losses = []
    for _ in range(20):
        value, gradients, state = step(state)
        losses.append(float(value))
        for path, leaf in nnx.to_flat_state(gradients):
            assert np.isfinite(leaf[...]).all(), path
            assert np.abs(leaf[...]).max() > 0, path
    assert losses[-1] < 0.7 * losses[0], losses


def test_the_zoo_states_the_published_sizes():
    """Parameters counted from the published description: patches, positions, and 12 c^2 + 13 c in
    each block.
    """
    for name, side, width, depth in (
        ("siglip_b16", 14, 768, 12),
        ("siglip_l16", 16, 1024, 24),
        ("siglip2_l16", 32, 1024, 24),
    ):
        config = backbones.entry(name).config
        assert isinstance(config, SiglipConfig)
        assert (config.mean, config.std, config.taps[-1]) == ((0.5,) * 3, (0.5,) * 3, depth - 1)
        encoder = nnx.eval_shape(lambda name=name: backbones.create(name))
        count = sum(int(np.prod(shape)) for shape in weights.shapes(encoder).values())
        assert count == (3 * 16 * 16 + 1 + side * side) * width + depth * (
            12 * width**2 + 13 * width
        )
