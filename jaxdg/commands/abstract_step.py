"""A configuration's training step with what prepares its batch, or its inference, as shapes: to be
compiled for devices that are not here.
"""

from collections.abc import Sequence
import dataclasses
import math
from typing import Any

from flax import nnx
import jax
import jax.numpy as jnp
from jax.sharding import Mesh
import numpy as np

from jaxdg import methods
from jaxdg.config import Config
from jaxdg.data.augment.transforms import BOX_FIELDS
from jaxdg.evaluation import protocols
from jaxdg.methods.method import Preparation
from jaxdg.tasks import run_state as tasks
from jaxdg.tasks.detection import Detection
from jaxdg.tasks.segmentation import Segmentation
from jaxdg.tasks.task import Task
from jaxdg.training import sharding
from jaxdg.training.step import TrainState, make_step


@dataclasses.dataclass(frozen=True)
class AbstractStep:
    """A training step, a preparation or an inference, and the shapes of what it takes.

    Attributes:
        function: the jitted function of state and batch.
        state: the train state, with shardings; without the optimiser's for inference; of a
            preparation what it holds.
        batch: a global batch, with shardings.
        preparations: programs that run before the step and prepare its batch.
    """

    function: Any
    state: Any
    batch: dict[str, Any]
    preparations: tuple["AbstractStep", ...] = ()

    def compile(self, options: dict[str, str]) -> Any:
        """The program for the devices of the shardings."""
        return self.function.lower(self.state, self.batch).compile(compiler_options=options)


def abstract_step(config: Config, mesh: Mesh) -> AbstractStep:
    """The step of a run on a mesh of any devices, methods included."""
    task = tasks.make_task(config, methods.active(config))
    model = tasks.Blueprint.of(task, config.model.freeze)
    state, optimizer = tasks.abstract_state(model, config, mesh, task.methods)
    step = make_step(
        model.graph,
        optimizer,
        task.loss_denominator,
        task.losses,
        jax.random.key(0),
        jax.tree.map(lambda leaf: leaf.sharding, state),
        config.optimizer.accumulate,
    )
    batch = abstract_batch(task, mesh)
    preparations = []
    for part in task.preparations(mesh):
        program = AbstractStep(_at_step_0(part), part.state, batch)
        preparations.append(program)
        prepared = jax.eval_shape(program.function, program.state, batch)
        batch = {key: _rows(mesh, x.shape, x.dtype) for key, x in prepared.items()}
    return AbstractStep(step, state, batch, tuple(preparations))


def _at_step_0(part: Preparation) -> Any:
    """A preparation as a jitted function of state and batch."""
    return jax.jit(lambda state, batch: part.function(state, batch, 0), keep_unused=True)


def abstract_inference(config: Config, mesh: Mesh, image: tuple[int, int]) -> AbstractStep:
    """The predictions for a batch of images, on a mesh of any devices.

    Segmentation gives label maps by the run's sliding windows. Detection gives boxes. It fits
    images of any size into `data.crop` first, so its program is the same for all sizes.

    Args:
        config: the run's; a batch holds `evaluation.batch_size` images.
        mesh: what the images are divided over.
        image: height and width of the images.
    """
    task = tasks.make_task(config)
    model = tasks.Blueprint.of(task, config.model.freeze)
    state, _ = tasks.abstract_state(model, config, mesh)
    state = dataclasses.replace(state, step=(), opt_state=())
    if isinstance(task, Detection):
        return _detecting(task, model.graph, state, mesh)
    assert isinstance(task, Segmentation)
    return _labelling(task, model.graph, state, mesh, image)


def _labelling(
    task: Segmentation, graph: nnx.GraphDef, state: TrainState, mesh: Mesh, image: tuple[int, int]
) -> AbstractStep:
    """The label maps of a batch of images."""
    c = task.config
    label_maps = task.labelling(graph, mesh)
    protocol = protocols.Protocol("native", task.window, c.evaluation.stride)
    n = task.batch_size(mesh)
    # Every image fills its array, so the program knows how many windows there are.
    whole = np.full((n, 2), image, np.int32)

    def infer(state: TrainState, batch: dict[str, Any]) -> Any:
        sizes = jnp.asarray(whole)
        label = jnp.zeros((n, *image), jnp.uint8)  # read for its shape alone
        batch = {**batch, "size": sizes, "label": label, "label_size": sizes}
        return label_maps((state.trained, state.frozen, state.statistics), batch, protocol)

    batch = {"image": _rows(mesh, (n, *image, 3), np.uint8)}
    return AbstractStep(jax.jit(infer, keep_unused=True), state, batch)


def _detecting(task: Detection, graph: nnx.GraphDef, state: TrainState, mesh: Mesh) -> AbstractStep:
    """The boxes in a batch of fitted images; every host gets all of them."""
    n = task.batch_size(mesh)

    def infer(state: TrainState, batch: dict[str, Any]) -> Any:
        model_state = state.trained, state.frozen, state.statistics
        with sharding.gathered(model_state, mesh) as whole:
            return task.detect(graph, whole, batch["image"], batch["inside"])

    batch = {
        "image": _rows(mesh, (n, *task.config.data.crop, 3), np.uint8),
        "inside": _rows(mesh, (n, 2), np.float32),
    }
    function = jax.jit(infer, keep_unused=True, out_shardings=sharding.replicated(mesh))
    return AbstractStep(function, state, batch)


def abstract_batch(task: Task, mesh: Any) -> dict[str, Any]:
    """The shapes of a global training batch, divided over the mesh."""
    c = task.config

    def of(dtype, *shape):
        return _rows(mesh, (c.batch_size, *shape), dtype)

    batch = {"image": of(np.uint8, *c.data.crop, 3)}
    if any(method.wants_pictures for method in task.methods):
        batch["style"] = batch["image"]
    if methods.corruptions(task.methods):
        batch["corrupted"] = batch["image"]
    if c.data.padding == "corner":
        batch["inside"] = of(np.int32, 2)
    if c.task == "segmentation":
        return {**batch, "label": of(np.uint8, *c.data.crop)}
    n = c.data.max_boxes
    boxes = {key: of(dtype, n, *shape) for key, (shape, dtype) in BOX_FIELDS.items()}
    return {**batch, "valid": of(np.bool_, n), **boxes}


def _rows(mesh: Mesh, shape: Sequence[int], dtype: Any) -> jax.ShapeDtypeStruct:
    """An array whose rows are divided over the mesh."""
    return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding.batch_sharding(mesh))


def device_bytes(tree: Any) -> int:
    """Bytes that one device holds of a tree of shapes with shardings."""
    return sum(
        math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in jax.tree.leaves(tree)
    )
