"""Plain vision transformers: timm's names (also DeiT's originals) and those of the AugReg `.npz` files (Flax, big_vision's layout)."""

import numpy as np

from conversion.mapping import CONV, LINEAR, SAME, Layout, Row, Transform
from jaxdg.backbones import VitConfig

CLASSIFIER = "final norm and classifier: dense features are read before them"


def layouts(config: VitConfig) -> tuple[Layout, ...]:
    """Both layouts, for the model of `config`."""
    return timm(), augreg(config.heads)


def timm() -> Layout:
    """`vit_*_patch16_224.augreg*` as timm's state dict names them."""
    norms = [
        Row((f"blocks.*.{norm}.{theirs}",), f"blocks.*.{norm}.{ours}", SAME)
        for norm in ("norm1", "norm2")
        for theirs, ours in (("weight", "scale"), ("bias", "bias"))
    ]
    linears = [
        Row((f"blocks.*.{layer}.{theirs}",), f"blocks.*.{layer}.{ours}", transform)
        for layer in ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")
        for theirs, ours, transform in (("weight", "kernel", LINEAR), ("bias", "bias", SAME))
    ]
    return Layout(
        "timm",
        (
            Row(("cls_token",), "cls_token", SAME),
            Row(("pos_embed",), "pos_embed", SAME, resized=True),
            Row(("patch_embed.proj.weight",), "patch_embed.proj.kernel", CONV),
            Row(("patch_embed.proj.bias",), "patch_embed.proj.bias", SAME),
            *norms,
            *linears,
        ),
        left_out=(
            (r"(norm|head)\.(weight|bias)", CLASSIFIER),
            (r"pre_logits\.fc\.(weight|bias)", "a layer of the classifier"),
            (r"head_dist\.(weight|bias)", "the classifier of a distillation token"),
        ),
    )


def augreg(heads: int) -> Layout:
    """The `.npz` files of Steiner et al. 2022: kernels are Flax's already, query, key and value are apart and split into heads."""
    block = "Transformer/encoderblock_*/"
    attention = block + "MultiHeadDotProductAttention_1/"
    kernel, bias = _heads(heads, kernel=True), _heads(heads, kernel=False)
    out = Transform(
        lambda k: k.reshape(-1, k.shape[2]),  # [h, d, c] to [c, c]
        lambda k: (k.reshape(heads, -1, k.shape[1]),),
    )
    plain = [
        Row((f"{block}{theirs}/{kind}",), f"blocks.*.{ours}.{kind}", SAME)
        for theirs, ours, kinds in (
            ("LayerNorm_0", "norm1", ("scale", "bias")),
            ("LayerNorm_2", "norm2", ("scale", "bias")),
            ("MlpBlock_3/Dense_0", "mlp.fc1", ("kernel", "bias")),
            ("MlpBlock_3/Dense_1", "mlp.fc2", ("kernel", "bias")),
        )
        for kind in kinds
    ]
    return Layout(
        "AugReg npz",
        (
            Row(("cls",), "cls_token", SAME),
            Row(("Transformer/posembed_input/pos_embedding",), "pos_embed", SAME, resized=True),
            Row(("embedding/kernel",), "patch_embed.proj.kernel", SAME),
            Row(("embedding/bias",), "patch_embed.proj.bias", SAME),
            Row(tuple(f"{attention}{part}/kernel" for part in ("query", "key", "value")), "blocks.*.attn.qkv.kernel", kernel),
            Row(tuple(f"{attention}{part}/bias" for part in ("query", "key", "value")), "blocks.*.attn.qkv.bias", bias),
            Row((attention + "out/kernel",), "blocks.*.attn.proj.kernel", out),
            Row((attention + "out/bias",), "blocks.*.attn.proj.bias", SAME),
            *plain,
        ),
        left_out=(
            (r"Transformer/encoder_norm/(scale|bias)", CLASSIFIER),
            (r"head/(kernel|bias)", CLASSIFIER),
            (r"pre_logits/(kernel|bias)", "a layer of the classifier"),
        ),
    )


def _heads(heads: int, kernel: bool) -> Transform:
    """Query, key and value of [c, h, d] (biases [h, d]) side by side as [c, 3c] ([3c])."""
    lead = 1 if kernel else 0

    def fuse(*parts: np.ndarray) -> np.ndarray:
        return np.concatenate([part.reshape(*part.shape[:lead], -1) for part in parts], axis=-1)

    def split(fused: np.ndarray) -> tuple[np.ndarray, ...]:
        return tuple(part.reshape(*part.shape[:lead], heads, -1) for part in np.split(fused, 3, axis=-1))

    return Transform(fuse, split)
