"""Makes tests/golden/detectors.npz: outputs of small detectors of torch and torchvision.

Run by hand where torchvision and its compiled operators work (see
tests/oracles/golden_detection.py; written with torchvision 0.28.0 and torch 2.13.0):

    python tests/oracles/golden_detectors.py

Weights and inputs are drawn by name in tests/detection/models.py, and not stored.

- fpn_I: levels of torchvision's feature pyramid. proposals_{train,test} (of both images, one after
  another; how many: proposed_..), rpn_losses, roi_losses, and boxes, scores, labels of the
  detections (how many: found): of its Faster R-CNN on them, with plain L1 in the place of smooth
  L1. Losses are of all anchors and proposals, none drawn; `counted` says how many they are divided
  by.
- fcos_{class,box,fit}: logits of the towers of its FCOS for the pyramid's finest level.
- simple_I: levels of ViTDet's simple feature pyramid; box_head: of detectron2's box head with
  LayerNorm. Both are written here with torch's layers, after detectron2's code.
"""

from collections import OrderedDict
from pathlib import Path
import sys
from typing import Any

import numpy as np
import torch  # pyright: ignore[reportMissingImports]
from torch import nn  # pyright: ignore[reportMissingImports]
import torch.nn.functional as F  # pyright: ignore[reportMissingImports]
from torchvision import ops  # pyright: ignore[reportMissingImports]
from torchvision.models.detection import (  # pyright: ignore[reportMissingImports]
    anchor_utils,
    faster_rcnn,
    fcos,
    image_list,
    roi_heads,
    rpn,
)

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from tests.detection import models

OUT = Path(__file__).resolve().parents[2] / "tests" / "golden" / "detectors.npz"
ALL = 100_000


def fill(module: nn.Module, prefix: str = "") -> Any:
    """Gives every parameter the numbers of its name."""
    names = {
        name: models.weight(prefix + name, tuple(p.shape)) for name, p in module.named_parameters()
    }
    module.load_state_dict({name: torch.tensor(numbers) for name, numbers in names.items()})
    return module


def first(x: np.ndarray) -> torch.Tensor:
    """[b, h, w, c] to [b, c, h, w]."""
    return torch.tensor(np.moveaxis(x, -1, 1))


def last(x: torch.Tensor) -> np.ndarray:
    """The inverse."""
    return np.moveaxis(x.detach().numpy(), 1, -1)


def faster() -> dict[str, np.ndarray]:
    """The Faster R-CNN, from three maps to detections."""
    pyramid = fill(
        ops.FeaturePyramidNetwork(
            list(models.STAGES), models.CHANNELS, ops.feature_pyramid_network.LastLevelMaxPool()
        )
    )
    features = pyramid(OrderedDict((str(i), first(x)) for i, x in enumerate(models.stages())))
    levels = list(features.values())
    generator = anchor_utils.AnchorGenerator(models.SIZES, (models.RATIOS,) * len(models.SIZES))
    options: Any = [
        dict(zip(("training", "testing"), pair, strict=True))
        for pair in (models.BEFORE, models.AFTER)
    ]
    before, after = options
    layers = rpn.RPNHead(models.CHANNELS, len(models.RATIOS), conv_depth=2)
    proposer = rpn.RegionProposalNetwork(generator, layers, 0.7, 0.3, ALL, 0.5, before, after, 0.7)
    fill(proposer, "rpn.")
    images = image_list.ImageList(torch.zeros(2, 3, *models.IMAGE), [models.IMAGE] * 2)
    wanted = [
        {"boxes": torch.tensor(boxes, dtype=torch.float32), "labels": torch.tensor(labels) + 1}
        for boxes, labels in zip(models.BOXES, models.LABELS, strict=True)
    ]
    heads = roi_heads.RoIHeads(
        ops.MultiScaleRoIAlign(["0", "1", "2"], 7, 2),
        faster_rcnn.TwoMLPHead(models.CHANNELS * 49, 24),
        faster_rcnn.FastRCNNPredictor(24, models.CLASSES + 1),
        0.5, 0.5, ALL, 0.5, None, 0.05, 0.5, models.DETECTIONS,
    )  # fmt: skip
    fill(heads, "roi_heads.")
    counts = []
    plain = F.smooth_l1_loss
    F.smooth_l1_loss = lambda *args, beta, **kw: plain(*args, beta=0.0, **kw)  # pyright: ignore
    for module in (proposer, heads):
        draw = module.fg_bg_sampler

        def counting(labels, draw=draw):
            counts.append(sum(int((x >= 0).sum()) for x in labels))
            return draw(labels)

        module.fg_bg_sampler = counting  # pyright: ignore[reportAttributeAccessIssue]
    found, rpn_losses = proposer.train()(images, features, wanted)
    _, roi_losses = heads.train()(features, found, [models.IMAGE] * 2, wanted)
    tested, _ = proposer.eval()(images, features)
    detected, _ = heads.eval()(features, tested, [models.IMAGE] * 2)

    def join(parts):
        return torch.cat(list(parts)).detach().numpy()

    result = {f"fpn_{i}": last(level) for i, level in enumerate(levels)}
    result |= {
        "rpn_losses": join(x[None] for x in rpn_losses.values()),
        "roi_losses": join(x[None] for x in roi_losses.values()),
    }
    result |= {"counted": np.array(counts), "found": np.array([len(x["labels"]) for x in detected])}
    for name, proposals in (("train", found), ("test", tested)):
        result |= {
            f"proposals_{name}": join(proposals),
            f"proposed_{name}": np.array([len(x) for x in proposals]),
        }
    result |= {name: join(x[name] for x in detected) for name in ("boxes", "scores", "labels")}
    return result


def towers() -> dict[str, np.ndarray]:
    """Logits of FCOS on a map."""
    c = models.FCOS_CHANNELS
    x = first(models.normal("fcos", (2, 9, 7, c)))
    head = fill(fcos.FCOSHead(c, 1, models.CLASSES, 2), "fcos.")
    box = head.regression_head
    boxes = box.conv(x)
    maps = (
        head.classification_head.cls_logits(head.classification_head.conv(x)),
        box.bbox_reg(boxes),
        box.bbox_ctrness(boxes),
    )
    return {f"fcos_{name}": last(x) for name, x in zip(("class", "box", "fit"), maps, strict=True)}


class Norm(nn.LayerNorm):
    """Over channels, which come first."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return super().forward(input.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class ConvNorm(nn.Conv2d):
    """A convolution and a norm that is its child."""

    def __init__(self, channels: int, width: int, side: int):
        super().__init__(channels, width, side, padding=side // 2, bias=False)
        self.norm = Norm(width, eps=1e-6)

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return self.norm(super().forward(input))


def simple() -> dict[str, np.ndarray]:
    """ViTDet's pyramid of a map of 16 channels."""
    c = 16
    width = models.CHANNELS

    def up(c):
        return nn.ConvTranspose2d(c, c // 2, 2, 2)

    resize = [
        [up(c), Norm(c // 2, eps=1e-6), nn.GELU(), up(c // 2)],
        [up(c)],
        [],
        [nn.MaxPool2d(2, 2)],
    ]
    widths = (c // 4, c // 2, c, c)
    levels = nn.ModuleDict()
    for i, (layers, inside) in enumerate(zip(resize, widths, strict=True)):
        convs = ConvNorm(inside, width, 1), ConvNorm(width, width, 3)
        levels[f"simfp_{i + 2}"] = nn.Sequential(*layers, *convs)
    x = first(models.normal("deepest", (2, 6, 4, c)))
    outputs = [level(x) for level in fill(levels).values()]
    outputs.append(F.max_pool2d(outputs[-1], 1, 2))
    return {f"simple_{i}": last(x) for i, x in enumerate(outputs)}


def box_head() -> dict[str, np.ndarray]:
    """Two convolutions with norms, two linear layers."""
    layers = nn.ModuleDict(
        {
            "conv1": ConvNorm(5, 8, 3),
            "conv2": ConvNorm(8, 8, 3),
            "fc1": nn.Linear(8 * 9, 12),
            "fc2": nn.Linear(12, 12),
        }
    )
    fill(layers, "box_head.")
    x = first(models.normal("pooled", (4, 3, 3, 5)))
    for name, layer in layers.items():
        x = F.relu(layer(x.flatten(1) if name == "fc1" else x))
    return {"box_head": x.detach().numpy()}


def main() -> None:
    """Runs the detectors and writes the file."""
    np.savez_compressed(OUT, **(faster() | towers() | simple() | box_head()))  # pyright: ignore[reportArgumentType]
    print(f"{OUT}: {OUT.stat().st_size} bytes")


if __name__ == "__main__":
    main()
