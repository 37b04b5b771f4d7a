"""Style transfer on the devices, by AdaIN (Huang and Belongie 2017) on bands of an invertible
transform instead of features of a VGG.

AdaIN gives every channel of an image's features the mean and the standard deviation that it has in
another image, and a decoder, trained for it, turns features back into an image. Here features are
linear: opponent colours (as in Reinhard et al. 2001), each cut by an à trous wavelet transform into
horizontal, vertical and diagonal detail of sizes that double, and the rest. An image is the sum of
its bands, so nothing needs to be trained, edges stay where the labels have them, and an image in
its own style is the image. What is lost against a VGG is texture beyond contrast by colour, size
and direction.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float
import numpy as np

LEVELS = 5  # details of 1 to 16 pixels; the rest carries colour and light
# at most: in flat or grey images nothing but noise and the blocks of JPEG could be made stronger
GAIN = 4.0
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
    """`x` with the mean and the standard deviation of every channel of `style`, contrast being
    raised `GAIN` times at most.
    """
    mean = x.mean((1, 2), keepdims=True)
    deviation = x.std((1, 2), keepdims=True)
    gain = jnp.minimum(style.std((1, 2), keepdims=True) / jnp.maximum(deviation, 1e-3), GAIN)
    return (x - mean) * gain + style.mean((1, 2), keepdims=True)


def split(x: Float[Array, "b h w c"]) -> list[Float[Array, "b h w c"]]:
    """Bands that add up to `x`: three directions of every level, finest first, and the rest."""
    bands = []
    for level in range(LEVELS):
        low = smooth(x, 2, 1 << level)
        rest = smooth(low, 1, 1 << level)
        vertical = smooth(high := x - low, 1, 1 << level)
        bands += [low - rest, vertical, high - vertical]
        x = rest
    return [*bands, x]


def smooth(x: Float[Array, "b h w c"], axis: int, step: int) -> Float[Array, "b h w c"]:
    """Binomial weights along an axis, of pixels that lie `step` apart; the border is repeated."""
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
