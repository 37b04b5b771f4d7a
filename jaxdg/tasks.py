"""The two tasks by name, what a run is built of, and `jaxdg.load`.

A task (see `task.py`) knows how its data are opened, how its model is made, what its losses are and how one domain is judged; `train`,
`evaluate` and `predict` know nothing else of it.
"""

from collections.abc import Callable
import dataclasses
from pathlib import Path
from typing import Any

from flax import nnx
import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jaxtyping import Array, Key, UInt8
import numpy as np

from jaxdg import config as config_lib
from jaxdg import weights
from jaxdg.config import Config, MeshConfig
from jaxdg.detection.average_precision import Detections
from jaxdg.detection_task import Detection
from jaxdg.segmentation_task import Segmentation
from jaxdg.task import ModelState, Task
from jaxdg.training import optimizer as optimizer_lib
from jaxdg.training import sharding
from jaxdg.training.checkpoint import Checkpoints
from jaxdg.training.step import TrainState


def make_task(config: Config) -> Task:
    """The task of a run; needs no data."""
    return Detection(config) if config.task == "detection" else Segmentation(config)


@dataclasses.dataclass
class Plan:
    """A run's model before any array exists.

    Attributes:
        make: key to the model.
        graph: of `nnx.split`.
        split: model to (trained, frozen, statistics).
        abstract: that of an abstract model.
        frozen: names of the frozen parameters.
    """

    make: Callable[[Key[Array, ""]], nnx.Module]
    graph: nnx.GraphDef
    split: Callable[[nnx.Module], ModelState]
    abstract: ModelState
    frozen: set[str]

    @classmethod
    def of(cls, task: Task, freeze: str) -> "Plan":
        """Decides by name what is frozen, and ends stacked segments where that changes.

        What the model calls unread stays as loaded too: its gradient is 0, but weight decay would move it.
        """
        key = jax.random.key(0)
        first = nnx.eval_shape(lambda: task.model(nnx.Rngs(key)))
        names = list(weights.slots(nnx.state(first, nnx.Param)))
        unread = getattr(first, "unread", lambda name: False)
        frozen = optimizer_lib.frozen_names(freeze, names) | {name for name in names if unread(name)}
        boundaries = optimizer_lib.freeze_boundaries(frozen, names)
        make = lambda key: task.model(nnx.Rngs(key), boundaries)
        model = nnx.eval_shape(lambda: make(key)) if boundaries else first
        paths = {slot.path for name, slot in weights.slots(nnx.state(model, nnx.Param)).items() if name in frozen}
        is_frozen = lambda path, _: path in paths

        def split(model: nnx.Module) -> ModelState:
            return tuple(nnx.split(model, nnx.All(nnx.Param, nnx.Not(is_frozen)), nnx.All(nnx.Param, is_frozen), ...)[1:])  # pyright: ignore

        return cls(make, nnx.split(model, nnx.Param, ...)[0], split, split(model), frozen)


def abstract_state(plan: Plan, config: Config, mesh: Mesh) -> tuple[TrainState, Any]:
    """The run's train state as shapes with shardings, and its optimiser."""
    trained, frozen, statistics = plan.abstract
    scratch = config.model.weights is None and config.model.start is None
    factor = 1.0 if scratch else config.optimizer.encoder_factor
    optimizer = optimizer_lib.make_optimizer(config.optimizer, config.steps, trained, factor)
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
    return jax.tree.map(lambda s, at: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=at), shapes, places), optimizer


def initial_state(task: Task, plan: Plan, like: TrainState, optimizer: Any) -> TrainState:
    """Random parameters, made where they belong, with another run's model or converted weights put in."""

    def init(key):
        trained, frozen, statistics = plan.split(plan.make(key))
        return TrainState(jnp.zeros((), jnp.int32), trained, frozen, statistics, optimizer.init(trained))

    # Stream 1 of the seed; stream 0 is the steps'.
    key = jax.random.fold_in(jax.random.key(task.config.seed), 2**31)
    state = jax.jit(init, out_shardings=jax.tree.map(lambda leaf: leaf.sharding, like))(key)
    model: Any = nnx.merge(plan.graph, state.trained, state.frozen, state.statistics)
    if start := task.config.model.start:
        weights.fill(model, stored_tensors(start), start)
    else:
        task.load_weights(model)
    state.trained, state.frozen, state.statistics = plan.split(model)
    return state


class Model:
    """A trained model: `predict` says what it sees in an image of any size."""

    def __init__(self, task: Task, graph: nnx.GraphDef, state: ModelState, step: int):
        """See `load`."""
        self.task, self.step, self.labels = task, step, task.labels
        self.graph, self.state, self._predict = graph, state, task.predictor(graph)

    def predict(self, image: np.ndarray | Array) -> UInt8[np.ndarray, "h w"] | Detections:
        """What is seen in an image.

        Args:
            image: RGB, uint8 [h, w, 3], of any size; segmentation compiles once for many alike.

        Returns:
            Of segmentation, ids into `labels.names` of every pixel. Of detection, the boxes of the things found, their scores and classes;
            the best first, in pixels of the image.

        Raises:
            ValueError: no such image.
        """
        image = np.asarray(image)
        if image.ndim != 3 or image.shape[-1] != 3 or image.dtype != np.uint8 or not image.size:
            raise ValueError(f"predict takes an RGB image uint8 [h, w, 3]; got {image.dtype} {list(image.shape)}")
        with jax.enable_x64(False):
            return self._predict(self.state, image)


def load(checkpoint: str | Path) -> Model:
    """Loads a trained model.

    Args:
        checkpoint: a workdir, for its last readable checkpoint, or one step in it, such as `runs/streets/checkpoints/1000`.

    Returns:
        The model, on the first device.

    Raises:
        FileNotFoundError: no such workdir.
        ValueError: the checkpoint is corrupted or belongs to another model.
    """
    workdir, step = locate(checkpoint)
    config = config_lib.load(workdir)
    with jax.enable_x64(False):  # a program of one's own may want it; a checkpoint holds what was made without
        task = make_task(config)
        mesh = sharding.make_mesh(MeshConfig(data=1, fsdp=1), jax.local_devices()[:1])
        plan, state, at = restore_model(workdir, step, config, task, mesh)
    return Model(task, plan.graph, state, at)


def locate(checkpoint: str | Path) -> tuple[Path, int | None]:
    """A workdir, or one step in it, as (workdir, step or None)."""
    path = Path(checkpoint)
    if path.name.isdigit() and (path.parent.parent / "config.json").is_file():
        return path.parent.parent, int(path.name)
    return path, None


def stored_tensors(checkpoint: str | Path) -> dict[str, np.ndarray]:
    """All parameters and running statistics of a trained model by per-block name; errors as `load`."""
    workdir, step = locate(checkpoint)
    config = config_lib.load(workdir)
    plan, state, _ = restore_model(workdir, step, config, make_task(config), sharding.make_mesh(MeshConfig(1, 1), jax.local_devices()[:1]))
    return weights.tensors(nnx.merge(plan.graph, *state))


def restore_model(workdir: Path, step: int | None, config: Config, task: Task, mesh: Mesh) -> tuple[Plan, ModelState, int]:
    """The model of a checkpoint, without its optimiser: (plan, state, step)."""
    plan = Plan.of(task, config.model.freeze)
    like, _ = abstract_state(plan, config, mesh)
    if not (workdir / "checkpoints").is_dir():
        raise FileNotFoundError(f"{workdir} holds no checkpoints; train first, or give another workdir")
    checkpoints = Checkpoints(workdir, read_only=True)
    stored = checkpoints.restore_model(like, step)
    checkpoints.close()
    if stored is None:
        raise FileNotFoundError(f"{workdir}/checkpoints is empty; train first, or give another workdir")
    return plan, (stored["trained"], stored["frozen"], stored["statistics"]), int(stored["step"])
