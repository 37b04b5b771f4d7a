"""Work ahead of and behind a loop, each in a thread, with bounded queues."""

from collections import deque
from collections.abc import Callable, Generator
from concurrent.futures import Future, ThreadPoolExecutor
import contextlib
import queue
import threading
from typing import Any, TypeVar

T = TypeVar("T")
WAIT = 0.1  # seconds between two looks at whether to end
_END = object()


def read_ahead(
    items: Generator[T, None, None],
    size: int,
    *,
    newest: bool = False,
    stop: Callable[[], bool] = lambda: False,
) -> Generator[T, None, None]:
    """Iterates in a thread while the caller works on what came before.

    Args:
        items: the thread closes them, too.
        size: most items that wait.
        newest: drops the item that waits longest rather than wait itself.
        stop: ends the iteration early; it is asked often.

    Raises:
        Exception: whatever `items` raises, once what came before it is taken.
    """
    waiting: queue.Queue[Any] = queue.Queue(size)
    ended = threading.Event()

    def put(entry: tuple[Any, BaseException | None], drops: bool = False) -> None:
        while not ended.is_set():
            with contextlib.suppress(queue.Full):
                waiting.put(entry, timeout=0 if drops else WAIT)
                return
            if drops:
                with contextlib.suppress(queue.Empty):
                    waiting.get_nowait()

    def read() -> None:
        try:
            for item in items:
                if ended.is_set():
                    break
                put((item, None), drops=newest)
            put((_END, None))
        except BaseException as error:
            put((_END, error))
        finally:
            items.close()

    # A camera that hangs must not keep the program from ending.
    thread = threading.Thread(target=read, daemon=True)
    thread.start()
    try:
        while not stop():
            try:
                item, error = waiting.get(timeout=WAIT)
            except queue.Empty:
                continue
            if error is not None:
                raise error
            if item is _END:
                return
            yield item
    finally:
        ended.set()
        thread.join(timeout=5)


class Behind:
    """Calls functions in a thread, one after another; a context manager that waits for the last.

    An error of a call is raised by a later call, or at the end.
    """

    def __init__(self, size: int):
        """Args:
        size: most calls that wait.
        """
        self._size = size
        self._calls: deque[Future] = deque()
        self._pool = ThreadPoolExecutor(1)

    def __call__(self, function: Callable[..., Any], *arguments: Any) -> None:
        """Calls the function with the arguments, later; waits while too many calls do."""
        self._calls.append(self._pool.submit(function, *arguments))
        self._wait(self._size)

    def _wait(self, left: int) -> None:
        while len(self._calls) > left:
            self._calls.popleft().result()

    def __enter__(self) -> "Behind":
        return self

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        try:
            if error is None:
                self._wait(0)
        finally:
            self._pool.shutdown(cancel_futures=True)
