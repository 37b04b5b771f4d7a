"""Small trees of the published datasets, in the form in which their publishers ship them."""

from collections.abc import Callable, Iterable, Iterator
import dataclasses
import io
from pathlib import Path
import struct
import zipfile
import zlib

import numpy as np
from PIL import Image

COLORS = (
    np.random.default_rng(19).integers(0, 256, 768).tolist()
)  # of palette files: colours are never to be read


@dataclasses.dataclass
class Item:
    """One image that was written, and its label.

    Attributes:
        domain: `acdc/night`, otherwise the name of the dataset.
        split: train, val, test or all.
        image: path, as datasets name it: `ROOT/NAME/..` or `ROOT/NAME/ARCHIVE.zip/..`.
        label: likewise; "" where the publisher keeps it secret.
        pixels: RGB as the file holds them.
        ids: uint16 [h, w], as the label file holds them.
    """

    domain: str
    split: str
    image: str
    label: str
    pixels: np.ndarray
    ids: np.ndarray


@dataclasses.dataclass
class Kind:
    """The files of a dataset on disk.

    Attributes:
        ids: of label files.
        image_format: PNG or JPEG.
        encode: ids to a label file.
        files: count and version to (domain, split, the image's archive, image, the label's archive,
            label).
        inside: folder that everything in an archive is wrapped in.
    """

    ids: Iterable[int]
    image_format: str
    encode: Callable[[np.ndarray], bytes]
    files: Callable[[int, str], "Files"]
    inside: str = ""


def make(
    name: str,
    root: Path,
    rng: np.random.Generator,
    *,
    zipped: bool = False,
    count: int = 2,
    size: tuple[int, int] = (24, 40),
    version: str = "",
) -> list[Item]:
    """Writes a dataset below `root/name`.

    Args:
        name: gta5, synthia, cityscapes, bdd100k, mapillary, acdc, dark_zurich, wilddash2 or camvid.
        root: the data root.
        rng: what is in the images and labels.
        zipped: in archives instead of folders.
        count: images a split, a city, a condition.
        size: height and width of the images.
        version: v2.0: Mapillary's later archive.

    Returns:
        What was written.
    """
    kind = KINDS[name]
    base = root / name
    items = []
    for domain, split, image_archive, image, label_archive, label in kind.files(count, version):
        small = rng.integers(0, 256, (4, 5, 3), dtype=np.uint8)
        pixels = np.asarray(Image.fromarray(small).resize(size[::-1], Image.Resampling.BICUBIC))
        ids = rng.choice(list(kind.ids), size).astype(np.uint16)
        encoded = encode(pixels, kind.image_format)
        places = []
        for archive, path, data in (
            (image_archive, image, encoded),
            (label_archive, label, kind.encode(ids)),
        ):
            archive, inside = (f"{archive}.zip", kind.inside) if zipped else ("", "")
            places.append(str(write(base, path, data, archive, inside)) if path else "")
        items.append(Item(domain, split, *places, np.asarray(Image.open(io.BytesIO(encoded))), ids))
    return items


def write(base: Path, path: str, data: bytes, archive: str = "", inside: str = "") -> Path:
    """Writes a file into a dataset's folder or an archive there; returns its path."""
    if not archive:
        (base / path).parent.mkdir(parents=True, exist_ok=True)
        (base / path).write_bytes(data)
        return base / path
    base.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(base / archive, "a", zipfile.ZIP_DEFLATED) as file:
        file.writestr(f"{inside}{path}", data)
    return base / archive / f"{inside}{path}"


def encode(pixels: np.ndarray, image_format: str, palette: bool = False) -> bytes:
    """An image file: grey, RGB, or indices with a palette."""
    image = Image.fromarray(pixels)
    data = io.BytesIO()
    if palette:
        image.putpalette(COLORS)
    image.save(data, image_format, **({"quality": 95} if image_format == "JPEG" else {}))
    return data.getvalue()


def grey(ids: np.ndarray) -> bytes:
    """8-bit grey PNG."""
    return encode(ids.astype(np.uint8), "PNG")


def indexed(ids: np.ndarray) -> bytes:
    """8-bit palette PNG."""
    return encode(ids.astype(np.uint8), "PNG", palette=True)


def red(ids: np.ndarray) -> bytes:
    """A 16-bit RGB PNG written by the specification: ids in red, instances in green."""

    def chunk(kind, data):
        return (
            struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        )

    h, w = ids.shape
    instances = (np.arange(h * w) % 300).reshape(h, w)
    pixels = np.stack([ids, instances, np.zeros_like(ids)], -1).astype(">u2")
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", w, h, 16, 2, 0, 0, 0))
    body = chunk(b"IDAT", zlib.compress(b"".join(b"\0" + row.tobytes() for row in pixels)))
    return b"\x89PNG\r\n\x1a\n" + header + body + chunk(b"IEND", b"")


Files = Iterator[
    tuple[str, str, str, str, str, str]
]  # domain, split, image's archive, image, label's archive, label


def _gta5(count: int, version: str) -> Files:
    for i in range(1, count + 1):  # the publisher's archives hold a tenth of the images each
        part = f"{1 + (i - 1) % 2:02}"
        yield (
            "gta5",
            "all",
            f"{part}_images",
            f"images/{i:05}.png",
            f"{part}_labels",
            f"labels/{i:05}.png",
        )


def _synthia(count: int, version: str) -> Files:
    for i in range(count):
        yield (
            "synthia",
            "all",
            "SYNTHIA_RAND_CITYSCAPES",
            f"RGB/{i:07}.png",
            "SYNTHIA_RAND_CITYSCAPES",
            f"GT/LABELS/{i:07}.png",
        )


def _cityscapes(count: int, version: str) -> Files:
    for split, cities in (
        ("train", ("aachen", "bochum")),
        ("val", ("frankfurt",)),
        ("test", ("berlin",)),
    ):
        for city in cities:
            for i in range(count):
                name = f"{split}/{city}/{city}_{i:06}_000019"
                image = f"leftImg8bit/{name}_leftImg8bit.png"
                label = f"gtFine/{name}_gtFine_labelIds.png"
                yield (
                    "cityscapes",
                    split,
                    "leftImg8bit_trainvaltest",
                    image,
                    "gtFine_trainvaltest",
                    label,
                )


def _bdd100k(count: int, version: str) -> Files:
    for split in ("train", "val"):
        for i in range(count):
            name = f"{split}/{i:08x}-d4dff0ad"
            image = f"images/10k/{name}.jpg"
            label = f"labels/sem_seg/masks/{name}.png"
            yield (
                "bdd100k",
                split,
                "bdd100k_images_10k",
                image,
                "bdd100k_sem_seg_labels_trainval",
                label,
            )


def _mapillary(count: int, version: str) -> Files:
    archive = f"mapillary-vistas-dataset_public_{version or 'v1.2'}"
    for split, folder in (("train", "training"), ("val", "validation")):
        for i in range(count):
            labels = f"{folder}/v1.2/labels" if version == "v2.0" else f"{folder}/labels"
            yield (
                "mapillary",
                split,
                archive,
                f"{folder}/images/_{i}CsX7o.jpg",
                archive,
                f"{labels}/_{i}CsX7o.png",
            )


def _acdc(count: int, version: str) -> Files:
    for number, condition in enumerate(("fog", "night", "rain", "snow")):
        for split in ("train", "val", "test"):
            for i in range(count):
                name = f"{condition}/{split}/GOPR047{number}/GOPR047{number}_frame_{i:06}"
                image = f"rgb_anon/{name}_rgb_anon.png"
                label = f"gt/{name}_gt_labelTrainIds.png" if split != "test" else ""
                yield (
                    f"acdc/{condition}",
                    split,
                    "rgb_anon_trainvaltest",
                    image,
                    "gt_trainval",
                    label,
                )


def _dark_zurich(count: int, version: str) -> Files:
    for i in range(count):
        name = f"val/night/GOPR0356/GOPR0356_frame_{i:06}"
        archive = "Dark_Zurich_val_anon"
        yield (
            "dark_zurich",
            "val",
            archive,
            f"rgb_anon/{name}_rgb_anon.png",
            archive,
            f"gt/{name}_gt_labelTrainIds.png",
        )


def _wilddash2(count: int, version: str) -> Files:
    for i in range(count):
        yield (
            "wilddash2",
            "all",
            "wd_public_v2p0",
            f"images/aa{i:04}_100000.jpg",
            "wd_public_v2p0",
            f"labels/aa{i:04}_100000.png",
        )


def _camvid(count: int, version: str) -> Files:
    domains = {
        ("train", "0016E5"): ("camvid", "train"),
        ("train", "0006R0"): ("camvid", "train"),
        ("train", "0001TP"): ("dusk", "val"),
    }
    domains |= {
        ("val", "0016E5"): ("camvid", "val"),
        ("test", "Seq05VD"): ("day", "val"),
        ("test", "0001TP"): ("dusk", "val"),
    }
    for (folder, sequence), (domain, split) in domains.items():
        for i in range(count):
            name = f"{sequence}_{i:05}.png"
            yield domain, split, "CamVid", f"{folder}/{name}", "CamVid", f"{folder}annot/{name}"


TRAIN_IDS = (*range(19), 255)
KINDS = {
    "gta5": Kind(range(35), "PNG", indexed, _gta5),
    "synthia": Kind(range(23), "PNG", red, _synthia, inside="RAND_CITYSCAPES/"),
    "cityscapes": Kind(range(34), "PNG", grey, _cityscapes),
    "bdd100k": Kind(TRAIN_IDS, "JPEG", grey, _bdd100k, inside="bdd100k/"),
    "mapillary": Kind(range(66), "JPEG", indexed, _mapillary),
    "acdc": Kind(TRAIN_IDS, "PNG", grey, _acdc),
    "dark_zurich": Kind(TRAIN_IDS, "PNG", grey, _dark_zurich, inside="Dark_Zurich_val_anon/"),
    "wilddash2": Kind(range(81), "JPEG", grey, _wilddash2),
    "camvid": Kind(range(12), "PNG", grey, _camvid, inside="CamVid/"),
}
NAMES = tuple(KINDS)
