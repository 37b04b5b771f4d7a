"""Losses of detectors against torch and torchvision (golden), plain NumPy, and laws of masks."""

import jax
import jax.numpy as jnp
import numpy as np

from jaxdg.detection import losses
from tests.detection import cases


def test_equal_torch(golden):
    """L1, smooth L1 with beta 1/9 and focal loss, element by element with their gradients; 1 - GIoU
    as `generalized_box_iou_loss`.
    """
    x, target = (jnp.asarray(6 * cases.towards(name, (300,))) for name in ("prediction", "target"))
    present = (target > 2).astype(jnp.float32)
    with np.load(golden / "detection.npz") as file:
        want = dict(file)
    for name, loss in {
        "l1": lambda x: losses.smooth_l1(x, target),
        "smooth_l1": lambda x: losses.smooth_l1(x, target, 1 / 9),
        "focal": lambda x: losses.sigmoid_focal_loss(x, present),
    }.items():
        found, pull = jax.vjp(jax.jit(loss), x)
        np.testing.assert_allclose(found, want[name], rtol=1e-5, atol=1e-6, err_msg=name)
        (gradient,) = pull(jnp.ones_like(found))
        np.testing.assert_allclose(
            gradient, want[name + "_gradient"], rtol=1e-5, atol=1e-6, err_msg=name
        )
    pairs = (jnp.asarray(cases.proper_boxes(name, 500, 50, 90)) for name in ("left", "right"))
    giou_loss = jax.jit(losses.giou_loss)
    np.testing.assert_allclose(giou_loss(*pairs), want["giou_loss"], rtol=1e-5, atol=1e-6)


def test_cross_entropies_equal_plain_numpy():
    """Softmax cross entropy with class ids and sigmoid cross entropy with soft targets: the
    formulas in float64, large logits included.
    """
    rng = np.random.default_rng(0)
    logits = rng.normal(0, 8, (50, 6))
    target = rng.integers(0, 6, 50)
    want = np.log(np.exp(logits).sum(-1)) - logits[np.arange(50), target]
    np.testing.assert_allclose(
        jax.jit(losses.cross_entropy)(jnp.asarray(logits, jnp.float32), jnp.asarray(target)),
        want,
        rtol=1e-5,
        atol=1e-5,
    )
    soft = rng.random((50, 6))
    want = soft * np.logaddexp(0, -logits) + (1 - soft) * np.logaddexp(0, logits)
    got = jax.jit(losses.sigmoid_cross_entropy)(
        jnp.asarray(logits, jnp.float32), jnp.asarray(soft, jnp.float32)
    )
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)
    sure = jnp.asarray([1e4, -1e4])
    slope = jax.grad(lambda x: jnp.sum(losses.sigmoid_focal_loss(x, jnp.asarray([0.0, 1.0]))))
    gradient = jax.jit(slope)(sure)
    np.testing.assert_allclose(gradient, [0.75, -0.25], rtol=1e-6)


def test_masked_values_reach_nothing():
    """Values off the mask, infinite or not a number, change neither the sum nor any gradient to the
    others; an empty mask sums to 0.
    """
    values = jnp.asarray([1.0, jnp.nan, 2.5, jnp.inf])
    mask = jnp.asarray([True, False, True, False])
    total, gradient = jax.jit(jax.value_and_grad(losses.masked_sum))(values, mask)
    assert float(total) == 3.5
    np.testing.assert_array_equal(gradient, [1, 0, 1, 0])
    assert float(losses.masked_sum(values, ~mask & mask)) == 0
