"""`jaxdg COMMAND`: its table, what it says to a command it does not know, and recipes by name from
any folder.
"""

import importlib.util
import os
from pathlib import Path
import subprocess
import sys

import pytest

from jaxdg import commands
from jaxdg import config as config_lib
from tests import forked

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def jaxdg(tmp_path):
    """Runs `jaxdg ARGUMENTS` in a folder away from the checkout."""

    def run(*arguments: str) -> subprocess.CompletedProcess:
        return forked.run("jaxdg", *arguments, folder=tmp_path)

    return run


@pytest.mark.parametrize("name", commands.COMMANDS)
def test_every_command_has_its_module(name):
    """The table names modules that exist."""
    assert importlib.util.find_spec(commands.COMMANDS[name][0]) is not None


@pytest.mark.parametrize(("name", "flag"), [("check", "--data_root"), ("study seeds", "--config")])
def test_help_of_a_command(jaxdg, name, flag):
    """`jaxdg NAME --help` is that command's own help, of one word or two."""
    done = jaxdg(*name.split(), "--help")
    assert flag in done.stdout
    assert "Traceback" not in done.stderr


def test_the_table_is_printed(jaxdg):
    """`jaxdg --help` names every command."""
    done = jaxdg("--help")
    assert done.returncode == 0
    assert all(f"  {name} " in done.stdout for name in commands.COMMANDS)


@pytest.mark.parametrize(
    "arguments", [[], ["check", "--help"], ["report", "--help"], ["convert", "--list"]]
)
def test_a_reader_may_leave(arguments):
    """`jaxdg ... | head -1` ends without a traceback or an error line, however much is printed."""
    line = [sys.executable, "-m", "jaxdg", *arguments]
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer) as output:
        done = subprocess.run(
            line, cwd=ROOT, stdout=output, stderr=subprocess.PIPE, text=True, check=False
        )
    assert done.returncode == 1
    assert "ipe" not in done.stderr


def test_an_unknown_command_is_one_line(jaxdg):
    """The error is one line, the exit code 1."""
    done = jaxdg("trian", "--config", "streets_tiny")
    assert done.returncode == 1
    assert done.stderr.strip() == "error: 'trian' is not a command"


@pytest.mark.parametrize(
    "given",
    [
        ("--config", "streets_tiny"),
        ("--config=streets_tiny",),
        ("--config", str(ROOT / "configs/streets_tiny.py")),
    ],
)
def test_a_recipe_is_found_from_any_folder(jaxdg, given):
    """By name or by path the command comes as far as the recipe's own values: here one that an
    override breaks.
    """
    done = jaxdg("train", *given, "--workdir", "run", "--config.steps=-1")
    assert done.returncode == 1
    assert done.stderr.startswith("error: steps is -1; allowed:")
    assert len(done.stderr.splitlines()) == 1


def test_a_recipe_of_ones_own_builds_on_one_that_comes_along(tmp_path, monkeypatch):
    """A file of any folder imports `configs.NAME`, and a neighbour by its own folder's name;
    `sys.path` stays as it was.
    """
    folder = tmp_path / "experiments_of_a_test"
    folder.mkdir()
    (folder / "longer.py").write_text("STEPS = 70_000\n")
    (folder / "mine.py").write_text(
        "from configs import streets_tiny\n"
        "from experiments_of_a_test import longer\n"
        "def get_config():\n"
        "    c = streets_tiny.get_config()\n"
        "    c.steps = longer.STEPS\n"
        "    return c\n"
    )
    before = [path for path in sys.path if path and Path(path).resolve() != ROOT]
    monkeypatch.setattr(sys, "path", list(before))
    config = config_lib.from_file(folder / "mine.py")
    assert config.steps == 70_000
    assert sys.path == before
