"""Plain vision transformers: timm's names (also DeiT's originals), those of the AugReg `.npz`
files, and those of big_vision today.

Both kinds of `.npz` hold Flax's kernels, with queries, keys and values apart and split into heads;
the numbers in the names differ.
"""

from collections.abc import Mapping
import math
import re

import numpy as np

from jaxdg.backbones import VitConfig
from jaxdg.conversion.mapping import CONV, LINEAR, SAME, Layout, Row, Transform
from jaxdg.conversion.names import APART_BIASES, APART_KERNELS, renamed

CLASSIFIER = "final norm and classifier: dense features are read before them"
TRANSFORMERS = (
    ("cls_token", "embeddings.cls_token"),
    ("pos_embed", "embeddings.position_embeddings"),
    ("patch_embed.proj", "embeddings.patch_embeddings.projection"),
    ("blocks.", "encoder.layer."),
    ("attn.proj", "attention.output.dense"),
    ("norm1", "layernorm_before"),
    ("norm2", "layernorm_after"),
    ("mlp.fc1", "intermediate.dense"),
    ("mlp.fc2", "output.dense"),
)
POOL = "attention pooling: dense features are read before it"


def layouts(config: VitConfig) -> tuple[Layout, ...]:
    """All layouts, for the model of `config`; big_vision shares some files as they are saved,
    others without the leading `params/`.
    """
    shared = (
        big_vision(config.heads, prefix, scan)
        for prefix in ("params/", "")
        for scan in (False, True)
    )
    return timm(), *shared, augreg(config.heads), transformers()


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


def transformers() -> Layout:
    """`google/vit-*`, where queries, keys and values are apart; of `ViTModel`, and with `vit.`
    before its names of what is built on it.
    """
    rows = timm().rows
    apart = [
        Row(
            tuple(
                f"blocks.*.attention.attention.{part}.{theirs}"
                for part in ("query", "key", "value")
            ),
            target,
            transform,
        )
        for theirs, target, transform in (
            ("weight", "blocks.*.attn.qkv.kernel", APART_KERNELS),
            ("bias", "blocks.*.attn.qkv.bias", APART_BIASES),
        )
    ]
    return renamed(
        (*(row for row in rows if ".qkv." not in row.target), *apart),
        "transformers",
        TRANSFORMERS,
        (
            (r"layernorm\.(weight|bias)|classifier\.(weight|bias)", CLASSIFIER),
            (r"pooler\.dense\.(weight|bias)", "a layer of the classifier"),
        ),
    )


def _with_class(positions: np.ndarray) -> np.ndarray:
    """[1, n, c] to [1, 1 + n, c], the class token's being zero; positions that count it already
    stay as they are.
    """
    if positions.ndim != 3 or math.isqrt(positions.shape[1]) ** 2 + 1 == positions.shape[1]:
        return positions
    return np.concatenate([np.zeros_like(positions[:, :1]), positions], axis=1)


CLASSLESS = Transform(_with_class, lambda p: (p[:, 1:],))


def augreg(heads: int) -> Layout:
    """The `.npz` files of Steiner et al. 2022."""
    return Layout(
        "AugReg npz",
        (
            Row(("cls",), "cls_token", SAME),
            Row(("Transformer/posembed_input/pos_embedding",), "pos_embed", SAME, resized=True),
            *_flax("", "Transformer/encoderblock_*/", heads, attention=1, norm2=2, mlp=3),
        ),
        left_out=(
            (r"Transformer/encoder_norm/(scale|bias)", CLASSIFIER),
            (r"head/(kernel|bias)", CLASSIFIER),
            (r"pre_logits/(kernel|bias)", "a layer of the classifier"),
        ),
    )


def big_vision(heads: int, prefix: str, scan: bool, class_token: bool = True) -> Layout:
    """Parameters of `models/vit.py` of google-research/big_vision, as its checkpoints name them.

    Its model adds positions before it prepends the class token, so that token has none; there the
    class token's position goes into it, and here it is zero. An older file whose positions count
    the class token is told by their number, as big_vision's loader does it.

    Args:
        heads: of the attention.
        prefix: of all names.
        scan: blocks are stacked along a leading axis (`scan=True` of its model), not numbered.
        class_token: `pool_type="tok"`; otherwise there is none.
    """
    block = f"{prefix}Transformer/encoderblock/" if scan else f"{prefix}Transformer/encoderblock_*/"
    cls = f"{prefix}cls"
    positions = f"{prefix}pos_embedding"

    def beside(tensors: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        ones = np.ones(tensors["pos_embed"].shape[-1], np.float32)
        norm = {
            f"{prefix}Transformer/encoder_norm/scale": ones,
            f"{prefix}Transformer/encoder_norm/bias": 0 * ones,
        }
        return (
            norm | {cls: tensors["cls_token"] + tensors["pos_embed"][:, :1]}
            if class_token
            else norm
        )

    start = re.escape(prefix)
    pool = "tok" if class_token else "none"
    return Layout(
        f"big_vision{'-scan' * scan}{'-bare' * (not prefix)}",
        (
            *(Row((cls,), "cls_token", SAME) for _ in range(class_token)),
            Row((positions,), "pos_embed", CLASSLESS if class_token else SAME, resized=True),
            *_flax(prefix, block, heads, attention=0, norm2=1, mlp=0),
        ),
        left_out=(
            (start + r"Transformer/encoder_norm/(scale|bias)", CLASSIFIER),
            (start + r"head/(kernel|bias)", CLASSIFIER),
            (start + r"pre_logits/(kernel|bias)", "a layer of the classifier"),
            (start + r"MAPHead_0/.+", POOL),
        ),
        beside=beside,
        note=(
            "final norm, which jaxdg does not keep, of scale 1 and bias 0; made for"
            f' num_classes=None, pool_type="{pool}", scan={scan}'
        ),
    )


def _flax(
    prefix: str, block: str, heads: int, *, attention: int, norm2: int, mlp: int
) -> tuple[Row, ...]:
    """Rows of patches and blocks; `block` leads the names of a block's parts, which carry these
    numbers.
    """
    kernel = _heads(heads, kernel=True)
    bias = _heads(heads, kernel=False)
    out = Transform(
        lambda k: k.reshape(-1, k.shape[2]),  # [h, d, c] to [c, c]
        lambda k: (k.reshape(heads, -1, k.shape[1]),),
    )
    plain = [
        Row((f"{theirs}/{kind}",), f"{ours}.{kind}", SAME)
        for theirs, ours, kinds in (
            (f"{prefix}embedding", "patch_embed.proj", ("kernel", "bias")),
            (f"{block}LayerNorm_0", "blocks.*.norm1", ("scale", "bias")),
            (f"{block}LayerNorm_{norm2}", "blocks.*.norm2", ("scale", "bias")),
            (f"{block}MlpBlock_{mlp}/Dense_0", "blocks.*.mlp.fc1", ("kernel", "bias")),
            (f"{block}MlpBlock_{mlp}/Dense_1", "blocks.*.mlp.fc2", ("kernel", "bias")),
        )
        for kind in kinds
    ]
    there = f"{block}MultiHeadDotProductAttention_{attention}"
    return (
        *plain,
        Row(
            tuple(f"{there}/{part}/kernel" for part in ("query", "key", "value")),
            "blocks.*.attn.qkv.kernel",
            kernel,
        ),
        Row(
            tuple(f"{there}/{part}/bias" for part in ("query", "key", "value")),
            "blocks.*.attn.qkv.bias",
            bias,
        ),
        Row((f"{there}/out/kernel",), "blocks.*.attn.proj.kernel", out),
        Row((f"{there}/out/bias",), "blocks.*.attn.proj.bias", SAME),
    )


def _heads(heads: int, kernel: bool) -> Transform:
    """Query, key and value of [c, h, d] (biases [h, d]) side by side as [c, 3c] ([3c])."""
    lead = 1 if kernel else 0

    def fuse(*parts: np.ndarray) -> np.ndarray:
        return np.concatenate([part.reshape(*part.shape[:lead], -1) for part in parts], axis=-1)

    def split(fused: np.ndarray) -> tuple[np.ndarray, ...]:
        return tuple(
            part.reshape(*part.shape[:lead], heads, -1) for part in np.split(fused, 3, axis=-1)
        )

    return Transform(fuse, split)
