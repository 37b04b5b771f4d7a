"""Opening domains: layouts, label tables, the start-up check and what a damaged file says."""

import dataclasses
import os
from pathlib import Path
import pickle
import struct
import time
import zlib

import cv2
import numpy as np
from PIL import Image
import pytest

from jaxdg.data.datasets import Dataset, FolderOptions, StreetsOptions
from jaxdg.data.domains import open_domain
from jaxdg.data.images import read_image, read_label
from jaxdg.data.labels import CAMVID, CITYSCAPES
from jaxdg.streets import render as scenes

CLASSES = FolderOptions(
    images="rgb/{domain}",
    labels="gt/{domain}",
    classes=("road", "sky"),
    id_map={7: 0, 23: 1},
    ignore=(0,),
)


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch) -> Path:
    """Each test has an index folder of its own."""
    monkeypatch.setenv("JAXDG_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def root(tmp_path) -> Path:
    """Two images of two sizes in nested folders, with labels of ids 7, 23 and 0.

    They are `root/rgb/town/{a,b/c}.jpg`.
    """
    rng = np.random.default_rng(0)
    for name, (h, w) in (("a", (20, 30)), ("b/c", (24, 16))):
        image, label = (
            tmp_path / "root" / kind / "town" / f"{name}{end}"
            for kind, end in (("rgb", ".jpg"), ("gt", ".png"))
        )
        for path in (image, label):
            path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (h, w, 3), dtype=np.uint8)).save(image)
        Image.fromarray(rng.choice([7, 23, 0], (h, w)).astype(np.uint8)).save(label)
    return tmp_path / "root"


def settle(root: Path) -> None:
    """Moves the times of all folders back, as if nothing had changed for a minute."""
    for folder, _, _ in os.walk(root):
        os.utime(folder, (time.time() - 60, time.time() - 60))


def open_town(root: Path, options: FolderOptions | None = CLASSES, domain: str = "town") -> Dataset:
    return open_domain(domain, root=str(root), train=True, streets=StreetsOptions(), folder=options)


def one_line(error: pytest.ExceptionInfo) -> str:
    assert "\n" not in str(error.value)
    return str(error.value)


def test_camvid_domains_are_the_benchmark_splits(data_path):
    """There are 305 training images, 101 in-domain, 171 and 124 unseen; no image is in two."""
    root = data_path("camvid").parent
    seen = []
    expected = {
        ("camvid", True): 305,
        ("camvid", False): 101,
        ("day", False): 171,
        ("dusk", False): 124,
    }
    sequences = {
        ("camvid", True): {"0016E5", "0006R0"},
        ("camvid", False): {"0016E5"},
        ("day", False): {"Seq05VD"},
        ("dusk", False): {"0001TP"},
    }
    for (domain, train), count in expected.items():
        dataset = open_domain(
            domain, root=str(root), train=train, streets=StreetsOptions(), folder=None
        )
        assert isinstance(dataset, Dataset)
        assert (len(dataset), dataset.domain, dataset.labels) == (count, domain, CAMVID)
        names = [dataset.name(i) for i in range(count)]
        assert {Path(n).name.split("_")[0] for n in names} == sequences[domain, train]
        seen += names
        assert {dataset.size(i) for i in range(count)} == {(360, 480)}
    assert len(set(seen)) == 701


def test_camvids_unseen_films_are_sources_of_their_own(data_path):
    """Each film is divided in time without loss or overlap, training images first."""
    root = str(data_path("camvid").parent)
    for domain, whole, (before, after) in (
        ("camvid_day", "day", (100, 71)),
        ("camvid_dusk", "dusk", (62, 62)),
    ):

        def opened(name, train):
            return open_domain(name, root=root, train=train, streets=StreetsOptions(), folder=None)

        def names(dataset):
            return [Path(dataset.name(i)).name for i in range(len(dataset))]

        first = names(opened(domain, True))
        last = names(opened(domain, False))
        assert (len(first), len(last)) == (before, after)
        assert sorted(first + last) == sorted(names(opened(whole, False)))
        assert max(first) < min(last)


def test_camvid_samples_equal_the_files_as_opencv_reads_them(data_path):
    """Image and label equal the files, in RGB and with void ignored; road is at the bottom."""
    dataset = open_domain(
        "day",
        root=str(data_path("camvid").parent),
        train=False,
        streets=StreetsOptions(),
        folder=None,
    )
    sample = dataset[3]
    path = Path(dataset.name(3))
    bgr = cv2.imread(str(path))
    np.testing.assert_allclose(
        sample["image"].astype(int), bgr[..., ::-1].astype(int), atol=3
    )  # decoders may round differently
    raw = cv2.imread(
        str(path.parent.parent / "testannot" / f"{path.stem}.png"), cv2.IMREAD_UNCHANGED
    )
    np.testing.assert_array_equal(sample["label"], np.where(raw == 11, 255, raw))
    assert np.bincount(sample["label"][-40:].ravel(), minlength=256).argmax() == CAMVID.names.index(
        "road"
    )


def test_unseen_domains_cannot_be_trained_on(data_path):
    """Asking for training images of an unseen CamVid domain is an error."""
    with pytest.raises(ValueError, match=r"'dusk' is kept unseen .* train on another"):
        open_domain(
            "dusk",
            root=str(data_path("camvid").parent),
            train=True,
            streets=StreetsOptions(),
            folder=None,
        )


def test_streets_are_the_rendered_scenes():
    """Train and validation differ, domains show the same worlds, sizes and counts are as set."""
    options = StreetsOptions(size=(32, 64), images=5, val_images=3, seed=4)
    domains = {}
    for domain in scenes.APPEARANCES:
        train, val = (
            open_domain(domain, root="nowhere", train=t, streets=options, folder=None)
            for t in (True, False)
        )
        assert (len(train), len(val), train.labels) == (5, 3, CITYSCAPES)
        assert (val.size(2), val.name(2)) == ((32, 64), f"streets/{domain}/2")
        assert val[2]["image"].shape == (32, 64, 3)
        assert val[2]["image"].dtype == val[2]["label"].dtype == np.uint8
        assert (train[2]["label"] != val[2]["label"]).any()
        domains[domain] = val[2]
    assert set(domains) == {"clear", "night", "rain", "fog", "dusk_rain"}
    for sample in domains.values():
        np.testing.assert_array_equal(sample["label"], domains["clear"]["label"])
    assert (domains["night"]["image"] != domains["clear"]["image"]).any()


def test_streets_train_and_validation_scenes_never_meet():
    """No seed's training scenes are another seed's validation scenes."""

    def seeds(train):
        return {
            open_domain(
                "clear", root="", train=train, streets=StreetsOptions(seed=s), folder=None
            ).seed
            for s in range(20)
        }

    assert len(seeds(True)) == len(seeds(False)) == 20
    assert not seeds(True) & seeds(False)


def test_folder_layout(root):
    """Nested folders pair by relative name, ids map, sizes are known, and the dataset pickles."""
    dataset = pickle.loads(pickle.dumps(open_town(root)))
    assert isinstance(dataset, Dataset)
    assert [Path(dataset.name(i)).relative_to(root).as_posix() for i in range(len(dataset))] == [
        "rgb/town/a.jpg",
        "rgb/town/b/c.jpg",
    ]
    assert [dataset.size(i) for i in range(2)] == [(20, 30), (24, 16)]
    assert dataset.labels.names == ("road", "sky")
    raw = np.array(Image.open(root / "gt/town/b/c.png"))
    np.testing.assert_array_equal(
        dataset[1]["label"], np.select([raw == 7, raw == 23], [0, 1], 255)
    )
    assert dataset[1]["image"].shape == (24, 16, 3)


def test_domain_names_may_be_paths_and_suffixes_trim_names(tmp_path):
    """A domain may be `town/night`, names may have suffixes, and a path may hold the split."""
    for kind, end, array in (
        ("rgb", "_rgb_anon.png", np.zeros((4, 6, 3))),
        ("gt", "_gt_trainIds.png", np.full((4, 6), 18)),
    ):
        path = tmp_path / kind / "town/night" / "val" / f"GP01_frame{end}"
        path.parent.mkdir(parents=True)
        Image.fromarray(array.astype(np.uint8)).save(path)
    Image.fromarray(np.zeros((4, 6), np.uint8)).save(path.parent / "GP01_frame_gt_color.png")
    options = FolderOptions(
        "rgb/{domain}/{split}", "gt/{domain}/{split}", "_rgb_anon.png", "_gt_trainIds.png"
    )
    dataset = open_domain(
        "town/night", root=str(tmp_path), train=False, streets=StreetsOptions(), folder=options
    )
    assert (len(dataset), dataset.labels) == (1, CITYSCAPES)
    assert (dataset[0]["label"] == 18).all()


def test_unknown_domain_lists_the_known_ones(root):
    """Without folder options the error lists the known domains and the field to set."""
    with pytest.raises(
        ValueError,
        match=r"unknown domain 'nigth'; known are clear, night, .*camvid, day, dusk.*data\.folder",
    ) as error:
        open_town(root, None, "nigth")
    one_line(error)


def test_missing_roots_and_folders_are_named(root):
    """The error has the absolute path and the setting."""
    with pytest.raises(
        FileNotFoundError,
        match=r"data root /.*/nowhere does not exist; set JAXDG_DATA or --config\.data\.root",
    ) as error:
        open_town(root / "nowhere")
    one_line(error)
    with pytest.raises(
        FileNotFoundError,
        match=r"folder /.*/rgb/village does not exist; check .*--config\.data\.root",
    ) as error:
        open_town(root, CLASSES, "village")
    one_line(error)
    with pytest.raises(FileNotFoundError, match=r"/.*/camvid should hold train, .* does not exist"):
        open_domain("camvid", root=str(root), train=True, streets=StreetsOptions(), folder=None)


def test_empty_folders_are_named(root):
    """A folder without images, or with other suffixes only, is refused."""
    (root / "rgb/void").mkdir()
    (root / "gt/void").mkdir()
    with pytest.raises(ValueError, match=r"folder /.*/rgb/void holds no .* image files"):
        open_town(root, CLASSES, "void")
    with pytest.raises(ValueError, match=r"folder /.*/gt/town holds no \*_ids\.png files"):
        open_town(root, dataclasses.replace(CLASSES, label_suffix="_ids.png"))


def test_files_without_partner_are_named_and_counted(root):
    """Of 12 images without labels the error names the first 10 and the total."""
    for i in range(12):
        Image.fromarray(np.zeros((4, 4, 3), np.uint8)).save(root / f"rgb/town/lone{i:02}.png")
    with pytest.raises(
        ValueError,
        match=(
            r"lone00\.png has no label \(\*\.png\); .*lone09\.png has no label .*; and 2 more \(12"
            r" in all\)"
        ),
    ) as error:
        open_town(root)
    assert "lone10" not in one_line(error)


def test_images_that_share_a_name_are_refused(root):
    """a.jpg and a.png cannot both pair with one label."""
    Image.fromarray(np.zeros((20, 30, 3), np.uint8)).save(root / "rgb/town/a.png")
    with pytest.raises(ValueError, match=r"a\.(jpg|png) and .*a\.(jpg|png) share a name"):
        open_town(root)


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-40])


def damage_header(path: Path) -> None:
    path.write_bytes(b"garbage" + path.read_bytes()[7:])


def test_the_start_up_check_names_every_damaged_file_at_once(root):
    """One error names a truncated JPEG, an unreadable file and a label of another size."""
    Image.fromarray(np.zeros((24, 17), np.uint8)).save(root / "gt/town/b/c.png")
    for name in ("d", "e"):
        Image.fromarray(np.zeros((50, 60, 3), np.uint8)).save(root / f"rgb/town/{name}.jpg")
        Image.fromarray(np.zeros((50, 60), np.uint8)).save(root / f"gt/town/{name}.png")
    truncate(root / "rgb/town/a.jpg")
    truncate(root / "gt/town/e.png")
    damage_header(root / "rgb/town/d.jpg")
    with pytest.raises(ValueError, match="fetch these files again") as error:
        open_town(root)
    message = one_line(error)
    assert "rgb/town/a.jpg: truncated (no JPEG end marker)" in message
    assert "gt/town/b/c.png is 17x24 but its image is 16x24" in message
    assert "rgb/town/d.jpg: unreadable" in message
    assert "gt/town/e.png: truncated (no PNG end chunk)" in message


def test_the_index_saves_the_check_until_a_folder_changes(root, cache, monkeypatch):
    """The second start reads no image file; a new file in any folder is noticed."""
    settle(root)
    first = open_town(root)
    opened = []
    real = Image.open
    monkeypatch.setattr(Image, "open", lambda *a, **k: opened.append(a) or real(*a, **k))
    second = open_town(root)
    assert not opened
    assert second.pairs.images == first.pairs.images
    assert second.pairs.labels == first.pairs.labels
    np.testing.assert_array_equal(second.pairs.sizes, first.pairs.sizes)
    for kind, end in (("rgb", "jpg"), ("gt", "png")):
        Image.fromarray(np.zeros((5, 6), np.uint8)).save(root / kind / "town/b" / f"new.{end}")
    assert len(open_town(root)) == 3
    assert len(opened) == 6
    assert not list(cache.glob("*.tmp"))


def test_folders_that_changed_a_moment_ago_are_not_cached(root, cache):
    """A file that arrives within the resolution of the clock is not missed."""
    open_town(root)
    assert not cache.exists()


def test_a_damaged_or_unwritable_index_is_no_error(root, cache, monkeypatch):
    """The check runs again if the index is damaged, and goes on if it cannot be written."""
    settle(root)
    open_town(root)
    (path,) = cache.iterdir()
    whole = path.read_bytes()
    for rubbish in (b"", b"[]", whole[:-50], whole[:200], whole[:300] + b"0000" + whole[304:]):
        path.write_bytes(rubbish)
        assert len(open_town(root)) == 2
    blocker = root.parent / "file"
    blocker.write_text("")
    monkeypatch.setenv("JAXDG_CACHE", str(blocker / "cache"))
    assert len(open_town(root)) == 2


@pytest.mark.parametrize("kind", ["rgb/town/a.jpg", "gt/town/a.png"])
@pytest.mark.parametrize(
    "harm",
    [truncate, damage_header, lambda path: path.unlink()],
    ids=["truncated", "garbage", "deleted"],
)
def test_a_file_damaged_after_the_check_is_named_when_read(root, kind, harm):
    """The error names the file and the remedy; a truncated JPEG never gives a half-grey picture."""
    dataset = open_town(root)
    harm(root / kind)
    with pytest.raises(ValueError, match=rf"{kind}: .*; fetch the file again") as error:
        dataset[0]
    one_line(error)
    dataset[1]


def test_damage_inside_a_png_is_named_when_read(root):
    """Bytes are flipped inside the compressed data; header and end are intact."""
    dataset = open_town(root)
    data = bytearray((root / "gt/town/a.png").read_bytes())
    data[60:80] = bytes(20)
    (root / "gt/town/a.png").write_bytes(data)
    with pytest.raises(ValueError, match=r"gt/town/a\.png: damaged .*; fetch the file again"):
        dataset[0]


@pytest.mark.parametrize("kind", ["rgb/town/a.jpg", "gt/town/a.png"])
def test_a_file_that_changed_its_size_is_named_when_read(root, kind):
    """Batches are planned with the sizes in the index, so they must still hold."""
    dataset = open_town(root)
    Image.fromarray(np.full((10, 30), 7, np.uint8)).save(root / kind)
    with pytest.raises(ValueError, match=rf"{kind} is 30x10 but was 30x20"):
        dataset[0]


def test_an_unknown_label_id_is_named_when_read(root):
    """The error has the file, the id and the two settings that accept it."""
    dataset = open_town(root, dataclasses.replace(CLASSES, id_map={7: 0}))
    with pytest.raises(
        ValueError,
        match=r"gt/town/a\.png: \d+ pixels .* 23; add .*data\.folder\.id_map.*data\.folder\.ignore",
    ) as error:
        dataset[0]
    one_line(error)


def test_an_id_map_beyond_the_classes_is_refused(root):
    """The error about a train id without class names the setting."""
    with pytest.raises(
        ValueError,
        match=(
            r"data\.folder\.id_map maps to train ids \[2\], but data\.folder\.classes has 2 classes"
        ),
    ):
        open_town(root, dataclasses.replace(CLASSES, id_map={7: 2}))


def png(
    path: Path, rows: list[bytes], width: int, depth: int, color: int, palette: bytes = b""
) -> Path:
    """A PNG written by its specification, so that the reader is tested without its own library."""

    def chunk(kind, data):
        return (
            struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        )

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, len(rows), depth, color, 0, 0, 0))
    body = chunk(b"IDAT", zlib.compress(b"".join(b"\0" + row for row in rows)))
    path.write_bytes(
        b"\x89PNG\r\n\x1a\n"
        + header
        + (chunk(b"PLTE", palette) if palette else b"")
        + body
        + chunk(b"IEND", b"")
    )
    return path


def test_labels_are_read_as_stored(tmp_path):
    """Palettes give indices, 16-bit values are complete, and 1, 2 and 4 bits are not stretched."""
    colors = bytes((128, 64, 128, 244, 35, 232, 70, 70, 70, 102, 102, 156))

    def read(*content):
        return read_label(str(png(tmp_path / "label.png", *content))).tolist()

    assert read([bytes((0, 3, 2))], 3, 8, 3, colors) == [[0, 3, 2]]
    assert read([bytes((0b00111001,))], 4, 2, 3, colors) == [[0, 3, 2, 1]]
    assert read([struct.pack(">3H", 0, 300, 65535)], 3, 16, 0) == [[0, 300, 65535]]
    assert read([bytes((0x0F, 0x29))], 4, 4, 0) == [[0, 15, 2, 9]]
    assert read([bytes((0b00111001,))], 4, 2, 0) == [[0, 3, 2, 1]]
    assert read([bytes((0b01011000,))], 5, 1, 0) == [[0, 1, 0, 1, 1]]
    with pytest.raises(
        ValueError, match=r"label\.png: a label must be a grey or palette image .* RGB"
    ):
        read([bytes(6)], 2, 8, 2)


def test_sixteen_bit_labels_map(root):
    """Ids above 255 are mapped by the table of a folder dataset."""
    label = np.full((20, 30), 1007, np.uint16)
    label[0] = 1023
    Image.fromarray(label).save(root / "gt/town/a.png")
    dataset = open_town(root, dataclasses.replace(CLASSES, id_map={1007: 0, 1023: 1}))
    np.testing.assert_array_equal(dataset[0]["label"], label == 1023)


def test_images_are_rgb_and_not_turned(tmp_path):
    """Grey images gain three channels; a rotation in the metadata is not applied."""
    grey = np.arange(12, dtype=np.uint8).reshape(3, 4)
    Image.fromarray(grey).save(tmp_path / "grey.png")
    np.testing.assert_array_equal(
        read_image(str(tmp_path / "grey.png")), np.repeat(grey[..., None], 3, -1)
    )
    turned = Image.fromarray(np.zeros((3, 4, 3), np.uint8))
    exif = turned.getexif()
    exif[0x0112] = 6  # orientation: rotate by 90 degrees
    turned.save(tmp_path / "turned.jpg", exif=exif)
    assert read_image(str(tmp_path / "turned.jpg")).shape == (3, 4, 3)
