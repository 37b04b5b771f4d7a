"""What people are told of a packed model: what it is, what it was trained on, how it is judged, and
what it started from.
"""

from collections.abc import Iterable, Mapping
import contextlib
from importlib import metadata
from pathlib import Path
from typing import Any

import jaxdg
from jaxdg import files, methods, weights
from jaxdg.backbones.zoo import ZOO
from jaxdg.config import paths
from jaxdg.evaluation import results as results_lib
from jaxdg.tasks import packed
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
        "started_from": origin(trained),
        "scores": [scores(results) for results in trained.results(step)],
        "rounded": None,
        "versions": versions(),
        **{key: known[key] for key in ("converted_from",) if key in known},
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


def origin(trained: Trained) -> dict[str, Any]:
    """What a run started from: another run's model, converted files, or nothing but its seed."""
    known = trained.card()
    if "started_from" in known:
        return known["started_from"]
    m = trained.config.model
    if m.start is None:
        given = {"weights": m.weights, "text_weights": m.text_weights}
        named = zip(given, (m.encoder, m.encoder + TEXT), strict=True)
        noted = known.get("fetched", {})
        return {
            field: _of_record(noted[key])
            if (key := f"model.{field}") in noted
            else _of_file(path, model)
            for field, model in named
            if (path := given[field])
        }
    found: dict[str, Any] = {"model": _name(m.start)}
    try:
        other = opened(m.start)
        if "converted_from" in (theirs := other.card()):
            found["converted_from"] = theirs["converted_from"]
        found["started_from"] = origin(other)
        if (path := paths.local(m.start)).is_file():
            found["sha256"] = files.sha256(path)
    except (OSError, ValueError):
        found["note"] = GONE
    return found


def _name(path: str) -> str:
    """What a path is called in a card: files of the hub whole, others without their folders."""
    return path if path.startswith(paths.HUB) else Path(path).name


def _of_file(given: str, model: str) -> dict[str, Any]:
    """What a converted file says of itself, and its licence; `model` is what it should be of."""
    found: dict[str, Any] = {"file": _name(given), "model": model}
    about: dict[str, str] = {}
    try:
        path = paths.local(given)
        about = weights.metadata(path)
        found |= {"model": about.get("model", model), "sha256": files.sha256(path)}
    except (OSError, ValueError):
        found["note"] = GONE
    published = {"published_file": "source", "published_sha256": "sha256"}
    found |= {key: about[own] for key, own in published.items() if own in about}
    return {**found, "licence": licence(found["model"])}


def _of_record(noted: Mapping[str, Any]) -> dict[str, Any]:
    """What a run noted of weights that it knew by a name, in the words of `_of_file`."""
    parts = {
        "file": "file",
        "model": "model",
        "published_file": "source",
        "published_sha256": "source_sha256",
        "url": "url",
    }
    found = {part: noted.get(own) for part, own in parts.items()}
    return {**found, "licence": noted.get("licence") or licence(noted["model"])}


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


def row(whole: packed.Packed) -> dict[str, Any]:
    """What a table of models tells of one; its scores are those of the run's own protocol, if it
    was judged by that.
    """
    known = whole.card
    own = [s for s in known["scores"] if s["protocol"] == whole.config.evaluation.label]
    chosen = (own or known["scores"] or [{"protocol": None, "mean_unseen": None}])[0]
    return {
        **{key: known[key] for key in ("task", "encoder", "decoder", "source")},
        **{key: chosen[key] for key in ("protocol", "mean_unseen")},
        "licences": licences(known),
    }


def page(whole: packed.Packed, file: str, place: str, digest: str, size: int) -> str:
    """The card of a packed model as a page of Markdown, as the Hugging Face hub shows it.

    Args:
        whole: what the file says.
        file: its name.
        place: where it is to be read from.
        digest: its sha256.
        size: its bytes.
    """
    known = whole.card
    kind = "image-segmentation" if known["task"] == "segmentation" else "object-detection"
    images = known["trained_on"]
    noted = f", {images['images']} images" if images else ""
    methods_on = f", with {', '.join(known['methods'])}" if known["methods"] else ""
    h, w = known["crop"]
    lines = [
        "---",
        "library_name: jaxdg",
        f"pipeline_tag: {kind}",
        "---",
        "",
        f"# {Path(file).stem}",
        "",
        f"{known['task'].capitalize()} of {len(whole.labels.names)} classes:"
        f" {known['encoder']} with {known['decoder']}{methods_on},"
        f" {known['parameters'] / 1e6:.1f} million numbers. Trained on {known['source']}{noted}.",
        "",
        "```python",
        "import jaxdg",
        "",
        f'model = jaxdg.load("{place}")',
        "label_map = model.predict(uint8_image)"
        if known["task"] == "segmentation"
        else "found = model.predict(uint8_image)",
        "```",
        "",
        f"`{file}`: {size / 1e6:.1f} MB, sha256 `{digest}`.",
        "",
        "## Scores",
        "",
        *_score_lines(known),
        "",
        "## Training",
        "",
        f"Step {known['step']} of {known['steps']}, {known['batch_size']} images a step, crops of"
        f" {h} x {w} pixels, learning rate {known['learning_rate']:g}, seed {known['seed']}. The"
        " whole configuration is in the file.",
        "",
        "## What it started from",
        "",
        *_origin_lines(known),
        "",
        "## Classes",
        "",
        ", ".join(whole.labels.names) + ".",
        "",
        f"Packed by {', '.join(f'{name} {v}' for name, v in known['versions'].items())}.",
    ]
    return "\n".join(lines) + "\n"


def _score_lines(known: dict[str, Any]) -> list[str]:
    if not known["scores"]:
        return ["Nobody had judged it when it was packed."]
    score = results_lib.score_name(known)
    lines = [f"| protocol | domain | {score} % | images |", "|---|---|---|---|"]
    for judged in known["scores"]:
        limit = f", {judged['max_images']} images a domain" if judged["max_images"] else ""
        for name, entry in judged["domains"].items():
            told = "-" if entry[score] is None else f"{entry[score]:.1f}"
            mark = " (seen)" if entry["seen"] else ""
            lines.append(
                f"| {judged['protocol']}{limit} | {name}{mark} | {told} | {entry['images']} |"
            )
        if judged["mean_unseen"] is not None:
            lines.append(
                f"| {judged['protocol']}{limit} | mean of unseen | {judged['mean_unseen']:.1f} | |"
            )
    if known["rounded"]:
        error = known["rounded"]["largest_relative_error"]
        lines += [
            "",
            f"The parameters are stored in {known['rounded']['dtype']}, with a relative error of"
            f" {100 * error:.2g} % at most; {known['rounded']['note']}.",
        ]
    return lines


def _origin_lines(known: dict[str, Any]) -> list[str]:
    started = known["started_from"]
    if "converted_from" in known:
        return [
            f"- converted from {name}, sha256 `{digest}`"
            for name, digest in known["converted_from"]["sources"].items()
        ] + _licence_line(known)
    if not started:
        return ["From random numbers."]
    lines = []
    while "model" in started and "weights" not in started:
        digest = f", sha256 `{started['sha256']}`" if "sha256" in started else ""
        note = f" ({started['note']})" if "note" in started else ""
        lines.append(f"- the model {started['model']}{digest}{note}")
        started = started.get("started_from") or {}
    for entry in started.values():
        digest = f", sha256 `{entry['sha256']}`" if "sha256" in entry else ""
        behind = (
            f", converted from {entry['published_file']}, sha256 `{entry['published_sha256']}`"
            if {"published_file", "published_sha256"} <= entry.keys()
            else ""
        )
        note = f" ({entry['note']})" if "note" in entry else ""
        lines.append(f"- {entry['model']}: {entry['file']}{digest}{behind}{note}")
    return lines + _licence_line(known)


def _licence_line(known: dict[str, Any]) -> list[str]:
    terms = licences(known)
    return ["", f"Licence of what it started from: {', '.join(terms)}."] if terms else []
