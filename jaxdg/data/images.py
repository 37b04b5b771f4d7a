"""Pixels of image files and ids of label files, or one line that says why there are none.

The content of a file says what it is, never its name: JPEG, PNG, WebP, TIFF, BMP, PPM or GIF. A
file must be complete; bytes after its end do not count. An image is read as follows.

    8-bit RGB, palette              these colours
    grey of 1, 2, 4 or 8 bits       from black to white, in all three channels
    alpha, a transparent colour     left out: the stored colours count
    16 bits a channel               the high byte; refused if no value reaches 64 there
                                    (14 bits or fewer stored in 16)
    PPM, PGM of any highest value   from black to this value
    CMYK, YCbCr                     RGB as Pillow converts them
    32-bit integers, floats, Lab    refused: nothing says which value is white
    several frames or pages         refused: nothing says which of them a label belongs to;
                                    of a JPEG with further images (MPO) the first counts

A label is read as the numbers that are stored: grey values, or the indices (never the colours) of
a palette. A file compressed with loss cannot be a label.

**Orientation.** Labels are drawn on pixels, so the stored pixels count: in training, in evaluation
and in records. An orientation in the metadata (EXIF) asks viewers to turn or mirror them. The
labels may have been drawn on either. So an image with an orientation is refused, at the start and
by `python -m jaxdg.data.check`. It is accepted if its label has the same orientation, or if the
sizes tell that both are of the stored pixels. `predict` reads an image without a label, and turns
it upright like every viewer.
"""

import contextlib
import io
import os
import re
from typing import NamedTuple

import cv2
from jaxtyping import Integer, Shaped, UInt8
import numpy as np
from PIL import Image, PngImagePlugin, UnidentifiedImageError

from jaxdg.data import jpeg, storage
from jaxdg.data.labels import ClassIds, palette_fault

FORMATS = ("JPEG", "PNG", "WEBP", "TIFF", "BMP", "PPM", "GIF")  # Pillow's names
PNG_START = b"\x89PNG\r\n\x1a\n"
PNG_END = b"\0\0\0\0IEND\xaeB`\x82"
TAIL = 1024  # bytes that hold the end marker, some padding and metadata
# Tags of TIFF; the orientation is one of EXIF too.
ORIENTATION = 274
WIDTH = 256
HEIGHT = 257
BITS = 258
WHITE_IS = 262
TURNS = (  # by EXIF's number of an orientation
    "",
    "",
    "mirrored",
    "turned by 180 degrees",
    "turned by 180 degrees and mirrored",
    "turned by 90 degrees and mirrored",
    "turned by 90 degrees",
    "turned by 270 degrees and mirrored",
    "turned by 270 degrees",
)
# Pillow's modes of 8 bits that are images, and its modes that are labels.
COLORS = ("1", "L", "LA", "La", "P", "PA", "RGB", "RGBA", "RGBa", "RGBX", "CMYK", "YCbCr")
IDS = ("1", "L", "P", "I", "I;16", "I;16B")
PGM_HEADER = re.compile(rb"P[25]" + 3 * rb"(?:\s|#[^\n]*\n)+(\d+)")
REMEDY = "fetch the file again, or leave it out with data.skip"

# Pillow's guards against hostile files refuse more than 179 megapixels and a megabyte of text,
# which OpenCV reads. These files come from the user.
Image.MAX_IMAGE_PIXELS = None
PngImagePlugin.MAX_TEXT_CHUNK = PngImagePlugin.MAX_TEXT_MEMORY


class Stored(NamedTuple):
    """Size and orientation as the first bytes of an image file state them.

    Attributes:
        size: height and width of the stored pixels.
        turn: orientation by EXIF's numbers: 1 as stored, 5 to 8 a quarter turn.
    """

    size: tuple[int, int]
    turn: int


def read_image(path: str, *, upright: bool = False) -> UInt8[np.ndarray, "h w 3"]:
    """Decodes an image by the rules above.

    Args:
        path: as `storage.read` takes it.
        upright: turns the image as its orientation says; else it stays as stored.

    Returns:
        RGB.

    Raises:
        ValueError: the file is unreadable, truncated, damaged or of a kind that is refused; names
            it.
    """
    data = _whole(path)
    pixels = _pixels(path, data)
    return turned(pixels, _orientation(_opened(io.BytesIO(data)), data)) if upright else pixels


def read_label(
    path: str, *, red: bool = False, colors: ClassIds | None = None
) -> Integer[np.ndarray, "h w"]:
    """Decodes a label file: grey values, or the indices (never the colours) of a palette image.

    Args:
        path: a single-channel image, usually PNG, as `storage.read` takes it.
        red: a 16-bit RGB image instead, which holds the ids in its red channel, as SYNTHIA's.
        colors: those that classes are known by; a palette that has them in another order is
            refused.

    Returns:
        Ids as stored.

    Raises:
        ValueError: the file is unreadable, truncated, damaged or an image of another kind; names
            it.
    """
    if red:
        label = read_channels(path)
        if label.dtype != np.uint16 or label.ndim != 3:
            channels = ("grey", "RGB", "RGBA")[max(0, label[..., None].shape[2] - 2)]
            kind = f"{8 * label.itemsize}-bit {channels}"
            raise ValueError(
                f"{path}: a label must be a 16-bit RGB image with ids in red, this one is {kind};"
                " use the id files"
            )
        return label[..., 2]
    data = _whole(path)
    image, turn = _load(path, data)
    wrong = _lossy(image) or _frames(image) or _no_ids(image, data)
    if image.mode == "P" and colors and not wrong:
        wrong = palette_fault(image.getpalette() or [], colors)
    if wrong:
        raise ValueError(f"{path}: {wrong}")
    label = np.asarray(image)
    if image.mode == "L" and (bits := _bits(image, data)) < 8:
        label = label // (255 // (2**bits - 1))  # Pillow stretches 2 and 4 bits to 0-255
    return _stored(label.astype(np.uint8) if label.dtype == bool else label, turn)


def read_channels(path: str) -> Shaped[np.ndarray, "h w *c"]:
    """Decodes a label file of several channels or 16 bits, which Pillow would cut to 8.

    Args:
        path: a PNG file, as `storage.read` takes it.

    Returns:
        uint8 or uint16; channels in the order blue, green, red, alpha.

    Raises:
        ValueError: the file is unreadable, truncated, damaged or no PNG file; names it.
    """
    data = _whole(path)
    label = _by_opencv(data, cv2.IMREAD_UNCHANGED) if data.startswith(PNG_START) else None
    if label is None:
        image, _ = _load(path, data)  # raises an error for most damaged files
        if image.format == "PNG":
            raise ValueError(f"{path}: damaged; {REMEDY}")
        wrong = _lossy(image) or (
            "a label of several channels or 16 bits must be a PNG file, this one is"
            f" {image.format}; use the id files"
        )
        raise ValueError(f"{path}: {wrong}")
    return label


def truncated(file: io.BufferedIOBase) -> str | None:
    """What is missing at the end of an image file, if anything.

    Of most files only the first and last bytes are read.

    Args:
        file: open; its position changes.

    Returns:
        What is missing; None for complete files and for formats that do not tell.
    """
    tail = _tail(file)
    size = file.tell()
    if not size:
        return "empty (0 bytes)"
    file.seek(0)
    head = file.read(16)
    if head.startswith(PNG_START):
        ended = PNG_END in tail or PNG_END in head + file.read()
        return None if ended else "truncated (no PNG end chunk)"
    if head.startswith(jpeg.START):
        # The end marker may lie megabytes before the end, ahead of a film.
        ended = jpeg.END in tail or jpeg.end(head + file.read())
        return None if ended else "truncated (no JPEG end marker)"
    if head[:4] == b"RIFF" and (total := 8 + int.from_bytes(head[4:8], "little")) > size:
        return f"truncated ({size} of {total} bytes)"
    return None


def _tail(file: io.BufferedIOBase) -> bytes:
    file.seek(max(0, file.seek(0, os.SEEK_END) - TAIL))
    return file.read()


def read_header(file: io.BufferedIOBase, *, label: bool) -> Stored:
    """Looks at the first bytes of an image file, and at its last.

    Args:
        file: open; its position changes.
        label: it is to be a label and not an image.

    Raises:
        ValueError: the file is truncated, not an image, or of a kind that is refused; the message
            does not name the file.
    """
    if wrong := truncated(file):
        raise ValueError(wrong)
    file.seek(0)
    try:
        image = _opened(file)
        wrong = (_lossy(image) if label else _no_colors(image)) or _frames(image)
        turn = _orientation(image, _tail(file) if image.format == "PNG" else b"")
    except UnidentifiedImageError:
        file.seek(0)
        raise ValueError(_unknown(file.read(64))) from None
    if wrong:
        raise ValueError(wrong)
    if image.format == "TIFF":  # Pillow turns TIFF images by itself
        tags = image.tag_v2  # pyright: ignore[reportAttributeAccessIssue]
        return Stored((tags[HEIGHT], tags[WIDTH]), turn)
    return Stored((image.height, image.width), turn)


def turned(pixels: Shaped[np.ndarray, "h w *c"], turn: int) -> Shaped[np.ndarray, "h2 w2 *c"]:
    """An image as viewers show it.

    Args:
        pixels: as stored.
        turn: orientation by EXIF's numbers.
    """
    if turn >= 5:
        pixels = pixels.swapaxes(0, 1)
    if turn in (2, 3, 6, 7):
        pixels = pixels[:, ::-1]
    if turn in (3, 4, 7, 8):
        pixels = pixels[::-1]
    return np.ascontiguousarray(pixels)


def _stored(pixels: np.ndarray, turn: int) -> np.ndarray:
    """The inverse of `turned`."""
    return pixels if turn == 1 else turned(pixels, {6: 8, 8: 6}.get(turn, turn))


def _whole(path: str) -> bytes:
    try:
        data = storage.read(path)
    except ValueError as error:
        raise ValueError(f"{error}; {REMEDY}") from error
    if wrong := truncated(io.BytesIO(data)):
        raise ValueError(f"{path}: {wrong}; {REMEDY}")
    return data


def _pixels(path: str, data: bytes) -> UInt8[np.ndarray, "h w 3"]:
    pixels = decode(data, path)
    if pixels is None:
        image, turn = _load(path, data)
        if wrong := _no_colors(image) or _frames(image):
            raise ValueError(f"{path}: {wrong}")
        image.info.pop("transparency", None)
        if image.mode.startswith("I"):
            pixels = np.repeat(np.asarray(image)[..., None] >> 8, 3, 2)
        else:
            pixels = np.asarray(image.convert("RGB"))
        pixels = _stored(pixels, turn).astype(np.uint8)
        deep = image.format == "TIFF" and _bits(image, data) > 8
    else:
        deep = data.startswith(PNG_START) and data[24] == 16
    if deep and (highest := int(pixels.max())) < 64:
        bits = 8 + highest.bit_length()
        raise ValueError(
            f"{path}: a 16-bit image of which no value uses more than {bits} bits, so that it would"
            " be nearly black; convert it to 8 bits by the number of bits that it holds, such as"
            f" `value >> {bits - 8}` for {bits}"
        )
    return pixels


def decode(data: bytes, path: str) -> UInt8[np.ndarray, "h w 3"] | None:
    """The stored pixels of a JPEG or PNG file of the usual kinds.

    Args:
        data: the file.
        path: of the file, for the error.

    Returns:
        RGB; None for other files.

    Raises:
        ValueError: the JPEG file is damaged.
    """
    if data.startswith(jpeg.START):
        try:
            return jpeg.decode(data)
        except ValueError as error:
            raise ValueError(f"{path}: {error}; {REMEDY}") from error
    several_frames = data.find(b"acTL", 0, data.find(b"IDAT")) > 0
    if not data.startswith(PNG_START) or several_frames:
        return None
    # A third faster than Pillow, with the same pixels.
    return _by_opencv(data, cv2.IMREAD_COLOR_RGB | cv2.IMREAD_IGNORE_ORIENTATION)


def _by_opencv(data: bytes, flags: int) -> np.ndarray | None:
    try:
        return cv2.imdecode(np.frombuffer(data, np.uint8), flags)
    except cv2.error:  # more than 2**30 pixels, which Pillow reads
        return None


def _load(path: str, data: bytes) -> tuple[Image.Image, int]:
    """An image with its pixels, and the orientation that Pillow has applied to them."""
    try:
        image = _opened(io.BytesIO(data))
        turn = _orientation(image, b"") if image.format == "TIFF" else 1
        image.load()
        return image, turn
    except UnidentifiedImageError:
        wrong = _unknown(data)
    except Exception as error:  # Pillow raises whatever its format plugins meet
        wrong = f"damaged ({type(error).__name__}: {error})".replace("\n", " ")
    raise ValueError(f"{path}: {wrong}; {REMEDY}")


def _opened(file: io.BufferedIOBase) -> Image.Image:
    return Image.open(file, formats=FORMATS)  # pyright: ignore[reportArgumentType]


def _orientation(image: Image.Image, tail: bytes) -> int:
    """The orientation of an image that is not loaded.

    A PNG may state it at the end of the file, which is `tail`.
    """
    found = None
    with contextlib.suppress(Exception):  # viewers ignore an orientation that they cannot read
        exif = Image.Image.getexif(image)  # the method of PNG images would decode the pixels first
        at = tail.rfind(b"eXIf") if image.format == "PNG" and ORIENTATION not in exif else -1
        if at >= 4:
            exif.load(b"Exif\0\0" + tail[at + 4 : at + 4 + int.from_bytes(tail[at - 4 : at])])
        found = exif.get(ORIENTATION)
    return found if isinstance(found, int) and 2 <= found <= 8 else 1


def _bits(image: Image.Image, data: bytes) -> int:
    """Bits a channel, of PNG and TIFF files."""
    if image.format == "TIFF":
        return image.tag_v2.get(BITS, (1,))[0]  # pyright: ignore[reportAttributeAccessIssue]
    return data[24] if image.format == "PNG" else 8


def _lossy(image: Image.Image) -> str | None:
    """Why the format of an image cannot hold ids, if it cannot."""
    if image.format in ("JPEG", "MPO") or image.info.get("compression") in ("jpeg", "tiff_jpeg"):
        return (
            "a label must not be a JPEG image, whose compression alters ids; get the labels as PNG"
            " from where they were made"
        )
    if image.format == "WEBP" or image.info.get("compression") == "webp":
        return (
            "a label must not be a WebP image, which holds colours instead of ids; get the labels"
            " as PNG from where they were made"
        )
    return None


def _frames(image: Image.Image) -> str | None:
    frames = getattr(image, "n_frames", 1)
    if frames > 1 and image.format != "MPO":
        return f"has {frames} frames or pages; save the one that counts alone"
    return None


def _no_colors(image: Image.Image) -> str | None:
    """Why the mode of an image holds no colours, if it does not."""
    deep = image.mode.startswith("I;16") or (image.mode == "I" and image.format in ("PNG", "PPM"))
    if deep or image.mode in COLORS:
        return None
    kind = {"I": "32-bit integers", "F": "floats"}.get(image.mode, image.mode)
    return f"an image must have 8 or 16 bits a channel, this one has {kind}; convert it to 8 bits"


def _no_ids(image: Image.Image, data: bytes) -> str | None:
    """Why the values of an image are no ids, if they are not."""
    if image.mode not in IDS:
        kind = {"F": "of floats"}.get(image.mode, image.mode)
        return (
            f"a label must be a grey or palette image of class ids, this one is {kind}; use the id"
            " files"
        )
    highest = PGM_HEADER.match(data) if image.format == "PPM" else None
    if image.format == "PPM" and (highest is None or int(highest[3]) not in (255, 65535)):
        return (
            "a label as PGM must state 255 or 65535 as its highest value, or ids are scaled; save"
            " it as PNG"
        )
    tags = getattr(image, "tag_v2", {})
    if image.format == "TIFF" and tags.get(WHITE_IS) == 0:
        return (
            "a label as TIFF must not count from white (WhiteIsZero), which leaves open what its"
            " ids are; save it as PNG"
        )
    return None


def _unknown(head: bytes) -> str:
    """The reason why a file is not an image, from its first bytes."""
    if head[4:8] == b"ftyp":
        return "unreadable (a HEIC or AVIF image or a film; convert it to JPEG or PNG)"
    if head.startswith(b"version https://git-lfs"):
        return "unreadable (a pointer of Git LFS; run `git lfs pull`)"
    if head.lstrip()[:1] == b"<":
        return "unreadable (a web page or XML)"
    return "unreadable (no header of an image)"
