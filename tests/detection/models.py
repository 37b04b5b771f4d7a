"""The small detectors of tests/golden/detectors.npz: sizes, and weights and inputs that are drawn
by torch's names and not stored.
"""

import zlib

from flax import nnx
import jax.numpy as jnp
import numpy as np

from jaxdg import weights
from jaxdg.conversion import faster_rcnn as table
from jaxdg.conversion import mapping
from jaxdg.detection.rcnn.detectors import RcnnConfig
from jaxdg.detection.rcnn.roi_heads import RoiHeadsConfig
from jaxdg.detection.rcnn.rpn import RpnConfig

IMAGE = (96, 160)
CHANNELS = 6
CLASSES = 4
STAGES = (5, 7, 9)  # channels of three maps with 4, 8 and 16 pixels a feature
BOXES = ([[10, 8, 50, 44], [30, 20, 150, 90], [100, 5, 118, 30]], [[3, 50, 60, 95]])
LABELS = ([0, 3, 1], [2])
RATIOS = (0.5, 1.0, 2.0)
SIZES = ((12.0,), (24.0,), (48.0,), (72.0,))  # of anchors
BEFORE = (150, 100)
AFTER = (90, 60)
DETECTIONS = 60
FCOS_CHANNELS = 32


def normal(name, shape):
    """Float32 standard normal numbers that belong to a name."""
    return np.random.default_rng(zlib.crc32(name.encode())).standard_normal(shape, np.float32)


def weight(name, shape):
    """The parameter of a name in torch: things are found, and their boxes move by a part of their
    sides.
    """
    if len(shape) == 1:
        return np.float32(0.3) * normal(name, shape) + np.float32(
            name.endswith(("norm.weight", "1.weight", "4.weight"))
        )
    last = (
        0.4
        if "bbox" in name or name.endswith("deltas.weight")
        else 1.2
        if "cls_score" in name
        else 1.4
    )
    return np.float32(last / np.sqrt(np.prod(shape[1:]))) * normal(name, shape)


def stages():
    """The maps of three stages, [2, h, w, c]."""
    return tuple(
        normal(f"stage {i}", (2, IMAGE[0] >> i + 2, IMAGE[1] >> i + 2, c))
        for i, c in enumerate(STAGES)
    )


def targets(slots=5):
    """The true boxes as a batch, padded."""
    boxes = np.zeros((2, slots, 4), np.float32)
    classes = np.zeros((2, slots), np.int32)
    valid = np.zeros((2, slots), bool)
    for i, (rows, labels) in enumerate(zip(BOXES, LABELS, strict=True)):
        boxes[i, : len(rows)] = rows
        classes[i, : len(rows)] = labels
        valid[i, : len(rows)] = True
    return {
        "boxes": jnp.asarray(boxes),
        "classes": jnp.asarray(classes),
        "valid": jnp.asarray(valid),
    }


def fill(module, name, shape=None, of=None):
    """Gives a layer the weight and, if it has one, the bias that belong to a name in torch.

    `shape` is the weight's in torch; else that of a convolution or linear layer is known from the
    kernel. `of` makes the kernel from it.
    """
    kernel = getattr(module, "kernel", None)
    if kernel is None:
        module.scale[...], module.bias[...] = (
            jnp.asarray(weight(f"{name}.{part}", module.bias.shape)) for part in ("weight", "bias")
        )
        return
    if shape is None:
        *window, i, o = kernel.shape
        shape = (o, i, *window)
    drawn = weight(f"{name}.weight", shape)
    kernel[...] = jnp.asarray(np.moveaxis(drawn, (0, 1), (-1, -2)) if of is None else of(drawn))
    if module.bias is not None:
        module.bias[...] = jnp.asarray(weight(f"{name}.bias", module.bias.shape))
    if hasattr(module, "norm"):
        fill(module.norm, f"{name}.norm")


ANCHORS = 8000
PROPOSALS = 600  # more than there are, so that losses are of all


def levels(golden):
    """The stored levels of torchvision's pyramid."""
    with np.load(golden / "detectors.npz") as file:
        return tuple(jnp.asarray(file[f"fpn_{i}"]) for i in range(4))


def faster_rcnn():
    """Torchvision's pyramid and Faster R-CNN as `neck` and `head`, with its weights converted."""
    config = RcnnConfig(
        RpnConfig(sizes=SIZES, rounded=True, samples=ANCHORS, before=BEFORE, after=AFTER),
        RoiHeadsConfig(
            stages=((0.5, 10.0),),
            samples=2,
            aligned=False,
            convs=0,
            fcs=2,
            hidden=24,
            class_agnostic=False,
            proposals=PROPOSALS,
            positive=0.5,
            detections=DETECTIONS,
        ),
        channels=CHANNELS,
        levels=(0, 1, 2),
    )
    # Shapes without numbers: every parameter is filled below.
    model = nnx.eval_shape(lambda: table.heads(config, CLASSES, STAGES, IMAGE, rngs=nnx.Rngs(0)))
    layout = table.layouts()[0]
    drawn = {
        name: weight(name.removeprefix("backbone.fpn."), shape)
        for name, shape in mapping.source_shapes(model, layout).items()
    }
    weights.fill(
        model,
        mapping.to_flax(model, (layout,), list(drawn), drawn.__getitem__).tensors,
        "torchvision",
    )
    return model
