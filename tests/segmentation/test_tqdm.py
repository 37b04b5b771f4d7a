"""tqdm's head against its authors' modules (golden file of tests/oracles/golden_tqdm.py), and what
it must do besides.
"""

import re
from typing import Any
import zlib

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import gta5_methods
from jaxdg import weights
from jaxdg.backbones import Eva02Config, layers, zoo
from jaxdg.methods.visual_anchor import VisualAnchor, VisualAnchorOptions
from jaxdg.segmentation import Segmenter, SegmenterConfig, TqdmConfig, TqdmHead
from jaxdg.segmentation.mask2former import losses
from jaxdg.segmentation.tqdm import context_decoder
from jaxdg.segmentation.tqdm.head import TextPredictions
from jaxdg.text.clip_text import TEXT_TOWERS, ClipText, ClipTextConfig, ProjectionConfig
from jaxdg.text.tokenizer import tokenize

# Sizes of the golden file.
IMAGES = 2
IDS = ((62, 5, 63, 0), (62, 7, 9, 63), (62, 11, 63, 0))
NAMES = ("road", "traffic light", "sky")  # of as many tokens
CHANNELS = (4, 6, 8, 8)
MAPS = ((8, 10), (5, 6), (4, 4), (3, 3))
POINTS = 64
SIZES: dict[str, Any] = dict(
    queries=3,
    contexts=2,
    context_layers=2,
    context_width=8,
    context_heads=2,
    hidden=32,
    heads=4,
    pixel_layers=2,
    pixel_ffn=16,
    layers=3,
    ffn=16,
    points=POINTS,
)
WHOLE = ("query_embed", "level_e", "pos_embed", "_embedding", "contexts", "input")
BLOCK = {"norm1": "ln_1", "norm2": "ln_2", "mlp.fc1": "mlp.c_fc", "mlp.fc2": "mlp.c_proj"}
# Names of this package, of the authors'; every pattern is applied, in this order.
TABLE = (
    (r"^text\.blocks\.", "text_encoder.transformer.resblocks."),
    (r"^text\.", "text_encoder."),
    (r"(resblocks\.\d\.)(norm1|norm2|mlp\.fc1|mlp\.fc2)", lambda m: m[1] + BLOCK[m[2]]),
    (r"attn\.qkv\.", "attn.in_proj_"),
    (r"(resblocks.*attn)\.proj", r"\1.out_proj"),
    (r"^image_projection\.norm", "backbone.norm"),
    (r"^image_projection\.proj", "backbone.head"),
    (r"^(context_decoder.*mlp)\.1", r"\1.3"),
    (r"^(text_proj)\.1", r"\1.2"),
    (r"^class_embed", "cls_embed"),
    (r"^mask_embed\.layers\.(\d)", lambda m: f"mask_embed.{2 * int(m[1])}"),
    (r"^decoder_norm", "transformer_decoder.post_norm"),
    (r"^layers\.", "transformer_decoder.layers."),
    (r"^pixel_decoder\.layers\.", "pixel_decoder.encoder.layers."),
    (r"(transformer_decoder.*)cross_attn\.", r"\1attentions.0.attn."),
    (r"(transformer_decoder.*)self_attn\.", r"\1attentions.1.attn."),
    (r"(pixel_decoder.*)self_attn\.", r"\1attentions.0."),
    (r"(pixel_decoder.*)cross_attn\.", r"\1attentions.1.attn."),
    (r"in_proj\.", "in_proj_"),
    (r"(transformer_decoder.*)cross_norm", r"\1norms.0"),
    (r"self_norm", "norms.1"),
    (r"ffn_norm", "norms.2"),
    (r"(pixel_decoder.*)norm1", r"\1norms.0"),
    (r"(pixel_decoder.*)cross_norm", r"\1norms.1"),
    (r"(pixel_decoder.*)norm2", r"\1norms.2"),
    (r"(decoder.*)linear1", r"\1ffns.0.layers.0.0"),
    (r"(decoder.*)linear2", r"\1ffns.0.layers.1"),
    (r"^pixel_decoder\.post_norm", "pixel_decoder.encoder.post_norm"),
    (r"^pixel_decoder\.input_proj", "pixel_decoder.input_convs"),
    (r"^pixel_decoder\.adapter_1", "pixel_decoder.lateral_convs.0"),
    (r"^pixel_decoder\.layer_1", "pixel_decoder.output_convs.0"),
    (r"(pixel_decoder\.(?:input|lateral|output)_convs\.\d)\.norm", r"\1.gn"),
    (r"^pixel_decoder\.mask_features", "pixel_decoder.mask_feature"),
    (r"^pixel_decoder\.level_embed$", "pixel_decoder.level_encoding.weight"),
    (r"(query_embed|level_embed|text_pos_embed)$", r"\1.weight"),
    (r"(kernel|scale)$", "weight"),
    (
        r"^(?!text_encoder|context|gamma|backbone)",
        "decode_head.",
    ),
)


def theirs(name: str) -> str:
    """The authors' name of a parameter of the head."""
    for pattern, new in TABLE:
        name = re.sub(pattern, new, name)
    return name


def ours(tensor: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """A tensor of torch's axes with the axes of this package."""
    if tensor.ndim == 4:
        tensor = tensor.transpose(2, 3, 1, 0)
        return tensor.reshape(shape)
    if tensor.ndim == 3:  # contexts have a leading 1
        return tensor[0]
    # Square or not, only kernels of linear layers are transposed.
    return tensor


def drawn(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """The numbers of the golden file, by the authors' name and shape."""
    numbers = np.random.default_rng(zlib.crc32(name.encode())).standard_normal(shape, np.float32)
    is_norm = any(part in name for part in ("norm", "ln_", ".gn.")) or name.endswith(
        ("memory_proj.0.weight", "memory_proj.2.weight", "text_proj.0.weight", "out_proj.0.weight")
    )
    if len(shape) == 1:
        return np.float32(0.3) * numbers + np.float32(is_norm and name.endswith("weight"))
    if any(part in name for part in WHOLE):
        return numbers
    numbers = numbers - numbers.mean(tuple(range(1, len(shape))), keepdims=True)
    size = 0.3 if "mask_embed" in name else 1.5
    return numbers * np.float32(size / np.sqrt(np.prod(shape[1:])))


def given(name: str, *shape: int) -> np.ndarray:
    """An input of the golden file."""
    return drawn(f"input {name}", shape)


def converted(name: str, tensor: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """A tensor of the authors' as this package's of the given name."""
    tensor = tensor.T if name.endswith("kernel") and tensor.ndim == 2 else ours(tensor, shape)
    assert tensor.shape == shape, name
    return tensor


@pytest.fixture(scope="module")
def archive(golden):
    with np.load(golden / "tqdm.npz") as file:
        return dict(file)


@pytest.fixture(scope="module")
def head(archive):
    """The golden file's head, every tensor of the authors' used once."""
    projection = ProjectionConfig(8, 12, 1e-6, bias=True)
    tower = ClipTextConfig(16, 2, 12, "gelu", projection, depth=2)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(TEXT_TOWERS, "tiny_text", tower)
        config = TqdmConfig(3, names=NAMES, **SIZES)
        head = nnx.eval_shape(lambda: TqdmHead(config, CHANNELS, encoder="tiny", rngs=nnx.Rngs(0)))
    shapes = {
        name.removeprefix("shape."): tuple(shape.tolist())
        for name, shape in archive.items()
        if name.startswith("shape.")
    }
    table = "text_encoder.token_embedding.weight"
    anchors = given("anchors", 3, 12)
    stored = {
        "text.tokens": drawn(table, shapes.pop(table))[np.asarray(IDS)],
        "text.anchors": anchors / np.linalg.norm(anchors, axis=-1, keepdims=True),
    }
    for name, shape in weights.shapes(head).items():
        if name not in stored:
            at = theirs(name)
            stored[name] = converted(name, drawn(at, shapes.pop(at)), shape)
    assert not shapes
    weights.fill(head, stored, "the golden file")
    return head


def spread(key: Any, shape: tuple[int, ...]) -> jnp.ndarray:
    """The golden file's evenly spread points: as many candidates, then as many uniform ones."""
    counts = 3 * POINTS, POINTS // 4
    assert shape[-1] == sum(counts)
    points = [
        (0.5 + np.outer(np.arange(1, n + 1), [0.7548776662466927, 0.5698402909980532])) % 1
        for n in counts
    ]
    return jnp.broadcast_to(jnp.asarray(np.concatenate(points), jnp.float32), (*shape, 2))


def labels() -> jnp.ndarray:
    """The golden file's two label maps."""
    rng = np.random.default_rng(0)
    label = rng.integers(0, 3, (IMAGES, 4, 5)).astype(np.uint8).repeat(6, 1).repeat(6, 2)
    label[0, :6, :18] = np.arange(3).repeat(6)
    label[0, :, -4:] = 255
    label[1][label[1] == 1] = 255
    return jnp.asarray(label)


def inputs() -> tuple[jnp.ndarray, ...]:
    """The golden file's levels and tokens."""
    sizes = zip(CHANNELS, MAPS, strict=True)
    levels = [
        given(f"level {i}", IMAGES, c, *size).transpose(0, 2, 3, 1)
        for i, (c, size) in enumerate(sizes)
    ]
    return tuple(jnp.asarray(x) for x in (*levels, given("tokens", IMAGES, 17, 8)))


def features_of(inputs: tuple[jnp.ndarray, ...]) -> tuple[jnp.ndarray, ...]:
    """What the head reads: levels, the last block's map, its class token."""
    *levels, tokens = inputs
    return *levels, tokens[:, 1:].reshape(IMAGES, 4, 4, 8), tokens[:, :1, None]


def test_outputs_losses_and_gradients_are_those_of_the_authors_code(head, archive, monkeypatch):
    """Queries, maps, predictions before and after every layer, the six terms of the loss, and the
    gradients of their sum for features and parameters of every part.
    """
    monkeypatch.setattr(losses, "draw_points", spread)
    label = labels()
    graph, parameters, rest = nnx.split(head, nnx.Param, ...)
    anchor = VisualAnchor(VisualAnchorOptions(on=True), None)
    batch = {"anchor": jnp.asarray(given("global before", IMAGES, 1, 12)[:, 0])}

    def run(parameters, inputs):
        head = nnx.merge(graph, parameters, rest)
        output = head(features_of(inputs))
        classes, masks = output
        denominator = head.loss_denominator(label)
        terms = head.loss(output, label, denominator, jax.random.key(0))
        terms |= anchor.losses(output, batch, denominator)
        mask_features, levels = head.pixel_decoder(inputs[:4], output.texts)
        found = {
            "names": head.text(head.contexts[...]),
            "texts": output.texts,
            "mask_features": mask_features,
            "class_logits": classes,
            "mask_logits": masks,
        }
        found |= {f"level{i}": level for i, level in enumerate(levels)}
        return sum(terms.values()), found | {f"loss.{name}": term for name, term in terms.items()}

    differentiate = jax.value_and_grad(run, argnums=(0, 1), has_aux=True)
    (_, found), (to_parameters, to_inputs) = jax.jit(differentiate)(parameters, inputs())
    expected = {k: v for k, v in archive.items() if not k.startswith(("to.", "shape."))}
    assert found.keys() == expected.keys()
    for name, value in found.items():
        np.testing.assert_allclose(value, expected[name], atol=1e-4, rtol=1e-4, err_msg=name)

    gradients = {f"level{i}": x for i, x in enumerate(to_inputs)}
    gradients["tokens"] = gradients.pop("level4")
    expected = {k.removeprefix("to."): v for k, v in archive.items() if k.startswith("to.")}
    for name, tensor in weights.tensors(nnx.merge(graph, to_parameters, rest)).items():
        at = theirs(name)
        if at in expected:
            expected[at] = converted(name, expected[at], tensor.shape)
            gradients[at] = tensor
    assert gradients.keys() == expected.keys()
    for name, value in gradients.items():
        scale = np.abs(expected[name]).max()
        np.testing.assert_allclose(value, expected[name], atol=1e-4 * scale, err_msg=name)


@pytest.fixture(scope="module")
def tower(tmp_path_factory):
    """The file of a text tower with random weights, and the tower."""
    config = ClipTextConfig(16, 2, 12, "gelu", ProjectionConfig(8, 12, 1e-6, bias=True), depth=2)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(TEXT_TOWERS, "tiny_text", config)
        tower = ClipText(config, rngs=nnx.Rngs(3))
        path = tmp_path_factory.mktemp("tower") / "tower.safetensors"
        weights.save(weights.tensors(tower), path, {"model": "tiny_text"})
        yield path, tower


def test_names_without_context_are_embedded_as_by_the_tower(tower):
    """Without learned context a query starts as CLIP's embedding of the class name; what it stays
    near is that of the prompt; the image tower's projection is loaded too.
    """
    path, whole = tower
    sizes: dict[str, Any] = {**SIZES, "contexts": 0}
    config = TqdmConfig(3, names=NAMES, **sizes)
    head = TqdmHead(config, CHANNELS, encoder="tiny", rngs=nnx.Rngs(0))
    head.load_text(path)
    embed = nnx.jit(lambda module, *x: module(*x))
    want = embed(whole, jnp.asarray(tokenize(NAMES)))
    np.testing.assert_allclose(embed(head.text, head.contexts[...]), want, atol=1e-6)
    prompts = [f"a clean origami of a {name}" for name in NAMES]
    want = embed(whole, jnp.asarray(tokenize(prompts)))
    want = want / np.linalg.norm(want, axis=-1, keepdims=True)
    np.testing.assert_allclose(head.text.anchors[...], want, atol=1e-6)
    np.testing.assert_array_equal(
        head.image_projection.proj.kernel[...], whole.image_projection.proj.kernel[...]
    )


@pytest.mark.parametrize(("gamma", "deviation"), [(None, 0.88), (1e-4, 0.0)])
def test_gamma_starts_as_in_the_code_or_in_the_paper(tower, gamma, deviation):
    """Drawn from a normal distribution cut at two deviations, whose own is 0.8796; or constant."""
    config = TqdmConfig(3, names=NAMES, **SIZES, gamma=gamma)
    head = TqdmHead(config, CHANNELS, encoder="tiny", rngs=nnx.Rngs(0))
    start = np.asarray(head.gamma[...])
    assert np.abs(start).max() <= 2
    assert abs(start.std() - deviation) < 0.4
    if gamma:
        np.testing.assert_array_equal(start, np.float32(gamma))


def test_the_class_token_and_the_last_map_come_from_one_run_of_eva02(monkeypatch):
    """Global feature and patches are the encoder's tokens after its last block, by its norm and
    projection; without the class token the features are as those of any decoder.
    """
    encoder = Eva02Config(width=24, depth=4, heads=2, patch_size=4, taps=(0, 1, 2, 3))
    tower = ClipTextConfig(16, 2, 12, "gelu", ProjectionConfig(24, 12, 1e-6, bias=True), depth=1)
    monkeypatch.setitem(zoo.ZOO, "tiny", zoo.Entry(encoder))
    monkeypatch.setitem(TEXT_TOWERS, "tiny_text", tower)
    sizes: dict[str, Any] = {**SIZES, "pixel_layers": 1, "layers": 1}
    fields: dict[str, Any] = dict(num_classes=3, encoder="tiny", image_size=(16, 24))
    config = SegmenterConfig(
        decoder=TqdmConfig(3, names=NAMES, **sizes), pyramid="interpolate", **fields
    )
    model = Segmenter(config, rngs=nnx.Rngs(0))
    images = jnp.asarray(np.random.default_rng(0).normal(size=(2, 16, 24, 3)), jnp.float32)

    @nnx.jit
    def run(model):
        tokens = model.backbone.tokens(images)[-1]
        return model.encode(images), model.backbone(images), model(images), tokens

    features, maps, output, tokens = run(model)
    assert len(features) == len(maps) + 1
    for got, want in zip(features, maps, strict=False):
        np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)
    want = model.head.image_projection(tokens)
    np.testing.assert_allclose(output.image, want[:, 0], rtol=1e-4, atol=1e-4)
    patches = want[:, 1:].reshape(2, 4, 6, 12)
    np.testing.assert_allclose(output.patches, patches, rtol=1e-4, atol=1e-4)
    assert output.mask_features.shape == (2, 16, 24, 32)


def test_dropout_needs_a_key(head):
    """The queries are the same without a key, and others with each key."""
    graph, state = nnx.split(head)
    image = jnp.asarray(given("image", 1, 17, 12))

    @jax.jit
    def queries(state, seed):
        head = nnx.merge(graph, state)
        return head.text_queries(image), head.text_queries(image, jax.random.key(seed))

    plain, one = queries(state, 0)
    again, other = queries(state, 1)
    np.testing.assert_array_equal(plain, again)
    assert np.abs(one - other).max() > 1e-2
    assert np.abs(one - plain).max() > 1e-2


def test_dropped_numbers_are_a_tenth_and_the_rest_grows():
    """A tenth becomes 0, the others are divided by 0.9; without a key nothing changes."""
    x = jnp.ones((1, 100, 200))
    got = np.asarray(layers.dropout(x, jax.random.key(0), context_decoder.DROPOUT))
    assert abs((got == 0).mean() - 0.1) < 0.01
    np.testing.assert_allclose(got[got != 0], 1 / 0.9, rtol=1e-6)
    assert layers.dropout(x, None, context_decoder.DROPOUT) is x


def test_losses_of_parts_of_a_batch_add_up(head, monkeypatch):
    """Every term of both images is the sum of the terms of each, whatever is labelled in it."""
    monkeypatch.setattr(losses, "draw_points", spread)
    label = labels()
    rng = np.random.default_rng(1)

    def normal(*shape):
        return jnp.asarray(rng.normal(size=shape), jnp.float32)

    output = TextPredictions(
        class_logits=normal(2, IMAGES, 3, 4),
        mask_embeds=normal(2, IMAGES, 3, 8),
        mask_features=normal(IMAGES, 5, 6, 8),
        texts=normal(IMAGES, 3, 12),
        image=normal(IMAGES, 12),
        patches=normal(IMAGES, 4, 4, 12),
    )

    def part(i):
        rows = vars(output).copy()
        for name, x in rows.items():
            rows[name] = (
                x[:, i : i + 1] if name in ("class_logits", "mask_embeds") else x[i : i + 1]
            )
        return TextPredictions(**rows)

    denominator = head.loss_denominator(label)
    graph, state = nnx.split(head)

    @jax.jit
    def terms(state, output, label):
        key = jax.random.key(0)
        return nnx.merge(graph, state).loss(output, label, denominator, key)

    whole = terms(state, output, label)
    parts = [terms(state, part(i), label[i : i + 1]) for i in range(IMAGES)]
    assert whole.keys() == {"class", "mask", "dice", "textual", "vision_language"}
    for name, term in whole.items():
        np.testing.assert_allclose(sum(p[name] for p in parts), term, rtol=1e-5, err_msg=name)


@pytest.mark.parametrize(
    ("source", "undecayed"),
    [("gta5", ("norm",)), ("cityscapes", ("norm", "level_embed", "query_embed"))],
)
def test_the_recipe_decays_what_the_authors_decay(head, source, undecayed):
    """Their keys are searched in their names, and that of the backbone, the longest, goes first."""
    factors = gta5_methods.get_config(f"tqdm,,{source}").optimizer
    for name in weights.shapes(head):
        at = theirs(name)
        decays = at.startswith("backbone") or not any(key in at for key in undecayed)
        if not at.startswith("text_encoder"):
            got = weights.first_match(f"head.{name}", factors.weight_decay_factors, 1.0)
            assert got == decays, name
