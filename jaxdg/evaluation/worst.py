"""The images of a domain on which a model is worst, found while it is judged."""

from collections.abc import Callable
import heapq
from typing import Any

Example = dict[str, Any]  # see `DomainResult.examples`

KEPT = 3  # images of a domain


class Worst:
    """Keeps the images of the lowest scores; of equal ones those that come first in the domain."""

    def __init__(self, most: int = KEPT):
        """Keeps at most so many."""
        self._most = most
        # A heap whose first is the best of the kept; no two have one index, so examples are never
        # compared.
        self._kept: list[tuple[float, int, Example]] = []

    def offer(self, score: float, index: int, example: Callable[[], Example]) -> None:
        """Keeps an image if it is among the worst so far.

        Args:
            score: of the image.
            index: of the image in its domain.
            example: makes what is kept; called only then.
        """
        place = (-score, -index)
        if len(self._kept) < self._most or place > self._kept[0][:2]:
            heapq.heappush(self._kept, (*place, example()))
            if len(self._kept) > self._most:
                heapq.heappop(self._kept)

    def kept(self) -> dict[int, tuple[float, Example]]:
        """Score and example of each kept image by its index."""
        return {-index: (-score, example) for score, index, example in self._kept}


def worst_of(kept: dict[int, tuple[float, Example]], most: int = KEPT) -> list[Example]:
    """The examples of the lowest scores of several `Worst.kept`, the worst first."""
    order = sorted(kept, key=lambda index: (kept[index][0], index))
    return [kept[index][1] for index in order[:most]]
