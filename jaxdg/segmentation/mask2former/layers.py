"""Layers of Mask2Former that are computed so that a GPU moves little memory."""

from flax import nnx
import jax
from jax.ad_checkpoint import checkpoint_name
from jax.experimental.layout import Layout, with_layout_constraint
import jax.numpy as jnp
from jaxtyping import Array, Float


def layer_norm(channels: int, dtype: str, rngs: nnx.Rngs) -> nnx.LayerNorm:
    """As torch computes it in float32.

    In half precision, whose rounding outweighs the difference, the variance is the mean square less
    the squared mean, for which the features are read once.
    """
    fast = jnp.dtype(dtype).itemsize == 2
    return nnx.LayerNorm(channels, epsilon=1e-5, use_fast_variance=fast, rngs=rngs)


@jax.custom_jvp
def relu(x: Float[Array, "*n"]) -> Float[Array, "*n"]:
    """`max(x, 0)` whose backward pass reads its result alone.

    `stacking.stores_product` stores that instead of the product before it, and the product's bias
    is not added anew.
    """
    return jnp.maximum(x, 0)


@relu.defjvp
def _(primals, tangents):
    (x,) = primals
    (tangent,) = tangents
    y = checkpoint_name(jnp.maximum(x, 0), "relu")
    return y, jnp.where(y > 0, tangent, 0)


def row_major(x: Float[Array, "b n c"]) -> Float[Array, "b n c"]:
    """The same tokens, kept channels last on a GPU.

    Left to itself, XLA lays them out channels first there, and transposes them at every use. On
    several devices it is left to itself: the partitioner would gather the whole batch on each.
    """
    if jax.sharding.get_abstract_mesh().size > 1:
        return x
    return jax.lax.platform_dependent(
        x,
        cuda=lambda x: with_layout_constraint(x, Layout((0, 1, 2))),
        default=lambda x: x,
    )
