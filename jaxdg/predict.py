"""Images in, label maps or boxes and overlays out.

    python -m jaxdg.predict --checkpoint runs/streets --out predictions IMAGE_OR_FOLDER...

Segmentation writes `NAME.png` (class ids, uint8, of the image's size). Detection writes
`NAME.json`: a list of boxes as in COCO's results, {"category": class name, "category_id": its
number from 1, "bbox": [x, y, width, height] in pixels of the image, "score"}, the best first. Both
write `NAME_overlay.jpg`.

NAME is the image's path below the given folder, without extension. If two images would have the
same name, both get their extension after it (`a_png`, `a_jpg`) or their folders before it (`x/a`,
`y/a`). A run replaces only what an earlier run wrote there (see `outputs.py`), and does not predict
what a run wrote.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
import functools
import io
import json
import os
from pathlib import Path
import sys

from absl import flags
import cv2
import jax
import numpy as np
from PIL import Image

from jaxdg.commands import command_line as cli
from jaxdg.commands import outputs
from jaxdg.commands import process as runtime
from jaxdg.config import paths
from jaxdg.data import storage
from jaxdg.data.images import read_image
from jaxdg.data.index import IMAGE_SUFFIXES
from jaxdg.data.labels import LabelSet
from jaxdg.drawing.overlays import box_overlay, overlay
from jaxdg.evaluation.average_precision import Detections
from jaxdg.tasks.loading import load
from jaxdg.tasks.run_state import opened

NAMED = 5  # a line about files names at most so many
Say = Callable[[str], None]
Write = Callable[[Path, bytes], None]


def find_images(paths: Iterable[str], say: Say = lambda line: None) -> list[tuple[Path, Path]]:
    """The images of these paths, each once and in order: (file, name below --out without suffix).

    Args:
        paths: of images and folders.
        say: receives a line about each kind of file that is skipped.

    Raises:
        FileNotFoundError: a path does not exist.
        ValueError: a folder holds no images.
    """
    found: dict[str, tuple[Path, Path]] = {}  # by real path
    written: list[str] = []
    for path in map(Path, paths):
        if path.is_dir():
            files = _in_folder(path, written, say)
        elif path.is_file():
            files = [(path, Path(path.stem))]
            if os.path.realpath(path) in outputs.written_above(os.path.dirname(path) or "."):
                written.append(str(path))
                continue
        else:
            raise FileNotFoundError(f"{path} does not exist")
        for file, name in files:
            found.setdefault(os.path.realpath(file), (file, name))
    if written:
        say(f"passed over, as predict wrote them: {_some(sorted(written))}")
    if not found:
        raise ValueError("no image is left to predict; name others")
    return list(
        zip((file for file, _ in found.values()), _distinct([*found.values()]), strict=True)
    )


def _in_folder(path: Path, written: list[str], say: Say) -> list[tuple[Path, Path]]:
    """The images below a folder and their names; adds files that predict wrote to `written`."""
    skipped = storage.SkippedEntries()
    files = []
    others = []
    mine = outputs.written_above(str(path))
    before = len(written)
    for parent, names in storage.walk(str(path), skipped):
        real = os.path.realpath(parent)
        mine |= {os.path.join(real, name) for name in outputs.Outputs(Path(parent)).digests}
        for name in names:
            file = os.path.join(parent, name)
            if os.path.join(real, name) in mine:
                written.append(file)
            else:
                (files if name.lower().endswith(IMAGE_SUFFIXES) else others).append(file)
    for line in skipped.notes():
        say(line)
    if others:
        say(f"passed over, as their types are not read: {_some(sorted(others))}")
    if not files and len(written) == before:
        raise ValueError(f"{path} holds no images ({' '.join(IMAGE_SUFFIXES)})")
    return [(file, file.relative_to(path).with_suffix("")) for file in sorted(map(Path, files))]


def _some(names: Sequence[str]) -> str:
    more = f", .. ({len(names)} files)" if len(names) > NAMED else ""
    return ", ".join(names[:NAMED]) + more


def _distinct(found: Sequence[tuple[Path, Path]]) -> list[Path]:
    """A distinct name for each image: its own if no other image has it."""
    groups: dict[Path, list[int]] = {}
    for i, (_, name) in enumerate(found):
        groups.setdefault(name, []).append(i)
    names = [name for _, name in found]
    taken = {name for name, members in groups.items() if len(members) == 1}
    for members in (members for members in groups.values() if len(members) > 1):
        proposals = next(
            made
            for made in _proposals([found[i] for i in members])
            if len({*made}) == len(made) and taken.isdisjoint(made)
        )
        taken |= {*proposals}
        for i, name in zip(members, proposals, strict=True):
            names[i] = name
    return names


def _proposals(group: Sequence[tuple[Path, Path]]) -> Iterator[list[Path]]:
    """Proposes names for images of one name: with extensions, with folders above, with both."""
    above = [Path(os.path.abspath(file)).parts[1 : -len(name.parts)] for file, name in group]
    for depth in range(max(map(len, above)) + 1):
        names = [
            Path(*parts[len(parts) - min(depth, len(parts)) :], name)
            for parts, (_, name) in zip(above, group, strict=True)
        ]
        if depth:
            yield names
        yield [
            Path(f"{name}_{file.suffix[1:]}") for name, (file, _) in zip(names, group, strict=True)
        ]
    for number in range(1, sys.maxsize):  # an image is called as another would be
        yield [
            Path(f"{name}_{number}_{file.suffix[1:]}")
            for name, (file, _) in zip(names, group, strict=True)
        ]


def check_outputs(out: outputs.Outputs, images: Sequence[tuple[Path, Path]], suffix: str) -> None:
    """Checks that predicting these images replaces no file that predict did not write.

    Args:
        out: the folder to write to.
        images: from `find_images`.
        suffix: of the files beside the overlays.

    Raises:
        ValueError: names a file that would be replaced, or a folder that would mix images and
            predictions.
    """
    real = functools.cache(os.path.realpath)
    folders = {real(file.parent): file for file, _ in images}
    for _, name in images:
        folder = (out.folder / name).parent
        if image := folders.get(real(folder)):
            raise ValueError(
                f"--out would put predictions into {folder}, the folder of the image {image}; give"
                " another folder"
            )
        for target in (
            Path(f"{out.folder / name}{suffix}"),
            Path(f"{out.folder / name}_overlay.jpg"),
        ):
            if not out.may_write(target):
                raise ValueError(
                    f"{target} is there and is not what predict wrote there"
                    f" ({out.folder / outputs.NAME} lists that); give another --out, or move the"
                    " file"
                )


def write_label(
    target: Path, image: np.ndarray, label: np.ndarray, labels: LabelSet, write: Write | None = None
) -> str:
    """Writes a label map uint8 [h, w] as `TARGET.png` and `TARGET_overlay.jpg`; returns a line."""
    write = write or outputs.Outputs(target.parent).write
    write(Path(f"{target}.png"), _encoded(label, "PNG"))
    write(
        Path(f"{target}_overlay.jpg"),
        _encoded(overlay(image, label, labels.colors, labels.names), "JPEG"),
    )
    ids, counts = np.unique(label, return_counts=True)
    shares = sorted(zip(counts / label.size, ids, strict=True), reverse=True)[:3]
    return f"{target}.png  " + ", ".join(
        f"{labels.names[i]} {100 * share:.0f} %" for share, i in shares
    )


def write_boxes(
    target: Path,
    image: np.ndarray,
    found: Detections,
    labels: LabelSet,
    score_threshold: float,
    write: Write | None = None,
) -> str:
    """Writes boxes with at least this score as `TARGET.json` and `TARGET_overlay.jpg`."""
    write = write or outputs.Outputs(target.parent).write
    sure = found.scores >= score_threshold
    boxes = found.boxes[sure]
    scores = found.scores[sure]
    classes = found.classes[sure]
    entries = [
        {
            "category": labels.names[k],
            "category_id": k + 1,
            "bbox": [x0, y0, x1 - x0, y1 - y0],
            "score": score,
        }
        for (x0, y0, x1, y1), score, k in zip(
            boxes.tolist(), scores.tolist(), classes.tolist(), strict=True
        )
    ]
    write(Path(f"{target}.json"), json.dumps(entries).encode())
    write(
        Path(f"{target}_overlay.jpg"),
        _encoded(
            box_overlay(image, boxes, classes, labels.colors, labels.names, scores),
            "JPEG",
        ),
    )
    counts = ((np.count_nonzero(classes == k), name) for k, name in enumerate(labels.names))
    return f"{target}.json  " + (
        ", ".join(f"{count} {name}" for count, name in counts if count) or "nothing"
    )


def _encoded(picture: np.ndarray, form: str) -> bytes:
    data = io.BytesIO()
    Image.fromarray(picture).save(data, form, quality=92)
    return data.getvalue()


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def main(arguments: Sequence[str]) -> None:
    """Predicts the images that the arguments name."""
    if len(arguments) < 2:
        raise ValueError(
            "name at least one image or folder: python -m jaxdg.predict --checkpoint DIR --out DIR"
            " IMAGE_OR_FOLDER..."
        )
    images = find_images(
        [paths.given(argument, "an image or folder") for argument in arguments[1:]], _say
    )
    out = outputs.Outputs(Path(_OUT.value))
    boxes = opened(_CHECKPOINT.value).config.task == "detection"
    check_outputs(out, images, ".json" if boxes else ".png")
    runtime.set_up()
    model = load(_CHECKPOINT.value)
    failed = 0
    for file, name in images:
        try:
            image = read_image(str(file), upright=True)
            prediction = model.predict(image)
        # JaxRuntimeError: the image is too large for the memory.
        except (ValueError, cv2.error, jax.errors.JaxRuntimeError) as error:
            failed += 1
            reason = str(error).split("; fetch the file again")[0].removeprefix(f"{file}: ")
            _say(f"failed: {file}: {' '.join(reason.split())}")
            continue
        target = out.folder / name
        if isinstance(prediction, Detections):
            threshold = _SCORE_THRESHOLD.value
            line = write_boxes(target, image, prediction, model.labels, threshold, out.write)
        else:
            line = write_label(target, image, prediction, model.labels, out.write)
        print(line, flush=True)
    if failed:
        raise ValueError(
            f"{failed} of {len(images)} images could not be predicted and are named above; the"
            f" others are in {out.folder}"
        )


if __name__ == "__main__":
    _CHECKPOINT = cli.define_checkpoint()
    _OUT = cli.define_path(
        "out",
        "Folder for NAME.png (class ids) or NAME.json (boxes), and NAME_overlay.jpg.",
        required=True,
    )
    _SCORE_THRESHOLD = flags.DEFINE_float(
        "score_threshold", 0.3, "Least score of a box that is written and drawn.", 0.0, 1.0
    )
    cli.run(main)
