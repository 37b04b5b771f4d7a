"""Zero-shot segmentation by CLIP: the features of every patch against class name embeddings.

This is MaskCLIP (Zhou et al. 2022, chongzhou96/MaskCLIP). In the last block of the image tower
every token attends only to itself, so the attention returns the token's own projected value;
residual and MLP stay as they are. LayerNorm and projection then lead into the joint space, where
the cosine to a class's embedding is its score. On a ResNet the values of the attention pool are
projected.

Different from theirs:

- Activation and epsilons are those CLIP was trained with; their configuration has exact GELU and
  1e-6.
- Cosines are multiplied by CLIP's temperature. They are then the logits that CLIP was trained with,
  and no decision changes.
- The class embeddings are those of one template. Key smoothing and prompt denoising are left out.
"""

from collections.abc import Sequence
import dataclasses
from pathlib import Path
from typing import Any

from flax import nnx
import jax.numpy as jnp
from jaxtyping import Array, Float, Key

from jaxdg import backbones, weights
from jaxdg.segmentation.decoder import DecoderConfig, DecoderOptions
from jaxdg.segmentation.linear import PixelHead
from jaxdg.text import clip_text
from jaxdg.text.clip_text import normalize


@dataclasses.dataclass(unsafe_hash=True)
class ClipTextOptions(DecoderOptions):
    """The zero-shot decoder has no settings."""

    def config(self, classes: Sequence[str], dtype: str) -> "ClipTextHeadConfig":
        """See `DecoderOptions.config`."""
        return ClipTextHeadConfig(tuple(classes))


@dataclasses.dataclass(frozen=True)
class ClipTextHeadConfig(DecoderConfig):
    """Class names against features.

    Attributes:
        names: one a class.
    """

    names: tuple[str, ...]

    def taps(self, encoder: backbones.EncoderConfig) -> tuple[int, ...]:
        """What `values` reads: the last block or stage, and the one before it."""
        return encoder.depth - 2, encoder.depth - 1

    def build(self, channels: Sequence[int], *, encoder: str, rngs: nnx.Rngs) -> "ClipTextHead":
        """See `DecoderConfig.build`."""
        return ClipTextHead(self, encoder, rngs=rngs)


class ClipTextHead(PixelHead):
    """Features of `values` to class scores; `load_text` fills it, and nothing is trained."""

    trained = False

    def __init__(self, config: ClipTextHeadConfig, encoder: str, *, rngs: nnx.Rngs):
        """Builds the head with random parameters.

        Args:
            config: the classes.
            encoder: name in the zoo.
            rngs: initialises the parameters.

        Raises:
            ValueError: an encoder without a text tower.
        """
        self.tower = tower_of(encoder, "clip_text")
        tower = clip_text.TEXT_TOWERS[self.tower]
        self.names = config.names
        self.texts = nnx.BatchStat(jnp.zeros((len(config.names), tower.embedding)))
        self.logit_scale = nnx.BatchStat(jnp.zeros(()))
        projection = tower.image_projection
        self.image_projection = (
            None if projection is None else clip_text.Projection(projection, rngs=rngs)
        )

    def __call__(
        self,
        features: tuple[Float[Array, "b h w c"], ...],
        key: Key[Array, ""] | None = None,
        train: bool = False,
    ) -> Float[Array, "b h w k"]:
        """Class scores (logits), float32, from the one map of `adapt_features`."""
        (values,) = features
        x = values.astype(jnp.float32)
        x = x if self.image_projection is None else self.image_projection(x)
        return jnp.exp(self.logit_scale[...]) * (normalize(x) @ self.texts[...].T)

    def adapt_features(
        self, backbone: backbones.Encoder, features: tuple[Float[Array, "b _ _ _"], ...]
    ) -> tuple[Float[Array, "b _ _ _"], ...]:
        """See `Decoder.adapt_features`; computes `values`."""
        before, last = features
        return (values(backbone, before, last),)

    def load_text(self, path: str | Path) -> None:
        """Fills in the embeddings of the class names and the projection into their space.

        Args:
            path: made by `conversion/torch_to_flax.py --model ENCODER_text`.

        Raises:
            FileNotFoundError: no such file.
            ValueError: it holds no text tower, or that of another encoder.
        """
        tower = load_tower(path, self.tower)
        stored = {
            name: tensor
            for name, tensor in weights.tensors(tower).items()
            if name.startswith(("image_projection.", "logit_scale"))
        }
        weights.fill(self, stored | {"texts": tower.embeddings(self.names)}, path)


def tower_of(encoder: str, decoder: str) -> str:
    """The name of the text tower beside an encoder.

    Args:
        encoder: name in the zoo.
        decoder: that needs it, for the error.

    Raises:
        ValueError: an encoder without a text tower.
    """
    tower = f"{encoder}_text"
    if tower not in clip_text.TEXT_TOWERS:
        known = ", ".join(name.removesuffix("_text") for name in clip_text.TEXT_TOWERS)
        raise ValueError(
            f"model.decoder {decoder} needs an encoder with a text tower; model.encoder is"
            f" {encoder}, allowed: {known}"
        )
    return tower


def load_tower(path: str | Path, name: str) -> clip_text.ClipText:
    """The text tower of a converted file.

    Args:
        path: made by `conversion/torch_to_flax.py --model ENCODER_text`.
        name: of the tower that it must hold.

    Raises:
        FileNotFoundError: no such file.
        ValueError: it holds no text tower, or that of another encoder.
    """
    tower = clip_text.load_text_tower(path)
    held = weights.metadata(path)["model"]
    if held != name:
        raise ValueError(
            f"model.text_weights {path} holds {held}; allowed: {name}, the tower beside the encoder"
        )
    return tower


def values(
    backbone: backbones.Encoder, before: Float[Array, "b h w c"], last: Float[Array, "b _ _ _"]
) -> Float[Array, "b gh gw e"]:
    """The last features of an image tower whose last tokens attend only to themselves (MaskCLIP).

    Args:
        backbone: the tower, whose last two blocks or stages are tapped.
        before: features before the last block or stage.
        last: features after it.

    Returns:
        Of each patch, the input of the tower's last norm and projection. Of a ResNet, the embedding
        of each pixel, not normalised.
    """
    if isinstance(backbone, backbones.ClipResnet):
        return backbone.pool_dense(last)
    assert isinstance(backbone, backbones.Vit)
    # The last block lies between two taps, so it is a segment of its own.
    block: Any = backbone.blocks.single(backbone.config.depth - 1)
    x = before.reshape(before.shape[0], -1, before.shape[-1])
    x = x + block.attn.values(block.norm1(x))
    return (x + block.mlp(block.norm2(x))).reshape(before.shape)
