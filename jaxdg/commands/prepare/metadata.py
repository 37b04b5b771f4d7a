"""The files beside the shards: the plan while they are written, then the index and TFDS's metadata.

`dataset_info.json` is written last and makes the folder a dataset of records.
"""

from collections.abc import Mapping
import functools
import json
import os
import re
import shutil
import tempfile
from typing import Any

import numpy as np
import tensorflow_datasets as tfds
from tensorflow_datasets.core import dataset_info, naming
from tensorflow_datasets.core.splits import SplitDict

from jaxdg.commands.prepare.shards import ShardWriter, note_of, publish, publish_json, tfds_name
from jaxdg.data import records
from jaxdg.data.records import COMPLETE, INDEX, METADATA, UNFINISHED, VERSION, filesystem


def is_complete(directory: str, plan: dict[str, Any]) -> bool:
    """Whether the folder holds these records; if it holds none, stores the plan there.

    Raises:
        ValueError: the folder holds records of another plan.
    """
    system, inner = filesystem(directory)
    for marker, file in ((COMPLETE, METADATA), (UNFINISHED, UNFINISHED)):
        if not system.exists(f"{inner}/{marker}"):
            continue
        stored = {}
        if system.exists(f"{inner}/{file}"):
            stored = json.loads(system.cat_file(f"{inner}/{file}"))
        stored.setdefault("annotations", plan["annotations"])  # older records lack it
        if differing := [key for key in plan if stored.get(key) != plan[key]]:
            raise ValueError(
                f"{directory} holds records that differ in {', '.join(differing)}; delete the"
                " folder, write to another --out, or give the arguments that they were made with"
            )
        return marker == COMPLETE
    system.makedirs(inner, exist_ok=True)
    publish_json(f"{directory}/{UNFINISHED}", plan)
    return False


def finish(
    directory: str,
    plan: dict[str, Any],
    writers: Mapping[str, ShardWriter],
    kinds: tfds.features.FeaturesDict,
) -> None:
    """Writes the index and TFDS's metadata of complete shards, and deletes the shards' notes."""
    index: dict[str, np.ndarray] = {}
    files: dict[str, tuple[int, str]] = {}
    infos = []
    for split, writer in writers.items():
        paths = [writer.path(k) for k in range(len(writer.bounds) - 1)]
        notes = [note for note in map(note_of, paths) if note]
        if len(notes) < len(paths):
            raise ValueError(
                f"{len(paths) - len(notes)} of {len(paths)} shards in {directory} are not whole;"
                " run this command again"
            )
        for path, note in zip(paths, notes, strict=True):
            files[os.path.basename(path)] = (note["bytes"], note["sha256"])
        columns = _index(notes, writer.bounds, plan["boxes"])
        index |= {f"{split}_{column}": values for column, values in columns.items()}
        template = naming.ShardedFileTemplate(
            data_dir=tfds.core.Path(),
            dataset_name=tfds_name(plan["domain"]),
            split=split,
            filetype_suffix="array_record",
        )
        infos.append(
            tfds.core.SplitInfo(
                name=split,
                shard_lengths=np.diff(writer.bounds).tolist(),
                num_bytes=sum(note["bytes"] for note in notes),
                filename_template=template,
            )
        )
    with tempfile.TemporaryDirectory() as local:
        index_file = os.path.join(local, INDEX)
        np.savez(index_file, **index)  # pyright: ignore[reportArgumentType]
        files[INDEX] = (os.path.getsize(index_file), records.digest(index_file))
        _, *config = records.folder("", plan["domain"], plan["boxes"]).split("/")[1:-1]
        identity = dataset_info.DatasetIdentity(
            name=tfds_name(plan["domain"]),
            config_name="".join(config),
            version=tfds.core.Version(VERSION),
            data_dir=local,
            module_name="",
        )
        info = dataset_info.DatasetInfo(
            builder=identity,
            description=f"{plan['domain']}, written by python -m jaxdg.data.prepare",
            features=kinds,
            metadata=tfds.core.MetadataDict({**plan, "files": files}),
        )
        info.set_file_format("array_record")
        info.set_splits(SplitDict(infos))
        info.write_to_directory(local)
        for file in sorted(os.listdir(local), key=lambda file: file == COMPLETE):
            copy = functools.partial(shutil.copyfile, os.path.join(local, file))
            publish(f"{directory}/{file}", copy)
    system, inner = filesystem(directory)
    for path in system.ls(inner, detail=False):
        name = os.path.basename(path)
        if name == UNFINISHED or re.search(r"\.part$|array_record-.*\.json$", name):
            system.rm_file(path)


def _index(notes: list[dict[str, Any]], bounds: list[int], boxes: bool) -> dict[str, np.ndarray]:
    """The index of a split: a row for each image, taken from the notes of its shards."""

    def gathered(field: str) -> list[Any]:
        return [value for note in notes for value in note.get(field, ())]

    def texts(values: list[str]) -> tuple[np.ndarray, np.ndarray]:
        encoded = [value.encode() for value in values]
        return np.frombuffer(b"".join(encoded), np.uint8), np.cumsum(list(map(len, encoded)))

    index: dict[str, np.ndarray] = {}
    names = gathered("names")
    index["names"], index["ends"] = texts(names)
    index["sizes"] = np.array(gathered("sizes"), np.int32)
    index["bounds"] = np.array(bounds[1:])
    # Shards of older versions lack some of the fields below.
    labels = gathered("labels")
    if len(labels) == len(names):
        index["labels"], index["label_ends"] = texts(labels)
    fingerprints = gathered("fingerprints")
    if len(fingerprints) == len(names):
        index["fingerprints"] = np.array(fingerprints, np.uint64)
    if boxes and all("counts" in note for note in notes):
        index["counts"] = np.array(gathered("counts"), np.int32)
    return index
