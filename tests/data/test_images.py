"""Image and label files of every kind: read as documented, or refused by name."""

import dataclasses
import io
from pathlib import Path
import struct
import zipfile
import zlib

import cv2
import numpy as np
from PIL import Image
import pytest

from jaxdg.commands.prepare import prepare
from jaxdg.data import images, index, jpeg
from jaxdg.data.boxes import BoxOptions, open_box_files
from jaxdg.data.datasets import FolderOptions, StreetsOptions
from jaxdg.data.domains import open_domain, open_files
from jaxdg.data.images import read_image, read_label
from jaxdg.data.labels import CITYSCAPES, CITYSCAPES_IDS
from jaxdg.data.records import Records, open_records
from tests.data import trees

RNG = np.random.default_rng(0)
H = 48
W = 64
SMOOTH = np.asarray(
    Image.fromarray(RNG.integers(0, 256, (6, 8, 3), np.uint8)).resize(
        (W, H), Image.Resampling.BICUBIC
    )
)
NOISE = RNG.integers(0, 256, (H, W, 3), np.uint8)
LARGE = np.asarray(
    Image.fromarray(RNG.integers(0, 256, (60, 80, 3), np.uint8)).resize(
        (640, 480), Image.Resampling.BICUBIC
    )
)
GREY = RNG.integers(0, 256, (H, W), np.uint8)
IDS = RNG.integers(0, 19, (H, W), np.uint8)


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch) -> None:
    """Each test keeps its outcomes in a folder of its own."""
    monkeypatch.setenv("JAXDG_CACHE", str(tmp_path / "cache"))


def look(pair: tuple[str, str]) -> tuple[tuple[int, int], list[index.Defect]]:
    """The start-up check of one image."""
    header, defects = index.check_pair(pair)
    return header.size, defects


def encoded(pixels: np.ndarray | Image.Image, kind: str, **options) -> bytes:
    data = io.BytesIO()
    (pixels if isinstance(pixels, Image.Image) else Image.fromarray(pixels)).save(
        data, kind, **options
    )
    return data.getvalue()


def with_orientation(turn: int) -> Image.Exif:
    exif = Image.Exif()
    exif[274] = turn
    return exif


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(
    rows: list[bytes], width: int, depth: int, color: int, *before: bytes, after: bytes = b""
) -> bytes:
    """A PNG file of raw rows after ISO/IEC 15948, with chunks before and after its data."""
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, len(rows), depth, color, 0, 0, 0))
    body = chunk(b"IDAT", zlib.compress(b"".join(b"\0" + row for row in rows)))
    return images.PNG_START + header + b"".join(before) + body + after + chunk(b"IEND", b"")


def tiff(pixels: np.ndarray, bits: int, sample_format: int = 1, white_is: int = 1) -> bytes:
    """An uncompressed little-endian TIFF of one channel by the TIFF 6.0 specification."""
    h, w = pixels.shape
    raw = pixels.tobytes()
    fields = [
        (256, w * 8 * pixels.itemsize // bits),
        (257, h),
        (258, bits),
        (259, 1),
        (262, white_is),
    ]
    fields += [(273, 8), (277, 1), (278, h), (279, len(raw)), (339, sample_format)]
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in fields)
    return (
        b"II*\0"
        + struct.pack("<I", 8 + len(raw))
        + raw
        + struct.pack("<H", len(fields))
        + entries
        + bytes(4)
    )


def write(path: Path, data: bytes) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    return str(path)


def sixteen(pixels: np.ndarray) -> list[bytes]:
    return [row.astype(">u2").tobytes() for row in pixels]


DEEP = RNG.integers(0, 65536, (H, W)).astype(np.uint16)
DEEP_RGB = RNG.integers(0, 65536, (H, W, 3)).astype(np.uint16)
ALPHA = np.dstack([NOISE, GREY])
GREY3 = np.dstack([GREY] * 3)
PALETTE = RNG.integers(0, 256, (19, 3), np.uint8)
INDEXED = Image.fromarray(IDS)
INDEXED.putpalette(PALETTE.tobytes())

READ = {  # file content, pixels
    "PNG RGB": (encoded(NOISE, "PNG"), NOISE),
    "PNG grey": (encoded(GREY, "PNG"), GREY3),
    "PNG alpha": (encoded(ALPHA, "PNG"), NOISE),
    "PNG grey alpha": (
        encoded(Image.merge("LA", [Image.fromarray(GREY), Image.fromarray(NOISE[..., 0])]), "PNG"),
        GREY3,
    ),
    "PNG transparent colour": (
        encoded(NOISE, "PNG", transparency=tuple(NOISE[0, 0].tolist())),
        NOISE,
    ),
    "PNG palette": (encoded(INDEXED, "PNG"), PALETTE[IDS]),
    "PNG palette alpha": (encoded(INDEXED, "PNG", transparency=bytes(range(19))), PALETTE[IDS]),
    "PNG 1 bit": (encoded(Image.fromarray(GREY > 99), "PNG"), np.where(GREY3 > 99, 255, 0)),
    "PNG 4 bits": (
        png([bytes((0x0F, 0x29))], 4, 4, 0),
        np.array([[[0] * 3, [255] * 3, [34] * 3, [153] * 3]]),
    ),
    "PNG with much text": (
        png(
            [row.tobytes() for row in NOISE],
            W,
            8,
            2,
            chunk(b"zTXt", b"a\0\0" + zlib.compress(bytes(1 << 21))),
        ),
        NOISE,
    ),
    "PNG 16 bits grey": (png(sixteen(DEEP), W, 16, 0), np.dstack([DEEP >> 8] * 3)),
    "PNG 16 bits RGB": (png(sixteen(DEEP_RGB.reshape(H, -1)), W, 16, 2), DEEP_RGB >> 8),
    "TIFF RGB": (encoded(NOISE, "TIFF", compression="tiff_lzw"), NOISE),
    "TIFF alpha": (encoded(ALPHA, "TIFF"), NOISE),
    "TIFF white is 0": (tiff(GREY, 8, white_is=0), 255 - GREY3),
    "TIFF 16 bits": (tiff(DEEP, 16), np.dstack([DEEP >> 8] * 3)),
    "WebP": (encoded(NOISE, "WEBP", lossless=True), NOISE),
    "BMP": (encoded(NOISE, "BMP"), NOISE),
    "PPM": (encoded(NOISE, "PPM"), NOISE),
    "PGM 12 bits": (
        b"P5 4 1 4095\n" + struct.pack(">4H", 0, 1365, 2730, 4095),
        np.array([[[v] * 3 for v in (0, 85, 170, 255)]]),
    ),
    "GIF": (encoded(INDEXED, "GIF"), PALETTE[IDS]),
}


@pytest.mark.parametrize("name", ["x.jpg", "x.png"])
@pytest.mark.parametrize("kind", READ)
def test_images_are_read_as_documented(tmp_path, kind, name):
    """Every lossless kind gives its pixels, whatever the name, and passes the start-up check."""
    data, pixels = READ[kind]
    path = write(tmp_path / name, data)
    np.testing.assert_array_equal(read_image(path), pixels)
    assert look((path, "")) == (pixels.shape[:2], [])


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"progressive": True},
        {"optimize": True},
        {"subsampling": 0},
        {"restart_marker_blocks": 3},
    ],
)
@pytest.mark.parametrize("name", ["x.jpg", "x.png"])
def test_jpeg_files_equal_pillow_and_opencv(tmp_path, options, name):
    """Three builds of libjpeg-turbo agree to the bit."""
    for pixels in (SMOOTH, SMOOTH[..., 0]):
        data = encoded(pixels, "JPEG", **options)
        got = read_image(write(tmp_path / name, data))
        np.testing.assert_array_equal(got, np.asarray(Image.open(io.BytesIO(data)).convert("RGB")))
        np.testing.assert_array_equal(
            got, cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR_RGB)
        )


def test_cmyk_files_have_the_colors_that_went_in(tmp_path):
    """Adobe stores CMYK inverted; the colours are right within the loss of compression."""
    path = write(
        tmp_path / "x.jpg",
        encoded(Image.fromarray(SMOOTH).convert("CMYK"), "JPEG", quality=100, subsampling=0),
    )
    np.testing.assert_allclose(read_image(path).astype(int), SMOOTH, atol=4)
    data = bytearray(Path(path).read_bytes())
    Path(path).write_bytes(data[: len(data) // 2] + b"\xff\xd9")
    with pytest.raises(ValueError, match=r"x\.jpg: damaged \(Corrupt JPEG data: premature end"):
        read_image(path)


FEW_BITS = (
    "a 16-bit image of which no value uses more than 12 bits, so that it would be nearly black;"
    " convert it to 8 bits"
)
REFUSED = {  # file content, what is said of it; at the start too?
    "PNG 12 of 16 bits": (png(sixteen(DEEP % 4096), W, 16, 0), FEW_BITS, False),
    "PNG 12 of 16 bits RGB": (
        png(sixteen((DEEP_RGB % 4096).reshape(H, -1)), W, 16, 2),
        FEW_BITS,
        False,
    ),
    "TIFF 12 of 16 bits": (tiff(DEEP % 4096, 16), FEW_BITS, False),
    "TIFF floats": (
        encoded(GREY.astype(np.float32), "TIFF"),
        "an image must have 8 or 16 bits a channel, this one has floats",
        True,
    ),
    "TIFF integers": (
        encoded(GREY.astype(np.int32), "TIFF"),
        "an image must have 8 or 16 bits a channel, this one has 32-bit",
        True,
    ),
    "animated PNG": (
        encoded(NOISE, "PNG", save_all=True, append_images=[Image.fromarray(SMOOTH)]),
        "has 2 frames or pages",
        True,
    ),
    "animated WebP": (
        encoded(NOISE, "WEBP", save_all=True, append_images=[Image.fromarray(SMOOTH)]),
        "has 2 frames or pages",
        True,
    ),
    "TIFF pages": (
        encoded(NOISE, "TIFF", save_all=True, append_images=[Image.fromarray(SMOOTH)]),
        "has 2 frames or pages",
        True,
    ),
    "a web page": (b"\n<!DOCTYPE html><html>404</html>", "unreadable (a web page", True),
    "a pointer": (
        b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n",
        "unreadable (a pointer of Git LFS",
        True,
    ),
    "HEIC": (b"\0\0\0\x18ftypheic" + bytes(99), "unreadable (a HEIC or AVIF image", True),
    "garbage": (b"garbage" * 99, "unreadable (no header of an image)", True),
    "nothing": (b"", "empty (0 bytes)", True),
    "cut WebP": (encoded(NOISE, "WEBP", lossless=True)[:-1], "truncated (", True),
    "cut BMP": (encoded(NOISE, "BMP")[:-1], "damaged (OSError: image file is truncated", False),
    "cut TIFF": (encoded(np.asarray(LARGE), "TIFF", compression="tiff_lzw")[:5000], "", True),
}


@pytest.mark.filterwarnings("ignore:Corrupt EXIF data|Truncated File Read|Metadata Warning")
@pytest.mark.parametrize("kind", REFUSED)
def test_what_cannot_be_meant_is_refused_by_name(tmp_path, kind):
    """One line names the file and its fault when read, and at the start if a header shows it."""
    data, told, early = REFUSED[kind]
    path = write(tmp_path / "x.png", data)
    with pytest.raises(ValueError) as error:  # noqa: PT011
        read_image(path)
    assert str(error.value).startswith(f"{path}: {told}")
    assert "\n" not in str(error.value)
    _, defects = look((path, ""))
    assert [d.path for d in defects] == [path] * early
    assert all(d.text.startswith(f": {told}") for d in defects)


FILM = b"\0\0\0\x18ftypmp42" + RNG.bytes(70_000)


@pytest.mark.parametrize("kind", ["JPEG", "progressive", "PNG", "WEBP"])
def test_what_follows_the_end_does_not_count(tmp_path, kind):
    """Motion photos and padded files are complete; the same files cut before their end are not."""
    options = {"progressive": {"progressive": True}, "WEBP": {"lossless": True}}.get(kind, {})
    whole = encoded(LARGE, "JPEG" if kind == "progressive" else kind, **options)
    pixels = read_image(write(tmp_path / "whole.jpg", whole))
    for tail in (b"\0" * 3000, FILM, FILM + b"\xff\xd9"):
        path = write(tmp_path / "x.jpg", whole + tail)
        np.testing.assert_array_equal(read_image(path), pixels)
        assert look((path, "")) == (LARGE.shape[:2], [])
    cut = write(tmp_path / "cut.jpg", whole[: 2 * len(whole) // 3])
    assert look((cut, ""))[1][0].text.startswith(": truncated (")
    with pytest.raises(ValueError, match=r"cut\.jpg: truncated \("):
        read_image(cut)


def test_a_thumbnail_does_not_pass_for_the_end(tmp_path):
    """The end marker of a thumbnail in the metadata does not complete a truncated JPEG."""
    exif = with_orientation(1)
    data = encoded(LARGE, "JPEG", exif=exif)
    thumbnail = b"Exif\0\0" + encoded(SMOOTH, "JPEG")
    data = data[:2] + b"\xff\xe1" + struct.pack(">H", 2 + len(thumbnail)) + thumbnail + data[2:]
    assert look((write(tmp_path / "x.jpg", data), ""))[1] == []
    assert (
        look((write(tmp_path / "x.jpg", data[:20_000]), ""))[1][0].text
        == ": truncated (no JPEG end marker)"
    )


def test_an_mpo_file_is_its_first_image(tmp_path):
    """Phones append previews and depth as further images of a JPEG file."""
    data = encoded(LARGE, "MPO", save_all=True, append_images=[Image.fromarray(LARGE[::2, ::2])])
    path = write(tmp_path / "x.jpg", data)
    with Image.open(path) as image:
        assert image.n_frames == 2
    assert look((path, "")) == (LARGE.shape[:2], [])
    np.testing.assert_array_equal(
        read_image(path), cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR_RGB)
    )


HOLES = {
    "end marker amid": lambda data, at: data[:at] + b"\xff\xd9" + data[at:],
    "early end": lambda data, at: data[:at] + b"\xff\xd9",
    "missing part": lambda data, at: data[:at] + data[at + 1000 :],
    "hole of zeros": lambda data, at: data[:at] + bytes(2048) + data[at + 2048 :],
    "small hole of zeros": lambda data, at: data[:at] + bytes(128) + data[at + 128 :],
    "overwritten": lambda data, at: data[:at] + b"\xff" * 512 + data[at + 512 :],
    "of another file": lambda data, at: (
        data[:at] + encoded(NOISE, "JPEG")[700:3000] + data[at + 2300 :]
    ),
}


@pytest.mark.parametrize("harm", HOLES)
@pytest.mark.parametrize(
    "options",
    [{}, {"progressive": True}, {"restart_marker_blocks": 7}],
    ids=["baseline", "progressive", "restarts"],
)
def test_a_jpeg_with_a_hole_is_refused(tmp_path, options, harm):
    """A hole of any place and content is found, although header and end are intact."""
    if options.get("progressive") and harm == "small hole of zeros":
        return
    data = encoded(LARGE, "JPEG", quality=90, **options)
    for part in (0.3, 0.5, 0.7):
        path = write(tmp_path / "x.jpg", HOLES[harm](data, int(part * len(data))))
        assert look((path, ""))[1] == []
        with pytest.raises(
            ValueError,
            match=r"x\.jpg: damaged \(.*\); fetch the file again, or leave it out with data\.skip",
        ):
            read_image(path)


@pytest.mark.parametrize(
    "options", [{"optimize": True}, {"progressive": True}, {}, {"restart_marker_blocks": 7}]
)
def test_flat_jpeg_files_are_whole(options):
    """Black frames and borders compress to long runs of zeros, which are not holes."""
    border = LARGE.copy()
    border[100:] = 0
    for pixels in (
        np.zeros((1200, 1600, 3), np.uint8),
        np.full((1200, 1600, 3), 128, np.uint8),
        border,
        border[..., 0],
    ):
        for quality in (10, 75, 100):
            data = encoded(pixels, "JPEG", quality=quality, **options)
            assert jpeg.decode(data) is not None


def test_harmless_oddities_of_jpeg_files_are_read(tmp_path):
    """Padding between segments, fill bytes and an unknown Adobe transform are no damage."""
    data = encoded(LARGE, "JPEG")
    pixels = read_image(write(tmp_path / "x.jpg", data))
    at = data.index(b"\xff\xdb")
    adobe = b"\xff\xee" + struct.pack(">H", 14) + b"Adobe\0\x64\0\0\0\0\x07"
    odd = [data[:at] + b"\0\0\0" + data[at:], data[:2] + adobe + data[2:]]
    odd += [data[:-2] + padding + data[-2:] for padding in (b"\0", b"\xff\xff")]
    for content in odd:
        np.testing.assert_array_equal(read_image(write(tmp_path / "x.jpg", content)), pixels)
        assert jpeg.end(content + FILM) == len(content)


def test_images_above_the_guards_of_pillow_are_read(tmp_path, monkeypatch):
    """Images and labels above Pillow's 179 megapixels or OpenCV's 2^30 pixels are read."""
    path = write(tmp_path / "x.png", png([bytes(2500)] * 9000, 20_000, 1, 0))
    assert look((path, path)) == ((9000, 20_000), [])
    label = read_label(path)
    assert (label.shape, label.max()) == ((9000, 20_000), 0)
    small = write(tmp_path / "small.png", encoded(NOISE, "PNG"))

    def refuse(*_):
        return (_ for _ in ()).throw(
            cv2.error("Image size is more than OPENCV_IO_MAX_IMAGE_PIXELS")
        )

    monkeypatch.setattr(cv2, "imdecode", refuse)
    np.testing.assert_array_equal(read_image(small), NOISE)


LABELS = {  # content of a label file, what is said of it or the ids
    "PNG": (encoded(IDS, "PNG"), IDS),
    "palette": (encoded(INDEXED, "PNG"), IDS),
    "palette with alpha": (encoded(INDEXED, "PNG", transparency=bytes(19)), IDS),
    "1 bit": (encoded(Image.fromarray(IDS > 9), "PNG"), IDS > 9),
    "16 bits": (encoded(DEEP, "PNG"), DEEP),
    "TIFF": (encoded(IDS, "TIFF", compression="tiff_lzw"), IDS),
    "TIFF 4 bits": (tiff(np.array([[0x0F, 0x29]], np.uint8), 4), np.array([[0, 15, 2, 9]])),
    "TIFF 16 bits": (tiff(DEEP, 16), DEEP),
    "TIFF signed 16 bits": (tiff(IDS.astype(np.int16) - 1, 16, 2), IDS.astype(int) - 1),
    "TIFF signed 32 bits": (tiff(IDS.astype(np.int32) - 1, 32, 2), IDS.astype(int) - 1),
    "GIF": (encoded(INDEXED, "GIF"), IDS),
    "BMP": (encoded(IDS, "BMP"), IDS),
    "PGM": (encoded(IDS, "PPM"), IDS),
    "JPEG": (
        encoded(IDS, "JPEG", quality=100),
        "a label must not be a JPEG image, whose compression alters ids",
    ),
    "MPO": (
        encoded(IDS, "MPO", save_all=True, append_images=[Image.fromarray(IDS)]),
        "a label must not be a JPEG image",
    ),
    "lossy WebP": (encoded(np.dstack([IDS] * 3), "WEBP"), "a label must not be a WebP image"),
    "lossless WebP": (
        encoded(np.dstack([IDS] * 3), "WEBP", lossless=True),
        "a label must not be a WebP image, which holds colours",
    ),
    "JPEG in TIFF": (encoded(IDS, "TIFF", compression="jpeg"), "a label must not be a JPEG image"),
    "RGB": (
        encoded(NOISE, "PNG"),
        "a label must be a grey or palette image of class ids, this one is RGB",
    ),
    "floats": (
        encoded(IDS.astype(np.float32), "TIFF"),
        "a label must be a grey or palette image of class ids, this one is of floats",
    ),
    "white is 0": (tiff(IDS, 8, white_is=0), "a label as TIFF must not count from white"),
    "PGM up to 18": (
        b"P5 4 1 18\n" + bytes((0, 1, 2, 18)),
        "a label as PGM must state 255 or 65535",
    ),
    "PBM": (b"P4 8 1\n\xaa", "a label as PGM must state 255 or 65535"),
    "animated": (
        encoded(IDS, "PNG", save_all=True, append_images=[Image.fromarray(IDS + 1)]),
        "has 2 frames or pages",
    ),
}
EARLY = ("JPEG", "MPO", "lossy WebP", "lossless WebP", "JPEG in TIFF", "animated")


@pytest.mark.parametrize("kind", LABELS)
def test_labels_are_ids_as_stored_or_refused(tmp_path, kind):
    """No id is altered, scaled or inverted; lossy files are refused at the start."""
    data, expected = LABELS[kind]
    path = write(tmp_path / "x.png", data)
    shape = expected.shape if isinstance(expected, np.ndarray) else (H, W)
    _, defects = look(
        (write(tmp_path / "image.png", encoded(np.zeros((*shape, 3), np.uint8), "PNG")), path)
    )
    if isinstance(expected, str):
        with pytest.raises(ValueError) as error:  # noqa: PT011
            read_label(path)
        assert str(error.value).startswith(f"{path}: {expected}")
        early = [d for d in defects if d.text.startswith(f": {expected}")]
        assert len(early) == (kind in EARLY)
    else:
        assert defects == []
        got = read_label(path)
        assert got.dtype.kind in "ui"
        np.testing.assert_array_equal(got, expected)


def shown(pixels: np.ndarray, turn: int) -> np.ndarray:
    """The picture that viewers show: the EXIF standard's table of where row 0 and column 0 are."""
    return {
        1: pixels,
        2: pixels[:, ::-1],
        3: pixels[::-1, ::-1],
        4: pixels[::-1],
        5: pixels.transpose(1, 0, 2),
        6: np.rot90(pixels, -1),
        7: np.rot90(pixels, -1)[::-1],
        8: np.rot90(pixels),
    }[turn]


def oriented(kind: str, turn: int) -> bytes:
    """An image of `SMOOTH` or `NOISE` with an orientation in its metadata."""
    if kind == "PNG, at its end":
        exif = with_orientation(turn).tobytes().removeprefix(b"Exif\0\0")
        return png([row.tobytes() for row in NOISE], W, 8, 2, after=chunk(b"eXIf", exif))
    options = {"WEBP": {"lossless": True}, "JPEG": {"quality": 95}}.get(kind, {})
    return encoded(
        SMOOTH if kind == "JPEG" else NOISE, kind, exif=with_orientation(turn), **options
    )


ORIENTED = ("JPEG", "PNG", "PNG, at its end", "WEBP", "TIFF")


@pytest.mark.parametrize("turn", range(1, 9))
@pytest.mark.parametrize("kind", ORIENTED)
def test_stored_pixels_count_and_a_picture_alone_is_upright(tmp_path, kind, turn):
    """Datasets and records ignore the orientation; `predict` reads what viewers show."""
    stored = read_image(write(tmp_path / "plain", oriented(kind, 1)))
    path = write(tmp_path / "x.png", oriented(kind, turn))
    np.testing.assert_array_equal(read_image(path), stored)
    np.testing.assert_array_equal(read_image(path, upright=True), shown(stored, turn))
    assert look((path, "")) == ((H, W), [])
    if kind == "TIFF":
        ids = encoded(IDS, "TIFF", exif=with_orientation(turn))
        np.testing.assert_array_equal(read_label(write(tmp_path / "ids.png", ids)), IDS)


@pytest.mark.parametrize("turn", range(1, 9))
@pytest.mark.parametrize("kind", ORIENTED)
def test_an_orientation_that_leaves_open_what_was_labelled_is_refused(tmp_path, kind, turn):
    """Half turns and mirrors are refused; a quarter turn passes if the sizes decide."""
    image = write(tmp_path / "x.png", oriented(kind, turn))
    label = write(tmp_path / "ids.png", encoded(IDS, "PNG"))
    found = look((image, label))[1]
    if turn in (1, 5, 6, 7, 8):
        assert found == []
    else:
        assert [d.path for d in found] == [image]
        assert found[0].text.startswith(f": its orientation (EXIF {turn}: ")
        assert "mogrify -auto-orient FILE" in found[0].text
        assert "exiftool -Orientation= FILE" in found[0].text
    turned = write(tmp_path / "turned.png", encoded(np.ascontiguousarray(IDS.T), "PNG"))
    (other,) = look((image, turned))[1]
    assert other.text.startswith(f" is {H}x{W} but its image is {W}x{H}")
    assert ("viewers" in other.text and "mogrify" in other.text) == (turn >= 5)
    expected = [image] if turn > 1 else []
    assert [d.path for d in index.check_pair((image, ""), boxes=True)[1]] == expected


def test_square_images_and_labels_with_an_orientation(tmp_path):
    """Sizes of squares tell nothing: a label of the same turn fits, one of another does not."""
    square = Image.fromarray(NOISE[:, :H])
    ids = Image.fromarray(IDS[:, :H])
    for image_turn, label_turn, fits in (
        (6, 1, False),
        (6, 6, True),
        (3, 3, True),
        (1, 3, False),
        (6, 8, False),
    ):
        image = write(tmp_path / "x.png", encoded(square, "PNG", exif=with_orientation(image_turn)))
        label = write(tmp_path / "ids.png", encoded(ids, "PNG", exif=with_orientation(label_turn)))
        found = look((image, label))[1]
        assert [d.path for d in found] == ([] if fits else [image if image_turn > 1 else label])


def test_the_start_decodes_no_pixels(tmp_path, monkeypatch):
    """Pillow would decode a PNG to look for an orientation after its pixels."""
    monkeypatch.setattr(
        "PIL.ImageFile.ImageFile.load", lambda self: pytest.fail("pixels were decoded")
    )
    for kind in ORIENTED:
        path = write(tmp_path / "x.png", oriented(kind, 3))
        assert "180 degrees" in index.check_pair((path, ""), boxes=True)[1][0].text


FOLDER = FolderOptions(images="{domain}/images", labels="{domain}/labels", classes=("road", "car"))


@pytest.fixture
def town(tmp_path) -> Path:
    """Four images of every lossy and lossless kind, with labels of 0 and 1."""
    for name, data in (
        ("a.jpg", encoded(LARGE, "JPEG") + FILM),
        ("b.jpg", encoded(LARGE, "PNG")),
        ("c.png", encoded(LARGE, "JPEG", progressive=True)),
        ("d.jpg", encoded(LARGE, "WEBP", lossless=True)),
        ("e.jpg", encoded(LARGE, "JPEG", exif=with_orientation(6))),
    ):
        write(tmp_path / "root/town/images" / name, data)
        write(
            tmp_path / "root/town/labels" / f"{name[0]}.png",
            encoded((LARGE[..., 0] > 99).astype(np.uint8), "PNG"),
        )
    return tmp_path / "root"


def test_records_hold_what_files_are_read_as(town, tmp_path):
    """A JPEG is stored as it is up to its end, any other file without loss.

    Names, trailing bytes and orientations make no difference.
    """
    files = open_files("town", root=str(town), train=True, folder=FOLDER)
    prepare("town", {"train": files}, root=str(town), out=str(tmp_path / "out"))
    found = open_records(str(tmp_path / "out"), "town", train=True)
    assert isinstance(found, Records)
    assert len(found) == len(files) == 5
    for i in range(5):
        for key, array in files[i].items():
            np.testing.assert_array_equal(found[i][key], array)
    stored = [found._fields(i)["image"].bytes_list.value[0] for i in range(5)]
    assert stored[0] == (town / "town/images/a.jpg").read_bytes()[: -len(FILM)]
    assert stored[2] == (town / "town/images/c.png").read_bytes()
    assert [data[:2] for data in stored] == [
        b"\xff\xd8",
        b"\x89P",
        b"\xff\xd8",
        b"\x89P",
        b"\xff\xd8",
    ]
    assert b"Exif" in stored[4]


def test_a_hole_in_old_records_is_named(town, tmp_path, monkeypatch):
    """Old records of a damaged JPEG name the image when it is read."""
    data = encoded(LARGE, "JPEG", quality=90)
    (town / "town/images/a.jpg").write_bytes(data[: len(data) // 2] + data[len(data) // 2 + 1000 :])

    def old(data, *_):
        return cv2.imdecode(
            np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR_RGB | cv2.IMREAD_IGNORE_ORIENTATION
        )

    with monkeypatch.context() as patch:
        patch.setattr(jpeg, "decode", old)
        files = open_files("town", root=str(town), train=True, folder=FOLDER)
        prepare("town", {"train": files}, root=str(town), out=str(tmp_path / "out"))
    found = open_records(str(tmp_path / "out"), "town", train=True)
    assert found is not None
    with pytest.raises(
        ValueError,
        match=(
            r"town/images/a\.jpg in .*/out/town/1\.0\.0: damaged \(Corrupt JPEG data: .*prepare"
            r" them again"
        ),
    ):
        found[0]
    assert found[1]["image"].shape == LARGE.shape


@pytest.mark.parametrize("zipped", [False, True])
def test_permuted_palettes_of_published_labels_are_refused(tmp_path, zipped):
    """GTA5's own palettes pass; the same palettes at train ids are refused when read."""
    items = trees.make("gta5", tmp_path, np.random.default_rng(0), zipped=zipped, count=2)
    colors = np.full((256, 3), 1, np.uint8)
    for train, (file_id, name_color) in enumerate(
        zip(sorted(CITYSCAPES_IDS, key=CITYSCAPES_IDS.__getitem__), CITYSCAPES.colors, strict=True)
    ):
        assert CITYSCAPES_IDS[file_id] == train
        colors[file_id] = name_color
    official = Image.fromarray(items[0].ids.astype(np.uint8))
    official.putpalette(colors.tobytes())
    permuted = Image.fromarray(items[0].ids.astype(np.uint8))
    permuted.putpalette(np.array(CITYSCAPES.colors, np.uint8).tobytes())
    for image, told in (
        (official, None),
        (
            permuted,
            r"its palette gives index 0 the colour of road \(id 7\), 1 the colour of sidewalk",
        ),
    ):
        if zipped:
            with zipfile.ZipFile(tmp_path / "gta5" / "labels_again.zip", "w") as file:
                file.writestr("one.png", encoded(image, "PNG"))
            path = str(tmp_path / "gta5" / "labels_again.zip" / "one.png")
        else:
            path = write(Path(items[0].label), encoded(image, "PNG"))
        dataset = open_domain(
            "gta5", root=str(tmp_path), train=True, streets=StreetsOptions(), folder=None
        )
        dataset.pairs.labels[0] = path
        if told is None:
            assert dataset[0]["label"].shape == items[0].ids.shape
        else:
            with pytest.raises(ValueError, match=told):
                dataset[0]
            assert dataset[1]["label"].shape == items[1].ids.shape


def test_boxes_around_images_of_every_kind(town):
    """With boxes too content counts, and any orientation is refused whatever the sizes."""
    box = "<bndbox><xmin>5</xmin><ymin>5</ymin><xmax>20</xmax><ymax>9</ymax></bndbox>"
    things = f"<annotation><object><name>car</name>{box}</object></annotation>"
    for name in "abcde":
        write(town / f"town/xml/{name}.xml", things.encode())
    own = BoxOptions(
        images=("{domain}/images",) * 2,
        annotations=("{domain}/xml",) * 2,
        lists=("", ""),
        classes=("car",),
    )
    with pytest.raises(
        ValueError,
        match=(
            r"e\.jpg: its orientation \(EXIF 6: turned by 90 degrees\) leaves open whether the"
            r" boxes fit"
        ),
    ):
        open_box_files("town", root=str(town), train=True, own=own)
    (town / "town/images/e.jpg").unlink()
    (town / "town/xml/e.xml").unlink()
    dataset = open_box_files("town", root=str(town), train=True, own=own)
    assert [dataset[i]["image"].shape for i in range(4)] == [LARGE.shape] * 4


def test_minus_one_can_be_ignored(town, tmp_path):
    """For 32-bit labels with -1 the message proposes the ignore list, which then works."""
    ids = np.where(LARGE[..., 0] > 99, 1, -1).astype(np.int32)
    for label in (town / "town/labels").iterdir():
        label.write_bytes(encoded(ids, "TIFF"))
    options = {"root": str(town), "train": True}
    with pytest.raises(
        ValueError,
        match=(
            r"a\.png: \d+ pixels have label ids outside the id map: -1; add .*data\.folder\.ignore"
        ),
    ):
        open_files("town", **options, folder=FOLDER)[0]
    folder = dataclasses.replace(FOLDER, ignore=(-1,))
    files = open_files("town", **options, folder=folder)
    np.testing.assert_array_equal(files[0]["label"], np.where(ids == 1, 1, 255))
    assert dict(zip(*(array.tolist() for array in files.ids(0)), strict=True)) == {
        1: (ids == 1).sum(),
        65535: (ids == -1).sum(),
    }
    prepare("town", {"train": files}, root=str(town), out=str(tmp_path / "out"))
    found = open_domain(
        "town", root=str(tmp_path / "out"), train=True, streets=StreetsOptions(), folder=folder
    )
    assert isinstance(found, Records)
    np.testing.assert_array_equal(found[0]["label"], files[0]["label"])
