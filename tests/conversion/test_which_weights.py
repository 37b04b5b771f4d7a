"""Which weights of a file are taken, what is around them, and what a file is that holds none.

Nothing here needs torch.
"""

import argparse
from collections import OrderedDict
import contextlib
import datetime
import gzip
import io
import json
import os
from pathlib import Path
import pickle
import re
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from jaxdg import backbones, weights
from jaxdg.backbones import zoo
from jaxdg.conversion import checkpoint, mapping, models
from jaxdg.conversion import convert as torch_to_flax
from tests.conversion.checks import Evil, assert_identical, converted, find_shapes_once, refused
from tests.conversion.torch_files import torch_file

WIDTH = 32
DEPTH = 2
GRID = 3
PATCH = 4


@pytest.fixture(autouse=True, scope="module")
def shapes_found_once():
    with pytest.MonkeyPatch.context() as patch:
        find_shapes_once(patch)
        yield


@pytest.fixture(autouse=True)
def tiny(monkeypatch):
    """The encoder `tiny`, and one of each family that other names fit, as all that there are."""
    sizes: dict[str, Any] = dict(
        image_size=(12, 12), patch_size=PATCH, width=WIDTH, depth=DEPTH, heads=4, taps=(0, 1)
    )
    b = backbones
    configs = dict(
        tiny=b.VitConfig(**sizes),
        wide=b.VitConfig(**{**sizes, "width": 2 * WIDTH}),
        moco=b.MocoV3Config(**sizes, mean=(0.4, 0.4, 0.4)),
        clip=b.ClipVitConfig(**sizes),
        siglip=b.SiglipConfig(**sizes),
        dinov2=b.Dinov2Config(**sizes, registers=4),
        mit=b.MitConfig(blocks=(1, 1, 1, 1), widths=(8, 16, 16, 16), heads=(1, 1, 2, 2)),
    )
    monkeypatch.setattr(b, "ZOO", entries := {})
    monkeypatch.setattr(zoo, "ZOO", entries)
    for name, config in configs.items():
        entries[name] = zoo.Entry(config, "made by a test", "none", 1)


def of(name, layout=None, seed=0):
    """A random file of an encoder in one of its layouts, by default the first."""
    table = next(known for known in models.layouts(name) if layout in (None, known.name))
    rng = np.random.default_rng(seed)
    shapes = mapping.source_shapes(models.abstract(name), table)
    return {key: rng.standard_normal(shape).astype(np.float32) for key, shape in shapes.items()}


def behind(prefix, tensors):
    return {prefix + name: tensor for name, tensor in tensors.items()}


def kernel(path):
    return load_file(path)["blocks.1.mlp.fc1.kernel"]


PAIRS = {  # what lies beside what, as training programs write it: raw, then average
    "timm": lambda raw, ema: {
        "state_dict": raw,
        "state_dict_ema": ema,
        "optimizer": {"state": {0: {"exp_avg": raw["pos_embed"]}}},
    },
    "deit": lambda raw, ema: {"model": raw, "model_ema": ema, "args": argparse.Namespace(lr=1e-3)},
    "basicsr": lambda raw, ema: {"params": raw, "params_ema": ema},
    "dino": lambda raw, ema: {
        "student": behind("module.backbone.", raw),
        "teacher": behind("backbone.", ema),
        "c": ema["cls_token"],
    },
    "detr": lambda raw, ema: {"ema": {"module": ema, "updates": 5}, "model": raw},
    "nested": lambda raw, ema: {"model": {"state_dict": raw}, "model_ema": {"state_dict": ema}},
    "lightning": lambda raw, ema: {
        "state_dict": behind("model.", raw) | behind("ema_model.", ema),
        "hyper_parameters": {"lr": 1},
    },
    "one dictionary": lambda raw, ema: {
        **behind("student.backbone.", raw),
        **behind("teacher.backbone.", ema),
        "head.w": raw["cls_token"],
    },
    "mmengine": lambda raw, ema: {
        "meta": {},
        "message_hub": {},
        "state_dict": ema,
        "ema_state_dict": behind("module.", raw),
    },
}


@pytest.mark.parametrize("program", PAIRS)
def test_trained_weights_and_their_average_are_told_apart(command, tmp_path, program):
    """A file with both is refused until --weights says which; then these are written, and the
    report names them and the others.
    """
    raw = of("tiny")
    ema = of("tiny", seed=1)
    path = torch_file(tmp_path / "last.pth", PAIRS[program](raw, ema))
    for model in ("tiny", None):
        refused(
            command(path, model=model),
            "last.pth",
            "2 sets of weights",
            "say --weights ema or --weights raw",
        )
    for wanted, tensors in (("ema", ema), ("raw", raw)):
        code, report, err, out = command(path, "--weights", wanted, out=f"{wanted}.safetensors")
        assert (code, err) == (0, "")
        np.testing.assert_array_equal(kernel(out), tensors["blocks.1.mlp.fc1.weight"].T)
        assert "beside them" in report or "taken off names" in report
        assert weights.metadata(out)["taken"] in report.replace("\n  ", "; ")


def test_one_set_needs_no_choice(command, tmp_path):
    """A release that holds the average alone is taken and said; a choice that it cannot answer is
    refused; sets can be named.
    """
    raw = of("tiny")
    ema = of("tiny", seed=1)
    path = torch_file(tmp_path / "ema.pth", {"state_dict_ema": ema, "epoch": 3})
    code, report, _, out = command(path)
    assert code == 0
    assert (
        "weights: state_dict_ema (28 tensors, an average over the training); beside them in the"
        " file: epoch" in report
    )
    assert_identical(load_file(out), load_file(converted(command(ema, out="plain.safetensors"))))
    assert command(path, "--weights", "ema", out="again.safetensors")[0] == 0
    refused(
        command(path, "--weights", "raw", out="x.safetensors"),
        "ema.pth holds one set of weights",
        "leave --weights raw out",
    )
    refused(command(raw, "--weights", "ema", out="x.safetensors"), "no average over the training")
    path = torch_file(tmp_path / "two.pth", {"model": raw, "state_dict": ema})
    refused(
        command(path, out="x.safetensors"),
        "2 sets of weights",
        "say --weights with one of model, state_dict",
    )
    np.testing.assert_array_equal(
        kernel(command(path, "--weights", "state_dict", out="two.safetensors")[3]),
        ema["blocks.1.mlp.fc1.weight"].T,
    )
    refused(
        command(path, "--weights", "modle", out="x.safetensors"),
        "no set of weights called 'modle'",
        "model (28 tensors",
    )


def wrapped_inside(tensors):
    return {
        re.sub(r"^(blocks\.\d+)\.", r"\1._checkpoint_wrapped_module.", name): tensor
        for name, tensor in tensors.items()
    }


WRAPPERS = {
    "module.": "module.",
    "_orig_mod.": "_orig_mod.",
    "module._orig_mod.": "module._orig_mod.",
    "model.": "model.",
    "backbone.": "backbone.",
    "encoder.": "encoder.",
    "net.": "net.",
    "model.backbone.": "model.backbone.",
    "student.backbone.": "student.backbone.",
    "_forward_module.": "_forward_module.",
    "_fsdp_wrapped_module.": "_fsdp_wrapped_module.",
    "_fsdp_wrapped_module.module.": "_fsdp_wrapped_module.module.",
}


@pytest.mark.parametrize("prefix", [*WRAPPERS, "inside"])
def test_wrappers_are_taken_off_and_told(command, prefix):
    """The file converts to the same bits as without its wrapper, with --model and without; other
    parts are left out by name.
    """
    source = of("tiny")
    alone = load_file(converted(command(source, out="alone.safetensors")))
    beside = {
        "head.weight": np.ones((3, WIDTH), np.float32),
        "decode_head.conv.weight": np.ones(3, np.float32),
    }
    wrapped = wrapped_inside(source) if prefix == "inside" else behind(prefix, source) | beside
    for model in ("tiny", None):
        code, report, err, out = command(wrapped, model=model)
        if model is None and code == 1:
            assert "those of tiny and of moco" in err, "which share all tensors"
            continue
        assert (code, err) == (0, "")
        assert_identical(load_file(out), alone)
        assert "taken off names: " in report
        assert prefix == "inside" or "decode_head.conv.weight" in report


def test_names_that_a_wrapper_sets_apart_are_never_merged(command):
    """`module.x` and `x` in one file: refused, whether one or all are there twice, and also inside
    names.
    """
    source = of("tiny")
    refused(
        command(behind("module.", source) | {"cls_token": source["cls_token"]}),
        "with and without module. (module.cls_token)",
    )
    refused(
        command(behind("module.", source) | source),
        "2 sets of weights",
        "module. (28 tensors)",
        "no prefix (28 tensors)",
    )
    refused(
        command(wrapped_inside(source) | {"blocks.0.norm1.bias": np.ones(WIDTH, np.float32)}),
        "blocks.0.norm1.bias",
        "one name without _checkpoint_wrapped_module.",
    )


def test_names_of_another_model_are_not_made_to_fit(command):
    """MoCo-v3's base encoder has all tensors of `tiny` behind a prefix, and reads images by other
    statistics: its name is asked for.
    """
    source = of("moco", "MoCo-v3")
    refused(command(source), "its names are those of moco", "say that with --model")
    assert command(source, model=None)[1].startswith("moco from")


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_what_is_no_number_is_refused(command, value):
    """NaN and infinite values are told by tensor, in every precision, on the way here and back, and
    when a converted file is loaded.
    """
    source = of("tiny")
    out = converted(command(source))
    for dtype in (np.float32, np.float16, ml_dtypes.bfloat16, np.float64):
        bad = source["blocks.1.norm1.bias"].astype(dtype)
        bad[3] = value
        refused(
            command(source | {"blocks.1.norm1.bias": bad}, out="x.safetensors"),
            "blocks.1.norm1.bias: ",
            "of 32",
        )
    tensors = load_file(out)
    tensors["blocks.0.mlp.fc1.kernel"][2, 5] = value
    bad = out.with_name("bad.safetensors")
    weights.save(tensors, bad, weights.metadata(out))
    refused(
        command(bad, "--reverse", out="back.npz"), "bad.safetensors", "blocks.0.mlp.fc1.kernel: "
    )
    with pytest.raises(
        ValueError,
        match=r"bad.safetensors holds 1 tensors with .* \(blocks.0.mlp.fc1.kernel: .* of 4096\)",
    ):
        backbones.create("tiny", weights=bad)


def test_numbers_too_large_for_float32_are_refused(command):
    """float64 beyond float32 would become infinite."""
    source = of("tiny")
    refused(
        command(source | {"cls_token": source["cls_token"].astype(np.float64) * 1e300}),
        "cls_token: 0 NaN and 32 infinite of 32",
    )


class Settings:
    """As a user's own class."""

    def __init__(self):
        self.lr = 1e-3

    def __reduce__(self):
        return type(self), ()


@pytest.mark.parametrize("where", ["zip", "pickle"])
def test_what_lies_beside_the_tensors_is_passed_over(command, tmp_path, where):
    """Namespaces, paths, dates, numbers, sets and objects of classes that nobody has: the tensors
    convert, and nothing is built.
    """
    source = of("tiny")
    beside = {
        "args": argparse.Namespace(
            out=Path("runs"), when=datetime.datetime(2026, 1, 2), lr=np.float64(1e-3)
        ),
        "folder": Path("/data"),
        "best": np.float32(3.5),
        "seen": {1, 2},
        "config": Settings(),
        "counts": OrderedDict(a=1),
        "shape": np.arange(3),
    }
    content = {**beside, "state_dict": source}
    if where == "zip":
        path = torch_file(tmp_path / "last.ckpt", content)
    else:
        path = tmp_path / "last.pkl"
        path.write_bytes(pickle.dumps(content).replace(b"Settings", b"Nobodys_"))
    code, report, err, out = command(path)
    assert (code, err) == (0, "")
    assert "beside them in the file: args, folder" in report
    assert_identical(load_file(out), load_file(converted(command(source, out="alone.safetensors"))))


def test_code_beside_the_tensors_is_refused_and_not_run(command, tmp_path):
    """A command in a torch file refuses it by name, wherever it stands, without torch."""
    for i, content in enumerate(
        (
            {"state_dict": of("tiny"), "args": Evil(tmp_path / "ran")},
            {"state_dict": {"x": Evil(tmp_path / "ran")}},
        )
    ):
        path = torch_file(tmp_path / f"evil{i}.pth", content)
        refused(command(path), f"evil{i}.pth is refused", "pickled code", "mkdir")
    assert not (tmp_path / "ran").exists()


def shards(folder, tensors, files=3):
    """A model in several files, as it is downloaded."""
    folder.mkdir()
    places = {}
    names = sorted(tensors)
    for i in range(files):
        part = {name: tensors[name] for name in names[i::files]}
        file = f"model-{i + 1:05d}-of-{files:05d}.safetensors"
        save_file(part, folder / file)
        places |= dict.fromkeys(part, file)
    (folder / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {"total_size": 1}, "weight_map": places})
    )
    return folder


def test_shards_are_read_as_one(command, tmp_path):
    """By the index, the folder or any one of the files: the bits of the whole; the sha256 of every
    file is kept.
    """
    source = of("tiny")
    whole = load_file(converted(command(source, out="whole.safetensors")))
    folder = shards(tmp_path / "hub", source)
    for i, path in enumerate(
        (
            folder / "model.safetensors.index.json",
            folder,
            folder / "model-00002-of-00003.safetensors",
        )
    ):
        code, report, err, out = command(path, out=f"{i}.safetensors")
        assert (code, err) == (0, "")
        assert "read from 3 files by model.safetensors.index.json" in report
        assert_identical(load_file(out), whole)
        digests = json.loads(weights.metadata(out)["sha256"])
        assert len(digests) == 4
        assert {len(digest) for digest in digests.values()} == {64}


def test_shards_that_do_not_belong_together_are_refused(command, tmp_path):
    """Missing files, an index that says otherwise than they do, no index, and files elsewhere:
    named.
    """
    folder = shards(tmp_path / "hub", of("tiny"))
    index = folder / "model.safetensors.index.json"
    good = json.loads(index.read_text())
    good["weight_map"]["cls_token"] = "model-00001-of-00003.safetensors"
    moved = good["weight_map"] | {
        "pos_embed": "model-00001-of-00003.safetensors",
        "gone": "model-00002-of-00003.safetensors",
    }
    index.write_text(json.dumps({"weight_map": moved}))
    refused(command(index), "do not agree", "gone")
    index.write_text(json.dumps({"weight_map": {"x": "../../secret.safetensors"}}))
    refused(command(index), "outside of its folder")
    index.write_text(json.dumps({"weights": 3}))
    refused(command(index), "no weight_map")
    index.write_text(json.dumps(good))
    (folder / "model-00003-of-00003.safetensors").unlink()
    refused(command(folder), "1 of them are not beside it: model-00003-of-00003.safetensors")
    index.unlink()
    refused(
        command(folder / "model-00001-of-00003.safetensors"), "one of several files", index.name
    )
    refused(command(folder), "is a folder without model.safetensors")


FOREIGN = {
    "pointer.safetensors": (
        b"version https://git-lfs.github.com/spec/v1\noid sha256:1\nsize 3\n",
        "a pointer of git-lfs",
    ),
    "pointer.pth": (
        b"version https://git-lfs.github.com/spec/v1\noid sha256:1\nsize 3\n",
        "a pointer of git-lfs",
    ),
    "page.pth": (b"\n<!DOCTYPE html><html>", "a page of text"),
    "page.safetensors": (b'{"error": "Invalid username or password."}', "a page of text"),
    "model.gguf": (b"GGUF\x03\0\0\0", "GGUF"),
    "model.bin": (b"GGUF\x03\0\0\0", "GGUF"),
    "model.onnx": (b"\x08\x07\x12\x07pytorch", "ONNX"),
    "model.h5": (b"\x89HDF\r\n\x1a\n", "HDF5"),
    "model.pth": (gzip.compress(b"x"), "gunzip"),
    "empty.pth": (b"", "0 bytes"),
    "empty.safetensors": (b"", "0 bytes"),
}


@pytest.mark.parametrize("name", FOREIGN)
def test_what_is_no_checkpoint_is_told_by_kind(command, tmp_path, name):
    """Pointers, pages, other programs' formats, archives and empty files: one line that says what
    it is.
    """
    content, words = FOREIGN[name]
    (tmp_path / name).write_bytes(content)
    refused(command(tmp_path / name), name, words)


def test_quantised_weights_are_refused_with_a_way_forward(command, tmp_path):
    """float8 and int8 tensors need scales that a layout does not have: the file of the original
    precision is asked for.
    """
    source = of("tiny")
    name = "blocks.0.mlp.fc1.weight"
    small = source[name].astype(ml_dtypes.float8_e4m3fn)
    refused(
        command(source | {name: small}),
        f"holds, at {name}, numbers of 8 bits or fewer, F8_E4M3",
        "take the file of float16",
    )
    quantised = source | {
        name: source[name].astype(np.int8),
        "blocks.0.mlp.fc1.weight_scale": np.ones(1, np.float32),
    }
    refused(
        command(quantised),
        f"{name} holds int8",
        "1 unknown (blocks.0.mlp.fc1.weight_scale)",
        "quantised",
    )


def test_what_torch_makes_of_other_tensors_is_told(command, tmp_path):
    """Sparse, quantised, complex and float8 tensors of torch itself, a tensor without numbers,
    whole modules: one line that says so.
    """
    torch = pytest.importorskip("torch")
    state = {key: torch.from_numpy(tensor) for key, tensor in of("tiny").items()}
    name = "blocks.0.mlp.fc1.weight"
    for kind, tensor, words in (
        ("sparse", state[name].to_sparse(), (name, "a kind that is not read (sparse_tensor)")),
        ("complex", state[name].to(torch.complex64), (name, "a kind that is not read")),
        (
            "meta",
            state[name].to("meta"),
            (name, "a kind that is not read (meta_tensor_no_storage)"),
        ),
        (
            "float8",
            state[name].to(torch.float8_e4m3fn),
            (f"{name} holds float8_e4m3fn", "quantised"),
        ),
    ):
        torch.save(state | {name: tensor}, tmp_path / f"{kind}.pth")
        refused(command(tmp_path / f"{kind}.pth"), f"{kind}.pth", *words)
    for new in (True, False):
        torch.save(
            torch.nn.Linear(2, 2), tmp_path / "module.pth", _use_new_zipfile_serialization=new
        )
        refused(
            command(tmp_path / "module.pth"),
            "module.pth is refused: it holds a whole torch.nn.modules.linear.Linear",
        )
    torch.save({"model": torch.nn.Linear(2, 2), "ema": None}, tmp_path / "inside.pth")
    refused(
        command(tmp_path / "inside.pth"),
        "whole modules",
        "model is a torch.nn.modules.linear.Linear",
    )


def test_what_torch_saves_is_read_without_it(command, tmp_path):
    """Both formats, parameters, views of one storage, half precision, settings and an optimiser
    beside: the bits that torch saved.
    """
    torch = pytest.importorskip("torch")
    source = of("tiny")
    source["cls_token"] = np.arange(100, dtype=np.float32)[4:36].reshape(1, 1, 32)
    state = {key: torch.nn.Parameter(torch.from_numpy(tensor)) for key, tensor in source.items()}
    state["cls_token"] = torch.arange(100.0)[4:36].reshape(1, 1, 32)
    state["patch_embed.proj.weight"] = torch.from_numpy(
        np.ascontiguousarray(source["patch_embed.proj.weight"].T)
    ).permute(3, 2, 1, 0)
    linear = torch.nn.Linear(2, 2)
    optimizer = torch.optim.Adam(linear.parameters())
    linear(torch.ones(2)).sum().backward()
    optimizer.step()
    beside = {
        "args": argparse.Namespace(out=Path("x"), device=torch.device("cpu")),
        "optimizer": optimizer.state_dict(),
        "rng": torch.get_rng_state(),
    }
    expected = load_file(converted(command(source, out="expected.safetensors")))
    for new in (True, False):
        torch.save(
            beside | {"model": state}, tmp_path / "last.pth", _use_new_zipfile_serialization=new
        )
        code, report, err, out = command(tmp_path / "last.pth")
        assert (code, err) == (0, "")
        assert "beside them in the file: args, optimizer, rng" in report
        assert_identical(load_file(out), expected)


def test_out_never_replaces_what_jaxdg_did_not_write(command, tmp_path):
    """The checkpoint itself, also through links; another's file; one of another model; a folder.

    Its own output is written again.
    """
    source = of("tiny")
    save_file(source, tmp_path / "source.safetensors")
    path = tmp_path / "source.safetensors"
    before = path.read_bytes()
    (tmp_path / "link.safetensors").symlink_to(path)
    os.link(path, tmp_path / "hard.safetensors")
    (tmp_path / "folder.safetensors").mkdir()
    save_file({"x": np.ones(2, np.float32)}, tmp_path / "other.safetensors")
    (tmp_path / "notes.safetensors").write_text("mine")
    for model in ("tiny", None):
        for out, words in (
            ("source", "which would be lost"),
            ("link", "which would be lost"),
            ("hard", "which would be lost"),
            ("folder", "is a folder"),
            ("other", "nothing tells that jaxdg wrote it"),
            ("notes", "nothing tells that jaxdg wrote it"),
        ):
            arguments = ["--checkpoint", str(path), "--out", str(tmp_path / f"{out}.safetensors")]
            code, _, err = run(arguments + (["--model", model] if model else []))
            assert code == 1
            assert words in err
    assert path.read_bytes() == before
    assert (tmp_path / "notes.safetensors").read_text() == "mine"
    for _ in range(2):
        assert command(path)[0] == 0
    wide = of("wide")
    _, _, err, _ = command(wide, model="wide")
    assert "is there already, with the weights of tiny" in err
    _, _, err, out = command(tmp_path / "out.safetensors", "--reverse", out="out.safetensors")
    assert "which would be lost" in err
    (tmp_path / "back.npz").write_bytes(b"mine")
    assert "is there already" in command(out, "--reverse", out="back.npz")[2]
    assert (tmp_path / "back.npz").read_bytes() == b"mine"


def run(arguments):
    """The command by its arguments alone."""
    with (
        contextlib.redirect_stdout(io.StringIO()) as out,
        contextlib.redirect_stderr(io.StringIO()) as err,
    ):
        code = torch_to_flax.main(arguments)
    return code, out.getvalue(), err.getvalue()


def attention(block, parts, ending=""):
    return {
        f"{block}{part}{ending}.{kind}": (WIDTH, WIDTH)[: 2 - (kind == "bias")]
        for part in parts
        for kind in ("weight", "bias")
    }


def affine(*names):
    return {f"{name}.{kind}": (WIDTH,) for name in names for kind in ("weight", "bias")}


def mlp(first, second):
    wide = 4 * WIDTH
    return {
        f"{first}.weight": (wide, WIDTH),
        f"{first}.bias": (wide,),
        f"{second}.weight": (WIDTH, wide),
        f"{second}.bias": (WIDTH,),
    }


def blocks(prefix, parts):
    return {f"{prefix}.{i}.{name}": shape for i in range(DEPTH) for name, shape in parts.items()}


VISION = blocks(
    "encoder.layers",
    affine("layer_norm1", "layer_norm2")
    | attention("self_attn.", ("q_proj", "k_proj", "v_proj", "out_proj"))
    | mlp("mlp.fc1", "mlp.fc2"),
)
HF_CLIP = VISION | affine("pre_layrnorm", "post_layernorm") | {
    "embeddings.class_embedding": (WIDTH,),
    "embeddings.patch_embedding.weight": (WIDTH, 3, PATCH, PATCH),
    "embeddings.position_embedding.weight": (1 + GRID**2, WIDTH),
}  # fmt: skip
HF_SIGLIP = VISION | affine("post_layernorm") | {
    "embeddings.patch_embedding.weight": (WIDTH, 3, PATCH, PATCH),
    "embeddings.patch_embedding.bias": (WIDTH,),
    "embeddings.position_embedding.weight": (GRID**2, WIDTH),
    "head.probe": (1, 1, WIDTH),
    "head.attention.in_proj_weight": (3 * WIDTH, WIDTH),
}  # fmt: skip
START = {
    "embeddings.cls_token": (1, 1, WIDTH),
    "embeddings.patch_embeddings.projection.weight": (WIDTH, 3, PATCH, PATCH),
    "embeddings.patch_embeddings.projection.bias": (WIDTH,),
    "embeddings.position_embeddings": (1, 1 + GRID**2, WIDTH),
}
APART = attention("attention.attention.", ("query", "key", "value")) | attention(
    "attention.", ("output",), ".dense"
)
HF_VIT_BLOCK = (
    APART
    | affine("layernorm_before", "layernorm_after")
    | mlp("intermediate.dense", "output.dense")
)
HF_VIT = START | affine("layernorm") | blocks("encoder.layer", HF_VIT_BLOCK)
SCALES = {"layer_scale1.lambda1": (WIDTH,), "layer_scale2.lambda1": (WIDTH,)}
HF_DINOV2_BLOCK = APART | affine("norm1", "norm2") | SCALES | mlp("mlp.fc1", "mlp.fc2")
HF_DINOV2 = {
    **START,
    **affine("layernorm"),
    "embeddings.mask_token": (1, WIDTH),
    "embeddings.register_tokens": (1, 4, WIDTH),
    **blocks("encoder.layer", HF_DINOV2_BLOCK),
}
TIMM_CLIP = affine("norm_pre", "norm") | {
    "cls_token": (1, 1, WIDTH),
    "pos_embed": (1, 1 + GRID**2, WIDTH),
    "patch_embed.proj.weight": (WIDTH, 3, PATCH, PATCH),
    "head.weight": (8, WIDTH),
} | blocks(
    "blocks",
    affine("norm1", "norm2") | mlp("mlp.fc1", "mlp.fc2") | attention("attn.", ("proj",))
    | {"attn.qkv.weight": (3 * WIDTH, WIDTH), "attn.qkv.bias": (3 * WIDTH,)},
)  # fmt: skip
CLASSIFIER = {"classifier.weight": (3, WIDTH), "classifier.bias": (3,)}
SAVED = {  # by class: what transformers 5.24 (timm 1.0) saves
    "CLIPVisionModel": ("clip", HF_CLIP),
    "CLIPVisionModelWithProjection": (
        "clip",
        behind("vision_model.", HF_CLIP) | {"visual_projection.weight": (16, WIDTH)},
    ),
    "CLIPForImageClassification": ("clip", behind("vision_model.", HF_CLIP) | CLASSIFIER),
    "CLIPModel": (
        "clip",
        behind("vision_model.", HF_CLIP) | behind("text_model.", VISION) | {"logit_scale": ()},
    ),
    "SiglipVisionModel": ("siglip", HF_SIGLIP),
    "SiglipForImageClassification": ("siglip", behind("vision_model.", HF_SIGLIP) | CLASSIFIER),
    "SiglipModel": (
        "siglip",
        behind("vision_model.", HF_SIGLIP) | behind("text_model.", VISION) | {"logit_scale": (1,)},
    ),
    "ViTModel": (
        "tiny",
        HF_VIT | {"pooler.dense.weight": (WIDTH, WIDTH), "pooler.dense.bias": (WIDTH,)},
    ),
    "ViTForImageClassification": ("tiny", behind("vit.", HF_VIT) | CLASSIFIER),
    "Dinov2WithRegistersModel": ("dinov2", HF_DINOV2),
    "Dinov2WithRegistersForImageClassification": (
        "dinov2",
        behind("dinov2_with_registers.", HF_DINOV2) | CLASSIFIER,
    ),
    "timm CLIP": ("clip", TIMM_CLIP),
}


@pytest.mark.parametrize("name", SAVED)
def test_what_transformers_and_timm_save_converts(command, name):
    """Names and shapes as the class writes them: every tensor lands, fused projections hold
    queries, keys and values in this order.
    """
    encoder, shapes = SAVED[name]
    rng = np.random.default_rng(0)
    source = {key: rng.standard_normal(shape).astype(np.float32) for key, shape in shapes.items()}
    code, _, err, out = command(source, model=encoder)
    assert (code, err) == (0, "")
    got = load_file(out)

    def find(pattern):
        return next(
            tensor
            for key, tensor in source.items()
            if re.search(pattern, key) and "text_model" not in key
        )

    patches = find(r"(patch_embedding|patch_embeddings\.projection|patch_embed\.proj)\.weight$")
    np.testing.assert_array_equal(got["patch_embed.proj.kernel"], patches.transpose(2, 3, 1, 0))
    np.testing.assert_array_equal(
        got["blocks.0.norm2.bias"], find(r"\.0\.(layer_norm2|layernorm_after|norm2)\.bias$")
    )
    np.testing.assert_array_equal(
        got["blocks.0.mlp.fc2.kernel"], find(r"\.0\.(mlp\.fc2|output\.dense)\.weight$").T
    )
    if name == "timm CLIP":
        np.testing.assert_array_equal(
            got["blocks.1.attn.qkv.kernel"], source["blocks.1.attn.qkv.weight"].T
        )
        np.testing.assert_array_equal(got["norm_pre.scale"], source["norm_pre.weight"])
        return
    parts = [
        find(rf"\.1\.(self_attn\.{part[0]}_proj|attention\.attention\.{part})\.weight$").T
        for part in ("query", "key", "value")
    ]
    np.testing.assert_array_equal(got["blocks.1.attn.qkv.kernel"], np.concatenate(parts, axis=1))


def test_the_config_beside_a_file_tells_what_tensors_do_not(command, tmp_path):
    """A config.json of transformers: MAE's encoder is no plain vision transformer, and an
    activation is not taken for the other.
    """
    rng = np.random.default_rng(0)
    for name, config, words in (
        ("ViTModel", {"model_type": "vit_mae"}, "config.json beside it says vit_mae"),
        ("ViTModel", {"model_type": "dinov2"}, "config.json beside it says dinov2"),
        (
            "CLIPVisionModel",
            {"model_type": "clip_vision_model", "hidden_act": "gelu"},
            "says hidden_act gelu, and clip computes quick_gelu",
        ),
        (
            "CLIPModel",
            {"model_type": "clip", "vision_config": {"hidden_act": "gelu"}},
            "says hidden_act gelu",
        ),
        ("ViTModel", {"model_type": "vit"}, None),
        ("CLIPModel", {"model_type": "clip", "vision_config": {"hidden_act": "quick_gelu"}}, None),
        ("CLIPModel", {"architectures": ["anything"]}, None),
    ):
        encoder, shapes = SAVED[name]
        folder = tmp_path / f"{len(list(tmp_path.iterdir()))}"
        folder.mkdir()
        (folder / "config.json").write_text(json.dumps(config))
        save_file(
            {key: rng.standard_normal(shape).astype(np.float32) for key, shape in shapes.items()},
            folder / "model.safetensors",
        )
        result = command(folder, model=encoder, out=f"out_{folder.name}.safetensors")
        if words:
            refused(result, words)
        else:
            converted(result)


@pytest.mark.parametrize("prefix", ["", "encoder.", "model.segformer.encoder."])
def test_segformers_encoder_alone_converts(command, prefix):
    """SegformerModel saves it without `segformer.`; what is built around it puts more before it."""
    source = of("mit", "transformers")
    moved = {name.replace("segformer.encoder.", prefix): tensor for name, tensor in source.items()}
    assert moved.keys() != source.keys()
    assert_identical(
        load_file(converted(command(moved, model="mit"))),
        load_file(converted(command(source, model="mit", out="x.safetensors"))),
    )


def test_another_size_is_told_by_name(command):
    """A file of the same family and another width: the name that would fit is in the error."""
    refused(
        command(of("wide"), model="tiny"),
        "no checkpoint of tiny, it is one of wide",
        "of another shape",
    )


def test_a_converted_file_is_not_converted_again(command):
    """One that is given as a checkpoint is told as such; a published one on the way back too."""
    out = converted(command(of("tiny")))
    refused(command(out, out="x.safetensors"), "it is converted already, as tiny")
    refused(command(out, model=None, out="x.safetensors"), "it is converted already, as tiny")
    refused(
        command(of("tiny"), "--reverse", out="x.npz"),
        "a published file is converted without --reverse",
    )


def test_loading_says_what_a_file_is(command, tmp_path):
    """Published files, folders and files of other encoders, given as weights: what they are, and
    what to do.
    """
    out = converted(command(of("tiny")))
    source = tmp_path / "source.safetensors"
    with pytest.raises(
        ValueError,
        match=r"source.safetensors does not fit .*jaxdg convert --checkpoint .*source.safetensors",
    ):
        backbones.create("tiny", weights=source)
    path = torch_file(tmp_path / "last.pth", of("tiny"))
    with pytest.raises(
        ValueError,
        match=(
            r"last.pth is a .pth file and no converted one.*jaxdg convert --checkpoint .*last.pth"
        ),
    ):
        backbones.create("tiny", weights=path)
    with pytest.raises(ValueError, match=r"is a folder"):
        backbones.create("tiny", weights=tmp_path)
    with pytest.raises(
        ValueError, match=r"does not fit this Vit: .*; it holds the weights of tiny$"
    ):
        backbones.create("wide", weights=out)
    with pytest.raises(
        ValueError,
        match=r"holds the weights of tiny, and the encoder is moco: set model.encoder=tiny",
    ):
        backbones.create("moco", weights=out)
    backbones.create("tiny", weights=out, image_size=(24, 24), taps=(1,))


def test_a_checkpoint_can_be_read_of_both_kinds_of_tensors(tmp_path):
    """Arrays of NumPy in a file of torch are read beside its tensors."""
    content = {"model": {"a": np.ones((2, 3), np.float32), "b": np.arange(4)}}
    with checkpoint.opened(torch_file(tmp_path / "mixed.pth", content)) as file:
        assert file.names == ["a", "b"]
        np.testing.assert_array_equal(file.read("a"), np.ones((2, 3)))
        np.testing.assert_array_equal(file.read("b"), np.arange(4))
