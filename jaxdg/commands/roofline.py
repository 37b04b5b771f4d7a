"""The predicted time of a program that was compiled for a GPU, kernel by kernel.

It is arithmetic, not a measurement. A kernel takes the longer of two times, and the time to launch
it: its bytes at a share of the memory's rate, or the operations of its matrix product, convolution
or attention at a share of the matrix units'. A loop's kernels count as often as it runs. Kernels
and collectives run one after another.

Where it errs: a scatter's atomic additions, transposed reads and kernels too small to fill the GPU
are slower, and a collective has no latency here; what stays in the cache between two kernels is
faster.
"""

from collections import defaultdict
from collections.abc import Callable, Iterable
import dataclasses
import math
import re
from typing import NamedTuple

from jaxdg.commands.accelerators import Accelerator
from jaxdg.commands.collectives import Collective, read_collective
from jaxdg.commands.hlo import Instruction, Program, arrays, size

# The three constants are assumptions about the kernels of a training step; none was measured on the
# cards. Streaming kernels reach this share of the memory's peak rate.
MEMORY_SHARE = 0.8
# Products of cuBLAS and cuDNN at a transformer's sizes reach this share of the dense peak. Above
# it a card's power limit lowers the clock; FlashAttention-3 (Shah et al. 2024, arXiv 2407.08608)
# gives 0.75 for its best sizes on an H100.
PRODUCT_SHARE = 0.65
# Seconds from a kernel's end to the next one's first byte.
LAUNCH = 2.5e-6

# What `jax.named_scope` calls the parts of a step; the innermost counts.
PARTS = {
    "input": "input preparation",
    "encoder": "encoder",
    "pyramid": "pyramid",
    "pixel_decoder": "pixel decoder",
    "decoder": "decoder",
    "matching": "matching",
    "losses": "losses",
    "detections": "detections",
    "optimizer": "optimiser",
}
PREPARATION = "methods' preparation"
EXCHANGE = "exchange"
OTHER = "other"

# These start no kernel.
FREE = {"parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all", "iota"}
FREE |= {"partition-id", "replica-id", "opt-barrier", "domain"}


@dataclasses.dataclass(frozen=True)
class Kernel:
    """One kernel of a program.

    Attributes:
        name: of its instruction.
        kind: such as fusion, scatter or matmul bf16.
        part: of the step, a value of `PARTS`, `PREPARATION`, `EXCHANGE` or `OTHER`.
        source: the line of jaxdg it comes from; None if the compiler made it.
        times: it runs a step.
        bytes: it moves each time.
        flops: of its product each time.
        seconds: predicted, of all times together.
    """

    name: str
    kind: str
    part: str
    source: str | None
    times: int
    bytes: float
    flops: float
    seconds: float


@dataclasses.dataclass(frozen=True)
class Prediction:
    """A program's kernels.

    Attributes:
        kernels: of a step, in the program's order.
        collectives: of a step.
        unknown_loops: whose rounds the program does not tell; they count once.
    """

    kernels: list[Kernel]
    collectives: list[Collective]
    unknown_loops: int

    def after(self, preparation: "Prediction") -> "Prediction":
        """With the kernels of a program that runs before; they are a part of their own."""
        own = [dataclasses.replace(k, part=PREPARATION) for k in preparation.kernels]
        return Prediction(
            own + self.kernels,
            preparation.collectives + self.collectives,
            preparation.unknown_loops + self.unknown_loops,
        )

    @property
    def seconds(self) -> float:
        """Of a step."""
        return sum(kernel.seconds for kernel in self.kernels)

    def total(self, value: Callable[[Kernel], float]) -> float:
        """A step's sum of what a kernel has each time it runs."""
        return sum(value(kernel) * kernel.times for kernel in self.kernels)

    def by(self, key: Callable[[Kernel], str | None]) -> list[tuple[str, float]]:
        """Seconds by part, kind or line, the most first."""
        seconds: dict[str, float] = defaultdict(float)
        for kernel in self.kernels:
            seconds[key(kernel) or OTHER] += kernel.seconds
        return sorted(seconds.items(), key=lambda row: -row[1])

    def longest(self, count: int) -> list[Kernel]:
        """The kernels that take the most of a step."""
        return sorted(self.kernels, key=lambda kernel: -kernel.seconds)[:count]


def predict(text: str, chip: Accelerator, package: str) -> Prediction:
    """The kernels of an optimised program.

    Args:
        text: of the program, as `as_text()` of a compiled function gives it.
        chip: whose rates count.
        package: folder whose lines are told, ending in a slash.
    """
    walk = _Walk(Program(text), chip, package)
    kernels = walk.body(walk.program.entry, 1, Place(OTHER, None))
    return Prediction(kernels, walk.collectives, len(walk.unknown_loops))


class Place(NamedTuple):
    """Where a kernel comes from: the part of the step, and the line of jaxdg."""

    part: str
    source: str | None


class _Walk:
    """Visits a program's instructions as often as they run, and keeps what it meets.

    Attributes:
        program: that is visited.
        collectives: met so far.
        unknown_loops: names of the loops met so far whose rounds the program does not tell.
    """

    def __init__(self, program: Program, chip: Accelerator, package: str):
        self.program = program
        self.chip = chip
        self.package = package
        self.collectives: list[Collective] = []
        self.unknown_loops: set[str] = set()

    def body(self, name: str, times: int, caller: Place) -> list[Kernel]:
        """The kernels of a computation that runs so often."""
        kernels = []
        for row in self.program.bodies[name]:
            if row.kind not in FREE and not row.kind.endswith(("-done", "-update")):
                kernels += self.instruction(name, row, times, self.place(row, caller))
        return kernels

    def place(self, row: Instruction, caller: Place) -> Place:
        """Where an instruction comes from; what the compiler added belongs to its caller."""
        paths = [row.op_name, *(inner.op_name for inner in reversed(self.program.inside(row)))]
        source = self.program.source(row, self.package)
        return Place(part_of(paths) or caller.part, source or caller.source)

    def instruction(self, body: str, row: Instruction, times: int, place: Place) -> list[Kernel]:
        """The kernels of an instruction: one, or those of what it calls."""
        if row.kind == "while":
            if row.rounds is None:
                self.unknown_loops.add(row.name)
            return self.body(row.called[0], times * (row.rounds or 1), place)
        if row.kind == "conditional":
            branches = [self.body(name, times, place) for name in row.called]
            return max(branches, key=lambda kernels: sum(k.seconds for k in kernels))
        if row.kind in ("call", "async-start") and row.called:
            return self.body(row.called[0], times, place)
        if collective := read_collective(row.line, times):
            self.collectives.append(collective)
            seconds = float(collective.seconds(self.chip))
            sent = float(collective.sent)
            place = Place(EXCHANGE, place.source)
            return [Kernel(row.name, collective.kind, *place, times, sent, 0.0, seconds)]
        done = work(self.program, body, row)
        seconds = times * done.seconds(self.chip)
        return [Kernel(row.name, done.kind, *place, times, float(done.bytes), done.flops, seconds)]


def part_of(paths: Iterable[str]) -> str | None:
    """The part of the step that the first path with any scope of `PARTS` names."""
    for path in paths:
        named = [word for word in re.split(r"[^\w]+", path) if word in PARTS]
        if named:
            return PARTS[named[-1]]
    return None


@dataclasses.dataclass(frozen=True)
class Work:
    """What a kernel does each time.

    Attributes:
        kind: such as fusion, scatter or matmul bf16.
        bytes: it moves.
        flops: of its matrix product, convolution or attention; else 0.
        element: the type of what that multiplies, such as bf16.
    """

    kind: str
    bytes: int
    flops: float = 0.0
    element: str = ""

    def seconds(self, chip: Accelerator) -> float:
        """Of one run, launch included."""
        rate = chip.flops * (chip.float32 if self.element == "f32" else 1.0)
        moving = self.bytes / (MEMORY_SHARE * chip.bandwidth)
        return max(moving, self.flops / (PRODUCT_SHARE * rate)) + LAUNCH


def work(program: Program, body: str, row: Instruction) -> Work:
    """What the kernel of a computation's instruction does."""
    operands = program.operands(body, row)
    read = [size(types) for types in operands]
    written = size(row.result)
    moved = sum(read) + written
    if row.kind == "fusion":
        return _fusion({inner.kind for inner in program.inside(row)}, read, written)
    if row.kind != "custom-call":
        return Work(row.kind, moved)
    element = next((kind for types in operands for kind, _ in arrays(types)), "")
    if "matmul" in row.target or "gemm" in row.target:
        return Work(f"matmul {element}", moved, _product(row, operands), element)
    if "conv" in row.target:
        return Work(f"convolution {element}", moved, _convolution(row, operands), element)
    if "fmha" in row.target:
        return _attention(row.target, operands, sum(read))
    return Work(row.target, moved)


def _fusion(kinds: set[str], read: list[int], written: int) -> Work:
    """A fusion of instructions of these kinds, which may touch a part of what it takes."""
    if kinds & {"dynamic-slice", "gather"}:
        read = [min(n, 8 * written) for n in read]  # an element read, and the line around it
    if "dynamic-update-slice" in kinds:  # in place: the largest operand is the result
        changed = sum(sorted(read)[:-1])
        read = [min(n, changed) for n in read]
        written = min(written, changed)
    kind = next((kind for kind in ("scatter", "gather", "sort") if kind in kinds), "fusion")
    return Work(kind, sum(read) + written)


def _product(row: Instruction, operands: list[str]) -> float:
    """Operations of a matrix product by cuBLAS."""
    left = arrays(operands[0])[0][1]
    result = arrays(row.result)[0][1]
    over = row.field(r'"lhs_contracting_dimensions":\[([^\]]*)\]') or ""
    depth = math.prod(left[int(axis)] for axis in re.findall(r"\d+", over))
    return 2.0 * math.prod(result) * depth


def _convolution(row: Instruction, operands: list[str]) -> float:
    """Operations of a convolution by cuDNN, or of one of its gradients: as many.

    An output pixel takes its kernel once. The gradient of the input is made of the output's and
    the kernel, that of the kernel of the input and the output's.
    """
    labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", row.line)
    if labels is None:
        return 0.0
    first, second, result = (arrays(t)[0][1] for t in (*operands[:2], row.result))
    if "BackwardInput" in row.target:
        output = first
        kernel = second
    elif "BackwardFilter" in row.target:
        output = second
        kernel = result
    else:
        output = result
        kernel = second
    return 2.0 * math.prod(output) * math.prod(kernel) / kernel[labels[2].index("o")]


def _attention(target: str, operands: list[str], read: int) -> Work:
    """CuDNN's attention: two products forward, five backward."""
    (element, (batch, queries, heads, width)), *_ = arrays(operands[0])
    keys = arrays(operands[1])[0][1][1]
    backward = "Backward" in target
    products = 5 if backward else 2
    written = sum(map(size, operands[:3])) if backward else size(operands[0])
    flops = products * 2.0 * batch * heads * queries * keys * width
    return Work(target.removeprefix("__cudnn$"), read + written, flops, element)
