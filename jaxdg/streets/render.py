"""Generated street scenes with the 19 Cityscapes classes: the dataset that needs no download.

A world (street, houses, traffic, people) depends on (seed, index) alone. Its five appearances
differ in light and weather, so label map and boxes are the same for all. `clear` is the source
domain; `night`, `rain`, `fog` and `dusk_rain` are the unseen ones. The geometry is in metres in
front of a pinhole camera, so every picture size shows the same street.

`ground`, `place` and `traffic` make the worlds, `shapes` the things in them, `draw` and `light`
the pictures.
"""

from dataclasses import dataclass

import numpy as np

from jaxdg.streets.draw import paint, rasterize
from jaxdg.streets.light import develop, look
from jaxdg.streets.traffic import Street

APPEARANCES = ("clear", "night", "rain", "fog", "dusk_rain")
SMALLEST_BOX = 16  # visible pixels below which an object is labelled but gets no box


@dataclass(frozen=True)
class Scene:
    """A picture with its label map and boxes.

    Attributes:
        image: uint8 [h, w, 3], RGB.
        label: uint8 [h, w], Cityscapes train ids 0..18; every pixel has one.
        boxes: float32 [n, 4], x0 y0 x1 y1 in pixels, tight around an object's visible pixels (x1
            and y1 exclusive), nearest objects last.
        box_labels: int32 [n], train ids: traffic light, traffic sign and person .. bicycle. Objects
            under 16 visible pixels have no box.
    """

    image: np.ndarray
    label: np.ndarray
    boxes: np.ndarray
    box_labels: np.ndarray


def render(
    seed: int, index: int, appearance: str = "clear", size: tuple[int, int] = (256, 512)
) -> Scene:
    """Renders a street, bit-identical in every run.

    Args:
        seed: number of the dataset, 0 or more; other seeds are other streets.
        index: number of the scene, 0 or more.
        appearance: one of `APPEARANCES`; changes the image only.
        size: height and width in pixels, from about 96 x 192 upward.

    Returns:
        The scene.

    Raises:
        ValueError: the appearance is unknown.
    """
    if appearance not in APPEARANCES:
        raise ValueError(f"unknown appearance {appearance!r}; allowed are {', '.join(APPEARANCES)}")
    street = Street(np.random.default_rng((seed, index, 0)), size)
    raster = rasterize(street.mesh, street.camera)
    label = raster.label.astype(np.uint8).take(raster.ids)
    boxes, box_labels = _boxes(raster.object.take(raster.ids), street.mesh.objects)
    rng = np.random.default_rng((seed, index, 1 + APPEARANCES.index(appearance)))
    light = look(appearance, street.sun, rng)
    image = develop(paint(raster, street.camera), raster, street.mesh, street.camera, light, rng)
    return Scene(image, label, boxes, box_labels)


def _boxes(objects: np.ndarray, labels: list[int]) -> tuple[np.ndarray, np.ndarray]:
    """Tight boxes of the objects (numbered from 1) in a map of object numbers."""
    rows, columns = np.nonzero(objects)
    owner = objects[rows, columns]
    n = len(labels) + 1
    h, w = objects.shape
    low = np.full((n, 2), max(h, w))
    high = np.full((n, 2), -1)
    for k, at in enumerate((columns, rows)):
        np.minimum.at(low[:, k], owner, at)
        np.maximum.at(high[:, k], owner, at)
    visible = np.flatnonzero(np.bincount(owner, minlength=n) >= SMALLEST_BOX)
    boxes = np.concatenate([low, high + 1], 1)[visible].astype(np.float32)
    return boxes, np.array(labels, np.int32)[visible - 1]
