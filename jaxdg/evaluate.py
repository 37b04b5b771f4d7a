"""Zero-shot evaluation of a checkpoint on domains it never saw.

python -m jaxdg.evaluate --checkpoint runs/streets --domains night,fog
"""

from collections.abc import Callable, Mapping, Sequence
import dataclasses
import itertools
import json
import os
from pathlib import Path
from typing import Any

from absl import flags
import cv2
import numpy as np
from rich.console import Console
from rich.table import Table

from jaxdg import cli, distributed, runtime
from jaxdg import config as config_lib
from jaxdg.config import PROTOCOLS, Config
from jaxdg.data.datasets import Dataset, Subset
from jaxdg.task import DomainResult, Task
from jaxdg.tasks import locate, make_task, restore_model
from jaxdg.training import sharding

EXAMPLE_SIDE = 512  # pixels on the longer side of examples beside results.json


def open_domains(task: Task) -> dict[str, Dataset]:
    """The images that every domain in `evaluation.domains` is judged on, checked."""
    e = task.config.evaluation
    domains = {name: task.open(name, train=False) for name in e.domains}
    return {name: Subset(dataset, e.max_images) for name, dataset in domains.items()} if e.max_images else domains


def evaluate_domains(
    evaluator: Callable[..., DomainResult], state: Any, datasets: Mapping[str, Dataset], config: Config, tick: Callable[[str, int], None]
) -> dict[str, DomainResult]:
    """Judges a model on each domain, and in the same pass on its parts; `tick(domain, batch)` is called after every batch and may raise."""
    results, sources = {}, config.data.source.split("+")
    for name, dataset in datasets.items():
        if name in results:  # as a part
            continue
        done = itertools.count(1)
        whole = evaluator(state, dataset, lambda name=name, done=done: tick(name, next(done)))
        for key, result in {name: whole, **whole.parts}.items():
            seen = any(domain in sources for domain in (name, key))
            result.metrics |= {"seen": seen, "part_of": None if key == name else name}
            results[key] = result
    return results


def summary(task: Task, config: Config, step: int, results: Mapping[str, DomainResult]) -> dict[str, Any]:
    """The contents of results.json: every domain, the mean of those never seen, and rPD (that mean in percent of the seen one's)."""
    whole = {name: r for name, r in results.items() if r.metrics["part_of"] is None}
    unseen = [r.score for r in whole.values() if not r.metrics["seen"]]
    seen = [r.score for r in whole.values() if r.metrics["seen"]]
    mean_unseen = float(np.mean(unseen)) if unseen else None
    return {
        "task": config.task,
        "source": config.data.source,
        "protocol": config.evaluation.protocol,
        "max_images": config.evaluation.max_images or None,
        "step": step,
        "domains": {name: r.metrics for name, r in results.items()},
        "mean_unseen": mean_unseen,
        "rPD": 100 * mean_unseen / float(np.mean(seen)) if mean_unseen is not None and seen and np.mean(seen) > 0 else None,
    }


def write_results(everything: dict[str, Any], results: Mapping[str, DomainResult], folder: Path) -> None:
    """Writes results.json, whole or not at all, and before it what belongs beside it."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, result in results.items():
        result.write(folder, name)
        for i, example in enumerate(result.examples):
            path = folder / "qualitative" / f"{name.replace('/', '_')}_{i}.npz"
            path.parent.mkdir(exist_ok=True)
            np.savez_compressed(path, **shrunk(example, EXAMPLE_SIDE))  # pyright: ignore[reportArgumentType]
    partial = folder / "results.partial"
    partial.write_text(json.dumps(everything, indent=2) + "\n")
    os.replace(partial, folder / "results.json")


def shrunk(example: Mapping[str, np.ndarray], side: int) -> dict[str, np.ndarray]:
    """An example (see `DomainResult`) whose image has at most `side` pixels on its longer side."""
    h, w = example["image"].shape[:2]
    scale = min(1.0, side / max(h, w))
    size = round(w * scale), round(h * scale)
    resized = lambda array, method: cv2.resize(array, size, interpolation=method) if scale < 1 else array
    small = {"image": resized(example["image"], cv2.INTER_AREA)}
    for key in example.keys() & {"truth", "prediction"}:
        small[key] = resized(example[key], cv2.INTER_NEAREST)
    for key in example.keys() & {"truth_boxes", "boxes"}:
        small[key] = (example[key] * scale).astype(np.float32)
    return {**example, **small}


def print_results(results: dict[str, Any], console: Console) -> None:
    """A table of every class on every domain, then the means."""
    domains, score = results["domains"], "mAP50" if results["task"] == "detection" else "mIoU"
    of_class = score.removeprefix("m")
    table = Table(
        title=f"{of_class} in % at step {results['step']}, trained on {results['source']}, protocol {results['protocol']}",
        title_justify="left",
    )
    table.add_column("class", no_wrap=True)
    for name, entry in domains.items():
        table.add_column(name + (" (source)" if entry["seen"] else ""), justify="right", overflow="fold")
    cell = lambda value: "-" if value is None else f"{value:.1f}"
    for label in next(iter(domains.values()))[of_class]:
        table.add_row(label, *(cell(entry[of_class][label]) for entry in domains.values()))
    table.add_section()
    table.add_row(score, *(cell(entry[score]) for entry in domains.values()), style="bold")
    for subset in next(iter(domains.values())).get("subsets", ()):
        table.add_row(f"mIoU of {subset}", *(cell(entry["subsets"].get(subset)) for entry in domains.values()))
    console.print(table)
    if results["mean_unseen"] is not None:
        rpd = "" if results["rPD"] is None else f"   rPD {results['rPD']:.1f} %"
        console.print(f"mean of unseen domains {results['mean_unseen']:.1f}{rpd}   protocol {results['protocol']}")
    if results.get("max_images"):
        console.print(f"judged on at most {results['max_images']} images of each domain")


def save_pictures(results: Mapping[str, DomainResult], folder: Path) -> None:
    """Writes the panels of every domain as `pictures/DOMAIN_I.jpg`."""
    from PIL import Image

    for name, result in results.items():
        for i, picture in enumerate(result.pictures):
            path = folder / "pictures" / f"{name.replace('/', '_')}_{i}.jpg"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(picture).save(path, quality=92)


@distributed.joined()
def main(arguments: Sequence[str]) -> None:
    """Evaluates the checkpoint that the flags name."""
    if len(arguments) > 1:
        raise ValueError(f"unexpected argument {arguments[1]!r}; see --help")
    runtime.set_up()
    workdir, step = locate(_CHECKPOINT.value)
    config = config_lib.load(workdir)
    e, d = config.evaluation, config.data
    config.evaluation = dataclasses.replace(
        e,
        domains=tuple(_DOMAINS.value or e.domains),
        protocol=_PROTOCOL.value or e.protocol,
        batch_size=_BATCH_SIZE.value or e.batch_size,
        max_images=e.max_images if _MAX_IMAGES.value is None else _MAX_IMAGES.value,
    )
    # The data root of this machine, not the one the run was trained on.
    root = _DATA_ROOT.value or os.environ.get("JAXDG_DATA") or d.root
    config.data = dataclasses.replace(d, root=root, workers=d.workers if _WORKERS.value is None else _WORKERS.value)
    config.mesh = config_lib.MeshConfig()
    config = config_lib.validated(config)
    task, mesh, console = make_task(config), sharding.make_mesh(config.mesh), cli.console(quiet=not distributed.is_main())
    datasets = open_domains(task)
    plan, state, at = restore_model(workdir, step, config, task, mesh)

    def tick(name: str, batch: int) -> None:
        distributed.progress()
        if console.is_terminal:
            console.print(f"{name}: {batch} batches of {len(datasets[name])} images", end="\r")

    results = evaluate_domains(task.evaluator(plan.graph, mesh), state, datasets, config, tick)
    out = Path(_OUT.value) if _OUT.value else workdir / f"evaluation_{at}"
    everything = summary(task, config, at, results)
    if distributed.is_main():
        write_results(everything, results, out)
        save_pictures(results, out)
    print_results(everything, console)
    console.print(f"written to {out}/results.json and {out}/pictures")


if __name__ == "__main__":
    _CHECKPOINT = flags.DEFINE_string("checkpoint", None, "A workdir, or one step in it such as DIR/checkpoints/500.", required=True)
    _DOMAINS = flags.DEFINE_list("domains", None, "Domains to evaluate, by comma; those of the run's configuration if left out.")
    _PROTOCOL = flags.DEFINE_enum(
        "protocol", None, sum(PROTOCOLS.values(), ()), "How the task is judged, see evaluation.protocol; the run's own if left out."
    )
    _DATA_ROOT = flags.DEFINE_string("data_root", None, "Folder of the datasets; $JAXDG_DATA, else the run's, if left out.")
    _BATCH_SIZE = flags.DEFINE_integer("batch_size", None, "Images a step, over all devices.", lower_bound=1)
    _MAX_IMAGES = flags.DEFINE_integer("max_images", None, "Images of each domain, evenly spread; 0 for all.", lower_bound=0)
    _WORKERS = flags.DEFINE_integer("workers", None, "Processes that read images.", lower_bound=0)
    _OUT = flags.DEFINE_string("out", None, "Folder for results.json and pictures; WORKDIR/evaluation_STEP if left out.")
    distributed.define_flags()
    cli.run(main)
