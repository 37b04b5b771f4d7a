"""Conversion of SAM's image encoders: the real key lists, the names of transformers and timm,
refusals, the way back.
"""

import json
import re

import numpy as np
import pytest
from safetensors.numpy import load_file

from jaxdg import backbones, weights
from jaxdg.backbones import SamConfig
from jaxdg.conversion import mapping, models, sam
from tests.conversion.checks import assert_identical, converted, refused

WIDTH = 16
DEPTH = 4
PATCH = 4
TINY = SamConfig(
    image_size=(20, 20),
    patch_size=PATCH,
    width=WIDTH,
    depth=DEPTH,
    heads=2,
    taps=(1, 3),
    window=2,
    global_blocks=(1, 3),
)
# What a published file holds beside the image encoder's blocks, by layout.
AROUND = {
    "SAM": (
        "image_encoder.neck.3.bias",
        "prompt_encoder.point_embeddings.0.weight",
        "mask_decoder.iou_token.weight",
    ),
    "transformers": (
        "vision_encoder.neck.layer_norm2.weight",
        "prompt_encoder.shared_embedding.positional_embedding",
        "mask_decoder.upscale_conv1.bias",
        "shared_image_embedding.positional_embedding",
    ),
    "timm": ("neck.0.weight", "head.fc.weight"),
}


def shapes(layout, config, grid):
    """Every tensor of an image encoder by its publisher's names, written out from the description
    of the model.
    """
    c = config.width
    d = config.width // config.heads
    names = {
        "SAM": ("image_encoder.", "patch_embed.proj", "blocks", "norm", "mlp.lin"),
        "transformers": (
            "vision_encoder.",
            "patch_embed.projection",
            "layers",
            "layer_norm",
            "mlp.lin",
        ),
        "timm": ("", "patch_embed.proj", "blocks", "norm", "mlp.fc"),
    }
    start, patches, blocks, norm, mlp = names[layout]
    found = {
        "pos_embed": (1, grid, grid, c),
        f"{patches}.weight": (c, 3, config.patch_size, config.patch_size),
        f"{patches}.bias": (c,),
    }
    for i in range(config.depth):
        side = grid if i in config.global_blocks else config.window
        block = {"attn.rel_pos_h": (2 * side - 1, d), "attn.rel_pos_w": (2 * side - 1, d)}
        for part, out, inside in (
            ("attn.qkv", 3 * c, c),
            ("attn.proj", c, c),
            (f"{mlp}1", 4 * c, c),
            (f"{mlp}2", c, 4 * c),
        ):
            block |= {f"{part}.weight": (out, inside), f"{part}.bias": (out,)}
        block |= {f"{norm}{k}.{kind}": (c,) for k in (1, 2) for kind in ("weight", "bias")}
        found |= {f"{blocks}.{i}.{name}": shape for name, shape in block.items()}
    return {start + name: shape for name, shape in found.items()}


def tensors(layout="SAM"):
    """A random checkpoint of the tiny encoder, with what surrounds it in a published file."""
    rng = np.random.default_rng(0)
    wanted = shapes(layout, TINY, 5) | dict.fromkeys(AROUND[layout], (2, 3))
    return {name: rng.standard_normal(shape).astype(np.float32) for name, shape in wanted.items()}


def encoders(source, layout="SAM"):
    return {name: tensor for name, tensor in source.items() if name not in AROUND[layout]}


@pytest.fixture(autouse=True)
def tiny(monkeypatch):
    """An encoder of four blocks, two of them global."""
    monkeypatch.setitem(backbones.ZOO, "tiny", backbones.zoo.Entry(TINY, "made by a test"))


@pytest.mark.parametrize("name", ["sam_b16", "sam_l16"])
def test_the_real_keys_are_exactly_those_expected(weights_path, name):
    """At full size: names and shapes that conversion takes are the published image encoder's; all
    others are left out for a reason.
    """
    listed = json.loads(weights_path(f"keys/{name}.json").read_text())["keys"]
    keys = {key: tuple(shape) for key, (shape, _) in listed.items()}
    layout = sam.layouts()[0]
    expected = mapping.source_shapes(models.abstract(name), layout)
    assert expected == {
        key: keys[key] for key in keys if key.startswith("image_encoder.") and ".neck." not in key
    }
    for key in keys.keys() - expected.keys():
        assert sum(re.fullmatch(pattern, key) is not None for pattern, _ in layout.left_out) == 1, (
            key
        )


@pytest.mark.parametrize("name", ["sam_b16", "sam_l16", "sam_h16"])
@pytest.mark.parametrize("layout", sam.layouts(), ids=lambda layout: layout.name)
def test_full_size_shapes_in_every_layout(name, layout):
    """At full size, each layout's names and shapes are those of the described model with 64x64
    positions.
    """
    config = backbones.entry(name).config
    assert mapping.source_shapes(models.abstract(name), layout) == shapes(layout.name, config, 64)


@pytest.mark.parametrize("layout", AROUND)
def test_files_convert_and_come_back(command, layout):
    """Each layout is recognised, every tensor used or left out, values land where they belong, and
    --reverse gives the same bits.
    """
    source = tensors(layout)
    code, report, err, out = command(source)
    assert (code, err) == (0, "")
    assert (
        f"{len(encoders(source, layout))} of {len(source)} tensors mapped (layout: {layout})"
        in report
    )
    assert "pos_embed: 5x5 positions, stored as they are" in report
    for name in AROUND[layout]:
        assert re.sub(r"(?<=\.)\d+(?=\.)", "*", name) in report
    got = weights.tensors(backbones.create("tiny", weights=out))
    plain = shapes(layout, TINY, 5)
    start = next(iter(plain)).removesuffix("pos_embed")
    block = start + ("layers" if layout == "transformers" else "blocks")
    np.testing.assert_array_equal(got["pos_embed"], source[f"{start}pos_embed"])
    np.testing.assert_array_equal(
        got["blocks.1.attn.rel_pos_w"], source[f"{block}.1.attn.rel_pos_w"]
    )
    np.testing.assert_array_equal(
        got["blocks.2.attn.qkv.kernel"], source[f"{block}.2.attn.qkv.weight"].T
    )
    _, _, err, back = command(out, "--reverse", "--layout", layout, out="back.safetensors")
    assert err == ""
    assert_identical(load_file(back), encoders(source, layout))


def test_what_does_not_fit_is_refused_whole(command):
    """Dropped, added and transposed tensors, relative positions of no grid or of another window:
    all named at once.
    """
    source = tensors()
    source["image_encoder.blocks.2.norm.weight"] = source.pop("image_encoder.blocks.2.norm1.weight")
    source["image_encoder.blocks.0.mlp.lin1.weight"] = source[
        "image_encoder.blocks.0.mlp.lin1.weight"
    ].T.copy()
    source["image_encoder.blocks.1.attn.rel_pos_h"] = np.ones((8, 8), np.float32)
    source["image_encoder.blocks.2.attn.rel_pos_w"] = np.ones((9, 8), np.float32)
    source["image_encoder.blocks.3.attn.rel_pos_w"] = np.ones((9, 4), np.float32)
    source["image_encoder.pos_embed"] = np.ones((1, 25, 16), np.float32)
    error = refused(
        command(source),
        "1 unknown (image_encoder.blocks.2.norm.weight)",
        "1 missing (image_encoder.blocks.2.norm1.weight)",
        "5 of another shape",
        "image_encoder.blocks.0.mlp.lin1.weight is (16, 64), not (64, 16)",
        "image_encoder.blocks.1.attn.rel_pos_h is (8, 8), not (9, 8)",
        "image_encoder.blocks.2.attn.rel_pos_w is (9, 8), not (3, 8)",
        "image_encoder.blocks.3.attn.rel_pos_w is (9, 4), not (9, 8)",
        "image_encoder.pos_embed is (1, 25, 16), not (1, 5, 5, 16)",
    )
    assert "qkv" not in error


def test_half_the_blocks_are_refused(command):
    """A file of two of the four blocks misses the others' tensors, told by kind."""
    source = {
        name: tensor
        for name, tensor in tensors().items()
        if not re.search(r"\.blocks\.[23]\.", name)
    }
    refused(
        command(source),
        "28 missing",
        "image_encoder.blocks.2.attn.proj.bias",
        "of whose 59 tensors 31 fit",
    )


def test_positions_of_another_grid_are_stored_as_they_are(command):
    """A file trained at 7x7 tokens is kept whole, comes back bit by bit, and is fitted at load;
    windows do not change.
    """
    source = tensors()
    rng = np.random.default_rng(1)
    source["image_encoder.pos_embed"] = rng.standard_normal((1, 7, 7, WIDTH)).astype(np.float32)
    for i in (1, 3):
        for side in "hw":
            source[f"image_encoder.blocks.{i}.attn.rel_pos_{side}"] = rng.standard_normal(
                (13, 8)
            ).astype(np.float32)
    out = converted(command(source))
    np.testing.assert_array_equal(load_file(out)["pos_embed"], source["image_encoder.pos_embed"])
    fitted = weights.shapes(backbones.create("tiny", image_size=(12, 32), weights=out))
    assert fitted["pos_embed"] == (1, 3, 8, WIDTH)
    assert [fitted[f"blocks.{i}.attn.rel_pos_{side}"] for i in (0, 1) for side in "hw"] == [
        (3, 8),
        (3, 8),
        (5, 8),
        (15, 8),
    ]
    _, _, err, back = command(out, "--reverse", out="back.safetensors")
    assert err == ""
    assert_identical(load_file(back), encoders(source))
