"""Attention on every kind of device against its definition."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdg.backbones import attention


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


@pytest.mark.parametrize("platform", ["cpu", "gpu"])
@pytest.mark.parametrize("masked", [False, True])
def test_attention_equals_the_definition(monkeypatch, platform, masked):
    """As many or fewer queries than keys, in float32."""
    monkeypatch.setattr(jax, "default_backend", lambda: platform)
    for queries, keys in ((7, 7), (4, 9)):
        q, k, v, mask = drawn(queries, keys)
        mask = mask if masked else None
        got = jax.jit(attention.attention)(q, k, v, mask)
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

        for a, b in zip(
            jax.grad(ours, (0, 1, 2))(q, k, v), jax.grad(whole, (0, 1, 2))(q, k, v), strict=True
        ):
            np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(("queries", "keys"), [(7, 7), (8, 8), (4, 9)])
def test_on_gpus_half_precision_takes_cudnn(monkeypatch, queries, keys):
    """An even number of tokens is what cuDNN is asked for; what fills them up is masked: with the
    same arguments jax's plain attention gives the definition's results, and gradients as without
    filling up.
    """
    plain = jax.nn.dot_product_attention
    asked = []

    def cudnn(q, k, v, implementation=None, **rest):
        asked.append((implementation, q.shape[1], k.shape[1]))
        return plain(q, k, v, **rest)

    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(jax.nn, "dot_product_attention", cudnn)
    q, k, v, _ = drawn(queries, keys, "bfloat16")
    got = attention.attention(q, k, v)
    assert got.shape == q.shape
    np.testing.assert_allclose(np.asarray(got, np.float64), slow(q, k, v), atol=0.02)

    def loss(f):
        return lambda *x: jnp.sum(jnp.sin(f(*x).astype(jnp.float32)))

    for a, b in zip(
        jax.grad(loss(attention.attention), (0, 1, 2))(q, k, v),
        jax.grad(loss(plain), (0, 1, 2))(q, k, v),
        strict=True,
    ):
        np.testing.assert_allclose(a.astype(jnp.float32), b.astype(jnp.float32), atol=0.02)
    assert {name for name, _, _ in asked} == {"cudnn"}
    assert all(m % 2 == n % 2 == 0 for _, m, n in asked)


def test_what_cudnn_does_not_take_is_left_to_jax(monkeypatch):
    """Float32, masks, and heads of a width that is no multiple of 8 or above 128."""
    plain = jax.nn.dot_product_attention
    asked = []
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(
        jax.nn,
        "dot_product_attention",
        lambda *a, **k: (asked.append(k.get("implementation")), plain(*a, **k))[1],
    )
    for *qkv, _ in (drawn(4, 4), drawn(4, 4, "bfloat16", 12), drawn(4, 4, "bfloat16", 136)):
        attention.attention(*qkv)
    *qkv, mask = drawn(4, 4, "bfloat16")
    attention.attention(*qkv, mask)
    assert asked == [None] * 4
