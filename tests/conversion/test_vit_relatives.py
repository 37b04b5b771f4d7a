"""Conversion of MoCo-v3, DeiT-III, DINOv2 and DINOv3: every publisher's names in full, what is
refused, and the way back.
"""

import json
import re

import numpy as np
import pytest
from safetensors.numpy import load_file

from jaxdg import backbones, weights
from jaxdg.backbones import Deit3Config, Dinov2Config, Dinov3Config, MocoV3Config
from jaxdg.conversion import mapping, models
from tests.backbones.drawn import run, wave
from tests.conversion.checks import assert_identical, converted, find_shapes_once, refused

SMALL = dict(image_size=(12, 12), patch_size=4, width=16, depth=4, heads=2, taps=(1, 3))
CONFIGS = {
    "mocov3": MocoV3Config(**SMALL),
    "deit3": Deit3Config(**SMALL),
    "dinov2": Dinov2Config(**SMALL),
    "dinov2_reg": Dinov2Config(**SMALL, registers=4),
    "dinov3": Dinov3Config(**SMALL),
}
# Full-size encoders, each with the layout of its family that --reverse writes.
ZOO = {
    "mocov3_b16": ("mocov3", "MoCo-v3"),
    "mocov3_l16": ("mocov3", "MMSelfSup"),
    "deit3_b16": ("deit3", "DeiT"),
    "deit3_l16": ("deit3", "DeiT"),
    "dinov2_s14": ("dinov2", "DINOv2"),
    "dinov2_b14": ("dinov2", "DINOv2"),
    "dinov2_l14": ("dinov2", "DINOv2"),
    "dinov2_s14_reg": ("dinov2_reg", "DINOv2"),
    "dinov2_b14_reg": ("dinov2_reg", "DINOv2"),
    "dinov2_l14_reg": ("dinov2_reg", "DINOv2"),
    "dinov3_b16": ("dinov3", "DINOv3"),
    "dinov3_l16": ("dinov3", "DINOv3"),
}
LAYOUTS = [
    *(("mocov3", layout) for layout in ("MoCo-v3", "MMSelfSup", "MMSelfSup_backbone", "timm")),
    *(("deit3", layout) for layout in ("DeiT", "timm")),
    *(("dinov2", layout) for layout in ("DINOv2", "transformers")),
    *(("dinov2_reg", layout) for layout in ("DINOv2", "transformers", "timm")),
    *(("dinov3", layout) for layout in ("DINOv3", "transformers", "timm", "timm_qkvb")),
]


def affine(c, *names):
    """Weights and biases of norms."""
    return {f"{name}.{kind}": (c,) for name in names for kind in ("weight", "bias")}


def linear(**sizes):
    """Weights [out, in] and biases of linear layers; in names `__` stands for a dot."""
    named = {name.replace("__", "."): size for name, size in sizes.items()}
    return {f"{name}.weight": size for name, size in named.items()} | {
        f"{name}.bias": size[:1] for name, size in named.items()
    }


def projector(*sizes):
    """A contrastive head: linear layers [out, in] without bias, each before a BatchNorm, the last
    of which has no parameters.
    """
    found = {}
    for i, (out, inside) in enumerate(sizes):
        norm = f"{3 * i + 1}"
        found |= {
            f"{3 * i}.weight": (out, inside),
            f"{norm}.running_mean": (out,),
            f"{norm}.running_var": (out,),
        }
        found |= {f"{norm}.num_batches_tracked": ()} | (
            affine(out, norm) if i < len(sizes) - 1 else {}
        )
    return found


def published(family, layout, config):
    """What a file of this layout holds, written out from the publishers' code: shapes by name of
    what is needed, and of what is beside.
    """
    c = config.width
    patch = config.patch_size
    grid = config.image_size[0] // config.patch_size
    square = (c, c)
    patches = {"weight": (c, 3, patch, patch), "bias": (c,)}
    timm_block = affine(c, "norm1", "norm2") | linear(
        attn__qkv=(3 * c, c), attn__proj=square, mlp__fc1=(4 * c, c), mlp__fc2=(c, 4 * c)
    )
    scales = {"ls1.gamma": (c,), "ls2.gamma": (c,)}
    top = {
        "cls_token": (1, 1, c),
        **{f"patch_embed.proj.{kind}": shape for kind, shape in patches.items()},
    }

    def blocks(name, block):
        return {
            f"{name}.{i}.{part}": shape
            for i in range(config.depth)
            for part, shape in block.items()
        }

    def prefixed(prefix, shapes):
        return {prefix + name: shape for name, shape in shapes.items()}

    norm = affine(c, "norm")
    head = linear(head=(10, c))
    one_more = {"pos_embed": (1, 1 + grid**2, c)}
    patches_alone = {"pos_embed": (1, grid**2, c)}

    if family == "mocov3" and layout in ("MoCo-v3", "timm"):
        needed = top | one_more | blocks("blocks", timm_block)
        if layout == "timm":
            return needed, norm | head
        mlp = prefixed("head.", projector((4096, c), (4096, 4096), (256, 4096)))
        beside = prefixed("module.base_encoder.", norm | mlp) | prefixed(
            "module.momentum_encoder.", needed | norm | mlp
        )
        beside |= prefixed("module.predictor.", projector((4096, 256), (256, 4096)))
        return prefixed("module.base_encoder.", needed), beside
    if family == "mocov3":
        block = affine(c, "ln1", "ln2") | linear(attn__qkv=(3 * c, c), attn__proj=square)
        block |= {"ffn.layers.0.0.weight": (4 * c, c), "ffn.layers.0.0.bias": (4 * c,)}
        block |= {"ffn.layers.1.weight": (c, 4 * c), "ffn.layers.1.bias": (c,)}
        needed = {
            "cls_token": (1, 1, c),
            **one_more,
            **prefixed("patch_embed.projection.", patches),
            **blocks("layers", block),
        }
        if layout == "MMSelfSup_backbone":
            return needed, affine(c, "ln1")
        beside = {
            "neck.fc0.weight": (8, c),
            "neck.bn0.num_batches_tracked": (),
            "head.predictor.fc0.weight": (8, 8),
        }
        beside |= prefixed("momentum_encoder.module.0.", needed) | {"momentum_encoder.steps": ()}
        return prefixed("backbone.", needed), beside | affine(c, "backbone.ln1")
    if family == "deit3":
        scales = {"gamma_1": (c,), "gamma_2": (c,)} if layout == "DeiT" else scales
        return top | patches_alone | blocks("blocks", timm_block | scales), norm | head

    mask = {"mask_token": (1, c)}
    if layout == "transformers":
        start = {"embeddings.cls_token": (1, 1, c)}
        beside = {"embeddings.mask_token": (1, c) if family != "dinov3" else (1, 1, c)}
        if family != "dinov2":
            start |= {"embeddings.register_tokens": (1, 4, c)}
        block = affine(c, "norm1", "norm2") | {
            "layer_scale1.lambda1": (c,),
            "layer_scale2.lambda1": (c,),
        }
        if family == "dinov3":
            start |= prefixed("embeddings.patch_embeddings.", patches)
            block |= linear(
                attention__q_proj=square, attention__v_proj=square, attention__o_proj=square
            )
            block |= {"attention.k_proj.weight": square} | linear(
                mlp__up_proj=(4 * c, c), mlp__down_proj=(c, 4 * c)
            )
            return start | blocks("layer", block), beside | norm
        start |= prefixed("embeddings.patch_embeddings.projection.", patches) | {
            "embeddings.position_embeddings": (1, 1 + grid**2, c)
        }
        block |= {
            f"attention.attention.{part}.weight": square for part in ("query", "key", "value")
        }
        block |= {f"attention.attention.{part}.bias": (c,) for part in ("query", "key", "value")}
        block |= linear(attention__output__dense=square, mlp__fc1=(4 * c, c), mlp__fc2=(c, 4 * c))
        return start | blocks("encoder.layer", block), beside | affine(c, "layernorm")
    if family == "dinov2":
        return top | one_more | blocks("blocks", timm_block | scales), mask | norm
    if family == "dinov2_reg":
        if layout == "timm":
            return (
                top
                | patches_alone
                | {"reg_token": (1, 4, c)}
                | blocks("blocks", timm_block | scales),
                norm,
            )
        return (
            top | one_more | {"register_tokens": (1, 4, c)} | blocks("blocks", timm_block | scales),
            mask | norm,
        )
    if layout == "DINOv3":
        needed = (
            top
            | {"storage_tokens": (1, 4, c)}
            | blocks("blocks", timm_block | scales | {"attn.qkv.bias_mask": (3 * c,)})
        )
        return needed, mask | norm | {"rope_embed.periods": (c // config.heads // 4,)}
    block = {name: shape for name, shape in timm_block.items() if name != "attn.qkv.bias"} | {
        "gamma_1": (c,),
        "gamma_2": (c,),
    }
    block |= {"attn.q_bias": (c,), "attn.v_bias": (c,)} if layout == "timm_qkvb" else {}
    return top | {"reg_token": (1, 4, c)} | blocks("blocks", block), norm


def tensors(family, layout):
    """A random small checkpoint of this layout: what is needed of it, and all of it."""
    rng = np.random.default_rng(0)
    shapes, beside = published(family, layout, CONFIGS[family])
    needed = {name: rng.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}
    for i in range(
        SMALL["depth"] if (family, layout) == ("dinov3", "DINOv3") else 0
    ):  # keys have no bias, and the mask says so
        needed[f"blocks.{i}.attn.qkv.bias"][16:32] = 0
        needed[f"blocks.{i}.attn.qkv.bias_mask"] = np.repeat(np.array([1, 0, 1], np.float32), 16)
    counts = [name for name in beside if name.endswith(("num_batches_tracked", "steps"))]
    return needed, needed | dict.fromkeys(beside, np.ones(3, np.float32)) | dict.fromkeys(
        counts, np.ones((), np.int64)
    )


@pytest.fixture(autouse=True, scope="module")
def shapes_found_once():
    """No name changes its meaning between these tests."""
    with pytest.MonkeyPatch.context() as patch:
        find_shapes_once(patch)
        yield


@pytest.fixture(autouse=True)
def tiny(monkeypatch):
    """Encoders of four blocks by family, so that a conversion takes no time."""
    for family, config in CONFIGS.items():
        monkeypatch.setitem(
            backbones.ZOO, family, backbones.zoo.Entry(config, "made by a test", "none", 1)
        )


def layout_of(name, layout):
    return next(found for found in models.layouts(name) if found.name == layout)


@pytest.mark.parametrize("name", ZOO)
def test_full_size_names_are_exactly_those_expected(name):
    """Of every encoder and every layout: names and shapes taken are those published, no more and no
    less; the rest is left out.
    """
    family, first = ZOO[name]
    config = backbones.entry(name).config
    module = models.abstract(name)
    assert models.layouts(name)[0].name == first
    assert {layout.name for layout in models.layouts(name)} == {
        layout for known, layout in LAYOUTS if known == family
    }
    for layout in models.layouts(name):
        needed, beside = published(family, layout.name, config)
        assert mapping.source_shapes(module, layout) == needed, layout.name
        for key in beside:
            assert any(re.fullmatch(pattern, key) for pattern, _ in layout.left_out), key
        for key in needed:
            assert not any(re.fullmatch(pattern, key) for pattern, _ in layout.left_out), key


@pytest.mark.parametrize(("name", "layout"), [("deit3_l16", "DeiT"), ("mocov3_b16", "MoCo-v3")])
def test_the_real_lists_are_those_written_out(weights_path, name, layout):
    """What this file writes out by hand is what the authors' own model code makes, classifier's
    size aside.
    """
    real = {
        key: tuple(shape)
        for key, (shape, _) in json.loads(weights_path(f"keys/{name}.json").read_text())[
            "keys"
        ].items()
    }
    needed, beside = published(ZOO[name][0], layout, backbones.entry(name).config)
    assert real.keys() == needed.keys() | beside.keys()
    assert {key: shape for key, shape in real.items() if not key.startswith("head.")} == {
        key: shape for key, shape in (needed | beside).items() if not key.startswith("head.")
    }


@pytest.mark.parametrize(("family", "layout"), LAYOUTS)
def test_files_convert_and_come_back(command, family, layout):
    """All beside the encoder is left out with a reason, the encoder fills, and --reverse in the
    same layout gives the same bits.
    """
    needed, source = tensors(family, layout)
    code, report, err, out = command(source, model=family)
    assert (code, err) == (0, "")
    assert f"{len(needed)} of {len(source)} tensors mapped (layout: {layout})" in report
    assert json.loads(weights.metadata(out)["left_out"]).keys() == source.keys() - needed.keys()
    backbones.create(family, weights=out)
    back = converted(
        command(out, "--reverse", "--layout", layout, model=family, out="back.safetensors")
    )
    assert_identical(load_file(back), needed)


def test_values_land_where_they_belong(command):
    """A kernel computes what the source's linear layer does, fused projections what their parts do;
    scales keep their place.
    """
    x = np.random.default_rng(1).standard_normal(16).astype(np.float32)
    needed, source = tensors("mocov3", "MMSelfSup")
    got = load_file(converted(command(source, model="mocov3")))
    np.testing.assert_allclose(
        x @ got["blocks.2.mlp.fc1.kernel"],
        needed["backbone.layers.2.ffn.layers.0.0.weight"] @ x,
        rtol=1e-4,
        atol=1e-5,
    )
    np.testing.assert_array_equal(got["blocks.1.norm2.bias"], needed["backbone.layers.1.ln2.bias"])
    needed, source = tensors("deit3", "DeiT")
    got = load_file(converted(command(source, model="deit3", out="deit3.safetensors")))
    np.testing.assert_array_equal(got["blocks.3.ls2.gamma"], needed["blocks.3.gamma_2"])
    for family, kind, start in (
        ("dinov2_reg", ("query", "key", "value"), "encoder.layer.1.attention.attention."),
        ("dinov3", ("q_proj", "k_proj", "v_proj"), "layer.1.attention."),
    ):
        needed, source = tensors(family, "transformers")
        got = load_file(converted(command(source, model=family, out=f"{family}.safetensors")))
        expected = np.concatenate([needed[f"{start}{part}.weight"] @ x for part in kind])
        np.testing.assert_allclose(
            x @ got["blocks.1.attn.qkv.kernel"], expected, rtol=1e-4, atol=1e-5
        )
    np.testing.assert_array_equal(
        got["blocks.1.attn.qv_bias"],
        np.stack([needed[f"layer.1.attention.{part}_proj.bias"] for part in "qv"]),
    )


FIRST = list(dict(reversed(LAYOUTS)).items())  # every family with the layout of its authors
PREFIXES = {"mocov3": "module.base_encoder."}


def drop_and_add(source, start):
    del source[f"{start}blocks.1.mlp.fc2.bias"], source[f"{start}cls_token"]
    source[f"{start}blocks.0.attn.q_norm.weight"] = np.ones(8, np.float32)
    return (
        "1 unknown",
        f"{start}blocks.0.attn.q_norm.weight",
        "2 missing",
        f"{start}blocks.1.mlp.fc2.bias",
        f"{start}cls_token",
    )


def transpose(source, start):
    for name in ("blocks.1.mlp.fc1.weight", "patch_embed.proj.weight"):
        source[start + name] = np.ascontiguousarray(source[start + name].T)
    return (
        "2 of another shape",
        f"{start}blocks.1.mlp.fc1.weight is (16, 64), not (64, 16)",
        f"{start}patch_embed.proj.weight is (4, 4, 3, 16), not (16, 3, 4, 4)",
    )


def halve(source, start):
    blocks = [
        name for name in source if name.startswith((f"{start}blocks.2.", f"{start}blocks.3."))
    ]
    for name in blocks:
        del source[name]
    return (
        f"{len(blocks)} missing",
        f"{start}blocks.2.norm1.bias",
        f"{start}blocks.3.mlp.fc2.weight",
    )


@pytest.mark.parametrize("damage", [drop_and_add, transpose, halve], ids=lambda f: f.__name__)
@pytest.mark.parametrize(("family", "layout"), FIRST)
def test_what_does_not_fit_is_refused_whole(command, family, layout, damage):
    """Every offender is named in the source's own names and shapes, only offenders are, and nothing
    is written.
    """
    _, source = tensors(family, layout)
    offenders = damage(source, PREFIXES.get(family, ""))
    error = refused(
        command(source, model=family),
        f"source.safetensors is no checkpoint of {family}",
        *offenders,
    )
    assert "blocks.0.attn.proj.weight" not in error


@pytest.mark.parametrize(
    ("file", "layout", "model", "offender"),
    [
        ("deit3", "timm", "mocov3", "blocks.0.ls1.gamma"),
        ("mocov3", "timm", "deit3", "blocks.0.gamma_1"),
        ("dinov2_reg", "DINOv2", "dinov2", "1 unknown (register_tokens)"),
        ("dinov2", "DINOv2", "dinov2_reg", "1 missing (register_tokens)"),
        ("dinov2_reg", "timm", "dinov2", "reg_token"),
        ("dinov3", "DINOv3", "dinov2_reg", "storage_tokens"),
        ("dinov2_reg", "transformers", "dinov3", "embeddings.position_embeddings"),
    ],
)
def test_another_familys_file_is_refused(command, file, layout, model, offender):
    """Families that share most names are told apart by the others."""
    refused(
        command(tensors(file, layout)[1], model=model), f"is no checkpoint of {model}", offender
    )


def test_the_authors_torch_files_convert(command, tmp_path):
    """MoCo-v3's `.pth.tar` with its optimiser beside the `state_dict`, and DeiT's `model`, give
    what their tensors alone give.
    """
    torch = pytest.importorskip("torch")
    for family, layout, name, key in (
        ("mocov3", "MoCo-v3", "vit.pth.tar", "state_dict"),
        ("deit3", "DeiT", "deit.pth", "model"),
    ):
        _, source = tensors(family, layout)
        state = {key: torch.from_numpy(tensor) for key, tensor in source.items()}
        optimizer = {
            "state": {0: {"step": 5, "exp_avg": torch.ones(3)}},
            "param_groups": [{"lr": 1e-3}],
        }
        torch.save(
            {"epoch": 300, "arch": "vit", key: state, "optimizer": optimizer}, tmp_path / name
        )
        got = load_file(
            converted(command(tmp_path / name, model=family, out=f"{family}.safetensors"))
        )
        assert_identical(
            got,
            load_file(converted(command(source, model=family, out=f"{family}_alone.safetensors"))),
        )


def test_an_archive_that_is_no_torch_file_is_refused(command, tmp_path):
    """Of `.tar` only `.pth.tar` is read, and a damaged one is told from a good one."""
    for name, reason in (("vit.tar", "of no kind that is read"), ("vit.pth.tar", "cannot be read")):
        (tmp_path / name).write_bytes(b"no checkpoint" * 100)
        if name == "vit.pth.tar":
            pytest.importorskip("torch")
        refused(command(tmp_path / name, model="mocov3"), name, reason)


def test_timms_registers_hold_the_class_tokens_position(command):
    """The authors' weights in timm's names have one class token, its position added, compute the
    same features, and stay as they are.
    """
    needed, source = tensors("dinov2_reg", "DINOv2")
    ours = converted(command(source, model="dinov2_reg", out="ours.safetensors"))
    timm = converted(
        command(ours, "--reverse", "--layout", "timm", model="dinov2_reg", out="timm.safetensors")
    )
    got = load_file(timm)
    np.testing.assert_array_equal(
        got["cls_token"], needed["cls_token"] + needed["pos_embed"][:, :1]
    )
    np.testing.assert_array_equal(got["pos_embed"], needed["pos_embed"][:, 1:])
    again = converted(command(timm, model="dinov2_reg", out="again.safetensors"))
    mine, theirs = (
        run(backbones.create("dinov2_reg", weights=path, taps=(3,)), wave(12, 12))
        for path in (ours, again)
    )
    np.testing.assert_allclose(mine[0], theirs[0], rtol=0, atol=1e-5)
    back = converted(
        command(again, "--reverse", "--layout", "timm", model="dinov2_reg", out="back.safetensors")
    )
    assert_identical(load_file(back), got)


def test_positions_of_another_grid_are_kept_for_the_load(command):
    """A file trained at a larger grid converts with its positions as they are, in a layout with a
    class row and in one without.
    """
    for family, layout, name, row in (
        ("dinov2", "DINOv2", "pos_embed", 1),
        ("dinov2_reg", "timm", "pos_embed", 0),
        ("deit3", "DeiT", "pos_embed", 0),
    ):
        _, source = tensors(family, layout)
        source[name] = (
            np.random.default_rng(3).standard_normal((1, row + 25, 16)).astype(np.float32)
        )
        out = converted(command(source, model=family, out=f"{family}.safetensors"))
        stored = load_file(out)["pos_embed"]
        np.testing.assert_array_equal(stored[:, -25:], source[name][:, -25:])
        fitted = weights.tensors(backbones.create(family, weights=out, image_size=(20, 20)))[
            "pos_embed"
        ]
        np.testing.assert_array_equal(fitted, stored)


def test_dinov3s_keys_have_no_bias(command):
    """The mask zeroes what a file holds for keys; one that leaves keys a bias is refused; timm's
    usual file means biases of zero.
    """
    _, source = tensors("dinov3", "DINOv3")
    source["blocks.2.attn.qkv.bias"][16:32] = 7  # hidden by the mask
    got = load_file(converted(command(source, model="dinov3")))
    np.testing.assert_array_equal(
        got["blocks.2.attn.qv_bias"].ravel(), source["blocks.2.attn.qkv.bias"][np.r_[:16, 32:48]]
    )
    source["blocks.2.attn.qkv.bias_mask"][:] = 1
    refused(
        command(source, model="dinov3", out="bad.safetensors"), "bias_mask leaves the keys a bias"
    )
    _, source = tensors("dinov3", "timm")
    got = load_file(converted(command(source, model="dinov3", out="timm.safetensors")))
    assert all(
        not got[f"blocks.{i}.attn.qv_bias"].any()
        and got[f"blocks.{i}.attn.qv_bias"].shape == (2, 16)
        for i in range(4)
    )


def test_biases_are_not_lost_in_names_without_them(command):
    """Weights with biases are refused in the one layout that has no place for them, which says
    where there is one.
    """
    _, source = tensors("dinov3", "DINOv3")
    out = converted(command(source, model="dinov3"))
    refused(
        command(out, "--reverse", "--layout", "timm", model="dinov3", out="timm.safetensors"),
        "have biases",
        "--layout timm_qkvb",
    )
