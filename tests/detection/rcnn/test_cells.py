"""Cells of a box head against torch (golden), slow versions and laws, and genotypes against brute
force.
"""

import dataclasses
import itertools
import json
import math

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdg import weights
from jaxdg.commands.genotype import ALPHAS
from jaxdg.config import Config, validated
from jaxdg.detection.detector import Detector, DetectorConfig
from jaxdg.detection.rcnn import cells
from jaxdg.detection.rcnn.cells import Boxes, CellHead, CellRcnnConfig, Depthwise, Mixed, operation
from jaxdg.detection.rcnn.genotype import (
    EDGES,
    NODES,
    OPERATIONS,
    checked,
    discretised,
    drawn,
    resolved,
)
from jaxdg.detection.rcnn.roi_heads import BoxPredictor, RoiHeadsConfig
from tests.detection.models import normal
from tests.detection.rcnn import cell_models as models

TRAIN = Boxes(train=True)
SMALL = CellRcnnConfig(
    channels=5,
    stem=models.STEM,
    roi=RoiHeadsConfig(
        stages=((0.5, 10.0),), size=3, convs=0, fcs=2, hidden=16 * models.WIDTH, channels=models.OUT
    ),
)


@pytest.fixture(autouse=True, scope="module")
def no_draws():
    """Kernels start from zeros: thousands of draws that nothing reads would take a minute."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cells, "TORCH", nnx.initializers.zeros)
        yield


def made(build):
    """A module with the numbers of its parameters' names; nothing is computed."""
    return models.fill(nnx.eval_shape(lambda: build(dtype="float32", rngs=nnx.Rngs(0))))


def head_of(genotype):
    """A small head with the numbers of the golden file."""
    config = dataclasses.replace(SMALL, genotype=genotype)
    return made(lambda **kw: CellHead(config, **kw))


def compiled(head):
    """A function of pooled features and which boxes count, to the vectors in training and the
    state after it.
    """
    graph, state = nnx.split(head)

    @jax.jit
    def run(state, x, valid):
        model = nnx.merge(graph, state, copy=True)
        vectors = model(x, None, True, valid)
        return vectors, nnx.state(model, nnx.BatchStat)

    return lambda x, valid: run(state, jnp.asarray(x), jnp.asarray(valid))


def test_operations_equal_torch(golden):
    """All seven with stride 1 and 2 on maps of 4x4 and 2x2: borders of the mean, the shifted half
    of a factorised reduction, dilated kernels larger than the map.
    """

    def outputs():
        found = {}
        for name, stride, n in models.CASES:
            kw = dict(search=False, dtype="float32", rngs=nnx.Rngs(0))
            module = models.fill(operation(name, models.CHANNELS, stride, **kw))
            x = jnp.asarray(models.map_of(name, n))
            found[f"{name}_{stride}_{n}"] = module(x, TRAIN)
        return found

    found = jax.jit(outputs)()
    with np.load(golden / "cells.npz") as file:
        for name, value in found.items():
            np.testing.assert_allclose(value, file[name], rtol=1e-3, atol=1e-4, err_msg=name)
    assert len(found) == 28


def test_a_search_equals_torch(golden, monkeypatch):
    """A whole head: every operation on every edge, weighed by the softmax of one table for both
    cells. Edges of the same sizes are compiled once.
    """
    plain = Mixed.__call__

    def once(mixed, x, boxes, weights):
        graph, state = nnx.split(mixed)

        @jax.jit
        def run(state, x, weights):
            return plain(nnx.merge(graph, state, copy=True), x, boxes, weights)

        return programs.setdefault((graph, x.shape), run)(state, x, weights)

    programs = {}
    monkeypatch.setattr(Mixed, "__call__", once)
    vector, same = head_of(None)(jnp.asarray(normal("pooled", models.POOLED)), None, True)
    assert len(programs) == 4  # two channels at two strides
    with np.load(golden / "cells.npz") as file:
        np.testing.assert_allclose(vector, file["search"], rtol=1e-3, atol=1e-3)
    np.testing.assert_array_equal(vector, same)


def test_a_genotype_equals_torch_and_boxes_that_do_not_count_change_nothing(golden):
    """Pools without norm, the others with scale and bias. Two boxes more that do not count leave
    the vectors and the running statistics as they are; without any box that counts all are finite.
    """
    run = compiled(head_of(models.GENOTYPE))
    x = normal("pooled", models.POOLED)
    (vector, _), statistics = run(x, np.ones(3, bool))
    with np.load(golden / "cells.npz") as file:
        np.testing.assert_allclose(vector, file["final"], rtol=1e-3, atol=1e-3)
    more = np.concatenate([x, 9 + x[:2]])
    valid = np.array([True, True, True, False, False])
    (with_more, _), with_them = run(more, valid)
    np.testing.assert_allclose(with_more[:3], vector, rtol=1e-4, atol=1e-5)
    leaves = jax.tree.leaves(statistics)
    for a, b in zip(leaves, jax.tree.leaves(with_them), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)
    assert any(np.abs(leaf).max() > 1e-3 for leaf in leaves)
    (nothing, _), after = run(more, valid & False)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves((nothing, after)))


def test_a_depthwise_convolution_is_that_of_lax():
    """Its matrix has the kernel's weights where XLA's grouped convolution has them."""
    for side, dilation in ((3, 1), (5, 2)):
        for stride, n in itertools.product((1, 2), (1, 3, 4)):
            kw = dict(stride=stride, dilation=dilation, dtype="float32", rngs=nnx.Rngs(0))
            layer = models.fill(Depthwise(2, side, **kw))
            x = jnp.asarray(normal("depthwise", (2, n, n, 2)))
            around = dilation * (side // 2)
            want = jax.lax.conv_general_dilated(
                x,
                layer.kernel[...],
                (stride, stride),
                ((around, around),) * 2,
                rhs_dilation=(dilation, dilation),
                dimension_numbers=("NHWC", "HWIO", "NHWC"),
                feature_group_count=2,
            )
            np.testing.assert_allclose(layer(x), want, rtol=1e-4, atol=1e-5)


@pytest.fixture(scope="module")
def mixed():
    """All operations on a map of 4x4, stride 1."""
    return made(lambda **kw: Mixed(models.CHANNELS, 1, **kw))


def test_one_weight_is_one_operation_and_equal_weights_the_mean(mixed):
    """Logits of which one is large give that operation alone, or nothing for "none"; equal ones an
    eighth of each.
    """
    x = jnp.asarray(models.map_of("mixed", 4))
    graph, state = nnx.split(mixed)

    @jax.jit
    def outputs(alphas):
        model = nnx.merge(graph, state, copy=True)
        return model(x, TRAIN, jax.nn.softmax(alphas)), [o(x, TRAIN) for o in model.operations]

    _, alone = outputs(jnp.zeros(8))
    alone = np.stack([np.zeros_like(x), *alone])
    for i in range(8):
        got, _ = outputs(200.0 * jnp.eye(8)[i])
        np.testing.assert_allclose(got, alone[i], rtol=1e-4, atol=1e-5)
    got, _ = outputs(jnp.full(8, -3.0))
    np.testing.assert_allclose(got, alone.sum(axis=0) / 8, rtol=1e-4, atol=1e-5)


def test_parameters_are_as_many_as_the_authors_have():
    """Exactly, of each part and of the head in a search on seven classes; their count has another
    14 x 8 weights, of cells that there are none of.
    """

    def build():
        kw = dict(dtype="float32", rngs=nnx.Rngs(0))
        head = CellHead(CellRcnnConfig(), **kw)
        return head, BoxPredictor(head.channels, 7, class_agnostic=False, **kw)

    def count(*modules):
        leaves = [leaf for m in modules for leaf in jax.tree.leaves(nnx.state(m, nnx.Param))]
        return sum(math.prod(leaf.shape) for leaf in leaves)

    head, predictor = nnx.eval_shape(build)
    assert count(head.fc1, head.fc2) == 13_895_680
    assert count(head.stem, head.stem_norm) == 62_424
    assert [count(cell) for cell in head.cells] == [1_717_760, 6_553_600]
    assert count(head.align) == 2_359_296
    assert count(predictor) == 9_252
    assert head.alpha_reduce.shape == (EDGES, 8) == (14, 8)
    assert count(head, predictor) == 24_598_236 - 14 * 8


def test_a_genotype_is_the_best_of_all():
    """Against a search over all choices of two edges and an operation on each, for random weights;
    a constant added to the logits of an edge changes nothing, and "none" is never chosen.
    """
    random = np.random.default_rng(0)
    for _ in range(10):
        logits = random.normal(size=(EDGES, 8))
        logits[:, 0] += 2
        weights = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
        found = discretised(weights)
        start = 0
        for node in range(NODES):
            options = (
                (
                    weights[start + a, i] + weights[start + b, j],
                    {(OPERATIONS[i], a), (OPERATIONS[j], b)},
                )
                for a, b in itertools.combinations(range(2 + node), 2)
                for i in range(1, 8)
                for j in range(1, 8)
            )
            best = max(options, key=lambda option: option[0])[1]
            assert set(found[2 * node : 2 * node + 2]) == best
            start += 2 + node
        shifted = np.exp(logits + random.normal(size=(EDGES, 1)))
        assert discretised(shifted / shifted.sum(axis=1, keepdims=True)) == found
        assert checked(found, "found") == found
    equal = discretised(np.full((EDGES, 8), 1 / 8))
    assert equal == (("max_pool_3x3", 0), ("max_pool_3x3", 1)) * NODES  # ties go by order


def test_drawn_genotypes_are_genotypes():
    """Each seed has its own, the same whenever it is drawn; all operations and inputs occur."""
    many = [drawn(seed) for seed in range(40)]
    assert all(checked(genotype, "drawn") == genotype for genotype in many)
    assert len(set(many)) == 40
    assert drawn(7) == many[7]
    assert {name for g in many for name, _ in g} == set(OPERATIONS[1:])
    assert {state for g in many for _, state in g} == set(range(2 + NODES - 1))


def test_a_detector_with_cells_has_their_weights_where_the_command_reads_them():
    """In a search; with a genotype there are none."""
    for given, there in ((None, True), (models.GENOTYPE, False)):
        head = dataclasses.replace(SMALL, genotype=given)
        config = DetectorConfig(
            num_classes=3, encoder="scratch_ti8", image_size=(64, 64), head=head
        )
        model = nnx.eval_shape(lambda config=config: Detector(config, rngs=nnx.Rngs(0)))
        assert (ALPHAS in weights.shapes(model)) == there


def test_a_genotype_comes_from_a_file_into_the_configuration(tmp_path):
    """The run's configuration holds the pairs and not the name of the file, which may go away."""
    file = tmp_path / "genotype.json"
    file.write_text(json.dumps({"reduce": models.GENOTYPE, "step": 3}))
    c = Config(task="detection")
    c.model.encoder = "augreg_ti16"
    c.model.decoder = "cell_rcnn"
    assert validated(c).model.cell_rcnn.genotype is None
    c.model.cell_rcnn.genotype = str(file)
    assert validated(c).model.cell_rcnn.genotype == models.GENOTYPE
    assert c.model.cell_rcnn.genotype == str(file)
    c.model.cell_rcnn.genotype = json.dumps(models.GENOTYPE)
    assert validated(c).model.cell_rcnn.genotype == models.GENOTYPE


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda g: g[:7], "has 7 pairs; allowed: 8 pairs"),
        (lambda g: [*g[:3], ["sep_conv_7x7", 0], *g[4:]], "'sep_conv_7x7'; allowed: max_pool_3x3"),
        (lambda g: [*g[:3], ["none", 0], *g[4:]], "pair 3 of .* unknown operation 'none'"),
        (lambda g: [["skip_connect", 2], *g[1:]], "reads input 2; allowed: 0 to 1"),
        (lambda g: [g[0], g[0], *g[2:]], "reads input 1 as the pair before"),
        (lambda g: [["skip_connect"], *g[1:]], "an operation and an input"),
        (lambda g: {"normal": g}, "has no 'reduce'"),
        (lambda g: 3, "is 3; allowed: 8 pairs"),
    ],
)
def test_wrong_genotypes_are_refused(tmp_path, change, message):
    """Each with the file, what is wrong and what is allowed."""
    file = tmp_path / "wrong.json"
    file.write_text(json.dumps(change([list(pair) for pair in models.GENOTYPE])))
    with pytest.raises(ValueError, match=message) as error:
        resolved(str(file), "genotype")
    assert "wrong.json" in str(error.value)


def test_files_that_are_none_and_sizes_that_do_not_fit_are_refused(tmp_path):
    """By name."""
    file = tmp_path / "cut.json"
    file.write_text("{")
    with pytest.raises(ValueError, match=r"cut\.json is no JSON"):
        resolved(str(file), "genotype")
    with pytest.raises(FileNotFoundError, match="absent"):
        resolved(str(tmp_path / "absent.json"), "genotype")
    roi = dataclasses.replace(SMALL.roi, hidden=40)
    with pytest.raises(ValueError, match=r"hidden 40; allowed: .* multiple of 16"):
        dataclasses.replace(SMALL, roi=roi, levels=(0, 1, 2, 3)).check("model.cell_rcnn")
    roi = dataclasses.replace(SMALL.roi, stages=((0.5, 10.0), (0.6, 20.0)))
    with pytest.raises(ValueError, match=r"stages is .* allowed: one"):
        dataclasses.replace(SMALL, roi=roi).check("model.cell_rcnn")


def test_a_search_finds_the_operation_that_the_task_needs(mixed):
    """Targets add what lies two features away. Trained together with the weights of the operations,
    the weight of a dilated one ends above all others but "none": a smoke test.
    """
    graph, params, rest = nnx.split(mixed, nnx.Param, ...)
    x = jnp.asarray(normal("toy", (32, 4, 4, models.CHANNELS)))
    far = np.zeros((5, 5, 1, models.CHANNELS), np.float32)
    far[0, 2] = far[4, 2] = far[2, 0] = 1  # two features away
    target = jax.lax.conv_general_dilated(
        jax.nn.relu(x),
        jnp.asarray(far),
        (1, 1),
        ((2, 2), (2, 2)),
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        feature_group_count=models.CHANNELS,
    )
    target = (target - target.mean((0, 1, 2))) / target.std((0, 1, 2))

    def loss(trained):
        params, alphas = trained
        model = nnx.merge(graph, params, rest, copy=True)
        return jnp.mean((8 * model(x, TRAIN, jax.nn.softmax(alphas)) - target) ** 2)

    @jax.jit
    def train(trained):
        def step(trained, _):
            value, gradient = jax.value_and_grad(loss)(trained)
            scale = jnp.minimum(
                1, 1 / jnp.sqrt(sum(jnp.sum(g**2) for g in jax.tree.leaves(gradient)))
            )
            return jax.tree.map(lambda p, g: p - 0.1 * scale * g, trained, gradient), value

        return jax.lax.scan(step, trained, length=150)

    (_, alphas), losses = train((params, jnp.zeros(8)))
    weights = np.asarray(jax.nn.softmax(alphas))
    assert losses[-1] < 0.5 * losses[0], (losses[0], losses[-1])
    assert OPERATIONS[1 + int(np.argmax(weights[1:]))].startswith("dil"), weights
