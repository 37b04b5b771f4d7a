"""The conversion command: what it takes, what it refuses, and that nothing is lost on the way there
and back.
"""

import json
import os
import pickle
import resource
import subprocess
import sys

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import jaxdg
from jaxdg import backbones, weights
from jaxdg.conversion import checkpoint, mapping, models, vit
from jaxdg.conversion import convert as torch_to_flax
from tests.conversion.checks import Evil, assert_identical, find_shapes_once, refused

REAL_SHA256 = "3f1f07da5e1337265ac1eb0234d13841467caf730b3c4240bd3f98c49bc16a92"
WIDTH = 32
HEADS = 4
GRID = 3


def timm_tensors(depth: int, seed: int = 0) -> dict[str, np.ndarray]:
    """A random checkpoint as timm names it, written out by hand."""
    rng = np.random.default_rng(seed)
    c = WIDTH
    shapes = {
        "cls_token": (1, 1, c),
        "pos_embed": (1, 1 + GRID * GRID, c),
        "patch_embed.proj.weight": (c, 3, 4, 4),
        "patch_embed.proj.bias": (c,),
        "norm.weight": (c,),
        "norm.bias": (c,),
        "head.weight": (10, c),
        "head.bias": (10,),
    }
    for i in range(depth):
        block = {
            "norm1.weight": (c,),
            "norm1.bias": (c,),
            "attn.qkv.weight": (3 * c, c),
            "attn.qkv.bias": (3 * c,),
            "attn.proj.weight": (c, c),
            "attn.proj.bias": (c,),
            "norm2.weight": (c,),
            "norm2.bias": (c,),
            "mlp.fc1.weight": (4 * c, c),
            "mlp.fc1.bias": (4 * c,),
            "mlp.fc2.weight": (c, 4 * c),
            "mlp.fc2.bias": (c,),
        }
        shapes |= {f"blocks.{i}.{name}": shape for name, shape in block.items()}
    return {name: rng.standard_normal(shape, dtype=np.float32) for name, shape in shapes.items()}


@pytest.fixture(autouse=True, scope="module")
def tiny():
    """An encoder `tiny` of four blocks, whose shapes are found once: a conversion takes no time."""
    config = backbones.VitConfig(
        image_size=(12, 12), patch_size=4, width=WIDTH, depth=4, heads=HEADS, taps=(1, 3)
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(
            backbones.ZOO, "tiny", backbones.zoo.Entry(config, "made by a test", "none", 1)
        )
        find_shapes_once(patch)
        yield


def without_left_out(tensors):
    return {
        name: tensor for name, tensor in tensors.items() if not name.startswith(("norm.", "head."))
    }


def test_every_tensor_lands_where_its_meaning_says(command):
    """Values after conversion equal a plain reading of both conventions: torch [out, in] and OIHW,
    Flax [in, out] and HWIO.
    """
    source = timm_tensors(4)
    code, _, err, out = command(source)
    assert (code, err) == (0, "")
    got = load_file(out)
    x = np.random.default_rng(1).standard_normal(WIDTH).astype(np.float32)
    np.testing.assert_allclose(
        x @ got["blocks.2.attn.qkv.kernel"],
        source["blocks.2.attn.qkv.weight"] @ x,
        rtol=1e-4,
        atol=1e-5,
    )
    patch = np.random.default_rng(2).standard_normal((4, 4, 3)).astype(np.float32)
    ours = np.einsum("yxc,yxcd->d", patch, got["patch_embed.proj.kernel"])
    theirs = np.einsum("cyx,dcyx->d", patch.transpose(2, 0, 1), source["patch_embed.proj.weight"])
    np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-5)
    np.testing.assert_array_equal(got["blocks.3.norm2.scale"], source["blocks.3.norm2.weight"])
    assert len(got) == len(without_left_out(source))


def test_metadata_and_report_say_what_was_done(command):
    """Model, source, its sha256, layout and what was left out with reasons are in the file; counts,
    grid and size in the report.
    """
    source = timm_tensors(4)
    code, report, _, out = command(source)
    assert code == 0
    about = weights.metadata(out)
    digest = subprocess.run(
        ["sha256sum", out.parent / "source.safetensors"], capture_output=True, text=True, check=True
    ).stdout.split()[0]
    assert about["model"] == "tiny"
    assert about["source"] == "source.safetensors"
    assert about["sha256"] == digest
    assert about["layout"] == "timm"
    assert about["jaxdg"] == jaxdg.__version__
    left_out = json.loads(about["left_out"])
    assert left_out.keys() == {"norm.weight", "norm.bias", "head.weight", "head.bias"}
    assert "final norm and classifier" in left_out["norm.weight"]
    for words in (
        f"{len(source) - 4} of {len(source)} tensors",
        "head.bias, head.weight, norm.bias, norm.weight",
        "3x3",
        str(out.stat().st_size),
    ):
        assert words in report, (words, report)
    (out.parent / "ordinary").touch()
    assert out.stat().st_mode == (out.parent / "ordinary").stat().st_mode, (
        "others may read it as far as the umask allows"
    )


def test_the_real_timm_keys_convert(command, weights_path, tmp_path):
    """A file with exactly the names and shapes of timm's ViT-Ti is taken, and fills the module."""
    keys = json.loads(weights_path("keys/timm_vit_tiny_patch16_224.json").read_text())["keys"]
    rng = np.random.default_rng(0)
    source = {
        name: rng.standard_normal(shape, dtype=np.float32) for name, (shape, _) in keys.items()
    }
    code, report, err, out = command(source, model="augreg_ti16")
    assert (code, err) == (0, "")
    assert "148 of 152 tensors" in report
    encoder = backbones.create("augreg_ti16", weights=out)
    np.testing.assert_array_equal(
        weights.tensors(encoder)["blocks.11.mlp.fc2.kernel"], source["blocks.11.mlp.fc2.weight"].T
    )


@pytest.mark.parametrize("kind", ["full size by shapes", "reduced width"])
def test_the_real_augreg_keys_convert(command, weights_path, tmp_path, monkeypatch, kind):
    """The layout of the AugReg L/16 `.npz` is known exactly: all names and shapes at full size,
    values at a width of 32.
    """
    keys = {
        name: tuple(shape)
        for name, (shape, _) in json.loads(weights_path("keys/augreg_l16_npz.json").read_text())[
            "keys"
        ].items()
    }
    left_out = {
        "Transformer/encoder_norm/scale",
        "Transformer/encoder_norm/bias",
        "head/kernel",
        "head/bias",
    }
    if kind == "full size by shapes":
        expected = mapping.source_shapes(models.abstract("augreg_l16"), vit.augreg(heads=16))
        assert expected == {name: shape for name, shape in keys.items() if name not in left_out}
        return
    reduce = {1024: 32, 4096: 128, 64: 2}
    rng = np.random.default_rng(0)
    source = {
        name: rng.standard_normal([reduce.get(n, n) for n in shape], dtype=np.float32)
        for name, shape in keys.items()
    }
    source |= {
        "pre_logits/kernel": np.ones((32, 32), np.float32),
        "pre_logits/bias": np.ones(32, np.float32),
    }
    config = backbones.VitConfig(width=32, depth=24, heads=16, taps=(5, 11, 17, 23))
    monkeypatch.setitem(backbones.ZOO, "narrow_l16", backbones.zoo.Entry(config, "made by a test"))
    np.savez(tmp_path / "l16.npz", **source)
    code, report, err, out = command(tmp_path / "l16.npz", model="narrow_l16")
    assert (code, err) == (0, "")
    assert "pre_logits/kernel, pre_logits/bias" in report
    got = load_file(out)
    # The meaning of the fused projection: the keys of head 5, computed as the published code does.
    x = rng.standard_normal(32).astype(np.float32)
    prefix = "Transformer/encoderblock_7/MultiHeadDotProductAttention_1"
    key = np.einsum("c,chd->hd", x, source[f"{prefix}/key/kernel"]) + source[f"{prefix}/key/bias"]
    fused = (x @ got["blocks.7.attn.qkv.kernel"] + got["blocks.7.attn.qkv.bias"]).reshape(3, 16, 2)
    np.testing.assert_allclose(fused[1, 5], key[5], rtol=1e-4, atol=1e-5)
    heads = rng.standard_normal((16, 2)).astype(np.float32)
    projected = np.einsum("hd,hdc->c", heads, source[f"{prefix}/out/kernel"])
    np.testing.assert_allclose(
        heads.reshape(-1) @ got["blocks.7.attn.proj.kernel"], projected, rtol=1e-4, atol=1e-5
    )
    code, _, err, back = command(out, "--reverse", model="narrow_l16", out="back.npz")
    assert (code, err) == (0, "")
    kept = {
        name: tensor
        for name, tensor in source.items()
        if name not in left_out and not name.startswith("pre_logits")
    }
    with np.load(back) as archive:
        assert_identical(dict(archive), kept)


def test_the_real_weights_convert_and_come_back(command, weights_path):
    """The pre-trained ViT-Ti of timm converts, loads, and --reverse gives the same bits; its sha256
    is the published one.
    """
    real = weights_path("vit_tiny_patch16_224.safetensors")
    code, _, err, out = command(real, model="augreg_ti16")
    assert (code, err) == (0, "")
    assert weights.metadata(out)["sha256"] == REAL_SHA256
    code, _, err, back = command(out, "--reverse", model="augreg_ti16", out="back.safetensors")
    assert (code, err) == (0, "")
    assert_identical(load_file(back), without_left_out(load_file(real)))
    assert weights.metadata(back)["format"] == "pt"


def rename(tensors):
    tensors["blocks.1.attn.qkv.wieght"] = tensors.pop("blocks.1.attn.qkv.weight")
    tensors["blocks.2.norm.weight"] = tensors.pop("blocks.2.norm1.weight")
    return (
        "2 unknown (blocks.1.attn.qkv.wieght, blocks.2.norm.weight)",
        "2 missing (blocks.1.attn.qkv.weight, blocks.2.norm1.weight)",
    )


def drop(tensors):
    del tensors["cls_token"], tensors["blocks.3.mlp.fc1.bias"]
    return ("2 missing (blocks.3.mlp.fc1.bias, cls_token)",)


def add(tensors):
    tensors["blocks.0.ls1.gamma"] = np.ones(WIDTH, np.float32)
    tensors["dist_token"] = np.ones((1, 1, WIDTH), np.float32)
    tensors["blocks.00.norm1.weight"] = np.ones(WIDTH, np.float32)
    return ("3 unknown", "blocks.0.ls1.gamma", "blocks.00.norm1.weight", "dist_token")


def transpose(tensors):
    for name in ("blocks.1.mlp.fc1.weight", "patch_embed.proj.weight"):
        tensors[name] = np.ascontiguousarray(tensors[name].T)
    return (
        "2 of another shape",
        "blocks.1.mlp.fc1.weight is (32, 128), not (128, 32)",
        "patch_embed.proj.weight is (4, 4, 3, 32), not (32, 3, 4, 4)",
    )


def misshape(tensors):
    tensors["blocks.0.norm1.weight"] = np.ones((1, WIDTH), np.float32)
    tensors["blocks.2.attn.qkv.bias"] = np.ones(WIDTH, np.float32)
    tensors["cls_token"] = np.ones(WIDTH, np.float32)
    return (
        "3 of another shape",
        "blocks.0.norm1.weight is (1, 32), not (32,)",
        "blocks.2.attn.qkv.bias is (32,), not (96,)",
        "cls_token is (32,)",
    )


def integers(tensors):
    tensors["blocks.0.norm1.bias"] = np.ones(WIDTH, np.int32)
    return ("blocks.0.norm1.bias holds int32",)


def halve(tensors):
    for name in [name for name in tensors if name.startswith(("blocks.2.", "blocks.3."))]:
        del tensors[name]
    return (
        "24 missing",
        "blocks.*.attn.proj.bias (2 tensors)",
        "blocks.*.norm2.weight (2 tensors)",
        "of whose 52 tensors 28 fit",
    )


def deepen(tensors):
    tensors |= timm_tensors(6)
    return (
        "24 unknown",
        "blocks.*.norm1.bias (2 tensors)",
        "blocks.*.mlp.fc2.weight (2 tensors)",
        "of whose 52 tensors 52 fit",
    )


def everything_at_once(tensors):
    return (*rename(tensors), *transpose(tensors), "blocks.2.norm.weight")


def clip_names(tensors):
    tensors.clear()
    tensors["visual.class_embedding"] = np.ones(WIDTH, np.float32)
    tensors["visual.ln_pre.weight"] = np.ones(WIDTH, np.float32)
    return (
        "2 unknown (visual.class_embedding, visual.ln_pre.weight)",
        "52 missing",
        "blocks.*.attn.proj.bias (4 tensors)",
        "of whose 52 tensors 0 fit",
    )


@pytest.mark.parametrize(
    "damage",
    [
        rename,
        drop,
        add,
        transpose,
        misshape,
        integers,
        halve,
        deepen,
        everything_at_once,
        clip_names,
    ],
    ids=lambda f: f.__name__,
)
def test_what_does_not_fit_is_refused_whole(command, damage):
    """Offenders are told in the source's own names and shapes, many of a kind as one, and nothing
    is written.
    """
    tensors = timm_tensors(4)
    offenders = damage(tensors)
    error = refused(command(tensors), "source.safetensors is no checkpoint of tiny", *offenders)
    assert "blocks.0.attn.proj.weight" not in error or damage is clip_names, (
        "and only offenders are"
    )


def test_a_wrong_number_of_heads_is_refused(command, tmp_path):
    """AugReg kernels are split into heads; another split of the same width has as many numbers, but
    means another model.
    """
    _, _, _, out = command(timm_tensors(4))
    command(out, "--reverse", out="heads.npz")
    with np.load(tmp_path / "heads.npz") as archive:
        tensors = dict(archive)
    name = "Transformer/encoderblock_1/MultiHeadDotProductAttention_1/query/kernel"
    tensors[name] = tensors[name].reshape(WIDTH, 2, 16)
    np.savez(tmp_path / "heads.npz", **tensors)
    refused(
        command(tmp_path / "heads.npz", out="x.safetensors"),
        f"{name} is (32, 2, 16), not (32, 4, 8)",
    )


@pytest.mark.parametrize(
    ("shape", "fits"),
    [
        ((1, 50, 32), True),
        ((1, 5, 32), True),
        ((1, 9, 32), False),
        ((1, 13, 32), False),
        ((1, 50, 16), False),
        ((50, 32), False),
        ((1, 32, 50), False),
    ],
)
def test_positions_of_any_square_grid_are_stored_as_they_are(command, shape, fits):
    """A square grid and a class row are taken and kept (load resizes them); anything else is
    misshapen.
    """
    tensors = timm_tensors(4)
    tensors["pos_embed"] = np.random.default_rng(3).standard_normal(shape).astype(np.float32)
    result = command(tensors)
    if not fits:
        refused(result, f"pos_embed is {shape}, not (1, 10, 32)")
        return
    assert result[0] == 0, result
    np.testing.assert_array_equal(load_file(result[3])["pos_embed"], tensors["pos_embed"])
    _, _, err, back = command(result[3], "--reverse", out="back.safetensors")
    assert err == ""
    assert_identical(load_file(back), without_left_out(tensors))


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16], ids=["float16", "bfloat16"])
def test_half_precision_becomes_float32_of_equal_values(command, dtype):
    """Widening is exact, for both half formats, without torch."""
    half = {name: tensor.astype(dtype) for name, tensor in timm_tensors(4).items()}
    code, _, err, out = command(half)
    assert (code, err) == (0, "")
    _, _, _, back = command(out, "--reverse", out="back.safetensors")
    assert_identical(
        load_file(back),
        without_left_out({name: tensor.astype(np.float32) for name, tensor in half.items()}),
    )


def test_damaged_files_are_refused(command, tmp_path):
    """Cut, empty and foreign files end in one line that names the file, whatever the suffix."""
    save_file(timm_tensors(4), tmp_path / "good.safetensors")
    np.savez(tmp_path / "good.npz", **timm_tensors(4))
    for suffix in (".safetensors", ".npz"):
        good = (tmp_path / f"good{suffix}").read_bytes()
        for what, content in (
            ("cut", good[: len(good) // 2]),
            ("empty", b""),
            ("page", b"<html>404</html>"),
        ):
            path = tmp_path / f"{what}{suffix}"
            path.write_bytes(content)
            refused(command(path), f"{path} cannot be read")
    flipped = bytearray((tmp_path / "good.npz").read_bytes())
    flipped[len(flipped) // 2] ^= 1
    (tmp_path / "flipped.npz").write_bytes(flipped)
    refused(command(tmp_path / "flipped.npz"), "flipped.npz cannot be read at ", "CRC")
    refused(command(tmp_path / "absent.npz"), "no checkpoint at", "absent.npz")
    (tmp_path / "weights.h5").write_bytes(b"x")
    refused(command(tmp_path / "weights.h5"), "weights.h5", ".safetensors .npz")


def test_pickled_code_in_npz_is_refused_and_not_run(command, tmp_path):
    """Neither an object array nor a bare pickle behind `.npz` gets to run."""
    np.savez(tmp_path / "objects.npz", cls=np.array([Evil(tmp_path / "ran")], dtype=object))
    (tmp_path / "bare.npz").write_bytes(pickle.dumps(Evil(tmp_path / "ran")))
    refused(command(tmp_path / "objects.npz"), "objects.npz is refused", "pickled code at cls")
    refused(command(tmp_path / "bare.npz"), "bare.npz cannot be read")
    assert not (tmp_path / "ran").exists()


def test_torch_files_convert_and_come_back(command, tmp_path):
    """`.pth` plain or one level down, zip or legacy format, equals the same tensors in safetensors;
    --reverse gives the same bits.
    """
    torch = pytest.importorskip("torch")
    tensors = timm_tensors(4)
    state = {name: torch.from_numpy(tensor) for name, tensor in tensors.items()}
    expected = load_file(command(tensors, out="expected.safetensors")[3])
    for name, content, new in (
        ("plain.pth", state, True),
        ("model.pt", {"model": state, "epoch": 3}, True),
        ("state.bin", {"state_dict": state}, True),
        ("legacy.pth", state, False),
    ):
        torch.save(content, tmp_path / name, _use_new_zipfile_serialization=new)
        code, _, err, out = command(tmp_path / name, out=f"{name}.safetensors")
        assert (code, err) == (0, "")
        assert_identical(load_file(out), expected)
    _, _, err, back = command(tmp_path / "plain.pth.safetensors", "--reverse", out="back.pth")
    assert err == ""
    loaded = torch.load(back, weights_only=True)
    assert_identical(
        {name: tensor.numpy() for name, tensor in loaded.items()}, without_left_out(tensors)
    )
    half = {name: tensor.bfloat16() for name, tensor in state.items()}
    torch.save(half, tmp_path / "half.pth")
    code, _, _, out = command(tmp_path / "half.pth", out="half.safetensors")
    np.testing.assert_array_equal(
        load_file(out)["blocks.1.mlp.fc1.kernel"], half["blocks.1.mlp.fc1.weight"].float().numpy().T
    )


def test_torch_files_that_hold_more_than_tensors_are_refused(command, tmp_path):
    """Code is named and not run; a module, a list, a cut file and odd entries are told apart."""
    torch = pytest.importorskip("torch")
    state = {name: torch.from_numpy(tensor) for name, tensor in timm_tensors(4).items()}
    torch.save({"model": state, "extra": Evil(tmp_path / "ran")}, tmp_path / "evil.pth")
    refused(
        command(tmp_path / "evil.pth"),
        "evil.pth is refused",
        "pickled code",
        "mkdir",
        "could run anything",
    )
    torch.save(torch.nn.Linear(2, 2), tmp_path / "module.pth")
    refused(command(tmp_path / "module.pth"), "module.pth is refused", "Linear", "state_dict")
    assert not (tmp_path / "ran").exists()
    torch.save([1], tmp_path / "list.pth")
    refused(command(tmp_path / "list.pth"), "list.pth", "list, no state dict")
    torch.save({**state, "epoch": 3}, tmp_path / "odd.pth")
    code, report, _, _ = command(tmp_path / "odd.pth", out="odd.safetensors")
    assert code == 0
    assert "no tensors: epoch" in report
    for new in (True, False):
        torch.save(state, tmp_path / "whole.pth", _use_new_zipfile_serialization=new)
        whole = (tmp_path / "whole.pth").read_bytes()
        (tmp_path / "cut.pth").write_bytes(whole[: len(whole) // 2])
        refused(command(tmp_path / "cut.pth"), "cut.pth cannot be read")


def test_without_torch_its_files_say_what_to_install(command, tmp_path, monkeypatch):
    """Writing `.pth` where torch is absent names the extra; reading needs none."""
    monkeypatch.setitem(sys.modules, "torch", None)
    _, _, _, out = command(timm_tensors(4))
    refused(
        command(out, "--reverse", out="back.pth"),
        "back.pth needs torch",
        'pip install -e ".[convert]"',
    )


def test_wrong_requests_are_refused(command, tmp_path):
    """An unknown or scratch encoder, a wrong suffix, and a jaxdg file of another model or with
    tensors amiss.
    """
    _, _, _, out = command(timm_tensors(4))
    refused(
        command(out, model="augreg_l15", out="x.safetensors"),
        "augreg_l15",
        "did you mean augreg_l16",
    )
    refused(command(out, model="scratch_ti8", out="x.safetensors"), "scratch_ti8", "from scratch")
    refused(command(out, out="x.npz"), "must end in .safetensors")
    refused(command(out, "--reverse", out="x.h5"), "must end in one of .safetensors .npz")
    refused(
        command(out, "--reverse", model="augreg_ti16", out="x.pth"),
        "holds the weights of tiny, not of augreg_ti16",
    )
    tensors = load_file(out)
    del tensors["blocks.1.attn.qkv.kernel"]
    tensors["cls_token"] = tensors["cls_token"][0]
    save_file(tensors, tmp_path / "amiss.safetensors")
    result = command(tmp_path / "amiss.safetensors", "--reverse", out="x.npz")
    refused(
        result,
        "amiss.safetensors",
        "1 missing (blocks.1.attn.qkv.kernel)",
        "cls_token is (1, 32), not (1, 1, 32)",
    )


def test_a_failed_write_keeps_what_was_there(tmp_path, capsys):
    """A full disk (here a limit on file size) ends in one line; the older file stays whole, and no
    partial one is left.
    """
    save_file(timm_tensors(4), tmp_path / "source.safetensors")
    out = tmp_path / "out.safetensors"
    arguments = [
        "--model",
        "tiny",
        "--checkpoint",
        str(tmp_path / "source.safetensors"),
        "--out",
        str(out),
    ]
    assert torch_to_flax.main(arguments) == 0
    whole = out.read_bytes()
    capsys.readouterr()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, limits[1]))
        codes = [torch_to_flax.main(arguments)]
        codes += [
            torch_to_flax.main(
                [*arguments[:3], str(out), "--out", str(tmp_path / "back.npz"), "--reverse"]
            )
        ]
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert codes == [1, 1]
    err = capsys.readouterr().err
    assert err.count("\n") == 2
    assert f"cannot write {out}" in err
    assert f"cannot write {tmp_path / 'back.npz'}" in err
    assert out.read_bytes() == whole
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out.safetensors", "source.safetensors"]


def test_names_that_stand_twice_are_refused(command, tmp_path):
    """A zip archive can hold one name twice; which is meant is anybody's guess."""
    with pytest.warns(UserWarning, match="Duplicate name"):
        np_savez_twice(tmp_path / "twice.npz", timm_tensors(4), "cls_token")
    refused(command(tmp_path / "twice.npz"), "1 there more than once (cls_token)")


def np_savez_twice(path, tensors, name):
    import zipfile

    np.savez(path, **tensors)
    with zipfile.ZipFile(path, "a") as archive, archive.open(f"{name}.npy", "w") as file:
        np.lib.format.write_array(file, tensors[name])


def test_a_table_with_a_gap_or_a_conflict_is_an_error():
    """The engine refuses tables that do not say exactly one thing of every tensor."""
    module = models.abstract("tiny")
    table = vit.timm()
    read = timm_tensors(4)
    with pytest.raises(ValueError, match=r"0 rows of the table timm make cls_token"):
        mapping.to_flax(module, [table._replace(rows=table.rows[1:])], list(read), read.__getitem__)
    with pytest.raises(ValueError, match=r"2 rows of the table timm make cls_token"):
        mapping.to_flax(
            module,
            [table._replace(rows=(table.rows[0], *table.rows))],
            list(read),
            read.__getitem__,
        )
    same_source = mapping.Row(("pos_embed",), "cls_token", mapping.SAME)
    with pytest.raises(ValueError, match=r"uses pos_embed for both"):
        mapping.to_flax(
            module,
            [table._replace(rows=(same_source, *table.rows[1:]))],
            list(read),
            read.__getitem__,
        )
    with pytest.raises(
        mapping.Misfit, match=r"both used and left out by the table timm \(cls_token\)"
    ):
        mapping.to_flax(
            module,
            [table._replace(left_out=(*table.left_out, ("cls_token", "no")))],
            list(read),
            read.__getitem__,
        )


def test_tensors_are_read_one_target_at_a_time(command, tmp_path):
    """Opening a checkpoint reads no tensor, so no file is held in memory twice over."""
    np.savez(tmp_path / "x.npz", a=np.ones(3, np.float32), b=np.array([None], dtype=object))
    with checkpoint.opened(tmp_path / "x.npz") as file:
        assert file.names == ["a", "b"]
        np.testing.assert_array_equal(file.read("a"), np.ones(3))
        with pytest.raises(ValueError, match="refused: it holds pickled code at b"):
            file.read("b")


@pytest.mark.parametrize("form", ["script", "module"])
def test_both_ways_to_run_it(form, tmp_path):
    """As a script from any folder and as a module from the root, `--list` shows each published
    encoder with source, licence and size.
    """
    root = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
    how, folder = (
        (["-m", "conversion.torch_to_flax"], root)
        if form == "module"
        else ([f"{root}/conversion/torch_to_flax.py"], tmp_path)
    )
    done = subprocess.run(
        [sys.executable, *how, "--list"], cwd=folder, capture_output=True, text=True, check=True
    )
    lines = {line.split()[0]: line for line in done.stdout.splitlines()}
    for name in ("augreg_ti16", "augreg_b16", "augreg_l16"):
        entry = backbones.ZOO[name]
        assert f"{entry.megabytes} MB" in lines[name]
        assert entry.licence in lines[name]
        assert entry.source in lines[name]
    assert "scratch_ti8" not in lines
    flags = ["--model", "augreg_ti16", "--checkpoint", "absent.npz"]
    failed = subprocess.run(
        [sys.executable, *how, *flags, "--out", str(tmp_path / "x.safetensors")],
        cwd=folder,
        capture_output=True,
        text=True,
    )
    assert failed.returncode == 1
    assert failed.stderr.splitlines() == [
        "error: no checkpoint at absent.npz; give the file that was downloaded"
    ]
