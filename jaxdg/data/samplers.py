"""The image at position p of the endless sequence of training examples, by random access.

Every sampler is a plain function of (seed, p), so the number of processes and hosts does not
matter. There are three. Permutations show every image once an epoch. Parts of a mixture are drawn
by weight. DAFormer's rare-class sampling (Hoyer et al. 2022, lhoyer/DAFormer) draws a class with
P(c) ~ exp((1 - f_c) / T), f_c its share of all labelled pixels, and then one of its images.
"""

from collections.abc import Callable
import dataclasses
import functools
from typing import NamedTuple

from jaxtyping import Float64, Int32, Int64
import numpy as np

from jaxdg.data.augment.transforms import Wanted
from jaxdg.data.class_counts import class_pixels
from jaxdg.data.datasets import Dataset, Mixture

# Keep random streams apart; `pipeline` augments position p by (seed, EXAMPLE, p).
EXAMPLE, EPOCH, PART, RARE = range(4)
BLOCK = 4096  # positions whose parts are drawn at once


class Draw(NamedTuple):
    """The example at a position.

    Attributes:
        image: its place in the dataset.
        wanted: the class that the crop should show, if any.
    """

    image: int
    wanted: Wanted | None = None


# A pure function of the position. It holds plain values only, so that it pickles.
Sampler = Callable[[int], Draw]


@dataclasses.dataclass(frozen=True)
class Permutations:
    """Position p belongs to epoch p // length, and each epoch is another permutation.

    Attributes:
        seed: of the order; several numbers for a part of a mixture.
        length: number of images.
    """

    seed: tuple[int, ...]
    length: int

    def __call__(self, p: int) -> Draw:
        return Draw(int(_permutation(self.seed, self.length, p // self.length)[p % self.length]))


class RareClasses:
    """Draws a class, a rare one more often, then an image with enough of it for a crop."""

    def __init__(
        self,
        seed: tuple[int, ...],
        pixels: Int32[np.ndarray, "n k"],
        temperature: float,
        min_pixels: int,
        names: tuple[str, ...],
    ):
        """Finds the images of each class.

        Args:
            seed: of all draws.
            pixels: of each class in each image.
            temperature: the lower, the more often the rarest classes are drawn.
            min_pixels: pixels of the class that an image needs to be drawn; at least 1.
            names: of the classes, for the error message.

        Raises:
            ValueError: no class occurs, or no image shows enough of one that does.
        """
        if not pixels.any():
            raise ValueError(
                "no label shows any class, so that none can be drawn; run `python -m"
                " jaxdg.data.check`"
            )
        self.seed = seed
        self.min_pixels = min_pixels
        self.total: list[int] = pixels.sum(axis=0, dtype=np.int64).tolist()
        self.probabilities = class_probabilities(pixels, temperature)
        self.images = [np.flatnonzero(column >= min_pixels).astype(np.int32) for column in pixels.T]
        for name, most, images in zip(names, pixels.max(axis=0), self.images, strict=True):
            if most and not len(images):
                shown = f"no image shows more than {most} pixels of {name}"
                raise ValueError(
                    f"data.rare_class_min_pixels is {min_pixels}, but {shown}; allowed: at most"
                    f" {most}"
                )

    def __call__(self, p: int) -> Draw:
        rng = np.random.default_rng((*self.seed, RARE, p))
        train_id = int(rng.choice(len(self.images), p=self.probabilities))
        return Draw(int(rng.choice(self.images[train_id])), Wanted(train_id, self.min_pixels))


class Weighted:
    """Draws a part by its weight at each position.

    The k-th position of a part is the k-th of that part's own sampler.
    """

    def __init__(
        self, seed: int, parts: list[Sampler], lengths: list[int], weights: tuple[float, ...]
    ):
        """Normalises the weights.

        Args:
            seed: of the draws of parts.
            parts: a sampler each.
            lengths: number of images in each; they follow one another in the dataset.
            weights: of each, above 0 and in any unit.
        """
        self.seed = seed
        self.parts = parts
        self.first = np.cumsum([0, *lengths])
        self.probabilities = np.array(weights) / np.sum(weights)
        self._before = {0: np.zeros(len(parts), np.int64)}

    def __call__(self, p: int) -> Draw:
        block, within = divmod(p, BLOCK)
        drawn = self._drawn(block)
        part = int(drawn[within])
        position = self._drawn_before(block)[part] + np.count_nonzero(drawn[:within] == part)
        draw = self.parts[part](int(position))
        return draw._replace(image=draw.image + int(self.first[part]))

    def _drawn_before(self, block: int) -> Int64[np.ndarray, " parts"]:
        """How often each part was drawn before a block.

        Threads may compute the same numbers at the same time.
        """
        known = block
        while known not in self._before:
            known -= 1
        for b in range(known, block):
            counts = np.bincount(self._drawn(b), minlength=len(self.parts))
            self._before[b + 1] = self._before[b] + counts
        return self._before[block]

    def _drawn(self, block: int) -> Int64[np.ndarray, " BLOCK"]:
        rng = np.random.default_rng((self.seed, PART, block))
        return rng.choice(len(self.parts), BLOCK, p=self.probabilities)


def make_sampler(
    dataset: Dataset,
    *,
    seed: int,
    weights: tuple[float, ...] = (),
    temperature: float = 0.0,
    min_pixels: int = 1,
    workers: int = 0,
) -> Sampler:
    """The order in which a run sees a dataset.

    Args:
        dataset: the images to train on.
        seed: of the order.
        weights: of the parts of a `Mixture`; () takes a mixture as one dataset and shows every
            image once an epoch.
        temperature: of rare-class sampling, within each weighted part; 0 turns it off.
        min_pixels: see `RareClasses`.
        workers: processes that count the pixels of classes if no earlier run did; 0 counts in
            threads of this process.

    Returns:
        A pure function of the position.

    Raises:
        ValueError: the dataset is empty, or no image shows enough of a class.
    """

    def of(part: Dataset, seed: tuple[int, ...]) -> Sampler:
        if not len(part):
            raise ValueError(f"domain {part.domain!r} has no images to train on")
        if not temperature:
            return Permutations(seed, len(part))
        pixels = class_pixels(part, workers)
        return RareClasses(seed, pixels, temperature, min_pixels, part.labels.names)

    if not weights:
        return of(dataset, (seed,))
    parts = dataset.parts if isinstance(dataset, Mixture) else (dataset,)
    samplers = [of(part, (seed, PART, k)) for k, part in enumerate(parts)]
    return Weighted(seed, samplers, [len(part) for part in parts], weights)


def class_totals(sampler: Sampler) -> tuple[int, ...]:
    """Pixels of each class by which a sampler draws rare classes, part after part, or ()."""
    if isinstance(sampler, Weighted):
        return tuple(total for part in sampler.parts for total in class_totals(part))
    return tuple(sampler.total) if isinstance(sampler, RareClasses) else ()


def class_probabilities(
    pixels: Int32[np.ndarray, "n k"], temperature: float
) -> Float64[np.ndarray, " k"]:
    """The probability of each class: a softmax of (1 - share) / temperature over those that occur.

    Args:
        pixels: of each class in each image.
        temperature: above 0.

    Returns:
        Probabilities; 0 for a class that never occurs.
    """
    total = pixels.sum(axis=0, dtype=np.int64)
    logits = np.where(total > 0, (1 - total / total.sum()) / temperature, -np.inf)
    odds = np.exp(logits - logits.max())
    return odds / odds.sum()


@functools.lru_cache(maxsize=8)
def _permutation(seed: tuple[int, ...], length: int, epoch: int) -> Int32[np.ndarray, " n"]:
    return np.random.default_rng((*seed, EPOCH, epoch)).permutation(length).astype(np.int32)
