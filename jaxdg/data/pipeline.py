"""Batches by random access: what a step trains on depends on (seed, step) alone.

Position p = step * batch size + row of the endless sequence of examples belongs to epoch p // length, and each epoch is a permutation drawn
from (seed, epoch). The augmentation of an example is drawn from (seed, p). So the data state of a checkpoint is the step, and a run sees
the same batches with 0 or 8 worker processes and on 1 or 4 hosts. Built on `grain.MapDataset`; the import brings in no flax and touches no
device, because worker processes are spawned and import it again.
"""

import atexit
import collections
from collections.abc import Generator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
import contextlib
import dataclasses
import functools
import multiprocessing
import os
import signal
import sys
import threading
import types
from typing import Any
import weakref

import cloudpickle
import cv2
import grain
from jaxtyping import Int32, Int64
import numpy as np

from jaxdg.data.datasets import Dataset
from jaxdg.data.labels import IGNORE
from jaxdg.data.transforms import augment

EXAMPLE, EPOCH = 0, 1  # keep the random streams of positions and epochs apart
Batches = Generator[dict[str, np.ndarray], None, None]
_open: weakref.WeakSet[Batches] = weakref.WeakSet()  # iterators not yet closed
_batches: grain.MapDataset  # in a worker process: what it reads from


def train_batches(
    dataset: Dataset,
    *,
    seed: int,
    batch_size: int,
    crop: tuple[int, int],
    scale: tuple[float, float],
    flip: float,
    max_class_share: float = 1.0,
    start: int,
    stop: int,
    workers: int = 0,
    shard: tuple[int, int] = (0, 1),
) -> Batches:
    """The rows of this host in the global batches `start` to `stop - 1`.

    Args:
        dataset: what to train on.
        seed: order and augmentation.
        batch_size: examples in a global batch.
        crop: height and width, pixels.
        scale: smallest and largest resize factor.
        flip: probability of a horizontal flip.
        max_class_share: see `transforms.augment`.
        start: first step.
        stop: step to stop before.
        workers: worker processes; 0 reads with threads of this process.
        shard: this host's index and the number of hosts; host i gets the i-th block of rows.

    Returns:
        An iterator over batches of `image` uint8 [b, crop height, crop width, 3] and `label` uint8 [b, crop height, crop width], b =
        batch size / hosts. Its `close()`, or dropping it, ends the workers.

    Raises:
        ValueError: the dataset is empty or the batch does not split evenly; while iterating: a damaged file, by name.
    """
    if not len(dataset):
        raise ValueError(f"domain {dataset.domain!r} has no images to train on")
    rows = _rows(batch_size, shard)
    augmentation = {"crop": crop, "scale": scale, "flip": flip, "max_class_share": max_class_share}
    example = _TrainExample(dataset, seed, augmentation, start * batch_size + shard[0] * rows, rows, batch_size)
    return _iterate(grain.MapDataset.range((stop - start) * rows).map(example).batch(rows), workers)


def batch_files(dataset: Dataset, *, seed: int, batch_size: int, step: int) -> list[str]:
    """Names of the images of a global training batch, in order.

    Args:
        dataset: the one given to `train_batches`.
        seed: as given to `train_batches`.
        batch_size: as given to `train_batches`.
        step: which batch.

    Returns:
        One name a row.
    """
    return [dataset.name(_example_at(seed, len(dataset), step * batch_size + row)) for row in range(batch_size)]


def eval_batches(dataset: Dataset, *, batch_size: int, workers: int = 0, shard: tuple[int, int] = (0, 1)) -> Batches:
    """The rows of this host in batches that show every image once, at its own size.

    A batch holds images of one size. The last batch of a size is padded, so that shapes stay fixed and all hosts get as many batches.

    Args:
        dataset: what to judge on.
        batch_size: images in a global batch.
        workers: worker processes; 0 reads with threads of this process.
        shard: this host's index and the number of hosts; host i gets the i-th block of rows.

    Returns:
        An iterator over batches of `image` uint8 [b, h, w, 3], `label` uint8 [b, h, w], `mask` bool [b], False where padded, and `index`
        int32 [b], the image's place in the dataset, -1 where padded; b = batch size / hosts. Its `close()`, or dropping it, ends the
        workers.

    Raises:
        ValueError: the dataset is empty or the batch does not split evenly; while iterating: a damaged file, by name.
    """
    if not len(dataset):
        raise ValueError(f"domain {dataset.domain!r} has no images to evaluate on")
    rows = _rows(batch_size, shard)
    order, sizes = _eval_order(np.array([dataset.size(i) for i in range(len(dataset))], np.int32), batch_size)
    mine = order.reshape(-1, batch_size)[:, shard[0] * rows : (shard[0] + 1) * rows].ravel()
    return _iterate(grain.MapDataset.range(len(mine)).map(_EvalExample(dataset, mine, sizes, rows)).batch(rows), workers)


@dataclasses.dataclass
class _TrainExample:
    """Number i of a host's rows, read and augmented; a class and not a closure, so that it reaches worker processes by name."""

    dataset: Dataset
    seed: int
    augmentation: dict[str, Any]
    first: int
    rows: int
    batch_size: int

    def __call__(self, i: int) -> dict[str, np.ndarray]:
        p = self.first + i // self.rows * self.batch_size + i % self.rows
        sample = self.dataset[_example_at(self.seed, len(self.dataset), p)]
        return augment(sample, rng=np.random.default_rng((self.seed, EXAMPLE, p)), **self.augmentation)


@dataclasses.dataclass
class _EvalExample:
    """Number i of a host's rows, an image or padding."""

    dataset: Dataset
    order: Int64[np.ndarray, " m"]
    sizes: Int32[np.ndarray, "batches 2"]
    rows: int

    def __call__(self, i: int) -> dict[str, Any]:
        at = int(self.order[i])
        if at < 0:
            h, w = self.sizes[i // self.rows].tolist()
            sample = {"image": np.zeros((h, w, 3), np.uint8), "label": np.full((h, w), IGNORE, np.uint8)}
        else:
            sample = self.dataset[at]
        return {**sample, "mask": np.bool_(at >= 0), "index": np.int32(at)}


def _rows(batch_size: int, shard: tuple[int, int]) -> int:
    host, hosts = shard
    if batch_size < 1 or batch_size % hosts:
        raise ValueError(f"batch_size {batch_size} does not split evenly over {hosts} hosts; make it a multiple of {hosts}")
    if not 0 <= host < hosts:
        raise ValueError(f"host {host} of {hosts} hosts; hosts count from 0")
    return batch_size // hosts


@functools.lru_cache(maxsize=4)
def _permutation(seed: int, length: int, epoch: int) -> Int64[np.ndarray, " n"]:
    return np.random.default_rng((seed, EPOCH, epoch)).permutation(length)


def _example_at(seed: int, length: int, p: int) -> int:
    return int(_permutation(seed, length, p // length)[p % length])


def _eval_order(sizes: Int32[np.ndarray, "n 2"], batch_size: int) -> tuple[Int64[np.ndarray, " m"], Int32[np.ndarray, "batches 2"]]:
    """Examples grouped by size, each group padded with -1 to whole batches, and the size of each batch."""
    order, batch_sizes = [], []
    unique, group = np.unique(sizes, axis=0, return_inverse=True)
    for g, size in enumerate(unique):
        members = np.flatnonzero(group.reshape(-1) == g)
        order.append(np.pad(members, (0, -len(members) % batch_size), constant_values=-1))
        batch_sizes += [size] * (len(order[-1]) // batch_size)
    return np.concatenate(order), np.stack(batch_sizes)


def _iterate(batches: grain.MapDataset, workers: int) -> Batches:
    if workers:
        iterator = _from_processes(batches, workers)
    else:
        threads = max(2, min(8, os.cpu_count() or 1))
        iterator = _from_threads(batches.to_iter_dataset(grain.ReadOptions(num_threads=threads, prefetch_buffer_size=threads)))
    _open.add(iterator)
    return iterator


@atexit.register
def _close_all() -> None:
    """Ends what a run left open, while there still is an interpreter to do it."""
    for iterator in list(_open):
        with contextlib.suppress(ValueError):  # another thread waits for a batch and will never see it
            iterator.close()


def _from_threads(batches: grain.IterDataset) -> Batches:
    iterator = iter(batches)
    try:
        yield from iterator
    finally:
        iterator.close()


def _from_processes(batches: grain.MapDataset, workers: int) -> Batches:
    """Batches in order from a pool of processes, two a process ahead.

    A pool in place of grain's `mp_prefetch`, which, in grain 0.2.18, waits 25 seconds for its processes where a run ends early, and whose
    shared memory outgrows the 64 MB of a container by default. The batches are the same.
    """
    spawn, dataset = multiprocessing.get_context("spawn"), cloudpickle.dumps(batches)
    pool = ProcessPoolExecutor(workers, mp_context=spawn, initializer=_start_worker, initargs=(dataset,))
    pending = collections.deque()
    try:
        for i in range(len(batches)):
            with _inherited():
                pending.append(pool.submit(_read, i))
            if len(pending) == 2 * workers:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    except BrokenProcessPool as error:
        for process in (pool._processes or {}).values():
            process.kill()  # the pool only asks the others to end, by the signal that they leave to the main process
        raise ChildProcessError(
            "a data worker was killed, perhaps for want of memory; run again with a lower --config.data.workers"
        ) from error
    finally:
        pool.shutdown(cancel_futures=True)


@contextlib.contextmanager
def _inherited():
    """What processes started here inherit: SIGINT and SIGTERM blocked, and no main module.

    Ctrl-C and schedulers signal every process of a run, and the main process still needs its workers to finish the step. And a worker
    would otherwise import the main module, with flax and all of a training run, though it needs the datasets alone.
    """
    main = sys.modules["__main__"]
    before = signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGINT, signal.SIGTERM))
    sys.modules["__main__"] = types.ModuleType("__main__")
    try:
        yield
    finally:
        sys.modules["__main__"] = main
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _start_worker(dataset: bytes) -> None:
    global _batches
    threading.Thread(target=_end_with_parent, daemon=True).start()
    cv2.setNumThreads(1)  # the processes are the parallelism
    _batches = cloudpickle.loads(dataset)


def _end_with_parent() -> None:
    """Ends a worker with the main process, however that ends."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _read(i: int) -> Any:
    return _batches[i]
