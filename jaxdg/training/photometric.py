"""Photometric augmentation on device, inside the jitted step: it touches pixels only, so labels and
boxes need not know.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Key


def distort(
    images: Float[Array, "b h w 3"],
    key: Key[Array, ""],
    brightness: float,
    contrast: float,
    saturation: float = 0.0,
    hue: float = 0.0,
    probability: float = 1.0,
) -> Float[Array, "b h w 3"]:
    """PhotoMetricDistortion of mmsegmentation; where all is changed always and colour never,
    `brightness_contrast`.

    Brightness, saturation and hue change in this order, contrast for one half of the images behind
    brightness, for the other at the end, each by its own coin. Other than in the original, pixels
    are not rounded in between and the hue turns by no whole number.

    Args:
        images: RGB in 0..255.
        key: random key.
        brightness: largest shift in units of 0..255; theirs is 32.
        contrast: largest relative change; 0.5.
        saturation: largest relative change; 0.5.
        hue: largest turn in units of 2 degrees; 18.
        probability: of each change; 0.5.

    Returns:
        RGB in 0..255.
    """
    if probability == 1.0 and not saturation and not hue:
        return brightness_contrast(images, key, brightness, contrast)
    return change(
        images, draw(key, images.shape[0], brightness, contrast, saturation, hue, probability)
    )


class Changes(NamedTuple):
    """What is done to each image.

    Attributes:
        shift: of brightness, in units of 0..255.
        gain: of contrast.
        early: whether contrast comes before colour, not after it.
        saturation: factor.
        hue: degrees.
    """

    shift: Float[Array, "b 1 1 1"]
    gain: Float[Array, "b 1 1 1"]
    early: Bool[Array, "b 1 1 1"]
    saturation: Float[Array, "b 1 1 1"]
    hue: Float[Array, "b 1 1 1"]


def draw(
    key: Key[Array, ""],
    count: int,
    brightness: float,
    contrast: float,
    saturation: float,
    hue: float,
    probability: float,
) -> Changes:
    """Draws the changes of `count` images; see `distort`."""
    keys = jax.random.split(key, 5)
    shape = (count, 1, 1, 1)

    def uniform(key: Key[Array, ""], reach: float) -> Float[Array, "b 1 1 1"]:
        coin, value = jax.random.split(key)
        drawn = jax.random.uniform(value, shape, minval=-reach, maxval=reach)
        return jnp.where(jax.random.bernoulli(coin, probability, shape), drawn, 0.0)

    return Changes(
        shift=uniform(keys[0], brightness),
        gain=1.0 + uniform(keys[1], contrast),
        early=jax.random.bernoulli(keys[2], 0.5, shape),
        saturation=1.0 + uniform(keys[3], saturation),
        hue=2.0 * uniform(keys[4], hue),
    )


def change(images: Float[Array, "b h w 3"], changes: Changes) -> Float[Array, "b h w 3"]:
    """Brightness, contrast, saturation and hue, contrast at the end where it is not early; RGB in
    0..255.
    """
    x = jnp.clip(images + changes.shift, 0.0, 255.0)
    x = jnp.clip(x * jnp.where(changes.early, changes.gain, 1.0), 0.0, 255.0)
    x = change_color(x, changes.saturation, changes.hue)
    return jnp.clip(x * jnp.where(changes.early, 1.0, changes.gain), 0.0, 255.0)


def change_color(
    images: Float[Array, "b h w 3"],
    saturation: Float[Array, "b 1 1 1"],
    hue: Float[Array, "b 1 1 1"],
) -> Float[Array, "b h w 3"]:
    """Multiplies HSV's saturation, at most to 1, and turns its hue; value stays.

    Args:
        images: RGB of 0 or more, of any range.
        saturation: factor.
        hue: degrees.
    """
    value = images.max(-1)
    chroma = images.max(-1) - images.min(-1)
    r, g, b = jnp.moveaxis(images, -1, 0)
    # The hue in sixths of a turn, from the sector of the largest channel; anything where there is
    # no chroma.
    sector = jnp.where(value == r, g - b, jnp.where(value == g, b - r, r - g)) / jnp.maximum(
        chroma, 1e-12
    )
    sixth = (
        sector + jnp.where(value == r, 0.0, jnp.where(value == g, 2.0, 4.0)) + hue[..., 0] / 60.0
    )
    chroma = jnp.minimum(chroma * saturation[..., 0], value)
    # Back without branches: a channel falls from the value by as much of the chroma as its colour
    # is away on the circle.
    away = (jnp.array([5.0, 3.0, 1.0]) + sixth[..., None]) % 6.0
    return value[..., None] - chroma[..., None] * jnp.clip(jnp.minimum(away, 4.0 - away), 0.0, 1.0)


def brightness_contrast(
    images: Float[Array, "b h w 3"], key: Key[Array, ""], brightness: float, contrast: float
) -> Float[Array, "b h w 3"]:
    """Multiplies by 1 +- contrast, then adds +- brightness, one draw of each an image, clipped to
    the range of pixels.

    Args:
        images: RGB in 0..255.
        key: random key.
        brightness: largest shift in units of 0..255.
        contrast: largest relative change.
    """
    gain_key, shift_key = jax.random.split(key)
    shape = (images.shape[0], 1, 1, 1)
    gain = jax.random.uniform(gain_key, shape, minval=1.0 - contrast, maxval=1.0 + contrast)
    shift = jax.random.uniform(shift_key, shape, minval=-brightness, maxval=brightness)
    return jnp.clip(images * gain + shift, 0.0, 255.0)


def normalize(
    images: Float[Array, "b h w 3"],
    mean: tuple[float, float, float],
    std: tuple[float, float, float],
) -> Float[Array, "b h w 3"]:
    """RGB in 0..255 to the encoder's range: `mean` and `std` are those of RGB in 0..1."""
    return (images - 255.0 * jnp.asarray(mean)) / (255.0 * jnp.asarray(std))
