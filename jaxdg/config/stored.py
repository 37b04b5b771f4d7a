"""Reads experiment files, and the configuration that a workdir holds."""

import dataclasses
import importlib.util
import json
from pathlib import Path
from typing import Any

from jaxdg import files
from jaxdg.config.checking import PATHS, typed, validated
from jaxdg.config.neighbours import RECIPES, let_import
from jaxdg.config.settings import Config


def experiment_file(name: str | Path) -> Path:
    """The experiment file that a person means.

    Args:
        name: its path, or the name of a recipe that comes with this package, such as `gta5_eva02`.

    Raises:
        FileNotFoundError: there is none; the message names the recipes.
    """
    if Path(name).is_file():
        return Path(name)
    recipes = {path.stem: path for path in sorted(RECIPES.glob("*.py"))}
    if str(name) in recipes:
        return recipes[str(name)]
    known = f"; give a path, or the name of a recipe: {', '.join(recipes)}" if recipes else ""
    raise FileNotFoundError(f"no config file {name}{known}")


def from_file(path: str | Path) -> Config:
    """The validated `get_config()` of a file below configs/."""
    return validated(experiment(path).get_config())


def experiment(path: str | Path) -> Any:
    """The module that a file below configs/ is."""
    path = experiment_file(path)
    let_import(path)
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def save(config: Config, workdir: str | Path) -> None:
    """Writes `config.json` into the workdir, whole or not at all."""
    files.write(
        Path(workdir) / "config.json", json.dumps(dataclasses.asdict(config), indent=2) + "\n"
    )


def _once_empty(content: dict[str, Any]) -> dict[str, Any]:
    """The contents of config.json with what an empty path meant where one was still allowed: none,
    or the current folder.
    """
    for field, allowed in PATHS.items():
        owner, _, name = field.partition(".")
        holder = content.get(owner)
        if isinstance(holder, dict) and holder.get(name) == "":
            holder[name] = None if allowed.startswith("None") else "."
    return content


# Where the settings of two-stage detectors are that `model.rcnn` held once, one list for three
# detectors.
_RCNN = {
    "rpn": {"rpn_convs": "convs", "rpn_samples": "samples", "before": "before", "after": "after"},
    "roi": {
        name: name
        for name in (
            "channels",
            "convs",
            "fcs",
            "hidden",
            "proposals",
            "score_threshold",
            "nms",
            "detections",
        )
    },
}


def _renamed(content: dict[str, Any], kind: type[Config]) -> dict[str, Any]:
    """A stored configuration by the names that its fields have now.

    Methods of the experiment's own (`jaxdg.methods`) are left out: they change training alone, and
    only their file knows them.
    """
    known = {field.name for field in dataclasses.fields(kind)}
    content = {
        name: part
        for name, part in content.items()
        if name in known or not (isinstance(part, dict) and "on" in part)
    }
    model = dict(content.get("model") or {})
    if "segformer_channels" in model:
        model["segformer"] = {"hidden": model.pop("segformer_channels")}
    if "rcnn" in model:
        old = model.pop("rcnn")
        parts = {
            part: {new: old[name] for name, new in names.items() if name in old}
            for part, names in _RCNN.items()
        }
        one_stage = {"stages": [[0.5, 10.0]], "class_agnostic": False}
        for head, roi in (
            ("cascade_rcnn", {}),
            ("faster_rcnn", one_stage),
            ("faster_rcnn_c4", {**one_stage, "size": 14}),
        ):
            model[head] = {"rpn": dict(parts["rpn"]), "roi": {**parts["roi"], **roi}}
            if "anchors" in old:
                c4 = head == "faster_rcnn_c4"
                model[head]["rpn"]["sizes"] = (
                    [old["anchors"]] if c4 else [[size] for size in old["anchors"]]
                )
            kept = ("attention_pool",) if head == "faster_rcnn_c4" else ("channels", "levels")
            model[head] |= {name: old[name] for name in kept if name in old}
    return {**content, "model": model} if model else content


def load(workdir: str | Path, kind: type[Config] = Config) -> Config:
    """The configuration stored in a workdir.

    Args:
        workdir: of a run.
        kind: of an experiment that adds methods of its own; without it they are left out.

    Raises:
        FileNotFoundError: the folder holds no config.json.
        Broken: it is empty, cut or no JSON object.
        ValueError: it is no valid configuration.
    """
    path = Path(workdir) / "config.json"
    if not path.is_file():
        raise FileNotFoundError(
            f"{path} does not exist; give the workdir of a training run (the folder given to"
            " --workdir)"
        )
    try:
        content = files.read_json(path)
        if not isinstance(content, dict):
            raise files.Broken(f"{path}: broken (no JSON object)")
    except files.Broken as error:
        raise files.Broken(
            f"{error}; run the command that trains it again, which writes it anew and keeps the"
            " checkpoints"
        ) from None
    return of_content(content, path, kind)


def of_content(content: dict[str, Any], source: str | Path, kind: type[Config] = Config) -> Config:
    """The configuration that was written as `content`, by this version or an older one.

    Args:
        content: the JSON object.
        source: where it stands, for the error.
        kind: as for `load`.

    Raises:
        ValueError: it is no valid configuration.
    """
    try:
        return validated(typed(_once_empty(_renamed(content, kind)), kind))
    except ValueError as error:
        raise ValueError(f"{source}: {error}") from None
