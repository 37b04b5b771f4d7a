"""Mask2Former heads: the names of facebookresearch/Mask2Former, of the files it released, and of
transformers.

Heads come in many sizes and a file states none, so the module that a file fills is built from the
shapes of the file's own tensors.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Mapping
import dataclasses
import re
from typing import Any

from flax import nnx
import numpy as np

from jaxdg.conversion.mapping import CONV, LINEAR, SAME, Layout, Misfit, Row, Transform
from jaxdg.segmentation import Mask2Former, Mask2FormerConfig
from jaxdg.tracing import Rngs

NAME = "mask2former"
LISTED = (  # megabytes, licence, source: of whole models, 44 to 216 M parameters
    "176-864 MB",
    "CC-BY-NC-4.0",
    (
        "model_final_*.pkl in MODEL_ZOO.md of facebookresearch/Mask2Former; transformers"
        " facebook/mask2former-*; their heads alone are taken"
    ),
)
# What the original's code writes beside a state dict. Without it a file counts as older and its
# pixel decoder is looked for elsewhere.
VERSIONS = {"sem_seg_head": 2, "sem_seg_head.predictor": 2}
BACKBONE = "the backbone: only the head is converted"
LOSS = "class weights of the loss: a setting"
LEVELS = 3
# of all published heads; with them the rows of the attention weights tell the number of heads
POINTS = 4

POINTWISE = Transform(
    lambda w: w[:, :, 0, 0].T, lambda k: (k.T[:, :, None, None],)
)  # torch [out, in, 1, 1], flax [in, out]
QKV = Transform(
    lambda *w: np.concatenate(w).T, lambda k: tuple(np.split(k.T, 3))
)  # three of torch [c, c], flax [c, 3c]
QKV_BIAS = Transform(lambda *b: np.concatenate(b), lambda b: tuple(np.split(b, 3)))

# The tensors of a layer: ending there, ending here, transform.
BIAS = (".bias", ".bias", SAME)
DENSE = ((".weight", ".kernel", LINEAR), BIAS)
CONV1 = ((".weight", ".kernel", POINTWISE), BIAS)
CONV1_UNBIASED = ((".weight", ".kernel", POINTWISE),)
CONV3_UNBIASED = ((".weight", ".kernel", CONV),)
NORM = ((".weight", ".scale", SAME), BIAS)
EMBEDDING = ((".weight", "", SAME),)
PARAMETER = (("", "", SAME),)
FUSED = (("_weight", ".kernel", LINEAR), ("_bias", ".bias", SAME))

PIXEL = "pixel_level_module.decoder"
ENCODER = "pixel_level_module.decoder.encoder.layers.*"
DECODER = "transformer_module.decoder"
LAYER = "transformer_module.decoder.layers.*"
CROSS, SELF, FFN = (
    f"predictor.transformer_{part}_layers.*"
    for part in ("cross_attention", "self_attention", "ffn")
)
THEIRS = "pixel_decoder.transformer.encoder.layers.*"
# Names in jaxdg, below `sem_seg_head.` of the original, below `model.` of transformers.
TABLE = (
    (
        "pixel_decoder.input_proj.*.conv",
        "pixel_decoder.input_proj.*.0",
        f"{PIXEL}.input_projections.*.0",
        CONV1,
    ),
    (
        "pixel_decoder.input_proj.*.norm",
        "pixel_decoder.input_proj.*.1",
        f"{PIXEL}.input_projections.*.1",
        NORM,
    ),
    (
        "pixel_decoder.level_embed",
        "pixel_decoder.transformer.level_embed",
        f"{PIXEL}.level_embed",
        PARAMETER,
    ),
    *(
        (
            f"pixel_decoder.layers.*.self_attn.{part}",
            f"{THEIRS}.self_attn.{part}",
            f"{ENCODER}.self_attn.{part}",
            DENSE,
        )
        for part in ("sampling_offsets", "attention_weights", "value_proj", "output_proj")
    ),
    ("pixel_decoder.layers.*.norm1", f"{THEIRS}.norm1", f"{ENCODER}.self_attn_layer_norm", NORM),
    ("pixel_decoder.layers.*.linear1", f"{THEIRS}.linear1", f"{ENCODER}.fc1", DENSE),
    ("pixel_decoder.layers.*.linear2", f"{THEIRS}.linear2", f"{ENCODER}.fc2", DENSE),
    ("pixel_decoder.layers.*.norm2", f"{THEIRS}.norm2", f"{ENCODER}.final_layer_norm", NORM),
    (
        "pixel_decoder.adapter_1.conv",
        "pixel_decoder.adapter_1",
        f"{PIXEL}.adapter_1.0",
        CONV1_UNBIASED,
    ),
    ("pixel_decoder.adapter_1.norm", "pixel_decoder.adapter_1.norm", f"{PIXEL}.adapter_1.1", NORM),
    ("pixel_decoder.layer_1.conv", "pixel_decoder.layer_1", f"{PIXEL}.layer_1.0", CONV3_UNBIASED),
    ("pixel_decoder.layer_1.norm", "pixel_decoder.layer_1.norm", f"{PIXEL}.layer_1.1", NORM),
    (
        "pixel_decoder.mask_features",
        "pixel_decoder.mask_features",
        f"{PIXEL}.mask_projection",
        CONV1,
    ),
    (
        "layers.*.cross_attn.in_proj",
        f"{CROSS}.multihead_attn.in_proj",
        f"{LAYER}.cross_attn.in_proj",
        FUSED,
    ),
    (
        "layers.*.cross_attn.out_proj",
        f"{CROSS}.multihead_attn.out_proj",
        f"{LAYER}.cross_attn.out_proj",
        DENSE,
    ),
    ("layers.*.cross_norm", f"{CROSS}.norm", f"{LAYER}.cross_attn_layer_norm", NORM),
    (
        "layers.*.self_attn.out_proj",
        f"{SELF}.self_attn.out_proj",
        f"{LAYER}.self_attn.out_proj",
        DENSE,
    ),
    ("layers.*.self_norm", f"{SELF}.norm", f"{LAYER}.self_attn_layer_norm", NORM),
    ("layers.*.linear1", f"{FFN}.linear1", f"{LAYER}.fc1", DENSE),
    ("layers.*.linear2", f"{FFN}.linear2", f"{LAYER}.fc2", DENSE),
    ("layers.*.ffn_norm", f"{FFN}.norm", f"{LAYER}.final_layer_norm", NORM),
    ("decoder_norm", "predictor.decoder_norm", f"{DECODER}.layernorm", NORM),
    ("query_embed", "predictor.query_embed", "transformer_module.queries_embedder", EMBEDDING),
    ("level_embed", "predictor.level_embed", "transformer_module.level_embed", EMBEDDING),
    (
        "mask_embed.layers.*",
        "predictor.mask_embed.layers.*",
        f"{DECODER}.mask_predictor.mask_embedder.*.0",
        DENSE,
    ),
)


def layouts() -> tuple[Layout, ...]:
    """All layouts in which heads are published; the first is that which the original's code writes
    today.
    """
    return (
        _original("Mask2Former", "query_feat"),
        _original("Mask2Former-released", "static_query"),
        _transformers(),
    )


def _original(name: str, queries: str) -> Layout:
    """A detectron2 model with its backbone; the released files call the queries' features otherwise
    than today's code.
    """
    rows = [
        row
        for ours, theirs, _, kind in TABLE
        for row in _rows(f"sem_seg_head.{theirs}", ours, kind)
    ]
    rows += _rows(f"sem_seg_head.{SELF}.self_attn.in_proj", "layers.*.self_attn.in_proj", FUSED)
    rows += _rows(f"sem_seg_head.predictor.{queries}", "query_feat", EMBEDDING)
    rows += _rows("sem_seg_head.predictor.class_embed", "class_embed", DENSE)
    return Layout(
        name, tuple(rows), ((r"backbone\..+", BACKBONE), (r"criterion\.empty_weight", LOSS))
    )


def _transformers() -> Layout:
    """`Mask2FormerForUniversalSegmentation`: query, key and value have tensors of their own."""
    rows = [row for ours, _, theirs, kind in TABLE for row in _rows(f"model.{theirs}", ours, kind)]
    for theirs, ours, transform in (("weight", "kernel", QKV), ("bias", "bias", QKV_BIAS)):
        parts = tuple(f"model.{LAYER}.self_attn.{part}_proj.{theirs}" for part in "qkv")
        rows.append(Row(parts, f"layers.*.self_attn.in_proj.{ours}", transform))
    rows += _rows("model.transformer_module.queries_features", "query_feat", EMBEDDING)
    rows += _rows("class_predictor", "class_embed", DENSE)
    left_out = (
        (r"model\.pixel_level_module\.encoder\..+", BACKBONE),
        (r"criterion\.empty_weight", LOSS),
    )
    return Layout("transformers", tuple(rows), left_out)


def _rows(theirs: str, ours: str, kind: tuple[tuple[str, str, Transform], ...]) -> list[Row]:
    return [Row((theirs + there,), ours + here, transform) for there, here, transform in kind]


def of_checkpoint(
    names: Iterable[str], read: Callable[[str], np.ndarray]
) -> tuple[Mask2FormerConfig, tuple[int, ...]]:
    """The sizes of the head in a published file: its config and the channels of the feature maps it
    reads, finest first.
    """
    found = [
        {ours: name for name in names if (ours := _ours(layout, name))} for layout in layouts()
    ]
    shapes = {ours: read(name).shape for ours, name in max(found, key=len).items()}
    return _sizes(shapes, rows=0, columns=1)


def of_tensors(tensors: Mapping[str, np.ndarray]) -> tuple[Mask2FormerConfig, tuple[int, ...]]:
    """The same of the head in a file of jaxdg."""
    return _sizes({name: tensor.shape for name, tensor in tensors.items()}, rows=-1, columns=0)


def abstract(config: Mask2FormerConfig, channels: tuple[int, ...]) -> nnx.Module:
    """The head of these sizes, shapes without numbers.

    Raises:
        Misfit: sizes that do not fit together.
    """
    try:
        return nnx.eval_shape(lambda: Mask2Former(config, channels, rngs=Rngs(0)))
    except ValueError as error:
        raise Misfit(f"the sizes of its tensors do not fit together: {error}") from error


def about(config: Mask2FormerConfig, channels: tuple[int, ...]) -> dict[str, Any]:
    """What a converted file says beside its tensors, so that its head can be built."""
    return {"config": dataclasses.asdict(config), "channels": channels}


def described(config: Mask2FormerConfig, channels: tuple[int, ...]) -> str:
    """Sizes in words."""
    return (
        f"{config.num_classes} classes, {config.queries} queries, {config.layers} layers after"
        f" {config.pixel_layers} of the pixel decoder, {config.hidden} channels, {config.heads}"
        f" heads; reads feature maps of {' '.join(map(str, channels))} channels, finest first"
    )


def _ours(layout: Layout, name: str) -> str | None:
    """What the tensor of this name is, or is a part of, in jaxdg."""
    for row in layout.rows:
        for source in row.source:
            match = re.fullmatch(re.escape(source).replace(r"\*", r"(\d+)"), name)
            if match:
                return row.target.replace("*", "{}").format(*match.groups())
    return None


def _sizes(
    shapes: Mapping[str, tuple[int, ...]], rows: int, columns: int
) -> tuple[Mask2FormerConfig, tuple[int, ...]]:
    """Sizes by vote, so that one tensor amiss is told as such; a size that no tensor tells is the
    default's, and they are told as missing.

    Args:
        shapes: by jaxdg's names.
        rows: the axis of outputs in kernels and biases.
        columns: the axis of inputs in kernels.
    """

    def length(pattern: str, axis: int, default: int) -> int:
        votes = Counter(
            shape[axis]
            for name, shape in shapes.items()
            if re.fullmatch(pattern, name) and len(shape) > max(axis, 0)
        )
        return votes.most_common(1)[0][0] if votes else default

    def count(pattern: str, default: int) -> int:
        return len({match[1] for name in shapes if (match := re.match(pattern, name))}) or default

    default = Mask2FormerConfig(num_classes=1)
    fine = r"pixel_decoder\.adapter_1\.conv\.kernel"
    coarse = [rf"pixel_decoder\.input_proj\.{i}\.conv\.kernel" for i in reversed(range(LEVELS))]
    config = Mask2FormerConfig(
        num_classes=length(r"class_embed\..+", rows, default.num_classes + 1) - 1,
        hidden=length(r".+norm\d?\..+", 0, default.hidden),
        queries=length(r"query_(feat|embed)", 0, default.queries),
        heads=max(
            length(r".+\.attention_weights\..+", rows, default.heads * LEVELS * POINTS)
            // (LEVELS * POINTS),
            1,
        ),
        pixel_layers=count(r"pixel_decoder\.layers\.(\d+)\.", default.pixel_layers),
        pixel_ffn=length(r"pixel_decoder\.layers\.\d+\.linear1\..+", rows, default.pixel_ffn),
        layers=count(r"layers\.(\d+)\.", default.layers),
        ffn=length(r"layers\.\d+\.linear1\..+", rows, default.ffn),
        sampling_points=POINTS,
    )
    return config, tuple(length(pattern, columns, default.hidden) for pattern in (fine, *coarse))
