"""Weights by name, from a server on this machine to converted files in a cache."""

from collections.abc import Iterator
import hashlib
import json
from pathlib import Path
import re
import socket

import pytest
from safetensors.numpy import save

import jaxdg
from jaxdg import backbones, hub, weights
from jaxdg.conversion import convert, models
from jaxdg.hub import command, published, store
from jaxdg.hub.download import DownloadError
from jaxdg.hub.published import FILES, HUB, Published
from tests import clip_models
from tests.hub.server import File, Server, serving

OPEN = "/authors.example/clip/small.safetensors"
GATED = "/authors/small-clip/resolve/main/model.safetensors"


@pytest.fixture(scope="module")
def file() -> bytes:
    """A published file with both towers of a small CLIP."""
    with pytest.MonkeyPatch.context() as patch:
        clip_models.register(patch)
        return save(clip_models.published("clip"))


@pytest.fixture
def server(monkeypatch, tmp_path, file) -> Iterator[Server]:
    """A mirror that has the file in the open and behind a gate, under names of the zoo."""
    clip_models.register(monkeypatch)
    sha256 = hashlib.sha256(file).hexdigest()
    monkeypatch.setitem(FILES, "small_clip", Published(f"https:/{OPEN}", sha256[:8]))
    monkeypatch.setitem(FILES, "small_eva02", Published(HUB + GATED, gated=True))
    monkeypatch.setenv("JAXDG_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_HOME", str(tmp_path / "no_tokens"))
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with serving({OPEN: File(file), GATED: File(file, token="secret")}) as running:
        monkeypatch.setenv("JAXDG_MIRROR", running.url)
        monkeypatch.setenv("HF_ENDPOINT", f"{running.url}/")
        yield running


def test_weights_by_name_are_those_that_are_converted_by_hand(server, tmp_path, file):
    """Both towers come from one download, equal the command's, and need no network again."""
    (tmp_path / "small.safetensors").write_bytes(file)
    for name in ("small_clip", "small_clip_text", "small_clip"):
        lines: list[str] = []
        path = hub.get(name, note=lines.append)
        assert path == tmp_path / "cache" / "weights" / f"{name}.safetensors"
        by_hand = tmp_path / f"{name}.safetensors"
        if not by_hand.exists():
            assert lines[0] == f"{name}: https:/{OPEN}, licence none"
            convert.convert(name, tmp_path / "small.safetensors", by_hand)
        else:
            assert not lines
        assert path.read_bytes() == by_hand.read_bytes()
    assert len(server.asked) == 1
    sha256 = hashlib.sha256(file).hexdigest()
    assert store.record("small_clip_text") == {
        "model": "small_clip_text",
        "file": "small_clip_text.safetensors",
        "source": "small.safetensors",
        "source_sha256": sha256,
        "url": f"https:/{OPEN}",
        "published_sha256": sha256[:8],
        "licence": "none",
        "jaxdg": jaxdg.__version__,
    }


def test_gated_files_need_a_token(server, tmp_path, monkeypatch):
    """Without one the message says how to get it; HF_TOKEN and the hub's own file are heeded."""
    told = (
        r"refused without a token \(401 Unauthorized\); accept the licence on"
        r" https://huggingface.co/authors/small-clip and set HF_TOKEN to a token of that account;"
    )
    with pytest.raises(DownloadError, match=told):
        hub.get("small_eva02")
    monkeypatch.setenv("HF_TOKEN", "wrong")
    with pytest.raises(DownloadError, match=r"refused \(401 Unauthorized\); accept the licence"):
        hub.get("small_eva02")
    monkeypatch.delenv("HF_TOKEN")
    (tmp_path / "no_tokens").mkdir()
    (tmp_path / "no_tokens" / "token").write_text("secret\n")
    # The file is of another model, so it is fetched and not converted.
    with pytest.raises(ValueError, match=r"is no checkpoint of small_eva02.*to fetch it again"):
        hub.get("small_eva02")
    fetched = tmp_path / "cache" / "weights" / "published" / "small-clip-model.safetensors"
    assert fetched.is_file()
    assert not store.path_of("small_eva02").exists()


def test_without_network_the_message_says_what_to_put_where(server, tmp_path, file, monkeypatch):
    """What it says works: the published file at the place it names, or the command it gives."""
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        monkeypatch.setenv("JAXDG_MIRROR", f"http://127.0.0.1:{closed.getsockname()[1]}")
        with pytest.raises(DownloadError, match=r"cannot reach 127\.0\.0\.1") as caught:
            hub.get("small_clip")
    told = re.search(
        r"put (\S+) by hand at (\S+) and run the same command, or convert it yourself: jaxdg"
        r" convert (.*)$",
        str(caught.value),
    )
    assert told is not None
    assert told[1] == f"https:/{OPEN}"
    place = Path(told[2])
    place.write_bytes(b"another file")
    with pytest.raises(ValueError, match="is not the published file"):
        hub.get("small_clip")
    place.write_bytes(file)
    hub.get("small_clip")
    kept = store.path_of("small_clip").read_bytes()

    store.path_of("small_clip").unlink()
    place.rename(tmp_path / place.name)
    monkeypatch.chdir(tmp_path)
    arguments = told[3].split()
    assert convert.main(arguments) == 0
    assert hub.get("small_clip") == store.path_of("small_clip")
    assert weights.metadata(store.path_of("small_clip"))["model"] == "small_clip"
    assert len(store.path_of("small_clip").read_bytes()) == pytest.approx(len(kept), abs=99)
    assert not server.asked


def test_what_a_licence_forbids_is_shown_first(server, monkeypatch):
    """The line comes before anything is asked for."""
    entry = backbones.entry("mocov3_b16")
    image = clip_models.MODELS["clip"][0]
    monkeypatch.setitem(
        backbones.ZOO, "small_clip", backbones.zoo.Entry(image, "a test", entry.licence, 1)
    )
    asked: list[int] = []
    lines: list[str] = []

    def note(line: str) -> None:
        asked.append(len(server.asked))
        lines.append(line)

    hub.get("small_clip", note)
    assert lines[0].endswith("licence CC-BY-NC-4.0, which forbids commercial use")
    assert asked[0] == 0


def test_a_kept_file_of_another_model_is_refused(server):
    """A file that was put there under a wrong name is not taken."""
    hub.get("small_clip")
    store.path_of("small_clip").rename(store.path_of("small_clip_text"))
    with pytest.raises(ValueError, match="holds small_clip, not small_clip_text; remove it"):
        hub.get("small_clip_text")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("dinov2_l41", r"unknown model 'dinov2_l41'; did you mean dinov2_l14\?"),
        ("scratch_ti8", "scratch_ti8 is trained from scratch and has no published weights"),
        ("dinov2_g14", "dinov2_g14 is not fetched by name: dinov2_vitg14_pretrain.pth"),
        ("vltseg", r"vltseg is not fetched by name: vltseg_checkpoint_\*\.pth, linked in"),
        ("mask2former", r"mask2former is not fetched by name: model_final_\*\.pkl in MODEL_ZOO"),
    ],
)
def test_names_without_a_published_file_are_told(name, message):
    """What the name is instead, or where its files are."""
    with pytest.raises(ValueError, match=message):
        hub.get(name)


def test_every_converted_encoder_has_a_published_file():
    """So has every text tower; names are those of the zoo, and two files share no name here."""
    assert set(FILES) == {*models.converted_encoders(), "faster_rcnn"}
    assert {published.of(name).url for name in backbones.TEXT_TOWERS} <= {
        file.url for file in FILES.values()
    }
    assert len({file.file for file in FILES.values()}) == len({f.url for f in FILES.values()})
    assert {published.licence(name) for name in FILES} >= set(published.FORBIDS)


def test_urls_are_those_of_the_files_that_the_list_names():
    """The list's words were written apart: a word of them is in each URL; so is each sha256."""

    def bare(text: str) -> str:
        return re.sub(r"[^a-z0-9]", "", text.lower())

    def names_a_file(word: str) -> bool:
        return len(bare(word)) > 5 and any(map(str.isdigit, word))

    listed = {row[0]: row[3] for row in models.listed()}
    for name, file in FILES.items():
        same = re.search(r"the file of (\w+)$", listed[name])
        words = re.split(r"[ ;*(]+", listed[same[1] if same else name])
        assert any(names_a_file(word) and bare(word) in bare(file.url) for word in words), name
        assert file.url.startswith("https://")
        assert file.sha256 is None or file.sha256 in file.url
        assert file.gated == ("dinov3" in name or name == "sd21")


def test_mirrors_take_the_place_of_hosts(monkeypatch):
    """HF_ENDPOINT is for the hub alone, JAXDG_MIRROR has a folder for each host."""
    monkeypatch.delenv("HF_ENDPOINT", raising=False)
    monkeypatch.delenv("JAXDG_MIRROR", raising=False)
    ours, theirs = FILES["eva02_clip_l14"], FILES["sam_b16"]
    assert (ours.address(), theirs.address()) == (ours.url, theirs.url)
    monkeypatch.setenv("JAXDG_MIRROR", "http://mirror:80/all/")
    assert theirs.address() == (
        "http://mirror:80/all/dl.fbaipublicfiles.com/segment_anything/sam_vit_b_01ec64.pth"
    )
    assert ours.address().startswith("http://mirror:80/all/huggingface.co/QuanSun/EVA-CLIP/")
    monkeypatch.setenv("HF_ENDPOINT", "https://hub.mirror")
    assert ours.address() == (
        "https://hub.mirror/QuanSun/EVA-CLIP/resolve/main/EVA02_CLIP_L_psz14_s4B.pt"
    )
    assert theirs.address().startswith("http://mirror:80/all/")


def test_the_command_lists_gets_and_fails_in_one_line(server, capsys):
    """`list` tells what is kept, to be had, or by hand; `get` prints paths, errors are one line."""
    assert command.main(["get", "small_clip", "small_clip_text"]) == 0
    out, err = capsys.readouterr()
    assert out.split() == [str(store.path_of(n)) for n in ("small_clip", "small_clip_text")]
    assert "small_clip: converts small.safetensors" in err
    assert command.main(["list"]) == 0
    rows = {line.split()[0]: line for line in capsys.readouterr().out.splitlines()}
    how = {name: re.split(r"  +", row)[3] for name, row in rows.items()}
    assert [how[name] for name in ("small_clip", "small_eva02", "small_resnet", "rein")] == [
        "kept",
        "get",
        "by hand",
        "by hand",
    ]
    server.files.clear()
    assert command.main(["get", "small_eva02"]) == 1
    err = capsys.readouterr().err.splitlines()[-1]
    assert err.startswith(f"error: {server.url}{GATED}: there is no such file (404 Not Found); put")
    assert json.loads(store.path_of("small_clip").with_suffix(".json").read_text())["url"]
