"""The plain vision transformer (Dosovitskiy et al. 2021), trained by AugReg (Steiner et al. 2022).

It has pre-norm blocks, a class token, learned positions and exact GELU. Dense perception reads the
patch tokens after some blocks (`taps`) without the final norm, so this module has neither that norm
nor the classifier. Attribute names are timm's.
"""

from collections.abc import Callable
import dataclasses
import math
import re

from flax import nnx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key
import numpy as np

from jaxdg.backbones import attention, resizing, stacking
from jaxdg.backbones.encoder import Edit, Encoder, EncoderConfig, EncoderOptions
from jaxdg.backbones.layers import Conv, Linear, spread


@dataclasses.dataclass(frozen=True)
class VitConfig(EncoderConfig):
    """A plain vision transformer: `EncoderConfig` and its sizes.

    Rows and columns of an image that do not fill a patch are dropped at the bottom and right.

    Attributes:
        patch_size: side of a square patch in pixels.
        width: channels of a token.
        heads: attention heads; `width` must divide by it.
        patch_resize: one of `resizing.PATCH_RESIZES`, the method that resizes a stored kernel for
            patches of another size; None refuses such a kernel.
    """

    patch_size: int = 16
    width: int = 192
    heads: int = 3
    patch_resize: str | None = None

    def build(self, *, rngs: nnx.Rngs) -> "Vit":
        """See `EncoderConfig.build`."""
        return Vit(self, rngs=rngs)

    def configured(
        self, options: EncoderOptions, image_size: tuple[int, int], boundaries: tuple[int, ...]
    ) -> EncoderConfig:
        """See `EncoderConfig.configured`; takes a patch size."""
        size = options.patch_size
        resize = options.patch_resize
        options = dataclasses.replace(options, patch_size=None)
        config = super().configured(options, image_size, boundaries)
        if size is None:
            return config
        if size < 1 or resize not in resizing.PATCH_RESIZES:
            allowed = f"at least 1 pixel, and one of {' '.join(resizing.PATCH_RESIZES)}"
            raise ValueError(
                f"patch_size {size} and patch_resize {resize!r} of {options.encoder}; allowed:"
                f" {allowed}"
            )
        return dataclasses.replace(config, patch_size=size, patch_resize=resize)

    @property
    def prefix(self) -> int:
        """Tokens before those of the patches: the class token."""
        return 1

    @property
    def padding(self) -> int:
        """Tokens behind those of the patches that only fill up their number.

        In half precision a GPU would pad them for every attention and many products.
        """
        if jnp.dtype(self.dtype).itemsize != 2:
            return 0
        return -(self.prefix + self.grid[0] * self.grid[1]) % 8

    @property
    def strides(self) -> tuple[int, ...]:
        """See `EncoderConfig.strides`."""
        return (self.patch_size,) * len(self.taps)

    @property
    def channels(self) -> tuple[int, ...]:
        """See `EncoderConfig.channels`."""
        return (self.width,) * len(self.taps)

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of patch tokens."""
        return self.image_size[0] // self.patch_size, self.image_size[1] // self.patch_size

    @property
    def used(self) -> int:
        """Blocks that are built; those past the last tap feed nothing."""
        return self.taps[-1] + 1

    @property
    def ends(self) -> tuple[int, ...]:
        """Blocks after which stacked segments end."""
        return tuple(end for end in (*self.taps, *self.boundaries) if end < self.used)


class Attention(nnx.Module):
    """Multi-head self-attention with one fused projection."""

    def __init__(self, config: VitConfig, *, rngs: nnx.Rngs):
        c = config.width
        dtype = jnp.dtype(config.dtype)
        self.heads = config.heads
        self.padding = config.padding
        self.qkv = Linear(c, 3 * c, dtype=dtype, rngs=rngs)
        self.proj = Linear(c, c, dtype=dtype, rngs=rngs)

    def __call__(self, x: Float[Array, "b n c"]) -> Float[Array, "b n c"]:
        b, n, c = x.shape
        q, k, v = jnp.moveaxis(self.qkv(x).reshape(b, n, 3, self.heads, -1), 2, 0)
        return self.proj(attention.attention(q, k, v, padding=self.padding).reshape(b, n, c))

    def values(self, x: Float[Array, "b n c"]) -> Float[Array, "b n c"]:
        """The output if each token attended only to itself: its projected value."""
        return self.proj(jnp.split(self.qkv(x), 3, axis=-1)[2])


class Mlp(nnx.Module):
    """Two linear layers with GELU between."""

    def __init__(self, config: VitConfig, *, rngs: nnx.Rngs):
        c = config.width
        dtype = jnp.dtype(config.dtype)
        self.fc1 = Linear(c, 4 * c, dtype=dtype, rngs=rngs)
        self.fc2 = Linear(4 * c, c, dtype=dtype, rngs=rngs)

    def __call__(self, x: Float[Array, "b n c"]) -> Float[Array, "b n c"]:
        return self.fc2(jax.nn.gelu(self.fc1(x), approximate=False))


class Block(nnx.Module):
    """Attention and MLP, each behind a LayerNorm and a residual."""

    def __init__(self, config: VitConfig, *, rngs: nnx.Rngs):
        self.norm1 = nnx.LayerNorm(config.width, epsilon=1e-6, rngs=rngs)
        self.attn = Attention(config, rngs=rngs)
        self.norm2 = nnx.LayerNorm(config.width, epsilon=1e-6, rngs=rngs)
        self.mlp = Mlp(config, rngs=rngs)

    def __call__(
        self, x: Float[Array, "b n c"], keep: Float[Array, "2 b 1 1"]
    ) -> Float[Array, "b n c"]:
        """`keep` scales the two branches (drop path)."""
        x = x + keep[0].astype(x.dtype) * self.attn(self.norm1(x))
        return x + keep[1].astype(x.dtype) * self.mlp(self.norm2(x))


class PatchEmbed(nnx.Module):
    """Non-overlapping patches, each projected to a token."""

    def __init__(self, config: VitConfig, *, rngs: nnx.Rngs):
        patch = (config.patch_size, config.patch_size)
        self.proj = Conv(
            3,
            config.width,
            patch,
            strides=patch,
            padding="VALID",
            dtype=jnp.dtype(config.dtype),
            rngs=rngs,
        )

    def __call__(self, images: Float[Array, "b h w 3"]) -> Float[Array, "b n c"]:
        x = self.proj(images)
        return x.reshape(x.shape[0], -1, x.shape[-1])


class Vit(Encoder):
    """Image to features at the taps."""

    config: VitConfig

    def __init__(self, config: VitConfig, *, rngs: nnx.Rngs):
        """Builds the encoder with random parameters; `jaxdg.backbones.create` loads weights."""
        self.config = config
        rows, columns = config.grid
        init = nnx.initializers.normal(0.02)
        self.cls_token = nnx.Param(init(rngs.params(), (1, 1, config.width)))
        self.pos_embed = nnx.Param(init(rngs.params(), (1, 1 + rows * columns, config.width)))
        self.patch_embed = PatchEmbed(config, rngs=rngs)
        self.blocks = stacking.Stack(
            lambda rngs, _: Block(config, rngs=rngs),
            config.used,
            config.ends,
            remat=config.remat,
            unroll=config.unroll,
            rngs=rngs,
        )

    def __call__(
        self, images: Float[Array | np.ndarray, "b h w 3"], key: Key[Array, ""] | None = None
    ) -> tuple[Float[Array, "b gh gw c"], ...]:
        """Features of the patch tokens.

        Args:
            images: [b, h, w, 3] normalised with `config.mean` and `config.std`, of
                `config.image_size`.
            key: random key that turns drop path on (training).

        Returns:
            One [b, h / p, w / p, c] for each tap, shallow to deep.
        """
        return self.maps(self.tokens(images, key))

    def maps(
        self, tokens: tuple[Float[Array, "b n c"], ...]
    ) -> tuple[Float[Array, "b gh gw c"], ...]:
        """The patches of `tokens` as maps."""
        rows, columns = self.config.grid
        prefix = self.config.prefix
        return tuple(t[:, prefix:].reshape(t.shape[0], rows, columns, -1) for t in tokens)

    def tokens(
        self, images: Float[Array | np.ndarray, "b h w 3"], key: Key[Array, ""] | None = None
    ) -> tuple[Float[Array, "b n c"], ...]:
        """All tokens at the taps, [b, prefix + rows * columns, c] each; the prefix comes first."""
        c = self.config
        self.check_size(images)
        x = self.embed(images)
        n = x.shape[1]
        x = jnp.pad(x, ((0, 0), (0, c.padding), (0, 0)))
        keep = stacking.drop_path_scales(key, c.drop_path, c.depth, x.shape[0])[: c.used]
        outputs = self.blocks(x, keep)
        return tuple(outputs[tap][:, :n] for tap in c.taps)

    def embed(self, images: Float[Array | np.ndarray, "b h w 3"]) -> Float[Array, "b n c"]:
        """The tokens that enter the first block: class token and patches, with their positions."""
        x = self.patch_embed(jnp.asarray(images))
        cls = jnp.broadcast_to(self.cls_token[...], (x.shape[0], 1, self.config.width))
        tokens = jnp.concatenate([cls.astype(x.dtype), x], axis=1)
        return tokens + spread(self.pos_embed[...], tokens)

    def behind(self, unit: int) -> tuple[stacking.Stack, int]:
        """See `Encoder.behind`."""
        if not 0 <= unit < self.config.used:
            raise ValueError(f"block {unit} is not built; allowed: 0 to {self.config.used - 1}")
        return self.blocks, unit

    def of_map(self, edit: Edit) -> Callable[[Array], Array]:
        """See `Encoder.of_map`: class token and padding stay."""
        first = self.config.prefix
        last = first + math.prod(self.config.grid)

        def change(x: Float[Array, "b n c"]) -> Float[Array, "b n c"]:
            patches = edit(self.map_of(x)).reshape(x.shape[0], -1, x.shape[-1])
            return jnp.concatenate([x[:, :first], patches, x[:, last:]], axis=1)

        return change

    def map_of(self, x: Float[Array, "b n c"]) -> Float[Array, "b gh gw c"]:
        """See `Encoder.map_of`."""
        (found,) = self.maps((x[:, : self.config.prefix + math.prod(self.config.grid)],))
        return found

    def adapt(self, name: str, tensor: np.ndarray) -> np.ndarray | None:
        """See `Encoder.adapt`: resizes positions and patches, drops blocks past the last tap."""
        c = self.config
        if name == "pos_embed":
            return resizing.resize_positions(tensor, c.grid, prefix=c.prefix)
        other_size = tensor.ndim == 4 and tensor.shape[0] != c.patch_size
        if name == "patch_embed.proj.kernel" and other_size and c.patch_resize is not None:
            return resizing.resize_patch(tensor, c.patch_size, c.patch_resize)
        block = self.unit_of(name)
        return None if block is not None and block > c.taps[-1] else tensor

    def unit_of(self, name: str) -> int | None:
        """See `Encoder.unit_of`."""
        found = re.match(r"blocks\.(\d+)\.", name)
        return int(found[1]) if found else None
