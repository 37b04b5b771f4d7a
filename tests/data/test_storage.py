"""Files in folders and in archives, what goes wrong with them, and the index at scale."""

import os
from pathlib import Path
import pickle
import shutil
import subprocess
import sys
import unicodedata
import zipfile

import numpy as np
import pytest

from jaxdg.data import index, storage
from jaxdg.data.datasets import FolderOptions, StreetsOptions
from jaxdg.data.domains import open_domain
from jaxdg.data.tree import Tree
from tests.data import trees


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch) -> Path:
    """Each test has an index folder of its own."""
    monkeypatch.setenv("JAXDG_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def opened(domain: str, root: Path, **options):
    return open_domain(
        domain, root=str(root), train=True, streets=StreetsOptions(), **{"folder": None, **options}
    )


def relative(files: dict[str, str], base: Path) -> dict[str, str]:
    return {name: str(Path(path).relative_to(base)) for name, path in files.items()}


def test_a_path_reads_the_same_from_folder_and_archive(tmp_path):
    """Stored and compressed members, other alphabets and folders ending in .zip are read."""
    names = ("a.png", "über uns/Straße 1.png", "道路/b c.png")
    with zipfile.ZipFile(tmp_path / "my archive.zip", "w") as archive:
        for i, name in enumerate(names):
            data = bytes(range(256)) * (i + 1)
            trees.write(tmp_path / "folder.zip", name, data)
            archive.writestr(name, data, zipfile.ZIP_DEFLATED if i else zipfile.ZIP_STORED)
    for i, name in enumerate(names):
        for base in ("my archive.zip", "folder.zip"):
            assert storage.read(f"{tmp_path}/{base}/{name}") == bytes(range(256)) * (i + 1)
    for base in (tmp_path / "my archive.zip", tmp_path / "folder.zip"):
        assert storage.subfolders(str(base)) == ["über uns", "道路"]
        assert storage.is_folder(f"{base}/道路")
        assert not storage.is_folder(f"{base}/a.png")
        listed = {
            str(Path(parent, name).relative_to(base))
            for parent, files in storage.walk(str(base))
            for name in files
        }
        assert listed == set(names)


def test_folders_and_archives_of_a_dataset_are_one_tree(tmp_path):
    """Each may have a folder around it; unpacked files count, hidden ones do not."""
    base = tmp_path / "gta5"
    trees.write(base, "images/1.png", b"unpacked")
    trees.write(base, "images/.1.png", b"hidden")
    trees.write(base, "images/1.png", b"archived", "a.zip")
    trees.write(base, "images/2.png", b"2", "a.zip")
    trees.write(base, "images/x/3.png", b"3", "b.ZIP", "wrapped/")
    trees.write(base, "deep/images/4.png", b"4", "b.ZIP", "wrapped/")
    trees.write(base, "images/2.png", b"junk", "b.ZIP", "__MACOSX/")
    files = Tree(str(base)).files("pictures", "images")
    assert relative(files, base) == {
        "1.png": "images/1.png",
        "2.png": "a.zip/images/2.png",
        "x/3.png": "b.ZIP/wrapped/images/x/3.png",
    }
    assert [storage.read(path) for path in files.values()] == [b"unpacked", b"2", b"3"]
    trees.write(tmp_path / "voc", "Towns/images/1.png", b"1")
    trees.write(tmp_path / "voc", "More/images/2.png", b"2")
    assert relative(Tree(str(tmp_path / "voc")).files("images"), tmp_path / "voc") == {
        "2.png": "More/images/2.png",
        "1.png": "Towns/images/1.png",
    }


@pytest.mark.parametrize(
    ("put", "found"),
    [
        ("cityscapes/train/aachen/a.png", "cityscapes/train"),  # without the upper folder
        ("cityscapes/x/y/leftImg8bit/train/a.png", "cityscapes/x/y/leftImg8bit/train"),  # too deep
        ("leftImg8bit/train/a.png", "leftImg8bit/train"),  # beside the dataset's folder
        ("Cityscapes/leftImg8bit/train/a.png", "Cityscapes/leftImg8bit/train"),  # another spelling
        (
            "../cityscapes/leftImg8bit/train/a.png",
            "../cityscapes/leftImg8bit/train",
        ),  # a data root too deep
        ("../leftImg8bit/train/a.png", "../leftImg8bit/train"),  # a data root in the dataset
    ],
)
@pytest.mark.parametrize("there", [False, True], ids=["absent", "present"])
def test_a_wrong_folder_level_says_where_the_folder_is(tmp_path, put, found, there):
    """The error names both places, whether or not the dataset's own folder exists."""
    root = tmp_path / "data"
    root.mkdir()
    if there:
        (root / "cityscapes").mkdir(exist_ok=True)
    trees.write(root, put, b"")
    message = (
        rf"{root}/cityscapes should hold leftImg8bit/train, unpacked or in a zip archive, but (\S*)"
        r" was found instead; move it"
    )
    with pytest.raises(FileNotFoundError, match=message) as error:
        opened("cityscapes", root)
    assert "\n" not in str(error.value)
    assert os.path.realpath(str(error.value).split(" but ")[1].split()[0]) == os.path.realpath(
        root / found
    )


def test_a_wrong_folder_level_in_an_archive_is_found_too(tmp_path):
    """The error also lists the content of the folder if no place fits."""
    trees.write(tmp_path / "gta5", "a/b/images/1.png", b"", "all.zip")
    with pytest.raises(
        FileNotFoundError,
        match=r"should hold images, .* but /.*/gta5/all\.zip/a/b/images was found instead",
    ):
        opened("gta5", tmp_path)
    trees.write(tmp_path / "synthia", "LABELS/1.png", b"")
    with pytest.raises(
        FileNotFoundError,
        match=r"synthia should hold RGB, .*, but holds LABELS; fetch what is missing",
    ):
        opened("synthia", tmp_path)
    with pytest.raises(
        FileNotFoundError,
        match=r"mapillary should hold training/images, .*, but does not exist; check JAXDG_DATA",
    ):
        opened("mapillary", tmp_path)


def test_damaged_members_are_named_at_the_start_and_when_read(tmp_path):
    """A flipped byte, a truncated PNG in an archive and an absent member are errors by name."""
    items = trees.make("gta5", tmp_path, np.random.default_rng(0), zipped=True, count=4)
    dataset = opened("gta5", tmp_path)
    archive = tmp_path / "gta5/02_images.zip"
    with zipfile.ZipFile(archive, "w") as file:
        file.writestr("images/00002.png", trees.encode(items[1].pixels, "PNG"))
        file.writestr("images/00004.png", trees.encode(items[3].pixels, "PNG")[:-20])
    dataset[1]
    data = bytearray(archive.read_bytes())
    data[data.find(b"IDAT") + 30] ^= 1
    archive.write_bytes(data)
    with pytest.raises(
        ValueError,
        match=r"02_images\.zip/images/00002\.png: damaged \(Bad CRC-32 .*\); fetch the file again",
    ):
        dataset[1]
    with pytest.raises(ValueError, match="fetch these files again") as error:
        opened("gta5", tmp_path)
    assert "02_images.zip/images/00002.png: damaged (Bad CRC-32" in str(error.value)
    assert "02_images.zip/images/00004.png: truncated (no PNG end chunk)" in str(error.value)
    trees.write(tmp_path / "gta5", "images/other.png", b"", "03_images.zip")
    (tmp_path / "gta5/03_images.zip").replace(archive)
    with pytest.raises(
        ValueError, match=r"00002\.png: unreadable \(the archive has no such member\)"
    ):
        dataset[1]
    archive.write_bytes(data[: len(data) // 2])
    with pytest.raises(
        ValueError, match=r"02_images\.zip: no complete zip archive \(.*\); fetch it again"
    ):
        opened("gta5", tmp_path)


def test_processes_open_archives_themselves(tmp_path):
    """A pickled dataset of archives holds text and tables only; a fresh process reads it."""
    trees.make("bdd100k", tmp_path, np.random.default_rng(0), zipped=True)
    dataset = opened("bdd100k", tmp_path)
    expected = dataset[1]["label"]
    (tmp_path / "dataset").write_bytes(pickle.dumps(dataset))
    code = (
        "import pickle, sys; sys.stdout.buffer.write(pickle.load(open(sys.argv[1],"
        " 'rb'))[1]['label'].tobytes())"
    )
    got = subprocess.run(
        [sys.executable, "-c", code, tmp_path / "dataset"], capture_output=True, check=True
    ).stdout
    assert got == expected.tobytes()


def test_the_index_knows_archives(tmp_path, monkeypatch):
    """The second start opens no archive; a changed or an additional one is noticed."""

    def settle(at: float) -> None:
        for path in (tmp_path / "gta5", *(tmp_path / "gta5").iterdir()):
            os.utime(path, (at, at))

    trees.make("gta5", tmp_path, np.random.default_rng(0), zipped=True, count=3)
    settle(1e9)
    first = opened("gta5", tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(storage, "_open", None)
        second = opened("gta5", tmp_path)
    assert second.pairs.images == first.pairs.images
    np.testing.assert_array_equal(second.pairs.sizes, first.pairs.sizes)
    item = trees.make("gta5", tmp_path / "other", np.random.default_rng(1), count=4)[3]
    for kind, path in (("images", item.image), ("labels", item.label)):
        trees.write(
            tmp_path / "gta5", f"{kind}/00004.png", Path(path).read_bytes(), f"02_{kind}.zip"
        )
    assert len(opened("gta5", tmp_path)) == 4
    settle(1.1e9)
    assert len(opened("gta5", tmp_path)) == 4
    for kind, path in (("images", item.image), ("labels", item.label)):
        trees.write(tmp_path / "gta5", f"{kind}/00005.png", Path(path).read_bytes(), "late.zip")
    assert len(opened("gta5", tmp_path)) == 5


def test_own_folders_may_be_in_an_archive_and_are_taken_literally(tmp_path):
    """`photos.zip/images` is read from the archive; a folder `images` one deeper is not."""
    image = trees.encode(np.zeros((4, 6, 3), np.uint8), "PNG")
    for kind, data in (("images", image), ("labels", trees.grey(np.full((4, 6), 3)))):
        trees.write(tmp_path, f"{kind}/a.png", data, "photos.zip")
        trees.write(tmp_path / "deeper", f"{kind}/a.png", data)
    options = FolderOptions("photos.zip/images", "photos.zip/labels")
    dataset = opened("mine", tmp_path, folder=options)
    assert dataset.name(0) == f"{tmp_path}/photos.zip/images/a.png"
    assert (dataset[0]["label"] == 3).all()
    with pytest.raises(FileNotFoundError, match=r"folder /.*/images does not exist"):
        opened("mine", tmp_path, folder=FolderOptions("images", "labels"))


def write_pair(root: Path, name: str, images: str = "images", labels: str = "labels") -> None:
    trees.write(root, f"{images}/{name}", trees.encode(np.zeros((4, 6, 3), np.uint8), "PNG"))
    trees.write(root, f"{labels}/{name}", trees.grey(np.full((4, 6), 3)))


def opened_own(root: Path, **options) -> list[str]:
    """The paths of the images of `images` and `labels`, relative to the root."""
    dataset = opened("mine", root, folder=FolderOptions("images", "labels"), **options)
    return [os.path.relpath(dataset.name(i), root) for i in range(len(dataset))]


HIDDEN = (
    ".a.png",
    "._b.png",
    ".ipynb_checkpoints/b-checkpoint.png",
    ".Trash-1000/files/b.png",
    "@eaDir/b.png/SYNOPHOTO_THUMB_M.png",
    "city/.AppleDouble/b.png",
    "__MACOSX/images/b.png",
    "lost+found/b.png",
    "$RECYCLE.BIN/b.png",
    "System Volume Information/b.png",
    "Thumbs.db",
    "desktop.ini",
)


@pytest.mark.parametrize("zipped", [False, True], ids=["unpacked", "zip"])
def test_hidden_and_system_entries_are_no_images_and_are_counted(tmp_path, zipped):
    """Their number and an example are told, in folders and archives, on one or both sides."""
    archive = "town.zip" if zipped else ""
    for kind in ("images", "labels"):
        for name in ("b.png", "city/c.png"):
            trees.write(tmp_path, f"{kind}/{name}", trees.grey(np.full((4, 6), 3)), archive)
        for name in HIDDEN[::2] if kind == "labels" else HIDDEN:
            trees.write(tmp_path, f"{kind}/{name}", b"junk", archive)
    base = tmp_path / archive
    tree = Tree(str(base), exact=True)
    pairs, defects = index.examine(
        tree, [("images", ("labels",))], image_suffix="", label_suffix=".png"
    )
    assert [os.path.relpath(path, base) for path in pairs.images] == [
        "images/b.png",
        "images/city/c.png",
    ]
    assert not defects
    (note,) = pairs.notes
    assert note.startswith(
        f"{len(HIDDEN) + len(HIDDEN[::2])} hidden or system entries skipped, such as {base}/images/"
    )


def test_a_hidden_archive_or_wrapper_is_no_part_of_a_dataset(tmp_path):
    """The file `._01_images.zip` that macOS leaves beside a copied archive is not an archive."""
    trees.make("gta5", tmp_path, np.random.default_rng(0), zipped=True)
    trees.write(tmp_path / "gta5", "._01_images.zip", b"resource fork")
    trees.write(tmp_path / "gta5", "__MACOSX/images/00001.png", b"junk")
    trees.write(tmp_path / "gta5", ".Trash/images/00001.png", b"junk")
    assert len(opened("gta5", tmp_path)) == 2


def test_links_are_followed_and_loops_end(tmp_path):
    """Each image is listed once, despite links up, to the folder itself, aside or in a circle."""
    root = tmp_path / "data"
    for name in ("1.png", "x/2.png", "x/deep/3.png"):
        write_pair(root, name)
    write_pair(tmp_path / "elsewhere", "4.png")
    for kind in ("images", "labels"):
        for link, target in (
            ("a", "."),
            ("up", ".."),
            ("top", "../.."),
            ("b", "x"),
            ("x/deep/back", "../../x"),
            ("x/self", "self"),
            ("far", tmp_path / "elsewhere" / kind),
            ("far2", tmp_path / "elsewhere" / kind),
        ):
            (root / kind / link).symlink_to(target)
    (tmp_path / "elsewhere/images/home").symlink_to(root / "images")
    assert opened_own(root) == [
        "images/1.png",
        "images/far/4.png",
        "images/x/2.png",
        "images/x/deep/3.png",
    ]
    passed = storage.SkippedEntries()
    assert len([*storage.walk(str(root / "images"), passed)]) == 4
    skipped = {os.path.relpath(path, root / "images") for path in passed.links}
    assert skipped == {"a", "up", "top", "b", "x/deep/back", "far2", "far/home"}
    (note,) = passed.notes()
    assert note == f"7 links skipped that lead to folders listed already, such as {root}/images/a"


def test_links_of_folders_and_files_still_lead_to_images(tmp_path):
    """The folders, a city in one and single files may all be links."""
    write_pair(tmp_path / "store", "1.png")
    write_pair(tmp_path / "store", "city/2.png")
    root = tmp_path / "data"
    for kind in ("images", "labels"):
        (root / "pool" / kind).mkdir(parents=True)
        (root / kind).symlink_to(root / "pool" / kind)
        (root / "pool" / kind / "town").symlink_to(tmp_path / "store" / kind / "city")
        (root / "pool" / kind / "one.png").symlink_to(tmp_path / "store" / kind / "1.png")
    assert opened_own(root) == ["images/one.png", "images/town/2.png"]


NAME = "Zu\u0308rich"  # decomposed, as macOS stored it


@pytest.mark.parametrize("zipped", [False, True], ids=["unpacked", "zip"])
def test_names_composed_differently_pair(tmp_path, zipped):
    """A decomposed image and a composed label are partners; paths stay as they are on disk."""
    archive = "photos.zip" if zipped else ""
    city = unicodedata.normalize("NFC", NAME)
    assert city != NAME
    image = trees.encode(np.zeros((4, 6, 3), np.uint8), "PNG")
    label = trees.grey(np.full((4, 6), 3))
    trees.write(tmp_path, f"{NAME} images/{NAME}/{city}.png", image, archive)
    trees.write(tmp_path, f"labels/{city}/{NAME}_{NAME}.png", label, archive)
    inside = f"{archive}/" if zipped else ""
    dataset = opened(
        "mine",
        tmp_path,
        folder=FolderOptions(f"{inside}{city} images", f"{inside}labels", "", f"_{city}.png"),
    )
    assert [os.path.relpath(dataset.name(i), tmp_path) for i in range(len(dataset))] == [
        f"{inside}{NAME} images/{NAME}/{city}.png"
    ]
    assert (dataset[0]["label"] == 3).all()


def test_names_that_differ_only_in_composition_are_an_error(tmp_path):
    """The names look alike, so the error shows how they differ."""
    city = unicodedata.normalize("NFC", NAME)
    for name in (NAME, city):
        write_pair(tmp_path, f"{name}.png")
    with pytest.raises(ValueError, match="differ only in how their letters are composed") as error:
        opened_own(tmp_path)
    assert "'Zu\\u0308rich.png'" in str(error.value)
    assert "'Z\\xfcrich.png'" in str(error.value)


def test_an_extension_in_capitals_is_the_same_extension(tmp_path):
    """`b.PNG` counts where suffixes are given; the rest of a suffix keeps its case."""
    for name in ("a_x.png", "b_x.PNG", "c_X.png"):
        write_pair(tmp_path, name)
    folder = FolderOptions("images", "labels", "_x.png", "_x.png")
    dataset = opened("mine", tmp_path, folder=folder)
    assert [Path(dataset.name(i)).name for i in range(len(dataset))] == ["a_x.png", "b_x.PNG"]
    trees.write(tmp_path, "images/a_x.PNG", b"")
    with pytest.raises(
        ValueError, match=r"a_x\.(png|PNG) and .*a_x\.(png|PNG) share a name; keep one"
    ):
        opened("mine", tmp_path, folder=folder)


def candidates(root: Path, first: str, second: str) -> None:
    """Opening names both files and says what to do."""
    with pytest.raises(
        ValueError, match="two candidates for the same place; keep one, and move the other"
    ) as error:
        opened("gta5", root)
    assert f"{root}/gta5/{first} and {root}/gta5/{second} are" in str(error.value)


def test_the_same_dataset_twice_is_an_error(tmp_path):
    """A copy one folder deeper, two wrappers, and an archive fetched twice are errors."""
    copied, wrapped, fetched, partly = (
        tmp_path / name for name in ("copied", "wrapped", "fetched", "partly")
    )
    trees.make("gta5", copied, np.random.default_rng(0), count=1)
    shutil.copytree(copied / "gta5", wrapped / "gta5/old")
    shutil.copytree(copied / "gta5", wrapped / "gta5/new")
    shutil.copytree(copied / "gta5", copied / "gta5/gta5 copy")
    candidates(copied, "images/00001.png", "gta5 copy/images/00001.png")
    candidates(wrapped, "new/images/00001.png", "old/images/00001.png")
    for root in (fetched, partly):
        trees.make("gta5", root, np.random.default_rng(0), zipped=True)
    shutil.copy(fetched / "gta5/01_images.zip", fetched / "gta5/01_images (1).zip")
    candidates(fetched, "01_images (1).zip/images/00001.png", "01_images.zip/images/00001.png")
    trees.write(partly / "gta5", "images/00002.png", b"other", "extra.zip")
    candidates(partly, "02_images.zip/images/00002.png", "extra.zip/images/00002.png")


def test_a_link_to_a_wrapper_is_no_second_dataset(tmp_path):
    """`current -> v2` beside `v2` leads to the same images."""
    trees.make("gta5", tmp_path / "made", np.random.default_rng(0))
    (tmp_path / "gta5").mkdir()
    shutil.move(tmp_path / "made/gta5", tmp_path / "gta5/v2")
    (tmp_path / "gta5/current").symlink_to("v2")
    assert len(opened("gta5", tmp_path)) == 2


def test_an_archive_beside_its_unpacked_folder(tmp_path):
    """Unpacked files of the archive's sizes are read, else the error names both sizes."""
    trees.make("gta5", tmp_path, np.random.default_rng(0), zipped=True)
    for archive in (tmp_path / "gta5").glob("*.zip"):
        zipfile.ZipFile(archive).extractall(tmp_path / "gta5")
    dataset = opened("gta5", tmp_path)
    assert [os.path.relpath(dataset.name(i), tmp_path) for i in range(2)] == [
        "gta5/images/00001.png",
        "gta5/images/00002.png",
    ]
    with open(tmp_path / "gta5/images/00002.png", "ab") as file:
        file.write(b"more")
    length = (tmp_path / "gta5/images/00002.png").stat().st_size
    wanted = (
        rf"gta5/images/00002\.png and .*/02_images\.zip/images/00002\.png differ: {length} and"
        rf" {length - 4} bytes; keep the right one"
    )
    with pytest.raises(ValueError, match=wanted):
        opened("gta5", tmp_path)


@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_a_member_twice_in_an_archive(tmp_path):
    """Members of the same name and bytes are one file; other bytes are an error."""
    trees.make("gta5", tmp_path, np.random.default_rng(0), zipped=True)
    with zipfile.ZipFile(tmp_path / "gta5/01_images.zip", "a") as archive:
        archive.writestr("images/00001.png", archive.read("images/00001.png"))
    assert len(opened("gta5", tmp_path)) == 2
    trees.write(tmp_path / "gta5", "images/00001.png", b"other", "01_images.zip")
    with pytest.raises(
        ValueError,
        match=(
            r"01_images\.zip/images/00001\.png is in its archive twice, with different contents;"
            r" unpack"
        ),
    ):
        opened("gta5", tmp_path)


def test_two_spellings_of_a_folder_are_two_candidates(tmp_path):
    """`night_sunny` and `Night-Sunny` are an error, unless one is a link to the other."""
    for name in ("night_sunny", "Night-Sunny"):
        trees.write(tmp_path, f"{name}/JPEGImages/1.jpg", b"")
    tree = Tree(str(tmp_path))
    with pytest.raises(ValueError, match="two candidates") as error:
        tree.files("night_sunny/JPEGImages", "night-sunny/JPEGImages", "Night-Sunny/JPEGImages")
    assert f"{tmp_path}/night_sunny/JPEGImages and {tmp_path}/Night-Sunny/JPEGImages are" in str(
        error.value
    )
    shutil.rmtree(tmp_path / "night_sunny")
    (tmp_path / "night_sunny").symlink_to("Night-Sunny")
    assert [*tree.files("night_sunny/JPEGImages", "Night-Sunny/JPEGImages")] == ["1.jpg"]


MILLION = """
import re, sys, time
from jaxdg.data import index
from jaxdg.data.tree import Tree

start = time.perf_counter()
tree = Tree(sys.argv[1], exact=True)
pairs = index.index_pairs(tree, [("images", ("labels",))], image_suffix="", label_suffix=".png")
seconds = time.perf_counter() - start
peak = re.search(r"VmHWM:\\s*(\\d+) kB", open("/proc/self/status").read())
print(len(pairs.images), pairs.labels[-1], seconds, int(peak[1]) / 1024)
"""


def test_the_second_start_with_a_million_files_is_quick_and_small(tmp_path, monkeypatch):
    """An index of 500 000 pairs is recalled in under 10 seconds and 400 MB."""
    base = tmp_path / "town"
    names = [f"city_{i // 1000:03}/frame_{i:09}_x.png" for i in range(500_000)]
    for folder in {f"{kind}/{name[:8]}" for kind in ("images", "labels") for name in names[::1000]}:
        (base / folder).mkdir(parents=True)
    for folder, _, _ in os.walk(base):
        os.utime(folder, (1e9, 1e9))

    def examine(tree, *_, **__):
        paths = (
            [f"{base}/{kind}/{name}" for name in names]
            for kind in ("images", "labels")
            if not tree.files(kind)
        )
        return index.Pairs(*paths, np.full((len(names), 2), 1052, np.int32)), []

    monkeypatch.setattr(index, "examine", examine)
    index.index_pairs(
        Tree(str(base), exact=True),
        [("images", ("labels",))],
        image_suffix="",
        label_suffix=".png",
    )
    done = subprocess.run(
        [sys.executable, "-c", MILLION, base], capture_output=True, text=True, check=True
    )
    count, last, seconds, megabytes = done.stdout.split()
    assert (int(count), last) == (500_000, f"{base}/labels/{names[-1]}")
    print(f"{seconds} s, {megabytes} MB")
    assert float(seconds) < 10
    assert float(megabytes) < 400
