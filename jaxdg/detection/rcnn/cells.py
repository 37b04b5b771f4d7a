"""A box head that ends in cells, found by a search or given (Wu et al. 2024, G-NAS).

The head follows wufan-cse/gnas: two linear layers, whose result is read as a map of 4x4; a stem;
two cells of DARTS (Liu et al. 2019), each of which halves the map; a convolution to one vector. In
a search every edge of a cell is the sum of all operations, weighed by a softmax of `alpha_reduce`,
which both cells share and which is trained with the weights, by the same optimiser and on the same
loss.

Different from it:

- The map's order is rows, columns, channels; torch's is channels, rows, columns.
- Statistics are those of the boxes that count, of the whole batch on all devices.
- DARTS's second table, of cells that keep the size, is not built: no cell reads it.
- No path is dropped; the authors' rate is 0.
"""

import dataclasses
from functools import partial, reduce
from typing import Any, NamedTuple

from flax import nnx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Float32, Key
import numpy as np

from jaxdg.backbones.layers import TORCH, Conv
from jaxdg.detection.interface import HeadContext
from jaxdg.detection.rcnn.detectors import Rcnn, RcnnConfig
from jaxdg.detection.rcnn.genotype import EDGES, NODES, OPERATIONS, Genotype, resolved
from jaxdg.detection.rcnn.roi_heads import CASCADE, BoxHead, RoiHeadsConfig, Vectors
from jaxdg.ranges import Count
from jaxdg.tracing import BatchNorm

SIDE = 4  # rows and columns of the map before the cells; each cell halves them


@dataclasses.dataclass(unsafe_hash=True)
class CellRcnnConfig(RcnnConfig):
    """Sizes of a two-stage head on a pyramid whose box head ends in cells; the defaults are
    G-NAS's.

    `roi.hidden`, a multiple of 16, is read as a map of 4x4. The cells have an eighth and a quarter
    of it as channels, 128 and 256 by default. `roi.channels` is the size of the vector behind them.

    Attributes:
        rpn: the region proposal network.
        roi: the box head, of one stage.
        channels: of the pyramid. Default 256.
        levels: of the pyramid that boxes are pooled from, 0 to 3 with 4 to 32 pixels a feature;
            proposals read one more that is coarser. Default 0, 1, 2, 3.
        genotype: of the cells: a file that `jaxdg genotype` wrote, or its eight pairs of operation
            and input, two for each of four nodes. None: a search. Default None.
        stem: channels between the linear layers and the cells. Default 108.
    """

    roi: RoiHeadsConfig = dataclasses.field(
        default_factory=lambda: RoiHeadsConfig(
            stages=CASCADE[:1], convs=0, fcs=2, class_agnostic=False
        )
    )
    genotype: str | Genotype | None = None
    stem: Count = 108

    def check(self, name: str) -> None:
        """See `HeadConfig.check`; `genotype` becomes its pairs."""
        super().check(name)
        if len(self.roi.stages) != 1:
            raise ValueError(f"{name}.roi.stages is {self.roi.stages}; allowed: one")
        if not self.roi.fcs or self.roi.hidden % SIDE**2:
            raise ValueError(
                f"{name}.roi.fcs is {self.roi.fcs} and hidden {self.roi.hidden}; allowed: at least"
                f" one, and a multiple of {SIDE**2}, which is read as a map of {SIDE}x{SIDE}"
            )
        self.genotype = resolved(self.genotype, f"{name}.genotype")

    def build(self, context: HeadContext, *, rngs: nnx.Rngs) -> Rcnn:
        """See `HeadConfig.build`."""
        self.check("the head with cells")
        head = CellHead(self, dtype=context.dtype, rngs=rngs)
        return Rcnn(self, [head], self.channels, len(self.levels), context, rngs=rngs)


class Boxes(NamedTuple):
    """How a batch of boxes is normalised.

    Attributes:
        train: use (and update) the statistics of these boxes.
        mask: of the boxes that count in them; None for all.
    """

    train: bool = False
    mask: Bool[Array, "r 1 1 1"] | None = None

    @classmethod
    def of(cls, train: bool, valid: Bool[Array, " r"] | None) -> "Boxes":
        """From the boxes that count; where none does, all are taken, as none have no mean."""
        if valid is None:
            return cls(train)
        return cls(train, (valid | ~jnp.any(valid))[:, None, None, None])

    def normalize(
        self, norm: nnx.BatchNorm, x: Float[Array, "r h w c"]
    ) -> Float32[Array, "r h w c"]:
        """The normalised maps."""
        return norm(x, use_running_average=not self.train, mask=self.mask)


def batch_norm(channels: int, affine: bool, rngs: nnx.Rngs) -> nnx.BatchNorm:
    """As torch's, in float32."""
    return BatchNorm(
        channels,
        momentum=0.9,
        epsilon=1e-5,
        use_scale=affine,
        use_bias=affine,
        use_fast_variance=False,
        dtype=jnp.float32,
        rngs=rngs,
    )


class Depthwise(nnx.Module):
    """A convolution of each channel by itself, as a product of a small map with a matrix.

    On a map of 4x4 this was 30 times as fast on CPU as XLA's grouped convolution, with the backward
    pass.
    """

    def __init__(
        self, channels: int, side: int, *, stride: int, dilation: int, dtype: str, rngs: nnx.Rngs
    ):
        self.kernel = nnx.Param(TORCH(rngs.params(), (side, side, 1, channels)))
        self.stride = stride
        self.dilation = dilation
        self.dtype = jnp.dtype(dtype)

    def __call__(self, x: Float[Array, "r n n c"]) -> Float[Array, "r m m c"]:
        r, n, _, c = x.shape
        side = self.kernel[...].shape[0]
        taps = square_taps(n, side, self.stride, self.dilation)
        kernel = self.kernel[...].reshape(-1, c).astype(self.dtype)
        matrix = jnp.concatenate([kernel, jnp.zeros((1, c), self.dtype)])[taps]
        y = jnp.einsum("rpc,qpc->rqc", x.reshape(r, -1, c).astype(self.dtype), matrix)
        m = -(-n // self.stride)
        return y.reshape(r, m, m, c)


def square_taps(n: int, side: int, stride: int, dilation: int) -> np.ndarray:
    """Which weight of a kernel of side x side links each output to each input of a map of n x n.

    Returns:
        Indices [outputs, inputs] in the flattened kernel; side x side where none does.
    """
    outputs = np.arange(0, n, stride)
    # Along one axis: the place of each input in the kernel that is centred at each output.
    place = (np.arange(n) - outputs[:, None]) / dilation + (side - 1) // 2
    tap = np.where((place == np.floor(place)) & (place >= 0) & (place < side), place, -1).astype(
        int
    )
    rows = tap[:, None, :, None]
    columns = tap[None, :, None, :]
    both = np.where((rows >= 0) & (columns >= 0), rows * side + columns, side**2)
    return both.reshape(len(outputs) ** 2, n**2)


class Factored(nnx.Module):
    """ReLU, a depthwise convolution, a 1x1 convolution and BatchNorm."""

    def __init__(
        self,
        channels: int,
        side: int,
        *,
        stride: int,
        dilation: int,
        affine: bool,
        dtype: str,
        rngs: nnx.Rngs,
    ):
        kw: Any = dict(dtype=dtype, rngs=rngs)
        self.depthwise = Depthwise(channels, side, stride=stride, dilation=dilation, **kw)
        self.pointwise = convolution(channels, channels, 1, **kw)
        self.norm = batch_norm(channels, affine, rngs)

    def __call__(self, x: Float[Array, "r n n c"], boxes: Boxes) -> Float32[Array, "r m m c"]:
        return boxes.normalize(self.norm, self.pointwise(self.depthwise(jax.nn.relu(x))))


class Chain(nnx.Module):
    """One `Factored` for a dilated convolution, two for a separable one."""

    def __init__(self, layers: list[Factored]):
        self.layers = nnx.List(layers)

    def __call__(self, x: Float[Array, "r n n c"], boxes: Boxes) -> Float32[Array, "r m m c"]:
        for layer in self.layers:
            x = layer(x, boxes)
        return x


class Project(nnx.Module):
    """ReLU, a 1x1 convolution and BatchNorm."""

    def __init__(self, inside: int, out: int, *, affine: bool, dtype: str, rngs: nnx.Rngs):
        self.conv = convolution(inside, out, 1, dtype=dtype, rngs=rngs)
        self.norm = batch_norm(out, affine, rngs)

    def __call__(self, x: Float[Array, "r n n _"], boxes: Boxes) -> Float32[Array, "r n n c"]:
        return boxes.normalize(self.norm, self.conv(jax.nn.relu(x)))


class Reduce(nnx.Module):
    """DARTS's factorised reduction: every other feature, and those a row and a column further."""

    def __init__(self, inside: int, out: int, *, affine: bool, dtype: str, rngs: nnx.Rngs):
        half = partial(convolution, inside, out // 2, 1, stride=2, dtype=dtype, rngs=rngs)
        self.conv1 = half()
        self.conv2 = half()
        self.norm = batch_norm(out, affine, rngs)

    def __call__(self, x: Float[Array, "r n n _"], boxes: Boxes) -> Float32[Array, "r m m c"]:
        x = jax.nn.relu(x)
        both = jnp.concatenate([self.conv1(x), self.conv2(x[:, 1:, 1:])], axis=-1)
        return boxes.normalize(self.norm, both)


class Pool(nnx.Module):
    """The maximum or the mean of 3x3 features; padding is left out of both."""

    def __init__(self, kind: str, stride: int, norm: nnx.BatchNorm | None):
        self.kind = kind
        self.stride = stride
        self.norm = norm

    def __call__(self, x: Float[Array, "r n n c"], boxes: Boxes) -> Float[Array, "r m m c"]:
        how: Any = dict(strides=(self.stride,) * 2, padding=((1, 1), (1, 1)))
        if self.kind == "max":
            x = nnx.max_pool(x, (3, 3), **how)
        else:
            x = nnx.avg_pool(x, (3, 3), count_include_pad=False, **how)
        return x if self.norm is None else boxes.normalize(self.norm, x)


class Identity(nnx.Module):
    """A skip connection that keeps the size."""

    def __call__(self, x: Float[Array, "r n n c"], boxes: Boxes) -> Float[Array, "r n n c"]:
        return x


def convolution(
    inside: int, out: int, side: int, *, stride: int = 1, dtype: str, rngs: nnx.Rngs
) -> Conv:
    """Without bias, starting as torch's."""
    return Conv(
        inside,
        out,
        (side, side),
        strides=stride,
        padding=side // 2,
        use_bias=False,
        kernel_init=TORCH,
        dtype=jnp.dtype(dtype),
        rngs=rngs,
    )


def operation(
    name: str, channels: int, stride: int, *, search: bool, dtype: str, rngs: nnx.Rngs
) -> nnx.Module:
    """One of `OPERATIONS` but "none".

    Args:
        name: of the operation.
        channels: of the map, which it keeps.
        stride: 2 halves the map, whose sides are even.
        search: within a sum of all: norms have no scale and bias, and pools have a norm.
        dtype: compute dtype.
        rngs: initialises the parameters.
    """
    kw: Any = dict(affine=not search, dtype=dtype, rngs=rngs)
    kind, *_, last = name.split("_")
    if last == "connect":
        return Identity() if stride == 1 else Reduce(channels, channels, **kw)
    if "pool" in name:
        return Pool(kind, stride, batch_norm(channels, False, rngs) if search else None)
    side = int(last[0])
    if kind == "dil":
        return Chain([Factored(channels, side, stride=stride, dilation=2, **kw)])
    return Chain([Factored(channels, side, stride=s, dilation=1, **kw) for s in (stride, 1)])


class Mixed(nnx.Module):
    """The sum of all operations, each with a weight; "none" adds nothing."""

    def __init__(self, channels: int, stride: int, *, dtype: str, rngs: nnx.Rngs):
        kw: Any = dict(search=True, dtype=dtype, rngs=rngs)
        self.operations = nnx.List(
            [operation(name, channels, stride, **kw) for name in OPERATIONS[1:]]
        )

    def __call__(
        self, x: Float[Array, "r n n c"], boxes: Boxes, weights: Float32[Array, " 8"]
    ) -> Float32[Array, "r m m c"]:
        terms = [weights[i] * apply(x, boxes) for i, apply in enumerate(self.operations, start=1)]
        return reduce(jnp.add, terms)


class Cell(nnx.Module):
    """Two maps to a map of half their sides: four nodes beside one another."""

    def __init__(
        self,
        inputs: tuple[int, int],
        channels: int,
        genotype: Genotype | None,
        *,
        halved: bool,
        dtype: str,
        rngs: nnx.Rngs,
    ):
        """Args:
        inputs: channels of the older and the newer map.
        channels: of a node.
        genotype: of the cell; None for all operations on all edges.
        halved: the cell before halved its map, so that the older one is twice as large.
        dtype: compute dtype.
        rngs: initialises the parameters.
        """
        kw: Any = dict(dtype=dtype, rngs=rngs)
        search = genotype is None
        older = Reduce if halved else Project
        self.preprocess0 = older(inputs[0], channels, affine=not search, **kw)
        self.preprocess1 = Project(inputs[1], channels, affine=not search, **kw)
        if genotype is None:
            self.states = tuple(tuple(range(2 + node)) for node in range(NODES))
        else:
            read = [state for _, state in genotype]
            self.states = tuple(tuple(read[2 * i : 2 * i + 2]) for i in range(NODES))
        edges = []
        for edge, state in enumerate(state for node in self.states for state in node):
            stride = 2 if state < 2 else 1
            edges.append(
                Mixed(channels, stride, **kw)
                if genotype is None
                else operation(genotype[edge][0], channels, stride, search=False, **kw)
            )
        self.edges = nnx.List(edges)

    def __call__(
        self,
        older: Float[Array, "r _ _ _"],
        newer: Float[Array, "r n n _"],
        boxes: Boxes,
        weights: Float32[Array, "14 8"] | None = None,
    ) -> Float32[Array, "r m m _"]:
        """`weights` are those of a search."""
        states: list[Any] = [self.preprocess0(older, boxes), self.preprocess1(newer, boxes)]
        edge = 0
        for node in self.states:
            total: Any = 0
            for state in node:
                of_edge = () if weights is None else (weights[edge],)
                total += self.edges[edge](states[state], boxes, *of_edge)
                edge += 1
            states.append(total)
        return jnp.concatenate(states[2:], axis=-1)


class CellHead(BoxHead):
    """Linear layers, a stem and two cells."""

    def __init__(self, config: CellRcnnConfig, *, dtype: str, rngs: nnx.Rngs):
        super().__init__(config.roi, config.channels, dtype=dtype, rngs=rngs)
        genotype = resolved(config.genotype, "genotype")
        kw: Any = dict(dtype=dtype, rngs=rngs)
        width = config.roi.hidden // SIDE**2
        stem = config.stem
        self.stem = convolution(width, stem, 3, **kw)
        self.stem_norm = batch_norm(stem, True, rngs)
        self.cells = nnx.List(
            [
                Cell((stem, stem), 2 * width, genotype, halved=False, **kw),
                Cell((stem, NODES * 2 * width), 4 * width, genotype, halved=True, **kw),
            ]
        )
        out = config.roi.channels
        self.align = convolution(NODES * 4 * width, out, 3, **kw)
        self.alpha_reduce = (
            nnx.Param(1e-3 * jax.random.normal(rngs.params(), (EDGES, len(OPERATIONS))))
            if genotype is None
            else None
        )
        self.channels = out, out

    def __call__(
        self,
        x: Float[Array, "r s s _"],
        key: Key[Array, ""] | None = None,
        train: bool = False,
        valid: Bool[Array, " r"] | None = None,
    ) -> Vectors:
        boxes = Boxes.of(train, valid)
        hidden, _ = super().__call__(x, key, train, valid)
        maps = hidden.reshape(len(hidden), SIDE, SIDE, -1)
        older = newer = boxes.normalize(self.stem_norm, self.stem(maps))
        weights = None
        if self.alpha_reduce is not None:
            weights = jax.nn.softmax(self.alpha_reduce[...])
        for cell in self.cells:
            older, newer = newer, cell(older, newer, boxes, weights)
        vector = self.align(newer).reshape(len(newer), -1)
        return vector, vector
