"""Faster R-CNN on an FPN as torchvision names it (`fasterrcnn_resnet50_fpn`): the pyramid and the
heads.

Its encoder is left out, as no encoder here has that ResNet's stem. `fasterrcnn_resnet50_fpn_v2`
does not fit: its pyramid and box head hold BatchNorms. torchvision's first class is the background,
which here is the last one and has no box.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
import dataclasses
from typing import Any

from flax import nnx
import numpy as np

from jaxdg.conversion.mapping import CONV, Layout, Misfit, Row, Transform
from jaxdg.conversion.mask2former import BIAS, DENSE
from jaxdg.detection.interface import HeadContext
from jaxdg.detection.pyramid import Fpn
from jaxdg.detection.rcnn.detectors import RcnnConfig
from jaxdg.detection.rcnn.roi_heads import CASCADE, RoiHeadsConfig
from jaxdg.detection.rcnn.rpn import RpnConfig
from jaxdg.tracing import Rngs

NAME = "faster_rcnn"
LISTED = (
    "160 MB",
    "BSD-3-Clause (code)",
    (
        "fasterrcnn_resnet50_fpn_coco-258fb6c6.pth of torchvision; its pyramid and heads alone are"
        " taken"
    ),
)
VERSIONS: dict[str, int] = {}
ENCODER = (
    "the encoder, an ImageNet ResNet, which jaxdg does not have: only the pyramid and the heads are"
    " converted"
)
CLASSES = "roi_heads.box_predictor.cls_score.bias"
STAGES = (256, 512, 1024, 2048)  # channels of the maps that the pyramid reads
CONFIG = RcnnConfig(
    RpnConfig(convs=1, rounded=True, after=(2000, 1000)),
    RoiHeadsConfig(
        stages=CASCADE[:1], samples=2, aligned=False, convs=0, fcs=2, class_agnostic=False
    ),
)
SIDE = 7  # of the features that a box is pooled to, in all published detectors

CONVOLUTION = ((".weight", ".kernel", CONV), BIAS)
POOLED = Transform(  # torch reads the features of a box channels first, jaxdg last
    lambda w: w.reshape(len(w), -1, SIDE, SIDE).transpose(2, 3, 1, 0).reshape(-1, len(w)),
    lambda k: (
        k.reshape(SIDE, SIDE, -1, k.shape[1]).transpose(3, 2, 0, 1).reshape(k.shape[1], -1),
    ),
)
POOLED_DENSE = ((".weight", ".kernel", POOLED), BIAS)
SCORES = (
    (
        ".weight",
        ".kernel",
        Transform(lambda w: np.roll(w, -1, axis=0).T, lambda k: (np.roll(k.T, 1, axis=0),)),
    ),
    (".bias", ".bias", Transform(lambda b: np.roll(b, -1), lambda b: (np.roll(b, 1),))),
)
BOXES = (
    (
        ".weight",
        ".kernel",
        Transform(lambda w: w[4:].T, lambda k: (np.pad(k.T, ((4, 0), (0, 0))),)),
    ),
    (".bias", ".bias", Transform(lambda b: b[4:], lambda b: (np.pad(b, (4, 0)),))),
)


def layouts() -> tuple[Layout, ...]:
    """The names that torchvision writes today, and those of the files it published."""
    today = _layout("torchvision", ".0", "conv.*.0", "conv*")
    return today, _layout("torchvision-released", "", "conv", "conv0")


def _layout(name: str, block: str, theirs: str, ours: str) -> Layout:
    """Convolutions of the pyramid end in `block`; those of the proposal network are called
    `theirs`, and here `ours`.
    """
    table = (
        *(
            (f"backbone.fpn.inner_blocks.{i}{block}", f"neck.fpn_lateral{i + 2}", CONVOLUTION)
            for i in range(len(STAGES))
        ),
        *(
            (f"backbone.fpn.layer_blocks.{i}{block}", f"neck.fpn_output{i + 2}", CONVOLUTION)
            for i in range(len(STAGES))
        ),
        (f"rpn.head.{theirs}", f"head.proposal_generator.rpn_head.conv.{ours}", CONVOLUTION),
        ("rpn.head.cls_logits", "head.proposal_generator.rpn_head.objectness_logits", CONVOLUTION),
        ("rpn.head.bbox_pred", "head.proposal_generator.rpn_head.anchor_deltas", CONVOLUTION),
        ("roi_heads.box_head.fc6", "head.roi_heads.box_head.0.fc1", POOLED_DENSE),
        ("roi_heads.box_head.fc7", "head.roi_heads.box_head.0.fc2", DENSE),
        ("roi_heads.box_predictor.cls_score", "head.roi_heads.box_predictor.0.cls_score", SCORES),
        ("roi_heads.box_predictor.bbox_pred", "head.roi_heads.box_predictor.0.bbox_pred", BOXES),
    )
    rows = tuple(
        Row((source + there,), target + here, transform)
        for source, target, kind in table
        for there, here, transform in kind
    )
    return Layout(
        name,
        rows,
        ((r"backbone\.body\..+", ENCODER),),
        note="without the encoder; zeros for the box of the background",
    )


def heads(
    config: RcnnConfig,
    num_classes: int,
    stages: Sequence[int],
    image_size: tuple[int, int],
    *,
    rngs: nnx.Rngs,
) -> nnx.Dict:
    """The `neck` and the `head` of a detector, which `weights.load` fills from a converted file.

    Args:
        config: sizes.
        num_classes: k, without the background.
        stages: channels of the maps that the pyramid reads, finest first.
        image_size: height and width in pixels.
        rngs: initialises the parameters.
    """
    strides = [4 << level for level in (*config.levels, config.levels[-1] + 1)]
    shapes = [(-(-image_size[0] // stride), -(-image_size[1] // stride)) for stride in strides]
    context = HeadContext(nnx.Module(), num_classes, shapes, strides, image_size, "float32")
    return nnx.Dict(
        neck=Fpn(stages, config.levels, config.channels, dtype="float32", rngs=rngs),
        head=config.build(context, rngs=rngs),
    )


def of_checkpoint(names: Iterable[str], read: Callable[[str], np.ndarray]) -> tuple[int]:
    """The number of classes in a published file, all that differs between such files.

    Raises:
        Misfit: another detector.
    """
    names = set(names)
    if "backbone.fpn.inner_blocks.0.1.weight" in names:
        raise Misfit(
            "it is of version 2, whose pyramid and box head hold BatchNorms"
            " (backbone.fpn.inner_blocks.0.1.weight, ..)"
        )
    if CLASSES not in names or len(shape := read(CLASSES).shape) != 1:
        raise Misfit(f"{CLASSES}, which tells the number of classes, is not a vector in it")
    return (shape[0] - 1,)


def of_tensors(tensors: Mapping[str, np.ndarray]) -> tuple[int]:
    """The same of a file of jaxdg.

    Raises:
        Misfit: there is no classifier in it.
    """
    name = "head.roi_heads.box_predictor.0.cls_score.bias"
    if name not in tensors:
        raise Misfit(f"1 missing ({name})")
    return (tensors[name].size - 1,)


def abstract(num_classes: int) -> nnx.Module:
    """Pyramid and heads, shapes without numbers."""
    return nnx.eval_shape(
        lambda: heads(CONFIG, max(num_classes, 1), STAGES, (800, 1344), rngs=Rngs(0))
    )


def about(num_classes: int) -> dict[str, Any]:
    """What a converted file says beside its tensors, so that its pyramid and heads can be built."""
    return {"config": dataclasses.asdict(CONFIG), "num_classes": num_classes, "channels": STAGES}


def described(num_classes: int) -> str:
    """Sizes in words."""
    return (
        f"{num_classes} classes (a number of torchvision's is ours and 1 more); reads feature maps"
        f" of {' '.join(map(str, STAGES))} channels"
    )
