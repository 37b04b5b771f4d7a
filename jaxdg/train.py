"""The main job: configuration -> batches -> steps -> checkpoints and evaluation.

    python -m jaxdg.train --config configs/streets_tiny.py --workdir runs/streets

Run it again on the same workdir and it goes on where it stopped. Order of what a state comes from:
the newest readable checkpoint of the workdir; else the whole model of another run (`model.start`);
else random parameters with the encoder's converted weights put in.
"""

from collections.abc import Iterable, Sequence
import contextlib
import dataclasses
import functools
import math
from pathlib import Path
import time
from typing import Any

from absl import flags
import jax
from jax.experimental import multihost_utils
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.text import Text

from jaxdg import backbones, methods, weights
from jaxdg import config as config_lib
from jaxdg.commands import command_line as cli
from jaxdg.commands import process as runtime
from jaxdg.commands.command_line import Interrupt, Stop
from jaxdg.config import Config
from jaxdg.config import workdir as workdir_lib
from jaxdg.data import class_check
from jaxdg.data.augment.transforms import Augmentation
from jaxdg.data.datasets import Dataset
from jaxdg.data.pipeline import batch_files, train_batches
from jaxdg.data.samplers import Sampler, class_totals, make_sampler
from jaxdg.evaluate import (
    agree_on_images,
    evaluate_domains,
    open_domains,
    print_results,
    standings,
    summary,
    trained_on,
    write_results,
)
from jaxdg.evaluation.overlap import TrainedOn
from jaxdg.evaluation.results import NO_TRUTH, reference
from jaxdg.tasks.run_state import Blueprint, abstract_state, initial_state, make_task
from jaxdg.training import distributed, sharding
from jaxdg.training import optimizer as optimizer_lib
from jaxdg.training.checkpoint import Checkpoints, check_path
from jaxdg.training.metrics import read_metrics
from jaxdg.training.profile import parse_steps, profiled
from jaxdg.training.step import TrainState, make_step
from jaxdg.training.writer import Writer


def train(
    config: Config,
    workdir: Path,
    console: Console,
    interrupt: Interrupt,
    profile_steps: str | None = None,
) -> None:
    """Trains to the end, or until interrupted, in which case it returns after a checkpoint; see the
    flags at the end.
    """
    traced = parse_steps(profile_steps, config.steps)
    check_path(workdir.resolve() / "checkpoints")
    if distributed.is_main():
        workdir_lib.check(config, workdir)
    if distributed.from_main(lambda: finished(config, workdir, console)):
        return
    with (
        workdir_lib.reserved(workdir, console.print)
        if distributed.is_main()
        else contextlib.nullcontext()
    ):
        multihost_utils.sync_global_devices("reserved")
        if not (workdir / "lock").is_file():
            raise ValueError(
                f"{workdir} is not the folder that process 0 writes to; give a --workdir that all"
                " hosts share"
            )
        with contextlib.ExitStack() as closing:
            run(config, workdir, console, interrupt, traced, closing)


def run(
    config: Config,
    workdir: Path,
    console: Console,
    interrupt: Interrupt,
    traced: range,
    closing: contextlib.ExitStack,
) -> None:
    """Trains in a reserved workdir, which is claimed when everything is open; `closing` closes what
    was opened.
    """
    # --- Data: everything is opened and checked before the first step -----------------------------
    d = config.data
    task = make_task(config, methods.active(config))
    if config.model.start is None and not workdir_lib.saved(workdir):
        for file in filter(None, (config.model.weights, config.model.text_weights)):
            weights.metadata(file)  # fails early where there is no such file
        if config.model.weights:
            backbones.check_file(config.model.encoder, config.model.weights)
    source = task.open(d.source, train=True)
    domains = open_domains(task) if config.eval_every else {}
    agree_on_images({f"the source {d.source}": source, **domains}, config)
    trained = trained_on(task, source, workdir, console.print)
    standing = standings(task, domains, trained, console.print)
    if distributed.is_main() and config.steps:
        class_check.before_training(source, domains, console.print)
    if d.rare_class_temperature:
        console.print(
            f"rare-class sampling: counts the classes of {len(source)} labels, once for all runs"
        )
    rare = {"temperature": d.rare_class_temperature, "min_pixels": d.rare_class_min_pixels}
    sampler = make_sampler(
        source, seed=config.seed, weights=d.source_weights, **rare, workers=d.workers
    )
    if distributed.is_main():
        trained = dataclasses.replace(trained, pixels=class_totals(sampler))
        if workdir_lib.saved(workdir):
            say_changes(trained, config.data.source, workdir, console)

    # --- Model and state --------------------------------------------------------------------------
    mesh = sharding.make_mesh(config.mesh)
    if config.batch_size // config.optimizer.accumulate % mesh.size:
        raise ValueError(
            f"batch_size {config.batch_size} in {config.optimizer.accumulate} parts is not"
            f" divisible by {mesh.size} devices; allowed: a multiple of"
            f" {mesh.size * config.optimizer.accumulate}"
        )
    blueprint = Blueprint.of(task, config.model.freeze)
    like, optimizer = abstract_state(blueprint, config, mesh, task.methods)
    checkpoints = Checkpoints(workdir, config.keep_checkpoints, say=console.print)
    closing.callback(checkpoints.close)
    state = checkpoints.restore(like, say=console.print)
    if state is None:
        state = initial_state(task, blueprint, like, optimizer)
    else:
        console.print(f"resuming from step {int(state.step)}")
    describe(config, blueprint, source, mesh, console)

    # --- What a step needs ------------------------------------------------------------------------
    start = int(state.step)
    shardings = jax.tree.map(lambda leaf: leaf.sharding, like)
    key = jax.random.key(config.seed)
    parts = config.optimizer.accumulate
    step_fn = make_step(
        blueprint.graph, optimizer, task.loss_denominator, task.losses, key, shardings, parts
    )
    step_fn = profiled(step_fn, traced, start, workdir / "profile")
    prepare = task.preparation(mesh)
    evaluator = task.evaluator((blueprint.finished or blueprint).graph, mesh)
    finished_model = (
        jax.jit(lambda state: blueprint.finish(task, state)) if blueprint.finished else None
    )
    batches = train_batches(
        source,
        sampler,
        Augmentation(
            **{field.name: getattr(d, field.name) for field in dataclasses.fields(Augmentation)}
        ),
        seed=config.seed,
        batch_size=config.batch_size,
        start=start,
        stop=config.steps,
        max_boxes=d.max_boxes,
        styles=any(method.wants_pictures for method in task.methods),
        workers=d.workers,
        shard=(jax.process_index(), jax.process_count()),
    )
    closing.callback(batches.close)
    if start < config.steps:
        checkpoints.check_room(state, start + 1)

    # --- The workdir is this run's from here on: all processes have opened everything -------------
    multihost_utils.sync_global_devices("open")
    if distributed.is_main():
        workdir_lib.claim(config, workdir, start, console.print)
        trained.save(workdir)
    writer = Writer(workdir, start, distributed.is_main(), console.print)
    closing.callback(writer.close)
    log = Log(config, source, sampler, writer, console, start)

    def evaluate(state: TrainState, names: Sequence[str]) -> None:
        """Judges the state on domains; its checkpoint is on its way to disk already, so stopping
        here loses nothing.
        """
        step = int(state.step)
        log.say(f"evaluating step {step} on {', '.join(names)}")
        model_state = (
            finished_model(state)
            if finished_model
            else (state.trained, state.frozen, state.statistics)
        )
        chosen = {name: domains[name] for name in names}
        results = evaluate_domains(
            evaluator, model_state, chosen, standing, lambda *_: interrupt.check()
        )
        everything = summary(task, config, step, results)
        for name, result in results.items():
            for i, picture in enumerate(result.pictures):
                writer.picture(f"{name}/{i}", picture, step)
        # Choosing a checkpoint by unseen domains would be cheating: the best one is the best on the
        # source domain.
        scored = {
            name: result.metrics for name, result in results.items() if result.score is not None
        }
        seen = reference(scored)
        if distributed.is_main():
            write_results(everything, results, workdir)
            known = {row.get("domain") for row in read_metrics(workdir) if row["step"] == step}

            def row(name, r):
                return {
                    "step": step,
                    "domain": name,
                    task.score_name: r.score,
                    "images": r.metrics["images"],
                    "trained_on": r.metrics["trained_on"],
                    "decides": name in seen,
                }

            writer.rows(
                *(row(name, result) for name, result in results.items() if name not in known)
            )
        if seen:
            checkpoints.scored(
                step, sum(scored[name][task.score_name] for name in seen) / len(seen)
            )
        shown = {
            name: NO_TRUTH if result.score is None else f"{result.score:.1f}"
            for name, result in results.items()
        }
        scores = "  ".join(f"{name} {text}" for name, text in shown.items())
        log.say(f"{scores}  {task.score_name} (protocol {config.evaluation.protocol})")

    # --- Loop -------------------------------------------------------------------------------------
    at = start
    try:
        with log:
            if not config.steps and not workdir_lib.saved(workdir):
                checkpoints.save(
                    state, finished_model and finished_model(state)
                )  # nothing is trained: what was loaded is the result
                state = checkpoints.reread(like, 0)
            expected = (
                domains
                if (start or not config.steps) and due(start, config.eval_every, config.steps)
                else {}
            )
            # The run died between this step's checkpoint and the end of its evaluation, or domains
            # were added.
            if missing := distributed.from_main_list(
                lambda: unjudged(workdir, start, expected, console)
            ):
                evaluate(state, missing)
            for step, batch in enumerate(batches, start + 1):
                state, metrics = step_fn(state, prepare(sharding.to_devices(batch, mesh), step - 1))
                at = step
                log.step(step, metrics)
                evaluates = due(step, config.eval_every, config.steps)
                if interrupt.asked or evaluates or due(step, config.checkpoint_every, config.steps):
                    log.flush()  # a non-finite loss must stop the run before it is saved
                    with log.pause():
                        checkpoints.save(state, finished_model and finished_model(state))
                        interrupt.check()
                        if step == config.steps:
                            state = None  # it need not fit twice
                            state = checkpoints.reread(
                                like, step
                            )  # what is judged and called finished is what is on the disk
                        if evaluates:
                            evaluate(state, list(domains))
        checkpoints.wait()
    except Stop:
        checkpoints.wait()
        console.print(f"stopped at step {at}; run the same command to go on")
        return
    if distributed.is_main():
        finished(config, workdir, console)


def say_changes(trained: TrainedOn, source: str, workdir: Path, console: Console) -> None:
    """Says what changed in the source of a run that goes on; an error where its classes did."""
    try:
        before = TrainedOn.load(workdir)
    except ValueError:
        return  # `trained_on` has said so
    if before is not None and (changed := trained.changes(before, source)):
        console.print(Text.assemble(("warning: ", "bold yellow"), changed))


def due(step: int, every: int, last: int) -> bool:
    """Whether something done every so many steps, and at the last one, is done after `step`; 0
    means never.
    """
    return every > 0 and (step % every == 0 or step == last)


def unjudged(workdir: Path, step: int, domains: Iterable[str], console: Console) -> list[str]:
    """The domains whose results at `step` have not been written; a broken results.json is set
    aside.
    """
    results = workdir_lib.results(workdir / "results.json", console.print)
    written = results["domains"] if results is not None and results["step"] == step else ()
    rows = {row.get("domain") for row in read_metrics(workdir) if row["step"] == step}
    return [name for name in domains if name not in written or name not in rows]


def finished(config: Config, workdir: Path, console: Console) -> bool:
    """Prints the results of a run that has come to its end; False if it has not, or domains were
    added since.
    """
    if not (workdir / "checkpoints" / str(config.steps)).is_dir():
        return False
    if not config.eval_every:
        console.print(
            f"finished: {config.steps} steps in {workdir}, without evaluation (eval_every=0)"
        )
        return True
    results = workdir_lib.results(workdir / "results.json")
    if (
        results is None
        or results["step"] != config.steps
        or not set(config.evaluation.domains) <= results["domains"].keys()
    ):
        return False
    print_results(results, console)
    console.print(f"finished: {workdir}/results.json")
    return True


def describe(
    config: Config, blueprint: Blueprint, source: Dataset, mesh: Any, console: Console
) -> None:
    """One line on what is about to happen."""

    def count(state):
        return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(state)) / 1e6

    trained, frozen, _ = blueprint.abstract
    kept = f", {count(frozen):.2f} M frozen" if blueprint.frozen else ""
    encoder = (
        f"{config.model.encoder} ({config.model.start or config.model.weights or 'from scratch'})"
    )
    console.print(
        f"{encoder} + {config.model.decoder}: {count(trained):.2f} M parameters trained{kept};"
        f" {len(source)} images of {config.data.source}; {mesh.size} x"
        f" {jax.devices()[0].device_kind}, mesh data={mesh.shape['data']} fsdp={mesh.shape['fsdp']}"
    )


class Log:
    """Rows of metrics.jsonl, the progress bar, and the watch for a non-finite loss, without making
    the devices wait.

    The numbers of a step are fetched after the next step has been handed to the devices, and the
    host waits for it then: there are two batches on the devices, the one worked on and the next,
    however fast data are read.
    """

    def __init__(
        self,
        config: Config,
        source: Dataset,
        sampler: Sampler,
        writer: Writer,
        console: Console,
        start: int,
    ):
        self.config = config
        self.writer = writer
        self.console = console
        self.files = functools.partial(batch_files, source, sampler, batch_size=config.batch_size)
        self.rate: Any = optimizer_lib.learning_rate(config.optimizer, config.steps)
        self.waiting: list[tuple[int, dict[str, jax.Array]]] = []
        self.last = start
        self.clock = time.perf_counter()
        self.compiled = False
        columns = (
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[note]}", markup=False),
            TimeRemainingColumn(),
        )
        self.bar = Progress(*columns, console=console, disable=not console.is_terminal)
        self.task = self.bar.add_task("training", total=config.steps, completed=start, note="")

    def __enter__(self) -> "Log":
        self.bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.bar.stop()

    def say(self, line: str) -> None:
        """Prints a line above the bar."""
        self.console.print(line, highlight=False)

    def step(self, step: int, metrics: dict[str, jax.Array]) -> None:
        """Takes the metrics of the step just handed to the devices."""
        if not self.compiled:
            jax.block_until_ready(metrics)
            self.compiled = True
            self.clock = time.perf_counter()
            self.last = step
        if self.waiting:
            jax.block_until_ready(self.waiting[-1])
            if due(self.waiting[-1][0], self.config.log_every, self.config.steps):
                self.flush()
        self.waiting.append((step, metrics))
        self.bar.update(self.task, completed=step)

    def flush(self) -> None:
        """Fetches what is waiting: checks every loss and writes the rows that are due.

        Raises:
            ValueError: a loss is not finite; the message names the step and the files of its batch.
        """
        waiting = jax.device_get(self.waiting)
        self.waiting = []
        for step, metrics in waiting:
            if not math.isfinite(metrics["loss"]):
                raise ValueError(
                    f"the loss of step {step} is {float(metrics['loss'])}; its batch:"
                    f" {', '.join(self.files(step=step - 1))}; lower optimizer.learning_rate or"
                    " look at these files; checkpoints before this step are untouched"
                )
            if due(step, self.config.log_every, self.config.steps):
                self._row(step, {key: float(value) for key, value in metrics.items()})

    def _row(self, step: int, metrics: dict[str, float]) -> None:
        seconds = (
            (time.perf_counter() - self.clock) / (step - self.last) if step > self.last else None
        )
        self.clock = time.perf_counter()
        self.last = step
        speed = (
            {}
            if seconds is None
            else {
                "seconds_per_step": seconds,
                "images_per_second": self.config.batch_size / seconds,
            }
        )
        loss = metrics.pop("loss")
        # The rate that made this step: schedules count from 0.
        self.writer.rows(
            {
                "step": step,
                "loss": loss,
                "learning_rate": float(self.rate(step - 1)),
                **speed,
                **metrics,
            }
        )
        note = f"loss {loss:.3f}" + (
            "" if seconds is None else f"  {self.config.batch_size / seconds:.1f} images/s"
        )
        self.bar.update(self.task, note=note)
        if not self.console.is_terminal:
            left = (
                ""
                if seconds is None
                else f"  ETA {seconds * (self.config.steps - step) / 60:.1f} min"
            )
            self.say(f"step {step}/{self.config.steps}  {note}{left}")

    def pause(self) -> "Pause":
        """Time spent inside is no training time."""
        return Pause(self)


class Pause:
    """Stops the log's clock while checkpoints and evaluations run; nothing may be waiting in the
    log.
    """

    def __init__(self, log: Log):
        self.log = log

    def __enter__(self) -> None:
        self.since = time.perf_counter()

    def __exit__(self, *_: object) -> None:
        self.log.clock += time.perf_counter() - self.since


@distributed.joined()
def main(arguments: Sequence[str]) -> None:
    """Trains as the flags say."""
    if len(arguments) > 1:
        raise ValueError(f"unexpected argument {arguments[1]!r}; see --help")
    config = _CONFIG.value
    if config is None or _WORKDIR.value is None:
        raise ValueError(
            "--config FILE and --workdir DIR are needed, such as --config configs/streets_tiny.py"
            " --workdir runs/streets"
        )
    distributed.agree(
        {**config_lib.common(config), "--workdir": _WORKDIR.value},
        "start all processes by the same command",
    )
    runtime.set_up()
    if jax.config.values["jax_disable_jit"]:
        raise ValueError(
            "JAX_DISABLE_JIT is set, but a training step is one compiled program; unset it"
        )
    console = cli.console(quiet=not distributed.is_main())
    interrupt = Interrupt(distributed.Agreement())
    train(config, Path(_WORKDIR.value), console, interrupt, _PROFILE_STEPS.value)


if __name__ == "__main__":
    _CONFIG = cli.define_config()
    flags.declare_key_flag("config")
    _WORKDIR = cli.define_path(
        "workdir", "Folder of the run: made if needed, gone on with if it holds a run."
    )
    distributed.define_flags()
    _PROFILE_STEPS = flags.DEFINE_string(
        "profile_steps", None, "FIRST:LAST, counted from 1: what they do goes to WORKDIR/profile."
    )
    cli.run(main)
