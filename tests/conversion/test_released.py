"""Released models of Rein, SoMA, VFMNet and MGRNet: the same numbers and class maps as by their
authors' code, a workdir that opens, and what is refused.

The golden files are made by tests/oracles/golden_released.py.
"""

import dataclasses
import functools
import hashlib
import json
from typing import Any

from flax import nnx
import jax
import numpy as np
import pytest
from safetensors.numpy import save_file

import jaxdg
from jaxdg import backbones, weights
from jaxdg import config as config_lib
from jaxdg.backbones import resizing
from jaxdg.conversion import (
    adapted,
    checkpoint,
    convert,
    mapping,
    mgrnet,
    models,
    rein,
    soma,
    vfmnet,
    vltseg,
    wrappers,
)
from jaxdg.tasks.run_state import stored_tensors
from tests.conversion import released as r
from tests.conversion.checks import make_models_once, refuses
from tests.conversion.torch_files import torch_file

ABSTRACT = vltseg.abstract
refused = functools.partial(refuses, convert.main)
KINDS = {"rein_dinov2": "dinov2_l14", "rein_eva02": "eva02_l14", "soma": "dinov2_l14"}
FAMILIES = {"rein_dinov2": rein, "rein_eva02": rein, "soma": soma}

PUBLISHED = {name: backbones.ZOO[name] for name in rein.ENCODERS}


def config_of(name) -> Any:
    """The configuration of a published encoder."""
    return PUBLISHED[name].config


@pytest.fixture(scope="module")
def golden_of(golden):
    """Outputs of the authors' code, by kind."""
    found = {}
    for kind in KINDS:
        with np.load(golden / f"released_{kind}.npz") as archive:
            found[kind] = dict(archive)
    return found


def files_of(kind, theirs):
    """The released file and that of its encoder."""
    encoder = r.encoder_file(r.named_shapes(theirs, "encoder/"))
    shapes = r.named_shapes(theirs, "")
    if kind == "soma":
        return r.soma_file(shapes, encoder, r.FIRST), encoder
    return {name: r.drawn(name, shape) for name, shape in shapes.items()}, encoder


@pytest.fixture(scope="module")
def tiny():
    """Encoders of the golden files' size in the places of the published ones."""
    with pytest.MonkeyPatch.context() as patch:
        for name in PUBLISHED:
            config = dataclasses.replace(
                config_of(name),
                width=r.WIDTH,
                heads=r.HEADS,
                depth=r.DEPTH,
                taps=tuple(range(r.DEPTH)),
                image_size=(r.GRID * config_of(name).patch_size,) * 2,
            )
            if name == "sam_h16":
                config = dataclasses.replace(config, global_blocks=(1, 3), window=3)
            patch.setitem(backbones.ZOO, name, backbones.zoo.Entry(config, "source"))
        patch.setattr(adapted, "CROPS", (r.WINDOW,))
        patch.setattr(soma, "FIRST", r.FIRST)
        make_models_once(patch)
        yield


@pytest.fixture(scope="module")
def workdirs(golden_of, tiny, tmp_path_factory):
    """What the command makes of each; Rein's without saying what model it is."""
    folder = tmp_path_factory.mktemp("released")
    for kind in KINDS:
        file, encoder = files_of(kind, golden_of[kind])
        save_file(file, folder / f"{kind}.safetensors")
        save_file(encoder, folder / f"{kind}_encoder.safetensors")
        assert convert.main(arguments(folder, kind, None)) == 0
    return folder


def arguments(folder, kind, model, encoder=None, out=None):
    """Of the command."""
    named = ["--model", model] if model else []
    encoder = folder / f"{kind}_encoder.safetensors" if encoder is None else encoder
    source = ["--checkpoint", str(folder / f"{kind}.safetensors"), "--encoder", str(encoder)]
    return [*named, *source, "--out", str(out or folder / kind)]


def model_of(workdir, encoder):
    """The model in a workdir, its state, and a window as it is normalised for the encoder."""
    model = vltseg.abstract(config_lib.load(workdir))
    weights.fill(model, stored_tensors(workdir), "workdir")
    entry = backbones.entry(encoder).config
    image = r.picture(r.WINDOW, r.WINDOW)[None].astype(np.float32)
    return *nnx.split(model), (image / 255 - np.asarray(entry.mean, np.float32)) / np.asarray(
        entry.std, np.float32
    )


@pytest.mark.parametrize("kind", ["rein_dinov2", "soma"])
def test_a_window_gets_the_numbers_of_the_authors_code(kind, golden_of, workdirs):
    """Class logits within 1e-4, mask logits of up to 30 within 2e-4, and every pixel's class."""
    theirs = golden_of[kind]
    graph, state, image = model_of(workdirs / kind, KINDS[kind])

    @jax.jit
    def run(state, image):
        model: Any = nnx.merge(graph, state)
        output = model(image)
        return *output, model.head.scores(output, (r.WINDOW, r.WINDOW))

    class_logits, mask_logits, scores = run(state, image)
    np.testing.assert_allclose(class_logits[-1, 0], theirs["class_logits"], atol=1e-4)
    np.testing.assert_allclose(mask_logits[-1, 0], theirs["mask_logits"], atol=2e-4)
    np.testing.assert_array_equal(np.argmax(scores[0], axis=-1), theirs["window/label"])


def test_eva02_gives_the_features_of_the_authors_code(golden_of, workdirs):
    """Though its images have other statistics here; the head is that of DINOv2's."""
    assert backbones.entry("eva02_l14").config.mean != backbones.zoo.IMAGENET["mean"]
    graph, state, image = model_of(workdirs / "rein_eva02", "eva02_l14")

    @jax.jit
    def run(state, image):
        model: Any = nnx.merge(graph, state)
        return model.pyramid(model.encode(image))[2:]

    for i, level in enumerate(run(state, image), 2):
        theirs = golden_of["rein_eva02"][f"levels/{i}"]
        np.testing.assert_allclose(level[0], theirs, rtol=1e-5, atol=1e-4)


def test_clip_gives_the_features_of_the_authors_code(golden, tiny):
    """Within 1e-4: bilinear positions, the class token twice, and other statistics of images."""
    with np.load(golden / "released_clip.npz") as archive:
        theirs = dict(archive)
    file = r.encoder_file(r.named_shapes(theirs, "encoder/"))
    opened = checkpoint.Checkpoint(list(file), file.__getitem__)
    frozen = adapted.frozen(opened, ["dinov2_l14", "eva02_l14", "clip_l14"], r.WINDOW)
    assert frozen.name == "clip_l14"
    encoder = backbones.create(
        "clip_l14",
        image_size=(r.WINDOW, r.WINDOW),
        patch_size=16,
        taps=tuple(range(r.DEPTH)),
        rngs=nnx.Rngs(0),
    )
    weights.fill(encoder, frozen.tensors, "file")
    config: Any = encoder.config
    image = r.picture(r.WINDOW, r.WINDOW)[None].astype(np.float32) / 255
    mean, std = (np.asarray(x, np.float32) for x in (config.mean, config.std))
    maps = nnx.jit(lambda encoder, image: encoder(image))(encoder, (image - mean) / std)
    for i in (2, 3):
        np.testing.assert_allclose(maps[i][0], theirs[f"taps/{i}"], atol=1e-4)


def test_rein_on_sam_has_positions_for_the_crop(golden_of, tiny):
    """All tensors of both files are mapped: positions bicubic, relative ones as stored, which the
    model resizes as SAM does.
    """
    file, _ = files_of("rein_dinov2", golden_of["rein_dinov2"])
    (known, *_) = adapted.layouts("sam_h16")
    shapes = mapping.source_shapes(models.abstract("sam_h16"), known)
    encoder = r.encoder_file(shapes)
    opened, beside = (checkpoint.Checkpoint(list(t), t.__getitem__) for t in (file, encoder))
    frozen = adapted.frozen(beside, ["sam_h16"], r.WINDOW)
    run = rein.of_checkpoint(opened, frozen, adapted.Training(r.WINDOW))
    layout = rein.layout(opened, frozen)
    both = adapted.joined(opened, frozen, layout)
    model = ABSTRACT(run)
    weights.fill(model, mapping.to_flax(model, (layout,), both.names, both.read).tensors, "files")
    stored = weights.tensors(model)
    side = r.WINDOW // 16
    axis = resizing.cubic_matrix(r.GRID, side)
    want = np.einsum("iy,jx,byxc->bijc", axis, axis, encoder["image_encoder.pos_embed"])
    np.testing.assert_allclose(stored["backbone.pos_embed"], want, atol=1e-6)
    assert stored["backbone.blocks.1.attn.rel_pos_h"].shape[0] == 2 * side - 1
    kernel = encoder["image_encoder.patch_embed.proj.weight"].transpose(2, 3, 1, 0)
    np.testing.assert_array_equal(stored["backbone.patch_embed.proj.kernel"], kernel)


def test_the_workdir_opens_and_gives_their_class_map(golden_of, workdirs):
    """`jaxdg.load` and windows with overlap: all but a ten-thousandth of the pixels of a picture
    larger than the window, where two classes are equal within rounding.
    """
    model = jaxdg.load(workdirs / "rein_dinov2")
    assert model.step == 40_000
    same = model.predict(r.picture(*r.PICTURE)) == golden_of["rein_dinov2"]["picture/label"]
    assert same.mean() > 1 - 1e-4


@pytest.mark.parametrize("kind", KINDS)
def test_the_workdir_says_what_run_it_is_and_where_it_is_from(kind, workdirs):
    """Sizes come from the tensors; both files are there with their digests."""
    config = config_lib.load(workdirs / kind)
    m = config.model
    assert (m.encoder, m.pyramid, m.patch_size) == (KINDS[kind], "interpolate", 16)
    assert m.taps == tuple(range(r.DEPTH))
    head = m.mask2former
    assert (head.hidden, head.queries, head.layers, head.ffn) == (64, r.QUERIES, r.LAYERS, r.FFN)
    assert config.rein.on == (kind != "soma")
    assert not config.rein.on or (config.rein.tokens, config.rein.rank) == (r.QUERIES, r.RANK)
    assert config.evaluation.stride == (r.STRIDE, r.STRIDE)
    assert config.evaluation.protocol == FAMILIES[kind].NAME
    about = json.loads((workdirs / kind / "conversion.json").read_text())
    assert about["model"] == FAMILIES[kind].NAME
    digests = {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest()
        for path in workdirs.glob(f"{kind}*.safetensors")
    }
    assert about["sources"] == digests
    assert len(digests) == 2


def test_soma_adds_its_products_to_the_encoders_kernels(golden_of, workdirs):
    """W + B A in every adapted kernel, queries, keys and values side by side; biases replaced; the
    other blocks as they were.
    """
    file, encoder = files_of("soma", golden_of["soma"])
    stored = stored_tensors(workdirs / "soma")
    for block in range(r.DEPTH):
        parts = np.split(encoder[f"blocks.{block}.attn.qkv.weight"].astype(np.float64), 3)
        biases = np.split(encoder[f"blocks.{block}.attn.qkv.bias"], 3)
        if block >= r.FIRST:
            start = f"backbone.model.blocks.{block}.attn"
            for i, part in enumerate("qkv"):
                a, b = (file[f"{start}.{part}.lora_{ab}.weight"] for ab in "AB")
                parts[i] = parts[i] + b.astype(np.float64) @ a.astype(np.float64)
                biases[i] = file[f"{start}.{part}.bias"]
        name = f"backbone.blocks.{block}.attn.qkv"
        np.testing.assert_allclose(stored[f"{name}.kernel"], np.concatenate(parts).T, atol=1e-6)
        np.testing.assert_array_equal(stored[f"{name}.bias"], np.concatenate(biases))


@pytest.mark.parametrize("kind", ["rein_dinov2", "soma"])
def test_files_of_the_published_size_fit(kind, golden_of, monkeypatch):
    """All tensors by the names and shapes that the authors' code has in full, beside the encoder's
    file as it was published, are mapped or left out for a reason.
    """
    name = KINDS[kind]
    monkeypatch.setitem(backbones.ZOO, name, PUBLISHED[name])
    monkeypatch.setattr(soma, "FIRST", 8)
    monkeypatch.setattr(vltseg, "abstract", ABSTRACT)
    shapes = r.named_shapes(golden_of[kind], "published/")
    encoder = r.named_shapes(golden_of[kind], "published/encoder/")
    config = config_of(name)
    grid = config.image_size[0] // config.patch_size
    encoder["patch_embed.proj.weight"] = (1024, 3, 14, 14)
    encoder["pos_embed"] = (1, 1 + grid * grid, 1024)

    def zeros(shapes):
        return checkpoint.Checkpoint(
            list(shapes), lambda name: np.broadcast_to(np.float32(0), shapes[name])
        )

    file = zeros(shapes)
    family = FAMILIES[kind]
    frozen = adapted.frozen(zeros(encoder), family.encoders(file), 512)
    assert frozen.name == name
    extra = {"norm.weight", "norm.bias", "mask_token"}
    assert frozen.converted.left_out.keys() == encoder.keys() & extra
    run = family.of_checkpoint(file, frozen, adapted.Training(512, "cityscapes"))
    assert run.model.taps == (7, 11, 15, 23)
    assert (run.data.source, run.batch_size) == ("cityscapes", 8)
    assert run.evaluation.stride == (341, 341)
    assert run.model.mask2former == config_lib.Mask2FormerOptions(), "the paper's sizes"
    layout = family.layout(file, frozen)
    both = adapted.joined(file, frozen, layout)
    expected = mapping.source_shapes(vltseg.abstract(run), layout)
    assert expected.keys() - shapes.keys() == set(both.names) - shapes.keys()
    left = {"backbone.model.norm.bias", "backbone.model.mask_token"}
    own = {key: shape for key, shape in shapes.items() if key not in left}
    assert {key: shape for key, shape in expected.items() if key in shapes} == own
    assert (shapes.keys() >= left) == (kind == "soma")


def test_an_encoder_that_the_authors_converted_is_the_same(golden_of, workdirs):
    """Their file with patches of 16 pixels and positions for the crop, and the published one."""
    _, encoder = files_of("rein_eva02", golden_of["rein_eva02"])
    kernel = encoder["patch_embed.proj.weight"].transpose(2, 3, 1, 0)
    side = r.WINDOW // 16
    theirs = encoder | {
        "patch_embed.proj.weight": resizing.resize_patch(kernel, 16, "bicubic").transpose(
            3, 2, 0, 1
        ),
        "pos_embed": resizing.resize_positions(encoder["pos_embed"], (side, side), prefix=1),
    }
    one, other = (
        adapted.frozen(
            checkpoint.Checkpoint(list(tensors), tensors.__getitem__), ["eva02_l14"], r.WINDOW
        )
        for tensors in (encoder, theirs)
    )
    assert one.tensors.keys() == other.tensors.keys()
    for key, tensor in one.tensors.items():
        np.testing.assert_array_equal(tensor, other.tensors[key], err_msg=key)


def test_somas_average_is_what_mmengine_saves_as_the_model(golden_of, tmp_path):
    """A file of SoMA has two sets and nothing beside them: `ema` takes `state_dict`, as mmengine
    exchanges them, `raw` the other, and nothing is chosen silently.
    """
    file, _ = files_of("soma", golden_of["soma"])
    trained = {f"module.{name}": 2 * tensor for name, tensor in file.items()}
    path = torch_file(tmp_path / "best.pth", {"state_dict": file, "ema_state_dict": trained})
    with pytest.raises(ValueError, match="say --weights ema or --weights raw"):
        checkpoint.opened(path).__enter__()
    bias = "decode_head.cls_embed.bias"
    for wanted, factor in (("ema", 1), ("raw", 2)):
        with checkpoint.opened(path, wanted) as opened:
            view = wrappers.unwrapped(opened, soma.layouts())
            assert set(view.names) == set(file)
            np.testing.assert_array_equal(view.read(bias), factor * file[bias])


def test_files_in_half_precision_are_merged_in_float32(golden_of, workdirs):
    """SoMA's and DINOv2's numbers are taken as they are, and the products are not rounded."""
    file, encoder = (
        {name: tensor.astype(np.float16) for name, tensor in tensors.items()}
        for tensors in files_of("soma", golden_of["soma"])
    )
    opened, beside = (checkpoint.Checkpoint(list(t), t.__getitem__) for t in (file, encoder))
    frozen = adapted.frozen(beside, soma.ENCODERS, r.WINDOW)
    layout = soma.layout(opened, frozen)
    both = adapted.joined(opened, frozen, layout)
    model = vltseg.abstract(soma.of_checkpoint(opened, frozen, adapted.Training(r.WINDOW)))
    tensors = mapping.to_flax(model, (layout,), both.names, both.read).tensors
    soma.check(opened, frozen)
    got = tensors[f"backbone.blocks.{r.FIRST}.mlp.fc1.kernel"]
    start = f"backbone.model.blocks.{r.FIRST}.mlp.fc1.lora"
    a, b = (file[f"{start}_{ab}.weight"].astype(np.float64) for ab in "AB")
    base = encoder[f"blocks.{r.FIRST}.mlp.fc1.weight"].astype(np.float64)
    assert got.dtype == np.float32
    np.testing.assert_allclose(got, (base + b @ a).T, atol=1e-6)


@pytest.fixture
def tiny_vfmnet(golden, monkeypatch):
    """What its authors' code gives, also for MGRNet, and an encoder of that size."""
    theirs = {}
    for name in ("vfmnet", "mgrnet"):
        with np.load(golden / f"released_{name}.npz") as archive:
            theirs[name] = dict(archive)
    config = dataclasses.replace(
        config_of("dinov2_l14"),
        width=64,
        heads=r.HEADS,
        depth=r.DEPTH,
        taps=tuple(range(r.DEPTH)),
    )
    monkeypatch.setitem(backbones.ZOO, "tiny64", backbones.zoo.Entry(config))
    monkeypatch.setattr(vfmnet, "ENCODER", "tiny64")
    monkeypatch.setattr(vltseg, "abstract", ABSTRACT)
    return theirs


def test_vfmnet_gives_the_scores_of_the_authors_code(tiny_vfmnet, tmp_path, capsys):
    """Class logits of a window within 1e-4 through the workdir; LoRA is folded and nothing of it
    stays; a renamed tensor is refused.
    """
    theirs = tiny_vfmnet["vfmnet"]
    file = {n: r.drawn(n, shape) for n, shape in r.named_shapes(theirs, "").items()}
    save_file(file, tmp_path / "source.safetensors")
    out = tmp_path / "run"
    command = ["--checkpoint", str(tmp_path / "source.safetensors"), "--out", str(out)]
    assert convert.main(command) == 0
    run = config_lib.load(out)
    assert (run.data.crop, run.low_rank.rank) == ((r.WINDOW, r.WINDOW), r.RANK)
    assert (run.model.decoder, run.model.upscaling.width) == ("upscaling", 64)
    assert run.evaluation.protocol == "mgrnet"
    graph, state, image = model_of(out, "tiny64")
    got = jax.jit(lambda state, image: nnx.merge(graph, state)(image))(state, image)
    np.testing.assert_allclose(got[0], theirs["logits"], atol=1e-4)
    assert not any("lora" in name for name in stored_tensors(out))
    about = json.loads((out / "conversion.json").read_text())
    assert list(about["sources"]) == ["source.safetensors"]
    name = "backbone.base_model.model.blocks.1.attn.qkv.lora_B.default.weight"
    file[name.replace("default", "other")] = file.pop(name)
    save_file(file, tmp_path / "source.safetensors")
    command = ["--model", "vfmnet", *command[:3], str(tmp_path / "other")]
    refused(command, capsys, "1 unknown (", "lora_B.other", f"1 missing ({name})")


def test_mgrnet_gives_the_scores_of_the_authors_code(tiny_vfmnet, tmp_path, capsys):
    """Coarse class logits of a window, and those that the refinement makes of it and them, within
    1e-4 through the workdir; the tensors tell MGRNet from VFMNet, which its file is refused as, and
    a renamed one is refused.
    """
    theirs = tiny_vfmnet["mgrnet"]
    file = {n: r.drawn(n, shape) for n, shape in r.named_shapes(theirs, "").items()}
    save_file(file, tmp_path / "source.safetensors")
    out = tmp_path / "run"
    command = ["--checkpoint", str(tmp_path / "source.safetensors")]
    assert convert.main([*command, "--source", "cityscapes", "--out", str(out)]) == 0
    run = config_lib.load(out)
    assert (run.data.crop, run.data.source) == ((2 * r.WINDOW, 2 * r.WINDOW), "cityscapes")
    assert run.evaluation.stride == (r.WINDOW * 5 // 8, r.WINDOW * 5 // 8)
    o = run.model.mgrnet
    assert (run.model.decoder, o.width, o.hidden, o.layers) == ("mgrnet", 64, 128, 2)
    assert (o.heads, o.head_channels) == (8, 8)
    graph, state, image = model_of(out, "tiny64")

    @jax.jit
    def scores(state, image):
        model: Any = nnx.merge(graph, state)
        features = model.encode(image)
        coarse = model.head.coarse(features)
        context = model.head.scores(coarse, (r.WINDOW, r.WINDOW))
        return coarse, model.head.refinement(features, context)

    for got, name in zip(scores(state, image), ("logits", "refined"), strict=True):
        np.testing.assert_allclose(got[0], theirs[name], atol=1e-4)
    other = ["--out", str(tmp_path / "other")]
    refused(["--model", "vfmnet", *command, *other], capsys, "unknown (aux_decoder.conv_seg.bias")
    name = "aux_decoder.transformer_decoder.mask_token"
    file[f"{name}s"] = file.pop(name)
    save_file(file, tmp_path / "source.safetensors")
    refused([*command, *other], capsys, f"1 unknown ({name}s)", f"1 missing ({name})")


def test_a_vfmnet_of_the_published_size_fits(golden, monkeypatch):
    """All tensors by the names that the authors' training gives them, also with LoRA in the encoder
    instead of around it.
    """
    monkeypatch.setitem(backbones.ZOO, "dinov2_l14", PUBLISHED["dinov2_l14"])
    with np.load(golden / "released_vfmnet.npz") as archive:
        shapes = r.named_shapes(archive, "published/")
    one, other = vfmnet.STARTS
    for start in (one, other):
        named = {name.replace(one, start): shape for name, shape in shapes.items()}
        file = checkpoint.Checkpoint(
            list(named), lambda name, named=named: np.broadcast_to(np.float32(0), named[name])
        )
        run = vfmnet.of_checkpoint(file)
        assert run.data.crop == (512, 512)
        assert run.evaluation.stride == (320, 320)
        assert (run.low_rank.rank, run.model.upscaling.width) == (32, 1024)
        layout = vfmnet.of_run(run, file)
        known = layout.known()
        assert all(known.fullmatch(name) for name in named)
    expected = mapping.source_shapes(ABSTRACT(run), layout)
    left = {name for name in named if name not in expected}
    assert {name.rpartition(".model.")[2] for name in left} == {
        "mask_token",
        "norm.weight",
        "norm.bias",
        "decode_head.output_upscaling.1.num_batches_tracked",
    }
    assert expected == {name: shape for name, shape in named.items() if name not in left}


def test_an_mgrnet_of_the_published_size_fits(golden, monkeypatch):
    """All tensors by the names that the authors' training gives them; sizes are the recipe's."""
    monkeypatch.setitem(backbones.ZOO, "dinov2_l14", PUBLISHED["dinov2_l14"])
    with np.load(golden / "released_mgrnet.npz") as archive:
        shapes = r.named_shapes(archive, "published/")
    file = checkpoint.Checkpoint(
        list(shapes), lambda name: np.broadcast_to(np.float32(0), shapes[name])
    )
    run = mgrnet.of_checkpoint(file)
    assert run.data.crop == (1024, 1024)
    assert run.model.mgrnet == vltseg.recipe("gta5_methods", "mgrnet").model.mgrnet
    expected = mapping.source_shapes(ABSTRACT(run), mgrnet.of_run(run, file))
    left = {"mask_token", "norm.weight", "norm.bias"}
    left = {f"{vfmnet.STARTS[1]}{name}" for name in left}
    left.add("decode_head.output_upscaling.1.num_batches_tracked")
    assert expected == {name: shape for name, shape in shapes.items() if name not in left}


@pytest.mark.parametrize("kind", ["rein_dinov2", "soma"])
def test_what_does_not_fit_is_refused_by_name(kind, golden_of, workdirs, tmp_path, capsys):
    """Renamed, missing, foreign and misshapen tensors of either file; nothing is written."""
    name = FAMILIES[kind].NAME
    file, encoder = files_of(kind, golden_of[kind])
    last = r.DEPTH - 1
    own = (
        "backbone.reins.merge.weight"
        if name == "rein"
        else f"backbone.model.blocks.{last}.mlp.fc1.lora_B.weight"
    )
    damaged = dict(file)
    damaged[f"{own}s"] = damaged.pop(own)
    del damaged["decode_head.cls_embed.bias"]
    damaged["backbone.reins.more"] = np.ones(3, np.float32)
    damaged["decode_head.level_embed.weight"] = np.ones((2, r.HIDDEN), np.float32)
    save_file(damaged, tmp_path / f"{kind}.safetensors")
    save_file(encoder, tmp_path / f"{kind}_encoder.safetensors")
    refused(
        arguments(tmp_path, kind, name),
        capsys,
        f"{kind}.safetensors is no checkpoint of {name}",
        f"2 unknown (backbone.{'model' if name == 'soma' else 'reins'}" if name == "soma" else own,
        "backbone.reins.more",
        "2 missing (",
        own,
        "decode_head.cls_embed.bias",
        f"decode_head.level_embed.weight is (2, {r.HIDDEN}), not (3, {r.HIDDEN})",
    )
    save_file(file, tmp_path / f"{kind}.safetensors")
    encoder["blocks.0.norm3.bias"] = encoder.pop("blocks.0.norm1.bias")
    save_file(encoder, tmp_path / "other.safetensors")
    refused(
        arguments(tmp_path, kind, name, encoder=tmp_path / "other.safetensors"),
        capsys,
        "other.safetensors is no checkpoint of dinov2_l14",
        "1 unknown (blocks.0.norm3.bias)",
        "1 missing (blocks.0.norm1.bias)",
    )
    assert not (tmp_path / kind).exists()


def test_other_encoders_are_refused(golden_of, workdirs, tmp_path, capsys):
    """SoMA's frozen biases are those of its encoder, and Rein's widths tell the encoder; positions
    are those of the published file or of the crop.
    """
    file, encoder = files_of("soma", golden_of["soma"])
    save_file(file, tmp_path / "soma.safetensors")
    other = encoder | {"blocks.1.norm2.bias": encoder["blocks.1.norm2.bias"] + 0.1}
    save_file(other, tmp_path / "other.safetensors")
    refused(
        arguments(tmp_path, "soma", "soma", encoder=tmp_path / "other.safetensors"),
        capsys,
        "1 frozen in the training and not those of the encoder's file"
        " (backbone.model.blocks.1.norm2.bias)",
    )
    other = encoder | {"pos_embed": np.zeros((1, 50, r.WIDTH), np.float32)}
    save_file(other, tmp_path / "other.safetensors")
    refused(
        arguments(tmp_path, "soma", "soma", encoder=tmp_path / "other.safetensors"),
        capsys,
        f"its positions are those of 7x7 patches, not 6x6 or 5x5 for a crop of {r.WINDOW}",
    )
    file, _ = files_of("rein_dinov2", golden_of["rein_dinov2"])
    file[rein.WIDTHS] = np.zeros((r.DEPTH, r.RANK, 40), np.float32)
    save_file(file, tmp_path / "rein.safetensors")
    save_file(encoder, tmp_path / "rein_encoder.safetensors")
    refused(arguments(tmp_path, "rein", "rein"), capsys, "(4, 4, 40), of no encoder whose files")


def test_requests_without_sense_are_refused(workdirs, tmp_path, capsys):
    """No encoder's file, one for another model, a crop that was never trained on, a full folder."""
    command = arguments(workdirs, "soma", "soma", out=tmp_path / "out")
    refused([*command[:4], *command[6:]], capsys, "holds adapter and head alone", "--encoder")
    refused([*command, "--crop", "300"], capsys, f"--crop is 300; allowed: {r.WINDOW}")
    refused(
        ["--model", "mit_b0", *command[2:]],
        capsys,
        "--encoder and --crop are for rein and soma, not for mit_b0",
    )
    refused([*command, "--source", "acdc"], capsys, "acdc; allowed: METHOD", "SOURCE of gta5,")
    refused(arguments(workdirs, "soma", "soma"), capsys, "soma is there already")
    for reverse in ([*command, "--reverse"], ["--model", "mit_b0", *command[2:], "--reverse"]):
        with pytest.raises(SystemExit, match="2"):
            convert.main(reverse)
    assert "rein" in models.listing()
