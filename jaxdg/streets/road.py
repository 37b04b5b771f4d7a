"""The random numbers of a generated street, and the centre line of its road."""

import math

import numpy as np

END = 110.0  # the street is built up to this many metres ahead


class Dice:
    """Single random numbers, drawn from the generator in blocks because that is much cheaper."""

    def __init__(self, rng: np.random.Generator):
        self.random = _one_by_one(rng.random).__next__
        self.bell = _one_by_one(rng.standard_normal).__next__

    def uniform(self, low, high):
        return low + (high - low) * self.random()

    def normal(self, mean, deviation):
        return mean + deviation * self.bell()

    def exponential(self, mean):
        return -mean * math.log(1 - self.random())

    def integer(self, low, high):
        """From low to high - 1."""
        return low + int(self.random() * (high - low))


def _one_by_one(draw_block):
    while True:
        yield from draw_block(512).tolist()


class Road:
    """The centre line of the road: straight, then a bend of constant curvature."""

    STEP = 0.5
    BACK = 20.0

    def __init__(self, curvature, start):
        s = np.arange(-self.BACK, END + 30, self.STEP)
        heading = np.clip(curvature * np.maximum(s - start, 0), -1.3, 1.3)
        x = np.cumsum(np.sin(heading)) * self.STEP
        y = np.cumsum(np.cos(heading)) * self.STEP
        origin = int(self.BACK / self.STEP)
        table = np.stack([x - x[origin], y - y[origin], np.sin(heading), np.cos(heading)], 1)
        self.rows = table.tolist()
        self.headings = heading.tolist()

    def _index(self, s) -> int:
        return min(max(int((s + self.BACK) / self.STEP), 0), len(self.rows) - 1)

    def heading(self, s):
        return self.headings[self._index(s)]

    def at(self, s, t):
        """World x and y of the point s metres along the road and t metres to the right of it."""
        i = self._index(s)
        x, y, sin, cos = self.rows[i]
        rest = s + self.BACK - i * self.STEP
        return x + rest * sin + t * cos, y + rest * cos - t * sin

    def strip(self, t0, t1, s0, s1) -> list:
        """Outline [k, 3] of the ground between two distances to the centre line."""
        n = max(2, int((s1 - s0) / 6) + 1)
        step = (s1 - s0) / (n - 1)
        right = [self.at(s0 + i * step, t1) for i in range(n)]
        left = [self.at(s1 - i * step, t0) for i in range(n)]
        return [(x, y, 0.0) for x, y in right + left]
