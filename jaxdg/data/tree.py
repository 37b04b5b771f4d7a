"""The folder of a dataset as downloaded: unpacked files and zip archives as one tree."""

from collections.abc import Iterator
import functools
import os
import re

from jaxdg.data.storage import (
    SkippedEntries,
    composed,
    in_archive,
    is_file,
    is_folder,
    is_hidden,
    modified,
    on_disk,
    size,
    subfolders,
    walk,
)


class Tree:
    """The folder of a dataset as downloaded: its unpacked files and its zip archives, merged.

    Unpacked files, and the content of every archive, may lie one folder deeper, as
    `bdd100k/images/10k/..` does in its archives. A file that is both unpacked and in an archive is
    read unpacked if both have the same size. Any other file that occurs twice is an error.
    """

    def __init__(self, base: str, *, exact: bool = False):
        """Sets up the tree without looking at the disk.

        Args:
            base: the dataset's folder.
            exact: folders are only where their paths say, neither one deeper nor in an archive that
                their paths do not name.
        """
        self.base = base
        self.exact = exact
        self.modified: dict[str, int] = {}  # folders that were listed, and when they last changed
        self.skipped = SkippedEntries()

    def files(self, *folders: str) -> dict[str, str]:
        """All files below the one of `folders` that exists.

        Args:
            folders: alternatives, relative to `base`.

        Returns:
            The path of each file by its path relative to the folder, composed; no hidden ones.

        Raises:
            FileNotFoundError: none of the folders exists; says if one was found elsewhere.
            ValueError: an archive is damaged; there are two candidates for the folder or for a
                file.
        """
        found: dict[str, str] = {}
        seen: set[str] = set()
        for place in self.places(*folders):
            for parent, names in walk(place, self.skipped, seen):
                self.modified.update([modified(parent)])
                below = parent[len(place) + 1 :]
                for name in names:
                    path = os.path.join(parent, name)
                    key = composed(f"{below}/{name}" if below else name)
                    found[key] = _choose(found[key], path) if key in found else path
        return found

    def file(self, folders: tuple[str, ...], name: str) -> str:
        """The path of a file in the one of `folders` that exists.

        Args:
            folders: as for `files`.
            name: its path relative to the folder.

        Raises:
            FileNotFoundError: as for `files`; or there is no such file.
            ValueError: as for `files`.
        """
        places = self.places(*folders)
        found = [path for place in places if is_file(path := on_disk(place, name))]
        if not found:
            raise FileNotFoundError(
                f"{os.path.join(os.path.abspath(places[0]), name)} does not exist; fetch it"
            )
        path = functools.reduce(_choose, found)
        self.modified.update([modified(path)])
        return path

    def places(self, *folders: str) -> list[str]:
        """All places of the one of `folders` that exists: unpacked first, then in each archive.

        Args:
            folders: as for `files`.

        Raises:
            FileNotFoundError: as for `files`.
            ValueError: as for `files`.
        """
        if self.exact:
            for folder in folders:
                if is_folder(path := on_disk(self.base, folder.rstrip("/"))):
                    return [path]
            raise FileNotFoundError(
                f"folder {os.path.abspath(os.path.join(self.base, folders[0]))} does not exist;"
                " check JAXDG_DATA or --config.data.root, and data.folder"
            )
        if os.path.isdir(self.base):
            # It changes when an archive or a folder is added.
            self.modified.update([modified(self.base)])
            sources = self._sources()
            places = [[p for s in sources for p in _within(s, folder)] for folder in folders]
            places = [found for found in places if found]
            for first, *_ in places[1:]:
                if not _is_same(places[0][0], first):
                    raise ValueError(_clash(places[0][0], first))
            if places:
                return places[0]
        raise FileNotFoundError(self._not_found(folders))

    def _sources(self) -> list[str]:
        """The folder itself and its archives."""
        with os.scandir(self.base) as entries:
            archives = [
                entry.path
                for entry in entries
                if entry.name.lower().endswith(".zip")
                and entry.is_file()
                and not is_hidden(entry.name)
            ]
        return [self.base, *sorted(archives)]

    def _not_found(self, folders: tuple[str, ...]) -> str:
        base = os.path.abspath(self.base)
        wanted = f"{base} should hold {' or '.join(folders)}, unpacked or in a zip archive"
        if elsewhere := [place for folder in folders for place in self._elsewhere(base, folder)]:
            return (
                f"{wanted}, but {elsewhere[0]} was found instead; move it, or set JAXDG_DATA or"
                " --config.data.root"
            )
        if not os.path.isdir(base):
            return f"{wanted}, but does not exist; check JAXDG_DATA or --config.data.root"
        entries = sorted(name for name in os.listdir(base) if not is_hidden(name))
        holds = ", ".join(entries[:8]) or "nothing"
        more = ", .." if len(entries) > 8 else ""
        return f"{wanted}, but holds {holds}{more}; fetch what is missing"

    def _elsewhere(self, base: str, folder: str) -> Iterator[str]:
        """Places where a folder lies by mistake: without upper levels, deeper, beside or above."""
        root, name = os.path.split(base)
        above = os.path.dirname(root)
        alike = []
        if os.path.isdir(root):
            alike = [n for n in subfolders(root) if n != name and _letters(n) == _letters(name)]
        upper = [*(os.path.join(root, n) for n in alike), root, os.path.join(above, name), above]
        if os.path.isdir(base):
            parts = folder.split("/")
            tails = ["/".join(parts[i:]) for i in range(1, len(parts))]
            for tail in tails:
                for source in self._sources():
                    yield from _within(source, tail)
            for source in self._sources():
                for one in subfolders(source):
                    for two in subfolders(os.path.join(source, one)):
                        yield from _within(os.path.join(source, one, two), folder)
        yield from (path for up in upper if is_folder(path := os.path.join(up, folder)))


def _letters(name: str) -> str:
    return re.sub(r"\W|_", "", name).lower()


def _within(source: str, folder: str) -> list[str]:
    """`folder` in `source`, and in the folders of `source`."""
    sources = [source, *(os.path.join(source, name) for name in subfolders(source))]
    return [path for source in sources if is_folder(path := on_disk(source, folder))]


def _is_same(first: str, second: str) -> bool:
    """Whether two folders are one, by a link or because the disk ignores the case of letters."""
    return not in_archive(first) and not in_archive(second) and os.path.samefile(first, second)


def _choose(first: str, second: str) -> str:
    """The one of two files of the same name that counts: the unpacked one, if the sizes are equal.

    Raises:
        ValueError: neither counts, because one of the two is a mistake.
    """
    archived = [in_archive(path) for path in (first, second)]
    if sum(archived) == 1:
        unpacked, packed = (second, first) if archived[0] else (first, second)
        if size(unpacked) == size(packed):
            return unpacked
        sizes = f"differ: {size(unpacked)} and {size(packed)} bytes"
        raise ValueError(
            f"{unpacked} and {packed} {sizes}; keep the right one: delete the file, or move the"
            " archive elsewhere"
        )
    if first == second:
        raise ValueError(
            f"{first} is in its archive twice, with different contents; unpack the archive and"
            " keep one"
        )
    raise ValueError(_clash(first, second))


def _clash(first: str, second: str) -> str:
    """An error about two files or folders of which only one may be there."""
    names = [os.path.basename(path) for path in (first, second)]
    if composed(first) == composed(second):
        forms = " and ".join(ascii(name) for name in names)
        return (
            f"{first} and {second} differ only in how their letters are composed ({forms});"
            " keep one"
        )
    remedy = "keep one, and move the other, or what it is in, out of the dataset's folder"
    return f"{first} and {second} are two candidates for the same place; {remedy}"
