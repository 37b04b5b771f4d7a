"""Images in, label maps or boxes and overlays out.

    python -m jaxdg.predict --checkpoint runs/streets --out predictions IMAGE_OR_FOLDER...

Segmentation writes `NAME.png` (class ids, uint8, of the image's size). Detection writes `NAME.json`: a list of boxes as in COCO's results,
{"category": class name, "category_id": its number from 1, "bbox": [x, y, width, height] in pixels of the image, "score"}, the best first.
Both write `NAME_overlay.jpg`.
"""

from collections.abc import Iterable, Sequence
import json
from pathlib import Path

from absl import flags
import numpy as np
from PIL import Image

from jaxdg import cli, paths, runtime, visualize
from jaxdg.data.images import read_image
from jaxdg.data.labels import LabelSet
from jaxdg.detection.average_precision import Detections
from jaxdg.tasks import load

SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".tif", ".tiff", ".webp")


def find_images(paths: Iterable[str]) -> list[tuple[Path, Path]]:
    """(image file, its name below --out without suffix) of every image given or found in the folders given, in order.

    Raises:
        FileNotFoundError: a path does not exist.
        ValueError: a folder holds no images, or two images would be written to the same file.
    """
    found: list[tuple[Path, Path]] = []
    for path in map(Path, paths):
        if path.is_dir():
            files = sorted(f for f in path.rglob("*") if f.suffix.lower() in SUFFIXES)
            if not files:
                raise ValueError(f"{path} holds no images ({' '.join(SUFFIXES)})")
            found += [(f, f.relative_to(path).with_suffix("")) for f in files]
        elif path.is_file():
            found.append((path, Path(path.stem)))
        else:
            raise FileNotFoundError(f"{path} does not exist")
    taken: dict[Path, Path] = {}
    for file, name in found:
        if name in taken:
            raise ValueError(f"{taken[name]} and {file} would both be written as {name}; predict them into different folders")
        taken[name] = file
    return found


def write_label(target: Path, image: np.ndarray, label: np.ndarray, labels: LabelSet) -> str:
    """Writes `TARGET.png` and `TARGET_overlay.jpg` of a label map uint8 [h, w]; returns a line about it."""
    target.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(label).save(f"{target}.png")
    _save(f"{target}_overlay.jpg", visualize.overlay(image, label, labels.colors, labels.names))
    ids, counts = np.unique(label, return_counts=True)
    shares = sorted(zip(counts / label.size, ids, strict=True), reverse=True)[:3]
    return f"{target}.png  " + ", ".join(f"{labels.names[i]} {100 * share:.0f} %" for share, i in shares)


def write_boxes(target: Path, image: np.ndarray, found: Detections, labels: LabelSet, score_threshold: float) -> str:
    """Writes `TARGET.json` and `TARGET_overlay.jpg` of the boxes of at least this score; returns a line about them."""
    sure = found.scores >= score_threshold
    boxes, scores, classes = found.boxes[sure], found.scores[sure], found.classes[sure]
    entries = [
        {"category": labels.names[k], "category_id": k + 1, "bbox": [x0, y0, x1 - x0, y1 - y0], "score": score}
        for (x0, y0, x1, y1), score, k in zip(boxes.tolist(), scores.tolist(), classes.tolist(), strict=True)
    ]
    target.parent.mkdir(parents=True, exist_ok=True)
    Path(f"{target}.json").write_text(json.dumps(entries))
    _save(f"{target}_overlay.jpg", visualize.box_overlay(image, boxes, classes, labels.colors, labels.names, scores))
    counts = ((np.count_nonzero(classes == k), name) for k, name in enumerate(labels.names))
    return f"{target}.json  " + (", ".join(f"{count} {name}" for count, name in counts if count) or "nothing")


def _save(path: str, picture: np.ndarray) -> None:
    Image.fromarray(picture).save(path, quality=92)


def main(arguments: Sequence[str]) -> None:
    """Predicts the images that the arguments name."""
    if len(arguments) < 2:
        raise ValueError("name at least one image or folder: python -m jaxdg.predict --checkpoint DIR --out DIR IMAGE_OR_FOLDER...")
    images = find_images([paths.given(argument, "an image or folder") for argument in arguments[1:]])
    runtime.set_up()
    model, out = load(_CHECKPOINT.value), Path(_OUT.value)
    for file, name in images:
        image = read_image(str(file), upright=True)
        seen = model.predict(image)
        if isinstance(seen, Detections):
            print(write_boxes(out / name, image, seen, model.labels, _SCORE_THRESHOLD.value), flush=True)
        else:
            print(write_label(out / name, image, seen, model.labels), flush=True)


if __name__ == "__main__":
    _CHECKPOINT = cli.define_path("checkpoint", "A workdir, or one step in it such as DIR/checkpoints/500.", required=True)
    _OUT = cli.define_path("out", "Folder for NAME.png (class ids) or NAME.json (boxes), and NAME_overlay.jpg.", required=True)
    _SCORE_THRESHOLD = flags.DEFINE_float("score_threshold", 0.3, "Least score of a box that is written and drawn.", 0.0, 1.0)
    cli.run(main)
