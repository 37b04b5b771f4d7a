"""A trained model as one safetensors file, which needs nothing of the machine that trained it.

The tensors are the parameters and running statistics by their per-block names (see `weights`). The
metadata are texts, JSON but for the first two and the last two:

    jaxdg_model   version of this form
    jaxdg         version of the package that wrote the file
    config        as in config.json of a workdir, without folders of the machine
    labels        {"names", "colors"}: of the classes
    step          of the run
    division      {"segment_ends", "frozen"}: how the run divided its parameters, into stacked
                  blocks and by whether it trained them
    results       what the results.json of the run say of this step
    card          for people: data, recipe, scores, what the run started from, versions
    trained_on    source.npz of the workdir, in base64; empty without
    sha256        of the bytes of all tensors
"""

import base64
from collections.abc import Iterable, Mapping
import dataclasses
import hashlib
import json
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open

import jaxdg
from jaxdg import config as config_lib
from jaxdg import weights
from jaxdg.config import Config, paths
from jaxdg.data.labels import LabelSet
from jaxdg.evaluation.overlap import TrainedOn

VERSION = 1
SUFFIX = ".safetensors"
HALF = {"bfloat16": ml_dtypes.bfloat16, "float16": np.float16}
ALLOWED = "give a workdir, one step in it, or a file that jaxdg pack wrote"


@dataclasses.dataclass(frozen=True)
class Packed:
    """What a packed file says beside its tensors.

    Attributes:
        config: of the run; of paths only the last name is left.
        labels: of the model's classes.
        step: of the run.
        segment_ends: the last blocks of stacked segments of the encoder.
        frozen: names of the parameters that the run did not train.
        trained_on: the images that it was trained on; None if nobody noted them.
        results: contents of results.json of this step, one a protocol.
        card: for people, of JSON types; see `commands.pack`.
    """

    config: Config
    labels: LabelSet
    step: int
    segment_ends: tuple[int, ...]
    frozen: frozenset[str]
    trained_on: TrainedOn | None
    results: tuple[dict[str, Any], ...]
    card: dict[str, Any]


def write(path: Path, packed: Packed, tensors: Mapping[str, np.ndarray]) -> None:
    """Writes a packed file, whole or not at all.

    Args:
        path: of the file.
        packed: what it says.
        tensors: by per-block name.

    Raises:
        OSError: it cannot be written.
    """
    # Numbers of fewer bytes come last, so that all lie at multiples of their size.
    order = sorted(tensors, key=lambda name: -tensors[name].dtype.itemsize)
    digest = hashlib.sha256()
    for name in order:
        digest.update(tensors[name].tobytes())
    noted = b"" if packed.trained_on is None else packed.trained_on.to_bytes()
    division = {"segment_ends": packed.segment_ends, "frozen": sorted(packed.frozen)}
    about = {
        weights.PACKED: str(VERSION),
        "jaxdg": jaxdg.__version__,
        "config": dataclasses.asdict(portable(packed.config)),
        "labels": dataclasses.asdict(packed.labels),
        "step": packed.step,
        "division": division,
        "results": packed.results,
        "card": packed.card,
        "trained_on": base64.b64encode(noted).decode(),
        "sha256": digest.hexdigest(),
    }
    weights.save({name: tensors[name] for name in order}, path, about)


def portable(config: Config) -> Config:
    """A configuration without folders of this machine. Of files and workdirs the names stay, for
    the decoder depends on which there are; the list of files to leave out goes.
    """

    def name(path: str | None) -> str | None:
        return path if path is None or path.startswith(paths.HUB) else Path(path).name

    m = config.model
    files = {field: name(getattr(m, field)) for field in ("weights", "text_weights", "start")}
    model = dataclasses.replace(m, **files)
    d = config.data
    data = dataclasses.replace(d, root="data", skip=None, pictures=name(d.pictures))
    return dataclasses.replace(config, model=model, data=data)


def read(path: Path) -> Packed:
    """What a packed file says beside its tensors.

    Raises:
        FileNotFoundError: no such file.
        ValueError: it is no packed file, a damaged one, or one of a newer version of this form.
    """
    about = _metadata(path)
    writer = f"jaxdg {about.get('jaxdg', 'of an unknown version')}"
    version = about[weights.PACKED]
    if version != str(VERSION):
        raise ValueError(
            f"{path} was packed by {writer} in form {version}, and this is jaxdg"
            f" {jaxdg.__version__}, which reads form {VERSION}; install the newest jaxdg"
        )
    try:
        content = {
            key: json.loads(about[key])
            for key in ("config", "labels", "step", "division", "results", "card")
        }
        names, colors = content["labels"]["names"], content["labels"]["colors"]
        labels = LabelSet(tuple(names), tuple((r, g, b) for r, g, b in colors))
        noted = base64.b64decode(about["trained_on"], validate=True)
        parts = {
            "labels": labels,
            "step": int(content["step"]),
            "segment_ends": tuple(content["division"]["segment_ends"]),
            "frozen": frozenset(content["division"]["frozen"]),
            "trained_on": TrainedOn.from_bytes(noted) if noted else None,
            "results": tuple(content["results"]),
            "card": dict(content["card"]),
        }
    except (KeyError, TypeError, ValueError) as error:
        why = f"its metadata are incomplete ({type(error).__name__}: {error})"
        raise _damaged(path, why) from error
    return Packed(config_lib.of_content(content["config"], path), **parts)


def tensors(path: Path) -> dict[str, np.ndarray]:
    """The tensors of a packed file, those in half precision in float32; raises as `verify`."""
    verify(path)
    half = [np.dtype(kind) for kind in HALF.values()]
    return {
        name: tensor.astype(np.float32) if tensor.dtype in half else tensor
        for name, tensor in weights.read(path).items()
    }


def verify(path: Path) -> None:
    """Compares the tensors of a packed file with their sha256.

    Raises:
        ValueError: they are not what was written.
    """
    with path.open("rb") as file:
        file.seek(8 + int.from_bytes(file.read(8), "little"))
        if hashlib.file_digest(file, "sha256").hexdigest() != _metadata(path).get("sha256"):
            raise _damaged(path, "its numbers do not add up to their sha256")


def rounded(
    stored: Mapping[str, np.ndarray], names: Iterable[str], dtype: str
) -> tuple[dict[str, np.ndarray], float]:
    """Tensors with some of them in half precision.

    Args:
        stored: tensors by name.
        names: of those that are rounded.
        dtype: one of `HALF`.

    Returns:
        All tensors, and the largest relative error of a rounded one: the norm of what was lost over
        the norm of the tensor.

    Raises:
        ValueError: a number is too large for float16.
    """
    found = dict(stored)
    largest = 0.0
    for name in names:
        exact = stored[name].astype(np.float64)
        with np.errstate(over="ignore"):
            found[name] = stored[name].astype(HALF[dtype])
        lost = exact - found[name].astype(np.float64)
        if not np.isfinite(lost).all():
            raise ValueError(
                f"{name} holds numbers up to {np.abs(exact).max():.3g}, too large for {dtype}; give"
                " --dtype bfloat16"
            )
        if norm := np.linalg.norm(exact.ravel()):
            largest = max(largest, float(np.linalg.norm(lost.ravel()) / norm))
    return found, largest


def _metadata(path: Path) -> dict[str, str]:
    """The metadata of a packed file, of whatever version."""
    if not path.is_file():
        raise FileNotFoundError(f"no trained model at {path}; {ALLOWED}")
    try:
        with safe_open(path, framework="numpy") as file:
            about = dict(file.metadata() or {})
    except SafetensorError as error:
        if path.suffix == SUFFIX:
            raise _damaged(path, f"no whole safetensors file: {error}") from error
        raise ValueError(f"{path} is no trained model of jaxdg; {ALLOWED}") from error
    if weights.PACKED in about:
        return about
    if "jaxdg" in about:
        raise ValueError(
            f"{path} holds the weights of {about.get('model', 'a part of a model')}, which are no"
            f" trained model; give it as model.weights to train one, or here {ALLOWED[5:]}"
        )
    raise ValueError(
        f"{path} is a safetensors file of another program and no trained model of jaxdg;"
        f" {weights.COMMAND} converts published models, and {ALLOWED[5:]} is read here"
    )


def _damaged(path: Path, why: str) -> ValueError:
    return ValueError(
        f"{path} is damaged ({why}); copy or download it again, or pack the model again"
    )
