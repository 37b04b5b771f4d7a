"""Files as torch writes them, made without torch, for tests of what is read without it."""

from collections import OrderedDict
import io
import pickle
import zipfile

import numpy as np

HERE = __name__.encode()


class FloatStorage:
    """Has the name of torch's."""


def _rebuild_tensor_v2(*_):
    raise AssertionError("nothing that a file names may be called")


class Storage:
    """Numbers that the pickle names and the archive holds."""

    def __init__(self, key, size):
        self.key = key
        self.size = size


class Pickler(pickle.Pickler):
    """Pickles float32 arrays as torch does its tensors, with their numbers beside."""

    def __init__(self, file):
        super().__init__(file, protocol=2)
        self.storages = {}

    def persistent_id(self, obj):
        if isinstance(obj, Storage):
            return ("storage", FloatStorage, obj.key, "cpu", obj.size)
        return None

    def reducer_override(self, obj):
        if isinstance(obj, np.ndarray) and obj.dtype == np.float32:
            key = str(len(self.storages))
            self.storages[key] = np.ascontiguousarray(obj).tobytes()
            strides = tuple(step // 4 for step in np.asarray(obj, order="C").strides)
            return _rebuild_tensor_v2, (
                Storage(key, obj.size),
                0,
                obj.shape,
                strides,
                False,
                OrderedDict(),
            )
        return NotImplemented


def torch_file(path, content):
    """Writes what `torch.save` would, float32 arrays of `content` being tensors."""
    buffer = io.BytesIO()
    pickler = Pickler(buffer)
    pickler.dump(content)
    pickled = buffer.getvalue()
    for module, name in ((b"torch._utils", b"_rebuild_tensor_v2"), (b"torch", b"FloatStorage")):
        pickled = pickled.replace(b"c" + HERE + b"\n" + name, b"c" + module + b"\n" + name)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", pickled)
        archive.writestr("archive/byteorder", "little")
        for key, numbers in pickler.storages.items():
            archive.writestr(f"archive/data/{key}", numbers)
    return path
