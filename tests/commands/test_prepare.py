"""Writing records: the same bytes however they are written, nothing lost with a killed run,
pictures stored without loss.
"""

import dataclasses
import io
import os
from pathlib import Path
import re
import signal
import subprocess
import sys
import textwrap
import time
import uuid

import fsspec
import numpy as np
from PIL import Image
import pytest
import tensorflow_datasets as tfds

from jaxdg.commands.prepare import prepare
from jaxdg.commands.prepare.pixels import png, resize_sample, resized
from jaxdg.data.datasets import FolderOptions
from jaxdg.data.domains import open_files
from jaxdg.data.labels import CITYSCAPES, LabelSet
from jaxdg.data.records import open_records
from tests import forked
from tests.data import trees

SHARD_PIXELS = 2 * 12 * 16  # two images a shard


@dataclasses.dataclass
class Counted:
    """Noise, and how often it was read.

    Where a folder is given, images from the fifth on kill the process once two shards are there.
    """

    count: int = 8
    kill: str = ""
    domain: str = "noise"
    labels: LabelSet = CITYSCAPES
    reads: int = 0

    def __len__(self) -> int:
        return self.count

    def size(self, i: int) -> tuple[int, int]:
        return 12, 16

    def name(self, i: int) -> str:
        return f"/data/noise/{i}.png"

    def __getitem__(self, i: int) -> dict[str, np.ndarray]:
        self.reads += 1
        if self.kill and i >= 5:
            while (
                len(list(Path(self.kill).glob("*.json"))) < 3
            ):  # one a shard, and one for the whole
                time.sleep(0.01)
            os.kill(os.getpid(), signal.SIGKILL)
        rng = np.random.default_rng(i)
        return {
            "image": rng.integers(0, 256, (12, 16, 3), np.uint8),
            "label": rng.integers(0, 19, (12, 16), np.uint8),
        }


def write(out: Path, dataset: Counted | None = None, **options) -> dict[str, bytes]:
    """Prepares `Counted` and returns the files."""
    directory = prepare(
        "noise",
        {"train": dataset or Counted()},
        root="/data",
        out=str(out),
        shard_pixels=SHARD_PIXELS,
        **options,
    )
    return {path.name: path.read_bytes() for path in Path(directory).iterdir()}


def command(*arguments: str, **environment: str) -> subprocess.CompletedProcess:
    """Runs `python -m jaxdg.data.prepare`."""
    return forked.run("jaxdg.data.prepare", *arguments, environment={**os.environ, **environment})


def test_worker_processes_write_the_same_bytes_as_threads(tmp_path):
    """A digest tells whether two people have the same records: who wrote which shard must not
    matter.
    """
    threads = write(tmp_path / "threads")
    process = write(tmp_path / "process", processes=1)
    assert len([name for name in threads if "array_record-" in name]) == 4
    assert threads == process


def test_a_killed_run_goes_on_with_the_shards_that_are_whole(tmp_path):
    """After a SIGKILL in the third shard, and with the first cut short since, only what is missing
    is written, to the same bytes.
    """
    directory = tmp_path / "noise" / "1.0.0"
    script = f"""
        import sys
        sys.path.insert(0, {str(Path(__file__).parents[2])!r})
        from pathlib import Path
        from tests.commands.test_prepare import Counted, write
        write(Path({str(tmp_path)!r}), Counted(kill={str(directory)!r}))
    """
    killed = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)], capture_output=True, text=True, check=False
    )
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    shards = sorted(directory.glob("noise-train.array_record-?????-of-00004"))
    assert [shard.name.split("-")[2] for shard in shards] == ["00000", "00001"]
    assert not (directory / "dataset_info.json").exists()
    shards[0].write_bytes(shards[0].read_bytes()[:-10])
    dataset = Counted()
    assert write(tmp_path, dataset) == write(tmp_path / "whole")
    assert dataset.reads == 2 * 3 + 1  # three shards, and one image to see whether there are boxes


def test_a_finished_run_is_left_alone_and_other_options_are_refused(tmp_path):
    """Nothing is read again; records of other images or another size are never mixed with those
    that are there.
    """
    first = write(tmp_path)
    again = Counted()
    assert write(tmp_path, again) == first
    assert again.reads == 1
    with pytest.raises(
        ValueError,
        match=r"noise/1.0.0 holds records that differ in resize, bounds; delete the folder",
    ):
        write(tmp_path, resize="6x8")
    with pytest.raises(ValueError, match="differ in images, bounds"):
        write(tmp_path, Counted(count=6))


def test_a_url_receives_the_same_files(tmp_path):
    """Records can be written where they are to be read from, such as a bucket."""
    system = fsspec.filesystem("memory")
    place = f"/bucket-{uuid.uuid4().hex}"
    prepare(
        "noise",
        {"train": Counted()},
        root="/data",
        out=f"memory://{place}",
        shard_pixels=SHARD_PIXELS,
    )
    written = {
        os.path.basename(path): system.cat_file(path)
        for path in system.ls(f"{place}/noise/1.0.0", detail=False)
    }
    system.rm(place, recursive=True)
    assert written == write(tmp_path)


@pytest.mark.parametrize("shape", [(1, 1), (5, 7), (1, 9, 3), (31, 2, 3)])
def test_pngs_decode_to_what_went_in(shape):
    """Pillow, which checks the checksums, reads what the encoder wrote."""
    pixels = np.random.default_rng(0).integers(0, 256, shape, np.uint8)
    image = Image.open(io.BytesIO(png(pixels)))
    image.verify()
    np.testing.assert_array_equal(np.asarray(Image.open(io.BytesIO(png(pixels)))), pixels)


def test_jpeg_files_are_stored_as_they_are_unless_readers_would_differ(tmp_path, monkeypatch):
    """RGB JPEG files keep their bytes, whichever way is up; grey ones, which TFDS would read as one
    channel, become RGB.
    """
    monkeypatch.setenv("JAXDG_CACHE", str(tmp_path / "cache"))
    rng = np.random.default_rng(0)
    stored = {}
    for name, mode in (("color", "RGB"), ("grey", "L"), ("turned", "RGB")):
        image = Image.fromarray(rng.integers(0, 256, (20, 30, 3), np.uint8)).convert(mode)
        data = io.BytesIO()
        exif = Image.Exif()
        if name == "turned":
            exif[0x0112] = 6
        image.save(data, "JPEG", exif=exif)
        stored[f"images/town/{name}.jpg"] = data.getvalue()
        trees.write(tmp_path, f"images/town/{name}.jpg", data.getvalue())
        trees.write(tmp_path, f"labels/town/{name}.png", trees.grey(np.zeros((20, 30))))
    files = open_files("town", root=str(tmp_path), train=True, folder=FolderOptions())
    prepare("town", {"train": files}, root=str(tmp_path), out=str(tmp_path / "out"))
    kept = tfds.data_source(
        "town",
        data_dir=tmp_path / "out",
        split="train",
        decoders={"image": tfds.decode.SkipDecoding()},
    )
    for i, record in enumerate(kept):
        name = record["name"].decode()
        assert (record["image"] == stored[name]) == ("grey" not in name), name
        np.testing.assert_array_equal(
            open_records(str(tmp_path / "out"), "town", train=True)[i]["image"], files[i]["image"]
        )
    for record in tfds.data_source("town", data_dir=tmp_path / "out", split="train"):
        assert record["image"].shape == (20, 30, 3)


def test_images_of_both_splits_are_stored_once(tmp_path, monkeypatch):
    """GTA5 has no splits: training and evaluation read the same shards."""
    monkeypatch.setenv("JAXDG_CACHE", str(tmp_path / "cache"))
    trees.make("gta5", tmp_path, np.random.default_rng(0), count=3)
    datasets = {
        split: open_files("gta5", root=str(tmp_path), train=split == "train", folder=None)
        for split in ("train", "val")
    }
    directory = prepare("gta5", datasets, root=str(tmp_path), out=str(tmp_path))
    assert len(list(Path(directory).glob("*array_record*"))) == 1
    assert (
        len(open_records(str(tmp_path), "gta5", train=False))
        == len(open_records(str(tmp_path), "gta5", train=True))
        == 3
    )


@pytest.mark.parametrize(
    ("resize", "expected"),
    [
        (None, (1052, 1914)),
        ("720x1280", (720, 1280)),
        ("short:526", (526, 957)),
        ("long:957", (526, 957)),
        ("long:10", (5, 10)),
    ],
)
def test_sizes(resize, expected):
    """Both sides, or one side and the image's own ratio."""
    assert resized((1052, 1914), resize) == expected


@pytest.mark.parametrize("resize", ["720", "720x", "0x5", "side:3", "short:0", "1x2x3"])
def test_other_sizes_are_refused(resize):
    """The message says what is allowed."""
    with pytest.raises(
        ValueError, match=re.escape(f"--resize={resize} is not HEIGHTxWIDTH, short:N or long:N")
    ):
        resized((10, 10), resize)


@pytest.mark.parametrize("size", [(7, 11), (20, 30), (3, 40)])
def test_resized_samples_equal_a_slow_version(size):
    """Labels by the pixel that holds the new centre, images bilinear between centres, boxes by the
    ratio of the sides.
    """
    rng = np.random.default_rng(0)
    h, w = (10, 15)
    sample = {
        "image": rng.integers(0, 256, (h, w, 3), np.uint8),
        "label": rng.integers(0, 19, (h, w), np.uint8),
    }
    got = resize_sample(sample, size)
    assert got["image"].dtype == got["label"].dtype == np.uint8
    for y in range(size[0]):
        for x in range(size[1]):
            v = (y + 0.5) * h / size[0]
            u = (x + 0.5) * w / size[1]
            assert got["label"][y, x] == sample["label"][int(v), int(u)]
            v = np.clip(v - 0.5, 0, h - 1)
            u = np.clip(u - 0.5, 0, w - 1)
            top = min(int(v), h - 2)
            left = min(int(u), w - 2)
            corners = sample["image"][top : top + 2, left : left + 2].astype(float)
            rows = corners[0] * (1 - v + top) + corners[1] * (v - top)
            np.testing.assert_allclose(
                got["image"][y, x], rows[0] * (1 - u + left) + rows[1] * (u - left), atol=1.01
            )
    flags = {
        "classes": np.array([1], np.int32),
        "difficult": np.array([True]),
        "crowd": np.array([False]),
    }
    boxed = resize_sample(
        {"image": sample["image"], "boxes": np.array([[3, 2, 9, 8]], np.float32), **flags}, size
    )
    factors = np.array([size[1] / w, size[0] / h] * 2)
    np.testing.assert_allclose(boxed["boxes"], [[3, 2, 9, 8]] * factors, rtol=1e-6)
    assert boxed["classes"].tolist() == [1]


def test_the_command_writes_resized_records_and_verifies_them(tmp_path):
    """From folders as downloaded to a data root of records, by the command a user types; then one
    bit changes.
    """
    trees.make("acdc", tmp_path / "data", np.random.default_rng(0))
    cache = str(tmp_path / "cache")
    arguments = [
        "--data_root",
        str(tmp_path / "data"),
        "--out",
        str(tmp_path / "out"),
        "--resize",
        "short:12",
        "--processes=0",
    ]
    done = command(*arguments, "acdc/fog", "acdc/test", JAXDG_CACHE=cache)
    assert done.returncode == 0, done.stderr
    assert f"acdc/fog: train 2, val 2 images in {tmp_path}/out/acdc/fog/1.0.0" in done.stdout
    fog = open_records(str(tmp_path / "out"), "acdc/fog", train=False)
    assert fog.size(0) == (12, 20) == fog[0]["label"].shape == fog[0]["image"].shape[:2]
    test = open_records(str(tmp_path / "out"), "acdc/test", train=False)
    assert len(test) == 8
    assert (test[7]["label"] == 255).all()
    shard = next((tmp_path / "out" / "acdc" / "fog" / "1.0.0").glob("*train.array_record*"))
    data = bytearray(shard.read_bytes())
    data[-1] ^= 1
    shard.write_bytes(data)
    failed = command("--out", str(tmp_path / "out"), "--verify", "acdc/test", "acdc/fog")
    assert failed.returncode == 1
    assert failed.stdout == f"acdc/test: {tmp_path}/out/acdc/test/1.0.0 is whole\n"
    assert failed.stderr.startswith(f"error: {shard} is truncated or altered")
    assert failed.stderr.count("\n") == 1


def test_beam_is_asked_for_where_it_is_missing(tmp_path, monkeypatch):
    """Apache Beam is no dependency; who wants it is told how to get it."""
    monkeypatch.setitem(sys.modules, "apache_beam", None)
    with pytest.raises(
        ValueError, match=r'--beam needs Apache Beam; `pip install "jaxdg\[beam\]"`'
    ):
        write(tmp_path, beam="--runner=DirectRunner")
