"""Makes tests/golden/low_rank.npz: what the authors' low-rank layers start with and compute.

Run by hand where torch and peft are installed, on checkouts of ysj9909/SoMA and
chanseul01/RecycleLoRA:

    python tests/oracles/golden_low_rank.py SOMA_CHECKOUT RECYCLELORA_CHECKOUT

Weights and inputs are not stored: `drawn` makes each from its name, here and in the tests. The file
holds, in torch's layout [out, in]:

- soma: a block with q, k, v, fc1 and fc2 is wrapped as it is (scaling 2). For each layer B A, the
  frozen weight, and the output.
- released: the same in the order of the authors' training, which wraps layers with their first,
  random weights and loads the trained ones afterwards.
- peft: LoRA on a fused layer: its output and the gradients of x, A and B.
- recycle: the frozen weight of a wide and of a tall layer, and B A of both pairs.

Made with SoMA 7ea8c0e, RecycleLoRA d094a7b, peft 0.21.2 and torch 2.14.1 on CPU.
"""

from pathlib import Path
import sys
from typing import Any
import zlib

import numpy as np
import torch  # pyright: ignore[reportMissingImports]

GOLDEN = Path(__file__).resolve().parents[2] / "tests" / "golden" / "low_rank.npz"
SIZES = {"q": (12, 12), "k": (12, 12), "v": (12, 12), "fc1": (12, 20), "fc2": (20, 12)}
RANK = 3
ALPHA = 6
TOKENS = 5


def drawn(name: str, *shape: int) -> np.ndarray:
    """Random numbers of a name."""
    return np.random.default_rng(zlib.crc32(name.encode())).normal(size=shape).astype(np.float32)


def tensor(name: str, *shape: int) -> torch.Tensor:
    """The same as a tensor."""
    return torch.from_numpy(drawn(name, *shape))


class Block(torch.nn.Module):
    """The layers of `SIZES`, whose weights are drawn by a word and their names."""

    def __init__(self, word: str):
        super().__init__()
        for name, (inside, outside) in SIZES.items():
            layer = torch.nn.Linear(inside, outside)
            layer.weight.data = tensor(f"{word} {name}", outside, inside)
            layer.bias.data = tensor(f"bias {name}", outside)
            setattr(self, name, layer)


def encoder(word: str) -> torch.nn.Module:
    """An encoder of one block, called as DINOv2's."""
    module = torch.nn.Module()
    module.blocks = torch.nn.ModuleList([Block(word)])
    return module


def soma(library: Any) -> dict[str, Any]:
    """Both starts of SoMA."""
    found = {}
    config = library.SoraConfig(
        r=RANK,
        lora_alpha=ALPHA,
        target_modules=list(SIZES),
        lora_weight_init="sora",
        start_lora_idx=0,
    )
    for start, word in (("soma", "loaded"), ("released", "random")):
        model = encoder(word)
        library.SoraModel(config, model)
        if start == "released":
            model.load_state_dict(encoder("loaded").state_dict(), strict=False)
        for name, (inside, _) in SIZES.items():
            layer: Any = model.get_submodule(f"blocks.0.{name}")
            with torch.no_grad():
                found[f"{start} {name} ba"] = layer.lora_B.weight @ layer.lora_A.weight
                found[f"{start} {name} weight"] = layer.weight
                found[f"{start} {name} y"] = layer(tensor(f"x {name}", TOKENS, inside))
    return found


def lora() -> dict[str, Any]:
    """LoRA by peft on a layer of 12 to 36, with A and B that are not 0."""
    from peft import LoraConfig, get_peft_model  # pyright: ignore[reportMissingImports]

    model: Any = torch.nn.ModuleDict({"qkv": torch.nn.Linear(12, 36)})
    model["qkv"].weight.data = tensor("loaded qkv", 36, 12)
    model["qkv"].bias.data = tensor("bias qkv", 36)
    config = LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=["qkv"], lora_dropout=0.0)
    layer = get_peft_model(model, config).base_model.model["qkv"]
    a = layer.lora_A["default"].weight
    b = layer.lora_B["default"].weight
    a.data = tensor("a", RANK, 12)
    b.data = tensor("b", 36, RANK)
    x = tensor("x qkv", TOKENS, 12).requires_grad_()
    y = layer(x)
    (y * tensor("towards", TOKENS, 36)).sum().backward()
    return {"peft y": y, "peft dx": x.grad, "peft da": a.grad, "peft db": b.grad}


def recycle(library: Any) -> dict[str, Any]:
    """RecycleLoRA's start: a main pair of rank 3 and a second of rank 1, alpha 6."""
    found = {}
    for name in ("fc1", "fc2"):
        inside, outside = SIZES[name]
        layer = library.RecycleLoRALinear(
            inside, outside, r=RANK + 1, r_main=RANK, lora_alpha=ALPHA
        )
        layer.initialize_and_subtract(tensor(f"loaded {name}", outside, inside))
        found[f"recycle {name} weight"] = layer.weight
        found[f"recycle {name} main"] = layer.lora_B_main @ layer.lora_A_main
        found[f"recycle {name} sub"] = layer.lora_B_sub @ layer.lora_A_sub
    return found


def main() -> None:
    """Writes the file."""
    sys.path[:0] = [f"{sys.argv[1]}/rein/peft", f"{sys.argv[2]}/rein/models/backbones"]
    import recyclelora_linear  # pyright: ignore[reportMissingImports]
    import sora  # pyright: ignore[reportMissingImports]

    arrays = soma(sora) | lora() | recycle(recyclelora_linear)
    np.savez_compressed(GOLDEN, **{name: x.detach().numpy() for name, x in arrays.items()})


if __name__ == "__main__":
    main()
