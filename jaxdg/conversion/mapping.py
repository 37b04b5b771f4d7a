"""The strict engine of conversion: tensors of a foreign checkpoint to the names and shapes of a
jaxdg module, and back.

A checkpoint family is one file beside this one that states `Layout`s; a layout is an ordered table
of `Row`s plus the names it leaves out on purpose. Work starts from the module: each of its tensors
names, through its row, the source tensors it is made of. So every target is filled, every source
tensor is used once or left out for a stated reason, and all that does not fit is told at once.
"""

from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
import functools
import re
from typing import Any, NamedTuple

from flax import nnx
import jax.numpy as jnp
import numpy as np

from jaxdg import weights


class Transform(NamedTuple):
    """How the source tensors of a row become its target, and how the target becomes them again."""

    forward: Callable[..., np.ndarray]
    inverse: Callable[[np.ndarray], tuple[np.ndarray, ...]]


class Row(NamedTuple):
    """One line of a table; in names, `*` stands for a number that is the same on both sides.

    Where only the target has a `*`, a source tensor holds all blocks along a leading axis, and the
    transform is for one of them.

    Attributes:
        source: names of the source tensors, in the order in which the transform takes them.
        target: name in jaxdg.
        transform: between them.
        resized: the module's `adapt` fits this tensor to its own size at load, so whatever it
            accepts is stored as it is.
    """

    source: tuple[str, ...]
    target: str
    transform: Transform
    resized: bool = False


class Layout(NamedTuple):
    """How one publisher names the tensors of an architecture.

    Attributes:
        name: for reports and errors.
        rows: a row for every tensor of the module.
        left_out: regex that matches the whole of a source name, and the reason why it is not
            needed.
        beside: from all tensors by jaxdg's names to those that `from_flax` writes beside the rows',
            or in place of them, because the publisher's program asks for them.
        note: on these, for reports.
    """

    name: str
    rows: tuple[Row, ...]
    left_out: tuple[tuple[str, str], ...]
    beside: Callable[[Mapping[str, np.ndarray]], dict[str, np.ndarray]] = lambda tensors: {}
    note: str = ""

    def known(self) -> re.Pattern[str]:
        """Matches every source name in the table, whatever the number of blocks."""
        rows = [
            re.escape(source).replace(r"\*", r"\d+") for row in self.rows for source in row.source
        ]
        return re.compile(
            "|".join(
                f"(?:{pattern})" for pattern in (*rows, *(pattern for pattern, _ in self.left_out))
            )
        )

    def covers(self, names: Iterable[str]) -> bool:
        """Whether the table has all these source names; block numbers do not matter."""
        known = self.known()
        return all(known.fullmatch(name) for name in names)


class Use(NamedTuple):
    """What a target is made of: its row, the source tensors, and where each of them holds all
    blocks, the block (else None).
    """

    row: Row
    sources: list[str]
    block: int | None


class Lazy(Mapping[str, np.ndarray]):
    """Tensors that are made when they are asked for, so that a file is converted without being held
    in memory.
    """

    def __init__(self, makers: Mapping[str, Callable[[], np.ndarray]]):
        self.makers = makers

    def __getitem__(self, name: str) -> np.ndarray:
        return self.makers[name]()

    def __iter__(self) -> Iterator[str]:
        return iter(self.makers)

    def __len__(self) -> int:
        return len(self.makers)


class Converted(NamedTuple):
    """What `to_flax` made: tensors by per-block name, the layout that was found, and each name left
    out with its reason.
    """

    tensors: Mapping[str, np.ndarray]
    layout: Layout
    left_out: dict[str, str]


class Misfit(ValueError):
    """A file whose tensors are not exactly those of the model."""


QUANTISED = (
    ".qweight",
    ".qzeros",
    ".scales",
    ".weight_scale",
    ".weight_scale_inv",
    ".SCB",
    ".absmax",
    ".quant_map",
    ".zero_point",
)
SAME = Transform(lambda a: a, lambda a: (a,))
LINEAR = Transform(lambda w: w.T, lambda k: (k.T,))  # torch [out, in], flax [in, out]
CONV = Transform(
    lambda w: w.transpose(2, 3, 1, 0), lambda k: (k.transpose(3, 2, 0, 1),)
)  # torch OIHW, flax HWIO


def to_flax(
    module: nnx.Module,
    layouts: Iterable[Layout],
    names: list[str],
    read: Callable[[str], np.ndarray],
) -> Converted:
    """Converts a checkpoint for `module`, tensor by tensor, in the layout that knows most of its
    names.

    Args:
        module: may be abstract (`nnx.eval_shape`); of the checkpoint's full depth.
        layouts: those in which the module's checkpoints are published.
        names: of all source tensors.
        read: gives the source tensor of a name; also called whenever a converted tensor is asked
            for.

    Returns:
        Float32 tensors for every name of `weights.shapes(module)`.

    Raises:
        Misfit: tensors that are unknown, missing, there twice, of another shape, no floats or not
            finite; they are named by kind.
    """
    wanted = weights.shapes(module)
    given = set(names)
    layout = max(layouts, key=lambda layout: len(given & source_shapes(module, layout).keys()))
    expected = source_shapes(module, layout)
    plan = _plan(layout, wanted)
    reasons = {
        name: reason
        for name in names
        for pattern, reason in layout.left_out
        if re.fullmatch(pattern, name)
    }

    problems = weights.told(
        "there more than once", {name for name in given if names.count(name) > 1}
    )
    problems += weights.told(
        f"both used and left out by the table {layout.name}", expected.keys() & reasons.keys()
    )
    problems += weights.told("unknown", given - expected.keys() - reasons.keys())
    problems += weights.told("missing", expected.keys() - given)
    makers = {}
    misfits = {}
    read_once = functools.lru_cache(maxsize=3)(
        read
    )  # queries, keys and values of all blocks at the most
    odd: dict[str, str] = {}  # of what is no number

    def taken(name: str, block: int | None) -> np.ndarray:
        return read(name) if block is None else read_once(name)[block]

    for target, (row, sources, block) in plan.items():
        parts = {
            name: read(name) if block is None else read_once(name)
            for name in sources
            if name in given
        }
        misfits |= {
            name: f"{name} holds {part.dtype}"
            for name, part in parts.items()
            if not _floats(part.dtype)
        }
        # Source shapes are compared, not the target's: a transform that joins heads would let a
        # wrong number of them pass.
        wrong = {
            name: f"{name} is {part.shape}, not {expected[name]}"
            for name, part in parts.items()
            if part.shape != expected[name]
        }
        odd |= {
            name: f"{name}: {what}"
            for name, part in parts.items()
            if _floats(part.dtype) and (what := weights.not_finite(part))
        }
        if len(parts) < len(sources):  # told as missing
            misfits |= wrong
            continue
        ranks = all(
            part.ndim == len(expected[name]) for name, part in parts.items()
        )  # no transform is made for others
        if wrong and not (
            row.resized
            and ranks
            and _fits(module, target, row.transform.forward(*parts.values()), wanted[target])
        ):
            misfits |= wrong
        makers[target] = lambda row=row, sources=sources, block=block: np.asarray(
            row.transform.forward(*(taken(name, block).astype(np.float32) for name in sources)),
            order="C",
        )
    problems += weights.told("of another shape or type", misfits.values())
    problems += weights.told("with values that are no numbers", odd.values())
    if problems:
        fit = len(given & expected.keys() - misfits.keys() - odd.keys())
        quantised = any(name.endswith(QUANTISED) for name in given) or any(
            " holds " in what for what in misfits.values()
        )
        advice = (
            "; it seems to be quantised: take the file of float16, bfloat16 or float32"
            if quantised
            else ""
        )
        raise Misfit(
            f"{weights.joined(problems)} (nearest layout: {layout.name}, of whose {len(expected)}"
            f" tensors {fit} fit{advice})"
        )
    return Converted(Lazy(makers), layout, reasons)


def _floats(dtype: np.dtype) -> bool:
    """Whether numbers of this type are weights as they stand; those of 8 bits need scales."""
    return jnp.issubdtype(dtype, jnp.floating) and dtype.itemsize > 1


def from_flax(
    module: nnx.Module, layout: Layout, tensors: Mapping[str, np.ndarray]
) -> dict[str, np.ndarray]:
    """The inverse of `to_flax`: the source tensors that `layout` maps, in the publisher's names and
    axes, and those it writes beside them.

    Raises:
        Misfit: tensors that are missing, unexpected or of another shape for `module`; all of them
            are named.
    """
    wanted = weights.shapes(module)
    plan = _plan(layout, wanted)
    shapes = {name: tensor.shape for name, tensor in tensors.items()}
    for name, (row, *_) in plan.items():
        if row.resized and name in tensors and _fits(module, name, tensors[name], wanted[name]):
            shapes[name] = wanted[name]
    problems = weights.mismatches(wanted, shapes)
    odd = {name: weights.not_finite(tensor) for name, tensor in tensors.items()}
    problems += weights.told(
        "with values that are no numbers", [f"{name}: {what}" for name, what in odd.items() if what]
    )
    if problems:
        raise Misfit(weights.joined(problems))
    converted: dict[str, np.ndarray] = {}
    blocks: dict[str, dict[int, np.ndarray]] = defaultdict(dict)
    for target, (row, sources, block) in plan.items():
        for name, part in zip(sources, row.transform.inverse(tensors[target]), strict=True):
            if block is None:
                converted[name] = np.asarray(part, order="C")
            else:
                blocks[name][block] = part
    return (
        converted
        | {name: np.stack([parts[i] for i in range(len(parts))]) for name, parts in blocks.items()}
        | layout.beside(tensors)
    )


def source_shapes(module: nnx.Module, layout: Layout) -> dict[str, tuple[int, ...]]:
    """The shape of every tensor that a checkpoint of `module` in this layout must hold, by its name
    there.
    """
    wanted = weights.shapes(module)
    shapes: dict[str, tuple[int, ...]] = {}
    plan = _plan(layout, wanted)
    users = Counter(name for use in plan.values() for name in use.sources)
    for target, (row, sources, block) in plan.items():
        parts = row.transform.inverse(np.broadcast_to(np.float32(0), wanted[target]))
        shapes |= {
            name: part.shape if block is None else (users[name], *part.shape)
            for name, part in zip(sources, parts, strict=True)
        }
    return shapes


def _plan(layout: Layout, wanted: Iterable[str]) -> dict[str, Use]:
    """What every target is made of."""
    named: dict[str, list[tuple[Row, tuple[str, ...]]]] = defaultdict(list)
    patterns = []
    for row in layout.rows:
        if "*" in row.target:
            pattern = re.compile(re.escape(row.target).replace(r"\*", r"(\d+)"))
            patterns.append((pattern, row))
        else:
            named[row.target].append((row, ()))
    plan: dict[str, Use] = {}
    users: dict[str, str] = {}  # target by source
    for target in wanted:
        found = named.get(target, []) + [
            (row, match.groups())
            for pattern, row in patterns
            if (match := pattern.fullmatch(target))
        ]
        if len(found) != 1:
            raise ValueError(
                f"{len(found)} rows of the table {layout.name} make {target}; there must be one"
            )
        row, numbers = found[0]
        sources = [source.replace("*", "{}").format(*numbers) for source in row.source]
        stacked = "*" in row.target and not any("*" in source for source in row.source)
        plan[target] = Use(row, sources, int(numbers[0]) if stacked else None)
        for source in sources:
            user = row.target if stacked else target
            if users.setdefault(source, user) != user:
                raise ValueError(
                    f"the table {layout.name} uses {source} for both {users[source]} and {user}"
                )
    return plan


def _fits(module: Any, target: str, tensor: np.ndarray, wanted: tuple[int, ...]) -> bool:
    """Whether the module can fit a stored tensor to its own size at load."""
    if tensor.ndim != len(wanted):
        return False
    try:
        return module.adapt(target, tensor).shape == wanted
    except ValueError:
        return False
