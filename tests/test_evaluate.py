"""Evaluation as a whole against slow loops: many sizes, test-time augmentation, parts, subsets, any
number of hosts.
"""

import dataclasses
import io
import json

import cv2
from flax import nnx
import jax
import numpy as np
from PIL import Image
import pytest
from rich.console import Console

from jaxdg import evaluate, segmentation
from jaxdg.backbones import VitConfig, zoo
from jaxdg.config import Config, MeshConfig, validated
from jaxdg.data.labels import CAMVID, CITYSCAPES
from jaxdg.data.pipeline import eval_batches
from jaxdg.evaluation import confusion, protocols
from jaxdg.evaluation.overlap import Standing, TrainedOn
from jaxdg.tasks import run_state as tasks
from jaxdg.training import sharding
from tests.data import trees


@pytest.fixture(scope="module", autouse=True)
def tiny():
    """A small encoder in the zoo."""
    zoo.ZOO["tiny4"] = zoo.Entry(
        VitConfig(width=16, depth=4, heads=2, patch_size=8, taps=(0, 1, 2, 3))
    )
    yield
    del zoo.ZOO["tiny4"]


def config(**changes) -> Config:
    """Windows of 16 pixels, every 8."""
    c = Config()
    c.model.encoder = "tiny4"
    c.model.pyramid = "none"
    c.model.taps = (3,)
    c.data.crop = (16, 16)
    c.evaluation.stride = (8, 8)
    c.evaluation.batch_size = 4
    for field, value in changes.items():
        part, name = field.split("__")
        setattr(getattr(c, part), name, value)
    return validated(c)


class Run:
    """A task with random parameters on two devices, and its model with scores on the host."""

    def __init__(self, c: Config):
        self.config = c
        self.task = tasks.Segmentation(c)
        self.mesh = sharding.make_mesh(MeshConfig(2, 1), jax.devices()[:2])
        self.plan = tasks.Blueprint.of(self.task, "none")
        rng = np.random.default_rng(0)
        host = jax.tree.map(
            lambda leaf: rng.normal(0, 0.5, leaf.shape).astype(leaf.dtype), self.plan.abstract
        )
        self.state = jax.device_put(host, sharding.replicated(self.mesh))
        self.evaluator = self.task.evaluator(self.plan.graph, self.mesh)
        model = nnx.merge(self.plan.graph, *jax.device_put(host, jax.devices()[0]))
        self._scores = jax.jit(lambda x: model.scores(self.task.normalize(x)))

    def window(self, window: np.ndarray) -> np.ndarray:
        """Class scores [16, 16, k] of one window of at most 16 x 16 pixels, missing ones at the
        mean.
        """
        mean = np.array(zoo.entry("tiny4").config.mean, np.float32)
        full = np.broadcast_to(mean * (255 if mean.max() <= 1 else 1), (1, 16, 16, 3)).copy()
        full[0, : window.shape[0], : window.shape[1]] = window
        return np.asarray(self._scores(full))[0].astype(np.float64)

    def scores(self, image: np.ndarray, stride: tuple[int, int] | None = None) -> np.ndarray:
        """Class scores of an image, window after window."""
        h, w = image.shape[:2]
        stride = stride or self.task.protocol("noise").stride

        def starts(size, step):
            return sorted(
                {min(i, max(size - 16, 0)) for i in range(0, max(size - 16, 0) + step, step)}
            )

        total = np.zeros((max(h, 16), max(w, 16), 19))
        seen = np.zeros((max(h, 16), max(w, 16), 1))
        for y in starts(h, stride[0]):
            for x in starts(w, stride[1]):
                total[y : y + 16, x : x + 16] += self.window(image[y : y + 16, x : x + 16])
                seen[y : y + 16, x : x + 16] += 1
        return (total / seen)[:h, :w]


@pytest.fixture(scope="module")
def native():
    return Run(config())


class Noise:
    """Images of many sizes, or of those given, with noisy labels; a third is ignored."""

    def __init__(self, sizes, domain="noise", labels=CITYSCAPES):
        self.sizes = sizes
        self.domain = domain
        self.labels = labels

    def __len__(self):
        return len(self.sizes)

    def size(self, i):
        return self.sizes[i]

    def name(self, i):
        return f"/noise/rgb_anon/{('fog', 'night')[i % 2]}/val/{i}.png"

    def __getitem__(self, i):
        rng = np.random.default_rng(i)
        label = rng.integers(0, 5 + i % 9, self.sizes[i]).astype(np.uint8)
        label[rng.random(label.shape) < 1 / 3] = 255
        image = cv2.resize(
            rng.integers(0, 256, (5, 6, 3), np.uint8),
            self.sizes[i][::-1],
            interpolation=cv2.INTER_LINEAR,
        )
        return {"image": image, "label": label}


SIZES = [(20, 26), (9, 12), (17, 29), (21, 27), (10, 12), (22, 31), (17, 24)]


def matrix(labels, predictions):
    """Counts by NumPy."""
    total = np.zeros((19, 19), np.int64)
    for label, prediction in zip(labels, predictions, strict=True):
        np.add.at(total, (label[label != 255], prediction[label != 255]), 1)
    return total


def assert_iou(metrics, total):
    """The metrics are those of a confusion matrix."""
    expected = 100 * segmentation.iou(total)
    np.testing.assert_allclose(
        [np.nan if v is None else v for v in metrics["IoU"].values()], expected, rtol=1e-9
    )
    assert metrics["mIoU"] == pytest.approx(np.nanmean(expected))


def test_many_sizes_equal_one_image_at_a_time(native):
    """Seven sizes in padded batches on two devices: the counts of images that a slow loop predicts
    alone, at their own sizes.
    """
    dataset = Noise(SIZES)
    predictions = [
        native.scores(dataset[i]["image"].astype(np.float32)).argmax(-1) for i in range(7)
    ]
    result = native.evaluator(native.state, dataset, lambda: None)
    assert_iou(result.metrics, matrix([dataset[i]["label"] for i in range(7)], predictions))
    assert result.metrics["images"] == 7
    assert result.parts == {}
    assert len(result.pictures) == 2
    for example, i in zip(
        result.examples, (1, 5), strict=True
    ):  # a quarter and three quarters through the seven
        np.testing.assert_array_equal(example["image"], dataset[i]["image"])
        np.testing.assert_array_equal(example["truth"], dataset[i]["label"])
        np.testing.assert_array_equal(example["prediction"], predictions[i])
    labels = [dataset[i]["label"] for i in range(7)]
    right = [
        np.mean((p == t)[t != 255]) for p, t in zip(predictions, labels, strict=True)
    ]  # of the pixels with truth
    for example, i in zip(result.worst, np.argsort(right, kind="stable")[:3], strict=True):
        assert example["name"] == dataset.name(i)
        np.testing.assert_array_equal(example["truth"], labels[i])
        np.testing.assert_array_equal(example["prediction"], predictions[i])


def test_examples_are_kept_beside_the_results_and_shrink_together(native, tmp_path):
    """What is read back is the example; of a large one the image, the label maps and the boxes are
    smaller by the same factor.
    """
    result = native.evaluator(native.state, Noise(SIZES, "acdc/fog"), lambda: None)
    evaluate.write_results({}, {"acdc/fog": result}, tmp_path)
    kept = [dict(np.load(tmp_path / "qualitative" / f"acdc_fog_{i}.npz")) for i in range(2)]
    for a, b in zip(kept, result.examples, strict=True):
        assert a.keys() == b.keys()
        assert all(np.array_equal(a[key], b[key]) for key in b)
    worst = [np.load(tmp_path / "worst" / f"acdc_fog_{i}.npz")["name"] for i in range(3)]
    assert worst == [example["name"] for example in result.worst]
    image = np.repeat(
        np.repeat(np.arange(48, dtype=np.uint8).reshape(6, 8), 100, axis=0), 100, axis=1
    )  # 600 x 800, in squares of 100
    boxes = np.array([[100.0, 200.0, 300.0, 600.0]], np.float32)
    large = {
        "image": np.stack([image] * 3, axis=-1),
        "truth": image,
        "prediction": image[::-1],
        "boxes": boxes,
        "classes": np.array([3]),
    }
    small = evaluate.shrunk(large, 400)

    def squares(array):
        return array[25::50, 25::50]

    for key, expected in (("image", large["image"]), ("truth", image), ("prediction", image[::-1])):
        assert small[key].shape[:2] == (300, 400)
        np.testing.assert_array_equal(squares(small[key]), expected[50::100, 50::100])
    np.testing.assert_allclose(small["boxes"], boxes / 2)
    np.testing.assert_array_equal(small["classes"], [3])
    same = evaluate.shrunk(large, 800)
    assert all(np.array_equal(same[key], large[key]) for key in large)


def test_a_limit_of_images_takes_them_evenly_and_is_told(native):
    """`evaluation.max_images` 3 of 7 judges images 0, 2 and 4, results.json and the printed table
    say so; 7 and more are all.
    """
    c = config()
    c.evaluation.max_images = 3
    opened = []

    class Opening(type(native.task)):
        def open(self, domain, train):
            opened.append((domain, train))
            return Noise(SIZES, domain)

    domains = evaluate.open_domains(Opening(c))
    assert opened == [(name, False) for name in c.evaluation.domains]
    some = domains[opened[0][0]]
    assert [some.name(i) for i in range(len(some))] == [Noise(SIZES).name(i) for i in (0, 2, 4)]
    assert [some.size(i) for i in range(3)] == [SIZES[i] for i in (0, 2, 4)]
    np.testing.assert_array_equal(some[1]["image"], Noise(SIZES)[2]["image"])
    result = native.evaluator(native.state, some, lambda: None)
    assert result.metrics["images"] == 3
    result.metrics |= {"seen": False, "part_of": None, "trained_on": 0}
    everything = evaluate.summary(native.task, c, 1, {"noise": result})
    assert everything["max_images"] == 3
    console = Console(record=True, quiet=False, width=200)
    evaluate.print_results(everything, console)
    assert "judged on at most 3 images of each domain" in console.export_text()
    c.evaluation.max_images = 7
    assert len(evaluate.open_domains(Opening(c))[opened[0][0]]) == 7
    assert evaluate.summary(native.task, config(), 1, {"noise": result})["max_images"] is None


def test_parts_of_acdc_come_from_one_pass(native, tmp_path):
    """Conditions have the counts of their own images, which are kept beside results.json, add up to
    the whole, read every image once and stay out of the means.
    """
    dataset = Noise(SIZES, "acdc")
    read = []
    get = dataset.__class__.__getitem__
    watched = type(
        "Watched", (Noise,), {"__getitem__": lambda self, i: read.append(i) or get(self, i)}
    )(SIZES, "acdc")
    results = evaluate.evaluate_domains(
        native.evaluator,
        native.state,
        {"acdc": watched},
        {"acdc": Standing(False)},
        lambda *_: None,
    )
    assert sorted(read) == list(range(7))
    assert list(results) == ["acdc", "acdc/fog", "acdc/night"]
    maps = [native.scores(dataset[i]["image"].astype(np.float32)).argmax(-1) for i in range(7)]
    for name, mine in (
        ("acdc", range(7)),
        ("acdc/fog", range(0, 7, 2)),
        ("acdc/night", range(1, 7, 2)),
    ):
        metrics = results[name].metrics
        counts = matrix([dataset[i]["label"] for i in mine], [maps[i] for i in mine])
        assert_iou(metrics, counts)
        results[name].write(tmp_path, name)
        classes, kept = confusion.read_confusion(tmp_path, name)
        assert classes == CITYSCAPES.names
        np.testing.assert_array_equal(kept, counts)
        assert metrics["aAcc"] == pytest.approx(100 * np.trace(counts) / counts.sum())
        assert metrics["images"] == len(mine)
        assert metrics["part_of"] == (None if name == "acdc" else "acdc")
    everything = evaluate.summary(native.task, native.config, 3, results)
    assert everything["mean_unseen"] == results["acdc"].score
    console = Console(record=True, width=200, file=io.StringIO())
    evaluate.print_results(everything, console)
    assert "protocol native" in console.export_text()


def error_of(pixels):
    """ECE in percent of (confidence, hit) pairs in 15 bins."""
    confidence, hit = (np.concatenate(values) for values in zip(*pixels, strict=True))
    bins = np.minimum((confidence * 15).astype(int), 14)
    gaps = [abs((confidence - hit)[bins == i].sum()) for i in range(15)]
    return 100 * sum(gaps) / len(hit)


def test_calibration_and_boundaries_of_parts(native):
    """On two devices, of images of many sizes: the calibration error of a loop over windows in
    float64 and the authors' boundaries of each part, and the matrix without them, to the last bit.
    """
    run = Run(config(evaluation__calibration=True, evaluation__boundary=True))
    dataset = Noise(SIZES, "acdc")
    plain = native.evaluator(native.state, dataset, lambda: None)
    result = run.evaluator(run.state, dataset, lambda: None)
    assert result.parts.keys() == plain.parts.keys()
    for name, before in {"": plain, **plain.parts}.items():
        metrics = result.parts[name].metrics if name else result.metrics
        assert {key: metrics[key] for key in before.metrics} == before.metrics
    pixels = []
    counts = np.zeros((7, 19, 2), np.int64)
    for i in range(7):
        label = dataset[i]["label"]
        scores = run.scores(dataset[i]["image"].astype(np.float32))
        known = label != 255
        pixels.append((softmax(scores).max(-1)[known], (scores.argmax(-1) == label)[known]))
        marked = [
            np.stack([near_an_edge(maps == k) for k in range(19)])
            for maps in (label, scores.argmax(-1))
        ]
        both = (marked[0] & marked[1] & known).sum((1, 2))
        either = ((marked[0] | marked[1]) & known).sum((1, 2))
        counts[i] = np.stack([both, either], axis=1)
    whole = {"": result, **result.parts}
    for name, mine in (("", range(7)), ("acdc/fog", range(0, 7, 2)), ("acdc/night", (1, 3, 5))):
        metrics = whole[name].metrics
        assert metrics["ECE"] == pytest.approx(error_of([pixels[i] for i in mine]), rel=1e-4)
        assert sum(metrics["reliability"]["pixels"]) == sum(len(pixels[i][0]) for i in mine)
        both, either = counts[list(mine)].sum(axis=0).T
        expected = 100 * both / np.where(either > 0, either, np.nan)
        values = [np.nan if v is None else v for v in metrics["BoundaryIoU"].values()]
        np.testing.assert_allclose(values, expected, rtol=1e-12)
        assert metrics["mBoundaryIoU"] == pytest.approx(np.nanmean(expected), rel=1e-12)


def test_the_switches_are_of_segmentation():
    """Detection has no pixels to be sure of, and bins there are 1 to 255: errors of one line."""
    for name in ("calibration", "boundary"):
        c = Config(task="detection")
        c.model.decoder = "fcos"
        setattr(c.evaluation, name, True)
        reason = rf"^evaluation\.{name} is True; allowed: False, with task detection$"
        with pytest.raises(ValueError, match=reason):
            validated(c)
    for bins in (0, 256):
        with pytest.raises(ValueError, match=r"^evaluation\.calibration_bins is "):
            config(evaluation__calibration_bins=bins)


def near_an_edge(mask):
    """The boundary of a mask of a small image: what erosion by 3 x 3 takes, the border included."""
    around = np.pad(mask, 1)
    kept = cv2.erode(around.astype(np.uint8), np.ones((3, 3), np.uint8))[1:-1, 1:-1]
    return mask & (kept == 0)


@pytest.mark.parametrize("protocol", ["vltseg", "acdc_test"])
def test_confidence_of_resized_and_averaged_scores(protocol):
    """Scores resized to the label, and probabilities averaged over views, have the confidence of
    the label map that they give: the greatest of what NumPy makes of the very same scores.
    """
    run = Run(config(evaluation__protocol=protocol, data__source="clear"))
    rules = run.task.protocol("noise")
    small = {"fit": (48, 24)} if protocol == "vltseg" else {"scales": (0.5, 1.25)}
    rules = dataclasses.replace(rules, **small)
    (batch,) = eval_batches(Noise([(24, 32), (25, 27)]), batch_size=2, protocol=rules)
    fields = {key: batch[key] for key in ("image", "size", "label", "label_size")}
    fields = sharding.to_devices(fields, run.mesh)
    labels, confidence = run.task.confident_labelling(run.plan.graph)(
        run.state, fields, rules, True
    )
    views = run.task.views(run.plan.graph)(run.state, fields["image"], fields["size"], rules)
    size = batch["label"].shape[1:]
    total = 0
    for scores, own in views:
        scores = segmentation.resize_scores(scores, size, (own, fields["label_size"]))
        total = total + softmax(np.asarray(scores).astype(np.float64))
    total = total / total.sum(-1, keepdims=True)
    np.testing.assert_allclose(np.asarray(confidence), total.max(-1), rtol=1e-5)
    of_label = np.take_along_axis(total, np.asarray(labels)[..., None], -1)[..., 0]
    np.testing.assert_allclose(of_label, total.max(-1), rtol=1e-5)


def test_several_protocols_are_checked_one_by_one():
    """Each has a configuration of its own, in order; one named twice and an unknown one are errors
    of one line.
    """
    c = config()
    checked = evaluate.protocols_of(c, ("soma", "native"))
    assert [one.evaluation.protocol for one in checked] == ["soma", "native"]
    assert dataclasses.replace(checked[0], evaluation=c.evaluation) == c
    with pytest.raises(ValueError, match=r"^--protocol names soma more than once; name every"):
        evaluate.protocols_of(c, ("soma", "native", "soma"))
    with pytest.raises(ValueError, match=r"^evaluation.protocol is voc07; allowed: native, .*soma"):
        evaluate.protocols_of(c, ("native", "voc07"))


@pytest.mark.parametrize("hosts", [1, 2, 3, 4, 5])
def test_hosts_count_every_pixel_once(native, hosts):
    """Seven images of seven sizes over any number of hosts: their matrices add up to that of one
    loop, filled-up batches and all.
    """
    dataset = Noise(SIZES)
    protocol = native.task.protocol("noise")
    count = jax.jit(segmentation.confusion_matrix, static_argnums=2)
    total = np.zeros((19, 19), np.int64)
    batches = []
    for host in range(hosts):
        seen = 0
        for batch in eval_batches(
            dataset, batch_size=hosts, protocol=protocol, shard=(host, hosts)
        ):
            # In place of the model, a prediction that depends on the pixels: what is tested is who
            # counts what.
            prediction = batch["image"][..., 0] % 19
            label = np.where(batch["mask"][:, None, None], batch["label"], 255)
            total += np.asarray(count(prediction, label, 19))
            seen += 1
        batches.append(seen)
    assert len(set(batches)) == 1  # hosts run in step
    np.testing.assert_array_equal(
        total,
        matrix(
            [dataset[i]["label"] for i in range(7)],
            [dataset[i]["image"][..., 0] % 19 for i in range(7)],
        ),
    )
    assert total.sum() == sum((dataset[i]["label"] != 255).sum() for i in range(7))


def softmax(x):
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


@pytest.mark.parametrize("sizes", [[(24, 32)], [(24, 32), (25, 27)]])
def test_augmentation_equals_a_slow_version(sizes):
    """Images resized by OpenCV and mirrored one by one, scores mirrored back, resized by OpenCV,
    softmax, mean: the same label maps.
    """
    run = Run(config(evaluation__protocol="acdc_test", data__source="clear"))
    dataset = Noise(sizes)
    protocol = dataclasses.replace(run.task.protocol("noise"), scales=(0.5, 1.25))
    assert protocol.flip
    label_maps = run.task.labelling(run.plan.graph)
    for batch in eval_batches(dataset, batch_size=2, protocol=protocol):
        fields = {key: batch[key] for key in ("image", "size", "label", "label_size")}
        found = np.asarray(label_maps(run.state, sharding.to_devices(fields, run.mesh), protocol))
        for i, label in zip(batch["index"], found, strict=True):
            if i < 0:
                continue
            image = dataset[i]["image"]
            h, w = sizes[i]
            votes = np.zeros((h, w, 19))
            for scale in protocol.scales:
                larger = cv2.resize(
                    image,
                    (int(w * scale + 0.5), int(h * scale + 0.5)),
                    interpolation=cv2.INTER_LINEAR,
                )
                for flip in (False, True):
                    scores = run.scores((larger[:, ::-1] if flip else larger).astype(np.float32))
                    scores = scores[:, ::-1] if flip else scores
                    resized = [
                        cv2.resize(s, (w, h), interpolation=cv2.INTER_LINEAR_EXACT)
                        for s in np.moveaxis(scores, -1, 0)
                    ]
                    votes += softmax(np.moveaxis(np.array(resized), 0, -1)) / 4
            close = (
                np.sort(votes, -1)[..., -1] - np.sort(votes, -1)[..., -2] < 1e-3
            )  # OpenCV rounds grey values its own way
            assert close.mean() < 0.1
            np.testing.assert_array_equal(label[:h, :w][~close], votes.argmax(-1)[~close])


def test_named_protocol_resizes_images_and_scores():
    """`vltseg`: OpenCV's image through windows of 16, scores resized to the label; counted against
    the label as stored.
    """
    run = Run(config(evaluation__protocol="vltseg", data__source="clear"))
    dataset = Noise([(61, 70), (50, 60), (64, 64)])
    protocol = run.task.protocol("noise")
    small = dataclasses.replace(protocol, fit=(48, 24))
    run.task.protocol = lambda domain: small
    maps = []
    for i, (h, w) in enumerate(dataset.sizes):
        (ih, iw), _ = small.sizes((h, w))
        scores = run.scores(
            cv2.resize(dataset[i]["image"], (iw, ih), interpolation=cv2.INTER_LINEAR).astype(
                np.float32
            )
        )
        resize = jax.jit(segmentation.resize_scores, static_argnums=1)
        resized = resize(scores[None].astype(np.float32), (h, w))
        maps.append(np.asarray(resized)[0].argmax(-1))
    result = run.evaluator(run.state, dataset, lambda: None)
    assert_iou(result.metrics, matrix([dataset[i]["label"] for i in range(3)], maps))


def test_subsets_of_synthia(native):
    """A model trained on SYNTHIA also gets its means over 16 and 13 classes, those of the IoUs
    above them.
    """
    run = Run(config(data__source="synthia"))
    result = evaluate.evaluate_domains(
        run.evaluator,
        run.state,
        {"noise": Noise(SIZES[:2])},
        {"noise": Standing(False)},
        lambda *_: None,
    )["noise"]
    iou = result.metrics["IoU"]

    def mean(out):
        return np.mean([v for name, v in iou.items() if v is not None and name not in out])

    assert result.metrics["subsets"] == {
        "16": pytest.approx(mean(("terrain", "truck", "train"))),
        "13": pytest.approx(mean(("terrain", "truck", "train", "wall", "fence", "pole"))),
    }
    table = Console(record=True, width=200, file=io.StringIO())
    evaluate.print_results(evaluate.summary(run.task, run.config, 3, {"noise": result}), table)
    assert "mIoU of 16" in table.export_text()


def bilinear(scores: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Scores [h, w, k] resized between pixel centres, one pixel after another."""
    h, w = scores.shape[:2]
    resized = np.zeros((*size, scores.shape[2]))
    for i, j in np.ndindex(size):
        y = min(max((i + 0.5) * h / size[0] - 0.5, 0), h - 1)
        x = min(max((j + 0.5) * w / size[1] - 0.5, 0), w - 1)
        rows = scores[[int(y), min(int(y) + 1, h - 1)]]
        pixels = rows[:, [int(x), min(int(x) + 1, w - 1)]]
        resized[i, j] = np.array([1 - y % 1, y % 1]) @ np.einsum(
            "j,ijk->ik", np.array([1 - x % 1, x % 1]), pixels
        )
    return resized


# Of 32 times less than the papers' sizes: the protocol, the domain, the size of the file, of the
# image that the model sees, and of the label, by hand; and the stride between windows of 16.
ODD = [
    ("soma", "mapillary", (83, 111), (32, 43), (41, 55), 11),
    ("soma", "bdd100k", (45, 80), (22, 39), (45, 80), 11),
    ("tqdm", "mapillary", (83, 111), (32, 43), (83, 111), 11),
    ("tqdm", "cityscapes", (51, 33), (49, 32), (51, 33), 11),
    ("mgrnet", "bdd100k", (45, 80), (32, 57), (45, 80), 10),
    ("mgrnet", "mapillary", (61, 29), (64, 30), (61, 29), 10),
]


@pytest.mark.parametrize(("name", "domain", "stored", "seen", "judged", "stride"), ODD)
def test_published_protocols_on_odd_sizes(
    native, monkeypatch, name, domain, stored, seen, judged, stride
):
    """Fitted images, overlapping windows and label sizes are those of a loop over pixels and
    windows; a pixel may differ only where two classes are equally likely.
    """
    rules = {
        key: protocols.Rules(
            tuple(side // 32 for side in r.fit),
            {dataset: (fit[0] // 32, fit[1] // 32) for dataset, fit in r.fits.items()},
            {},
            r.stride,
            r.halve,
        )
        for key, r in protocols.RULES.items()
    }
    monkeypatch.setattr(protocols, "RULES", rules)
    dataset = Noise([stored], domain)
    protocol = protocols.protocol(name, domain, "gta5", (16, 16), (8, 8))
    (batch,) = eval_batches(dataset, batch_size=2, protocol=protocol)
    place = list(batch["index"]).index(0)
    assert (tuple(batch["size"][place]), tuple(batch["label_size"][place])) == (seen, judged)

    sample = dataset[0]
    image, label = sample["image"], sample["label"]
    if judged != stored:  # halved
        rows, columns = (
            [int((i + 0.5) * old / new) for i in range(new)]
            for old, new in zip(stored, judged, strict=True)
        )
        label = label[rows][:, columns]
        half = Image.fromarray(image).resize(judged[::-1], Image.Resampling.BICUBIC)
        image = np.asarray(half)
    np.testing.assert_array_equal(batch["label"][place, : judged[0], : judged[1]], label)
    image = cv2.resize(image, seen[::-1], interpolation=cv2.INTER_LINEAR)
    expected = bilinear(native.scores(image.astype(np.float32), (stride, stride)), judged)

    fields = {key: batch[key] for key in ("image", "size", "label", "label_size")}
    label_maps = native.task.labelling(native.plan.graph)
    found = label_maps(native.state, sharding.to_devices(fields, native.mesh), protocol)
    found = np.asarray(found)[place, : judged[0], : judged[1]]
    best = np.sort(expected, axis=-1)
    clear = best[..., -1] - best[..., -2] > 1e-4 * np.abs(expected).max()
    assert clear.mean() > 0.99
    np.testing.assert_array_equal(found[clear], expected.argmax(-1)[clear])


@pytest.mark.parametrize(
    ("protocol", "manhole"),
    [
        *[("vltseg", 0), ("tqdm", 0), ("native", 0)],
        *[("rein", 255), ("soma", 255), ("mgrnet", 255)],
    ],
)
def test_a_protocol_brings_its_label_map(tmp_path, monkeypatch, protocol, manhole):
    """Mapillary's manholes are road under vltseg and ignored under rein, whatever
    data.mapillary_labels says for training; the other protocols have one of the two.
    """
    monkeypatch.setenv("JAXDG_CACHE", str(tmp_path / "cache"))
    items = trees.make("mapillary", tmp_path, np.random.default_rng(0))
    c = config(
        evaluation__protocol=protocol, evaluation__domains=("mapillary",), data__root=str(tmp_path)
    )
    dataset = evaluate.open_domains(tasks.make_task(c))["mapillary"]
    item = next(item for item in items if item.image == dataset.name(0))
    assert (item.ids == 41).any()
    assert (dataset[0]["label"][item.ids == 41] == manhole).all()


@pytest.mark.parametrize("zipped", [False, True])
def test_conditions_of_a_tree(tmp_path, monkeypatch, native, zipped):
    """ACDC as published, in folders and in archives: four conditions of two images each, in one
    pass; results.json holds them.
    """
    monkeypatch.setenv("JAXDG_CACHE", str(tmp_path / "cache"))
    trees.make("acdc", tmp_path, np.random.default_rng(0), zipped=zipped)
    c = config(evaluation__domains=("acdc", "acdc/fog"), data__root=str(tmp_path))
    task = tasks.make_task(c)
    said = []
    domains = evaluate.open_domains(task)
    standing = evaluate.standings(task, domains, TrainedOn(("clear",)), said.append)
    assert said == []  # a condition of a dataset is its part by name
    results = evaluate.evaluate_domains(
        native.evaluator, native.state, domains, standing, lambda *_: None
    )
    assert list(results) == ["acdc", "acdc/fog", "acdc/night", "acdc/rain", "acdc/snow"]
    assert [r.metrics["images"] for r in results.values()] == [8, 2, 2, 2, 2]
    evaluate.write_results(evaluate.summary(native.task, c, 3, results), results, tmp_path)
    stored = json.loads((tmp_path / "results.json").read_text())
    assert [entry["part_of"] for entry in stored["domains"].values()] == [
        None,
        "acdc",
        "acdc",
        "acdc",
        "acdc",
    ]
    assert stored["mean_unseen"] == stored["domains"]["acdc"]["mIoU"]


def test_other_classes_are_refused(native):
    """A domain with CamVid's classes names both lists."""
    with pytest.raises(
        ValueError, match=r"domain noise has the classes sky, .* but the model was trained on road"
    ):
        native.evaluator(native.state, Noise(SIZES, labels=CAMVID), lambda: None)


def test_domains_without_truth_are_in_no_mean(native, tmp_path):
    """A domain whose labels are all ignored has no score: null in results.json and its means are
    those without it; a part likewise.
    """
    blank = type(
        "Blank",
        (Noise,),
        {
            "__getitem__": lambda self, i: {
                **Noise.__getitem__(self, i),
                "label": np.full(SIZES[i], 255, np.uint8),
            }
        },
    )
    domains = {"noise": Noise(SIZES[:2]), "test": blank(SIZES[:2]), "source": Noise(SIZES[2:4])}
    standing = {
        "noise": Standing(False),
        "test": Standing(False),
        "source": Standing(True, np.array([True, False])),
    }
    results = evaluate.evaluate_domains(
        native.evaluator, native.state, domains, standing, lambda *_: None
    )
    everything = evaluate.summary(native.task, native.config, 3, results)
    evaluate.write_results(everything, results, tmp_path)
    stored = json.loads((tmp_path / "results.json").read_text())
    entry = stored["domains"]["test"]
    assert (entry["mIoU"], entry["classes"], entry["without_truth"]) == (
        None,
        0,
        list(CITYSCAPES.names),
    )
    assert stored["mean_unseen"] == stored["domains"]["noise"]["mIoU"]
    assert stored["rPD"] == pytest.approx(
        100 * stored["mean_unseen"] / stored["domains"]["source"]["mIoU"]
    )
    assert [e["trained_on"] for e in stored["domains"].values()] == [None, None, 1]
    truth = {
        name: {int(v) for i in range(2) for v in np.unique(dataset[i]["label"])} - {255}
        for name, dataset in domains.items()
    }
    lacks = {
        name: [c for k, c in enumerate(CITYSCAPES.names) if k not in truth[name]] for name in truth
    }
    assert {name: e["without_truth"] for name, e in stored["domains"].items()} == lacks
    assert {c for c, names in stored["classes_differ"].items()} == set(lacks["noise"]) ^ set(
        lacks["source"]
    )
    only = evaluate.summary(native.task, native.config, 3, {"test": results["test"]})
    assert (only["mean_unseen"], only["rPD"], only["classes_differ"]) == (None, None, {})


def test_a_domain_is_named_once(native):
    """`fog,fog` would be judged once and counted once without a word."""
    c = config()
    c.evaluation.domains = ("fog", "night", "fog")
    with pytest.raises(
        ValueError, match=r"^evaluation\.domains names fog more than once; name every domain once$"
    ):
        evaluate.open_domains(tasks.make_task(c))


def test_a_published_split_without_labels_is_named_early(tmp_path, monkeypatch):
    """ACDC's test images have no labels: said as soon as they are opened, of a subset too; its
    validation images have.
    """
    monkeypatch.setenv("JAXDG_CACHE", str(tmp_path / "cache"))
    trees.make("acdc", tmp_path, np.random.default_rng(0))
    said = []
    c = config(
        evaluation__domains=("acdc/test", "acdc/fog/val"),
        evaluation__max_images=2,
        data__root=str(tmp_path),
    )
    task = tasks.make_task(c)
    evaluate.standings(task, evaluate.open_domains(task), TrainedOn(("clear",)), said.append)
    assert said == ["acdc/test has no labels, so it gets no score"]


def test_what_was_trained_on_is_asked_of_workdir_then_images_then_names(tmp_path, monkeypatch):
    """source.npz first, the source's images where they are here, else the names, which is said; and
    of the run it started from as well.
    """
    monkeypatch.setenv("JAXDG_CACHE", str(tmp_path / "cache"))
    trees.make("acdc", tmp_path / "data", np.random.default_rng(0))
    here = tasks.make_task(config(data__source="acdc/night", data__root=str(tmp_path / "data")))
    elsewhere = tasks.make_task(
        config(data__source="acdc/night", data__root=str(tmp_path / "nothing"))
    )
    run = tmp_path / "run"
    before = tmp_path / "before"
    said = []
    for folder in (run, before):
        folder.mkdir()
    found = evaluate.known_source(here, tasks.Workdir(run), said.append)
    assert (found.domains, found.count, len(found.images), said) == (("acdc/night",), 2, 2, [])
    found = evaluate.known_source(elsewhere, tasks.Workdir(run), said.append)
    assert (found.domains, found.images) == (("acdc/night",), None)
    assert len(said) == 1
    assert "told by its name alone" in said[0]
    started = evaluate.trained_on(here, here.open("acdc/night", train=True), run, said.append)
    started.save(run)
    (run / "checkpoints/2").mkdir(
        parents=True
    )  # what a workdir notes counts once it has saved something
    assert evaluate.known_source(elsewhere, tasks.Workdir(run), said.append).images is not None
    (before / "source.npz").write_bytes((run / "source.npz").read_bytes())
    c = config(data__source="clear", model__start=str(before))
    task = tasks.make_task(c)
    found = evaluate.trained_on(task, task.open("clear", train=True), tmp_path, said.append)
    assert (found.domains, found.count, len(found.images)) == (("clear", "acdc/night"), 1000, 1002)
    (run / "source.npz").write_bytes(b"")
    assert (
        evaluate.trained_on(here, here.open("acdc/night", train=True), run, said.append).count == 2
    )
    assert evaluate.known_source(here, tasks.Workdir(run), said.append).count == 2
    assert said[1:] == [line for line in said[1:] if "source.npz is damaged" in line]
    assert len(said) == 3


def test_pictures_that_are_mixed_in_are_trained_on(tmp_path, monkeypatch):
    """A folder of pictures with a domain's images makes it seen where PixMix or TLDR use it, and
    only there; no step trains on nothing.
    """
    monkeypatch.setenv("JAXDG_CACHE", str(tmp_path / "cache"))
    trees.make("acdc", tmp_path, np.random.default_rng(0))
    c = config(data__root=str(tmp_path), evaluation__domains=("acdc/fog", "acdc/night", "clear"))
    for pictures, pixmix, expected in (
        (None, 4, (0, 0)),
        ("acdc/rgb_anon/fog/val", 0, (0, 0)),
        ("acdc/rgb_anon/fog/val", 4, (2, 0)),
    ):
        c.data.pictures = pictures and str(tmp_path / pictures)
        c.data.pixmix = (pixmix, 4.0)
        task = tasks.make_task(c)
        trained = evaluate.own_source(task, task.open("clear", train=True))
        found = evaluate.standings(task, evaluate.open_domains(task), trained, lambda line: None)
        assert (
            tuple(int(found[name].trained_on.sum()) for name in ("acdc/fog", "acdc/night"))
            == expected
        )
        assert found["acdc/fog"].seen == (expected[0] > 0)
        assert found["clear"].seen
    c.steps = 0
    c.data.source = "acdc"
    task = tasks.make_task(c)
    assert len(evaluate.own_source(task, task.open("acdc", train=True)).images) == 0
