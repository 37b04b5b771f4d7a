"""Which tables belong to which model, what models there are, and which of them a file is of."""

from flax import nnx

from conversion import (
    clip,
    clip_resnet,
    clip_text,
    deit3,
    dinov2,
    dinov3,
    eva02,
    faster_rcnn,
    mapping,
    mask2former,
    mit,
    mocov3,
    sam,
    siglip,
    vit,
    vitdet,
    vltseg,
)
from conversion.checkpoint import Checkpoint
from jaxdg import backbones

HEADS = {family.NAME: family for family in (mask2former, faster_rcnn)}  # converted without an encoder, of the sizes of the file's tensors
PLANNED = backbones.EvaClipConfig, backbones.Dinov2GiantConfig  # for planning alone
WHOLE = {family.NAME: family for family in (vltseg, vitdet)}  # converted to a workdir


def layouts(name: str) -> tuple[mapping.Layout, ...]:
    """The layouts in which checkpoints of the model called `name` are published; the first is the one torch users have.

    Raises:
        ValueError: an unknown name, or an encoder without published weights.
    """
    if name in HEADS:
        return HEADS[name].layouts()
    if name in backbones.TEXT_TOWERS:
        return clip_text.layouts(backbones.TEXT_TOWERS[name])
    entry = backbones.entry(name)
    match entry.config:
        case config if isinstance(config, PLANNED):
            raise ValueError(f"{name} is for planning: its shapes tell how large a run would be, and its checkpoint is not converted")
        case _ if not entry.source:
            raise ValueError(f"{name} is trained from scratch and has no published weights; --list shows the encoders that have")
        case backbones.Eva02Config():
            return eva02.layouts(entry.config)
        case backbones.ClipVitConfig():
            return clip.layouts()
        case backbones.ClipResnetConfig():
            return clip_resnet.layouts()
        case backbones.MitConfig():
            return mit.layouts()
        case backbones.SamConfig():
            return sam.layouts()
        case backbones.MocoV3Config():
            return mocov3.layouts(entry.config)
        case backbones.Deit3Config():
            return deit3.layouts()
        case backbones.Dinov2Config():
            return dinov2.layouts(entry.config)
        case backbones.Dinov3Config():
            return dinov3.layouts(entry.config)
        case backbones.SiglipConfig():
            return siglip.layouts(entry.config)
        case backbones.VitConfig():
            return vit.layouts(entry.config)
    raise NotImplementedError(f"no table for {type(entry.config).__name__}")


def abstract(name: str) -> nnx.Module:
    """The encoder or text tower called `name` at full depth, shapes without numbers."""
    if name in backbones.TEXT_TOWERS:
        return nnx.eval_shape(lambda: backbones.ClipText(backbones.TEXT_TOWERS[name], rngs=nnx.Rngs(0)))
    return nnx.eval_shape(lambda: backbones.create(name))


def converted_encoders() -> list[str]:
    """Names of the zoo whose published checkpoints can be converted."""
    return [name for name, entry in backbones.ZOO.items() if entry.source and not isinstance(entry.config, PLANNED)]


def identified(file: Checkpoint, openai: bool) -> str:
    """The encoder whose checkpoint a file is, or one of `HEADS` or `vitdet`, as far as names and shapes tell.

    Of a file that holds two towers the image's is meant; of one that fits several models, those of its own image size, and of these the
    model that uses most of it.

    Args:
        file: the open checkpoint.
        openai: whether it is an archive as OpenAI publishes, which tells the activation that the tensors do not.

    Raises:
        ValueError: none fits, or several do and are named.
    """
    fitting: dict[str, tuple[bool, int]] = {}
    for name in converted_encoders():
        for layout in layouts(name):
            if not layout.covers(file.names):
                continue
            module = abstract(name)
            try:
                converted = mapping.to_flax(module, (layout,), file.names, file.read)
            except mapping.Misfit:
                continue
            exact = all(file.read(key).shape == shape for key, shape in mapping.source_shapes(module, layout).items())
            fitting[name] = max(fitting.get(name, (False, 0)), (exact, len(file.names) - len(converted.left_out)))
    if openai:
        fitting = {name: fit for name, fit in fitting.items() if getattr(backbones.entry(name).config, "activation", "") != "gelu"}
    best = [name for name, fit in fitting.items() if fit == max(fitting.values())]
    if len(best) == 1:
        return best[0]
    if best:
        raise ValueError(f"its tensors are those of {' and of '.join(best)}; say with --model which of them it is")
    for prefixes, name in (  # of any size
        (("sem_seg_head.", "model.transformer_module."), mask2former.NAME),
        ("rpn.head.", faster_rcnn.NAME),
        ("backbone.simfp_", vitdet.NAME),
    ):
        if any(key.startswith(prefixes) for key in file.names):
            return name
    raise ValueError("its tensors are those of no model that --list shows; say with --model what it should be, to be told what differs")


def listing() -> str:
    """Every model with published weights: name, megabytes, licence, where to get it."""
    rows = [(name, f"{entry.megabytes} MB", entry.licence, entry.source) for name, entry in backbones.ZOO.items() if entry.source]
    for name in backbones.TEXT_TOWERS:
        entry = backbones.entry(image := name.removesuffix("_text"))
        rows.append((name, f"{entry.megabytes} MB", entry.licence, f"the file of {image}, where it holds both towers"))
    rows += [(name, *family.LISTED) for name, family in (HEADS | WHOLE).items()]
    widths = [max(len(row[i]) for row in rows) for i in range(3)]
    return "\n".join("  ".join([*(cell.ljust(width) for cell, width in zip(row, widths, strict=False)), row[3]]) for row in rows)
