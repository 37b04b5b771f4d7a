"""Runs whose weights are `auto`."""

import hashlib
import json
from pathlib import Path
import signal

import numpy as np
import pytest
from safetensors.numpy import save_file

from jaxdg import train
from jaxdg.commands import command_line as cli
from jaxdg.commands import model_card
from jaxdg.config import Config, validated
from jaxdg.hub import runs, store
from jaxdg.hub.published import FILES, Published
from jaxdg.tasks import run_state
from jaxdg.training import distributed
from tests import clip_models


@pytest.fixture
def by_hand(monkeypatch, tmp_path) -> Path:
    """A machine without network, on which somebody has put the published file of `small_clip`."""
    clip_models.register(monkeypatch)
    monkeypatch.setitem(FILES, "small_clip", Published("https://localhost:9/clip.safetensors"))
    monkeypatch.setenv("JAXDG_CACHE", str(tmp_path / "cache"))
    file = store.folder() / "published" / "clip.safetensors"
    file.parent.mkdir(parents=True)
    save_file(clip_models.published("clip"), file)
    return file


def run_config() -> Config:
    """A zero-shot run on streets: it reads both files and saves the model, and that is all."""
    c = Config(steps=0, eval_every=0)
    c.data.crop = (40, 40)
    c.data.streets.size = (40, 80)
    c.data.streets.images = 2
    c.model.encoder = "small_clip"
    c.model.weights = c.model.text_weights = "auto"
    c.model.pyramid = "none"
    c.model.decoder = "clip_text"
    c.evaluation.stride = (40, 40)
    return validated(c)


def start(c: Config, workdir: Path) -> None:
    train.train(c, workdir, cli.console(), cli.Interrupt())


def test_auto_is_the_file_of_the_encoders_name(by_hand, tmp_path, capsys):
    """The model is the one of the files by path; the workdir says which files, and keeps `auto`.

    Going on needs none of them.
    """
    c = run_config()
    start(c, tmp_path / "auto")
    assert (
        "small_clip: https://localhost:9/clip.safetensors, licence none" in capsys.readouterr().out
    )
    config = json.loads((tmp_path / "auto" / "config.json").read_text())
    assert config["model"]["weights"] == config["model"]["text_weights"] == "auto"
    noted = json.loads((tmp_path / "auto" / "weights.json").read_text())
    assert {field: (entry["model"], entry["source"]) for field, entry in noted.items()} == {
        "model.weights": ("small_clip", "clip.safetensors"),
        "model.text_weights": ("small_clip_text", "clip.safetensors"),
    }

    started = model_card.origin(run_state.opened(tmp_path / "auto"))
    assert started["text_weights"] == {
        "file": "small_clip_text.safetensors",
        "model": "small_clip_text",
        "published_file": "clip.safetensors",
        "published_sha256": hashlib.sha256(by_hand.read_bytes()).hexdigest(),
        "url": "https://localhost:9/clip.safetensors",
        "licence": "none",
    }
    assert model_card.licences({"started_from": started}) == ["none"]

    paths = runs.resolved(c)
    assert paths.model.weights == str(store.path_of("small_clip"))
    start(paths, tmp_path / "paths")
    assert not (tmp_path / "paths" / "weights.json").exists()
    stored = run_state.stored_tensors(tmp_path / "paths")
    for name, tensor in run_state.stored_tensors(tmp_path / "auto").items():
        np.testing.assert_array_equal(tensor, stored[name], err_msg=name)

    with pytest.raises(ValueError, match=r"model\.weights: 'auto' -> '.*small_clip\.safetensors'"):
        start(paths, tmp_path / "auto")
    for path in store.folder().rglob("*.safetensors"):
        path.unlink()
    start(c, tmp_path / "auto")
    assert "finished: 0 steps" in capsys.readouterr().out
    assert json.loads((tmp_path / "auto" / "weights.json").read_text()) == noted


def test_a_method_that_reads_the_weights_again_gets_those_the_run_began_with(by_hand, tmp_path):
    """A run that goes on reads them for such methods alone; a file of another sha256 is refused."""
    c = run_config()
    c.model.text_weights = None
    runs.fetch(c, tmp_path, print)
    runs.claim(c, tmp_path)
    noted = json.loads((tmp_path / "weights.json").read_text())
    (tmp_path / "checkpoints" / "5").mkdir(parents=True)
    assert runs.fetch(c, tmp_path, print) == {}
    c.tldr.on = True
    assert runs.fetch(c, tmp_path, print) == noted
    noted["model.weights"]["source_sha256"] = "0" * 64
    (tmp_path / "weights.json").write_text(json.dumps(noted))
    with pytest.raises(ValueError, match=rf"began with clip\.safetensors of {'0' * 64}; convert"):
        runs.fetch(c, tmp_path, print)


def test_a_run_that_saved_nothing_begins_with_other_weights(by_hand, tmp_path):
    """Then the record is that of the new beginning, or gone."""
    c = run_config()
    (tmp_path / "weights.json").write_text("{}")
    runs.fetch(c, tmp_path, print)
    runs.claim(c, tmp_path)
    assert len(json.loads((tmp_path / "weights.json").read_text())) == 2
    c.model.weights = c.model.text_weights = None
    runs.claim(c, tmp_path)
    assert not (tmp_path / "weights.json").exists()


@pytest.mark.parametrize(
    ("encoder", "field", "message"),
    [
        ("scratch_ti8", "weights", r"model\.weights is auto, but scratch_ti8 is trained from"),
        ("dinov2_l14", "text_weights", r"text_weights is auto; .* dinov2_l14 has no text tower"),
    ],
)
def test_auto_that_stands_for_nothing_is_refused(encoder, field, message):
    """Before anything is opened, with the reason."""
    c = Config()
    c.model.encoder = encoder
    setattr(c.model, field, "auto")
    with pytest.raises(ValueError, match=message):
        runs.names(c)


def test_other_weights_stay_as_they_are():
    """A path is a path, and the configuration is not even copied."""
    c = Config()
    c.model.weights = "./auto"
    assert runs.names(c) == {}
    assert runs.resolved(c) is c


def test_a_signal_ends_a_download_and_no_run():
    """While signals are lifted Ctrl-C ends the program; before and after it is noted."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        interrupt = cli.Interrupt()
        with pytest.raises(KeyboardInterrupt), interrupt.lifted():
            signal.raise_signal(signal.SIGINT)
        assert not interrupt.asked
        signal.raise_signal(signal.SIGINT)
        assert interrupt.asked
    finally:
        signal.signal(signal.SIGINT, before)


def test_a_download_is_no_hang():
    """`--patience` counts from its end."""
    with distributed.patient():
        assert distributed._progress == float("inf")
    assert distributed._progress < float("inf")
