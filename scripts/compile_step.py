"""How long the training step of a configuration takes to compile, what memory it needs, and how long it runs; no data, no weights.

    python scripts/compile_step.py configs/gta5_eva02.py --batch_size 1 --steps 1

Prints one JSON line. Images are noise and labels are blocks of the classes, drawn from a seed.
"""

import argparse
import dataclasses
import json
import resource
import time

import jax
import numpy as np

from jaxdg import config as config_lib
from jaxdg import tasks, train
from jaxdg.training import sharding
from jaxdg.training.step import make_step


def main() -> None:
    """Compiles, then runs the steps asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", help="file below configs/")
    parser.add_argument("--batch_size", type=int, help="that of the file if not given")
    parser.add_argument("--steps", type=int, default=0, help="steps to run after compiling")
    args = parser.parse_args()
    config = config_lib.from_file(args.config)
    config = dataclasses.replace(config, batch_size=args.batch_size or config.batch_size)
    config.model.weights = config.model.start = None

    task, mesh = tasks.make_task(config), sharding.make_mesh(config.mesh)
    plan = tasks.Plan.of(task, config.model.freeze)
    like, optimizer = tasks.abstract_state(plan, config, mesh)
    places = jax.tree.map(lambda leaf: leaf.sharding, like)
    step = make_step(plan.graph, optimizer, task.normalizer, task.losses, jax.random.key(0), places, config.optimizer.accumulate)
    rng, (h, w) = np.random.default_rng(0), config.data.crop
    fields: dict[str, np.ndarray] = {"image": rng.integers(0, 256, (config.batch_size, h, w, 3)).astype(np.uint8)}
    if config.task == "detection":
        n = (config.batch_size, config.data.max_boxes)
        corners, sides = rng.uniform(0, 0.7, (*n, 2)), rng.uniform(0.05, 0.3, (*n, 2))
        fields["boxes"] = (np.concatenate([corners, corners + sides], axis=-1) * [w, h, w, h]).astype(np.float32)
        fields["classes"] = rng.integers(0, len(task.labels.names), n).astype(np.int32)
        fields["valid"] = np.broadcast_to(np.arange(n[1]) < 10, n)
        fields |= {key: np.zeros(n, bool) for key in ("difficult", "crowd")}
    else:
        blocks = rng.integers(0, len(task.labels.names), (config.batch_size, 8, 8)).astype(np.uint8)
        fields["label"] = blocks[:, np.arange(h) * 8 // h][:, :, np.arange(w) * 8 // w]
    batch = sharding.to_devices(fields, mesh)
    start = time.perf_counter()
    lowered = step.lower(like, batch)
    traced = time.perf_counter()
    compiled = lowered.compile()
    done = time.perf_counter()
    memory = compiled.memory_analysis()
    found = {
        "config": args.config,
        "device": jax.devices()[0].device_kind,
        "batch_size": config.batch_size,
        "trace_s": round(traced - start, 1),
        "compile_s": round(done - traced, 1),
        "state_and_batch_MB": memory.argument_size_in_bytes // 2**20,
        "temporary_MB": memory.temp_size_in_bytes // 2**20,
    }
    if args.steps:
        state, seconds = train.initial_state(task, plan, like, optimizer), []
        for _ in range(args.steps):
            start = time.perf_counter()
            state, metrics = compiled(state, batch)
            jax.block_until_ready(metrics)
            seconds.append(time.perf_counter() - start)
        found |= {"step_s": round(float(np.median(seconds)), 3), "loss": float(metrics["loss"])}
        found["process_peak_MB"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 2**10
    print(json.dumps(found))


if __name__ == "__main__":
    main()
