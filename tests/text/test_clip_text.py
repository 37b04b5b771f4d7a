"""CLIP's text towers against open_clip (golden file made by tests/oracles/golden_clip_text.py)."""

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdg import backbones, weights
from jaxdg.data.labels import CITYSCAPES
from jaxdg.text import tokenizer
from tests import clip_models

TEMPLATES = ("a photo of a {}.", "a bad photo of the {}.", "there is a {} in the scene.")


@pytest.fixture(autouse=True)
def zoo(monkeypatch):
    """The small models by name."""
    clip_models.register(monkeypatch)


@pytest.fixture(scope="module")
def text_files(tmp_path_factory):
    """The converted text tower of each small model."""
    with pytest.MonkeyPatch.context() as patch:
        clip_models.register(patch)
        folder = tmp_path_factory.mktemp("clip")
        return {name: clip_models.convert(name, folder)[1] for name in clip_models.MODELS}


@pytest.mark.parametrize("name", clip_models.MODELS)
def test_embeddings_equal_open_clip(text_files, golden, name):
    """The 19 classes of Cityscapes in one sentence, and five of them averaged over three:
    open_clip's classifier from the same weights.
    """
    with np.load(golden / "clip_text.npz") as archive:
        expected = archive[f"{name}/texts"]
        averaged = archive[f"{name}/averaged"]
    got = backbones.text_embeddings(CITYSCAPES.names, text_files[name])
    assert got.dtype == np.float32
    np.testing.assert_allclose(got, expected, rtol=0, atol=1e-4)
    np.testing.assert_allclose(np.linalg.norm(got, axis=1), 1, rtol=1e-5)
    np.testing.assert_allclose(
        backbones.text_embeddings(CITYSCAPES.names[:5], text_files[name], TEMPLATES),
        averaged,
        rtol=0,
        atol=1e-4,
    )
    # Were another class's embedding computed, or one sentence's, the comparison would fail by far.
    apart = np.linalg.norm(expected[:, None] - expected[None], axis=-1) + 2 * np.eye(19)
    assert apart.min() > 0.02
    assert np.abs(averaged - expected[:5]).max() > 0.05


def test_tokens_after_the_end_do_not_count(text_files):
    """Attention is causal and the end token is read: whatever follows it, the embedding is the
    same; what precedes it counts.
    """
    tower = backbones.load_text_tower(text_files["clip"])
    graph, state = nnx.split(tower)
    embed = jax.jit(lambda ids: nnx.merge(graph, state)(ids))
    ids = tokenizer.tokenize(["a photo of a traffic light."])
    after = ids.copy()
    before = ids.copy()
    after[0, 12:] = np.random.default_rng(0).integers(1, 49406, 65)
    before[0, 2] += 1
    expected = embed(jnp.asarray(ids))
    np.testing.assert_allclose(embed(jnp.asarray(after)), expected, rtol=1e-6, atol=1e-6)
    assert np.abs(embed(jnp.asarray(before)) - expected).max() > 1e-2


def test_the_activation_is_the_towers_own(text_files, golden, monkeypatch):
    """With GELU in place of QuickGELU the same weights give other embeddings, by far more than the
    tolerance above.
    """
    config = backbones.TEXT_TOWERS["small_clip_text"]
    monkeypatch.setitem(
        backbones.TEXT_TOWERS,
        "small_clip_text",
        type(config)(**{**vars(config), "activation": "gelu"}),
    )
    with np.load(golden / "clip_text.npz") as archive:
        expected = archive["clip/texts"]
    assert (
        np.abs(backbones.text_embeddings(CITYSCAPES.names, text_files["clip"]) - expected).max()
        > 1e-3
    )


def test_what_cannot_be_embedded_is_refused(text_files, tmp_path):
    """No names, a template without a place for them, a file that is absent, that holds an image
    tower, or that says nothing of itself.
    """
    with pytest.raises(ValueError, match="at least one name"):
        backbones.text_embeddings([], text_files["clip"])
    with pytest.raises(ValueError, match=r"'a photo' has no \{\}"):
        backbones.text_embeddings(["road"], text_files["clip"], ["a photo"])
    with pytest.raises(FileNotFoundError, match="no weights at"):
        backbones.text_embeddings(["road"], tmp_path / "absent.safetensors")
    image = text_files["clip"].parent / "clip_image.safetensors"
    with pytest.raises(
        ValueError,
        match=(
            r"clip_image.safetensors holds small_clip, no text tower; convert one with --model"
            r" clip_l14_text"
        ),
    ):
        backbones.text_embeddings(["road"], image)
    stored = weights.read(text_files["clip"])
    weights.save(stored, tmp_path / "nameless.safetensors", {})
    with pytest.raises(ValueError, match="holds nothing it tells the name of, no text tower"):
        backbones.text_embeddings(["road"], tmp_path / "nameless.safetensors")
    weights.save(
        {name: t for name, t in stored.items() if name != "ln_final.bias"},
        tmp_path / "cut.safetensors",
        {"model": "small_clip_text"},
    )
    with pytest.raises(
        ValueError, match=r"does not fit this ClipText: 1 missing \(ln_final.bias\)"
    ):
        backbones.text_embeddings(["road"], tmp_path / "cut.safetensors")


def test_a_text_tower_is_no_encoder():
    """Text towers are no encoders of the zoo; an error says what such a name means."""
    assert not backbones.TEXT_TOWERS.keys() & backbones.ZOO.keys()
    assert {name.removesuffix("_text") for name in backbones.TEXT_TOWERS} <= backbones.ZOO.keys()
    with pytest.raises(ValueError, match="clip_l14_text is no encoder but a text tower"):
        backbones.create("clip_l14_text")
    with pytest.raises(ValueError, match="did you mean eva02_clip_l14_text"):
        backbones.create("eva02_clip_l14_txt")
