"""Files of the Hugging Face hub by name: hf://OWNER/REPO[@REVISION]/FILE.

A file is kept as `$JAXDG_CACHE/hub/OWNER/REPO/REVISION/FILE` and used from there without a look at
the network. REVISION is a commit, a tag or a branch, `main` if it is left out. What a branch has
may change: `jaxdg pull` fetches anew, and a commit says which file is meant.

`HF_ENDPOINT` replaces https://huggingface.co, and `HF_TOKEN` opens repositories that are not
public, as for all programs of the hub.
"""

from collections.abc import Callable
import contextlib
import os
from pathlib import Path
import re
from typing import NamedTuple

from jaxdg.config import paths
from jaxdg.data import cache
from jaxdg.hub import download as downloads

FORM = f"{paths.HUB}OWNER/REPO[@REVISION]/FILE"
NAME = re.compile(
    re.escape(paths.HUB) + r"(?P<repo>[\w.-]+/[\w.-]+)(@(?P<revision>[\w.-]+))?(/(?P<file>.*))?"
)
MAIN = "main"


class Name(NamedTuple):
    """What a name says.

    Attributes:
        repo: OWNER/REPO.
        revision: a commit, a tag or a branch.
        file: its path in the repository; empty for the repository.
    """

    repo: str
    revision: str
    file: str

    @property
    def url(self) -> str:
        """Where the file is fetched from."""
        endpoint = os.environ.get("HF_ENDPOINT", "https://huggingface.co").rstrip("/")
        return f"{endpoint}/{self.repo}/resolve/{self.revision}/{self.file}"

    @property
    def kept(self) -> Path:
        """Where the file is kept; it need not be there."""
        return cache.folder() / "hub" / self.repo / self.revision / self.file


def parsed(text: str) -> Name:
    """The parts of a name.

    Raises:
        ValueError: it is none.
    """
    found = NAME.fullmatch(text)
    file = (found and found["file"]) or ""
    outside = {"", ".", ".."} & {*file.split("/")} if file else set()
    if found is None or outside or {".", ".."} & {*found["repo"].split("/"), found["revision"]}:
        raise ValueError(f"{text} is no name of a file of the Hugging Face hub; allowed: {FORM}")
    return Name(found["repo"], found["revision"] or MAIN, file)


def of_file(text: str) -> str:
    """The name, which must be one of a file.

    Raises:
        ValueError: it is none, or one of a repository.
    """
    if not parsed(text).file:
        raise ValueError(f"{text} names a repository; name a file of it: {FORM}")
    return text


def fetched(text: str, path: Path | None = None, note: Callable[[str], None] | None = None) -> Path:
    """The file of a name, fetched unless it is there.

    Args:
        text: the name.
        path: where it is to be; None for the cache.
        note: receives lines for a person; None prints them to standard error.

    Raises:
        DownloadError: it could not be fetched.
        ValueError: no name of a file.
    """
    name = parsed(of_file(text))
    try:
        return downloads.download(name.url, path or name.kept, token=token(), note=note)
    except downloads.DownloadError as error:
        advice = f"or put the file at {name.kept}"
        if error.status in (401, 403, 404):
            advice = f"see that {name.repo} has it and that HF_TOKEN may read it, {advice}"
        raise downloads.DownloadError(f"{error}; {advice}", error.status) from error


def token() -> str | None:
    """The token of the hub, from where its own programs take it."""
    if found := os.environ.get("HF_TOKEN"):
        return found.strip()
    home = os.environ.get("HF_HOME", "~/.cache/huggingface")
    path = os.environ.get("HF_TOKEN_PATH", f"{home}/token")
    with contextlib.suppress(OSError):
        return Path(os.path.expanduser(path)).read_text().strip() or None
    return None
