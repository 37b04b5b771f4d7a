"""What the documentation tells people to type exists: commands, flags, fields of the configuration,
files.

Nothing is trained, read or converted; every command is started once, as far as its help.
"""

import json
from pathlib import Path
import re
import subprocess
import sys
import types

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdg import config, methods
from jaxdg.commands import COMMANDS
from tests import forked

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md"]
PAGES += [p for p in sorted((ROOT / "docs").rglob("*.md")) if "reports" not in p.parts]
BLOCK = re.compile(r"^```(\w*)[^\n]*\n(.*?)^```", re.MULTILINE | re.DOTALL)
START = re.compile(
    r"(?:^|(?<=[\s`]))(jaxdg(?= [a-z])|python -m jaxdg|python (?:conversion|scripts)/)"
)
# The names that commands had before their rooms, and where they lead.
FORMER = {
    "jaxdg.data.check": "jaxdg.commands.check",
    "jaxdg.data.prepare": "jaxdg.commands.prepare",
    "jaxdg.submit": "jaxdg.commands.submit",
    "jaxdg.export": "jaxdg.commands.export",
    "scripts/plan.py": "jaxdg.commands.plan",
}
COMMON = {"help", "helpfull", "debug"}


def lines(page: Path) -> list[tuple[int, str]]:
    """The lines of a page's blocks that are no other language's, continued ones joined, with their
    numbers.
    """
    text = page.read_text()
    found = []
    for block in BLOCK.finditer(text):
        if block[1] in ("", "sh", "bash", "console", "shell"):
            number = text.count("\n", 0, block.start(2)) + 1
            for i, line in enumerate(re.sub(r"\\\n *", "", block[2]).splitlines()):
                found.append((number + i, line))
    return found


def typed(page: Path) -> list[tuple[str, list[str]]]:
    """The commands of jaxdg in a page's blocks, and between backticks: where each stands, and its
    words.
    """
    text = page.read_text()
    spans = [
        (text.count("\n", 0, m.start()) + 1, m[1])
        for m in re.finditer(r"`([^`\n]+)`", BLOCK.sub(lambda m: "\n" * m[0].count("\n"), text))
    ]
    found = []
    for number, line in [*lines(page), *spans]:
        command = START.search(line)
        if command is None:
            continue
        words = re.split(r"\s#", line[command.start() :])[0].split()
        for end in ("&&", "|", ";"):
            words = words[: words.index(end)] if end in words else words
        found.append(
            (f"{page.relative_to(ROOT)}:{number}", [word.strip("[]'\"") for word in words])
        )
    return found


def program(words: list[str]) -> tuple[str, list[str]]:
    """The module or script that a command starts, and its arguments."""
    if words[0] == "jaxdg":
        count = 2 if words[1] == "study" else 1
        name = " ".join(words[1 : 1 + count])
        return COMMANDS[name][0] if name in COMMANDS else name, words[1 + count :]
    at = 2 if words[1] == "-m" else 1
    return words[at], words[at + 1 :]


TYPED = [(place, words) for page in PAGES for place, words in typed(page)]


@pytest.fixture(scope="module")
def flags() -> dict[str, set[str]]:
    """The flags of every command and script that has any, as it defines them when it starts."""
    done = subprocess.run(
        [sys.executable, "docs/generate.py"], cwd=ROOT, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    return {name: set(found) for name, found in json.loads(done.stdout.splitlines()[-1]).items()}


def faults(words: list[str], flags: dict[str, set[str]]) -> list[str]:
    """What is wrong with a command."""
    name, arguments = program(words)
    if name in ("jaxdg.studies.", "jaxdg.studies.NAME", "MODULE", "NAME"):
        name = "jaxdg.studies.seeds"
    name = FORMER.get(name, name)
    if name.endswith(".py") and not (ROOT / name).exists():
        return [f"{name} is not there"]
    if name not in flags and not name.endswith(".py"):
        return [f"{name} is no command"]
    wrong = []
    known = flags.get(name, set()) | COMMON
    for word in arguments:
        if found := re.match(r"--(no)?config\.([\w.]+)", word):
            if found[2] not in ("FIELD", "X"):
                try:
                    config.annotation(found[2])
                except ValueError as error:
                    wrong.append(str(error))
        elif (found := re.match(r"--(\w+)", word)) and found[1] not in known:
            wrong.append(f"{name} has no flag --{found[1]}")
        path = word.removeprefix("--config=").partition(":")[0]
        if path.startswith("configs/") and path != "configs/X.py" and not (ROOT / path).exists():
            wrong.append(f"{path} is not there")
    return wrong


def test_the_commands_of_the_documentation_exist(flags):
    """Of every command typed there: the module or script, each flag, each field, each recipe."""
    assert len(TYPED) > 50
    wrong = [f"{place}: {fault}" for place, words in TYPED for fault in faults(words, flags)]
    assert not wrong, "\n".join(wrong)


def test_mistakes_are_found(flags):
    """The check above sees a wrong module, script, flag, field and recipe."""
    for line in (
        "python -m jaxdg.trian --config configs/streets_tiny.py",
        "jaxdg predcit --checkpoint DIR",
        "python scripts/stretes_sheet.py",
        "python -m jaxdg.predict --chekpoint DIR",
        "python -m jaxdg.train --config.data.rooot=DATA",
        "python -m jaxdg.train --config configs/streets_tny.py",
    ):
        assert len(faults(line.split(), flags)) == 1, line
    right = "python -m jaxdg.train --config configs/streets_tiny.py"
    assert faults(right.split(), flags) == []


@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_files_that_pages_name_exist(page):
    """Links to files, and names of files of the repository between backticks, lead somewhere."""
    text = BLOCK.sub("", page.read_text())
    for target in re.findall(r"\]\((?!\w+:|#)([^)#\s]+)", text):
        assert (page.parent / target).exists(), f"{page.relative_to(ROOT)} links to {target}"
    folders = r"(?:configs|scripts|docs|benchmarks|tests|conversion|jaxdg)/"
    for name in re.findall(rf"`({folders}[\w/.]+\.(?:py|md|sh|yaml))`", text):
        if not re.search(
            r"X\.py|NAME|hidden\.py", name
        ):  # a name that stands for another, or is to be made
            assert (ROOT / name).exists(), f"{page.relative_to(ROOT)} names {name}"


def test_readme_begins_with_the_two_commands():
    """The command that trains and the one that tests stand alone on lines of a block of README."""
    commands = [line for _, line in lines(ROOT / "README.md")]
    train = "python -m jaxdg.train --config configs/streets_quick.py --workdir runs/streets"
    assert f"pip install -e . && {train}" in commands
    assert 'pip install -e ".[test]" && pytest' in commands


def test_the_command_of_readme_reads_its_experiment(tmp_path):
    """`--config FILE` with other flags behind it: a wrong value is what stops the run."""
    words = ["--config", "configs/streets_tiny.py", "--workdir", str(tmp_path / "run")]
    done = forked.run("jaxdg.train", *words, "--config.steps=-1", folder=ROOT)
    assert done.returncode == 1
    assert "steps is -1" in done.stderr, done.stderr


def examples(page: str) -> list[str]:
    """The blocks of Python in a page below docs/."""
    text = (ROOT / "docs" / page).read_text()
    return [block[2] for block in BLOCK.finditer(text) if block[1] == "python"]


def run(source: str, name: str, monkeypatch) -> types.ModuleType:
    """A block as a module of its own."""
    module = types.ModuleType(name)
    monkeypatch.setitem(sys.modules, name, module)  # where dataclasses look for their types
    exec(source, module.__dict__)
    return module


def test_experiments_of_the_pages_are_valid(monkeypatch):
    """Every whole experiment file that a page shows passes the check that a run makes first."""
    pages = ("tutorials/own-data.md", "how-to/add-a-method.md")
    shown = [block for page in pages for block in examples(page) if "def get_config" in block]
    assert len(shown) == 3
    found = [config.validated(run(b, "shown", monkeypatch).get_config()) for b in shown]
    assert [c.task for c in found] == ["segmentation", "detection", "segmentation"]
    assert [type(m).__name__ for m in methods.active(found[2])] == ["Calm"]


def test_the_decoder_of_its_page_computes(monkeypatch):
    """Scores of the image's size, and a loss whose parts add up to that of the batch."""
    hidden = run(examples("how-to/add-a-decoder.md")[0], "hidden", monkeypatch)
    options = hidden.HiddenOptions(width=8).config(("road", "sky"), "float32")
    head = options.build((4, 6), encoder="", rngs=nnx.Rngs(0))
    rng = np.random.default_rng(0)
    maps = [rng.normal(size=(2, n, n, c)).astype(np.float32) for n, c in ((8, 4), (4, 6))]
    label = jnp.asarray(rng.integers(0, 2, (2, 16, 16)), jnp.uint8)
    denominator = head.loss_denominator(label)
    key = jax.random.key(0)

    def loss(rows: slice):
        output = head(tuple(jnp.asarray(m[rows]) for m in maps))
        assert head.scores(output, (16, 16)).shape[1:] == (16, 16, 2)
        return head.loss(output, label[rows], denominator, key)["cross_entropy"]

    parts = loss(slice(0, 1)) + loss(slice(1, 2))
    np.testing.assert_allclose(parts, loss(slice(0, 2)), rtol=1e-5)


def test_the_dataset_of_its_page_opens_by_its_name(monkeypatch):
    """The entry that the page shows has the parts of its two splits."""
    entry = examples("how-to/add-a-dataset.md")[0]
    shown = run(f"from jaxdg.data.published import *\n{entry}", "shown", monkeypatch).IDD
    assert [part.count for part in shown.select("idd", train=True)] == [6993]
    assert [part.count for part in shown.select("idd", train=False)] == [981]


def test_every_field_is_documented(monkeypatch):
    """The page of the configuration can be made: no field is without documentation or default."""
    monkeypatch.setenv("JAXDG_DATA", "")  # which the page leaves out
    source = (ROOT / "docs" / "generate.py").read_text()
    monkeypatch.setitem(sys.modules, "generate", generate := types.ModuleType("generate"))
    generate.__file__ = str(ROOT / "docs" / "generate.py")
    exec(source, generate.__dict__)
    page = generate.fields()
    for field in ("data.folder.id_map", "model.mask2former.queries", "model.faster_rcnn.rpn.nms"):
        assert f"| `{field}` |" in page
