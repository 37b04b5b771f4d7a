"""Light and weather of the generated streets, applied to the surfaces of `draw.py`.

Fog and haze follow Koschmieder's law with the exact depth of each pixel. Wet ground mirrors what
stands above it. Lamps, lit windows and the lights of vehicles bloom. An appearance changes the
pixels only, not the labels.
"""

from functools import lru_cache
from typing import NamedTuple

import cv2
import numpy as np

from jaxdg.streets.draw import (
    CULLED,
    FACADE,
    GROUND,
    LAMP,
    NEAR,
    PAVING,
    Camera,
    Mesh,
    Pixels,
    Raster,
    cut_near,
    in_front,
    noise,
    sixteenths,
    smooth_noise,
    tiles,
)


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


def look(appearance: str, direction: np.ndarray, rng: np.random.Generator) -> Look:
    """Draws the light and weather of an appearance from `rng`."""
    looks = {"clear": _clear, "night": _night, "rain": _rainy, "fog": _foggy, "dusk_rain": _dusk}
    return looks[appearance](direction, rng.uniform)


def _rgb(red, green, blue) -> np.ndarray:
    return np.array([red, green, blue], np.float32)


DARK = _rgb(0, 0, 0)


def _clear(direction, r) -> Look:
    low = float(np.clip(1.2 - direction[2] * 1.5, 0, 1))
    veil = r(0, 1) ** 3  # a low sun is warm, a veiled one casts weak shadows
    bright = _rgb(0.70 + 0.22 * low, 0.79, 0.90 - 0.22 * low)
    return Look(
        ambient=_rgb(0.50, 0.53, 0.60) * (1 + 0.45 * veil),
        sun=_rgb(1.0, 0.94 - 0.2 * low, 0.84 - 0.42 * low) * ((1 - 0.8 * veil) * r(0.62, 0.82)),
        direction=direction,
        zenith=_rgb(0.22, 0.43, 0.80) * (1 - veil) + _rgb(0.66, 0.69, 0.74) * veil,
        horizon=bright * (1 - veil) + _rgb(0.84, 0.85, 0.86) * veil,
        clouds=r(0, 0.9),
        cloud=_rgb(0.95, 0.95, 0.97) - 0.1 * low,
        haze=r(0.0008, 0.004),
        glow=(0, 0.9, 0.05, 0),
        bloom=0.1,
        noise=r(0.008, 0.02),
        exposure=r(0.92, 1.3),
    )


def _night(direction, r) -> Look:
    moon = r(0.6, 1.3)
    return Look(
        ambient=_rgb(0.055, 0.065, 0.115) * moon,
        sun=DARK,
        direction=direction,
        zenith=_rgb(0.010, 0.014, 0.040) * moon,
        horizon=_rgb(0.12, 0.085, 0.07) * r(0.4, 1.4),
        clouds=r(0, 0.8),
        cloud=_rgb(0.10, 0.08, 0.08),
        haze=0.004,
        glow=(0.95, 1.1, 1.25, 1.4),
        beam=r(0.5, 1.0),
        bloom=0.8,
        noise=r(0.03, 0.05),
        exposure=r(0.9, 1.25),
    )


def _rainy(direction, r) -> Look:
    grey = r(0.52, 0.68)
    return Look(
        ambient=_rgb(0.88, 0.92, 0.98) * grey,
        sun=DARK,
        direction=direction,
        zenith=_rgb(0.75, 0.80, 0.85) * grey,
        horizon=_rgb(1.05, 1.07, 1.10) * grey,
        clouds=0.9,
        cloud=_rgb(0.56, 0.59, 0.62) * grey,
        haze=r(0.012, 0.02),
        glow=(0.30, 0.8, 0.8, 0.1),
        wet=r(0.6, 0.9),
        rain=r(0.6, 1.0),
        bloom=0.35,
        noise=0.02,
    )


def _foggy(direction, r) -> Look:
    air = _rgb(0.99, 1.0, 1.01) * r(0.70, 0.84)
    return Look(
        ambient=air * 0.9,
        sun=DARK,
        direction=direction,
        zenith=air,
        horizon=air,
        clouds=0.0,
        cloud=air,
        haze=r(0.045, 0.085),  # 46 to 87 m of meteorological visibility
        glow=(0.25, 0.8, 0.8, 0.3),
        bloom=0.5,
        noise=0.014,
    )


def _dusk(direction, r) -> Look:
    warm = r(0, 1)
    return Look(
        ambient=_rgb(0.21, 0.185, 0.26),
        sun=DARK,
        direction=direction,
        zenith=_rgb(0.10, 0.10, 0.22),
        horizon=_rgb(0.40 + 0.22 * warm, 0.27, 0.34 - 0.10 * warm),
        clouds=0.9,
        cloud=_rgb(0.13, 0.11, 0.20),
        haze=r(0.010, 0.016),
        glow=(0.75, 1.1, 1.25, 1.2),
        beam=r(0.25, 0.5),
        wet=r(0.75, 1.0),
        rain=r(0.5, 0.9),
        bloom=0.9,
        noise=r(0.022, 0.035),
        exposure=r(0.95, 1.2),
    )


def develop(
    pixels: Pixels, raster: Raster, mesh: Mesh, camera: Camera, look: Look, rng: np.random.Generator
) -> np.ndarray:
    """The picture, uint8 [h, w, 3]: painted pixels with light, weather and exposure."""
    h, w = camera.size
    flat = np.isin(raster.kinds[:, 0], (GROUND, PAVING)).take(pixels.ids)
    sky = np.flatnonzero(pixels.ids == 0)
    image = pixels.color * _light(pixels, raster, mesh, camera, look, flat)
    glow = np.array(look.glow, np.float32)[raster.kinds[:, 1]]
    shine = pixels.shine * glow.take(pixels.ids)[:, None]
    image += shine
    image[sky] = _sky(pixels, camera, look, sky)
    clear = np.exp(-look.haze * pixels.depth)  # Koschmieder: the share of a colour that remains
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
    white = tiles()[1]
    start = int(rng.integers(0, len(white) - 1))
    grain = np.take(white, np.arange(start, start + h * w * 3), mode="wrap")
    image += look.noise * grain.reshape(h, w, 3)
    return (np.clip(image, 0, 1) * 255 + 0.5).astype(np.uint8)


def shadow_mask(outlines: list[list], camera: Camera, blur: float) -> np.ndarray:
    """Four-cornered shadows on the ground.

    Args:
        outlines: four corners (x, y, 0) each.
        camera: of the picture.
        blur: as a share of the picture's height.

    Returns:
        float32 [h * w] in 0..1.
    """
    mask = np.zeros(camera.size, np.uint8)
    if outlines:
        view = camera.view(np.array(outlines, np.float32).reshape(-1, 3)).reshape(-1, 4, 3)
        low = view[..., 2].min(1)
        high = view[..., 2].max(1)
        fixed = sixteenths(in_front(camera, view.reshape(-1, 3))).reshape(-1, 4, 2)
        for i in np.flatnonzero(low >= NEAR).tolist():
            cv2.fillConvexPoly(mask, fixed[i], 255, shift=4)
        for i in np.flatnonzero((low < NEAR) & (high > NEAR)).tolist():
            cv2.fillPoly(mask, [cut_near(camera, view[i])], 255, shift=4)
    soft = cv2.GaussianBlur(mask, (0, 0), max(0.6, blur * camera.size[0]))
    return soft.ravel() * np.float32(1 / 255)


def _light(pixels, raster, mesh, camera, look, flat):
    """Light that falls on each pixel, [n, 3]."""
    facing = raster.normal @ look.direction
    upright = np.abs(raster.normal[:, 2]) < 0.99
    rounded = upright & (raster.kinds[:, 2] != CULLED) & (raster.kinds[:, 0] != FACADE)
    facing = np.where(rounded, 0.35 + 0.35 * facing, facing)
    light = look.ambient * (0.8 + 0.2 * raster.normal[:, 2:])
    light = light.take(pixels.ids, 0)
    if look.sun.any():
        cast = shadow_mask(mesh.shadows, camera, 0.004)
        facing = np.maximum(facing, 0).take(pixels.ids)
        light += facing[:, None] * (1 - np.where(flat, cast, np.float32(0)))[:, None] * look.sun
    contact = shadow_mask(mesh.contacts, camera, 0.008)
    light *= (1 - np.where(flat, 0.6, 0.0) * contact)[:, None]
    if look.beam:
        rx, ry = camera.rays()
        cone = np.exp(-((rx / 0.5) ** 2) - ((ry - 0.12) / 0.22) ** 2)
        beam = look.beam * cone * 22 / (pixels.depth + 8)
        light += beam[:, None] * np.array([1.0, 0.96, 0.85], np.float32)
    if look.glow[LAMP] >= 1:
        pool = np.zeros_like(pixels.depth)
        for x, y, z in sorted(mesh.lamps, key=lambda p: p[1])[:6]:
            pool += 9 / (12 + (pixels.x - x) ** 2 + (pixels.y - y) ** 2 + 0.5 * (pixels.z - z) ** 2)
        light += pool[:, None] * np.array([1.0, 0.72, 0.40], np.float32)
    return light


def _sky(pixels, camera, look, at):
    """Colours of the sky: gradient, clouds on a high plane, and the glow round the sun."""
    dx = pixels.x[at] - camera.position[0]
    dy = pixels.y[at] - camera.position[1]
    dz = np.maximum(pixels.z[at] - camera.position[2], 0)
    length = np.sqrt(dx**2 + dy**2 + dz**2) + 1e-6
    up = dz / length
    grade = np.clip(up * 1.7, 0, 1)[:, None] ** 0.65
    color = look.horizon * (1 - grade) + look.zenith * grade
    drift = 200 * (look.direction[0] + 1)
    plane = dz + 0.16 * length
    noise = smooth_noise(dx / plane * 24 + drift, dy / plane * 24 + drift)
    cover = np.clip((noise + look.clouds * 1.1 - 0.75) * 1.6, 0, 0.92)[:, None]
    cover = cover * np.clip(up * 9, 0, 1)[:, None]
    color = color * (1 - cover) + look.cloud * cover
    if look.sun.any():
        a, b, c = look.direction
        near = np.clip((dx * a + dy * b + dz * c) / length, 0, 1)
        color += (0.25 * near**12 + 0.8 * near**220)[:, None] * look.sun
    return color


def _reflect(image, pixels, flat, wet):
    """Wet ground mirrors, column by column, what stands above it."""
    h, w = flat.shape
    row = np.arange(h, dtype=np.float32)[:, None]
    foot = np.maximum.accumulate(np.where(flat, np.float32(-1), row), 0)
    at = np.flatnonzero(flat)
    x = pixels.x[at]
    y = pixels.y[at]
    source = 2 * foot - row
    source.ravel()[at] += noise(x * 40, y * 40) * (h * 0.012)
    columns = np.repeat(np.arange(w, dtype=np.float32)[None], h, 0)
    mirror = cv2.remap(image, columns, source, cv2.INTER_NEAREST, borderMode=cv2.BORDER_REPLICATE)
    mirror = cv2.blur(mirror, (1, max(1, h // 24))).reshape(-1, 3)[at]
    puddle = np.clip(noise(x * 6, y * 6) * 0.9 + 0.55, 0.15, 1)
    share = (wet * puddle * np.clip(0.25 + pixels.depth[at] / 45, 0, 0.85))[:, None]
    pixel = image.reshape(-1, 3)
    pixel[at] = pixel[at] * ((1 - 0.3 * wet) * (1 - share)) + mirror * share
    return image


def _bloom(shine, strength):
    """Light scattered in air and lens, computed at a quarter of the resolution."""
    h, w = shine.shape[:2]
    small = cv2.resize(shine, (max(8, w // 4), max(8, h // 4)), interpolation=cv2.INTER_AREA)
    wide = cv2.GaussianBlur(small, (0, 0), h / 45)
    glow = 0.8 * cv2.GaussianBlur(small, (0, 0), h / 170) + 0.9 * wide
    return strength * cv2.resize(glow, (w, h), interpolation=cv2.INTER_LINEAR)


def _rain(image, look, rng):
    """Falling streaks and a few drops on the lens, each showing the scene upside down."""
    h, w = image.shape[:2]
    length = max(5, h // 11)
    slant = rng.uniform(-0.3, 0.3)
    seeds = (rng.random((h, w), np.float32) > 1 - 0.010 * look.rain).astype(np.float32)
    shear = np.array([[1, slant, -slant * h / 2], [0, 1, 0]], np.float32)
    upright = cv2.blur(seeds, (1, length)) * length
    streaks = cv2.warpAffine(upright, shear, (w, h), borderMode=cv2.BORDER_REFLECT)
    streaks = np.minimum(streaks, 1)[..., None] * (0.10 + 0.16 * look.rain)
    image += ((look.horizon * 0.8 + 0.25) - image) * streaks
    drops = rng.random((int(4 + 7 * look.rain), 3)) * [w, h, 0.028 * h] + [0, 0, 0.014 * h]
    for x, y, radius in drops:
        x0 = max(0, int(x - radius))
        x1 = min(w, int(x + radius) + 1)
        y0 = max(0, int(y - radius))
        y1 = min(h, int(y + radius) + 1)
        if x1 - x0 > 2 and y1 - y0 > 2:
            gy, gx = np.mgrid[y0:y1, x0:x1].astype(np.float32)
            distance = np.hypot(gx - x, (gy - y) * 0.85)
            soft = np.clip((1 - distance / radius) * 2.5, 0, 0.85)[..., None]
            dx = 3 * (x1 - x0)
            dy = 3 * (y1 - y0)
            around = image[max(0, y0 - dy) : y1 + dy, max(0, x0 - dx) : x1 + dx]
            turned = np.ascontiguousarray(around[::-1, ::-1])
            lens = cv2.resize(turned, (x1 - x0, y1 - y0), interpolation=cv2.INTER_AREA)
            image[y0:y1, x0:x1] = image[y0:y1, x0:x1] * (1 - soft) + (lens * 0.95 + 0.04) * soft
    return image


@lru_cache(4)
def _vignette(h: int, w: int) -> np.ndarray:
    y = np.linspace(-1, 1, h, dtype=np.float32)[:, None]
    x = np.linspace(-1, 1, w, dtype=np.float32)[None]
    return (1 - 0.16 * (x**2 + y**2) / 2 * (x**2 + y**2))[..., None]
