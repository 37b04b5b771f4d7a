"""Region proposals against torchvision (golden), a slow NumPy version, and laws."""

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdg.detection.arrays import Targets
from jaxdg.detection.boxes import iou
from jaxdg.detection.rcnn.rpn import Rpn, RpnConfig, RpnOutput
from tests.detection import models


@pytest.fixture(scope="module")
def faster_rcnn():
    """Torchvision's."""
    return models.faster_rcnn().head


@pytest.fixture(scope="module")
def output(faster_rcnn, golden):
    """Its predictions for the stored levels."""
    return jax.jit(lambda levels: faster_rcnn.proposal_generator(levels))(models.levels(golden))


@pytest.fixture(scope="module")
def sizes():
    """Of the two images."""
    return jnp.asarray([models.IMAGE] * 2, jnp.float32)


def proposals_of(rpn, output, sizes, train):
    """`rpn.proposals` in one compiled program."""
    return jax.jit(lambda output, sizes: rpn.proposals(output, sizes, train=train))(output, sizes)


@pytest.mark.parametrize("train", [True, False])
def test_proposals_equal_torchvision(faster_rcnn, output, sizes, golden, train):
    """The same boxes in the same order, with the numbers of training and of inference."""
    proposals = proposals_of(faster_rcnn.proposal_generator, output, sizes, train)
    name = "train" if train else "test"
    with np.load(golden / "detectors.npz") as file:
        assert np.sum(proposals.valid, axis=1).tolist() == file[f"proposed_{name}"].tolist()
        np.testing.assert_allclose(
            proposals.boxes[proposals.valid], file[f"proposals_{name}"], atol=2e-3
        )


def test_losses_equal_torchvision(faster_rcnn, output, golden):
    """Cross entropy and L1 of all anchors, but for what they are divided by."""
    rpn = faster_rcnn.proposal_generator
    targets = Targets.of(models.targets())
    terms = jax.jit(rpn.losses)(output, targets, jnp.asarray(2.0), jax.random.key(0))
    with np.load(golden / "detectors.npz") as file:
        factor = file["counted"][0] / (models.ANCHORS * 2)
        np.testing.assert_allclose(
            [terms["rpn_class"], terms["rpn_box"]], file["rpn_losses"] * factor, rtol=1e-5
        )


def plain(shapes=((6, 8), (3, 4)), **options):
    """A network of two levels with 8 and 16 pixels a feature for 48 x 64 images."""
    config = RpnConfig(sizes=((16.0,), (32.0,)), **options)
    return nnx.jit(lambda: Rpn(config, 4, shapes, (8.0, 16.0), dtype="float32", rngs=nnx.Rngs(0)))()


def random_output(rpn, images, spread=1.0):
    """Predictions of a network that sees noise."""
    counts = [len(grid) for grid in rpn.anchors()]

    def draw(name, *shape):
        return jnp.asarray(spread * models.normal(name, (images, *shape)))

    return RpnOutput(
        *(
            tuple(draw(f"{name} {i}", n, *more) for i, n in enumerate(counts))
            for name, more in (("l", ()), ("o", (4,)))
        )
    )


def test_as_many_anchors_are_drawn_as_are_to_be():
    """The gradient touches 24 anchors of an image, positive ones half of them at most, and offsets
    of positive ones only.
    """
    rpn = plain(samples=24, thresholds=(0.3, 0.4))
    boxes = jnp.asarray(
        [[[0, 0, 30, 30], [20, 10, 60, 44], [8, 8, 24, 24], [40, 0, 64, 20]]], jnp.float32
    )
    targets = Targets(boxes, jnp.zeros((1, 4), jnp.int32), jnp.ones((1, 4), bool))
    output = random_output(rpn, 1)

    @jax.jit
    @jax.grad
    def gradient_of(output, key):
        return sum(rpn.losses(output, targets, jnp.asarray(1.0), key).values())

    seen = np.zeros(sum(x.shape[1] for x in output.logits))
    for seed in range(3):
        gradient = gradient_of(output, jax.random.key(seed))
        logits, offsets = (np.concatenate([x[0] for x in part]) for part in gradient)
        drawn = logits != 0
        positive = logits < 0
        assert drawn.sum() == 24
        assert positive.sum() == 12
        np.testing.assert_array_equal((offsets != 0).any(axis=1), positive)
        np.testing.assert_allclose(
            np.abs(offsets[positive]), 1 / 24, rtol=1e-6
        )  # plain L1, whatever the error
        seen += drawn
    assert (seen > 0).sum() > 24  # another key, other anchors


def test_every_true_box_has_an_anchor():
    """300 boxes of all sizes: the anchor that overlaps each most is positive, and its offsets are
    learnt.
    """
    rpn = plain(samples=2000)
    corner = np.abs(models.normal("corner", (300, 2))) * 16
    boxes = (
        np.concatenate([corner, corner + 1 + np.abs(models.normal("side", (300, 2))) * 10], axis=1)
        .clip(0, 47)
        .astype(np.float32)
    )
    boxes = boxes[(boxes[:, 2:] > boxes[:, :2]).all(axis=1)]
    targets = Targets(
        jnp.asarray(boxes)[None],
        jnp.zeros((1, len(boxes)), jnp.int32),
        jnp.ones((1, len(boxes)), bool),
    )

    @jax.jit
    @jax.grad
    def gradient_of(output):
        return rpn.losses(output, targets, jnp.asarray(1.0), jax.random.key(0))["rpn_box"]

    gradient = gradient_of(random_output(rpn, 1))
    learnt = (np.concatenate([x[0] for x in gradient.offsets]) != 0).any(axis=1)
    overlaps = np.asarray(jax.jit(iou)(boxes[:, None], np.concatenate(rpn.anchors())))
    assert len(boxes) > 200
    assert learnt[overlaps.argmax(axis=1)].all()


def test_padding_holds_no_proposal():
    """Proposals of a small image in a large one lie in the small one, and slots are counted right
    where there are few.
    """
    rpn = plain(before=(200, 200), after=(150, 150))
    sizes = jnp.asarray([[48, 64], [20, 30], [0, 0]], jnp.float32)
    proposals = proposals_of(rpn, random_output(rpn, 3), sizes, train=False)
    boxes = np.asarray(proposals.boxes)
    valid = np.asarray(proposals.valid)
    assert valid[0].sum() > valid[1].sum() > 0 == valid[2].sum()
    for i, (h, w) in enumerate(np.asarray(sizes)):
        inside = boxes[i][valid[i]]
        assert (inside >= 0).all()
        assert (inside <= [w, h, w, h]).all()
        assert (inside[:, 2:] > inside[:, :2]).all()


def test_not_a_number_is_no_proposal():
    """A diverged prediction does not spread to the others."""
    rpn = plain()
    sizes = jnp.asarray([[48, 64]], jnp.float32)
    output = random_output(rpn, 1)
    offsets = (output.offsets[0].at[0, 5].set(jnp.nan), output.offsets[1])
    proposals = proposals_of(rpn, RpnOutput(output.logits, offsets), sizes, train=True)
    assert np.isfinite(proposals.boxes[proposals.valid]).all()
    assert proposals.valid.sum() > 10


def test_wrong_anchors_are_refused():
    """Sizes for another number of levels: told with the number there are."""
    config = RpnConfig(sizes=((32.0,),))
    with pytest.raises(ValueError, match="2 levels"):
        Rpn(config, 4, ((6, 8), (3, 4)), (8.0, 16.0), dtype="float32", rngs=nnx.Rngs(0))
