"""What `jaxdg genotype` writes is what a run reads."""

import json
from types import SimpleNamespace

from flax import nnx
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdg.commands import genotype as genotype_command
from jaxdg.config import Config
from jaxdg.detection.rcnn.genotype import discretised, resolved


class Holder(nnx.Module):
    """A module within modules of these names."""

    def __init__(self, path, leaf):
        name, _, rest = path.partition(".")
        setattr(self, name, Holder(rest, leaf) if rest else leaf)


def search(alphas, genotype=None, decoder="cell_rcnn"):
    """A trained search as the command sees it, of these alphas."""
    c = Config(task="detection")
    c.model.decoder = decoder
    c.model.cell_rcnn.genotype = genotype
    graph, *state = nnx.split(Holder(genotype_command.ALPHAS, nnx.Param(alphas)), nnx.Param, ...)
    plan = SimpleNamespace(graph=graph)
    return SimpleNamespace(
        config=c, task=lambda config: None, restore=lambda task, mesh: (plan, tuple(state), 12)
    )


def test_the_genotype_of_a_search_is_read_from_its_alphas(monkeypatch, tmp_path):
    """The weights are their softmax, and a run reads the pairs back from the file."""
    alphas = np.random.default_rng(0).normal(size=(14, 8)).astype(np.float32)
    monkeypatch.setattr(genotype_command, "opened", lambda checkpoint: search(jnp.asarray(alphas)))
    weights, step = genotype_command.searched("run")
    e = np.exp(alphas.astype(np.float64))
    np.testing.assert_allclose(weights, e / e.sum(axis=1, keepdims=True), rtol=1e-6)
    assert step == 12
    out = tmp_path / "deep" / "genotype.json"
    genotype_command.write(out, discretised(weights), step=step)
    assert resolved(str(out), "genotype") == discretised(weights)
    assert json.loads(out.read_text())["step"] == 12


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ({"decoder": "fcos"}, "run is no search: it was trained with model.decoder fcos; allowed"),
        ({"genotype": "g.json"}, "run is no search: it was trained with a genotype of its own"),
    ],
)
def test_what_is_no_search_is_refused(monkeypatch, kind, message):
    """With what it was trained with."""
    found = search(jnp.zeros((14, 8)), **kind)
    monkeypatch.setattr(genotype_command, "opened", lambda checkpoint: found)
    with pytest.raises(ValueError, match=message):
        genotype_command.searched("run")
