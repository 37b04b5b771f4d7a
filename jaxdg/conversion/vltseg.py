"""Whole models of the public VLTSeg re-implementation (VLTSeg/VLTSeg) to a workdir: encoder,
pyramid and Mask2Former decoder.

Names are mmsegmentation's and mmdetection's. What a file does not tell is taken from
`configs/gta5_eva02_repro.py` and from the crop that its number of positions goes with.
"""

from collections.abc import Iterable, Mapping
import contextlib
import dataclasses
import json
import math
import os
from pathlib import Path
import re
import tempfile
from typing import Any

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np

from jaxdg import backbones, files, weights
from jaxdg import config as config_lib
from jaxdg.config import Config, Mask2FormerOptions
from jaxdg.conversion import eva02, mask2former
from jaxdg.conversion.checkpoint import Checkpoint
from jaxdg.conversion.mapping import SAME, Layout, Misfit, Row, Transform
from jaxdg.conversion.mask2former import (
    CONV1,
    CONV1_UNBIASED,
    CONV3_UNBIASED,
    DENSE,
    EMBEDDING,
    FUSED,
    NORM,
)
from jaxdg.tasks.run_state import extended, make_task
from jaxdg.training.checkpoint import Checkpoints
from jaxdg.training.step import TrainState

NAME = "vltseg"
LISTED = (
    "1351 MB",
    "CC-BY-NC-4.0",
    (
        "vltseg_checkpoint_*.pth, linked in the README of VLTSeg/VLTSeg; whole models, --out is a"
        " workdir"
    ),
)
ENCODER = "eva02_clip_l14_vltseg_repro"
POSITIONS = "backbone.pos_embed"
ABOUT = "conversion.json"  # in a workdir, what it was converted from
COUNT = "batches counted: the running statistics do not need it"


RECIPES = {
    36: "gta5_eva02",
    73: "cityscapes_eva02",
}  # what such models were most likely trained by, by rows of positions

DOUBLE = (  # a transposed convolution of 2x2 pixels: torch [in, out, i, j], here [i, j, in, out]
    (
        ".weight",
        ".kernel",
        Transform(lambda w: w.transpose(2, 3, 0, 1), lambda k: (k.transpose(2, 3, 0, 1),)),
    ),
    (".bias", ".bias", SAME),
)
STATISTICS = ((".running_mean", ".mean", SAME), (".running_var", ".var", SAME))
PYRAMID = (
    ("fpn1_up1", "fpn1.0", DOUBLE),
    ("fpn1_norm", "fpn1.1", (*NORM, *STATISTICS)),
    ("fpn1_up2", "fpn1.3", DOUBLE),
    ("fpn2", "fpn2.0", DOUBLE),
)

PIXEL = "pixel_decoder.encoder.layers.*"
LAYER = "transformer_decoder.layers.*"
# Names of the head in jaxdg, and below `decode_head.`.
HEAD = (
    ("pixel_decoder.input_proj.*.conv", "pixel_decoder.input_convs.*.conv", CONV1),
    ("pixel_decoder.input_proj.*.norm", "pixel_decoder.input_convs.*.gn", NORM),
    ("pixel_decoder.level_embed", "pixel_decoder.level_encoding", EMBEDDING),
    *(
        (f"pixel_decoder.layers.*.self_attn.{part}", f"{PIXEL}.self_attn.{part}", DENSE)
        for part in ("sampling_offsets", "attention_weights", "value_proj", "output_proj")
    ),
    ("pixel_decoder.layers.*.norm1", f"{PIXEL}.norms.0", NORM),
    ("pixel_decoder.layers.*.linear1", f"{PIXEL}.ffn.layers.0.0", DENSE),
    ("pixel_decoder.layers.*.linear2", f"{PIXEL}.ffn.layers.1", DENSE),
    ("pixel_decoder.layers.*.norm2", f"{PIXEL}.norms.1", NORM),
    ("pixel_decoder.adapter_1.conv", "pixel_decoder.lateral_convs.0.conv", CONV1_UNBIASED),
    ("pixel_decoder.adapter_1.norm", "pixel_decoder.lateral_convs.0.gn", NORM),
    ("pixel_decoder.layer_1.conv", "pixel_decoder.output_convs.0.conv", CONV3_UNBIASED),
    ("pixel_decoder.layer_1.norm", "pixel_decoder.output_convs.0.gn", NORM),
    ("pixel_decoder.mask_features", "pixel_decoder.mask_feature", CONV1),
    *(
        (f"layers.*.{part}.in_proj", f"{LAYER}.{part}.attn.in_proj", FUSED)
        for part in ("cross_attn", "self_attn")
    ),
    *(
        (f"layers.*.{part}.out_proj", f"{LAYER}.{part}.attn.out_proj", DENSE)
        for part in ("cross_attn", "self_attn")
    ),
    ("layers.*.cross_norm", f"{LAYER}.norms.0", NORM),
    ("layers.*.self_norm", f"{LAYER}.norms.1", NORM),
    ("layers.*.linear1", f"{LAYER}.ffn.layers.0.0", DENSE),
    ("layers.*.linear2", f"{LAYER}.ffn.layers.1", DENSE),
    ("layers.*.ffn_norm", f"{LAYER}.norms.2", NORM),
    ("decoder_norm", "transformer_decoder.post_norm", NORM),
    *((table, table, EMBEDDING) for table in ("query_feat", "query_embed", "level_embed")),
    ("class_embed", "cls_embed", DENSE),
    *((f"mask_embed.layers.{i}", f"mask_embed.{2 * i}", DENSE) for i in range(3)),
)


def layout() -> Layout:
    """How the re-implementation names the tensors of a whole model."""
    config = backbones.entry(ENCODER).config
    assert isinstance(config, backbones.Eva02Config)
    encoder = next(known for known in eva02.layouts(config) if known.name == "VLTSeg")
    rows = [row._replace(target=f"backbone.{row.target}", resized=False) for row in encoder.rows]
    rows += rows_of("pyramid", "backbone", PYRAMID)
    rows += rows_of("head", "decode_head", HEAD)
    left_out = (
        (r"backbone\.(blocks\.\d+\.attn\.)?rope\.freqs_(cos|sin)", eva02.ROPE),
        (r"backbone\.fpn1\.1\.num_batches_tracked", COUNT),
    )
    return Layout("VLTSeg, whole model", tuple(rows), left_out)


def layouts() -> tuple[Layout, ...]:
    """The one layout."""
    return (layout(),)


def of_run(config: Config, file: Checkpoint) -> Layout:
    """The one layout."""
    return layout()


def of_checkpoint(file: Checkpoint) -> Config:
    """The run that made a published file; sizes are those of its tensors.

    Raises:
        Misfit: positions of another grid than the re-implementation trains on.
        ValueError: sizes that no configuration has.
    """
    shape = (
        file.read(POSITIONS).shape
        if POSITIONS in file.names
        else (1, 1 + next(iter(RECIPES)) ** 2, 0)
    )  # told as missing later
    grid = math.isqrt(max(shape[1] - 1, 0)) if len(shape) == 3 else 0
    if grid not in RECIPES or shape[1] != 1 + grid * grid:
        crops = {side: recipe(name).data.crop[0] for side, name in RECIPES.items()}
        allowed = " or ".join(
            f"(1, {1 + side * side}, ..) for a crop of {crop}" for side, crop in crops.items()
        )
        raise Misfit(f"{POSITIONS} is {shape}, not {allowed}")
    c = recipe("gta5_eva02_repro")
    trained_by = recipe(RECIPES[grid])
    for field in ("steps", "batch_size", "eval_every", "data", "evaluation"):
        setattr(c, field, getattr(trained_by, field))
    c.model.encoder = ENCODER
    c.model.weights = None
    c.model.taps = backbones.entry(ENCODER).config.taps
    c.model.mask2former = head_options(file)
    return config_lib.validated(c)


def recipe(name: str, *choice: str) -> Config:
    """The configuration of a recipe that comes with this package."""
    return config_lib.experiment(name).get_config(*choice)


def head_options(file: Checkpoint) -> Mask2FormerOptions:
    """The sizes of the head in a file."""
    sizes = head_sizes(file, layout())
    return Mask2FormerOptions(
        **{field.name: sizes[field.name] for field in dataclasses.fields(Mask2FormerOptions)}
    )


def head_sizes(file: Checkpoint, layout: Layout) -> dict[str, Any]:
    """The sizes of the Mask2Former head in a file, by the fields of `Mask2FormerConfig`."""
    head, _ = mask2former.of_tensors(_head_tensors(file, layout))
    return dataclasses.asdict(head)


def shape_of(file: Checkpoint, name: str, axes: int) -> tuple[int, ...]:
    """The shape of a tensor that tells a size.

    Raises:
        Misfit: it is not there, or has another number of axes.
    """
    if name not in file.names:
        raise Misfit(f"1 missing ({name})")
    shape = file.read(name).shape
    if len(shape) != axes:
        raise Misfit(f"1 of another shape ({name} is {shape}, not of {axes} axes)")
    return shape


def rows_of(
    ours: str, theirs: str, table: Iterable[tuple[str, str, tuple[tuple[str, str, Transform], ...]]]
) -> list[Row]:
    """The rows of a table of names behind one word here and one there."""
    return [
        Row((f"{theirs}.{there}{ending}",), f"{ours}.{here}{end}", transform)
        for here, there, kind in table
        for ending, end, transform in kind
    ]


def _head_tensors(file: Checkpoint, layout: Layout) -> dict[str, np.ndarray]:
    """The head's tensors by jaxdg's names, but for those that are missing, or so misshapen that
    they tell no size.
    """
    found = {}
    for row in layout.rows:
        pattern = re.compile(re.escape(row.source[0]).replace(r"\*", r"(\d+)"))
        for match in (
            filter(None, map(pattern.fullmatch, file.names))
            if row.source[0].startswith("decode_head.")
            else ()
        ):
            with contextlib.suppress(ValueError, IndexError):
                tensor = row.transform.forward(file.read(match[0]))
                found[
                    row.target.removeprefix("head.").replace("*", "{}").format(*match.groups())
                ] = tensor
    return found


def abstract(config: Config) -> nnx.Module:
    """The model of a run, shapes without numbers.

    Raises:
        Misfit: sizes that do not fit together.
    """
    try:
        return nnx.eval_shape(lambda: extended(make_task(config), jax.random.key(0), ()))
    except ValueError as error:
        raise Misfit(f"the sizes of its tensors do not fit together: {error}") from error


def write(
    config: Config,
    model: nnx.Module,
    tensors: Mapping[str, np.ndarray],
    out: Path,
    about: Mapping[str, Any],
) -> None:
    """Writes the workdir of a run that has come to its end, whole or not at all.

    Args:
        config: of the run.
        model: of `abstract`; it is filled.
        tensors: by jaxdg's names.
        out: the workdir.
        about: what it was converted from, written to `conversion.json`.

    Raises:
        OSError: it cannot be written.
    """
    weights.fill(model, tensors, out)
    _, trained, statistics = nnx.split(model, nnx.Param, ...)
    # Nothing of an optimiser is published: the run is at its end, and another one starts from it by
    # `model.start`.
    state = TrainState(
        jnp.asarray(config.steps, jnp.int32), trained, nnx.State({}), statistics, opt_state=()
    )
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=f"{out.name}.partial_") as folder:
        partial = Path(folder) / out.name
        with contextlib.closing(Checkpoints(partial)) as checkpoints:
            checkpoints.save(state)
        config_lib.save(config, partial)
        files.write(partial / ABOUT, json.dumps(about, indent=2) + "\n")
        os.replace(partial, out)


def described(config: Config) -> str:
    """The run in words."""
    crop, _ = config.data.crop
    stride, _ = config.evaluation.stride
    m = config.model.mask2former
    return (
        f"{config.model.encoder}, {m.queries} queries, {m.layers} layers after {m.pixel_layers} of"
        f" the pixel decoder; windows of {crop} pixels every {stride}; no tensor tells what it was"
        f" trained on: {config.data.source}, says its config.json"
    )
