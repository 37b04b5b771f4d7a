"""Training crops that one core reads a second: jaxdg from files and from records, beside a PyTorch
DataLoader in mmsegmentation's manner.

    python scripts/data_throughput.py --data_root DATA [--pairs 60] [--rounds 3]
        [--memory_batches 2000]

The data are 1914x1052 PNG pairs in GTA5's layout, in a temporary folder: CamVid's photographs and
labels below the data root, enlarged, with the noise of a camera. All make the crops of VLTSeg's
GTA5 recipe: decode, resize to 1280x720, random 512x512 crop in which no class covers 75 %, flip.
The loaders have the same one core in turns, and rates are also given by CPU time, which other work
disturbs less.
"""

import argparse
from collections.abc import Callable, Iterator
import functools
import io
import itertools
import multiprocessing
import os
from pathlib import Path
import tempfile
import time
from typing import Any

import cv2
import numpy as np
from PIL import Image

from jaxdg.commands.prepare import prepare
from jaxdg.data.augment.transforms import Augmentation
from jaxdg.data.datasets import Dataset, StreetsOptions
from jaxdg.data.domains import open_domain
from jaxdg.data.labels import CITYSCAPES_IDS, IGNORE
from jaxdg.data.pipeline import train_batches
from jaxdg.data.samplers import make_sampler

H = 1052
W = 1914
BATCH = 8
NO_OPTIONS: dict[str, Any] = {"streets": StreetsOptions(), "folder": None}
RECIPE = Augmentation(crop=(512, 512), resize=(720, 1280), max_class_share=0.75)
CAMVID_TO_CITYSCAPES = (23, 11, 17, 7, 8, 21, 20, 13, 26, 24, 33)  # ids of CamVid's 11 classes


def write_pairs(data_root: Path, root: Path, count: int) -> None:
    """Enlarged CamVid photographs with noise as `root/gta5`, their labels as palette images of
    Cityscapes ids.
    """
    rng = np.random.default_rng(0)
    camvid = open_domain("camvid", root=str(data_root), train=True, **NO_OPTIONS)
    ids = np.zeros(256, np.uint8)
    ids[: len(CAMVID_TO_CITYSCAPES)] = CAMVID_TO_CITYSCAPES
    for kind in ("images", "labels"):
        (root / "gta5" / kind).mkdir(parents=True)
    for i in range(count):
        sample = camvid[i * len(camvid) // count]
        image = cv2.resize(sample["image"], (W, H), interpolation=cv2.INTER_CUBIC)
        image = np.clip(image + rng.normal(0, 3, image.shape).round(), 0, 255).astype(np.uint8)
        label = Image.fromarray(
            ids[
                np.asarray(
                    cv2.resize(sample["label"], (W, H), interpolation=cv2.INTER_NEAREST), np.uint8
                )
            ]
        )
        label.putpalette(rng.integers(0, 256, 768).astype(np.uint8).tobytes())
        Image.fromarray(image).save(root / "gta5" / "images" / f"{i + 1:05d}.png")
        label.save(root / "gta5" / "labels" / f"{i + 1:05d}.png")


def jaxdg_batches(
    dataset: Dataset, batch_size: int = BATCH, workers: int = 0
) -> Iterator[dict[str, np.ndarray]]:
    """Endless training batches of jaxdg."""
    sampler = make_sampler(dataset, seed=0)
    return train_batches(
        dataset,
        sampler,
        RECIPE,
        seed=0,
        batch_size=batch_size,
        start=0,
        stop=10**6,
        workers=workers,
    )


def torch_batches(root: Path) -> Iterator[Any]:
    """Endless batches of a PyTorch DataLoader that follows mmsegmentation's pipeline."""
    import torch  # pyright: ignore[reportMissingImports]

    torch.set_num_threads(1)
    table = np.full(256, IGNORE, np.uint8)
    table[list(CITYSCAPES_IDS)] = list(CITYSCAPES_IDS.values())
    crop_h, crop_w = RECIPE.crop
    assert RECIPE.resize is not None
    size = RECIPE.resize[::-1]

    class Pairs(torch.utils.data.Dataset):
        def __init__(self):
            self.images = sorted((root / "gta5" / "images").iterdir())

        def __len__(self) -> int:
            return len(self.images)

        def __getitem__(self, i: int):
            image: Any = cv2.imdecode(
                np.frombuffer(self.images[i].read_bytes(), np.uint8), cv2.IMREAD_COLOR
            )
            label = np.array(
                Image.open(
                    io.BytesIO((root / "gta5" / "labels" / self.images[i].name).read_bytes())
                )
            )
            image = cv2.resize(
                cv2.cvtColor(image, cv2.COLOR_BGR2RGB), size, interpolation=cv2.INTER_LINEAR
            )
            label = cv2.resize(table[label], size, interpolation=cv2.INTER_NEAREST)
            for tries in range(11):
                y = np.random.randint(image.shape[0] - crop_h + 1)  # noqa: NPY002
                x = np.random.randint(image.shape[1] - crop_w + 1)  # noqa: NPY002
                ids, counts = np.unique(label[y : y + crop_h, x : x + crop_w], return_counts=True)
                counts = counts[ids != IGNORE]
                if tries == 10 or (
                    len(counts) > 1 and counts.max() / counts.sum() < RECIPE.max_class_share
                ):
                    break
            image = image[y : y + crop_h, x : x + crop_w]
            label = label[y : y + crop_h, x : x + crop_w]
            if np.random.rand() < RECIPE.flip:  # noqa: NPY002
                image = image[:, ::-1]
                label = label[:, ::-1]
            chw = np.ascontiguousarray(image.transpose(2, 0, 1))
            return torch.from_numpy(chw), torch.from_numpy(label.astype(np.int64))

    while True:
        yield from torch.utils.data.DataLoader(Pairs(), BATCH, shuffle=True, drop_last=True)


def rates(
    loaders: dict[str, Callable[[], Iterator[Any]]], rounds: int, batches: int
) -> dict[str, tuple[float, float]]:
    """Images a second of wall time and of CPU time, the medians over rounds in which the loaders
    take turns.
    """
    wall = {name: [] for name in loaders}
    cpu = {name: [] for name in loaders}
    for _ in range(rounds):
        for name, make in loaders.items():
            iterator: Any = make()  # nothing is read ahead while others are measured
            next(iterator)
            began = time.perf_counter()
            used = time.process_time()
            for _ in range(batches):
                next(iterator)
            wall[name].append(batches * BATCH / (time.perf_counter() - began))
            cpu[name].append(batches * BATCH / (time.process_time() - used))
            iterator.close()
    return {name: (float(np.median(wall[name])), float(np.median(cpu[name]))) for name in loaders}


def resident(pid: int) -> float:
    """Resident memory of a process, MB."""
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1e6


def main():
    """Reads the command line, measures and prints."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--data_root",
        type=Path,
        default=Path(os.environ.get("JAXDG_DATA", "data")),
        help="folder that holds camvid",
    )
    parser.add_argument("--pairs", type=int, default=60, help="default 60")
    parser.add_argument("--rounds", type=int, default=3, help="turns of every loader; default 3")
    parser.add_argument(
        "--batches", type=int, default=10, help=f"of {BATCH} images in a turn; default 10"
    )
    parser.add_argument(
        "--memory_batches",
        type=int,
        default=0,
        help="then reads so many with one worker and prints memory; default 0",
    )
    args = parser.parse_args()
    cv2.setNumThreads(1)
    with tempfile.TemporaryDirectory() as folder:
        os.environ["JAXDG_CACHE"] = f"{folder}/cache"
        root = Path(folder, "files")
        write_pairs(args.data_root, root, args.pairs)
        files = open_domain("gta5", root=str(root), train=True, **NO_OPTIONS)
        datasets = {"files": files}
        for name, resize in (("records", None), ("records resized when written", "720x1280")):
            prepare("gta5", {"train": files}, root=str(root), out=f"{folder}/{name}", resize=resize)
            datasets[name] = open_domain("gta5", root=f"{folder}/{name}", train=True, **NO_OPTIONS)

        def megabytes(path):
            return (
                sum(file.stat().st_size for file in Path(folder, path).rglob("*") if file.is_file())
                / 1e6
            )

        if hasattr(os, "sched_setaffinity"):
            os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
        loaders: dict[str, Callable[[], Iterator[Any]]] = {
            "PyTorch DataLoader, files": functools.partial(torch_batches, root)
        }
        loaders |= {
            f"jaxdg, {name}": functools.partial(jaxdg_batches, dataset)
            for name, dataset in datasets.items()
        }
        measured = rates(loaders, args.rounds, args.batches)
        reference = measured["PyTorch DataLoader, files"][1]
        print(
            f"{args.pairs} pairs of {W}x{H}; load average {os.getloadavg()[0]:.1f}; images a second"
            " of one core"
        )
        for name, (wall, cpu) in measured.items():
            print(
                f"{name:40} {wall:6.1f} by the clock, {cpu:6.1f} by CPU time, {cpu / reference:.2f}"
                " times PyTorch"
            )
        print("  ".join(f"{name} {megabytes(name):.0f} MB" for name in datasets))
        if args.memory_batches:
            print_memory(files, args.memory_batches)


def print_memory(dataset: Dataset, batches: int) -> None:
    """Reads batches of two images with one worker process and prints the resident memory of both
    processes ten times on the way.
    """
    iterator: Any = jaxdg_batches(dataset, batch_size=2, workers=1)
    for i, _ in enumerate(itertools.islice(iterator, batches), 1):
        if i % max(1, batches // 10) == 0:
            worker = sum(
                resident(child.pid) for child in multiprocessing.active_children() if child.pid
            )
            print(
                f"after {i} batches: main {resident(os.getpid()):.0f} MB, worker {worker:.0f} MB",
                flush=True,
            )
    iterator.close()


if __name__ == "__main__":
    main()
