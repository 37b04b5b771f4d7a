"""Mask2Former's training loss (Cheng et al. 2022) with fixed shapes: one target mask a class, read
at random points.

As the authors' criterion, by way of `transformers`' `Mask2FormerLoss`: each prediction (before the
first decoder layer and after every layer) is matched with the target masks at points that the masks
of an image share. Then every matched mask is compared with its target at points of its own, most of
them chosen where the mask is least certain. Differences:

- Slot j of an image's targets is class j, with a flag whether the class occurs, so shapes never
  depend on the labels.
- Target masks are read from the label map, at the points alone, instead of being laid out one a
  class.
- The terms are divided by a `LossDenominator` from outside, so that a batch may be computed in
  parts.

Points are (x, y), 0 to 1 from the left and the top edge of the map. All is float32, whatever the
logits are.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Float32, Int32, Key, UInt8, UInt32

from jaxdg.backbones.scatter_sum import scatter_sum
from jaxdg.segmentation.mask2former.deformable_attention import corner_shares
from jaxdg.segmentation.mask2former.matching import WEIGHTS, assign, matching_cost

IGNORE = 255
NO_OBJECT = 0.1  # weight of an unmatched query in the class term; a matched one weighs 1
OVERSAMPLE = 3  # candidates drawn for each point of the loss
IMPORTANCE = (
    0.75  # share of the points that are the least certain candidates; the rest is drawn uniformly
)


class LossDenominator(NamedTuple):
    """What the loss terms of the global batch are divided by.

    Attributes:
        masks: target masks, at least 1.
        class_weight: sum over queries of the class term's weights.
    """

    masks: Float32[Array, ""]
    class_weight: Float32[Array, ""]


def classes_present(label: UInt8[Array, "b H W"], num_classes: int) -> Bool[Array, "b k"]:
    """Which of the classes occur in each label map: the valid target slots."""
    return jnp.any(
        label[:, None] == jnp.arange(num_classes, dtype=jnp.uint8)[:, None, None], axis=(2, 3)
    )


def mask2former_loss_denominator(
    label: UInt8[Array, "b H W"], num_classes: int, num_queries: int
) -> LossDenominator:
    """Counts what `mask2former_loss` is divided by.

    Args:
        label: of the global batch; class ids, 255 where nothing is labelled.
        num_classes: k.
        num_queries: q.
    """
    masks = jnp.sum(classes_present(label, num_classes)).astype(jnp.float32)
    return LossDenominator(
        jnp.maximum(masks, 1), masks + NO_OBJECT * (label.shape[0] * num_queries - masks)
    )


def mask2former_loss(
    class_logits: Float[Array, "l b q k1"],
    mask_embeds: Float[Array, "l b q c"],
    mask_features: Float[Array, "b h w c"],
    label: UInt8[Array, "b H W"],
    denominator: LossDenominator,
    key: Key[Array, ""],
    *,
    points: int = 12544,
    query: Int32[Array, " k"] | None = None,
) -> dict[str, Float32[Array, ""]]:
    """The loss of all predictions of a batch, or of a part of it.

    Args:
        class_logits: of each prediction l; the k classes and, last, "no object": k1 = k + 1.
        mask_embeds: of each prediction; their products with `mask_features` are the mask logits.
        mask_features: at any resolution.
        label: class ids; 255, like any id from k on, belongs to no mask.
        denominator: `mask2former_loss_denominator` of the global batch. The losses of its parts
            then add up to the loss of the whole.
        key: draws the points.
        points: a mask is compared on, in the matching as in the loss.
        query: of each class, in every image and prediction; None: those that the matching finds.

    Returns:
        The terms "class" (cross entropy), "mask" (binary cross entropy) and "dice", summed over
        predictions and multiplied by their weights, so that they add up to the loss.

    Raises:
        ValueError: there are fewer queries than classes.
    """
    layers, b, _, classes = class_logits.shape
    valid = classes_present(label, classes - 1)
    matching_keys, points_keys = jax.random.split(key, (2, layers))

    # One prediction after another: masks of all of them would be gigabytes at the paper's size.
    # Only the assignment, a sequence of many small operations, runs for all at once.
    def costs(inputs):
        class_logits, embeds, key = inputs
        masks = mask_logits(embeds, jax.lax.stop_gradient(mask_features))
        return prediction_costs(class_logits, masks, label, draw_points(key, (b, 1, points)))

    if query is None:
        with jax.named_scope("matching"):
            predictions = jax.lax.stop_gradient((class_logits, mask_embeds))
            cost = jax.lax.map(costs, (*predictions, matching_keys))
            matching = assign(cost, jnp.broadcast_to(valid, (layers, *valid.shape)))
    else:
        matching = jnp.broadcast_to(query, (layers, *valid.shape))

    matched = jax.vmap(matched_embeds, (0, 0, None))(mask_embeds, matching, valid)
    matched_masks = mask_logits(matched, mask_features)

    def terms(inputs):
        class_logits, masks, query, key = inputs
        drawn = draw_points(
            key, (*valid.shape, OVERSAMPLE * points + points - int(IMPORTANCE * points))
        )
        candidates, uniform = jnp.split(drawn, [OVERSAMPLE * points], axis=-2)
        compared = uncertain_points(jax.lax.stop_gradient(masks), candidates, uniform, points)
        return class_term(class_logits, query, valid), *mask_terms(masks, label, valid, compared)

    # Two at a time are half as many kernels for a GPU, in 0.4 GB more at the paper's size.
    each = (class_logits, matched_masks, matching, points_keys)
    entropy, mask, dice = (jnp.sum(x) for x in jax.lax.map(terms, each, batch_size=2))
    return {
        "class": WEIGHTS[0] * entropy / denominator.class_weight,
        "mask": WEIGHTS[1] * mask / denominator.masks,
        "dice": WEIGHTS[2] * dice / denominator.masks,
    }


def prediction_costs(
    class_logits: Float[Array, "b q c"],
    mask_logits: Float[Array, "b q h w"],
    label: UInt8[Array, "b H W"],
    points: Float[Array, "b 1 p 2"],
) -> Float32[Array, "b k q"]:
    """Matching costs of one prediction, on points shared by all masks of an image."""
    targets = sample_labels(label, points, class_logits.shape[-1] - 1)
    return matching_cost(class_logits, sample_masks(mask_logits, points), targets)


def mask_logits(
    embeds: Float[Array, "*l b n c"], features: Float[Array, "b h w c"]
) -> Float32[Array, "*l b n h w"]:
    """Masks of queries: the product of each query's embedding with each pixel's features."""
    return jnp.einsum("...bnc,bhwc->...bnhw", embeds, features, preferred_element_type=jnp.float32)


def matched_embeds(
    embeds: Float[Array, "b q c"], query: Int32[Array, "b k"], valid: Bool[Array, "b k"]
) -> Float[Array, "b k c"]:
    """Mask embedding of the query matched with each target slot; 0, without gradient, where a slot
    is empty.
    """
    query = jnp.where(valid, query, 0)
    matched = jnp.take_along_axis(embeds, query[..., None], axis=1, mode="promise_in_bounds")
    return jnp.where(valid[..., None], matched, 0)


def class_term(
    class_logits: Float[Array, "b q c"], query: Int32[Array, "b k"], valid: Bool[Array, "b k"]
) -> Float32[Array, ""]:
    """Weighted cross entropy summed over queries: the target's class for a matched one, "no object"
    for the others.
    """
    log_p = jax.nn.log_softmax(class_logits.astype(jnp.float32))
    matched = (query[:, None] == jnp.arange(log_p.shape[1])[:, None]) & valid[:, None]  # b q k
    unmatched = ~jnp.any(matched, axis=-1, keepdims=True)
    return -jnp.sum(jnp.concatenate([matched, NO_OBJECT * unmatched], axis=-1) * log_p)


def mask_terms(
    masks: Float[Array, "b k h w"],
    label: UInt8[Array, "b H W"],
    valid: Bool[Array, "b k"],
    points: Float[Array, "b k p 2"],
) -> tuple[Float32[Array, ""], Float32[Array, ""]]:
    """Binary cross entropy (mean over points) and dice loss (eps 1) of matched masks, each summed
    over the valid ones.

    Args:
        masks: logits of the query matched with each class.
        label: class ids.
        valid: classes that occur.
        points: where each mask is compared with its target.
    """
    logit = sample_masks(masks, points)
    target = sample_labels(label, points, masks.shape[1])
    entropy = jnp.mean(jax.nn.softplus(logit) - logit * target, axis=-1)
    p = jax.nn.sigmoid(logit)
    dice = 1 - (2 * jnp.sum(p * target, axis=-1) + 1) / (
        jnp.sum(p, axis=-1) + jnp.sum(target, axis=-1) + 1
    )
    return jnp.sum(entropy * valid), jnp.sum(dice * valid)


def draw_points(key: Key[Array, ""], shape: tuple[int, ...]) -> Float32[Array, "*shape 2"]:
    """Uniform points in the unit square, on a grid of 2^16 steps a side: both coordinates from one
    random word.
    """
    bits = jax.random.bits(key, shape, jnp.uint32)
    return (jnp.stack([bits & 0xFFFF, bits >> 16], axis=-1).astype(jnp.float32) + 0.5) / 2**16


def uncertain_points(
    masks: Float[Array, "*n h w"],
    candidates: Float[Array, "*n c 2"],
    uniform: Float[Array, "*n r 2"],
    points: int,
) -> Float32[Array, "*n p 2"]:
    """Where masks are compared: the candidates with the smallest |logit|, filled up to `points`
    with the `uniform` ones.

    The chosen candidates keep their order.
    """
    chosen = smallest(jnp.abs(sample_masks(masks, candidates)), points - uniform.shape[-2])
    candidates = jnp.take_along_axis(
        candidates, chosen[..., None], axis=-2, mode="promise_in_bounds"
    )
    return jnp.concatenate([candidates, uniform], axis=-2)


def smallest(x: Float32[Array, "*n c"], count: int) -> Int32[Array, "*n count"]:
    """Indices of the `count` smallest of non-negative numbers, ascending; of equal ones at the
    limit the first. NaN is the largest.
    """
    limit, below = jax.lax.platform_dependent(
        x, cpu=lambda x: _limit(x, count, 1), default=lambda x: _limit(x, count, 4)
    )
    bits = jax.lax.bitcast_convert_type(x, jnp.uint32)
    equal = bits == limit
    taken = (bits < limit) | (equal & (jnp.cumsum(equal, axis=-1) <= count - below))
    # `count` is out of bounds and dropped.
    place = jnp.where(taken, jnp.cumsum(taken, axis=-1) - 1, count)

    def scatter(place):
        indices = jnp.arange(place.shape[0], dtype=jnp.int32)
        return jnp.zeros(count, jnp.int32).at[place].set(indices, mode="drop")

    return jnp.vectorize(scatter, signature="(c)->(p)")(place)


def _limit(
    x: Float32[Array, "*n c"], count: int, digit: int
) -> tuple[UInt32[Array, "*n 1"], Int32[Array, "*n 1"]]:
    """The bits of the `count`-th smallest of non-negative numbers, and how many are smaller.

    Non-negative floats are ordered as the integers of the same bits, so these are found by
    counting, `digit` bits a round. For 3072 of 12288 numbers of 88 masks single bits took 8 ms of
    CPU time and four 70 (`jax.lax.top_k` 59 ms; November 2026); a GPU reads the numbers as often as
    there are rounds.
    """
    rounds = -(-31 // digit)  # the sign is 0

    def settle(i, state):
        """The largest limit that fewer than `count` numbers lie below, and how many do."""
        bits, limit, below = state
        shift = (digit * (rounds - 1 - i)).astype(jnp.uint32)
        trials = limit + (jnp.arange(1, 2**digit, dtype=jnp.uint32) << shift)
        counts = jnp.sum(bits[..., None, :] < trials[..., None], axis=-1)
        fewer = counts < count
        limit += jnp.sum(fewer, axis=-1, keepdims=True, dtype=jnp.uint32) << shift
        most = jnp.max(jnp.where(fewer, counts, 0), axis=-1, keepdims=True)
        # The numbers ride along, behind a barrier, or XLA would compute `x` anew wherever they are
        # read after the loop: choosing the points then took 62 ms instead of 40.
        return jax.lax.optimization_barrier(bits), limit, jnp.maximum(below, most)

    bits = jax.lax.bitcast_convert_type(x, jnp.uint32)
    zero = jnp.zeros((*x.shape[:-1], 1), jnp.uint32)
    return jax.lax.fori_loop(0, rounds, settle, (bits, zero, zero.astype(jnp.int32)))[1:]


@jax.custom_vjp
def sample_masks(
    masks: Float[Array, "*#n h w"], points: Float[Array, "*#n p 2"]
) -> Float32[Array, "*n p"]:
    """Reads masks bilinearly, as torch's `grid_sample` does with `align_corners=False` and zeros
    outside. No gradient for the points.

    Args:
        masks: logits; leading axes are broadcast with those of `points`.
        points: (x, y), 0 to 1 from the outer edge of the first pixel to that of the last.
    """
    return _gather_masks(masks, points)


def _gather_masks(masks, points):
    *_, h, w = masks.shape
    padded = _flat(masks.astype(jnp.float32), 0)
    index, right, low = _corners(points, h, w)
    return _bilinear(
        lambda step: jnp.take_along_axis(padded, index + step, axis=-1, mode="promise_in_bounds"),
        right,
        low,
        w,
    )


def sample_labels(
    label: UInt8[Array, "b H W"], points: Float[Array, "*l b s p 2"], num_classes: int
) -> Float32[Array, "*l b k p"]:
    """Reads the binary masks of all classes as `sample_masks` does, from the label map: four ids a
    point instead of k masks.

    Args:
        label: class ids.
        points: one set for each class, or one (s = 1) for all.
        num_classes: k.
    """
    b, h, w = label.shape
    padded = _flat(label, IGNORE)
    index, right, low = _corners(points, h, w)
    classes = jnp.arange(num_classes, dtype=jnp.uint8)[:, None]
    flat = index.reshape(*index.shape[:-2], -1)

    def read(step):
        ids = jnp.take_along_axis(
            padded.reshape(*[1] * (flat.ndim - 2), b, -1),
            flat + step,
            axis=-1,
            mode="promise_in_bounds",
        )
        return (ids.reshape(index.shape) == classes).astype(jnp.float32)

    return _bilinear(read, right, low, w)


def _flat(maps: Array, fill: int) -> Array:
    """Maps [.., h, w] framed with one pixel of `fill`, rows one after another."""
    maps = jnp.pad(maps, [(0, 0)] * (maps.ndim - 2) + [(1, 1), (1, 1)], constant_values=fill)
    return maps.reshape(*maps.shape[:-2], -1)


def _corners(points: Array, h: int, w: int) -> tuple[Array, Array, Array]:
    """Where the upper left of a point's four pixels is in `_flat` maps, and how far right and below
    of its centre the point is.
    """
    x = jnp.clip(points[..., 0] * w - 0.5, -1, w)  # beyond are zeros only
    y = jnp.clip(points[..., 1] * h - 0.5, -1, h)
    left = jnp.minimum(jnp.floor(x), w - 1)
    top = jnp.minimum(jnp.floor(y), h - 1)
    return ((top + 1) * (w + 2) + left + 1).astype(jnp.int32), x - left, y - top


def _bilinear(read, right, low, w):
    """Weighs the four pixels that `read` gives at steps from the upper left one in `_flat` maps."""
    above = read(0) * (1 - right) + read(1) * right
    below = read(w + 2) * (1 - right) + read(w + 3) * right
    return above * (1 - low) + below * low


def _sample_masks_forward(masks, points):
    # Only the shape and dtype of the masks matter to the gradient.
    return _gather_masks(masks, points), (masks, points)


def _sample_masks_backward(saved, g):
    masks, points = saved
    to_masks = jax.lax.platform_dependent(
        masks, points, g, cpu=_scatter_to_masks, default=_sum_to_masks
    )
    return to_masks, None


def _scatter_to_masks(masks, points, g):
    return jax.vjp(lambda masks: _gather_masks(masks, points), masks)[1](g)[0]


def _sum_to_masks(masks, points, g):
    """The same by a sum that has one result on a GPU, where a scatter adds in any order."""
    *n, h, w = masks.shape
    points = jnp.broadcast_to(points, (*n, *points.shape[-2:]))

    def one(points, g):
        first, right, low = _corners(points, h, w)
        rows = jnp.stack([first, first + 1, first + w + 2, first + w + 3])
        shares = jnp.stack(corner_shares(right, low))
        framed = scatter_sum((h + 2) * (w + 2), rows, shares, g[:, None])
        return framed.reshape(h + 2, w + 2)[1:-1, 1:-1]

    return jnp.vectorize(one, signature="(p,i),(p)->(h,w)")(points, g).astype(masks.dtype)


sample_masks.defvjp(_sample_masks_forward, _sample_masks_backward)
