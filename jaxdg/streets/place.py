"""The place of a generated street: the road, what lies beside it and lines it, and the camera
(`streets_traffic.py` fills it with life).

Positions are (s, t): s metres ahead along the centre line of the road, which may bend, and t metres
to the right of it.
"""

from itertools import pairwise
import math

import numpy as np

from jaxdg.streets import shapes
from jaxdg.streets.draw import (
    BARS,
    BRICK,
    CULLED,
    FACADE,
    FOLIAGE,
    GROUND,
    PAVING,
    PLAIN,
    SKY,
    Camera,
    Mesh,
)

ROAD, SIDEWALK, BUILDING, WALL, FENCE, POLE, LIGHT, SIGN, VEGETATION, TERRAIN = range(
    SKY
)  # Cityscapes train ids
END = 110.0  # the street is built up to this many metres ahead
GROUND_KEY = 1e6  # the ground is painted first, layer on layer with falling keys
SKYLINE_KEY = 9e5

HOUSE_PAINT = [[0.80, 0.72, 0.58], [0.70, 0.46, 0.34], [0.62, 0.34, 0.27], [0.82, 0.80, 0.76], [0.66, 0.64, 0.62], [0.74, 0.62, 0.44],
               [0.56, 0.52, 0.48], [0.62, 0.66, 0.68], [0.84, 0.74, 0.66], [0.50, 0.40, 0.34]]  # fmt: skip
ROOF_PAINT = [[0.50, 0.24, 0.17], [0.32, 0.27, 0.26], [0.42, 0.36, 0.32]]
WALL_PAINT = [
    [0.60, 0.58, 0.55],
    [0.52, 0.34, 0.26],
    [0.66, 0.60, 0.50],
    [0.48, 0.47, 0.46],
    [0.74, 0.72, 0.68],
]
FENCE_PAINT = [
    [0.16, 0.17, 0.17],
    [0.40, 0.30, 0.20],
    [0.72, 0.72, 0.70],
    [0.14, 0.28, 0.20],
    [0.45, 0.47, 0.48],
]
AWNING_PAINT = [
    [0.62, 0.12, 0.12],
    [0.80, 0.80, 0.78],
    [0.16, 0.36, 0.24],
    [0.86, 0.62, 0.16],
    [0.16, 0.20, 0.34],
]
SLAB_PAINT = [[0.62, 0.60, 0.58], [0.56, 0.55, 0.55], [0.66, 0.60, 0.52], [0.60, 0.48, 0.42]]
SOIL_PAINT = [[0.30, 0.42, 0.16], [0.38, 0.46, 0.20], [0.46, 0.44, 0.24], [0.50, 0.40, 0.27]]
LEAF_PAINT = [
    [0.22, 0.36, 0.12],
    [0.28, 0.42, 0.16],
    [0.18, 0.30, 0.14],
    [0.36, 0.40, 0.14],
    [0.30, 0.38, 0.16],
    [0.48, 0.36, 0.12],
]
MEADOW = (0.26, 10.0)
ASPHALT = (0.10, 18.0)
SLABS = (0.12, 6.0)  # noise: amplitude and texels a metre


class Dice:
    """Draws of a generator, taken in blocks: single draws of plain floats are many times cheaper
    so.
    """

    def __init__(self, rng: np.random.Generator):
        self.random = _endless(rng.random).__next__
        self.bell = _endless(rng.standard_normal).__next__

    def uniform(self, low, high):
        return low + (high - low) * self.random()

    def normal(self, mean, deviation):
        return mean + deviation * self.bell()

    def exponential(self, mean):
        return -mean * math.log(1 - self.random())

    def integer(self, low, high):
        """From low to high - 1."""
        return low + int(self.random() * (high - low))


def _endless(draw_block):
    """Single draws, made 512 at a time."""
    while True:
        yield from draw_block(512).tolist()


class Road:
    """The centre line: straight, then turning with constant curvature; `at` maps metres along and
    to its right to the ground.
    """

    STEP = 0.5
    BACK = 20.0

    def __init__(self, curvature, start):
        s = np.arange(-self.BACK, END + 30, self.STEP)
        heading = np.clip(curvature * np.maximum(s - start, 0), -1.3, 1.3)
        x = np.cumsum(np.sin(heading)) * self.STEP
        y = np.cumsum(np.cos(heading)) * self.STEP
        origin = int(self.BACK / self.STEP)
        self.table = np.stack([x - x[origin], y - y[origin], np.sin(heading), np.cos(heading)], 1)
        self.rows = self.table.tolist()
        self.headings = heading.tolist()

    def _index(self, s) -> int:
        return min(max(int((s + self.BACK) / self.STEP), 0), len(self.rows) - 1)

    def heading(self, s):
        return self.headings[self._index(s)]

    def at(self, s, t):
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


def sun_direction(a: float, b: float) -> np.ndarray:
    """Towards the sun, anywhere between 17 and 66 degrees above the horizon, from two numbers in
    0..1.
    """
    azimuth = 2 * np.pi * a
    height = 0.3 + 0.85 * b
    return np.array(
        [np.sin(azimuth) * np.cos(height), np.cos(azimuth) * np.cos(height), np.sin(height)],
        np.float32,
    )


class Place:
    """A street without traffic, drawn from `rng` into `mesh`.

    Attributes:
        mesh: what is drawn.
        camera: stands in one of the lanes at s = 0.
        sun: direction towards it.
        lanes: (t of the middle, whether traffic drives away from the camera) of each lane.
        half: half the carriageway's width.
        crossing: s where a side street begins and ends, or None.
        end: s where the street meets another at a T, or None.
        zebra: s where a zebra crossing begins, or None.
        rails: the side (-1 left, 1 right) with a railway, or None.
    """

    def __init__(self, rng: np.random.Generator, size: tuple[int, int]):
        self.rng = (dice := Dice(rng))
        self.mesh = Mesh()
        self.sun = sun_direction(dice.random(), dice.random())
        self.slant = (
            -float(self.sun[0] / self.sun[2]),
            -float(self.sun[1] / self.sun[2]),
        )  # shift of a shadow a metre of height
        bend = (
            dice.uniform(0.004, 0.03) * (1 if self.chance(0.5) else -1)
            if self.chance(0.6)
            else dice.normal(0, 0.002)
        )
        self.road = Road(bend, dice.uniform(-5, 30))
        self.drive = 1 if self.chance(0.8) else -1  # traffic keeps right or left
        self._lanes()
        t = self.pick([t for t, ahead in self.lanes if ahead]) + dice.normal(0, 0.4)
        yaw = dice.normal(0, 0.07) if self.chance(0.75) else dice.uniform(-0.5, 0.5)
        focal = dice.uniform(0.85, 1.5) * math.sqrt(size[0] * size[1] / 2)
        self.camera = Camera(
            size, focal, (t, 0.0, dice.uniform(1.2, 2.2)), yaw, dice.uniform(-0.12, 0.09)
        )
        self.crossing = (
            (start := dice.uniform(9, 40), start + dice.uniform(7, 15))
            if self.chance(0.42)
            else None
        )
        self.end = dice.uniform(28, 70) if self.crossing is None and self.chance(0.22) else None
        self.far = END if self.end is None else self.end
        self.zebra = None
        if self.crossing and self.chance(0.6):
            self.zebra = self.crossing[0] - 4
        elif self.chance(0.2):
            self.zebra = dice.uniform(6, 20)
        self._ground()
        self._markings()
        self.rails = None
        for side in (-1, 1):
            self._frontage(side)
        self._skyline()

    # -- helpers
    # ------------------------------------------------------------------------------------------------------------------------

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
        """The colours of `streets_shapes` with some slots changed by name."""
        palette = shapes.PALETTE.copy()
        for name, color in colors.items():
            palette[getattr(shapes, name)] = color
        return palette

    def stand(
        self, shape, palette, s, t, label, key=None, obj=0, scale=(1, 1, 1), shift=0.0, z=0.0
    ):
        """Puts up a flat cut-out that faces the camera, `shift` metres to its right; returns where
        it stands.
        """
        x, y = self.road.at(s, t)
        x = x + shift * math.cos(self.camera.yaw)
        y = y - shift * math.sin(self.camera.yaw)
        self.mesh.place(
            shape, palette, (x, y), self.camera.yaw, label, s if key is None else key, obj, scale, z
        )
        return x, y

    def ground(self, outline, color, label, layer, noise=(0.10, 14.0), material=GROUND):
        """A piece of ground [k, 3] on the layers below it."""
        self.mesh.polygon(
            outline, color, label, GROUND_KEY - layer, material, noise, (self.slab_size, 0, 0, 0)
        )

    def wall(
        self,
        p,
        q,
        z0,
        z1,
        color,
        label,
        key,
        material,
        params=(0, 0, 0, 0),
        noise=(0.10, 9.0),
        flags=0,
    ):
        """An upright quad over the ground line p to q."""
        quad = [(*p, z0), (*q, z0), (*q, z1), (*p, z1)]
        self.mesh.polygon(quad, color, label, key, material, noise, params, flags=flags)

    def cast(self, p, q, height, hanging=0.0):
        """The sun's shadow of an upright thing over the ground line p to q that begins `hanging`
        metres above the ground.
        """
        px, py = p
        qx, qy = q
        dx, dy = self.slant
        a = hanging
        b = height
        self.mesh.shadows.append(
            [
                (px + a * dx, py + a * dy, 0),
                (qx + a * dx, qy + a * dy, 0),
                (qx + b * dx, qy + b * dy, 0),
                (px + b * dx, py + b * dy, 0),
            ]
        )

    def solid_shadow(self, x, y, heading, half, length, height):
        """Cast and contact shadow of a box on the ground."""
        s = math.sin(heading)
        c = math.cos(heading)
        k = length / 2
        ring = [
            (x + i * half * c + j * k * s, y - i * half * s + j * k * c)
            for i, j in ((-1, -1), (1, -1), (1, 1), (-1, 1))
        ]
        across = [
            px * self.slant[1] - py * self.slant[0] for px, py in ring
        ]  # the two corners that bound the shadow's width
        self.cast(ring[across.index(min(across))], ring[across.index(max(across))], height)
        self.mesh.contacts.append([(px, py, 0) for px, py in ring])

    # -- ground
    # -------------------------------------------------------------------------------------------------------------------------

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
        self.divider = (
            self.drive * (against * lane + self.median / 2 - self.half) if against else None
        )
        # going outward from the carriageway: parking or bicycle strip, verge, pavement; then the
        # frontage
        self.parking = {k: rng.uniform(2.0, 2.4) if self.chance(0.45) else 0.0 for k in (-1, 1)}
        self.verge = {k: rng.uniform(1.0, 3.5) if self.chance(0.30) else 0.0 for k in (-1, 1)}
        self.pavement = {k: rng.uniform(1.5, 5.5) if self.chance(0.82) else 0.0 for k in (-1, 1)}

    def edge(self, side):
        """Where the road ends on a side, metres from its middle."""
        return self.half + self.parking[side]

    def front(self, side):
        """Where the houses begin."""
        return (
            self.edge(side)
            + self.verge[side]
            + self.pavement[side]
            + (0.6 if not self.pavement[side] else 0.0)
        )

    def _ground(self):
        rng = self.rng
        road = self.road
        self.asphalt = asphalt = self.tint([1, 1, 1.03], 0.03, rng.uniform(0.26, 0.44))
        slab = self.tint(self.pick(SLAB_PAINT), 0.08)
        self.grass = self.tint(self.pick(SOIL_PAINT), 0.1)
        self.slab = slab
        self.slab_size = rng.uniform(0.6, 1.8)
        x, y = self.camera.position[:2]
        self.ground(
            [
                (x - 250, y - 20, 0),
                (x + 250, y - 20, 0),
                (x + 250, y + 300, 0),
                (x - 250, y + 300, 0),
            ],
            self.grass,
            TERRAIN,
            0,
        )
        far = self.far
        for side in (-1, 1):
            a = self.edge(side)
            b = self.edge(side) + self.verge[side]
            if self.pavement[side]:
                self.ground(
                    road.strip(side * b, side * (b + self.pavement[side]), -8, far),
                    slab,
                    SIDEWALK,
                    2,
                    SLABS,
                    PAVING,
                )
            if self.verge[side]:
                self.ground(
                    road.strip(side * a, side * b, -8, far),
                    self.tint(self.grass),
                    TERRAIN,
                    2,
                    MEADOW,
                )
        self.ground(road.strip(-self.edge(-1), self.edge(1), -8, far), asphalt, ROAD, 3, ASPHALT)
        for side in (-1, 1):
            kerb = side * self.edge(side)
            self.ground(
                road.strip(kerb, kerb + side * 0.18, -8, far),
                self.tint(slab, 0.0, 1.12),
                SIDEWALK,
                3.5,
            )
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
                self.ground(road.strip(lo, hi, s0, s1), kind, label, 5, MEADOW)

    def across(self, s0, s1, t0, t1):
        """Outline of the ground of a side street."""
        return [(*self.road.at(s, t), 0.0) for s, t in ((s0, t0), (s0, t1), (s1, t1), (s1, t0))]

    def _blocks(self, s0, s1):
        """The stretch without the crossing."""
        if not self.crossing:
            return [(s0, s1)]
        return [(a, b) for a, b in ((s0, self.crossing[0]), (self.crossing[1], s1)) if b > a]

    def _markings(self):
        rng = self.rng
        road = self.road
        far = self.far
        white = [rng.uniform(0.72, 0.92)] * 3
        if self.chance(0.85):
            borders = sorted({round((a[0] + b[0]) / 2, 2) for a, b in pairwise(self.lanes)})
            dash = rng.uniform(1.5, 4)
            gap = rng.uniform(2, 5)
            for t in borders:
                middle = self.divider is not None and abs(t - self.divider) < 0.3
                if middle and self.median:
                    continue
                for s0, s1 in self._blocks(-6, min(far, 70)):
                    if middle and self.chance(0.4):
                        self.ground(road.strip(t - 0.07, t + 0.07, s0, s1), white, ROAD, 6)
                        continue
                    for s in np.arange(s0 + rng.uniform(0, dash), s1 - dash, dash + gap).tolist():
                        self.ground(road.strip(t - 0.07, t + 0.07, s, s + dash), white, ROAD, 6)
        for side in (-1, 1):
            if self.parking[side] or self.chance(0.3):
                for s0, s1 in self._blocks(-8, far):
                    self.ground(
                        road.strip(side * self.half - 0.06, side * self.half + 0.06, s0, s1),
                        white,
                        ROAD,
                        6,
                    )
        if self.zebra:
            self.ground(
                road.strip(-self.half, self.half, self.zebra - 1.5, self.zebra + 3.5),
                self.asphalt,
                ROAD,
                6.9,
                ASPHALT,
            )
            for t in np.arange(-self.half + 0.3, self.half - 0.4, 1.0).tolist():
                self.ground(road.strip(t, t + 0.5, self.zebra, self.zebra + 3), white, ROAD, 7)
            self.ground(
                road.strip(-self.half, self.half, self.zebra - 1.2, self.zebra - 0.8),
                white,
                ROAD,
                7,
            )

    # -- frontage
    # -----------------------------------------------------------------------------------------------------------------------

    def _frontage(self, side):
        """What lines the street on one side: houses, gardens, parks, walls, fences, a railway."""
        rng = self.rng
        house = self._house
        garden = self._garden
        park = self._park
        wall = self._walled
        fence = self._fenced
        town = [house] * 7 + [wall]
        mixed = [house, garden, park, wall, fence]
        mood = self.pick(
            [
                town,
                town,
                town,
                [garden] * 4 + [fence, wall],
                [park] * 3 + [fence],
                [wall, wall, fence, house, fence],
                mixed,
                mixed,
            ]
        )
        if self.rails is None and self.chance(0.2):
            self.rails = side
            mood = [self._railway]
        self.floor = rng.uniform(2.8, 3.8)
        self.row = self.tint(self.pick(HOUSE_PAINT))
        for s0, s1 in self._blocks(-6, self.far):
            s = s0
            while s < s1 - 3:
                build = self.pick(mood)
                length = min(
                    rng.uniform(8, 22) if build in (house, garden) else rng.uniform(14, 40), s1 - s
                )
                build(side, s, s + length)
                s += length
        if (
            self.crossing or self.end is not None
        ):  # houses or a park face the camera beyond the side street
            self._corner(
                side,
                self.crossing[1] if self.crossing else self.far + 13,
                self.front(side) + 0.5 if self.crossing else 0.0,
            )

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
        color = self.tint(self.pick(HOUSE_PAINT), 0.08) if color is None else color
        style = rng.random() + (1 if self.chance(0.45) else 0)
        self.wall(
            p,
            q,
            0,
            height,
            color,
            BUILDING,
            key,
            FACADE,
            (pitch, floor, rng.random(), style),
            flags=CULLED,
        )
        return height, color

    def _house(self, side, s0, s1):
        rng = self.rng
        t = self.front(side) + (0.0 if self.chance(0.75) else rng.uniform(0.5, 3))
        self.ground(
            self.road.strip(side * self.front(side), side * 40, s0, s1),
            self.slab,
            SIDEWALK,
            1,
            SLABS,
            PAVING,
        )
        p = self.road.at(s0, side * t)
        q = self.road.at(s1, side * t)
        color = self.row if self.chance(0.3) else self.tint(self.pick(HOUSE_PAINT), 0.08)
        height, color = self._front(side, p, q, s1 + 0.02, color)
        deep = self.road.at(s0, side * (t + 12))
        a, b = (p, deep) if side > 0 else (deep, p)
        # its end wall is painted before the nearer neighbour, which has s0 + 0.02
        self.wall(
            a, b, 0, height, self.tint(color, 0.02, 0.92), BUILDING, s0 + 0.03, PLAIN, flags=CULLED
        )
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
            self.mesh.polygon(cloth, self.tint(self.pick(AWNING_PAINT)), BUILDING, m)

    def _front(self, side, p, q, key, color, floors=None):
        """A facade along the street; from the road its left end is the far one on the right side
        and the near one on the left.
        """
        return self._facade(*((p, q) if side < 0 else (q, p)), key, floors, color)

    def _roof(self, side, s0, s1, t, height, key):
        ridge = height + self.rng.uniform(2, 4)
        a, b, c, d = (
            self.road.at(s, side * v)
            for s, v in ((s0, t - 0.3), (s1, t - 0.3), (s1, t + 5), (s0, t + 5))
        )
        color = self.tint(self.pick(ROOF_PAINT), 0.1)
        self.mesh.polygon(
            [(*a, height), (*b, height), (*c, ridge), (*d, ridge)], color, BUILDING, key, BRICK
        )
        gable = [
            (*self.road.at(s0, side * t), height),
            (*d, ridge),
            (*self.road.at(s0, side * (t + 10)), height),
        ]
        self.mesh.polygon(gable, self.tint(self.row, 0.05, 0.9), BUILDING, s0 + 0.03)

    def _garden(self, side, s0, s1):
        """A detached house behind its front garden."""
        rng = self.rng
        f = self.front(side)
        self.ground(
            self.road.strip(side * f, side * 50, s0, s1), self.tint(self.grass), TERRAIN, 1, MEADOW
        )
        back = f + rng.uniform(3, 8)
        gap = rng.uniform(1, 3)
        p = self.road.at(s0 + gap, side * back)
        q = self.road.at(s1 - gap, side * back)
        height, color = self._front(
            side, p, q, s1 + 0.5, self.tint(self.pick(HOUSE_PAINT)), rng.integer(1, 4)
        )
        deep = self.road.at(s0 + gap, side * (back + 9))
        p, q = (p, deep) if side > 0 else (deep, p)
        windows = (3.0, self.floor, rng.random(), 0.3)
        self.wall(
            p,
            q,
            0,
            height,
            self.tint(color, 0.02, 0.92),
            BUILDING,
            s0 + gap + 0.1,
            FACADE,
            windows,
            flags=CULLED,
        )
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
        self.ground(
            self.road.strip(side * f, side * 75, s0, s1), self.tint(self.grass), TERRAIN, 1, MEADOW
        )
        for _ in range(int((s1 - s0) * rng.uniform(0.12, 0.32)) + 1):
            self.tree(rng.uniform(s0, s1), side * (f + 1.5 + rng.exponential(10)))
        if self.chance(0.3):
            self._hedge(side, s0, s1, f + 0.5)
        elif self.chance(0.4):
            self.fence(side, s0, s1, f + 0.2)

    def _walled(self, side, s0, s1):
        rng = self.rng
        f = self.front(side)
        self.ground(self.road.strip(side * f, side * 50, s0, s1), self.tint(self.grass), TERRAIN, 1)
        height = rng.uniform(1.4, 3.8)
        self._wall(side, s0, s1, f, height)
        if self.chance(0.5):
            p = self.road.at(s0, side * (f + 9))
            q = self.road.at(s1, side * (f + 9))
            self._front(side, p, q, s1 + 1, None)
        for _ in range(rng.integer(1, 5)):
            self.tree(rng.uniform(s0, s1), side * (f + rng.uniform(2, 7)), key=s1 + 0.5)

    def _fenced(self, side, s0, s1):
        rng = self.rng
        f = self.front(side)
        self.ground(
            self.road.strip(side * f, side * 75, s0, s1), self.tint(self.grass), TERRAIN, 1, MEADOW
        )
        self.fence(side, s0, s1, f + 0.2)
        for _ in range(rng.integer(0, 4)):
            self.tree(rng.uniform(s0, s1), side * (f + rng.uniform(3, 14)), key=s1 + 0.5)
        if self.chance(0.35):
            t = f + rng.uniform(8, 20)
            self._front(side, self.road.at(s0, side * t), self.road.at(s1, side * t), s1 + 1, None)

    def _railway(self, side, s0, s1):
        """Gravel with rails; the train itself comes later."""
        f = self.front(side)
        self.ground(
            self.road.strip(side * f, side * 75, s0, s1), self.tint(self.grass), TERRAIN, 1, MEADOW
        )
        self.ground(
            self.road.strip(side * (f + 0.8), side * (f + 4.6), s0, s1),
            self.tint([0.45, 0.41, 0.37]),
            TERRAIN,
            1.2,
            (0.3, 20.0),
        )
        for t in (f + 1.95, f + 3.4):
            self.ground(
                self.road.strip(side * t, side * (t + 0.12), s0, s1),
                [0.62, 0.60, 0.58],
                TERRAIN,
                1.3,
            )
        for _ in range(int((s1 - s0) / 6)):
            self.tree(self.rng.uniform(s0, s1), side * (f + self.rng.uniform(7, 16)), key=s1 + 0.5)
        if self.chance(0.5):
            self.fence(side, s0, s1, f + 0.3)

    def _wall(self, side, s0, s1, t, height):
        color = self.tint(self.pick(WALL_PAINT), 0.06)
        brick = self.chance(0.6)
        for a, b in pairwise(np.linspace(s0, s1, max(2, int((s1 - s0) / 5) + 1)).tolist()):
            p = self.road.at(a, side * t)
            q = self.road.at(b, side * t)
            self.wall(
                p, q, 0, height, color, WALL, b + 0.01, BRICK if brick else PLAIN, noise=(0.22, 4.0)
            )
            self.wall(p, q, height - 0.12, height, self.tint(color, 0, 1.2), WALL, b + 0.005, PLAIN)
            self.cast(p, q, height)

    def fence(self, side, s0, s1, t):
        """A fence along the street that can be seen through."""
        rng = self.rng
        height = rng.uniform(1.0, 2.1)
        pitch = rng.uniform(0.14, 0.30)
        color = self.tint(self.pick(FENCE_PAINT), 0.08)
        params = (pitch, rng.uniform(0.35, 0.65), height * 0.62, 0.12)
        for a, b in pairwise(np.linspace(s0, s1, max(2, int((s1 - s0) / 5) + 1)).tolist()):
            self.wall(
                self.road.at(a, side * t),
                self.road.at(b, side * t),
                0,
                height,
                color,
                FENCE,
                b,
                BARS,
                params,
            )

    def _hedge(self, side, s0, s1, t):
        color = self.tint([0.20, 0.32, 0.14], 0.15)
        height = self.rng.uniform(0.8, 1.8)
        for a, b in pairwise(np.linspace(s0, s1, max(2, int((s1 - s0) / 4) + 1)).tolist()):
            p = self.road.at(a, side * t)
            q = self.road.at(b, side * t)
            self.wall(
                p,
                q,
                0,
                height + self.rng.normal(0, 0.04),
                color,
                VEGETATION,
                b + 0.01,
                FOLIAGE,
                noise=(0.42, 22.0),
            )

    def tree(self, s, t, height=None, key=None):
        """A tree, or a bush where no height is asked for."""
        rng = self.rng
        bush = height is None and self.chance(0.25)
        height = height or (rng.uniform(0.9, 2.2) if bush else rng.uniform(4.5, 12))
        leaf = self.tint(self.pick(LEAF_PAINT), 0.12)
        width = height * rng.uniform(0.75, 1.15) * (1.6 if bush else 1)
        palette = self.palette(
            LEAF=leaf, TOP=self.tint(leaf, 0, 0.78), TRIM=self.tint([0.26, 0.20, 0.15])
        )
        x, y = self.stand(
            self.pick(shapes.models()["bush" if bush else "tree"]),
            palette,
            s,
            t,
            VEGETATION,
            key,
            scale=(width, 1, height),
        )
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
            if self.chance(0.5):
                color = self.tint(self.pick(HOUSE_PAINT))
                windows = (4.0, 3.4, rng.random(), 0.4)
                self.wall(
                    p, q, -1, rng.uniform(7, 26), color, BUILDING, SKYLINE_KEY, FACADE, windows
                )
            elif self.chance(0.85):
                self.wall(
                    p,
                    q,
                    -1,
                    rng.uniform(4, 13),
                    self.tint([0.24, 0.34, 0.18]),
                    VEGETATION,
                    SKYLINE_KEY,
                    FOLIAGE,
                    noise=(0.3, 2.0),
                )
            angle += step
