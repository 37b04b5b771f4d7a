"""Generated street scenes with the 19 Cityscapes classes: the dataset that needs no download.

A world (streets, houses, traffic, people) depends on (seed, index) alone; its five appearances differ in light and weather, so label map and
boxes are the same for all. `clear` is the source domain; `night`, `rain`, `fog` and `dusk_rain` are the unseen ones. The geometry is in metres
in front of a pinhole camera, so any picture size shows the same street.
"""

from dataclasses import dataclass
from functools import lru_cache
import math

import numpy as np

from jaxdg.data import streets_draw as draw
from jaxdg.data import streets_shapes as shapes
from jaxdg.data.streets_draw import BARS, BRICK, CULLED, FACADE, FOLIAGE, GROUND, PAVING, Camera, Mesh

APPEARANCES = ("clear", "night", "rain", "fog", "dusk_rain")
ROAD, SIDEWALK, BUILDING, WALL, FENCE, POLE, LIGHT, SIGN, VEGETATION, TERRAIN, SKY = range(11)  # Cityscapes train ids
PERSON, RIDER, CAR, TRUCK, BUS, TRAIN, MOTORCYCLE, BICYCLE = range(11, 19)
SMALLEST_BOX = 16  # visible pixels below which an object is labelled but gets no box
END = 110.0  # the street is built up to this many metres ahead
GROUND_KEY = 1e6  # painted first, later layers with smaller keys


@dataclass(frozen=True)
class Scene:
    """A picture with its truth.

    Attributes:
        image: uint8 [h, w, 3], RGB.
        label: uint8 [h, w], Cityscapes train ids 0..18; every pixel has one.
        boxes: float32 [n, 4], x0 y0 x1 y1 in pixels, tight around an object's visible pixels (x1 and y1 exclusive), nearest objects last.
        box_labels: int32 [n], train ids: traffic light, traffic sign and person .. bicycle. Objects under 16 visible pixels have no box.
    """

    image: np.ndarray
    label: np.ndarray
    boxes: np.ndarray
    box_labels: np.ndarray


def render(seed: int, index: int, appearance: str = "clear", size: tuple[int, int] = (256, 512)) -> Scene:
    """Renders a street, bit-identical in every run.

    Args:
        seed: number of the dataset, 0 or more; other seeds are other streets.
        index: number of the scene, 0 or more.
        appearance: one of `APPEARANCES`; changes the image only.
        size: height and width in pixels, from about 96 x 192 upward.

    Returns:
        The scene.

    Raises:
        ValueError: for an unknown appearance.
    """
    if appearance not in APPEARANCES:
        raise ValueError(f"unknown appearance {appearance!r}; allowed are {', '.join(APPEARANCES)}")
    street = _Street(_Dice(np.random.default_rng((seed, index, 0))), size)
    raster = draw.rasterize(street.mesh, street.camera)
    label = raster.label.astype(np.uint8).take(raster.ids)
    boxes, box_labels = _boxes(raster.object.take(raster.ids), street.mesh.objects)
    rng = np.random.default_rng((seed, index, 1 + APPEARANCES.index(appearance)))
    look = draw.look(appearance, street.sun, rng)
    image = draw.develop(draw.paint(raster, street.camera), raster, street.mesh, street.camera, look, rng)
    return Scene(image, label, boxes, box_labels)


def _boxes(objects: np.ndarray, labels: list[int]) -> tuple[np.ndarray, np.ndarray]:
    """Tight boxes of the objects (numbered from 1) in a map of object numbers."""
    rows, columns = np.nonzero(objects)
    owner, n = objects[rows, columns], len(labels) + 1
    h, w = objects.shape
    low, high = np.full((n, 2), max(h, w)), np.full((n, 2), -1)
    for k, at in enumerate((columns, rows)):
        np.minimum.at(low[:, k], owner, at)
        np.maximum.at(high[:, k], owner, at)
    kept = np.flatnonzero(np.bincount(owner, minlength=n) >= SMALLEST_BOX)
    boxes = np.concatenate([low, high + 1], 1)[kept].astype(np.float32)
    return boxes, np.array(labels, np.int32)[kept - 1]


class _Dice:
    """Draws of a generator, taken in blocks: single draws of plain floats are many times cheaper so."""

    def __init__(self, rng: np.random.Generator):
        self.random = _blocks(rng.random).__next__
        self.bell = _blocks(rng.standard_normal).__next__

    def uniform(self, low: float, high: float) -> float:
        return low + (high - low) * self.random()

    def normal(self, mean: float, deviation: float) -> float:
        return mean + deviation * self.bell()

    def exponential(self, mean: float) -> float:
        return -mean * math.log(1 - self.random())

    def integer(self, low: int, high: int) -> int:
        """From low to high - 1."""
        return low + int(self.random() * (high - low))


def _blocks(draw_block):
    while True:
        yield from draw_block(512).tolist()


class _Road:
    """The centre line: straight, then turning with constant curvature; `at` maps metres along and to its right to the ground."""

    STEP, BACK = 0.5, 20.0

    def __init__(self, curvature: float, start: float):
        s = np.arange(-self.BACK, END + 30, self.STEP)
        heading = np.clip(curvature * np.maximum(s - start, 0), -1.3, 1.3)
        x, y = np.cumsum(np.sin(heading)) * self.STEP, np.cumsum(np.cos(heading)) * self.STEP
        origin = int(self.BACK / self.STEP)
        self.table = np.stack([x - x[origin], y - y[origin], np.sin(heading), np.cos(heading)], 1)
        self.rows, self.headings = self.table.tolist(), heading.tolist()

    def _index(self, s: float) -> int:
        return min(max(int((s + self.BACK) / self.STEP), 0), len(self.rows) - 1)

    def heading(self, s: float) -> float:
        return self.headings[self._index(s)]

    def at(self, s: float, t: float) -> tuple[float, float]:
        i = self._index(s)
        x, y, sin, cos = self.rows[i]
        rest = s + self.BACK - i * self.STEP
        return x + rest * sin + t * cos, y + rest * cos - t * sin

    def strip(self, t0: float, t1: float, s0: float, s1: float) -> list[tuple[float, float, float]]:
        """Outline [k, 3] of the ground between two distances to the centre line."""
        n = max(2, int((s1 - s0) / 6) + 1)
        step = (s1 - s0) / (n - 1)
        right, left = [self.at(s0 + i * step, t1) for i in range(n)], [self.at(s1 - i * step, t0) for i in range(n)]
        return [(x, y, 0.0) for x, y in right + left]


@lru_cache(1)
def _models() -> dict[str, list]:
    """All shapes, made once; several of a kind for variety."""
    rng = np.random.default_rng(7)
    return {
        "car": [shapes.car(), shapes.car(3.9, 1.70, 1.50, 0.22, 0.02), shapes.car(4.6, 1.82, 1.44, 0.27, 0.20), shapes.car(4.5, 1.88, 1.72, 0.23, 0.02, 0.58),
                shapes.car(4.7, 1.80, 1.46, 0.25, 0.0, 0.60), shapes.car(4.9, 1.95, 2.0, 0.14, 0.0, 0.52)],
        "person": [shapes.person(k, a, skirt, bag, back) for k, a, skirt, bag, back in (
            (0.1, 0.05, False, False, False), (0.5, 0.2, False, False, False), (0.35, 0.1, False, True, True), (0.2, 0.1, True, False, False),
            (0.6, 0.25, False, False, True), (0.3, 0.15, True, False, True), (0.05, 0.0, False, True, True), (0.45, 0.1, False, False, True))],
        "tree": [shapes.tree(rng, 0) for _ in range(6)] + [shapes.tree(rng, 1) for _ in range(2)] + [shapes.tree(rng, 2) for _ in range(2)],
        "bush": [shapes.tree(rng, 3) for _ in range(4)],
        "sign": [shapes.sign(k) for k in range(7)],
        "light": [shapes.traffic_light(k, board) for k in range(3) for board in (False, True)],
        "cab": [shapes.lorry_cab()],
        "load": [shapes.lorry_load(style=k) for k in range(3)],
        "bus": [shapes.bus_piece(), shapes.bus_piece(wheel=True), shapes.bus_piece(door=True)],
        "train": [shapes.train_piece(), shapes.train_piece(door=True)],
        "bicycle": [shapes.bicycle_side(), shapes.bicycle_end(True), shapes.bicycle_end(False)],
        "motorcycle": [shapes.motorcycle_side(), shapes.motorcycle_end(True), shapes.motorcycle_end(False)],
        "rider": [shapes.cyclist_side(0.2), shapes.cyclist_end(True), shapes.cyclist_end(False), shapes.cyclist_side(1.0)],
    }  # fmt: skip


CAR_PAINT = [[0.86, 0.86, 0.86], [0.62, 0.64, 0.66], [0.36, 0.37, 0.39], [0.09, 0.09, 0.10], [0.10, 0.18, 0.40], [0.58, 0.07, 0.07],
                      [0.22, 0.36, 0.56], [0.12, 0.28, 0.20], [0.70, 0.58, 0.36], [0.45, 0.28, 0.16], [0.85, 0.72, 0.15]]  # fmt: skip
BUS_PAINT = [[0.80, 0.10, 0.08], [0.93, 0.74, 0.10], [0.15, 0.38, 0.66], [0.16, 0.52, 0.32], [0.88, 0.46, 0.10]]
TRAIN_PAINT = [  # body, stripe
    [[0.90, 0.89, 0.84], [0.78, 0.10, 0.10]], [[0.95, 0.83, 0.30], [0.90, 0.88, 0.80]], [[0.88, 0.89, 0.90], [0.13, 0.32, 0.62]],
    [[0.83, 0.86, 0.80], [0.12, 0.46, 0.30]], [[0.68, 0.70, 0.72], [0.75, 0.14, 0.12]]]  # fmt: skip
LOAD_PAINT = [[0.90, 0.90, 0.89], [0.76, 0.77, 0.78], [0.82, 0.80, 0.70], [0.30, 0.42, 0.60], [0.55, 0.60, 0.40], [0.70, 0.36, 0.20]]
HOUSE_PAINT = [[0.80, 0.72, 0.58], [0.70, 0.46, 0.34], [0.62, 0.34, 0.27], [0.82, 0.80, 0.76], [0.66, 0.64, 0.62], [0.74, 0.62, 0.44],
                        [0.56, 0.52, 0.48], [0.62, 0.66, 0.68], [0.84, 0.74, 0.66], [0.50, 0.40, 0.34]]  # fmt: skip
WEAR = [[0.12, 0.12, 0.14], [0.16, 0.20, 0.34], [0.62, 0.12, 0.12], [0.80, 0.80, 0.78], [0.32, 0.36, 0.30], [0.52, 0.42, 0.30],
                 [0.20, 0.42, 0.52], [0.86, 0.62, 0.16], [0.50, 0.24, 0.42], [0.42, 0.44, 0.48], [0.16, 0.36, 0.24]]  # fmt: skip
SKINS = [[0.90, 0.72, 0.60], [0.80, 0.60, 0.46], [0.60, 0.42, 0.30], [0.40, 0.27, 0.19]]


class _Street:
    """Draws a world from `rng` into `mesh`. Distances s run ahead along the road, t to the right of its centre line, in metres."""

    def __init__(self, rng: _Dice, size: tuple[int, int]):
        self.rng, self.mesh, self.models = rng, Mesh(), _models()
        self.sun = draw.sun_direction(rng.random(), rng.random())
        self.slant = (-float(self.sun[0] / self.sun[2]), -float(self.sun[1] / self.sun[2]))  # shadow's shift a metre of height
        bend = rng.uniform(0.004, 0.03) * (1 if rng.random() < 0.5 else -1) if rng.random() < 0.6 else rng.normal(0, 0.002)
        self.road = _Road(bend, rng.uniform(-5, 30))
        self.drive = 1 if rng.random() < 0.8 else -1  # traffic keeps right or left
        self._lanes()
        own = [t for t, ahead in self.lanes if ahead]
        t = self.pick(own) + rng.normal(0, 0.4)
        yaw = rng.normal(0, 0.07) if rng.random() < 0.75 else rng.uniform(-0.5, 0.5)
        focal = rng.uniform(0.85, 1.5) * math.sqrt(size[0] * size[1] / 2)
        self.camera = Camera(size, float(focal), (float(t), 0.0, rng.uniform(1.2, 2.2)), float(yaw), rng.uniform(-0.12, 0.09))
        self.crossing = (c := rng.uniform(9, 40), c + rng.uniform(7, 15)) if rng.random() < 0.42 else None
        self.end = rng.uniform(28, 70) if self.crossing is None and rng.random() < 0.22 else None
        self.taken: list[tuple[float, float, float]] = []  # s0, s1, t of what stands on the road, so that nothing stands in it
        self._ground()
        self.rails = None
        for side in (-1, 1):
            self._frontage(side)
        self._skyline()
        self._trains()
        self._traffic()
        for side in (-1, 1):
            self._furniture(side)
            self._pavement_life(side)
        self._crossers()

    # -- helpers ------------------------------------------------------------------------------------------------------------------------

    def pick(self, options):
        return options[int(self.rng.random() * len(options))]

    def chance(self, p: float) -> bool:
        return self.rng.random() < p

    def tint(self, color, spread=0.05, shade=1.0) -> list[float]:
        """A colour near the given one, brighter or darker and of slightly different hue."""
        bell, shade = self.rng.bell, shade * (1 + spread * self.rng.bell())
        return [min(max(c * shade + 0.3 * spread * bell(), 0.03), 0.97) for c in color]

    def palette(self, **colors) -> np.ndarray:
        palette = shapes.PALETTE.copy()
        for name, color in colors.items():
            palette[getattr(shapes, name)] = color
        return palette

    def ground(self, outline, color, label, layer, noise=(0.10, 14.0), material=GROUND):
        self.mesh.polygon(outline, color, label, GROUND_KEY - layer, material, noise, (self.slab_size, 0, 0, 0))

    def wall(self, p, q, z0, z1, color, label, key, material, params=(0, 0, 0, 0), noise=(0.10, 9.0), flags=0):
        """An upright quad over the ground line p to q."""
        quad = [(*p, z0), (*q, z0), (*q, z1), (*p, z1)]
        self.mesh.polygon(quad, color, label, key, material, noise, params, flags=flags)

    def cast(self, p, q, height, hanging=0.0):
        """The sun's shadow of an upright thing over the ground line p to q that begins `hanging` metres above the ground."""
        (px, py), (qx, qy), (dx, dy) = p, q, self.slant
        a, b = hanging, height
        self.mesh.shadows.append([(px + a * dx, py + a * dy, 0), (qx + a * dx, qy + a * dy, 0), (qx + b * dx, qy + b * dy, 0), (px + b * dx, py + b * dy, 0)])

    def solid_shadow(self, x, y, heading, half, length, height):
        """Cast and contact shadow of a box on the ground."""
        s, c, k = math.sin(heading), math.cos(heading), length / 2
        ring = [(x + i * half * c + j * k * s, y - i * half * s + j * k * c) for i, j in ((-1, -1), (1, -1), (1, 1), (-1, 1))]
        across = [px * self.slant[1] - py * self.slant[0] for px, py in ring]  # the two corners that bound the shadow's width
        self.cast(ring[across.index(min(across))], ring[across.index(max(across))], height)
        self.mesh.contacts.append([(px, py, 0) for px, py in ring])

    # -- ground -------------------------------------------------------------------------------------------------------------------------

    def _lanes(self):
        rng = self.rng
        one_way, lane = self.chance(0.22), rng.uniform(2.8, 3.6)
        ahead = rng.integer(1, 4) if self.chance(0.5) else 1
        against = 0 if one_way else (ahead if self.chance(0.75) else 1)
        self.median = rng.uniform(1.5, 4.0) if ahead > 1 and against and self.chance(0.35) else 0.0
        width = (ahead + against) * lane + self.median
        self.half = width / 2
        starts = [i * lane + (self.median if i >= against else 0) for i in range(ahead + against)]
        self.lanes = [(self.drive * (s + lane / 2 - self.half), i >= against) for i, s in enumerate(starts)]
        self.divider = self.drive * (against * lane + self.median / 2 - self.half) if against else None
        self.lane_width = lane
        # going outward from the carriageway: parking or bicycle strip, verge, pavement; then the frontage
        self.parking = {k: rng.uniform(2.0, 2.4) if self.chance(0.45) else 0.0 for k in (-1, 1)}
        self.verge = {k: rng.uniform(1.0, 3.5) if self.chance(0.30) else 0.0 for k in (-1, 1)}
        self.pavement = {k: rng.uniform(1.5, 5.5) if self.chance(0.82) else 0.0 for k in (-1, 1)}

    def edge(self, side):
        return self.half + self.parking[side]

    def front(self, side):
        return self.edge(side) + self.verge[side] + self.pavement[side] + (0.6 if not self.pavement[side] else 0.0)

    def _ground(self):
        rng, road = self.rng, self.road
        asphalt = self.tint([1, 1, 1.03], 0.03, rng.uniform(0.26, 0.44))
        slab = self.tint(self.pick([[0.62, 0.60, 0.58], [0.56, 0.55, 0.55], [0.66, 0.60, 0.52], [0.60, 0.48, 0.42]]), 0.08)
        self.grass = self.tint(self.pick([[0.30, 0.42, 0.16], [0.38, 0.46, 0.20], [0.46, 0.44, 0.24], [0.50, 0.40, 0.27]]), 0.1)
        self.slab, self.slab_size = slab, rng.uniform(0.6, 1.8)
        x, y = self.camera.position[:2]
        self.ground([(x - 250, y - 20, 0), (x + 250, y - 20, 0), (x + 250, y + 300, 0), (x - 250, y + 300, 0)], self.grass, TERRAIN, 0)
        far = END if self.end is None else self.end
        for side in (-1, 1):
            a, b = self.edge(side), self.edge(side) + self.verge[side]
            if self.pavement[side]:
                self.ground(road.strip(side * b, side * (b + self.pavement[side]), -8, far), slab, SIDEWALK, 2, (0.12, 6.0), PAVING)
            if self.verge[side]:
                self.ground(road.strip(side * a, side * b, -8, far), self.tint(self.grass), TERRAIN, 2, (0.24, 12.0))
        self.ground(road.strip(-self.edge(-1), self.edge(1), -8, far), asphalt, ROAD, 3, (0.10, 18.0))
        for side in (-1, 1):
            self.ground(road.strip(side * self.edge(side), side * (self.edge(side) + 0.18), -8, far), self.tint(slab, 0.0, 1.12), SIDEWALK, 3.5)
        if self.crossing:
            s0, s1 = self.crossing
            self.ground(self._across(s0, s1, -70, 70), self.tint(asphalt, 0.02), ROAD, 4, (0.10, 18.0))
        if self.end is not None:
            self.ground(self._across(self.end, self.end + 9, -70, 70), asphalt, ROAD, 4, (0.10, 18.0))
            self.ground(self._across(self.end + 9, self.end + 13, -70, 70), slab, SIDEWALK, 4)
        for _ in range(rng.integer(0, 4)):  # repairs
            s, t = rng.uniform(4, 25), rng.uniform(-self.half, self.half - 1)
            self.ground(road.strip(t, t + rng.uniform(0.8, 2.5), s, s + rng.uniform(1, 6)), self.tint(asphalt, 0.02, rng.uniform(0.75, 0.92)), ROAD, 4.5)
        if self.median:
            kind = self.grass if self.chance(0.6) else slab
            label = TERRAIN if kind is self.grass else SIDEWALK
            lo, hi = self.divider - self.median / 2, self.divider + self.median / 2
            for s0, s1 in self._blocks(-8, far):
                self.ground(road.strip(lo, hi, s0, s1), kind, label, 5, (0.2, 12.0))
        self._markings(far)

    def _across(self, s0, s1, t0, t1):
        return [(*self.road.at(s, t), 0.0) for s, t in ((s0, t0), (s0, t1), (s1, t1), (s1, t0))]

    def _blocks(self, s0, s1):
        """The stretch without the crossing."""
        if not self.crossing:
            return [(s0, s1)]
        return [(a, b) for a, b in ((s0, self.crossing[0]), (self.crossing[1], s1)) if b > a]

    def _markings(self, far):
        rng, road, white = self.rng, self.road, [self.rng.uniform(0.72, 0.92)] * 3
        if self.chance(0.85):
            borders = sorted({round((a[0] + b[0]) / 2, 2) for a, b in zip(self.lanes[:-1], self.lanes[1:], strict=True)})
            dash, gap = rng.uniform(1.5, 4), rng.uniform(2, 5)
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
                    self.ground(road.strip(side * self.half - 0.06, side * self.half + 0.06, s0, s1), white, ROAD, 6)
        self.zebra = None
        if self.crossing and self.chance(0.6):
            self.zebra = self.crossing[0] - 4
        elif self.chance(0.2):
            self.zebra = rng.uniform(6, 20)
        if self.zebra:
            for t in np.arange(-self.half + 0.3, self.half - 0.4, 1.0).tolist():
                self.ground(road.strip(t, t + 0.5, self.zebra, self.zebra + 3), white, ROAD, 7)
            self.ground(road.strip(-self.half, self.half, self.zebra - 1.2, self.zebra - 0.8), white, ROAD, 7)

    # -- frontage -----------------------------------------------------------------------------------------------------------------------

    def _frontage(self, side):
        """What lines the street on one side: houses, gardens, parks, walls, fences, a railway."""
        rng = self.rng
        moods = {"town": "bbbbbbbw", "suburb": "hhhhfw", "park": "pppf", "works": "wwfbf", "mixed": "bhpwf"}
        mood = moods[self.pick(["town", "town", "town", "suburb", "park", "works", "mixed", "mixed"])]
        if self.rails is None and self.chance(0.2):
            self.rails, mood = side, "r"
        self.floor, self.row = rng.uniform(2.8, 3.8), self.tint(self.pick(HOUSE_PAINT))
        far = END if self.end is None else self.end
        for s0, s1 in self._blocks(-6, far):
            s = s0
            while s < s1:
                kind = self.pick(mood)
                length = min(rng.uniform(8, 22) if kind in "bh" else rng.uniform(14, 40), s1 - s)
                if length < 3:
                    break
                {"b": self._house_row, "h": self._garden, "p": self._park, "w": self._walled, "f": self._fenced, "r": self._railway}[kind](side, s, s + length)
                s += length
        if self.crossing or self.end is not None:  # houses or a park face the camera beyond the side street
            s = self.crossing[1] if self.crossing else self.end + 13
            inner = self.front(side) if self.crossing else 0.0
            self._corner(side, s, inner)

    def _corner(self, side, s, inner):
        rng, t = self.rng, inner + (0.5 if self.crossing else 0.0)
        while t < 60:
            width = rng.uniform(9, 20)
            if self.chance(0.75):
                a, b = self.road.at(s + 0.2, side * t), self.road.at(s + 0.2, side * (t + width))
                self._facade(a if side > 0 else b, b if side > 0 else a, s + 0.3)
            else:
                for _ in range(3):
                    self._tree(s + rng.uniform(2, 8), side * (t + rng.uniform(0, width)))
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
        self.wall(p, q, 0, height, color, BUILDING, key, FACADE, (pitch, floor, rng.random(), style), flags=CULLED)
        return height, color

    def _house_row(self, side, s0, s1):
        rng = self.rng
        t = self.front(side) + (0.0 if self.chance(0.75) else rng.uniform(0.5, 3))
        self.ground(self.road.strip(side * self.front(side), side * 40, s0, s1), self.slab, SIDEWALK, 1, (0.12, 6.0), PAVING)
        p, q = self.road.at(s0, side * t), self.road.at(s1, side * t)
        color = self.row if self.chance(0.3) else self.tint(self.pick(HOUSE_PAINT), 0.08)
        height, color = self._front(side, p, q, s1 + 0.02, color)
        deep = self.road.at(s0, side * (t + 12))
        a, b = (p, deep) if side > 0 else (deep, p)
        self.wall(a, b, 0, height, self.tint(color, 0.02, 0.92), BUILDING, s0 + 0.03, draw.PLAIN, flags=CULLED)  # behind the nearer neighbour
        if self.chance(0.5):
            self._roof(side, s0, s1, t, height, s1 + 0.02)
        self.cast(p, q, height)
        if self.pavement[side] and self.chance(0.3):  # an awning
            z, d = rng.uniform(2.6, 3.1), rng.uniform(0.8, 1.5)
            m, n = s0 + 0.5, min(s0 + rng.uniform(3, 7), s1)
            a, b, c, e = self.road.at(m, side * t), self.road.at(n, side * t), self.road.at(n, side * (t - d)), self.road.at(m, side * (t - d))
            self.mesh.polygon([(*a, z + 0.5), (*b, z + 0.5), (*c, z), (*e, z)], self.tint(self.pick(WEAR)), BUILDING, m)

    def _front(self, side, p, q, key, color, floors=None):
        """A facade along the street; from the road its left end is the far one on the right side and the near one on the left."""
        return self._facade(*((p, q) if side < 0 else (q, p)), key, floors, color)

    def _roof(self, side, s0, s1, t, height, key):
        ridge = height + self.rng.uniform(2, 4)
        a, b, c, d = (self.road.at(s, side * v) for s, v in ((s0, t - 0.3), (s1, t - 0.3), (s1, t + 5), (s0, t + 5)))
        color = self.tint(self.pick([[0.50, 0.24, 0.17], [0.32, 0.27, 0.26], [0.42, 0.36, 0.32]]), 0.1)
        self.mesh.polygon([(*a, height), (*b, height), (*c, ridge), (*d, ridge)], color, BUILDING, key, BRICK)
        gable = [(*self.road.at(s0, side * t), height), (*d, ridge), (*self.road.at(s0, side * (t + 10)), height)]
        self.mesh.polygon(gable, self.tint(self.row, 0.05, 0.9), BUILDING, s0 + 0.03)

    def _garden(self, side, s0, s1):
        """A detached house behind its front garden."""
        rng, f = self.rng, self.front(side)
        self.ground(self.road.strip(side * f, side * 50, s0, s1), self.tint(self.grass), TERRAIN, 1, (0.24, 12.0))
        back, gap = f + rng.uniform(3, 8), rng.uniform(1, 3)
        p, q = self.road.at(s0 + gap, side * back), self.road.at(s1 - gap, side * back)
        height, color = self._front(side, p, q, s1 + 0.5, self.tint(self.pick(HOUSE_PAINT)), rng.integer(1, 4))
        deep = self.road.at(s0 + gap, side * (back + 9))
        self.wall(*((p, deep) if side > 0 else (deep, p)), 0, height, self.tint(color, 0.02, 0.92), BUILDING, s0 + gap + 0.1, FACADE, (3.0, self.floor, rng.random(), 0.3), flags=CULLED)
        self._roof(side, s0 + gap, s1 - gap, back, height, s1 + 0.4)
        edge = rng.random()
        if edge < 0.4:
            self._fence(side, s0, s1 - rng.uniform(0, 3), f)
        elif edge < 0.7:
            self._hedge(side, s0, s1 - rng.uniform(0, 4), f + 0.3)
        elif edge < 0.85:
            self._wall(side, s0, s1, f, rng.uniform(0.7, 1.3))
        for _ in range(rng.integer(0, 3)):
            self._tree(rng.uniform(s0, s1), side * rng.uniform(f + 1, back), rng.uniform(2, 6))

    def _park(self, side, s0, s1):
        rng, f = self.rng, self.front(side)
        self.ground(self.road.strip(side * f, side * 75, s0, s1), self.tint(self.grass), TERRAIN, 1, (0.26, 10.0))
        for _ in range(int((s1 - s0) * rng.uniform(0.12, 0.32)) + 1):
            self._tree(rng.uniform(s0, s1), side * (f + 1.5 + rng.exponential(10)))
        if self.chance(0.3):
            self._hedge(side, s0, s1, f + 0.5)
        elif self.chance(0.4):
            self._fence(side, s0, s1, f + 0.2)

    def _walled(self, side, s0, s1):
        rng, f = self.rng, self.front(side)
        self.ground(self.road.strip(side * f, side * 50, s0, s1), self.tint(self.grass), TERRAIN, 1)
        height = rng.uniform(1.4, 3.8)
        self._wall(side, s0, s1, f, height)
        if self.chance(0.5):
            p, q = self.road.at(s0, side * (f + 9)), self.road.at(s1, side * (f + 9))
            self._front(side, p, q, s1 + 1, None)
        for _ in range(rng.integer(1, 5)):
            self._tree(rng.uniform(s0, s1), side * (f + rng.uniform(2, 7)), key=s1 + 0.5)

    def _fenced(self, side, s0, s1):
        rng, f = self.rng, self.front(side)
        self.ground(self.road.strip(side * f, side * 75, s0, s1), self.tint(self.grass), TERRAIN, 1, (0.26, 10.0))
        self._fence(side, s0, s1, f + 0.2)
        for _ in range(rng.integer(0, 4)):
            self._tree(rng.uniform(s0, s1), side * (f + rng.uniform(3, 14)), key=s1 + 0.5)
        if self.chance(0.35):
            t = f + rng.uniform(8, 20)
            self._front(side, self.road.at(s0, side * t), self.road.at(s1, side * t), s1 + 1, None)

    def _railway(self, side, s0, s1):
        """Gravel with rails; the train itself comes later."""
        f = self.front(side)
        self.ground(self.road.strip(side * f, side * 75, s0, s1), self.tint(self.grass), TERRAIN, 1, (0.26, 10.0))
        self.ground(self.road.strip(side * (f + 0.8), side * (f + 4.6), s0, s1), self.tint([0.45, 0.41, 0.37]), TERRAIN, 1.2, (0.3, 20.0))
        for t in (f + 1.95, f + 3.4):
            self.ground(self.road.strip(side * t, side * (t + 0.12), s0, s1), [0.62, 0.60, 0.58], TERRAIN, 1.3)
        for _ in range(int((s1 - s0) / 6)):
            self._tree(self.rng.uniform(s0, s1), side * (f + self.rng.uniform(7, 16)), key=s1 + 0.5)
        if self.chance(0.5):
            self._fence(side, s0, s1, f + 0.3)

    def _wall(self, side, s0, s1, t, height):
        color = self.tint(self.pick([[0.60, 0.58, 0.55], [0.52, 0.34, 0.26], [0.66, 0.60, 0.50], [0.48, 0.47, 0.46], [0.74, 0.72, 0.68]]), 0.06)
        brick = self.chance(0.6)
        edges = np.linspace(s0, s1, max(2, int((s1 - s0) / 5) + 1)).tolist()
        for a, b in zip(edges[:-1], edges[1:], strict=True):
            p, q = self.road.at(a, side * t), self.road.at(b, side * t)
            self.wall(p, q, 0, height, color, WALL, b + 0.01, BRICK if brick else draw.PLAIN, noise=(0.22, 4.0))
            self.wall(p, q, height - 0.12, height, self.tint(color, 0, 1.2), WALL, b + 0.005, draw.PLAIN)
            self.cast(p, q, height)

    def _fence(self, side, s0, s1, t):
        rng = self.rng
        height, pitch = rng.uniform(1.0, 2.1), rng.uniform(0.14, 0.30)
        color = self.tint(self.pick([[0.16, 0.17, 0.17], [0.40, 0.30, 0.20], [0.72, 0.72, 0.70], [0.14, 0.28, 0.20], [0.45, 0.47, 0.48]]), 0.08)
        params = (pitch, rng.uniform(0.35, 0.65), height * 0.62, 0.12)
        edges = np.linspace(s0, s1, max(2, int((s1 - s0) / 5) + 1)).tolist()
        for a, b in zip(edges[:-1], edges[1:], strict=True):
            self.wall(self.road.at(a, side * t), self.road.at(b, side * t), 0, height, color, FENCE, b, BARS, params)

    def _hedge(self, side, s0, s1, t):
        color, height = self.tint([0.20, 0.32, 0.14], 0.15), self.rng.uniform(0.8, 1.8)
        edges = np.linspace(s0, s1, max(2, int((s1 - s0) / 4) + 1)).tolist()
        for a, b in zip(edges[:-1], edges[1:], strict=True):
            p, q = self.road.at(a, side * t), self.road.at(b, side * t)
            self.wall(p, q, 0, height + self.rng.normal(0, 0.04), color, VEGETATION, b + 0.01, FOLIAGE, noise=(0.42, 22.0))

    def _tree(self, s, t, height=None, key=None):
        rng = self.rng
        bush = self.chance(0.22)
        height = height or (rng.uniform(0.9, 2.2) if bush else rng.uniform(4.5, 12))
        leaf = self.tint(self.pick([[0.22, 0.36, 0.12], [0.28, 0.42, 0.16], [0.18, 0.30, 0.14], [0.36, 0.40, 0.14], [0.46, 0.36, 0.12]]), 0.12)
        width = height * rng.uniform(0.75, 1.15) * (1.6 if bush else 1)
        x, y = self.road.at(s, t)
        palette = self.palette(LEAF=leaf, TOP=self.tint(leaf, 0, 0.78), TRIM=self.tint([0.26, 0.20, 0.15]))
        model = self.pick(self.models["bush" if bush else "tree"])
        self.mesh.place(model, palette, (x, y), self.camera.yaw, VEGETATION, s if key is None else key, scale=(width, 1, height))
        dx, dy = width * 0.28 * math.cos(self.camera.yaw), -width * 0.28 * math.sin(self.camera.yaw)
        self.cast((x - dx, y - dy), (x + dx, y + dy), height * 0.95, height * 0.35)

    def _skyline(self):
        """Far houses and woods close the view."""
        rng, angle = self.rng, self.camera.yaw - 1.25
        x, y = self.camera.position[:2]
        while angle < self.camera.yaw + 1.25:
            step, r = rng.uniform(0.05, 0.16), rng.uniform(118, 150)
            p, q = ((x + r * math.sin(a), y + r * math.cos(a)) for a in (angle, angle + step))
            if self.chance(0.5):
                self.wall(p, q, -1, rng.uniform(7, 26), self.tint(self.pick(HOUSE_PAINT)), BUILDING, 9e5, FACADE, (4.0, 3.4, rng.random(), 0.4))
            elif self.chance(0.85):
                self.wall(p, q, -1, rng.uniform(4, 13), self.tint([0.24, 0.34, 0.18]), VEGETATION, 9e5, FOLIAGE, noise=(0.3, 2.0))
            angle += step

    # -- traffic ------------------------------------------------------------------------------------------------------------------------

    def free(self, s0, s1, t, margin=1.0):
        """Claims a stretch of road; false where something stands."""
        if any(abs(t - other) < 1.9 and s0 - margin < b and a < s1 + margin for a, b, other in self.taken):
            return False
        self.taken.append((s0, s1, t))
        return True

    def _pieces(self, models, palette, s, t, length, count, ahead, label, obj, height):
        """Slices of a long vehicle from s onward, each bent along the road and sorted by its own distance."""
        for i in range(count):
            middle = s + length * (i + 0.5)
            x, y = self.road.at(middle, t)
            heading = self.road.heading(middle) + (0 if ahead else math.pi)
            model, scale = models(i if ahead else count - 1 - i)
            self.mesh.place(model, palette, (x, y), heading, label, middle, obj, scale)
            self.solid_shadow(x, y, heading, 1.25, length, height)

    def _vehicle(self, kind, s, t, ahead):
        """Puts a vehicle with its near end at s on lane t; returns false where there is no room."""
        rng, models = self.rng, self.models
        length = {"car": 4.6, "bus": 12.0, "truck": 9.2, "bicycle": 1.9, "motorcycle": 2.2}[kind]
        if not self.free(s, s + length, t):
            return False
        if kind == "car":
            x, y = self.road.at(s + length / 2, t)
            heading = self.road.heading(s + length / 2) + (0 if ahead else math.pi) + rng.normal(0, 0.02)
            self._car(x, y, heading, s + length / 2)
        elif kind == "bus":
            obj, k = self.mesh.object(BUS), rng.uniform(0.95, 1.06)
            door = -1 if self.chance(0.5) else 1
            palette = self.palette(BODY=self.tint(self.pick(BUS_PAINT)), TRIM=self.tint(self.pick([[0.9, 0.9, 0.88], [0.25, 0.26, 0.28], [0.85, 0.75, 0.2]])))
            choose = lambda i: (models["bus"][1 if i in (1, 3) else 2 if i in (0, 4) and door > 0 else 0], (1, 1, k))
            self._pieces(choose, palette, s, t, 2.4, 5, ahead, BUS, obj, 3.0)
        elif kind == "truck":
            obj, style = self.mesh.object(TRUCK), rng.integer(0, 3)
            palette = self.palette(BODY=self.tint(self.pick(CAR_PAINT)), TRIM=self.tint(self.pick(LOAD_PAINT)))
            load = models["load"][style]
            choose = lambda i: (models["cab"][0], (1, 1, 1)) if i == 3 else (load, (1, 2.3 / 2.6, height))
            height = rng.uniform(0.85, 1.05)
            self._pieces(choose, palette, s, t, 2.3, 4, ahead, TRUCK, obj, 3.5)
        else:
            self._two_wheeler(kind, s + length / 2, t, self.road.heading(s) + (0 if ahead else math.pi), rider=True)
        return True

    def _car(self, x, y, heading, key):
        paint = self.pick(CAR_PAINT) if self.chance(0.6) else self.pick(CAR_PAINT[:4])
        model = self.pick(self.models["car"])
        palette = self.palette(BODY=self.tint(paint, 0.08))
        self.mesh.place(model, palette, (x, y), heading, CAR, key, self.mesh.object(CAR), scale=(1, 1, self.rng.uniform(0.96, 1.06)))
        self.solid_shadow(x, y, heading, 0.88, 4.3, 1.2)

    def _two_wheeler(self, kind, s, t, heading, rider):
        """A bicycle or motorcycle, from the side or the end, whichever the camera sees more of."""
        rng = self.rng
        x, y = self.road.at(s, t)
        label = BICYCLE if kind == "bicycle" else MOTORCYCLE
        sight = heading - math.atan2(x - self.camera.position[0], y - self.camera.position[1])
        view = 0 if abs(math.sin(sight)) > 0.5 else (2 if math.cos(sight) > 0 else 1)
        turn = heading if view == 0 else self.camera.yaw
        palette = self.palette(BODY=self.tint(self.pick(WEAR if kind == "bicycle" else CAR_PAINT), 0.1), HUB=[0.5, 0.5, 0.5] if kind != "bicycle" else [0.3, 0.3, 0.3])
        self.mesh.place(self.models[kind][view], palette, (x, y), turn, label, s, self.mesh.object(label), scale=(1.1, 1.05, 1.05))
        if rider:
            hair = self.tint(self.pick([[0.15, 0.1, 0.08], [0.85, 0.85, 0.85], [0.7, 0.1, 0.1], [0.1, 0.1, 0.12], [0.1, 0.3, 0.6]]))
            wear = self.palette(TOP=self.tint(self.pick(WEAR), 0.1), LEGS=self.tint(self.pick(WEAR), 0.05, 0.7), SKIN=self.pick(SKINS), HAIR=hair)
            model = self.models["rider"][view if view else (0 if kind == "bicycle" else 3)]
            self.mesh.place(model, wear, (x, y), turn, RIDER, s - 0.01, self.mesh.object(RIDER), scale=(1.15, 1, rng.uniform(1.0, 1.1)))
        self.solid_shadow(x, y, heading, 0.25, 1.8, 1.6 if rider else 0.9)

    def _traffic(self):
        rng = self.rng
        limit = 75 if self.end is None else self.end - 3
        wished = [kind for kind, p in (("bus", 0.38), ("truck", 0.42), ("motorcycle", 0.34), ("bicycle", 0.30)) if self.chance(p)]
        own = min((abs(t - self.camera.position[0]), t) for t, ahead in self.lanes if ahead)[1]
        for kind in wished:
            for _ in range(4):
                t, ahead = self.pick(self.lanes)
                least = 9.0 if t == own else (1.5 if kind in ("bus", "truck") else 5.0)
                if self._vehicle(kind, rng.uniform(least, 24 if kind in ("bus", "truck") else 14), t + rng.normal(0, 0.15), ahead):
                    break
        for t, ahead in self.lanes:
            s = rng.uniform(8 if t == own else 3, 28)
            density = rng.uniform(6, 30)
            while s < limit:
                kind = self.pick(["car"] * 12 + ["truck", "bus", "motorcycle", "bicycle"])
                self._vehicle(kind, s, t + rng.normal(0, 0.2), ahead)
                s += 6 + rng.exponential(density)
        for side in (-1, 1):
            if self.parking[side]:
                self._parked(side, limit)
        if self.crossing and self.chance(0.65):
            self._side_street()

    def _parked(self, side, limit):
        rng, t, ahead = self.rng, side * (self.half + self.parking[side] / 2 + 0.05), side == self.drive
        s, full = rng.uniform(2, 8), rng.uniform(0.35, 0.95)
        while s < min(limit, 60):
            inside = self.crossing and self.crossing[0] - 7 < s < self.crossing[1] + 2
            if not inside and self.chance(full):
                kind = self.pick(["car"] * 10 + ["truck", "bus"])
                self._vehicle(kind, s, t + rng.normal(0, 0.08), ahead if self.chance(0.9) else not ahead)
            s += rng.uniform(5.2, 6.5)

    def _side_street(self):
        """Vehicles that cross ahead, seen from their sides."""
        rng, (s0, s1) = self.rng, self.crossing
        for s, toward in ((s0 + (s1 - s0) * 0.3, 1), (s0 + (s1 - s0) * 0.72, -1)):
            t = rng.uniform(-16, 6)
            for _ in range(rng.integer(0, 3)):
                kind = self.pick(["car", "car", "bus", "truck", "truck"])
                if not self.free(s - 1.3, s + 1.3, 999 + s):
                    break
                heading = self.road.heading(s) + toward * math.pi / 2
                if kind == "car":
                    self._car(*self.road.at(s, t), heading, s)
                    t += 9
                    continue
                label, n, length = (BUS, 5, 2.4) if kind == "bus" else (TRUCK, 4, 2.3)
                obj, style = self.mesh.object(label), rng.integer(0, 3)
                paint = BUS_PAINT if kind == "bus" else CAR_PAINT
                palette = self.palette(BODY=self.tint(self.pick(paint)), TRIM=self.tint(self.pick(LOAD_PAINT)))
                for i in range(n):
                    x, y = self.road.at(s, t + toward * (i - n / 2) * length)
                    if kind == "bus":
                        model = self.models["bus"][1 if i in (1, 3) else 0]
                    else:
                        model = self.models["cab"][0] if i == n - 1 else self.models["load"][style]
                    self.mesh.place(model, palette, (x, y), heading, label, s + 0.002 * abs(t + toward * (i - n / 2) * length), obj, (1, 0.9 if kind == "truck" else 1, 1))
                    self.solid_shadow(x, y, heading, 1.25, length, 3.0)
                t += 16

    def _trains(self):
        """A train on the railway, a tram in the street, or one that crosses."""
        rng = self.rng
        body, stripe = self.pick(TRAIN_PAINT)
        palette = self.palette(BODY=self.tint(body, 0.04), TRIM=self.tint(stripe, 0.04))
        choose = lambda i: (self.models["train"][i % 3 == 1], (1, 1, 1))
        if self.rails:
            t, count = self.rails * (self.front(self.rails) + 2.7), rng.integer(6, 13)
            if self.chance(0.85):
                s = rng.uniform(1, 14)
                stop = (self.crossing[0] if self.crossing else (self.end or END)) - 1
                count = min(count, int((stop - s) / 3))
                if count > 1:
                    self._pieces(choose, palette, s, t, 3.0, count, self.chance(0.5), TRAIN, self.mesh.object(TRAIN), 3.6)
        elif self.chance(0.22):  # a tram on its rails in the street
            t, ahead = self.pick(self.lanes)
            far = END if self.end is None else self.end
            for k in (-0.75, 0.70):
                self.ground(self.road.strip(t + k, t + k + 0.09, -8, far), [0.55, 0.55, 0.56], ROAD, 6.5)
            s = rng.uniform(7, 22)
            count = rng.integer(4, 10)
            if self.free(s, s + 3 * count, t, 2):
                self._pieces(choose, palette, s, t, 3.0, count, ahead, TRAIN, self.mesh.object(TRAIN), 3.6)
        elif self.crossing and self.chance(0.35):
            s = (self.crossing[0] + self.crossing[1]) / 2
            heading, obj, start = self.road.heading(s) + math.pi / 2, self.mesh.object(TRAIN), rng.uniform(-30, -4)
            self.taken.append((s - 2, s + 2, 999 + s))
            for k in (-0.75, 0.70):
                self.ground(self._across(s + k, s + k + 0.1, -70, 70), [0.55, 0.55, 0.56], ROAD, 6.5)
            for i in range(rng.integer(7, 13)):
                x, y = self.road.at(s, start + 3.0 * i)
                self.mesh.place(choose(i)[0], palette, (x, y), heading, TRAIN, s + 0.002 * abs(start + 3 * i), obj)
                self.solid_shadow(x, y, heading, 1.35, 3.0, 3.6)

    # -- street furniture and people ------------------------------------------------------------------------------------------------------

    def pole(self, s, t, height, width, key=None):
        x, y = self.road.at(s, t)
        color = self.tint(self.pick([[0.42, 0.43, 0.44], [0.20, 0.21, 0.21], [0.56, 0.57, 0.57], [0.34, 0.25, 0.17], [0.22, 0.32, 0.26]]), 0.06)
        self.mesh.place(shapes.bar([(0, 0), (0, height)], width), self.palette(METAL=color), (x, y), self.camera.yaw, POLE, s if key is None else key)
        self.cast((x - width / 2, y), (x + width / 2, y), height)
        return x, y, color

    def _furniture(self, side):
        rng = self.rng
        t = side * (self.edge(side) + min(0.5, (self.verge[side] + self.pavement[side]) * 0.4 + 0.1))
        far = 80 if self.end is None else self.end
        if self.chance(0.75):  # street lamps or masts with wires
            height, step, lamps = rng.uniform(5, 8.5), rng.uniform(16, 30), self.chance(0.8)
            for s in np.arange(rng.uniform(4, 16), far, step).tolist():
                x, y, color = self.pole(s, t, height, rng.uniform(0.17, 0.26))
                if lamps:
                    reach = -side * rng.uniform(0.9, 2.0)
                    self.mesh.place(shapes.lamp_head(reach, height), self.palette(METAL=color), (x, y), self.camera.yaw, POLE, s - 0.01)
                    self.mesh.lamps.append((x + reach, y, height))
        if self.chance(0.55):  # street trees
            step = rng.uniform(6, 14)
            for s in np.arange(rng.uniform(5, 14), far, step).tolist():
                if not (self.crossing and self.crossing[0] - 3 < s < self.crossing[1] + 3):
                    self._tree(s + rng.normal(0, 0.5), t + side * 0.5, rng.uniform(4, 9))
        if self.chance(0.55 if self.crossing else 0.35):
            self._signals(side, t)
        for _ in range(rng.integer(0, 4)):
            self._sign(rng.uniform(4, 22), t + side * rng.uniform(-0.1, 0.4))
        if self.pavement[side] > 2 and self.chance(0.2):  # railings at the kerb
            s = rng.uniform(1, 15)
            self._fence(side, s, s + rng.uniform(5, 15), self.edge(side) + self.verge[side] + 0.25)

    def _signals(self, side, t):
        rng = self.rng
        s = (self.crossing[0] if self.crossing else rng.uniform(7, 22)) - 1.0
        s = min(max(s, 6.0), 24.0)
        lit, height = rng.integer(0, 3), rng.uniform(2.3, 3.2)
        model, size = self.models["light"][lit * 2 + int(self.chance(0.5))], rng.uniform(1.0, 1.35)
        palette = self.palette(TRIM=self.tint(self.pick([[0.10, 0.11, 0.11], [0.13, 0.20, 0.16], [0.72, 0.58, 0.12]]), 0.05))
        x, y, color = self.pole(s, t, height + 0.3, 0.18)
        heads = [(0.0, height)]
        if self.chance(0.5):  # a mast reaches over the road
            reach, top = -side * rng.uniform(2.5, 5.5), rng.uniform(5.0, 6.0)
            self.mesh.place(shapes.bar([(0, 0), (0, top), (reach, top + 0.15)], 0.2), self.palette(METAL=color), (x, y), self.camera.yaw, POLE, s)
            heads.append((reach, top - 0.75))
        c, n = math.cos(self.camera.yaw), math.sin(self.camera.yaw)
        for dx, z in heads:
            at = (x + dx * c, y - dx * n)
            self.mesh.place(model, palette, at, self.camera.yaw, LIGHT, s - 0.02, self.mesh.object(LIGHT), (size, 1, size), z)

    def _sign(self, s, t):
        rng = self.rng
        wide = self.chance(0.22)
        kind = 6 if wide else rng.integer(0, 6)
        z, size = (rng.uniform(3.0, 4.5), rng.uniform(0.8, 1.25)) if wide else (rng.uniform(2.2, 2.9), rng.uniform(1.0, 1.4))
        x, y, _ = self.pole(s, t, z + 0.3, 0.14 if not wide else 0.2)
        palette = self.palette(TOP=self.tint([0.08, 0.26, 0.62] if self.chance(0.65) or not wide else [0.06, 0.40, 0.26]), RED=[0.80, 0.08, 0.10])
        self.mesh.place(self.models["sign"][kind], palette, (x, y), self.camera.yaw, SIGN, s - 0.02, self.mesh.object(SIGN), (size, 1, size), z)
        if not wide and self.chance(0.3):
            self.mesh.place(self.models["sign"][rng.integer(0, 6)], palette, (x, y), self.camera.yaw, SIGN, s - 0.02, self.mesh.object(SIGN), (size, 1, size), z - 0.95 * size)

    def _person(self, s, t, heading=0.0):
        rng = self.rng
        child = self.chance(0.1)
        tall = rng.uniform(0.62, 0.8) if child else rng.uniform(0.93, 1.08)
        palette = self.palette(
            TOP=self.tint(self.pick(WEAR), 0.1), LEGS=self.tint(self.pick(WEAR), 0.1, 0.65), SKIN=self.pick(SKINS), TRIM=self.tint(self.pick(WEAR)),
            HAIR=self.tint(self.pick([[0.12, 0.09, 0.07], [0.32, 0.20, 0.10], [0.68, 0.54, 0.30], [0.60, 0.60, 0.60], [0.5, 0.15, 0.12]])))  # fmt: skip
        x, y = self.road.at(s, t)
        wide = tall * rng.uniform(0.9, 1.15) * (1 if self.chance(0.5) else -1)
        self.mesh.place(self.pick(self.models["person"]), palette, (x, y), self.camera.yaw, PERSON, s, self.mesh.object(PERSON), (wide, 1, tall))
        self.cast((x - 0.2, y), (x + 0.2, y), 1.7 * tall)
        self.mesh.contacts.append([(x - 0.3, y - 0.2, 0), (x + 0.3, y - 0.2, 0), (x + 0.3, y + 0.2, 0), (x - 0.3, y + 0.2, 0)])

    def _pavement_life(self, side):
        rng = self.rng
        width = self.pavement[side] + self.verge[side]
        if width < 1:
            return
        inner, outer = self.edge(side) + 0.5, self.edge(side) + width - 0.3
        for _ in range(self.pick([0, 0, 1, 1, 2, 3, 4, 6, 8])):
            self._person(4 + rng.exponential(14), side * rng.uniform(inner, outer))
        if self.chance(0.15):  # a crowd waits
            s, t = rng.uniform(5, 16), rng.uniform(inner, outer)
            for _ in range(rng.integer(5, 12)):
                self._person(s + rng.normal(0, 1.2), side * min(max(t + rng.normal(0, 0.8), inner), outer))
        for kind, p in (("bicycle", 0.36), ("motorcycle", 0.28)):
            if self.chance(p):
                s, across, step = rng.uniform(3.5, 13), self.chance(0.5), rng.uniform(0.6, 1.1)
                for i in range(rng.integer(1, 5)):
                    turn = rng.normal(0, 0.1) + (math.pi / 2 if across else 0) + (math.pi if self.chance(0.5) else 0)
                    self._two_wheeler(kind, s + i * (step if across else 2.0), side * (inner + (0.5 if across else 0)), self.road.heading(s) + turn, rider=self.chance(0.1))

    def _crossers(self):
        rng = self.rng
        if self.zebra or self.chance(0.2):
            s = self.zebra or rng.uniform(6, 18)
            for _ in range(rng.integer(0, 6)):
                self._person(s + rng.uniform(0.3, 2.7), rng.uniform(-self.half, self.half))
        for _ in range(int(self.chance(0.35)) + int(self.chance(0.15))):
            s, t = rng.uniform(6, 13), rng.uniform(-self.half, self.half)
            if self.free(s - 1, s + 1, t, 0.3):
                self._two_wheeler(self.pick(["bicycle", "bicycle", "motorcycle"]), s, t, self.road.heading(s) + (math.pi / 2 if self.chance(0.5) else -math.pi / 2) + rng.normal(0, 0.3), rider=True)


def _setback(rng: _Dice) -> float:
    """How far a town house stands back: mostly not at all."""
    return 0.0 if rng.random() < 0.75 else rng.uniform(0.5, 3)

