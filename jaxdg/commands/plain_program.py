"""A traced program as a flat list of simple operations, for converters that know no more.

What JAX traces holds calls, gradients of one's own, barriers, and what each platform computes in
its own way. `plain` leaves all that out: of a `jax.lax.platform_dependent` the default branch
stays, of a scan that unrolls itself each step, and what follows from constants alone is computed.
"""

from collections.abc import Callable, Sequence
import contextlib
from typing import Any

import jax
from jax.core import Tracer
from jax.extend import core
import jax.numpy as jnp
import numpy as np

# Operations that compute what the program inside them does.
CALLS = ("jit", "closed_call", "remat2", "custom_jvp_call", "custom_vjp_call")
# Operations whose results are their inputs; the program is for one device.
MARKS = ("name", "optimization_barrier", "reshard")


def plain(
    function: Callable[..., Sequence[jax.Array]], *inputs: jax.ShapeDtypeStruct
) -> Callable[..., list[jax.Array]]:
    """The same function, which traces to simple operations.

    Args:
        function: of arrays, to several.
        inputs: what its arguments are like.
    """
    traced = jax.make_jaxpr(function)(*inputs)
    return lambda *arrays: _evaluated(traced, arrays)


def _evaluated(program: Any, inputs: Sequence[Any]) -> list[Any]:
    """What a traced program, closed or without constants, makes of the inputs."""
    jaxpr = getattr(program, "jaxpr", program)
    constants = getattr(program, "consts", ())
    values = dict(zip((*jaxpr.constvars, *jaxpr.invars), (*constants, *inputs), strict=True))

    def read(variable: Any) -> Any:
        return variable.val if isinstance(variable, core.Literal) else values[variable]

    for equation in jaxpr.eqns:
        results = _results(equation, [read(variable) for variable in equation.invars])
        values.update(zip(equation.outvars, results, strict=True))
    return [read(variable) for variable in jaxpr.outvars]


def _results(equation: core.JaxprEqn, inputs: list[Any]) -> Sequence[Any]:
    """What an operation makes of its inputs."""
    name = equation.primitive.name
    settings = equation.params
    if name in MARKS:
        return inputs
    if name in CALLS:
        return _evaluated(settings.get("jaxpr", settings.get("call_jaxpr")), inputs)
    if name == "platform_index":
        return [np.int32(0)]  # read by the choice below, which does not look at it
    platforms = settings.get("branches_platforms")
    if platforms and None in platforms:
        return _evaluated(settings["branches"][platforms.index(None)], inputs[1:])
    if name == "scan" and settings["length"] == settings["unroll"]:
        return _unrolled(settings, inputs)
    if name == "reduce_window_max" and inputs[0].shape[0] == settings["window_dimensions"][0] == 1:
        # ONNX Runtime pools along three axes at most, and the converter takes all for such.
        fewer = {key: value[1:] for key, value in settings.items()}
        return [equation.primitive.bind(inputs[0][0], **fewer)[None]]
    known = bool(inputs) and not any(isinstance(x, Tracer) for x in inputs)
    # A constant that grows is left to whoever reads the graph.
    after: Any = [v.aval for v in equation.outvars]
    grows = sum(aval.size for aval in after) > sum(np.size(x) for x in inputs)
    folds = known and not grows
    with jax.ensure_compile_time_eval() if folds else contextlib.nullcontext():
        settings = equation.primitive.get_bind_params(settings)
        results = equation.primitive.bind(*inputs, **settings)
    return results if equation.primitive.multiple_results else [results]


def _unrolled(settings: dict[str, Any], inputs: list[Any]) -> list[Any]:
    """What a scan makes of its inputs, step after step."""
    first, last = settings["num_consts"], settings["num_consts"] + settings["num_carry"]
    constants, carry, rows = inputs[:first], inputs[first:last], inputs[last:]
    steps = range(settings["length"])
    outputs = []
    for i in reversed(steps) if settings["reverse"] else steps:
        row = [_row(x, i) for x in rows]
        results = _evaluated(settings["jaxpr"], [*constants, *carry, *row])
        carry = results[: len(carry)]
        outputs.append(results[len(carry) :])
    if settings["reverse"]:
        outputs.reverse()
    return [*carry, *(jnp.stack(output) for output in zip(*outputs, strict=True))]


def _row(x: Any, i: int) -> Any:
    return x[i] if isinstance(x, Tracer) else np.asarray(x)[i]
