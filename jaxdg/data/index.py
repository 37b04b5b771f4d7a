"""The start-up check: images paired with labels, their sizes, and whether the files are whole.

Only headers and the last bytes of the files are read, by several threads, and the outcome is kept in a JSON index under `$JAXDG_CACHE`
(else `~/.cache/jaxdg`). Later runs compare the modification times of the folders, which change when a file is added, removed or renamed,
and touch no file at all. A file rewritten in place is noticed when it is read: decoding checks the same things again.
"""

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
import contextlib
import dataclasses
import hashlib
import itertools
import json
import os
from pathlib import Path
import tempfile
import time

from jaxtyping import Int32
import numpy as np
from PIL import Image

VERSION = 1
THREADS = 16
IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".ppm", ".pgm", ".tif", ".tiff", ".webp")


@dataclasses.dataclass(frozen=True)
class Pairs:
    """Image files and their label files, ordered by path.

    Attributes:
        images: paths.
        labels: paths, one an image.
        sizes: height and width of each image and its label, pixels.
    """

    images: list[str]
    labels: list[str]
    sizes: Int32[np.ndarray, "n 2"]


def index_pairs(folders: Sequence[tuple[str, str]], *, image_suffix: str, label_suffix: str) -> Pairs:
    """Pairs and checks the files of image and label folders, or recalls the outcome of an earlier check.

    Args:
        folders: an image folder and its label folder, each; sub-folders count, and must be the same on both sides.
        image_suffix: the end of an image's file name that is not part of the name it shares with its label; "" for any image extension.
        label_suffix: the same for labels.

    Returns:
        The pairs, ordered by folder as given and then by path.

    Raises:
        FileNotFoundError: a folder does not exist.
        ValueError: files without partner, unreadable or truncated files, or label sizes other than their images'; names all of them.
    """
    for folder in itertools.chain.from_iterable(folders):
        if not os.path.isdir(folder):
            raise FileNotFoundError(
                f"folder {os.path.abspath(folder)} does not exist; check JAXDG_DATA or --config.data.root, and data.folder if it is yours"
            )
    key = json.dumps([VERSION, [[os.path.abspath(f) for f in pair] for pair in folders], image_suffix, label_suffix])
    cache = Path(os.environ.get("JAXDG_CACHE") or Path.home() / ".cache" / "jaxdg")
    cache = cache / f"index-{hashlib.sha256(key.encode()).hexdigest()[:24]}.json"
    return _recall(cache, key) or _check(folders, image_suffix, label_suffix, cache, key)


def truncated(path: str, tail: bytes) -> str | None:
    """What is missing at the end of a PNG or JPEG file, if anything.

    Args:
        path: its extension says the format.
        tail: the last bytes of the file, or all of it.

    Returns:
        None for whole files and other formats, else what is wrong.
    """
    # Some encoders write padding or metadata behind the end marker; entropy-coded JPEG data never holds FFD9.
    end = {".jpg": b"\xff\xd9", ".jpeg": b"\xff\xd9", ".png": b"IEND"}.get(os.path.splitext(path)[1].lower(), b"")
    if end in tail[-1024:]:
        return None
    return "truncated (no PNG end chunk)" if end == b"IEND" else "truncated (no JPEG end marker)"


def _check(folders: Sequence[tuple[str, str]], image_suffix: str, label_suffix: str, cache: Path, key: str) -> Pairs:
    pairs: list[tuple[str, str]] = []
    modified: dict[str, int] = {}
    for image_folder, label_folder in folders:
        images, labels = _files(image_folder, image_suffix, modified), _files(label_folder, label_suffix, modified)
        lone = [f"{images[stem]} has no label" for stem in sorted(images.keys() - labels.keys())]
        lone += [f"{labels[stem]} has no image" for stem in sorted(labels.keys() - images.keys())]
        if lone:
            remedy = f"files pair by name: images *{image_suffix or '.jpg, .png, ..'}, labels *{label_suffix or '.jpg, .png, ..'}"
            raise ValueError(f"{_some(lone)}; {remedy}; add the missing files or remove the others")
        pairs += [(images[stem], labels[stem]) for stem in sorted(images)]
    sizes, offenders = [], []
    with ThreadPoolExecutor(THREADS) as pool:
        for size, offender in pool.map(_check_pair, pairs, chunksize=64):
            sizes.append(size)
            offenders += offender
    if offenders:
        raise ValueError(f"{_some(offenders)}; fetch these files again or remove them with their partners")
    result = Pairs([i for i, _ in pairs], [t for _, t in pairs], np.array(sizes, np.int32).reshape(-1, 2))
    _remember(result, cache, key, modified)
    return result


def _files(folder: str, suffix: str, modified: dict[str, int]) -> dict[str, str]:
    """Files below `folder` by what remains of their relative path without the suffix; notes when each folder was modified."""
    found: dict[str, str] = {}
    for parent, _, names in os.walk(folder, followlinks=True, onerror=_refuse):
        modified[os.path.abspath(parent)] = os.stat(parent).st_mtime_ns
        for name in names:
            stem, extension = (name[: -len(suffix)], suffix) if suffix else os.path.splitext(name)
            if name.startswith(".") or not (name.endswith(suffix) if suffix else extension.lower() in IMAGE_SUFFIXES):
                continue
            path = os.path.join(parent, name)
            stem = os.path.relpath(os.path.join(parent, stem), folder)
            if stem in found:
                raise ValueError(f"{found[stem]} and {path} share a name; keep one, or say which with a suffix (data.folder.image_suffix)")
            found[stem] = path
    if not found:
        raise ValueError(f"folder {os.path.abspath(folder)} holds no *{suffix or ' .png, .jpg, .. image'} files; check data.folder")
    return found


def _refuse(error: OSError) -> None:
    raise error  # a folder that cannot be listed must not read as an empty one


def _check_pair(pair: tuple[str, str]) -> tuple[tuple[int, int], list[str]]:
    sizes: list[tuple[int, int]] = []
    offenders: list[str] = []
    for path in pair:
        try:
            with open(path, "rb") as file, Image.open(file) as header:
                sizes.append((header.height, header.width))
                file.seek(max(0, os.fstat(file.fileno()).st_size - 1024))
                wrong = truncated(path, file.read())
        except Exception as error:  # Pillow raises whatever its format plugins meet
            wrong = f"unreadable ({type(error).__name__}: {error})".replace("\n", " ")
        if wrong:
            offenders.append(f"{path}: {wrong}")
    if not offenders and sizes[0] != sizes[1]:
        (h, w), (label_h, label_w) = sizes
        offenders.append(f"{pair[1]} is {label_w}x{label_h} but its image is {w}x{h}")
    return (sizes or [(0, 0)])[0], offenders


def _recall(cache: Path, key: str) -> Pairs | None:
    try:
        index = json.loads(cache.read_text(encoding="utf-8"))
        if index["key"] != key or any(os.stat(folder).st_mtime_ns != at for folder, at in index["modified"].items()):
            return None
        sizes = np.repeat(np.array(index["sizes"], np.int32).reshape(-1, 2), index["runs"], axis=0)
        images, labels = index["images"], index["labels"]
        return Pairs(images, labels, sizes) if len(images) == len(labels) == len(sizes) else None
    except (OSError, ValueError, KeyError, TypeError):
        return None  # absent, from another version or damaged: the check runs again and replaces it


def _remember(pairs: Pairs, cache: Path, key: str, modified: dict[str, int]) -> None:
    # A folder changed a moment ago may change again within the resolution of its clock: the next run checks again.
    if max(modified.values()) > time.time_ns() - 2_000_000_000:
        return
    sizes, runs = zip(*_runs(pairs.sizes), strict=True)
    index = {"key": key, "modified": modified, "sizes": sizes, "runs": runs, "images": pairs.images, "labels": pairs.labels}
    with contextlib.suppress(OSError):  # an index saves time and is never needed: a full or read-only disk is no error
        cache.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=cache.parent, prefix=cache.stem, suffix=".tmp")
        try:
            with os.fdopen(handle, "w", encoding="utf-8") as file:
                json.dump(index, file)
            os.replace(temporary, cache)
        except OSError:
            os.unlink(temporary)


def _runs(sizes: Int32[np.ndarray, "n 2"]) -> Iterator[tuple[tuple[int, int], int]]:
    for size, run in itertools.groupby(map(tuple, sizes.tolist())):
        yield size, sum(1 for _ in run)


def _some(offenders: Sequence[str], limit: int = 10) -> str:
    more = f"; and {len(offenders) - limit} more ({len(offenders)} in all)" if len(offenders) > limit else ""
    return "; ".join(offenders[:limit]) + more
