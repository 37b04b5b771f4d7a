"""The two tasks by name, what a run is built of, and `jaxdg.load`.

A task (see `task.py`) knows how its data are opened, how its model is made, what its losses are and
how one domain is judged; `train`, `evaluate` and `predict` know nothing else of it.
"""

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
from jaxdg import weights
from jaxdg.config import Config, MeshConfig
from jaxdg.methods.method import Method
from jaxdg.tasks.detection import Detection
from jaxdg.tasks.segmentation import Segmentation
from jaxdg.tasks.task import ModelState, Task
from jaxdg.training import optimizer as optimizer_lib
from jaxdg.training import sharding
from jaxdg.training.checkpoint import Checkpoints
from jaxdg.training.step import TrainState


def make_task(config: Config, methods: tuple[Method, ...] = ()) -> Task:
    """The task of a run; needs no data.

    Args:
        config: of the run.
        methods: that training uses (`jaxdg.methods.active`); none for evaluation and prediction.
    """
    return (
        Detection(config, methods) if config.task == "detection" else Segmentation(config, methods)
    )


@dataclasses.dataclass
class Blueprint:
    """A run's model before any array exists.

    Attributes:
        make: key to the model.
        extend: adds to a model with loaded weights what the methods add.
        graph: of `nnx.split`.
        split: model to (trained, frozen, statistics).
        abstract: that of an abstract model.
        frozen: names of the frozen parameters.
        finished: the model that is left when training ends; itself, where no method changes the
            model.
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
        """Decides by name what is frozen, and ends stacked segments where that changes.

        What the model calls unused stays as loaded too: its gradient is 0, but weight decay would
        move it.
        """
        key = jax.random.key(0)
        wanted = {block for method in task.methods for block in method.boundaries(task.depth)}
        first: Any = nnx.eval_shape(lambda: extended(task, key, tuple(sorted(wanted))))
        slots = weights.slots(nnx.state(first, nnx.Param))
        frozen = frozen_parameters(task, freeze, first, list(slots))
        boundaries = tuple(sorted(wanted.union(optimizer_lib.freeze_boundaries(frozen, slots))))
        blueprint = cls.stored(task, boundaries, frozen)
        if any(method.changes_model for method in task.methods):
            plain = make_task(task.config)
            taps = tuple(sorted({*boundaries, *first.backbone.config.taps}))
            model: Any = nnx.eval_shape(lambda: plain.model(nnx.Rngs(key)))
            names = list(weights.slots(nnx.state(model, nnx.Param)))
            blueprint.finished = cls.stored(
                plain, taps, frozen_parameters(plain, freeze, model, names)
            )
        return blueprint

    @classmethod
    def stored(cls, task: Task, boundaries: Sequence[int], frozen: set[str]) -> "Blueprint":
        """The model whose stacked segments also end after `boundaries`, with the named parameters
        frozen.
        """
        model = nnx.eval_shape(lambda: extended(task, jax.random.key(0), boundaries))
        paths = {
            slot.path
            for name, slot in weights.slots(nnx.state(model, nnx.Param)).items()
            if name in frozen
        }

        def is_frozen(path, _):
            return path in paths

        def split(model: nnx.Module) -> ModelState:
            return tuple(  # pyright: ignore
                nnx.split(
                    model,
                    nnx.All(nnx.Param, nnx.Not(is_frozen)),
                    nnx.All(nnx.Param, is_frozen),
                    ...,
                )[1:]
            )

        def make(key):
            return task.model(nnx.Rngs(key), boundaries)

        return cls(
            make,
            lambda model, key: extend(task, model, key),
            nnx.split(model, nnx.Param, ...)[0],
            split,
            split(model),
            frozen,
        )

    def finish(self, task: Task, state: TrainState) -> ModelState:
        """What is left of a training state when training ends: (trained, frozen, statistics) of
        `finished`, which must be there.
        """
        assert self.finished is not None
        model = nnx.merge(self.graph, state.trained, state.frozen, state.statistics, copy=True)
        states = optimizer_lib.method_states(state.opt_state, task.methods)
        for method, own in zip(task.methods, states, strict=True):
            method.finish(model, own)
        return self.finished.split(model)


def extended(task: Task, key: Key[Array, ""], boundaries: Sequence[int]) -> nnx.Module:
    """The model with what the methods add to it."""
    model = task.model(nnx.Rngs(key), boundaries)
    extend(task, model, key)
    return model


def extend(task: Task, model: Any, key: Key[Array, ""]) -> None:
    """Adds what the methods add to a model; each draws from a stream of its own."""
    for i, method in enumerate(task.methods):
        method.extend(model, nnx.Rngs(jax.random.fold_in(key, i)))


def frozen_parameters(task: Task, freeze: str, model: Any, names: Sequence[str]) -> set[str]:
    """Which parameters of a model stay as they are: as `model.freeze` and the methods say, and
    those that nothing uses.
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
    """The run's train state as shapes with shardings, and its optimiser with what the methods put
    behind it.
    """
    trained, frozen, statistics = blueprint.abstract
    scratch = config.model.weights is None and config.model.start is None
    factor = 1.0 if scratch else config.optimizer.encoder_factor
    optimizer = optimizer_lib.make_optimizer(
        config.optimizer, config.steps, trained, factor, methods
    )
    whole = sharding.replicated(mesh)
    trained_at = sharding.parameter_shardings(mesh, trained)
    zero: Any = jax.ShapeDtypeStruct((), jnp.int32)
    shapes = TrainState(zero, trained, frozen, statistics, jax.eval_shape(optimizer.init, trained))
    places = TrainState(
        whole,  # pyright: ignore[reportArgumentType]
        trained_at,
        sharding.parameter_shardings(mesh, frozen),
        jax.tree.map(lambda _: whole, statistics),
        sharding.optimizer_shardings(mesh, optimizer, trained, trained_at),
    )
    return (
        jax.tree.map(
            lambda s, at: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=at), shapes, places
        ),
        optimizer,
    )


def initial_state(task: Task, blueprint: Blueprint, like: TrainState, optimizer: Any) -> TrainState:
    """Random parameters, made where they belong, with another run's model or converted weights put
    in.
    """
    # Stream 1 of the seed; stream 0 is the steps'.
    key = jax.random.fold_in(jax.random.key(task.config.seed), 2**31)
    places = jax.tree.map(lambda leaf: leaf.sharding, like)
    if task.methods:  # they add to a model whose weights are there
        model: Any = blueprint.make(key)
        load_start(task, model)
        blueprint.extend(model, key)
        trained, frozen, statistics = jax.device_put(
            blueprint.split(model), (places.trained, places.frozen, places.statistics)
        )
        opt_state = jax.jit(optimizer.init, out_shardings=places.opt_state)(trained)
        return TrainState(
            jax.device_put(jnp.zeros((), jnp.int32), places.step),
            trained,
            frozen,
            statistics,
            opt_state,
        )

    def init(key):
        trained, frozen, statistics = blueprint.split(blueprint.make(key))
        return TrainState(
            jnp.zeros((), jnp.int32), trained, frozen, statistics, optimizer.init(trained)
        )

    state = jax.jit(init, out_shardings=places)(key)
    model = nnx.merge(blueprint.graph, state.trained, state.frozen, state.statistics)
    load_start(task, model)
    state.trained, state.frozen, state.statistics = blueprint.split(model)
    return state


def load_start(task: Task, model: Any) -> None:
    """Puts another run's whole model, or converted weights, into a model."""
    if start := task.config.model.start:
        weights.fill(model, stored_tensors(start), start)
    else:
        task.load_weights(model)


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
    blueprint, state, _ = restore_model(
        workdir,
        step,
        config,
        make_task(config),
        sharding.make_mesh(MeshConfig(1, 1), jax.local_devices()[:1]),
    )
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
    return (
        blueprint,
        (stored["trained"], stored["frozen"], stored["statistics"]),
        int(stored["step"]),
    )


def stored_blueprint(
    checkpoints: Checkpoints, step: int | None, task: Task, freeze: str
) -> Blueprint:
    """The model as its newest checkpoint holds it, or as that of `step` does.

    How it was trained decides where its stacked segments end and what was frozen, so both are read
    from the checkpoint.
    """
    for at in checkpoints.steps()[::-1] if step is None else [step]:
        try:
            shapes = checkpoints.shapes(at)
        except (
            Exception
        ):  # whatever a damaged file leads to; whoever reads its arrays says what is wrong
            continue
        paths = {
            tuple(name.removesuffix(".value").split(".")): shape for name, shape in shapes.items()
        }
        frozen = {
            name
            for path, shape in paths.items()
            if path[0] == "frozen"
            for name in weights.named(path[1:], shape)
        }
        inner = {
            path[1:]: shape for path, shape in paths.items() if path[0] in ("trained", "frozen")
        }
        return Blueprint.stored(task, weights.segment_ends(inner, "backbone"), frozen)
    return Blueprint.of(task, freeze)
