"""What is installed: the wheel holds all of the package and its recipes, and every import is of a
declared distribution.
"""

import ast
from importlib import metadata
import os
from pathlib import Path
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile

import pytest
import yaml

ROOT = Path(__file__).resolve().parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
# Imported where a file or a flag asks for them; the message names the extra. By module, the name of
# its distribution.
OPTIONAL = {
    "apache_beam": "apache-beam",
    "huggingface_hub": "huggingface-hub",
    "mlflow": "mlflow-skinny",
    "onnxruntime": "onnxruntime",
    "pycocotools": "pycocotools",
    "torch": "torch",
    "wandb": "wandb",
}
# Asks for an orbax-checkpoint older than ours, so that no extra can bring it; the message says how.
UNDECLARED = {"jax2onnx"}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """The wheel as pip builds it, from a copy without what other builds left."""
    folder = tmp_path_factory.mktemp("wheel")
    for name in ("jaxdg", "configs"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "setup.py", "MANIFEST.in", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, folder)
    command = [
        sys.executable,
        "-c",
        "from setuptools import build_meta; build_meta.build_wheel('dist')",
    ]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (path,) = (folder / "dist").iterdir()
    return path


def test_the_wheel_holds_the_package_and_its_recipes(wheel):
    """Every file below jaxdg/, and the recipes of configs/ as jaxdg/configs; nothing else but the
    wheel's own words.
    """
    ours = {
        path.relative_to(ROOT).as_posix()
        for path in (ROOT / "jaxdg").rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    recipes = {f"jaxdg/configs/{path.name}" for path in (ROOT / "configs").glob("*.py")}
    assert "jaxdg/text/clip_merges.txt.gz" in ours
    assert "jaxdg/configs/streets_tiny.py" in recipes
    found = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    assert found == ours | recipes


def test_an_installed_recipe_builds_on_another(wheel, tmp_path):
    """Away from the checkout `gta5_eva02_repro` imports `gta5_eva02`; no folder of the package
    becomes a place of modules.
    """
    zipfile.ZipFile(wheel).extractall(tmp_path / "site")
    program = (
        "import importlib.util, sys\nfrom jaxdg import"
        " config\nconfig.from_file('gta5_eva02_repro')\nimport"
        " configs.gta5_eva02\nprint(config.__file__, configs.gta5_eva02.__file__,"
        " importlib.util.find_spec('drawing'), sep='\\n')\n"
    )
    (tmp_path / "away").mkdir()
    environment = {**os.environ, "PYTHONPATH": str(tmp_path / "site")}
    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd=tmp_path / "away",
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    site = tmp_path / "site" / "jaxdg"
    assert done.stdout.split() == [
        str(site / "config" / "__init__.py"),
        str(site / "configs" / "gta5_eva02.py"),
        "None",
    ]


def normal(name: str) -> str:
    """A distribution's name as indexes compare it, without version and extras."""
    return re.sub(r"[-_.]+", "-", re.split(r"[^\w.-]", name)[0]).lower()


def imported(folder: Path) -> dict[str, str]:
    """The third-party modules that files below a folder import, each with one such file."""
    found = {}
    for path in sorted(folder.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names = (
                [node.module or ""]
                if isinstance(node, ast.ImportFrom) and not node.level
                else names
            )
            found |= {name.partition(".")[0]: str(path.relative_to(ROOT)) for name in names}
    ours = {"jaxdg", "configs", "conversion", "scripts", "tests"}
    return {
        name: path for name, path in found.items() if name not in sys.stdlib_module_names | ours
    }


@pytest.mark.parametrize("folder", ["jaxdg", "conversion", "configs"])
def test_every_import_is_declared(folder):
    """What comes along with something else today may be gone with its next version."""
    distributions = metadata.packages_distributions()
    declared = {normal(requirement) for requirement in PROJECT["dependencies"]}
    missing = {
        name: path
        for name, path in imported(ROOT / folder).items()
        if name not in OPTIONAL.keys() | UNDECLARED
        and not declared & {normal(found) for found in distributions.get(name, [name])}
    }
    assert not missing, "imported, but not among the dependencies of pyproject.toml"


def test_optional_imports_are_declared_as_extras():
    """Each belongs to an extra, so that `pip install "jaxdg[EXTRA]"` brings it."""
    extras = {
        normal(requirement)
        for group in PROJECT["optional-dependencies"].values()
        for requirement in group
    }
    assert {normal(name) for name in OPTIONAL.values()} <= extras


def test_the_citation_names_this_version_and_licence():
    """CITATION.cff, which GitHub shows, says what pyproject.toml says."""
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["version"] == PROJECT["version"]
    assert citation["license"] == PROJECT["license"]


def test_the_container_gets_what_the_wheel_is_built_from():
    """Every file that the Dockerfile copies is there and is not kept out by .dockerignore; what the
    wheel's build reads is among them.
    """
    copied = {
        source
        for line in (ROOT / "Dockerfile").read_text().splitlines()
        if line.startswith("COPY ")
        for source in line.split()[1:-1]
    }
    let_in = {
        line.removeprefix("!")
        for line in (ROOT / ".dockerignore").read_text().splitlines()
        if line.startswith("!")
    }
    assert copied == let_in
    assert all((ROOT / name).exists() for name in copied)
    assert {"pyproject.toml", "setup.py", "MANIFEST.in", "README.md", "LICENSE"} <= copied
    assert {"jaxdg", "configs"} <= copied


def test_public_ci_runs_what_everybody_runs():
    """GitHub's workflow is valid YAML and runs .ci/run, which the page of contributors names."""
    workflow = yaml.safe_load((ROOT / ".github" / "workflows" / "ci.yml").read_text())
    steps = [step.get("run") for job in workflow["jobs"].values() for step in job["steps"]]
    assert ".ci/run" in steps
    assert os.access(ROOT / ".ci" / "run", os.X_OK)
    for form in (ROOT / ".github" / "ISSUE_TEMPLATE").glob("*.yml"):
        assert isinstance(yaml.safe_load(form.read_text()), dict)
