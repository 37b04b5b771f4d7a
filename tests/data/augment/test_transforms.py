"""Resize, random scale, crop and flip of images, labels and boxes."""

from fractions import Fraction
import math

import cv2
import numpy as np
import pytest

from jaxdg.data.augment.transforms import (
    BOX_FIELDS,
    PAD_COLOR,
    Augmentation,
    Wanted,
    move_boxes,
    random_crop,
    shortest_side_size,
)


def coordinates(h: int, w: int) -> dict[str, np.ndarray]:
    """An image whose red is the row, green the column and blue 77, with a label mixed of both."""
    y, x = np.mgrid[:h, :w]
    image = np.stack([y, x, np.full((h, w), 77)], axis=-1).astype(np.uint8)
    return {"image": image, "label": ((7 * y + x) % 250).astype(np.uint8)}


def augment(
    sample: dict[str, np.ndarray], seed: int, wanted: Wanted | None = None, **augmentation
) -> dict[str, np.ndarray]:
    return random_crop(sample, Augmentation(**augmentation), np.random.default_rng(seed), wanted)


@pytest.mark.parametrize("flip", [0.0, 1.0])
def test_crop_and_flip_move_label_and_image_alike(flip):
    """At scale 1 each pixel keeps its colour and its label.

    Crops are contiguous, reversed if flipped, and reach every corner.
    """
    sample = coordinates(40, 60)
    corners = set()
    for seed in range(300):
        got = augment(sample, seed, crop=(37, 55), scale=(1.0, 1.0), flip=flip)
        y = got["image"][..., 0].astype(int)
        x = got["image"][..., 1].astype(int)
        np.testing.assert_array_equal(got["image"][..., 2], 77)
        np.testing.assert_array_equal(got["label"], (7 * y + x) % 250)
        assert (np.diff(y, axis=0) == 1).all()
        assert (np.diff(x, axis=1) == (-1 if flip else 1)).all()
        corners.add((y.min(), x.min()))
    assert corners == {(y, x) for y in range(4) for x in range(6)}


def test_flip_has_its_probability():
    """With probability 1/4 a quarter of the crops is flipped."""
    sample = coordinates(8, 8)
    flipped = [
        augment(sample, s, crop=(8, 8), scale=(1.0, 1.0), flip=0.25)["image"][0, 0, 1] == 7
        for s in range(2000)
    ]
    assert 0.21 < np.mean(flipped) < 0.29


def slow(sample: dict[str, np.ndarray], h: int, w: int) -> tuple[np.ndarray, np.ndarray]:
    """The whole image resized to h x w pixel by pixel: bilinear, the label by its centre."""
    image = sample["image"].astype(float)
    label = sample["label"]
    old_h, old_w = label.shape
    new_image = np.zeros((h, w, 3))
    new_label = np.zeros((h, w), np.uint8)
    for i in range(h):
        for j in range(w):
            y = (i + 0.5) * old_h / h
            x = (
                (j + 0.5) * old_w / w
            )  # the centre, in source coordinates where pixel 0 spans 0 to 1
            new_label[i, j] = label[int(y), int(x)]
            y = np.clip(y - 0.5, 0, old_h - 1)
            x = np.clip(x - 0.5, 0, old_w - 1)
            top = int(y)
            left = int(x)
            bottom = min(top + 1, old_h - 1)
            right = min(left + 1, old_w - 1)
            a = y - top
            b = x - left
            upper = image[top, left] * (1 - b) + image[top, right] * b
            lower = image[bottom, left] * (1 - b) + image[bottom, right] * b
            new_image[i, j] = upper * (1 - a) + lower * a
    return new_image, new_label


@pytest.mark.parametrize("scale", [0.5, 0.73, 1.0, 1.6, 2.0])
def test_resize_equals_a_slow_version(scale):
    """Image and label equal a slow resize between pixel centres, at any scale and crop."""
    rng = np.random.default_rng(1)
    image = cv2.GaussianBlur(rng.integers(0, 256, (30, 44, 3), dtype=np.uint8), (0, 0), 2)
    sample = {"image": image, "label": rng.integers(0, 19, (30, 44), dtype=np.uint8)}
    h = round(30 * scale)
    w = round(44 * scale)
    expected_image, expected_label = slow(sample, h, w)
    whole = augment(sample, 0, crop=(h, w), scale=(scale, scale), flip=0.0)
    np.testing.assert_array_equal(whole["label"], expected_label)
    np.testing.assert_allclose(whole["image"].astype(float), expected_image, atol=1.5)
    part = augment(sample, 3, crop=(h // 2, w // 2), scale=(scale, scale), flip=0.0)
    windows = np.lib.stride_tricks.sliding_window_view(expected_label, (h // 2, w // 2))
    ((y, x),) = np.argwhere((windows == part["label"]).all((2, 3)))
    assert (y, x) != (0, 0)
    np.testing.assert_allclose(
        part["image"].astype(float), expected_image[y : y + h // 2, x : x + w // 2], atol=1.5
    )


@pytest.mark.parametrize("scale", [0.5, 0.6, 1.0, 1.7, 2.0])
def test_labels_stay_under_their_pixels_at_every_scale(scale):
    """A bright disc and its label keep the same centre of mass.

    Neither is shifted by half a pixel against the other. Halving is the worst case: the centre of a
    new pixel lies between old ones, and the nearest is half an old, a quarter new pixel off.
    """
    y, x = np.mgrid[:80, :120]
    disc = (y - 33.3) ** 2 + (x - 70.7) ** 2 < 20**2
    sample = {
        "image": np.repeat((255 * disc)[..., None], 3, -1).astype(np.uint8),
        "label": disc.astype(np.uint8),
    }
    got = augment(
        sample, 0, crop=(round(80 * scale), round(120 * scale)), scale=(scale, scale), flip=0.0
    )
    at = np.mgrid[: got["label"].shape[0], : got["label"].shape[1]]
    by_image, by_label = (
        (at * w).sum((1, 2)) / w.sum()
        for w in (got["image"][..., 0].astype(float), got["label"].astype(float))
    )
    np.testing.assert_allclose(by_image, by_label, atol=0.3 if scale == 0.5 else 0.15)


def test_small_images_lie_anywhere_in_the_crop_amid_ignored_pixels():
    """The image appears once and complete; the rest is the constant colour with label 255."""
    sample = coordinates(10, 12)
    places = set()
    for seed in range(200):
        got = augment(sample, seed, crop=(13, 12), scale=(1.0, 1.0), flip=0.0)
        inside = got["image"][..., 2] == 77
        assert inside.sum() == 120
        np.testing.assert_array_equal(
            got["image"][~inside], np.broadcast_to(np.array(PAD_COLOR, np.uint8), (36, 3))
        )
        assert (got["label"][~inside] == 255).all()
        np.testing.assert_array_equal(got["label"][inside], sample["label"].ravel())
        places.add(int(np.argmax(inside.any(1))))
    assert places == {0, 1, 2, 3}


def test_scale_is_uniform():
    """Factors cover the range evenly, as the width of a stripe in the crop shows."""
    label = np.zeros((100, 100), np.uint8)
    label[:, :50] = 1
    sample = {"image": np.zeros((100, 100, 3), np.uint8), "label": label}
    widths = [
        (augment(sample, s, crop=(200, 200), scale=(0.5, 2.0), flip=0.0)["label"] == 1).any(0).sum()
        for s in range(800)
    ]
    counts, _ = np.histogram(widths, bins=6, range=(25, 100))
    assert counts.sum() == 800
    assert counts.min() > 95
    assert counts.max() < 175


def test_crops_of_one_class_are_drawn_again():
    """With a share limit, crops that one class dominates are rare; ignored pixels do not count."""
    label = np.zeros((64, 64), np.uint8)
    label[:, 40:] = 1
    label[:, 32:40] = 255
    sample = {"image": np.zeros((64, 64, 3), np.uint8), "label": label}

    def share(max_class_share: float, seed: int) -> float:
        crop = augment(sample, seed, crop=(24, 24), max_class_share=max_class_share)["label"]
        counts = np.bincount(crop[crop != 255], minlength=2)
        return counts.max() / counts.sum()

    free = np.mean([share(1.0, s) > 0.75 for s in range(300)])
    limited = np.mean([share(0.75, s) > 0.75 for s in range(300)])
    assert free > 0.5
    assert limited < 0.2 * free


def test_same_generator_same_crop():
    """The generator is the only source of randomness, and the sample does not change."""
    sample = coordinates(30, 40)
    before = {k: v.copy() for k, v in sample.items()}

    def draw(seed):
        return augment(sample, seed, crop=(16, 16), scale=(0.5, 2.0))

    for key in before:
        np.testing.assert_array_equal(draw(5)[key], draw(5)[key])
        np.testing.assert_array_equal(sample[key], before[key])
    assert (draw(5)["image"] != draw(6)["image"]).any()


@pytest.mark.parametrize("found", [0, 4, 9, None])
def test_tries_are_mmsegmentations(found):
    """The first good of ten crops is taken, else an eleventh without a check.

    Given the draws, the crop is known. A crop is good if more than one labelled class shows and
    none covers the share or more, as in `cat_max_ratio`.
    """
    label = (
        np.arange(40, dtype=np.uint8).repeat(3).reshape(1, 120).repeat(8, 0)
    )  # column x shows class x // 3
    sample = {"image": np.zeros((8, 120, 3), np.uint8), "label": label}

    def draws(seed):
        return [int(x) for x in drawn_offsets(np.random.default_rng(seed), 11)]

    def good(offset):
        return (
            offset % 3 == 1
        )  # four columns of shares 1/2, 1/2; any other offset shows one class 3 times or more

    def at(offsets):
        return next((i for i, x in enumerate(offsets[:10]) if good(x)), None)

    seed = next(s for s in range(10000) if at(draws(s)) == found)
    offset = draws(seed)[10 if found is None else found]
    got = augment(sample, seed, crop=(8, 4), flip=0.0, max_class_share=0.51)
    np.testing.assert_array_equal(got["label"], label[:, offset : offset + 4])
    got = augment(
        sample, seed, crop=(8, 4), flip=0.0, max_class_share=0.5
    )  # reaching the share is too much
    np.testing.assert_array_equal(got["label"], label[:, draws(seed)[10] : draws(seed)[10] + 4])


def drawn_offsets(rng: np.random.Generator, count: int):
    """The columns of a seed's crops; each crop draws scale, row and column."""
    rng.uniform()
    for _ in range(count):
        rng.integers(1)
        yield rng.integers(117)


@pytest.mark.parametrize("resize", [None, (60, 90)])
def test_crops_show_what_is_wanted(resize):
    """A wanted class shows in nearly all crops, although few random crops show enough of it.

    Its pixels count at the size of the file.
    """
    label = np.zeros((40, 120), np.uint8)
    label[10:20, 50:60] = 7  # 100 pixels; 112.5 when resized
    sample = {"image": np.zeros((40, 120, 3), np.uint8), "label": label}

    def shown(seed, wanted):
        return (augment(sample, seed, wanted, crop=(24, 24), resize=resize)["label"] == 7).sum()

    pixels = 56 if resize else 50
    free = np.mean([shown(s, None) >= pixels for s in range(200)])
    wanted = np.mean([shown(s, Wanted(7, 50)) >= pixels for s in range(200)])
    assert free < 0.3
    assert wanted == pytest.approx(
        1 - (1 - free) ** 11, abs=0.1
    )  # one of eleven crops, the last as it comes
    assert wanted > 2 * free


@pytest.mark.parametrize("size", [(720, 1280), (300, 400)])
def test_resize_is_that_of_opencv_and_leaves_the_ratio(size):
    """An image of GTA5's size, resized by cv2 and cropped, gives the same crop up to rounding."""
    rng = np.random.default_rng(0)
    image = cv2.resize(rng.integers(0, 256, (131, 239, 3), dtype=np.uint8), (1914, 1052))
    image = np.clip(image + rng.integers(-20, 21, image.shape), 0, 255).astype(np.uint8)
    got = augment(
        {"image": image, "label": image[..., 0]}, 0, crop=(256, 320), resize=size, flip=0.0
    )
    whole = cv2.resize(image, size[::-1], interpolation=cv2.INTER_LINEAR)
    draws = np.random.default_rng(0)
    draws.uniform()
    y, x = (int(draws.integers(n - c + 1)) for n, c in zip(size, (256, 320), strict=True))
    assert np.abs(got["image"].astype(int) - whole[y : y + 256, x : x + 320]).max() <= 1
    rows, columns = (
        (2 * np.arange(s, s + c) + 1) * o // (2 * n)
        for s, c, o, n in zip((y, x), (256, 320), (1052, 1914), size, strict=True)
    )
    np.testing.assert_array_equal(got["label"], image[..., 0][np.ix_(rows, columns)])


@pytest.mark.parametrize("size", [(30, 60), (60, 30), (200, 150)])
def test_large_scale_jitter_fits_the_image_and_scales_it(size):
    """Factor s gives s times the largest size that fits the crop, as detectron2's ResizeScale."""
    sample = {"image": np.full((*size, 3), 9, np.uint8), "label": np.full(size, 3, np.uint8)}
    sides = []
    for seed in range(60):
        got = augment(
            sample,
            seed,
            crop=(64, 64),
            resize=(64, 64),
            keep_ratio=True,
            scale=(0.1, 2.0),
            flip=0.0,
        )
        factor = np.random.default_rng(seed).uniform(0.1, 2.0)
        fit = 64 * factor / max(size)
        expected = [min(64, round(n * fit)) for n in size]
        inside = got["label"] == 3
        assert [inside.any(1).sum(), inside.any(0).sum()] == expected
        assert inside.sum() == np.prod(expected)
        assert (got["image"][inside] == 9).all()
        sides.append(max(expected))
    assert min(sides) < 12
    assert max(sides) == 64


# The sides that Rein and SoMA draw from for crops of 512: 0.5 to 2 times 512, rounded down.
REIN = (256, 307, 358, 409, 460, 512, 563, 614, 665, 716, 768, 819, 870, 921, 972, 1024)


def fitted(size: tuple[int, int], box: list[Fraction]) -> list[Fraction]:
    """The largest size of the ratio of `size` whose sides fit the sides of a box, either way."""
    return [n * min(max(box) / max(size), min(box) / min(size)) for n in size]


def half_up(size: list[Fraction]) -> tuple[int, ...]:
    return tuple(math.floor(n + Fraction(1, 2)) for n in size)


def test_shortest_sides_give_the_published_sizes():
    """GTA5's images at Rein's 16 sides, and any size in exact fractions: the side is met, or the
    longest one; rounded, and fitted to what was rounded, as mmsegmentation's two steps do.
    """
    wide = [466, 559, 651, 744, 837, 932, 1024, 1117, 1210, 1303, 1397, 1490, 1583, 1676, 1768]
    for side, width in zip(REIN, (*wide, 1863), strict=True):
        assert shortest_side_size((1052, 1914), side, 2048) == (side, width)
    rng = np.random.default_rng(0)
    capped = 0
    for _ in range(3000):
        size = tuple(rng.integers(40, 4000, 2).tolist())
        side = int(rng.choice(REIN))
        longest = int(rng.choice((1024, 2048)))
        box = fitted(size, [Fraction(side), Fraction(longest)])
        # Fitting a box of the longest side and the shorter one is the same as capping.
        assert max(box) == longest or min(box) == side
        exact = fitted(size, [Fraction(n) for n in half_up(box)])
        if any(n % 1 == Fraction(1, 2) for n in box + exact):
            continue  # floats round it either way
        assert shortest_side_size(size, side, longest) == half_up(exact)
        capped += max(box) == longest
    assert 500 < capped < 2500
    assert shortest_side_size((300, 900), 100, None) == (100, 300)
    assert shortest_side_size((64, 64), 96, None) == (96, 96)


@pytest.mark.parametrize("flip", [0.0, 1.0])
@pytest.mark.parametrize("size", [(61, 97), (97, 61)])
def test_shortest_sides_and_padding_equal_a_slow_pipeline(size, flip):
    """Given the draws: OpenCV's whole image cut, then mirrored, then padded on the right and at the
    bottom; `inside` says where the image ends.
    """
    rng = np.random.default_rng(1)
    image = cv2.GaussianBlur(rng.integers(0, 256, (*size, 3), dtype=np.uint8), (0, 0), 2)
    sample = {"image": image, "label": rng.integers(0, 19, size, dtype=np.uint8)}
    sides = (24, 40, 64, 90)
    crop = (48, 56)
    drawn = []
    for seed in range(60):
        options = dict(shortest_sides=sides, longest_side=130, padding="corner", flip=flip)
        got = augment(sample, seed, crop=crop, **options)
        draws = np.random.default_rng(seed)
        side = sides[draws.integers(4)]
        new = shortest_side_size(size, side, 130)
        y, x = (
            int(draws.integers(n - c + 1)) if n >= c else 0 for n, c in zip(new, crop, strict=True)
        )
        whole = cv2.resize(image, new[::-1], interpolation=cv2.INTER_LINEAR)
        rows, columns = (
            [(2 * i + 1) * o // (2 * n) for i in range(n)] for o, n in zip(size, new, strict=True)
        )
        cut = slice(y, y + crop[0]), slice(x, x + crop[1])
        expected_image = whole[cut]
        expected_label = sample["label"][rows][:, columns][cut]
        if flip:
            expected_image = expected_image[:, ::-1]
            expected_label = expected_label[:, ::-1]
        h, w = expected_label.shape
        np.testing.assert_array_equal(got["inside"], [h, w])
        assert got["inside"].dtype == np.int32
        off = np.abs(got["image"][:h, :w].astype(int) - expected_image)
        assert off.max() <= 2
        assert off.mean() < 0.3
        np.testing.assert_array_equal(got["label"][:h, :w], expected_label)
        for outside in (got["label"][h:], got["label"][:, w:]):
            assert (outside == 255).all()
        drawn.append(side)
        if side >= 64:
            assert (h, w) == crop
    assert set(drawn) == set(sides)


def test_sides_are_drawn_evenly():
    """Each of four sides makes a quarter of the crops, as the label's height shows."""
    sample = {"image": np.zeros((20, 20, 3), np.uint8), "label": np.zeros((20, 20), np.uint8)}
    heights = [
        int(
            augment(sample, s, crop=(9, 9), shortest_sides=(2, 4, 6, 8), padding="corner")[
                "inside"
            ][0]
        )
        for s in range(800)
    ]
    counts = np.bincount(heights, minlength=10)[[2, 4, 6, 8]]
    assert counts.sum() == 800
    assert 160 < counts.min() <= counts.max() < 240


def slow_rare_crop(label: np.ndarray, rng: np.random.Generator, enough: float):
    """The crop of 16 x 16 by DAFormer's rule, for class 7, and the number of draws before it."""
    for draws in range(11):
        factor = rng.uniform(0.5, 1.5)
        new = [round(n * factor) for n in label.shape]
        rows, columns = (
            [(2 * i + 1) * o // (2 * n) for i in range(n)]
            for o, n in zip(label.shape, new, strict=True)
        )
        resized = label[rows][:, columns]
        # Where the resized image is smaller it lies anywhere in the crop.
        y, x = (int(rng.integers(abs(n - 16) + 1)) for n in new)
        crop = np.full((16, 16), 255, np.uint8)
        if new[0] >= 16:
            crop[:] = resized[y : y + 16, x : x + 16]
        else:
            crop[y : y + new[0]] = resized[:, x : x + 16]
        if (crop == 7).sum() > enough or draws == 10:
            return crop, draws
    raise AssertionError


@pytest.mark.parametrize("ratio", [0.5, 2.0])
def test_crops_of_rare_classes_are_drawn_as_daformers(ratio):
    """Given the draws: up to ten resizes and crops until more than ratio times the wanted pixels
    show in the crop, then an eleventh as it comes.
    """
    label = np.zeros((24, 60), np.uint8)
    label[4:12, 20:28] = 7
    sample = {"image": np.zeros((24, 60, 3), np.uint8), "label": label}
    options = dict(crop=(16, 16), scale=(0.5, 1.5), flip=0.0, rare_class_min_crop_ratio=ratio)
    drawn = set()
    for seed in range(150):
        expected, draws = slow_rare_crop(label, np.random.default_rng(seed), 25 * ratio)
        got = augment(sample, seed, Wanted(7, 25), **options)
        np.testing.assert_array_equal(got["label"], expected)
        drawn.add(draws)
    assert {0, 3, 10} <= drawn


@pytest.mark.parametrize(("shown", "crops"), [(50, 11), (51, 1)])
def test_exactly_the_ratio_of_pixels_is_too_little(shown, crops):
    """A crop with twice the wanted pixels is drawn eleven times, one with a pixel more once."""
    label = np.zeros((10, 10), np.uint8)
    label.ravel()[:shown] = 7
    rng = np.random.default_rng(0)
    random_crop(
        {"image": np.zeros((10, 10, 3), np.uint8), "label": label},
        Augmentation((10, 10), rare_class_min_crop_ratio=2.0),
        rng,
        Wanted(7, 25),
    )
    expected = np.random.default_rng(0)
    for _ in range(crops):
        expected.uniform()
        expected.integers(1)
        expected.integers(1)
    expected.uniform()  # the flip
    assert rng.uniform() == expected.uniform()


def drawn_boxes(label: np.ndarray) -> np.ndarray:
    """Boxes around the ids of an image: the edges of the first and last pixels."""
    boxes = []
    for i in np.unique(label[label != 255]):
        y, x = np.nonzero(label == i)
        boxes.append([x.min(), y.min(), x.max() + 1, y.max() + 1])
    return np.array(boxes, np.float32)


def drawn_sides(label: np.ndarray, i: int) -> list[int]:
    inside = label == i
    return [int(inside.any(1).sum()), int(inside.any(0).sum())]


def rectangles(h: int = 90, w: int = 120) -> dict[str, np.ndarray]:
    """A grid of 12 rectangles of several sizes, as a label map of their numbers and as boxes."""
    label = np.full((h, w), 255, np.uint8)
    for i in range(12):
        y = 30 * (i // 4)
        x = 30 * (i % 4)
        label[y + 3 : y + 12 + i, x + 4 : x + 24 - i] = i
    n = np.arange(12)
    fields = {
        "boxes": drawn_boxes(label),
        "classes": n.astype(np.int32),
        "difficult": n % 2 == 0,
        "crowd": n % 3 == 0,
    }
    return {"image": np.repeat(label[..., None], 3, -1), "label": label, **fields}


@pytest.mark.parametrize(
    "augmentation",
    [
        {"flip": 0.0},
        {"flip": 1.0},
        {"resize": (135, 200), "flip": 1.0},
        {"scale": (0.4, 2.0), "flip": 0.5},
        {"resize": (80, 80), "keep_ratio": True, "scale": (0.3, 2.0)},
        {"shortest_sides": (30, 66, 120), "longest_side": 150, "padding": "corner"},
    ],
)
def test_boxes_stay_around_their_pixels(augmentation):
    """The boxes of a crop lie around its labels, up to the rounding of a pixel."""
    sample = rectangles()
    clipped = 0
    lost = 0
    for seed in range(40):
        got = augment(sample, seed, crop=(70, 64), **augmentation)
        ids = got["classes"]
        visible = np.unique(got["label"][got["label"] != 255])
        # Only slivers of less than a pixel, with or without a pixel's centre, may be in one and not
        # in the other.
        assert all(min(drawn_sides(got["label"], i)) <= 1 for i in set(visible) - set(ids))
        for i, box in zip(ids, got["boxes"], strict=True):
            if i not in visible:
                assert min(box[2:] - box[:2]) < 2
                continue
            around = drawn_boxes(np.where(got["label"] == i, np.uint8(i), np.uint8(255)))[0]
            np.testing.assert_allclose(box, around, atol=0.5 + 1e-3)
        np.testing.assert_array_equal(got["difficult"], ids % 2 == 0)
        np.testing.assert_array_equal(got["crowd"], ids % 3 == 0)
        assert (got["boxes"][:, :2] >= 0).all()
        assert (got["boxes"] <= np.array([64, 70, 64, 70])).all()
        assert {
            key: (value.dtype, value.shape[1:]) for key, value in got.items() if key in BOX_FIELDS
        } == {key: (np.dtype(dtype), shape) for key, (shape, dtype) in BOX_FIELDS.items()}
        clipped = clipped + (got["boxes"][:, 0] == 0).sum()
        lost = lost + 12 - len(ids)
    assert clipped
    assert lost


def test_boxes_of_less_than_a_pixel_are_dropped():
    """A clipped box of a pixel or more stays; thinner ones and those outside go with all fields."""
    boxes = np.array(
        [
            [-5, 0, 1, 9],
            [-5, 0, 0.9, 9],
            [3, 9, 9, 12],
            [3, 9.5, 9, 12],
            [20, 2, 30, 5],
            [0, 0, 10, 10],
        ],
        np.float32,
    )
    n = np.arange(6)
    sample = {"boxes": boxes, "classes": n.astype(np.int32), "difficult": n > 2, "crowd": n < 2}
    got = move_boxes(sample, np.array([[1.0, 0, 0], [0, 1, 0]]), (10, 10))
    np.testing.assert_array_equal(got["classes"], [0, 2, 5])
    np.testing.assert_array_equal(got["boxes"], [[0, 0, 1, 9], [3, 9, 9, 10], [0, 0, 10, 10]])
    np.testing.assert_array_equal(got["difficult"], [False, False, True])
    np.testing.assert_array_equal(got["crowd"], [True, False, False])
    np.testing.assert_allclose(got["areas"], [9, 6, 100])  # those of the boxes, where none are told
    none = move_boxes({key: value[:0] for key, value in sample.items()}, np.eye(2, 3), (10, 10))
    assert none["boxes"].shape == (0, 4)


def test_areas_follow_their_boxes():
    """An area is scaled like the picture and clipped like its box; without change it is exact."""
    sample = {
        "boxes": np.array([[0, 0, 10, 10], [2, 3, 8, 6]], np.float32),
        "classes": np.zeros(2, np.int32),
    }
    sample |= {
        "difficult": np.zeros(2, bool),
        "crowd": np.zeros(2, bool),
        "areas": np.array([33.3, 5], np.float32),
    }
    same = move_boxes(sample, np.eye(2, 3), (10, 10))
    np.testing.assert_array_equal(same["areas"], sample["areas"])
    twice = move_boxes(sample, np.array([[2.0, 0, 0], [0, 3, 0]]), (30, 20))
    np.testing.assert_allclose(twice["areas"], 6 * sample["areas"], rtol=1e-6)
    half = move_boxes(sample, np.array([[1.0, 0, -5], [0, 1, 0]]), (10, 10))
    np.testing.assert_allclose(half["areas"], [33.3 / 2, 5 * 3 / 6], rtol=1e-6)
