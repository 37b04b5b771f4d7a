"""Released detectors of CLIP the Gap (vidit09/domaingen at 9c03d07) to a workdir.

A file of detectron2 holds the image tower up to four times, as modules of their code share it, and
the text tower, whose embeddings of the class names no tensor holds: they are computed at
conversion. Copies of a tensor that differ are refused, for then it is not known which one their
program read. The semantic offsets stay out, as does all that their code builds and does not call.

BatchNorm has the file's own statistics, scales and biases, which their training moved.
"""

from collections.abc import Iterator
import functools
import re

from flax import nnx
import numpy as np

from jaxdg import backbones, weights
from jaxdg import config as config_lib
from jaxdg.config import Config
from jaxdg.conversion import clip_resnet, clip_text, mapping, vltseg
from jaxdg.conversion.checkpoint import Checkpoint
from jaxdg.conversion.faster_rcnn import CONVOLUTION
from jaxdg.conversion.mapping import SAME, Layout, Misfit, Row
from jaxdg.conversion.mask2former import DENSE
from jaxdg.data.boxes import DIVERSE_WEATHER, BoxOptions
from jaxdg.tracing import Rngs

NAME = "clip_the_gap"
LISTED = (
    "not stated",
    "none stated",
    (
        "the trained weights linked in the README of vidit09/domaingen; whole models, --out is a"
        " workdir"
    ),
)
ENCODER = "clip_rn101"
TEMPLATE = "a photo of a {}"
VOC = ("bicycle", "bird", "car", "cat", "dog", "person")  # of its second setting
CLASSES = {len(names): names for names in (DIVERSE_WEATHER.names, VOC)}
REGRESSOR = "roi_heads.box_predictor.bbox_pred"
TOWER = "roi_heads.box_predictor.cls_score.model."
TEXTS = "texts"  # our name of what no file holds
PREDICTOR = r"roi_heads\.(box_predictor\.cls_score|clip_im_predictor)\."
# Names under which a module is stored again, and where it is read from.
COPIES = (
    (r"backbone\.backbone_unchanged\.(.+)", r"backbone.enc.layer3.\1"),
    (rf"{PREDICTOR}(?:model\.visual|visual_enc)\.(.+)", r"backbone.enc.\2"),
    (r"roi_heads\.clip_im_predictor\.model\.(?!visual\.)(.+)", rf"{TOWER}\1"),
)
LEFT_OUT = (
    (COPIES[0][0], "blocks of the third stage once more"),
    (COPIES[1][0], "the image tower once more"),
    (
        rf"{PREDICTOR}model\.(?!visual\.).+",
        "the text tower: the embeddings of the class names are computed from it",
    ),
    (rf"{PREDICTOR}frozen_clip_model\..+", "CLIP before training: their detector does not read it"),
    (
        rf"({PREDICTOR}projection(_global)?|backbone\.(global_)?proj)\.(weight|bias)",
        "linear layers that their code does not call",
    ),
    (r"roi_heads\.res5\..+", "detectron2's own last stage, which their code does not call"),
    (r"offsets", "semantic offsets: only training adds them"),
    (r"backbone\.enc\..+\.num_batches_tracked", clip_resnet.COUNTER),
    (r"pixel_(mean|std)", "pixel statistics: those of the encoder"),
    (
        r"proposal_generator\.anchor_generator\.cell_anchors\.\d+",
        "anchors: they follow from the configuration",
    ),
)


def layout() -> Layout:
    """How their code names the tensors of a detector, and `TEXTS`."""
    (encoder,) = clip_resnet.layouts()
    rows = [
        Row(
            (f"backbone.enc.{row.source[0].removeprefix('visual.')}",),
            f"backbone.{row.target}",
            row.transform,
        )
        for row in encoder.rows
    ]
    head = "proposal_generator.rpn_head"
    for theirs, ours, kind in (
        (f"{head}.conv", f"head.{head}.conv.conv0", CONVOLUTION),
        (f"{head}.objectness_logits", f"head.{head}.objectness_logits", CONVOLUTION),
        (f"{head}.anchor_deltas", f"head.{head}.anchor_deltas", CONVOLUTION),
        (REGRESSOR, "head.roi_heads.box_predictor.0.bbox_pred", DENSE),
    ):
        rows += [Row((theirs + there,), ours + here, transform) for there, here, transform in kind]
    rows.append(Row((TEXTS,), "head.roi_heads.box_predictor.0.cls_score.texts", SAME))
    return Layout("detectron2, CLIP the Gap", tuple(rows), LEFT_OUT)


def layouts() -> tuple[Layout, ...]:
    """The one layout, with what is in a file alone."""
    whole = layout()
    return (whole._replace(rows=tuple(row for row in whole.rows if row.source != (TEXTS,))),)


def of_run(config: Config, file: Checkpoint) -> Layout:
    """The one layout, of what `prepared` returns."""
    return layout()


def of_checkpoint(file: Checkpoint) -> Config:
    """The run that would make a released file: the recipe of the detector; classes are told by
    their number.

    Raises:
        Misfit: another number of classes than their code has, or copies that differ.
    """
    (sides,) = vltseg.shape_of(file, f"{REGRESSOR}.bias", 1)
    if sides % 4 or sides // 4 not in CLASSES:
        allowed = " or ".join(f"{4 * k}, for {', '.join(names)}" for k, names in CLASSES.items())
        raise Misfit(f"{REGRESSOR}.bias has {sides} numbers; allowed: {allowed}")
    _check_copies(file)
    c = vltseg.recipe("vltdet_clip_rn101", "clip_the_gap")
    c.model.weights = c.model.text_weights = None
    c.model.faster_rcnn_c4.text_classifier = True
    if CLASSES[sides // 4] == VOC:
        c.data.source = "voc"
        c.data.boxes = BoxOptions(classes=VOC)
        c.evaluation.domains = ("voc",)
    return config_lib.validated(c)


def _copied(file: Checkpoint) -> Iterator[tuple[str, str]]:
    """Every name of a copy in a file, and what it copies."""
    for name in file.names:
        for pattern, original in COPIES:
            if match := re.fullmatch(pattern, name):
                yield name, match.expand(original)
                break


def _check_copies(file: Checkpoint) -> None:
    known = set(file.names)
    copies = [pair for pair in _copied(file) if not pair[0].endswith("num_batches_tracked")]
    problems = weights.told("unknown", [name for name, of in copies if of not in known])
    odd = [
        f"{name} is not {of}"
        for name, of in copies
        if of in known and not np.array_equal(file.read(name), file.read(of))
    ]
    problems += weights.told("different from what they copy", odd)
    if problems:
        raise Misfit(weights.joined(problems))


def prepared(file: Checkpoint, config: Config) -> Checkpoint:
    """The file with the embeddings of the class names beside its tensors, as `TEXTS`.

    Raises:
        Misfit: the text tower in it is not whole.
    """
    tower = nnx.eval_shape(
        lambda: backbones.ClipText(backbones.TEXT_TOWERS[f"{ENCODER}_text"], rngs=Rngs(0))
    )
    theirs = clip_text.layouts(tower.config)[0]
    rows = tuple(
        row._replace(source=tuple(TOWER + name for name in row.source)) for row in theirs.rows
    )
    visual = f"{TOWER}visual."
    names = [name for name in file.names if name.startswith(TOWER) and not name.startswith(visual)]
    found = mapping.to_flax(tower, (Layout("CLIP", rows, ()),), names, file.read)
    weights.fill(tower, found.tensors, "the text tower")
    classes = CLASSES[vltseg.shape_of(file, f"{REGRESSOR}.bias", 1)[0] // 4]
    embed = functools.cache(lambda: tower.embeddings(classes, (TEMPLATE,)))
    return file._replace(
        names=[*file.names, TEXTS],
        read=lambda name: embed() if name == TEXTS else file.read(name),
    )


def described(config: Config) -> str:
    """The run in words."""
    height, width = config.data.crop
    names = VOC if config.data.boxes else DIVERSE_WEATHER.names
    return (
        f"{config.model.encoder}, {config.model.decoder}, {len(names)} classes"
        f" ({', '.join(names)}); images of {height}x{width} pixels"
    )
