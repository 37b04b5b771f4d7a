"""The zero-shot decoder against MaskCLIP's computation on open_clip's and timm's modules (golden
file of tests/oracles/golden_clip_text.py).
"""

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdg import backbones, weights
from jaxdg.data.labels import CITYSCAPES
from jaxdg.segmentation import ClipTextHeadConfig, Segmenter, SegmenterConfig, clip_text
from tests import clip_models
from tests.backbones.drawn import run, wave

SIZES = [
    (name, size)
    for name in clip_models.MODELS
    for size in (((160, 160), (128, 256)) if name == "resnet" else ((20, 20), (16, 32)))
]


@pytest.fixture(autouse=True)
def zoo(monkeypatch):
    """The small models by name."""
    clip_models.register(monkeypatch)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """The converted (image, text) towers of each small model."""
    with pytest.MonkeyPatch.context() as patch:
        clip_models.register(patch)
        folder = tmp_path_factory.mktemp("clip")
        return {name: clip_models.convert(name, folder) for name in clip_models.MODELS}


@pytest.fixture(scope="module")
def segmenter(files):
    """`segmenter(name, size, **fields)`: a zero-shot segmenter with both files, whose class
    embeddings are computed once.
    """
    heads = {}

    def make(name, size, **fields):
        config = SegmenterConfig(
            num_classes=19,
            encoder=f"small_{name}",
            image_size=size,
            decoder=ClipTextHeadConfig(CITYSCAPES.names),
            **fields,
        )
        model = nnx.eval_shape(lambda: Segmenter(config, rngs=nnx.Rngs(0)))
        weights.load(model.backbone, files[name][0])
        if name in heads:
            weights.fill(model.head, heads[name], "the head made before")
        else:
            model.head.load_text(files[name][1])
            heads[name] = weights.tensors(model.head)
        return model

    return make


@pytest.mark.parametrize(
    ("name", "size"), SIZES, ids=lambda v: v if isinstance(v, str) else "{}x{}".format(*v)
)
def test_scores_are_maskclips(segmenter, golden, name, size):
    """Scores of every patch for 19 classes, at the trained size and at one that is not square."""
    with np.load(golden / "clip_text.npz") as archive:
        expected = archive["{}/{}x{}".format(name, *size)]
    got = run(segmenter(name, size), wave(*size), method="__call__")
    assert (got.shape, got.dtype) == (expected.shape, jnp.float32)
    np.testing.assert_allclose(got, expected, rtol=0, atol=1e-3)  # of cosines times 100
    decided = np.sort(expected, -1)[..., -1] - np.sort(expected, -1)[..., -2] > 0.01
    np.testing.assert_array_equal(np.argmax(got, -1)[decided], expected.argmax(-1)[decided])
    assert np.abs(expected).max() > 10
    assert np.ptp(expected, axis=(1, 2)).max() > 5, "patches differ"


@pytest.mark.parametrize("name", ["clip", "eva02"])
def test_the_last_attention_is_undone(segmenter, name):
    """After the last but one block no patch sees another: a change of one there changes that one
    alone.
    """
    model = segmenter(name, (20, 20))
    before = jnp.asarray(
        np.random.default_rng(0).standard_normal((1, 5, 5, model.backbone.config.width)),
        jnp.float32,
    )
    changed = before.at[0, 2, 3].add(1.0)

    def values(tokens, monkeypatch):
        monkeypatch.setattr(type(model.backbone), "__call__", lambda self, images: (tokens, tokens))
        return np.asarray(clip_text.values(model.backbone, *model.backbone(wave(20, 20))))

    with pytest.MonkeyPatch.context() as patch:
        moved = np.abs(values(changed, patch) - values(before, patch)).max((0, 3)) > 1e-6
    assert np.argwhere(moved).tolist() == [[2, 3]]


def test_nothing_is_trained(segmenter, files):
    """Every parameter is left alone; class embeddings and temperature are statistics, so that a
    checkpoint holds them.
    """
    model = segmenter("clip", (20, 20))
    names = weights.shapes(model)
    parameters = weights.slots(nnx.state(model, nnx.Param))
    assert all(model.unused(name) for name in parameters)
    assert {"head.texts", "head.logit_scale"} == names.keys() - parameters.keys()
    assert {name for name in names if name.startswith("head.image_projection.")} == {
        "head.image_projection.norm.scale",
        "head.image_projection.norm.bias",
        "head.image_projection.proj.kernel",
    }
    np.testing.assert_allclose(
        model.head.texts[...],
        backbones.text_embeddings(CITYSCAPES.names, files["clip"][1]),
        rtol=1e-6,
    )


def test_scores_come_at_the_images_size(segmenter):
    """One score a class and pixel; half precision is close."""
    images = jnp.asarray(wave(20, 20))
    scores = {}
    for dtype in ("float32", "bfloat16"):
        graph, state = nnx.split(segmenter("clip", (20, 20), dtype=dtype))
        scores[dtype] = jax.jit(lambda state, graph=graph: nnx.merge(graph, state).scores(images))(
            state
        )
        assert (scores[dtype].shape, scores[dtype].dtype) == ((1, 20, 20, 19), jnp.float32)
    assert (
        0
        < np.abs(scores["bfloat16"] - scores["float32"]).max()
        < 0.1 * np.abs(scores["float32"]).max()
    )


def test_what_does_not_go_together_is_refused(segmenter, files):
    """An encoder without a text tower, and the text tower of another encoder."""
    with pytest.raises(
        ValueError, match=r"model.encoder is scratch_ti8, allowed: clip_l14, clip_b16"
    ):
        nnx.eval_shape(
            lambda: Segmenter(
                SegmenterConfig(
                    num_classes=19,
                    encoder="scratch_ti8",
                    image_size=(16, 16),
                    decoder=ClipTextHeadConfig(("a",)),
                ),
                rngs=nnx.Rngs(0),
            )
        )
    model = segmenter("clip", (20, 20))
    with pytest.raises(
        ValueError, match=r"text_weights .* holds small_resnet_text; allowed: small_clip_text"
    ):
        model.head.load_text(files["resnet"][1])
