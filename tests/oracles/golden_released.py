"""Makes tests/golden/released_*.npz: outputs of released models by their authors' code.

Run by hand where torch, timm, einops, mmengine, mmcv-lite, mmdet and mmsegmentation are installed,
on a checkout of w1oves/Rein, of ysj9909/SoMA or of tpy001/VFMSeg, which needs peft too:

    python tests/oracles/golden_released.py REIN_CHECKOUT rein_dinov2
    python tests/oracles/golden_released.py REIN_CHECKOUT rein_eva02
    python tests/oracles/golden_released.py REIN_CHECKOUT clip
    python tests/oracles/golden_released.py SOMA_CHECKOUT soma
    python tests/oracles/golden_released.py VFMSEG_CHECKOUT vfmnet
    python tests/oracles/golden_released.py VFMSEG_CHECKOUT mgrnet

Their own configs, encoders, adapters, decoders and inference run with every size reduced and with
random weights. Encoders are converted to patches of 16 pixels by SoMA's own functions; Rein's
scripts compute the same for fixed sizes. A file holds:

- of one window the two coarsest levels of features and the last layer's class and mask logits, and
  the class maps of that window and of a picture seen through overlapping windows;
- the names and shapes of the published file and of its encoder's file, reduced and in full.

`vfmnet` has the class logits of a window instead, as its file holds the whole model. Of its package
only the modules that it needs are imported. `mgrnet` has the coarse class logits of a window, and
those that the refinement makes of the window and these.

There is no config of Rein on CLIP: `clip` holds features of the last two taps by their CLIP, which
converts an archive of OpenAI itself, and the names and shapes of that archive's image tower.

Made with commits 7da85bc, 7ea8c0e and 6b019b9, mmengine 0.10.7, mmcv-lite 2.1.0, mmdet 3.3.0,
mmsegmentation 1.2.2, timm 1.0.31, peft 0.21.2 and torch 2.14.1 on CPU.
"""

import argparse
import contextlib
import importlib
from importlib.machinery import ModuleSpec
import importlib.util
import os
from pathlib import Path
import sys
import types
from typing import Any

import numpy as np
import torch  # pyright: ignore[reportMissingImports]
from torch.nn import functional as F  # pyright: ignore[reportMissingImports]

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
from tests.conversion import released as r  # noqa: E402
from tests.oracles import stand_ins  # noqa: E402, F401  before what follows

# isort: split

os.environ["XFORMERS_DISABLED"] = "1"


class Undefined(types.ModuleType):
    """A package that is not there: it has every class that is looked up, and none that is used."""

    def __getattr__(self, name: str) -> type | None:
        if name.startswith("__"):
            raise AttributeError(name)
        return torch.nn.Module if name[0].isupper() else None


ABSENT = ["mmcv._ext", "xformers", "xformers.ops"]
ABSENT += ["mmpretrain", "mmpretrain.models", "mmpretrain.models.backbones"]
PEFT = ["peft", "peft.utils", "peft.utils.integrations"]
WITH_PEFT = {"vfmnet", "mgrnet"} & set(sys.argv)
for _name in ABSENT if WITH_PEFT else ABSENT + PEFT:
    sys.modules.setdefault(_name, Undefined(_name)).__spec__ = ModuleSpec(_name, None)
if not WITH_PEFT:  # what SoMA takes from peft does nothing without DeepSpeed
    sys.modules[PEFT[-1]].__dict__["gather_params_ctx"] = contextlib.nullcontext

CONFIGS = {
    "rein_dinov2": "configs/dinov2/rein_dinov2_mask2former_512x512_bs1x4.py",
    "rein_eva02": "configs/_base_/models/rein_eva02-L_mask2former.py",
    "soma": "configs/sora/sora_dinov2-L_mask2former.py",
}


def reduced(model: Any, kind: str) -> Any:
    """Their model's config with smaller numbers."""
    model.data_preprocessor.size = (r.WINDOW, r.WINDOW)
    model.test_cfg = dict(mode="slide", crop_size=(r.WINDOW, r.WINDOW), stride=(r.STRIDE, r.STRIDE))
    model.backbone.update(
        img_size=r.WINDOW,
        embed_dim=r.WIDTH,
        num_heads=r.HEADS,
        depth=r.DEPTH,
        out_indices=list(range(r.DEPTH)),
    )
    if kind == "soma":
        model.backbone.lora_cfg.update(r=r.RANK, lora_alpha=r.RANK, start_lora_idx=r.FIRST)
    else:
        model.backbone.reins_config.update(
            token_length=r.QUERIES,
            embed_dims=r.WIDTH,
            num_layers=r.DEPTH,
            lora_dim=r.RANK,
            query_dims=r.HIDDEN,
        )
    head = model.decode_head
    head.update(
        in_channels=[r.WIDTH] * 4,
        feat_channels=r.HIDDEN,
        out_channels=r.HIDDEN,
        num_queries=r.QUERIES,
    )
    encoder = head.pixel_decoder.encoder
    decoder = head.transformer_decoder
    encoder.num_layers = r.PIXEL_LAYERS
    decoder.num_layers = r.LAYERS
    for part in (encoder.layer_cfg, decoder.layer_cfg):
        for settings in part.values():
            settings.embed_dims = r.HIDDEN
        part.ffn_cfg.feedforward_channels = r.FFN
    for part in (head, head.pixel_decoder):
        part.positional_encoding.num_feats = r.HIDDEN // 2
    return model


def without_files(model: Any) -> Any:
    """Their model's config without a file to start from, and without a compiled attention."""
    model.backbone.pop("init_cfg", None)
    model.backbone.pop("pretrained", None)
    if "xattn" in model.backbone:
        model.backbone.xattn = False
    return model


def published(model: Any, kind: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """The shapes of the published file and of its encoder's, by name."""
    everything = dict(model.named_parameters())
    if kind == "soma":
        wanted = ("q", "k", "v", "proj", "fc1", "fc2")  # of tools/extract_soma_weights.py
        file = {
            name: tuple(t.shape)
            for name, t in everything.items()
            if name.startswith("decode_head.")
            or "lora" in name
            or name == "backbone.model.mask_token"
            or (name.endswith("bias") and any(word in name for word in wanted))
        }
        encoder = {
            name.removeprefix("backbone.model."): tuple(t.shape)
            for name, t in everything.items()
            if name.startswith("backbone.") and "lora" not in name
        }
        for name in [name for name in encoder if ".attn.q." in name]:
            for part in "qkv":
                rows, *others = encoder.pop(name.replace(".q.", f".{part}."))
            encoder[name.replace(".q.", ".qkv.")] = (3 * rows, *others)
    else:
        file = {name: tuple(t.shape) for name, t in model.state_dict().items()}
        encoder = {
            name.removeprefix("backbone."): tuple(t.shape)
            for name, t in everything.items()
            if name.startswith("backbone.") and "reins" not in name
        }
    return file, encoder


def as_published(encoder: dict[str, Any], patch: int, grid: int) -> dict[str, Any]:
    """The shapes of an encoder's file before it is converted to other patches."""
    width = encoder["pos_embed"][-1]
    return encoder | {
        "patch_embed.proj.weight": (width, 3, patch, patch),
        "pos_embed": (1, 1 + grid * grid, width),
    }


def converted(encoder: dict[str, np.ndarray], kind: str) -> dict[str, torch.Tensor]:
    """The encoder's file as the authors convert it."""
    state = {name: torch.from_numpy(tensor) for name, tensor in encoder.items()}
    kernel = state["patch_embed.proj.weight"]
    state["patch_embed.proj.weight"] = F.interpolate(
        kernel, size=(16, 16), mode="bicubic", align_corners=False
    )
    positions = state["pos_embed"]
    square = positions[:, 1:].reshape(1, r.GRID, r.GRID, -1).permute(0, 3, 1, 2)
    side = r.WINDOW // 16
    square = F.interpolate(square, size=(side, side), mode="bicubic", align_corners=False)
    rows = square.permute(0, 2, 3, 1).reshape(1, side * side, -1)
    state["pos_embed"] = torch.cat([positions[:, :1], rows], dim=1)
    if kind != "soma":
        return {f"backbone.{name}": tensor for name, tensor in state.items()}
    for name in [name for name in state if ".qkv." in name]:
        for part, tensor in zip("qkv", state.pop(name).chunk(3), strict=True):
            state[name.replace(".qkv.", f".{part}.")] = tensor
    return {f"backbone.model.{name}": tensor for name, tensor in state.items()}


def check_conversion(checkout: Path, encoder: dict[str, np.ndarray]) -> None:
    """SoMA's own functions give the same as `converted`."""
    path = checkout / "tools" / "convert_models" / "convert_dinov2_sora.py"
    spec = importlib.util.spec_from_file_location("their_converter", path)
    assert spec is not None
    assert spec.loader is not None
    theirs = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(theirs)
    state = {name: torch.from_numpy(tensor) for name, tensor in encoder.items()}
    theirs.interpolate_patch_embed_(state)
    theirs.interpolate_pos_embed_(state, crop_size=(r.WINDOW, r.WINDOW))
    theirs.split_qkv_weights(state)
    for name, tensor in converted(encoder, "soma").items():
        assert torch.equal(tensor, state[name.removeprefix("backbone.model.")]), name


class Archive:
    """What `torch.jit.load` gives of OpenAI's archives, as far as it is used."""

    def __init__(self, state: dict[str, torch.Tensor]):
        self.state = state

    def float(self) -> "Archive":
        """Itself."""
        return self

    def state_dict(self) -> dict[str, torch.Tensor]:
        """The tensors."""
        return self.state


def clip(golden: Path) -> None:
    """Writes the file of CLIP's encoder."""
    from rein import CLIPVisionTransformer  # pyright: ignore[reportMissingImports]

    encoder = CLIPVisionTransformer(
        input_resolution=r.WINDOW,
        patch_size=16,
        width=r.WIDTH,
        layers=r.DEPTH,
        heads=r.HEADS,
        out_indices=list(range(r.DEPTH)),
    ).eval()
    shapes = {f"visual.{name}": tuple(t.shape) for name, t in encoder.state_dict().items()}
    shapes["visual.conv1.weight"] = (r.WIDTH, 3, r.PATCH, r.PATCH)
    shapes["visual.positional_embedding"] = (1 + r.GRID * r.GRID, r.WIDTH)
    file = r.encoder_file(shapes)
    state = {name: torch.from_numpy(tensor) for name, tensor in file.items()}
    torch.jit.load = lambda path, map_location: Archive(state)
    encoder.init_weights("archive")
    mean, std = np.array([123.675, 116.28, 103.53]), np.array([58.395, 57.12, 57.375])
    image = ((r.picture(r.WINDOW, r.WINDOW) - mean) / std).astype(np.float32)
    with torch.inference_mode():
        maps = encoder(torch.from_numpy(image.transpose(2, 0, 1)[None].copy()))
    arrays = {f"taps/{i}": maps[i][0].permute(1, 2, 0).numpy() for i in (2, 3)}
    arrays["encoder/names"] = np.array(list(shapes))
    arrays["encoder/shapes"] = np.array([",".join(map(str, s)) for s in shapes.values()])
    np.savez_compressed(golden, **arrays)  # pyright: ignore[reportArgumentType]
    print(f"{golden.name}: {golden.stat().st_size} bytes, {len(shapes)} tensors")


def vfmnet(checkout: Path, golden: Path, refined: bool) -> None:
    """Writes the file of VFMNet, or of MGRNet."""
    from mmengine import Config  # pyright: ignore[reportMissingImports]
    from mmseg.registry import MODELS  # pyright: ignore[reportMissingImports]

    for name in (
        ("matplotlib", "matplotlib.pyplot", "rein.utils") if refined else ()
    ):  # for debugging
        sys.modules[name] = Undefined(name)
        vars(sys.modules[name]).update(use=lambda _: None, subplotimg=None)
    for name in ("rein", "rein.models", *(f"rein.models.{x}" for x in ("backbones", "heads"))):
        sys.modules[name] = types.ModuleType(name)
        sys.modules[name].__path__ = [str(checkout / name.replace(".", "/"))]
    package = types.ModuleType("rein.models.segmentors")
    package.__path__ = [str(checkout / "rein/models/segmentors")]
    sys.modules[package.__name__] = package
    needed = ["backbones.dino_v2", "heads.linear_head", "segmentors.Lora_encoder_decoder"]
    if refined:
        needed = ["backbones.lora_backbone", "heads.VFMHead", "heads.Transformer", *needed[:2]]
        needed.append("segmentors.Ms_VFM_encoder_decoder")
    for name in needed:
        importlib.import_module(f"rein.models.{name}")
    torch.load = lambda path, map_location: {}  # its encoder is loaded afterwards

    def theirs():
        name = "lora_dinov2_ms_masked" if refined else "lora_dinov2_linear"
        model = Config.fromfile(checkout / f"configs/_base_/models/{name}.py").model
        model.train_cfg = dict(log_config=dict(img_interval=1))
        return model

    in_full = {name: tuple(t.shape) for name, t in MODELS.build(theirs()).state_dict().items()}
    settings = theirs()
    encoder = settings.backbone.backbone if refined else settings.backbone
    encoder.update(
        img_size=r.WINDOW,
        embed_dim=64,  # a multiple of the groups
        num_heads=r.HEADS,
        depth=r.DEPTH,
        out_indices=list(range(r.DEPTH)),
    )
    settings.data_preprocessor.size = (r.WINDOW, r.WINDOW)
    settings.decode_head.in_channels = [64] * 4
    settings.decode_head.channels = 16
    (settings.backbone if refined else settings).Lora_config.update(r=r.RANK, lora_alpha=r.RANK)
    if refined:
        settings.aux_head.update(in_channels=[64] * 4, channels=128)
        settings.aux_head.transformer.update(query_dim=128, d_head=8, depth=2)
    model = MODELS.build(settings)
    model.eval()
    shapes = {name: tuple(t.shape) for name, t in model.state_dict().items()}
    file = {name: torch.from_numpy(r.drawn(name, shape)) for name, shape in shapes.items()}
    model.load_state_dict(file)
    image = r.picture(r.WINDOW, r.WINDOW)
    bgr = torch.from_numpy(image[..., ::-1].transpose(2, 0, 1).copy())
    with torch.inference_mode():
        inputs = model.data_preprocessor({"inputs": [bgr]})["inputs"]
        features = model.extract_feat(inputs)
        logits = model.decode_head(features)
        arrays = {"logits": logits[0].permute(1, 2, 0).numpy()}
        if refined:
            model.aux_decoder.transformer_decoder.mask_enable = False  # as in their inference
            context = F.interpolate(logits, inputs.shape[2:], mode="bilinear", align_corners=False)
            arrays["refined"] = model.aux_decoder(features, context)[0].permute(1, 2, 0).numpy()
    for prefix, named in (("", shapes), ("published/", in_full)):
        arrays[f"{prefix}names"] = np.array(list(named))
        arrays[f"{prefix}shapes"] = np.array([",".join(map(str, s)) for s in named.values()])
    np.savez_compressed(golden, **arrays)  # pyright: ignore[reportArgumentType]
    print(f"{golden.name}: {golden.stat().st_size} bytes, std {arrays['logits'].std():.2f}")
    size = 4 * sum(int(np.prod(shape)) for shape in in_full.values()) / 1e6
    print(list(shapes)[:12], f"{len(in_full)} tensors of {size:.0f} MB in full")


def main() -> None:
    """Writes the file."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("checkout", type=Path)
    parser.add_argument("kind", choices=[*CONFIGS, "clip", "vfmnet", "mgrnet"])
    args = parser.parse_args()
    kind: str = args.kind
    golden = ROOT / "tests" / "golden" / f"released_{kind}.npz"
    sys.path.insert(0, str(args.checkout))
    from mmengine import Config  # pyright: ignore[reportMissingImports]
    from mmseg.registry import MODELS  # pyright: ignore[reportMissingImports]
    from mmseg.structures import SegDataSample  # pyright: ignore[reportMissingImports]
    from mmseg.utils import register_all_modules  # pyright: ignore[reportMissingImports]

    register_all_modules()
    if WITH_PEFT:
        return vfmnet(args.checkout, golden, refined=kind == "mgrnet")
    import rein  # pyright: ignore[reportMissingImports]  # noqa: F401  registers its classes

    if kind == "clip":
        return clip(golden)

    def theirs():
        return without_files(Config.fromfile(args.checkout / CONFIGS[kind]).model)

    if kind == "soma":  # the start of its adapters, which takes long, is loaded over
        from rein.peft.sora import Linear  # pyright: ignore[reportMissingImports]

        Linear.sora_init = lambda self, init: None
    in_full = published(MODELS.build(theirs()), kind)
    model = MODELS.build(reduced(theirs(), kind))
    model.eval()
    shapes, encoder_shapes = published(model, kind)
    encoder_shapes = as_published(encoder_shapes, r.PATCH, r.GRID)
    encoder = r.encoder_file(encoder_shapes)
    if kind == "soma":
        check_conversion(args.checkout, encoder)
        file = r.soma_file(shapes, encoder, r.FIRST)
    else:
        file = {name: r.drawn(name, shape) for name, shape in shapes.items()}
    state = converted(encoder, kind) | {
        name: torch.from_numpy(tensor.copy()) for name, tensor in file.items()
    }
    missing, unexpected = model.load_state_dict(state, strict=False)
    print("not in the files:", [name for name in missing if "rope" not in name])
    assert not unexpected, unexpected

    parts = {"": shapes, "encoder/": encoder_shapes, "published/": in_full[0]}
    parts["published/encoder/"] = in_full[1]
    arrays: dict[str, np.ndarray] = {}
    for prefix, named in parts.items():
        arrays[f"{prefix}names"] = np.array(list(named))
        arrays[f"{prefix}shapes"] = np.array([",".join(map(str, s)) for s in named.values()])
    for name, size in (("window", (r.WINDOW, r.WINDOW)), ("picture", r.PICTURE)):
        image = r.picture(*size)
        sample = SegDataSample(metainfo=dict(ori_shape=size, img_shape=size))
        bgr = torch.from_numpy(image[..., ::-1].transpose(2, 0, 1).copy())
        with torch.inference_mode():
            if name == "window":
                inputs = model.data_preprocessor({"inputs": [bgr]})["inputs"]
                features = model.extract_feat(inputs)
                maps = features if kind == "soma" else features[0]
                for i in (2, 3):  # the small ones
                    arrays[f"levels/{i}"] = maps[i][0].permute(1, 2, 0).numpy()
                classes, masks = model.decode_head(features, [sample])
                arrays["class_logits"] = classes[-1][0].numpy()
                arrays["mask_logits"] = masks[-1][0].numpy()
            (result,) = model.test_step({"inputs": [bgr], "data_samples": [sample]})
        scores = result.seg_logits.data.numpy()
        label = result.pred_sem_seg.data[0].numpy()
        arrays[f"{name}/label"] = label.astype(np.uint8)
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
    np.savez_compressed(golden, **arrays)  # pyright: ignore[reportArgumentType]
    print(f"{golden.name}: {golden.stat().st_size} bytes, {len(shapes)} tensors")


if __name__ == "__main__":
    main()
