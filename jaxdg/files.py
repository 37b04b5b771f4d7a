"""Small files that outlive a crash of the machine, and what is done with those that did not."""

from collections.abc import Callable, Iterator
import contextlib
import errno
import json
import os
from pathlib import Path
from typing import Any

FULL = (errno.ENOSPC, errno.EDQUOT)  # no room left on the disk, or for this user


class Broken(ValueError):
    """A file that does not hold what it should: a crash emptied or cut it, or something else wrote
    it.
    """


def write(path: Path, content: str | bytes) -> None:
    """Writes a file whole or not at all, also where the machine dies in between.

    Args:
        path: of the file, in a folder that exists; what it held is replaced.
        content: text, which becomes UTF-8, or bytes.

    Raises:
        OSError: it cannot be written; the message names it.
    """
    partial = path.with_name(path.name + ".partial")
    with naming(path):
        with open(partial, "wb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
        _keep_name(path.parent)


def _keep_name(folder: Path) -> None:
    """Brings the names in a folder to the disk."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in (
            errno.EINVAL,
            errno.ENOTSUP,
            errno.EBADF,
        ):  # some file systems have no such thing
            raise
    finally:
        os.close(handle)


@contextlib.contextmanager
def naming(path: str | os.PathLike[str]) -> Iterator[None]:
    """Has the errors of writing say what could not be written, and a full disk what to do."""
    try:
        yield
    except OSError as error:
        if error.errno in FULL:
            told = (
                f"disk full: {path} cannot be written ({error.strerror}); what was saved before is"
                " whole; "
            )
            raise OSError(told + "free some space on that disk and run the same command") from error
        if error.errno is None or error.filename is not None:
            raise
        raise OSError(error.errno, error.strerror, os.fspath(path)) from error


def read_json(path: Path) -> Any:
    """The contents of a JSON file, None if there is none.

    Raises:
        Broken: it is empty, cut or no JSON; the message names it.
    """
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        return None
    try:
        return json.loads(content)
    except (ValueError, RecursionError) as error:
        reason = (
            f"no JSON: {error}"
            if content.strip(b"\0 \n")
            else "empty"
            if not content
            else "nothing but zeros or blanks"
        )
        raise Broken(f"{path}: broken ({reason})") from None


def set_aside(path: Path) -> Path:
    """Renames a broken file to `NAME.broken`, so that nothing is lost and it can be made again;
    returns the new path.
    """
    aside = path.with_name(path.name + ".broken")
    count = 1
    while aside.exists():
        count += 1
        aside = path.with_name(f"{path.name}.broken{count}")
    os.replace(path, aside)
    return aside


def recall(
    path: Path,
    wanted: Callable[[Any], bool],
    say: Callable[[str], None] | None = None,
    remedy: str = "it is made again",
) -> Any:
    """The contents of a JSON file that can be made again, None if there is none or it is broken.

    Args:
        path: of the file.
        wanted: whether its contents are such as they should be.
        say: receives a line where it is broken, which then is set aside; without it the file is
            left as it is.
        remedy: what happens then, in words.
    """
    try:
        content = read_json(path)
        good = content is None or wanted(content)
        if not good or (content is None and path.is_file()):
            raise Broken(f"{path}: broken (it does not hold what it should)")
        return content
    except Broken as error:
        if say is not None:
            say(f"{error}; it is kept as {set_aside(path).name}; {remedy}")
        return None
