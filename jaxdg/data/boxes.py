"""Images with boxes, opened by the name of their domain.

A box is x0 y0 x1 y1 in pixels and covers [x0, x1) x [y0, y1): its width is x1 - x0, and the whole
image is 0 0 w h. VOC counts pixels from 1 and includes the last: its xmin ymin xmax ymax are x0 +
1, y0 + 1, x1, y1. Boxes keep the order of their file. Small boxes and images without boxes count.

Diverse Weather (Wu and Deng, CVPR 2022) is trained on `daytime_clear`. Its other four domains are
tested on the images in their `train.txt`, as is usual. Cityscapes, BDD100K and SYNTHIA have boxes
around the instances of their label images, ACDC in its COCO files.
"""

from collections.abc import Collection
import dataclasses
import os
from typing import Any

import numpy as np

from jaxdg.data import index, instances, published, records
from jaxdg.data.annotations import CocoBoxes, FilesPart, index_coco, index_files, read_file
from jaxdg.data.box_fields import Boxes, areas_of
from jaxdg.data.coco_json import CocoPart
from jaxdg.data.datasets import STREETS, Dataset, Files, Mixture, Streets, StreetsOptions, Subset
from jaxdg.data.domains import domain_names, folder_of_files, pair_files
from jaxdg.data.images import read_image
from jaxdg.data.labels import CITYSCAPES, LabelSet, palette
from jaxdg.data.skip import skip_list, without
from jaxdg.data.tree import Tree


def _like(**classes: str) -> LabelSet:
    """Classes in the colours of the Cityscapes classes that they resemble."""
    alike = [CITYSCAPES.names.index(name) for name in classes.values()]
    return LabelSet(tuple(classes), tuple(CITYSCAPES.colors[k] for k in alike))


THINGS = LabelSet(CITYSCAPES.names[instances.FIRST :], CITYSCAPES.colors[instances.FIRST :])
STREETS_THINGS = LabelSet(
    CITYSCAPES.names[6:8] + THINGS.names, CITYSCAPES.colors[6:8] + THINGS.colors
)
DIVERSE_WEATHER = _like(
    bus="bus",
    bike="bicycle",
    car="car",
    motor="motorcycle",
    person="person",
    rider="rider",
    truck="truck",
)
CARLA = _like(
    vehicle="car",
    bike="bicycle",
    motobike="motorcycle",
    traffic_light="traffic light",
    traffic_sign="traffic sign",
)

# Published number of images by domain and by whether they are for training; `published.py` has the
# others.
COUNTS = {
    ("daytime_clear", True): 19395,
    ("daytime_clear", False): 8313,
    ("night_sunny", False): 26158,
    ("dusk_rainy", False): 3501,
    ("night_rainy", False): 2494,
    ("daytime_foggy", False): 3775,
    ("carla", True): 623,
    ("carla", False): 156,
    ("town05", False): 249,
}
ACDC_CONDITIONS = ("fog", "night", "rain", "snow")
KNOWN = (
    *STREETS,
    *dict.fromkeys(name for name, _ in COUNTS),
    *instances.READERS,
    "acdc",
    *(f"acdc/{c}" for c in ACDC_CONDITIONS),
)


@dataclasses.dataclass
class BoxOptions:
    """Any images with boxes, in VOC, YOLO or COCO form.

    `{domain}` in a path stands for the domain's name.

    Attributes:
        images: image folders below the data root, to train on and to judge on; they may be in an
            archive, as `photos.zip/images`.
        annotations: for each a folder of VOC's XML files or of YOLO's text files, which may be the
            image folder, or a JSON file as COCO's.
        lists: for each a text file of the names that count, as VOC has them; "" for all images. A
            JSON file has its own list.
        classes: class names in the order of their ids, all that the annotations hold; empty for
            those of the JSON file, by their ids.
    """

    images: tuple[str, str] = ("{domain}/VOC2007/JPEGImages", "{domain}/VOC2007/JPEGImages")
    annotations: tuple[str, str] = ("{domain}/VOC2007/Annotations", "{domain}/VOC2007/Annotations")
    lists: tuple[str, str] = (
        "{domain}/VOC2007/ImageSets/Main/trainval.txt",
        "{domain}/VOC2007/ImageSets/Main/test.txt",
    )
    classes: tuple[str, ...] = ()


class BoxFiles(Files):
    """Image files with boxes.

    Attributes:
        pairs: the images, their sizes, and the files with their boxes if each has one.
        box_counts: number of boxes of each image; None if it is unknown before reading.
    """

    box_counts: np.ndarray | None = None

    def __init__(self, domain: str, pairs: index.Pairs, labels: LabelSet):
        self.domain = domain
        self.pairs = pairs
        self.labels = labels

    def __getitem__(self, i: int) -> dict[str, np.ndarray]:
        """`image` uint8 RGB [h, w, 3]; `boxes` float32 [n, 4]; and four fields [n].

        They are `classes` int32, `difficult` and `crowd` bool, and `areas` float32: the square
        pixels of the object, by which COCO's evaluation tells small from large. The area is the one
        in the file, or the pixels of the instance, or else the area of the box.
        """
        return {"image": self._sized(i, self.name(i), read_image(self.name(i))), **self.boxes(i)}

    def boxes(self, i: int) -> Boxes:
        """The boxes of image `i`, without reading the image."""
        raise NotImplementedError


class AnnotatedFiles(BoxFiles):
    """Boxes in a file of VOC's or YOLO's for each image."""

    def __init__(self, domain: str, found: tuple[index.Pairs, np.ndarray], labels: LabelSet):
        pairs, counts = found
        super().__init__(domain, pairs, labels)
        self.box_counts = counts

    def boxes(self, i: int) -> Boxes:
        return read_file(self.pairs.labels[i], self.size(i), self.labels.names)


class CocoFiles(BoxFiles):
    """Boxes in JSON files."""

    def __init__(self, domain: str, content: CocoBoxes, labels: LabelSet):
        super().__init__(domain, content.pairs, labels)
        self.content = content
        self.box_counts = np.diff(content.ends, prepend=0)

    def boxes(self, i: int) -> Boxes:
        return self.content.of(i)

    @property
    def unlabelled(self) -> bool:
        """Whether there are no boxes but those of crowds."""
        return bool(self.content.crowd.all())


class InstanceFiles(BoxFiles):
    """Boxes around the instances of label images."""

    def boxes(self, i: int) -> Boxes:
        path = self.pairs.labels[i]
        channels, boxes_of = instances.READERS[self.domain]
        return boxes_of(self._sized(i, path, instances.read(path, channels)), path)


class StreetsBoxes(Streets):
    """Generated street scenes with boxes around traffic lights, signs, people and vehicles."""

    def __init__(self, domain: str, options: StreetsOptions, train: bool):
        super().__init__(domain, options, train)
        self.labels = STREETS_THINGS

    def _sample(self, scene: Any) -> dict[str, np.ndarray]:
        names = [STREETS_THINGS.names.index(CITYSCAPES.names[k]) for k in scene.box_labels.tolist()]
        return {
            "image": scene.image,
            "boxes": scene.boxes,
            "classes": np.array(names, np.int32),
            "difficult": np.zeros(len(names), bool),
            "crowd": np.zeros(len(names), bool),
            "areas": areas_of(scene.boxes),
        }


def box_labels(domain: str, own: BoxOptions | None) -> LabelSet:
    """The classes of a domain, without looking at its files.

    Args:
        domain: as for `open_boxes`.
        own: as for `open_boxes`.

    Raises:
        ValueError: the domain is unknown or has no boxes, or it is the user's own and its classes
            are not named.
    """
    domain = domain_names(domain)[0]
    if domain in STREETS:
        return STREETS_THINGS
    if domain in ("carla", "town05"):
        return CARLA
    if (domain, False) in COUNTS:
        return DIVERSE_WEATHER
    if domain in KNOWN:
        return THINGS
    if own is None:
        raise _unknown(domain)
    if not own.classes:
        raise ValueError(
            "data.boxes.classes is empty; name the classes there, as a trained model has to know"
            " them without its data"
        )
    return LabelSet(own.classes, palette(len(own.classes)))


def open_boxes(
    domain: str,
    *,
    root: str,
    train: bool,
    streets: StreetsOptions | None = None,
    own: BoxOptions | None = None,
    skip: str | None = None,
) -> Dataset:
    """Opens the images of a domain with their boxes.

    Args:
        domain: one of `KNOWN`, any other name with `own`, or several of these joined by `+`.
        root: data root. Records may be on `gs://..` or `s3://..`.
        train: the images to train on, else those to judge on.
        streets: the generated scenes; None for the defaults.
        own: the images and boxes of any other domain.
        skip: a text file of paths to leave out with their partners, see `skip.py`.

    Returns:
        The dataset, with the samples of `BoxFiles`: records where the root holds them, else files,
        which are paired and checked.

    Raises:
        FileNotFoundError: the data root, a folder or file of the domain, or the skip list does not
            exist.
        ValueError: the domain is unknown or has no boxes or no such images, files do not pair up or
            are damaged, or records have other classes.
    """
    options: dict[str, Any] = {"root": root, "train": train, "own": own, "skip": skip}
    if len(parts := domain_names(domain)) > 1:
        return Mixture([open_boxes(part, streets=streets, **options) for part in parts])
    if domain in STREETS:
        return StreetsBoxes(domain, streets or StreetsOptions(), train)
    found = records.open_records(root, domain, train=train, boxes=True)
    if found is None:
        return open_box_files(domain, **options)
    if domain in KNOWN or (own is not None and own.classes):
        names = box_labels(domain, own).names
        if found.labels.names != names:
            raise ValueError(
                f"the records {found.directory} were written with the classes"
                f" {', '.join(found.labels.names)}, but those of {domain} are {', '.join(names)};"
                " change data.boxes.classes or prepare the records again"
            )
    return without(found, skip, root, strict=train) if skip else found


def known_counts(dataset: Dataset) -> np.ndarray:
    """Number of boxes of each image of a dataset, int64 [n]; 0 if it is unknown before reading."""
    if isinstance(dataset, Mixture):
        return np.concatenate([known_counts(part) for part in dataset.parts])
    if isinstance(dataset, Subset):
        return known_counts(dataset.dataset)[dataset.images]
    counts = getattr(dataset, "box_counts", None)
    return np.zeros(len(dataset), np.int64) if counts is None else counts.astype(np.int64)


def check_room(dataset: Dataset, max_boxes: int) -> None:
    """Refuses images with too many boxes, as far as that is known before reading.

    Args:
        dataset: any with boxes.
        max_boxes: number of boxes to which each image is padded.

    Raises:
        ValueError: an image has more; names the fullest.
    """
    counts = known_counts(dataset)
    i = int(counts.argmax())
    if counts[i] > max_boxes:
        raise ValueError(
            f"{dataset.name(i)} has {counts[i]} boxes, and {np.count_nonzero(counts > max_boxes)}"
            f" of {len(counts)} images of {dataset.domain} have more than data.max_boxes,"
            f" {max_boxes}; allowed: at least {counts[i]}"
        )


def open_box_files(
    domain: str,
    *,
    root: str,
    train: bool,
    own: BoxOptions | None = None,
    skip: str | None = None,
    defects: list[index.Defect] | None = None,
) -> BoxFiles:
    """Opens the files of a domain, whether or not there are records of it.

    Args:
        domain: one of `KNOWN` that is not generated, or any other name with `own`.
        root: as for `open_boxes`.
        train: as for `open_boxes`.
        own: as for `open_boxes`.
        skip: as for `open_boxes`.
        defects: receives the faults of files, which then are no errors; outcomes of earlier checks
            are not used.

    Returns:
        The dataset, including images with defects.

    Raises:
        FileNotFoundError: as for `open_boxes`.
        ValueError: as for `open_boxes`.
    """
    root = folder_of_files(root, domain)
    domain_names(domain)  # raises an error for names such as `..`
    left_out = skip_list(skip, root, strict=train) if skip else ()
    split = "train" if train else "val"
    if (domain, False) in COUNTS and (domain, train) not in COUNTS:
        raise ValueError(
            f"domain {domain!r} is kept unseen and has no training images; train on daytime_clear"
            " or carla"
        )
    if domain in ("carla", "town05"):
        towns = dict.fromkeys(("town01", "town02", "town03", "town04"), split)
        if domain == "town05":
            towns = {"town05": "test"}
        tree = Tree(os.path.join(root, "carla_towns"))
        parts = [_voc2007((town,), part) for town, part in towns.items()]
        return AnnotatedFiles(
            domain, index_files(tree, parts, CARLA.names, left_out, defects), CARLA
        )
    if (domain, train) in COUNTS:
        tree = Tree(os.path.join(root, "diverse_weather"))
        listed = "test" if domain == "daytime_clear" and not train else "train"
        parts = [_voc2007(_spellings(domain), listed)]
        labels = DIVERSE_WEATHER
        return AnnotatedFiles(
            domain, index_files(tree, parts, labels.names, left_out, defects), labels
        )
    if domain in instances.READERS:
        return _instances(domain, Tree(os.path.join(root, domain)), split, left_out, defects)
    if domain in KNOWN:
        parts = [_acdc(c, split) for c in ACDC_CONDITIONS if domain in ("acdc", f"acdc/{c}")]
        tree = Tree(os.path.join(root, "acdc"))
        return CocoFiles(domain, index_coco(tree, parts, THINGS.names, left_out, defects), THINGS)
    if own is not None:
        return _own(domain, Tree(root, exact=True), 0 if train else 1, own, left_out, defects)
    raise _unknown(domain)


def _acdc(condition: str, split: str) -> CocoPart:
    # The file of the training images in rain lists the images of all conditions, so only names with
    # this start count.
    start = f"{condition}/{split}/"
    file = f"{condition}/instancesonly_{condition}_{split}_gt_detection.json"
    return CocoPart(f"rgb_anon/{condition}/{split}", "gt_detection", file, start)


def _unknown(domain: str) -> ValueError:
    if published.find(domain):
        return ValueError(
            f"{domain} has no boxes, as it is published without instances; known are"
            f" {', '.join(KNOWN)}"
        )
    return ValueError(
        f"unknown domain {domain!r}; known are {', '.join(KNOWN)}; for boxes of your own set"
        " data.boxes"
    )


def _voc2007(folders: tuple[str, ...], listed: str) -> FilesPart:
    images, annotations, lists = (
        tuple(f"{folder}/VOC2007/{kind}" for folder in folders)
        for kind in ("JPEGImages", "Annotations", "ImageSets/Main")
    )
    return FilesPart(images, annotations, lists, f"{listed}.txt")


def _spellings(domain: str) -> tuple[str, ...]:
    """The names in use for the folders of Diverse Weather, such as `Night-Sunny`."""
    names = (domain, "daytime_sunny") if domain == "daytime_clear" else (domain,)
    words = [name.split("_") for name in names]
    return tuple(
        a + dash + b
        for time, sky in words
        for dash in "_-"
        for a in (time, time.title())
        for b in (sky, sky.title())
    )


def _instances(
    domain: str,
    tree: Tree,
    split: str,
    skip: Collection[str],
    defects: list[index.Defect] | None,
) -> InstanceFiles:
    images, labels, image_suffix, label_suffix = {
        "cityscapes": (
            f"leftImg8bit/{split}",
            f"gtFine/{split}",
            "_leftImg8bit.png",
            "_gtFine_instanceIds.png",
        ),
        "bdd100k": (f"images/10k/{split}", f"labels/ins_seg/bitmasks/{split}", ".jpg", ".png"),
        "synthia": ("RGB", "GT/LABELS", ".png", ".png"),
    }[domain]
    suffixes = {"image_suffix": image_suffix, "label_suffix": label_suffix}
    pairs = pair_files(tree, [(images, (labels,))], defects, skip=skip, **suffixes)
    return InstanceFiles(domain, pairs, THINGS)


def _own(
    domain: str,
    tree: Tree,
    at: int,
    own: BoxOptions,
    skip: Collection[str],
    defects: list[index.Defect] | None,
) -> BoxFiles:
    images, annotations, listed = (
        paths[at].replace("{domain}", domain) for paths in (own.images, own.annotations, own.lists)
    )
    if annotations.lower().endswith(".json"):
        if listed and own.lists != BoxOptions.lists:
            raise ValueError(
                f"data.boxes.lists names {listed}, but only of VOC's or YOLO's files a list is"
                f" read; take what is not to count out of {annotations}, or leave it out with"
                " data.skip"
            )
        part = CocoPart(images, *os.path.split(annotations))
        content = index_coco(tree, [part], own.classes, skip, defects)
        return CocoFiles(domain, content, LabelSet(content.names, palette(len(content.names))))
    if not own.classes:
        raise ValueError(
            "data.boxes.classes is empty; the files in the folder do not list their classes, so"
            " name them there"
        )
    part = FilesPart(
        (images,), (annotations,), (os.path.dirname(listed),), os.path.basename(listed)
    )
    labels = LabelSet(own.classes, palette(len(own.classes)))
    return AnnotatedFiles(domain, index_files(tree, [part], labels.names, skip, defects), labels)
