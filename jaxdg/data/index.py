"""The start-up check: images paired with labels, their sizes, and whether the files are complete.

Only headers and the last bytes of files are read. Members of archives are read in full, which
verifies their checksums. Several threads do this, and the outcome is kept in an index under
`$JAXDG_CACHE` (else `~/.cache/jaxdg`). Later runs touch no file at all: they compare the
modification times of folders and archives, which change when a file is added, removed or renamed. A
file that is rewritten in place is noticed when it is read, because decoding checks the same things
again.
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
    """The facts about an image file that need no decoding.

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
    """A fault of a file.

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
        labels: paths, one an image; "" for images without labels.
        sizes: height and width of each image and its label, pixels.
        fingerprints: of the image files, see `fingerprint`; None if they were not taken.
        notes: lines about the entries that were skipped; () if an earlier listing
            was recalled.
    """

    images: list[str]
    labels: list[str]
    sizes: Int32[np.ndarray, "n 2"]
    fingerprints: UInt64[np.ndarray, " n"] | None = None
    notes: tuple[str, ...] = ()

    def take(self, keep: Sequence[int]) -> "Pairs":
        """Some of the pairs, by their places."""
        images = [self.images[i] for i in keep]
        labels = [self.labels[i] for i in keep]
        fingerprints = None if self.fingerprints is None else self.fingerprints[keep]
        return Pairs(images, labels, self.sizes[keep], fingerprints, self.notes)


def index_pairs(
    tree: Tree,
    folders: Sequence[tuple[str, Sequence[str]]],
    *,
    image_suffix: str,
    label_suffix: str,
    skip: Collection[str] = (),
) -> Pairs:
    """Pairs and checks the files of image and label folders, or recalls an earlier check.

    Args:
        tree: the dataset's files.
        folders: an image folder and its label folder, or several alternatives for the latter, of
            which the first that exists counts; none for images without labels. Sub-folders count
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
    suffixes = {"image_suffix": image_suffix, "label_suffix": label_suffix}

    def make() -> dict[str, np.ndarray]:
        pairs, defects = examine(tree, folders, **suffixes, skip=skip)
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
        texts = {"images": encoded(pairs.images), "labels": encoded(pairs.labels)}
        fingerprints = {} if pairs.fingerprints is None else {"fingerprints": pairs.fingerprints}
        return {**texts, "sizes": pairs.sizes, **fingerprints}

    place = [tree.base, os.path.realpath(tree.base), tree.exact]
    places = [[image, list(labels)] for image, labels in folders]
    key = ["pairs", VERSION, place, places, image_suffix, label_suffix, sorted(skip)]
    arrays = cached(key, tree.modified, make)
    # `pop` frees the bytes: a million paths are large.
    images = decoded(arrays.pop("images"))
    labels = decoded(arrays.pop("labels")) or [""] * len(images)
    return Pairs(images, labels, arrays["sizes"], arrays.get("fingerprints"))


def examine(
    tree: Tree,
    folders: Sequence[tuple[str, Sequence[str]]],
    *,
    image_suffix: str,
    label_suffix: str,
    skip: Collection[str] = (),
) -> tuple[Pairs, list[Defect]]:
    """As `index_pairs`, but lists defects instead of raising errors, and recalls nothing.

    Args:
        tree: as for `index_pairs`.
        folders: as for `index_pairs`.
        image_suffix: as for `index_pairs`.
        label_suffix: as for `index_pairs`.
        skip: as for `index_pairs`.

    Returns:
        All pairs, and the defects. The size of a pair with defects may be that of the label, or 0.

    Raises:
        FileNotFoundError: a folder does not exist.
        ValueError: a folder is empty, or two files share a name.
    """
    pairs: list[tuple[str, str]] = []
    defects: list[Defect] = []
    skip = frozenset(skip)
    for image_folder, label_folders in folders:
        images = _by_stem(tree, (image_folder,), image_suffix)
        labels = dict.fromkeys(images, "")
        if label_folders:
            labels = _by_stem(tree, label_folders, label_suffix)
        stems = [stem for files in (images, labels) for stem, p in files.items() if p in skip]
        for stem in stems:
            images.pop(stem, None)
            labels.pop(stem, None)
        image_name, label_name = (
            f"*{suffix or ' .jpg, .png, ..'}" for suffix in (image_suffix, label_suffix)
        )
        for stem in sorted(images.keys() - labels.keys()):
            defects.append(Defect(images[stem], f" has no label ({label_name})"))
        for stem in sorted(labels.keys() - images.keys()):
            defects.append(Defect(labels[stem], f" has no image ({image_name})"))
        pairs += [(images[stem], labels[stem]) for stem in sorted(images.keys() & labels.keys())]
    headers: list[Header] = []
    # Blocks of pairs, because the pool keeps a kilobyte for each call.
    blocks = (pairs[i : i + 256] for i in range(0, len(pairs), 256))
    with ThreadPoolExecutor(THREADS) as pool:
        checked = pool.map(lambda block: [check_pair(pair) for pair in block], blocks)
        for header, found in itertools.chain.from_iterable(checked):
            headers.append(header)
            defects += found
    paths = [image for image, _ in pairs], [label for _, label in pairs]
    return Pairs(*paths, *arrays(headers), tree.skipped.notes()), defects


def arrays(headers: Sequence[Header]) -> tuple[Int32[np.ndarray, "n 2"], UInt64[np.ndarray, " n"]]:
    """Sizes and fingerprints of some images, as `Pairs` has them."""
    sizes = np.array([header.size for header in headers], np.int32).reshape(-1, 2)
    return sizes, np.array([header.fingerprint for header in headers], np.uint64)


def _by_stem(tree: Tree, folders: Sequence[str], suffix: str) -> dict[str, str]:
    """The files below a folder by their relative paths without the suffix."""
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
        skipped = "".join(f" ({line})" for line in tree.skipped.notes())
        raise ValueError(
            f"folder {folder} holds no *{suffix or ' .png, .jpg, .. image'} files{skipped}; fetch"
            " them, or check data.folder"
        )
    return found


def _stem(name: str, suffix: str) -> str | None:
    """A name without the suffix, or None if it ends otherwise; "" means any image extension."""
    if not suffix:
        stem, extension = os.path.splitext(name)
        return stem if extension.lower() in IMAGE_SUFFIXES else None
    if name.endswith(suffix):
        return name[: -len(suffix)]
    start, extension = os.path.splitext(suffix)
    if not extension:  # `splitext` takes all of ".png" for the name
        start, extension = extension, start
    # Cameras and Windows write .PNG and .JPG.
    same = name.lower().endswith(extension.lower()) and name[: -len(extension)].endswith(start)
    return name[: -len(suffix)] if same else None


def check_pair(pair: tuple[str, str], *, boxes: bool = False) -> tuple[Header, list[Defect]]:
    """Checks the headers and ends of an image and its label.

    Args:
        pair: their paths; "" for no label.
        boxes: the image has boxes instead of a label.

    Returns:
        The header of the image, and the defects.
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
                text = str(error)
                if not text.startswith(path):
                    text = f": unreadable ({type(error).__name__}: {error})"
                defects.append(Defect(path, text.removeprefix(path).replace("\n", " ")))
    if not defects and (boxes or pair[1]):
        defects += _mismatches(pair, stored)
    return (headers or [Header(0, 0, 0)])[0], defects


def _mismatches(pair: tuple[str, str], stored: Sequence[Stored]) -> list[Defect]:
    """Sizes that differ, and orientations that leave open which pixels the label or boxes mean.

    See `images.py` for the rule.
    """
    size, turn = stored[0]
    label_size, label_turn = stored[-1]
    path, odd = (pair[0], turn) if turn > 1 else (pair[1], label_turn)
    orientation = f"its orientation (EXIF {odd}: {TURNS[odd]})"
    bake = "turn its pixels by `mogrify -auto-orient FILE`"
    one_turned = (turn >= 5) != (label_turn >= 5)  # by a quarter
    if size != label_size:
        h, w = size
        label_h, label_w = label_size
        text = f" is {label_w}x{label_h} but its image is {w}x{h}"
        if one_turned and size == label_size[::-1]:
            text += f", as viewers do not show {os.path.basename(path)} by {orientation}; {bake}"
        return [Defect(pair[1], text)]
    unlabelled = len(stored) == 1
    # A label drawn on the turned pixels would have the turned size.
    sizes_tell = one_turned and size[0] != size[1]
    if (unlabelled and turn > 1) or (turn != label_turn and not sizes_tell):
        text = (
            f": {orientation} leaves open whether the {'boxes' if unlabelled else 'label'} fit the"
            f" stored or the turned pixels; {bake} if the turned ones, else take the orientation"
            " off by `exiftool -Orientation= FILE`"
        )
        return [Defect(path, text)]
    return []


def _header(path: str, label: bool) -> tuple[Header, Stored]:
    # A compressed member cannot be read from its end.
    with io.BytesIO(storage.read(path)) if storage.in_archive(path) else open(path, "rb") as file:
        try:
            stored = read_header(file, label=label)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from None
        return Header(*stored.size, 0 if label else fingerprint(file)), stored


def fingerprint(file: io.BufferedIOBase) -> int:
    """64 bits of the length, the beginning and the end, which different files hardly ever share.

    The end of a PNG holds a checksum of all its pixels, and that of a JPEG is as good as random. Of
    formats that do not compress, many images may end in black, so bytes in between count too.

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
    count = len(offenders)
    more = f"; and {count - limit} more ({count} in all)" if count > limit else ""
    return "; ".join(offenders[:limit]) + more
