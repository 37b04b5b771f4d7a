"""Makes tests/golden/half_precision.npz: gradients in bfloat16 by PyTorch's autocast on CPU.

Run by hand where torch and transformers are installed:

    python tests/oracles/golden_half_precision.py

The model is a plain ViT (torch's own layers), the pyramid (transposed convolutions, LayerNorm) and
transformers' Mask2Former with its loss. Autocast covers the forward pass and the loss, as its users
run it. Weights and inputs are drawn by tests/segmentation/half_precision.py, four times.

- exact: a share of every gradient in float32 for each draw, by jaxdg's names and axes.
- far: how far those under autocast are from them, for each of the `names` of parameters.
"""

import dataclasses
from pathlib import Path
import sys
from typing import Any
from unittest import mock

import numpy as np
import torch  # pyright: ignore[reportMissingImports]
from torch import nn  # pyright: ignore[reportMissingImports]
from torch.nn import functional  # pyright: ignore[reportMissingImports]

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from tests.oracles import stand_ins  # noqa: F401  before what follows

# isort: split

from flax import nnx
from transformers import Mask2FormerConfig, SwinConfig  # pyright: ignore[reportMissingImports]
from transformers.models.mask2former import (  # pyright: ignore[reportMissingImports]
    modeling_mask2former as reference,
)

from jaxdg.conversion import mapping
from tests.segmentation import half_precision as given

OUT = Path(__file__).resolve().parents[2] / "tests" / "golden" / "half_precision.npz"


class Attention(nn.Module):
    """Self-attention with one projection."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[b, n, c] to the same."""
        b, n, c = x.shape
        q, k, v = self.qkv(x).view(b, n, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        y = functional.scaled_dot_product_attention(q, k, v)
        return self.proj(y.transpose(1, 2).reshape(b, n, c))


class Mlp(nn.Module):
    """Two layers with GELU between."""

    def __init__(self, width: int):
        super().__init__()
        self.fc1 = nn.Linear(width, 4 * width)
        self.fc2 = nn.Linear(4 * width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[b, n, c] to the same."""
        return self.fc2(functional.gelu(self.fc1(x)))


class Block(nn.Module):
    """Attention and MLP."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.norm1 = nn.LayerNorm(width, 1e-6)
        self.attn = Attention(width, heads)
        self.norm2 = nn.LayerNorm(width, 1e-6)
        self.mlp = Mlp(width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[b, n, c] to the same."""
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class ChannelNorm(nn.LayerNorm):
    """LayerNorm over the channels of maps [b, c, h, w]."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:  # pyright: ignore
        """The same shape."""
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class Backbone(nn.Module):
    """Encoder and pyramid: images to four levels."""

    def __init__(self, case: given.Case):
        super().__init__()
        c = case.encoder
        self.case = case
        self.cls_token = nn.Parameter(torch.zeros(1, 1, c.width))
        self.pos_embed = nn.Parameter(torch.zeros(1, 1 + c.grid[0] * c.grid[1], c.width))
        self.patch_embed = nn.Module()
        self.patch_embed.proj = nn.Conv2d(3, c.width, c.patch_size, c.patch_size)
        self.blocks = nn.ModuleList(Block(c.width, c.heads) for _ in range(c.depth))

        def double():
            return nn.ConvTranspose2d(c.width, c.width, 2, 2)

        self.fpn1 = nn.Sequential(double(), ChannelNorm(c.width, 1e-6), nn.GELU(), double())
        self.fpn2 = nn.Sequential(double())

    def forward(self, images: torch.Tensor) -> list[torch.Tensor]:
        """Levels, finest first."""
        c = self.case.encoder
        x = self.patch_embed.proj(images).flatten(2).transpose(1, 2)  # pyright: ignore
        x = torch.cat([self.cls_token.expand(len(x), -1, -1), x], dim=1) + self.pos_embed
        taps = []
        for i, block in enumerate(self.blocks):
            x = block(x)
            if i in c.taps:
                taps.append(x[:, 1:].transpose(1, 2).reshape(len(x), -1, *c.grid))
        fine, coarse = taps
        return [self.fpn1(fine), self.fpn2(fine), coarse, functional.max_pool2d(coarse, 2)]


class Model(nn.Module):
    """The whole model, under transformers' names but for the backbone."""

    model: Any
    class_predictor: Any

    def __init__(self, case: given.Case):
        super().__init__()
        h = case.head
        sizes: dict[str, Any] = dict(
            feature_size=h.hidden,
            mask_feature_size=h.hidden,
            hidden_dim=h.hidden,
            num_attention_heads=h.heads,
            dropout=0.0,
            encoder_layers=h.pixel_layers,
            encoder_feedforward_dim=h.pixel_ffn,
            decoder_layers=h.layers + 1,
            dim_feedforward=h.ffn,
            num_queries=h.queries,
            num_labels=h.num_classes,
            train_num_points=h.points,
        )
        # The config only names the backbone; it is not built.
        named: dict[str, Any] = dict(out_features=["stage1", "stage2", "stage3", "stage4"])
        config = Mask2FormerConfig(backbone_config=SwinConfig(**named), **sizes)
        self.case = case
        self.backbone = Backbone(case)
        self.model = nn.Module()
        self.model.pixel_level_module = nn.Module()
        self.model.pixel_level_module.decoder = reference.Mask2FormerPixelDecoder(
            config, feature_channels=[case.encoder.width] * 4
        )
        self.model.transformer_module = reference.Mask2FormerTransformerModule(
            in_features=h.hidden, config=config
        )
        self.class_predictor = nn.Linear(h.hidden, h.num_classes + 1)
        self.criterion = (reference.Mask2FormerLoss(config, {}),)  # a tuple: no tensors of its own

    def loss(self, images: torch.Tensor, label: np.ndarray) -> torch.Tensor:
        """The weighted sum of all terms, with the given masks, matches and points."""
        pixels = self.model.pixel_level_module.decoder(self.backbone(images))
        decoder = self.model.transformer_module.decoder
        heads = self.case.head.heads
        closed = [torch.from_numpy(~x).repeat_interleave(heads, 0) for x in self.case.looked()]
        calls = iter([*closed, None])
        predict = type(decoder.mask_predictor).forward

        def masks(predictor, *args):
            return predict(predictor, *args)[0], next(calls)

        with mock.patch.object(type(decoder.mask_predictor), "forward", masks):
            decoded = self.model.transformer_module(
                list(pixels.multi_scale_features), pixels.mask_features, output_hidden_states=True
            )
        classes = [
            self.class_predictor(x.transpose(0, 1)) for x in decoded.intermediate_hidden_states
        ]
        present = [
            torch.from_numpy(np.unique(x[x != given.IGNORE]).astype(np.int64)) for x in label
        ]
        targets = [
            torch.from_numpy(np.stack([x == int(k) for k in ids]).astype(np.float32))
            for x, ids in zip(label, present, strict=True)
        ]
        query = self.case.query()
        order = iter([len(query) - 1, *range(len(query) - 1)])

        def match(*_):
            chosen = query[next(order)]
            return [
                (torch.from_numpy(row[ids.numpy()].astype(np.int64)), torch.arange(len(ids)))
                for row, ids in zip(chosen, present, strict=True)
            ]

        def points(logits, *_):
            return torch.from_numpy(self.case.points()).expand(len(logits), -1, -1)

        criterion: Any = self.criterion[0]
        criterion.matcher.forward = match
        criterion.sample_points_using_uncertainty = points
        *others, last = (
            {"class_queries_logits": x, "masks_queries_logits": y}
            for x, y in zip(classes, decoded.masks_queries_logits, strict=True)
        )
        terms = criterion(
            **last, mask_labels=targets, class_labels=present, auxiliary_predictions=others
        )
        weighted = [
            (2.0 if name.startswith("loss_cross_entropy") else 5.0) * term
            for name, term in terms.items()
        ]
        return torch.stack(weighted).sum()


def gradients(case: given.Case, autocast: bool) -> dict[str, np.ndarray]:
    """By jaxdg's names."""
    model = Model(case).train()
    state = {
        name: torch.from_numpy(given.weight(name, tuple(tensor.shape), case.draw))
        for name, tensor in model.state_dict().items()
    }
    model.load_state_dict(state, strict=True)
    images = torch.from_numpy(case.images()).permute(0, 3, 1, 2)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        total = model.loss(images, case.labels())
    total.backward()
    found = {
        name: x.grad.float().numpy() for name, x in model.named_parameters() if x.grad is not None
    }
    ours = nnx.eval_shape(lambda: given.Whole(case, "float32", nnx.Rngs(0)))
    converted = mapping.to_flax(ours, (given.layout(),), list(found), found.__getitem__)
    return dict(converted.tensors)


def main() -> None:
    """Writes the file and prints the distances by part."""
    torch.set_num_threads(2)
    cases = [dataclasses.replace(given.SMALL, draw=draw) for draw in range(given.DRAWS)]
    single = [gradients(case, autocast=False) for case in cases]
    half = [gradients(case, autocast=True) for case in cases]
    shapes = {name: x.shape for name, x in single[0].items()}
    exact, rounded = (np.stack([given.share(x) for x in found]) for found in (single, half))
    far = given.distances(rounded, exact, shapes)
    for part in given.PARTS:
        inside = [x for name, x in far.items() if given.part(name) == part]
        print(f"{part}: median {np.median(inside):.2%}, largest {max(inside):.2%}")
    np.savez_compressed(
        OUT, exact=exact, names=list(far), far=np.asarray(list(far.values()), np.float32)
    )
    print(OUT.stat().st_size, "bytes")


if __name__ == "__main__":
    main()
