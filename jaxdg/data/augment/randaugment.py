"""RandAugment (Cubuk et al. 2020, Table 1, with their AutoAugment ranges), on the host.

It draws a few of the paper's 14 operations, the identity among them, with replacement and applies
them one after another with one magnitude. Operations on colour are Pillow's and change the image
alone. Shear, translation and rotation move image (bilinear), label (nearest) and boxes alike;
pixels from outside the image are padding.

Ranges at magnitude 10, where the sign is random: shear 0.3, translation 150/331 of the side,
rotation 30 degrees, strength of brightness, colour, contrast and sharpness 1 +- 0.9; posterising
keeps 4 bits, solarising inverts everything.
"""

from collections.abc import Callable
import math

import cv2
from jaxtyping import Float, UInt8
import numpy as np
from PIL import Image, ImageEnhance, ImageOps

from jaxdg.data.augment.transforms import PAD_COLOR, move_boxes
from jaxdg.data.labels import IGNORE

# Each takes a strength of 0 to 1, negative for half of the draws.
COLOR: dict[str, Callable[[Image.Image, float], Image.Image]] = {
    "identity": lambda image, strength: image,
    "auto_contrast": lambda image, strength: ImageOps.autocontrast(image),
    "equalize": lambda image, strength: ImageOps.equalize(image),
    "posterize": lambda image, strength: ImageOps.posterize(image, 8 - round(4 * abs(strength))),
    "solarize": lambda image, strength: ImageOps.solarize(image, 256 - round(256 * abs(strength))),
    "brightness": (
        lambda image, strength: ImageEnhance.Brightness(image).enhance(1 + 0.9 * strength)
    ),
    "color": lambda image, strength: ImageEnhance.Color(image).enhance(1 + 0.9 * strength),
    "contrast": lambda image, strength: ImageEnhance.Contrast(image).enhance(1 + 0.9 * strength),
    "sharpness": lambda image, strength: ImageEnhance.Sharpness(image).enhance(1 + 0.9 * strength),
}
GEOMETRY = ("shear_x", "shear_y", "translate_x", "translate_y", "rotate")
OPERATIONS = (*COLOR, *GEOMETRY)


def randaugment(
    sample: dict[str, np.ndarray], operations: int, magnitude: float, rng: np.random.Generator
) -> dict[str, np.ndarray]:
    """Applies random operations.

    Args:
        sample: as for `transforms.random_crop`.
        operations: how many.
        magnitude: 0 to 10; at 0 only `auto_contrast` and `equalize` still change the image.
        rng: the source of all randomness.

    Returns:
        The same fields.
    """
    for _ in range(operations):
        name = OPERATIONS[rng.integers(len(OPERATIONS))]
        sample = apply(sample, name, magnitude / 10 * rng.choice((-1, 1)))
    return sample


def apply(sample: dict[str, np.ndarray], name: str, strength: float) -> dict[str, np.ndarray]:
    """One operation.

    Args:
        sample: as for `transforms.random_crop`.
        name: one of `OPERATIONS`.
        strength: -1 to 1; a positive one moves to the right or down, or turns counter-clockwise.

    Returns:
        The same fields.
    """
    if name in COLOR:
        image = COLOR[name](Image.fromarray(sample["image"]), strength)
        return {**sample, "image": np.array(image)}
    h, w = sample["image"].shape[:2]
    matrix = to_new(name, strength, h, w)
    # OpenCV puts pixel centres at integers, boxes and `matrix` at halves.
    centres = matrix.copy()
    centres[:, 2] += 0.5 * matrix[:, :2].sum(1) - 0.5
    new = {**sample, "image": _warp(sample["image"], centres, cv2.INTER_LINEAR, PAD_COLOR)}
    if "label" in sample:
        new["label"] = _warp(sample["label"], centres, cv2.INTER_NEAREST, (IGNORE,))
    if "boxes" in sample:
        new |= move_boxes(sample, matrix, (h, w))
    return new


def to_new(name: str, strength: float, h: int, w: int) -> Float[np.ndarray, "2 3"]:
    """The affine map of old to new coordinates, in pixels from the top left corner.

    Shears keep that corner, rotations the centre.
    """
    if name == "rotate":
        angle = math.radians(30 * strength)
        cos = math.cos(angle)
        sin = math.sin(angle)
        x = w / 2 - cos * w / 2 - sin * h / 2
        y = h / 2 + sin * w / 2 - cos * h / 2
        return np.array([[cos, sin, x], [-sin, cos, y]])
    shear = 0.3 * strength
    shift = 150 / 331 * strength
    maps = {
        "shear_x": [[1, shear, 0], [0, 1, 0]],
        "shear_y": [[1, 0, 0], [shear, 1, 0]],
        "translate_x": [[1, 0, shift * w], [0, 1, 0]],
        "translate_y": [[1, 0, 0], [0, 1, shift * h]],
    }
    return np.array(maps[name], np.float64)


def _warp(
    array: UInt8[np.ndarray, "h w *c"],
    matrix: Float[np.ndarray, "2 3"],
    flags: int,
    fill: tuple[int, ...],
) -> np.ndarray:
    h, w = array.shape[:2]
    return cv2.warpAffine(
        array, matrix, (w, h), flags=flags, borderMode=cv2.BORDER_CONSTANT, borderValue=fill
    )
