"""The camera, painter's algorithm and textures of the generated streets; `light.py` lights them.

Every polygon is drawn once, far to near, into a map of surface ids. Label, object, depth (the
inverse depth of a plane is affine in the pixel) and colour are looked up from that map. So labels
and depth are exact, and an appearance changes only the light. Units are metres and radians. World
axes are x right, y ahead, z up, with the ground at z = 0. Colours are RGB in 0..1.
"""

from dataclasses import dataclass, field
from functools import lru_cache
import math
from typing import NamedTuple

import cv2
import numpy as np

# Materials; GROUND and PAVING lie flat.
PLAIN, GROUND, PAVING, FOLIAGE, FACADE, BRICK, BARS = range(7)
# What shines: traffic lights always, vehicles in bad light, lamps and windows in the dark.
NO_GLOW, SIGNAL, VEHICLE, LAMP = range(4)
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
        sy = np.sin(self.yaw)
        cy = np.cos(self.yaw)
        sp = np.sin(self.pitch)
        cp = np.cos(self.pitch)
        return np.array([[cy, -sy, 0], [sy * sp, cy * sp, -cp], [sy * cp, cy * cp, sp]], np.float32)

    def view(self, points: np.ndarray) -> np.ndarray:
        """World points [n, 3] in camera axes (right, down, forward)."""
        return (points - np.array(self.position, np.float32)) @ self.axes().T

    def pixels(self, view: np.ndarray) -> np.ndarray:
        """Pixel coordinates [n, 2] (column, row) of camera points [n, 3] with positive depth.

        Pixel centres are whole numbers.
        """
        h, w = self.size
        centre = np.array([(w - 1) / 2, (h - 1) / 2], np.float32)
        return view[:, :2] / view[:, 2:] * self.focal + centre

    def rays(self) -> tuple[np.ndarray, np.ndarray]:
        """Right and down components of each pixel's ray with forward 1, each float32 [h * w]."""
        h, w = self.size
        x = (np.arange(w, dtype=np.float32) - (w - 1) / 2) / self.focal
        y = (np.arange(h, dtype=np.float32) - (h - 1) / 2) / self.focal
        return np.tile(x, h), np.repeat(y, w)


class Shape(NamedTuple):
    """Polygons of one kind of object in its own axes, in the order in which they are drawn."""

    vertices: np.ndarray  # float32 [v, 3]
    sizes: np.ndarray  # int [p] vertices a polygon
    slots: np.ndarray  # int [p], index of the palette that the object is painted with
    # float32 [p, 9]: colour 3 (from the palette), noise amplitude, noise scale in texels a metre,
    # parameters 4
    table: np.ndarray
    kinds: np.ndarray  # int32 [p, 3]: material, glow, flags


class Group(NamedTuple):
    """Polygons that are painted together: larger keys first, equal keys in order of addition."""

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
    # Ground outlines of four corners (x, y, 0) each: shadows of the sun, and shadows below objects
    # in any light.
    shadows: list[list] = field(default_factory=list)
    contacts: list[list] = field(default_factory=list)
    lamps: list[tuple[float, float, float]] = field(default_factory=list)  # street lamps
    objects: list[int] = field(default_factory=list)  # label of object i + 1

    def object(self, label: int) -> int:
        """Opens an object with a box of its own and returns its number, from 1."""
        self.objects.append(label)
        return len(self.objects)

    def polygon(
        self, vertices, color, label: int, key: float, material=PLAIN, noise=(0.06, 8.0),
        params=(0, 0, 0, 0), flags=0,
    ):  # fmt: skip
        """Adds one polygon [k, 3] of its own colour."""
        table = np.array([[*color, *noise, *params]], np.float32)
        kinds = np.array([[material, NO_GLOW, flags]], np.int32)
        vertices = np.array(vertices, np.float32)
        self.groups.append(Group(key, label, 0, vertices, ONE[len(vertices)], table, kinds))

    def place(
        self, shape: Shape, palette: np.ndarray, at, heading: float, label: int, key: float,
        obj=0, scale=(1.0, 1.0, 1.0), z=0.0,
    ):  # fmt: skip
        """Adds a shape, painted with `palette` [slots, 3].

        It stands at ground position `at`, turned clockwise from +y by `heading`.
        """
        s = math.sin(heading)
        c = math.cos(heading)
        a, b, height = scale
        turn = np.array([[c * a, -s * a, 0], [s * b, c * b, 0], [0, 0, height]], np.float32)
        vertices = shape.vertices @ turn
        vertices += np.array([at[0], at[1], z], np.float32)
        table = shape.table.copy()
        table[:, :3] = palette.take(shape.slots, 0)
        self.groups.append(Group(key, label, obj, vertices, shape.sizes, table, shape.kinds))


@dataclass(frozen=True)
class Raster:
    """Surface ids, and a table of the surfaces whose row 0 is the sky."""

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
    groups = sorted(mesh.groups, key=lambda g: -g.key)  # stable: equal keys keep their order
    vertices = np.concatenate([g.vertices for g in groups])
    sizes = np.concatenate([g.sizes for g in groups])
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
    a = view - np.repeat(view[starts], sizes, 0)
    b = view[following] - np.repeat(view[starts], sizes, 0)
    # Newell's method: the cross product of each edge, summed over the polygon.
    newell = [a[:, i] * b[:, j] - a[:, j] * b[:, i] for i, j in ((1, 2), (2, 0), (0, 1))]
    normal = np.add.reduceat(np.stack(newell, 1), starts)
    normal /= np.linalg.norm(normal, axis=1, keepdims=True) + 1e-9
    offset = (normal * view[starts]).sum(1)
    depth_min = np.minimum.reduceat(view[:, 2], starts)
    depth_max = np.maximum.reduceat(view[:, 2], starts)
    pixels = in_front(camera, view)
    low = np.minimum.reduceat(pixels, starts)
    high = np.maximum.reduceat(pixels, starts)
    h, w = camera.size
    cut = depth_min < NEAR
    outside = (low > [w, h]).any(1) | (high < -1).any(1)
    speck = (high - low < 1).all(1)
    culled = (kinds[1:, 2] == CULLED) & (offset > 0)
    skip = (depth_max < NEAR) | (~cut & (outside | speck)) | culled
    fixed = sixteenths(pixels)
    ids = np.zeros((h, w), np.int32)
    under = np.zeros((h, w), np.int32)
    sheer = (kinds[1:, 0] == BARS).tolist()
    first = starts.tolist()
    last = ends.tolist()
    cut = cut.tolist()
    for i in np.flatnonzero(~skip).tolist():
        outline = fixed[first[i] : last[i]]
        if cut[i]:
            outline = cut_near(camera, view[first[i] : last[i]])
        if sheer[i]:  # remember what stands behind
            x0, y0 = np.maximum(outline.min(0) // 16 - 1, 0)
            x1, y1 = np.maximum(outline.max(0) // 16 + 2, 0)
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

    def pad(x):
        return np.concatenate([np.zeros((1, 3), np.float32), x]).astype(np.float32)

    return Raster(ids, under, pad(plane), pad(world_normal), pad(along), label, owner, table, kinds)


def in_front(camera: Camera, view: np.ndarray) -> np.ndarray:
    """Pixel coordinates of camera points; those nearer than the near plane are moved to it."""
    return camera.pixels(np.maximum(view, [-1e9, -1e9, NEAR])).clip(-20000, 20000)


def sixteenths(pixels: np.ndarray) -> np.ndarray:
    """Pixel coordinates as OpenCV takes them with `shift=4`."""
    return np.round(pixels * 16).astype(np.int32)


def cut_near(camera: Camera, polygon: np.ndarray) -> np.ndarray:
    """The part of a polygon [k, 3] in camera axes beyond the near plane, as `sixteenths`."""
    corners = []
    for p, q in zip(polygon, np.roll(polygon, -1, 0), strict=True):
        if p[2] >= NEAR:
            corners.append(p)
        if (p[2] >= NEAR) != (q[2] >= NEAR):
            corners.append(p + (q - p) * ((NEAR - p[2]) / (q[2] - p[2])))
    return sixteenths(camera.pixels(np.array(corners, np.float32)).clip(-20000, 20000))


@lru_cache(1)
def tiles() -> tuple[np.ndarray, np.ndarray]:
    """Fixed noise.

    Returns:
        A soft and a crisp periodic 256 x 256 cloud of several octaves (about -1..1), one after the
        other; and a long line of white noise.
    """
    rng = np.random.default_rng(19)
    clouds = []
    for fall in (0.45, 0.12):
        cloud = np.zeros((256, 256), np.float32)
        for n in (4, 8, 16, 32, 64, 128, 256):
            coarse = np.pad(rng.standard_normal((n, n)).astype(np.float32), 2, mode="wrap")
            k = 256 // n
            octave = cv2.resize(coarse, None, fx=k, fy=k, interpolation=cv2.INTER_CUBIC)
            cloud += octave[2 * k : -2 * k, 2 * k : -2 * k] * n**-fall
        clouds.append(cloud.ravel() / cloud.std() * 0.5)
    return np.concatenate(clouds), rng.standard_normal(1 << 20).astype(np.float32)


def noise(u: np.ndarray, v: np.ndarray, crisp=False) -> np.ndarray:
    """The periodic cloud at texture coordinates in texels."""
    at = ((v.astype(np.int32) & 255) << 8) | (u.astype(np.int32) & 255)
    return tiles()[0].take(at + 65536 * np.asarray(crisp, np.int32))


def smooth_noise(u: np.ndarray, v: np.ndarray) -> np.ndarray:
    """As `noise`, interpolated between texels, for surfaces whose texels are larger than pixels."""
    n = len(u)
    if not n:
        return u
    u, v = (np.resize(np.mod(c, 256), (n + 511) // 512 * 512).reshape(-1, 512) for c in (u, v))
    tile = tiles()[0][:65536].reshape(256, 256)
    cloud = cv2.remap(tile, u, v, cv2.INTER_LINEAR, borderMode=cv2.BORDER_WRAP)
    return np.asarray(cloud).ravel()[:n]


def _fraction(x: np.ndarray) -> np.ndarray:
    return x - np.floor(x)


def _hash(*values: np.ndarray) -> np.ndarray:
    """Uniform 0..1 from whole-numbered arrays, the same for equal values."""
    x = np.zeros(values[0].shape, np.uint32)
    for v, k in zip(values, (0x9E3779B1, 0x85EBCA77, 0xC2B2AE3D), strict=False):
        x += v.astype(np.uint32) * np.uint32(k)
    x = (x ^ (x >> np.uint32(15))) * np.uint32(0x2C1B3C6D)
    return ((x ^ (x >> np.uint32(12))) & np.uint32(0xFFFF)).astype(np.float32) / np.float32(65536)


class Pixels(NamedTuple):
    """What is the same of each pixel in every appearance, all flat [h * w]."""

    ids: np.ndarray  # visible surface; between the bars of a fence the one behind it
    depth: np.ndarray
    x: np.ndarray  # world
    y: np.ndarray
    z: np.ndarray
    color: np.ndarray  # [n, 3] painted, unlit
    shine: np.ndarray  # [n, 3] light of windows and lamps when all are on


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
    table = raster.table
    kinds = raster.kinds
    material = kinds[:, 0].take(ids)
    flat = (material == GROUND) | (material == PAVING)
    leafy = material == FOLIAGE
    amplitude = table[:, 3].take(ids)
    scale = table[:, 4].take(ids)
    # Texels smaller than a pixel fade into their mean.
    fine = np.clip(2.2 - depth * scale * (0.6 / camera.focal), 0.15, 1)
    across = np.where(flat, x, u + ids * np.float32(0.37))
    grain = noise(across * scale, np.where(flat, y, z) * scale, leafy)
    color = table[:, :3].take(ids, 0) * (1 + amplitude * grain * np.where(leafy, 1, fine))[:, None]
    shine = np.where((kinds[:, 1] > 0).take(ids)[:, None], color, np.float32(0))
    _facades(np.flatnonzero(material == FACADE), u, v, params, depth, camera, color, shine)
    paved = np.flatnonzero(material == PAVING)
    slab = params[paved, 0]
    joint = (_fraction(x[paved] / slab) < 0.07) | (_fraction(y[paved] / slab) < 0.07)
    near = np.clip(1.5 - depth[paved] * (10 / camera.focal), 0, 1)
    color[paved] *= (1 - np.where(joint, 0.2, 0.0) * near)[:, None]
    brick = np.flatnonzero(material == BRICK)
    row = v[brick] / 0.25
    joint = (_fraction(row) < 0.16) | (_fraction(u[brick] / 0.5 + np.floor(row) * 0.5) < 0.08)
    visible = joint & (depth[brick] < 0.08 * camera.focal)
    color[brick] *= np.where(visible, 1 - 0.28, 1.0)[:, None]
    return Pixels(ids, depth, x, y, z, color, shine)


def _texture(raster, camera, axes, ids, rx, ry):
    """Texture coordinates, depth, parameters and world position of pixels; lengths in metres."""
    plane = raster.plane.take(ids, 0)
    depth = 1 / np.maximum(plane[:, 0] * rx + plane[:, 1] * ry + plane[:, 2], 1e-3)
    x, y, z = (
        camera.position[k] + depth * (axes[0, k] * rx + axes[1, k] * ry + axes[2, k])
        for k in range(3)
    )
    along = raster.along.take(ids, 0)
    u = x * along[:, 0] + y * along[:, 1] - along[:, 2]
    return u, z, depth, raster.table[:, 5:9].take(ids, 0), x, y, z


def _facades(at, u, v, params, depth, camera, color, shine):
    """Paints windows, shop fronts and cornices in place.

    The parameters are window pitch, floor height, seed and style; from style 1 on there is a shop.
    """
    u = u[at]
    v = v[at]
    p = params[at]
    seed = np.floor(p[:, 2] * 997)
    shop = p[:, 3] >= 1
    column = np.floor(u / p[:, 0])
    level = np.floor(v / p[:, 1])
    fu = u / p[:, 0] - column
    fv = v / p[:, 1] - level
    pick = _hash(column + 64, level + 64, seed)
    half = 0.20 + 0.22 * _fraction(p[:, 2] * 7)  # half a window's share of the pitch
    top = 0.78 + 0.12 * _fraction(p[:, 2] * 13)
    bottom = np.where(_fraction(p[:, 3]) > 0.7, 0.08, 0.30)  # some have French windows
    front = shop & (level == 0)
    half = np.where(front, 0.44, half)
    bottom = np.where(front, 0.10, bottom)
    top = np.where(front, 0.72, top)
    inside = (np.abs(fu - 0.5) < half) & (fv > bottom) & (fv < top) & (level >= 0)
    border = 0.045 + 0.25 * depth[at] / camera.focal
    frame = inside & (
        (np.abs(np.abs(fu - 0.5) - half) < border)
        | (np.abs(fv - top) < border * 0.7)
        | (np.abs(fu - 0.5) < border * 0.3)
    )
    blue = np.array([0.95, 1.0, 1.08], np.float32)
    glass = (0.10 + 0.26 * pick**2 + 0.22 * fv * pick)[:, None] * blue
    blinds = np.array([0.62, 0.58, 0.5], np.float32)
    glass = np.where((pick > 0.86)[:, None], blinds, glass)
    shade = 1 - np.where(fv < 0.05, 0.10, 0.0) - np.where(fv > 0.97, 0.06, 0.0)
    wall = color[at] * (shade - np.where(front & ~inside, 0.10, 0.0))[:, None]
    light_frame = np.where(np.mod(seed, 3) == 0, 0.25, 0.8)[:, None] * np.ones(3, np.float32)
    board = front & (fv > 0.77) & (fv < 0.95)
    hue = _hash(np.floor(column / 3), seed)[:, None] * 6.28 + np.array([0, 2.1, 4.2], np.float32)
    wall = np.where(board[:, None], 0.42 + 0.32 * np.sin(hue), wall)
    color[at] = np.where(frame[:, None], light_frame, np.where(inside[:, None], glass, wall))
    lit = (inside & ~frame & (pick < np.where(front, 0.75, 0.30))) | (board & (pick < 0.5))
    green = 0.72 + 0.25 * _fraction(pick * 31)
    tone = np.stack([np.ones_like(pick), green, 0.40 + 0.5 * _fraction(pick * 57)], 1)
    shine[at] = np.where(lit[:, None], tone * (0.45 + 0.5 * _fraction(pick * 91))[:, None], 0)
