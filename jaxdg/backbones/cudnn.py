"""Attention by cuDNN's fused kernel, traced on any machine.

`jax.nn.dot_product_attention(implementation="cudnn")` computes the same. Before it traces anything
it asks the cuDNN of this machine for its version, so a program for GPUs could not be exported or
compiled where there is none. The function below it takes the version as an argument.
"""

import inspect
import math
from typing import Any

import jax
from jax._src.cudnn import fused_attention_stablehlo as fused
from jax.interpreters import mlir
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

VERSION = 90000  # jax's CUDA packages ask for cuDNN 9 or later
ABSENT = "cudnn_attention_needs_cuda"
# What an inference program may call.
CALLS = ("__cudnn$fmhaSoftmax", "__cudnn$fmhaScaleBiasSoftmax", ABSENT)


def _not_on_this_platform(context: Any, *operands: Any, **_: Any) -> Any:
    """A call that nothing implements, in the place of the kernel.

    A program for several platforms is lowered with all its branches for each of them, so that jax
    wants the kernel on CPUs too, in a branch that is never taken there.
    """
    return jax.ffi.ffi_lowering(ABSENT)(context, *operands)


for primitive in (fused._dot_product_attention_fwd_p, fused._dot_product_attention_bwd_p):
    mlir.register_lowering(primitive, _not_on_this_platform)


def cudnn_attention(
    q: Float[Array, "b q heads d"],
    k: Float[Array, "b n heads d"],
    v: Float[Array, "b n heads d"],
    mask: Bool[Array, "b q n"] | None = None,
    padding: int = 0,
) -> Float[Array, "b q heads d"]:
    """Attention in half precision; `d` is a multiple of 8 up to 128.

    The backward pass takes only even numbers of tokens, so an odd number is padded and masked. A
    mask is added to the logits, as the kernel has no other way to take one.

    Args:
        q: queries.
        k: keys.
        v: values.
        mask: where a query may look, in all heads.
        padding: so many keys at the end are none; 0 with a mask.
    """
    m = q.shape[1]
    odd = m % 2
    more = k.shape[1] % 2
    q = jnp.pad(q, ((0, 0), (0, odd), (0, 0), (0, 0)))
    k, v = (jnp.pad(x, ((0, 0), (0, more), (0, 0), (0, 0))) for x in (k, v))
    if mask is not None:
        mask = jnp.pad(mask, ((0, 0), (0, odd), (0, more)))
        bias = jnp.where(mask, jnp.zeros((), q.dtype), jnp.finfo(q.dtype).min / 2)
        return _fused(q, k, v, bias=bias[:, None])[:, :m]
    if not padding + more:
        return _fused(q, k, v)[:, :m]
    keys = k.shape[1] - padding - more
    lengths = (jnp.full(len(q), q.shape[1], jnp.int32), jnp.full(len(q), keys, jnp.int32))
    return _fused(q, k, v, lengths)[:, :m]


def _fused(
    q: Array,
    k: Array,
    v: Array,
    lengths: tuple[Array, Array] | None = None,
    bias: Array | None = None,
) -> Array:
    unused = jnp.zeros(0, q.dtype)
    q_lengths, kv_lengths = lengths or (unused, unused)
    values = {
        "query": q,
        "key": k,
        "value": v,
        "bias": unused if bias is None else bias,
        "q_seqlen": q_lengths,
        "kv_seqlen": kv_lengths,
        "q_offsets": unused,
        "kv_offsets": unused,
        "page_table_k": unused,
        "page_table_v": unused,
        "score_mod_args": (),
        "scale": 1.0 / math.sqrt(q.shape[-1]),
        "seed": 42,
        "dropout_rate": 0.0,
        "variadic_args": (bias is not None, False),  # and no gradient of a bias
        "mask_type": fused.MaskType.PADDING if lengths else fused.MaskType.NO_MASK,
        "layout": fused.AttentionLayout.BTNH.value,
        "sliding_window_length": None,
        "score_mod": None,
        "cudnn_version": VERSION,
        "return_residual": False,
    }
    # Versions of jax differ in what it takes, and it takes everything by position.
    names = inspect.signature(fused._dot_product_attention).parameters
    return fused._dot_product_attention(*(values[name] for name in names))
