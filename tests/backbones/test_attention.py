"""Attention on every kind of device against its definition."""

import dataclasses
from functools import partial
import re

from flax import nnx
import jax
from jax.ad_checkpoint import checkpoint_name
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdg.backbones import Dinov3Config, Eva02Config, VitConfig, attention, cudnn
from jaxdg.backbones.stacking import stores_product


def drawn(queries, keys, dtype="float32", d=8):
    """Queries, keys and values of 3 heads of 2 images, and where the queries may look."""
    rng = np.random.default_rng(0)
    q, k, v = (jnp.asarray(rng.normal(size=(2, n, 3, d)), dtype) for n in (queries, keys, keys))
    mask = rng.random((2, queries, keys)) < 0.4
    mask[..., 0] |= ~mask.any(-1)
    return q, k, v, jnp.asarray(mask)


def slow(q, k, v, mask=None):
    """The definition, one query of one head at a time, in double precision."""
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    out = np.zeros(q.shape)
    for b, i, head in np.ndindex(*q.shape[:3]):
        seen = slice(None) if mask is None else mask[b, i]
        logits = k[b, seen, head] @ q[b, i, head] / np.sqrt(q.shape[-1])
        weights = np.exp(logits - logits.max())
        out[b, i, head] = weights / weights.sum() @ v[b, seen, head]
    return out


@pytest.mark.parametrize("way", [attention.attention, attention._without_storing])
@pytest.mark.parametrize("masked", [False, True])
def test_attention_equals_the_definition(way, masked):
    """As many or fewer queries than keys, in float32."""
    for queries, keys in ((7, 7), (4, 9)):
        q, k, v, mask = drawn(queries, keys)
        mask = mask if masked else None
        got = jax.jit(way)(q, k, v, mask)
        np.testing.assert_allclose(got, slow(q, k, v, mask), rtol=1e-5, atol=1e-6)


def test_attention_on_cpu_has_the_gradients_of_jaxs_own():
    """Heads in turn instead of at once, with and without a mask."""
    q, k, v, mask = drawn(5, 8)
    for m in (None, mask):

        def ours(*x, m=m):
            return jnp.sum(jnp.sin(attention.attention(*x, m)))

        def whole(*x, m=m):
            return jnp.sum(
                jnp.sin(jax.nn.dot_product_attention(*x, mask=None if m is None else m[:, None]))
            )

        gradients = [jax.jit(jax.grad(f, (0, 1, 2)))(q, k, v) for f in (ours, whole)]
        for a, b in zip(*gradients, strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)


def test_attention_of_all_heads_at_once_stores_no_logits():
    """Its gradients are those of jax's own, and the backward pass is given inputs alone."""
    q, k, v, mask = drawn(5, 8)

    def total(way):
        return lambda *x: jnp.sum(jnp.sin(way(*x)))

    for m in (None, mask):
        ours = jax.jit(jax.grad(total(attention._without_storing), (0, 1, 2)))
        whole = jax.jit(jax.grad(total(attention._all_heads), (0, 1, 2)))
        for got, want in zip(ours(q, k, v, m), whole(q, k, v, m), strict=True):
            np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6)

    def stored(way):
        return {x.shape for x in jax.tree.leaves(jax.vjp(way, q, k, v)[1])}

    assert stored(attention._without_storing) == {q.shape, k.shape}
    assert any(shape[-2:] == (5, 8) for shape in stored(attention._all_heads))


def lowered(platform, *qkv, mask=None, gradient=False):
    """The program for one platform, lowered where it need not exist."""

    def loss(q, k, v):
        return jnp.sum(jnp.sin(attention.attention(q, k, v, mask).astype(jnp.float32)))

    function = jax.grad(jax.checkpoint(loss, policy=stores_product)) if gradient else loss
    return jax.jit(function).trace(*qkv).lower(lowering_platforms=(platform,)).as_text()


@pytest.mark.parametrize("platform", ["cpu", "cuda", "tpu", "rocm"])
def test_a_program_holds_the_way_of_its_platform_alone(platform):
    """In half precision: cuDNN's kernel for CUDA, the loop over heads for CPUs, and neither for
    others. Each way keeps its own gradient.
    """
    *qkv, _ = drawn(7, 7, "bfloat16")
    for gradient in (False, True):
        text = lowered(platform, *qkv, gradient=gradient)
        assert ("fmhaSoftmax(" in text) == (platform == "cuda")
        assert ("fmhaSoftmaxBackward(" in text) == (platform == "cuda" and gradient)
        assert ("stablehlo.while" in text) == (platform == "cpu")
        assert "needs_cuda" not in text


def test_what_cudnn_does_not_take_is_left_to_jax():
    """Float32, with a mask too, and heads of a width that is no multiple of 8 or above 128."""
    *single, mask = drawn(4, 4)
    for *qkv, allowed in (
        (*single, None),
        (*single, mask),
        (*drawn(4, 4, "bfloat16", 12)[:3], None),
        (*drawn(4, 4, "bfloat16", 136)[:3], None),
    ):
        text = lowered("cuda", *qkv, mask=allowed)
        assert "fmha" not in text
        assert "stablehlo.while" not in text


def test_the_call_of_the_kernel_is_that_of_jax(monkeypatch):
    """The program is the one of `jax.nn.dot_product_attention(implementation="cudnn")`, which asks
    this machine for its cuDNN.
    """
    monkeypatch.setattr(cudnn.fused, "check_cudnn_version", lambda: cudnn.VERSION)
    q, k, v, _ = drawn(8, 8, "bfloat16")

    def jaxs(q, k, v):
        return jax.nn.dot_product_attention(q, k, v, implementation="cudnn")

    def text(function):
        gradient = jax.grad(lambda *x: jnp.sum(function(*x).astype(jnp.float32)), (0, 1, 2))
        return jax.jit(gradient).trace(q, k, v).lower(lowering_platforms=("cuda",)).as_text()

    calls = [
        [line.split("=", 1)[1] for line in text(f).splitlines() if "fmha" in line]
        for f in (cudnn.cudnn_attention, jaxs)
    ]
    assert len(calls[0]) == 2
    # The names of values differ.
    assert [re.sub(r"%\w+", "", line) for line in calls[0]] == [
        re.sub(r"%\w+", "", line) for line in calls[1]
    ]


def test_cudnn_takes_masks_in_half_precision():
    """A mask reaches the kernel as a bias of the logits, which has no gradient."""
    *qkv, mask = drawn(4, 9, "bfloat16")
    text = lowered("cuda", *qkv, mask=mask, gradient=True)
    assert "fmhaScaleBiasSoftmax(" in text
    assert "fmhaScaleBiasSoftmaxBackward(" in text


@pytest.mark.parametrize("way", ["alone", "masked", "padded"])
@pytest.mark.parametrize(("queries", "keys"), [(7, 7), (8, 8), (4, 9)])
def test_cudnn_gets_even_numbers_of_tokens(monkeypatch, queries, keys, way):
    """What fills up an odd number is masked: with the same arguments jax's plain attention gives
    the definition's results, and gradients as without filling up. So do masks and padded keys.
    """
    plain = jax.nn.dot_product_attention
    asked = []

    def kernel(q, k, v, lengths=None, bias=None):
        asked.append((q.shape[1], k.shape[1]))
        names = ("query_seq_lengths", "key_value_seq_lengths")
        return plain(q, k, v, bias=bias, **dict(zip(names, lengths or (), strict=False)))

    monkeypatch.setattr(cudnn, "_fused", kernel)
    q, k, v, mask = drawn(queries, keys, "bfloat16")
    mask = mask if way == "masked" else None
    padding = 2 if way == "padded" else 0
    seen = slice(keys - padding)

    def ours(q, k, v):
        return cudnn.cudnn_attention(q, k, v, mask, padding)

    def theirs(q, k, v):
        return plain(q, k[:, seen], v[:, seen], mask=None if mask is None else mask[:, None])

    got = ours(q, k, v)
    assert got.shape == q.shape
    want = slow(q, k[:, seen], v[:, seen], mask)
    np.testing.assert_allclose(np.asarray(got, np.float64), want, atol=0.02)

    def gradient(f):
        def loss(*x):
            return jnp.sum(jnp.sin(f(*x).astype(jnp.float32)))

        return jax.jit(jax.grad(loss, (0, 1, 2)))(q, k, v)

    for a, b in zip(gradient(ours), gradient(theirs), strict=True):
        np.testing.assert_allclose(a.astype(jnp.float32), b.astype(jnp.float32), atol=0.02)
    assert all(m % 2 == n % 2 == 0 for m, n in asked)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_nobody_looks_at_padding(dtype):
    """Nor does it get a gradient, whatever it holds."""
    q, k, v, _ = drawn(9, 9, dtype)
    padded = [x.at[:, 7:].set(jnp.nan) for x in (k, v)]

    def loss(q, k, v, padding=0):
        y = attention.attention(q, k, v, padding=padding)
        return jnp.sum(jnp.sin(y.astype(jnp.float32))), y

    run = jax.grad(loss, (0, 1, 2), has_aux=True)
    (dq, dk, dv), got = jax.jit(partial(run, padding=2))(q, *padded)
    expected, want = jax.jit(run)(q, k[:, :7], v[:, :7])
    np.testing.assert_array_equal(got, want)
    for a, b in zip((dq, dk[:, :7], dv[:, :7]), expected, strict=True):
        np.testing.assert_array_equal(a, b)
    assert not dk[:, 7:].any()
    assert not dv[:, 7:].any()


def test_a_mask_hides_padding_itself():
    """Both at once would leave open which of them counts."""
    q, k, v, mask = drawn(4, 9)
    with pytest.raises(ValueError, match="attention takes a mask or padding"):
        attention.attention(q, k, v, mask, padding=2)


def test_a_compiled_step_keeps_nothing_for_other_platforms():
    """What another platform's backward pass would read is neither computed nor stored."""

    def compiled(way):
        def loss(q, k, v):
            def block(x, _):
                return way(x, k, v), None

            body = jax.checkpoint(block, prevent_cse=False, policy=stores_product)
            x, _ = jax.lax.scan(body, q, None, length=3)
            return jnp.sum(x.astype(jnp.float32))

        *qkv, _ = drawn(32, 32, "bfloat16")
        return jax.jit(jax.grad(loss, (0, 1, 2))).lower(*qkv).compile()

    def of_cpus(*qkv):
        return attention._head_by_head(*(checkpoint_name(x, "input") for x in qkv))

    both = compiled(attention.attention)
    cpu = compiled(of_cpus)
    assert both.memory_analysis().temp_size_in_bytes == cpu.memory_analysis().temp_size_in_bytes
    assert both.cost_analysis()["flops"] == cpu.cost_analysis()["flops"]


@pytest.mark.parametrize("config", [VitConfig, Dinov3Config, Eva02Config])
def test_padding_changes_no_feature(config, monkeypatch):
    """An encoder in half precision pads its tokens once. In float32 the same padding shows that
    features and gradients stay as without.
    """
    c = config(image_size=(24, 48), patch_size=8, width=32, heads=2, depth=2, taps=(0, 1))
    half = dataclasses.replace(c, dtype="bfloat16")
    assert half.padding == -(c.prefix + 18) % 8 > 0
    assert c.padding == 0
    images = jnp.asarray(np.random.default_rng(0).normal(size=(2, 24, 48, 3)), jnp.float32)

    def loss(encoder):
        features = encoder(images)
        return sum(jnp.sum(jnp.sin(f)) for f in features), features

    def run(padding):
        monkeypatch.setattr(config, "padding", padding)
        return nnx.jit(nnx.grad(loss, has_aux=True))(c.build(rngs=nnx.Rngs(0)))

    for a, b in zip(*map(jax.tree.leaves, (run(half.padding), run(0))), strict=True):
        assert np.linalg.norm(a - b) <= 1e-5 * np.linalg.norm(b)
