"""VFMNet's decoder: taps are joined, enlarged twice by transposed convolutions and classified.

It follows `LinearHead` of tpy001/VFMSeg, the code of MGRNet, where it reads four taps of a ViT.
Different from it: the loss is a mean over labelled pixels. mmsegmentation's is one over all pixels,
so a batch counts there in proportion to its labelled share; a constant share would change nothing
under AdamW. And as everywhere here, running variances are those of the batch as it is, where torch
multiplies them by n / (n - 1).
"""

from collections.abc import Sequence
import dataclasses
from functools import partial

from flax import nnx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key

from jaxdg.backbones.layers import Linear
from jaxdg.backbones.pyramid import Double
from jaxdg.ranges import Count
from jaxdg.segmentation.decoder import DecoderConfig, DecoderOptions
from jaxdg.segmentation.linear import PixelHead, drop_channels
from jaxdg.tracing import BatchNorm

GROUPS = 32  # of the GroupNorm


@dataclasses.dataclass(unsafe_hash=True, kw_only=True)
class UpscalingOptions(DecoderOptions):
    """Sizes of the decoder of transposed convolutions.

    Attributes:
        width: channels after the taps are joined, a multiple of 32; each of the two transposed
            convolutions halves them. VFMNet has as many as a tap of its encoder. Default 1024.
    """

    width: Count = 1024

    def config(self, classes: Sequence[str], dtype: str) -> "UpscalingConfig":
        """See `DecoderOptions.config`."""
        return UpscalingConfig(num_classes=len(classes), dtype=dtype, **vars(self))


@dataclasses.dataclass(unsafe_hash=True)
class UpscalingConfig(UpscalingOptions, DecoderConfig):
    """A head of transposed convolutions: the fields of `UpscalingOptions`, and these of the run.

    Attributes:
        num_classes: k.
        dtype: compute dtype; normalisation and scores are float32.
    """

    name = "upscaling"
    joins = True

    num_classes: int
    dtype: str = dataclasses.field(default="float32", kw_only=True)

    def build(self, channels: Sequence[int], *, encoder: str, rngs: nnx.Rngs) -> "UpscalingHead":
        """See `DecoderConfig.build`."""
        return UpscalingHead(self, channels, rngs=rngs)


class UpscalingHead(PixelHead):
    """Feature maps of one size to class scores at four times their resolution."""

    def __init__(self, config: UpscalingConfig, channels: Sequence[int], *, rngs: nnx.Rngs):
        """Builds the head with random parameters.

        Args:
            config: sizes.
            channels: of each feature map.
            rngs: initialises the parameters.

        Raises:
            ValueError: the groups of the normalisation do not divide the width.
        """
        self.config = c = config
        if c.width % GROUPS:
            raise ValueError(
                f"model.upscaling.width is {c.width}; allowed: multiples of {GROUPS}, the groups of"
                " its normalisation"
            )
        self.dtype = jnp.dtype(c.dtype)
        linear = partial(Linear, dtype=self.dtype, rngs=rngs)
        start = nnx.initializers.variance_scaling(2.0, "fan_out", "normal")
        self.fusion_conv = linear(sum(channels), c.width, use_bias=False, kernel_init=start)
        self.fusion_norm = group_norm(c.width, rngs=rngs)
        self.upscaling1 = Double(c.width, c.width // 2, dtype=c.dtype, rngs=rngs)
        self.upscaling1_norm = BatchNorm(c.width // 2, momentum=0.9, dtype=jnp.float32, rngs=rngs)
        self.upscaling2 = Double(c.width // 2, c.width // 4, dtype=c.dtype, rngs=rngs)
        self.classifier = linear(
            c.width // 4, c.num_classes, kernel_init=nnx.initializers.normal(0.01)
        )

    def __call__(
        self,
        features: tuple[Float[Array, "b h w _"], ...],
        key: Key[Array, ""] | None = None,
        train: bool = False,
    ) -> Float[Array, "b h4 w4 k"]:
        """Class scores (logits) at four times the size of the maps, float32.

        Args:
            features: maps of one size, in the order of the taps.
            key: random key that turns dropout on, see `drop_channels`.
            train: normalise with the statistics of the batch (over all devices) and update the
                running ones. A batch that is computed in parts is normalised part by part.
        """
        x = self.fusion_conv(jnp.concatenate(features, axis=-1))
        x = self.upscaling1(jax.nn.relu(self.fusion_norm(x)))
        x = self.upscaling1_norm(x, use_running_average=not train).astype(self.dtype)
        x = self.upscaling2(jax.nn.gelu(x, approximate=False))
        x = jax.nn.gelu(x, approximate=False)
        return self.classifier(drop_channels(x, key)).astype(jnp.float32)


def group_norm(channels: int, epsilon: float = 1e-5, *, rngs: nnx.Rngs) -> nnx.GroupNorm:
    """GroupNorm in float32."""
    return nnx.GroupNorm(
        channels, GROUPS, epsilon=epsilon, use_fast_variance=False, dtype=jnp.float32, rngs=rngs
    )
