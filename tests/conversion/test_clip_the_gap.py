"""Detectors of CLIP the Gap: the names of their files, the numbers of torch's own modules, a
workdir that opens, refusals.
"""

import dataclasses
import json

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxdg
from jaxdg import backbones, weights
from jaxdg import config as config_lib
from jaxdg.conversion import clip_the_gap, mapping, models, vltseg
from jaxdg.conversion import convert as torch_to_flax
from jaxdg.conversion.checkpoint import Checkpoint
from jaxdg.data.boxes import DIVERSE_WEATHER
from tests import clip_models
from tests.conversion.checks import refused
from tests.conversion.torch_files import torch_file

WIDTHS = (64, 128, 256, 512)
BLOCKS = (1, 2, 1, 1)
CLASSIFIER = "roi_heads.box_predictor.cls_score"
AGAIN = "roi_heads.clip_im_predictor"
RPN = "proposal_generator.rpn_head"


@pytest.fixture(autouse=True, scope="module")
def small():
    """A small CLIP under the name of theirs, with a pool for the 7 x 7 features of a proposal."""
    image, text = clip_models.MODELS["resnet"]
    image = dataclasses.replace(image, image_size=(224, 224), pool_grid=7)
    with pytest.MonkeyPatch.context() as patch:
        entry = backbones.zoo.Entry(image, "made by a test", "none", 1)
        patch.setitem(backbones.ZOO, "clip_rn101", entry)
        patch.setitem(backbones.TEXT_TOWERS, "clip_rn101_text", text)
        yield


def norm(name, channels):
    parts = ("weight", "bias", "running_mean", "running_var")
    return {f"{name}.{part}": (channels,) for part in parts}


def linear(name, inputs, outputs):
    return {f"{name}.weight": (outputs, inputs), f"{name}.bias": (outputs,)}


def visual():
    """Names and shapes of CLIP's modified ResNet, written out by hand."""
    shapes = {}
    for i, (inputs, outputs) in enumerate(((3, 8), (8, 8), (8, 16)), start=1):
        shapes |= {f"conv{i}.weight": (outputs, inputs, 3, 3)} | norm(f"bn{i}", outputs)
    inputs = 16
    for stage, (blocks, width) in enumerate(zip(BLOCKS, WIDTHS, strict=True), start=1):
        for i in range(blocks):
            block = f"layer{stage}.{i}"
            inner = width // 4
            for n, (a, b, side) in enumerate(
                ((inputs, inner, 1), (inner, inner, 3), (inner, width, 1)), start=1
            ):
                shapes |= {f"{block}.conv{n}.weight": (b, a, side, side)}
                shapes |= norm(f"{block}.bn{n}", b)
            if i == 0:
                shapes |= {f"{block}.downsample.0.weight": (width, inputs, 1, 1)}
                shapes |= norm(f"{block}.downsample.1", width)
            inputs = width
    shapes |= {"attnpool.positional_embedding": (50, 512)}
    for part in "qkv":
        shapes |= linear(f"attnpool.{part}_proj", 512, 512)
    return shapes | linear("attnpool.c_proj", 512, 48)


def text():
    """Names and shapes of its text tower."""
    shapes = {
        "positional_embedding": (77, 64),
        "text_projection": (64, 48),
        "logit_scale": (),
        "token_embedding.weight": (49408, 64),
        "ln_final.weight": (64,),
        "ln_final.bias": (64,),
    }
    for i in range(3):
        block = f"transformer.resblocks.{i}"
        shapes |= {f"{block}.attn.in_proj_weight": (192, 64), f"{block}.attn.in_proj_bias": (192,)}
        shapes |= linear(f"{block}.attn.out_proj", 64, 64)
        shapes |= {f"{block}.ln_{n}.{part}": (64,) for n in (1, 2) for part in ("weight", "bias")}
        shapes |= linear(f"{block}.mlp.c_fc", 64, 256) | linear(f"{block}.mlp.c_proj", 256, 64)
    return shapes


@pytest.fixture(scope="module")
def published():
    """All tensors of a small file, under every name that detectron2 stores them by; those that are
    read are drawn as the golden file's.
    """
    drawn = {name: clip_models.draw(f"visual.{name}", shape) for name, shape in visual().items()}
    counters = {
        name.replace("running_var", "num_batches_tracked"): np.asarray(7)
        for name in drawn
        if name.endswith("running_var")
    }
    tower = {name: clip_models.draw(name, shape) for name, shape in text().items()}
    tower |= {f"visual.{name}": tensor for name, tensor in (drawn | counters).items()}
    tensors = {f"backbone.enc.{name}": tensor for name, tensor in (drawn | counters).items()}
    third = "layer3."
    tensors |= {
        f"backbone.backbone_unchanged.{name.removeprefix(third)}": tensor
        for name, tensor in (drawn | counters).items()
        if name.startswith(third)
    }
    for place in (CLASSIFIER, AGAIN):
        for name, tensor in tower.items():
            tensors[f"{place}.model.{name}"] = tensor
            tensors[f"{place}.frozen_clip_model.{name}"] = np.zeros_like(tensor)
        for name, tensor in (drawn | counters).items():
            tensors[f"{place}.visual_enc.{name}"] = tensor
    shapes = {"offsets": (15, 256, 14, 14), "roi_heads.res5.0.conv1.weight": (4, 8, 1, 1)}
    shapes |= {"roi_heads.res5.0.conv1.norm.running_mean": (4,)}
    for name, inputs in (
        ("backbone.proj", 48), ("backbone.global_proj", 48), (f"{CLASSIFIER}.projection", 512),
        (f"{CLASSIFIER}.projection_global", 512), (f"{AGAIN}.projection", 512),
        (f"{AGAIN}.projection_global", 512),
    ):  # fmt: skip
        shapes |= linear(name, inputs, 48)
    for name, channels, side in (
        ("conv", 256, 3), ("objectness_logits", 15, 1), ("anchor_deltas", 60, 1),
    ):  # fmt: skip
        shapes |= {f"{RPN}.{name}.weight": (channels, 256, side, side)}
        shapes |= {f"{RPN}.{name}.bias": (channels,)}
    shapes |= linear(clip_the_gap.REGRESSOR, 512, 28)
    return tensors | {name: clip_models.draw(name, shape) for name, shape in shapes.items()}


def opened(tensors):
    """The tensors as an open file."""
    return Checkpoint(list(tensors), lambda name: np.asarray(tensors[name]))


def converted(tensors):
    """The model of a file's tensors: its graph and its state."""
    file = opened(tensors)
    config = clip_the_gap.of_checkpoint(file)
    model = vltseg.abstract(config)
    whole = clip_the_gap.prepared(file, config)
    layout = clip_the_gap.of_run(config, file)
    found = mapping.to_flax(model, (layout,), whole.names, whole.read)
    weights.fill(model, found.tensors, "a test")
    return nnx.split(model)


@pytest.fixture(scope="module")
def detector(published):
    """The converted model."""
    return converted(published)


def test_heads_compute_what_torch_does(detector, golden):
    """Proposals' logits and deltas; of two boxes, the last stage, the attention pool against class
    names without a full stop, and the mean against the regressor: within 1e-4 of torch.
    """
    graph, state = detector
    features = clip_models.draw("features", (1, 256, 6, 10)).transpose(0, 2, 3, 1)
    boxes = np.array([[[3.0, 5.0, 90.5, 61.0], [40.0, 10.0, 158.0, 95.0]]], np.float32)

    @jax.jit
    def run(state, features, boxes):
        head = nnx.merge(graph, state).head
        scores, offsets = head.roi_heads.predict(0, (features,), boxes)
        return head.proposal_generator((features,)), scores[0], offsets[0]

    (logits, deltas), scores, offsets = run(state, jnp.asarray(features), jnp.asarray(boxes))
    with np.load(golden / "clip_the_gap.npz") as theirs:
        for name, got, atol in (
            ("logits", logits[0], 1e-4),
            ("deltas", deltas[0], 1e-4),
            ("scores", scores, 1e-3),
            ("offsets", offsets, 1e-4),
        ):
            np.testing.assert_allclose(got, theirs[name], rtol=1e-4, atol=atol, err_msg=name)
    assert np.abs(np.asarray(scores)[:, :7]).min() > 0.01


def test_a_released_file_opens_as_a_workdir(published, tmp_path, capsys, monkeypatch):
    """From detectron2's own form: the model is told by its names, what is left out is said, and
    `jaxdg.load` finds boxes of the classes of Diverse Weather. (On small images, to be quick.)
    """
    recipe = vltseg.recipe

    def smaller(*names):
        c = recipe(*names)
        c.data.crop = c.data.resize = (64, 112)
        rpn = c.model.faster_rcnn_c4.rpn
        rpn.before, rpn.after = (60, 60), (20, 20)
        return c

    monkeypatch.setattr(vltseg, "recipe", smaller)
    kept = {name: tensor for name, tensor in published.items() if tensor.dtype == np.float32}
    source = torch_file(tmp_path / "model_best.pth", {"model": kept, "iteration": 9})
    arguments = ["--checkpoint", str(source), "--out", str(tmp_path / "run")]
    assert torch_to_flax.main(arguments) == 0
    said = capsys.readouterr().out
    assert "clip_the_gap from model_best.pth" in said
    for what in ("offsets (semantic", "roi_heads.res5", "text tower", "CLIP before training"):
        assert what in said
    config = config_lib.load(tmp_path / "run")
    assert (config.model.encoder, config.model.text_weights) == ("clip_rn101", None)
    about = json.loads((tmp_path / "run" / "conversion.json").read_text())
    assert about["left_out"]["offsets"].startswith("semantic offsets")
    found = jaxdg.load(tmp_path / "run").predict(
        np.random.default_rng(0).integers(0, 256, (45, 80, 3), np.uint8)
    )
    assert len(found.scores) > 0
    assert set(found.classes.tolist()) <= set(range(len(DIVERSE_WEATHER.names)))


def test_classes_are_told_by_their_number(published):
    """24 numbers of the regressor are the six classes of the second setting; others are refused."""
    name = f"{clip_the_gap.REGRESSOR}.bias"
    config = clip_the_gap.of_checkpoint(opened(published | {name: np.zeros(24, np.float32)}))
    assert config.data.boxes is not None
    assert config.data.boxes.classes == ("bicycle", "bird", "car", "cat", "dog", "person")
    for sides in (27, 32):
        with pytest.raises(
            mapping.Misfit, match=rf"bias has {sides} numbers; allowed: 28, for bus"
        ):
            clip_the_gap.of_checkpoint(opened(published | {name: np.zeros(sides, np.float32)}))


def test_a_file_that_does_not_fit_is_refused_whole(published, command):
    """A tensor missing, one too many and one of another shape, each by its name, and no workdir;
    one missing of the image tower or of the text tower; a copy that differs, and one of nothing.
    """
    kept = {name: t for name, t in published.items() if "clip_im_predictor" not in name}
    conv, bias = f"{RPN}.conv.weight", f"{RPN}.anchor_deltas.bias"
    wrong = {
        "roi_heads.box_head.fc1.weight": np.zeros(3, np.float32),
        conv: kept[conv][:, :9].copy(),
    }
    refused(
        command(
            {name: t for name, t in (kept | wrong).items() if name != bias},
            model="clip_the_gap",
            out="run",
        ),
        "1 unknown (roi_heads.box_head.fc1.weight)",
        f"1 missing ({bias})",
        f"{conv} is (256, 9, 3, 3), not (256, 256, 3, 3)",
    )
    layer = "backbone.enc.layer4.0.conv1.weight"
    copies = [name for name in kept if name.endswith("layer4.0.conv1.weight") and name != layer]
    word = f"{CLASSIFIER}.model.ln_final.bias"
    foreign = {f"{CLASSIFIER}.visual_enc.fc.bias": np.zeros(2, np.float32)}
    for changed, dropped, messages in (
        ({}, (layer, *copies), (f"1 missing ({layer})",)),
        ({}, (word,), (f"1 missing ({word})",)),
        (
            foreign | {copies[0]: kept[copies[0]] + 1},
            (),
            (f"{copies[0]} is not {layer}", f"1 unknown ({next(iter(foreign))})"),
        ),
    ):
        tensors = {name: t for name, t in (kept | changed).items() if name not in dropped}
        with pytest.raises(mapping.Misfit) as error:
            converted(tensors)
        for message in messages:
            assert message in str(error.value)


def test_names_tell_the_model(published):
    """Without --model."""
    assert models.identified(opened(published)) == "clip_the_gap"
