"""The Mix Transformer of SegFormer (Xie et al. 2021, arXiv 2105.15203), with four stages.

Attention has reduced keys, and each MLP contains a depthwise convolution. The convolution replaces
learned positions, so images may have any size. Attribute names and numbers are those of
NVlabs/SegFormer: norms of blocks and stages have epsilon 1e-6, those of patches and of reduced keys
1e-5 (transformers computes all of them with 1e-5).
"""

import dataclasses
import re

from flax import nnx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key
import numpy as np

from jaxdg.backbones import attention, stacking
from jaxdg.backbones.encoder import Encoder, StagedConfig
from jaxdg.backbones.layers import Conv, Linear


@dataclasses.dataclass(frozen=True)
class MitConfig(StagedConfig):
    """A Mix Transformer; fields of `StagedConfig`, and of each stage:

    Attributes:
        heads: attention heads.
        reductions: sides of the squares of pixels that give one key and value.
    """

    heads: tuple[int, int, int, int] = (1, 2, 5, 8)
    reductions: tuple[int, int, int, int] = (8, 4, 2, 1)

    def build(self, *, rngs: nnx.Rngs) -> "Mit":
        """See `EncoderConfig.build`."""
        return Mit(self, rngs=rngs)

    def size(self, stage: int) -> tuple[int, int]:
        """Rows and columns of a stage's map: the image's sides over its stride, rounded up."""
        height, width = (-(-side // (4 << stage)) for side in self.image_size)
        return height, width


def layer_norm(channels: int, epsilon: float, rngs: nnx.Rngs) -> nnx.LayerNorm:
    """As torch computes it."""
    return nnx.LayerNorm(channels, epsilon=epsilon, use_fast_variance=False, rngs=rngs)


class Attention(nnx.Module):
    """Multi-head attention in which squares of pixels are joined to one key and value each."""

    def __init__(self, config: MitConfig, stage: int, *, rngs: nnx.Rngs):
        c = config.widths[stage]
        ratio = config.reductions[stage]
        dtype = jnp.dtype(config.dtype)
        self.heads = config.heads[stage]
        self.q = Linear(c, c, dtype=dtype, rngs=rngs)
        self.kv = Linear(c, 2 * c, dtype=dtype, rngs=rngs)
        self.proj = Linear(c, c, dtype=dtype, rngs=rngs)
        reduced = ratio > 1
        square = (ratio, ratio)
        self.sr = (
            Conv(c, c, square, strides=square, padding="VALID", dtype=dtype, rngs=rngs)
            if reduced
            else None
        )
        self.norm = layer_norm(c, 1e-5, rngs) if reduced else None

    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h w c"]:
        b, h, w, c = x.shape
        q = self.q(x).reshape(b, h * w, self.heads, -1)
        if self.sr is not None and self.norm is not None:
            x = self.norm(self.sr(x))
        k, v = jnp.moveaxis(self.kv(x).reshape(b, -1, 2, self.heads, c // self.heads), 2, 0)
        return self.proj(attention.attention(q, k, v).reshape(b, h, w, c))


class Depthwise(nnx.Module):
    """A 3x3 convolution of each channel by itself, as the sum of nine shifted maps.

    On CPU this was 13 and 29 times as fast as XLA's grouped convolution at two sizes, 5 and 68
    times with the backward pass (2026-11-22).
    """

    def __init__(self, channels: int, *, rngs: nnx.Rngs):
        init = nnx.initializers.variance_scaling(2.0, "fan_in", "normal")
        self.kernel = nnx.Param(init(rngs.params(), (3, 3, 1, channels)))
        self.bias = nnx.Param(jnp.zeros(channels))

    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h w c"]:
        _, h, w, _ = x.shape
        padded = jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
        kernel = self.kernel[...]
        shifted = [
            padded[:, i : i + h, j : j + w].astype(jnp.float32) * kernel[i, j, 0]
            for i in range(3)
            for j in range(3)
        ]
        return sum(shifted, start=self.bias[...]).astype(x.dtype)


class Mlp(nnx.Module):
    """Two linear layers with a depthwise convolution and GELU between."""

    def __init__(self, channels: int, *, dtype: str, rngs: nnx.Rngs):
        self.fc1 = Linear(channels, 4 * channels, dtype=jnp.dtype(dtype), rngs=rngs)
        self.dwconv = Depthwise(4 * channels, rngs=rngs)
        self.fc2 = Linear(4 * channels, channels, dtype=jnp.dtype(dtype), rngs=rngs)

    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h w c"]:
        return self.fc2(jax.nn.gelu(self.dwconv(self.fc1(x)), approximate=False))


class Block(nnx.Module):
    """Attention and MLP, each behind a LayerNorm and a residual."""

    def __init__(self, config: MitConfig, stage: int, *, rngs: nnx.Rngs):
        c = config.widths[stage]
        self.norm1 = layer_norm(c, 1e-6, rngs)
        self.attn = Attention(config, stage, rngs=rngs)
        self.norm2 = layer_norm(c, 1e-6, rngs)
        self.mlp = Mlp(c, dtype=config.dtype, rngs=rngs)

    def __call__(
        self, x: Float[Array, "b h w c"], keep: Float[Array, "2 b 1 1 1"]
    ) -> Float[Array, "b h w c"]:
        """`keep` scales the two branches (drop path)."""
        x = x + keep[0].astype(x.dtype) * self.attn(self.norm1(x))
        return x + keep[1].astype(x.dtype) * self.mlp(self.norm2(x))


class PatchEmbed(nnx.Module):
    """Overlapping patches to normalised tokens: 7x7 every 4 pixels at first, then 3x3 every 2."""

    def __init__(self, config: MitConfig, stage: int, *, rngs: nnx.Rngs):
        side, stride = (7, 4) if stage == 0 else (3, 2)
        before = 3 if stage == 0 else config.widths[stage - 1]
        c = config.widths[stage]
        dtype = jnp.dtype(config.dtype)
        # Padded alike on both sides, as torch does; "SAME" would pad even sides elsewhere.
        self.proj = Conv(
            before,
            c,
            (side, side),
            strides=(stride, stride),
            padding=side // 2,
            dtype=dtype,
            rngs=rngs,
        )
        self.norm = layer_norm(c, 1e-5, rngs)

    def __call__(self, x: Float[Array, "b _ _ _"]) -> Float[Array, "b h w c"]:
        y = self.proj(x)
        return self.norm(y).astype(y.dtype)


class Mit(Encoder):
    """Image to features after the norm of each tapped stage."""

    config: MitConfig

    def __init__(self, config: MitConfig, *, rngs: nnx.Rngs):
        """Builds the encoder with random parameters; `jaxdg.backbones.create` loads weights.

        Raises:
            ValueError: an image too small for the keys of a stage.
        """
        self.config = c = config
        for stage in range(c.used):
            if min(c.size(stage)) < c.reductions[stage]:
                h, w = c.image_size
                smallest = 4 * c.reductions[0]
                raise ValueError(
                    f"image_size {h}x{w} is too small for this encoder, whose keys join squares of"
                    f" {smallest} pixels"
                )

            def block(rngs, _, stage=stage):
                return Block(c, stage, rngs=rngs)

            setattr(self, f"patch_embed{stage + 1}", PatchEmbed(c, stage, rngs=rngs))
            setattr(
                self,
                f"block{stage + 1}",
                stacking.Stack(
                    block, c.blocks[stage], c.ends(stage), remat=c.remat, unroll=c.unroll, rngs=rngs
                ),
            )
            setattr(self, f"norm{stage + 1}", layer_norm(c.widths[stage], 1e-6, rngs))

    def __call__(
        self, images: Float[Array | np.ndarray, "b h w 3"], key: Key[Array, ""] | None = None
    ) -> tuple[Float[Array, "b _ _ _"], ...]:
        """Features of the stages.

        Args:
            images: [b, h, w, 3] normalised with `config.mean` and `config.std`, of
                `config.image_size`.
            key: random key that turns drop path on (training).

        Returns:
            One [b, h / stride, w / stride, c] for each tap, sides rounded up, finest first.
        """
        c = self.config
        self.check_size(images)
        keep = stacking.drop_path_scales(key, c.drop_path, sum(c.blocks), images.shape[0])[
            ..., None
        ]
        x = jnp.asarray(images)
        outputs = []
        first = 0
        for stage, blocks in enumerate(c.blocks[: c.used]):
            embed, block, norm = (
                getattr(self, f"{part}{stage + 1}") for part in ("patch_embed", "block", "norm")
            )
            x = embed(x)
            x = block(x, keep[first : first + blocks])[blocks - 1]
            x = norm(x).astype(x.dtype)
            outputs.append(x)
            first += blocks
        return tuple(outputs[tap] for tap in c.taps)

    def adapt(self, name: str, tensor: np.ndarray) -> np.ndarray | None:
        """Fits a stored tensor to this encoder: stages past the last tap are not needed (None)."""
        stage = self.unit_of(name)
        return None if stage is not None and stage >= self.config.used else tensor

    def unit_of(self, name: str) -> int | None:
        """See `Encoder.unit_of`."""
        found = re.match(r"(?:patch_embed|block|norm)(\d)\.", name)
        return int(found[1]) - 1 if found else None
