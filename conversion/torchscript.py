"""TorchScript archives, as OpenAI publishes CLIP, read by their tensors alone: with NumPy, without torch, and without running their code.

Such an archive is a zip of a program (`code/`, never looked at), raw storages (`data/0`, `data/1`, ..) and a pickle that names them
(`data.pkl`). The pickle is read by an unpickler to which nothing is known but tensors and lifeless stand-ins for modules.
"""

from collections import OrderedDict
from collections.abc import Callable
import io
import math
from pathlib import Path
import pickle
from typing import Any, NamedTuple
import zipfile

import ml_dtypes
import numpy as np

STORAGES = {
    "HalfStorage": np.float16,
    "BFloat16Storage": ml_dtypes.bfloat16,
    "FloatStorage": np.float32,
    "DoubleStorage": np.float64,
    "BoolStorage": np.bool_,
    "ByteStorage": np.uint8,
    "CharStorage": np.int8,
    "ShortStorage": np.int16,
    "IntStorage": np.int32,
    "LongStorage": np.int64,
}


class ForeignCode(pickle.UnpicklingError):
    """A pickle that names anything but tensors and modules."""


class Storage(NamedTuple):
    """A member of `data/`."""

    dtype: np.dtype
    key: str


class Tensor(NamedTuple):
    """Part of a storage; offset and strides in elements."""

    storage: Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


class Part:
    """A module of which only attributes are kept."""

    attributes: Any = None

    def __setstate__(self, state: Any) -> None:
        self.attributes = state


class Unpickler(pickle.Unpickler):
    """Makes `Tensor` and `Part` objects; refuses every other name."""

    def find_class(self, module: str, name: str) -> Any:
        """What stands for a name."""
        if module.split(".")[0] == "__torch__":
            return Part
        if module == "torch" and name in STORAGES:
            return np.dtype(STORAGES[name])
        known = {
            ("torch._utils", "_rebuild_tensor_v2"): lambda storage, offset, shape, strides, *_: Tensor(storage, offset, shape, strides),
            ("torch._utils", "_rebuild_parameter"): lambda tensor, *_: tensor,
            ("collections", "OrderedDict"): OrderedDict,
        }
        if module == "torch.jit._pickle":
            return lambda value, *_: value  # lists, which pickle alone would do as well
        if (module, name) not in known:
            raise ForeignCode(f"{module}.{name}")
        return known[module, name]

    def persistent_load(self, pid: Any) -> Storage:
        """A storage, given as ("storage", type, key, device, length)."""
        return Storage(pid[1], pid[2])


def recognised(path: Path) -> bool:
    """Whether a file is a TorchScript archive, by the members that torch looks for."""
    if not zipfile.is_zipfile(path):
        return False
    with zipfile.ZipFile(path) as archive:
        return any(name.endswith("/constants.pkl") for name in archive.namelist())


def tensors(archive: zipfile.ZipFile) -> dict[str, Callable[[], np.ndarray]]:
    """A function that reads it for each tensor of the archive's modules, by the name that the state dict would give it.

    Raises:
        ForeignCode: the pickle would run code; the message names it.
        Exception: of any kind; a damaged archive.
    """
    index = next(name for name in archive.namelist() if name.endswith("/data.pkl"))
    root = index.removesuffix("data.pkl")
    found: dict[str, Tensor] = {}
    _collect(Unpickler(io.BytesIO(archive.read(index))).load(), "", found)
    return {name: lambda tensor=tensor: _read(archive, root, tensor) for name, tensor in found.items()}


def _collect(part: Part, prefix: str, found: dict[str, Tensor]) -> None:
    for name, value in part.attributes.items():
        if isinstance(value, Tensor):
            found[prefix + name] = value
        elif isinstance(value, Part):
            _collect(value, f"{prefix}{name}.", found)


def _read(archive: zipfile.ZipFile, root: str, tensor: Tensor) -> np.ndarray:
    storage = np.frombuffer(archive.read(f"{root}data/{tensor.storage.key}"), tensor.storage.dtype)[tensor.offset :]
    last = sum((n - 1) * step for n, step in zip(tensor.shape, tensor.strides, strict=True))
    if min((tensor.offset, *tensor.strides, *tensor.shape)) < 0 or (math.prod(tensor.shape) and last >= storage.size):
        raise ValueError("a tensor reaches past its storage")
    strides = [step * storage.itemsize for step in tensor.strides]
    return np.lib.stride_tricks.as_strided(storage, tensor.shape, strides, writeable=False)
