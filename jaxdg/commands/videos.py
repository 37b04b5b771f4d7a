"""Videos through a model: the frames' overlays as a film, and on request a file of each frame."""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
import sys
import time
from typing import Any

import numpy as np

from jaxdg.commands import command_line as cli
from jaxdg.commands import outputs
from jaxdg.commands.batches import Options, predict_all
from jaxdg.commands.inputs import frame_files
from jaxdg.commands.predictions import (
    Write,
    boxes_line,
    classes_line,
    encoded,
    entries,
    say,
    sure_boxes,
    write_scores,
)
from jaxdg.commands.threads import Behind, read_ahead
from jaxdg.data import video
from jaxdg.drawing.films import Film
from jaxdg.drawing.overlays import draw_boxes, tint
from jaxdg.evaluation.average_precision import Detections
from jaxdg.tasks.loading import Model


class Shown:
    """Draws the predictions of a video's frames into a film, and adds up what they say.

    Attributes:
        frames: so far.
        counts: pixels, or boxes, of each class.
        changed: pixels whose class differs from that in the frame before.
        compared: pixels that have a frame before.
    """

    def __init__(
        self, model: Model, film: Film, target: Path, write: Write | None, options: Options
    ):
        """Args:
        model: from `load`.
        film: of overlays.
        target: folder of the files of frames.
        write: writes those; None: they are not written.
        options: how.
        """
        self._labels = model.labels
        self._film = film
        self._target = target
        self._write = write
        self._options = options
        self._before: np.ndarray | None = None
        self.frames = 0
        self.counts = np.zeros(len(model.labels.names), np.int64)
        self.changed = 0
        self.compared = 0

    def add(self, number: int, image: np.ndarray, prediction: Any) -> None:
        """Adds a frame; with scores `prediction` is a pair."""
        labels = self._labels
        colors, names = labels.colors, labels.names
        target = self._target / f"{number:06d}"
        if self._options.scores:
            prediction, scores = prediction
            assert self._write is not None
            write_scores(target, scores, labels, self._write)
        if isinstance(prediction, Detections):
            sure = sure_boxes(prediction, self._options.score_threshold)
            picture = draw_boxes(image, sure.boxes, sure.classes, colors, names, sure.scores)
            found = sure.classes
            if self._write is not None:
                self._write(Path(f"{target}.json"), entries(sure, labels))
        else:
            picture = tint(image, prediction, colors)
            found = prediction.ravel()
            if self._before is not None and self._before.shape == prediction.shape:
                self.changed += int(np.count_nonzero(self._before != prediction))
                self.compared += prediction.size
            self._before = prediction
            if self._write is not None:
                self._write(Path(f"{target}.png"), encoded(prediction, "PNG"))
        self._film.write(picture, number)
        self.counts += np.bincount(found, minlength=len(names))
        self.frames += 1

    def summary(self, seconds: float, boxes: bool) -> str:
        """What the frames were, without a line's end."""
        parts = [f"{self.frames} frames, {self.frames / seconds:.1f} a second"]
        if self.compared:
            share = 100 * self.changed / self.compared
            parts.append(f"{share:.1f} % of pixels change class from one frame to the next")
        parts.append((boxes_line if boxes else classes_line)(self.counts, self._labels))
        return "; ".join(parts)


def predict_video(
    model: Model,
    source: str,
    name: Path,
    out: outputs.Outputs,
    options: Options,
    stop: Callable[[], bool] = lambda: False,
) -> None:
    """Predicts the frames of a video into `NAME_overlay.mp4`, and tells how many and how fast.

    Args:
        model: from `load`.
        source: as for `Video`.
        name: below the folder of outputs.
        out: where predictions are written to.
        options: how.
        stop: whether to end early; what was written by then stays.

    Raises:
        ValueError: the video cannot be read, or not to its end; what was written stays.
    """
    given = video.Video(source)
    shown_as = video.shown(source)
    target = out.folder / f"{name}_overlay.mp4"
    write = out.write if options.frames or options.scores else None
    for file in frame_files(out.folder / name) if write else ():
        file.unlink()  # of an earlier run, whose video may have been longer
    boxes = model.task.config.task == "detection"
    errors: list[str] = []
    asked = False

    def ended() -> bool:
        """Also after an error, as the frames behind it would not fit."""
        nonlocal asked
        asked = asked or stop()
        return asked or bool(errors)

    def fail(number: int, error: Exception) -> None:
        errors.append(f"frame {number}: {' '.join(str(error).split())}")

    ahead = 2 * options.batch_size
    frames: Iterator[Any] = read_ahead(given.frames(), ahead, newest=given.live, stop=ended)
    begun = time.perf_counter()
    labels = model.labels
    with (
        out.writing(target) as partial,
        Film(partial, given.rate, labels.colors, labels.names) as film,
        Behind(ahead) as behind,
    ):
        shown = Shown(model, film, out.folder / name, write, options)
        progress = Progress(shown_as, given.stated, begun)

        def deliver(number: int, image: np.ndarray, prediction: Any) -> None:
            behind(shown.add, number, image, prediction)
            progress(shown.frames)

        try:
            predict_all(model, frames, options, deliver, fail)
        except ValueError as error:
            errors.append(str(error))  # and what came before it is kept
    progress.end()
    seconds = time.perf_counter() - begun
    if shown.frames:
        print(f"{target}  {shown.summary(seconds, boxes)}", flush=True)
    where = f"{target} holds these" if shown.frames else "nothing was written"
    if errors:
        raise ValueError(f"{shown_as}: {errors[0]}; {shown.frames} frames were before it, {where}")
    if asked and not given.live:
        of = f" of {given.stated}" if given.stated else ""
        raise ValueError(f"{shown_as}: stopped after {shown.frames}{of} frames; {where}")
    if not asked and given.stated and given.read < given.stated:
        raise ValueError(
            f"{shown_as}: cut short or damaged, {given.read} of the {given.stated} frames that"
            f" its header states could be read; {where}"
        )
    if not shown.frames:
        raise ValueError(f"{shown_as}: no frame could be read; {where}")


def predict_videos(
    model: Model,
    videos: Sequence[tuple[str, Path]],
    out: outputs.Outputs,
    options: Options,
    alone: bool,
) -> int:
    """Predicts videos and names those that fail; returns how many did.

    Args:
        model: from `load`.
        videos: sources and names, see `predict_video`.
        out: where predictions are written to.
        options: how.
        alone: whether the only one raises its error instead.
    """
    interrupt = cli.Interrupt()  # a camera has no other end
    failed = 0
    for number, (source, name) in enumerate(videos):
        try:
            predict_video(model, source, name, out, options, lambda: interrupt.asked)
        except ValueError as error:
            if alone:
                raise
            failed += 1
            say(f"failed: {error}")
        if interrupt.asked:
            for other, _ in videos[number + 1 :]:
                failed += 1
                say(f"failed: {video.shown(other)}: not begun, as it was to stop before")
            break
    return failed


class Progress:
    """Says every now and then how many frames are done, and how many a second."""

    def __init__(self, name: str, total: int | None, begun: float):
        """Args:
        name: of the video.
        total: its frames, if known.
        begun: when, by `time.perf_counter`.
        """
        self._name = name
        self._of = f" of {total}" if total else ""
        self._begun = self._last = begun
        self._terminal = sys.stderr.isatty()

    def __call__(self, frames: int) -> None:
        """Args:
        frames: done so far.
        """
        now = time.perf_counter()
        if now - self._last < (1 if self._terminal else 30):
            return
        self._last = now
        rate = frames / (now - self._begun)
        line = f"{self._name}: {frames}{self._of} frames, {rate:.1f} a second"
        print(line, end="\r" if self._terminal else "\n", file=sys.stderr, flush=True)

    def end(self) -> None:
        """Clears the line of a terminal."""
        if self._terminal:
            print("\x1b[2K", end="", file=sys.stderr, flush=True)
