"""What `auto`, or the name of a file of the Hugging Face hub, stands for in a run's configuration,
and the record of that in its workdir.

The name stays in the configuration, so that a run goes on anywhere. `weights.json` in the workdir
says which files it was when the run began.
"""

import dataclasses
import json
from pathlib import Path
from typing import Any

from jaxdg import config as config_lib
from jaxdg import files, methods, weights
from jaxdg.config import Config, paths
from jaxdg.config import workdir as workdir_lib
from jaxdg.hub import huggingface, published, store
from jaxdg.hub.store import Say
from jaxdg.text.clip_text import TEXT_TOWERS

AUTO = "auto"  # of `model.weights` and `model.text_weights`


def names(config: Config) -> dict[str, str]:
    """The weights of a run that are known by a name, by field.

    Returns:
        Names of published weights for `auto`, or of files of the hub, at `model.weights` and
        `model.text_weights`, or at one of them; nothing where both are paths.

    Raises:
        ValueError: no file is published for the encoder, it has no text tower, or a name of the hub
            is none of a file.
    """
    m = config.model
    found = {
        f"model.{field}": huggingface.of_file(value)
        for field in ("weights", "text_weights")
        if (value := getattr(m, field)) and value.startswith(paths.HUB)
    }
    if m.weights == AUTO:
        found["model.weights"] = m.encoder
    if m.text_weights == AUTO:
        found["model.text_weights"] = tower = f"{m.encoder}_text"
        if tower not in TEXT_TOWERS:
            raise ValueError(
                f"model.text_weights is auto; allowed: a file, as {m.encoder} has no text tower"
            )
    for field, name in found.items():
        try:
            if not name.startswith(paths.HUB):
                published.of(name)
        except ValueError as error:
            raise ValueError(f"{field} is auto, but {error}") from error
    return found


def resolved(config: Config) -> Config:
    """A configuration with the paths that names stand for, whether the files are there or not; the
    same one if it has none.
    """
    kept = {
        field.removeprefix("model."): str(_path_of(name)) for field, name in names(config).items()
    }
    if not kept:
        return config
    return dataclasses.replace(config, model=dataclasses.replace(config.model, **kept))


def fetch(config: Config, workdir: Path, note: Say) -> dict[str, dict[str, Any]]:
    """Fetches what names stand for, as far as a run still reads it.

    Args:
        config: of the run.
        workdir: of the run; need not exist.
        note: receives lines for a person.

    Returns:
        The record of each file by field, see `_record`; none that the run does not read.

    Raises:
        DownloadError: a file could not be fetched.
        ValueError: the run began with other weights.
    """
    found = {}
    for field, name in _read(config, workdir).items():
        if name.startswith(paths.HUB):
            huggingface.fetched(name, note=note)
        else:
            store.get(name, note)
        found[field] = _record(name)
    began = _began(workdir)
    for field, name in _read(config, workdir).items():
        now = found[field]
        before = began.get(field) or now
        bring = "bring" if name.startswith(paths.HUB) else "convert"
        if before["source_sha256"] != now["source_sha256"]:
            raise ValueError(
                f"{field} is {config_lib.get(config, field)}, which is {now['source']} of sha256"
                f" {now['source_sha256']} now, but {workdir} began with {before['source']} of"
                f" {before['source_sha256']}; {bring} that one to {_path_of(name)}"
            )
    return found


def claim(config: Config, workdir: Path) -> None:
    """Writes the record of the weights that a run begins with; one that goes on keeps its own."""
    if workdir_lib.saved(workdir):
        return
    found = {field: _record(name) for field, name in _read(config, workdir).items()}
    if found:
        files.write(workdir / "weights.json", json.dumps(found, indent=2) + "\n")
    else:
        (workdir / "weights.json").unlink(missing_ok=True)


def _path_of(name: str) -> Path:
    """Where what a name stands for is kept; it need not be there."""
    if name.startswith(paths.HUB):
        return huggingface.parsed(name).kept
    return store.path_of(name)


def _record(name: str) -> dict[str, Any]:
    """What the weights that a name stands for are and come from, as `store.record`; the source of a
    file of the hub is that file, and the licence that of its model.
    """
    if not name.startswith(paths.HUB):
        return store.record(name)
    path = _path_of(name)
    model = weights.metadata(path).get("model", "")
    return {
        "model": model,
        "file": path.name,
        "source": name,
        "source_sha256": files.sha256(path),
    }


def _read(config: Config, workdir: Path) -> dict[str, str]:
    """`names`, if the run reads the files: when it begins without another run's model, and for
    methods that look at the encoder before training.
    """
    begins = config.model.start is None and not workdir_lib.saved(workdir)
    return names(config) if begins or methods.active(config) else {}


def _began(workdir: Path) -> dict[str, dict[str, Any]]:
    """What `claim` wrote in a run that goes on; nothing for one that begins."""
    if not workdir_lib.saved(workdir):
        return {}
    return files.recall(workdir / "weights.json", lambda content: isinstance(content, dict)) or {}
