"""Expected calibration error and reliability against torchmetrics and exact fractions."""

from fractions import Fraction
import functools

import jax
import numpy as np
import pytest

from jaxdg.evaluation.calibration import reliability, reliability_counts

CLASSES = 5


@functools.partial(jax.jit, static_argnums=3)
def count(confidence, prediction, label, bins):
    """The counts of a batch of images, added up."""
    of = functools.partial(reliability_counts, num_classes=CLASSES, bins=bins)
    return jax.vmap(of)(confidence, prediction, label)


def judged(confidence, prediction, label, bins=15):
    counts = count(confidence, prediction, label, bins)
    return reliability(np.asarray(counts).astype(np.int64).sum(axis=0))


def exact(confidence, prediction, label, bins=15):
    """The same, pixel by pixel in fractions."""
    pixels = [0] * bins
    hits = [0] * bins
    sums = [Fraction(0)] * bins
    flat = (array.ravel().tolist() for array in (confidence, prediction, label))
    for c, p, t in zip(*flat, strict=True):
        if t == 255:
            continue
        c = Fraction(c)
        i = min(int(c * bins), bins - 1)
        pixels[i] += 1
        hits[i] += p == t
        sums[i] += c
    error = sum(abs(s - h) for s, h in zip(sums, hits, strict=True)) / max(sum(pixels), 1)
    return pixels, hits, sums, error


@pytest.mark.parametrize("case", ["sharp", "flat"])
def test_the_error_is_that_of_torchmetrics(golden, case):
    """Random probabilities, a fifth of the pixels ignored: its error of 15 bins."""
    data = np.load(golden / "numbers.npz")
    probabilities = data[f"calibration/{case}/probabilities"]
    images = (2, 20, 25)
    found = judged(
        probabilities.max(axis=1).reshape(images),
        probabilities.argmax(axis=1).astype(np.uint8).reshape(images),
        data[f"calibration/{case}/truth"].reshape(images),
    )
    assert found["ECE"] == pytest.approx(100 * float(data[f"calibration/{case}/ece"]), rel=1e-5)
    assert found["ECE"] > 1


@pytest.mark.parametrize("bins", [1, 10, 15, 255])
def test_bins_equal_exact_fractions(bins):
    """Pixels, hits and confidences of every bin, for confidences of 0, of 1 and at the edges of
    bins, and bins without pixels; of 2^24 values below 1 none is rounded.
    """
    rng = np.random.default_rng(bins)
    confidence = (rng.integers(2**20, 2**24, (2, 20, 25)) / 2**24).astype(np.float32)
    confidence[0, :3] = 1
    confidence[0, 3:5] = 0
    confidence[1, :16, 0] = np.arange(16, dtype=np.float32) / 16
    confidence[(confidence > 0.2) & (confidence < 0.35)] = 0.2
    prediction, label = rng.integers(0, CLASSES, (2, 2, 20, 25)).astype(np.uint8)
    label[rng.random(label.shape) < 0.3] = 255
    confidence = np.round(confidence * 2**24).astype(np.float32) / np.float32(2**24)
    found = judged(confidence, prediction, label, bins)
    pixels, hits, sums, error = exact(confidence, prediction, label, bins)
    table = found["reliability"]
    assert table["pixels"] == pixels
    for i, n in enumerate(pixels):
        if n:
            assert table["confidence"][i] == pytest.approx(100 * float(sums[i] / n), rel=1e-14)
            assert table["accuracy"][i] == pytest.approx(100 * hits[i] / n, rel=1e-14)
        else:
            assert table["confidence"][i] is table["accuracy"][i] is None
    assert found["ECE"] == pytest.approx(100 * float(error), rel=1e-12)


def test_large_images_lose_nothing():
    """A sum past 2^32 in every part: 2^20 pixels of one confidence have exactly that mean."""
    confidence = np.full((1, 1024, 1024), 1 - 2**-24, np.float32)
    label = np.zeros(confidence.shape, np.uint8)
    label[0, : 1024 // 4] = 1
    found = judged(confidence, np.zeros_like(label), label)
    assert found["reliability"]["pixels"][-1] == 2**20
    assert found["reliability"]["confidence"][-1] == 100 * (1 - 2**-24)
    assert found["reliability"]["accuracy"][-1] == 75
    assert found["ECE"] == pytest.approx(100 * (0.25 - 2**-24), rel=1e-14)


def test_without_pixels_there_is_no_error():
    """All ignored: no number but the counts of nothing."""
    ignored = np.full((1, 20, 25), 255, np.uint8)
    found = judged(np.ones(ignored.shape, np.float32), ignored * 0, ignored)
    assert found["ECE"] is None
    assert found["reliability"]["pixels"] == [0] * 15
    assert found["reliability"]["accuracy"] == [None] * 15
