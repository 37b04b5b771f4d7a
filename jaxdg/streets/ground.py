"""The ground of a generated street: camera, lanes, surfaces and markings.

Positions are (s, t): s metres along the centre line of the road, which may bend, and t metres to
the right of it.
"""

from itertools import pairwise
import math

import numpy as np

from jaxdg.streets import paints, shapes
from jaxdg.streets.draw import GROUND, PAVING, SKY, Camera, Mesh
from jaxdg.streets.road import END, Dice, Road

# Cityscapes train ids
ROAD, SIDEWALK, BUILDING, WALL, FENCE, POLE, LIGHT, SIGN, VEGETATION, TERRAIN = range(SKY)
GROUND_KEY = 1e6  # the painter's key of the lowest layer; higher layers have lower keys
# Noise: amplitude and texels a metre.
MEADOW = (0.26, 10.0)
ASPHALT = (0.10, 18.0)
SLABS = (0.12, 6.0)


class Ground:
    """The ground of a street, drawn from `rng` into `mesh`.

    Attributes:
        mesh: the polygons of the street.
        camera: stands in one of the lanes at s = 0.
        sun: direction towards it.
        drive: the side that traffic keeps to, 1 right or -1 left.
        lanes: (t of the middle, whether traffic drives away from the camera) of each lane.
        half: half the carriageway's width.
        crossing: s where a side street begins and ends, or None.
        end: s where the street meets another at a T, or None.
        far: s where the street ends.
        zebra: s where a zebra crossing begins, or None.
    """

    def __init__(self, rng: np.random.Generator, size: tuple[int, int]):
        dice = Dice(rng)
        self.rng = dice
        self.mesh = Mesh()
        self._sun()
        if self.chance(0.6):
            bend = dice.uniform(0.004, 0.03) * (1 if self.chance(0.5) else -1)
        else:
            bend = dice.normal(0, 0.002)
        self.road = Road(bend, dice.uniform(-5, 30))
        self.drive = 1 if self.chance(0.8) else -1
        self._lanes()
        t = self.pick([t for t, ahead in self.lanes if ahead]) + dice.normal(0, 0.4)
        yaw = dice.normal(0, 0.07) if self.chance(0.75) else dice.uniform(-0.5, 0.5)
        focal = dice.uniform(0.85, 1.5) * math.sqrt(size[0] * size[1] / 2)
        position = (t, 0.0, dice.uniform(1.2, 2.2))
        self.camera = Camera(size, focal, position, yaw, dice.uniform(-0.12, 0.09))
        self.crossing = None
        if self.chance(0.42):
            start = dice.uniform(9, 40)
            self.crossing = (start, start + dice.uniform(7, 15))
        self.end = dice.uniform(28, 70) if self.crossing is None and self.chance(0.22) else None
        self.far = END if self.end is None else self.end
        self.zebra = None
        if self.crossing and self.chance(0.6):
            self.zebra = self.crossing[0] - 4
        elif self.chance(0.2):
            self.zebra = dice.uniform(6, 20)
        self._surfaces()
        self._markings()

    def pick(self, options):
        """One of a sequence, all equally likely."""
        return options[int(self.rng.random() * len(options))]

    def chance(self, p) -> bool:
        """True with probability p."""
        return self.rng.random() < p

    def tint(self, color, spread=0.05, shade=1.0) -> list[float]:
        """A colour near the given one, brighter or darker and of slightly different hue."""
        bell = self.rng.bell
        shade = shade * (1 + spread * bell())
        return [min(max(c * shade + 0.3 * spread * bell(), 0.03), 0.97) for c in color]

    def palette(self, **colors) -> np.ndarray:
        """The palette of `shapes` with the named slots changed."""
        palette = shapes.PALETTE.copy()
        for name, color in colors.items():
            palette[getattr(shapes, name)] = color
        return palette

    def stand(
        self, shape, palette, s, t, label, key=None, obj=0, scale=(1, 1, 1), shift=0.0, z=0.0
    ):
        """Puts up a flat cut-out that faces the camera, `shift` metres to its right.

        Returns:
            x and y of the place where it stands.
        """
        x, y = self.road.at(s, t)
        yaw = self.camera.yaw
        x = x + shift * math.cos(yaw)
        y = y - shift * math.sin(yaw)
        key = s if key is None else key
        self.mesh.place(shape, palette, (x, y), yaw, label, key, obj, scale, z)
        return x, y

    def ground(self, outline, color, label, layer, noise=(0.10, 14.0), material=GROUND):
        """A piece of ground [k, 3] on the layers below it."""
        params = (self.slab_size, 0, 0, 0)
        self.mesh.polygon(outline, color, label, GROUND_KEY - layer, material, noise, params)

    def strip(self, t0, t1, s0, s1, *surface):
        """A strip of ground along the road; `surface` as the arguments of `ground`."""
        self.ground(self.road.strip(t0, t1, s0, s1), *surface)

    def across(self, s0, s1, t0, t1):
        """Outline of the ground of a side street."""
        return [(*self.road.at(s, t), 0.0) for s, t in ((s0, t0), (s0, t1), (s1, t1), (s1, t0))]

    def cast(self, p, q, height, hanging=0.0):
        """The sun's shadow of an upright thing over the ground line p to q.

        The thing begins `hanging` metres above the ground.
        """
        corners = ((p, hanging), (q, hanging), (q, height), (p, height))
        dx, dy = self.slant
        self.mesh.shadows.append([(x + z * dx, y + z * dy, 0) for (x, y), z in corners])

    def solid_shadow(self, x, y, heading, half, length, height):
        """Cast and contact shadow of a box on the ground."""
        s = math.sin(heading)
        c = math.cos(heading)
        k = length / 2
        ring = [
            (x + i * half * c + j * k * s, y - i * half * s + j * k * c)
            for i, j in ((-1, -1), (1, -1), (1, 1), (-1, 1))
        ]
        # The two corners that bound the shadow's width.
        across = [px * self.slant[1] - py * self.slant[0] for px, py in ring]
        self.cast(ring[across.index(min(across))], ring[across.index(max(across))], height)
        self.mesh.contacts.append([(px, py, 0) for px, py in ring])

    def _sun(self):
        """The direction of the sun, between 17 and 66 degrees above the horizon."""
        azimuth = 2 * np.pi * self.rng.random()
        height = 0.3 + 0.85 * self.rng.random()
        x = np.sin(azimuth) * np.cos(height)
        y = np.cos(azimuth) * np.cos(height)
        self.sun = np.array([x, y, np.sin(height)], np.float32)
        # How far a shadow moves for each metre of height.
        self.slant = (-float(self.sun[0] / self.sun[2]), -float(self.sun[1] / self.sun[2]))

    def _lanes(self):
        rng = self.rng
        one_way = self.chance(0.22)
        lane = rng.uniform(2.8, 3.6)
        ahead = rng.integer(1, 4) if self.chance(0.5) else 1
        against = 0 if one_way else (ahead if self.chance(0.75) else 1)
        self.median = rng.uniform(1.5, 4.0) if ahead > 1 and against and self.chance(0.35) else 0.0
        width = (ahead + against) * lane + self.median
        self.half = width / 2
        starts = [i * lane + (self.median if i >= against else 0) for i in range(ahead + against)]
        self.lanes = [
            (self.drive * (s + lane / 2 - self.half), i >= against) for i, s in enumerate(starts)
        ]
        self.divider = None
        if against:
            self.divider = self.drive * (against * lane + self.median / 2 - self.half)
        # Outward from the carriageway: parking or bicycle strip, verge, pavement, frontage.
        self.parking = {k: rng.uniform(2.0, 2.4) if self.chance(0.45) else 0.0 for k in (-1, 1)}
        self.verge = {k: rng.uniform(1.0, 3.5) if self.chance(0.30) else 0.0 for k in (-1, 1)}
        self.pavement = {k: rng.uniform(1.5, 5.5) if self.chance(0.82) else 0.0 for k in (-1, 1)}

    def edge(self, side):
        """Where the road ends on a side, metres from its middle."""
        return self.half + self.parking[side]

    def front(self, side):
        """Where the houses begin on a side, metres from the middle of the road."""
        gap = 0.6 if not self.pavement[side] else 0.0
        return self.edge(side) + self.verge[side] + self.pavement[side] + gap

    def _surfaces(self):
        rng = self.rng
        road = self.road
        far = self.far
        self.asphalt = asphalt = self.tint([1, 1, 1.03], 0.03, rng.uniform(0.26, 0.44))
        self.slab = slab = self.tint(self.pick(paints.SLAB_PAINT), 0.08)
        self.grass = self.tint(self.pick(paints.SOIL_PAINT), 0.1)
        self.slab_size = rng.uniform(0.6, 1.8)
        x, y = self.camera.position[:2]
        corners = ((-250, -20), (250, -20), (250, 300), (-250, 300))
        self.ground([(x + dx, y + dy, 0) for dx, dy in corners], self.grass, TERRAIN, 0)
        for side in (-1, 1):
            a = side * self.edge(side)
            b = side * (self.edge(side) + self.verge[side])
            c = side * (self.edge(side) + self.verge[side] + self.pavement[side])
            if self.pavement[side]:
                self.strip(b, c, -8, far, slab, SIDEWALK, 2, SLABS, PAVING)
            if self.verge[side]:
                self.strip(a, b, -8, far, self.tint(self.grass), TERRAIN, 2, MEADOW)
        self.strip(-self.edge(-1), self.edge(1), -8, far, asphalt, ROAD, 3, ASPHALT)
        for side in (-1, 1):
            kerb = side * self.edge(side)
            color = self.tint(slab, 0.0, 1.12)
            self.strip(kerb, kerb + side * 0.18, -8, far, color, SIDEWALK, 3.5)
        if self.crossing:
            s0, s1 = self.crossing
            self.ground(self.across(s0, s1, -70, 70), self.tint(asphalt, 0.02), ROAD, 4, ASPHALT)
        if self.end is not None:
            self.ground(self.across(self.end, self.end + 9, -70, 70), asphalt, ROAD, 4, ASPHALT)
            self.ground(self.across(self.end + 9, self.end + 13, -70, 70), slab, SIDEWALK, 4)
        for _ in range(rng.integer(0, 4)):  # repairs
            s = rng.uniform(4, 25)
            t = rng.uniform(-self.half, self.half - 1)
            patch = road.strip(t, t + rng.uniform(0.8, 2.5), s, s + rng.uniform(1, 6))
            self.ground(patch, self.tint(asphalt, 0.02, rng.uniform(0.75, 0.92)), ROAD, 4.5)
        if self.divider is not None and self.median:
            kind = self.grass if self.chance(0.6) else slab
            label = TERRAIN if kind is self.grass else SIDEWALK
            lo = self.divider - self.median / 2
            hi = self.divider + self.median / 2
            for s0, s1 in self._blocks(-8, far):
                self.strip(lo, hi, s0, s1, kind, label, 5, MEADOW)

    def _blocks(self, s0, s1):
        """The stretches between s0 and s1 on either side of the crossing."""
        if not self.crossing:
            return [(s0, s1)]
        return [(a, b) for a, b in ((s0, self.crossing[0]), (self.crossing[1], s1)) if b > a]

    def _markings(self):
        rng = self.rng
        white = [rng.uniform(0.72, 0.92)] * 3
        if self.chance(0.85):
            borders = sorted({round((a[0] + b[0]) / 2, 2) for a, b in pairwise(self.lanes)})
            dash = rng.uniform(1.5, 4)
            gap = rng.uniform(2, 5)
            for t in borders:
                middle = self.divider is not None and abs(t - self.divider) < 0.3
                if middle and self.median:
                    continue
                for s0, s1 in self._blocks(-6, min(self.far, 70)):
                    if middle and self.chance(0.4):
                        self.strip(t - 0.07, t + 0.07, s0, s1, white, ROAD, 6)
                        continue
                    for s in np.arange(s0 + rng.uniform(0, dash), s1 - dash, dash + gap).tolist():
                        self.strip(t - 0.07, t + 0.07, s, s + dash, white, ROAD, 6)
        for side in (-1, 1):
            if self.parking[side] or self.chance(0.3):
                t = side * self.half
                for s0, s1 in self._blocks(-8, self.far):
                    self.strip(t - 0.06, t + 0.06, s0, s1, white, ROAD, 6)
        if self.zebra:
            s = self.zebra
            half = self.half
            self.strip(-half, half, s - 1.5, s + 3.5, self.asphalt, ROAD, 6.9, ASPHALT)
            for t in np.arange(-half + 0.3, half - 0.4, 1.0).tolist():
                self.strip(t, t + 0.5, s, s + 3, white, ROAD, 7)
            self.strip(-half, half, s - 1.2, s - 0.8, white, ROAD, 7)
