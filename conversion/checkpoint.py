"""Published checkpoint files, read tensor by tensor: `.safetensors`, `.npz` and `.pkl` with NumPy alone, `.pth`, `.pth.tar`, `.pt` and
`.bin` by torch.

Nothing here runs code that a file holds: torch unpickles tensors only, beside stand-ins for the logs that mmengine saves with them, NumPy
unpickles nothing, of a TorchScript archive (OpenAI's CLIP) only the tensors are read, without torch, and of a pickle (detectron2's model
zoo) only arrays of numbers.
"""

from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
import contextlib
import os
from pathlib import Path
import pickle
import re
from typing import Any, NamedTuple
import zipfile
import zlib

import ml_dtypes  # noqa: F401  its import teaches NumPy, and so safetensors, the type bfloat16
import numpy as np
from safetensors import SafetensorError, safe_open

from conversion import pickled, torchscript
from jaxdg import weights

TORCH = (".pth", ".pt", ".bin")
SUFFIXES = (".safetensors", ".npz", *TORCH)
# Of what mmengine saves of a run beside its tensors (logs, seeds, settings), replaced by stand-ins; other names refuse a file.
PASSED_OVER = r"(mmengine|numpy)\.|builtins\.getattr$"
BROKEN = (SafetensorError, zipfile.BadZipFile, zlib.error, EOFError, OSError, KeyError, TypeError, ValueError)


class Checkpoint(NamedTuple):
    """An open file: the names of its tensors, and a function that reads the one of a name."""

    names: list[str]
    read: Callable[[str], np.ndarray]


@contextlib.contextmanager
def opened(path: str | Path) -> Iterator[Checkpoint]:
    """Opens a checkpoint for reading.

    Raises:
        FileNotFoundError: no such file.
        ValueError: a kind of file that is not read, a damaged file, or one that would run code of its own; also while reading.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no checkpoint at {path}; give the file that was downloaded")
    suffix = ".pth" if path.name.endswith(".pth.tar") else path.suffix
    if suffix in TORCH and torchscript.recognised(path):
        with _torchscript(path) as file:
            yield file
        return
    if suffix in TORCH:
        tensors = _torch_tensors(path)
        yield Checkpoint(list(tensors), lambda name: _from_torch(tensors[name]))
        return
    if suffix == ".pkl":
        arrays = _pickled_arrays(path)
        yield Checkpoint(list(arrays), lambda name: _from_pickle(path, name, arrays[name]))
        return
    if suffix not in SUFFIXES:
        raise ValueError(f"{path} is of no kind that is read ({' '.join(SUFFIXES)} .pth.tar .pkl); convert or rename it")
    with contextlib.ExitStack() as stack:
        try:
            if suffix == ".npz":
                if not zipfile.is_zipfile(path):  # NumPy would take it for a pickle
                    raise zipfile.BadZipFile("no zip archive")
                archive = stack.enter_context(np.load(path, allow_pickle=False))
                names, get = list(archive.files), archive.__getitem__
            else:
                file = stack.enter_context(safe_open(path, framework="numpy"))
                names, get = list(file.keys()), file.get_tensor
        except BROKEN as error:
            raise _broken(path, error) from error

        def read(name: str) -> np.ndarray:
            try:
                return get(name)
            except BROKEN as error:
                raise _broken(path, error, name) from error

        yield Checkpoint(names, read)


def save(tensors: Mapping[str, np.ndarray], path: str | Path, about: Mapping[str, Any], versions: Mapping[str, int] | None = None) -> None:
    """Writes tensors in the kind of file that the suffix of `path` says, whole or not at all; only `.safetensors` holds `about`.

    Args:
        tensors: by the publisher's names.
        path: the file.
        about: metadata.
        versions: of modules, as torch's `state_dict` notes them beside its tensors; only torch's files hold them.

    Raises:
        OSError: it cannot be written; what was there before is untouched.
        ValueError: the file needs torch, which is not installed.
    """
    path = Path(path)
    if path.suffix == ".safetensors":
        return weights.save(tensors, path, {**about, "format": "pt"})  # "pt" is what readers in torch look for
    torch = import_torch(path) if path.suffix in TORCH else None
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    try:
        with partial.open("wb") as file:
            if torch is None:
                np.savez(file, allow_pickle=False, **tensors)
            else:
                state = OrderedDict((name, torch.from_numpy(tensor)) for name, tensor in tensors.items())
                if versions:
                    state.__dict__["_metadata"] = OrderedDict((module, {"version": number}) for module, number in versions.items())
                torch.save(state, file)
        os.replace(partial, path)
    except (OSError, RuntimeError) as error:  # torch raises RuntimeError on a full disk
        raise OSError(f"cannot write {path} ({error}); free some space or choose another folder") from error
    finally:
        partial.unlink(missing_ok=True)


def import_torch(path: Path):
    """The module torch, or one line on how to get it."""
    try:
        import torch  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise ValueError(
            f'{path.name} needs torch, which is not installed: pip install -e ".[convert]", or use a .safetensors file'
        ) from error
    return torch


@contextlib.contextmanager
def _torchscript(path: Path) -> Iterator[Checkpoint]:
    """The tensors of a TorchScript archive, whose program is not run."""
    with zipfile.ZipFile(path) as archive:
        try:
            tensors = torchscript.tensors(archive)
        except torchscript.ForeignCode as error:
            raise _pickled_code(path, str(error)) from error
        except Exception as error:  # an unpickler fails in every way on damaged bytes
            raise _broken(path, error) from error

        def read(name: str) -> np.ndarray:
            try:
                return tensors[name]()
            except BROKEN as error:
                raise _broken(path, error, name) from error

        yield Checkpoint(list(tensors), read)


class Passed:
    """Stands for a foreign object beside the tensors; takes whatever it is given and does nothing."""

    def __new__(cls, *_: Any) -> "Passed":
        return super().__new__(cls)

    def __init__(self, *_: Any):
        pass

    def __setstate__(self, state: Any) -> None:
        pass


def _torch_tensors(path: Path) -> dict[str, Any]:
    """The state dict of a torch file, also one level down."""
    torch = import_torch(path)
    passed: list[Any] = []  # stand-ins with the names they are for
    while True:
        try:
            # Tensors stay in the file until they are read; the legacy format, no zip archive, cannot do that.
            with torch.serialization.safe_globals(passed):
                content = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
        except (pickle.UnpicklingError, RuntimeError, *BROKEN) as error:
            code = re.search(r"GLOBAL (\S+)", str(error))
            if not code:
                raise _broken(path, error) from error
            name = code[1] if "." in code[1] else f"builtins.{code[1]}"  # torch tells the first name that it does not know
            if not re.match(PASSED_OVER, name) or (Passed, name) in passed:
                raise _pickled_code(path, code[1]) from error
            passed.append((Passed, name))
        else:
            return _state_dict(path, content, torch.Tensor)


def _pickled_arrays(path: Path) -> dict[str, pickled.Array]:
    """The arrays of a pickle, also one level down."""
    try:
        with path.open("rb") as file:
            content = pickled.content(file)
    except pickled.ForeignCode as error:
        raise _pickled_code(path, str(error)) from error
    except Exception as error:  # an unpickler fails in every way on damaged bytes
        raise _broken(path, error) from error
    return _state_dict(path, content, pickled.Array)


def _from_pickle(path: Path, name: str, array: pickled.Array) -> np.ndarray:
    try:
        return array.numpy()
    except Exception as error:  # its state is whatever the file says
        raise _broken(path, error, name) from error


def _state_dict(path: Path, content: Any, kind: type) -> dict[str, Any]:
    """The tensors by name in `content` or one level down under "model", "module" or "state_dict"."""
    if isinstance(content, dict):
        content = next((content[key] for key in ("model", "module", "state_dict") if isinstance(content.get(key), dict)), content)
    if not isinstance(content, dict) or not content:
        raise ValueError(f"{path} holds a {type(content).__name__}, no state dict; save the model's state_dict() and convert that")
    odd = [str(key) for key, value in content.items() if not (isinstance(key, str) and isinstance(value, kind))]
    if odd:
        raise ValueError(f"{path} holds no plain state dict, also not under model, module or state_dict: no tensors are {', '.join(odd)}")
    return content


def _from_torch(tensor: Any) -> np.ndarray:
    tensor = tensor.detach()
    return (tensor.float() if tensor.is_floating_point() else tensor).numpy()


def _pickled_code(path: Path, name: str) -> ValueError:
    return ValueError(
        f"{path} is refused: it holds pickled code ({name}) beside its tensors, and loading it could run anything on this "
        "machine; save its state_dict() alone where you trust it, then convert that"
    )


def _broken(path: Path, error: Exception, name: str = "") -> ValueError:
    at = f" at {name}" if name else ""
    reason = " ".join(str(error).split()) or type(error).__name__
    if "allow_pickle" in reason:
        return ValueError(f"{path} is refused: it holds pickled code{at}, and loading it could run anything on this machine")
    # torch surrounds its reason with advice to unpickle all the same, which is no advice to pass on.
    reason = re.sub(r"Weights only load failed.*?error: | (passed to \W*torch|Check the documentation).*", "", reason)[:200]
    return ValueError(f"{path} cannot be read{at} ({reason}): damaged, cut short or another kind of file; download it again")
