"""A URL to a verified file on this disk; knows nothing of models.

    download("https://host/file.pt", "cache/file.pt", sha256="01ec64")

A download that was cut goes on where it ended, also in a later process: `file.pt.partial` holds
what came so far, and `file.pt.partial.json` what tells that the server still has the same file (its
ETag or date, sent back as If-Range). The name `file.pt` appears only once all is there and its
sha256 is the published one: as the caller gives it, or as the Hugging Face hub tells it
(X-Linked-Etag). Where nobody publishes one, `file.pt.json` notes it. Of several processes one
fetches, and the others wait.
"""

from collections.abc import Callable, Iterator
import contextlib
import dataclasses
import errno
import http.client
import json
import os
from pathlib import Path
import re
import shutil
import sys
import threading
import time
from typing import Any, NamedTuple
import urllib.error
from urllib.parse import urlsplit
import urllib.request

from rich import progress as bars
from rich.console import Console
from rich.table import Column

from jaxdg import files
from jaxdg.config import locks

CHUNK = 1 << 18  # bytes
TIMEOUT = 30  # seconds without an answer or a byte
PAUSES = (1, 2, 4, 8, 16)  # seconds before a new try; new bytes begin them again
LONGEST_PAUSE = 60  # seconds, if the server asks for a pause
PASSING = (408, 425, 429, 500, 502, 503, 504)  # statuses that may be another in a moment
DAY = 86_400  # seconds

Say = Callable[[str], None]
Show = Callable[[int, int | None], None]  # receives the bytes so far, and all of them if known

_one_thread = threading.RLock()  # locks of files part processes, not threads


class DownloadError(OSError):
    """A file could not be fetched.

    Attributes:
        status: of HTTP; None if no server answered.
    """

    def __init__(self, message: str, status: int | None = None):
        super().__init__(message)
        self.status = status


class _Cut(Exception):
    """This try failed, and another may not."""

    def __init__(self, reason: str, pause: float = 0):
        super().__init__(reason)
        self.pause = pause


def download(
    url: str,
    path: str | Path,
    *,
    sha256: str | None = None,
    token: str | None = None,
    note: Say | None = None,
) -> Path:
    """Fetches a file, unless it is there.

    Args:
        url: http or https; redirects are followed.
        path: of the file; its folder is made. A file that somebody has put there is verified and
            taken.
        sha256: as published, in hexadecimal, whole or its first digits.
        token: is sent to the host of `url` alone, as `Authorization: Bearer TOKEN`.
        note: receives lines for a person; None prints them to standard error.

    Returns:
        `path`. Beside it, `NAME.json` says url, sha256, bytes, and the sha256 that it was held
        against, null if nobody publishes one.

    Raises:
        DownloadError: the server does not answer, refuses or has no such file, or the connection
            was cut again and again; what came is kept.
        ValueError: the file has another sha256 than the published one, or `url` is no URL.
        OSError: the file cannot be written.
    """
    path = Path(path)
    note = note or _to_standard_error
    if urlsplit(url).scheme not in ("http", "https"):
        raise ValueError(f"{url} cannot be fetched; allowed: a URL with http or https")
    if _is_there(path, sha256):
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    with alone(path, note):
        if _is_there(path, sha256):  # another process was faster
            return path
        if path.exists():
            _verify(path, path, None, sha256, note)
            return path
        partial = path.with_name(path.name + ".partial")
        resumed = partial.exists()
        told = _fetch(url, partial, sha256, token, note)
        try:
            _verify(partial, path, url, sha256 or told, note)
        except ValueError:
            _remove(partial)
            if not resumed:
                raise
            note(f"{path.name}: what was kept is not the published file's; begins again")
            told = _fetch(url, partial, sha256, token, note)
            _verify(partial, path, url, sha256 or told, note)
        os.replace(partial, path)
        _remove(partial)
    return path


def record(path: str | Path) -> dict[str, Any]:
    """What is noted beside a file that `download` returned; empty if nothing is."""
    path = Path(path)
    found = files.recall(path.with_name(path.name + ".json"), lambda note: isinstance(note, dict))
    return found or {}


@contextlib.contextmanager
def alone(path: Path, note: Say) -> Iterator[None]:
    """Lets one process at a time make the file `path`; one that waits says for whom."""
    said: set[str] = set()

    def once(line: str) -> None:
        if line not in said:
            note(line)
        said.add(line)

    lock = path.with_name(path.name + ".lock")
    with _one_thread:
        if other := locks.holder(lock):
            note(f"{path.name} is being fetched by {other}; waits for it")
        with locks.held(lock, str(path), once, wait=DAY):
            yield


def megabytes(count: int) -> str:
    """A number of bytes in words."""
    return f"{count / 1e6:.0f} MB" if count >= 1e7 else f"{count / 1e6:.2g} MB"


def _is_there(path: Path, sha256: str | None) -> bool:
    """Whether the file was fetched or verified before.

    Raises:
        ValueError: another file was.
    """
    known = record(path)
    if not path.exists() or known.get("bytes") != path.stat().st_size:
        return False
    _compare(known["sha256"], sha256, path)
    return True


def _compare(found: str, published: str | None, what: str | Path) -> None:
    if published and not found.startswith(published.lower()):
        remedy = "remove it" if isinstance(what, Path) else "it was removed; try again"
        raise ValueError(
            f"{what} is not the published file: its sha256 is {found}, and should be {published}"
            f"{'' if len(published) == 64 else '..'}; {remedy}"
        )


def _verify(fetched: Path, path: Path, url: str | None, published: str | None, note: Say) -> None:
    """Compares a file with the published sha256, and notes it beside `path`, its name to be.

    Raises:
        ValueError: it has another.
    """
    found = files.sha256(fetched)
    _compare(found, published, url or path)
    size = fetched.stat().st_size
    about = {"url": url, "sha256": found, "bytes": size, "published_sha256": published}
    files.write(path.with_name(path.name + ".json"), json.dumps(about, indent=2) + "\n")
    verdict = "as published" if published else "noted, as nobody publishes it"
    note(f"{path.name}: {megabytes(size)}, sha256 {found[:16]}.. {verdict}")


# --- What came so far -------------------------------------------------------------------------


@dataclasses.dataclass
class _Kept:
    """What is known of the file that a partial one is the beginning of.

    Attributes:
        url: that it is fetched from.
        validator: its ETag or date, which tell it from other files at that URL; None if there is
            neither.
        total: its bytes, if known.
        published: its sha256 as the hub tells it.
    """

    url: str
    validator: str | None = None
    total: int | None = None
    published: str | None = None


def _notes_of(partial: Path) -> Path:
    return partial.with_name(partial.name + ".json")


def _kept(partial: Path, url: str) -> _Kept:
    """What an earlier try noted; a partial file of another URL is removed."""
    names = {field.name for field in dataclasses.fields(_Kept)}
    noted = files.recall(_notes_of(partial), lambda n: isinstance(n, dict) and n.keys() == names)
    if noted is not None and noted["url"] == url and partial.exists():
        return _Kept(**noted)
    _remove(partial)
    return _Kept(url)


def _remove(partial: Path) -> None:
    partial.unlink(missing_ok=True)
    _notes_of(partial).unlink(missing_ok=True)


# --- Asking a server --------------------------------------------------------------------------


def _fetch(url: str, partial: Path, sha256: str | None, token: str | None, note: Say) -> str | None:
    """Fetches all of a file into `partial`, in several tries if need be.

    Returns:
        Its sha256 as the hub tells it; None elsewhere.
    """
    name = partial.name.removesuffix(".partial")
    with _shown(name, note) as show:
        furthest = _size(partial)
        pauses = iter(PAUSES)
        first = True
        while True:
            try:
                return _try(url, partial, sha256, token, show, first)
            except _Cut as cut:
                first = False
                if (size := _size(partial)) > furthest:
                    furthest = size
                    pauses = iter(PAUSES)
                pause = next(pauses, None)
                if pause is None:
                    raise DownloadError(
                        f"{url}: {cut}, {1 + len(PAUSES)} times; {megabytes(size)} are kept, and"
                        " the same command goes on from there"
                    ) from cut
                pause = min(max(pause, cut.pause), LONGEST_PAUSE)
                note(f"{name}: {cut}; tries again in {pause:g} s")
                time.sleep(pause)


def _try(
    url: str,
    partial: Path,
    sha256: str | None,
    token: str | None,
    show: Show,
    first: bool,
) -> str | None:
    """One request: appends to `partial` what is missing, or begins it again."""
    kept = _kept(partial, url)
    start = _size(partial)
    if kept.total is not None and start == kept.total:
        return kept.published
    if not (kept.validator or sha256 or kept.published):
        start = 0  # nothing would tell that the rest is of the same file
    redirects = _Redirects()
    try:
        response = _open(url, start, kept.validator, token, redirects)
    except urllib.error.HTTPError as error:
        with error:
            if error.code == 416:  # what is kept is longer than the file, so it is of another
                _remove(partial)
                raise _Cut("the server's file has changed") from error
            raise _told(url, error, token) from error
    except urllib.error.URLError as error:
        if first:
            host = urlsplit(url).hostname
            raise DownloadError(f"{url}: cannot reach {host} ({error.reason})") from error
        raise _Cut(str(error.reason)) from error
    except DownloadError:
        raise
    except (OSError, http.client.HTTPException) as error:
        raise _Cut(str(error) or type(error).__name__) from error
    with response:
        _refuse_page(url, partial, response)
        range_ = _range(response)
        if response.status != 206:
            start = 0
        elif range_.start != start or kept.total not in (None, range_.total):
            _remove(partial)
            raise _Cut("the server sends another part than was asked for")
        total = range_.total
        kept = _Kept(
            url,
            _validator(response),
            total,
            redirects.published or _hub_sha256(response.headers),
        )
        _check_room(partial, start, total)
        if not start:
            _remove(partial)  # the notes must never be newer than the bytes
        files.write(_notes_of(partial), json.dumps(dataclasses.asdict(kept)))
        received = start
        show(received, total)
        with files.naming(partial), partial.open("ab" if start else "wb") as file:
            while chunk := _chunk(response):
                file.write(chunk)
                received += len(chunk)
                show(received, total)
            file.flush()
            os.fsync(file.fileno())
        if total is not None and received < total:
            raise _Cut(f"the connection ended after {received} of {total} bytes")
    return kept.published


def _open(
    url: str, start: int, validator: str | None, token: str | None, redirects: "_Redirects"
) -> http.client.HTTPResponse:
    request = urllib.request.Request(
        url, headers={"Accept-Encoding": "identity", "User-Agent": "jaxdg"}
    )
    if start:
        request.add_header("Range", f"bytes={start}-")
        if validator:
            request.add_header("If-Range", validator)
    if token:
        request.add_unredirected_header("Authorization", f"Bearer {token}")
    return urllib.request.build_opener(redirects).open(request, timeout=TIMEOUT)


class _Redirects(urllib.request.HTTPRedirectHandler):
    """Follows redirects: a token goes to the first host alone, and the hub tells the sha256 before
    it sends to where the bytes are.
    """

    published: str | None = None

    def redirect_request(self, req, fp, code, msg, headers, newurl):
        self.published = self.published or _hub_sha256(headers)
        if req.full_url.startswith("https:") and not newurl.startswith("https:"):
            raise DownloadError(
                f"{req.full_url}: refused, as it leads to {newurl}, which is not encrypted", code
            )
        new = super().redirect_request(req, fp, code, msg, headers, newurl)
        authorization = req.unredirected_hdrs.get("Authorization")
        if new is not None and authorization and _origin(newurl) == _origin(req.full_url):
            new.add_unredirected_header("Authorization", authorization)
        return new


def _origin(url: str) -> tuple[str, str]:
    parts = urlsplit(url)
    return parts.scheme, parts.netloc


def _hub_sha256(headers: Any) -> str | None:
    """The sha256 that the Hugging Face hub tells of a large file; small ones have none."""
    found = re.fullmatch(r'(?:W/)?"?([0-9a-f]{64})"?', headers.get("X-Linked-Etag", ""))
    return found[1] if found else None


def _told(url: str, error: urllib.error.HTTPError, token: str | None) -> Exception:
    """The error about a status: one that another try may mend, or what it means."""
    status = f"{error.code} {error.reason}"
    if error.code in PASSING:
        asked = error.headers.get("Retry-After", "")
        return _Cut(f"the server answers {status}", float(asked) if asked.isdigit() else 0)
    match error.code:
        case 401 | 403:
            why = "refused" if token else "refused without a token"
        case 404 | 410:
            why = "there is no such file"
        case _:
            why = "not sent"
    return DownloadError(f"{url}: {why} ({status})", error.code)


def _refuse_page(url: str, partial: Path, response: http.client.HTTPResponse) -> None:
    """DownloadError if a page of text comes in place of a file, as networks that ask for a login
    send it.
    """
    wanted = partial.name.removesuffix(".partial")
    if response.headers.get_content_type() == "text/html" and not wanted.endswith(
        (".html", ".htm")
    ):
        raise DownloadError(
            f"{url}: a page of text comes in place of the file; open the URL in a browser and see"
            " whether it asks for a login",
            response.status,
        )


class _Range(NamedTuple):
    """What bytes an answer holds, and of how many, if it says so."""

    start: int
    total: int | None


def _range(response: http.client.HTTPResponse) -> _Range:
    length = response.headers.get("Content-Length")
    if response.status != 206:
        return _Range(0, int(length) if length and length.isdigit() else None)
    told = re.fullmatch(
        r"bytes (\d+)-\d+/(\d+|\*)", response.headers.get("Content-Range", "").strip()
    )
    if not told:
        return _Range(-1, None)
    return _Range(int(told[1]), int(told[2]) if told[2] != "*" else None)


def _validator(response: http.client.HTTPResponse) -> str | None:
    """What If-Range may compare: a strong ETag, else the date."""
    tag = response.headers.get("ETag", "")
    return tag if tag.startswith('"') else response.headers.get("Last-Modified")


def _chunk(response: http.client.HTTPResponse) -> bytes:
    try:
        return response.read(CHUNK)
    except (OSError, http.client.HTTPException) as error:
        raise _Cut(f"the connection broke ({str(error) or type(error).__name__})") from error


def _check_room(partial: Path, start: int, total: int | None) -> None:
    free = shutil.disk_usage(partial.parent).free
    # What is kept of a file that begins again gives its room back.
    if total is not None and total - _size(partial) > free:
        raise OSError(
            errno.ENOSPC,
            f"disk full: {megabytes(total - start)} are to come and {megabytes(free)} are free",
            str(partial.parent),
        )


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


# --- What a person sees -----------------------------------------------------------------------


def _to_standard_error(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


@contextlib.contextmanager
def _shown(name: str, note: Say) -> Iterator[Show]:
    """Shows how far a download is: a bar on a terminal, elsewhere a line each tenth."""
    console = Console(stderr=True)
    if not console.is_terminal:
        tenth = 0

        def told(received: int, total: int | None) -> None:
            nonlocal tenth
            if total and total > CHUNK and received * 10 // total > tenth and received < total:
                tenth = received * 10 // total
                note(f"{name}: {megabytes(received)} of {megabytes(total)}")

        yield told
        return
    columns = (
        bars.TextColumn("{task.description}", table_column=_cell(overflow="ellipsis", ratio=1)),
        bars.BarColumn(bar_width=20),
        bars.DownloadColumn(table_column=_cell()),
        bars.TransferSpeedColumn(table_column=_cell()),
        bars.TimeRemainingColumn(table_column=_cell()),
    )
    with bars.Progress(*columns, console=console, transient=True, expand=True) as progress:
        bar = progress.add_task(name, total=None)

        def drawn(received: int, total: int | None) -> None:
            if 0 <= received - progress.tasks[0].completed <= CHUNK:
                progress.update(bar, completed=received, total=total)
            else:  # what was kept did not come now, so it must not count as speed
                progress.reset(bar, completed=received, total=total)

        yield drawn


def _cell(**options: Any) -> Column:
    return Column(no_wrap=True, **options)
