"""Conversion of SigLIP's image towers: every published layout written out by hand, refusals, the
way back.
"""

import re

import numpy as np
import pytest
from safetensors.numpy import load_file

from jaxdg import backbones, weights
from jaxdg.backbones import SiglipConfig
from jaxdg.conversion import mapping, models, siglip
from tests.conversion.checks import assert_identical, converted, find_shapes_once, refused

WIDTH = 16
HEADS = 2
DEPTH = 4
PATCH = 4
GRID = 3
TINY = SiglipConfig(
    image_size=(12, 12), patch_size=PATCH, width=WIDTH, depth=DEPTH, heads=HEADS, taps=(1, 3)
)
LAYOUTS = {layout.name: layout for layout in siglip.layouts(TINY)}
# What a published file holds beside the tower's patches and blocks, by layout.
AROUND = {
    "timm": (
        "attn_pool.latent",
        "attn_pool.kv.weight",
        "attn_pool.mlp.fc2.bias",
        "norm.weight",
        "norm.bias",
    ),
    "open_clip": (
        "visual.trunk.attn_pool.latent",
        "visual.trunk.norm.weight",
        "text.transformer.resblocks.11.attn.in_proj_weight",
        "text.text_projection.bias",
        "logit_scale",
        "logit_bias",
    ),
    "transformers": (
        "vision_model.head.probe",
        "vision_model.head.attention.in_proj_weight",
        "vision_model.post_layernorm.bias",
        "text_model.embeddings.token_embedding.weight",
        "text_model.encoder.layers.11.self_attn.k_proj.bias",
        "logit_scale",
        "logit_bias",
    ),
    "big_vision": (
        "params/img/Transformer/encoder_norm/scale",
        "params/img/MAPHead_0/probe",
        "params/img/MAPHead_0/MlpBlock_0/Dense_1/bias",
        "params/img/head/kernel",
        "params/txt/Encoder_0/encoderblock_11/LayerNorm_1/bias",
        "params/t",
        "params/b",
    ),
}
AROUND["big_vision-scan"] = AROUND["big_vision"]


def shapes(layout, c, heads, depth, patch, grid):
    """Every tensor of a tower by its publisher's names, written out from the description of the
    model.
    """
    if layout in ("timm", "open_clip"):
        found = {
            "pos_embed": (1, grid * grid, c),
            "patch_embed.proj.weight": (c, 3, patch, patch),
            "patch_embed.proj.bias": (c,),
        }
        for i in range(depth):
            for part, out, inside in (
                ("attn.qkv", 3 * c, c),
                ("attn.proj", c, c),
                ("mlp.fc1", 4 * c, c),
                ("mlp.fc2", c, 4 * c),
            ):
                found |= {
                    f"blocks.{i}.{part}.weight": (out, inside),
                    f"blocks.{i}.{part}.bias": (out,),
                }
            found |= {
                f"blocks.{i}.norm{k}.{kind}": (c,) for k in (1, 2) for kind in ("weight", "bias")
            }
        return {
            ("visual.trunk." if layout == "open_clip" else "") + name: shape
            for name, shape in found.items()
        }
    if layout == "transformers":
        start = "vision_model.embeddings."
        found = {
            f"{start}position_embedding.weight": (grid * grid, c),
            f"{start}patch_embedding.weight": (c, 3, patch, patch),
        }
        found[f"{start}patch_embedding.bias"] = (c,)
        for i in range(depth):
            block = f"vision_model.encoder.layers.{i}."
            for part in ("q_proj", "k_proj", "v_proj", "out_proj"):
                found |= {
                    f"{block}self_attn.{part}.weight": (c, c),
                    f"{block}self_attn.{part}.bias": (c,),
                }
            found |= {f"{block}mlp.fc1.weight": (4 * c, c), f"{block}mlp.fc1.bias": (4 * c,)}
            found |= {f"{block}mlp.fc2.weight": (c, 4 * c), f"{block}mlp.fc2.bias": (c,)}
            found |= {
                f"{block}layer_norm{k}.{kind}": (c,) for k in (1, 2) for kind in ("weight", "bias")
            }
        return found
    d = c // heads
    block = {"MlpBlock_0/Dense_0/kernel": (c, 4 * c), "MlpBlock_0/Dense_0/bias": (4 * c,)}
    block |= {"MlpBlock_0/Dense_1/kernel": (4 * c, c), "MlpBlock_0/Dense_1/bias": (c,)}
    block |= {f"LayerNorm_{k}/{kind}": (c,) for k in (0, 1) for kind in ("scale", "bias")}
    for part in ("query", "key", "value"):
        block |= {
            f"MultiHeadDotProductAttention_0/{part}/kernel": (c, heads, d),
            f"MultiHeadDotProductAttention_0/{part}/bias": (heads, d),
        }
    block |= {
        "MultiHeadDotProductAttention_0/out/kernel": (heads, d, c),
        "MultiHeadDotProductAttention_0/out/bias": (c,),
    }
    found = {
        "pos_embedding": (1, grid * grid, c),
        "embedding/kernel": (patch, patch, 3, c),
        "embedding/bias": (c,),
    }
    if layout == "big_vision":
        found |= {
            f"Transformer/encoderblock_{i}/{name}": shape
            for i in range(depth)
            for name, shape in block.items()
        }
    else:
        found |= {
            f"Transformer/encoderblock/{name}": (depth, *shape) for name, shape in block.items()
        }
    return {f"params/img/{name}": shape for name, shape in found.items()}


def tensors(layout="timm"):
    """A random checkpoint of the tiny tower, with what surrounds it in a published file."""
    rng = np.random.default_rng(0)
    wanted = shapes(layout, WIDTH, HEADS, DEPTH, PATCH, GRID) | dict.fromkeys(
        AROUND[layout], (2, 3)
    )
    return {name: rng.standard_normal(shape).astype(np.float32) for name, shape in wanted.items()}


def mapped(source, layout="timm"):
    return {name: tensor for name, tensor in source.items() if name not in AROUND[layout]}


@pytest.fixture(autouse=True, scope="module")
def shapes_found_once():
    """No name changes its meaning between these tests."""
    with pytest.MonkeyPatch.context() as patch:
        find_shapes_once(patch)
        yield


@pytest.fixture(autouse=True)
def tiny(monkeypatch):
    """A tower of four blocks."""
    monkeypatch.setitem(backbones.ZOO, "tiny", backbones.zoo.Entry(TINY, "made by a test"))


@pytest.fixture
def run(command, tmp_path):
    """Converts tensors from the kind of file that their layout is published in."""

    def run(source, layout="timm", **kwargs):
        if not layout.startswith("big_vision"):
            return command(source, **kwargs)
        np.savez(tmp_path / "source.npz", **source)
        return command(tmp_path / "source.npz", **kwargs)

    return run


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    ("name", "grid"), [("siglip_b16", 14), ("siglip_l16", 16), ("siglip2_l16", 32)]
)
def test_the_published_names_are_exactly_those_expected(name, grid, layout):
    """At full size: names and shapes that conversion takes are the description's; all others are
    left out for one reason.
    """
    config = backbones.entry(name).config
    assert isinstance(config, SiglipConfig)
    table = {table.name: table for table in siglip.layouts(config)}[layout]
    expected = shapes(layout, config.width, config.heads, config.depth, 16, grid)
    assert mapping.source_shapes(models.abstract(name), table) == expected
    for key in (*expected, *AROUND[layout]):
        assert sum(re.fullmatch(pattern, key) is not None for pattern, _ in table.left_out) == (
            key not in expected
        ), key


def listed(names):
    """Names and shapes as golden files hold them."""
    return {name: tuple(map(int, shape)) for name, *shape in map(str.split, names)}


def test_the_description_is_that_of_timm_transformers_and_big_vision(golden):
    """The models that they build hold the tensors above, and what is left out by name
    (tests/oracles/golden_{siglip,big_vision}.py).
    """
    with np.load(golden / "big_vision.npz") as archive:
        for layout in ("big_vision", "big_vision-scan"):
            held = listed(archive[layout.replace("big_vision", "siglip") + "/names"])
            norm = {
                f"params/img/Transformer/encoder_norm/{kind}": (24,) for kind in ("scale", "bias")
            }
            assert held == shapes(layout, 24, 2, 4, 4, 5) | norm
    with np.load(golden / "siglip.npz") as archive:
        models = {layout: listed(archive[f"names/{layout}"]) for layout in ("timm", "transformers")}
    for layout, held in models.items():
        left_out = {
            name
            for name in held
            for pattern, _ in LAYOUTS[layout].left_out
            if re.fullmatch(pattern, name)
        }
        assert set(AROUND[layout]) <= left_out
        assert {name: shape for name, shape in held.items() if name not in left_out} == shapes(
            layout, 768, 12, 12, 16, 14
        )


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_converts_and_comes_back(run, command, layout):
    """Every tensor is used or left out with its reason, lands where its meaning says, and --reverse
    gives the same bits.
    """
    source = tensors(layout)
    code, report, err, out = run(source, layout)
    assert (code, err) == (0, "")
    assert (
        f"{len(mapped(source, layout))} of {len(source)} tensors mapped (layout: {layout})"
        in report
    )
    assert "3x3 positions and 0 for tokens without one" in report
    got = weights.tensors(backbones.create("tiny", weights=out))
    x = np.random.default_rng(1).standard_normal(WIDTH).astype(np.float32)
    value = {
        "timm": lambda: source["blocks.2.attn.qkv.weight"][2 * WIDTH :] @ x,
        "open_clip": lambda: source["visual.trunk.blocks.2.attn.qkv.weight"][2 * WIDTH :] @ x,
        "transformers": lambda: source["vision_model.encoder.layers.2.self_attn.v_proj.weight"] @ x,
        "big_vision": lambda: np.einsum(
            "c,chd->hd",
            x,
            source[
                "params/img/Transformer/encoderblock_2/MultiHeadDotProductAttention_0/value/kernel"
            ],
        ),
        "big_vision-scan": lambda: np.einsum(
            "c,chd->hd",
            x,
            source[
                "params/img/Transformer/encoderblock/MultiHeadDotProductAttention_0/value/kernel"
            ][2],
        ),
    }[layout]().reshape(-1)
    np.testing.assert_allclose(
        (x @ got["blocks.2.attn.qkv.kernel"])[2 * WIDTH :], value, rtol=1e-4, atol=1e-5
    )
    suffix = ".npz" if layout.startswith("big_vision") else ".safetensors"
    code, report, err, back = command(out, "--reverse", "--layout", layout, out=f"back{suffix}")
    assert (code, err) == (0, "")
    written = dict(np.load(back)) if suffix == ".npz" else load_file(back)
    if suffix == ".npz":  # what its model wants and jaxdg does not keep
        assert 'pool_type="none"' in report
        np.testing.assert_array_equal(
            written.pop("params/img/Transformer/encoder_norm/scale"), np.ones(WIDTH)
        )
        np.testing.assert_array_equal(
            written.pop("params/img/Transformer/encoder_norm/bias"), np.zeros(WIDTH)
        )
    assert_identical(written, mapped(source, layout))


def test_stacked_and_numbered_blocks_are_the_same_encoder(run):
    """A file with one tensor for all blocks and a file with one a block give equal tensors."""
    numbered = tensors("big_vision")
    stacked = {
        name: tensor
        for name, tensor in numbered.items()
        if "img/Transformer/encoderblock_" not in name
    }
    for name in shapes("big_vision-scan", WIDTH, HEADS, DEPTH, PATCH, GRID):
        if "encoderblock/" in name:
            stacked[name] = np.stack(
                [numbered[name.replace("encoderblock", f"encoderblock_{i}")] for i in range(DEPTH)]
            )
    one = load_file(converted(run(numbered, "big_vision", out="one.safetensors")))
    assert_identical(
        load_file(converted(run(stacked, "big_vision-scan", out="two.safetensors"))), one
    )


def test_npz_files_go_back_as_big_vision_names_them(run, command):
    """Without --layout: timm's names for torch's kinds of file, big_vision's numbered blocks for
    `.npz`; unknown ones are listed.
    """
    out = converted(run(tensors()))
    assert set(load_file(converted(command(out, "--reverse", out="back.safetensors")))) == set(
        mapped(tensors())
    )
    _, _, _, back = command(out, "--reverse", out="back.npz")
    assert {name for name in np.load(back).files if "encoder_norm" not in name} == set(
        mapped(tensors("big_vision"), "big_vision")
    )
    refused(
        command(out, "--reverse", "--layout", "jax", out="x.npz"),
        "--layout jax is none of tiny",
        *LAYOUTS,
    )


BLOCK = {
    "timm": "blocks.{}.mlp.fc1.weight",
    "open_clip": "visual.trunk.blocks.{}.mlp.fc1.weight",
    "transformers": "vision_model.encoder.layers.{}.mlp.fc1.weight",
    "big_vision": "params/img/Transformer/encoderblock_{}/MlpBlock_0/Dense_0/kernel",
}


@pytest.mark.parametrize("layout", BLOCK)
def test_what_does_not_fit_is_refused_whole(run, layout):
    """A dropped and an extra tensor, a transposed one and half the blocks: every offender is named,
    and nothing is written.
    """
    name = BLOCK[layout]
    source = tensors(layout)
    del source[name.format(1)]
    source[name.format(DEPTH)] = np.ones(3, np.float32)
    refused(
        run(source, layout),
        "no checkpoint of tiny",
        f"1 missing ({name.format(1)})",
        f"1 unknown ({name.format(DEPTH)})",
    )
    source = tensors(layout)
    source[name.format(2)] = np.ascontiguousarray(source[name.format(2)].T)
    refused(
        run(source, layout),
        f"1 of another shape or type ({name.format(2)} is {source[name.format(2)].shape}, not",
    )
    half = {
        key: tensor
        for key, tensor in tensors(layout).items()
        if key in AROUND[layout] or not re.search(r"[._][23][./]", key)
    }
    missing = len(tensors(layout)) - len(half)
    refused(run(half, layout), f"{missing} missing", name.format(2), name.format(3))


def test_stacked_blocks_that_do_not_fit_are_refused_whole(run):
    """Half the blocks, a transposed tensor, whole numbers: every stacked tensor is named once, with
    both shapes.
    """
    name = "params/img/Transformer/encoderblock/MlpBlock_0/Dense_0/kernel"
    source = tensors("big_vision-scan")
    half = {key: tensor[:2] if "encoderblock/" in key else tensor for key, tensor in source.items()}
    error = refused(
        run(half, "big_vision-scan"),
        "16 of another shape or type",
        f"{name} is (2, 16, 64), not (4, 16, 64)",
    )
    assert error.count(name) == 1
    wrong = source | {name: source[name].transpose(0, 2, 1)}
    refused(
        run(wrong, "big_vision-scan"),
        f"1 of another shape or type ({name} is (4, 64, 16), not (4, 16, 64))",
    )
    refused(
        run(source | {name: source[name].astype(int)}, "big_vision-scan"),
        f"1 of another shape or type ({name} holds int64)",
    )
    del source[name]
    refused(
        run(source | {f"{name}s": np.ones(2, np.float32)}, "big_vision-scan"),
        f"1 missing ({name})",
        f"1 unknown ({name}s)",
    )


def test_positions_of_another_grid_are_stored_as_they_are(run, command):
    """Files of other image sizes are taken, and fitted at load by bilinear interpolation with fixed
    corners.
    """
    for layout, name, shape in (
        ("timm", "pos_embed", (1, 25, WIDTH)),
        ("transformers", "vision_model.embeddings.position_embedding.weight", (25, WIDTH)),
        ("big_vision", "params/img/pos_embedding", (1, 25, WIDTH)),
    ):
        source = tensors(layout) | {
            name: np.random.default_rng(3).standard_normal(shape).astype(np.float32)
        }
        out = converted(run(source, layout))
        fitted = weights.tensors(backbones.create("tiny", weights=out))["pos_embed"].reshape(
            3, 3, WIDTH
        )
        # From 5x5 to 3x3 with fixed corners, every second position is read.
        np.testing.assert_allclose(fitted, source[name].reshape(5, 5, WIDTH)[::2, ::2], atol=1e-6)


def test_other_families_are_told_apart(command):
    """A plain ViT's file, which shares most names, is no SigLIP: its class token and positions are
    named.
    """
    source = mapped(tensors()) | {
        "cls_token": np.ones((1, 1, WIDTH), np.float32),
        "pos_embed": np.ones((1, 10, WIDTH), np.float32),
    }
    refused(command(source), "1 unknown (cls_token)", "pos_embed is (1, 10, 16), not (1, 9, 16)")
