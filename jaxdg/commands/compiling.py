"""The training step compiled for GPUs that are not here, by XLA's own compiler for them.

XLA compiles for the description of a GPU, a text, and gives a program that cannot run here. It is
the real one: calls of cuBLAS and cuDNN, fused kernels, NCCL's collectives, and the compiler's count
of memory. Two things differ from a run: kernels cannot be timed here, so none is chosen by its
time, and matrix products are all cuBLAS', none Triton's.
"""

from collections.abc import Sequence
import dataclasses
import importlib
from pathlib import Path
import re
import time
from typing import Any

import jax
from jax.sharding import Mesh

import jaxdg
from jaxdg.commands import roofline
from jaxdg.commands.abstract_step import abstract_inference, abstract_step, device_bytes
from jaxdg.commands.accelerators import ACCELERATORS, USABLE, Accelerator
from jaxdg.config import Config

FOLDER = Path(__file__).parent / "cards"
CARDS = sorted(path.stem for path in FOLDER.glob("*.txtpb"))
PACKAGE = f"{Path(jaxdg.__file__).parent}/"
PLUGINS = ("jax_plugins.xla_cuda13", "jax_plugins.xla_cuda12")
NODE = 8  # GPUs of a host
OPTIONS = {"xla_gpu_autotune_level": "0", "xla_gpu_enable_triton_gemm": "False"}
LONGEST = 20  # kernels that the table shows


@dataclasses.dataclass(frozen=True)
class Card:
    """A GPU that programs are compiled for.

    Attributes:
        name: such as h100.
        target: XLA's description of it.
        memory: bytes that the description gives it.
        chip: its rates.
    """

    name: str
    target: str
    memory: int
    chip: Accelerator

    @classmethod
    def named(cls, name: str) -> "Card":
        """The card of a file in `cards`."""
        lines = (FOLDER / f"{name}.txtpb").read_text().splitlines()
        target = "\n".join(line for line in lines if not line.startswith("#"))
        memory = re.search(r"device_memory_size: (\d+)", target)
        assert memory is not None
        return cls(name, target, int(memory[1]), ACCELERATORS[name])


def absent_devices(card: Card, count: int) -> Sequence[Any]:
    """GPUs that compile and cannot run, in hosts of eight.

    Raises:
        ValueError: XLA's compiler for CUDA is not installed, or the GPUs do not fill their hosts.
    """
    if count > NODE and count % NODE:
        raise ValueError(
            f"--devices is {count}; allowed with --compile_for: up to {NODE}, or a multiple of it"
        )
    _load_compiler(card.name)
    from jax.experimental import topologies

    hosts = max(1, count // NODE)
    # Slices, hosts of a slice, GPUs of a host.
    arrangement = f"1x{hosts}x{count // hosts}"
    return topologies.get_topology_desc(
        card.name, platform="cuda", target_config=card.target, topology=arrangement
    ).devices


def _load_compiler(card: str) -> None:
    """Makes jax know the plugin for CUDA, which without a GPU it does not load by itself."""
    # Nothing public loads a plugin whose devices are not here.
    from jax._src.lib import xla_client  # pyright: ignore[reportPrivateImportUsage]

    for name in PLUGINS:
        try:
            plugin = importlib.import_module(name)
        except ImportError:
            continue
        jax.devices()  # other plugins are registered first
        library = Path(str(plugin.__file__)).parent / "xla_cuda_plugin.so"
        if not xla_client.pjrt_plugin_loaded("cuda"):
            xla_client.load_pjrt_plugin_dynamically("cuda", str(library))
        if not xla_client.pjrt_plugin_initialized("cuda"):
            xla_client.initialize_pjrt_plugin("cuda")
        return
    raise ValueError(
        f"--compile_for {card} needs XLA's compiler for CUDA, which is not installed (3 GB, no GPU"
        " needed); pip install 'jaxdg[plan-cuda]'"
    )


@dataclasses.dataclass(frozen=True)
class CompiledPlan:
    """What a step compiled for a card needs and is predicted to take.

    Attributes:
        devices: in all.
        images: their number in a global batch, height and width.
        parameters: bytes a device of trained and frozen parameters.
        optimizer: bytes a device of its state.
        batch: bytes a device of the batch, the step and statistics.
        arguments: bytes a device of all of them, by the compiler's count; what methods hold to
            prepare batches included.
        temporaries: bytes a device of everything else at its peak, by the compiler's count; of the
            step and of what prepares its batch the larger.
        memory: of the card.
        prediction: of its kernels, after those that prepare its batch.
        seconds: tracing and compiling took.
        preparation: bytes a device that methods hold to prepare batches, a part of `arguments`.
    """

    devices: int
    images: tuple[int, int, int]
    parameters: int
    optimizer: int
    batch: int
    arguments: int
    temporaries: int
    memory: int
    prediction: roofline.Prediction
    seconds: float
    preparation: int = 0

    @property
    def total(self) -> int:
        """Bytes a device at the peak. The next state takes the place of the one given."""
        return self.arguments + self.temporaries

    @property
    def fits(self) -> bool:
        """Whether it fits the share of the memory that a run can use."""
        return self.total <= USABLE * self.memory

    def as_json(self) -> dict[str, Any]:
        """All of it, of JSON types; bytes are those of a device."""
        p = self.prediction
        return {
            "devices": self.devices,
            "images": self.images,
            "bytes": {
                "parameters": self.parameters,
                "optimizer": self.optimizer,
                "batch": self.batch,
                "preparation": self.preparation,
                "arguments": self.arguments,
                "temporaries": self.temporaries,
                "total": self.total,
                "memory": self.memory,
            },
            "fits": self.fits,
            "predicted": {
                "seconds": p.seconds,
                "kernels": p.total(lambda kernel: 1.0),
                "bytes_moved": p.total(lambda kernel: kernel.bytes),
                "flops": p.total(lambda kernel: kernel.flops),
                "loops_of_unknown_rounds": p.unknown_loops,
                "seconds_by_part": dict(p.by(lambda kernel: kernel.part)),
                "seconds_by_kind": dict(p.by(lambda kernel: kernel.kind)),
                "seconds_by_line": dict(p.by(lambda kernel: kernel.source)),
                "kernels_by_time": [dataclasses.asdict(kernel) for kernel in p.longest(200)],
            },
            "collectives": [
                {
                    "kind": kind,
                    "devices": members,
                    "times": times,
                    "bytes_sent": sent,
                }
                for (kind, members), (times, sent) in exchanged(p).items()
            ],
        }


def exchanged(p: roofline.Prediction) -> dict[tuple[str, int], tuple[int, float]]:
    """By kind and members of a group: how often collectives run, and the bytes a device sends."""
    table: dict[tuple[str, int], tuple[int, float]] = {}
    for c in p.collectives:
        key = c.kind, c.groups.shape[1]
        times, sent = table.get(key, (0, 0.0))
        table[key] = times + c.times, sent + c.times * c.sent
    return dict(sorted(table.items()))


def compiled_plan(
    config: Config, card: Card, mesh: Mesh, image: tuple[int, int] | None = None
) -> CompiledPlan:
    """Compiles the step of a run for a mesh of `absent_devices`, or its inference on images of a
    size.
    """
    start = time.perf_counter()
    step = abstract_inference(config, mesh, image) if image else abstract_step(config, mesh)
    state = step.state
    program = step.compile(OPTIONS)
    memory = program.memory_analysis()
    arguments = memory.argument_size_in_bytes
    temporaries = memory.temp_size_in_bytes
    prediction = roofline.predict(program.as_text(), card.chip, PACKAGE)
    for part in reversed(step.preparations):
        program = part.compile(OPTIONS)
        memory = program.memory_analysis()
        # The step's arguments hold what it returns, and what it holds stays beside the step.
        arguments += device_bytes(part.state)
        temporaries = max(temporaries, memory.temp_size_in_bytes + device_bytes(part.batch))
        before = roofline.predict(program.as_text(), card.chip, PACKAGE)
        prediction = prediction.after(before)
    return CompiledPlan(
        devices=mesh.size,
        images=step.batch["image"].shape[:3],
        parameters=device_bytes((state.trained, state.frozen)),
        optimizer=device_bytes(state.opt_state),
        batch=device_bytes((state.step, state.statistics, step.batch)),
        preparation=device_bytes([part.state for part in step.preparations]),
        arguments=arguments,
        temporaries=temporaries,
        memory=card.memory,
        prediction=prediction,
        seconds=time.perf_counter() - start,
    )


def report(config: Config, card: Card, plan: CompiledPlan) -> str:
    """What is printed, line by line."""
    m = config.model
    p = plan.prediction
    n, height, width = plan.images

    def mb(n: float) -> str:
        return f"{n / 1e6:12,.1f} MB"

    def table(title: str, rows: Sequence[tuple[str, float]]) -> list[str]:
        width = max(len(name) for name, _ in rows)
        shares = [
            f"  {name:<{width}} {1e3 * seconds:9.2f} ms {100 * seconds / p.seconds:5.1f} %"
            for name, seconds in rows
        ]
        return ["", title, *shares]

    sent = [
        f"  {kind:<22} {times:6.0f} {mb(size)}   {members} devices"
        for (kind, members), (times, size) in exchanged(p).items()
    ]
    loops = [f"loops of unknown length, whose kernels count once: {p.unknown_loops}"]
    preparation = [f"  preparation  {mb(plan.preparation)}   what methods hold to prepare batches"]
    longest = p.longest(LONGEST)
    return "\n".join(
        [
            (
                f"{m.encoder} + {m.decoder}; batch {n} of {height}x{width},"
                f" {m.dtype}, remat={m.remat}, freeze={m.freeze}"
            ),
            (
                f"compiled for {plan.devices} {card.name}, mesh data={config.mesh.data}"
                f" fsdp={config.mesh.fsdp}, in {plan.seconds:.0f} s; all times are predicted"
            ),
            "",
            "bytes a device",
            f"  parameters   {mb(plan.parameters)}",
            f"  optimiser    {mb(plan.optimizer)}",
            f"  batch        {mb(plan.batch)}",
            *(preparation if plan.preparation else []),
            f"  temporaries  {mb(plan.temporaries)}   gradients and activations",
            (
                f"  all          {mb(plan.total)}   {'fits' if plan.fits else 'DOES NOT FIT'}:"
                f" {100 * plan.total / plan.memory:.0f} % of {plan.memory / 1e9:.1f} GB,"
                f" {USABLE:.0%} usable"
            ),
            "",
            "NCCL collectives a step  times  sent a device   among",
            *(sent or ["  none"]),
            "",
            (
                f"predicted step: {1e3 * p.seconds:.1f} ms;"
                f" {p.total(lambda kernel: 1.0):,.0f} kernels,"
                f" {p.total(lambda kernel: kernel.bytes) / 1e9:,.0f} GB moved,"
                f" {p.total(lambda kernel: kernel.flops) / 1e12:.1f} TFLOP of products;"
                f" {n / p.seconds:,.1f} images/s"
            ),
            *(loops if p.unknown_loops else []),
            *table("predicted by part", p.by(lambda kernel: kernel.part)),
            *table("predicted by kind", p.by(lambda kernel: kernel.kind)),
            "",
            "predicted longest kernels, all their runs together",
            *(
                f"  {1e3 * kernel.seconds:9.2f} ms  x{kernel.times:<5} {kernel.kind:<19}"
                f" {kernel.part:<17} {kernel.source or '?':<52} {kernel.name}"
                for kernel in longest
            ),
        ]
    )
