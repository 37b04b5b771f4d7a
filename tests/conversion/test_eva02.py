"""Conversion of EVA-02: the real key lists, every publisher's names, what is refused, and the way
back.
"""

import functools
import json
import os
import pickle
import tracemalloc

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from jaxdg import backbones, weights
from jaxdg.backbones import Eva02Config
from jaxdg.conversion import convert as torch_to_flax
from jaxdg.conversion import eva02, mapping, models
from tests.conversion.checks import assert_identical, refused

WIDTH = 24
HIDDEN = 64
DEPTH = 4
SMALL = dict(image_size=(12, 12), patch_size=4, width=WIDTH, depth=DEPTH, heads=2, taps=(1, 3))
CONFIGS = {
    "clip": Eva02Config(**SMALL),
    "mim_l": Eva02Config(**SMALL, inner_attn_ln=False),
    "mim_ti": Eva02Config(**SMALL, inner_attn_ln=False, subln=False),
    "repro": Eva02Config(**SMALL, inner_attn_ln=False, random_positions=True),
}


def original(family: str, prefix: str = "") -> dict[str, np.ndarray]:
    """A random checkpoint of `family` as baaivision/EVA names it, written out by hand, with all
    that its files hold beside.
    """
    rng = np.random.default_rng(0)
    c = WIDTH
    h = HIDDEN
    shapes = {
        "cls_token": (1, 1, c),
        "pos_embed": (1, 10, c),
        "patch_embed.proj.weight": (c, 3, 4, 4),
        "patch_embed.proj.bias": (c,),
    }
    shapes |= {
        "rope.freqs_cos": (9, 12),
        "rope.freqs_sin": (9, 12),
        "norm.weight": (c,),
        "norm.bias": (c,),
    }
    for i in range(DEPTH):
        block = {"norm1.weight": (c,), "norm1.bias": (c,), "norm2.weight": (c,), "norm2.bias": (c,)}
        block |= {
            "attn.q_bias": (c,),
            "attn.v_bias": (c,),
            "attn.proj.weight": (c, c),
            "attn.proj.bias": (c,),
        }
        block |= {
            "attn.rope.freqs_cos": (9, 12),
            "attn.rope.freqs_sin": (9, 12),
            "mlp.w3.weight": (c, h),
            "mlp.w3.bias": (c,),
        }
        if family == "mim_ti":
            block |= {
                "attn.qkv.weight": (3 * c, c),
                "mlp.w12.weight": (2 * h, c),
                "mlp.w12.bias": (2 * h,),
            }
        else:
            block |= {f"attn.{p}_proj.weight": (c, c) for p in "qkv"} | {
                "mlp.ffn_ln.weight": (h,),
                "mlp.ffn_ln.bias": (h,),
            }
            block |= {
                "mlp.w1.weight": (h, c),
                "mlp.w1.bias": (h,),
                "mlp.w2.weight": (h, c),
                "mlp.w2.bias": (h,),
            }
        if family == "clip":
            block |= {"attn.inner_attn_ln.weight": (c,), "attn.inner_attn_ln.bias": (c,)}
        shapes |= {f"blocks.{i}.{name}": shape for name, shape in block.items()}
    tensors = {
        f"{prefix}{name}": rng.standard_normal(shape, dtype=np.float32)
        for name, shape in shapes.items()
    }
    if family == "clip":
        more = {
            f"{prefix}head.weight": (8, c),
            f"{prefix}head.bias": (8,),
            "logit_scale": (),
            "text.positional_embedding": (7, 8),
        }
        more |= {
            "text.transformer.resblocks.0.attn.in_proj_weight": (24, 8),
            "text.token_embedding.weight": (50, 8),
        }
    else:
        more = {"mask_token": (1, 1, c), "lm_head.weight": (8, c), "lm_head.bias": (8,)}
    return tensors | {
        name: rng.standard_normal(shape).astype(np.float32) for name, shape in more.items()
    }


def mapped(tensors: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Without what is left out on purpose."""
    beside = ("rope.", "norm.weight", "norm.bias", "head.", "text.", "logit_scale", "mask_token")
    return {
        name: tensor
        for name, tensor in tensors.items()
        if (".blocks." in f".{name}" and "rope" not in name)
        or not any(part in name for part in beside)
    }


@pytest.fixture(autouse=True)
def tiny(monkeypatch):
    """Encoders of four blocks by family, so that a conversion takes no time."""
    for family, config in CONFIGS.items():
        monkeypatch.setitem(
            backbones.ZOO, family, backbones.zoo.Entry(config, "made by a test", "none", 1)
        )


@pytest.fixture
def command(command):
    """The conversion command, for the CLIP-trained layout unless a test names another."""
    return functools.partial(command, model="clip")


def real_keys(weights_path, name):
    return {
        key: tuple(shape)
        for key, (shape, _) in json.loads(weights_path(f"keys/{name}.json").read_text())[
            "keys"
        ].items()
    }


def is_needed(name):
    """Of the real lists: the image tower but for its final norm, head and rotary buffers."""
    return (
        name.startswith("visual.")
        and "rope" not in name
        and not name.startswith(("visual.norm.", "visual.head."))
    )


@pytest.mark.parametrize("name", ["eva02_clip_l14", "eva02_clip_b16"])
def test_the_real_keys_are_exactly_those_expected(weights_path, name):
    """At full size: the names and shapes that conversion takes are those of the published image
    tower, no more and no less.
    """
    keys = real_keys(weights_path, name)
    layout = eva02.layouts(backbones.entry(name).config)[0]
    expected = mapping.source_shapes(models.abstract(name), layout)
    assert expected == {key: shape for key, shape in keys.items() if is_needed(key)}
    for key in keys.keys() - expected.keys():
        assert any(mapping.re.fullmatch(pattern, key) for pattern, _ in layout.left_out), key


@pytest.mark.parametrize(
    ("name", "reduce"),
    [
        ("eva02_clip_l14", {1024: 48, 2730: 128, 768: 8}),
        ("eva02_clip_b16", {768: 24, 2048: 64, 512: 8}),
    ],
)
def test_the_real_keys_convert_and_come_back(command, weights_path, monkeypatch, name, reduce):
    """All real names and blocks with random float16 values at a reduced width: every tensor is
    used, and --reverse gives equal values.
    """
    real = backbones.entry(name).config
    rng = np.random.default_rng(0)
    small = {49408: 50, 3072: 6, 2304: 6, 1536: 6} | reduce
    shapes = {
        key: tuple(small.get(n, n) for n in shape)
        for key, shape in real_keys(weights_path, name).items()
    }
    source = {key: rng.standard_normal(shape).astype(np.float16) for key, shape in shapes.items()}
    narrow = Eva02Config(**{**vars(real), "width": reduce[real.width], "heads": 2})
    monkeypatch.setitem(backbones.ZOO, "narrow", backbones.zoo.Entry(narrow, "made by a test"))
    code, report, err, out = command(source, model="narrow")
    assert (code, err) == (0, "")
    needed = {key for key in source if is_needed(key)}
    assert f"{len(needed)} of {len(source)} tensors mapped (layout: EVA-CLIP)" in report
    assert "text.transformer.resblocks.*.mlp.c_fc.weight" in report
    assert json.loads(weights.metadata(out)["left_out"]).keys() == source.keys() - needed
    got = weights.tensors(backbones.create("narrow", weights=out))
    x = rng.standard_normal(narrow.width).astype(np.float32)
    w1 = source["visual.blocks.7.mlp.w1.weight"].astype(np.float32)
    np.testing.assert_allclose(x @ got["blocks.7.mlp.w1.kernel"], w1 @ x, rtol=1e-4, atol=1e-4)
    np.testing.assert_array_equal(
        got["blocks.11.attn.inner_attn_ln.scale"],
        source["visual.blocks.11.attn.inner_attn_ln.weight"],
    )
    code, _, err, back = command(out, "--reverse", model="narrow", out="back.safetensors")
    assert (code, err) == (0, "")
    assert_identical(load_file(back), {key: source[key].astype(np.float32) for key in needed})


@pytest.mark.parametrize(
    ("family", "prefix", "layout"),
    [("clip", "visual.", "EVA-CLIP"), ("mim_l", "", "EVA-02"), ("mim_ti", "", "EVA-02")],
)
def test_the_authors_files_convert_and_come_back(command, family, prefix, layout):
    """Of each family: all beside the encoder is left out with a reason, values are the source's,
    and --reverse gives the same bits.
    """
    source = original(family, prefix)
    code, report, err, out = command(source, model=family)
    assert (code, err) == (0, "")
    assert f"{len(mapped(source))} of {len(source)} tensors mapped (layout: {layout})" in report
    got = load_file(out)
    fused = "attn.qkv" if family == "mim_ti" else "attn.k_proj"
    np.testing.assert_array_equal(
        got[f"blocks.2.{fused}.kernel"], source[f"{prefix}blocks.2.{fused}.weight"].T
    )
    np.testing.assert_array_equal(
        got["blocks.3.attn.v_bias"], source[f"{prefix}blocks.3.attn.v_bias"]
    )
    np.testing.assert_array_equal(got["pos_embed"], source[f"{prefix}pos_embed"])
    code, _, err, back = command(out, "--reverse", model=family, out="back.safetensors")
    assert (code, err) == (0, "")
    assert_identical(load_file(back), mapped(source))


TIMM = (
    ("mlp.ffn_ln", "mlp.norm"),
    ("attn.inner_attn_ln", "attn.norm"),
    ("mlp.w12.", "mlp.fc1."),
    ("mlp.w1.", "mlp.fc1_g."),
    ("mlp.w2.", "mlp.fc1_x."),
    ("mlp.w3.", "mlp.fc2."),
)


@pytest.mark.parametrize("prefix", ["", "visual.trunk."])
@pytest.mark.parametrize("family", ["clip", "mim_l", "mim_ti"])
def test_names_of_timm_and_open_clip_mean_the_same(command, family, prefix):
    """A checkpoint under timm's names, alone or within open_clip, becomes what it becomes under its
    authors'.
    """
    source = mapped(original(family))
    renamed = {}
    for name, tensor in source.items():
        for theirs, timms in TIMM if family != "mim_ti" else TIMM[2:]:
            name = name.replace(theirs, timms)
        if family != "mim_ti":
            name = name.replace("attn.q_bias", "attn.q_proj.bias").replace(
                "attn.v_bias", "attn.v_proj.bias"
            )
        renamed[prefix + name] = tensor
    renamed |= {
        f"{prefix}fc_norm.weight": np.ones(WIDTH, np.float32),
        f"{prefix}head.bias": np.ones(3, np.float32),
    }
    if prefix:
        renamed |= {
            "logit_scale": np.ones((), np.float32),
            "text.transformer.embeddings.weight": np.ones((3, 3), np.float32),
        }
    code, report, err, out = command(renamed, model=family)
    assert (code, err) == (0, "")
    assert f"(layout: {'open_clip' if prefix else 'timm'})" in report
    _, _, _, authors = command(source, model=family, out="authors.safetensors")
    assert_identical(load_file(out), load_file(authors))
    layout = next(
        layout
        for layout in eva02.layouts(CONFIGS[family])
        if layout.name == ("open_clip" if prefix else "timm")
    )
    back = mapping.from_flax(models.abstract(family), layout, load_file(out))
    assert_identical(back, {name: tensor for name, tensor in renamed.items() if name in back})
    assert len(back) == len(source)


def test_the_reimplementations_encoder_takes_the_authors_file(command):
    """Without the inner norms, which are left out by name and recorded; the correct encoder's file
    keeps them.
    """
    source = original("clip", "visual.")
    code, report, err, out = command(source, model="repro")
    assert (code, err) == (0, "")
    left_out = json.loads(weights.metadata(out)["left_out"])
    assert sum("re-implementation" in reason for reason in left_out.values()) == 2 * DEPTH
    assert "visual.blocks.*.attn.inner_attn_ln.weight" in report
    assert not any("inner_attn_ln" in name for name in load_file(out))
    backbones.create("repro", weights=out)


def rename(tensors):
    tensors["visual.blocks.1.attn.q_proj.wieght"] = tensors.pop(
        "visual.blocks.1.attn.q_proj.weight"
    )
    tensors["visual.blocks.2.attn.inner_attn_norm.bias"] = tensors.pop(
        "visual.blocks.2.attn.inner_attn_ln.bias"
    )
    return (
        "2 unknown (visual.blocks.1.attn.q_proj.wieght, visual.blocks.2.attn.inner_attn_norm.bias)",
        "2 missing (visual.blocks.1.attn.q_proj.weight, visual.blocks.2.attn.inner_attn_ln.bias)",
    )


def drop(tensors):
    names = [
        f"visual.blocks.{i}.attn.inner_attn_ln.{kind}"
        for i in range(DEPTH)
        for kind in ("bias", "weight")
    ]
    for name in (*names, "visual.pos_embed"):
        del tensors[name]
    norm = "visual.blocks.*.attn.inner_attn_ln"
    return (f"9 missing ({norm}.bias (4 tensors), {norm}.weight (4 tensors), visual.pos_embed)",)


def add(tensors):
    tensors |= {
        name: np.ones(WIDTH, np.float32)
        for name in ("visual.blocks.0.attn.k_bias", "visual.ln_pre.weight", "visual.rope.freqs")
    }
    return ("3 unknown (visual.blocks.0.attn.k_bias, visual.ln_pre.weight, visual.rope.freqs)",)


def transpose(tensors):
    for name in ("visual.blocks.1.mlp.w1.weight", "visual.patch_embed.proj.weight"):
        tensors[name] = np.ascontiguousarray(tensors[name].T)
    return (
        "2 of another shape",
        "visual.blocks.1.mlp.w1.weight is (24, 64), not (64, 24)",
        "visual.patch_embed.proj.weight is (4, 4, 3, 24)",
    )


def misshape(tensors):
    tensors["visual.blocks.0.mlp.ffn_ln.weight"] = np.ones(HIDDEN + 1, np.float32)
    tensors["visual.pos_embed"] = np.ones((1, 13, WIDTH), np.float32)
    tensors["visual.cls_token"] = np.ones(WIDTH, np.float32)
    return (
        "3 of another shape or type",
        "visual.blocks.0.mlp.ffn_ln.weight is (65,), not (64,)",
        "visual.pos_embed is (1, 13, 24), not (1, 10, 24)",
        "visual.cls_token is (24,), not (1, 1, 24)",
    )


def halve(tensors):
    for name in [name for name in tensors if ".blocks.2." in name or ".blocks.3." in name]:
        del tensors[name]
    return "42 missing", "visual.blocks.2.attn.proj.bias", "46 fit"


def as_mim(tensors):
    renamed = {
        name.removeprefix("visual."): tensor
        for name, tensor in tensors.items()
        if "inner_attn_ln" not in name
    }
    tensors.clear()
    tensors |= renamed
    return "8 missing", "blocks.0.attn.inner_attn_ln.bias", "blocks.3.attn.inner_attn_ln.weight"


def as_vit(tensors):
    tensors.clear()
    tensors |= {
        name: np.ones(WIDTH, np.float32)
        for name in ("transformer.encoder.weight", "visual.conv1.weight")
    }
    return (
        "of whose 88 tensors 0 fit",
        "2 unknown (transformer.encoder.weight, visual.conv1.weight)",
        "88 missing",
    )


@pytest.mark.parametrize(
    "damage",
    [rename, drop, add, transpose, misshape, halve, as_mim, as_vit],
    ids=lambda f: f.__name__,
)
def test_what_does_not_fit_is_refused_whole(command, damage):
    """Every offender is named, in the source's own names and shapes, and nothing is written."""
    tensors = original("clip", "visual.")
    offenders = damage(tensors)
    error = refused(command(tensors), "source.safetensors is no checkpoint of clip", *offenders)
    assert "blocks.0.attn.proj.weight" not in error or damage is as_vit, "and only offenders are"


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16], ids=["float16", "bfloat16"])
def test_half_precision_becomes_float32_of_equal_values(command, dtype):
    """Widening is exact for both half formats."""
    half = {name: tensor.astype(dtype) for name, tensor in original("clip", "visual.").items()}
    code, _, err, out = command(half)
    assert (code, err) == (0, "")
    _, _, _, back = command(out, "--reverse", out="back.safetensors")
    assert_identical(
        load_file(back), mapped({name: tensor.astype(np.float32) for name, tensor in half.items()})
    )


@pytest.mark.parametrize("under", [None, "module", "state_dict"])
def test_torch_files_convert_truncated_ones_do_not(command, tmp_path, under):
    """The kind of file that is published, also one level down, gives what a safetensors file gives;
    cut short it is refused.
    """
    torch = pytest.importorskip("torch")
    source = original("clip", "visual.")
    tensors = {name: torch.from_numpy(tensor).half() for name, tensor in source.items()}
    torch.save({under: tensors} if under else tensors, tmp_path / "EVA.pt")
    code, _, err, out = command(tmp_path / "EVA.pt")
    assert (code, err) == (0, "")
    _, _, _, back = command(out, "--reverse", out="back.safetensors")
    assert_identical(
        load_file(back),
        mapped(
            {name: tensor.astype(np.float16).astype(np.float32) for name, tensor in source.items()}
        ),
    )
    whole = (tmp_path / "EVA.pt").read_bytes()
    (tmp_path / "cut.pt").write_bytes(whole[: len(whole) * 2 // 3])
    refused(command(tmp_path / "cut.pt", out="x.safetensors"), "cut.pt cannot be read", "cut short")


def test_no_file_is_held_in_memory_whole(tmp_path, monkeypatch):
    """Tensors are read, converted and written one by one: a conversion allocates less than half of
    what it writes.
    """
    config = Eva02Config(image_size=(12, 12), patch_size=4, width=256, depth=6, heads=4, taps=(5,))
    monkeypatch.setitem(backbones.ZOO, "wide", backbones.zoo.Entry(config, "made by a test"))
    shapes = mapping.source_shapes(models.abstract("wide"), eva02.layouts(config)[0])
    save_file(
        {name: np.zeros(shape, np.float16) for name, shape in shapes.items()},
        tmp_path / "source.safetensors",
    )
    arguments = [
        "--model",
        "wide",
        "--checkpoint",
        str(tmp_path / "source.safetensors"),
        "--out",
        str(tmp_path / "out.safetensors"),
    ]
    assert torch_to_flax.main(arguments) == 0  # what jax allocates once is not counted
    tracemalloc.start()
    assert torch_to_flax.main(arguments) == 0
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < (tmp_path / "out.safetensors").stat().st_size / 2


class Malicious:
    """Runs a command where it is unpickled."""

    def __init__(self, command):
        self.command = command

    def __reduce__(self):
        return os.system, (self.command,)


def test_pickled_code_is_refused_and_not_run(command, tmp_path):
    """A checkpoint that would run code is refused with the reason, and the code has not run."""
    torch = pytest.importorskip("torch")
    trace = tmp_path / "ran"
    tensors = {
        name: torch.from_numpy(tensor) for name, tensor in original("clip", "visual.").items()
    }
    torch.save(tensors | {"optimizer": Malicious(f"touch {trace}")}, tmp_path / "evil.pt")
    refused(
        command(tmp_path / "evil.pt"),
        "evil.pt is refused: it holds pickled code",
        "system",
        "could run anything",
    )
    (tmp_path / "plain.pt").write_bytes(pickle.dumps(Malicious(f"touch {trace}"), protocol=2))
    refused(command(tmp_path / "plain.pt"), "plain.pt is refused: it holds pickled code")
    assert not trace.exists()
