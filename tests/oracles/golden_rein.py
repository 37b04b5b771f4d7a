"""Makes tests/golden/rein.npz: outputs and gradients of Rein's own adapter.

Run by hand where torch is installed, on a checkout of w1oves/Rein (GPL-3; nothing of it is here):

    python tests/oracles/golden_rein.py REIN_CHECKOUT

Two adapters of reduced size with the numbers of `drawn`: `lora`, whose tokens are products, with a
class token, and `whole` with a zero start. The file holds the features after every block, the
queries, and the gradients of the sum of the squares of both. The blocks of the encoder are the
identity. The queries' first features are what `ReinMask2FormerHead.querys2feat` makes of them.

Made with commit 7da85bc and torch 2.13.0 on CPU.
"""

import argparse
import importlib.util
from pathlib import Path
import sys
import types
from typing import Any
import zlib

import numpy as np
import torch  # pyright: ignore[reportMissingImports]

GOLDEN = Path(__file__).resolve().parents[2] / "tests" / "golden" / "rein.npz"
BLOCKS = 3
WIDTH = 24
TOKENS = 5
RANK = 4
HIDDEN = 6
IMAGES = 2
PATCHES = 7


def drawn(name: str, shape: tuple[int, ...], size: float = 0.5) -> np.ndarray:
    """Numbers that depend on the name and the shape alone."""
    rng = np.random.default_rng(zlib.crc32(name.encode()))
    return np.asarray(size * rng.standard_normal(shape), np.float32)


class Registry:
    """Stands in for mmsegmentation's registry of modules."""

    def register_module(self):
        """A decorator that changes nothing."""
        return lambda module: module


def modules(checkout: Path) -> Any:
    """The authors' file, its only import of mmsegmentation replaced."""
    builder: Any = types.ModuleType("mmseg.models.builder")
    builder.MODELS = Registry()
    sys.modules |= {
        "mmseg": types.ModuleType("mmseg"),
        "mmseg.models": types.ModuleType("mmseg.models"),
        "mmseg.models.builder": builder,
    }
    path = checkout / "rein" / "models" / "backbones" / "reins.py"
    spec = importlib.util.spec_from_file_location("reins", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def outputs(adapter: Any, class_token: bool, link: bool) -> dict[str, np.ndarray]:
    """Features after each block, queries, and gradients by torch's names."""
    to_features = torch.nn.Linear(HIDDEN, HIDDEN)
    named = {
        **dict(adapter.named_parameters()),
        **{f"querys2feat.{k}": v for k, v in to_features.named_parameters()},
    }
    for name, parameter in named.items():
        parameter.data = torch.from_numpy(drawn(name, tuple(parameter.shape)))
    x = torch.from_numpy(drawn("features", (IMAGES, PATCHES + class_token, WIDTH), 1.0))
    found = {}
    total = torch.zeros(())
    for block in range(BLOCKS):
        x = adapter(x, block, batch_first=True, has_cls_token=class_token)
        found[f"features.{block}"] = x.detach().numpy()
        total = total + (x**2).sum()
    if link:
        _, queries = adapter.return_auto(None)
        first = to_features(queries)
        found |= {"positions": queries.detach().numpy(), "first": first.detach().numpy()}
        total = total + (queries**2).sum() + (first**2).sum()
    total.backward()
    gradients = {
        f"gradient.{name}": parameter.grad.numpy()
        for name, parameter in named.items()
        if parameter.grad is not None
    }
    return found | gradients


def main() -> None:
    """Writes the file."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("checkout", type=Path)
    reins = modules(parser.parse_args().checkout)
    sizes = dict(
        num_layers=BLOCKS,
        embed_dims=WIDTH,
        patch_size=16,
        query_dims=HIDDEN,
        token_length=TOKENS,
    )
    lora = outputs(reins.LoRAReins(lora_dim=RANK, **sizes), class_token=True, link=True)
    whole = reins.Reins(**sizes, zero_mlp_delta_f=True, link_token_to_query=False)
    whole = outputs(whole, class_token=False, link=False)
    values: dict[str, Any] = {f"lora.{name}": value for name, value in lora.items()}
    values |= {f"whole.{name}": value for name, value in whole.items()}
    np.savez_compressed(GOLDEN, **values)


if __name__ == "__main__":
    main()
