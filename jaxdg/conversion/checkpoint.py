"""Published checkpoint files, read tensor by tensor with NumPy alone: `.safetensors`, `.npz`,
torch's `.pth`, `.pth.tar`, `.pt`, `.ckpt` and `.bin`, detectron2's `.pkl`, and models in several
files (shards) with their index.

Nothing here runs code that a file holds: see `pickled`, `torchfile`.
"""

from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
import contextlib
import functools
import json
import os
from pathlib import Path
import re
from typing import Any, NamedTuple
import zipfile
import zlib

import ml_dtypes  # noqa: F401  its import teaches NumPy, and so safetensors, the type bfloat16
import numpy as np
from safetensors import SafetensorError, safe_open

from jaxdg import files, weights
from jaxdg.conversion import kinds, pickled, sets, torchfile

TORCH = (".pth", ".pt", ".bin")  # written by torch
SUFFIXES = (".safetensors", ".npz", *TORCH)  # that can be written
READ = (*SUFFIXES, ".ckpt", ".pkl")
INDEX = ".index.json"
SHARD = re.compile(r"(.+)-\d{5}-of-\d{5}(\.\w+)")
WHOLE = (
    "model.safetensors",
    "pytorch_model.bin",
    "diffusion_pytorch_model.safetensors",
    "open_clip_model.safetensors",
    "diffusion_pytorch_model.bin",
    "model.fp16.safetensors",
    "diffusion_pytorch_model.fp16.safetensors",
)  # of a folder
PARTS = ("unet", "vae", "text_encoder")  # folders of a diffusion model
BROKEN = (
    SafetensorError,
    zipfile.BadZipFile,
    zlib.error,
    EOFError,
    OSError,
    KeyError,
    TypeError,
    ValueError,
)


class Checkpoint(NamedTuple):
    """An open file.

    Attributes:
        names: of its tensors.
        read: gives the tensor of a name.
        kind: whether they are an average (`sets.EMA`) or as trained (`sets.RAW`), where the file
            tells.
        notes: for reports: which of its dictionaries was taken, what lies beside it.
        files: that hold it.
        about: metadata.
        scripted: whether it is an archive of TorchScript, as OpenAI publishes CLIP, which tells an
            activation that the tensors do not.
        wanted: which set of weights was asked for, where there may be several behind different
            prefixes.
        was: what the file calls a tensor, by the name that it has here, where names were changed.
        outside: names of the file that are no part of the model, with the reason.
    """

    names: list[str]
    read: Callable[[str], np.ndarray]
    kind: str | None = None
    notes: tuple[str, ...] = ()
    files: tuple[Path, ...] = ()
    about: Mapping[str, str] = {}
    scripted: bool = False
    wanted: str | None = None
    was: Mapping[str, str] = {}
    outside: Mapping[str, str] = {}

    def config(self) -> dict[str, Any]:
        """What the config.json of transformers beside the file says, if there is one and it can be
        read.
        """
        path = self.files[0].with_name("config.json") if self.files else None
        if path is None or not path.is_file():
            return {}
        with contextlib.suppress(ValueError, OSError):
            content = json.loads(path.read_text())
            return content if isinstance(content, dict) else {}
        return {}

    def digest(self) -> str:
        """The sha256 of the file; of several one a file, as JSON."""
        folder = os.path.commonpath([path.parent for path in self.files]) if self.files else ""
        found = {path.relative_to(folder).as_posix(): files.sha256(path) for path in self.files}
        return json.dumps(found) if len(found) > 1 else next(iter(found.values()), "")


@contextlib.contextmanager
def opened(path: str | Path, wanted: str | None = None) -> Iterator[Checkpoint]:
    """Opens a checkpoint for reading.

    Args:
        path: a file, the index of a model in several files, one of these, or a folder that holds a
            model as it is downloaded; also a diffusion model's, whose tensors are then called
            by the folder that they are in: `unet.`, `vae.`, `text_encoder.`.
        wanted: of several sets of weights in a file, "ema", "raw" or the keys that lead to one.

    Raises:
        FileNotFoundError: no such file.
        ValueError: a kind of file that is not read, a damaged file, one that would run code of its
            own, or one of several sets of weights of which none was chosen; also while reading.
    """
    path = Path(path)
    with contextlib.ExitStack() as stack:
        parts = (path / PARTS[0]).is_dir()
        yield _parts(path, wanted, stack) if parts else _model(path, wanted, stack)


def _parts(folder: Path, wanted: str | None, stack: contextlib.ExitStack) -> Checkpoint:
    """The diffusion model whose folder is given."""
    if missing := [name for name in PARTS if not (folder / name).is_dir()]:
        raise FileNotFoundError(
            f"{folder} holds a diffusion model without {' and '.join(missing)}; download that too"
        )
    parts = {name: _model(folder / name, wanted, stack) for name in PARTS}
    read = {
        f"{part}.{name}": functools.partial(file.read, name)
        for part, file in parts.items()
        for name in file.names
    }
    return Checkpoint(
        list(read),
        lambda name: read[name](),
        notes=(f"read from the folders {', '.join(PARTS)}",),
        files=tuple(path for file in parts.values() for path in file.files),
        wanted=wanted,
    )


def _model(path: Path, wanted: str | None, stack: contextlib.ExitStack) -> Checkpoint:
    """The model of a path; see `opened`."""
    path = _file(path)
    if path.name.endswith(INDEX):
        return _shards(path, wanted, stack)
    if match := SHARD.fullmatch(path.name):
        index = path.with_name(f"{match[1]}{match[2]}{INDEX}")
        if not index.is_file():
            raise ValueError(
                f"{path} is one of several files of a model; put all and {index.name} into its"
                " folder and give that index"
            )
        return _shards(index, wanted, stack)
    return _one(path, wanted, stack)


def _file(path: Path) -> Path:
    """The file that is meant by a path, which may be a folder."""
    if path.is_dir():
        there = [
            path / name
            for whole in WHOLE
            for name in (whole, whole + INDEX)
            if (path / name).is_file()
        ]
        if not there:
            raise FileNotFoundError(
                f"{path} is a folder without {' or '.join(WHOLE[:2])} or an index of several; give"
                " the file itself"
            )
        return there[0]
    if not path.is_file():
        raise FileNotFoundError(f"no checkpoint at {path}; give the file that was downloaded")
    return path


def _shards(index: Path, wanted: str | None, stack: contextlib.ExitStack) -> Checkpoint:
    """The model of several files whose index is given."""
    try:
        places = dict(json.loads(index.read_text())["weight_map"])
        files = {name: index.parent / name for name in dict.fromkeys(places.values())}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{index} is no index of a model in several files (no weight_map in it); download it"
            " again"
        ) from error
    if outside := [name for name in files if Path(name).name != name]:
        raise ValueError(
            f"{index} names files outside of its folder ({sets.shortened(outside)}); this is no"
            " index of a published model"
        )
    if missing := [name for name, file in files.items() if not file.is_file()]:
        raise FileNotFoundError(
            f"{index} names {len(files)} files, and {len(missing)} of them are not beside it:"
            f" {sets.shortened(missing)}; download them too"
        )
    shards = {name: _one(file, wanted, stack) for name, file in files.items()}
    held = {tensor: name for name, shard in shards.items() for tensor in shard.names}
    wrong = sorted(
        {tensor for tensor, name in places.items() if tensor not in shards[name].names}
        | (held.keys() - places.keys())
    )
    if wrong or len(held) < sum(len(shard.names) for shard in shards.values()):
        raise ValueError(
            f"{index} and its files do not agree on {len(wrong)} tensors ({sets.shortened(wrong)}):"
            " they are of different versions, or one is damaged; download all again"
        )
    notes = f"read from {len(files)} files by {index.name}"

    def read(name):
        return shards[places[name]].read(name)

    return Checkpoint(
        list(places), read, notes=(notes,), files=(index, *files.values()), wanted=wanted
    )


def _one(path: Path, wanted: str | None, stack: contextlib.ExitStack) -> Checkpoint:
    """The model of one file."""
    if why := kinds.foreign(path):
        raise ValueError(f"{path} {why}")
    suffix = ".pth" if path.name.endswith(".pth.tar") else path.suffix
    if suffix not in READ:
        raise ValueError(
            f"{path} is of no kind that is read ({' '.join(READ)} .pth.tar); convert or rename it"
        )
    inside = torchfile.members(path)
    try:
        if any(name.endswith("data.pkl") for name in inside) or suffix in (*TORCH, ".ckpt"):
            content, get = torchfile.opened(path, stack)
        elif suffix == ".pkl":
            with path.open("rb") as file:
                content = pickled.content(file)
                get = None
        elif suffix == ".npz":
            if not inside:  # NumPy would take it for a pickle
                raise zipfile.BadZipFile("no zip archive")
            archive = stack.enter_context(np.load(path, allow_pickle=False))
            return Checkpoint(
                list(archive.files), _told(path, archive.__getitem__), files=(path,), wanted=wanted
            )
        else:
            file = stack.enter_context(safe_open(path, framework="numpy"))
            return Checkpoint(
                list(file.keys()),
                _told(path, lambda name: _numbers(file, name)),
                files=(path,),
                about=file.metadata() or {},
                wanted=wanted,
            )
    except pickled.ForeignCode as error:
        raise _pickled_code(path, str(error)) from error
    except Exception as error:  # an unpickler fails in every way on damaged bytes
        raise _broken(path, error) from error
    taken = sets.choose(path, content, wanted)

    def made(name: str) -> np.ndarray:
        tensor = taken.tensors[name]
        if isinstance(tensor, pickled.Array):
            return tensor.numpy()
        if get is None:
            raise ValueError("a tensor of torch without its numbers")
        return get(tensor)

    return Checkpoint(
        list(taken.tensors),
        _told(path, made),
        taken.kind,
        taken.notes,
        (path,),
        scripted=torchfile.scripted(inside),
        wanted=taken.wanted,
    )


def _numbers(file: Any, name: str) -> np.ndarray:
    """A tensor of a safetensors file."""
    kind = file.get_slice(name).get_dtype()
    if kind.startswith(("F8_", "F6_", "F4")):
        raise pickled.Unread(f"numbers of 8 bits or fewer, {kind}, which need scales")
    return file.get_tensor(name)


def _told(path: Path, read: Callable[[str], np.ndarray]) -> Callable[[str], np.ndarray]:
    """The same, but an error names the file and the tensor."""

    def told(name: str) -> np.ndarray:
        try:
            return read(name)
        except pickled.Unread as error:
            raise ValueError(
                f"{path} holds, at {name}, {error}; take the file of float16, bfloat16 or float32"
            ) from error
        except Exception as error:  # what describes a tensor is whatever the file says
            raise _broken(path, error, name) from error

    return told


def save(
    tensors: Mapping[str, np.ndarray],
    path: str | Path,
    about: Mapping[str, Any],
    versions: Mapping[str, int] | None = None,
) -> None:
    """Writes tensors in the kind of file that the suffix of `path` says, whole or not at all; only
    `.safetensors` holds `about`.

    Args:
        tensors: by the publisher's names.
        path: the file.
        about: metadata.
        versions: of modules, as torch's `state_dict` notes them beside its tensors; only torch's
            files hold them.

    Raises:
        OSError: it cannot be written; what was there before is untouched.
        ValueError: the file needs torch, which is not installed.
    """
    path = Path(path)
    if path.suffix == ".safetensors":
        return weights.save(
            tensors, path, {**about, "format": "pt"}
        )  # "pt" is what readers in torch look for
    torch = import_torch(path) if path.suffix in TORCH else None
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    try:
        with partial.open("wb") as file:
            if torch is None:
                np.savez(file, allow_pickle=False, **tensors)
            else:
                state = OrderedDict(
                    (name, torch.from_numpy(tensor)) for name, tensor in tensors.items()
                )
                if versions:
                    state.__dict__["_metadata"] = OrderedDict(
                        (module, {"version": number}) for module, number in versions.items()
                    )
                torch.save(state, file)
        os.replace(partial, path)
    except (OSError, RuntimeError) as error:  # torch raises RuntimeError on a full disk
        raise OSError(
            f"cannot write {path} ({error}); free some space or choose another folder"
        ) from error
    finally:
        partial.unlink(missing_ok=True)


def import_torch(path: Path):
    """The module torch, or one line on how to get it."""
    try:
        import torch  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise ValueError(
            f'{path.name} needs torch, which is not installed: pip install -e ".[convert]", or use'
            " a .safetensors file"
        ) from error
    return torch


def _pickled_code(path: Path, name: str) -> ValueError:
    return ValueError(
        f"{path} is refused: it holds pickled code ({name}) beside its tensors, and loading it"
        " could run anything on this machine; save its state_dict() alone where you trust it, then"
        " convert that"
    )


def _broken(path: Path, error: Exception, name: str = "") -> ValueError:
    at = f" at {name}" if name else ""
    reason = " ".join(str(error).split())[:200] or type(error).__name__
    if "allow_pickle" in reason:
        return ValueError(
            f"{path} is refused: it holds pickled code{at}, and loading it could run anything on"
            " this machine"
        )
    return ValueError(
        f"{path} cannot be read{at} ({reason}): damaged, cut short or another kind of file;"
        " download it again"
    )
