"""Lists of files to leave out: the forms of a line, its meaning, and refused lines."""

from pathlib import Path
import pickle
import re
import shutil
import unicodedata
import zipfile

import numpy as np
import pytest

from jaxdg.commands.prepare import prepare
from jaxdg.data import class_counts, records
from jaxdg.data.boxes import BoxOptions, open_box_files, open_boxes
from jaxdg.data.datasets import FolderOptions, StreetsOptions
from jaxdg.data.domains import open_domain, open_files
from jaxdg.data.skip import skip_list
from tests.data import trees
from tests.data.test_boxes import thing, write_voc, xml


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch) -> None:
    """Each test keeps its outcomes in a folder of its own."""
    monkeypatch.setenv("JAXDG_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def root(tmp_path) -> Path:
    """Four images of GTA5."""
    trees.make("gta5", tmp_path / "data", np.random.default_rng(0), count=4)
    return tmp_path / "data"


def listed(folder: Path, *lines: str | bytes) -> str:
    file = folder / "skip.txt"
    file.write_bytes(b"\n".join(line.encode() if isinstance(line, str) else line for line in lines))
    return str(file)


def left(
    root: Path, skip: str, domain: str = "gta5", folder: FolderOptions | None = None
) -> list[str]:
    """Names of the images that remain."""
    dataset = open_domain(
        domain, root=str(root), train=True, streets=StreetsOptions(), folder=folder, skip=skip
    )
    return [Path(dataset.name(i)).name for i in range(len(dataset))]


WITHOUT_2 = ["00001.png", "00003.png", "00004.png"]
FORMS = {
    "plain": "gta5/images/00002.png",
    "label": "gta5/labels/00002.png",
    "dot": "./gta5//images/00002.png",
    "blanks": "  gta5/images/00002.png \t",
    "Windows' line end": "gta5/images/00002.png\r",
    "quotes": '"gta5/images/00002.png"',
    "single quotes": "'gta5/images/00002.png'",
    "backslashes": "gta5\\images\\00002.png",
    "another root": "/mnt/old disk/data/gta5/images/00002.png",
    "a drive": '"D:\\data\\gta5\\images\\00002.png"',
    "the current folder": "data/gta5/labels/00002.png",
    "a byte order mark": "\ufeffgta5/images/00002.png",
    "UTF-16, as PowerShell writes": "# broken\r\ngta5/images/00002.png\r\n".encode("utf-16"),
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("kind", ["folders", "archives", "records"])
def test_a_line_is_taken_for_what_it_means(root, form, kind):
    """All forms of a line work, for an image or its label, in archives and in records."""
    if kind == "archives":
        shutil.rmtree(root)
        trees.make("gta5", root, np.random.default_rng(0), count=4, zipped=True)
    if kind == "records":
        recorded(root)
    assert left(root, listed(root.parent, FORMS[form])) == WITHOUT_2


def test_a_line_may_name_what_was_in_an_archive_and_is_unpacked(root):
    """A list made from archives works where they are unpacked, and beside them."""
    skip = listed(root.parent, "gta5/02_images.zip/images/00002.png")
    shutil.rmtree(root)
    trees.make("gta5", root, np.random.default_rng(0), count=4, zipped=True)
    assert left(root, skip) == WITHOUT_2
    for archive in (root / "gta5").glob("*.zip"):
        zipfile.ZipFile(archive).extractall(root / "gta5")
    assert left(root, skip) == WITHOUT_2


def test_links_and_composition_do_not_matter(root):
    """A line may lead through a link, and its letters may be composed otherwise than on disk."""
    (root / "gta5/photos").symlink_to("images")
    assert left(root, listed(root.parent, "gta5/photos/00002.png")) == WITHOUT_2
    name = "Zu\u0308rich.png"
    for kind in ("images", "labels"):
        (root / f"gta5/{kind}/00002.png").rename(root / f"gta5/{kind}/{name}")
    assert name not in left(
        root, listed(root.parent, unicodedata.normalize("NFC", f"gta5/images/{name}"))
    )


@pytest.mark.parametrize(
    ("line", "told"),
    [
        (
            "gta5/images/0002.png",
            "'gta5/images/0002.png' is no file below ROOT (nearest is gta5/images/00002.png)",
        ),
        ("gta5/image/00002.png", "(nearest is gta5/images/00002.png)"),
        ("gta5\\image\\00002.jpg", "(nearest is gta5/images/00002.png)"),
        ("images/00002.png", "(nearest is gta5/images/00002.png)"),
        ("/other/root/acdc/1.png", "'/other/root/acdc/1.png' is no file below ROOT;"),
        ("gta5/images", "is a folder, and a line names one file"),
        ("gta5/images/00002.png # cut", "is no file below ROOT (nearest is gta5/images/00002.png)"),
    ],
)
def test_a_line_that_names_nothing_is_an_error(root, line, told):
    """The error has the file, the line, its number and the nearest path, for boxes too."""
    skip = listed(root.parent, "# broken", "", "gta5/images/00001.png", line)
    for opening in (lambda: left(root, skip), lambda: skip_list(skip, str(root))):
        with pytest.raises(ValueError, match="correct these lines or delete them") as error:
            opening()
        assert str(error.value).startswith(f"data.skip: {skip}, line 4: ")
        assert told.replace("ROOT", str(root)) in str(error.value)
    with pytest.raises(ValueError, match="line 4: "):
        open_boxes("acdc/night", root=str(root), train=True, skip=skip)


def test_a_run_is_evaluated_where_its_source_is_not(root):
    """Lines about the absent source are no errors; other lines must still name a file."""
    options = {"root": str(root), "streets": StreetsOptions(), "folder": None}
    elsewhere = ("synthia/RGB/1.png", "/train/root/synthia/RGB/2.png", "gta5/images/00002.png")
    skip = listed(root.parent, *elsewhere)
    for _ in range(2):
        assert len(open_domain("gta5", train=False, skip=skip, **options)) == 3
        with pytest.raises(ValueError, match=r"line 1: 'synthia/RGB/1\.png' is no file"):
            open_domain("gta5", train=True, skip=skip, **options)
        recorded(root, both=True)
    with pytest.raises(ValueError, match=r"line 4: 'gta5/images/2\.png' is no file"):
        open_domain(
            "gta5",
            train=False,
            skip=listed(root.parent, *elsewhere, "gta5/images/2.png"),
            **options,
        )


def test_a_list_serves_all_datasets_below_a_root(root):
    """A file of another dataset or without partner is no mistake; the first mistakes are told."""
    trees.make("acdc", root, np.random.default_rng(1))
    other = next((root / "acdc/gt/fog/train").rglob("*.png")).relative_to(root)
    trees.write(root / "gta5", "images/readme.txt", b"")
    assert (
        left(
            root, listed(root.parent, str(other), "gta5/images/readme.txt", "gta5/images/00002.png")
        )
        == WITHOUT_2
    )
    with pytest.raises(
        ValueError,
        match=(
            r"line 1: .*; line 2: .*; line 3: .*; and lines 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, \.\.;"
            r" correct"
        ),
    ):
        left(root, listed(root.parent, *(f"gta5/images/{i}.jpg" for i in range(20))))


def recorded(root: Path, domain: str = "gta5", both: bool = False) -> None:
    """Writes records of the files below a root, and leaves nothing else there."""
    if not (root / domain / "images").is_dir() and not [*(root / domain).glob("*.zip")]:
        return
    dataset = open_files(domain, root=str(root), train=True, folder=None)
    prepare(
        domain,
        {"train": dataset, **({"val": dataset} if both else {})},
        root=str(root),
        out=str(root.parent / "out"),
        shard_pixels=2 * 24 * 40,
    )
    shutil.rmtree(root)
    (root.parent / "out").rename(root)


def test_records_without_some_images_are_the_files_without_them(root):
    """Samples, sizes, names and fingerprints agree over shards and readers."""
    skip = listed(root.parent, "gta5/images/00002.png", "gta5/labels/00003.png")
    options = {"train": True, "streets": StreetsOptions(), "folder": None, "skip": skip}
    files = open_domain("gta5", root=str(root), **options)
    expected = (
        [files[i] for i in range(len(files))],
        [files.size(i) for i in range(len(files))],
        files.pairs.fingerprints,
    )
    recorded(root)
    found = open_domain("gta5", root=str(root), **options)
    assert isinstance(found, records.Records)
    assert (
        [found.name(i) for i in range(len(found))]
        == found.names()
        == ["gta5/images/00001.png", "gta5/images/00004.png"]
    )
    assert found.label_names() == ["gta5/labels/00001.png", "gta5/labels/00004.png"]
    assert [found.size(i) for i in range(2)] == expected[1]
    found = pickle.loads(pickle.dumps(found))  # as a worker process receives it
    counted = class_counts._content(found)
    other = open_domain(
        "gta5",
        root=str(root),
        **{
            **options,
            "skip": listed(root.parent, "gta5/images/00002.png", "gta5/images/00001.png"),
        },
    )
    assert class_counts._content(other) != counted  # which keys what was counted of the labels
    np.testing.assert_array_equal(found.fingerprints, expected[2])
    for i in range(2):
        for key, array in expected[0][i].items():
            np.testing.assert_array_equal(found[i][key], array)
            if key == "label":
                np.testing.assert_array_equal(found.truth(i)[key], array)
    with pytest.raises(
        ValueError, match=r"data\.skip leaves no image of .*/gta5/1\.0\.0; shorten the list"
    ):
        left(root, listed(root.parent, *(f"gta5/images/0000{i}.png" for i in range(1, 5))))


def test_records_refuse_lines_that_name_nothing(root):
    """A line must name an image or label of any records below the root."""
    items = trees.make("acdc", root, np.random.default_rng(1))
    night = next(item for item in items if item.domain == "acdc/night" and item.split == "train")
    for domain in ("gta5", "acdc/night"):
        dataset = open_files(domain, root=str(root), train=True, folder=None)
        prepare(domain, {"train": dataset}, root=str(root), out=str(root.parent / "records"))
    place = root.parent / "records"
    other = str(Path(night.label).relative_to(root))
    assert left(place, listed(root.parent, other, "gta5/images/00002.png")) == WITHOUT_2
    told = (
        r"line 2: 'gta5/images/0002\.png' is no file below /.*/records \(nearest is"
        r" gta5/images/00002\.png\); correct"
    )
    with pytest.raises(ValueError, match=told):
        left(place, listed(root.parent, other, "gta5/images/0002.png"))


def test_records_that_do_not_know_their_labels_say_so(root, monkeypatch):
    """Old records refuse the name of a label rather than ignore it."""
    dataset = open_files("gta5", root=str(root), train=True, folder=None)
    with monkeypatch.context() as patch:
        patch.setattr("jaxdg.commands.prepare.shards.ShardWriter._labels", lambda self, k: [])
        prepare("gta5", {"train": dataset}, root=str(root), out=str(root))
    assert left(root, listed(root.parent, "gta5/images/00002.png")) == WITHOUT_2
    with pytest.raises(
        ValueError,
        match=(
            r"'gta5/labels/00002\.png' is no image of its records, which do not know their labels;"
            r" name the"
        ),
    ):
        left(root, listed(root.parent, "gta5/labels/00002.png"))


def test_records_in_a_store_obey_the_list_too(root):
    """With `memory://` as data root the names are read from the records there."""
    import fsspec

    recorded(root)
    place = "memory://skipped"
    fsspec.filesystem("memory").put(str(root), "/skipped", recursive=True)
    assert left(place, listed(root.parent, "gta5/labels/00002.png")) == WITHOUT_2
    with pytest.raises(
        ValueError,
        match=(
            r"'gta5/images/002\.png' is no file below memory://skipped \(nearest is"
            r" gta5/images/00002\.png"
        ),
    ):
        left(place, listed(root.parent, "gta5/images/002.png"))
    fsspec.filesystem("memory").rm("/skipped", recursive=True)


@pytest.mark.parametrize("stored", [False, True], ids=["files", "records"])
@pytest.mark.parametrize(
    "line", ["pets/VOC2007/JPEGImages/b.jpg", "pets\\VOC2007\\Annotations\\b.xml"]
)
def test_boxes_obey_the_list(tmp_path, line, stored):
    """A line may name a VOC image or its XML file, in files and in records."""
    root = tmp_path / "data"
    own = BoxOptions(classes=("cat", "dog"))
    write_voc(
        root / "pets/VOC2007",
        {name: xml(thing("dog", 1, 1, 9, 9)) for name in "abc"},
        trainval=["a", "b", "c"],
    )
    place = root
    if stored:
        place = tmp_path / "records"
        dataset = open_box_files("pets", root=str(root), train=True, own=own)
        prepare("pets", {"train": dataset}, root=str(root), out=str(place))
    left_over = open_boxes(
        "pets", root=str(place), train=True, own=own, skip=listed(tmp_path, line)
    )
    assert [Path(left_over.name(i)).name for i in range(len(left_over))] == ["a.jpg", "c.jpg"]
    with pytest.raises(ValueError, match=re.escape("(nearest is pets/VOC2007/JPEGImages/b.jpg)")):
        open_boxes(
            "pets",
            root=str(place),
            train=True,
            own=own,
            skip=listed(tmp_path, "pets/VOC2007/JPEGImage/b.jpg"),
        )
