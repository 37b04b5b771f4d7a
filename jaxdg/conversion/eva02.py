"""EVA-02: the names of its authors (EVA-CLIP, EVA-02 MIM), of the VLTSeg re-implementation, of timm
and of open_clip.
"""

import re

from jaxdg.backbones import Eva02Config
from jaxdg.conversion.mapping import CONV, LINEAR, SAME, Layout, Row

ROPE = "rotary tables: computed for any grid"
OUTPUT = "final norm and output layer: dense features are read before them"
TEXT = "the text tower and its temperature"
MASKED = "for masked pre-training only"
HEAD = "pyramid and decoder: only the encoder is converted"
DROPPED = "the VLTSeg re-implementation has no such norm"

TIMM = {
    "mlp.w1": "mlp.fc1_g",
    "mlp.w2": "mlp.fc1_x",
    "mlp.w12": "mlp.fc1",
    "mlp.w3": "mlp.fc2",
    "mlp.ffn_ln": "mlp.norm",
    "attn.inner_attn_ln": "attn.norm",
}
TIMM_BIASES = {
    "attn.q_bias": "attn.q_proj.bias",
    "attn.v_bias": "attn.v_proj.bias",
}  # where the projections are not fused


def layouts(config: Eva02Config) -> tuple[Layout, ...]:
    """All layouts in which files of the model of `config` exist; the first is that of the file its
    authors publish.
    """
    timm = TIMM | TIMM_BIASES if config.subln else TIMM
    clip = _layout(config, "EVA-CLIP", "visual.", {}, [(r"text\..+|logit_scale", TEXT)])
    mim = _layout(config, "EVA-02", "", {}, [(r"mask_token|lm_head\.(weight|bias)", MASKED)])
    vltseg = _layout(
        config, "VLTSeg", "backbone.", {}, [(r"backbone\.fpn\d\..+|decode_head\..+", HEAD)]
    )
    others = (
        _layout(config, "timm", "", timm, []),
        _layout(config, "open_clip", "visual.trunk.", timm, [(r"text\..+|logit_scale", TEXT)]),
    )
    if config.inner_attn_ln:
        return clip, mim, vltseg, *others
    return (vltseg, clip, mim, *others) if config.random_positions else (mim, clip, vltseg, *others)


def _layout(
    config: Eva02Config,
    name: str,
    prefix: str,
    renamed: dict[str, str],
    left_out: list[tuple[str, str]],
) -> Layout:
    """EVA's names, which jaxdg shares, behind a prefix; parts of a block may be renamed."""
    norms = ["norm1", "norm2"]
    biased = ["attn.proj", "mlp.w3"]
    plain = ["attn.q_bias", "attn.v_bias"]
    unbiased = ["attn.q_proj", "attn.k_proj", "attn.v_proj"] if config.subln else ["attn.qkv"]
    biased += ["mlp.w1", "mlp.w2"] if config.subln else ["mlp.w12"]
    norms += ["mlp.ffn_ln"] * config.subln + ["attn.inner_attn_ln"] * config.inner_attn_ln
    parts = [(part, "", "", SAME) for part in plain]
    parts += [(part, ".weight", ".kernel", LINEAR) for part in (*biased, *unbiased)]
    parts += [(part, ".weight", ".scale", SAME) for part in norms]
    parts += [(part, ".bias", ".bias", SAME) for part in (*biased, *norms)]
    rows = (
        Row((f"{prefix}cls_token",), "cls_token", SAME),
        Row((f"{prefix}pos_embed",), "pos_embed", SAME, resized=True),
        Row((f"{prefix}patch_embed.proj.weight",), "patch_embed.proj.kernel", CONV),
        Row((f"{prefix}patch_embed.proj.bias",), "patch_embed.proj.bias", SAME),
        *(
            Row((f"{prefix}blocks.*.{renamed.get(p, p)}{theirs}",), f"blocks.*.{p}{ours}", t)
            for p, theirs, ours, t in parts
        ),
    )
    start = re.escape(prefix)
    left_out = [*left_out, (start + r"(norm|fc_norm|head)\.(weight|bias)", OUTPUT)]
    left_out += [(start + r"(blocks\.\d+\.attn\.)?rope\.freqs_(cos|sin)", ROPE)]
    if config.random_positions:
        norm = re.escape(renamed.get("attn.inner_attn_ln", "attn.inner_attn_ln"))
        left_out += [(rf"{start}blocks\.\d+\.{norm}\.(weight|bias)", DROPPED)]
    return Layout(name, rows, tuple(left_out))
