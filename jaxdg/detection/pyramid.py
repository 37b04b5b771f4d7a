"""Feature pyramids: one deep map of a plain encoder, or the stages of a hierarchical one, to levels
of equal channels.

Level l has 4 * 2^l pixels a feature (3.5 * 2^l where patches have 14), and names its layers by l +
2, as detectron2 does. Both pyramids end with one level more, every other feature of the coarsest.
"""

from collections.abc import Sequence
from typing import Any

from flax import nnx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxdg.backbones.pyramid import Double

uniform = nnx.initializers.variance_scaling(
    1 / 3, "fan_in", "uniform"
)  # within 1 / sqrt(fan_in), torch's default
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
        kernel_init: Any = uniform,
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
    """ViTDet's (Li et al. 2022): every level from the same map, enlarged by transposed convolutions
    or halved by max pooling.

    The numbers of the layers inside a level are detectron2's as well, which counts GELU and the
    pooling.
    """

    def __init__(
        self, channels: int, levels: Sequence[int], width: int, *, dtype: str, rngs: nnx.Rngs
    ):
        """Args:
        channels: of the map, which has 16 (or 14) pixels a feature.
        levels: of 0 to 3, which are built.
        width: channels of each level.
        dtype: compute dtype.
        rngs: initialises the parameters.
        """
        self.levels = tuple(levels)

        def double(c):
            return Double(c, c // 2, dtype=dtype, rngs=rngs)

        for level in self.levels:
            resize = []
            c = channels
            if level == 0:
                resize = [
                    double(c),
                    nnx.LayerNorm(c // 2, epsilon=1e-6, rngs=rngs),
                    gelu,
                    double(c // 2),
                ]
                c = c // 4
            elif level == 1:
                resize = [double(c)]
                c = c // 2
            elif level == 3:
                resize = [halve]
            convolutions = (
                ConvNorm(c, width, 1, dtype=dtype, rngs=rngs),
                ConvNorm(width, width, 3, dtype=dtype, rngs=rngs),
            )
            setattr(self, f"simfp_{level + 2}", nnx.List([*resize, *convolutions]))

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
    """The feature pyramid network (Lin et al.

    2017): each stage, joined by the enlarged coarser ones.
    """

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
        levels: the number of each, from 0 to 3, without a gap.
        width: channels of each level.
        dtype: compute dtype.
        rngs: initialises the parameters.
        """
        self.levels = tuple(levels)
        kw: Any = dict(kernel_init=xavier, dtype=jnp.dtype(dtype), rngs=rngs)
        for level, c in zip(self.levels, channels, strict=True):
            setattr(self, f"fpn_lateral{level + 2}", nnx.Conv(c, width, (1, 1), **kw))
            setattr(self, f"fpn_output{level + 2}", nnx.Conv(width, width, (3, 3), **kw))

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
