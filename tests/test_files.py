"""Small files are written whole or not at all, and a broken one is named, kept and passed over."""

import errno
import os

import pytest

from jaxdg import files


def test_written_whole_or_not_at_all(tmp_path, monkeypatch):
    """A failure while the new content is written, or before it is on the disk, leaves the old;
    success leaves nothing else.
    """
    path = tmp_path / "a.json"
    files.write(path, "old")

    def full(_):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(
            OSError,
            match=(
                rf"^disk full: {path} cannot be written \(No space left on device\); .*free some"
                r" space"
            ),
        ):
            files.write(path, "new")
    assert path.read_text() == "old"
    files.write(path, b"new")
    assert path.read_text() == "new"
    assert os.listdir(tmp_path) == ["a.json"]


def test_on_the_disk_before_it_has_its_name(tmp_path, monkeypatch):
    """The order that a crash of the machine cannot break: content to the disk, then the name, then
    the folder.
    """
    calls = []
    monkeypatch.setattr(
        os,
        "fsync",
        lambda handle: calls.append(
            "folder" if os.path.isdir(f"/proc/self/fd/{handle}") else "content"
        ),
    )
    replace = os.replace
    monkeypatch.setattr(os, "replace", lambda *paths: calls.append("name") or replace(*paths))
    files.write(tmp_path / "a", "x")
    assert calls == ["content", "name", "folder"]


def test_an_error_names_the_file(tmp_path):
    """A folder that is not there, or one in the file's place."""
    with pytest.raises(OSError, match="none/a"):
        files.write(tmp_path / "none" / "a", "x")


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "empty"),
        (b"\0\0", "nothing but zeros or blanks"),
        (b"{", "no JSON"),
        (b"\xff", "no JSON"),
        (b"[", "no JSON"),
    ],
)  # fmt: skip
def test_a_broken_file_is_named_and_set_aside(tmp_path, content, reason):
    """Reading names it; recalling says so in a line, keeps it under another name each time, and
    gives None.
    """
    path = tmp_path / "a.json"
    said = []
    for aside in ("a.json.broken", "a.json.broken2"):
        path.write_bytes(content)
        with pytest.raises(files.Broken, match=rf"^{path}: broken \({reason}"):
            files.read_json(path)
        assert files.recall(path, lambda _: True) is None
        assert path.exists()
        assert files.recall(path, lambda _: True, said.append) is None
        assert not path.exists()
        assert (tmp_path / aside).read_bytes() == content
        assert said[-1].endswith(f"it is kept as {aside}; it is made again")


def test_what_is_there_is_recalled(tmp_path):
    """Nothing is None; what it should hold comes back; JSON of another kind is broken too."""
    path = tmp_path / "a.json"
    assert files.recall(path, lambda _: False, pytest.fail) is None
    path.write_text('{"a": 1}')
    assert files.recall(path, lambda content: "a" in content, pytest.fail) == {"a": 1}
    said = []
    assert files.recall(path, lambda content: isinstance(content, list), said.append) is None
    assert "it does not hold what it should" in said[0]
    path.write_text("null")
    assert files.recall(path, lambda _: True, said.append) is None
    assert len(said) == 2
