"""The things that stand and move on the generated streets, as polygons.

Each has axes of its own, in metres: x right, y ahead, z up, feet at 0. Vehicles are solids whose
faces are counter-clockwise from outside. People, bicycles, trees, signs and lights are flat
cut-outs: side views lie in the plane x = 0 and face +y, front and rear views in the plane y = 0.
"""

from functools import lru_cache
from itertools import pairwise

import numpy as np

from jaxdg.streets.draw import BARS, CULLED, FOLIAGE, LAMP, NO_GLOW, PLAIN, SIGNAL, VEHICLE, Shape

# Slots of the palette with which a shape is painted.
BODY, TRIM, GLASS, TYRE, HUB, HEAD, TAIL, PLATE, SKIN, HAIR = range(10)
TOP, LEGS, SHOE, METAL, DARK, RED, AMBER, GREEN, WHITE, LEAF = range(10, 20)
PALETTE = np.array([
    [0.5, 0.5, 0.5], [0.2, 0.2, 0.22], [0.13, 0.17, 0.21], [0.06, 0.06, 0.065],
    [0.55, 0.56, 0.58], [0.96, 0.95, 0.88], [0.72, 0.06, 0.06], [0.88, 0.88, 0.82],
    [0.80, 0.60, 0.48], [0.16, 0.11, 0.08], [0.3, 0.3, 0.5], [0.15, 0.17, 0.25],
    [0.1, 0.08, 0.08], [0.46, 0.47, 0.48], [0.08, 0.085, 0.09], [0.90, 0.10, 0.08],
    [0.95, 0.66, 0.08], [0.12, 0.85, 0.40], [0.94, 0.94, 0.94], [0.25, 0.4, 0.15],
], np.float32)  # fmt: skip


class Sketch:
    """Collects polygons into a `Shape`."""

    def __init__(self):
        self.polygons = []
        self.rows = []

    def add(self, vertices, slot: int, glow=NO_GLOW, material=PLAIN, flags=0):
        self.polygons.append(np.asarray(vertices, np.float32))
        self.rows.append((slot, glow, material, flags))
        return self.polygons[-1]

    def face(self, quad, slot, glow=NO_GLOW):
        """A quad seen from its front only: bottom left, bottom right, top right, top left."""
        return self.add(quad, slot, glow, flags=CULLED)

    def patch(self, quad, u0, u1, v0, v1, slot, glow=NO_GLOW):
        """A part of a face, in shares of its width and height."""
        a, b, c, d = quad

        def at(u, v):
            return (a * (1 - u) + b * u) * (1 - v) + (d * (1 - u) + c * u) * v

        return self.face([at(u0, v0), at(u1, v0), at(u1, v1), at(u0, v1)], slot, glow)

    def prism(self, low, high, z0, z1, slot, top=None):
        """A tapered box from rectangle `low` at z0 to rectangle `high` at z1.

        A rectangle is (half width, y rear, y front).

        Returns:
            Its four sides in the order rear, right, front, left.
        """
        corners = [
            np.array([[-k, r, z], [k, r, z], [k, f, z], [-k, f, z]], np.float32)
            for (k, r, f), z in ((low, z0), (high, z1))
        ]
        (a, b, c, d), (e, g, i, j) = corners
        quads = ((a, b, g, e), (b, c, i, g), (c, d, j, i), (d, a, e, j))
        faces = [self.face(q, slot) for q in quads]
        self.face((e, g, i, j), slot if top is None else top)
        return faces

    def wheels(self, half: float, ys, radius: float, sides=(-1, 1)):
        """Wheels on the sides of a vehicle of this half width."""
        angle = np.linspace(0, 2 * np.pi, 11)[:-1]
        for side in sides:
            for y in ys:
                for r, slot in ((radius, TYRE), (radius * 0.55, HUB)):
                    x = np.full(10, side * (half + 0.01))
                    along = y + side * r * np.cos(angle)
                    ring = np.stack([x, along, radius + r * np.sin(angle)], 1)
                    self.add(ring, slot, flags=CULLED)

    def disc(self, x, z, rx, rz, slot, n=10, plane="xz", glow=NO_GLOW, material=PLAIN):
        """An ellipse in a vertical plane."""
        angle = np.linspace(0, 2 * np.pi, n + 1)[:-1] + 0.3
        self.add(_flat(x + rx * np.cos(angle), z + rz * np.sin(angle), plane), slot, glow, material)

    def limb(self, start, end, w0, w1, slot, plane="xz"):
        """A tapered bar between two points of a vertical plane."""
        x0, z0 = start
        x1, z1 = end
        length = max(np.hypot(x1 - x0, z1 - z0), 1e-6)
        nx = -(z1 - z0) / length / 2
        nz = (x1 - x0) / length / 2
        xs = [x0 - nx * w0, x1 - nx * w1, x1 + nx * w1, x0 + nx * w0]
        zs = [z0 - nz * w0, z1 - nz * w1, z1 + nz * w1, z0 + nz * w0]
        self.add(_flat(np.array(xs), np.array(zs), plane), slot)

    def outline(self, points, slot, plane="xz", glow=NO_GLOW, material=PLAIN):
        """Any polygon of a vertical plane."""
        points = np.array(points, np.float32)
        self.add(_flat(points[:, 0], points[:, 1], plane), slot, glow, material)

    def shape(self) -> Shape:
        """The polygons collected so far."""
        slots, glow, material, flags = np.array(self.rows, np.int32).T
        table = np.zeros((len(slots), 9), np.float32)
        leafy = material == FOLIAGE
        table[:, 3] = np.where(leafy, 0.36, 0.05)
        table[:, 4] = np.where(leafy, 14.0, 30.0)
        table[:, 5:9] = 0.045, 0.22, 9.0, 0.0  # spokes, where the material is BARS
        return Shape(
            np.concatenate(self.polygons),
            np.array([len(p) for p in self.polygons]),
            slots,
            table,
            np.stack([material, glow, flags], 1),
        )


def _flat(a, z, plane):
    zero = np.zeros_like(a)
    return np.stack([a, zero, z] if plane == "xz" else [zero, a, z], 1)


def car(length=4.3, width=1.76, height=1.48, hood=0.26, trunk=0.12, waist=0.62) -> Shape:
    """A passenger car.

    `hood` and `trunk` are shares of its length, `waist` is the share of its height below the
    windows.
    """
    s = Sketch()
    half = width / 2
    back = -length / 2
    front = length / 2
    belt = height * waist
    top = (half * 0.97, back + 0.06, front - 0.10)
    rear, _, nose, _ = s.prism((half, back, front), top, 0.24, belt, BODY)
    y0 = back + 0.06 + trunk * length * 0.6
    y1 = front - hood * length
    roof = (half * 0.74, y0 + trunk * length * 0.7 + 0.12, y1 - 0.17 * length)
    cabin = s.prism((half * 0.95, y0, y1), roof, belt, height, BODY)
    for i, (u0, u1) in enumerate(((0.07, 0.93), (0.04, 0.96), (0.06, 0.94), (0.04, 0.96))):
        if i % 2:
            s.patch(cabin[i], u0, 0.50, 0.1, 0.86, GLASS)
            s.patch(cabin[i], 0.54, u1, 0.1, 0.86, GLASS)
        else:
            s.patch(cabin[i], u0, u1, 0.08, 0.9, GLASS)
    for u in (0.02, 0.80):
        s.patch(rear, u, u + 0.18, 0.55, 0.85, TAIL, VEHICLE)
        s.patch(nose, u + 0.01, u + 0.17, 0.50, 0.76, HEAD, VEHICLE)
    s.patch(rear, 0.36, 0.64, 0.36, 0.56, PLATE)
    s.patch(nose, 0.26, 0.74, 0.36, 0.66, TRIM)
    s.patch(nose, 0.38, 0.62, 0.14, 0.30, PLATE)
    s.patch(rear, 0, 1, 0, 0.16, TRIM)
    s.patch(nose, 0.05, 0.95, 0, 0.12, TRIM)
    s.wheels(half, (-0.30 * length, 0.31 * length), 0.33)
    return s.shape()


def lorry_cab(width=2.4, height=2.9) -> Shape:
    """A lorry's driver cab, 2.2 m long, front at y = 1.1."""
    s = Sketch()
    half = width / 2
    _, right, nose, left = s.prism((half, -1.1, 1.1), (half * 0.94, -1.1, 0.9), 0.5, height, BODY)
    s.patch(nose, 0.06, 0.94, 0.50, 0.86, GLASS)
    s.patch(nose, 0.15, 0.85, 0.16, 0.42, TRIM)
    for u in (0.03, 0.80):
        s.patch(nose, u, u + 0.17, 0.03, 0.13, HEAD, VEHICLE)
    s.patch(right, 0.34, 0.90, 0.50, 0.84, GLASS)
    s.patch(left, 0.10, 0.66, 0.50, 0.84, GLASS)
    s.wheels(half, (0.2,), 0.48)
    return s.shape()


def lorry_load(width=2.5, length=2.6, z0=1.0, height=3.6, wheels=True, style=0) -> Shape:
    """A piece of a lorry's load: a box (0), a tarpaulin with bands (1) or an open tipper (2)."""
    s = Sketch()
    half = width / 2
    r = -length / 2
    f = length / 2
    s.prism((half * 0.8, r, f), (half * 0.8, r, f), 0.55, z0, DARK)
    top = z0 + 1.1 if style == 2 else height
    rim = (half * (1.0 if style != 2 else 1.03), r, f)
    rear, right, _, left = s.prism((half, r, f), rim, z0, top, TRIM)
    if style == 0:
        s.patch(rear, 0.49, 0.51, 0.02, 0.98, DARK)
        for u in (0.22, 0.76):
            s.patch(rear, u, u + 0.02, 0.05, 0.95, METAL)
    for side in (right, left):
        if style == 1:
            s.patch(side, 0, 1, 0.30, 0.62, BODY)
        s.patch(side, 0, 1, 0, 0.05, METAL)
        for u in (0.25, 0.75) if style else ():
            s.patch(side, u, u + 0.03, 0.05, 1, DARK)
    for u in (0.02, 0.84):
        s.patch(rear, u, u + 0.14, 0.0, 0.055 if style != 2 else 0.14, TAIL, VEHICLE)
    s.patch(rear, 0.0, 1.0, -0.14, 0.0, DARK)
    if wheels:
        s.wheels(half, (-0.5, 0.6), 0.48)
    return s.shape()


def bus_piece(length=2.4, width=2.5, height=3.05, wheel=False, door=False) -> Shape:
    """A slice of a bus.

    Its end faces are those of a whole bus; they show where no other slice hides them.
    """
    s = Sketch()
    half = width / 2
    r = -length / 2
    f = length / 2
    rear, right, nose, left = s.prism((half, r, f), (half * 0.98, r, f), 0.32, height, BODY)
    for side in (right, left):
        s.patch(side, 0.0, 1.0, 0.40, 0.84, GLASS)
        s.patch(side, 0.0, 0.035, 0.40, 0.84, DARK)
        s.patch(side, 0.0, 1.0, 0.27, 0.33, TRIM)
        s.patch(side, 0.0, 1.0, 0.0, 0.06, DARK)
    if door:
        for u in (0.2, 0.52):
            s.patch(right, u, u + 0.29, 0.03, 0.84, GLASS)
    s.patch(nose, 0.04, 0.96, 0.30, 0.80, GLASS)
    s.patch(nose, 0.12, 0.88, 0.83, 0.95, DARK)
    s.patch(nose, 0.22, 0.78, 0.86, 0.93, AMBER, SIGNAL)
    s.patch(nose, 0, 1, 0, 0.08, DARK)
    s.patch(rear, 0.10, 0.90, 0.55, 0.86, GLASS)
    s.patch(rear, 0.15, 0.85, 0.10, 0.38, TRIM)
    for u in (0.03, 0.84):
        s.patch(nose, u, u + 0.13, 0.10, 0.19, HEAD, VEHICLE)
        s.patch(rear, u, u + 0.10, 0.12, 0.40, TAIL, VEHICLE)
    if wheel:
        s.wheels(half, (0.0,), 0.5)
    return s.shape()


def train_piece(length=3.0, width=2.7, height=3.7, door=False) -> Shape:
    """A slice of a train or tram: skirt, stripe, windows, gear on the roof, no visible wheels."""
    s = Sketch()
    half = width / 2
    r = -length / 2
    f = length / 2
    rear, right, nose, left = s.prism((half, r, f), (half, r, f), 0.18, height * 0.90, BODY)
    shoulder = s.prism((half, r, f), (half * 0.72, r, f), height * 0.90, height, METAL)
    for side in (right, left):
        s.patch(side, 0, 1, 0, 0.10, DARK)
        s.patch(side, 0, 1, 0.12, 0.36, TRIM)
        s.patch(side, 0, 1, 0.90, 0.96, TRIM)
        s.patch(side, 0.10, 0.90, 0.46, 0.80, GLASS)
        for u in (0.24, 0.51) if door else ():
            s.patch(side, u, u + 0.25, 0.06, 0.88, WHITE)
            s.patch(side, u + 0.05, u + 0.20, 0.34, 0.82, GLASS)
    for end in (nose, rear):
        s.patch(end, 0, 1, 0.10, 0.38, TRIM)
        s.patch(end, 0.08, 0.92, 0.44, 0.82, GLASS)
        s.patch(end, 0.30, 0.70, 0.86, 0.97, DARK)
        s.patch(end, 0, 1, 0, 0.1, DARK)
        for u in (0.06, 0.80):
            s.patch(end, u, u + 0.14, 0.20, 0.29, HEAD if end is nose else TAIL, VEHICLE)
    for side in (shoulder[1], shoulder[3]):
        s.patch(side, 0.2, 0.8, 0.3, 1.0, DARK)
    return s.shape()


def person(stride=0.3, arms=0.15, skirt=False, bag=False, seen_from_behind=False) -> Shape:
    """A pedestrian 1.75 m tall."""
    s = Sketch()
    for side in (-1, 1):
        knee = (side * (0.08 + stride * 0.28), 0.48)
        foot = (side * (0.07 + stride * 0.62), 0.05)
        s.limb((side * 0.09, 0.92), knee, 0.19, 0.15, LEGS)
        s.limb(knee, foot, 0.15, 0.11, LEGS)
        s.limb((foot[0] - 0.05, 0.035), (foot[0] + 0.11, 0.035), 0.09, 0.07, SHOE)
    if skirt:
        s.outline([(-0.17, 1.0), (0.17, 1.0), (0.27, 0.52), (-0.27, 0.52)], TOP)
    for side in (-1, 1):
        elbow = (side * (0.25 + arms * 0.3), 1.14)
        hand = (side * (0.24 + arms * 0.9), 0.88 + arms * 0.25)
        s.limb((side * 0.20, 1.42), elbow, 0.12, 0.10, TOP)
        s.limb(elbow, hand, 0.10, 0.08, TOP)
        s.disc(hand[0], hand[1] - 0.03, 0.05, 0.06, SKIN, 6)
    right = [(0.20, 0.88), (0.19, 1.15), (0.245, 1.40), (0.16, 1.48)]
    left = [(-0.16, 1.48), (-0.245, 1.40), (-0.19, 1.15)]
    s.outline([(-0.20, 0.88), *right, *left], TOP)
    if bag:
        s.outline([(-0.16, 1.05), (0.16, 1.05), (0.17, 1.38), (-0.17, 1.38)], TRIM)
    s.limb((0, 1.45), (0, 1.54), 0.11, 0.10, SKIN)
    s.disc(0, 1.625, 0.105, 0.135, HAIR if seen_from_behind else SKIN, 10)
    fringe = [(-0.115, 1.62), (-0.06, 1.69), (0.06, 1.69), (0.115, 1.62)]
    s.outline([*fringe, (0.09, 1.76), (0, 1.79), (-0.09, 1.76)], HAIR)
    return s.shape()


def bicycle_side() -> Shape:
    """A bicycle from its side; the wheels can be seen through."""
    s = Sketch()
    p = "yz"
    for y in (-0.52, 0.54):
        s.disc(y, 0.36, 0.36, 0.36, TYRE, 16, p)
        s.disc(y, 0.36, 0.29, 0.29, HUB, 14, p, material=BARS)
    s.outline([(-0.52, 0.36), (-0.02, 0.30), (-0.20, 0.82)], TYRE, p, material=BARS)
    rear = (-0.52, 0.36)
    crank = (-0.02, 0.32)
    saddle = (-0.17, 0.78)
    tubes = ((rear, crank), (crank, (-0.20, 0.88)), (rear, saddle), (crank, (0.40, 0.80)))
    for a, b in (*tubes, (saddle, (0.40, 0.84)), ((0.54, 0.36), (0.38, 0.98))):
        s.limb(a, b, 0.075, 0.075, BODY, p)
    s.limb((0.28, 1.02), (0.50, 1.02), 0.07, 0.07, TYRE, p)
    s.limb((-0.34, 0.92), (-0.06, 0.92), 0.10, 0.06, TYRE, p)
    s.disc(0.50, 0.86, 0.05, 0.06, HEAD, 6, p, VEHICLE)
    s.disc(-0.62, 0.72, 0.05, 0.05, TAIL, 6, p, VEHICLE)
    return s.shape()


def bicycle_end(front: bool) -> Shape:
    """A bicycle from its front or rear."""
    s = Sketch()
    s.disc(0, 0.36, 0.055, 0.36, TYRE, 12)
    s.limb((0, 0.4), (0, 1.0), 0.09, 0.08, BODY)
    s.limb((-0.30, 1.02), (0.30, 1.02), 0.06, 0.06, METAL)
    s.limb((-0.17, 0.30), (0.17, 0.26), 0.06, 0.06, DARK)
    s.disc(0, 0.80, 0.06, 0.06, HEAD if front else TAIL, 6, glow=VEHICLE)
    return s.shape()


def cyclist_side(upright=0.3) -> Shape:
    """The rider of a bicycle or motorcycle from the side; `upright` shifts the shoulders back."""
    s = Sketch()
    p = "yz"
    x = 0.22 - 0.25 * upright
    shoulder = (x, 1.46)
    s.limb((-0.18, 0.95), (0.14, 0.72), 0.20, 0.16, LEGS, p)
    s.limb((0.14, 0.72), (-0.02, 0.28), 0.16, 0.11, LEGS, p)
    s.limb((-0.10, 0.22), (0.14, 0.24), 0.10, 0.08, SHOE, p)
    back = [(x + 0.16, 1.46 - 0.06), (x, 1.46 + 0.08), (-0.24, 1.25)]
    s.outline([(-0.32, 0.90), (-0.05, 0.88), *back], TOP, p)
    s.limb(shoulder, (0.30, 1.16), 0.14, 0.11, TOP, p)
    s.limb((0.30, 1.16), (0.44, 1.04), 0.11, 0.08, SKIN, p)
    s.disc(x + 0.13, 1.63, 0.11, 0.13, SKIN, 10, p)
    hair = [(x - 0.02, 1.64), (x + 0.26, 1.68), (x + 0.20, 1.78), (x + 0.08, 1.80)]
    s.outline(hair, HAIR, p)
    return s.shape()


def cyclist_end(front: bool) -> Shape:
    """The rider of a bicycle or motorcycle from the front or rear."""
    s = Sketch()
    for side, knee in ((-1, 0.70), (1, 0.60)):
        s.limb((side * 0.10, 0.95), (side * 0.19, knee), 0.20, 0.16, LEGS)
        s.limb((side * 0.19, knee), (side * 0.13, knee - 0.36), 0.15, 0.11, LEGS)
        s.limb((side * 0.13, knee - 0.40), (side * 0.18, knee - 0.40), 0.10, 0.10, SHOE)
        s.limb((side * 0.20, 1.42), (side * 0.34, 1.18), 0.13, 0.11, TOP)
        s.limb((side * 0.34, 1.18), (side * 0.29, 1.03), 0.11, 0.09, TOP)
    shoulders = [(0.25, 1.40), (0.14, 1.50), (-0.14, 1.50), (-0.25, 1.40)]
    s.outline([(-0.20, 0.86), (0.20, 0.86), *shoulders], TOP)
    s.disc(0, 1.62, 0.11, 0.14, SKIN if front else HAIR, 10)
    s.outline([(-0.13, 1.63), (0.13, 1.63), (0.10, 1.77), (0, 1.81), (-0.10, 1.77)], HAIR)
    return s.shape()


def motorcycle_side() -> Shape:
    """A motorcycle from its side."""
    s = Sketch()
    p = "yz"
    for y in (-0.68, 0.72):
        s.disc(y, 0.33, 0.33, 0.33, TYRE, 14, p)
        s.disc(y, 0.33, 0.18, 0.18, HUB, 10, p)
    s.outline([(-0.45, 0.32), (0.35, 0.28), (0.42, 0.66), (-0.40, 0.70)], DARK, p)
    s.disc(0.02, 0.44, 0.20, 0.17, METAL, 8, p)
    s.limb((-0.95, 0.38), (-0.05, 0.30), 0.14, 0.09, METAL, p)
    s.limb((0.72, 0.33), (0.50, 1.0), 0.10, 0.10, METAL, p)
    bottom = [(-0.98, 0.82), (-0.60, 0.70), (0.02, 0.66), (0.48, 0.70)]
    top = [(0.42, 0.98), (0.10, 1.02), (-0.18, 0.86), (-0.80, 0.94)]
    s.outline(bottom + top, BODY, p)
    s.outline([(-0.82, 0.90), (-0.18, 0.84), (-0.14, 0.92), (-0.70, 1.0)], TYRE, p)
    s.outline([(0.42, 0.72), (0.72, 0.84), (0.60, 1.16), (0.42, 1.06)], BODY, p)
    s.disc(0.70, 0.88, 0.07, 0.10, HEAD, 8, p, VEHICLE)
    s.disc(-0.96, 0.86, 0.05, 0.06, TAIL, 6, p, VEHICLE)
    return s.shape()


def motorcycle_end(front: bool) -> Shape:
    """A motorcycle from its front or rear."""
    s = Sketch()
    s.disc(0, 0.34, 0.11, 0.34, TYRE, 12)
    top = [(0.30, 0.70), (0.20, 1.04), (-0.20, 1.04), (-0.30, 0.70)]
    s.outline([(-0.26, 0.42), (0.26, 0.42), *top], BODY)
    s.outline([(-0.14, 0.40), (0.14, 0.40), (0.16, 0.60), (-0.16, 0.60)], DARK)
    s.limb((-0.38, 1.04), (0.38, 1.04), 0.07, 0.07, DARK)
    for side in (-1, 1):
        s.disc(side * 0.42, 1.14, 0.08, 0.06, DARK, 6)
    s.disc(0, 0.82, 0.13, 0.10, HEAD if front else TAIL, 8, glow=VEHICLE)
    s.outline([(-0.09, 0.62), (0.09, 0.62), (0.09, 0.70), (-0.09, 0.70)], PLATE)
    return s.shape()


def tree(rng: np.random.Generator, kind: int) -> Shape:
    """A broad-leaved tree (0), poplar (1), conifer (2) or bush (3), about 1 m wide and tall."""
    s = Sketch()
    if kind != 3:
        fork = 0.45 if kind != 2 else 0.2
        s.limb((0, -0.01), (0, fork), 0.055, 0.04, TRIM)
        if kind == 0:
            s.limb((0, 0.28), (-0.16, 0.55), 0.03, 0.02, TRIM)
            s.limb((0, 0.30), (0.15, 0.58), 0.03, 0.02, TRIM)
    if kind == 2:
        for z, r in ((0.12, 0.34), (0.36, 0.27), (0.60, 0.18)):
            xs = np.linspace(-r, r, 9)
            jag = [(x, z + 0.05 * (i % 2) + 0.02 * rng.standard_normal()) for i, x in enumerate(xs)]
            top = [(r * 0.3, z + 0.27), (0, z + 0.40), (-r * 0.3, z + 0.27)]
            s.outline([*jag, *top], LEAF, material=FOLIAGE)
        return s.shape()
    blobs = {
        0: [
            (0, 0.66, 0.36, 0.30), (-0.22, 0.58, 0.24, 0.2), (0.23, 0.60, 0.24, 0.2),
            (-0.1, 0.80, 0.24, 0.19), (0.13, 0.78, 0.24, 0.2),
        ],
        1: [(0, 0.45, 0.20, 0.30), (0, 0.65, 0.20, 0.30), (0.02, 0.80, 0.13, 0.19)],
        3: [(-0.2, 0.34, 0.30, 0.36), (0.22, 0.36, 0.28, 0.38), (0, 0.55, 0.32, 0.42)],
    }[kind]  # fmt: skip
    for i, (x, z, rx, rz) in enumerate(blobs):
        n = 28
        angle = np.arange(n) * (2 * np.pi / n)
        r = 1 + 0.09 * np.repeat(rng.standard_normal(n // 4), 4) + 0.07 * rng.standard_normal(n)
        height = np.maximum(z + rz * r * np.sin(angle), 0.0)
        points = np.stack([x + rx * r * np.cos(angle), height], 1)
        s.outline(points, LEAF if i % 2 == 0 else TOP, material=FOLIAGE)
    return s.shape()


def lamp_head(reach: float, height: float) -> Shape:
    """Arm and head of a street lamp on a pole at x = 0; `reach` is signed."""
    s = Sketch()
    s.limb((0, height - 0.25), (reach * 0.5, height + 0.12), 0.13, 0.11, METAL)
    s.limb((reach * 0.5, height + 0.12), (reach, height + 0.15), 0.11, 0.10, METAL)
    case = ((0.72, 0.10), (1.15, 0.10), (1.12, 0.26), (0.75, 0.26))
    s.outline([(reach * x, height + z) for x, z in case], METAL)
    bulb = ((0.76, 0.06), (1.10, 0.06), (1.10, 0.13), (0.76, 0.13))
    s.outline([(reach * x, height + z) for x, z in bulb], HEAD, glow=LAMP)
    return s.shape()


def bar(points, width: float, slot=METAL) -> Shape:
    """A bent bar through points (x, z): poles, masts and their arms."""
    s = Sketch()
    for a, b in pairwise(points):
        s.limb(a, b, width, width * 0.85, slot)
    return s.shape()


def traffic_light(lit: int, board: bool) -> Shape:
    """A traffic light of three lamps, 1.05 m tall from z = 0, perhaps on a backing board.

    `lit` is the lamp that shines: 0 red, 1 amber, 2 green.
    """
    s = Sketch()
    if board:
        s.outline([(-0.32, -0.10), (0.32, -0.10), (0.32, 1.15), (-0.32, 1.15)], WHITE)
        s.outline([(-0.28, -0.06), (0.28, -0.06), (0.28, 1.11), (-0.28, 1.11)], DARK)
    s.outline([(-0.20, 0), (0.20, 0), (0.20, 1.05), (-0.20, 1.05)], TRIM)
    for i, slot in enumerate((RED, AMBER, GREEN)):
        z = 0.88 - 0.35 * i
        if i == lit:
            s.disc(0, z, 0.15, 0.15, slot, 10, glow=SIGNAL)
        else:
            s.disc(0, z, 0.15, 0.15, DARK, 10)
    return s.shape()


def sign(kind: int) -> Shape:
    """A sign about 0.8 m wide, centred at z = 0; its own colours are slots."""
    s = Sketch()
    if kind == 0:  # prohibition
        s.disc(0, 0, 0.42, 0.42, RED, 14)
        s.disc(0, 0, 0.30, 0.30, WHITE, 14)
        s.limb((-0.12, 0), (0.12, 0), 0.2, 0.2, DARK)
    elif kind == 1:  # danger
        s.outline([(-0.50, -0.40), (0.50, -0.40), (0, 0.46)], RED)
        s.outline([(-0.32, -0.30), (0.32, -0.30), (0, 0.26)], WHITE)
        s.limb((0, -0.22), (0, 0.08), 0.09, 0.07, DARK)
    elif kind == 2:  # instruction
        s.disc(0, 0, 0.42, 0.42, WHITE, 14)
        s.disc(0, 0, 0.39, 0.39, TOP, 14)
        s.limb((0, -0.22), (0, 0.16), 0.10, 0.10, WHITE)
        s.outline([(-0.16, 0.08), (0.16, 0.08), (0, 0.28)], WHITE)
    elif kind == 3:  # stop
        s.disc(0, 0, 0.45, 0.45, WHITE, 8)
        s.disc(0, 0, 0.41, 0.41, RED, 8)
        s.limb((-0.28, 0), (0.28, 0), 0.16, 0.16, WHITE)
    elif kind == 4:  # priority road
        s.outline([(0, -0.48), (0.48, 0), (0, 0.48), (-0.48, 0)], WHITE)
        s.outline([(0, -0.34), (0.34, 0), (0, 0.34), (-0.34, 0)], AMBER)
    elif kind == 5:  # parking
        s.outline([(-0.36, -0.46), (0.36, -0.46), (0.36, 0.46), (-0.36, 0.46)], WHITE)
        s.outline([(-0.33, -0.43), (0.33, -0.43), (0.33, 0.43), (-0.33, 0.43)], TOP)
        s.limb((-0.12, -0.28), (-0.12, 0.28), 0.10, 0.10, WHITE)
        s.disc(0.02, 0.12, 0.15, 0.16, WHITE, 8)
    else:  # directions: one or three lines of lettering and an arrow, 2.6 m wide
        s.outline([(-1.3, -0.65), (1.3, -0.65), (1.3, 0.65), (-1.3, 0.65)], WHITE)
        s.outline([(-1.25, -0.60), (1.25, -0.60), (1.25, 0.60), (-1.25, 0.60)], TOP)
        for z in (0.32, 0.0, -0.32):
            s.limb((-1.0, z), (0.35 + 0.3 * np.cos(z * 9), z), 0.15, 0.15, WHITE)
        s.limb((0.95, -0.40), (0.95, 0.2), 0.12, 0.12, WHITE)
        s.outline([(0.75, 0.15), (1.15, 0.15), (0.95, 0.45)], WHITE)
    return s.shape()


@lru_cache(1)
def models() -> dict[str, list]:
    """All shapes by kind, made once; several of a kind for variety."""
    rng = np.random.default_rng(7)
    cars = [
        car(),
        car(3.9, 1.70, 1.50, 0.22, 0.02),
        car(4.6, 1.82, 1.44, 0.27, 0.20),
        car(4.5, 1.88, 1.72, 0.23, 0.02, 0.58),
        car(4.7, 1.80, 1.46, 0.25, 0.0, 0.60),
        car(4.9, 1.95, 2.0, 0.14, 0.0, 0.52),
    ]
    people = [
        person(0.1, 0.05),
        person(0.5, 0.2),
        person(0.35, 0.1, bag=True, seen_from_behind=True),
        person(0.2, 0.1, skirt=True),
        person(0.6, 0.25, seen_from_behind=True),
        person(0.3, 0.15, skirt=True, seen_from_behind=True),
        person(0.05, 0.0, bag=True, seen_from_behind=True),
        person(0.45, 0.1, seen_from_behind=True),
    ]
    return {
        "car": cars,
        "person": people,
        "tree": [tree(rng, kind) for kind in (0, 0, 0, 0, 0, 0, 1, 1, 2, 2)],
        "bush": [tree(rng, 3) for _ in range(4)],
        "sign": [sign(k) for k in range(7)],
        "light": [traffic_light(k, board) for k in range(3) for board in (False, True)],
        "cab": [lorry_cab()],
        "load": [lorry_load(style=k) for k in range(3)],
        "bus": [bus_piece(), bus_piece(wheel=True), bus_piece(door=True)],
        "train": [train_piece(), train_piece(door=True)],
        "bicycle": [bicycle_side(), bicycle_end(True), bicycle_end(False)],
        "motorcycle": [motorcycle_side(), motorcycle_end(True), motorcycle_end(False)],
        "rider": [cyclist_side(0.2), cyclist_end(True), cyclist_end(False), cyclist_side(1.0)],
    }
