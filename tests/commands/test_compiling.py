"""Steps compiled for GPUs that are not here."""

import importlib.util
import json
from pathlib import Path
import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdg import config as config_lib
from jaxdg.commands import compiling, roofline
from jaxdg.commands.abstract_step import abstract_inference, abstract_step
from jaxdg.commands.accelerators import ACCELERATORS
from jaxdg.config import Config, MeshConfig
from jaxdg.evaluation import protocols
from jaxdg.tasks import run_state
from jaxdg.training import sharding

ROOT = Path(__file__).resolve().parents[2]
INSTALLED = importlib.util.find_spec("jax_plugins") is not None and any(
    importlib.util.find_spec(name) for name in compiling.PLUGINS
)


def test_cards_agree_with_the_rates_of_the_planner():
    """Every card has rates, and the memory's rate is that of its description."""
    assert compiling.CARDS == ["a100", "b200", "h100", "h200"]
    for name in compiling.CARDS:
        card = compiling.Card.named(name)
        assert card.chip == ACCELERATORS[name]
        assert f"{name.upper()}" in card.target
        assert "#" not in card.target
        assert card.memory == pytest.approx(card.chip.memory, rel=0.08)
        bandwidth = next(
            int(line.split(":")[1]) for line in card.target.splitlines() if "bandwidth" in line
        )
        assert bandwidth == pytest.approx(card.chip.bandwidth, rel=0.001)


@pytest.mark.parametrize(
    ("decoder", "absent"),
    [("mask2former", set()), ("fcos", {"pixel_decoder"})],
)
def test_a_step_names_all_its_parts(decoder, absent):
    """Each scope that the prediction knows is in the program of a step."""
    config = Config(batch_size=1, mesh=MeshConfig(1, 1))
    config.task = "detection" if decoder == "fcos" else "segmentation"
    config.data.crop = (64, 64)
    config.evaluation.stride = (64, 64)
    config.model.decoder = decoder
    config.model.mask2former.points = 64
    mesh = sharding.make_mesh(config.mesh, jax.devices()[:1])
    step = abstract_step(config_lib.validated(config), mesh)
    text = step.function.lower(step.state, step.batch).as_text(debug_info=True)
    paths = re.findall(r'loc\("(jit[^"]*)"', text)
    found = {word for path in paths for word in re.findall(r"\w+", path)}
    assert set(roofline.PARTS) - found == absent | {"detections"}


TLDR = ["--config.tldr.on", "--config.model.weights=no_such_file.safetensors"]


def plan(*arguments, config="streets_tiny"):
    """What `jaxdg plan` prints, and its error."""
    command = [sys.executable, "-m", "jaxdg", "plan", "--config", config]
    return subprocess.run([*command, *arguments], cwd=ROOT, capture_output=True, text=True)


def test_a_missing_compiler_is_one_line_that_says_what_to_install(monkeypatch):
    """Before anything is traced."""
    monkeypatch.setattr(compiling, "PLUGINS", ("jax_plugins.none",))
    with pytest.raises(
        ValueError, match=r"^--compile_for h200 needs XLA's compiler .*\[plan-cuda\]'$"
    ):
        compiling.absent_devices(compiling.Card.named("h200"), 1)


def test_flags_that_do_not_go_together():
    """GPUs that do not fill their hosts, and JSON of a plan for CPUs."""
    with pytest.raises(ValueError, match="--devices is 12; allowed with --compile_for: up to 8"):
        compiling.absent_devices(compiling.Card.named("h100"), 12)
    done = plan("--json=plan.json")
    assert done.returncode == 1
    assert done.stderr.startswith("error: --json writes what --compile_for reports")
    done = plan("--image=512x1024")
    assert done.stderr.startswith("error: --image is inference as --compile_for compiles it")


def test_planned_inference_is_what_evaluation_computes():
    """Label maps of images by windows; the number of windows is known to the program."""
    config = Config(mesh=MeshConfig(1, 1))
    config.data.crop = (32, 32)
    config.evaluation.stride = (16, 16)
    config.evaluation.batch_size = 2
    config.evaluation.windows_per_call = 4
    config.model.encoder = "scratch_ti8"
    config.model.taps = (0,)
    config.model.pyramid = "none"
    config.model.decoder = "linear"
    config = config_lib.validated(config)
    mesh = sharding.make_mesh(config.mesh, jax.devices()[:1])
    step = abstract_inference(config, mesh, (48, 80))
    random = np.random.default_rng(0)
    state = jax.tree.map(lambda x: random.normal(0, 0.1, x.shape).astype(x.dtype), step.state)
    images = random.integers(0, 256, (2, 48, 80, 3)).astype(np.uint8)
    assert step.batch["image"].shape == images.shape
    got = step.function(state, {"image": images})
    task = run_state.make_task(config)
    label_maps = task.labelling(run_state.Blueprint.of(task, config.model.freeze).graph)
    sizes = np.full((2, 2), (48, 80), np.int32)
    batch = {"image": images, "size": sizes, "label": images[..., 0], "label_size": sizes}
    batch = jax.tree.map(jnp.asarray, batch)
    protocol = protocols.Protocol("native", (32, 32), (16, 16))
    want = label_maps((state.trained, state.frozen, state.statistics), batch, protocol)
    np.testing.assert_array_equal(got, want)
    assert len(np.unique(got)) > 1


def test_planned_detection_is_what_prediction_computes():
    """Boxes after suppression, in images fitted into the crop, whatever size was asked for."""
    config = Config(mesh=MeshConfig(1, 1), task="detection")
    config.data.crop = config.evaluation.stride = (32, 32)
    config.evaluation.batch_size = 2
    config.model.encoder = "scratch_ti8"
    config.model.pyramid = "none"
    config.model.decoder = "fcos"
    config.model.fcos.channels = 8
    config.model.fcos.groups = 2
    config = config_lib.validated(config)
    mesh = sharding.make_mesh(config.mesh, jax.devices()[:1])
    step = abstract_inference(config, mesh, (48, 80))
    random = np.random.default_rng(0)
    state = jax.tree.map(lambda x: random.normal(0, 0.1, x.shape).astype(x.dtype), step.state)
    images = random.integers(0, 256, (2, 32, 32, 3)).astype(np.uint8)
    batch = {"image": images, "inside": np.full((2, 2), 32, np.float32)}
    assert {key: (x.shape, x.dtype) for key, x in step.batch.items()} == {
        key: (x.shape, x.dtype) for key, x in batch.items()
    }
    lowered = step.function.lower(state, batch)
    assert "/detections/" in lowered.as_text(debug_info=True)
    got = jax.device_get(lowered.compile()(state, batch))
    task = run_state.make_task(config)
    predict = task.predictor(run_state.Blueprint.of(task, config.model.freeze).graph)
    model_state = state.trained, state.frozen, state.statistics
    for i, image in enumerate(images):
        want = predict(model_state, image)
        count = len(want.scores)
        assert count == got.valid[i].sum() > 1
        np.testing.assert_array_equal(got.classes[i, :count], want.classes)
        np.testing.assert_allclose(got.scores[i, :count], want.scores, rtol=1e-4)
        np.testing.assert_allclose(got.boxes[i, :count].clip(0, 32), want.boxes, atol=1e-3)


@pytest.mark.slow
@pytest.mark.skipif(not INSTALLED, reason="XLA's compiler for CUDA is not installed")
@pytest.mark.parametrize(
    ("card", "devices", "mesh", "overrides"),
    [
        ("h100", 1, "data=1,fsdp=1", ["--config.model.dtype=bfloat16"]),
        ("a100", 8, "data=2,fsdp=4", ["--config.model.decoder=linear", "--config.batch_size=8"]),
        ("h100", 1, "data=1,fsdp=1", ["--config.model.dtype=bfloat16", *TLDR]),
    ],
)
def test_small_steps_are_compiled(tmp_path, card, devices, mesh, overrides):
    """In half precision with cuDNN's attention on one GPU; on eight with NCCL's collectives; with
    what TLDR does before the step.
    """
    file = tmp_path / "plan.json"
    flags = [f"--compile_for={card}", f"--devices={devices}", f"--mesh={mesh}", f"--json={file}"]
    done = plan(*flags, *overrides)
    assert done.returncode == 0, done.stderr
    assert f"compiled for {devices} {card}" in done.stdout
    assert "predicted by part" in done.stdout
    found = json.loads(file.read_text())
    assert found["fits"]
    size = found["bytes"]
    held = size["parameters"] + size["optimizer"] + size["batch"] + size["preparation"]
    # The compiler aligns every array.
    assert held <= size["arguments"] < 1.2 * held
    predicted = found["predicted"]
    parts = predicted["seconds_by_part"]
    assert {"encoder", "decoder", "losses", "optimiser", "input preparation"} <= set(parts)
    assert parts.get("other", 0) < 0.2 * predicted["seconds"]
    assert ("methods' preparation" in parts) == (size["preparation"] > 0) == (TLDR[0] in overrides)
    assert sum(parts.values()) == pytest.approx(predicted["seconds"])
    assert ("fmhaSoftmax" in predicted["seconds_by_kind"]) == (devices == 1)
    assert bool(found["collectives"]) == (devices > 1)
    assert any(
        k["source"].startswith("backbones/") for k in predicted["kernels_by_time"] if k["source"]
    )


@pytest.mark.slow
@pytest.mark.skipif(not INSTALLED, reason="XLA's compiler for CUDA is not installed")
def test_detection_of_boxes_is_compiled(tmp_path):
    """With its suppression; any size of images makes the same program."""
    found = []
    for size in ("256x512", "100x100"):
        file = tmp_path / f"{size}.json"
        done = plan(
            "--compile_for=h100", f"--image={size}", f"--json={file}", config="streets_boxes"
        )
        assert done.returncode == 0, done.stderr
        found.append(json.loads(file.read_text()))
    assert found[0] == found[1]
    assert found[0]["predicted"]["seconds_by_part"].keys() >= {"encoder", "decoder", "detections"}
