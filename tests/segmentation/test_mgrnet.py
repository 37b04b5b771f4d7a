"""MGRNet's refinement against its authors' module, its inference against loops, its training
against the passes one by one.

The golden file holds outputs and gradients of `VFMHead` with `MaskTransformerDecoder` in
tpy001/VFMSeg at 6b019b90, run with torch 2.14 on the weights, taps and coarse scores that `drawn`
makes, without dropout. The mask of its tokens is in the file; of a parameter's gradient there are
the norm and four random projections.
"""

import dataclasses
import re
import zlib

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdg import segmentation, weights
from jaxdg.backbones import VitConfig, at_size, zoo
from jaxdg.backbones.resizing import linear_matrix
from jaxdg.config import Config, MeshConfig, validated
from jaxdg.evaluation.sliding_window import window_starts
from jaxdg.methods import Method
from jaxdg.segmentation import (
    MgrnetConfig,
    MgrnetHead,
    Segmenter,
    SegmenterConfig,
    mgrnet,
    upscaling,
)
from jaxdg.tasks import run_state as tasks
from jaxdg.training import sharding

CLASSES = 19
GOLDEN = MgrnetConfig(num_classes=CLASSES, width=32, hidden=128, layers=2, heads=2, head_channels=8)
PARTS = {
    "conv_seg": "classifier",
    "fuse_conv.0": "fuse",
    "fuse_conv.1": "fuse_norm",
    "seg_logits_embed.0": "embed1",
    "seg_logits_embed.1": "embed1_norm",
    "seg_logits_embed.3": "embed2",
    "seg_logits_embed.4": "embed2_norm",
    "seg_logits_embed.6": "embed3",
    "seg_logits_embed.7": "embed3_norm",
    "transformer_decoder.transformer_blocks.": "blocks.",
    "transformer_decoder.": "",
    "to_out.0": "to_out",
    "ff.net.0.proj": "fc1",
    "ff.net.2": "fc2",
}


def drawn(name, shape):
    """The golden file's weights, taps and coarse scores by their formula."""
    numbers = np.random.default_rng(zlib.crc32(name.encode())).standard_normal(shape)
    if len(shape) > 1:
        return (numbers * 1.2 / np.sqrt(np.prod(shape[1:]))).astype(np.float32)
    return (0.3 * numbers + name.endswith("weight")).astype(np.float32)


def ours(name):
    """A published name as it is here."""
    for theirs, part in PARTS.items():
        name = name.replace(theirs, part)
    scale = re.search(r"norm\d?\.weight$", name)
    return name.replace("weight", "scale" if scale else "kernel")


def moved(name, tensor):
    """A tensor with the axes that it has here."""
    if name.endswith("mask_token"):
        return tensor.reshape(-1)
    if tensor.ndim == 4 and tensor.shape[2] == 2:
        return tensor.transpose(2, 3, 1, 0)
    return tensor.reshape(len(tensor), -1).T if tensor.ndim > 1 else tensor


@pytest.fixture(scope="module")
def archive(golden):
    with np.load(golden / "mgrnet.npz") as file:
        return dict(file)


@pytest.fixture(scope="module")
def source(archive):
    """The golden tensors by their published names."""
    shapes = {name: tuple(map(int, shape)) for name, *shape in map(str.split, archive["names"])}
    return {name: drawn(name, shape) for name, shape in shapes.items()}


@pytest.fixture(scope="module")
def given():
    """The golden file's taps [b, h, w, c] and coarse scores."""
    taps = [np.float32((16 * 12) ** 0.5) * drawn(f"tap{i}", (2, 16, 3, 4)) for i in range(2)]
    context = drawn("context", (2, CLASSES, 13, 18)) * np.float32((CLASSES * 13 * 18) ** 0.5)
    context = 3 * context / np.float32(1.2)
    return tuple(jnp.asarray(x.transpose(0, 2, 3, 1)) for x in (*taps, context))


def refinement(source, dtype="float32"):
    """The golden module."""
    config = dataclasses.replace(GOLDEN, dtype=dtype)
    module = nnx.eval_shape(lambda: mgrnet.Refinement(config, (16, 16), rngs=nnx.Rngs(0)))
    tensors = {ours(name): moved(name, tensor) for name, tensor in source.items()}
    weights.fill(module, tensors, "the golden file")
    return module


def test_refined_scores_equal_the_authors(source, given, archive):
    """Class scores from their taps and coarse scores, whose size is odd."""
    graph, state = nnx.split(refinement(source))
    scores = jax.jit(lambda s, x: nnx.merge(graph, s)(x[:2], x[2]))(state, given)
    np.testing.assert_allclose(scores, archive["scores"], rtol=0, atol=1e-4)


def test_gradients_equal_the_authors(source, given, archive, monkeypatch):
    """With their mask of tokens, the loss and its gradients are theirs times the labelled share of
    the pixels.
    """
    monkeypatch.setattr(mgrnet, "dropout", lambda x, key, rate: x)
    monkeypatch.setattr(mgrnet, "drop_channels", lambda x, key: x)
    monkeypatch.setattr(jax.random, "bernoulli", lambda key, p, shape: archive["masked"][..., None])
    label = jnp.asarray(archive["label"])
    share = (archive["label"] != 255).mean()
    graph, params = nnx.split(refinement(source))
    head = segmentation.LinearHead(CLASSES, (1,), rngs=nnx.Rngs(0))

    @jax.jit
    def gradients(params, taps):
        def loss(params, taps):
            scores = nnx.merge(graph, params)(taps, given[2], jax.random.key(0))
            return head.loss(scores, label, head.loss_denominator(label))["cross_entropy"]

        return jax.value_and_grad(loss, argnums=(0, 1))(params, taps)

    loss, (found, by_taps) = gradients(params, given[:2])
    np.testing.assert_allclose(loss * share, archive["loss"], rtol=1e-5)
    found = weights.tensors(nnx.merge(graph, found))
    for name, tensor in source.items():
        probe = np.random.default_rng(zlib.crc32(f"probe{name}".encode()))
        probe = probe.standard_normal((4, *tensor.shape))
        norm = archive[f"norm/{name}"]
        gradient = found[ours(name)] * share
        if norm < 1e-6:  # one channel a group: the normalisation takes the bias away
            np.testing.assert_allclose(gradient, 0, atol=1e-6)
            continue
        np.testing.assert_allclose(np.linalg.norm(gradient), norm, rtol=1e-4, err_msg=name)
        projected = [np.sum(moved(name, p) * gradient) for p in probe]
        np.testing.assert_allclose(
            projected, archive[f"probe/{name}"], rtol=0, atol=1e-4 * norm, err_msg=name
        )
    for i, x in enumerate(by_taps):
        expected = archive[f"grad/tap{i}"].transpose(0, 2, 3, 1)
        assert np.linalg.norm(x * share - expected) < 1e-4 * np.linalg.norm(expected)


def test_published_size():
    """19 classes on four taps of 1024 channels: the parameters of the authors' two heads."""
    config = MgrnetConfig(num_classes=19)
    head = nnx.eval_shape(lambda: MgrnetHead(config, (1024,) * 4, rngs=nnx.Rngs(0)))
    sizes = {
        part: sum(leaf.size for leaf in jax.tree.leaves(nnx.state(module, nnx.Param)))
        for part, module in (("coarse", head.coarse), ("refinement", head.refinement))
    }
    assert sizes == {"coarse": 6_824_467, "refinement": 6_644_819}


def test_bfloat16_compute_is_close(source, given, archive):
    """Half precision stays within 3 % of the scores; parameters and scores are float32."""
    graph, state = nnx.split(refinement(source, "bfloat16"))
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(state))
    scores = jax.jit(lambda s, x: nnx.merge(graph, s)(x[:2], x[2]))(state, given)
    assert scores.dtype == jnp.float32
    norm = np.linalg.norm(archive["scores"])
    assert 0 < np.linalg.norm(scores - archive["scores"]) < 3e-2 * norm


def bilinear(x, size):
    """Centres aligned, border repeated, by a matrix for each side."""
    rows, columns = (linear_matrix(*sides) for sides in zip(x.shape[:2], size, strict=True))
    return np.einsum("iy,jx,yxc->ijc", rows, columns, np.asarray(x, np.float64))


SIDE = 16  # of what the encoder sees
SMALL = MgrnetConfig(
    num_classes=5,
    width=32,
    hidden=128,
    layers=1,
    heads=2,
    head_channels=8,
    masked=0.0,
    certain=0.615,
    certain_share=0.5,
)


@pytest.fixture(scope="module", autouse=True)
def tiny():
    """A small encoder in the zoo."""
    encoder = VitConfig(width=16, depth=2, heads=2, patch_size=4, taps=(0, 1))
    zoo.ZOO["tiny_mgrnet"] = zoo.Entry(encoder)
    yield
    del zoo.ZOO["tiny_mgrnet"]


@pytest.fixture(scope="module")
def model():
    """A small model with random numbers, as graph and state."""
    config = SegmenterConfig(
        num_classes=5,
        encoder="tiny_mgrnet",
        image_size=(SIDE, SIDE),
        pyramid="none",
        decoder=SMALL,
    )
    model = nnx.eval_shape(lambda: Segmenter(config, rngs=nnx.Rngs(0)))
    tensors = {
        name: drawn(f"model.{name}", shape) + np.float32(name.endswith((".scale", ".var")))
        for name, shape in weights.shapes(model).items()
    }
    tensors["head.coarse.upscaling1_norm.var"] = np.ones(16, np.float32)
    tensors["head.coarse.classifier.kernel"] *= 6
    weights.fill(model, tensors, "this test")
    return nnx.split(model)


def test_inference_equals_a_slow_one(model):
    """Images of odd sizes in one padded batch, one smaller than a window: the whole image squashed,
    windows one by one, refined where too few pixels are certain, and the mean where they overlap.
    """
    graph, state = model
    read = nnx.merge(graph, state).read
    squashed = (SIDE, 2 * SIDE)

    @jax.jit
    def coarse_of(image):
        model = nnx.merge(graph, state)
        features = at_size(model.backbone, squashed)(image[None])
        return model.head.coarse(tuple(features[i] for i in read))[0]

    @jax.jit
    def refined_of(window, context):
        model = nnx.merge(graph, state)
        features = model.encode(window[None])
        return model.head.refinement(tuple(features[i] for i in read), context[None])[0]

    rng = np.random.default_rng(0)
    sizes = [(21, 37), (33, 19), (11, 26)]
    images = [rng.normal(size=(*size, 3)).astype(np.float32) for size in sizes]
    refined_windows = []

    def slow(image):
        h, w, _ = image.shape
        big_h, big_w = max(h, SIDE), max(w, SIDE)
        squeezed = jnp.asarray(bilinear(image, squashed), jnp.float32)
        coarse = bilinear(coarse_of(squeezed), (h, w))
        total = np.zeros((big_h, big_w, 5))
        seen = np.zeros((big_h, big_w, 1))
        pixels = np.zeros((big_h, big_w, 3), np.float32)
        pixels[:h, :w] = image
        context = np.zeros((big_h, big_w, 5))
        context[:h, :w] = coarse
        for y in window_starts(h, SIDE, 7):
            for x in window_starts(w, SIDE, 9):
                here = np.s_[y : y + SIDE, x : x + SIDE]
                inside = coarse[here]
                odds = np.exp(inside - inside.max(-1, keepdims=True))
                share = (1 / odds.sum(-1) > SMALL.certain).mean()
                refined_windows.append(share < SMALL.certain_share)
                scores = context[here]
                if refined_windows[-1]:
                    given = jnp.asarray(context[here], jnp.float32)
                    scores = bilinear(refined_of(pixels[here], given), (SIDE, SIDE))
                total[here] += scores
                seen[here] += 1
        return (total / seen)[:h, :w]

    batch = np.full((3, 35, 38, 3), 9.0, np.float32)
    for row, image in zip(batch, images, strict=True):
        row[: image.shape[0], : image.shape[1]] = image

    @jax.jit
    def run(state, images, sizes):
        return nnx.merge(graph, state).image_scores(images, (SIDE, SIDE), (7, 9), 6, sizes)

    found = run(state, batch, jnp.array(sizes, jnp.int32))
    for image, scores in zip(images, found, strict=True):
        h, w, _ = image.shape
        np.testing.assert_allclose(scores[:h, :w], slow(image), rtol=0, atol=2e-4)
    assert 3 < sum(refined_windows) < len(refined_windows) - 3, refined_windows


@jax.jit(static_argnums=0)
def training(graph, params, statistics, crops, label, key):
    """Loss terms, where the windows were, and the gradients of the loss."""

    def loss(params):
        model = nnx.merge(graph, params, statistics, copy=True)
        output = model.decode(model.encode(crops, key), key, train=True)
        head = model.head
        terms = head.loss(output, label, head.loss_denominator(label))
        return sum(terms.values()), (terms, output)

    return jax.value_and_grad(loss, has_aux=True)(params)


def check_gradients(found, expected):
    """To 1e-4 of each, or 1e-6 of the largest: normalisation makes some of them 0."""
    largest = max(np.abs(y).max() for y in jax.tree.leaves(expected))
    for x, y in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(x, y, rtol=0, atol=1e-4 * np.abs(y).max() + 1e-6 * largest)


def crops_and_labels(number):
    """Random crops, a fifth of them not labelled."""
    rng = np.random.default_rng(1)
    label = rng.integers(0, 5, (number, 2 * SIDE, 2 * SIDE)).astype(np.uint8)
    label[rng.random(label.shape) < 0.2] = 255
    return rng.normal(size=(*label.shape, 3)).astype(np.float32), label


def test_training_is_the_two_passes(model, monkeypatch):
    """Without dropout: the loss and its gradients are those of the whole crop at half its size, and
    of its window refined by what the first pass says of it, to which no gradient goes.
    """
    jax.clear_caches()
    monkeypatch.setattr(mgrnet, "STEP", 4)
    monkeypatch.setattr(mgrnet, "dropout", lambda x, key, rate: x)
    for module in (mgrnet, upscaling):
        monkeypatch.setattr(module, "drop_channels", lambda x, key: x)
    graph, params, statistics = nnx.split(nnx.merge(*model), nnx.Param, ...)
    crops, label = crops_and_labels(2)
    (loss, (terms, output)), found = training(
        graph, params, statistics, crops, label, jax.random.key(3)
    )
    starts = np.asarray(output.starts)
    assert (starts % 4 == 0).all()
    assert (starts >= 0).all()
    assert (starts < SIDE).all()
    assert len(np.unique(starts)) > 2, "the windows of this key say little"

    def enlarged(x, side):
        larger = jnp.asarray(linear_matrix(len(x), side), jnp.float32)
        return jnp.einsum("iy,jx,yxk->ijk", larger, larger, x)

    def cross_entropy(scores, label):
        """The sum over labelled pixels."""
        truth = np.arange(5) == label[..., None]
        return -jnp.sum(jax.nn.log_softmax(scores) * truth)

    def windows_of(images):
        return np.stack(
            [
                image[i : i + SIDE, j : j + SIDE]
                for image, (i, j) in zip(images, starts, strict=True)
            ]
        )

    def passes(params):
        model = nnx.merge(graph, params, statistics, copy=True)
        halves = jnp.asarray(crops.reshape(2, SIDE, 2, SIDE, 2, 3).mean((2, 4)))
        coarse = model.head.coarse(model.encode(halves), None, True)
        whole = [enlarged(x, SIDE) for x in coarse]
        context = [
            jax.lax.stop_gradient(x)[i // 2 : (i + SIDE) // 2, j // 2 : (j + SIDE) // 2]
            for x, (i, j) in zip(whole, starts, strict=True)
        ]
        features = model.encode(jnp.asarray(windows_of(crops)))
        refined = model.head.refinement(features, jnp.stack(context))
        first = cross_entropy(jnp.stack(whole), label[:, ::2, ::2])
        second = cross_entropy(jnp.stack([enlarged(x, SIDE) for x in refined]), windows_of(label))
        first /= (label[:, ::2, ::2] != 255).sum()
        second /= (label != 255).sum() / 4
        return first + second, (first, second)

    (expected_loss, expected_terms), expected = jax.jit(jax.value_and_grad(passes, has_aux=True))(
        params
    )
    np.testing.assert_allclose(loss, expected_loss, rtol=1e-5)
    np.testing.assert_allclose(tuple(terms.values()), expected_terms, rtol=1e-5)
    assert list(terms) == ["cross_entropy", "refinement"]
    check_gradients(found, expected)

    @jax.jit
    def summed(output, label):
        """The loss of a batch that is computed in parts."""
        head = nnx.merge(*model).head
        denominator = head.loss_denominator(label)
        parts = [jax.tree.map(lambda x, i=i: x[i : i + 1], (output, label)) for i in range(2)]
        return sum(sum(head.loss(*part, denominator).values()) for part in parts)

    np.testing.assert_allclose(summed(output, jnp.asarray(label)), loss, rtol=1e-5)
    jax.clear_caches()


def test_eight_devices_agree(model):
    """With a crop each and all that is random on, the loss and its gradients are those of one
    device that holds all crops.
    """
    graph, params, statistics = nnx.split(nnx.merge(*model), nnx.Param, ...)
    crops, label = crops_and_labels(8)
    key = jax.random.key(4)
    (expected_loss, _), expected = training(graph, params, statistics, crops, label, key)
    mesh = sharding.make_mesh(MeshConfig(8, 1))
    state = jax.device_put((params, statistics), sharding.replicated(mesh))
    placed = sharding.to_devices({"image": crops, "label": label}, mesh)
    (loss, _), found = training(graph, *state, placed["image"], placed["label"], key)
    np.testing.assert_allclose(loss, expected_loss, rtol=1e-5)
    check_gradients(found, expected)


def test_windows_lie_where_the_authors_put_them():
    """Of crops of 1024: multiples of 32 from 0 to 480, each about as often."""
    starts = np.asarray(mgrnet.window_starts(jax.random.key(0), 8000, (512, 512)))
    places, numbers = np.unique(starts, return_counts=True)
    assert places.tolist() == list(range(0, 512, 32))
    assert (np.abs(numbers - 1000) < 150).all()


def test_hidden_tokens_say_nothing_of_the_image(source, given):
    """With all tokens hidden, whatever the features are the scores are the same; the golden test
    has them hidden in part, and the others not at all.
    """
    module = refinement(source)
    module.config = dataclasses.replace(GOLDEN, masked=1.0)
    graph, state = nnx.split(module)
    key = jax.random.key(0)
    run = jax.jit(lambda s, x: nnx.merge(graph, s)(x, given[2], key))
    other = tuple(2 * x + 1 for x in given[:2])
    np.testing.assert_array_equal(run(state, given[:2]), run(state, other))


def configured(**fields):
    """A small run with this decoder."""
    config = Config()
    config.model.encoder = "tiny_mgrnet"
    config.model.pyramid = "none"
    config.model.decoder = "mgrnet"
    config.data.crop = (2 * SIDE, 2 * SIDE)
    config.evaluation.stride = (8, 8)
    options = config.model.mgrnet
    options.width = 32
    options.hidden = 128
    options.layers = 1
    for name, value in fields.items():
        setattr(options, name, value)
    return config


def test_a_run_predicts_by_the_scores_of_whole_images(monkeypatch):
    """Prediction gives them the image and windows of a quarter of a crop, and takes the highest."""
    given = []

    def scores(self, model, images, window, stride, windows_per_call, sizes):
        given.append((images.shape, window, stride))
        return images[..., :1] * jnp.arange(19) * jnp.arange(17, -2, -1)

    monkeypatch.setattr(MgrnetHead, "image_scores", scores)
    task = tasks.make_task(validated(configured()))
    plan = tasks.Blueprint.of(task, "none")
    state = jax.tree.map(lambda leaf: jnp.ones(leaf.shape, leaf.dtype), plan.abstract)
    label = task.predictor(plan.graph)(state, np.full((19, 30, 3), 255, np.uint8))
    assert label.shape == (19, 30)
    assert np.unique(label).tolist() == [8]  # the first of the two whose products are highest
    assert given == [((1, 24, 32, 3), (SIDE, SIDE), (8, 8))]


class Watching(Method):
    """A method that reads features."""

    def observe(self, features, places, batch):
        return features, {}


def test_what_does_not_fit_is_refused():
    """Crops that cannot be halved twice, strides past the windows, channels that the groups do not
    divide, a method that reads features: one line that says what to do.
    """
    for crop in ((32, 48), (34, 34)):
        config = configured()
        config.data.crop = crop
        with pytest.raises(ValueError, match=rf"data\.crop is {crop[0]}x{crop[1]}; allowed with"):
            validated(config)
    config = configured()
    config.evaluation.stride = (8, 24)
    with pytest.raises(ValueError, match=r"at most the windows of mgrnet \(16, 16\), or windows"):
        validated(config)
    for field, number in (("width", 32), ("hidden", 128)):
        task = tasks.make_task(validated(configured(**{field: 48})))
        with pytest.raises(
            ValueError, match=rf"model\.mgrnet\.{field} is 48; allowed: multiples of {number},"
        ):
            nnx.eval_shape(lambda task=task: task.model(nnx.Rngs(0)))
    task = tasks.make_task(validated(configured()))
    task.methods = (Watching(),)
    with pytest.raises(ValueError, match=r"mgrnet reads 2 views .* the method Watching cannot go"):
        nnx.eval_shape(lambda: task.model(nnx.Rngs(0)))
