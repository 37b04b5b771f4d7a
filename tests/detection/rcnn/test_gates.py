"""Gates of box heads: laws of draws and masks, torch (golden), sizes, and what is trained."""

import functools

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdg import weights
from jaxdg.backbones import ClipResnetConfig, zoo
from jaxdg.backbones.resizing import adaptive_matrix
from jaxdg.detection.detector import Detector, DetectorConfig
from jaxdg.detection.interface import HeadContext
from jaxdg.detection.rcnn import gates
from jaxdg.detection.rcnn.detectors import C4Config
from jaxdg.detection.rcnn.gated import (
    AttendedTextScore,
    GatedBoxHead,
    GatedC4Config,
    GatedRcnnConfig,
    GatedRes5Head,
    Opened,
)
from jaxdg.detection.rcnn.gates import GatesConfig, SlotAttention
from jaxdg.detection.rcnn.roi_heads import CASCADE, BoxHead, Res5Head, RoiHeadsConfig
from jaxdg.detection.rcnn.rpn import RpnConfig
from jaxdg.training.step import shown
from tests.detection import models

LOGITS = np.float32([-2, -0.5, 0, 1, 3])
ROWS = 5
ROI = RoiHeadsConfig(stages=CASCADE[:1], size=14, samples=1, proposals=12, class_agnostic=False)
SCENES = ("a clear day", "a wet night", "a foggy morning")
INTENDED = GatedC4Config(
    RpnConfig(convs=1, sizes=((32.0, 64.0),), samples=32, before=(60, 50), after=(20, 4)),
    ROI,
    text_classifier=True,
    gates=GatesConfig(SCENES, sparsity=5.0, balance=1.0),
)
jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})


def test_gates_open_with_their_probability():
    """Over 10 000 draws within three standard deviations; without a key a logit decides by its
    sign, and 0 is open.
    """
    count = 10_000
    drawn = np.asarray(gates.gate(jnp.tile(LOGITS, (count, 1)), jax.random.key(0)))
    assert set(np.unique(drawn)) == {0, 1}
    p = 1 / (1 + np.exp(-np.float64(LOGITS)))
    assert (np.abs(drawn.mean(0) - p) < 3 * np.sqrt(p * (1 - p) / count)).all()
    np.testing.assert_array_equal(gates.gate(jnp.asarray(LOGITS)), [0, 0, 1, 1, 1])


def test_gates_have_the_gradient_of_the_soft_draw():
    """That of sigmoid((logit + noise) / 0.66667), by hand."""
    key = jax.random.key(1)
    got = jax.grad(lambda x: gates.gate(x, key).sum())(jnp.asarray(LOGITS))
    u = np.float64(jax.random.uniform(key, LOGITS.shape))
    soft = 1 / (1 + np.exp(-(LOGITS + np.log(u) - np.log(1 - u)) * 1.5))
    np.testing.assert_allclose(got, 1.5 * soft * (1 - soft), rtol=1e-4)


@pytest.fixture(scope="module")
def slots():
    """Slot attention with texts and without, with torch's weights."""
    found = []
    for texts in (5, None):
        module = SlotAttention(6, texts, dtype="float32", rngs=nnx.Rngs(0))
        for name in ("to_v", "norm_pre_ff", *(("to_q", "to_k") if texts else ())):
            models.fill(getattr(module, name), name)
        for name in ("norm_slots", "norm_input") if texts else ():
            models.fill(getattr(module, name), name)
        for part in ("ih", "hh"):
            models.fill(getattr(module.gru, part), f"gru.{part}")
        for i in (0, 2):
            models.fill(getattr(module, f"mlp_{i}"), f"mlp.{i}")
        found.append(module)
    return found


def test_slot_attention_equals_torch(slots, golden):
    """Its linear layers, LayerNorms and GRUCell, in three rounds."""
    x = jnp.asarray(models.normal("slots", (4, 6)))
    texts = jnp.asarray(models.normal("scenes", (3, 5)))
    with np.load(golden / "gates.npz") as file:
        for module, name in zip(slots, ("slots", "own"), strict=True):
            got = jax.jit(lambda x, texts, module=module: module(x, texts))(x, texts)
            np.testing.assert_allclose(got, file[name], rtol=1e-4, atol=1e-5)


def test_slot_attention_asks_for_a_set_of_texts(slots):
    """Their order is of no consequence, and equal texts are as one: scenes that all hold one phrase
    guide nothing.
    """
    run = jax.jit(lambda x, texts: slots[0](x, texts))
    x = jnp.asarray(models.normal("slots", (4, 6)))
    texts = jnp.asarray(models.normal("scenes", (3, 5)))
    np.testing.assert_allclose(run(x, texts[jnp.asarray([2, 0, 1])]), run(x, texts), atol=1e-5)
    np.testing.assert_allclose(run(x, texts[jnp.asarray([1, 1, 1])]), run(x, texts[1:2]), atol=1e-5)
    assert np.abs(run(x, texts) - run(x, texts[1:2])).max() > 1e-3


def test_pooling_and_resizing_of_cells_equal_torch(golden):
    """14x14 to 2x2 and 7x7 to 1x1, as in the last stage, and sides that cells do not divide."""
    with np.load(golden / "gates.npz") as file:
        for inside, outside in ((14, 2), (7, 1), (7, 4), (5, 2)):
            image = models.normal("map", (inside, inside))
            matrix = adaptive_matrix(inside, outside)
            small = matrix @ image @ matrix.T
            np.testing.assert_allclose(small, file[f"pool_{inside}_{outside}"], atol=1e-6)
            large = gates.spread_cells(jnp.asarray(small)[None, ..., None], inside)[0, ..., 0]
            np.testing.assert_allclose(large, file[f"nearest_{outside}_{inside}"], atol=1e-6)
    for side, cells in ((14, 2), (7, 1)):
        gate = gates.spatial_gate(GatesConfig(), 3, side, dtype="float32", rngs=nnx.Rngs(0))
        x = jnp.asarray(models.normal("x", (2, side, side, 3)))
        assert gate(x).shape == (2, cells, cells, 1)


def test_parameters_are_as_many_as_published():
    """22 389 760 in the gates and 25 282 048 with the classifier's slot attention; without the
    first masks and the classifier's texts, what nothing reads is not there.
    """

    def sizes(**options):
        head = GatedC4Config(text_classifier=True, gates=GatesConfig(SCENES), **options)
        config = DetectorConfig(
            num_classes=7, encoder="clip_rn101", image_size=(600, 1067), head=head
        )
        model = nnx.eval_shape(lambda: Detector(config, rngs=nnx.Rngs(0)))
        heads = model.head.roi_heads
        parts = heads.box_head[0].gates, heads.box_predictor[0].cls_score
        return [sum(x.size for x in jax.tree.leaves(nnx.state(part, nnx.Param))) for part in parts]

    gated, attended = sizes()
    assert (gated, gated + attended) == (22_389_760, 25_282_048)
    gated, attended = sizes(first_mask=False, class_attention=False)
    assert gated == 22_389_760 - (3_680_256 + 2 * 4_204_544)
    assert attended == 2_892_288 - 2 * 512 * 513 - 2 * 1024


@pytest.fixture(scope="module")
def resnet():
    """A CLIP ResNet of the zoo, small."""
    config = ClipResnetConfig(blocks=(1, 1, 1, 2), widths=(16, 32, 64, 128), embedding=6)
    zoo.ZOO["gated_resnet"] = zoo.Entry(config)
    yield config
    del zoo.ZOO["gated_resnet"]


@pytest.fixture(scope="module")
def context(resnet):
    """What a head is built for, with statistics of its own in every norm."""
    backbone = nnx.jit(lambda: resnet.build(rngs=nnx.Rngs(0)))()
    state = nnx.state(backbone.layer4, nnx.BatchStat)
    state = jax.tree.map(
        lambda x: x + 0.3 * jnp.abs(jnp.asarray(models.normal("statistics", x.shape))), state
    )
    nnx.update(backbone.layer4, state)
    return HeadContext(backbone, 3, [(4, 4)], [16], (64, 64), "float32")


@pytest.fixture(scope="module")
def pooled():
    """Features of proposals."""
    return jnp.asarray(models.normal("pooled", (ROWS, 14, 14, 64)))


def gated(context, **options):
    """A gated head."""
    return GatedRes5Head(
        GatedC4Config(roi=ROI, gates=GatesConfig(**options)), context, rngs=nnx.Rngs(1)
    )


def run(head, x):
    """Its vectors for inference."""
    graph, state = nnx.split(head)
    return jax.jit(lambda state, x: nnx.merge(graph, state)(x))(state, x)


def test_open_gates_are_the_plain_head_bit_for_bit(context, pooled):
    """Learned gates whose last layers are 0, as logits of 0 are open, and fixed masks of ones.

    Operation by operation: a compiled program fuses the products with ones, and rounds otherwise.
    """
    plain = Res5Head(context.backbone, True)
    learned = gated(context)
    for block in learned.gates:
        block.mask_s.atten_s.kernel[...] *= 0
        for mask in (block.mask_c1, block.mask_c2):
            mask.atten_c_conv.kernel[...] *= 0
    with jax.disable_jit():
        expected = plain(pooled[:1])
        for head in (learned, gated(context, fixed=True, density=1.0)):
            for one, other in zip(head(pooled[:1]), expected, strict=True):
                np.testing.assert_array_equal(one, other)


def test_shut_gates_leave_the_shortcut(context, pooled):
    """A block is ReLU(shortcut + the shift of its third norm), as its third convolution sees 0."""
    vectors = run(gated(context, fixed=True, density=0.0), pooled)
    x = np.asarray(pooled)
    for i in range(2):
        block = context.backbone.layer4.single(i)
        if i == 0:
            convolve, norm = block.downsample
            x = x.reshape(ROWS, 7, 2, 7, 2, 64).mean((2, 4)) @ np.asarray(convolve.kernel[0, 0])
            x = (x - norm.mean[...]) * norm.scale[...] / np.sqrt(norm.var[...] + 1e-5)
            x = x + norm.bias[...]
        norm = block.bn3
        factor = norm.scale[...] / np.sqrt(norm.var[...] + 1e-5)
        x = np.maximum(x + norm.bias[...] - norm.mean[...] * factor, 0)
    np.testing.assert_allclose(vectors[1], x.mean((1, 2)), rtol=1e-4, atol=1e-5)


def test_fixed_masks_have_an_exact_density(context):
    """Half of the 32 channels, and the masks of two blocks differ."""
    head = gated(context, fixed=True, cell=2)
    masks = [np.asarray(block.mask_c2.mask[...]) for block in head.gates]
    assert [mask.sum() for mask in masks] == [16, 16]
    assert (masks[0] != masks[1]).any()
    assert np.sum(head.gates[0].mask_s.mask[...]) == 24  # of 7 x 7, to the nearest even half


def test_work_is_that_of_the_open_part(context):
    """1 with all gates open; with all shut the convolution beside the first block and the gates
    themselves; a case by hand.
    """
    first = gated(context).gates[0]
    one, zero = jnp.ones(1), jnp.zeros(1)
    convolutions = 196 * 64 * 32, 196 * 9 * 32 * 32, 49 * 32 * 128
    shortcut = 49 * 64 * 128
    own = 4 * 9 * 64 + (64 * 32 + 32 * 32) + 2 * 32 * 32
    assert first.work(one, one, one) == sum(convolutions) + shortcut + own
    assert first.work(zero, zero, zero) == shortcut + own
    a, b, c = convolutions
    expected = a * 0.5 * 0.25 + b * 0.5 * 0.25 * 0.75 + c * 0.5 * 0.75 + shortcut + own
    assert first.work(one * 0.5, one * 0.25, one * 0.75) == expected


def test_regularisers_pull_towards_their_shares(context):
    """The work towards `density` from either side, with 5 times the squared difference; each gate
    towards its root at first, and nowhere when the range has grown; a half batch has half of it.
    """
    graph, state = nnx.split(gated(context, sparsity=5.0, balance=1.0, fade=10.0).gating)
    counts = jnp.asarray([True, True, False])

    def terms(work, steps=0.0, share=1.0):
        gating = nnx.merge(graph, state, copy=True)
        gating.steps[...] = jnp.asarray(steps)
        gating.note(Opened(jnp.full((2, 3), 0.2), jnp.full((4, 3), 0.9), work), counts)
        return gating.terms(jnp.asarray(share)), nnx.state(gating)

    for level in (0.2, 0.9):
        work = jnp.asarray([level, level, 7.0])
        value, slope = jax.value_and_grad(lambda work: terms(work)[0]["sparsity"])(work)
        np.testing.assert_allclose(value, 5 * (level - 0.5) ** 2, rtol=1e-5)
        assert (np.sign(slope) == [np.sign(level - 0.5)] * 2 + [0]).all()

    def balance(*steps):
        return float(terms(jnp.full(3, 0.5), *steps)[0]["balance"])

    root = 0.5**0.5
    np.testing.assert_allclose(balance(0.0), (root - 0.2) ** 2 + (0.9 - root) ** 2, rtol=1e-5)
    tight = np.exp(-0.3)
    by_hand = (tight * root - 0.2) ** 2 + max(0.9 - (1 - tight + tight * root), 0) ** 2
    np.testing.assert_allclose(balance(3.0, 0.5), by_hand / 2, rtol=1e-5)
    assert balance(1e4) == 0
    after = terms(jnp.full(3, 0.5), 3.0, 0.5)[1]
    assert float(after["steps"][...]) == 3.5
    assert {name: float(x) for name, x in shown(after).items()} == pytest.approx(
        {"open_space": 0.2, "open_channel": 0.9, "work": 0.5}
    )


def test_training_heeds_the_rows_that_count(context, pooled):
    """Every gate gets a gradient, and norms see the batch. Rows that do not count change neither
    the statistics nor the vectors and gradients of the others; without any all stays finite.
    """
    graph, state, rest = nnx.split(gated(context, sparsity=5.0, balance=1.0), nnx.Param, ...)

    @jit
    @functools.partial(jax.grad, has_aux=True)
    def learn(state, x, counts):
        head = nnx.merge(graph, state, rest, copy=True)
        vectors = head(x, jax.random.key(0), True, counts)
        terms = head.terms(jnp.ones(()))
        used = [jnp.where(counts[:, None], vector, 0) for vector in vectors]
        loss = sum(jnp.sum(vector**2) for vector in used) + sum(terms.values())
        return loss, (used, terms, nnx.state(head, nnx.BatchStat))

    counts = jnp.arange(ROWS) < 3
    one, two = (learn(state, x, counts) for x in (pooled, pooled.at[3:].set(100.0)))
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(two), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-3)
    slopes, (_, terms, statistics) = one
    assert set(terms) == {"sparsity", "balance"}
    moved = weights.tensors(nnx.merge(graph, slopes, rest))
    last = [name for name in moved if name.endswith(("atten_s.kernel", "atten_c_conv.kernel"))]
    assert len(last) == 6
    assert all(np.abs(moved[name]).max() > 0 for name in last)
    norm = statistics["gates"][0]["mask_c1"]["atten_c_norm"]
    assert np.abs(norm["mean"][...]).max() > 0
    assert 0 < float(shown(statistics)["open_channel"]) < 1
    nothing = learn(state, pooled, counts & False)
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(nothing))


def test_texts_have_a_say_in_classes_only_if_they_are_attended():
    """The fault of the authors' code, kept behind `class_attention`: the refinement of a vector
    there does not change with the texts that it is to read. As described it does.
    """
    x = jnp.asarray(models.normal("x", (4, 6)))
    texts = [jnp.asarray(models.normal(name, (3, 6))) for name in ("one", "two")]
    for reads in (True, False):
        score = AttendedTextScore(6, 3, reads, dtype="float32", rngs=nnx.Rngs(0))
        refined = jax.jit(lambda x, texts, score=score: score.slot_attention(x, texts))
        one, two = (refined(x, each) for each in texts)
        assert (np.abs(one - two).max() > 1e-3) == reads
        assert np.abs(one - x).max() > 1e-3


def detector(head):
    """A small detector, without numbers."""
    config = DetectorConfig(num_classes=3, encoder="gated_resnet", image_size=(64, 96), head=head)
    return nnx.eval_shape(lambda: Detector(config, rngs=nnx.Rngs(0)))


def test_a_detector_has_the_terms_and_scenes_of_its_gates(resnet):
    """Its losses have both regularisers, and scenes fill their room alone. Without the first masks
    their gates do not exist, so nothing trains or decays them.
    """
    model = detector(INTENDED)
    graph, state = nnx.split(model)
    batch = {
        "boxes": jnp.asarray([[[4.0, 4.0, 40.0, 50.0]]]),
        "classes": jnp.zeros((1, 1), jnp.int32),
        "valid": jnp.ones((1, 1), bool),
    }

    def losses(state, images):
        model = nnx.merge(graph, state)
        denominator = model.loss_denominator(batch)
        return model.losses(model(images, train=True), batch, denominator, jax.random.key(0))

    terms = jax.eval_shape(losses, state, jnp.zeros((1, 64, 96, 3)))
    assert {"class", "box", "sparsity", "balance"} < set(terms)
    head = model.head.roi_heads.box_head[0]
    assert head.scenes.shape == (3, 6)
    head.scenes = nnx.BatchStat(jnp.zeros(head.scenes.shape))  # numbers in place of a shape
    model.set_scenes(np.ones((3, 6), np.float32))
    np.testing.assert_array_equal(head.scenes[...], np.ones((3, 6)))
    with pytest.raises(ValueError, match=r"\(3, 6\).*\(2, 6\)"):
        model.set_scenes(np.zeros((2, 6), np.float32))
    released = detector(GatedC4Config(roi=ROI, first_mask=False))
    assert any("mask_c1" in name for name in weights.shapes(model))
    assert not any("mask_c1" in name for name in weights.shapes(released))
    with pytest.raises(ValueError, match=r"gates\.scenes"):
        detector(C4Config(roi=ROI)).set_scenes(np.zeros((2, 6), np.float32))


PYRAMID = RoiHeadsConfig(
    stages=CASCADE[:1], size=5, channels=6, convs=0, fcs=2, hidden=16, class_agnostic=False
)


def on_pyramid(**options):
    """A gated head on a pyramid of 8 channels, of an encoder of 12, and features for it."""
    config = GatedRcnnConfig(roi=PYRAMID, channels=8, gates=GatesConfig(cell=1, **options))
    backbone = nnx.Module()
    backbone.channels = (12,)
    context = HeadContext(backbone, 3, [], [], (64, 64), "float32")
    head = nnx.jit(lambda: GatedBoxHead(config, context, rngs=nnx.Rngs(0)))()
    return head, jnp.asarray(models.normal("pooled", (ROWS, 5, 5, 8)))


def test_a_pyramid_has_gates_on_features_and_units():
    """All open they are the plain head bit for bit and all work is done; all shut the first layer
    has given 0, and what is left of the work is none; learned ones follow their scenes.
    """
    head, x = on_pyramid(fixed=True, density=1.0)
    with jax.disable_jit():
        vectors, opened = head.run(x, None, None)
        np.testing.assert_array_equal(vectors[0], BoxHead.__call__(head, x)[0])
    assert (np.asarray(opened.work) == 1).all()
    head, _ = on_pyramid(fixed=True, density=0.0)
    head.fc2.bias[...] = jnp.asarray(models.normal("bias", (16,)))
    vectors, opened = head.run(x, None, None)
    np.testing.assert_allclose(vectors[0], np.maximum(head.fc2.bias[...], 0)[None].repeat(ROWS, 0))
    assert not np.asarray(opened.work).any()
    head, _ = on_pyramid(scenes=SCENES)
    open_by = []
    for name in ("one", "two"):
        head.scenes[...] = jnp.asarray(models.normal(name, (3, 12)))
        _, opened = head.run(x, jax.random.key(0), jnp.ones(ROWS, bool))
        open_by.append(np.asarray(opened.channel))
    assert (open_by[0] != open_by[1]).any()


def test_settings_that_do_not_go_together_are_refused():
    """Each with what is allowed."""
    for options, message in (
        ({"sparsity": 5.0}, r"gates\.sparsity is 5\.0; allowed: 0"),
        ({"balance": 1.0}, r"gates\.balance is 1\.0; allowed: 0"),
        ({"scenes": SCENES}, r"gates\.scenes .*; allowed: \(\)"),
    ):
        with pytest.raises(ValueError, match=message):
            GatedC4Config(gates=GatesConfig(fixed=True, **options)).check("gated_c4")
    for head, message in (
        (GatedRcnnConfig(gates=GatesConfig(file="x")), r"gates\.file is x; allowed: None"),
        (GatedRcnnConfig(roi=RoiHeadsConfig()), r"roi\.stages is .*; allowed: one"),
        (GatedRcnnConfig(roi=RoiHeadsConfig(stages=CASCADE[:1], fcs=0)), r"roi\.fcs is 0"),
    ):
        with pytest.raises(ValueError, match=message):
            head.check("gated_rcnn")
