"""JPEG files (ITU-T T.81), decoded strictly: a hole in the data is an error.

libjpeg goes on after damage, gives a grey or shifted part and mentions it in a warning, which
OpenCV and Pillow drop. `simplejpeg` decodes by libjpeg-turbo too, to the same pixels in the same
time, and hands on the warnings. Bytes after the end marker, such as the film of a motion photo, do
not count.
"""

from collections.abc import Iterator
import re

from jaxtyping import UInt8
import numpy as np
import simplejpeg

START = b"\xff\xd8\xff"
END = b"\xff\xd9"
PROGRESSIVE = 0xC2
TABLES = 0xC4
SCAN = 0xDA
END_OF_IMAGE = 0xD9
_MARKER = re.compile(rb"\xff[^\x00\xff\xd0-\xd7]")  # markers of restarts are part of a scan
SMALLEST = 64  # bytes of a hole; disks and networks lose hundreds at once
_HARMLESS = re.compile(
    r"Adobe color transform|JFIF revision|Inconsistent progression|Invalid SOS parameters"
)


def decode(data: bytes) -> UInt8[np.ndarray, "h w 3"] | None:
    """The pixels of a JPEG file, as they are stored.

    Args:
        data: the file.

    Returns:
        RGB; None for a file of a kind that libjpeg-turbo does not know or does not turn into RGB,
        such as CMYK.

    Raises:
        ValueError: the data is damaged; says how, not where.
    """
    try:
        pixels = simplejpeg.decode_jpeg(data)
    except ValueError as error:
        if _kind(data) is None or "precision" in str(error):
            return None
        if not _HARMLESS.search(str(error)):
            raise ValueError(f"damaged ({error})") from error
        pixels = simplejpeg.decode_jpeg(data, strict=False)
    if _has_hole(data):
        raise ValueError("damaged (a hole in its data)")
    return None if _kind(data) == "CMYK" else pixels


def _kind(data: bytes) -> str | None:
    """The colour space of the header, such as RGB, Gray or CMYK.

    None for a header that libjpeg-turbo does not know or that is too long.
    """
    try:
        return simplejpeg.decode_jpeg_header(data)[2]
    except ValueError:
        return None


def end(data: bytes) -> int:
    """Where the first image of a JPEG file ends; 0 if it has no end."""
    return next((stop for marker, _, stop in _segments(data) if marker == END_OF_IMAGE), 0)


def _segments(data: bytes) -> Iterator[tuple[int, int, int]]:
    """Marker, begin and end of the content of each segment.

    The data of a scan lies between the end of its segment and the begin of the next.
    """
    at = len(END)
    while found := _MARKER.search(data, at):
        marker = data[found.end() - 1]
        start = found.end()
        at = start if marker == END_OF_IMAGE else start + int.from_bytes(data[start : start + 2])
        yield marker, start, at
        if marker == END_OF_IMAGE:
            return


def _has_hole(data: bytes) -> bool:
    """Whether a scan holds zeros that no encoder writes.

    A decoder that meets zeros reads the code of zeros alone again and again and may find its way
    back, in which case libjpeg warns of nothing. Flat areas give such data only where that code
    means that nothing follows in a block.
    """
    first = next((stop for marker, _, stop in _segments(data) if marker == SCAN), len(data))
    zeros = data.find(bytes(SMALLEST), first)
    if zeros < 0 or data.find(END, first, zeros) > 0:  # nearly always
        return False
    # By class (0 DC, 16 AC) and number of a table: whether the code of zeros means that nothing
    # follows.
    idle: dict[int, bool] = {}
    progressive = False
    least = None
    begin = 0
    for marker, start, stop in _segments(data):
        if least and data.find(bytes(least), begin, start) >= 0:
            return True
        least = None
        progressive |= marker == PROGRESSIVE
        if marker == TABLES:
            idle |= _idle_tables(data[start + 2 : stop])
        if marker == SCAN:
            least = _least_hole(data[start + 2 : stop], idle, progressive)
            begin = stop
    return False


def _idle_tables(segment: bytes) -> dict[int, bool]:
    """Whether the first code of each Huffman table means "no difference" or "end of block".

    The former is for tables of DC, the latter for tables of AC.
    """
    found = {}
    at = 0
    while at + 17 < len(segment):
        symbol = segment[at + 17]
        # 0xF0 stands for sixteen zeros after which more follows.
        found[segment[at]] = symbol % 16 == 0 and symbol != 0xF0
        at += 17 + sum(segment[at + 1 : at + 17])
    return found


def _least_hole(segment: bytes, idle: dict[int, bool], progressive: bool) -> int | None:
    """How many bytes of zeros make a hole in the scan of a segment; None if no number does."""
    count = segment[0]
    tables = segment[2 : 2 + 2 * count : 2]
    first = segment[1 + 2 * count]
    refined = segment[3 + 2 * count] >> 4
    dc = all(idle.get(table >> 4, True) for table in tables)  # unknown tables may mean anything
    ac = all(idle.get(16 | table % 16, True) for table in tables)
    if progressive and first:
        # Encoders join the ends of blocks to one code with at most some hundred bits of refinement.
        return 4 * SMALLEST if refined else SMALLEST
    flat = refined or dc if progressive else dc and ac
    return None if flat else SMALLEST
