"""Photometric augmentation on device, inside the jitted step: it touches pixels only, so labels and boxes need not know."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key


def brightness_contrast(
    images: Float[Array, "b h w 3"], key: Key[Array, ""], brightness: float, contrast: float
) -> Float[Array, "b h w 3"]:
    """Multiplies by 1 +- contrast, then adds +- brightness, one draw of each an image, clipped to the range of pixels.

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
    images: Float[Array, "b h w 3"], mean: tuple[float, float, float], std: tuple[float, float, float]
) -> Float[Array, "b h w 3"]:
    """RGB in 0..255 to the encoder's range: `mean` and `std` are those of RGB in 0..1."""
    return (images - 255.0 * jnp.asarray(mean)) / (255.0 * jnp.asarray(std))
