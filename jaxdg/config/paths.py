"""Paths as people give them, on the command line or in a configuration: `~` is a home folder, and
what is empty is no path.
"""

import importlib
import os
from pathlib import Path
import re

HUB = "hf://"  # begins the name of a file of the Hugging Face hub, see `hub.huggingface`


def is_url(path: str) -> bool:
    """Whether `path` is on an object store or another server, such as `gs://bucket/data`."""
    return re.match(r"[A-Za-z][A-Za-z0-9+.-]*://", path) is not None


def local(path: str | Path) -> Path:
    """The file or folder on this disk that a path means; a file of the hub is fetched, unless it is
    kept.

    Raises:
        ValueError: it looks like a name of the hub and is none.
        OSError: the file cannot be fetched.
    """
    if not str(path).startswith(HUB):
        return Path(path)
    # By name, as that room stands above this one.
    return importlib.import_module("jaxdg.hub.huggingface").fetched(str(path))


def given(
    path: str, what: str, *, allowed: str = "a path", urls: bool = False, hub: bool = False
) -> str:
    """The path that a person means.

    Args:
        path: as given.
        what: the flag or field that it is the value of, for the error message.
        allowed: what may stand there, likewise.
        urls: whether that includes URLs.
        hub: whether that includes files of the Hugging Face hub, hf://OWNER/REPO/FILE.

    Returns:
        `path` with `~` and `~USER` replaced by home folders; URLs as they are.

    Raises:
        ValueError: it is empty, the home folder of nobody, or a URL that may not be one.
    """
    if not path.strip():
        raise ValueError(f"{what} is {path!r}; allowed: {allowed}")
    if is_url(path):
        if urls or (hub and path.startswith(HUB)):
            return path
        raise ValueError(
            f"{what} is {path}, a URL; allowed: {allowed}, on a disk of this machine or mounted"
            " there. Only records lie elsewhere: in data.root, where --out of jaxdg.data.prepare"
            " has put them"
        )
    expanded = os.path.expanduser(path)
    if expanded.startswith("~"):
        name = path.split("/")[0]
        raise ValueError(
            f"{what} is {path}, but {name} is no home folder here; give the whole path, or ./{path}"
            " for a folder of that name"
        )
    return expanded
