"""Photometric distortion: bounds, one draw an image, and equality with NumPy and OpenCV given the
same draws.
"""

import cv2
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdg.training.photometric import (
    blank,
    brightness_contrast,
    change_color,
    distort,
    draw,
    normalize,
)

MMSEG = {"brightness": 32.0, "contrast": 0.5, "saturation": 0.5, "hue": 18.0, "probability": 0.5}

IMAGES = jnp.asarray(np.random.default_rng(0).uniform(0, 255, (64, 3, 4, 3)), jnp.float32)


def test_no_strength_is_identity():
    """Strength zero changes no bit."""
    np.testing.assert_array_equal(brightness_contrast(IMAGES, jax.random.key(0), 0.0, 0.0), IMAGES)


def test_equals_numpy_with_the_same_draws():
    """Gain first, shift second, clipped last: NumPy with gain and shift recovered from two probe
    images nothing clips.
    """
    key = jax.random.key(3)

    def probe(value):
        return np.asarray(brightness_contrast(jnp.full_like(IMAGES, value), key, 30.0, 0.2))[
            :, 0, 0, 0
        ].astype(np.float64)

    gain = (probe(150) - probe(100)) / 50
    shift = probe(100) - 100 * gain
    expected = np.clip(
        np.asarray(IMAGES) * gain.reshape(-1, 1, 1, 1) + shift.reshape(-1, 1, 1, 1), 0, 255
    )
    np.testing.assert_allclose(brightness_contrast(IMAGES, key, 30.0, 0.2), expected, atol=1e-3)
    assert (
        (expected > 0) & (expected < 255)
    ).mean() > 0.8  # the clip is met, but not by most pixels
    assert ((expected == 0) | (expected == 255)).any()


def test_draws_fill_their_range_one_an_image():
    """Each image has its own gain in 1 +- contrast and its own shift in +- brightness, independent
    and uniform.
    """
    grey = jnp.full((4000, 1, 2, 3), 100.0)
    for strengths, centre, reach in (((30.0, 0.0), 100, 30), ((0.0, 0.25), 100, 25)):
        out = np.asarray(brightness_contrast(grey, jax.random.key(1), *strengths))
        np.testing.assert_array_equal(out, np.broadcast_to(out[:, :1, :1, :1], out.shape))
        offsets = out[:, 0, 0, 0] - centre
        assert np.abs(offsets).max() <= reach + 1e-3
        # A uniform draw has standard deviation reach / sqrt(3) and mean 0; 4000 draws estimate them
        # to a few percent.
        assert offsets.std() == pytest.approx(reach / 3**0.5, rel=0.05)
        assert abs(offsets.mean()) < 0.05 * reach
    light, dark = (
        np.asarray(brightness_contrast(grey + d, jax.random.key(1), 30.0, 0.25))[:, 0, 0, 0]
        for d in (50, -50)
    )
    gain = (light - dark) / 100
    assert abs(np.corrcoef(gain, light - 150 * gain)[0, 1]) < 0.06


def test_draws_depend_on_the_key():
    """The same key gives the same images, another key others."""

    def run(seed):
        return np.asarray(brightness_contrast(IMAGES, jax.random.key(seed), 30.0, 0.2))

    np.testing.assert_array_equal(run(0), run(0))
    assert (run(0) != run(1)).mean() > 0.9


def test_the_range_of_pixels_is_kept():
    """However strong, pixels stay in 0..255."""
    out = np.asarray(brightness_contrast(IMAGES, jax.random.key(0), 255.0, 1.0))
    assert (out.min(), out.max()) == (0, 255)


def test_without_colour_and_coins_nothing_has_changed():
    """Runs with brightness and contrast alone see the bits they always saw."""
    expected = brightness_contrast(IMAGES, jax.random.key(4), 24.0, 0.25)
    np.testing.assert_array_equal(distort(IMAGES, jax.random.key(4), 24.0, 0.25), expected)


def through_hsv(image: np.ndarray, saturation: float, hue: float) -> np.ndarray:
    """OpenCV's float HSV of RGB in 0..1: saturation multiplied and held in 0..1, hue turned by
    degrees.
    """
    h, s, v = cv2.split(cv2.cvtColor(image, cv2.COLOR_RGB2HSV))
    return cv2.cvtColor(
        cv2.merge([(h + np.float32(hue)) % 360, np.clip(s * np.float32(saturation), 0, 1), v]),
        cv2.COLOR_HSV2RGB,
    )


@pytest.mark.parametrize(
    ("saturation", "hue"),
    [(1.0, 0.0), (0.5, 0.0), (1.5, -36.0), (0.8, 36.0), (1.0, 180.0), (0.0, 20.0), (9.0, 300.0)],
)
def test_colour_changes_equal_opencvs_float_hsv(saturation, hue):
    """Noise, greys, pure colours and black, to the sixth digit of 0..1."""
    corners = np.stack(np.meshgrid(*[[0.0, 0.5, 1.0]] * 3), axis=-1).reshape(1, 27, 3)
    image = np.concatenate([np.random.default_rng(0).uniform(0, 1, (20, 27, 3)), corners]).astype(
        np.float32
    )
    change = jnp.full((1, 1, 1, 1), saturation), jnp.full((1, 1, 1, 1), hue)
    np.testing.assert_allclose(
        change_color(jnp.asarray(image)[None], *change)[0],
        through_hsv(image, saturation, hue),
        atol=3e-6,
    )
    ten = change_color(255 * jnp.asarray(image)[None], *change)[0]
    np.testing.assert_allclose(ten, 255 * through_hsv(image, saturation, hue), atol=1e-3)


def mmseg(
    image: np.ndarray, shift: float, gain: float, saturation: float, hue: float, early: bool
) -> np.ndarray:
    """PhotoMetricDistortion as mmsegmentation computes it, on uint8 with OpenCV's 8-bit HSV (hue in
    units of 2 degrees).
    """

    def convert(x, alpha=1.0, beta=0.0):
        return np.clip(x.astype(np.float32) * alpha + beta, 0, 255).astype(np.uint8)

    x = convert(image, beta=shift)
    if early:
        x = convert(x, alpha=gain)
    hsv = cv2.cvtColor(x, cv2.COLOR_RGB2HSV)
    hsv[..., 1] = convert(hsv[..., 1], alpha=saturation)
    hsv[..., 0] = (hsv[..., 0].astype(int) + round(hue / 2)) % 180
    x = cv2.cvtColor(hsv, cv2.COLOR_HSV2RGB)
    return x if early else convert(x, alpha=gain)


def test_equals_mmsegmentation_with_the_same_draws():
    """Their steps on 8-bit images agree to the few levels that their roundings cost, and in real
    numbers to the last digits.
    """
    n = 32
    key = jax.random.key(5)
    images = np.random.default_rng(0).integers(0, 256, (n, 6, 8, 3), dtype=np.uint8)
    images = np.stack([cv2.resize(image, (24, 18)) for image in images])
    changes = {
        name: np.asarray(value).ravel().tolist()
        for name, value in draw(key, n, **MMSEG)._asdict().items()
    }
    got = np.asarray(distort(jnp.asarray(images, jnp.float32), key, **MMSEG))
    for i in range(n):
        one = {name: values[i] for name, values in changes.items()}
        x = np.clip(images[i] + np.float32(one["shift"]), 0, 255)
        x = np.clip(x * one["gain"], 0, 255) if one["early"] else x
        x = 255 * through_hsv(np.float32(x / 255), one["saturation"], one["hue"])
        x = x if one["early"] else np.clip(x * one["gain"], 0, 255)
        np.testing.assert_allclose(got[i], x, atol=0.01)
        assert np.abs(got[i] - mmseg(images[i], **one)).mean() < 3


def test_the_coins_and_ranges_are_mmsegmentations():
    """Half of the images get each change, independently of the others, and those that do get a
    uniform one of the whole range.
    """
    drawn = {
        name: np.asarray(value).ravel()
        for name, value in draw(jax.random.key(0), 4000, **MMSEG)._asdict().items()
    }
    changed = [drawn["early"]]
    assert drawn["early"].mean() == pytest.approx(0.5, abs=0.03)
    for name, (centre, most) in {
        "shift": (0, 32),
        "gain": (1, 0.5),
        "saturation": (1, 0.5),
        "hue": (0, 36),
    }.items():
        offset = drawn[name] - centre
        on = offset != 0
        assert on.mean() == pytest.approx(0.5, abs=0.03)
        assert np.abs(offset).max() <= most
        assert offset[on].std() == pytest.approx(most / 3**0.5, rel=0.05)
        assert abs(offset[on].mean()) < 0.06 * most
        changed.append(on)
    assert np.abs(np.corrcoef(changed) - np.eye(5)).max() < 0.06


def test_probability_0_is_identity():
    """No coin falls, nothing changes but by rounding."""
    np.testing.assert_allclose(
        distort(IMAGES, jax.random.key(0), **{**MMSEG, "probability": 0.0}), IMAGES, atol=1e-3
    )


def test_normalize():
    """ToTensor and Normalize of torchvision, in NumPy: x / 255, less the mean, by the standard
    deviation, channel by channel.
    """
    mean = (0.485, 0.456, 0.406)
    std = (0.229, 0.224, 0.225)
    expected = np.stack(
        [(np.asarray(IMAGES)[..., i] / 255.0 - mean[i]) / std[i] for i in range(3)], axis=-1
    )
    np.testing.assert_allclose(normalize(IMAGES, mean, std), expected, atol=1e-5)


@pytest.mark.parametrize("mean", [(0.485, 0.456, 0.406), (0.48145466, 0.4578275, 0.40821073)])
def test_blank_padding_is_exactly_0(mean):
    """After any distortion and normalisation, as one program: 0 below and right of the image, and
    the image itself as without padding.
    """
    std = (0.229, 0.224, 0.225)
    inside = np.array([[3, 4], [2, 4], [3, 1], [1, 2]] * 16, np.int32)

    @jax.jit
    def step(images, inside):
        distorted = distort(images, jax.random.key(1), **MMSEG)
        return normalize(blank(distorted, inside, mean), mean, std), normalize(distorted, mean, std)

    got, whole = map(np.asarray, step(IMAGES, inside))
    for image, plain, (h, w) in zip(got, whole, inside, strict=True):
        np.testing.assert_array_equal(image[:h, :w], plain[:h, :w])
        assert not image[h:].any()
        assert not image[:, w:].any()
