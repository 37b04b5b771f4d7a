"""SegFormer's decoder (Xie et al. 2021): levels are projected, resized, mixed and classified.

Parameters are named as in transformers and ordered as in NVlabs/SegFormer, where the coarsest level
comes first. Different from both: levels are mixed before they are enlarged. Enlarging is linear, so
the result is the same, and the concatenation, four times as large as any other tensor here, is
never made.
"""

from collections.abc import Sequence
import dataclasses

from flax import nnx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key

from jaxdg.backbones.layers import Linear
from jaxdg.evaluation.sliding_window import resize_scores
from jaxdg.ranges import Count
from jaxdg.segmentation.decoder import DecoderConfig, DecoderOptions
from jaxdg.segmentation.linear import PixelHead, drop_channels
from jaxdg.tracing import BatchNorm


@dataclasses.dataclass(unsafe_hash=True, kw_only=True)
class SegformerOptions(DecoderOptions):
    """Sizes of the SegFormer decoder.

    Attributes:
        hidden: channels inside; SegFormer has 256 on its encoders B0 and B1, and 768 on larger
            ones. Default 256.
    """

    hidden: Count = 256

    def config(self, classes: Sequence[str], dtype: str) -> "SegformerConfig":
        """See `DecoderOptions.config`."""
        return SegformerConfig(num_classes=len(classes), dtype=dtype, **vars(self))


@dataclasses.dataclass(unsafe_hash=True)
class SegformerConfig(SegformerOptions, DecoderConfig):
    """A SegFormer head: the fields of `SegformerOptions`, and these of the run.

    Attributes:
        num_classes: k.
        dtype: compute dtype; normalisation and scores are float32.
    """

    num_classes: int
    dtype: str = dataclasses.field(default="float32", kw_only=True)

    def build(self, channels: Sequence[int], *, encoder: str, rngs: nnx.Rngs) -> "SegformerHead":
        """See `DecoderConfig.build`."""
        return SegformerHead(self, channels, rngs=rngs)


class SegformerHead(PixelHead):
    """Feature maps to class scores at the finest map's resolution."""

    def __init__(self, config: SegformerConfig, channels: Sequence[int], *, rngs: nnx.Rngs):
        """Builds the head with random parameters.

        Args:
            config: sizes.
            channels: of each feature map, finest map first.
            rngs: initialises the parameters.
        """
        self.config = c = config
        self.dtype = jnp.dtype(c.dtype)
        self.linear_c = nnx.List(
            [Linear(n, c.hidden, dtype=self.dtype, rngs=rngs) for n in channels]
        )
        self.linear_fuse = Linear(len(channels) * c.hidden, c.hidden, use_bias=False, rngs=rngs)
        self.batch_norm = BatchNorm(c.hidden, momentum=0.9, dtype=jnp.float32, rngs=rngs)
        self.classifier = Linear(
            c.hidden,
            c.num_classes,
            kernel_init=nnx.initializers.normal(0.01),
            dtype=self.dtype,
            rngs=rngs,
        )

    def __call__(
        self,
        features: tuple[Float[Array, "b _ _ _"], ...],
        key: Key[Array, ""] | None = None,
        train: bool = False,
    ) -> Float[Array, "b h w k"]:
        """Class scores (logits) at the size of the finest map, float32.

        Args:
            features: one map a level, finest first.
            key: random key that turns dropout on, see `drop_channels`.
            train: normalise with the statistics of the batch (over all devices) and update the
                running ones. A batch that is computed in parts is normalised part by part.
        """
        _, h, w, _ = features[0].shape
        # The kernel of the coarsest level comes first.
        kernels = jnp.split(self.linear_fuse.kernel[...].astype(self.dtype), len(features))
        x = jnp.zeros((), jnp.float32)
        for feature, linear, kernel in zip(features, self.linear_c, reversed(kernels), strict=True):
            mixed = jnp.matmul(linear(feature), kernel, preferred_element_type=jnp.float32)
            x = x + resize_scores(mixed, (h, w))
        x = jax.nn.relu(self.batch_norm(x, use_running_average=not train)).astype(self.dtype)
        return self.classifier(drop_channels(x, key)).astype(jnp.float32)
