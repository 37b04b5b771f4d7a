"""Whole models of MGRNet (tpy001/VFMSeg) to a workdir: VFMNet, which gives the coarse scores, and
the refinement of windows.

A file holds all tensors of a VFMNet by the same names, and those of the refinement beside them
(`aux_decoder`).
"""

import re

from jaxdg import config as config_lib
from jaxdg.config import Config
from jaxdg.conversion import vfmnet, vltseg
from jaxdg.conversion.checkpoint import Checkpoint
from jaxdg.conversion.mapping import CONV, Layout, Row, Transform
from jaxdg.conversion.mask2former import BIAS, CONV1, DENSE, NORM

NAME = "mgrnet"
LISTED = (
    "1283 MB",
    "no licence",
    (
        "iter_*.pth that dg_lora_dinov2_ms_masked.py of tpy001/VFMSeg trains; whole models, --out"
        " is a workdir"
    ),
)
TOKEN = Transform(lambda a: a[0, :, 0, 0], lambda a: (a[None, :, None, None],))  # [1, c, 1, 1]
HALVE = ((".weight", ".kernel", CONV), BIAS)
BLOCK = "transformer_decoder.transformer_blocks.*"
BLOCKS = r"aux_decoder\.transformer_decoder\.transformer_blocks\.(\d+)\."
REFINEMENT = (
    ("fuse", "fuse_conv.0", CONV1),
    ("fuse_norm", "fuse_conv.1", NORM),
    ("embed1", "seg_logits_embed.0", HALVE),
    ("embed1_norm", "seg_logits_embed.1", NORM),
    ("embed2", "seg_logits_embed.3", HALVE),
    ("embed2_norm", "seg_logits_embed.4", NORM),
    ("embed3", "seg_logits_embed.6", CONV1),
    ("embed3_norm", "seg_logits_embed.7", NORM),
    ("mask_token", "transformer_decoder.mask_token", (("", "", TOKEN),)),
    ("norm", "transformer_decoder.norm", NORM),
    *((f"blocks.*.norm{i}", f"{BLOCK}.norm{i}", NORM) for i in (1, 2, 3)),
    *(
        (f"blocks.*.attn{i}.to_{part}", f"{BLOCK}.attn{i}.to_{part}", DENSE[:1])
        for i in (1, 2)
        for part in "qkv"
    ),
    *((f"blocks.*.attn{i}.to_out", f"{BLOCK}.attn{i}.to_out.0", DENSE) for i in (1, 2)),
    ("blocks.*.fc1", f"{BLOCK}.ff.net.0.proj", DENSE),
    ("blocks.*.fc2", f"{BLOCK}.ff.net.2", DENSE),
    ("classifier", "conv_seg", CONV1),
)


def with_refinement(plain: Layout) -> Layout:
    """The layout of a VFMNet with the refinement beside it."""
    rows = [
        row._replace(target=re.sub(r"^head\.", "head.coarse.", row.target)) for row in plain.rows
    ]
    rows += vltseg.rows_of("head.refinement", "aux_decoder", REFINEMENT)
    return Layout("VFMSeg, MGRNet", tuple[Row, ...](rows), plain.left_out)


def layouts() -> tuple[Layout, ...]:
    """LoRA around the encoder, and in it."""
    return tuple(map(with_refinement, vfmnet.layouts()))


def of_run(config: Config, file: Checkpoint) -> Layout:
    """The layout of a file."""
    return with_refinement(vfmnet.of_run(config, file))


def of_checkpoint(file: Checkpoint, source: str = "gta5") -> Config:
    """The run that made a file; see `vfmnet.of_checkpoint`."""
    c = vfmnet.run(file, NAME, source)
    h, w = c.data.crop
    c.data.crop = (2 * h, 2 * w)  # the encoder sees squares of half its sides
    o = c.model.mgrnet
    o.width = vltseg.shape_of(file, vfmnet.WIDTH, 1)[0]
    o.hidden = vltseg.shape_of(file, "aux_decoder.conv_seg.weight", 4)[1]
    blocks = {match[1] for name in file.names if (match := re.match(BLOCKS, name))}
    o.layers = len(blocks) or o.layers
    queries = f"aux_decoder.{BLOCK.replace('*', '0')}.attn1.to_q.weight"
    o.head_channels = vltseg.shape_of(file, queries, 2)[0] // o.heads
    return config_lib.validated(c)


def described(config: Config) -> str:
    """The run in words."""
    o = config.model.mgrnet
    return (
        f"{config.model.encoder}, LoRA of rank {config.low_rank.rank} folded, a decoder of"
        f" {o.width} channels, {o.layers} layers of refinement; windows of"
        f" {config.data.crop[0] // 2} pixels; no tensor tells what it was trained on:"
        f" {config.data.source}, says its config.json"
    )
