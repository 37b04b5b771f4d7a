"""Protocols: sizes and windows written out by hand from the publishers' configurations, images
against OpenCV and slow loops.
"""

import dataclasses

import cv2
import numpy as np
from PIL import Image
import pytest

from jaxdg.data.labels import CITYSCAPES
from jaxdg.data.pipeline import eval_batches
from jaxdg.evaluation import protocols
from jaxdg.evaluation.protocols import part_of, protocol

CROP = {"gta5": (512, 512), "cityscapes": (1024, 1024)}


def of(name, domain, source):
    return protocol(name, domain, source, CROP[source], (64, 64))


@pytest.mark.parametrize(
    ("name", "domain", "source", "stored", "image", "label"),
    [
        ("native", "mapillary", "gta5", (2448, 3264), (2448, 3264), (2448, 3264)),
        # mmsegmentation's Resize keeps the ratio: 1280x720 fits into 1024x512 as 910x512.
        ("vltseg", "cityscapes", "gta5", (1024, 2048), (512, 1024), (1024, 2048)),
        ("vltseg", "bdd100k", "gta5", (720, 1280), (512, 910), (720, 1280)),
        ("vltseg", "acdc", "gta5", (1080, 1920), (540, 960), (1080, 1920)),
        ("vltseg", "acdc/night", "gta5", (1080, 1920), (540, 960), (1080, 1920)),
        ("vltseg", "mapillary", "gta5", (2448, 3264), (512, 683), (2448, 3264)),
        (
            "vltseg",
            "mapillary",
            "gta5",
            (4000, 1000),
            (1024, 256),
            (4000, 1000),
        ),  # portrait: the longer side counts
        ("vltseg", "cityscapes", "cityscapes", (1024, 2048), (1024, 2048), (1024, 2048)),
        ("vltseg", "bdd100k", "cityscapes", (720, 1280), (1024, 1820), (720, 1280)),
        ("vltseg", "acdc", "cityscapes", (1080, 1920), (1080, 1920), (1080, 1920)),
        ("rein", "cityscapes", "gta5", (1024, 2048), (512, 1024), (1024, 2048)),
        ("rein", "bdd100k", "gta5", (720, 1280), (720, 1280), (720, 1280)),
        ("rein", "acdc", "gta5", (1080, 1920), (540, 960), (1080, 1920)),
        ("rein", "mapillary", "gta5", (2449, 3265), (512, 683), (1224, 1632)),
        ("rein", "acdc", "cityscapes", (1080, 1920), (1080, 1920), (1080, 1920)),
        ("soma", "cityscapes", "gta5", (1024, 2048), (1024, 2048), (1024, 2048)),
        ("soma", "bdd100k", "gta5", (720, 1280), (720, 1280), (720, 1280)),
        ("soma", "acdc", "gta5", (1080, 1920), (540, 960), (1080, 1920)),
        ("soma", "mapillary", "gta5", (2449, 3265), (1024, 1365), (1224, 1632)),
        ("soma", "mapillary", "gta5", (3265, 2449), (1365, 1024), (1632, 1224)),
        # Its configurations for crops of 1024 enlarge BDD100K too.
        ("soma", "bdd100k", "cityscapes", (720, 1280), (1024, 1820), (720, 1280)),
        ("soma", "acdc/fog", "cityscapes", (1080, 1920), (1080, 1920), (1080, 1920)),
        ("tqdm", "cityscapes", "gta5", (1024, 2048), (1024, 2048), (1024, 2048)),
        ("tqdm", "bdd100k", "gta5", (720, 1280), (720, 1280), (720, 1280)),
        ("tqdm", "mapillary", "gta5", (2449, 3265), (1024, 1365), (2449, 3265)),
        ("mgrnet", "cityscapes", "gta5", (1024, 2048), (1024, 2048), (1024, 2048)),
        ("mgrnet", "bdd100k", "gta5", (720, 1280), (1024, 1820), (720, 1280)),
        ("mgrnet", "mapillary", "gta5", (2449, 3265), (1024, 1365), (2449, 3265)),
        ("mgrnet", "acdc", "gta5", (1080, 1920), (1080, 1920), (1080, 1920)),
        # Nobody's: the size of Cityscapes.
        ("mgrnet", "camvid", "gta5", (360, 480), (1024, 1365), (360, 480)),
        (
            "cityscapes_test",
            "cityscapes/test",
            "cityscapes",
            (1024, 2048),
            (1024, 2048),
            (1024, 2048),
        ),
        ("acdc_test", "acdc/test", "cityscapes", (1080, 1920), (1080, 1920), (1080, 1920)),
    ],
)
def test_sizes(name, domain, source, stored, image, label):
    """Image and label have the sizes of the published test pipelines, and `prepare` makes them."""
    p = of(name, domain, source)
    assert p.sizes(stored) == (image, label)
    sample = {"image": np.zeros((*stored, 3), np.uint8), "label": np.zeros(stored, np.uint8)}
    prepared = p.prepare(sample)
    assert (prepared["image"].shape, prepared["label"].shape) == ((*image, 3), label)


def test_windows_and_augmentation():
    """Strides are 426 of 512, 768 of 1024, Rein's 341 and 683, which SoMA and tqdm have too, and
    MGRNet's 320; scales are those of the submissions; native keeps the run's stride.
    """

    def get(name, source):
        return of(name, "cityscapes", source)

    assert get("vltseg", "gta5").stride == (426, 426)
    assert get("vltseg", "cityscapes").stride == (768, 768)
    assert get("rein", "gta5").stride == (341, 341)
    assert get("rein", "cityscapes").stride == (683, 683)
    assert get("soma", "gta5").stride == get("tqdm", "gta5").stride == (341, 341)
    assert get("soma", "cityscapes").stride == (683, 683)
    assert get("mgrnet", "gta5").stride == (320, 320)
    assert get("native", "gta5").stride == (64, 64)
    assert all(get(name, "gta5").window == (512, 512) for name in protocols.NAMES)
    assert get("cityscapes_test", "cityscapes").scales == (1.0, 1.25, 1.5, 1.75, 2.0, 2.25)
    assert get("acdc_test", "cityscapes").scales == (1.0, 1.25, 1.5, 1.75)
    assert (
        get("cityscapes_test", "gta5").scales
        == (0.5, 0.75, 1.0, 1.25, 1.5, 1.75)
        == get("acdc_test", "gta5").scales
    )
    servers = ("cityscapes_test", "acdc_test")
    assert [name for name in protocols.NAMES if get(name, "gta5").flip] == list(servers)
    assert all(
        get(name, "gta5").scales == (1.0,) for name in protocols.NAMES if name not in servers
    )

    def mixed(source):
        return protocol("vltseg", "acdc", source, (512, 512), (64, 64)).fit

    assert (mixed("gta5+synthia"), mixed("gta5+cityscapes")) == ((960, 540), (1920, 1080))
    assert protocol("vltseg", "cityscapes", "clear", (32, 64), (8, 8)).stride == (
        27,
        53,
    )  # other crops overlap as much


def test_subsets_of_synthia():
    """SYNTHIA as the only source has further means over the 16 and 13 classes that papers report;
    other sources have none.
    """
    p = protocol("vltseg", "cityscapes", "synthia", (512, 512), (64, 64))
    left = {name: [c for c in CITYSCAPES.names if c not in without] for name, without in p.without}
    assert {name: len(classes) for name, classes in left.items()} == {"16": 16, "13": 13}
    assert left["13"] == [
        "road", "sidewalk", "building", "traffic light", "traffic sign", "vegetation", "sky",
        "person", "rider", "car", "bus", "motorcycle", "bicycle",
    ]  # fmt: skip
    assert not of("vltseg", "cityscapes", "gta5").without


def test_images_are_opencvs_and_labels_untouched():
    """`vltseg` resizes an image as mmsegmentation does and leaves the label as stored; `native`
    leaves both.
    """
    rng = np.random.default_rng(0)
    sample = {
        "image": rng.integers(0, 256, (72, 128, 3), np.uint8),
        "label": rng.integers(0, 19, (72, 128), np.uint8),
    }
    prepared = of("vltseg", "bdd100k", "gta5").prepare(sample)
    np.testing.assert_array_equal(
        prepared["image"], cv2.resize(sample["image"], (910, 512), interpolation=cv2.INTER_LINEAR)
    )
    assert prepared["label"] is sample["label"]
    assert of("native", "bdd100k", "gta5").prepare(sample)["image"] is sample["image"]


@pytest.mark.parametrize(("name", "size"), [("rein", (683, 512)), ("soma", (1365, 1024))])
def test_rein_and_soma_halve_mapillary(name, size):
    """The label keeps every second pixel, counted from the second; the image is halved by Pillow's
    bicubic, then fitted.
    """
    rng = np.random.default_rng(1)
    sample = {
        "image": rng.integers(0, 256, (61, 80, 3), np.uint8),
        "label": rng.integers(0, 19, (61, 80), np.uint8),
    }
    prepared = of(name, "mapillary", "gta5").prepare(sample)
    rows = [int((i + 0.5) * 61 / 30) for i in range(30)]
    np.testing.assert_array_equal(prepared["label"], sample["label"][rows][:, 1::2])
    half = np.asarray(Image.fromarray(sample["image"]).resize((40, 30), Image.Resampling.BICUBIC))
    np.testing.assert_array_equal(
        prepared["image"], cv2.resize(half, size, interpolation=cv2.INTER_LINEAR)
    )


def test_parts():
    """A condition of ACDC is read off an image's path, in folders and in archives; no other domain
    has parts.
    """
    assert part_of("acdc", "/data/acdc/rgb_anon/fog/val/GP010475/a_rgb_anon.png") == "acdc/fog"
    assert (
        part_of(
            "acdc", "/night/acdc/rgb_anon_trainvaltest.zip/rgb_anon/snow/val/GP0/a_rgb_anon.png"
        )
        == "acdc/snow"
    )
    assert part_of("acdc/fog", "/data/acdc/rgb_anon/fog/val/GP010475/a_rgb_anon.png") is None
    assert part_of("camvid", "/data/camvid/val/0016E5_1.png") is None
    assert part_of("town", "/data/images/town/a.png") is None


class Sized:
    """Image i is full of the number i; sizes are given."""

    def __init__(self, sizes):
        self.sizes = sizes
        self.domain = "mapillary"
        self.labels = CITYSCAPES

    def __len__(self):
        return len(self.sizes)

    def size(self, i):
        return self.sizes[i]

    def name(self, i):
        return f"sized/{i}"

    def __getitem__(self, i):
        return {
            "image": np.full((*self.sizes[i], 3), i, np.uint8),
            "label": np.full(self.sizes[i], i % 19, np.uint8),
        }


def test_hundreds_of_sizes_make_few_shapes():
    """150 images of 150 sizes come once each, whole and in their corner, in a handful of shapes; as
    many of a shape as it needs.
    """
    rng = np.random.default_rng(2)
    heights = rng.permutation(np.arange(30, 180))
    sizes = [
        (int(h), int(h * ratio))
        for h, ratio in zip(heights, rng.choice([4 / 3, 16 / 9], 150), strict=True)
    ]
    assert len(set(sizes)) == 150
    p = protocol("vltseg", "mapillary", "clear", (32, 32), (16, 16))
    p = dataclasses.replace(p, fit=(96, 48))
    shapes = set()
    image_shapes = set()
    seen = []
    dataset = Sized(sizes)
    for batch in eval_batches(dataset, batch_size=4, protocol=p):
        shapes.add((batch["image"].shape, batch["label"].shape))
        image_shapes.add(batch["image"].shape)
        rows = (batch[key] for key in ("index", "mask", "image", "size", "label", "label_size"))
        for i, mask, image, (h, w), label, (lh, lw) in zip(*rows, strict=True):
            assert mask == (i >= 0)
            if i < 0:
                assert (label == 255).all()
                continue
            seen.append(int(i))
            assert ((h, w), (lh, lw)) == p.sizes(sizes[i])
            assert (image[:h, :w] == i).all()
            assert not image[h:].any()
            assert not image[:, w:].any()
            assert (label[:lh, :lw] == i % 19).all()
            assert (label[lh:] == 255).all()
            assert (label[:, lw:] == 255).all()
    assert sorted(seen) == list(range(150))
    assert len(image_shapes) <= 3  # for which the model compiles
    assert len(shapes) <= 24  # with those of the labels, for which only counting compiles


def test_one_size_is_not_padded():
    """Images of a common size arrive in arrays of that size."""
    batches = list(eval_batches(Sized([(45, 67)] * 5), batch_size=2))
    assert {(b["image"].shape, b["label"].shape) for b in batches} == {
        ((2, 45, 67, 3), (2, 45, 67))
    }
    np.testing.assert_array_equal(
        np.concatenate([b["index"] for b in batches]), [0, 1, 2, 3, 4, -1]
    )
