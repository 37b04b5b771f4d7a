"""The readers of the published datasets, checked with a second copy of the label tables."""

import dataclasses
from pathlib import Path
import pickle

import numpy as np
import pytest
import scipy.io

from jaxdg.data import published, storage
from jaxdg.data.datasets import FolderOptions, StreetsOptions
from jaxdg.data.domains import label_set, open_domain
from jaxdg.data.labels import CAMVID, CITYSCAPES
from tests.data import trees

ROAD_TO_BICYCLE = (
    "7>0 8>1 11>2 12>3 13>4 17>5 19>6 20>7 21>8 22>9 23>10 24>11 25>12 26>13 27>14 28>15 31>16"
    " 32>17 33>18"
)
VISTAS = (
    (
        "13,24,41>0 2,15>1 17>2 6>3 3>4 45,47>5 48>6 50>7 30>8 29>9 27>10 19>11 20,21,22>12 55>13"
        " 61>14 54>15 58>16 57>17 52>18"
    ),
    (
        "7,8,10,13,14,23,24>0 2,9,11,15>1 17>2 6>3 3>4 44,45,47>5 48>6 46,49,50>7 30>8 29>9 27>10"
        " 19>11 20,21,22>12 55>13 61>14 54>15 58>16 57>17 52>18"
    ),
)
TABLES = {
    "gta5": ROAD_TO_BICYCLE,
    "cityscapes": ROAD_TO_BICYCLE,
    "synthia": (
        "3>0 4>1 2>2 21>3 5>4 7>5 15>6 9>7 6>8 16>9 1>10 10>11 17>12 8>13 18>14 19>15 20>16 12>17"
        " 11>18"
    ),
    "mapillary": VISTAS[0],
    "wilddash2": (
        ROAD_TO_BICYCLE
        + " 34>14 35>13 38,41,43,61,64,70,74,75,76,79>0 45,46>5 47,48,49>12 52,65,77,80>1 56>3"
        " 58>17 78>9"
    ),
    "camvid": " ".join(f"{i}>{i}" for i in range(11)),
    **dict.fromkeys(("bdd100k", "acdc", "dark_zurich"), " ".join(f"{i}>{i}" for i in range(19))),
}


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """Each test has an index folder of its own."""
    monkeypatch.setenv("JAXDG_CACHE", str(tmp_path / "cache"))


def opened(domain: str, root: Path, train: bool = False, **options):
    return open_domain(
        domain, root=str(root), train=train, streets=StreetsOptions(), folder=None, **options
    )


def slowly_mapped(ids: np.ndarray, table: str) -> np.ndarray:
    """Train ids by a dictionary look-up of each pixel."""
    train_ids = {
        int(i): int(train)
        for entry in table.split()
        for i, train in [entry.split(">")]
        if "," not in entry
    } | {
        int(i): int(entry.split(">")[1])
        for entry in table.split()
        if "," in entry
        for i in entry.split(">")[0].split(",")
    }
    return np.array([[train_ids.get(int(i), 255) for i in row] for row in ids], np.uint8)


def check(dataset, items: list[trees.Item], table: str) -> None:
    """Checks that the dataset holds exactly these items, pixels and mapped labels."""
    assert len(dataset) == len(items)
    expected = {item.image: item for item in items}
    for i in range(len(dataset)):
        item = expected.pop(dataset.name(i))
        sample = dataset[i]
        assert dataset.size(i) == item.ids.shape
        np.testing.assert_array_equal(sample["image"], item.pixels)
        assert sample["label"].dtype == np.uint8
        np.testing.assert_array_equal(
            sample["label"], slowly_mapped(item.ids, table) if item.split != "test" else 255
        )


@pytest.mark.parametrize("zipped", [False, True], ids=["folder", "zip"])
@pytest.mark.parametrize("name", trees.NAMES)
def test_every_split_of_every_dataset_is_read_as_downloaded(tmp_path, name, zipped):
    """Images, pairs, splits and labels from folders and archives equal the written ones."""
    items = trees.make(name, tmp_path, np.random.default_rng(1), zipped=zipped)
    for train in (True, False):
        split = "train" if train else "val"
        mine = [
            item for item in items if item.split in (split, "all") and item.domain.startswith(name)
        ]
        if mine:
            check(opened(name, tmp_path, train), mine, TABLES[name])
        else:
            assert (name, train) == ("dark_zurich", True)
    for domain in {item.domain for item in items} - {name}:
        check(
            opened(domain, tmp_path),
            [item for item in items if (item.domain, item.split) == (domain, "val")],
            TABLES[name],
        )


def test_zip_and_folder_give_the_same_samples(tmp_path):
    """The order is the same too, because it decides what a run trains on."""
    for name in trees.NAMES:
        datasets = []
        for zipped in (False, True):
            trees.make(name, tmp_path / str(zipped), np.random.default_rng(2), zipped=zipped)
            datasets.append(pickle.loads(pickle.dumps(opened(name, tmp_path / str(zipped)))))
        plain, archived = datasets
        assert len(plain) == len(archived) > 0
        for i in range(len(plain)):
            assert plain.size(i) == archived.size(i)
            for key in ("image", "label"):
                np.testing.assert_array_equal(plain[i][key], archived[i][key])
            assert storage.read(archived.name(i)) == Path(plain.name(i)).read_bytes()


@pytest.mark.parametrize("version", ["v1.2", "v2.0"])
@pytest.mark.parametrize("mapping", ["vltseg", "rein"])
def test_mapillary_by_both_mappings_from_both_releases(tmp_path, version, mapping):
    """Both class lists work; the later archive holds the earlier labels in another folder."""
    items = trees.make("mapillary", tmp_path, np.random.default_rng(3), version=version)
    if version == "v2.0":
        trees.write(tmp_path / "mapillary", "validation/v2.0/labels/_0CsX7o.png", b"other classes")
    table = VISTAS[mapping == "rein"]
    check(
        opened("mapillary", tmp_path, mapillary_labels=mapping),
        [item for item in items if item.split == "val"],
        table,
    )


def test_a_split_may_be_named(tmp_path):
    """cityscapes/test and acdc/test have no labels; acdc/night/train has the training images."""
    for name in ("cityscapes", "acdc"):
        items = trees.make(name, tmp_path, np.random.default_rng(4))
        check(
            opened(f"{name}/test", tmp_path),
            [item for item in items if item.split == "test"],
            TABLES[name],
        )
    night = [item for item in items if (item.domain, item.split) == ("acdc/night", "train")]
    check(opened("acdc/night/train", tmp_path), night, TABLES["acdc"])


def test_the_official_split_of_gta5(tmp_path):
    """gta5 is all images, gta5/val those in split.mat, counted from 1.

    Without that file the error names the alternative.
    """
    items = trees.make("gta5", tmp_path, np.random.default_rng(5), count=6)
    check(opened("gta5", tmp_path, train=True), items, TABLES["gta5"])
    with pytest.raises(
        FileNotFoundError,
        match=r"gta5/split\.mat does not exist; gta5/val needs it, gta5 is all images",
    ):
        opened("gta5/val", tmp_path)
    splits = {"train": [[2], [5]], "val": [[1], [6]], "test": [[3], [4]]}
    scipy.io.savemat(
        tmp_path / "gta5/split.mat",
        {f"{split}Ids": np.array(numbers) for split, numbers in splits.items()},
    )
    for split, numbers in splits.items():
        check(opened(f"gta5/{split}", tmp_path), [items[i - 1] for (i,) in numbers], TABLES["gta5"])
    check(opened("gta5", tmp_path, train=True), items, TABLES["gta5"])


def test_sources_are_mixed(tmp_path):
    """gta5+synthia shows every image of both by part; sources of other classes do not mix."""
    items = [
        item
        for name in ("gta5", "synthia")
        for item in trees.make(name, tmp_path, np.random.default_rng(6), count=3)
    ]
    both = opened("gta5+synthia", tmp_path, train=True)
    assert (both.domain, both.labels, len(both)) == ("gta5+synthia", CITYSCAPES, 6)
    assert [part.domain for part in both.parts] == ["gta5", "synthia"]
    assert [(both.at(i)[0].domain, both.at(i)[1]) for i in range(6)] == [
        (n, i) for n in ("gta5", "synthia") for i in range(3)
    ]
    for i, item in enumerate(items):
        assert (both.name(i), both.size(i)) == (item.image, item.ids.shape)
        np.testing.assert_array_equal(
            both[i]["label"], slowly_mapped(item.ids, TABLES[item.domain])
        )
        np.testing.assert_array_equal(both[i]["image"], item.pixels)
    trees.make("camvid", tmp_path, np.random.default_rng(7))
    with pytest.raises(
        ValueError,
        match=r"'gta5' and 'camvid' cannot be mixed, their classes differ: road, .* and sky, ",
    ):
        opened("gta5+camvid", tmp_path, train=True)
    assert label_set("camvid+camvid_dusk", None) == CAMVID


@pytest.mark.parametrize(
    ("name", "bad"),
    [
        ("gta5", 35), ("cityscapes", 34), ("synthia", 23), ("synthia", 256 + 3), ("bdd100k", 19),
        ("mapillary", 66), ("acdc", 254), ("dark_zurich", 20), ("wilddash2", 81), ("camvid", 12),
    ],
)  # fmt: skip
def test_an_id_that_a_dataset_does_not_have_is_an_error(tmp_path, name, bad):
    """The error names the file; 255 is always ignored, and every lower id is known."""
    items = {item.image: item for item in trees.make(name, tmp_path, np.random.default_rng(8))}
    item = items[opened(name, tmp_path).name(1)]
    at = 1
    encode = trees.KINDS[name].encode
    ids = item.ids.copy()
    ids[0, 0] = 255
    Path(item.label).write_bytes(encode(ids))
    assert opened(name, tmp_path)[at]["label"][0, 0] == 255
    ids[3, 5] = bad
    Path(item.label).write_bytes(encode(ids))
    with pytest.raises(
        ValueError, match=rf"{name}/.*png: 1 pixels have label ids outside the id map: {bad};"
    ):
        opened(name, tmp_path)[at]


@pytest.mark.parametrize("name", ["gta5", "cityscapes", "synthia"])
def test_colours_where_ids_are_due_are_refused(tmp_path, name):
    """The coloured picture beside the ids, and a 16-bit label cut to 8, are refused."""
    item = next(
        item
        for item in trees.make(name, tmp_path, np.random.default_rng(9))
        if item.split in ("val", "all")
    )
    Path(item.label).write_bytes(trees.encode(item.pixels, "PNG"))
    with pytest.raises(
        ValueError,
        match=rf"{name}/.*png: a label must be .* this one is (8-bit )?RGB; use the id files",
    ):
        opened(name, tmp_path)[0]


def test_a_pair_of_two_sizes_is_refused_until_it_is_skipped(tmp_path):
    """GTA5 has such pairs, which are all listed; a list of paths leaves them out."""
    items = trees.make("gta5", tmp_path, np.random.default_rng(10), count=6)
    for item in items[1:3]:
        Path(item.label).write_bytes(trees.indexed(item.ids[:-4]))
    Path(items[5].label).unlink()
    Path(items[4].image).write_bytes(b"")
    with pytest.raises(ValueError, match=r"data\.skip") as error:
        opened("gta5", tmp_path)
    sizes = ("labels/00002.png is 40x20 but its image is 40x24", "labels/00003.png is 40x20")
    for text in (*sizes, "images/00005.png: empty", "images/00006.png has no label"):
        assert text in str(error.value)
    skip = tmp_path / "skip list.txt"
    absolute = Path(items[2].label).resolve()
    lines = (
        "# sizes differ",
        "gta5/labels/00002.png",
        "",
        absolute,
        "gta5/images/00005.png",
        "./gta5//images/00006.png",
    )
    skip.write_text("\n".join(map(str, lines)))
    check(opened("gta5", tmp_path, skip=str(skip)), [items[0], items[3]], TABLES["gta5"])
    with pytest.raises(
        ValueError, match=r"00002\.png"
    ):  # the outcome above is not taken for that of another list
        opened("gta5", tmp_path)
    with pytest.raises(
        FileNotFoundError, match=r"data\.skip names /.*/nowhere\.txt, which does not exist"
    ):
        opened("gta5", tmp_path, skip=str(tmp_path / "nowhere.txt"))
    skip.write_text("\n".join(item.image for item in items))
    with pytest.raises(ValueError, match=r"data\.skip leaves no image of /.*/gta5"):
        opened("gta5", tmp_path, skip=str(skip))


def test_skipping_works_in_archives_and_with_a_relative_root(tmp_path, monkeypatch):
    """A list names members of archives by the paths in the errors."""
    items = trees.make("bdd100k", tmp_path, np.random.default_rng(11), zipped=True)
    monkeypatch.chdir(tmp_path.parent)
    first = next(item for item in items if item.split == "val")
    (tmp_path / "skip.txt").write_text(first.image)
    dataset = opened("bdd100k", Path(tmp_path.name), skip=str(tmp_path / "skip.txt"))
    assert [dataset.name(i) for i in range(len(dataset))] == [
        str(Path(items[-1].image).relative_to(tmp_path.parent))
    ]


def test_counts_and_names_are_those_of_the_publishers():
    """The numbers of images of datasets.md, and a domain for every condition."""

    def total(name, split):
        return sum(p.count for p in published.PUBLISHED[name].parts if p.split == split)

    assert [total(name, "all") for name in ("gta5", "synthia", "wilddash2")] == [24966, 9400, 4256]
    assert [total("gta5", split) for split in ("train", "val", "test")] == [12403, 6382, 6181]
    assert [total("cityscapes", split) for split in ("train", "val", "test")] == [2975, 500, 1525]
    assert [(total(name, "train"), total(name, "val")) for name in ("bdd100k", "mapillary")] == [
        (7000, 1000),
        (18000, 2000),
    ]
    assert [total("acdc", split) for split in ("train", "val", "test")] == [1600, 406, 2000]
    assert total("dark_zurich", "val") == 50
    assert sum(p.count for p in published.PUBLISHED["camvid"].parts) == 701
    assert published.PUBLISHED["acdc"].domains == (
        "acdc",
        "acdc/fog",
        "acdc/night",
        "acdc/rain",
        "acdc/snow",
    )
    assert published.PUBLISHED["camvid"].domains == ("camvid", "day", "dusk")


@pytest.mark.parametrize("domain", ["acdc/dusk", "cityscapes/nacht", "acdc/night/all", "gta"])
def test_domains_that_do_not_exist_are_refused_with_those_that_do(tmp_path, domain):
    """A misspelt condition or split is not taken for a folder of the user."""
    with pytest.raises(
        ValueError,
        match=(
            rf"unknown domain '{domain}'; known are clear, .*gta5, synthia, cityscapes,"
            r" .*acdc/night, "
        ),
    ):
        opened(domain, tmp_path)


def test_domains_without_training_images_say_so(tmp_path):
    """Dark Zurich is for evaluation only."""
    with pytest.raises(
        ValueError, match=r"'dark_zurich' is kept unseen and has no training images \(it has val\)"
    ):
        opened("dark_zurich", tmp_path, train=True)
    assert dataclasses.replace(FolderOptions()).classes == label_set("dark_zurich", None).names
