"""Converted weights by name: fetched from where their authors publish them, converted strictly, and
kept under `$JAXDG_CACHE/weights`.

    jaxdg weights get eva02_clip_l14
    jaxdg train --config gta5_eva02 --workdir runs/eva --config.model.weights=auto

weights/NAME.safetensors        the converted file
weights/NAME.json               its record: source, licence, sha256 of both files
weights/published/FILE          the file as published, which may be removed

A file that is there is used without a look at the network. A published file that somebody puts into
`published/` is verified and converted; one that was converted elsewhere is taken as it is.
"""

from collections.abc import Callable
import importlib
import json
from pathlib import Path
import sys
from typing import Any

import jaxdg
from jaxdg import files, weights
from jaxdg.data import cache
from jaxdg.hub import download as downloads
from jaxdg.hub import huggingface, published
from jaxdg.hub.download import DownloadError

Say = Callable[[str], None]


def folder() -> Path:
    """Where converted weights are kept; it need not exist."""
    return cache.folder() / "weights"


def path_of(name: str) -> Path:
    """Where the converted weights called `name` are kept; they need not be there."""
    return folder() / f"{name}.safetensors"


def get(name: str, note: Say | None = None) -> Path:
    """The converted weights called `name`, which are fetched and converted if need be.

    Args:
        name: an encoder, a text tower or a head that `jaxdg weights list` shows.
        note: receives lines for a person; None prints them to standard error.

    Returns:
        The path of a `.safetensors` file, as `jaxdg.backbones.create(weights=..)` takes it.

    Raises:
        DownloadError: the published file could not be fetched; the message says which file to put
            where.
        ValueError: no file is published under that name, or what is there is another.
        OSError: the cache cannot be written.
    """
    known = published.of(name)
    out = path_of(name)
    note = note or _to_standard_error
    if not out.exists():
        out.parent.mkdir(parents=True, exist_ok=True)
        with downloads.alone(out, note):
            if not out.exists():  # another process was faster
                _make(name, known, out, note)
    held = weights.metadata(out).get("model", "nothing it tells the name of")
    if held != name:
        raise ValueError(f"{out} holds {held}, not {name}; remove it and try again")
    return out


def record(name: str) -> dict[str, Any]:
    """What the weights called `name`, which are kept, are and come from.

    Returns:
        `model`, `file`, `source` and `source_sha256` as the converted file tells them, and of one
        that was fetched also `url`, `published_sha256` (null if nobody publishes it) and `licence`.
    """
    path = path_of(name)
    about = weights.metadata(path)
    fetched = files.recall(path.with_suffix(".json"), lambda content: isinstance(content, dict))
    return {
        "model": name,
        "file": path.name,
        "source": about.get("source"),
        "source_sha256": about.get("sha256"),
        **(fetched or {}),
    }


def _make(name: str, known: published.Published, out: Path, note: Say) -> None:
    """Fetches and converts a file; the lock of `out` is held."""
    licence = published.licence(name)
    forbids = published.FORBIDS.get(licence)
    note(f"{name}: {known.url}, licence {licence}{f', which forbids {forbids}' if forbids else ''}")
    source = folder() / "published" / known.file
    token = huggingface.token() if known.gated else None
    try:
        downloads.download(known.address(), source, sha256=known.sha256, token=token, note=note)
    except DownloadError as error:
        raise DownloadError(
            f"{error}; {_advice(name, known, source, error)}", error.status
        ) from error
    about = {
        "url": known.url,
        "published_sha256": downloads.record(source).get("published_sha256"),
        "licence": licence,
        "jaxdg": jaxdg.__version__,
    }
    files.write(out.with_suffix(".json"), json.dumps(about, indent=2) + "\n")
    note(f"{name}: converts {source.name}")
    conversion = importlib.import_module("jaxdg.conversion.convert")  # not needed for kept files
    try:
        conversion.convert(name, source, out)
    except ValueError as error:
        raise ValueError(f"{error}; remove {source} to fetch it again") from error


def _advice(name: str, known: published.Published, source: Path, error: DownloadError) -> str:
    """What to do about a file that could not be fetched, in a part of a line."""
    by_hand = (
        f"put {known.url} by hand at {source} and run the same command, or convert it yourself:"
        f" jaxdg convert --model {name} --checkpoint {known.file} --out {path_of(name)}"
    )
    if known.gated and error.status in (401, 403):
        return (
            f"accept the licence on {known.page} and set HF_TOKEN to a token of that account; or"
            f" {by_hand}"
        )
    return by_hand


def _to_standard_error(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
