"""Whole models of VFMNet, the simple head of MGRNet (tpy001/VFMSeg), to a workdir: DINOv2-L with
LoRA, and a decoder of transposed convolutions.

The authors' training saves the whole model, by peft's names within the encoder, whose patches and
positions are those of the run. LoRA is folded into the kernels.
"""

import math
import re

import numpy as np

from jaxdg import backbones
from jaxdg import config as config_lib
from jaxdg.config import Config
from jaxdg.conversion import dinov2, vltseg
from jaxdg.conversion.checkpoint import Checkpoint
from jaxdg.conversion.mapping import Layout, Misfit, Row, Transform
from jaxdg.conversion.mask2former import CONV1, CONV1_UNBIASED, NORM

NAME = "vfmnet"
LISTED = (
    "1252 MB",
    "no licence",
    (
        "iter_*.pth that dg_lora_dinov2_linearhead.py of tpy001/VFMSeg trains; whole models, --out"
        " is a workdir"
    ),
)
ENCODER = "dinov2_l14"
PATCH = 16
# Before the names of the encoder: LoRA is put around it in the segmentor, or in the encoder.
STARTS = ("backbone.base_model.model.", "backbone.model.base_model.model.")
WIDTH = "decode_head.fusion_conv.gn.weight"
QKV = "blocks.*.attn.qkv"
HEAD = (
    ("fusion_conv", "fusion_conv.conv", CONV1_UNBIASED),
    ("fusion_norm", "fusion_conv.gn", NORM),
    ("upscaling1", "output_upscaling.0", vltseg.DOUBLE),
    ("upscaling1_norm", "output_upscaling.1", (*NORM, *vltseg.STATISTICS)),
    ("upscaling2", "output_upscaling.3", vltseg.DOUBLE),
    ("classifier", "conv_seg", CONV1),
)


def layout(start: str, rank: int) -> Layout:
    """How the authors' training names the tensors.

    Args:
        start: one of `STARTS`.
        rank: of LoRA.
    """
    config = backbones.entry(ENCODER).config
    assert isinstance(config, backbones.Dinov2Config)
    authors, *_ = dinov2.layouts(config)
    rows = []
    for row in authors.rows:
        (source,) = row.source
        sources = (source.replace("attn.qkv.", "attn.qkv.base_layer."),)
        transform = row.transform
        if row.target == f"{QKV}.kernel":
            sources += tuple(f"{QKV}.lora_{ab}.default.weight" for ab in "AB")
            transform = folded(rank)
        sources = tuple(start + source for source in sources)
        rows.append(Row(sources, f"backbone.{row.target}", transform))
    rows += vltseg.rows_of("head", "decode_head", HEAD)
    left_out = tuple((re.escape(start) + pattern, why) for pattern, why in authors.left_out)
    count = (r"decode_head\.output_upscaling\.1\.num_batches_tracked", vltseg.COUNT)
    return Layout("VFMSeg", tuple(rows), (*left_out, count))


def folded(rank: int) -> Transform:
    """A kernel W [out, in], A [r, in] and B [out, r] to that of W + B A; alpha is the rank."""
    return Transform(
        lambda w, a, b: (w + b @ a).T,
        lambda k: (k.T, np.zeros((rank, k.shape[0])), np.zeros((k.shape[1], rank))),
    )


def layouts() -> tuple[Layout, ...]:
    """LoRA around the encoder, and in it."""
    return tuple(layout(start, 1) for start in STARTS)


def of_run(config: Config, file: Checkpoint) -> Layout:
    """The layout of a file."""
    start = next((start for start in STARTS if f"{start}cls_token" in file.names), STARTS[0])
    return layout(start, config.low_rank.rank)


def of_checkpoint(file: Checkpoint, source: str = "gta5") -> Config:
    """The run that made a file; sizes are those of its tensors.

    Args:
        file: of one of `layouts`.
        source: what was trained on, of those in the recipe.

    Raises:
        Misfit: a tensor missing that tells a size, or positions of no square.
        ValueError: a source that the recipe does not have, or sizes that no configuration has.
    """
    c = run(file, NAME, source)
    c.model.upscaling.width = vltseg.shape_of(file, WIDTH, 1)[0]
    return config_lib.validated(c)


def run(file: Checkpoint, method: str, source: str) -> Config:
    """The run of the recipe for `vfmnet` or `mgrnet`, whose crop is what the encoder sees; see
    `of_checkpoint`.
    """
    c = vltseg.recipe("gta5_methods", f"{method},{ENCODER},{source}")
    start = of_run(c, file).rows[0].source[0].removesuffix("cls_token")
    positions = vltseg.shape_of(file, f"{start}pos_embed", 3)[1]
    grid = math.isqrt(positions - 1)
    if grid < 1 or positions != 1 + grid * grid:
        raise Misfit(f"{start}pos_embed has {positions} rows, not one for each patch of a square")
    c.data.crop = (grid * PATCH, grid * PATCH)
    c.evaluation.stride = (grid * PATCH * 5 // 8, grid * PATCH * 5 // 8)
    c.model.weights = None
    c.low_rank.rank = vltseg.shape_of(file, f"{start}blocks.0.attn.qkv.lora_A.default.weight", 2)[0]
    return c


def described(config: Config) -> str:
    """The run in words."""
    crop, _ = config.data.crop
    m = config.model
    return (
        f"{m.encoder}, LoRA of rank {config.low_rank.rank} folded, a decoder of"
        f" {m.upscaling.width} channels; windows of {crop} pixels; no tensor tells what it was"
        f" trained on: {config.data.source}, says its config.json"
    )
