"""What training and evaluation know of a task, and what all tasks do to images."""

from collections.abc import Callable, Sequence
import dataclasses
import functools
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from flax import nnx
import jax.numpy as jnp
from jax.sharding import Mesh
from jaxtyping import Array, Float, Key, UInt8
import numpy as np

from jaxdg.backbones import EncoderOptions, zoo
from jaxdg.config import Config
from jaxdg.data.datasets import Dataset
from jaxdg.data.labels import LabelSet, join_names
from jaxdg.methods import method as method_lib
from jaxdg.methods.method import Method
from jaxdg.training import photometric
from jaxdg.training.step import Batch

ModelState = tuple[nnx.State, nnx.State, nnx.State]  # trained, frozen, statistics
Predict = Callable[[ModelState, UInt8[np.ndarray, "h w 3"]], Any]


@dataclasses.dataclass
class DomainResult:
    """How a model did on one domain.

    Attributes:
        metrics: the domain's entry of results.json.
        score: the one number it is compared by; None where the domain has no truth.
        pictures: uint8 RGB panels of the examples.
        parts: the same of parts of the domain, such as `acdc/fog`, by name.
        write: given the folder of results.json and the domain's name, writes what belongs beside
            it.
        examples: a few images with what was seen in them: `image` uint8 [h, w, 3] and, as label
            maps uint8 [h, w], `truth` and `prediction`, or `truth_boxes`, `truth_classes`, `boxes`,
            `scores` and `classes`, in pixels of the image.
    """

    metrics: dict[str, Any]
    score: float | None
    pictures: list[np.ndarray]
    parts: dict[str, "DomainResult"] = dataclasses.field(default_factory=dict)
    write: Callable[[Path, str], None] = lambda folder, name: None
    examples: list[dict[str, np.ndarray]] = dataclasses.field(default_factory=list)


def examples_of(images: int) -> set[int]:
    """Which of a domain's images are its examples: two, evenly spread."""
    return {images // 4, 3 * images // 4}


Evaluate = Callable[[ModelState, Dataset, Callable[[], None]], DomainResult]


@runtime_checkable
class Task(Protocol):
    """What training, evaluation and prediction need of a task."""

    config: Config
    labels: LabelSet
    methods: tuple[Method, ...]
    depth: int
    score_name: str

    def open(self, domain: str, train: bool) -> Dataset:
        """The images of a domain to train on, or those to judge on, checked."""
        ...

    def model(self, rngs: nnx.Rngs, boundaries: Sequence[int] = ()) -> nnx.Module:
        """The model with random parameters; segments also end after the encoder blocks in
        `boundaries`.
        """
        ...

    def load_weights(self, model: Any) -> None:
        """Puts the converted weights that the configuration names into a model."""
        ...

    def loss_denominator(self, model: Any, batch: Batch) -> Any:
        """What the losses of a global batch are divided by: a tree of scalars."""
        ...

    def preparation(self, mesh: Mesh) -> Callable[[Batch, int], Batch]:
        """A function of (batch on the devices, step from 0) to what the training step takes."""
        ...

    def losses(
        self, model: Any, batch: Batch, denominator: Any, key: Key[Array, ""]
    ) -> dict[str, Float[Array, ""]]:
        """Named loss terms of a part of a batch; they add up to the loss."""
        ...

    def evaluator(self, graph: nnx.GraphDef, mesh: Mesh) -> Evaluate:
        """A function that judges a model on a dataset, calling back after every batch; what it
        compiles is kept between calls.
        """
        ...

    def predictor(self, graph: nnx.GraphDef) -> Predict:
        """A function of (model state, image of any size) to what the model sees in it, in NumPy."""
        ...


def encoder_options(options: EncoderOptions) -> dict[str, Any]:
    """The fields that a run shares with its model's settings, by name."""
    return {
        field.name: getattr(options, field.name) for field in dataclasses.fields(EncoderOptions)
    }


class ImageTask:
    """The part of a task that does not depend on what is looked for."""

    def __init__(self, config: Config, labels: LabelSet, methods: tuple[Method, ...] = ()):
        """Args:
        config: of the run.
        labels: of the source domain.
        methods: that training uses; evaluation and prediction know of none.
        """
        self.config = config
        self.labels = labels
        self.methods = methods
        self._encoder = zoo.entry(config.model.encoder).config
        self.depth = self._encoder.depth
        self.observed = tuple(
            sorted({block for method in methods for block in method.observed(self.depth)})
        )

    def normalize(
        self, images: UInt8[Array, "b h w 3"] | Float[Array, "b h w 3"]
    ) -> Float[Array, "b h w 3"]:
        """RGB in 0..255 as the encoder takes it."""
        return photometric.normalize(
            images.astype(jnp.float32), self._encoder.mean, self._encoder.std
        )

    def distort(
        self, images: UInt8[Array, "b h w 3"], key: Key[Array, ""]
    ) -> Float[Array, "b h w 3"]:
        """The photometric augmentation of the run; RGB in 0..255."""
        d = self.config.data
        strengths = (d.brightness, d.contrast, d.saturation, d.hue, d.distortion_probability)
        return photometric.distort(images.astype(jnp.float32), key, *strengths)

    def preparation(self, mesh: Mesh) -> Callable[[Batch, int], Batch]:
        """See `Task.preparation`: what the methods do to a batch, one after another."""
        if not self.methods:
            return lambda batch, step: batch
        model = nnx.eval_shape(lambda: self.model(nnx.Rngs(0)))  # pyright: ignore[reportAttributeAccessIssue]  tasks have one
        steps = [
            prepare for method in self.methods if (prepare := method.preparation(self, model, mesh))
        ]
        return lambda batch, step: functools.reduce(
            lambda batch, prepare: prepare(batch, step), steps, batch
        )

    def targets(self, batch: Batch) -> Batch:
        """What losses are computed of: a prepared batch, as the methods want it."""
        for method in self.methods:
            batch = method.targets(batch)
        return batch

    def outputs(
        self, model: Any, batch: Batch, pixel_key: Key[Array, ""], drop_key: Key[Array, ""]
    ) -> tuple[Any, dict[str, Array]]:
        """What a model gives in training for a prepared batch, a row for each of its `targets`, and
        the methods' loss terms.
        """
        images = batch["image"]
        terms = {}
        if images.dtype == jnp.uint8:  # else a method has augmented them before the step
            images = self.distort(images, pixel_key)
        for method in self.methods:
            images = method.images(images, batch)
        features = model.encode(self.normalize(images), drop_key)
        for method in self.methods:
            places = method_lib.tap_places(model, method.observed(self.depth))
            features, new = method.observe(features, places, batch)
            terms |= new
        return model.decode(features, drop_key, train=True), terms

    def check_labels(self, dataset: Dataset) -> None:
        """ValueError where a domain has other classes than the model."""
        if dataset.labels.names != self.labels.names:
            theirs = join_names(dataset.labels.names)
            ours = join_names(self.labels.names)
            raise ValueError(
                f"domain {dataset.domain} has the classes {theirs}, but the model was trained on"
                f" {ours}; evaluate it on domains with the same classes"
            )

    def batch_size(self, mesh: Mesh) -> int:
        """Images in a global batch of evaluation: every device gets whole ones."""
        return -(-self.config.evaluation.batch_size // mesh.size) * mesh.size
