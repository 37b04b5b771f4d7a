"""Brightness and contrast: bounds, one draw an image, and equality with NumPy given the same draws."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdg.training.photometric import brightness_contrast, normalize

IMAGES = jnp.asarray(np.random.default_rng(0).uniform(0, 255, (64, 3, 4, 3)), jnp.float32)


def test_no_strength_is_identity():
    """Strength zero changes no bit."""
    np.testing.assert_array_equal(brightness_contrast(IMAGES, jax.random.key(0), 0.0, 0.0), IMAGES)


def test_equals_numpy_with_the_same_draws():
    """Gain first, shift second, clipped last: NumPy with gain and shift recovered from two probe images nothing clips."""
    key = jax.random.key(3)
    probe = lambda value: np.asarray(brightness_contrast(jnp.full_like(IMAGES, value), key, 30.0, 0.2))[:, 0, 0, 0].astype(np.float64)
    gain = (probe(150) - probe(100)) / 50
    shift = probe(100) - 100 * gain
    expected = np.clip(np.asarray(IMAGES) * gain.reshape(-1, 1, 1, 1) + shift.reshape(-1, 1, 1, 1), 0, 255)
    np.testing.assert_allclose(brightness_contrast(IMAGES, key, 30.0, 0.2), expected, atol=1e-3)
    assert ((expected > 0) & (expected < 255)).mean() > 0.8  # the clip is met, but not by most pixels
    assert ((expected == 0) | (expected == 255)).any()


def test_draws_fill_their_range_one_an_image():
    """Each image has its own gain in 1 +- contrast and its own shift in +- brightness, independent and uniform."""
    grey = jnp.full((4000, 1, 2, 3), 100.0)
    for strengths, centre, reach in (((30.0, 0.0), 100, 30), ((0.0, 0.25), 100, 25)):
        out = np.asarray(brightness_contrast(grey, jax.random.key(1), *strengths))
        np.testing.assert_array_equal(out, np.broadcast_to(out[:, :1, :1, :1], out.shape))
        offsets = out[:, 0, 0, 0] - centre
        assert np.abs(offsets).max() <= reach + 1e-3
        # A uniform draw has standard deviation reach / sqrt(3) and mean 0; 4000 draws estimate them to a few percent.
        assert offsets.std() == pytest.approx(reach / 3**0.5, rel=0.05)
        assert abs(offsets.mean()) < 0.05 * reach
    light, dark = (np.asarray(brightness_contrast(grey + d, jax.random.key(1), 30.0, 0.25))[:, 0, 0, 0] for d in (50, -50))
    gain = (light - dark) / 100
    assert abs(np.corrcoef(gain, light - 150 * gain)[0, 1]) < 0.06


def test_draws_depend_on_the_key():
    """The same key gives the same images, another key others."""
    run = lambda seed: np.asarray(brightness_contrast(IMAGES, jax.random.key(seed), 30.0, 0.2))
    np.testing.assert_array_equal(run(0), run(0))
    assert (run(0) != run(1)).mean() > 0.9


def test_the_range_of_pixels_is_kept():
    """However strong, pixels stay in 0..255."""
    out = np.asarray(brightness_contrast(IMAGES, jax.random.key(0), 255.0, 1.0))
    assert (out.min(), out.max()) == (0, 255)


def test_normalize():
    """ToTensor and Normalize of torchvision, in NumPy: x / 255, less the mean, by the standard deviation, channel by channel."""
    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    expected = np.stack([(np.asarray(IMAGES)[..., i] / 255.0 - mean[i]) / std[i] for i in range(3)], axis=-1)
    np.testing.assert_allclose(normalize(IMAGES, mean, std), expected, atol=1e-5)
