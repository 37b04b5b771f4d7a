"""Names in a checkpoint that programs have put something around, or taken something off, brought to
those of a layout.

torch's wrappers put a word into every name (`module.`, `_orig_mod.`, FSDP's), training programs put
the encoder into a larger model (`model.backbone.`), and a later transformers saves a model without
the prefix of an earlier one. What is around a model is found from its own names: a prefix behind
which all names of a layout that hold no number are there. What lies outside of it is left out, and
told.
"""

from collections.abc import Iterable, Sequence
import re
from typing import NamedTuple

from jaxdg.conversion import sets
from jaxdg.conversion.checkpoint import Checkpoint
from jaxdg.conversion.mapping import Layout

# Words that torch's wrappers put at the front of a name or inside it, and that no model has of its
# own; `module` one has, at the front.
WORDS = re.compile(
    r"(?:(?<=\.)|^)_(?:orig_mod|fsdp_wrapped_module|checkpoint_wrapped_module|forward_module|fpw_module)\.|(?<=\.)module\."
)
# of the tensors of the prefix that has most: another model of the same kind, and not a part of it
NEARLY = 0.9


class Undecided(ValueError):
    """A file with several models, or with names that would become one."""


class Candidate(NamedTuple):
    """A layout behind a prefix in a file.

    Attributes:
        complete: whether all names of the layout that hold no number are there.
        fit: how many of the file's names are in the layout.
        as_told: whether the prefix is the layout's own.
        layout: the layout.
        prefix: in the file.
        own: that which the layout's table has in its place.
    """

    complete: bool
    fit: int
    as_told: bool
    layout: Layout
    prefix: str
    own: str


def unwrapped(file: Checkpoint, layouts: Iterable[Layout]) -> Checkpoint:
    """The checkpoint by the names of that layout which fits it best; by its own where none fits.

    Returns:
        The file with other names, with what was done to them in its notes, and with what is no part
        of the model in `outside`.

    Raises:
        Undecided: two names would become one, or there are several models of which none is chosen.
    """
    if len(set(file.names)) < len(file.names):
        return file  # told later
    layouts = tuple(layouts)
    names = {name: name for name in file.names}
    words = []
    best = _chosen(
        [candidate for layout in layouts for candidate in _candidates(layout, names)], names, file
    )
    if any(map(WORDS.search, names)):
        short, found = _without_words(file.names)
        other = _chosen(
            [candidate for layout in layouts for candidate in _candidates(layout, short)],
            short,
            file,
        )
        if other.fit > best.fit:
            names = short
            words = found
            best = other
    known = best.layout.known()
    kept: dict[str, str] = {}  # what it was, by what it is called in the layout
    outside = []
    doubled = []
    for name in names:
        new = best.own + name[len(best.prefix) :] if name.startswith(best.prefix) else name
        if best.as_told or not known.fullmatch(new):
            new = name
        if not (best.as_told or name.startswith(best.prefix) or known.fullmatch(name)):
            outside.append(name)
        elif new in kept:
            doubled.append(name)
        else:
            kept[new] = name
    doubled += [name for name in outside if name in kept]
    if doubled:
        raise Undecided(
            f"{len(doubled)} names are there with and without {best.prefix}"
            f" ({sets.shortened(doubled)}); which of them are meant cannot be told: save the"
            " state_dict() of one model"
        )
    notes = [*file.notes, *([f"taken off names: {' '.join(words)}"] if words else ()), *_said(best)]
    return file._replace(
        names=list(kept),
        read=lambda name: file.read(names[kept[name]]),
        notes=tuple(notes),
        was={new: names[name] for new, name in kept.items()},
        outside={names[name]: f"outside of {best.prefix}, where the model is" for name in outside},
    )


def _without_words(names: Sequence[str]) -> tuple[dict[str, str], list[str]]:
    """Each name without the words of wrappers, with what it was; and the words."""
    words = list(dict.fromkeys(word for name in names for word in WORDS.findall(name)))
    new: dict[str, str] = {}
    for name in names:
        short = WORDS.sub("", name)
        if short in new:
            raise Undecided(
                f"{new[short]} and {name} are one name without {' '.join(words)}; which of them is"
                " meant cannot be told"
            )
        new[short] = name
    return new, words


def _candidates(layout: Layout, names: Iterable[str]) -> list[Candidate]:
    """A layout behind each prefix of the file behind which at least half of its names without a
    number are, and behind its own.
    """
    sources = [source for row in layout.rows for source in row.source]
    first = min(sources).split(".")[:-1]
    parts = [".".join(first[:n]) + "." for n in range(len(first), 0, -1)]
    own = next((part for part in parts if all(source.startswith(part) for source in sources)), "")
    fixed = [source[len(own) :] for source in sources if "*" not in source]
    fixed = fixed or [
        source[len(own) :].replace("*", "1") for source in sources if source.count("*") == 1
    ]  # NVlabs' stages
    there: dict[str, set[str]] = {tail: set() for tail in fixed}
    for name in names:
        for at in (0, *(i + 1 for i, sign in enumerate(name) if sign == ".")):
            if name[at:] in there:
                there[name[at:]].add(name[:at])
    exact = {source[len(own) :] for source in sources if "*" not in source}
    rows = re.compile(
        "|".join(
            f"(?:{re.escape(source[len(own) :])})".replace(r"\*", r"\d+")
            for source in sources
            if "*" in source
        )
        or r"(?!)"
    )
    found = []
    for prefix in {own}.union(*there.values()):
        hits = sum(prefix in one for one in there.values())
        if prefix == own or hits * 2 >= len(there):
            fit = sum(
                name.startswith(prefix)
                and (name[len(prefix) :] in exact or bool(rows.fullmatch(name, len(prefix))))
                for name in names
            )
            found.append(Candidate(hits == len(there), fit, prefix == own, layout, prefix, own))
    return found


def _chosen(candidates: Sequence[Candidate], names: Iterable[str], file: Checkpoint) -> Candidate:
    """The candidate that fits best, of those that are wanted.

    Raises:
        Undecided: none is the one that is wanted, or several are.
    """

    def order(one):
        return (one.complete, one.fit, one.as_told, -len(one.prefix))

    best = max(candidates, key=order)
    told = max((one for one in candidates if one.as_told), key=order)
    if told.fit >= best.fit / 2:  # its own names, and perhaps some amiss
        best = told
    rivals: dict[str, Candidate] = {}  # by prefix
    for one in sorted(candidates, key=order):
        if best.complete and one.complete and one.fit >= NEARLY * best.fit:
            rivals[one.prefix] = one
    kinds = {prefix: sets.kind_of(prefix.split(".")) for prefix in rivals}
    wanted = file.wanted
    if wanted in (sets.EMA, sets.RAW):
        if len(rivals) > 1:
            rivals = {
                prefix: one for prefix, one in rivals.items() if kinds[prefix] == wanted
            } or rivals
        elif wanted == sets.EMA and sets.EMA not in (file.kind, *kinds.values()):
            raise Undecided(
                "there is one set of weights in it, and no average over the training; leave"
                " --weights ema out to take it"
            )
        elif wanted == sets.RAW and sets.EMA in kinds.values():
            raise Undecided(
                f"there is one set of weights in it, an average ({best.prefix}); leave --weights"
                " raw out to take it"
            )
    elif wanted:
        if f"{wanted}." not in rivals:
            raise Undecided(
                f"there is no set of weights called {wanted!r} in it, but behind"
                f" {sets.shortened([*rivals]) or 'no prefix'}"
            )
        rivals = {f"{wanted}.": rivals[f"{wanted}."]}
    elif best.as_told:  # the layout's own table knows of others, such as MoCo-v3's
        known = re.compile(
            "|".join(f"(?:{pattern})" for pattern, _ in best.layout.left_out) or r"(?!)"
        )
        left = {
            prefix
            for prefix in rivals
            if all(known.fullmatch(name) for name in names if name.startswith(prefix))
        }
        rivals = {
            prefix: one
            for prefix, one in rivals.items()
            if prefix == best.prefix or prefix not in left
        }
    if len(rivals) > 1:
        said = [f"{prefix or 'no prefix'} ({one.fit} tensors)" for prefix, one in rivals.items()]
        both = {sets.EMA, sets.RAW} <= set(kinds.values())
        raise Undecided(
            f"it holds {sets.asked(said, [prefix.rstrip('.') for prefix in rivals], both)}"
        )
    return next(iter(rivals.values()), best)


def _said(best: Candidate) -> list[str]:
    """What was done to the names."""
    if best.as_told:
        return []
    if best.prefix.endswith(best.own):
        return [f"taken off names: {best.prefix.removesuffix(best.own)}"]
    if best.own.endswith(best.prefix):
        return [f"put before names: {best.own.removesuffix(best.prefix)}"]
    return [f"in names {best.prefix} was read as {best.own}"]
