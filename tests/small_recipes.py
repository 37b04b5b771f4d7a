"""Detection recipes made small: a tree of Diverse Weather, random CLIP weights, a run from files to
results.

    @pytest.fixture(scope="module")
    def here(tmp_path_factory):
        with pytest.MonkeyPatch.context() as patch:
            yield small_recipes.prepare(tmp_path_factory.mktemp("weather"), patch)

    def test_clip_the_gap_runs(here):
        small_recipes.check(small_recipes.shrunk(clip_the_gap.get_config()), here / "runs")

Paths in a recipe are relative to the working directory, which `prepare` changes to its folder; so
they stay as they are.
"""

import copy
import json
from pathlib import Path
from typing import Any

import jax
import numpy as np
from PIL import Image
import pytest
from safetensors.numpy import save_file

from jaxdg import backbones
from jaxdg import config as config_lib
from jaxdg.config import Config, validated
from jaxdg.conversion import convert as torch_to_flax
from jaxdg.conversion import mapping, models
from jaxdg.data.boxes import DIVERSE_WEATHER
from tests import clip_models, runs

DOMAINS = ("daytime_clear", "night_sunny", "dusk_rainy", "night_rainy", "daytime_foggy")
CORNERS = ("xmin", "ymin", "xmax", "ymax")


def prepare(
    folder: Path,
    patch: pytest.MonkeyPatch,
    encoders: tuple[str, ...] = ("clip_rn101",),
    full: bool = False,
) -> Path:
    """Writes `data/diverse_weather` and `weights/`, and goes to the folder, with one device.

    Args:
        folder: where to.
        patch: undoes what is changed of the process and of the zoo.
        encoders: CLIP's ResNets that the recipes name. Each becomes `weights/NAME.safetensors` and
            `weights/NAME_text.safetensors`, drawn from the names of its tensors.
        full: encoders have their own sizes; otherwise the zoo's are replaced by the small one of
            `clip_models`.

    Returns:
        The folder.
    """
    write_tree(folder / "data")
    (folder / "weights").mkdir()
    for name in encoders:
        write_clip(folder / "weights", name, patch, full)
    first = jax.devices()[:1]
    patch.setattr(jax, "devices", lambda: first)
    patch.setenv("JAXDG_CACHE", str(folder / "cache"))
    patch.chdir(folder)
    return folder


def write_tree(
    root: Path, images: int = 4, size: tuple[int, int] = (90, 160), seed: int = 0
) -> None:
    """Writes five domains below `root/diverse_weather` in VOC2007's layout.

    Things are rectangles in the colour of their class on noise; four lie in every image. A domain
    differs in the brightness of its noise.

    Args:
        root: data root.
        images: of each list; daytime_clear has two, train and test.
        size: height and width of the images, pixels.
        seed: of all that is drawn.
    """
    rng = np.random.default_rng(seed)
    height, width = size
    for number, domain in enumerate(DOMAINS):
        base = root / "diverse_weather" / domain / "VOC2007"
        for kind in ("JPEGImages", "Annotations", "ImageSets/Main"):
            (base / kind).mkdir(parents=True)
        for listed in ("train", "test") if domain == "daytime_clear" else ("train",):
            names = [f"{listed}_{i}" for i in range(images)]
            for i, name in enumerate(names):
                pixels = rng.integers(0, 250 - 40 * number, (height, width, 3), dtype=np.uint8)
                things = ""
                for k in range(4):
                    label = (4 * i + k) % len(DIVERSE_WEATHER.names)
                    y0, x0 = (int(rng.integers(0, side // 2)) for side in size)
                    y1 = y0 + int(rng.integers(height // 5, height // 2))
                    x1 = x0 + int(rng.integers(width // 8, width // 2))
                    pixels[y0:y1, x0:x1] = DIVERSE_WEATHER.colors[label]
                    things += _object(DIVERSE_WEATHER.names[label], (x0 + 1, y0 + 1, x1, y1))
                Image.fromarray(pixels).save(base / "JPEGImages" / f"{name}.jpg", quality=95)
                stated = f"<size><width>{width}</width><height>{height}</height></size>"
                (base / "Annotations" / f"{name}.xml").write_text(
                    f"<annotation>{stated}{things}</annotation>"
                )
            (base / "ImageSets/Main" / f"{listed}.txt").write_text("\n".join(names) + "\n")


def _object(name: str, corners: tuple[int, ...]) -> str:
    box = "".join(f"<{key}>{x}</{key}>" for key, x in zip(CORNERS, corners, strict=True))
    return f"<object><name>{name}</name><difficult>0</difficult><bndbox>{box}</bndbox></object>"


def write_clip(folder: Path, name: str, patch: pytest.MonkeyPatch, full: bool) -> None:
    """Writes the random weights of a CLIP ResNet and of its text tower; arguments as of `prepare`.

    The last norm of a block is small. Otherwise features would grow with depth.
    """
    text = f"{name}_text"
    if not full:
        small, small_text = clip_models.MODELS["resnet"]
        entry = backbones.zoo.Entry(small, "made by a test", "none", 1)
        patch.setitem(backbones.ZOO, name, entry)
        patch.setitem(backbones.TEXT_TOWERS, text, small_text)
    tensors = {}
    for model in (name, text):
        shapes = mapping.source_shapes(models.abstract(model), models.layouts(model)[0])
        tensors |= {key: clip_models.draw(key, shape) for key, shape in shapes.items()}
    tensors |= {key: 0.2 * tensors[key] for key in tensors if key.endswith(".bn3.weight")}
    source = folder / f"{name}_published.safetensors"
    save_file(tensors, source)
    for model in (name, text):
        torch_to_flax.convert(model, source, folder / f"{model}.safetensors")
    source.unlink()


def shrunk(c: Config, **fields: Any) -> Config:
    """A recipe of detection with small images, few proposals, 20 steps and two of mining; else as
    it is.

    Args:
        c: the recipe.
        fields: further values by their names, with __ in place of dots.
    """
    c = copy.deepcopy(c)
    c.steps = c.eval_every = 20
    c.batch_size = 2
    c.log_every = 1
    c.checkpoint_every = 10
    c.data.root = "data"
    c.data.workers = 0
    c.data.crop = (96, 160)
    if c.data.shortest_sides:
        c.data.shortest_sides = (96,)
        c.data.longest_side = 160
    else:
        c.data.resize = c.data.crop
    c.evaluation.batch_size = 2
    c.optimizer.warmup_steps = min(c.optimizer.warmup_steps, 5)
    head: Any = getattr(c.model, c.model.decoder)
    if hasattr(head, "rpn"):
        head.rpn.before = (200, 100)
        head.rpn.after = (40, 20)
        head.rpn.samples = 32
        head.roi.proposals = 16
        head.roi.detections = 20
    mining = c.edits.mining
    mining.steps = mining.batch = mining.crops = mining.images = 2
    mining.crop = 64
    for name, value in fields.items():
        holder, _, last = name.replace("__", ".").rpartition(".")
        setattr(config_lib.get(c, holder) if holder else c, last, value)
    return validated(c)


def check(c: Config, folder: Path) -> list[dict]:
    """Trains a recipe, and again in two halves; returns the rows of metrics.jsonl.

    Every loss is finite, the halves give the same losses, scores and boxes, and every domain is
    judged and has its files.

    Args:
        c: of `shrunk`.
        folder: for the two workdirs, `whole` and `parts`.
    """
    whole, parts = folder / "whole", folder / "parts"
    rows = runs.start(c, whole)
    losses = [row["loss"] for row in rows if "loss" in row]
    assert len(losses) == c.steps
    assert np.isfinite(losses).all(), losses
    runs.start(c, parts, steps=c.steps // 2)
    assert runs.start(c, parts) == rows
    results = [json.loads((run / "results.json").read_text()) for run in (whole, parts)]
    for one in results:
        one.pop("device_hours")  # they took different times
    assert results[0] == results[1]
    assert list(results[0]["domains"]) == list(c.evaluation.domains)
    for domain, entry in results[0]["domains"].items():
        assert entry["images"] > 0
        assert np.isfinite(entry["mAP50"])
        found = whole / "detections" / f"{domain}.json"
        assert found.read_bytes() == (parts / "detections" / f"{domain}.json").read_bytes()
    return rows
