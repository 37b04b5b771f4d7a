"""DINOv3's vision transformers: the names of its authors, of transformers and of timm, whose models
have biases or, as usual, none.
"""

import numpy as np

from jaxdg.backbones import Dinov3Config
from jaxdg.conversion import vit
from jaxdg.conversion.deit3 import SCALES
from jaxdg.conversion.dinov2 import MASKED, NORM
from jaxdg.conversion.mapping import SAME, Layout, Row, Transform
from jaxdg.conversion.names import APART_KERNELS, renamed

ROPE = "periods of the rotary positions: computed for any grid"
TRANSFORMERS = (
    ("cls_token", "embeddings.cls_token"),
    ("storage_tokens", "embeddings.register_tokens"),
    ("patch_embed.proj", "embeddings.patch_embeddings"),
    ("blocks.", "layer."),
    ("attn.proj", "attention.o_proj"),
    ("mlp.fc1", "mlp.up_proj"),
    ("mlp.fc2", "mlp.down_proj"),
    ("ls1.gamma", "layer_scale1.lambda1"),
    ("ls2.gamma", "layer_scale2.lambda1"),
)
TIMM = (("storage_tokens", "reg_token"), ("ls1.gamma", "gamma_1"), ("ls2.gamma", "gamma_2"))
BIAS = "blocks.*.attn.qv_bias"


def layouts(config: Dinov3Config) -> tuple[Layout, ...]:
    """All layouts of the model of `config`; the first is that of the files its authors publish."""
    unbiased = tuple(
        row for row in vit.timm().rows if row.target not in ("pos_embed", "blocks.*.attn.qkv.bias")
    )
    rows = (*unbiased, Row(("storage_tokens",), "storage_tokens", SAME), *SCALES)
    authors = Layout(
        "DINOv3",
        (*rows, Row(("blocks.*.attn.qkv.bias", "blocks.*.attn.qkv.bias_mask"), BIAS, MASKED_BIAS)),
        ((r"norm\.(weight|bias)", NORM), (r"mask_token", MASKED), (r"rope_embed\.periods", ROPE)),
    )
    transformers = renamed(
        (
            *(row for row in rows if row.target != "blocks.*.attn.qkv.kernel"),
            Row(
                tuple(f"blocks.*.attention.{part}_proj.weight" for part in "qkv"),
                "blocks.*.attn.qkv.kernel",
                APART_KERNELS,
            ),
            Row(tuple(f"blocks.*.attention.{part}_proj.bias" for part in "qv"), BIAS, STACKED),
        ),
        "transformers",
        TRANSFORMERS,
        ((r"norm\.(weight|bias)", NORM), (r"embeddings\.mask_token", MASKED)),
    )
    without = Transform(lambda: np.zeros((2, config.width), np.float32), _no_bias)
    left_out = ((r"norm\.(weight|bias)", NORM),)
    timm = renamed((*rows, Row((), BIAS, without)), "timm", TIMM, left_out)
    biased = renamed(
        (*rows, Row(("blocks.*.attn.q_bias", "blocks.*.attn.v_bias"), BIAS, STACKED)),
        "timm_qkvb",
        TIMM,
        left_out,
    )
    return authors, transformers, timm, biased


def _masked(bias: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """Biases of queries and values from the fused one.

    Raises:
        ValueError: the mask leaves keys a bias.
    """
    q, k, v = np.split(bias * mask, 3)
    if k.any():
        raise ValueError(
            "an attn.qkv.bias_mask leaves the keys a bias, and DINOv3's have none; this is another"
            " model's file or damaged"
        )
    return np.stack([q, v])


def _fused(bias: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The fused bias, zero for keys, and its mask."""
    none = np.zeros_like(bias[0])
    return np.concatenate([bias[0], none, bias[1]]), np.concatenate([none + 1, none, none + 1])


def _no_bias(bias: np.ndarray) -> tuple[()]:
    """No tensor at all.

    Raises:
        ValueError: there is a bias to be kept.
    """
    if bias.any():
        raise ValueError(
            "queries and values have biases, which timm's usual names have no place for; write"
            " --layout timm_qkvb"
        )
    return ()


MASKED_BIAS = Transform(_masked, _fused)
STACKED = Transform(lambda *parts: np.stack(parts), lambda bias: tuple(bias))
