"""Sliding windows against slow NumPy; resizing against torch and `jax.image.resize`."""

import functools
import itertools

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec
import numpy as np
import pytest

from jaxdg.evaluation.sliding_window import (
    label_map,
    mirror,
    resize_scores,
    shared_side,
    sliding_window,
    window_starts,
)


def scores_of(windows, xp=jnp):
    """Scores that depend on the place in the window, on neighbours and on the whole window, so any
    misplacement shows.
    """
    wh, ww = windows.shape[1:3]
    place = xp.sin(xp.arange(wh) * 0.7)[:, None] + xp.cos(xp.arange(ww) * 0.3)[None]
    mean = windows.mean((1, 2, 3))[:, None, None]
    first = windows[..., 0]
    return xp.stack(
        [first * place, first - mean, place + 0 * first, windows[:, ::-1, ::-1, 1]], axis=-1
    )


def slow(images, window, stride, wanted=lambda y, x: True):
    """Windows one by one, by stepping along each side until the border is reached; those that are
    not wanted count as 0.
    """
    b, h, w, c = images.shape
    big = np.zeros((b, max(h, window[0]), max(w, window[1]), c))
    big[:, :h, :w] = images

    def starts(size, window, stride):
        at = [0]
        while at[-1] + window < size:
            at.append(min(at[-1] + stride, size - window))
        return at

    total = np.zeros((*big.shape[:3], 4))
    seen = np.zeros(big.shape[:3])
    for image in range(b):
        for y in starts(big.shape[1], window[0], stride[0]):
            for x in starts(big.shape[2], window[1], stride[1]):
                here = (slice(image, image + 1), slice(y, y + window[0]), slice(x, x + window[1]))
                total[here] += scores_of(big[here], np) if wanted(y, x) else 0
                seen[here] += 1
    assert seen.min() > 0
    return (total / seen[..., None])[:, :h, :w]


@pytest.mark.parametrize(
    ("size", "window", "stride", "expected"),
    [
        (360, 256, 112, (0, 104)),
        (480, 256, 112, (0, 112, 224)),
        (1024, 512, 426, (0, 426, 512)),
        (2048, 1024, 768, (0, 768, 1024)),
        (512, 512, 426, (0,)),
        (300, 512, 426, (0,)),
        (9, 3, 3, (0, 3, 6)),
        (10, 3, 3, (0, 3, 6, 7)),
    ],
)
def test_window_starts(size, window, stride, expected):
    """Starts are mmsegmentation's, written out by hand for the sizes of the benchmarks and for the
    borders.
    """
    assert window_starts(size, window, stride) == expected


def test_windows_cover_every_pixel_and_stay_inside():
    """For all small sizes, windows and strides: no pixel is missed, no window leaves the image or
    comes twice.
    """
    for size in range(1, 20):
        for window in range(1, size + 1):
            for stride in range(1, window + 1):
                starts = window_starts(size, window, stride)
                covered = {start + i for start in starts for i in range(window)}
                assert covered == set(range(size))
                assert len(set(starts)) == len(starts)
                assert all(second - first <= stride for first, second in itertools.pairwise(starts))


def test_few_sides_are_shared_by_all_sizes():
    """Every side holds its sizes, has their number of windows rounded up to half a power of 2, and
    is never twice what it need be.
    """
    assert [shared_side(size, 512, 426) for size in (300, 512, 513, 1024, 1914, 2048)] == [
        512,
        512,
        938,
        1364,
        2642,
        2642,
    ]
    for window, stride in ((16, 16), (16, 7), (9, 1)):
        sides = [shared_side(size, window, stride) for size in range(1, 3000)]
        assert all(
            size <= side < 2 * max(size, window) + window for size, side in enumerate(sides, 1)
        )
        assert len(set(sides)) <= 24
        for size, side in enumerate(sides, 1):
            count = len(window_starts(size, window, stride))
            assert count <= len(window_starts(side, window, stride)) < 1.5 * count + 1


@pytest.mark.parametrize(
    ("shape", "window", "stride", "windows_per_call"),
    [
        ((2, 30, 41, 3), (16, 16), (7, 7), None),
        ((2, 30, 41, 3), (16, 16), (7, 7), 8),  # 4 places a call do not divide the 15 places
        ((3, 20, 33, 2), (16, 8), (16, 5), 1),  # fewer than the batch: one place a call
        ((3, 20, 33, 2), (16, 8), (16, 5), 1000),  # more than there are
        ((1, 24, 24, 2), (24, 24), (10, 10), 2),  # the window is the image
        ((2, 10, 40, 2), (16, 16), (12, 12), 4),  # smaller on one side
        ((2, 10, 9, 2), (16, 16), (12, 12), None),  # smaller on both
        ((1, 32, 48, 2), (16, 16), (16, 16), 3),  # no overlap
    ],
)
def test_equals_a_slow_numpy_version(shape, window, stride, windows_per_call):
    """Averaged scores equal a loop over images and windows, traced once, whatever the number of
    windows a call.
    """
    images = np.random.default_rng(0).normal(size=shape).astype(np.float32)
    run = jax.jit(
        lambda images: sliding_window(scores_of, images, window, stride, windows_per_call)
    )
    np.testing.assert_allclose(
        run(images), slow(images.astype(np.float64), window, stride), rtol=1e-5, atol=1e-5
    )


@pytest.mark.parametrize(
    ("windows_per_call", "expected"), [(None, 12), (1, 2), (2, 2), (5, 4), (6, 6), (100, 12)]
)
def test_calls_are_no_larger_than_asked(windows_per_call, expected):
    """Every call has one shape: a multiple of the batch of 2, at most the number asked for and the
    12 windows there are.
    """
    seen = set()

    def predict(windows):
        seen.add(windows.shape)
        return windows

    images = jax.ShapeDtypeStruct((2, 20, 30, 3), jnp.float32)
    jax.eval_shape(
        lambda images: sliding_window(predict, images, (10, 10), (10, 10), windows_per_call), images
    )
    assert seen == {(expected, 10, 10, 3)}


def test_nan_stays_in_its_window():
    """Scores are finite where windows are finite, and a NaN in one window stays in the pixels it
    covers.
    """
    images = np.zeros((1, 10, 30, 1), np.float32)
    images[0, 5, 25, 0] = np.nan
    run = jax.jit(
        lambda images: sliding_window(
            lambda x: x + x.mean((1, 2, 3), keepdims=True), images, (10, 10), (10, 10), 2
        )
    )
    scores = np.asarray(run(images))
    assert np.isfinite(scores[:, :, :20]).all()
    assert np.isnan(scores[:, :, 20:]).all()


def test_a_sharded_batch_stays_sharded_and_equal():
    """A batch over eight devices: same scores, and each device pushes only its own image's windows
    through the model.
    """
    images = np.random.default_rng(1).normal(size=(8, 20, 24, 2)).astype(np.float32)
    sharding = NamedSharding(Mesh(np.array(jax.devices()), ("data",)), PartitionSpec("data"))
    kernel = np.random.default_rng(2).normal(size=(3, 3, 2, 4)).astype(np.float32)

    def predict(windows):
        return jax.lax.conv_general_dilated(
            windows, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
        )

    run = jax.jit(lambda images: sliding_window(predict, images, (12, 12), (8, 8), 16))
    sharded = jax.device_put(images, sharding)
    result = run(sharded)
    np.testing.assert_allclose(result, run(images), rtol=1e-5, atol=1e-5)
    assert {shard.data.shape for shard in result.addressable_shards} == {(1, 20, 24, 4)}
    program = run.lower(sharded).compile().as_text()
    assert "all-gather" not in program
    assert "all-to-all" not in program


OWN = [(30, 41), (23, 9), (30, 17), (1, 40)]


def padded(images, size, value=1e3):
    """Images in the upper left corner of one array, loud numbers around them."""
    out = np.full((len(images), *size, images[0].shape[-1]), value, np.float32)
    for row, image in zip(out, images, strict=True):
        row[: image.shape[0], : image.shape[1]] = image
    return out


def drawn(sizes, channels=3):
    """One random image a size."""
    rng = np.random.default_rng(5)
    return [rng.normal(size=(*size, channels)).astype(np.float32) for size in sizes]


@functools.cache
def alone(i, window, stride):
    """Scores of one of the drawn images as an array of its own."""
    return np.asarray(
        jax.jit(lambda image: sliding_window(scores_of, image, window, stride, 1))(
            drawn(OWN)[i][None]
        )
    )[0]


@pytest.mark.parametrize("windows_per_call", [None, 12])
def test_images_of_many_sizes_in_one_program(windows_per_call):
    """Four sizes in one array, compiled once, score to 1e-6 as each image alone; what stands around
    them reaches nothing.
    """
    images = drawn(OWN)
    traces = []

    def predict(windows):
        traces.append(1)
        return scores_of(windows)

    run = jax.jit(
        lambda images, sizes: sliding_window(
            predict, images, (16, 16), (7, 7), windows_per_call, sizes
        )
    )
    for order in ([0, 1, 2, 3], [3, 1, 0, 2]):
        array = padded([images[i] for i in order], (30, 41))
        sizes = np.array([OWN[i] for i in order], np.int32)
        for i, (h, w), scores in zip(order, sizes, np.asarray(run(array, sizes)), strict=True):
            np.testing.assert_allclose(
                scores[:h, :w], alone(i, (16, 16), (7, 7)), rtol=1e-6, atol=1e-6
            )
    assert len(traces) == 2  # for the shape of the scores, then for the program


@pytest.mark.parametrize("i", range(len(OWN)))
def test_one_image_alone_equals_the_slow_version(i):
    """What images of many sizes are compared with is itself right."""
    expected = slow(drawn(OWN)[i][None].astype(np.float64), (16, 16), (7, 7))[0]
    np.testing.assert_allclose(alone(i, (16, 16), (7, 7)), expected, rtol=1e-5, atol=1e-5)


def test_only_as_many_windows_as_the_images_need():
    """Small images in a large array are not charged for its windows: calls stop where the image
    with the most windows is done.
    """
    calls = []

    def predict(windows):
        jax.debug.callback(lambda: calls.append(1))
        return windows

    run = jax.jit(
        lambda images, sizes: sliding_window(predict, images, (10, 10), (10, 10), 2, sizes)
    )
    for sizes, expected in (
        ([(10, 10), (5, 7)], 1),
        ([(10, 10), (20, 25)], 6),
        ([(40, 50)] * 2, 20),
    ):
        calls.clear()
        jax.block_until_ready(run(jnp.zeros((2, 40, 50, 1)), jnp.asarray(sizes, jnp.int32)))
        jax.effects_barrier()
        assert len(calls) == expected


def odd(y, x):
    """About half of the windows."""
    return (3 * y + 5 * x) % 4 < 2


@pytest.mark.parametrize("per_call", [1, 3])
def test_unwanted_windows_are_not_predicted(per_call):
    """Images of many sizes of which some windows are wanted: scores are those of loops in which the
    others count as 0, and there are as few full calls as the image with the most wanted ones needs.
    """
    calls = []

    def predict(windows):
        jax.debug.callback(lambda: calls.append(1))
        return scores_of(windows)

    def wanted(starts):
        return odd(starts[..., 0], starts[..., 1])

    run = jax.jit(
        lambda images, sizes: sliding_window(
            predict, images, (16, 16), (7, 7), per_call * len(OWN), sizes, wanted
        )
    )
    images = drawn(OWN)
    found = run(padded(images, (30, 41)), np.array(OWN, np.int32))
    jax.effects_barrier()
    most = 0
    for image, (h, w), scores in zip(images, OWN, np.asarray(found), strict=True):
        expected = slow(image[None].astype(np.float64), (16, 16), (7, 7), odd)[0]
        np.testing.assert_allclose(scores[:h, :w], expected, rtol=1e-5, atol=1e-5)
        starts = itertools.product(window_starts(h, 16, 7), window_starts(w, 16, 7))
        most = max(most, sum(odd(*start) for start in starts))
    assert len(calls) == -(-most // per_call)
    assert most < len(window_starts(30, 16, 7)) * len(window_starts(41, 16, 7))


def test_nothing_wanted_is_nothing_done():
    """No call at all, and scores of 0."""
    found = sliding_window(
        lambda windows: windows / 0,
        jnp.ones((1, 20, 20, 1)),
        (10, 10),
        (10, 10),
        wanted=lambda starts: starts[..., 0] < 0,
    )
    np.testing.assert_array_equal(found, 0)


def test_a_sharded_batch_of_many_sizes_stays_sharded():
    """Eight sizes on eight devices: the scores of one device, and no image leaves its own."""
    sizes = [(20, 24), (12, 12), (20, 12), (9, 24), (13, 17), (20, 23), (5, 5), (18, 20)]
    images = padded(drawn(sizes, 2), (20, 24))
    sizes = np.array(sizes, np.int32)
    sharding = NamedSharding(Mesh(np.array(jax.devices()), ("data",)), PartitionSpec("data"))
    run = jax.jit(
        lambda images, sizes: sliding_window(
            lambda x: x * x[:, ::-1], images, (12, 12), (8, 8), 16, sizes
        )
    )
    spread = jax.device_put((images, sizes), sharding)
    result = run(*spread)
    np.testing.assert_allclose(result, run(images, sizes), rtol=1e-6, atol=1e-6)
    assert {shard.data.shape for shard in result.addressable_shards} == {(1, 20, 24, 2)}
    program = run.lower(*spread).compile().as_text()
    assert "all-gather" not in program
    assert "all-to-all" not in program


def test_mirror_keeps_images_in_their_corner():
    """Each image is reversed inside its own width; a second time restores it and its padding."""
    images = drawn(OWN)
    array = padded(images, (30, 41))
    sizes = jnp.asarray(OWN, jnp.int32)
    mirrored = jax.jit(mirror)
    found = mirrored(array, sizes)
    np.testing.assert_array_equal(found, padded([image[:, ::-1] for image in images], (30, 41)))
    np.testing.assert_array_equal(mirrored(found, sizes), array)


def test_mistakes_are_said():
    """A stride that leaves pixels out, no windows a call, and scores of another size are refused,
    each with its reason.
    """
    images = jnp.zeros((1, 20, 20, 3))
    with pytest.raises(ValueError, match="stride 11"):
        sliding_window(lambda x: x, images, (10, 10), (11, 11))
    with pytest.raises(ValueError, match="windows_per_call is 0"):
        sliding_window(lambda x: x, images, (10, 10), (10, 10), 0)
    with pytest.raises(ValueError, match="sizes must agree"):
        sliding_window(lambda x: x[:, ::2, ::2], images, (10, 10), (10, 10))
    with pytest.raises(ValueError, match="cannot resize"):
        resize_scores(images, (0, 10))


SIZES = [(13, 17), (40, 61), (13, 61), (5, 3), (1, 1), (26, 34), (7, 40)]


@pytest.mark.parametrize("size", SIZES)
def test_resize_equals_jax_image_resize_without_antialiasing(size):
    """Gathering two neighbours a side gives what jax computes with dense weights, when enlarging,
    shrinking and mixing both.
    """
    scores = np.random.default_rng(3).normal(size=(2, 13, 17, 5)).astype(np.float32)
    expected = jax.jit(lambda x: jax.image.resize(x, (2, *size, 5), "bilinear", antialias=False))(
        scores
    )
    np.testing.assert_allclose(
        jax.jit(resize_scores, static_argnums=1)(scores, size), expected, rtol=1e-5, atol=1e-5
    )


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("platform", ["cpu", "default"])
def test_the_gradient_of_resizing_is_its_transpose(size, platform, monkeypatch):
    """On every platform, what reaches a score is the sum over pixels of its weight in them."""

    def chosen(*args, **ways):
        return ways[platform](*args)

    monkeypatch.setattr(jax.lax, "platform_dependent", chosen)
    rng = np.random.default_rng(5)
    scores = rng.normal(size=(2, 13, 17, 3)).astype(np.float32)
    towards = rng.normal(size=(2, *size, 3)).astype(np.float32)

    def gradient(resize):
        return jax.jit(jax.grad(lambda scores: jnp.sum(resize(scores) * towards)))(scores)

    expected = gradient(lambda x: jax.image.resize(x, (2, *size, 3), "bilinear", antialias=False))
    got = gradient(lambda x: resize_scores(x, size))
    np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-4)


def test_gpus_scatter_no_gradient_of_resizing():
    """A scatter of floats has no fixed order there."""
    traced = jax.jit(jax.grad(lambda x: jnp.sum(resize_scores(x, (8, 10)) ** 2))).trace(
        jnp.zeros((1, 4, 5, 2))
    )
    assert "stablehlo.scatter" in traced.lower(lowering_platforms=("cpu",)).as_text()
    assert "stablehlo.scatter" not in traced.lower(lowering_platforms=("cuda",)).as_text()


@pytest.mark.parametrize("size", SIZES)
def test_resize_equals_torch(size):
    """The same scores through torch's `interpolate`, where torch is installed."""
    torch = pytest.importorskip("torch")
    scores = np.random.default_rng(4).normal(size=(2, 13, 17, 5)).astype(np.float32)
    moved = torch.from_numpy(np.ascontiguousarray(scores.transpose(0, 3, 1, 2)))
    expected = (
        torch.nn.functional.interpolate(moved, size, mode="bilinear", align_corners=False)
        .numpy()
        .transpose(0, 2, 3, 1)
    )
    np.testing.assert_allclose(
        jax.jit(resize_scores, static_argnums=1)(scores, size), expected, rtol=1e-5, atol=1e-5
    )


TO = [(30, 41), (130, 20), (16, 90), (1, 8)]


def test_resizing_many_sizes_in_one_program():
    """Each image's scores, from its own size to its own label's size inside fixed shapes, are those
    of resizing it alone.
    """
    images = drawn(OWN, 5)
    sizes = (jnp.asarray(OWN, jnp.int32), jnp.asarray(TO, jnp.int32))
    array = jnp.asarray(padded(images, (30, 41)))
    found = jax.jit(resize_scores, static_argnums=1)(array, (130, 90), sizes)
    labels = jax.jit(label_map, static_argnums=1)(array, (130, 90), sizes)
    assert labels.dtype == np.uint8
    found, labels = jax.device_get((found, labels))
    for image, size, scores, label in zip(images, TO, found, labels, strict=True):
        expected = np.asarray(jax.jit(resize_scores, static_argnums=1)(image[None], size))[0]
        np.testing.assert_allclose(scores[: size[0], : size[1]], expected, rtol=1e-6, atol=1e-6)
        np.testing.assert_array_equal(label[: size[0], : size[1]], expected.argmax(-1))


def test_large_sizes_do_not_overflow():
    """Sides of 20 000 pixels, more than float32 could place to a millionth, are placed by integers:
    a ramp stays a ramp.
    """
    ramp = np.arange(10_000, dtype=np.float32).reshape(1, 1, -1, 1)
    sizes = (np.array([[1, 10_000]], np.int32), np.array([[1, 20_000]], np.int32))
    resize = jax.jit(resize_scores, static_argnums=1)
    found = np.asarray(resize(ramp, (1, 20_000), sizes))[0, 0, :, 0]
    np.testing.assert_array_equal(found[1:-1], (np.arange(20_000) + 0.5)[1:-1] / 2 - 0.5)


def test_resize_returns_float32():
    """Logits in bfloat16 are interpolated in float32: a ramp shows no steps of bfloat16."""
    ramp = jnp.arange(16, dtype=jnp.bfloat16).reshape(1, 1, 16, 1)
    resized = resize_scores(ramp, (1, 160))
    assert resized.dtype == jnp.float32
    np.testing.assert_allclose(
        resized[0, 0, 5:-5, 0], (np.arange(160) + 0.5)[5:-5] / 10 - 0.5, atol=1e-5
    )
