"""The published segmentation datasets: their folders, the pairing of files, and their label ids.

Folders are relative to `ROOT/NAME`, where the publisher's archives lie unopened or unpacked (see
`tree.Tree`). The numbers of images are those that the publishers state; `check` shows them beside
the numbers that it finds.
"""

from collections.abc import Mapping
import dataclasses

from jaxdg.data.labels import (
    CAMVID,
    CITYSCAPES,
    CITYSCAPES_IDS,
    IGNORE,
    MAPILLARY_REIN_IDS,
    MAPILLARY_VLTSEG_IDS,
    SYNTHIA_IDS,
    WILDDASH2_IDS,
    LabelSet,
)


@dataclasses.dataclass(frozen=True)
class Part:
    """The images of one split of one domain.

    Attributes:
        domain: its name; that of the dataset or, like `acdc/night`, a part of it.
        split: train, val, test, or all if the publisher made no splits.
        images: image folder.
        labels: label folder, or its alternatives; () if the labels are kept secret.
        count: published number of images.
        start: beginnings of the file names that count; () for all files.
        listed: a .mat file beside the folders with the numbers of the images, as `trainIds`; none
            if empty.
    """

    domain: str
    split: str
    images: str
    labels: tuple[str, ...]
    count: int
    start: tuple[str, ...] = ()
    listed: str = ""


@dataclasses.dataclass(frozen=True)
class Published:
    """A dataset as its publisher ships it.

    Attributes:
        name: of its folder below the data root.
        parts: what it consists of.
        ids: label file id to train id.
        count: label file ids run from 0 to this number, exclusive; those not in `ids` are ignored,
            as 255 is. Others are errors.
        labels: its classes.
        image_suffix: end of an image's file name behind the part that it shares with its label.
        label_suffix: the same for label files.
        red: label files are 16-bit RGB with the id in the red channel.
        lacks: classes that its label maps show nowhere.
    """

    name: str
    parts: tuple[Part, ...]
    ids: Mapping[int, int]
    count: int
    labels: LabelSet = CITYSCAPES
    image_suffix: str = ".png"
    label_suffix: str = ".png"
    red: bool = False
    lacks: tuple[str, ...] = ()

    def select(self, domain: str, train: bool) -> tuple[Part, ...]:
        """The parts of a domain that are for training or for judging.

        A domain without splits has all images in both.

        Args:
            domain: a name from `domains`; if the name of a split follows it, as in
                `cityscapes/test`, that split counts.
            train: for training, unless `domain` names a split.

        Raises:
            ValueError: the domain has no such images.
        """
        name, _, split = domain.rpartition("/")
        mine = [part for part in self.parts if _holds(domain, part.domain) and not part.listed]
        found = [part for part in self.parts if _holds(name, part.domain) and part.split == split]
        wanted = ("train" if train else "val", "all")
        found = found or [part for part in mine if part.split in wanted]
        if not found:
            splits = ", ".join(dict.fromkeys(part.split for part in mine))
            raise ValueError(
                f"domain {domain!r} is kept unseen and has no training images (it has {splits});"
                " train on another domain"
            )
        return tuple(found)

    @property
    def domains(self) -> tuple[str, ...]:
        """The names of its domains, to which the name of a split may be added."""
        names = [part.domain for part in self.parts]
        if any(_holds(self.name, name) for name in names):
            names.insert(0, self.name)
        return tuple(dict.fromkeys(names))

    def table(self) -> dict[int, int]:
        """Every id that a label file may hold, and its train id."""
        return {i: self.ids.get(i, IGNORE) for i in (*range(self.count), IGNORE)}


def _holds(domain: str, part: str) -> bool:
    return part == domain or part.startswith(f"{domain}/")


TRAIN_IDS = {i: i for i in range(19)}
ACDC_COUNTS = {
    "train": (400, 400, 400, 400),
    "val": (100, 106, 100, 100),
    "test": (500, 500, 500, 500),
}

GTA5 = Published(
    "gta5",
    (
        Part("gta5", "all", "images", ("labels",), 24966),
        *(
            Part("gta5", s, "images", ("labels",), n, listed="split.mat")
            for s, n in (("train", 12403), ("val", 6382), ("test", 6181))
        ),
    ),
    CITYSCAPES_IDS,
    35,
)
SYNTHIA = Published(
    "synthia",
    (Part("synthia", "all", "RGB", ("GT/LABELS",), 9400),),
    SYNTHIA_IDS,
    23,
    red=True,
    lacks=("terrain", "truck", "train"),
)
CITYSCAPES_DATASET = Published(
    "cityscapes",
    (
        Part("cityscapes", "train", "leftImg8bit/train", ("gtFine/train",), 2975),
        Part("cityscapes", "val", "leftImg8bit/val", ("gtFine/val",), 500),
        Part("cityscapes", "test", "leftImg8bit/test", (), 1525),
    ),
    CITYSCAPES_IDS,
    34,
    image_suffix="_leftImg8bit.png",
    label_suffix="_gtFine_labelIds.png",
)
BDD100K = Published(
    "bdd100k",
    tuple(
        Part("bdd100k", s, f"images/10k/{s}", (f"labels/sem_seg/masks/{s}",), n)
        for s, n in (("train", 7000), ("val", 1000))
    ),
    TRAIN_IDS,
    19,
    image_suffix=".jpg",
)
MAPILLARY = Published(
    "mapillary",
    tuple(
        Part(
            "mapillary", split, f"{folder}/images", (f"{folder}/v1.2/labels", f"{folder}/labels"), n
        )
        for split, folder, n in (("train", "training", 18000), ("val", "validation", 2000))
    ),
    MAPILLARY_VLTSEG_IDS,
    66,
    image_suffix=".jpg",
)
ACDC = Published(
    "acdc",
    tuple(
        Part(f"acdc/{c}", s, f"rgb_anon/{c}/{s}", () if s == "test" else (f"gt/{c}/{s}",), n)
        for s, counts in ACDC_COUNTS.items()
        for c, n in zip(("fog", "night", "rain", "snow"), counts, strict=True)
    ),
    TRAIN_IDS,
    19,
    image_suffix="_rgb_anon.png",
    label_suffix="_gt_labelTrainIds.png",
)
DARK_ZURICH = dataclasses.replace(
    ACDC, name="dark_zurich", parts=(Part("dark_zurich", "val", "rgb_anon/val", ("gt/val",), 50),)
)
WILDDASH2 = Published(
    "wilddash2",
    (Part("wilddash2", "all", "images", ("labels",), 4256),),
    WILDDASH2_IDS,
    81,
    image_suffix=".jpg",
)
# Training and validation are by day in one town. Unseen are another place by day, and all of dusk.
CAMVID_DATASET = Published(
    "camvid",
    (
        Part("camvid", "train", "train", ("trainannot",), 305, start=("0016E5", "0006R0")),
        Part("camvid", "val", "val", ("valannot",), 101, start=("0016E5",)),
        Part("day", "val", "test", ("testannot",), 171, start=("Seq05VD",)),
        *(
            Part("dusk", "val", split, (f"{split}annot",), n, start=("0001TP",))
            for split, n in (("train", 62), ("test", 62))
        ),
    ),
    {i: i for i in range(11)},  # 11 is void
    12,
    CAMVID,
    image_suffix="",
)

# The two unseen films as sources of their own, each judged on the images after its training images.
# For dusk these splits are SegNet's.
CAMVID_FILMS = dataclasses.replace(
    CAMVID_DATASET,
    parts=(
        *(
            Part("camvid_day", split, "test", ("testannot",), n, tuple(f"Seq05VD_f{k}" for k in ks))
            for split, n, ks in (
                ("train", 100, ("00", "01", "02")),
                ("val", 71, ("03", "04", "05")),
            )
        ),
        Part("camvid_dusk", "train", "train", ("trainannot",), 62, start=("0001TP",)),
        Part("camvid_dusk", "val", "test", ("testannot",), 62, start=("0001TP",)),
    ),
)

_ALL = (CAMVID_DATASET, GTA5, SYNTHIA, CITYSCAPES_DATASET, BDD100K)
_ALL += (MAPILLARY, ACDC, DARK_ZURICH, WILDDASH2)
PUBLISHED: dict[str, Published] = {dataset.name: dataset for dataset in _ALL}


def find(domain: str, mapillary_labels: str = "vltseg") -> Published | None:
    """The dataset that a domain belongs to, if it is a published one.

    Args:
        domain: as `Published.select` takes it.
        mapillary_labels: mapping of the ids of Mapillary Vistas to classes: vltseg or rein.
    """
    for dataset in (*PUBLISHED.values(), CAMVID_FILMS):
        name, _, split = domain.rpartition("/")
        splits = (part.split for part in dataset.parts)
        if domain in dataset.domains or (name in dataset.domains and split in splits):
            rein = dataset is MAPILLARY and mapillary_labels == "rein"
            return dataclasses.replace(dataset, ids=MAPILLARY_REIN_IDS) if rein else dataset
    return None
