"""Both pyramids against torch's layers, and a transposed convolution in NumPy.

The golden files are made by tests/oracles/golden_vit.py and golden_interpolation.py.
"""

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdg import weights
from jaxdg.backbones import Interpolation, Pyramid


def transposed(x, kernel, bias):
    """Transposed convolution, kernel 2 and stride 2, by its definition: each input pixel paints 2x2
    output pixels.
    """
    b, h, w, _ = x.shape
    out = np.zeros((b, 2 * h, 2 * w, kernel.shape[3]))
    for y in range(h):
        for x_ in range(w):
            for i in range(2):
                for j in range(2):
                    out[:, 2 * y + i, 2 * x_ + j] = x[:, y, x_] @ kernel[i, j] + bias
    return out


@pytest.fixture(scope="module")
def torch_layers(golden):
    with np.load(golden / "pyramid.npz") as archive:
        return dict(archive)


def build(torch_layers, norm, tmp_path):
    """Our pyramid with torch's parameters; ConvTranspose2d weights [in, out, i, j] become kernels
    [i, j, in, out].
    """
    tensors = {
        "fpn1_norm.scale": torch_layers["norm.weight"],
        "fpn1_norm.bias": torch_layers["norm.bias"],
    }
    if norm == "batch":
        tensors |= {
            "fpn1_norm.mean": torch_layers["norm.mean"],
            "fpn1_norm.var": torch_layers["norm.var"],
        }
    for name in ("fpn1_up1", "fpn1_up2", "fpn2"):
        tensors[f"{name}.kernel"] = torch_layers[f"{name}.weight"].transpose(2, 3, 0, 1)
        tensors[f"{name}.bias"] = torch_layers[f"{name}.bias"]
    weights.save(tensors, tmp_path / "pyramid.safetensors", {})
    pyramid = nnx.eval_shape(lambda: Pyramid(4, norm, rngs=nnx.Rngs(0)))
    weights.load(pyramid, tmp_path / "pyramid.safetensors")
    return pyramid


@pytest.mark.parametrize("norm", ["layer", "batch"])
def test_levels_equal_torch(torch_layers, norm, tmp_path):
    """Four levels from maps with odd sides equal torch's, with LayerNorm and with BatchNorm's
    running statistics.
    """
    maps = tuple(jnp.asarray(torch_layers["maps"]))
    levels = build(torch_layers, norm, tmp_path)(maps)
    assert [level.shape for level in levels] == [
        (2, 12, 20, 4),
        (2, 6, 10, 4),
        (2, 3, 5, 4),
        (2, 1, 2, 4),
    ]
    np.testing.assert_allclose(levels[0], torch_layers[f"level0/{norm}"], atol=1e-5)
    for i in (1, 2, 3):
        np.testing.assert_allclose(levels[i], torch_layers[f"level{i}/layer"], atol=1e-5)


def test_training_uses_and_keeps_the_statistics_of_the_batch(torch_layers, tmp_path):
    """BatchNorm in training equals torch's, and moves the running mean as torch does and the
    variance by a tenth of the way.
    """
    pyramid = build(torch_layers, "batch", tmp_path)
    levels = pyramid(tuple(jnp.asarray(torch_layers["maps"])), train=True)
    np.testing.assert_allclose(levels[0], torch_layers["level0/batch/train"], atol=2e-5)
    assert np.abs(levels[0] - torch_layers["level0/batch"]).max() > 0.01, "and not the running ones"
    got = weights.tensors(pyramid)
    np.testing.assert_allclose(got["fpn1_norm.mean"], torch_layers["mean/after"], atol=1e-6)
    # Flax keeps the variance of the batch itself, torch the unbiased estimate (n / (n - 1) of it).
    np.testing.assert_allclose(
        got["fpn1_norm.var"],
        0.9 * torch_layers["norm.var"] + 0.1 * torch_layers["var/batch"],
        atol=1e-6,
    )


def test_statistics_are_kept_in_half_precision_too(torch_layers, tmp_path):
    """There norm and activation are computed anew in the backward pass: the statistics move once,
    and the gradients are near those of float32.
    """
    full = build(torch_layers, "batch", tmp_path)
    half = nnx.eval_shape(lambda: Pyramid(4, "batch", dtype="bfloat16", rngs=nnx.Rngs(0)))
    weights.load(half, tmp_path / "pyramid.safetensors")
    maps = tuple(jnp.asarray(torch_layers["maps"]))

    @nnx.jit
    def gradients(pyramid):
        def loss(pyramid):
            return jnp.mean(jnp.square(pyramid(maps, train=True)[0].astype(jnp.float32)))

        return nnx.grad(loss)(pyramid)

    single = gradients(full)
    rounded = gradients(half)
    for name in ("mean", "var"):
        got, want = (weights.tensors(p)[f"fpn1_norm.{name}"] for p in (half, full))
        np.testing.assert_allclose(got, want, atol=0.01)
        assert np.abs(want - torch_layers[f"norm.{name}"]).max() > 0.05, "they moved"
    # The bias before the norm has no gradient but rounding.
    largest = max(np.linalg.norm(leaf) for leaf in jax.tree.leaves(single))
    for got, want in zip(jax.tree.leaves(rounded), jax.tree.leaves(single), strict=True):
        assert np.linalg.norm(got - want) <= 0.1 * np.linalg.norm(want) + 0.01 * largest


def test_enlarging_equals_the_definition_of_a_transposed_convolution(torch_layers, tmp_path):
    """The matrix product laid out as pixels is a transposed convolution: kernel[i, j] makes the
    pixel in row i, column j.
    """
    pyramid = build(torch_layers, "layer", tmp_path)
    x = torch_layers["maps"][1]
    expected = transposed(
        x, torch_layers["fpn2.weight"].transpose(2, 3, 0, 1), torch_layers["fpn2.bias"]
    )
    np.testing.assert_allclose(pyramid.fpn2(jnp.asarray(x)), expected, atol=1e-5)


def test_bfloat16_compute_is_close(torch_layers, tmp_path):
    """Half precision stays within 2 % of float32."""
    full = build(torch_layers, "layer", tmp_path)
    half = nnx.eval_shape(lambda: Pyramid(4, "layer", dtype="bfloat16", rngs=nnx.Rngs(0)))
    weights.load(half, tmp_path / "pyramid.safetensors")
    maps = tuple(jnp.asarray(torch_layers["maps"]))
    for a, b in zip(full(maps), half(maps), strict=True):
        assert np.linalg.norm(a - np.asarray(b, np.float32)) <= 2e-2 * np.linalg.norm(a)


def test_interpolated_levels_and_gradients_equal_torch(golden):
    """Four levels of maps with odd sides, and the gradients of each; half precision differs by its
    rounding alone.
    """
    with np.load(golden / "interpolation.npz") as archive:
        theirs = dict(archive)
    pyramid = Interpolation()
    assert not weights.shapes(pyramid)
    maps = tuple(jnp.asarray(theirs[f"map{i}"]) for i in range(4))
    factors = [theirs[f"factors{i}"] for i in range(4)]

    @jax.jit
    def run(maps):
        levels, backward = jax.vjp(pyramid, maps)
        return levels, backward(tuple(map(jnp.asarray, factors)))[0]

    levels, gradients = run(maps)
    assert [level.shape for level in levels] == [
        (2, 20, 28, 3),
        (2, 10, 14, 3),
        (2, 5, 7, 3),
        (2, 2, 3, 3),
    ]
    for i in range(4):
        np.testing.assert_allclose(levels[i], theirs[f"level{i}"], rtol=1e-6, atol=1e-6)
        np.testing.assert_allclose(gradients[i], theirs[f"gradient{i}"], rtol=1e-5, atol=1e-5)
    half = pyramid(tuple(x.astype(jnp.bfloat16) for x in maps))
    for level, rounded in zip(levels, half, strict=True):
        assert rounded.dtype == jnp.bfloat16
        np.testing.assert_allclose(rounded.astype(jnp.float32), level, atol=0.02)
