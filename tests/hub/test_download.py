"""Downloads from a server that cuts, changes, refuses and lies."""

from collections.abc import Iterator
import hashlib
import json
from pathlib import Path
import shutil
import socket
import subprocess
import sys
import threading

import numpy as np
import pytest

from jaxdg.hub import download as downloads
from jaxdg.hub.download import DownloadError, download
from tests.hub.server import File, Server, serving

DATA = np.random.default_rng(0).bytes(1_000_003)  # some chunks and a bit
SHA256 = hashlib.sha256(DATA).hexdigest()
OTHER = bytes(reversed(DATA))


@pytest.fixture(autouse=True)
def impatient(monkeypatch):
    """No pauses between tries, and no proxy."""
    monkeypatch.setattr(downloads, "PAUSES", (0, 0, 0))
    monkeypatch.setenv("no_proxy", "127.0.0.1")


@pytest.fixture
def server() -> Iterator[Server]:
    """Serves DATA as /file."""
    with serving({"/file": File(DATA)}) as running:
        yield running


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def test_a_file_is_fetched_once_and_its_record_tells_what_it_is(server, tmp_path):
    """The bytes are the server's, their sha256 is noted, and the second call asks nobody."""
    lines: list[str] = []
    path = tmp_path / "new" / "file.pt"
    for _ in range(2):
        assert download(f"{server.url}/file", path, note=lines.append) == path
    assert path.read_bytes() == DATA
    assert len(server.asked) == 1
    assert names(path.parent) == {"file.pt", "file.pt.json"}
    assert downloads.record(path) == {
        "url": f"{server.url}/file",
        "sha256": SHA256,
        "bytes": len(DATA),
        "published_sha256": None,
    }
    assert lines[-1] == f"file.pt: 1 MB, sha256 {SHA256[:16]}.. noted, as nobody publishes it"


@pytest.mark.parametrize(
    ("known", "file"),
    [
        (None, File(DATA)),
        (None, File(DATA, etag=None, modified="Wed, 21 Oct 2015 07:28:00 GMT")),
        (SHA256, File(DATA, etag=None)),
    ],
    ids=["etag", "date", "sha256"],
)
def test_cut_downloads_go_on_where_they_ended(tmp_path, known, file):
    """Each try asks for what is missing, and what tells that it is of the same file is enough."""
    file.cuts = [300_000, 300_000, 700_000]
    with serving({"/file": file}) as server:
        path = download(f"{server.url}/file", tmp_path / "file", sha256=known)
    assert path.read_bytes() == DATA
    assert server.ranges() == [None, "bytes=300000-", "bytes=300000-", "bytes=700000-"]
    assert server.asked[1][1].get("if-range") == (file.etag or file.modified)


def test_a_later_process_goes_on(server, tmp_path):
    """What a download kept that gave up serves the next one."""
    server.files["/file"].cuts = [400_000] * 4
    with pytest.raises(
        DownloadError, match=r"ended after 400000 of 1000003 bytes, 4 times; 0.4 MB"
    ):
        download(f"{server.url}/file", tmp_path / "file")
    assert names(tmp_path) == {"file.partial", "file.partial.json"}
    download(f"{server.url}/file", tmp_path / "file")
    assert (tmp_path / "file").read_bytes() == DATA
    assert server.ranges()[-1] == "bytes=400000-"
    assert names(tmp_path) == {"file", "file.json"}


def test_all_bytes_kept_ask_for_none(server, tmp_path):
    """A process that was killed before it compared the bytes left them, and they are taken."""
    (tmp_path / "file.partial").write_bytes(DATA)
    known = {"url": f"{server.url}/file", "validator": None, "total": len(DATA)}
    (tmp_path / "file.partial.json").write_text(json.dumps({**known, "published": SHA256}))
    download(f"{server.url}/file", tmp_path / "file")
    assert not server.asked
    assert downloads.record(tmp_path / "file")["published_sha256"] == SHA256


@pytest.mark.parametrize("data", [OTHER, DATA[:200_000]], ids=["other", "shorter"])
def test_a_file_that_changed_meanwhile_begins_again(server, tmp_path, data):
    """Bytes of two files are never joined."""
    server.files["/file"].cuts = [400_000] * 4
    with pytest.raises(DownloadError):
        download(f"{server.url}/file", tmp_path / "file")
    server.files["/file"] = File(data, etag='"v2"')
    assert download(f"{server.url}/file", tmp_path / "file").read_bytes() == data


def test_kept_bytes_of_another_file_are_found_by_their_sha256(server, tmp_path):
    """Without ETag and date only the sha256 tells that a server changed: it begins once more."""
    server.files["/file"] = File(OTHER, etag=None, cuts=[400_000] * 4)
    with pytest.raises(DownloadError):
        download(f"{server.url}/file", tmp_path / "file", sha256=SHA256)
    server.files["/file"] = File(DATA, etag=None)
    download(f"{server.url}/file", tmp_path / "file", sha256=SHA256)
    assert (tmp_path / "file").read_bytes() == DATA
    assert server.ranges()[-2:] == ["bytes=400000-", None]


@pytest.mark.parametrize(
    "file",
    [File(DATA, ranges=False), File(DATA, etag=None), File(DATA, etag='W/"v1"')],
    ids=["no ranges", "nothing tells", "weak"],
)
def test_what_cannot_go_on_begins_again(tmp_path, file):
    """Where a server sends no parts, or nothing tells that they are of one file, all is sent."""
    file.cuts = [300_000]
    with serving({"/file": file}) as server:
        assert download(f"{server.url}/file", tmp_path / "file").read_bytes() == DATA
    assert len(server.asked) == 2


def test_a_server_that_never_sends_all_is_left(tmp_path):
    """Without ranges every try begins again, so bytes beyond the furthest count as progress."""
    file = File(DATA, ranges=False, cuts=[500_000, 300_000, 400_000] * 9)
    told = "the same command goes on"
    with serving({"/file": file}) as server, pytest.raises(DownloadError, match=told):
        download(f"{server.url}/file", tmp_path / "file")
    assert len(server.asked) == 1 + len(downloads.PAUSES)


def test_a_file_of_unknown_length_is_taken_as_it_comes(tmp_path):
    """Without a length, the end of the connection ends the file."""
    with serving({"/file": File(DATA, length=False)}) as server:
        assert download(f"{server.url}/file", tmp_path / "file").read_bytes() == DATA


@pytest.mark.parametrize("digits", [64, 8])
def test_wrong_bytes_are_refused(server, tmp_path, digits):
    """Bytes of another sha256 get no name, and none of them are kept."""
    wrong = hashlib.sha256(OTHER).hexdigest()[:digits]
    told = rf"its sha256 is {SHA256}, and should be {wrong}[.]*; it was removed; try again"
    with pytest.raises(ValueError, match=told):
        download(f"{server.url}/file", tmp_path / "file", sha256=wrong)
    assert not names(tmp_path)
    download(f"{server.url}/file", tmp_path / "file", sha256=SHA256[:digits].upper())
    assert downloads.record(tmp_path / "file")["sha256"] == SHA256
    with pytest.raises(ValueError, match=r"file is not the published file: .*; remove it"):
        download(f"{server.url}/file", tmp_path / "file", sha256=wrong)


def test_a_file_put_by_hand_is_verified_and_taken(tmp_path):
    """It needs no network, and is no other than the published one."""
    (tmp_path / "file").write_bytes(OTHER)
    with pytest.raises(ValueError, match=r"file is not the published file: its sha256"):
        download("http://127.0.0.1:9/file", tmp_path / "file", sha256=SHA256)
    (tmp_path / "file").write_bytes(DATA)
    download("http://127.0.0.1:9/file", tmp_path / "file", sha256=SHA256)
    assert downloads.record(tmp_path / "file")["published_sha256"] == SHA256
    assert names(tmp_path) == {"file", "file.json"}


def test_redirects_tell_the_hubs_sha256_and_the_token_stays_home(tmp_path):
    """The hub redirects to another host: the token is not sent there, and the sha256 is heeded."""
    hub_says = {"X-Linked-Etag": f'"{SHA256}"', "X-Linked-Size": str(len(DATA))}
    with serving() as hub, serving({"/bytes": File(DATA, cuts=[100])}) as store:
        hub.files["/old"] = File(to="/file", token="secret")
        hub.files["/file"] = File(to=f"{store.url}/bytes", headers=hub_says, token="secret")
        path = download(f"{hub.url}/old", tmp_path / "file", token="secret")
        assert downloads.record(path)["published_sha256"] == SHA256
        assert all("authorization" not in headers for _, headers in store.asked)
        assert store.ranges() == [None, "bytes=100-"]
        hub.files["/file"].headers["X-Linked-Etag"] = f'"{"0" * 64}"'
        with pytest.raises(ValueError, match="is not the published file"):
            download(f"{hub.url}/file", tmp_path / "other", token="secret")


@pytest.mark.parametrize(
    ("status", "message"),
    [
        (401, r"/file: refused without a token \(401 Unauthorized\)"),
        (403, r"/file: refused without a token \(403 Forbidden\)"),
        (404, r"/file: there is no such file \(404 Not Found\)"),
        (400, r"/file: not sent \(400 Bad Request\)"),
    ],
)
def test_refusals_are_told_at_once(server, tmp_path, status, message):
    """A status that another try cannot mend ends the download after one."""
    server.files["/file"].statuses = [status] * 9
    with pytest.raises(DownloadError, match=message) as caught:
        download(f"{server.url}/file", tmp_path / "file")
    assert caught.value.status == status
    assert len(server.asked) == 1
    assert not names(tmp_path)


def test_a_busy_server_is_asked_again(server, tmp_path, monkeypatch):
    """As long as it wishes to wait."""
    slept: list[float] = []
    monkeypatch.setattr(downloads.time, "sleep", slept.append)
    server.files["/file"].statuses = [503, 429]
    server.files["/file"].headers = {"Retry-After": "7"}
    assert download(f"{server.url}/file", tmp_path / "file").read_bytes() == DATA
    assert slept == [7, 7]


def test_a_login_page_is_no_file(server, tmp_path):
    """Networks that ask for a login answer everything by a page."""
    server.files["/file"] = File(b"<html>", headers={"Content-Type": "text/html; charset=utf-8"})
    with pytest.raises(DownloadError, match="a page of text comes in place of the file"):
        download(f"{server.url}/file", tmp_path / "file")


def test_without_network_the_host_is_told(tmp_path):
    """A host that does not answer at all is told at once."""
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{closed.getsockname()[1]}/file"
        with pytest.raises(DownloadError, match=r"cannot reach 127.0.0.1 \(") as caught:
            download(url, tmp_path / "file")
    assert caught.value.status is None
    with pytest.raises(ValueError, match="allowed: a URL with http or https"):
        download("file:///etc/hostname", tmp_path / "file")


def test_a_disk_without_room_is_told_before_the_download(server, tmp_path, monkeypatch):
    """What does not fit is not begun."""
    usage = shutil.disk_usage(tmp_path)._replace(free=900_000)
    monkeypatch.setattr(downloads.shutil, "disk_usage", lambda _: usage)
    with pytest.raises(OSError, match=r"disk full: 1 MB are to come and 0.9 MB are free"):
        download(f"{server.url}/file", tmp_path / "file")
    assert not names(tmp_path)


def test_of_two_processes_one_fetches_and_the_other_says_for_whom_it_waits(server, tmp_path):
    """The second asks the server nothing and gets the same file."""
    file = server.files["/file"]
    file.gate = threading.Event()
    program = (
        "import sys; from jaxdg.hub.download import download\n"
        "print(download(sys.argv[1], sys.argv[2]).stat().st_size)"
    )
    command = [sys.executable, "-c", program, f"{server.url}/file", str(tmp_path / "file")]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, **pipes) as first:
        assert file.begun.wait(60)
        with subprocess.Popen(command, **pipes) as second:
            assert second.stderr is not None
            waits = second.stderr.readline()
            file.gate.set()
            for process in (first, second):
                assert process.stdout is not None
                assert process.stdout.read() == f"{len(DATA)}\n"
    assert waits.startswith(f"file is being fetched by process {first.pid} on host ")
    assert len(server.asked) == 1
    assert names(tmp_path) == {"file", "file.json"}
