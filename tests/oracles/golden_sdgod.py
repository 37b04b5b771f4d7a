"""Makes tests/golden/sdgod.npz: the layers of S-DGOD in torch, as its authors' compiled files have
them.

Run by hand where torch is installed:

    python tests/oracles/golden_sdgod.py

Weights and inputs are not stored: `drawn` makes each from its name, here and in the tests. The file
holds, in the order batch, rows, columns, channels:

- extractor.3 and extractor.5: E_DI and E_DS with running statistics, and with the batch's
  (`train`), without dropout;
- student.0, 1, 2: S_l of a map of odd sides that is halved so many times, its attention, and what
  the transformation makes of it.

Made with torch 2.14.1 on CPU.
"""

from pathlib import Path
from typing import Any
import zlib

import numpy as np
import torch  # pyright: ignore[reportMissingImports]
from torch import nn  # pyright: ignore[reportMissingImports]

GOLDEN = Path(__file__).resolve().parents[2] / "tests" / "golden" / "sdgod.npz"
CHANNELS = 6
WANTED = 5
SIZE = (9, 11)


def drawn(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """Random numbers of a name; those of scales and variances are positive."""
    x = np.random.default_rng(zlib.crc32(name.encode())).normal(size=shape)
    positive = name.endswith((".var", ".scale"))
    return np.asarray(0.5 + np.abs(x) if positive else 0.5 * x, np.float32)


def layer(name: str, inside: int, outside: int, side: int, bias: bool, stride=1, groups=1):
    """A convolution and its BatchNorm."""
    conv: Any = nn.Conv2d(inside, outside, side, stride, side // 2, groups=groups, bias=bias)
    norm: Any = nn.BatchNorm2d(outside)
    tensors = {"scale": norm.weight, "bias": norm.bias}
    tensors |= {"mean": norm.running_mean, "var": norm.running_var}
    for key, tensor in tensors.items():
        tensor.data = torch.from_numpy(drawn(f"{name}.norm.{key}", tuple(tensor.shape)))
    conv.weight.data = torch.from_numpy(drawn(f"{name}.weight", tuple(conv.weight.shape)))
    if bias:
        conv.bias.data = torch.from_numpy(drawn(f"{name}.bias", (outside,)))
    return conv, norm


def extractor(side: int) -> nn.Sequential:
    """Three convolutions; the middle ones have half the channels."""
    c = CHANNELS
    names = [f"extractor.{side}.{i}" for i in (1, 2, 3)]
    return nn.Sequential(
        *layer(names[0], c, c // 2, side, True),
        nn.ReLU(),
        *layer(names[1], c // 2, c // 2, side, True),
        nn.ReLU(),
        *layer(names[2], c // 2, c, side, True),
    )


def student(halvings: int) -> tuple[nn.Sequential, nn.Sequential, nn.Sequential]:
    """Attention, scale and transformation."""
    c = CHANNELS
    name = f"student.{halvings}"
    _, last = layer(f"{name}.attention_norm", c, c, 1, False)
    attention = nn.Sequential(
        *layer(f"{name}.attention.0", c, c, 3, False, groups=c),
        nn.ReLU(),
        *layer(f"{name}.attention.1", c, c, 3, False, groups=c),
        nn.ReLU(),
        last,
        nn.ReLU(),
        nn.Sigmoid(),
    )
    h = c // 2
    sizes = {
        0: [(c, c, 1, 1)],
        1: [(c, h, 1, 1), (h, h, 3, 2), (h, c, 1, 1)],
        2: [(c, h, 3, 2), (h, h, 3, 2), (h, c, 1, 1)],
    }[halvings]
    layers = []
    for i, (inside, outside, side, stride) in enumerate(sizes):
        layers += [*layer(f"{name}.scale.{i}", inside, outside, side, False, stride), nn.ReLU()]
    transform = nn.Sequential(*layer(f"{name}.transform", c, WANTED, 1, False))
    return attention, nn.Sequential(*layers), transform


def main() -> None:
    """Writes the file."""
    x = torch.from_numpy(drawn("x", (2, CHANNELS, *SIZE)))
    found = {}
    with torch.no_grad():
        for side in (3, 5):
            module = extractor(side)
            found[f"extractor.{side}"] = module.eval()(x)
            found[f"extractor.{side}.train"] = module.train()(x)
        for halvings in (0, 1, 2):
            attention, scale, transform = student(halvings)
            found[f"student.{halvings}.attention"] = attention(x)
            attended = found[f"student.{halvings}.attention"] * x
            found[f"student.{halvings}"] = scale(attended)
            found[f"student.{halvings}.transform"] = transform(found[f"student.{halvings}"])
    np.savez_compressed(GOLDEN, **{k: np.moveaxis(v.numpy(), 1, -1) for k, v in found.items()})


if __name__ == "__main__":
    main()
