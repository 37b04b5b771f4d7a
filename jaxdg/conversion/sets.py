"""Which of the sets of weights in a file are meant: those that were trained, or their average over
the training (EMA).

A training checkpoint may hold both, side by side in dictionaries (timm's `state_dict` and
`state_dict_ema`, DINO's `student` and `teacher`), or in one dictionary behind different prefixes.
They are different weights, so the choice is never made silently.
"""

from collections.abc import Iterable, Sequence
import re
from typing import Any, NamedTuple

from jaxdg.conversion.pickled import Array, Passed, Tensor

EMA = "ema"
RAW = "raw"
WORDS = (
    (
        EMA,
        re.compile(
            r"(^|_)(ema|swa|polyak)(_|$)|teacher|averaged?(_|$)|shadow|momentum_(encoder|model)|target_(encoder|model|net)"
        ),
    ),
    (
        RAW,
        re.compile(
            r"^(state_dict|(base_)?model(_state(_dict)?|_weights)?|module|net|network|params|weights|student|(base_)?encoder)$"
        ),
    ),
)
SAID = {EMA: "an average over the training", RAW: "as trained"}
NO_MODEL = re.compile(
    r"optim|sched|scaler|(^|_)rng|callbacks|loops|message_hub|momentum_buffer", re.IGNORECASE
)
DEEPEST = 4


class Held(NamedTuple):
    """A set of weights in a file.

    Attributes:
        keys: that lead to it.
        tensors: by name.
        odd: names in it of what is no tensor.
        kind: `EMA`, `RAW`, or None where its keys do not tell.
    """

    keys: tuple[str, ...]
    tensors: dict[str, Any]
    odd: tuple[str, ...]
    kind: str | None

    @property
    def path(self) -> str:
        return ".".join(self.keys)

    def __str__(self) -> str:
        said = f", {SAID[self.kind]}" if self.kind else ""
        return (
            f"{self.path or 'the tensors outside of dictionaries'} ({len(self.tensors)}"
            f" tensors{said})"
        )


class Chosen(NamedTuple):
    """The set that is taken.

    Attributes:
        tensors: by name.
        kind: as of `Held`.
        notes: for the report: which set it is, and what lies beside it.
        wanted: what was asked for, as far as the keys of the set do not answer it.
    """

    tensors: dict[str, Any]
    kind: str | None
    notes: tuple[str, ...]
    wanted: str | None


def kind_of(keys: Iterable[str]) -> str | None:
    """Whether the names that lead to weights speak of an average, of what was trained, or of
    neither.
    """
    keys = [key.lower() for key in keys]
    return next((kind for kind, words in WORDS if any(map(words.search, keys))), None)


def held(content: Any) -> list[Held]:
    """Every set of weights in what a file holds; states of optimisers and the like are none."""
    found = _held(content, ())
    if isinstance(content, dict) and _from_mmengine(content):
        # mmengine exchanges the two when it saves: what everybody loads is the average.
        exchanged = {"state_dict": EMA, "ema_state_dict": RAW}
        found = [one._replace(kind=exchanged.get(one.path, one.kind)) for one in found]
    return found


def _from_mmengine(content: dict[Any, Any]) -> bool:
    """Whether a file has the two sets of weights of mmengine's training.

    SoMA's files keep them and drop what lay beside them. Its adapters tell them from other files
    with the same keys.
    """
    if not {"state_dict", "ema_state_dict"} <= content.keys():
        return False
    other = content["ema_state_dict"]
    return "meta" in content or (
        isinstance(other, dict)
        and any(
            isinstance(name, str) and re.fullmatch(r"module\..+\.lora_A\.weight", name)
            for name in other
        )
    )


def _held(content: Any, keys: tuple[str, ...]) -> list[Held]:
    if not isinstance(content, dict) or len(keys) > DEEPEST or (keys and NO_MODEL.search(keys[-1])):
        return []
    tensors = {
        name: value
        for name, value in content.items()
        if isinstance(name, str) and isinstance(value, Tensor | Array)
    }
    below = [
        one
        for key, value in content.items()
        if isinstance(key, str)
        for one in _held(value, (*keys, key))
    ]
    if len(tensors) > sum(len(one.tensors) for one in below):
        return [
            Held(
                keys,
                tensors,
                tuple(str(name) for name in content if name not in tensors),
                kind_of(keys),
            )
        ]
    return below


def choose(source: Any, content: Any, wanted: str | None) -> Chosen:
    """The set of weights that is meant.

    Args:
        source: path of the file, for errors.
        content: what it holds.
        wanted: "ema", "raw", or the keys that lead to a set (`model.state_dict`); None where there
            must be but one.

    Raises:
        ValueError: no set, or several of which none is chosen; the message says what there is and
            what to say.
    """
    found = held(content)
    if not found:
        raise ValueError(f"{source} {_nothing(content)}")
    one = _chosen(source, found, wanted)
    beside = [str(other) for other in found if other is not one]
    beside += [
        str(key) for key in content if one.keys and all(other.keys[:1] != (key,) for other in found)
    ]
    notes = []
    if one.keys:
        notes.append(
            f"weights: {one}"
            + (f"; beside them in the file: {shortened(beside)}" if beside else "")
        )
    if one.odd:
        notes.append(f"beside the tensors and no tensors: {shortened(one.odd)}")
    return Chosen(one.tensors, one.kind, tuple(notes), None if wanted == one.path else wanted)


def _chosen(source: Any, found: Sequence[Held], wanted: str | None) -> Held:
    if wanted not in (EMA, RAW, None):
        match = [one for one in found if one.path == wanted] or (
            found if len(found) == 1 else []
        )  # or a prefix in it
        if not match:
            raise ValueError(
                f"{source} holds no set of weights called {wanted!r}, but"
                f" {shortened([*map(str, found)])}"
            )
        return match[0]
    kinds = {kind: [one for one in found if one.kind == kind] for kind in (EMA, RAW)}
    meant = kinds[EMA] + kinds[RAW] or found
    if wanted and kinds[wanted]:
        meant = kinds[wanted]
    if len(meant) > 1:
        raise ValueError(
            f"{source} holds"
            f" {asked([*map(str, meant)], [one.path for one in meant], both=all(kinds.values()))}"
        )
    if wanted == RAW and meant[0].kind == EMA:
        raise ValueError(
            f"{source} holds one set of weights, {meant[0]}; leave --weights raw out to take it"
        )
    return meant[0]


def asked(said: Sequence[str], names: Sequence[str], both: bool) -> str:
    """What there is to choose from, and how to choose.

    Args:
        said: the sets in words.
        names: what `--weights` may say, one a set.
        both: whether there are trained weights and averages among them.
    """
    how = (
        "--weights ema or --weights raw"
        if both and len(said) == 2
        else f"--weights with one of {shortened(names)}"
    )
    usual = "; published figures are usually those of the average (ema)" if both else ""
    return f"{len(said)} sets of weights: {shortened(said)}; say {how}{usual}"


def shortened(items: Sequence[str], most: int = 8) -> str:
    """The first of some names, and how many more there are."""
    return ", ".join(items[:most]) + (f" and {len(items) - most} more" if len(items) > most else "")


def _nothing(content: Any) -> str:
    """Why there is no set of weights."""
    if isinstance(content, Passed) and not content:
        return (
            f"is refused: it holds a whole {content.name}, whose code would have to run; save its"
            " state_dict() and convert that"
        )
    if not isinstance(content, dict):
        return (
            f"holds a {type(content).__name__}, no state dict; save the model's state_dict() and"
            " convert that"
        )
    whole = [
        f"{key} is a {value.name}"
        for key, value in content.items()
        if isinstance(value, Passed) and value.module
    ]
    if whole:
        return (
            "is refused: it holds whole modules, whose code would have to run"
            f" ({shortened(whole)}); save their state_dict()"
        )
    return (
        "holds no state dict; there is only"
        f" {shortened([*map(str, content)]) or 'an empty dictionary'}; save the model's"
        " state_dict()"
    )
