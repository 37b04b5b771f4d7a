"""Detection as a whole: runs, evaluation of images of any size on any number of devices,
predictions, and what is refused.
"""

import dataclasses
import json
from pathlib import Path
from typing import Any

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image
import pytest
from safetensors.numpy import save_file

import jaxdg
from jaxdg import config, evaluate, predict
from jaxdg.backbones import VitConfig, zoo
from jaxdg.commands.prepare import prepare
from jaxdg.config import Config, MeshConfig, ModelConfig, validated
from jaxdg.data.boxes import CARLA, BoxOptions, open_box_files, open_boxes
from jaxdg.data.labels import LabelSet
from jaxdg.detection.arrays import Detected
from jaxdg.detection.fcos import FcosConfig
from jaxdg.detection.rcnn.detectors import RcnnConfig
from jaxdg.detection.rcnn.rpn import RpnConfig
from jaxdg.evaluation.average_precision import AveragePrecision, Curves, Detections, Truth
from jaxdg.evaluation.coco_format import read_coco
from jaxdg.tasks import detection as detection_task
from jaxdg.tasks import run_state as tasks
from jaxdg.training import sharding
from jaxdg.training.metrics import read_metrics
from jaxdg.training.step import TrainState, gradients
from tests import runs


def tiny(**changes) -> Config:
    """Streets of 48x96 pixels and a model that compiles in seconds; changes by dotted name."""
    c = Config(
        steps=6, batch_size=8, log_every=1, eval_every=6, checkpoint_every=2, task="detection"
    )
    c.model.encoder = "tiny8"
    c.data.crop = c.data.streets.size = (48, 96)
    c.data.scale = (0.7, 1.3)
    c.data.streets.images = 12
    c.data.streets.val_images = 3
    c.model.decoder = "fcos"
    c.model.fcos.channels = 8
    c.model.fcos.groups = 2
    c.model.fcos.convs = 1
    c.model.fcos.levels = (1, 2)
    c.optimizer.learning_rate = 1e-3
    c.optimizer.clip = 1.0
    c.evaluation.domains = ("clear", "fog")
    for field, value in changes.items():
        holder, _, name = field.replace("__", ".").rpartition(".")
        setattr(config.get(c, holder) if holder else c, name, value)
    return c


def start(c: Config, workdir: Path, steps: int = 10**6) -> None:
    """Trains in this process, on its eight devices."""
    runs.start(validated(c), workdir, steps)


@pytest.fixture(scope="module", autouse=True)
def small():
    """A small encoder in the zoo; what one run compiles serves the next."""
    zoo.ZOO["tiny8"] = zoo.Entry(VitConfig(width=16, depth=2, heads=2, patch_size=8, taps=(1,)))
    yield
    del zoo.ZOO["tiny8"]


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    """The workdir of a run that nothing disturbed."""
    workdir = tmp_path_factory.mktemp("detection") / "whole"
    start(tiny(), workdir)
    return workdir


def test_a_run_writes_losses_scores_and_boxes(whole):
    """Six steps: loss terms that add up, the entries of results.json, and detections and truth in
    COCO's form that score the same and have the stored curves.
    """
    rows = [row for row in read_metrics(whole) if "loss" in row]
    assert [row["step"] for row in rows] == list(range(1, 7))
    assert all(
        row["loss"] == pytest.approx(row["class"] + row["box"] + row["fit"], rel=1e-5)
        for row in rows
    )
    assert rows[-1]["class"] < rows[0]["class"]
    results = json.loads((whole / "results.json").read_text())
    assert (results["task"], results["source"], results["protocol"], results["step"]) == (
        "detection",
        "clear",
        "voc07",
        6,
    )
    assert results["mean_unseen"] == results["domains"]["fog"]["mAP50"]
    for domain in ("clear", "fog"):
        entry = results["domains"][domain]
        assert (entry["images"], entry["seen"], entry["part_of"]) == (3, domain == "clear", None)
        dataset = open_boxes(domain, root="", train=False, streets=config.load(whole).data.streets)
        files = [whole / "detections" / f"{domain}{end}.json" for end in ("_truth", "")]
        names, truths, detections = read_coco(*files)
        assert names == dataset.labels.names
        scores = AveragePrecision(names)
        for i, (truth, found) in enumerate(zip(truths, detections, strict=True)):
            np.testing.assert_array_equal(truth.boxes, dataset[i]["boxes"])
            assert len(found.scores) > 0
            scores.add(truth, found)
        expected = scores.results("voc07")
        assert {key: entry[key] for key in expected} == expected
        curves = Curves.read(whole, domain)
        again = scores.curves("voc07")
        for field in dataclasses.fields(curves):
            np.testing.assert_array_equal(getattr(curves, field.name), getattr(again, field.name))
        images, found = (json.loads(file.read_text()) for file in files)
        assert [image["file_name"] for image in images["images"]] == [
            f"streets/{domain}/{i}" for i in range(3)
        ]
        assert set(found[0]) == {"image_id", "category_id", "bbox", "score"}
    assert any(
        row.get("mAP50") == results["mean_unseen"] and row["domain"] == "fog"
        for row in read_metrics(whole)
        if "domain" in row
    )


def test_an_interrupted_run_goes_on_to_the_same_bits(whole, tmp_path, capsys):
    """3 + 3 steps are 6 steps: losses, scores and boxes."""
    start(tiny(), tmp_path / "parts", steps=3)
    assert "stopped at step 3" in capsys.readouterr().out
    start(tiny(), tmp_path / "parts")
    assert "resuming from step 3" in capsys.readouterr().out
    timed = ("seconds_per_step", "images_per_second")
    rows = [
        [{k: v for k, v in row.items() if k not in timed} for row in read_metrics(run)]
        for run in (whole, tmp_path / "parts")
    ]
    assert rows[0] == rows[1]
    results = [
        json.loads((run / "results.json").read_text()) for run in (whole, tmp_path / "parts")
    ]
    assert min(one.pop("device_hours") for one in results) > 0  # they took different times
    assert results[0] == results[1]
    for file in ("detections/clear.json", "detections/fog_truth.json"):
        assert (tmp_path / "parts" / file).read_bytes() == (whole / file).read_bytes()


def test_predict_finds_what_evaluation_found(whole, tmp_path):
    """`jaxdg.load` gives the boxes of detections/fog.json; those from the threshold up are written,
    in order, with an overlay.
    """
    c = config.load(whole)
    dataset = open_boxes("fog", root="", train=False, streets=c.data.streets)
    _, _, expected = read_coco(
        whole / "detections" / "fog_truth.json", whole / "detections" / "fog.json"
    )
    model = jaxdg.load(whole)
    for i in range(3):
        found = model.predict(dataset[i]["image"])
        assert isinstance(found, Detections)
        assert len(found.scores) == len(expected[i].scores)
        np.testing.assert_allclose(found.scores, expected[i].scores, rtol=1e-4)
        np.testing.assert_allclose(found.boxes, expected[i].boxes, atol=1e-2)
    with pytest.raises(ValueError, match=r"RGB image uint8 \[h, w, 3\]; got float32"):
        model.predict(np.zeros((4, 4, 3), np.float32))

    image = dataset[2]["image"]
    threshold = float(np.median(found.scores))
    target = tmp_path / "out" / "street"
    line = predict.write_boxes(target, image, found, model.labels, threshold)
    assert line.startswith(f"{target}.json  ")
    entries = json.loads((tmp_path / "out" / "street.json").read_text())
    sure = found.scores >= threshold
    assert 0 < sure.sum() < len(sure)
    np.testing.assert_array_equal([entry["score"] for entry in entries], found.scores[sure])
    assert [(e["category"], e["category_id"]) for e in entries] == [
        (model.labels.names[k], k + 1) for k in found.classes[sure]
    ]
    corners = np.array(
        [[x, y, x + w, y + h] for x, y, w, h in (entry["bbox"] for entry in entries)]
    )
    np.testing.assert_allclose(corners, found.boxes[sure], atol=1e-4)
    with Image.open(f"{target}_overlay.jpg") as overlay:
        assert overlay.width >= 96
        assert overlay.height > 48
    assert predict.write_boxes(target, image, found, model.labels, 1.0) == f"{target}.json  nothing"
    assert json.loads((tmp_path / "out" / "street.json").read_text()) == []


class Painted:
    """Images of many sizes whose shade is their number; each has boxes at known shares of its
    sides, filled in part or whole.
    """

    SIZES = (
        (48, 96),
        (100, 100),
        (30, 200),
        (480, 300),
        (47, 95),
        (12, 24),
        (96, 192),
        (200, 41),
        (1, 1),
        (380, 640),
        (64, 64),
    )
    domain = "painted"
    labels = CARLA

    def __init__(self, filled=1.0):
        self.filled = np.float32(filled)
        rng = np.random.default_rng(0)
        corners = rng.uniform(0, 0.6, (11, 4, 2))
        sides = rng.uniform(0.2, 0.4, (11, 4, 2))
        self.shares = np.concatenate([corners, corners + sides], axis=-1).astype(np.float32)
        self.shares[0, 0] = 0, 0, 1, 1
        self.classes = np.arange(44).reshape(11, 4).astype(np.int32) % 5
        self.counts = np.arange(11) % 5  # none to four

    def __len__(self):
        return len(self.SIZES)

    def size(self, i):
        return self.SIZES[i]

    def name(self, i):
        return f"painted/{i}"

    def __getitem__(self, i):
        h, w = self.SIZES[i]
        n = self.counts[i]
        difficult = np.zeros(n, bool)
        crowd = np.zeros(n, bool)
        difficult[3:] = True
        crowd[2:3] = True
        boxes = (self.shares[i, :n] * [w, h, w, h]).astype(np.float32)
        image = np.full((h, w, 3), 20 * i + 10, np.uint8)
        areas = np.prod(boxes[:, 2:] - boxes[:, :2], axis=1) * self.filled
        fields = {
            "difficult": difficult,
            "crowd": crowd,
            **({} if self.filled == 1 else {"areas": areas}),
        }
        return {"image": image, "boxes": boxes, "classes": self.classes[i, :n], **fields}


class Seer(detection_task.Detection):
    """Finds the boxes of `Painted`, but for the difficult ones, by the shade and the size of the
    fitted image.
    """

    def detect(self, graph, state, images, sizes):
        dataset = Painted()
        number = (images[:, 0, 0, 0].astype(jnp.int32) - 10) // 20
        shares = jnp.asarray(dataset.shares)[number]
        classes = jnp.asarray(dataset.classes)[number]
        boxes = shares * jnp.tile(sizes[:, ::-1], 2)[:, None]
        valid = (jnp.arange(4) < jnp.asarray(dataset.counts)[number][:, None]) & (jnp.arange(4) < 3)
        return Detected.of(
            boxes, jnp.broadcast_to(jnp.linspace(0.9, 0.6, 4), valid.shape), classes, valid
        )


@pytest.mark.parametrize(("devices", "filled"), [(1, 1.0), (8, 0.25)])
def test_boxes_come_back_to_the_pixels_of_images_of_any_size(devices, filled, tmp_path):
    """A detector that sees the truth in fitted images scores 100 on eleven sizes in padded batches;
    misses only what may be missed.

    What is written is the truth as it was, areas of objects that do not fill their boxes included.
    """
    c = validated(tiny(data__source="carla", data__max_boxes=4))
    mesh = sharding.make_mesh(MeshConfig(devices, 1), jax.devices()[:devices])
    dataset = Painted(filled)
    ticks = []
    empty = nnx.state(nnx.Dict())
    result = Seer(c).evaluator(nnx.graphdef(nnx.Dict()), mesh)(
        (empty, empty, empty), dataset, lambda: ticks.append(1)
    )
    metrics = result.metrics
    assert (metrics["mAP50"], metrics["images"], result.score) == (100.0, 11, 100.0)
    assert metrics["protocols"]["voc12"]["mAP50"] == pytest.approx(100)
    assert metrics["coco"]["AP"] < 100  # to COCO a difficult box is one like any other
    assert len(ticks) == (2 if devices == 8 else 3)
    assert len(result.pictures) == 2
    for example, i in zip(result.examples, (2, 8), strict=True):
        sample = dataset[i]
        h, w = example["image"].shape[:2]
        assert (example["image"] == sample["image"][0, 0]).all()
        n = len(sample["boxes"])
        shares = (dataset.shares[i, :n] * [w, h, w, h]).astype(np.float32)
        np.testing.assert_allclose(example["truth_boxes"], shares, rtol=1e-4, atol=1e-3)
        np.testing.assert_array_equal(example["truth_classes"], sample["classes"])
        np.testing.assert_allclose(example["boxes"], shares[:3], rtol=1e-4, atol=1e-3)
        np.testing.assert_array_equal(example["classes"], sample["classes"][:3])
        np.testing.assert_allclose(
            example["scores"], np.linspace(0.9, 0.6, 4)[: min(n, 3)], rtol=1e-6
        )
    result.write(tmp_path, "painted")
    _, truths, found = read_coco(
        *(tmp_path / "detections" / f"painted{end}.json" for end in ("_truth", ""))
    )
    for i, (truth, mine) in enumerate(zip(truths, found, strict=True)):
        sample = dataset[i]
        np.testing.assert_array_equal(truth.boxes, sample["boxes"])
        np.testing.assert_array_equal(truth.difficult, sample["difficult"])
        np.testing.assert_array_equal(truth.crowd, sample["crowd"])
        np.testing.assert_allclose(
            truth.areas,
            filled * np.prod(truth.boxes[:, 2:] - truth.boxes[:, :2], axis=1),
            rtol=1e-6,
        )
        np.testing.assert_allclose(mine.boxes, sample["boxes"][:3], rtol=1e-5, atol=1e-4)
        assert (mine.boxes <= np.tile(dataset.size(i)[::-1], 2)).all()


def test_other_classes_and_too_many_boxes_are_refused():
    """The evaluator names the classes of both, or the image, its boxes and the field that bounds
    them.
    """
    mesh = sharding.make_mesh(MeshConfig(1, 1), jax.devices()[:1])
    empty = nnx.state(nnx.Dict())

    def judge(c, dataset):
        return Seer(validated(c)).evaluator(nnx.graphdef(nnx.Dict()), mesh)(
            (empty, empty, empty), dataset, lambda: None
        )

    with pytest.raises(
        ValueError,
        match=(
            r"domain painted has the classes vehicle, .* but the model was trained on traffic light"
        ),
    ):
        judge(tiny(), Painted())
    with pytest.raises(
        ValueError, match=r"painted/\d has [34] boxes; data\.max_boxes is 2; allowed: at least"
    ):
        judge(tiny(data__source="carla", data__max_boxes=2), Painted())


class Counted(Painted):
    """Knows before it is read how many boxes its images have."""

    def __init__(self):
        super().__init__()
        self.box_counts = self.counts


def test_fuller_images_than_training_has_room_for_are_judged_whole():
    """A domain that knows its boxes gets room for all of them: the numbers are those of a run with
    room enough.
    """
    mesh = sharding.make_mesh(MeshConfig(1, 1), jax.devices()[:1])
    empty = nnx.state(nnx.Dict())
    results = []
    for max_boxes in (2, 4):
        c = validated(tiny(data__source="carla", data__max_boxes=max_boxes))
        evaluator = Seer(c).evaluator(nnx.graphdef(nnx.Dict()), mesh)
        results.append(evaluator((empty, empty, empty), Counted(), lambda: None).metrics)
    assert results[0] == results[1]


@pytest.mark.parametrize("decoder", ["fcos", "faster_rcnn"])
def test_eight_devices_do_what_one_does(decoder):
    """The same batch, with images of none and of many boxes, and the same parameters: loss terms
    and gradients.
    """
    c = tiny(model__decoder=decoder, data__max_boxes=6)
    r = c.model.faster_rcnn
    r.channels = 8
    r.levels = (1, 2)
    r.rpn = RpnConfig(sizes=((8.0,), (16.0,), (32.0,)), samples=8, before=(16, 16), after=(16, 16))
    r.roi = dataclasses.replace(r.roi, channels=8, convs=1, hidden=8, proposals=8)
    c = validated(c)
    rng = np.random.default_rng(0)
    n = (8, 6)
    corners = rng.uniform(0, 24, (*n, 2))
    batch = {
        "image": rng.integers(0, 256, (8, 48, 96, 3)).astype(np.uint8),
        "boxes": (
            np.concatenate([corners, corners + rng.uniform(4, 24, (*n, 2))], axis=-1).astype(
                np.float32
            )
        ),
        "classes": rng.integers(0, 5, n).astype(np.int32),
        "valid": np.arange(6) < np.arange(8)[:, None] - 1,
        "difficult": np.zeros(n, bool),
        "crowd": np.zeros(n, bool),
    }
    task = tasks.make_task(c)
    plan = tasks.Blueprint.of(task, "none")
    host = jax.tree.map(
        lambda leaf: (0.3 * rng.normal(size=leaf.shape)).astype(leaf.dtype), plan.abstract
    )
    outcomes = []
    for devices in (1, 8):
        mesh = sharding.make_mesh(MeshConfig(devices, 1), jax.devices()[:devices])
        trained, frozen, statistics = jax.device_put(host, sharding.replicated(mesh))
        state = TrainState(0, trained, frozen, statistics, ())
        compute = jax.jit(
            lambda state, batch: gradients(
                plan.graph, state, batch, task.loss_denominator, task.losses, jax.random.key(0), 1
            )
        )
        outcomes.append(jax.device_get(compute(state, sharding.to_devices(batch, mesh))))
    (one, _, terms), (eight, _, terms8) = outcomes
    assert min(terms.values()) > 0
    for name, value in terms.items():
        np.testing.assert_allclose(terms8[name], value, rtol=1e-5, err_msg=name)
    scale = max(np.abs(leaf).max() for leaf in jax.tree.leaves(one))
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(eight), strict=True):
        np.testing.assert_allclose(b, a, rtol=1e-4, atol=1e-5 * scale)


def test_heads_of_the_configuration():
    """Without a word on sizes, a run has the heads' own defaults; C4 and the plain Faster R-CNN are
    theirs with one stage.
    """
    assert detection_task.head_config(ModelConfig(decoder="fcos")) == FcosConfig()
    assert detection_task.head_config(ModelConfig(decoder="cascade_rcnn")) == RcnnConfig()
    plain: Any = detection_task.head_config(ModelConfig(decoder="faster_rcnn"))
    assert plain.roi == dataclasses.replace(
        RcnnConfig().roi, stages=((0.5, 10.0),), class_agnostic=False
    )
    c4: Any = detection_task.head_config(
        ModelConfig(decoder="faster_rcnn_c4", text_weights="tower")
    )
    assert (len(c4.rpn.sizes), len(c4.rpn.sizes[0]), len(c4.roi.stages), c4.text_classifier) == (
        1,
        5,
        1,
        True,
    )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"model__decoder": "linear"},
            r"model\.decoder is linear; allowed: fcos, faster_rcnn, .*, with task detection",
        ),
        (
            {"task": "segmentation"},
            r"model\.decoder is fcos; allowed: linear, .*, with task segmentation",
        ),
        ({"task": "boxes"}, r"task is 'boxes'; allowed: 'segmentation' or 'detection'"),
        (
            {"evaluation__protocol": "vltseg"},
            r"evaluation\.protocol is vltseg; allowed: voc07, voc12, coco, with task detection",
        ),
        (
            {"data__rare_class_temperature": 0.01},
            r"data\.rare_class_temperature is 0\.01; allowed: 0 with task detection",
        ),
        (
            {"data__max_class_share": 0.5},
            r"data\.max_class_share is 0\.5; allowed: 1 with task detection",
        ),
        ({"model__taps": (1, 2)}, r"model\.taps is \(1, 2\); allowed: \(\) with task detection"),
        (
            {"model__text_weights": "x"},
            r"model\.text_weights is set; allowed: None but with model\.decoder faster_rcnn_c4",
        ),
        (
            {"model__decoder": "cascade_rcnn", "model__cascade_rcnn__levels": (1, 2)},
            r"model\.cascade_rcnn\.rpn\.sizes is .* one for each of model\.cascade_rcnn\.levels",
        ),
        ({"model__fcos__nms": 1.5}, r"model\.fcos\.nms is 1\.5; allowed: less than or equal to 1"),
        (
            {"model__fcos__groups": 3},
            r"channels of the single-stage head are 8; they must divide by groups, 3",
        ),
        ({"model__fcos__levels": (1, 3)}, r"levels of the pyramid are \(1, 3\); allowed"),
        (
            {"model__decoder": "faster_rcnn_c4", "model__encoder": "augreg_ti16"},
            r"take clip_rn50, clip_rn101 or a pyramid",
        ),
        ({"data__source": "gta5"}, r"gta5 has no boxes, as it is published without instances"),
        (
            {"data__source": "town"},
            r"unknown domain 'town'; known are .*; for boxes of your own set data\.boxes",
        ),
        (
            {"data__source": "town", "data__boxes": BoxOptions()},
            r"data\.boxes\.classes is empty; name the classes",
        ),
        (
            {"data__source": "town05", "data__root": "/"},
            r"domain 'town05' is kept unseen and has no training images",
        ),
    ],
)
def test_settings_that_do_not_go_together_are_refused_before_a_step(changes, message, tmp_path):
    """One line that names the field, what it is and what is allowed."""
    with pytest.raises(ValueError, match=message) as error:
        start(tiny(**changes), tmp_path / "run")
    assert "\n" not in str(error.value)
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def voc_config(root: Path, corners: tuple[int, int, int, int]) -> Config:
    """One image of 60x40 pixels with one box in VOC's form, to train and to judge on."""
    folder = root / "town/VOC2007"
    for name in ("JPEGImages", "Annotations", "ImageSets/Main"):
        (folder / name).mkdir(parents=True)
    Image.fromarray(np.full((40, 60, 3), 90, np.uint8)).save(folder / "JPEGImages/a.jpg")
    box = "".join(
        f"<{key}>{value}</{key}>"
        for key, value in zip(("xmin", "ymin", "xmax", "ymax"), corners, strict=True)
    )
    thing = f"<object><name>car</name><difficult>0</difficult><bndbox>{box}</bndbox></object>"
    size = "<size><width>60</width><height>40</height><depth>3</depth></size>"
    (folder / "Annotations/a.xml").write_text(f"<annotation>{size}{thing}</annotation>")
    for name in ("trainval", "test"):
        (folder / f"ImageSets/Main/{name}.txt").write_text("a\n")
    return tiny(
        data__root=str(root),
        data__source="town",
        data__boxes=BoxOptions(classes=("car",)),
        evaluation__domains=("town",),
    )


def test_broken_annotations_are_named_before_a_step(tmp_path, monkeypatch):
    """A box far outside its image stops the start, with the file's path; a good one opens to train
    and to judge on.
    """
    monkeypatch.setenv("JAXDG_CACHE", str(tmp_path / "cache"))
    with pytest.raises(ValueError, match=r"Annotations/a\.xml: .*outside the image"):
        start(voc_config(tmp_path / "bad", (10, 10, 90, 30)), tmp_path / "run")
    assert not (tmp_path / "run" / "metrics.jsonl").exists()
    task = tasks.make_task(validated(voc_config(tmp_path / "good", (10, 10, 30, 30))))
    assert task.labels.names == ("car",)
    for dataset in (task.open("town", train=True), evaluate.open_domains(task)["town"]):
        np.testing.assert_array_equal(dataset[0]["boxes"], [[9, 9, 30, 30]])


def test_too_many_boxes_are_told_before_a_step(tmp_path, monkeypatch):
    """The largest number of boxes of an image is known at the start, in files and in records;
    records of other classes are refused.
    """
    monkeypatch.setenv("JAXDG_CACHE", str(tmp_path / "cache"))

    def open_source(c):
        return tasks.make_task(validated(c)).open("town", train=True)

    c = voc_config(tmp_path / "data", (10, 10, 30, 30))
    folder = tmp_path / "data/town/VOC2007"
    text = (folder / "Annotations/a.xml").read_text()
    things = text[text.index("<object>") : text.index("</annotation>")]
    (folder / "Annotations/a.xml").write_text(text.replace(things, 5 * things))
    c.data.max_boxes = 4
    told = (
        r"a\.jpg has 5 boxes, and 1 of 1 images of town have more than data\.max_boxes, 4; allowed:"
        r" at least 5"
    )
    with pytest.raises(ValueError, match=told):
        open_source(c)
    own = c.data.boxes
    files = {
        split: open_box_files("town", root=c.data.root, train=split == "train", own=own)
        for split in ("train", "val")
    }
    prepare("town", files, root=c.data.root, out=str(tmp_path / "records"))
    c.data.root = str(tmp_path / "records")
    with pytest.raises(ValueError, match=told):
        open_source(c)
    c.data.boxes = BoxOptions(classes=("truck",))
    with pytest.raises(
        ValueError,
        match=r"records .* were written with the classes car, but those of town are truck",
    ):
        open_source(c)


def test_the_protocol_chooses_the_score():
    """The same boxes by each protocol: mAP50 and the score are that protocol's, and all three are
    told.
    """

    def box(*corners):
        return np.array(corners, np.float32)

    truth = Truth(
        box([0, 0, 9, 9], [20, 0, 30, 9]), np.zeros(2, int), np.zeros(2, bool), np.zeros(2, bool)
    )
    found = Detections(
        box([0, 0, 9, 9], [0, 20, 9, 29], [20, 0, 30, 9]),
        np.array([0.9, 0.8, 0.7]),
        np.zeros(3, int),
    )
    scores = {}
    for protocol in ("voc07", "voc12", "coco"):
        task = detection_task.Detection(
            validated(tiny(data__source="carla", evaluation__protocol=protocol))
        )
        result = task._result(Painted(), [0], {0: (truth, found)})
        assert (
            result.score
            == result.metrics["mAP50"]
            == result.metrics["protocols"][protocol]["mAP50"]
        )
        scores[protocol] = result.score
    assert scores == pytest.approx(
        {
            "voc07": 100 * (6 + 5 * 2 / 3) / 11,
            "voc12": 500 / 6,
            "coco": 100 * (51 + 50 * 2 / 3) / 101,
        }
    )


def test_a_domain_without_boxes_scores_nothing():
    """No true box at all, or only difficult ones: AP and score are null, no class counts, and every
    class is named as without truth.
    """
    task = detection_task.Detection(validated(tiny(data__source="carla")))
    found = Detections(
        np.array([[0, 0, 9, 9]], np.float32), np.array([0.9], np.float32), np.zeros(1, int)
    )
    for boxes in (0, 1):
        truth = Truth(
            np.full((boxes, 4), [0, 0, 9, 9], np.float32),
            np.zeros(boxes, int),
            np.ones(boxes, bool),
            np.zeros(boxes, bool),
        )
        result = task._result(Painted(), [0], {0: (truth, found)})
        assert (result.metrics["mAP50"], result.score, result.metrics["classes"]) == (None, None, 0)
        assert result.metrics["without_truth"] == list(task.labels.names)
    assert isinstance(task.labels, LabelSet)


def test_scenes_of_a_file_are_read_by_name(tmp_path):
    """In the order of the settings; a missing file or name and sizes that differ are told."""
    path = str(tmp_path / "scenes.safetensors")
    with pytest.raises(FileNotFoundError, match="scene_vectors"):
        detection_task.scene_vectors(("fog",), path)
    save_file({"clear": np.zeros(3, np.float32), "fog": np.ones(3, np.float32)}, path)
    np.testing.assert_array_equal(
        detection_task.scene_vectors(("fog", "clear"), path), [[1, 1, 1], [0, 0, 0]]
    )
    with pytest.raises(ValueError, match="no scene 'snow'; it has clear, fog"):
        detection_task.scene_vectors(("snow",), path)
    save_file({"clear": np.zeros(3, np.float32), "fog": np.ones(2, np.float32)}, path)
    with pytest.raises(ValueError, match=r"shapes \[\(2,\), \(3,\)\]"):
        detection_task.scene_vectors(("fog", "clear"), path)
