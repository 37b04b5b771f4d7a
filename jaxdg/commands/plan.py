"""What a run needs and how fast a step would be on machines that are not here: no device, no data,
no weights.

    jaxdg plan --config gta5_eva02 --devices 64 --mesh data=8,fsdp=8 --accelerator h100

The real training step of the configuration is compiled by XLA for as many emulated CPU devices,
from shapes alone: no parameter is allocated. Printed are bytes a device, the collectives of the
optimised program, floating-point operations, and the predicted time.

What to believe of it:
- Parameters, optimiser and batch are exact; so is which collectives a step has, except that GPU and
  TPU compilers may merge them or turn an all-reduce that is cut right after into a reduce-scatter
  of half the bytes.
- Temporaries are those of the program for CPUs: an upper bound. It computes bfloat16 products in
  float32 and, other than fused attention, holds whole score matrices.
- The time is arithmetic, not measurement: matrix products at --attainable of the peak rate, the
  optimiser's pass over its state at the memory's, bytes sent around rings at 0.8 of the
  interconnect's. Between "overlapped", where products hide what is sent, and "in turn". Nothing is
  added for launching kernels and reading data: models as small as the tests' are far slower.
"""

from collections import defaultdict
from collections.abc import Sequence
import dataclasses
import math
import re
import time
from typing import Any

from absl import flags
import jax
import numpy as np

from jaxdg import methods
from jaxdg.backbones import zoo
from jaxdg.commands import command_line as cli
from jaxdg.commands.flops import PEAK_TFLOPS, count
from jaxdg.config import Config, MeshConfig
from jaxdg.data.augment.transforms import BOX_FIELDS
from jaxdg.tasks import run_state as tasks
from jaxdg.tasks.task import Task
from jaxdg.training import sharding
from jaxdg.training.step import make_step

LINK_SHARE = 0.8  # of the interconnect's peak that collectives reach
USABLE = (
    0.9  # of the memory; the rest is for the runtime, the compiler's own buffers and fragmentation
)


@dataclasses.dataclass(frozen=True)
class Accelerator:
    """Peak rates of one chip.

    Attributes:
        flops: dense bfloat16 operations a second.
        float32: share of that rate at which float32 products run by default: TF32 on GPUs, one
            bfloat16 pass on TPUs.
        memory: bytes.
        bandwidth: of the memory, bytes a second.
        link: bytes a second a chip can send to the chips of its domain around a ring.
        domain: chips that are joined by such links: of a node, or of a pod.
        network: bytes a second a chip can send out of its domain.
    """

    flops: float
    float32: float
    memory: float
    bandwidth: float
    link: float
    domain: int
    network: float


# GPUs: NVIDIA's data sheets of H100 SXM, H200 SXM and A100 80GB SXM (NVLink: half of the sum of
# both directions), nodes of eight and one network card a GPU as in DGX H100, DGX H200 (400 Gb/s)
# and DGX A100 (200 Gb/s). TPUs: docs.cloud.google.com/tpu/docs, and for a ring along one axis of
# the torus and for the data centre's network the tables of jax-ml.github.io/scaling-book/tpus.
ACCELERATORS = {
    "h100": Accelerator(PEAK_TFLOPS["H100"] * 1e12, 0.5, 80e9, 3.35e12, 450e9, 8, 50e9),
    "h200": Accelerator(PEAK_TFLOPS["H200"] * 1e12, 0.5, 141e9, 4.8e12, 450e9, 8, 50e9),
    "a100": Accelerator(PEAK_TFLOPS["A100"] * 1e12, 0.5, 80e9, 2.039e12, 300e9, 8, 25e9),
    "tpu_v4": Accelerator(
        PEAK_TFLOPS["TPU v4"] * 1e12, 1.0, 32.0 * 2**30, 1.2e12, 90e9, 4096, 6.25e9
    ),
    "tpu_v5e": Accelerator(PEAK_TFLOPS["TPU v5 lite"] * 1e12, 1.0, 16e9, 819e9, 90e9, 256, 3.125e9),
    "tpu_v5p": Accelerator(PEAK_TFLOPS["TPU v5"] * 1e12, 1.0, 95e9, 2.765e12, 180e9, 8960, 6.25e9),
    "tpu_v6e": Accelerator(
        PEAK_TFLOPS["TPU v6 lite"] * 1e12, 1.0, 32e9, 1.638e12, 180e9, 256, 12.5e9
    ),
}


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


@dataclasses.dataclass(frozen=True)
class Plan:
    """What a compiled step needs.

    Attributes:
        parameters: bytes a device of trained and frozen parameters.
        gradients: bytes a device of the trained ones, a part of `temporaries`.
        optimizer: bytes a device of its state.
        rest: bytes a device of the batch and of statistics.
        temporaries: bytes a device of everything else at its peak, by XLA's count.
        parameter_count: of the whole model.
        flops: of a step on all devices, what is computed anew for less memory included.
        collectives: of a step.
        unknown: loops around collectives whose rounds the program does not tell; they count once.
        seconds: tracing and compiling took.
    """

    parameters: int
    gradients: int
    optimizer: int
    rest: int
    temporaries: int
    parameter_count: int
    flops: float
    collectives: list[Collective]
    unknown: int
    seconds: float

    @property
    def total(self) -> int:
        """Bytes a device at the peak."""
        return self.parameters + self.optimizer + self.rest + self.temporaries


def abstract_batch(task: Task, mesh: Any) -> dict[str, Any]:
    """The shapes of a global training batch, divided over the mesh."""
    c = task.config

    def of(dtype, *shape):
        return jax.ShapeDtypeStruct(
            (c.batch_size, *shape), dtype, sharding=sharding.batch_sharding(mesh)
        )

    if c.task == "segmentation":
        return {"image": of(np.uint8, *c.data.crop, 3), "label": of(np.uint8, *c.data.crop)}
    n = c.data.max_boxes
    boxes = {key: of(dtype, n, *shape) for key, (shape, dtype) in BOX_FIELDS.items()}
    return {"image": of(np.uint8, *c.data.crop, 3), "valid": of(np.bool_, n), **boxes}


def device_bytes(tree: Any) -> int:
    """Bytes that one device holds of a tree of shapes with shardings."""
    return sum(
        math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in jax.tree.leaves(tree)
    )


def plan(config: Config) -> Plan:
    """Compiles the step of a run for the devices of this process, which `config.mesh` arranges.

    Raises:
        ValueError: TLDR is on, whose batches are made with weights that are not here.
    """
    for name, options in methods.settings(config).items():
        if options.on:
            raise ValueError(
                f"{name}.on is True; allowed: False, for a method may need weights, which are not"
                " read here"
            )
    start = time.perf_counter()
    task = tasks.make_task(config)
    mesh = sharding.make_mesh(config.mesh)
    model = tasks.Blueprint.of(task, config.model.freeze)
    state, optimizer = tasks.abstract_state(model, config, mesh)
    places = jax.tree.map(lambda leaf: leaf.sharding, state)
    step = make_step(
        model.graph,
        optimizer,
        task.loss_denominator,
        task.losses,
        jax.random.key(0),
        places,
        config.optimizer.accumulate,
    )
    batch = abstract_batch(task, mesh)
    # Machine code that never runs need not be good.
    quick = {"xla_backend_optimization_level": "0", "xla_llvm_disable_expensive_passes": "True"}
    compiled = step.lower(state, batch).compile(compiler_options=quick)  # pyright: ignore[reportFunctionMemberAccess]
    found, unknown = collectives(compiled.as_text())
    return Plan(
        parameters=device_bytes((state.trained, state.frozen)),
        gradients=device_bytes(state.trained),
        optimizer=device_bytes(state.opt_state),
        rest=device_bytes((state.step, state.statistics, batch)),
        temporaries=compiled.memory_analysis().temp_size_in_bytes,
        parameter_count=sum(
            math.prod(x.shape) for x in jax.tree.leaves((state.trained, state.frozen))
        ),
        flops=count(step, state, batch),
        collectives=found,
        unknown=unknown,
        seconds=time.perf_counter() - start,
    )


KINDS = "all-gather|all-reduce|reduce-scatter|all-to-all|collective-permute"
COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) .*\{$")
CALLED = re.compile(
    r"(?:calls|to_apply|body|condition|true_computation|false_computation)=%?([\w.\-]+)"
)
BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")
TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"')
COLLECTIVE = re.compile(rf"= (.*?) ({KINDS})\(")
SHAPE = re.compile(r"\b([a-z]+)(\d*)\w*\[([\d,]*)\]")


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
            if match := COLLECTIVE.search(line):
                groups = replica_groups(line)
                if groups.shape[1] == 1:  # nothing is sent
                    continue
                whole = groups.shape[1] if match[2] == "reduce-scatter" else 1
                found.append(Collective(match[2], times[name], whole * _bytes(match[1]), groups))
                unknown |= blind[name]
    return found, len(unknown)


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


def _bytes(shapes: str) -> int:
    """Bytes of a shape or a tuple of shapes, such as `(f32[2,3]{1,0}, pred[])`."""

    def size(kind, bits):
        return 1 if kind == "pred" else int(bits) // 8

    return sum(
        math.prod(map(int, filter(None, dims.split(",")))) * size(kind, bits)
        for kind, bits, dims in SHAPE.findall(shapes)
    )


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


def predict(
    p: Plan, chip: Accelerator, devices: int, dtype: str, attainable: float
) -> dict[str, float]:
    """Seconds of a step's parts, with those of the step if sending hides behind products
    ("overlapped") or follows it ("in turn").
    """
    rate = chip.flops * attainable * (1.0 if dtype == "bfloat16" else chip.float32)
    products = p.flops / devices / rate
    # Reads gradients, parameters and moments once, writes parameters and moments.
    update = (3 * p.gradients + 2 * p.optimizer) / chip.bandwidth
    exchange = sum(c.seconds(chip) for c in p.collectives)
    return {
        "products": products,
        "update": update,
        "exchange": exchange,
        "overlapped": max(products, exchange) + update,
        "in turn": products + exchange + update,
    }


def parse_mesh(text: str) -> MeshConfig:
    """`data=8,fsdp=8` as a mesh.

    Raises:
        ValueError: anything else.
    """
    if not re.fullmatch(r"(data|fsdp)=(-1|[1-9]\d*)(,(data|fsdp)=(-1|[1-9]\d*))?", text):
        raise ValueError(f"--mesh is {text!r}; allowed: such as data=8,fsdp=8")
    return MeshConfig(**{key: int(value) for key, value in re.findall(r"(\w+)=(-?\d+)", text)})


def report(config: Config, p: Plan, devices: int, names: Sequence[str], attainable: float) -> str:
    """What is printed, line by line."""
    m = config.model
    h, w = config.data.crop

    def mb(n):
        return f"{n / 1e6:10,.1f} MB"

    lines = [
        (
            f"{m.encoder} + {m.decoder}, {p.parameter_count / 1e6:.1f} M parameters; batch"
            f" {config.batch_size} of {h}x{w}, {m.dtype}, remat={m.remat}, freeze={m.freeze}"
        ),
        (
            f"{devices} devices, mesh data={config.mesh.data} fsdp={config.mesh.fsdp}; compiled in"
            f" {p.seconds:.0f} s"
        ),
        "",
        "bytes a device",
        f"  parameters              {mb(p.parameters)}",
        f"  optimiser               {mb(p.optimizer)}",
        f"  batch and statistics    {mb(p.rest)}",
        (
            f"  temporaries             {mb(p.temporaries)}   gradients ({mb(p.gradients).strip()})"
            " and activations"
        ),
        f"  all                     {mb(p.total)}",
        "",
        "collectives a step         times   sent a device   among",
    ]
    table: dict[tuple[str, int], list[float]] = {}
    for c in p.collectives:
        row = table.setdefault((c.kind, c.groups.shape[1]), [0, 0.0])
        row[0] += c.times
        row[1] += c.times * c.sent
    lines += [
        f"  {kind:<22} {times:8.0f}    {mb(sent)}   {n} devices"
        for (kind, n), (times, sent) in sorted(table.items())
    ] or ["  none"]
    if p.unknown:
        lines.append(
            f"  {p.unknown} loops around some of them have no known number of rounds; they count"
            " once"
        )
    lines += ["", f"{p.flops / 1e12:.2f} TFLOP a step, {p.flops / devices / 1e12:.2f} a device"]
    lines += [
        f"predicted at {attainable:.0%} of the peak for {m.dtype} products, {LINK_SHARE:.0%} of the"
        f" links', {USABLE:.0%} of the memory:"
    ]
    for name in names:
        chip = ACCELERATORS[name]
        s = predict(p, ACCELERATORS[name], devices, m.dtype, attainable)
        fits = p.total <= USABLE * chip.memory
        lines.append(
            f"  {name:<8} {'fits' if fits else 'DOES NOT FIT'} {mb(chip.memory).strip()}:"
            f" {100 * p.total / chip.memory:.0f} %;  step {1e3 * s['overlapped']:.1f} ms overlapped"
            f" to {1e3 * s['in turn']:.1f} ms in turn (products {1e3 * s['products']:.1f}, exchange"
            f" {1e3 * s['exchange']:.1f}, update {1e3 * s['update']:.1f})"
        )
    return "\n".join(lines)


def main(arguments: Sequence[str]) -> None:
    """Plans as the flags say."""
    if len(arguments) > 1:
        raise ValueError(f"unexpected argument {arguments[1]!r}; see --help")
    if _CONFIG.value is None:
        raise ValueError("--config FILE is needed, such as --config configs/gta5_eva02.py")
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", _DEVICES.value)
    config = _CONFIG.value
    mesh = sharding.make_mesh(parse_mesh(_MESH.value) if _MESH.value else config.mesh)
    config.mesh = MeshConfig(**mesh.shape)
    unit = mesh.size * config.optimizer.accumulate
    if config.batch_size % unit:
        batch_size = -(-config.batch_size // unit) * unit
        print(
            f"batch_size {config.batch_size} cannot be divided among {mesh.size} devices: planned"
            f" with {batch_size}"
        )
        config.batch_size = batch_size
    blocks = getattr(zoo.entry(config.model.encoder).config, "depth", 0)
    taps = config.model.taps
    if taps and max(taps) + 1 < blocks:
        print(
            f"model.taps ends at block {max(taps) + 1} of {blocks}, so the rest is left out;"
            " --config.model.taps='()' reads the last too"
        )
    names = [_ACCELERATOR.value] if _ACCELERATOR.value else list(ACCELERATORS)
    print(report(config, plan(config), mesh.size, names, _ATTAINABLE.value))


if __name__ == "__main__":
    _CONFIG = cli.define_config()
    _DEVICES = flags.DEFINE_integer(
        "devices", 1, "Devices of the machine that is planned for.", lower_bound=1
    )
    _MESH = flags.DEFINE_string(
        "mesh",
        None,
        "How they are arranged, such as data=8,fsdp=8; the configuration's own if left out.",
    )
    _ACCELERATOR = flags.DEFINE_enum(
        "accelerator",
        None,
        list(ACCELERATORS),
        "Whose rates and memory to predict with; all if left out.",
    )
    _ATTAINABLE = flags.DEFINE_float(
        "attainable",
        0.4,
        "Share of the peak rate that products reach over a whole step.",
        0.01,
        1.0,
    )
    cli.run(main)
