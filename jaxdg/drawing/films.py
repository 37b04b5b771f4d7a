"""Films of overlays: frames of one size above a legend that stays as it is."""

from collections.abc import Sequence
from pathlib import Path
from types import TracebackType

import cv2
from jaxtyping import UInt8
import numpy as np

from jaxdg.drawing.legends import LegendRow, blank, draw_legend, font_size, stack
from jaxdg.drawing.palettes import Color, Picture, check_numbers, rgb


class Film:
    """An MP4 file (MPEG-4 Part 2) that is written frame by frame; a context manager that ends it.

    Below every frame stands one legend of all classes, so that nothing jumps from frame to frame.

    Attributes:
        written: frames so far.
    """

    def __init__(self, path: Path, rate: float, colors: Sequence[Color], names: Sequence[str]):
        """Writes nothing before the first frame.

        Args:
            path: of the file; ends in `.mp4`.
            rate: frames a second.
            colors: (red, green, blue) of each class.
            names: name of each class.

        Raises:
            ValueError: names and colours differ in number.
        """
        check_numbers(colors, names)
        self._path = path
        self._rate = rate
        self._rows = [LegendRow(n, rgb(c), 0.0) for n, c in zip(names, colors, strict=True)]
        self._legend: UInt8[np.ndarray, "_ _ 3"] | None = None
        self._size: tuple[int, int] | None = None
        self._writer: cv2.VideoWriter | None = None
        self.written = 0

    def write(self, picture: Picture, number: int) -> None:
        """Shows a picture from a frame's number on.

        It is repeated for numbers that were left out, so that the film keeps its pace, and dropped
        if the number is not new.

        Args:
            picture: RGB, every time of the same size.
            number: of the frame, from 0.

        Raises:
            ValueError: the picture has another size than the first.
            OSError: no video can be written there.
        """
        h, w = picture.shape[:2]
        if self._size is None or self._legend is None:
            texts = [""] * len(self._rows)
            self._size = h, w
            self._legend = draw_legend(self._rows, texts, w, font_size(w))
        if self._size != (h, w):
            was = f"{self._size[1]}x{self._size[0]}"
            raise ValueError(f"frame {number} is {w}x{h} pixels, the first was {was}")
        page = stack([picture, self._legend])
        # The codec halves the size of its colours, so both sides are even.
        page_h, page_w = (side + side % 2 for side in page.shape[:2])
        canvas = blank(page_h, page_w)
        canvas[: page.shape[0], : page.shape[1]] = page
        if self._writer is None:
            codec = cv2.VideoWriter.fourcc(*"mp4v")
            size = (page_w, page_h)
            self._writer = cv2.VideoWriter(str(self._path), cv2.CAP_FFMPEG, codec, self._rate, size)
            if not self._writer.isOpened():
                raise OSError(f"{self._path}: no video of {page_w}x{page_h} pixels can be written")
        shown = cv2.cvtColor(canvas, cv2.COLOR_RGB2BGR)
        while self.written <= number:
            self._writer.write(shown)
            self.written += 1

    def __enter__(self) -> "Film":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._writer is not None:
            self._writer.release()
