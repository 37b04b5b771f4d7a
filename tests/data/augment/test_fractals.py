"""Pictures: fractals against a slow drawing of them, and files of a folder."""

import cv2
import numpy as np
from PIL import Image
import pytest

from jaxdg.data.augment import fractals
from jaxdg.data.augment.fractals import Pictures, attractor, generate, random_maps, waves


def test_maps_bring_points_together():
    """For every number of maps all singular values are below 1.

    Their weighted sum lies in the stated range. The values are computed from the matrices.
    """
    counts = set()
    for seed in range(200):
        matrices, shifts = random_maps(np.random.default_rng(seed))
        n = len(matrices)
        values = np.linalg.svd(matrices, compute_uv=False)
        assert values.max() < 1
        assert (5 + n) / 2 - 1e-9 <= np.sum(values[:, 0] + 2 * values[:, 1]) <= (6 + n) / 2 + 1e-9
        assert np.abs(shifts).max() <= 1
        counts.add(n)
    assert counts == set(range(2, 9))


def test_the_attractor_is_where_single_points_jump_to(monkeypatch):
    """Points moved one by one in double precision give the same density and colours."""
    monkeypatch.setattr(fractals, "WALKERS", 512)
    for seed in range(2):
        matrices, shifts = random_maps(np.random.default_rng(seed))
        cover, color = attractor(matrices, shifts, np.random.default_rng(7))
        rng = np.random.default_rng(7)
        weight = np.maximum(np.abs(np.linalg.det(matrices)), 0.01)
        chosen = rng.choice(
            len(matrices), (fractals.FIRST + fractals.STEPS, 512), p=weight / weight.sum()
        )
        steps = []
        own = np.linspace(0, 1, len(matrices))
        point = [np.zeros(2)] * 512
        shade = [0.5] * 512
        for row in chosen:
            for i, k in enumerate(row):
                point[i] = matrices[k] @ point[i] + shifts[k]
                shade[i] = (shade[i] + own[k]) / 2
            steps.append([(*p, s) for p, s in zip(point, shade, strict=True)])
        x, y, shades = np.array(steps[fractals.FIRST :]).reshape(-1, 3).T
        beyond = rng.uniform(0.01, 0.2)
        count = np.zeros((256, 256))
        total = np.zeros((256, 256))
        every = len(x) // 4096
        ranges = [np.quantile(part[::every], (beyond, 1 - beyond)) for part in (y, x)]
        for xi, yi, s in zip(x, y, shades, strict=True):
            row, column = (
                int((v - low) * 256 / (high - low)) if v >= low else -1
                for v, (low, high) in zip((yi, xi), ranges, strict=True)
            )
            if 0 <= row < 256 and 0 <= column < 256:
                count[row, column] += 1
                total[row, column] += s
        count = cv2.GaussianBlur(count, (3, 3), 0.6)
        total = cv2.GaussianBlur(total, (3, 3), 0.6)
        expected = np.log1p(count) / np.quantile(np.log1p(count)[count > 0], 0.95)
        # A point on the edge of a pixel may fall on either side of it.
        assert np.mean(np.abs(cover - np.minimum(expected, 1)) > 0.01) < 0.02
        seen = (count > 0.1) & (cover > 0)
        assert np.mean(np.abs(color - total / np.maximum(count, 1e-9))[seen] > 0.01) < 0.05


def test_pictures_differ_and_repeat():
    """Each seed always gives the same picture, with structure in every colour.

    Waves reach from 0 to 1.
    """
    pictures = [generate(np.random.default_rng(seed)) for seed in range(12)]
    np.testing.assert_array_equal(pictures[3], generate(np.random.default_rng(3)))
    assert all(
        picture.shape == (256, 256, 3) and picture.std((0, 1)).min() > 2 for picture in pictures
    )
    assert (
        min(np.abs(a.astype(int) - b).mean() for i, a in enumerate(pictures) for b in pictures[:i])
        > 5
    )
    wave = waves(np.random.default_rng(0))
    assert 0 <= wave.min() < 0.05
    assert 0.95 < wave.max() <= 1


@pytest.mark.parametrize("size", [(7, 9), (300, 40), (256, 256), (320, 512)])
def test_pictures_have_any_size(size):
    """A picture has the given size and repeats."""
    picture = Pictures().draw(size, np.random.default_rng(5))
    assert picture.shape == (*size, 3)
    np.testing.assert_array_equal(picture, Pictures().draw(size, np.random.default_rng(5)))


def test_pictures_of_a_folder(tmp_path):
    """Every image below a folder is drawn as RGB, cut to size, and mirrored half of the time.

    An empty folder is an error.
    """
    (tmp_path / "below").mkdir()
    ramp = np.arange(30, dtype=np.uint8)[None, :, None].repeat(20, 0).repeat(3, 2)
    for i, file in enumerate(("a.png", "below/b.png")):
        Image.fromarray(ramp + np.array([0, 0, 100 * i], np.uint8)).save(tmp_path / file)
    (tmp_path / "notes.txt").write_text("no image")
    (tmp_path / ".cache").mkdir()
    for name in ("._a.png", ".cache/c.png"):
        (tmp_path / name).write_text("hidden")
    pictures = Pictures.of(str(tmp_path))
    seen = set()
    for seed in range(40):
        picture = pictures.draw((20, 10), np.random.default_rng(seed)).astype(int)
        blue = picture[0, 0, 2] - picture[0, 0, 0]
        step = picture[0, 1, 0] - picture[0, 0, 0]
        assert abs(step) == 1
        np.testing.assert_array_equal(
            picture[..., 0], picture[0, 0, 0] + step * np.arange(10)[None].repeat(20, 0)
        )
        seen.add((int(blue), int(step)))
    assert seen == {(0, 1), (0, -1), (100, 1), (100, -1)}
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match=r"empty, which data\.pictures names"):
        Pictures.of(str(tmp_path / "empty"))
    (tmp_path / "empty" / "bad.png").write_bytes(b"no image")
    with pytest.raises(ValueError, match=r"bad\.png"):
        Pictures.of(str(tmp_path / "empty")).draw((4, 4), np.random.default_rng(0))
