"""The start-up check: images paired with labels, their sizes, and whether the files are whole.

Of files only headers and the last bytes are read; members of archives are read in full, which
verifies their checksums. That is done by several threads, and the outcome is kept in an index under
`$JAXDG_CACHE` (else `~/.cache/jaxdg`). Later runs compare the modification times of folders and
archives, which change when a file is added, removed or renamed, and touch no file at all. A file
rewritten in place is noticed when it is read: decoding checks the same things again.
"""

from collections.abc import Collection, Sequence
from concurrent.futures import ThreadPoolExecutor
import dataclasses
import hashlib
import io
import itertools
import os
from typing import NamedTuple

from jaxtyping import Int32, UInt64
import numpy as np

from jaxdg.data import storage
from jaxdg.data.cache import cached, decoded, encoded
from jaxdg.data.images import TURNS, Stored, read_header
from jaxdg.data.tree import Tree

VERSION = 6
THREADS = 16
IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".ppm", ".pgm", ".tif", ".tiff", ".webp")


class Header(NamedTuple):
    """What is known of an image file without decoding it.

    Attributes:
        height: pixels.
        width: pixels.
        fingerprint: 64 bits of its length and some of its bytes, see `fingerprint`; 0 if it could
            not be read.
    """

    height: int
    width: int
    fingerprint: int

    @property
    def size(self) -> tuple[int, int]:
        """Height and width, pixels."""
        return self.height, self.width


class Defect(NamedTuple):
    """What is wrong with a file.

    Attributes:
        path: the file.
        text: the rest of a sentence that begins with the path.
    """

    path: str
    text: str


@dataclasses.dataclass(frozen=True)
class Pairs:
    """Image files and their label files, ordered by path.

    Attributes:
        images: paths as `storage.read` takes them.
        labels: paths, one an image; "" where there are only images.
        sizes: height and width of each image and its label, pixels.
        fingerprints: of the image files, see `fingerprint`; None where nobody took them.
        notes: what was passed over when the files were listed, a line each; () where an earlier
            listing was recalled.
    """

    images: list[str]
    labels: list[str]
    sizes: Int32[np.ndarray, "n 2"]
    fingerprints: UInt64[np.ndarray, " n"] | None = None
    notes: tuple[str, ...] = ()

    def take(self, keep: Sequence[int]) -> "Pairs":
        """Some of the pairs, by their places."""
        fingerprints = None if self.fingerprints is None else self.fingerprints[keep]
        return Pairs(
            [self.images[i] for i in keep],
            [self.labels[i] for i in keep],
            self.sizes[keep],
            fingerprints,
            self.notes,
        )


def index_pairs(
    tree: Tree,
    folders: Sequence[tuple[str, Sequence[str]]],
    *,
    image_suffix: str,
    label_suffix: str,
    skip: Collection[str] = (),
) -> Pairs:
    """Pairs and checks the files of image and label folders, or recalls the outcome of an earlier
    check.

    Args:
        tree: the dataset's files.
        folders: an image folder and its label folder, or the latter's alternatives, of which the
            first that exists counts; no label folder for images without labels. Sub-folders count,
            and must be the same on both sides.
        image_suffix: the end of an image's file name that is not part of the name it shares with
            its label; "" for any image extension.
        label_suffix: the same for labels.
        skip: paths of files to leave out with their partners.

    Returns:
        The pairs, ordered by folder as given and then by path.

    Raises:
        FileNotFoundError: a folder does not exist.
        ValueError: files without partner, unreadable or truncated files, or label sizes other than
            their images'; names all of them.
    """

    def make() -> dict[str, np.ndarray]:
        pairs, defects = examine(
            tree, folders, image_suffix=image_suffix, label_suffix=label_suffix, skip=skip
        )
        if defects:
            remedy = (
                "fetch these files again, or leave them out with data.skip (a text file with their"
                " paths, one a line)"
            )
            raise ValueError(f"{_some([d.path + d.text for d in defects])}; {remedy}")
        if not pairs.images:
            raise ValueError(
                f"data.skip leaves no image of {os.path.abspath(tree.base)}; shorten the list"
            )
        fingerprints = {} if pairs.fingerprints is None else {"fingerprints": pairs.fingerprints}
        return {
            "images": encoded(pairs.images),
            "labels": encoded(pairs.labels),
            "sizes": pairs.sizes,
            **fingerprints,
        }

    place = [tree.base, os.path.realpath(tree.base), tree.exact]
    key = [
        "pairs",
        VERSION,
        place,
        [[i, list(t)] for i, t in folders],
        image_suffix,
        label_suffix,
        sorted(skip),
    ]
    kept = cached(key, tree.modified, make)
    images = decoded(
        kept.pop("images")
    )  # their bytes are not needed any more: a million paths take room
    return Pairs(
        images,
        decoded(kept.pop("labels")) or [""] * len(images),
        kept["sizes"],
        kept.get("fingerprints"),
    )


def examine(
    tree: Tree,
    folders: Sequence[tuple[str, Sequence[str]]],
    *,
    image_suffix: str,
    label_suffix: str,
    skip: Collection[str] = (),
) -> tuple[Pairs, list[Defect]]:
    """Pairs and checks files as `index_pairs` does, but lists defects instead of raising errors,
    and recalls nothing.

    Args:
        tree: as for `index_pairs`.
        folders: as for `index_pairs`.
        image_suffix: as for `index_pairs`.
        label_suffix: as for `index_pairs`.
        skip: as for `index_pairs`.

    Returns:
        All pairs, those with defects included, whose sizes may be those of the label or 0; and the
        defects.

    Raises:
        FileNotFoundError: a folder does not exist.
        ValueError: a folder is empty, or two files share a name.
    """
    pairs: list[tuple[str, str]] = []
    defects: list[Defect] = []
    skip = frozenset(skip)
    for image_folder, label_folders in folders:
        images = _by_stem(tree, (image_folder,), image_suffix)
        labels = (
            _by_stem(tree, label_folders, label_suffix)
            if label_folders
            else dict.fromkeys(images, "")
        )
        for stem in [
            stem for files in (images, labels) for stem, path in files.items() if path in skip
        ]:
            images.pop(stem, None)
            labels.pop(stem, None)
        names = [f"*{suffix or ' .jpg, .png, ..'}" for suffix in (image_suffix, label_suffix)]
        defects += [
            Defect(images[stem], f" has no label ({names[1]})")
            for stem in sorted(images.keys() - labels.keys())
        ]
        defects += [
            Defect(labels[stem], f" has no image ({names[0]})")
            for stem in sorted(labels.keys() - images.keys())
        ]
        pairs += [(images[stem], labels[stem]) for stem in sorted(images.keys() & labels.keys())]
    headers: list[Header] = []
    with ThreadPoolExecutor(
        THREADS
    ) as pool:  # in blocks: the pool keeps a kilobyte for everything that it is asked
        blocks = (pairs[i : i + 256] for i in range(0, len(pairs), 256))
        for header, found in itertools.chain.from_iterable(
            pool.map(lambda block: [check_pair(pair) for pair in block], blocks)
        ):
            headers.append(header)
            defects += found
    return (
        Pairs([i for i, _ in pairs], [t for _, t in pairs], *arrays(headers), tree.passed.told()),
        defects,
    )


def arrays(headers: Sequence[Header]) -> tuple[Int32[np.ndarray, "n 2"], UInt64[np.ndarray, " n"]]:
    """Sizes and fingerprints of some images, as `Pairs` has them."""
    sizes = np.array([header.size for header in headers], np.int32).reshape(-1, 2)
    return sizes, np.array([header.fingerprint for header in headers], np.uint64)


def _by_stem(tree: Tree, folders: Sequence[str], suffix: str) -> dict[str, str]:
    """Files below a folder by what remains of their relative path without the suffix."""
    found: dict[str, str] = {}
    suffix = storage.composed(suffix)
    for name, path in tree.files(*folders).items():
        stem = _stem(name, suffix)
        if stem is None:
            continue
        if stem in found:
            raise ValueError(
                f"{found[stem]} and {path} share a name; keep one, or say which with a suffix"
                " (data.folder.image_suffix)"
            )
        found[stem] = path
    if not found:
        folder = os.path.abspath(tree.places(*folders)[0])
        passed = "".join(f" ({line})" for line in tree.passed.told())
        raise ValueError(
            f"folder {folder} holds no *{suffix or ' .png, .jpg, .. image'} files{passed}; fetch"
            " them, or check data.folder"
        )
    return found


def _stem(name: str, suffix: str) -> str | None:
    """What remains of a name without the suffix, or without any image extension where that is "";
    None if it ends otherwise.
    """
    if not suffix:
        stem, extension = os.path.splitext(name)
        return stem if extension.lower() in IMAGE_SUFFIXES else None
    if name.endswith(suffix):
        return name[: -len(suffix)]
    start, extension = os.path.splitext(suffix)
    start, extension = (
        (start, extension) if extension else ("", start)
    )  # of ".png", os.path takes all for the name
    # Cameras and Windows write .PNG and .JPG.
    same = name.lower().endswith(extension.lower()) and name[: -len(extension)].endswith(start)
    return name[: -len(suffix)] if same else None


def check_pair(pair: tuple[str, str], *, boxes: bool = False) -> tuple[Header, list[Defect]]:
    """Looks at the headers and ends of an image and its label.

    Args:
        pair: their paths; "" for no label.
        boxes: something else says what is where in the image.

    Returns:
        What is known of the image, and what is wrong.
    """
    headers: list[Header] = []
    stored: list[Stored] = []
    defects: list[Defect] = []
    for path, label in zip(pair, (False, True), strict=True):
        if path:
            try:
                header, form = _header(path, label)
                headers.append(header)
                stored.append(form)
            except Exception as error:  # Pillow raises whatever its format plugins meet
                text = (
                    str(error)
                    if str(error).startswith(path)
                    else f"{path}: unreadable ({type(error).__name__}: {error})"
                )
                defects.append(Defect(path, text.removeprefix(path).replace("\n", " ")))
    if not defects and (boxes or pair[1]):
        defects += _misfits(pair, stored)
    return (headers or [Header(0, 0, 0)])[0], defects


def _misfits(pair: tuple[str, str], stored: Sequence[Stored]) -> list[Defect]:
    """Sizes that differ, and an orientation that leaves open which pixels the label or the boxes
    are of; see `images.py`.
    """
    size, turn = stored[0]
    label_size, label_turn = stored[-1]
    path, odd = (pair[0], turn) if turn > 1 else (pair[1], label_turn)
    orientation = f"its orientation (EXIF {odd}: {TURNS[odd]})"
    bake = "turn its pixels by `mogrify -auto-orient FILE`"
    one_lies = (turn >= 5) != (label_turn >= 5)
    if size != label_size:
        h, w = size
        label_h, label_w = label_size
        text = f" is {label_w}x{label_h} but its image is {w}x{h}"
        if one_lies and size == label_size[::-1]:
            text += f", as viewers do not show {os.path.basename(path)} by {orientation}; {bake}"
        return [Defect(pair[1], text)]
    alone = len(stored) == 1
    sizes_tell = (
        one_lies and size[0] != size[1]
    )  # had the other been drawn on the turned pixels, its size would be turned too
    if (alone and turn > 1) or (turn != label_turn and not sizes_tell):
        text = (
            f": {orientation} leaves open whether the {'boxes' if alone else 'label'} fit the"
            " stored or the turned pixels"
        )
        return [
            Defect(
                path,
                f"{text}; {bake} if the turned ones, else take the orientation off by `exiftool"
                " -Orientation= FILE`",
            )
        ]
    return []


def _header(path: str, label: bool) -> tuple[Header, Stored]:
    # The end of a compressed member cannot be had without the rest.
    with io.BytesIO(storage.read(path)) if storage.in_archive(path) else open(path, "rb") as file:
        try:
            stored = read_header(file, label=label)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from None
        return Header(*stored.size, 0 if label else fingerprint(file)), stored


def fingerprint(file: io.BufferedIOBase) -> int:
    """64 bits that equal files share, and others hardly ever: of the length, the beginning and the
    end.

    The end of a PNG holds a checksum of all its pixels, and that of a JPEG is as good as random.
    Formats that do not compress may have black there in many images, so of them bytes in between
    count too.

    Args:
        file: its contents, whatever its name says.

    Returns:
        The fingerprint, never 0.
    """
    length = file.seek(0, os.SEEK_END)
    digest = hashlib.blake2b(length.to_bytes(8, "little"), digest_size=8)
    file.seek(0)
    head = file.read(1024)
    between = 0 if head.startswith((b"\x89PNG", b"\xff\xd8")) else 14
    digest.update(head)
    for k in range(1, between + 2):
        file.seek(max(0, length - 1024) * k // (between + 1))
        digest.update(file.read(1024))
    return int.from_bytes(digest.digest(), "little") or 1


def _some(offenders: Sequence[str], limit: int = 10) -> str:
    more = (
        f"; and {len(offenders) - limit} more ({len(offenders)} in all)"
        if len(offenders) > limit
        else ""
    )
    return "; ".join(offenders[:limit]) + more
