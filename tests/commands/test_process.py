"""What commands keep, compiled programs between runs and memory between steps, and what they make
of the environment.
"""

import os
from pathlib import Path
import platform
import pwd
import subprocess
import sys
import tempfile
import time

import jax
import pytest

from jaxdg.commands import process as runtime
from jaxdg.data import cache

# Compiles a function, with jax's own count of the programs that it found compiled.
COMPILE = """
import jax, os
from jaxdg.commands import process as runtime
events = []
jax.monitoring.register_event_listener(lambda name, **_: events.append(name))
runtime.set_up()
result = jax.jit(lambda x: x * 3 + 1)(2.0)
hits = sum(name.endswith("cache_hits") for name in events)
print(result, hits, jax.config.jax_compilation_cache_dir)
"""
# Bytes resident after 256 MB were taken and given back, twenty times over, and the most there were.
TAKE = """
import pathlib, sys
from jaxdg.commands import process as runtime
if sys.argv[1] == "kept":
    runtime.keep_memory()
for _ in range(20):
    len(b"x" * 2**28)
lines = pathlib.Path("/proc/self/status").read_text().splitlines()
status = dict(line.split(":") for line in lines)
print(*(1024 * int(status[name].split()[0]) for name in ("VmRSS", "VmHWM")))
"""


def python(code: str, *arguments: str, **environment: str) -> list[str]:
    """What a new process prints, in words."""
    own = {name: value for name, value in os.environ.items() if not name.startswith("JAX")}
    own |= {
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": "",
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        **environment,
    }
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments], env=own, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert not done.stderr, done.stderr
    return done.stdout.split()


def test_the_second_run_finds_the_first_ones_programs(tmp_path):
    """They lie beside what else is kept; those that nothing read for a month are deleted."""
    programs = tmp_path / "programs"
    value, found, folder = python(COMPILE, JAXDG_CACHE=str(tmp_path))
    assert (float(value), int(found), folder) == (7.0, 0, str(programs))
    stored = set(programs.iterdir())
    assert stored
    (programs / "old-cache").write_bytes(b"")
    (programs / "used-cache").write_bytes(b"")
    for name, days in (("old-cache", 31), ("used-cache", 29)):
        os.utime(programs / name, (time.time() - 86_400 * days,) * 2)
    value, found, _ = python(COMPILE, JAXDG_CACHE=str(tmp_path))
    assert float(value) == 7.0
    assert int(found) > 0
    assert set(programs.iterdir()) == stored | {programs / "used-cache"}


def test_a_folder_of_the_users_own_is_left_alone(tmp_path):
    """`JAX_COMPILATION_CACHE_DIR` wins, and old programs in it stay."""
    own = tmp_path / "own"
    own.mkdir()
    (own / "old-cache").write_bytes(b"")
    os.utime(own / "old-cache", (0, 0))
    assert python(COMPILE, JAXDG_CACHE=str(tmp_path / "cache"), JAX_COMPILATION_CACHE_DIR=str(own))[
        2
    ] == str(own)
    assert (own / "old-cache").exists()
    assert not (tmp_path / "cache").exists()


def test_a_folder_that_cannot_be_made_is_no_error(tmp_path):
    """Nothing is kept then."""
    (tmp_path / "file").write_bytes(b"")
    assert python(COMPILE, JAXDG_CACHE=str(tmp_path / "file"))[2] == "None"


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="glibc's malloc is meant")
def test_memory_is_kept_and_does_not_grow():
    """256 MB that were freed stay with the process, where without it they do not; twenty times
    over, it is no larger than after one.
    """
    size = 2**28
    (given_back, _), (kept, most) = (map(int, python(TAKE, how)) for how in ("given back", "kept"))
    assert given_back < size
    assert kept > size
    assert most < 2 * size


def test_a_user_without_a_home_keeps_things_in_the_temporary_folder(tmp_path, monkeypatch):
    """As in containers that run as a number: in a folder that is the user's own, and nowhere if
    someone else has made it.
    """
    monkeypatch.setenv("JAXDG_CACHE", "~/own")
    monkeypatch.setenv("HOME", "/home/me")
    assert cache.folder() == Path("/home/me/own")
    monkeypatch.delenv("JAXDG_CACHE")
    assert cache.folder() == Path("/home/me/.cache/jaxdg")
    monkeypatch.delenv("HOME")

    def unknown(uid):
        raise KeyError(f"getpwuid(): uid not found: {uid}")

    monkeypatch.setattr(pwd, "getpwuid", unknown)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    found = cache.folder()
    assert found == tmp_path / f"jaxdg-{os.getuid()}"
    assert found.stat().st_mode & 0o777 == 0o700
    owner = os.getuid()
    found.rename(tmp_path / f"jaxdg-{owner + 1}")
    monkeypatch.setattr(os, "getuid", lambda: owner + 1)
    with pytest.raises(OSError, match="Not a directory"):
        cache.folder().mkdir(parents=True)


def test_devices_that_are_not_there_are_one_line(monkeypatch):
    """What JAX_PLATFORMS asked for, whichever way jax fails to find it."""
    monkeypatch.setenv("JAX_PLATFORMS", "cuda")
    for error in (AssertionError(), RuntimeError("Unable to initialize backend 'cuda'\nmore")):

        def fail(error=error):
            raise error

        monkeypatch.setattr(jax, "default_backend", fail)
        with pytest.raises(
            ValueError,
            match=r"^jax finds no device to compute on \(.+\); JAX_PLATFORMS is cuda; unset it",
        ):
            runtime.backend()


def test_wide_arrays_are_turned_off():
    """JAX_ENABLE_X64 would make arrays that no checkpoint holds."""
    code = (
        "import jax; from jaxdg.commands import process as runtime; runtime.set_up();"
        " print(jax.numpy.ones(1, float).dtype)"
    )
    assert python(code, JAX_ENABLE_X64="1", JAXDG_CACHE=os.devnull) == ["float32"]
