"""ONNX graphs: what is ours without the converter, and with it the graphs against `predict`.

The converter and its runtime are in no default environment. Where they are (docs/how-to/onnx.md)
the tests of real graphs run: `pytest -n 0 tests/commands/test_onnx.py`.
"""

import json
import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdg.commands import onnx_graph
from jaxdg.commands.plain_program import plain
from jaxdg.evaluation.average_precision import Detections
from jaxdg.segmentation.decoder import Decoder
from jaxdg.segmentation.linear import LinearHead
from jaxdg.segmentation.mgrnet import MgrnetHead
from scripts.onnx_agreement import page_function
from tests import forked
from tests.commands.test_export import config, model_with, noise

WINDOW = (32, 64)


@pytest.fixture(scope="module")
def segmenter():
    return model_with("linear")


@pytest.fixture(scope="module")
def detector():
    return model_with("fcos")


def from_page(function, described, tmp_path):
    """A function of the page's Python, run beside a graph's description."""
    (tmp_path / "streets.json").write_text(json.dumps(described))
    return page_function(function, tmp_path)


def standing_in(model, monkeypatch):
    """Puts the jitted program of a model in the place of ONNX Runtime; returns its description."""
    function, inputs, outputs = onnx_graph.window_program(model)
    program = jax.jit(function)

    class Session:
        def __init__(self, path, providers=None):
            pass

        def run(self, names, given):
            assert names == list(outputs)
            assert {name: (x.shape, x.dtype) for name, x in given.items()} == {
                name: (x.shape, x.dtype) for name, x in inputs.items()
            }
            return [np.asarray(x) for x in program(*(given[name] for name in inputs))]

    fake = types.SimpleNamespace(InferenceSession=Session)
    monkeypatch.setitem(sys.modules, "onnxruntime", fake)
    monkeypatch.setattr(onnx_graph.importlib.metadata, "version", lambda name: "0")
    return onnx_graph.description(model, onnx_graph.Graph(b"", inputs, outputs, 0.0))


def test_the_windows_of_the_page_are_those_of_predict(segmenter, tmp_path, monkeypatch):
    """NumPy pads, places windows and averages as `predict`: of images smaller than a window, of
    several windows, and as large as one.
    """
    described = standing_in(segmenter, monkeypatch)
    predict = from_page("predict", described, tmp_path)
    for size in ((50, 90), (20, 100), (40, 30), WINDOW, (1, 1)):
        image = noise(*size, 3)
        found = predict(image)
        assert found.dtype == np.uint8
        np.testing.assert_array_equal(found, segmenter.predict(image))


def test_the_boxes_of_the_page_are_those_of_predict(detector, tmp_path, monkeypatch):
    """NumPy fits an image and scales its boxes back as `predict`: of images that are too wide, too
    high, and of the detector's size.
    """
    described = standing_in(detector, monkeypatch)
    detect = from_page("detect", described, tmp_path)
    for size in ((50, 150), (90, 70), WINDOW):
        image = noise(*size, 3)
        expected = detector.predict(image)
        assert len(expected.scores) > 10
        same_boxes(detect(image), expected)


def same_boxes(found, expected: Detections, atol=1e-3):
    """One box for each, of the same place, score and class."""
    boxes, scores, classes = found
    np.testing.assert_allclose(scores, expected.scores, atol=1e-5)
    np.testing.assert_allclose(boxes, expected.boxes, atol=atol)
    np.testing.assert_array_equal(classes, expected.classes)


def test_a_program_made_plain_computes_the_same():
    """Calls, gradients of one's own, checkpoints, marks and scans that unroll themselves are gone,
    of platforms the default stays, constants are folded unless they grow; the numbers are the same.
    """

    @jax.custom_vjp
    def halved(x):
        return x / 2

    halved.defvjp(lambda x: (x / 2, None), lambda _, g: (g / 2,))
    rows = jnp.arange(12.0).reshape(4, 3)
    one = jax.sharding.Mesh(np.array(jax.devices()[:1]), ("data",))
    place = jax.sharding.NamedSharding(one, jax.sharding.PartitionSpec())

    def function(x):
        x = jax.sharding.reshard(x, place)
        x = jax.lax.platform_dependent(
            x, cpu=lambda x: jnp.sort(x), default=lambda x: jnp.flip(x) + 1
        )
        x = jax.checkpoint(halved)(jax.lax.optimization_barrier(x))

        def body(x, row):
            return jax.jit(jnp.tanh)(x + row), jnp.sum(x)

        x, sums = jax.lax.scan(body, x, rows * 2, unroll=True)
        y, back = jax.lax.scan(body, x, rows, reverse=True, unroll=True)
        z, _ = jax.lax.scan(body, y, rows)  # stays
        return x, sums, y, back, z + jnp.full((), 2.0)

    x = jnp.array([3.0, 1.0, 2.0])
    made = plain(function, jax.ShapeDtypeStruct(x.shape, x.dtype))
    traced = jax.make_jaxpr(made)(x).jaxpr
    names = {equation.primitive.name for equation in traced.eqns}
    assert not names & {"cond", "sort", "jit", "custom_vjp_call", "checkpoint", "platform_index"}
    assert not names & {"optimization_barrier", "reshard", "mul", "slice"}
    assert sum(equation.primitive.name == "scan" for equation in traced.eqns) == 1

    def step(x, row):
        return np.tanh(x + row)

    first = (np.flip(np.asarray(x)) + 1) / 2
    expected, sums = first, []
    for row in np.asarray(rows) * 2:
        sums.append(expected.sum())
        expected = step(expected, row)
    found = made(x)
    np.testing.assert_allclose(found[0], expected, rtol=1e-6)
    np.testing.assert_allclose(found[1], sums, rtol=1e-6)
    backwards = []
    for row in np.asarray(rows)[::-1]:
        backwards.append(expected.sum())
        expected = step(expected, row)
    np.testing.assert_allclose(found[2], expected, rtol=1e-6)
    np.testing.assert_allclose(found[3], backwards[::-1], rtol=1e-6)


def test_a_constant_that_grows_is_not_folded():
    """A bias that spreads over an image stays a bias in the file."""
    bias = jnp.arange(3.0)

    def function(x):
        return (x + jnp.broadcast_to(bias * 2, (50, 3)),)

    x = jax.ShapeDtypeStruct((50, 3), jnp.float32)
    traced = jax.make_jaxpr(plain(function, x))(x)
    (folded,) = traced.consts
    np.testing.assert_array_equal(folded, [0, 2, 4])


def fake_converter(monkeypatch, converter):
    monkeypatch.setitem(sys.modules, "jax2onnx", types.SimpleNamespace(to_onnx=converter))


def test_what_does_not_convert_is_refused(segmenter, monkeypatch):
    """A missing library, a converter's error, a graph that computes something else and one that a
    file cannot hold: each in a line that says what to do.
    """
    monkeypatch.setitem(sys.modules, "jax2onnx", None)
    with pytest.raises(ValueError, match=r"--onnx needs jax2onnx.*pip install 'jaxdg\[onnx\]'"):
        onnx_graph.convert(segmenter)
    standing_in(segmenter, monkeypatch)

    def unable(*_, **__):
        raise NotImplementedError("[converter] No plugins registered for\nprimitive 'cholesky'")

    fake_converter(monkeypatch, unable)
    why = r"jax2onnx 0 does not convert \S+ with linear: .* for primitive 'cholesky'; export it"
    with pytest.raises(ValueError, match=why):
        onnx_graph.convert(segmenter)

    proto = types.SimpleNamespace(SerializeToString=lambda: b"graph")
    fake_converter(monkeypatch, lambda *_, **__: proto)
    graph = onnx_graph.convert(segmenter)
    assert (graph.content, graph.difference) == (b"graph", 0.0)
    monkeypatch.setattr(onnx_graph, "compared", lambda *_: 0.01)
    with pytest.raises(ValueError, match=r"scores of noise differ by 0\.01 of the largest"):
        onnx_graph.convert(segmenter)
    monkeypatch.setattr(onnx_graph, "LARGEST", 1000)
    with pytest.raises(ValueError, match=r"GB of parameters, and a file of ONNX holds"):
        onnx_graph.convert(segmenter)


def test_a_decoder_that_sees_more_than_windows_is_refused(segmenter, monkeypatch):
    """Label maps do not follow from windows alone, where a decoder has its own way with images, as
    MGRNet.
    """
    assert MgrnetHead.image_scores is not Decoder.image_scores
    monkeypatch.setattr(LinearHead, "image_scores", MgrnetHead.image_scores)
    with pytest.raises(ValueError, match=r"linear sees an image as a whole beside its windows"):
        onnx_graph.window_program(segmenter)


def test_the_graph_computes_in_float32_without_loops(segmenter, tmp_path, monkeypatch):
    """Of a run in half precision whose blocks are scanned; its parameters stay the same."""
    c = config("mask2former", "bfloat16")
    seen = []

    def restored(trained, config):
        seen.append(config)
        return segmenter

    monkeypatch.setattr(onnx_graph, "restored", restored)
    monkeypatch.setattr(onnx_graph, "opened", lambda _: types.SimpleNamespace(config=c))
    onnx_graph.loaded(tmp_path)
    (found,) = seen
    assert (found.model.dtype, found.model.unroll) == ("float32", True)
    assert found.model.mask2former.unroll
    assert (c.model.dtype, c.model.unroll, c.model.mask2former.unroll) == ("bfloat16", False, False)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "give one of --out"),
        (("--out", "a.stablehlo", "--onnx", "a.onnx"), "give one of --out"),
        (("--onnx", "a.onnx", "--size", "32x64"), "--size is of StableHLO programs"),
        (("--onnx", "a.onnx", "--batch"), "--batch is of StableHLO programs"),
        (("--onnx", "a.json"), "its description goes to a file of that name"),
    ],
)
def test_flags_that_do_not_go_together(arguments, message, tmp_path):
    """An error of one line, before anything is read."""
    done = forked.run("jaxdg.commands.export", "--checkpoint", str(tmp_path / "none"), *arguments)
    assert done.returncode != 0
    assert message in done.stderr


@pytest.mark.parametrize("decoder", ["linear", "segformer", "mask2former"])
def test_a_graph_gives_the_label_maps_of_predict(decoder, tmp_path):
    """ONNX Runtime inside the page's loop over windows; pixels whose two best scores are as close
    as rounding may differ. Needs the extra onnx.
    """
    pytest.importorskip("jax2onnx", reason="needs the extra onnx, see docs/how-to/onnx.md")
    model = unrolled(decoder)
    predict = from_page("predict", written(model, tmp_path), tmp_path)
    image = noise(50, 90, 3)
    found, expected = predict(image), model.predict(image)
    assert len(np.unique(expected)) > 1
    assert np.mean(found == expected) > 0.999


def test_a_graph_gives_the_boxes_of_predict(tmp_path):
    """ONNX Runtime with the page's fitting of an image. Needs the extra onnx."""
    pytest.importorskip("jax2onnx", reason="needs the extra onnx, see docs/how-to/onnx.md")
    model = unrolled("fcos")
    detect = from_page("detect", written(model, tmp_path), tmp_path)
    image = noise(50, 90, 3)
    same_boxes(detect(image), model.predict(image), atol=1e-2)


def unrolled(decoder):
    """As `loaded` makes it of a tiny model."""
    return model_with(decoder, unroll=True)


def written(model, folder):
    """Writes the graph of a model; returns its description."""
    graph = onnx_graph.convert(model)
    (folder / "streets.onnx").write_bytes(graph.content)
    return onnx_graph.description(model, graph)
