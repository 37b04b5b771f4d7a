"""Records: a domain as ArrayRecord shards, written once by `python -m jaxdg.data.prepare` and read
by jaxdg and by TFDS alike.

`ROOT/NAME/1.0.0/` (`ROOT/acdc/night/1.0.0/` for `acdc/night`, `ROOT/cityscapes/boxes/1.0.0/` for
boxes) has TFDS's layout, so that `tfds.data_source("acdc/night", data_dir=ROOT, split="train")`
reads it too. Beside TFDS's own files, `metadata.json` holds classes, colours and the size and
digest of every shard, `index.npz` the names and sizes of the images. TensorFlow is never imported.

Shards are read from local disks. Those of `gs://..` and `s3://..` are fetched into `$JAXDG_CACHE`
(else `~/.cache/jaxdg`) when opened.
"""

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
import copy
import functools
import hashlib
import io
import json
import os
from pathlib import Path
import re
import sys
from typing import Any
import uuid

import cv2
from fsspec import AbstractFileSystem
from fsspec.core import url_to_fs
from fsspec.implementations.local import LocalFileSystem
from jaxtyping import Int64, Integer, UInt8, UInt64
import numpy as np

from jaxdg.data import cache, jpeg, storage
from jaxdg.data.box_fields import areas_of
from jaxdg.data.labels import LabelSet, id_table

VERSION = "1.0.0"  # of the layout; TFDS names the folder by it
COMPLETE = "dataset_info.json"
UNFINISHED = "unfinished.json"
METADATA = "metadata.json"
INDEX = "index.npz"
THREADS = 8


class Records:
    """Labelled images of one split of a set of records; items equal those of the files that it was
    made of.

    Attributes:
        table: label file id to train id when the records were written, see `labels.id_table`; None
            for boxes.
        left_out: places among all images of the split of those that do not count, ascending.
    """

    left_out: tuple[int, ...] = ()

    def __init__(self, directory: str, split: str):
        """Checks that the shards are there and as long as they were written.

        Args:
            directory: local folder with `dataset_info.json`.
            split: `train` or `val`.

        Raises:
            ValueError: a shard is missing or of another length; names it.
        """
        metadata = json.loads(Path(directory, METADATA).read_text(encoding="utf-8"))
        self.directory = directory
        self.split: str = metadata["splits"][split]
        self.domain: str = metadata["domain"]
        self.labels = LabelSet(
            tuple(metadata["classes"]), tuple((r, g, b) for r, g, b in metadata["colors"])
        )
        self.table = (
            None
            if metadata["table"] is None
            else id_table({int(i): train_id for i, train_id in metadata["table"].items()})
        )
        self.boxes: bool = metadata["boxes"]
        self.shards = files_of(metadata, self.split)[1:]
        for name in (INDEX, *self.shards):
            path = os.path.join(directory, name)
            length, _ = metadata["files"][name]
            found = os.path.getsize(path) if os.path.isfile(path) else None
            if found != length:
                wrong = "is missing" if found is None else f"has {found} bytes instead of {length}"
                raise ValueError(
                    f"{path} {wrong}; copy it again, or delete the folder and prepare it again"
                )

    def __getstate__(self) -> dict:
        return {
            key: value
            for key, value in self.__dict__.items()
            if key not in ("_source", "_index", "_kept")
        }  # each process opens its own

    def without(self, images: Sequence[int]) -> "Records":
        """The same without some images; order and samples of the others stay as they are."""
        if not images:
            return self
        fewer = copy.copy(self)
        fewer.left_out = tuple(sorted({*self.left_out, *(int(self._kept[i]) for i in images)}))
        return fewer

    def __len__(self) -> int:
        return len(self._kept)

    def size(self, i: int) -> tuple[int, int]:
        """Height and width of image `i`, pixels."""
        h, w = self._index["sizes"][self._kept[i]].tolist()
        return h, w

    def name(self, i: int) -> str:
        """Path of the file that image `i` was made of, below its data root."""
        return self._text("names", int(self._kept[i]))

    def names(self) -> list[str]:
        """What `name` says of every image."""
        return [self.name(i) for i in range(len(self))]

    def label_names(self) -> list[str]:
        """The same of every image's label; none if there are none, or they were not noted."""
        return (
            [self._text("labels", i) for i in self._kept.tolist()]
            if "labels" in self._index
            else []
        )

    def _text(self, key: str, i: int) -> str:
        return _text(self._index[key], self._index["ends" if key == "names" else "label_ends"], i)

    @property
    def fingerprints(self) -> UInt64[np.ndarray, " n"] | None:
        """Of the files that the images were made of, see `index.fingerprint`; None in records that
        were written without.
        """
        taken = self._index.get("fingerprints")
        return None if taken is None else taken[self._kept]

    def __getitem__(self, i: int) -> dict[str, np.ndarray]:
        fields = self._fields(i)
        try:
            image = decode_image(fields["image"].bytes_list.value[0])
        except ValueError as error:
            raise ValueError(
                f"{self.name(i)} in {self.directory}: {error}, and was so when the records were"
                " written; prepare them again from a whole file, or without it (data.skip)"
            ) from error
        return {"image": image, **self._truth(fields)}

    def truth(self, i: int) -> dict[str, np.ndarray]:
        """What item `i` holds beside the image, which is not decoded."""
        return self._truth(self._fields(i))

    def _fields(self, i: int) -> Any:
        source, parse = self._source
        i = int(self._kept[i])
        try:
            return parse(
                source[i]
            ).features.feature  # TFDS's own parsing copies the pictures once more
        except RuntimeError as error:  # array_record's, when a checksum does not hold
            shard = os.path.join(
                self.directory,
                self.shards[int(np.searchsorted(self._index["bounds"], i, side="right"))],
            )
            raise ValueError(
                f"{shard}: damaged ({error}); copy it again, or delete the folder and prepare it"
                " again"
            ) from error

    def _truth(self, fields: Any) -> dict[str, np.ndarray]:
        if not self.boxes:
            return {
                "label": decode_image(fields["label"].bytes_list.value[0], cv2.IMREAD_GRAYSCALE)
            }
        types = {"classes": np.int32, "difficult": bool, "crowd": bool}
        boxes = np.array(fields["boxes"].float_list.value, np.float32).reshape(-1, 4)
        areas = (
            np.array(fields["areas"].float_list.value, np.float32)
            if "areas" in fields
            else areas_of(boxes)
        )  # older ones have none
        flags = {key: np.array(fields[key].int64_list.value, dtype) for key, dtype in types.items()}
        return {"boxes": boxes, **flags, "areas": areas}

    @property
    def box_counts(self) -> np.ndarray | None:
        """Number of boxes of each image; None for label maps, and where the records are too old to
        tell.
        """
        counts = self._index.get("counts")
        return None if counts is None else counts[self._kept]

    @functools.cached_property
    def _source(self) -> tuple[Any, Callable[[bytes], Any]]:
        """TFDS's reader of records as bytes, and their parser."""
        # takes seconds, which runs without records need not spend
        import tensorflow_datasets as tfds
        from tensorflow_datasets.proto import tf_example_pb2

        builder: Any = tfds.builder_from_directory(self.directory)
        source = builder.as_data_source(
            self.split, deserialize_method=tfds.decode.DeserializeMethod.RAW_BYTES
        )
        return (
            source,
            tf_example_pb2.Example.FromString,  # pyright: ignore[reportAttributeAccessIssue]
        )

    @functools.cached_property
    def _index(self) -> dict[str, np.ndarray]:
        with np.load(os.path.join(self.directory, INDEX)) as index:
            keys = (
                "sizes",
                "names",
                "ends",
                "labels",
                "label_ends",
                "bounds",
                "fingerprints",
                "counts",
            )
            return {key: index[name] for key in keys if (name := f"{self.split}_{key}") in index}

    @functools.cached_property
    def _kept(self) -> Int64[np.ndarray, " n"]:
        return np.delete(np.arange(len(self._index["sizes"]), dtype=np.int64), self.left_out)


def folder(root: str, domain: str, boxes: bool = False) -> str:
    """Where the records of a domain lie.

    Args:
        root: data root, a folder or a URL such as `gs://bucket/data`.
        domain: its name.
        boxes: whether they hold boxes or label maps.
    """
    name, *condition = domain.split("/")
    config = "_".join([*condition, *(["boxes"] if boxes else [])])
    return "/".join([root.rstrip("/"), name, *([config] if config else []), VERSION])


def open_records(root: str, domain: str, *, train: bool, boxes: bool = False) -> Records | None:
    """Opens the records of a domain, if there are any.

    Args:
        root: data root, a folder or a URL such as `gs://bucket/data`.
        domain: its name.
        train: the images to train on, else those to judge on.
        boxes: whether to look for boxes or for label maps.

    Returns:
        The dataset, or None where the root holds no records of the domain.

    Raises:
        ValueError: records that are unfinished, of another version, without the split, damaged, or
            not jaxdg's.
    """
    directory = folder(root, domain, boxes)
    system, inner = filesystem(directory)
    if not system.exists(f"{inner}/{COMPLETE}"):
        if system.exists(f"{inner}/{UNFINISHED}"):
            raise ValueError(
                f"{directory} holds unfinished records; run `python -m jaxdg.data.prepare` again as"
                " before, which goes on where it stopped, or delete the folder"
            )
        parent = os.path.dirname(inner)
        siblings = (
            [os.path.basename(path) for path in system.ls(parent, detail=False)]
            if system.exists(parent)
            else []
        )
        others = [name for name in siblings if re.fullmatch(r"\d+\.\d+\.\d+", name)]
        if others:
            raise ValueError(
                f"{os.path.dirname(directory)} holds records of version {', '.join(others)}, this"
                f" jaxdg reads {VERSION}; delete them and prepare the dataset again"
            )
        return None
    if not system.exists(f"{inner}/{METADATA}"):
        raise ValueError(
            f"{directory} was not written by `python -m jaxdg.data.prepare`: it has no {METADATA};"
            " move it elsewhere"
        )
    metadata: Any = system.cat_file(f"{inner}/{METADATA}")
    split = "train" if train else "val"
    splits = json.loads(metadata)["splits"]
    if split not in splits:
        raise ValueError(
            f"{directory} has no split {split}, only {', '.join(splits)}; prepare it again where"
            f" the files of {split} are"
        )
    if not isinstance(system, LocalFileSystem):
        inner = _fetch(system, inner, directory, metadata, splits[split])
    return Records(inner, split)


def names_below(root: str) -> Iterator[tuple[list[str], list[str]]]:
    """The names of the images in each split of all finished records below a data root, and of their
    labels as far as they were noted.

    Args:
        root: a folder or a URL.
    """
    system, inner = filesystem(root)

    def folders(folder: str) -> list[str]:
        if isinstance(system, LocalFileSystem):  # its own listing looks at every file
            return [os.path.join(folder, name) for name in storage.subfolders(folder)]
        return [
            entry["name"]
            for entry in system.ls(folder, detail=True)
            if entry["type"] == "directory"
        ]

    for folder in folders(inner) if system.exists(inner) else []:
        for place in (folder, *folders(folder)):
            if not system.exists(f"{place}/{VERSION}/{COMPLETE}"):
                continue
            data: Any = system.cat_file(f"{place}/{VERSION}/{INDEX}")
            with np.load(io.BytesIO(data)) as stored:
                index = dict(stored)
            for split in (key.removesuffix("_names") for key in index if key.endswith("_names")):
                kinds = (("names", "ends"), ("labels", "label_ends"))
                pairs = [
                    (index[f"{split}_{a}"], index[f"{split}_{b}"])
                    for a, b in kinds
                    if f"{split}_{a}" in index
                ]
                names, *labels = (
                    [_text(text, ends, i) for i in range(len(ends))] for text, ends in pairs
                )
                yield names, labels[0] if labels else []


def _text(texts: UInt8[np.ndarray, " m"], ends: Integer[np.ndarray, " n"], i: int) -> str:
    """Text `i` of many that lie one behind another."""
    return texts[ends[i - 1] if i else 0 : ends[i]].tobytes().decode()


def verify(directory: str) -> list[str]:
    """Compares every shard with the digest taken when it was written.

    Args:
        directory: folder or URL of the records.

    Returns:
        What is wrong, one line a file.

    Raises:
        FileNotFoundError: there are no finished records.
    """
    system, inner = filesystem(directory)
    if not system.exists(f"{inner}/{COMPLETE}"):
        raise FileNotFoundError(
            f"{directory} holds no finished records; write them with `python -m jaxdg.data.prepare`"
        )
    files = json.loads(system.cat_file(f"{inner}/{METADATA}"))["files"]

    def check(name: str) -> str | None:
        if not system.exists(f"{inner}/{name}"):
            return f"{directory}/{name} is missing"
        same = digest(f"{directory}/{name}") == files[name][1]
        return (
            None
            if same
            else (
                f"{directory}/{name} is truncated or altered: its digest differs from when it was"
                " written"
            )
        )

    with ThreadPoolExecutor(THREADS) as pool:
        return [wrong for wrong in pool.map(check, sorted(files)) if wrong]


def decode_image(data: bytes, channels: int = cv2.IMREAD_COLOR_RGB) -> UInt8[np.ndarray, "h w *c"]:
    """The pixels of a picture as records hold it.

    Args:
        data: a PNG or JPEG file.
        channels: for OpenCV; RGB or grey.

    Raises:
        ValueError: the JPEG file is damaged; says how, not where.
    """
    if data.startswith(jpeg.START) and (pixels := jpeg.decode(data)) is not None:
        return pixels
    # Some files say which way is up; the stored pixels count, see `images.py`.
    return np.asarray(
        cv2.imdecode(np.frombuffer(data, np.uint8), channels | cv2.IMREAD_IGNORE_ORIENTATION),
        np.uint8,
    )


def filesystem(path: str) -> tuple[AbstractFileSystem, str]:
    """The file system of a local path or URL, and the path within it.

    Raises:
        ValueError: no package for this kind of URL is installed.
    """
    if "://" not in path:
        return LocalFileSystem(), os.path.abspath(path)
    try:
        return url_to_fs(path)
    except (ImportError, ValueError) as error:
        extra = {"gs": "gcs", "gcs": "gcs", "s3": "s3", "s3a": "s3"}.get(
            path.split("://")[0].lower()
        )
        remedy = (
            f'`pip install "jaxdg[{extra}]"`'
            if extra
            else "jaxdg has extras for gs:// (gcs) and s3:// (s3)"
        )
        raise ValueError(f"{path} cannot be opened: {error}; {remedy}") from error


def digest(path: str) -> str:
    """SHA-256 of a file, local or not."""
    system, inner = filesystem(path)
    opened: Any = system.open(inner, "rb")
    with opened as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def files_of(metadata: dict[str, Any], split: str) -> list[str]:
    """The index and the shards of a split, in order."""
    return [INDEX, *sorted(name for name in metadata["files"] if f"-{split}.array_record-" in name)]


def _fetch(
    system: AbstractFileSystem, inner: str, directory: str, metadata: bytes, split: str
) -> str:
    """Copies a split to the local disk unless it is there: under the digest of its metadata, which
    holds those of the shards.
    """
    local = cache.folder() / f"records-{hashlib.sha256(metadata).hexdigest()[:24]}"
    local.mkdir(parents=True, exist_ok=True)
    files = json.loads(metadata)["files"]
    small = [
        name for name in map(os.path.basename, system.ls(inner, detail=False)) if name not in files
    ]
    wanted = [
        name
        for name in [*files_of(json.loads(metadata), split), *small]
        if not (local / name).exists()
    ]

    def fetch(name: str) -> None:
        part = local / f".{name}.{uuid.uuid4().hex}.part"  # other processes may fetch the same
        system.get_file(f"{inner}/{name}", str(part))
        if name in files and digest(str(part)) != files[name][1]:
            part.unlink()
            raise ValueError(
                f"{directory}/{name} is truncated or altered: its digest differs from when it was"
                " written; upload it again"
            )
        os.replace(part, local / name)

    if wanted:
        gigabytes = sum(files[name][0] for name in wanted if name in files) / 1e9
        print(f"fetching {gigabytes:.2f} GB of {directory} to {local}", file=sys.stderr, flush=True)
    with ThreadPoolExecutor(THREADS) as pool:
        list(pool.map(fetch, wanted))
    return str(local)
