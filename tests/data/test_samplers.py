"""Order of the examples: permutations, parts by weight, rare classes, and their statistics."""

import dataclasses
import os
from pathlib import Path
import pickle
import shutil
import time

import numpy as np
from PIL import Image
import pytest

from jaxdg.data import class_counts, samplers
from jaxdg.data.augment.transforms import Augmentation, random_crop
from jaxdg.data.cache import fingerprint
from jaxdg.data.class_counts import truth_ids
from jaxdg.data.datasets import Files, FolderOptions, Mixture, Streets, StreetsOptions
from jaxdg.data.domains import open_files
from jaxdg.data.index import Pairs
from jaxdg.data.labels import CAMVID, CITYSCAPES, LabelSet
from jaxdg.data.samplers import BLOCK, RareClasses, class_pixels, class_probabilities, make_sampler
from tests.data import trees


@dataclasses.dataclass
class Stripes:
    """Label maps of 20 x 50 pixels; `rows[i]` lists (class, pixels) of image i, the rest is 0."""

    rows: tuple[tuple[tuple[int, int], ...], ...]
    domain: str = "stripes"
    labels: LabelSet = CITYSCAPES
    table: np.ndarray = dataclasses.field(default_factory=lambda: np.arange(4))
    log: str = ""  # a file that notes each label read

    def __len__(self) -> int:
        return len(self.rows)

    def size(self, i: int) -> tuple[int, int]:
        return 20, 50

    def name(self, i: int) -> str:
        return f"{self.domain}/{i}"

    def __getitem__(self, i: int) -> dict[str, np.ndarray]:
        if self.log:
            with open(self.log, "a") as file:
                file.write(f"{i}\n")
        label = np.zeros(1000, np.uint8)
        at = 0
        for train_id, pixels in self.rows[i]:
            label[at : at + pixels] = train_id
            at += pixels
        return {"image": np.zeros((20, 50, 3), np.uint8), "label": label.reshape(20, 50)}


@pytest.fixture
def cache(tmp_path, monkeypatch) -> Path:
    """An empty cache."""
    monkeypatch.setenv("JAXDG_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def numbered(count: int, domain: str) -> Stripes:
    return Stripes(((),) * count, domain)


def test_a_mixture_without_weights_is_one_dataset():
    """Every image of every part comes once an epoch, in the order of one dataset."""
    mixture = Mixture([numbered(7, "a"), numbered(3, "b")])
    drawn = [make_sampler(mixture, seed=4)(p).image for p in range(30)]
    assert drawn == [make_sampler(numbered(10, "c"), seed=4)(p).image for p in range(30)]
    for epoch in range(3):
        assert sorted(drawn[10 * epoch : 10 * epoch + 10]) == list(range(10))


def test_parts_come_by_weight_each_image_once_a_pass():
    """9000 positions have the shares of the weights, and each part has whole permutations."""
    mixture = Mixture([numbered(7, "a"), numbered(100, "b"), numbered(3, "c")])
    sampler = make_sampler(mixture, seed=0, weights=(5.0, 3.0, 2.0))
    drawn = [mixture.at(sampler(p).image) for p in range(9000)]
    orders = {}
    for part, weight in zip(mixture.parts, (0.5, 0.3, 0.2), strict=True):
        images = [i for dataset, i in drawn if dataset is part]
        assert len(images) == pytest.approx(9000 * weight, rel=0.07)
        passes = [
            tuple(images[k : k + len(part)])
            for k in range(0, len(images) - len(part) + 1, len(part))
        ]
        assert all(sorted(one) == list(range(len(part))) for one in passes)
        assert len(part) < 5 or len(set(passes)) > 0.9 * len(passes)
        orders[part.domain] = passes
    # Which part comes next does not follow from the last.
    index = np.array([mixture.parts.index(dataset) for dataset, _ in drawn])
    assert abs(np.corrcoef(index[1:], index[:-1])[0, 1]) < 0.05


def test_weighted_draws_are_a_function_of_the_position():
    """Draws are the same backwards, in a pickled copy, and at a far position first."""
    mixture = Mixture([numbered(7, "a"), numbered(100, "b")])

    def fresh():
        return make_sampler(mixture, seed=9, weights=(1.0, 3.0))

    forward = fresh()
    backward = fresh()
    positions = [*range(0, 3 * BLOCK, 97), BLOCK - 1, BLOCK]
    expected = {p: forward(p) for p in positions}
    assert {p: backward(p) for p in reversed(positions)} == expected
    assert {p: pickle.loads(pickle.dumps(forward))(p) for p in positions[:5]} == {
        p: expected[p] for p in positions[:5]
    }
    other = make_sampler(mixture, seed=10, weights=(1.0, 3.0))
    assert [other(p) for p in range(50)] != [forward(p) for p in range(50)]


PIXELS = np.zeros((40, 19), np.int32)
PIXELS[:, 0] = 900
PIXELS[:10, 5] = 60
PIXELS[10:14, 12] = np.array([5, 30, 31, 90])
PIXELS[39, 18] = 45


def test_class_probabilities_are_daformers():
    """They are the softmax of (1 - frequency) / T in Python's arithmetic; 0 for absent classes."""
    total = PIXELS.sum()
    for temperature in (1.0, 0.1, 0.01):
        odds = {
            c: np.exp((1 - PIXELS[:, c].sum() / total - 1) / temperature) for c in (0, 5, 12, 18)
        }
        expected = [odds.get(c, 0.0) / sum(odds.values()) for c in range(19)]
        np.testing.assert_allclose(class_probabilities(PIXELS, temperature), expected, atol=1e-12)
    cold = class_probabilities(PIXELS, 0.01)
    assert cold[18] > cold[12] > cold[5] > 0.1 > 1e-9 > cold[0]
    assert class_probabilities(PIXELS, 1e-4).sum() == pytest.approx(1.0)  # nothing overflows


def test_rare_classes_are_drawn_with_images_that_show_enough():
    """Classes follow their probability, images are even, and the crop has a wanted class."""
    sampler = RareClasses((3,), PIXELS, 0.05, 30, CITYSCAPES.names)
    drawn = [sampler(p) for p in range(6000)]
    classes = np.array([draw.wanted.train_id for draw in drawn])
    np.testing.assert_allclose(
        np.bincount(classes, minlength=19) / 6000, class_probabilities(PIXELS, 0.05), atol=0.025
    )
    assert {draw.wanted.pixels for draw in drawn} == {30}
    for train_id, images in ((5, range(10)), (12, (11, 12, 13)), (18, (39,))):
        shown = np.bincount(
            [draw.image for draw in drawn if draw.wanted.train_id == train_id], minlength=40
        )
        assert set(np.flatnonzero(shown)) == set(images)
        assert shown[shown > 0].min() > 0.7 * shown[shown > 0].max()
    assert [sampler(p) for p in range(20)] == drawn[:20]


def test_a_class_without_images_is_refused():
    """A threshold that no image reaches, and labels without any class, are errors."""
    with pytest.raises(
        ValueError,
        match=(
            r"data.rare_class_min_pixels is 50, but no image shows more than 45 pixels of bicycle;"
            r" allowed: at most 45"
        ),
    ):
        RareClasses((0,), PIXELS, 0.1, 50, CITYSCAPES.names)
    with pytest.raises(ValueError, match="no label shows any class"):
        RareClasses((0,), 0 * PIXELS, 0.1, 50, CITYSCAPES.names)


ROWS = (((3, 100),), ((3, 10), (7, 400)), (), ((255, 990), (18, 10)))


@pytest.mark.parametrize("workers", [0, 2])
def test_pixels_are_counted_once(cache, tmp_path, workers):
    """Counts equal the drawn labels without ignored pixels; a second run reads nothing."""
    dataset = Stripes(ROWS, log=str(tmp_path / "log"))
    expected = np.zeros((4, 19), np.int32)
    for i, row in enumerate(ROWS):
        expected[i, 0] = 1000 - sum(n for _, n in row)
        for train_id, n in row:
            if train_id != 255:
                expected[i, train_id] = n
    np.testing.assert_array_equal(class_pixels(dataset, workers), expected)
    assert sorted(Path(dataset.log).read_text().split()) == list("0123")
    again = class_pixels(dataclasses.replace(dataset), workers)
    np.testing.assert_array_equal(again, expected)
    assert again.dtype == np.int32
    assert len(Path(dataset.log).read_text().split()) == 4
    assert len(list(cache.iterdir())) == 1


@pytest.mark.parametrize(
    "change",
    [
        {"table": np.arange(5)},
        {"labels": CAMVID},
        {"domain": "others"},
        {"rows": ROWS[:3]},
        "damaged",
    ],
)
def test_other_files_or_labels_are_counted_anew(cache, tmp_path, change):
    """Another label table, class list or list of files, or a damaged cache, counts again."""
    rows = tuple(tuple(x for x in row if x[0] != 18) for row in ROWS)
    dataset = Stripes(rows, log=str(tmp_path / "log"))
    expected = class_pixels(dataset)
    (file,) = cache.iterdir()
    if change == "damaged":
        file.write_bytes(file.read_bytes()[:-20])
    else:
        dataset = dataclasses.replace(dataset, **change)
    before = len(Path(dataset.log).read_text().split())
    got = class_pixels(dataset)
    assert len(Path(dataset.log).read_text().split()) == before + len(dataset)
    np.testing.assert_array_equal(got, expected[: len(dataset), : len(dataset.labels.names)])


def test_streets_of_another_seed_are_counted_anew(cache):
    """Scenes of another seed have the same names but their own counts."""
    for seed in (0, 1):
        streets = Streets("clear", StreetsOptions(seed=seed, images=2, size=(96, 192)), train=True)
        expected = [np.bincount(streets[i]["label"].ravel(), minlength=256)[:19] for i in range(2)]
        np.testing.assert_array_equal(class_pixels(streets), expected)


def masks(base: Path, domain: str, ids: list[int], archive: str = "") -> Files:
    """Writes a label map of each id and images, with old times."""
    for i, one in enumerate(ids):
        trees.write(
            base,
            f"{domain}/images/{i}.png",
            trees.encode(np.zeros((20, 50, 3), np.uint8), "PNG"),
            archive,
        )
        trees.write(base, f"{domain}/labels/{i}.png", trees.grey(np.full((20, 50), one)), archive)
    for path in base.rglob("*"):
        os.utime(path, ns=(10**18, 10**18))
    place = f"{archive}/" if archive else ""
    options = FolderOptions(
        f"{place}{{domain}}/images", f"{place}{{domain}}/labels", classes=("a", "b", "c")
    )
    return open_files(domain, root=str(base), train=True, folder=options)


@pytest.fixture
def read(monkeypatch) -> list[int]:
    """Receives the images whose labels are read."""
    read: list[int] = []
    monkeypatch.setattr(
        class_counts, "truth_ids", lambda dataset, i: read.append(i) or truth_ids(dataset, i)
    )
    return read


@pytest.mark.parametrize("archive", ["", "all.zip"])
def test_labels_corrected_in_place_are_counted_anew(cache, tmp_path, read, archive):
    """A label of the same name and size with other content and time is counted again.

    Unchanged labels are not read again.
    """
    base = tmp_path / "data"
    np.testing.assert_array_equal(
        class_pixels(masks(base, "town", [0, 1, 1], archive)),
        1000 * np.eye(3, dtype=int)[[0, 1, 1]],
    )
    files = masks(base, "town", [0, 1, 1], archive) if not archive else open_again(base, archive)
    assert sorted(read) == [0, 1, 2]
    class_pixels(files)
    assert len(read) == 3
    if archive:
        (base / archive).unlink()
    corrected = masks(base, "town", [0, 1, 2], archive)
    os.utime(
        base / archive if archive else corrected.pairs.labels[2], ns=(10**18, 10**18 + 1)
    )  # a nanosecond later
    np.testing.assert_array_equal(class_pixels(corrected), 1000 * np.eye(3, dtype=int))
    assert len(read) == 6


def open_again(base: Path, archive: str) -> Files:
    options = FolderOptions(
        f"{archive}/{{domain}}/images", f"{archive}/{{domain}}/labels", classes=("a", "b", "c")
    )
    return open_files("town", root=str(base), train=True, folder=options)


def test_another_project_of_the_same_relative_names_is_counted_anew(cache, tmp_path, monkeypatch):
    """Two folders with equal `data/town` but other ids have their own counts, also by a link."""
    options = FolderOptions("{domain}/images", "{domain}/labels", classes=("a", "b", "c"))

    def opened(root):
        return open_files("town", root=root, train=True, folder=options)

    for name, ids in {"one": [0, 1], "two": [0, 2]}.items():
        masks(tmp_path / name / "data", "town", ids)
        monkeypatch.chdir(tmp_path / name)
        np.testing.assert_array_equal(
            class_pixels(opened("data")), 1000 * np.eye(3, dtype=int)[ids]
        )
    for name, ids in {"one": [0, 1], "two": [0, 2]}.items():
        (tmp_path / "now").unlink(missing_ok=True)
        (tmp_path / "now").symlink_to(tmp_path / name / "data")
        np.testing.assert_array_equal(
            class_pixels(opened(str(tmp_path / "now"))), 1000 * np.eye(3, dtype=int)[ids]
        )
        for i in range(2):
            link = tmp_path / "linked/town/labels" / f"{i}.png"
            link.parent.mkdir(parents=True, exist_ok=True)
            link.unlink(missing_ok=True)
            link.symlink_to(tmp_path / name / f"data/town/labels/{i}.png")
        shutil.copytree(
            tmp_path / "one/data/town/images", tmp_path / "linked/town/images", dirs_exist_ok=True
        )
        np.testing.assert_array_equal(
            class_pixels(opened(str(tmp_path / "linked"))), 1000 * np.eye(3, dtype=int)[ids]
        )


def test_records_are_counted_by_their_digests(cache, tmp_path, read):
    """Copied records keep their counts; records with other labels have their own."""
    from jaxdg.commands.prepare import prepare
    from jaxdg.data.records import Records

    for name, ids in {"one": [0, 1], "two": [0, 2]}.items():
        where = prepare(
            "town",
            {"train": masks(tmp_path / name, "town", ids)},
            root=str(tmp_path / name),
            out=str(tmp_path / "out"),
        )
        np.testing.assert_array_equal(
            class_pixels(Records(where, "train")), 1000 * np.eye(3, dtype=int)[ids]
        )
        moved = shutil.move(where, tmp_path / f"moved_{name}")
        class_pixels(Records(str(moved), "train"))
    assert len(read) == 4


def test_a_fingerprint_of_half_a_million_files_takes_seconds(tmp_path):
    """It costs little more than a stat of each file, and threads do not change it.

    The time is extrapolated from 5 000 files.
    """
    (tmp_path / "a").mkdir()
    for i in range(5000):
        (tmp_path / "a" / f"{i}.png").write_bytes(b"")
    paths = [f"{tmp_path}/a/{i}.png" for i in range(5000)]
    start = time.perf_counter()
    first = fingerprint(paths)
    assert time.perf_counter() - start < 1
    assert fingerprint(paths) == first
    assert fingerprint(paths[::-1]) != first


def test_counting_reads_no_image(cache, tmp_path):
    """Labels are counted even if the images cannot be opened."""
    label = np.arange(6, dtype=np.uint8).reshape(2, 3) % 4
    Image.fromarray(label).save(tmp_path / "label.png")
    pairs = Pairs(
        [str(tmp_path / "absent.png")], [str(tmp_path / "label.png")], np.array([[2, 3]], np.int32)
    )
    files = Files("clear", pairs, np.arange(65536, dtype=np.int16) % 256, CITYSCAPES)
    np.testing.assert_array_equal(class_pixels(files)[0, :5], [2, 2, 1, 1, 0])


def test_a_cache_that_cannot_be_written_is_no_error(tmp_path, monkeypatch):
    """The counts are computed anyway."""
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("JAXDG_CACHE", str(tmp_path / "file" / "cache"))
    assert class_pixels(Stripes(ROWS)).sum() == 3 * 1000 + 10


def test_weighted_parts_draw_their_own_rare_classes(cache):
    """A class that is rare in one part and common in another is drawn by each part's statistics."""
    a = Stripes((((3, 500),), ((7, 20),)) * 5, "a")
    b = Stripes((((7, 500),), ((3, 20),)) * 5, "b")
    mixture = Mixture([a, b])
    sampler = make_sampler(mixture, seed=0, weights=(1.0, 1.0), temperature=0.01, min_pixels=20)
    drawn = [(mixture.at(sampler(p).image), sampler(p).wanted.train_id) for p in range(300)]
    assert {train_id for (part, _), train_id in drawn if part is a} == {7}
    assert {train_id for (part, _), train_id in drawn if part is b} == {3}
    assert all(i % 2 == 1 for (_, i), _ in drawn)
    joined = make_sampler(
        mixture, seed=0, temperature=0.01, min_pixels=20
    )  # in both together neither is rarer
    assert {joined(p).wanted.train_id for p in range(100)} == {3, 7}


def test_rare_classes_fill_the_crops(cache):
    """A class in the corner of one image of twenty shows in most of the crops."""
    dataset = Stripes((*(((3, 400),),) * 19, ((18, 100),)))
    shown = {}
    for temperature in (0.0, 0.01):
        sampler = make_sampler(dataset, seed=0, temperature=temperature, min_pixels=60)
        crops = []
        for p in range(100):
            image, wanted = sampler(p)
            crops.append(
                random_crop(
                    dataset[image], Augmentation(crop=(10, 40)), np.random.default_rng(p), wanted
                )
            )
        shown[temperature] = np.mean([(crop["label"] == 18).sum() >= 60 for crop in crops])
    assert shown[0.0] < 0.05
    assert shown[0.01] > 0.6


def test_statistics_of_many_images_stay_small(cache, monkeypatch):
    """The sampler of 25 000 images of 19 classes takes under 4 MB, pickled too."""
    pixels = np.random.default_rng(0).integers(0, 30000, (25000, 19)).astype(np.int32)
    monkeypatch.setattr(samplers, "class_pixels", lambda dataset, workers: pixels)
    sampler = make_sampler(numbered(25000, "many"), seed=0, temperature=0.01, min_pixels=3000)
    assert len(pickle.dumps(sampler)) < 4e6


def test_an_empty_dataset_is_refused():
    """The error names the domain, also for a part of a mixture."""
    with pytest.raises(ValueError, match="domain 'none' has no images"):
        make_sampler(numbered(0, "none"), seed=0)
    with pytest.raises(ValueError, match="domain 'none' has no images"):
        make_sampler(
            Mixture([numbered(3, "some"), numbered(0, "none")]), seed=0, weights=(1.0, 1.0)
        )
