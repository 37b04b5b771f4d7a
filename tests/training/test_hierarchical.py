"""Training with hierarchical encoders: both kinds with every decoder, what `freeze` means for
stages, BatchNorm that stays as it was.
"""

import re

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdg import weights
from jaxdg.backbones import ClipResnetConfig, MitConfig, zoo
from jaxdg.config import Mask2FormerOptions
from jaxdg.segmentation.segformer import SegformerOptions

MIT = MitConfig(blocks=(1, 2, 3, 1), widths=(8, 16, 20, 32))
RESNET = ClipResnetConfig(blocks=(1, 2, 3, 1), widths=(16, 32, 64, 128), pool_grid=2, embedding=6)
QUERIES = Mask2FormerOptions(
    hidden=32, queries=20, heads=4, pixel_layers=1, pixel_ffn=16, layers=1, ffn=16, points=32
)


@pytest.fixture(autouse=True)
def small(monkeypatch):
    """Small encoders of both kinds."""
    monkeypatch.setitem(zoo.ZOO, "small_mit", zoo.Entry(MIT))
    monkeypatch.setitem(zoo.ZOO, "small_resnet", zoo.Entry(RESNET))


def configured(make_run, encoder, decoder, crop=(64, 64), freeze="none"):
    """A run at a crop size."""
    return make_run(
        model={
            "encoder": encoder,
            "decoder": decoder,
            "pyramid": "layer",
            "taps": (),
            "freeze": freeze,
            "segformer": SegformerOptions(hidden=16),
            "mask2former": QUERIES,
        },
        data={"crop": crop},
        optimizer={"clip": 1.0, "learning_rate": 1e-2, "weight_decay": 0.5},
        steps=60,
    )


def named(tree):
    """Arrays by per-block name."""
    flat = {path: np.asarray(leaf[...]) for path, leaf in nnx.to_flat_state(tree)}
    return {
        name: flat[at.path] if at.layer is None else flat[at.path][at.layer]
        for name, at in weights.slots(tree).items()
    }


def named_shapes(run):
    """Names of all tensors of a run's model."""
    return {name for part in run.plan.abstract for name in weights.slots(part)}


@pytest.mark.parametrize(
    ("encoder", "crop"), [("small_mit", (97, 131)), ("small_resnet", (128, 128))]
)
@pytest.mark.parametrize("decoder", ["linear", "segformer", "mask2former"])
def test_every_pair_fits(make_run, encoder, decoder, crop):
    """A training step of each encoder with each decoder, also at odd sizes, has the shapes of its
    state, though a pyramid is configured.
    """
    run = configured(make_run, encoder, decoder, crop)
    batch = {
        "image": jax.ShapeDtypeStruct((2, *crop, 3), jnp.uint8),
        "label": jax.ShapeDtypeStruct((2, *crop), jnp.uint8),
    }
    following, metrics = jax.eval_shape(run.step(), run.like, batch)
    assert jax.tree.map(lambda leaf: leaf.shape, following) == jax.tree.map(
        lambda leaf: leaf.shape, run.like
    )
    assert metrics["loss"].shape == ()
    assert not any(name.startswith("pyramid") for name in named_shapes(run))


@pytest.mark.parametrize(
    ("encoder", "crop"), [("small_mit", (128, 128)), ("small_resnet", (97, 131))]
)
def test_a_step_with_mask2former(make_run, encoder, crop):
    """One real step: a finite loss, every trained parameter finite and moved, and what is frozen or
    a statistic as it was to the bit.
    """
    run = configured(make_run, encoder, "mask2former", crop, freeze="first 3")
    state = run.state()
    before = [named(part) for part in (state.trained, state.frozen, state.statistics)]
    following, metrics = run.step()(state, run.batch(rows=2))
    assert np.isfinite(float(metrics["loss"]))
    trained, frozen, statistics = (
        named(part) for part in (following.trained, following.frozen, following.statistics)
    )
    for name, tensor in trained.items():
        assert np.isfinite(tensor).all(), name
        assert (tensor != before[0][name]).any(), name
    for old, new in ((before[1], frozen), (before[2], statistics)):
        for name, tensor in new.items():
            np.testing.assert_array_equal(tensor, old[name], err_msg=name)
    assert bool(statistics) == (encoder == "small_resnet")


@pytest.mark.parametrize(("encoder", "freeze"), [("small_mit", "all"), ("small_resnet", "first 2")])
def test_segformer_learns_on_a_frozen_or_tuned_encoder(make_run, encoder, freeze):
    """Twelve steps in two parts each lower the loss; the decoder's running statistics move, the
    frozen part and the encoder's do not.
    """
    run = configured(make_run, encoder, "segformer", freeze=freeze)
    state = run.state()
    step = run.step(accumulate=2)
    losses = []
    old_frozen = named(state.frozen)
    old_statistics = named(state.statistics)
    image = np.zeros((2, 64, 64, 3), np.uint8)
    image[:, :, 32:] = 200
    batch = {"image": jnp.asarray(image), "label": jnp.asarray(image[..., 0] // 100)}
    for _ in range(12):
        state, metrics = step(state, batch)
        losses.append(float(metrics["loss"]))
    assert losses[-1] < 0.5 * losses[0], losses
    assert {
        name for name, tensor in named(state.frozen).items() if (tensor != old_frozen[name]).any()
    } == set()
    moved = {
        name
        for name, tensor in named(state.statistics).items()
        if (tensor != old_statistics[name]).any()
    }
    assert moved == {"head.batch_norm.mean", "head.batch_norm.var"}
    assert {name for name in named(state.frozen) if not name.startswith("backbone.")} == set()


def stages(*numbers):
    return lambda name: name.startswith(
        tuple(
            f"backbone.{part}{i}."
            for i in numbers
            for part in ("patch_embed", "block", "norm", "layer")
        )
    )


def embeddings(name):
    return name.startswith(("backbone.conv", "backbone.attnpool."))


def either(*tests):
    return lambda name: any(test(name) for test in tests)


@pytest.mark.parametrize(
    ("encoder", "freeze", "expected", "ends"),
    [
        ("small_mit", "none", lambda name: False, ((0,), (1,), (2,), (0,))),
        ("small_mit", "first 0", lambda name: False, ((0,), (1,), (2,), (0,))),
        ("small_mit", "first 2", stages(1, 2), ((0,), (1,), (2,), (0,))),
        ("small_mit", "last 1", stages(4), ((0,), (1,), (2,), (0,))),
        ("small_mit", "last 4", stages(1, 2, 3, 4), ((0,), (1,), (2,), (0,))),
        ("small_mit", r"block3\.[12]\.|block2\.1\.attn\.q\.", None, ((0,), (0, 1), (0, 2), (0,))),
        ("small_mit", r"block\d\.\d\.attn\.sr|norm\d", None, ((0,), (1,), (2,), (0,))),
        ("small_resnet", "none", lambda name: "attnpool" in name, ((0,), (0, 1), (0, 2), (0,))),
        ("small_resnet", "first 0", embeddings, ((0,), (0, 1), (0, 2), (0,))),
        (
            "small_resnet",
            "first 3",
            either(embeddings, stages(1, 2, 3)),
            ((0,), (0, 1), (0, 2), (0,)),
        ),
        (
            "small_resnet",
            "last 2",
            either(stages(3, 4), lambda name: "attnpool" in name),
            ((0,), (0, 1), (0, 2), (0,)),
        ),
        ("small_resnet", r"layer3\.2\.conv1|attnpool", None, ((0,), (0, 1), (0, 1, 2), (0,))),
    ],
)
def test_what_is_frozen_and_where_stacks_end(make_run, encoder, freeze, expected, ends):
    """Stages counted with their embeddings and norms, or any part of a stack by a regular
    expression, are frozen, nothing else is.
    """
    expected = expected or (lambda name: bool(re.search(freeze, name)))
    run = configured(make_run, encoder, "linear", freeze=freeze)
    trained, frozen, _ = (set(weights.slots(part)) for part in run.plan.abstract)
    assert frozen == {name for name in trained | frozen if expected(name)}
    backbone = nnx.merge(run.plan.graph, *run.plan.abstract).backbone
    stacks = [
        getattr(backbone, f"{'block' if encoder == 'small_mit' else 'layer'}{i}")
        for i in (1, 2, 3, 4)
    ]
    assert tuple(stack.ends for stack in stacks) == ends


def test_more_stages_than_there_are_are_refused(make_run):
    """The message says that stages are counted, and how many there are."""
    with pytest.raises(
        ValueError, match=r"model\.freeze is 'first 5'; allowed: at most 4, the encoder's stages$"
    ):
        configured(make_run, "small_mit", "linear", freeze="first 5")


def test_fewer_stages_read_are_fewer_to_freeze(make_run):
    """With two taps only their stages are built, counted and frozen."""
    model = {"encoder": "small_mit", "taps": (0, 1), "freeze": "last 2", "pyramid": "layer"}
    run = make_run(model=model, data={"crop": (64, 64)})
    assert set(weights.slots(run.plan.abstract[1])) == {
        name for name in named_shapes(run) if stages(1, 2)(name)
    }
    with pytest.raises(ValueError, match="at most 2, the encoder's stages"):
        make_run(model=model | {"freeze": "last 3"}, data={"crop": (64, 64)})
