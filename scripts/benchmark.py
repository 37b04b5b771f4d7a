r"""Measures time and memory of training, inference, reading and compiling, as JSON lines.

    python scripts/benchmark.py train_step --config configs/camvid_vit_tiny.py --peer torch
    python scripts/benchmark.py train_step --config configs/gta5_eva02.py --dtype bfloat16 \
        --part encoder
    python scripts/benchmark.py inference  --config configs/gta5_eva02.py --image 512 1024 \
        --stride 256 256 --batch_size 8
    python scripts/benchmark.py breakdown  --config configs/gta5_eva02.py --dtype bfloat16
    python scripts/benchmark.py scaling    --config configs/camvid_vit_tiny.py --plot scaling.svg
    python scripts/benchmark.py memory     --config configs/gta5_eva02.py --crop 1024 1024 \
        --batch_size 8 --remat --run 3
    python scripts/benchmark.py compile    --config configs/gta5_eva02.py --batch_size 1
    python scripts/benchmark.py input      --config configs/gta5_eva02.py --workers 4
    python scripts/benchmark.py precision  --config configs/gta5_eva02.py --batch_size 4 --run 300
    python scripts/benchmark.py command    --config configs/streets_tiny.py --run 100

- train_step: an optimiser step, or forward and backward of the encoder. --with_input also measures
  it with batches from files; --peer torch also measures PyTorch.
- inference: label maps of images by sliding windows, as evaluation makes them, or the encoder's
  features of the windows.
- breakdown: each part of the training step, forward and backward.
- scaling: the training step against batch size, image area and number of classes.
- memory: what the compiler plans for the training step; with --run, what that many steps take.
- compile: compiles twice, each time in a new process: with an empty compilation cache, then with
  the cache that the first one filled.
- input: batches from PNG files of --image's size (default: GTA5's), which it writes to a temporary
  folder.
- precision: losses of --run steps in float32, in float32 with another seed for points and drop
  path, and in bfloat16.
- command: `python -m jaxdg.train` until step --run: seconds to the first step, and resident memory.

Only `input`, `command` and --with_input read files. Elsewhere an image is noise over blocks of one
colour a class, drawn from a seed. Times are wall time without compilation; a round ends when the
device has finished, and our rounds alternate with the peer's. FLOPs are those of the model's matrix
products and convolutions (jaxdg/commands/flops.py), without rematerialisation; MFU compares them
with the dense bfloat16 peak. Peak memory is the device's, on CPU the process'.
"""

import argparse
import collections
from collections.abc import Callable, Iterable, Iterator
import contextlib
import dataclasses
import itertools
import json
import math
import os
from pathlib import Path
import resource
import shlex
import subprocess
import sys
import tempfile
import time
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import flax
from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxdg import config as config_lib
from jaxdg.backbones import Eva02Config, VitConfig
from jaxdg.commands import process as runtime
from jaxdg.commands.flops import count, peak_tflops
from jaxdg.config import Config
from jaxdg.evaluation import protocols
from jaxdg.segmentation import window_starts
from jaxdg.segmentation.mask2former import matching
from jaxdg.tasks.segmentation import Segmentation
from jaxdg.training import sharding
from jaxdg.training.step import make_step
from scripts.workloads import (
    Run,
    Setup,
    backward,
    encoder_alone,
    encoder_flops,
    made_files,
    random_like,
    repeated,
    train_flops,
    train_run,
)

Record = dict[str, Any]
ROOT = Path(__file__).resolve().parent.parent
ROUND = 0.5  # seconds that a round takes at least, if one run is shorter
GTA5 = (1052, 1914)


def parameters(tree: Any) -> int:
    """Numbers in a tree of arrays, or of their shapes."""
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(tree))


def measure(run: Run, peer: "Peer | None", rounds: int) -> Record:
    """Milliseconds of one run: median and least over the rounds, ours and the peer's by turns."""

    def timed(n):
        return _seconds(run, n)

    timed(1)
    n = min(max(round(ROUND / timed(1)), 1), 20)
    ours = []
    theirs = []
    if peer is not None:
        peer(1)
    for _ in range(rounds):
        ours.append(timed(n) / n * 1e3)
        if peer is not None:
            theirs.append(peer(n) / n * 1e3)
    found: Record = {
        "ms": _digits(np.median(ours)),
        "ms_min": _digits(min(ours)),
        "rounds": rounds,
        "runs_a_round": n,
    }
    if peer is not None:
        ratio = np.median(ours) / np.median(theirs)
        found["peer"] = {
            **peer.about,
            "ms": _digits(np.median(theirs)),
            "ms_min": _digits(min(theirs)),
            "peak_bytes": peer.peak_bytes,
        }
        found["ours_to_peer"] = _digits(ratio)
    return found


def _seconds(run: Run, n: int) -> float:
    start = time.perf_counter()
    run(n)
    return time.perf_counter() - start


def _pair(sides: Iterable[int]) -> tuple[int, int]:
    height, width = sides
    return height, width


def _digits(x: Any) -> float:
    return float(f"{float(x):.4g}")


def peer_spec(
    args: argparse.Namespace, setup: Setup, starts: list[tuple[int, int]], image: tuple[int, int]
) -> Record:
    """What scripts/torch_peer.py is told: what to run, and sizes; ValueError where it has no such
    model.
    """
    config = setup.config
    encoder = setup.merged(setup.plan.abstract).backbone.config
    if type(encoder) not in (VitConfig, Eva02Config) or (
        args.part == "whole" and config.model.decoder != "mask2former"
    ):
        raise ValueError(
            f"no peer of {config.model.encoder} and {config.model.decoder}; it has ViT and EVA-02,"
            " and mask2former"
        )
    spec = {
        "mode": args.mode,
        "part": args.part,
        "compile": jax.default_backend() == "gpu" or args.compile_peer,
    }
    spec |= {
        name: getattr(encoder, name)
        for name in ("width", "heads", "patch_size", "taps", "drop_path")
    } | {"depth": encoder.used}
    spec |= {
        "family": type(encoder).__name__,
        **{name: getattr(encoder, name, None) for name in ("subln", "inner_attn_ln")},
    }
    spec |= {
        "crop": config.data.crop,
        "image": image,
        "starts": starts,
        "windows_per_call": config.evaluation.windows_per_call,
    }
    spec |= {
        "batch_size": config.batch_size,
        "dtype": config.model.dtype,
        "pyramid": config.model.pyramid,
        "clip": config.optimizer.clip,
    }
    return spec | {
        "mask2former": dataclasses.asdict(config.model.mask2former),
        "classes": len(setup.task.labels.names),
    }


class Peer:
    """The same in PyTorch, in a process of its own; see scripts/torch_peer.py."""

    def __init__(self, spec: Record):
        """Starts it and waits until its model is built."""
        command = [sys.executable, str(ROOT / "scripts" / "torch_peer.py"), json.dumps(spec)]
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        self.about = self._answer()
        self.peak_bytes = 0

    def __call__(self, n: int) -> float:
        """Seconds of n runs."""
        assert self._process.stdin is not None
        print(n, file=self._process.stdin, flush=True)
        answer = self._answer()
        self.peak_bytes = answer["peak_bytes"]
        return answer["seconds"]

    def _answer(self) -> Record:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if line.startswith("{"):
                return json.loads(line)
        raise ValueError(
            f"the PyTorch peer ended with code {self._process.wait()}; its message stands above"
        )


# --- Modes ----------------------------------------------------------------------------------------


def train_step(args: argparse.Namespace) -> Iterator[Record]:
    """See the top of the file."""
    setup = Setup(configured(args))
    peer = Peer(peer_spec(args, setup, [(0, 0)], setup.config.data.crop)) if args.peer else None
    if args.part == "encoder":
        encode, held = encoder_alone(setup, train=True)
        images = jax.ShapeDtypeStruct(
            (setup.config.batch_size, *setup.config.data.crop, 3), jnp.float32
        )
        held, images = random_like((held, images))
        needed = encoder_flops(setup, train=True)
        run = repeated(*backward(encode, images, held))
    else:
        held = setup.plan.abstract[:2]
        needed = train_flops(setup)
        run = train_run(setup)
    found = {"parameters": parameters(held), **measure(run, peer, args.rounds)}
    yield {**found, **rates(setup, needed, found["ms"]), **peak_memory()}
    if args.with_input:
        del run
        with made_files(setup.config, args.image or GTA5) as (batches, source):
            found = measure(train_run(setup, batches), None, args.rounds)
            yield {"input": source, **found, **rates(setup, needed, found["ms"]), **peak_memory()}


def inference(args: argparse.Namespace) -> Iterator[Record]:
    """See the top of the file."""
    setup = Setup(configured(args))
    config = setup.config
    n = config.batch_size
    crop = config.data.crop
    if not isinstance(setup.task, Segmentation):
        raise ValueError(
            f"{args.config} is of task {config.task}; inference is measured of segmentation"
        )
    image = _pair(args.image or crop)
    stride = _pair(args.stride or config.evaluation.stride)
    starts = [
        (y, x)
        for y in window_starts(image[0], crop[0], stride[0])
        for x in window_starts(image[1], crop[1], stride[1])
    ]
    peer = Peer(peer_spec(args, setup, starts, image)) if args.peer else None
    if args.part == "encoder":
        encode, held = encoder_alone(setup, train=False)
        images = jax.ShapeDtypeStruct((n * len(starts), *crop, 3), jnp.float32)
        held, images = random_like((held, images))
        run = repeated(encode, held, images)
        needed = encoder_flops(setup, False, n * len(starts))
    else:
        protocol = protocols.Protocol("native", crop, stride)
        label_maps = setup.task.labelling(setup.plan.graph)
        sizes = np.full((n, 2), image, np.int32)
        pixels = np.random.default_rng(0).integers(0, 256, (n, *image, 3)).astype(np.uint8)
        fields = {
            "image": pixels,
            "size": sizes,
            "label": np.zeros((n, *image), np.uint8),
            "label_size": sizes,
        }
        batch = sharding.to_devices(fields, setup.mesh)
        state = setup.model_state()
        held = state[:2]

        def run(n: int, /) -> None:
            for _ in range(n):
                result = label_maps(state, batch, protocol)
            jax.block_until_ready(result)

        shape = jax.ShapeDtypeStruct((n * len(starts), *crop, 3), jnp.float32)
        needed = count(
            lambda state, images: setup.merged(state).scores(images), setup.plan.abstract, shape
        )
    found = {
        "image": image,
        "windows": len(starts),
        "parameters": parameters(held),
        **measure(run, peer, args.rounds),
    }
    yield {**found, **rates(setup, needed, found["ms"]), **peak_memory()}


def breakdown(args: argparse.Namespace) -> Iterator[Record]:
    """See the top of the file."""
    setup = Setup(configured(args))
    config = setup.config
    task = setup.task
    batch = sharding.to_devices(setup.batch(), setup.mesh)
    key = jax.random.key(3)
    state = setup.model_state()
    model = setup.merged(state)
    parts: dict[str, Run] = {}

    def add(
        name: str,
        module: nnx.Module,
        fn: Callable[..., Any],
        inputs: tuple[Any, ...],
        fixed: tuple[Any, ...] = (),
    ) -> Any:
        """Times `fn(module, *inputs, *fixed)` and its backward pass to parameters and inputs;
        returns what it computes.
        """
        graph, held, rest = nnx.split(module, nnx.Param, ...)

        def call(held, inputs, fixed):
            return fn(nnx.merge(graph, held, rest, copy=True), *inputs, *fixed)

        parts[f"{name}, forward"] = repeated(call, held, inputs, fixed)
        parts[f"{name}, both"] = repeated(*backward(call, fixed, held, inputs))
        return jax.jit(call)(held, inputs, fixed)

    def prepare(image):
        return task.normalize(task.distort(image, key))  # pyright: ignore[reportAttributeAccessIssue]

    parts["distortion and normalisation"] = repeated(prepare, batch["image"])
    features = add(
        "encoder",
        model.backbone,
        lambda encoder, images: encoder(images, key),
        (),
        (jax.jit(prepare)(batch["image"]),),
    )
    if getattr(model, "pyramid", None) is not None:
        features = add("pyramid", model.pyramid, lambda pyramid, x: pyramid(x, True), (features,))
    if config.model.decoder == "mask2former":
        head = model.head
        k = len(task.labels.names)
        pixels = add(
            "pixel decoder", head.pixel_decoder, lambda decoder, x: decoder(x), (features,)
        )
        output = add("transformer decoder", head, lambda head, x: head.decode(*x), (pixels,))
        costs = jax.random.normal(
            key, (output[0].shape[0], config.batch_size, k, config.model.mask2former.queries)
        )
        parts["assignment, of random costs"] = repeated(
            matching.assign, costs, jnp.ones(costs.shape[:3], bool)
        )
    elif config.task == "segmentation":
        output = add("decoder", model.head, lambda head, x: head(x), (features,))
    if config.task == "segmentation":
        loss_denominator = jax.jit(model.head.loss_denominator)(batch["label"])

        def loss(head, output, label, loss_denominator):
            return sum(head.loss(output, label, loss_denominator, key).values())

        add("losses with matching", model.head, loss, (output,), (batch["label"], loss_denominator))
    gradient = jax.tree.map(jnp.ones_like, state[0])

    def update(moments, gradient, trained):
        return setup.optimizer.update(gradient, moments, trained)

    def apply(moments, gradient, trained):
        return optax.apply_updates(trained, update(moments, gradient, trained)[0])

    parts["optimiser"] = repeated(apply, setup.optimizer.init(state[0]), gradient, state[0])
    found = {name: measure(run, None, args.rounds)["ms"] for name, run in parts.items()}
    parts.clear()
    whole = measure(train_run(setup), None, args.rounds)["ms"]
    counted = sum(
        ms
        for name, ms in found.items()
        if not name.endswith(", forward") and not name.startswith("assignment")
    )
    yield {
        "ms": whole,
        "parts_ms": found,
        "rest_ms": _digits(whole - counted),
        **rates(setup, train_flops(setup), whole),
        **peak_memory(),
    }


def scaling(args: argparse.Namespace) -> Iterator[Record]:
    """See the top of the file."""
    config = configured(args)
    series = {}
    h, w = config.data.crop
    most = max(args.batches)

    def whole(side, share):
        return max(round(side * share / 32), 1) * 32  # pixels of the coarsest level

    sides = [(whole(h, share), whole(w, share)) for share in (0.5, 0.71, 0.87, 1.0)]
    classes = [len(Setup(config_lib.validated(config)).task.labels.names) * f for f in (1, 2, 3, 4)]
    config.model.mask2former.queries = max(config.model.mask2former.queries, classes[-1])
    points = [("batch", b, config.data.crop, None) for b in sorted(args.batches)]
    points += [("pixels of a crop", most, crop, None) for crop in dict.fromkeys(sides)]
    points += [("classes", most, config.data.crop, k) for k in classes]
    for name, batch_size, crop, k in points:
        changed = config_lib.validated(config)
        changed.batch_size = batch_size
        changed.data.crop = crop
        setup = Setup(changed, k)
        x = {"batch": batch_size, "pixels of a crop": crop[0] * crop[1], "classes": k}[name]
        found = measure(train_run(setup), None, args.rounds)
        series.setdefault(name, []).append((x, found["ms"]))
        yield {
            "against": name,
            "x": x,
            "shapes": {"batch_size": batch_size, "crop": crop},
            "classes": k,
            **found,
        }
    for name, found in series.items():
        x, ms = np.array(found, float).T
        slope, at_zero = np.polyfit(x, ms, 1)
        spread = np.abs(at_zero + slope * x - ms).max() / ms.max()
        yield {
            "against": name,
            "ms_at_0": _digits(at_zero),
            "ms_a_unit": _digits(slope),
            "furthest_from_the_line": _digits(spread),
        }
    if args.plot:
        Path(args.plot).write_text(plot(series))


def plot(series: dict[str, list[tuple[float, float]]]) -> str:
    """An SVG of one panel a series: points and the line that fits them best, both axes from 0."""
    side = 240
    gap = 70
    panels = []
    for i, (name, points) in enumerate(series.items()):
        x, ms = np.array(points, float).T
        slope, at_zero = np.polyfit(x, ms, 1)
        right = 1.1 * x.max()
        top = 1.15 * ms.max()

        def place(a, b, i=i, right=right, top=top):
            return (gap + i * (side + gap) + side * a / right, 40 + side * (1 - b / top))

        x0, y0 = place(0, 0)
        x1, y1 = place(right, top)
        ax, ay = place(0, at_zero)
        bx, by = place(right, min(at_zero + slope * right, top))
        dots = "".join(
            f'<circle cx="{cx:.1f}" cy="{cy:.1f}" r="4" fill="#1f5fa8"/>'
            for cx, cy in map(place, x, ms)
        )
        below = "".join(
            f'<text x="{place(v, 0)[0]:.1f}" y="{y0 + 16:.1f}" text-anchor="middle">{v:,.0f}</text>'
            for v in (0, x.max())
        )
        left = "".join(
            f'<text x="{x0 - 6:.1f}" y="{place(0, v)[1] + 4:.1f}" text-anchor="end">{v:,.0f}</text>'
            for v in (0, ms.max())
        )
        panels.append(
            f'<path d="M{x0:.1f} {y1:.1f}V{y0:.1f}H{x1:.1f}" fill="none"'
            f' stroke="#444"/>{below}{left}<path d="M{ax:.1f} {ay:.1f}L{bx:.1f} {by:.1f}"'
            f' stroke="#999" stroke-dasharray="5 4"/>{dots}<text x="{(x0 + x1) / 2:.1f}"'
            f' y="{y0 + 34:.1f}" text-anchor="middle">{name}</text>'
        )
    width = gap + len(series) * (side + gap)
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{side + 90}"'
        ' font-family="sans-serif" font-size="12">'
    )
    return (
        f'{head}<rect width="100%" height="100%" fill="#fff"/><text x="14" y="22">ms of a training'
        f" step</text>{''.join(panels)}</svg>\n"
    )


def memory(args: argparse.Namespace) -> Iterator[Record]:
    """See the top of the file."""
    setup = Setup(configured(args))
    batch = {
        key: jax.ShapeDtypeStruct(v.shape, v.dtype, sharding=sharding.batch_sharding(setup.mesh))
        for key, v in setup.batch().items()
    }
    start = time.perf_counter()
    lowered = setup.step.lower(setup.like, batch)  # pyright: ignore[reportFunctionMemberAccess]
    traced = time.perf_counter()
    planned = lowered.compile().memory_analysis()
    seconds = {
        "trace_s": _digits(traced - start),
        "compile_s": _digits(time.perf_counter() - traced),
    }
    sizes = {
        "state_and_batch_bytes": planned.argument_size_in_bytes,
        "temporary_bytes": planned.temp_size_in_bytes,
    }
    found = {**seconds, **sizes}
    if args.run:
        run = train_run(setup)
        found["ms"] = _digits(_seconds(run, args.run) / args.run * 1e3)
    yield {**found, **peak_memory()}


def compile(args: argparse.Namespace) -> Iterator[Record]:
    """See the top of the file."""
    with tempfile.TemporaryDirectory() as folder:
        environment = os.environ | {
            "JAX_COMPILATION_CACHE_DIR": folder,
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        }
        once = ["memory" if argument == "compile" else argument for argument in sys.argv[1:]]
        command = [sys.executable, __file__, *once, "--out", os.devnull]
        for cache in ("cold", "warm"):
            start = time.perf_counter()
            done = subprocess.run(command, env=environment, capture_output=True, text=True)
            if done.returncode:
                raise ValueError(f"{shlex.join(command)} failed: {done.stderr.strip()}")
            found = json.loads(done.stdout.splitlines()[-1])
            seconds = {key: found[key] for key in ("trace_s", "compile_s")}
            yield {"cache": cache, **seconds, "process_s": _digits(time.perf_counter() - start)}


def read_input(args: argparse.Namespace) -> Iterator[Record]:
    """See the top of the file."""
    config = configured(args)
    with made_files(config, args.image or GTA5) as (batches, source):
        found = measure(
            lambda n: collections.deque(itertools.islice(batches, n), maxlen=0).clear(),
            None,
            args.rounds,
        )
    yield {
        "input": source,
        "workers": config.data.workers,
        **found,
        "images_per_s": _digits(config.batch_size / found["ms"] * 1e3),
    }


def precision(args: argparse.Namespace) -> Iterator[Record]:
    """See the top of the file."""
    steps = args.run or 300
    curves = {}
    for name, seed in (("float32", 0), ("float32, other draws", 1), ("bfloat16", 0)):
        config = configured(args)
        config.model.dtype = "bfloat16" if name == "bfloat16" else "float32"
        setup = Setup(config)
        places = jax.tree.map(lambda leaf: leaf.sharding, setup.like)
        of_task = (setup.task.loss_denominator, setup.task.losses)
        step = make_step(setup.plan.graph, setup.optimizer, *of_task, jax.random.key(seed), places)
        state = setup.state()
        losses = []
        batches = [sharding.to_devices(setup.batch(i), setup.mesh) for i in range(16)]
        for i in range(steps):
            state, metrics = step(state, batches[i % len(batches)])
            losses.append(metrics["loss"])
        curves[name] = np.array(jax.device_get(losses), np.float64)
        del state, batches
    sixths = {
        name: [_digits(part.mean()) for part in np.array_split(curve, 6)]
        for name, curve in curves.items()
    }
    last = {name: curve[-steps // 6 :].mean() for name, curve in curves.items()}

    def apart(name):
        return _digits(last[name] / last["float32"] - 1)

    compared = {
        "bfloat16_to_float32": apart("bfloat16"),
        "float32_to_float32": apart("float32, other draws"),
    }
    yield {"steps": steps, "mean_loss_of_each_sixth": sixths, "last_sixth_relative": compared}


def command(args: argparse.Namespace) -> Iterator[Record]:
    """See the top of the file."""
    last = args.run or 20
    first = None
    resident = []
    with tempfile.TemporaryDirectory() as folder:
        steps = max(configured(args).steps, last)
        overrides = [
            f"--config.steps={steps}",
            f"--config.checkpoint_every={steps}",
            "--config.eval_every=0",
            "--config.log_every=1",
            *(f"--config.{override}" for override in args.override),
        ]
        run = [
            sys.executable,
            "-m",
            "jaxdg.train",
            "--config",
            args.config,
            "--workdir",
            folder,
            *overrides,
        ]
        start = time.perf_counter()
        environment = os.environ | {"PYTHONPATH": f"{ROOT}:{os.environ.get('PYTHONPATH', '')}"}
        process = subprocess.Popen(run, stdout=subprocess.DEVNULL, env=environment)
        step = 0
        while process.poll() is None and step < last:
            time.sleep(0.1)
            with contextlib.suppress(FileNotFoundError, IndexError, json.JSONDecodeError):
                step = json.loads((Path(folder) / "metrics.jsonl").read_text().splitlines()[-1])[
                    "step"
                ]
                first = first or time.perf_counter() - start
                if step * 10 // last >= len(resident):
                    pages = int(Path(f"/proc/{process.pid}/statm").read_text().split()[1])
                    resident.append({"step": step, "bytes": pages * resource.getpagesize()})
        process.terminate()  # it stops by itself, after a checkpoint
        if process.wait() or first is None:
            raise ValueError(
                f"{shlex.join(run)} ended with code {process.returncode}; its message stands above"
            )
    yield {
        "first_step_s": _digits(first),
        "whole_s": _digits(time.perf_counter() - start),
        "resident": resident,
    }


# --- Records --------------------------------------------------------------------------------------


def rates(setup: Setup, flops: float, ms: float) -> Record:
    """What a time means: images a second, and model FLOPs a second and device."""
    device = jax.devices()[0].device_kind
    tflops = flops / ms * 1e3 / 1e12 / setup.mesh.size
    peak = peak_tflops(device) if setup.config.model.dtype == "bfloat16" else None
    speed = {
        "images_per_s": _digits(setup.config.batch_size / ms * 1e3),
        "model_tflop": _digits(flops / 1e12),
    }
    return {
        **speed,
        "tflop_per_s": _digits(tflops),
        "mfu": None if peak is None else _digits(tflops / peak),
    }


def peak_memory() -> Record:
    """Most bytes in use so far, on the device where it counts them, else of the process."""
    stats = jax.local_devices()[0].memory_stats()
    if stats and "peak_bytes_in_use" in stats:
        return {"peak_bytes": stats["peak_bytes_in_use"], "peak_of": "device"}
    return {
        "peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        "peak_of": "process",
    }


def configured(args: argparse.Namespace) -> Config:
    """The configuration with what the command line changes."""
    config = config_lib.from_file(args.config)
    config.batch_size = args.batch_size or config.batch_size
    config.data.crop = _pair(args.crop or config.data.crop)
    config.data.workers = config.data.workers if args.workers is None else args.workers
    config.model.dtype = args.dtype or config.model.dtype
    config.model.remat = args.remat or config.model.remat
    config.model.unroll = args.unroll or config.model.unroll
    config.model.mask2former.unroll = args.unroll or config.model.mask2former.unroll
    config.evaluation.windows_per_call = args.windows_per_call or config.evaluation.windows_per_call
    config.evaluation.stride = _pair(
        min(sides) for sides in zip(config.evaluation.stride, config.data.crop, strict=True)
    )
    return config_lib.validated(config)


def about(args: argparse.Namespace) -> Record:
    """What was measured, on what, with which versions."""
    config = configured(args)
    git = ["git", "-C", str(ROOT)]
    commit = subprocess.run(
        [*git, "rev-parse", "--short", "HEAD"], capture_output=True, text=True
    ).stdout.strip()
    changed = subprocess.run(
        [*git, "status", "--porcelain", "--untracked-files=no"], capture_output=True, text=True
    ).stdout.strip()
    devices = jax.devices()
    m = config.model
    return {
        "command": shlex.join(["python", "scripts/benchmark.py", *sys.argv[1:]]),
        "date": time.strftime("%Y-%m-%d"),
        "device": (
            devices[0].device_kind
            if devices[0].platform != "cpu"
            else f"CPU, {os.cpu_count()} cores"
        ),
        "devices": len(devices),
        "versions": {module.__name__: module.__version__ for module in (jax, flax, optax, np)},
        "commit": commit + "+changes" * bool(changed) if commit else None,
        "model": f"{m.encoder}" + (f" + {m.decoder}" if args.part == "whole" else ""),
        "shapes": {"batch_size": config.batch_size, "crop": config.data.crop},
        "dtype": m.dtype,
        "remat": m.remat,
    }


MODES = {
    "train_step": train_step,
    "inference": inference,
    "input": read_input,
    "compile": compile,
    "memory": memory,
    "breakdown": breakdown,
    "scaling": scaling,
    "precision": precision,
    "command": command,
}


def parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("mode", choices=MODES)
    parser.add_argument("--config", required=True, help="file below configs/")
    parser.add_argument(
        "--batch_size", type=int, help="images a step; that of the file if not given"
    )
    parser.add_argument(
        "--crop",
        type=int,
        nargs=2,
        metavar=("H", "W"),
        help="of training and of windows; that of the file if not given",
    )
    parser.add_argument(
        "--dtype", choices=("float32", "bfloat16"), help="that of the file if not given"
    )
    parser.add_argument(
        "--remat", action="store_true", help="recompute encoder blocks in the backward pass"
    )
    parser.add_argument(
        "--unroll", action="store_true", help="compile each block by itself, for a GPU"
    )
    parser.add_argument(
        "--part", choices=("whole", "encoder"), default="whole", help="of train_step and inference"
    )
    parser.add_argument(
        "--peer",
        choices=("torch",),
        help="measure PyTorch's too, by turns; of train_step and inference",
    )
    parser.add_argument("--compile_peer", action="store_true", help="torch.compile on CPU as well")
    parser.add_argument(
        "--with_input", action="store_true", help="of train_step: once more, fed from files"
    )
    parser.add_argument(
        "--image",
        type=int,
        nargs=2,
        metavar=("H", "W"),
        help="size of whole images in inference and of files",
    )
    parser.add_argument("--stride", type=int, nargs=2, metavar=("H", "W"), help="between windows")
    parser.add_argument(
        "--windows_per_call", type=int, help="windows of inference computed at once"
    )
    parser.add_argument("--workers", type=int, help="processes that read files")
    parser.add_argument("--rounds", type=int, default=10, help="of which the median is given")
    parser.add_argument(
        "--batches",
        type=int,
        nargs="+",
        default=[1, 2, 4, 8],
        help="of scaling; the largest is that of the other series",
    )
    parser.add_argument("--plot", help="SVG file of scaling")
    parser.add_argument("--run", type=int, default=0, help="steps of memory, precision and command")
    parser.add_argument(
        "--override",
        action="append",
        default=[],
        metavar="FIELD=VALUE",
        help="of command: another value of a field of the file; can be given several times",
    )
    parser.add_argument("--out", help="file that the lines are appended to as well")
    return parser


def main() -> None:
    """Prints a line of JSON for every measurement."""
    args = parser().parse_args()
    if args.peer:  # both must fit on one card: take no more memory than needed
        os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    runtime.set_up()
    try:
        same = about(args)
        for found in MODES[args.mode](args):
            line = json.dumps({"mode": args.mode, **same, **found})
            print(line, flush=True)
            if args.out:
                with open(args.out, "a") as file:
                    file.write(line + "\n")
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
