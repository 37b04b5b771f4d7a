"""SigLIP's image towers: the names of timm, of transformers, of open_clip and of big_vision's own
`.npz` files.
"""

from jaxdg.backbones import SiglipConfig
from jaxdg.conversion import vit
from jaxdg.conversion.clip import POSITIONS
from jaxdg.conversion.mapping import Layout, Row
from jaxdg.conversion.names import APART_BIASES, APART_KERNELS, renamed

OUTPUT = "final norm and attention-pool head: dense features are read before them"
TEXT = "the text tower, its temperature and bias"
TRANSFORMERS = (
    ("pos_embed", "embeddings.position_embedding.weight"),
    ("patch_embed.proj", "embeddings.patch_embedding"),
    ("blocks.", "encoder.layers."),
    ("attn.proj", "self_attn.out_proj"),
    (".norm", ".layer_norm"),
)


def layouts(config: SiglipConfig) -> tuple[Layout, ...]:
    """All layouts, for the model of `config`; the first is that of the file whose size the zoo
    tells.
    """
    rows = [row for row in vit.timm().rows if row.target != "cls_token"]
    heads = r"(attn_pool\..+|norm\.(weight|bias))"
    apart = [
        Row(
            tuple(f"blocks.*.self_attn.{part}_proj.{theirs}" for part in "qkv"),
            f"blocks.*.attn.qkv.{ours}",
            transform,
        )
        for theirs, ours, transform in (
            ("weight", "kernel", APART_KERNELS),
            ("bias", "bias", APART_BIASES),
        )
    ]
    positions = Row(("pos_embed",), "pos_embed", POSITIONS, resized=True)
    others = [row for row in rows if row.target != "pos_embed" and ".qkv." not in row.target]
    return (
        Layout("timm", tuple(rows), ((heads, OUTPUT),)),
        renamed(
            (positions, *others, *apart),
            "transformers",
            TRANSFORMERS,
            (
                (
                    r"vision_model\.(head\..+|post_layernorm\.(weight|bias))|classifier\.(weight|bias)",
                    OUTPUT,
                ),
                (r"text_model\..+|logit_(scale|bias)", TEXT),
            ),
            prefix="vision_model.",
        ),
        renamed(
            rows,
            "open_clip",
            (),
            ((r"visual\.trunk\." + heads, OUTPUT), (r"text\..+|logit_(scale|bias)", TEXT)),
            prefix="visual.trunk.",
        ),
        big_vision(config, scan=True),
        big_vision(config, scan=False),
    )


def big_vision(config: SiglipConfig, scan: bool) -> Layout:
    """The image tower of the two that big_vision trains; its `models/vit.py` loads it as
    `FILE.npz:img`.
    """
    layout = vit.big_vision(config.heads, "params/img/", scan, class_token=False)
    return layout._replace(
        left_out=(*layout.left_out, (r"params/(txt/.+|t|b)", TEXT)),
        note=f"{layout.note}; load it as FILE.npz:img",
    )
