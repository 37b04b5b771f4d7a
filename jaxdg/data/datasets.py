"""Labelled images: files, generated streets, several datasets as one, and a part of one.

Datasets hold plain values, so that worker processes receive them by pickling. `domains.py` opens
them by name.
"""

import bisect
from collections.abc import Sequence
import dataclasses
import itertools
import math
from typing import Annotated, Any, Protocol, runtime_checkable

from annotated_types import Ge
from jaxtyping import Integer, UInt8
import numpy as np

from jaxdg.data import index
from jaxdg.data.images import read_image, read_label
from jaxdg.data.labels import (
    CITYSCAPES,
    IGNORE,
    LabelSet,
    apply_table,
    class_ids,
)
from jaxdg.ranges import Count, CountOrZero

STREETS = ("clear", "night", "rain", "fog", "dusk_rain")  # as in streets/render.py


@dataclasses.dataclass
class StreetsOptions:
    """The generated street scenes.

    Attributes:
        size: height and width of a scene, pixels.
        images: number of training scenes.
        val_images: number of validation scenes of each domain, never among the training scenes.
        seed: which world; other seeds share no scene.
    """

    size: tuple[Annotated[int, Ge(32)], Annotated[int, Ge(32)]] = (128, 256)
    images: Count = 1000
    val_images: Count = 100
    seed: CountOrZero = 0


@dataclasses.dataclass
class FolderOptions:
    """Any pair of image and label folders, or an image folder and a COCO file.

    `{domain}` in a path stands for the domain's name, `{split}` for `train` or `val`.

    Attributes:
        images: image folder below the data root; it may be in an archive, as `photos.zip/images`.
        labels: label folder below the data root, with the same sub-folders as the image folder; or
            a COCO JSON file, of whose polygons and run lengths label maps are drawn (`pip install
            "jaxdg[coco]"`). What no annotation covers is the class `background` if there is one,
            else it is ignored. Crowds are ignored.
        image_suffix: end of an image's file name after the part that it shares with its label; ""
            for any image extension.
        label_suffix: the same for label files.
        classes: class names in the order of their train ids.
        id_map: label file id to train id; empty if the files hold train ids already. If all its
            file ids lie beyond the train ids, a class that it does not mention keeps its train id
            as file id: a mask of 0 and 255 is `classes=("background", "crack")`, `id_map={255: 1}`.
            The categories of a COCO file are classes by their names, with an `id_map` by their ids.
        ignore: label file ids that neither the loss nor a score sees; those of signed files may be
            negative. The default 255 gives way to an `id_map` that maps 255. For a COCO file, ids
            of categories.
        colors: RGB, 0-255, one a class; empty for the Cityscapes colours if the classes are
            Cityscapes', else a palette.
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
        """The origin of image `i`: its path, or `streets/clear/17`."""
        ...

    def __getitem__(self, i: int) -> dict[str, np.ndarray]:
        """`image`: uint8 RGB [h, w, 3]; `label`: uint8 train ids [h, w], 255 where ignored.

        Datasets with boxes have the fields of `boxes.BoxFiles` instead of `label`.
        """
        ...


class Files:
    """Image files and label files.

    Attributes:
        pairs: their paths and sizes.
        table: label file id to train id, see `labels.id_table`.
        red: the ids are in the red channel of the label files.
        colors: colours of the classes, to check palettes of label files; see `labels.class_ids`.
    """

    def __init__(
        self,
        domain: str,
        pairs: index.Pairs,
        table: np.ndarray,
        labels: LabelSet,
        red: bool = False,
    ):
        self.domain = domain
        self.pairs = pairs
        self.table = table
        self.labels = labels
        self.red = red
        self.colors = class_ids(table, labels)

    def __len__(self) -> int:
        return len(self.pairs.images)

    def size(self, i: int) -> tuple[int, int]:
        h, w = self.pairs.sizes[i].tolist()
        return h, w

    def name(self, i: int) -> str:
        return self.pairs.images[i]

    @property
    def unlabelled(self) -> bool:
        """Whether no image has a label file."""
        return not any(self.pairs.labels)

    def __getitem__(self, i: int) -> dict[str, np.ndarray]:
        path = self.pairs.images[i]
        return {"image": self._sized(i, path, read_image(path)), "label": self.label(i)}

    def label(self, i: int) -> UInt8[np.ndarray, "h w"]:
        """The label of image `i`, without reading the image."""
        path = self.pairs.labels[i]
        if not path:
            return np.full(self.size(i), IGNORE, np.uint8)
        ids = read_label(path, red=self.red, colors=self.colors)
        return self._sized(i, path, apply_table(ids, self.table, path))

    def ids(self, i: int) -> tuple[Integer[np.ndarray, " m"], Integer[np.ndarray, " m"]]:
        """The ids in the label file of image `i`, ascending, and the pixels of each.

        An image without label file has 255 everywhere.
        """
        path = self.pairs.labels[i]
        if not path:
            return np.array([IGNORE]), np.array([math.prod(self.size(i))])
        label = self._sized(i, path, read_label(path, red=self.red, colors=self.colors))
        if label.dtype not in (np.uint8, np.uint16):
            apply_table(label, self.table, path)  # raises an error for ids outside the table
            label = label.astype(np.uint16)  # negative ids are those of the same 16 bits
        counts = np.bincount(label.ravel(), minlength=1)
        ids = np.flatnonzero(counts)
        return ids, counts[ids]

    def _sized(self, i: int, path: str, array: np.ndarray) -> np.ndarray:
        if array.shape[:2] != self.size(i):
            h, w = array.shape[:2]
            index_h, index_w = self.size(i)
            raise ValueError(
                f"{path} is {w}x{h} but was {index_w}x{index_h} like its partner when the folder"
                " was indexed; fetch both files again and start again"
            )
        return array


class Mixture:
    """Several domains, one after another.

    Attributes:
        parts: their datasets, which have the same classes.
    """

    def __init__(self, parts: Sequence[Dataset]):
        first = parts[0]
        for part in parts:
            if part.labels.names != first.labels.names:
                raise ValueError(
                    f"domains {first.domain!r} and {part.domain!r} cannot be mixed, their classes"
                    f" differ: {', '.join(first.labels.names)} and {', '.join(part.labels.names)}"
                )
        self.domain = "+".join(part.domain for part in parts)
        self.labels = first.labels
        self.parts = tuple(parts)
        self._ends = list(itertools.accumulate(len(part) for part in parts))

    def __len__(self) -> int:
        return self._ends[-1]

    def at(self, i: int) -> tuple[Dataset, int]:
        """The dataset that holds image `i`, and the image's place there."""
        part = bisect.bisect_right(self._ends, i)
        return self.parts[part], i - (self._ends[part - 1] if part else 0)

    def size(self, i: int) -> tuple[int, int]:
        dataset, j = self.at(i)
        return dataset.size(j)

    def name(self, i: int) -> str:
        dataset, j = self.at(i)
        return dataset.name(j)

    def __getitem__(self, i: int) -> dict[str, np.ndarray]:
        dataset, j = self.at(i)
        return dataset[j]


class Subset:
    """Some images of a dataset, evenly spread because neighbours in a sequence are alike."""

    def __init__(self, dataset: Dataset, images: int):
        """Chooses the images.

        Args:
            dataset: the images to choose from.
            images: how many to choose; all, if the dataset has no more.
        """
        self.domain = dataset.domain
        self.labels = dataset.labels
        self.dataset = dataset
        count = min(images, len(dataset))
        self.images = [i * len(dataset) // count for i in range(count)]

    def __len__(self) -> int:
        return len(self.images)

    def size(self, i: int) -> tuple[int, int]:
        return self.dataset.size(self.images[i])

    def name(self, i: int) -> str:
        return self.dataset.name(self.images[i])

    def __getitem__(self, i: int) -> dict[str, np.ndarray]:
        return self.dataset[self.images[i]]


class Streets:
    """Generated street scenes; scene `i` of every domain shows the same world.

    Drawing a scene takes longer than reading a file. So scenes are kept while they fit into
    `CACHE_BYTES`.
    """

    CACHE_BYTES = 256 << 20

    def __init__(self, domain: str, options: StreetsOptions, train: bool):
        self.domain = domain
        self.labels = CITYSCAPES
        self.image_size = (int(options.size[0]), int(options.size[1]))
        self.count = options.images if train else options.val_images
        # Even seeds train, odd seeds validate: no run trains on validation scenes of another run,
        # whatever their seeds.
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

    def scene(self, i: int) -> str:
        """A text that identifies the picture of image `i`.

        Unlike its name it differs between training and validation, worlds and sizes.
        """
        h, w = self.image_size
        return f"streets/{self.domain}/{self.seed}/{i}/{h}x{w}"

    def __getitem__(self, i: int) -> dict[str, np.ndarray]:
        from jaxdg.streets import render as streets

        if i in self._drawn:
            return self._drawn[i]
        scene = streets.render(self.seed, i, self.domain, size=self.image_size)
        sample = self._sample(scene)
        for array in sample.values():
            array.flags.writeable = False  # later calls return the same array
        if (len(self._drawn) + 1) * sum(a.nbytes for a in sample.values()) <= self.CACHE_BYTES:
            self._drawn[i] = sample
        return sample

    def _sample(self, scene: Any) -> dict[str, np.ndarray]:
        return {"image": scene.image, "label": scene.label}
