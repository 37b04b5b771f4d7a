"""Pixels of image files and ids of label files, or one line that says why there are none."""

import io

import cv2
from jaxtyping import Integer, UInt8
import numpy as np
from PIL import Image

from jaxdg.data import index, storage


def read_image(path: str) -> UInt8[np.ndarray, "h w 3"]:
    """Decodes an image as it is stored; a rotation in its metadata is not applied, as label files have none.

    Args:
        path: of a format that OpenCV or Pillow reads, as `storage.read` takes it.

    Returns:
        RGB.

    Raises:
        ValueError: the file is unreadable, truncated or damaged; names it.
    """
    data = _whole(path)
    # A third faster than Pillow for PNG, with the same pixels.
    bgr = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR | cv2.IMREAD_IGNORE_ORIENTATION)
    if bgr is None:
        return np.asarray(_decode(path, data).convert("RGB"))  # or it says what is wrong
    return cv2.cvtColor(bgr, cv2.COLOR_BGR2RGB, dst=bgr)


def read_label(path: str, *, red: bool = False) -> Integer[np.ndarray, "h w"]:
    """Decodes a label file: grey values of 1 to 16 bits, or the indices (never the colours) of a palette image.

    Args:
        path: a single-channel image, usually PNG, as `storage.read` takes it.
        red: a 16-bit RGB image instead, which holds the ids in its red channel, as SYNTHIA's.

    Returns:
        Ids as stored.

    Raises:
        ValueError: the file is unreadable, truncated, damaged or an image of another kind; names it.
    """
    data = _whole(path)
    if red:
        bgr = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_UNCHANGED)  # Pillow would cut it to 8 bits
        if bgr is None or bgr.dtype != np.uint16 or bgr.ndim != 3:
            kind = f"{8 if bgr is None else 8 * bgr.itemsize}-bit {_decode(path, data).mode}"
            raise ValueError(f"{path}: a label must be a 16-bit RGB image with ids in red, this one is {kind}; use the id files")
        return bgr[..., 2]
    image = _decode(path, data)
    if image.mode not in ("1", "L", "P", "I", "I;16", "I;16B"):
        raise ValueError(f"{path}: a label must be a grey or palette image of class ids, this one is {image.mode}; use the id files")
    label = np.asarray(image)
    if image.format == "PNG" and image.mode == "L" and data[24] < 8:
        label = label // (255 // (2 ** data[24] - 1))  # Pillow stretches grey values of 2 and 4 bits over 0-255
    return label.astype(np.uint8) if label.dtype == bool else label


_REMEDY = "fetch the file again, or leave it out with data.skip"


def _whole(path: str) -> bytes:
    try:
        data = storage.read(path)
    except ValueError as error:
        raise ValueError(f"{error}; {_REMEDY}") from error
    if wrong := index.truncated(path, data):
        raise ValueError(f"{path}: {wrong}; {_REMEDY}")
    return data


def _decode(path: str, data: bytes) -> Image.Image:
    try:
        image = Image.open(io.BytesIO(data))
        image.load()
        return image
    except Exception as error:  # Pillow raises whatever its format plugins meet
        wrong = f"damaged ({type(error).__name__}: {error})".replace("\n", " ")
        raise ValueError(f"{path}: {wrong}; {_REMEDY}") from error
