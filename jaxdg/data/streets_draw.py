"""Pictures from polygons: camera, painter's algorithm and light of the generated streets (`streets.py` makes the worlds).

Every polygon is drawn once, far to near, into a map of surface ids. All else is looked up from that map: label, object, depth (the inverse
depth of a plane is affine in the pixel) and colour, so that labels and depth are exact by construction and an appearance is only light.
Units are metres and radians; world axes are x right, y ahead, z up with the ground at z = 0; colours are RGB in 0..1.
"""

from dataclasses import dataclass, field
from functools import lru_cache
import math
from typing import NamedTuple

import cv2
import numpy as np

PLAIN, GROUND, PAVING, FOLIAGE, FACADE, BRICK, BARS = range(7)  # materials; GROUND and PAVING lie flat
NO_GLOW, SIGNAL, VEHICLE, LAMP = range(4)  # what shines: traffic lights always, vehicles in bad light, street lamps and windows in the dark
SKY = 10  # train id of what no polygon covers
NEAR = 0.3  # polygons are cut at this depth
CULLED = 1  # flag of a polygon seen from its front only (counter-clockwise)


@dataclass(frozen=True)
class Camera:
    """A pinhole camera without roll.

    Attributes:
        size: height and width of the picture in pixels.
        focal: focal length in pixels.
        position: x, y, z in metres.
        yaw: heading, clockwise from +y.
        pitch: upwards positive.
    """

    size: tuple[int, int]
    focal: float
    position: tuple[float, float, float]
    yaw: float = 0.0
    pitch: float = 0.0

    def axes(self) -> np.ndarray:
        """Rows: right, down, forward in world axes, float32 [3, 3]."""
        (sy, cy), (sp, cp) = (np.sin(self.yaw), np.cos(self.yaw)), (np.sin(self.pitch), np.cos(self.pitch))
        return np.array([[cy, -sy, 0], [sy * sp, cy * sp, -cp], [sy * cp, cy * cp, sp]], np.float32)

    def view(self, points: np.ndarray) -> np.ndarray:
        """World points [n, 3] in camera axes (right, down, forward)."""
        return (points - np.array(self.position, np.float32)) @ self.axes().T

    def pixels(self, view: np.ndarray) -> np.ndarray:
        """Camera points [n, 3] with positive depth to pixel coordinates [n, 2] (column, row); pixel centres are whole numbers."""
        h, w = self.size
        return view[:, :2] / view[:, 2:] * self.focal + np.array([(w - 1) / 2, (h - 1) / 2], np.float32)

    def rays(self) -> tuple[np.ndarray, np.ndarray]:
        """Right and down components of each pixel's ray with forward 1, each float32 [h * w]."""
        h, w = self.size
        x, y = (np.arange(w, dtype=np.float32) - (w - 1) / 2) / self.focal, (np.arange(h, dtype=np.float32) - (h - 1) / 2) / self.focal
        return np.tile(x, h), np.repeat(y, w)


class Shape(NamedTuple):
    """Polygons of one kind of object in its own axes, drawn in order; `slots` index the palette the object is painted with."""

    vertices: np.ndarray  # float32 [v, 3]
    sizes: np.ndarray  # int [p] vertices a polygon
    slots: np.ndarray  # int [p]
    table: np.ndarray  # float32 [p, 9]: colour 3 (from the palette), noise amplitude, noise scale in texels a metre, parameters 4
    kinds: np.ndarray  # int32 [p, 3]: material, glow, flags


class Group(NamedTuple):
    """Polygons that are painted together; larger keys are painted earlier, equal keys in order of addition."""

    key: float
    label: int
    object: int  # number of the object they belong to, 0 for none
    vertices: np.ndarray
    sizes: np.ndarray
    table: np.ndarray
    kinds: np.ndarray


ONE = [np.array([k]) for k in range(100)]  # sizes of groups of one polygon


@dataclass
class Mesh:
    """All polygons of one world, and the shadows on its ground."""

    groups: list[Group] = field(default_factory=list)
    shadows: list[list] = field(default_factory=list)  # cast by the sun: ground outlines of four corners (x, y, 0)
    contacts: list[list] = field(default_factory=list)  # below objects, in any light
    lamps: list[tuple[float, float, float]] = field(default_factory=list)  # street lamps that light the night
    objects: list[int] = field(default_factory=list)  # label of object i + 1

    def object(self, label: int) -> int:
        """Opens an object with a box of its own and returns its number, from 1."""
        self.objects.append(label)
        return len(self.objects)

    def polygon(self, vertices, color, label: int, key: float, material=PLAIN, noise=(0.06, 8.0), params=(0, 0, 0, 0), flags=0):
        """Adds one polygon [k, 3] of its own colour."""
        table, kinds = np.array([[*color, *noise, *params]], np.float32), np.array([[material, NO_GLOW, flags]], np.int32)
        vertices = np.array(vertices, np.float32)
        self.groups.append(Group(key, label, 0, vertices, ONE[len(vertices)], table, kinds))

    def place(self, shape: Shape, palette: np.ndarray, at, heading: float, label: int, key: float, obj=0, scale=(1.0, 1.0, 1.0), z=0.0):
        """Adds a shape at ground position `at`, turned clockwise from +y by `heading`, painted with `palette` [slots, 3]."""
        s, c = math.sin(heading), math.cos(heading)
        turn = np.array([[c * scale[0], -s * scale[0], 0], [s * scale[1], c * scale[1], 0], [0, 0, scale[2]]], np.float32)
        vertices = shape.vertices @ turn
        vertices += np.array([at[0], at[1], z], np.float32)
        table = shape.table.copy()
        table[:, :3] = palette.take(shape.slots, 0)
        self.groups.append(Group(key, label, obj, vertices, shape.sizes, table, shape.kinds))


@dataclass(frozen=True)
class Raster:
    """What the painter leaves: surface ids and, a row a surface (row 0 is the sky), what a pixel of it is."""

    ids: np.ndarray  # int32 [h, w]
    under: np.ndarray  # int32 [h, w]: the surface behind a see-through one
    plane: np.ndarray  # float32 [n, 3]: inverse depth = plane . (x, y, 1) of a ray
    normal: np.ndarray  # float32 [n, 3] world, towards the camera
    along: np.ndarray  # float32 [n, 3]: horizontal texture axis x, y and its origin
    label: np.ndarray  # int32 [n]
    object: np.ndarray  # int32 [n]
    table: np.ndarray  # as Shape
    kinds: np.ndarray  # as Shape


def rasterize(mesh: Mesh, camera: Camera) -> Raster:
    """Paints the mesh far to near into a map of surface ids."""
    groups = sorted(mesh.groups, key=lambda g: -g.key)  # stable, so the order inside equal keys holds
    vertices, sizes = np.concatenate([g.vertices for g in groups]), np.concatenate([g.sizes for g in groups])
    table = np.concatenate([np.zeros((1, 9), np.float32), *(g.table for g in groups)])
    kinds = np.concatenate([np.zeros((1, 3), np.int32), *(g.kinds for g in groups)])
    counts = [1, *(len(g.sizes) for g in groups)]
    label = np.repeat(np.array([SKY, *(g.label for g in groups)], np.int32), counts)
    owner = np.repeat(np.array([0, *(g.object for g in groups)], np.int32), counts)
    ends = np.cumsum(sizes)
    starts = ends - sizes
    view = camera.view(vertices)
    following = np.arange(1, len(vertices) + 1)
    following[ends - 1] = starts
    a, b = view - np.repeat(view[starts], sizes, 0), view[following] - np.repeat(view[starts], sizes, 0)
    newell = np.stack(
        [a[:, 1] * b[:, 2] - a[:, 2] * b[:, 1], a[:, 2] * b[:, 0] - a[:, 0] * b[:, 2], a[:, 0] * b[:, 1] - a[:, 1] * b[:, 0]], 1
    )
    normal = np.add.reduceat(newell, starts)
    normal /= np.linalg.norm(normal, axis=1, keepdims=True) + 1e-9
    offset = (normal * view[starts]).sum(1)
    depth_min, depth_max = np.minimum.reduceat(view[:, 2], starts), np.maximum.reduceat(view[:, 2], starts)
    pixels = camera.pixels(np.maximum(view, [-1e9, -1e9, NEAR])).clip(-20000, 20000)
    low, high = np.minimum.reduceat(pixels, starts), np.maximum.reduceat(pixels, starts)
    h, w = camera.size
    cut = depth_min < NEAR
    outside = (low > [w, h]).any(1) | (high < -1).any(1)
    speck = (high - low < 1).all(1)
    skip = (depth_max < NEAR) | (~cut & (outside | speck)) | ((kinds[1:, 2] == CULLED) & (offset > 0))
    fixed = np.round(pixels * 16).astype(np.int32)
    ids, under = np.zeros((h, w), np.int32), np.zeros((h, w), np.int32)
    sheer = (kinds[1:, 0] == BARS).tolist()
    first, last, cut = starts.tolist(), ends.tolist(), cut.tolist()
    for i in np.flatnonzero(~skip).tolist():
        outline = fixed[first[i] : last[i]]
        if cut[i]:
            outline = np.round(camera.pixels(_cut(view[first[i] : last[i]])).clip(-20000, 20000) * 16).astype(np.int32)
        if sheer[i]:  # remember what stands behind
            (x0, y0), (x1, y1) = np.maximum(outline.min(0) // 16 - 1, 0), np.maximum(outline.max(0) // 16 + 2, 0)
            before = ids[y0:y1, x0:x1].copy()
            cv2.fillPoly(ids, [outline], i + 1, shift=4)
            new = ids[y0:y1, x0:x1] == i + 1
            under[y0:y1, x0:x1][new] = before[new]
        else:
            cv2.fillPoly(ids, [outline], i + 1, shift=4)
    axes = camera.axes()
    plane = normal / np.where(np.abs(offset) < 1e-6, 1e-6, offset)[:, None]
    world_normal = -np.sign(offset)[:, None] * normal @ axes
    edge = (vertices[starts + 1] - vertices[starts])[:, :2]
    edge = edge / (np.linalg.norm(edge, axis=1, keepdims=True) + 1e-9)
    along = np.concatenate([edge, (edge * vertices[starts, :2]).sum(1, keepdims=True)], 1)
    pad = lambda x: np.concatenate([np.zeros((1, 3), np.float32), x]).astype(np.float32)
    return Raster(ids, under, pad(plane), pad(world_normal), pad(along), label, owner, table, kinds)


def _cut(polygon: np.ndarray) -> np.ndarray:
    """The part of a polygon [k, 3] in camera axes that lies beyond the near plane."""
    kept = []
    for p, q in zip(polygon, np.roll(polygon, -1, 0), strict=True):
        if p[2] >= NEAR:
            kept.append(p)
        if (p[2] >= NEAR) != (q[2] >= NEAR):
            kept.append(p + (q - p) * ((NEAR - p[2]) / (q[2] - p[2])))
    return np.array(kept, np.float32)


@lru_cache(1)
def tiles() -> tuple[np.ndarray, np.ndarray]:
    """Fixed noise: two periodic 256 x 256 clouds of several octaves (about -1..1), a soft and a crisp one, and a long line of white noise."""
    rng = np.random.default_rng(19)
    clouds = []
    for fall in (0.45, 0.12):
        cloud = np.zeros((256, 256), np.float32)
        for n in (4, 8, 16, 32, 64, 128, 256):
            coarse = np.pad(rng.standard_normal((n, n)).astype(np.float32), 2, mode="wrap")
            k = 256 // n
            cloud += cv2.resize(coarse, None, fx=k, fy=k, interpolation=cv2.INTER_CUBIC)[2 * k : -2 * k, 2 * k : -2 * k] * n**-fall
        clouds.append(cloud.ravel() / cloud.std() * 0.5)
    return np.concatenate(clouds), rng.standard_normal(1 << 20).astype(np.float32)


def _noise(u: np.ndarray, v: np.ndarray, crisp=False) -> np.ndarray:
    """The periodic cloud at texture coordinates in texels."""
    at = ((v.astype(np.int32) & 255) << 8) | (u.astype(np.int32) & 255)
    return tiles()[0].take(at + 65536 * np.asarray(crisp, np.int32))


def _smooth_noise(u: np.ndarray, v: np.ndarray) -> np.ndarray:
    """As `_noise`, interpolated between texels; for what is seen from near or grown large."""
    n = len(u)
    u, v = (np.resize(np.mod(c, 256), (n + 511) // 512 * 512).reshape(-1, 512) for c in (u, v))
    tile = tiles()[0][:65536].reshape(256, 256)
    return cv2.remap(tile, u, v, cv2.INTER_LINEAR, borderMode=cv2.BORDER_WRAP).ravel()[:n] if n else u.ravel()


def _fraction(x: np.ndarray) -> np.ndarray:
    return x - np.floor(x)


def _hash(*values: np.ndarray) -> np.ndarray:
    """Uniform 0..1 from whole-numbered arrays, the same for equal values."""
    x = sum(v.astype(np.uint32) * np.uint32(k) for v, k in zip(values, (0x9E3779B1, 0x85EBCA77, 0xC2B2AE3D), strict=False))
    x = (x ^ (x >> np.uint32(15))) * np.uint32(0x2C1B3C6D)  # type: ignore[operator]
    return ((x ^ (x >> np.uint32(12))) & np.uint32(0xFFFF)).astype(np.float32) / 65536


class Pixels(NamedTuple):
    """Appearance-free facts of each pixel, all flat [h * w]."""

    ids: np.ndarray  # seen surface: behind a fence's bars the one behind
    depth: np.ndarray
    x: np.ndarray  # world
    y: np.ndarray
    z: np.ndarray
    color: np.ndarray  # [n, 3] painted, unlit
    shine: np.ndarray  # [n, 3] light given off by lit windows and lamps when all are on


def paint(raster: Raster, camera: Camera) -> Pixels:
    """Depth, world position and unlit colour of every pixel."""
    rx, ry = camera.rays()
    axes = camera.axes()
    ids = raster.ids.ravel()
    sheer = np.flatnonzero(raster.kinds[:, 0].take(ids) == BARS)
    if len(sheer):
        ids = ids.copy()
        u, v, _, p = _texture(raster, camera, axes, ids[sheer], rx[sheer], ry[sheer])[:4]
        bars = (_fraction(u / p[:, 0]) < p[:, 1]) | (_fraction(v / p[:, 2] + 0.5) < p[:, 3])
        ids[sheer] = np.where(bars, ids[sheer], raster.under.ravel()[sheer])
    u, v, depth, params, x, y, z = _texture(raster, camera, axes, ids, rx, ry)
    table, kinds = raster.table, raster.kinds
    material = kinds[:, 0].take(ids)
    flat, leafy = (material == GROUND) | (material == PAVING), material == FOLIAGE
    amplitude, scale = table[:, 3].take(ids), table[:, 4].take(ids)
    fine = np.clip(2.2 - depth * scale * (0.6 / camera.focal), 0.15, 1)  # texels smaller than a pixel fade into their mean
    grain = _noise(np.where(flat, x, u + ids * np.float32(0.37)) * scale, np.where(flat, y, z) * scale, leafy)
    color = table[:, :3].take(ids, 0) * (1 + amplitude * grain * np.where(leafy, 1, fine))[:, None]
    shine = np.where((kinds[:, 1] > 0).take(ids)[:, None], color, np.float32(0))
    _facades(np.flatnonzero(material == FACADE), u, v, params, depth, camera, color, shine)
    paved = np.flatnonzero(material == PAVING)
    joint = (_fraction(x[paved] / params[paved, 0]) < 0.07) | (_fraction(y[paved] / params[paved, 0]) < 0.07)
    color[paved] *= (1 - 0.2 * joint * np.clip(1.5 - depth[paved] * (10 / camera.focal), 0, 1))[:, None]
    brick = np.flatnonzero(material == BRICK)
    row = v[brick] / 0.25
    joint = (_fraction(row) < 0.16) | (_fraction(u[brick] / 0.5 + np.floor(row) * 0.5) < 0.08)
    color[brick] *= (1 - 0.28 * (joint & (depth[brick] < 0.08 * camera.focal)))[:, None]
    return Pixels(ids, depth, x, y, z, color, shine)


def _texture(raster, camera, axes, ids, rx, ry):
    """Texture coordinates in metres, depth, parameters and world position of the pixels with these surfaces and rays."""
    plane = raster.plane.take(ids, 0)
    depth = 1 / np.maximum(plane[:, 0] * rx + plane[:, 1] * ry + plane[:, 2], 1e-3)
    x, y, z = (camera.position[k] + depth * (axes[0, k] * rx + axes[1, k] * ry + axes[2, k]) for k in range(3))
    along = raster.along.take(ids, 0)
    return x * along[:, 0] + y * along[:, 1] - along[:, 2], z, depth, raster.table[:, 5:9].take(ids, 0), x, y, z


def _facades(at, u, v, params, depth, camera, color, shine):
    """Windows, shop fronts and cornices, in place; parameters: window pitch, floor height, seed, style (the whole part is the kind of house)."""
    u, v, p = u[at], v[at], params[at]
    seed, shop = np.floor(p[:, 2] * 997), p[:, 3] >= 1
    column, level = np.floor(u / p[:, 0]), np.floor(v / p[:, 1])
    fu, fv = u / p[:, 0] - column, v / p[:, 1] - level
    pick = _hash(column + 64, level + 64, seed)
    half = 0.20 + 0.22 * _fraction(p[:, 2] * 7)  # half a window's share of the pitch
    top = 0.78 + 0.12 * _fraction(p[:, 2] * 13)
    bottom = np.where(_fraction(p[:, 3]) > 0.7, 0.08, 0.30)  # some have French windows
    front = shop & (level == 0)
    half, bottom, top = np.where(front, 0.44, half), np.where(front, 0.10, bottom), np.where(front, 0.72, top)
    inside = (np.abs(fu - 0.5) < half) & (fv > bottom) & (fv < top) & (level >= 0)
    border = 0.045 + 0.25 * depth[at] / camera.focal
    frame = inside & ((np.abs(np.abs(fu - 0.5) - half) < border) | (np.abs(fv - top) < border * 0.7) | (np.abs(fu - 0.5) < border * 0.3))
    glass = (0.10 + 0.26 * pick**2 + 0.22 * fv * pick)[:, None] * np.array([0.95, 1.0, 1.08], np.float32)
    glass = np.where((pick > 0.86)[:, None], np.array([0.62, 0.58, 0.5], np.float32), glass)  # blinds
    wall = color[at] * (1 - 0.10 * (fv < 0.05) - 0.06 * (fv > 0.97) - 0.10 * (front & ~inside))[:, None]
    light_frame = np.where(np.mod(seed, 3) == 0, 0.25, 0.8)[:, None] * np.ones(3, np.float32)
    board = front & (fv > 0.77) & (fv < 0.95)
    hue = _hash(np.floor(column / 3), seed)[:, None] * 6.28 + np.array([0, 2.1, 4.2], np.float32)
    wall = np.where(board[:, None], 0.42 + 0.32 * np.sin(hue), wall)
    color[at] = np.where(frame[:, None], light_frame, np.where(inside[:, None], glass, wall))
    lit = (inside & ~frame & (pick < np.where(front, 0.75, 0.30))) | (board & (pick < 0.5))
    tone = np.stack([np.ones_like(pick), 0.72 + 0.25 * _fraction(pick * 31), 0.40 + 0.5 * _fraction(pick * 57)], 1)
    shine[at] = np.where(lit[:, None], tone * (0.45 + 0.5 * _fraction(pick * 91))[:, None], 0)


def shadow_mask(outlines: list[list], camera: Camera, blur: float) -> np.ndarray:
    """Four-cornered shadows on the ground, float32 [h * w] in 0..1; `blur` in shares of the picture's height."""
    mask = np.zeros(camera.size, np.uint8)
    if outlines:
        view = camera.view(np.array(outlines, np.float32).reshape(-1, 3)).reshape(-1, 4, 3)
        low, high = view[..., 2].min(1), view[..., 2].max(1)
        pixels = camera.pixels(np.maximum(view, [-1e9, -1e9, NEAR]).reshape(-1, 3)).clip(-20000, 20000)
        fixed = np.round(pixels * 16).astype(np.int32).reshape(-1, 4, 2)
        for i in np.flatnonzero(low >= NEAR).tolist():
            cv2.fillConvexPoly(mask, fixed[i], 255, shift=4)
        for i in np.flatnonzero((low < NEAR) & (high > NEAR)).tolist():
            cv2.fillPoly(mask, [np.round(camera.pixels(_cut(view[i])).clip(-20000, 20000) * 16).astype(np.int32)], 255, shift=4)
    return cv2.GaussianBlur(mask, (0, 0), max(0.6, blur * camera.size[0])).ravel() * np.float32(1 / 255)


class Look(NamedTuple):
    """Light and weather. Colours are RGB; radiance 1 is white before exposure."""

    ambient: np.ndarray
    sun: np.ndarray  # radiance of a surface that faces it
    direction: np.ndarray  # towards the sun
    zenith: np.ndarray
    horizon: np.ndarray  # also what haze fades to
    clouds: float
    cloud: np.ndarray
    haze: float  # extinction, 1/m
    glow: tuple[float, float, float, float]  # by kind: windows, signals, vehicles, street lamps
    beam: float = 0.0  # the camera car's headlights
    wet: float = 0.0
    rain: float = 0.0
    bloom: float = 0.0
    noise: float = 0.012
    exposure: float = 1.0


def sun_direction(a: float, b: float) -> np.ndarray:
    """Towards the sun, anywhere between 17 and 66 degrees above the horizon, from two numbers in 0..1."""
    azimuth, height = 2 * np.pi * a, 0.3 + 0.85 * b
    return np.array([np.sin(azimuth) * np.cos(height), np.cos(azimuth) * np.cos(height), np.sin(height)], np.float32)


def look(appearance: str, direction: np.ndarray, rng: np.random.Generator) -> Look:
    """Draws the light and weather of an appearance."""
    r, rgb = rng.uniform, lambda *c: np.array(c, np.float32)
    if appearance == "clear":
        low, veil = (
            float(np.clip(1.2 - direction[2] * 1.5, 0, 1)),
            float(r(0, 1) ** 3),
        )  # a low sun is warm, a veiled one casts weak shadows
        sun = rgb(1.0, 0.94 - 0.2 * low, 0.84 - 0.42 * low) * (1 - 0.8 * veil) * r(0.62, 0.82)
        zenith = rgb(0.22, 0.43, 0.80) * (1 - veil) + rgb(0.66, 0.69, 0.74) * veil
        horizon = rgb(0.70 + 0.22 * low, 0.79, 0.90 - 0.22 * low) * (1 - veil) + rgb(0.84, 0.85, 0.86) * veil
        ambient = rgb(0.50, 0.53, 0.60) * (1 + 0.45 * veil)
        return Look(ambient, sun, direction, zenith, horizon, r(0, 0.9), rgb(0.95, 0.95, 0.97) - 0.1 * low, r(0.0008, 0.004), (0, 0.9, 0.05, 0),
                    bloom=0.1, noise=r(0.008, 0.02), exposure=r(0.92, 1.3))  # fmt: skip
    if appearance == "night":
        moon, warm = r(0.6, 1.3), r(0, 1)
        return Look(rgb(0.055, 0.065, 0.115) * moon, rgb(0, 0, 0), direction, rgb(0.010, 0.014, 0.040) * moon, rgb(0.12, 0.085, 0.07) * (0.4 + warm),
                    r(0, 0.8), rgb(0.10, 0.08, 0.08), 0.004, (0.95, 1.1, 1.25, 1.4), beam=r(0.5, 1.0), bloom=0.8, noise=r(0.03, 0.05), exposure=r(0.9, 1.25))  # fmt: skip
    if appearance == "rain":
        grey = r(0.52, 0.68)
        return Look(rgb(0.96, 1.0, 1.06) * grey * 0.92, rgb(0, 0, 0), direction, rgb(0.92, 0.97, 1.04) * grey * 0.82, rgb(1, 1.02, 1.05) * grey * 1.05, 0.9,
                    rgb(0.9, 0.95, 1.0) * grey * 0.62, r(0.012, 0.02), (0.30, 0.8, 0.8, 0.1), wet=r(0.6, 0.9), rain=r(0.6, 1.0), bloom=0.35, noise=0.02)  # fmt: skip
    if appearance == "fog":
        white = r(0.70, 0.84)
        air = rgb(0.99, 1.0, 1.01) * white
        return Look(air * 0.9, rgb(0, 0, 0), direction, air, air, 0.0, air, r(0.045, 0.085), (0.25, 0.8, 0.8, 0.3), bloom=0.5, noise=0.014)
    warm = r(0, 1)  # dusk_rain
    return Look(rgb(0.21, 0.185, 0.26), rgb(0, 0, 0), direction, rgb(0.10, 0.10, 0.22), rgb(0.40 + 0.22 * warm, 0.27, 0.34 - 0.10 * warm), 0.9,
                rgb(0.13, 0.11, 0.20), r(0.010, 0.016), (0.75, 1.1, 1.25, 1.2), beam=r(0.25, 0.5), wet=r(0.75, 1.0), rain=r(0.5, 0.9), bloom=0.9,
                noise=r(0.022, 0.035), exposure=r(0.95, 1.2))  # fmt: skip


def develop(pixels: Pixels, raster: Raster, mesh: Mesh, camera: Camera, look: Look, rng: np.random.Generator) -> np.ndarray:
    """Lights the painted pixels, adds the weather and exposes the picture, uint8 [h, w, 3]."""
    h, w = camera.size
    flat = np.isin(raster.kinds[:, 0], (GROUND, PAVING)).take(pixels.ids)
    sky = np.flatnonzero(pixels.ids == 0)
    image = pixels.color * _light(pixels, raster, mesh, camera, look, flat)
    shine = pixels.shine * np.array(look.glow, np.float32)[raster.kinds[:, 1]].take(pixels.ids)[:, None]
    image += shine
    image[sky] = _sky(pixels, camera, look, sky)
    clear = np.exp(-look.haze * pixels.depth)  # Koschmieder: what is left of a colour at this distance
    if look.haze < 0.03:
        clear[sky] = 1  # thin haze is part of the sky's own colour
    image = ((image - look.horizon) * clear[:, None] + look.horizon).reshape(h, w, 3)
    if look.wet:
        image = _reflect(image, pixels, flat.reshape(h, w), look.wet)
    if look.bloom:
        image += _bloom((shine * clear[:, None]).reshape(h, w, 3), look.bloom)
    if look.rain:
        image = _rain(image, look, rng)
    image *= look.exposure * _vignette(h, w)
    image = cv2.GaussianBlur(image, (3, 3), 0.55)
    start = int(rng.integers(0, len(tiles()[1]) - 1)) if look.noise else 0
    image += look.noise * np.take(tiles()[1], np.arange(start, start + h * w * 3), mode="wrap").reshape(h, w, 3)
    return (np.clip(image, 0, 1) * 255 + 0.5).astype(np.uint8)


def _light(pixels, raster, mesh, camera, look, flat):
    """Light that falls on each pixel, [n, 3]."""
    facing = raster.normal @ look.direction
    upright = np.abs(raster.normal[:, 2]) < 0.99
    facing = np.where(
        upright & (raster.kinds[:, 2] != CULLED) & (raster.kinds[:, 0] != FACADE), 0.35 + 0.35 * facing, facing
    )  # rounded things
    light = look.ambient * (0.8 + 0.2 * raster.normal[:, 2:])
    light = light.take(pixels.ids, 0)
    if look.sun.any():
        cast = shadow_mask(mesh.shadows, camera, 0.004)
        light += np.maximum(facing, 0).take(pixels.ids)[:, None] * (1 - cast * flat)[:, None] * look.sun
    light *= (1 - 0.6 * flat * shadow_mask(mesh.contacts, camera, 0.008))[:, None]
    if look.beam:
        rx, ry = camera.rays()
        beam = look.beam * np.exp(-((rx / 0.5) ** 2) - ((ry - 0.12) / 0.22) ** 2) * 22 / (pixels.depth + 8)
        light += beam[:, None] * np.array([1.0, 0.96, 0.85], np.float32)
    if look.glow[LAMP] >= 1:
        pool = np.zeros_like(pixels.depth)
        for x, y, z in sorted(mesh.lamps, key=lambda p: p[1])[:6]:
            pool += 9 / (12 + (pixels.x - x) ** 2 + (pixels.y - y) ** 2 + 0.5 * (pixels.z - z) ** 2)
        light += pool[:, None] * np.array([1.0, 0.72, 0.40], np.float32)
    return light


def _sky(pixels, camera, look, at):
    """Gradient, clouds on a high plane, and the glow round the sun."""
    dx, dy, dz = pixels.x[at] - camera.position[0], pixels.y[at] - camera.position[1], np.maximum(pixels.z[at] - camera.position[2], 0)
    length = np.sqrt(dx**2 + dy**2 + dz**2) + 1e-6
    up = dz / length
    grade = np.clip(up * 1.7, 0, 1)[:, None] ** 0.65
    color = look.horizon * (1 - grade) + look.zenith * grade
    drift = 200 * (look.direction[0] + 1)
    noise = _smooth_noise(dx / (dz + 0.16 * length) * 24 + drift, dy / (dz + 0.16 * length) * 24 + drift)
    cover = np.clip((noise + look.clouds * 1.1 - 0.75) * 1.6, 0, 0.92)[:, None] * np.clip(up * 9, 0, 1)[:, None]
    color = color * (1 - cover) + look.cloud * cover
    if look.sun.any():
        near = np.clip((dx * look.direction[0] + dy * look.direction[1] + dz * look.direction[2]) / length, 0, 1)
        color += (0.25 * near**12 + 0.8 * near**220)[:, None] * look.sun
    return color


def _reflect(image, pixels, flat, wet):
    """Wet ground mirrors, column by column, what stands above it."""
    h, w = flat.shape
    row = np.arange(h, dtype=np.float32)[:, None]
    foot = np.maximum.accumulate(np.where(flat, np.float32(-1), row), 0)
    at = np.flatnonzero(flat)
    x, y, source = pixels.x[at], pixels.y[at], 2 * foot - row
    source.ravel()[at] += _noise(x * 40, y * 40) * (h * 0.012)
    columns = np.repeat(np.arange(w, dtype=np.float32)[None], h, 0)
    mirror = cv2.remap(image, columns, source, cv2.INTER_NEAREST, borderMode=cv2.BORDER_REPLICATE)
    mirror = cv2.blur(mirror, (1, max(1, h // 24))).reshape(-1, 3)[at]
    puddle = np.clip(_noise(x * 6, y * 6) * 0.9 + 0.55, 0.15, 1)
    share = (wet * puddle * np.clip(0.25 + pixels.depth[at] / 45, 0, 0.85))[:, None]
    image.reshape(-1, 3)[at] = image.reshape(-1, 3)[at] * ((1 - 0.3 * wet) * (1 - share)) + mirror * share
    return image


def _bloom(shine, strength):
    """Light scattered in air and lens, from a quarter of the resolution."""
    h, w = shine.shape[:2]
    small = cv2.resize(shine, (max(8, w // 4), max(8, h // 4)), interpolation=cv2.INTER_AREA)
    glow = 0.8 * cv2.GaussianBlur(small, (0, 0), h / 170) + 0.9 * cv2.GaussianBlur(small, (0, 0), h / 45)
    return strength * cv2.resize(glow, (w, h), interpolation=cv2.INTER_LINEAR)


def _rain(image, look, rng):
    """Falling streaks and a few drops on the lens, each showing the scene upside down."""
    h, w = image.shape[:2]
    length, slant = max(5, h // 11), rng.uniform(-0.3, 0.3)
    seeds = (rng.random((h, w), np.float32) > 1 - 0.010 * look.rain).astype(np.float32)
    shear = np.array([[1, slant, -slant * h / 2], [0, 1, 0]], np.float32)
    streaks = cv2.warpAffine(cv2.blur(seeds, (1, length)) * length, shear, (w, h), flags=cv2.INTER_LINEAR, borderMode=cv2.BORDER_REFLECT)
    streaks = np.minimum(streaks, 1)[..., None] * (0.10 + 0.16 * look.rain)
    image += ((look.horizon * 0.8 + 0.25) - image) * streaks
    for x, y, radius in rng.random((int(4 + 7 * look.rain), 3)) * [w, h, 0.028 * h] + [0, 0, 0.014 * h]:
        x0, x1, y0, y1 = max(0, int(x - radius)), min(w, int(x + radius) + 1), max(0, int(y - radius)), min(h, int(y + radius) + 1)
        if x1 - x0 > 2 and y1 - y0 > 2:
            gy, gx = np.mgrid[y0:y1, x0:x1].astype(np.float32)
            soft = np.clip((1 - np.hypot(gx - x, (gy - y) * 0.85) / radius) * 2.5, 0, 0.85)[..., None]
            around = image[max(0, y0 - 3 * (y1 - y0)) : y1 + 3 * (y1 - y0), max(0, x0 - 3 * (x1 - x0)) : x1 + 3 * (x1 - x0)]
            lens = cv2.resize(np.ascontiguousarray(around[::-1, ::-1]), (x1 - x0, y1 - y0), interpolation=cv2.INTER_AREA)
            image[y0:y1, x0:x1] = image[y0:y1, x0:x1] * (1 - soft) + (lens * 0.95 + 0.04) * soft
    return image


@lru_cache(4)
def _vignette(h: int, w: int) -> np.ndarray:
    y, x = np.linspace(-1, 1, h, dtype=np.float32)[:, None], np.linspace(-1, 1, w, dtype=np.float32)[None]
    return (1 - 0.16 * (x**2 + y**2) / 2 * (x**2 + y**2))[..., None]
