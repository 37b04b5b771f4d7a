"""Arrays kept from run to run, for as long as what they were made from is unchanged.

They lie, as compiled programs do, under `$JAXDG_CACHE` (else `~/.cache/jaxdg`, and without a home in the temporary folder). A cache saves
time and is never needed: it may be deleted, and a full or read-only disk is no error.
"""

from collections.abc import Callable, Mapping
import contextlib
import hashlib
import json
import os
from pathlib import Path
import tempfile
import time
from typing import Any
import zipfile

import numpy as np


def folder() -> Path:
    """Where everything that is kept from run to run lies; it need not exist."""
    if own := os.environ.get("JAXDG_CACHE"):
        return Path(os.path.expanduser(own))
    home = os.path.expanduser("~")
    if home != "~":
        return Path(home, ".cache", "jaxdg")
    # A user without a home, as in many containers. Compiled programs are run, so the folder must be nobody else's.
    shared = Path(tempfile.gettempdir(), f"jaxdg-{os.getuid()}")
    with contextlib.suppress(OSError):
        shared.mkdir(mode=0o700, exist_ok=True)
        if shared.stat().st_uid == os.getuid():
            return shared
    return Path(os.devnull, "jaxdg")  # where nothing can be kept


def cached(key: Any, modified: Mapping[str, int], make: Callable[[], dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
    """What `make` returns, or returned in an earlier run.

    Args:
        key: JSON value that says what is made.
        modified: filled by `make`: each file and folder it looked at, and when that last changed (nanoseconds).
        make: what takes time.

    Returns:
        The arrays, of any types but objects.
    """
    name = hashlib.sha256(json.dumps(key).encode()).hexdigest()[:24]
    file = folder() / f"{name}.npz"
    kept = _recall(file)
    if kept is None:
        kept = make()
        # What changed a moment ago may change again within the resolution of its clock: the next run looks again.
        if max(modified.values(), default=0) < time.time_ns() - 2_000_000_000:
            _remember(file, kept | {"modified": encoded(f"{at} {path}" for path, at in modified.items())})
    return kept


def encoded(texts: Any) -> np.ndarray:
    """Strings as bytes, for want of string arrays that are small."""
    return np.frombuffer("\0".join(texts).encode(errors="surrogateescape"), np.uint8)


def decoded(array: np.ndarray) -> list[str]:
    """The strings of `encoded`."""
    return array.tobytes().decode(errors="surrogateescape").split("\0") if array.size else []


def _recall(file: Path) -> dict[str, np.ndarray] | None:
    try:
        with open(file, "rb") as stored, np.load(stored) as arrays:
            kept = dict(arrays)
        for line in decoded(kept.pop("modified")):
            at, _, path = line.partition(" ")
            if os.stat(path).st_mtime_ns != int(at):
                return None
        return kept
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
        return None  # absent or damaged, or a file is gone: made again and replaced


def _remember(file: Path, arrays: dict[str, np.ndarray]) -> None:
    with contextlib.suppress(OSError):
        file.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=file.parent, prefix=file.stem, suffix=".tmp")
        try:
            with os.fdopen(handle, "wb") as part:
                np.savez(part, **arrays)  # pyright: ignore[reportArgumentType]
            os.replace(temporary, file)
        except OSError:
            os.unlink(temporary)
