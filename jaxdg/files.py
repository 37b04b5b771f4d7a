"""Writes small files so that a crash of the machine cannot break them, and handles broken ones."""

from collections.abc import Callable, Iterator
import contextlib
import errno
import hashlib
import json
import os
from pathlib import Path
from typing import Any

FULL = (errno.ENOSPC, errno.EDQUOT)  # no room left on the disk, or for this user


class Broken(ValueError):
    """A file has the wrong contents: a crash emptied or cut it, or another program wrote it."""


def write(path: Path, content: str | bytes) -> None:
    """Writes a file completely or not at all, even if the machine dies meanwhile.

    Args:
        path: of the file, in a folder that exists; old contents are replaced.
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
        _sync_folder(path.parent)


def sha256(path: Path) -> str:
    """The sha256 of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def of_domain(folder: Path, domain: str, ending: str) -> Path:
    """The file of a domain below a folder of results.

    Args:
        folder: of such files.
        domain: `acdc/night` lies in a folder `acdc`; one that is the path of a folder leads nowhere
            else.
        ending: of the file's name.
    """
    parts = [part for part in domain.split("/") if part not in ("", ".", "..")]
    return folder / ("/".join(parts) + ending)


def _sync_folder(folder: Path) -> None:
    """Writes the list of files of a folder to the disk."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        # Some file systems cannot do this.
        if error.errno not in (errno.EINVAL, errno.ENOTSUP, errno.EBADF):
            raise
    finally:
        os.close(handle)


@contextlib.contextmanager
def naming(path: str | os.PathLike[str]) -> Iterator[None]:
    """Makes errors of writing name the file, and that of a full disk say what to do."""
    try:
        yield
    except OSError as error:
        if error.errno in FULL:
            raise OSError(
                f"disk full: {path} cannot be written ({error.strerror}); what was saved before is"
                " whole; free some space on that disk and run the same command"
            ) from error
        if error.errno is None or error.filename is not None:
            raise
        raise OSError(error.errno, error.strerror, os.fspath(path)) from error


def read_json(path: Path) -> Any:
    """The contents of a JSON file; None if there is no such file.

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
        if content.strip(b"\0 \n"):
            reason = f"no JSON: {error}"
        else:
            reason = "nothing but zeros or blanks" if content else "empty"
        raise Broken(f"{path}: broken ({reason})") from None


def set_aside(path: Path) -> Path:
    """Renames a broken file to `NAME.broken`, so that it can be made anew; returns the new path."""
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
    """The contents of a JSON file that can be made again; None if it is missing or broken.

    Args:
        path: of the file.
        wanted: whether its contents have the right form.
        say: receives a line about a broken file, which is then set aside; without `say` the file
            stays where it is.
        remedy: says in that line what happens next.
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
