"""Every encoder of the zoo in the recipe of configs/camvid_vit_tiny.py, on real pictures, at a small size."""

import json

import numpy as np
import pytest
from rich.console import Console

from configs import camvid_vit_tiny
from jaxdg import backbones, cli, config, train
from jaxdg.backbones.encoder import StagedConfig
from tests.small_zoo import reduced

SIDE = 64  # pixels of a crop


def architectures():
    """One encoder for each that differs at a small size in more than numbers."""
    seen = {}
    for name, entry in backbones.ZOO.items():
        seen.setdefault(reduced(entry.config), name)
    return sorted(seen.values())


@pytest.mark.slow
@pytest.mark.parametrize("freeze", ["none", "all"], ids=["tuned", "frozen"])
@pytest.mark.parametrize("name", architectures())
def test_the_loss_falls(name, freeze, data_path, tmp_path, monkeypatch):
    """Twenty steps on CamVid with Mask2Former, all but sizes as in the recipe: the last five losses are below the first five."""
    small = reduced(backbones.entry(name).config)
    taps = (0, 1, 2, 3)  # four levels, of the encoder itself or of the pyramid
    assert isinstance(small, StagedConfig) or small.depth == len(taps)
    monkeypatch.setitem(backbones.ZOO, name, backbones.zoo.Entry(small))
    c = camvid_vit_tiny.get_config()
    c.steps, c.batch_size, c.log_every, c.eval_every, c.checkpoint_every = 20, 8, 1, 0, 20
    c.data.root, c.data.crop, c.evaluation.stride = str(data_path()), (SIDE, SIDE), (SIDE, SIDE)
    c.mesh.data = 8
    c.model.encoder, c.model.weights, c.model.taps, c.model.freeze = name, None, taps, freeze
    head = c.model.mask2former
    head.hidden, head.points, head.pixel_layers, head.pixel_ffn, head.ffn = 64, 512, 1, 128, 128
    train.train(config.validated(c), tmp_path, Console(quiet=True), cli.Interrupt())
    losses = [json.loads(row)["loss"] for row in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert len(losses) == 20
    assert np.mean(losses[-5:]) < np.mean(losses[:5])
