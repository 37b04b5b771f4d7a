"""Makes tests/golden/vitdet.npz: outputs of detectron2's ViTDet encoder and pyramid.

Run by hand where torch and timm are installed, on a checkout of facebookresearch/detectron2, of
which only a few files are imported:

    python tests/oracles/golden_vitdet.py DETECTRON2_CHECKOUT

- p2 to p5: levels of a small one for one image, whose grid of 6x6 neither the windows of 4 nor the
  positions of 3x3 divide. Weights and image are drawn by name in tests/detection/models.py, and not
  stored.
- names, shapes: of the base size at 1024 pixels.

Made with commit 02b5c4e2, timm 1.0.31 and torch 2.13.0 on CPU.
"""

import argparse
import functools
import importlib
from pathlib import Path
import sys
import types
from typing import Any

import numpy as np
import torch  # pyright: ignore[reportMissingImports]
from torch import nn  # pyright: ignore[reportMissingImports]

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from tests.detection import models
from tests.oracles import stand_ins  # noqa: F401  before what follows

# isort: split

GOLDEN = Path(__file__).resolve().parents[2] / "tests" / "golden" / "vitdet.npz"
SMALL: dict[str, Any] = dict(
    img_size=96,
    embed_dim=32,
    depth=4,
    num_heads=2,
    window_size=4,
    window_block_indexes=[0, 2],
    pretrain_img_size=48,
)
BASE: dict[str, Any] = dict(
    img_size=1024,
    embed_dim=768,
    depth=12,
    num_heads=12,
    window_size=14,
    window_block_indexes=[0, 1, 3, 4, 6, 7, 9, 10],
)


def declare(name: str, **content: Any) -> types.ModuleType:
    """A module or, with `__path__`, a package whose own code is not run."""
    module = sys.modules[name] = types.ModuleType(name)
    vars(module).update(content)
    return module


def vit(checkout: Path) -> Any:
    """The file detectron2/modeling/backbone/vit.py, with those that it needs."""
    declare("fvcore", __path__=[])
    declare("fvcore.nn", __path__=[], weight_init=declare("fvcore.nn.weight_init"))
    declare("fvcore.nn.distributed", differentiable_all_reduce=None)
    for package in ("", ".modeling", ".modeling.backbone"):
        declare(
            f"detectron2{package}",
            __path__=[str(checkout.joinpath("detectron2", *package.split(".")))],
        )
    declare(
        "detectron2.utils", comm=None, env=declare("detectron2.utils.env", TORCH_VERSION=(2, 13))
    )
    layers = declare(
        "detectron2.layers",
        __path__=[str(checkout / "detectron2" / "layers")],
        CNNBlockBase=nn.Module,
    )
    for file, name in (
        ("wrappers", "Conv2d"),
        ("shape_spec", "ShapeSpec"),
        ("batch_norm", "get_norm"),
    ):
        setattr(layers, name, getattr(importlib.import_module(f"detectron2.layers.{file}"), name))
    declare(
        "detectron2.modeling.backbone.fpn", _assert_strides_are_log2_contiguous=lambda strides: None
    )
    return importlib.import_module("detectron2.modeling.backbone.vit")


def build(code: Any, sizes: dict[str, Any], width: int) -> Any:
    """The encoder in its pyramid, as configs/common/models/mask_rcnn_vitdet.py builds it, but for
    the level p6.
    """
    net = code.ViT(**sizes, norm_layer=functools.partial(nn.LayerNorm, eps=1e-6), use_rel_pos=True)
    return code.SimpleFeaturePyramid(net, "last_feat", width, (4.0, 2.0, 1.0, 0.5))


def main() -> None:
    """Runs the model and writes the file."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("checkout", type=Path)
    code = vit(parser.parse_args().checkout)
    model = build(code, SMALL, models.CHANNELS)
    drawn = {
        name: models.weight(f"backbone.{name}", tuple(tensor.shape))
        for name, tensor in model.state_dict().items()
    }
    model.load_state_dict({name: torch.tensor(numbers) for name, numbers in drawn.items()})
    image = np.moveaxis(models.normal("vitdet", (1, 96, 96, 3)), -1, 1)
    with torch.no_grad():
        levels = model.eval()(torch.tensor(image))
    keys = {
        f"backbone.{name}": tuple(tensor.shape)
        for name, tensor in build(code, BASE, 256).state_dict().items()
    }
    result = {name: np.moveaxis(level.numpy(), 1, -1) for name, level in levels.items()}
    result |= {
        "names": np.array(list(keys)),
        "shapes": np.array([",".join(map(str, shape)) for shape in keys.values()]),
    }
    np.savez_compressed(GOLDEN, **result)
    print(f"{GOLDEN}: {GOLDEN.stat().st_size} bytes")


if __name__ == "__main__":
    main()
