"""Frames of video files, cameras and streams, by OpenCV.

A file is read from its first frame to its last, turned as players show it. A camera or a stream
shows what is there now, so each frame gets the number that its time has at the rate of the source.
"""

from collections.abc import Generator
import os
from pathlib import Path
import re
import time
from typing import NamedTuple

import cv2
from jaxtyping import UInt8
import numpy as np

# FFmpeg's own lines about damaged files would stand between ours.
os.environ.setdefault("OPENCV_FFMPEG_LOGLEVEL", "-8")

SUFFIXES = (".mp4", ".avi", ".mkv", ".mov", ".webm")
USUAL_RATE = 25.0  # frames a second of sources that do not tell
LIVE = re.compile(r"camera:(\d+)|(?:rtsps?|https?)://(?:[^/@]*@)?(\S+)")


class Frame(NamedTuple):
    """A frame and its number, from 0."""

    number: int
    image: UInt8[np.ndarray, "h w 3"]


def is_video(path: str | Path) -> bool:
    """Whether the name of a file is a video's."""
    return str(path).lower().endswith(SUFFIXES)


def is_live(source: str) -> bool:
    """Whether it names a camera, such as `camera:0`, or a stream, such as `rtsp://HOST/PATH`."""
    return LIVE.fullmatch(source) is not None


def shown(source: str) -> str:
    """A source as messages may show it: without a stream's user and password."""
    return re.sub(r"(?<=://)[^/@]*@", "", source)


def live_name(source: str) -> str:
    """The name of a camera or stream for files: without a stream's user and password."""
    match = LIVE.fullmatch(source)
    assert match
    return f"camera_{match[1]}" if match[1] else re.sub(r"[^\w.-]+", "_", match[2]).strip("_.")


class Video:
    """An open video.

    Attributes:
        live: whether it is a camera or a stream.
        rate: frames a second.
        stated: how many frames the header of a file states; None if it does not tell.
        read: how many frames `frames` has read so far.
    """

    def __init__(self, source: str):
        """Opens a video.

        Args:
            source: the path of a file, or what `is_live` accepts.

        Raises:
            ValueError: it cannot be opened.
        """
        self._source = source
        self.live = is_live(source)
        self.read = 0
        camera = re.fullmatch(r"camera:(\d+)", source)
        before = cv2.utils.logging.getLogLevel()
        cv2.utils.logging.setLogLevel(cv2.utils.logging.LOG_LEVEL_SILENT)
        try:
            self._capture = cv2.VideoCapture(int(camera[1]) if camera else source)
        finally:
            cv2.utils.logging.setLogLevel(before)
        if not self._capture.isOpened():
            if self.live:
                why = "cannot be opened; is it there, and does nothing else use it?"
            else:
                why = "cannot be read as a video; an mp4 or mov file that was cut lacks its index"
            raise ValueError(f"{shown(source)}: {why}")
        rate = self._capture.get(cv2.CAP_PROP_FPS)
        self.rate = rate if 0 < rate <= 1000 else USUAL_RATE
        stated = self._capture.get(cv2.CAP_PROP_FRAME_COUNT)
        self.stated = int(stated) if stated > 0 and not self.live else None

    def frames(self) -> Generator[Frame, None, None]:
        """The frames, once; closes the video in the end.

        Raises:
            ValueError: a frame has another size than the first.
        """
        first = None
        size = None
        try:
            while True:
                there, image = self._capture.read()
                if not there:
                    return
                h, w = image.shape[:2]
                size = size or (h, w)
                if size != (h, w):
                    was = f"the first was {size[1]}x{size[0]}"
                    raise ValueError(f"frame {self.read} is {w}x{h} pixels, {was}")
                number = self.read
                if self.live:
                    now = time.monotonic()
                    first = now if first is None else first
                    number = round((now - first) * self.rate)
                self.read += 1
                yield Frame(number, cv2.cvtColor(image, cv2.COLOR_BGR2RGB))
        finally:
            self._capture.release()
