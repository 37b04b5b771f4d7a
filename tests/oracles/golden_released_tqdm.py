"""Makes tests/golden/released_tqdm_*.npz: outputs of whole models of tqdm by their authors' code.

Run by hand where torch, timm, einops, ftfy, regex and transformers are installed, on a checkout of
ByeongHyunPak/tqdm (MIT; nothing of it is here):

    python tests/oracles/golden_released_tqdm.py TQDM_CHECKOUT eva
    python tests/oracles/golden_released_tqdm.py TQDM_CHECKOUT clip

Their own configs, towers, tokenizer, heads and segmentors run with every size but the vocabulary
reduced, with random weights and without a compiled attention. What they import of mmcv 1.x is stood
in for as in golden_tqdm.py. A file holds:

- of one window the queries in CLIP's space, the last layer's class and mask logits, the class
  scores of every eighth pixel and the class map, and the class map of a picture seen through
  overlapping windows;
- the biases of `balanced`;
- the embeddings that they compute anew at every start (`reg_T0`), and the token ids of the names;
- the names and shapes of the saved model, reduced and in full.

Made with commit 75168af, torch 2.14.1, timm 1.0.31 and transformers 5.24.0 on CPU.
"""

import argparse
import json
import os
from pathlib import Path
import runpy
import sys
from typing import Any
from unittest import mock

import numpy as np
import torch  # pyright: ignore[reportMissingImports]
from torch import nn  # pyright: ignore[reportMissingImports]
from torch.nn import functional as F  # pyright: ignore[reportMissingImports]

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
from tests.conversion import released as r  # noqa: E402
from tests.oracles import golden_tqdm as parts  # noqa: E402

CONFIGS = {
    "eva": "configs/tqdm/tqdm_eva_vit-l_1e-5_20k-g2c-512.py",
    "clip": "configs/tqdm/tqdm_clip_vit-b_1e-5_20k-g2c-512.py",
}
CLIP_MEAN = np.array([0.48145466, 0.4578275, 0.40821073]) * 255
CLIP_STD = np.array([0.26862954, 0.26130258, 0.27577711]) * 255


class Settings(parts.Dot):
    """Entries can be set as attributes too."""

    def __setattr__(self, name: str, value: Any) -> None:
        self[name] = value


def prepared(checkout: Path) -> tuple[Any, Any]:
    """Their segmentors, with all that these build: (on EVA-02-CLIP, on CLIP)."""
    parts.declare()
    package = parts.package
    builder = sys.modules["mmseg.models"].builder
    for kind in ("backbone", "head", "neck"):
        setattr(builder, f"build_{kind}", lambda config: parts.Registry.build(config))
    package("mmcv.runner", auto_fp16=lambda *_, **__: lambda function: function)
    package("mmseg.core", build_pixel_sampler=None)
    package("mmseg.ops", Upsample=None)
    package("mmseg.models.losses", accuracy=None)
    del sys.modules["mmseg.models.decode_heads.decode_head"]
    vars(sys.modules["models.backbones.utils"]).clear()
    for name in ("rope", "utils", "transformer", "eva_vit_model", "modified_resnet", "timm_model"):
        parts.load(checkout, f"models.backbones.eva_clip.{name}")
    towers = parts.load(checkout, "models.backbones.eva_clip.model")
    parts.load(checkout, "models.backbones.utils")
    clip = parts.load(checkout, "models.backbones.clip.models")
    vars(sys.modules["models.backbones.clip"]).update(vars(clip))
    for name in ("losses.utils", "losses.cross_entropy_loss", "losses.dice_loss"):
        parts.load(checkout, f"mmseg.models.{name}")
    parts.load(checkout, "mmseg.models.utils.positional_encoding")
    sampling = parts.load(checkout, "mmseg.models.utils.point_sample")
    vars(sys.modules["mmseg.models.utils"]).update(vars(sampling))
    parts.load(checkout, "mmseg.models.utils.assigner")
    points = parts.load(checkout, "mmseg.core.anchor.point_generator")
    package("mmseg.core.anchor", MlvlPointGenerator=points.MlvlPointGenerator)
    parts.load(checkout, "mmseg.models.plugins.tqdm_msdeformattn_pixel_decoder")
    for name in ("decode_head", "identity_head", "tqdm_head"):
        parts.load(checkout, f"mmseg.models.decode_heads.{name}")
    folder = checkout / "models" / "backbones" / "eva_clip" / "model_configs"

    def get_backbone(model_name, sizes=None, image_size=0, out_indices=(), context_length=0, **_):
        """As theirs, without its file."""
        config = json.loads((folder / f"{model_name}.json").read_text())
        config["vision_cfg"] |= dict(image_size=image_size, out_indices=out_indices, xattn=False)
        config["text_cfg"]["context_length"] = context_length
        for part, own in (sizes or {}).items():
            config[part] = config[part] | own if isinstance(own, dict) else own
        os.environ["RoPE"] = "1"  # noqa: SIM112
        model = towers.CustomCLIP(**config)
        return model.visual, model.text

    package("models.backbones.eva_clip", get_backbone=get_backbone)
    on_eva = parts.load(checkout, "models.segmentors.tqdm_eva_clip").tqdm_EVA_CLIP
    on_clip = parts.load(checkout, "models.segmentors.tqdm_clip").tqdm_CLIP
    return on_eva, on_clip


def reduced(model: Any, kind: str) -> Any:
    """Their model's config with smaller numbers."""
    if kind == "eva":
        model.token_embed_dim = r.TEXT_WIDTH
        model.eva_clip.image_size = r.TQDM_WINDOW
        model.eva_clip.out_indices = list(r.TQDM_TAPS)
        vision = dict(layers=r.TQDM_DEPTH, width=r.WIDTH, head_width=r.WIDTH // r.HEADS)
        text = dict(width=r.TEXT_WIDTH, heads=r.TEXT_HEADS, layers=r.TEXT_DEPTH)
        model.eva_clip.sizes = dict(embed_dim=r.EMBEDDING, vision_cfg=vision, text_cfg=text)
    else:
        model.token_embed_dim = r.TEXT_WIDTH
        model.backbone.update(
            width=r.WIDTH,
            heads=r.HEADS,
            layers=r.TQDM_DEPTH,
            output_dim=r.EMBEDDING,
            input_resolution=r.TQDM_WINDOW,
            out_indices=list(r.TQDM_TAPS),
        )
        model.text_encoder.update(
            embed_dim=r.EMBEDDING,
            transformer_width=r.TEXT_WIDTH,
            transformer_heads=r.TEXT_HEADS,
            transformer_layers=r.TEXT_DEPTH,
        )
    model.text_dim = r.EMBEDDING
    model.context_decoder.update(
        visual_dim=r.EMBEDDING, transformer_width=r.CONTEXT_WIDTH, transformer_layers=2
    )
    head = model.decode_head
    head.update(in_channels=[r.WIDTH] * 4, feat_channels=r.HIDDEN, out_channels=r.HIDDEN)
    head.text_proj.update(text_in_dim=r.EMBEDDING, text_out_dim=r.HIDDEN)
    encoder = head.pixel_decoder.encoder
    decoder = head.transformer_decoder
    encoder.num_layers = r.PIXEL_LAYERS
    decoder.num_layers = r.LAYERS
    for part, width in ((encoder, r.PIXEL_FFN), (decoder, r.FFN)):
        attentions = part.transformerlayers.attn_cfgs
        for attention in attentions if isinstance(attentions, list) else [attentions]:
            attention.embed_dims = r.HIDDEN
        part.transformerlayers.ffn_cfgs.feedforward_channels = width
    for part in (head, head.pixel_decoder):
        part.positional_encoding.num_feats = r.HIDDEN // 2
    model.test_cfg = Settings(
        mode="slide",
        crop_size=(r.TQDM_WINDOW, r.TQDM_WINDOW),
        stride=(r.TQDM_STRIDE, r.TQDM_STRIDE),
    )
    return model


def normalised(image: np.ndarray) -> torch.Tensor:
    """An image as their pipeline gives it."""
    image = ((image - CLIP_MEAN) / CLIP_STD).astype(np.float32)
    return torch.from_numpy(image.transpose(2, 0, 1)[None].copy())


def balanced(model: Any) -> dict[str, np.ndarray]:
    """Changes the last biases so that the queries' mean is 0, as queries with random weights are
    much alike and one class would win everywhere; returns them.
    """
    head = model.decode_head
    means: dict[str, torch.Tensor] = {}
    layers = {"cls_embed": head.cls_embed, "mask_embed.4": head.mask_embed[4]}

    def note(name):
        return lambda _, __, output: means.update({name: output.mean((0, 1))})

    hooks = [layer.register_forward_hook(note(name)) for name, layer in layers.items()]
    with torch.inference_mode():
        window = normalised(r.picture(r.TQDM_WINDOW, r.TQDM_WINDOW))
        x, _, texts, _ = model.after_extract_feat(model.extract_feat(window))
        head(x, texts, [{}])
        for hook in hooks:
            hook.remove()
        for name, layer in layers.items():
            layer.bias -= means[name]
    return {f"decode_head.{at}.bias": layer.bias.detach().numpy() for at, layer in layers.items()}


def main() -> None:
    """Writes the file."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("checkout", type=Path)
    parser.add_argument("kind", choices=CONFIGS)
    args = parser.parse_args()
    checkout, kind = args.checkout.resolve(), args.kind
    kinds = prepared(checkout)
    segmentor = kinds[kind == "clip"]
    if kind == "clip":  # files to start from
        for name in ("CLIPVisionTransformer", "CLIPTextContextEncoder"):
            parts.Registry.classes[name].init_weights = lambda self: None
    names = parts.load(checkout, "mmseg.core.evaluation.class_names").cityscapes_classes()

    def theirs():
        model = runpy.run_path(str(checkout / CONFIGS[kind]))["model"]
        model.update(class_names=list(names), pretrained=None)
        return Settings.of(model)

    def built(config):
        config = {key: value for key, value in config.items() if key not in ("type", "pretrained")}
        arange, linspace, to = torch.arange, torch.linspace, torch.Tensor.to

        def counted(*n, device=None, **named):
            return arange(*n, **named) if device == "cuda" else arange(*n, device=device, **named)

        def on_this_device(self, *given, **named):
            return self if given[:1] == ("cuda",) else to(self, *given, **named)

        with (
            mock.patch.object(torch, "arange", counted),
            mock.patch.object(torch, "linspace", lambda *n: linspace(*n, device="cpu")),
            mock.patch.object(torch.Tensor, "to", on_this_device),
            mock.patch.object(nn.Module, "to", lambda self, *_: self),
        ):
            return segmentor(**config).eval()

    with torch.device("meta"):
        in_full = {name: tuple(t.shape) for name, t in built(theirs()).state_dict().items()}
    model = built(reduced(theirs(), kind))
    shapes = {name: tuple(t.shape) for name, t in model.state_dict().items()}
    state = {
        name: torch.from_numpy(r.drawn(name, shape))
        for name, shape in shapes.items()
        if "rope" not in name
    }
    _, unexpected = model.load_state_dict(state, strict=False)
    assert not unexpected
    arrays = {f"balanced/{name}": bias for name, bias in balanced(model).items()}
    tokenize = sys.modules["models.backbones.utils"].tokenize
    prompts = [
        tokenize(f"a clean origami of a {name}", context_length=model.text_encoder.context_length)
        for name in names
    ]
    arrays["ids"] = model.texts.numpy().astype(np.int32)
    with torch.inference_mode():
        anchors = model.text_encoder(torch.cat(prompts), context=None)
        arrays["anchors"] = F.normalize(anchors, dim=-1).numpy()
        for name, size in (("window", (r.TQDM_WINDOW, r.TQDM_WINDOW)), ("picture", r.PICTURE)):
            inputs = normalised(r.picture(*size))
            metas = [dict(ori_shape=(*size, 3), flip=False)]
            if name == "window":
                x, _, texts, _ = model.after_extract_feat(model.extract_feat(inputs))
                classes, masks = model.decode_head(x, texts, metas)
                arrays |= {"texts": texts[0], "class_logits": classes[-1][0]}
                arrays["mask_logits"] = masks[-1][0]
            scores = model.slide_inference(inputs, metas, rescale=True)[0].numpy()
            if name == "window":
                arrays["scores"] = scores[:, ::8, ::8]
            label = scores.argmax(axis=0)
            arrays[f"{name}/label"] = label.astype(np.uint8)
            best = np.sort(scores, axis=0)
            print(
                f"{name}: smallest lead {(best[-1] - best[-2]).min():.1e}, pixels of each class"
                f" {np.bincount(label.ravel(), minlength=19)}"
            )
    for prefix, named in (("", shapes), ("published/", in_full)):
        arrays[f"{prefix}names"] = np.array(list(named))
        arrays[f"{prefix}shapes"] = np.array([",".join(map(str, s)) for s in named.values()])
    for key, array in arrays.items():
        array = arrays[key] = np.asarray(array)
        if array.dtype == np.float32:
            print(f"{key}: {array.shape}, std {array.std():.2f}, up to {np.abs(array).max():.1f}")
    golden = ROOT / "tests" / "golden" / f"released_tqdm_{kind}.npz"
    np.savez_compressed(golden, **arrays)  # pyright: ignore[reportArgumentType]
    size = sum(int(np.prod(shape)) for shape in in_full.values()) * 4
    print(f"{golden.name}: {golden.stat().st_size} bytes, {len(shapes)} tensors")
    print(f"in full {len(in_full)} tensors, {size / 1e6:.0f} MB in float32")
    roots: dict[str, int] = {}
    for name in in_full:
        root = name.split(".")[0]
        roots[root] = roots.get(root, 0) + 1
    print(roots)


if __name__ == "__main__":
    main()
