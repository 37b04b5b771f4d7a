"""Probabilities of classes, batches and test-time augmentation in prediction: by one path with the
label maps, and with evaluation.
"""

import json

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdg import evaluate
from jaxdg.backbones import VitConfig, zoo
from jaxdg.config import Config, validated
from jaxdg.evaluation import protocols
from jaxdg.evaluation.average_precision import Detections
from jaxdg.segmentation import LinearHead, Mask2Former
from jaxdg.tasks import run_state as tasks
from jaxdg.tasks.loading import Model
from jaxdg.tasks.segmentation import in_order
from jaxdg.tasks.task import DomainResult

SIZES = [(24, 18), (20, 23), (17, 24)]  # all padded to one
SCALES = protocols.SCALES


@pytest.fixture(scope="module", autouse=True)
def tiny():
    """A small encoder in the zoo, and few scales, as each is compiled."""
    zoo.ZOO["tiny4"] = zoo.Entry(
        VitConfig(width=16, depth=4, heads=2, patch_size=8, taps=(0, 1, 2, 3))
    )
    protocols.SCALES = (0.5, 1.25)
    yield
    del zoo.ZOO["tiny4"]
    protocols.SCALES = SCALES


def config(**changes) -> Config:
    """Windows of 16 pixels, every 8."""
    c = Config()
    c.model.encoder = "tiny4"
    c.data.crop = (16, 16)
    c.evaluation.stride = (8, 8)
    for field, value in changes.items():
        part, name = field.split("__")
        setattr(getattr(c, part), name, value)
    return c


def loaded(c: Config) -> Model:
    task = tasks.make_task(validated(c))
    plan = tasks.Blueprint.of(task, "none")
    rng = np.random.default_rng(0)
    state = jax.tree.map(
        lambda leaf: rng.normal(0, 0.5, leaf.shape).astype(leaf.dtype), plan.abstract
    )
    return Model(task, plan.graph, jax.device_put(state, jax.devices()[0]), 7)


@pytest.fixture(scope="module")
def linear():
    return loaded(config(model__pyramid="none", model__decoder="linear"))


@pytest.fixture(scope="module")
def masks():
    c = config(model__pyramid="layer", model__decoder="mask2former")
    m = c.model.mask2former
    m.hidden = 32
    m.queries = 19
    m.heads = 2
    m.pixel_layers = m.layers = 1
    m.pixel_ffn = m.ffn = m.points = 16
    return loaded(c)


@pytest.fixture(scope="module")
def images():
    rng = np.random.default_rng(1)
    coarse = [rng.integers(0, 256, (4, 4, 3)) for _ in SIZES]
    return [
        np.kron(x, np.ones((8, 8, 1)))[:h, :w].astype(np.uint8)
        for x, (h, w) in zip(coarse, SIZES, strict=True)
    ]


def softmax(x):
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def raw_scores(model: Model, image: np.ndarray) -> np.ndarray:
    """The decoder's scores of one image, in float64."""
    protocol = protocols.Protocol("native", (16, 16), (8, 8))
    h, w = image.shape[:2]
    size = jnp.array([[h, w]], jnp.int32)
    padded = np.zeros((1, *model.task.padded((h, w)), 3), np.uint8)
    padded[0, :h, :w] = image
    task = model.task
    assert isinstance(task, tasks.Segmentation)
    ((found, _),) = task.views(model.graph)(model.state, jnp.asarray(padded), size, protocol)
    return np.asarray(found, np.float64)[0, :h, :w]


@pytest.mark.parametrize("name", ["linear", "masks"])
def test_scores_are_probabilities_in_the_order_of_the_label_map(name, images, request):
    """Softmax of logits, shares of the sum of Mask2Former's scores, by NumPy; their highest is the
    prediction, bit for bit, and so with augmentation (tested where it compiles quickly).
    """
    model = request.getfixturevalue(name)
    image = images[0]
    scores = model.scores(image)
    assert scores.dtype == np.float32
    assert scores.shape == (24, 18, 19)
    raw = raw_scores(model, image)
    shares = softmax(raw) if name == "linear" else raw / raw.sum(-1, keepdims=True)
    np.testing.assert_allclose(scores, shares, rtol=2e-5, atol=1e-7)
    np.testing.assert_array_equal(scores.argmax(-1), model.predict(image))
    if name == "masks":
        return
    averaged = model.scores(image, tta=True)
    np.testing.assert_allclose(averaged.sum(-1), 1, rtol=1e-5)
    np.testing.assert_array_equal(averaged.argmax(-1), model.predict(image, tta=True))
    assert np.abs(averaged - scores).max() > 1e-3


def test_rounding_leaves_the_order_alone():
    """Scores that differ by their last bit have one probability; the higher keeps the highest."""
    low = np.float32(1e-3)
    high = np.nextafter(low, np.float32(1))
    scores = np.array([[[[low, high, 0], [0, 1, 2], [low, low, 0]]]], np.float32)
    shares = jax.nn.softmax(jnp.asarray(scores))
    assert shares[0, 0, 0, 0] == shares[0, 0, 0, 1]
    ordered = np.asarray(jax.jit(in_order)(scores, shares))
    np.testing.assert_array_equal(ordered.argmax(-1), [[[1, 2, 0]]])
    np.testing.assert_array_equal(ordered[0, 0, 1:], shares[0, 0, 1:])
    np.testing.assert_allclose(ordered, shares, rtol=1e-6)


def test_probabilities_of_a_pixel_that_nobody_claims():
    """Mask2Former's shares add up to 1 where all its scores are 0, too; logits may be any."""
    scores = jnp.array([[[[0.0, 0.0, 0.0, 0.0], [0.2, 0.6, 0.0, 0.0]]]])
    shares = Mask2Former.probabilities(None, scores)  # pyright: ignore[reportArgumentType]
    np.testing.assert_allclose(shares, [[[[0.25] * 4, [0.25, 0.75, 0, 0]]]])
    logits = LinearHead(4, (3,), rngs=nnx.Rngs(0)).probabilities(scores)
    np.testing.assert_allclose(logits, softmax(np.asarray(scores)), rtol=1e-6)


@pytest.mark.parametrize("name", ["linear", "masks"])
def test_a_batch_gives_the_pixels_of_one_by_one(name, images, request):
    """Images of sizes that are padded to one, in one call."""
    model = request.getfixturevalue(name)
    assert len({model.task.padded(size) for size in SIZES}) == 1
    pairs = model.start(images, scores=True)()
    for image, label, (other, scores) in zip(images, model.start(images)(), pairs, strict=True):
        alone = model.predict(image)
        np.testing.assert_array_equal(label, alone)
        np.testing.assert_array_equal(other, alone)
        np.testing.assert_allclose(scores, model.scores(image), rtol=1e-4, atol=1e-6)


def test_augmentation_is_the_evaluations(linear, images):
    """`predict` with tta and the evaluator with evaluation.tta give one label map."""
    c = config(model__pyramid="none", model__decoder="linear", evaluation__tta=True)
    task = tasks.Segmentation(validated(c))
    protocol = task.protocol("noise")
    assert (protocol.scales, protocol.flip) == ((0.5, 1.25), True)
    h, w = shape = task.padded(SIZES[0])
    padded = np.zeros((3, h, w, 3), np.uint8)
    for row, image in zip(padded, images, strict=True):
        row[: image.shape[0], : image.shape[1]] = image
    sizes = np.array(SIZES, np.int32)
    batch = {"image": padded, "size": sizes, "label": np.zeros((3, *shape)), "label_size": sizes}
    labels = task.labelling(linear.graph)(linear.state, jax.tree.map(jnp.asarray, batch), protocol)
    for image, label, (h, w) in zip(images, np.asarray(labels), SIZES, strict=True):
        np.testing.assert_array_equal(linear.predict(image, tta=True), label[:h, :w])


def test_results_with_augmentation_are_told_apart(tmp_path, monkeypatch):
    """The views are mmsegmentation's; the protocol's name and the folder tell, and what was
    averaged. What is augmented already is refused in one line.
    """
    monkeypatch.setattr(protocols, "SCALES", SCALES)
    plain = validated(config())
    c = validated(config(evaluation__tta=True, evaluation__protocol="soma"))
    result = DomainResult({"mIoU": 1.0, "seen": False, "part_of": None, "trained_on": 0}, 1.0, [])
    written = json.loads(json.dumps(evaluate.summary(tasks.make_task(c), c, 7, {"noise": result})))
    assert written["protocol"] == "soma_tta"
    assert written["tta"] == {"scales": [0.5, 0.75, 1.0, 1.25, 1.5, 1.75], "flip": True}
    assert "tta" not in evaluate.summary(tasks.make_task(plain), plain, 7, {"noise": result})
    folder = evaluate.own_folder(tmp_path, 7, plain.evaluation, c.evaluation)
    assert folder == tmp_path / "evaluation_7_soma_tta"
    with pytest.raises(ValueError, match=r"evaluation.tta is True; allowed: False, with protocol"):
        validated(config(evaluation__tta=True, evaluation__protocol="acdc_test"))


def test_detection_has_no_scores_of_pixels():
    """Scores and augmentation are refused, saying why; boxes of a batch are those of one by one."""
    c = config(model__decoder="fcos", evaluation__stride=(8, 8))
    c.task = "detection"
    c.data.crop = (32, 32)
    c.model.taps = ()
    c.model.pyramid = "layer"
    model = loaded(c)
    rng = np.random.default_rng(0)
    images = [rng.integers(0, 256, (*size, 3)).astype(np.uint8) for size in ((30, 40), (50, 20))]
    for options in ({"scores": True}, {"tta": True}):
        with pytest.raises(ValueError, match="are of segmentation; this model detects boxes"):
            model.start(images, **options)
    together = model.start(images)()
    for image, found in zip(images, together, strict=True):
        alone = model.predict(image)
        assert isinstance(alone, Detections)
        np.testing.assert_array_equal(found.classes, alone.classes)
        np.testing.assert_allclose(found.boxes, alone.boxes, atol=1e-3)
