"""Stable Diffusion 1.x and 2.x: diffusers' folders, CompVis' single files, and those of VPD's
training.

Of a published model the VAE's encoder and the UNet are taken as far as features depend on them.
What the UNet attends to is no tensor of it: the condition is computed of the text tower that lies
beside it. Names of the condition are VPD's, so that files on the way back hold it, where they hold
no text tower.
"""

from collections.abc import Callable, Iterable, Iterator
import functools
import os
import re
from typing import NamedTuple

from flax import nnx
import numpy as np

from jaxdg import weights
from jaxdg.backbones import LatentDiffusionConfig
from jaxdg.backbones.latent_diffusion import fresh
from jaxdg.conversion import clip_text, mapping, sets, wrappers
from jaxdg.conversion.checkpoint import Checkpoint
from jaxdg.conversion.clip import COUNTED
from jaxdg.conversion.mapping import CONV, LINEAR, SAME, Layout, Misfit, Row, Transform
from jaxdg.conversion.names import renamed
from jaxdg.data.labels import CITYSCAPES
from jaxdg.text.condition import CONDITIONS, Condition, ConditionConfig
from jaxdg.text.templates import IMAGENET
from jaxdg.tracing import Rngs

# A 1x1 convolution, which is a linear layer here.
POINT = Transform(lambda w: w[:, :, 0, 0].T, lambda k: (k.T[:, :, None, None],))

NOISE = "the prediction of the noise: features are read before it"
DECODER = "the VAE's decoder: images are only encoded"
TEXT = "the text tower: the condition is all that the UNet reads of it"
SCHEDULE = "the noise that training adds: it follows from the step"
OTHER = "the other of the UNet's two sets of weights; --weights ema takes the average"
LAST = "the last block: version 2 reads the tokens before it"
JOINT = "for the joint space with images"

UNET = "model.diffusion_model."
VAE = "first_stage_model."
AVERAGE = "model_ema."
TOWER = re.compile(r"(^|\.)(text_encoder|cond_stage_model)\.")
ROWS = "class_embeddings"  # VPD's name of the condition
SCHEDULES = (
    r"betas|alphas_cumprod(_prev)?|sqrt_(one_minus_|recip_|recipm1_)?alphas_cumprod"
    r"|log_one_minus_alphas_cumprod|posterior_(variance|log_variance_clipped|mean_coef[12])"
    r"|logvar|lvlb_weights|scale_factor"
)

# Parts by their names in jaxdg, which are diffusers', and in CompVis' files.
RESNET = (
    ("norm1", "in_layers.0", SAME),
    ("conv1", "in_layers.2", CONV),
    ("time_emb_proj", "emb_layers.1", LINEAR),
    ("norm2", "out_layers.0", SAME),
    ("conv2", "out_layers.3", CONV),
)
VAE_RESNET = tuple(
    (name, name, transform)
    for name, transform in (("norm1", SAME), ("conv1", CONV), ("norm2", SAME), ("conv2", CONV))
)
MIDDLE = "vae.encoder.mid_block.attentions.0."
VAE_ATTENTION = (("to_q", "q"), ("to_k", "k"), ("to_v", "v"), ("to_out.0", "proj_out"))
OLD = (("to_q", "query"), ("to_k", "key"), ("to_v", "value"), ("to_out.0", "proj_attn"))


class Layer(NamedTuple):
    """A layer with its name in jaxdg and in CompVis' files.

    Attributes:
        ours: below `unet.` or `vae.`, as in diffusers.
        theirs: in CompVis' files.
        transform: of the weight, from diffusers' file.
        flat: whether it is linear there, and a 1x1 convolution in CompVis' file.
        bias: whether it has one.
    """

    ours: str
    theirs: str
    transform: Transform
    flat: bool = False
    bias: bool = True


@functools.cache
def layouts(config: LatentDiffusionConfig) -> tuple[Layout, ...]:
    """All layouts of the model of `config`, with the condition among the tensors; see `prepared`
    for published files.
    """
    layers = [*_unet(config), *_vae(config)]
    beside = _condition(config)
    diffusers = Layout(
        "diffusers",
        (*_rows(layers, ours=True), *beside),
        (
            (r"unet\.conv_(norm_)?out\.(weight|bias)", NOISE),
            (r"vae\.(decoder|post_quant_conv)\..+", DECODER),
            (r"text_encoder\..+", TEXT),
        ),
        note="the names of the files in unet/ and vae/ behind these words",
    )
    compvis = Layout(
        "CompVis",
        (*_rows(layers, ours=False), *beside),
        (
            (rf"{re.escape(UNET)}out\.[02]\.(weight|bias)", NOISE),
            (rf"{re.escape(VAE)}(decoder|post_quant_conv|loss)\..+", DECODER),
            (r"cond_stage_model\..+", TEXT),
            (re.escape(AVERAGE) + ".+", OTHER),
            (SCHEDULES, SCHEDULE),
        ),
    )
    old = [(MIDDLE + ours, MIDDLE + theirs) for ours, theirs in OLD]
    before = renamed(diffusers.rows, "diffusers_old", old, diffusers.left_out)
    found = (diffusers, before._replace(note=diffusers.note), compvis)
    return (*found, _vpd(compvis)) if config.learned else found


def _vpd(compvis: Layout) -> Layout:
    """A segmentation model of VPD's authors, without its decoder."""
    pairs = ((UNET, "unet.unet.diffusion_model."), (VAE, "encoder_vq."))
    left_out = (
        (r"encoder_vq\.(post_quant_conv|loss)\..+", DECODER),
        (rf"sd_model\.({SCHEDULES})", SCHEDULE),
        (r"(neck|decode_head|auxiliary_head)\..+", "their decoder of masks"),
    )
    return renamed(compvis.rows, "VPD", pairs, left_out)


def _rows(layers: Iterable[Layer], ours: bool) -> Iterator[Row]:
    """The rows of layers by diffusers' names, or by CompVis'."""
    for layer in layers:
        theirs = layer.ours if ours else layer.theirs
        kind = "scale" if layer.transform is SAME else "kernel"
        transform = POINT if layer.flat and not ours else layer.transform
        yield Row((f"{theirs}.weight",), f"{layer.ours}.{kind}", transform)
        if layer.bias:
            yield Row((f"{theirs}.bias",), f"{layer.ours}.bias", SAME)


def _condition(config: LatentDiffusionConfig) -> list[Row]:
    """The rows of the condition, in every layout."""
    rows = [Row((ROWS,), "context", SAME)]
    if config.learned:
        rows.append(Row(("gamma",), "gamma", SAME))
        for layer in ("text_adapter.fc.0", "text_adapter.fc.2"):
            rows.append(Row((f"{layer}.weight",), f"{layer}.kernel", LINEAR))
            rows.append(Row((f"{layer}.bias",), f"{layer}.bias", SAME))
    return rows


def _unet(config: LatentDiffusionConfig) -> Iterator[Layer]:
    """The layers of the UNet; CompVis counts blocks and samplers through all levels."""
    c = config
    projection = POINT if _tower(c).fills_with_end else LINEAR  # of version 1, and of version 2

    def resnet(ours: str, theirs: str, shortcut: bool) -> Iterator[Layer]:
        for mine, name, transform in RESNET:
            yield Layer(f"unet.{ours}.{mine}", f"{UNET}{theirs}.{name}", transform)
        if shortcut:
            yield Layer(f"unet.{ours}.conv_shortcut", f"{UNET}{theirs}.skip_connection", CONV)

    def transformer(ours: str, theirs: str) -> Iterator[Layer]:
        block = "transformer_blocks.0."
        parts = [("norm", SAME, True), ("proj_in", projection, True)]
        for attention in ("attn1", "attn2"):
            parts += [(f"{block}{attention}.to_{part}", LINEAR, False) for part in "qkv"]
            parts.append((f"{block}{attention}.to_out.0", LINEAR, True))
        parts += [(f"{block}ff.net.{part}", LINEAR, True) for part in ("0.proj", "2")]
        parts += [(f"{block}norm{i}", SAME, True) for i in (1, 2, 3)]
        for name, transform, bias in (*parts, ("proj_out", projection, True)):
            mine = f"unet.{ours}.{name}"
            yield Layer(mine, f"{UNET}{theirs}.{name}", transform, bias=bias)

    for i in (1, 2):
        mine = f"unet.time_embedding.linear_{i}"
        yield Layer(mine, f"{UNET}time_embed.{2 * i - 2}", LINEAR)
    yield Layer("unet.conv_in", f"{UNET}input_blocks.0.0", CONV)
    n = 1
    for i, count in enumerate(c.blocks):
        widens = i > 0 and c.widths[i] != c.widths[i - 1]
        for j in range(count):
            at = f"input_blocks.{n}"
            yield from resnet(f"down_blocks.{i}.resnets.{j}", f"{at}.0", widens and j == 0)
            if i < 3:
                yield from transformer(f"down_blocks.{i}.attentions.{j}", f"{at}.1")
            n += 1
        if i < 3:
            mine = f"unet.down_blocks.{i}.downsamplers.0.conv"
            yield Layer(mine, f"{UNET}input_blocks.{n}.0.op", CONV)
            n += 1
    yield from resnet("mid_block.resnets.0", "middle_block.0", False)
    yield from transformer("mid_block.attentions.0", "middle_block.1")
    yield from resnet("mid_block.resnets.1", "middle_block.2", False)
    n = 0
    for i, count in enumerate(reversed(c.blocks)):
        for j in range(count + 1):
            at = f"output_blocks.{n}"
            yield from resnet(f"up_blocks.{i}.resnets.{j}", f"{at}.0", True)
            if i:
                yield from transformer(f"up_blocks.{i}.attentions.{j}", f"{at}.1")
            if i < 3 and j == count:
                mine = f"unet.up_blocks.{i}.upsamplers.0.conv"
                yield Layer(mine, f"{UNET}{at}.{2 if i else 1}.conv", CONV)
            n += 1


def _vae(config: LatentDiffusionConfig) -> Iterator[Layer]:
    """The layers of the VAE's encoder."""
    encoder = f"{VAE}encoder."

    def layer(ours: str, theirs: str, transform: Transform = CONV, flat: bool = False) -> Layer:
        return Layer(f"vae.encoder.{ours}", encoder + theirs, transform, flat)

    def resnet(ours: str, theirs: str, shortcut: bool) -> Iterator[Layer]:
        for mine, name, transform in VAE_RESNET:
            yield layer(f"{ours}.{mine}", f"{theirs}.{name}", transform)
        if shortcut:
            yield layer(f"{ours}.conv_shortcut", f"{theirs}.nin_shortcut")

    yield layer("conv_in", "conv_in")
    widths = config.vae_widths
    for i, (inside, outside) in enumerate(zip((widths[0], *widths), widths, strict=False)):
        for j in (0, 1):
            widens = j == 0 and inside != outside
            yield from resnet(f"down_blocks.{i}.resnets.{j}", f"down.{i}.block.{j}", widens)
        if i < 3:
            yield layer(f"down_blocks.{i}.downsamplers.0.conv", f"down.{i}.downsample.conv")
    for i in (0, 1):
        yield from resnet(f"mid_block.resnets.{i}", f"mid.block_{i + 1}", False)
    middle = MIDDLE.removeprefix("vae.encoder.")
    yield layer(f"{middle}group_norm", "mid.attn_1.norm", SAME)
    for ours, theirs in VAE_ATTENTION:
        yield layer(middle + ours, f"mid.attn_1.{theirs}", LINEAR, flat=True)
    yield layer("conv_norm_out", "norm_out", SAME)
    yield layer("conv_out", "conv_out")
    yield Layer("vae.quant_conv", f"{VAE}quant_conv", CONV)


def prepared(
    file: Checkpoint, config: LatentDiffusionConfig
) -> tuple[Checkpoint, tuple[Layout, ...]]:
    """A file with the UNet's weights that are wanted, and the layouts for it.

    Of a file without the condition the layouts compute it when it is asked for, and make what else
    no pre-training has.

    Raises:
        ValueError: when the condition is asked for, that of a text tower that is not whole or does
            not fit; it is told what of it.
    """
    known = layouts(config)
    if file.wanted == sets.EMA and any(name.startswith(AVERAGE) for name in file.names):
        file = _averaged(file)
    if any(name.split(".")[-1] == ROWS for name in file.names):
        return file, known
    makers: dict[str, Callable[[], np.ndarray]] = {
        name: lambda tensor=tensor: tensor for name, tensor in fresh(config).items()
    }
    makers["context"] = functools.cache(functools.partial(_computed, file, config))
    words = (
        f"{len(IMAGENET)} sentences with each of Cityscapes' class names"
        if config.learned
        else "the empty prompt"
    )
    made = tuple(
        layout._replace(
            rows=tuple(
                Row((), row.target, Transform(makers[row.target], lambda _: ()))
                if row.target in makers
                else row
                for row in layout.rows
            )
        )
        for layout in known
    )
    return file._replace(notes=(*file.notes, f"condition: the text tower's, of {words}")), made


def _averaged(file: Checkpoint) -> Checkpoint:
    """A file of CompVis' training whose two sets of weights of the UNet have changed places."""

    def read(name: str) -> np.ndarray:
        if name.startswith(UNET):  # theirs has no points in the names of an average
            name = AVERAGE + name.removeprefix("model.").replace(".", "")
        return file.read(name)

    note = f"weights: {AVERAGE[:-1]}, an average over the training, in place of {UNET[:-1]}"
    return file._replace(read=read, wanted=None, notes=(*file.notes, note))


def _tower(config: LatentDiffusionConfig) -> ConditionConfig:
    """The text tower of the version that a model is of, which the condition's channels tell."""
    width = config.context[1]
    for tower in CONDITIONS.values():
        if tower.width == width:
            return tower
    allowed = " or ".join(str(tower.width) for tower in CONDITIONS.values())
    raise ValueError(f"a condition of {width} channels is of no text tower; allowed: {allowed}")


def _towers(config: ConditionConfig) -> tuple[Layout, ...]:
    """How diffusers' folders and CompVis' files of both versions name the text tower's tensors."""

    def rows(layout: Layout) -> list[Row]:
        beside = ("logit_scale", "text_projection", "image_projection")
        return [row for row in layout.rows if not row.target.startswith(beside)]

    transformers = rows(clip_text.transformers())
    counted = ((r".+\.position_ids", COUNTED),)
    return (
        renamed(transformers, "diffusers", (), counted, "text_encoder."),
        renamed(transformers, "CompVis 1.x", (), counted, "cond_stage_model.transformer."),
        renamed(
            rows(clip_text.openai("open_clip", "", ())),
            "CompVis 2.x",
            (),
            (
                (rf".+\.transformer\.resblocks\.{config.depth}\..+", LAST),
                (r".+\.(text_projection|logit_scale)", JOINT),
            ),
            "cond_stage_model.model.",
        ),
    )


def _computed(file: Checkpoint, config: LatentDiffusionConfig) -> np.ndarray:
    """The condition of a file's text tower.

    Raises:
        ValueError: see `prepared`.
    """
    where = f"{os.path.commonpath(file.files)}: the condition is that of the file's text tower, and"
    c = _tower(config)
    names = [name for name in file.names if TOWER.search(name)]
    if not names:
        raise ValueError(f"{where} there is none; take a file that holds the whole model")
    tower = nnx.eval_shape(lambda: Condition(c, rngs=Rngs(0)))
    known = _towers(c)
    view = wrappers.unwrapped(file._replace(names=names, wanted=None), known)
    try:
        found = mapping.to_flax(tower, known, view.names, view.read)
    except Misfit as error:
        raise ValueError(f"{where} this one does not fit: {error}") from error
    weights.fill(tower, found.tensors, "the text tower")
    rows = tower.class_names(CITYSCAPES.names, IMAGENET) if config.learned else tower.empty_prompt()
    if rows.shape != config.context:
        raise ValueError(f"the condition is {rows.shape}, and the encoder's is {config.context}")
    return rows
