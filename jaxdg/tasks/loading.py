"""`jaxdg.load`: a trained model from its workdir, ready to look at images."""

from pathlib import Path

from flax import nnx
import jax
from jaxtyping import Array, UInt8
import numpy as np

from jaxdg import config as config_lib
from jaxdg.config import MeshConfig
from jaxdg.evaluation.average_precision import Detections
from jaxdg.tasks.run_state import locate, make_task, restore_model
from jaxdg.tasks.task import ModelState, Task
from jaxdg.training import sharding


class Model:
    """A trained model: `predict` says what it sees in an image of any size."""

    def __init__(self, task: Task, graph: nnx.GraphDef, state: ModelState, step: int):
        """See `load`."""
        self.task = task
        self.step = step
        self.labels = task.labels
        self.graph = graph
        self.state = state
        self._predict = task.predictor(graph)

    def predict(self, image: np.ndarray | Array) -> UInt8[np.ndarray, "h w"] | Detections:
        """What is seen in an image.

        Args:
            image: RGB, uint8 [h, w, 3], of any size; segmentation compiles once for many alike.

        Returns:
            Of segmentation, ids into `labels.names` of every pixel. Of detection, the boxes of the
            things found, their scores and classes; the best first, in pixels of the image.

        Raises:
            ValueError: no such image.
        """
        image = np.asarray(image)
        if image.ndim != 3 or image.shape[-1] != 3 or image.dtype != np.uint8 or not image.size:
            raise ValueError(
                f"predict takes an RGB image uint8 [h, w, 3]; got {image.dtype} {list(image.shape)}"
            )
        with jax.enable_x64(False):
            return self._predict(self.state, image)


def load(checkpoint: str | Path) -> Model:
    """Loads a trained model.

    Args:
        checkpoint: a workdir, for its last readable checkpoint, or one step in it, such as
            `runs/streets/checkpoints/1000`.

    Returns:
        The model, on the first device.

    Raises:
        FileNotFoundError: no such workdir.
        ValueError: the checkpoint is corrupted or belongs to another model.
    """
    workdir, step = locate(checkpoint)
    config = config_lib.load(workdir)
    with jax.enable_x64(
        False
    ):  # a program of one's own may want it; a checkpoint holds what was made without
        task = make_task(config)
        mesh = sharding.make_mesh(MeshConfig(data=1, fsdp=1), jax.local_devices()[:1])
        blueprint, state, at = restore_model(workdir, step, config, task, mesh)
    return Model(task, blueprint.graph, state, at)
