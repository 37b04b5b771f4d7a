"""Whole detectors: laws of padding and numbers of boxes, a case learnt by heart, every kind of
encoder.
"""

import dataclasses
import functools

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxdg import weights
from jaxdg.backbones import ClipResnetConfig, VitConfig, zoo
from jaxdg.detection.detector import Detector, DetectorConfig
from jaxdg.detection.fcos import FcosConfig
from jaxdg.detection.rcnn.detectors import C4Config, RcnnConfig
from jaxdg.detection.rcnn.roi_heads import CASCADE, RoiHeadsConfig
from jaxdg.detection.rcnn.rpn import RpnConfig
from jaxdg.evaluation.average_precision import AveragePrecision, Detections, Truth

LIGHT = FcosConfig(channels=32, convs=1, levels=(2,))
TWO_STAGES = RcnnConfig(
    RpnConfig(convs=1, sizes=((12.0,), (24.0,)), samples=64, before=(60, 50), after=(50, 40)),
    RoiHeadsConfig(
        stages=CASCADE[:2],
        size=3,
        samples=1,
        convs=1,
        channels=16,
        hidden=24,
        proposals=48,
        detections=20,
        score_threshold=0.2,
    ),
    channels=16,
    levels=(2,),
)
HEADS = pytest.mark.parametrize("head", [LIGHT, TWO_STAGES], ids=["one stage", "two stages"])
SIZE = (60, 90)  # no multiple of the patch


# Most of the time goes into compiling.
jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})


@pytest.fixture(autouse=True, scope="module")
def small_vit():
    """An encoder of the zoo, small."""
    zoo.ZOO["small_vit"] = zoo.Entry(
        VitConfig(width=48, depth=2, heads=2, patch_size=8, taps=(0, 1))
    )
    yield
    del zoo.ZOO["small_vit"]


@functools.cache
def build(head, encoder="small_vit", size=SIZE, classes=3):
    """A detector as (graph, state)."""

    def make():
        return Detector(
            DetectorConfig(num_classes=classes, encoder=encoder, image_size=size, head=head),
            rngs=nnx.Rngs(0),
        )

    return nnx.split(nnx.eval_shape(make))[0], jit(lambda: nnx.split(make())[1])()


def noise(images, size=SIZE, seed=0):
    """Pictures of noise."""
    return np.random.default_rng(seed).standard_normal((images, *size, 3), np.float32)


def batch_of(counts, slots, seed=0):
    """Random true boxes, so many of each image; the other slots hold what padding should not."""
    rng = np.random.default_rng(seed)
    corner = rng.uniform(0, 50, (len(counts), slots, 2))
    boxes = np.concatenate([corner, corner + rng.uniform(0.5, 30, corner.shape)], axis=2).astype(
        np.float32
    )
    valid = np.arange(slots) < np.array(counts)[:, None]
    boxes[~valid] = rng.choice(np.float32([np.nan, np.inf, -5, 0, 1e9]), (int((~valid).sum()), 4))
    classes = np.where(
        valid, rng.integers(0, 3, valid.shape), rng.integers(-9, 99, valid.shape)
    ).astype(np.int32)
    crowd = ~valid & (rng.random(valid.shape) < 0.5)
    return jax.tree.map(
        jnp.asarray, {"boxes": boxes, "classes": classes, "valid": valid, "crowd": crowd}
    )


@HEADS
def test_any_number_of_boxes_compiles_once(head):
    """0, 1 and 300 boxes in one batch, then in another order, then none at all: one program; losses
    and gradients are finite.

    What the empty slots hold changes no bit of them. Without boxes only background is learnt.
    """
    graph, state = build(head)
    images = jnp.asarray(noise(3))

    @jit
    def step(state, images, batch):
        def loss(state):
            model = nnx.merge(graph, state)
            terms = model.losses(
                model(images, train=True), batch, model.loss_denominator(batch), jax.random.key(0)
            )
            return sum(terms.values()), terms

        (_, terms), gradient = jax.value_and_grad(loss, has_aux=True)(state)
        return terms, gradient

    first = batch_of((0, 1, 300), 300)
    terms, gradient = step(state, images, first)
    assert all(np.isfinite(x).all() for x in jax.tree.leaves((terms, gradient)))
    assert all(float(value) > 0 for value in terms.values())
    assert all(
        np.abs(x).max() > 0
        for name, x in weights.tensors(nnx.merge(graph, gradient)).items()
        if name.startswith("head.")
    )

    def clean(x):
        return jnp.where(first["valid"].reshape(3, 300, *[1] * (x.ndim - 2)), x, 7)

    other = {**first, "boxes": clean(first["boxes"]), "classes": clean(first["classes"])}
    again, _ = step(state, images, other)
    for name, value in terms.items():
        assert float(again[name]) == float(value)
    step(state, images, batch_of((300, 0, 1), 300, seed=1))
    empty, gradient = step(state, images, batch_of((0, 0, 0), 300))
    assert all(np.isfinite(x).all() for x in jax.tree.leaves((empty, gradient)))
    assert all((float(value) > 0) == name.endswith("class") for name, value in empty.items())
    assert step._cache_size() == 1


@HEADS
def test_padding_has_no_influence(head):
    """Pixels in the padding change no bit of the detections, which all lie inside the image."""
    graph, state = build(head)
    detect = jit(lambda state, images, sizes: nnx.merge(graph, state).detect(images, sizes))
    # Heads that find something: random outputs instead of the rare ones of the initialisation.
    flat = nnx.to_flat_state(state)
    state = nnx.from_flat_state(
        [(path, leaf * 0 if path[-2:] == ("cls_logits", "bias") else leaf) for path, leaf in flat]
    )
    sizes = np.float32([[60, 90], [41, 90], [30, 33]])
    images = noise(3)
    others = noise(3, seed=1)
    outside = (np.arange(60)[:, None] >= sizes[:, 0, None, None]) | (
        np.arange(90) >= sizes[:, 1, None, None]
    )
    found = detect(state, jnp.asarray(images), jnp.asarray(sizes))
    again = detect(
        state, jnp.asarray(np.where(outside[..., None], others, images)), jnp.asarray(sizes)
    )
    for a, b in zip(found, again, strict=True):
        np.testing.assert_array_equal(a, b)
    boxes = np.asarray(found.boxes)
    valid = np.asarray(found.valid)
    assert (valid.sum(axis=1) > 3).all()
    limits = np.concatenate([sizes[:, ::-1], sizes[:, ::-1]], axis=1)[:, None]
    assert ((boxes >= 0) & (boxes <= limits)).all()
    assert not boxes[~valid].any()


def test_light_head_learns_two_images_by_heart():
    """Seven coloured rectangles of three classes and all sizes in two images: AP50 is 1 after 120
    steps from scratch.
    """
    size = (64, 96)
    steps = 120
    scenes = [
        [(4, 6, 30, 28, 0), (50, 10, 90, 60, 1), (34, 40, 44, 52, 2), (10, 40, 22, 46, 0)],
        [(20, 20, 70, 50, 2), (5, 5, 15, 12, 1), (80, 4, 92, 30, 0)],
    ]
    images = np.full((2, *size, 3), -0.2, np.float32)
    boxes = np.zeros((2, 5, 4), np.float32)
    classes = np.zeros((2, 5), np.int32)
    valid = np.zeros((2, 5), bool)
    for i, scene in enumerate(scenes):
        for j, (*box, k) in enumerate(scene):
            images[i, box[1] : box[3], box[0] : box[2]] = np.eye(3)[k]
            boxes[i, j] = box
            classes[i, j] = k
            valid[i, j] = True
    batch = jax.tree.map(jnp.asarray, {"boxes": boxes, "classes": classes, "valid": valid})
    graph, state = build(dataclasses.replace(LIGHT, levels=(2, 3)), size=size)
    images = jnp.asarray(images)
    optimizer = optax.adam(optax.cosine_decay_schedule(3e-3, steps))

    @jax.jit
    def step(state, moments, images, batch):
        def loss(state):
            model = nnx.merge(graph, state)
            return sum(
                model.losses(
                    model(images), batch, model.loss_denominator(batch), jax.random.key(0)
                ).values()
            )

        updates, moments = optimizer.update(jax.grad(loss)(state), moments)
        return optax.apply_updates(state, updates), moments

    moments = jit(optimizer.init)(state)
    for _ in range(steps):
        state, moments = step(state, moments, images, batch)
    found = jax.tree.map(
        np.asarray, jit(lambda state, images: nnx.merge(graph, state).detect(images))(state, images)
    )
    judge = AveragePrecision(("red", "green", "blue"))
    for i, v in enumerate(valid):
        no = np.zeros(v.sum(), bool)
        seen = found.valid[i]
        judge.add(
            Truth(boxes[i][v], classes[i][v], no, no),
            Detections(found.boxes[i][seen], found.scores[i][seen], found.classes[i][seen]),
        )
    assert judge.results("voc12")["mAP50"] == 100
    assert judge.results("coco")["mAP50"] == pytest.approx(100)


@pytest.fixture
def small_resnet(monkeypatch):
    """A CLIP ResNet of the zoo, small."""
    config = ClipResnetConfig(blocks=(1, 1, 1, 2), widths=(16, 32, 64, 128), embedding=6)
    monkeypatch.setitem(zoo.ZOO, "small_resnet", zoo.Entry(config))
    return "small_resnet"


def test_c4_head_sees_what_the_encoder_sees(small_resnet):
    """A proposal that is the whole image: its last stage, pooled and compared with texts, as CLIP
    would classify the image. Its box is read from the mean of that stage.
    """
    head = C4Config(
        RpnConfig(convs=1, sizes=((32.0, 64.0),), before=(60, 50), after=(50, 4)),
        text_classifier=True,
    )
    model = nnx.merge(*build(head, small_resnet, (224, 224)))
    texts = np.random.default_rng(0).standard_normal((3, 6), np.float32)
    model.set_texts(texts)
    regressor = model.head.roi_heads.box_predictor[0].bbox_pred
    kernel = np.random.default_rng(1).standard_normal((128, 12), np.float32)
    regressor.kernel[...] = jnp.asarray(kernel)
    graph, state = nnx.split(model)
    images = jnp.asarray(noise(1, (224, 224)))

    @jit
    def both(state, images):
        model = nnx.merge(graph, state)
        third, last = model.backbone(images)
        whole = jnp.asarray([[[0.0, 0.0, 224.0, 224.0]]])
        predicted = model.head.roi_heads.predict(0, (third,), whole)
        return *predicted, model.backbone.pool(last), last.mean((0, 1, 2))

    logits, offsets, embedding, mean = both(state, images)
    np.testing.assert_allclose(offsets.ravel(), mean @ kernel, rtol=1e-3, atol=1e-3)
    cosines = (
        texts @ np.asarray(embedding)[0] / np.linalg.norm(texts, axis=1) / np.linalg.norm(embedding)
    )
    np.testing.assert_allclose(logits[0, 0, :3], 100 * cosines, rtol=1e-3, atol=1e-2)
    assert float(logits[0, 0, 3]) == 0


def test_c4_head_trains_the_last_stage_and_its_pool_through_proposals(small_resnet):
    """Both are the encoder's own, stored once, and get gradients through proposals alone; the
    unused pool of other heads gets none.
    """
    head = C4Config(
        RpnConfig(convs=1, sizes=((32.0, 64.0),), samples=32, before=(60, 50), after=(20, 4)),
        RoiHeadsConfig(stages=CASCADE[:1], size=14, samples=1, proposals=12),
    )
    model = nnx.merge(*build(head, small_resnet, (64, 100)))
    names = weights.shapes(model)
    assert "backbone.attnpool.c_proj.kernel" in names
    assert "backbone.layer4.0.conv1.kernel" in names
    assert not any(
        "res5" in name or "attnpool" in name for name in names if name.startswith("head.")
    )
    assert not any(map(model.unused, names))
    graph, state, rest = nnx.split(model, nnx.Param, ...)
    batch = batch_of((1, 3), 4)
    images = jnp.asarray(noise(2, (64, 100)))

    @jit
    @jax.grad
    def gradient(state, images, batch):
        model = nnx.merge(graph, state, rest)
        return sum(
            model.losses(
                model(images), batch, model.loss_denominator(batch), jax.random.key(0)
            ).values()
        )

    moved = weights.tensors(nnx.merge(graph, gradient(state, images, batch), rest))
    for name in (
        "attnpool.c_proj.kernel",
        "layer4.0.conv1.kernel",
        "layer4.1.conv3.kernel",
        "layer1.0.conv1.kernel",
        "conv1.kernel",
    ):
        assert np.isfinite(moved[f"backbone.{name}"]).all()
        assert np.abs(moved[f"backbone.{name}"]).max() > 0, name
    other = nnx.eval_shape(
        lambda: Detector(
            DetectorConfig(num_classes=3, encoder=small_resnet, image_size=(64, 100), head=LIGHT),
            rngs=nnx.Rngs(0),
        )
    )
    assert {name for name in weights.shapes(other) if other.unused(name)} == {
        n for n in weights.shapes(other) if ".attnpool." in n
    }


@pytest.mark.parametrize(
    ("encoder", "head", "strides"),
    [
        ("eva02_clip_l14", RcnnConfig(), (3.5, 7, 14, 28, 56)),
        ("sam_b16", RcnnConfig(), (4, 8, 16, 32, 64)),
        ("augreg_ti16", FcosConfig(), (8, 16, 32, 64)),
        ("mit_b0", FcosConfig(), (8, 16, 32, 64)),
        ("sd15", FcosConfig(), (16, 32, 64, 128)),
        ("clip_rn101", RcnnConfig(), (4, 8, 16, 32, 64)),
        ("clip_rn101", C4Config(), (16,)),
    ],
    ids=lambda x: (
        x if isinstance(x, str) else type(x).__name__ if dataclasses.is_dataclass(x) else ""
    ),
)
def test_every_kind_of_encoder_and_head(encoder, head, strides):
    """Levels cover the whole of an image whose sides no patch divides, and detections come out,
    without computing anything.
    """
    model = nnx.eval_shape(
        lambda: Detector(
            DetectorConfig(num_classes=7, encoder=encoder, image_size=(500, 375), head=head),
            rngs=nnx.Rngs(0),
        )
    )
    graph, state = nnx.split(model)
    heads = model.head if isinstance(head, FcosConfig) else model.head.proposal_generator
    assert heads.strides == strides
    for (h, w), stride in zip(heads.shapes, strides, strict=True):
        assert 500 <= h * stride < 500 + 2 * max(stride, 28)
        assert 375 <= w * stride < 375 + 2 * max(stride, 28)
    images = jax.ShapeDtypeStruct((2, 500, 375, 3), jnp.float32)
    output, found = jax.eval_shape(
        lambda state, x: (lambda m: (m(x, train=True), m.detect(x)))(nnx.merge(graph, state)),
        state,
        images,
    )
    assert [x.shape for x in found] == [(2, 100, 4), (2, 100), (2, 100), (2, 100)]
    points = sum(h * w for h, w in heads.shapes)
    if isinstance(head, FcosConfig):
        assert output.class_logits.shape == (2, points, 7)
    else:
        assert sum(x.shape[1] for x in output.rpn.logits) == points * 3 * len(head.rpn.sizes[0])


def test_what_does_not_fit_is_refused(small_resnet):
    """Each with what is allowed."""

    def make(head, encoder="scratch_ti8"):
        return nnx.eval_shape(
            lambda: Detector(
                DetectorConfig(num_classes=3, encoder=encoder, image_size=(64, 64), head=head),
                rngs=nnx.Rngs(0),
            )
        )

    with pytest.raises(ValueError, match="CLIP ResNet"):
        make(C4Config())
    with pytest.raises(ValueError, match="attention_pool"):
        make(C4Config(attention_pool=False, text_classifier=True), small_resnet)
    for levels in ((), (0, 2), (3, 4)):
        with pytest.raises(ValueError, match="consecutive"):
            make(FcosConfig(levels=levels))
    model = make(LIGHT)
    with pytest.raises(ValueError, match=r"\(64, 64\).*\(64, 72\)"):
        model(jnp.zeros((1, 64, 72, 3)))
    with pytest.raises(ValueError, match="text_classifier"):
        model.set_texts(np.zeros((3, 6), np.float32))
