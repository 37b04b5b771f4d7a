"""What people are told of a packed model: what it is, what it was trained on, how it is judged, and
what it started from.
"""

from collections.abc import Iterable, Mapping
import contextlib
import hashlib
from importlib import metadata
from pathlib import Path
from typing import Any

import jaxdg
from jaxdg import methods, weights
from jaxdg.backbones.zoo import ZOO
from jaxdg.config import Config
from jaxdg.evaluation import results as results_lib
from jaxdg.tasks.run_state import Trained, opened

GONE = "was not there when the model was packed"
TEXT = "_text"  # behind an encoder's name, its text tower


def card(trained: Trained, step: int, parameters: int) -> dict[str, Any]:
    """What is known of a trained model, of JSON types.

    Args:
        trained: the model.
        step: of it.
        parameters: numbers that it holds, running statistics included.
    """
    c = trained.config
    known = trained.card()
    if "started_from" in known:  # it is that of a packed model
        return dict(known)
    fetched = known.pop("auto_weights", {})
    images = trained.trained_on()
    return {
        "task": c.task,
        "encoder": c.model.encoder,
        "decoder": c.model.decoder,
        "methods": [name for name, options in methods.settings(c).items() if options.on],
        "parameters": parameters,
        "source": c.data.source,
        "trained_on": (
            None if images is None else {"domains": list(images.domains), "images": images.count}
        ),
        "crop": list(c.data.crop),
        "step": step,
        "steps": c.steps,
        "batch_size": c.batch_size,
        "learning_rate": c.optimizer.learning_rate,
        "seed": c.seed,
        "started_from": origin(c, fetched),
        "scores": [scores(results) for results in trained.results(step)],
        "rounded": None,
        "versions": versions(),
        **known,
    }


def versions() -> dict[str, str]:
    """Of the packages that a model's numbers depend on, here."""
    return {
        "jaxdg": jaxdg.__version__,
        **{name: metadata.version(name) for name in ("jax", "flax")},
    }


def scores(results: dict[str, Any]) -> dict[str, Any]:
    """The figures of a results.json, without its classes."""
    score = results_lib.score_name(results)
    domains = {
        name: {key: entry.get(key) for key in (score, "images", "seen", "part_of")}
        for name, entry in results["domains"].items()
    }
    about = {key: results.get(key) for key in ("protocol", "max_images", "mean_unseen", "rPD")}
    return {**about, "domains": domains}


def origin(config: Config, fetched: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """What a run started from: another run's model, converted files, or nothing but its seed.

    Args:
        config: of the run.
        fetched: the record of the files that `auto` stood for, by field; see `hub.runs`.
    """
    m = config.model
    if m.start is None:
        files = {"weights": m.weights, "text_weights": m.text_weights}
        named = zip(files, (m.encoder, m.encoder + TEXT), strict=True)
        return {
            field: _of_record(known)
            if (known := fetched.get(f"model.{field}"))
            else _of_file(Path(path), model)
            for field, model in named
            if (path := files[field])
        }
    found: dict[str, Any] = {"model": Path(m.start).name}
    try:
        other = opened(m.start)
        known = other.card()
        found |= {key: known[key] for key in ("started_from", "converted_from") if key in known}
        if "started_from" not in found:
            found["started_from"] = origin(other.config, known.get("auto_weights", {}))
        if Path(m.start).is_file():
            found["sha256"] = sha256(Path(m.start))
    except (OSError, ValueError):
        found["note"] = GONE
    return found


def _of_record(known: Mapping[str, Any]) -> dict[str, Any]:
    """As `_of_file`, by the run's record."""
    parts = {
        "file": "file",
        "model": "model",
        "published_file": "source",
        "published_sha256": "source_sha256",
        "url": "url",
        "licence": "licence",
    }
    return {part: known.get(own) for part, own in parts.items()}


def _of_file(path: Path, model: str) -> dict[str, Any]:
    """What a converted file says of itself, and its licence; `model` is what it should be of."""
    found: dict[str, Any] = {"file": path.name, "model": model}
    about: dict[str, str] = {}
    try:
        about = weights.metadata(path)
        found |= {"model": about.get("model", model), "sha256": sha256(path)}
    except (OSError, ValueError):
        found["note"] = GONE
    published = {"published_file": "source", "published_sha256": "sha256"}
    found |= {key: about[own] for key, own in published.items() if own in about}
    return {**found, "licence": licence(found["model"])}


def licence(model: str) -> str | None:
    """The licence of published weights; None where it is not known."""
    if (entry := ZOO.get(model.removesuffix(TEXT))) is not None:
        return entry.licence or None
    with contextlib.suppress(ImportError):  # some of the conversion needs what training needs
        from jaxdg.conversion import models

        families = models.HEADS | models.WHOLE | models.ADAPTED
        if model in families:
            return families[model].LISTED[1]
    return None


def sha256(path: Path) -> str:
    """Of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def licences(known: dict[str, Any]) -> list[str]:
    """The licences of all that a card says the model started from, each once."""

    def found(node: Any) -> Iterable[str]:
        if isinstance(node, dict):
            if "sources" in node:  # of a converted model
                yield licence(node.get("model", "")) or "unknown"
            for key, value in node.items():
                if key == "licence":
                    yield value or "unknown"
                else:
                    yield from found(value)

    parts = {key: known.get(key) for key in ("started_from", "converted_from")}
    return sorted(set(found(parts)))
