"""Released models of Rein (w1oves/Rein) to a workdir: adapter and Mask2Former head from one file,
the frozen encoder from the file it was published in.

The authors' files hold `backbone.reins.*` and `decode_head.*`. Names of the head are mmdetection's,
as those of VLTSeg.
"""

from collections.abc import Sequence

from jaxdg import backbones
from jaxdg import config as config_lib
from jaxdg.config import Config
from jaxdg.conversion import adapted, vltseg
from jaxdg.conversion.checkpoint import Checkpoint
from jaxdg.conversion.mapping import SAME, Layout, Misfit, Row
from jaxdg.conversion.mask2former import DENSE, PARAMETER

NAME = "rein"
LISTED = (
    "94 MB",
    "GPL-3.0 (code)",
    (
        "iter_40000_published.pth and others in the releases of w1oves/Rein; --encoder is the file"
        " of DINOv2-L, EVA-02-L (MIM), CLIP-L or SAM-H; whole models, --out is a workdir"
    ),
)
ENCODERS = ("dinov2_l14", "eva02_l14", "clip_l14", "sam_h16")
TOKENS = "backbone.reins.learnable_tokens_a"
WIDTHS = "backbone.reins.learnable_tokens_b"
OWN_QUERIES = ("query_feat", "query_embed")  # of a plain head; here they come from the tokens
ADAPTER = (
    ("backbone.blocks.*.rein.learnable_tokens_a", "learnable_tokens_a", PARAMETER),
    ("backbone.blocks.*.rein.learnable_tokens_b", "learnable_tokens_b", PARAMETER),
    ("backbone.blocks.after.scale", "scale", PARAMETER),
    ("backbone.blocks.after.mlp_token2feat", "mlp_token2feat", DENSE),
    ("backbone.blocks.after.mlp_delta_f", "mlp_delta_f", DENSE),
    ("queries.transform", "transform", DENSE),
    ("queries.merge", "merge", DENSE),
)


def layouts() -> tuple[Layout, ...]:
    """The one layout, without the encoder."""
    rows = [
        Row((f"backbone.reins.{there}{ending}",), f"{here}{end}", transform)
        for here, there, kind in ADAPTER
        for ending, end, transform in kind
    ]
    rows += vltseg.rows_of("queries", "decode_head", [("querys2feat", "querys2feat", DENSE)])
    head = [row for row in vltseg.HEAD if row[0] not in OWN_QUERIES]
    rows += vltseg.rows_of("head", "decode_head", head)
    return (Layout("Rein", tuple(rows), ()),)


def encoders(file: Checkpoint) -> Sequence[str]:
    """The encoders that a file may belong to.

    Raises:
        Misfit: there is none of its width and depth.
    """
    if WIDTHS not in file.names:
        raise Misfit(f"1 missing ({WIDTHS})")
    shape = file.read(WIDTHS).shape
    sizes = {name: backbones.entry(name).config for name in ENCODERS}
    found = [
        name
        for name, config in sizes.items()
        if isinstance(config, backbones.VitConfig)
        and (config.depth, config.width) == (*shape[:1], *shape[2:])
    ]
    if not found:
        raise Misfit(
            f"{WIDTHS} is {shape}, of no encoder whose files are known ({', '.join(ENCODERS)})"
        )
    return found


def of_checkpoint(file: Checkpoint, encoder: adapted.Frozen, training: adapted.Training) -> Config:
    """The run that made a file; sizes are those of its tensors.

    Raises:
        Misfit: a tensor missing that tells a size.
        ValueError: sizes that no configuration has.
    """
    if TOKENS not in file.names or len(file.read(TOKENS).shape) != 3:
        raise Misfit(f"{TOKENS} is missing, or not of three axes")
    _, tokens, rank = file.read(TOKENS).shape
    c = adapted.run(file, NAME, encoder.name, training)
    c.model.mask2former.queries = tokens
    c.rein.tokens = tokens
    c.rein.rank = rank
    return config_lib.validated(c)


def layout(file: Checkpoint, encoder: adapted.Frozen) -> Layout:
    """The layout of a file with its encoder's tensors beside it."""
    (own,) = layouts()
    beside = (
        Row(
            (f"{adapted.BESIDE}{key}",),
            f"backbone.{key}",
            SAME,
            resized=".rel_pos_" in key,  # as SAM does it itself
        )
        for key in encoder.tensors
    )
    return own._replace(rows=(*own.rows, *beside))


def check(file: Checkpoint, encoder: adapted.Frozen) -> None:
    """Nothing of the encoder is in the file, so nothing can contradict it."""
