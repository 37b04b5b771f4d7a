"""Style transfer on the devices: AdaIN (Huang and Belongie 2017) on wavelet bands of colours.

AdaIN gives each channel of an image's features the mean and the standard deviation that it has in
another image. The original takes features of a VGG and trains a decoder that turns them back into
an image. Here the features are linear: opponent colours (as in Reinhard et al. 2001), which an à
trous wavelet transform splits into horizontal, vertical and diagonal details of doubling sizes and
a rest. An image is the sum of its bands, so nothing is trained, edges stay where the labels have
them, and an image in its own style is unchanged. Unlike a VGG, the bands hold no texture but
contrast by colour, size and direction.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float
import numpy as np

LEVELS = 5  # details of 1 to 16 pixels; the rest holds colour and light
MAX_GAIN = 4.0  # more would amplify the noise and the JPEG blocks of flat or grey images
TAPS = (1 / 16, 4 / 16, 6 / 16, 4 / 16, 1 / 16)
OPPONENT = np.array([[1, 1, 1], [1, -1, 0], [1, 1, -2]], np.float32) / np.sqrt(
    np.array([[3], [2], [6]], np.float32)
)


def stylize(
    images: Float[Array, "b h w 3"], styles: Float[Array, "b h w 3"]
) -> Float[Array, "b h w 3"]:
    """Images in the styles of others.

    Args:
        images: RGB in 0..255.
        styles: likewise.

    Returns:
        RGB in 0..255.
    """
    pairs = zip(split(images @ OPPONENT.T), split(styles @ OPPONENT.T), strict=True)
    total = sum((adain(band, style) for band, style in pairs), start=jnp.zeros((), jnp.float32))
    return jnp.clip(total @ OPPONENT, 0.0, 255.0)


def adain(x: Float[Array, "b h w c"], style: Float[Array, "b h w c"]) -> Float[Array, "b h w c"]:
    """`x` with the channel means and standard deviations of `style`; `MAX_GAIN` bounds the gain."""
    mean = x.mean((1, 2), keepdims=True)
    deviation = x.std((1, 2), keepdims=True)
    gain = jnp.minimum(style.std((1, 2), keepdims=True) / jnp.maximum(deviation, 1e-3), MAX_GAIN)
    return (x - mean) * gain + style.mean((1, 2), keepdims=True)


def split(x: Float[Array, "b h w c"]) -> list[Float[Array, "b h w c"]]:
    """Bands that add up to `x`: three directions a level, finest level first, then the rest."""
    bands = []
    for level in range(LEVELS):
        low = smooth(x, 2, 1 << level)
        rest = smooth(low, 1, 1 << level)
        vertical = smooth(high := x - low, 1, 1 << level)
        bands += [low - rest, vertical, high - vertical]
        x = rest
    return [*bands, x]


def smooth(x: Float[Array, "b h w c"], axis: int, step: int) -> Float[Array, "b h w c"]:
    """Averages pixels `step` apart along an axis with binomial weights; repeats the border."""
    margin = [(2 * step, 2 * step) if i == axis else (0, 0) for i in range(4)]
    padded = jnp.pad(x, margin, mode="edge")
    n = x.shape[axis]
    return sum(
        (
            tap * jax.lax.slice_in_dim(padded, i * step, i * step + n, axis=axis)
            for i, tap in enumerate(TAPS)
        ),
        start=jnp.zeros((), x.dtype),
    )
