"""Another patch size than that of the pre-training: kernels resized as timm and torch do it
(tests/oracles/golden_patch.py), and a whole run.
"""

import dataclasses

from flax import nnx
import jax
import numpy as np
import pytest

import jaxdg
from jaxdg import backbones, config, train, weights
from jaxdg.backbones import resizing
from jaxdg.commands import command_line as cli
from jaxdg.tasks import run_state as tasks
from jaxdg.training import sharding
from tests.backbones.drawn import drawn, run


def small(name, **fields):
    """The architecture of a zoo's encoder, narrow and shallow."""
    sizes = dict(image_size=(56, 56), patch_size=14, width=24, depth=2, heads=2, taps=(0, 1))
    return dataclasses.replace(backbones.entry(name).config, **sizes | fields)


@pytest.fixture
def stored(tmp_path, monkeypatch):
    """`stored(config)` puts an encoder into the zoo as `small` and gives a file of drawn weights
    for it.
    """

    def make(encoder):
        monkeypatch.setitem(backbones.ZOO, "small", backbones.zoo.Entry(encoder))
        shapes = weights.shapes(nnx.eval_shape(lambda: backbones.create("small")))
        path = tmp_path / "small.safetensors"
        about = (
            {"activation": encoder.activation}
            if isinstance(encoder, backbones.ClipVitConfig)
            else {}
        )
        weights.save({name: drawn(name, shape) for name, shape in shapes.items()}, path, about)
        return path

    return make


@pytest.mark.parametrize("method", resizing.PATCH_RESIZES)
def test_kernels_equal_timms_and_torchs(golden, method):
    """Enlarged and shrunk: FlexiViT's resize as timm's with big_vision's interpolation, the other
    as torch's plain bicubic.
    """
    with np.load(golden / "patch.npz") as archive:
        names = [name for name in archive.files if name.startswith(method)]
        assert {f"{method}/14to16", f"{method}/16to14"} <= set(names)
        for name in names:
            source, target = map(int, name.split("/")[1].split("to"))
            kernel = drawn("patch_embed.proj.weight", (4, 3, source, source)).transpose(2, 3, 1, 0)
            got = resizing.resize_patch(kernel, target, method)
            np.testing.assert_allclose(
                got, archive[name].transpose(2, 3, 1, 0), rtol=0, atol=1e-6, err_msg=name
            )


def bilinear(x, size):
    """Square patches [n, p, p, c] enlarged, pixel by pixel from its four neighbours, borders
    repeated.
    """
    n, p, _, c = x.shape
    out = np.zeros((n, size, size, c))
    for i in range(size):
        for j in range(size):
            y, z = (max((k + 0.5) * p / size - 0.5, 0) for k in (i, j))
            y0 = int(y)
            z0 = int(z)
            y1 = min(y0 + 1, p - 1)
            z1 = min(z0 + 1, p - 1)
            top = x[:, y0, z0] * (1 - (z - z0)) + x[:, y0, z1] * (z - z0)
            bottom = x[:, y1, z0] * (1 - (z - z0)) + x[:, y1, z1] * (z - z0)
            out[:, i, j] = top * (1 - (y - y0)) + bottom * (y - y0)
    return out.astype(np.float32)


@pytest.mark.parametrize("name", ["augreg_l16", "clip_l14", "eva02_clip_l14", "siglip_l16"])
def test_features_of_enlarged_patches_are_those_of_the_patches(stored, name):
    """FlexiViT's law, through `create`: 16-pixel patches made from 14-pixel ones by bilinear
    interpolation give the same features.
    """
    path = stored(small(name))
    patches = np.random.default_rng(0).standard_normal((16, 14, 14, 3)).astype(np.float32)

    def picture(patches):
        return (
            patches.reshape(1, 4, 4, *patches.shape[1:])
            .transpose(0, 1, 3, 2, 4, 5)
            .reshape(1, 4 * patches.shape[1], -1, 3)
        )

    before = run(backbones.create("small", weights=path), picture(patches), method="__call__")
    flexi = backbones.create("small", image_size=(64, 64), patch_size=16, weights=path)
    assert flexi.config.strides == (16, 16)
    after = run(flexi, picture(bilinear(patches, 16)), method="__call__")
    for a, b in zip(after, before, strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-4)
    bicubic = backbones.create(
        "small", image_size=(64, 64), patch_size=16, patch_resize="bicubic", weights=path
    )
    kernel = weights.tensors(bicubic)["patch_embed.proj.kernel"]
    np.testing.assert_array_equal(
        kernel,
        resizing.resize_patch(drawn("patch_embed.proj.kernel", (14, 14, 3, 24)), 16, "bicubic"),
    )


def test_bicubic_scales_by_nothing():
    """The token that a uniform kernel makes of a uniform picture grows with the patch's area;
    FlexiViT's resize keeps it for any kernel.
    """
    kernel = drawn("patch_embed.proj.kernel", (14, 14, 3, 8))
    uniform = np.ones((14, 14, 3, 8), np.float32)
    np.testing.assert_allclose(
        resizing.resize_patch(kernel, 28, "flexi").sum((0, 1)), kernel.sum((0, 1)), atol=1e-5
    )
    np.testing.assert_allclose(
        resizing.resize_patch(uniform, 28, "bicubic").sum((0, 1)), 28.0**2, rtol=1e-6
    )


def test_a_kernel_of_another_size_is_refused_where_no_resize_was_asked_for(stored):
    """Only `patch_size` resizes: an encoder of 16-pixel patches does not take 14-pixel ones
    silently.
    """
    path = stored(small("augreg_l16"))
    encoder = nnx.eval_shape(
        lambda: backbones.Vit(small("augreg_l16", patch_size=16), rngs=nnx.Rngs(0))
    )
    with pytest.raises(
        ValueError, match=r"patch_embed.proj.kernel is \(14, 14, 3, 24\), not \(16, 16, 3, 24\)"
    ):
        weights.load(encoder, path)
    own = weights.tensors(backbones.create("small", patch_size=14, weights=path))[
        "patch_embed.proj.kernel"
    ]
    np.testing.assert_array_equal(own, drawn("patch_embed.proj.kernel", (14, 14, 3, 24)))


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        (
            "mit_b0",
            dict(patch_size=8),
            (
                r"mit_b0 does not cut images into patches of one size; leave patch_size"
                r" \(model.patch_size\) out"
            ),
        ),
        (
            "augreg_ti16",
            dict(patch_size=0),
            r"patch_size 0 and patch_resize 'flexi' of augreg_ti16; allowed: at least 1 pixel",
        ),
        (
            "augreg_ti16",
            dict(patch_size=8, patch_resize="cubic"),
            r"patch_resize 'cubic' of augreg_ti16; allowed: .* flexi bicubic",
        ),
        (
            "augreg_ti16",
            dict(patch_size=300),
            r"image_size \(224, 224\) is smaller than the 300 pixels",
        ),
    ],
)
def test_wrong_requests_are_refused(name, options, message):
    """An encoder without patches, sizes and methods that there are none of."""
    with pytest.raises(ValueError, match=message):
        backbones.create(name, **options)


@pytest.mark.parametrize(("field", "value"), [("patch_size", 0), ("patch_resize", "cubic")])
def test_the_configuration_is_validated(field, value):
    """The message names the field and what is allowed."""
    c = config.Config()
    setattr(c.model, field, value)
    with pytest.raises(ValueError, match=rf"model\.{field} is {value}; allowed: "):
        config.validated(c)


def test_a_run_with_another_patch_trains_and_loads_again(stored, tmp_path, monkeypatch):
    """Weights of 14-pixel patches in a run of 8-pixel ones: what it starts from is resized, and its
    workdir loads as it was written.
    """
    one = sharding.make_mesh(config.MeshConfig(1, 1), jax.devices()[:1])
    monkeypatch.setattr(sharding, "make_mesh", lambda *_: one)
    path = stored(small("augreg_l16"))
    c = config.Config(steps=2, batch_size=2, log_every=1, eval_every=0, checkpoint_every=2)
    c.data.crop = (32, 32)
    c.evaluation.stride = (32, 32)
    c.data.streets.size = (48, 96)
    c.data.streets.images = 8
    c.data.streets.val_images = 2
    c.model.encoder = "small"
    c.model.weights = str(path)
    c.model.patch_size = 8
    c.model.pyramid = "none"
    c.model.freeze = "all"
    train.train(config.validated(c), tmp_path / "run", cli.console(), cli.Interrupt())
    kernel = tasks.stored_tensors(tmp_path / "run")["backbone.patch_embed.proj.kernel"]
    np.testing.assert_allclose(
        kernel,
        resizing.resize_patch(drawn("patch_embed.proj.kernel", (14, 14, 3, 24)), 8, "flexi"),
        atol=1e-6,
    )
    labels = jaxdg.load(tmp_path / "run").predict(np.zeros((40, 48, 3), np.uint8))
    assert labels.shape == (40, 48)
    # Another run starts from this one's whole model with patches of its own.
    c.model.weights = None
    c.model.start = str(tmp_path / "run")
    c.model.patch_size = 16
    task = tasks.make_task(config.validated(c))
    model = nnx.eval_shape(lambda: task.model(nnx.Rngs(0)))
    weights.fill(model, tasks.stored_tensors(tmp_path / "run"), "run")
    assert weights.tensors(model)["backbone.patch_embed.proj.kernel"].shape == (16, 16, 3, 24)
