"""Makes tests/golden/eva_clip.npz: outputs and sizes of the authors' EVA-CLIP image towers.

Run by hand where torch, timm and einops are installed, on a checkout of baaivision/EVA (commit
5623d08):

    python tests/oracles/golden_eva_clip.py EVA

Its code runs unchanged, with plain attention in place of xformers', which needs a GPU.

- tokens/8b, tokens/18b: of a small random encoder that normalises before, or after, attention and
  MLP, its weights drawn from its names; all tokens after every block.
- parameters/8b, parameters/18b: numbers of the full towers, and of their final norm and head alone,
  counted without memory for them.
"""

from functools import partial
import importlib
import json
from pathlib import Path
import sys
import types
from typing import Any

import numpy as np
import torch  # pyright: ignore[reportMissingImports]

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from tests.oracles import stand_ins  # noqa: F401  before what follows

# isort: split

from tests.backbones.drawn import drawn, wave

GOLDEN = Path(__file__).resolve().parents[2] / "tests" / "golden"
SMALL: dict[str, Any] = dict(
    image_size=20, patch_size=4, width=24, layers=4, head_width=12, xattn=False
)


def authors_code(checkout: Path) -> tuple[Any, Path]:
    """The module that builds the towers, without the rest of its package, and the folder of their
    configurations.
    """
    folder = checkout / "EVA-CLIP-18B" / "shinji" / "eva_clip"
    package = types.ModuleType("eva_clip")
    package.__path__ = [str(folder)]
    sys.modules["eva_clip"] = package
    return importlib.import_module("eva_clip.model"), folder / "model_configs"


@torch.inference_mode()
def tokens(model: torch.nn.Module, images: np.ndarray) -> np.ndarray:
    """All tokens after every block [blocks, b, n, c]; weights are drawn from the tensors' names."""
    state = {
        name: torch.from_numpy(drawn(name, tuple(tensor.shape)))
        for name, tensor in model.state_dict().items()
    }
    model.eval().load_state_dict(state, strict=True)
    seen: list[np.ndarray] = []
    for block in model.blocks:  # pyright: ignore
        block.register_forward_hook(lambda module, inputs, output: seen.append(output.numpy()))
    model(torch.from_numpy(images).permute(0, 3, 1, 2))
    return np.stack(seen)


def main() -> None:
    """Writes the file."""
    code, configs = authors_code(Path(sys.argv[1]))
    # Rates of drop path are read from a tensor, which must hold numbers even where the parameters
    # have none.
    torch.linspace = partial(torch.linspace, device="cpu")
    arrays = {}
    for size in ("8b", "18b"):
        config = json.loads((configs / f"EVA-CLIP-{size.upper()}.json").read_text())
        with torch.device("meta"):
            tower = code._build_vision_tower(config["embed_dim"], config["vision_cfg"])
        beyond = sum(p.numel() for part in (tower.norm, tower.head) for p in part.parameters())
        arrays[f"parameters/{size}"] = np.array(
            [sum(p.numel() for p in tower.parameters()), beyond]
        )
        arrays[f"tokens/{size}"] = tokens(
            code._build_vision_tower(8, config["vision_cfg"] | SMALL), wave(20, 20)
        )
    path = GOLDEN / "eva_clip.npz"
    np.savez_compressed(path, **arrays)  # pyright: ignore[reportArgumentType]
    print(f"{path.name}: {path.stat().st_size} bytes")


if __name__ == "__main__":
    main()
