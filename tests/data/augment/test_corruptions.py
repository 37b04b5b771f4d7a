"""Corruptions: equal to the published implementation, draw by draw, and distributed as their
formulas say.
"""

import colorsys
import pickle

import cv2
import numpy as np
import pytest
import scipy.ndimage

from jaxdg.data.augment import corruptions
from jaxdg.data.augment.corruptions import (
    ALL_KINDS,
    KINDS,
    SEVERITIES,
    Corrupted,
    corrupt,
    frost_texture,
    random_corruption,
)
from jaxdg.data.augment.transforms import Augmentation
from jaxdg.data.boxes import open_boxes
from jaxdg.data.datasets import Streets, StreetsOptions, Subset
from jaxdg.data.images import read_image
from jaxdg.data.pipeline import train_batches
from jaxdg.data.samplers import make_sampler

PAPER = {
    "gaussian_noise", "shot_noise", "impulse_noise", "defocus_blur", "glass_blur", "motion_blur",
    "zoom_blur", "snow", "frost", "fog", "brightness", "contrast", "elastic_transform", "pixelate",
    "jpeg_compression",
}  # fmt: skip


def flat(value: int, size: tuple[int, int] = (200, 300)) -> np.ndarray:
    """An image of one grey."""
    return np.full((*size, 3), value, np.uint8)


@pytest.mark.parametrize("kind", sorted(PAPER - {"frost"}))
def test_equals_the_published_implementation(golden, kind):
    """With the same random draws, imagecorruptions' images at all severities to one grey level;
    frost's photographs are not ours.
    """
    file = np.load(golden / "corruptions.npz")
    every = int(file["every"])
    for severity in SEVERITIES:
        got = corrupt(file["image"], kind, severity, int(file["seed"]))
        difference = np.abs(got[::every, ::every].astype(int) - file[f"{kind}_{severity}"])
        if kind != "jpeg_compression":  # which versions of libjpeg may decode a little differently
            assert difference.max() <= 1
        assert difference.mean() < 0.05


def test_kinds():
    """The paper's 15; others and severities outside 1 to 5 are refused in one line that says what
    is allowed.
    """
    assert len(KINDS) == 15
    assert set(KINDS) == PAPER
    with pytest.raises(
        ValueError, match="unknown corruption 'rain'; known are gaussian_noise, shot_noise"
    ):
        corrupt(flat(0), "rain", 1, 0)
    with pytest.raises(ValueError, match="severity is 6; allowed: 1 to 5"):
        corrupt(flat(0), "fog", 6, 0)


def some_image(h: int = 120, w: int = 90) -> np.ndarray:
    """Random pixels over a smooth ground, some of them grey or black."""
    rng = np.random.default_rng(5)
    x = scipy.ndimage.zoom(rng.uniform(0, 255, (6, 6, 3)), (h / 6, w / 6, 1), order=1)
    x += rng.normal(0, 25, x.shape)
    x[:9] = x[:9, :, :1]
    x[9:12] = 0
    return np.clip(x, 0, 255).astype(np.uint8)


def low_pass(image: np.ndarray, radius: int) -> np.ndarray:
    """The waves inside of a circle around frequency 0, in loops over the whole spectrum."""
    h, w = image.shape[:2]
    inside = np.zeros((h, w))
    for i in range(h):
        for j in range(w):
            inside[i, j] = (i - h // 2) ** 2 + (j - w // 2) ** 2 < radius**2
    spectrum = np.fft.fftshift(np.fft.fft2(image.astype(float), axes=(0, 1)), axes=(0, 1))
    back = np.fft.ifftshift(spectrum * inside[..., None], axes=(0, 1))
    return np.fft.ifft2(back, axes=(0, 1)).real


def scaled_phases(image: np.ndarray, factor: float) -> np.ndarray:
    spectrum = np.fft.fft2(image.astype(float), axes=(0, 1))
    turned = np.abs(spectrum) * np.exp(1j * factor * np.angle(spectrum))
    return np.fft.ifft2(turned, axes=(0, 1)).real


def saturated(image: np.ndarray, factor: float, shift: float) -> np.ndarray:
    """Pixel by pixel."""
    pixels = []
    for r, g, b in image.reshape(-1, 3) / 255:
        hue, saturation, value = colorsys.rgb_to_hsv(r, g, b)
        pixels.append(colorsys.hsv_to_rgb(hue, min(max(saturation * factor + shift, 0), 1), value))
    return 255 * np.array(pixels).reshape(image.shape)


def test_further_kinds_equal_their_formulas():
    """At all severities to one grey level: SciPy's blur, Python's HSV, noise in proportion to the
    value, waves inside and outside of a circle that add up to the image, and phases of the whole
    spectrum.
    """
    image = some_image()
    found = {
        kind: [corrupt(image, kind, severity, 3).astype(int) for severity in SEVERITIES]
        for kind in ALL_KINDS[len(KINDS) :]
    }
    noise = [np.random.default_rng(3).normal(size=image.shape) for _ in SEVERITIES]
    expected = {
        "speckle_noise": [
            image + image * (c * n)
            for c, n in zip((0.15, 0.2, 0.35, 0.45, 0.6), noise, strict=True)
        ],
        "gaussian_blur": [
            scipy.ndimage.gaussian_filter(image.astype(float), (c, c, 0), mode="nearest")
            for c in (1, 2, 3, 4, 6)
        ],
        "saturate": [
            saturated(image, *c) for c in ((0.3, 0), (0.1, 0), (2, 0), (5, 0.1), (20, 0.2))
        ],
        # A hundredth to a twentieth of 120 pixels.
        "high_pass_filter": [np.abs(image - low_pass(image, radius)) for radius in (1, 2, 3, 4, 6)],
        "phase_scaling": [scaled_phases(image, c) for c in (0.9, 0.8, 0.7, 0.6, 0.5)],
    }
    assert found.keys() == expected.keys()
    for kind, images in expected.items():
        for got, want in zip(found[kind], images, strict=True):
            difference = np.abs(got - np.floor(np.clip(want, 0, 255) + 1e-3))
            assert difference.max() <= 1, kind
            assert difference.mean() < 0.02, kind
            assert np.abs(got - image).mean() > 2, kind


def test_scaled_phases_keep_amplitudes():
    """A factor of 1 is the image, to 1e-4 of the range; any other keeps the size of every wave but
    of those that are their own mirror images, which a real image has in phase or against it.
    """
    image = some_image()
    rng = np.random.default_rng(0)
    np.testing.assert_allclose(corruptions._phase_scaling(image, rng, 1.0), image, atol=0.0255)
    turned = corruptions._phase_scaling(image, rng, 0.5)
    assert np.abs(turned - image).mean() > 2
    before, after = (np.abs(np.fft.fft2(x.astype(float), axes=(0, 1))) for x in (image, turned))
    for own in ((60, 0), (0, 45), (60, 45)):
        before[own] = after[own]
    np.testing.assert_allclose(after, before, atol=1e-5 * before.max())


def test_glass_blur_follows_chains_of_copies():
    """All copies at once show what a loop over the pixels, which copies one after another, leaves
    behind; some chains are long.
    """
    h = 24
    w = 31
    for reach in (1, 2, 3, 4):
        offsets = np.random.default_rng(reach).integers(
            -reach, reach, (h - 2 * reach, w - 2 * reach, 2)
        )
        x = np.arange(h * w).reshape(h, w)
        turns = iter(offsets.reshape(-1, 2))
        for row in range(h - reach, reach, -1):
            for column in range(w - reach, reach, -1):
                dx, dy = next(turns)
                x[row, column] = x[row + dy, column + dx]
        np.testing.assert_array_equal(corruptions._sources(h, w, reach, offsets), x.ravel())
        # Further than one copy reaches, but for a reach of 1, at which nothing is copied from below
        # or from the right.
        assert np.abs(x % w - np.arange(w)).max() > reach or reach == 1


def test_noise_has_the_variances_of_its_formulas():
    """On mid-grey: Gaussian (255 c)^2, photons 255^2 (x / 255) / c, and a share c of values black
    or white, each as often.
    """
    deviations = (0.08, 0.12, 0.18)
    photons = (60, 25, 12, 5, 3)
    shares = (0.03, 0.06, 0.09, 0.17, 0.27)
    for severity, c in enumerate(deviations, 1):  # the others clip at mid-grey
        noise = corrupt(flat(128), "gaussian_noise", severity, 0).astype(float)
        assert noise.mean() == pytest.approx(127.5, abs=0.5)  # cut, not rounded
        assert noise.std() == pytest.approx(255 * c, rel=0.02)
    for severity, c in enumerate(photons, 1):
        noise = corrupt(flat(64), "shot_noise", severity, 0).astype(float)
        assert noise.std() == pytest.approx(255 * (64 / 255 / c) ** 0.5, rel=0.04)
        assert noise.mean() == pytest.approx(64, abs=1.2)
    for severity, c in enumerate(shares, 1):
        noise = corrupt(flat(128), "impulse_noise", severity, 0)
        for value in (0, 255):
            assert (noise == value).mean() == pytest.approx(c / 2, rel=0.06)
        assert ((noise == 128) | (noise == 0) | (noise == 255)).all()
        assert (np.ptp(noise, axis=-1) > 0).mean() > c  # channels are hit by themselves


def test_blurs_draw_a_point_as_their_kernels_say():
    """A white spot becomes a disk of the radius, or a line within 45 degrees of level; what is grey
    all over stays so.
    """
    spot = flat(0, (101, 101))
    point = flat(0, (101, 101))
    bright = flat(200, (101, 101))
    spot[49:52, 49:52] = point[50, 50] = 255
    disk = corrupt(spot, "defocus_blur", 5, 0)[..., 0]
    assert (disk >= 4).sum() == pytest.approx(np.pi * 10**2, rel=0.1)  # 9 x 255 on 317 pixels: 7
    assert disk[np.hypot(*np.mgrid[-50:51, -50:51]) < 8].min() >= 7
    for kind in (
        "defocus_blur",
        "glass_blur",
        "motion_blur",
        "zoom_blur",
        "elastic_transform",
        "pixelate",
    ):
        # The published disk, softened at the edges of its array, weighs 1.01.
        assert (
            np.abs(corrupt(bright, kind, 5, 0).astype(int) - 200)
            <= (2 if kind == "defocus_blur" else 0)
        ).all(), kind
    angles = []
    for seed in range(60):
        rows, columns = np.nonzero(corrupt(point, "motion_blur", 5, seed)[..., 0])
        far = np.argmax(np.hypot(rows - 50, columns - 50))
        angles.append(np.degrees(np.arctan2(rows[far] - 50, columns[far] - 50)))
        assert len(set(columns)) >= 10
    turned = np.abs(np.mod(np.array(angles) + 90, 180) - 90)
    assert turned.max() <= 47
    assert turned.mean() == pytest.approx(22.5, abs=4)


def test_clouds_have_the_spectrum_of_their_decay():
    """Values fill 0 to 1, tile without a seam, and every octave is decay^2 times weaker than the
    one before.
    """
    for decay in (1.4, 2.0):
        ratios = []
        for seed in range(6):
            clouds = corruptions._clouds(256, decay, np.random.default_rng(seed)).astype(float)
            assert (clouds.min(), clouds.max()) == (0, 1)
            assert (
                np.abs(clouds[0] - clouds[-1]).mean() < 3 * np.abs(np.diff(clouds, axis=0)).mean()
            )
            # What the points of a level add to the mean of their neighbours is the random part of
            # that level.
            added = []
            for step in (32, 16, 8, 4):
                half = step // 2
                corners = clouds[::step, ::step]
                rows = corners + np.roll(corners, -1, 0)
                added.append(
                    (clouds[half::step, half::step] - (rows + np.roll(rows, -1, 1)) / 4).std()
                )
            ratios.append(np.array(added[:-1]) / added[1:])
        np.testing.assert_allclose(np.mean(ratios, axis=0), decay**2, rtol=0.12)


def test_frost_is_the_image_behind_ice():
    """Light times the image plus ice times a part of one of five pictures, all of which come up."""
    image = Streets("clear", StreetsOptions(size=(96, 144), val_images=1), train=False)[0]["image"]
    for severity, (light, ice) in enumerate(
        ((1, 0.4), (0.8, 0.6), (0.7, 0.7), (0.65, 0.7), (0.6, 0.75)), 1
    ):
        frozen, alone = (
            corrupt(x, "frost", severity, 3).astype(float) for x in (image, flat(0, (96, 144)))
        )
        np.testing.assert_allclose(frozen, np.clip(light * image + alone, 0, 255), atol=1.01)
        colours = np.array(
            [corrupt(flat(0, (8, 8)), "frost", severity, seed).mean() / ice for seed in range(40)]
        )
        assert colours.std() > 20
    means = np.array([frost_texture(i).mean() for i in range(corruptions.FROSTS)])
    nearest = {int(np.abs(frost_means - means).argmin()) for frost_means in colours}
    assert len(nearest) >= 4


def test_generated_ice_resembles_photographs_of_it():
    """Mean, contrast and fall of the spectrum lie about where the published pictures have theirs;
    no two pictures are alike.
    """
    pictures = [frost_texture(i).astype(float) for i in range(corruptions.FROSTS)]
    radius = np.hypot(*np.meshgrid(np.arange(-128, 128), np.arange(-128, 128)))
    octaves = 2 ** np.arange(7)
    for picture in pictures:
        grey = picture.mean(axis=-1)
        assert 120 <= grey.mean() <= 215
        assert 15 <= grey.std() <= 45
        part = grey[50:306, 100:356]
        power = np.abs(np.fft.fftshift(np.fft.fft2(part - part.mean()))) ** 2
        rings = [power[(radius >= r) & (radius < 2 * r)].mean() for r in octaves]
        assert (
            -2.7 < np.polyfit(np.log(octaves), np.log(rings), 1)[0] < -1.7
        )  # photographs: -2.3 to -2.0
    correlation = np.corrcoef([picture.mean(axis=-1).ravel() for picture in pictures])
    assert np.abs(correlation - np.eye(len(pictures))).max() < 0.35


@pytest.mark.parametrize("size", [(1, 1), (3, 7), (5, 2), (31, 64), (65, 33)])
def test_images_of_any_size(size):
    """Every kind keeps size and type, down to a single pixel."""
    image = np.random.default_rng(0).integers(0, 256, (*size, 3), dtype=np.uint8)
    for kind in ALL_KINDS:
        for severity in (1, 5):
            got = corrupt(image, kind, severity, 0)
            assert (got.shape, got.dtype) == (image.shape, np.uint8), kind


def test_damage_grows_with_severity(data_path):
    """On real images the squared error; of glass blur and frost, not all of whose published
    constants grow, from 1 and 2 to 3 and above.
    """
    files = sorted(data_path("camvid/test").glob("*.jpg"))[::60][:3]
    images = [
        cv2.resize(read_image(str(file)), (240, 180), interpolation=cv2.INTER_AREA)
        for file in files
    ]
    for kind in KINDS:

        def error(severity, kind=kind):
            return np.mean(
                [
                    np.square(corrupt(image, kind, severity, seed).astype(float) - image).mean()
                    for seed, image in enumerate(images)
                ]
            )

        errors = np.array([error(severity) for severity in SEVERITIES])
        assert errors[0] > 30, kind
        grows = (
            errors[2:].min() > 1.2 * errors[:2].max()
            if kind in ("glass_blur", "frost")
            else (np.diff(errors) > 0).all()
        )
        assert grows, (kind, errors)


def test_batches_have_corrupted_copies():
    """Threads and processes give the same copies, from any step; each kind comes up, and all else
    is that of batches without copies. Copies of one image differ from epoch to epoch.
    """
    options = StreetsOptions(size=(32, 64), images=3)
    dataset = open_boxes("clear", root="", train=True, own=None, streets=options)
    sampler = make_sampler(dataset, seed=1)
    kinds = ("contrast", "impulse_noise")

    def run(start: int = 0, **more) -> list[dict[str, np.ndarray]]:
        given = {"corruptions": kinds} | more
        augmentation = Augmentation(crop=(32, 64), flip=0.0)
        return list(
            train_batches(
                dataset,
                sampler,
                augmentation,
                seed=1,
                batch_size=2,
                start=start,
                stop=12,
                max_boxes=50,
                **given,
            )
        )

    whole = run()
    for batches in (run(7), run(7, workers=2)):
        for batch, expected in zip(batches, whole[7:], strict=True):
            assert batch.keys() == expected.keys()
            for key in expected:
                np.testing.assert_array_equal(batch[key], expected[key])
    for batch, expected in zip(whole, run(corruptions=()), strict=True):
        assert batch.keys() - expected.keys() == {"corrupted"}
        for key in expected:
            np.testing.assert_array_equal(batch[key], expected[key])
    images, copies = (
        np.concatenate([batch[key] for batch in whole]) for key in ("image", "corrupted")
    )
    # Impulses leave most values as they are, a contrast of 0.4 or less hardly any.
    same = (images == copies).mean((1, 2, 3))
    noisy = same > 0.6
    assert (noisy | (same < 0.2)).all()
    assert 6 < noisy.sum() < 18
    severities = {
        round(x, 2) for x in copies[~noisy].std((1, 2, 3)) / images[~noisy].std((1, 2, 3))
    }
    assert len(severities) >= 4
    assert len({copy.tobytes() for copy in copies[noisy]}) == noisy.sum()


def test_copies_are_drawn_from_the_generator_alone():
    """The kind, the severity and its noise are those that the same generator draws again, and other
    ones after that.
    """
    image = some_image(20, 30)
    rng = np.random.default_rng((3, 5))
    copies = [random_corruption(image, ALL_KINDS, rng) for _ in range(3)]
    again = np.random.default_rng((3, 5))
    for copy in copies:
        np.testing.assert_array_equal(random_corruption(image, ALL_KINDS, again), copy)
    assert len({copy.tobytes() for copy in copies}) == 3


class Boxes:
    """Two images with a box each, in one of the forms a data root may have."""

    domain = "day"
    labels = None

    def __init__(self, root: str):
        self.root = root

    def __len__(self) -> int:
        return 2

    def size(self, i: int) -> tuple[int, int]:
        return (40, 60)

    def name(self, i: int) -> str:
        return f"{self.root}/day/{i}.png"

    def __getitem__(self, i: int) -> dict[str, np.ndarray]:
        return {
            "image": np.full((40, 60, 3), 128, np.uint8),
            "boxes": np.array([[1, 2, 30, 20]], np.float32),
            "classes": np.array([i], np.int32),
        }


def test_a_corrupted_dataset_is_the_same_everywhere():
    """Noise depends on the file's name, the kind and the severity, not on the data root, the
    process or the order; all else stays.
    """
    one = Corrupted(Boxes("a"), "gaussian_noise", 3)
    other = pickle.loads(pickle.dumps(Corrupted(Boxes("b"), "gaussian_noise", 3)))
    assert (len(one), one.domain, one.size(1), one.name(1)) == (2, "day", (40, 60), "a/day/1.png")
    np.testing.assert_array_equal(one[1]["image"], other[1]["image"])
    np.testing.assert_array_equal(one[1]["image"], one[1]["image"])
    np.testing.assert_array_equal(one[1]["boxes"], [[1, 2, 30, 20]])
    assert one[1]["classes"] == [1]
    images = [
        Corrupted(Boxes("a"), kind, s)[i]["image"]
        for kind in ("gaussian_noise", "shot_noise")
        for s in (3, 4)
        for i in (0, 1)
    ]
    assert len({image.tobytes() for image in images}) == 8
    noise = [image.astype(float).ravel() for image in images[:4]]
    assert (
        np.abs(np.corrcoef(noise) - np.eye(4)).max() < 0.06
    )  # 2 images x 2 severities, independent of one another
    with pytest.raises(ValueError, match="unknown corruption 'gaussian'"):
        Corrupted(Boxes("a"), "gaussian", 1)


def test_a_subset_is_evenly_spread():
    """So many different images from the first on, in order, no gap more than one longer than
    another; never more than there are.
    """
    whole = Streets("fog", StreetsOptions(size=(32, 64), val_images=11), train=False)
    for images in (1, 3, 4, 10):
        names = [int(Subset(whole, images).name(i).split("/")[-1]) for i in range(images)]
        gaps = np.diff([*names, 11])
        assert (len(Subset(whole, images)), names[0]) == (images, 0)
        assert gaps.min() >= 1
        assert np.ptp(gaps) <= 1
    assert len(Subset(whole, 50)) == 11
    np.testing.assert_array_equal(Subset(whole, 4)[2]["image"], whole[5]["image"])
