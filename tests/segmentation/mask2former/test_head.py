"""The Mask2Former head against transformers (golden), with weights under its names, and laws of its
own.
"""

import dataclasses
import math

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdg import weights
from jaxdg.conversion import mapping
from jaxdg.segmentation import Mask2Former, Mask2FormerConfig
from jaxdg.segmentation.mask2former.head import Predictions


@pytest.fixture(scope="module")
def want(golden):
    """What the oracle says."""
    with np.load(golden / "mask2former_queries.npz") as file:
        return dict(file)


@pytest.fixture(scope="module")
def run(head):
    """The head, free running, compiled once a shape."""
    return jax.jit(lambda maps: head(maps))


def relative(got, want):
    """Norm of the difference by the norm of `want`."""
    return float(np.linalg.norm(np.asarray(got) - want) / np.linalg.norm(want))


def test_the_table_has_exactly_the_oracles_tensors(head, layout, want):
    """Names and shapes of transformers' state dict, no more and no less."""
    theirs = {
        name.removeprefix("shape/"): tuple(shape)
        for name, shape in want.items()
        if name.startswith("shape/")
    }
    assert mapping.source_shapes(head, layout) == theirs


@pytest.mark.parametrize("case", ["even", "odd"])
def test_every_layer_equals_the_oracle_where_it_looks_the_same(head, features, want, case):
    """Class and mask logits before and after every layer within 1e-4, the attention masks being the
    oracle's.
    """
    looked = [jnp.asarray(want[f"{case}/looked{i}"]) for i in range(head.config.layers)]
    assert all(0.05 < mask.mean() < 0.95 for mask in looked), "masks matter everywhere"
    empty = [want[f"{case}/empty{i}"] for i in range(head.config.layers)]
    assert any(mask.any() for mask in empty) == (case == "odd"), (
        "there a query whose mask is empty looks everywhere"
    )
    output = jax.jit(lambda x, looked: head.decode(*head.pixel_decoder(x), looked))(
        features(case), looked
    )
    classes, masks = output
    np.testing.assert_allclose(classes, want[f"{case}/classes"], rtol=0, atol=1e-4)
    np.testing.assert_allclose(masks, want[f"{case}/masks"], rtol=0, atol=1e-4)


@pytest.mark.parametrize("case", ["even", "odd"])
def test_free_running_equals_the_oracle(run, features, want, case):
    """With its own attention masks every prediction is within 1e-3 of the oracle's norm: one pixel
    seen otherwise would show.
    """
    classes, masks = run(features(case))
    assert classes.shape == (5, 1, 12, 6)
    for i in range(5):
        assert relative(classes[i], want[f"{case}/classes"][i]) < 1e-3
        assert relative(masks[i], want[f"{case}/masks"][i]) < 1e-3


def test_gradients_equal_the_oracle(head, features, want, layout, normal):
    """Of a weighted sum of all logits, free running, with respect to the four maps and to
    parameters of every part.
    """
    graph, params = nnx.split(head)
    towards = [normal(name, want[f"even/{name}"].shape) for name in ("classes", "masks")]

    def loss(params, maps):
        return sum(
            jnp.sum(logits * direction)
            for logits, direction in zip(nnx.merge(graph, params)(maps), towards, strict=True)
        )

    to_params, to_maps = jax.jit(jax.grad(loss, (0, 1)))(params, features("even"))
    for i, gradient in enumerate(to_maps):
        assert relative(gradient, want[f"to_feature{i}"]) < 1e-4, i
    got = mapping.from_flax(head, layout, weights.tensors(nnx.merge(graph, to_params)))
    observed = [name.removeprefix("to/") for name in want if name.startswith("to/")]
    assert len(observed) > 10
    for name in observed:
        assert relative(got[name], want[f"to/{name}"]) < 1e-4, name


def test_two_images_in_a_batch_equal_each_alone(run, features, normal):
    """No image sees the other, in either decoder."""
    one = features("even")
    other = tuple(jnp.asarray(normal(f"other {i}", x.shape)) for i, x in enumerate(one))
    together = run(tuple(jnp.concatenate(pair) for pair in zip(one, other, strict=True)))
    for i, alone in enumerate((run(one), run(other))):
        for got, single in zip(together, alone, strict=True):
            np.testing.assert_allclose(got[:, i], single[:, 0], rtol=1e-4, atol=1e-4)


def test_compute_in_bfloat16_stays_near(head, features, want, config):
    """Parameters stay float32, logits come out float32, and with the same attention masks they are
    within 5 % of full precision.
    """
    half = nnx.eval_shape(
        lambda: Mask2Former(
            dataclasses.replace(config, dtype="bfloat16"), (8, 12, 16, 24), rngs=nnx.Rngs(0)
        )
    )
    nnx.update(half, nnx.state(head))
    assert {tensor.dtype for tensor in weights.tensors(half).values()} == {np.dtype(np.float32)}
    looked = [jnp.asarray(want[f"even/looked{i}"]) for i in range(config.layers)]
    output = jax.jit(lambda x, looked: half.decode(*half.pixel_decoder(x), looked))(
        features("even"), looked
    )
    for logits, name in zip(output, ("classes", "masks"), strict=True):
        assert logits.dtype == jnp.float32
        assert relative(logits, want[f"even/{name}"]) < 0.05


def test_the_papers_defaults_have_the_papers_shapes():
    """100 queries, 19 classes and none, 10 predictions, at the finest map's size, for VLTSeg's
    pyramid at 512x512.
    """
    head = nnx.eval_shape(
        lambda: Mask2Former(Mask2FormerConfig(num_classes=19), (1024,) * 4, rngs=nnx.Rngs(0))
    )
    maps = tuple(
        jax.ShapeDtypeStruct((2, side, side, 1024), jnp.float32) for side in (144, 72, 36, 18)
    )
    classes, masks = nnx.eval_shape(lambda head, maps: tuple(head(maps)), head, maps)
    assert (classes.shape, masks.shape) == ((10, 2, 100, 20), (10, 2, 100, 144, 144))
    assert (classes.dtype, masks.dtype) == (jnp.float32, jnp.float32)


@pytest.mark.parametrize("published", [True, False])
def test_where_training_starts(config, published):
    """As the authors: what sampling points read by Xavier and the same for all; else every kernel
    as torch's, places and weights too.
    """
    config = dataclasses.replace(config, published_init=published)
    tensors = weights.tensors(Mask2Former(config, (8, 12, 16, 24), rngs=nnx.Rngs(0)))
    spreads = {}
    for name, kernel in ((n, np.asarray(t)) for n, t in tensors.items() if n.endswith("kernel")):
        fan_in = kernel.shape[-2] if kernel.ndim < 4 else math.prod(kernel.shape[:-1])
        spreads[name] = np.abs(kernel).max() * fan_in**0.5
    default = {name for name, spread in spreads.items() if 0.9 < spread <= 1}
    assert default >= {
        name for name in spreads if not published or "class_embed" in name or "mask_embed" in name
    }
    if published:
        square = {
            name: spread
            for name, spread in spreads.items()
            if name.endswith(("value_proj.kernel", "output_proj.kernel"))
        }
        np.testing.assert_allclose(list(square.values()), 3**0.5, rtol=0.02)
    places = np.concatenate(
        [np.ravel(t) for n, t in tensors.items() if n.endswith("sampling_offsets.bias")]
    )
    assert np.abs(places).max() == pytest.approx(
        config.sampling_points if published else config.hidden**-0.5, rel=0.02
    )


def test_scores_are_the_votes_of_the_last_layer(head):
    """Semantic inference at the masks' own size equals the sum over queries, written out; "no
    object" has no vote.
    """
    rng = np.random.default_rng(0)
    classes, embeds, features = (
        rng.standard_normal(shape).astype(np.float32)
        for shape in ((5, 2, 12, 6), (5, 2, 12, 8), (2, 3, 4, 8))
    )
    masks = np.einsum("lbqc,bhwc->lbqhw", embeds, features)
    output = Predictions(*(jnp.asarray(x) for x in (classes, embeds, features)))
    got = head.scores(output, (3, 4))
    chances = np.exp(classes[-1]) / np.exp(classes[-1]).sum(-1, keepdims=True)
    for b, y, x, k in np.ndindex(2, 3, 4, 5):
        votes = sum(chances[b, q, k] / (1 + np.exp(-masks[-1, b, q, y, x])) for q in range(12))
        np.testing.assert_allclose(got[b, y, x, k], votes, rtol=1e-5)


def test_inference_computes_one_prediction(head, features):
    """Class scores cost what all predictions cost without the masks of all but the last: compiled
    code does not compute those.
    """
    maps = features("even")

    def operations(function):
        return jax.jit(function).lower(maps).compile().cost_analysis()["flops"]

    every = operations(lambda maps: tuple(head(maps)))
    last = operations(lambda maps: head.scores(head(maps), (16, 24)))
    queries = 12
    channels = 64
    layers = 4
    pixels = 16 * 24
    spared = layers * 2 * queries * channels * pixels
    votes = (
        2 * queries * 5 * pixels + 16 * queries * pixels
    )  # and resizing and sigmoids, generously
    assert last < every - spared + votes
    assert spared > 2 * votes


@pytest.mark.parametrize(
    ("changed", "channels", "message"),
    [
        ({}, (8, 12, 16), "four feature maps"),
        ({"hidden": 48}, (8, 12, 16, 24), "hidden is 48; allowed: multiples of 32"),
        (
            {"heads": 6},
            (8, 12, 16, 24),
            "hidden is 64; allowed: multiples of 32 .* and of heads, 6",
        ),
    ],
)
def test_sizes_that_do_not_fit_are_refused(config, changed, channels, message):
    """One line says what is wrong and what is allowed."""
    with pytest.raises(ValueError, match=message):
        Mask2Former(dataclasses.replace(config, **changed), channels, rngs=nnx.Rngs(0))
