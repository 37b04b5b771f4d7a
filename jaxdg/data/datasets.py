"""Labelled images of a domain, opened by its name.

A domain is a string. `clear`, `night`, `rain`, `fog` and `dusk_rain` are generated street scenes; `camvid`, `day` and `dusk` are splits of
CamVid as the SegNet release ships it; any other name is a pair of folders described by `FolderOptions`. Datasets hold plain values, so that
worker processes receive them by pickling.
"""

import dataclasses
import io
import os
from typing import Protocol, runtime_checkable

from jaxtyping import Integer, UInt8
import numpy as np
from PIL import Image

from jaxdg.data import index
from jaxdg.data.labels import CAMVID, CITYSCAPES, IGNORE, LabelSet, apply_table, id_table, palette

STREETS = ("clear", "night", "rain", "fog", "dusk_rain")  # as in streets.APPEARANCES
# Which sequences of which splits make a CamVid domain. By day in the training town, by day in another place, at dusk.
CAMVID_PARTS = {
    ("camvid", True): (("train",), ("0016E5", "0006R0")),
    ("camvid", False): (("val",), ("0016E5",)),
    ("day", False): (("test",), ("Seq05VD",)),
    ("dusk", False): (("train", "val", "test"), ("0001TP",)),
}


@dataclasses.dataclass
class StreetsOptions:
    """The generated street scenes.

    Attributes:
        size: height and width of a scene, pixels.
        images: number of training scenes.
        val_images: number of validation scenes of each domain, never among the training scenes.
        seed: which world; other seeds share no scene.
    """

    size: tuple[int, int] = (128, 256)
    images: int = 1000
    val_images: int = 100
    seed: int = 0


@dataclasses.dataclass
class FolderOptions:
    """Any pair of image and label folders. `{domain}` in a path stands for the domain's name, `{split}` for `train` or `val`.

    Attributes:
        images: image folder below the data root.
        labels: label folder below the data root, with the same sub-folders as the image folder.
        image_suffix: end of an image's file name behind the part it shares with its label; "" for any image extension.
        label_suffix: the same for label files.
        classes: class names in the order of their train ids.
        id_map: label file id to train id; empty if the files hold train ids already.
        ignore: label file ids that neither the loss nor a score sees.
        colors: RGB, 0-255, one a class; empty for the Cityscapes colours where the classes are Cityscapes', else a palette.
    """

    images: str = "images/{domain}"
    labels: str = "labels/{domain}"
    image_suffix: str = ""
    label_suffix: str = ".png"
    classes: tuple[str, ...] = CITYSCAPES.names
    id_map: dict[int, int] = dataclasses.field(default_factory=dict)
    ignore: tuple[int, ...] = (255,)
    colors: tuple[tuple[int, int, int], ...] = ()


@runtime_checkable
class Dataset(Protocol):
    """Labelled images of one domain; plain values only, so that it pickles.

    Attributes:
        domain: its name.
        labels: its classes.
    """

    domain: str
    labels: LabelSet

    def __len__(self) -> int: ...

    def size(self, i: int) -> tuple[int, int]:
        """Height and width of image `i` in pixels, known without reading it."""
        ...

    def name(self, i: int) -> str:
        """Where image `i` comes from: its path, or `streets/clear/17`."""
        ...

    def __getitem__(self, i: int) -> dict[str, np.ndarray]:
        """`image`: uint8 RGB [h, w, 3]; `label`: uint8 train ids [h, w], 255 where ignored."""
        ...


class Files:
    """Image files and label files."""

    def __init__(self, domain: str, pairs: index.Pairs, table: np.ndarray, labels: LabelSet):
        self.domain = domain
        self.pairs = pairs
        self.table = table
        self.labels = labels

    def __len__(self) -> int:
        return len(self.pairs.images)

    def size(self, i: int) -> tuple[int, int]:
        h, w = self.pairs.sizes[i].tolist()
        return h, w

    def name(self, i: int) -> str:
        return self.pairs.images[i]

    def __getitem__(self, i: int) -> dict[str, np.ndarray]:
        image = read_image(self.pairs.images[i])
        label = apply_table(read_label(self.pairs.labels[i]), self.table, self.pairs.labels[i])
        for path, shape in ((self.pairs.images[i], image.shape[:2]), (self.pairs.labels[i], label.shape)):
            if shape != self.size(i):
                (h, w), (index_h, index_w) = shape, self.size(i)
                raise ValueError(
                    f"{path} is {w}x{h} but was {index_w}x{index_h} like its partner when the folder was indexed; "
                    "fetch both files again and start again"
                )
        return {"image": image, "label": label}


class Streets:
    """Generated street scenes; scene `i` of every domain shows the same world.

    A scene is drawn once and then kept while the kept ones fit into `CACHE_BYTES`, because drawing takes longer than reading a file.
    """

    CACHE_BYTES = 256 << 20

    def __init__(self, domain: str, options: StreetsOptions, train: bool):
        self.domain = domain
        self.labels = CITYSCAPES
        self.image_size = (int(options.size[0]), int(options.size[1]))
        self.count = options.images if train else options.val_images
        # Even seeds train, odd seeds validate: no two runs, whatever their seeds, ever train on another's validation scenes.
        self.seed = 2 * options.seed + (0 if train else 1)
        self._drawn: dict[int, dict[str, np.ndarray]] = {}

    def __getstate__(self) -> dict:
        return {**self.__dict__, "_drawn": {}}  # worker processes draw their own

    def __len__(self) -> int:
        return self.count

    def size(self, i: int) -> tuple[int, int]:
        return self.image_size

    def name(self, i: int) -> str:
        return f"streets/{self.domain}/{i}"

    def __getitem__(self, i: int) -> dict[str, np.ndarray]:
        from jaxdg.data import streets

        if i in self._drawn:
            return self._drawn[i]
        scene = streets.render(self.seed, i, self.domain, size=self.image_size)
        sample = {"image": scene.image, "label": scene.label}
        for array in sample.values():
            array.flags.writeable = False  # it is handed out again
        if (len(self._drawn) + 1) * sum(a.nbytes for a in sample.values()) <= self.CACHE_BYTES:
            self._drawn[i] = sample
        return sample


def open_domain(domain: str, *, root: str, train: bool, streets: StreetsOptions, folder: FolderOptions | None) -> Dataset:
    """Opens the labelled images of a domain.

    Args:
        domain: `clear`, `night`, `rain`, `fog`, `dusk_rain` (generated), `camvid`, `day`, `dusk` (CamVid), or the name of a folder.
        root: data root; CamVid is read from `root/camvid`, folders as `folder` says.
        train: the images to train on, else those to judge on.
        streets: the generated scenes.
        folder: where the images and labels of any other domain are.

    Returns:
        The dataset; its files are paired and checked.

    Raises:
        FileNotFoundError: the data root or a folder of the domain does not exist.
        ValueError: an unknown domain, an empty folder, or files that do not pair up or are damaged.
    """
    if domain in STREETS:
        return Streets(domain, streets, train)
    if domain in {name for name, _ in CAMVID_PARTS}:
        return _camvid(domain, root, train)
    labels = label_set(domain, folder)
    assert folder is not None  # or label_set had raised
    return _folder(domain, root, train, folder, labels)


def label_set(domain: str, folder: FolderOptions | None) -> LabelSet:
    """The classes of a domain, without looking at its files.

    Args:
        domain: as for `open_domain`.
        folder: as for `open_domain`.

    Raises:
        ValueError: an unknown domain.
    """
    if domain in STREETS:
        return CITYSCAPES
    if domain in {name for name, _ in CAMVID_PARTS}:
        return CAMVID
    if folder is None:
        known = ", ".join((*STREETS, *dict.fromkeys(name for name, _ in CAMVID_PARTS)))
        raise ValueError(
            f"unknown domain {domain!r}; known are {known}; for images of your own set data.folder (its images and labels folders, "
            "where {domain} stands for the name)"
        )
    names = tuple(folder.classes)
    standard = CITYSCAPES.colors if names == CITYSCAPES.names else palette(len(names))
    return LabelSet(names, tuple((r, g, b) for r, g, b in folder.colors) or standard)


def _camvid(domain: str, root: str, train: bool) -> Files:
    if (domain, train) not in CAMVID_PARTS:
        raise ValueError(f"domain {domain!r} is kept unseen and has no training images; train on camvid")
    splits, sequences = CAMVID_PARTS[domain, train]
    base = os.path.join(_root(root), "camvid")
    pairs = index.index_pairs(
        [(os.path.join(base, split), os.path.join(base, f"{split}annot")) for split in splits], image_suffix="", label_suffix=".png"
    )
    keep = [i for i, path in enumerate(pairs.images) if os.path.basename(path).startswith(sequences)]
    if not keep:
        raise ValueError(
            f"{os.path.abspath(base)} holds no images of {', '.join(sequences)} in {', '.join(splits)}; fetch CamVid (SegNet layout)"
        )
    pairs = index.Pairs([pairs.images[i] for i in keep], [pairs.labels[i] for i in keep], pairs.sizes[keep])
    table = id_table({i: i for i in range(len(CAMVID.names))}, ignore=(11,))  # 11 is void
    return Files(domain, pairs, table, CAMVID)


def _folder(domain: str, root: str, train: bool, options: FolderOptions, labels: LabelSet) -> Files:
    fill = lambda path: path.replace("{domain}", domain).replace("{split}", "train" if train else "val")
    root = _root(root)
    folders = [(os.path.join(root, fill(options.images)), os.path.join(root, fill(options.labels)))]
    pairs = index.index_pairs(folders, image_suffix=options.image_suffix, label_suffix=options.label_suffix)
    names = labels.names
    id_map = options.id_map or {i: i for i in range(len(names))}
    outside = sorted({target for target in id_map.values() if target >= len(names) and target != IGNORE})
    if outside:
        raise ValueError(f"data.folder.id_map maps to train ids {outside}, but data.folder.classes has {len(names)} classes")
    return Files(domain, pairs, id_table(id_map, ignore=options.ignore), labels)


def _root(root: str) -> str:
    if not os.path.isdir(root):
        raise FileNotFoundError(f"data root {os.path.abspath(root)} does not exist; set JAXDG_DATA or --config.data.root")
    return root


def read_image(path: str) -> UInt8[np.ndarray, "h w 3"]:
    """Decodes an image as it is stored; a rotation in its metadata is not applied, as label files have none.

    Args:
        path: any format Pillow reads.

    Returns:
        RGB.

    Raises:
        ValueError: the file is unreadable, truncated or damaged; names it.
    """
    return np.asarray(_decode(path)[0].convert("RGB"))


def read_label(path: str) -> Integer[np.ndarray, "h w"]:
    """Decodes a label file: grey values of 1 to 16 bits, or the indices (never the colours) of a palette image.

    Args:
        path: a single-channel image, usually PNG.

    Returns:
        Ids as stored.

    Raises:
        ValueError: the file is unreadable, truncated, damaged or a colour image; names it.
    """
    image, data = _decode(path)
    if image.mode not in ("1", "L", "P", "I", "I;16", "I;16B"):
        raise ValueError(f"{path}: a label must be a grey or palette image of class ids, this one is {image.mode}; use the id files")
    label = np.asarray(image)
    if image.format == "PNG" and image.mode == "L" and data[24] < 8:
        label = label // (255 // (2 ** data[24] - 1))  # Pillow stretches grey values of 2 and 4 bits over 0-255
    return label.astype(np.uint8) if label.dtype == bool else label


def _decode(path: str) -> tuple[Image.Image, bytes]:
    try:
        with open(path, "rb") as file:
            data = file.read()
    except OSError as error:
        raise ValueError(f"{path}: unreadable ({error.strerror}); fetch the file again") from error
    wrong = index.truncated(path, data)
    if not wrong:
        try:
            image = Image.open(io.BytesIO(data))
            image.load()
            return image, data
        except Exception as error:  # Pillow raises whatever its format plugins meet
            wrong = f"damaged ({type(error).__name__}: {error})".replace("\n", " ")
    raise ValueError(f"{path}: {wrong}; fetch the file again or remove it with its partner")
