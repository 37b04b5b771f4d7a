"""Style transfer on bands of an image, against one written out in double precision."""

import jax
import jax.numpy as jnp
import numpy as np

from jaxdg.methods import stylize as lib
from jaxdg.methods.stylize import adain

split = jax.jit(lib.split)
stylize = jax.jit(lib.stylize)


def images(seed: int, h: int = 12, w: int = 9, low: float = 0, high: float = 255) -> np.ndarray:
    return np.random.default_rng(seed).uniform(low, high, (2, h, w, 3)).astype(np.float32)


def smoothed(line: np.ndarray, step: int) -> np.ndarray:
    """One row or column, each value of which is a weighted mean of five, `step` apart; past the
    ends the last one counts on.
    """

    def at(i):
        return line[min(max(i, 0), len(line) - 1)]

    return np.array(
        [
            sum(w * at(i + d * step) for d, w in zip(range(-2, 3), (1, 4, 6, 4, 1), strict=True))
            / 16
            for i in range(len(line))
        ]
    )


def slow_bands(channel: np.ndarray) -> list[np.ndarray]:
    bands = []
    for level in range(5):

        def across(x, step=2**level):
            return np.apply_along_axis(smoothed, 1, x, step)

        def down(x, step=2**level):
            return np.apply_along_axis(smoothed, 0, x, step)

        low = across(channel)
        bands += [low - down(low), down(channel - low), (channel - low) - down(channel - low)]
        channel = down(low)
    return [*bands, channel]


def slow_stylize(image: np.ndarray, style: np.ndarray) -> np.ndarray:
    colors = np.array([[1, 1, 1], [1, -1, 0], [1, 1, -2]]) / np.sqrt([[3], [2], [6]])
    result = np.zeros(image.shape)
    for color in colors:
        total = 0
        for one, other in zip(slow_bands(image @ color), slow_bands(style @ color), strict=True):
            total = total + (one - one.mean()) * min(other.std() / one.std(), 4) + other.mean()
        result += total[..., None] * color
    return result.clip(0, 255)


def test_styles_are_transferred_as_written_out():
    """Every pixel agrees, for styles of more and of less contrast, and of another mean."""
    given = images(0)
    for style in (images(1), images(2, low=100, high=130), images(3, low=0, high=20)):
        expected = [
            slow_stylize(one.astype(np.float64), other.astype(np.float64))
            for one, other in zip(given, style, strict=True)
        ]
        np.testing.assert_allclose(
            stylize(jnp.asarray(given), jnp.asarray(style)), expected, atol=2e-2
        )


def test_an_image_in_its_own_style_is_the_image():
    """Bands add up to the image, and its own means and deviations change nothing, however flat it
    is.
    """
    for image in (images(0), images(1, 40, 64), np.full((2, 12, 9, 3), 77, np.float32)):
        np.testing.assert_allclose(sum(split(jnp.asarray(image))), image, atol=1e-3)
        np.testing.assert_allclose(
            stylize(jnp.asarray(image), jnp.asarray(image)), image, atol=1e-2
        )


def test_means_and_deviations_become_those_of_the_style():
    """Of every channel and image; contrast is raised 4 times at most."""
    x = images(0)
    style = images(1, low=50, high=90)
    moved = adain(jnp.asarray(x), jnp.asarray(style))
    np.testing.assert_allclose(moved.mean((1, 2)), style.mean((1, 2)), rtol=1e-4)
    np.testing.assert_allclose(moved.std((1, 2)), style.std((1, 2)), rtol=1e-3)
    raised = adain(jnp.asarray(images(2, low=120, high=121)), jnp.asarray(x))
    np.testing.assert_allclose(
        raised.std((1, 2)), 4 * images(2, low=120, high=121).std((1, 2)), rtol=1e-3
    )
