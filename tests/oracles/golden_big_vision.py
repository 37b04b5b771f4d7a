"""Makes tests/golden/big_vision.npz: big_vision's outputs with weights that jaxdg converted.

Run by hand on a checkout of google-research/big_vision (commit 0127fb6):

    python tests/oracles/golden_big_vision.py BIG_VISION

Its code runs unchanged; TensorFlow, which it imports to read remote files, is stood in for. Small
random encoders, their weights drawn from timm's names, go through `conversion/torch_to_flax.py
--reverse --layout big_vision` and big_vision's `vit.load` into its model:

- {vit,siglip}/names: every parameter that the model has, with its shape; {vit,siglip}-scan/names:
  where it scans its blocks.
- {vit,siglip}/HxW: all tokens after every block. The plain ViT is run as `pool_type="tok"`, SigLIP
  as `pool_type="none"`; the largest size of SigLIP is loaded by it from the weights of the
  smallest, so its own code resizes the positions.

Also printed: how far its FlexiViT `resample_patchemb` is from ours, TensorFlow's bilinear resize
being torch's here.
"""

import os
from pathlib import Path
import sys
import tempfile
import types
from typing import Any

os.environ["JAX_PLATFORMS"] = "cpu"
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from flax import traverse_util
from flax.core import unfreeze
import flax.training.checkpoints  # noqa: F401  asks for TensorFlow, so before it is stood in for
import jax
import numpy as np
import torch  # pyright: ignore[reportMissingImports]

from jaxdg import backbones, weights
from jaxdg.backbones import resizing, zoo
from jaxdg.conversion import convert as torch_to_flax
from jaxdg.conversion import mapping, models
from tests.backbones.drawn import drawn, wave

GOLDEN = Path(__file__).resolve().parents[2] / "tests" / "golden"
SMALL: dict[str, Any] = dict(patch_size=4, width=24, depth=4, heads=2, taps=(0, 1, 2, 3))
SIZES = ((20, 20), (16, 32))
LARGER = (36, 36)  # positions of SigLIP resized
KINDS = {
    "vit": (backbones.VitConfig, "tok", ""),
    "siglip": (backbones.SiglipConfig, "none", ":img"),
}


def resized(images: torch.Tensor, size: tuple[int, int], method: str) -> torch.Tensor:
    """Stands for TensorFlow's `tf.image.resize`: half-pixel centres, no antialiasing."""
    return torch.nn.functional.interpolate(
        images.permute(0, 3, 1, 2), size=size, mode=method
    ).permute(0, 2, 3, 1)


def stand_in_for_tensorflow() -> None:
    """Lets big_vision be imported without TensorFlow."""
    modules: dict[str, Any] = {
        name: types.ModuleType(name)
        for name in ("tensorflow", "tensorflow.io", "tensorflow.io.gfile")
    }
    modules["tensorflow"].io = modules["tensorflow.io"]
    modules["tensorflow.io"].gfile = modules["tensorflow.io.gfile"]
    modules["tensorflow"].constant = torch.tensor
    modules["tensorflow"].image = types.SimpleNamespace(resize=resized)
    sys.modules.update(modules)


def made(kind: str, size: tuple[int, int], folder: Path) -> Path:
    """The file of a random encoder for images of this size, in big_vision's layout."""
    zoo.ZOO["small"] = zoo.Entry(KINDS[kind][0](image_size=size, **SMALL), "made by a script")
    module = models.abstract("small")
    timm = models.layouts("small")[0]
    shapes = mapping.source_shapes(module, timm)
    ours = folder / "ours.safetensors"
    theirs = folder / f"{kind}.npz"
    converted = mapping.to_flax(
        module, [timm], list(shapes), lambda name: drawn(name, shapes[name])
    )
    weights.save(converted.tensors, ours, {"model": "small"})
    print(torch_to_flax.reverse("small", ours, theirs, "big_vision"))
    return theirs


def main() -> None:
    """Writes the file."""
    sys.path.append(sys.argv[1])
    stand_in_for_tensorflow()
    from big_vision.models import vit  # pyright: ignore[reportMissingImports]
    from big_vision.models.proj.flexi.vit import (  # pyright: ignore[reportMissingImports]
        resample_patchemb,
    )

    arrays: dict[str, np.ndarray] = {}
    for kind, (_, pool, part) in KINDS.items():
        sizes = dict(patch_size=(4, 4), width=24, depth=4, mlp_dim=96, num_heads=2, pool_type=pool)
        model = vit.Model(num_classes=None, **sizes)
        prefix = "params/img/" if part else "params/"
        for size in (*SIZES, LARGER)[: 3 if part else 2]:
            images = wave(*size)
            init = unfreeze(model.init(jax.random.key(0), images)["params"])
            with tempfile.TemporaryDirectory() as folder:
                params = vit.load(
                    init,
                    f"{made(kind, SIZES[0] if size == LARGER else size, Path(folder))}{part}",
                    sizes,
                )
            _, out = model.apply({"params": params}, images)
            arrays[f"{kind}/{size[0]}x{size[1]}"] = np.stack(
                [out["encoder"][f"block{i:02d}"]["+mlp"] for i in range(4)]
            )
        for scan in (False, True):
            init = vit.Model(num_classes=None, **sizes, scan=scan).init(
                jax.random.key(0), wave(20, 20)
            )["params"]
            flat: dict[str, Any] = traverse_util.flatten_dict(unfreeze(init), sep="/")
            listed = [
                " ".join((prefix + name, *map(str, tensor.shape))) for name, tensor in flat.items()
            ]
            arrays[f"{kind}{'-scan' * scan}/names"] = np.array(listed)

    for source, target in ((14, 16), (16, 14), (16, 8), (5, 12)):
        kernel = drawn("patch_embed.proj.kernel", (source, source, 3, 4))
        theirs = np.asarray(resample_patchemb(kernel, (target, target)))
        print(
            f"flexi {source} to {target}:"
            f" {np.abs(resizing.resize_patch(kernel, target, 'flexi') - theirs).max():.1e} of"
            f" {theirs.max():.1f}"
        )
    path = GOLDEN / "big_vision.npz"
    np.savez_compressed(path, **arrays)  # pyright: ignore[reportArgumentType]
    print(f"{path.name}: {path.stat().st_size} bytes")


if __name__ == "__main__":
    main()
