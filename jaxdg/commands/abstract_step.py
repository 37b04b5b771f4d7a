"""The training step of a configuration as shapes, to be compiled for devices that are not here."""

import dataclasses
import math
from typing import Any

import jax
from jax.sharding import Mesh
import numpy as np

from jaxdg import methods
from jaxdg.config import Config
from jaxdg.data.augment.transforms import BOX_FIELDS
from jaxdg.tasks import run_state as tasks
from jaxdg.tasks.task import Task
from jaxdg.training import sharding
from jaxdg.training.step import TrainState, make_step


@dataclasses.dataclass(frozen=True)
class AbstractStep:
    """A training step and the shapes of what it takes.

    Attributes:
        function: the jitted step.
        state: the train state, with shardings.
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
