"""`jaxdg prepare`: writes the records of a domain, or what is missing of them.

TFDS's own builders write in one process, into a temporary folder that is lost if the run stops.
The shards are therefore written here, with TFDS's features, serialisation and metadata.
"""

from collections.abc import Callable, Mapping
import hashlib
import json
from typing import Any

import numpy as np

from jaxdg.commands import command_line as cli
from jaxdg.commands.prepare import beam_runner, metadata
from jaxdg.commands.prepare.pixels import resized
from jaxdg.commands.prepare.shards import ShardWriter, features, relative
from jaxdg.config.data import DataConfig
from jaxdg.data import published, records
from jaxdg.data.boxes import COUNTS, BoxFiles, open_box_files
from jaxdg.data.datasets import STREETS, Dataset
from jaxdg.data.domains import open_files
from jaxdg.data.workers import read_ahead

SHARD_PIXELS = 1 << 28  # of the images in a shard: some 300 MB
MAX_SHARDS = 256  # of a split; each costs every process that reads it an open file


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
    """Writes or verifies the records of domains; see the flags in `__main__`."""
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
        counts = ", ".join(f"{split} {len(dataset)}" for split, dataset in datasets.items())
        console.print(f"{domain}: {counts} images in {directory}")


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
        datasets: label maps or boxes to write as `train`, `val` or both; stored once where both
            have the same images.
        root: the data root; the names of the images are stored relative to it.
        out: folder or URL that becomes a data root.
        resize: `HEIGHTxWIDTH`, `short:N` or `long:N`, pixels; None keeps every image's size.
        processes: that read and write; 0 uses threads of this process.
        beam: options of Apache Beam, to run on it instead.
        shard_pixels: pixels of the images in a shard.
        report: receives a line about every shard.

    Returns:
        The folder with the records.

    Raises:
        ValueError: an image is damaged, or the folder holds records of other images or options.
    """
    first = next(iter(datasets.values()))
    boxes = "boxes" in first[0]
    directory = records.folder(out, domain, boxes)
    digests = {split: _image_digest(dataset, root) for split, dataset in datasets.items()}
    splits = {
        split: "train" if digest == digests.get("train") else split
        for split, digest in digests.items()
    }
    labels = first.labels
    table = getattr(first, "table", None)  # only label maps have one
    if table is not None:
        table = {i: int(table[i]) for i in np.flatnonzero(table >= 0).tolist()}
    writers = {}
    for split in sorted(set(splits.values())):
        dataset = datasets[split]
        sizes = np.array([resized(dataset.size(i), resize) for i in range(len(dataset))], np.int64)
        shards = min(MAX_SHARDS, len(dataset), -(-int(sizes.prod(1).sum()) // shard_pixels))
        bounds = [len(dataset) * k // shards for k in range(shards + 1)]
        writers[split] = ShardWriter(dataset, root, directory, split, bounds, resize, boxes)
    plan = {
        "domain": domain,
        "boxes": boxes,
        "classes": labels.names,
        "colors": labels.colors,
        "table": table,
        "resize": resize,
        "splits": splits,
        "images": {split: digests[split] for split in writers},
        "annotations": {split: _annotation_digest(datasets[split]) for split in writers},
        "bounds": {split: writer.bounds for split, writer in writers.items()},
    }
    plan = json.loads(json.dumps(plan))
    if metadata.is_complete(directory, plan):
        return directory
    if beam is None:
        for split, writer in writers.items():
            try:
                for name in read_ahead(writer, len(writer.bounds) - 1, processes):
                    report(f"{domain} {split}: {name}")
            except ChildProcessError as error:
                raise ChildProcessError(
                    "a process was killed, perhaps for lack of memory; run again with fewer"
                    " --processes"
                ) from error
    else:
        beam_runner.run(list(writers.values()), beam)
    metadata.finish(directory, plan, writers, features(labels, boxes))
    return directory


def _image_digest(dataset: Dataset, root: str) -> str:
    """A digest of the names and sizes of the images."""
    digest = hashlib.sha256()
    for i in range(len(dataset)):
        digest.update(json.dumps([relative(dataset.name(i), root), dataset.size(i)]).encode())
    return digest.hexdigest()


def _annotation_digest(dataset: Dataset) -> str | None:
    """A digest of the boxes; None for label maps, all of which would have to be decoded."""
    if not isinstance(dataset, BoxFiles) or dataset.box_counts is None:
        return None
    digest = hashlib.sha256()
    for i in range(len(dataset)):
        for key, array in sorted(dataset.boxes(i).items()):
            digest.update(key.encode() + array.tobytes())
    return digest.hexdigest()


def _splits(domain: str, boxes: bool) -> list[str]:
    """The splits that a domain has; some domains are for evaluation alone."""
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
