"""Images through a model in batches, as `predict` does it."""

from collections.abc import Callable, Iterator
import dataclasses
import functools
from typing import Any

import cv2
import jax
import numpy as np

from jaxdg.tasks.loading import Model


@dataclasses.dataclass(frozen=True)
class Options:
    """How images are predicted.

    Attributes:
        batch_size: images at once.
        scores: probabilities are written, too.
        tta: test-time augmentation.
        frames: of videos, files of every frame are written, too.
        score_threshold: least score of a box that counts.
    """

    batch_size: int = 1
    scores: bool = False
    tta: bool = False
    frames: bool = False
    score_threshold: float = 0.3


Item = tuple[Any, np.ndarray]  # an image, and what it belongs to


def predict_all(
    model: Model,
    items: Iterator[Item],
    options: Options,
    deliver: Callable[[Any, np.ndarray, Any], None],
    fail: Callable[[Any, Exception], None],
) -> None:
    """Predicts images in batches; the device works on one while the one before is delivered.

    Args:
        model: from `load`.
        items: images; neighbours that are padded to one size make a batch.
        options: how.
        deliver: gets what an image belongs to, the image and its prediction, in order; with scores
            that is a pair, see `Model.start`.
        fail: gets what an image belongs to whose prediction failed, and the error.
    """

    def started(batch: list[Item]) -> Callable[[], list[Any]]:
        images = [image for _, image in batch]
        # One program serves full and other batches.
        images += [images[-1]] * (options.batch_size - len(images))
        return model.start(images, scores=options.scores, tta=options.tta)

    def attempt(batch: list[Item], function: Callable[[], Any]) -> Any:
        try:
            return function()
        # JaxRuntimeError: the images are too large for the memory.
        except (ValueError, cv2.error, jax.errors.JaxRuntimeError) as error:
            for key, _ in batch:
                fail(key, error)
            return None

    def finish(batch: list[Item], wait: Callable[[], list[Any]]) -> None:
        predictions = attempt(batch, wait) or ()
        # There are more where the batch was filled up, and none where it failed.
        for (key, image), prediction in zip(batch, predictions, strict=False):
            deliver(key, image, prediction)

    pending: tuple[list[Item], Callable[[], list[Any]]] | None = None
    for batch in _batches(items, options.batch_size, model.task.padded):
        wait = attempt(batch, functools.partial(started, batch))
        if pending is not None:
            finish(*pending)
        pending = None if wait is None else (batch, wait)
    if pending is not None:
        finish(*pending)


def _batches(
    items: Iterator[Item], size: int, padded: Callable[[tuple[int, int]], Any]
) -> Iterator[list[Item]]:
    batch: list[Item] = []
    for item in items:
        if batch and padded(batch[0][1].shape[:2]) != padded(item[1].shape[:2]):
            yield batch
            batch = []
        batch.append(item)
        if len(batch) == size:
            yield batch
            batch = []
    if batch:
        yield batch
