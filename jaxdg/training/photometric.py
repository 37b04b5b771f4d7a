"""Photometric augmentation in the jitted step; it changes pixels only, not labels or boxes."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int32, Key


def distort(
    images: Float[Array, "b h w 3"],
    key: Key[Array, ""],
    brightness: float,
    contrast: float,
    saturation: float = 0.0,
    hue: float = 0.0,
    probability: float = 1.0,
) -> Float[Array, "b h w 3"]:
    """Mmsegmentation's PhotoMetricDistortion.

    Brightness, saturation and hue change in this order. Contrast changes after brightness for half
    of the images and last for the others. Each change is drawn on its own. Unlike the original,
    this rounds no pixels in between, and the hue turns by any real number. If every change is sure
    and colour never changes, this is `brightness_contrast`.

    Args:
        images: RGB in 0..255.
        key: random key.
        brightness: largest shift in units of 0..255; mmsegmentation's default is 32.
        contrast: largest relative change; its default is 0.5.
        saturation: largest relative change; its default is 0.5.
        hue: largest turn in units of 2 degrees; its default is 18.
        probability: of each change; its default is 0.5.

    Returns:
        RGB in 0..255.
    """
    if probability == 1.0 and not saturation and not hue:
        return brightness_contrast(images, key, brightness, contrast)
    strengths = brightness, contrast, saturation, hue
    return change(images, draw(key, images.shape[0], *strengths, probability))


class Changes(NamedTuple):
    """The changes of each image.

    Attributes:
        shift: of brightness, in units of 0..255.
        gain: of contrast.
        early: whether contrast changes before colour, not after it.
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
    """Images, RGB in 0..255, with these changes."""
    x = jnp.clip(images + changes.shift, 0.0, 255.0)
    x = jnp.clip(x * jnp.where(changes.early, changes.gain, 1.0), 0.0, 255.0)
    x = change_color(x, changes.saturation, changes.hue)
    return jnp.clip(x * jnp.where(changes.early, 1.0, changes.gain), 0.0, 255.0)


def change_color(
    images: Float[Array, "b h w 3"],
    saturation: Float[Array, "b 1 1 1"],
    hue: Float[Array, "b 1 1 1"],
) -> Float[Array, "b h w 3"]:
    """Multiplies the saturation of HSV, up to 1, and turns the hue; the value stays.

    Args:
        images: RGB of 0 or more, of any range.
        saturation: factor.
        hue: degrees.
    """
    value = images.max(-1)
    chroma = images.max(-1) - images.min(-1)
    r, g, b = jnp.moveaxis(images, -1, 0)
    # The hue in sixths of a turn, from the sector of the largest channel. Without chroma any hue
    # will do.
    difference = jnp.where(value == r, g - b, jnp.where(value == g, b - r, r - g))
    offset = jnp.where(value == r, 0.0, jnp.where(value == g, 2.0, 4.0))
    sixth = difference / jnp.maximum(chroma, 1e-12) + offset + hue[..., 0] / 60.0
    chroma = jnp.minimum(chroma * saturation[..., 0], value)
    # Back to RGB without branches: a channel lies below the value by a share of the chroma, which
    # grows with the distance of its colour on the circle.
    distance = (jnp.array([5.0, 3.0, 1.0]) + sixth[..., None]) % 6.0
    share = jnp.clip(jnp.minimum(distance, 4.0 - distance), 0.0, 1.0)
    return value[..., None] - chroma[..., None] * share


def brightness_contrast(
    images: Float[Array, "b h w 3"], key: Key[Array, ""], brightness: float, contrast: float
) -> Float[Array, "b h w 3"]:
    """Multiplies each image by 1 +- contrast, then adds +- brightness; clips to 0..255.

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
    """RGB in 0..255 to the encoder's range; `mean` and `std` are of RGB in 0..1."""
    return (images - _mean_colour(mean)) / (255.0 * jnp.asarray(std))


def blank(
    images: Float[Array, "b h w 3"], inside: Int32[Array, "b 2"], mean: tuple[float, float, float]
) -> Float[Array, "b h w 3"]:
    """Images whose padding on the right and at the bottom is exactly 0 once they are normalised.

    Args:
        images: RGB in 0..255.
        inside: height and width of each image without its padding.
        mean: of RGB in 0..1, as for `normalize`.
    """
    h, w = images.shape[1:3]
    rows = jnp.arange(h)[:, None] < inside[:, 0, None, None]
    columns = jnp.arange(w) < inside[:, 1, None, None]
    return jnp.where((rows & columns)[..., None], images, _mean_colour(mean))


def _mean_colour(mean: tuple[float, float, float]) -> Float[Array, "3"]:
    return 255.0 * jnp.asarray(mean)
