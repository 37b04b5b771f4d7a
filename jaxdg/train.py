"""The main job: configuration -> batches -> steps -> checkpoints and evaluation.

    python -m jaxdg.train --config configs/streets_quick.py --workdir runs/streets

Run again on the same workdir, it goes on where it stopped. The state comes from the first of these
that there is: the newest readable checkpoint of the workdir; the whole model of another run
(`model.start`); random parameters, with the encoder's converted weights put in.
"""

from collections.abc import Callable, Iterable, Sequence
import contextlib
import dataclasses
import math
from pathlib import Path
import shlex
from typing import Any

from absl import flags
import jax
from jax.experimental import multihost_utils
from jax.sharding import Mesh
from rich.console import Console
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
from jaxdg.data.pipeline import Items, batch_files, train_batches
from jaxdg.data.samplers import Sampler, class_totals, make_sampler
from jaxdg.evaluate import (
    agree_on_images,
    evaluate_domains,
    open_domains,
    standings,
    summary,
    trained_on,
    write_results,
)
from jaxdg.evaluation.overlap import Standing, TrainedOn
from jaxdg.evaluation.printing import print_results
from jaxdg.evaluation.results import NO_TRUTH, reference
from jaxdg.hub import runs as auto_weights
from jaxdg.tasks.run_state import Blueprint, abstract_state, initial_state, make_task
from jaxdg.tasks.task import DomainResult, Evaluate, ModelState, Task
from jaxdg.training import distributed, history, sharding
from jaxdg.training import loggers as loggers_lib
from jaxdg.training import optimizer as optimizer_lib
from jaxdg.training.checkpoint import Checkpoints, check_path
from jaxdg.training.log import Log, due
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
    """Trains to the last step; an interrupt saves a checkpoint and returns early."""
    traced = parse_steps(profile_steps, config.steps)
    check_path(workdir.resolve() / "checkpoints")
    if distributed.is_main():
        workdir_lib.check(config, workdir)
        loggers_lib.check(config.loggers)
    if distributed.from_main(lambda: finished(config, workdir, console)):
        return
    fetch_weights(config, workdir, console, interrupt)
    with contextlib.ExitStack() as closing:
        if distributed.is_main():
            closing.enter_context(workdir_lib.reserved(workdir, console.print))
        multihost_utils.sync_global_devices("reserved")
        if not (workdir / "lock").is_file():
            raise ValueError(
                f"{workdir} is not the folder that process 0 writes to; give a --workdir that all"
                " hosts share"
            )
        run(config, workdir, console, interrupt, traced, closing)


def fetch_weights(config: Config, workdir: Path, console: Console, interrupt: Interrupt) -> None:
    """Fetches the weights that `auto` names; a signal ends the program meanwhile.

    Every process does: where hosts share a disk, the first one fetches and the others wait.
    """
    if not auto_weights.names(config):
        return
    try:
        with interrupt.lifted(), distributed.patient():
            found = auto_weights.fetch(config, workdir, console.print)
            sources = {f"the source of {field}": r["source_sha256"] for field, r in found.items()}
            distributed.agree(sources, "give all hosts the same files")
    except KeyboardInterrupt:
        console.print("stopped; the same command goes on with the download")
        raise SystemExit(130) from None


def run(
    config: Config,
    workdir: Path,
    console: Console,
    interrupt: Interrupt,
    traced: range,
    closing: contextlib.ExitStack,
) -> None:
    """Trains in a reserved workdir; `closing` closes what this opens."""
    # --- Data: everything is opened and checked before the first step -----------------------------
    task = make_task(auto_weights.resolved(config), methods.active(config))
    data = open_data(task, workdir, console)

    # --- Model and state --------------------------------------------------------------------------
    mesh = sharding.make_mesh(config.mesh)
    check_batch_size(config, mesh)
    blueprint = Blueprint.of(task, config.model.freeze)
    like, optimizer = abstract_state(blueprint, config, mesh, task.methods)
    checkpoints = Checkpoints(workdir, config.keep_checkpoints, say=console.print)
    closing.callback(checkpoints.close)
    loop = Loop(checkpoints, like)
    loop.state = checkpoints.restore(like, say=console.print)
    if loop.state is None:
        loop.state = initial_state(task, blueprint, like, optimizer)
    else:
        console.print(f"resuming from step {int(loop.state.step)}")
    start = loop.step = int(loop.state.step)
    if blueprint.finished:
        loop.finish = jax.jit(lambda state: blueprint.finish(task, state))
    describe(task.config, blueprint, data.source, mesh, console)

    # --- What a step needs ------------------------------------------------------------------------
    step_fn = make_step(
        blueprint.graph,
        optimizer,
        task.loss_denominator,
        task.losses,
        jax.random.key(config.seed),
        jax.tree.map(lambda leaf: leaf.sharding, like),
        config.optimizer.accumulate,
    )
    step_fn = profiled(step_fn, traced, start, workdir / "profile")
    prepare = task.preparation(mesh)
    evaluator = task.evaluator((blueprint.finished or blueprint).graph, mesh)
    batches = open_batches(task, data, start)
    closing.callback(batches.close)
    if start < config.steps:
        checkpoints.check_room(loop.state, start + 1)

    # --- All processes have opened everything: from here on the workdir is this run's -------------
    multihost_utils.sync_global_devices("open")
    loggers: list[loggers_lib.Logger] = []
    if distributed.is_main():
        workdir_lib.claim(config, workdir, start, console.print)
        auto_weights.claim(config, workdir)
        data.trained_on.save(workdir)
        history.started(workdir, start)
        said = dataclasses.asdict(config)
        loggers = loggers_lib.opened(config.loggers, workdir, start, said, console.print)
    writer = Writer(workdir, start, distributed.is_main(), console.print, loggers)
    closing.callback(writer.close)
    rate: Any = optimizer_lib.learning_rate(config.optimizer, config.steps)
    log = Log(
        writer,
        console,
        start=start,
        steps=config.steps,
        every=config.log_every,
        batch_size=config.batch_size,
        rate=rate,
        files=lambda step: batch_files(
            data.source, data.sampler, batch_size=config.batch_size, step=step
        ),
    )
    judge = Judge(task, evaluator, data, workdir, checkpoints, writer, log, interrupt)

    # --- Loop -------------------------------------------------------------------------------------
    try:
        with log:
            if not config.steps and not workdir_lib.saved(workdir):
                loop.save()  # without training, what was loaded is the result
                loop.reread()
            # An earlier run may have died before the end of this evaluation, or had fewer domains.
            evaluated = (start or not config.steps) and due(start, config.eval_every, config.steps)
            expected = data.domains if evaluated else {}
            if missing := distributed.from_main_list(
                lambda: unjudged(workdir, start, expected, console)
            ):
                judge(start, loop.model(), missing)
            for step, batch in enumerate(batches, start + 1):
                batch = prepare(sharding.to_devices(batch, mesh), step - 1)
                loop.state, metrics = step_fn(loop.state, batch)
                loop.step = step
                log.step(step, metrics)
                evaluates = due(step, config.eval_every, config.steps)
                saves = due(step, config.checkpoint_every, config.steps)
                if interrupt.asked or evaluates or saves:
                    log.flush()  # a non-finite loss must stop the run before it is saved
                    with log.pause():
                        model = loop.save()
                        interrupt.check()
                        if step == config.steps:
                            del model  # memory need not hold the parameters twice
                            model = loop.reread()
                        if evaluates:
                            judge(step, model, list(data.domains))
                        del model  # the next step needs its memory
        checkpoints.wait()
    except Stop:
        checkpoints.wait()
        if distributed.is_main():
            history.ended(workdir, loop.step)
        console.print(f"stopped at step {loop.step}; run the same command to go on")
        return
    if distributed.is_main():
        history.ended(workdir, loop.step)
        write_page(workdir, console)
        finished(config, workdir, console)


@dataclasses.dataclass
class Data:
    """The images of a run, opened and checked.

    Attributes:
        source: to train on.
        sampler: the order in which steps draw them.
        domains: to evaluate on, by name; none without evaluation.
        standing: whether each domain is seen.
        trained_on: what the workdir records about the images trained on.
    """

    source: Dataset
    sampler: Sampler
    domains: dict[str, Dataset]
    standing: dict[str, Standing]
    trained_on: TrainedOn


def open_data(task: Task, workdir: Path, console: Console) -> Data:
    """Opens the source and the domains, and checks that they and the weights fit together."""
    config = task.config
    d = config.data
    if config.model.start is None and not workdir_lib.saved(workdir):
        for file in filter(None, (config.model.weights, config.model.text_weights)):
            weights.metadata(file)  # fails early if there is no such file
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
    sampler = make_sampler(
        source,
        seed=config.seed,
        weights=d.source_weights,
        temperature=d.rare_class_temperature,
        min_pixels=d.rare_class_min_pixels,
        workers=d.workers,
    )
    if distributed.is_main():
        trained = dataclasses.replace(trained, pixels=class_totals(sampler))
        if workdir_lib.saved(workdir):
            warn_of_changes(trained, d.source, workdir, console)
    return Data(source, sampler, domains, standing, trained)


def warn_of_changes(trained: TrainedOn, source: str, workdir: Path, console: Console) -> None:
    """Warns if the source of a resumed run has changed; an error if its classes have."""
    try:
        before = TrainedOn.load(workdir)
    except ValueError:
        return  # `trained_on` has reported it
    if before is not None and (changed := trained.changes(before, source)):
        console.print(Text.assemble(("warning: ", "bold yellow"), changed))


def check_batch_size(config: Config, mesh: Mesh) -> None:
    """ValueError unless the devices divide each part of a batch evenly."""
    parts = config.optimizer.accumulate
    if config.batch_size // parts % mesh.size:
        raise ValueError(
            f"batch_size {config.batch_size} in {parts} parts is not divisible by {mesh.size}"
            f" devices; allowed: a multiple of {mesh.size * parts}"
        )


def open_batches(task: Task, data: Data, start: int) -> Items:
    """Starts to read the batches of this host, from step `start` to the last."""
    config = task.config
    d = config.data
    fields = (field.name for field in dataclasses.fields(Augmentation))
    return train_batches(
        data.source,
        data.sampler,
        Augmentation(**{name: getattr(d, name) for name in fields}),
        seed=config.seed,
        batch_size=config.batch_size,
        start=start,
        stop=config.steps,
        max_boxes=d.max_boxes,
        styles=any(method.wants_pictures for method in task.methods),
        corruptions=methods.corruptions(task.methods),
        workers=d.workers,
        shard=(jax.process_index(), jax.process_count()),
    )


@dataclasses.dataclass
class Loop:
    """What changes from step to step, and its checkpoints.

    Attributes:
        checkpoints: of the run.
        like: the abstract state.
        finish: state to the model without what the methods added to it; None if they add nothing.
        state: the train state.
        step: steps done.
    """

    checkpoints: Checkpoints
    like: TrainState
    finish: Callable[[TrainState], ModelState] | None = None
    state: Any = None
    step: int = 0

    def model(self) -> ModelState:
        """The model as it is judged."""
        if self.finish:
            return self.finish(self.state)
        return self.state.trained, self.state.frozen, self.state.statistics

    def save(self) -> ModelState:
        """Starts to write a checkpoint; returns the model in it."""
        model = self.model()
        self.checkpoints.save(self.state, model if self.finish else None)
        return model

    def reread(self) -> ModelState:
        """Replaces the state by its checkpoint, so that a finished run is one that can be read."""
        self.state = None  # memory need not hold it twice
        self.state = self.checkpoints.reread(self.like, self.step)
        return self.model()


@dataclasses.dataclass
class Judge:
    """Evaluates a model on domains and records the results.

    The checkpoint of the step is being written by then, so an interrupt loses nothing.
    """

    task: Task
    evaluator: Evaluate
    data: Data
    workdir: Path
    checkpoints: Checkpoints
    writer: Writer
    log: Log
    interrupt: Interrupt

    def __call__(self, step: int, model: ModelState, names: Sequence[str]) -> None:
        """Evaluates the model of `step` on the named domains."""
        score_name = self.task.score_name
        self.log.say(f"evaluating step {step} on {', '.join(names)}")
        domains = {name: self.data.domains[name] for name in names}
        results = evaluate_domains(
            self.evaluator, model, domains, self.data.standing, lambda *_: self.interrupt.check()
        )
        # Choosing a checkpoint by unseen domains would be cheating: the best one is the best on the
        # source domain.
        scored = {name: r.metrics for name, r in results.items() if r.score is not None}
        seen = reference(scored)
        self.write(step, results, seen)
        if seen:
            mean = sum(scored[name][score_name] for name in seen) / len(seen)
            self.checkpoints.scored(step, mean)
        scores = "  ".join(
            f"{name} {NO_TRUTH if r.score is None else f'{r.score:.1f}'}"
            for name, r in results.items()
        )
        protocol = self.task.config.evaluation.label
        self.log.say(f"{scores}  {score_name} (protocol {protocol})")

    def write(self, step: int, results: dict[str, DomainResult], seen: Sequence[str]) -> None:
        """Writes results.json, pictures, and the rows that metrics.jsonl lacks."""
        everything = summary(self.task, self.task.config, step, results)
        for name, result in results.items():
            for i, picture in enumerate(result.pictures):
                self.writer.picture(f"{name}/{i}", picture, step)
        if not distributed.is_main():
            return
        everything["device_hours"] = history.device_hours(self.workdir, step)
        write_results(everything, results, self.workdir)
        logged = {row.get("domain") for row in read_metrics(self.workdir) if row["step"] == step}
        rows = [
            {
                "step": step,
                "domain": name,
                self.task.score_name: result.score,
                "images": result.metrics["images"],
                "trained_on": result.metrics["trained_on"],
                "decides": name in seen,
            }
            for name, result in results.items()
            if name not in logged
        ]
        self.writer.rows(*rows)


def unjudged(workdir: Path, step: int, domains: Iterable[str], console: Console) -> list[str]:
    """The domains that lack results of `step`; sets a broken results.json aside."""
    results = workdir_lib.results(workdir / "results.json", console.print)
    written = results["domains"] if results is not None and results["step"] == step else ()
    rows = {row.get("domain") for row in read_metrics(workdir) if row["step"] == step}
    return [name for name in domains if name not in written or name not in rows]


def finished(config: Config, workdir: Path, console: Console) -> bool:
    """Prints the results of a finished run; False if steps or domains are left to do."""
    if not (workdir / "checkpoints" / str(config.steps)).is_dir():
        return False
    if not config.eval_every:
        console.print(
            f"finished: {config.steps} steps in {workdir}, without evaluation (eval_every=0)"
        )
        console.print(where_the_page_is(workdir))
        return True
    results = workdir_lib.results(workdir / "results.json")
    if results is None or results["step"] != config.steps:
        return False
    if not set(config.evaluation.domains) <= results["domains"].keys():
        return False
    print_results(results, console)
    console.print(f"finished: {workdir}/results.json")
    console.print(where_the_page_is(workdir))
    return True


def write_page(workdir: Path, console: Console) -> None:
    """Writes the page of a finished run; a failure is a line, as the run itself is whole."""
    from jaxdg.report import run_page  # brings in matplotlib, which training does without

    try:
        run_page.write(workdir)
    except Exception as error:
        console.print(f"the page of the run was not written: {type(error).__name__}: {error}")


def where_the_page_is(workdir: Path) -> str:
    """A line that leads to the curves and pictures of a run."""
    page = workdir / "report" / "report.html"
    where = page if page.is_file() else f"jaxdg report {shlex.quote(str(workdir))}"
    return f"curves and pictures: {where}"


def describe(
    config: Config, blueprint: Blueprint, source: Dataset, mesh: Mesh, console: Console
) -> None:
    """Prints one line about the run."""

    def millions(state):
        return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(state)) / 1e6

    trained, frozen, _ = blueprint.abstract
    rest = f", {millions(frozen):.2f} M frozen" if blueprint.frozen else ""
    m = config.model
    console.print(
        f"{m.encoder} ({m.start or m.weights or 'from scratch'}) + {m.decoder}:"
        f" {millions(trained):.2f} M parameters trained{rest};"
        f" {len(source)} images of {config.data.source}; {mesh.size} x"
        f" {jax.devices()[0].device_kind}, mesh data={mesh.shape['data']} fsdp={mesh.shape['fsdp']}"
    )


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
    _CONFIG = cli.define_config(fields_in_help=True)
    _WORKDIR = cli.define_path(
        "workdir", "Folder of the run: made if needed, gone on with if it holds a run."
    )
    distributed.define_flags()
    _PROFILE_STEPS = flags.DEFINE_string(
        "profile_steps", None, "FIRST:LAST, counted from 1: what they do goes to WORKDIR/profile."
    )
    cli.run(main)
