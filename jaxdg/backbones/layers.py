"""Layers that models share: linear ones and convolutions, their start in torch, and dropout.

Biases get exact gradients in half precision. A bias is added to every token, so its gradient is a
sum over all tokens. JAX sums in the type of the terms, and a bfloat16 hardly grows any more when it
is 256 times as large as a term. PyTorch sums in float32, and so do these layers.
"""

from collections.abc import Sequence
from typing import Any

from flax import nnx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key

# Torch's start of kernels, uniform within 1 / sqrt(fan_in).
TORCH = nnx.initializers.variance_scaling(1 / 3, "fan_in", "uniform")


def spread(parameter: Float[Array, "*p"], x: Float[Array, "*n"]) -> Float[Array, "*n"]:
    """A float32 parameter repeated over the shape of x, in the type of x.

    It is repeated before it is cast, so its gradient is cast before it is summed. XLA exchanges the
    two in the forward pass, and fuses them with the sum in the backward pass.

    Args:
        parameter: broadcast to the shape of x.
        x: of the compute dtype.
    """
    return jnp.broadcast_to(parameter, x.shape).astype(x.dtype)


class Linear(nnx.Linear):
    """`nnx.Linear` with `spread`."""

    def __call__(self, inputs: Array, out_sharding: Any = None) -> Array:
        """The product with the kernel, and the bias."""
        if self.bias is None or not is_half(self.dtype):
            return super().__call__(inputs, out_sharding)
        kernel = self.kernel[...].astype(self.dtype)
        along = (((inputs.ndim - 1,), (0,)), ((), ()))
        y = jax.lax.dot_general(inputs.astype(self.dtype), kernel, along)
        return y + spread(self.bias[...], y)


class Conv(nnx.Conv):
    """`nnx.Conv` with `spread`."""

    def __init__(self, *sizes: Any, **options: Any):
        super().__init__(*sizes, **options)
        self.spreads_bias = self.use_bias and is_half(self.dtype)
        self.use_bias = self.use_bias and not self.spreads_bias

    def __call__(self, inputs: Array, out_sharding: Any = None) -> Array:
        """The convolution, and the bias."""
        y = super().__call__(inputs, out_sharding)
        if self.bias is None or not self.spreads_bias:
            return y
        return y + spread(self.bias[...], y)


def scanned_convolution(
    x: Float[Array, "b h w c"],
    kernel: Float[Array, "m n _ d"],
    strides: Sequence[int],
    padding: Sequence[tuple[int, int]],
    **options: Any,
) -> Float[Array, "_ _ _ d"]:
    """`jax.lax.conv_general_dilated` for an `nnx.Conv` in a scan, with fast gradients on CPU.

    XLA for CPUs computes convolutions fast in one order of axes. Outside of loops it brings others
    into that order (jax 0.10). Inside, gradients took up to 30 times as long.

    Args:
        x: images.
        kernel: in the order of `nnx.Conv`.
        strides: 1, as in the blocks of a scan, or the gradients are JAX's.
        padding: before and behind, by axis.
        options: what `nnx.Conv` says beside. Where one is not the default (groups, dilation,
            precision, another type of sums), the gradients are JAX's too.
    """
    plain = {"lhs_dilation": (1, 1), "rhs_dilation": (1, 1), "feature_group_count": 1}
    if tuple(strides) != (1, 1) or any(
        value is not None and (name not in plain or value != plain[name])
        for name, value in options.items()
        if name != "dimension_numbers"
    ):
        return jax.lax.conv_general_dilated(x, kernel, strides, padding, **options)
    return _convolved(x, kernel, tuple(padding))


def _in_order(x: Array, kernel: Array, padding: Sequence[tuple[int, int]]) -> Array:
    """A convolution in the order of axes that is fast everywhere."""
    order = ("NHWC", "HWIO", "NHWC")
    return jax.lax.conv_general_dilated(x, kernel, (1, 1), padding, dimension_numbers=order)


def _forward(
    x: Array, kernel: Array, padding: Sequence[tuple[int, int]]
) -> tuple[Array, tuple[Array, Array]]:
    return _in_order(x, kernel, padding), (x, kernel)


def _backward(
    padding: Sequence[tuple[int, int]], kept: tuple[Array, Array], slope: Array
) -> tuple[Array, Array]:
    def in_order(x: Array, kernel: Array, slope: Array) -> tuple[Array, Array]:
        rest = tuple(
            (side - 1 - before, side - 1 - behind)
            for side, (before, behind) in zip(kernel.shape, padding, strict=False)
        )
        of_x = _in_order(slope, jnp.flip(kernel, (0, 1)).swapaxes(2, 3), rest)
        # Channels stand for images, and images for channels.
        of_kernel = _in_order(x.transpose(3, 1, 2, 0), slope.transpose(1, 2, 0, 3), padding)
        return of_x, of_kernel.transpose(1, 2, 0, 3)

    def by_jax(x: Array, kernel: Array, slope: Array) -> tuple[Array, Array]:
        _, slopes = jax.vjp(lambda x, kernel: _in_order(x, kernel, padding), x, kernel)
        return slopes(slope)

    return jax.lax.platform_dependent(*kept, slope, cpu=in_order, default=by_jax)


_convolved = jax.custom_vjp(_in_order, nondiff_argnums=(2,))
_convolved.defvjp(_forward, _backward)


def dropout(
    x: Float[Array, "*n"],
    key: Key[Array, ""] | None,
    rate: float,
    shape: Sequence[int] | None = None,
) -> Float[Array, "*n"]:
    """Numbers that are 0 with the probability `rate`, and else larger so that their mean stays.

    Args:
        x: any.
        key: random key; None: nothing is dropped.
        rate: probability.
        shape: of the draws, broadcast to that of x; None: one for each number.
    """
    if key is None:
        return x
    keep = jax.random.bernoulli(key, 1 - rate, x.shape if shape is None else shape)
    return jnp.where(keep, x / (1 - rate), 0)


def is_half(dtype: Any) -> bool:
    """Whether this is a compute dtype of 16 bits; None is none."""
    return dtype is not None and jnp.dtype(dtype).itemsize == 2
