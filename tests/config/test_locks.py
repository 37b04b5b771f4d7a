"""A lock names its holder, is freed by its death, and leaves nothing behind."""

import errno
import fcntl
import json
import os
import re
import signal
import socket
import subprocess
import sys

import pytest

from jaxdg.config import locks

HOLD = """
import pathlib, sys
from jaxdg.config import locks
with locks.held(pathlib.Path(sys.argv[1]), "the thing", print):
    print("holds", flush=True)
    sys.stdin.readline()
"""


@pytest.fixture
def other(tmp_path):
    """Another process that holds `tmp_path/lock`; it lets go when a line comes."""
    command = [sys.executable, "-c", HOLD, str(tmp_path / "lock")]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "holds\n"
    yield process
    process.kill()
    process.communicate()


def test_the_holder_is_named(other, tmp_path):
    """Process, host, time and command stand in the message and in the file."""
    path = tmp_path / "lock"
    told = (
        rf"the thing is in use by process {other.pid} on host {re.escape(socket.gethostname())}"
        rf" since \S+ \S+ \(.*\); .*{path}\)$"
    )
    with (
        pytest.raises(locks.InUse, match=told) as error,
        locks.held(path, "the thing", pytest.fail),
    ):
        pass
    assert "\n" not in str(error.value)
    assert json.loads(path.read_text())["pid"] == other.pid
    assert f"process {other.pid} on host" in (locks.holder(path) or "")


def test_death_frees_it(other, tmp_path):
    """After kill -9 the file is there and locked by nobody: the next one gets it, and removes it in
    the end.
    """
    other.send_signal(signal.SIGKILL)
    other.wait()
    path = tmp_path / "lock"
    assert path.is_file()
    assert locks.holder(path) is None
    with locks.held(path, "the thing", pytest.fail):
        assert json.loads(path.read_text())["pid"] == os.getpid()
    assert not path.exists()
    assert locks.holder(path) is None


def test_waiting_for_the_end_of_the_other(other, tmp_path):
    """With patience the lock is taken once the other lets go, though that removes the file."""
    assert other.stdin is not None
    other.stdin.write("\n")
    other.stdin.flush()
    with locks.held(tmp_path / "lock", "the thing", pytest.fail, wait=60):
        assert json.loads((tmp_path / "lock").read_text())["pid"] == os.getpid()


@pytest.mark.parametrize("content", ["", "{", "[1]", "\0" * 20])
def test_a_broken_note_is_no_obstacle(tmp_path, content):
    """What is in the file only serves messages."""
    (tmp_path / "lock").write_text(content)
    with locks.held(tmp_path / "lock", "the thing", pytest.fail):
        assert json.loads((tmp_path / "lock").read_text())["pid"] == os.getpid()


def test_a_file_system_without_locks(other, tmp_path, monkeypatch):
    """It is said; a living process of this host is noticed all the same, one of the past is not."""

    def refuse(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "lockf", refuse)
    said = []
    with (
        pytest.raises(locks.InUse, match=f"process {other.pid} on host"),
        locks.held(tmp_path / "lock", "the thing", said.append),
    ):
        pass
    other.kill()
    other.wait()
    with locks.held(tmp_path / "lock", "the thing", said.append):
        pass
    assert set(said) == {
        "the thing: its file system has no locks, so a second process on another host would not be"
        " noticed"
    }
