"""A command whose output nobody reads any more, as in `jaxdg --help | head -1`, ends quietly."""

from collections.abc import Iterator
import contextlib
import os
import select
import sys


@contextlib.contextmanager
def ends_quietly() -> Iterator[None]:
    """Ends the program with exit code 1 and no message once the reader of standard output is gone.

    A broken pipe to another process is an error as any other.
    """
    try:
        try:
            yield
        finally:
            sys.stdout.flush()
    except BrokenPipeError:
        poll = select.poll()
        poll.register(sys.stdout, select.POLLOUT)
        if not any(event & select.POLLERR for _, event in poll.poll(0)):
            raise
        # Python flushes once more as it ends.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
