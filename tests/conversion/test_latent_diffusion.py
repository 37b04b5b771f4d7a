"""Stable Diffusion's files: both publishers' names, the condition, refusals and the way back.

Names, shapes and token states are those of diffusers and transformers, in golden files; CompVis'
names are written here by hand.
"""

import dataclasses
import functools
import json
import math
import re

from flax import nnx
import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from jaxdg import backbones, weights
from jaxdg.backbones import LatentDiffusion
from jaxdg.conversion import latent_diffusion, mapping, models
from jaxdg.conversion.convert import model_of
from jaxdg.data.labels import LabelSet
from jaxdg.text.condition import ConditionConfig
from tests.backbones.test_latent_diffusion import VERSIONS, drawn, ours
from tests.backbones.test_mit import drawn as drawn_text
from tests.conversion.checks import assert_identical, find_shapes_once, refused
from tests.conversion.torch_files import torch_file

WIDTH = 16  # of the golden text towers
TOWERS = {
    1: ConditionConfig(WIDTH, 2, WIDTH, "quick_gelu", None, depth=2),
    2: ConditionConfig(WIDTH, 2, WIDTH, "gelu", None, depth=2, fills_with_end=False),
}
PLAIN = {
    version: dataclasses.replace(config, context=(77, WIDTH), maps=False)
    for version, config in VERSIONS.items()
}
VPD = dataclasses.replace(VERSIONS[1], context=(1, WIDTH), learned=True)

# Where CompVis has diffusers' blocks.
PLACES = {
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "conv_in": "input_blocks.0.0",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
    "down_blocks.0.resnets.0": "input_blocks.1.0",
    "down_blocks.0.attentions.0": "input_blocks.1.1",
    "down_blocks.0.resnets.1": "input_blocks.2.0",
    "down_blocks.0.attentions.1": "input_blocks.2.1",
    "down_blocks.0.downsamplers.0.conv": "input_blocks.3.0.op",
    "down_blocks.1.resnets.0": "input_blocks.4.0",
    "down_blocks.1.attentions.0": "input_blocks.4.1",
    "down_blocks.1.resnets.1": "input_blocks.5.0",
    "down_blocks.1.attentions.1": "input_blocks.5.1",
    "down_blocks.1.downsamplers.0.conv": "input_blocks.6.0.op",
    "down_blocks.2.resnets.0": "input_blocks.7.0",
    "down_blocks.2.attentions.0": "input_blocks.7.1",
    "down_blocks.2.resnets.1": "input_blocks.8.0",
    "down_blocks.2.attentions.1": "input_blocks.8.1",
    "down_blocks.2.downsamplers.0.conv": "input_blocks.9.0.op",
    "down_blocks.3.resnets.0": "input_blocks.10.0",
    "down_blocks.3.resnets.1": "input_blocks.11.0",
    "mid_block.resnets.0": "middle_block.0",
    "mid_block.attentions.0": "middle_block.1",
    "mid_block.resnets.1": "middle_block.2",
    "up_blocks.0.resnets.0": "output_blocks.0.0",
    "up_blocks.0.resnets.1": "output_blocks.1.0",
    "up_blocks.0.resnets.2": "output_blocks.2.0",
    "up_blocks.0.upsamplers.0.conv": "output_blocks.2.1.conv",
    "up_blocks.1.resnets.0": "output_blocks.3.0",
    "up_blocks.1.attentions.0": "output_blocks.3.1",
    "up_blocks.1.resnets.1": "output_blocks.4.0",
    "up_blocks.1.attentions.1": "output_blocks.4.1",
    "up_blocks.1.resnets.2": "output_blocks.5.0",
    "up_blocks.1.attentions.2": "output_blocks.5.1",
    "up_blocks.1.upsamplers.0.conv": "output_blocks.5.2.conv",
    "up_blocks.2.resnets.0": "output_blocks.6.0",
    "up_blocks.2.attentions.0": "output_blocks.6.1",
    "up_blocks.2.resnets.1": "output_blocks.7.0",
    "up_blocks.2.attentions.1": "output_blocks.7.1",
    "up_blocks.2.resnets.2": "output_blocks.8.0",
    "up_blocks.2.attentions.2": "output_blocks.8.1",
    "up_blocks.2.upsamplers.0.conv": "output_blocks.8.2.conv",
    "up_blocks.3.resnets.0": "output_blocks.9.0",
    "up_blocks.3.attentions.0": "output_blocks.9.1",
    "up_blocks.3.resnets.1": "output_blocks.10.0",
    "up_blocks.3.attentions.1": "output_blocks.10.1",
    "up_blocks.3.resnets.2": "output_blocks.11.0",
    "up_blocks.3.attentions.2": "output_blocks.11.1",
}
RESNET = (
    ("norm1", "in_layers.0"),
    ("conv1", "in_layers.2"),
    ("time_emb_proj", "emb_layers.1"),
    ("norm2", "out_layers.0"),
    ("conv2", "out_layers.3"),
    ("conv_shortcut", "skip_connection"),
)
VAE = (
    (r"mid_block\.attentions\.0\.group_norm", "mid.attn_1.norm"),
    (r"mid_block\.attentions\.0\.to_([qkv])", r"mid.attn_1.\1"),
    (r"mid_block\.attentions\.0\.to_out\.0", "mid.attn_1.proj_out"),
    (r"mid_block\.resnets\.0", "mid.block_1"),
    (r"mid_block\.resnets\.1", "mid.block_2"),
    (r"down_blocks\.(\d)\.resnets\.(\d)", r"down.\1.block.\2"),
    (r"down_blocks\.(\d)\.downsamplers\.0", r"down.\1.downsample"),
    (r"conv_shortcut", "nin_shortcut"),
    (r"conv_norm_out", "norm_out"),
)
OLD = (("to_q", "query"), ("to_k", "key"), ("to_v", "value"), ("to_out.0", "proj_attn"))
SCHEDULE = (
    "betas",
    "alphas_cumprod",
    "alphas_cumprod_prev",
    "sqrt_alphas_cumprod",
    "sqrt_one_minus_alphas_cumprod",
    "log_one_minus_alphas_cumprod",
    "sqrt_recip_alphas_cumprod",
    "sqrt_recipm1_alphas_cumprod",
    "posterior_variance",
    "posterior_log_variance_clipped",
    "posterior_mean_coef1",
    "posterior_mean_coef2",
)
ONE = np.ones(1, np.float32)


def compvis(name, tensor):
    """A tensor of diffusers' UNet or VAE as CompVis' files have it."""
    part, _, rest = name.partition(".")
    if part == "vae":
        if re.search(r"attentions\.0\.to_.*weight$", rest):
            tensor = tensor[:, :, None, None]
        for pattern, by in VAE:
            rest = re.sub(pattern, by, rest)
        return f"first_stage_model.{rest}", tensor
    place = max((p for p in PLACES if rest.startswith(f"{p}.")), key=len)
    inside = rest.removeprefix(place)
    if ".resnets." in place:
        for theirs, by in RESNET:
            inside = re.sub(rf"^\.{theirs}\.", f".{by}.", inside)
    return f"model.diffusion_model.{PLACES[place]}{inside}", tensor


def open_clip(tensors):
    """A text tower of transformers by open_clip's names, with what lies beside it there."""
    found = {}
    for name, tensor in tensors.items():
        if part := re.fullmatch(r"(.+)self_attn\.([qkv])_proj\.(\w+)", name):
            found.setdefault(f"{part[1]}attn.in_proj_{part[3]}", {})[part[2]] = tensor
        else:
            found[name] = tensor
    renames = (
        (r"encoder\.layers", "transformer.resblocks"),
        (r"layer_norm(\d)", r"ln_\1"),
        (r"self_attn", "attn"),
        (r"fc1", "c_fc"),
        (r"fc2", "c_proj"),
        (r"final_layer_norm", "ln_final"),
        (r"embeddings\.token_embedding", "token_embedding"),
        (r"embeddings\.position_embedding\.weight", "positional_embedding"),
    )
    named = {}
    for name, tensor in found.items():
        for pattern, by in renames:
            name = re.sub(pattern, by, name)
        if isinstance(tensor, dict):
            tensor = np.concatenate([tensor[part] for part in "qkv"])
        named[name] = tensor
    last = {
        name.replace(".1.", ".2."): tensor
        for name, tensor in named.items()
        if name.startswith("transformer.resblocks.1.")
    }
    return {**named, **last, "text_projection": np.eye(WIDTH, dtype=np.float32), "logit_scale": ONE}


class Learned(nnx.Module):
    """The tensors of VPD's encoder, beside those of a plain one."""

    def __init__(self, plain):
        self.vae = plain.vae
        self.unet = plain.unet
        self.context = parameter(1, WIDTH)
        self.gamma = parameter(WIDTH)
        layers = {
            i: {"kernel": parameter(WIDTH, WIDTH), "bias": parameter(WIDTH)} for i in ("0", "2")
        }
        self.text_adapter = nnx.Dict(fc=nnx.Dict({i: nnx.Dict(of) for i, of in layers.items()}))


def parameter(*shape):
    return nnx.Param(jax.ShapeDtypeStruct(shape, np.float32))


@pytest.fixture(scope="module")
def whole():
    """The encoders of the tests without numbers, by name; only one of them takes time to make."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(backbones.latent_diffusion, "TORCH", nnx.initializers.zeros)  # sooner traced
        plain = nnx.eval_shape(lambda: LatentDiffusion(PLAIN[1], rngs=nnx.Rngs(0)))
    return {"small": plain, "small_vpd": Learned(plain)}


@pytest.fixture(scope="module")
def states(golden):
    """The golden text towers' tensors by name, and their states by activation."""
    with np.load(golden / "condition.npz") as archive:
        tensors = {
            name: drawn_text(name, tuple(map(int, shape)))
            for name, *shape in map(str.split, archive["names"])
        }
        return tensors, dict(archive)


@pytest.fixture(scope="module")
def drawn_models(golden):
    """The golden UNet and VAE of each version by diffusers' names."""
    found = {}
    for version in VERSIONS:
        with np.load(golden / f"latent_diffusion_{version}.npz") as archive:
            names = [line.split() for line in archive["names"]]
        found[version] = {
            name: drawn(name.partition(".")[2], tuple(map(int, shape))) for name, *shape in names
        }
    return found


@pytest.fixture(params=VERSIONS)
def version(request, monkeypatch, whole):
    """A version of Stable Diffusion, at the golden sizes, in place of the zoo's."""
    monkeypatch.setattr(latent_diffusion, "CONDITIONS", {"x": TOWERS[request.param]})
    for name, config in (("small", PLAIN[request.param]), ("small_vpd", VPD)):
        entry = backbones.zoo.Entry(config, "made by a test", "none", 1)
        monkeypatch.setitem(backbones.ZOO, name, entry)
    find_shapes_once(monkeypatch)
    monkeypatch.setattr(weights, "shapes", functools.cache(weights.shapes))
    monkeypatch.setattr(models, "abstract", whole.__getitem__)
    monkeypatch.setattr(models, "converted_encoders", lambda: [*whole])
    return request.param


@pytest.fixture
def published(version, drawn_models, states):
    """All that a folder of diffusers holds, as one dictionary."""
    tensors = dict(drawn_models[version])
    tensors["vae.decoder.conv_in.bias"] = tensors["vae.post_quant_conv.weight"] = ONE
    tensors["text_encoder.text_model.embeddings.position_ids"] = np.arange(77)[None]
    return tensors | {f"text_encoder.text_model.{k}": tensor for k, tensor in states[0].items()}


@pytest.fixture
def expected(version, drawn_models, states):
    """What conversion should make of it."""
    tensors = dict(
        ours(name, tensor)
        for name, tensor in drawn_models[version].items()
        if not re.match(r"unet\.conv_(norm_)?out\.", name)
    )
    # The golden states of the empty prompt: filled up with the end token, and with zeros.
    return tensors, states[1][TOWERS[version].activation][version - 1]


def folder(path, tensors, words=""):
    """Writes the folder of a diffusion model."""
    for part, kind in (
        ("unet", "diffusion_pytorch_model"),
        ("vae", "diffusion_pytorch_model"),
        ("text_encoder", "model"),
    ):
        (path / part).mkdir(parents=True)
        held = {
            name.removeprefix(f"{part}."): np.ascontiguousarray(tensor)
            for name, tensor in tensors.items()
            if name.startswith(f"{part}.")
        }
        save_file(held, path / part / f"{kind}{words}.safetensors")
    return path


def single(version, tensors):
    """CompVis' file of the same model."""
    found = dict(
        compvis(name, tensor)
        for name, tensor in tensors.items()
        if name.startswith(("unet.", "vae."))
    )
    prefix = "text_encoder.text_model."
    text = {
        name.removeprefix(prefix): tensor
        for name, tensor in tensors.items()
        if name.startswith(prefix)
    }
    if version == 1:
        found |= {f"cond_stage_model.transformer.text_model.{k}": v for k, v in text.items()}
    else:
        del text["embeddings.position_ids"]
        found |= {f"cond_stage_model.model.{k}": v for k, v in open_clip(text).items()}
    return found | dict.fromkeys(SCHEDULE, ONE)


def test_both_publishers_files_make_the_same_encoder(
    command, tmp_path, version, published, expected
):
    """Diffusers' folder and CompVis' file, a pickle of version 1 and safetensors of version 2,
    become the same tensors: the golden ones in our axes, and the condition that transformers
    computes; reports say what was left out.
    """
    source = folder(tmp_path / "sd", published)
    code, report, err, out = command(source, model="small")
    assert (code, err) == (0, "")
    got = load_file(out)
    tensors, condition = expected
    np.testing.assert_allclose(got["context"], condition, atol=1e-4)
    assert_identical({k: v for k, v in got.items() if k != "context"}, tensors)
    assert f"{len(tensors)} of {len(published)} tensors mapped (layout: diffusers)" in report
    assert "condition: the text tower's, of the empty prompt" in report
    for left_out in ("unet.conv_norm_out.weight", "vae.decoder.", "vae.post_", "text_encoder."):
        assert f" {left_out}" in report
    assert json.loads(weights.metadata(out)["sha256"]).keys() == {
        "unet/diffusion_pytorch_model.safetensors",
        "vae/diffusion_pytorch_model.safetensors",
        "text_encoder/model.safetensors",
    }

    theirs = single(version, published)
    if version == 1:
        floats = {k: v for k, v in theirs.items() if v.dtype == np.float32}
        theirs = torch_file(tmp_path / "sd.ckpt", {"state_dict": floats, "global_step": 3})
    code, report, err, other = command(theirs, model="small", out="other.safetensors")
    assert (code, err) == (0, "")
    assert "(layout: CompVis)" in report
    for left_out in ("model.diffusion_model.out.", "first_stage_model.decoder", "posterior_mean"):
        assert left_out in report
    assert_identical(load_file(other), got)


first = pytest.mark.parametrize("version", [1], indirect=True)


@pytest.fixture
def small(version, published):
    """CompVis' file with a condition in place of the text tower."""
    tensors = {k: tensor for k, tensor in published.items() if not k.startswith("text_encoder.")}
    return single(version, tensors) | {
        "class_embeddings": np.random.default_rng(0).normal(size=(77, WIDTH)).astype(np.float32)
    }


@first
def test_half_precision_and_names_of_other_ages(command, tmp_path, published, expected):
    """A folder of fp16 files with the attention's older names in the VAE and the text tower's newer
    ones: every number as float32 is that of the file.
    """
    source = {}
    for name, tensor in published.items():
        name = name.replace("text_encoder.text_model.", "text_encoder.")
        for new, old in OLD:
            name = re.sub(rf"^(vae\..*attentions\.0)\.{re.escape(new)}\.", rf"\1.{old}.", name)
        source[name] = tensor.astype(np.float16) if tensor.dtype == np.float32 else tensor
    path = folder(tmp_path / "sd", source, ".fp16")
    code, report, err, out = command(path, model="small")
    assert (code, err) == (0, "")
    assert "(layout: diffusers_old)" in report
    got = load_file(out)
    tensors, condition = expected
    np.testing.assert_allclose(got.pop("context"), condition, atol=0.02)
    assert_identical(got, {k: v.astype(np.float16).astype(np.float32) for k, v in tensors.items()})


@first
def test_the_average_of_a_training_is_taken_if_wanted(command, small, expected):
    """CompVis' file with a second set of weights of the UNet: left out and told, or taken by
    --weights ema in place of the first.
    """
    tensors = expected[0] | {"context": small["class_embeddings"]}
    average = {
        "model_ema." + name.removeprefix("model.").replace(".", ""): tensor + 1
        for name, tensor in small.items()
        if name.startswith("model.")
    }
    source = small | average | {"model_ema.decay": ONE, "model_ema.num_updates": ONE}
    code, report, err, out = command(source, model="small", out="raw.safetensors")
    assert (code, err) == (0, "")
    assert "--weights ema takes the average" in report
    assert_identical(load_file(out), tensors)
    code, report, err, out = command(
        source, "--weights", "ema", model="small", out="ema.safetensors"
    )
    assert (code, err) == (0, "")
    assert "an average over the training, in place of model.diffusion_model" in report
    assert_identical(
        load_file(out),
        {k: tensor + k.startswith("unet.") for k, tensor in tensors.items()},
    )


@first
def test_what_does_not_fit_is_refused_by_name(command, tmp_path, published, small):
    """A renamed tensor, an extra one and one for images with a mask, in the UNet and in the text
    tower; a folder without the VAE, and a file without the text tower.
    """
    kernel = small.pop("model.diffusion_model.input_blocks.4.0.skip_connection.weight")
    small["model.diffusion_model.input_blocks.4.0.shortcut.weight"] = kernel
    small["model.diffusion_model.label_emb.0.0.weight"] = ONE
    first = small["model.diffusion_model.input_blocks.0.0.weight"]
    small["model.diffusion_model.input_blocks.0.0.weight"] = np.tile(first, (1, 2, 1, 1))
    refused(
        command(small, model="small"),
        "source.safetensors is no checkpoint of small",
        "2 unknown (model.diffusion_model.input_blocks.4.0.shortcut.weight,",
        "model.diffusion_model.label_emb.0.0.weight",
        "1 missing (model.diffusion_model.input_blocks.4.0.skip_connection.weight)",
        "model.diffusion_model.input_blocks.0.0.weight is (32, 8, 3, 3), not (32, 4, 3, 3)",
    )
    block = "text_encoder.text_model.encoder.layers"
    del published[f"{block}.1.mlp.fc1.bias"]
    published[f"{block}.2.mlp.fc1.bias"] = ONE
    path = folder(tmp_path / "sd", published)
    refused(
        command(path, model="small"),
        f"{path}: the condition is that of the file's text tower, and this one does not fit",
        f"1 unknown ({block}.2.mlp.fc1.bias)",
        f"1 missing ({block}.1.mlp.fc1.bias)",
    )
    whole = single(1, {k: v for k, v in published.items() if not k.startswith("text_encoder.")})
    refused(command(whole, model="small"), "text tower, and there is none")
    (path / "vae").rename(tmp_path / "vae")
    refused(command(path, model="small"), f"{path} holds a diffusion model without vae;")


@first
def test_vpds_condition_and_the_way_back(command, tmp_path, monkeypatch, published, states):
    """The condition of a class name is the end token's state that transformers computes, and what
    VPD learns starts as it does. In every publisher's names a file converts to the same bits.
    """
    monkeypatch.setattr(latent_diffusion, "CITYSCAPES", LabelSet(("a",), ((0, 0, 0),)))
    monkeypatch.setattr(latent_diffusion, "IMAGENET", ("a photo of {}",))
    path = folder(tmp_path / "sd", published)
    code, report, err, out = command(path, model="small_vpd")
    assert (code, err) == (0, "")
    assert "of 1 sentences with each of Cityscapes' class names" in report
    got = load_file(out)
    np.testing.assert_allclose(got["context"], states[1]["quick_gelu"][2, 5:6], atol=1e-4)
    np.testing.assert_array_equal(got["gamma"], np.full(WIDTH, 1e-4, np.float32))
    plain = single(1, {k: v for k, v in published.items() if not k.startswith("text_encoder.")})
    used = {
        "diffusers": published,
        "CompVis": plain,
        "VPD": {
            re.sub("^first_stage_model", "encoder_vq", re.sub("^model", "unet.unet", k)): tensor
            for k, tensor in plain.items()
        },
    }
    for layout in ("diffusers", "CompVis", "VPD"):
        code, _, err, back = command(
            out, "--reverse", "--layout", layout, model="small_vpd", out=f"{layout}.safetensors"
        )
        assert (code, err) == (0, "")
        theirs = load_file(back)
        assert {"class_embeddings", "gamma", "text_adapter.fc.0.weight"} <= theirs.keys()
        common = theirs.keys() & used[layout].keys()
        assert len(common) == len(got) - 6
        assert_identical({k: theirs[k] for k in common}, {k: used[layout][k] for k in common})
        code, report, err, again = command(
            back, model="small_vpd", out=f"{layout}_again.safetensors"
        )
        assert (code, err) == (0, "")
        assert f"(layout: {layout})" in report
        assert_identical(load_file(again), got)


@first
def test_without_a_name_the_tensors_tell(tmp_path, small):
    """A condition of class names and what VPD learns tell its encoder from the plain one; a file
    with a text tower is of both.
    """
    path = tmp_path / "source.safetensors"
    save_file(small, path)
    assert model_of(path, ours=False) == "small"
    del small["class_embeddings"]
    save_file(small, path)
    with pytest.raises(ValueError, match="those of small and of small_vpd; say with --model"):
        model_of(path, ours=False)


def test_the_published_names_are_covered(drawn_models):
    """Stable Diffusion 1.5 has the golden model's tensors, but for shortcuts where levels become
    wider; with what no feature needs they are as many as its authors' code makes.
    """
    shortcut = "down_blocks.{}.resnets.0.conv_shortcut"
    golden = {
        k.replace(f"vae.encoder.{shortcut.format(3)}", f"vae.encoder.{shortcut.format(2)}")
        for k in drawn_models[1]
        if not k.startswith(f"unet.{shortcut.format(3)}")
    }
    assert len({k for k in golden if k.startswith("unet.")}) == 686
    assert len({k for k in golden if k.startswith("vae.")}) == 108
    needed = {k for k in golden if not re.match(r"unet\.conv_(norm_)?out\.", k)}
    diffusers, _, theirs = (
        {row.source[0] for row in layout.rows} - {"class_embeddings"}
        for layout in models.layouts("sd15")
    )
    assert diffusers == needed
    scalar = np.zeros((1, 1))
    assert theirs == {compvis(name, scalar)[0] for name in needed}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "parameters"),
    [("sd15", 859_520_964), ("sd15_vpd", 859_520_964), ("sd21", 865_910_724)],
)
def test_the_published_models_are_covered(name, parameters):
    """Numbers of tensors and parameters, with the four tensors of the UNet that no feature needs,
    as enumerated from their authors' code.
    """
    module = models.abstract(name)
    for layout in models.layouts(name):
        shapes = {
            k: math.prod(v)
            for k, v in mapping.source_shapes(module, layout).items()
            if not k.startswith(("class_embeddings", "gamma", "text_adapter"))
        }
        vae = {k: v for k, v in shapes.items() if re.match("vae|first_stage|encoder_vq", k)}
        unet = {k: v for k, v in shapes.items() if k not in vae}
        assert (len(unet) + 4, sum(unet.values()) + 12_164) == (686, parameters)
        assert (len(vae), sum(vae.values())) == (108, 34_163_664)
