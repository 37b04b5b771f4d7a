"""The collectives of a compiled program, read from XLA's text."""

from collections import defaultdict
import dataclasses
import math
import re

import numpy as np

from jaxdg.commands.accelerators import LINK_SHARE, Accelerator

KINDS = "all-gather|all-reduce|reduce-scatter|all-to-all|collective-permute"
COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) .*\{$")
CALLED = re.compile(
    r"(?:calls|to_apply|body|condition|true_computation|false_computation)=%?([\w.\-]+)"
)
BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")
TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"')
COLLECTIVE = re.compile(rf"= (.*?) ({KINDS})(-start)?\(")
SHAPE = re.compile(r"\b([a-z]+)(\d*)\w*\[([\d,]*)\]")


@dataclasses.dataclass(frozen=True)
class Collective:
    """One collective instruction of the compiled program.

    Attributes:
        kind: such as all-gather.
        times: it runs a step.
        size: bytes of the whole that a device gives or gets each time, the larger of the two.
        groups: devices that exchange with each other, [groups, members].
    """

    kind: str
    times: int
    size: int
    groups: np.ndarray

    @property
    def sent(self) -> float:
        """Bytes a device sends each time, around a ring."""
        n = self.groups.shape[1]
        return self.size * {"all-reduce": 2 * (n - 1) / n, "collective-permute": 1.0}.get(
            self.kind, (n - 1) / n
        )

    def seconds(self, chip: Accelerator) -> float:
        """Of one step.

        A group that leaves its domain is as fast as the network cards of its members in each domain
        together.
        """
        domains = self.groups // chip.domain
        within = (domains == domains[:, :1]).all()
        inside = max(np.unique(row, return_counts=True)[1].max() for row in domains)
        return (
            self.times
            * self.sent
            / (LINK_SHARE * (chip.link if within else min(chip.link, inside * chip.network)))
        )


def collectives(program: str) -> tuple[list[Collective], int]:
    """The collectives of an optimised program in XLA's text form, each with how often it runs.

    Returns:
        The collectives, and the number of loops around any whose rounds are unknown and which count
        once.
    """
    bodies: dict[str, list[str]] = {}
    entry = ""
    lines = []
    for line in program.splitlines():
        if not line.startswith(" ") and (header := COMPUTATION.match(line)):
            lines = bodies.setdefault(header[2], [])
            entry = header[2] if header[1] else entry
        else:
            lines.append(line)

    # Callees stand before their callers in the text, so going backwards every caller is known when
    # its callees are reached.
    times: dict[str, int] = defaultdict(int, {entry: 1})
    blind: dict[str, set[str]] = defaultdict(set)  # loops of unknown rounds around a computation
    found = []
    unknown = set()
    for name in reversed(bodies):
        for line in bodies[name]:
            called = CALLED.findall(line) + [
                n.strip(" %") for group in BRANCHES.findall(line) for n in group.split(",")
            ]
            rounds = 1
            loop = set()
            if " while(" in line:
                trips = TRIPS.search(line)
                rounds = (
                    int(trips[1])
                    if trips
                    else _compared(bodies[re.search(r"condition=%?([\w.\-]+)", line)[1]])  # pyright: ignore[reportOptionalSubscript]
                )
                loop = set() if rounds else {line}
            for callee in called:
                times[callee] += times[name] * (rounds or 1)
                blind[callee] |= blind[name] | loop
            if collective := read_collective(line, times[name]):
                found.append(collective)
                unknown |= blind[name]
    return found, len(unknown)


def read_collective(line: str, times: int) -> Collective | None:
    """The collective that an instruction is or, where GPUs go on meanwhile, starts.

    Args:
        line: of the program's text.
        times: it runs a step.

    Returns:
        None for another instruction, and where nothing is sent.
    """
    match = COLLECTIVE.search(line)
    if not match:
        return None
    shapes, kind, starts = match.groups()
    groups = replica_groups(line)
    if groups.shape[1] == 1:
        return None
    arrays = SHAPE.findall(shapes)
    if starts and kind == "collective-permute":  # gives its operand, the result and two counters
        arrays = arrays[1:2]
    elif starts and kind != "all-reduce":  # gives its operands, then the results
        arrays = arrays[len(arrays) // 2 :]
    parts = groups.shape[1] if kind == "reduce-scatter" else 1
    return Collective(kind, times, parts * sum(map(_bytes, arrays)), groups)


def _compared(condition: list[str]) -> int | None:
    """The constant a loop's counter is held against, where its condition is nothing else; None
    where that cannot be told.
    """
    constants = [
        int(match[1])
        for line in condition
        if (match := re.search(r"= s32\[\]\S* constant\((\d+)\)", line))
    ]
    return (
        constants[0]
        if len(constants) == 1 and any("ROOT" in line and "compare" in line for line in condition)
        else None
    )


def _bytes(shape: tuple[str, str, str]) -> int:
    """Bytes of an array, such as ("f", "32", "2,3")."""
    kind, bits, dims = shape
    size = 1 if kind == "pred" else int(bits) // 8
    return size * math.prod(map(int, filter(None, dims.split(","))))


def replica_groups(line: str) -> np.ndarray:
    """The devices that a collective joins, [groups, members], from any of the forms in which XLA
    writes them.

    Raises:
        ValueError: yet another form.
    """

    def numbers(text):
        return [int(n) for n in re.findall(r"\d+", text)]

    def devices(text: str) -> np.ndarray:  # [8] or [4,2]T(1,0)
        shape, _, order = text.partition("T")
        ids = np.arange(math.prod(numbers(shape))).reshape(numbers(shape))
        return ids.transpose(numbers(order)) if order else ids

    if match := re.search(r"source_target_pairs=\{(.*?)\}\}", line):
        return np.array(numbers(match[1])).reshape(-1, 2)
    if match := re.search(r"replica_groups=\{\{(.*?)\}\}", line):
        return np.array([numbers(group) for group in match[1].split("},{")])
    if match := re.search(r"replica_groups=(\[[\d,]+\])<=(\[[\d,]+\](?:T\([\d,]+\))?)", line):
        return devices(match[2]).reshape(numbers(match[1]))
    # Axes of a mesh: mesh['a'=1,'b'=2,'c'=4], device_ids=([4,2]T(1,0)) {'b'}
    if match := re.search(
        r"replica_groups=mesh\[([^\]]*)\](?:, device_ids=\((.*?)\))? \{((?:'\w+',?)+)\}", line
    ):
        axes = dict(re.findall(r"'(\w+)'=(\d+)", match[1]))
        shape = [int(n) for n in axes.values()]
        over = [list(axes).index(axis) for axis in re.findall(r"'(\w+)'", match[3])]
        ids = (devices(match[2]) if match[2] else np.arange(math.prod(shape))).reshape(shape)
        return np.moveaxis(ids, over, range(-len(over), 0)).reshape(
            -1, math.prod(shape[i] for i in over)
        )
    raise ValueError(f"cannot read which devices this instruction joins: {line.strip()[:200]}")
