"""Counting operations and measuring: jaxdg/commands/flops.py, scripts/benchmark.py and its PyTorch
peer.
"""

import dataclasses
import json
import math
from pathlib import Path
import subprocess
import sys
from xml.etree import ElementTree

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdg import backbones
from jaxdg.commands.flops import count, peak_tflops
from jaxdg.config import Config, from_file
from jaxdg.training.step import gradients
from scripts import benchmark
from scripts.workloads import Setup, encoder_flops, train_flops

ROOT = Path(__file__).resolve().parents[2]


def xla(fn, *args) -> float:
    """Floating-point operations by XLA's own analysis of what it compiled."""
    return jax.jit(fn).lower(*args).compile().cost_analysis()["flops"]


def encoder(taps: tuple[int, ...]):
    """Four blocks of ViT-Ti/16, on 64x64 images: function of (parameters, images), parameters."""
    config = dataclasses.replace(
        backbones.ZOO["augreg_ti16"].config, image_size=(64, 64), depth=4, taps=taps
    )
    graph, state = nnx.split(nnx.eval_shape(lambda: config.build(rngs=nnx.Rngs(0))))
    return (lambda state, images: nnx.merge(graph, state)(images)[-1]), state


IMAGES = jax.ShapeDtypeStruct((2, 64, 64, 3), jnp.float32)


@pytest.mark.parametrize(
    ("stride", "padding", "dilation", "groups"),
    [(1, "SAME", 1, 1), (2, "VALID", 1, 1), (2, "SAME", 2, 2), (3, "VALID", 1, 1)],
)
def test_convolutions_are_counted_as_xla_counts_them(stride, padding, dilation, groups):
    """With padding, strides, dilation and groups, forward and in both gradients, as XLA counts."""
    x = jax.ShapeDtypeStruct((2, 21, 17, 8), jnp.float32)
    kernel = jax.ShapeDtypeStruct((3, 3, 8 // groups, 12), jnp.float32)
    numbers = dict(
        rhs_dilation=(dilation,) * 2,
        feature_group_count=groups,
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
    )

    def convolve(x, kernel):
        return jax.lax.conv_general_dilated(x, kernel, (stride, stride), padding, **numbers)

    def both(x, kernel, towards):
        return jax.vjp(convolve, x, kernel)[1](towards)

    assert count(convolve, x, kernel) == xla(convolve, x, kernel)
    towards = jax.eval_shape(convolve, x, kernel)
    assert (
        count(both, x, kernel, towards)
        == xla(both, x, kernel, towards)
        == 2 * count(convolve, x, kernel)
    )


def test_an_encoder_has_the_operations_of_the_textbook_and_of_xla():
    """24 n c^2 + 4 n^2 c a block and the patches, also where blocks are scanned; XLA, which counts
    everything, finds little more.
    """
    n = 17
    c = 192
    depth = 4
    textbook = 2 * (depth * (24 * n * c * c + 4 * n * n * c) + 2 * 16 * (16 * 16 * 3) * c)
    unrolled, state = encoder(tuple(range(depth)))
    scanned, stacked = encoder((1, 3))
    assert count(unrolled, state, IMAGES) == count(scanned, stacked, IMAGES) == textbook
    assert 1.0 < xla(unrolled, state, IMAGES) / textbook < 1.1
    gradient = jax.grad(lambda state, images: jnp.sum(unrolled(state, images) ** 2))
    counted = count(gradient, state, IMAGES)
    assert 1.0 < xla(gradient, state, IMAGES) / counted < 1.1
    assert 2.9 * textbook < counted < 3 * textbook  # the patches need no gradient of the image


def test_loops_and_branches():
    """A scan counts each round, platforms' branches as the cheapest, other branches as the dearest;
    unknown rounds are refused.
    """
    x = jax.ShapeDtypeStruct((4, 4), jnp.float32)
    once = 2 * 4**3
    assert count(lambda x: jax.lax.fori_loop(0, 7, lambda _, y: y @ x, x), x) == 7 * once
    assert (
        count(lambda x: jax.lax.platform_dependent(x, cpu=lambda x: x, default=lambda x: x @ x), x)
        == 0
    )
    assert count(lambda x: jax.lax.cond(x[0, 0] > 0, lambda x: x, lambda x: x @ x, x), x) == once
    assert (
        count(lambda x: jax.lax.while_loop(lambda y: y.sum() < 9, lambda y: y + 1, x @ x), x)
        == once
    )
    assert count(lambda x: (x @ x, x)[1], x) == 0  # nobody reads the product
    with pytest.raises(ValueError, match="in a while"):
        count(lambda x: jax.lax.while_loop(lambda y: y.sum() < 9, lambda y: y @ y, x), x)


def small(**model) -> Config:
    """A tiny EVA-02 and Mask2Former; a batch that eight devices divide."""
    config = Config(batch_size=8)
    config.data.crop = (64, 64)
    config.model.encoder = "scratch_eva02_ti8"
    config.model.decoder = "mask2former"
    head = config.model.mask2former
    head.hidden = 32
    head.heads = 2
    head.queries = 20
    head.points = 64
    head.pixel_layers = 1
    head.pixel_ffn = 32
    head.layers = 1
    head.ffn = 32
    for name, value in model.items():
        setattr(config.model, name, value)
    return config


def test_recomputation_is_no_work_of_the_model():
    """The FLOPs that MFU divides by are the same with rematerialisation, although the step itself
    then computes more.
    """
    linear = {"decoder": "linear", "pyramid": "none", "taps": (3,)}
    plain = Setup(small(**linear))
    again = Setup(small(**linear, remat=True))
    needed = train_flops(plain)
    assert train_flops(again) == needed
    assert encoder_flops(again, train=True) == encoder_flops(plain, train=True)
    batch = {
        key: jax.ShapeDtypeStruct(value.shape, value.dtype) for key, value in again.batch().items()
    }
    losses = (again.task.loss_denominator, again.task.losses, jax.random.key(0), 1)
    done = count(
        lambda state, batch: gradients(again.plan.graph, state, batch, *losses), again.like, batch
    )
    assert done - needed > 0.5 * encoder_flops(plain, train=False)


def test_peaks_are_found_by_the_names_of_devices():
    """Names as drivers give them; a CPU has no peak, so no MFU is made up for it."""
    peaks = {
        "NVIDIA H100 80GB HBM3": 989,
        "NVIDIA H100 PCIe": 756,
        "NVIDIA H200": 989,
        "NVIDIA A100-SXM4-80GB": 312,
    }
    peaks |= {"TPU v4": 275, "TPU v5 lite": 197, "TPU v5p": 459, "TPU v6 lite": 918, "cpu": None}
    assert {name: peak_tflops(name) for name in peaks} == peaks


def test_rounds_take_turns():
    """Our runs and the peer's alternate in each round, and the ratio is that of the medians."""
    calls = []

    class Fake:
        peak_bytes = 5

        def __init__(self):
            self.about = {"compiled": False}

        def __call__(self, n: int) -> float:
            calls.append(("peer", n))
            return 3.0 * n

    found = benchmark.measure(lambda n: calls.append(("ours", n)), Fake(), 3)  # pyright: ignore[reportArgumentType]
    n = found["runs_a_round"]
    assert calls == [("ours", 1), ("ours", 1), ("peer", 1), *[("ours", n), ("peer", n)] * 3]
    assert found["peer"]["ms"] == 3000
    assert found["ours_to_peer"] == pytest.approx(found["ms"] / 3000, rel=0.01)


def test_measures_where_nothing_that_reads_data_is_installed(tmp_path):
    """A training step is measured without grain, TFDS and tensorboardX, and the
    line says what came out.
    """
    config = tmp_path / "configs" / "tiny.py"
    out = tmp_path / "lines.jsonl"
    config.parent.mkdir()
    config.write_text(
        "from jaxdg.config import Config, ModelConfig\n\n\ndef get_config():\n"
        "    model = ModelConfig(pyramid='none', taps=(3,))\n"
        "    return Config(batch_size=2, model=model)\n"
    )
    arguments = [
        "train_step",
        "--config",
        str(config),
        "--crop",
        "32",
        "32",
        "--rounds",
        "1",
        "--out",
        str(out),
        "--part",
        "encoder",
    ]
    code = f"""if True:
        import sys
        absent = "grain tensorflow_datasets tensorboardX array_record ftfy"
        sys.modules |= dict.fromkeys(absent.split())
        sys.argv = ["benchmark.py", *{arguments!r}]
        from scripts import benchmark
        benchmark.main()
    """
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (line,) = map(json.loads, out.read_text().splitlines())
    assert json.loads(done.stdout) == line
    assert line["shapes"] == {"batch_size": 2, "crop": [32, 32]}
    assert line["mfu"] is None
    assert line["images_per_s"] * line["ms"] == pytest.approx(2000, rel=1e-2)
    setup = Setup(Config(batch_size=8))
    c = 128
    n = 17
    depth = 4  # of scratch_ti8
    assert setup.merged(setup.plan.abstract).backbone.config.width == c
    patches = 2 * 16 * 8 * 8 * 3 * c
    block = 24 * n * c * c + 4 * n * n * c
    assert line["model_tflop"] * 1e12 == pytest.approx(
        2 * (3 * depth * block + 2 * patches), rel=0.001
    )


def test_the_plot_shows_every_point_where_it_belongs():
    """Valid XML with a circle a measurement; a point of twice the time stands twice as high above
    the axis.
    """
    svg = benchmark.plot(
        {"batch": [(1, 10.0), (2, 20.0), (4, 40.0)], "classes": [(19, 30.0), (38, 30.0)]}
    )
    circles = [e for e in ElementTree.fromstring(svg).iter() if e.tag.endswith("circle")]
    x, y = (np.array([float(c.attrib[key]) for c in circles]) for key in ("cx", "cy"))
    assert len(circles) == 5
    np.testing.assert_allclose(
        np.diff(y[:3]), [-52.2, -104.3], atol=0.2
    )  # 240 pixels up to 1.15 times the largest
    assert (y[1] - y[2]) / (y[0] - y[1]) == pytest.approx(2, rel=0.01)
    assert (x[2] - x[1]) / (x[1] - x[0]) == pytest.approx(2, rel=0.01)
    assert y[3] == y[4]


def spec(setup: Setup, **changed) -> dict:
    """What the peer is told."""
    arguments = benchmark.parser().parse_args(["train_step", "--config", "-", "--peer", "torch"])
    told = benchmark.peer_spec(arguments, setup, [(0, 0)], setup.config.data.crop)
    return json.loads(json.dumps({**told, **changed}))


@pytest.mark.parametrize("name", ["gta5_eva02", "camvid_vit_tiny"])
def test_the_peer_has_the_same_weights(name):
    """The PyTorch model of a published recipe has exactly as many parameters as ours, whole and in
    the encoder.
    """
    torch = pytest.importorskip("torch")
    for module in ("tests.oracles.stand_ins", "timm", "transformers", "scipy"):
        pytest.importorskip(module)
    from scripts import torch_peer

    setup = Setup(from_file(ROOT / "configs" / f"{name}.py"))
    model = setup.merged(setup.plan.abstract)

    def size(module):
        return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(nnx.state(module, nnx.Param)))

    with torch.device("meta"):
        theirs = torch_peer.Segmenter(spec(setup))

    def numbers(module):
        return sum(p.numel() for p in module.parameters())

    assert numbers(theirs) == size(model)
    assert numbers(theirs.encoder) == size(model.backbone)


@pytest.mark.parametrize("mode", ["train_step", "inference"])
def test_the_peer_runs(mode):
    """A training step moves its parameters and ends in a finite loss; inference gives a class for
    every pixel of a larger image.
    """
    torch = pytest.importorskip("torch")
    for module in ("tests.oracles.stand_ins", "timm", "transformers", "scipy"):
        pytest.importorskip(module)
    from scripts import torch_peer

    told = spec(Setup(small()), mode=mode, batch_size=2, image=[64, 96], starts=[[0, 0], [0, 32]])
    model, run = torch_peer.make_run(told, torch.device("cpu"))
    before = [p.detach().clone() for p in model.parameters()]
    result = run()
    assert all(torch.isfinite(p).all() for p in model.parameters())
    if mode == "train_step":
        assert all(
            not torch.equal(a, b)
            for a, b in zip(before, model.parameters(), strict=True)
            if b.grad is not None and b.grad.any()
        )
        assert sum(b.grad is not None for b in model.parameters()) > 0.95 * len(before)
    else:
        assert (result.shape, result.dtype) == ((2, 64, 96), torch.uint8)
        assert int(result.max()) < told["classes"]
