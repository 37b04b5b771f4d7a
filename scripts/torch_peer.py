"""The models of scripts/benchmark.py in PyTorch: timm's encoder, a pyramid and transformers'
Mask2Former, trained and run as ours are.

    python scripts/torch_peer.py SPEC     # as `benchmark.py --peer torch` starts it

SPEC is JSON: what to run and the sizes of the model. The first answer says what was built; then a
line with a number of steps is answered with the seconds that so many took and the most memory so
far, each a line of JSON. A process of its own, so that neither library's threads and memory are
counted as the other's, and nothing runs here while the other is timed.

The same architecture, weight for weight, with scaled dot-product attention, autocast for bfloat16,
the fused AdamW and `torch.compile` (of the model; the loss matches on the host, by SciPy). To its
advantage it gets normalised images and masks that are laid out already, where ours distorts and
normalises images and reads masks from label maps inside the step.
"""

import json
from pathlib import Path
import resource
import sys
import time
from typing import Any

import torch  # pyright: ignore[reportMissingImports]
from torch import nn  # pyright: ignore[reportMissingImports]
from torch.nn import functional as F  # pyright: ignore[reportMissingImports]

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from tests.oracles import stand_ins  # noqa: F401  before what follows

# isort: split

import timm  # pyright: ignore[reportMissingImports]
from timm.models.eva import Eva  # pyright: ignore[reportMissingImports]
from timm.models.vision_transformer import (  # pyright: ignore[reportMissingImports]
    VisionTransformer,
)
import transformers  # pyright: ignore[reportMissingImports]
from transformers.models.mask2former import (  # pyright: ignore[reportMissingImports]
    modeling_mask2former as mask2former,
)

Spec = dict[str, Any]
STAGES: Spec = {
    "out_features": ["stage1", "stage2", "stage3", "stage4"]
}  # of a backbone that the decoder's configuration asks for


def make_encoder(spec: Spec) -> Any:
    """EVA-02 or plain ViT of timm and the sizes asked for, without what follows the last block."""
    family: Spec = dict(
        patch_size=spec["patch_size"],
        embed_dim=spec["width"],
        depth=spec["depth"],
        num_heads=spec["heads"],
    )
    family |= dict(
        img_size=spec["crop"], num_classes=0, global_pool="", drop_path_rate=spec["drop_path"]
    )
    if spec["family"] == "Eva02Config":
        subln: Spec = dict(
            qkv_fused=not spec["subln"],
            scale_mlp=spec["subln"],
            scale_attn_inner=spec["inner_attn_ln"],
        )
        encoder = Eva(
            **family,
            **subln,
            mlp_ratio=4 * 2 / 3,
            swiglu_mlp=True,
            use_rot_pos_emb=True,
            ref_feat_shape=(16, 16),
        )
    else:
        encoder = VisionTransformer(**family)
    encoder.norm = nn.Identity()
    return encoder


class ChannelNorm(nn.LayerNorm):
    """LayerNorm over the channels of [b, c, h, w]."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return super().forward(input.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class Segmenter(nn.Module):
    """Encoder, pyramid and Mask2Former; class and mask logits of every prediction."""

    encoder: Any
    criterion: Any

    def __init__(self, spec: Spec):
        super().__init__()
        c = spec["width"]
        o = spec["mask2former"]
        if o["sampling_points"] != 4:
            raise ValueError(
                "transformers' Mask2Former reads 4 points, model.mask2former.sampling_points is"
                f" {o['sampling_points']}"
            )
        sizes: Spec = dict(
            backbone_config=transformers.SwinConfig(**STAGES),
            feature_size=o["hidden"],
            mask_feature_size=o["hidden"],
            hidden_dim=o["hidden"],
            encoder_feedforward_dim=o["pixel_ffn"],
            encoder_layers=o["pixel_layers"],
            decoder_layers=o["layers"] + 1,
            dim_feedforward=o["ffn"],
            num_queries=o["queries"],
            num_attention_heads=o["heads"],
            num_labels=spec["classes"],
            train_num_points=o["points"],
            dropout=0.0,
        )
        config = transformers.Mask2FormerConfig(**sizes)
        self.taps = spec["taps"]
        self.encoder = make_encoder(spec)
        norm = nn.BatchNorm2d(c) if spec["pyramid"] == "batch" else ChannelNorm(c)
        self.up4 = nn.Sequential(
            nn.ConvTranspose2d(c, c, 2, 2), norm, nn.GELU(), nn.ConvTranspose2d(c, c, 2, 2)
        )
        self.up2 = nn.ConvTranspose2d(c, c, 2, 2)
        self.pixel_decoder = mask2former.Mask2FormerPixelDecoder(config, feature_channels=[c] * 4)
        self.decoder = mask2former.Mask2FormerTransformerModule(
            in_features=o["hidden"], config=config
        )
        self.classes = nn.Linear(o["hidden"], spec["classes"] + 1)
        self.criterion = mask2former.Mask2FormerLoss(
            config, {"loss_cross_entropy": 2.0, "loss_mask": 5.0, "loss_dice": 5.0}
        )

    def forward(self, images: torch.Tensor) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        x1, x2, x3, x4 = self.encoder.forward_intermediates(
            images, indices=self.taps, intermediates_only=True
        )
        pixels = self.pixel_decoder([self.up4(x1), self.up2(x2), x3, F.max_pool2d(x4, 2)])
        found = self.decoder(
            multi_scale_features=list(pixels.multi_scale_features),
            mask_features=pixels.mask_features,
        )
        classes = [
            self.classes(h.transpose(0, 1)).float() for h in found.intermediate_hidden_states
        ]
        return classes, [m.float() for m in found.masks_queries_logits]

    def loss(
        self, classes: list[torch.Tensor], masks: list[torch.Tensor], targets: tuple[list, list]
    ) -> torch.Tensor:
        """The weighted sum of all terms; targets are, for each image, the masks of its classes and
        these classes.
        """
        others = [
            {"class_queries_logits": c, "masks_queries_logits": m}
            for c, m in zip(classes[:-1], masks[:-1], strict=True)
        ]
        terms = self.criterion(masks[-1], classes[-1], *targets, others)
        weights = self.criterion.weight_dict
        return sum(  # pyright: ignore
            value * next(w for key, w in weights.items() if key in name)
            for name, value in terms.items()
        )


def make_run(spec: Spec, device: torch.device) -> tuple[Any, Any]:
    """The model, and a function that runs it once."""
    whole = spec["part"] == "whole"
    model: Any = (Segmenter(spec) if whole else make_encoder(spec)).to(device)

    def encode(images):
        return model.forward_intermediates(images, indices=spec["taps"], intermediates_only=True)

    forward = model if whole else encode
    forward = torch.compile(forward) if spec["compile"] else forward
    cast = torch.autocast(device.type, torch.bfloat16, enabled=spec["dtype"] == "bfloat16")
    b = spec["batch_size"]
    h, w = spec["crop"]
    height, width = spec["image"]

    def normal(*shape):
        return torch.randn(shape, device=device)

    if spec["mode"] == "inference":
        model.eval()
        images = normal(b, 3, height, width)
        starts = spec["starts"]
        per_call = max(spec["windows_per_call"] // b, 1)

        @torch.inference_mode()
        def predict() -> torch.Tensor:
            if not whole:
                with cast:
                    return encode_windows(images)
            total = images.new_zeros(b, spec["classes"], height, width)
            seen = images.new_zeros(height, width)
            for i in range(0, len(starts), per_call):
                chunk = starts[i : i + per_call]
                with cast:
                    classes, masks = forward(
                        torch.cat([images[:, :, y : y + h, x : x + w] for y, x in chunk])
                    )
                masks = F.interpolate(
                    masks[-1], (h, w), mode="bilinear", align_corners=False
                ).sigmoid()
                scores = torch.einsum("bqc,bqhw->bchw", classes[-1].softmax(-1)[..., :-1], masks)
                for part, (y, x) in zip(scores.split(b), chunk, strict=True):
                    total[:, :, y : y + h, x : x + w] += part
                    seen[y : y + h, x : x + w] += 1
            return (total / seen).argmax(1).to(torch.uint8)

        def encode_windows(images):
            return forward(torch.cat([images[:, :, y : y + h, x : x + w] for y, x in starts]))

        return model, predict

    model.train()
    images = normal(b, 3, h, w)
    if not whole:
        towards = [
            normal(b, spec["width"], h // spec["patch_size"], w // spec["patch_size"])
            for _ in spec["taps"]
        ]

        def both() -> None:
            model.zero_grad()
            with cast:
                features = forward(images)
            sum((f.float() * t).sum() for f, t in zip(features, towards, strict=True)).backward()  # pyright: ignore

        return model, both

    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, weight_decay=0.05, fused=True)
    blocks = torch.randint(0, spec["classes"], (b, 1, 8, 8)).float()
    labels = F.interpolate(blocks, (h, w))[:, 0].long()
    present = [label.unique() for label in labels]
    truth = [
        (label == classes[:, None, None]).float().to(device)
        for label, classes in zip(labels, present, strict=True)
    ]
    targets = truth, [classes.to(device) for classes in present]

    def train() -> None:
        optimizer.zero_grad()
        with cast:
            classes, masks = forward(images)
        model.loss(classes, masks, targets).backward()
        nn.utils.clip_grad_norm_(model.parameters(), spec["clip"])
        optimizer.step()

    return model, train


def main() -> None:
    """Answers until the input ends."""
    spec = json.loads(sys.argv[1])
    torch.manual_seed(0)
    torch.set_float32_matmul_precision("high")  # on GPUs, as JAX does
    cuda = torch.cuda.is_available()
    model, run = make_run(spec, torch.device("cuda" if cuda else "cpu"))

    def say(**found):
        return print(json.dumps(found), flush=True)

    versions = {module.__name__: module.__version__ for module in (torch, timm, transformers)}
    say(
        parameters=sum(p.numel() for p in model.parameters()),
        compiled=spec["compile"],
        versions=versions,
    )
    for line in sys.stdin:
        if cuda:
            run()  # memory given back after the last round is taken again before the clock starts
            torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(int(line)):
            run()
        if cuda:
            torch.cuda.synchronize()
        seconds = time.perf_counter() - start
        if cuda:
            torch.cuda.empty_cache()
        peak = (
            torch.cuda.max_memory_allocated()
            if cuda
            else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        )
        say(seconds=seconds, peak_bytes=peak)


if __name__ == "__main__":
    main()
