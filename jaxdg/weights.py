"""Reads and writes converted `.safetensors` files, and names parameters per block.

A module holds equal blocks as stacked segments: `blocks.segments.6.norm1.scale` is the segment that
starts at block 6, with its blocks along the leading axis. Files and all regular expressions
(freezing, weight decay, learning rates, sharding) see one name a block (`blocks.7.norm1.scale`), so
they do not depend on where segments end.

This file knows no model. A module's optional method `adapt(name, tensor)` fits a stored tensor to
the module (it resizes positions), or returns None for one that the module does not need. An
optional method `check(metadata)` raises ValueError if a file was made for another module of the
same shapes.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
import json
import os
from pathlib import Path
import re
from typing import Any, NamedTuple, TypeVar

from flax import nnx
import jax
import numpy as np
from safetensors import SafetensorError, safe_open

T = TypeVar("T")

CODES = {
    "float64": "F64",
    "float32": "F32",
    "float16": "F16",
    "bfloat16": "BF16",
    "int64": "I64",
    "int32": "I32",
    "uint8": "U8",
    "bool": "BOOL",
}
SEGMENTS = "segments"  # the attribute that holds stacked blocks, see `backbones.stacking`
FEW = 6  # an error names at most so many tensors one by one
LONGEST = 700  # characters of an error's list of tensors, about ten lines of a terminal
NUMBER = re.compile(r"(?<=[./])\d+(?=[./])|(?<=encoderblock_)\d+")  # of a block
COMMAND = "jaxdg convert"
# Suffixes of published files, which are not converted.
PUBLISHED = (
    ".pth",
    ".pt",
    ".tar",
    ".bin",
    ".ckpt",
    ".pkl",
    ".npz",
    ".onnx",
    ".gguf",
    ".h5",
    ".json",
)
PACKED = "jaxdg_model"  # among the metadata of a file that is a whole model, see `tasks.packed`
STORED = (nnx.Param, nnx.BatchStat)  # what a weights file holds: parameters and running statistics


class Slot(NamedTuple):
    """The place of a named tensor in a state.

    Attributes:
        path: of the leaf.
        layer: index of a stacked block in the leaf's leading axis; else None.
        stack: name of a stacked block's stack, such as `backbone.blocks`; else None.
    """

    path: tuple[Any, ...]
    layer: int | None = None
    stack: str | None = None


def slots(state: nnx.State) -> dict[str, Slot]:
    """The per-block name of every tensor in `state`, with its place.

    Args:
        state: of a module, or a part of one; may be abstract.

    Returns:
        {"blocks.3.norm1.scale": Slot(("blocks", "segments", "0", "norm1", "scale"), 3), ...},
        sorted by path.
    """
    return {
        name: slot
        for path, leaf in nnx.to_flat_state(state)
        for name, slot in named(path, leaf.shape).items()
    }


def named(path: tuple[Any, ...], shape: Sequence[int]) -> dict[str, Slot]:
    """The tensors of a leaf by per-block name: one, or one for each block that it stacks."""
    if SEGMENTS not in path:
        return {".".join(map(str, path)): Slot(path)}
    at = path.index(SEGMENTS)  # a segment is called by its first block
    stack = ".".join(map(str, path[:at]))
    first = int(str(path[at + 1]))
    rest = path[at + 2 :]
    return {
        ".".join(map(str, (stack, first + layer, *rest))): Slot(path, layer, stack)
        for layer in range(shape[0])
    }


def segment_ends(shapes: Mapping[tuple[Any, ...], Sequence[int]], within: str) -> tuple[int, ...]:
    """The last block of every stacked segment of a part of a model, counted through all its stacks.

    Args:
        shapes: of the leaves of its state, by path.
        within: the first word of the paths that count, such as "backbone".
    """
    # For each stack: first block of a segment to the number of its blocks.
    stacks: dict[str, dict[int, int]] = {}
    for path, shape in shapes.items():
        if path[0] == within and SEGMENTS in path:
            at = path.index(SEGMENTS)
            stacks.setdefault(".".join(map(str, path[:at])), {})[int(str(path[at + 1]))] = shape[0]
    ends = []
    before = 0
    for stack in sorted(stacks):
        ends += [before + first + count - 1 for first, count in sorted(stacks[stack].items())]
        before = ends[-1] + 1
    return tuple(ends)


def is_stacked(path: tuple[Any, ...]) -> bool:
    """Whether a leaf of a state, or of a tree like it, stacks blocks along its first axis."""
    return any(getattr(key, "key", key) == SEGMENTS for key in path)


def tree_by_name(state: nnx.State, value: Callable[[str], float]) -> Any:
    """A tree like `state` with one float32 factor a parameter, given by its per-block name.

    Args:
        state: parameters, may be abstract.
        value: name to number.

    Returns:
        A tree like `state`; its leaves are scalars, or [layers, 1, ...] for stacked blocks, which
        multiply those of `state`.
    """
    flat = dict(nnx.to_flat_state(state))
    factors: dict[tuple, np.ndarray] = {}
    for name, (path, layer, _) in slots(state).items():
        if layer is None:
            factors[path] = np.asarray(value(name), np.float32)
        else:
            shape = (flat[path].shape[0],) + (1,) * (len(flat[path].shape) - 1)
            factors.setdefault(path, np.ones(shape, np.float32))[layer] = value(name)
    return unflatten_like(state, factors)


def unflatten_like(state: nnx.State, leaves: Mapping[tuple[Any, ...], Any]) -> Any:
    """A tree like `state` with these leaves, given by path."""
    return jax.tree.unflatten(
        jax.tree.structure(state), [leaves[path] for path, _ in nnx.to_flat_state(state)]
    )


def tensors(module: nnx.Module) -> dict[str, np.ndarray]:
    """All parameters and running statistics of `module` as host arrays, by per-block name."""
    state = nnx.state(module, nnx.Any(*STORED))
    flat = {path: np.asarray(leaf[...]) for path, leaf in nnx.to_flat_state(state)}
    return {
        name: flat[path] if layer is None else flat[path][layer]
        for name, (path, layer, _) in slots(state).items()
    }


def shapes(module: nnx.Module) -> dict[str, tuple[int, ...]]:
    """The shapes of a weights file of `module`, which may be abstract, by per-block name."""
    state = nnx.state(module, nnx.Any(*STORED))
    flat = {path: tuple(leaf.shape) for path, leaf in nnx.to_flat_state(state)}
    return {
        name: flat[path] if layer is None else flat[path][1:]
        for name, (path, layer, _) in slots(state).items()
    }


def load(module: nnx.Module, path: str | Path) -> None:
    """Fills every parameter and running statistic of `module` from a converted file.

    Args:
        module: is filled in place; arrays keep their sharding. Its optional `adapt` method fits
            stored tensors to it.
        path: a `.safetensors` file written by `save` or `jaxdg convert`.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not a converted file, values that are no numbers, or tensors that are missing,
            left over or of another shape; the message names them.
    """
    stored = read(path)
    about = metadata(path)
    broken = [f"{name}: {what}" for name, tensor in stored.items() if (what := not_finite(tensor))]
    if broken:
        raise ValueError(
            f"{path} holds {joined(told('tensors with values that are no numbers', broken))}; take"
            " another file of these weights"
        )
    check = getattr(module, "check", None)
    if check is not None:
        try:
            check(about)
        except ValueError as error:
            raise ValueError(
                f"{path} does not fit this {type(module).__name__}: {error}"
            ) from error
    try:
        fill(module, stored, path)
    except ValueError as error:
        if "jaxdg" not in about:
            hint = (
                f"nothing tells that it was converted; a published file is, once: {COMMAND}"
                f" --checkpoint {path} --out FILE.safetensors"
            )
        elif "layout" not in about and "model" in about:
            hint = f"it is {about['model']} written back to its publisher's names; convert it again"
        else:
            hint = f"it holds the weights of {about.get('model', 'nothing it tells the name of')}"
        raise ValueError(f"{error}; {hint}") from error


def fill(module: nnx.Module, stored: Mapping[str, np.ndarray], source: str | Path) -> None:
    """Fills every parameter and running statistic of `module`.

    Args:
        module: is filled in place; arrays keep their sharding. Its optional `adapt` method fits
            stored tensors to it.
        stored: tensors by per-block name.
        source: of the tensors, for the error.

    Raises:
        ValueError: tensors are missing, left over or of another shape; the message names them.
    """
    adapt = getattr(module, "adapt", None)
    if adapt is not None:
        fitted = {name: adapt(name, tensor) for name, tensor in stored.items()}
        stored = {name: tensor for name, tensor in fitted.items() if tensor is not None}
    state = nnx.state(module, nnx.Any(*STORED))
    wanted = shapes(module)
    problems = mismatches(wanted, {name: tensor.shape for name, tensor in stored.items()})
    if problems:
        raise ValueError(f"{source} does not fit this {type(module).__name__}: {joined(problems)}")
    filled: dict[tuple, Any] = {}
    for name, (at, layer, _) in slots(state).items():
        filled[at] = stored[name] if layer is None else [*filled.get(at, []), stored[name]]
    for at, variable in nnx.to_flat_state(state):
        old = variable.get_value()  # abstract modules have only shapes, without a sharding
        # Both copy, because no parameter may live in the mapped file.
        value = np.stack(filled[at]) if isinstance(filled[at], list) else np.array(filled[at])
        value = value.astype(old.dtype, copy=False)
        if old.sharding:
            # Unlike `device_put`, this does not compare the values of all processes.
            array = jax.make_array_from_callback(value.shape, old.sharding, value.__getitem__)
        else:
            array = jax.device_put(value)
        variable.set_value(array)
    nnx.update(module, state)


def mismatches(
    wanted: Mapping[str, tuple[int, ...]], given: Mapping[str, tuple[int, ...]]
) -> list[str]:
    """A phrase for each kind of difference between `given` and `wanted` tensors; may be empty."""
    missing = wanted.keys() - given.keys()
    extra = given.keys() - wanted.keys()
    misshapen = [
        f"{n} is {given[n]}, not {wanted[n]}"
        for n in wanted.keys() & given.keys()
        if tuple(given[n]) != tuple(wanted[n])
    ]
    return (
        told("missing", missing) + told("unexpected", extra) + told("of another shape", misshapen)
    )


def told(wrong: str, offenders: Iterable[str]) -> list[str]:
    """A phrase that names some tensors, with equal names of all blocks as one; [] without tensors.

    Args:
        wrong: the kind of their fault.
        offenders: their names, each perhaps followed by a space or a colon and details.
    """

    def numbers_by_value(name: str) -> list[tuple[int, str]]:
        parts = re.split(r"(\d+)", name)
        return [(int(part), "") if part.isdigit() else (-1, part) for part in parts]

    ordered = sorted(offenders, key=numbers_by_value)
    if len(ordered) <= FEW:
        kinds = ordered
    else:
        alike: dict[str, list[str]] = {}
        for name in ordered:
            alike.setdefault(NUMBER.sub("*", name), []).append(name)
        kinds = [
            f"{kind} ({len(names)} tensors)" if len(names) > 1 else names[0]
            for kind, names in alike.items()
        ]
    return [f"{len(ordered)} {wrong} ({', '.join(kinds)})"] if ordered else []


def joined(problems: Sequence[str]) -> str:
    """Phrases of `told` in one line; long ones are cut between two names."""
    room = LONGEST
    cut = dict.fromkeys(problems, "")
    for done, problem in enumerate(sorted(cut, key=len)):  # short ones leave room
        share = room // (len(cut) - done)
        if len(problem) > share:
            cut[problem] = problem[: problem.rfind(", ", 0, share)] + ", ..)"
        else:
            cut[problem] = problem
        room -= len(cut[problem])
    return "; ".join(cut.values())


def not_finite(tensor: np.ndarray) -> str:
    """Counts NaN and values infinite in float32, in words; empty if there are none."""
    with np.errstate(over="ignore"):
        numbers = tensor if tensor.dtype.kind in "iub" else tensor.astype(np.float32, copy=False)
    if np.isfinite(numbers).all():
        return ""
    return f"{np.isnan(numbers).sum()} NaN and {np.isinf(numbers).sum()} infinite of {numbers.size}"


def read(path: str | Path) -> dict[str, np.ndarray]:
    """All tensors of a `.safetensors` file by name: copy-on-write views of the mapped file."""
    with _open(path):  # the library checks the file, but would copy every tensor
        raw = np.asarray(np.memmap(path, np.uint8, "c"))
    start = 8 + int.from_bytes(raw[:8].tobytes(), "little")
    header = json.loads(raw[8:start].tobytes())
    header.pop("__metadata__", None)
    types = {code: np.dtype(name) for name, code in CODES.items()}
    if foreign := [name for name, at in header.items() if at["dtype"] not in types]:
        raise ValueError(
            f"{path} holds {header[foreign[0]]['dtype']} ({foreign[0]}), which no converted file"
            f" does; a published file is converted once: {COMMAND} --checkpoint {path} --out"
            " FILE.safetensors"
        )
    data = raw[start:]
    return {
        name: data[slice(*at["data_offsets"])].view(types[at["dtype"]]).reshape(at["shape"])
        for name, at in header.items()
    }


def metadata(path: str | Path) -> dict[str, str]:
    """The metadata of a converted file: model, source file, its sha256, what was left out.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not a converted file.
    """
    with _open(path) as file:
        about = dict(file.metadata() or {})
    if PACKED in about:
        raise ValueError(
            f"{path} is a whole trained model, written by jaxdg pack, and no weights of a part;"
            " give it as model.start"
        )
    return about


def _open(path: str | Path):
    path = Path(path)
    convert = f"{COMMAND} --checkpoint {path} --out FILE.safetensors"
    if path.is_dir():
        raise ValueError(
            f"{path} is a folder; of a model as it was downloaded a converted file is made once:"
            f" {convert}"
        )
    if not path.is_file():
        raise FileNotFoundError(
            f"no weights at {path}; convert a checkpoint with {COMMAND} --out {path}, or have"
            " published ones by name: jaxdg weights get NAME, in a configuration auto"
        )
    if path.suffix in PUBLISHED:
        raise ValueError(
            f"{path} is a {path.suffix} file and no converted one, which is made of it once:"
            f" {convert}"
        )
    try:
        return safe_open(path, framework="numpy")
    except SafetensorError as error:
        raise ValueError(
            f"{path} is no readable safetensors file ({error}); convert the checkpoint again"
        ) from error


def save(tensors: Mapping[str, np.ndarray], path: str | Path, about: Mapping[str, Any]) -> None:
    """Writes tensors and what is known of them to a `.safetensors` file, whole or not at all.

    Args:
        tensors: host arrays by per-block name; taken one by one, twice, so a mapping may make each
            when it is asked for.
        path: the file; its folder is created.
        about: metadata; values that are no strings are written as JSON.

    Raises:
        OSError: it cannot be written; what was there before is untouched.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    header: dict[str, Any] = {
        "__metadata__": {
            key: value if isinstance(value, str) else json.dumps(value)
            for key, value in about.items()
        }
    }
    end = 0
    for name, tensor in tensors.items():
        start = end
        end = end + tensor.nbytes
        header[name] = {
            "dtype": CODES[str(tensor.dtype)],
            "shape": tensor.shape,
            "data_offsets": (start, end),
        }
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    try:
        # The library's own writer wants all tensors at once, and makes files that nobody else can
        # read.
        with partial.open("wb") as file:
            file.write(len(text).to_bytes(8, "little") + text)
            for tensor in tensors.values():
                file.write(tensor.tobytes())
        os.replace(partial, path)
    except OSError as error:
        raise OSError(
            f"cannot write {path} ({error}); free some space or choose another folder"
        ) from error
    finally:
        partial.unlink(missing_ok=True)


def first_match(name: str, rules: Iterable[tuple[str, T]], default: T) -> T:
    """The value of the first (regex, value) rule whose regex is found in `name`; `default` if none
    is.
    """
    return next((value for pattern, value in rules if re.search(pattern, name)), default)
