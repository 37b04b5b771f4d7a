"""Finds edits of features against a frozen encoder; `edits` says what they are, and what for.

An embedding is a point of unit length: of a CLIP ResNet what its attention pool gives, of a CLIP
ViT its projected class token. Other encoders have no space that they share with texts. There the
embedding is the mean of the last block's patches after a LayerNorm without parameters, and targets
are embeddings of pictures.

Offsets A, one a prompt and the same for all images, minimise over random crops x

    mean(1 - cos(z_A, z + d)) + pull * mean |z_A - z|,   d = unit(t - t_source),

where z and z_A are the embeddings of x and of x with the map edited, and t those of prompts.
Statistics, a pair a prompt and image, start as the image's own and minimise 1 - cos(z_styled, t).
"""

from collections.abc import Sequence
from typing import Any

from flax import nnx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32
import numpy as np
import optax

from jaxdg import backbones
from jaxdg.backbones import ClipResnet, Edit, Encoder, Vit
from jaxdg.backbones.resizing import adaptive_pool
from jaxdg.methods.edits import EditsOptions, MiningOptions, own_statistics, restyled
from jaxdg.text.clip_text import load_text_tower, normalize

DIVISOR = 16.0  # of losses: images of PODA's batch, and CLIP the Gap's prompts with the source
DECAY = 1e-4
MOMENTUM = 0.9


class Tower(nnx.Module):
    """A frozen encoder in two parts, before and behind the place of edits.

    Attributes:
        kind: what its embedding is, in words.
    """

    def __init__(self, backbone: Encoder, place: int, projection: Any = None):
        """Args:
        backbone: whose last block or stage is tapped, and the place.
        place: block or stage, from 0.
        projection: of the class token into the joint space; None: there is none.
        """
        self.backbone = backbone
        self.place = place
        self.projection = projection
        self.kind = "mean of the last block's patches, standardised"
        if isinstance(backbone, ClipResnet):
            self.kind = "attention pool"
        elif projection is not None:
            self.kind = "projected class token"

    def held(self, images: Float[Array, "b h w 3"]) -> Float[Array, "b ..."]:
        """What the part behind the place reads: a map, or all tokens; images are normalised."""
        found = []
        backbone = self._fresh()
        with backbone.door(self.place, lambda x: found.append(x) or x):
            backbone(images)
        return found[0]

    def embed(self, held: Float[Array, "b ..."], edit: Edit = lambda x: x) -> Float[Array, "b e"]:
        """The embedding of what `held` returned, edited; of unit length.

        The part before the place runs on nothing and is not used, so the compiler removes it.
        """
        backbone = self._fresh()
        nothing = jnp.zeros((len(held), *backbone.config.image_size, 3))
        change = backbone.of_map(edit)
        with backbone.door(self.place, lambda _: change(held)):
            if isinstance(backbone, ClipResnet):
                found = backbone.pool(backbone(nothing)[-1])
            elif self.projection is not None:
                assert isinstance(backbone, Vit)
                found = self.projection(backbone.tokens(nothing)[-1][:, 0])
            else:
                mean = backbone(nothing)[-1].astype(jnp.float32).mean((1, 2))
                found = jax.nn.standardize(mean, epsilon=1e-6)
        return normalize(found.astype(jnp.float32))

    def _fresh(self) -> Encoder:
        """The encoder as a new object, which a door may change inside loops and gradients."""
        return nnx.merge(*nnx.split(self.backbone))


def load_tower(
    encoder: str, weights: str, options: EditsOptions, text_weights: str | None
) -> Tower:
    """The frozen encoder that edits are mined with.

    Args:
        encoder: name in the zoo.
        weights: its converted file.
        options: place, size of crops, and what guides.
        text_weights: converted text tower; not read if pictures guide.

    Raises:
        FileNotFoundError: no such file.
        ValueError: a file that does not fit.
    """
    depth = backbones.entry(encoder).config.depth
    side = options.mining.size
    taps = tuple(sorted({options.place, depth - 1}))
    backbone = backbones.create(encoder, image_size=(side, side), weights=weights, taps=taps)
    projection = None
    if options.guide == "text" and not isinstance(backbone, ClipResnet):
        projection = load_text_tower(text_weights or "").image_projection
    return Tower(backbone, options.place, projection)


def text_targets(
    prompts: Sequence[str], templates: Sequence[str], text_weights: str
) -> Float32[np.ndarray, "p e"]:
    """Embeddings of prompts: the mean over templates, not normalised each, then of unit length."""
    tower = load_text_tower(text_weights)
    return tower.embeddings(prompts, templates, unit=False)


def directions(
    targets: Float[np.ndarray, "p e"], source: Float[np.ndarray, " e"], prompts: Sequence[str]
) -> Float32[np.ndarray, "p e"]:
    """Unit vectors from the source's embedding to the targets'; all embeddings of any length.

    Raises:
        ValueError: a target equals the source, which gives no direction.
    """

    def unit(x: np.ndarray) -> np.ndarray:
        return x / np.linalg.norm(x, axis=-1, keepdims=True)

    moved = unit(targets.astype(np.float64)) - unit(source.astype(np.float64))
    lengths = np.linalg.norm(moved, axis=-1, keepdims=True)
    for prompt, length in zip(prompts, lengths[:, 0], strict=True):
        if length < 1e-6:
            raise ValueError(
                f"the prompt {prompt!r} has the embedding of the source, so there is no direction"
                " from one to the other; name another prompt"
            )
    return (moved / lengths).astype(np.float32)


# --- Offsets --------------------------------------------------------------------------------------


def offset_loss(
    moved: Float[Array, "b e"],
    plain: Float[Array, "b e"],
    direction: Float[Array, " e"],
    pull: float,
) -> Float[Array, ""]:
    """The loss of one prompt's offset; embeddings with and without it have unit length."""
    wanted = normalize(plain + direction)
    cosine = jnp.mean(1 - jnp.sum(moved * wanted, axis=-1))
    away = moved - plain
    # The absolute value, whose slope at 0 is 0 and not 1 as that of `jnp.abs`.
    return cosine + pull * jnp.mean(away * jnp.sign(away))


def offset_losses(
    tower: Tower,
    offsets: Float[Array, "p gh gw c"],
    images: Float[Array, "b h w 3"],
    toward: Float[Array, "p e"],
    pull: float,
) -> tuple[Float[Array, " p"], Float[Array, "p gh gw c"]]:
    """Each prompt's loss on images, and its gradient divided by `DIVISOR`; prompts are independent.

    The authors divide by the number of prompts, with the source's. It is of no consequence to Adam
    but for its epsilon, and a constant keeps prompts from influencing each other.
    """
    held = jax.lax.stop_gradient(tower.held(images))
    plain = jax.lax.stop_gradient(tower.embed(held))

    def loss(offset: Array, direction: Array) -> Array:
        moved = tower.embed(held, lambda x: x + offset)
        return offset_loss(moved, plain, direction, pull) / DIVISOR

    # One after another: all at once would store the activations of all.
    losses, slopes = jax.lax.map(
        lambda pair: jax.value_and_grad(loss)(*pair), (offsets, jnp.asarray(toward))
    )
    return losses * DIVISOR, slopes


def offset_optimizer(options: MiningOptions) -> optax.GradientTransformation:
    """Adam."""
    return optax.adam(options.learning_rate)


def offset_step(
    tower: Tower,
    state: tuple[Any, Any],
    images: Float[Array, "b h w 3"],
    toward: Float[Array, "p e"],
    options: MiningOptions,
) -> tuple[tuple[Any, Any], Float[Array, " p"]]:
    """One step of all offsets.

    Args:
        tower: the frozen encoder.
        state: offsets [p, h, w, c] and the optimiser's state.
        images: crops, normalised.
        toward: directions of the prompts.
        options: of the mining.

    Returns:
        The next state, and the losses before the step.
    """
    offsets, moments = state
    losses, slopes = offset_losses(tower, offsets, images, toward, options.pull)
    updates, moments = offset_optimizer(options).update(slopes, moments)
    return (optax.apply_updates(offsets, updates), moments), losses


# --- Statistics -----------------------------------------------------------------------------------


def style_losses(
    tower: Tower,
    styles: Float[Array, "b 2 c"],
    held: Float[Array, "b ..."],
    target: Float[Array, " e"],
    options: MiningOptions,
) -> Float[Array, " b"]:
    """The loss of each image with its own style."""

    def edit(x: Float[Array, "b h w c"]) -> Float[Array, "b _ _ c"]:
        y = restyled(x, styles, options.relu)
        return adaptive_pool(y, options.pool) if options.pool else y

    return 1 - tower.embed(held, edit) @ target


def mine_styles(
    tower: Tower,
    images: Float[Array, "b h w 3"],
    targets: Float[Array, "p e"],
    options: MiningOptions,
) -> tuple[Float[Array, "p b 2 c"], Float[Array, "2 p b"]]:
    """Statistics of images, mined for each prompt.

    Args:
        tower: the frozen encoder.
        images: crops, normalised.
        targets: embeddings of the prompts.
        options: of the mining.

    Returns:
        Means and deviations, and the losses before and after.
    """
    held = tower.held(images)
    own = own_statistics(tower.backbone.map_of(held))
    optimizer = optax.chain(
        optax.add_decayed_weights(DECAY), optax.sgd(options.learning_rate, MOMENTUM)
    )

    def one(target: Array) -> tuple[Array, Array]:
        def losses(style: Array) -> Array:
            return style_losses(tower, style, held, target, options)

        def step(state: tuple[Any, Any], _: None) -> tuple[tuple[Any, Any], None]:
            style, moments = state
            # A sum with a constant divisor: images do not depend on those beside them.
            slope = jax.grad(lambda style: losses(style).sum() / DIVISOR)(style)
            updates, moments = optimizer.update(slope, moments, style)
            return (optax.apply_updates(style, updates), moments), None

        start = own, optimizer.init(own)
        (style, _), _ = jax.lax.scan(step, start, None, length=options.steps)
        style = style.at[:, 1].max(0.0)
        return style, jnp.stack([losses(own), losses(style)])

    styles, losses = jax.lax.map(one, jnp.asarray(targets))
    return styles, jnp.moveaxis(losses, 1, 0)


# --- What they do ---------------------------------------------------------------------------------


def alignment(
    tower: Tower,
    images: Float[Array, "b h w 3"],
    edits: Float[Array, "p ..."],
    toward: Float[Array, "p e"],
    options: EditsOptions,
) -> Float[Array, "p p"]:
    """How far edits move embeddings where prompts point: mean cosines over images.

    Args:
        tower: the frozen encoder.
        images: crops that nothing was mined from, normalised.
        edits: as training draws them: offsets [p, c], or statistics [p, b, 2, c], one an image.
        toward: directions of the prompts; of statistics their embeddings, and the direction is that
            from the image's own embedding.
        options: their form.

    Returns:
        Row j, column k: of the movement by edit j with the direction of prompt k.
    """
    held = tower.held(images)
    plain = tower.embed(held)

    def moved(edit: Array) -> Array:
        def change(x: Float[Array, "b h w c"]) -> Float[Array, "b _ _ c"]:
            if options.form == "offset":
                return x + edit
            y = restyled(x, edit, options.mining.relu)
            return adaptive_pool(y, options.mining.pool) if options.mining.pool else y

        return normalize(tower.embed(held, change) - plain)

    relative = options.form == "offset"
    ways = jax.vmap(lambda t: jnp.broadcast_to(t, plain.shape) if relative else t - plain)(toward)
    cosines = jnp.einsum("jbe,kbe->jkb", jax.lax.map(moved, edits), normalize(ways))
    return cosines.mean(axis=-1)
