"""CLIP's text towers, with what the image tower beside them holds for the joint space: OpenAI's,
EVA-CLIP's and transformers' names.
"""

from collections.abc import Sequence
import re

from jaxdg.backbones import ClipTextConfig
from jaxdg.conversion.clip import COUNTED, SETTING
from jaxdg.conversion.mapping import LINEAR, SAME, Layout, Row, Transform
from jaxdg.conversion.names import APART_BIASES, APART_KERNELS

IMAGE = "the image tower: another model, which the same file converts to"

# Parts of a block: their names in jaxdg, in OpenAI's files and in transformers', and what becomes
# of the weight.
BLOCK = (
    ("norm1", "ln_1", "layer_norm1", SAME),
    ("attn.proj", "attn.out_proj", "self_attn.out_proj", LINEAR),
    ("norm2", "ln_2", "layer_norm2", SAME),
    ("mlp.fc1", "mlp.c_fc", "mlp.fc1", LINEAR),
    ("mlp.fc2", "mlp.c_proj", "mlp.fc2", LINEAR),
)
NORM = "image_projection.norm"
PROJECTION = "image_projection.proj"


def layouts(config: ClipTextConfig) -> tuple[Layout, ...]:
    """All layouts in which files of the tower of `config` exist; the first is that of the file its
    authors publish.
    """
    if config.image_projection is None:
        return openai("CLIP", "", ()), openai("open_clip", "text.", ())
    if config.image_projection.bias:

        def eva(image):
            return (
                *_pair(NORM, f"{image}norm.", SAME),
                *_pair(PROJECTION, f"{image}head.", LINEAR),
            )

        return openai("EVA-CLIP", "text.", eva("visual.")), openai(
            "open_clip", "text.", eva("visual.trunk.")
        )
    # Theirs is a matrix that rows of features are multiplied with, as ours.
    clip = (
        *_pair(NORM, "visual.ln_post.", SAME),
        Row(("visual.proj",), f"{PROJECTION}.kernel", SAME),
    )
    return openai("CLIP", "", clip), openai("open_clip", "text.", clip), transformers()


def openai(name: str, prefix: str, projection: Sequence[Row]) -> Layout:
    """OpenAI's names behind a prefix, and the rows of the projection."""
    block = f"{prefix}transformer.resblocks.*."
    rows = (
        Row(("logit_scale",), "logit_scale", SAME),
        Row((f"{prefix}token_embedding.weight",), "token_embedding", SAME),
        Row((f"{prefix}positional_embedding",), "positional_embedding", SAME),
        *_pair("blocks.*.attn.qkv", f"{block}attn.in_proj_", LINEAR),
        *(
            row
            for ours, theirs, _, transform in BLOCK
            for row in _pair(f"blocks.*.{ours}", f"{block}{theirs}.", transform)
        ),
        *_pair("ln_final", f"{prefix}ln_final.", SAME),
        Row((f"{prefix}text_projection",), "text_projection", SAME),
        *projection,
    )
    return Layout(
        name, rows, (_image_tower(rows), (r"input_resolution|context_length|vocab_size", SETTING))
    )


def transformers() -> Layout:
    """The names of `openai/clip-vit-*`, where queries, keys and values are apart."""
    block = "text_model.encoder.layers.*."
    rows = (
        Row(("logit_scale",), "logit_scale", SAME),
        Row(("text_model.embeddings.token_embedding.weight",), "token_embedding", SAME),
        Row(("text_model.embeddings.position_embedding.weight",), "positional_embedding", SAME),
        Row(
            tuple(f"{block}self_attn.{part}_proj.weight" for part in "qkv"),
            "blocks.*.attn.qkv.kernel",
            APART_KERNELS,
        ),
        Row(
            tuple(f"{block}self_attn.{part}_proj.bias" for part in "qkv"),
            "blocks.*.attn.qkv.bias",
            APART_BIASES,
        ),
        *(
            row
            for ours, _, theirs, transform in BLOCK
            for row in _pair(f"blocks.*.{ours}", f"{block}{theirs}.", transform)
        ),
        *_pair("ln_final", "text_model.final_layer_norm.", SAME),
        Row(("text_projection.weight",), "text_projection", LINEAR),
        *_pair(NORM, "vision_model.post_layernorm.", SAME),
        Row(("visual_projection.weight",), f"{PROJECTION}.kernel", LINEAR),
    )
    return Layout(
        "transformers",
        rows,
        (_image_tower(rows), (r"text_model\.embeddings\.position_ids", COUNTED)),
    )


def _pair(ours: str, theirs: str, transform: Transform) -> tuple[Row, Row]:
    """A weight and a bias; the weight of a norm is a scale, that of a linear layer a kernel."""
    kind = "scale" if transform is SAME else "kernel"
    return Row((f"{theirs}weight",), f"{ours}.{kind}", transform), Row(
        (f"{theirs}bias",), f"{ours}.bias", SAME
    )


def _image_tower(rows: Sequence[Row]) -> tuple[str, str]:
    """Leaves out all of the image tower that no row takes."""
    used = "|".join(re.escape(source) for row in rows for source in row.source)
    return rf"(?!({used})$)(visual|vision_model)\..+", IMAGE
