"""Detectors of torchvision and detectron2: real key lists, the numbers of the originals, a workdir
that opens, the way back, refusals.
"""

import dataclasses
import functools
import json
import re

from flax import nnx
import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import jaxdg
from jaxdg import backbones, weights
from jaxdg import config as config_lib
from jaxdg.backbones import zoo
from jaxdg.config import ModelConfig
from jaxdg.conversion import checkpoint, faster_rcnn, mapping, models, vitdet, vltseg
from jaxdg.conversion import convert as torch_to_flax
from jaxdg.detection.rcnn.rpn import RpnConfig
from tests.conversion.checks import assert_identical, converted, make_models_once, refused
from tests.detection import models as golden_models


@pytest.fixture(autouse=True, scope="module")
def models_made_once():
    """No encoder's name changes its meaning between these tests."""
    with pytest.MonkeyPatch.context() as patch:
        make_models_once(patch)
        yield


CASCADE = pytest.mark.parametrize("cascade", [True, False], ids=["cascade", "one stage"])


def heads(cascade, classes, c=256, hidden=1024):
    """Names and shapes of the heads as detectron2 builds them by projects/ViTDet's configs, written
    out by hand.
    """

    def layer(name, *shape):
        return {f"{name}.weight": shape, f"{name}.bias": shape[:1]}

    shapes = {}
    for i in range(2):
        shapes |= layer(f"proposal_generator.rpn_head.conv.conv{i}", c, c, 3, 3)
    shapes |= layer("proposal_generator.rpn_head.objectness_logits", 3, c, 1, 1)
    shapes |= layer("proposal_generator.rpn_head.anchor_deltas", 12, c, 1, 1)
    for stage in (".0", ".1", ".2") if cascade else ("",):
        for i in range(4):
            shapes |= {f"roi_heads.box_head{stage}.conv{i + 1}.weight": (c, c, 3, 3)}
            shapes |= {
                f"roi_heads.box_head{stage}.conv{i + 1}.norm.{part}": (c,)
                for part in ("weight", "bias")
            }
        shapes |= layer(f"roi_heads.box_head{stage}.fc1", hidden, c * 49)
        shapes |= layer(f"roi_heads.box_predictor{stage}.cls_score", classes + 1, hidden)
        shapes |= layer(
            f"roi_heads.box_predictor{stage}.bbox_pred", 4 if cascade else 4 * classes, hidden
        )
    for i in range(4):
        shapes |= {f"roi_heads.mask_head.mask_fcn{i + 1}.weight": (c, c, 3, 3)}
        shapes |= {
            f"roi_heads.mask_head.mask_fcn{i + 1}.norm.{part}": (c,) for part in ("weight", "bias")
        }
    shapes |= {
        "roi_heads.mask_head.deconv.weight": (c, c, 2, 2),
        "roi_heads.mask_head.deconv.bias": (c,),
    }
    return shapes | layer("roi_heads.mask_head.predictor", classes, c, 1, 1)


def empty(shapes):
    """A checkpoint that takes no room."""
    return checkpoint.Checkpoint(
        list(shapes), lambda name: np.broadcast_to(np.float32(0), shapes[name])
    )


def detectors_part(tensors):
    """Without masks."""
    return {
        name: tensor
        for name, tensor in tensors.items()
        if not name.startswith("roi_heads.mask_head.")
    }


@CASCADE
def test_a_published_vitdet_fits(golden, cascade):
    """All tensors of the base size, those of its encoder as detectron2's own code builds them, are
    mapped, or are of the mask head.
    """
    with np.load(golden / "vitdet.npz") as file:
        shapes = {
            n: tuple(map(int, s.split(",")))
            for n, s in zip(file["names"].tolist(), file["shapes"].tolist(), strict=True)
        }
    shapes |= heads(cascade, 80)
    file = empty(shapes)
    config = vitdet.of_checkpoint(file)
    m = config.model
    assert (m.encoder, m.decoder, config.data.crop) == (
        "sam_b16",
        "cascade_rcnn" if cascade else "faster_rcnn",
        (1024, 1024),
    )
    assert config.data.boxes is not None
    assert (len(config.data.boxes.classes), config.data.boxes.classes[79]) == (80, "toothbrush")
    model = vltseg.abstract(config)
    result = mapping.to_flax(model, (vitdet.of_workdir(config),), file.names, file.read)
    assert result.left_out.keys() == shapes.keys() - detectors_part(shapes).keys()
    # Only the positions are not those of the module: they are of the pre-training, and resized.
    expected = mapping.source_shapes(model, vitdet.of_workdir(config))
    assert {n for n, shape in detectors_part(shapes).items() if expected[n] != shape} == {
        "backbone.net.pos_embed"
    }
    assert expected["backbone.net.pos_embed"] == (1, 1 + 64 * 64, 768)
    e = backbones.entry("sam_b16").config
    assert isinstance(e, backbones.SamConfig)
    assert (e.window, e.global_blocks) == (14, (2, 5, 8, 11))
    np.testing.assert_allclose(
        np.array([e.mean, e.std]) * 255,
        [[123.675, 116.28, 103.53], [58.395, 57.12, 57.375]],
        rtol=1e-6,
    )


def test_published_faster_rcnns_fit():
    """Names and shapes of torchvision's own model, and the older names of its published file, are
    mapped, or are of the encoder.
    """
    torch = pytest.importorskip("torch")
    pytest.importorskip("tests.oracles.stand_ins")  # before torchvision
    detection = pytest.importorskip("torchvision.models.detection")
    with torch.device("meta"):
        state = detection.fasterrcnn_resnet50_fpn(weights=None, weights_backbone=None).state_dict()
        second = detection.fasterrcnn_resnet50_fpn_v2(
            weights=None, weights_backbone=None
        ).state_dict()
    new = {name: tuple(tensor.shape) for name, tensor in state.items()}
    old = {
        re.sub(r"(blocks\.\d|rpn\.head\.conv(?=\.0)).*(?=\.(weight|bias))", r"\1", name): shape
        for name, shape in new.items()
    }
    assert {"backbone.fpn.layer_blocks.3.bias", "rpn.head.conv.weight"} <= old.keys()
    for shapes, layout in zip((new, old), faster_rcnn.layouts(), strict=True):
        file = empty(shapes)
        assert faster_rcnn.of_checkpoint(file.names, file.read) == (90,)
        assert models.identified(file) == "faster_rcnn"
        module = faster_rcnn.abstract(90)
        result = mapping.to_flax(module, faster_rcnn.layouts(), file.names, file.read)
        assert result.layout.name == layout.name
        assert result.left_out.keys() == {
            name for name in shapes if name.startswith("backbone.body.")
        }
        assert mapping.source_shapes(module, layout) == {
            name: shape for name, shape in shapes.items() if name not in result.left_out
        }
    with pytest.raises(mapping.Misfit, match="BatchNorms"):
        faster_rcnn.of_checkpoint(second, lambda name: np.zeros(second[name].shape, np.float32))


def test_faster_rcnn_detects_as_torchvision(golden):
    """From maps of an encoder through pyramid and heads to boxes, with torchvision's weights
    through the table: its detections.
    """
    graph, state = nnx.split(golden_models.faster_rcnn())
    sizes = np.array([golden_models.IMAGE] * 2, np.float32)

    @functools.partial(
        jax.jit, compiler_options={"xla_backend_optimization_level": 0}
    )  # most of the time goes into compiling
    def run(state, stages, sizes):
        model = nnx.merge(graph, state)
        return model.head.detections(model.head(model.neck(stages)), sizes)

    found = jax.device_get(run(state, golden_models.stages(), sizes))
    with np.load(golden / "detectors.npz") as file:
        assert found.valid.sum(axis=1).tolist() == file["found"].tolist()
        assert file["found"].min() > 9, "or equal detections would say little"
        np.testing.assert_allclose(found.boxes[found.valid], file["boxes"], atol=2e-3)
        np.testing.assert_allclose(found.scores[found.valid], file["scores"], atol=1e-4)
        np.testing.assert_array_equal(found.classes[found.valid] + 1, file["labels"])


@pytest.fixture
def small_heads(monkeypatch):
    """Torchvision's sizes, smaller; a checkpoint of them by today's names with random numbers."""
    config = dataclasses.replace(
        faster_rcnn.CONFIG, channels=8, roi=dataclasses.replace(faster_rcnn.CONFIG.roi, hidden=12)
    )
    monkeypatch.setattr(faster_rcnn, "CONFIG", config)
    monkeypatch.setattr(faster_rcnn, "STAGES", (4, 6, 8, 10))
    shapes = mapping.source_shapes(faster_rcnn.abstract(5), faster_rcnn.layouts()[0])
    rng = np.random.default_rng(0)
    tensors = {name: rng.standard_normal(shape, np.float32) for name, shape in shapes.items()}
    return tensors | {"backbone.body.conv1.weight": rng.standard_normal((4, 3, 7, 7), np.float32)}


def test_faster_rcnn_loads_and_comes_back(command, small_heads):
    """The file names its sizes and loads; --reverse gives every tensor of pyramid and heads bit by
    bit, but for the background's box.
    """
    code, report, err, out = command(small_heads, model=None)
    assert (code, err) == (0, "")
    assert "30 of 31 tensors mapped (layout: torchvision)" in report
    assert "backbone.body.conv1.weight (the encoder" in report
    assert "5 classes" in report
    about = weights.metadata(out)
    assert (about["model"], json.loads(about["num_classes"]), json.loads(about["channels"])) == (
        "faster_rcnn",
        5,
        [4, 6, 8, 10],
    )
    assert json.loads(about["config"])["roi"]["hidden"] == 12
    model = faster_rcnn.abstract(5)
    weights.load(model, out)
    assert_identical(weights.tensors(model), load_file(out))
    want = {
        name: tensor
        for name, tensor in small_heads.items()
        if not name.startswith("backbone.body.")
    }
    for part in ("weight", "bias"):  # torchvision neither trains nor reads it
        want[f"roi_heads.box_predictor.bbox_pred.{part}"] = want[
            f"roi_heads.box_predictor.bbox_pred.{part}"
        ].copy()
        want[f"roi_heads.box_predictor.bbox_pred.{part}"][:4] = 0
    assert_identical(
        load_file(converted(command(out, "--reverse", model=None, out="back.safetensors"))), want
    )
    released = load_file(
        converted(
            command(
                out,
                "--reverse",
                "--layout",
                "torchvision-released",
                model=None,
                out="old.safetensors",
            )
        )
    )
    np.testing.assert_array_equal(
        released["rpn.head.conv.weight"], want["rpn.head.conv.0.0.weight"]
    )
    assert_identical(
        load_file(converted(command(released, model=None, out="again.safetensors"))), load_file(out)
    )


def damaged(tensors, dropped, transposed):
    """One tensor missing, one too many, one transposed."""
    tensors = dict(tensors)
    tensors["roi_heads.box_head.fc9.weight"] = tensors.pop(dropped)
    tensors[transposed] = np.ascontiguousarray(np.swapaxes(tensors[transposed], 0, 1))
    return tensors


def test_a_faster_rcnn_that_does_not_fit_is_refused_whole(command, small_heads):
    """Every offender by torchvision's names, and no file; so is one that does not tell its classes,
    and another model's.
    """
    wrong = damaged(
        small_heads, "backbone.fpn.layer_blocks.2.0.bias", "roi_heads.box_head.fc6.weight"
    )
    refused(
        command(wrong, model="faster_rcnn"),
        "source.safetensors is no checkpoint of faster_rcnn",
        "1 unknown (roi_heads.box_head.fc9.weight)",
        "1 missing (backbone.fpn.layer_blocks.2.0.bias)",
        "roi_heads.box_head.fc6.weight is (392, 12), not (12, 392)",
    )
    refused(
        command({"conv1.weight": np.zeros(3, np.float32)}, model="faster_rcnn"), faster_rcnn.CLASSES
    )


WIDTH = 32
LEVELS = golden_models.CHANNELS
RPN = RpnConfig(
    sizes=((8.0,), (16.0,), (32.0,), (64.0,), (128.0,)), before=(60, 50), after=(50, 40)
)


def small_model():
    """A `ModelConfig` whose two-stage detectors have the golden file's sizes."""
    model = ModelConfig()
    for head in (model.cascade_rcnn, model.faster_rcnn):
        head.channels = LEVELS
        head.rpn = RPN
        head.roi = dataclasses.replace(head.roi, channels=LEVELS, hidden=16, detections=20)
    return model


@pytest.fixture
def small_vitdet(monkeypatch):
    """An encoder of the golden file's size in the zoo, and heads to go with it."""
    base = backbones.entry("sam_b16").config
    config = dataclasses.replace(
        base,
        image_size=(96, 96),
        width=WIDTH,
        heads=2,
        depth=4,
        taps=(3,),
        global_blocks=(1, 3),
        window=4,
    )
    monkeypatch.setitem(backbones.ZOO, "tiny", zoo.Entry(config))
    monkeypatch.setattr(vitdet, "ModelConfig", small_model)


def small_checkpoint(cascade, grid=3):
    """A small ViTDet with the numbers of the golden file, by names and shapes of detectron2;
    positions of `grid` rows.
    """
    c = WIDTH
    hd = WIDTH // 2
    shapes = {
        "backbone.net.pos_embed": (1, 1 + grid * grid, c),
        "backbone.net.patch_embed.proj.weight": (c, 3, 16, 16),
    }
    shapes |= {"backbone.net.patch_embed.proj.bias": (c,)}
    for i in range(4):
        block = f"backbone.net.blocks.{i}"
        side = 6 if i in (1, 3) else 4
        shapes |= {f"{block}.norm{n}.{part}": (c,) for n in (1, 2) for part in ("weight", "bias")}
        shapes |= {f"{block}.attn.rel_pos_{axis}": (2 * side - 1, hd) for axis in "hw"}
        for name, rows, columns in (
            ("attn.qkv", 3 * c, c),
            ("attn.proj", c, c),
            ("mlp.fc1", 4 * c, c),
            ("mlp.fc2", c, 4 * c),
        ):
            shapes |= {f"{block}.{name}.weight": (rows, columns), f"{block}.{name}.bias": (rows,)}
    for name, rows, columns in (("2.0", c, c // 2), ("2.3", c // 2, c // 4), ("3.0", c, c // 2)):
        shapes |= {
            f"backbone.simfp_{name}.weight": (rows, columns, 2, 2),
            f"backbone.simfp_{name}.bias": (columns,),
        }
    shapes |= {f"backbone.simfp_2.1.{part}": (c // 2,) for part in ("weight", "bias")}
    for level, first, inputs in ((2, 4, c // 4), (3, 1, c // 2), (4, 0, c), (5, 1, c)):
        for name, columns, side in (
            (f"simfp_{level}.{first}", inputs, 1),
            (f"simfp_{level}.{first + 1}", LEVELS, 3),
        ):
            shapes |= {f"backbone.{name}.weight": (LEVELS, columns, side, side)}
            shapes |= {f"backbone.{name}.norm.{part}": (LEVELS,) for part in ("weight", "bias")}
    shapes |= heads(cascade, 3, LEVELS, 16)
    return {name: golden_models.weight(name, shape) for name, shape in shapes.items()}


@pytest.fixture
def workdir(small_vitdet, tmp_path, capsys):
    """Runs the command on a small ViTDet; returns the workdir."""

    def make(tensors):
        save_file(tensors, tmp_path / "source.safetensors")
        code = torch_to_flax.main(
            [
                "--checkpoint",
                str(tmp_path / "source.safetensors"),
                "--out",
                str(tmp_path / "run"),
                "--model",
                "vitdet",
            ]
        )
        out, err = capsys.readouterr()
        assert (code, err) == (0, ""), err
        assert "tiny, " in out
        return tmp_path / "run"

    return make


def test_vitdets_encoder_and_pyramid_compute_what_detectron2_does(golden, small_vitdet):
    """Levels p2 to p5 of an image whose grid no window and no position divides, within 1e-4; p6 is
    every other feature of p5.
    """
    tensors = small_checkpoint(True)
    file = checkpoint.Checkpoint(list(tensors), tensors.__getitem__)
    config = vitdet.of_checkpoint(file)
    model = vltseg.abstract(config)
    weights.fill(
        model,
        mapping.to_flax(model, (vitdet.of_workdir(config),), file.names, file.read).tensors,
        "golden",
    )
    graph, state = nnx.split((model.backbone, model.neck))

    @jax.jit
    def run(state, image):
        backbone, neck = nnx.merge(graph, state)
        return neck(backbone(image))

    levels = run(state, golden_models.normal("vitdet", (1, 96, 96, 3)))
    with np.load(golden / "vitdet.npz") as theirs:
        for i in range(2, 6):
            np.testing.assert_allclose(levels[i - 2], theirs[f"p{i}"], atol=1e-4, err_msg=f"p{i}")
        np.testing.assert_allclose(levels[4], theirs["p5"][:, ::2, ::2], atol=1e-4)


@CASCADE
def test_vitdet_opens_as_a_workdir_and_comes_back(workdir, tmp_path, cascade):
    """`jaxdg.load` finds boxes of its classes; --reverse gives every tensor but the masks' bit by
    bit, zeros for the class token.
    """
    tensors = small_checkpoint(cascade, grid=6)
    folder = workdir(tensors)
    config = config_lib.load(folder)
    assert (config.data.crop, config.model.encoder) == ((96, 96), "tiny")
    assert config.data.boxes is not None
    assert config.data.boxes.classes == ("class_0", "class_1", "class_2")
    if not cascade:
        found = jaxdg.load(folder).predict(
            np.random.default_rng(0).integers(0, 256, (50, 96, 3), np.uint8)
        )
        assert len(found.scores) > 3
        assert set(found.classes.tolist()) <= {0, 1, 2}
    back = tmp_path / "back.safetensors"
    assert (
        torch_to_flax.main(
            ["--model", "vitdet", "--checkpoint", str(folder), "--out", str(back), "--reverse"]
        )
        == 0
    )
    want = detectors_part(tensors)
    want["backbone.net.pos_embed"][:, 0] = 0
    assert_identical(load_file(back), want)


def test_a_vitdet_that_does_not_fit_is_refused_whole(small_vitdet, command):
    """Every offender by detectron2's names, and no workdir; an encoder of another size, and a
    detector of LVIS, for what they are.
    """
    tensors = small_checkpoint(True)
    wrong = damaged(tensors, "backbone.simfp_3.1.norm.bias", "roi_heads.box_head.1.fc1.weight")
    wrong["backbone.net.blocks.3.attn.rel_pos_h"] = wrong[
        "backbone.net.blocks.3.attn.rel_pos_h"
    ].T.copy()
    wrong["backbone.net.pos_embed"] = wrong["backbone.net.pos_embed"][:, 1:].copy()
    refused(
        command(wrong, model="vitdet", out="run"),
        "source.safetensors is no checkpoint of vitdet",
        "1 unknown (roi_heads.box_head.fc9.weight)",
        "1 missing (backbone.simfp_3.1.norm.bias)",
        "roi_heads.box_head.1.fc1.weight is (294, 16), not (16, 294)",
        "backbone.net.blocks.3.attn.rel_pos_h is (16, 11), not (11, 16)",
        "backbone.net.pos_embed is (1, 9, 32), not (1, 37, 32)",
    )
    lvis = tensors | {"roi_heads.box_predictor.0.fed_loss_cls_weights": np.ones(3, np.float32)}
    refused(
        command(lvis, model="vitdet", out="run"),
        "1 unknown (roi_heads.box_predictor.0.fed_loss_cls_weights)",
    )
    shorter = {name: tensor for name, tensor in tensors.items() if ".blocks.3." not in name}
    refused(
        command(shorter, model="vitdet", out="run"), "3 blocks of 32 channels; allowed: 12 of 768"
    )
    refused(
        command({"x": np.zeros(3, np.float32)}, model="vitdet", out="run"),
        "1 missing (backbone.net.patch_embed.proj.bias)",
    )


def test_another_runs_workdir_is_no_vitdet(workdir, tmp_path, capsys):
    """--reverse of a workdir whose encoder is another, and of a folder that is none, each in one
    line.
    """
    folder = workdir(small_checkpoint(True))
    config = json.loads((folder / "config.json").read_text())
    config["model"]["encoder"] = "scratch_ti8"
    (folder / "config.json").write_text(json.dumps(config))
    for source, reason in (
        (folder, "cascade_rcnn on model.encoder scratch_ti8 is no ViTDet"),
        (tmp_path, "config.json does not exist"),
    ):
        out = tmp_path / "back.safetensors"
        assert (
            torch_to_flax.main(
                ["--model", "vitdet", "--checkpoint", str(source), "--out", str(out), "--reverse"]
            )
            == 1
        )
        err = capsys.readouterr().err
        assert err.count("\n") == 1
        assert reason in err
        assert not out.exists()
