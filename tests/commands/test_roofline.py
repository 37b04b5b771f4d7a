"""The predicted time of a program written by hand, whose bytes and operations are known."""

from pathlib import Path

import numpy as np
import pytest

from jaxdg.commands import hlo, roofline
from jaxdg.commands.accelerators import ACCELERATORS
from jaxdg.commands.collectives import read_collective

CHIP = ACCELERATORS["h100"]
MEMORY = roofline.MEMORY_SHARE * CHIP.bandwidth
PRODUCTS = roofline.PRODUCT_SHARE * CHIP.flops
PROGRAM = (Path(__file__).parent / "hand_written.hlo").read_text()


def test_kernels_of_a_program_written_by_hand():
    """Each kernel's time follows from its bytes or its product, its loop's rounds and its launch;
    its part and line from its own names, its fusion's or its loop's.
    """
    prediction = roofline.predict(PROGRAM, CHIP, "/home/me/jaxdg/")
    found = {kernel.name: kernel for kernel in prediction.kernels}
    megabyte = 4e6  # of an array f32[1000,1000]
    product = 2 * 4096**3
    expected = {
        # name: kind, part, source, times, seconds without launch
        "copy.1": ("copy", "encoder", "backbones/vit.py:107", 5, 2 * megabyte / MEMORY),
        "product": ("matmul bf16", "encoder", "backbones/vit.py:107", 5, product / PRODUCTS),
        "fusion.1": ("gather", "matching", None, 1, (8 * 320 + 40 + 320) / MEMORY),
        "fusion.2": ("fusion", "optimiser", "training/step.py:84", 1, 3 * megabyte / MEMORY),
    }
    assert set(found) == {*expected, "all-reduce-start"}
    for name, (kind, part, source, times, seconds) in expected.items():
        kernel = found[name]
        assert (kernel.kind, kernel.part, kernel.source) == (kind, part, source)
        assert kernel.times == times
        np.testing.assert_allclose(kernel.seconds, times * (seconds + roofline.LAUNCH))
    exchange = found["all-reduce-start"]
    assert (exchange.part, exchange.kind) == ("exchange", "all-reduce")
    np.testing.assert_allclose(exchange.seconds, 2 * 7 / 8 * megabyte / (0.8 * CHIP.link))
    np.testing.assert_allclose(prediction.seconds, sum(k.seconds for k in found.values()))
    assert next(iter(dict(prediction.by(lambda kernel: kernel.part)))) == "encoder"
    assert prediction.longest(1) == [found["product"]]
    assert prediction.unknown_loops == 0


def test_what_prepares_a_batch_comes_before_the_step():
    """Its kernels are one part, whatever they are parts of; all sums are those of both programs."""
    step = roofline.predict(PROGRAM, CHIP, "/home/me/jaxdg/")
    before = roofline.predict(PROGRAM.replace('"known_trip_count":{"n":"5"}', ""), CHIP, "/none/")
    both = step.after(before)
    np.testing.assert_allclose(both.seconds, step.seconds + before.seconds)
    seconds = dict(both.by(lambda kernel: kernel.part))
    np.testing.assert_allclose(seconds.pop("methods' preparation"), before.seconds)
    assert seconds == pytest.approx(dict(step.by(lambda kernel: kernel.part)))
    assert both.collectives == before.collectives + step.collectives
    assert both.unknown_loops == 1


def test_a_loop_of_unknown_length_counts_once():
    """And is told."""
    text = PROGRAM.replace(', backend_config={"known_trip_count":{"n":"5"}}', "")
    prediction = roofline.predict(text, CHIP, "/home/me/jaxdg/")
    assert {kernel.times for kernel in prediction.kernels} == {1}
    assert prediction.unknown_loops == 1


@pytest.mark.parametrize(
    ("target", "result", "operands"),
    [
        ("Forward", "bf16[2,8,8,64]", ("bf16[2,8,8,32]", "bf16[64,3,3,32]")),
        ("BackwardInput", "bf16[2,8,8,32]", ("bf16[2,8,8,64]", "bf16[64,3,3,32]")),
        ("BackwardFilter", "bf16[64,3,3,32]", ("bf16[2,8,8,32]", "bf16[2,8,8,64]")),
    ],
)
def test_a_convolution_and_its_gradients_are_as_many_operations(target, result, operands):
    """64 filters of 3x3x32 at 2x8x8 places."""
    row = hlo.Instruction.read(
        f"  %c = ({result}{{3,2,1,0}}, u8[0]{{0}}) custom-call(%a, %b),"
        f" window={{size=3x3 pad=1_1x1_1}}, dim_labels=b01f_o01i->b01f,"
        f' custom_call_target="__cudnn$conv{target}"'
    )
    assert row is not None
    assert row.operands == ("a", "b")
    assert roofline._convolution(row, list(operands)) == 2 * (2 * 8 * 8) * 64 * (3 * 3 * 32)


def test_attention_is_two_products_forward_and_five_backward():
    """Of 3 heads of width 64, 10 queries and 20 keys in 2 images."""
    operands = ["bf16[2,10,3,64]", "bf16[2,20,3,64]", "bf16[2,20,3,64]"]
    product = 2 * 2 * 3 * 10 * 20 * 64
    forward = roofline._attention("__cudnn$fmhaSoftmax", operands, 1000)
    assert forward.flops == 2 * product
    assert forward.bytes == 1000 + 2 * 2 * 10 * 3 * 64
    backward = roofline._attention("__cudnn$fmhaSoftmaxBackward", operands, 1000)
    assert backward.flops == 5 * product
    assert backward.bytes == 1000 + 2 * 2 * (10 + 20 + 20) * 3 * 64


def test_what_a_started_collective_sends():
    """GPUs start collectives and go on; what a start gives back holds more than the result."""
    groups = "replica_groups=[1,4]<=[4]"
    for shapes, kind, expected in (
        ("(f32[10]{0}, f32[40]{0})", "all-gather-start", 3 / 4 * 160),
        ("((f32[10]{0}, f32[1]{0}), (f32[40]{0}, f32[4]{0}))", "all-gather-start", 3 / 4 * 176),
        ("(f32[40]{0}, f32[4]{0})", "all-reduce-start", 2 * 3 / 4 * 176),
        ("f32[10]{0}", "reduce-scatter", 3 / 4 * 160),
        ("(f32[40]{0}, f32[10]{0})", "reduce-scatter-start", 3 / 4 * 160),
    ):
        collective = read_collective(f"  %c = {shapes} {kind}(%x), {groups}", 1)
        assert collective is not None
        assert collective.sent == expected
    pairs = "source_target_pairs={{0,1},{1,0}}"
    line = (
        f"  %c = (f32[10]{{0}}, f32[10]{{0}}, u32[], u32[]) collective-permute-start(%x), {pairs}"
    )
    collective = read_collective(line, 1)
    assert collective is not None
    assert collective.sent == 40
    assert read_collective("  %d = f32[40]{0} all-gather-done(%c)", 1) is None
    assert read_collective("  %c = f32[4]{0} all-reduce(%x), replica_groups={{0},{1}}", 1) is None
