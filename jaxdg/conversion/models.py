"""Which tables belong to which model, what models there are, and which of them a file is of."""

from collections.abc import Sequence
import difflib

from flax import nnx

from jaxdg import backbones
from jaxdg.conversion import (
    clip,
    clip_resnet,
    clip_text,
    clip_the_gap,
    deit3,
    dinov2,
    dinov3,
    eva02,
    faster_rcnn,
    latent_diffusion,
    mapping,
    mask2former,
    mgrnet,
    mit,
    mocov3,
    rein,
    sam,
    siglip,
    soma,
    tqdm,
    vfmnet,
    vit,
    vitdet,
    vltseg,
    wrappers,
)
from jaxdg.conversion.checkpoint import Checkpoint
from jaxdg.tracing import Rngs

TYPES: dict[str, type] = {  # what transformers' config.json calls encoders that are here
    "clip": backbones.ClipVitConfig,
    "clip_vision_model": backbones.ClipVitConfig,
    "siglip": backbones.SiglipConfig,
    "siglip_vision_model": backbones.SiglipConfig,
    "siglip2": backbones.SiglipConfig,
    "siglip2_vision_model": backbones.SiglipConfig,
    "segformer": backbones.MitConfig,
    "dinov2": backbones.Dinov2Config,
    "dinov2_with_registers": backbones.Dinov2Config,
    "dinov3_vit": backbones.Dinov3Config,
    "vit": backbones.VitConfig,
    "sam": backbones.SamConfig,
    "sam_vision_model": backbones.SamConfig,
}
HEADS = {
    family.NAME: family for family in (mask2former, faster_rcnn)
}  # converted without an encoder, of the sizes of the file's tensors
# For planning alone.
PLANNED = (backbones.EvaClipConfig, backbones.Dinov2GiantConfig)
# Converted to a workdir. Of the second no tensor tells what it was trained on.
SOURCED = {family.NAME: family for family in (tqdm, vfmnet, mgrnet)}
WHOLE = {family.NAME: family for family in (vltseg, vitdet, clip_the_gap)} | SOURCED
ADAPTED = {family.NAME: family for family in (rein, soma)}  # likewise, with their encoder's file


def layouts(name: str) -> tuple[mapping.Layout, ...]:
    """The layouts in which checkpoints of the model called `name` are published; the first is the
    one torch users have.

    Raises:
        ValueError: an unknown name, or an encoder without published weights.
    """
    if name in HEADS:
        return HEADS[name].layouts()
    if name in backbones.TEXT_TOWERS:
        return clip_text.layouts(backbones.TEXT_TOWERS[name])
    if name not in backbones.ZOO:
        close = difflib.get_close_matches(
            name, [*backbones.ZOO, *backbones.TEXT_TOWERS, *HEADS, *WHOLE, *ADAPTED], n=1
        )
        raise ValueError(
            f"unknown model {name!r};"
            f" {f'did you mean {close[0]}?' if close else '--list shows all'}"
        )
    entry = backbones.entry(name)
    match entry.config:
        case config if isinstance(config, PLANNED):
            raise ValueError(
                f"{name} is for planning: its shapes tell how large a run would be, and its"
                " checkpoint is not converted"
            )
        case _ if not entry.source:
            raise ValueError(
                f"{name} is trained from scratch and has no published weights; --list shows the"
                " encoders that have"
            )
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
        case backbones.LatentDiffusionConfig():
            return latent_diffusion.layouts(entry.config)
    raise NotImplementedError(f"no table for {type(entry.config).__name__}")


def viewed(file: Checkpoint, name: str) -> tuple[Checkpoint, tuple[mapping.Layout, ...]]:
    """A file by the names of that layout of the model called `name` which fits it best, and the
    layouts as they are for this file.

    Raises:
        ValueError: as `layouts` and `wrappers.unwrapped` do.
    """
    known = layouts(name)
    entry = backbones.ZOO.get(name)
    if entry and isinstance(entry.config, backbones.LatentDiffusionConfig):
        file, known = latent_diffusion.prepared(file, entry.config)
    return wrappers.unwrapped(file, known), known


def abstract(name: str) -> nnx.Module:
    """The encoder or text tower called `name` at full depth, shapes without numbers."""
    if name in backbones.TEXT_TOWERS:
        return nnx.eval_shape(lambda: backbones.ClipText(backbones.TEXT_TOWERS[name], rngs=Rngs(0)))
    return nnx.eval_shape(lambda: backbones.create(name))


def converted_encoders() -> list[str]:
    """Names of the zoo whose published checkpoints can be converted."""
    return [
        name
        for name, entry in backbones.ZOO.items()
        if entry.source and not isinstance(entry.config, PLANNED)
    ]


def identified(file: Checkpoint) -> str:
    """The encoder whose checkpoint a file is, or one of `HEADS`, `ADAPTED`, `SOURCED`, `vitdet`
    or `clip_the_gap`, as far as names and shapes tell.

    Of a file that holds two towers the image's is meant; of one that fits several models, those of
    its own image size, and of these the model that uses most of it.

    Raises:
        ValueError: none fits, or several do and are named, or the file holds several sets of
            weights.
    """
    for prefixes, name in (  # of any size
        ((".sem_seg_head.", ".model.transformer_module."), mask2former.NAME),
        ((".rpn.head.",), faster_rcnn.NAME),
        ((".roi_heads.clip_im_predictor.",), clip_the_gap.NAME),
        ((".backbone.simfp_",), vitdet.NAME),
        ((".context_decoder.memory_proj.",), tqdm.NAME),
        ((".aux_decoder.seg_logits_embed.",), mgrnet.NAME),
        ((".attn.qkv.lora_A.default.weight",), vfmnet.NAME),
        ((".backbone.reins.",), rein.NAME),
        ((".lora_A.weight",), soma.NAME),
    ):
        if any(prefix in f".{key}" for key in file.names for prefix in prefixes):
            return name
    best, undecided = _best(file)
    if len(best) == 1:
        return best[0]
    if best:
        raise ValueError(
            f"its tensors are those of {' and of '.join(best)}; say with --model which of them"
            " it is"
        )
    if undecided:
        raise undecided
    if {"jaxdg", "layout"} <= file.about.keys():
        raise ValueError(
            f"it is converted already, as {file.about['model']}; give it as model.weights"
        )
    raise ValueError(
        "its tensors are those of no model that --list shows; say with --model what it should be,"
        " to be told what differs"
    )


def likely(file: Checkpoint, name: str) -> str:
    """What a file that is no checkpoint of `name` is instead, to be told after that; nothing where
    it cannot be told.
    """
    if {"jaxdg", "layout"} <= file.about.keys():
        return f", it is converted already, as {file.about.get('model')}"
    best = [other for other in _best(file)[0] if other != name]
    text = [
        other
        for other in backbones.TEXT_TOWERS
        if other != name and not best and _fits(file, other)
    ]
    return f", it is one of {' or '.join(best + text)}" if best + text else ""


def _best(file: Checkpoint) -> tuple[list[str], wrappers.Undecided | None]:
    """The encoders that a file fits best, and why it cannot be told of some."""
    fitting: dict[str, tuple[bool, bool, int]] = {}
    undecided = None
    for name in converted_encoders():
        try:
            view, known = viewed(file, name)
        except wrappers.Undecided as error:
            undecided = error
            continue
        as_told = view.names == file.names
        for layout in known:
            if (
                _may_be(name, layout, view)
                and _may_be_by_config(file, name)
                and (converted := _converted(name, layout, view))
            ):
                shapes = mapping.source_shapes(abstract(name), layout)
                exact = all(view.read(key).shape == shape for key, shape in shapes.items())
                fit = (exact, as_told, len(view.names) - len(converted.left_out))
                fitting[name] = max(fitting.get(name, fit), fit)
    if file.scripted:
        fitting = {
            name: fit
            for name, fit in fitting.items()
            if getattr(backbones.entry(name).config, "activation", "") != "gelu"
        }
    return [name for name, fit in fitting.items() if fit == max(fitting.values())], undecided


def check_names(file: Checkpoint, name: str) -> None:
    """Refuses a file for `name` whose names fit that only when something is taken off, while they
    are those of another model as they are.

    MoCo-v3's encoder behind its `module.base_encoder.` has all tensors of a plain vision
    transformer, but reads other pixel statistics.

    Raises:
        Misfit: the others by name.
    """
    others = [
        other
        for other in converted_encoders()
        if any(_may_be(other, layout, file) for layout in layouts(other))
    ]
    if others and name not in others:
        raise mapping.Misfit(
            f"its names are those of {' and of '.join(others)}; say that with --model"
        )


def check_config(file: Checkpoint, name: str) -> None:
    """Refuses an encoder that the config.json beside a file of transformers says it is not of,
    where the tensors do not tell.

    MAE's encoder has the names and shapes of a plain vision transformer, and CLIP's are the same
    for either activation.

    Raises:
        Misfit: what it says.
    """
    config = file.config()
    kind = config.get("model_type")
    if not isinstance(kind, str) or name in HEADS:
        return
    text = backbones.TEXT_TOWERS.get(name)
    ours = text or backbones.entry(name).config
    if text is None and type(ours) is not TYPES.get(kind):
        known = "another model" if kind in TYPES else "a model that is not here"
        raise mapping.Misfit(
            f"the config.json beside it says {kind}, {known}, though names may be the same"
        )
    tower = config.get("text_config" if text else "vision_config") or config
    theirs = tower.get("hidden_act")
    mine = getattr(ours, "activation", None)
    if mine and theirs and theirs != mine:
        raise mapping.Misfit(
            f"the config.json beside it says hidden_act {theirs}, and {name} computes {mine};"
            " --list shows both"
        )


def _fits(file: Checkpoint, name: str) -> bool:
    try:
        view, known = viewed(file, name)
    except wrappers.Undecided:
        return False
    return any(_may_be(name, layout, view) and _converted(name, layout, view) for layout in known)


def _may_be_by_config(file: Checkpoint, name: str) -> bool:
    try:
        check_config(file, name)
    except mapping.Misfit:
        return False
    return True


def _may_be(name: str, layout: mapping.Layout, view: Checkpoint) -> bool:
    """Whether names, number and width of blocks are those of a model: quick, where building the
    model's shapes takes a second.
    """
    names = set(view.names)
    if not names >= {
        source for row in layout.rows for source in row.source if "*" not in source
    } or not layout.covers(names):
        return False
    config = backbones.TEXT_TOWERS.get(name) or backbones.entry(name).config
    row = next(
        (
            row
            for row in layout.rows
            if row.target == "blocks.*.norm1.scale" and "*" in row.source[0]
        ),
        None,
    )
    if row is None:
        return True
    first = row.source[0].replace("*", "{}")
    if first.format(config.depth - 1) not in names or first.format(config.depth) in names:
        return False
    return view.read(first.format(0)).shape == (getattr(config, "width", 0),)


def _converted(name: str, layout: mapping.Layout, view: Checkpoint) -> mapping.Converted | None:
    try:
        return mapping.to_flax(abstract(name), (layout,), view.names, view.read)
    except mapping.Misfit:
        return None


def listed() -> list[tuple[str, str, str, str]]:
    """Every model with published weights: name, megabytes, licence, where to get it."""
    rows = [
        (name, f"{entry.megabytes} MB", entry.licence, entry.source)
        for name, entry in backbones.ZOO.items()
        if entry.source
    ]
    for name in backbones.TEXT_TOWERS:
        entry = backbones.entry(image := name.removesuffix("_text"))
        rows.append(
            (
                name,
                f"{entry.megabytes} MB",
                entry.licence,
                f"the file of {image}, where it holds both towers",
            )
        )
    return rows + [(name, *family.LISTED) for name, family in (HEADS | WHOLE | ADAPTED).items()]


def listing() -> str:
    """What `listed` tells, as a table."""
    return table(listed())


def table(rows: Sequence[tuple[str, ...]]) -> str:
    """Rows as text, with all columns but the last of one width."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)][:-1]
    return "\n".join(
        "  ".join([*(cell.ljust(width) for cell, width in zip(row, widths, strict=False)), row[-1]])
        for row in rows
    )
