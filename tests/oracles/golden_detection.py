"""Makes tests/golden/detection.npz: torchvision's results on tests/detection/cases.py.

Run by hand where torchvision and its compiled operators work (written with torchvision 0.28.0,
torch 2.13.0):

    python tests/oracles/golden_detection.py

A torchvision built for CUDA loads beside a torch built without it once its missing symbols (`nm -D`
lists them; none is called) are defined by empty libraries of the names libcudart.so.13,
libc10_cuda.so and libtorch_cuda.so on LD_LIBRARY_PATH.

- kept, kept_of_class: of the small NMS cases, indices in torchvision's order, 255 after the last;
  large: of the large ones, packed masks.
- roi_I, roi_gradient_I: RoIAlign of the I-th kind on the middle level; pyramid, pyramid_gradient_I:
  its multi-level form, and gradients.
- iou, giou, giou_loss (and its gradient), encoded, decoded, clipped, anchors, matched, and the
  losses.
"""

from pathlib import Path
import sys
from typing import Any

import numpy as np
import torch  # pyright: ignore[reportMissingImports]
import torch.nn.functional as F  # pyright: ignore[reportMissingImports]
from torchvision import ops  # pyright: ignore[reportMissingImports]
from torchvision.models.detection import (  # pyright: ignore[reportMissingImports]
    _utils,
    anchor_utils,
    image_list,
)

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from tests.detection import cases

OUT = Path(__file__).resolve().parents[2] / "tests" / "golden" / "detection.npz"


def tensor(x: Any, gradient: bool = False) -> torch.Tensor:
    """A tensor of its own."""
    return torch.tensor(np.asarray(x), requires_grad=gradient)


def suppression() -> dict[str, np.ndarray]:
    """Kept boxes."""

    def padded(kept):
        return np.pad(
            kept.numpy().astype(np.uint8), (0, cases.NMS_SIZE - len(kept)), constant_values=255
        )

    kept = []
    kept_of_class = []
    large = []
    for boxes, scores, count, threshold, classes in cases.nms_cases():
        inputs = tensor(boxes[:count]), tensor(scores[:count])
        kept.append(padded(ops.nms(*inputs, threshold)))
        if not (boxes % 1).any():  # then moving the classes apart rounds nothing
            kept_of_class.append(
                padded(ops.batched_nms(*inputs, tensor(classes[:count]), threshold))
            )
    for boxes, scores, threshold in cases.large_nms_cases():
        mask = np.zeros(len(boxes), bool)
        mask[ops.nms(tensor(boxes), tensor(scores), threshold).numpy()] = True
        large.append(np.packbits(mask))
    return {
        "kept": np.stack(kept),
        "kept_of_class": np.stack(kept_of_class),
        "large": np.stack(large),
    }


def pooling() -> dict[str, np.ndarray]:
    """RoIAlign and its gradients, bins before channels as here."""
    maps, boxes = cases.roi_inputs()
    result = {}
    for i, (size, samples, aligned) in enumerate(cases.ROI_KINDS):
        features = tensor(maps[1].transpose(0, 3, 1, 2), True)
        rois = list(tensor(boxes if samples else cases.upright(boxes)))
        pooled = ops.roi_align(
            features, rois, size, 1 / cases.STRIDES[1], samples, aligned
        ).permute(0, 2, 3, 1)
        result[f"roi_{i}"] = pooled.detach().numpy().reshape(2, cases.ROIS, *size, -1)
        (pooled * tensor(cases.towards(f"roi {i}", pooled.shape))).sum().backward()
        result[f"roi_gradient_{i}"] = features.grad.numpy().transpose(0, 2, 3, 1)  # pyright: ignore[reportOptionalMemberAccess]
    levels = {str(i): tensor(level.transpose(0, 3, 1, 2), True) for i, level in enumerate(maps)}
    pooler = ops.MultiScaleRoIAlign(list(levels), 2, 2)
    h, w = (4 * side for side in cases.MAPS[0][1:])
    pooled = pooler(levels, list(tensor(cases.upright(boxes))), [(h, w)] * 2).permute(0, 2, 3, 1)
    if [pooler.scales, pooler.map_levels.k_min] != [  # pyright: ignore
        [1 / s for s in cases.STRIDES],
        2,
    ]:
        raise RuntimeError(f"torchvision made the scales {pooler.scales} of these maps")
    (pooled * tensor(cases.towards("pyramid", pooled.shape))).sum().backward()
    result["pyramid"] = pooled.detach().numpy().reshape(2, cases.ROIS, 2, 2, -1)
    for name, level in levels.items():
        result[f"pyramid_gradient_{name}"] = level.grad.numpy().transpose(0, 2, 3, 1)  # pyright: ignore[reportOptionalMemberAccess]
    return result


def geometry() -> dict[str, np.ndarray]:
    """Overlaps, offsets, clipping, anchors, assignment."""
    a, b = (tensor(cases.proper_boxes(name, 50, 50, 90)) for name in "ab")
    left, right = (
        tensor(cases.proper_boxes(name, 500, 50, 90), True) for name in ("left", "right")
    )
    loss = ops.generalized_box_iou_loss(left, right)
    coder = _utils.BoxCoder((10.0, 10.0, 5.0, 5.0))
    boxes = left.detach()
    anchors = right.detach()
    generator = anchor_utils.AnchorGenerator(((32,), (64,)), ((0.5, 1.0, 2.0),) * 2)
    images = image_list.ImageList(torch.zeros(1, 3, 40, 48), [(40, 48)])
    matched = []
    for candidates, truth, (low, high) in cases.matching_cases():
        quality = ops.box_iou(tensor(truth), tensor(candidates))
        matched.append(
            [_utils.Matcher(high, low, allow)(quality).numpy() for allow in (False, True)]
        )
    return {
        "iou": ops.box_iou(a, b).numpy(),
        "giou": ops.generalized_box_iou(a, b).numpy(),
        "giou_loss": loss.detach().numpy(),
        "giou_gradient": torch.autograd.grad(loss.sum(), left)[0].numpy(),
        "encoded": coder.encode_single(boxes, anchors).numpy(),
        "decoded": (
            coder.decode_single(tensor(cases.towards("offsets", (500, 8)) * 30), anchors).numpy()
        ),
        "clipped": ops.clip_boxes_to_image(boxes, (40, 48)).numpy(),
        "anchors": (
            generator(images, [torch.zeros(1, 1, 5, 6), torch.zeros(1, 1, 3, 4)])[0]
            .numpy()
            .astype(np.int16)
        ),
        "matched": np.asarray(matched, np.int8),
    }


def losses() -> dict[str, np.ndarray]:
    """Element by element, and gradients of the sums."""
    x, target = (6 * cases.towards(name, (300,)) for name in ("prediction", "target"))
    result = {}
    for name, loss in {
        "l1": lambda x: F.l1_loss(x, tensor(target), reduction="none"),
        "smooth_l1": lambda x: F.smooth_l1_loss(x, tensor(target), reduction="none", beta=1 / 9),
        "focal": lambda x: ops.sigmoid_focal_loss(x, tensor((target > 2).astype(np.float32))),
    }.items():
        prediction = tensor(x, True)
        values = loss(prediction)
        result[name] = values.detach().numpy()
        result[name + "_gradient"] = torch.autograd.grad(values.sum(), prediction)[0].numpy()
    return result


def main() -> None:
    """Runs the operators and writes the file."""
    np.savez_compressed(OUT, **(suppression() | pooling() | geometry() | losses()))  # pyright: ignore[reportArgumentType]
    print(f"{OUT}: {OUT.stat().st_size} bytes")


if __name__ == "__main__":
    main()
