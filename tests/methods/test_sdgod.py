"""S-DGOD: layers as torch computes them, laws of its terms, and whole runs."""

import functools
from pathlib import Path
import shutil
from typing import Any
import zlib

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxdg
from jaxdg import methods, weights
from jaxdg.backbones import ClipResnetConfig, VitConfig, zoo
from jaxdg.config import Config, MeshConfig, get, validated
from jaxdg.detection.rcnn.rpn import RpnConfig
from jaxdg.methods import sdgod
from jaxdg.tasks import run_state as tasks
from jaxdg.training import sharding
from tests.runs import start

GOLDEN = Path(__file__).parents[1] / "golden" / "sdgod.npz"
CHANNELS = 6
WANTED = 5
SIZE = (48, 96)
KEYS = jax.random.split(jax.random.key(7))
TERMS = {  # of FCOS
    *("class", "box", "fit", "base_class", "base_box", "base_fit"),
    *("invariant", "specific", "proposal", "student_class", "student_score", "student_map"),
}


def drawn(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """The numbers of the golden file, by torch's name and shape."""
    x = np.random.default_rng(zlib.crc32(name.encode())).normal(size=shape)
    positive = name.endswith((".var", ".scale"))
    return np.asarray(0.5 + np.abs(x) if positive else 0.5 * x, np.float32)


def fill(name: str, conv: Any, norm: Any) -> None:
    """Gives a convolution, if there is one, and its BatchNorm the numbers of the golden file."""
    for key in ("scale", "bias", "mean", "var"):
        tensor = getattr(norm, key)
        tensor[...] = jnp.asarray(drawn(f"{name}.norm.{key}", tensor.shape))
    if conv is None:
        return
    rows, columns, inside, outside = conv.kernel.shape
    weight = drawn(f"{name}.weight", (outside, inside, rows, columns))
    conv.kernel[...] = jnp.asarray(weight.transpose(2, 3, 1, 0))
    if conv.bias is not None:
        conv.bias[...] = jnp.asarray(drawn(f"{name}.bias", (outside,)))


def test_layers_are_torchs():
    """Both extractors with running statistics, which they leave as they are, and with the batch's;
    dropout belongs to its key. Students of maps with odd sides, whose halves are rounded up, their
    attention from 0.5 to 1 and their transformation.
    """
    x = jnp.asarray(np.moveaxis(drawn("x", (2, CHANNELS, 9, 11)), 1, -1))

    @jax.jit
    def run(x, keys):
        kw: Any = dict(norm="batch", dtype="float32", rngs=nnx.Rngs(0))
        found = {}
        for side in (3, 5):
            module = sdgod.Extractor(CHANNELS, side, dropout=0.5, **kw)
            for i in (1, 2, 3):
                name = f"extractor.{side}.{i}"
                fill(name, getattr(module, f"conv{i}"), getattr(module, f"norm{i}"))
            dropped = [module(x, key) for key in (keys[0], keys[0], keys[1])]
            found[f"extractor.{side}"] = module(x)
            found[f"extractor.{side}.train"] = module(x, None, True)
        for halvings in (0, 1, 2):
            name = f"student.{halvings}"
            student = sdgod.Student(CHANNELS, WANTED, 3, halvings, **kw)
            for part in ("attention", "scale"):
                for i, layer in enumerate(getattr(student, part)):
                    fill(f"{name}.{part}.{i}", layer.conv, layer.norm)
            fill(f"{name}.attention_norm", None, student.attention_norm)
            fill(f"{name}.transform", student.transform.conv, student.transform.norm)
            found[f"{name}.attention"] = student.attended(x)
            found[name] = student(x)
            found[f"{name}.transform"] = student.transform(found[name])
        return found, dropped

    found, (one, again, other) = run(x, KEYS)
    np.testing.assert_array_equal(one, again)
    assert np.any(one != other)
    for halvings in (0, 1, 2):
        attention = found[f"student.{halvings}.attention"]
        assert float(attention.min()) == 0.5
        assert float(attention.max()) <= 1
    golden = dict(np.load(GOLDEN))
    assert found.keys() == golden.keys()
    for name, value in found.items():
        np.testing.assert_allclose(value, golden[name], rtol=1e-4, atol=1e-5, err_msg=name)


def test_contrast_is_that_of_the_authors():
    """-log(e^p / (e^p + e^n)) of cosines in NumPy; between softplus of -2 and of 2, which it
    reaches; log 2 where both maps are one; blind to the size of each map.
    """
    rng = np.random.default_rng(0)
    anchor, same, other = rng.normal(size=(3, 2, 4, 5, 7)).astype(np.float32)

    def cosine(a, b):
        return (a * b).sum(-1) / np.linalg.norm(a, axis=-1) / np.linalg.norm(b, axis=-1)

    p = np.exp(cosine(same, anchor))
    n = np.exp(cosine(other, anchor))
    anchor, same, other = map(jnp.asarray, (anchor, same, other))
    got = sdgod.contrast(anchor, same, other)
    np.testing.assert_allclose(got, -np.log(p / (p + n)), rtol=1e-5)
    np.testing.assert_allclose(sdgod.contrast(3 * anchor, 0.1 * same, 70 * other), got, rtol=1e-5)
    np.testing.assert_allclose(sdgod.contrast(anchor, same, same), np.log(2), rtol=1e-6)
    np.testing.assert_allclose(sdgod.contrast(anchor, anchor, -anchor), 0.126928, rtol=1e-5)
    np.testing.assert_allclose(sdgod.contrast(anchor, -anchor, anchor), 2.126928, rtol=1e-5)


def test_scores_and_maps_are_learned_where_they_differ():
    """At the teacher's scores and any shift of them the entropy is least: it has the value of the
    entropy and no gradient. Maps that are equal have the distance 0 and no gradient; for one image
    it is torch's norm over the batch.
    """
    rng = np.random.default_rng(0)
    teacher = rng.normal(size=(3, 1, 5)).astype(np.float32)
    p = jax.nn.softmax(jnp.asarray(teacher) / 2)
    value, gradient = jax.value_and_grad(lambda s: sdgod.cross_entropy(p, s / 2).sum())(
        jnp.asarray(teacher + 7)
    )
    np.testing.assert_allclose(value, -np.sum(p * np.log(p)), rtol=1e-5)
    np.testing.assert_allclose(gradient, 0, atol=1e-6)
    other = teacher + rng.normal(size=teacher.shape).astype(np.float32)
    assert float(sdgod.cross_entropy(p, jnp.asarray(other) / 2).sum()) > float(value)

    x, y = map(jnp.asarray, rng.normal(size=(2, 1, 3, 4, 5)).astype(np.float32))
    np.testing.assert_allclose(sdgod.distance(x, y), np.sqrt(np.sum((x - y) ** 2)) / 12, rtol=1e-6)
    zero = jax.grad(lambda x: sdgod.distance(x, y).sum())(y)
    np.testing.assert_array_equal(zero, 0)


def test_points_are_read_between_the_four_nearest_features():
    """A map that grows evenly has at a point the value of its place."""
    y, x = np.mgrid[:6, :8].astype(np.float32)
    ramp = jnp.asarray(np.stack([16 * (x + 0.5), 16 * (y + 0.5)], axis=-1)[None])
    places = np.array([[8, 8], [50, 31], [100.5, 77.25], [120, 88]], np.float32)
    boxes = jnp.asarray(np.tile(places, 2)[None])
    np.testing.assert_allclose(sdgod.at_points(ramp, boxes, 16)[0], places, rtol=1e-5)


def test_as_many_parameters_as_the_authors_added():
    """On maps of 256, 512 and 1024 channels with seven classes and background."""

    def names(on):
        c = Config(task="detection")
        c.model.encoder = "clip_rn101"
        c.model.decoder = "faster_rcnn_c4"
        c.model.faster_rcnn_c4.attention_pool = False
        c.data.source = "daytime_clear"
        c.data.crop = (64, 64)
        c.sdgod.on = on
        task = tasks.make_task(c, methods.active(c))
        assert len(task.labels.names) == 7
        return weights.shapes(nnx.eval_shape(lambda: tasks.extended(task, jax.random.key(0), ())))

    plain, added = names(False), names(True)
    assert plain.items() < added.items()
    statistics = (".mean", ".var")
    new = {name: s for name, s in added.items() if name not in plain}
    count = sum(int(np.prod(s)) for name, s in new.items() if not name.endswith(statistics))
    assert count == 47_805_464


@pytest.fixture(scope="module", autouse=True)
def small():
    """Small encoders in the zoo, one device."""
    zoo.ZOO["tiny16"] = zoo.Entry(
        VitConfig(width=16, depth=4, heads=2, patch_size=16, taps=(0, 1, 2, 3))
    )
    zoo.ZOO["small_resnet"] = zoo.Entry(
        ClipResnetConfig(blocks=(1, 2, 1, 1), widths=(16, 32, 64, 128), embedding=6)
    )
    one = sharding.make_mesh(MeshConfig(1, 1), jax.devices()[:1])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sharding, "make_mesh", lambda *_: one)
        yield
    del zoo.ZOO["tiny16"], zoo.ZOO["small_resnet"]


def experiment(kind: str, **changes) -> Config:
    """A run on streets: fcos on a plain encoder, c4 on a ResNet; changes by dotted name."""
    c = Config(
        steps=2, batch_size=2, log_every=1, eval_every=0, checkpoint_every=1, task="detection"
    )
    c.data.crop = c.data.streets.size = SIZE
    c.data.streets.images = 8
    c.data.streets.val_images = 2
    c.data.max_boxes = 50
    c.sdgod.on = True
    c.model.encoder = "tiny16"
    c.model.decoder = "fcos"
    c.model.fcos.channels = 8
    c.model.fcos.groups = 2
    c.model.fcos.convs = 1
    c.model.fcos.levels = (2,)
    if kind == "c4":
        c.model.encoder = "small_resnet"
        c.model.decoder = "faster_rcnn_c4"
        head = c.model.faster_rcnn_c4
        head.attention_pool = False
        head.rpn = RpnConfig(
            convs=1, sizes=((8.0, 16.0),), samples=16, before=(30, 30), after=(20, 20)
        )
        head.roi.size = 4
        head.roi.proposals = 16
    c.optimizer.learning_rate = 1e-2
    c.optimizer.clip = 1.0
    c.evaluation.domains = ("clear",)
    for field, value in changes.items():
        holder, _, name = field.replace("__", ".").rpartition(".")
        setattr(get(c, holder) if holder else c, name, value)
    return validated(c)


def batch_of() -> dict[str, Any]:
    """Noise with two and one true boxes."""
    rng = np.random.default_rng(0)
    boxes = np.array([[10, 8, 40, 36], [50, 20, 62, 30], [0, 0, 0, 0]], np.float32)
    boxes = np.stack([boxes, boxes[[0, 2, 2]]])
    boxes[1, 0] += 4
    return jax.tree.map(
        jnp.asarray,
        {
            "image": rng.integers(0, 256, (2, *SIZE, 3)).astype(np.uint8),
            "boxes": boxes,
            "classes": np.array([[0, 2, 0], [1, 0, 0]], np.int32),
            "valid": np.array([[True, True, False], [True, False, False]]),
        },
    )


KINDS = pytest.mark.parametrize("kind", ["fcos", "c4"])


@functools.cache
def built(kind: str) -> tuple[Any, Any, Any]:
    """The task of a run, and its model before training as (graph, state)."""
    c = experiment(kind)
    task = tasks.make_task(c, methods.active(c))

    def make():
        return nnx.split(tasks.extended(task, jax.random.key(0), ()))

    return task, nnx.eval_shape(make)[0], jax.jit(lambda: make()[1])()


def prepared(task: Any) -> dict[str, Any]:
    """A batch as a step gets it."""
    return task.preparation(sharding.make_mesh(MeshConfig()))(batch_of(), 0)


@functools.cache
def computed(kind: str) -> tuple[Any, Any, Any, Any]:
    """Of a step: all terms for either of two keys, the statistics after it, and the gradient of the
    students' terms.
    """
    task, graph, state = built(kind)
    params, rest = nnx.split_state(state, nnx.Param, ...)

    @jax.jit
    def run(params, rest, batch, key):
        def students(params):
            model = nnx.merge(graph, params, rest, copy=True)
            terms = task.losses(model, batch, task.loss_denominator(model, batch), key)
            own = [x for name, x in terms.items() if name.startswith("student_")]
            return sum(own), (terms, nnx.state(model, nnx.Not(nnx.Param)))

        return jax.value_and_grad(students, has_aux=True)(params)

    (_, (terms, after)), gradient = run(params, rest, prepared(task), KEYS[0])
    (_, (others, _)), _ = run(params, rest, prepared(task), KEYS[1])
    return terms, others, after, gradient


def by_name(kind: str, state: Any) -> dict[str, np.ndarray]:
    """Tensors of a part of the state."""
    flat = dict(nnx.to_flat_state(state))
    slots = weights.slots(state)
    return {
        name: np.asarray(flat[slot.path][...])[() if slot.layer is None else slot.layer]
        for name, slot in slots.items()
    }


@KINDS
def test_the_teacher_gets_no_gradient_from_its_students(kind):
    """The three students' terms move neither an extractor nor pyramid and head, which a ResNet's
    last stage is a part of; they move the students and the blocks that those read.
    """
    _, _, _, gradient = computed(kind)
    tensors = by_name(kind, gradient)
    taught = ("students.", "backbone.")
    teacher = ("head.", "neck.", "refinement.", "specific.", "backbone.layer4.")
    last = ("backbone.attnpool.", "backbone.blocks.3.")  # nothing but the teacher reads them
    moved = {name for name, x in tensors.items() if np.abs(x).max() > 0}
    assert not any(name.startswith((*teacher, *last)) for name in moved)
    still = tensors.keys() - moved
    assert {name for name in still if name.startswith(taught)} == {
        name for name in tensors if name.startswith(("backbone.layer4.", *last))
    }


@KINDS
def test_a_step_has_all_terms(kind):
    """All are finite and positive, and another key draws other ones. At the start both extractors
    are as far from what they made, about log 2.
    """
    terms, others, _, _ = computed(kind)
    own = {"rpn_class", "rpn_box", "class", "box"} if kind == "c4" else {"class", "box", "fit"}
    base = {f"base_{name}" for name in own if not name.startswith("rpn_")}
    students = {"student_class", "student_score", "student_map"}
    assert terms.keys() == own | base | students | {"invariant", "specific", "proposal"}
    for name, value in terms.items():
        assert np.isfinite(value), name
        assert float(value) > 0, name
        assert float(value) != float(others[name]), name
    for name in ("invariant", "specific", "proposal"):
        assert 0.1269 < float(terms[name]) < 2.1270
        np.testing.assert_allclose(terms[name], np.log(2), atol=0.15)


@KINDS
def test_running_statistics_move_in_training(kind):
    """Those of all layers that training adds, and of no other."""
    _, _, after, _ = computed(kind)
    _, _, state = built(kind)
    before = by_name(kind, nnx.filter_state(state, nnx.Not(nnx.Param)))
    tensors = by_name(kind, after)
    moved = {name for name, x in tensors.items() if np.any(x != before[name])}
    added = ("refinement.", "specific.", "students.")
    assert moved == {name for name in tensors if name.startswith(added)}
    assert len(moved) > 20


class Identity(nnx.Module):
    """An extractor that leaves maps as they are."""

    proposes_only = False

    def __call__(self, x, key=None, train=False):
        return x


@KINDS
def test_without_its_parts_it_is_the_plain_detector_twice(kind):
    """E_DI the identity and no weight but the base losses': each loss of the boxes is there twice,
    and all are those of the plain detector.
    """
    _, graph, state = built(kind)
    parts = ("contrast", "proposal_contrast", "distillation")
    c = experiment(kind, **{f"sdgod__{part}": 0.0 for part in parts})
    task = tasks.make_task(c, methods.active(c))
    plain_task = tasks.make_task(experiment(kind, sdgod__on=False), ())

    @jax.jit
    def both(state, batch, key):
        found = []
        for own, refinement in ((task, Identity()), (plain_task, None)):
            model = nnx.merge(graph, state, copy=True)
            model.refinement = refinement
            found.append(own.losses(model, batch, own.loss_denominator(model, batch), key))
        return found

    terms, plain = both(state, prepared(task), KEYS[0])
    twice = {name for name in plain if not name.startswith("rpn_")}
    assert terms.keys() == plain.keys() | {f"base_{name}" for name in twice}
    for name, value in plain.items():
        np.testing.assert_allclose(terms[name], value, rtol=1e-5, err_msg=name)
        if name in twice:
            np.testing.assert_allclose(terms[f"base_{name}"], value, rtol=1e-5, err_msg=name)


@KINDS
def test_the_branch_that_is_judged(kind):
    """The head reads E_DI's map, or the encoder's own one, of which proposals never come."""
    _, graph, state = built(kind)
    images = jnp.asarray(np.random.default_rng(0).normal(size=(1, *SIZE, 3)), jnp.float32)

    @jax.jit
    def outputs(state):
        model: Any = nnx.merge(graph, state)
        invariant = model(images)
        model.refinement.proposes_only = True
        base = model(images)
        features = model.encode(images)
        own = model.decode(features)
        refined = model.refinement(features[model.read[0]])
        return invariant, base, own, model.decode(model.with_first(features, refined))

    invariant, base, own, by_hand = outputs(state)
    jax.tree.map(np.testing.assert_array_equal, invariant, by_hand)
    if kind == "c4":
        own = own._replace(rpn=by_hand.rpn)
    jax.tree.map(np.testing.assert_array_equal, base, own)
    assert np.abs(jax.tree.leaves(base)[0] - jax.tree.leaves(invariant)[0]).max() > 1e-3


@KINDS
def test_the_trained_model_has_the_first_extractor_alone(kind):
    """What is left in the end is the model that is built for evaluation, also on a hierarchical
    encoder.
    """
    c = experiment(kind)
    task = tasks.make_task(c, methods.active(c))
    plan = tasks.Blueprint.of(task, "none")
    assert plan.finished is not None
    one = sharding.make_mesh(MeshConfig())
    like, _ = tasks.abstract_state(plan, c, one, task.methods)
    left = jax.eval_shape(lambda state: plan.finish(task, state), like)
    assert jax.tree.structure(left) == jax.tree.structure(plan.finished.abstract)
    names = weights.shapes(nnx.merge(plan.finished.graph, *plan.finished.abstract))
    assert "refinement.conv3.kernel" in names
    assert not any(name.startswith(("specific.", "students.")) for name in names)


def test_a_run_resumes_and_is_loaded_with_the_first_extractor(tmp_path):
    """A step after a checkpoint is that of the run that never stopped, to the last bit, with
    running statistics; the workdir predicts, twice the same.
    """
    off = ("base", "contrast", "proposal_contrast")  # less to compile
    c = experiment("fcos", **{f"sdgod__{part}": 0.0 for part in off})
    rows = start(c, tmp_path / "whole")
    own = {"class", "box", "fit", "student_class", "student_score", "student_map"}
    assert rows[0]["loss"] == pytest.approx(sum(rows[0][name] for name in own), rel=1e-5)
    stored = tasks.stored_tensors(tmp_path / "whole")
    assert np.any(stored["refinement.norm1.mean"] != 0)
    shutil.copytree(tmp_path / "whole", tmp_path / "part")
    shutil.rmtree(tmp_path / "part" / "checkpoints" / "2")
    assert start(c, tmp_path / "part") == rows
    for name, tensor in tasks.stored_tensors(tmp_path / "part").items():
        np.testing.assert_array_equal(tensor, stored[name], err_msg=name)
    model: Any = jaxdg.load(tmp_path / "part")
    image = np.random.default_rng(0).integers(0, 256, (40, 70, 3)).astype(np.uint8)
    one, again = (model.predict(image) for _ in range(2))
    for field in ("boxes", "scores", "classes"):
        np.testing.assert_array_equal(getattr(one, field), getattr(again, field))


def test_parts_of_a_batch_add_up():
    """With GroupNorm and without dropout, the terms of an image twice and of another one twice are
    together twice those of both, at the denominator of both.
    """
    c = experiment("fcos", sdgod__norm="group", sdgod__dropout=0.0)
    task = tasks.make_task(c, methods.active(c))
    batch = prepared(task)
    batch["image"] = batch["image"].astype(jnp.float32)  # counts as augmented

    @jax.jit
    def terms(batch, whole):
        model: Any = tasks.extended(task, jax.random.key(0), ())
        return task.losses(model, batch, task.loss_denominator(model, whole), KEYS[0])

    both = terms(batch, batch)
    parts = [
        terms(jax.tree.map(lambda x, row=row: x[np.array([row, row])], batch), batch)
        for row in (0, 1)
    ]
    assert set(both) == TERMS
    for name, value in both.items():
        np.testing.assert_allclose(sum(x[name] for x in parts), 2 * value, rtol=1e-4)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"model__encoder": "small_resnet"},
            r"sdgod\.on is True with model\.encoder 'small_resnet'",
        ),
        (
            {"model__decoder": "gated_rcnn"},
            r"sdgod\.base is 1\.0 with model\.decoder 'gated_rcnn'; allowed: 0",
        ),
        ({"sdgod__temperature": 0.0}, r"sdgod\.temperature is 0\.0; allowed"),
        ({"sdgod__norm": "layer"}, r"sdgod\.norm is 'layer'; allowed"),
        ({"tldr__on": True, "model__weights": "x"}, r"sdgod\.on and tldr\.on are True"),
        (
            {"task": "segmentation", "model__decoder": "linear"},
            r"sdgod\.on is True with task 'segmentation'",
        ),
    ],
)
def test_settings_that_do_not_fit_are_told(changes, message):
    """A pyramid of many maps, another task, another method that changes rows, a head that counts
    its steps, wrong values.
    """
    with pytest.raises(ValueError, match=message) as error:
        experiment("fcos", **changes)
    assert "\n" not in str(error.value)
