"""DivAlign: its terms against loops and SciPy, the detector that equal views leave as it is, and a
run.
"""

import copy
from typing import Any

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special
import scipy.stats

from jaxdg import methods
from jaxdg.backbones import VitConfig, zoo
from jaxdg.commands.abstract_step import abstract_step
from jaxdg.config import Config, MeshConfig, validated
from jaxdg.data.augment.corruptions import ALL_KINDS, KINDS
from jaxdg.detection.interface import Judged
from jaxdg.methods.divalign import CORRUPTIONS, DivalignOptions, divergence
from jaxdg.methods.method import interleave
from jaxdg.tasks import run_state as tasks
from jaxdg.training import sharding
from tests.detection.test_fcos import make, random_boxes, random_output, some_targets
from tests.runs import start


def log_probabilities(*shape: int) -> jax.Array:
    x = np.random.default_rng(sum(shape)).normal(0, 3, shape)
    return jnp.asarray(scipy.special.log_softmax(x, axis=-1), jnp.float32)


def slow_divergence(p: jax.Array, q: jax.Array) -> np.ndarray:
    """Summed over choices."""
    p, q = (np.exp(np.asarray(x, float)) for x in (p, q))
    return scipy.stats.entropy(p, q, axis=-1).sum(-1)


def test_the_divergence_is_that_of_scipy():
    """Of one choice among five, and summed over four of two outcomes; never below 0 but for
    rounding.
    """
    for shape in ((2, 50, 1, 5), (2, 30, 4, 2)):
        p, q = log_probabilities(*shape)
        np.testing.assert_allclose(divergence(p, q), slow_divergence(p, q), rtol=1e-4, atol=1e-6)
        assert (np.asarray(divergence(p, q)) > 1e-4).all()
    near = jax.nn.log_softmax(p + 1e-4 * q)
    assert float(divergence(p, near).min()) > -1e-6


def compared(method: Any, judged: Judged | None) -> dict[str, jax.Array]:
    """The terms, which nothing else is needed for."""
    return method.compare(None, None, None, judged, {}, None, jax.random.key(0))


def judged_of(image: jax.Array, copied: jax.Array) -> Judged:
    """Of one image whose views have these logits [p, k], of which the first 4 are offsets too."""
    logits = jnp.stack([image, copied])
    share = jnp.full((2, len(image)), 1 / (2 * len(image)))
    return Judged(
        boxes=jnp.zeros((2, len(image), 4)),
        points=True,
        logits=logits[:, :, None],
        truth=jnp.zeros((2, len(image), 1), jnp.int32),
        share=share,
        offsets=logits[..., :4],
        box_share=share,
    )


def test_equal_views_say_nothing_and_others_move_both():
    """Terms and gradients of equal views are 0, bit for bit; of different ones neither view is a
    constant.
    """
    method = DivalignOptions(True).build(None)

    def total(image, copied):
        return sum(compared(method, judged_of(image, copied)).values())

    one = jnp.asarray(np.random.default_rng(0).normal(0, 3, (20, 6)), jnp.float32)
    measure = jax.jit(jax.value_and_grad(total, argnums=(0, 1)))
    value, gradients = measure(one, one)
    assert float(value) == 0.0
    for gradient in gradients:
        np.testing.assert_array_equal(gradient, np.zeros_like(one))
    value, gradients = measure(one, one[::-1])
    assert float(value) > 0.1
    for gradient in gradients:
        assert (np.abs(gradient) > 1e-6).mean() > 0.9


def slow_terms(head: Any, output: Any, targets: Any) -> tuple[float, float]:
    """Both terms of the single-stage head, from rows that are image and copy in turn, point by
    point.
    """
    assigned = np.asarray(head.assign(targets))
    divergences = []
    distances = []
    for row in range(0, len(assigned), 2):
        for point in np.flatnonzero(assigned[row] >= 0):
            image, copied = (
                scipy.special.expit(np.asarray(output.class_logits[r, point], float))
                for r in (row, row + 1)
            )
            divergences.append(
                sum(
                    c * np.log(c / i) + (1 - c) * np.log((1 - c) / (1 - i))
                    for i, c in zip(image, copied, strict=True)
                )
            )
            for side in range(4):
                far = abs(
                    float(output.offsets[row, point, side] - output.offsets[row + 1, point, side])
                )
                distances.append(0.5 * far**2 * 9 if far < 1 / 9 else far - 0.5 / 9)
    assert 0.05 < np.mean(np.array(distances) < 1 / 18) < 0.95
    return float(np.mean(divergences)), float(np.mean(distances))


def test_terms_of_the_single_stage_head_are_means_over_its_points():
    """Points that predict a box in the image, on all levels, of two images; in two parts the terms
    are those of the batch. Weights multiply; predictions elsewhere change nothing.
    """
    head = make()
    images = [some_targets(random_boxes(f"align {i}", n), slots=9) for i, n in enumerate((9, 4))]
    once = jax.tree.map(lambda *x: jnp.concatenate(x), *images)
    targets = jax.tree.map(lambda x: interleave(x, x), once)
    output = random_output("align", images=4)
    output = output._replace(offsets=0.5 * output.offsets)
    method = DivalignOptions(True, class_weight=2.0, box_weight=0.5).build(None)

    @jax.jit
    def terms(output, targets, denominator):
        return compared(method, head.judge(output, targets, denominator)[1])

    denominator = head.loss_denominator(targets)
    found = terms(output, targets, denominator)
    by_class, by_box = slow_terms(head, output, targets)
    assert float(found["class_alignment"]) == pytest.approx(2 * by_class, rel=1e-4)
    assert float(found["box_alignment"]) == pytest.approx(0.5 * by_box, rel=1e-4)

    parts = [
        terms(*jax.tree.map(lambda x, i=i: x[2 * i : 2 * i + 2], (output, targets)), denominator)
        for i in range(2)
    ]
    for name, value in found.items():
        assert float(parts[0][name] + parts[1][name]) == pytest.approx(float(value), rel=1e-5)
        assert float(parts[1][name]) > 0
    unused = (head.assign(targets) < 0)[..., None]
    elsewhere = output._replace(
        class_logits=jnp.where(unused, 5.0, output.class_logits),
        offsets=jnp.where(unused, 7.0, output.offsets),
    )
    assert terms(elsewhere, targets, denominator) == found
    nothing = targets._replace(valid=jnp.zeros_like(targets.valid))
    none = terms(output, nothing, head.loss_denominator(nothing))
    assert set(map(float, none.values())) == {0.0}


@pytest.fixture(scope="module", autouse=True)
def small():
    """A small encoder in the zoo, and one device."""
    zoo.ZOO["tiny8"] = zoo.Entry(VitConfig(width=16, depth=2, heads=2, patch_size=8, taps=(0, 1)))
    one = sharding.make_mesh(MeshConfig(1, 1), jax.devices()[:1])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sharding, "make_mesh", lambda *_: one)
        yield
    del zoo.ZOO["tiny8"]


def tiny() -> Config:
    """A run of a small single-stage detector on streets."""
    c = Config(steps=4, batch_size=2, log_every=1, eval_every=0, checkpoint_every=2)
    c.task = "detection"
    c.data.crop = c.data.streets.size = (64, 64)
    c.data.streets.images = 8
    c.data.streets.val_images = 2
    c.data.max_boxes = 20
    c.divalign.on = True
    c.model.encoder = "tiny8"
    c.model.pyramid = "none"
    c.model.decoder = "fcos"
    c.model.fcos.channels = 8
    c.model.fcos.groups = 2
    c.model.fcos.convs = 1
    c.model.fcos.levels = (2,)
    c.optimizer.learning_rate = 1e-2
    c.optimizer.clip = 1.0
    c.evaluation.domains = ("clear",)
    return validated(c)


def a_batch(rows: int = 2) -> dict[str, Any]:
    rng = np.random.default_rng(0)
    corners = rng.uniform(0, 20, (rows, 3, 2))
    return {
        "image": jnp.asarray(rng.integers(0, 256, (rows, 64, 64, 3)), jnp.uint8),
        "boxes": jnp.asarray(
            np.concatenate([corners, corners + rng.uniform(4, 16, (rows, 3, 2))], -1), jnp.float32
        ),
        "classes": jnp.asarray(rng.integers(0, 3, (rows, 3)), jnp.int32),
        "valid": jnp.asarray(rng.random((rows, 3)) < 0.8),
        "crowd": jnp.zeros((rows, 3), bool),
    }


def test_without_corruptions_it_is_the_plain_detector():
    """Two equal views give the losses and gradients of one: their sum is twice as large, and so is
    the number of points that it is divided by. The views agree to the last bit.
    """
    c = tiny()
    c.divalign.corruptions = ()
    plain = copy.deepcopy(c)
    plain.divalign.on = False
    batch = a_batch()
    found = []
    for config in (c, plain):
        task: Any = tasks.make_task(config, methods.active(config))
        assert task.preparations(sharding.make_mesh(c.mesh)) == []
        graph, state = nnx.split(nnx.jit(lambda task=task: task.model(nnx.Rngs(0)))())

        @jax.jit
        def measure(state, batch, task=task, graph=graph):
            def loss(state):
                model = nnx.merge(graph, state)
                denominator = task.loss_denominator(model, batch)
                terms = task.losses(model, batch, denominator, jax.random.key(3))
                return sum(terms.values()), terms

            gradients, terms = jax.grad(loss, has_aux=True)(state)
            return terms, jax.tree.map(jnp.linalg.norm, gradients)

        found.append(jax.device_get(measure(state, batch)))
    (twice, gradients), (once, plain_gradients) = found
    assert twice.keys() - once.keys() == {"class_alignment", "box_alignment"}
    assert twice["class_alignment"] == twice["box_alignment"] == 0.0
    for name, value in once.items():
        assert twice[name] == pytest.approx(value, rel=1e-5), name
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-3, atol=1e-6),
        gradients,
        plain_gradients,
    )


def test_views_are_augmented_alike_and_boxes_come_with_each():
    """A copy equal to its image stays so under the photometric augmentation, which changes both;
    rows are image and copy in turn.
    """
    c = tiny()
    task: Any = tasks.make_task(c, methods.active(c))
    (method,) = task.methods
    batch = a_batch()
    mesh = sharding.make_mesh(c.mesh)
    prepared = task.preparation(mesh)({**batch, "corrupted": batch["image"]}, 5)
    np.testing.assert_array_equal(prepared["image"], prepared["corrupted"])
    assert float(jnp.abs(prepared["image"] - batch["image"]).mean()) > 1
    planned = abstract_step(c, mesh).batch
    for name in ("image", "corrupted"):
        x, y = prepared[name], planned[name]
        assert (x.shape[1:], x.dtype) == (y.shape[1:], y.dtype)
    marked = {**prepared, "corrupted": -prepared["image"]}
    rows = method.images(marked["image"], marked)
    np.testing.assert_array_equal(rows[::2], marked["image"])
    np.testing.assert_array_equal(rows[1::2], -marked["image"])
    targets = task.targets(marked)
    assert targets.keys() == {"boxes", "classes", "valid", "crowd"}
    for name, x in targets.items():
        for view in range(2):
            np.testing.assert_array_equal(x[view::2], batch[name])


def test_it_trains_and_resumes(tmp_path):
    """Both terms are part of the loss and above 0; 2 + 2 steps are 4 steps."""
    c = tiny()
    rows = start(c, tmp_path / "whole")
    others = ("step", "loss", "learning_rate", "gradient_norm")
    for row in rows:
        terms = {key: value for key, value in row.items() if key not in others}
        assert terms.keys() == {"class", "box", "fit", "class_alignment", "box_alignment"}
        assert row["loss"] == pytest.approx(sum(terms.values()), rel=1e-5)
        assert min(row["class_alignment"], row["box_alignment"]) > 0
    start(c, tmp_path / "parts", steps=2)
    assert start(c, tmp_path / "parts") == rows


def test_what_it_needs():
    """Known kinds, boxes, rows of its own, and a head that tells and draws nothing; without weights
    of its terms copies alone are left.
    """
    assert set(CORRUPTIONS) <= set(ALL_KINDS)
    assert (len(CORRUPTIONS), len(set(CORRUPTIONS))) == (16, 16)
    assert set(KINDS) - set(CORRUPTIONS) == {"fog", "frost", "snow", "zoom_blur"}
    c = tiny()
    assert methods.corruptions(methods.active(c)) == CORRUPTIONS
    c.divalign.class_weight = c.divalign.box_weight = 0.0
    assert compared(methods.active(validated(c))[0], None) == {}
    c.divalign.corruptions = ("fog", "fog")
    with pytest.raises(
        ValueError, match=r"divalign\.corruptions is .*; allowed: different ones of"
    ):
        validated(c)
    c.divalign.corruptions = ("rain",)
    with pytest.raises(
        ValueError, match=r"divalign\.corruptions is \('rain',\); allowed: different"
    ):
        validated(c)
    c = tiny()
    c.tldr.on = True
    c.model.weights = "before.safetensors"
    with pytest.raises(ValueError, match=r"divalign\.on and tldr\.on are True; allowed: one"):
        validated(c)
    c = Config()
    c.divalign.on = True
    with pytest.raises(ValueError, match=r"divalign\.on is True with task 'segmentation'"):
        validated(c)
    c = tiny()
    c.sdgod.on = True
    with pytest.raises(ValueError, match=r"divalign\.on and sdgod\.on are True; allowed: one"):
        validated(c)
    with pytest.raises(ValueError, match=r"'fcos' does not tell what it says of places"):
        compared(methods.active(tiny())[0], None)
    c = tiny()
    c.model.decoder = "gated_rcnn"
    c.divalign.class_weight = 0.0
    with pytest.raises(
        ValueError, match=r"box_weight 1\.0 with model\.decoder 'gated_rcnn'; allowe"
    ):
        validated(c)
    c.divalign.box_weight = 0.0
    validated(c)
