"""The image encoder of Segment Anything (Kirillov et al. 2023), a ViTDet (Li et al. 2022).

Most blocks attend within windows of 14x14 tokens, a few over the whole map. Both add relative
positions to the attention, separate for rows and columns. There is no class token. Attribute names
are those of facebookresearch/segment-anything.

Features are read from the blocks. The neck (two convolutions to 256 channels for SAM's own mask
decoder) is left out. The original always runs at 1024x1024 and never resizes its absolute
positions; here plain bicubic interpolation resizes them, as in other families. Relative positions
are interpolated linearly, as in the original code.
"""

import dataclasses

from flax import nnx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float
import numpy as np

from jaxdg.backbones import attention, resizing, stacking, vit
from jaxdg.backbones.layers import spread
from jaxdg.backbones.vit import Mlp, PatchEmbed, Vit, VitConfig


@dataclasses.dataclass(frozen=True)
class SamConfig(VitConfig):
    """A SAM image encoder; fields of `VitConfig`, and where its blocks look.

    Attributes:
        global_blocks: blocks that attend over the whole image, from 0; the others stay within
            windows.
        window: rows and columns of tokens in a window.
    """

    global_blocks: tuple[int, ...] = (2, 5, 8, 11)
    window: int = 14

    def build(self, *, rngs: nnx.Rngs) -> "Sam":
        """See `EncoderConfig.build`."""
        return Sam(self, rngs=rngs)

    @property
    def prefix(self) -> int:
        """Tokens before those of the patches: none."""
        return 0

    @property
    def padding(self) -> int:
        """See `VitConfig.padding`; windows cut the tokens otherwise."""
        return 0

    @property
    def ends(self) -> tuple[int, ...]:
        """Blocks after which segments end: taps, boundaries, and each change of the window."""
        changes = (end for block in self.global_blocks for end in (block - 1, block))
        return (*super().ends, *(end for end in changes if 0 <= end < self.used))


class Attention(vit.Attention):
    """Self-attention over a map of tokens, with relative positions of rows and columns (MViTv2)."""

    def __init__(self, config: SamConfig, grid: tuple[int, int], *, rngs: nnx.Rngs):
        super().__init__(config, rngs=rngs)
        rows, columns = self.grid = grid
        self.rel_pos_h = nnx.Param(jnp.zeros((2 * rows - 1, config.width // config.heads)))
        self.rel_pos_w = nnx.Param(jnp.zeros((2 * columns - 1, config.width // config.heads)))

    def __call__(self, x: Float[Array, "b n c"]) -> Float[Array, "b n c"]:
        b, n, c = x.shape
        q, k, v = jnp.moveaxis(self.qkv(x).reshape(b, n, 3, self.heads, -1), 2, 0)
        return self.proj(jax.nn.dot_product_attention(q, k, v, self.bias(q)).reshape(b, n, c))

    def bias(self, q: Float[Array, "b n heads d"]) -> Float[Array, "b heads n n"]:
        """The logits of relative positions: each query times the vectors of its distances."""
        b, n, heads, d = q.shape
        q = q.astype(jnp.float32).reshape(b, *self.grid, heads, d)
        rows, columns = (
            table[...][distances(side)]
            for table, side in zip((self.rel_pos_h, self.rel_pos_w), self.grid, strict=True)
        )
        down = jnp.einsum("byxnd,ykd->bnyxk", q, rows)
        across = jnp.einsum("byxnd,xkd->bnyxk", q, columns)
        return (down[..., :, None] + across[..., None, :]).reshape(b, heads, n, n)


class WindowAttention(Attention):
    """The same within windows.

    Those that stick out at the bottom and right are filled with zeros, to which the others attend
    as well.
    """

    def __init__(self, config: SamConfig, *, rngs: nnx.Rngs):
        super().__init__(config, (config.window, config.window), rngs=rngs)
        self.image = config.grid

    def __call__(self, x: Float[Array, "b n c"]) -> Float[Array, "b n c"]:
        maps = x.reshape(x.shape[0], *self.image, -1)
        return attention.from_windows(
            super().__call__(attention.to_windows(maps, self.grid[0])), self.image, self.grid[0]
        ).reshape(x.shape)


def distances(side: int) -> np.ndarray:
    """Indices [side, side] into a table of relative positions, for each query and key."""
    return np.arange(side)[:, None] - np.arange(side) + side - 1


class Block(vit.Block):
    """Attention, global or in windows, and MLP, each with a LayerNorm before and a residual."""

    def __init__(self, config: SamConfig, everywhere: bool, *, rngs: nnx.Rngs):
        self.norm1 = nnx.LayerNorm(config.width, epsilon=1e-6, rngs=rngs)
        self.attn = (
            Attention(config, config.grid, rngs=rngs)
            if everywhere
            else WindowAttention(config, rngs=rngs)
        )
        self.norm2 = nnx.LayerNorm(config.width, epsilon=1e-6, rngs=rngs)
        self.mlp = Mlp(config, rngs=rngs)


class Sam(Vit):
    """Image to features at the taps; called as `Vit` is."""

    config: SamConfig

    def __init__(self, config: SamConfig, *, rngs: nnx.Rngs):
        """Builds the encoder with random parameters; `jaxdg.backbones.create` loads weights."""
        self.config = config
        self.pos_embed = nnx.Param(
            nnx.initializers.normal(0.02)(rngs.params(), (1, *config.grid, config.width))
        )
        self.patch_embed = PatchEmbed(config, rngs=rngs)

        def make(rngs, first):
            return Block(config, first in config.global_blocks, rngs=rngs)

        self.blocks = stacking.Stack(
            make, config.used, config.ends, remat=config.remat, unroll=config.unroll, rngs=rngs
        )

    def embed(self, images: Float[Array | np.ndarray, "b h w 3"]) -> Float[Array, "b n c"]:
        """The tokens that enter the first block: patches with their positions."""
        x = self.patch_embed(jnp.asarray(images))
        return x + spread(self.pos_embed[...].reshape(1, *x.shape[1:]), x)

    def adapt(self, name: str, tensor: np.ndarray) -> np.ndarray | None:
        """See `Vit.adapt`; also resizes relative positions of global blocks."""
        rows, columns = self.config.grid
        if name == "pos_embed":
            if tensor.ndim != 4 or not tensor.size:
                return tensor  # told as of another shape, like the table below
            matrices = (
                resizing.cubic_matrix(source, target)
                for source, target in zip(tensor.shape[1:3], (rows, columns), strict=True)
            )
            return np.einsum("iy,jx,byxc->bijc", *matrices, tensor, optimize=True).astype(
                np.float32
            )
        fitted = super().adapt(name, tensor)
        if (
            fitted is None
            or not name.endswith((".rel_pos_h", ".rel_pos_w"))
            or int(name.split(".")[1]) not in self.config.global_blocks
        ):
            return fitted
        if fitted.ndim != 2 or len(fitted) % 2 == 0:
            return fitted  # n tokens in a row have 2 n - 1 distances
        return resize_distances(fitted, 2 * (rows if name.endswith("_h") else columns) - 1)


def resize_distances(table: np.ndarray, length: int) -> np.ndarray:
    """Resizes a table of relative positions as torch's `F.interpolate(mode="linear")`.

    Args:
        table: [2 n - 1, d], from the farthest key below a query to the farthest above it.
        length: rows wanted.

    Returns:
        [length, d], float32.
    """
    # Places in float32, as torch has them: the difference to exact ones would show.
    at = ((np.arange(length, dtype=np.float32) + 0.5) * np.float32(len(table) / length) - 0.5).clip(
        0, len(table) - 1
    )
    below = np.floor(at).astype(int)
    above = np.minimum(below + 1, len(table) - 1)
    part = (at - below)[:, None]
    return ((1 - part) * table[below] + part * table[above]).astype(np.float32)
