"""Conversion of CLIP's vision transformers: the real key lists, OpenAI's archives read without
running them, refusals, the way back.
"""

import json
import os
import pickle
import zipfile

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file

from jaxdg import backbones, weights
from jaxdg.backbones import ClipVitConfig
from jaxdg.conversion import checkpoint, clip, mapping, models
from tests.conversion.checks import assert_identical, refused

# Only torch can write the archives that OpenAI published; it warns that new models should not be
# saved like that.
pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
WIDTH = 16
DEPTH = 4
TINY = ClipVitConfig(
    image_size=(12, 12), patch_size=4, width=WIDTH, depth=DEPTH, heads=2, taps=(1, 3)
)


def open_clip_tensors(text="") -> dict[str, np.ndarray]:
    """A random checkpoint as OpenAI and open_clip name it, written out by hand; newer files hold
    the text tower below `text.`.
    """
    rng = np.random.default_rng(0)
    c = WIDTH
    shapes = {
        "class_embedding": (c,),
        "positional_embedding": (10, c),
        "proj": (c, 8),
        "conv1.weight": (c, 3, 4, 4),
    }
    shapes |= {
        f"{norm}.{kind}": (c,) for norm in ("ln_pre", "ln_post") for kind in ("weight", "bias")
    }
    for i in range(DEPTH):
        block = {
            "attn.in_proj_weight": (3 * c, c),
            "attn.in_proj_bias": (3 * c,),
            "attn.out_proj.weight": (c, c),
            "attn.out_proj.bias": (c,),
        }
        block |= {
            "mlp.c_fc.weight": (4 * c, c),
            "mlp.c_fc.bias": (4 * c,),
            "mlp.c_proj.weight": (c, 4 * c),
            "mlp.c_proj.bias": (c,),
        }
        block |= {
            f"{norm}.{kind}": (c,) for norm in ("ln_1", "ln_2") for kind in ("weight", "bias")
        }
        shapes |= {f"transformer.resblocks.{i}.{name}": shape for name, shape in block.items()}
    shapes = {f"visual.{name}": shape for name, shape in shapes.items()}
    shapes |= {
        f"{text}positional_embedding": (7, 8),
        f"{text}text_projection": (8, 8),
        f"{text}token_embedding.weight": (50, 8),
    }
    shapes |= {
        f"{text}transformer.resblocks.0.ln_1.weight": (8,),
        f"{text}ln_final.bias": (8,),
        "logit_scale": (),
    }
    return {
        name: np.asarray(rng.standard_normal(shape), np.float32) for name, shape in shapes.items()
    }


def mapped(tensors):
    """The image tower without its final norm and projection."""
    return {
        k: t
        for k, t in tensors.items()
        if k.startswith("visual.") and not k.startswith("visual.ln_post") and k != "visual.proj"
    }


@pytest.fixture(autouse=True)
def tiny(monkeypatch):
    """Encoders of four blocks with either activation."""
    gelu = ClipVitConfig(**{**vars(TINY), "activation": "gelu"})
    for name, config in (("tiny", TINY), ("tiny_gelu", gelu)):
        monkeypatch.setitem(
            backbones.ZOO, name, backbones.zoo.Entry(config, "made by a test", "none", 1)
        )


def archive(path, tensors):
    """Saves tensors as the attributes of a tree of scripted modules, as OpenAI's archives hold
    them.
    """
    torch = pytest.importorskip("torch")
    root = torch.nn.Module()
    for name, tensor in tensors.items():
        *parts, leaf = name.split(".")
        module = root
        for part in parts:
            if not hasattr(module, part):
                module.add_module(part, torch.nn.Module())
            module = getattr(module, part)
        module.register_parameter(leaf, torch.nn.Parameter(torch.from_numpy(tensor).half()))
    root.register_buffer("input_resolution", torch.tensor(224))
    torch.jit.save(torch.jit.script(root), str(path))
    return path


@pytest.mark.parametrize("name", ["clip_l14", "clip_b16"])
def test_the_real_keys_are_exactly_those_expected(weights_path, name):
    """At full size: the names and shapes that conversion takes are those of the published image
    tower, no more and no less.
    """
    listed = json.loads(weights_path(f"keys/openai_{name}.json").read_text())["keys"]
    keys = {key: tuple(shape) for key, (shape, _) in listed.items()}
    layout = clip.layouts()[0]
    expected = mapping.source_shapes(models.abstract(name), layout)
    assert expected == mapped(keys)
    for key in keys.keys() - expected.keys():
        assert any(mapping.re.fullmatch(pattern, key) for pattern, _ in layout.left_out), key


@pytest.mark.parametrize(
    ("name", "reduce"),
    [
        ("clip_l14", {1024: 32, 3072: 96, 4096: 128, 768: 8}),
        ("clip_b16", {768: 24, 2304: 72, 3072: 96, 512: 8}),
    ],
)
def test_the_real_keys_convert_and_come_back(command, weights_path, monkeypatch, name, reduce):
    """All real names and blocks with random values at a reduced width: every tensor is used, and
    --reverse gives the same bits.
    """
    real = backbones.entry(name).config
    rng = np.random.default_rng(0)
    small = {49408: 50, 2304: 6, 1536: 6, 2048: 6} | reduce
    listed = json.loads(weights_path(f"keys/openai_{name}.json").read_text())["keys"]
    source = {
        key: np.asarray(rng.standard_normal([small.get(n, n) for n in shape]), np.float32)
        for key, (shape, _) in listed.items()
    }
    narrow = ClipVitConfig(**{**vars(real), "width": reduce[real.width], "heads": 2})
    monkeypatch.setitem(backbones.ZOO, "narrow", backbones.zoo.Entry(narrow, "made by a test"))
    code, report, err, out = command(source, model="narrow")
    assert (code, err) == (0, "")
    assert f"{len(mapped(source))} of {len(source)} tensors mapped (layout: CLIP)" in report
    assert "activation: quick_gelu" in report
    assert weights.metadata(out)["activation"] == "quick_gelu"
    got = weights.tensors(backbones.create("narrow", weights=out))
    x = rng.standard_normal(narrow.width).astype(np.float32)
    fused = source["visual.transformer.resblocks.7.attn.in_proj_weight"] @ x
    np.testing.assert_allclose(x @ got["blocks.7.attn.qkv.kernel"], fused, rtol=1e-4, atol=1e-4)
    np.testing.assert_array_equal(got["norm_pre.bias"], source["visual.ln_pre.bias"])
    np.testing.assert_array_equal(got["cls_token"][0, 0], source["visual.class_embedding"])
    code, _, err, back = command(out, "--reverse", model="narrow", out="back.safetensors")
    assert (code, err) == (0, "")
    assert_identical(load_file(back), mapped(source))


@pytest.mark.parametrize("text", ["", "text."])
def test_files_of_open_clip_convert_for_the_encoder_that_is_named(command, text):
    """Either place of the text tower is left out by name; the activation follows the encoder, is
    reported and recorded.
    """
    source = open_clip_tensors(text)
    for model, activation in (("tiny", "quick_gelu"), ("tiny_gelu", "gelu")):
        code, report, err, out = command(source, model=model, out=f"{model}.safetensors")
        assert (code, err) == (0, "")
        assert f"{text}transformer.resblocks.*.ln_1.weight" in report
        assert f"activation: {activation}, because {model} has it" in report
        assert weights.metadata(out)["activation"] == activation
        backbones.create(model, weights=out)
    with pytest.raises(
        ValueError,
        match=(
            r"tiny.safetensors does not fit this ClipVit: .* converted as tiny for the activation"
            r" quick_gelu"
        ),
    ):
        backbones.create("tiny_gelu", weights=out.parent / "tiny.safetensors")


def test_openais_archives_convert_without_running_them(command, tmp_path):
    """A scripted module's tensors get the names of its state dict; values are equal in float32; the
    setting is left out by name.
    """
    torch = pytest.importorskip("torch")
    source = open_clip_tensors()
    path = archive(tmp_path / "ViT.pt", source)
    state = torch.jit.load(str(path)).state_dict()
    with checkpoint.opened(path) as file:
        assert sorted(file.names) == sorted(state)
        for name in file.names:
            np.testing.assert_array_equal(file.read(name), state[name].numpy(), err_msg=name)
    code, report, err, out = command(path)
    assert (code, err) == (0, "")
    assert "input_resolution (a setting" in report
    _, _, _, back = command(out, "--reverse", out="back.safetensors")
    assert_identical(
        load_file(back),
        mapped(
            {name: tensor.astype(np.float16).astype(np.float32) for name, tensor in source.items()}
        ),
    )
    refused(
        command(path, model="tiny_gelu", out="x.safetensors"), "trained with quick_gelu", "--list"
    )


def test_tensors_of_an_archive_may_be_views(tmp_path):
    """Offsets and strides count: a transposed slice of a storage is read as torch reads it."""
    torch = pytest.importorskip("torch")
    base = torch.arange(60.0).reshape(5, 12)
    path = tmp_path / "views.pt"
    root = torch.nn.Module()
    root.register_buffer("view", base[1:4, 2:8:2].T)
    root.register_buffer("same", base)
    torch.jit.save(torch.jit.script(root), str(path))
    with checkpoint.opened(path) as file:
        np.testing.assert_array_equal(file.read("view"), base[1:4, 2:8:2].T.numpy())
        np.testing.assert_array_equal(file.read("same"), base.numpy())


class Malicious:
    """Runs a command where it is unpickled."""

    def __init__(self, command):
        self.command = command

    def __reduce__(self):
        return os.system, (self.command,)


def test_pickled_code_is_refused_and_not_run(command, tmp_path):
    """An archive whose pickle names a function is refused with the reason, before anything of it is
    run; no torch is needed.
    """
    trace = tmp_path / "ran"
    with zipfile.ZipFile(tmp_path / "evil.pt", "w") as file:
        file.writestr("evil/constants.pkl", pickle.dumps(()))
        file.writestr("evil/data.pkl", pickle.dumps(Malicious(f"touch {trace}"), protocol=2))
    refused(
        command(tmp_path / "evil.pt"),
        "evil.pt is refused: it holds pickled code",
        "system",
        "could run anything",
    )
    assert not trace.exists()


def test_damaged_archives_are_refused(command, tmp_path):
    """Cut short, with flipped bytes in a storage, or with an unreadable pickle: the file (and the
    tensor) is named.
    """
    path = archive(tmp_path / "ViT.pt", open_clip_tensors())
    whole = path.read_bytes()
    (tmp_path / "cut.pt").write_bytes(whole[: len(whole) // 2])
    refused(command(tmp_path / "cut.pt"), "cut.pt cannot be read", "cut short")
    with zipfile.ZipFile(path) as file:
        largest = max(
            (info for info in file.infolist() if "/data/" in info.filename),
            key=lambda info: info.file_size,
        )
        at = largest.header_offset + 200
    flipped = bytearray(whole)
    flipped[at : at + 16] = bytes(byte ^ 255 for byte in flipped[at : at + 16])
    (tmp_path / "flipped.pt").write_bytes(flipped)
    refused(command(tmp_path / "flipped.pt"), "flipped.pt cannot be read at visual.", "CRC")
    with zipfile.ZipFile(tmp_path / "noise.pt", "w") as file:
        file.writestr("noise/constants.pkl", b"")
        file.writestr("noise/data.pkl", b"\x80\x02no pickle")
    refused(command(tmp_path / "noise.pt"), "noise.pt cannot be read")


def test_positions_of_another_grid_are_stored_as_they_are(command):
    """A larger square grid of a 2-d position table is taken, and fitted at load."""
    source = open_clip_tensors()
    source["visual.positional_embedding"] = (
        np.random.default_rng(3).standard_normal((26, WIDTH)).astype(np.float32)
    )
    code, report, err, out = command(source)
    assert (code, err) == (0, "")
    assert "5x5 positions and 1 for tokens without one" in report
    assert weights.tensors(backbones.create("tiny", weights=out))["pos_embed"].shape == (
        1,
        10,
        WIDTH,
    )
    _, _, _, back = command(out, "--reverse", out="back.safetensors")
    assert_identical(load_file(back), mapped(source))


def rename(tensors):
    tensors["visual.ln_before.weight"] = tensors.pop("visual.ln_pre.weight")
    return "1 unknown (visual.ln_before.weight)", "1 missing (visual.ln_pre.weight)"


def drop(tensors):
    del (
        tensors["visual.transformer.resblocks.2.attn.in_proj_bias"],
        tensors["visual.class_embedding"],
    )
    return ("2 missing (visual.class_embedding, visual.transformer.resblocks.2.attn.in_proj_bias)",)


def add(tensors):
    tensors |= {
        "visual.conv1.bias": np.ones(WIDTH, np.float32),
        "visual.transformer.resblocks.0.ls_1.gamma": np.ones(WIDTH, np.float32),
    }
    return ("2 unknown (visual.conv1.bias, visual.transformer.resblocks.0.ls_1.gamma)",)


def transpose(tensors):
    for name in ("visual.transformer.resblocks.1.mlp.c_fc.weight", "visual.positional_embedding"):
        tensors[name] = np.ascontiguousarray(tensors[name].T)
    return (
        "2 of another shape",
        "resblocks.1.mlp.c_fc.weight is (16, 64), not (64, 16)",
        "positional_embedding is (16, 10), not (10, 16)",
    )


def misshape(tensors):
    tensors["visual.class_embedding"] = np.ones((1, 1, WIDTH), np.float32)
    tensors["visual.positional_embedding"] = np.ones((1, 10, WIDTH), np.float32)
    tensors["visual.transformer.resblocks.3.attn.in_proj_weight"] = np.ones(
        (WIDTH, WIDTH), np.float32
    )
    return (
        "3 of another shape",
        "class_embedding is (1, 1, 16), not (16,)",
        "positional_embedding is (1, 10, 16), not (10, 16)",
        "in_proj_weight is (16, 16), not (48, 16)",
    )


def halve(tensors):
    for name in [
        name
        for name in tensors
        if "visual" in name and (".resblocks.2." in name or ".resblocks.3." in name)
    ]:
        del tensors[name]
    return (
        "24 missing",
        "visual.transformer.resblocks.2.ln_1.bias",
        "visual.transformer.resblocks.2.ln_1.weight",
    )


def as_text_only(tensors):
    for name in [name for name in tensors if "visual" in name]:
        del tensors[name]
    return "53 missing", "of whose 53 tensors 0 fit", "visual.conv1.weight"


def as_eva02(tensors):
    tensors.clear()
    tensors |= {
        name: np.ones(WIDTH, np.float32)
        for name in ("visual.cls_token", "visual.blocks.0.attn.q_bias")
    }
    return (
        "of whose 53 tensors 0 fit",
        "2 unknown (visual.blocks.0.attn.q_bias, visual.cls_token)",
        "53 missing",
    )


@pytest.mark.parametrize(
    "damage",
    [rename, drop, add, transpose, misshape, halve, as_text_only, as_eva02],
    ids=lambda f: f.__name__,
)
def test_what_does_not_fit_is_refused_whole(command, damage):
    """Every offender is named, in the source's own names and shapes, and nothing is written."""
    tensors = open_clip_tensors()
    offenders = damage(tensors)
    refused(command(tensors), "source.safetensors is no checkpoint of tiny", *offenders)


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16], ids=["float16", "bfloat16"])
def test_half_precision_becomes_float32_of_equal_values(command, dtype):
    """Widening is exact for both half formats."""
    half = {name: tensor.astype(dtype) for name, tensor in open_clip_tensors().items()}
    code, _, err, out = command(half)
    assert (code, err) == (0, "")
    _, _, _, back = command(out, "--reverse", out="back.safetensors")
    assert_identical(
        load_file(back), mapped({name: tensor.astype(np.float32) for name, tensor in half.items()})
    )
