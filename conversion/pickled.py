"""Pickles of NumPy arrays, as detectron2's model zoo publishes weights, read without running what they ask for.

A pickle names the functions that are to rebuild its objects. None of those named here is called: they are replaced by stand-ins that
keep what they are given, from which arrays are made by their bytes. Any other name refuses the file.
"""

from collections import OrderedDict
import pickle
from typing import Any, BinaryIO

import numpy as np

from conversion.torchscript import ForeignCode


class Dtype:
    """Stands for a `numpy.dtype`: a code such as f4, and the order of its bytes."""

    def __init__(self, code: str, *_: Any):
        self.code, self.order = code, "="

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
    """Stands for a `numpy.ndarray` as it is first pickled: without content, which follows as its state."""

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
        return np.frombuffer(content, dtype.numpy()).reshape(shape, order="F" if fortran else "C")


class Unpickler(pickle.Unpickler):
    """Makes plain containers, `Array` and `Dtype`; refuses every other name."""

    def find_class(self, module: str, name: str) -> Any:
        """What stands for a name."""
        module = module.replace("numpy._core.", "numpy.core.")  # NumPy 2's name
        known = {
            ("numpy", "dtype"): Dtype,
            ("numpy", "ndarray"): Array,
            ("numpy.core.multiarray", "_reconstruct"): lambda *_: Array(),
            ("numpy.core.multiarray", "scalar"): lambda dtype, content: _array((), dtype, False, content),
            ("numpy.core.numeric", "_frombuffer"): lambda content, dtype, shape, order: _array(shape, dtype, order == "F", content),
            ("collections", "OrderedDict"): OrderedDict,
            ("_codecs", "encode"): lambda text, _: text.encode("latin1"),  # how old protocols hold bytes,
            ("__builtin__", "bytes"): lambda: b"",  # and none
        }
        if (module, name) not in known:
            raise ForeignCode(f"{module}.{name}")
        return known[module, name]


def _array(shape: tuple, dtype: Dtype, fortran: bool, content: bytes) -> Array:
    array = Array()
    array.state = (1, shape, dtype, fortran, content)
    return array


def content(file: BinaryIO) -> Any:
    """What a pickle holds, its arrays as `Array`.

    Raises:
        ForeignCode: the pickle would run code; the message names it.
        Exception: of any kind; a damaged pickle.
    """
    return Unpickler(file).load()
