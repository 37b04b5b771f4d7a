"""`jaxdg.load`: loads a trained model for prediction, from its workdir or a packed file."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from flax import nnx
import jax
from jaxtyping import Array, Float32, UInt8
import numpy as np

from jaxdg.config import Config, MeshConfig
from jaxdg.evaluation.average_precision import Detections
from jaxdg.tasks.run_state import Trained, opened
from jaxdg.tasks.task import ModelState, Task
from jaxdg.training import sharding


class Model:
    """A trained model, which predicts images of any size."""

    def __init__(self, task: Task, graph: nnx.GraphDef, state: ModelState, step: int):
        """See `load`."""
        self.task = task
        self.step = step
        self.labels = task.labels
        self.graph = graph
        self.state = state
        self._start = task.batch_predictor(graph)

    def predict(
        self, image: np.ndarray | Array, *, tta: bool = False
    ) -> UInt8[np.ndarray, "h w"] | Detections:
        """Predicts an image.

        Args:
            image: RGB, uint8 [h, w, 3], of any size; segmentation compiles once for similar sizes.
            tta: of segmentation, test-time augmentation: the class probabilities of six sizes, each
                also mirrored, are averaged.

        Returns:
            For segmentation, an id into `labels.names` for every pixel. For detection, boxes in
            pixels of the image, scores and classes, by falling score.

        Raises:
            ValueError: the array is no such image, or detection has no `tta`.
        """
        return self.start([_checked(image, "predict")], tta=tta)()[0]

    def scores(
        self, image: np.ndarray | Array, *, tta: bool = False
    ) -> Float32[np.ndarray, "h w k"]:
        """The probability of every class at every pixel, from segmentation.

        Args:
            image: as for `predict`.
            tta: as for `predict`.

        Returns:
            Probabilities of `labels.names`, which add up to 1. The highest is the class of
            `predict`, the first of equal ones. How they follow from a decoder's scores is its
            `probabilities`; with `tta` they are the mean of softmaxes, as in mmsegmentation.

        Raises:
            ValueError: the array is no such image, or the model detects boxes.
        """
        return self.start([_checked(image, "scores")], scores=True, tta=tta)()[0][1]

    def start(
        self, images: Sequence[np.ndarray], *, scores: bool = False, tta: bool = False
    ) -> Callable[[], list[Any]]:
        """Starts to predict a batch of images, while the caller does other things.

        Args:
            images: uint8 [h, w, 3], of sizes that `task.padded` makes one.
            scores: also the probabilities of `scores`.
            tta: as for `predict`.

        Returns:
            A function that waits for the prediction of each image, or with `scores` for pairs of it
            and its probabilities.
        """
        with jax.enable_x64(False):
            return self._start(self.state, images, scores, tta)


def _checked(image: np.ndarray | Array, what: str) -> UInt8[np.ndarray, "h w 3"]:
    image = np.asarray(image)
    if image.ndim != 3 or image.shape[-1] != 3 or image.dtype != np.uint8 or not image.size:
        raise ValueError(
            f"{what} takes an RGB image uint8 [h, w, 3]; got {image.dtype} {list(image.shape)}"
        )
    return image


def load(checkpoint: str | Path) -> Model:
    """Loads a trained model.

    Args:
        checkpoint: a workdir, for its last readable checkpoint, or one step in it, such as
            `runs/streets/checkpoints/1000`, or a file of `jaxdg pack`, also one of the
            Hugging Face hub as `hf://OWNER/REPO[@REVISION]/FILE`.

    Returns:
        The model, on the first device.

    Raises:
        FileNotFoundError: no such workdir or file.
        ValueError: the checkpoint is corrupted or belongs to another model, or the file is no
            packed model.
    """
    trained = opened(checkpoint)
    return restored(trained, trained.config)


def restored(trained: Trained, config: Config) -> Model:
    """Loads a trained model that computes as another configuration says, which builds the same
    parameters; raises as `load`.
    """
    with jax.enable_x64(False):  # the caller may have turned it on; checkpoints are made without
        task = trained.task(config)
        mesh = sharding.make_mesh(MeshConfig(data=1, fsdp=1), jax.local_devices()[:1])
        blueprint, state, at = trained.restore(task, mesh)
    return Model(task, blueprint.graph, state, at)
