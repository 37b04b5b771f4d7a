"""Makes tests/golden/clip_the_gap.npz: outputs of CLIP the Gap's heads by torch's own modules.

Run by hand where torch, torchvision and open_clip are installed:

    python tests/oracles/golden_clip_the_gap.py

A small CLIP ResNet of open_clip and its text tower, with weights that clip_models.py draws by name,
and a map of the third stage:

- logits and deltas of the proposal network, in detectron2's order [rows, columns, anchors];
- scores and offsets of two boxes: RoIAlign to 14 x 14, the last stage, then the attention pool
  against the texts of seven class names, and the mean against the regressor.
"""

from pathlib import Path
import sys
from typing import Any

import numpy as np
import torch  # pyright: ignore[reportMissingImports]
from torch.nn import functional as F  # pyright: ignore[reportMissingImports]
from torchvision import ops  # pyright: ignore[reportMissingImports]

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from tests.oracles import stand_ins  # noqa: F401  before what follows

# isort: split

import open_clip  # pyright: ignore[reportMissingImports]

from tests import clip_models
from tests.oracles.golden_clip_text import classes, fill

GOLDEN = Path(__file__).resolve().parents[2] / "tests" / "golden"
NAMES = ("bus", "bike", "car", "motor", "person", "rider", "truck")
ROWS, COLUMNS, WIDTH = 6, 10, 256  # of the third stage
STRIDE = 16
BOXES = ((3.0, 5.0, 90.5, 61.0), (40.0, 10.0, 158.0, 95.0))
ANCHORS = 15
RPN = "proposal_generator.rpn_head"
REGRESSOR = "roi_heads.box_predictor.bbox_pred"


def drawn(name: str, *shape: int) -> torch.Tensor:
    """The tensor of a name."""
    return torch.from_numpy(np.asarray(clip_models.draw(name, shape)))


def convolved(x: torch.Tensor, name: str, channels: int, side: int) -> torch.Tensor:
    """A convolution of the proposal network."""
    weight = drawn(f"{RPN}.{name}.weight", channels, x.shape[1], side, side)
    return F.conv2d(x, weight, drawn(f"{RPN}.{name}.bias", channels), padding=side // 2)


@torch.inference_mode()
def main() -> None:
    """Writes the file."""
    build: Any = open_clip.CLIP
    text = dict(context_length=77, vocab_size=49408, layers=3, width=64, heads=4)
    image = dict(image_size=224, layers=(1, 2, 1, 1), width=16)
    model = build(48, image, text, quick_gelu=True)
    fill(model, "")
    texts = torch.from_numpy(classes(model.encode_text, NAMES, ("a photo of a {}",)))
    features = drawn("features", 1, WIDTH, ROWS, COLUMNS)

    hidden = F.relu(convolved(features, "conv", WIDTH, 3))
    logits = convolved(hidden, "objectness_logits", ANCHORS, 1)
    deltas = convolved(hidden, "anchor_deltas", 4 * ANCHORS, 1)
    deltas = deltas.view(1, ANCHORS, 4, ROWS, COLUMNS).permute(0, 3, 4, 1, 2)

    pooled = ops.roi_align(
        features, [torch.tensor(BOXES)], (14, 14), 1 / STRIDE, sampling_ratio=0, aligned=True
    )
    last = model.visual.layer4(pooled)
    embedding = F.normalize(model.visual.attnpool(last), dim=-1)
    scores = torch.cat([100 * embedding @ texts.T, torch.zeros(len(BOXES), 1)], dim=1)
    weight = drawn(f"{REGRESSOR}.weight", 4 * len(NAMES), last.shape[1])
    bias = drawn(f"{REGRESSOR}.bias", 4 * len(NAMES))
    offsets = F.linear(last.mean(dim=(2, 3)), weight, bias).view(len(BOXES), len(NAMES), 4)
    np.savez_compressed(
        GOLDEN / "clip_the_gap.npz",
        logits=logits.permute(0, 2, 3, 1).flatten(1).numpy(),
        deltas=deltas.reshape(1, -1, 4).numpy(),
        scores=scores.numpy(),
        offsets=offsets.numpy(),
    )


if __name__ == "__main__":
    main()
