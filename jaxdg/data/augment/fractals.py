"""Pictures without a subject, to be mixed into images and to take styles from.

They are generated, or the files of a folder.

A generated picture is the attractor of a random iterated function system in front of bent waves.
Its affine maps are drawn by the rule of Anderson and Farrell (2022, "Improving Fractal
Pre-training", section 3.1), whose sum of singular values lets attractors fill the plane well. The
attractor is drawn by the chaos game and coloured as fractal flames are (Draves and Reckase 2003): a
point's colour is the running mean of the colours of the maps that led there. The waves stand in for
the visualised features among PixMix's pictures.
"""

import dataclasses
from pathlib import Path

import cv2
from jaxtyping import Float, Float32, UInt8
import numpy as np

from jaxdg.data.images import read_image
from jaxdg.data.index import IMAGE_SUFFIXES
from jaxdg.data.storage import is_hidden

SIDE = 256  # pixels
WALKERS = 2048  # points that jump at once
FIRST = 16  # jumps before the points are drawn
STEPS = 80  # jumps of which each is drawn


@dataclasses.dataclass(frozen=True)
class Pictures:
    """The source of pictures; holds plain values only, so that it reaches worker processes.

    Attributes:
        files: images, one of which is read; () generates a new picture each time.
    """

    files: tuple[str, ...] = ()

    @classmethod
    def of(cls, folder: str | None) -> "Pictures":
        """All images below a folder; None generates pictures.

        Raises:
            FileNotFoundError: there are none.
        """
        if folder is None:
            return cls()
        found = sorted(
            path for path in Path(folder).rglob("*") if path.suffix.lower() in IMAGE_SUFFIXES
        )
        files = tuple(
            str(path) for path in found if not any(map(is_hidden, path.relative_to(folder).parts))
        )
        if not files:
            raise FileNotFoundError(
                f"no images ({' '.join(IMAGE_SUFFIXES)}) below {folder}, which data.pictures names"
            )
        return cls(files)

    def draw(self, size: tuple[int, int], rng: np.random.Generator) -> UInt8[np.ndarray, "h w 3"]:
        """A random picture, scaled until it just covers `size`, then randomly cropped and flipped.

        Args:
            size: height and width, pixels.
            rng: the source of all randomness.

        Raises:
            ValueError: a file cannot be read; names it.
        """
        if self.files:
            picture = read_image(self.files[rng.integers(len(self.files))], upright=True)
        else:
            picture = generate(rng)
        factor = max(new / old for new, old in zip(size, picture.shape, strict=False))
        h, w = (
            max(new, round(old * factor)) for new, old in zip(size, picture.shape, strict=False)
        )
        interpolation = cv2.INTER_AREA if factor < 1 else cv2.INTER_LINEAR
        picture = cv2.resize(picture, (w, h), interpolation=interpolation)
        top, left = (int(rng.integers(n + 1)) for n in (h - size[0], w - size[1]))
        picture = picture[top : top + size[0], left : left + size[1]]
        return np.ascontiguousarray(picture[:, ::-1] if rng.integers(2) else picture)


def generate(rng: np.random.Generator) -> UInt8[np.ndarray, "256 256 3"]:
    """A random fractal in front of random waves, each in colours of its own."""
    cover, color = attractor(*random_maps(rng), rng)
    behind = palette(rng)[(255 * waves(rng)).astype(np.uint8)] * np.float32(rng.uniform(0.3, 1))
    front = palette(rng)[(255 * color).astype(np.uint8)]
    return np.rint(behind + cover[..., None] * (front - behind)).astype(np.uint8)


def random_maps(
    rng: np.random.Generator,
) -> tuple[Float[np.ndarray, "n 2 2"], Float[np.ndarray, "n 2"]]:
    """A random system of 2 to 8 contracting affine maps, x -> matrix x + shift.

    Each matrix is rotation, stretch by singular values s >= t, reflection or none, rotation. The
    sum of all s + 2t lies between (5 + n) / 2 and (6 + n) / 2.
    """
    n = int(rng.integers(2, 9))
    wanted = rng.uniform((5 + n) / 2, (6 + n) / 2)
    while True:
        s = rng.uniform(0.1, 1, n)
        t = s * rng.uniform(0, 1, n)
        factor = wanted / np.sum(s + 2 * t)
        if factor * s.max() < 1:
            break
    stretch = factor * np.stack([s, t * rng.choice((-1, 1), n)])
    angle = rng.uniform(0, 2 * np.pi, (2, n))
    cos = np.cos(angle)
    sin = np.sin(angle)
    left, right = np.moveaxis(np.array([[cos, -sin], [sin, cos]]), (0, 1), (2, 3))
    return left * stretch.T[:, None, :] @ right, rng.uniform(-1, 1, (n, 2))


def attractor(
    matrices: Float[np.ndarray, "n 2 2"], shifts: Float[np.ndarray, "n 2"], rng: np.random.Generator
) -> tuple[Float32[np.ndarray, "256 256"], Float32[np.ndarray, "256 256"]]:
    """The points that random jumps by the maps lead to.

    A map is chosen with a probability proportional to its determinant.

    Returns:
        How densely each pixel is covered, on a logarithmic scale of 0 to 1, and its colour, 0 to 1.
    """
    n = len(matrices)
    weight = np.maximum(np.abs(np.linalg.det(matrices)), 0.01)
    chosen = rng.choice(n, (FIRST + STEPS, WALKERS), p=weight / weight.sum())
    # x and y as one complex number, which an affine map and its mirror image move by two products.
    (a, b), (c, d) = np.moveaxis(matrices, 0, 2)
    turn = ((a + d + 1j * (c - b)) / 2).astype(np.complex64)
    mirror = ((a - d + 1j * (c + b)) / 2).astype(np.complex64)
    shift = (shifts[:, 0] + 1j * shifts[:, 1]).astype(np.complex64)
    z = np.zeros(WALKERS, np.complex64)
    color = np.full(WALKERS, 0.5, np.float32)
    path = np.empty(chosen.shape, np.complex64)
    colors = np.empty(chosen.shape, np.float32)
    own = np.linspace(0, 1, n, dtype=np.float32)
    for step, k in enumerate(chosen):
        z = turn[k] * z + mirror[k] * z.conj() + shift[k]
        color = (color + own[k]) / 2
        path[step] = z
        colors[step] = color
    path = path[FIRST:].ravel()
    colors = colors[FIRST:].ravel()
    cells = []
    beyond = rng.uniform(0.01, 0.2)  # share of the points on either side outside the picture
    for part in (path.imag, path.real):
        low, high = np.quantile(part[:: len(part) // 4096], (beyond, 1 - beyond))
        cells.append(((part - low) * (SIDE / max(high - low, 1e-6))).astype(np.int32))
    inside = (cells[0] >= 0) & (cells[0] < SIDE) & (cells[1] >= 0) & (cells[1] < SIDE)
    at = (cells[0] * SIDE + cells[1])[inside]
    count = np.bincount(at, minlength=SIDE**2)
    total = np.bincount(at, colors[inside], minlength=SIDE**2)
    count, total = (
        cv2.GaussianBlur(x.astype(np.float32).reshape(SIDE, SIDE), (3, 3), 0.6)
        for x in (count, total)
    )
    cover = np.log1p(count)
    cover = np.minimum(cover / np.quantile(cover[count > 0], 0.95), 1)
    return cover, np.minimum(total / np.maximum(count, 1e-6), 1)


def waves(rng: np.random.Generator) -> Float32[np.ndarray, "256 256"]:
    """A random wave, 0 to 1, whose crests are bent by two others."""
    x = np.broadcast_to(np.linspace(0, 2 * np.pi, SIDE, dtype=np.float32), (SIDE, SIDE))
    y = x.T
    for bend in (rng.uniform(0, 3), rng.uniform(0, 3), 0):
        length = np.exp(rng.uniform(0, 2.5))
        angle = rng.uniform(0, 2 * np.pi)
        phase = rng.uniform(0, 2 * np.pi)
        reach = bend / length
        across = np.float32(length * np.cos(angle)) * x
        wave = np.sin(across + np.float32(length * np.sin(angle)) * y + np.float32(phase))
        x = x + np.float32(reach * np.cos(angle + 1)) * wave
        y = y + np.float32(reach * np.sin(angle + 1)) * wave
    return (wave + 1) / 2


def palette(rng: np.random.Generator) -> Float32[np.ndarray, "256 3"]:
    """Colours between 3 to 5 random ones, 0 to 255."""
    count = int(rng.integers(3, 6))
    fixed = rng.uniform(0, 255, (count, 3))
    at = np.linspace(0, count - 1, 256)
    channels = [np.interp(at, np.arange(count), channel) for channel in fixed.T]
    return np.stack(channels, axis=-1).astype(np.float32)
