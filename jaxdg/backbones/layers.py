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
