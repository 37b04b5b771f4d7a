"""EVA-02 against timm and against the public VLTSeg re-implementation (golden files), and the laws
of its parts.

The files eva02_clip, eva02_mim_l and eva02_mim_ti are made by tests/oracles/golden_eva02.py.
eva02_vltseg_repro holds what the encoder file of VLTSeg/VLTSeg (commit 19cff2c,
vltseg/models/eva02.py, unchanged, with `xattn=True`) computes on CPU with random weights, at 70x70
and at 103x103 pixels with positions of those grids.
"""

import dataclasses
from functools import partial

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdg import backbones, weights
from jaxdg.backbones import Eva02, Eva02Config
from jaxdg.backbones.eva02 import (
    Attention,
    Block,
    SwiGlu,
    WindowAttention,
    are_plain,
    rotary_tables,
    rotate,
)
from jaxdg.conversion import eva02, mapping

SIZES = (
    (20, 20),
    (36, 36),
    (12, 12),
    (16, 32),
    (23, 30),
)  # as trained, enlarged, shrunk, not square, not divided by the patch
SMALL = dict(image_size=(20, 20), patch_size=4, depth=4, heads=2, taps=(0, 1, 2, 3))
FAMILIES = {
    "clip": Eva02Config(**SMALL, width=24),
    "mim_l": Eva02Config(**SMALL, width=16, inner_attn_ln=False),
    "mim_ti": Eva02Config(**SMALL, width=16, inner_attn_ln=False, subln=False),
}
REPRO = Eva02Config(
    **SMALL | dict(image_size=(70, 70), patch_size=14),
    width=16,
    inner_attn_ln=False,
    random_positions=True,
)


def wave(height, width):
    """The golden files' picture by its formula, [1, h, w, 3]."""
    y, x, c = np.ogrid[0:height, 0:width, 0:3]
    return (
        np.sin(0.33 * y + 0.5 * c) * np.cos(0.21 * x - 0.9 * c) + 0.3 * np.sin(0.9 * x + 1.7 * y)
    ).astype(np.float32)[None]


def changed(config, **fields):
    return Eva02Config(**{**vars(config), **fields})


def run(encoder, images, key=None, method="tokens"):
    """The encoder's outputs, compiled as the training code does it: pure state in, arrays out."""
    graph, state = nnx.split(encoder)
    return jax.jit(lambda state, images: getattr(nnx.merge(graph, state), method)(images, key))(
        state, jnp.asarray(images)
    )


def loaded(config, path):
    """An encoder with a file's weights, by way of abstract shapes as `create` does it."""
    encoder = nnx.eval_shape(lambda: Eva02(config, rngs=nnx.Rngs(0)))
    weights.load(encoder, path)
    return encoder


def converted(config, source, path):
    """A checkpoint through the conversion tables to a jaxdg file; returns the layout's name."""
    module = nnx.eval_shape(lambda: Eva02(config, rngs=nnx.Rngs(0)))
    result = mapping.to_flax(module, eva02.layouts(config), list(source), source.__getitem__)
    weights.save(result.tensors, path, {})
    return result.layout.name


@pytest.fixture(scope="module")
def files(golden, tmp_path_factory):
    """The golden random encoders of timm as jaxdg files, by family."""
    paths = {}
    for family, config in FAMILIES.items():
        with np.load(golden / f"eva02_{family}.npz") as archive:
            source = {
                name.removeprefix("weights/"): archive[name]
                for name in archive.files
                if name.startswith("weights/")
            }
        paths[family] = tmp_path_factory.mktemp("eva02") / f"{family}.safetensors"
        assert converted(config, source, paths[family]) == "timm"
    return paths


@pytest.fixture(scope="module")
def build(files):
    """`build(family, **fields)`: an encoder that differs from the family's in these fields, with
    the golden weights.
    """

    def make(family="clip", **fields):
        return loaded(changed(FAMILIES[family], **fields), files[family])

    return make


@pytest.mark.parametrize(
    ("family", "size"),
    [("clip", size) for size in SIZES]
    + [(family, size) for family in ("mim_l", "mim_ti") for size in SIZES[::3]],
)
def test_tokens_equal_timm(build, golden, family, size):
    """Every block's tokens, class token included, equal timm's at native, enlarged, shrunk, oblong
    and undivided sizes.
    """
    with np.load(golden / f"eva02_{family}.npz") as archive:
        expected = archive["tokens/{}x{}".format(*size)]
    tokens = run(build(family, image_size=size), wave(*size))
    np.testing.assert_allclose(np.stack(tokens), expected, rtol=0, atol=1e-4)


def test_features_are_the_patch_tokens_as_a_map(build, golden):
    """Calling the encoder gives the taps' tokens without the class token, row by row."""
    with np.load(golden / "eva02_clip.npz") as archive:
        expected = archive["tokens/16x32"]
    encoder = build(image_size=(16, 32), taps=(1, 3))
    features = run(encoder, wave(16, 32), method="__call__")
    assert encoder.channels == (24, 24)
    assert [f.shape for f in features] == [(1, 4, 8, 24)] * 2
    for feature, tap in zip(features, (1, 3), strict=True):
        np.testing.assert_allclose(feature[0].reshape(32, 24), expected[tap, 0, 1:], atol=1e-4)


def test_rotation_is_a_complex_product():
    """Pairs of channels turn as complex numbers by frequency times position on the 16-grid, y in
    the first half and x in the second.
    """
    grid = (5, 8)
    dim = 12
    x = np.random.default_rng(0).standard_normal((2, 1 + 40, 3, dim)).astype(np.float32)
    expected = x.copy()
    for row in range(grid[0]):
        for column in range(grid[1]):
            for pair in range(dim // 2):
                position = row / grid[0] * 16 if pair < dim // 4 else column / grid[1] * 16
                angle = position / 10_000 ** (2 * (pair % (dim // 4)) / (dim // 2))
                token = expected[:, 1 + row * grid[1] + column, :, 2 * pair : 2 * pair + 2]
                turned = (token[..., 0] + 1j * token[..., 1]) * np.exp(1j * angle)
                token[...] = np.stack([turned.real, turned.imag], axis=-1)
    got = rotate(jnp.asarray(x), *rotary_tables(grid, dim))
    np.testing.assert_allclose(got, expected, atol=1e-5)
    np.testing.assert_array_equal(got[:, 0], x[:, 0])  # the class token has no place


@pytest.mark.parametrize("side", [70, 103])
def test_tokens_equal_the_vltseg_reimplementation(golden, tmp_path, side):
    """Its checkpoints convert from its own names, and every block's tokens are those of its code,
    at both sizes.
    """
    with np.load(golden / "eva02_vltseg_repro.npz") as archive:
        source = {
            name.removeprefix("weights/"): archive[name]
            for name in archive.files
            if name.startswith("weights/")
        }
        source["backbone.pos_embed"] = archive[f"positions/{side}"]
        expected = archive[f"tokens/{side}"]
    source |= {
        "decode_head.conv_seg.weight": np.ones((2, 2), np.float32),
        "backbone.fpn1.0.weight": np.ones(3, np.float32),
    }
    source |= {"backbone.blocks.3.attn.rope.freqs_cos": np.ones((25, 4), np.float32)}
    config = changed(REPRO, image_size=(side, side))
    assert converted(config, source, tmp_path / "repro.safetensors") == "VLTSeg"
    encoder = loaded(config, tmp_path / "repro.safetensors")
    np.testing.assert_allclose(
        np.stack(run(encoder, wave(side, side))), expected, rtol=0, atol=1e-4
    )


def test_vltseg_repro_deviates_where_they_do(build, files, monkeypatch):
    """Weights of EVA-02-CLIP load without the inner norm; positions of another grid are drawn at
    random, of the same grid kept.
    """
    monkeypatch.setitem(backbones.ZOO, "tiny", backbones.zoo.Entry(FAMILIES["clip"]))
    repro = changed(FAMILIES["clip"], inner_attn_ln=False, random_positions=True)
    monkeypatch.setitem(backbones.ZOO, "tiny_vltseg_repro", backbones.zoo.Entry(repro))
    stored = weights.read(files["clip"])
    encoders = [
        backbones.create("tiny", variant="vltseg_repro", image_size=(s, s), weights=files["clip"])
        for s in (20, 36, 36)
    ]
    native, larger, again = (weights.tensors(encoder) for encoder in encoders)
    assert {name for name in stored if name not in native} == {
        f"blocks.{i}.attn.inner_attn_ln.{k}" for i in range(4) for k in ("scale", "bias")
    }
    np.testing.assert_array_equal(native["pos_embed"], stored["pos_embed"])
    drawn = larger["pos_embed"]
    assert drawn.shape == (1, 82, 24)
    assert 0.018 < drawn.std() < 0.022, "as their initialisation draws them"
    assert (
        abs(
            np.corrcoef(
                drawn[0, 1:].ravel(),
                weights.tensors(build(image_size=(36, 36)))["pos_embed"][0, 1:].ravel(),
            )[0, 1]
        )
        < 0.1
    )
    np.testing.assert_array_equal(drawn, again["pos_embed"])
    for name in native.keys() - {"pos_embed"}:
        np.testing.assert_array_equal(larger[name], stored[name], err_msg=name)


def test_the_correct_encoder_refuses_weights_without_its_norm(files, tmp_path):
    """A file of the re-implementation lacks one norm a block; loading it says so, names all of
    them, and changes nothing.
    """
    tensors = {
        name: tensor
        for name, tensor in weights.read(files["clip"]).items()
        if ".inner_attn_ln." not in name
    }
    weights.save(tensors, tmp_path / "repro.safetensors", {})
    with pytest.raises(
        ValueError,
        match=(
            r"does not fit this Eva02: 8 missing \(blocks.\*.attn.inner_attn_ln.bias \(4 tensors\)"
        ),
    ):
        loaded(FAMILIES["clip"], tmp_path / "repro.safetensors")


def test_positions_of_another_grid_are_resized_by_default(build, files):
    """The default is not the re-implementation's: a constant offset on all stored positions is one
    on the resized positions.
    """
    positions = weights.tensors(build(image_size=(36, 36)))["pos_embed"]
    stored = weights.read(files["clip"])["pos_embed"]
    np.testing.assert_array_equal(positions[:, 0], stored[:, 0])
    np.testing.assert_allclose(positions[0, 1:].mean(0), stored[0, 1:].mean(0), atol=0.1)


@pytest.mark.parametrize("family", FAMILIES)
def test_bfloat16_compute_is_close(build, golden, family):
    """Half precision in the matrix products, float32 parameters: within 2 % of timm's float32
    tokens, for every family.
    """
    with np.load(golden / f"eva02_{family}.npz") as archive:
        exact = archive["tokens/20x20"]
    encoder = build(family, dtype="bfloat16")
    assert {tensor.dtype for tensor in weights.tensors(encoder).values()} == {np.dtype(np.float32)}
    tokens = run(encoder, wave(20, 20))
    assert {t.dtype for t in tokens} == {jnp.dtype("bfloat16")}
    error = np.linalg.norm(
        np.stack([np.asarray(t, np.float32) for t in tokens]) - exact
    ) / np.linalg.norm(exact)
    assert 0 < error < 2e-2, error


@pytest.mark.parametrize(
    "segments", [dict(taps=(3,)), dict(taps=(1, 3), boundaries=(0, 2)), dict(taps=(0, 2))]
)
def test_where_segments_end_changes_no_value(build, golden, segments):
    """Taps and freeze boundaries cut the stack differently, and shared blocks give the same tokens;
    later blocks are not built.
    """
    with np.load(golden / "eva02_clip.npz") as archive:
        expected = archive["tokens/20x20"]
    encoder = build(**segments)
    names = weights.tensors(encoder)
    assert {name.split(".")[1] for name in names if name.startswith("blocks.")} == {
        str(i) for i in range(segments["taps"][-1] + 1)
    }
    for tap, tokens in zip(segments["taps"], run(encoder, wave(20, 20)), strict=True):
        np.testing.assert_allclose(tokens, expected[tap], rtol=0, atol=1e-4)


def test_a_window_over_everything_is_no_window():
    """Eight blocks whose windows are as large as the grid compute what those without windows do,
    from the same parameters.
    """
    config = changed(FAMILIES["clip"], depth=8, taps=(3, 7))
    whole = Eva02(config, rngs=nnx.Rngs(1))
    windowed = Eva02(changed(config, window=5), rngs=nnx.Rngs(2))
    assert windowed.config.global_blocks == (1, 3, 5, 7)
    assert windowed.blocks.ends == (0, 1, 2, 3, 4, 5, 6, 7)
    weights.fill(windowed, weights.tensors(whole), "memory")
    for got, want in zip(
        windowed(jnp.asarray(wave(20, 20))), whole(jnp.asarray(wave(20, 20))), strict=True
    ):
        np.testing.assert_allclose(got, want, atol=2e-5)


def test_a_window_is_attention_to_a_piece_of_the_map():
    """4x6 tokens in windows of 3x3, cut by hand: each is attention over the class token and the
    piece, zeros where it leaves the map.
    """
    config = changed(FAMILIES["clip"], image_size=(16, 24), window=3)
    attention = WindowAttention(config, rngs=nnx.Rngs(3))
    plain = nnx.clone(attention)
    plain.__class__ = Attention
    x = np.random.default_rng(0).normal(size=(2, 25, 24)).astype(np.float32)
    got = np.asarray(attention(jnp.asarray(x), *rotary_tables(config.grid, 12)))
    maps = x[:, 1:].reshape(2, 4, 6, 24)
    class_tokens = []
    for top in (0, 3):
        for left in (0, 3):
            piece = np.zeros((2, 3, 3, 24), np.float32)
            inside = maps[:, top : top + 3, left : left + 3]
            piece[:, : inside.shape[1]] = inside
            y = np.asarray(
                plain(
                    jnp.asarray(np.concatenate([x[:, :1], piece.reshape(2, 9, 24)], axis=1)),
                    *rotary_tables((3, 3), 12),
                )
            )
            class_tokens.append(y[:, 0])
            want = y[:, 1:].reshape(2, 3, 3, 24)[:, : inside.shape[1]]
            np.testing.assert_allclose(
                got[:, 1:].reshape(2, 4, 6, 24)[:, top : top + 3, left : left + 3], want, atol=1e-5
            )
    np.testing.assert_allclose(got[:, 0], np.mean(class_tokens, axis=0), atol=1e-5)


def test_remat_changes_no_gradient(build):
    """Recomputing blocks in the backward pass is a matter of memory alone; the rotary tables come
    along.
    """

    def gradients(remat):
        graph, state = nnx.split(build(taps=(1,), remat=remat))

        def loss(state):
            return sum(
                jnp.sum(jnp.sin(t))
                for t in nnx.merge(graph, state).tokens(jnp.asarray(wave(20, 20)))
            )

        return jax.jit(jax.grad(loss))(state)

    pairs = list(
        zip(jax.tree.leaves(gradients(False)), jax.tree.leaves(gradients(True)), strict=True)
    )
    assert len(pairs) == 4 + 21  # before the blocks, and in them
    for a, b in pairs:
        scale = np.abs(a).max()
        assert scale > 0
        np.testing.assert_allclose(a / scale, b / scale, atol=1e-4)


def test_drop_path_in_the_encoder(build, golden):
    """Without a key nothing is dropped; with one, samples differ but for the first block, and the
    same key gives the same.
    """
    with np.load(golden / "eva02_clip.npz") as archive:
        expected = archive["tokens/20x20"]
    graph, state = nnx.split(build(taps=(0, 3), drop_path=0.6))
    images = jnp.repeat(wave(20, 20), 8, axis=0)
    forward = jax.jit(lambda state, key: nnx.merge(graph, state).tokens(images, key))
    np.testing.assert_allclose(forward(state, None)[1][:1], expected[3], rtol=0, atol=1e-4)
    (first, last), (_, again) = (forward(state, jax.random.key(3)) for _ in range(2))
    np.testing.assert_array_equal(last, again)
    np.testing.assert_allclose(first, np.repeat(expected[0], 8, axis=0), rtol=0, atol=1e-4)
    assert len(np.unique(np.asarray(last).sum((1, 2)).round(3))) > 2, "samples draw apart"


def test_the_zoo_states_the_papers_encoder():
    """Taps, normalisation and grids are the published ones; the MLP's width is theirs, int(2.6667 *
    width), for every size.
    """
    config = backbones.entry("eva02_clip_l14").config
    assert config.taps == (9, 14, 19, 23)
    np.testing.assert_allclose(255 * np.array(config.mean), (123.675, 116.28, 103.53))
    np.testing.assert_allclose(255 * np.array(config.std), (58.395, 57.12, 57.375))
    assert changed(config, image_size=(512, 512)).grid == (36, 36)
    assert backbones.entry("eva02_clip_l14_336").config.grid == (24, 24)
    for name in ("eva02_clip_l14", "eva02_clip_b16", "eva02_ti14", "eva02_s14", "eva02_l14"):
        config = backbones.entry(name).config
        assert config.hidden == int(2.6667 * config.width), name
    with pytest.raises(
        ValueError,
        match="unknown encoder 'eva02_clip_l14_vltseg'; did you mean eva02_clip_l14_vltseg_repro",
    ):
        backbones.create("eva02_clip_l14", variant="vltseg")


def randomized(module):
    """The module with random numbers in place of its zero biases and unit scales."""
    random = np.random.default_rng(0)
    graph, state = nnx.split(module)
    drawn = jax.tree.map(lambda p: p + 0.1 * random.normal(size=p.shape).astype(np.float32), state)
    return nnx.merge(graph, drawn)


def same_with_gradients(ways, module, *inputs, rtol):
    """Two ways agree in output and gradients, relative to the norm of each."""

    def loss(module, *inputs, way):
        y = way(module, *inputs).astype(jnp.float32)
        return jnp.sum(jnp.sin(y)), y

    results = []
    for way in ways:
        run = nnx.value_and_grad(
            partial(loss, way=way), argnums=tuple(range(1 + len(inputs))), has_aux=True
        )
        (_, y), gradients = nnx.jit(run)(module, *inputs)
        results.append((y, gradients))
    for got, want in zip(*map(jax.tree.leaves, results), strict=True):
        assert got.shape == want.shape
        assert np.linalg.norm(got - want) <= rtol * np.linalg.norm(want)


@pytest.mark.parametrize("subln", [True, False])
def test_the_way_of_half_precision_is_the_same_function(subln):
    """In float32, where rounding hides nothing: joined products with their biases as a row, the
    norm after the product, and 170 hidden channels that become 176.
    """
    config = Eva02Config(width=64, heads=4, image_size=(48, 32), subln=subln, inner_attn_ln=subln)
    x = jnp.asarray(np.random.default_rng(1).normal(size=(2, 7, 64)), jnp.float32)
    mlp = randomized(SwiGlu(config, rngs=nnx.Rngs(0)))
    assert config.hidden == 170
    if subln:
        same_with_gradients((SwiGlu._in_half_precision, SwiGlu.__call__), mlp, x, rtol=1e-5)

    def halved(attention, x):
        attention.half = True
        y = attention(x, *tables)
        attention.half = False
        return y

    tables = rotary_tables(config.grid, 16)
    attention = randomized(Attention(config, rngs=nnx.Rngs(0)))
    assert are_plain(*attention._projections()), "or the joined way is never taken"
    plain = partial(Attention.__call__, cos=tables[0], sin=tables[1])
    same_with_gradients((halved, plain), attention, x, rtol=1e-5)


def test_half_precision_is_near_float32():
    """A block in bfloat16, beside the same parameters in float32."""
    config = Eva02Config(width=64, heads=4, image_size=(48, 32))
    half = dataclasses.replace(config, dtype="bfloat16")
    block = randomized(Block(config, rngs=nnx.Rngs(0)))
    x = jnp.asarray(np.random.default_rng(1).normal(size=(2, 7, 64)), jnp.float32)
    keep = jnp.ones((2, 2, 1, 1))
    tables = rotary_tables(config.grid, 16)

    def halved(block, x):
        graph, _ = nnx.split(Block(half, rngs=nnx.Rngs(0)))
        x = jnp.pad(x.astype(jnp.bfloat16), ((0, 0), (0, half.padding), (0, 0)))
        return nnx.merge(graph, nnx.state(block))(x, keep, *tables)[:, :7]

    assert half.padding == 1
    plain = partial(Block.__call__, keep=keep, cos=tables[0], sin=tables[1])
    same_with_gradients((halved, plain), block, x, rtol=0.05)
