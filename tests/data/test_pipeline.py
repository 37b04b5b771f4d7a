"""Batches: the same whatever reads them, every example once an epoch, and processes that end."""

import dataclasses
import multiprocessing
import os
from pathlib import Path
import signal
import subprocess
import sys
import textwrap
import time

import numpy as np
from PIL import Image
import pytest

from jaxdg.data.augment.transforms import PAD_COLOR, Augmentation
from jaxdg.data.datasets import Dataset, FolderOptions, Mixture, StreetsOptions
from jaxdg.data.domains import open_domain
from jaxdg.data.labels import CITYSCAPES, LabelSet
from jaxdg.data.pipeline import batch_files, eval_batches, train_batches
from jaxdg.data.samplers import make_sampler

TRAIN = {"seed": 3, "batch_size": 4, "crop": (12, 16), "scale": (0.5, 2.0), "flip": 0.5}
AS_IS = {"crop": (12, 16), "scale": (1.0, 1.0), "flip": 0.0}
AUGMENTATION = {field.name for field in dataclasses.fields(Augmentation)}


def batches(dataset: Dataset, *, seed: int, **options):
    """Training batches of every image once an epoch."""
    augmentation = Augmentation(
        **{key: value for key, value in options.items() if key in AUGMENTATION}
    )
    rest = {key: value for key, value in options.items() if key not in AUGMENTATION}
    return train_batches(dataset, make_sampler(dataset, seed=seed), augmentation, seed=seed, **rest)


@dataclasses.dataclass
class Numbered:
    """Example i is an image of the number i; sizes cycle through `sizes`."""

    count: int = 10
    sizes: tuple[tuple[int, int], ...] = ((12, 16),)
    domain: str = "numbered"
    labels: LabelSet = CITYSCAPES
    pixels: np.ndarray | None = None

    def __len__(self) -> int:
        return self.count

    def size(self, i: int) -> tuple[int, int]:
        return self.sizes[i % len(self.sizes)]

    def name(self, i: int) -> str:
        return f"numbered/{i}"

    def __getitem__(self, i: int) -> dict[str, np.ndarray]:
        h, w = self.size(i)
        image = np.full((h, w, 3), i, np.uint8) if self.pixels is None else self.pixels
        return {"image": image, "label": np.full((h, w), i, np.uint8)}


class Boxed(Numbered):
    """Image i has i boxes, of class i."""

    def __getitem__(self, i: int) -> dict[str, np.ndarray]:
        boxes = np.array([[2, 1, 3 + j, 9] for j in range(i)], np.float32).reshape(i, 4)
        classes = np.full(i, i, np.int32)
        difficult = np.arange(i) % 2 == 0
        return {
            "image": super().__getitem__(i)["image"],
            "boxes": boxes,
            "classes": classes,
            "difficult": difficult,
            "crowd": ~difficult,
        }


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Six noisy images of 20 x 24 pixels with noisy labels, as a dataset of files."""
    monkeypatch.setenv("JAXDG_CACHE", str(tmp_path / "cache"))
    rng = np.random.default_rng(0)
    for i in range(6):
        for kind, array in (
            ("images", rng.integers(0, 256, (20, 24, 3))),
            ("labels", rng.integers(0, 19, (20, 24))),
        ):
            path = tmp_path / kind / "town" / f"{i}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(array.astype(np.uint8)).save(path)
    return open_domain(
        "town", root=str(tmp_path), train=True, streets=StreetsOptions(), folder=FolderOptions()
    )


def assert_same(got: list[dict], expected: list[dict]) -> None:
    assert len(got) == len(expected) > 0
    for a, b in zip(got, expected, strict=True):
        assert a.keys() == b.keys()
        for key in a:
            assert a[key].dtype == b[key].dtype
            np.testing.assert_array_equal(a[key], b[key])


def joined(parts: list[list[dict]]) -> list[dict]:
    """Global batches, put together from the rows of the hosts."""
    return [
        {key: np.concatenate([batch[key] for batch in step]) for key in step[0]}
        for step in zip(*parts, strict=True)
    ]


def test_two_hosts_with_four_workers_each_see_the_batches_of_one(folder):
    """Hosts and workers change nothing: plain writable arrays, every image once an epoch."""
    expected = list(batches(folder, **TRAIN, start=0, stop=6))
    parts = [
        list(batches(folder, **TRAIN, start=0, stop=6, workers=4, shard=(host, 2)))
        for host in range(2)
    ]
    assert_same(joined(parts), expected)
    assert expected[0]["image"].shape == (4, 12, 16, 3)
    assert expected[0]["label"].shape == (4, 12, 16)
    assert type(parts[0][0]["image"]) is np.ndarray
    assert parts[0][0]["image"].flags.writeable
    assert (expected[0]["image"] != expected[1]["image"]).any()
    sampler = make_sampler(folder, seed=TRAIN["seed"])
    names = [
        name for step in range(6) for name in batch_files(folder, sampler, batch_size=4, step=step)
    ]
    for epoch in range(4):
        assert sorted(names[6 * epoch : 6 * epoch + 6]) == [folder.name(i) for i in range(6)]


def test_evaluation_is_the_same_with_0_and_2_workers(folder):
    """Worker processes change nothing."""
    assert_same(
        list(eval_batches(folder, batch_size=4, workers=2)),
        list(eval_batches(folder, batch_size=4)),
    )


def test_order_and_draws_are_what_they_always_were():
    """Epochs are permutations drawn from (seed, 1, epoch), crops from (seed, 0, position).

    A crop draws scale, row, column and flip.
    """
    dataset = Numbered(5, sizes=((20, 30),))
    y, x = np.mgrid[:20, :30]
    order = np.concatenate(
        [np.random.default_rng((7, 1, epoch)).permutation(5) for epoch in range(3)]
    )
    dataset.pixels = np.stack([y, x, 0 * x], axis=-1).astype(np.uint8)
    shown = batches(
        dataset, seed=7, batch_size=3, crop=(12, 16), scale=(1.0, 1.0), flip=0.5, start=1, stop=4
    )
    for p, (image, label) in enumerate(
        (pair for b in shown for pair in zip(b["image"], b["label"], strict=True)), 3
    ):
        rng = np.random.default_rng((7, 0, p))
        rng.uniform(1.0, 1.0)
        top = int(rng.integers(9))
        left = int(rng.integers(15))
        columns = np.arange(left, left + 16)[:: -1 if rng.uniform() < 0.5 else 1]
        assert (label == order[p]).all()
        np.testing.assert_array_equal(
            image[..., 0], np.arange(top, top + 12)[:, None].repeat(16, 1)
        )
        np.testing.assert_array_equal(image[..., 1], columns[None].repeat(12, 0))


@pytest.mark.parametrize("start", [1, 5, 9])
def test_a_run_resumes_anywhere(folder, start):
    """Batches from step k on are the tail of the run from 0."""
    whole = list(batches(folder, **TRAIN, start=0, stop=10))
    assert_same(list(batches(folder, **TRAIN, start=start, stop=10)), whole[start:])


@pytest.mark.parametrize("hosts", [2, 4])
def test_hosts_share_the_batches_of_one(folder, hosts):
    """The rows of all hosts, put together, are the batches of 1 host."""
    whole = list(batches(folder, **TRAIN, start=2, stop=6))
    assert_same(
        joined(
            [
                list(batches(folder, **TRAIN, start=2, stop=6, shard=(h, hosts)))
                for h in range(hosts)
            ]
        ),
        whole,
    )


def test_hosts_and_workers_share_weighted_and_rare_batches(folder, tmp_path):
    """Weighted parts and rare classes are the same for threads, processes and hosts."""
    mixture = Mixture([folder, folder])
    sampler = make_sampler(mixture, seed=2, weights=(3.0, 1.0), temperature=0.1, min_pixels=20)
    augmentation = Augmentation(crop=(12, 16), scale=(0.5, 2.0), randaugment=(2, 5.0))
    options = {"seed": 2, "batch_size": 4}

    def run(**more):
        return list(
            train_batches(mixture, sampler, augmentation, **options, start=1, stop=4, **more)
        )

    whole = run()
    assert_same(run(workers=2), whole)
    assert_same(joined([run(shard=(h, 4)) for h in range(4)]), whole)


def test_hosts_and_workers_share_sides_and_rare_crops_in_the_corner(folder):
    """Drawn sides, crops drawn anew with their resize, and the padding of the corner are the same
    for threads, processes and hosts.
    """
    sampler = make_sampler(folder, seed=2, temperature=100.0, min_pixels=20)
    augmentation = Augmentation(
        crop=(18, 16),
        shortest_sides=(10, 15, 20, 30),
        longest_side=32,
        padding="corner",
        rare_class_min_crop_ratio=0.5,
    )
    options = {"seed": 2, "batch_size": 4}

    def run(**more):
        return list(
            train_batches(folder, sampler, augmentation, **options, start=1, stop=7, **more)
        )

    whole = run()
    assert_same(run(workers=2), whole)
    assert_same(joined([run(shard=(h, 4)) for h in range(4)]), whole)
    inside = np.concatenate([batch["inside"] for batch in whole])
    assert {(10, 12), (15, 16)} < set(map(tuple, inside.tolist()))
    for batch in whole:
        for image, label, (h, w) in zip(
            batch["image"], batch["label"], batch["inside"], strict=True
        ):
            assert (label[h:] == 255).all()
            assert (label[:, w:] == 255).all()
            assert (label[:h, :w] < 19).all()
            assert (image[h:] == PAD_COLOR).all()
            assert (image[:, w:] == PAD_COLOR).all()


def test_boxes_keep_the_size_inside_the_corner():
    """Padded boxes leave room for where the image ends."""
    options = dict(crop=(20, 30), scale=(1.0, 1.0), padding="corner", flip=1.0)
    dataset = Boxed(3)
    (batch,) = batches(dataset, seed=1, batch_size=3, **options, start=0, stop=1, max_boxes=2)
    np.testing.assert_array_equal(batch["inside"], [[12, 16]] * 3)
    boxes = batch["boxes"][batch["valid"]]
    np.testing.assert_array_equal(np.unique(boxes[:, 2]), [14])  # 16 less the 2 of the left edge


def test_every_epoch_shows_each_example_once_in_another_order():
    """Over 3 epochs that end inside batches every image counts once; names fit the batches."""
    dataset = Numbered(10)
    steps = list(batches(dataset, seed=1, batch_size=4, **AS_IS, start=0, stop=8))
    shown = np.concatenate([b["image"][:, 0, 0, 0] for b in steps])[:30].reshape(3, 10)
    np.testing.assert_array_equal(np.sort(shown, axis=1), np.tile(np.arange(10), (3, 1)))
    assert len({tuple(epoch) for epoch in shown.tolist()}) == 3
    for step, batch in enumerate(steps):
        np.testing.assert_array_equal(batch["image"], batch["label"][..., None].repeat(3, -1))
        assert batch_files(dataset, make_sampler(dataset, seed=1), batch_size=4, step=step) == [
            f"numbered/{i}" for i in batch["label"][:, 0, 0]
        ]


def test_seeds_change_order_and_augmentation(folder):
    """Another seed changes the examples; the same seed repeats them."""

    def run(seed):
        return next(batches(folder, **{**TRAIN, "seed": seed}, start=0, stop=1))["image"]

    np.testing.assert_array_equal(run(5), run(5))
    assert (run(5) != run(6)).any()


def test_an_example_is_augmented_anew_each_epoch(folder):
    """Every epoch draws another crop of the same image."""
    crops = np.concatenate(
        [b["image"] for b in batches(folder, **{**TRAIN, "batch_size": 6}, start=0, stop=5)]
    )
    assert len({crop.tobytes() for crop in crops}) == 30


def test_evaluation_shows_every_image_once_in_batches_of_one_size():
    """Two interleaved sizes give batches of one size, and hosts agree on their number."""
    dataset = Numbered(11, sizes=((6, 8), (4, 10), (6, 8)))
    whole = list(eval_batches(dataset, batch_size=4))
    shown = np.concatenate([b["index"][b["mask"]] for b in whole])
    np.testing.assert_array_equal(np.sort(shown), np.arange(11))
    for batch in whole:
        assert (batch["image"].dtype, batch["label"].dtype) == (np.uint8, np.uint8)
        assert (batch["mask"].dtype, batch["index"].dtype) == (np.bool_, np.int32)
        assert batch["mask"].shape == batch["index"].shape == (4,)
        assert (batch["index"][~batch["mask"]] == -1).all()
        assert (batch["label"][~batch["mask"]] == 255).all()
        for i, image, label in zip(batch["index"], batch["image"], batch["label"], strict=True):
            if i >= 0:
                assert label.shape == dataset.size(int(i))
                assert (image == i).all()
                assert (label == i).all()
    assert [b["index"].tolist() for b in whole] == [
        [1, 4, 7, 10],
        [0, 2, 3, 5],
        [6, 8, 9, -1],
    ]  # small first, in order within a size


@pytest.mark.parametrize("hosts", [1, 2, 3, 4, 5])
def test_evaluation_over_hosts_counts_every_pixel_once(hosts):
    """11 images over 1 to 5 hosts: equally many batches, every image in one row of one host."""
    dataset = Numbered(11, sizes=((6, 8), (4, 10), (6, 8)))
    parts = [
        list(eval_batches(dataset, batch_size=2 * hosts, shard=(h, hosts))) for h in range(hosts)
    ]
    assert len({len(part) for part in parts}) == 1
    counted = np.zeros(256, np.int64)
    for part in parts:
        for batch in part:
            assert batch["image"].shape[0] == 2
            assert (batch["index"][batch["mask"]] >= 0).all()
            counted += np.bincount(batch["label"][batch["mask"]].ravel(), minlength=256)
    np.testing.assert_array_equal(counted[:11], [np.prod(dataset.size(i)) for i in range(11)])
    assert not counted[11:].any()
    assert_same(joined(parts), list(eval_batches(dataset, batch_size=2 * hosts)))


def test_boxes_are_padded_to_a_fixed_number():
    """The boxes of each image fill its first rows, which alone are valid; zeros follow."""
    dataset = Boxed(6)
    for batch in [
        *batches(dataset, seed=0, batch_size=3, **AS_IS, max_boxes=5, start=0, stop=2),
        *eval_batches(dataset, batch_size=4, max_boxes=5),
    ]:
        rows = len(batch["image"])
        shapes = {
            key: (batch[key].shape, batch[key].dtype)
            for key in ("boxes", "classes", "difficult", "crowd", "valid")
        }
        bools = ((rows, 5), np.dtype(bool))
        assert shapes == {
            "boxes": ((rows, 5, 4), np.float32),
            "classes": ((rows, 5), np.int32),
            **dict.fromkeys(("difficult", "crowd", "valid"), bools),
        }
        assert "label" not in batch
        for row in range(rows):
            i = int(batch["image"][row, 0, 0, 0]) if batch.get("mask", np.ones(rows))[row] else 0
            expected = dataset[i]
            np.testing.assert_array_equal(batch["valid"][row], np.arange(5) < i)
            for key in ("boxes", "classes", "difficult", "crowd"):
                np.testing.assert_array_equal(batch[key][row, :i], expected[key])
                assert not batch[key][row, i:].any()
    message = r"numbered/5 has 5 boxes; data\.max_boxes is 4; allowed: at least 5"
    with pytest.raises(ValueError, match=message):
        list(batches(dataset, seed=0, batch_size=3, **AS_IS, max_boxes=4, start=0, stop=2))
    with pytest.raises(ValueError, match=message):
        list(eval_batches(dataset, batch_size=2, max_boxes=4))


@pytest.mark.parametrize("workers", [0, 2])
def test_a_damaged_file_stops_the_run_with_its_name(folder, workers):
    """The error of a thread or process is unchanged, and no process remains."""
    path = Path(folder.name(2))
    path.write_bytes(path.read_bytes()[:-30])
    with pytest.raises(ValueError, match="truncated") as error:
        list(batches(folder, **TRAIN, start=0, stop=5, workers=workers))
    assert (
        str(error.value)
        == f"{path}: truncated (no PNG end chunk); fetch the file again, or leave it out with"
        " data.skip"
    )
    assert not multiprocessing.active_children()


@pytest.mark.parametrize("end", ["drop", "before"])
def test_workers_end_with_their_iterator(folder, end):
    """An iterator is dropped early or before the first batch; its processes end in seconds."""
    iterator = batches(folder, **TRAIN, start=0, stop=1000, workers=2)
    if end != "before":
        next(iterator)
        assert multiprocessing.active_children()
    began = time.monotonic()
    del iterator
    assert time.monotonic() - began < 10
    assert not multiprocessing.active_children()


SCRIPT = """
    import multiprocessing, os, signal, sys
    # There is no guard: workers must not import the main module.
    open(sys.argv[1], "a").write("imported\\n")
    from jaxdg.data.datasets import StreetsOptions, FolderOptions
    from jaxdg.data.domains import open_domain
    from jaxdg.data.pipeline import train_batches
    from jaxdg.data.samplers import make_sampler
    from jaxdg.data.augment.transforms import Augmentation
    own = {"streets": StreetsOptions(), "folder": FolderOptions()}
    dataset = open_domain("town", root=sys.argv[2], train=True, **own)
    options = {"seed": 0, "batch_size": 2, "start": 0, "stop": 1000, "workers": 2}
    augmentation = Augmentation(crop=(8, 8))
    batches = train_batches(dataset, make_sampler(dataset, seed=0), augmentation, **options)
    next(batches)
    print(*(child.pid for child in multiprocessing.active_children()), flush=True)
    if sys.argv[3] == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    if sys.argv[3] == "terminated":
        signal.signal(signal.SIGTERM, lambda *_: print("saving", flush=True))
        os.killpg(0, signal.SIGTERM)
        for _ in range(20):
            next(batches)
        print("went on", flush=True)
"""


@pytest.mark.parametrize("end", ["left", "killed", "terminated"])
def test_a_run_leaves_no_process_behind(folder, tmp_path, end):
    """A run that ends early or by kill -9 takes its workers along; SIGTERM spares the workers."""
    script = tmp_path / "run.py"
    log = tmp_path / "log"
    script.write_text(textwrap.dedent(SCRIPT))
    root = Path(folder.name(0)).parent.parent.parent
    command = [sys.executable, str(script), str(log), str(root), end]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    ) as run:
        out, errors = run.communicate(timeout=60)
    assert run.returncode == (-signal.SIGKILL if end == "killed" else 0), errors
    if end != "killed":
        assert errors == ""
    if end == "terminated":
        assert out.splitlines()[1:] == ["saving", "went on"]
    assert log.read_text() == "imported\n"
    workers = [int(pid) for pid in out.splitlines()[0].split()]
    assert len(workers) == 2
    deadline = time.monotonic() + 10
    while any(
        os.path.exists(f"/proc/{pid}/cmdline") and Path(f"/proc/{pid}/cmdline").read_text()
        for pid in workers
    ):
        assert time.monotonic() < deadline, "worker processes outlive the run"
        time.sleep(0.05)


def test_a_killed_worker_stops_the_run(folder):
    """A worker killed for lack of memory is an error with a remedy, and ends the other workers."""
    iterator = batches(folder, **TRAIN, start=0, stop=1000, workers=2)
    next(iterator)
    os.kill(multiprocessing.active_children()[0].pid, signal.SIGKILL)
    began = time.monotonic()
    with pytest.raises(
        ChildProcessError, match=r"a data worker was killed.*--config\.data\.workers"
    ):
        list(iterator)
    assert time.monotonic() - began < 10
    assert not multiprocessing.active_children()


def test_bad_arguments_are_refused_before_the_first_batch():
    """A batch that does not split over the hosts, and an empty dataset, are errors."""
    with pytest.raises(ValueError, match="batch_size 4 does not split evenly over 3 hosts"):
        batches(Numbered(), **TRAIN, start=0, stop=1, shard=(0, 3))
    with pytest.raises(ValueError, match="batch_size 4 does not split evenly over 3 hosts"):
        eval_batches(Numbered(), batch_size=4, shard=(0, 3))
    with pytest.raises(ValueError, match="domain 'numbered' has no images"):
        batches(Numbered(0), **TRAIN, start=0, stop=1)
    with pytest.raises(ValueError, match="domain 'numbered' has no images"):
        eval_batches(Numbered(0), batch_size=4)


def test_a_real_scene_trains_end_to_end(data_path):
    """Crops of CamVid fit their labels: sky is brighter than road."""
    dataset = open_domain(
        "camvid",
        root=str(data_path("camvid").parent),
        train=True,
        streets=StreetsOptions(),
        folder=None,
    )
    batch = next(
        batches(
            dataset,
            seed=0,
            batch_size=8,
            crop=(128, 128),
            scale=(0.5, 1.0),
            flip=0.5,
            start=0,
            stop=1,
        )
    )
    grey = batch["image"].mean(-1)
    label = batch["label"]
    assert set(np.unique(label)) <= {*range(11), 255}
    assert grey[label == 0].mean() > grey[label == 3].mean() + 20
