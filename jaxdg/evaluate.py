"""Zero-shot evaluation of a checkpoint on domains it never saw.

python -m jaxdg.evaluate --checkpoint runs/streets --domains night,fog
python -m jaxdg.evaluate --checkpoint runs/gta5 --protocol rein,soma
python -m jaxdg.evaluate --checkpoint runs/gta5 --tta
"""

from collections.abc import Callable, Mapping, Sequence
import contextlib
import dataclasses
import hashlib
import io
import itertools
import json
import os
from pathlib import Path
from typing import Any

from absl import flags
import cv2
import jax
import numpy as np

from jaxdg import config as config_lib
from jaxdg import files, methods
from jaxdg.commands import command_line as cli
from jaxdg.commands import process as runtime
from jaxdg.config import Config, EvaluationConfig, locks
from jaxdg.config import workdir as workdir_lib
from jaxdg.data.augment.fractals import Pictures
from jaxdg.data.datasets import Dataset, Subset
from jaxdg.evaluation import overlap, protocols
from jaxdg.evaluation import results as results_lib
from jaxdg.evaluation.overlap import Standing, TrainedOn
from jaxdg.evaluation.printing import print_numbers, print_protocols, print_results
from jaxdg.tasks.run_state import Trained, opened
from jaxdg.tasks.task import DomainResult, Task, parts_of
from jaxdg.training import distributed, sharding
from jaxdg.training.fingerprint import fingerprint

EXAMPLE_SIDE = 512  # pixels on the longer side of examples beside results.json


def open_domains(task: Task) -> dict[str, Dataset]:
    """The images of every domain in `evaluation.domains`, checked.

    Raises:
        ValueError: a domain is named twice, or as `Task.open`.
    """
    e = task.config.evaluation
    if repeated := sorted({name for name in e.domains if e.domains.count(name) > 1}):
        raise ValueError(
            f"evaluation.domains names {', '.join(repeated)} more than once; name every domain once"
        )
    domains = {name: task.open(name, train=False) for name in e.domains}
    if not e.max_images:
        return domains
    return {name: Subset(dataset, e.max_images) for name, dataset in domains.items()}


def agree_on_images(datasets: Mapping[str, Dataset], config: Config) -> None:
    """Ends all processes of a run unless each sees the same images and converted weights.

    They may lie in another folder on each host.
    """
    if jax.process_count() == 1:
        return
    known: dict[str, Any] = {}
    above = os.path.normpath(config.data.root) + "/"
    for name, dataset in datasets.items():
        digest = hashlib.sha256()
        for i in range(len(dataset)):
            line = f"{dataset.name(i).removeprefix(above)}\0{dataset.size(i)}\n"
            digest.update(line.encode(errors="surrogateescape"))
        known[f"images of {name}"] = f"{len(dataset)} ({digest.hexdigest()[:12]})"
    for field in ("weights", "text_weights"):
        file = getattr(config.model, field)
        known[f"bytes of model.{field}"] = (
            os.path.getsize(file) if file and os.path.isfile(file) else None
        )
    distributed.agree(known, "give all hosts the same files")


def trained_on(task: Task, source: Dataset, workdir: Path, say: Callable[[str], None]) -> TrainedOn:
    """The images that a run is trained on, including its earlier starts; to be saved."""
    noted = None
    try:
        noted = TrainedOn.load(workdir) if workdir_lib.saved(workdir) else None
    except ValueError as error:
        say(f"{error}; it is written again now")
    return own_source(task, source).also(noted or started_from(task.config))


def own_source(task: Task, source: Dataset) -> TrainedOn:
    """The images that a run itself uses: its source and its pictures; none without steps."""
    c = task.config
    trained = TrainedOn.of(source, c.data.root)
    if not c.steps:
        return trained.without_images()
    if c.data.pictures and (
        c.data.pixmix[0] or any(method.wants_pictures for method in methods.active(c))
    ):
        return trained.with_pictures(Pictures.of(c.data.pictures).files, c.data.root)
    return trained


def started_from(config: Config) -> TrainedOn | None:
    """The images of the run whose model this run starts from; None without `model.start`."""
    if config.model.start is None:
        return None
    other = opened(config.model.start)
    return other.trained_on() or TrainedOn(tuple(other.config.data.source.split("+")))


def known_source(task: Task, trained: Trained, say: Callable[[str], None]) -> TrainedOn:
    """The images that a model was trained on: as it notes them, else by its data, else by name
    only.
    """
    try:
        if (noted := trained.trained_on()) is not None:
            return noted
    except ValueError as error:
        say(str(error))
    data = task.config.data
    before = None
    with contextlib.suppress(OSError, ValueError):  # the run that it started from may be gone
        before = started_from(task.config)
    try:
        return own_source(task, task.open(data.source, train=True)).also(before)
    except (OSError, ValueError) as error:
        say(
            f"whether a domain was trained on is told by its name alone: {trained} does not say,"
            f" and the images are not here ({error})"
        )
        return TrainedOn(tuple(data.source.split("+"))).also(before)


def standings(
    task: Task, datasets: Mapping[str, Dataset], trained: TrainedOn, say: Callable[[str], None]
) -> dict[str, Standing]:
    """Whether each domain is seen; says what its name does not tell, and if it gets no score."""
    for name, dataset in datasets.items():
        labelled = dataset.dataset if isinstance(dataset, Subset) else dataset
        if getattr(labelled, "unlabelled", False):
            say(f"{name} has no labels, so it gets no score")
    return overlap.standings(trained, datasets, task.config.data.root, say)


def evaluate_domains(
    evaluator: Callable[..., DomainResult],
    state: Any,
    datasets: Mapping[str, Dataset],
    standing: Mapping[str, Standing],
    tick: Callable[[str, int], None],
) -> dict[str, DomainResult]:
    """Judges a model on each domain and its parts.

    Args:
        evaluator: from `Task.evaluator`.
        state: of the model.
        datasets: the images of each domain.
        standing: whether each domain is seen.
        tick: is called as `tick(domain, batch)` after every batch; it may raise.
    """
    results: dict[str, DomainResult] = {}
    for name, dataset in datasets.items():
        if name in results:  # as a part
            continue
        batches = itertools.count(1)
        domain = evaluator(state, dataset, lambda name=name, n=batches: tick(name, next(n)))
        seen = standing[name].seen
        trained = standing[name].trained_on
        part_of = parts_of(dataset)
        for key, result in {name: domain, **domain.parts}.items():
            images = [i for i, part in enumerate(part_of) if key in (name, part)]
            result.metrics |= {
                "seen": seen,
                "trained_on": None if trained is None else int(trained[images].sum()),
                "part_of": standing[name].part_of if key == name else name,
            }
            results[key] = result
    return results


def summary(
    task: Task, config: Config, step: int, results: Mapping[str, DomainResult]
) -> dict[str, Any]:
    """The contents of results.json: every domain, the mean over unseen domains, and rPD.

    rPD is that mean in percent of the score on the seen domain, or of the mean over several of them
    (`results.reference` chooses them). A domain without truth has no score and is in no mean.
    `tta`, only with evaluation.tta, says which views were averaged. `seen_by` says whether images
    or only names decided what is seen. `classes_differ` lists the classes that some domains of
    these figures lack: {class: [domain, ..]}.
    """
    return {
        "task": config.task,
        "source": config.data.source,
        "protocol": config.evaluation.label,
        **({"tta": {"scales": protocols.SCALES, "flip": True}} if config.evaluation.tta else {}),
        "max_images": config.evaluation.max_images or None,
        "step": step,
        **results_lib.figures({name: r.metrics for name, r in results.items()}, task.score_name),
    }


def write_results(
    everything: dict[str, Any], results: Mapping[str, DomainResult], folder: Path
) -> dict[str, Any]:
    """Writes the files beside results.json, then results.json itself, completely or not at all.

    Domains of an earlier evaluation stay, if it had the same step, protocol and so on.

    Returns:
        The contents of results.json.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for name, result in results.items():
        result.write(folder, name)
        for place, examples in (("qualitative", result.examples), ("worst", result.worst)):
            for i, example in enumerate(examples):
                path = folder / place / f"{name.replace('/', '_')}_{i}.npz"
                path.parent.mkdir(exist_ok=True)
                packed = io.BytesIO()
                np.savez_compressed(packed, **shrunk(example, EXAMPLE_SIDE))  # pyright: ignore[reportArgumentType]
                files.write(path, packed.getvalue())
    old = workdir_lib.results(folder / "results.json")
    if old is not None and not results_lib.foreign(old, everything):
        everything = results_lib.merged(old, everything)
    files.write(folder / "results.json", json.dumps(everything, indent=2) + "\n")
    return everything


def own_folder(workdir: Path, step: int, run: EvaluationConfig, asked: EvaluationConfig) -> Path:
    """The folder of results if none is given; other settings than the run's get another folder."""
    name = f"evaluation_{step}"
    if asked.label != run.label:
        name += f"_{asked.label}"
    if asked.max_images != run.max_images:
        name += f"_{asked.max_images or 'all'}_images"
    return workdir / name


def shrunk(example: Mapping[str, np.ndarray], side: int) -> dict[str, np.ndarray]:
    """An example (see `DomainResult`) whose image has at most `side` pixels on its longer side."""
    h, w = example["image"].shape[:2]
    scale = min(1.0, side / max(h, w))
    size = round(w * scale), round(h * scale)

    def resized(array, method):
        return cv2.resize(array, size, interpolation=method) if scale < 1 else array

    small = {"image": resized(example["image"], cv2.INTER_AREA)}
    for key in example.keys() & {"truth", "prediction"}:
        small[key] = resized(example[key], cv2.INTER_NEAREST)
    for key in example.keys() & {"truth_boxes", "boxes"}:
        small[key] = (example[key] * scale).astype(np.float32)
    return {**example, **small}


def save_pictures(results: Mapping[str, DomainResult], folder: Path) -> None:
    """Writes the panels of every domain as `pictures/DOMAIN_I.jpg`."""
    from PIL import Image

    for name, result in results.items():
        for i, picture in enumerate(result.pictures):
            path = folder / "pictures" / f"{name.replace('/', '_')}_{i}.jpg"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(picture).save(path, quality=92)


@dataclasses.dataclass
class Case:
    """One protocol under which a model is judged.

    Attributes:
        task: with this protocol.
        datasets: the images of each domain; a protocol may have its own label map.
        out: the folder of its results.
    """

    task: Task
    datasets: dict[str, Dataset]
    out: Path

    @property
    def protocol(self) -> str:
        """Its name."""
        return self.task.config.evaluation.label


def protocols_of(config: Config, names: Sequence[str]) -> list[Config]:
    """The configuration with each of several protocols, checked.

    Raises:
        ValueError: a protocol is named twice, or the task has none of that name.
    """
    if repeated := sorted({name for name in names if names.count(name) > 1}):
        raise ValueError(
            f"--protocol names {', '.join(repeated)} more than once; name every protocol once"
        )
    return [
        config_lib.validated(
            dataclasses.replace(
                config, evaluation=dataclasses.replace(config.evaluation, protocol=name)
            )
        )
        for name in names
    ]


@distributed.joined()
def main(arguments: Sequence[str]) -> None:
    """Evaluates the checkpoint that the flags name."""
    if len(arguments) > 1:
        raise ValueError(f"unexpected argument {arguments[1]!r}; see --help")
    runtime.set_up()
    model = opened(_CHECKPOINT.value)
    home = Path(_OUT.value) if _OUT.value else model.home()
    config = model.config
    e = config.evaluation
    d = config.data
    config.evaluation = dataclasses.replace(
        e,
        domains=tuple(_DOMAINS.value or e.domains),
        batch_size=_BATCH_SIZE.value or e.batch_size,
        tta=e.tta if _TTA.value is None else _TTA.value,
        max_images=e.max_images if _MAX_IMAGES.value is None else _MAX_IMAGES.value,
        calibration=e.calibration if _CALIBRATION.value is None else _CALIBRATION.value,
        boundary=e.boundary if _BOUNDARY.value is None else _BOUNDARY.value,
    )
    # The data root of this machine, not the one the run was trained on.
    root = _DATA_ROOT.value or os.environ.get("JAXDG_DATA") or d.root
    config.data = dataclasses.replace(
        d, root=root, workers=d.workers if _WORKERS.value is None else _WORKERS.value
    )
    config.mesh = config_lib.MeshConfig()
    configs = protocols_of(config, _PROTOCOL.value or (e.protocol,))
    config = configs[0]
    given = {"--checkpoint": _CHECKPOINT.value, "--out": _OUT.value}
    given["--protocol"] = [c.evaluation.label for c in configs]
    distributed.agree(
        {**config_lib.common(config), **given}, "start all processes by the same command"
    )
    tasks = [model.task(c) for c in configs]
    mesh = sharding.make_mesh(config.mesh)
    console = cli.console(quiet=not distributed.is_main())
    datasets = [open_domains(task) for task in tasks]
    # The images are the same under all protocols.
    agree_on_images(datasets[0], config)
    trained = known_source(tasks[0], model, console.print)
    standing = standings(tasks[0], datasets[0], trained, console.print)
    plan, state, at = model.restore(tasks[0], mesh)

    def folder(asked: EvaluationConfig) -> Path:
        if _OUT.value is None:
            return own_folder(home, at, e, asked)
        return home / (asked.label if len(tasks) > 1 else "")

    cases = [
        Case(task, opened, folder(task.config.evaluation))
        for task, opened in zip(tasks, datasets, strict=True)
    ]
    # A fingerprint of the parameters keeps results of another model apart.
    parts = dict(zip(("trained", "frozen", "statistics"), state, strict=True))
    identity = {"model": f"{int(fingerprint(parts)):08x}"}
    for case in cases:
        old = workdir_lib.results(case.out / "results.json", console.print)
        new = {**summary(case.task, case.task.config, at, {}), **identity}
        if old is not None and (differ := results_lib.foreign(old, new)):
            raise ValueError(
                f"{case.out}/results.json holds other results ({'; '.join(differ)}); give another"
                " --out"
            )

    def judge(case: Case) -> dict[str, Any]:
        prefix = f"{case.protocol}, " if len(cases) > 1 else ""

        def tick(name: str, batch: int) -> None:
            distributed.progress()
            if console.is_terminal:
                images = len(case.datasets[name])
                console.print(f"{prefix}{name}: {batch} batches of {images} images", end="\r")

        evaluator = case.task.evaluator(plan.graph, mesh)
        results = evaluate_domains(evaluator, state, case.datasets, standing, tick)
        everything = {**summary(case.task, case.task.config, at, results), **identity}
        if distributed.is_main():
            out = case.out
            out.mkdir(parents=True, exist_ok=True)
            # Two evaluations at once must not lose each other's domains.
            with locks.held(out / "results.lock", f"{out}/results.json", console.print, wait=600):
                everything = write_results(everything, results, out)
            save_pictures(results, out)
        return everything

    judged = [judge(case) for case in cases]
    if len(judged) == 1:
        print_results(judged[0], console)
    else:
        print_protocols(judged, console)
    for results in judged if _NUMBERS.value else ():
        if len(judged) > 1:
            console.print(f"protocol {results['protocol']}:")
        print_numbers(results, console)
    for case in cases:
        console.print(f"written to {case.out}/results.json and {case.out}/pictures")


if __name__ == "__main__":
    _CHECKPOINT = cli.define_checkpoint()
    _DOMAINS = cli.define_list(
        "domains", "Domains to evaluate, by comma; those of the run's configuration if left out."
    )
    _PROTOCOL = cli.define_list(
        "protocol",
        "How the task is judged, see evaluation.protocol; one or several, by comma, each with"
        " results of its own. The run's own if left out.",
    )
    _TTA = flags.DEFINE_bool(
        "tta",
        None,
        "Test-time augmentation of segmentation, see evaluation.tta; results carry the protocol's"
        " name with _tta behind it. The run's own if left out.",
    )
    _DATA_ROOT = cli.define_path(
        "data_root", "Folder of the datasets; $JAXDG_DATA, else the run's, if left out.", urls=True
    )
    _BATCH_SIZE = flags.DEFINE_integer(
        "batch_size", None, "Images a step, over all devices.", lower_bound=1
    )
    _MAX_IMAGES = flags.DEFINE_integer(
        "max_images", None, "Images of each domain, evenly spread; 0 for all.", lower_bound=0
    )
    _WORKERS = flags.DEFINE_integer("workers", None, "Processes that read images.", lower_bound=0)
    _CALIBRATION = flags.DEFINE_bool(
        "calibration",
        None,
        "Whether results hold the expected calibration error, see evaluation.calibration. The run's"
        " own if left out.",
    )
    _BOUNDARY = flags.DEFINE_bool(
        "boundary",
        None,
        "Whether results hold Boundary IoU, see evaluation.boundary. The run's own if left out.",
    )
    _NUMBERS = flags.DEFINE_bool(
        "numbers", False, "Also print accuracy, precision, Dice and so on, and every class's gap."
    )
    _OUT = cli.define_path(
        "out",
        "Folder for results.json and pictures; one in the workdir, evaluation_STEP.., if left out.",
    )
    distributed.define_flags()
    cli.run(main)
