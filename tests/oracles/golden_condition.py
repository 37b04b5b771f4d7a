"""Makes tests/golden/condition.npz: token states of transformers' CLIP text tower.

Run by hand where torch and transformers are installed (last with torch 2.14 and transformers 5.23):

    python tests/oracles/golden_condition.py

One small random tower of each activation and the states that diffusers gives to a UNet, of the
empty prompt in both ways of filling it up, and of a text. Weights are not stored: `drawn` makes
each from its published name, here and in the tests.
"""

from pathlib import Path
import sys
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from tests.oracles import stand_ins  # noqa: F401  before what follows

# isort: split

import numpy as np
import torch  # pyright: ignore[reportMissingImports]
from transformers import (  # pyright: ignore[reportMissingImports]
    CLIPTextConfig,
    CLIPTextModel,
)

from tests.oracles.golden_segformer import drawn

GOLDEN = Path(__file__).resolve().parents[2] / "tests" / "golden"
START, END = 49406, 49407
TEXT = (START, 320, 1125, 539, 320, END)  # "a photo of a"
SIZES: dict[str, Any] = dict(
    vocab_size=49408,
    hidden_size=16,
    intermediate_size=64,
    num_hidden_layers=2,
    num_attention_heads=2,
    max_position_embeddings=77,
)


def main() -> None:
    """Writes the file."""
    empty = (START, END)
    rows = ((*empty, *[END] * 75), (*empty, *[0] * 75), (*TEXT, *[0] * (77 - len(TEXT))))
    ids = np.asarray(rows, np.int64)
    arrays: dict[str, np.ndarray] = {"ids": ids.astype(np.int32)}
    for activation in ("quick_gelu", "gelu"):
        model: Any = CLIPTextModel(CLIPTextConfig(**SIZES, hidden_act=activation)).eval()
        state = {n: t for n, t in model.state_dict().items() if not n.endswith("position_ids")}
        arrays["names"] = np.asarray(
            [f"{n} {' '.join(map(str, t.shape))}" for n, t in state.items()]
        )
        model.load_state_dict(
            {n: torch.from_numpy(drawn(n, tuple(t.shape))) for n, t in state.items()}, strict=False
        )
        with torch.inference_mode():
            states = model(torch.from_numpy(ids)).last_hidden_state
        arrays[activation] = states.numpy()
        print(activation, f"{states.std():.2f}")
    path = GOLDEN / "condition.npz"
    np.savez_compressed(path, **arrays)  # pyright: ignore[reportArgumentType]
    print(f"{path.name}: {path.stat().st_size} bytes")


if __name__ == "__main__":
    main()
