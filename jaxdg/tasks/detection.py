"""Detection: a box around every object, judged by AP50.

The model sees images of the size it was trained on, `data.crop`: each image is resized to the
largest size of its ratio that fits. Its boxes are scaled back to its own pixels before they are
judged and written.
"""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from flax import nnx
import jax
from jax.sharding import Mesh
from jaxtyping import Array, Float, Key
import numpy as np
from safetensors import safe_open

from jaxdg import weights
from jaxdg.backbones import text_embeddings
from jaxdg.config import Config, ModelConfig
from jaxdg.data.augment.transforms import BOX_FIELDS, Fit
from jaxdg.data.boxes import box_labels, check_room, known_counts, open_boxes
from jaxdg.data.datasets import Dataset
from jaxdg.data.labels import LabelSet
from jaxdg.detection.arrays import Detected
from jaxdg.detection.detector import Detector, DetectorConfig
from jaxdg.detection.interface import HeadConfig
from jaxdg.drawing.panels import box_panel
from jaxdg.evaluation.average_precision import AveragePrecision, Detections, Truth
from jaxdg.evaluation.coco_format import write_coco
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

MIN_SCORE = 0.3  # of a detection in a picture


class Detection(ImageTask):
    """See `Task`."""

    score_name = "mAP50"

    @staticmethod
    def labels_of(config: Config) -> LabelSet:
        """See `ImageTask.labels_of`."""
        return box_labels(config.data.source, config.data.boxes)

    @property
    def fit(self) -> Fit:
        """How images come to the size that the detector takes."""
        return Fit(self.config.data.crop)

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
            texts = [name.replace("_", " ") for name in self.labels.names]
            head: Any = head_config(m)
            model.set_texts(text_embeddings(texts, m.text_weights, head.templates))
        scenes, file = model.config.head.scenes, model.config.head.scene_file
        if scenes and file is not None:
            model.set_scenes(scene_vectors(scenes, file))
        elif scenes and m.text_weights:
            model.set_scenes(text_embeddings(scenes, m.text_weights, ("{}",)))

    def loss_denominator(self, model: Detector, batch: Batch) -> Any:
        """See `Task.loss_denominator`; batch: as for `losses`."""
        return model.loss_denominator(self.targets(batch))

    def losses(
        self, model: Detector, batch: Batch, denominator: Any, key: Key[Array, ""]
    ) -> dict[str, Float[Array, ""]]:
        """See `Task.losses`; batch: `image` uint8 [b, h, w, 3] and boxes, see `train_batches`."""
        pixel_key, drop_key, sample_key = jax.random.split(key, 3)
        output, terms, kept = self.outputs(model, batch, pixel_key, drop_key)
        with jax.named_scope("losses"):
            targets = self.targets(batch)
            own, judged = model.judge(output, targets, denominator, sample_key)
            for method, one in zip(self.methods, kept, strict=True):
                terms |= method.compare(
                    model, one, output, judged, targets, denominator, sample_key
                )
            return {**own, **terms, **self.method_losses(output, targets, denominator)}

    def detect(
        self, graph: nnx.GraphDef, state: ModelState, images: Array, sizes: Array
    ) -> Detected:
        """The objects in padded images uint8 [b, h, w, 3]; `sizes` [b, 2] are without padding."""
        model: Any = nnx.merge(graph, *state)
        return model.detect(self.normalize(images), sizes)

    def batch_predictor(self, graph: nnx.GraphDef) -> PredictBatch:
        """See `Task.batch_predictor`: to `Detections`."""
        detect = jax.jit(lambda *arguments: self.detect(graph, *arguments))

        def start(
            state: ModelState, images: Sequence[np.ndarray], scores: bool = False, tta: bool = False
        ) -> Callable[[], list[Detections]]:
            if scores or tta:
                what = "scores of every pixel" if scores else "test-time augmentation"
                raise ValueError(f"{what} are of segmentation; this model detects boxes")
            sizes = [image.shape[:2] for image in images]
            fitted = np.stack([self.fit.prepare({"image": image})["image"] for image in images])
            inside = np.array([self.fit.inside(size) for size in sizes], np.float32)
            detected = detect(state, fitted, inside)

            def finish() -> list[Detections]:
                found = jax.device_get(detected)
                return [
                    self.in_own_pixels(jax.tree.map(lambda x, row=row: x[row], found), size)
                    for row, size in enumerate(sizes)
                ]

            return finish

        return start

    def padded(self, size: tuple[int, int]) -> tuple[int, int]:
        """See `Task.padded`: all images are fitted into `data.crop`."""
        return self.config.data.crop

    def in_own_pixels(self, detected: Detected, size: tuple[int, int]) -> Detections:
        """Detections of a fitted image, without batch axis, in pixels of the image of `size`."""
        boxes, scores, classes = (np.asarray(x)[np.asarray(detected.valid)] for x in detected[:3])
        corner = np.tile(size[::-1], 2)
        scale = self.scale(size)
        return Detections(np.clip(boxes / scale, 0, corner).astype(np.float32), scores, classes)

    def scale(self, size: tuple[int, int]) -> np.ndarray:
        """The factors of the corners of a box when an image of `size` (height, width) is fitted."""
        h, w = size
        new_h, new_w = self.fit.inside(size)
        return np.tile([new_w / w, new_h / h], 2)

    def evaluator(self, graph: nnx.GraphDef, mesh: Mesh) -> Evaluate:
        """See `Task.evaluator`."""
        data = self.config.data
        batch_size = self.batch_size(mesh)

        # Every host gets the detections of all hosts, and the truth beside them.
        @jax.jit(out_shardings=sharding.replicated(mesh))
        def detect(state: ModelState, batch: Batch) -> tuple[Detected, Batch]:
            truth = {key: batch[key] for key in ("index", "valid", *BOX_FIELDS)}
            with sharding.gathered(state, mesh) as whole:
                return self.detect(graph, whole, batch["image"], batch["inside"]), truth

        def evaluate(state: ModelState, dataset: Dataset, tick: Callable[[], None]) -> DomainResult:
            # Needs grain, which models that are only built, timed or planned do without.
            from jaxdg.data.pipeline import eval_batches

            self.check_labels(dataset)
            judged: dict[int, tuple[Truth, Detections]] = {}
            chosen = examples_of(len(dataset))
            images = {}
            pending = []

            def collect() -> None:
                for detected, truth in jax.device_get(pending):
                    for row, i in enumerate(truth["index"].tolist()):
                        if i < 0:
                            continue
                        one = jax.tree.map(lambda x, row=row: x[row], detected)
                        true = _truth({key: value[row] for key, value in truth.items()})
                        judged[i] = true, self.in_own_pixels(one, dataset.size(i))
                pending.clear()

            # A domain may have more boxes an image than the source. Padding changes no score.
            max_boxes = max(data.max_boxes, int(known_counts(dataset).max(initial=0)))
            for batch in eval_batches(
                dataset,
                batch_size=batch_size,
                protocol=self.fit,
                max_boxes=max_boxes,
                workers=data.workers,
                shard=(jax.process_index(), jax.process_count()),
            ):
                inside = [
                    self.fit.inside(dataset.size(int(i))) if i >= 0 else (1, 1)
                    for i in batch["index"]
                ]
                fields = {key: batch[key] for key in ("image", "index", "valid", *BOX_FIELDS)}
                fields["inside"] = np.array(inside, np.float32)
                result = detect(state, sharding.to_devices(fields, mesh))
                collect()  # the last batch, while the devices work on this one
                pending.append(result)
                for row in np.flatnonzero(np.isin(batch["index"], list(chosen))):
                    h, w = inside[row]
                    images[int(batch["index"][row])] = batch["image"][row, :h, :w]
                tick()
            collect()
            images = distributed.gathered(images)
            result = self._result(dataset, range(len(dataset)), judged)
            result.examples = [
                self._example(images[i], self.scale(dataset.size(i)), *judged[i])
                for i in sorted(images)
            ]
            result.pictures = [self._picture(example) for example in result.examples]
            part_of = parts_of(dataset)
            for name in sorted({part for part in part_of if part}):
                rows = [i for i, part in enumerate(part_of) if part == name]
                result.parts[name] = self._result(dataset, rows, judged)
            return result

        return evaluate

    def _result(
        self,
        dataset: Dataset,
        images: Sequence[int],
        judged: Mapping[int, tuple[Truth, Detections]],
    ) -> DomainResult:
        """The scores of these images, and the function that writes their boxes."""
        precision = AveragePrecision(self.labels.names)
        for i in images:
            precision.add(*judged[i])
        scores: dict[str, Any] = precision.results(self.config.evaluation.protocol)  # pyright: ignore[reportArgumentType]
        without_truth = [name for name, value in scores["AP50"].items() if value is None]
        metrics = {
            **scores,
            "images": len(images),
            "without_truth": without_truth,
            "classes": len(self.labels.names) - len(without_truth),
        }
        files = [dataset.name(i) for i in images]
        sizes = [dataset.size(i) for i in images]
        boxes = precision.truths, precision.detections
        curves = precision.curves(self.config.evaluation.protocol)  # pyright: ignore[reportArgumentType]

        def write(folder, name):
            write_coco(folder / "detections", name, self.labels.names, files, sizes, *boxes)
            curves.write(folder, name)

        return DomainResult(metrics, metrics["mAP50"], [], write=write)

    def _example(
        self, image: np.ndarray, scale: np.ndarray, truth: Truth, detections: Detections
    ) -> dict[str, np.ndarray]:
        """See `DomainResult.examples`; `scale` is that of the fitted image to its own pixels."""
        return {
            "image": image,
            "truth_boxes": (truth.boxes * scale).astype(np.float32),
            "truth_classes": truth.classes,
            "boxes": (detections.boxes * scale).astype(np.float32),
            "scores": detections.scores,
            "classes": detections.classes,
        }

    def _picture(self, example: dict[str, np.ndarray]) -> np.ndarray:
        """A panel of an example."""
        shown = example["scores"] >= MIN_SCORE
        detections = example["boxes"][shown], example["classes"][shown], example["scores"][shown]
        true = example["truth_boxes"], example["truth_classes"]
        labels = self.labels
        return box_panel(example["image"], true, detections, labels.colors, labels.names)


def _truth(row: Mapping[str, np.ndarray]) -> Truth:
    """The true boxes of one image of a batch."""
    names = ("boxes", "classes", "difficult", "crowd", "areas")
    return Truth(*(row[name][row["valid"]] for name in names))


def scene_vectors(names: Sequence[str], path: str) -> Float[np.ndarray, "p e"]:
    """The vectors of these names in a safetensors file.

    Raises:
        FileNotFoundError: no such file.
        ValueError: it has no vector of a name, or they are of several sizes.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"{path} does not exist; scripts/scene_vectors.py makes such files")
    with safe_open(path, "np") as file:
        known = list(file.keys())
        lacking = [name for name in names if name not in known]
        if lacking:
            raise ValueError(f"{path} has no scene {lacking[0]!r}; it has {', '.join(known)}")
        vectors = [file.get_tensor(name) for name in names]
    if {vector.shape for vector in vectors} != {(len(vectors[0]),)}:
        raise ValueError(f"{path}: its scenes are of shapes {[v.shape for v in vectors]}")
    return np.stack(vectors).astype(np.float32)


def head_config(model: ModelConfig) -> HeadConfig:
    """The detection head of a configuration."""
    head: HeadConfig = getattr(model, model.decoder)
    return head.with_texts() if model.text_weights else head
