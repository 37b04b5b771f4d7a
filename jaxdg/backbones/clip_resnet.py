"""CLIP's ResNets (Radford et al. 2021), as OpenAI and open_clip publish them.

Bottlenecks as in torchvision's ResNet, with three convolutions as the stem and average pools before
everything that strides. Attribute names are OpenAI's. BatchNorm is frozen, as detectors and
segmenters keep it: it always uses the statistics of the pre-training, and neither they nor its
scale and bias are trained. The attention pool, which turns the deepest map into an embedding next
to those of texts, is part of the encoder; its features do not read it.
"""

import dataclasses
import re

from flax import nnx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key
import numpy as np

from jaxdg.backbones import resizing, stacking
from jaxdg.backbones.encoder import Encoder, StagedConfig
from jaxdg.backbones.layers import Linear, scanned_convolution, spread


@dataclasses.dataclass(frozen=True)
class ClipResnetConfig(StagedConfig):
    """A CLIP ResNet; fields of `StagedConfig`, and of its attention pool:

    Attributes:
        pool_grid: rows, and columns, of its learned positions: a 32nd of the image's side in the
            pre-training.
        embedding: channels of the joint space of images and texts.
    """

    blocks: tuple[int, int, int, int] = (3, 4, 6, 3)
    widths: tuple[int, int, int, int] = (256, 512, 1024, 2048)
    pool_grid: int = 7
    embedding: int = 1024

    def build(self, *, rngs: nnx.Rngs) -> "ClipResnet":
        """See `EncoderConfig.build`."""
        return ClipResnet(self, rngs=rngs)


class FrozenBatchNorm(nnx.Module):
    """Batch normalisation with fixed statistics; stores four tensors and trains none."""

    def __init__(self, channels: int):
        self.scale = nnx.BatchStat(jnp.ones(channels))
        self.var = nnx.BatchStat(jnp.ones(channels))
        self.bias = nnx.BatchStat(jnp.zeros(channels))
        self.mean = nnx.BatchStat(jnp.zeros(channels))

    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h w c"]:
        factor = self.scale[...] * jax.lax.rsqrt(self.var[...] + 1e-5)
        return ((x - self.mean[...]) * factor + self.bias[...]).astype(x.dtype)


def convolution(
    inside: int, outside: int, side: int, config: ClipResnetConfig, rngs: nnx.Rngs, stride: int = 1
) -> nnx.Conv:
    """A convolution without bias, padded alike on all sides, as in torch."""
    kernel = (side, side)
    strides = (stride, stride)
    init = nnx.initializers.variance_scaling(2.0, "fan_in", "normal")
    return nnx.Conv(
        inside,
        outside,
        kernel,
        strides,
        padding=side // 2,
        use_bias=False,
        kernel_init=init,
        dtype=jnp.dtype(config.dtype),
        conv_general_dilated=scanned_convolution,
        rngs=rngs,
    )


def halve(x: Float[Array, "b _ _ c"]) -> Float[Array, "b h w c"]:
    """The mean of each 2x2 pixels; an odd last row or column is dropped."""
    b, h, w, c = x.shape
    return x[:, : h // 2 * 2, : w // 2 * 2].reshape(b, h // 2, 2, w // 2, 2, c).mean((2, 4))


class Bottleneck(nnx.Module):
    """Three convolutions and a residual.

    The first block of a stage changes the channels. It also halves the map, except in stage 0.
    """

    def __init__(self, config: ClipResnetConfig, stage: int, first: bool, *, rngs: nnx.Rngs):
        width = config.widths[stage]
        inside = width if not first else config.widths[stage - 1] if stage else width // 4
        self.halves = first and stage > 0
        self.conv1 = convolution(inside, width // 4, 1, config, rngs)
        self.bn1 = FrozenBatchNorm(width // 4)
        self.conv2 = convolution(width // 4, width // 4, 3, config, rngs)
        self.bn2 = FrozenBatchNorm(width // 4)
        self.conv3 = convolution(width // 4, width, 1, config, rngs)
        self.bn3 = FrozenBatchNorm(width)
        self.downsample = (
            nnx.List([convolution(inside, width, 1, config, rngs), FrozenBatchNorm(width)])
            if first
            else None
        )

    def __call__(self, x: Float[Array, "b _ _ _"]) -> Float[Array, "b h w c"]:
        y = jax.nn.relu(self.bn1(self.conv1(x)))
        return self.join(x, jax.nn.relu(self.bn2(self.conv2(y))))

    def join(
        self, x: Float[Array, "b _ _ _"], y: Float[Array, "b _ _ _"]
    ) -> Float[Array, "b h w c"]:
        """The block's output from its input and what its second convolution gave."""
        x, y = (halve(x), halve(y)) if self.halves else (x, y)
        if self.downsample is not None:
            convolve, normalise = self.downsample
            x = normalise(convolve(x))
        return jax.nn.relu(x + self.bn3(self.conv3(y)))


class AttentionPool(nnx.Module):
    """The deepest map to an embedding: its mean asks, and all pixels and the mean itself answer."""

    def __init__(self, config: ClipResnetConfig, *, rngs: nnx.Rngs):
        c = config.widths[3]
        dtype = jnp.dtype(config.dtype)
        self.heads = c // 64
        init = nnx.initializers.normal(c**-0.5)
        self.positional_embedding = nnx.Param(init(rngs.params(), (1 + config.pool_grid**2, c)))
        self.q_proj = Linear(c, c, kernel_init=init, dtype=dtype, rngs=rngs)
        self.k_proj = Linear(c, c, kernel_init=init, dtype=dtype, rngs=rngs)
        self.v_proj = Linear(c, c, kernel_init=init, dtype=dtype, rngs=rngs)
        self.c_proj = Linear(c, config.embedding, kernel_init=init, dtype=dtype, rngs=rngs)

    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b e"]:
        b, h, w, c = x.shape
        x = x.reshape(b, h * w, c)
        x = jnp.concatenate([x.mean(1, keepdims=True), x], axis=1)
        x = x + spread(self.positions(h, w), x)
        q = self.q_proj(x[:, :1])
        k = self.k_proj(x)
        v = self.v_proj(x)
        q, k, v = (t.reshape(b, -1, self.heads, c // self.heads) for t in (q, k, v))
        return self.c_proj(jax.nn.dot_product_attention(q, k, v).reshape(b, c))

    def positions(self, rows: int, columns: int) -> Float[Array, "n c"]:
        """Learned positions, resized by `resizing.resize_positions`; the mean's is first."""
        positions = self.positional_embedding[...]
        side = round((len(positions) - 1) ** 0.5)
        if (rows, columns) == (side, side):
            return positions
        down, across = (
            jnp.asarray(resizing.cubic_matrix(side, n), jnp.float32) for n in (rows, columns)
        )
        square = positions[1:].reshape(side, side, -1)
        resized = jnp.einsum("iy,jx,yxc->ijc", down, across, square).reshape(rows * columns, -1)
        return jnp.concatenate([positions[:1], resized])


class ClipResnet(Encoder):
    """Image to features of the tapped stages."""

    config: ClipResnetConfig

    def __init__(self, config: ClipResnetConfig, *, rngs: nnx.Rngs):
        """Builds the encoder with random parameters; `jaxdg.backbones.create` loads weights.

        Raises:
            ValueError: drop path, of which these networks have none.
        """
        self.config = c = config
        if c.drop_path:
            raise ValueError(
                f"drop_path is {c.drop_path}, and CLIP's ResNets skip no branches; set it to 0"
            )
        stem = c.widths[0] // 4
        self.conv1 = convolution(3, stem // 2, 3, c, rngs, stride=2)
        self.bn1 = FrozenBatchNorm(stem // 2)
        self.conv2 = convolution(stem // 2, stem // 2, 3, c, rngs)
        self.bn2 = FrozenBatchNorm(stem // 2)
        self.conv3 = convolution(stem // 2, stem, 3, c, rngs)
        self.bn3 = FrozenBatchNorm(stem)
        for stage in range(c.used):

            def block(rngs, first, stage=stage):
                return Bottleneck(c, stage, first == 0, rngs=rngs)

            # The first block of a stage is of another shape than the others.
            stack = stacking.Stack(
                block,
                c.blocks[stage],
                (0, *c.ends(stage)),
                remat=c.remat,
                unroll=c.unroll,
                rngs=rngs,
            )
            setattr(self, f"layer{stage + 1}", stack)
        self.attnpool = AttentionPool(c, rngs=rngs) if c.used == c.depth else None

    def __call__(
        self, images: Float[Array | np.ndarray, "b h w 3"], key: Key[Array, ""] | None = None
    ) -> tuple[Float[Array, "b _ _ _"], ...]:
        """Features of the stages.

        Args:
            images: [b, h, w, 3] normalised with `config.mean` and `config.std`, of
                `config.image_size`.
            key: not used; nothing is drawn.

        Returns:
            One [b, h / stride, w / stride, c] for each tap, finest first; the first convolution
            rounds sides up, all pools round them down.
        """
        c = self.config
        self.check_size(images)
        x = jnp.asarray(images)
        for i in (1, 2, 3):
            x = jax.nn.relu(getattr(self, f"bn{i}")(getattr(self, f"conv{i}")(x)))
        x = halve(x)
        outputs = []
        for stage in range(c.used):
            x = getattr(self, f"layer{stage + 1}")(x, None)[c.blocks[stage] - 1]
            outputs.append(x)
        return tuple(outputs[tap] for tap in c.taps)

    def behind(self, unit: int) -> tuple[stacking.Stack, int]:
        """See `Encoder.behind`."""
        c = self.config
        if not 0 <= unit < c.used:
            raise ValueError(f"stage {unit} is not built; allowed: 0 to {c.used - 1}")
        return getattr(self, f"layer{unit + 1}"), c.blocks[unit] - 1

    def pool(self, features: Float[Array, "b h w c"]) -> Float[Array, "b e"]:
        """The embedding of a map of the last stage, or of regions of it, in the joint space.

        Args:
            features: [b, h, w, c] of any size; the pool's positions are resized to it.

        Returns:
            [b, e], not normalised.
        """
        return self._pool()(features)

    def pool_dense(self, features: Float[Array, "b h w c"]) -> Float[Array, "b h w e"]:
        """An embedding for every pixel, which attends only to itself, as in MaskCLIP.

        Follows Zhou et al. 2022; positions are not used.

        Args:
            features: [b, h, w, c] of the last stage.

        Returns:
            [b, h, w, e], not normalised.
        """
        pool = self._pool()
        return pool.c_proj(pool.v_proj(features))

    def _pool(self) -> AttentionPool:
        if self.attnpool is None:
            raise ValueError(
                "the attention pool reads the last stage, which this encoder with taps"
                f" {self.config.taps} does not have"
            )
        return self.attnpool

    def adapt(self, name: str, tensor: np.ndarray) -> np.ndarray | None:
        """See `Encoder.adapt`: drops stages past the last tap, and then the pool too."""
        stage = self.unit_of(name)
        if stage is None:
            return None if self.unused(name) and self.attnpool is None else tensor
        return None if stage >= self.config.used else tensor

    def unit_of(self, name: str) -> int | None:
        """See `Encoder.unit_of`."""
        found = re.match(r"layer(\d)\.", name)
        return int(found[1]) - 1 if found else None

    def unused(self, name: str) -> bool:
        """See `Encoder.unused`: the attention pool."""
        return name.startswith("attnpool.")
