"""The protocol of a task, and the part that both tasks share."""

from collections.abc import Callable, Sequence
import contextlib
import dataclasses
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from flax import nnx
import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jaxtyping import Array, Float, Key, UInt8
import numpy as np

from jaxdg.backbones import EncoderOptions, zoo
from jaxdg.config import Config
from jaxdg.data.datasets import Dataset
from jaxdg.data.labels import LabelSet, join_names
from jaxdg.evaluation import protocols
from jaxdg.methods import method as method_lib
from jaxdg.methods.method import Method, Preparation
from jaxdg.tracing import Rngs
from jaxdg.training import photometric
from jaxdg.training.step import Batch

ModelState = tuple[nnx.State, nnx.State, nnx.State]  # trained, frozen, statistics
Predict = Callable[[ModelState, UInt8[np.ndarray, "h w 3"]], Any]
# Starts the prediction of a batch; what it returns waits for it.
PredictBatch = Callable[..., Callable[[], list[Any]]]


@dataclasses.dataclass
class DomainResult:
    """The results of a model on one domain.

    Attributes:
        metrics: the domain's entry of results.json.
        score: the number that compares models; None if the domain has no truth.
        pictures: uint8 RGB panels of the examples.
        parts: the results on parts of the domain, such as `acdc/fog`, by name.
        write: writes the files beside results.json, given its folder and the domain's name.
        examples: a few images with their predictions: `image` uint8 [h, w, 3], and either label
            maps uint8 [h, w] as `truth` and `prediction`, or `truth_boxes`, `truth_classes`,
            `boxes`, `scores` and `classes`, in pixels of the image; `name`, that of the dataset,
            where it is known.
        worst: the same of the images with the lowest share of right pixels, the worst first.
    """

    metrics: dict[str, Any]
    score: float | None
    pictures: list[np.ndarray]
    parts: dict[str, "DomainResult"] = dataclasses.field(default_factory=dict)
    write: Callable[[Path, str], None] = lambda folder, name: None
    examples: list[dict[str, np.ndarray]] = dataclasses.field(default_factory=list)
    worst: list[dict[str, np.ndarray]] = dataclasses.field(default_factory=list)


def examples_of(images: int) -> set[int]:
    """The images of a domain that are its examples: two, evenly spread."""
    return {images // 4, 3 * images // 4}


def parts_of(dataset: Dataset) -> list[str | None]:
    """The part of the domain that each image belongs to; None for those that belong to none."""
    return [protocols.part_of(dataset.domain, dataset.name(i)) for i in range(len(dataset))]


Evaluate = Callable[[ModelState, Dataset, Callable[[], None]], DomainResult]


@runtime_checkable
class Task(Protocol):
    """What training, evaluation and prediction call."""

    config: Config
    labels: LabelSet
    methods: tuple[Method, ...]
    depth: int
    score_name: str

    @property
    def window(self) -> tuple[int, int]:
        """Height and width of what the encoder sees at once, in pixels."""
        ...

    def open(self, domain: str, train: bool) -> Dataset:
        """The images of a domain for training or for evaluation, checked."""
        ...

    def model(self, rngs: nnx.Rngs, boundaries: Sequence[int] = ()) -> nnx.Module:
        """The model with random parameters; segments also end after the blocks in `boundaries`."""
        ...

    def load_weights(self, model: Any) -> None:
        """Fills a model with the converted weights that the configuration names."""
        ...

    def loss_denominator(self, model: Any, batch: Batch) -> Any:
        """The denominator of the losses of a global batch: a tree of scalars."""
        ...

    def preparation(self, mesh: Mesh) -> Callable[[Batch, int], Batch]:
        """A function of (batch on the devices, step from 0) to the input of the training step."""
        ...

    def preparations(self, mesh: Mesh) -> list[Preparation]:
        """The parts of `preparation`, in order; nothing is read."""
        ...

    def losses(
        self, model: Any, batch: Batch, denominator: Any, key: Key[Array, ""]
    ) -> dict[str, Float[Array, ""]]:
        """Named loss terms of a part of a batch; they add up to the loss."""
        ...

    def evaluator(self, graph: nnx.GraphDef, mesh: Mesh) -> Evaluate:
        """A function that judges a model on a dataset; it calls back after every batch.

        Later calls reuse what it has compiled.
        """
        ...

    def predictor(self, graph: nnx.GraphDef) -> Predict:
        """A function of (model state, image of any size) to the prediction, in NumPy."""
        ...

    def batch_predictor(self, graph: nnx.GraphDef) -> PredictBatch:
        """A function of (model state, images, scores=False, tta=False) that starts a prediction.

        The images are uint8 [h, w, 3] of one `padded` size. It returns a function that waits and
        gives the prediction of each, in NumPy: as from `predictor`, or with `scores` a pair of that
        and the probabilities of the classes, float32 [h, w, k]. `tta` is test-time augmentation.
        """
        ...

    def padded(self, size: tuple[int, int]) -> tuple[int, int]:
        """The size that images of this size are padded to; those of one make a batch."""
        ...


def encoder_options(options: EncoderOptions) -> dict[str, Any]:
    """The fields of `EncoderOptions` of a run's settings, by name."""
    names = (field.name for field in dataclasses.fields(EncoderOptions))
    return {name: getattr(options, name) for name in names}


class ImageTask:
    """The part that both tasks share."""

    def __init__(
        self,
        config: Config,
        methods: tuple[Method, ...] = (),
        labels: LabelSet | None = None,
    ):
        """Needs no data.

        Args:
            config: of the run.
            methods: that training uses; none in evaluation and prediction.
            labels: of the source domain, if something else than the configuration tells them.
        """
        self.config = config
        self.labels = labels or self.labels_of(config)
        self.methods = methods
        self._encoder = zoo.entry(config.model.encoder).config
        self.depth = self._encoder.depth
        self.observed = tuple(
            sorted({block for method in methods for block in method.observed(self.depth)})
        )

    @staticmethod
    def labels_of(config: Config) -> LabelSet:
        """The classes of the source domain, as the configuration tells them."""
        raise NotImplementedError

    @property
    def window(self) -> tuple[int, int]:
        """See `Task.window`."""
        return self.config.data.crop

    def normalize(
        self, images: UInt8[Array, "b h w 3"] | Float[Array, "b h w 3"]
    ) -> Float[Array, "b h w 3"]:
        """RGB in 0..255 to the encoder's input."""
        c = self._encoder
        return photometric.normalize(images.astype(jnp.float32), c.mean, c.std)

    def distort(
        self, images: UInt8[Array, "b h w 3"], key: Key[Array, ""]
    ) -> Float[Array, "b h w 3"]:
        """The photometric augmentation of the run; RGB in 0..255."""
        d = self.config.data
        strengths = (d.brightness, d.contrast, d.saturation, d.hue, d.distortion_probability)
        return photometric.distort(images.astype(jnp.float32), key, *strengths)

    def augmented(self, batch: Batch, key: Key[Array, ""]) -> Float[Array, "b h w 3"]:
        """The images of a batch after `distort`, RGB in 0..255; padding in the corner is blank."""
        images = self.distort(batch["image"], key)
        if "inside" not in batch:
            return images
        return photometric.blank(images, batch["inside"], self._encoder.mean)

    def preparation(self, mesh: Mesh) -> Callable[[Batch, int], Batch]:
        """See `Task.preparation`: the methods prepare a batch one after another."""
        loaded = [(part.function, part.load()) for part in self.preparations(mesh)]

        def prepare(batch: Batch, step: int) -> Batch:
            for function, state in loaded:
                batch = function(state, batch, step)
            return batch

        return prepare

    def preparations(self, mesh: Mesh) -> list[Preparation]:
        """See `Task.preparations`."""
        if not self.methods:
            return []
        model = nnx.eval_shape(lambda: self.model(Rngs(0)))  # pyright: ignore[reportAttributeAccessIssue]  tasks have one
        found = [method.preparation(self, model, mesh) for method in self.methods]

        def part(prepare: Callable[[Batch, int], Batch] | Preparation) -> Preparation:
            if isinstance(prepare, Preparation):
                return prepare
            return Preparation(lambda _, batch, step: prepare(batch, step), (), lambda: ())

        return [part(prepare) for prepare in found if prepare]

    def targets(self, batch: Batch) -> Batch:
        """The batch for the losses: a prepared batch that the methods have changed."""
        for method in self.methods:
            batch = method.targets(batch)
        return batch

    def outputs(
        self, model: Any, batch: Batch, pixel_key: Key[Array, ""], drop_key: Key[Array, ""]
    ) -> tuple[Any, dict[str, Array], list[Any]]:
        """The model's output for a prepared batch, with the rows of `targets`; loss terms; and what
        each method keeps for `Method.compare`.
        """
        images = batch["image"]
        terms = {}
        with jax.named_scope("input"):
            if images.dtype == jnp.uint8:  # else a method has augmented them before the step
                images = self.augmented(batch, pixel_key)
            for method in self.methods:
                images = method.images(images, batch)
            images = self.normalize(images)
        with contextlib.ExitStack() as drawn:
            for i, method in enumerate(self.methods, 2):  # the decoder takes 1
                drawn.enter_context(method.drawing(model, jax.random.fold_in(drop_key, i)))
                if edits := method.edits(batch):
                    drawn.enter_context(model.backbone.editing(edits))
            features = model.encode(images, drop_key)
        for method in self.methods:
            places = method_lib.tap_places(model, method.observed(self.depth))
            with jax.named_scope("losses"):
                features, new = method.observe(features, places, batch)
            terms |= new
        kept = []
        for i, method in enumerate(self.methods, 2):
            places = method_lib.tap_places(model, method.observed(self.depth))
            # Another key than that of `drawing`.
            own_key = jax.random.fold_in(jax.random.fold_in(drop_key, i), 1)
            with jax.named_scope("refinement"):
                features, own = method.refine(model, features, places, own_key)
            kept.append(own)
        return model.decode(features, drop_key, train=True), terms, kept

    def method_losses(self, output: Any, targets: Batch, denominator: Any) -> dict[str, Array]:
        """The methods' loss terms from the model's output; see `Method.losses`."""
        terms = {}
        for method in self.methods:
            terms |= method.losses(output, targets, denominator)
        return terms

    def check_labels(self, dataset: Dataset) -> None:
        """ValueError if a domain has other classes than the model."""
        if dataset.labels.names != self.labels.names:
            theirs = join_names(dataset.labels.names)
            ours = join_names(self.labels.names)
            raise ValueError(
                f"domain {dataset.domain} has the classes {theirs}, but the model was trained on"
                f" {ours}; evaluate it on domains with the same classes"
            )

    def predictor(self, graph: nnx.GraphDef) -> Predict:
        """See `Task.predictor`: a batch of one image."""
        start: PredictBatch = self.batch_predictor(graph)  # pyright: ignore[reportAttributeAccessIssue]  tasks have one

        def predict(state: ModelState, image: UInt8[np.ndarray, "h w 3"]) -> Any:
            return start(state, [image])()[0]

        return predict

    def batch_size(self, mesh: Mesh) -> int:
        """Images in a global batch of evaluation, rounded up to a multiple of the devices."""
        return -(-self.config.evaluation.batch_size // mesh.size) * mesh.size
