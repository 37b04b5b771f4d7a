"""A configuration's training step, or its inference, as shapes: to be compiled for devices that are
not here.
"""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
import numpy as np

from jaxdg import methods
from jaxdg.config import Config
from jaxdg.data.augment.transforms import BOX_FIELDS
from jaxdg.evaluation import protocols
from jaxdg.tasks import run_state as tasks
from jaxdg.tasks.segmentation import Segmentation
from jaxdg.tasks.task import Task
from jaxdg.training import sharding
from jaxdg.training.step import TrainState, make_step


@dataclasses.dataclass(frozen=True)
class AbstractStep:
    """A training step or an inference, and the shapes of what it takes.

    Attributes:
        function: the jitted function of state and batch.
        state: the train state, with shardings; without the optimiser's for inference.
        batch: a global batch, with shardings.
    """

    function: Any
    state: TrainState
    batch: dict[str, Any]

    def compile(self, options: dict[str, str]) -> Any:
        """The program for the devices of the shardings."""
        return self.function.lower(self.state, self.batch).compile(compiler_options=options)


def abstract_step(config: Config, mesh: Mesh) -> AbstractStep:
    """The step of a run on a mesh of any devices.

    Raises:
        ValueError: TLDR is on, whose batches are made with weights that are not here.
    """
    for name, options in methods.settings(config).items():
        if options.on:
            raise ValueError(
                f"{name}.on is True; allowed: False, for a method may need weights, which are not"
                " read here"
            )
    task = tasks.make_task(config)
    model = tasks.Blueprint.of(task, config.model.freeze)
    state, optimizer = tasks.abstract_state(model, config, mesh)
    step = make_step(
        model.graph,
        optimizer,
        task.loss_denominator,
        task.losses,
        jax.random.key(0),
        jax.tree.map(lambda leaf: leaf.sharding, state),
        config.optimizer.accumulate,
    )
    return AbstractStep(step, state, abstract_batch(task, mesh))


def abstract_inference(config: Config, mesh: Mesh, image: tuple[int, int]) -> AbstractStep:
    """Label maps of a batch of images, by the run's sliding windows, on a mesh of any devices.

    Args:
        config: the run's; a batch holds `evaluation.batch_size` images.
        mesh: what the images are divided over.
        image: height and width of the images.

    Raises:
        ValueError: the run is no segmentation, or its batch does not divide over the mesh.
    """
    task = tasks.make_task(config)
    if not isinstance(task, Segmentation):
        raise ValueError(f"--image with task {config.task!r}; allowed: segmentation")
    model = tasks.Blueprint.of(task, config.model.freeze)
    state, _ = tasks.abstract_state(model, config, mesh)
    state = dataclasses.replace(state, step=(), opt_state=())
    label_maps = task.labelling(model.graph)
    protocol = protocols.Protocol("native", config.data.crop, config.evaluation.stride)
    n = task.batch_size(mesh)

    images = jax.ShapeDtypeStruct((n, *image, 3), np.uint8, sharding=sharding.batch_sharding(mesh))
    # Every image fills its array, so the program knows how many windows there are.
    whole = np.full((n, 2), image, np.int32)

    def infer(state: TrainState, batch: dict[str, Any]) -> Any:
        sizes = jnp.asarray(whole)
        label = jnp.zeros((n, *image), jnp.uint8)  # read for its shape alone
        batch = {**batch, "size": sizes, "label": label, "label_size": sizes}
        return label_maps((state.trained, state.frozen, state.statistics), batch, protocol)

    return AbstractStep(jax.jit(infer, keep_unused=True), state, {"image": images})


def abstract_batch(task: Task, mesh: Any) -> dict[str, Any]:
    """The shapes of a global training batch, divided over the mesh."""
    c = task.config

    def of(dtype, *shape):
        return jax.ShapeDtypeStruct(
            (c.batch_size, *shape), dtype, sharding=sharding.batch_sharding(mesh)
        )

    if c.task == "segmentation":
        return {"image": of(np.uint8, *c.data.crop, 3), "label": of(np.uint8, *c.data.crop)}
    n = c.data.max_boxes
    boxes = {key: of(dtype, n, *shape) for key, (shape, dtype) in BOX_FIELDS.items()}
    return {"image": of(np.uint8, *c.data.crop, 3), "valid": of(np.bool_, n), **boxes}


def device_bytes(tree: Any) -> int:
    """Bytes that one device holds of a tree of shapes with shardings."""
    return sum(
        math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in jax.tree.leaves(tree)
    )
