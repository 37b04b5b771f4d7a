"""Box heads against torchvision and torch (golden), slow NumPy versions, and laws."""

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdg.detection.arrays import Targets
from jaxdg.detection.losses import minus_smaller
from jaxdg.detection.rcnn.roi_heads import (
    BoxHead,
    BoxPredictor,
    RoiHead,
    RoiHeads,
    RoiHeadsConfig,
    TextScore,
)
from jaxdg.detection.rcnn.rpn import Proposals
from tests.detection import models
from tests.detection.test_nms import slow as slow_nms


@pytest.fixture(scope="module")
def faster_rcnn():
    """That of torchvision."""
    return models.faster_rcnn().head


@pytest.fixture(scope="module")
def output(faster_rcnn, golden):
    """Of its first stage, for the stored levels."""
    return jax.jit(lambda levels: faster_rcnn(levels))(models.levels(golden))


def test_faster_rcnn_detects_as_torchvision(faster_rcnn, output, golden):
    """The same boxes, scores and classes in the same order, through proposals, RoIAlign, heads, and
    suppression by class.
    """
    sizes = jnp.asarray([models.IMAGE] * 2, jnp.float32)
    found = jax.jit(lambda output: faster_rcnn.detections(output, sizes))(output)
    with np.load(golden / "detectors.npz") as file:
        assert np.sum(found.valid, axis=1).tolist() == file["found"].tolist()
        np.testing.assert_allclose(found.scores[found.valid], file["scores"], atol=1e-4)
        np.testing.assert_array_equal(found.classes[found.valid] + 1, file["labels"])
        np.testing.assert_allclose(found.boxes[found.valid], file["boxes"], atol=5e-3)


def test_losses_equal_torchvision(faster_rcnn, output, golden):
    """Cross entropy and L1 of all proposals and true boxes, with a box for each class, but for what
    they are divided by.
    """
    losses = jax.jit(
        lambda output, batch: faster_rcnn.losses(
            output, Targets.of(batch), jnp.asarray(2.0), jax.random.key(0)
        )
    )
    terms = losses(output, models.targets())
    with np.load(golden / "detectors.npz") as file:
        factor = file["counted"][1] / (models.PROPOSALS * 2)
        np.testing.assert_allclose(
            [terms["class"], terms["box"]], file["roi_losses"] * factor, rtol=1e-4
        )


def test_box_head_equals_torch(golden):
    """Convolutions with LayerNorm, and linear layers that read rows, columns, channels."""
    config = RoiHeadsConfig(size=3, channels=8, convs=2, fcs=2, hidden=12)
    head = nnx.jit(lambda: BoxHead(config, 5, dtype="float32", rngs=nnx.Rngs(0)))()
    models.fill(head.conv1, "box_head.conv1")
    models.fill(head.conv2, "box_head.conv2")
    models.fill(
        head.fc1,
        "box_head.fc1",
        (12, 72),
        lambda w: w.reshape(12, 8, 3, 3).transpose(2, 3, 1, 0).reshape(72, 12),
    )
    models.fill(head.fc2, "box_head.fc2")
    with np.load(golden / "detectors.npz") as file:
        pooled = jnp.asarray(models.normal("pooled", (4, 3, 3, 5)))
        for got in jax.jit(lambda x: head(x))(pooled):
            np.testing.assert_allclose(got, file["box_head"], rtol=1e-4, atol=1e-5)


CONFIG = RoiHeadsConfig(
    size=2,
    channels=6,
    convs=1,
    hidden=8,
    proposals=24,
    positive=0.5,
    detections=12,
    score_threshold=0.2,
)
SIZES = np.float32([[48, 64], [40, 50]])


@pytest.fixture(scope="module")
def cascade():
    """Three stages whose boxes move by much."""

    @nnx.jit
    def make():
        kw = dict(dtype="float32", rngs=nnx.Rngs(2))
        heads = [BoxHead(CONFIG, 5, **kw) for _ in range(3)]
        return heads, [BoxPredictor((8, 8), 3, class_agnostic=True, **kw) for _ in range(3)]

    heads, predictors = make()
    for i, predictor in enumerate(predictors):
        predictor.cls_score.kernel[...] = jnp.asarray(0.6 * models.normal(f"score {i}", (8, 4)))
        predictor.bbox_pred.kernel[...] = jnp.asarray(
            (0.3 + 0.3 * i) * models.normal(f"move {i}", (8, 4))
        )
    return RoiHeads(CONFIG, heads, predictors, (8.0,))


@pytest.fixture(scope="module")
def scene():
    """Features of two images, proposals near true boxes and elsewhere, true boxes."""
    features = (jnp.asarray(models.normal("level", (2, 6, 8, 5))),)
    truth = np.float32(
        [
            [[4, 4, 24, 28], [30, 10, 60, 40], [0, 0, 0, 0]],
            [[10, 20, 30, 38], [0, 0, 0, 0], [0, 0, 0, 0]],
        ]
    )
    valid = np.array([[True, True, False], [True, False, False]])
    near = truth[:, [0, 0, 0, 1, 1, 1, 0, 1]] + 3 * models.normal("near", (2, 8, 4))
    boxes = np.concatenate([near, np.tile(np.float32([[20, 2, 44, 20]]), (2, 1, 1))], axis=1)
    boxes = np.clip(boxes, 0, SIZES[:, None][..., [1, 0, 1, 0]]).astype(np.float32)
    exists = (boxes[..., 2:] > boxes[..., :2] + 1).all(axis=-1)
    targets = Targets(
        jnp.asarray(truth), jnp.asarray([[2, 0, 0], [1, 0, 0]], jnp.int32), jnp.asarray(valid)
    )
    return features, Proposals(jnp.asarray(boxes), jnp.asarray(exists)), targets


def compiled(heads):
    """The function `predict` of heads."""
    return jax.jit(lambda *args: heads.predict(*args), static_argnums=0)


def moved(offsets, boxes, weight, size):
    """Where offsets (x and y weighted, sides by half) move boxes, cut off at the image's border; in
    float64.
    """
    shift = offsets[:, :2] / weight
    grow = offsets[:, 2:] / (weight / 2)
    sides = boxes[:, 2:] - boxes[:, :2]
    centre = (boxes[:, :2] + boxes[:, 2:]) / 2 + shift * sides
    sides = sides * np.exp(np.minimum(grow, np.log(62.5)))
    h, w = size
    return np.clip(
        np.concatenate([centre - sides / 2, centre + sides / 2], axis=1), 0, [w, h, w, h]
    )


def overlap(a, b):
    """IoU of a box with boxes."""
    both = np.prod(np.maximum(np.minimum(a[2:], b[:, 2:]) - np.maximum(a[:2], b[:, :2]), 0), axis=1)
    return both / (np.prod(a[2:] - a[:2]) + np.prod(b[:, 2:] - b[:, :2], axis=1) - both)


def passes(predict, features, boxes, size):
    """Stage, its threshold and weight, class probabilities and offsets, boxes of an image [r, 4]
    before; for each stage.
    """
    for stage, (threshold, weight) in enumerate(CONFIG.stages):
        logits, offsets = (
            np.asarray(x[0], np.float64)
            for x in predict(stage, features, jnp.asarray(boxes[None], jnp.float32))
        )
        p = np.exp(logits - logits.max(axis=1, keepdims=True))
        yield threshold, weight, p / p.sum(axis=1, keepdims=True), offsets[:, 0], boxes
        boxes = moved(offsets[:, 0], boxes, weight, size)


def test_cascade_detects_as_a_loop_would(cascade, scene):
    """Boxes go from stage to stage with each one's weights, probabilities are averaged, classes
    suppressed by themselves, 12 left.
    """
    features, proposals, _ = scene
    found = jax.jit(lambda *scene: cascade.detections(*scene, jnp.asarray(SIZES)))(
        features, proposals
    )
    predict = compiled(cascade)
    for i, size in enumerate(SIZES):
        exists = np.asarray(proposals.valid[i])
        boxes = np.asarray(proposals.boxes[i], np.float64)
        total = 0
        for _, weight, p, offsets, before in passes(
            predict, (features[0][i : i + 1],), boxes, size
        ):
            total = total + p / 3
            boxes = moved(offsets, before, weight, size)
        rows = []
        for k in range(3):
            scores = total[:, k]
            stand = exists & (total[:, k] > 0.2) & (boxes[:, 2:] > boxes[:, :2]).all(axis=1)
            rows += [
                (scores[j], k, *boxes[j])
                for j in slow_nms(boxes.astype(np.float32), scores, stand, 0.5)
            ]
        rows = np.array(sorted(rows, reverse=True)[:12])
        valid = np.asarray(found.valid[i])
        assert valid.sum() == len(rows) > 5
        np.testing.assert_allclose(found.scores[i][valid], rows[:, 0], atol=1e-5)
        np.testing.assert_array_equal(found.classes[i][valid], rows[:, 1])
        np.testing.assert_allclose(found.boxes[i][valid], rows[:, 2:], atol=2e-3)
        assert not np.asarray(found.scores[i])[~valid].any()


def test_cascade_losses_equal_a_loop(cascade, scene):
    """Each stage looks at the boxes of the one before with its own threshold and weights; all are
    drawn, and divided by 24 an image.
    """
    features, proposals, targets = scene
    losses = jax.jit(
        lambda *scene: cascade.losses(
            *scene, jnp.asarray(SIZES), jnp.asarray(2.0), jax.random.key(0)
        )
    )
    terms = losses(features, proposals, targets)
    predict = compiled(cascade)
    expected = {"class": 0.0, "box": 0.0}
    counts = []
    for i, size in enumerate(SIZES):
        truth, classes = (
            np.asarray(x[i])[np.asarray(targets.valid[i])] for x in (targets.boxes, targets.classes)
        )
        boxes = np.concatenate([np.asarray(x.boxes[i], np.float64) for x in (proposals, targets)])
        alive = np.concatenate([np.asarray(x.valid[i]) for x in (proposals, targets)])
        for threshold, weight, p, offsets, before in passes(
            predict, (features[0][i : i + 1],), boxes, size
        ):
            alive &= (before[:, 2:] > before[:, :2]).all(axis=1)
            counts.append(0)
            for j in np.flatnonzero(alive):
                shared = overlap(before[j], truth.astype(np.float64))
                best = shared.argmax()
                thing = shared[best] >= threshold
                expected["class"] -= np.log(p[j, classes[best] if thing else 3]) / 48
                if thing:
                    counts[-1] += 1
                    sides = before[j, 2:] - before[j, :2]
                    wanted = truth[best, 2:] - truth[best, :2]
                    shift = (
                        (truth[best, :2] + truth[best, 2:] - before[j, :2] - before[j, 2:])
                        / 2
                        / sides
                        * weight
                    )
                    error = np.abs(
                        offsets[j] - np.concatenate([shift, np.log(wanted / sides) * weight / 2])
                    )
                    expected["box"] += error.sum() / 48
    assert min(counts[1], counts[2]) > 0  # every stage has things to learn
    for name, value in expected.items():
        np.testing.assert_allclose(terms[name], value, rtol=1e-4)


def test_stages_share_the_gradient_to_features(cascade, scene, optimized):
    """Of three stages each sends a third of its gradient to the features, and the whole to its own
    layers.
    """
    features, proposals, _ = scene
    alone = RoiHeads(
        RoiHeadsConfig(**{**vars(CONFIG), "stages": CONFIG.stages[:1]}),
        [cascade.box_head[0]],
        [cascade.box_predictor[0]],
        (8.0,),
    )
    both = []
    for heads in (cascade, alone):
        graph, state = nnx.split(heads)

        def loss(state, features, graph=graph):
            return jnp.sum(nnx.merge(graph, state).predict(0, features, proposals.boxes)[0] ** 2)

        both.append(jax.jit(jax.grad(loss, (0, 1)))(state, features))
    (shared, to_features), (whole, to_features_alone) = both
    for a, b in zip(to_features, to_features_alone, strict=True):
        assert np.abs(b).max() > 0
        np.testing.assert_allclose(3 * a, b, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(
        shared["box_head"][0]["fc1"]["kernel"][...],
        whole["box_head"][0]["fc1"]["kernel"][...],
        rtol=1e-5,
        atol=1e-6,
    )


def test_few_proposals_leave_slots_empty(cascade, scene):
    """Without true boxes and with one proposal or none, losses are of background alone, or 0, and
    gradients finite.
    """
    features, proposals, targets = scene
    nothing = Targets(targets.boxes * 0, targets.classes * 0, targets.valid & False)

    @jax.jit
    def both(features, few):
        def loss(features):
            return cascade.losses(
                features, few, nothing, jnp.asarray(SIZES), jnp.asarray(2.0), jax.random.key(0)
            )

        return loss(features), jax.grad(lambda features: sum(loss(features).values()))(features)

    for count in (0, 1):
        few = proposals.valid & (np.arange(proposals.valid.shape[1]) < count)
        terms, gradient = both(features, Proposals(proposals.boxes, few))
        assert float(terms["box"]) == 0
        assert (float(terms["class"]) > 0) == (count > 0)
        assert np.isfinite(gradient[0]).all()


SCORED = RoiHeadsConfig(stages=((0.5, 10.0),), class_agnostic=False, proposals=8, positive=0.5)


def penalised_losses(scene, **options):
    """A function of the class scores [2, 8, 4] and offsets [2, 8, 3, 4] of sampled boxes to the
    terms, compiled.
    """
    _, proposals, targets = scene
    config = RoiHeadsConfig(**{**vars(SCORED), **options})

    @jax.jit
    def losses(logits, offsets):
        class Scored(RoiHeads):
            def predict(self, stage, features, boxes, key=None, train=False, valid=None):
                return logits, offsets

        heads = Scored(config, [], [], (8.0,))
        inputs = proposals, targets, jnp.asarray(SIZES[: len(logits)])
        return heads.losses((), *inputs, jnp.asarray(2.0), jax.random.key(0))

    return losses


def test_a_logit_penalty_is_that_of_g_nas(scene):
    """Its gradient is 2 x 0.5 z / (4 N) at all sampled boxes, N to sample; cross entropy does not
    change for a shift of all scores; off, the terms are the plain ones to the last bit.
    """
    logits = jnp.asarray(models.normal("scores", (2, 8, 4)))
    offsets = jnp.asarray(models.normal("offsets", (2, 8, 3, 4)))
    plain = penalised_losses(scene)(logits, offsets)
    assert penalised_losses(scene, logit_penalty=0.0, penalty_box=True)(logits, offsets) == plain
    penalised = penalised_losses(scene, logit_penalty=0.5)
    terms = penalised(logits, offsets)
    assert {name: terms[name] for name in plain} == plain
    gradient = jax.jit(jax.jacrev(lambda z: penalised(z, offsets)))(logits)
    sampled = np.any(gradient["class"], axis=-1, keepdims=True)
    assert 8 < sampled.sum() < 16
    np.testing.assert_allclose(gradient["logits"], sampled * logits / (4 * 16), rtol=1e-5)
    want = 0.5 * np.sum(sampled * np.square(logits)) / (4 * 16)
    np.testing.assert_allclose(terms["logits"], want, rtol=1e-5)
    shifted = penalised(logits + 3, offsets)
    np.testing.assert_allclose(shifted["class"], terms["class"], rtol=1e-5)
    assert shifted["logits"] > terms["logits"] + 1


def test_a_box_penalty_is_subtracted_where_the_loss_is_larger(scene):
    """The box loss of G-NAS: L1 where the penalty is not smaller, else L1 less the penalty, of each
    positive box's own four offsets; it jumps by the penalty where they meet.
    """
    logits = jnp.zeros((2, 8, 4))
    plain = penalised_losses(scene)
    penalised = penalised_losses(scene, logit_penalty=0.5, penalty_box=True)
    fixed = jnp.asarray(models.normal("offsets", (2, 8, 3, 4)))
    own = np.asarray(jax.jit(jax.grad(lambda o: plain(logits, o)["box"]))(fixed)) != 0
    assert own.any(axis=-1).sum(axis=-1).max() == 1  # of one class
    assert 0 < own.any(axis=(-1, -2)).sum() < 16
    seen = set()
    for factor in (0.01, 0.1, 1.0, 3.0):
        loss = float(plain(logits, factor * fixed)["box"])
        penalty = 0.5 * np.mean(np.square(factor * np.asarray(fixed))[own])
        want = loss - penalty if loss > penalty else loss
        seen.add(loss > penalty)
        np.testing.assert_allclose(penalised(logits, factor * fixed)["box"], want, rtol=1e-4)
    assert seen == {True, False}
    below, above = 1.0, np.nextafter(np.float32(1), np.float32(2))
    assert float(minus_smaller(jnp.float32(below), jnp.float32(1))) == 1
    assert float(minus_smaller(jnp.float32(above), jnp.float32(1))) < 1e-6


@pytest.mark.parametrize("image", [0, 1])
def test_a_part_of_a_batch_compares_its_own_box_penalty(scene, image):
    """One image of a batch of two counts with half of its penalty, and subtracts it where its own
    loss is larger.
    """
    _, proposals, targets = scene
    part = slice(image, image + 1)
    scene = None, *jax.tree.map(lambda x: x[part], (proposals, targets))
    logits = jnp.zeros((1, 8, 4))
    plain = penalised_losses(scene)
    penalised = penalised_losses(scene, logit_penalty=0.5, penalty_box=True)
    fixed = jnp.asarray(models.normal("offsets", (2, 8, 3, 4)))[part]
    own = np.asarray(jax.jit(jax.grad(lambda o: plain(logits, o)["box"]))(fixed)) != 0
    assert own.any()
    seen = set()
    for factor in (0.01, 3.0):
        loss = float(plain(logits, factor * fixed)["box"])
        penalty = 0.5 * np.mean(np.square(factor * np.asarray(fixed))[own]) / 2
        want = loss - penalty if loss > penalty else loss
        seen.add(loss > penalty)
        np.testing.assert_allclose(penalised(logits, factor * fixed)["box"], want, rtol=1e-4)
    assert seen == {True, False}


def test_a_head_is_told_which_boxes_count(scene):
    """In training: for the statistics of a norm. In inference there are none to be made."""
    seen = []

    class Told(RoiHead):
        def __call__(self, x, key=None, train=False, valid=None):
            seen.append((train, None if valid is None else valid.shape))
            vectors = x.reshape(len(x), -1)
            return vectors, vectors

    features, proposals, targets = scene
    config = RoiHeadsConfig(**{**vars(SCORED), "size": 2})

    def both():
        kw = dict(class_agnostic=False, dtype="float32", rngs=nnx.Rngs(0))
        heads = RoiHeads(config, [Told()], [BoxPredictor((20, 20), 3, **kw)], (8.0,))
        sizes = jnp.asarray(SIZES)
        heads.detections(features, proposals, sizes)
        return heads.losses(
            features, proposals, targets, sizes, jnp.asarray(2.0), jax.random.key(0)
        )

    jax.eval_shape(both)
    assert seen == [(False, None), (True, (16,))]


def test_text_scores_are_cosines():
    """100 times the cosine to each text of whatever length, and 0 for background."""
    score = TextScore(6, 3)
    x = models.normal("x", (4, 6))
    texts = models.normal("texts", (3, 6))
    score.texts[...] = jnp.asarray(texts)

    def unit(t):
        return t / np.linalg.norm(t, axis=1, keepdims=True)

    got = jax.jit(lambda x: score(x))(x)
    np.testing.assert_allclose(got[:, :3], 100 * unit(x) @ unit(texts).T, rtol=1e-4, atol=1e-4)
    assert not np.asarray(got[:, 3]).any()


def test_a_cascade_with_boxes_of_each_class_is_refused():
    """It would have to choose one of them for the next stage."""
    with pytest.raises(ValueError, match="class_agnostic"):
        RoiHeads(RoiHeadsConfig(class_agnostic=False), [], [], (8.0,))
