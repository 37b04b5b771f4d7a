"""Corruptions of images at five severities: the 15 common ones of ImageNet-C, and five more.

The common ones, `KINDS`, are defined by Hendrycks and Dietterich (2019, "Benchmarking Neural
Network Robustness to Common Corruptions and Perturbations", github hendrycks/robustness) for
224 x 224 pixels, and by Michaelis et al. (2019, "Benchmarking Robustness in Object Detection",
github bethgelab/imagecorruptions) for any size. This is the latter with the same constants, borders
and order of random draws: given the same draws, images are equal to within one grey level. What one
could not guess and published scores rest on:

- results are cut to whole grey values, not rounded;
- glass blur copies pixels from their neighbours, one after another: both publications mean to swap
  them, but NumPy's views make it a copy;
- zoom blur cuts zoomed images off below and at the right, and does not centre them;
- defocus blur's soft disks weigh a little more than 1.

Frost differs: the photographs are replaced by five pictures of ice that are drawn here, of about
the same colour, contrast and spectrum.

The others are for augmentation: speckle noise, Gaussian blur and saturation from the same
publications, a high-pass filter and scaled phases from DivAlign (Danish et al. 2024, github
msohaildanish/DivAlign, `ACVCGenerator`). Different there: values outside of 0 to 255 are cut after
the scaling of phases, where its code lets them wrap around; on odd sides the circle of the
high-pass filter lies around frequency 0, and not half a frequency beside it.
"""

from collections.abc import Callable, Sequence
import functools
import io
import math
import os
from typing import Any
import zlib

import cv2
from jaxtyping import Complex64, Float, Float32, Float64, Int64, UInt8
import numpy as np
from PIL import Image

from jaxdg.data.datasets import Dataset

Pixels = UInt8[np.ndarray, "h w 3"]
Result = Float[np.ndarray, "h w 3"] | Pixels  # in units of 0..255, not yet cut to that range
SEVERITIES = (1, 2, 3, 4, 5)


class Corrupted:
    """A dataset whose images are corrupted; labels and boxes stay. An image is always corrupted in
    the same way.

    What is drawn depends on (image file's name, kind, severity) alone, and so neither on the data
    root nor on the form of the dataset.
    """

    def __init__(self, dataset: Dataset, kind: str, severity: int):
        """Args:
        dataset: of images in their own colours.
        kind: one of `ALL_KINDS`.
        severity: 1 to 5.

        Raises:
            ValueError: no such kind or severity.
        """
        definition(kind, severity)  # or raises
        self.dataset = dataset
        self.kind = kind
        self.severity = severity
        self.domain = dataset.domain
        self.labels = dataset.labels

    def __len__(self) -> int:
        return len(self.dataset)

    def size(self, i: int) -> tuple[int, int]:
        return self.dataset.size(i)

    def name(self, i: int) -> str:
        return self.dataset.name(i)

    def __getitem__(self, i: int) -> dict[str, np.ndarray]:
        sample = self.dataset[i]
        file = os.path.basename(self.name(i))
        seed = zlib.crc32(f"{file} {self.kind} {self.severity}".encode())
        return {**sample, "image": corrupt(sample["image"], self.kind, self.severity, seed)}


def corrupt(image: Pixels, kind: str, severity: int, seed: int) -> Pixels:
    """A corrupted image.

    Args:
        image: RGB, of any size.
        kind: one of `ALL_KINDS`.
        severity: 1 to 5.
        seed: of what is random in it.

    Returns:
        The image of the same size.

    Raises:
        ValueError: no such kind or severity.
    """
    function, constants = definition(kind, severity)
    result = function(image, np.random.default_rng(seed), *constants)
    # Cut, not rounded; the hair's breadth keeps rounding errors from darkening what the corruption
    # leaves alone.
    return np.clip(result + 1e-3, 0, 255).astype(np.uint8) if result.dtype != np.uint8 else result


def random_corruption(image: Pixels, kinds: Sequence[str], rng: np.random.Generator) -> Pixels:
    """The image under one of `kinds` at any severity, each as often.

    Args:
        image: RGB, of any size.
        kinds: some of `ALL_KINDS`.
        rng: the source of all randomness.

    Returns:
        The image of the same size.
    """
    kind = kinds[int(rng.integers(len(kinds)))]
    severity = int(rng.integers(1, len(SEVERITIES) + 1))
    return corrupt(image, kind, severity, int(rng.integers(2**32)))


def definition(kind: str, severity: int) -> tuple[Callable[..., Result], tuple[Any, ...]]:
    """The function of a corruption, of (image, generator, *constants), and its constants.

    Args:
        kind: one of `ALL_KINDS`.
        severity: 1 to 5.

    Raises:
        ValueError: no such kind or severity.
    """
    if kind not in _KINDS:
        raise ValueError(f"unknown corruption {kind!r}; known are {', '.join(ALL_KINDS)}")
    if severity not in SEVERITIES:
        raise ValueError(f"severity is {severity}; allowed: 1 to 5")
    function, constants = _KINDS[kind]
    return function, constants[severity - 1]


# --- Noise ----------------------------------------------------------------------------------------


def _gaussian_noise(image: Pixels, rng: np.random.Generator, deviation: float) -> Result:
    return image + 255 * rng.normal(scale=deviation, size=image.shape)


def _shot_noise(image: Pixels, rng: np.random.Generator, photons: float) -> Result:
    """So many photons of light make a value of 255."""
    return rng.poisson(image * (photons / 255)) * (255 / photons)


def _impulse_noise(image: Pixels, rng: np.random.Generator, share: float) -> Result:
    """A share of values becomes 0 or 255, each channel by itself."""
    hit = rng.random(image.shape) <= share
    white = rng.random(image.shape) <= 0.5
    return np.where(hit, np.where(white, np.uint8(255), np.uint8(0)), image)


def _speckle_noise(image: Pixels, rng: np.random.Generator, deviation: float) -> Result:
    """In proportion to the value."""
    return image * (1 + rng.normal(scale=deviation, size=image.shape))


# --- Blur -----------------------------------------------------------------------------------------


def _defocus_blur(image: Pixels, rng: np.random.Generator, radius: int, softness: float) -> Result:
    """The mean over a disk with soft edges."""
    side = np.arange(-max(8, radius), max(8, radius) + 1)
    disk = (np.hypot(*np.meshgrid(side, side)) <= radius).astype(np.float32)
    kernel = cv2.GaussianBlur(disk / disk.sum(), (3, 3) if radius <= 8 else (5, 5), softness)
    return cv2.filter2D(image.astype(np.float32), -1, kernel)


def _glass_blur(
    image: Pixels, rng: np.random.Generator, sigma: float, reach: int, rounds: int
) -> Result:
    """Pixels copied from near by, between two Gaussian blurs."""
    x = (_blurred(image, sigma) + 1e-3).astype(np.uint8)
    h, w = image.shape[:2]
    rows = image.shape[0] - 2 * reach
    columns = image.shape[1] - 2 * reach
    if rows > 0 and columns > 0:
        for _ in range(rounds):
            source = _sources(h, w, reach, rng.integers(-reach, reach, (rows, columns, 2)))
            x = x.reshape(-1, 3)[source].reshape(x.shape)
    return _blurred(x, sigma)


def _gaussian_blur(image: Pixels, rng: np.random.Generator, sigma: float) -> Result:
    return _blurred(image, sigma)


def _blurred(x: Pixels, sigma: float) -> Float64[np.ndarray, "h w 3"]:
    """Gaussian blur as scikit-image's, four deviations wide."""
    size = (2 * int(4 * sigma + 0.5) + 1,) * 2
    return cv2.GaussianBlur(x.astype(np.float64), size, sigma, borderType=cv2.BORDER_REPLICATE)


def _sources(
    h: int, w: int, reach: int, offsets: Int64[np.ndarray, "rows columns 2"]
) -> Int64[np.ndarray, " n"]:
    """Which pixel each pixel shows after every inner one, from the last to the first, was made a
    copy of one near by.

    One copied from a pixel that had its turn before shows what that one shows by then. Instead of
    going through the pixels, all such chains are followed at once, twice as far each time.

    Args:
        h: height of the image.
        w: width of the image.
        reach: inner pixels are `reach` + 1 to h - `reach` down, and likewise across.
        offsets: columns and rows to the pixel that is copied, in the order of turns.
    """
    n = h * w
    grid = np.arange(h * w).reshape(h, w)
    inner = np.s_[reach + 1 : h - reach + 1, reach + 1 : w - reach + 1]
    has_turn = np.zeros((h, w), bool)
    has_turn[inner] = True
    dx, dy = np.moveaxis(offsets[::-1, ::-1], 2, 0)
    copied = grid[inner] + dy * w + dx
    before = (copied > grid[inner]) & has_turn.ravel()[copied]
    # What a pixel shows: what pixel i has come to show (i), or what it showed in the beginning (i +
    # n).
    shows = grid.ravel() + n
    shows[grid[inner]] = np.where(before, copied, copied + n)
    while len(chained := np.flatnonzero(shows < n)):
        shows[chained] = shows[shows[chained]]
    return shows - n


def _motion_blur(image: Pixels, rng: np.random.Generator, radius: int, sigma: float) -> Result:
    return _moved(image.astype(np.float32), radius, sigma, rng.uniform(-45, 45))


def _moved(
    x: Float32[np.ndarray, "h w *c"], radius: int, sigma: float, degrees: float
) -> Float32[np.ndarray, "h w *c"]:
    """The trail of a movement: half a Gaussian along a line, in whole pixels, as ImageMagick draws
    it.
    """
    weights = np.exp(-0.5 * (np.arange(2 * radius + 1) / sigma) ** 2)
    kernel = np.zeros((4 * radius + 1, 4 * radius + 1))
    for i, weight in enumerate(weights / weights.sum()):
        dy, dx = (math.ceil(i * f(math.radians(degrees)) - 0.5) for f in (math.sin, math.cos))
        if abs(dy) >= x.shape[0] or abs(dx) >= x.shape[1]:
            break
        kernel[2 * radius + dy, 2 * radius + dx] += weight
    return cv2.filter2D(x, -1, kernel, borderType=cv2.BORDER_REPLICATE)


def _zoom_blur(image: Pixels, rng: np.random.Generator, stop: float, step: float) -> Result:
    """The mean of the image and of those zoomed in more and more."""
    x = image.astype(np.float32)
    h, w = image.shape[:2]
    factors = np.arange(1, stop, step)
    return sum((_zoomed(x, factor)[:h, :w] for factor in factors), x) / (len(factors) + 1)


def _zoomed(x: Float32[np.ndarray, "h w *c"], factor: float) -> Float32[np.ndarray, "h2 w2 *c"]:
    """The middle of an image enlarged bilinearly, corner pixels onto corner pixels, to at least the
    image's size.
    """
    matrix = np.zeros((2, 3))
    size = []
    for axis, side in ((1, x.shape[0]), (0, x.shape[1])):
        part = math.ceil(side / factor)
        size.append(round(part * factor))
        matrix[axis, axis] = (part - 1) / max(size[-1] - 1, 1)
        matrix[axis, 2] = (side - part) // 2
    flags = cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP
    return cv2.warpAffine(
        x, matrix, (size[1], size[0]), flags=flags, borderMode=cv2.BORDER_REPLICATE
    )


# --- Weather --------------------------------------------------------------------------------------


def _snow(
    image: Pixels,
    rng: np.random.Generator,
    mean: float,
    deviation: float,
    zoom: float,
    threshold: float,
    radius: int,
    sigma: float,
    colour: float,
) -> Result:
    """Flakes that fall from either side, over an image that has lost colour to white."""
    h, w = image.shape[:2]
    flakes = _zoomed(rng.normal(mean, deviation, (h, w)).astype(np.float32), zoom)
    flakes = np.clip(np.where(flakes < threshold, np.float32(0), flakes), 0, 1)
    flakes = np.round(255 * _moved(flakes, radius, sigma, rng.uniform(-135, -45)))[:h, :w]
    x = image.astype(np.float32)
    pale = np.maximum(x, 1.5 * cv2.cvtColor(x, cv2.COLOR_RGB2GRAY)[..., None] + 127.5)
    return colour * x + (1 - colour) * pale + (flakes + np.rot90(flakes, 2))[..., None]


def _frost(image: Pixels, rng: np.random.Generator, light: float, ice: float) -> Result:
    """Behind ice: a random part of one of the pictures, enlarged until it covers the image."""
    h, w = image.shape[:2]
    texture = frost_texture(int(rng.integers(FROSTS)))
    factor = 1.1 * max(1, h / texture.shape[0], w / texture.shape[1])
    size = math.ceil(factor * texture.shape[1]), math.ceil(factor * texture.shape[0])
    texture = cv2.resize(texture, size, interpolation=cv2.INTER_CUBIC)
    top = rng.integers(0, texture.shape[0] - h)
    left = rng.integers(0, texture.shape[1] - w)
    return light * image.astype(np.float32) + ice * texture[top : top + h, left : left + w].astype(
        np.float32
    )


# Mean colour (RGB, 0-255), contrast (standard deviation), number of crystals and their length in
# pixels.
_ICE = (
    ((92, 146, 164), 19, 1400, 40),
    ((201, 205, 214), 22, 1800, 40),
    ((196, 201, 209), 25, 2400, 28),
    ((140, 153, 165), 29, 2400, 24),
    ((112, 123, 135), 42, 1800, 32),
)
FROSTS = len(_ICE)


@functools.cache
def frost_texture(number: int) -> UInt8[np.ndarray, "360 600 3"]:
    """A picture of ice on a window: feathers, each a stem with barbs at 60 degrees, over clouds.

    Args:
        number: 0 to `FROSTS` - 1.
    """
    colour, deviation, crystals, length = _ICE[number]
    rng = np.random.default_rng(number)
    h = 360
    w = 600
    clouds = _clouds(1024, 1.2, rng)[:h, :w]
    feathers = np.full((h, w), 128, np.uint8)
    # Long ones first, so that short ones stay visible on them.
    for size in np.sort(length * rng.pareto(2.5, crystals).clip(0.15, 5))[::-1]:
        angle = rng.uniform(0, 2 * np.pi)
        root = rng.uniform(-20, (w + 20, h + 20))
        shade = rng.integers(60, 200)
        along = np.arange(0, size, 2)
        stem = root + along[:, None] * (np.cos(angle), np.sin(angle))
        reach = (
            rng.uniform(0.15, 0.4)
            * size
            * np.sin(np.pi * along / size)
            * rng.uniform(0.4, 1, (2, len(along)))
        )
        turned = angle + np.pi / 3 * np.array([[1], [-1]])
        barbs = np.stack(
            [
                stem + reach[..., None] * np.stack([np.cos(turned), np.sin(turned)], -1),
                np.stack([stem, stem]),
            ],
            2,
        )
        lines = np.round(
            16 * np.concatenate([barbs.reshape(-1, 2, 2), stem[None, [0, -1]]])
        ).astype(np.int32)
        rng.shuffle(lines)
        for i in range(4):  # shades of lines
            color = int(np.clip(shade + rng.integers(-55, 56), 0, 255))
            cv2.polylines(feathers, list(lines[i::4]), False, color, 1, cv2.LINE_AA, 4)

    def normal(x):
        return (x - x.mean()) / x.std()

    relief = normal(
        normal(clouds) + normal(cv2.GaussianBlur(feathers.astype(np.float32), (0, 0), 0.5))
    )
    return np.clip(np.array(colour) + deviation * relief[..., None], 0, 255).astype(np.uint8)


def _fog(image: Pixels, rng: np.random.Generator, thickness: float, decay: float) -> Result:
    """Clouds added, and the brightest value kept."""
    h, w = image.shape[:2]
    brightest = image.max() / 255
    clouds = _clouds(1 << (max(image.shape) - 1).bit_length(), decay, rng)[:h, :w, None]
    return (image + 255 * thickness * clouds) * np.float32(brightest / (brightest + thickness))


def _clouds(side: int, decay: float, rng: np.random.Generator) -> Float32[np.ndarray, "side side"]:
    """Values of 0 to 1 by the diamond-square algorithm on a torus, its `side` a power of 2; every
    octave is `decay`^2 times weaker.
    """
    height = np.zeros((side, side), np.float32)
    roughness = 100.0

    def middle(total: Float32[np.ndarray, "n n"]) -> Float[np.ndarray, "n n"]:
        """The mean of four neighbours, whose sum is given, and something random."""
        return total / 4 + roughness * rng.uniform(-roughness, roughness, total.shape)

    step = side
    while step > 1:
        corners = height[::step, ::step]
        centres = height[step // 2 :: step, step // 2 :: step]
        pairs = corners + np.roll(corners, -1, 0)
        centres[:] = middle(pairs + np.roll(pairs, -1, 1))
        height[::step, step // 2 :: step] = middle(
            centres + np.roll(centres, 1, 0) + corners + np.roll(corners, -1, 1)
        )
        height[step // 2 :: step, ::step] = middle(
            centres + np.roll(centres, 1, 1) + corners + np.roll(corners, -1, 0)
        )
        step = step // 2
        roughness = roughness / decay
    height -= height.min()
    return height / height.max()


# --- Digital --------------------------------------------------------------------------------------


def _brightness(image: Pixels, rng: np.random.Generator, shift: float) -> Result:
    """Shifts the V of HSV; hue and saturation stay, so all channels grow by the same factor."""
    value = image.max(axis=-1, keepdims=True).astype(np.float32)
    new = np.minimum(value + np.float32(255 * shift), 255)
    return np.where(value > 0, image * (new / np.maximum(value, 1)), new)


def _contrast(image: Pixels, rng: np.random.Generator, factor: float) -> Result:
    means = image.mean(axis=(0, 1), keepdims=True)
    return (image - means) * factor + means


def _saturate(image: Pixels, rng: np.random.Generator, factor: float, shift: float) -> Result:
    """Scales and shifts the S of HSV; hue and value stay. The hue of grey is 0, which is red."""
    value = image.max(axis=-1, keepdims=True).astype(np.float32)
    spread = value - image.min(axis=-1, keepdims=True)
    saturation = np.clip(spread / np.maximum(value, 1) * factor + shift, 0, 1)
    # How far each channel lies below the highest, as a share of the way to the lowest.
    below = np.where(
        spread > 0, (value - image) / np.maximum(spread, 1), np.array((0, 1, 1), np.float32)
    )
    return value * (1 - saturation * below)


def _elastic_transform(image: Pixels, rng: np.random.Generator, strength: float) -> Result:
    """Pixels moved by smooth random fields, of the scale of a hundredth of each side."""
    h, w = image.shape[:2]
    widths = tuple(2 * int(0.03 * side + 0.5) + 1 for side in (w, h))
    dx, dy = (
        cv2.GaussianBlur(
            rng.uniform(-0.005 * h, 0.005 * h, (h, w)),
            widths,
            0.01 * w,
            sigmaY=0.01 * h,
            borderType=cv2.BORDER_REFLECT,
        )
        for _ in range(2)
    )
    x, y = np.meshgrid(np.arange(w), np.arange(h))
    at_x = (x + strength * dx).astype(np.float32)
    at_y = (y + strength * dy).astype(np.float32)
    return cv2.remap(
        image.astype(np.float32), at_x, at_y, cv2.INTER_LINEAR, borderMode=cv2.BORDER_REFLECT
    )


def _pixelate(image: Pixels, rng: np.random.Generator, factor: float) -> Result:
    h, w = image.shape[:2]
    small = Image.fromarray(image).resize(
        (max(1, int(w * factor)), max(1, int(h * factor))), Image.Resampling.BOX
    )
    return np.array(small.resize((w, h), Image.Resampling.NEAREST))


def _jpeg_compression(image: Pixels, rng: np.random.Generator, quality: int) -> Result:
    file = io.BytesIO()
    Image.fromarray(image).save(file, "JPEG", quality=quality)
    return np.array(Image.open(file))


# --- Frequencies ----------------------------------------------------------------------------------


def _high_pass_filter(image: Pixels, rng: np.random.Generator, share: float) -> Result:
    """The absolute value of what is left without long waves: those of which fewer fit into the
    image than pixels into this share of its height.
    """
    h, w = image.shape[:2]
    down = np.fft.fftfreq(h, 1 / h)[:, None]
    across = np.fft.rfftfreq(w, 1 / w)
    short = down**2 + across**2 >= int(share * h) ** 2
    return np.abs(_image(_spectrum(image) * short[..., None], (h, w)))


def _phase_scaling(image: Pixels, rng: np.random.Generator, factor: float) -> Result:
    """The phase of every wave is multiplied by the factor; amplitudes stay."""
    spectrum = _spectrum(image)
    turned = np.exp(1j * (np.float32(factor) * np.angle(spectrum)))
    return _image(np.abs(spectrum) * turned, image.shape[:2])


def _spectrum(image: Pixels) -> Complex64[np.ndarray, "h w2 3"]:
    """Waves along both axes; of a real image half of them tell all."""
    return np.fft.rfft2(image.astype(np.float32), axes=(0, 1))


def _image(
    spectrum: Complex64[np.ndarray, "h w2 3"], size: tuple[int, ...]
) -> Float32[np.ndarray, "h w 3"]:
    """The inverse of `_spectrum`, for an image of `size`."""
    return np.fft.irfft2(spectrum, size, axes=(0, 1))


# By the publications' names and in their order: the function and its constants at severities 1 to
# 5.
_COMMON: dict[str, tuple[Callable[..., Result], tuple[tuple[Any, ...], ...]]] = {
    "gaussian_noise": (_gaussian_noise, ((0.08,), (0.12,), (0.18,), (0.26,), (0.38,))),
    "shot_noise": (_shot_noise, ((60.0,), (25.0,), (12.0,), (5.0,), (3.0,))),
    "impulse_noise": (_impulse_noise, ((0.03,), (0.06,), (0.09,), (0.17,), (0.27,))),
    "defocus_blur": (_defocus_blur, ((3, 0.1), (4, 0.5), (6, 0.5), (8, 0.5), (10, 0.5))),
    "glass_blur": (_glass_blur, ((0.7, 1, 2), (0.9, 2, 1), (1.0, 2, 3), (1.1, 3, 2), (1.5, 4, 2))),
    "motion_blur": (_motion_blur, ((10, 3.0), (15, 5.0), (15, 8.0), (15, 12.0), (20, 15.0))),
    "zoom_blur": (
        _zoom_blur,
        ((1.11, 0.01), (1.16, 0.01), (1.21, 0.02), (1.26, 0.02), (1.31, 0.03)),
    ),
    "snow": (
        _snow,
        (
            (0.1, 0.3, 3.0, 0.5, 10, 4.0, 0.8),
            (0.2, 0.3, 2.0, 0.5, 12, 4.0, 0.7),
            (0.55, 0.3, 4.0, 0.9, 12, 8.0, 0.7),
            (0.55, 0.3, 4.5, 0.85, 12, 8.0, 0.65),
            (0.55, 0.3, 2.5, 0.85, 12, 12.0, 0.55),
        ),
    ),
    "frost": (_frost, ((1.0, 0.4), (0.8, 0.6), (0.7, 0.7), (0.65, 0.7), (0.6, 0.75))),
    "fog": (_fog, ((1.5, 2.0), (2.0, 2.0), (2.5, 1.7), (2.5, 1.5), (3.0, 1.4))),
    "brightness": (_brightness, ((0.1,), (0.2,), (0.3,), (0.4,), (0.5,))),
    "contrast": (_contrast, ((0.4,), (0.3,), (0.2,), (0.1,), (0.05,))),
    "elastic_transform": (_elastic_transform, ((12.5,), (16.25,), (21.25,), (25.0,), (30.0,))),
    "pixelate": (_pixelate, ((0.6,), (0.5,), (0.4,), (0.3,), (0.25,))),
    "jpeg_compression": (_jpeg_compression, ((25,), (18,), (15,), (10,), (7,))),
}
_KINDS = _COMMON | {
    "speckle_noise": (_speckle_noise, ((0.15,), (0.2,), (0.35,), (0.45,), (0.6,))),
    "gaussian_blur": (_gaussian_blur, ((1.0,), (2.0,), (3.0,), (4.0,), (6.0,))),
    "saturate": (_saturate, ((0.3, 0.0), (0.1, 0.0), (2.0, 0.0), (5.0, 0.1), (20.0, 0.2))),
    "high_pass_filter": (_high_pass_filter, ((0.01,), (0.02,), (0.03,), (0.04,), (0.05,))),
    "phase_scaling": (_phase_scaling, ((0.9,), (0.8,), (0.7,), (0.6,), (0.5,))),
}
KINDS = tuple(_COMMON)
ALL_KINDS = tuple(_KINDS)
