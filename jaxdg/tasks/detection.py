"""Detection: a box around every thing, judged by AP50.

Images are predicted at the size the model was trained on, `data.crop`: each is resized to the
largest size of its own ratio that fits, and its boxes are moved back to its own pixels, in which
all is judged and written.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from flax import nnx
import jax
from jax.sharding import Mesh
from jaxtyping import Array, Float, Key
import numpy as np

from jaxdg import weights
from jaxdg.backbones import text_embeddings
from jaxdg.config import Config, ModelConfig
from jaxdg.data.augment.transforms import BOX_FIELDS, Fit
from jaxdg.data.boxes import box_labels, check_room, known_counts, open_boxes
from jaxdg.data.datasets import Dataset
from jaxdg.detection.arrays import Detected
from jaxdg.detection.detector import Detector, DetectorConfig
from jaxdg.detection.interface import HeadConfig
from jaxdg.drawing.panels import box_panel
from jaxdg.evaluation import protocols
from jaxdg.evaluation.average_precision import AveragePrecision, Detections, Truth
from jaxdg.evaluation.coco_format import write_coco
from jaxdg.methods.method import Method
from jaxdg.tasks.task import (
    DomainResult,
    Evaluate,
    ImageTask,
    ModelState,
    Predict,
    encoder_options,
    examples_of,
)
from jaxdg.training import distributed, sharding
from jaxdg.training.step import Batch

SHOWN = 0.3  # least score of a detection in a picture


class Detection(ImageTask):
    """See `Task`."""

    score_name = "mAP50"

    def __init__(self, config: Config, methods: tuple[Method, ...] = ()):
        """Needs no data; `methods` are those that training uses."""
        super().__init__(config, box_labels(config.data.source, config.data.boxes), methods)
        self.fit = Fit(config.data.crop)

    def open(self, domain: str, train: bool) -> Dataset:
        """See `Task.open`."""
        d = self.config.data
        dataset = open_boxes(
            domain, root=d.root, train=train, streets=d.streets, own=d.boxes, skip=d.skip
        )
        self.check_labels(dataset)
        if train:
            check_room(dataset, d.max_boxes)
        return dataset

    def model(self, rngs: nnx.Rngs, boundaries: Sequence[int] = ()) -> Detector:
        """See `Task.model`."""
        m = self.config.model
        return Detector(
            DetectorConfig(
                num_classes=len(self.labels.names),
                image_size=self.config.data.crop,
                head=head_config(m),
                observed=self.observed,
                boundaries=tuple(boundaries),
                **encoder_options(m),
            ),
            rngs=rngs,
        )

    def load_weights(self, model: Detector) -> None:
        """See `Task.load_weights`."""
        m = self.config.model
        if m.weights:
            weights.load(model.backbone, m.weights)
        if m.text_weights:
            model.set_texts(
                text_embeddings(
                    [name.replace("_", " ") for name in self.labels.names], m.text_weights
                )
            )

    def loss_denominator(self, model: Detector, batch: Batch) -> Any:
        """See `Task.loss_denominator`; batch: as for `losses`."""
        return model.loss_denominator(self.targets(batch))

    def losses(
        self, model: Detector, batch: Batch, denominator: Any, key: Key[Array, ""]
    ) -> dict[str, Float[Array, ""]]:
        """See `Task.losses`; batch: `image` uint8 [b, h, w, 3], and the boxes of
        `pipeline.train_batches`.
        """
        pixel_key, drop_key, sample_key = jax.random.split(key, 3)
        output, texture = self.outputs(model, batch, pixel_key, drop_key)
        return {**model.losses(output, self.targets(batch), denominator, sample_key), **texture}

    def detect(
        self, graph: nnx.GraphDef, state: ModelState, images: Array, sizes: Array
    ) -> Detected:
        """What is in images uint8 [b, h, w, 3], of which `sizes` [b, 2] (height, width) are no
        padding.
        """
        model: Any = nnx.merge(graph, *state)
        return model.detect(self.normalize(images), sizes)

    def predictor(self, graph: nnx.GraphDef) -> Predict:
        """See `Task.predictor`: to `Detections`."""
        detect = jax.jit(lambda *arguments: self.detect(graph, *arguments))

        def predict(state: ModelState, image: np.ndarray) -> Detections:
            size = image.shape[:2]
            fitted = self.fit.prepare({"image": image})["image"]
            inside = np.array([self.fit.inside(size)], np.float32)
            return self.in_own_pixels(
                jax.tree.map(lambda x: x[0], jax.device_get(detect(state, fitted[None], inside))),
                size,
            )

        return predict

    def in_own_pixels(self, found: Detected, size: tuple[int, int]) -> Detections:
        """What was found in a fitted image (without the axis of the batch), in pixels of the image
        of `size` (height, width).
        """
        boxes, scores, classes = (np.asarray(x)[np.asarray(found.valid)] for x in found[:3])
        corner = np.tile(size[::-1], 2)
        scale = self.scale(size)
        return Detections(np.clip(boxes / scale, 0, corner).astype(np.float32), scores, classes)

    def scale(self, size: tuple[int, int]) -> np.ndarray:
        """What the corners of a box in an image of `size` (height, width) are multiplied by as it
        is fitted.
        """
        h, w = size
        new_h, new_w = self.fit.inside(size)
        return np.tile([new_w / w, new_h / h], 2)

    def evaluator(self, graph: nnx.GraphDef, mesh: Mesh) -> Evaluate:
        """See `Task.evaluator`."""
        data = self.config.data
        batch_size = self.batch_size(mesh)

        # Every host gets what all have found, and the truth beside it.
        @jax.jit(out_shardings=sharding.replicated(mesh))
        def detect(state: ModelState, batch: Batch) -> tuple[Detected, Batch]:
            truth = {key: batch[key] for key in ("index", "valid", *BOX_FIELDS)}
            return self.detect(graph, state, batch["image"], batch["inside"]), truth

        def evaluate(state: ModelState, dataset: Dataset, tick: Callable[[], None]) -> DomainResult:
            from jaxdg.data.pipeline import (
                eval_batches,
            )  # brings in grain, without which a model can be built, timed and planned

            self.check_labels(dataset)
            judged: dict[int, tuple[Truth, Detections]] = {}
            wanted = examples_of(len(dataset))
            shown = {}
            shard = (jax.process_index(), jax.process_count())
            waiting = []

            def collect() -> None:
                for found, truth in jax.device_get(waiting):
                    for row, i in enumerate(truth["index"].tolist()):
                        if i >= 0:
                            mine = self.in_own_pixels(
                                jax.tree.map(lambda x, row=row: x[row], found), dataset.size(i)
                            )
                            judged[i] = (
                                _truth({key: value[row] for key, value in truth.items()}),
                                mine,
                            )
                waiting.clear()

            # A domain may hold fuller images than the source: padding the truth changes no score.
            max_boxes = max(data.max_boxes, int(known_counts(dataset).max(initial=0)))
            options = {
                "protocol": self.fit,
                "max_boxes": max_boxes,
                "workers": data.workers,
                "shard": shard,
            }
            for batch in eval_batches(dataset, batch_size=batch_size, **options):
                inside = [
                    self.fit.inside(dataset.size(int(i))) if i >= 0 else (1, 1)
                    for i in batch["index"]
                ]
                fields = {key: batch[key] for key in ("image", "index", "valid", *BOX_FIELDS)} | {
                    "inside": np.array(inside, np.float32)
                }
                result = detect(state, sharding.to_devices(fields, mesh))
                collect()  # of the batch before, while the devices work on this one
                waiting.append(result)
                for row in np.flatnonzero(np.isin(batch["index"], list(wanted))):
                    shown[int(batch["index"][row])] = batch["image"][
                        row, : inside[row][0], : inside[row][1]
                    ]
                tick()
            collect()
            shown = distributed.gathered(shown)
            whole = self._result(dataset, range(len(dataset)), judged)
            whole.examples = [
                self._example(shown[i], self.scale(dataset.size(i)), *judged[i])
                for i in sorted(shown)
            ]
            whole.pictures = [self._picture(example) for example in whole.examples]
            part_of = [
                protocols.part_of(dataset.domain, dataset.name(i)) for i in range(len(dataset))
            ]
            for name in sorted({part for part in part_of if part}):
                whole.parts[name] = self._result(
                    dataset, [i for i, part in enumerate(part_of) if part == name], judged
                )
            return whole

        return evaluate

    def _result(
        self,
        dataset: Dataset,
        images: Sequence[int],
        judged: Mapping[int, tuple[Truth, Detections]],
    ) -> DomainResult:
        """The scores of some of the images, in this order, and what writes their boxes."""
        precision = AveragePrecision(self.labels.names)
        for i in images:
            precision.add(*judged[i])
        metrics = {
            **precision.results(self.config.evaluation.protocol),  # pyright: ignore[reportArgumentType]
            "images": len(images),
        }
        metrics["without_truth"] = [
            name for name, value in metrics["AP50"].items() if value is None
        ]
        metrics["classes"] = len(self.labels.names) - len(metrics["without_truth"])
        files = [dataset.name(i) for i in images]
        sizes = [dataset.size(i) for i in images]
        found = precision.truths, precision.detections

        def write(folder, name):
            return write_coco(folder / "detections", name, self.labels.names, files, sizes, *found)

        return DomainResult(metrics, metrics["mAP50"], [], write=write)

    def _example(
        self, image: np.ndarray, scale: np.ndarray, truth: Truth, found: Detections
    ) -> dict[str, np.ndarray]:
        """See `DomainResult.examples`; the image is `scale` times as large as its boxes say."""
        true = {
            "truth_boxes": (truth.boxes * scale).astype(np.float32),
            "truth_classes": truth.classes,
        }
        return {
            "image": image,
            **true,
            "boxes": (found.boxes * scale).astype(np.float32),
            "scores": found.scores,
            "classes": found.classes,
        }

    def _picture(self, example: dict[str, np.ndarray]) -> np.ndarray:
        """A panel of an example."""
        sure = example["scores"] >= SHOWN
        detections = example["boxes"][sure], example["classes"][sure], example["scores"][sure]
        true = example["truth_boxes"], example["truth_classes"]
        labels = self.labels
        return box_panel(example["image"], true, detections, labels.colors, labels.names)


def _truth(row: Mapping[str, np.ndarray]) -> Truth:
    """The true boxes of one image of a batch."""
    return Truth(
        *(row[key][row["valid"]] for key in ("boxes", "classes", "difficult", "crowd", "areas"))
    )


def head_config(model: ModelConfig) -> HeadConfig:
    """The head that a configuration describes."""
    head: HeadConfig = getattr(model, model.decoder)
    return head.with_texts() if model.text_weights else head
