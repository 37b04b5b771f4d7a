"""Feature pyramids of detectors: levels of equal channels, from one map or from stages.

Level l has 4 * 2^l pixels a feature (3.5 * 2^l where patches have 14), and its layers are named by
l + 2, as in detectron2. Both pyramids add one level: every other feature of the coarsest.
"""

from collections.abc import Sequence
from typing import Any

from flax import nnx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxdg.backbones.layers import TORCH, Conv
from jaxdg.backbones.pyramid import Double

xavier = nnx.initializers.variance_scaling(1.0, "fan_in", "uniform")  # detectron2's c2_xavier_fill
msra = nnx.initializers.variance_scaling(2.0, "fan_out", "normal")  # detectron2's c2_msra_fill


class ConvNorm(nnx.Conv):
    """A convolution that keeps the size, with a LayerNorm over channels in place of the bias."""

    def __init__(
        self,
        channels: int,
        width: int,
        side: int,
        *,
        kernel_init: Any = TORCH,
        dtype: str,
        rngs: nnx.Rngs,
    ):
        super().__init__(
            channels,
            width,
            (side, side),
            use_bias=False,
            kernel_init=kernel_init,
            dtype=jnp.dtype(dtype),
            rngs=rngs,
        )
        self.norm = nnx.LayerNorm(width, epsilon=1e-6, rngs=rngs)

    def __call__(self, inputs: Float[Array, "b h w _"]) -> Float[Array, "b h w c"]:
        return self.norm(super().__call__(inputs))


def gelu(x: Array) -> Array:
    """By its exact formula."""
    return jax.nn.gelu(x, approximate=False)


def halve(x: Float[Array, "b h w c"]) -> Float[Array, "b h2 w2 c"]:
    """The maximum of each 2x2 features."""
    return nnx.max_pool(x, (2, 2), strides=(2, 2))


class SimplePyramid(nnx.Module):
    """ViTDet's pyramid (Li et al. 2022): every level from the same map.

    Transposed convolutions enlarge it and max pooling halves it. The layers of a level have
    detectron2's numbers, which count GELU and the pooling.
    """

    def __init__(
        self, channels: int, levels: Sequence[int], width: int, *, dtype: str, rngs: nnx.Rngs
    ):
        """Args:
        channels: of the map, which has 16 (or 14) pixels a feature.
        levels: those to build, of 0 to 3.
        width: channels of each level.
        dtype: compute dtype.
        rngs: initialises the parameters.
        """
        self.levels = tuple(levels)

        kw: Any = dict(dtype=dtype, rngs=rngs)
        for level in self.levels:
            layers = []
            c = channels
            if level == 0:
                norm = nnx.LayerNorm(c // 2, epsilon=1e-6, rngs=rngs)
                layers = [Double(c, c // 2, **kw), norm, gelu, Double(c // 2, c // 4, **kw)]
                c = c // 4
            elif level == 1:
                layers = [Double(c, c // 2, **kw)]
                c = c // 2
            elif level == 3:
                layers = [halve]
            layers += [ConvNorm(c, width, 1, **kw), ConvNorm(width, width, 3, **kw)]
            setattr(self, f"simfp_{level + 2}", nnx.List(layers))

    def __call__(
        self, features: tuple[Float[Array, "b _ _ _"], ...]
    ) -> tuple[Float[Array, "b _ _ c"], ...]:
        """The deepest of the maps to the levels, finest first."""
        outputs = []
        for level in self.levels:
            x = features[-1]
            for layer in getattr(self, f"simfp_{level + 2}"):
                x = layer(x)
            outputs.append(x)
        return (*outputs, outputs[-1][:, ::2, ::2])


class Fpn(nnx.Module):
    """The feature pyramid network (Lin et al. 2017): to each stage the coarser ones are added."""

    def __init__(
        self,
        channels: Sequence[int],
        levels: Sequence[int],
        width: int,
        *,
        dtype: str,
        rngs: nnx.Rngs,
    ):
        """Args:
        channels: of each stage that is read.
        levels: number of each stage, consecutive, from 0 to 3.
        width: channels of each level.
        dtype: compute dtype.
        rngs: initialises the parameters.
        """
        self.levels = tuple(levels)
        kw: Any = dict(kernel_init=xavier, dtype=jnp.dtype(dtype), rngs=rngs)
        for level, c in zip(self.levels, channels, strict=True):
            setattr(self, f"fpn_lateral{level + 2}", Conv(c, width, (1, 1), **kw))
            setattr(self, f"fpn_output{level + 2}", Conv(width, width, (3, 3), **kw))

    def __call__(
        self, features: tuple[Float[Array, "b _ _ _"], ...]
    ) -> tuple[Float[Array, "b _ _ c"], ...]:
        """The stages' maps to the levels, finest first."""
        outputs = []
        above = None
        for level, x in zip(reversed(self.levels), reversed(features), strict=True):
            x = getattr(self, f"fpn_lateral{level + 2}")(x)
            above = x if above is None else x + above.repeat(2, axis=1).repeat(2, axis=2)
            outputs.insert(0, getattr(self, f"fpn_output{level + 2}")(above))
        return (*outputs, outputs[-1][:, ::2, ::2])
