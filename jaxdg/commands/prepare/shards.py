"""Writes the shards of a split, each with a note that `metadata.finish` gathers."""

from collections.abc import Callable
import contextlib
import dataclasses
import json
import os
from pathlib import Path
import re
import tempfile
from typing import Any
import uuid

from array_record.python import array_record_module  # pyright: ignore[reportAttributeAccessIssue]
from fsspec.implementations.local import LocalFileSystem
import numpy as np
import tensorflow_datasets as tfds
from tensorflow_datasets.core import example_serializer

from jaxdg.commands.prepare.pixels import original_jpeg, png, resize_sample, resized
from jaxdg.data import records
from jaxdg.data.box_fields import areas_of
from jaxdg.data.datasets import Dataset, Files
from jaxdg.data.labels import LabelSet
from jaxdg.data.records import filesystem


def features(labels: LabelSet, boxes: bool) -> tfds.features.FeaturesDict:
    """TFDS's description of a record, with class names.

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


@dataclasses.dataclass
class ShardWriter:
    """Writes shard k of a split; a class, so that worker processes can import it by name."""

    dataset: Dataset
    root: str
    directory: str
    split: str
    bounds: list[int]
    resize: str | None
    boxes: bool

    def path(self, k: int) -> str:
        """The path of shard k."""
        name = f"{tfds_name(self.dataset.domain)}-{self.split}.array_record"
        return f"{self.directory}/{name}-{k:05d}-of-{len(self.bounds) - 1:05d}"

    def __call__(self, k: int) -> str:
        """Writes shard k unless it is complete; returns its file name."""
        path = self.path(k)
        if note_of(path) is None:
            note: dict[str, Any] = {"sizes": [], "names": [], "counts": []}
            note |= {"labels": self._labels(k), "fingerprints": self._fingerprints(k)}
            publish(path, lambda part: self._write(part, k, note))
            publish_json(f"{path}.json", note)
        return os.path.basename(path)

    def _labels(self, k: int) -> list[str]:
        """The label file of each image, which a skip list may name; "" where there is none."""
        if not isinstance(self.dataset, Files):
            return []
        paths = self.dataset.pairs.labels[self.bounds[k] : self.bounds[k + 1]]
        return [relative(path, self.root) for path in paths]

    def _fingerprints(self, k: int) -> list[int]:
        """The fingerprint of each image file; [] if none were taken."""
        fingerprints = getattr(getattr(self.dataset, "pairs", None), "fingerprints", None)
        if fingerprints is None:
            return []
        return fingerprints[self.bounds[k] : self.bounds[k + 1]].tolist()

    def _write(self, part: str, k: int, note: dict[str, Any]) -> None:
        kinds = features(self.dataset.labels, self.boxes)
        specs: Any = kinds.get_serialized_info()
        serializer = example_serializer.ExampleSerializer(specs)
        # Random access needs groups of one record.
        writer = array_record_module.ArrayRecordWriter(part, "group_size:1")
        for i in range(self.bounds[k], self.bounds[k + 1]):
            example = self._example(i)
            note["sizes"].append([example["height"], example["width"]])
            note["names"].append(example["name"])
            note["counts"].append(len(example.get("boxes", ())))
            record = serializer.get_tf_example(kinds.encode_example(example))
            # The fields have a fixed order, so that a shard's bytes do not depend on the process.
            writer.write(record.SerializeToString(deterministic=True))
        writer.close()
        note |= {"bytes": os.path.getsize(part), "sha256": records.digest(part)}

    def _example(self, i: int) -> dict[str, Any]:
        sample = self.dataset[i]
        name = self.dataset.name(i)
        old = sample["image"].shape[:2]
        new = resized(old, self.resize)
        image = None
        if new == old and isinstance(self.dataset, Files):
            image = original_jpeg(name, sample["image"])
        sample = resize_sample(sample, new)
        if self.boxes and "areas" not in sample:
            sample = {**sample, "areas": areas_of(sample["boxes"])}
        example = {
            **sample,
            "image": image or png(sample["image"]),
            "name": relative(name, self.root),
            "height": new[0],
            "width": new[1],
        }
        return example if self.boxes else {**example, "label": png(sample["label"])}


def tfds_name(domain: str) -> str:
    """A name for TFDS, which allows letters, digits and underscores."""
    return re.sub(r"\W", "_", domain.split("/")[0])


def relative(path: str, root: str) -> str:
    """A path below the data root, which is the same on every machine."""
    return path.removeprefix(os.path.normpath(root) + "/")


def note_of(path: str) -> dict[str, Any] | None:
    """The note of a shard; None if the shard is not complete."""
    system, inner = filesystem(path)
    try:
        note = json.loads(system.cat_file(f"{inner}.json"))
        return note if system.size(inner) == note["bytes"] else None
    except (FileNotFoundError, ValueError):
        return None


def publish(path: str, write: Callable[[str], Any]) -> None:
    """Lets `write` write a file, which appears under its name once it is complete."""
    system, inner = filesystem(path)
    local = isinstance(system, LocalFileSystem)
    folder, name = os.path.split(inner)
    folder = folder if local else tempfile.gettempdir()
    part = os.path.join(folder, f".{name}.{uuid.uuid4().hex}.part")
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


def publish_json(path: str, content: dict[str, Any]) -> None:
    """Writes a JSON file, which appears under its name once it is complete."""
    publish(path, lambda part: Path(part).write_text(json.dumps(content), encoding="utf-8"))
