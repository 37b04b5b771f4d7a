"""Compares encoders converted from transformers and timm with their originals.

Run by hand where both are installed:

    python -m tests.oracles.check_transformers [CLASS...]

Models of reduced size with random weights are saved as their classes save them (`save_pretrained`;
timm's state dict), converted by the command, and run on the same image. The output of each block
must equal theirs to 1e-4. The largest difference of each model is printed.
"""

import contextlib
import dataclasses
import io
from pathlib import Path
import sys
import tempfile
from typing import Any

import numpy as np
import timm  # pyright: ignore[reportMissingImports]
import torch  # pyright: ignore[reportMissingImports]
import transformers  # pyright: ignore[reportMissingImports]

from jaxdg import backbones
from jaxdg.backbones import zoo
from jaxdg.conversion import convert as torch_to_flax

hf: Any = transformers
SIZES: dict[str, Any] = dict(
    image_size=(32, 32), patch_size=8, width=32, depth=2, heads=2, taps=(0, 1)
)
SHARED: dict[str, Any] = dict(
    hidden_size=32, num_hidden_layers=2, num_attention_heads=2, image_size=32, patch_size=8
)
VISION: dict[str, Any] = SHARED | dict(intermediate_size=128)
TEXT: dict[str, Any] = dict(
    hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64, vocab_size=50
)
MIT: dict[str, Any] = dict(
    depths=[1, 1, 1, 1],
    hidden_sizes=[8, 16, 32, 32],
    num_attention_heads=[1, 1, 2, 2],
    decoder_hidden_size=16,
)
SAM: dict[str, Any] = SHARED | dict(global_attn_indexes=[1], window_size=2, mlp_dim=128)
TIMM: dict[str, Any] = dict(img_size=32, patch_size=8, embed_dim=32, depth=2, num_heads=2)


def encoders() -> dict[str, backbones.EncoderConfig]:
    """Small ones of the zoo's families."""
    configs = {
        name: dataclasses.replace(zoo.ZOO[name].config, **SIZES)
        for name in ("clip_b16", "clip_b16_gelu", "siglip_b16")
    }
    configs |= {
        name: dataclasses.replace(zoo.ZOO[name].config, **SIZES)
        for name in ("dinov2_b14", "dinov2_b14_reg", "dinov3_b16", "augreg_b16")
    }
    configs["sam_b16"] = dataclasses.replace(
        zoo.ZOO["sam_b16"].config, **SIZES, global_blocks=(1,), window=2
    )
    small: dict[str, Any] = dict(
        image_size=(32, 32), blocks=(1, 1, 1, 1), widths=(8, 16, 32, 32), heads=(1, 1, 2, 2)
    )
    configs["mit_b0"] = dataclasses.replace(zoo.ZOO["mit_b0"].config, **small)
    return configs


MODELS: dict[str, tuple[str, Any]] = {
    "CLIPVisionModel": ("clip_b16", lambda: hf.CLIPVisionModel(hf.CLIPVisionConfig(**VISION))),
    "CLIPVisionModelWithProjection": (
        "clip_b16",
        lambda: hf.CLIPVisionModelWithProjection(hf.CLIPVisionConfig(**VISION)),
    ),
    "CLIPModel": (
        "clip_b16",
        lambda: hf.CLIPModel(hf.CLIPConfig(text_config=TEXT, vision_config=VISION)),
    ),
    "SiglipVisionModel": (
        "siglip_b16",
        lambda: hf.SiglipVisionModel(hf.SiglipVisionConfig(**VISION)),
    ),
    "SiglipModel": (
        "siglip_b16",
        lambda: hf.SiglipModel(hf.SiglipConfig(text_config=TEXT, vision_config=VISION)),
    ),
    "SegformerModel": ("mit_b0", lambda: hf.SegformerModel(hf.SegformerConfig(**MIT))),
    "SegformerForSemanticSegmentation": (
        "mit_b0",
        lambda: hf.SegformerForSemanticSegmentation(hf.SegformerConfig(**MIT)),
    ),
    "Dinov2Model": ("dinov2_b14", lambda: hf.Dinov2Model(hf.Dinov2Config(**SHARED))),
    "Dinov2ForImageClassification": (
        "dinov2_b14",
        lambda: hf.Dinov2ForImageClassification(hf.Dinov2Config(**SHARED)),
    ),
    "Dinov2WithRegistersModel": (
        "dinov2_b14_reg",
        lambda: hf.Dinov2WithRegistersModel(hf.Dinov2WithRegistersConfig(**SHARED)),
    ),
    "DINOv3ViTModel": (
        "dinov3_b16",
        lambda: hf.DINOv3ViTModel(hf.DINOv3ViTConfig(**VISION, num_register_tokens=4)),
    ),
    "ViTModel": ("augreg_b16", lambda: hf.ViTModel(hf.ViTConfig(**VISION))),
    "ViTForImageClassification": (
        "augreg_b16",
        lambda: hf.ViTForImageClassification(hf.ViTConfig(**VISION)),
    ),
    "SamVisionModel": ("sam_b16", lambda: hf.SamVisionModel(hf.SamVisionConfig(**SAM))),
    "SamModel": ("sam_b16", lambda: hf.SamModel(hf.SamConfig(vision_config=SAM))),
    "timm vit_base_patch16_clip_224": (
        "clip_b16_gelu",
        lambda: timm.create_model("vit_base_patch16_clip_224", **TIMM),
    ),
    "timm vit_base_patch16_clip_quickgelu_224": (
        "clip_b16",
        lambda: timm.create_model("vit_base_patch16_clip_quickgelu_224", **TIMM),
    ),
}
PARTS = (
    "vision_model",
    "vision_encoder",
    "segformer",
    "dinov2",
    "vit",
)  # of a larger model: its encoder


def theirs(model: Any, image: np.ndarray, shapes: list[tuple[int, ...]]) -> list[np.ndarray]:
    """What the blocks or stages put out, in these shapes [h, w, c]."""
    x = torch.from_numpy(image.transpose(2, 0, 1)[None].copy())
    with torch.no_grad():
        if hasattr(model, "forward_intermediates"):
            found = model.forward_intermediates(x, indices=[0, 1], intermediates_only=True)
        else:
            part = next((getattr(model, name) for name in PARTS if hasattr(model, name)), model)
            found = part(pixel_values=x, output_hidden_states=True).hidden_states[-len(shapes) :]
    maps = []
    for y, (h, w, c) in zip(found, shapes, strict=True):
        numbers = y[0].numpy()
        if numbers.ndim == 2:  # tokens, those of patches last
            maps.append(numbers[-h * w :].reshape(h, w, c))
        else:
            maps.append(
                numbers if type(model).__name__.startswith("Sam") else numbers.transpose(1, 2, 0)
            )
    return maps


def main() -> int:
    """Checks the classes that are named, or all; returns the exit code."""
    configs = encoders()
    zoo.ZOO.clear()
    zoo.ZOO.update(
        {name: zoo.Entry(config, "made by a script", "none", 1) for name, config in configs.items()}
    )
    failed = 0
    for name in sys.argv[1:] or MODELS:
        encoder, make = MODELS[name]
        torch.manual_seed(0)
        model = make().eval()
        with torch.no_grad():
            for (
                parameter
            ) in model.parameters():  # biases and norms of zeros and ones would hide a mistake
                parameter.add_(0.1 * torch.randn_like(parameter))
        with tempfile.TemporaryDirectory() as folder:
            source = Path(folder) / "saved"
            out = Path(folder) / "out.safetensors"
            if name.startswith("timm"):
                source = Path(folder) / "saved.pth"
                torch.save(model.state_dict(), source)
            else:
                model.save_pretrained(source)
            with contextlib.redirect_stdout(io.StringIO()):
                code = torch_to_flax.main(
                    ["--model", encoder, "--checkpoint", str(source), "--out", str(out)]
                )
            if code:
                failed += 1
                continue
            image = np.random.default_rng(0).standard_normal((32, 32, 3)).astype(np.float32)
            ours = [np.asarray(y[0]) for y in backbones.create(encoder, weights=out)(image[None])]
        wanted = theirs(model, image, [y.shape for y in ours])
        worst = max(float(np.abs(y - mine).max()) for y, mine in zip(wanted, ours, strict=True))
        failed += worst > 1e-4
        print(f"{name}: {encoder}, {worst:.1e}{'' if worst <= 1e-4 else ' DIFFERS'}", flush=True)
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
