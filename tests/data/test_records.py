"""Records: the same batches as from files, read by TFDS too, local or remote, and damage named."""

import dataclasses
import json
from pathlib import Path
import pickle
import shutil
from typing import Any
import uuid

import fsspec
import numpy as np
import pytest
import tensorflow_datasets as tfds

from jaxdg.commands.prepare import prepare, shards
from jaxdg.data import records
from jaxdg.data.augment.transforms import Augmentation
from jaxdg.data.boxes import BoxOptions, open_box_files, open_boxes
from jaxdg.data.datasets import FolderOptions, StreetsOptions
from jaxdg.data.domains import open_domain, open_files
from jaxdg.data.labels import CITYSCAPES, LabelSet, palette
from jaxdg.data.pipeline import eval_batches, train_batches
from jaxdg.data.records import Records, open_records
from jaxdg.data.samplers import make_sampler
from tests.data import trees

DOMAINS = {
    "gta5": "gta5",
    "bdd100k": "bdd100k",
    "acdc/night": "acdc",
    "synthia": "synthia",
}  # palette, JPEG, a condition, zip archive
SHARD_PIXELS = 2 * 24 * 40  # two images a shard


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """A data root of files, one of their records, and what was written into the files."""
    base = tmp_path_factory.mktemp("written")
    files = base / "files of ümlaut"
    out = base / "records"
    items = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("JAXDG_CACHE", str(base / "cache"))
        for domain, name in DOMAINS.items():
            made = trees.make(
                name, files, np.random.default_rng(len(domain)), zipped=name == "synthia", count=5
            )
            items[domain] = [item for item in made if item.domain.startswith(domain)]
            datasets = {
                s: open_files(domain, root=str(files), train=s == "train", folder=None)
                for s in ("train", "val")
            }
            prepare(domain, datasets, root=str(files), out=str(out), shard_pixels=SHARD_PIXELS)
    return files, out, items


@pytest.fixture
def copied(written, tmp_path, monkeypatch):
    """A data root of records to damage."""
    monkeypatch.setenv("JAXDG_CACHE", str(tmp_path / "cache"))
    return shutil.copytree(written[1], tmp_path / "root")


def open_either(domain: str, root: Path | str, train: bool = True):
    return open_domain(domain, root=str(root), train=train, streets=StreetsOptions(), folder=None)


def assert_same(got, expected) -> None:
    count = 0
    for a, b in zip(got, expected, strict=True):
        assert a.keys() == b.keys()
        for key in a:
            assert a[key].dtype == b[key].dtype
            np.testing.assert_array_equal(a[key], b[key])
        count += 1
    assert count


@pytest.mark.parametrize("domain", DOMAINS)
def test_batches_equal_those_of_files_bit_for_bit(written, domain, monkeypatch, tmp_path):
    """Training and evaluation batches equal those of the files, in worker processes too."""
    monkeypatch.setenv("JAXDG_CACHE", str(tmp_path))
    files, out, _ = written
    workers = 1 if domain == "gta5" else 0
    augmentation = Augmentation(crop=(16, 20), scale=(0.5, 2.0), max_class_share=0.9)
    batches = []
    for root, processes in ((out, workers), (files, 0)):
        source = open_either(domain, root)
        target = open_either(domain, root, train=False)
        assert isinstance(source, Records) == isinstance(target, Records) == (root == out)
        training = train_batches(
            source,
            make_sampler(source, seed=3),
            augmentation,
            seed=3,
            batch_size=2,
            start=1,
            stop=5,
            workers=processes,
        )
        batches.append([*training, *eval_batches(target, batch_size=2)])
    assert_same(*batches)


@pytest.mark.parametrize("domain", DOMAINS)
def test_names_sizes_and_classes_equal_those_of_files(written, domain, monkeypatch, tmp_path):
    """Names, relative to the data root, sizes and classes equal those of the files."""
    monkeypatch.setenv("JAXDG_CACHE", str(tmp_path))
    files, out, _ = written
    for train in (True, False):
        a = open_either(domain, out, train)
        b = open_either(domain, files, train)
        assert len(a) == len(b) > 0
        assert (a.domain, a.labels) == (b.domain, b.labels)
        assert [a.size(i) for i in range(len(a))] == [b.size(i) for i in range(len(b))]
        assert [f"{files}/{a.name(i)}" for i in range(len(a))] == [b.name(i) for i in range(len(b))]


@pytest.mark.parametrize("domain", DOMAINS)
def test_tfds_reads_them(written, domain):
    """`tfds.data_source` finds the written pixels, names and classes without TensorFlow."""
    _, out, items = written
    source = tfds.data_source(domain, data_dir=out, split="train")
    mine = [item for item in items[domain] if item.split in ("train", "all")]
    assert source.dataset_info.features["label"].names == list(CITYSCAPES.names)
    assert len(source) == len(mine)
    for got, item in zip(source, mine, strict=True):
        assert item.image.endswith(got["name"].decode())
        np.testing.assert_array_equal(got["image"], item.pixels)
        assert got["label"].shape == (*item.ids.shape, 1)
        assert (got["height"], got["width"]) == item.ids.shape
    if domain == "bdd100k":  # its files hold train ids already
        np.testing.assert_array_equal(got["label"][..., 0], item.ids)


@dataclasses.dataclass
class Boxed:
    """Image i has i boxes."""

    domain: str = "towns"
    labels: LabelSet = dataclasses.field(
        default_factory=lambda: LabelSet(("car", "traffic light"), ((1, 2, 3), (4, 5, 6)))
    )

    def __len__(self) -> int:
        return 4

    def size(self, i: int) -> tuple[int, int]:
        return 10 + i, 12

    def name(self, i: int) -> str:
        return f"towns/{i}"

    def __getitem__(self, i: int) -> dict[str, np.ndarray]:
        rng = np.random.default_rng(i)
        return {
            "image": rng.integers(0, 256, (*self.size(i), 3), dtype=np.uint8),
            "boxes": rng.uniform(0, 10, (i, 4)).astype(np.float32),
            "classes": rng.integers(0, 2, i).astype(np.int32),
            "difficult": rng.integers(0, 2, i).astype(bool),
            "crowd": rng.integers(0, 2, i).astype(bool),
            "areas": rng.uniform(0, 50, i).astype(np.float32),
        }


def test_boxes_come_back_bit_for_bit(tmp_path):
    """Boxes, classes, flags and areas are exact; they lie beside label maps of the domain."""
    dataset = Boxed()
    directory = prepare("towns", {"val": dataset}, root="", out=str(tmp_path))
    assert directory == f"{tmp_path}/towns/boxes/1.0.0"
    got = open_records(str(tmp_path), "towns", train=False, boxes=True)
    assert open_records(str(tmp_path), "towns", train=False) is None
    assert got.labels == dataset.labels
    assert_same((got[i] for i in range(len(got))), (dataset[i] for i in range(len(dataset))))
    assert [got.size(i) for i in range(4)] == [dataset.size(i) for i in range(4)]
    assert got.box_counts.tolist() == [0, 1, 2, 3]
    source = tfds.data_source("towns/boxes", data_dir=tmp_path, split="val")
    assert source.dataset_info.features["classes"].feature.names == ["car", "traffic light"]
    np.testing.assert_array_equal(source[3]["boxes"], dataset[3]["boxes"])


def test_records_written_before_areas_were_still_open(tmp_path, monkeypatch):
    """Areas are then those of the boxes, and box counts are unknown before reading."""
    kinds = shards.features
    example = shards.ShardWriter._example

    def without(writer: Any, i: int) -> dict[str, Any]:
        return {key: value for key, value in example(writer, i).items() if key != "areas"}

    def fewer(*arguments: Any) -> Any:
        return tfds.features.FeaturesDict(
            {key: kind for key, kind in kinds(*arguments).items() if key != "areas"}
        )

    monkeypatch.setattr(shards.ShardWriter, "_example", without)
    monkeypatch.setattr(shards, "features", fewer)
    monkeypatch.setattr("jaxdg.commands.prepare.features", fewer)
    dataset = Boxed()
    index = Path(prepare("towns", {"val": dataset}, root="", out=str(tmp_path)), records.INDEX)
    with np.load(index) as stored:
        older = {key: array for key, array in stored.items() if not key.endswith("_counts")}
    length = index.stat().st_size
    np.savez(index, **older)
    metadata = index.parent / records.METADATA
    noted = json.loads(metadata.read_text().replace(str(length), str(index.stat().st_size)))
    del noted["annotations"]
    metadata.write_text(json.dumps(noted))
    assert prepare("towns", {"val": dataset}, root="", out=str(tmp_path)) == str(index.parent)
    got = open_records(str(tmp_path), "towns", train=False, boxes=True)
    assert got.box_counts is None
    for i in range(4):
        box = dataset[i]["boxes"].astype(float)
        np.testing.assert_allclose(
            got[i]["areas"], (box[:, 2] - box[:, 0]) * (box[:, 3] - box[:, 1]), rtol=1e-6
        )
        np.testing.assert_array_equal(got[i]["boxes"], dataset[i]["boxes"])


def test_records_of_annotations_say_what_the_annotations_say(tmp_path, monkeypatch):
    """COCO's areas, crowds and difficult boxes are exact; corrections need new records.

    Two images of one id are refused.
    """
    monkeypatch.setenv("JAXDG_CACHE", str(tmp_path / "cache"))
    truth: dict[str, Any] = {
        "images": [{"id": i, "file_name": f"{i}.png", "width": 8, "height": 6} for i in (1, 2)],
        "categories": [{"id": 4, "name": "car"}],
        "annotations": [
            {
                "id": 1,
                "image_id": 2,
                "category_id": 4,
                "bbox": [1, 1, 4, 4],
                "area": 7.5,
                "iscrowd": "0",
                "ignore": 1,
            },
            {
                "id": 2,
                "image_id": 2,
                "category_id": 4,
                "bbox": [0, 0, 8, 6],
                "area": 20,
                "iscrowd": "1",
            },
        ],
    }
    for e in truth["images"]:
        trees.write(
            tmp_path, f"photos/{e['file_name']}", trees.encode(np.zeros((6, 8, 3), np.uint8), "PNG")
        )
    (tmp_path / "t.json").write_text(json.dumps(truth))
    own = BoxOptions(("photos", "photos"), ("t.json", "t.json"), classes=("car",))
    files = open_box_files("town", root=str(tmp_path), train=True, own=own)
    prepare("town", {"train": files}, root=str(tmp_path), out=str(tmp_path / "out"))
    got = open_boxes("town", root=str(tmp_path / "out"), train=True, own=own)
    assert_same((got[i] for i in range(2)), (files[i] for i in range(2)))
    assert {key: got[1][key].tolist() for key in ("difficult", "crowd", "areas")} == {
        "difficult": [True, False],
        "crowd": [False, True],
        "areas": [7.5, 20],
    }
    again = {"root": str(tmp_path), "out": str(tmp_path / "out")}
    assert prepare("town", {"train": files}, **again) == got.directory
    truth["annotations"][0]["bbox"] = [1, 1, 4, 3]
    (tmp_path / "t.json").write_text(json.dumps(truth))
    with pytest.raises(
        ValueError,
        match=r"town/boxes/1\.0\.0 holds records that differ in annotations; delete the folder",
    ):
        prepare(
            "town",
            {"train": open_box_files("town", root=str(tmp_path), train=True, own=own)},
            **again,
        )
    truth["images"][1]["id"] = 1
    (tmp_path / "t.json").write_text(json.dumps(truth))
    with pytest.raises(ValueError, match=r"the images '1\.png' and '2\.png' have one id, 1"):
        open_box_files("town", root=str(tmp_path), train=True, own=own)
    with pytest.raises(
        ValueError, match=r"records .* were written with the classes car, but those of town are dog"
    ):
        open_boxes(
            "town",
            root=str(tmp_path / "out"),
            train=True,
            own=dataclasses.replace(own, classes=("dog",)),
        )


def test_a_pickle_holds_no_images(written):
    """The pickle is small, even after shards were opened, and reads the same."""
    source = open_records(str(written[1]), "gta5", train=True)
    first = source[0]
    pickled = pickle.dumps(source)
    assert len(pickled) < 2000 + source.table.nbytes
    assert_same([pickle.loads(pickled)[0]], [first])


@pytest.mark.parametrize("damage", ["short", "missing"])
def test_a_truncated_or_missing_shard_is_named_when_opened(copied, damage):
    """The start of a run names the incomplete file."""
    shard = sorted((copied / "gta5" / "1.0.0").glob("*.array_record-*"))[1]
    if damage == "short":
        shard.write_bytes(shard.read_bytes()[:-1])
    else:
        shard.unlink()
    with pytest.raises(
        ValueError, match=rf"{shard.name} (has \d+ bytes instead of \d+|is missing).*copy it again"
    ):
        open_either("gta5", copied)


def test_an_altered_shard_is_named_when_read_and_by_verify(copied):
    """One wrong bit is found when an image of that shard is read, and by `verify`."""
    directory = copied / "gta5" / "1.0.0"
    shard = sorted(directory.glob("*.array_record-*"))[1]
    data = bytearray(shard.read_bytes())
    data[200] ^= 1
    shard.write_bytes(data)
    source = open_either("gta5", copied)
    assert source[0]["image"].shape == source[4]["image"].shape == (24, 40, 3)
    with pytest.raises(ValueError, match=rf"{shard.name}: damaged"):
        _ = [source[i] for i in range(len(source))]
    assert [line.split(" is ")[0] for line in records.verify(str(directory))] == [str(shard)]
    assert records.verify(str(copied / "bdd100k" / "1.0.0")) == []


def test_records_that_cannot_be_read_are_refused(copied):
    """Unfinished records, other versions and programs, and missing splits are errors."""
    directory = copied / "gta5" / "1.0.0"
    info = directory / "dataset_info.json"
    metadata = directory / "metadata.json"
    (directory / "unfinished.json").write_text("{}")
    assert len(open_either("gta5", copied)) == 5  # its end was interrupted, it is whole
    info.rename(directory / "elsewhere")
    with pytest.raises(
        ValueError,
        match=r"gta5/1.0.0 holds unfinished records; run `python -m jaxdg.data.prepare` again",
    ):
        open_either("gta5", copied)
    (directory / "elsewhere").rename(info)
    changed = json.loads(metadata.read_text())
    del changed["splits"]["train"]
    metadata.write_text(json.dumps(changed))
    with pytest.raises(ValueError, match="has no split train, only val"):
        open_either("gta5", copied)
    metadata.unlink()
    with pytest.raises(ValueError, match=r"was not written by `python -m jaxdg.data.prepare`"):
        open_either("gta5", copied)
    directory.rename(directory.parent / "2.0.0")
    with pytest.raises(ValueError, match=r"holds records of version 2.0.0, this jaxdg reads 1.0.0"):
        open_either("gta5", copied)


def test_another_label_map_is_refused(tmp_path, monkeypatch):
    """Records hold mapped labels, so a configuration with another map is refused."""
    monkeypatch.setenv("JAXDG_CACHE", str(tmp_path / "cache"))
    trees.make("mapillary", tmp_path, np.random.default_rng(0))
    rein = open_files(
        "mapillary", root=str(tmp_path), train=False, folder=None, mapillary_labels="rein"
    )
    prepare("mapillary", {"val": rein}, root=str(tmp_path), out=str(tmp_path))
    options = {"root": str(tmp_path), "train": False, "streets": StreetsOptions(), "folder": None}
    assert_same([open_domain("mapillary", **options, mapillary_labels="rein")[0]], [rein[0]])
    with pytest.raises(
        ValueError,
        match=(
            r"mapillary/1.0.0 were written with other classes or label ids.*data.mapillary_labels"
        ),
    ):
        open_domain("mapillary", **options, mapillary_labels="vltseg")
    folder = FolderOptions(id_map={7: 0}, ignore=())
    trees.write(tmp_path, "images/town/1.png", trees.encode(np.zeros((4, 4, 3), np.uint8), "PNG"))
    trees.write(tmp_path, "labels/town/1.png", trees.grey(np.full((4, 4), 7)))
    prepare(
        "town",
        {"val": open_files("town", root=str(tmp_path), train=False, folder=folder)},
        root=str(tmp_path),
        out=str(tmp_path),
    )
    assert not open_domain("town", **options | {"folder": folder})[0]["label"].any()
    with pytest.raises(ValueError, match=r"other classes or label ids than data.folder"):
        open_domain("town", **options | {"folder": dataclasses.replace(folder, id_map={7: 1})})


@pytest.fixture
def bucket(copied):
    """The records in an object store."""
    system = fsspec.filesystem("memory")
    place = f"/bucket-{uuid.uuid4().hex}"
    system.put(f"{copied}/", place, recursive=True)
    yield system, place
    system.rm(place, recursive=True)


def test_remote_records_are_fetched_once(written, bucket, capsys):
    """Records behind a URL read like local ones; a second run fetches only the metadata."""
    system, place = bucket
    remote = open_either("acdc/night", f"memory://{place}")
    assert "fetching" in capsys.readouterr().err
    local = open_either("acdc/night", written[1])
    assert_same((remote[i] for i in range(len(remote))), (local[i] for i in range(len(local))))
    for shard in system.glob(f"{place}/acdc/night/1.0.0/*array_record*"):
        if "train" in shard:
            system.rm(shard)
    assert_same([open_either("acdc/night", f"memory://{place}")[0]], [local[0]])
    assert capsys.readouterr().err == ""
    assert records.verify(f"memory://{place}/gta5/1.0.0") == []


def test_a_remote_shard_that_was_altered_is_named(bucket):
    """Fetched files are checked by digest; a domain without records is an error there."""
    system, place = bucket
    shard = sorted(system.glob(f"{place}/gta5/1.0.0/*array_record*"))[0]
    data = bytearray(system.cat_file(shard))
    data[-1] ^= 1
    system.pipe_file(shard, bytes(data))
    with pytest.raises(ValueError, match=rf"memory://{shard} is truncated or altered"):
        open_either("gta5", f"memory://{place}")
    with pytest.raises(FileNotFoundError, match="has no records of cityscapes"):
        open_either("cityscapes", f"memory://{place}")
    with pytest.raises(
        ValueError,
        match=(
            r"nosuch://bucket/gta5/1.0.0 cannot be opened: Protocol not known.*extras for gs://"
            r" \(gcs\)"
        ),
    ):
        open_either("gta5", "nosuch://bucket")


def test_a_store_without_its_package_is_told_what_to_install(monkeypatch):
    """The error names the extra to install."""

    def absent(path):
        raise ImportError("Install s3fs to access S3")

    monkeypatch.setattr(records, "url_to_fs", absent)
    with pytest.raises(
        ValueError,
        match=r's3://b/x cannot be opened: Install s3fs to access S3; `pip install "jaxdg\[s3\]"`',
    ):
        records.filesystem("s3://b/x")


def test_class_names_of_any_characters_are_kept(tmp_path):
    """Records of label maps and boxes keep them, read by this package and by TFDS."""
    names = ("road, route", "[red] a/b", "50 % & c_d #1", '道路 "x"')
    labels = LabelSet(names, palette(len(names)))
    image = np.zeros((8, 8, 3), np.uint8)
    none = np.zeros(1, bool)
    boxes = {
        "boxes": np.array([[0, 0, 4, 4]], np.float32),
        "classes": np.array([3], np.int32),
        "difficult": none,
        "crowd": none,
    }
    for truth in ({"label": np.full((8, 8), 3, np.uint8)}, boxes):

        class One:
            domain = "town a, [b]"

            def __init__(self, truth):
                self.labels = labels
                self.truth = truth

            def __len__(self):
                return 1

            def size(self, i):
                return 8, 8

            def name(self, i):
                return "/data/x.png"

            def __getitem__(self, i):
                return {"image": image, **self.truth}

        directory = prepare("town a, [b]", {"val": One(truth)}, root="/data", out=str(tmp_path))
        assert Path(directory).is_relative_to(tmp_path / "town a, [b]")
        found = records.open_records(
            str(tmp_path), "town a, [b]", train=False, boxes="boxes" in truth
        )
        assert found is not None
        assert found.labels.names == names
        features = tfds.builder_from_directory(directory).info.features
        kind = features["classes"].feature if "boxes" in truth else features["label"]
        assert tuple(kind.names) == names
