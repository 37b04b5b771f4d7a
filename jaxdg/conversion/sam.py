"""SAM's image encoder: the names of its authors (whole SAM files), of transformers and of timm."""

import re

from jaxdg.conversion.mapping import CONV, LINEAR, SAME, Layout, Row

NECK = "neck and head: dense features are read before them"
PROMPT = "SAM's prompt encoder and mask decoder: only the image encoder is converted"


def layouts() -> tuple[Layout, ...]:
    """All layouts; the first is that of the files its authors publish."""
    whole = ((r"(prompt_encoder|mask_decoder|shared_image_embedding)\..+", PROMPT),)
    transformers = {
        "patch_embed.proj": "patch_embed.projection",
        "blocks": "layers",
        "norm1": "layer_norm1",
        "norm2": "layer_norm2",
        "mlp.fc1": "mlp.lin1",
        "mlp.fc2": "mlp.lin2",
    }
    return (
        _layout("SAM", "image_encoder.", {"mlp.fc1": "mlp.lin1", "mlp.fc2": "mlp.lin2"}, whole),
        _layout("transformers", "vision_encoder.", transformers, whole),
        _layout("timm", "", {}, ()),
    )


def _layout(
    name: str, prefix: str, renamed: dict[str, str], left_out: tuple[tuple[str, str], ...]
) -> Layout:
    """Our names behind a prefix, parts of them renamed."""
    patches = f"{prefix}{renamed.get('patch_embed.proj', 'patch_embed.proj')}"
    block = f"{prefix}{renamed.get('blocks', 'blocks')}.*."
    linears = ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")
    norms = ("norm1", "norm2")
    parts = [(part, ".weight", ".kernel", LINEAR) for part in linears]
    parts += [(part, ".weight", ".scale", SAME) for part in norms]
    parts += [(part, ".bias", ".bias", SAME) for part in (*linears, *norms)]
    rows = (
        Row((f"{prefix}pos_embed",), "pos_embed", SAME, resized=True),
        Row((f"{patches}.weight",), "patch_embed.proj.kernel", CONV),
        Row((f"{patches}.bias",), "patch_embed.proj.bias", SAME),
        *(
            Row(
                (f"{block}attn.rel_pos_{side}",),
                f"blocks.*.attn.rel_pos_{side}",
                SAME,
                resized=True,
            )
            for side in "hw"
        ),
        *(
            Row((f"{block}{renamed.get(p, p)}{there}",), f"blocks.*.{p}{ours}", t)
            for p, there, ours, t in parts
        ),
    )
    return Layout(name, rows, (*left_out, (re.escape(prefix) + r"(neck|head)\..+", NECK)))
