"""The simplest decoder: a LayerNorm and a linear layer on each map, and the sum of their scores.

This equals one linear layer on the concatenated maps, but each map is read at its own resolution
and only the k class scores are enlarged. It probes what the encoder knows.
"""

from collections.abc import Sequence
import dataclasses

from flax import nnx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key, UInt8

from jaxdg.backbones.layers import Linear, dropout
from jaxdg.evaluation.sliding_window import resize_scores
from jaxdg.segmentation.decoder import Decoder, DecoderConfig, DecoderOptions

IGNORE = 255
DROPOUT = 0.1


def drop_channels(
    x: Float[Array, "b h w c"], key: Key[Array, ""] | None
) -> Float[Array, "b h w c"]:
    """Dropout of whole channels of a sample, as before mmsegmentation's classifiers.

    Args:
        x: features.
        key: random key; None: nothing is dropped.
    """
    return dropout(x, key, DROPOUT, (x.shape[0], 1, 1, x.shape[-1]))


class PixelHead(Decoder):
    """The base of decoders whose output is class scores at the finest map's resolution."""

    def scores(
        self, output: Float[Array, "b h w k"], size: tuple[int, int]
    ) -> Float[Array, "b H W k"]:
        """Class scores of `output` at an image size."""
        return resize_scores(output, size)

    def loss_denominator(self, label: UInt8[Array, "b H W"]) -> Float[Array, ""]:
        """The number of labelled pixels of the global batch, at least 1."""
        return jnp.maximum(jnp.sum(label != IGNORE), 1).astype(jnp.float32)

    def loss(
        self,
        output: Float[Array, "b h w k"],
        label: UInt8[Array, "b H W"],
        denominator: Float[Array, ""],
        key: Key[Array, ""] | None = None,
    ) -> dict[str, Float[Array, ""]]:
        """Cross entropy at the label's resolution: its sum over labelled pixels / `denominator`.

        So the loss of a batch is the sum of the losses of its parts, whatever their sizes. `key` is
        not used: nothing is random.
        """
        return {"cross_entropy": cross_entropy(output, label) / denominator}


def cross_entropy(
    output: Float[Array, "b h w k"], label: UInt8[Array, "b H W"]
) -> Float[Array, ""]:
    """Cross entropy at the label's resolution, summed over labelled pixels."""
    _, h, w = label.shape
    logits = resize_scores(output, (h, w))
    valid = label != IGNORE
    log_p = jax.nn.log_softmax(logits)
    # A one-hot product instead of a gather: its gradient needs no scatter.
    one_hot = jax.nn.one_hot(label, logits.shape[-1], dtype=log_p.dtype)
    picked = jnp.sum(log_p * one_hot, axis=-1)
    return -jnp.sum(jnp.where(valid, picked, 0.0))


@dataclasses.dataclass(unsafe_hash=True)
class LinearOptions(DecoderOptions):
    """The linear decoder has no settings."""

    def config(self, classes: Sequence[str], dtype: str) -> "LinearConfig":
        """See `DecoderOptions.config`."""
        return LinearConfig(len(classes), dtype)


@dataclasses.dataclass(frozen=True)
class LinearConfig(DecoderConfig):
    """A linear head.

    Attributes:
        num_classes: k.
        dtype: compute dtype of the linear layers; scores are float32.
    """

    num_classes: int
    dtype: str = "float32"

    def build(self, channels: Sequence[int], *, encoder: str, rngs: nnx.Rngs) -> "LinearHead":
        """See `DecoderConfig.build`."""
        return LinearHead(self.num_classes, channels, dtype=self.dtype, rngs=rngs)


class LinearHead(PixelHead):
    """Feature maps to class scores at the finest map's resolution."""

    def __init__(
        self, num_classes: int, channels: Sequence[int], *, dtype: str = "float32", rngs: nnx.Rngs
    ):
        """Args:
        num_classes: k.
        channels: of each feature map, finest map first.
        dtype: compute dtype of the linear layers; scores are float32.
        rngs: initialises the parameters.
        """
        self.norms = nnx.List([nnx.LayerNorm(c, epsilon=1e-6, rngs=rngs) for c in channels])
        self.classifiers = nnx.List(
            [Linear(c, num_classes, dtype=jnp.dtype(dtype), rngs=rngs) for c in channels]
        )

    def __call__(
        self,
        features: tuple[Float[Array, "b _ _ _"], ...],
        key: Key[Array, ""] | None = None,
        train: bool = False,
    ) -> Float[Array, "b h w k"]:
        """Class scores (logits) at the size of the finest map, float32; the same in training."""
        _, h, w, _ = features[0].shape
        scores = jnp.zeros((), jnp.float32)
        for x, norm, classify in zip(features, self.norms, self.classifiers, strict=True):
            scores = scores + resize_scores(classify(norm(x)).astype(jnp.float32), (h, w))
        return scores
