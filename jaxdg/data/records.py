"""Records: a domain as ArrayRecord shards, which jaxdg and TFDS read.

`python -m jaxdg.data.prepare` writes them once. `ROOT/NAME/1.0.0/` (`ROOT/acdc/night/1.0.0/` for
`acdc/night`, `ROOT/cityscapes/boxes/1.0.0/` for boxes) has TFDS's layout, so that
`tfds.data_source("acdc/night", data_dir=ROOT, split="train")` reads it too. Beside TFDS's own
files, `metadata.json` holds classes, colours and the size and digest of every shard, `index.npz`
the names and sizes of the images. TensorFlow is never imported.

Shards are read from local disks. Those of `gs://..` and `s3://..` are fetched into `$JAXDG_CACHE`
(else `~/.cache/jaxdg`) when they are opened.
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
    """Labelled images of one split; items equal those of the files that the records were made of.

    Attributes:
        table: label file id to train id when the records were written, see `labels.id_table`; None
            for boxes.
        left_out: places of images of the split that do not count, ascending.
    """

    left_out: tuple[int, ...] = ()

    def __init__(self, directory: str, split: str):
        """Checks that the shards exist with the length that was written.

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
        colors = tuple((r, g, b) for r, g, b in metadata["colors"])
        self.labels = LabelSet(tuple(metadata["classes"]), colors)
        self.table = None
        if metadata["table"] is not None:
            self.table = id_table({int(i): train_id for i, train_id in metadata["table"].items()})
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
        # Each process opens the files by itself.
        opened = ("_source", "_index", "_places")
        return {key: value for key, value in self.__dict__.items() if key not in opened}

    def without(self, images: Sequence[int]) -> "Records":
        """The records without some images; order and samples of the others stay the same."""
        if not images:
            return self
        fewer = copy.copy(self)
        fewer.left_out = tuple(sorted({*self.left_out, *(int(self._places[i]) for i in images)}))
        return fewer

    def __len__(self) -> int:
        return len(self._places)

    def size(self, i: int) -> tuple[int, int]:
        """Height and width of image `i`, pixels."""
        h, w = self._index["sizes"][self._places[i]].tolist()
        return h, w

    def name(self, i: int) -> str:
        """Path of the file that image `i` was made of, below its data root."""
        return self._text("names", int(self._places[i]))

    def names(self) -> list[str]:
        """The names of all images."""
        return [self.name(i) for i in range(len(self))]

    def label_names(self) -> list[str]:
        """The names of all images' labels; none if there are no labels or they were not stored."""
        if "labels" not in self._index:
            return []
        return [self._text("labels", i) for i in self._places.tolist()]

    def _text(self, key: str, i: int) -> str:
        return _text(self._index[key], self._index["ends" if key == "names" else "label_ends"], i)

    @property
    def fingerprints(self) -> UInt64[np.ndarray, " n"] | None:
        """Fingerprints of the image files, see `index.fingerprint`; None if not stored."""
        taken = self._index.get("fingerprints")
        return None if taken is None else taken[self._places]

    def __getitem__(self, i: int) -> dict[str, np.ndarray]:
        fields = self._fields(i)
        try:
            image = decode_image(fields["image"].bytes_list.value[0])
        except ValueError as error:
            raise ValueError(
                f"{self.name(i)} in {self.directory}: {error}, and was so when the records were"
                " written; prepare them again from an intact file, or without it (data.skip)"
            ) from error
        return {"image": image, **self._truth(fields)}

    def truth(self, i: int) -> dict[str, np.ndarray]:
        """The fields of item `i` without the image, which is not decoded."""
        return self._truth(self._fields(i))

    def _fields(self, i: int) -> Any:
        source, parse = self._source
        i = int(self._places[i])
        try:
            # TFDS's own parsing would copy the pictures once more.
            return parse(source[i]).features.feature
        except RuntimeError as error:  # array_record raises it if a checksum is wrong
            number = int(np.searchsorted(self._index["bounds"], i, side="right"))
            shard = os.path.join(self.directory, self.shards[number])
            raise ValueError(
                f"{shard}: damaged ({error}); copy it again, or delete the folder and prepare it"
                " again"
            ) from error

    def _truth(self, fields: Any) -> dict[str, np.ndarray]:
        if not self.boxes:
            data = fields["label"].bytes_list.value[0]
            return {"label": decode_image(data, cv2.IMREAD_GRAYSCALE)}
        types = {"classes": np.int32, "difficult": bool, "crowd": bool}
        boxes = np.array(fields["boxes"].float_list.value, np.float32).reshape(-1, 4)
        areas = areas_of(boxes)
        if "areas" in fields:  # old records have none
            areas = np.array(fields["areas"].float_list.value, np.float32)
        flags = {key: np.array(fields[key].int64_list.value, dtype) for key, dtype in types.items()}
        return {"boxes": boxes, **flags, "areas": areas}

    @property
    def box_counts(self) -> np.ndarray | None:
        """Number of boxes of each image; None for label maps and for old records."""
        counts = self._index.get("counts")
        return None if counts is None else counts[self._places]

    @functools.cached_property
    def _source(self) -> tuple[Any, Callable[[bytes], Any]]:
        """TFDS's reader of records as bytes, and their parser."""
        # The import takes seconds, so only runs with records do it.
        import tensorflow_datasets as tfds
        from tensorflow_datasets.proto import tf_example_pb2

        builder: Any = tfds.builder_from_directory(self.directory)
        raw = tfds.decode.DeserializeMethod.RAW_BYTES
        source = builder.as_data_source(self.split, deserialize_method=raw)
        example: Any = tf_example_pb2
        return source, example.Example.FromString

    @functools.cached_property
    def _index(self) -> dict[str, np.ndarray]:
        keys = ("sizes", "names", "ends", "labels", "label_ends", "bounds")
        keys += ("fingerprints", "counts")
        with np.load(os.path.join(self.directory, INDEX)) as index:
            return {key: index[name] for key in keys if (name := f"{self.split}_{key}") in index}

    @functools.cached_property
    def _places(self) -> Int64[np.ndarray, " n"]:
        return np.delete(np.arange(len(self._index["sizes"]), dtype=np.int64), self.left_out)


def folder(root: str, domain: str, boxes: bool = False) -> str:
    """The folder of the records of a domain.

    Args:
        root: data root, a folder or a URL such as `gs://bucket/data`.
        domain: its name.
        boxes: whether they hold boxes or label maps.
    """
    name, *config = domain.split("/")
    if boxes:
        config.append("boxes")
    return "/".join([root.rstrip("/"), name, *(["_".join(config)] if config else []), VERSION])


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
        siblings = system.ls(parent, detail=False) if system.exists(parent) else []
        names = [os.path.basename(path) for path in siblings]
        if others := [name for name in names if re.fullmatch(r"\d+\.\d+\.\d+", name)]:
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
    """The names of the images, and known names of their labels, of all finished records.

    Each split below the data root gives one pair of lists.

    Args:
        root: a folder or a URL.
    """
    system, inner = filesystem(root)

    def folders(folder: str) -> list[str]:
        if isinstance(system, LocalFileSystem):  # its own listing reads the status of every file
            return [os.path.join(folder, name) for name in storage.subfolders(folder)]
        entries = system.ls(folder, detail=True)
        return [entry["name"] for entry in entries if entry["type"] == "directory"]

    for folder in folders(inner) if system.exists(inner) else []:
        for place in (folder, *folders(folder)):
            if not system.exists(f"{place}/{VERSION}/{COMPLETE}"):
                continue
            data: Any = system.cat_file(f"{place}/{VERSION}/{INDEX}")
            with np.load(io.BytesIO(data)) as stored:
                index = dict(stored)
            for split in (key.removesuffix("_names") for key in index if key.endswith("_names")):
                names = _texts(index[f"{split}_names"], index[f"{split}_ends"])
                labels = []
                if f"{split}_labels" in index:
                    labels = _texts(index[f"{split}_labels"], index[f"{split}_label_ends"])
                yield names, labels


def _texts(texts: UInt8[np.ndarray, " m"], ends: Integer[np.ndarray, " n"]) -> list[str]:
    return [_text(texts, ends, i) for i in range(len(ends))]


def _text(texts: UInt8[np.ndarray, " m"], ends: Integer[np.ndarray, " n"], i: int) -> str:
    """Text `i` of a sequence of joined texts."""
    return texts[ends[i - 1] if i else 0 : ends[i]].tobytes().decode()


def verify(directory: str) -> list[str]:
    """Compares every shard with the digest that was stored when it was written.

    Args:
        directory: folder or URL of the records.

    Returns:
        One line for each file that differs or is missing.

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
        if digest(f"{directory}/{name}") == files[name][1]:
            return None
        return (
            f"{directory}/{name} is truncated or altered: its digest differs from when it was"
            " written"
        )

    with ThreadPoolExecutor(THREADS) as pool:
        return [wrong for wrong in pool.map(check, sorted(files)) if wrong]


def decode_image(data: bytes, channels: int = cv2.IMREAD_COLOR_RGB) -> UInt8[np.ndarray, "h w *c"]:
    """The pixels of a picture in a record.

    Args:
        data: a PNG or JPEG file.
        channels: for OpenCV; RGB or grey.

    Raises:
        ValueError: the JPEG file is damaged; says how, not where.
    """
    if data.startswith(jpeg.START) and (pixels := jpeg.decode(data)) is not None:
        return pixels
    # The stored pixels count, whatever the orientation in the metadata; see `images.py`.
    flags = channels | cv2.IMREAD_IGNORE_ORIENTATION
    return np.asarray(cv2.imdecode(np.frombuffer(data, np.uint8), flags), np.uint8)


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
        scheme = path.split("://")[0].lower()
        extra = {"gs": "gcs", "gcs": "gcs", "s3": "s3", "s3a": "s3"}.get(scheme)
        remedy = "jaxdg has extras for gs:// (gcs) and s3:// (s3)"
        if extra:
            remedy = f'`pip install "jaxdg[{extra}]"`'
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
    """Copies a split to the local disk, unless it is there.

    The folder is named by the digest of the metadata, which holds the digests of the shards.
    """
    local = cache.folder() / f"records-{hashlib.sha256(metadata).hexdigest()[:24]}"
    local.mkdir(parents=True, exist_ok=True)
    files = json.loads(metadata)["files"]
    names = [os.path.basename(path) for path in system.ls(inner, detail=False)]
    small = [name for name in names if name not in files]
    wanted = [*files_of(json.loads(metadata), split), *small]
    wanted = [name for name in wanted if not (local / name).exists()]

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
