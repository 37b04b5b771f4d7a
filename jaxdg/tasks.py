"""The task behind a small protocol, what a run is built of, and `jaxdg.load`.

A task knows how its model is made, what its losses are and how one domain is judged; `train` and `evaluate` know nothing else of it.
"""

from collections.abc import Callable, Sequence
import dataclasses
import functools
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from flax import nnx
import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jaxtyping import Array, Float, Key, UInt8
import numpy as np

from jaxdg import config as config_lib
from jaxdg import segmentation, visualize, weights
from jaxdg.backbones import zoo
from jaxdg.config import Config, MeshConfig
from jaxdg.data.datasets import Dataset, label_set
from jaxdg.data.labels import LabelSet
from jaxdg.data.pipeline import eval_batches
from jaxdg.training import optimizer as optimizer_lib
from jaxdg.training import photometric, sharding
from jaxdg.training.checkpoint import Checkpoints
from jaxdg.training.step import Batch, TrainState

ModelState = tuple[nnx.State, nnx.State, nnx.State]  # trained, frozen, statistics


@dataclasses.dataclass
class DomainResult:
    """How a model did on one domain.

    Attributes:
        metrics: the domain's entry of results.json.
        score: the one number it is compared by.
        pictures: uint8 RGB panels of a few images with truth and prediction.
    """

    metrics: dict[str, Any]
    score: float
    pictures: list[np.ndarray]


@runtime_checkable
class Task(Protocol):
    """What training and evaluation need of a task."""

    labels: LabelSet
    score_name: str

    def model(self, rngs: nnx.Rngs, boundaries: Sequence[int] = ()) -> nnx.Module:
        """The model with random parameters; segments also end after the encoder blocks in `boundaries`."""
        ...

    def normalizer(self, model: Any, batch: Batch) -> Any:
        """What the losses of a global batch are divided by: a tree of scalars."""
        ...

    def losses(self, model: Any, batch: Batch, normalizer: Any, key: Key[Array, ""]) -> dict[str, Float[Array, ""]]:
        """Named loss terms of a part of a batch; they add up to the loss."""
        ...

    def evaluator(self, graph: nnx.GraphDef, mesh: Mesh) -> Callable[[ModelState, Dataset, Callable[[], None]], DomainResult]:
        """A function that judges a model on a dataset, calling back after every batch; what it compiles is kept between calls."""
        ...


class Segmentation:
    """Semantic segmentation: one class a pixel, judged by mIoU."""

    score_name = "mIoU"

    def __init__(self, config: Config, labels: LabelSet):
        """Args:
        config: of the run.
        labels: of the source domain.
        """
        self.config = config
        self.labels = labels
        entry = zoo.entry(config.model.encoder).config
        self._normalize = functools.partial(photometric.normalize, mean=entry.mean, std=entry.std)

    def model(self, rngs: nnx.Rngs, boundaries: Sequence[int] = ()) -> segmentation.Segmenter:
        """See `Task.model`."""
        m, k = self.config.model, len(self.labels.names)
        decoder = None
        if m.decoder == "mask2former":
            if m.mask2former.queries < k:
                raise ValueError(f"model.mask2former.queries is {m.mask2former.queries}; allowed: at least one for each of the {k} classes")
            decoder = segmentation.Mask2FormerConfig(num_classes=k, dtype=m.dtype, **dataclasses.asdict(m.mask2former))
        elif m.decoder == "segformer":
            decoder = segmentation.SegformerConfig(num_classes=k, hidden=m.segformer_channels, dtype=m.dtype)
        elif m.decoder == "clip_text":
            decoder = segmentation.ClipTextHeadConfig(self.labels.names)
        return segmentation.Segmenter(
            segmentation.SegmenterConfig(
                num_classes=k,
                encoder=m.encoder,
                image_size=self.config.data.crop,
                decoder=decoder,
                taps=m.taps,
                patch_size=m.patch_size,
                patch_resize=m.patch_resize,
                pyramid=m.pyramid,
                boundaries=tuple(boundaries),
                drop_path=m.drop_path,
                remat=m.remat,
                dtype=m.dtype,
            ),
            rngs=rngs,
        )

    def normalizer(self, model: segmentation.Segmenter, batch: Batch) -> Any:
        """See `Task.normalizer`; batch: `label` uint8 [b, h, w]."""
        return model.head.normalizer(batch["label"])

    def losses(self, model: segmentation.Segmenter, batch: Batch, normalizer: Any, key: Key[Array, ""]) -> dict[str, Float[Array, ""]]:
        """See `Task.losses`; batch: `image` uint8 [b, h, w, 3], `label` uint8 [b, h, w]."""
        pixel_key, drop_key, point_key = jax.random.split(key, 3)
        data = self.config.data
        images = photometric.brightness_contrast(batch["image"].astype(jnp.float32), pixel_key, data.brightness, data.contrast)
        output = model(self._normalize(images), drop_key, train=True)
        return model.head.loss(output, batch["label"], normalizer, point_key)

    def predictor(self, graph: nnx.GraphDef) -> Callable[[ModelState, UInt8[Array, "b h w 3"]], UInt8[Array, "b h w"]]:
        """A function of (model state, images) to label maps at the images' own size, by sliding windows; compiles once a size."""
        c = self.config

        @jax.jit
        def predict(state: ModelState, images: UInt8[Array, "b h w 3"]) -> UInt8[Array, "b h w"]:
            model = nnx.merge(graph, *state)
            x = self._normalize(images.astype(jnp.float32))
            stride, per_call = c.evaluation.stride, c.evaluation.windows_per_call
            scores = segmentation.sliding_window(model.scores, x, c.data.crop, stride, per_call)
            return jnp.argmax(scores, axis=-1).astype(jnp.uint8)

        return predict

    def evaluator(self, graph: nnx.GraphDef, mesh: Mesh) -> Callable[[ModelState, Dataset, Callable[[], None]], DomainResult]:
        """See `Task.evaluator`."""
        predict, k = self.predictor(graph), len(self.labels.names)
        # Every device gets whole images.
        batch_size = -(-self.config.evaluation.batch_size // mesh.size) * mesh.size

        @jax.jit
        def count(state: ModelState, batch: Batch) -> tuple[Array, Array]:
            prediction = predict(state, batch["image"])
            label = jnp.where(batch["mask"][:, None, None], batch["label"], 255)
            return segmentation.confusion_matrix(prediction, label, k), prediction

        def evaluate(state: ModelState, dataset: Dataset, tick: Callable[[], None]) -> DomainResult:
            if dataset.labels.names != self.labels.names:
                raise ValueError(
                    f"domain {dataset.domain} has the classes {', '.join(dataset.labels.names)}, but the model was trained on "
                    f"{', '.join(self.labels.names)}; evaluate it on domains with the same classes"
                )
            total, pictures, waiting = np.zeros((k, k), np.int64), [], None
            shard = (jax.process_index(), jax.process_count())
            for batch in eval_batches(dataset, batch_size=batch_size, workers=self.config.data.workers, shard=shard):
                fields = {key: batch[key] for key in ("image", "label", "mask")}
                counts, prediction = count(state, sharding.to_devices(fields, mesh))
                if waiting is not None:  # the sum goes to the host while the devices work on the next batch
                    total += np.asarray(waiting, np.int64)
                waiting = counts
                if len(pictures) < 2 and batch["mask"][0]:
                    own = np.asarray(prediction.addressable_shards[0].data)[0]
                    pictures.append(visualize.panel(batch["image"][0], batch["label"][0], own, self.labels.colors, self.labels.names))
                tick()
            total += 0 if waiting is None else np.asarray(waiting, np.int64)
            iou = 100 * segmentation.iou(total)
            score = float(np.nanmean(iou)) if np.isfinite(iou).any() else 0.0
            per_class = {name: None if np.isnan(v) else float(v) for name, v in zip(self.labels.names, iou, strict=True)}
            return DomainResult({"mIoU": score, "IoU": per_class, "images": len(dataset)}, score, pictures)

        return evaluate


def make_task(config: Config) -> Task:
    """The task of a run; needs no data."""
    return Segmentation(config, label_set(config.data.source, config.data.folder))


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


class Model:
    """A trained model: `predict` turns an image of any size into a label map of that size."""

    def __init__(self, task: Segmentation, graph: nnx.GraphDef, state: ModelState, step: int):
        """See `load`."""
        self.task, self.step, self.labels = task, step, task.labels
        self._state, self._predict = state, task.predictor(graph)

    def predict(self, image: np.ndarray | Array) -> UInt8[np.ndarray, "h w"]:
        """Class ids of every pixel.

        Args:
            image: RGB, uint8 [h, w, 3], of any size; each new size compiles once.

        Returns:
            Ids into `labels.names`, of the image's size.

        Raises:
            ValueError: no such image.
        """
        image = np.asarray(image)
        if image.ndim != 3 or image.shape[-1] != 3 or image.dtype != np.uint8 or not image.size:
            raise ValueError(f"predict takes an RGB image uint8 [h, w, 3]; got {image.dtype} {list(image.shape)}")
        return np.asarray(self._predict(self._state, jnp.asarray(image[None])))[0]


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
    task = make_task(config)
    assert isinstance(task, Segmentation)
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
    checkpoints = Checkpoints(workdir, config.keep_checkpoints)
    stored = checkpoints.restore_model(like, step)
    checkpoints.close()
    if stored is None:
        raise FileNotFoundError(f"{workdir}/checkpoints is empty; train first, or give another workdir")
    return plan, (stored["trained"], stored["frozen"], stored["statistics"]), int(stored["step"])
