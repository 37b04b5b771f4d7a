"""MoCo-v3: a plain vision transformer by other names, against timm (golden file made by
tests/oracles/golden_vit.py).
"""

from flax import nnx
import numpy as np
import pytest

from jaxdg import backbones, weights
from jaxdg.backbones import MocoV3Config, Vit
from jaxdg.conversion import mapping, mocov3
from tests.backbones.drawn import run


def wave(height, width):
    """The golden file's picture by its formula, the first of its two."""
    y, x, c = np.ogrid[0:height, 0:width, 0:3]
    return (
        np.sin(0.11 * y + 0.5 * c) * np.cos(0.07 * x - 0.9 * c) + 0.3 * np.sin(0.9 * x + 1.7 * y)
    ).astype(np.float32)[None]


@pytest.mark.parametrize("size", [(48, 112), (70, 100)], ids=lambda size: "{}x{}".format(*size))
def test_tokens_equal_timm(golden, monkeypatch, tmp_path, size):
    """Weights under the authors' names give timm's tokens after every block, at sizes that are not
    square nor those of training.
    """
    config = MocoV3Config(
        image_size=(80, 80), patch_size=16, width=24, depth=4, heads=2, taps=(0, 1, 2, 3)
    )
    monkeypatch.setitem(backbones.ZOO, "tiny", backbones.zoo.Entry(config))
    with np.load(golden / "vit_random.npz") as archive:
        source = {
            f"module.base_encoder.{n.removeprefix('weights/')}": archive[n]
            for n in archive.files
            if n.startswith("weights/")
        }
        expected = archive["tokens/{}x{}".format(*size)]
    module = nnx.eval_shape(lambda: backbones.create("tiny"))
    converted = mapping.to_flax(module, mocov3.layouts(config), list(source), source.__getitem__)
    assert converted.layout.name == "MoCo-v3"
    weights.save(converted.tensors, tmp_path / "tiny.safetensors", {})
    encoder = backbones.create("tiny", image_size=size, weights=tmp_path / "tiny.safetensors")
    assert isinstance(encoder, Vit)
    np.testing.assert_allclose(np.stack(run(encoder, wave(*size))), expected, rtol=0, atol=1e-4)


def test_the_zoo_states_the_published_encoders():
    """Sizes are the authors' base and MMSelfSup's large encoder; images are normalised with
    ImageNet's statistics.
    """
    for name, width, depth, heads in (("mocov3_b16", 768, 12, 12), ("mocov3_l16", 1024, 24, 16)):
        config = backbones.entry(name).config
        assert (config.width, config.depth, config.heads, config.patch_size, config.image_size) == (
            width,
            depth,
            heads,
            16,
            (224, 224),
        )
        np.testing.assert_allclose(255 * np.array(config.mean), (123.675, 116.28, 103.53))
        np.testing.assert_allclose(255 * np.array(config.std), (58.395, 57.12, 57.375))
