"""CLIP's vision transformer against open_clip, and the check of its activation.

The golden file is made by tests/oracles/golden_clip.py.
"""

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdg import backbones, weights
from jaxdg.backbones import ClipVit, ClipVitConfig
from jaxdg.conversion import clip, mapping

SIZES = (
    (20, 20),
    (36, 36),
    (12, 12),
    (16, 32),
    (23, 30),
)  # as trained, enlarged, shrunk, not square, not divided by the patch
TRAINED = ClipVitConfig(
    image_size=(20, 20), patch_size=4, width=16, depth=4, heads=2, taps=(0, 1, 2, 3)
)


def wave(height, width):
    """The golden file's picture by its formula, [1, h, w, 3]."""
    y, x, c = np.ogrid[0:height, 0:width, 0:3]
    return (
        np.sin(0.33 * y + 0.5 * c) * np.cos(0.21 * x - 0.9 * c) + 0.3 * np.sin(0.9 * x + 1.7 * y)
    ).astype(np.float32)[None]


def run(encoder, images, key=None, method="tokens"):
    """The encoder's outputs, compiled as the training code does it: pure state in, arrays out."""
    graph, state = nnx.split(encoder)
    return jax.jit(lambda state, images: getattr(nnx.merge(graph, state), method)(images, key))(
        state, jnp.asarray(images)
    )


@pytest.fixture(scope="module")
def files(golden, tmp_path_factory):
    """The golden random encoder as jaxdg files, said to be trained with either activation."""
    with np.load(golden / "clip_vit.npz") as archive:
        source = {
            name.removeprefix("weights/"): archive[name]
            for name in archive.files
            if name.startswith("weights/")
        }
    module = nnx.eval_shape(lambda: ClipVit(TRAINED, rngs=nnx.Rngs(0)))
    converted = mapping.to_flax(module, clip.layouts(), list(source), source.__getitem__)
    assert set(converted.left_out) == {
        "visual.ln_post.weight",
        "visual.ln_post.bias",
        "visual.proj",
    }
    folder = tmp_path_factory.mktemp("clip")
    for activation in ("quick_gelu", "gelu"):
        weights.save(
            converted.tensors,
            folder / f"{activation}.safetensors",
            {"model": f"tiny_{activation}", "activation": activation},
        )
    return folder


@pytest.fixture(scope="module")
def build(files):
    """`build(**fields)`: an encoder that differs from the trained one in these fields, with the
    golden weights.
    """

    def make(**fields):
        config = ClipVitConfig(**{**vars(TRAINED), **fields})
        encoder = nnx.eval_shape(lambda: ClipVit(config, rngs=nnx.Rngs(0)))
        weights.load(encoder, files / f"{config.activation}.safetensors")
        return encoder

    return make


@pytest.fixture(scope="module")
def reference(build):
    """Tokens of the QuickGELU encoder after each block at the trained size."""
    return np.stack(run(build(), wave(20, 20)))


@pytest.mark.parametrize(
    ("activation", "size"), [*(("quick_gelu", size) for size in SIZES), ("gelu", SIZES[0])]
)
def test_tokens_equal_open_clip(build, golden, activation, size):
    """Every block's tokens, class token included, equal open_clip's at all kinds of sizes, and with
    either activation.
    """
    with np.load(golden / "clip_vit.npz") as archive:
        expected = archive["{}/{}x{}".format(activation, *size)]
    tokens = run(build(image_size=size, activation=activation), wave(*size))
    np.testing.assert_allclose(np.stack(tokens), expected, rtol=0, atol=1e-4)


def test_the_activations_differ_by_far_more_than_the_tolerance(golden):
    """Were the wrong one computed, the comparison above would fail."""
    with np.load(golden / "clip_vit.npz") as archive:
        assert np.abs(archive["quick_gelu/20x20"] - archive["gelu/20x20"]).max() > 1e-2


def test_features_are_the_patch_tokens_as_a_map(build, golden):
    """Calling the encoder gives the taps' tokens without the class token, row by row."""
    with np.load(golden / "clip_vit.npz") as archive:
        expected = archive["quick_gelu/16x32"]
    encoder = build(image_size=(16, 32), taps=(1, 3))
    features = run(encoder, wave(16, 32), method="__call__")
    assert encoder.channels == (16, 16)
    assert [f.shape for f in features] == [(1, 4, 8, 16)] * 2
    for feature, tap in zip(features, (1, 3), strict=True):
        np.testing.assert_allclose(feature[0].reshape(32, 16), expected[tap, 0, 1:], atol=1e-4)


@pytest.mark.parametrize(
    ("made_for", "runs"), [("quick_gelu", "gelu"), ("gelu", "quick_gelu"), (None, "gelu")]
)
def test_weights_of_another_activation_are_refused(files, tmp_path, monkeypatch, made_for, runs):
    """No tensor tells the activation, so the file does: a file for the other one, or for none, is
    refused by `create` and `load`.
    """
    path = files / f"{made_for}.safetensors"
    if made_for is None:
        path = tmp_path / "unknown.safetensors"
        weights.save(weights.read(files / "gelu.safetensors"), path, {})
    config = ClipVitConfig(**{**vars(TRAINED), "activation": runs})
    monkeypatch.setitem(backbones.ZOO, "tiny", backbones.zoo.Entry(config))
    message = (
        rf"converted as {f'tiny_{made_for}' if made_for else 'no known encoder'} .*, and this"
        rf" encoder computes {runs}"
    )
    with pytest.raises(ValueError, match=message):
        backbones.create("tiny", weights=path)
    encoder = backbones.create("tiny", weights=files / f"{runs}.safetensors")
    before = weights.tensors(encoder)
    with pytest.raises(ValueError, match=message):
        weights.load(encoder, path)
    for name, tensor in weights.tensors(encoder).items():
        np.testing.assert_array_equal(tensor, before[name], err_msg=name)


def test_bfloat16_compute_is_close(build, reference):
    """bfloat16 changes the tokens by less than 2 %; parameters stay float32."""
    encoder = build(dtype="bfloat16")
    assert {tensor.dtype for tensor in weights.tensors(encoder).values()} == {np.dtype(np.float32)}
    tokens = run(encoder, wave(20, 20))
    assert {t.dtype for t in tokens} == {jnp.dtype("bfloat16")}
    error = np.linalg.norm(
        np.stack([np.asarray(t, np.float32) for t in tokens]) - reference
    ) / np.linalg.norm(reference)
    assert 0 < error < 2e-2, error


@pytest.mark.parametrize("segments", [dict(taps=(1, 3), boundaries=(0, 2)), dict(taps=(0, 2))])
def test_where_segments_end_changes_no_value(build, reference, segments):
    """Taps and freeze boundaries cut the stack differently, and shared blocks give the same tokens;
    later blocks are not built.
    """
    encoder = build(**segments)
    names = weights.tensors(encoder)
    assert {name.split(".")[1] for name in names if name.startswith("blocks.")} == {
        str(i) for i in range(segments["taps"][-1] + 1)
    }
    for tap, tokens in zip(segments["taps"], run(encoder, wave(20, 20)), strict=True):
        np.testing.assert_allclose(tokens, reference[tap], rtol=1e-5, atol=1e-5)


def test_drop_path_in_the_encoder(build, reference):
    """Without a key nothing is dropped; with one, samples differ but for the first block."""
    encoder = build(drop_path=0.6, remat=True)
    images = np.repeat(wave(20, 20), 8, axis=0)
    np.testing.assert_allclose(
        np.stack(run(encoder, wave(20, 20))), reference, rtol=1e-5, atol=1e-5
    )
    tokens = np.stack(run(encoder, images, jax.random.key(3)))
    np.testing.assert_allclose(tokens[0], np.repeat(reference[0], 8, axis=0), rtol=1e-5, atol=1e-5)
    assert len(np.unique(tokens[3].sum((1, 2)).round(3))) > 2, "samples draw apart"


def test_images_of_another_size_are_refused(build):
    """The message names both sizes and the remedy."""
    with pytest.raises(
        ValueError,
        match=r"built for 20x20 images and got 20x24; create it with image_size=\(20, 24\)",
    ):
        build()(jnp.zeros((1, 20, 24, 3)))


def test_the_zoo_states_clips_normalisation():
    """The published statistics of CLIP's training pictures, taps of the large encoder, and which
    activation is whose.
    """
    for name, activation in (
        ("clip_l14", "quick_gelu"),
        ("clip_b16", "quick_gelu"),
        ("clip_l14_gelu", "gelu"),
        ("clip_b16_gelu", "gelu"),
    ):
        config = backbones.entry(name).config
        assert isinstance(config, ClipVitConfig)
        assert config.activation == activation
        np.testing.assert_allclose(
            255 * np.array(config.mean), (122.7709, 116.7460, 104.0937), rtol=1e-5
        )
        np.testing.assert_allclose(
            255 * np.array(config.std), (68.5005, 66.6322, 70.3232), rtol=1e-5
        )
    assert backbones.entry("clip_l14").config.taps == (9, 14, 19, 23)
