"""Mask2Former's loss against transformers' (golden), slow NumPy samplers, finite differences, and
laws such as "parts add up".
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec
import numpy as np
import pytest

from jaxdg.segmentation.mask2former import losses
from jaxdg.segmentation.mask2former.matching import assign

POINTS = 64
NO_OBJECT = 0.1
WEIGHTS = (2.0, 5.0, 5.0)
TERMS = ("class", "mask", "dice")


@pytest.fixture(scope="module")
def data(golden):
    return dict(np.load(golden / "mask2former_losses.npz"))


def spread(key, shape):
    """The golden file's evenly spread points: as many candidates, then as many uniform ones, or as
    many shared ones, from the first on.
    """
    count = {POINTS: [POINTS], 3 * POINTS + POINTS // 4: [3 * POINTS, POINTS // 4]}[shape[-1]]
    points = np.concatenate(
        [
            (0.5 + np.outer(np.arange(1, n + 1), [0.7548776662466927, 0.5698402909980532])) % 1
            for n in count
        ]
    )
    return jnp.broadcast_to(jnp.asarray(points, jnp.float32), (*shape, 2))


def read(image, x, y):
    """One point of one image [h, w] by definition: pixel centres at (i + 0.5) / size, zeros
    outside, bilinear between centres.
    """
    h, w = image.shape
    x = x * w - 0.5
    y = y * h - 0.5
    total = 0.0
    for i in (int(np.floor(y)), int(np.floor(y)) + 1):
        for j in (int(np.floor(x)), int(np.floor(x)) + 1):
            if 0 <= i < h and 0 <= j < w:
                total += (1 - abs(y - i)) * (1 - abs(x - j)) * image[i, j]
    return total


def awkward_points(rng, n):
    """Random points, and those on borders, corners, pixel centres, in the outer half pixel and
    outside.
    """
    special = [
        (x, y)
        for x in (0, 1, 0.5, 0.01, 0.99, 1.5 / 7, -0.3, 1.02)
        for y in (0, 1, 0.5, 0.02, 0.97, 0.1, 1.4)
    ]
    return np.concatenate(
        [np.broadcast_to(special, (*n, len(special), 2)), rng.random((*n, 20, 2))], axis=-2
    ).astype(np.float32)


def factored(masks):
    """Mask embeddings and features whose products are these logits [l, b, q, h, w]."""
    layers, b, q, h, w = masks.shape
    features = jnp.moveaxis(masks, (1, 3, 4), (0, 1, 2)).reshape(b, h, w, layers * q)
    embeds = jnp.eye(layers * q, dtype=masks.dtype).reshape(layers, 1, q, layers * q)
    return jnp.broadcast_to(embeds, (layers, b, q, layers * q)), features


def matched_masks(masks, query, valid):
    """Mask logits [b, k, h, w] of the queries matched with each target slot."""
    embeds, features = factored(masks[None])
    return losses.mask_logits(losses.matched_embeds(embeds[0], query, valid), features)


def test_given_points_equal_transformers(data, optimized):
    """With the oracle's random points, the matching is its own and each term of each prediction is
    its term to 1e-5.
    """
    label = jnp.asarray(data["label"])
    valid = losses.classes_present(label, 4)
    np.testing.assert_array_equal(valid, data["drawn_query"][0] >= 0)
    denominator = losses.mask2former_loss_denominator(label, 4, 6)

    @jax.jit
    def one(class_logits, mask_logits, shared, candidates, uniform):
        query = assign(
            losses.prediction_costs(class_logits, mask_logits, label, shared[:, None]), valid
        )
        masks = matched_masks(mask_logits, query, valid)
        points = losses.uncertain_points(masks, candidates, uniform, POINTS)
        mask, dice = losses.mask_terms(masks, label, valid, points)
        entropy = losses.class_term(class_logits, query, valid)
        return (
            query,
            entropy / denominator.class_weight,
            mask / denominator.masks,
            dice / denominator.masks,
        )

    inputs = [
        data[k]
        for k in (
            "class_logits",
            "mask_logits",
            "drawn_shared",
            "drawn_candidates",
            "drawn_uniform",
        )
    ]
    for layer, arrays in enumerate(zip(*inputs, strict=True)):
        query, *terms = one(*arrays)
        np.testing.assert_array_equal(jnp.where(valid, query, -1), data["drawn_query"][layer])
        for name, term in zip(TERMS, terms, strict=True):
            np.testing.assert_allclose(
                term,
                data[f"drawn_{name}"][layer],
                rtol=1e-5,
                atol=1e-5,
                err_msg=f"{name} of layer {layer}",
            )


def test_whole_loss_and_gradients_equal_transformers(data, monkeypatch):
    """With points by a formula, the weighted terms and the gradients for all logits are
    transformers'; every draw has a key of its own.
    """
    draws = []

    def recorded(key, shape):
        jax.debug.callback(
            lambda key: draws.append((shape, tuple(key.tolist()))), jax.random.key_data(key)
        )
        return spread(key, shape)

    monkeypatch.setattr(losses, "draw_points", recorded)
    label = jnp.asarray(data["label"])
    denominator = losses.mask2former_loss_denominator(label, 4, 6)

    def total(class_logits, mask_logits):
        terms = losses.mask2former_loss(
            class_logits,
            *factored(mask_logits),
            label,
            denominator,
            jax.random.key(0),
            points=POINTS,
        )
        return sum(terms.values()), terms

    (_, terms), gradients = jax.jit(jax.value_and_grad(total, (0, 1), has_aux=True))(
        data["class_logits"], data["mask_logits"]
    )
    for name, weight in zip(TERMS, WEIGHTS, strict=True):
        np.testing.assert_allclose(terms[name], weight * data[f"spread_{name}"].sum(), rtol=1e-5)
    for gradient, name in zip(gradients, ("class", "mask"), strict=True):
        expected = data[f"spread_{name}_gradient"]
        assert np.abs(expected).max() > 0.01
        np.testing.assert_allclose(gradient, expected, rtol=1e-4, atol=1e-6)

    # Three predictions: points shared by the masks of an image to match them, points of each mask's
    # own to compare it.
    jax.effects_barrier()
    assert sorted(shape for shape, _ in draws) == [(4, 1, 64)] * 3 + [(4, 4, 208)] * 3
    assert len({key for _, key in draws}) == 6


def test_random_draws_have_the_mean_and_spread_of_transformers(data):
    """Over 400 keys each term has the oracle's mean (within four standard errors) and standard
    deviation (within 12 %).
    """
    label = jnp.asarray(data["label"])
    denominator = losses.mask2former_loss_denominator(label, 4, 6)
    predictions = jnp.asarray(data["class_logits"]), *factored(jnp.asarray(data["mask_logits"]))
    loss = partial(losses.mask2former_loss, *predictions, label, denominator, points=POINTS)
    keys = jax.random.split(jax.random.key(1), 400)
    draws = jax.device_get(jax.jit(lambda keys: jax.lax.map(loss, keys))(keys))
    for i, name in enumerate(TERMS):
        mean = data["redrawn_mean"][i]
        std = data["redrawn_std"][i]
        assert abs(draws[name].mean() - mean) < 4 * std * np.sqrt(1 / 400 + 1 / 1000), (
            name
        )  # 1000 of the oracle
        assert abs(draws[name].std() / std - 1) < 0.12, name


def test_draws_fill_the_square_evenly():
    """Points lie strictly inside and 64 fields hold as many as chance allows (chi-square), in x as
    in y, and without correlation.
    """
    points = np.asarray(losses.draw_points(jax.random.key(0), (4, 25_000))).reshape(-1, 2)
    assert len(np.unique(points, axis=0)) > 0.9999 * len(
        points
    )  # none is drawn twice, in one set or in several
    assert 0 < points.min() < 1e-3
    assert 0.999 < points.max() < 1
    counts = np.histogram2d(*points.T, bins=8, range=[[0, 1], [0, 1]])[0]
    expected = len(points) / 64
    assert 30 < ((counts - expected) ** 2 / expected).sum() < 110  # 63 degrees of freedom: 63 +- 11
    assert abs(np.corrcoef(points.T)[0, 1]) < 0.015


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_masks_are_read_as_one_point_at_a_time(dtype):
    """Sampling equals the definition in plain Python, on borders and outside too, for masks of any
    leading axes and dtype.
    """
    rng = np.random.default_rng(0)
    masks = np.asarray(jnp.asarray(rng.normal(size=(2, 3, 5, 7)), dtype).astype(jnp.float32))
    own = awkward_points(rng, (2, 3))
    shared = awkward_points(rng, (2, 1))
    for points in (own, shared):
        expected = [
            [
                [read(masks[i, j], *p) for p in np.broadcast_to(points, own.shape)[i, j]]
                for j in range(3)
            ]
            for i in range(2)
        ]
        got = jax.jit(losses.sample_masks)(jnp.asarray(masks, dtype), points)
        assert got.dtype == jnp.float32
        np.testing.assert_allclose(got, expected, atol=1e-5)
    np.testing.assert_allclose(
        jax.jit(losses.sample_masks)(masks[1, 2], shared[1, 0]),
        got[1, 2],
        atol=1e-6,
    )


def test_gradient_of_reading_masks_is_the_transposed_matrix():
    """What reaches a pixel is the sum over points of its weight in plain Python: in order
    (CPU) and in integers (accelerators).
    """
    rng = np.random.default_rng(1)
    masks = np.zeros((2, 1, 3, 4), np.float32)
    points = awkward_points(rng, (2, 1))
    g = rng.normal(size=points.shape[:-1]).astype(np.float32)
    basis = np.eye(12).reshape(12, 3, 4)
    matrix = np.array(
        [[[[read(image, *p) for image in basis] for p in set_] for set_ in row] for row in points]
    )
    expected = np.einsum("abpm,abp->abm", matrix, g).reshape(masks.shape)

    def through_vjp(m, p, g):
        return jax.vjp(losses.sample_masks, m, p)[1](g)[0]

    for backward in map(jax.jit, (losses._scatter_to_masks, losses._sum_to_masks, through_vjp)):
        np.testing.assert_allclose(
            backward(jnp.asarray(masks), jnp.asarray(points), jnp.asarray(g)), expected, atol=1e-5
        )
        alone = backward(*(jnp.asarray(x[1, 0]) for x in (masks, points, g)))
        np.testing.assert_allclose(alone, expected[1, 0], atol=1e-5)


def test_labels_are_read_as_masks_laid_out():
    """Reading the label map equals reading one binary mask a class in plain Python; 255 and ids
    past k belong to none.
    """
    rng = np.random.default_rng(2)
    label = rng.choice([0, 1, 2, 3, 4, 255], (2, 9, 11)).astype(np.uint8)
    own = awkward_points(rng, (2, 2, 4))
    shared = awkward_points(rng, (2, 1))
    for points in (own, shared):
        got = jax.jit(losses.sample_labels, static_argnums=2)(label, points, 4)
        full = np.broadcast_to(points, (*points.shape[:-3], 4, *points.shape[-2:]))
        expected = np.zeros(full.shape[:-1])
        for index in np.ndindex(expected.shape):
            image, k = index[-3:-1]
            expected[index] = read(label[image] == k, *full[index])
        np.testing.assert_allclose(got, expected, atol=1e-5)


@pytest.mark.usefixtures("platform")
@pytest.mark.parametrize("count", [0, 1, 37, 200])
def test_smallest_equals_a_stable_sort(count):
    """The chosen indices are those of a stable sort, with many ties, zeros, infinities and NaN."""
    rng = np.random.default_rng(3)
    x = np.stack(
        [
            rng.random(200),
            rng.integers(0, 4, 200),
            np.zeros(200),
            np.full(200, np.inf),
            rng.random(200) * 1e-40,
        ]
    ).astype(np.float32)
    x[0, ::3] = np.nan
    x[3, 150:] = 2.0
    expected = np.sort(np.argsort(x, axis=-1, kind="stable")[:, :count], axis=-1)
    np.testing.assert_array_equal(jax.jit(losses.smallest, static_argnums=1)(x, count), expected)


def test_certain_candidates_are_left_out():
    """Of candidates across an edge, those next to it are chosen, in number as asked, and the
    uniform points follow as they are.
    """
    rng = np.random.default_rng(6)
    mask = np.broadcast_to(
        np.linspace(-8, 8, 16, dtype=np.float32), (1, 16, 16)
    )  # |logit| grows with the distance from x = 0.5
    candidates = rng.uniform(0.1, 0.9, (1, 300, 2)).astype(np.float32)
    uniform = rng.random((1, 25, 2), np.float32)
    points = np.asarray(
        jax.jit(losses.uncertain_points, static_argnums=3)(mask, candidates, uniform, 100)
    )
    distance = np.sort(np.abs(candidates[0, :, 0] - 0.5))
    np.testing.assert_allclose(np.sort(np.abs(points[0, :75, 0] - 0.5)), distance[:75])
    np.testing.assert_array_equal(points[0, 75:], uniform[0])


def test_gradients_equal_finite_differences(data):
    """Along random directions, with matching and points held, the terms' gradients are central
    differences.
    """
    label = jnp.asarray(data["label"])
    valid = losses.classes_present(label, 4)
    query = jnp.asarray(np.maximum(data["drawn_query"][0], 0))
    points = jnp.asarray(data["drawn_candidates"][0])

    @jax.jit
    def total(class_logits, mask_logits):
        terms = losses.mask_terms(matched_masks(mask_logits, query, valid), label, valid, points)
        return losses.class_term(class_logits, query, valid) + 3.0 * terms[0] + 10.0 * terms[1]

    at = data["class_logits"][0], data["mask_logits"][0] / 3
    gradients = jax.jit(jax.grad(total, (0, 1)))(*at)
    rng = np.random.default_rng(4)
    for i in (0, 1):
        # Half uphill, for a slope well above the rounding of the ends.
        uphill = np.asarray(gradients[i])
        aside = rng.normal(size=at[i].shape)
        along = (uphill / np.linalg.norm(uphill) + aside / np.linalg.norm(aside)).astype(np.float32)
        ends = [
            float(total(*(x + step * along if i == j else x for j, x in enumerate(at))))
            for step in (0.1, -0.1)
        ]
        slope = (ends[0] - ends[1]) / 0.2
        assert slope > 0.5
        np.testing.assert_allclose(np.vdot(uphill, along), slope, rtol=2e-3)


def test_parts_on_several_devices_add_up_to_the_whole(data, monkeypatch, optimized):
    """Halves of the batch, each spread over two devices and divided by the whole's denominator, add
    up to transformers' loss of it.
    """
    monkeypatch.setattr(losses, "draw_points", spread)
    denominator = losses.mask2former_loss_denominator(jnp.asarray(data["label"]), 4, 6)
    loss = jax.jit(partial(losses.mask2former_loss, points=POINTS))
    mesh = Mesh(np.array(jax.devices()[:2]), "data")

    def put(x, *axes):
        return jax.device_put(x, NamedSharding(mesh, PartitionSpec(*axes)))

    def half(part):
        embeds, features = factored(jnp.asarray(data["mask_logits"][:, part]))
        return loss(
            put(data["class_logits"][:, part], None, "data"),
            put(embeds, None, "data"),
            put(features, "data"),
            put(data["label"][part], "data"),
            put(denominator),
            put(jax.random.key(0)),
        )

    halves = half(slice(0, 2)), half(slice(2, 4))
    for name, weight in zip(TERMS, WEIGHTS, strict=True):
        np.testing.assert_allclose(
            sum(h[name] for h in halves), weight * data[f"spread_{name}"].sum(), rtol=1e-5
        )


def test_normalizer_counts_masks_and_class_weights(data):
    """Masks of the batch, and each matched query at 1 and every other at 0.1; at least one mask."""
    masks = sum(len(set(image.ravel().tolist()) - {255}) for image in data["label"])
    got = losses.mask2former_loss_denominator(jnp.asarray(data["label"]), 4, 6)
    np.testing.assert_allclose(got, (masks, masks + 0.1 * (4 * 6 - masks)), rtol=1e-6)
    empty = losses.mask2former_loss_denominator(jnp.full((2, 4, 4), 255, jnp.uint8), 4, 6)
    np.testing.assert_allclose(empty, (1, 0.1 * 2 * 6), rtol=1e-6)


def test_any_labels_and_logits_without_recompiling():
    """No class, one, one pixel, all, and wild logits: finite loss and gradients, zero for empty
    slots, one compilation for all.
    """
    k = 4
    q = 6
    rng = np.random.default_rng(5)

    def total(logits, label, key):
        denominator = losses.mask2former_loss_denominator(label, k, q)
        terms = losses.mask2former_loss(*logits, label, denominator, key, points=32)
        return sum(terms.values()), terms

    step = jax.jit(jax.value_and_grad(total, has_aux=True))
    logits = tuple(
        rng.normal(size=shape) for shape in ((2, 1, q, k + 1), (2, 1, q, 3), (1, 8, 8, 3))
    )

    def run(logits, label):
        return step(
            tuple(jnp.asarray(x.astype(jnp.bfloat16)) for x in logits),
            label[None],
            jax.random.key(0),
        )

    none = np.full((16, 16), 255, np.uint8)
    one = np.zeros((16, 16), np.uint8)
    pixel = none.copy()
    every = np.arange(256, dtype=np.uint8).reshape(16, 16) % k
    pixel[15, 0] = 3
    for label in (none, one, pixel, every):
        for scale in (1, 0, 3e4):
            (loss, terms), gradients = run([x * scale for x in logits], label)
            assert all(g.dtype == jnp.bfloat16 for g in gradients)
            assert all(t.dtype == jnp.float32 for t in terms.values())
            assert all(np.isfinite(np.asarray(x, np.float32)).all() for x in (loss, *gradients))
            matched = (np.asarray(gradients[1]) != 0).any(axis=3).sum(axis=2)
            assert (matched <= len(set(label.ravel().tolist()) - {255})).all()
            if label is none:
                assert terms["mask"] == terms["dice"] == 0
                x = (logits[0] * scale).astype(jnp.bfloat16).astype(np.float64)
                no_object = np.logaddexp.reduce(x, axis=-1) - x[..., -1]
                np.testing.assert_allclose(
                    terms["class"], 2 * no_object.mean(axis=(1, 2)).sum(), rtol=1e-5
                )

    # A broken query does not reach the others while it need not be matched; if all are, the loss
    # says so and nothing crashes.
    broken = logits[1].copy()
    broken[:, :, 0] = np.nan
    for label in (one, every):
        (loss, _), gradients = run((logits[0], broken, logits[2]), label)
        assert all(np.isfinite(np.asarray(x, np.float32)).all() for x in (loss, *gradients))
    for bad in (np.nan, np.inf):
        (loss, _), _ = run([x + bad for x in logits], every)
        assert not np.isfinite(loss)
    assert step._cache_size() == 1  # pyright: ignore[reportFunctionMemberAccess]


def test_too_few_queries_are_named():
    """More classes than queries is an error that says both numbers."""
    class_logits = jnp.zeros((1, 1, 3, 6))
    mask_embeds = jnp.zeros((1, 1, 3, 2))
    mask_features = jnp.zeros((1, 4, 4, 2))
    label = jnp.zeros((1, 4, 4), jnp.uint8)
    loss = partial(losses.mask2former_loss, points=8)
    with pytest.raises(ValueError, match="3 queries"):
        jax.eval_shape(
            loss,
            class_logits,
            mask_embeds,
            mask_features,
            label,
            losses.mask2former_loss_denominator(label, 5, 3),
            jax.random.key(0),
        )
