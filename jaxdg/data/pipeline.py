"""Batches by random access: the examples of a step depend on (seed, step) alone.

Position p = step * batch size + row of the endless sequence of examples gets an image from a
sampler, and its augmentation is drawn from (seed, p). So the data state of a checkpoint is the
step, and a run sees the same batches with 0 or 8 worker processes and on 1 or 4 hosts. The import
brings in no flax and touches no device, because worker processes are spawned and import it again.
"""

import dataclasses
from typing import Any, Protocol, runtime_checkable

from jaxtyping import Int32, Int64, UInt8
import numpy as np

from jaxdg.data.augment.corruptions import random_corruption
from jaxdg.data.augment.fractals import Pictures
from jaxdg.data.augment.pixmix import pixmix
from jaxdg.data.augment.randaugment import randaugment
from jaxdg.data.augment.transforms import BOX_FIELDS, Augmentation, random_crop
from jaxdg.data.box_fields import areas_of
from jaxdg.data.datasets import Dataset
from jaxdg.data.labels import IGNORE
from jaxdg.data.samplers import EXAMPLE, Sampler
from jaxdg.data.workers import Items, read_ahead


@runtime_checkable
class Judging(Protocol):
    """Resizes the images that a model is judged on: an evaluation protocol, or `Fit` for boxes."""

    def sizes(self, size: tuple[int, int]) -> Any:
        """Height and width of an image and of its label after `prepare`, from the stored size."""
        ...

    def prepare(self, sample: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """A sample of a dataset, resized."""
        ...


def train_batches(
    dataset: Dataset,
    sampler: Sampler,
    augmentation: Augmentation,
    *,
    seed: int,
    batch_size: int,
    start: int,
    stop: int,
    max_boxes: int = 0,
    styles: bool = False,
    corruptions: tuple[str, ...] = (),
    workers: int = 0,
    shard: tuple[int, int] = (0, 1),
) -> Items:
    """The rows of this host in the global batches `start` to `stop - 1`.

    Args:
        dataset: the images to train on.
        sampler: the order, see `samplers.make_sampler`.
        augmentation: how crops are made.
        seed: of the augmentation.
        batch_size: examples in a global batch.
        start: first step.
        stop: step to stop before.
        max_boxes: boxes are padded to so many an image.
        styles: draws a picture to go with each image.
        corruptions: kinds of which one is drawn for a corrupted copy of each image; () for none.
        workers: worker processes; 0 reads with threads of this process.
        shard: this host's index and the number of hosts; host i gets the i-th block of rows.

    Returns:
        An iterator over batches of `image` uint8 [b, crop height, crop width, 3], b = batch size /
        hosts, with `label` uint8 [b, crop height, crop width], or with `boxes` float32 [b, n, 4],
        `classes` int32, `areas` float32, `difficult`, `crowd` and `valid` bool, all [b, n], n =
        max_boxes, `valid` False where padded; with `style` and `corrupted` uint8 like `image`, if
        asked for; and with `inside` int32 [b, 2] if crops are padded in the corner, see
        `random_crop`. Its `close()`, or dropping it, ends the workers.

    Raises:
        FileNotFoundError: there are no pictures in the folder named.
        ValueError: the batch does not split evenly; while iterating: a damaged file or one of more
            than `max_boxes` boxes, by name.
    """
    rows = _rows(batch_size, shard)
    pictures = Pictures.of(augmentation.pictures if styles or augmentation.pixmix[0] else None)
    first = start * batch_size + shard[0] * rows
    example = _TrainExample(
        dataset,
        sampler,
        augmentation,
        pictures,
        seed,
        max_boxes,
        styles,
        corruptions,
        first,
        rows,
        batch_size,
    )
    return read_ahead(example, (stop - start) * rows, workers, rows=rows)


def batch_files(dataset: Dataset, sampler: Sampler, *, batch_size: int, step: int) -> list[str]:
    """Names of the images of a global training batch, in order.

    Args:
        dataset: the one given to `train_batches`.
        sampler: likewise.
        batch_size: likewise.
        step: which batch.

    Returns:
        One name a row.
    """
    return [dataset.name(sampler(step * batch_size + row).image) for row in range(batch_size)]


def eval_batches(
    dataset: Dataset,
    *,
    batch_size: int,
    protocol: Judging | None = None,
    max_boxes: int = 0,
    workers: int = 0,
    shard: tuple[int, int] = (0, 1),
) -> Items:
    """The rows of this host in batches that show every image once.

    A batch holds images of similar sizes, in the upper left corner of arrays that fit the largest.
    So there are few shapes, however many sizes there are, and images that all have one size are not
    padded. The last batch of a shape is filled up, so that all hosts get the same number of
    batches.

    Args:
        dataset: the images to judge on.
        batch_size: images in a global batch.
        protocol: resizes images, one for label maps or one for boxes; None leaves them at their own
            size.
        max_boxes: boxes are padded to so many an image; 0 for a dataset of label maps.
        workers: worker processes; 0 reads with threads of this process.
        shard: this host's index and the number of hosts; host i gets the i-th block of rows.

    Returns:
        An iterator over batches of `image` uint8 [b, h, w, 3], b = batch size / hosts, and `size`
        int32 [b, 2], every image's own height and width, with `label` uint8 [b, h2, w2] (255 where
        padded) and `label_size`, or with the boxes of `train_batches`; `mask` bool [b], False where
        an image only fills up the batch, and `index` int32 [b], its place in the dataset, -1 where
        it fills up. Its `close()`, or dropping it, ends the workers.

    Raises:
        ValueError: the dataset is empty or the batch does not split evenly; while iterating: a
            damaged file or one of more than `max_boxes` boxes, by name.
    """
    if not len(dataset):
        raise ValueError(f"domain {dataset.domain!r} has no images to evaluate on")
    rows = _rows(batch_size, shard)
    stored = (dataset.size(i) for i in range(len(dataset)))
    pairs = [protocol.sizes(size) if protocol else (size, size) for size in stored]
    sizes = np.array(pairs, np.int32)
    order, shapes = _eval_order(sizes, batch_size)
    mine = order.reshape(-1, batch_size)[:, shard[0] * rows : (shard[0] + 1) * rows].ravel()
    example = _EvalExample(dataset, protocol, mine, shapes, rows, max_boxes)
    return read_ahead(example, len(mine), workers, rows=rows)


@dataclasses.dataclass
class _TrainExample:
    """Number i of a host's rows, read and augmented.

    It is a class and not a closure, so that it reaches worker processes by name.
    """

    dataset: Dataset
    sampler: Sampler
    augmentation: Augmentation
    pictures: Pictures
    seed: int
    max_boxes: int
    styles: bool
    corruptions: tuple[str, ...]
    first: int
    rows: int
    batch_size: int

    def __call__(self, i: int) -> dict[str, np.ndarray]:
        p = self.first + i // self.rows * self.batch_size + i % self.rows
        at, wanted = self.sampler(p)
        sample = _read(self.dataset, at, self.max_boxes)
        rng = np.random.default_rng((self.seed, EXAMPLE, p))
        sample = random_crop(sample, self.augmentation, rng, wanted)
        sample = randaugment(sample, *self.augmentation.randaugment, rng)
        sample = _pad_boxes(sample, self.max_boxes)
        sample["image"] = pixmix(sample["image"], *self.augmentation.pixmix, self.pictures, rng)
        if self.styles:
            sample["style"] = self.pictures.draw(self.augmentation.crop, rng)
        if self.corruptions:
            sample["corrupted"] = random_corruption(sample["image"], self.corruptions, rng)
        return sample


@dataclasses.dataclass
class _EvalExample:
    """Number i of a host's rows: an image, or an example that fills up a batch."""

    dataset: Dataset
    protocol: Judging | None
    order: Int64[np.ndarray, " m"]
    shapes: Int32[np.ndarray, "batches 2 2"]
    rows: int
    max_boxes: int

    def __call__(self, i: int) -> dict[str, Any]:
        at = int(self.order[i])
        sample = _read(self.dataset, at, self.max_boxes) if at >= 0 else _nothing(self.max_boxes)
        if self.protocol and at >= 0:
            sample = self.protocol.prepare(sample)
        sample = {**_pad_boxes(sample, self.max_boxes), "mask": np.bool_(at >= 0)}
        sample["index"] = np.int32(at)
        image_shape, label_shape = self.shapes[i // self.rows]
        sample["image"], sample["size"] = _pad(sample["image"], image_shape, 0)
        if "label" in sample:
            sample["label"], sample["label_size"] = _pad(sample["label"], label_shape, IGNORE)
        return sample


def _read(dataset: Dataset, i: int, max_boxes: int) -> dict[str, np.ndarray]:
    sample = dataset[i]
    n = len(sample.get("boxes", ()))
    if n > max_boxes:
        raise ValueError(
            f"{dataset.name(i)} has {n} boxes; data.max_boxes is {max_boxes}; allowed: at least {n}"
        )
    if "boxes" in sample and "areas" not in sample:
        sample = {**sample, "areas": areas_of(sample["boxes"])}
    return sample


def _pad_boxes(sample: dict[str, np.ndarray], max_boxes: int) -> dict[str, np.ndarray]:
    """Boxes, if there are any, in the first rows of arrays of fixed length."""
    if "boxes" not in sample:
        return sample
    n = len(sample["boxes"])
    padded = {key: sample[key] for key in ("image", "inside") if key in sample}
    padded["valid"] = np.arange(max_boxes) < n
    for key, (shape, dtype) in BOX_FIELDS.items():
        padded[key] = np.zeros((max_boxes, *shape), dtype)
        padded[key][:n] = sample[key]
    return padded


def _pad(
    array: UInt8[np.ndarray, "h w *c"], shape: Int32[np.ndarray, "2"], value: int
) -> tuple[UInt8[np.ndarray, "h2 w2 *c"], Int32[np.ndarray, "2"]]:
    """An image or label in the upper left corner of `shape`, and its size."""
    h, w = array.shape[:2]
    padded = np.full((*shape, *array.shape[2:]), value, np.uint8)
    padded[:h, :w] = array
    return padded, np.array((h, w), np.int32)


def _nothing(max_boxes: int) -> dict[str, np.ndarray]:
    """An example of one pixel that no score sees."""
    image = np.zeros((1, 1, 3), np.uint8)
    if not max_boxes:
        return {"image": image, "label": np.full((1, 1), IGNORE, np.uint8)}
    boxes = {key: np.zeros((0, *shape), dtype) for key, (shape, dtype) in BOX_FIELDS.items()}
    return {"image": image, **boxes}


def _rows(batch_size: int, shard: tuple[int, int]) -> int:
    host, hosts = shard
    if batch_size < 1 or batch_size % hosts:
        raise ValueError(
            f"batch_size {batch_size} does not split evenly over {hosts} hosts; make it a multiple"
            f" of {hosts}"
        )
    if not 0 <= host < hosts:
        raise ValueError(f"host {host} of {hosts} hosts; hosts count from 0")
    return batch_size // hosts


def _eval_order(
    sizes: Int32[np.ndarray, "n 2 2"], batch_size: int
) -> tuple[Int64[np.ndarray, " m"], Int32[np.ndarray, "batches 2 2"]]:
    """Examples grouped by the sizes of image and label, in whole batches, and each batch's shapes.

    Groups are padded with -1 to whole batches. A group holds sides between two half powers of 2.
    The shape of an array is the largest of its group of image sizes or of label sizes. So a model
    compiles for no more shapes than there are groups of image sizes. Neighbours in a group have
    similar sizes.
    """
    order = []
    shapes = []
    level = np.ceil(2 * np.log2(sizes)).astype(np.int32)
    largest = np.empty_like(sizes)
    for kind in range(2):
        group = np.unique(level[:, kind], axis=0, return_inverse=True)[1].reshape(-1)
        for g in range(group.max() + 1):
            largest[group == g, kind] = sizes[group == g, kind].max(axis=0)
    group = np.unique(level.reshape(-1, 4), axis=0, return_inverse=True)[1].reshape(-1)
    for g in range(group.max() + 1):
        members = np.flatnonzero(group == g)
        members = members[np.lexsort(sizes[members].reshape(-1, 4).T[::-1])]
        order.append(np.pad(members, (0, -len(members) % batch_size), constant_values=-1))
        shapes += [largest[members[0]]] * (len(order[-1]) // batch_size)
    return np.concatenate(order), np.stack(shapes)
