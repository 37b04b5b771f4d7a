"""Whole ViTDet detectors (detectron2's projects/ViTDet) to a workdir: encoder, pyramid, proposals,
and one box head or a cascade; and back.

The encoder is SAM's, whose classes compute the same: SAM's authors took it from here. It is called
`sam_b16`, `sam_l16` or `sam_h16` by its size. Positions are those of the pre-training, with one for
a class token that ViTDet does not have, and are resized as ViTDet does it.

All published sizes but the number of classes are the defaults of `ModelConfig.cascade_rcnn` and
`faster_rcnn`. Detectors of LVIS are refused by the name of their class weights
(`fed_loss_cls_weights`): they score by sigmoid.
"""

from collections import Counter
import math
import re

import numpy as np

from jaxdg import backbones
from jaxdg import config as config_lib
from jaxdg.config import Config, ModelConfig
from jaxdg.conversion import sam
from jaxdg.conversion.checkpoint import Checkpoint
from jaxdg.conversion.faster_rcnn import CONVOLUTION, POOLED_DENSE
from jaxdg.conversion.mapping import CONV, SAME, Layout, Misfit, Row, Transform
from jaxdg.conversion.mask2former import DENSE, NORM
from jaxdg.conversion.vltseg import DOUBLE
from jaxdg.data.boxes import BoxOptions

NAME = "vitdet"
LISTED = (
    "444-2765 MB",
    "Apache-2.0 (code)",
    (
        "model_final_*.pkl of COCO in projects/ViTDet of facebookresearch/detectron2; whole models,"
        " --out is a workdir"
    ),
)
MASKS = "the mask head: only boxes are predicted"
SETTINGS = "pixel statistics: those of the encoder"
STEPS = 184_375
BATCH_SIZE = 64  # of 100 epochs
# fmt: off
COCO = (  # the classes of its box annotations, by their ids
    "person", "bicycle", "car", "motorcycle", "airplane", "bus", "train", "truck", "boat",
    "traffic light", "fire hydrant", "stop sign", "parking meter", "bench", "bird", "cat", "dog",
    "horse", "sheep", "cow", "elephant", "bear", "zebra", "giraffe", "backpack", "umbrella",
    "handbag", "tie", "suitcase", "frisbee", "skis", "snowboard", "sports ball", "kite",
    "baseball bat", "baseball glove", "skateboard", "surfboard", "tennis racket", "bottle",
    "wine glass", "cup", "fork", "knife", "spoon", "bowl", "banana", "apple", "sandwich", "orange",
    "broccoli", "carrot", "hot dog", "pizza", "donut", "cake", "chair", "couch", "potted plant",
    "bed", "dining table", "toilet", "tv", "laptop", "mouse", "remote", "keyboard", "cell phone",
    "microwave", "oven", "toaster", "sink", "refrigerator", "book", "clock", "vase", "scissors",
    "teddy bear", "hair drier", "toothbrush",
)
# fmt: on


def _on_a_grid(positions: np.ndarray) -> np.ndarray:
    """[1, 1 + n * n, c], the class token's first, to [1, n, n, c]; what is no square stays as it
    is, and is told as of another shape.
    """
    side = math.isqrt(max(positions.shape[1] - 1, 0))
    square = side > 0 and positions.shape[:2] == (1, 1 + side * side)
    return positions[:, 1:].reshape(1, side, side, -1) if square else positions


POSITIONS = Transform(
    _on_a_grid, lambda p: (np.pad(p.reshape(1, -1, p.shape[-1]), ((0, 0), (1, 0), (0, 0))),)
)
CONV_NORM = (
    (".weight", ".kernel", CONV),
    (".norm.weight", ".norm.scale", SAME),
    (".norm.bias", ".norm.bias", SAME),
)
RPN = "proposal_generator.rpn_head"


def layout(cascade: bool) -> Layout:
    """How detectron2 names the tensors of a whole ViTDet, which has a box head for each stage of a
    cascade, or one.
    """
    encoder = next(known for known in sam.layouts() if known.name == "timm")
    rows = [
        Row((f"backbone.net.{row.source[0]}",), f"backbone.{row.target}", row.transform)
        for row in encoder.rows
        if row.target != "pos_embed"
    ]
    rows.append(Row(("backbone.net.pos_embed",), "backbone.pos_embed", POSITIONS, resized=True))
    convolutions = {2: (4, 5), 3: (1, 2), 4: (0, 1), 5: (1, 2)}
    pyramid = [
        ("simfp_2.0", DOUBLE),
        ("simfp_2.1", NORM),
        ("simfp_2.3", DOUBLE),
        ("simfp_3.0", DOUBLE),
    ]
    pyramid += [
        (f"simfp_{level}.{i}", CONV_NORM)
        for level, numbers in convolutions.items()
        for i in numbers
    ]
    theirs, ours = (".*", ".*") if cascade else ("", ".0")
    table = [(f"backbone.{layer}", f"neck.{layer}", kind) for layer, kind in pyramid]
    table += [
        (f"{RPN}.{layer}", f"head.{RPN}.{layer}", CONVOLUTION)
        for layer in ("conv.conv*", "objectness_logits", "anchor_deltas")
    ]
    table += [
        (f"roi_heads.{part}{theirs}.{layer}", f"head.roi_heads.{part}{ours}.{layer}", kind)
        for part, layer, kind in (
            ("box_head", "conv*", CONV_NORM),
            ("box_head", "fc1", POOLED_DENSE),
            ("box_predictor", "cls_score", DENSE),
            ("box_predictor", "bbox_pred", DENSE),
        )
    ]
    rows += [
        Row((source + there,), target + here, transform)
        for source, target, kind in table
        for there, here, transform in kind
    ]
    left_out = ((r"roi_heads\.mask_head\..+", MASKS), (r"pixel_(mean|std)", SETTINGS))
    note = "without a mask head; zeros for the position of a class token"
    return Layout(
        "detectron2, cascade" if cascade else "detectron2", tuple(rows), left_out, note=note
    )


def layouts() -> tuple[Layout, ...]:
    """With a cascade, and with one box head."""
    return layout(True), layout(False)


def of_checkpoint(file: Checkpoint) -> Config:
    """A run that would make a published file: sizes are those of its tensors, of the training no
    more than steps and batch is told.

    Raises:
        Misfit: sizes of no published encoder, or a tensor missing that tells them.
    """
    width = _length(file, "backbone.net.patch_embed.proj.bias")
    depth = len(
        {
            match[1]
            for name in file.names
            if (match := re.match(r"backbone\.net\.blocks\.(\d+)\.", name))
        }
    )
    encoders = {
        name: entry.config
        for name, entry in backbones.ZOO.items()
        if isinstance(entry.config, backbones.SamConfig)
    }
    name = next(
        (name for name, e in encoders.items() if (e.width, e.depth) == (width, depth)), None
    )
    if name is None:
        allowed = ", ".join(f"{e.depth} of {e.width}" for e in encoders.values())
        raise Misfit(f"its encoder has {depth} blocks of {width} channels; allowed: {allowed}")
    encoder = encoders[name]
    first = "roi_heads.box_predictor.0.cls_score.bias"
    cascade = first in file.names
    k = _length(file, first if cascade else first.replace(".0.", ".")) - 1
    # Blocks without windows have a row for every distance between the patches of the image; one
    # that is amiss is outvoted, and told later.
    rows, columns = (
        Counter(
            _length(file, f"backbone.net.blocks.{i}.attn.rel_pos_{side}")
            for i in encoder.global_blocks
        ).most_common(1)[0][0]
        for side in "hw"
    )
    c = Config(steps=STEPS, batch_size=BATCH_SIZE, task="detection", model=ModelConfig())
    c.data.source = "coco"
    c.evaluation.domains = ("coco",)
    c.evaluation.protocol = "coco"
    c.data.crop = (rows + 1) // 2 * encoder.patch_size, (columns + 1) // 2 * encoder.patch_size
    c.data.boxes = BoxOptions(
        images=("{domain}/train2017", "{domain}/val2017"),
        annotations=(
            "{domain}/annotations/instances_train2017.json",
            "{domain}/annotations/instances_val2017.json",
        ),
        lists=("", ""),
        classes=COCO if k == len(COCO) else tuple(f"class_{i}" for i in range(k)),
    )
    c.model.encoder = name
    c.model.decoder = "cascade_rcnn" if cascade else "faster_rcnn"
    return config_lib.validated(c)


def _length(file: Checkpoint, name: str) -> int:
    """Of the first axis of a tensor that tells a size."""
    if name not in file.names:
        raise Misfit(f"1 missing ({name})")
    shape = file.read(name).shape
    if not shape or not shape[0]:
        raise Misfit(f"1 of another shape ({name} is {shape})")
    return shape[0]


def of_workdir(config: Config) -> Layout:
    """The layout of the model of a run.

    Raises:
        ValueError: it is no ViTDet.
    """
    m = config.model
    if m.decoder not in ("cascade_rcnn", "faster_rcnn") or not isinstance(
        backbones.entry(m.encoder).config, backbones.SamConfig
    ):
        raise ValueError(
            f"model.decoder {m.decoder} on model.encoder {m.encoder} is no ViTDet: cascade_rcnn or"
            " faster_rcnn on SAM's encoder"
        )
    return layout(m.decoder == "cascade_rcnn")


def of_run(config: Config, file: Checkpoint) -> Layout:
    """The layout of a file, see `of_workdir`."""
    return of_workdir(config)


def described(config: Config) -> str:
    """The run in words."""
    height, width = config.data.crop
    classes = config.data.boxes.classes if config.data.boxes else ()
    named = "COCO's" if classes == COCO else "unnamed: see data.boxes.classes in config.json"
    return (
        f"{config.model.encoder}, {config.model.decoder}, {len(classes)} classes ({named}); images"
        f" of {height}x{width} pixels"
    )
