"""PixMix against one pixel at a time, and in batches."""

import numpy as np
import pytest

from jaxdg.data.augment import pixmix as lib
from jaxdg.data.augment.fractals import Pictures
from jaxdg.data.augment.pixmix import BASE, add, augment, multiply, pixmix, unit, weights
from jaxdg.data.augment.transforms import Augmentation
from jaxdg.data.boxes import open_boxes
from jaxdg.data.datasets import StreetsOptions
from jaxdg.data.domains import open_domain
from jaxdg.data.pipeline import train_batches
from jaxdg.data.samplers import make_sampler


def noise(seed: int, size: tuple[int, int] = (6, 7)) -> np.ndarray:
    """An image that also has black and white."""
    image = np.random.default_rng(seed).integers(0, 256, (*size, 3)).astype(np.uint8)
    image[0] = 0
    image[1] = 255
    return image


def slow_mix(kind: str, one: float, other: float, a: float, b: float) -> float:
    """The paper's formulas for one value, as its authors' code writes them."""
    if kind == "add":
        return (a * (2 * one - 1) + b * (2 * other - 1) + 1) / 2
    return (2 * one) ** a * max(2 * other, 1e-37) ** b / 2


def each(function, one, other, *arguments) -> np.ndarray:
    """Applies a function of single values to every value."""
    pairs = zip(one.ravel().tolist(), other.ravel().tolist(), strict=True)
    return np.array([function(x, y, *arguments) for x, y in pairs]).reshape(one.shape)


@pytest.mark.parametrize(("a", "b"), [(0.8, 0.2), (0.3, 0.9), (1.2, -0.2), (1.9, -0.9), (1.0, 0.0)])
@pytest.mark.parametrize("mix", [add, multiply])
def test_mixing_is_the_formula(mix, a, b):
    """Every value equals the formula in double precision, for black and white and beyond 0 to 1."""
    one = noise(0)
    other = noise(1).transpose(1, 0, 2)[:6].copy()
    other = np.resize(other, one.shape)
    expected = each(lambda x, y: slow_mix(mix.__name__, x / 255, y / 255, a, b), one, other)
    np.testing.assert_allclose(mix(unit(one), unit(other), a, b), expected, rtol=1e-4, atol=1e-5)


def test_weights_are_drawn_from_their_distributions():
    """Half of the draws take at most 1 of each image, half subtract some of the second.

    Their means are those of Beta(4, 1).
    """
    drawn = np.array([weights(4.0, np.random.default_rng(seed)) for seed in range(4000)])
    less = drawn[:, 0] > 1
    assert np.mean(less) == pytest.approx(0.5, abs=0.03)
    np.testing.assert_allclose(drawn[~less].mean(0), (0.8, 0.2), atol=0.015)
    np.testing.assert_allclose(drawn[less].mean(0), (1.2, -0.2), atol=0.015)
    assert np.all(less == (drawn[:, 1] < 0))


def test_base_augmentations_move_no_pixel():
    """Each augmentation maps values to values, independent of the place.

    Posterising keeps 16 values, and solarising inverts the brightest.
    """
    image = noise(2, (64, 64))
    seen = set()
    for name, operation in BASE.items():
        for seed in range(20):
            drawn = []
            for pixels in (image, image[::-1, ::-1].copy()):
                rng = np.random.default_rng(seed)
                with pytest.MonkeyPatch.context() as patch:
                    patch.setattr(lib, "BASE", {name: operation})
                    drawn.append(augment(pixels, rng))
            np.testing.assert_array_equal(drawn[0], drawn[1][::-1, ::-1])
            if name == "posterize":
                np.testing.assert_array_equal(drawn[0], image // 16 * 16)
            if name == "solarize":
                changed = image[drawn[0] != image]
                seen.add(int(changed.min()))
                np.testing.assert_array_equal(
                    drawn[0], np.where(image >= changed.min(), 255 - image, image)
                )
    assert min(seen) >= 231
    assert len(seen) > 5


def test_rounds_follow_one_another(monkeypatch):
    """The image equals a slow version of the paper's algorithm with the same draws.

    All cases occur.
    """
    image = noise(3)
    k = 4
    beta = 4.0
    cases = set()
    pictures = Pictures()
    monkeypatch.setattr(
        Pictures, "draw", lambda self, size, rng: noise(int(rng.integers(100)), size)
    )
    for seed in range(60):
        rng = np.random.default_rng(seed)
        start = augment(image, rng) if rng.integers(2) else image
        mixed = start / 255
        picture = None
        rounds = int(rng.integers(k + 1))
        for _ in range(rounds):
            if own := bool(rng.integers(2)):
                other = augment(image, rng)
            elif picture is None:
                other = picture = noise(int(rng.integers(100)), (6, 7))
            else:
                other = picture
            kind = "add" if rng.integers(2) else "multiply"
            a, b = weights(beta, rng)
            mixed = each(
                lambda x, y, kind=kind, a=a, b=b: min(max(slow_mix(kind, x, y, a, b), 0.0), 1.0),
                mixed,
                other / 255,
            )
            cases.add((own, kind))
        cases.add(rounds)
        found = pixmix(image, k, beta, pictures, np.random.default_rng(seed))
        assert found.dtype == np.uint8
        assert np.abs(found - 255 * mixed).max() <= 0.51
    assert cases == {
        *range(5),
        *((own, kind) for own in (False, True) for kind in ("add", "multiply")),
    }


def test_nothing_is_done_or_drawn_when_off():
    """With k 0 the image itself is returned and nothing is drawn."""
    image = noise(4)
    rng = np.random.default_rng(0)
    assert pixmix(image, 0, 0.0, Pictures(), rng) is image
    assert rng.integers(2**40) == np.random.default_rng(0).integers(2**40)


@pytest.mark.parametrize("boxes", [False, True])
def test_batches_resume_and_keep_labels(boxes):
    """Threads and processes give the same mixed batches, from any step.

    Labels and boxes equal those of unmixed batches; images do not.
    """
    options = {"root": "", "train": True, "streets": StreetsOptions(size=(32, 64), images=6)}
    dataset = (
        open_boxes("clear", own=None, **options)
        if boxes
        else open_domain("clear", folder=None, **options)
    )
    sampler = make_sampler(dataset, seed=1)

    def run(start: int = 0, **more) -> list[dict[str, np.ndarray]]:
        k = more.pop("k", 4)
        augmentation = Augmentation(crop=(24, 40), scale=(0.8, 1.2), pixmix=(k, 4.0))
        return list(
            train_batches(
                dataset,
                sampler,
                augmentation,
                seed=1,
                batch_size=2,
                start=start,
                stop=4,
                max_boxes=50,
                **more,
            )
        )

    whole = run(styles=True)
    plain = run(k=0)
    for batches in (run(2, styles=True), run(2, styles=True, workers=2)):
        for batch, expected in zip(batches, whole[2:], strict=True):
            assert batch.keys() == expected.keys()
            for key in expected:
                np.testing.assert_array_equal(batch[key], expected[key])
    assert ("boxes" in whole[0]) == boxes
    for batch, expected in zip(whole, plain, strict=True):
        for key in expected.keys() - {"image"}:
            np.testing.assert_array_equal(batch[key], expected[key])
        assert batch["style"].shape == batch["image"].shape
        assert "style" not in expected
    assert (
        sum(bool(np.any(a["image"] != b["image"])) for a, b in zip(whole, plain, strict=True)) >= 3
    )
    assert len(np.unique(whole[0]["style"])) > 20
