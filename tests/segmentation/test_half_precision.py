"""Gradients of a whole Mask2Former model in bfloat16 are as near to float32 as PyTorch's autocast
on the same weights (golden).
"""

import dataclasses

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np

from jaxdg import weights
from jaxdg.conversion import mapping
from jaxdg.segmentation.mask2former import losses
from tests.segmentation import half_precision as given


def gradients(case, draws, dtype, monkeypatch):
    """Of the loss with the given masks, matches and points: by name, for each draw."""
    model = nnx.eval_shape(lambda: given.Whole(case, dtype, nnx.Rngs(0)))
    layout = given.layout()
    shapes = mapping.source_shapes(model, layout)
    points = jnp.asarray(case.points())
    query = jnp.asarray(case.query())
    monkeypatch.setattr(losses, "assign", lambda cost, valid: query)
    monkeypatch.setattr(
        losses,
        "uncertain_points",
        lambda masks, *_: jnp.broadcast_to(points, (*masks.shape[:-2], *points.shape)),
    )
    label = jnp.asarray(case.labels())
    looked = [jnp.asarray(mask) for mask in case.looked()]
    graph, _ = nnx.split(model)

    @jax.jit
    @jax.grad
    def run(state, images):
        model = nnx.merge(graph, state)
        output = model.head.decode(*model.head.pixel_decoder(model.levels(images)), looked)
        denominator = model.head.loss_denominator(label)
        return sum(model.head.loss(output, label, denominator, jax.random.key(0)).values())

    found = []
    for draw in range(draws):
        source = {name: given.weight(name, shape, draw) for name, shape in shapes.items()}
        tensors = mapping.to_flax(model, (layout,), list(source), source.__getitem__).tensors
        weights.fill(model, tensors, "the formula")
        images = dataclasses.replace(case, draw=draw).images()
        state = run(nnx.split(model)[1], images)
        found.append(weights.tensors(nnx.merge(graph, state)))
    return found


def test_every_part_is_as_near_as_autocast(monkeypatch, golden):
    """Distances of gradients from PyTorch's float32, relative to each parameter's gradient: in each
    part of the model their median is at most 1.25 times autocast's, the largest 1.5 times, and no
    parameter is 3 times as far. The biases of large maps are, if they are summed in bfloat16.
    """
    with np.load(golden / "half_precision.npz") as file:
        exact = file["exact"]
        theirs = dict(zip(file["names"].tolist(), file["far"].tolist(), strict=True))
    found = gradients(given.SMALL, len(exact), "bfloat16", monkeypatch)
    shapes = {name: x.shape for name, x in found[0].items()}
    ours = given.distances(np.stack([given.share(x) for x in found]), exact, shapes)
    assert ours.keys() == theirs.keys()
    for part in given.PARTS:
        here, there = (
            [x for name, x in far.items() if given.part(name) == part] for far in (ours, theirs)
        )
        numbers = (np.median(here), np.median(there), max(here), max(there))
        print(f"| {part} | " + " | ".join(f"{x:.2%}" for x in numbers) + " |")
        assert np.median(here) <= 1.25 * np.median(there), part
        assert max(here) <= 1.5 * max(there), part
    for name, far in ours.items():
        assert far <= 3 * theirs[name], f"{name} {far:.2%}, autocast's {theirs[name]:.2%}"
