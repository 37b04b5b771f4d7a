"""What a diffusion model's UNet attends to, against transformers' CLIP text tower.

The golden file is made by tests/oracles/golden_condition.py.
"""

import re

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdg import weights
from jaxdg.text import tokenizer
from jaxdg.text.condition import CONDITIONS, Condition, ConditionConfig
from tests.backbones.test_mit import drawn


@pytest.fixture(scope="module")
def archive(golden):
    with np.load(golden / "condition.npz") as file:
        return dict(file)


def ours(archive):
    """The golden tower's tensors by our names."""
    theirs = {
        name.removeprefix("encoder."): drawn(name, tuple(map(int, shape)))
        for name, *shape in map(str.split, archive["names"])
    }
    tensors = {
        "token_embedding": theirs.pop("embeddings.token_embedding.weight"),
        "positional_embedding": theirs.pop("embeddings.position_embedding.weight"),
    }
    for i in (0, 1):
        for kind in ("weight", "bias"):
            parts = [theirs.pop(f"layers.{i}.self_attn.{part}_proj.{kind}") for part in "qkv"]
            theirs[f"layers.{i}.self_attn.qkv.{kind}"] = np.concatenate(parts)
    for name, tensor in theirs.items():
        for pattern, by in (
            (r"layers\.", "blocks."),
            (r"self_attn\.", "attn."),
            (r"out_proj", "proj"),
            (r"layer_norm", "norm"),
            (r"final_norm", "ln_final"),
            (r"(norm\d|ln_final)\.weight", r"\1.scale"),
            (r"weight", "kernel"),
        ):
            name = re.sub(pattern, by, name)
        tensors[name] = tensor.T
    return tensors


@pytest.fixture(scope="module", params=["quick_gelu", "gelu"])
def tower(request, archive):
    """The golden tower; the one with GELU fills up texts as Stable Diffusion 2 does."""
    config = ConditionConfig(
        16, 2, 16, request.param, None, depth=2, fills_with_end=request.param == "quick_gelu"
    )
    module = nnx.eval_shape(lambda: Condition(config, rngs=nnx.Rngs(0)))
    weights.fill(module, ours(archive), "golden")
    return module


def test_states_equal_transformers(tower, archive):
    """Every token's state, that of the empty prompt as each version fills it up, and the mean of
    the end tokens' states of a class name in two templates.
    """
    graph, state = nnx.split(tower)
    states = jax.jit(lambda state, ids: nnx.merge(graph, state)(ids))(
        state, jnp.asarray(archive["ids"])
    )
    expected = archive[tower.config.activation]
    np.testing.assert_allclose(states, expected, atol=1e-4)
    row = 0 if tower.config.fills_with_end else 1
    np.testing.assert_allclose(tower.empty_prompt(), expected[row], atol=1e-4)
    (text,) = tokenizer.tokenize(["a photo of a"])
    np.testing.assert_array_equal(text[:6], archive["ids"][2][:6])
    rows = tower.class_names(["a", "photo"], ["a photo of {}", "{}"])
    np.testing.assert_allclose(
        tower.class_names(["a"], ["a photo of {}"])[0], expected[2, 5], atol=1e-4
    )
    alone = tower.class_names(["a"], ["{}"])[0]
    np.testing.assert_allclose(rows[0], (expected[2, 5] + alone) / 2, atol=1e-4)


def test_the_towers_have_the_published_sizes():
    """Parameters of CLIP L/14's text tower, and of OpenCLIP H/14's without its last block, as
    diffusers' text encoders have them.
    """
    counts = {}
    for name, config in CONDITIONS.items():
        module = nnx.eval_shape(lambda config=config: Condition(config, rngs=nnx.Rngs(0)))
        counts[name] = sum(int(np.prod(shape)) for shape in weights.shapes(module).values())
    assert counts == {"1.x": 123_060_480, "2.x": 340_387_840}
