"""What the tests of the conversion command assert of its results."""

import copy
import functools
import os
import re

from flax import nnx
import numpy as np
import pytest

from jaxdg.conversion import mapping, models, vltseg

LONGEST = 1000  # characters: ten lines of a terminal


def find_shapes_once(patch: pytest.MonkeyPatch) -> None:
    """Finds the shapes of a name and of a layout once; for tests between which no name changes its
    meaning.
    """
    source_shapes = mapping.source_shapes
    found = {}

    def remembered(module, layout):
        key = (id(module), id(layout))
        if key not in found:
            # Both are kept, so that no other object gets their ids.
            found[key] = (module, layout, source_shapes(module, layout))
        return dict(found[key][-1])

    patch.setattr(models, "abstract", functools.cache(models.abstract))
    patch.setattr(models, "layouts", functools.cache(models.layouts))
    patch.setattr(mapping, "source_shapes", remembered)


def make_models_once(patch: pytest.MonkeyPatch) -> None:
    """Makes the model of a configuration once, and gives a copy each time; for tests between which
    no encoder's name changes its meaning.
    """
    abstract = vltseg.abstract
    made = {}

    def remembered(config):
        key = repr(config)
        if key not in made:
            made[key] = nnx.split(abstract(config))
        return nnx.merge(*copy.deepcopy(made[key]))

    patch.setattr(vltseg, "abstract", remembered)


def converted(result):
    """The file of a conversion that succeeded."""
    code, _, err, path = result
    assert (code, err) == (0, "")
    return path


def refused(result, *offenders):
    """One line on stderr, of ten in a terminal at most, that speaks of every offender; exit code 1,
    no file, also no partial one.
    """
    code, out, err, path = result
    assert (code, out) == (1, "")
    assert err.count("\n") == 1, err
    assert len(err) <= LONGEST, err
    for offender in offenders:
        assert offender in err or kinds([offender]).pop() in err, (
            offender,
            err,
        )  # where there are many of its kind
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


def kinds(names):
    """Names with a star in place of a block's number, as an error has them where there are many."""
    return {re.sub(r"(?<=[./])\d+(?=[./])|(?<=encoderblock_)\d+", "*", name) for name in names}


def refuses(main, arguments, capsys, *offenders):
    """A command prints one line on stderr that names every offender, and gives the exit code 1."""
    capsys.readouterr()
    assert main(arguments) == 1
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1), err
    for offender in offenders:
        assert offender in err, (offender, err)
