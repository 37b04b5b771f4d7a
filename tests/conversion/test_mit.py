"""Conversion of SegFormer's encoders: the real key lists, the names of NVlabs and transformers,
refusals, the way back.
"""

import json
import re

import numpy as np
import pytest
from safetensors.numpy import load_file

from jaxdg import backbones, weights
from jaxdg.backbones import MitConfig
from jaxdg.conversion import mapping, mit, models
from tests.conversion.checks import assert_identical, converted, find_shapes_once, refused

TINY = MitConfig(image_size=(32, 32), blocks=(1, 2, 1, 1), widths=(8, 16, 20, 32))
NAMES = [f"mit_b{i}" for i in range(6)]
# What a published file holds beside the encoder, by layout.
AROUND = {
    "SegFormer encoder": {"head.weight": (10, 32), "head.bias": (10,)},
    "SegFormer": {
        "decode_head.linear_c4.proj.weight": (6, 32),
        "decode_head.linear_fuse.bn.num_batches_tracked": (1,),
    },
    "transformers": {"decode_head.linear_c.0.proj.weight": (6, 8), "classifier.weight": (10, 32)},
}


def shapes(config, layout):
    """Every tensor of an encoder by its publisher's names, written out from the description of the
    model.
    """
    found = {}
    prefix = {
        "SegFormer encoder": "",
        "SegFormer": "backbone.",
        "transformers": "segformer.encoder.",
    }[layout]
    theirs = layout == "transformers"

    def both(name, weight, *bias):
        return {f"{name}.weight": weight, f"{name}.bias": bias or (weight[0],)}

    for i, (c, count, ratio) in enumerate(
        zip(config.widths, config.blocks, (8, 4, 2, 1), strict=True)
    ):
        kernel = (c, (3, *config.widths)[i], *((7, 7) if i == 0 else (3, 3)))
        patch = f"patch_embeddings.{i}" if theirs else f"patch_embed{i + 1}"
        found |= both(f"{patch}.proj", kernel) | both(
            f"{patch}.{'layer_norm' if theirs else 'norm'}", (c,)
        )
        found |= both(f"layer_norm.{i}" if theirs else f"norm{i + 1}", (c,))
        for k in range(count):
            block = both("attention.self.query" if theirs else "attn.q", (c, c))
            if theirs:
                block |= both("attention.self.key", (c, c)) | both("attention.self.value", (c, c))
            else:
                block |= both("attn.kv", (2 * c, c))
            block |= both("attention.output.dense" if theirs else "attn.proj", (c, c))
            if ratio > 1:
                block |= both("attention.self.sr" if theirs else "attn.sr", (c, c, ratio, ratio))
                block |= both("attention.self.layer_norm" if theirs else "attn.norm", (c,))
            block |= both("layer_norm_1" if theirs else "norm1", (c,)) | both(
                "layer_norm_2" if theirs else "norm2", (c,)
            )
            block |= both("mlp.dense1" if theirs else "mlp.fc1", (4 * c, c)) | both(
                "mlp.dense2" if theirs else "mlp.fc2", (c, 4 * c)
            )
            block |= both("mlp.dwconv.dwconv", (4 * c, 1, 3, 3))
            found |= {
                f"{f'block.{i}' if theirs else f'block{i + 1}'}.{k}.{name}": shape
                for name, shape in block.items()
            }
    return {prefix + name: shape for name, shape in found.items()}


def tensors(layout="SegFormer encoder"):
    """A random checkpoint of the tiny encoder, with what surrounds it in a published file."""
    rng = np.random.default_rng(0)
    return {
        name: rng.standard_normal(shape).astype(np.float32)
        for name, shape in (shapes(TINY, layout) | AROUND[layout]).items()
    }


def encoders(source, layout="SegFormer encoder"):
    return {name: tensor for name, tensor in source.items() if name not in AROUND[layout]}


@pytest.fixture(autouse=True, scope="module")
def shapes_found_once():
    """No name changes its meaning between these tests."""
    with pytest.MonkeyPatch.context() as patch:
        find_shapes_once(patch)
        yield


@pytest.fixture(autouse=True)
def tiny(monkeypatch):
    """An encoder of five blocks."""
    monkeypatch.setitem(backbones.ZOO, "tiny", backbones.zoo.Entry(TINY, "made by a test"))


@pytest.mark.parametrize("name", ["mit_b0", "mit_b5"])
def test_the_real_keys_are_exactly_those_expected(weights_path, name):
    """At full size: the names and shapes that conversion takes are those of the authors' encoder,
    no more and no less.
    """
    listed = json.loads(weights_path(f"keys/{name}.json").read_text())["keys"]
    keys = {key: tuple(shape) for key, (shape, _) in listed.items()}
    assert (
        mapping.source_shapes(models.abstract(name), mit.layouts()[0])
        == keys
        == shapes(backbones.entry(name).config, "SegFormer encoder")
    )


@pytest.mark.parametrize("name", NAMES)
def test_full_size_shapes_in_every_layout(name):
    """At full size, each layout's names and shapes are those of the described model."""
    module = models.abstract(name)
    config = backbones.entry(name).config
    for layout in mit.layouts():
        assert mapping.source_shapes(module, layout) == shapes(config, layout.name)


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
    for name in AROUND[layout]:
        assert re.sub(r"(?<=\.)\d+(?=\.)", "*", name) in report
    got = weights.tensors(backbones.create("tiny", weights=out))
    assert got["block2.1.mlp.dwconv.kernel"].shape == (3, 3, 1, 64)
    x = np.random.default_rng(1).standard_normal(16).astype(np.float32)
    if layout == "transformers":
        block = "segformer.encoder.block.1.1."
        parts = [
            source[f"{block}attention.self.{part}.weight"] @ x
            + source[f"{block}attention.self.{part}.bias"]
            for part in ("key", "value")
        ]
        expected = np.concatenate(parts)
        patches = "segformer.encoder.patch_embeddings.2.proj"
        inside = f"{block}mlp.dense1"
    else:
        start = "backbone." if layout == "SegFormer" else ""
        expected = (
            source[f"{start}block2.1.attn.kv.weight"] @ x + source[f"{start}block2.1.attn.kv.bias"]
        )
        patches = f"{start}patch_embed3.proj"
        inside = f"{start}block2.1.mlp.fc1"
    np.testing.assert_allclose(
        x @ got["block2.1.attn.kv.kernel"] + got["block2.1.attn.kv.bias"],
        expected,
        rtol=1e-4,
        atol=1e-4,
    )
    np.testing.assert_array_equal(got["block2.1.mlp.fc1.kernel"], source[f"{inside}.weight"].T)
    np.testing.assert_array_equal(
        got["patch_embed3.proj.kernel"][2, 0], source[f"{patches}.weight"][:, :, 2, 0].T
    )
    back = converted(command(out, "--reverse", "--layout", layout, out="back.safetensors"))
    assert_identical(load_file(back), encoders(source, layout))


def test_reverse_writes_nvlabs_names_unless_told_otherwise(command):
    """A file from transformers goes back to the names of the authors' own encoder."""
    out = converted(command(tensors("transformers")))
    back = converted(command(out, "--reverse", out="back.safetensors"))
    assert {name: tensor.shape for name, tensor in load_file(back).items()} == shapes(
        TINY, "SegFormer encoder"
    )


def test_what_does_not_fit_is_refused_whole(command):
    """Dropped, added and transposed tensors: all named at once."""
    source = tensors()
    source["block2.1.norm.weight"] = source.pop("block2.1.norm1.weight")
    source["block1.0.mlp.fc1.weight"] = source["block1.0.mlp.fc1.weight"].T.copy()
    source["block2.0.attn.sr.weight"] = np.ones((16, 16, 8, 8), np.float32)
    refused(
        command(source),
        "1 unknown (block2.1.norm.weight)",
        "1 missing (block2.1.norm1.weight)",
        "2 of another shape",
        "block1.0.mlp.fc1.weight is (8, 32), not (32, 8)",
        "block2.0.attn.sr.weight is (16, 16, 8, 8), not (16, 16, 4, 4)",
    )


def test_half_the_blocks_or_another_size_are_refused(command):
    """A file without the last two stages misses their tensors; a file of a larger variant has
    unknown ones.
    """
    source = {
        name: tensor
        for name, tensor in tensors().items()
        if not re.match(r"(patch_embed|block|norm)[34]", name)
    }
    refused(command(source), "48 missing", "block3.0.attn.kv.bias", "of whose 120 tensors 72 fit")
    source = tensors() | {"block2.2.norm1.weight": np.ones(16, np.float32)}
    refused(command(source), "1 unknown (block2.2.norm1.weight)")
