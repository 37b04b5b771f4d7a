"""Makes tests/golden/vltseg.npz: outputs of the public VLTSeg re-implementation.

Run by hand where torch, timm, einops, mmengine, mmcv-lite, mmdet and mmsegmentation are installed,
on a checkout of VLTSeg/VLTSeg:

    python tests/oracles/golden_vltseg.py VLTSEG_CHECKOUT

Its own config, encoder, pyramid, decoder and inference run with every size reduced and with random
weights. The file holds:

- the output of the pixel decoder, the last layer's class and mask logits, and the class maps of one
  window and of a picture seen through overlapping windows. As with VLTSeg's 1024 pixels, the patch
  does not divide the window and the grid is odd.
- the names and shapes of the checkpoint. Its numbers are drawn from name and shape alone.
- the names and shapes of a published checkpoint of the crop 512.
- the learning rate and weight decay that its optimiser gives each parameter.

Made with commit 19cff2c, mmengine 0.10.7, mmcv-lite 2.1.0, mmdet 3.3.0, mmsegmentation 1.2.2, timm
1.0.31 and torch 2.13.0 on CPU.
"""

import argparse
from importlib.machinery import ModuleSpec
from pathlib import Path
import re
import sys
import types
from typing import Any
import zlib

import numpy as np
import torch  # pyright: ignore[reportMissingImports]

GOLDEN = Path(__file__).resolve().parents[2] / "tests" / "golden" / "vltseg.npz"
WINDOW = 75
STRIDE = 56
PICTURE = (100, 131)  # pixels: 5 patches of 14 and 5 more
WIDTH = 48
HEADS = 2
DEPTH = 4
HIDDEN = 64
QUERIES = 24
PIXEL_LAYERS = 2
LAYERS = 3
FFN = 96


class Undefined(types.ModuleType):
    """A compiled extension that is not there: it has every function that is looked up, and none
    that could be called.
    """

    def __getattr__(self, name: str) -> None:
        if name.startswith("__"):
            raise AttributeError(name)


# What is only imported need only be declared: the operators of torchvision, mmcv's and xformers'.
# The plain forms of these run here.
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from tests.oracles import stand_ins  # noqa: E402, F401  before what follows

# isort: split

for _name in ("mmcv._ext", "xformers", "xformers.ops"):
    sys.modules.setdefault(_name, Undefined(_name)).__spec__ = ModuleSpec(_name, None)


def reduced(model: Any) -> Any:
    """Their model's config with smaller numbers."""
    model.data_preprocessor.size = (WINDOW, WINDOW)
    model.test_cfg = dict(mode="slide", crop_size=(WINDOW, WINDOW), stride=(STRIDE, STRIDE))
    model.backbone.update(
        img_size=WINDOW,
        embed_dim=WIDTH,
        num_heads=HEADS,
        depth=DEPTH,
        out_indices=list(range(DEPTH)),
    )
    model.backbone.xattn = False  # the same attention without xformers
    head = model.decode_head
    head.update(
        in_channels=[WIDTH] * 4, feat_channels=HIDDEN, out_channels=HIDDEN, num_queries=QUERIES
    )
    encoder = head.pixel_decoder.encoder
    decoder = head.transformer_decoder
    encoder.num_layers = PIXEL_LAYERS
    decoder.num_layers = LAYERS
    for part in (encoder.layer_cfg, decoder.layer_cfg):
        for settings in part.values():
            settings.embed_dims = HIDDEN
        part.ffn_cfg.feedforward_channels = FFN
    for part in (head, head.pixel_decoder):
        part.positional_encoding.num_feats = HIDDEN // 2
    return model


# Of weights by part, so that the queries differ and several classes win pixels.
GAINS = (
    ("transformer_decoder", 0.6),
    ("mask_embed", 1.2),
    ("cls_embed", 5.0),
    ("backbone", 1.0),
    ("", 1.5),
)


def drawn(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """The tensor of a name, float32; the tests draw the same.

    Scales and variances are positive, tables of the size of features.
    """
    x = np.random.default_rng(zlib.crc32(name.encode())).standard_normal(shape)
    if len(shape) == 1:
        x = np.exp(0.3 * x) if re.search(r"weight|running_var", name) else 0.1 * x
    elif not re.search(r"query_|level_|pos_embed|cls_token", name):
        x *= next(gain for part, gain in GAINS if part in name) / np.sqrt(np.prod(shape[1:]))
    return x.astype(np.float32)


def picture(height: int, width: int) -> np.ndarray:
    """Coloured waves, uint8 RGB [h, w, 3]."""
    y, x, c = np.ogrid[0:height, 0:width, 0:3]
    wave = np.sin(0.13 * y + 0.5 * c) * np.cos(0.11 * x - 0.9 * c) + 0.4 * np.sin(
        0.05 * x + 0.07 * y + 2 * c
    )
    return np.clip(128 + 90 * wave, 0, 255).astype(np.uint8)


def main() -> None:
    """Writes the file."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("checkout", type=Path, metavar="VLTSEG_CHECKOUT")
    checkout: Path = parser.parse_args().checkout
    sys.path.insert(0, str(checkout))
    from mmengine import Config  # pyright: ignore[reportMissingImports]
    from mmengine.optim import build_optim_wrapper  # pyright: ignore[reportMissingImports]
    from mmseg.registry import MODELS  # pyright: ignore[reportMissingImports]
    from mmseg.structures import SegDataSample  # pyright: ignore[reportMissingImports]
    from mmseg.utils import register_all_modules  # pyright: ignore[reportMissingImports]
    import vltseg  # pyright: ignore[reportMissingImports]  # noqa: F401  registers its classes

    register_all_modules()

    def theirs():
        return Config.fromfile(checkout / "configs/_base_/models/eva-clip+mask2former.py").model

    published = MODELS.build(theirs()).state_dict()
    model = MODELS.build(reduced(theirs())).eval()
    # All but what the model computes for itself and a count of batches.
    shapes = {
        name: tuple(t.shape)
        for name, t in model.state_dict().items()
        if "rope." not in name and t.is_floating_point()
    }
    _, unexpected = model.load_state_dict(
        {name: torch.from_numpy(drawn(name, shape)) for name, shape in shapes.items()}, strict=False
    )
    assert not unexpected
    optimizer = build_optim_wrapper(
        model, Config.fromfile(checkout / "configs/_base_/schedules/schedule_5k.py").optim_wrapper
    ).optimizer
    of_parameter = {
        id(p): (group["lr"], group["weight_decay"])
        for group in optimizer.param_groups
        for p in group["params"]
    }
    rates = {name: of_parameter[id(parameter)] for name, parameter in model.named_parameters()}

    arrays: dict[str, np.ndarray] = {
        "names": np.array(list(shapes)),
        "shapes": np.array([",".join(map(str, shape)) for shape in shapes.values()]),
        "left_out": np.array([name for name in model.state_dict() if name not in shapes]),
        "rates": np.array([rates.get(name, (0, 0))[0] for name in shapes]),
        "decays": np.array([rates.get(name, (0, 0))[1] for name in shapes]),
        "published/names": np.array(list(published)),
        "published/shapes": np.array(
            [",".join(map(str, tensor.shape)) for tensor in published.values()]
        ),
    }
    for name, size in (("window", (WINDOW, WINDOW)), ("picture", PICTURE)):
        image = picture(*size)
        sample = SegDataSample(metainfo=dict(ori_shape=size, img_shape=size, pad_shape=size))
        bgr = torch.from_numpy(image[..., ::-1].transpose(2, 0, 1).copy())
        with torch.inference_mode():
            if name == "window":
                inputs = model.data_preprocessor({"inputs": [bgr]})["inputs"]
                features = model.extract_feat(inputs)
                mask_features, levels = model.decode_head.pixel_decoder(features)
                classes, masks = model.decode_head(features, [sample])
                for i, array in enumerate(levels):
                    arrays[f"levels/{i}"] = array[0].permute(1, 2, 0).numpy()
                arrays["mask_features"] = mask_features[0].permute(1, 2, 0).numpy()
                arrays["class_logits"] = classes[-1][0].numpy()
                arrays["mask_logits"] = masks[-1][0].numpy()
            (result,) = model.test_step({"inputs": [bgr], "data_samples": [sample]})
        scores = result.seg_logits.data.numpy()
        label = result.pred_sem_seg.data[0].numpy()
        arrays |= {f"{name}/image": image, f"{name}/label": label.astype(np.uint8)}
        best = np.sort(scores, axis=0)
        print(
            f"{name}: smallest lead {(best[-1] - best[-2]).min():.1e}, pixels of each class"
            f" {np.bincount(label.ravel())}"
        )
    for key, array in arrays.items():
        if array.dtype == np.float32:
            print(
                f"{key}: {array.shape}, std {array.std():.2f}, within {array.min():.1f} .."
                f" {array.max():.1f}"
            )
    np.savez_compressed(GOLDEN, **arrays)  # pyright: ignore[reportArgumentType]
    print(f"{GOLDEN.name}: {GOLDEN.stat().st_size} bytes, {len(shapes)} tensors")


if __name__ == "__main__":
    main()
