"""What was trained on is found by the images, whatever folders, archives, links, copies, records
and names they come in.
"""

import dataclasses
import json
import os
from pathlib import Path
import shutil
import zipfile

import numpy as np
from PIL import Image
import pytest

from jaxdg.commands.prepare import prepare
from jaxdg.data import index, records, storage
from jaxdg.data.boxes import BoxOptions, box_labels, open_box_files, open_boxes
from jaxdg.data.datasets import FolderOptions, StreetsOptions, Subset
from jaxdg.data.domains import label_set, open_domain, open_files
from jaxdg.evaluation import overlap
from jaxdg.evaluation.overlap import Images, TrainedOn, family, standings
from tests.data import trees


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch) -> None:
    """Each test keeps its outcomes in a folder of its own."""
    monkeypatch.setenv("JAXDG_CACHE", str(tmp_path / "cache"))


def write_images(
    folder: Path, count: int, seed: int, suffix: str = ".png", mode: str = "RGB"
) -> None:
    """Images of 12 x 16 pixels."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(seed)
    for i in range(count):
        shape = (12, 16, 3) if mode == "RGB" else (12, 16)
        Image.fromarray(rng.integers(0, 4, shape, np.uint8)).save(folder / f"{i}{suffix}")


def town(root: Path, name: str, count: int = 4, seed: int = 0) -> None:
    """The images and labels of a domain in folders."""
    write_images(root / "images" / name, count, seed)
    write_images(root / "labels" / name, count, seed, mode="L")


def copy(root: Path, name: str, new: str, some: int | None = None) -> None:
    """A domain with the images of another, perhaps some only, under other names."""
    for kind in ("images", "labels"):
        (root / kind / new).mkdir(parents=True)
        for i, file in enumerate(sorted((root / kind / name).iterdir())[:some]):
            shutil.copyfile(file, root / kind / new / f"copy_{i}{file.suffix}")


def opened(root: Path, domain: str, train: bool = False, **options):
    """Opens a domain; folders unless said otherwise."""
    return open_domain(
        domain,
        root=str(root),
        train=train,
        **{"streets": StreetsOptions(val_images=6), "folder": FolderOptions(), **options},
    )


def judged(root: Path, source: str, *domains: str, **options) -> tuple[dict[str, tuple], list[str]]:
    """(seen, number of judged images trained on, part of) of every domain, and what was said."""
    said: list[str] = []
    trained = TrainedOn.of(opened(root, source, train=True, **options), str(root))
    found = standings(
        trained, {name: opened(root, name, **options) for name in domains}, str(root), said.append
    )
    return {name: (s.seen, int(s.trained_on.sum()), s.part_of) for name, s in found.items()}, said


def test_domains_are_what_their_images_are(tmp_path):
    """Of source `a`: itself and a link to it are trained on, of another three of four; one with
    other images is unseen.
    """
    town(tmp_path, "a", 4, seed=1)
    town(tmp_path, "b", 4, seed=2)
    copy(tmp_path, "a", "half", some=3)
    town(tmp_path, "extra", 1, seed=3)
    for kind in ("images", "labels"):
        shutil.copy(tmp_path / kind / "extra" / "0.png", tmp_path / kind / "half" / "own.png")
        os.symlink("a", tmp_path / kind / "link")
    found, said = judged(tmp_path, "a", "a", "b", "half", "link")
    assert found == {
        "a": (True, 4, None),
        "b": (False, 0, None),
        "half": (True, 3, None),
        "link": (True, 4, None),
    }
    assert said == [
        "a: all of its 4 images are trained on; it counts as seen",
        "half: 3 of its 4 images are trained on; it counts as seen",
        "link: all of its 4 images are trained on; it counts as seen",
    ]


def test_a_folder_without_the_domain_in_its_path_is_one_domain(tmp_path):
    """Every name opens the same images, so none is unseen: what was rPD 100 is none."""
    town(tmp_path, "all", 3)
    folder = FolderOptions(images="images/all", labels="labels/all")
    found, _ = judged(tmp_path, "town_a", "town_a", "town_b", folder=folder)
    assert found == {"town_a": (True, 3, None), "town_b": (True, 3, None)}


def test_mixtures_are_their_parts(tmp_path):
    """A source of two domains has trained on both; a domain of an unseen and a seen one is seen,
    with the images of that.
    """
    for seed, name in enumerate("abc"):
        town(tmp_path, name, 2 + seed, seed)
    found, said = judged(tmp_path, "a+b", "b", "c", "c+a")
    assert found == {"b": (True, 3, None), "c": (True, 0, None), "c+a": (True, 2, None)}
    assert "c: all of its 4 images are in c+a too, which is seen; so it counts as seen" in said


def test_unseen_domains_do_not_count_twice(tmp_path):
    """Of two unseen domains with shared images the smaller is a part of the one that holds it, in
    either order, else the later one.
    """
    town(tmp_path, "a", 2, seed=1)
    town(tmp_path, "b", 4, seed=2)
    copy(tmp_path, "b", "half", some=2)
    copy(tmp_path, "b", "again")
    found, said = judged(tmp_path, "a", "half", "b", "again")
    assert found == {"half": (False, 0, "b"), "b": (False, 0, None), "again": (False, 0, "b")}
    assert said[1:] == [] or all(
        "counts as a part of it and not in the mean of unseen" in line for line in said
    )
    assert len(said) == 2
    assert judged(tmp_path, "a", "b", "half")[0] == {"b": (False, 0, None), "half": (False, 0, "b")}


def test_the_images_a_seen_domain_is_judged_on_are_seen(tmp_path):
    """A copy of the source's validation images, none of which is trained on, is no unseen domain;
    nor is what shares images with that.
    """
    folder = FolderOptions(images="images/{domain}_{split}", labels="labels/{domain}_{split}")
    for name, seed in (("a_train", 1), ("a_val", 2), ("b_val", 3), ("other_val", 4)):
        town(tmp_path, name, 3, seed)
    for kind in ("images", "labels"):
        shutil.copyfile(tmp_path / kind / "a_val" / "0.png", tmp_path / kind / "b_val" / "x.png")
        shutil.copytree(tmp_path / kind / "b_val", tmp_path / kind / "c_val")
        (tmp_path / kind / "c_val" / "x.png").unlink()
    found, _ = judged(tmp_path, "a", "a", "b", "c", "other", folder=folder)
    assert found == {
        "a": (True, 0, None),
        "b": (True, 0, None),
        "c": (True, 0, None),
        "other": (False, 0, None),
    }


@pytest.mark.parametrize("suffix", [".png", ".bmp", ".tiff", ".jpg", ".webp"])
def test_archives_and_folders_hold_the_same_images(tmp_path, suffix):
    """A member of an archive is the file that was packed, in any format, under another name and
    ending.
    """
    write_images(tmp_path / "images" / "a", 3, 0, suffix)
    write_images(tmp_path / "labels" / "a", 3, 0, mode="L")
    for kind in ("images", "labels"):
        with zipfile.ZipFile(tmp_path / f"{kind}_b.zip", "w", zipfile.ZIP_DEFLATED) as file:
            for path in (tmp_path / kind / "a").iterdir():
                file.write(
                    path, f"b/{path.stem}.jpg" if kind == "images" else f"b/{path.name}"
                )  # content decides, not the name
    found = [
        opened(tmp_path, "x", folder=FolderOptions(images=images, labels=labels))
        for images, labels in (("images/a", "labels/a"), ("images_b.zip/b", "labels_b.zip/b"))
    ]
    images = [Images.of(dataset, str(tmp_path)) for dataset in found]
    assert images[1].among(images[0]).all()
    assert images[0].among(images[1]).all()
    assert not set(images[0].files) & set(images[1].files)


def test_equal_fingerprints_are_looked_into(tmp_path, monkeypatch):
    """Uncompressed images that differ in one pixel between the bytes that are sampled: candidates
    that a look at the files refutes.
    """
    for name, pixel in (("a", 1), ("b", 2)):
        for kind, shape, suffix in (
            ("images", (300, 300, 3), ".bmp"),
            ("labels", (300, 300), ".png"),
        ):
            (tmp_path / kind / name).mkdir(parents=True)
            for i in range(3):
                pixels = np.zeros(shape, np.uint8)
                if kind == "images" and i < 2:
                    pixels[130, 170] = pixel
                Image.fromarray(pixels).save(tmp_path / kind / name / f"{i}{suffix}")
    a, b = (opened(tmp_path, name) for name in "ab")
    np.testing.assert_array_equal(a.pairs.fingerprints, b.pairs.fingerprints)
    assert Images.of(b, str(tmp_path)).among(Images.of(a, str(tmp_path))).tolist() == [
        False,
        False,
        True,
    ]


def test_many_equal_fingerprints_take_few_looks(tmp_path, monkeypatch):
    """Of 300 copied images 64 are compared byte by byte; on a second start no other is touched."""
    town(tmp_path, "a", 1)
    a = opened(tmp_path, "a")
    n = 300
    marks = np.arange(1, n + 1, dtype=np.uint64)

    def many(folder):
        return index.Pairs(
            [f"{folder}/{i}.png" for i in range(n)], [""] * n, np.ones((n, 2), np.int32), marks
        )

    read = []
    monkeypatch.setattr(storage, "read", lambda path: read.append(path) or b"")
    one, other = (
        Images.of(type(a)(d, many(f"/{d}"), a.table, a.labels), "/") for d in ("one", "other")
    )
    assert other.among(one).all()
    assert len(read) == 2 * overlap.CONFIRMED
    assert {"/one/0.png", "/other/299.png"} <= set(read)


def test_subsets_are_judged_by_the_whole_and_count_their_own(tmp_path):
    """`max_images`: whether a domain is seen does not hang on the images that were picked; how many
    were trained on does.
    """
    town(tmp_path, "a", 2, seed=1)
    town(tmp_path, "b", 6, seed=2)
    copy(tmp_path, "a", "c")
    for kind in ("images", "labels"):
        for file in (tmp_path / kind / "b").iterdir():
            shutil.copy(file, tmp_path / kind / "c" / f"x_{file.name}")
    trained = TrainedOn.of(opened(tmp_path, "a", train=True), str(tmp_path))
    some = Subset(opened(tmp_path, "c"), 4)  # images 0, 2, 4, 6 of 8; the first two are copies
    found = standings(trained, {"c": some}, str(tmp_path))["c"]
    assert found.seen
    assert found.trained_on.tolist() == [True, False, False, False]


@pytest.mark.parametrize(
    ("source", "domain", "same"),
    [
        *(
            (a, b, True)
            for a, b in (
                ("gta5/train", "gta5/val"),
                ("gta5", "gta5/train"),
                ("acdc", "acdc/night"),
                ("acdc/night", "acdc"),
            )
        ),
        *(
            (a, b, True)
            for a, b in (
                ("acdc/night", "acdc/fog"),
                ("cityscapes", "cityscapes/test"),
                ("site/a", "site/a"),
            )
        ),
        *(
            (a, b, False)
            for a, b in (
                ("camvid", "day"),
                ("day", "dusk"),
                ("camvid_day", "camvid"),
                ("clear", "night"),
            )
        ),
        *(
            (a, b, False)
            for a, b in (
                ("site/a", "site/b"),
                ("gta5", "synthia"),
                ("carla", "town05"),
                ("daytime_clear", "night_sunny"),
            )
        ),
    ],
)
def test_families(source, domain, same):
    """Splits and parts of a published dataset are its family; films of CamVid, appearances of the
    streets and own folders are not.
    """
    assert (family(source) == family(domain)) == same


def test_names_decide_where_no_images_are_known(tmp_path):
    """Without the source's images another part of its dataset is seen, anything else is not, and
    how many were trained on is unknown.
    """
    trees.make("acdc", tmp_path, np.random.default_rng(0))
    said = []
    domains = {name: opened(tmp_path, name) for name in ("acdc/fog", "clear")}
    found = standings(TrainedOn(("acdc/night",)), domains, str(tmp_path), said.append)
    assert {name: (s.seen, s.trained_on) for name, s in found.items()} == {
        "acdc/fog": (True, None),
        "clear": (False, None),
    }
    assert said == ["acdc/fog: of a dataset that is trained on (acdc/night); it counts as seen"]


def test_streets_are_told_by_world_and_appearance(tmp_path):
    """Training and validation streets, appearances, seeds and sizes share no picture; a domain
    shares all with itself.
    """
    options = {"streets": StreetsOptions(images=5, val_images=5)}
    clear = opened(tmp_path, "clear", True, **options)

    def same(**changes):
        return StreetsOptions(**{"images": 5, "val_images": 5, **changes})

    others = [
        opened(tmp_path, "clear", False, **options),
        opened(tmp_path, "night", True, **options),
    ]
    others += [
        opened(tmp_path, "clear", True, streets=same(seed=1)),
        opened(tmp_path, "clear", True, streets=same(size=(64, 128))),
    ]
    mine = Images.of(clear, "")
    assert mine.among(mine).all()
    assert not any(Images.of(other, "").among(mine).any() for other in others)


@pytest.mark.parametrize("old", [False, True])
@pytest.mark.parametrize("resize", [None, "6x8"])
def test_records_are_the_files_they_were_made_of(tmp_path, old, resize):
    """Records, resized ones too, share images with the files and with records of copies; older ones
    are told by the files' names.
    """
    root = tmp_path / "data"
    out = tmp_path / "records"
    town(root, "a", 3, seed=1)
    town(root, "b", 3, seed=2)
    copy(root, "a", "c")
    for name in "abc":
        prepare(
            name,
            {"val": open_files(name, root=str(root), train=False, folder=FolderOptions())},
            root=str(root),
            out=str(out),
            resize=resize,
        )
        if old:
            file = Path(records.folder(str(out), name)) / records.INDEX
            arrays = {
                key: value for key, value in np.load(file).items() if "fingerprints" not in key
            }
            with file.open("wb") as opened_file:
                np.savez(opened_file, **arrays)
            metadata = file.with_name(records.METADATA)
            metadata.write_text(json.dumps(changed_length(json.loads(metadata.read_text()), file)))
    files = {name: Images.of(opened(root, name), str(root)) for name in "abc"}
    written = {
        name: Images.of(records.open_records(str(out), name, train=False), str(out))
        for name in "abc"
    }

    def shares(x, y):
        return x.among(y).tolist()

    for one, other in ((files, written), (written, files), (written, written)):
        assert shares(one["a"], other["a"]) == [True] * 3
        assert shares(one["b"], other["a"]) == [False] * 3
        assert shares(one["c"], other["a"]) == [not old] * 3


def changed_length(metadata: dict, file: Path) -> dict:
    """Metadata of records whose index was written anew."""
    metadata["files"][records.INDEX] = [file.stat().st_size, records.digest(str(file))]
    return metadata


def test_boxes_are_told_by_their_images(tmp_path):
    """VOC and COCO files of the same images, copied and packed, share all of them; crowds alone are
    no truth, and that is known early.
    """
    write_images(tmp_path / "a", 3, 0, ".jpg")
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    box = "<bndbox><xmin>1</xmin><ymin>1</ymin><xmax>9</xmax><ymax>9</ymax></bndbox>"
    thing = f"<object><name>car</name>{box}</object>"
    for i in range(3):
        trees.write(
            tmp_path, f"a_xml/{i}.xml", f"<annotation>{thing if i else ''}</annotation>".encode()
        )
    images = [{"id": i, "file_name": f"{i}.jpg", "height": 12, "width": 16} for i in range(3)]
    for name, crowd in (("b", 0), ("crowd", 1)):
        content = {"images": images, "categories": [{"id": 1, "name": "car"}]}
        content["annotations"] = [
            {"id": 1, "image_id": 0, "category_id": 1, "bbox": [0, 0, 5, 5], "iscrowd": crowd}
        ]
        (tmp_path / f"{name}.json").write_text(json.dumps(content))

    def own(folder, annotations):
        return BoxOptions((folder,) * 2, (annotations,) * 2, ("", ""), ("car",))

    options = {"root": str(tmp_path), "train": False}
    voc, coco = (
        open_box_files("x", own=own(*where), **options)
        for where in (("a", "a_xml"), ("b", "b.json"))
    )
    for one, other in ((voc, coco), (coco, voc)):
        assert Images.of(one, str(tmp_path)).among(Images.of(other, str(tmp_path))).all()
    assert (voc.unlabelled, coco.unlabelled) == (False, False)
    assert open_box_files("x", own=own("b", "crowd.json"), **options).unlabelled


def test_what_was_trained_on_is_kept_and_read_elsewhere(tmp_path):
    """source.npz says domains, number, classes and label table; on another machine, below another
    root, copies are still known.
    """
    here = tmp_path / "here"
    there = tmp_path / "there"
    town(here, "a", 3, seed=1)
    trained = TrainedOn.of(opened(here, "a", True), str(here))
    trained.save(tmp_path)
    assert [path.name for path in tmp_path.glob("*source*")] == ["source.npz"]
    noted = TrainedOn.load(tmp_path)
    assert dataclasses.replace(noted, images=None) == dataclasses.replace(trained, images=None)
    assert (noted.domains, noted.count, noted.classes) == (("a",), 3, FolderOptions().classes)
    town(there, "a", 3, seed=9)  # another town of the name and the same file names
    shutil.copytree(here / "images" / "a", there / "images" / "b")
    shutil.copytree(here / "labels" / "a", there / "labels" / "b")
    domains = {name: opened(there, name) for name in "ab"}
    assert {
        n: int(s.trained_on.sum()) for n, s in standings(noted, domains, str(there)).items()
    } == {"a": 0, "b": 3}
    assert TrainedOn.load(there) is None
    (tmp_path / "source.npz").write_bytes(b"PK\3\4 cut")
    with pytest.raises(
        ValueError,
        match=r"source\.npz is damaged .*; delete it, and the run's own command writes it again",
    ):
        TrainedOn.load(tmp_path)
    other = opened(here, "a", True, folder=FolderOptions(id_map={0: 1}))
    assert TrainedOn.of(other, str(here)).table != trained.table


def test_a_model_was_trained_on_what_it_started_from_too(tmp_path):
    """`also` adds domains and images once; the run's own number stays."""
    town(tmp_path, "a", 3, seed=1)
    town(tmp_path, "b", 4, seed=2)
    copy(tmp_path, "a", "c", some=2)
    a, b, c = (TrainedOn.of(opened(tmp_path, name, True), str(tmp_path)) for name in "abc")
    both = b.also(a).also(c)
    assert (both.domains, both.count, len(both.images)) == (("b", "a", "c"), 4, 7)
    assert b.also(None) is b
    assert b.also(TrainedOn(("x",))).domains == ("b", "x")
    found = standings(both, {name: opened(tmp_path, name) for name in "abc"}, str(tmp_path))
    assert {name: int(s.trained_on.sum()) for name, s in found.items()} == {"a": 3, "b": 4, "c": 2}


@pytest.mark.parametrize(
    "name", ["", " ", "town+", "+town", "a++b", "a+a", "..", "a/../b", "town/", "/town", "."]
)
def test_names_that_open_other_domains_images_are_refused(tmp_path, name):
    """An empty name opens the folder of all domains, and so do `.` and `..`; each is refused in one
    line, for both tasks.
    """
    town(tmp_path, "a")
    own = BoxOptions(("{domain}",) * 2, ("{domain}",) * 2, ("", ""), ("car",))
    for attempt in (
        lambda: opened(tmp_path, name),
        lambda: label_set(name, FolderOptions()),
        lambda: open_files(name, root=str(tmp_path), train=True, folder=FolderOptions()),
        lambda: open_boxes(name, root=str(tmp_path), train=True, own=own),
        lambda: open_box_files(name, root=str(tmp_path), train=True, own=own),
        lambda: box_labels(name, own),
    ):
        with pytest.raises(
            ValueError,
            match=(
                r"^domain '.*' names .*(which is no domain's name; give one|one domain twice; name"
                r" each once).*$"
            ),
        ):
            attempt()


def test_the_films_of_camvid_as_they_are(data_path):
    """Of `day` 100 of 171 images are trained on by `camvid_day`, of `dusk` 62 of 124 by
    `camvid_dusk`; `camvid` shares none.
    """
    root = data_path("camvid").parent
    options = {"folder": None}
    expected = {
        "camvid_day": {"day": (True, 100), "dusk": (False, 0)},
        "camvid_dusk": {"day": (False, 0), "dusk": (True, 62)},
    }
    expected["camvid"] = {"day": (False, 0), "dusk": (False, 0)}
    for source, domains in expected.items():
        found, said = judged(root, source, source, "day", "dusk", **options)
        assert found == {
            source: (True, 0, None),
            **{name: (*entry, None) for name, entry in domains.items()},
        }
        seen = {name: n for name, (seen, n) in domains.items() if seen}
        assert said == [
            f"{k}: {n} of its {171 if k == 'day' else 124} images are trained on; it counts as seen"
            for k, n in seen.items()
        ]


def test_what_changed_since_the_last_start_is_told(tmp_path):
    """Another number of images, other images, other counts of classes: a sentence; other classes or
    another table: an error.
    """
    town(tmp_path, "a", 4)

    def of(**folder):
        return TrainedOn.of(
            opened(tmp_path, "a", True, folder=FolderOptions(**folder)), str(tmp_path)
        )

    began = dataclasses.replace(of(), pixels=(7, 5))
    began.save(tmp_path)
    before = TrainedOn.load(tmp_path)
    assert before is not None
    assert before.pixels == (7, 5)
    assert began.changes(before, "a") is None
    assert of().changes(before, "a") is None  # nothing is counted any more
    assert "labels with other numbers of pixels" in str(
        dataclasses.replace(began, pixels=(7, 6)).changes(before, "a")
    )
    with pytest.raises(
        ValueError,
        match=(
            r"trained on the classes road, .*, and now a has one, two, three, four; give another"
            r" --workdir"
        ),
    ):
        of(classes=("one", "two", "three", "four")).changes(before, "a")
    with pytest.raises(
        ValueError,
        match="the ids in the label files of a mean other classes than at the run's last start",
    ):
        of(id_map={0: 1, 1: 0, 2: 2, 3: 3}).changes(before, "a")
    for kind in ("images", "labels"):
        (tmp_path / kind / "a/3.png").unlink()
    assert "a has changed since the run's last start: 3 images instead of 4; from here on" in str(
        of().changes(before, "a")
    )
    write_images(tmp_path / "images/b", 1, seed=9)
    shutil.move(tmp_path / "images/b/0.png", tmp_path / "images/a/new.png")
    write_images(tmp_path / "labels/b", 1, seed=9, mode="L")
    shutil.move(tmp_path / "labels/b/0.png", tmp_path / "labels/a/new.png")
    assert "1 of its 4 images that were not there" in str(of().changes(before, "a"))
