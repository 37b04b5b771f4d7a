"""Semantic segmentation: one class a pixel, judged by mIoU."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
import functools
import itertools
import math
from typing import Any

import cv2
from flax import nnx
import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int32, Key, UInt8
import numpy as np

from jaxdg import segmentation, weights
from jaxdg.config import Config
from jaxdg.data.datasets import Dataset
from jaxdg.data.domains import label_set, open_domain
from jaxdg.data.labels import LabelSet
from jaxdg.drawing.panels import panel
from jaxdg.evaluation import boundary, protocols
from jaxdg.evaluation import confusion as confusion_lib
from jaxdg.evaluation.calibration import reliability, reliability_counts
from jaxdg.evaluation.worst import Worst, worst_of
from jaxdg.segmentation.decoder import DecoderOptions
from jaxdg.tasks.task import (
    DomainResult,
    Evaluate,
    ImageTask,
    ModelState,
    PredictBatch,
    encoder_options,
    examples_of,
    parts_of,
)
from jaxdg.training import distributed, sharding
from jaxdg.training.step import Batch

Host = Mapping[str, np.ndarray]  # the rows of a batch that this host has read


class Segmentation(ImageTask):
    """See `Task`."""

    score_name = "mIoU"

    @staticmethod
    def labels_of(config: Config) -> LabelSet:
        """See `ImageTask.labels_of`."""
        return label_set(config.data.source, config.data.folder)

    @property
    def decoder(self) -> DecoderOptions:
        """The settings of the run's decoder."""
        m = self.config.model
        return getattr(m, m.decoder)

    @property
    def window(self) -> tuple[int, int]:
        """See `Task.window`."""
        return self.decoder.window(self.config.data.crop)

    def open(self, domain: str, train: bool) -> Dataset:
        """See `Task.open`; in evaluation some protocols have their own label map of Mapillary."""
        d = self.config.data
        mapillary_labels = d.mapillary_labels
        if not train:
            protocol = self.config.evaluation.protocol
            mapillary_labels = protocols.MAPILLARY_LABELS.get(protocol, mapillary_labels)
        options: dict[str, Any] = dict(root=d.root, streets=d.streets, folder=d.folder, skip=d.skip)
        dataset = open_domain(domain, train=train, mapillary_labels=mapillary_labels, **options)
        self.check_labels(dataset)
        return dataset

    def model(self, rngs: nnx.Rngs, boundaries: Sequence[int] = ()) -> segmentation.Segmenter:
        """See `Task.model`."""
        m = self.config.model
        model = segmentation.Segmenter(
            segmentation.SegmenterConfig(
                num_classes=len(self.labels.names),
                image_size=self.window,
                decoder=self.decoder.config(self.labels.names, m.dtype),
                pyramid=m.pyramid,
                observed=self.observed,
                boundaries=tuple(boundaries),
                **encoder_options(m),
            ),
            rngs=rngs,
        )
        for method in self.methods if model.head.views > 1 else ():
            if method.changes_rows:
                raise ValueError(
                    f"model.decoder {m.decoder} reads {model.head.views} views of each image, which"
                    f" the method {type(method).__name__} cannot go with; switch one off"
                )
        return model

    def load_weights(self, model: segmentation.Segmenter) -> None:
        """See `Task.load_weights`."""
        m = self.config.model
        if m.weights:
            weights.load(model.backbone, m.weights)
        if m.text_weights:
            model.head.load_text(m.text_weights)

    def loss_denominator(self, model: segmentation.Segmenter, batch: Batch) -> Any:
        """See `Task.loss_denominator`; batch: `label` uint8 [b, h, w]."""
        return model.head.loss_denominator(self.targets(batch)["label"])

    def losses(
        self, model: segmentation.Segmenter, batch: Batch, denominator: Any, key: Key[Array, ""]
    ) -> dict[str, Float[Array, ""]]:
        """See `Task.losses`; batch: `image` uint8 [b, h, w, 3], `label` uint8 [b, h, w]."""
        pixel_key, drop_key, point_key = jax.random.split(key, 3)
        output, terms, _ = self.outputs(model, batch, pixel_key, drop_key)
        with jax.named_scope("losses"):
            targets = self.targets(batch)
            own = model.head.loss(output, targets["label"], denominator, point_key)
            return {**own, **terms, **self.method_losses(output, targets, denominator)}

    def padded(self, size: tuple[int, int]) -> tuple[int, int]:
        """See `Task.padded`: so that prediction compiles once for many sizes, see `shared_side`."""
        window = self.window
        h, w = zip(size, window, self.config.evaluation.stride, strict=True)
        return segmentation.shared_side(*h), segmentation.shared_side(*w)

    def batch_predictor(self, graph: nnx.GraphDef) -> PredictBatch:
        """See `Task.batch_predictor`: sliding windows give label maps uint8 [h, w].

        A label map is what the scores that it is asked for with say: both come from one array.
        """
        views = self.views(graph)
        plain = protocols.Protocol("native", self.window, self.config.evaluation.stride)

        @jax.jit
        def probabilities(state: ModelState, scores: Array) -> Array:
            return in_order(scores, nnx.merge(graph, *state).head.probabilities(scores))

        def start(
            state: ModelState, images: Sequence[np.ndarray], scores: bool = False, tta: bool = False
        ) -> Callable[[], list[Any]]:
            sizes = [image.shape[:2] for image in images]
            shape = self.padded(sizes[0])
            padded = np.zeros((len(images), *shape, 3), np.uint8)
            for row, (image, (h, w)) in zip(padded, zip(images, sizes, strict=True), strict=True):
                row[:h, :w] = image
            given = jnp.asarray(padded), jnp.array(sizes, jnp.int32)
            if tta:
                found = averaged(views(state, *given, plain.augmented()), shape, given[1])
            else:
                ((found, _),) = views(state, *given, plain)
            labels = highest(found)
            shares = None
            if scores:
                shares = found if tta else probabilities(state, found)

            def cut(batch: Array) -> list[np.ndarray]:
                rows = zip(np.asarray(batch), sizes, strict=True)
                return [np.ascontiguousarray(row[:h, :w]) for row, (h, w) in rows]

            def finish() -> list[Any]:
                if shares is None:
                    return cut(labels)
                return list(zip(cut(labels), cut(shares), strict=True))

            return finish

        return start

    def views(
        self, graph: nnx.GraphDef, mesh: Mesh | None = None
    ) -> Callable[[ModelState, Array, Array, protocols.Protocol], Iterator[tuple[Array, Array]]]:
        """A function of (model state, images, their sizes, protocol) to the class scores of each
        view, mirrored back, and the sizes of the images in it.

        The mesh is what state and images are divided over; None: one device.

        The model compiles once for every shape and scale of images, whatever the sizes of the
        images inside it. Test-time augmentation resizes images on the device and rounds them to
        whole grey values.
        """

        @functools.partial(jax.jit, static_argnames=("windows", "scale"))
        def scores(
            state: ModelState, images: Array, sizes: Array, flip: Any, windows: Any, scale: float
        ) -> tuple[Array, Array]:
            def mirrored(x, own):
                return x if flip is None else jnp.where(flip, segmentation.mirror(x, own), x)

            images = images.astype(jnp.float32)
            own = sizes
            if scale != 1:
                own = jnp.floor(sizes * scale + 0.5).astype(jnp.int32)
                h, w = (math.floor(side * scale + 0.5) for side in images.shape[1:3])
                images = jnp.round(segmentation.resize_scores(images, (h, w), (sizes, own)))
            images = self.normalize(mirrored(images, own))
            per_call = self.config.evaluation.windows_per_call
            with sharding.gathered(state, mesh) as whole:
                model = nnx.merge(graph, *whole)
                found = model.image_scores(images, windows[0], windows[1], per_call, own)
            return mirrored(found, own), own

        def views(
            state: ModelState, images: Array, sizes: Array, protocol: protocols.Protocol
        ) -> Iterator[tuple[Array, Array]]:
            windows = (protocol.window, protocol.stride)
            flips = (False, True) if protocol.flip else (None,)
            for scale, flip in itertools.product(protocol.scales, flips):
                yield scores(state, images, sizes, flip, windows, scale)

        return views

    def labelling(
        self, graph: nnx.GraphDef, mesh: Mesh | None = None
    ) -> Callable[[ModelState, Batch, protocols.Protocol], UInt8[Array, "b h w"]]:
        """A function of (model state, batch, protocol) to label maps of the labels' size.

        The mesh is what state and batch are divided over; None: one device.

        The batch is one of `eval_batches`.
        """
        labelled = self.confident_labelling(graph, mesh)
        return lambda state, batch, protocol: labelled(state, batch, protocol, False)[0]

    def confident_labelling(
        self, graph: nnx.GraphDef, mesh: Mesh | None = None
    ) -> Callable[
        [ModelState, Batch, protocols.Protocol, bool],
        tuple[UInt8[Array, "b h w"], Float[Array, "b h w"] | None],
    ]:
        """As `labelling`, and whether confidences are wanted: to label maps and these, or None.

        A confidence is the probability of the predicted class by `Decoder.probabilities`, of the
        scores from which the label map comes. Test-time augmentation averages probabilities; there
        it is the greatest of the averages. It has a program of its own, which leaves that of the
        label maps alone.
        """
        views = self.views(graph, mesh)

        def sure(state: ModelState, scores: Array) -> Array:
            return nnx.merge(graph, *state).head.probabilities(scores).max(axis=-1)

        sure_of = jax.jit(sure)

        @functools.partial(jax.jit, static_argnums=2)
        def sure_resized(
            state: ModelState, scores: Array, size: tuple[int, int], sizes: tuple[Array, Array]
        ) -> Array:
            return segmentation.at_labels(functools.partial(sure, state), scores, size, sizes)

        def label_maps(
            state: ModelState, batch: Batch, protocol: protocols.Protocol, confident: bool
        ) -> tuple[Array, Array | None]:
            size: Any = batch["label"].shape[1:]
            found = views(state, batch["image"], batch["size"], protocol)
            if protocol.augments:
                mean = averaged(found, size, batch["label_size"])
                return highest(mean), greatest(mean) if confident else None
            ((scores, own),) = found
            if protocol.resizes:
                place = (size, (own, batch["label_size"]))
                confidence = sure_resized(state, scores, *place) if confident else None
                return resized(scores, *place), confidence
            return highest(scores), sure_of(state, scores) if confident else None

        return label_maps

    def protocol(self, domain: str) -> protocols.Protocol:
        """The protocol by which the run judges a domain."""
        c = self.config
        e = c.evaluation
        plain = protocols.protocol(e.protocol, domain, c.data.source, self.window, e.stride)
        return plain.augmented() if e.tta else plain

    def counting(
        self, mesh: Mesh
    ) -> Callable[[Array, Array | None, Batch, int], tuple[tuple[Array, Array], Any]]:
        """A function of (label maps, confidences or None, batch, number of parts) to what a batch
        adds: the confusion matrix of each part, the right and all labelled pixels of each image;
        and what the configuration asks for beside them, of each image, or None.
        """
        k = len(self.labels.names)
        e = self.config.evaluation

        def truth(batch: Batch) -> Array:
            return jnp.where(batch["mask"][:, None, None], batch["label"], 255)

        @functools.partial(jax.jit, static_argnums=2, out_shardings=sharding.replicated(mesh))
        def count(prediction: Array, batch: Batch, parts: int) -> tuple[Array, Array]:
            confusion = functools.partial(segmentation.confusion_matrix, num_classes=k)
            counts = jax.vmap(confusion)(prediction, truth(batch))
            right = jnp.stack([jnp.trace(counts, axis1=1, axis2=2), counts.sum(axis=(1, 2))])
            return jnp.zeros((parts, k, k), jnp.int32).at[batch["part"]].add(counts), right

        # A program of its own, which leaves that of the matrix alone.
        @functools.partial(jax.jit, out_shardings=sharding.replicated(mesh))
        def count_more(
            prediction: Array, confidence: Array | None, batch: Batch
        ) -> dict[str, Array]:
            label = truth(batch)
            found = {"part": batch["part"]}
            if confidence is not None:
                of = functools.partial(reliability_counts, num_classes=k, bins=e.calibration_bins)
                found["calibration"] = jax.vmap(of)(confidence, prediction, label)
            if e.boundary:
                most = boundary.reach(label.shape[1:])
                of = functools.partial(boundary.boundary_counts, num_classes=k, most=most)
                found["boundary"] = jax.vmap(of)(
                    prediction, label, batch["label_size"], batch["reach"]
                )
            return found

        def counted(
            prediction: Array, confidence: Array | None, batch: Batch, parts: int
        ) -> tuple[tuple[Array, Array], Any]:
            more = e.calibration or e.boundary
            further = count_more(prediction, confidence, batch) if more else None
            return count(prediction, batch, parts), further

        return counted

    def evaluator(self, graph: nnx.GraphDef, mesh: Mesh) -> Evaluate:
        """See `Task.evaluator`."""
        label_maps = self.confident_labelling(graph, mesh)
        counted = self.counting(mesh)
        k = len(self.labels.names)
        e = self.config.evaluation
        batch_size = self.batch_size(mesh)

        def evaluate(state: ModelState, dataset: Dataset, tick: Callable[[], None]) -> DomainResult:
            # Needs grain, which models that are only built, timed or planned do without.
            from jaxdg.data.pipeline import eval_batches

            self.check_labels(dataset)
            protocol = self.protocol(dataset.domain)
            part_of = [part or "" for part in parts_of(dataset)]
            names = sorted(set(part_of))
            part = np.array([names.index(name) for name in part_of], np.int32)
            total = np.zeros((len(names), k, k), np.int64)
            more = {}
            if e.calibration:
                more["calibration"] = np.zeros((len(names), e.calibration_bins, 4, 2), np.int64)
            if e.boundary:
                more["boundary"] = np.zeros((len(names), k, 2), np.int64)
            pending = None

            chosen = examples_of(len(dataset))
            examples = {}
            worst = Worst()
            shard = (jax.process_index(), jax.process_count())

            def example(batch: Host, prediction: Array, row: int) -> dict[str, Any]:
                h, w = batch["label_size"][row].tolist()
                image_h, image_w = batch["size"][row]
                label = _row(prediction, shard[0] * len(batch["index"]) + row)
                return {
                    "image": cv2.resize(batch["image"][row, :image_h, :image_w], (w, h)),
                    "truth": batch["label"][row, :h, :w],
                    "prediction": label[:h, :w],
                    "name": np.array(dataset.name(int(batch["index"][row]))),
                }

            def collect() -> None:
                if pending is None:
                    return
                found, batch, prediction = pending
                (counts, (right, true)), further = jax.device_get(found)
                np.add(total, counts, out=total)
                for name in more:
                    np.add.at(more[name], further["part"], further[name])
                first = shard[0] * len(batch["index"])
                for row in np.flatnonzero(batch["mask"]).tolist():
                    if true[first + row]:
                        share = float(right[first + row] / true[first + row])
                        make = functools.partial(example, batch, prediction, row)
                        worst.offer(share, int(batch["index"][row]), make)

            workers = self.config.data.workers
            for batch in eval_batches(
                dataset, batch_size=batch_size, protocol=protocol, workers=workers, shard=shard
            ):
                names_of_fields = ("image", "size", "label", "label_size", "mask")
                fields = {name: batch[name] for name in names_of_fields}
                fields["part"] = part[batch["index"]]
                if e.boundary:
                    reaches = [boundary.reach(size) for size in batch["label_size"].tolist()]
                    fields["reach"] = np.array(reaches, np.int32)
                fields = sharding.to_devices(fields, mesh)
                prediction, confidence = label_maps(state, fields, protocol, e.calibration)
                found = counted(prediction, confidence, fields, len(names))
                collect()  # the last batch, while the devices work on this one
                pending = found, batch, prediction
                for row in np.flatnonzero(np.isin(batch["index"], list(chosen))).tolist():
                    examples[int(batch["index"][row])] = example(batch, prediction, row)
                tick()
            collect()
            whole = {name: counts.sum(axis=0) for name, counts in more.items()}
            result = self._result(total.sum(axis=0), len(dataset), protocol, whole)
            examples = distributed.gathered(examples)
            result.examples = [examples[i] for i in sorted(examples)]
            result.worst = worst_of(distributed.gathered(worst.kept()))
            colors = self.labels.colors
            result.pictures = [
                panel(e["image"], e["truth"], e["prediction"], colors, self.labels.names)
                for e in result.examples
            ]
            result.parts = {
                name: self._result(
                    total[i], part_of.count(name), protocol, {key: more[key][i] for key in more}
                )
                for i, name in enumerate(names)
                if name
            }
            return result

        return evaluate

    def _result(
        self,
        confusion: np.ndarray,
        images: int,
        protocol: protocols.Protocol,
        more: Mapping[str, np.ndarray],
    ) -> DomainResult:
        iou = 100 * segmentation.iou(confusion)
        per_class = {
            name: None if np.isnan(v) else float(v)
            for name, v in zip(self.labels.names, iou, strict=True)
        }
        known = {name: v for name, v in per_class.items() if v is not None}
        pixels = zip(self.labels.names, confusion.sum(axis=1), strict=True)

        def mean(without: tuple[str, ...]) -> float | None:
            values = [v for name, v in known.items() if name not in without]
            return float(np.mean(values)) if values else None

        metrics = {
            "mIoU": mean(()),
            "IoU": per_class,
            "images": images,
            "subsets": {name: mean(without) for name, without in protocol.without},
            "classes": len(known),
            "without_truth": [name for name, count in pixels if not count],
            **confusion_lib.numbers(confusion, self.labels.names),
        }
        if "calibration" in more:
            metrics |= reliability(more["calibration"])
        if "boundary" in more:
            metrics |= boundary.numbers(more["boundary"], self.labels.names)

        def write(folder, name):
            confusion_lib.write_confusion(folder, name, self.labels.names, confusion)

        return DomainResult(metrics, mean(()), [], write=write)


resized = jax.jit(segmentation.label_map, static_argnums=1)
highest = jax.jit(lambda scores: jnp.argmax(scores, axis=-1).astype(jnp.uint8))
greatest = jax.jit(lambda scores: scores.max(axis=-1))
_divided = jax.jit(jnp.divide, donate_argnums=0)


@functools.partial(jax.jit, static_argnums=2, donate_argnums=0)
def _voted(
    total: Array | None, scores: Array, size: tuple[int, int], sizes: tuple[Array, Array]
) -> Array:
    votes = jax.nn.softmax(segmentation.resize_scores(scores, size, sizes))
    return votes if total is None else total + votes


def averaged(
    views: Iterable[tuple[Array, Array]], size: tuple[int, int], sizes: Int32[Array, "b 2"]
) -> Float[Array, "b h w k"]:
    """The mean over views of the softmax of their scores at one size, as in mmsegmentation.

    Its SegTTAModel, and `aug_test` before it, take the softmax even if a decoder's scores are no
    logits.

    Args:
        views: from `Segmentation.views`.
        size: height and width of the array of the result, static.
        sizes: every image's own height and width in it.
    """
    total = None
    count = 0
    for scores, own in views:
        total = _voted(total, scores, size, (own, sizes))
        count += 1
    assert total is not None
    return _divided(total, count)


def in_order(
    scores: Float[Array, "b h w k"], probabilities: Float[Array, "b h w k"]
) -> Float[Array, "b h w k"]:
    """Probabilities of which the class of highest score has the highest, by the least step.

    Rounding makes some equal whose scores were not.
    """
    best = jnp.argmax(scores, axis=-1)[..., None]
    most = probabilities.max(axis=-1, keepdims=True)
    moved = jnp.argmax(probabilities, axis=-1)[..., None] != best
    raised = moved & (jnp.arange(scores.shape[-1]) == best)
    return jnp.where(raised, jnp.nextafter(most, 1), probabilities)


def _row(array: Array, row: int) -> np.ndarray:
    """A row of an array that is divided over devices; this host must have it."""
    for shard in array.addressable_shards:
        start, stop, _ = shard.index[0].indices(array.shape[0])
        if start <= row < stop:
            return np.asarray(shard.data[row - start])
    raise AssertionError(f"row {row} is on another host")
