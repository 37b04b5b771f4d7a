"""Lists of files that a run leaves out, which `data.skip` names.

A list has one path a line, of an image or of its label, relative to the data root or absolute.
Empty lines and those that begin with # do not count. A line may have quotes or backslashes, begin
with another root, name a file that is in an archive here, or compose its letters otherwise, if it
is certain which file it means. A line that names no file is an error. It may name a file of a
dataset that the run does not open, as one list serves all datasets below a root.

Leaving images out changes neither the order nor the samples of the others. But the number of images
decides which of them a step draws. A run that goes on with a longer list draws from there on as a
run of the longer list does; its earlier draws stay as they were.
"""

import bisect
from collections.abc import Collection, Iterator, Sequence
import difflib
import functools
import os
import re

from jaxdg.data import records, storage

HEADER = "# written by python -m jaxdg.data.check\n"  # first line of a list that may be replaced
EXPLAINED = 3  # lines that an error explains; it gives only the numbers of the others


def skip_list(
    file: str, root: str, opened: records.Records | None = None, *, strict: bool = True
) -> frozenset[str]:
    """The paths in a list of files to leave out.

    Args:
        file: a text file in the form above.
        root: the data root, a folder or the URL of records.
        opened: the records below it that are to be read.
        strict: a line about a folder that the root does not have is an error too. Datasets to judge
            on are opened without, because a run may be evaluated where its source is not.

    Returns:
        The paths as the datasets below `root` name them. For images and labels in records, the path
        of the image below `root`.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: a line names nothing below the root; says which line, and the nearest path.
    """
    place = _Root(root, opened)
    found: set[str] = set()
    lost: list[tuple[int, str]] = []
    for number, line in _lines(file):
        paths = place.find(line)
        found.update(paths)
        if not paths and (strict or place.has_folder_of(line)):
            lost.append((number, line))
    if lost:
        raise ValueError(_error(file, place, lost))
    return frozenset(found)


def without(
    dataset: records.Records, file: str, root: str, *, strict: bool = True
) -> records.Records:
    """Records without the images in a list.

    Args:
        dataset: records below `root`.
        file: as for `skip_list`.
        root: as for `skip_list`.
        strict: as for `skip_list`.

    Raises:
        FileNotFoundError: as for `skip_list`.
        ValueError: as for `skip_list`; or no image is left.
    """
    left_out = skip_list(file, root, dataset, strict=strict)
    drop = [i for i, name in enumerate(dataset.names()) if os.path.join(root, name) in left_out]
    if len(drop) == len(dataset):
        raise ValueError(f"data.skip leaves no image of {dataset.directory}; shorten the list")
    return dataset.without(drop)


def entries(file: str, root: str) -> frozenset[str]:
    """The entries of a list without a look at the files.

    They are the same on every machine, for archives, folders and records.

    Args:
        file: as for `skip_list`.
        root: as for `skip_list`.

    Raises:
        FileNotFoundError: as for `skip_list`.
    """
    place = _Root(root, None)
    return frozenset(_key(place.tails([*_readings(line)][-1])[0]) for _, line in _lines(file))


def no_longer(before: Collection[str], now: Collection[str], root: str) -> list[str]:
    """The entries of an earlier list that a later one lacks and whose files exist.

    Args:
        before: of `entries`, perhaps below another root.
        now: of `entries`.
        root: the data root.
    """
    place = _Root(root, None)
    gone = sorted(set(before) - set(now))
    gone = [path for path in gone if not any(other.endswith(f"/{path}") for other in now)]
    return [path for path in gone if place.find(path)]


def _lines(file: str) -> Iterator[tuple[int, str]]:
    """The lines that count, with their numbers."""
    if not os.path.isfile(file):
        raise FileNotFoundError(f"data.skip names {os.path.abspath(file)}, which does not exist")
    with open(file, "rb") as stored:
        data = stored.read()
    wide = data.startswith((b"\xff\xfe", b"\xfe\xff"))  # as PowerShell's > writes
    try:
        text = data.decode("utf-16") if wide else data.decode("utf-8-sig", "surrogateescape")
    except UnicodeDecodeError as error:
        raise ValueError(f"{file} is not a text file ({error}); save it as UTF-8") from error
    for number, line in enumerate(text.split("\n"), 1):
        line = line.removesuffix("\r")
        if line.strip() and not line.lstrip().startswith("#"):
            yield number, line


def _readings(line: str) -> Iterator[str]:
    """The possible meanings of a line, the likeliest first."""
    bare = line.strip()
    if len(bare) > 2 and bare[0] == bare[-1] and bare[0] in "\"'":
        bare = bare[1:-1]
    yield from dict.fromkeys((line, line.strip(), bare, bare.replace("\\", "/")))


class _Root:
    """The files that a line may name below a data root."""

    def __init__(self, root: str, opened: records.Records | None):
        self.root = root
        self.opened = opened
        self.local = "://" not in root

    @functools.cached_property
    def mine(self) -> dict[str, str]:
        """The images of the opened records, by all names of them and of their labels."""
        return {} if self.opened is None else _keys(self.opened.names(), self.opened.label_names())

    @functools.cached_property
    def recorded(self) -> dict[str, str]:
        """The images of all records below the root, by all names of them and of their labels."""
        found = [_keys(names, labels) for names, labels in records.names_below(self.root)]
        return {key: name for keys in found for key, name in keys.items()}

    @functools.cached_property
    def nameless(self) -> frozenset[str]:
        """Folders of opened records that do not say which labels they were made of."""
        if self.opened is None or self.opened.label_names():
            return frozenset()
        return frozenset(name.partition("/")[0] for name in self.opened.names())

    def find(self, line: str) -> list[str]:
        """The paths that a line means; none if it names nothing."""
        for look in (self._here, self._elsewhere):
            for reading in _readings(line):
                path, *tails = self.tails(reading)
                if found := look(path):
                    return found
                # A path of another root or of the current folder ends like one below this root.
                others = [found for tail in tails if (found := look(tail))]
                if len(others) == 1:
                    return others[0]
        return []

    def tails(self, reading: str) -> list[str]:
        """A path relative to the root, and its ends of two names and more."""
        parts = [part for part in reading.split("/") if part not in ("", ".")]
        path = "/".join(parts)
        if self.local:
            above = os.path.abspath(self.root)
            inside = os.path.relpath(os.path.join(above, reading), above)
            path = path if inside.startswith("../") and os.path.isabs(reading) else inside
        return [path, *("/".join(parts[i:]) for i in range(1, len(parts) - 1))]

    def has_folder_of(self, line: str) -> bool:
        """Whether the root has the folder that a line begins with."""
        *_, reading = _readings(line)
        system, inner = records.filesystem(self.root)
        return system.exists(f"{inner}/{self.tails(reading)[0].partition('/')[0]}")

    def _here(self, path: str) -> list[str]:
        """The paths by which the opened datasets know the file at a path relative to the root."""
        mine = self.mine.get(_key(path))
        disk = self._on_disk(path) if self.local and not path.startswith("../") else []
        if mine is None:
            return [] if path.partition("/")[0] in self.nameless else disk
        return [os.path.join(self.root, mine), *disk]

    def _elsewhere(self, path: str) -> list[str]:
        """The path of an image of any records, looked for only if a line names nothing else."""
        name = self.recorded.get(_key(path))
        return [] if name is None else [os.path.join(self.root, name)]

    def _on_disk(self, path: str) -> list[str]:
        place = storage.on_disk(self.root, path)
        if not storage.is_file(place):
            archived = self._in_archive(path)
            return archived if len(archived) == 1 else []
        found = [place]
        real = os.path.relpath(os.path.realpath(place), os.path.realpath(self.root))
        unpacked = os.path.join(self.root, _unpacked(os.path.relpath(place, self.root)))
        if not real.startswith("../"):  # a dataset lists the path without links
            found.append(os.path.join(self.root, real))
        if os.path.isfile(unpacked):  # a dataset reads it rather than the archive's member
            found.append(unpacked)
        return list(dict.fromkeys(found))

    def _in_archive(self, path: str) -> list[str]:
        """The places of a file in the archives of the folder where it would lie unpacked."""
        place = self.root
        parts = path.split("/")
        while len(parts) > 1 and os.path.isdir(below := os.path.join(place, parts[0])):
            place = below
            parts = parts[1:]
        names = [name for name in storage.entries(place) if not storage.is_hidden(name)]
        archives = [os.path.join(place, name) for name in names if name.lower().endswith(".zip")]
        inside = [storage.on_disk(archive, "/".join(parts)) for archive in archives]
        return [member for member in inside if storage.is_file(member)]

    def nearest(self, line: str) -> str | None:
        """The path relative to the root that is most like a line that names nothing."""
        *_, reading = _readings(line)
        path = self.tails(reading)[0]
        names = sorted(self.mine.keys() | self.recorded.keys())
        if close := _close(_key(path), names):
            return (self.mine | self.recorded)[close]
        return self._nearest_on_disk(path.split("/")) if self.local else None

    def _nearest_on_disk(self, parts: Sequence[str]) -> str | None:
        place = self.root
        if not storage.is_folder(os.path.join(place, parts[0])):
            folders = storage.subfolders(place)
            starts = [f for f in folders if storage.is_folder(os.path.join(place, f, parts[0]))]
            parts = [*starts[:1], *parts]
        for part in parts:
            names = [name for name in storage.entries(place) if not storage.is_hidden(name)]
            if not (close := part if part in names else _close(part, names)):
                return None
            place = os.path.join(place, close)
        return os.path.relpath(place, self.root) if storage.is_file(place) else None


def _key(path: str) -> str:
    """The form of a path that is the same for archives and all spellings: composed, unpacked."""
    return storage.composed(_unpacked(path))


def _unpacked(path: str) -> str:
    """The path of a member of an archive as if it had been unpacked beside it."""
    return re.sub(r"[^/]+\.zip/", "", path, flags=re.IGNORECASE)


def _keys(names: Sequence[str], labels: Sequence[str]) -> dict[str, str]:
    """The names of images by the keys of their own names and of their labels' known names."""
    named = {_key(label): name for label, name in zip(labels, names, strict=False) if label}
    return named | {_key(name): name for name in names}


def _close(wanted: str, names: Sequence[str], neighbours: int = 200) -> str | None:
    """The most similar of many names, if any is similar, among those that begin or end alike."""
    near: dict[str, None] = {}
    for order in (slice(None), slice(None, None, -1)):
        ordered = sorted(name[order] for name in names)
        at = bisect.bisect(ordered, wanted[order])
        around = ordered[max(0, at - neighbours) : at + neighbours]
        near |= dict.fromkeys(name[order] for name in around)
    return next(iter(difflib.get_close_matches(wanted, near, 1)), None)


def _error(file: str, place: _Root, lost: Sequence[tuple[int, str]]) -> str:
    """An error about the lines of a list that name nothing."""
    told = []
    for number, line in lost[:EXPLAINED]:
        path = place.tails(line.strip())[0]
        full = os.path.join(place.root, path)
        what = f"no file below {os.path.abspath(place.root) if place.local else place.root}"
        if place.local and storage.is_folder(full):
            what = "a folder, and a line names one file"
        elif place.local and path.partition("/")[0] in place.nameless and storage.is_file(full):
            what = "no image of its records, which do not know their labels; name the image"
        nearest = place.nearest(line)
        hint = f" (nearest is {nearest})" if nearest else ""
        told.append(f"line {number}: {line.strip()!r} is {what}{hint}")
    more = ""
    if len(lost) > EXPLAINED:
        more = f"; and lines {', '.join(str(number) for number, _ in lost[EXPLAINED:][:10])}"
    if len(lost) > EXPLAINED + 10:
        more += ", .."
    return f"data.skip: {file}, {'; '.join(told)}{more}; correct these lines or delete them"
