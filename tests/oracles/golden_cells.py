"""Makes tests/golden/cells.npz: outputs of DARTS's operations and of a head of two cells, in torch.

Run by hand where torch works (written with torch 2.13.0):

    python tests/oracles/golden_cells.py

The modules are written here with torch's layers, after wufan-cse/gnas; they have the names of
jaxdg's, and the boxes' own statistics. Weights and inputs are drawn by name in
tests/detection/rcnn/cell_models.py, and not stored.

- NAME_STRIDE_N: an operation of a final cell on maps of N x N.
- search, final: the vector of a whole head in a search, and with a genotype.
"""

from pathlib import Path
import sys
from typing import Any

import numpy as np
import torch  # pyright: ignore[reportMissingImports]
from torch import nn  # pyright: ignore[reportMissingImports]
import torch.nn.functional as F  # pyright: ignore[reportMissingImports]

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from jaxdg.detection.rcnn.genotype import OPERATIONS
from tests.detection.rcnn import cell_models as models

OUT = Path(__file__).resolve().parents[2] / "tests" / "golden" / "cells.npz"


def conv(inside: int, out: int, k: int = 1, **options: Any) -> nn.Conv2d:
    """Without bias."""
    return nn.Conv2d(inside, out, k, bias=False, **options)


def norm(c: int, affine: bool = True) -> nn.BatchNorm2d:
    """With the statistics of the batch."""
    return nn.BatchNorm2d(c, affine=affine)


class Factored(nn.Module):
    def __init__(self, c, k, stride, dilation, affine):
        super().__init__()
        around = dict(stride=stride, padding=dilation * (k // 2), dilation=dilation)
        self.depthwise = conv(c, c, k, groups=c, **around)
        self.pointwise = conv(c, c)
        self.norm = norm(c, affine)

    def forward(self, x):
        return self.norm(self.pointwise(self.depthwise(F.relu(x))))


class Chain(nn.Module):
    def __init__(self, *layers):
        super().__init__()
        self.layers = nn.ModuleList(layers)

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        return x


class Project(nn.Module):
    def __init__(self, inside, out, affine):
        super().__init__()
        self.conv = conv(inside, out)
        self.norm = norm(out, affine)

    def forward(self, x):
        return self.norm(self.conv(F.relu(x)))


class Reduce(nn.Module):
    def __init__(self, inside, out, affine):
        super().__init__()
        self.conv1 = conv(inside, out // 2, stride=2)
        self.conv2 = conv(inside, out // 2, stride=2)
        self.norm = norm(out, affine)

    def forward(self, x):
        x = F.relu(x)
        return self.norm(torch.cat([self.conv1(x), self.conv2(x[:, :, 1:, 1:])], 1))


class Pool(nn.Module):
    def __init__(self, pool, batch_norm):
        super().__init__()
        self.pool = pool
        self.norm = batch_norm

    def forward(self, x):
        return self.norm(self.pool(x))


def operation(name, c, stride, search=False) -> nn.Module:
    """As in `jaxdg.detection.rcnn.cells`."""
    affine = not search
    after = norm(c, False) if search else nn.Identity()
    if name == "max_pool_3x3":
        return Pool(nn.MaxPool2d(3, stride, 1), after)
    if name == "avg_pool_3x3":
        return Pool(nn.AvgPool2d(3, stride, 1, count_include_pad=False), after)
    if name == "skip_connect":
        return nn.Identity() if stride == 1 else Reduce(c, c, affine)
    k = 3 if name.endswith("3x3") else 5
    if name.startswith("dil"):
        return Chain(Factored(c, k, stride, 2, affine))
    return Chain(Factored(c, k, stride, 1, affine), Factored(c, k, 1, 1, affine))


class Mixed(nn.Module):
    def __init__(self, c, stride):
        super().__init__()
        self.operations = nn.ModuleList(operation(o, c, stride, True) for o in OPERATIONS[1:])

    def forward(self, x, weights):
        return sum(w * o(x) for w, o in zip(weights[1:], self.operations, strict=True))


class Cell(nn.Module):
    def __init__(self, older, newer, c, genotype, halved):
        super().__init__()
        affine = genotype is not None
        self.preprocess0 = (Reduce if halved else Project)(older, c, affine)
        self.preprocess1 = Project(newer, c, affine)
        self.edges = nn.ModuleList()
        self.read = []
        for node in range(4):
            pairs = [(None, i) for i in range(2 + node)]
            if genotype is not None:
                pairs = genotype[2 * node : 2 * node + 2]
            for name, i in pairs:
                stride = 2 if i < 2 else 1
                self.edges.append(operation(name, c, stride) if name else Mixed(c, stride))
            self.read.append([i for _, i in pairs])

    def forward(self, older, newer, weights):
        states = [self.preprocess0(older), self.preprocess1(newer)]
        edges = iter(range(len(self.edges)))
        for read in self.read:
            parts = []
            for i in read:
                edge = next(edges)
                mixed = (weights[edge],) if weights is not None else ()
                parts.append(self.edges[edge](states[i], *mixed))
            states.append(sum(parts))
        return torch.cat(states[2:], 1)


class Head(nn.Module):
    def __init__(self, genotype):
        super().__init__()
        w, stem = models.WIDTH, models.STEM
        self.fc1 = nn.Linear(int(np.prod(models.POOLED[1:])), 16 * w)
        self.fc2 = nn.Linear(16 * w, 16 * w)
        self.stem = conv(w, stem, 3, padding=1)
        self.stem_norm = norm(stem)
        first = Cell(stem, stem, 2 * w, genotype, False)
        self.cells = nn.ModuleList([first, Cell(stem, 8 * w, 4 * w, genotype, True)])
        self.align = conv(16 * w, models.OUT, 3, padding=1)
        self.alpha_reduce = nn.Parameter(torch.zeros(14, 8)) if genotype is None else None

    def forward(self, x):
        x = F.relu(self.fc2(F.relu(self.fc1(x.flatten(1)))))
        x = x.reshape(len(x), 4, 4, -1).permute(0, 3, 1, 2)
        older = newer = self.stem_norm(self.stem(x))
        weights = None if self.alpha_reduce is None else self.alpha_reduce.softmax(-1)
        for cell in self.cells:
            older, newer = newer, cell(older, newer, weights)
        return self.align(newer).flatten(1)


def filled(module: nn.Module) -> nn.Module:
    """With the numbers of jaxdg's names and shapes."""
    state = {}
    for name, p in module.named_parameters():
        shape = tuple(p.shape)
        owner, _, last = name.rpartition(".")
        if last == "weight":
            last = "scale" if p.ndim == 1 else "kernel"
        ours = f"{owner}.{last}" if owner else last
        if p.ndim == 4:
            state[name] = models.number(ours, [shape[i] for i in (2, 3, 1, 0)]).transpose(
                3, 2, 0, 1
            )
        elif last == "kernel":
            state[name] = models.number(ours, shape[::-1]).T
        else:
            state[name] = models.number(ours, shape)
    for name, p in module.named_parameters():
        p.data = torch.tensor(np.ascontiguousarray(state[name]))
    return module.train()


def main() -> None:
    """Writes the file."""
    arrays = {}
    with torch.no_grad():
        for name, stride, n in models.CASES:
            x = torch.tensor(models.map_of(name, n)).permute(0, 3, 1, 2)
            y = filled(operation(name, models.CHANNELS, stride))(x)
            arrays[f"{name}_{stride}_{n}"] = y.permute(0, 2, 3, 1).numpy()
        x = torch.tensor(models.normal("pooled", models.POOLED))
        arrays["search"] = filled(Head(None))(x).numpy()
        arrays["final"] = filled(Head(models.GENOTYPE))(x).numpy()
    np.savez_compressed(OUT, **arrays)
    print(OUT, OUT.stat().st_size)


if __name__ == "__main__":
    main()
