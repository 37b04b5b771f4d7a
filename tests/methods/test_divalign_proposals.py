"""DivAlign in two stages: the copy is judged where the image was, and by slow versions of its
terms.
"""

from types import SimpleNamespace
from typing import Any

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special
import scipy.stats

from jaxdg.detection.arrays import Targets
from jaxdg.detection.interface import HeadContext, Judged
from jaxdg.detection.rcnn.detectors import Rcnn, RcnnConfig, RcnnOutput
from jaxdg.detection.rcnn.roi_heads import CASCADE, RoiHeadsConfig
from jaxdg.detection.rcnn.rpn import Proposals, RpnConfig, RpnOutput
from jaxdg.methods.divalign import DivalignOptions
from jaxdg.methods.method import interleave
from tests.detection import models

CLASSES = 3
SHAPES = [(6, 8), (3, 4)]
STRIDES = [8.0, 16.0]
IMAGE = (48, 64)
SAMPLED = 8
KEY = jax.random.key(5)


def dyadic(name: str, shape: tuple[int, ...], step: float) -> np.ndarray:
    """Drawn numbers that are multiples of a power of 2: their sums do not round."""
    return np.float32(np.round(models.normal(name, shape) / step) * step)


def make(stages: int = 1) -> Rcnn:
    """A head for 48 x 64 images, without a cascade with a box for each class; what it says of boxes
    differs by much.
    """
    config = RcnnConfig(
        RpnConfig(convs=0, sizes=((12.0,), (24.0,)), samples=8),
        RoiHeadsConfig(
            stages=CASCADE[:stages],
            size=2,
            samples=1,
            convs=0,
            hidden=6,
            class_agnostic=stages > 1,
            proposals=SAMPLED,
            positive=0.5,
        ),
        channels=4,
        levels=(2,),
    )
    context = HeadContext(nnx.Module(), CLASSES, SHAPES, STRIDES, IMAGE, "float32")
    head = nnx.eval_shape(lambda: config.build(context, rngs=nnx.Rngs(0)))
    for path, leaf in nnx.to_flat_state(nnx.state(head)):
        drawn = dyadic(".".join(map(str, path)), leaf.shape, 2**-3)
        if stages > 1 and path[2:4] == (0, "bbox_pred"):
            drawn /= 32  # boxes stay near
        leaf.set_value(jnp.asarray(drawn))
    return head


def a_batch() -> tuple[RcnnOutput, Targets]:
    """The output for two images and their copies in turn, which have other features and proposals,
    and the targets of the four rows. The second image has fewer proposals than are sampled.
    """
    boxes = np.float32([[[4, 4, 24, 28], [32, 12, 60, 40]], [[12, 20, 28, 36], [0, 0, 0, 0]]])
    targets = Targets(
        jnp.asarray(boxes),
        jnp.asarray([[2, 0], [1, 0]], jnp.int32),
        jnp.asarray([[True, True], [True, False]]),
    )
    moves = 2 * np.round(2 * models.normal("moves", (4, 12, 4)))
    near = np.repeat(boxes[:, [0, 0, 0, 1, 1, 1, 0, 0, 1, 1, 0, 1]], 2, axis=0) + moves
    near[..., 2:] = np.maximum(near[..., 2:], near[..., :2] + 4)
    proposals = Proposals(
        jnp.asarray(np.clip(near, 0, 48), jnp.float32),
        jnp.asarray(np.arange(12) < np.array([12, 12, 3, 12])[:, None]),
    )
    features = jnp.asarray(dyadic("features", (4, *SHAPES[0], 4), 2**-2))
    cells = [3 * h * w for h, w in SHAPES]
    rpn = RpnOutput(
        tuple(jnp.zeros((4, n)) for n in cells), tuple(jnp.zeros((4, n, 4)) for n in cells)
    )
    return RcnnOutput((features,), rpn, proposals), jax.tree.map(
        lambda x: interleave(x, x), targets
    )


@nnx.jit
def compared(
    head: Rcnn, output: RcnnOutput, targets: Targets, images: float
) -> tuple[dict[str, jax.Array], Judged]:
    """The terms, weighed 2 and 0.5, in a batch of so many images and copies; what was judged."""
    method = DivalignOptions(True, class_weight=2.0, box_weight=0.5).build(None)
    judged = head.judge(output, targets, images, KEY)[1]
    model: Any = SimpleNamespace(head=head)
    return method.compare(model, None, output, judged, {}, images, KEY), judged


def overlap(a: np.ndarray, b: np.ndarray) -> float:
    """IoU of two boxes."""
    sides = np.minimum(a[2:], b[2:]) - np.maximum(a[:2], b[:2])
    both = np.prod(np.maximum(sides, 0))
    return float(both / (np.prod(a[2:] - a[:2]) + np.prod(b[2:] - b[:2]) - both))


def slow_terms(
    head: Rcnn, output: RcnnOutput, targets: Targets, judged: Judged
) -> tuple[float, float]:
    """Both terms box by box. Whether a box is positive, and of which class, is seen again."""
    heads = head.roi_heads
    stage = len(heads.config.stages) - 1
    threshold, _ = heads.config.stages[stage]
    boxes = judged.boxes[np.array([0, 0, 2, 2])]  # of the images, in the features of all rows
    said = nnx.jit(lambda heads, features: heads.predict(stage, features, boxes))
    logits, offsets = (np.asarray(x, float) for x in said(heads, output.features))
    divergences, means = [], []
    for row in (0, 2):
        distances = []
        for i in np.flatnonzero(judged.share[row]):
            p, q = (scipy.special.softmax(logits[view, i]) for view in (row + 1, row))
            divergences.append(scipy.stats.entropy(p, q))
            best, k = max(
                (overlap(np.asarray(boxes[row, i]), np.asarray(targets.boxes[row, k])), k)
                for k in np.flatnonzero(targets.valid[row])
            )
            if best >= threshold:
                of = 0 if heads.config.class_agnostic else int(targets.classes[row, k])
                far = np.abs(offsets[row + 1, i, of] - offsets[row, i, of])
                distances.append(np.where(far < 1 / 9, 4.5 * far**2, far - 1 / 18).mean())
        assert 0 < len(distances) < np.count_nonzero(judged.share[row])
        means.append(np.mean(distances))
    return float(np.sum(divergences) / (2 * SAMPLED)), float(np.mean(means))


@pytest.mark.parametrize("stages", [1, 2])
def test_terms_are_means_over_the_proposals_of_images(stages):
    """Of two images, of which one has fewer than are sampled, in one stage and by the last of a
    cascade. Weights multiply; in a batch twice as large, each counts half. Of the copies only
    features count: other proposals there change no bit, while those of the images do.
    """
    head = make(stages)
    output, targets = a_batch()
    found, judged = compared(head, output, targets, jnp.float32(4))
    assert np.count_nonzero(judged.share[2]) <= 4 < np.count_nonzero(judged.share[0])
    by_class, by_box = slow_terms(head, output, targets, judged)
    assert min(by_class, by_box) > 0.05
    assert float(found["class_alignment"]) == pytest.approx(2 * by_class, rel=1e-4)
    assert float(found["box_alignment"]) == pytest.approx(0.5 * by_box, rel=1e-4)

    part, _ = compared(head, output, targets, jnp.float32(8))
    for name, value in found.items():
        assert float(part[name]) == pytest.approx(float(value) / 2)
    for view, same in ((1, True), (0, False)):
        boxes = output.proposals.boxes.at[view::2].add(2.0)
        moved = output._replace(proposals=output.proposals._replace(boxes=boxes))
        again, other = compared(head, moved, targets, jnp.float32(4))
        assert (other.boxes != judged.boxes)[view::2].any(axis=(1, 2)).all()
        for name, value in found.items():
            assert (float(again[name]) == float(value)) == same


def test_equal_views_say_nothing_and_others_move_both():
    """Where a copy has the features of its image, and proposals of its own, terms and gradients are
    0, bit for bit. Otherwise both views learn, and the head.
    """
    head = make()
    output, targets = a_batch()

    @nnx.jit
    def measure(head, features):
        def total(head, features):
            terms, _ = compared(head, output._replace(features=(features,)), targets, 4.0)
            return sum(terms.values())

        return nnx.value_and_grad(total, argnums=(0, 1))(head, features)

    (features,) = output.features
    value, gradients = measure(head, jnp.repeat(features[::2], 2, axis=0))
    assert float(value) == 0.0
    for gradient in jax.tree.leaves(gradients):
        np.testing.assert_array_equal(gradient, np.zeros_like(gradient))
    value, (of_head, of_features) = measure(head, features)
    assert float(value) > 0.1
    assert (np.abs(of_features).max(axis=(1, 2, 3)) > 1e-4).all()
    predictor = of_head.roi_heads.box_predictor[0]
    for layer in (of_head.roi_heads.box_head[0].fc1, predictor.cls_score, predictor.bbox_pred):
        assert np.abs(layer.kernel[...]).max() > 1e-4
