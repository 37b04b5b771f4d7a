"""Lists of files that a run leaves out: what `data.skip` names.

A list has one path a line, of an image or of its label, relative to the data root or absolute;
empty lines and those that begin with # do not count. A line is taken for what it means where that
is certain: with quotes or backslashes, of this path below another root, of a file that is in an
archive here, with letters composed otherwise. A line that names no file is an error. It may name a
file of a dataset that the run does not open, as one list serves all datasets below a root.

Leaving images out changes neither the order nor the samples of the others. Which images a step
draws depends on how many there are, though. A run that goes on with a longer list draws from there
on as a run of the longer list does; what it drew before stays as it was.
"""

import bisect
from collections.abc import Collection, Iterator, Sequence
import difflib
import functools
import os
import re

from jaxdg.data import records, storage

HEADER = (  # the first line of a list that may be replaced
    "# written by python -m jaxdg.data.check\n"
)
TOLD = 3  # lines that match nothing of which an error says all


def skip_list(
    file: str, root: str, opened: records.Records | None = None, *, strict: bool = True
) -> frozenset[str]:
    """The paths in a list of files to leave out.

    Args:
        file: a text file, see above.
        root: the data root, a folder or the URL of records.
        opened: records below it that are to be read.
        strict: lines about a folder that the root does not have are errors too. They are not where
            images are judged on: a run may be evaluated where its source is not.

    Returns:
        The paths as the datasets below `root` name them; of images and labels in records, the image
        below `root`.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: a line names nothing below the root; says which, and what comes nearest.
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
        raise ValueError(_told(file, place, lost))
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
    """What a list says, without a look at the files: the same on every machine, for archives,
    folders and records.

    Args:
        file: as for `skip_list`.
        root: as for `skip_list`.

    Raises:
        FileNotFoundError: as for `skip_list`.
    """
    place = _Root(root, None)
    return frozenset(_key(place.tails([*_readings(line)][-1])[0]) for _, line in _lines(file))


def no_longer(before: Collection[str], now: Collection[str], root: str) -> list[str]:
    """The entries of an earlier list that a later one lacks, although the files are there.

    Args:
        before: of `entries`, perhaps below another root.
        now: of `entries`.
        root: the data root.
    """
    place = _Root(root, None)
    gone = [
        path
        for path in sorted(set(before) - set(now))
        if not any(other.endswith(f"/{path}") for other in now)
    ]
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
        raise ValueError(f"{file}: no text ({error}); save it as UTF-8") from error
    for number, line in enumerate(text.split("\n"), 1):
        line = line.removesuffix("\r")
        if line.strip() and not line.lstrip().startswith("#"):
            yield number, line


def _readings(line: str) -> Iterator[str]:
    """What a line may mean, the likeliest first."""
    bare = line.strip()
    if len(bare) > 2 and bare[0] == bare[-1] and bare[0] in "\"'":
        bare = bare[1:-1]
    yield from dict.fromkeys((line, line.strip(), bare, bare.replace("\\", "/")))


class _Root:
    """What a line may name below a data root."""

    def __init__(self, root: str, opened: records.Records | None):
        self.root = root
        self.opened = opened
        self.local = "://" not in root

    @functools.cached_property
    def mine(self) -> dict[str, str]:
        """The images of the opened records, by every name that they and their labels have."""
        return {} if self.opened is None else _keys(self.opened.names(), self.opened.label_names())

    @functools.cached_property
    def recorded(self) -> dict[str, str]:
        """The same of all records below the root."""
        return {
            key: name
            for found in records.names_below(self.root)
            for key, name in _keys(*found).items()
        }

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
                # The path of another root, or of the current folder, ends like the one below this
                # root.
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
        """The paths by which the datasets that are opened know what is at a path relative to the
        root.
        """
        mine = self.mine.get(_key(path))
        disk = self._on_disk(path) if self.local and not path.startswith("../") else []
        if mine is None:
            return [] if path.partition("/")[0] in self.nameless else disk
        return [os.path.join(self.root, mine), *disk]

    def _elsewhere(self, path: str) -> list[str]:
        """The same of records that are not opened; they are looked for only if a line names nothing
        else.
        """
        name = self.recorded.get(_key(path))
        return [] if name is None else [os.path.join(self.root, name)]

    def _on_disk(self, path: str) -> list[str]:
        place = storage.spelt(self.root, path)
        if not storage.is_file(place):
            archived = self._in_archive(path)
            return archived if len(archived) == 1 else []
        found = [place]
        real = os.path.relpath(os.path.realpath(place), os.path.realpath(self.root))
        unpacked = os.path.join(self.root, _unpacked(os.path.relpath(place, self.root)))
        if not real.startswith("../"):  # a dataset lists the path without links
            found.append(os.path.join(self.root, real))
        if os.path.isfile(unpacked):  # and what is unpacked rather than the archive
            found.append(unpacked)
        return list(dict.fromkeys(found))

    def _in_archive(self, path: str) -> list[str]:
        """Where the file is in the archives beside which it would be, were it unpacked."""
        place = self.root
        parts = path.split("/")
        while len(parts) > 1 and os.path.isdir(below := os.path.join(place, parts[0])):
            place = below
            parts = parts[1:]
        archives = [
            name
            for name in storage.entries(place)
            if name.lower().endswith(".zip") and not storage.is_hidden(name)
        ]
        inside = [storage.spelt(os.path.join(place, name), "/".join(parts)) for name in archives]
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
            starts = [
                name
                for name in storage.subfolders(place)
                if storage.is_folder(os.path.join(place, name, parts[0]))
            ]
            parts = [*starts[:1], *parts]
        for part in parts:
            names = [name for name in storage.entries(place) if not storage.is_hidden(name)]
            if not (close := part if part in names else _close(part, names)):
                return None
            place = os.path.join(place, close)
        return os.path.relpath(place, self.root) if storage.is_file(place) else None


def _key(path: str) -> str:
    """What a path has in common with that of the same image elsewhere: composed, and as if
    unpacked.
    """
    return storage.composed(_unpacked(path))


def _unpacked(path: str) -> str:
    """The path of a member of an archive as if it had been unpacked beside it."""
    return re.sub(r"[^/]+\.zip/", "", path, flags=re.IGNORECASE)


def _keys(names: Sequence[str], labels: Sequence[str]) -> dict[str, str]:
    """The names of images by the keys of these and of their labels, as far as those are known."""
    named = {_key(label): name for label, name in zip(labels, names, strict=False) if label}
    return named | {_key(name): name for name in names}


def _close(wanted: str, names: Sequence[str], neighbours: int = 200) -> str | None:
    """The name most like one that is not among many, if any is: of those that begin or end alike."""
    near: dict[str, None] = {}
    for order in (slice(None), slice(None, None, -1)):
        ordered = sorted(name[order] for name in names)
        at = bisect.bisect(ordered, wanted[order])
        near |= dict.fromkeys(
            name[order] for name in ordered[max(0, at - neighbours) : at + neighbours]
        )
    return next(iter(difflib.get_close_matches(wanted, near, 1)), None)


def _told(file: str, place: _Root, lost: Sequence[tuple[int, str]]) -> str:
    """An error about the lines of a list that name nothing."""
    told = []
    for number, line in lost[:TOLD]:
        path = place.tails(line.strip())[0]
        what = f"no file below {os.path.abspath(place.root) if place.local else place.root}"
        if place.local and storage.is_folder(os.path.join(place.root, path)):
            what = "a folder, and a line names one file"
        elif (
            path.partition("/")[0] in place.nameless
            and place.local
            and storage.is_file(os.path.join(place.root, path))
        ):
            what = "no image of its records, which do not know their labels; name the image"
        near = place.nearest(line)
        told.append(
            f"line {number}: {line.strip()!r} is {what}" + (f" (nearest is {near})" if near else "")
        )
    more = (
        f"; and lines {', '.join(str(number) for number, _ in lost[TOLD:][:10])}"
        if len(lost) > TOLD
        else ""
    )
    more += ", .." if len(lost) > TOLD + 10 else ""
    return f"data.skip: {file}, {'; '.join(told)}{more}; correct these lines or delete them"
