"""Counts of the ids in the labels of a dataset, and so of the pixels or boxes of each class.

All labels are counted once, and the counts are kept as long as the label files stay the same: by
their resolved paths, sizes and modification times in nanoseconds. Records count by the digests in
their metadata, generated streets by their seed. A look at some evenly spread images is cheaper and
is kept in the same way.
"""

from collections.abc import Iterable, Sequence
import dataclasses
import hashlib
import json
import os
from pathlib import Path
import time
from typing import Any

import cv2
from jaxtyping import Int32, Int64, Integer
import numpy as np

from jaxdg.data import storage
from jaxdg.data.boxes import BoxFiles, CocoFiles
from jaxdg.data.cache import cached, fingerprint
from jaxdg.data.coco_maps import CocoMaps
from jaxdg.data.datasets import Dataset, Files, Mixture, Streets, Subset
from jaxdg.data.index import Defect
from jaxdg.data.labels import IGNORE
from jaxdg.data.records import METADATA, Records
from jaxdg.data.workers import read_ahead

VERSION = 1  # of the kept arrays
FIRST = 16  # images that a look begins with; their number doubles until enough was seen
KINDS = 65536  # ids that a label file may hold


@dataclasses.dataclass(frozen=True)
class Look:
    """The ids in the labels of some images of a dataset.

    Attributes:
        images: number of images that were looked at.
        ids: as the label files hold them, each once and ascending; for records and boxes the ids of
            the classes.
        counts: pixels of each id, or boxes of each class.
        odd: an image whose label holds ids that have no class; -1 if there is none.
    """

    images: int
    ids: Integer[np.ndarray, " m"]
    counts: Int64[np.ndarray, " m"]
    odd: int = -1


@dataclasses.dataclass(frozen=True)
class Counts:
    """The ids in all labels of a dataset.

    Attributes:
        classes: pixels or boxes of each class in each image.
        look: the same by the ids of the label files.
    """

    classes: Int32[np.ndarray, "n k"]
    look: Look


def class_pixels(dataset: Dataset, workers: int = 0) -> Int32[np.ndarray, "n k"]:
    """Pixels of each class in each image, counted once and kept, see `count`.

    Args:
        dataset: of label maps.
        workers: processes that read; 0 reads with threads of this process.

    Returns:
        One row an image, one column a class.
    """
    if isinstance(dataset, Mixture):
        return np.concatenate([class_pixels(part, workers) for part in dataset.parts])
    return count(dataset, workers).classes


def count(dataset: Dataset, workers: int = 0) -> Counts:
    """Counts all labels of a dataset, or recalls the counts if the label files are unchanged.

    Args:
        dataset: not a mixture.
        workers: processes that read; 0 reads with threads of this process.

    Raises:
        ValueError: a label is damaged, or holds ids that have no class.
    """
    n = len(dataset)
    k = len(dataset.labels.names)
    key, modified = _content(dataset)

    def make() -> dict[str, np.ndarray]:
        classes = np.zeros((n, k), np.int32)
        total = np.zeros(KINDS, np.int64)
        table = id_classes(dataset)
        read = _Read(dataset, range(n), strict=True)
        for i, (ids, found, _) in enumerate(read_ahead(read, n, workers)):
            total[ids] += found
            trained = table[ids]
            np.add.at(classes[i], trained[trained < k], found[trained < k])
        ids = np.flatnonzero(total)
        return {"classes": classes, "ids": ids, "counts": total[ids]}

    arrays = cached(["class counts", VERSION, key], modified, make)
    return Counts(arrays["classes"], Look(n, arrays["ids"], arrays["counts"]))


def look(
    dataset: Dataset,
    *,
    most: int,
    seconds: float,
    images: Sequence[int] | None = None,
    defects: list[Defect] | None = None,
) -> Look:
    """Looks at ever more evenly spread images until every class was seen or a limit is reached.

    Args:
        dataset: not a mixture.
        most: highest number of images to look at.
        seconds: longest time to look.
        images: those that count; None for all. Only then is the outcome of an earlier look at the
            same label files used.
        defects: receives the faults of labels, which then are no errors.

    Raises:
        ValueError: a label is damaged. Ids that have no class are no error here.
    """
    everything = list(range(len(dataset))) if images is None else list(images)
    modified: dict[str, int] = {}

    def make() -> dict[str, np.ndarray]:
        total, looked, odd = _progressive(dataset, everything, most, seconds, defects)
        for path in {storage.modified(path) for path in _label_files(dataset, looked)}:
            modified.update([path])
        ids = np.flatnonzero(total)
        result = {"images": np.array(len(looked)), "odd": np.array(odd)}
        return {**result, "ids": ids, "counts": total[ids]}

    if images is None and defects is None:
        arrays = cached(["class look", VERSION, _names(dataset), most], modified, make)
    else:
        arrays = make()
    return Look(int(arrays["images"]), arrays["ids"], arrays["counts"], int(arrays["odd"]))


def parts_of(dataset: Dataset) -> list[Dataset]:
    """The datasets of which a mixture, or a subset of one, consists."""
    if isinstance(dataset, Mixture):
        return [part for mixed in dataset.parts for part in parts_of(mixed)]
    if not (isinstance(dataset, Subset) and isinstance(dataset.dataset, Mixture)):
        return [dataset]
    chosen: dict[int, Subset] = {id(part): Subset(part, 0) for part in dataset.dataset.parts}
    for part, i in map(dataset.dataset.at, dataset.images):
        chosen[id(part)].images.append(i)
    return list(chosen.values())


def id_classes(dataset: Dataset) -> Integer[np.ndarray, "KINDS"]:
    """The class of every id in a `Look`; -1 where it has none, 255 where it is ignored."""
    if is_mapped(dataset):
        table = np.full(KINDS, -1, np.int16)
        k = len(dataset.labels.names)
        table[:k] = np.arange(k)
        table[IGNORE] = IGNORE
        return table
    return _inner(dataset).table


def is_mapped(dataset: Dataset) -> bool:
    """Whether the ids in a `Look` are those of the classes instead of those in label files.

    That is so for records, generated streets, boxes and the maps of COCO files.
    """
    inner = _inner(dataset)
    return not isinstance(inner, Files) or isinstance(inner, BoxFiles | CocoMaps)


def _inner(dataset: Dataset) -> Any:
    return dataset.dataset if isinstance(dataset, Subset) else dataset


def _progressive(
    dataset: Dataset, images: list[int], most: int, seconds: float, defects: list[Defect] | None
) -> tuple[Int64[np.ndarray, "KINDS"], list[int], int]:
    """Pixels of every id, the images that were looked at, and `Look.odd`."""
    total = np.zeros(KINDS, np.int64)
    table = id_classes(dataset)
    k = len(dataset.labels.names)
    wanted = np.arange(k)
    order = [images[i] for i in spread(len(images), most)]
    looked: list[int] = []
    odd = -1
    until = time.monotonic() + seconds
    while len(looked) < len(order) and time.monotonic() < until:
        if np.isin(wanted, table[np.flatnonzero(total)]).all():
            break
        fresh = order[len(looked) : max(FIRST, 2 * len(looked))]
        reading = read_ahead(_Read(dataset, fresh, strict=False), len(fresh), 0)
        for i, (ids, found, wrong) in zip(fresh, reading, strict=True):
            looked.append(i)
            total[ids] += found
            if odd < 0 and (table[ids] < 0).any():
                odd = i
            if wrong is not None and defects is None:
                raise ValueError(wrong.path + wrong.text)
            if wrong is not None and defects is not None:
                defects.append(wrong)
            if time.monotonic() > until:
                break
        reading.close()
    return total, looked, odd


def spread(items: int, most: int) -> list[int]:
    """At most `most` numbers below `items`: the first, the last, and ever denser between them.

    They are multiples of the golden ratio.
    """
    if not items:
        return []
    between = np.arange(4 * min(items, most)) * ((5**0.5 - 1) / 2) % 1.0 * items
    rest = range(items) if items <= most else ()
    return list(dict.fromkeys([0, items - 1, *between.astype(int).tolist(), *rest]))[:most]


@dataclasses.dataclass
class _Read:
    """The ids in the label of the i-th of some images, and pixels or boxes of each.

    It is a class and not a closure, so that it reaches worker processes by name.

    Attributes:
        dataset: holds the images.
        images: which of them, in order.
        strict: damage and ids that have no class raise errors; else damage is returned beside an
            empty result.
    """

    dataset: Dataset
    images: Sequence[int]
    strict: bool

    def __call__(
        self, i: int
    ) -> tuple[Integer[np.ndarray, " m"], Integer[np.ndarray, " m"], Defect | None]:
        i = self.images[i]
        try:
            ids, counts = truth_ids(self.dataset, i)
        except (ValueError, cv2.error) as error:
            if self.strict:
                raise
            path = label_path(self.dataset, i)
            none = np.zeros(0, np.int64)
            text = str(error).removeprefix(path).lstrip(": ")
            return none, none, Defect(path, f": {text}")
        if self.strict and (id_classes(self.dataset)[ids] < 0).any():
            # Reading the label raises the error that names the file.
            read = (
                self.dataset.label if isinstance(self.dataset, Files) else self.dataset.__getitem__
            )
            read(i)
        return ids, counts, None


def truth_ids(
    dataset: Dataset, i: int
) -> tuple[Integer[np.ndarray, " m"], Integer[np.ndarray, " m"]]:
    """The ids in a label and the pixels of each, or the classes and the number of boxes of each.

    Regions of crowds do not count.

    Args:
        dataset: not a mixture.
        i: the image; it is not read.

    Raises:
        ValueError: the label is damaged.
    """
    if isinstance(dataset, Subset):
        return truth_ids(dataset.dataset, dataset.images[i])
    if isinstance(dataset, BoxFiles):
        truth = dataset.boxes(i)
    elif isinstance(dataset, Files):
        return dataset.ids(i)
    elif isinstance(dataset, Records):
        truth = dataset.truth(i)
    else:
        truth = dataset[i]
    counted = truth["classes"][~truth["crowd"]] if "classes" in truth else truth["label"]
    counts = np.bincount(counted.ravel(), minlength=1)
    ids = np.flatnonzero(counts)
    return ids, counts[ids]


def label_path(dataset: Dataset, i: int) -> str:
    """The label file of image `i`, or else its name."""
    if isinstance(dataset, Subset):
        return label_path(dataset.dataset, dataset.images[i])
    return (isinstance(dataset, Files) and dataset.pairs.labels[i]) or dataset.name(i)


def _label_files(dataset: Dataset, images: Iterable[int]) -> list[str]:
    """The label files of some images; an image without one counts itself."""
    inner = _inner(dataset)
    if not isinstance(inner, Files) or isinstance(inner, CocoFiles | CocoMaps):
        return []
    at = dataset.images if isinstance(dataset, Subset) else range(len(dataset))
    return [inner.pairs.labels[at[i]] or inner.pairs.images[at[i]] for i in images]


def _names(dataset: Dataset) -> str:
    """A digest of the names in a dataset and of its label table.

    For records and streets it covers their content too.
    """
    inner = _inner(dataset)
    chosen = dataset.images if isinstance(dataset, Subset) else len(dataset)
    key = [dataset.domain, dataset.labels.names, chosen, os.path.realpath(".")]
    digest = hashlib.sha256(json.dumps(key).encode())
    if isinstance(inner, Files) and not isinstance(inner, CocoFiles | CocoMaps):
        digest.update("\0".join(inner.pairs.labels).encode(errors="surrogateescape"))
        digest.update(np.asarray(getattr(inner, "table", 0)).tobytes())
    else:
        digest.update(json.dumps(_content(inner)[0]).encode())
    return digest.hexdigest()


def _content(dataset: Dataset) -> tuple[list[Any], dict[str, int]]:
    """A key for the content of the labels; and the file that changed last, with the time (ns)."""
    of: list[Any] = [dataset.domain, dataset.labels.names, len(dataset)]
    if isinstance(dataset, CocoFiles | CocoMaps):
        if isinstance(dataset, CocoFiles):
            content = (dataset.content.classes, dataset.content.crowd, dataset.content.ends)
        else:
            regions = dataset.regions
            content = (regions.classes, regions.ends, regions.runs, dataset.pairs.sizes)
        return [*of, hashlib.sha256(b"".join(array.tobytes() for array in content)).hexdigest()], {}
    if isinstance(dataset, Files):
        table = hashlib.sha256(np.asarray(getattr(dataset, "table", 0)).tobytes()).hexdigest()
        files, modified = fingerprint(_label_files(dataset, range(len(dataset))))
        return [*of, table, files], modified
    if isinstance(dataset, Records):
        metadata = hashlib.sha256(Path(dataset.directory, METADATA).read_bytes()).hexdigest()
        return [*of, dataset.split, list(dataset.left_out), metadata], {}
    if isinstance(dataset, Streets):
        return [*of, dataset.seed, dataset.image_size], {}
    digest = hashlib.sha256(np.asarray(getattr(dataset, "table", 0)).tobytes())
    for i in range(len(dataset)):
        digest.update(json.dumps([dataset.name(i), dataset.size(i)]).encode())
    return [*of, digest.hexdigest()], {}
