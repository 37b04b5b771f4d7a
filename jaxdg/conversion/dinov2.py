"""DINOv2 with and without registers: the names of its authors (timm's too, without registers), of
transformers and of timm.
"""

from collections.abc import Mapping

import numpy as np

from jaxdg.backbones import Dinov2Config
from jaxdg.conversion import vit
from jaxdg.conversion.deit3 import SCALES
from jaxdg.conversion.mapping import SAME, Layout, Row, Transform
from jaxdg.conversion.names import APART_BIASES, APART_KERNELS, renamed

NORM = "final norm: dense features are read before it"
MASKED = "for masked pre-training only"
TRANSFORMERS = (
    ("cls_token", "embeddings.cls_token"),
    ("register_tokens", "embeddings.register_tokens"),
    ("pos_embed", "embeddings.position_embeddings"),
    ("patch_embed.proj", "embeddings.patch_embeddings.projection"),
    ("blocks.", "encoder.layer."),
    ("attn.proj", "attention.output.dense"),
    ("ls1.gamma", "layer_scale1.lambda1"),
    ("ls2.gamma", "layer_scale2.lambda1"),
)


def layouts(config: Dinov2Config) -> tuple[Layout, ...]:
    """All layouts of the model of `config`; the first is that of the files its authors publish."""
    rows = (*vit.timm().rows, *SCALES)
    if config.registers:
        rows = (*rows, Row(("register_tokens",), "register_tokens", SAME))
    authors = Layout("DINOv2", rows, ((r"norm\.(weight|bias)", NORM), (r"mask_token", MASKED)))
    transformers = renamed(
        (
            *(row for row in rows if ".qkv." not in row.target),
            *(
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
            ),
        ),
        "transformers",
        TRANSFORMERS,
        ((r"layernorm\.(weight|bias)", NORM), (r"embeddings\.mask_token", MASKED)),
    )
    if not config.registers:
        return authors, transformers
    timm = renamed(
        (
            *(row for row in rows if row.target != "pos_embed"),
            Row(("pos_embed",), "pos_embed", CLASS_ROW, resized=True),
        ),
        "timm",
        (("register_tokens", "reg_token"),),
        ((r"norm\.(weight|bias)", NORM),),
    )
    return (
        authors,
        transformers,
        timm._replace(
            beside=_class_token, note="the class token's position is added to that token"
        ),
    )


def _class_token(tensors: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The class token as timm holds it where there are registers: with its position added."""
    return {"cls_token": tensors["cls_token"] + tensors["pos_embed"][:, :1]}


# Where there are registers timm's positions have no row for the class token.
CLASS_ROW = Transform(
    lambda a: np.concatenate([np.zeros_like(a[:, :1]), a], axis=1), lambda a: (a[:, 1:],)
)
