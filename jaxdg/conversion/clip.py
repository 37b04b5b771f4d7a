"""CLIP's vision transformers: the names of OpenAI's archives, which open_clip shares, and those of
transformers.
"""

from jaxdg.conversion import vit
from jaxdg.conversion.mapping import CONV, LINEAR, SAME, Layout, Row, Transform
from jaxdg.conversion.names import APART_BIASES, APART_KERNELS

OUTPUT = "final norm and projection to the text's space: dense features are read before them"
TEXT = "the text tower and its temperature"
SETTING = "a setting of the model that the archive keeps as a tensor"
COUNTED = "the numbers from 0 on"

# What lies beside the image tower in an archive.
BESIDE = (
    (
        r"(text\.)?(transformer\..+|(token_embedding|ln_final)\..+|positional_embedding|text_projection)|logit_scale",
        TEXT,
    ),
    (r"input_resolution|context_length|vocab_size", SETTING),
)

CLASS = Transform(lambda a: a[None, None], lambda a: (a[0, 0],))  # [c] to [1, 1, c]
POSITIONS = Transform(lambda a: a[None], lambda a: (a[0],))  # [n, c] to [1, n, c]


def layouts() -> tuple[Layout, ...]:
    """OpenAI's and open_clip's, the image tower below `visual.`, the text tower beside it or below
    `text.`; transformers'; timm's.
    """
    block = "visual.transformer.resblocks.*."
    ours = "blocks.*."
    norms = [
        Row((f"{there}.{theirs}",), f"{here}.{kind}", SAME)
        for there, here in (
            ("visual.ln_pre", "norm_pre"),
            (f"{block}ln_1", f"{ours}norm1"),
            (f"{block}ln_2", f"{ours}norm2"),
        )
        for theirs, kind in (("weight", "scale"), ("bias", "bias"))
    ]
    linears = [
        Row((f"{block}{there}{theirs}",), f"{ours}{here}.{kind}", transform)
        for there, here in (
            ("attn.in_proj_", "attn.qkv"),
            ("attn.out_proj.", "attn.proj"),
            ("mlp.c_fc.", "mlp.fc1"),
            ("mlp.c_proj.", "mlp.fc2"),
        )
        for theirs, kind, transform in (("weight", "kernel", LINEAR), ("bias", "bias", SAME))
    ]
    return (
        Layout(
            "CLIP",
            (
                Row(("visual.class_embedding",), "cls_token", CLASS),
                Row(("visual.positional_embedding",), "pos_embed", POSITIONS, resized=True),
                Row(("visual.conv1.weight",), "patch_embed.proj.kernel", CONV),
                *norms,
                *linears,
            ),
            left_out=(
                (r"visual\.(ln_post\.(weight|bias)|proj)", OUTPUT),
                *BESIDE,
            ),
        ),
        _transformers(),
        _timm(),
    )


def _timm() -> Layout:
    """`vit_*_clip_*` of timm: the names of its plain vision transformers, with a norm before the
    blocks and patches without a bias.
    """
    plain = vit.timm()
    norm = tuple(
        Row((f"norm_pre.{theirs}",), f"norm_pre.{kind}", SAME)
        for theirs, kind in (("weight", "scale"), ("bias", "bias"))
    )
    rows = (*(row for row in plain.rows if row.target != "patch_embed.proj.bias"), *norm)
    return Layout("timm", rows, ((r"(norm|fc_norm|head)\.(weight|bias)", OUTPUT),))


def _transformers() -> Layout:
    """The names of `openai/clip-vit-*`, where queries, keys and values are apart."""
    block = "vision_model.encoder.layers.*."
    ours = "blocks.*."
    parts = (
        ("norm_pre", "vision_model.pre_layrnorm", "scale", SAME),
        (f"{ours}norm1", f"{block}layer_norm1", "scale", SAME),
        (f"{ours}attn.proj", f"{block}self_attn.out_proj", "kernel", LINEAR),
        (f"{ours}norm2", f"{block}layer_norm2", "scale", SAME),
        (f"{ours}mlp.fc1", f"{block}mlp.fc1", "kernel", LINEAR),
        (f"{ours}mlp.fc2", f"{block}mlp.fc2", "kernel", LINEAR),
    )
    rows = (
        Row(("vision_model.embeddings.class_embedding",), "cls_token", CLASS),
        Row(
            ("vision_model.embeddings.position_embedding.weight",),
            "pos_embed",
            POSITIONS,
            resized=True,
        ),
        Row(("vision_model.embeddings.patch_embedding.weight",), "patch_embed.proj.kernel", CONV),
        Row(
            tuple(f"{block}self_attn.{part}_proj.weight" for part in "qkv"),
            f"{ours}attn.qkv.kernel",
            APART_KERNELS,
        ),
        Row(
            tuple(f"{block}self_attn.{part}_proj.bias" for part in "qkv"),
            f"{ours}attn.qkv.bias",
            APART_BIASES,
        ),
        *(
            Row((f"{there}.weight",), f"{here}.{kind}", transform)
            for here, there, kind, transform in parts
        ),
        *(Row((f"{there}.bias",), f"{here}.bias", SAME) for here, there, _, _ in parts),
    )
    left_out = (
        (
            r"vision_model\.post_layernorm\.(weight|bias)|visual_projection\.weight|classifier\.(weight|bias)",
            OUTPUT,
        ),
        (r"text_model\.(?!embeddings\.position_ids$).+|text_projection\.weight|logit_scale", TEXT),
        (r"(text|vision)_model\.embeddings\.position_ids", COUNTED),
    )
    return Layout("transformers", rows, left_out)
