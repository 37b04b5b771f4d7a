"""Four levels from four taps of a plain encoder, as the public VLTSeg re-implementation builds them inside its backbone.

The shallowest tap is enlarged four times, the next twice, the third stays, the deepest is halved by max pooling. Theirs
normalises with BatchNorm over the global batch; LayerNorm is the default for new runs, being free of batch statistics.
"""

from typing import Literal

from flax import nnx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


class Pyramid(nnx.Module):
    """Taps at one stride p to levels at strides p/4, p/2, p and 2p, with unchanged channels."""

    def __init__(self, channels: int, norm: Literal["layer", "batch"] = "layer", *, dtype: str = "float32", rngs: nnx.Rngs):
        """Args:
        channels: of each tap and each level.
        norm: "layer", or "batch" for statistics over the global batch (checkpoints of the re-implementation).
        dtype: compute dtype.
        rngs: initialises the parameters.
        """
        kw = dict(kernel_size=(2, 2), strides=(2, 2), padding="VALID", dtype=jnp.dtype(dtype), rngs=rngs)
        self.fpn1_up1 = nnx.ConvTranspose(channels, channels, **kw)
        self.fpn1_norm = nnx.BatchNorm(channels, momentum=0.9, rngs=rngs) if norm == "batch" else nnx.LayerNorm(channels, rngs=rngs)
        self.fpn1_up2 = nnx.ConvTranspose(channels, channels, **kw)
        self.fpn2 = nnx.ConvTranspose(channels, channels, **kw)

    def __call__(self, features: tuple[Float[Array, "b _ _ c"], ...], train: bool = False) -> tuple[Float[Array, "b _ _ c"], ...]:
        """Four maps [b, h, w, c] of one size, shallow to deep, to [b, 4h, 4w, c], [b, 2h, 2w, c], [b, h, w, c], [b, h // 2, w // 2, c]."""
        x1, x2, x3, x4 = features
        x1 = self.fpn1_up1(x1)
        x1 = self.fpn1_norm(x1, use_running_average=not train) if isinstance(self.fpn1_norm, nnx.BatchNorm) else self.fpn1_norm(x1)
        x1 = self.fpn1_up2(jax.nn.gelu(x1, approximate=False))
        return x1, self.fpn2(x2), x3, nnx.max_pool(x4, (2, 2), strides=(2, 2))
