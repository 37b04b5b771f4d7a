"""Which images were trained on: no domain that has some of them is unseen, whatever it is called.

Domains are compared by what they are called (`gta5/val` and `gta5/train` are one dataset's) and by
their images, which are the same where one of these is the same: the file, links of folders
resolved; the fingerprint that the start-up check took of it (see `index.py`); the scene of the
generated streets. Where two files have one fingerprint some of them are compared byte by byte, so
that nothing is said of images that only look alike. Records carry the fingerprints of the files
that they were made of; older ones are told by the names of these.

A run keeps what it was trained on in `source.npz` of its workdir, so that evaluation elsewhere
knows it without the images.

Not told: the same picture in another file format, or encoded anew.
"""

from collections.abc import Callable, Mapping, Sequence
import dataclasses
import hashlib
import io
import json
import os
from pathlib import Path
from typing import Any
import zipfile

from jaxtyping import Bool, UInt64
import numpy as np

from jaxdg import files
from jaxdg.data import published, storage
from jaxdg.data.datasets import Dataset, Files, Mixture, Streets, Subset
from jaxdg.data.records import Records

FILE = "source.npz"
CONFIRMED = 64  # pairs of files of one fingerprint that are compared byte by byte, evenly spread
Hashes = UInt64[np.ndarray, " n"]


@dataclasses.dataclass(frozen=True)
class Images:
    """What tells the images of a dataset from others; 64 bits each, 0 where not known.

    Attributes:
        files: of the path on this machine, links of folders resolved.
        names: of the path below the data root, or of a generated scene; the same on every machine.
        contents: fingerprints of the files, the same on every machine.
        path: of a place, the path; for those that have one in `files`.
    """

    files: Hashes
    names: Hashes
    contents: Hashes
    path: Callable[[int], str] = lambda i: ""

    @classmethod
    def of(cls, dataset: Dataset, root: str) -> "Images":
        """Those of a dataset; touches folders, and no image.

        Args:
            dataset: any.
            root: the data root that it was opened in.
        """
        inner: Any = dataset
        if isinstance(inner, Subset):
            return cls.of(inner.dataset, root).take(inner.images)
        if isinstance(inner, Mixture):
            return cls.joined([cls.of(part, root) for part in inner.parts], inner.name)
        if isinstance(inner, Files):
            return cls.of_files(inner.pairs.images, root, inner.pairs.fingerprints, inner.name)
        n = len(dataset)
        names = [
            inner.scene(i) if isinstance(inner, Streets) else _relative(dataset.name(i), root)
            for i in range(n)
        ]
        unknown = np.zeros(n, np.uint64)
        contents = inner.fingerprints if isinstance(inner, Records) else None
        return cls(unknown, _hashes(names), unknown if contents is None else contents)

    @classmethod
    def of_files(
        cls,
        paths: Sequence[str],
        root: str,
        contents: Hashes | None = None,
        path: Callable[[int], str] = lambda i: "",
    ) -> "Images":
        """Those of files.

        Args:
            paths: theirs.
            root: the data root; they may lie elsewhere.
            contents: their fingerprints, if they were taken.
            path: of a place, the path.
        """
        contents = np.zeros(len(paths), np.uint64) if contents is None else contents
        return cls(
            _hashes(_resolved(paths)),
            _hashes([_relative(path, root) for path in paths]),
            contents,
            path,
        )

    @classmethod
    def joined(
        cls, parts: Sequence["Images"], path: Callable[[int], str] = lambda i: ""
    ) -> "Images":
        """Those of several, one after another."""
        where, names, contents = (
            np.concatenate([getattr(part, key) for part in parts])
            for key in ("files", "names", "contents")
        )
        return cls(where, names, contents, path)

    def __len__(self) -> int:
        return len(self.names)

    def take(self, places: Sequence[int]) -> "Images":
        """Some of them."""
        return Images(
            self.files[places],
            self.names[places],
            self.contents[places],
            lambda i: self.path(places[i]),
        )

    def among(self, others: "Images") -> Bool[np.ndarray, " n"]:
        """Which of these images are among others."""
        found = _among(self.files, others.files)
        # A name says less than a content, as another root may have other images of the name.
        unknown = others.names[others.contents == 0]
        found |= _among(self.names, unknown) | (
            _among(self.names, others.names) & (self.contents == 0)
        )
        alike = np.flatnonzero(_among(self.contents, others.contents) & ~found)
        found[self._confirmed(alike, others)] = True
        return found

    def _confirmed(self, alike: np.ndarray, others: "Images") -> np.ndarray:
        """Those of `alike`, whose contents are among the others', that a look at the files does not
        refute.
        """
        order = np.argsort(others.contents, kind="stable")
        first, last = (
            np.searchsorted(others.contents, self.contents[alike], side, sorter=order)
            for side in ("left", "right")
        )
        readable = np.flatnonzero((self.files[alike] != 0) & (others.files[order[first]] != 0))

        def same(k: int) -> bool:
            mine = storage.read(self.path(int(alike[k])))
            return any(
                mine == storage.read(others.path(int(j)))
                for j in order[first[k] : last[k]]
                if others.files[j]
            )

        some = readable[
            np.unique(
                np.linspace(0, len(readable) - 1, min(CONFIRMED, len(readable))).round().astype(int)
            )
        ]
        if all(map(same, some.tolist())):
            return alike
        return np.delete(
            alike, [k for k in readable.tolist() if not same(k)]
        )  # fingerprints say little of such files: all are compared


@dataclasses.dataclass(frozen=True)
class TrainedOn:
    """What a model was trained on.

    Attributes:
        domains: the source of the run, its parts one by one, and those of the run whose model it
            started from.
        count: images of the run's own source, at its last start.
        classes: names of its classes.
        table: SHA-256 of what the ids of its label files mean, "" where there are no label maps.
        images: of all `domains`; None where nobody noted them.
        pixels: of the classes that rare-class sampling draws by, see `samplers.class_totals`.
    """

    domains: tuple[str, ...]
    count: int = 0
    classes: tuple[str, ...] = ()
    table: str = ""
    images: Images | None = None
    pixels: tuple[int, ...] = ()

    @classmethod
    def of(cls, source: Dataset, root: str) -> "TrainedOn":
        """What a run is trained on that starts from an encoder, or from nothing.

        Args:
            source: the images to train on.
            root: the data root that they were opened in.
        """
        return cls(
            tuple(source.domain.split("+")),
            len(source),
            source.labels.names,
            _table(source),
            Images.of(source, root),
        )

    def without_images(self) -> "TrainedOn":
        """The same domains, of which no image is trained on."""
        return dataclasses.replace(
            self, images=None if self.images is None else self.images.take([])
        )

    def with_pictures(self, paths: Sequence[str], root: str) -> "TrainedOn":
        """This, and besides pictures that are mixed into the images, or whose styles these are
        given.
        """
        assert self.images is not None
        return dataclasses.replace(
            self,
            images=Images.joined([self.images, Images.of_files(paths, root)], self.images.path),
        )

    def also(self, other: "TrainedOn | None") -> "TrainedOn":
        """This, and besides the domains and images of another."""
        if other is None:
            return self
        domains = tuple(dict.fromkeys((*self.domains, *other.domains)))
        if self.images is None or other.images is None:
            return dataclasses.replace(self, domains=domains)
        more = other.images.take(np.flatnonzero(~other.images.among(self.images)).tolist())
        more = dataclasses.replace(
            more, files=np.zeros(len(more), np.uint64)
        )  # `path` knows this one's alone
        return dataclasses.replace(
            self, domains=domains, images=Images.joined([self.images, more], self.images.path)
        )

    def changes(self, before: "TrainedOn", source: str) -> str | None:
        """What is not as at the run's last start, and what that means for a run that goes on; None
        if nothing changed.

        Args:
            before: what the run's workdir says.
            source: its name.

        Raises:
            ValueError: the classes, or what the ids of the label files mean, changed.
        """
        if before.classes and before.classes != self.classes:
            raise ValueError(
                f"the run was trained on the classes {', '.join(before.classes)}, and now {source}"
                f" has {', '.join(self.classes)}; give another --workdir, or the dataset with the"
                " classes of before"
            )
        if before.table and before.table != self.table:
            raise ValueError(
                f"the ids in the label files of {source} mean other classes than at the run's last"
                " start; give another --workdir, or the label map of before (data.folder,"
                " data.mapillary_labels, or the records)"
            )
        found = []
        if before.count != self.count:
            found.append(f"{self.count} images instead of {before.count}")
        elif self.images is not None and before.images is not None:
            own = self.images.take(
                range(min(self.count, len(self.images)))
            )  # a run of no step is trained on none
            if others := int((~own.among(before.images)).sum()):
                found.append(f"{others} of its {self.count} images that were not there")
        if before.pixels and self.pixels and before.pixels != self.pixels:
            found.append(
                "labels with other numbers of pixels of the classes, by which rare classes are"
                " drawn"
            )
        if not found:
            return None
        return (
            f"{source} has changed since the run's last start: {' and '.join(found)}; from here on"
            " other images come in another order, and the run is no longer the one that it would"
            " have been"
        )

    def save(self, workdir: Path) -> None:
        """Writes `source.npz`, whole or not at all."""
        files.write(workdir / FILE, self.to_bytes())

    def to_bytes(self) -> bytes:
        """The contents of `source.npz`: `about` (JSON: all but the images), and of the images, if
        they are known, `names` and `contents`.
        """
        about = {
            "version": 1,
            "domains": self.domains,
            "count": self.count,
            "classes": self.classes,
            "table": self.table,
        }
        about["pixels"] = self.pixels
        arrays = {"about": np.frombuffer(json.dumps(about).encode(), np.uint8)}
        if self.images is not None:
            arrays |= {"names": self.images.names, "contents": self.images.contents}
        packed = io.BytesIO()
        np.savez(packed, **arrays)  # pyright: ignore[reportArgumentType]
        return packed.getvalue()

    @classmethod
    def load(cls, workdir: Path) -> "TrainedOn | None":
        """What `source.npz` of a workdir says, None if there is none.

        Raises:
            ValueError: the file is damaged.
        """
        path = workdir / FILE
        if not path.is_file():
            return None
        try:
            return cls.from_bytes(path.read_bytes())
        except (OSError, ValueError) as error:
            cause = error.__cause__ or error
            raise ValueError(
                f"{path} is damaged ({type(cause).__name__}: {cause}); delete it, and the run's own"
                " command writes it again"
            ) from error

    @classmethod
    def from_bytes(cls, content: bytes) -> "TrainedOn":
        """What `to_bytes` has written.

        Raises:
            ValueError: it is something else.
        """
        try:
            with np.load(io.BytesIO(content)) as arrays:
                about = json.loads(arrays["about"].tobytes())
                images = None
                if "names" in arrays:
                    names = arrays["names"]
                    unknown = np.zeros(len(names), np.uint64)
                    images = Images(unknown, names, arrays["contents"])
            pixels = tuple(about.get("pixels", ()))
            return cls(
                tuple(about["domains"]),
                about["count"],
                tuple(about["classes"]),
                about["table"],
                images,
                pixels,
            )
        except (OSError, ValueError, KeyError, TypeError, EOFError, zipfile.BadZipFile) as error:
            raise ValueError(f"no record of what was trained on ({error})") from error


@dataclasses.dataclass(frozen=True)
class Standing:
    """How a domain stands to what was trained on.

    Attributes:
        seen: whether it is of the datasets trained on, or has images of theirs.
        trained_on: which of its judged images were trained on; None where that is not known.
        part_of: the unseen domain that has its images too, so that they do not count twice in a
            mean.
    """

    seen: bool
    trained_on: Bool[np.ndarray, " n"] | None = None
    part_of: str | None = None


def family(domain: str) -> str:
    """What a domain is a split or a part of: the published dataset `gta5` of `gta5/val`, `acdc` of
    `acdc/night`; else itself.
    """
    return domain.split("/")[0] if published.find(domain) else domain


def standings(
    trained: TrainedOn,
    domains: Mapping[str, Dataset],
    root: str,
    say: Callable[[str], None] = lambda line: None,
) -> dict[str, Standing]:
    """How each domain stands to what was trained on.

    A domain is seen if it is of a dataset trained on, has images trained on, or has images that a
    seen domain is judged on.

    Args:
        trained: what was trained on.
        domains: the images that are judged, or `Subset`s of these, by name.
        root: the data root that they were opened in.
        say: receives a line for every domain whose name does not tell how it stands.
    """
    whole = {
        name: dataset.dataset if isinstance(dataset, Subset) else dataset
        for name, dataset in domains.items()
    }
    images = {name: Images.of(dataset, root) for name, dataset in whole.items()}
    families = {family(part) for domain in trained.domains for part in domain.split("+")}
    related = {name for name in domains if families & {family(part) for part in name.split("+")}}
    masks = {
        name: None if trained.images is None else mine.among(trained.images)
        for name, mine in images.items()
    }
    seen = set(related)
    for name, mask in masks.items():
        n = 0 if mask is None else int(mask.sum())
        if n:
            seen.add(name)
            say(f"{name}: {_some(n, len(images[name]))} trained on; it counts as seen")
        elif name in related and name not in trained.domains:
            say(
                f"{name}: of a dataset that is trained on ({', '.join(trained.domains)}); it counts"
                " as seen"
            )
    waiting = list(seen)
    while waiting:  # what shares images with a seen domain is seen, and so on
        known = waiting.pop()
        for name in domains.keys() - seen:
            if n := int(images[name].among(images[known]).sum()):
                seen.add(name)
                waiting.append(name)
                say(
                    f"{name}: {_some(n, len(images[name]))} in {known} too, which is seen; so it"
                    " counts as seen"
                )
    part_of = _parts([name for name in domains if name not in seen], images, say)
    judged = {
        name: mask[dataset.images] if mask is not None and isinstance(dataset, Subset) else mask
        for (name, dataset), mask in zip(domains.items(), masks.values(), strict=True)
    }
    return {name: Standing(name in seen, judged[name], part_of.get(name)) for name in domains}


def _parts(
    unseen: Sequence[str], images: Mapping[str, Images], say: Callable[[str], None]
) -> dict[str, str]:
    """The domains that share images with another one, by name, and that one: of two the smaller if
    it lies in the other, else the later.
    """
    part_of: dict[str, str] = {}
    for name in unseen:
        for other in [other for other in unseen[: unseen.index(name)] if other not in part_of]:
            n = int(images[name].among(images[other]).sum())
            if not n:
                continue
            inside = n < len(images[name]) and bool(images[other].among(images[name]).all())
            part, whole = (other, name) if inside else (name, other)
            part_of[part] = whole
            if not part.startswith(f"{whole}/"):
                count = int(images[part].among(images[whole]).sum())
                say(
                    f"{part}: {_some(count, len(images[part]))} in {whole} too; it counts as a part"
                    " of it and not in the mean of unseen"
                )
            if part == name:
                break
    for name, whole in part_of.items():
        while whole in part_of:
            whole = part_of[whole]
        part_of[name] = whole
    return part_of


def _some(n: int, of: int) -> str:
    return (
        f"all of its {of} images are"
        if n == of
        else f"{n} of its {of} images {'is' if n == 1 else 'are'}"
    )


def _relative(path: str, root: str) -> str:
    """A name that means the same on another machine."""
    return path.removeprefix(os.path.normpath(root) + "/")


def _resolved(paths: Sequence[str]) -> list[str]:
    """Absolute paths, links of folders followed; every folder is looked at once."""
    folders: dict[str, str] = {}
    found = []
    for path in paths:
        folder, _, name = path.rpartition("/")
        if folder not in folders:
            folders[folder] = os.path.realpath(folder or ("/" if path.startswith("/") else "."))
        found.append(f"{folders[folder]}/{name}")
    return found


def _hashes(texts: Sequence[str]) -> Hashes:
    """64 bits of each text, the same in every process."""
    digests = (
        hashlib.blake2b(text.encode(errors="surrogateescape"), digest_size=8).digest()
        for text in texts
    )
    return np.frombuffer(b"".join(digests), np.uint64)


def _among(these: Hashes, others: UInt64[np.ndarray, " m"]) -> Bool[np.ndarray, " n"]:
    """Which are among the others; 0 never is."""
    return np.isin(these, others) & (these != 0)


def _table(dataset: Any) -> str:
    """SHA-256 of the label tables of a dataset, "" where it has none."""
    inner = dataset.dataset if isinstance(dataset, Subset) else dataset
    tables = [
        getattr(part, "table", None)
        for part in (inner.parts if isinstance(inner, Mixture) else (inner,))
    ]
    if all(table is None for table in tables):
        return ""
    return hashlib.sha256(
        b"|".join(
            b"" if table is None else np.asarray(table, np.int16).tobytes() for table in tables
        )
    ).hexdigest()
