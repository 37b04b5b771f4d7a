"""Random resize, crop and flip."""

import cv2
import numpy as np
import pytest

from jaxdg.data.transforms import PAD_COLOR, augment


def coordinates(h: int, w: int) -> dict[str, np.ndarray]:
    """An image that says where each pixel was: red = row, green = column, blue = 77; the label is a mixture of both."""
    y, x = np.mgrid[:h, :w]
    image = np.stack([y, x, np.full((h, w), 77)], axis=-1).astype(np.uint8)
    return {"image": image, "label": ((7 * y + x) % 250).astype(np.uint8)}


def plain(seed: int) -> np.random.Generator:
    return np.random.default_rng(seed)


@pytest.mark.parametrize("flip", [0.0, 1.0])
def test_crop_and_flip_move_label_and_image_alike(flip):
    """At scale 1 each pixel keeps its colour and its label; crops are contiguous, reversed where flipped, and reach every corner."""
    sample = coordinates(40, 60)
    corners = set()
    for seed in range(300):
        got = augment(sample, rng=plain(seed), crop=(37, 55), scale=(1.0, 1.0), flip=flip)
        y, x = got["image"][..., 0].astype(int), got["image"][..., 1].astype(int)
        np.testing.assert_array_equal(got["image"][..., 2], 77)
        np.testing.assert_array_equal(got["label"], (7 * y + x) % 250)
        assert (np.diff(y, axis=0) == 1).all()
        assert (np.diff(x, axis=1) == (-1 if flip else 1)).all()
        corners.add((y.min(), x.min()))
    assert corners == {(y, x) for y in range(4) for x in range(6)}


def test_flip_has_its_probability():
    """A quarter of the crops is flipped when asked for a quarter."""
    sample = coordinates(8, 8)
    flipped = [augment(sample, rng=plain(s), crop=(8, 8), scale=(1.0, 1.0), flip=0.25)["image"][0, 0, 1] == 7 for s in range(2000)]
    assert 0.21 < np.mean(flipped) < 0.29


def slow(sample: dict[str, np.ndarray], h: int, w: int) -> tuple[np.ndarray, np.ndarray]:
    """The whole image resized to h x w, pixel by pixel: bilinear between pixel centres, and the label under each centre."""
    image, label = sample["image"].astype(float), sample["label"]
    old_h, old_w = label.shape
    new_image, new_label = np.zeros((h, w, 3)), np.zeros((h, w), np.uint8)
    for i in range(h):
        for j in range(w):
            y, x = (i + 0.5) * old_h / h, (j + 0.5) * old_w / w  # the centre, in source coordinates where pixel 0 spans 0 to 1
            new_label[i, j] = label[int(y), int(x)]
            y, x = np.clip(y - 0.5, 0, old_h - 1), np.clip(x - 0.5, 0, old_w - 1)
            top, left = int(y), int(x)
            bottom, right = min(top + 1, old_h - 1), min(left + 1, old_w - 1)
            a, b = y - top, x - left
            upper = image[top, left] * (1 - b) + image[top, right] * b
            lower = image[bottom, left] * (1 - b) + image[bottom, right] * b
            new_image[i, j] = upper * (1 - a) + lower * a
    return new_image, new_label


@pytest.mark.parametrize("scale", [0.5, 0.73, 1.0, 1.6, 2.0])
def test_resize_equals_a_slow_version(scale):
    """Image and label agree with a per-pixel resize between pixel centres, at any scale, whole and cropped."""
    rng = np.random.default_rng(1)
    image = cv2.GaussianBlur(rng.integers(0, 256, (30, 44, 3), dtype=np.uint8), (0, 0), 2)
    sample = {"image": image, "label": rng.integers(0, 19, (30, 44), dtype=np.uint8)}
    h, w = round(30 * scale), round(44 * scale)
    expected_image, expected_label = slow(sample, h, w)
    whole = augment(sample, rng=plain(0), crop=(h, w), scale=(scale, scale), flip=0.0)
    np.testing.assert_array_equal(whole["label"], expected_label)
    np.testing.assert_allclose(whole["image"].astype(float), expected_image, atol=1.5)
    part = augment(sample, rng=plain(3), crop=(h // 2, w // 2), scale=(scale, scale), flip=0.0)
    windows = np.lib.stride_tricks.sliding_window_view(expected_label, (h // 2, w // 2))
    ((y, x),) = np.argwhere((windows == part["label"]).all((2, 3)))
    assert (y, x) != (0, 0)
    np.testing.assert_allclose(part["image"].astype(float), expected_image[y : y + h // 2, x : x + w // 2], atol=1.5)


@pytest.mark.parametrize("scale", [0.5, 0.6, 1.0, 1.7, 2.0])
def test_labels_stay_under_their_pixels_at_every_scale(scale):
    """A bright disc and its label keep the same centre of mass: neither is shifted by half a pixel against the other.

    Halving is the worst case: the centre of a new pixel lies between old ones and the nearest is half an old, a quarter new pixel away.
    """
    y, x = np.mgrid[:80, :120]
    disc = (y - 33.3) ** 2 + (x - 70.7) ** 2 < 20**2
    sample = {"image": np.repeat((255 * disc)[..., None], 3, -1).astype(np.uint8), "label": disc.astype(np.uint8)}
    got = augment(sample, rng=plain(0), crop=(round(80 * scale), round(120 * scale)), scale=(scale, scale), flip=0.0)
    at = np.mgrid[: got["label"].shape[0], : got["label"].shape[1]]
    by_image, by_label = ((at * w).sum((1, 2)) / w.sum() for w in (got["image"][..., 0].astype(float), got["label"].astype(float)))
    np.testing.assert_allclose(by_image, by_label, atol=0.3 if scale == 0.5 else 0.15)


def test_small_images_lie_anywhere_in_the_crop_amid_ignored_pixels():
    """Nothing is lost or invented: the image appears once, the rest is the constant colour with label 255."""
    sample = coordinates(10, 12)
    places = set()
    for seed in range(200):
        got = augment(sample, rng=plain(seed), crop=(13, 12), scale=(1.0, 1.0), flip=0.0)
        inside = got["image"][..., 2] == 77
        assert inside.sum() == 120
        np.testing.assert_array_equal(got["image"][~inside], np.broadcast_to(np.array(PAD_COLOR, np.uint8), (36, 3)))
        assert (got["label"][~inside] == 255).all()
        np.testing.assert_array_equal(got["label"][inside], sample["label"].ravel())
        places.add(int(np.argmax(inside.any(1))))
    assert places == {0, 1, 2, 3}


def test_scale_is_uniform():
    """Factors cover the range evenly: a stripe's width in the crop is its width times the factor."""
    label = np.zeros((100, 100), np.uint8)
    label[:, :50] = 1
    sample = {"image": np.zeros((100, 100, 3), np.uint8), "label": label}
    widths = [(augment(sample, rng=plain(s), crop=(200, 200), scale=(0.5, 2.0), flip=0.0)["label"] == 1).any(0).sum() for s in range(800)]
    counts, _ = np.histogram(widths, bins=6, range=(25, 100))
    assert counts.sum() == 800
    assert counts.min() > 95
    assert counts.max() < 175


def test_crops_of_one_class_are_drawn_again():
    """With a share limit, crops where one class covers more become rare; ignored pixels do not count."""
    label = np.zeros((64, 64), np.uint8)
    label[:, 40:] = 1
    label[:, 32:40] = 255
    sample = {"image": np.zeros((64, 64, 3), np.uint8), "label": label}

    def share(max_class_share: float, seed: int) -> float:
        crop = augment(sample, rng=plain(seed), crop=(24, 24), scale=(1.0, 1.0), max_class_share=max_class_share)["label"]
        counts = np.bincount(crop[crop != 255], minlength=2)
        return counts.max() / counts.sum()

    free = np.mean([share(1.0, s) > 0.75 for s in range(300)])
    limited = np.mean([share(0.75, s) > 0.75 for s in range(300)])
    assert free > 0.5
    assert limited < 0.2 * free


def test_same_generator_same_crop():
    """All randomness comes from the given generator, and the sample is left as it was."""
    sample = coordinates(30, 40)
    before = {k: v.copy() for k, v in sample.items()}
    draw = lambda seed: augment(sample, rng=plain(seed), crop=(16, 16), scale=(0.5, 2.0))
    for key in before:
        np.testing.assert_array_equal(draw(5)[key], draw(5)[key])
        np.testing.assert_array_equal(sample[key], before[key])
    assert (draw(5)["image"] != draw(6)["image"]).any()
