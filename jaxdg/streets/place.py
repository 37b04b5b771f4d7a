"""What lines a generated street: houses, gardens, parks, walls, fences, railways and trees.

Positions are (s, t) as in `ground.py`.
"""

from itertools import pairwise
import math

import numpy as np

from jaxdg.streets import paints, shapes
from jaxdg.streets.draw import BARS, BRICK, CULLED, FACADE, FOLIAGE, PAVING, PLAIN
from jaxdg.streets.ground import (
    BUILDING,
    FENCE,
    MEADOW,
    SIDEWALK,
    SLABS,
    TERRAIN,
    VEGETATION,
    WALL,
    Ground,
)

SKYLINE_KEY = 9e5  # the painter's key of the horizon: after the ground, before all else


class Place(Ground):
    """A street without traffic; see `Ground` for the other attributes.

    Attributes:
        rails: the side (-1 left, 1 right) with a railway, or None.
    """

    def __init__(self, rng: np.random.Generator, size: tuple[int, int]):
        super().__init__(rng, size)
        self.rails = None
        for side in (-1, 1):
            self._frontage(side)
        self._skyline()

    def wall(
        self, p, q, z0, z1, color, label, key, material, params=(0, 0, 0, 0), noise=(0.10, 9.0),
        flags=0,
    ):  # fmt: skip
        """An upright quad over the ground line p to q."""
        quad = [(*p, z0), (*q, z0), (*q, z1), (*p, z1)]
        self.mesh.polygon(quad, color, label, key, material, noise, params, flags=flags)

    def _frontage(self, side):
        """Builds what lines the street on one side."""
        rng = self.rng
        house = self._house
        garden = self._garden
        park = self._park
        wall = self._walled
        fence = self._fenced
        town = [house] * 7 + [wall]
        suburb = [garden] * 4 + [fence, wall]
        green = [park] * 3 + [fence]
        industry = [wall, wall, fence, house, fence]
        mixed = [house, garden, park, wall, fence]
        mood = self.pick([town, town, town, suburb, green, industry, mixed, mixed])
        if self.rails is None and self.chance(0.2):
            self.rails = side
            mood = [self._railway]
        self.floor = rng.uniform(2.8, 3.8)
        self.row = self.tint(self.pick(paints.HOUSE_PAINT))
        for s0, s1 in self._blocks(-6, self.far):
            s = s0
            while s < s1 - 3:
                build = self.pick(mood)
                length = rng.uniform(8, 22) if build in (house, garden) else rng.uniform(14, 40)
                length = min(length, s1 - s)
                build(side, s, s + length)
                s += length
        # Houses or a park face the camera beyond the side street.
        if self.crossing:
            self._corner(side, self.crossing[1], self.front(side) + 0.5)
        elif self.end is not None:
            self._corner(side, self.far + 13, 0.0)

    def _corner(self, side, s, t):
        """Fronts and trees that face the camera at s, from t outward."""
        rng = self.rng
        while t < 60:
            width = rng.uniform(9, 20)
            if self.chance(0.75):
                a = self.road.at(s + 0.2, side * t)
                b = self.road.at(s + 0.2, side * (t + width))
                self._facade(a if side > 0 else b, b if side > 0 else a, s + 0.3)
            else:
                for _ in range(3):
                    self.tree(s + rng.uniform(2, 8), side * (t + rng.uniform(0, width)))
            t += width

    def _facade(self, p, q, key, floors=None, color=None):
        """A house front from p (its left end as seen) to q."""
        rng = self.rng
        length = math.hypot(q[0] - p[0], q[1] - p[1])
        pitch = length / max(1, round(length / rng.uniform(2.0, 3.8)))
        floor = self.floor * rng.uniform(0.9, 1.1)
        floors = floors or rng.integer(2, 8)
        height = floors * floor + 0.5
        color = self.tint(self.pick(paints.HOUSE_PAINT), 0.08) if color is None else color
        style = rng.random() + (1 if self.chance(0.45) else 0)
        params = (pitch, floor, rng.random(), style)
        self.wall(p, q, 0, height, color, BUILDING, key, FACADE, params, flags=CULLED)
        return height, color

    def _house(self, side, s0, s1):
        rng = self.rng
        front = self.front(side)
        t = front + (0.0 if self.chance(0.75) else rng.uniform(0.5, 3))
        self.strip(side * front, side * 40, s0, s1, self.slab, SIDEWALK, 1, SLABS, PAVING)
        p = self.road.at(s0, side * t)
        q = self.road.at(s1, side * t)
        color = self.row if self.chance(0.3) else self.tint(self.pick(paints.HOUSE_PAINT), 0.08)
        height, color = self._front(side, p, q, s1 + 0.02, color)
        deep = self.road.at(s0, side * (t + 12))
        a, b = (p, deep) if side > 0 else (deep, p)
        # The end wall is painted before the nearer neighbour, whose key is s0 + 0.02.
        color = self.tint(color, 0.02, 0.92)
        self.wall(a, b, 0, height, color, BUILDING, s0 + 0.03, PLAIN, flags=CULLED)
        if self.chance(0.5):
            self._roof(side, s0, s1, t, height, s1 + 0.02)
        self.cast(p, q, height)
        if self.pavement[side] and self.chance(0.3):  # an awning
            z = rng.uniform(2.6, 3.1)
            d = rng.uniform(0.8, 1.5)
            m = s0 + 0.5
            n = min(s0 + rng.uniform(3, 7), s1)
            corners = ((m, t, z + 0.5), (n, t, z + 0.5), (n, t - d, z), (m, t - d, z))
            cloth = [(*self.road.at(s, side * v), height) for s, v, height in corners]
            self.mesh.polygon(cloth, self.tint(self.pick(paints.AWNING_PAINT)), BUILDING, m)

    def _front(self, side, p, q, key, color, floors=None):
        """A facade along the street.

        Seen from the road, its left end is the far one on the right side and the near one on the
        left side.
        """
        return self._facade(*((p, q) if side < 0 else (q, p)), key, floors, color)

    def _roof(self, side, s0, s1, t, height, key):
        ridge = height + self.rng.uniform(2, 4)
        corners = ((s0, t - 0.3), (s1, t - 0.3), (s1, t + 5), (s0, t + 5))
        a, b, c, d = (self.road.at(s, side * v) for s, v in corners)
        slope = [(*a, height), (*b, height), (*c, ridge), (*d, ridge)]
        color = self.tint(self.pick(paints.ROOF_PAINT), 0.1)
        self.mesh.polygon(slope, color, BUILDING, key, BRICK)
        near = self.road.at(s0, side * t)
        deep = self.road.at(s0, side * (t + 10))
        gable = [(*near, height), (*d, ridge), (*deep, height)]
        self.mesh.polygon(gable, self.tint(self.row, 0.05, 0.9), BUILDING, s0 + 0.03)

    def _lawn(self, side, s0, s1, width):
        """Grass from the frontage to `width` metres from the middle of the road."""
        front = side * self.front(side)
        self.strip(front, side * width, s0, s1, self.tint(self.grass), TERRAIN, 1, MEADOW)

    def _garden(self, side, s0, s1):
        """A detached house behind its front garden."""
        rng = self.rng
        f = self.front(side)
        self._lawn(side, s0, s1, 50)
        back = f + rng.uniform(3, 8)
        gap = rng.uniform(1, 3)
        p = self.road.at(s0 + gap, side * back)
        q = self.road.at(s1 - gap, side * back)
        color = self.tint(self.pick(paints.HOUSE_PAINT))
        height, color = self._front(side, p, q, s1 + 0.5, color, rng.integer(1, 4))
        deep = self.road.at(s0 + gap, side * (back + 9))
        p, q = (p, deep) if side > 0 else (deep, p)
        windows = (3.0, self.floor, rng.random(), 0.3)
        color = self.tint(color, 0.02, 0.92)
        key = s0 + gap + 0.1
        self.wall(p, q, 0, height, color, BUILDING, key, FACADE, windows, flags=CULLED)
        self._roof(side, s0 + gap, s1 - gap, back, height, s1 + 0.4)
        edge = rng.random()
        if edge < 0.4:
            self.fence(side, s0, s1 - rng.uniform(0, 3), f)
        elif edge < 0.7:
            self._hedge(side, s0, s1 - rng.uniform(0, 4), f + 0.3)
        elif edge < 0.85:
            self._wall(side, s0, s1, f, rng.uniform(0.7, 1.3))
        for _ in range(rng.integer(0, 3)):
            self.tree(rng.uniform(s0, s1), side * rng.uniform(f + 1, back), rng.uniform(2, 6))

    def _park(self, side, s0, s1):
        rng = self.rng
        f = self.front(side)
        self._lawn(side, s0, s1, 75)
        for _ in range(int((s1 - s0) * rng.uniform(0.12, 0.32)) + 1):
            self.tree(rng.uniform(s0, s1), side * (f + 1.5 + rng.exponential(10)))
        if self.chance(0.3):
            self._hedge(side, s0, s1, f + 0.5)
        elif self.chance(0.4):
            self.fence(side, s0, s1, f + 0.2)

    def _walled(self, side, s0, s1):
        rng = self.rng
        f = self.front(side)
        self.strip(side * f, side * 50, s0, s1, self.tint(self.grass), TERRAIN, 1)
        self._wall(side, s0, s1, f, rng.uniform(1.4, 3.8))
        if self.chance(0.5):
            p = self.road.at(s0, side * (f + 9))
            q = self.road.at(s1, side * (f + 9))
            self._front(side, p, q, s1 + 1, None)
        for _ in range(rng.integer(1, 5)):
            self.tree(rng.uniform(s0, s1), side * (f + rng.uniform(2, 7)), key=s1 + 0.5)

    def _fenced(self, side, s0, s1):
        rng = self.rng
        f = self.front(side)
        self._lawn(side, s0, s1, 75)
        self.fence(side, s0, s1, f + 0.2)
        for _ in range(rng.integer(0, 4)):
            self.tree(rng.uniform(s0, s1), side * (f + rng.uniform(3, 14)), key=s1 + 0.5)
        if self.chance(0.35):
            t = f + rng.uniform(8, 20)
            self._front(side, self.road.at(s0, side * t), self.road.at(s1, side * t), s1 + 1, None)

    def _railway(self, side, s0, s1):
        """Gravel with rails; `Street` adds the train."""
        f = self.front(side)
        self._lawn(side, s0, s1, 75)
        gravel = self.tint([0.45, 0.41, 0.37])
        near = side * (f + 0.8)
        self.strip(near, side * (f + 4.6), s0, s1, gravel, TERRAIN, 1.2, (0.3, 20.0))
        for t in (f + 1.95, f + 3.4):
            self.strip(side * t, side * (t + 0.12), s0, s1, [0.62, 0.60, 0.58], TERRAIN, 1.3)
        for _ in range(int((s1 - s0) / 6)):
            self.tree(self.rng.uniform(s0, s1), side * (f + self.rng.uniform(7, 16)), key=s1 + 0.5)
        if self.chance(0.5):
            self.fence(side, s0, s1, f + 0.3)

    def _pieces(self, side, s0, s1, t, length):
        """Ground lines along the street of about `length` metres each, with s of their far ends."""
        for a, b in pairwise(np.linspace(s0, s1, max(2, int((s1 - s0) / length) + 1)).tolist()):
            yield self.road.at(a, side * t), self.road.at(b, side * t), b

    def _wall(self, side, s0, s1, t, height):
        color = self.tint(self.pick(paints.WALL_PAINT), 0.06)
        material = BRICK if self.chance(0.6) else PLAIN
        for p, q, far in self._pieces(side, s0, s1, t, 5):
            self.wall(p, q, 0, height, color, WALL, far + 0.01, material, noise=(0.22, 4.0))
            top = self.tint(color, 0, 1.2)
            self.wall(p, q, height - 0.12, height, top, WALL, far + 0.005, PLAIN)
            self.cast(p, q, height)

    def fence(self, side, s0, s1, t):
        """A fence along the street that can be seen through."""
        rng = self.rng
        height = rng.uniform(1.0, 2.1)
        pitch = rng.uniform(0.14, 0.30)
        color = self.tint(self.pick(paints.FENCE_PAINT), 0.08)
        params = (pitch, rng.uniform(0.35, 0.65), height * 0.62, 0.12)
        for p, q, far in self._pieces(side, s0, s1, t, 5):
            self.wall(p, q, 0, height, color, FENCE, far, BARS, params)

    def _hedge(self, side, s0, s1, t):
        color = self.tint([0.20, 0.32, 0.14], 0.15)
        height = self.rng.uniform(0.8, 1.8)
        noise = (0.42, 22.0)
        for p, q, far in self._pieces(side, s0, s1, t, 4):
            top = height + self.rng.normal(0, 0.04)
            self.wall(p, q, 0, top, color, VEGETATION, far + 0.01, FOLIAGE, noise=noise)

    def tree(self, s, t, height=None, key=None):
        """A tree, or perhaps a bush where no height is given."""
        rng = self.rng
        bush = height is None and self.chance(0.25)
        height = height or (rng.uniform(0.9, 2.2) if bush else rng.uniform(4.5, 12))
        leaf = self.tint(self.pick(paints.LEAF_PAINT), 0.12)
        width = height * rng.uniform(0.75, 1.15) * (1.6 if bush else 1)
        shade = self.tint(leaf, 0, 0.78)
        palette = self.palette(LEAF=leaf, TOP=shade, TRIM=self.tint([0.26, 0.20, 0.15]))
        shape = self.pick(shapes.models()["bush" if bush else "tree"])
        x, y = self.stand(shape, palette, s, t, VEGETATION, key, scale=(width, 1, height))
        dx = width * 0.28 * math.cos(self.camera.yaw)
        dy = -width * 0.28 * math.sin(self.camera.yaw)
        self.cast((x - dx, y - dy), (x + dx, y + dy), height * 0.95, height * 0.35)

    def _skyline(self):
        """Far houses and woods close the view."""
        rng = self.rng
        angle = self.camera.yaw - 1.25
        x, y = self.camera.position[:2]
        while angle < self.camera.yaw + 1.25:
            step = rng.uniform(0.05, 0.16)
            r = rng.uniform(118, 150)
            p, q = ((x + r * math.sin(a), y + r * math.cos(a)) for a in (angle, angle + step))
            key = SKYLINE_KEY
            if self.chance(0.5):
                color = self.tint(self.pick(paints.HOUSE_PAINT))
                windows = (4.0, 3.4, rng.random(), 0.4)
                self.wall(p, q, -1, rng.uniform(7, 26), color, BUILDING, key, FACADE, windows)
            elif self.chance(0.85):
                top = rng.uniform(4, 13)
                color = self.tint([0.24, 0.34, 0.18])
                self.wall(p, q, -1, top, color, VEGETATION, key, FOLIAGE, noise=(0.3, 2.0))
            angle += step
