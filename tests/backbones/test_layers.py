"""Layers in half precision: gradients of what is added to every token are summed in float32."""

import dataclasses

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdg import backbones
from jaxdg.backbones.deit3 import LayerScale
from jaxdg.backbones.layers import Conv, Linear, scanned_convolution
from jaxdg.backbones.pyramid import Double
from tests.small_zoo import reduced

MAP = (2, 32, 32, 3)


def layers(dtype):
    """Layers with a bias, made from the same seed."""
    options = dict(dtype=jnp.dtype(dtype), rngs=nnx.Rngs(0))
    return {
        "linear": Linear(3, 4, **options),
        "convolution": Conv(3, 4, (3, 3), **options),
        "double": Double(3, 4, dtype=dtype, rngs=nnx.Rngs(0)),
    }


@pytest.mark.parametrize("name", layers("bfloat16"))
def test_bias_gradients_are_sums_in_float32(name):
    """The gradient of a bias is the number of pixels times the cotangent; in bfloat16 a sum of
    ones ends at 256.
    """
    layer = layers("bfloat16")[name]
    x = jnp.ones(MAP)

    @jax.jit
    def gradient(layer):
        return nnx.grad(lambda layer: jnp.sum(layer(x).astype(jnp.float32)))(layer)

    pixels = layer(x).size // 4
    got = gradient(layer).bias[...]
    assert got.dtype == jnp.float32
    np.testing.assert_array_equal(got, np.full(4, pixels))


def test_scales_of_channels_too():
    """LayerScale: the sum over tokens of the features times the cotangent."""
    scale = LayerScale(4, 1.0)
    x = jnp.ones((2, 1024, 4), jnp.bfloat16)
    gradient = jax.jit(nnx.grad(lambda scale: jnp.sum(scale(x).astype(jnp.float32))))
    np.testing.assert_array_equal(gradient(scale).gamma[...], np.full(4, 2048))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    ("ours", "flax", "sizes"), [(Linear, nnx.Linear, ()), (Conv, nnx.Conv, (3,))]
)
def test_results_are_flaxs(ours, flax, sizes, dtype):
    """Bit for bit in both types, and the parameters have the same names; in float32 the gradients
    too. Without a bias they are the same layer.
    """
    random = np.random.default_rng(0)
    x = jnp.asarray(random.normal(size=MAP), jnp.float32)
    towards = jnp.asarray(random.normal(size=(*MAP[:3], 4)), jnp.float32)
    for bias in (True, False):
        options = dict(dtype=jnp.dtype(dtype), use_bias=bias, bias_init=nnx.initializers.normal(1))
        made = [
            kind(3, 4, *((side, side) for side in sizes), **options, rngs=nnx.Rngs(0))
            for kind in (ours, flax)
        ]
        states = [nnx.state(layer) for layer in made]
        assert jax.tree.structure(states[0]) == jax.tree.structure(states[1])

        def run(layer):
            y = layer(x)
            assert y.dtype == dtype
            return jnp.sum(y.astype(jnp.float32) * towards), y

        got, want = (jax.jit(nnx.grad(run, has_aux=True))(layer) for layer in made)
        np.testing.assert_array_equal(got[1], want[1])
        if dtype == "float32":
            jax.tree.map(np.testing.assert_array_equal, got[0], want[0])


def families():
    """One encoder of each class of the zoo."""
    found = {}
    for entry in backbones.ZOO.values():
        found.setdefault(type(entry.config), entry.config)
    return found.values()


def bfloat16_sums(jaxpr):
    """Shapes and axes of sums of bfloat16 in a program and in those within it."""
    for equation in jaxpr.eqns:
        (first, *_) = equation.invars or (None,)
        if equation.primitive.name == "reduce_sum" and first.aval.dtype == jnp.bfloat16:
            yield first.aval.shape, equation.params["axes"]
        for inner in jax.tree.leaves(
            list(equation.params.values()), is_leaf=lambda x: hasattr(x, "eqns")
        ):
            inner = getattr(inner, "jaxpr", inner)
            if hasattr(inner, "eqns"):
                yield from bfloat16_sums(inner)


def test_no_encoder_sums_in_half_precision():
    """The traced gradients of every family hold no sum of bfloat16, but of the eight rows of which
    EVA-02 appends a bias to a kernel; seven of them are zeros.
    """
    for config in families():
        config = dataclasses.replace(reduced(config), dtype="bfloat16")
        if isinstance(config, backbones.StagedConfig):
            config = dataclasses.replace(config, image_size=(64, 64))
        encoder = nnx.eval_shape(lambda config=config: config.build(rngs=nnx.Rngs(0)))
        graph, state = nnx.split(encoder)
        images = jax.ShapeDtypeStruct((2, *config.image_size, 3), jnp.float32)

        def loss(state, images, graph=graph):
            features = nnx.merge(graph, state)(images)
            return sum(jnp.sum(f.astype(jnp.float32) ** 2) for f in features)

        program = jax.make_jaxpr(jax.grad(loss))(state, images)
        found = [shape for shape, _ in bfloat16_sums(program.jaxpr)]
        rows = isinstance(config, backbones.Eva02Config)
        assert all(rows and shape[0] in (1, 8) and len(shape) == 2 for shape in found), config


@pytest.mark.parametrize(
    ("side", "stride", "padding", "more"),
    [
        (3, 1, (1, 1), {}),
        (3, 1, (0, 2), {}),
        (1, 1, (0, 0), {}),
        (2, 1, (1, 0), {}),
        (3, 2, (1, 1), {}),
        (3, 1, (1, 1), {"feature_group_count": 3}),
        (3, 1, (1, 1), {"rhs_dilation": (2, 1)}),
        (2, 1, (1, 1), {"lhs_dilation": (1, 2)}),
        (3, 1, (1, 1), {"batch_group_count": 2}),
    ],
)
def test_a_convolution_for_scans_is_jaxs(side, stride, padding, more):
    """The same numbers and, by float64, the same gradients of everything as that of JAX, without a
    pass through JAX's own gradient on CPU.
    """
    draw = np.random.default_rng(0).normal
    with jax.enable_x64(True):
        x = jnp.asarray(draw(size=(2, 5, 7, 3)))
        groups = more.get("feature_group_count", 1)
        kernel = jnp.asarray(draw(size=(side, side, 3 // groups, 6)))
        options = dict(dimension_numbers=("NHWC", "HWIO", "NHWC"), **more)

        def run(convolution):
            def loss(x, kernel):
                y = convolution(x, kernel, (stride, stride), (padding, padding), **options)
                return jnp.sum(y**2 / 3), y

            return jax.jit(jax.value_and_grad(loss, (0, 1), has_aux=True))(x, kernel)

        (_, got), got_slopes = run(scanned_convolution)
        (_, want), want_slopes = run(jax.lax.conv_general_dilated)
        np.testing.assert_array_equal(got, want, strict=True)
        for one, other in zip(got_slopes, want_slopes, strict=True):
            assert one.dtype == jnp.float64
            np.testing.assert_allclose(one, other, rtol=1e-12, atol=1e-12)


def test_the_gradients_of_scanned_convolutions_are_in_the_order_that_is_fast_on_cpu():
    """The compiled scan of a CLIP ResNet's stage holds no convolution in another order of axes."""
    config = dataclasses.replace(
        reduced(backbones.entry("clip_rn50").config), blocks=(3, 1, 1, 1), taps=(0,)
    )
    graph, state = nnx.split(config.build(rngs=nnx.Rngs(0)))
    images = jnp.zeros((1, *config.image_size, 3))

    def loss(state):
        return sum(jnp.sum(y) for y in nnx.merge(graph, state)(images))

    program = jax.jit(jax.grad(loss)).lower(state).compile().as_text()
    orders = {
        line.split("dim_labels=")[1].split(",")[0]
        for line in program.splitlines()
        if "/while/body/" in line and "dim_labels=" in line
    }
    assert orders == {"b01f_01io->b01f"}
