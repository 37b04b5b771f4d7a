"""The generated streets: exact, repeatable, varied, and different in each appearance."""

import hashlib
import subprocess
import sys

import cv2
import numpy as np
import pytest

from jaxdg.streets import shapes
from jaxdg.streets.draw import GROUND, SKY, Camera, Mesh, paint, rasterize
from jaxdg.streets.render import APPEARANCES, SMALLEST_BOX, render
from jaxdg.streets.traffic import PERSON, Street

SIZE = (128, 256)
BOXED = {6, 7, *range(11, 19)}
CASES = [(0, 0, "clear"), (0, 1, "night"), (3, 7, "rain"), (5, 2, "fog"), (1, 9, "dusk_rain")]


FACTS = """
import sys
import numpy as np
from jaxdg.streets.render import APPEARANCES, render
from jaxdg.streets.draw import paint, rasterize
from jaxdg.streets.traffic import Street

size, facts, depths, labels = (128, 256), {}, [], []
for index in range(400):
    street = Street(np.random.default_rng((0, index, 0)), size)
    raster = rasterize(street.mesh, street.camera)
    labels.append(raster.label.astype(np.uint8)[raster.ids])
    if index < 16:
        depths.append(paint(raster, street.camera).depth.reshape(size))
for name in APPEARANCES:
    facts[name] = np.stack([render(0, index, name, size).image for index in range(16)])
np.savez(sys.argv[1], labels=np.stack(labels), depths=np.stack(depths), **facts)
"""


@pytest.fixture(scope="module")
def facts(tmp_path_factory):
    """Labels of 400 scenes; pictures by appearance and depths of the first 16."""
    path = tmp_path_factory.mktemp("streets") / "facts.npz"
    # in a process of its own: the tests' runtime type checks make many small calls slow
    subprocess.run([sys.executable, "-c", FACTS, str(path)], check=True)
    return dict(np.load(path))


@pytest.fixture(scope="module")
def labels(facts):
    """Label maps of 400 scenes, uint8 [400, h, w]."""
    return facts["labels"]


@pytest.fixture(scope="module")
def pictures(facts):
    """Sixteen scenes: images as float [16, h, w, 3] by appearance, labels and depths [16, h, w]."""
    return (
        {name: facts[name].astype(float) for name in APPEARANCES},
        facts["labels"][:16],
        facts["depths"],
    )


def digest(cases=CASES) -> str:
    """A hash of everything that the scenes hold."""
    parts = hashlib.sha256()
    for seed, index, appearance in cases:
        scene = render(seed, index, appearance, SIZE)
        for array in (scene.image, scene.label, scene.boxes, scene.box_labels):
            parts.update(str((array.dtype, array.shape)).encode() + array.tobytes())
    return parts.hexdigest()


def test_another_process_renders_the_same_bits_and_needs_no_jax():
    """A fresh process renders the same scenes and imports neither jax nor flax."""
    code = (
        "import sys, hashlib; from jaxdg.streets.render import render\n"
        "parts = hashlib.sha256()\n"
        f"for seed, index, appearance in {CASES[::-1]}[::-1]:\n"
        f"    scene = render(seed, index, appearance, {SIZE})\n"
        "    for array in (scene.image, scene.label, scene.boxes, scene.box_labels):\n"
        "        parts.update(str((array.dtype, array.shape)).encode() + array.tobytes())\n"
        "print(parts.hexdigest(), 'jax' in sys.modules, 'flax' in sys.modules)"
    )
    output = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    ).stdout.split()
    assert output == [digest(), "False", "False"]
    assert digest(CASES[1:3]) == digest(CASES[1:3])  # what was rendered before leaves no trace


def test_seed_and_index_name_the_world():
    """Other seeds and other indices give other streets."""
    maps = {
        render(seed, index, "clear", SIZE).label.tobytes() for seed in (0, 1) for index in (0, 1, 2)
    }
    assert len(maps) == 6


@pytest.mark.parametrize("index", [0, 5, 11])
def test_an_appearance_changes_pixels_only(index):
    """Label map and boxes are the same in all five appearances; no two pictures are."""
    scenes = [render(0, index, appearance, SIZE) for appearance in APPEARANCES]
    for scene in scenes:
        assert scene.image.dtype == np.uint8
        assert scene.image.shape == (*SIZE, 3)
        np.testing.assert_array_equal(scene.label, scenes[0].label)
        np.testing.assert_array_equal(scene.boxes, scenes[0].boxes)
        np.testing.assert_array_equal(scene.box_labels, scenes[0].box_labels)
    for i, a in enumerate(scenes):
        for b in scenes[:i]:
            assert np.abs(a.image.astype(int) - b.image).mean() > 8


@pytest.mark.parametrize("index", range(8))
def test_boxes_are_tight_around_visible_pixels(index):
    """Boxes equal those of a plain loop over the objects' visible pixels; none is missing."""
    scene = render(2, index, "clear", SIZE)
    street = Street(np.random.default_rng((2, index, 0)), SIZE)
    raster = rasterize(street.mesh, street.camera)
    objects = raster.object[raster.ids]
    expected = []
    for number, label in enumerate(street.mesh.objects, 1):
        rows, columns = np.where(objects == number)
        if len(rows) >= SMALLEST_BOX:
            expected.append(([columns.min(), rows.min(), columns.max() + 1, rows.max() + 1], label))
            assert (scene.label[rows, columns] == label).all()
    assert {label for _, label in expected} <= BOXED
    assert set(np.unique(scene.label[objects == 0])).isdisjoint(
        BOXED
    )  # a thing's pixel belongs to an object
    np.testing.assert_array_equal(
        scene.boxes, np.array([box for box, _ in expected], np.float32).reshape(-1, 4)
    )
    np.testing.assert_array_equal(
        scene.box_labels, np.array([label for _, label in expected], np.int32)
    )


def test_every_class_is_there_to_be_learnt(labels):
    """In 100 scenes each class has at least 0.15 % of the pixels and is in 15 scenes."""
    assert labels.max() == 18  # nothing is ignored
    first = labels[:100]
    for k in range(19):
        assert (first == k).mean() > 0.0015, k
        assert ((first == k).reshape(100, -1).sum(1) >= 20).sum() >= 15, k


def test_the_layout_cannot_be_guessed(labels):
    """The most frequent class of each pixel over 300 scenes scores under 25 mIoU on 100 others."""
    counts = np.stack([(labels[:300] == k).sum(0) for k in range(19)])
    guess = np.broadcast_to(counts.argmax(0), labels[300:].shape).ravel()
    truth = labels[300:].ravel().astype(int)
    confusion = np.bincount(truth * 19 + guess, minlength=361).reshape(19, 19)
    iou = np.diag(confusion) / (confusion.sum(0) + confusion.sum(1) - np.diag(confusion))
    assert 100 * iou.mean() < 25, iou


@pytest.mark.parametrize("size", [(96, 192), (128, 128), (120, 300), (201, 333)])
def test_any_size(size):
    """Pictures of any size and shape are complete, with boxes inside."""
    for appearance in APPEARANCES:
        scene = render(4, 1, appearance, size)
        assert scene.image.shape == (*size, 3)
        assert scene.label.shape == size
        assert scene.boxes.shape == (len(scene.box_labels), 4)
        assert (scene.boxes[:, :2] >= 0).all()
        assert (scene.boxes[:, 2:] <= [size[1], size[0]]).all()
        assert (scene.boxes[:, :2] < scene.boxes[:, 2:]).all()


def test_the_street_does_not_depend_on_the_picture_size():
    """A picture twice as large shows the same street: nine pixels in ten keep their class."""
    for index in range(4):
        small = render(0, index, "clear", SIZE).label
        large = render(0, index, "clear", (256, 512)).label
        assert (small == large[::2, ::2]).mean() > 0.9


def test_perspective():
    """A person twice as far is half as tall, and stands where the pinhole equation says."""
    camera = Camera((400, 800), focal=400.0, position=(0.0, 0.0, 1.5))
    heights = []
    for distance in (6.0, 12.0, 24.0):
        mesh = Mesh()
        mesh.place(
            shapes.models()["person"][0],
            shapes.PALETTE,
            (0.0, distance),
            0.0,
            PERSON,
            distance,
            mesh.object(PERSON),
        )
        raster = rasterize(mesh, camera)
        rows = np.where((raster.label[raster.ids] == PERSON).any(1))[0]
        heights.append(rows.max() - rows.min())
        assert abs(rows.max() - (199.5 + 400 * 1.5 / distance)) <= 1.5  # feet on the ground
    assert abs(heights[0] - 400 * 1.79 / 6) <= 3  # a figure is 1.79 m tall, hair included
    assert abs(heights[0] / 2 - heights[1]) <= 2
    assert abs(heights[1] / 2 - heights[2]) <= 2


def test_depth_is_exact():
    """The depth of the ground is camera height x focal length / rows below the horizon.

    The depth of a wall ahead is its distance.
    """
    camera = Camera((200, 400), focal=200.0, position=(0.0, 0.0, 1.5))
    mesh = Mesh()
    mesh.polygon(
        [(-300, -5, 0), (300, -5, 0), (300, 300, 0), (-300, 300, 0)],
        (0.5, 0.5, 0.5),
        0,
        1e6,
        GROUND,
    )
    mesh.polygon([(-2, 20, 0), (2, 20, 0), (2, 20, 5), (-2, 20, 5)], (0.5, 0.5, 0.5), 2, 20.0)
    raster = rasterize(mesh, camera)
    label = raster.label[raster.ids]
    depth = paint(raster, camera).depth.reshape(200, 400)
    rows, columns = np.where(label == 0)
    assert len(rows) > 10_000
    assert (label == 2).sum() > 1000
    assert (label[:40] == SKY).all()
    below = rows > 103  # farther rows end with the ground's far edge
    np.testing.assert_allclose(
        depth[rows, columns][below], 1.5 * 200 / (rows - 99.5)[below], rtol=1e-4
    )
    np.testing.assert_allclose(depth[label == 2], 20.0, rtol=1e-4)


def test_night_and_dusk_are_dark(pictures):
    """Night has less than half the light of day, dusk lies between, and lamps stay bright."""
    images, label, _ = pictures
    mean = {name: image.mean() for name, image in images.items()}
    assert mean["night"] < 0.5 * mean["clear"]
    assert mean["night"] < mean["dusk_rain"] < 0.8 * mean["clear"]
    assert images["night"][label == SKY].mean() < 50 < 120 < images["clear"][label == SKY].mean()
    assert np.mean(images["night"].max(-1) > 200) > 0.002


def test_fog_follows_koschmieder(pictures):
    """Contrast with the air falls exponentially with depth, at about the drawn rate."""
    images, label, depth = pictures
    starts = np.array([6, 8, 10, 12.5, 16, 20])
    rates = []
    fits = []
    for image, kind, away in zip(images["fog"].mean(-1), label, depth, strict=True):
        bins = [image[(kind == 0) & (away > d) & (away < 1.25 * d)] for d in starts]
        if (kind == SKY).sum() > 500 and min(map(len, bins)) >= 40:
            gap = np.log(
                np.maximum(
                    [np.median(image[kind == SKY]) - np.median(pixels) for pixels in bins], 1
                )
            )
            fits.append(np.corrcoef(starts, gap)[0, 1])
            rates.append(-np.polyfit(1.12 * starts, gap, 1)[0])
    assert len(rates) >= 5
    assert np.median(fits) < -0.97, fits
    assert 0.04 < np.median(rates) < 0.11, rates


def test_rain_streaks_and_wet_ground(pictures):
    """Rain draws upright streaks and greys the sky; a wet road mirrors what stands above it."""
    images, label, _ = pictures
    upright = {}
    for name in (
        APPEARANCES
    ):  # how much more alike pixels are 2 rows apart than 2 columns apart, on roads and trees
        fine = [grey - cv2.blur(grey, (9, 9)) for grey in images[name].mean(-1)]
        seen = [
            cv2.erode(np.isin(kind, (0, 8)).astype(np.uint8), np.ones((7, 7))) > 0 for kind in label
        ]
        down = np.concatenate(
            [np.stack([g[:-2][m[:-2]], g[2:][m[:-2]]]) for g, m in zip(fine, seen, strict=True)], 1
        )
        across = np.concatenate(
            [
                np.stack([g[:, :-2][m[:, :-2]], g[:, 2:][m[:, :-2]]])
                for g, m in zip(fine, seen, strict=True)
            ],
            1,
        )
        upright[name] = np.corrcoef(down)[0, 1] - np.corrcoef(across)[0, 1]
    assert min(upright["rain"], upright["dusk_rain"]) > 0.15 + max(
        upright["clear"], upright["night"], upright["fog"]
    ), upright
    color = {name: np.ptp(images[name], axis=-1)[label == SKY].mean() for name in APPEARANCES}
    assert color["rain"] < 0.6 * color["clear"]
    road = [images[name].mean(-1)[label == 0] for name in ("rain", "fog")]
    assert road[0].std() / road[0].mean() > 1.2 * road[1].std() / road[1].mean()


def test_an_unknown_appearance_is_named():
    """The one-line message has the wrong name and the allowed ones."""
    with pytest.raises(ValueError, match="unknown appearance 'snow'") as error:
        render(0, 0, "snow")
    assert "\n" not in str(error.value)
    assert all(name in str(error.value) for name in APPEARANCES)
