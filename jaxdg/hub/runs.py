"""What `auto` in a run's configuration stands for, and the record of that in its workdir.

`auto` stays in the configuration, so that a run goes on anywhere. `weights.json` in the workdir
says which files it was when the run began.
"""

import dataclasses
import json
from pathlib import Path
from typing import Any

from jaxdg import files, methods
from jaxdg.config import Config
from jaxdg.config import workdir as workdir_lib
from jaxdg.hub import published, store
from jaxdg.hub.store import Say
from jaxdg.text.clip_text import TEXT_TOWERS

AUTO = "auto"  # of `model.weights` and `model.text_weights`


def names(config: Config) -> dict[str, str]:
    """The weights that `auto` stands for, by field.

    Returns:
        Names of published weights at `model.weights` and `model.text_weights`, or at one of them;
        nothing where `auto` is not used.

    Raises:
        ValueError: no file is published for the encoder, or it has no text tower.
    """
    m = config.model
    found = {}
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
            published.of(name)
        except ValueError as error:
            raise ValueError(f"{field} is auto, but {error}") from error
    return found


def resolved(config: Config) -> Config:
    """A configuration with the paths that `auto` stands for, whether the files are there or not;
    the same one if it has none.
    """
    paths = {
        field.removeprefix("model."): str(store.path_of(name))
        for field, name in names(config).items()
    }
    if not paths:
        return config
    return dataclasses.replace(config, model=dataclasses.replace(config.model, **paths))


def fetch(config: Config, workdir: Path, note: Say) -> dict[str, dict[str, Any]]:
    """Fetches what `auto` stands for, as far as a run still reads it.

    Args:
        config: of the run.
        workdir: of the run; need not exist.
        note: receives lines for a person.

    Returns:
        The record of each file by field, see `store.record`; none that the run does not read.

    Raises:
        DownloadError: a file could not be fetched.
        ValueError: the run began with other weights.
    """
    found = {}
    for field, name in _read(config, workdir).items():
        store.get(name, note)
        found[field] = store.record(name)
    began = _began(workdir)
    for field, now in found.items():
        before = began.get(field) or now
        if before["source_sha256"] != now["source_sha256"]:
            raise ValueError(
                f"{field} is auto, which is {now['source']} of sha256 {now['source_sha256']} now,"
                f" but {workdir} began with {before['source']} of {before['source_sha256']};"
                f" convert that one to {store.path_of(now['model'])}"
            )
    return found


def claim(config: Config, workdir: Path) -> None:
    """Writes the record of the weights that a run begins with; one that goes on keeps its own."""
    if workdir_lib.saved(workdir):
        return
    found = {field: store.record(name) for field, name in _read(config, workdir).items()}
    if found:
        files.write(workdir / "weights.json", json.dumps(found, indent=2) + "\n")
    else:
        (workdir / "weights.json").unlink(missing_ok=True)


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
