"""Set matching of Mask2Former (Cheng et al. 2022): which query each target mask is trained on.

The cost of a match weighs class probability, binary cross entropy and dice at points that the masks
of an image share. The assignment of least total cost (Kuhn 1955) is found by shortest augmenting
paths over dual potentials (Jonker & Volgenant 1987), on the device, for all layers and images at
once. Different from transformers' `Mask2FormerHungarianMatcher`, which gives each image's matrix to
SciPy on the host:

- Shapes are fixed: slot j of the targets is class j, absent classes are invalid slots. Nothing
  recompiles as classes come and go.
- One loop serves every problem. A problem moves on to its next target without waiting for the
  others, so the loop is as long as the slowest problem: about as many rounds as it has targets
  where they prefer different queries, at most their number squared, each a few vector operations of
  length q.
- A non-finite cost is used only where no finite one is left, and the finite costs are still matched
  optimally. transformers replaces it by the largest float, beside which the potentials of the
  finite costs would vanish. Here costs are pairs (number of non-finite entries, sum of the finite
  ones) in lexicographic order; shortest paths need no more than an ordered group.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int32

# Costs of this magnitude count as non-finite. Sums of smaller ones stay far below float32's largest
# number.
NON_FINITE = 1e30
WEIGHTS = (2.0, 5.0, 5.0)  # of the class, mask and dice terms, in the matching as in the loss


def matching_cost(
    class_logits: Float[Array, "*n q c"],
    mask_logits: Float[Array, "*n q p"],
    targets: Float[Array, "*n k p"],
    weights: tuple[float, float, float] = WEIGHTS,
) -> Float[Array, "*n k q"]:
    """Cost of matching each target with each query, as in Mask2Former, in float32.

    Args:
        class_logits: scores of the k classes and, last, of no object: c = k + 1.
        mask_logits: at the p points that the masks of an image share.
        targets: target masks at the same points, in [0, 1]; slot j is class j. The costs of absent
            classes are not read.
        weights: of -(probability of the target's class), binary cross entropy (mean over the
            points) and dice loss (eps 1).

    Returns:
        The costs; `NON_FINITE` where the logits make them NaN or infinite.

    Raises:
        ValueError: `class_logits` has not one class more than there are target slots.
    """
    k = targets.shape[-2]
    if class_logits.shape[-1] != k + 1:
        raise ValueError(
            f"class_logits score {class_logits.shape[-1]} classes; {k} target slots need {k + 1},"
            " no object being the last"
        )
    class_logits, logits, targets = (
        x.astype(jnp.float32) for x in (class_logits, mask_logits, targets)
    )
    exact = jax.lax.Precision.HIGHEST
    probability = jnp.swapaxes(jax.nn.softmax(class_logits)[..., :k], -1, -2)
    # The cross entropy of logit x with target t is softplus(x) - x t, so one product covers all
    # pairs.
    product = jnp.einsum("...kp,...qp->...kq", targets, logits, precision=exact)
    cross_entropy = (
        jnp.mean(jax.nn.softplus(logits), axis=-1)[..., None, :] - product / logits.shape[-1]
    )
    mask = jax.nn.sigmoid(logits)
    overlap = jnp.einsum("...kp,...qp->...kq", targets, mask, precision=exact)
    area = jnp.sum(targets, axis=-1)[..., :, None] + jnp.sum(mask, axis=-1)[..., None, :]
    dice = 1.0 - (2.0 * overlap + 1.0) / (area + 1.0)
    cost = -weights[0] * probability + weights[1] * cross_entropy + weights[2] * dice
    return jnp.where(jnp.abs(cost) < NON_FINITE, cost, NON_FINITE)


def assign(cost: Float[Array, "*n k q"], valid: Bool[Array, "*n k"]) -> Int32[Array, "*n k"]:
    """A query of its own for each valid target, in the assignment of least total cost.

    Of the assignments with the fewest non-finite entries, it is the one whose finite entries have
    the least sum, up to float32's rounding. No gradient.

    Args:
        cost: of matching target with query; NaN, infinite and magnitudes from `NON_FINITE` on count
            as non-finite.
        valid: targets that exist; the costs of the others are not read.

    Returns:
        Indices of queries; 0 for the targets that are not valid.

    Raises:
        ValueError: there are more target slots than queries.
    """
    k, q = cost.shape[-2:]
    if k > q:
        raise ValueError(
            f"{k} targets cannot each have one of {q} queries; use at least as many queries as"
            " classes"
        )
    return jnp.vectorize(_assign, signature="(k,q),(k)->(k)")(
        jax.lax.stop_gradient(cost).astype(jnp.float32), valid
    )


class _Search(NamedTuple):
    """The assignment, the potentials and the tree of alternating paths from the current target.

    -1 is none. Lengths, potentials and costs are pairs along their first axis. Targets need no
    potential: a matched one is tight with its query.
    """

    query_of: Int32[Array, "k"]
    target_of: Int32[Array, "q"]
    potential: Float[Array, "2 q"]  # of the queries; zero until a query is matched
    length: Float[Array, "2 q"]  # of the shortest path to each query through the tree
    before: Int32[Array, "q"]  # the target by which that path comes to the query
    reached: Bool[Array, "q"]  # queries of the tree
    leaf: Int32[Array, ""]  # the target the tree grows from next; none: its root
    offset: Float[Array, "2 1"]  # length of the path to `leaf`, less the potential of `leaf`
    end: Int32[Array, ""]  # query from which the path is flipped next; none while the tree grows


def _assign(cost: Float[Array, "k q"], valid: Bool[Array, "k"]) -> Int32[Array, "k"]:
    """Solves one problem in one flat loop, so that a batch takes the rounds of its slowest."""
    k, q = cost.shape
    targets = jnp.arange(k, dtype=jnp.int32)
    queries = jnp.arange(q, dtype=jnp.int32)
    none = jnp.int32(-1)
    finite = jnp.abs(cost) < NON_FINITE
    pairs = jnp.stack([jnp.where(finite, 0.0, 1.0), jnp.where(finite, cost, 0.0)])

    def unfinished(s: _Search) -> Bool[Array, ""]:
        return jnp.any(valid & (s.query_of < 0))

    def step(s: _Search) -> _Search:
        # Grow the tree by the nearest query that it has not reached.
        growing = s.end < 0
        leaf = jnp.where(s.leaf < 0, jnp.argmax(valid & (s.query_of < 0)), s.leaf)
        candidate = s.offset + pairs[:, leaf] - s.potential
        shorter = growing & ~s.reached & _less(candidate, s.length)
        length = jnp.where(shorter, candidate, s.length)
        before = jnp.where(shorter, leaf, s.before)
        nearest = _argmin(jnp.where(s.reached, jnp.inf, length))
        distance = length[:, nearest, None]
        owner = s.target_of[nearest]
        # A free query ends the search; the potentials then make the path to it tight.
        found = growing & (owner < 0)
        potential = jnp.where(found & s.reached, s.potential + (length - distance), s.potential)
        offset = distance - (pairs[:, owner, nearest, None] - potential[:, nearest, None])
        # Flip one edge of the path: its query goes to the target before it, which gives up its own.
        end = jnp.where(found, nearest, s.end)
        flipping = end >= 0
        taker = before[end]
        given_up = s.query_of[taker]
        done = flipping & (given_up < 0)  # the root had none: the tree of the next target starts
        return _Search(
            query_of=jnp.where(flipping & (targets == taker), end, s.query_of),
            target_of=jnp.where(flipping & (queries == end), taker, s.target_of),
            potential=potential,
            length=jnp.where(done, jnp.inf, length),
            before=before,
            reached=(s.reached | (queries == nearest)) & ~done,
            leaf=jnp.where(done, none, owner),
            offset=jnp.where(done, 0.0, offset),
            end=jnp.where(flipping, given_up, none),
        )

    start = _Search(
        query_of=jnp.full(k, none),
        target_of=jnp.full(q, none),
        potential=jnp.zeros((2, q)),
        length=jnp.full((2, q), jnp.inf),
        before=jnp.zeros(q, jnp.int32),
        reached=jnp.zeros(q, bool),
        leaf=none,
        offset=jnp.zeros((2, 1)),
        end=none,
    )
    return jnp.maximum(jax.lax.while_loop(unfinished, step, start).query_of, 0)


def _less(a: Float[Array, "2 q"], b: Float[Array, "2 q"]) -> Bool[Array, "q"]:
    """Lexicographic order of pairs."""
    return (a[0] < b[0]) | ((a[0] == b[0]) & (a[1] < b[1]))


def _argmin(x: Float[Array, "2 q"]) -> Int32[Array, ""]:
    """First index of the least pair.

    Three plain minima: `jnp.argmin`, a reduction of pairs, takes twice the time on CPU.
    """
    first = jnp.min(x[0])
    second = jnp.where(x[0] == first, x[1], jnp.inf)
    index = jnp.arange(x.shape[-1], dtype=jnp.int32)
    return jnp.min(jnp.where(second == jnp.min(second), index, x.shape[-1] - 1))
