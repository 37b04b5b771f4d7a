"""The files of a dataset, unpacked or still in zip archives.

A path is that of a file, or of a member of a zip archive as if the archive were a folder:
`ROOT/cityscapes/gtFine_trainvaltest.zip/gtFine/val/..`. Only such strings reach worker processes; every process opens the archives itself.
"""

from collections.abc import Iterator
import functools
import os
import re
import zipfile
import zlib


def read(path: str) -> bytes:
    """The bytes of a file or of a member of an archive.

    Args:
        path: as the module's first lines say.

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


def subfolders(folder: str) -> list[str]:
    """Names of the folders in a folder, an archive, or a folder in an archive; sorted."""
    archive, inner = _split(folder)
    if archive is not None:
        return sorted(archive.subfolders[inner])
    return sorted(entry.name for entry in os.scandir(folder) if entry.is_dir())


def walk(folder: str) -> Iterator[tuple[str, list[str]]]:
    """The folder itself and each folder below, links followed, with the names of the files directly in it.

    Raises:
        OSError: a folder cannot be listed, which must not read as an empty one.
    """
    archive, inner = _split(folder)
    if archive is None:
        for parent, _, names in os.walk(folder, followlinks=True, onerror=_refuse):
            yield parent, names
    else:
        for name in subfolders(folder):
            yield from walk(os.path.join(folder, name))
        yield folder, archive.files.get(inner, [])


def modified(folder: str) -> tuple[str, int]:
    """The folder, or the archive that it is in, and when that last changed (nanoseconds)."""
    archive, _ = _split(folder)
    path = os.path.abspath(folder if archive is None else archive.path)
    return path, os.stat(path).st_mtime_ns


class Tree:
    """The folder of a dataset as downloaded: what is unpacked in it and what its zip archives hold, merged.

    What is unpacked, and every archive, may lie one folder deeper, as `bdd100k/images/10k/..` does in its archives. A file that is both
    unpacked and in an archive is read unpacked.
    """

    def __init__(self, base: str, *, exact: bool = False):
        """Looks at nothing yet.

        Args:
            base: the dataset's folder.
            exact: folders are only where they are said to be, neither one deeper nor in an archive that their path does not name.
        """
        self.base = base
        self.exact = exact
        self.modified: dict[str, int] = {}  # what `files` has looked at, and when it last changed

    def files(self, *folders: str) -> dict[str, str]:
        """All files below the first of `folders` that exists.

        Args:
            folders: alternatives, relative to `base`.

        Returns:
            The path of each file by its path relative to the folder; no hidden ones.

        Raises:
            FileNotFoundError: none of the folders exists; says where one was found instead.
            ValueError: an archive is damaged.
        """
        found: dict[str, str] = {}
        for place in self.places(*folders):
            for parent, names in walk(place):
                self.modified.update([modified(parent)])
                below = parent[len(place) + 1 :]
                for name in names:
                    if not name.startswith("."):
                        found.setdefault(f"{below}/{name}" if below else name, os.path.join(parent, name))
        return found

    def places(self, *folders: str) -> list[str]:
        """Where the first of `folders` that exists is: unpacked first, then in each archive.

        Args:
            folders: as for `files`.

        Raises:
            FileNotFoundError: as for `files`.
            ValueError: as for `files`.
        """
        if self.exact:
            found = [path for folder in folders if is_folder(path := os.path.join(self.base, folder))][:1]
            if not found:
                raise FileNotFoundError(
                    f"folder {os.path.abspath(os.path.join(self.base, folders[0]))} does not exist; "
                    "check JAXDG_DATA or --config.data.root, and data.folder"
                )
            return found
        if os.path.isdir(self.base):
            self.modified.update([modified(self.base)])  # changes when an archive or a folder is added
            sources = self._sources()
            for folder in folders:
                if found := [place for source in sources for place in _within(source, folder)]:
                    return found
        raise FileNotFoundError(self._lost(folders))

    def _sources(self) -> list[str]:
        entries = sorted(entry.path for entry in os.scandir(self.base) if entry.is_file() and entry.name.lower().endswith(".zip"))
        return [self.base, *entries]

    def _lost(self, folders: tuple[str, ...]) -> str:
        base = os.path.abspath(self.base)
        wanted = f"{base} should hold {' or '.join(folders)}, unpacked or in a zip archive"
        if elsewhere := [place for folder in folders for place in self._elsewhere(base, folder)]:
            return f"{wanted}, but {elsewhere[0]} was found instead; move it, or set JAXDG_DATA or --config.data.root"
        if not os.path.isdir(base):
            return f"{wanted}, but does not exist; check JAXDG_DATA or --config.data.root"
        entries = sorted(os.listdir(base))
        return f"{wanted}, but holds {', '.join(entries[:8]) or 'nothing'}{', ..' if len(entries) > 8 else ''}; fetch what is missing"

    def _elsewhere(self, base: str, folder: str) -> Iterator[str]:
        """Where people put things: the folder without its upper levels, deeper, beside or above where it should be."""
        root, name = os.path.split(base)
        above = os.path.dirname(root)
        alike = []
        if os.path.isdir(root):
            alike = [n for n in subfolders(root) if n != name and re.sub(r"\W|_", "", n).lower() == re.sub(r"\W|_", "", name).lower()]
        upper = [*(os.path.join(root, n) for n in alike), root, os.path.join(above, name), above]
        if os.path.isdir(base):
            parts = folder.split("/")
            tails = ["/".join(parts[i:]) for i in range(1, len(parts))]
            yield from (place for tail in tails for source in self._sources() for place in _within(source, tail))
            for source in self._sources():
                for one in subfolders(source):
                    for two in subfolders(os.path.join(source, one)):
                        yield from _within(os.path.join(source, one, two), folder)
        yield from (path for up in upper if is_folder(path := os.path.join(up, folder)))


def _within(source: str, folder: str) -> list[str]:
    """`folder` in `source`, or else in the folders of `source`."""
    if is_folder(direct := os.path.join(source, folder)):
        return [direct]
    deeper = [os.path.join(source, name, folder) for name in subfolders(source) if name != "__MACOSX"]
    return [path for path in deeper if is_folder(path)]


def _refuse(error: OSError) -> None:
    raise error


class _Archive:
    """An open archive and its members by folder; folders and names without the slash at their ends, "" for the archive itself."""

    def __init__(self, path: str):
        self.path = path
        self.zip = zipfile.ZipFile(path)
        self.names: dict[str, zipfile.ZipInfo] = {}
        self.files: dict[str, list[str]] = {}
        self.subfolders: dict[str, set[str]] = {"": set()}
        for info in self.zip.infolist():
            folder, _, name = info.filename.removeprefix("./").rpartition("/")
            self._add(folder)
            if name:
                self.names[f"{folder}/{name}" if folder else name] = info
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
            return _open(archive, status.st_mtime_ns, status.st_size, os.getpid()), path[match.end() + 1 :]
    return None, path


@functools.lru_cache(maxsize=128)
def _open(path: str, at: int, size: int, process: int) -> _Archive:
    """Opened again when the archive has changed, and in a forked process, which would share the position in the file."""
    try:
        return _Archive(path)
    except (OSError, zipfile.BadZipFile, EOFError) as error:
        raise ValueError(f"{path}: no whole zip archive ({error}); fetch it again") from error
