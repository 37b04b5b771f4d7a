"""SegFormer's Mix Transformers: the names of NVlabs' files, which hold the encoder or a whole
segmenter, and those of transformers.
"""

import numpy as np

from jaxdg.conversion.mapping import CONV, LINEAR, SAME, Layout, Row, Transform

CLASSIFIER = "classifier of the pre-training: dense features are read before it"
DECODER = "the decoder of a segmenter, whose encoder alone is converted"

# Parts with a weight and a bias: their names in jaxdg, NVlabs' and transformers', and what becomes
# of the weight.
STAGE = (
    ("patch_embed{}.proj", "patch_embed{}.proj", "patch_embeddings.{}.proj", CONV),
    ("patch_embed{}.norm", "patch_embed{}.norm", "patch_embeddings.{}.layer_norm", SAME),
    ("norm{}", "norm{}", "layer_norm.{}", SAME),
)
BLOCK = (
    ("norm1", "norm1", "layer_norm_1", SAME),
    ("attn.q", "attn.q", "attention.self.query", LINEAR),
    ("attn.sr", "attn.sr", "attention.self.sr", CONV),
    ("attn.norm", "attn.norm", "attention.self.layer_norm", SAME),
    ("attn.proj", "attn.proj", "attention.output.dense", LINEAR),
    ("norm2", "norm2", "layer_norm_2", SAME),
    ("mlp.fc1", "mlp.fc1", "mlp.dense1", LINEAR),
    ("mlp.dwconv", "mlp.dwconv.dwconv", "mlp.dwconv.dwconv", CONV),
    ("mlp.fc2", "mlp.fc2", "mlp.dense2", LINEAR),
)
PAIR = Transform(lambda k, v: np.concatenate([k, v]).T, lambda kernel: tuple(np.split(kernel.T, 2)))
PAIR_BIAS = Transform(lambda k, v: np.concatenate([k, v]), lambda bias: tuple(np.split(bias, 2)))


def layouts() -> tuple[Layout, ...]:
    """NVlabs' encoder alone, their encoder within a segmenter, and transformers, of either kind."""
    return (
        Layout("SegFormer encoder", nvlabs(""), ((r"head\.(weight|bias)", CLASSIFIER),)),
        Layout("SegFormer", nvlabs("backbone."), ((r"decode_head\..+", DECODER),)),
        Layout(
            "transformers",
            transformers(),
            ((r"classifier\.(weight|bias)", CLASSIFIER), (r"decode_head\..+", DECODER)),
        ),
    )


def nvlabs(prefix: str) -> tuple[Row, ...]:
    """The rows of `mit_b*.pth` ("") or of `segformer.b*.pth` ("backbone.")."""
    parts = [
        (ours.format("*"), theirs.format("*"), transform) for ours, theirs, _, transform in STAGE
    ]
    parts += [
        (f"block*.*.{ours}", f"block*.*.{theirs}", transform)
        for ours, theirs, _, transform in BLOCK
    ]
    parts += [("block*.*.attn.kv", "block*.*.attn.kv", LINEAR)]
    return tuple(
        row for ours, theirs, transform in parts for row in pair(ours, prefix + theirs, transform)
    )


def transformers() -> tuple[Row, ...]:
    """The rows of `nvidia/mit-b*` and `nvidia/segformer-*`, where stages count from 0, and keys and
    values are apart.
    """
    rows: list[Row] = []
    for stage in range(4):
        root = "segformer.encoder."
        block = f"segformer.encoder.block.{stage}.*."
        ours = f"block{stage + 1}.*."
        for mine, _, theirs, transform in STAGE:
            rows += pair(mine.format(stage + 1), root + theirs.format(stage), transform)
        for mine, _, theirs, transform in BLOCK:
            rows += pair(ours + mine, block + theirs, transform)
        for kind, theirs, transform in (("kernel", "weight", PAIR), ("bias", "bias", PAIR_BIAS)):
            sources = (
                f"{block}attention.self.key.{theirs}",
                f"{block}attention.self.value.{theirs}",
            )
            rows.append(Row(sources, f"{ours}attn.kv.{kind}", transform))
    return tuple(rows)


def pair(ours: str, theirs: str, transform: Transform) -> tuple[Row, Row]:
    """The rows of a part's weight and bias."""
    kind = "scale" if transform is SAME else "kernel"
    return Row((f"{theirs}.weight",), f"{ours}.{kind}", transform), Row(
        (f"{theirs}.bias",), f"{ours}.bias", SAME
    )
