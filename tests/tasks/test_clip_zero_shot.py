"""A zero-shot run as a whole: two converted files and CamVid in, a judged workdir out, without a
step of training.
"""

import json

import jax
import numpy as np
import pytest

import jaxdg
from jaxdg import backbones, config, train, weights
from jaxdg.commands import command_line as cli
from jaxdg.config import Config
from jaxdg.data.domains import open_domain
from jaxdg.data.labels import CAMVID
from jaxdg.tasks import run_state as tasks
from jaxdg.training.metrics import read_metrics
from tests import clip_models


@pytest.fixture(autouse=True)
def zoo(monkeypatch):
    """The small models by name."""
    clip_models.register(monkeypatch)


@pytest.fixture(autouse=True)
def one_device(monkeypatch):
    """A checkpoint of arrays on eight devices compiles the cutting of each array eight times."""
    first = jax.devices()[:1]
    monkeypatch.setattr(jax, "devices", lambda: first)


@pytest.fixture
def some_camvid(data_path, tmp_path):
    """A data root with a few of CamVid's images of every domain."""
    real = data_path("camvid")
    for split, patterns in (
        ("train", ("0016E5_0*0.jpg",)),
        ("val", ("0016E5_*",)),
        ("test", ("Seq05VD_*", "0001TP_*")),
    ):
        for folder in (split, f"{split}annot"):
            (tmp_path / "data" / "camvid" / folder).mkdir(parents=True)
        for image in (
            path for pattern in patterns for path in sorted((real / split).glob(pattern))[:3]
        ):
            (tmp_path / "data" / "camvid" / split / image.name).symlink_to(image)
            label = real / f"{split}annot" / f"{image.stem}.png"
            (tmp_path / "data" / "camvid" / f"{split}annot" / label.name).symlink_to(label)
    return tmp_path / "data"


def run_config(folder, root) -> Config:
    """A zero-shot run of a small model converted into `folder`."""
    image, text = clip_models.convert("clip", folder)
    c = config.from_file("configs/camvid_clip_zero_shot.py")
    c.data.root = str(root)
    c.data.crop = (120, 160)
    c.evaluation.stride = (120, 160)
    c.model.encoder = "small_clip"
    c.model.weights = str(image)
    c.model.text_weights = str(text)
    c.evaluation.domains = ("camvid", "dusk")
    return config.validated(c)


def start(c, workdir):
    """Runs `train` in this process."""
    train.train(c, workdir, cli.console(), cli.Interrupt())


def test_a_zero_shot_run(some_camvid, tmp_path, capsys):
    """It judges every domain, the same way each time; going on, evaluating and predicting need
    neither of the converted files.
    """
    c = run_config(tmp_path, some_camvid)
    c.model.patch_size = 16
    start(c, tmp_path / "one")
    results = json.loads((tmp_path / "one" / "results.json").read_text())
    assert (results["step"], results["source"], list(results["domains"])) == (
        0,
        "camvid",
        ["camvid", "dusk"],
    )
    assert [entry["images"] for entry in results["domains"].values()] == [3, 3]
    assert all(0 <= entry["mIoU"] < 60 for entry in results["domains"].values())
    assert [row["domain"] for row in read_metrics(tmp_path / "one")] == ["camvid", "dusk"]
    stored = tasks.stored_tensors(tmp_path / "one")
    text = weights.read(c.model.text_weights)
    np.testing.assert_allclose(
        stored["head.texts"],
        backbones.text_embeddings(CAMVID.names, c.model.text_weights),
        rtol=1e-6,
    )
    for name in ("logit_scale", "image_projection.norm.bias", "image_projection.proj.kernel"):
        np.testing.assert_array_equal(stored[f"head.{name}"], text[name], err_msg=name)
    for file in (c.model.weights, c.model.text_weights):
        (tmp_path / file).unlink()

    # Had it died between checkpoint and evaluation, it would judge what it has saved. After that it
    # is finished.
    (tmp_path / "one" / "results.json").unlink()
    (tmp_path / "one" / "metrics.jsonl").write_text("")
    capsys.readouterr()
    start(c, tmp_path / "one")
    assert "resuming from step 0" in capsys.readouterr().out
    assert json.loads((tmp_path / "one" / "results.json").read_text()) == results
    start(c, tmp_path / "one")
    assert "finished" in capsys.readouterr().out

    # What `predict` and `evaluate` call: the label maps, counted here by hand, give the run's own
    # score.
    model = jaxdg.load(tmp_path / "one")
    dusk = open_domain(
        "dusk", root=str(some_camvid), train=False, streets=c.data.streets, folder=None
    )
    confusion = np.zeros((11, 11))
    for sample in (dusk[i] for i in range(3)):
        label_map = model.predict(sample["image"])
        known = sample["label"] != 255
        assert (label_map.shape, label_map.dtype) == (sample["label"].shape, np.uint8)
        np.add.at(confusion, (sample["label"][known], label_map[known]), 1)
    with np.errstate(invalid="ignore"):
        iou = np.diag(confusion) / (confusion.sum(0) + confusion.sum(1) - np.diag(confusion))
    assert abs(100 * np.nanmean(iou) - results["domains"]["dusk"]["mIoU"]) < 0.1


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"steps": 100},
            r"steps is 100; allowed: 0 with model.decoder clip_text, which trains nothing",
        ),
        (
            {"model.text_weights": None},
            r"model.text_weights is None; model.decoder clip_text needs a converted file",
        ),
        (
            {"model.weights": None},
            r"model.weights is None; model.decoder clip_text needs a converted file",
        ),
        (
            {"model.start": "runs/other"},
            r"model.start is runs/other; allowed: None with model.decoder clip_text",
        ),
        (
            {"model.taps": (3, 5)},
            r"model.taps is \(3, 5\); allowed: \(\) with model.decoder clip_text",
        ),
        (
            {"model.pyramid": "layer"},
            r"model.pyramid is layer; allowed: none with model.decoder clip_text",
        ),
        ({"model.decoder": "linear"}, r"steps is 0; allowed: at least 1 with model.decoder linear"),
        ({"steps": -1}, r"steps is -1; allowed: greater than or equal to 0"),
    ],
)
def test_settings_it_could_not_heed_are_refused(changes, message):
    """Each names the field, what is allowed, and why."""
    c = config.from_file("configs/camvid_clip_zero_shot.py")
    for field, value in changes.items():
        *parts, last = field.split(".")
        setattr(config.get(c, ".".join(parts)) if parts else c, last, value)
    with pytest.raises(ValueError, match=message):
        config.validated(c)


def test_missing_files_are_told_before_anything_is_built(some_camvid, tmp_path):
    """A text tower that is not there ends the run with its name; nothing was saved."""
    c = run_config(tmp_path, some_camvid)
    c.model.text_weights = str(tmp_path / "absent.safetensors")
    with pytest.raises(FileNotFoundError, match=r"no weights at .*absent.safetensors"):
        start(c, tmp_path / "run")
    assert not list((tmp_path / "run" / "checkpoints").glob("[0-9]*"))
