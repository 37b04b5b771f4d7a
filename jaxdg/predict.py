"""Images and videos in, label maps or boxes and overlays out.

    python -m jaxdg.predict --checkpoint runs/streets --out predictions IMAGE_OR_FOLDER...
    python -m jaxdg.predict --checkpoint runs/streets --out predictions drive.mp4 camera:0

Segmentation writes `NAME.png` (class ids, uint8, of the image's size). Detection writes
`NAME.json`: a list of boxes as in COCO's results, {"category": class name, "category_id": its
number from 1, "bbox": [x, y, width, height] in pixels of the image, "score"}, the best first. Both
write `NAME_overlay.jpg`. With `--scores` segmentation also writes `NAME_scores.npz` (probabilities
float16 [h, w, k] and the names of the classes) and `NAME_confidence.png` (the highest probability,
0 to 255).

A video file, a camera (`camera:0`) or a stream (`rtsp://HOST/PATH`) gives `NAME_overlay.mp4`. With
`--label_maps` or `--scores` every frame also gives what an image does, as `NAME/000000.png` and so
on. Ctrl-C ends it with what was written.

NAME is the image's path below the given folder, without extension. If two images would have the
same name, both get their extension after it (`a_png`, `a_jpg`) or their folders before it (`x/a`,
`y/a`). A run replaces only what an earlier run wrote there (see `outputs.py`), and does not predict
what a run wrote.
"""

from collections.abc import Generator, Iterator, Sequence
from pathlib import Path
from typing import Any

from absl import flags
import cv2
import numpy as np

from jaxdg.commands import command_line as cli
from jaxdg.commands import outputs
from jaxdg.commands import process as runtime
from jaxdg.commands.batches import Item, Options, predict_all
from jaxdg.commands.inputs import check_outputs, find_images
from jaxdg.commands.predictions import SCORES, say, write_boxes, write_label, write_scores
from jaxdg.commands.threads import Behind, read_ahead
from jaxdg.commands.videos import predict_videos
from jaxdg.config import paths
from jaxdg.data import video
from jaxdg.data.images import read_image
from jaxdg.evaluation.average_precision import Detections
from jaxdg.tasks.loading import Model, load
from jaxdg.tasks.run_state import opened


def predict_images(
    model: Model, images: Sequence[tuple[Path, Path]], out: outputs.Outputs, options: Options
) -> int:
    """Predicts images and names those that fail; returns how many did.

    Args:
        model: from `load`.
        images: from `find_images`.
        out: where predictions are written to.
        options: how.
    """
    failed = []

    def fail(key: tuple[Path, Path], error: Exception) -> None:
        file = key[0]
        failed.append(file)
        reason = str(error).split("; fetch the file again")[0].removeprefix(f"{file}: ")
        say(f"failed: {file}: {' '.join(reason.split())}")

    def read() -> Generator[tuple[tuple[Path, Path], np.ndarray | Exception], None, None]:
        for key in images:
            try:
                yield key, read_image(str(key[0]), upright=True)
            except (ValueError, cv2.error) as error:
                yield key, error

    def readable() -> Iterator[Item]:
        for key, image in read_ahead(read(), options.batch_size):
            if isinstance(image, Exception):
                fail(key, image)
            else:
                yield key, image

    def write(name: Path, image: np.ndarray, prediction: Any) -> None:
        target = out.folder / name
        if options.scores:
            prediction, scores = prediction
            write_scores(target, scores, model.labels, out.write)
        if isinstance(prediction, Detections):
            threshold = options.score_threshold
            line = write_boxes(target, image, prediction, model.labels, threshold, out.write)
        else:
            line = write_label(target, image, prediction, model.labels, out.write)
        print(line, flush=True)

    with Behind(options.batch_size) as behind:

        def deliver(key: tuple[Path, Path], image: np.ndarray, prediction: Any) -> None:
            behind(write, key[1], image, prediction)

        predict_all(model, readable(), options, deliver, fail)
    return len(failed)


def main(arguments: Sequence[str]) -> None:
    """Predicts the images and videos that the arguments name."""
    if len(arguments) < 2:
        raise ValueError(
            "name at least one image or folder: python -m jaxdg.predict --checkpoint DIR --out DIR"
            " IMAGE_OR_FOLDER..."
        )
    live = [*dict.fromkeys(filter(video.is_live, arguments[1:]))]
    given = [
        paths.given(argument, "an image, a folder, a video or camera:NUMBER")
        for argument in arguments[1:]
        if argument not in live
    ]
    found = find_images(given, say) if given else []
    images = [(file, name) for file, name in found if not video.is_video(file)]
    videos = [(str(file), name) for file, name in found if video.is_video(file)]
    videos += [(source, Path(video.live_name(source))) for source in live]
    out = outputs.Outputs(Path(_OUT.value))
    options = Options(
        batch_size=_BATCH_SIZE.value,
        scores=_SCORES.value,
        tta=_TTA.value,
        frames=_LABEL_MAPS.value,
        score_threshold=_SCORE_THRESHOLD.value,
    )
    boxes = opened(_CHECKPOINT.value).config.task == "detection"
    if boxes and (options.scores or options.tta):
        flag = "--scores" if options.scores else "--tta"
        raise ValueError(f"{flag} is of segmentation; the model in {_CHECKPOINT.value} detects")
    suffixes = [".json" if boxes else ".png", "_overlay.jpg", *(SCORES if options.scores else ())]
    check_outputs(out, images, suffixes, videos, frames=options.frames or options.scores)
    runtime.set_up()
    model = load(_CHECKPOINT.value)
    failed = predict_images(model, images, out, options) if images else 0
    if videos:
        alone = len(images) + len(videos) == 1
        failed += predict_videos(model, videos, out, options, alone)
    if failed:
        what = "images and videos" if videos else "images"
        raise ValueError(
            f"{failed} of {len(images) + len(videos)} {what} could not be predicted and are named"
            f" above; the others are in {out.folder}"
        )


if __name__ == "__main__":
    _CHECKPOINT = cli.define_checkpoint()
    _OUT = cli.define_path(
        "out",
        "Folder for NAME.png (class ids) or NAME.json (boxes), and NAME_overlay.jpg or .mp4.",
        required=True,
    )
    _BATCH_SIZE = flags.DEFINE_integer(
        "batch_size", 1, "Images or frames at once; neighbours of one size.", lower_bound=1
    )
    _SCORES = flags.DEFINE_bool(
        "scores",
        False,
        "Also write the probabilities of classes (NAME_scores.npz, float16) and the highest of them"
        " (NAME_confidence.png, 0 to 255).",
    )
    _LABEL_MAPS = flags.DEFINE_bool(
        "label_maps",
        False,
        "Of videos, also write every frame's label map (NAME/000000.png, ..) or boxes (.json).",
    )
    _TTA = flags.DEFINE_bool(
        "tta",
        False,
        "Test-time augmentation of segmentation: probabilities are averaged over six sizes, 0.5 to"
        " 1.75, each also mirrored.",
    )
    _SCORE_THRESHOLD = flags.DEFINE_float(
        "score_threshold", 0.3, "Least score of a box that is written and drawn.", 0.0, 1.0
    )
    cli.run(main)
