"""Pickles of tensors, as torch and detectron2 save them, read without running what they ask for.

A pickle names the functions that are to rebuild its objects. None of them is called. Tensors of
torch and arrays of NumPy become descriptions of their bytes, containers stay containers, and
everything else that lies beside the tensors (settings, logs, dates, paths, whole modules) becomes a
`Passed`: a stand-in that takes whatever it is given and does nothing. A pickle that asks for a
command, a file or a program is refused by name.
"""

from collections import OrderedDict
import io
import pickle
import re
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

TYPES: dict[str, Any] = {  # torch's names
    "float64": np.float64,
    "double": np.float64,
    "float32": np.float32,
    "float": np.float32,
    "float16": np.float16,
    "half": np.float16,
    "bfloat16": ml_dtypes.bfloat16,
    "float8_e4m3fn": ml_dtypes.float8_e4m3fn,
    "float8_e4m3fnuz": ml_dtypes.float8_e4m3fnuz,
    "float8_e5m2": ml_dtypes.float8_e5m2,
    "float8_e5m2fnuz": ml_dtypes.float8_e5m2fnuz,
    "bool": np.bool_,
    "uint8": np.uint8,
    "byte": np.uint8,
    "int8": np.int8,
    "char": np.int8,
    "int16": np.int16,
    "short": np.int16,
    "int32": np.int32,
    "int": np.int32,
    "int64": np.int64,
    "long": np.int64,
}
# No honest checkpoint asks for these. They would not run here either, but whoever made such a file
# means harm.
MODULES = re.compile(
    r"(os|posix|nt|subprocess|sys|shutil|socket|ctypes|importlib|runpy|pty|code|codeop|commands|webbrowser|tempfile|multiprocessing|asyncio"
    r"|threading|signal|pickle|marshal|dill|cloudpickle|pip|http|urllib|requests)(\.|$)"
)
FUNCTIONS = re.compile(
    r"(.*\.)?(eval|exec|execfile|compile|open|__import__|input|breakpoint|system|popen|load|loads|fromfile|memmap)"
)


class ForeignCode(pickle.UnpicklingError):
    """A pickle that asks for a command, a file or a program."""


class Unread(ValueError):
    """A tensor of a kind that is not read, in a file that is whole."""


class Storage(NamedTuple):
    """A run of numbers in a file of torch: their type, None for bytes of any, the name of the run,
    and where in it this one begins.
    """

    dtype: Any
    key: str
    offset: int = 0


class Tensor(NamedTuple):
    """Part of a storage; offset and strides in elements.

    Of a kind that is not read, only its name is known, in place of the type.
    """

    storage: Storage
    dtype: Any
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


class Dtype:
    """Stands for a `numpy.dtype`: a code such as f4, and the order of its bytes."""

    def __init__(self, code: str, *_: Any):
        self.code = code
        self.order = "="

    def __setstate__(self, state: tuple) -> None:
        self.order = state[1]

    def numpy(self) -> np.dtype:
        """The type, of plain numbers.

        Raises:
            ValueError: another one, such as that of objects.
        """
        if self.code[:1] not in ("f", "i", "u", "b"):
            raise ValueError(f"an array of {self.code}, not of numbers")
        return np.dtype(self.order.replace("|", "=") + self.code)


class Array:
    """Stands for a `numpy.ndarray` as it is first pickled: without content, which follows as its
    state.
    """

    def __init__(self, *_: Any):
        self.state: tuple = ()

    def __setstate__(self, state: tuple) -> None:
        self.state = state

    def numpy(self) -> np.ndarray:
        """The array.

        Raises:
            ValueError: a state that makes none.
        """
        _, shape, dtype, fortran, content = self.state
        if isinstance(content, str):  # of Python 2
            content = content.encode("latin1")
        return np.frombuffer(content, dtype.numpy()).reshape(shape, order="F" if fortran else "C")


class Passed(dict):
    """Stands for a foreign object: takes whatever it is given and does nothing.

    What it is given as a mapping can be looked at.
    """

    name = "an object"
    module = False  # of torch, with parameters

    def __init__(self, *_: Any, **__: Any):
        super().__init__()

    def __setstate__(self, state: Any) -> None:
        if isinstance(state, dict) and state.keys() >= {"_parameters", "_modules"}:
            self.module = True

    def __call__(self, *_: Any, **__: Any) -> "Passed":
        return self

    def __hash__(self) -> int:
        return id(self)

    def __eq__(self, other: Any) -> bool:
        return self is other

    def append(self, _: Any) -> None:
        """Passes over an item, as of a list."""

    extend = add = append


class Part:
    """A module of a TorchScript archive, of which only attributes are kept."""

    attributes: Any = None

    def __setstate__(self, state: Any) -> None:
        self.attributes = state


def _array(shape: Any, dtype: Any, fortran: bool, content: Any) -> Array:
    array = Array()
    array.state = (1, shape, dtype, fortran, content)
    return array


def _tensor(storage: Any, offset: int, shape: Any, strides: Any, *_: Any) -> Tensor:
    return Tensor(storage, storage.dtype, offset, tuple(shape), tuple(strides))


def _tensor_of_type(
    storage: Any, offset: int, shape: Any, strides: Any, grad: Any, hooks: Any, dtype: Any, *_: Any
) -> Tensor:
    return Tensor(storage, dtype, offset, tuple(shape), tuple(strides))


def _first(value: Any, *_: Any) -> Any:
    return value


KNOWN: dict[tuple[str, str], Any] = {
    ("numpy", "dtype"): Dtype,
    ("numpy", "ndarray"): Array,
    ("numpy.core.multiarray", "_reconstruct"): lambda *_: Array(),
    ("numpy.core.multiarray", "scalar"): lambda dtype, content=b"", *_: _array(
        (), dtype, False, content
    ),
    ("numpy.core.numeric", "_frombuffer"): lambda content, dtype, shape, order: _array(
        shape, dtype, order == "F", content
    ),
    ("collections", "OrderedDict"): OrderedDict,
    ("_codecs", "encode"): lambda text, _: text.encode("latin1"),  # how old protocols hold bytes,
    ("builtins", "bytes"): lambda: b"",  # and none
    ("__builtin__", "bytes"): lambda: b"",
    ("torch", "Size"): tuple,
    ("torch._utils", "_rebuild_tensor"): _tensor,
    ("torch._utils", "_rebuild_tensor_v2"): _tensor,
    ("torch._utils", "_rebuild_tensor_v3"): _tensor_of_type,
    ("torch._utils", "_rebuild_parameter"): _first,
    ("torch._utils", "_rebuild_parameter_with_state"): _first,
    ("torch._utils", "_rebuild_device_tensor_from_numpy"): _first,
    ("torch._tensor", "_rebuild_from_type_v2"): lambda function, kind, arguments, *_: function(
        *arguments
    ),
}


class Unpickler(pickle.Unpickler):
    """Makes plain containers and the stand-ins of this module."""

    def find_class(self, module: str, name: str) -> Any:
        """What stands for a name.

        Raises:
            ForeignCode: a name that no honest checkpoint asks for.
        """
        module = module.replace("numpy._core.", "numpy.core.")  # NumPy 2's name
        if (module, name) in KNOWN:
            return KNOWN[module, name]
        if module in ("torch", "torch.cuda", "torch.storage") and name.endswith("Storage"):
            return TYPES.get(name.removesuffix("Storage").lower())  # none for UntypedStorage
        if module == "torch" and name in TYPES:
            return np.dtype(TYPES[name])
        if module == "torch._utils" and name.startswith(
            "_rebuild_"
        ):  # sparse, quantised, without numbers
            return lambda *_: Tensor(Storage(None, ""), name.removeprefix("_rebuild_"), 0, (), ())
        if module.split(".")[0] == "__torch__":
            return Part
        if module == "torch.jit._pickle":
            return _first  # lists, which pickle alone would do as well
        if MODULES.match(module) or FUNCTIONS.fullmatch(name):
            raise ForeignCode(f"{module}.{name}")
        return type("Passed", (Passed,), {"name": f"{module}.{name}"})

    def persistent_load(self, pid: Any) -> Any:
        """A storage, given as ("storage", type, key, device, length) or, in old files, with the
        part of another one that it is.
        """
        if pid[0] == "module":  # a class with its source, beside an old whole module
            return pid[1]
        dtype = pid[1]
        key = pid[2]
        view = pid[5] if len(pid) > 5 else None
        return Storage(np.dtype(dtype) if dtype else None, str(key), view[1] if view else 0)


def content(file: io.BufferedIOBase) -> Any:
    """What a pickle holds, its tensors as `Tensor` or `Array`.

    Raises:
        ForeignCode: the pickle would run code; the message names it.
        Exception: of any kind; a damaged pickle.
    """
    return Unpickler(file, encoding="latin1").load()
