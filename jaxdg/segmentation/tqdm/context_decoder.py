"""The context decoder of tqdm, which is DenseCLIP's (Rao et al. 2022): texts look at the image.

Each layer is self-attention among the texts, attention to the image's tokens, and an MLP, each
behind a LayerNorm and with a residual. Attribute names are the authors'. All is float32, as it is
small beside the towers.
"""

from functools import partial

from flax import nnx
import jax
from jaxtyping import Array, Float, Key

from jaxdg.backbones.attention import attention
from jaxdg.backbones.layers import dropout
from jaxdg.segmentation.mask2former.layers import layer_norm

DROPOUT = 0.1  # after each attention, and inside and after the MLP
RATIO = 4  # of the MLP's inner width to the texts'
_start = nnx.initializers.normal(0.02)


class Attention(nnx.Module):
    """Multi-head attention; queries, keys and values have no bias."""

    def __init__(self, width: int, heads: int, *, rngs: nnx.Rngs):
        linear = partial(nnx.Linear, width, width, kernel_init=_start, rngs=rngs)
        self.heads = heads
        self.q_proj, self.k_proj, self.v_proj = (linear(use_bias=False) for _ in range(3))
        self.proj = linear()

    def __call__(
        self, queries: Float[Array, "b q c"], memory: Float[Array, "b n c"]
    ) -> Float[Array, "b q c"]:
        q, k, v = self.q_proj(queries), self.k_proj(memory), self.v_proj(memory)
        q, k, v = (x.reshape(*x.shape[:2], self.heads, -1) for x in (q, k, v))
        return self.proj(attention(q, k, v).reshape(queries.shape))


class Layer(nnx.Module):
    """Self-attention, attention to the image and MLP, each with a residual."""

    def __init__(self, width: int, heads: int, *, rngs: nnx.Rngs):
        linear = partial(nnx.Linear, kernel_init=_start, rngs=rngs)
        self.self_attn = Attention(width, heads, rngs=rngs)
        self.cross_attn = Attention(width, heads, rngs=rngs)
        self.norm1, self.norm2, self.norm3 = (layer_norm(width, "float32", rngs) for _ in range(3))
        self.mlp = nnx.List([linear(width, RATIO * width), linear(RATIO * width, width)])

    def __call__(
        self,
        x: Float[Array, "b q c"],
        memory: Float[Array, "b n c"],
        key: Key[Array, ""] | None = None,
    ) -> Float[Array, "b q c"]:
        """The texts after the layer; a `key` turns dropout on."""
        keys = [None] * 4 if key is None else list(jax.random.split(key, 4))
        y = self.norm1(x)
        x = x + dropout(self.self_attn(y, y), keys[0], DROPOUT)
        x = x + dropout(self.cross_attn(self.norm2(x), memory), keys[1], DROPOUT)
        widen, narrow = self.mlp
        y = dropout(jax.nn.gelu(widen(self.norm3(x)), approximate=False), keys[2], DROPOUT)
        return x + dropout(narrow(y), keys[3], DROPOUT)


class ContextDecoder(nnx.Module):
    """Texts and an image's tokens, all in the joint space, to a change of the texts."""

    def __init__(self, embedding: int, width: int, heads: int, layers: int, *, rngs: nnx.Rngs):
        """Builds the decoder with random parameters.

        Args:
            embedding: e, channels of the joint space.
            width: channels of a text inside; `heads` must divide it.
            heads: of all attention.
            layers: their number.
            rngs: initialises the parameters.
        """

        def norm(channels):
            return layer_norm(channels, "float32", rngs)

        def linear(inputs, outputs):
            return nnx.Linear(inputs, outputs, kernel_init=_start, rngs=rngs)

        e = embedding
        self.memory_proj = nnx.List([norm(e), linear(e, width), norm(width)])
        self.text_proj = nnx.List([norm(e), linear(e, width)])
        self.decoder = nnx.List([Layer(width, heads, rngs=rngs) for _ in range(layers)])
        self.out_proj = nnx.List([norm(width), linear(width, e)])

    def __call__(
        self,
        texts: Float[Array, "b k e"],
        image: Float[Array, "b n e"],
        key: Key[Array, ""] | None = None,
    ) -> Float[Array, "b k e"]:
        """The change of each text; a `key` turns dropout on."""
        memory = image
        for module in self.memory_proj:
            memory = module(memory)
        x = texts
        for module in self.text_proj:
            x = module(x)
        for i, layer in enumerate(self.decoder):
            x = layer(x, memory, None if key is None else jax.random.fold_in(key, i))
        for module in self.out_proj:
            x = module(x)
        return x
