"""Three small CLIP models in the layouts that are published, their weights drawn as
tests/oracles/golden_clip_text.py draws them.
"""

import zlib

import numpy as np
from safetensors.numpy import save_file

from jaxdg import backbones
from jaxdg.backbones import ClipResnetConfig, ClipTextConfig, ClipVitConfig, Eva02Config
from jaxdg.conversion import convert as torch_to_flax
from jaxdg.conversion import mapping, models
from jaxdg.text.clip_text import ProjectionConfig

VIT = dict(image_size=(20, 20), patch_size=4, depth=3, taps=(1, 2), heads=2)
NORMALISED = dict(mean=backbones.zoo.CLIP["mean"], std=backbones.zoo.CLIP["std"])
MODELS = {
    "clip": (
        ClipVitConfig(**VIT, **NORMALISED, width=32),
        ClipTextConfig(64, 4, 48, "quick_gelu", ProjectionConfig(32, 48), depth=3),
    ),
    "eva02": (
        Eva02Config(**VIT, **NORMALISED, width=24),
        ClipTextConfig(48, 3, 40, "gelu", ProjectionConfig(24, 40, 1e-6, bias=True), depth=3),
    ),
    "resnet": (
        ClipResnetConfig(
            **NORMALISED,
            image_size=(160, 160),
            blocks=(1, 2, 1, 1),
            widths=(64, 128, 256, 512),
            pool_grid=5,
            embedding=48,
        ),
        ClipTextConfig(64, 4, 48, "quick_gelu", None, depth=3),
    ),
}
LAYOUT = {"clip": "CLIP", "eva02": "open_clip", "resnet": "CLIP"}  # of the file


def register(monkeypatch):
    """Puts the models into the zoo, as `small_clip`, `small_eva02` and `small_resnet`."""
    for name, (image, text) in MODELS.items():
        monkeypatch.setitem(
            backbones.ZOO, f"small_{name}", backbones.zoo.Entry(image, "made by a test", "none", 1)
        )
        monkeypatch.setitem(backbones.TEXT_TOWERS, f"small_{name}_text", text)


def draw(name, shape):
    """A tensor drawn from its name."""
    if name == "logit_scale":
        return np.asarray(np.log(100.0), np.float32)
    x = np.random.default_rng(zlib.crc32(name.encode())).standard_normal(shape, np.float32)
    norm = "norm" in name or "ln_" in name or "bn" in name or "downsample.1" in name
    if name.endswith("running_var"):
        return np.exp(0.3 * x)
    if len(shape) == 1 or "embed" in name:
        return x * (0.1 if norm else 0.3) + float(norm and name.endswith("weight"))
    return x * np.float32(1.2 / np.sqrt(np.prod(shape[1:])))


def published(name):
    """All tensors of a model's file, both towers, by their publisher's names."""
    shapes = {}
    for model in (f"small_{name}", f"small_{name}_text"):
        layout = next(known for known in models.layouts(model) if known.name == LAYOUT[name])
        shapes |= mapping.source_shapes(models.abstract(model), layout)
    return {key: draw(key, shape) for key, shape in shapes.items()}


def convert(name, folder):
    """Both towers of a model through the conversion: (image, text) files."""
    save_file(published(name), folder / f"{name}.safetensors")
    files = folder / f"{name}_image.safetensors", folder / f"{name}_text.safetensors"
    for model, file in zip((f"small_{name}", f"small_{name}_text"), files, strict=True):
        torch_to_flax.convert(model, folder / f"{name}.safetensors", file)
    return files
