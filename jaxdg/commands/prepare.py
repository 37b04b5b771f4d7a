"""Writes domains as records, which read several times faster than PNG files and are few large files
instead of many small ones.

python -m jaxdg.data.prepare --data_root data --out records gta5 acdc/night
python -m jaxdg.train --config configs/gta5_eva02.py --config.data.root=records --workdir runs/gta5

The labels are mapped at this point; without --resize the samples equal those of the files bit for
bit, in the same order. A run that was stopped goes on where it was when started again: a shard
appears under its name only when it is whole, and its bytes depend on the images and options alone,
whichever process writes it.

TFDS's own builders write in one process into a temporary folder that is lost with the run; so the
shards are written here, with TFDS's features, serialisation and metadata. JPEG files are stored as
they are. Any other picture is stored as a PNG of differences between rows, not deflated: the shards
are compressed by zstd, so that it takes as much room as a usual PNG and a third of the time to
read.
"""

from collections.abc import Callable, Mapping
import contextlib
import dataclasses
import functools
import hashlib
import io
import json
import os
from pathlib import Path
import re
import shlex
import shutil
import struct
import tempfile
from typing import Any
import uuid
import zlib

from absl import flags
from array_record.python import array_record_module  # pyright: ignore[reportAttributeAccessIssue]
import cv2
from fsspec.implementations.local import LocalFileSystem
import grain
from jaxtyping import UInt8
import numpy as np
from PIL import Image
import tensorflow_datasets as tfds
from tensorflow_datasets.core import dataset_info, example_serializer, naming
from tensorflow_datasets.core.splits import SplitDict

from jaxdg.commands import command_line as cli
from jaxdg.config.data import DataConfig
from jaxdg.data import jpeg, published, records, storage
from jaxdg.data.augment.transforms import move_boxes
from jaxdg.data.box_fields import areas_of
from jaxdg.data.boxes import COUNTS, BoxFiles, open_box_files
from jaxdg.data.datasets import STREETS, Dataset, Files
from jaxdg.data.domains import open_files
from jaxdg.data.labels import LabelSet
from jaxdg.data.records import COMPLETE, INDEX, METADATA, UNFINISHED, VERSION, filesystem
from jaxdg.data.workers import read_ahead

SHARD_PIXELS = 1 << 28  # of the images in a shard: some 300 MB
MOST_SHARDS = 256  # of a split; each costs every process that reads it an open file


def prepare(
    domain: str,
    datasets: Mapping[str, Dataset],
    *,
    root: str,
    out: str,
    resize: str | None = None,
    processes: int = 0,
    beam: str | None = None,
    shard_pixels: int = SHARD_PIXELS,
    report: Callable[[str], None] = lambda line: None,
) -> str:
    """Writes the records of a domain, or what is missing of them.

    Args:
        domain: its name.
        datasets: what to write as `train`, `val` or both, label maps or boxes; stored once where
            both are the same images.
        root: the data root; the names of the images are stored relative to it.
        out: folder or URL that becomes a data root.
        resize: `HEIGHTxWIDTH`, `short:N` or `long:N`, pixels; None keeps every image as it is.
        processes: that read and write; 0 uses threads of this process.
        beam: run on Apache Beam instead, with these options.
        shard_pixels: pixels of the images in a shard.
        report: receives a line about every shard.

    Returns:
        The folder with the records.

    Raises:
        ValueError: a damaged image; or the folder holds records of other images or options.
    """
    boxes = "boxes" in next(iter(datasets.values()))[0]
    directory = records.folder(out, domain, boxes)
    names = {split: _digest(dataset, root) for split, dataset in datasets.items()}
    splits = {split: "train" if names[split] == names.get("train") else split for split in datasets}
    first = next(iter(datasets.values()))
    labels = first.labels
    table = getattr(first, "table", None)  # label maps may be mapped, boxes are not
    writers = {}
    for split in sorted(set(splits.values())):
        dataset = datasets[split]
        sizes = np.array([resized(dataset.size(i), resize) for i in range(len(dataset))], np.int64)
        shards = min(MOST_SHARDS, len(dataset), -(-int(sizes.prod(1).sum()) // shard_pixels))
        bounds = [len(dataset) * k // shards for k in range(shards + 1)]
        writers[split] = _ShardWriter(dataset, root, directory, split, bounds, resize, boxes)
    plan = {
        "domain": domain,
        "boxes": boxes,
        "classes": labels.names,
        "colors": labels.colors,
        "table": (
            None
            if table is None
            else {i: int(table[i]) for i in np.flatnonzero(table >= 0).tolist()}
        ),
        "resize": resize,
        "splits": splits,
        "images": {split: names[split] for split in writers},
        "annotations": {split: _annotations(datasets[split]) for split in writers},
        "bounds": {split: writer.bounds for split, writer in writers.items()},
    }
    plan = json.loads(json.dumps(plan))
    if _is_complete(directory, plan):
        return directory
    if beam is None:
        for split, writer in writers.items():
            try:
                for name in read_ahead(
                    grain.MapDataset.range(len(writer.bounds) - 1).map(writer), processes
                ):
                    report(f"{domain} {split}: {name}")
            except ChildProcessError as error:
                raise ChildProcessError(
                    "a process was killed, perhaps for want of memory; run again with fewer"
                    " --processes"
                ) from error
    else:
        _run_on_beam(list(writers.values()), beam)
    _finish(directory, plan, writers, features(labels, boxes))
    return directory


def features(labels: LabelSet, boxes: bool) -> tfds.features.FeaturesDict:
    """What TFDS knows about a record; class names included.

    Args:
        labels: the classes.
        boxes: boxes or label maps.
    """
    names = list(labels.names)
    truth: dict[str, Any] = {
        "label": tfds.features.LabeledImage(labels=names, shape=(None, None, 1))
    }
    if boxes:
        truth = {
            "boxes": tfds.features.Tensor(shape=(None, 4), dtype=np.float32),  # x0 y0 x1 y1, pixels
            "classes": tfds.features.Sequence(tfds.features.ClassLabel(names=names)),
            "difficult": tfds.features.Sequence(np.bool_),
            "crowd": tfds.features.Sequence(np.bool_),
            "areas": tfds.features.Sequence(np.float32),  # square pixels of the object in a box
        }
    return tfds.features.FeaturesDict(
        {
            "image": tfds.features.Image(shape=(None, None, 3)),
            **truth,
            "name": tfds.features.Text(),
            "height": tfds.features.Scalar(np.int32),
            "width": tfds.features.Scalar(np.int32),
        }
    )


def resized(size: tuple[int, int], resize: str | None) -> tuple[int, int]:
    """Height and width that an image of a size is stored at.

    Args:
        size: height and width, pixels.
        resize: as for `prepare`.

    Raises:
        ValueError: `resize` is none of the forms.
    """
    if resize is None:
        return size
    if exact := re.fullmatch(r"([1-9]\d*)x([1-9]\d*)", resize):
        return int(exact[1]), int(exact[2])
    side = re.fullmatch(r"(short|long):([1-9]\d*)", resize)
    if not side:
        raise ValueError(
            f"--resize={resize} is not HEIGHTxWIDTH, short:N or long:N, in pixels, such as 720x1280"
            " or short:512"
        )
    factor = int(side[2]) / (min(size) if side[1] == "short" else max(size))
    return max(1, round(size[0] * factor)), max(1, round(size[1] * factor))


@dataclasses.dataclass
class _ShardWriter:
    """Writes shard k of a split; a class and not a closure, so that it reaches worker processes by
    name.
    """

    dataset: Dataset
    root: str
    directory: str
    split: str
    bounds: list[int]
    resize: str | None
    boxes: bool

    def path(self, k: int) -> str:
        return f"{self.directory}/{_tfds_name(self.dataset.domain)}-{self.split}.array_record-{k:05d}-of-{len(self.bounds) - 1:05d}"

    def __call__(self, k: int) -> str:
        path = self.path(k)
        if _note(path) is None:
            note: dict[str, Any] = {"sizes": [], "names": [], "counts": []}
            note |= {"labels": self._labels(k), "fingerprints": self._fingerprints(k)}
            _publish(path, lambda part: self._write(part, k, note))
            _publish(
                f"{path}.json",
                lambda part: Path(part).write_text(json.dumps(note), encoding="utf-8"),
            )
        return os.path.basename(path)

    def _labels(self, k: int) -> list[str]:
        """The label files of a shard's images, by which lists of what to leave out may name them;
        "" where there is none.
        """
        paths = (
            self.dataset.pairs.labels[self.bounds[k] : self.bounds[k + 1]]
            if isinstance(self.dataset, Files)
            else []
        )
        return [_relative(path, self.root) for path in paths]

    def _fingerprints(self, k: int) -> list[int]:
        """Of the files of a shard's images, if they were taken."""
        taken = getattr(getattr(self.dataset, "pairs", None), "fingerprints", None)
        return [] if taken is None else taken[self.bounds[k] : self.bounds[k + 1]].tolist()

    def _write(self, part: str, k: int, note: dict[str, Any]) -> None:
        kinds = features(self.dataset.labels, self.boxes)
        specs: Any = kinds.get_serialized_info()
        serializer = example_serializer.ExampleSerializer(specs)
        writer = array_record_module.ArrayRecordWriter(
            part, "group_size:1"
        )  # what random access needs; compresses by zstd
        for i in range(self.bounds[k], self.bounds[k + 1]):
            example = self._example(i)
            note["sizes"].append([example["height"], example["width"]])
            note["names"].append(example["name"])
            note["counts"].append(len(example.get("boxes", ())))
            # Fields in a fixed order: the bytes of a shard must not depend on the process.
            writer.write(
                serializer.get_tf_example(kinds.encode_example(example)).SerializeToString(
                    deterministic=True
                )
            )
        writer.close()
        note |= {"bytes": os.path.getsize(part), "sha256": records.digest(part)}

    def _example(self, i: int) -> dict[str, Any]:
        sample = self.dataset[i]
        old = sample["image"].shape[:2]
        new = resized(old, self.resize)
        image = (
            _jpeg(self.dataset.name(i), sample["image"])
            if new == old and isinstance(self.dataset, Files)
            else None
        )
        sample = resize_sample(sample, new)
        name = _relative(self.dataset.name(i), self.root)
        if self.boxes and "areas" not in sample:
            sample = {**sample, "areas": areas_of(sample["boxes"])}
        example = {
            **sample,
            "image": image or png(sample["image"]),
            "name": name,
            "height": new[0],
            "width": new[1],
        }
        return example if self.boxes else {**example, "label": png(sample["label"])}


def resize_sample(sample: dict[str, np.ndarray], size: tuple[int, int]) -> dict[str, np.ndarray]:
    """Resizes an image (bilinear, as mmsegmentation does) and what is known about it.

    Args:
        sample: of a `Dataset`.
        size: height and width, pixels.

    Returns:
        The same fields; a label is that of the pixel which holds the centre of the new one, as in
        `jaxdg.data.transforms`.
    """
    h, w = sample["image"].shape[:2]
    if size == (h, w):
        return sample
    result = {
        "image": np.asarray(
            cv2.resize(sample["image"], size[::-1], interpolation=cv2.INTER_LINEAR), np.uint8
        )
    }
    if "label" in sample:
        rows, columns = (
            (2 * np.arange(new) + 1) * old // (2 * new)
            for old, new in zip((h, w), size, strict=True)
        )
        result["label"] = sample["label"].take(rows, 0).take(columns, 1)
    if "boxes" in sample:
        result |= move_boxes(sample, np.array([[size[1] / w, 0, 0], [0, size[0] / h, 0]]), size)
    return result


def png(pixels: UInt8[np.ndarray, "h w *c"]) -> bytes:
    """A PNG file (ISO/IEC 15948) whose rows are differences from the row above and are not
    deflated.

    Args:
        pixels: RGB [h, w, 3] or grey [h, w].
    """
    h, w = pixels.shape[:2]
    rows = pixels.reshape(h, -1)
    lines = np.empty((h, 1 + rows.shape[1]), np.uint8)
    lines[:, 0] = 2  # the filter "up"
    lines[0, 1:] = rows[0]
    np.subtract(rows[1:], rows[:-1], out=lines[1:, 1:])
    header = struct.pack(">IIBBBBB", w, h, 8, 2 if pixels.ndim == 3 else 0, 0, 0, 0)
    chunks = [(b"IHDR", header), (b"IDAT", zlib.compress(lines.tobytes(), 0)), (b"IEND", b"")]
    framed = (
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        for kind, data in chunks
    )
    return b"\x89PNG\r\n\x1a\n" + b"".join(framed)


def _jpeg(path: str, pixels: UInt8[np.ndarray, "h w 3"]) -> bytes | None:
    """The file without what follows its end, if it is an RGB JPEG that the readers of records
    decode to the same pixels.
    """
    data = storage.read(path)
    if not data.startswith(jpeg.START):
        return None
    data = data if data.endswith(jpeg.END) else data[: jpeg.end(data)]
    is_rgb = Image.open(io.BytesIO(data)).mode == "RGB"
    return data if is_rgb and np.array_equal(records.decode_image(data), pixels) else None


def _tfds_name(domain: str) -> str:
    """TFDS takes letters, digits and underscores."""
    return re.sub(r"\W", "_", domain.split("/")[0])


def _relative(path: str, root: str) -> str:
    """A name that means the same on another machine."""
    return path.removeprefix(os.path.normpath(root) + "/")


def _digest(dataset: Dataset, root: str) -> str:
    """Tells one list of images from another."""
    digest = hashlib.sha256()
    for i in range(len(dataset)):
        digest.update(json.dumps([_relative(dataset.name(i), root), dataset.size(i)]).encode())
    return digest.hexdigest()


def _annotations(dataset: Dataset) -> str | None:
    """Tells boxes from corrected ones; None where only reading the label images would."""
    if not isinstance(dataset, BoxFiles) or dataset.box_counts is None:
        return None
    digest = hashlib.sha256()
    for i in range(len(dataset)):
        for key, array in sorted(dataset.boxes(i).items()):
            digest.update(key.encode() + array.tobytes())
    return digest.hexdigest()


def _note(path: str) -> dict[str, Any] | None:
    """What was noted of a shard when it was written, if it is whole."""
    system, inner = filesystem(path)
    try:
        note = json.loads(system.cat_file(f"{inner}.json"))
        return note if system.size(inner) == note["bytes"] else None
    except (FileNotFoundError, ValueError):
        return None


def _is_complete(directory: str, plan: dict[str, Any]) -> bool:
    """Whether the folder holds these records; if it holds none, notes that it will."""
    system, inner = filesystem(directory)
    for name, found in ((COMPLETE, METADATA), (UNFINISHED, UNFINISHED)):
        if not system.exists(f"{inner}/{name}"):
            continue
        metadata = (
            json.loads(system.cat_file(f"{inner}/{found}"))
            if system.exists(f"{inner}/{found}")
            else {}
        )
        older = {"annotations": plan["annotations"]}  # as what was not noted when they were written
        if differing := [key for key in plan if (older | metadata).get(key) != plan[key]]:
            raise ValueError(
                f"{directory} holds records that differ in {', '.join(differing)}; delete the"
                " folder, write to another --out, or give the arguments that they were made with"
            )
        return name == COMPLETE
    system.makedirs(inner, exist_ok=True)
    _publish(
        f"{directory}/{UNFINISHED}",
        lambda part: Path(part).write_text(json.dumps(plan), encoding="utf-8"),
    )
    return False


def _finish(
    directory: str,
    plan: dict[str, Any],
    writers: Mapping[str, _ShardWriter],
    kinds: tfds.features.FeaturesDict,
) -> None:
    """Writes the index and TFDS's metadata of shards that are all there; `dataset_info.json` comes
    last and makes them records.
    """
    system, inner = filesystem(directory)
    index: dict[str, np.ndarray] = {}
    files: dict[str, tuple[int, str]] = {}
    infos = []
    for split, writer in writers.items():
        paths = [writer.path(k) for k in range(len(writer.bounds) - 1)]
        notes = [note for note in map(_note, paths) if note]
        if len(notes) < len(paths):
            raise ValueError(
                f"{len(paths) - len(notes)} of {len(paths)} shards in {directory} are not whole;"
                " run this command again"
            )
        files |= {
            os.path.basename(path): (note["bytes"], note["sha256"])
            for path, note in zip(paths, notes, strict=True)
        }
        names = [name.encode() for note in notes for name in note["names"]]
        index[f"{split}_names"] = np.frombuffer(b"".join(names), np.uint8)
        index[f"{split}_ends"] = np.cumsum([len(name) for name in names])
        index[f"{split}_sizes"] = np.array(
            [size for note in notes for size in note["sizes"]], np.int32
        )
        index[f"{split}_bounds"] = np.array(writer.bounds[1:])
        labels = [label.encode() for note in notes for label in note.get("labels", ())]
        if len(labels) == len(names):  # not so if a shard was written before they were noted
            index[f"{split}_labels"] = np.frombuffer(b"".join(labels), np.uint8)
            index[f"{split}_label_ends"] = np.cumsum([len(label) for label in labels])
        fingerprints = [mark for note in notes for mark in note.get("fingerprints", ())]
        if len(fingerprints) == len(names):  # not so if a shard was written before they were noted
            index[f"{split}_fingerprints"] = np.array(fingerprints, np.uint64)
        if plan["boxes"] and all("counts" in note for note in notes):
            index[f"{split}_counts"] = np.array(
                [count for note in notes for count in note["counts"]], np.int32
            )
        infos.append(
            tfds.core.SplitInfo(
                name=split,
                shard_lengths=np.diff(writer.bounds).tolist(),
                num_bytes=sum(note["bytes"] for note in notes),
                filename_template=naming.ShardedFileTemplate(
                    data_dir=tfds.core.Path(),
                    dataset_name=_tfds_name(plan["domain"]),
                    split=split,
                    filetype_suffix="array_record",
                ),
            )
        )
    with tempfile.TemporaryDirectory() as local:
        np.savez(os.path.join(local, INDEX), **index)  # pyright: ignore[reportArgumentType]
        files[INDEX] = (
            os.path.getsize(os.path.join(local, INDEX)),
            records.digest(os.path.join(local, INDEX)),
        )
        _, *config = records.folder("", plan["domain"], plan["boxes"]).split("/")[1:-1]
        info = dataset_info.DatasetInfo(
            builder=dataset_info.DatasetIdentity(
                name=_tfds_name(plan["domain"]),
                config_name="".join(config),
                version=tfds.core.Version(VERSION),
                data_dir=local,
                module_name="",
            ),
            description=f"{plan['domain']}, written by python -m jaxdg.data.prepare",
            features=kinds,
            metadata=tfds.core.MetadataDict({**plan, "files": files}),
        )
        info.set_file_format("array_record")
        info.set_splits(SplitDict(infos))
        info.write_to_directory(local)
        for file in sorted(os.listdir(local), key=lambda file: file == COMPLETE):
            _publish(
                f"{directory}/{file}", functools.partial(shutil.copyfile, os.path.join(local, file))
            )
    for path in system.ls(inner, detail=False):
        name = os.path.basename(path)
        if (
            name.endswith(".part")
            or name == UNFINISHED
            or re.search(r"array_record-.*\.json$", name)
        ):
            system.rm_file(path)


def _publish(path: str, write: Callable[[str], Any]) -> None:
    """Has a file written so that it appears under its name only when it is whole."""
    system, inner = filesystem(path)
    local = isinstance(system, LocalFileSystem)
    folder, name = os.path.split(inner)
    part = os.path.join(
        folder if local else tempfile.gettempdir(), f".{name}.{uuid.uuid4().hex}.part"
    )
    try:
        write(part)
        if local:
            os.replace(part, inner)
        else:
            system.put_file(part, inner)
    except RuntimeError as error:  # array_record's, such as a full disk
        raise OSError(f"{path} cannot be written: {error}") from error
    finally:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(part)


def _run_on_beam(writers: list[_ShardWriter], options: str) -> None:
    """Writes the shards on Apache Beam; its workers must reach the data root and the records by the
    same paths.
    """
    try:
        import apache_beam as beam  # pyright: ignore[reportMissingImports]
        from apache_beam.options.pipeline_options import (  # pyright: ignore[reportMissingImports]
            PipelineOptions,
        )
    except ImportError as error:
        raise ValueError(
            '--beam needs Apache Beam; `pip install "jaxdg[beam]"`, or leave the flag out'
        ) from error
    with beam.Pipeline(options=PipelineOptions(shlex.split(options))) as pipeline:
        for writer in writers:
            shards = pipeline | f"{writer.split} shards" >> beam.Create(
                range(len(writer.bounds) - 1)
            )
            _ = (
                shards
                | f"{writer.split} spread" >> beam.Reshuffle()
                | f"{writer.split} write" >> beam.Map(writer)
            )


def main(
    domains: list[str],
    *,
    root: str,
    out: str,
    splits: list[str] | None,
    boxes: bool,
    verify: bool,
    data: DataConfig,
    **options: Any,
) -> None:
    """The command; see the flags below."""
    console = cli.console()
    if not domains:
        raise ValueError("name the datasets to write, such as gta5 or acdc/night")
    for domain in domains:
        if domain in STREETS:
            raise ValueError(f"{domain} is generated anew in every run and needs no records")
        if verify:
            directory = records.folder(out, domain, boxes)
            if wrong := records.verify(directory):
                raise ValueError(
                    "; ".join(wrong)
                    + "; copy these files again, or delete the folder and prepare it again"
                )
            console.print(f"{domain}: {directory} is whole")
            continue
        datasets = {
            split: _open(domain, split, root, boxes, data)
            for split in splits or _splits(domain, boxes)
        }
        directory = prepare(domain, datasets, root=root, out=out, report=console.print, **options)
        console.print(
            f"{domain}:"
            f" {', '.join(f'{split} {len(dataset)}' for split, dataset in datasets.items())} images"
            f" in {directory}"
        )


def _splits(domain: str, boxes: bool) -> list[str]:
    """The splits that a domain has; some are for evaluation alone."""
    dataset = published.find(domain)

    def has(train: bool) -> bool:
        if boxes:
            return (domain, train) in COUNTS or (domain, False) not in COUNTS
        try:
            return dataset is None or bool(dataset.select(domain, train))
        except ValueError:
            return False

    return [split for split in ("train", "val") if has(split == "train")]


def _open(domain: str, split: str, root: str, boxes: bool, data: DataConfig) -> Dataset:
    options: dict[str, Any] = {"root": root, "train": split == "train", "skip": data.skip}
    if boxes:
        return open_box_files(domain, **options, own=data.boxes)
    return open_files(domain, **options, folder=data.folder, mapillary_labels=data.mapillary_labels)


if __name__ == "__main__":
    from jaxdg.commands import (
        prepare as this,
    )  # by this name worker processes find what they run, not by __main__

    _ROOT = cli.define_path(
        "data_root", "Folder of the datasets; $JAXDG_DATA, else `data`, if left out."
    )
    _OUT = cli.define_path(
        "out", "Folder or URL that becomes a data root of records.", required=True, urls=True
    )
    _SPLITS = flags.DEFINE_multi_enum(
        "split", None, ["train", "val"], "What to write; all that the dataset has if left out."
    )
    _RESIZE = flags.DEFINE_string(
        "resize",
        None,
        "HEIGHTxWIDTH, short:N or long:N in pixels; images keep their sizes if left out.",
    )
    _BOXES = flags.DEFINE_bool("boxes", False, "Boxes instead of label maps.")
    _PROCESSES = flags.DEFINE_integer(
        "processes", os.cpu_count(), "Processes that read and write; 0 for threads.", lower_bound=0
    )
    _BEAM = flags.DEFINE_string(
        "beam",
        None,
        'Run on Apache Beam with these options, such as "--runner=DataflowRunner --project=P".',
    )
    _VERIFY = flags.DEFINE_bool(
        "verify",
        False,
        "Compare the records in --out with the digests taken when they were written.",
    )
    _CONFIG = (
        cli.define_config()
    )  # for data.folder, data.boxes, data.skip and data.mapillary_labels
    flags.declare_key_flag("config")
    cli.run(
        lambda arguments: this.main(
            arguments[1:],
            root=_ROOT.value or DataConfig().root,
            out=_OUT.value,
            splits=_SPLITS.value,
            boxes=_BOXES.value,
            verify=_VERIFY.value,
            data=_CONFIG.value.data if _CONFIG.value else DataConfig(),
            resize=_RESIZE.value,
            processes=_PROCESSES.value,
            beam=_BEAM.value,
        )
    )
