"""The on-device assignment against brute force, planted optima and SciPy; the matching cost against
plain NumPy and transformers.
"""

from itertools import permutations

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec
import numpy as np
import pytest

from jaxdg.segmentation.mask2former.matching import NON_FINITE, assign, matching_cost

solve = jax.jit(assign)
cost_of = jax.jit(matching_cost, static_argnums=3)

# name: costs [n, k, q]
KINDS = {
    "normal": lambda rng, n, k, q: rng.normal(size=(n, k, q)),
    "ties": lambda rng, n, k, q: rng.integers(0, 3, (n, k, q)),
    "negative integers": lambda rng, n, k, q: -rng.integers(0, 100, (n, k, q)),
    "constant": lambda rng, n, k, q: np.broadcast_to(rng.normal(size=(n, 1, 1)), (n, k, q)),
    "same targets": lambda rng, n, k, q: np.broadcast_to(rng.normal(size=(n, 1, q)), (n, k, q)),
    "same queries": lambda rng, n, k, q: np.broadcast_to(rng.normal(size=(n, k, 1)), (n, k, q)),
    "duplicates": lambda rng, n, k, q: np.tile(rng.normal(size=(n, k, -(-q // 2))), 2)[..., :q],
    "near ties": lambda rng, n, k, q: (
        0.02 * rng.normal(size=(n, k, q)) + rng.normal(size=(n, 1, q))
    ),
    "products": lambda rng, n, k, q: (
        rng.random((n, k, 1)) * rng.random((n, 1, q))
    ),  # long augmenting paths
    "huge range": lambda rng, n, k, q: 10.0 ** rng.uniform(-10, 10, (n, k, q)),
    "huge range of signs": lambda rng, n, k, q: (
        10.0 ** rng.uniform(-5, 5, (n, k, q)) * rng.choice([-1, 1], (n, k, q))
    ),
    "clamped at 1e10": lambda rng, n, k, q: np.where(
        rng.random((n, k, q)) < 0.3, 1e10, rng.normal(size=(n, k, q))
    ),
    "few non-finite": lambda rng, n, k, q: broken(rng, rng.normal(size=(n, k, q)), 0.1),
    "mostly non-finite": lambda rng, n, k, q: broken(rng, rng.normal(size=(n, k, q)), 0.9),
    "all non-finite": lambda rng, n, k, q: broken(rng, rng.normal(size=(n, k, q)), 1.0),
    "broken queries": lambda rng, n, k, q: broken(
        rng, rng.normal(size=(n, k, q)), 0.0, queries=0.7
    ),
}


def broken(rng, cost, share, queries=0.0):
    """Costs of which a share of the entries, and of the queries, are NaN, infinite or as
    `matching_cost` marks them.
    """
    n, k, q = cost.shape
    wrong = (rng.random((n, k, q)) < share) | (rng.random((n, 1, q)) < queries)
    return np.where(wrong, rng.choice([np.nan, np.inf, -np.inf, NON_FINITE], (n, k, q)), cost)


def draw(rng, kind, n, k, q):
    """Problems of a kind with no, one, some and all targets valid."""
    valid = rng.random((n, k)) < rng.choice([0.3, 0.5, 0.8], (n, 1))
    valid[0::8] = True
    valid[1::8] = False
    valid[2::8] = np.arange(k) == rng.integers(0, k, (len(valid[2::8]), 1))
    return KINDS[kind](rng, n, k, q).astype(np.float32), valid


def totals(cost, valid, query):
    """Of given assignments: how many entries are non-finite, the sum of the others, and the sum of
    their magnitudes, in float64.
    """
    taken = np.take_along_axis(cost, query[..., None], -1)[..., 0].astype(np.float64)
    finite = np.abs(np.nan_to_num(taken, nan=np.inf)) < 1e29
    taken = np.where(finite & valid, taken, 0.0)
    return (valid & ~finite).sum(-1), taken.sum(-1), np.abs(taken).sum(-1)


def check_injective(valid, query, queries):
    """Every valid target has a query of its own; the others say 0."""
    assert query.dtype == np.int32
    assert ((query >= 0) & (query < queries)).all()
    assert not query[~valid].any()
    own = np.where(valid, query, -1 - np.arange(valid.shape[-1]))
    assert (np.diff(np.sort(own, axis=-1), axis=-1) > 0).all()


@pytest.mark.parametrize("size", [(5, 6), (5, 5)], ids=str)
def test_equals_brute_force(size):
    """On small problems of every kind no assignment has fewer non-finite entries, nor, with as few,
    a smaller sum of finite ones.

    The sum's tolerance is relative to the entries taken, not to the largest of the matrix: what is
    not taken must not blur what is.
    """
    k, q = size
    rng = np.random.default_rng(0)
    choices = np.array(list(permutations(range(q), k)))
    for kind in KINDS:
        cost, valid = draw(rng, kind, 160, k, q)
        query = np.asarray(solve(cost, valid))
        check_injective(valid, query, q)
        wrong, total, _ = totals(cost, valid, query)
        every = [totals(cost, valid, np.broadcast_to(choice, valid.shape)) for choice in choices]
        all_wrong, all_total, all_size = (np.stack(x) for x in zip(*every, strict=True))
        best = np.lexsort((all_total, all_wrong), axis=0)[0], np.arange(len(cost))
        np.testing.assert_array_equal(wrong, all_wrong[best], err_msg=kind)
        assert (total - all_total[best] <= 1e-6 * all_size[best]).all(), kind


def test_non_finite_entries_do_not_blur_the_others():
    """Where non-finite entries must be taken and some finite ones are 1e10, the small costs are
    still matched optimally.
    """
    rng = np.random.default_rng(1)
    cost = rng.normal(size=(160, 5, 6)).astype(np.float32)
    cost[:, 0] = np.nan  # a target that no query can serve
    cost[:, 1:3, 1:] = np.inf  # two targets that only query 0 can serve
    cost[:, 3, :2] = 1e10
    cost = cost[:, rng.permutation(5)]
    valid = np.ones((160, 5), bool)
    wrong, total, _ = totals(cost, valid, np.asarray(solve(cost, valid)))
    every = [
        totals(cost, valid, np.broadcast_to(c, valid.shape))[:2] for c in permutations(range(6), 5)
    ]
    all_wrong, all_total = (np.stack(x) for x in zip(*every, strict=True))
    assert (all_wrong.min(axis=0) == 2).all()
    np.testing.assert_array_equal(wrong, 2)
    np.testing.assert_allclose(
        total, np.where(all_wrong == 2, all_total, np.inf).min(axis=0), rtol=0, atol=1e-5
    )


@pytest.mark.parametrize("size", [(19, 100), (19, 19), (150, 200)], ids=str)
def test_finds_a_planted_optimum(size):
    """The only assignment that is tight for given potentials is found, at the sizes of real runs
    and far beyond.

    cost = a_target + b_query + slack is least where the slack is zero, if b <= 0 everywhere and b =
    0 on the queries left over.
    """
    k, q = size
    n = 4
    rng = np.random.default_rng(2)
    planted = rng.permuted(np.broadcast_to(np.arange(q), (n, q)), axis=1)[:, :k]
    valid = rng.random((n, k)) < np.linspace(0, 1, n)[:, None]
    slack = rng.uniform(0.01, 1, (n, k, q))
    np.put_along_axis(slack, planted[..., None], 0.0, axis=-1)
    b = np.zeros((n, q))
    np.put_along_axis(b, planted, np.where(valid, -3 * rng.random((n, k)), 0), axis=-1)
    cost = rng.normal(size=(n, k, 1)) + b[:, None] + slack
    np.testing.assert_array_equal(
        solve(cost.astype(np.float32), valid), np.where(valid, planted, 0)
    )


def test_longest_paths():
    """Costs i j make every new target push all earlier ones along; their only optimum orders the
    targets by i.
    """
    for k, q in ((19, 100), (19, 19)):
        cost = np.outer(np.arange(1, k + 1), np.arange(1, q + 1)).astype(np.float32)
        query = np.asarray(solve(np.stack([cost, cost[::-1], -cost, cost]), np.ones((4, k), bool)))
        np.testing.assert_array_equal(
            query, [range(k)[::-1], range(k), range(q - k, q), range(k)[::-1]]
        )


def test_equals_scipy():
    """On 10 080 problems of every kind the totals are those of
    `scipy.optimize.linear_sum_assignment`.
    """
    scipy = pytest.importorskip("scipy.optimize")
    rng = np.random.default_rng(3)
    problems = 0
    for kind in KINDS:
        for n, k, q in ((240, 11, 50), (160, 19, 100), (230, 8, 8)):
            cost, valid = draw(rng, kind, n, k, q)
            query = np.asarray(solve(cost, valid))
            check_injective(valid, query, q)
            wrong, total, size = totals(cost, valid, query)
            # A bound that outweighs all finite costs; float64 has the digits for it where NaN and
            # 1e10 do not meet.
            finite = np.abs(np.nan_to_num(cost, nan=np.inf)) < 1e29
            bound = 1e3 * np.max(np.abs(cost), initial=1.0, where=finite)
            for i, bounded in enumerate(np.where(finite, cost, bound).astype(np.float64)):
                rows, best = scipy.linear_sum_assignment(bounded[valid[i]])
                expected = np.zeros(k, np.int64)
                expected[np.flatnonzero(valid[i])[rows]] = best
                least_wrong, least, _ = totals(cost[i], valid[i], expected)
                assert wrong[i] == least_wrong, kind
                assert abs(total[i] - least) <= 1e-6 * size[i], (kind, total[i], least)
            problems += n
    assert problems == 10_080


def test_absent_targets_are_not_read():
    """What stands in invalid slots changes nothing, and with no valid slot at all the answer is 0
    everywhere.
    """
    rng = np.random.default_rng(4)
    cost, valid = draw(rng, "normal", 160, 5, 6)
    nan = np.where(valid[..., None], cost, np.nan)
    low = np.where(valid[..., None], cost, np.float32(-1e9))
    np.testing.assert_array_equal(solve(nan, valid), solve(cost, valid))
    np.testing.assert_array_equal(solve(low, valid), solve(cost, valid))
    np.testing.assert_array_equal(solve(cost, np.zeros_like(valid)), 0)


def test_a_batch_is_its_problems():
    """Layers and images in leading axes, one problem at a time, and the batch spread over devices
    all give the same queries.
    """
    rng = np.random.default_rng(5)
    cost, valid = draw(rng, "near ties", 24, 5, 6)
    alone = np.stack([solve(c, v) for c, v in zip(cost, valid, strict=True)])
    np.testing.assert_array_equal(solve(cost, valid), alone)
    cost = cost.reshape(3, 8, 5, 6)
    valid = valid.reshape(3, 8, 5)
    np.testing.assert_array_equal(solve(cost, valid), alone.reshape(3, 8, 5))
    sharding = NamedSharding(Mesh(np.array(jax.devices()), ("data",)), PartitionSpec(None, "data"))
    np.testing.assert_array_equal(
        solve(jax.device_put(cost, sharding), jax.device_put(valid, sharding)),
        alone.reshape(3, 8, 5),
    )


def test_one_program_for_any_targets():
    """No class, one, all, ties and NaN run the program that the first call compiled; lower
    precision is read as float32.
    """
    solve = jax.jit(lambda cost, valid: assign(cost, valid))
    rng = np.random.default_rng(6)
    for kind in KINDS:
        solve(*draw(rng, kind, 160, 5, 6))
    solve(np.zeros((160, 5, 6), np.float32), np.zeros((160, 5), bool))
    assert solve._cache_size() == 1
    cost, valid = draw(rng, "normal", 160, 5, 6)
    half = jnp.asarray(cost, jnp.bfloat16)
    np.testing.assert_array_equal(solve(half, valid), solve(half.astype(jnp.float32), valid))


def test_gradients_pass_by():
    """A loss that picks costs by the assignment is differentiated as if the assignment were a
    constant, NaN costs or not.
    """
    rng = np.random.default_rng(7)
    cost, valid = draw(rng, "broken queries", 160, 5, 6)

    def loss(cost):
        taken = jnp.take_along_axis(cost, assign(cost, jnp.asarray(valid))[..., None], -1)[..., 0]
        return jnp.sum(jnp.where(valid, taken, 0.0))

    picked = valid[..., None] & (np.asarray(solve(cost, valid))[..., None] == np.arange(6))
    np.testing.assert_array_equal(jax.jit(jax.grad(loss))(cost), picked)


def predictions(rng, n, k, q, p, scale=3.0):
    """Class logits, mask logits and targets as sampled bilinearly: mostly 0 and 1, some fractions,
    one empty mask.
    """
    class_logits = scale * rng.normal(size=(*n, q, k + 1))
    mask_logits = scale * rng.normal(size=(*n, q, p))
    targets = np.clip(rng.normal(0.3, 0.7, (*n, k, p)), 0, 1)
    targets[..., 0, :] = 0
    return tuple(x.astype(np.float32) for x in (class_logits, mask_logits, targets))


def test_cost_equals_plain_numpy():
    """The cost of each pair is the formula's in float64: softmax, cross entropy of each point, dice
    with eps 1; also for sure masks.
    """
    rng = np.random.default_rng(8)
    for scale, weights in ((3.0, (2.0, 5.0, 5.0)), (15.0, (1.0, 0.5, 4.0))):
        class_logits, mask_logits, targets = predictions(rng, (2,), 3, 5, 301, scale)
        cost = np.asarray(cost_of(class_logits, mask_logits, targets, weights))
        assert cost.dtype == np.float32
        for i, j, query in np.ndindex(2, 3, 5):
            scores = np.exp(class_logits[i, query].astype(np.float64))
            x = mask_logits[i, query].astype(np.float64)
            probability = 1 / (1 + np.exp(-x))
            t = targets[i, j].astype(np.float64)
            cross_entropy = np.mean(t * np.logaddexp(0, -x) + (1 - t) * np.logaddexp(0, x))
            dice = 1 - (2 * np.sum(t * probability) + 1) / (np.sum(t) + np.sum(probability) + 1)
            expected = (
                -weights[0] * scores[j] / scores.sum()
                + weights[1] * cross_entropy
                + weights[2] * dice
            )
            assert abs(cost[i, j, query] - expected) <= 1e-5 * max(1, abs(expected))


def test_cost_and_queries_equal_transformers():
    """The cost functions of transformers give the same costs within 1e-5; its matcher, drawing the
    same points, the same queries.
    """
    torch = pytest.importorskip("torch")
    pytest.importorskip("tests.oracles.stand_ins")  # before transformers
    pytest.importorskip("transformers")
    from transformers.models.mask2former import modeling_mask2former as reference

    rng = np.random.default_rng(9)
    n = 4
    k = 5
    q = 12
    p = 500
    class_logits, masks, _ = (torch.from_numpy(x) for x in predictions(rng, (n,), k, q, 16 * 16))
    masks = masks.reshape(n, q, 16, 16)
    labels = torch.from_numpy(rng.integers(-1, k, (n, 64, 64)))
    truth = (labels[:, None] == torch.arange(k)[:, None, None]).float()
    present = [torch.arange(k)[torch.from_numpy(rng.random(k) < 0.6)] for _ in range(n)]

    matcher = reference.Mask2FormerHungarianMatcher(
        cost_class=2.0, cost_mask=5.0, cost_dice=5.0, num_points=p
    )
    torch.manual_seed(0)
    matches = matcher(
        masks, class_logits, [t[c] for t, c in zip(truth, present, strict=True)], present
    )
    torch.manual_seed(0)
    points = torch.cat([torch.rand(1, p, 2) for _ in range(n)])
    mask_logits, targets = (
        reference.sample_point(x, points, align_corners=False) for x in (masks, truth)
    )
    assert 0 < float(((targets > 0) & (targets < 1)).float().mean()) < 1
    cost = cost_of(class_logits.numpy(), mask_logits.numpy(), targets.numpy())

    for i in range(n):
        expected = -2 * class_logits[i].softmax(-1)[:, :k]
        expected = expected + 5 * reference.pair_wise_sigmoid_cross_entropy_loss(
            mask_logits[i], targets[i]
        )
        expected = expected + 5 * reference.pair_wise_dice_loss(mask_logits[i], targets[i])
        np.testing.assert_allclose(cost[i], expected.numpy().T, rtol=1e-5, atol=1e-5)
    valid = np.array([np.isin(np.arange(k), c.numpy()) for c in present])
    query = np.asarray(solve(cost, valid))
    for i, (queries, slots) in enumerate(matches):
        np.testing.assert_array_equal(query[i, present[i][slots].numpy()], queries.numpy())


def test_non_finite_logits():
    """A query whose logits are NaN or infinite costs `NON_FINITE`, no other cost changes, and it is
    taken only where nothing is left.
    """
    rng = np.random.default_rng(10)
    class_logits, mask_logits, targets = predictions(rng, (), 4, 6, 50)
    targets[:, 0] = (0, 1, 1, 0)
    good = np.asarray(cost_of(class_logits, mask_logits, targets))
    class_logits[0, 1] = np.nan
    class_logits[2, 0] = np.inf
    mask_logits[3, 0] = np.nan
    cost = np.asarray(cost_of(class_logits, mask_logits, targets))
    assert (cost[:, [0, 2, 3]] == np.float32(NON_FINITE)).all()
    np.testing.assert_array_equal(cost[:, [1, 4, 5]], good[:, [1, 4, 5]])
    assert set(
        np.asarray(solve(cost, np.array([True, False, True, True])))[[0, 2, 3]].tolist()
    ) == {1, 4, 5}
    assert {1, 4, 5} < set(np.asarray(solve(cost, np.ones(4, bool))).tolist())
    for value in (np.nan, np.inf, -np.inf, 3e38, -3e38):
        cost = np.asarray(
            cost_of(np.full_like(class_logits, value), np.full_like(mask_logits, value), targets)
        )
        assert np.isfinite(cost).all()
        check_injective(np.ones((1, 4), bool), np.asarray(solve(cost, np.ones(4, bool)))[None], 6)


def test_mistakes_are_said():
    """More targets than queries and a wrong number of classes are refused when tracing, each with
    what to do.
    """
    with pytest.raises(
        ValueError, match=r"7 targets .* 6 queries; use at least as many queries as classes"
    ):
        jax.eval_shape(assign, jnp.zeros((2, 7, 6)), jnp.zeros((2, 7), bool))
    with pytest.raises(ValueError, match="7 target slots need 8"):
        jax.eval_shape(matching_cost, jnp.zeros((9, 7)), jnp.zeros((9, 5)), jnp.zeros((7, 5)))
