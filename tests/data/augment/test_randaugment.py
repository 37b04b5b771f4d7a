"""RandAugment: every operation against its formula, pixel by pixel, and the draws."""

import math

import cv2
import numpy as np
import pytest

from jaxdg.data.augment import randaugment
from jaxdg.data.augment.randaugment import GEOMETRY, OPERATIONS, apply
from jaxdg.data.augment.transforms import PAD_COLOR

H = 50
W = 70
PAPER = {
    "identity", "auto_contrast", "equalize", "rotate", "solarize", "color", "posterize",
    "contrast", "brightness", "sharpness", "shear_x", "shear_y", "translate_x", "translate_y",
}  # fmt: skip


def sample() -> dict[str, np.ndarray]:
    """A smooth picture of medium contrast with a rectangle, its label and its box."""
    rng = np.random.default_rng(0)
    image = cv2.resize(
        rng.integers(30, 220, (8, 10, 3), dtype=np.uint8), (W, H), interpolation=cv2.INTER_LINEAR
    )
    label = np.full((H, W), 255, np.uint8)
    label[20:30, 25:45] = 4
    one = np.ones(1, np.bool_)
    return {
        "image": image,
        "label": label,
        "boxes": np.array([[25, 20, 45, 30]], np.float32),
        "classes": np.array([4], np.int32),
        "difficult": one,
        "crowd": ~one,
    }


def grey(image: np.ndarray) -> np.ndarray:
    """ITU-R 601 luma with Pillow's integer weights."""
    return (image.astype(np.int64) @ np.array([19595, 38470, 7471]) + 32768) >> 16


def smooth(image: np.ndarray) -> np.ndarray:
    """A 3x3 mean whose middle counts five times; the border is left as it is."""
    x = image.astype(float)
    result = image.astype(float)
    result[1:-1, 1:-1] = 4 * x[1:-1, 1:-1]
    for dy in range(3):
        for dx in range(3):
            result[1:-1, 1:-1] += x[dy : H - 2 + dy, dx : W - 2 + dx]
    result[1:-1, 1:-1] = np.floor(result[1:-1, 1:-1] / 13 + 0.5)
    return result


def auto_contrast(channel: np.ndarray) -> np.ndarray:
    """Stretched so that the darkest value is 0 and the brightest 255."""
    low = int(channel.min())
    high = int(channel.max())
    return (channel.astype(float) - low) * 255 / (high - low)


def equalize(channel: np.ndarray) -> np.ndarray:
    """Maps every value to its place in the cumulative histogram, in whole steps.

    A step is a 255th of the pixels.
    """
    counts = [int((channel == value).sum()) for value in range(256)]
    step = (sum(counts) - [c for c in counts if c][-1]) // 255
    table = []
    before = step // 2
    for count in counts:
        table.append(min(before // step, 255))
        before += count
    return np.array(table)[channel]


def slow_color(image: np.ndarray, name: str, strength: float) -> np.ndarray:
    """The operation by its definition, in real numbers."""
    x = image.astype(float)
    amount = 1 + 0.9 * strength

    def mixed(other):
        return other + amount * (x - other)

    bits = 8 - int(4 * abs(strength) + 0.5)
    threshold = 256 - round(256 * abs(strength))

    def by_channel(change):
        return np.stack([change(image[..., c]) for c in range(3)], axis=-1)

    results = {
        "identity": lambda: x,
        "auto_contrast": lambda: by_channel(auto_contrast),
        "equalize": lambda: by_channel(equalize),
        "posterize": lambda: x - x % 2 ** (8 - bits),
        "solarize": lambda: np.where(image < threshold, x, 255 - x),
        "brightness": lambda: mixed(0.0),
        "color": lambda: mixed(grey(image)[..., None]),
        "contrast": lambda: mixed(np.floor(grey(image).mean() + 0.5)),
        "sharpness": lambda: mixed(smooth(image)),
    }
    return np.clip(results[name](), 0, 255)


@pytest.mark.parametrize("strength", [-1.0, -0.3, 0.4, 0.9])
@pytest.mark.parametrize("name", sorted(PAPER - set(GEOMETRY)))
def test_colour_operations_equal_their_definitions(name, strength):
    """NumPy versions agree to the rounding of a level; label and boxes are left alone."""
    before = sample()
    got = apply(before, name, strength)
    np.testing.assert_allclose(
        got["image"].astype(float), slow_color(before["image"], name, strength), atol=1.01
    )
    for key in before.keys() - {"image"}:
        np.testing.assert_array_equal(got[key], before[key])
    if name in ("posterize", "solarize", "equalize", "identity"):
        np.testing.assert_array_equal(got["image"], slow_color(before["image"], name, strength))


def source(name: str, strength: float, x: float, y: float) -> tuple[float, float]:
    """The old point of the point x, y of the new picture.

    Coordinates count from the top left corner, y downwards.
    """
    if name == "translate_x":
        return x - 150 / 331 * strength * W, y
    if name == "translate_y":
        return x, y - 150 / 331 * strength * H
    if name == "shear_x":
        return x - 0.3 * strength * y, y
    if name == "shear_y":
        return x, y - 0.3 * strength * x
    angle = math.radians(30 * strength)  # counter-clockwise, as seen
    dx = x - W / 2
    dy = y - H / 2
    return W / 2 + dx * math.cos(angle) - dy * math.sin(angle), H / 2 + dx * math.sin(
        angle
    ) + dy * math.cos(angle)


@pytest.mark.parametrize("strength", [-0.7, 0.25, 1.0])
@pytest.mark.parametrize("name", GEOMETRY)
def test_geometric_operations_move_image_label_and_boxes(name, strength):
    """Image, label and boxes equal a slow version pixel by pixel.

    The image is bilinear amid padding, the label nearest; the box lies around the moved label.
    """
    before = sample()
    padded = np.full((H + 2, W + 2, 3), PAD_COLOR, float)
    padded[1:-1, 1:-1] = before["image"]
    image = np.zeros((H, W, 3))
    label = np.full((H, W), 255)
    for i in range(H):
        for j in range(W):
            x, y = source(name, strength, j + 0.5, i + 0.5)
            if 0 <= x < W and 0 <= y < H:
                label[i, j] = before["label"][int(y), int(x)]
            x = np.clip(x + 0.5, 0, W + 0.999)
            y = np.clip(y + 0.5, 0, H + 0.999)
            top = int(y)
            left = int(x)
            a = y - top
            b = x - left
            upper, lower = (
                padded[r, left] * (1 - b) + padded[r, left + 1] * b for r in (top, top + 1)
            )
            image[i, j] = upper * (1 - a) + lower * a
    got = apply(before, name, strength)
    assert np.abs(got["image"] - image).mean() < 0.6
    np.testing.assert_allclose(got["image"], image, atol=3)
    assert (got["label"] != label).mean() < 0.005  # where a centre falls on an edge
    at = np.argwhere(got["label"] == 4)
    if not len(at):
        assert not len(got["boxes"])
        return
    y0, x0 = at.min(0)
    y1, x1 = at.max(0) + 1
    np.testing.assert_allclose(got["boxes"], [[x0, y0, x1, y1]], atol=1.01)
    assert (got["classes"].tolist(), got["difficult"].tolist(), got["crowd"].tolist()) == (
        [4],
        [True],
        [False],
    )


def test_a_translation_drops_what_leaves():
    """A box moved outside is gone with its fields."""
    before = sample()
    before["boxes"] = np.array([[60, 20, 69, 30]], np.float32)
    got = apply(before, "translate_x", 0.9)
    assert [got[key].shape for key in ("boxes", "classes", "difficult", "crowd")] == [
        (0, 4),
        (0,),
        (0,),
        (0,),
    ]


def test_draws(monkeypatch):
    """The paper's 14 operations are drawn equally often and independently, in both directions.

    Their magnitude is the one that is set.
    """
    assert set(OPERATIONS) == PAPER
    drawn = []
    monkeypatch.setattr(
        randaugment,
        "apply",
        lambda sample, name, strength: drawn.append((name, strength)) or sample,
    )
    for seed in range(2000):
        randaugment.randaugment({}, 2, 7.0, np.random.default_rng(seed))
    names, strengths = zip(*drawn, strict=True)
    assert len(drawn) == 4000
    assert set(strengths) == {-0.7, 0.7}
    assert abs(np.mean(strengths)) < 0.05
    index = np.array([OPERATIONS.index(name) for name in names])
    assert np.abs(np.bincount(index, minlength=14) - 4000 / 14).max() < 5 * (4000 / 14) ** 0.5
    assert abs(np.corrcoef(index[::2], index[1::2])[0, 1]) < 0.08


def test_magnitude_0_changes_nothing_but_what_has_no_magnitude():
    """At magnitude 0 only the two operations that stretch the histogram change an image.

    No operations use no random numbers.
    """
    before = sample()
    for name in OPERATIONS:
        same = (apply(before, name, 0.0)["image"] == before["image"]).all()
        assert same == (name not in ("auto_contrast", "equalize")), name
    rng = np.random.default_rng(0)
    assert randaugment.randaugment(before, 0, 10.0, rng) is before
    assert rng.uniform() == np.random.default_rng(0).uniform()
