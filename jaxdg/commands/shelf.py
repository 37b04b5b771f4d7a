"""A folder of packed models that a group shares, and its pages.

NAME/FILE.safetensors   the model
NAME/README.md          its card
index.json              {"models": {NAME: what the table tells, and the file's sha256}}
README.md               the table of all models
"""

from collections.abc import Callable
import json
import os
from pathlib import Path
import shutil
from typing import Any

from jaxdg import files
from jaxdg.commands import model_card
from jaxdg.config import locks
from jaxdg.tasks import packed

Say = Callable[[str], None]
INDEX = "index.json"


def put(file: Path, shelf: Path, say: Say) -> Path:
    """Copies a packed model to a shelf and writes the pages anew; returns the model's folder.

    Args:
        file: the packed model; its name without suffix is the model's.
        shelf: the folder; made if needed.
        say: receives a line where another process writes there.

    Raises:
        ValueError: another model of that name is there.
        OSError: the folder cannot be written.
    """
    whole = packed.read(file)
    folder = shelf / file.stem
    target = folder / file.name
    digest = files.sha256(file)
    folder.mkdir(parents=True, exist_ok=True)
    with locks.held(shelf / "index.lock", str(shelf / INDEX), say, wait=600):
        if target.exists() and files.sha256(target) != digest:
            raise ValueError(
                f"{target} is there and is another model; give the file another name, or remove"
                " that one"
            )
        if not target.exists():
            partial = target.with_name(target.name + ".partial")
            with files.naming(target):
                shutil.copyfile(file, partial)
                os.replace(partial, target)
        page = model_card.page(whole, file.name, str(target), digest, target.stat().st_size)
        files.write(folder / "README.md", page)
        models = {
            name: entry
            for name, entry in index(shelf).items()
            if (shelf / name / entry["file"]).is_file()
        }
        models[file.stem] = {
            "file": file.name,
            "sha256": digest,
            "bytes": target.stat().st_size,
            **model_card.row(whole),
        }
        models = dict(sorted(models.items()))
        files.write(shelf / INDEX, json.dumps({"models": models}, indent=2) + "\n")
        files.write(shelf / "README.md", table(models))
    return folder


def index(shelf: Path) -> dict[str, dict[str, Any]]:
    """The models of a shelf by name; none if the folder is no shelf.

    Raises:
        Broken: the index is damaged.
    """
    content = files.read_json(shelf / INDEX)
    if content is None:
        return {}
    models = content.get("models") if isinstance(content, dict) else None
    if not isinstance(models, dict) or not all("file" in entry for entry in models.values()):
        raise files.Broken(f"{shelf / INDEX}: broken (no models in it); remove it and push again")
    return models


def taken(source: Path) -> Path:
    """The packed model that a path means: the file itself, or the folder of a model on a shelf.

    Raises:
        FileNotFoundError: nothing is there.
        ValueError: it is a whole shelf, or no folder of a model.
    """
    if models := index(source):
        raise ValueError(f"{source} holds {', '.join(models)}; name one: {source}/NAME")
    if not source.is_dir():
        return source
    entry = index(source.parent).get(source.name)
    if entry is None:
        raise ValueError(f"{source} is no folder that jaxdg push made; name a packed model in it")
    return source / entry["file"]


def table(models: dict[str, dict[str, Any]]) -> str:
    """The page of a shelf."""
    lines = [
        "# Models",
        "",
        "`jaxdg pull FOLDER/NAME --out DIR` copies one; `jaxdg.load` reads it where it is.",
        "",
        "| name | task | encoder | decoder | trained on | unseen | protocol | MB | licences |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for name, entry in models.items():
        unseen = "-" if entry["mean_unseen"] is None else f"{entry['mean_unseen']:.1f}"
        size = f"{entry['bytes'] / 1e6:.1f}"
        cells = [entry[key] for key in ("task", "encoder", "decoder", "source")]
        cells += [unseen, entry["protocol"] or "-", size, ", ".join(entry["licences"]) or "-"]
        lines.append(f"| [{name}]({name}/README.md) | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"
