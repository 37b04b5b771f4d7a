"""Items in order, read ahead of their use by threads or worker processes.

The import brings in no flax and touches no device, because worker processes are spawned and import
it again.
"""

import atexit
import collections
from collections.abc import Callable, Generator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
import contextlib
import multiprocessing
import os
import signal
import sys
import threading
import types
from typing import TYPE_CHECKING, Any
import weakref

import cloudpickle
import cv2

if TYPE_CHECKING:
    import grain

Items = Generator[Any, None, None]
_open: weakref.WeakSet[Items] = weakref.WeakSet()  # iterators not yet closed
_items: "grain.MapDataset"  # the items that a worker process reads


def read_ahead(
    read: Callable[[int], Any], n: int, workers: int, *, rows: int | None = None
) -> Items:
    """Reads the items 0 to n - 1 once each, ahead of their use.

    Args:
        read: reads item i; with worker processes it is pickled.
        n: number of items.
        workers: worker processes; 0 reads with threads of this process.
        rows: so many items in a row are stacked to a batch; None yields the items themselves.

    Returns:
        An iterator over the items or batches in order; what reading raises, it raises. Its
        `close()`, or dropping it, ends the workers.
    """
    # Importing grain takes a quarter of a second, which commands that read nothing do not wait for.
    import grain

    items = grain.MapDataset.range(n).map(read)
    if rows is not None:
        items = items.batch(rows)
    if workers:
        iterator = _from_processes(items, workers)
    else:
        threads = max(2, min(8, os.cpu_count() or 1))
        options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=threads)
        iterator = _from_threads(items.to_iter_dataset(options))
    _open.add(iterator)
    return iterator


@atexit.register
def _close_all() -> None:
    """Ends the iterators that a run left open, before the interpreter goes away."""
    for iterator in list(_open):
        with contextlib.suppress(ValueError):  # raised if another thread still waits for an item
            iterator.close()


def _from_threads(items: "grain.IterDataset") -> Items:
    iterator = iter(items)
    try:
        yield from iterator
    finally:
        iterator.close()


def _from_processes(items: "grain.MapDataset", workers: int) -> Items:
    """Items in order from a pool of processes, two a process ahead.

    A pool replaces grain's `mp_prefetch`. In grain 0.2.18 that waits 25 seconds for its processes
    when a run ends early, and its shared memory outgrows the 64 MB of a container by default. The
    items are the same.
    """
    spawn = multiprocessing.get_context("spawn")
    dataset = (cloudpickle.dumps(items),)
    pool = ProcessPoolExecutor(workers, spawn, initializer=_start_worker, initargs=dataset)
    pending = collections.deque()
    try:
        for i in range(len(items)):
            with _inherited():
                pending.append(pool.submit(_read, i))
            if len(pending) == 2 * workers:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    except BrokenProcessPool as error:
        # The pool ends the others by SIGTERM only, which they block.
        for process in (pool._processes or {}).values():
            process.kill()
        raise ChildProcessError(
            "a data worker was killed, perhaps for lack of memory; run again with a lower"
            " --config.data.workers"
        ) from error
    finally:
        pool.shutdown(cancel_futures=True)


@contextlib.contextmanager
def _inherited():
    """Sets what processes started here inherit: blocked signals and an empty main module.

    Ctrl-C, schedulers and closed terminals signal every process of a run, and the main process
    still needs its workers to finish the step. So the signals of `cli.Interrupt` are blocked.
    Without the empty module a worker would import the main module, with flax and all of a training
    run, although it needs only the datasets.
    """
    main = sys.modules["__main__"]
    signals = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP)
    before = signal.pthread_sigmask(signal.SIG_BLOCK, signals)
    sys.modules["__main__"] = types.ModuleType("__main__")
    try:
        yield
    finally:
        sys.modules["__main__"] = main
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _start_worker(dataset: bytes) -> None:
    global _items
    threading.Thread(target=_end_with_parent, daemon=True).start()
    cv2.setNumThreads(1)  # the processes are the parallelism
    _items = cloudpickle.loads(dataset)


def _end_with_parent() -> None:
    """Ends a worker with the main process, however that ends."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _read(i: int) -> Any:
    return _items[i]
