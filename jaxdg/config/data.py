"""What a run trains on; apart from the other settings, because commands that look at files alone
need no model code.
"""

import dataclasses
import os
from typing import Annotated, Literal

from annotated_types import Interval

from jaxdg.data.boxes import BoxOptions
from jaxdg.data.datasets import FolderOptions, StreetsOptions
from jaxdg.ranges import Count, CountOrZero, Positive, PositiveOrZero, Share, Size


@dataclasses.dataclass
class DataConfig:
    """What is trained on, and how samples are made from it.

    Attributes:
        source: the domain trained on: `clear` (generated streets), `gta5`, `camvid` or another
            published dataset, a domain described by `folder`, or several joined by `+`. Default
            clear.
        source_weights: how often each of several sources is drawn; () for by their numbers of
            images. Default ().
        skip: text file of paths to leave out with their partners, one a line, relative to `root` or
            absolute; None if unused. Default None.
        mapillary_labels: which classes the ids of Mapillary Vistas mean, those of vltseg or of
            rein. Default vltseg.
        root: folder that holds the datasets as downloaded. Default: $JAXDG_DATA, else `data`.
        workers: processes that read and augment; 0 does it in threads of the main process. Default
            0.
        crop: height and width in pixels of training crops and of the model's windows. Default
            128x128.
        resize: height and width in pixels of every image before the random scale; None keeps its
            own. Default None.
        keep_ratio: resize to the largest size of the image's own ratio that fits into `resize`.
            Default False.
        scale: smallest and largest factor of the random resize before the crop; 0.5 to 2 without
            `resize` are those of tqdm. Default 0.75 to 1.5.
        shortest_sides: lengths in pixels of which one is drawn for every image; it is resized so
            that its shorter side has this length and its ratio stays, as in Rein and SoMA. Takes
            the place of `resize` and of `scale`, which is then 1 to 1. () turns it off. Default ().
        longest_side: with `shortest_sides`: no side gets longer than this, pixels. None for any
            length. Default None.
        padding: where an image lies that is smaller than the crop: around (anywhere in it, amid
            the mean colour, which photometric augmentation changes) or corner (in the upper left
            one, and the rest is 0 after normalisation, as in mmsegmentation). Default around.
        flip: probability of a horizontal flip. Default 0.5.
        max_class_share: a crop is redrawn (at most 10 times) while one class covers this share of
            it; 1 turns it off. Default 1.
        rare_class_temperature: of rare-class sampling; the lower, the more the rarest classes are
            preferred (DAFormer: 0.01). 0 turns it off and shows every image once an epoch. Default
            0.
        rare_class_min_pixels: of the drawn class in an image that is drawn for it. Default 3000.
        rare_class_min_crop_ratio: resize and crop are redrawn (at most 10 times) until the drawn
            class covers more than this times `rare_class_min_pixels` of the crop, as in DAFormer,
            HRDA and tqdm (0.5, 2 and 0.5). None redraws the crop alone until it shows
            `rare_class_min_pixels`, counted at the size of the file. Default None.
        randaugment: number of operations of RandAugment and their magnitude, 0 to 10. Default 0, 0.
        pixmix: most rounds of PixMix, its k, and beta, the larger of which the less is mixed in; 4,
            4 are its authors'. Default 0, 0.
        pictures: folder of images that PixMix mixes in and TLDR takes styles from; None generates
            fractals. Default None.
        distortion_probability: of each change of brightness, contrast, saturation and hue. 1 with
            the latter two at 0 changes contrast and brightness at once, else it is mmsegmentation's
            PhotoMetricDistortion, whose strengths are 32, 0.5, 0.5, 18 and probability 0.5. Default
            1.
        brightness: largest random shift of all pixel values, in units of 0..255. Default 24.
        contrast: largest random relative change of contrast. Default 0.25.
        saturation: largest random relative change of saturation. Default 0.
        hue: largest random turn of the hue, in OpenCV's units of 2 degrees. Default 0.
        max_boxes: boxes are padded to so many an image. Default 100.
        streets: the generated dataset.
        folder: any other dataset as pairs of image and label folders; None if unused.
        boxes: any other dataset as images with boxes, in VOC, YOLO or COCO form; None if unused.
    """

    source: str = "clear"
    source_weights: tuple[Positive, ...] = ()
    skip: str | None = None
    mapillary_labels: Literal["vltseg", "rein"] = "vltseg"
    root: str = dataclasses.field(default_factory=lambda: os.environ.get("JAXDG_DATA") or "data")
    workers: CountOrZero = 0
    crop: Size = (128, 128)
    resize: Size | None = None
    keep_ratio: bool = False
    scale: tuple[Positive, Positive] = (0.75, 1.5)
    shortest_sides: tuple[Count, ...] = ()
    longest_side: Count | None = None
    padding: Literal["around", "corner"] = "around"
    flip: Share = 0.5
    max_class_share: Annotated[float, Interval(gt=0, le=1)] = 1.0
    rare_class_temperature: PositiveOrZero = 0.0
    rare_class_min_pixels: Count = 3000
    rare_class_min_crop_ratio: Positive | None = None
    randaugment: tuple[CountOrZero, Annotated[float, Interval(ge=0, le=10)]] = (0, 0.0)
    pixmix: tuple[CountOrZero, float] = (0, 0.0)
    pictures: str | None = None
    distortion_probability: Share = 1.0
    brightness: Annotated[float, Interval(ge=0, le=255)] = 24.0
    contrast: Share = 0.25
    saturation: Share = 0.0
    hue: Annotated[float, Interval(ge=0, le=90)] = 0.0
    max_boxes: Count = 100
    streets: StreetsOptions = dataclasses.field(default_factory=StreetsOptions)
    folder: FolderOptions | None = None
    boxes: BoxOptions | None = None
