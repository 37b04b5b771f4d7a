"""Packed models in shared folders and on the Hugging Face hub, which a server on this machine
stands for: what is pushed comes back, and a name of the hub stands wherever a file may.
"""

import hashlib
import inspect
import json
from pathlib import Path
import sys
import types

import numpy as np
import pytest

from jaxdg import weights
from jaxdg.commands import push, shelf
from jaxdg.commands.pull import pull
from jaxdg.config import Config, validated
from jaxdg.data.labels import CITYSCAPES
from jaxdg.evaluation.overlap import TrainedOn
from jaxdg.hub import download as downloads
from jaxdg.hub import huggingface, runs
from jaxdg.hub.download import DownloadError
from jaxdg.tasks import packed
from jaxdg.tasks.run_state import opened
from tests.hub.server import File, serving

CARD = {
    "task": "segmentation",
    "encoder": "clip_b16",
    "decoder": "linear",
    "methods": [],
    "parameters": 12,
    "source": "clear",
    "trained_on": {"domains": ["clear"], "images": 4},
    "crop": [32, 64],
    "step": 3,
    "steps": 3,
    "batch_size": 2,
    "learning_rate": 1e-4,
    "seed": 0,
    "started_from": {
        "weights": {
            "file": "clip.safetensors",
            "model": "clip_b16",
            "sha256": "a" * 64,
            "published_file": "ViT-B-16.pt",
            "published_sha256": "b" * 64,
            "licence": "MIT",
        }
    },
    "scores": [
        {
            "protocol": "native",
            "max_images": None,
            "mean_unseen": 12.34,
            "rPD": 50.0,
            "domains": {
                "clear": {"mIoU": 24.68, "images": 2, "seen": True, "part_of": None},
                "fog": {"mIoU": 12.34, "images": 3, "seen": False, "part_of": None},
            },
        }
    ],
    "rounded": None,
    "versions": {"jaxdg": "0.1.0", "jax": "0.10", "flax": "0.12"},
}


def made(path: Path, value: float = 0.0) -> Path:
    """A packed file of one tensor, of no model that computes."""
    about = packed.Packed(
        config=validated(Config()),
        labels=CITYSCAPES,
        step=3,
        segment_ends=(),
        frozen=frozenset(),
        trained_on=TrainedOn(("clear",)),
        results=(),
        card=CARD,
    )
    packed.write(path, about, {"a": np.full(12, value, np.float32)})
    return path


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """A server that is the hub, with a packed model in a repository that a token opens."""
    content = made(tmp_path / "streets.safetensors", 1.0).read_bytes()
    files = {"/us/models/resolve/main/streets.safetensors": File(content, token="secret")}
    monkeypatch.setattr(downloads, "PAUSES", ())
    for name, value in (
        ("no_proxy", "127.0.0.1"),
        ("JAXDG_CACHE", str(tmp_path / "cache")),
        ("HF_TOKEN", "secret"),
    ):
        monkeypatch.setenv(name, value)
    with serving(files) as running:
        monkeypatch.setenv("HF_ENDPOINT", f"{running.url}/")
        yield running


def test_a_shelf_has_pages_and_gives_back_what_was_pushed(tmp_path):
    """Two models with a page each and a table of both; the bytes come back by the name; the same
    one may be pushed again, and another one of its name may not.
    """
    folder = tmp_path / "shelf"
    for i, name in enumerate(("b", "a", "a")):
        file = made(tmp_path / f"{name}.safetensors", float(name == "a"))
        assert shelf.put(file, folder, pytest.fail) == folder / name, i
    entries = json.loads((folder / "index.json").read_text())["models"]
    assert list(entries) == ["a", "b"]
    assert entries["a"]["sha256"] != entries["b"]["sha256"]
    table = (folder / "README.md").read_text()
    row = (
        "| [a](a/README.md) | segmentation | clip_b16 | linear | clear | 12.3 | native | 0.0 | MIT"
    )
    assert f"{row} |" in table.splitlines()
    page = (folder / "a/README.md").read_text()
    for line in (
        f'model = jaxdg.load("{folder / "a/a.safetensors"}")',
        "| native | clear (seen) | 24.7 | 2 |",
        "| native | mean of unseen | 12.3 | |",
        "Licence of what it started from: MIT.",
    ):
        assert line in page.splitlines()
    assert f"converted from ViT-B-16.pt, sha256 `{'b' * 64}`" in page
    found = pull(str(folder / "a"), tmp_path / "here")
    assert found == tmp_path / "here/a.safetensors"
    assert found.read_bytes() == (tmp_path / "a.safetensors").read_bytes()
    assert [path.name for path in found.parent.iterdir()] == ["a.safetensors"]
    with pytest.raises(ValueError, match="is there already; give another --out"):
        pull(str(folder / "a"), tmp_path / "here")
    with pytest.raises(ValueError, match=rf"holds a, b; name one: {folder}/NAME"):
        pull(str(folder), tmp_path / "here")
    made(tmp_path / "a.safetensors", 2.0)
    with pytest.raises(ValueError, match="is there and is another model"):
        shelf.put(tmp_path / "a.safetensors", folder, pytest.fail)
    with pytest.raises(ValueError, match="is no folder that jaxdg push made"):
        pull(str(tmp_path / "here"), tmp_path / "there")
    with pytest.raises(FileNotFoundError, match="no trained model at"):
        pull(str(folder / "c"), tmp_path / "there")


def test_a_name_of_the_hub_is_a_trained_model(hub, tmp_path):
    """`opened` fetches it once; `pull` fetches what is there now, keeps nothing of a cut or damaged
    one, and changes no other file.
    """
    name = "hf://us/models/streets.safetensors"
    for _ in range(2):
        assert opened(name).card() == CARD
    assert len(hub.asked) == 1
    kept = tmp_path / "cache/hub/us/models/main/streets.safetensors"
    assert kept.is_file()
    path = "/us/models/resolve/main/streets.safetensors"
    hub.files[path].data = made(tmp_path / "new.safetensors", 2.0).read_bytes()
    assert pull(name, tmp_path / "here").read_bytes() == hub.files[path].data
    assert kept.read_bytes() != hub.files[path].data
    hub.files["/us/models/resolve/v1/a/b.safetensors"] = File(hub.files[path].data)
    assert opened("hf://us/models@v1/a/b.safetensors").card() == CARD
    damaged = bytearray(hub.files[path].data)
    damaged[-1] ^= 1
    hub.files[path].data = bytes(damaged)
    with pytest.raises(ValueError, match="do not add up to their sha256"):
        pull(name, tmp_path / "there")
    assert list((tmp_path / "there").iterdir()) == []


def test_what_the_hub_does_not_give_is_one_line(hub, monkeypatch, tmp_path):
    """No such file, no permission, and names that are none."""
    kept = tmp_path / "cache/hub/us/models/main/none.safetensors"
    with pytest.raises(DownloadError, match=r"no such file .*; see that us/models has it") as error:
        opened("hf://us/models/none.safetensors")
    assert str(error.value).endswith(f"or put the file at {kept}")
    monkeypatch.setenv("HF_TOKEN", "wrong")
    with pytest.raises(DownloadError, match=r"refused .* that HF_TOKEN may read it"):
        opened("hf://us/models/streets.safetensors")
    with pytest.raises(ValueError, match="names a repository; name a file of it: hf://OWNER"):
        opened("hf://us/models")
    for wrong in (
        "hf://us",
        "hf://us/models/../x",
        "hf://us/../x",
        "hf://us/models@a/b//c",
        "hf://",
    ):
        with pytest.raises(ValueError, match="is no name of a file of the Hugging Face hub"):
            opened(wrong)


def test_a_run_knows_its_weights_by_a_name_of_the_hub(hub, tmp_path):
    """It is fetched to where `resolved` says, and noted; a run that goes on with another file of
    the name is refused.
    """
    weights.save({"a": np.zeros(3, np.float32)}, tmp_path / "w.safetensors", {"model": "clip_b16"})
    path = "/us/models/resolve/main/w.safetensors"
    hub.files[path] = File((tmp_path / "w.safetensors").read_bytes())
    c = Config()
    c.model.encoder = "clip_b16"
    c.model.weights = name = "hf://us/models/w.safetensors"
    c = validated(c)
    lines: list[str] = []
    (record,) = runs.fetch(c, tmp_path, lines.append).values()
    kept = Path(runs.resolved(c).model.weights or "")
    assert kept.read_bytes() == hub.files[path].data
    assert (record["model"], record["source"]) == ("clip_b16", name)
    assert record["source_sha256"] == hashlib.sha256(kept.read_bytes()).hexdigest()
    runs.claim(c, tmp_path)
    (tmp_path / "checkpoints/1").mkdir(parents=True)
    noted = json.loads((tmp_path / "weights.json").read_text())
    noted["model.weights"]["source_sha256"] = "0" * 64
    (tmp_path / "weights.json").write_text(json.dumps(noted))
    c.average.on = True
    with pytest.raises(ValueError, match=rf"weights is {name}, .* bring that one to {kept}"):
        runs.fetch(c, tmp_path, lines.append)
    c.model.weights = "hf://us/models"
    with pytest.raises(ValueError, match="names a repository"):
        runs.names(c)


def test_a_push_to_the_hub_is_one_commit(monkeypatch, tmp_path):
    """The file and its page go to a private repository, by calls that the library takes; without
    the library one line says what to install.
    """
    calls = []

    class Api:
        def __init__(self, **options):
            calls.append(("HfApi", (), options))

        def __getattr__(self, name):
            return lambda *args, **options: calls.append((name, args, options))

    fake = types.SimpleNamespace(HfApi=Api, CommitOperationAdd=lambda *args: args)
    monkeypatch.setenv("HF_TOKEN", "secret")
    file = made(tmp_path / "streets.safetensors")
    monkeypatch.setitem(sys.modules, "huggingface_hub", fake)
    full = push.to_hub(file, huggingface.parsed("hf://us/models"), public=False)
    assert full == "hf://us/models/streets.safetensors"
    made_api, create, commit = calls
    assert made_api == ("HfApi", (), {"token": "secret"})
    assert create == ("create_repo", ("us/models",), {"private": True, "exist_ok": True})
    name, (repo, operations), options = commit
    assert (name, repo, options["revision"]) == ("create_commit", "us/models", "main")
    assert operations[0] == ("streets.safetensors", file)
    assert operations[1][0] == "README.md"
    assert f'jaxdg.load("{full}")' in operations[1][1].decode()
    renamed = push.to_hub(file, huggingface.parsed("hf://us/models@v2/x.safetensors"), public=True)
    assert renamed == "hf://us/models@v2/x.safetensors"
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(ValueError, match=r"needs the extra hub: pip install \"jaxdg\[hub\]\""):
        push.to_hub(file, huggingface.parsed("hf://us/models"), public=False)
    monkeypatch.delitem(sys.modules, "huggingface_hub")
    library = pytest.importorskip("huggingface_hub")
    for name, args, options in calls[:3]:
        function = library.HfApi if name == "HfApi" else getattr(library.HfApi(), name)
        inspect.signature(function).bind(*args, **options)
    inspect.signature(library.CommitOperationAdd).bind("README.md", b"")
