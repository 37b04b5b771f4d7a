"""The plain ViT against timm, and the laws of its stacked blocks.

The golden file is made by tests/oracles/golden_vit.py.
"""

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image
import pytest
from safetensors.numpy import load_file

from jaxdg import backbones, weights
from jaxdg.backbones import Vit, VitConfig, resizing, stacking
from jaxdg.conversion import convert as torch_to_flax
from jaxdg.conversion import mapping, vit

SIZES = (
    (80, 80),
    (128, 128),
    (48, 48),
    (48, 112),
    (70, 100),
)  # as trained, enlarged, shrunk, not square, not divided by the patch
TRAINED = VitConfig(
    image_size=(80, 80), patch_size=16, width=24, depth=4, heads=2, taps=(0, 1, 2, 3)
)


def wave(height, width):
    """The golden files' picture by its formula, [2, h, w, 3]."""
    b, y, x, c = np.ogrid[0:2, 0:height, 0:width, 0:3]
    return (
        np.sin(0.11 * y * (1 + b) + 0.5 * c) * np.cos(0.07 * x - 0.9 * c)
        + 0.3 * np.sin(0.9 * x + 1.7 * y + b)
    ).astype(np.float32)


def changed(config=TRAINED, **fields):
    return VitConfig(**{**vars(config), **fields})


def run(encoder, images, key=None, method="tokens"):
    """The encoder's outputs, compiled as the training code does it: pure state in, arrays out."""
    graph, state = nnx.split(encoder)
    return jax.jit(lambda state, images: getattr(nnx.merge(graph, state), method)(images, key))(
        state, jnp.asarray(images)
    )


@pytest.fixture(scope="module")
def random_file(golden, tmp_path_factory):
    """The golden random encoder of timm, through the conversion, as a jaxdg file."""
    with np.load(golden / "vit_random.npz") as archive:
        source = {
            name.removeprefix("weights/"): archive[name]
            for name in archive.files
            if name.startswith("weights/")
        }
    module = nnx.eval_shape(lambda: Vit(TRAINED, rngs=nnx.Rngs(0)))
    converted = mapping.to_flax(module, vit.layouts(TRAINED), list(source), source.__getitem__)
    assert converted.layout.name == "timm"
    path = tmp_path_factory.mktemp("vit") / "random.safetensors"
    weights.save(converted.tensors, path, {})
    return path


@pytest.fixture(scope="module")
def build(random_file):
    """`build(taps=.., ..)`: an encoder that differs from the trained one in these fields, with the
    golden weights.
    """

    def make(**fields):
        encoder = nnx.eval_shape(
            lambda: Vit(changed(**fields), rngs=nnx.Rngs(0))
        )  # the file fills it
        weights.load(encoder, random_file)
        return encoder

    return make


@pytest.fixture(scope="module")
def reference(build):
    """The trained encoder with its tokens after each block on the golden picture."""
    return np.stack(run(build(), wave(80, 80)))


@pytest.mark.parametrize("size", SIZES, ids=lambda size: "{}x{}".format(*size))
def test_tokens_equal_timm(build, golden, size):
    """Every block's tokens, class token included, equal timm's at native, enlarged, shrunk, oblong
    and undivided sizes.
    """
    with np.load(golden / "vit_random.npz") as archive:
        expected = archive["tokens/{}x{}".format(*size)]
    encoder = build(image_size=size)
    tokens = run(encoder, wave(*size)[: expected.shape[1]])
    np.testing.assert_allclose(np.stack(tokens), expected, rtol=0, atol=1e-4)


def test_features_are_the_patch_tokens_as_a_map(build, golden):
    """Calling the encoder gives the tokens without the class token, row by row."""
    with np.load(golden / "vit_random.npz") as archive:
        expected = archive["tokens/48x112"]
    encoder = build(image_size=(48, 112), taps=(1, 3))
    features = run(encoder, wave(48, 112)[:1], method="__call__")
    assert encoder.channels == (24, 24)
    assert [f.shape for f in features] == [(1, 3, 7, 24)] * 2
    np.testing.assert_allclose(features[0][0, 2, 5], expected[1, 0, 1 + 2 * 7 + 5], atol=1e-4)
    np.testing.assert_allclose(features[1][0].reshape(21, 24), expected[3, 0, 1:], atol=1e-4)


def test_positions_equal_torch_bicubic(golden):
    """Resized positions equal `F.interpolate(mode="bicubic", align_corners=False)`, enlarged,
    shrunk and oblong; the class row stays.
    """
    with np.load(golden / "vit_positions.npz") as archive:
        positions = archive["positions"]
        grids = [name for name in archive.files if "x" in name]
        assert {"32x32", "7x7", "28x7"} <= set(grids)
        for grid in grids:
            rows, columns = map(int, grid.split("x"))
            got = resizing.resize_positions(positions, (rows, columns), prefix=1)
            assert got.dtype == np.float32
            np.testing.assert_allclose(got, archive[grid], atol=1e-5, err_msg=grid)
            np.testing.assert_array_equal(got[:, 0], positions[:, 0])


def test_positions_of_no_square_grid_must_fit():
    """Positions that are no square grid are taken as they are where they fit, and refused where
    they do not.
    """
    oblong = np.arange(13, dtype=np.float32).reshape(1, 13, 1)
    np.testing.assert_array_equal(resizing.resize_positions(oblong, (3, 4), prefix=1), oblong)
    with pytest.raises(
        ValueError, match="12 patch positions are no square grid and do not fit 5x5"
    ):
        resizing.resize_positions(oblong, (5, 5), prefix=1)


def test_pretrained_features_and_logits_equal_timm(golden, weights_path, data_path, tmp_path):
    """On a real street, the real ViT-Ti gives timm's tokens of five blocks and ImageNet logits."""
    source = weights_path("vit_tiny_patch16_224.safetensors")
    pixels = np.asarray(Image.open(data_path("camvid") / "test" / "Seq05VD_f00000.jpg"))[
        68:292, 128:352
    ]
    assert (
        torch_to_flax.main(
            [
                "--model",
                "augreg_ti16",
                "--checkpoint",
                str(source),
                "--out",
                str(tmp_path / "ti.safetensors"),
            ]
        )
        == 0
    )
    with np.load(golden / "vit_tiny_logits.npz") as archive:
        expected = dict(archive)
    encoder = backbones.create(
        "augreg_ti16", weights=tmp_path / "ti.safetensors", taps=expected["blocks"].tolist()
    )
    images = (pixels[None] / np.float32(255) - np.float32(encoder.config.mean)) / np.float32(
        encoder.config.std
    )
    tokens = np.concatenate(run(encoder, images))
    # One channel holds values of several hundred, where float32 itself resolves no 1e-5.
    np.testing.assert_allclose(
        tokens[:, expected["some"]], expected["tokens"], rtol=1e-5, atol=1e-4
    )
    np.testing.assert_allclose(np.linalg.norm(tokens, axis=-1), expected["norms"], rtol=1e-5)
    # The classifier that conversion leaves out, in NumPy.
    theirs = load_file(source)
    x = tokens[-1, 0].astype(np.float64)
    x = (x - x.mean()) / np.sqrt(x.var() + 1e-6) * theirs["norm.weight"] + theirs["norm.bias"]
    logits = theirs["head.weight"] @ x + theirs["head.bias"]
    np.testing.assert_allclose(logits, expected["logits"], rtol=0, atol=1e-4)
    assert logits.argmax() == expected["logits"].argmax()


@pytest.mark.parametrize(("taps", "boundaries"), [((3,), ()), ((2,), (0, 3))])
def test_where_segments_end_changes_no_value(build, reference, taps, boundaries):
    """The tokens do not depend on where taps and freeze boundaries cut the stack."""
    encoder = build(taps=taps, boundaries=boundaries)
    assert encoder.blocks.ends == tuple(
        sorted(end for end in {*taps, *boundaries} if end <= taps[-1])
    )
    for tap, tokens in zip(taps, run(encoder, wave(80, 80)), strict=True):
        np.testing.assert_allclose(tokens, reference[tap], rtol=1e-5, atol=1e-5)


def test_blocks_past_the_last_tap_are_not_built(build):
    """An encoder read after block 1 holds two blocks, though the file has four."""
    names = weights.tensors(build(taps=(0, 1)))
    assert {name.split(".")[1] for name in names if name.startswith("blocks.")} == {"0", "1"}


def test_remat_changes_neither_outputs_nor_gradients(build, reference):
    """Recomputing blocks in the backward pass is a matter of memory alone."""

    def loss_and_gradients(remat):
        encoder = build(taps=(3,), remat=remat)
        assert encoder.blocks.remat is remat
        graph, state = nnx.split(encoder.blocks)

        def loss(state, x):
            return jnp.sum(jnp.sin(nnx.merge(graph, state)(x, jnp.ones((4, 2, 1, 1, 1)))[3]))

        step = jax.value_and_grad(loss, argnums=(0, 1))
        x = jnp.asarray(reference[0, :1])

        def products(f):
            return str(jax.make_jaxpr(f)(state, x)).count("= dot_general")

        # Each product has two gradients. With remat it is computed twice; without, only what lies
        # between products is, but for attention's two where no platform has a way of its own.
        without = 3 * products(loss) + 2
        assert products(step) > without if remat else products(step) == without
        return jax.jit(step)(state, x)

    value, gradients = loss_and_gradients(False)
    value2, gradients2 = loss_and_gradients(True)
    np.testing.assert_allclose(value, value2, rtol=1e-5)
    leaves = jax.tree.leaves(gradients)
    assert len(leaves) == 13, "12 arrays of the stacked blocks and the input"
    for a, b in zip(leaves, jax.tree.leaves(gradients2), strict=True):
        scale = np.abs(a).max()
        assert scale > 0
        np.testing.assert_allclose(a / scale, b / scale, atol=1e-4)


def test_drop_path_scales_follow_their_law():
    """Scales are 0 or 1/(1-p) with p growing linearly from 0 to the rate, so a branch keeps its
    mean; no key or rate turns it off.
    """
    off = stacking.drop_path_scales(None, 0.4, 5, 3)
    assert off.shape == (5, 2, 3, 1, 1)
    np.testing.assert_array_equal(off, 1)
    np.testing.assert_array_equal(stacking.drop_path_scales(jax.random.key(0), 0.0, 5, 3), 1)
    scales = np.asarray(stacking.drop_path_scales(jax.random.key(0), 0.4, 5, 20_000))[..., 0, 0]
    np.testing.assert_array_equal(scales[0], 1)
    for i, p in enumerate((0.0, 0.1, 0.2, 0.3, 0.4)):
        kept = scales[i] > 0
        np.testing.assert_allclose(scales[i][kept], 1 / (1 - p), rtol=1e-6)
        np.testing.assert_allclose(
            kept.mean(axis=-1), 1 - p, atol=0.02
        )  # more than five standard deviations
        np.testing.assert_allclose(scales[i].mean(axis=-1), 1, atol=0.03)
    assert np.abs(np.corrcoef(scales[4])[0, 1]) < 0.05, "attention and MLP draw apart"


def test_drop_path_in_the_encoder(build, reference):
    """Without a key nothing is dropped; with one, samples draw apart and the first block is never
    dropped; equal keys, equal tokens.
    """
    encoder = build(taps=(0, 3), drop_path=0.6)
    np.testing.assert_allclose(
        np.stack(run(encoder, wave(80, 80))), reference[[0, 3]], rtol=1e-5, atol=1e-5
    )
    same_image = np.repeat(wave(80, 80)[:1], 8, axis=0)
    graph, state = nnx.split(encoder)
    draw = jax.jit(lambda key: nnx.merge(graph, state).tokens(jnp.asarray(same_image), key))
    first, last = draw(jax.random.key(3))
    _, again = draw(jax.random.key(3))
    _, other = draw(jax.random.key(4))
    np.testing.assert_array_equal(last, again)
    assert np.abs(last - other).max() > 0.1
    np.testing.assert_allclose(first, np.repeat(reference[0, :1], 8, axis=0), rtol=1e-5, atol=1e-5)
    assert len(np.unique(np.asarray(last).sum((1, 2)).round(2))) > 2, "samples draw apart"


def test_a_dropped_branch_adds_nothing(build, reference):
    """Blocks scaled by 0 pass their input through, and a branch scaled by s adds s times what it
    adds at 1.
    """
    encoder = build(taps=(0,))
    x = jnp.asarray(reference[0])
    graph, state = nnx.split(encoder.blocks)
    blocks = jax.jit(lambda scales: nnx.merge(graph, state)(x, scales)[0])
    attention = jnp.zeros((1, 2, 2, 1, 1)).at[:, 0].set(1.0)
    none = jnp.zeros((1, 2, 2, 1, 1))
    np.testing.assert_array_equal(blocks(none), x)
    np.testing.assert_allclose(
        blocks(3 * attention) - x, 3 * (blocks(attention) - x), rtol=1e-4, atol=1e-4
    )


def test_bfloat16_compute_is_close(build, reference):
    """bfloat16 changes the tokens by less than 2 %; parameters stay float32."""
    encoder = build(dtype="bfloat16")
    assert {tensor.dtype for tensor in weights.tensors(encoder).values()} == {np.dtype(np.float32)}
    tokens = np.stack([np.asarray(t, np.float32) for t in run(encoder, wave(80, 80))])
    error = np.linalg.norm(tokens - reference) / np.linalg.norm(reference)
    assert 0 < error < 2e-2, error


def test_a_file_knows_no_taps(build, random_file, tmp_path):
    """Tensors saved from one cut of the stack are bit-identical to the file and load into any other
    cut.
    """
    stored = load_file(random_file)
    for fields in (dict(taps=(1, 3)), dict(taps=(3,), boundaries=(0, 1)), dict(taps=(0, 1, 2, 3))):
        tensors = weights.tensors(build(**fields))
        assert tensors.keys() == stored.keys()
        weights.save(
            tensors, tmp_path / "again.safetensors", {"model": "x", "left_out": {"a": "b"}}
        )
        again = load_file(tmp_path / "again.safetensors")
        for name, tensor in stored.items():
            np.testing.assert_array_equal(again[name], tensor, err_msg=name)
    assert weights.metadata(tmp_path / "again.safetensors") == {
        "model": "x",
        "left_out": '{"a": "b"}',
    }


def test_load_is_strict(random_file, tmp_path):
    """Missing, unexpected and misshapen tensors are all named at once, and the encoder is left as
    it was.
    """
    tensors = load_file(random_file)
    tensors["blocks.2.mlp.fc3.bias"] = tensors.pop("blocks.2.mlp.fc1.bias")
    tensors["blocks.0.norm1.scale"] = np.ones(23, np.float32)
    tensors["pos_embed"] = tensors["pos_embed"][..., :5]
    weights.save(tensors, tmp_path / "bad.safetensors", {})
    encoder = nnx.eval_shape(lambda: Vit(TRAINED, rngs=nnx.Rngs(0)))
    weights.load(encoder, random_file)
    before = weights.tensors(encoder)
    with pytest.raises(ValueError, match=r"bad.safetensors does not fit this Vit") as caught:
        weights.load(encoder, tmp_path / "bad.safetensors")
    message = str(caught.value)
    for offence in (
        "1 missing (blocks.2.mlp.fc1.bias)",
        "1 unexpected (blocks.2.mlp.fc3.bias)",
        (
            "2 of another shape (blocks.0.norm1.scale is (23,), not (24,), pos_embed is (1, 26, 5),"
            " not (1, 26, 24))"
        ),
    ):
        assert offence in message
    for name, tensor in weights.tensors(encoder).items():
        np.testing.assert_array_equal(tensor, before[name])


def test_images_of_another_size_are_refused(build):
    """The message names both sizes and the remedy."""
    with pytest.raises(
        ValueError,
        match=r"built for 80x80 images and got 80x96; create it with image_size=\(80, 96\)",
    ):
        build()(jnp.zeros((1, 80, 96, 3)))


def test_create_refuses_what_cannot_be():
    """Unknown names, taps outside the encoder or twice, and images smaller than a patch."""
    with pytest.raises(
        ValueError, match=r"unknown encoder 'augreg_l61'; did you mean augreg_l16\?"
    ):
        backbones.create("augreg_l61")
    for taps in ((3, 12), (-1, 3), (3, 3)):
        with pytest.raises(ValueError, match=r"must be different blocks in 0\.\.11"):
            backbones.create("augreg_ti16", taps=taps)
    with pytest.raises(ValueError, match="smaller than the 16 pixels of one feature"):
        backbones.create("augreg_ti16", image_size=(224, 15))


def test_create_fills_from_a_file_or_at_random(random_file, monkeypatch):
    """With a file every tensor is the file's; without one blocks start apart, in the scale of their
    initialiser.
    """
    monkeypatch.setitem(backbones.ZOO, "golden", backbones.zoo.Entry(changed(taps=(3,))))
    stored = load_file(random_file)
    for name, tensor in weights.tensors(backbones.create("golden", weights=random_file)).items():
        np.testing.assert_array_equal(tensor, stored[name], err_msg=name)
    scratch = weights.tensors(backbones.create("golden"))
    assert all(np.isfinite(tensor).all() for tensor in scratch.values())
    assert (
        np.abs(scratch["blocks.1.attn.qkv.kernel"] - scratch["blocks.2.attn.qkv.kernel"]).max() > 0
    )
    np.testing.assert_allclose(scratch["pos_embed"].std(), 0.02, rtol=0.1)
    np.testing.assert_allclose(
        scratch["blocks.3.mlp.fc2.kernel"].std(), 96**-0.5, rtol=0.1
    )  # one over the root of the inputs
