"""Counts the floating-point operations of a function: its matrix products and convolutions.

    from jaxdg.commands.flops import count

    matrix = jax.ShapeDtypeStruct((8, 8), "float32")
    count(lambda x: x @ x, matrix)    # 1024: a multiplication and an addition each

The count is taken from what JAX traces and is the same on every machine. It leaves out everything
else (norms, softmax, gathers), as is usual where a model is compared with a device's peak. It also
leaves out a convolution's products with padding and with the gaps of dilation, as XLA's own cost
analysis does. What `jax.checkpoint` recomputes is counted: to leave it out, count the model built
without rematerialisation.
"""

from collections.abc import Callable
import math
from typing import Any

import jax
from jax.interpreters import partial_eval
import numpy as np

# Dense bfloat16 peak of one device in TFLOP/s, as its maker states it. The first key that
# `device_kind` contains counts.
PEAK_TFLOPS = {
    "B200": 2250.0,
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
    """The peak of a `jax.Device.device_kind`; None where it is unknown, as for CPUs."""
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
    return sum((_operations(eqn) for eqn in jaxpr.eqns), 0.0)


def _operations(eqn: Any) -> float:
    name = eqn.primitive.name
    params = eqn.params
    if name == "dot_general":
        (contracted, _), _ = params["dimension_numbers"]
        terms = math.prod(eqn.invars[0].aval.shape[i] for i in contracted)
        return 2.0 * math.prod(eqn.outvars[0].aval.shape) * terms
    if name == "conv_general_dilated":
        return _convolution(eqn)
    if name.startswith("dot_product_attention_"):
        # cuDNN's: two products forward and four backward, besides those that it recomputes.
        query, key = (v.aval.shape for v in eqn.invars[:2])
        length = key[2] if params["layout"] else key[1]
        return (4.0 if "_fwd" in name else 8.0) * math.prod(query) * length
    inner = [
        _count(getattr(value, "jaxpr", value))
        for value in _flat(params.values())
        if hasattr(getattr(value, "jaxpr", value), "eqns")
    ]
    if name == "cond":
        # One platform's branch may spend products to save something else, such as a scatter; the
        # model needs the fewest.
        return min(inner) if params.get("branches_platforms") else max(inner)
    if name in ("while", "shard_map", "pallas_call") and any(inner):
        raise ValueError(
            f"JAX's trace does not tell how often the matrix products in a {name} are computed;"
            " count one round and multiply"
        )
    return (params["length"] if name == "scan" else 1) * sum(inner, 0.0)


def _flat(values: Any) -> list[Any]:
    return [
        item
        for value in values
        for item in (value if isinstance(value, (tuple, list)) else (value,))
    ]


def _convolution(eqn: Any) -> float:
    """Two operations for each pair of an output and a kernel entry that meets an input pixel."""
    p = eqn.params
    image, kernel = (v.aval.shape for v in eqn.invars)
    out = eqn.outvars[0].aval.shape
    numbers = p["dimension_numbers"]
    pairs = 1
    for i, (axis, kernel_axis, out_axis) in enumerate(
        zip(numbers.lhs_spec[2:], numbers.rhs_spec[2:], numbers.out_spec[2:], strict=True)
    ):
        outputs = np.arange(out[out_axis])[:, None] * p["window_strides"][i]
        entries = np.arange(kernel[kernel_axis]) * p["rhs_dilation"][i]
        pixel, gap = np.divmod(outputs + entries - p["padding"][i][0], p["lhs_dilation"][i])
        pairs *= int(np.sum((gap == 0) & (pixel >= 0) & (pixel < image[axis])))
    # The kernel's input channels are those of one feature group; each output channel meets one
    # batch group of images.
    batch = image[numbers.lhs_spec[0]] // p["batch_group_count"]
    return 2.0 * pairs * batch * kernel[numbers.rhs_spec[0]] * kernel[numbers.rhs_spec[1]]
