"""The linear head as one matrix product, the segmenter with both decoders, and a task's verdict
against a slow one in NumPy.
"""

import dataclasses
import itertools

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdg import segmentation, weights
from jaxdg.backbones import VitConfig, resizing, zoo
from jaxdg.config import Config, MeshConfig, validated
from jaxdg.data.labels import CAMVID, CITYSCAPES, LabelSet
from jaxdg.evaluation.sliding_window import window_starts
from jaxdg.segmentation import LinearHead, Mask2FormerConfig, Segmenter, SegmenterConfig, decoder
from jaxdg.tasks import run_state as tasks
from jaxdg.tasks.loading import Model
from jaxdg.training import sharding


@pytest.fixture(scope="module", autouse=True)
def tiny():
    """A small encoder in the zoo."""
    zoo.ZOO["tiny4"] = zoo.Entry(
        VitConfig(width=16, depth=4, heads=2, patch_size=8, taps=(0, 1, 2, 3))
    )
    yield
    del zoo.ZOO["tiny4"]


def bilinear(x, size):
    """Four neighbours a pixel, centres aligned, border repeated; in float64, pixel by pixel."""
    b, h, w, c = x.shape
    out = np.zeros((b, *size, c))
    for i in range(size[0]):
        for j in range(size[1]):
            y = max((i + 0.5) * h / size[0] - 0.5, 0)
            z = max((j + 0.5) * w / size[1] - 0.5, 0)
            y0 = int(y)
            z0 = int(z)
            y1 = min(y0 + 1, h - 1)
            z1 = min(z0 + 1, w - 1)
            top = x[:, y0, z0] * (1 - (z - z0)) + x[:, y0, z1] * (z - z0)
            bottom = x[:, y1, z0] * (1 - (z - z0)) + x[:, y1, z1] * (z - z0)
            out[:, i, j] = top * (1 - (y - y0)) + bottom * (y - y0)
    return out


def test_linear_head_is_one_layer_on_concatenated_maps():
    """Maps normalised, enlarged to the finest and concatenated, then one 1x1 layer: NumPy gives the
    head's scores.
    """
    rng = np.random.default_rng(0)
    channels = (6, 4, 5)
    sizes = ((8, 6), (4, 3), (2, 1))
    head = LinearHead(3, channels, rngs=nnx.Rngs(0))
    for _, leaf in nnx.to_flat_state(nnx.state(head, nnx.Param)):
        leaf.set_value(jnp.asarray(rng.normal(size=leaf.shape), jnp.float32))
    features = [
        (2 * rng.normal(size=(2, *s, c)) + 1).astype(np.float32)
        for s, c in zip(sizes, channels, strict=True)
    ]
    maps = []
    for x, norm in zip(features, head.norms, strict=True):
        x = x.astype(np.float64)
        x = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-6)
        maps.append(
            bilinear(x * np.asarray(norm.scale[...]) + np.asarray(norm.bias[...]), sizes[0])
        )
    kernel = np.concatenate([np.asarray(c.kernel[...]) for c in head.classifiers])
    bias = sum(np.asarray(c.bias[...]) for c in head.classifiers)
    expected = np.concatenate(maps, axis=-1) @ kernel + bias
    graph, state = nnx.split(head)

    @jax.jit
    def run(features):
        output = nnx.merge(graph, state)(features)
        return output, head.scores(output, (16, 9))

    output, scores = run(tuple(map(jnp.asarray, features)))
    np.testing.assert_allclose(output, expected, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(scores, bilinear(expected, (16, 9)), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("pyramid", "taps", "finest"),
    [
        ("none", (), (4, 6)),
        ("none", (1, 3), (4, 6)),
        ("layer", (), (16, 24)),
        ("batch", (), (16, 24)),
    ],
)
def test_shapes(pyramid, taps, finest):
    """The output has the finest level's size, the scores the image's; batch statistics exist only
    with BatchNorm.
    """
    config = SegmenterConfig(
        num_classes=7, encoder="tiny4", image_size=(32, 48), taps=taps, pyramid=pyramid
    )
    images = jax.ShapeDtypeStruct((2, 32, 48, 3), jnp.float32)
    model = nnx.eval_shape(lambda: Segmenter(config, rngs=nnx.Rngs(0)))
    graph, state = nnx.split(model)
    for call, size in (
        (lambda m, x: m(x), finest),
        (lambda m, x: m(x, jax.random.key(0), train=True), finest),
        (lambda m, x: m.scores(x), (32, 48)),
    ):
        output = jax.eval_shape(
            lambda s, x, call=call: call(nnx.merge(graph, s, copy=True), x), state, images
        )
        assert (output.shape, output.dtype) == ((2, *size, 7), jnp.float32)
    assert bool(jax.tree.leaves(nnx.state(model, nnx.BatchStat))) == (pyramid == "batch")


SMALL = Mask2FormerConfig(
    num_classes=7,
    hidden=32,
    queries=9,
    heads=4,
    pixel_layers=1,
    pixel_ffn=16,
    layers=2,
    ffn=16,
    points=32,
)


def test_mask2former_scores_are_votes_of_the_last_masks():
    """Class scores at the image's size, against loops: each query's mask, enlarged, votes for its
    classes, "no object" for none.
    """
    config = SegmenterConfig(
        num_classes=7, encoder="tiny4", image_size=(32, 48), pyramid="layer", decoder=SMALL
    )
    graph, state = nnx.split(nnx.eval_shape(lambda: Segmenter(config, rngs=nnx.Rngs(0))))
    rng = np.random.default_rng(0)
    state = jax.tree.map(lambda leaf: rng.normal(0, 0.3, leaf.shape).astype(leaf.dtype), state)
    images = jnp.asarray(rng.normal(size=(2, 32, 48, 3)), jnp.float32)

    @jax.jit
    def run(state, images):
        model = nnx.merge(graph, state)
        return model(images), model.scores(images)

    (classes, masks), scores = run(state, images)
    assert classes.shape == (3, 2, 9, 8)
    assert masks.shape == (3, 2, 9, 16, 24)
    large = bilinear(np.moveaxis(np.asarray(masks[-1], np.float64), 1, -1), (32, 48))
    odds = np.exp(np.asarray(classes[-1], np.float64))
    expected = np.zeros((2, 32, 48, 7))
    for b in range(2):
        for q in range(9):
            expected[b] += np.multiply.outer(
                1 / (1 + np.exp(-large[b, :, :, q])), odds[b, q, :-1] / odds[b, q].sum()
            )
    np.testing.assert_allclose(scores, expected, rtol=1e-4, atol=1e-5)


def test_a_segmenter_for_another_size_takes_over_all_tensors():
    """Parameters stored at 32x48 fill a model for 64x64, the decoder's as they are and the
    encoder's positions as it resizes them.
    """

    def make(size):
        return nnx.eval_shape(
            lambda: Segmenter(
                SegmenterConfig(
                    num_classes=7, encoder="tiny4", image_size=size, decoder=SMALL, pyramid="batch"
                ),
                rngs=nnx.Rngs(0),
            )
        )

    rng = np.random.default_rng(0)
    stored = {
        name: rng.normal(size=shape).astype(np.float32)
        for name, shape in weights.shapes(make((32, 48))).items()
    }
    square = {**stored, "backbone.pos_embed": rng.normal(size=(1, 17, 16)).astype(np.float32)}
    other = make((64, 64))
    weights.fill(other, square, "elsewhere")
    filled = weights.tensors(other)
    resized = resizing.resize_positions(square["backbone.pos_embed"], (8, 8), 1)
    np.testing.assert_allclose(filled.pop("backbone.pos_embed"), resized, atol=1e-6)
    assert {"head.query_feat", "pyramid.fpn1_norm.mean"} < filled.keys()
    for name, tensor in filled.items():
        np.testing.assert_array_equal(tensor, square[name])
    with pytest.raises(
        ValueError, match=r"elsewhere does not fit this Segmenter: 1 missing \(head\.query_feat\)$"
    ):
        weights.fill(
            other,
            {name: tensor for name, tensor in square.items() if name != "head.query_feat"},
            "elsewhere",
        )


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"pyramid": "none", "decoder": SMALL},
            r"decoder mask2former reads four levels .*; set model\.pyramid to layer, batch or",
        ),
        (
            {"decoder": dataclasses.replace(SMALL, hidden=48)},
            r"hidden is 48; allowed: multiples of 32 .* and of heads, 4",
        ),
        (
            {"taps": (1, 3)},
            r"model\.pyramid is 'layer', which reads four taps; model\.taps is \(1, 3\)",
        ),
        (
            {"image_size": (8, 32)},
            r"model\.pyramid is 'layer', which halves the deepest map; .* 8x32 .*at least 16x16",
        ),
    ],
)
def test_parts_that_do_not_fit_are_refused(fields, message):
    """Two taps, an image of one patch, a decoder without its pyramid or of impossible sizes: one
    line that names the field.
    """
    config = SegmenterConfig(
        **{
            "num_classes": 7,
            "encoder": "tiny4",
            "image_size": (32, 32),
            "pyramid": "layer",
            **fields,
        }
    )
    with pytest.raises(ValueError, match=message):
        nnx.eval_shape(lambda: Segmenter(config, rngs=nnx.Rngs(0)))


def test_fewer_queries_than_classes_are_refused():
    """Each class present needs a query of its own: the field is named before anything is built."""
    config = Config()
    config.model.decoder = "mask2former"
    config.model.mask2former.queries = 18
    with pytest.raises(
        ValueError,
        match=(
            r"model\.mask2former\.queries is 18; allowed: at least one for each of the 19 classes"
        ),
    ):
        tasks.make_task(config).model(nnx.Rngs(0))


@dataclasses.dataclass
class Noise:
    """Five images of two sizes with noisy labels, a third of them ignored."""

    labels: LabelSet = CITYSCAPES
    domain: str = "noise"

    def __len__(self) -> int:
        return 5

    def size(self, i: int) -> tuple[int, int]:
        return ((20, 26), (16, 30))[i % 2]

    def name(self, i: int) -> str:
        return f"noise/{i}"

    def __getitem__(self, i: int) -> dict[str, np.ndarray]:
        rng = np.random.default_rng(i)
        label = rng.integers(0, 3 + i, self.size(i)).astype(np.uint8)
        label[rng.random(label.shape) < 1 / 3] = 255
        return {"image": rng.integers(0, 256, (*self.size(i), 3)).astype(np.uint8), "label": label}


@pytest.fixture(scope="module")
def run():
    """Task, plan and random parameters of a small model on two devices."""
    config = Config()
    config.model.encoder = "tiny4"
    config.model.pyramid = "none"
    config.model.taps = (3,)
    config.data.crop = (16, 16)
    config.evaluation.stride = (8, 8)
    config.evaluation.batch_size = 3
    config = validated(config)
    task = tasks.make_task(config)
    mesh = sharding.make_mesh(MeshConfig(2, 1), jax.devices()[:2])
    plan = tasks.Blueprint.of(task, "none")
    rng = np.random.default_rng(0)
    host = jax.tree.map(
        lambda leaf: rng.normal(0, 0.5, leaf.shape).astype(leaf.dtype), plan.abstract
    )
    return task, plan, mesh, host


@pytest.fixture(scope="module")
def model(run):
    """The same model as `jaxdg.load` gives it."""
    task, plan, _, host = run
    return Model(task, plan.graph, jax.device_put(host, jax.devices()[0]), 7)


def test_evaluation_equals_a_slow_one(run, model):
    """Batches of two sizes, padded, on two devices: IoU and mIoU are those of label maps predicted
    one image at a time, by loops.
    """
    task, plan, mesh, host = run
    dataset = Noise()
    ticks = []
    state = jax.device_put(host, sharding.replicated(mesh))
    result = task.evaluator(plan.graph, mesh)(state, dataset, lambda: ticks.append(1))

    maps = [model.predict(dataset[i]["image"]) for i in range(5)]
    assert all(m.shape == dataset.size(i) and m.dtype == np.uint8 for i, m in enumerate(maps))
    expected = {}
    for c, name in enumerate(CITYSCAPES.names):
        intersection = union = 0
        for i in range(5):
            truth = dataset[i]["label"]
            seen = truth != 255
            intersection += (seen & (maps[i] == c) & (truth == c)).sum()
            union += (seen & ((maps[i] == c) | (truth == c))).sum()
        expected[name] = 100 * intersection / union if union else None
    found = result.metrics["IoU"]
    assert list(found) == list(CITYSCAPES.names)
    assert {name for name, v in found.items() if v is None} == {
        name for name, v in expected.items() if v is None
    }
    assert all(
        found[name] == pytest.approx(v, rel=1e-9) for name, v in expected.items() if v is not None
    )
    present = [v for v in expected.values() if v is not None]
    assert result.score == result.metrics["mIoU"] == pytest.approx(np.mean(present), rel=1e-9)
    assert 3 < len(present) < 19  # some classes are nowhere and count as nothing
    assert result.metrics["images"] == 5
    assert len(ticks) == 2  # batches of 4 on 2 devices: three images of one size, two of the other
    assert len(result.pictures) == 2
    assert all(p.dtype == np.uint8 and p.ndim == 3 for p in result.pictures)


def test_a_domain_of_other_classes_is_refused(run):
    """Evaluating on other classes names the domain and both lists before anything is computed."""
    task, plan, mesh, host = run
    with pytest.raises(
        ValueError,
        match=(
            r"domain noise has the classes sky, building.*, but the model was trained on road,"
            r" sidewalk"
        ),
    ):
        task.evaluator(plan.graph, mesh)(host, Noise(CAMVID), lambda: None)


@pytest.mark.parametrize(
    ("image", "found"),
    [
        (np.zeros((16, 16, 3), np.float32), r"float32 \[16, 16, 3\]"),
        (np.zeros((16, 16), np.uint8), r"uint8 \[16, 16\]"),
        (np.zeros((16, 16, 4), np.uint8), r"uint8 \[16, 16, 4\]"),
        (np.zeros((1, 16, 16, 3), np.uint8), r"uint8 \[1, 16, 16, 3\]"),
        (np.zeros((0, 16, 3), np.uint8), r"uint8 \[0, 16, 3\]"),
    ],
)
def test_predict_takes_one_rgb_image(model, image, found):
    """Another type or shape is refused, saying what was given."""
    with pytest.raises(
        ValueError, match=rf"predict takes an RGB image uint8 \[h, w, 3\]; got {found}$"
    ):
        model.predict(image)


def test_predict_takes_numpy_and_jax_arrays(model):
    """A device array gives the map that the host's array gives, also for an image smaller than the
    window.
    """
    image = Noise()[1]["image"]
    np.testing.assert_array_equal(model.predict(jnp.asarray(image)), model.predict(image))
    assert model.predict(image[:5, :7]).shape == (5, 7)


def test_predict_compiles_once_for_many_sizes(run, monkeypatch):
    """Eight sizes of one to three windows a side take four programs, and each gets the scores of an
    array of its own size.
    """
    task, plan, _, host = run
    state = jax.device_put(host, jax.devices()[0])
    traced = []
    plain = segmentation.sliding_window
    monkeypatch.setattr(
        decoder, "sliding_window", lambda *a: (traced.append(a[1].shape), plain(*a))[1]
    )
    predict = task.predictor(plan.graph)
    rng = np.random.default_rng(0)
    window_scores = jax.jit(
        lambda windows: nnx.merge(plan.graph, *state).scores(task.normalize(windows))
    )
    mean = 255 * np.float32(zoo.entry("tiny4").config.mean)

    def scores(image):
        """Of windows one by one, what is missing at the mean."""
        h, w = image.shape[:2]
        full = np.broadcast_to(mean, (max(h, 16), max(w, 16), 3)).copy()
        full[:h, :w] = image
        total = np.zeros((*full.shape[:2], 19))
        seen = np.zeros((*full.shape[:2], 1))
        for y, x in itertools.product(*(window_starts(side, 16, 8) for side in full.shape[:2])):
            here = np.s_[y : y + 16, x : x + 16]
            total[here] += window_scores(full[None][:, *here])[0]
            seen[here] += 1
        return (total / seen)[:h, :w]

    for size in ((16, 16), (9, 12), (17, 24), (20, 23), (24, 18), (25, 32), (30, 31), (32, 17)):
        image = rng.integers(0, 256, (*size, 3)).astype(np.uint8)
        expected = scores(image)
        best = np.sort(expected, axis=-1)
        sure = best[..., -1] - best[..., -2] > 1e-4
        assert sure.mean() > 0.9
        np.testing.assert_array_equal(predict(state, image)[sure], expected.argmax(-1)[sure])
    assert traced == [(1, 16, 16, 3), (1, 24, 24, 3), (1, 32, 32, 3), (1, 32, 24, 3)]
