"""How a domain is judged, by the name of the protocol: mIoU depends on the size an image is
predicted at, on windows and on label maps.

`native` predicts every image at its own size, with the run's windows. `vltseg`, `rein`, `soma`,
`tqdm` and `mgrnet` are zero-shot protocols, each of the repository whose configs/ it follows:
VLTSeg's public re-implementation (github.com/VLTSeg/VLTSeg), Rein (w1oves/Rein, with
tools/convert_datasets/), SoMA (ysj9909/SoMA), tqdm (ByeongHyunPak/tqdm) and MGRNet (tpy001/VFMSeg).
`cityscapes_test` and `acdc_test` are VLTSeg's submissions to the test servers: images at their own
size, enlarged by several scales and mirrored. `evaluation.tta` does so to any other protocol, by
mmsegmentation's usual scales, and its results have a name of their own. All resize as
mmsegmentation does: images on the host, bilinearly by OpenCV; scores to the labels' size.

Windows have the size the model was trained on. Their stride is the named protocol's share of it, so
that the papers' crops of 512 and 1024 give the papers' strides, and other crops overlap as much. A
model that sees smaller windows than its training crops, as MGRNet's does, names those instead.

Different from Rein and SoMA: they store the halved images of Mapillary Vistas as JPEG files before
they read them; here they stay as they are. Different from MGRNet: it judges encoders other than
DINOv2 at 3072x1536; `mgrnet` is DINOv2's 2048x1024 for all. Not known: the label map of Mapillary
behind tqdm's files, which are not published. Here it is RobustNet's, whose data set-up tqdm's
follows, and VLTSeg has the same. MGRNet's repository holds Rein's converter, so it gets Rein's map.
"""

from collections.abc import Mapping
import dataclasses
from typing import NamedTuple

import cv2
import numpy as np
from PIL import Image

from jaxdg.data import published
from jaxdg.data.datasets import STREETS

NAMES = ("native", "vltseg", "rein", "soma", "tqdm", "mgrnet", "cityscapes_test", "acdc_test")
# The label map of Mapillary Vistas that a protocol comes with; the others leave it to the run.
MAPILLARY_LABELS = {
    "vltseg": "vltseg",
    "rein": "rein",
    "soma": "rein",
    "tqdm": "vltseg",
    "mgrnet": "rein",
}
AUGMENTED = ("cityscapes_test", "acdc_test")  # have test-time augmentation of their own
SCALES = (0.5, 0.75, 1.0, 1.25, 1.5, 1.75)  # of test-time augmentation by `evaluation.tta`
TTA = "_tta"  # behind the name of a protocol with it
SYNTHETIC = (*STREETS, "gta5", "synthia")
# SYNTHIA shows 16 of the 19 classes; most papers give the mean over these, or over the 13 that are
# not thin or rare as well.
SYNTHIA_LACKS = ("terrain", "truck", "train")
SYNTHIA_SUBSETS = (("16", SYNTHIA_LACKS), ("13", (*SYNTHIA_LACKS, "wall", "fence", "pole")))


class Rules(NamedTuple):
    """A protocol that gives every dataset one size, whatever the source; sides in pixels.

    Attributes:
        fit: longer and shorter side that images are fitted to, also those of datasets that its
            authors did not judge.
        fits: the same by dataset, where it differs.
        large_fits: the same for models trained on crops of 1024, where it differs again.
        stride: of the windows, as a share of the window.
        halve: whether Mapillary Vistas is halved first.
    """

    fit: tuple[int, int]
    fits: Mapping[str, tuple[int, int]]
    large_fits: Mapping[str, tuple[int, int]]
    stride: float
    halve: bool


REIN_FITS = {"acdc": (960, 540), "bdd100k": (1280, 720), "gta5": (1280, 720)}
RULES = {
    "rein": Rules(
        (1024, 512), REIN_FITS, {"cityscapes": (2048, 1024), "acdc": (1920, 1080)}, 2 / 3, True
    ),
    "soma": Rules(
        (2048, 1024), REIN_FITS, {"bdd100k": (2048, 1024), "acdc": (1920, 1080)}, 2 / 3, True
    ),
    "tqdm": Rules((2048, 1024), {"bdd100k": (1280, 720)}, {}, 2 / 3, False),
    "mgrnet": Rules((2048, 1024), {"acdc": (1920, 1080)}, {}, 320 / 512, False),
}


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
    def augments(self) -> bool:
        """Whether the class probabilities of several views are averaged."""
        return self.flip or self.scales != (1.0,)

    @property
    def resizes(self) -> bool:
        """Whether an image may be predicted at another size than its label's."""
        return self.fit is not None or self.scales != (1.0,)

    def augmented(self) -> "Protocol":
        """The same with mmsegmentation's usual test-time augmentation: `SCALES`, and mirrored."""
        return dataclasses.replace(self, name=self.name + TTA, scales=SCALES, flip=True)

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
    if name in RULES:
        rules = RULES[name]
        large = rules.large_fits if min(crop) >= 1024 else {}
        return Protocol(
            stride=overlapping(rules.stride),
            fit=large.get(dataset, rules.fits.get(dataset, rules.fit)),
            halve=rules.halve and dataset == "mapillary",
            **common,
        )
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
