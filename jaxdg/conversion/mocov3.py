"""MoCo-v3: the names of its authors' training checkpoints, of MMSelfSup (also its backbone alone)
and of timm.
"""

from jaxdg.backbones import MocoV3Config
from jaxdg.conversion import vit
from jaxdg.conversion.mapping import Layout
from jaxdg.conversion.names import renamed

NORM = "final norm: dense features are read before it"
MOMENTUM = "the momentum encoder, the average of the encoder over training"
HEADS = "projector and predictor of the contrastive loss, or a classifier"
OPEN_MMLAB = (
    ("blocks.", "layers."),
    ("norm1", "ln1"),
    ("norm2", "ln2"),
    ("patch_embed.proj", "patch_embed.projection"),
    ("mlp.fc1", "ffn.layers.0.0"),
    ("mlp.fc2", "ffn.layers.1"),
)


def layouts(config: MocoV3Config) -> tuple[Layout, ...]:
    """All layouts of the model of `config`; the first is that of its usual file: the authors
    publish no encoder of 24 blocks.
    """
    timm = vit.timm()
    authors = renamed(
        timm.rows,
        "MoCo-v3",
        (),
        (
            (r"module\.base_encoder\.norm\.(weight|bias)", NORM),
            (r"module\.momentum_encoder\..+", MOMENTUM),
            (r"module\.(base_encoder\.head|predictor)\..+", HEADS),
        ),
        prefix="module.base_encoder.",
    )
    mmselfsup = renamed(
        timm.rows,
        "MMSelfSup",
        OPEN_MMLAB,
        (
            (r"backbone\.ln1\.(weight|bias)", NORM),
            (r"momentum_encoder\..+", MOMENTUM),
            (r"(neck|head)\..+", HEADS),
        ),
        prefix="backbone.",
    )
    backbone = renamed(
        timm.rows, "MMSelfSup_backbone", OPEN_MMLAB, ((r"ln1\.(weight|bias)", NORM),)
    )
    usual = (mmselfsup, authors) if config.depth == 24 else (authors, mmselfsup)
    return *usual, backbone, timm
