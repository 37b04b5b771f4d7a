"""What the tests of the conversion command assert of its results."""

import os

import numpy as np


def converted(result):
    """The file of a conversion that succeeded."""
    code, _, err, path = result
    assert (code, err) == (0, "")
    return path


def refused(result, *offenders):
    """One line on stderr that names every offender, exit code 1, no file, also no partial one."""
    code, out, err, path = result
    assert (code, out) == (1, "")
    assert err.count("\n") == 1, err
    for offender in offenders:
        assert offender in err, (offender, err)
    assert not path.exists()
    assert not list(path.parent.glob("*.partial"))
    return err


def assert_identical(got, want):
    """Two mappings of tensors: the same names, types and bits."""
    assert got.keys() == want.keys()
    for name, tensor in want.items():
        assert got[name].dtype == tensor.dtype, name
        np.testing.assert_array_equal(got[name], tensor, err_msg=name)


class Evil:
    """Unpickling it would make a folder."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)
