"""Configurations: every value of its declared type or an error that names the field, and files that
give back what was saved.
"""

import ast
import dataclasses
import inspect
import json
import os
from pathlib import Path
import re
import shlex
import subprocess
import sys

import pytest

from jaxdg import config as config_lib
from jaxdg import segmentation
from jaxdg.backbones import EncoderOptions
from jaxdg.config import Config, listing, overrides
from jaxdg.data.boxes import BoxOptions
from jaxdg.data.datasets import FolderOptions, StreetsOptions
from jaxdg.detection.fcos import FcosConfig
from jaxdg.detection.rcnn.detectors import C4Config, RcnnConfig
from jaxdg.detection.rcnn.gated import GatedC4Config, GatedRcnnConfig
from jaxdg.detection.rcnn.gates import GatesConfig
from jaxdg.detection.rcnn.roi_heads import RoiHeadsConfig
from jaxdg.detection.rcnn.rpn import RpnConfig
from jaxdg.methods.average import AverageOptions
from jaxdg.methods.tldr import TldrOptions
from jaxdg.segmentation.mask2former.head import Mask2FormerOptions
from jaxdg.segmentation.segformer import SegformerOptions
from jaxdg.segmentation.upscaling import UpscalingOptions
from tests import forked

ROOT = Path(__file__).resolve().parents[2]
CONFIGS = sorted((ROOT / "configs").glob("*.py"))
ALL = [
    Config,
    config_lib.MeshConfig,
    config_lib.DataConfig,
    config_lib.ModelConfig,
    EncoderOptions,
    Mask2FormerOptions,
    SegformerOptions,
    UpscalingOptions,
    FcosConfig,
    RcnnConfig,
    C4Config,
    GatedC4Config,
    GatedRcnnConfig,
    GatesConfig,
    RpnConfig,
    RoiHeadsConfig,
    TldrOptions,
    AverageOptions,
    config_lib.OptimizerConfig,
    config_lib.EvaluationConfig,
    StreetsOptions,
    FolderOptions,
]


def with_field(field, value):
    """A default configuration with one dotted field set, past the type annotations as flags and
    JSON do it.
    """
    tree = dataclasses.asdict(Config())
    *path, last = field.split(".")
    part = tree
    for name in path:
        part = part[name]
    part[last] = value
    return tree


def read(tree, tmp_path):
    """The configuration of a workdir whose config.json holds `tree`."""
    (tmp_path / "config.json").write_text(json.dumps(tree))
    return config_lib.load(tmp_path)


@pytest.mark.parametrize(
    ("field", "given", "expected"),
    [
        ("steps", 7.0, 7),
        ("steps", "7", 7),
        ("optimizer.clip", 1, 1.0),
        ("optimizer.clip", "1e-2", 0.01),
        ("model.remat", True, True),
        ("model.weights", None, None),
        ("model.weights", "a.safetensors", "a.safetensors"),
        ("data.crop", [64, 96], (64, 96)),
        ("data.scale", [1, 2], (1.0, 2.0)),
        ("data.resize", None, None),
        ("data.randaugment", [2, 9], (2, 9.0)),
        ("tldr.generalization", [1], (1.0,)),
        ("model.taps", [], ()),
        ("evaluation.domains", ["night", "acdc/fog"], ("night", "acdc/fog")),
        ("evaluation.domains", ["town a, b", "[red]"], ("town a, b", "[red]")),
        (
            "data.folder",
            {"classes": ["road, route", "sky"]},
            FolderOptions(classes=("road, route", "sky")),
        ),
        ("data.boxes", {"classes": ["a,b", "c"]}, BoxOptions(classes=("a,b", "c"))),
        ("optimizer.learning_rate_factors", [["norm", 1]], (("norm", 1.0),)),
        (
            "optimizer.learning_rate_factors",
            [["a{1,2}", 0.5], ["b", 2]],
            (("a{1,2}", 0.5), ("b", 2.0)),
        ),
        ("data.folder", {"id_map": {"7": 0, "23": 1.0}}, FolderOptions(id_map={7: 0, 23: 1})),
        ("data.folder", None, None),
    ],
)
def test_values_take_their_declared_type(field, given, expected, tmp_path):
    """What JSON writes is the declared value, down to the type of each part (written out by hand);
    no text is split.
    """
    found = config_lib.get(read(with_field(field, given), tmp_path), field)
    assert found == expected
    assert repr(found) == repr(expected)  # 1 == 1.0 == True


def test_a_dataclass_is_coerced_like_json():
    """A config file may assign lists and integers; the caller's object stays as it was."""
    mutable = Config()
    mutable.data.crop = [64, 96]  # pyright: ignore[reportAttributeAccessIssue]
    mutable.optimizer.clip = 1
    config = config_lib.validated(mutable)
    assert (config.data.crop, repr(config.optimizer.clip)) == ((64, 96), "1.0")
    assert mutable.data.crop == [64, 96]
    assert config_lib.validated(config) == config


@pytest.mark.parametrize(
    ("field", "given", "allowed"),
    [
        ("steps", 1.5, "a valid integer"),
        ("steps", "many", "a valid integer"),
        ("steps", None, "a valid integer"),
        ("steps", float("inf"), "a finite number"),
        ("steps", [1], "a valid integer"),
        ("optimizer.clip", "much", "a valid number"),
        ("optimizer.clip", None, "a valid number"),
        ("optimizer.clip", float("nan"), "a finite number"),
        ("optimizer.learning_rate", float("inf"), "a finite number"),
        ("model.remat", 2, "a valid boolean"),
        ("model.remat", "maybe", "a valid boolean"),
        ("model.encoder", 3, "a valid string"),
        ("model.encoder", None, "a valid string"),
        ("model.weights", 3, "a valid string"),
        ("data.crop", 64, "a valid tuple"),
        ("data.crop", [64], "at least 2 items"),
        ("data.crop", "1,2,3", "a valid tuple"),
        ("data.crop", [1, 2, 3], "at most 2 items"),
        ("data.crop", [64, "x"], "a valid integer"),
        ("model.taps", {"a": 1}, "a valid tuple"),
        ("evaluation.domains", ["night", 3], "a valid string"),
        ("evaluation.domains", "night,fog", "a valid tuple"),
        ("optimizer.learning_rate_factors", [["norm"]], "at least 2 items"),
        ("optimizer.learning_rate_factors", ["norm", 2], "a valid tuple"),
        ("data", [], "DataConfig"),
        ("data.folder", [1], "FolderOptions"),
        ("data.folder", {"id_map": [7, 0]}, "a valid dictionary"),
        ("data.folder", {"id_map": {"x": 0}}, "a valid integer"),
    ],
)
def test_a_wrong_type_names_field_and_what_is_allowed(field, given, allowed, tmp_path):
    """One line with the field (or the part of it), the value, and what would be right."""
    with pytest.raises(
        ValueError,
        match=rf"config\.json: {re.escape(field)}\S* is .*; allowed: .*{re.escape(allowed)}",
    ) as error:
        read(with_field(field, given), tmp_path)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("field", "given"),
    [
        *[
            (f, 0)
            for f in (
                "steps",
                "batch_size",
                "log_every",
                "checkpoint_every",
                "keep_checkpoints",
                "mesh.data",
                "mesh.fsdp",
            )
        ],
        *[
            (f, 0)
            for f in (
                "data.streets.images",
                "data.streets.val_images",
                "data.max_class_share",
                "optimizer.learning_rate",
            )
        ],
        *[
            (f, 0)
            for f in (
                "optimizer.epsilon",
                "optimizer.accumulate",
                "evaluation.batch_size",
                "evaluation.windows_per_call",
            )
        ],
        *[
            (f, -1)
            for f in (
                "seed",
                "eval_every",
                "data.workers",
                "data.flip",
                "data.brightness",
                "data.contrast",
                "model.drop_path",
            )
        ],
        *[
            (f, -1)
            for f in (
                "data.streets.seed",
                "optimizer.encoder_factor",
                "optimizer.warmup_steps",
                "optimizer.power",
            )
        ],
        *[(f, -1) for f in ("optimizer.weight_decay", "optimizer.clip", "evaluation.max_images")],
        *[
            ("mesh.fsdp", -2),
            ("seed", 2**31),
            ("data.flip", 1.1),
            ("data.max_class_share", 1.1),
            ("data.brightness", 256),
        ],
        *[
            ("data.contrast", 1.1),
            ("model.drop_path", 1),
            ("optimizer.betas", (0.9, 1)),
            ("optimizer.betas", (-0.1, 0.9)),
        ],
        *[
            ("data.source_weights", (1.0,) * 2),
            ("data.source_weights", (0.0,)),
            ("data.mapillary_labels", "x"),
        ],
        *[
            ("data.crop", (0, 8)),
            ("data.scale", (0, 1)),
            ("data.scale", (2, 1)),
            ("data.streets.size", (31, 64)),
        ],
        *[
            ("data.resize", (0, 8)),
            ("data.shortest_sides", (0,)),
            ("data.longest_side", 0),
            ("data.longest_side", 9),
            ("data.padding", "x"),
            ("data.rare_class_min_crop_ratio", 0),
            ("data.rare_class_min_crop_ratio", 0.5),
            ("data.keep_ratio", True),
            ("data.randaugment", (-1, 5)),
            ("data.randaugment", (2, 10.1)),
        ],
        *[
            (f, -1)
            for f in (
                "data.rare_class_temperature",
                "data.distortion_probability",
                "data.saturation",
                "data.hue",
            )
        ],
        *[(f, 0) for f in ("data.rare_class_min_pixels", "data.max_boxes")],
        *[
            ("data.pixmix", (-1, 4)),
            ("data.pixmix", (1, 0)),
            ("tldr.threshold", -1),
            ("tldr.on", True),
        ],
        *[("tldr.regularization", (-1.0,)), ("tldr.generalization", (1.0,) * 5)],
        *[("data.distortion_probability", 1.1), ("data.saturation", 1.1), ("data.hue", 91)],
        *[
            ("evaluation.stride", (0, 1)),
            ("evaluation.stride", (64, 129)),
            ("evaluation.domains", ()),
        ],
        *[
            ("task", "x"),
            ("model.pyramid", "x"),
            ("model.decoder", "x"),
            ("model.dtype", "float16"),
            ("evaluation.protocol", "x"),
        ],
        *[
            ("optimizer.accumulate", 3),
            ("optimizer.warmup_steps", 1000),
            ("optimizer.warmup_factor", 0.5),
            ("optimizer.min_learning_rate", 1.1e-4),
        ],  # do not go with the defaults of batch_size, steps, warmup_steps and learning_rate
        *[
            ("optimizer.warmup_factor", 1.1),
            ("optimizer.layer_decay", 0),
            ("optimizer.layer_decay", 1.1),
            ("optimizer.schedule", "torch"),
            ("optimizer.final_weight_decay", -1e-9),
            ("average.momentum", 0),
            ("average.momentum", 1),
            ("average.start", -1),
        ],
        *[
            ("optimizer.learning_rate_factors", (("(", 1.0),)),
            ("optimizer.weight_decay_factors", (("norm", -1.0),)),
        ],
    ],
)
def test_a_wrong_value_names_field_and_what_is_allowed(field, given, tmp_path):
    """Every bound of every field refuses the value just outside, in one line that says the field,
    the value and the bound.
    """
    with pytest.raises(
        ValueError, match=rf"config\.json: {re.escape(field)}\S* is .*; allowed: \S"
    ) as error:
        read(with_field(field, given), tmp_path)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("field", "given"),
    [
        *[
            ("eval_every", 0),
            ("seed", 2**31 - 1),
            ("mesh.fsdp", -1),
            ("data.flip", 1),
            ("data.flip", 0),
            ("data.max_class_share", 1),
        ],
        *[
            ("data.source_weights", (2.0,)),
            ("data.mapillary_labels", "rein"),
            ("data.skip", "broken.txt"),
        ],
        *[
            ("data.resize", (1, 1)),
            ("data.randaugment", (0, 10)),
            ("data.rare_class_min_pixels", 1),
            ("data.max_boxes", 1),
        ],
        *[
            ("data.distortion_probability", 0),
            ("data.saturation", 1),
            ("data.hue", 90),
            ("data.rare_class_temperature", 0),
        ],
        *[
            ("data.pixmix", (0, 0)),
            ("data.pixmix", (1, 0.1)),
            ("tldr.threshold", 0),
            ("tldr.regularization", ()),
        ],
        *[
            ("data.brightness", 0),
            ("data.contrast", 1),
            ("optimizer.power", 0),
            ("optimizer.clip", 0),
            ("optimizer.betas", (0, 0)),
        ],
        *[
            ("evaluation.stride", (128, 128)),
            ("optimizer.accumulate", 8),
            ("optimizer.warmup_steps", 999),
            ("optimizer.min_learning_rate", 1e-4),
            ("optimizer.final_weight_decay", 0),
            ("optimizer.layer_decay", 1),
            ("average.start", 0),
            ("data.scale", (1, 1)),
        ],
    ],
)
def test_the_bounds_themselves_are_allowed(field, given, tmp_path):
    """The last value inside each bound is taken."""
    assert config_lib.get(read(with_field(field, given), tmp_path), field) == given


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({}, r"data\.scale is \(0\.75, 1\.5\); allowed: \(1\.0, 1\.0\) with data\.shortest_sides"),
        (
            {"scale": (1, 1), "resize": (8, 8)},
            r"data\.resize is \(8, 8\); allowed: None with data\.shortest_sides, which says",
        ),
        (
            {"scale": (1, 1), "keep_ratio": True},
            r"data\.keep_ratio is True; allowed: False, as data\.resize is None",
        ),
        (
            {"scale": (1, 1), "longest_side": 511},
            r"data\.longest_side is 511; allowed: at least 512, the largest of",
        ),
        (
            {"scale": (1, 1), "padding": "corner", "randaugment": (1, 2)},
            r"data\.padding is 'corner'; allowed: 'around' with data\.randaugment, which moves",
        ),
        ({"scale": (1, 1), "longest_side": 512, "padding": "corner"}, None),
    ],
)
def test_settings_of_crops_that_exclude_each_other(changes, message, tmp_path):
    """Shortest sides take the place of resize and scale, and what would be ignored is refused."""
    tree = dataclasses.asdict(Config())
    tree["data"] |= {"shortest_sides": (256, 512)} | changes
    if message is None:
        assert read(tree, tmp_path).data.shortest_sides == (256, 512)
        return
    with pytest.raises(ValueError, match=rf"config\.json: {message}") as error:
        read(tree, tmp_path)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("field", "message"),
    [
        ("stpes", r"unknown field stpes; did you mean steps\?"),
        ("model.encodr", r"unknown field model\.encodr; did you mean model\.encoder\?"),
        (
            "data.streets.sizes",
            r"unknown field data\.streets\.sizes; did you mean data\.streets\.size\?",
        ),
        (
            "data.folder.id_mpa",
            r"unknown field data\.folder\.id_mpa; did you mean data\.folder\.id_map\?",
        ),
        ("optimiser.clip", r"unknown field optimiser; did you mean optimizer\?"),
        ("dat.at.crop", r"unknown field dat; did you mean data\?"),
        ("data.at.size", r"unknown field data\.at; .*"),
        ("mesh.zzz", r"unknown field mesh\.zzz; allowed: mesh\.data mesh\.fsdp"),
        ("data.crop[0]", r"unknown field data\.crop\[0\]; did you mean data\.crop\?"),
        ("steps.x", r"unknown field steps\.x; steps has no parts, give --config\.steps=VALUE"),
    ],
)
def test_a_misspelt_flag_is_named_with_the_right_one(field, message):
    """Whichever part of a dotted flag is wrong, the message names it from the top and offers the
    nearest.
    """
    for arguments in (
        [f"--config.{field}=1"],
        ["x", f"-config.{field}", "1"],
        [f"--noconfig.{field}"],
    ):
        with pytest.raises(ValueError, match=message + "$"):
            overrides.take(arguments)


@pytest.mark.parametrize(
    ("arguments", "field", "expected"),
    [
        (["--config.steps=7"], "steps", 7),
        (["--config.steps", "7"], "steps", 7),
        (["-config.steps=7", "--config.steps=8"], "steps", 8),  # the last counts
        (["--config.optimizer.clip=1e-2"], "optimizer.clip", 0.01),
        (["--config.mesh.data", "-1"], "mesh.data", -1),
        (["--config.tldr.on"], "tldr.on", True),
        (["--config.tldr.on=false"], "tldr.on", False),
        (["--config.model.remat=1"], "model.remat", True),
        (["--noconfig.tldr.on"], "tldr.on", False),
        (["--config.data.resize=None"], "data.resize", None),
        (["--config.data.resize=720,1280"], "data.resize", (720, 1280)),
        (["--config.model.weights=None"], "model.weights", None),
        (["--config.model.weights=a=b.safetensors"], "model.weights", "a=b.safetensors"),
        (["--config.model.patch_size=None"], "model.patch_size", None),
        (["--config.data.folder=None"], "data.folder", None),
        (["--config.data.crop=64, 96"], "data.crop", (64, 96)),
        (["--config.data.crop=(64, 96)"], "data.crop", (64, 96)),
        (["--config.data.crop=[64, 96]"], "data.crop", (64, 96)),
        (["--config.data.pixmix=4,4"], "data.pixmix", (4, 4.0)),
        (["--config.model.taps=()"], "model.taps", ()),
        (["--config.model.taps=3"], "model.taps", (3,)),
        (["--config.model.taps=1,3,"], "model.taps", (1, 3)),
        (["--config.evaluation.domains=night, fog"], "evaluation.domains", ("night", "fog")),
        (
            ["--config.evaluation.domains", '"town a, b",fog'],
            "evaluation.domains",
            ("town a, b", "fog"),
        ),
        (
            ['--config.evaluation.domains=["town a, b", "fog"]'],
            "evaluation.domains",
            ("town a, b", "fog"),
        ),
        (
            ["--config.evaluation.domains=[red],(blue),it's"],
            "evaluation.domains",
            ("[red]", "(blue)", "it's"),
        ),
        (
            ['--config.data.folder.classes="road, route",sky'],
            "data.folder.classes",
            ("road, route", "sky"),
        ),
        (['--config.data.folder.classes="a ""b"", c",d'], "data.folder.classes", ('a "b", c', "d")),
        (["--config.data.boxes.classes='a, b','c'"], "data.boxes.classes", ("a, b", "c")),
        (['--config.data.boxes.lists="",""'], "data.boxes.lists", ("", "")),
        (["--config.data.folder.id_map={7: 0}"], "data.folder.id_map", {7: 0}),
        (
            ['--config.data.folder={"id_map": {"7": 0}}'],
            "data.folder",
            FolderOptions(id_map={7: 0}),
        ),
        (
            ['--config.optimizer.learning_rate_factors=[["a{1,2}", 1]]'],
            "optimizer.learning_rate_factors",
            (("a{1,2}", 1.0),),
        ),
    ],
)
def test_the_command_line_is_read_as_the_fields_type(arguments, field, expected):
    """Each way to write a value, None and parts of the configuration that were None included; and
    what is written of it is read back.
    """
    rest, given = overrides.take(["x", *arguments, "--workdir=y", "--", "--config.steps=9"])
    assert rest == ["x", "--workdir=y", "--", "--config.steps=9"]
    base = Config()
    config = overrides.applied(base, given)
    assert repr(config_lib.get(config, field)) == repr(expected)
    assert base == Config()
    written = overrides.take([f"--config.{field}={overrides.text_of(expected)}"])[1]
    assert overrides.applied(base, written) == config


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("--config.steps", r"--config\.steps has no value"),
        ("--noconfig.steps", r"steps is 'false'; allowed: a valid integer"),
        ("--noconfig.tldr.on=1", r"--noconfig\.tldr\.on=1; allowed: --noconfig\.tldr\.on"),
        ("--config.tldr.on=maybe", r"tldr\.on is 'maybe'; allowed: a valid boolean"),
        ("--config.steps=None", r"steps is 'None'; allowed: a valid integer"),
        ("--config.data.crop=None", r"data\.crop\[0\] is 'None'; allowed: a valid integer"),
        ("--config.data.crop=1,,2", r"data\.crop is .*; allowed: at most 2 items"),
        (
            '--config.data.folder.classes="a,b',
            r"data\.folder\.classes is '\"a,b'; allowed: .*quoted as in CSV",
        ),
        (
            "--config.data.folder.classes=[1]",
            r"data\.folder\.classes\[0\] is 1; allowed: a valid string",
        ),
        ("--config.data.folder=x", r"data\.folder is 'x'; allowed: .* FolderOptions"),
        (
            '--config.data.folder={"id_mpa": 1}',
            r"unknown field data\.folder\.id_mpa; did you mean data\.folder\.id_map\?",
        ),
    ],
)
def test_a_wrong_value_on_the_command_line_is_refused(argument, message):
    """In one line with the field, before anything else is looked at."""
    with pytest.raises(ValueError, match=message) as error:
        overrides.applied(Config(), overrides.take([argument])[1])
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("model.weights", "", r"model\.weights is ''; allowed: None or a file"),
        ("model.text_weights", " ", r"model\.text_weights is ' '; allowed: None or a file"),
        ("model.start", "", r"model\.start is ''; allowed: None, a workdir or a packed model"),
        ("data.skip", "", r"data\.skip is ''; allowed: None or a file"),
        ("data.pictures", "", r"data\.pictures is ''; allowed: None or a folder"),
        ("data.root", "", r"data\.root is ''; allowed: a folder, or the URL of one with records"),
        (
            "model.weights",
            "s3://bucket/w.safetensors",
            r"model\.weights is s3://bucket/w.*, a URL; allowed: None or a file, on a disk",
        ),
        ("data.skip", "gs://bucket/skip.txt", r"data\.skip is gs://bucket/skip\.txt, a URL"),
        (
            "model.start",
            "~no_one/run",
            r"model\.start is ~no_one/run, but ~no_one is no home folder",
        ),
        ("model.encoder", "", r"model\.encoder is ''; allowed: text that is not empty"),
        ("model.freeze", "", r"model\.freeze is ''; allowed: text that is not empty"),
        ("data.source", "", r"data\.source is ''; allowed: text"),
        ("data.source", "town+", r"data\.source is 'town\+'; allowed: names of domains"),
        ("evaluation.domains", ["night", ""], r"evaluation\.domains\[1\] is ''; allowed: text"),
        (
            "evaluation.domains",
            ["a/b", "c", "a_b"],
            r"evaluation\.domains has 'a/b' and 'a_b', whose files would have one name",
        ),
        (
            "evaluation.domains",
            ["night", "a++b"],
            r"evaluation\.domains is .*; allowed: names of domains",
        ),
        ("data.folder", {"images": ""}, r"data\.folder\.images is ''; allowed: text"),
        ("data.folder", {"classes": ["a", ""]}, r"data\.folder\.classes\[1\] is ''; allowed: text"),
        (
            "data.folder",
            {"classes": ["a", "b\nc"]},
            r"data\.folder\.classes\[1\] is 'b\\nc'; allowed: text in one line",
        ),
        (
            "data.folder",
            {"classes": ["car", "road", "car"]},
            r"data\.folder\.classes\[0\] and \[2\] are both 'car'; give",
        ),
        (
            "data.folder",
            {"classes": ["caf\u00e9", "cafe\u0301 "]},
            r"data\.folder\.classes\[0\] and \[1\] are both .*which is read as",
        ),
        (
            "data.boxes",
            {"classes": ["Car", "car"]},
            r"data\.boxes\.classes\[0\] and \[1\] are both 'car', which is read as 'Car'",
        ),
        ("data.boxes", {"images": ["a", ""]}, r"data\.boxes\.images\[1\] is ''; allowed: text"),
    ],
)
def test_texts_that_name_nothing_are_refused(field, value, message):
    """Empty and doubled names, and paths that are none, in one line that says which."""
    with pytest.raises(ValueError, match=message) as error:
        config_lib.validated(config_lib.typed(with_field(field, value)))
    assert "\n" not in str(error.value)


def test_a_workdir_of_the_days_of_empty_paths_opens(tmp_path):
    """It holds them as values: no file, and the current folder."""
    tree = dataclasses.asdict(Config())
    tree["data"].update(root="", skip="", pictures="")
    tree["model"].update(weights="", text_weights="", start="")
    config = read(tree, tmp_path)
    assert config == config_lib.validated(Config(data=config_lib.DataConfig(root=".")))


def test_texts_that_may_be_empty_are_those_documented(tmp_path):
    """The protocol's default, suffixes and lists; letters of another case make other classes of
    label maps.
    """
    tree = with_field(
        "data.folder",
        {
            "label_suffix": "",
            "image_suffix": "",
            "classes": ["Car", "car", "a % b & c_d #1 [x]", " e"],
        },
    )
    tree["data"]["boxes"] = {"lists": ["", ""], "classes": ["x, y"]}
    tree["evaluation"]["protocol"] = ""
    config = read(tree, tmp_path)
    assert config.data.folder is not None
    assert config.data.folder.classes == ("Car", "car", "a % b & c_d #1 [x]", " e")
    config_lib.save(config, tmp_path)
    assert config_lib.load(tmp_path) == config


def test_home_folders_are_expanded(tmp_path, monkeypatch):
    """In every path of the configuration; a URL stays, and an empty JAXDG_DATA is none."""
    monkeypatch.setenv("HOME", "/home/me")
    fields = (
        "data.root",
        "data.skip",
        "data.pictures",
        "model.weights",
        "model.text_weights",
        "model.start",
    )
    tree = dataclasses.asdict(Config())
    for field in fields:
        owner, name = field.split(".")
        tree[owner][name] = "~/x"
    tree["model"].update(decoder="faster_rcnn_c4", encoder="clip_rn50")
    tree["task"] = "detection"
    config = read(tree, tmp_path)
    assert [config_lib.get(config, field) for field in fields] == ["/home/me/x"] * len(fields)
    assert (
        config_lib.get(read(with_field("data.root", "gs://bucket/~x"), tmp_path), "data.root")
        == "gs://bucket/~x"
    )
    monkeypatch.setenv("JAXDG_DATA", "")
    assert Config().data.root == "data"


def test_flags_of_a_command(tmp_path):
    """A whole command line: the file's argument, overrides wherever they stand, lists, and paths,
    each refused in one line if wrong.
    """
    (tmp_path / "a.py").write_text(
        "from jaxdg.config import Config\ndef get_config(steps='5'):\n    return"
        " Config(steps=int(steps), batch_size=2)\n"
    )
    script = (
        "import sys\nfrom jaxdg.commands import command_line as cli\nexperiment, out, names ="
        " cli.define_config(), cli.define_path('out', '', default='x'), cli.define_list('names',"
        " '')\nurl = cli.define_path('url', '', urls=True)\ndef main(arguments):\n    c ="
        " experiment.value\n    print(c and (c.steps, c.data.resize, c.data.folder and"
        " c.data.folder.classes), out.value, names.value, url.value)\n   "
        " cli.console().print('[red]a[/red] :smile: [/x] ~')\ncli.run(main)\n"
    )
    (tmp_path / "command.py").write_text(script)

    def run(*arguments, code=0):
        own = {**os.environ, "HOME": "/home/me"}
        program = str(tmp_path / "command.py")
        done = forked.run(program, *arguments, folder=tmp_path, environment=own)
        assert done.returncode == code, done.stderr
        return done.stdout if code == 0 else done.stderr

    given = [
        '--config.data.folder.classes="a, b",c',
        "--config",
        "a.py:7",
        "--config.data.resize=None",
    ]
    shown = run(*given, "--out=~/o/[x]", '--names="p, q",r', "--url", "s3://b/c")
    assert (
        shown
        == "(7, None, ('a, b', 'c')) /home/me/o/[x] ('p, q', 'r') s3://b/c\n[red]a[/red] :smile:"
        " [/x] ~\n"
    )
    assert run() == "None x None None\n[red]a[/red] :smile: [/x] ~\n"
    for arguments, message in (
        (["--out="], "--out is ''; allowed: a path"),
        (
            ["--out", "az://bucket/run"],
            (
                "--out is az://bucket/run, a URL; allowed: a path, on a disk of this machine or"
                " mounted there."
            ),
        ),
        (["--names="], "--names is ''; allowed: names parted by commas, none of them empty"),
        (["--names=a,,b"], "--names is 'a,,b'; allowed: names"),
        (
            ["--config.steps=1"],
            "--config.steps changes a configuration, but there is none; give --config FILE",
        ),
        (["--config=b.py"], "no config file b.py"),
        (
            ["--config=a.py", "--config.model.weights="],
            "model.weights is ''; allowed: None or a file",
        ),
    ):
        lines = run(*arguments, code=1).splitlines()
        assert len(lines) == 1, lines
        assert lines[0].startswith(f"error: {message}"), lines


EXPERIMENT = """
import dataclasses
from jaxdg.config import Config
from jaxdg.methods import MethodOptions


@dataclasses.dataclass
class CalmOptions(MethodOptions):
    \"\"\"Quiet features.

    Attributes:
        weight: of the mean square.
    \"\"\"

    weight: float = 0.5


@dataclasses.dataclass
class Experiment(Config):
    \"\"\"An experiment with a method of its own.

    Attributes:
        calm: a method.
    \"\"\"

    calm: CalmOptions = dataclasses.field(default_factory=CalmOptions)


def get_config(crop='64'):
    c = Experiment(steps=7)
    c.data.crop = (int(crop), 96)
    return c
"""


def test_help_lists_every_field_with_its_documentation(tmp_path):
    """Without a file the defaults, with one its values; an experiment's own fields too. What stands
    there as flags gives back the configuration.
    """
    (tmp_path / "own.py").write_text(EXPERIMENT)
    command = [sys.executable, "-m", "jaxdg.train", "--help"]
    own = {**os.environ, "PYTHONWARNINGS": "ignore", "COLUMNS": "80"}
    given = ["--config", str(tmp_path / "own.py:32"), "--config.calm.weight=2"]
    plain = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=own).stdout
    shown = subprocess.run([*command, *given], capture_output=True, text=True, cwd=ROOT, env=own)
    assert "  --config.data.crop=128,128\n      height and width in pixels of training" in plain
    assert (
        "  --config.data.crop=32,96\n      height and width in pixels of training" in shown.stdout
    )
    assert "calm: Quiet features.\n" in shown.stdout
    assert "  --config.calm.weight=2.0\n      of the mean square.\n" in shown.stdout
    words = [line for line in plain.splitlines() if line.startswith("      ")]
    assert max(map(len, words)) <= 80

    config = config_lib.from_file(tmp_path / "own.py")
    text = listing.help_text(config, 80)
    arguments = [shlex.split(line)[0] for line in text.splitlines() if "  --config." in line]
    fields = {argument.partition("=")[0].removeprefix("--config.") for argument in arguments}
    assert set(config_lib.flat(dataclasses.asdict(config))) <= fields
    absent = ("--config.data.folder.", "--config.data.boxes.")
    arguments = [argument for argument in arguments if not argument.startswith(absent)]
    _, changes = overrides.take(arguments, type(config))
    assert overrides.applied(type(config)(), changes) == config


def test_a_misspelt_field_of_json_or_of_an_object_is_named(tmp_path):
    """The same message for a wrong key in config.json and for an attribute that a config file makes
    up.
    """
    with pytest.raises(
        ValueError,
        match=r"config\.json: unknown field model\.encodr; did you mean model\.encoder\?$",
    ):
        read(with_field("model.encodr", "x"), tmp_path)
    config = Config()
    config.model.encodr = "x"  # pyright: ignore[reportAttributeAccessIssue]
    with pytest.raises(
        ValueError, match=r"^unknown field model\.encodr; did you mean model\.encoder\?$"
    ):
        config_lib.validated(config)


def test_saved_configurations_come_back_the_same(tmp_path):
    """config.json holds all of a configuration, integers as keys and tuples in tuples included, and
    saving it again changes no byte.
    """
    config = Config(steps=3, seed=5)
    config.data.folder = FolderOptions(
        classes=("a", "b"), id_map={7: 0, 23: 1}, ignore=(0, 255), colors=((1, 2, 3), (4, 5, 6))
    )
    config.model.weights = "w.safetensors"
    config.optimizer.learning_rate_factors = ((r"blocks\.[0-3]\.", 0.1), ("head", 2.0))
    config = config_lib.validated(config)
    config_lib.save(config, tmp_path)
    saved = (tmp_path / "config.json").read_bytes()
    loaded = config_lib.load(tmp_path)
    assert loaded == config
    assert repr(loaded) == repr(config)
    config_lib.save(loaded, tmp_path)
    assert (tmp_path / "config.json").read_bytes() == saved
    assert [path.name for path in tmp_path.iterdir()] == ["config.json"]


def test_no_or_damaged_config_says_where(tmp_path):
    """A folder that is no workdir, and a config.json that is no JSON or no object, each give one
    line with the path.
    """
    with pytest.raises(FileNotFoundError, match=r"config\.json does not exist; give the workdir"):
        config_lib.load(tmp_path)
    for text in ("{", "[1]", "\x00"):
        (tmp_path / "config.json").write_text(text)
        with pytest.raises(ValueError, match=r"config\.json: \S") as error:
            config_lib.load(tmp_path)
        assert "\n" not in str(error.value)


@pytest.mark.parametrize("path", CONFIGS, ids=[path.stem for path in CONFIGS])
def test_shipped_experiments_are_valid(path):
    """Every file of configs/ loads and validates to itself: what it says is what runs."""
    config = config_lib.from_file(path)
    assert isinstance(config, Config)
    assert config_lib.validated(config) == config


def test_experiments_are_found():
    """The parametrisation above is not empty, and a missing file names those that exist."""
    assert {"streets_tiny", "camvid_vit_tiny"} <= {path.stem for path in CONFIGS}
    with pytest.raises(
        FileNotFoundError,
        match=r"no config file configs/none\.py; give a path, or the name of a recipe: ",
    ):
        config_lib.from_file("configs/none.py")


def test_an_experiment_may_build_on_one_beside_it(tmp_path, monkeypatch):
    """A file below configs/ imports its neighbour by `configs.NAME`, wherever the command runs."""
    folder = tmp_path / "configs"
    folder.mkdir()
    (folder / "neighbour_of_a_test.py").write_text(
        "from jaxdg.config import Config\ndef get_config():\n    return Config(steps=7)\n"
    )
    (folder / "child.py").write_text(
        "from configs import neighbour_of_a_test as base\ndef get_config():\n    c ="
        " base.get_config()\n    c.seed = 5\n    return c\n"
    )
    monkeypatch.chdir(tmp_path.parent)
    monkeypatch.setattr(sys, "path", list(sys.path))
    for name in [name for name in sys.modules if name.partition(".")[0] == "configs"]:
        monkeypatch.delitem(sys.modules, name)
    config = config_lib.from_file(folder / "child.py")
    assert (config.steps, config.seed) == (7, 5)


def test_the_decoder_alone_and_in_a_run_have_the_same_defaults():
    """Mask2Former's sizes are stated twice, for runs and for the module; both are VLTSeg's."""
    options = dataclasses.asdict(config_lib.Mask2FormerOptions())
    assert segmentation.Mask2FormerConfig(
        num_classes=19, **options
    ) == segmentation.Mask2FormerConfig(num_classes=19)


@pytest.mark.parametrize("cls", ALL, ids=[cls.__name__ for cls in ALL])
def test_every_field_is_documented(cls):
    """The Attributes of each class are its own fields, in their order, each with a description;
    inherited ones stand elsewhere.
    """
    section = (inspect.getdoc(cls) or "").split("Attributes:")[1]
    documented = re.findall(r"^    (\w+): \S", section, re.MULTILINE)
    inherited = {
        field.name
        for base in cls.__bases__
        if dataclasses.is_dataclass(base)
        for field in dataclasses.fields(base)
    }
    own = [field.name for field in dataclasses.fields(cls) if field.name not in inherited]
    assert [name for name in documented if name not in inherited] == own


def test_documented_defaults_are_the_defaults():
    """Where a description ends in "Default X." and X reads as Python or as a plain word, X is the
    field's default.
    """
    checked = 0
    for cls in ALL:
        section = (inspect.getdoc(cls) or "").split("Attributes:")[1]
        made = cls()
        for name, text in re.findall(
            r"^    (\w+): (.*?)(?=^    \w+: |\Z)", section, re.MULTILINE | re.DOTALL
        ):
            found = re.search(r"Default ([^ :,][^:]*?)\.\s*$", text)
            if found is None:
                continue
            written = " ".join(found[1].split())
            value = getattr(made, name)
            parts = re.split(r", |x(?=\d)| to ", written)
            parsed = [
                ast.literal_eval(p) if re.fullmatch(r"[-\d.e()]+|None|True|False", p) else p
                for p in parts
            ]
            assert (
                tuple(parsed) if isinstance(value, tuple) and parsed != [()] else parsed[0]
            ) == value, (cls.__name__, name, written)
            checked += 1
    assert checked >= 38
