"""Builds a run's task, model and train state, and restores them from checkpoints."""

from collections.abc import Callable, Sequence
import dataclasses
from pathlib import Path
from typing import Any

from flax import nnx
import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jaxtyping import Array, Key
import numpy as np

from jaxdg import config as config_lib
from jaxdg import methods as method_lib
from jaxdg import weights
from jaxdg.config import Config, MeshConfig
from jaxdg.data.labels import join_names
from jaxdg.methods.method import Method
from jaxdg.tasks.detection import Detection
from jaxdg.tasks.segmentation import Segmentation
from jaxdg.tasks.task import ModelState, Task
from jaxdg.training import optimizer as optimizer_lib
from jaxdg.training import sharding
from jaxdg.training.checkpoint import Checkpoints
from jaxdg.training.step import TrainState


def make_task(config: Config, methods: tuple[Method, ...] | None = None) -> Task:
    """The task of a run; needs no data.

    Args:
        config: of the run.
        methods: that training uses (`jaxdg.methods.active`); None for evaluation and prediction,
            which use those whose modules stay in the model.
    """
    task = Detection if config.task == "detection" else Segmentation
    return task(config, method_lib.lasting(config) if methods is None else methods)


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
            taps = tuple(sorted({*boundaries, *first.backbone.config.taps}))
            model: Any = nnx.eval_shape(lambda: extended(plain, key, ()))
            names = list(weights.slots(nnx.state(model, nnx.Param)))
            frozen = frozen_parameters(plain, freeze, model, names)
            blueprint.finished = cls.stored(plain, taps, frozen)
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
            make=lambda key: task.model(nnx.Rngs(key), boundaries),
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
    model = task.model(nnx.Rngs(key), boundaries)
    extend(task, model, key)
    return model


def extend(task: Task, model: Any, key: Key[Array, ""]) -> None:
    """Adds the methods' modules to a model; each method has its own random stream."""
    for i, method in enumerate(extending(task)):
        method.extend(model, nnx.Rngs(jax.random.fold_in(key, i)))


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
    other = config_lib.load(locate(start)[0])
    names = make_task(other).labels.names
    if other.model.text_weights and names != task.labels.names:
        raise ValueError(
            f"model.start {start} holds texts of the classes {join_names(names)}; allowed: a run"
            f" with the classes of this one, {join_names(task.labels.names)}"
        )
    weights.fill(model, stored_tensors(start), start)


def locate(checkpoint: str | Path) -> tuple[Path, int | None]:
    """A workdir, or one step in it, as (workdir, step or None)."""
    path = Path(checkpoint)
    if path.name.isdigit() and (path.parent.parent / "config.json").is_file():
        return path.parent.parent, int(path.name)
    return path, None


def stored_tensors(checkpoint: str | Path) -> dict[str, np.ndarray]:
    """The parameters and running statistics of a trained model; raises what `load` raises."""
    workdir, step = locate(checkpoint)
    config = config_lib.load(workdir)
    mesh = sharding.make_mesh(MeshConfig(1, 1), jax.local_devices()[:1])
    blueprint, state, _ = restore_model(workdir, step, config, make_task(config), mesh)
    return weights.tensors(nnx.merge(blueprint.graph, *state))


def restore_model(
    workdir: Path, step: int | None, config: Config, task: Task, mesh: Mesh
) -> tuple[Blueprint, ModelState, int]:
    """The model of a checkpoint, without its optimiser: (blueprint, state, step)."""
    if not (workdir / "checkpoints").is_dir():
        raise FileNotFoundError(
            f"{workdir} holds no checkpoints; train first, or give another workdir"
        )
    checkpoints = Checkpoints(workdir, read_only=True)
    blueprint = stored_blueprint(checkpoints, step, task, config.model.freeze)
    like, _ = abstract_state(blueprint, config, mesh)
    stored = checkpoints.restore_model(like, step)
    checkpoints.close()
    if stored is None:
        raise FileNotFoundError(
            f"{workdir}/checkpoints is empty; train first, or give another workdir"
        )
    state = stored["trained"], stored["frozen"], stored["statistics"]
    return blueprint, state, int(stored["step"])


def stored_blueprint(
    checkpoints: Checkpoints, step: int | None, task: Task, freeze: str
) -> Blueprint:
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
    return Blueprint.of(task, freeze)
