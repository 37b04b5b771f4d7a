"""Arrays kept from run to run, for as long as the files that they were made from do not change.

They lie beside compiled programs and weights under `$JAXDG_CACHE` (else `~/.cache/jaxdg`, and
without a home in the temporary folder). The cache only saves time: it may be deleted, and for
arrays and programs a full or read-only disk is no error.
"""

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
import contextlib
import hashlib
import json
import os
from pathlib import Path
import stat
import tempfile
import time
from typing import Any
import zipfile

import numpy as np

from jaxdg.data import storage

THREADS = 16  # for questions to a file system, which may be far away


def folder() -> Path:
    """The folder of everything that is kept from run to run; it need not exist."""
    if own := os.environ.get("JAXDG_CACHE"):
        return Path(os.path.expanduser(own))
    home = os.path.expanduser("~")
    if home != "~":
        return Path(home, ".cache", "jaxdg")
    # Users have no home in many containers. The folder must belong to this user, because compiled
    # programs in it are run.
    shared = Path(tempfile.gettempdir(), f"jaxdg-{os.getuid()}")
    with contextlib.suppress(OSError):
        shared.mkdir(mode=0o700, exist_ok=True)
        if shared.stat().st_uid == os.getuid():
            return shared
    return Path(os.devnull, "jaxdg")  # a folder that cannot exist


def cached(
    key: Any, modified: Mapping[str, int], make: Callable[[], dict[str, np.ndarray]]
) -> dict[str, np.ndarray]:
    """The arrays that `make` returns now or returned in an earlier run.

    Args:
        key: JSON value that identifies the arrays.
        modified: filled by `make`: each file and folder it looked at, and when that last changed
            (nanoseconds). The arrays are valid as long as neither these times nor the sizes change.
        make: computes the arrays.

    Returns:
        The arrays, of any types but objects.
    """
    name = hashlib.sha256(json.dumps(key).encode()).hexdigest()[:24]
    file = folder() / f"{name}.npz"
    arrays = _recall(file)
    if arrays is None:
        arrays = make()
        # A file that changed a moment ago may change again within the resolution of its clock. Then
        # the next run makes the arrays again.
        if max(modified.values(), default=0) < time.time_ns() - 2_000_000_000:
            _remember(file, arrays, modified)
    return arrays


def fingerprint(paths: Sequence[str]) -> tuple[str, dict[str, int]]:
    """Tells the files that lie at some paths now from those of another time or place.

    Args:
        paths: as `storage.read` takes them; there may be very many.

    Returns:
        A digest of the resolved paths, sizes and modification times (nanoseconds); a member of an
        archive counts with those of the archive. And the file that changed last with its time, as
        `cached` takes it.
    """
    folders: dict[str, list[str]] = {}
    for path in paths:
        folder, _, name = path.rpartition("/")
        folders.setdefault(folder, []).append(name)
    digest = hashlib.sha256()
    last = ("", 0)
    with ThreadPoolExecutor(THREADS) as pool:
        stats = pool.map(_stats, folders.items())
        for names, (lines, latest) in zip(folders.values(), stats, strict=True):
            digest.update("\0".join([*names, *lines]).encode(errors="surrogateescape"))
            last = max(last, latest, key=lambda file: file[1])
    names = "\0".join(os.path.basename(path) for path in paths)
    digest.update(names.encode(errors="surrogateescape"))
    return digest.hexdigest(), dict([last]) if paths else {}


def encoded(texts: Any) -> np.ndarray:
    """Strings as bytes, because NumPy's own string arrays are large."""
    return np.frombuffer("\0".join(texts).encode(errors="surrogateescape"), np.uint8)


def decoded(array: np.ndarray) -> list[str]:
    """The strings of `encoded`."""
    return array.tobytes().decode(errors="surrogateescape").split("\0") if array.size else []


def _recall(file: Path) -> dict[str, np.ndarray] | None:
    try:
        with open(file, "rb") as stored, np.load(stored) as arrays:
            result = dict(arrays)
        for line in decoded(result.pop("modified")):
            at, size, path = line.split(" ", maxsplit=2)
            status = os.stat(path)
            if (status.st_mtime_ns, status.st_size) != (int(at), int(size)):
                return None
        return result
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
        return None  # absent or damaged, or a file is gone


def _stats(folder: tuple[str, list[str]]) -> tuple[list[str], tuple[str, int]]:
    """The resolved paths, sizes and times of a folder's files; and the latest of them."""
    path, names = folder
    if storage.in_archive(f"{path}/{names[0]}"):
        archive, at = storage.modified(path)
        inner = os.path.abspath(path)[len(archive) :]
        size = str(os.path.getsize(archive))
        return [os.path.realpath(archive), inner, str(at), size], (archive, at)
    lines = [os.path.realpath(path)]
    latest = ("", 0)
    for name in names:
        file = f"{path}/{name}"
        status = os.lstat(file)
        if stat.S_ISLNK(status.st_mode):
            lines.append(os.path.realpath(file))
            status = os.stat(file)
        lines.append(f"{status.st_mtime_ns} {status.st_size}")
        if status.st_mtime_ns > latest[1]:
            latest = (os.path.abspath(file), status.st_mtime_ns)
    return lines, latest


def _remember(file: Path, arrays: dict[str, np.ndarray], modified: Mapping[str, int]) -> None:
    with contextlib.suppress(OSError):
        lines = (f"{at} {os.path.getsize(path)} {path}" for path, at in modified.items())
        arrays = {**arrays, "modified": encoded(lines)}
        file.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=file.parent, prefix=file.stem, suffix=".tmp")
        try:
            with os.fdopen(handle, "wb") as part:
                np.savez(part, **arrays)  # pyright: ignore[reportArgumentType]
            os.replace(temporary, file)
        except OSError:
            os.unlink(temporary)
