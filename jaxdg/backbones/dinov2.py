"""DINOv2 (Oquab et al. 2024), also with registers (Darcet et al. 2024).

A plain vision transformer with LayerScale as in DeiT-III. Registers are tokens beside the class
token that no loss reads. The class token and the patches have positions, registers have none.
Attribute names are those of facebookresearch/dinov2.

The positions were trained for 37x37 patches. The original code resizes them in two ways, on which
features depend, so this module has both. Without registers it interpolates bicubically with the
scale of 0.1 patches more than there are; this was meant against rounding and reads the positions a
little up and to the left. With registers it interpolates bicubically with antialiasing.

The largest model, ViT-g, has a gated MLP. It is here for planning; its checkpoint is not converted.
"""

import dataclasses
from functools import partial

from flax import nnx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float
import numpy as np

from jaxdg.backbones import resizing, stacking
from jaxdg.backbones.deit3 import Block
from jaxdg.backbones.layers import Linear
from jaxdg.backbones.vit import PatchEmbed, Vit, VitConfig

INITIAL_SCALE = 1e-5


@dataclasses.dataclass(frozen=True)
class Dinov2Config(VitConfig):
    """A DINOv2 encoder; fields of `VitConfig`, and one more.

    Attributes:
        registers: tokens beside the class token; the published encoders have none or 4.
    """

    registers: int = 0

    def build(self, *, rngs: nnx.Rngs) -> "Dinov2":
        """See `EncoderConfig.build`."""
        return Dinov2(self, rngs=rngs)

    @property
    def prefix(self) -> int:
        """Tokens before those of the patches: the class token and the registers."""
        return 1 + self.registers


@dataclasses.dataclass(frozen=True)
class Dinov2GiantConfig(Dinov2Config):
    """The largest DINOv2 encoder; fields of `Dinov2Config`."""


class SwiGlu(nnx.Module):
    """The gated MLP `w3(silu(a) * b)`, where a and b are the halves of `w12 x`.

    It is two thirds as wide as a plain MLP, rounded to a multiple of 8.
    """

    def __init__(self, config: Dinov2Config, *, rngs: nnx.Rngs):
        c = config.width
        dtype = jnp.dtype(config.dtype)
        hidden = -(-int(4 * c * 2 / 3) // 8) * 8
        self.w12 = Linear(c, 2 * hidden, dtype=dtype, rngs=rngs)
        self.w3 = Linear(hidden, c, dtype=dtype, rngs=rngs)

    def __call__(self, x: Float[Array, "b n c"]) -> Float[Array, "b n c"]:
        gate, value = jnp.split(self.w12(x), 2, axis=-1)
        return self.w3(jax.nn.silu(gate) * value)


class GatedBlock(Block):
    """`Block` with the gated MLP."""

    def __init__(self, config: Dinov2Config, initial_scale: float, *, rngs: nnx.Rngs):
        super().__init__(config, initial_scale, rngs=rngs)
        self.mlp = SwiGlu(config, rngs=rngs)


class Dinov2(Vit):
    """Image to features at the taps; called as `Vit` is."""

    config: Dinov2Config

    def __init__(self, config: Dinov2Config, *, rngs: nnx.Rngs):
        """Builds the encoder with random parameters; `jaxdg.backbones.create` loads weights."""
        self.config = config
        rows, columns = config.grid
        small = nnx.initializers.truncated_normal(0.02)
        tiny = nnx.initializers.normal(1e-6)
        self.cls_token = nnx.Param(tiny(rngs.params(), (1, 1, config.width)))
        self.register_tokens = (
            nnx.Param(tiny(rngs.params(), (1, config.registers, config.width)))
            if config.registers
            else None
        )
        self.pos_embed = nnx.Param(small(rngs.params(), (1, 1 + rows * columns, config.width)))
        self.patch_embed = PatchEmbed(config, rngs=rngs)
        block = GatedBlock if isinstance(config, Dinov2GiantConfig) else Block

        def make_block(rngs, _):
            return block(config, INITIAL_SCALE, rngs=rngs)

        self.blocks = stacking.Stack(
            make_block,
            config.used,
            config.ends,
            remat=config.remat,
            unroll=config.unroll,
            rngs=rngs,
        )

    def embed(self, images: Float[Array | np.ndarray, "b h w 3"]) -> Float[Array, "b n c"]:
        """The input of the first block: class token, registers (without positions), patches."""
        x = super().embed(images)
        if self.register_tokens is None:
            return x
        registers = jnp.broadcast_to(
            self.register_tokens[...], (x.shape[0], self.config.registers, self.config.width)
        )
        return jnp.concatenate([x[:, :1], registers.astype(x.dtype), x[:, 1:]], axis=1)

    def adapt(self, name: str, tensor: np.ndarray) -> np.ndarray | None:
        """As `Vit.adapt`, but positions are resized in DINOv2's two ways."""
        if name != "pos_embed":
            return super().adapt(name, tensor)
        matrix = (
            antialiased_matrix
            if self.config.registers
            else partial(resizing.cubic_matrix, offset=0.1)
        )
        return resizing.resize_positions(tensor, self.config.grid, prefix=1, matrix=matrix)


def antialiased_matrix(source: int, target: int) -> np.ndarray:
    """Weights [target, source] of torch's antialiased bicubic interpolation (a = -0.5).

    If the axis shrinks, the kernel widens by the same factor. Weights beyond the edges are dropped,
    and rows still sum to 1.
    """
    a = -0.5
    scale = source / target
    centre = (np.arange(target)[:, None] + 0.5) * scale
    t = np.abs(np.arange(source) + 0.5 - centre) / max(scale, 1.0)
    near = ((a + 2) * t - (a + 3)) * t * t + 1
    far = ((a * t - 5 * a) * t + 8 * a) * t - 4 * a
    matrix = np.where(t < 1, near, np.where(t < 2, far, 0.0))
    return matrix / matrix.sum(axis=1, keepdims=True)
