"""Geometric augmentation on the host: random resize, crop and flip, of image and label alike.

Pixels are areas, the centre of pixel i lies at i + 0.5: for the image (bilinear) and for the label (nearest) alike, so that both stay in
register at every scale. Only the crop is computed, never the whole resized image. Photometric augmentation belongs to the training step.
"""

from typing import NamedTuple

import cv2
from jaxtyping import Int, UInt8
import numpy as np

from jaxdg.data.labels import IGNORE

PAD_COLOR = (124, 116, 104)  # ImageNet's mean colour: near zero once normalised
TRIES = 10


class Axis(NamedTuple):
    """Where crop and resized image overlap along one axis, pixels.

    Attributes:
        start: first pixel of the resized image inside the crop.
        inside: the overlap within the crop.
    """

    start: int
    inside: slice


def augment(
    sample: dict[str, np.ndarray],
    *,
    rng: np.random.Generator,
    crop: tuple[int, int],
    scale: tuple[float, float],
    flip: float = 0.5,
    max_class_share: float = 1.0,
) -> dict[str, np.ndarray]:
    """Resizes by a random factor, cuts a random crop and flips it.

    Where the resized image is smaller than the crop it lies anywhere inside it, amid a constant colour and ignored labels.

    Args:
        sample: `image` uint8 [h, w, 3] and `label` uint8 [h, w], 255 where ignored.
        rng: the source of all randomness.
        crop: height and width of the crop, pixels.
        scale: smallest and largest factor, drawn uniformly.
        flip: probability of a horizontal flip.
        max_class_share: the largest share of the labelled pixels that one class may cover, 0-1. Below 1 a crop is drawn again, up to 10
            times, until it shows more than one class and none covers more.

    Returns:
        `image` uint8 [crop height, crop width, 3] and `label` uint8 [crop height, crop width].
    """
    image, label = sample["image"], sample["label"]
    factor = rng.uniform(*scale)
    resized = tuple(max(1, round(n * factor)) for n in label.shape)
    for _ in range(TRIES):
        y, x = (_place(rng, n, c) for n, c in zip(resized, crop, strict=True))
        new_label = np.full(crop, IGNORE, np.uint8)
        rows = _nearest(y, label.shape[0], resized[0])
        columns = _nearest(x, label.shape[1], resized[1])
        new_label[y.inside, x.inside] = label[np.ix_(rows, columns)]
        if max_class_share >= 1.0 or _is_mixed(new_label, max_class_share):
            break
    new_image = np.full((*crop, 3), PAD_COLOR, np.uint8)
    new_image[y.inside, x.inside] = _bilinear(image, resized, y, x)
    if rng.uniform() < flip:
        new_image, new_label = new_image[:, ::-1], new_label[:, ::-1]
    return {"image": np.ascontiguousarray(new_image), "label": np.ascontiguousarray(new_label)}


def _place(rng: np.random.Generator, resized: int, crop: int) -> Axis:
    """The crop anywhere inside the resized image, or, where that is smaller, the image anywhere inside the crop."""
    offset = int(rng.integers(abs(resized - crop) + 1))
    return Axis(offset, slice(0, crop)) if resized >= crop else Axis(0, slice(offset, offset + resized))


def _nearest(axis: Axis, old: int, new: int) -> Int[np.ndarray, " n"]:
    """Indices into an axis of `old` pixels whose areas hold the centres of the visible pixels of the axis resized to `new`."""
    visible = np.arange(axis.start, axis.start + axis.inside.stop - axis.inside.start)
    return (2 * visible + 1) * old // (2 * new)


def _bilinear(image: UInt8[np.ndarray, "h w 3"], resized: tuple[int, ...], y: Axis, x: Axis) -> UInt8[np.ndarray, "wh ww 3"]:
    """The visible part of the resized image; equals `cv2.resize` with INTER_LINEAR up to rounding."""
    ratio_y, ratio_x = image.shape[0] / resized[0], image.shape[1] / resized[1]
    to_source = np.array([[ratio_x, 0, (x.start + 0.5) * ratio_x - 0.5], [0, ratio_y, (y.start + 0.5) * ratio_y - 0.5]])
    shape = (x.inside.stop - x.inside.start, y.inside.stop - y.inside.start)
    flags = cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP
    return np.asarray(cv2.warpAffine(image, to_source, shape, flags=flags, borderMode=cv2.BORDER_REPLICATE), np.uint8)


def _is_mixed(label: UInt8[np.ndarray, "h w"], max_class_share: float) -> bool:
    counts = np.bincount(label.ravel(), minlength=256)[:IGNORE]
    return bool(np.count_nonzero(counts) > 1 and counts.max() <= max_class_share * counts.sum())
