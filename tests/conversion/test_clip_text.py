"""Conversion of CLIP's text towers: the real key lists, the way back in every layout, refusals."""

import json
import re

import numpy as np
import pytest
from safetensors.numpy import load_file

from jaxdg import backbones, weights
from jaxdg.conversion import clip_text, mapping, models
from jaxdg.conversion import convert as torch_to_flax
from jaxdg.text import tokenizer
from tests import clip_models
from tests.backbones.drawn import run, wave
from tests.conversion.checks import assert_identical, refused

REAL = {
    "clip_l14_text": "openai_clip_l14",
    "clip_b16_text": "openai_clip_b16",
    "clip_rn50_text": "openai_clip_rn50",
    "eva02_clip_l14_text": "eva02_clip_l14",
    "eva02_clip_b16_text": "eva02_clip_b16",
}
OF_IMAGE = {
    "CLIP": ("visual.ln_post.", "visual.proj"),
    "EVA-CLIP": ("visual.norm.", "visual.head."),
}


def is_used(name, layout):
    """Whether a published tensor belongs into the text tower's file: all but the image tower, and
    of that the way into the joint space.
    """
    return not name.startswith("visual.") or name.startswith(OF_IMAGE[layout])


@pytest.fixture(autouse=True)
def zoo(monkeypatch):
    """The small models by name."""
    clip_models.register(monkeypatch)


@pytest.mark.parametrize("name", REAL)
def test_the_real_keys_are_exactly_those_expected(weights_path, name):
    """At full size: what conversion takes is the published text tower and the image tower's
    projection; all else is left out by name.
    """
    listed = json.loads(weights_path(f"keys/{REAL[name]}.json").read_text())["keys"]
    keys = {key: tuple(shape) for key, (shape, _) in listed.items()}
    layout = models.layouts(name)[0]
    expected = mapping.source_shapes(models.abstract(name), layout)
    assert expected == {key: shape for key, shape in keys.items() if is_used(key, layout.name)}
    for key in keys.keys() | {"input_resolution", "context_length", "vocab_size"}:
        left_out = any(re.fullmatch(pattern, key) for pattern, _ in layout.left_out)
        assert left_out == (key not in expected), key


def test_towers_without_a_key_list_are_of_the_same_shapes():
    """RN101 differs from RN50 in its joint space alone; the 336-pixel EVA-02-CLIP and open_clip's
    GELU towers in nothing.
    """
    shapes = {
        name: weights.shapes(models.abstract(name))
        for name in backbones.TEXT_TOWERS
        if not name.startswith("small")
    }
    assert shapes["eva02_clip_l14_336_text"] == shapes["eva02_clip_l14_text"]
    for name in ("clip_l14", "clip_b16"):
        assert shapes[f"{name}_gelu_text"] == shapes[f"{name}_text"]
        assert (
            backbones.TEXT_TOWERS[f"{name}_gelu_text"].activation,
            backbones.TEXT_TOWERS[f"{name}_text"].activation,
        ) == (
            "gelu",
            "quick_gelu",
        )
    assert {
        name
        for name, shape in shapes["clip_rn101_text"].items()
        if shape != shapes["clip_rn50_text"][name]
    } == {"text_projection"}
    assert shapes["clip_rn101_text"]["text_projection"] == (512, 512)


@pytest.mark.parametrize("name", clip_models.MODELS)
def test_one_file_converts_to_both_towers_and_back(command, name):
    """Both conversions of one file use all of it but what they say; --reverse gives the text
    tower's tensors, bit by bit.
    """
    source = clip_models.published(name)
    code, report, err, out = command(source, model=f"small_{name}_text")
    assert (code, err) == (0, "")
    text = clip_models.MODELS[name][1]
    assert f"activation: {text.activation}, because small_{name}_text has it" in report
    assert f"({clip_text.IMAGE})" in report
    assert weights.metadata(out)["model"] == f"small_{name}_text"
    stored = weights.tensors(backbones.load_text_tower(out))
    assert stored["logit_scale"] == source["logit_scale"]
    assert stored["logit_scale"].shape == ()
    code, _, err, _ = command(source, model=f"small_{name}", out="image.safetensors")
    assert (code, err) == (0, "")
    layout = clip_models.LAYOUT[name]
    code, _, err, back = command(
        out, "--reverse", "--layout", layout, model=f"small_{name}_text", out="back.safetensors"
    )
    assert (code, err) == (0, "")
    given_back = load_file(back)
    assert_identical(given_back, {key: source[key] for key in given_back})
    prefix = {"clip": "visual.", "eva02": "visual.trunk.", "resnet": "visual."}[name]
    own = {"clip": ("ln_post.weight", "ln_post.bias", "proj"), "resnet": ()}.get(
        name, ("norm.weight", "norm.bias", "head.weight", "head.bias")
    )
    assert {key for key in given_back if key.startswith("visual.")} == {
        prefix + part for part in own
    }
    assert source.keys() - given_back.keys() == {
        key for key in source if key.startswith("visual.") and key.removeprefix(prefix) not in own
    }


@pytest.mark.parametrize(
    ("name", "layout"),
    [
        ("clip", "open_clip"),
        ("clip", "transformers"),
        ("eva02", "EVA-CLIP"),
        ("resnet", "open_clip"),
    ],
)
def test_other_layouts_hold_the_same_tower(command, name, layout):
    """Written in another publisher's names and read again, every tensor is the same; the layout is
    recognised by its names.
    """
    _, _, _, out = command(clip_models.published(name), model=f"small_{name}_text")
    code, _, err, there = command(
        out, "--reverse", "--layout", layout, model=f"small_{name}_text", out="there.safetensors"
    )
    assert (code, err) == (0, "")
    renamed = load_file(there)
    if layout == "transformers":  # what else such files hold
        renamed |= {
            "text_model.embeddings.position_ids": np.arange(77)[None],
            "vision_model.encoder.layers.0.mlp.fc1.bias": np.ones(3),
        }
    code, report, err, again = command(renamed, model=f"small_{name}_text", out="again.safetensors")
    assert (code, err) == (0, "")
    assert f"(layout: {layout})" in report
    assert_identical(load_file(again), load_file(out))


def test_transformers_names_mean_what_transformers_computes(command, tmp_path):
    """A random CLIPModel of transformers, saved as it saves itself: our embeddings are its text
    features, our taps its blocks' outputs.
    """
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    from tests.oracles import stand_ins  # noqa: F401  declares what transformers asks of torchvision

    text = dict(
        hidden_size=64,
        num_attention_heads=4,
        intermediate_size=256,
        num_hidden_layers=3,
        eos_token_id=49407,
    )
    vision = dict(
        hidden_size=32,
        num_attention_heads=2,
        intermediate_size=128,
        num_hidden_layers=3,
        image_size=20,
        patch_size=4,
    )
    config = transformers.CLIPConfig(text_config=text, vision_config=vision, projection_dim=48)
    torch.manual_seed(0)
    model = transformers.CLIPModel(config).eval()
    for parameter in model.parameters():
        parameter.data.mul_(4 if parameter.ndim > 1 else 1)
    source = {key: tensor.numpy() for key, tensor in model.state_dict().items()}
    code, report, err, out = command(source, model="small_clip_text")
    assert (code, err) == (0, "")
    assert "(layout: transformers)" in report
    names = ["road", "traffic light", "sky"]
    ids = tokenizer.tokenize([f"a photo of a {name}." for name in names])
    with torch.inference_mode():
        pooled = model.text_model(torch.from_numpy(ids).long()).pooler_output
        expected = torch.nn.functional.normalize(model.text_projection(pooled), dim=-1).numpy()
        images = wave(20, 20)
        seen = model.vision_model(
            torch.from_numpy(images).permute(0, 3, 1, 2), output_hidden_states=True
        ).hidden_states
    got = backbones.text_embeddings(names, out)
    np.testing.assert_allclose(got, expected, rtol=0, atol=1e-4)
    assert np.abs(expected[0] - expected[1]).max() > 1e-2
    source |= {
        f"{tower}_model.embeddings.position_ids": np.arange(26)[None]
        for tower in ("text", "vision")
    }  # in older files
    code, report, err, out = command(source, model="small_clip", out="image.safetensors")
    assert (code, err) == (0, "")
    assert "(layout: transformers)" in report
    for feature, tokens in zip(
        run(backbones.create("small_clip", weights=out), images), seen[2:], strict=True
    ):
        np.testing.assert_allclose(feature, tokens.numpy(), rtol=0, atol=1e-4)
    code, _, err, back = command(
        out, "--reverse", "--layout", "transformers", model="small_clip", out="back.safetensors"
    )
    assert (code, err) == (0, "")
    given_back = load_file(back)
    assert_identical(given_back, {key: source[key] for key in given_back})
    used = {
        key
        for key in source
        if key.startswith("vision_model.")
        and "post_layernorm" not in key
        and "position_ids" not in key
    }
    assert given_back.keys() == used


def drop(tensors):
    del tensors["transformer.resblocks.1.attn.in_proj_bias"], tensors["visual.proj"]
    return ("2 missing (transformer.resblocks.1.attn.in_proj_bias, visual.proj)",)


def add(tensors):
    tensors["transformer.resblocks.0.ls_1.gamma"] = np.ones(64, np.float32)
    return ("1 unknown (transformer.resblocks.0.ls_1.gamma)",)


def transpose(tensors):
    for name in ("transformer.resblocks.2.mlp.c_fc.weight", "text_projection"):
        tensors[name] = np.ascontiguousarray(tensors[name].T)
    return (
        "2 of another shape",
        "mlp.c_fc.weight is (64, 256), not (256, 64)",
        "text_projection is (48, 64), not (64, 48)",
    )


def halve(tensors):
    for name in [name for name in tensors if name.startswith("transformer.resblocks.2.")]:
        del tensors[name]
    return "12 missing", "transformer.resblocks.2.ln_1.bias"


def shorten(tensors):
    tensors["positional_embedding"] = tensors["positional_embedding"][:64]
    tensors["token_embedding.weight"] = tensors["token_embedding.weight"][:1000]
    return (
        "positional_embedding is (64, 64), not (77, 64)",
        "token_embedding.weight is (1000, 64), not (49408, 64)",
    )


def without_text(tensors):
    for name in [name for name in tensors if not name.startswith("visual.")]:
        del tensors[name]
    return "42 missing", "token_embedding.weight", "text_projection"


@pytest.mark.parametrize(
    "damage", [drop, add, transpose, halve, shorten, without_text], ids=lambda f: f.__name__
)
def test_what_does_not_fit_is_refused_whole(command, damage):
    """Every offender is named, in the source's own names and shapes, and nothing is written."""
    tensors = clip_models.published("clip")
    offenders = damage(tensors)
    refused(
        command(tensors, model="small_clip_text"),
        "source.safetensors is no checkpoint of small_clip_text",
        *offenders,
    )


def test_another_models_file_is_refused(command):
    """A tower of other sizes, and of another family."""
    refused(
        command(clip_models.published("eva02"), model="small_clip_text"),
        "no checkpoint of small_clip_text",
        "text_projection",
    )
    refused(
        command(clip_models.published("clip"), model="small_eva02_text"),
        "no checkpoint of small_eva02_text",
        "text.text_projection",
    )


def test_the_list_and_errors_know_text_towers(command, capsys):
    """--list names each beside its encoder's file; a misspelt one gets the right name."""
    assert torch_to_flax.main(["--list"]) == 0
    lines = {line.split()[0]: line for line in capsys.readouterr().out.splitlines()}
    for name in backbones.TEXT_TOWERS:
        assert f"the file of {name.removesuffix('_text')}" in lines[name]
    refused(
        command({"a": np.ones(1, np.float32)}, model="eva02_clip_l14_txt"),
        "did you mean eva02_clip_l14_text?",
    )
