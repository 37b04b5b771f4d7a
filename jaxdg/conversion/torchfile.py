"""Files of torch, read by their tensors alone: without torch, and without running what they hold.

Three kinds: the zip archives of `torch.save` and those of TorchScript, as OpenAI publishes CLIP,
both of raw storages (`data/0`, `data/1`, ..) and a pickle that names them (`data.pkl`; a program in
`code/` is never looked at), and what `torch.save` wrote before 1.6: pickles, and the storages after
them.
"""

from collections.abc import Callable, Iterable
import contextlib
import functools
import io
import math
from pathlib import Path
import pickle
from typing import Any
import zipfile

import numpy as np

from jaxdg.conversion import pickled
from jaxdg.conversion.pickled import Part, Storage, Tensor, Unread

MAGIC = 0x1950A86A20F9469CFC6C  # how files before torch 1.6 begin


def scripted(names: Iterable[str]) -> bool:
    """Whether an archive of these members is one of TorchScript, by that which torch looks for."""
    return any(name.endswith("/constants.pkl") for name in names)


def members(path: Path) -> list[str]:
    """The names in a zip archive; none of another file."""
    if not zipfile.is_zipfile(path):
        return []
    with zipfile.ZipFile(path) as archive:
        return archive.namelist()


def opened(path: Path, stack: contextlib.ExitStack) -> tuple[Any, Callable[[Tensor], np.ndarray]]:
    """What a file of torch holds, its tensors as `Tensor`, and a function that reads one of them.

    Args:
        path: the file.
        stack: keeps it open.

    Raises:
        ForeignCode: it would run code; the message names it.
        Exception: of any kind; a damaged file.
    """
    content, storage = _zip(path, stack) if zipfile.is_zipfile(path) else _legacy(path, stack)
    return content, lambda tensor: _read(storage, tensor)


def _zip(path: Path, stack: contextlib.ExitStack) -> tuple[Any, Callable[[Storage], np.ndarray]]:
    archive = stack.enter_context(zipfile.ZipFile(path))
    names = archive.namelist()
    root = next(name for name in names if name.endswith("data.pkl")).removesuffix("data.pkl")
    if f"{root}byteorder" in names and archive.read(f"{root}byteorder") != b"little":
        raise ValueError(
            "written on a machine of the other byte order; save it again on a usual one"
        )
    content = pickled.content(io.BytesIO(archive.read(f"{root}data.pkl")))
    if scripted(names):
        found: dict[str, Tensor] = {}
        _collect(content, "", found)
        content = found
    # A storage may hold many tensors, one after the other: FSDP's, or a fused optimiser's.
    read = functools.lru_cache(maxsize=1)(archive.read)
    return content, lambda storage: np.frombuffer(read(f"{root}data/{storage.key}"), np.uint8)


def _legacy(path: Path, stack: contextlib.ExitStack) -> tuple[Any, Callable[[Storage], np.ndarray]]:
    file = stack.enter_context(path.open("rb"))
    magic = pickled.content(file)
    if magic != MAGIC:
        raise pickle.UnpicklingError("a pickle, but none of torch.save")
    for _ in ("version of the protocol", "sizes of integers"):
        pickled.content(file)
    unpickler = _Legacy(file, encoding="latin1")
    content = unpickler.load()
    places: dict[str, tuple[int, int]] = {}
    size = path.stat().st_size
    for key in pickled.content(file):
        count = int.from_bytes(file.read(8), "little")
        start = file.tell()
        length = count * unpickler.sizes[str(key)]
        if start + length > size:
            raise EOFError("cut short")
        places[str(key)] = start, length
        file.seek(start + length)

    def read(storage: Storage) -> np.ndarray:
        start, length = places[storage.key]
        file.seek(start)
        return np.frombuffer(file.read(length), np.uint8)

    return content, read


class _Legacy(pickled.Unpickler):
    """Also notes how many bytes a number of each storage takes, which only its type tells."""

    def __init__(self, *args: Any, **kw: Any):
        super().__init__(*args, **kw)
        self.sizes: dict[str, int] = {}

    def persistent_load(self, pid: Any) -> Any:
        storage = super().persistent_load(pid)
        if isinstance(storage, Storage):
            self.sizes[storage.key] = storage.dtype.itemsize if storage.dtype else 1
        return storage


def _collect(part: Part, prefix: str, found: dict[str, Tensor]) -> None:
    """The tensors of a TorchScript archive's modules, by the names that the state dict would give
    them.
    """
    for name, value in part.attributes.items():
        if isinstance(value, Tensor):
            found[prefix + name] = value
        elif isinstance(value, Part):
            _collect(value, f"{prefix}{name}.", found)


def _read(read: Callable[[Storage], np.ndarray], tensor: Tensor) -> np.ndarray:
    """A tensor of the bytes of its storage.

    Raises:
        Unread: it is of no kind that is read.
        ValueError: it reaches past its storage.
    """
    if tensor.dtype is None or isinstance(tensor.dtype, str):
        raise Unread(
            "a tensor of a kind that is not read"
            f" ({tensor.dtype or 'quantised, or of complex numbers'})"
        )
    storage = read(tensor.storage)
    dtype = np.dtype(tensor.dtype)
    numbers = storage[: storage.size // dtype.itemsize * dtype.itemsize].view(dtype)
    start = tensor.offset + tensor.storage.offset
    last = sum((n - 1) * step for n, step in zip(tensor.shape, tensor.strides, strict=True))
    if min((start, *tensor.strides, *tensor.shape)) < 0 or (
        math.prod(tensor.shape) and start + last >= numbers.size
    ):
        raise ValueError("a tensor reaches past its storage")
    strides = [step * dtype.itemsize for step in tensor.strides]
    return np.lib.stride_tricks.as_strided(numbers[start:], tensor.shape, strides, writeable=False)
