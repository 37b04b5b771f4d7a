"""Makes tests/golden/mask2former_losses.npz: losses of transformers' Mask2FormerLoss.

Run by hand where torch and transformers are installed (written with transformers 5.23.0, torch
2.13.0):

    python tests/oracles/golden_mask2former_losses.py

Four images: all classes, two classes of which one is a single pixel, no class at all, three
classes. `torch.rand` is replaced to learn, or to choose, the points:

- drawn: the points it drew, the matching, the terms of each prediction, and the gradients of their
  weighted sum.
- spread: the same with the points of a fixed sequence, the same for every mask.
- redrawn: mean and standard deviation of the three weighted terms over many draws.
"""

from pathlib import Path
import sys
from typing import Any
from unittest import mock

import numpy as np
import torch  # pyright: ignore[reportMissingImports]

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from tests.oracles import stand_ins  # noqa: F401  before what follows

# isort: split

from transformers import Mask2FormerConfig  # pyright: ignore[reportMissingImports]
from transformers.models.mask2former.modeling_mask2former import (  # pyright: ignore[reportMissingImports]
    Mask2FormerLoss,
)

OUT = Path(__file__).resolve().parents[2] / "tests" / "golden" / "mask2former_losses.npz"
LAYERS = 3
IMAGES = 4
QUERIES = 6
CLASSES = 4
SIZE = (12, 10)
LABEL_SIZE = (40, 36)
POINTS = 64
REDRAWS = 1000
TERMS = {"class": "loss_cross_entropy", "mask": "loss_mask", "dice": "loss_dice"}
WEIGHTS = {"class": 2.0, "mask": 5.0, "dice": 5.0}


def spread(*shape, **_) -> torch.Tensor:
    """Stands in for `torch.rand`: evenly spread points [.., p, 2], by the test's own formula."""
    points = (
        0.5 + np.outer(np.arange(1, shape[-2] + 1), [0.7548776662466927, 0.5698402909980532])
    ) % 1
    return torch.tensor(points, dtype=torch.float32).expand(shape).contiguous()


def draw_labels(rng: np.random.Generator) -> np.ndarray:
    """The four label maps, in blocks, uint8 with 255 for unlabelled pixels."""
    blocks = rng.integers(0, CLASSES, (IMAGES, 5, 4)).astype(np.uint8)
    blocks[0, 0] = np.arange(CLASSES)
    blocks[3][blocks[3] == 2] = 255
    label = blocks.repeat(8, axis=1).repeat(9, axis=2)
    label[0, :, -5:] = 255
    label[1] = 1
    label[1, 17, 30] = 3
    label[2] = 255
    return label


class Recorder:
    """`torch.rand` and a matcher's `forward`, remembering what they returned."""

    def __init__(self, matcher):
        self.forward = matcher.forward
        self.draws: list[np.ndarray] = []
        self.matchings: list[list] = []

    def rand(self, *shape, **_) -> torch.Tensor:
        """Random points, remembered."""
        points = torch.from_numpy(np.random.default_rng(len(self.draws)).random(shape, np.float32))
        self.draws.append(points.numpy())
        return points

    def match(self, *args) -> list:
        """The matching, remembered."""
        self.matchings.append(self.forward(*args))
        return self.matchings[-1]


def main() -> None:
    """Runs the oracle and writes the file."""
    rng = np.random.default_rng(0)
    label = draw_labels(rng)
    present = [[j for j in range(CLASSES) if (image == j).any()] for image in label]
    masks = [
        torch.tensor(
            np.stack([image == j for j in c]) if c else np.zeros((0, *LABEL_SIZE)),
            dtype=torch.float32,
        )
        for image, c in zip(label, present, strict=True)
    ]
    class_logits = rng.normal(0, 2, (LAYERS, IMAGES, QUERIES, CLASSES + 1)).astype(np.float32)
    mask_logits = rng.normal(0, 3, (LAYERS, IMAGES, QUERIES, *SIZE)).astype(np.float32)
    config = Mask2FormerConfig(num_labels=CLASSES, train_num_points=POINTS)  # pyright: ignore[reportCallIssue]
    criterion = Mask2FormerLoss(config, {})

    def run(c: torch.Tensor, m: torch.Tensor) -> dict[str, Any]:
        """Terms [l] of each prediction.

        The oracle takes the last one first, then the others in order.
        """
        others = [
            {"class_queries_logits": x, "masks_queries_logits": y}
            for x, y in zip(c[:-1], m[:-1], strict=True)
        ]
        losses = criterion(
            m[-1], c[-1], masks, [torch.tensor(p, dtype=torch.long) for p in present], others
        )
        names = {k: [*(f"{v}_{i}" for i in range(LAYERS - 1)), v] for k, v in TERMS.items()}
        return {k: torch.stack([losses[name] for name in v]) for k, v in names.items()}

    def run_with_gradients() -> dict[str, np.ndarray]:
        c = torch.tensor(class_logits, requires_grad=True)
        m = torch.tensor(mask_logits, requires_grad=True)
        terms = run(c, m)
        gradients = torch.autograd.grad(
            torch.stack([WEIGHTS[k] * v.sum() for k, v in terms.items()]).sum(), (c, m)
        )
        names = {"class_gradient": gradients[0].numpy(), "mask_gradient": gradients[1].numpy()}
        return {**{k: v.detach().numpy() for k, v in terms.items()}, **names}

    recorder = Recorder(criterion.matcher)
    with (
        mock.patch.object(torch, "rand", recorder.rand),
        mock.patch.object(criterion.matcher, "forward", recorder.match),
    ):
        drawn = run_with_gradients()
    drawn |= in_slots(recorder, present)
    with mock.patch.object(torch, "rand", spread):
        fixed = run_with_gradients()

    torch.manual_seed(0)
    with torch.no_grad():
        runs = [run(torch.tensor(class_logits), torch.tensor(mask_logits)) for _ in range(REDRAWS)]
    redrawn = np.array([[WEIGHTS[k] * float(terms[k].sum()) for k in TERMS] for terms in runs])
    arrays: dict[str, Any] = {
        "class_logits": class_logits,
        "mask_logits": mask_logits,
        "label": label,
    }
    arrays |= {f"drawn_{k}": v for k, v in drawn.items()} | {
        f"spread_{k}": v for k, v in fixed.items()
    }
    np.savez_compressed(
        OUT, **arrays, redrawn_mean=redrawn.mean(axis=0), redrawn_std=redrawn.std(axis=0)
    )
    print(
        f"{OUT}: {OUT.stat().st_size} bytes; mean {redrawn.mean(axis=0)}, std {redrawn.std(axis=0)}"
    )


def in_slots(recorder: Recorder, present: list[list[int]]) -> dict[str, np.ndarray]:
    """What was recorded, by prediction, image and class: `query` is -1 and points are 0.5 where a
    class is absent.
    """
    shape = (LAYERS, IMAGES, CLASSES)
    draws = iter(recorder.draws)
    query = np.full(shape, -1, np.int32)
    shared = np.zeros((LAYERS, IMAGES, POINTS, 2), np.float32)
    candidates = []
    uniform = []
    slots = []
    for layer, matching in zip([LAYERS - 1, *range(LAYERS - 1)], recorder.matchings, strict=True):
        shared[layer] = [next(draws)[0] for _ in range(IMAGES)]
        candidates.append(next(draws))
        uniform.append(next(draws))
        for image, (queries, targets) in enumerate(matching):
            for i, j in zip(queries.tolist(), targets.tolist(), strict=True):
                query[layer, image, present[image][j]] = i
                slots.append((layer, image, present[image][j]))
    result = {"query": query, "shared": shared}
    for name, points in (("candidates", candidates), ("uniform", uniform)):
        flat = np.concatenate(points)
        result[name] = np.full((*shape, *flat.shape[1:]), 0.5, np.float32)
        result[name][tuple(np.transpose(slots))] = flat
    return result


if __name__ == "__main__":
    main()
