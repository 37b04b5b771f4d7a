"""PixMix (Hendrycks et al. 2022): an image mixed with pictures and augmented copies of itself.

The numbers are those of the authors' code for ImageNet (andyzoujm/pixmix, imagenet.py): k 4, beta
4, base augmentations of severity 1. There are two differences. Base augmentations that move pixels
(rotation, shear, translation) are left out, because label map and boxes would not fit the moved
copy. The pictures are those of `fractals.py`. Only the image is changed, on the host.
"""

from collections.abc import Callable

import cv2
from jaxtyping import Float32, UInt8
import numpy as np
from PIL import Image, ImageOps

from jaxdg.data.augment.fractals import Pictures

SEVERITY = 1.0  # base augmentations draw a level of 0.1 to this; 10 would be their strongest

BASE: dict[str, Callable[[Image.Image, float], Image.Image]] = {
    "auto_contrast": lambda image, level: ImageOps.autocontrast(image),
    "equalize": lambda image, level: ImageOps.equalize(image),
    "posterize": lambda image, level: ImageOps.posterize(image, 4 - int(0.4 * level)),
    "solarize": lambda image, level: ImageOps.solarize(image, 256 - int(25.6 * level)),
}


def pixmix(
    image: UInt8[np.ndarray, "h w 3"],
    k: int,
    beta: float,
    pictures: Pictures,
    rng: np.random.Generator,
) -> UInt8[np.ndarray, "h w 3"]:
    """Mixes 0 to k times with a picture or an augmented copy, by adding or multiplying.

    Args:
        image: RGB.
        k: highest number of rounds; 0 returns the image as it is.
        beta: of the Beta distributions; the larger, the less is mixed in.
        pictures: one is drawn for an image.
        rng: the source of all randomness.

    Returns:
        The mixed image.
    """
    if not k:
        return image
    picture = None
    mixed = unit(augment(image, rng) if rng.integers(2) else image)
    for _ in range(rng.integers(k + 1)):
        if rng.integers(2):
            other = augment(image, rng)
        else:
            picture = other = pictures.draw(image.shape[:2], rng) if picture is None else picture
        mix = add if rng.integers(2) else multiply
        mixed = np.clip(mix(mixed, unit(other), *weights(beta, rng)), 0, 1)
    return np.rint(255 * mixed).astype(np.uint8)


def unit(image: UInt8[np.ndarray, "h w 3"]) -> Float32[np.ndarray, "h w 3"]:
    """Values of 0 to 1."""
    return image.astype(np.float32) * np.float32(1 / 255)


def augment(
    image: UInt8[np.ndarray, "h w 3"], rng: np.random.Generator
) -> UInt8[np.ndarray, "h w 3"]:
    """A copy under one of `BASE`."""
    change = list(BASE.values())[rng.integers(len(BASE))]
    return np.array(change(Image.fromarray(image), rng.uniform(0.1, SEVERITY)))


def weights(beta: float, rng: np.random.Generator) -> tuple[float, float]:
    """The weights of the two images: at most 1 each, or more than 1 and a negative one."""
    if rng.integers(2):
        return float(rng.beta(beta, 1)), float(rng.beta(1, beta))
    return 1 + float(rng.beta(1, beta)), -float(rng.beta(1, beta))


def add(
    one: Float32[np.ndarray, "h w 3"], other: Float32[np.ndarray, "h w 3"], a: float, b: float
) -> Float32[np.ndarray, "h w 3"]:
    """(a (2x - 1) + b (2y - 1) + 1) / 2: a weighted sum of images in -1 to 1."""
    return cv2.addWeighted(one, a, other, b, (1 - a - b) / 2)


def multiply(
    one: Float32[np.ndarray, "h w 3"], other: Float32[np.ndarray, "h w 3"], a: float, b: float
) -> Float32[np.ndarray, "h w 3"]:
    """(2x)^a (2y)^b / 2: a weighted geometric mean of images in 0 to 2.

    Black in y is taken as nearly black, because a power of 0 may be infinite.
    """
    return 0.5 * cv2.pow(2 * one, a) * cv2.pow(np.maximum(2 * other, np.float32(1e-37)), b)
