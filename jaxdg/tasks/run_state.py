"""Builds a run's task, model and train state, and restores them from checkpoints.

A trained model is a workdir, one step in it, or a packed file; `opened` alone tells which.
"""

from collections.abc import Callable, Sequence
import dataclasses
import functools
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flax import nnx
import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jaxtyping import Array, Key
import numpy as np

from jaxdg import config as config_lib
from jaxdg import files, weights
from jaxdg import methods as method_lib
from jaxdg.backbones import StagedConfig
from jaxdg.config import Config, MeshConfig, paths
from jaxdg.config import workdir as workdir_lib
from jaxdg.data.labels import LabelSet, join_names
from jaxdg.evaluation.overlap import TrainedOn
from jaxdg.methods.method import Method
from jaxdg.tasks import packed
from jaxdg.tasks.detection import Detection
from jaxdg.tasks.segmentation import Segmentation
from jaxdg.tasks.task import ModelState, Task
from jaxdg.tracing import Rngs
from jaxdg.training import optimizer as optimizer_lib
from jaxdg.training import sharding
from jaxdg.training.step import TrainState

if TYPE_CHECKING:
    from jaxdg.training.checkpoint import Checkpoints


def make_task(
    config: Config, methods: tuple[Method, ...] | None = None, labels: LabelSet | None = None
) -> Task:
    """The task of a run; needs no data.

    Args:
        config: of the run.
        methods: that training uses (`jaxdg.methods.active`); None for evaluation and prediction,
            which use those whose modules stay in the model.
        labels: of the source, if something else than the configuration tells them.
    """
    task = Detection if config.task == "detection" else Segmentation
    return task(config, method_lib.lasting(config) if methods is None else methods, labels)


@dataclasses.dataclass
class Blueprint:
    """A run's model before any array exists.

    Attributes:
        make: key to the model.
        extend: adds the methods' modules to a model with loaded weights.
        graph: of `nnx.split`.
        split: model to (trained, frozen, statistics).
        abstract: the split of an abstract model.
        frozen: names of the frozen parameters.
        finished: the model at the end of training; None if no method changes the model.
    """

    make: Callable[[Key[Array, ""]], nnx.Module]
    extend: Callable[[Any, Key[Array, ""]], None]
    graph: nnx.GraphDef
    split: Callable[[nnx.Module], ModelState]
    abstract: ModelState
    frozen: set[str]
    finished: "Blueprint | None" = None

    @classmethod
    def of(cls, task: Task, freeze: str) -> "Blueprint":
        """Decides by name what is frozen, and ends segments where that changes."""
        key = jax.random.key(0)
        ends = {block for method in task.methods for block in method.boundaries(task.depth)}
        first: Any = nnx.eval_shape(lambda: extended(task, key, tuple(sorted(ends))))
        slots = weights.slots(nnx.state(first, nnx.Param))
        frozen = frozen_parameters(task, freeze, first, list(slots))
        boundaries = tuple(sorted(ends.union(optimizer_lib.freeze_boundaries(frozen, slots))))
        blueprint = cls.stored(task, boundaries, frozen)
        if any(method.changes_model for method in task.methods):
            plain = make_task(task.config)
            # Segments of a plain encoder end at its taps; those of a hierarchical one count stages.
            encoder = first.backbone.config
            taps = () if isinstance(encoder, StagedConfig) else encoder.taps
            ends = tuple(sorted({*boundaries, *taps}))
            model: Any = nnx.eval_shape(lambda: extended(plain, key, ()))
            names = list(weights.slots(nnx.state(model, nnx.Param)))
            frozen = frozen_parameters(plain, freeze, model, names)
            blueprint.finished = cls.stored(plain, ends, frozen)
        return blueprint

    @classmethod
    def stored(cls, task: Task, boundaries: Sequence[int], frozen: set[str]) -> "Blueprint":
        """The model with these parameters frozen; segments also end after `boundaries`."""
        model = nnx.eval_shape(lambda: extended(task, jax.random.key(0), boundaries))
        slots = weights.slots(nnx.state(model, nnx.Param))
        paths = {slot.path for name, slot in slots.items() if name in frozen}
        is_frozen = nnx.All(nnx.Param, lambda path, _: path in paths)
        is_trained = nnx.All(nnx.Param, lambda path, _: path not in paths)

        def split(model: nnx.Module) -> ModelState:
            return tuple(nnx.split(model, is_trained, is_frozen, ...)[1:])  # pyright: ignore

        return cls(
            make=lambda key: task.model(Rngs(key), boundaries),
            extend=lambda model, key: extend(task, model, key),
            graph=nnx.split(model, nnx.Param, ...)[0],
            split=split,
            abstract=split(model),
            frozen=frozen,
        )

    def finish(self, task: Task, state: TrainState) -> ModelState:
        """The state of `finished`, which must be there, from a train state."""
        assert self.finished is not None
        model = nnx.merge(self.graph, state.trained, state.frozen, state.statistics, copy=True)
        states = optimizer_lib.method_states(state.opt_state, task.methods)
        for method, own in zip(task.methods, states, strict=True):
            method.finish(model, own)
        return self.finished.split(model)


def extended(task: Task, key: Key[Array, ""], boundaries: Sequence[int]) -> nnx.Module:
    """The model with the methods' modules."""
    model = task.model(Rngs(key), boundaries)
    extend(task, model, key)
    return model


def extend(task: Task, model: Any, key: Key[Array, ""]) -> None:
    """Adds the methods' modules to a model; each method has its own random stream."""
    for i, method in enumerate(extending(task)):
        method.extend(model, Rngs(jax.random.fold_in(key, i)))


def extending(task: Task) -> list[Method]:
    """The methods that add modules; others leave a run's random numbers as they are."""
    return [method for method in task.methods if type(method).extend is not Method.extend]


def frozen_parameters(task: Task, freeze: str, model: Any, names: Sequence[str]) -> set[str]:
    """The parameters that stay as loaded: by `model.freeze`, by the methods, and unused ones.

    The gradient of an unused parameter is 0, but weight decay would change it.
    """
    frozen = optimizer_lib.frozen_names(freeze, names, model.backbone) | {
        name for name in names if model.unused(name)
    }
    for method in task.methods:
        frozen = {name for name in names if not method.trains(name, name not in frozen)}
    return frozen


def abstract_state(
    blueprint: Blueprint, config: Config, mesh: Mesh, methods: tuple[Method, ...] = ()
) -> tuple[TrainState, Any]:
    """The train state as shapes with shardings, and the optimiser with the methods' part."""
    trained, frozen, statistics = blueprint.abstract
    scratch = config.model.weights is None and config.model.start is None
    factor = 1.0 if scratch else config.optimizer.encoder_factor
    model: Any = nnx.merge(blueprint.graph, trained, frozen, statistics)
    optimizer = optimizer_lib.make_optimizer(
        config.optimizer, config.steps, trained, factor, methods, model.backbone
    )
    replicated = sharding.replicated(mesh)
    trained_at = sharding.parameter_shardings(mesh, trained)
    zero: Any = jax.ShapeDtypeStruct((), jnp.int32)
    shapes = TrainState(zero, trained, frozen, statistics, jax.eval_shape(optimizer.init, trained))
    places = TrainState(
        replicated,  # pyright: ignore[reportArgumentType]
        trained_at,
        sharding.parameter_shardings(mesh, frozen),
        jax.tree.map(lambda _: replicated, statistics),
        sharding.optimizer_shardings(mesh, optimizer, trained, trained_at),
    )
    like = jax.tree.map(
        lambda s, at: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=at), shapes, places
    )
    return like, optimizer


def initial_state(task: Task, blueprint: Blueprint, like: TrainState, optimizer: Any) -> TrainState:
    """The state at step 0: random parameters, then another run's model or converted weights."""
    # Stream 1 of the seed; stream 0 is the steps'.
    key = jax.random.fold_in(jax.random.key(task.config.seed), 2**31)
    places = jax.tree.map(lambda leaf: leaf.sharding, like)
    if extending(task):  # these need loaded weights
        model: Any = blueprint.make(key)
        load_start(task, model)
        blueprint.extend(model, key)
        trained, frozen, statistics = jax.device_put(
            blueprint.split(model), (places.trained, places.frozen, places.statistics)
        )
        opt_state = jax.jit(optimizer.init, out_shardings=places.opt_state)(trained)
        zero = jax.device_put(jnp.zeros((), jnp.int32), places.step)
        return TrainState(zero, trained, frozen, statistics, opt_state)

    def init(key):
        trained, frozen, statistics = blueprint.split(blueprint.make(key))
        zero = jnp.zeros((), jnp.int32)
        return TrainState(zero, trained, frozen, statistics, optimizer.init(trained))

    state = jax.jit(init, out_shardings=places)(key)
    model = nnx.merge(blueprint.graph, state.trained, state.frozen, state.statistics)
    load_start(task, model)
    state.trained, state.frozen, state.statistics = blueprint.split(model)
    if task.methods:  # their transformations start from loaded weights
        state.opt_state = None  # memory need not hold it twice
        state.opt_state = jax.jit(optimizer.init, out_shardings=places.opt_state)(state.trained)
    return state


def load_start(task: Task, model: Any) -> None:
    """Fills a model with another run's model or with converted weights.

    Raises:
        ValueError: the other run's model does not fit, or holds texts of other class names.
    """
    start = task.config.model.start
    if not start:
        task.load_weights(model)
        return
    other = opened(start)
    names = other.task(other.config).labels.names
    if other.config.model.text_weights and names != task.labels.names:
        raise ValueError(
            f"model.start {start} holds texts of the classes {join_names(names)}; allowed: a run"
            f" with the classes of this one, {join_names(task.labels.names)}"
        )
    weights.fill(model, other.tensors(), start)


class Workdir:
    """A trained model in the workdir of its run."""

    def __init__(self, folder: Path, step: int | None = None):
        """Reads nothing yet.

        Args:
            folder: the workdir.
            step: of the checkpoint; None for the newest that can be read.
        """
        self.folder = folder
        self._step = step

    def __str__(self) -> str:
        return str(self.folder)

    @functools.cached_property
    def config(self) -> Config:
        """The configuration of the run; raises what `config.load` raises."""
        return config_lib.load(self.folder)

    def home(self) -> Path:
        """The folder for what is made of the model, if none is named."""
        return self.folder

    def task(self, config: Config) -> Task:
        """The task of the run, under a configuration that may judge it in another way."""
        return make_task(config)

    def trained_on(self) -> TrainedOn | None:
        """The images that it was trained on, if they were noted.

        Raises:
            ValueError: the note is damaged.
        """
        return TrainedOn.load(self.folder)

    def results(self, step: int) -> list[dict[str, Any]]:
        """The contents of every results.json of a step."""
        paths = [self.folder / "results.json"]
        paths += sorted(self.folder.glob(f"evaluation_{step}*/results.json"))
        found = [workdir_lib.results(path) for path in paths]
        return [results for results in found if results is not None and results["step"] == step]

    def card(self) -> dict[str, Any]:
        """What is known of it for people: what it was converted from, and the record of weights
        that the run knew by a name.
        """
        notes = {"converted_from": "conversion.json", "fetched": "weights.json"}
        read = {key: files.read_json(self.folder / name) for key, name in notes.items()}
        return {key: content for key, content in read.items() if content is not None}

    def tensors(self) -> dict[str, np.ndarray]:
        """The parameters and running statistics by per-block name; raises as `restore`."""
        mesh = sharding.make_mesh(MeshConfig(1, 1), jax.local_devices()[:1])
        blueprint, state, _ = self.restore(self.task(self.config), mesh)
        return weights.tensors(nnx.merge(blueprint.graph, *state))

    def restore(self, task: Task, mesh: Mesh) -> tuple[Blueprint, ModelState, int]:
        """The model on devices: (blueprint, state, step).

        Args:
            task: of `task`.
            mesh: the devices.

        Raises:
            FileNotFoundError: the workdir holds no checkpoint.
            ValueError: it is corrupted or belongs to another model.
        """
        from jaxdg.training.checkpoint import Checkpoints  # needs orbax, as nothing else here does

        if not (self.folder / "checkpoints").is_dir():
            raise FileNotFoundError(
                f"{self.folder} holds no checkpoints; train first, or give another workdir"
            )
        checkpoints = Checkpoints(self.folder, read_only=True)
        blueprint = stored_blueprint(checkpoints, self._step, task)
        like, _ = abstract_state(blueprint, task.config, mesh)
        stored = checkpoints.restore_model(like, self._step)
        checkpoints.close()
        if stored is None:
            raise FileNotFoundError(
                f"{self.folder}/checkpoints is empty; train first, or give another workdir"
            )
        state = stored["trained"], stored["frozen"], stored["statistics"]
        return blueprint, state, int(stored["step"])


class PackedModel:
    """A trained model in a file, see `packed`; its members are those of `Workdir`."""

    def __init__(self, path: Path):
        """Reads what the file says; raises as `packed.read`."""
        self._path = path
        self._packed = packed.read(path)
        self.config = self._packed.config

    def __str__(self) -> str:
        return str(self._path)

    def home(self) -> Path:
        """See `Workdir.home`: there is none."""
        raise ValueError(
            f"--out is needed: {self._path} is a file, beside which nothing is written; give a"
            " folder"
        )

    def task(self, config: Config) -> Task:
        """See `Workdir.task`."""
        return make_task(config, labels=self._packed.labels)

    def trained_on(self) -> TrainedOn | None:
        """See `Workdir.trained_on`."""
        return self._packed.trained_on

    def results(self, step: int) -> list[dict[str, Any]]:
        """See `Workdir.results`."""
        return list(self._packed.results) if step == self._packed.step else []

    def card(self) -> dict[str, Any]:
        """See `Workdir.card`: that of the file."""
        return self._packed.card

    def tensors(self) -> dict[str, np.ndarray]:
        """See `Workdir.tensors`."""
        return packed.tensors(self._path)

    def restore(self, task: Task, mesh: Mesh) -> tuple[Blueprint, ModelState, int]:
        """See `Workdir.restore`."""
        blueprint = Blueprint.stored(task, self._packed.segment_ends, set(self._packed.frozen))
        like, _ = abstract_state(blueprint, task.config, mesh)
        model = nnx.merge(blueprint.graph, like.trained, like.frozen, like.statistics)
        weights.fill(model, self.tensors(), self._path)
        return blueprint, blueprint.split(model), self._packed.step


Trained = Workdir | PackedModel


def opened(checkpoint: str | Path) -> Trained:
    """A trained model: a workdir, one step in it, or a packed file, also one of the Hugging Face
    hub (`hf://OWNER/REPO/FILE`).

    Raises:
        FileNotFoundError: no such packed file; a workdir is looked at when something is asked of
            it.
        ValueError: a file that is no packed one.
    """
    path = paths.local(checkpoint)
    if path.is_file() or (path.suffix == packed.SUFFIX and not path.is_dir()):
        return PackedModel(path)
    if path.name.isdigit() and (path.parent.parent / "config.json").is_file():
        return Workdir(path.parent.parent, int(path.name))
    return Workdir(path)


def stored_tensors(checkpoint: str | Path) -> dict[str, np.ndarray]:
    """The parameters and running statistics of a trained model; raises what `load` raises."""
    return opened(checkpoint).tensors()


def stored_blueprint(checkpoints: "Checkpoints", step: int | None, task: Task) -> Blueprint:
    """The model in the newest checkpoint, or in that of `step`.

    The training decided where segments end and what was frozen, so the checkpoint tells both.
    """
    for at in checkpoints.steps()[::-1] if step is None else [step]:
        try:
            shapes = checkpoints.shapes(at)
        except Exception:  # a damaged file can raise anything; reading its arrays reports it
            continue
        parameters = {}
        frozen = set()
        for name, shape in shapes.items():
            part, *path = name.removesuffix(".value").split(".")
            if part in ("trained", "frozen"):
                parameters[tuple(path)] = shape
            if part == "frozen":
                frozen |= weights.named(tuple(path), shape).keys()
        return Blueprint.stored(task, weights.segment_ends(parameters, "backbone"), frozen)
    return Blueprint.of(task, task.config.model.freeze)
