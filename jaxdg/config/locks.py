"""One process at a time: a lock on a file, which says who holds it.

The lock is the operating system's (POSIX), so that the holder's death frees it, also by kill -9,
and network folders know it (NFS, and Lustre where it is mounted with `flock`). A process must not
open the file again while it holds the lock: closing it would free the lock.
"""

from collections.abc import Callable, Iterator
import contextlib
import errno
import fcntl
import json
import os
from pathlib import Path
import shlex
import socket
import sys
import time
from typing import Any

_NO_LOCKS = (errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL)


class InUse(OSError):
    """Another process holds the lock."""


@contextlib.contextmanager
def held(path: Path, what: str, say: Callable[[str], None], wait: int = 0) -> Iterator[None]:
    """Holds the lock `path` inside; the file is removed in the end.

    Args:
        path: of the file, in a folder that exists.
        what: is locked, in words, for messages.
        say: receives a line where the file system has no locks.
        wait: seconds to wait for another process that holds it.

    Raises:
        InUse: another process holds it; the message names it and its host.
    """
    last = time.monotonic() + wait
    while (handle := _taken(path, what, say, final=time.monotonic() >= last)) is None:
        time.sleep(0.1)
    try:
        yield
    finally:
        path.unlink(missing_ok=True)
        os.close(handle)


def holder(path: Path) -> str | None:
    """Who holds the lock `path`, in words; None if nobody does, or this process."""
    try:
        handle = os.open(path, os.O_RDWR)
    except FileNotFoundError:
        return None
    try:
        fcntl.lockf(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        return _words(_note(handle)) if error.errno not in _NO_LOCKS else _living(_note(handle))
    finally:
        os.close(handle)
    return None


def _taken(path: Path, what: str, say: Callable[[str], None], final: bool) -> int | None:
    """The open, locked file; None if another process holds it and it is not the `final` try."""
    while True:
        handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.lockf(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            other = None
        except OSError as error:
            note = _note(handle)
            if error.errno in _NO_LOCKS:
                other = _living(note)
                say(
                    f"{what}: its file system has no locks, so a second process on another host"
                    " would not be noticed"
                )
            elif error.errno in (errno.EACCES, errno.EAGAIN):
                other = _words(note)
            else:
                os.close(handle)
                raise OSError(error.errno, error.strerror, str(path)) from error
        if other is not None:
            os.close(handle)
            if not final:
                return None
            raise InUse(
                f"{what} is in use by {other}; wait for its end, stop it, or give another folder"
                f" (its lock is {path})"
            )
        # The holder before may have removed the file after it was opened here: then the lock is on
        # nothing.
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(handle), os.stat(path)):
                break
        os.close(handle)
    mine = {
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "since": time.strftime("%F %T"),
        "command": shlex.join(sys.orig_argv),
    }
    os.ftruncate(handle, 0)
    os.pwrite(handle, json.dumps(mine).encode() + b"\n", 0)
    return handle


def _note(handle: int) -> dict[str, Any]:
    """What the holder has written into the file; empty where that cannot be read."""
    try:
        note = json.loads(os.pread(handle, 65536, 0))
    except (ValueError, OSError):
        return {}
    return note if isinstance(note, dict) else {}


def _words(note: dict[str, Any]) -> str:
    if not note:
        return "another process"
    words = (
        f"process {note.get('pid')} on host {note.get('host')} since {note.get('since')}"
        f" ({note.get('command')})"
    )
    return " ".join(words.split())


def _living(note: dict[str, Any]) -> str | None:
    """The holder in words if it lives on this host, as far as can be told without locks."""
    if (
        note.get("host") != socket.gethostname()
        or not isinstance(note.get("pid"), int)
        or note["pid"] == os.getpid()
    ):
        return None
    try:
        os.kill(note["pid"], 0)
    except ProcessLookupError:
        return None
    except PermissionError:  # it lives, and is another user's
        pass
    return _words(note)
