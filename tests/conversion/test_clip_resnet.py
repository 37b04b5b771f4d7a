"""Conversion of CLIP's ResNets: the real key list, archives and files of open_clip, refusals, the
way back.
"""

import json
import re

import numpy as np
import pytest
from safetensors.numpy import load_file

from jaxdg import backbones, weights
from jaxdg.backbones import ClipResnetConfig
from jaxdg.conversion import clip_resnet, mapping, models
from tests.conversion.checks import assert_identical, converted, refused

TINY = ClipResnetConfig(
    image_size=(64, 64), blocks=(1, 2, 1, 1), widths=(16, 32, 64, 128), pool_grid=2, embedding=6
)


def shapes(config):
    """Every tensor of an image tower as OpenAI and open_clip name it, written out from the
    description of the model, without counters.
    """

    def norm(name, c):
        return {
            f"{name}.{kind}": (c,) for kind in ("weight", "bias", "running_mean", "running_var")
        }

    stem = config.widths[0] // 4
    deepest = config.widths[3]
    found = {}
    before = 3
    for i, c in ((1, stem // 2), (2, stem // 2), (3, stem)):
        found |= {f"conv{i}.weight": (c, before, 3, 3)} | norm(f"bn{i}", c)
        before = c
    for i, (width, count) in enumerate(zip(config.widths, config.blocks, strict=True)):
        for k in range(count):
            block = f"layer{i + 1}.{k}"
            c = width // 4
            for j, kernel in ((1, (c, before, 1, 1)), (2, (c, c, 3, 3)), (3, (width, c, 1, 1))):
                found |= {f"{block}.conv{j}.weight": kernel} | norm(f"{block}.bn{j}", kernel[0])
            if k == 0:
                found |= {f"{block}.downsample.0.weight": (width, before, 1, 1)} | norm(
                    f"{block}.downsample.1", width
                )
            before = width
    found["attnpool.positional_embedding"] = (config.pool_grid**2 + 1, deepest)
    for part in "qkvc":
        out = config.embedding if part == "c" else deepest
        found |= {
            f"attnpool.{part}_proj.weight": (out, deepest),
            f"attnpool.{part}_proj.bias": (out,),
        }
    return {f"visual.{name}": shape for name, shape in found.items()}


def tensors(text=""):
    """A random checkpoint of the tiny encoder with its counters and what surrounds it; newer files
    hold the text tower below `text.`.
    """
    rng = np.random.default_rng(0)
    wanted = shapes(TINY)
    wanted |= {
        f"{text}positional_embedding": (7, 8),
        f"{text}transformer.resblocks.0.ln_1.weight": (8,),
        "logit_scale": (),
    }
    source = {
        name: np.asarray(rng.standard_normal(shape), np.float32) for name, shape in wanted.items()
    }
    counters = [
        name.replace("running_mean", "num_batches_tracked")
        for name in wanted
        if name.endswith("running_mean")
    ]
    return source | {name: np.asarray(7, np.int64) for name in counters}


def image_tower(source):
    return {
        name: t
        for name, t in source.items()
        if name.startswith("visual.") and not name.endswith("num_batches_tracked")
    }


@pytest.fixture(autouse=True)
def tiny(monkeypatch):
    """An encoder of five bottlenecks."""
    monkeypatch.setitem(backbones.ZOO, "tiny", backbones.zoo.Entry(TINY, "made by a test"))


def test_the_real_keys_are_exactly_those_expected(weights_path):
    """At full size: names and shapes that conversion takes are the published image tower's; all
    others are left out for one reason.
    """
    listed = json.loads(weights_path("keys/openai_clip_rn50.json").read_text())["keys"]
    keys = {key: tuple(shape) for key, (shape, _) in listed.items()}
    layout = clip_resnet.layouts()[0]
    expected = mapping.source_shapes(models.abstract("clip_rn50"), layout)
    assert expected == image_tower(keys) == shapes(backbones.entry("clip_rn50").config)
    for key in keys.keys() - expected.keys():
        assert sum(re.fullmatch(pattern, key) is not None for pattern, _ in layout.left_out) == 1, (
            key
        )


def test_full_size_shapes_of_the_larger_one():
    """The names and shapes of RN101 are those of the described model."""
    module = models.abstract("clip_rn101")
    assert mapping.source_shapes(module, clip_resnet.layouts()[0]) == shapes(
        backbones.entry("clip_rn101").config
    )


@pytest.mark.parametrize("text", ["", "text."])
def test_files_convert_and_come_back(command, text):
    """Every tensor is used or left out, values land where they belong, and --reverse gives the same
    bits.
    """
    source = tensors(text)
    code, report, err, out = command(source)
    assert (code, err) == (0, "")
    assert f"{len(image_tower(source))} of {len(source)} tensors mapped (layout: CLIP)" in report
    for name in (
        f"{text}transformer.resblocks.*.ln_1.weight",
        "visual.layer2.*.bn1.num_batches_tracked",
        "logit_scale",
    ):
        assert name in report
    got = weights.tensors(backbones.create("tiny", weights=out))
    np.testing.assert_array_equal(
        got["layer2.1.bn3.var"], source["visual.layer2.1.bn3.running_var"]
    )
    np.testing.assert_array_equal(
        got["layer3.0.downsample.1.scale"], source["visual.layer3.0.downsample.1.weight"]
    )
    np.testing.assert_array_equal(
        got["layer2.1.conv2.kernel"][0, 2], source["visual.layer2.1.conv2.weight"][:, :, 0, 2].T
    )
    np.testing.assert_array_equal(
        got["attnpool.c_proj.kernel"], source["visual.attnpool.c_proj.weight"].T
    )
    back = converted(command(out, "--reverse", out="back.safetensors"))
    assert_identical(load_file(back), image_tower(source))
    # An encoder of fewer stages takes of the same file what it has.
    assert not any(
        "attnpool" in name or "layer4" in name
        for name in weights.shapes(backbones.create("tiny", weights=out, taps=(1, 2)))
    )


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
def test_openais_archives_convert(command, tmp_path):
    """A scripted module in half precision, buffers included, gives the same tensors, widened, as a
    plain file.
    """
    torch = pytest.importorskip("torch")
    source = tensors()
    root = torch.nn.Module()
    for name, tensor in source.items():
        *parts, leaf = name.split(".")
        module = root
        for part in parts:
            if not hasattr(module, part):
                module.add_module(part, torch.nn.Module())
            module = getattr(module, part)
        value = torch.from_numpy(tensor)
        if value.is_floating_point() and not leaf.startswith("running"):
            module.register_parameter(leaf, torch.nn.Parameter(value.half()))
        else:
            module.register_buffer(leaf, value)
    root.register_buffer("input_resolution", torch.tensor(64))
    torch.jit.save(torch.jit.script(root), str(tmp_path / "RN.pt"))
    got = load_file(converted(command(tmp_path / "RN.pt")))
    np.testing.assert_array_equal(
        got["layer2.0.bn2.mean"], source["visual.layer2.0.bn2.running_mean"]
    )
    np.testing.assert_array_equal(
        got["attnpool.v_proj.bias"],
        source["visual.attnpool.v_proj.bias"].astype(np.float16).astype(np.float32),
    )


def test_what_does_not_fit_is_refused_whole(command):
    """Dropped, added and transposed tensors, positions of another pool, statistics that are no
    floats: all named at once.
    """
    source = tensors()
    source["visual.layer1.0.bn4.bias"] = source.pop("visual.layer1.0.bn3.bias")
    source["visual.layer2.0.conv1.weight"] = (
        source["visual.layer2.0.conv1.weight"].transpose(1, 0, 2, 3).copy()
    )
    source["visual.attnpool.positional_embedding"] = np.ones((10, 128), np.float32)
    source["visual.bn1.running_mean"] = source["visual.bn1.running_mean"].astype(np.int64)
    refused(
        command(source),
        "1 unknown (visual.layer1.0.bn4.bias)",
        "1 missing (visual.layer1.0.bn3.bias)",
        "3 of another shape or type",
        "visual.layer2.0.conv1.weight is (16, 8, 1, 1), not (8, 16, 1, 1)",
        "visual.attnpool.positional_embedding is (10, 128), not (5, 128)",
        "visual.bn1.running_mean holds int64",
    )


def test_half_the_blocks_or_another_tower_are_refused(command):
    """Missing bottlenecks are counted and named; of a file of CLIP's vision transformer nothing
    fits.
    """
    source = {
        name: tensor
        for name, tensor in tensors().items()
        if not name.startswith(("visual.layer3", "visual.layer4"))
    }
    refused(
        command(source), "40 missing", "visual.layer3.0.conv1.weight", "of whose 119 tensors 79 fit"
    )
    refused(
        command(
            {
                "visual.class_embedding": np.ones(8, np.float32),
                "visual.proj": np.ones((8, 8), np.float32),
            }
        ),
        "119 tensors 0 fit",
    )
