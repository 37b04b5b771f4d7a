"""Makes tests/golden/gates.npz: slot attention, pooling and resizing by torch's own layers.

Run by hand in the `dev` environment (written with torch 2.13.0):

    python tests/oracles/golden_gates.py

Weights and inputs are drawn by name in tests/detection/models.py, and not stored.

- slots: of `Slots` for 4 vectors and 3 texts; own: of the same without texts, where each vector
  reads its own value.
- pool_I_O, nearest_I_O: adaptive average pool and nearest resizing of a square map.
"""

from pathlib import Path
import sys
from typing import Any

import numpy as np
import torch  # pyright: ignore[reportMissingImports]
from torch import nn  # pyright: ignore[reportMissingImports]
import torch.nn.functional as F  # pyright: ignore[reportMissingImports]

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from tests.detection import models

OUT = Path(__file__).resolve().parents[2] / "tests" / "golden" / "gates.npz"
CHANNELS = 6
TEXTS = 5


def layer(kind: type[nn.Module], name: str, *sizes: int) -> nn.Module:
    """A layer whose parameters belong to a name."""
    made = kind(*sizes)
    numbers = {
        part: models.weight(f"{name}.{part}", tuple(p.shape)) for part, p in made.named_parameters()
    }
    made.load_state_dict({part: torch.tensor(number) for part, number in numbers.items()})
    return made


def slots(x: torch.Tensor, texts: torch.Tensor | None) -> torch.Tensor:
    """Three rounds of slot attention, written with torch's layers after the paper's text."""
    c = CHANNELS
    gru = nn.GRUCell(c, c)
    for kind in ("ih", "hh"):
        for part, ours in (("weight", "weight"), ("bias", "bias")):
            parameter = getattr(gru, f"{part}_{kind}")
            drawn = models.weight(f"gru.{kind}.{ours}", tuple(parameter.shape))
            parameter.data = torch.tensor(drawn)
    before = layer(nn.LayerNorm, "norm_pre_ff", c)
    mlp = [layer(nn.Linear, f"mlp.{i}", c, c) for i in (0, 2)]
    to_v = layer(nn.Linear, "to_v", c if texts is None else TEXTS, c)
    if texts is None:
        value = to_v(x)
    else:
        texts = layer(nn.LayerNorm, "norm_input", TEXTS)(texts)
        keys, values = layer(nn.Linear, "to_k", TEXTS, c)(texts), to_v(texts)
        ask = nn.Sequential(layer(nn.LayerNorm, "norm_slots", c), layer(nn.Linear, "to_q", c, c))
    for _ in range(3):
        if texts is not None:
            value = (ask(x) @ keys.T / c**0.5).softmax(1) @ values
        x = gru(value, x)
        x = x + mlp[1](F.relu(mlp[0](before(x))))
    return x


@torch.no_grad()
def main() -> None:
    """Writes the golden file."""
    x = torch.tensor(models.normal("slots", (4, CHANNELS)))
    texts = torch.tensor(models.normal("scenes", (3, TEXTS)))
    stored = {"slots": slots(x, texts), "own": slots(x, None)}
    for inside, outside in ((14, 2), (7, 1), (7, 4), (5, 2)):
        image = torch.tensor(models.normal("map", (1, 1, inside, inside)))
        small = F.adaptive_avg_pool2d(image, outside)
        stored[f"pool_{inside}_{outside}"] = small[0, 0]
        stored[f"nearest_{outside}_{inside}"] = F.interpolate(small, inside, mode="nearest")[0, 0]
    arrays: dict[str, Any] = {name: value.numpy() for name, value in stored.items()}
    np.savez(OUT, **arrays)


if __name__ == "__main__":
    main()
