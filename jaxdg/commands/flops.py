"""Floating-point operations of a function: its matrix products and convolutions, counted in what
JAX traces, whatever the machine.

    from jaxdg.commands.flops import count count(lambda x: x @ x, jax.ShapeDtypeStruct((8, 8),
    "float32"))    # 1024: a multiplication and an addition each

Everything else (norms, softmax, gathers) is left out, as is usual where a model's operations are
held against a device's peak. Products that a convolution makes with padding or with the gaps of
dilation are none, as XLA's own cost analysis has it. What `jax.checkpoint` computes anew counts
like anything else: of a model built with rematerialisation, count the one without.
"""

from collections.abc import Callable
import math
from typing import Any

import jax
from jax.interpreters import partial_eval
import numpy as np

# Dense bfloat16 peak in TFLOP/s of one device, as its maker states it, by a part of `device_kind`;
# the first that is found counts.
PEAK_TFLOPS = {
    "H200": 989.0,
    "H100 PCIe": 756.0,
    "H100": 989.0,
    "A100": 312.0,
    "L40S": 362.0,
    "TPU v6 lite": 918.0,
    "TPU v5 lite": 197.0,
    "TPU v5": 459.0,
    "TPU v4": 275.0,
    "TPU v3": 61.5,  # a device is one of a chip's two cores
}


def peak_tflops(device_kind: str) -> float | None:
    """Peak of a device named as `jax.Device.device_kind`; None where it is not known, as of CPUs."""
    return next((peak for name, peak in PEAK_TFLOPS.items() if name in device_kind), None)


def count(fn: Callable[..., Any], *args: Any) -> float:
    """Floating-point operations of one call.

    Args:
        fn: any function that JAX can trace; nothing runs.
        args: arrays, trees of them, or `jax.ShapeDtypeStruct` in their place.

    Raises:
        ValueError: matrix products in a loop whose number of rounds is known only when it runs, or
            in `shard_map` or a Pallas kernel.
    """
    jaxpr = jax.make_jaxpr(fn)(*args).jaxpr
    return _count(partial_eval.dce_jaxpr(jaxpr, [True] * len(jaxpr.outvars))[0])


def _count(jaxpr: Any) -> float:
    return sum((_equation(eqn) for eqn in jaxpr.eqns), 0.0)


def _equation(eqn: Any) -> float:
    name = eqn.primitive.name
    params = eqn.params
    if name == "dot_general":
        (contracted, _), _ = params["dimension_numbers"]
        return (
            2.0
            * math.prod(eqn.outvars[0].aval.shape)
            * math.prod(eqn.invars[0].aval.shape[i] for i in contracted)
        )
    if name == "conv_general_dilated":
        return _convolution(eqn)
    if name.startswith(
        "dot_product_attention_"
    ):  # cuDNN's: two products forward, and twice that backward without what it computes anew
        query, key = (v.aval.shape for v in eqn.invars[:2])
        length = key[2] if params["layout"] else key[1]
        return (4.0 if "_fwd" in name else 8.0) * math.prod(query) * length
    inner = [
        _count(getattr(value, "jaxpr", value))
        for value in _flat(params.values())
        if hasattr(getattr(value, "jaxpr", value), "eqns")
    ]
    if name == "cond":
        # Where platforms part, one may spend products to save something else, such as a scatter;
        # the model needs the fewest.
        return min(inner) if params.get("branches_platforms") else max(inner)
    if name in ("while", "shard_map", "pallas_call") and any(inner):
        raise ValueError(
            f"matrix products in a {name}: how often they are made is not said by what JAX traces;"
            " count once and multiply"
        )
    return (params["length"] if name == "scan" else 1) * sum(inner, 0.0)


def _flat(values: Any) -> list[Any]:
    return [
        item
        for value in values
        for item in (value if isinstance(value, (tuple, list)) else (value,))
    ]


def _convolution(eqn: Any) -> float:
    """Two operations for each pair of an output and a kernel place that meets a true input pixel."""
    p = eqn.params
    image, kernel = (v.aval.shape for v in eqn.invars)
    out = eqn.outvars[0].aval.shape
    numbers = p["dimension_numbers"]
    pairs = 1
    for i, (axis, kernel_axis, out_axis) in enumerate(
        zip(numbers.lhs_spec[2:], numbers.rhs_spec[2:], numbers.out_spec[2:], strict=True)
    ):
        at = (
            np.arange(out[out_axis])[:, None] * p["window_strides"][i]
            + np.arange(kernel[kernel_axis]) * p["rhs_dilation"][i]
        )
        pixel, gap = np.divmod(at - p["padding"][i][0], p["lhs_dilation"][i])
        pairs *= int(np.sum((gap == 0) & (pixel >= 0) & (pixel < image[axis])))
    # The kernel's input channels are those of one group already; one batch group of images meets
    # each output channel.
    batch = image[numbers.lhs_spec[0]] // p["batch_group_count"]
    return 2.0 * pairs * batch * kernel[numbers.rhs_spec[0]] * kernel[numbers.rhs_spec[1]]
