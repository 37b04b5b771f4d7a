"""EVA-CLIP-8B and -18B for planning, against their authors' code (golden file made by
tests/oracles/golden_eva_clip.py).
"""

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdg import backbones, weights
from jaxdg.backbones import EvaClip, EvaClipConfig
from jaxdg.conversion import convert as torch_to_flax
from jaxdg.conversion import models
from tests.backbones.drawn import drawn, run, wave

SMALL = dict(image_size=(20, 20), patch_size=4, width=24, depth=4, heads=2, taps=(0, 1, 2, 3))


def build(**fields):
    """A small encoder with the golden weights, which are drawn from the authors' names for them."""
    encoder = nnx.eval_shape(lambda: EvaClip(EvaClipConfig(**SMALL | fields), rngs=nnx.Rngs(0)))
    tensors = {}
    for name, shape in weights.shapes(encoder).items():
        theirs = name.replace(".kernel", ".weight").replace(".scale", ".weight")
        axes = {4: (3, 2, 0, 1), 2: (1, 0)}.get(
            len(shape), range(len(shape))
        )  # torch's, of convolutions and linear layers
        tensor = drawn(theirs, tuple(shape[axis] for axis in axes))
        tensors[name] = tensor.transpose(np.argsort(axes))
    weights.fill(encoder, tensors, "golden")
    return encoder


@pytest.mark.parametrize(("name", "postnorm"), [("8b", False), ("18b", True)])
def test_tokens_equal_the_authors(golden, name, postnorm):
    """Every block's tokens, class token included, with norms before and after attention and MLP."""
    with np.load(golden / "eva_clip.npz") as archive:
        expected = archive[f"tokens/{name}"]
    config = backbones.entry(f"eva_clip_{name}").config
    assert isinstance(config, EvaClipConfig)
    assert config.postnorm is postnorm
    np.testing.assert_allclose(
        np.stack(run(build(postnorm=postnorm), wave(20, 20))), expected, rtol=0, atol=1e-4
    )


@pytest.mark.parametrize("name", ["8b", "18b"])
def test_parameters_are_exactly_as_many_as_the_authors(golden, name):
    """Built by shapes alone: all of the published tower but its final norm and head, and no larger
    than said.
    """
    with np.load(golden / "eva_clip.npz") as archive:
        total, beyond = map(int, archive[f"parameters/{name}"])
    encoder = nnx.eval_shape(lambda: backbones.create(f"eva_clip_{name}"))
    shapes = weights.shapes(encoder)
    assert sum(int(np.prod(shape)) for shape in shapes.values()) == total - beyond
    assert round(total / 1e9, 1) == {"8b": 7.5, "18b": 17.6}[name]
    assert encoder.config.width // encoder.config.heads == 128


def test_a_training_step_can_be_planned():
    """Shapes of gradients and features of the 18B encoder at another image and patch size, without
    a number being computed.
    """
    encoder = nnx.eval_shape(
        lambda: backbones.create(
            "eva_clip_18b", image_size=(512, 1024), patch_size=16, remat=True, dtype="bfloat16"
        )
    )
    graph, state = nnx.split(encoder)

    def features(state, images):
        return nnx.merge(graph, state)(images)

    images = jax.ShapeDtypeStruct((2, 512, 1024, 3), jnp.float32)
    assert {f.shape for f in jax.eval_shape(features, state, images)} == {(2, 32, 64, 5120)}

    def loss(state, images):
        return sum(jnp.sum(f.astype(jnp.float32)) for f in features(state, images))

    gradients = jax.eval_shape(jax.grad(loss), state, images)
    assert jax.tree.map(jnp.shape, gradients) == jax.tree.map(jnp.shape, state)


def test_every_parameter_gets_a_gradient_and_steps_along_it_lower_the_loss():
    """In both orders of the norms: gradients of all parameters are finite and not all zero, and
    descent learns a target.
    """
    for postnorm in (False, True):
        graph, state = nnx.split(build(postnorm=postnorm, taps=(3,)))
        images = jnp.asarray(wave(20, 20))
        target = jnp.asarray(drawn("target", (1, 5, 5, 24)))

        @jax.jit
        def step(state, graph=graph, images=images, target=target):
            def loss(state):
                return jnp.mean((nnx.merge(graph, state)(images)[-1] - target) ** 2)

            value, gradients = jax.value_and_grad(loss)(state)
            return value, gradients, jax.tree.map(lambda p, g: p - 2e-2 * g, state, gradients)

        losses = []
        for _ in range(20):
            value, gradients, state = step(state)
            losses.append(float(value))
            for path, leaf in nnx.to_flat_state(gradients):
                assert np.isfinite(leaf[...]).all(), path
                assert np.abs(leaf[...]).max() > 0, path
        assert losses[-1] < 0.8 * losses[0], losses


def test_bfloat16_compute_is_close():
    """bfloat16 changes the tokens by less than 2 %; parameters stay float32."""
    expected = np.stack(run(build(taps=(3,)), wave(20, 20)))
    encoder = build(taps=(3,), dtype="bfloat16")
    assert {tensor.dtype for tensor in weights.tensors(encoder).values()} == {np.dtype(np.float32)}
    tokens = run(encoder, wave(20, 20))
    assert tokens[0].dtype == jnp.bfloat16
    assert (
        0
        < np.linalg.norm(np.asarray(tokens[0], np.float32) - expected[0]) / np.linalg.norm(expected)
        < 2e-2
    )


def test_checkpoints_are_not_converted(tmp_path, capsys):
    """Errors and the list say that these encoders are for planning."""
    (tmp_path / "x.pt").touch()
    for direction in ([], ["--reverse"]):
        arguments = [
            "--model",
            "eva_clip_8b",
            "--checkpoint",
            str(tmp_path / "x.pt"),
            "--out",
            str(tmp_path / "y.safetensors"),
            *direction,
        ]
        assert torch_to_flax.main(arguments) == 1
        assert "eva_clip_8b is for planning" in capsys.readouterr().err
    lines = {line.split()[0]: line for line in models.listing().splitlines()}
    for name in ("eva_clip_8b", "eva_clip_18b", "dinov2_g14"):
        assert "for planning, not converted" in lines[name]
