"""Stable Diffusion's UNet and VAE against diffusers, and what of them an encoder builds and trains.

The golden files are made by tests/oracles/golden_latent_diffusion.py.
"""

from collections import Counter
import dataclasses
import itertools
import math
import operator
import re
import types
import zlib

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdg import backbones, weights
from jaxdg.backbones import LatentDiffusion, LatentDiffusionConfig, latent_diffusion
from jaxdg.training.optimizer import frozen_names

SIZES = ((64, 128), (192, 64))
# The golden models, which see the mean of the latent as it is.
VERSIONS = {
    1: LatentDiffusionConfig(
        widths=(32, 64, 96, 128),
        heads=(4, 4, 4, 4),
        vae_widths=(32, 64, 64, 32),
        context=(3, 16),
        maps=True,
        scale=1.0,
        time=7,
    )
}
VERSIONS[2] = dataclasses.replace(VERSIONS[1], heads=(1, 2, 3, 4))
SMALL = ("conv_in.", "proj_in.", "resnets.0.conv2.", "resnets.0.conv_shortcut.")
FEATURES = (  # finest first
    "up_blocks.3.attentions.2",
    "up_blocks.2.attentions.1",
    "up_blocks.1.attentions.1",
    "up_blocks.0.resnets.1",
)


def wave(height, width):
    """The golden file's picture by its formula, [1, h, w, 3]."""
    y, x, c = np.ogrid[0:height, 0:width, 0:3]
    return (
        np.sin(0.33 * y + 0.5 * c) * np.cos(0.21 * x - 0.9 * c) + 0.3 * np.sin(0.9 * x + 1.7 * y)
    ).astype(np.float32)[None]


def drawn(name, shape):
    """The golden file's weights by their formula."""
    numbers = np.random.default_rng(zlib.crc32(name.encode())).standard_normal(shape)
    if len(shape) > 1:
        numbers *= 1.0 / np.sqrt(np.prod(shape[1:]))
    else:
        numbers = 0.3 * numbers + (name.endswith("weight"))
    return (numbers * (3e-3 if any(part in name for part in SMALL) else 1)).astype(np.float32)


def ours(name, tensor):
    """A published tensor by our name and layout."""
    name, _, kind = name.rpartition(".")
    if kind == "bias":
        return f"{name}.bias", tensor
    if tensor.ndim == 1:
        return f"{name}.scale", tensor
    if tensor.ndim == 4 and not re.search(r"attentions\.\d\.proj_(in|out)$", name):
        return f"{name}.kernel", tensor.transpose(2, 3, 1, 0)
    return f"{name}.kernel", tensor.reshape(tensor.shape[:2]).T


def assert_near(got, expected, name=""):
    """Equal to 1e-4 of the largest expected number."""
    largest = np.abs(expected).max()
    np.testing.assert_allclose(got, expected, rtol=0, atol=1e-4 * largest, err_msg=name)


@pytest.fixture(scope="module", params=VERSIONS)
def version(request):
    return request.param


@pytest.fixture(scope="module")
def archive(golden, version):
    with np.load(golden / f"latent_diffusion_{version}.npz") as file:
        return dict(file)


@pytest.fixture(scope="module")
def file(archive, tmp_path_factory):
    """The golden model as a jaxdg file."""
    tensors = {"context": drawn("context", (3, 16))}
    for name, *shape in map(str.split, archive["names"]):
        part, _, rest = name.partition(".")
        if not rest.startswith(("conv_out", "conv_norm_out")):
            key, tensor = ours(rest, drawn(rest, tuple(map(int, shape))))
            tensors[f"{part}.{key}"] = tensor
    path = tmp_path_factory.mktemp("latent_diffusion") / "random.safetensors"
    weights.save(tensors, path, {})
    return path


@pytest.fixture(scope="module")
def build(file, version):
    """`build(taps=.., ..)`: an encoder that differs from the golden one in these fields, with its
    weights.
    """

    def make(**fields):
        config = dataclasses.replace(VERSIONS[version], **fields)
        encoder = nnx.eval_shape(lambda: LatentDiffusion(config, rngs=nnx.Rngs(0)))
        weights.load(encoder, file)
        return encoder

    return make


def outputs(encoder, images, monkeypatch):
    """Features, the latent, the output of every block of the UNet, and the time's embedding."""
    graph, state = nnx.split(encoder)
    plain_run = latent_diffusion.run
    plain_latent = LatentDiffusion.latent

    def traced(state, images):
        kept = []
        latents = []

        def run(block, *inputs, **options):
            kept.append(plain_run(block, *inputs, **options))
            return kept[-1]

        def latent(model, images):
            latents.append(plain_latent(model, images))
            return latents[-1]

        monkeypatch.setattr(latent_diffusion, "run", run)
        monkeypatch.setattr(LatentDiffusion, "latent", latent)
        model = nnx.merge(graph, state)
        features = model(images)
        return features, latents[0], kept[-len(BLOCKS) :], model.unet.time_embedding(7)

    return jax.jit(traced)(state, jnp.asarray(images))


def pairs():
    """The names of the UNet's blocks in their order, two for a pair."""
    names = ["conv_in"]
    for i in range(4):
        for j in range(2):
            names += [f"down_blocks.{i}.resnets.{j}"]
            names += [f"down_blocks.{i}.attentions.{j}"] if i < 3 else []
        names += [f"down_blocks.{i}.downsamplers.0"] if i < 3 else []
    names += ["mid_block.resnets.0", "mid_block.attentions.0", "mid_block"]
    for i in range(4):
        for j in range(3):
            names += [f"up_blocks.{i}.resnets.{j}"]
            names += [f"up_blocks.{i}.attentions.{j}"] if i else []
        names += [f"up_blocks.{i}.upsamplers.0"] if i < 3 else []
    return names


BLOCKS = pairs()


def compared(encoder, archive, size, monkeypatch):
    """Checks all that the golden file has of a size."""
    at = "{}x{}/".format(*size)
    features, latent, blocks, time = outputs(encoder, wave(*size), monkeypatch)
    assert_near(latent, archive[f"{at}mean"])
    assert_near(time, archive["time"])
    names = set()
    for name, output in zip(BLOCKS, blocks, strict=True):
        x = output[0] if isinstance(output, tuple) else output
        if (expected := archive.get(at + name)) is not None:
            assert_near(x if x.shape == expected.shape else x[..., ::8], expected, name)
            names.add(at + name)
    beside = {f"{at}mean", f"{at}maps16", f"{at}maps32"}
    assert names == {key for key in archive if key.startswith(at)} - beside
    for i, (name, got) in enumerate(zip(FEATURES, features, strict=True)):
        width = encoder.config.widths[i]
        assert_near(got[..., :width], archive[at + name], name)
        if i in (1, 2):
            assert_near(got[..., width:], archive[f"{at}maps{8 << i}"])
        assert got.shape[-1] == encoder.channels[i]


def test_every_block_equals_diffusers(build, version, archive, monkeypatch):
    """The latent's mean, the time's embedding, every block's output, the features and the maps
    appended to two of them equal diffusers', to 1e-4 of each one's largest number.
    """
    size = SIZES[version - 1]
    compared(build(image_size=size), archive, size, monkeypatch)


@pytest.mark.slow
def test_every_block_equals_diffusers_at_the_other_size(build, version, archive, monkeypatch):
    """Each version at the size that the test above leaves to the other one, recomputing blocks."""
    size = SIZES[2 - version]
    compared(build(image_size=size, remat=True), archive, size, monkeypatch)


def test_the_noise_of_every_step(golden):
    """All 1000 steps are those of the definition in float64, to the last bit of float32, and
    diffusers', which multiplies numbers of float32, to its rounding.
    """
    first, last = 0.00085**0.5, 0.012**0.5
    added = ((first + i / 999 * (last - first)) ** 2 for i in range(1000))
    left = itertools.accumulate((1 - share for share in added), operator.mul)
    got = latent_diffusion.noise_left()
    np.testing.assert_array_equal(got, np.fromiter(left, np.float32))
    with np.load(golden / "latent_diffusion_1.npz") as file:
        np.testing.assert_allclose(got, file["noise_left"], rtol=1e-6)


def abstract(config):
    """An encoder without numbers."""
    return nnx.eval_shape(lambda: config.build(rngs=nnx.Rngs(0)))


@pytest.fixture
def encoder(whole, monkeypatch):
    """The first golden model without numbers; `LatentDiffusion.config` may be set anew."""
    monkeypatch.setattr(whole, "config", VERSIONS[1])
    return whole


@pytest.fixture(scope="module")
def whole():
    return abstract(VERSIONS[1])


@pytest.mark.parametrize("taps", [(0, 3), (1, 2, 3), (3,)])
def test_taps_decide_what_is_built(encoder, taps):
    """What comes after the finest level that is read is not built, and its tensors are dropped;
    strides and channels are those of the taps.
    """
    blocks = {0: [3, 3, 3, 3], 1: [3, 3, 2], 3: [2]}[taps[0]]
    fewer = abstract(dataclasses.replace(VERSIONS[1], taps=taps, maps=False))
    names = set(weights.shapes(fewer))
    everything = weights.shapes(encoder)
    empty = np.zeros(())
    assert names == {name for name in everything if fewer.adapt(name, empty) is not None}
    assert all(encoder.adapt(name, empty) is empty for name in everything)
    beside = set(everything) - names
    assert all(name.startswith("unet.up_blocks.") for name in beside)
    for part, counts in (("resnets", blocks), ("upsamplers", [1] * (len(blocks) - 1))):
        found = Counter(
            name.split(".")[2]
            for name in {name.rsplit(".", 2)[0] for name in names if name.endswith(".kernel")}
            if re.fullmatch(rf"unet\.up_blocks\.\d\.{part}\.\d", name)
        )
        assert [found[str(i)] for i in range(len(counts))] == counts
        assert len(found) == len(counts)
    assert fewer.config.strides == tuple(8 << tap for tap in taps)
    assert fewer.channels == tuple(fewer.config.widths[tap] for tap in taps)


def picture(model, images):
    """In place of the latent: one pixel of every eighth, in each direction."""
    return images[:, ::8, ::8]


def pyramid(unet, x, condition):
    """In place of the UNet's features: its input at four sizes."""
    return tuple(x[:, :: 1 << i, :: 1 << i] for i in range(4))


def test_sides_are_filled_up_with_zeros_and_cut_again(encoder, monkeypatch):
    """Features of an image of any size are those of the image with zeros at its bottom and right,
    as far as they begin within the image.
    """
    monkeypatch.setattr(LatentDiffusion, "latent", picture)
    monkeypatch.setattr(LatentDiffusion, "condition", lambda model: None)
    monkeypatch.setattr(latent_diffusion.UNet, "__call__", pyramid)
    images = wave(77, 193)
    padded = np.pad(images, ((0, 0), (0, 51), (0, 63), (0, 0)))
    encoder.config = dataclasses.replace(VERSIONS[1], image_size=(77, 193))
    got = encoder(images)
    encoder.config = dataclasses.replace(VERSIONS[1], image_size=(128, 256))
    for i, (x, full) in enumerate(zip(got, encoder(padded), strict=True)):
        assert x.shape[1:3] == (-(-77 // (8 << i)), -(-193 // (8 << i)))
        np.testing.assert_array_equal(x, full[:, : x.shape[1], : x.shape[2]])
        np.testing.assert_array_equal(x, images[:, :: 8 << i, :: 8 << i])


def test_noise_is_drawn_once_for_all_images(encoder, monkeypatch):
    """The latent is the scaled mean and normal noise by the schedule's shares; the noise is that of
    every image and every step, and without it the latent is the scaled mean.
    """
    mean = np.random.default_rng(0).normal(size=(2, 32, 64, 4)).astype(np.float32)
    monkeypatch.setattr(
        latent_diffusion.Vae, "__call__", lambda vae, images, remat: jnp.asarray(mean)
    )
    images = jnp.zeros((2, 256, 512, 3))
    encoder.config = plain = dataclasses.replace(VERSIONS[1], scale=0.25)
    np.testing.assert_array_equal(encoder.latent(images), 0.25 * mean)
    drawn = []
    for time in (50, 900):
        encoder.config = dataclasses.replace(plain, time=time, noise=True)
        noised = encoder.latent(images)
        left = np.prod(1 - np.linspace(0.00085**0.5, 0.012**0.5, 1000)[: time + 1] ** 2)
        drawn.append((noised - left**0.5 * 0.25 * mean) / (1 - left) ** 0.5)
    first, second = np.asarray(drawn)
    np.testing.assert_allclose(first[0], first[1], atol=1e-5)
    np.testing.assert_allclose(first, second, atol=1e-4)
    assert abs(first.mean()) < 0.05
    assert abs(first.std() - 1) < 0.05


def test_the_learned_condition(encoder):
    """The stored rows, and gamma times an MLP of them, by NumPy; what no pre-training has starts at
    a factor of 1e-4.
    """
    config = dataclasses.replace(VERSIONS[1], learned=True)
    start = latent_diffusion.fresh(config)
    made = weights.shapes(abstract(config))
    assert {name: tensor.shape for name, tensor in start.items()} == {
        name: made[name] for name in made.keys() - weights.shapes(encoder).keys()
    }
    np.testing.assert_array_equal(start["gamma"], np.full(16, 1e-4, np.float32))
    assert latent_diffusion.fresh(VERSIONS[1]) == {}
    rng = np.random.default_rng(0)
    gamma, x = rng.normal(size=16), rng.normal(size=(3, 16))
    adapter = latent_diffusion.TextAdapter(16, rngs=nnx.Rngs(0))
    learned = types.SimpleNamespace(
        context=jnp.asarray(x, jnp.float32), gamma=jnp.asarray(gamma), text_adapter=adapter
    )
    y = x @ start["text_adapter.fc.0.kernel"] + start["text_adapter.fc.0.bias"]
    y = y * (1 + np.vectorize(math.erf)(y / 2**0.5)) / 2
    y = y @ start["text_adapter.fc.2.kernel"] + start["text_adapter.fc.2.bias"]
    got = LatentDiffusion.condition(learned)  # pyright: ignore[reportArgumentType]
    np.testing.assert_allclose(got, x + gamma * y, atol=1e-5)


def test_what_is_frozen(encoder):
    """`all` freezes everything, `first N` the embeddings and N of the UNet's nine stages in their
    order, and the VAE and the stored condition are never trained.
    """
    names = [f"backbone.{name}" for name in weights.shapes(encoder)]
    unet = {name for name in names if name.startswith("backbone.unet.")}
    unused = {name for name in names if encoder.unused(name.removeprefix("backbone."))}
    assert {name.split(".")[1] for name in unused} == {"vae", "context"}
    assert frozen_names("all", names, encoder) == set(names)
    first = frozen_names("first 5", names, encoder)
    assert unet - first == {name for name in names if ".up_blocks." in name}
    assert frozen_names("last 1", names, encoder) == {n for n in names if ".up_blocks.3." in n}
    assert frozen_names("last 9", names, encoder) == {
        n for n in unet if "_block" in n.split(".")[2]
    }
    with pytest.raises(ValueError, match="at most 9, the encoder's stages"):
        frozen_names("first 10", names, encoder)


def test_what_does_not_fit_is_refused():
    """Options that it has not, a step that there is not, and maps without the finest features."""
    for fields, message in (
        ({"drop_path": 0.1}, "drop_path is 0.1, and Stable Diffusion skips no branches"),
        ({"time": 1000}, "time is 1000; allowed: 0 to 999"),
        ({"taps": (1, 2)}, r"taps \(1, 2\) leave out the finest features"),
    ):
        with pytest.raises(ValueError, match=message):
            dataclasses.replace(VERSIONS[1], **fields).build(rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="sd15 does not cut images into patches"):
        backbones.create("sd15", patch_size=16)
    with pytest.raises(ValueError, match=r"image_size \(32, 64\) is smaller than the 64 pixels"):
        backbones.create("sd15", image_size=(32, 64))


def test_the_zoo_has_the_published_sizes():
    """Parameters and tensors of the UNets without their last layers, and of the VAE's encoder, as
    the published files have them.
    """
    last = 2 * 320 + 9 * 320 * 4 + 4
    for name, count in (("sd15", 859_520_964), ("sd21", 865_910_724)):
        found = weights.shapes(abstract(backbones.entry(name).config))
        parts = {
            part: [int(np.prod(s)) for n, s in found.items() if n.startswith(part)]
            for part in ("unet.", "vae.")
        }
        assert (len(parts["unet."]), sum(parts["unet."])) == (686 - 4, count - last)
        assert (len(parts["vae."]), sum(parts["vae."])) == (108, 34_163_664)
    config = backbones.entry("sd15_vpd").config
    assert config.channels == (320, 659, 1299, 1280)
    assert found["context"] == (77, 1024)
    assert config.mean == config.std == (0.5, 0.5, 0.5)
