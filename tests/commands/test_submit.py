"""Submissions: accepted by the official code of Cityscapes, equal to the model's label maps, every
fault of a folder named.
"""

import dataclasses
import os
import zipfile

import jax
import numpy as np
from PIL import Image
import pytest

import jaxdg
from jaxdg import train
from jaxdg.commands import command_line as cli
from jaxdg.commands import submit
from jaxdg.config import Config, validated
from jaxdg.data.datasets import FolderOptions, StreetsOptions
from jaxdg.data.domains import open_domain
from jaxdg.data.labels import CITYSCAPES_IDS
from tests import forked
from tests.data import trees

SIZE = (32, 48)


def opened(name, tmp_path, monkeypatch, zipped=False):
    """A tree's test images, their benchmark with the tree's image count, and the files written."""
    monkeypatch.setenv("JAXDG_CACHE", str(tmp_path / "cache"))
    items = trees.make(name, tmp_path, np.random.default_rng(0), zipped=zipped, size=SIZE)
    dataset = open_domain(
        f"{name}/test",
        root=str(tmp_path),
        train=False,
        streets=StreetsOptions(),
        folder=FolderOptions(),
    )
    benchmark = dataclasses.replace(submit.BENCHMARKS[name], count=len(dataset))
    assert len(dataset) == sum(item.split == "test" for item in items) > 1
    return dataset, benchmark, items


def written(dataset, benchmark, folder):
    """A correct submission of random label maps, by image."""
    maps = {}
    for i in range(len(dataset)):
        maps[dataset.name(i)] = np.random.default_rng(i).integers(0, 19, SIZE).astype(np.uint8)
        submit.write(folder / benchmark.file(dataset.name(i)), maps[dataset.name(i)], benchmark)
    return maps


@pytest.mark.parametrize("zipped", [False, True])
def test_official_code_accepts_cityscapes(tmp_path, monkeypatch, zipped):
    """Cityscapesscripts finds one prediction an image and gives a submission of the truth an IoU of
    1 in every class.
    """
    official = pytest.importorskip("cityscapesscripts.evaluation.evalPixelLevelSemanticLabeling")
    dataset, benchmark, _ = opened("cityscapes", tmp_path, monkeypatch, zipped)
    maps = written(dataset, benchmark, tmp_path / "out")
    files = submit.expected(benchmark, dataset)
    assert submit.check(tmp_path / "out", files, benchmark) == []
    submit.pack(tmp_path / "out", list(files), tmp_path / "out.zip")
    with zipfile.ZipFile(tmp_path / "out.zip") as archive:
        archive.extractall(tmp_path / "server")
    inverse = {train: id for id, train in CITYSCAPES_IDS.items()}
    truths = []
    for name, label in maps.items():
        stem = os.path.basename(name).removesuffix("_leftImg8bit.png")
        truths.append(str(tmp_path / f"{stem}_gtFine_labelIds.png"))
        Image.fromarray(np.vectorize(inverse.get)(label).astype(np.uint8)).save(truths[-1])
    vars(official.args).update(
        evalInstLevelScore=False,
        JSONOutput=False,
        quiet=True,
        predictionPath=str(tmp_path / "server"),
        predictionWalk=None,
    )
    found = [official.getPrediction(official.args, truth) for truth in truths]
    scores = official.evaluateImgLists(found, truths, official.args)["classScores"]
    assert [value for value in scores.values() if not np.isnan(value)] == [1.0] * 19


def test_acdc_takes_train_ids_by_the_images_names(tmp_path, monkeypatch):
    """Every condition's images lie in one folder, under their own names, in train ids."""
    dataset, benchmark, items = opened("acdc", tmp_path, monkeypatch)
    maps = written(dataset, benchmark, tmp_path / "out")
    tests = {os.path.basename(item.image) for item in items if item.split == "test"}
    assert {path.name for path in (tmp_path / "out" / "labelTrainIds").iterdir()} == tests
    assert all(name.endswith("_rgb_anon.png") for name in tests)
    for name, label in maps.items():
        np.testing.assert_array_equal(
            Image.open(tmp_path / "out" / "labelTrainIds" / os.path.basename(name)), label
        )
    assert submit.check(tmp_path / "out", submit.expected(benchmark, dataset), benchmark) == []


def test_two_images_of_one_file_are_refused(tmp_path, monkeypatch):
    """The image is named that a second download left elsewhere."""
    _, benchmark, items = opened("cityscapes", tmp_path, monkeypatch)
    image = next(item.image for item in items if item.split == "test")
    other = os.path.join(os.path.dirname(os.path.dirname(image)), "copy", os.path.basename(image))
    os.makedirs(os.path.dirname(other))
    os.link(image, other)
    dataset = open_domain(
        "cityscapes/test",
        root=str(tmp_path),
        train=False,
        streets=StreetsOptions(),
        folder=FolderOptions(),
    )
    with pytest.raises(ValueError, match=r"both be submitted as .*_pred_labelIds\.png"):
        submit.expected(benchmark, dataset)


def test_published_counts_and_ids():
    """The servers' numbers of images and Cityscapes' label ids, written out by hand."""
    assert {name: b.count for name, b in submit.BENCHMARKS.items()} == {
        "cityscapes": 1525,
        "acdc": 2000,
    }
    assert submit.BENCHMARKS["cityscapes"].ids == (
        7,
        8,
        11,
        12,
        13,
        17,
        19,
        20,
        21,
        22,
        23,
        24,
        25,
        26,
        27,
        28,
        31,
        32,
        33,
    )
    assert (
        submit.BENCHMARKS["cityscapes"].file("/x/berlin_000000_000019_leftImg8bit.png")
        == "berlin_000000_000019_pred_labelIds.png"
    )


def test_every_fault_is_listed(tmp_path):
    """Missing, stray, doubled, cut, RGB, JPEG, 16-bit, wrongly sized and wrongly numbered files and
    a wrong count: one line each.
    """
    out = tmp_path / "out"
    benchmark = submit.BENCHMARKS["cityscapes"]
    files = [f"berlin_00000{i}_000019_pred_labelIds.png" for i in range(9)]
    expected = dict.fromkeys(files, SIZE)
    good = np.full(SIZE, 7, np.uint8)
    for name in files:
        submit.write(out / name, np.zeros(SIZE, np.uint8), benchmark)
    assert submit.check(out, expected, dataclasses.replace(benchmark, count=len(files))) == []
    (out / files[0]).unlink()
    (out / "more").mkdir()
    Image.fromarray(good).save(out / "more" / files[1])
    (out / files[2]).write_bytes((out / files[2]).read_bytes()[:-20])
    Image.fromarray(np.stack([good] * 3, -1)).save(out / files[3])
    Image.fromarray(good).save(out / files[4], "JPEG")
    Image.fromarray(good.astype(np.uint16)).save(out / files[5])
    Image.fromarray(good.T).save(out / files[6])
    Image.fromarray(good - 7).save(out / files[7])
    wrong = submit.check(out, expected, dataclasses.replace(benchmark, count=1525))
    for name, reason in (
        (files[0], "missing"),
        (f"more/{files[1]}", "belongs to no test image"),
        (files[2], "truncated (no PNG end chunk)"),
        (files[3], "RGB"),
        (files[4], "JPEG L; it must be a grey 8-bit PNG"),
        (files[5], "I;16; it must be a grey 8-bit PNG"),
        (files[6], "32x48; its image is 48x32"),
        (files[7], "ids 0 are no classes"),
        ("cityscapes/test", f"{len(files)} images; the server expects 1525"),
    ):
        assert sum(line.startswith(f"{name}: ") and reason in line for line in wrong) == 1, (
            name,
            reason,
            wrong,
        )
    assert len(wrong) == 9


def test_commands_write_the_models_label_maps(tmp_path, monkeypatch):
    """A trained checkpoint predicts a tree's test images at their sizes; too few for the server,
    they are not packed.
    """
    dataset, benchmark, _ = opened("cityscapes", tmp_path, monkeypatch)
    first = jax.devices()[:1]
    monkeypatch.setattr(jax, "devices", lambda: first)
    c = Config(steps=1, batch_size=2, log_every=1, eval_every=0, checkpoint_every=1)
    c.data.crop = c.evaluation.stride = (32, 32)
    c.data.streets.size = (32, 32)
    c.model.pyramid = "none"
    c.model.taps = (3,)
    train.train(validated(c), tmp_path / "run", cli.console(), cli.Interrupt())
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": ""}

    def command(*arguments):
        return forked.run("jaxdg.submit", *arguments, *shared, environment=environment)

    shared = (
        "--benchmark",
        "cityscapes",
        "--data_root",
        str(tmp_path),
        "--out",
        str(tmp_path / "out"),
    )
    done = command("--checkpoint", str(tmp_path / "run"), "--protocol", "native")
    assert done.returncode == 1
    assert "protocol native" in done.stdout
    assert f"cityscapes/test: {len(dataset)} images; the server expects 1525" in done.stdout
    assert "1 offenders, listed above" in done.stderr
    model = jaxdg.load(tmp_path / "run")
    for i in range(len(dataset)):
        stored = np.asarray(
            Image.open(tmp_path / "out" / "cityscapes" / benchmark.file(dataset.name(i)))
        )
        np.testing.assert_array_equal(
            stored, np.array(benchmark.ids)[model.predict(dataset[i]["image"])]
        )
    again = command("--check")
    assert (again.returncode, again.stderr) == (1, done.stderr)


def test_a_submission_is_not_put_among_other_files(tmp_path):
    """Said before anything is predicted; hidden files do not count, an earlier submission and its
    archive are replaced.
    """
    out = tmp_path / "cityscapes"
    files = ["a.png", "b.png"]
    archive = tmp_path / "cityscapes.zip"
    submit.check_out(out, files, archive)
    out.mkdir()
    for name in (*files, ".DS_Store", "Thumbs.db"):
        (out / name).write_bytes(b"")
    submit.pack(out, files, archive)
    submit.check_out(out, files, archive)
    (out / "leftImg8bit").mkdir()
    (out / "leftImg8bit/c.png").write_bytes(b"")
    with pytest.raises(
        ValueError,
        match=(
            r"/cityscapes holds leftImg8bit/c\.png, which is no prediction of a test image; give"
            r" another"
        ),
    ):
        submit.check_out(out, files, archive)
    (out / "leftImg8bit/c.png").unlink()
    with zipfile.ZipFile(archive, "a") as packed:
        packed.writestr("leftImg8bit/c.png", b"")
    with pytest.raises(
        ValueError,
        match=r"cityscapes\.zip is there and is no submission \(leftImg8bit/c\.png\); give another",
    ):
        submit.check_out(out, files, archive)
    archive.write_bytes(b"other")
    with pytest.raises(
        ValueError,
        match=r"cityscapes\.zip is there and is no submission \(File is not a zip file\)",
    ):
        submit.check_out(out, files, archive)
