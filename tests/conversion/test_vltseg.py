"""Whole models of the VLTSeg re-implementation: the same numbers and class maps as theirs, a
workdir that opens, and what is refused.
"""

import dataclasses
import os
import re
import sys
import types
import zlib

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import save_file

from configs import gta5_eva02
import jaxdg
from jaxdg import backbones, weights
from jaxdg import config as config_lib
from jaxdg.conversion import checkpoint, mapping, vltseg
from jaxdg.conversion import convert as torch_to_flax
from jaxdg.tasks.run_state import make_task, stored_tensors
from jaxdg.training.optimizer import make_optimizer
from tests.conversion.checks import make_models_once
from tests.conversion.torch_files import torch_file

WINDOW = 75
STRIDE = 56
GRID = 5
WIDTH = 48
HEADS = 2
GAINS = (
    ("transformer_decoder", 0.6),
    ("mask_embed", 1.2),
    ("cls_embed", 5.0),
    ("backbone", 1.0),
    ("", 1.5),
)


def drawn(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """Draws the tensor of this name as `tests/oracles/golden_vltseg.py` does."""
    x = np.random.default_rng(zlib.crc32(name.encode())).standard_normal(shape)
    if len(shape) == 1:
        x = np.exp(0.3 * x) if re.search(r"weight|running_var", name) else 0.1 * x
    elif not re.search(r"query_|level_|pos_embed|cls_token", name):
        x *= next(gain for part, gain in GAINS if part in name) / np.sqrt(np.prod(shape[1:]))
    return x.astype(np.float32)


def named_shapes(archive, prefix: str) -> dict[str, tuple[int, ...]]:
    shapes = (
        tuple(int(n) for n in text.split(",") if n) for text in archive[f"{prefix}shapes"].tolist()
    )
    return dict(zip(archive[f"{prefix}names"].tolist(), shapes, strict=True))


@pytest.fixture(scope="module")
def theirs(golden):
    """Outputs of the re-implementation."""
    with np.load(golden / "vltseg.npz") as archive:
        return dict(archive)


@pytest.fixture(scope="module")
def tensors(theirs):
    """Its checkpoint, with what a file holds beside weights."""
    published = {name: drawn(name, shape) for name, shape in named_shapes(theirs, "").items()}
    return published | {name: np.zeros(1, np.int64) for name in theirs["left_out"].tolist()}


def recipe():
    """VLTSeg's at the golden file's size."""
    c = gta5_eva02.get_config()
    c.data.crop = (WINDOW, WINDOW)
    c.evaluation.stride = (STRIDE, STRIDE)
    return c


@pytest.fixture(scope="module", autouse=True)
def tiny():
    """An encoder of the golden file's size in the published one's place."""
    config = dataclasses.replace(
        backbones.entry(vltseg.ENCODER).config,
        width=WIDTH,
        heads=HEADS,
        depth=4,
        taps=(0, 1, 2, 3),
        image_size=(WINDOW, WINDOW),
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(backbones.ZOO, "tiny", backbones.zoo.Entry(config))
        patch.setattr(vltseg, "ENCODER", "tiny")
        patch.setitem(vltseg.RECIPES, GRID, "tiny")
        published = vltseg.recipe
        patch.setattr(
            vltseg, "recipe", lambda name: recipe() if name == "tiny" else published(name)
        )
        make_models_once(patch)
        yield


@pytest.fixture(scope="module")
def workdir(tensors, tmp_path_factory):
    """What the command makes of that checkpoint."""
    folder = tmp_path_factory.mktemp("vltseg")
    save_file(tensors, folder / "source.safetensors")
    assert (
        torch_to_flax.main(
            [
                "--model",
                "vltseg",
                "--checkpoint",
                str(folder / "source.safetensors"),
                "--out",
                str(folder / "run"),
            ]
        )
        == 0
    )
    return folder / "run"


@pytest.fixture(scope="module")
def imported(tensors):
    """The run and the filled model of that checkpoint."""
    file = checkpoint.Checkpoint(list(tensors), tensors.__getitem__)
    config = vltseg.of_checkpoint(file)
    model = vltseg.abstract(config)
    weights.fill(
        model, mapping.to_flax(model, (vltseg.layout(),), file.names, file.read).tensors, "golden"
    )
    return config, model


def test_every_part_computes_what_theirs_does(theirs, imported):
    """Pixel decoder and class logits within 1e-4, mask logits of up to 30 within 2e-4, and the same
    class in every pixel of a window.
    """
    graph, state = nnx.split(imported[1])
    entry = backbones.entry("tiny").config

    @jax.jit
    def run(state, image):
        model = nnx.merge(graph, state)
        features = model.pyramid(
            model.backbone((image / 255 - jnp.asarray(entry.mean)) / jnp.asarray(entry.std))
        )
        pixels = model.head.pixel_decoder(features)
        output = model.head.decode(*pixels)
        return pixels, output, model.head.scores(output, (WINDOW, WINDOW))

    (mask_features, levels), (class_logits, mask_logits), scores = run(
        state, theirs["window/image"][None].astype(np.float32)
    )
    for i, level in enumerate(levels):
        np.testing.assert_allclose(level[0], theirs[f"levels/{i}"], atol=1e-4, err_msg=f"level {i}")
    np.testing.assert_allclose(mask_features[0], theirs["mask_features"], atol=1e-4)
    np.testing.assert_allclose(class_logits[-1, 0], theirs["class_logits"], atol=1e-4)
    np.testing.assert_allclose(mask_logits[-1, 0], theirs["mask_logits"], atol=2e-4)
    np.testing.assert_array_equal(np.argmax(scores[0], axis=-1), theirs["window/label"])
    assert len(np.unique(theirs["window/label"])) > 4, "or equal class maps would say little"


def test_the_workdir_opens_and_gives_their_class_map(workdir, theirs):
    """`jaxdg.load` and windows with overlap: every pixel of a picture larger than the window has
    the class that theirs gives it.
    """
    model = jaxdg.load(workdir)
    assert model.step == 5000
    np.testing.assert_array_equal(model.predict(theirs["picture/image"]), theirs["picture/label"])


def test_the_recipe_gives_every_tensor_their_rate_and_decay(theirs, imported):
    """One step from ones along equal gradients takes `rate * (1 + decay)` off each tensor, as their
    optimiser's groups say.
    """
    config, model = imported
    graph, trained, statistics = nnx.split(model, nnx.Param, ...)
    optimizer = make_optimizer(
        config.optimizer, config.steps, trained, config.optimizer.encoder_factor
    )
    ones = jax.tree.map(lambda leaf: np.ones(leaf.shape, leaf.dtype), trained)
    updates = jax.jit(lambda ones: optimizer.update(ones, optimizer.init(ones), ones)[0])(ones)
    steps = mapping.from_flax(
        model, vltseg.layout(), weights.tensors(nnx.merge(graph, updates, statistics))
    )
    for name, rate, decay in zip(
        theirs["names"].tolist(), theirs["rates"], theirs["decays"], strict=True
    ):
        if rate:  # not of running statistics
            np.testing.assert_allclose(
                -steps[name], rate * (1 + decay), rtol=2e-3, err_msg=name
            )  # Adam's epsilon takes a thousandth
    assert len(set(zip(theirs["rates"], theirs["decays"], strict=True))) == 5, (
        "four groups, and running statistics"
    )


def test_the_workdir_says_what_run_it_is(workdir):
    """Sizes come from the tensors, windows from the positions, the rest from the
    re-implementation's recipe.
    """
    config = config_lib.load(workdir)
    assert config.data.crop == (WINDOW, WINDOW)
    assert config.evaluation.stride == (STRIDE, STRIDE)
    m = config.model.mask2former
    assert (m.hidden, m.queries, m.heads, m.pixel_layers, m.pixel_ffn, m.layers, m.ffn) == (
        64,
        24,
        8,
        2,
        96,
        3,
        96,
    )
    assert (config.model.pyramid, config.model.decoder, config.model.dtype) == (
        "batch",
        "mask2former",
        "float32",
    )
    assert config.optimizer.hold_steps == 500
    labels = make_task(config).labels
    assert (len(labels.names), labels.names[0], labels.names[-1]) == (19, "road", "bicycle")
    assert sorted(path.name for path in workdir.parent.iterdir()) == [
        "run",
        "source.safetensors",
    ], "nothing else is left behind"


@pytest.mark.parametrize(
    ("positions", "crop", "stride", "steps", "batch_size"),
    [(1297, 512, 426, 5_000, 16), (5330, 1024, 768, 20_000, 8)],
    ids=["512", "1024"],
)
def test_a_published_checkpoint_fits(
    theirs, monkeypatch, positions, crop, stride, steps, batch_size
):
    """All tensors of the published size, by the names and shapes that their own config builds, are
    mapped or left out for a reason.
    """
    monkeypatch.setattr(vltseg, "ENCODER", "eva02_clip_l14_vltseg_repro")
    shapes = named_shapes(theirs, "published/")
    assert shapes["backbone.pos_embed"] == (1, 1297, 1024)
    shapes["backbone.pos_embed"] = (1, positions, 1024)
    file = checkpoint.Checkpoint(
        list(shapes), lambda name: np.broadcast_to(np.float32(0), shapes[name])
    )
    config = vltseg.of_checkpoint(file)
    assert (config.data.crop, config.evaluation.stride) == ((crop, crop), (stride, stride))
    assert (config.steps, config.batch_size) == (steps, batch_size)
    assert config.model.mask2former == config_lib.Mask2FormerOptions(), "the paper's sizes"
    if crop == 1024:
        return  # the model differs in its positions alone
    model = vltseg.abstract(config)
    left_out = mapping.to_flax(model, (vltseg.layout(),), file.names, file.read).left_out
    assert {re.sub(r"\d+", "*", name) for name in left_out} == {
        "backbone.rope.freqs_cos",
        "backbone.rope.freqs_sin",
        "backbone.blocks.*.attn.rope.freqs_cos",
        "backbone.blocks.*.attn.rope.freqs_sin",
        "backbone.fpn*.*.num_batches_tracked",
    }
    count = sum(np.prod(shape) for name, shape in shapes.items() if name not in left_out)
    assert sum(np.prod(shape) for shape in weights.shapes(model).values()) == count


def refused(arguments, capsys, *offenders):
    """One line on stderr that names every offender, exit code 1."""
    assert torch_to_flax.main(arguments) == 1
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1), err
    for offender in offenders:
        assert offender in err, (offender, err)


def test_what_does_not_fit_is_refused_whole(tensors, tmp_path, capsys):
    """Every offender is named in their names and shapes, and nothing is written."""
    damaged = dict(tensors)
    damaged["backbone.blocks.1.attn.inner_attn_ln.weight"] = np.ones(WIDTH, np.float32)
    del damaged["backbone.fpn1.1.running_var"]
    damaged["decode_head.query_embeds.weight"] = damaged.pop("decode_head.query_embed.weight")
    damaged["decode_head.pixel_decoder.mask_feature.weight"] = damaged[
        "decode_head.pixel_decoder.mask_feature.weight"
    ][:, :, 0, 0]
    damaged["decode_head.cls_embed.bias"] = np.ones(7, np.float32)
    damaged["backbone.fpn2.0.bias"] = np.ones(WIDTH, np.int32)
    save_file(
        {name: np.ascontiguousarray(tensor) for name, tensor in damaged.items()},
        tmp_path / "damaged.safetensors",
    )
    arguments = [
        "--model",
        "vltseg",
        "--checkpoint",
        str(tmp_path / "damaged.safetensors"),
        "--out",
        str(tmp_path / "run"),
    ]
    refused(
        arguments,
        capsys,
        "damaged.safetensors is no checkpoint of vltseg",
        "2 unknown (backbone.blocks.1.attn.inner_attn_ln.weight, decode_head.query_embeds.weight)",
        "2 missing (backbone.fpn1.1.running_var, decode_head.query_embed.weight)",
        "decode_head.pixel_decoder.mask_feature.weight is (64, 64), not (64, 64, 1, 1)",
        "decode_head.cls_embed.bias is (7,), not (20,)",
        "backbone.fpn2.0.bias holds int32",
    )
    assert [path.name for path in tmp_path.iterdir()] == ["damaged.safetensors"]


def test_wrong_requests_are_refused(tensors, tmp_path, capsys):
    """Positions of an unpublished crop, a folder that holds something, and `--reverse`."""
    save_file(
        tensors | {vltseg.POSITIONS: np.zeros((1, 50, WIDTH), np.float32)},
        tmp_path / "x.safetensors",
    )
    arguments = [
        "--model",
        "vltseg",
        "--checkpoint",
        str(tmp_path / "x.safetensors"),
        "--out",
        str(tmp_path / "run"),
    ]
    refused(
        arguments,
        capsys,
        "backbone.pos_embed is (1, 50, 48), not (1, 1297, ..) for a crop of 512 or (1, 5330, ..)"
        " for a crop of 1024",
    )
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.json").write_text("{}")
    refused(arguments, capsys, "run is there already")
    assert (tmp_path / "run" / "config.json").read_text() == "{}"
    with pytest.raises(SystemExit, match="2"):
        torch_to_flax.main([*arguments, "--reverse"])


class Runs:
    """Unpickling it would make a folder."""

    def __init__(self, function, path):
        self.function = function
        self.path = path

    def __reduce__(self):
        return self.function, (str(self.path),)


@pytest.fixture
def mmengine(monkeypatch):
    """A package of mmengine's name, whose `rebuild` leaves a trace; it can be imported while files
    are read.
    """
    module = types.ModuleType("mmengine")

    class HistoryBuffer:
        def __init__(self, log):
            self.log = np.asarray(log)
            self.methods = {"min": HistoryBuffer.min}

        def min(self):
            return self.log.min()

        def __setstate__(self, state):
            os.mkdir(state["trace"])

    def rebuild(path):
        os.mkdir(path)

    for thing in (HistoryBuffer, rebuild):
        thing.__module__ = "mmengine"
        thing.__qualname__ = thing.__name__
        setattr(module, thing.__name__, thing)
    HistoryBuffer.min.__module__ = "mmengine"
    HistoryBuffer.min.__qualname__ = "HistoryBuffer.min"
    monkeypatch.setitem(sys.modules, "mmengine", module)
    return module


def test_what_mmengine_saves_beside_tensors_is_passed_over(tensors, tmp_path, mmengine):
    """Logs, NumPy numbers and references to methods in a .pth: the tensors are read, bit by bit,
    and nothing of them is built or called.
    """
    torch = pytest.importorskip("torch")
    buffer = mmengine.HistoryBuffer([1.0, 2.0])
    buffer.trace = str(tmp_path / "state")
    content = {
        "meta": {
            "cfg": "model = dict()",
            "seed": np.int64(3),
            "dataset_meta": {"classes": ("road",)},
        },
        "message_hub": {
            "log_scalars": {"loss": buffer},
            "more": Runs(mmengine.rebuild, tmp_path / "called"),
        },
        "state_dict": {name: torch.from_numpy(tensor) for name, tensor in tensors.items()},
    }
    for new in (True, False):  # both of torch's formats
        torch.save(content, tmp_path / "iter_5000.pth", _use_new_zipfile_serialization=new)
        with checkpoint.opened(tmp_path / "iter_5000.pth") as file:
            assert file.names == list(tensors)
            for name, tensor in tensors.items():
                np.testing.assert_array_equal(file.read(name), tensor, err_msg=name)
        assert [path.name for path in tmp_path.iterdir()] == ["iter_5000.pth"]


def test_other_code_in_a_checkpoint_is_refused_and_not_run(tensors, tmp_path, capsys):
    """A .pth that would run a command when it is unpickled is refused, and has not run it."""
    torch = pytest.importorskip("torch")
    state = {name: torch.from_numpy(tensor) for name, tensor in tensors.items()}
    torch.save(
        {"meta": Runs(os.system, f"mkdir {tmp_path / 'ran'}"), "state_dict": state},
        tmp_path / "evil.pth",
    )
    arguments = [
        "--model",
        "vltseg",
        "--checkpoint",
        str(tmp_path / "evil.pth"),
        "--out",
        str(tmp_path / "run"),
    ]
    refused(arguments, capsys, "evil.pth is refused", "pickled code", "system")
    assert [path.name for path in tmp_path.iterdir()] == ["evil.pth"]


def test_a_whole_model_behind_a_wrapper_with_its_average(tensors, tmp_path, capsys):
    """Of mmengine's two sets, exchanged when it saves, the one that is asked for, with DDP's prefix
    taken off: the workdir holds it.
    """
    average = {
        name: tensor + 1 if tensor.dtype == np.float32 else tensor
        for name, tensor in tensors.items()
    }
    wrapped = {f"module.{name}": tensor for name, tensor in tensors.items()}
    path = torch_file(
        tmp_path / "iter.pth", {"meta": {}, "state_dict": average, "ema_state_dict": wrapped}
    )
    arguments = ["--model", "vltseg", "--checkpoint", str(path), "--out"]
    refused(
        [*arguments, str(tmp_path / "run")],
        capsys,
        "2 sets of weights",
        "--weights ema or --weights raw",
    )
    bias = "decode_head.cls_embed.bias"
    for wanted, source in (("raw", tensors), ("ema", average)):
        assert torch_to_flax.main([*arguments, str(tmp_path / wanted), "--weights", wanted]) == 0
        report = capsys.readouterr().out
        assert ("taken off names: module." in report) == (wanted == "raw")
        np.testing.assert_array_equal(
            stored_tensors(tmp_path / wanted)["head.class_embed.bias"], source[bias]
        )
