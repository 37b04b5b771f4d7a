"""Training on a small latent diffusion model: freezing, tuning, going on, several devices."""

import dataclasses

from flax import nnx
import jax
import numpy as np
import pytest

from configs import camvid_vit_tiny
from jaxdg.backbones import LatentDiffusionConfig, zoo
from jaxdg.segmentation.segformer import SegformerOptions
from jaxdg.training.checkpoint import Checkpoints
from tests.training.test_hierarchical import named
from tests.training.test_sharding import MESHES, first_gradients

# Several channels a group of every norm, so that it does not take away what is added to each.
SMALL = LatentDiffusionConfig(
    widths=(64, 64, 96, 128),
    heads=(2, 2, 2, 2),
    vae_widths=(32, 64, 64, 32),
    context=(3, 16),
    learned=True,
    maps=True,
)
SIDE = (128, 128)  # two pixels a side of the coarsest level


@pytest.fixture(autouse=True)
def small(monkeypatch):
    """A small encoder in the zoo."""
    monkeypatch.setitem(zoo.ZOO, "small_ldm", zoo.Entry(SMALL))


@pytest.fixture
def make(make_run):
    """`make(mesh, freeze=.., ..)`: a run of configs/camvid_vit_tiny.py's recipe on that encoder."""

    def run(mesh=None, *, freeze="none", decoder="mask2former", **optimizer):
        c = camvid_vit_tiny.get_config()
        model = {
            "encoder": "small_ldm",
            "taps": (),
            "freeze": freeze,
            "decoder": decoder,
            "mask2former": dataclasses.replace(c.model.mask2former, points=256),
            "segformer": SegformerOptions(hidden=16),
        }
        return make_run(
            mesh,
            model=model,
            data={"crop": SIDE},
            evaluation={"stride": SIDE},
            optimizer={**vars(c.optimizer), **optimizer},
            steps=c.steps,
        )

    return run


@pytest.mark.parametrize(
    ("decoder", "freeze"), [("linear", "none"), ("segformer", "all"), ("mask2former", "none")]
)
def test_every_decoder_reads_its_levels(make, decoder, freeze):
    """A traced training step has the shapes of its state; without freezing the UNet and the learned
    part of the condition are trained, and never the VAE or the stored condition.
    """
    run = make(freeze=freeze, decoder=decoder)
    batch = {
        "image": jax.ShapeDtypeStruct((2, *SIDE, 3), np.uint8),
        "label": jax.ShapeDtypeStruct((2, *SIDE), np.uint8),
    }
    following, metrics = jax.eval_shape(run.step(), run.like, batch)
    assert jax.tree.map(lambda leaf: leaf.shape, following) == jax.tree.map(
        lambda leaf: leaf.shape, run.like
    )
    assert metrics["loss"].shape == ()
    trained = {path[1] for path, _ in nnx.to_flat_state(run.like.trained) if path[0] == "backbone"}
    assert trained == ({"unet", "text_adapter", "gamma"} if freeze == "none" else set())
    assert not any(path[0] == "pyramid" for path, _ in nnx.to_flat_state(run.like.trained))


@pytest.mark.slow
@pytest.mark.parametrize("freeze", ["none", "all"])
def test_it_learns_and_goes_on_exactly(make, freeze, tmp_path):
    """Twenty steps lower the loss, every trained parameter moves, finite, and frozen ones do not; a
    run that is stored after ten and goes on ends with the same bits.
    """
    run = make(freeze=freeze)
    step = run.step()
    state = run.state()
    old = {**named(state.trained), **named(state.frozen)}
    batches = [run.batch(i % 2, rows=2) for i in range(20)]
    losses = []
    checkpoints = Checkpoints(tmp_path)
    for i, batch in enumerate(batches):
        if i == 10:
            checkpoints.save(state)
            checkpoints.wait()
        state, metrics = step(state, batch)
        losses.append(float(metrics["loss"]))
    assert np.mean(losses[-4:]) < 0.95 * np.mean(losses[:4]), losses
    for name, tensor in named(state.trained).items():
        assert np.isfinite(tensor).all(), name
        assert (tensor != old[name]).any(), name
    for name, tensor in named(state.frozen).items():
        np.testing.assert_array_equal(tensor, old[name], err_msg=name)
    again = checkpoints.restore(run.like)
    assert int(again.step) == 10
    for batch in batches[10:]:
        again, _ = step(again, batch)
    jax.tree.map(np.testing.assert_array_equal, again, state)
    checkpoints.close()


TWO = ("1", "4x2")


@pytest.mark.slow
def test_eight_devices_lose_what_one_loses(make):
    """Over three steps on data=4, fsdp=2."""
    losses = {}
    for name in TWO:
        run = make(MESHES[name], clip=0.0)
        step = run.step()
        state = run.state()
        losses[name] = []
        for i in range(3):
            state, metrics = step(state, run.batch(i))
            losses[name].append(float(metrics["loss"]))
    np.testing.assert_allclose(losses["4x2"], losses["1"], rtol=1e-4)


class Precise(LatentDiffusionConfig):
    """An encoder that computes in float64."""

    def configured(self, *args):
        return dataclasses.replace(super().configured(*args), dtype="float64")


@pytest.mark.slow
def test_eight_devices_have_the_gradients_of_one(make, monkeypatch):
    """Below a linear decoder the first ones on data=4, fsdp=2 agree to 1e-5 of each one's norm,
    where they are no rounding. In float64: rounding of float32 alone moves some of the attention's
    by 3e-4.
    """
    monkeypatch.setitem(zoo.ZOO, "small_ldm", zoo.Entry(Precise(**vars(SMALL))))

    def wider(leaf):
        dtype = np.float64 if leaf.dtype == np.float32 else leaf.dtype
        return jax.ShapeDtypeStruct(leaf.shape, dtype, sharding=leaf.sharding)

    gradients = {}
    with jax.enable_x64(True):
        for name in TWO:
            run = make(MESHES[name], decoder="linear", clip=0.0)
            run = dataclasses.replace(run, like=jax.tree.map(wider, run.like))
            state, _ = run.step()(run.state(), run.batch())
            gradients[name] = first_gradients(state)
    for path, gradient in gradients["1"].items():
        norm = np.linalg.norm(gradient)
        difference = np.linalg.norm(gradients["4x2"][path] - gradient)
        assert norm <= 1e-6 or difference <= 1e-5 * norm, (path, norm, difference)
