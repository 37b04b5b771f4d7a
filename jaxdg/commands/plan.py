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

    jaxdg plan --config gta5_eva02 --compile_for h100 --json plan.json --config.model.dtype=bfloat16

has the step compiled by the GPU's own compiler instead, which needs no GPU (extra `plan-cuda`), and
predicts every kernel: see `compiling` and `roofline`. With `--image 1024x2048` it compiles the
evaluation of such images by sliding windows.
"""

from collections.abc import Sequence
import dataclasses
import json
import math
from pathlib import Path
import re
import time

from absl import flags
import jax
from jax.sharding import Mesh

from jaxdg.backbones import zoo
from jaxdg.commands import command_line as cli
from jaxdg.commands import compiling
from jaxdg.commands.abstract_step import abstract_step, device_bytes
from jaxdg.commands.accelerators import ACCELERATORS, LINK_SHARE, USABLE, Accelerator
from jaxdg.commands.collectives import Collective, collectives
from jaxdg.commands.flops import count
from jaxdg.config import Config, MeshConfig
from jaxdg.hub import runs as auto_weights
from jaxdg.training import sharding

# Machine code that never runs need not be good.
QUICK = {"xla_backend_optimization_level": "0", "xla_llvm_disable_expensive_passes": "True"}


@dataclasses.dataclass(frozen=True)
class Plan:
    """What a compiled step needs.

    Attributes:
        parameters: bytes a device of trained and frozen parameters.
        gradients: bytes a device of the trained ones, a part of `temporaries`.
        optimizer: bytes a device of its state.
        rest: bytes a device of the batch and of statistics.
        temporaries: bytes a device of everything else at its peak, by XLA's count; of the step and
            of what prepares its batch the larger.
        parameter_count: of the whole model.
        flops: of a step on all devices, what is computed anew for less memory and what prepares its
            batch included.
        collectives: of a step and of what prepares its batch.
        unknown: loops around collectives whose rounds the program does not tell; they count once.
        seconds: tracing and compiling took.
        preparation: bytes a device that methods hold to prepare batches.
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
    preparation: int = 0

    @property
    def total(self) -> int:
        """Bytes a device at the peak."""
        held = self.parameters + self.optimizer + self.rest + self.preparation
        return held + self.temporaries


def plan(config: Config) -> Plan:
    """Compiles the step of a run for the devices of this process, which `config.mesh` arranges."""
    start = time.perf_counter()
    step = abstract_step(config, sharding.make_mesh(config.mesh))
    state = step.state
    compiled = step.compile(QUICK)
    found, unknown = collectives(compiled.as_text())
    temporaries = compiled.memory_analysis().temp_size_in_bytes
    flops = count(step.function, state, step.batch)
    for part in step.preparations:
        compiled = part.compile(QUICK)
        more, loops = collectives(compiled.as_text())
        found += more
        unknown += loops
        own = compiled.memory_analysis().temp_size_in_bytes + device_bytes(part.batch)
        temporaries = max(temporaries, own)
        flops += count(part.function, part.state, part.batch)
    return Plan(
        parameters=device_bytes((state.trained, state.frozen)),
        gradients=device_bytes(state.trained),
        optimizer=device_bytes(state.opt_state),
        rest=device_bytes((state.step, state.statistics, step.batch)),
        preparation=device_bytes([part.state for part in step.preparations]),
        temporaries=temporaries,
        parameter_count=sum(
            math.prod(x.shape) for x in jax.tree.leaves((state.trained, state.frozen))
        ),
        flops=flops,
        collectives=found,
        unknown=unknown,
        seconds=time.perf_counter() - start,
    )


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

    preparation = [f"  methods' preparation    {mb(p.preparation)}"]
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
        *(preparation if p.preparation else []),
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


def arrange(config: Config, mesh: Mesh) -> None:
    """Sets the mesh, and a batch size that it divides; prints what differs from the run."""
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


def main(arguments: Sequence[str]) -> None:
    """Plans as the flags say."""
    if len(arguments) > 1:
        raise ValueError(f"unexpected argument {arguments[1]!r}; see --help")
    if _CONFIG.value is None:
        raise ValueError("--config FILE is needed, such as --config configs/gta5_eva02.py")
    if _IMAGE.value and not _COMPILE_FOR.value:
        raise ValueError("--image is inference as --compile_for compiles it; give that too")
    if _JSON.value and not _COMPILE_FOR.value:
        raise ValueError("--json writes what --compile_for reports; give --compile_for too")
    if _ACCELERATOR.value and _COMPILE_FOR.value:
        raise ValueError("--accelerator does not go with --compile_for, which names the GPU")
    jax.config.update("jax_platforms", "cpu")
    config = _CONFIG.value
    auto_weights.names(config)  # fails if `auto` stands for nothing
    arrangement = parse_mesh(_MESH.value) if _MESH.value else config.mesh
    if _COMPILE_FOR.value:
        card = compiling.Card.named(_COMPILE_FOR.value)
        mesh = sharding.make_mesh(arrangement, compiling.absent_devices(card, _DEVICES.value))
        arrange(config, mesh)
        image = cli.parse_size("image", _IMAGE.value) if _IMAGE.value else None
        predicted = compiling.compiled_plan(config, card, mesh, image)
        if _JSON.value:
            Path(_JSON.value).write_text(json.dumps(predicted.as_json(), indent=2) + "\n")
        print(compiling.report(config, card, predicted))
        return
    jax.config.update("jax_num_cpu_devices", _DEVICES.value)
    mesh = sharding.make_mesh(arrangement)
    arrange(config, mesh)
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
    _COMPILE_FOR = flags.DEFINE_enum(
        "compile_for",
        None,
        compiling.CARDS,
        "GPU whose compiler compiles the step and whose kernels are predicted; none is needed.",
    )
    _IMAGE = flags.DEFINE_string(
        "image",
        None,
        "Height x width of images: --compile_for then compiles inference, label maps of"
        " evaluation.batch_size of them by the run's sliding windows, and not a training step.",
    )
    _JSON = cli.define_path("json", "File for what --compile_for reports, as JSON.")
    cli.run(main)
