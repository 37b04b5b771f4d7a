"""Geometric augmentation on the host: resize, random scale, crop and flip.

Image, label and boxes are changed alike. Pixels are areas: the centre of pixel i lies at i + 0.5,
for the image (bilinear without antialiasing, as `cv2.INTER_LINEAR`), for the label (nearest) and
for boxes, so that all stay in register at every scale. Resize and scale are one resampling, which
computes only the crop. Photometric augmentation belongs to the training step.

Crops are drawn as mmsegmentation's RandomCrop draws them, those of a rare class as DAFormer's
(Hoyer et al. 2022, lhoyer/DAFormer). With `keep_ratio` and scales of 0.1 to 2 this is detectron2's
large-scale jitter, except that a small image lies anywhere in the crop instead of in its corner.
Scales of 0.5 to 2 without `resize` are tqdm's resize by a factor of the image's own size, whose
sides are rounded to the nearest pixel here and first down there. `shortest_sides` is
mmsegmentation's RandomChoiceResize with ResizeShortestEdge, as Rein and SoMA have it.

With `padding` "corner" a crop is padded as mmsegmentation pads it: on the right and at the bottom,
after the flip, and with 0 after normalisation. A uint8 colour could not be that 0: the mean colour
is no whole number, and photometric augmentation follows. So the crop comes with the height and
width that the image has `inside` it, and the training step blanks the rest, see
`photometric.blank`.
"""

import dataclasses
from typing import Literal, NamedTuple

import cv2
from jaxtyping import Float, Int, UInt8
import numpy as np

from jaxdg.data.box_fields import areas_of, rounded
from jaxdg.data.labels import IGNORE

PAD_COLOR = (124, 116, 104)  # ImageNet's mean colour: near zero once normalised
TRIES = 10
BOX_FIELDS = {  # shape and type of the fields of one box
    "boxes": ((4,), np.float32),
    "classes": ((), np.int32),
    "difficult": ((), np.bool_),
    "crowd": ((), np.bool_),
    "areas": ((), np.float32),
}


@dataclasses.dataclass(frozen=True)
class Augmentation:
    """How a training crop is made from an image.

    Attributes:
        crop: height and width, pixels.
        resize: height and width every image is resized to before the random scale; None keeps its
            own.
        keep_ratio: resizes to the largest size of the image's own ratio that fits into `resize`.
        scale: smallest and largest factor on top of that, drawn uniformly.
        shortest_sides: lengths in pixels of which one is drawn instead; the shorter side gets it,
            the ratio stays. Empty: as above.
        longest_side: no side gets longer than this by that, pixels; None for any length.
        padding: where an image lies that is smaller than the crop: "around", anywhere inside it, or
            in the upper left "corner".
        flip: probability of a horizontal flip.
        max_class_share: the share of the labelled pixels that no class may cover, 0-1. Below 1 a
            crop is drawn again, up to 10 times, until it shows more than one class and each covers
            less.
        rare_class_min_crop_ratio: the crop of a wanted class is drawn again with its resize, up to
            10 times, until the class covers more than this many times the wanted pixels, counted in
            the crop. None: only the crop is drawn again, and pixels count at the size of the file.
        randaugment: number of operations and their magnitude, 0-10, see `randaugment.py`; they
            follow the crop.
        pixmix: highest number of rounds and beta, see `pixmix.py`; it follows RandAugment.
        pictures: folder of pictures to mix in and to take styles from; None generates them.
    """

    crop: tuple[int, int]
    resize: tuple[int, int] | None = None
    keep_ratio: bool = False
    scale: tuple[float, float] = (1.0, 1.0)
    shortest_sides: tuple[int, ...] = ()
    longest_side: int | None = None
    padding: Literal["around", "corner"] = "around"
    flip: float = 0.5
    max_class_share: float = 1.0
    rare_class_min_crop_ratio: float | None = None
    randaugment: tuple[int, float] = (0, 0.0)
    pixmix: tuple[int, float] = (0, 0.0)
    pictures: str | None = None


@dataclasses.dataclass(frozen=True)
class Fit:
    """Resizes an image to fit into a black picture, in its upper left corner.

    The image keeps its ratio of sides, and boxes keep the coordinates of the file.

    Attributes:
        size: height and width, pixels.
    """

    size: tuple[int, int]

    def inside(self, size: tuple[int, int]) -> tuple[int, int]:
        """Height and width that an image of `size` is resized to."""
        factor = min(new / old for new, old in zip(self.size, size, strict=True))
        return max(1, round(size[0] * factor)), max(1, round(size[1] * factor))

    def sizes(self, size: tuple[int, int]) -> tuple[tuple[int, int], tuple[int, int]]:
        """As `protocols.Protocol.sizes`: all images get one size."""
        return self.size, self.size

    def prepare(self, sample: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """The sample with its `image` uint8 [h, w, 3] resized."""
        h, w = self.inside(sample["image"].shape[:2])
        image = np.zeros((*self.size, 3), np.uint8)
        image[:h, :w] = cv2.resize(sample["image"], (w, h), interpolation=cv2.INTER_LINEAR)
        return {**sample, "image": image}


class Wanted(NamedTuple):
    """What a crop should show.

    Attributes:
        train_id: a class.
        pixels: how many of it, counted at the size of the file.
    """

    train_id: int
    pixels: int


class Axis(NamedTuple):
    """Where crop and resized image overlap along one axis, pixels.

    Attributes:
        old: length of the image.
        new: length of the resized image.
        start: first pixel of the resized image inside the crop.
        inside: the overlap within the crop.
    """

    old: int
    new: int
    start: int
    inside: slice


class Place(NamedTuple):
    """A crop of a resized image.

    Attributes:
        y: of its rows.
        x: of its columns.
        label: uint8 [crop height, crop width]; None without a label map.
    """

    y: Axis
    x: Axis
    label: UInt8[np.ndarray, "ch cw"] | None


def random_crop(
    sample: dict[str, np.ndarray],
    augmentation: Augmentation,
    rng: np.random.Generator,
    wanted: Wanted | None = None,
) -> dict[str, np.ndarray]:
    """Resizes by a random factor, cuts a random crop and flips it.

    Where the resized image is smaller than the crop it lies anywhere inside it or in its corner,
    amid a constant colour and ignored labels.

    Args:
        sample: `image` uint8 [h, w, 3] with `label` uint8 [h, w], 255 where ignored, or with the
            fields of `move_boxes`.
        augmentation: the ranges of the draws.
        rng: the source of all randomness.
        wanted: a crop is drawn again, up to 10 times, until it shows this.

    Returns:
        The same fields of the crop; and with `padding` "corner" `inside` int32 [2], the height and
        width of the image in the upper left corner of the crop.
    """
    a = augmentation
    image = sample["image"]
    y, x, label = _draw(sample, a, rng, wanted)
    result = {} if label is None else {"label": label}
    result["image"] = _crop_image(image, y, x, a.crop)
    to_crop = np.array([
        [x.new / x.old, 0, x.inside.start - x.start],
        [0, y.new / y.old, y.inside.start - y.start],
    ])  # fmt: skip
    corner = a.padding == "corner"
    if rng.uniform() < a.flip:
        # What lies in the corner stays there.
        width = x.inside.stop if corner else a.crop[1]
        for array in result.values():
            array[:, :width] = array[:, :width][:, ::-1].copy()
        to_crop[0] = [-to_crop[0, 0], 0, width - to_crop[0, 2]]
    if "boxes" in sample:
        result |= move_boxes(sample, to_crop, a.crop)
    if corner:
        result["inside"] = np.array((y.inside.stop, x.inside.stop), np.int32)
    return {key: np.ascontiguousarray(array) for key, array in result.items()}


def move_boxes(
    sample: dict[str, np.ndarray], matrix: Float[np.ndarray, "2 3"], size: tuple[int, int]
) -> dict[str, np.ndarray]:
    """Boxes under an affine map: upright again, clipped, and dropped if under a pixel wide or high.

    Args:
        sample: `boxes` float32 [n, 4], x0 y0 x1 y1 in pixels; `classes` int32, `difficult` bool and
            `crowd` bool, all [n]; maybe `areas` float32 [n], square pixels of the objects in the
            boxes, else those of the boxes count.
        matrix: from old to new coordinates, (x, y, 1) to (x, y).
        size: height and width they are clipped to, pixels.

    Returns:
        The five fields of the boxes that remain. An area shrinks like its clipped box.
    """
    x0, y0, x1, y1 = sample["boxes"].T.astype(np.float64)
    corners = np.array([[x0, x1, x0, x1], [y0, y0, y1, y1]])
    moved = np.tensordot(matrix[:, :2], corners, 1) + matrix[:, 2, None, None]
    low = moved.min(1)
    high = moved.max(1)
    boxes = np.concatenate([low, high]).T.clip(0, [*size[::-1], *size[::-1]])
    keep = (boxes[:, 2:] - boxes[:, :2] >= 1).all(1)
    before = np.maximum(np.prod(high - low, axis=0), 1e-9)
    visible = np.prod(boxes[:, 2:] - boxes[:, :2], axis=1) / before
    scale = abs(np.linalg.det(matrix[:, :2]))
    areas = rounded(sample.get("areas", areas_of(sample["boxes"])) * visible * scale)
    new = {**sample, "boxes": boxes.astype(np.float32), "areas": areas}
    return {key: new[key][keep] for key in BOX_FIELDS}


def shortest_side_size(size: tuple[int, ...], side: int, longest: int | None) -> tuple[int, ...]:
    """Height and width of an image whose shorter side gets a length and that keeps its ratio.

    As in mmsegmentation: the longer side is capped, both are rounded half up, and the image gets
    the largest size of its ratio that fits into that, rounded likewise.

    Args:
        size: of the image.
        side: length of the shorter side.
        longest: the longer side is at most so long, and the shorter one follows; None for any.
    """
    shorter = min(size)
    wanted = [side if n == shorter else side / shorter * n for n in size]
    if longest is not None and max(wanted) > longest:
        wanted = [n * (longest / max(wanted)) for n in wanted]
    box = [int(n + 0.5) for n in wanted]
    factor = min(max(box) / max(size), min(box) / min(size))
    return tuple(max(1, int(n * factor + 0.5)) for n in size)


def _draw(
    sample: dict[str, np.ndarray],
    a: Augmentation,
    rng: np.random.Generator,
    wanted: Wanted | None,
) -> Place:
    """A resize and a crop; drawn anew, up to 10 times, while there is too little of what is wanted
    by `rare_class_min_crop_ratio`. The last is taken as it comes.
    """
    old = sample["image"].shape[:2]
    label = sample.get("label")
    ratio = a.rare_class_min_crop_ratio
    if wanted is None or ratio is None or label is None:
        return _draw_crop(old, _draw_size(old, a, rng), label, a, rng, wanted)
    for _ in range(TRIES):
        place = _draw_crop(old, _draw_size(old, a, rng), label, a, rng, None)
        if np.count_nonzero(place.label == wanted.train_id) > wanted.pixels * ratio:
            return place
    return _draw_crop(old, _draw_size(old, a, rng), label, a, rng, None)


def _draw_size(old: tuple[int, ...], a: Augmentation, rng: np.random.Generator) -> tuple[int, ...]:
    if a.shortest_sides:
        side = a.shortest_sides[rng.integers(len(a.shortest_sides))]
        return shortest_side_size(old, side, a.longest_side)
    factor = rng.uniform(*a.scale)
    return tuple(max(1, round(n * factor)) for n in _base_size(old, a))


def _base_size(size: tuple[int, ...], a: Augmentation) -> tuple[int | float, ...]:
    if a.resize is None:
        return size
    fit = min(a.resize[0] / size[0], a.resize[1] / size[1])
    return (size[0] * fit, size[1] * fit) if a.keep_ratio else a.resize


def _draw_crop(
    old: tuple[int, ...],
    new: tuple[int, ...],
    label: UInt8[np.ndarray, "h w"] | None,
    a: Augmentation,
    rng: np.random.Generator,
    wanted: Wanted | None,
) -> Place:
    """A crop of the image resized from `old` to `new`; the first good one of 10, else another."""
    area = new[0] * new[1] / (old[0] * old[1])

    def place() -> tuple[Axis, Axis]:
        y, x = (_place(rng, *lengths, a.padding) for lengths in zip(old, new, a.crop, strict=True))
        return y, x

    if label is None:
        return Place(*place(), None)
    for _ in range(TRIES):
        y, x = place()
        cropped = _crop_label(label, y, x, a.crop)
        if _is_good(cropped, a.max_class_share, wanted, area):
            return Place(y, x, cropped)
    y, x = place()
    return Place(y, x, _crop_label(label, y, x, a.crop))


def _place(rng: np.random.Generator, old: int, new: int, crop: int, padding: str) -> Axis:
    """Places the crop inside the resized image at random, or the image inside a larger crop."""
    if new >= crop:
        return Axis(old, new, int(rng.integers(new - crop + 1)), slice(0, crop))
    offset = 0 if padding == "corner" else int(rng.integers(crop - new + 1))
    return Axis(old, new, 0, slice(offset, offset + new))


def _crop_label(
    label: UInt8[np.ndarray, "h w"], y: Axis, x: Axis, crop: tuple[int, int]
) -> UInt8[np.ndarray, "ch cw"]:
    result = np.full(crop, IGNORE, np.uint8)
    result[y.inside, x.inside] = label.take(_nearest(y), 0).take(_nearest(x), 1)
    return result


def _nearest(axis: Axis) -> Int[np.ndarray, " n"]:
    """Indices of the old pixels that hold the centres of the visible pixels of the resized axis."""
    visible = np.arange(axis.start, axis.start + axis.inside.stop - axis.inside.start)
    return (2 * visible + 1) * axis.old // (2 * axis.new)


def _crop_image(
    image: UInt8[np.ndarray, "h w 3"], y: Axis, x: Axis, crop: tuple[int, int]
) -> UInt8[np.ndarray, "ch cw 3"]:
    """The visible part equals `cv2.resize` with INTER_LINEAR up to rounding."""
    ratio_y = y.old / y.new
    ratio_x = x.old / x.new
    shift_x = (x.start + 0.5) * ratio_x - 0.5
    shift_y = (y.start + 0.5) * ratio_y - 0.5
    to_source = np.array([[ratio_x, 0, shift_x], [0, ratio_y, shift_y]])
    shape = (x.inside.stop - x.inside.start, y.inside.stop - y.inside.start)
    flags = cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP
    result = np.full((*crop, 3), PAD_COLOR, np.uint8)
    result[y.inside, x.inside] = cv2.warpAffine(
        image, to_source, shape, flags=flags, borderMode=cv2.BORDER_REPLICATE
    )
    return result


def _is_good(
    label: UInt8[np.ndarray, "h w"], max_class_share: float, wanted: Wanted | None, area: float
) -> bool:
    """Whether a crop is mixed enough and shows enough pixels of the wanted class.

    `area` is the area of a pixel of the file in pixels of the crop.
    """
    if wanted is not None and np.count_nonzero(label == wanted.train_id) < wanted.pixels * area:
        return False
    if max_class_share >= 1.0:
        return True
    counts = np.bincount(label.ravel(), minlength=256)[:IGNORE]
    return bool(np.count_nonzero(counts) > 1 and counts.max() < max_class_share * counts.sum())
