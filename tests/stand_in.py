"""`predict` with a stand-in for the model, in the test's own process."""

from collections.abc import Callable, Sequence
from pathlib import Path
import types
from typing import Any

import numpy as np

from jaxdg import predict
from jaxdg.config import Config
from jaxdg.data.labels import CITYSCAPES
from jaxdg.evaluation.average_precision import Detections
from jaxdg.tasks.loading import Model

FLAGS = {
    "_CHECKPOINT": "run",
    "_SCORE_THRESHOLD": 0.3,
    "_BATCH_SIZE": 1,
    "_SCORES": False,
    "_LABEL_MAPS": False,
    "_TTA": False,
}


def classes_of(image: np.ndarray) -> np.ndarray:
    """What the stand-in predicts: the class of a pixel is its red value over 10."""
    return (image[..., 0] // 10 % 19).astype(np.uint8)


class Stand(Model):
    """In place of a trained model: `classes_of`, or one box of the first pixel's class is seen.

    Attributes:
        batches: the sizes of the images of each batch so far.
    """

    def __init__(self, config: Config):
        """Holds no parameters."""
        self.labels = CITYSCAPES
        self.batches: list[list[tuple[int, int]]] = []
        self.task = types.SimpleNamespace(
            config=config, padded=lambda size: tuple(-(-side // 16) * 16 for side in size)
        )

    def start(
        self, images: Sequence[np.ndarray], *, scores: bool = False, tta: bool = False
    ) -> Callable[[], list[Any]]:
        """See `Model.start`."""
        self.batches.append([image.shape[:2] for image in images])
        return lambda: [self._one(image, scores) for image in images]

    def _one(self, image, scores):
        label = classes_of(image)
        if self.task.config.task == "detection":
            boxes = np.array([[1, 1, 5, 5]], np.float32)
            return Detections(boxes, np.array([0.9], np.float32), label[0, :1].astype(np.int32))
        if not scores:
            return label
        return label, np.where(np.eye(19)[label] == 1, 0.55, 0.025).astype(np.float32)


def command(monkeypatch, task: str) -> Callable[..., Stand]:
    """A function of --out, images and videos, and flags, that predicts them and gives the model."""
    config = Config()
    config.task = task  # pyright: ignore[reportAttributeAccessIssue]
    trained = types.SimpleNamespace(config=config)
    monkeypatch.setattr(predict, "opened", lambda checkpoint: trained)
    monkeypatch.setattr(predict.runtime, "set_up", lambda: None)

    def run(out: Path, *images: object, **flags: object) -> Stand:
        stand = Stand(config)
        monkeypatch.setattr(predict, "load", lambda checkpoint: stand)
        for name, value in {**FLAGS, **flags, "_OUT": str(out)}.items():
            holder = types.SimpleNamespace(value=value)
            monkeypatch.setattr(predict, name, holder, raising=False)
        predict.main(["predict", *map(str, images)])
        return stand

    return run
