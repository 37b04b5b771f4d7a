"""CLIP's text towers: class names to embeddings in the joint space with images.

Follows Radford et al. 2021, and Sun et al. 2023 for EVA-02-CLIP. The transformer is like the image
tower's, but a token attends only to itself and earlier tokens; the end token gives the embedding. A
file also holds CLIP's temperature and the projection of the image tower's tokens into the joint
space, which encoders of dense features do not need. (In ResNets this is the attention pool, which
the encoder keeps.) OpenAI's towers compute QuickGELU; EVA-02-CLIP's and most of open_clip's compute
GELU. Attribute names are OpenAI's, in blocks the image tower's.
"""

from collections.abc import Sequence
import dataclasses
from pathlib import Path
from typing import Literal

from flax import nnx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32, Int32
import numpy as np

from jaxdg import weights as weights_io
from jaxdg.backbones import clip_vit, stacking
from jaxdg.backbones.vit import Attention
from jaxdg.text import tokenizer
from jaxdg.tracing import Rngs

TEMPLATES = ("a photo of a {}.",)


@dataclasses.dataclass(frozen=True)
class ProjectionConfig:
    """The projection of an image tower's tokens into the joint space.

    Attributes:
        width: channels of a token.
        embedding: channels of the joint space.
        epsilon: of the LayerNorm before the linear layer.
        bias: of the linear layer.
    """

    width: int
    embedding: int
    epsilon: float = 1e-5
    bias: bool = False


@dataclasses.dataclass(frozen=True)
class ClipTextConfig:
    """A text tower.

    Attributes:
        width: channels of a token.
        heads: attention heads; `width` must divide by it.
        embedding: channels of the joint space.
        activation: of the MLPs, "quick_gelu" or "gelu"; belongs to the weights.
        image_projection: of the image tower beside it; None for ResNets.
        depth: number of blocks.
    """

    width: int
    heads: int
    embedding: int
    activation: Literal["quick_gelu", "gelu"]
    image_projection: ProjectionConfig | None
    depth: int = 12


def _base(
    activation: Literal["quick_gelu", "gelu"], epsilon: float = 1e-5, bias: bool = False
) -> ClipTextConfig:
    return ClipTextConfig(512, 8, 512, activation, ProjectionConfig(768, 512, epsilon, bias))


def _large(
    activation: Literal["quick_gelu", "gelu"], epsilon: float = 1e-5, bias: bool = False
) -> ClipTextConfig:
    return ClipTextConfig(768, 12, 768, activation, ProjectionConfig(1024, 768, epsilon, bias))


# Each is named after its image tower in the zoo and is converted from the same file.
TEXT_TOWERS: dict[str, ClipTextConfig] = {
    "clip_l14_text": _large("quick_gelu"),
    "clip_b16_text": _base("quick_gelu"),
    "clip_l14_gelu_text": _large("gelu"),
    "clip_b16_gelu_text": _base("gelu"),
    "clip_rn50_text": ClipTextConfig(512, 8, 1024, "quick_gelu", None),
    "clip_rn101_text": ClipTextConfig(512, 8, 512, "quick_gelu", None),
    "eva02_clip_l14_text": _large("gelu", 1e-6, bias=True),
    "eva02_clip_l14_336_text": _large("gelu", 1e-6, bias=True),
    "eva02_clip_b16_text": _base("gelu", 1e-6, bias=True),
}


class CausalAttention(Attention):
    """Multi-head attention of a token to itself and those before it."""

    def __call__(self, x: Float[Array, "b n c"]) -> Float[Array, "b n c"]:
        b, n, c = x.shape
        q, k, v = jnp.moveaxis(self.qkv(x).reshape(b, n, 3, self.heads, -1), 2, 0)
        return self.proj(jax.nn.dot_product_attention(q, k, v, is_causal=True).reshape(b, n, c))


class Block(clip_vit.Block):
    """A block of the image tower with causal attention."""

    def __init__(self, config: ClipTextConfig, *, rngs: nnx.Rngs):
        sizes = clip_vit.ClipVitConfig(
            width=config.width, heads=config.heads, activation=config.activation
        )
        super().__init__(sizes, rngs=rngs)
        self.attn = CausalAttention(sizes, rngs=rngs)


class Projection(nnx.Module):
    """LayerNorm and linear layer into the joint space."""

    def __init__(self, config: ProjectionConfig, *, rngs: nnx.Rngs):
        self.norm = nnx.LayerNorm(config.width, epsilon=config.epsilon, rngs=rngs)
        self.proj = nnx.Linear(config.width, config.embedding, use_bias=config.bias, rngs=rngs)

    def __call__(self, x: Float[Array, "*b c"]) -> Float[Array, "*b e"]:
        return self.proj(self.norm(x))


class TokenTransformer(nnx.Module):
    """Embedded tokens to their states after the last block; all in float32."""

    def __init__(self, config: ClipTextConfig, length: int, *, rngs: nnx.Rngs):
        """Builds the transformer with random parameters.

        Args:
            config: of the tower.
            length: tokens of the longest text.
            rngs: initialises the parameters.
        """
        self.config = c = config
        init = nnx.initializers.normal(0.01)
        self.positional_embedding = nnx.Param(init(rngs.params(), (length, c.width)))
        self.blocks = stacking.Stack(
            lambda rngs, _: Block(c, rngs=rngs), c.depth, (), remat=False, rngs=rngs
        )
        self.ln_final = nnx.LayerNorm(c.width, epsilon=clip_vit.EPSILON, rngs=rngs)

    def states(self, tokens: Float[Array, "b n c"]) -> Float[Array, "b n c"]:
        """The states of tokens, before `ln_final`.

        Args:
            tokens: embedded, without positions.
        """
        x = tokens + self.positional_embedding[: tokens.shape[1]]
        keep = stacking.drop_path_scales(None, 0.0, self.config.depth, len(x))
        return self.blocks(x, keep)[self.config.depth - 1]


class TextTransformer(TokenTransformer):
    """Embedded tokens to embeddings of texts; all in float32."""

    def __init__(self, config: ClipTextConfig, length: int, *, rngs: nnx.Rngs):
        """Builds the transformer with random parameters; see `TokenTransformer`."""
        super().__init__(config, length, rngs=rngs)
        c = config
        init = nnx.initializers.normal(c.width**-0.5)
        self.text_projection = nnx.Param(init(rngs.params(), (c.width, c.embedding)))

    def encode(
        self, tokens: Float[Array, "b n c"], end: Int32[Array | np.ndarray, " b"]
    ) -> Float[Array, "b e"]:
        """Embeddings of texts, not normalised.

        Args:
            tokens: embedded, without positions.
            end: where each text's end token is.
        """
        x = self.states(tokens)
        return self.ln_final(x[jnp.arange(len(x)), end]) @ self.text_projection[...]


class ClipText(TextTransformer):
    """Token ids to embeddings, with the image tower's projection; all in float32."""

    def __init__(self, config: ClipTextConfig, *, rngs: nnx.Rngs):
        """Builds the tower with random parameters; see `load_text_tower` for one with weights."""
        init = nnx.initializers.normal
        self.token_embedding = nnx.Param(
            init(0.02)(rngs.params(), (tokenizer.VOCABULARY, config.width))
        )
        super().__init__(config, tokenizer.LENGTH, rngs=rngs)
        self.logit_scale = nnx.Param(jnp.log(1 / 0.07))
        projection = config.image_projection
        self.image_projection = None if projection is None else Projection(projection, rngs=rngs)

    def __call__(self, ids: Int32[Array, "b n"]) -> Float[Array, "b e"]:
        """Embeddings of texts, not normalised.

        Args:
            ids: of `tokenizer.tokenize`.
        """
        # The end token has the highest id.
        return self.encode(self.token_embedding[...][ids], jnp.argmax(ids, axis=1))

    def embeddings(
        self, names: Sequence[str], templates: Sequence[str] = TEMPLATES, unit: bool = True
    ) -> Float32[np.ndarray, "k e"]:
        """See `text_embeddings`; without `unit` the embeddings are averaged as they are."""
        if not names or not templates:
            raise ValueError("text_embeddings needs at least one name and one template")
        for template in templates:
            if "{}" not in template:
                raise ValueError(f"the template {template!r} has no {{}}, where the name goes")
        graph, state = nnx.split(self)

        @jax.jit
        def embed(state: nnx.State, ids: Int32[Array, "b n"]) -> Float[Array, "b e"]:
            found = nnx.merge(graph, state)(ids)
            return normalize(found) if unit else found

        rows = [
            embed(state, tokenizer.tokenize([template.replace("{}", name) for name in names]))
            for template in templates
        ]
        mean = np.mean([np.asarray(row) for row in rows], axis=0)
        return mean / np.linalg.norm(mean, axis=-1, keepdims=True)


def normalize(x: Float[Array, "*b c"]) -> Float[Array, "*b c"]:
    """Vectors of length 1."""
    return x / jnp.maximum(jnp.linalg.norm(x, axis=-1, keepdims=True), 1e-12)


def load_text_tower(weights: str | Path) -> ClipText:
    """The text tower of a converted file; its metadata names the tower.

    Args:
        weights: made by `conversion/torch_to_flax.py` with a `--model` of `TEXT_TOWERS`.

    Raises:
        FileNotFoundError: no such file.
        ValueError: it holds no text tower, or does not fit it; all offenders are named.
    """
    name = weights_io.metadata(weights).get("model", "nothing it tells the name of")
    if name not in TEXT_TOWERS:
        raise ValueError(
            f"{weights} holds {name}, no text tower; convert one with --model"
            f" {', '.join(TEXT_TOWERS)}"
        )
    tower = nnx.eval_shape(lambda: ClipText(TEXT_TOWERS[name], rngs=Rngs(0)))
    weights_io.load(tower, weights)
    return tower


def text_embeddings(
    names: Sequence[str], weights: str | Path, templates: Sequence[str] = TEMPLATES
) -> Float32[np.ndarray, "k e"]:
    """Embeddings of class names, as in CLIP's zero-shot classifier.

    Args:
        names: one for each class, such as "traffic light".
        weights: a converted text tower, such as that of `--model clip_l14_text`.
        templates: sentences with {} in place of the name. Their embeddings, normalised to length 1,
            are averaged.

    Returns:
        [k, e], every row of length 1.

    Raises:
        FileNotFoundError: no such file.
        ValueError: the file holds no text tower or does not fit it, no names, or a template without
            {}.
    """
    return load_text_tower(weights).embeddings(names, templates)
