"""CLIP's vision transformers: the names of OpenAI's archives, which open_clip shares."""

from conversion.mapping import CONV, LINEAR, SAME, Layout, Row, Transform

OUTPUT = "final norm and projection to the text's space: dense features are read before them"
TEXT = "the text tower and its temperature"
SETTING = "a setting of the model that the archive keeps as a tensor"

# What lies beside the image tower in an archive.
BESIDE = (
    (r"(text\.)?(transformer\..+|(token_embedding|ln_final)\..+|positional_embedding|text_projection)|logit_scale", TEXT),
    (r"input_resolution|context_length|vocab_size", SETTING),
)

CLASS = Transform(lambda a: a[None, None], lambda a: (a[0, 0],))  # [c] to [1, 1, c]
POSITIONS = Transform(lambda a: a[None], lambda a: (a[0],))  # [n, c] to [1, n, c]


def layouts() -> tuple[Layout, ...]:
    """The one layout: an image tower below `visual.`, the text tower beside it or, in newer open_clip files, below `text.`."""
    block, ours = "visual.transformer.resblocks.*.", "blocks.*."
    norms = [
        Row((f"{there}.{theirs}",), f"{here}.{kind}", SAME)
        for there, here in (("visual.ln_pre", "norm_pre"), (f"{block}ln_1", f"{ours}norm1"), (f"{block}ln_2", f"{ours}norm2"))
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
    )
