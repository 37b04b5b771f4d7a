"""What gradients in half precision are compared on: a model, its weights and inputs by formula, and
all that is discontinuous (attention masks, matches, points) given.
"""

import dataclasses
import math
import zlib

from flax import nnx
from jaxtyping import Array, Float
import numpy as np

from jaxdg.backbones import Pyramid, VitConfig
from jaxdg.conversion import mask2former, vit, vltseg
from jaxdg.conversion.mapping import Layout, Row
from jaxdg.segmentation import Mask2FormerConfig

IGNORE = 255


@dataclasses.dataclass(frozen=True)
class Case:
    """Sizes of the model and its inputs: a plain encoder, the pyramid and a Mask2Former head.

    Weights and images differ from draw to draw; what is given does not.
    """

    encoder: VitConfig
    head: Mask2FormerConfig
    batch: int
    draw: int = 0

    @property
    def levels(self) -> tuple[tuple[int, int], ...]:
        """Rows and columns of the levels that the queries attend to, coarsest first."""
        rows, columns = self.encoder.grid
        return (rows // 2, columns // 2), (rows, columns), (2 * rows, 2 * columns)

    def images(self) -> np.ndarray:
        """Smooth pictures with noise, [b, h, w, 3]."""
        h, w = self.encoder.image_size
        i, y, x, c = np.ogrid[0 : self.batch, 0:h, 0:w, 0:3]
        wave = np.sin(0.11 * y + 0.5 * c + i) * np.cos(0.07 * x - 0.9 * c + 2 * i)
        return wave.astype(np.float32) + 0.3 * drawn(f"images {self.draw}", wave.shape)

    def labels(self) -> np.ndarray:
        """Classes in blocks of 32 pixels, the first column of them without; uint8 [b, h, w]."""
        h, w = (-(-side // 32) for side in self.encoder.image_size)
        random = np.random.default_rng(0)
        blocks = random.integers(0, self.head.num_classes, (self.batch, h, w)).astype(np.uint8)
        blocks[:, :, 0] = IGNORE
        label = blocks.repeat(32, axis=1).repeat(32, axis=2)
        return label[:, : self.encoder.image_size[0], : self.encoder.image_size[1]]

    def looked(self) -> list[np.ndarray]:
        """Where each query may look in each layer, bool [b, q, n]."""
        sizes = [h * w for h, w in self.levels]
        shape = (self.batch, self.head.queries)
        return [drawn(f"looked {i}", (*shape, sizes[i % 3])) > 0 for i in range(self.head.layers)]

    def query(self) -> np.ndarray:
        """The query of each class in each prediction and image, int32 [l, b, k]."""
        random = np.random.default_rng(1)
        chosen = [
            [random.permutation(self.head.queries)[: self.head.num_classes] for _ in self.images()]
            for _ in range(self.head.layers + 1)
        ]
        return np.asarray(chosen, np.int32)

    def points(self) -> np.ndarray:
        """Evenly spread points at which all masks are compared, float32 [p, 2]."""
        steps = np.arange(1, self.head.points + 1)
        spread = 0.5 + np.outer(steps, [0.7548776662466927, 0.5698402909980532])
        return (spread % 1).astype(np.float32)


DRAWS = 5
SMALL = Case(
    VitConfig(image_size=(256, 128), depth=2, taps=(0, 1), width=64, heads=2),
    Mask2FormerConfig(
        num_classes=5,
        hidden=64,
        queries=48,
        heads=8,
        pixel_layers=2,
        pixel_ffn=128,
        layers=2,
        ffn=128,
        points=1024,
    ),
    batch=2,
)


class Whole(nnx.Module):
    """Encoder, pyramid and head under the names of `Segmenter`."""

    def __init__(self, case: Case, dtype: str, rngs: nnx.Rngs):
        encoder = dataclasses.replace(case.encoder, dtype=dtype)
        self.backbone = encoder.build(rngs=rngs)
        self.pyramid = Pyramid(encoder.width, dtype=dtype, rngs=rngs)
        self.head = dataclasses.replace(case.head, dtype=dtype).build(
            (encoder.width,) * 4, encoder="", rngs=rngs
        )

    def levels(self, images: Float[Array, "b h w 3"]) -> tuple[Float[Array, "b _ _ c"], ...]:
        """Each tap makes two levels."""
        fine, coarse = self.backbone(images)
        return self.pyramid((fine, fine, coarse, coarse))


def drawn(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """Float32 standard normal numbers that belong to a name."""
    return np.random.default_rng(zlib.crc32(name.encode())).standard_normal(shape, np.float32)


def weight(name: str, shape: tuple[int, ...], draw: int = 0) -> np.ndarray:
    """The parameter of a name in the peer: attention is far from uniform, points are several pixels
    away.
    """
    numbers = drawn(f"{name} {draw}", shape)
    if "level_embed" in name or "queries_" in name:
        return numbers
    if name.endswith(("pos_embed", "cls_token")):
        return 0.5 * numbers
    if len(shape) == 1:
        numbers = 0.2 * numbers + name.endswith(".weight")  # of a norm
    else:
        fan = tuple(range(1, len(shape)))
        numbers = (numbers - numbers.mean(fan, keepdims=True)) * 0.8 / np.sqrt(np.prod(shape[1:]))
    more = {"offsets.weight": 0.2, "offsets.bias": 6}
    factor = next((factor for part, factor in more.items() if part in name), 1)
    return np.float32(factor) * numbers.astype(np.float32)


def layout() -> Layout:
    """The peer's names: timm's for the encoder, the re-implementation's for the pyramid,
    transformers' for the head.
    """
    head = next(known for known in mask2former.layouts() if known.name == "transformers")
    rows = [
        row._replace(
            source=tuple(f"backbone.{name}" for name in row.source),
            target=f"backbone.{row.target}",
            resized=False,
        )
        for row in vit.timm().rows
    ]
    rows += [
        Row((f"backbone.{theirs}{ending}",), f"pyramid.{ours}{end}", transform)
        for ours, theirs, kind in vltseg.PYRAMID
        for ending, end, transform in kind
        if (ending, end, transform) not in vltseg.STATISTICS
    ]
    rows += [row._replace(target=f"head.{row.target}") for row in head.rows]
    return Layout("peer", tuple(rows), ())


PARTS = {  # of the model, and what the names of their parameters in jaxdg start with
    "encoder": ("backbone.",),
    "pyramid": ("pyramid.",),
    "pixel decoder": ("head.pixel_decoder.",),
    "decoder": ("head.layers.", "head.decoder_norm.", "head.query_", "head.level_embed"),
    "predictors": ("head.class_embed.", "head.mask_embed."),
}


def part(name: str) -> str:
    """The part of the model that a parameter belongs to."""
    (found,) = (part for part, starts in PARTS.items() if name.startswith(starts))
    return found


def share(gradients: dict[str, np.ndarray]) -> np.ndarray:
    """Up to 64 numbers of every parameter's gradient, evenly spread, the parameters by name."""
    taken = []
    for _, x in sorted(gradients.items()):
        taken.append(x.reshape(-1)[np.linspace(0, x.size - 1, min(x.size, 64)).astype(int)])
    return np.concatenate(taken).astype(np.float32)


def distances(
    gradients: np.ndarray, exact: np.ndarray, shapes: dict[str, tuple[int, ...]]
) -> dict[str, float]:
    """How far gradients are from exact ones, relative to the norm of these.

    Args:
        gradients: of each draw, as `share` takes them, [draws, n].
        exact: likewise.
        shapes: of the parameters by name.

    Returns:
        Of each parameter the root mean square over the draws.
    """
    sizes = {name: min(math.prod(shape), 64) for name, shape in sorted(shapes.items())}
    ends = np.cumsum(list(sizes.values()))[:-1]
    far = {}
    for name, a, b in zip(sizes, *(np.split(x, ends, 1) for x in (gradients, exact)), strict=True):
        relative = np.linalg.norm(a - b, axis=1) / np.linalg.norm(b, axis=1)
        far[name] = float(np.sqrt(np.mean(relative**2)))
    return far
