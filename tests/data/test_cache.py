"""Kept arrays are used until one of the files that they were made from changes."""

import os
from pathlib import Path

import numpy as np
import pytest

from jaxdg.data import storage
from jaxdg.data.cache import cached, fingerprint
from jaxdg.data.index import index_pairs
from jaxdg.data.tree import Tree
from tests.data import trees

OLD = 10**18  # nanoseconds; what changed within two seconds is not kept


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch) -> None:
    """An empty cache."""
    monkeypatch.setenv("JAXDG_CACHE", str(tmp_path / "cache"))


def written(path: Path, text: str, at: int = OLD) -> Path:
    path.write_text(text)
    os.utime(path, ns=(at, at))
    return path


def content(path: Path) -> str:
    """The file's text, read once."""
    modified: dict[str, int] = {}

    def make() -> dict[str, np.ndarray]:
        modified.update([storage.modified(str(path))])
        return {"text": np.frombuffer(path.read_bytes(), np.uint8)}

    return cached(["text", path.name], modified, make)["text"].tobytes().decode()


def test_a_file_of_the_same_time_and_another_size_is_read_again(tmp_path):
    """An unpacked or copied file may keep its time; another size or another nanosecond counts.

    A file of the same time and size is not read.
    """
    file = tmp_path / "annotations.json"
    assert content(written(file, "old")) == "old"
    assert content(written(file, "new")) == "old"
    assert content(written(file, "longer")) == "longer"
    assert content(written(file, "sooner", OLD + 1)) == "sooner"
    file.unlink()
    with pytest.raises(FileNotFoundError):
        content(file)


def test_a_fingerprint_changes_with_what_it_is_of(tmp_path):
    """Time, size, order, member and place change it; another name of the folder does not."""
    (tmp_path / "a").mkdir()
    paths = [str(written(tmp_path / "a" / name, "text")) for name in ("x.png", "y.png")]
    first, modified = fingerprint(paths)
    assert modified in ({path: OLD} for path in paths)
    (tmp_path / "link").symlink_to(tmp_path / "a")
    assert fingerprint([path.replace("/a/", "/link/") for path in paths])[0] == first
    others = [fingerprint(paths[::-1]), fingerprint(paths[:1])]
    written(tmp_path / "a/y.png", "longer")
    others.append(fingerprint(paths))
    written(tmp_path / "a/y.png", "text", OLD + 1)
    others.append(fingerprint(paths))
    assert others[-1][1] == {paths[1]: OLD + 1}
    trees.write(tmp_path, "u/x.png", b"text", "all.zip")
    trees.write(tmp_path, "v/x.png", b"text", "all.zip")
    others += [fingerprint([f"{tmp_path}/all.zip/{folder}/x.png"]) for folder in "uv"]
    assert len({first, *(digest for digest, _ in others)}) == 7
    assert fingerprint([]) == fingerprint([])


def test_a_link_turned_to_another_copy_is_indexed_anew(tmp_path):
    """Two copies have folders of the same times; the sizes are those of the copy that is read."""
    for name, size in {"one": (4, 6), "two": (8, 6)}.items():
        for kind in ("images", "labels"):
            trees.write(
                tmp_path / name, f"{kind}/a.png", trees.encode(np.zeros(size, np.uint8), "PNG")
            )
        for path in [*(tmp_path / name).rglob("*"), tmp_path / name]:
            os.utime(path, ns=(OLD, OLD))
    for name, size in {"one": [4, 6], "two": [8, 6]}.items():
        (tmp_path / "now").unlink(missing_ok=True)
        (tmp_path / "now").symlink_to(tmp_path / name)
        tree = Tree(str(tmp_path / "now"), exact=True)
        pairs = index_pairs(tree, [("images", ("labels",))], image_suffix="", label_suffix="")
        assert pairs.sizes.tolist() == [size]
