"""The files of a dataset, unpacked or still in zip archives.

A path names a file, or a member of a zip archive as if the archive were a folder:
`ROOT/cityscapes/gtFine_trainvaltest.zip/gtFine/val/..`. Only such strings reach worker processes;
every process opens the archives itself.

Hidden entries and those that systems leave behind are never listed (`is_hidden`). Links are
followed, but no folder is listed twice. Systems write the same letters as one code point or as
several (Unicode's NFC and NFD). Names are compared in their composed form, and paths stay as they
are on disk.
"""

from collections import deque
from collections.abc import Iterator
import dataclasses
import functools
import os
import re
import unicodedata
import zipfile
import zlib

# Entries of file managers, NAS systems and archivers that do not begin with a dot, in lower case.
SYSTEM = frozenset({
    "@eadir", "@recycle", "@tmp", "#recycle", "#snapshot", "__macosx", "$recycle.bin",
    "desktop.ini", "ehthumbs.db", "icon\r", "lost+found", "recycler", "system volume information",
    "thumbs.db",
})  # fmt: skip


def is_hidden(name: str) -> bool:
    """Whether an entry of this name is hidden or a system's own, so no part of a dataset."""
    return name.startswith(".") or name.lower() in SYSTEM


def composed(name: str) -> str:
    """The form of a name by which it is compared: NFC, which joins a letter and its accents."""
    return name if name.isascii() else unicodedata.normalize("NFC", name)


def read(path: str) -> bytes:
    """The bytes of a file or of a member of an archive.

    Args:
        path: of a file or member, as above.

    Returns:
        Its contents; the checksum of a member has been verified.

    Raises:
        ValueError: the file is absent, unreadable or damaged; names it.
    """
    archive, member = _split(path)
    try:
        if archive is not None:
            return archive.zip.read(archive.names[member])
        with open(path, "rb") as file:
            return file.read()
    except KeyError:
        reason = "unreadable (the archive has no such member)"
    except OSError as error:
        reason = f"unreadable ({error.strerror or error})"
    except (zipfile.BadZipFile, zlib.error, EOFError) as error:  # a wrong CRC-32 among others
        reason = f"damaged ({error or 'the archive ends early'})"
    except (NotImplementedError, RuntimeError) as error:  # rare compression, encryption
        reason = f"unreadable ({error}; unpack this archive)"
    raise ValueError(f"{path}: {reason}")


def in_archive(path: str) -> bool:
    """Whether `path` is that of a member of an archive."""
    return _split(path)[0] is not None


def is_folder(path: str) -> bool:
    """Whether `path` is a folder, an archive, or a folder in an archive."""
    archive, inner = _split(path)
    return os.path.isdir(path) if archive is None else inner in archive.subfolders


def is_file(path: str) -> bool:
    """Whether `path` is a file or a member of an archive."""
    archive, inner = _split(path)
    return os.path.isfile(path) if archive is None else inner in archive.names


def size(path: str) -> int:
    """Bytes of a file or of a member of an archive, as the archive states it."""
    archive, inner = _split(path)
    return os.stat(path).st_size if archive is None else archive.names[inner].file_size


def subfolders(folder: str) -> list[str]:
    """Sorted names of the folders in a folder, an archive or a folder of one; no hidden ones."""
    archive, inner = _split(folder)
    if archive is not None:
        names = [*archive.subfolders[inner]]
    else:
        with os.scandir(folder) as entries:
            names = [entry.name for entry in entries if _is_folder(entry)]
    return sorted(name for name in names if not is_hidden(name))


def entries(folder: str) -> list[str]:
    """All names in a folder, an archive or a folder of one, sorted; empty if it does not exist."""
    archive, inner = _split(folder)
    if archive is not None:
        return sorted([*archive.subfolders.get(inner, ()), *archive.files.get(inner, ())])
    return sorted(os.listdir(folder)) if os.path.isdir(folder) else []


def on_disk(base: str, path: str) -> str:
    """The path of `path` below `base` as its letters are composed on disk.

    Args:
        base: a folder, an archive, or a folder in an archive.
        path: of a file or folder, relative to it.

    Returns:
        The path on disk, or the two joined if there is no such file.
    """
    joined = os.path.join(base, path)
    if path.isascii() or is_folder(joined) or is_file(joined):
        return joined
    place = base
    for part in path.split("/"):
        alike = [name for name in entries(place) if composed(name) == composed(part)]
        place = os.path.join(place, alike[0] if alike and part not in alike else part)
    return place


@dataclasses.dataclass
class SkippedEntries:
    """The entries that listings of folders skipped.

    Attributes:
        hidden: number of hidden and system entries, by folder.
        example: one of them.
        links: links to folders that are listed under another name or that hold the link.
    """

    hidden: dict[str, int] = dataclasses.field(default_factory=dict)
    example: str = ""
    links: set[str] = dataclasses.field(default_factory=set)

    def notes(self) -> tuple[str, ...]:
        """One line about hidden entries and one about links, if there are any."""
        lines = []
        if count := sum(self.hidden.values()):
            entries = "entry" if count == 1 else "entries"
            lines.append(f"{count} hidden or system {entries} skipped, such as {self.example}")
        if count := len(self.links):
            links = "1 link" if count == 1 else f"{count} links"
            lines.append(
                f"{links} skipped that lead to folders listed already, such as {min(self.links)}"
            )
        return tuple(lines)

    def add_hidden(self, folder: str, hidden: list[str]) -> None:
        """Notes the hidden names in a folder."""
        if hidden:
            self.hidden[folder] = len(hidden)
            self.example = self.example or os.path.join(folder, min(hidden))


def walk(
    folder: str, skipped: SkippedEntries | None = None, seen: set[str] | None = None
) -> Iterator[tuple[str, list[str]]]:
    """The folder itself and each folder below, with the names of the files directly in it.

    Hidden entries are left out. Links are followed. A folder that several paths lead to is listed
    once, by the path without links if there is one. A link to a folder that holds the link is
    skipped.

    Args:
        folder: a folder, an archive, or a folder in an archive.
        skipped: receives the entries that were skipped.
        seen: real paths of folders not to list again; receives those that are listed.

    Raises:
        OSError: a folder cannot be listed; it must not read as an empty one.
    """
    skipped = SkippedEntries() if skipped is None else skipped
    seen = set() if seen is None else seen
    if in_archive(folder):
        yield from _walk_archive(folder, skipped)
        return
    folders = deque([(folder, os.path.realpath(folder))])  # the path, and the real one
    links: deque[tuple[str, str]] = deque()
    while folders or links:
        place, real = folders.popleft() if folders else links.popleft()
        if real in seen:
            if os.path.islink(place):
                skipped.links.add(place)
            continue
        seen.add(real)
        names = []
        hidden = []
        below = []
        linked = []
        with os.scandir(place) as entries:
            for entry in entries:
                if is_hidden(entry.name):
                    hidden.append(entry.name)
                elif not _is_folder(entry):
                    names.append(entry.name)
                elif not entry.is_symlink():
                    below.append((entry.path, os.path.join(real, entry.name)))
                else:
                    linked.append((entry.path, os.path.realpath(entry.path)))
        skipped.add_hidden(place, hidden)
        loops = [path for path, target in linked if f"{real}/".startswith(f"{target.rstrip('/')}/")]
        skipped.links.update(loops)
        folders.extend(sorted(below))
        links.extend(link for link in sorted(linked) if link[0] not in loops)
        yield place, names


def _walk_archive(folder: str, skipped: SkippedEntries) -> Iterator[tuple[str, list[str]]]:
    archive, inner = _split(folder)
    assert archive is not None
    files = archive.files.get(inner, [])
    folders = archive.subfolders[inner]
    skipped.add_hidden(folder, [name for name in (*files, *folders) if is_hidden(name)])
    yield folder, [name for name in files if not is_hidden(name)]
    for name in subfolders(folder):
        yield from _walk_archive(os.path.join(folder, name), skipped)


def _is_folder(entry: os.DirEntry) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link that leads to itself
        return False


def modified(folder: str) -> tuple[str, int]:
    """The folder, or the archive that it is in, and when that last changed (nanoseconds)."""
    archive, _ = _split(folder)
    path = os.path.abspath(folder if archive is None else archive.path)
    return path, os.stat(path).st_mtime_ns


class _Archive:
    """An open archive and its members by folder.

    Folders and names have no slash at their ends; "" is the archive itself.
    """

    def __init__(self, path: str):
        self.path = path
        self.zip = zipfile.ZipFile(path)
        self.names: dict[str, zipfile.ZipInfo] = {}
        self.files: dict[str, list[str]] = {}
        self.subfolders: dict[str, set[str]] = {"": set()}
        for info in self.zip.infolist():
            folder, _, name = info.filename.removeprefix("./").rpartition("/")
            self._add(folder)
            path = f"{folder}/{name}" if folder else name
            other = self.names.get(path)
            same = other is not None and (other.CRC, other.file_size) == (info.CRC, info.file_size)
            if name and not same:
                self.names[path] = info
                self.files.setdefault(folder, []).append(name)

    def _add(self, folder: str) -> None:
        while folder not in self.subfolders:
            self.subfolders[folder] = set()
            parent, _, name = folder.rpartition("/")
            self._add(parent)
            self.subfolders[parent].add(name)


def _split(path: str) -> tuple[_Archive | None, str]:
    """The archive that `path` is in, if any, and the rest of the path."""
    for match in re.finditer(r"\.zip(?=/|$)", path, re.IGNORECASE):
        archive = path[: match.end()]
        if os.path.isfile(archive):
            status = os.stat(archive)
            opened = _open(archive, status.st_mtime_ns, status.st_size, os.getpid())
            return opened, path[match.end() + 1 :]
    return None, path


@functools.lru_cache(maxsize=128)
def _open(path: str, at: int, size: int, process: int) -> _Archive:
    """Opens an archive once for each of its versions and each process.

    A forked process must open it again, because it would share the position in the file.
    """
    try:
        return _Archive(path)
    except (OSError, zipfile.BadZipFile, EOFError) as error:
        raise ValueError(f"{path}: no complete zip archive ({error}); fetch it again") from error
