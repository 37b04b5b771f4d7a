"""Makes tests/golden/mask2former_*.npz: outputs of transformers' Mask2Former.

Run by hand where torch and transformers are installed (last with torch 2.13 and transformers 5.23):

    python tests/oracles/golden_mask2former.py

Everything is computed in float64 and stored in float32.

- mask2former_attention.npz: the core of deformable attention with points inside and outside the
  maps, and its gradients.
- mask2former_pixels.npz: mask features and levels of the pixel decoder, for maps that halve exactly
  and for maps that do not.
- mask2former_queries.npz: for the same maps the class and mask logits before and after every layer,
  the attention mask of each layer, and the queries whose attention mask was lifted because their
  predicted mask was empty. For the first maps also the gradients of a weighted sum of all logits
  with respect to features and to a few parameters (torch's names and axes), and the names and
  shapes of all tensors of the head.

Weights and inputs are not stored: `normal` and `weight` draw each from its name, here and in the
tests.
"""

from pathlib import Path
import sys
from typing import Any
import zlib

import numpy as np
import torch  # pyright: ignore[reportMissingImports]
from torch import nn  # pyright: ignore[reportMissingImports]

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from tests.oracles import stand_ins  # noqa: F401  before what follows

# isort: split

from transformers import Mask2FormerConfig, SwinConfig  # pyright: ignore[reportMissingImports]
from transformers.models.mask2former import (  # pyright: ignore[reportMissingImports]
    modeling_mask2former as reference,
)

GOLDEN = Path(__file__).resolve().parents[2] / "tests" / "golden"
CHANNELS = (8, 12, 16, 24)
HIDDEN = 64
HEADS = 8
QUERIES = 12
CLASSES = 5
LAYERS = 4
MAPS = {
    "even": ((16, 24), (8, 12), (4, 6), (2, 3)),
    "odd": ((18, 26), (9, 13), (5, 7), (3, 4)),
}  # finest first
LEVELS = ((5, 7), (3, 4), (2, 2))  # of the core of deformable attention
# Small tensors of every part, with respect to which gradients are stored.
OBSERVED = (
    "model.pixel_level_module.decoder.level_embed",
    "model.pixel_level_module.decoder.input_projections.1.1.weight",
    "model.pixel_level_module.decoder.encoder.layers.0.self_attn.sampling_offsets.bias",
    "model.pixel_level_module.decoder.encoder.layers.1.self_attn.attention_weights.bias",
    "model.pixel_level_module.decoder.encoder.layers.0.fc1.bias",
    "model.pixel_level_module.decoder.adapter_1.0.weight",
    "model.pixel_level_module.decoder.mask_projection.bias",
    "model.transformer_module.level_embed.weight",
    "model.transformer_module.queries_features.weight",
    "model.transformer_module.queries_embedder.weight",
    "model.transformer_module.decoder.layers.1.cross_attn.in_proj_bias",
    "model.transformer_module.decoder.layers.2.self_attn.v_proj.bias",
    "model.transformer_module.decoder.layernorm.weight",
    "model.transformer_module.decoder.mask_predictor.mask_embedder.1.0.bias",
    "class_predictor.weight",
)


def normal(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """Float32 standard normal numbers that belong to a name."""
    return np.random.default_rng(zlib.crc32(name.encode())).standard_normal(shape, np.float32)


def weight(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """The parameter of a name in transformers: attention is far from uniform, points are several
    pixels away, some masks are empty.
    """
    numbers = normal(name, shape)
    if "level_embed" in name or "queries_" in name:
        return numbers
    if len(shape) == 1:
        numbers = 0.3 * numbers + name.endswith(".weight")  # of a norm
    else:  # centred, or all masks would be much alike
        fan = tuple(range(1, len(shape)))
        numbers = (numbers - numbers.mean(fan, keepdims=True)) * 1.5 / np.sqrt(np.prod(shape[1:]))
    more = {"sampling_offsets": 2, "mask_projection.bias": 2, "mask_embedder.2": 0.1}
    return np.float32(
        next((factor for part, factor in more.items() if part in name), 1)
    ) * numbers.astype(np.float32)


class Head(nn.Module):
    """The modules of `Mask2FormerForUniversalSegmentation` without its backbone, under their names
    there.
    """

    model: Any
    class_predictor: Any

    def __init__(self):
        super().__init__()
        sizes: dict[str, Any] = dict(
            feature_size=HIDDEN,
            mask_feature_size=HIDDEN,
            hidden_dim=HIDDEN,
            num_attention_heads=HEADS,
            dropout=0.0,
            encoder_layers=2,
            encoder_feedforward_dim=96,
            decoder_layers=LAYERS + 1,
            dim_feedforward=80,
            num_queries=QUERIES,
            num_labels=CLASSES,
        )
        # The config only names the backbone; it is not built.
        backbone: dict[str, Any] = dict(out_features=["stage1", "stage2", "stage3", "stage4"])
        config = Mask2FormerConfig(backbone_config=SwinConfig(**backbone), **sizes)
        self.model = nn.Module()
        self.model.pixel_level_module = nn.Module()
        self.model.pixel_level_module.decoder = reference.Mask2FormerPixelDecoder(
            config, feature_channels=CHANNELS
        )
        self.model.transformer_module = reference.Mask2FormerTransformerModule(
            in_features=HIDDEN, config=config
        )
        self.class_predictor = nn.Linear(HIDDEN, CLASSES + 1)

    def forward(self, features: list[torch.Tensor]) -> tuple[Any, torch.Tensor, torch.Tensor]:
        """The pixel decoder's output, class logits [l, b, q, k + 1] and mask logits [l, b, q, h,
        w].
        """
        pixels = self.model.pixel_level_module.decoder(features)
        decoded = self.model.transformer_module(
            list(pixels.multi_scale_features), pixels.mask_features, output_hidden_states=True
        )
        classes = torch.stack(
            [self.class_predictor(x.transpose(0, 1)) for x in decoded.intermediate_hidden_states]
        )
        return pixels, classes, torch.stack(list(decoded.masks_queries_logits))


def attention() -> dict[str, np.ndarray]:
    """Output and gradients of the core, for a weighted sum of the output."""
    b = 2
    m = 11
    heads = 4
    points = 3
    d = 6
    shape = (b, m, heads, len(LEVELS), points)
    values = normal("values", (b, sum(h * w for h, w in LEVELS), heads, d))
    locations = 0.5 + 0.5 * normal("locations", (*shape, 2))
    inputs = [
        torch.from_numpy(x).double().requires_grad_()
        for x in (values, locations, normal("weights", shape))
    ]
    output = reference.multi_scale_deformable_attention(
        inputs[0], list(LEVELS), inputs[1], inputs[2]
    )
    (output * torch.from_numpy(normal("towards", tuple(output.shape)))).sum().backward()
    gradients = {
        f"to_{name}": x.grad
        for name, x in zip(("values", "locations", "weights"), inputs, strict=True)
    }
    return {name: x.detach().float().numpy() for name, x in {"output": output, **gradients}.items()}  # pyright: ignore


def main() -> None:
    """Writes the three files."""
    head = Head().eval()
    state = {
        name: torch.from_numpy(weight(name, tuple(tensor.shape)))
        for name, tensor in head.state_dict().items()
    }
    head.load_state_dict(state, strict=True)
    head.double()
    pixels: dict[str, np.ndarray] = {}
    queries: dict[str, np.ndarray] = {
        f"shape/{name}": np.asarray(tensor.shape) for name, tensor in state.items()
    }
    closed: list[torch.Tensor] = []  # where a query may not look, [b * heads, q, n], for each layer
    own: list[
        torch.Tensor
    ] = []  # the same before empty masks are opened, once more after the last layer
    decoder = head.model.transformer_module.decoder
    for layer in decoder.layers:
        layer.register_forward_pre_hook(
            lambda _, __, kwargs: closed.append(kwargs["encoder_attention_mask"]), with_kwargs=True
        )
    decoder.mask_predictor.register_forward_hook(lambda _, __, output: own.append(output[1]))
    for case, sizes in MAPS.items():
        closed.clear()
        own.clear()
        arrays = [
            normal(f"{case} {i}", (1, c, *size))
            for i, (c, size) in enumerate(zip(CHANNELS, sizes, strict=True))
        ]
        features = [torch.from_numpy(x).double().requires_grad_() for x in arrays]
        decoded, classes, masks = head(features)

        def to_numpy(x):
            return x.detach().float().numpy()

        pixels[f"{case}/mask_features"] = to_numpy(decoded.mask_features.permute(0, 2, 3, 1))
        for i, level in enumerate(decoded.multi_scale_features):
            pixels[f"{case}/level{i}"] = to_numpy(level.permute(0, 2, 3, 1))
        queries |= {f"{case}/classes": to_numpy(classes), f"{case}/masks": to_numpy(masks)}
        for i in range(LAYERS):
            assert all(torch.equal(closed[i][0], other) for other in closed[i]), (
                "all heads share a mask"
            )
            queries[f"{case}/looked{i}"] = ~closed[i][:1].numpy()
            queries[f"{case}/empty{i}"] = own[i][:1].all(-1).numpy()
            size = decoded.multi_scale_features[i % 3].shape[-2:]
            near = (
                nn.functional.interpolate(masks[i], size, mode="bilinear", align_corners=False)
                .abs()
                .min()
            )
            print(
                case,
                i,
                f"open {1 - closed[i].double().mean():.2f}, empty {int(own[i][0].all(-1).sum())},"
                f" nearest to 0 {near:.1e}",
            )
        print(case, "std of logits", [f"{x.std():.2f}" for x in (*classes, *masks)])
        if case == "even":
            towards = [
                torch.from_numpy(normal(name, tuple(x.shape)))
                for name, x in (("classes", classes), ("masks", masks))
            ]
            ((classes * towards[0]).sum() + (masks * towards[1]).sum()).backward()
            queries |= {
                f"to_feature{i}": to_numpy(x.grad.permute(0, 2, 3, 1))
                for i, x in enumerate(features)
                if x.grad is not None
            }
            queries |= {
                f"to/{name}": to_numpy(dict(head.named_parameters())[name].grad)
                for name in OBSERVED
            }
    for name, arrays in {"attention": attention(), "pixels": pixels, "queries": queries}.items():
        path = GOLDEN / f"mask2former_{name}.npz"
        np.savez_compressed(path, **arrays)  # pyright: ignore[reportArgumentType]
        print(f"{path.name}: {path.stat().st_size} bytes")


if __name__ == "__main__":
    main()
