"""How a domain is judged, by the name of the protocol: mIoU depends on the size an image is
predicted at, on windows and on label maps.

`native` predicts every image at its own size, with the run's windows. `vltseg` and `rein` are the
zero-shot protocols of VLTSeg (sizes and windows of the public re-implementation,
github.com/VLTSeg/VLTSeg, configs/) and of Rein (github.com/w1oves/Rein, configs/ and
tools/convert_datasets/). `cityscapes_test` and `acdc_test` are VLTSeg's submissions to the test
servers: images at their own size, enlarged by several scales and mirrored. All resize as
mmsegmentation does: images on the host, bilinearly by OpenCV; scores to the labels' size.

Windows have the size the model was trained on. Their stride is the named protocol's share of it, so
that the papers' crops of 512 and 1024 give the papers' strides, and other crops overlap as much.

Different from Rein: it stores the halved images of Mapillary Vistas as JPEG files before it reads
them; here they stay as they are.
"""

import dataclasses

import cv2
import numpy as np
from PIL import Image

from jaxdg.data import published
from jaxdg.data.datasets import STREETS

NAMES = ("native", "vltseg", "rein", "cityscapes_test", "acdc_test")
MAPILLARY_LABELS = (
    "vltseg",
    "rein",
)  # come with the label map of Mapillary Vistas of their name; the others leave it to the run
SYNTHETIC = (*STREETS, "gta5", "synthia")
# SYNTHIA shows 16 of the 19 classes; most papers give the mean over these, or over the 13 that are
# not thin or rare as well.
SYNTHIA_LACKS = ("terrain", "truck", "train")
SYNTHIA_SUBSETS = (("16", SYNTHIA_LACKS), ("13", (*SYNTHIA_LACKS, "wall", "fence", "pole")))


@dataclasses.dataclass(frozen=True)
class Protocol:
    """How the images of one domain are prepared and predicted.

    Attributes:
        name: one of `NAMES`.
        window: height and width of the model's windows, pixels.
        stride: distance between them, vertical and horizontal, pixels.
        fit: longer and shorter side, pixels, that an image is resized to fit, keeping its ratio;
            None leaves it as it is.
        halve: first halves both sides of image (bicubic) and label (nearest).
        scales: test-time augmentation: factors of the prepared image's size whose class
            probabilities are averaged.
        flip: test-time augmentation: every scale is also predicted mirrored.
        without: further means to report, as (name, classes left out).
    """

    name: str
    window: tuple[int, int]
    stride: tuple[int, int]
    fit: tuple[int, int] | None = None
    halve: bool = False
    scales: tuple[float, ...] = (1.0,)
    flip: bool = False
    without: tuple[tuple[str, tuple[str, ...]], ...] = ()

    @property
    def resizes(self) -> bool:
        """Whether an image may be predicted at another size than its label's."""
        return self.fit is not None or self.scales != (1.0,)

    def sizes(self, size: tuple[int, int]) -> tuple[tuple[int, int], tuple[int, int]]:
        """Sizes of an image and its label after `prepare`, before the scales.

        Args:
            size: height and width of both as stored.
        """
        h, w = (size[0] // 2, size[1] // 2) if self.halve else size
        if self.fit is None:
            return (h, w), (h, w)
        factor = min(max(self.fit) / max(h, w), min(self.fit) / min(h, w))
        return (int(h * factor + 0.5), int(w * factor + 0.5)), (h, w)

    def prepare(self, sample: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """The sample as it is judged.

        Args:
            sample: `image` uint8 [h, w, 3] and `label` uint8 [h, w].
        """
        image = sample["image"]
        label = sample["label"]
        (h, w), own = self.sizes(label.shape)
        if self.halve:
            image, label = (
                np.asarray(Image.fromarray(array).resize((own[1], own[0]), method))
                for array, method in (
                    (image, Image.Resampling.BICUBIC),
                    (label, Image.Resampling.NEAREST),
                )
            )
        if (h, w) != own:
            image = cv2.resize(image, (w, h), interpolation=cv2.INTER_LINEAR)
        return {**sample, "image": image, "label": label}


def protocol(
    name: str, domain: str, source: str, crop: tuple[int, int], stride: tuple[int, int]
) -> Protocol:
    """The protocol of a name for a domain.

    Args:
        name: one of `NAMES`.
        domain: what is judged.
        source: what the model was trained on; generated and rendered sources are judged on smaller
            images.
        crop: height and width of the crops it was trained on, pixels.
        stride: of the windows of `native`, pixels.
    """
    dataset = domain.split("/")[0]
    rendered = all(part in SYNTHETIC for part in source.split("+"))
    common = {
        "name": name,
        "window": crop,
        "without": SYNTHIA_SUBSETS if source == "synthia" else (),
    }

    def overlapping(share):
        return (max(round(crop[0] * share), 1), max(round(crop[1] * share), 1))

    if name == "native":
        return Protocol(stride=stride, **common)
    if name == "rein":
        wide = min(crop) >= 1024 and dataset in (
            "cityscapes",
            "acdc",
        )  # its second setting, trained on crops of 1024
        fit = {"acdc": (960, 540), "bdd100k": (1280, 720), "gta5": (1280, 720)}.get(
            dataset, (1024, 512)
        )
        fit = (2 * fit[0], 2 * fit[1]) if wide else fit
        return Protocol(stride=overlapping(2 / 3), fit=fit, halve=dataset == "mapillary", **common)
    common["stride"] = overlapping(426 / 512 if rendered else 768 / 1024)
    if name == "vltseg":
        fit = (960, 540) if dataset == "acdc" else (1024, 512)
        return Protocol(fit=fit if rendered else (2 * fit[0], 2 * fit[1]), **common)
    first, last = (0.5, 1.75) if rendered else (1.0, 2.25 if name == "cityscapes_test" else 1.75)
    return Protocol(scales=tuple(np.arange(first, last + 0.25, 0.25).tolist()), flip=True, **common)


def part_of(domain: str, name: str) -> str | None:
    """The part of a published domain that an image belongs to, such as `acdc/fog` of `acdc`; None
    where there are no parts.

    Args:
        domain: the whole.
        name: of the image, as `Dataset.name` gives it.
    """
    dataset = published.find(domain)
    parts = dataset.parts if dataset else ()
    return next(
        (
            part.domain
            for part in parts
            if part.domain.startswith(f"{domain}/") and f"/{part.images}/" in name
        ),
        None,
    )
