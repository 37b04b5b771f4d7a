"""Conversion of Mask2Former heads: the real key list, three namings, sizes read from tensors,
pickles, refusals, the way back.
"""

from collections import OrderedDict
import dataclasses
import functools
import json
import pickle

from flax import nnx
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from jaxdg import weights
from jaxdg.conversion import checkpoint, mapping, mask2former
from jaxdg.conversion import convert as torch_to_flax
from jaxdg.segmentation import Mask2Former, Mask2FormerConfig
from tests.conversion.checks import Evil, assert_identical, converted, find_shapes_once, refused

SMALL = dict(
    classes=5,
    queries=7,
    hidden=32,
    heads=8,
    layers=2,
    ffn=40,
    pixel_layers=2,
    pixel_ffn=24,
    channels=(8, 12, 16, 20),
)


def original(
    queries_name="query_feat",
    *,
    classes,
    queries,
    hidden,
    heads,
    layers,
    ffn,
    pixel_layers,
    pixel_ffn,
    channels,
):
    """A random checkpoint as facebookresearch/Mask2Former names it, written out by hand, with all
    that its files hold beside the head.
    """
    c = hidden
    points = heads * 3 * 4

    def norm(name):
        return {f"{name}.weight": (c,), f"{name}.bias": (c,)}

    def dense(name, rows, columns):
        return {f"{name}.weight": (rows, columns), f"{name}.bias": (rows,)}

    shapes = {}
    for i, channel in enumerate(reversed(channels[1:])):
        shapes |= {
            f"pixel_decoder.input_proj.{i}.0.weight": (c, channel, 1, 1),
            f"pixel_decoder.input_proj.{i}.0.bias": (c,),
        }
        shapes |= norm(f"pixel_decoder.input_proj.{i}.1")
    shapes |= {"pixel_decoder.transformer.level_embed": (3, c)}
    for i in range(pixel_layers):
        layer = f"pixel_decoder.transformer.encoder.layers.{i}"
        shapes |= dense(f"{layer}.self_attn.sampling_offsets", 2 * points, c) | dense(
            f"{layer}.self_attn.attention_weights", points, c
        )
        shapes |= (
            dense(f"{layer}.self_attn.value_proj", c, c)
            | dense(f"{layer}.self_attn.output_proj", c, c)
            | norm(f"{layer}.norm1")
        )
        shapes |= (
            dense(f"{layer}.linear1", pixel_ffn, c)
            | dense(f"{layer}.linear2", c, pixel_ffn)
            | norm(f"{layer}.norm2")
        )
    shapes |= {
        "pixel_decoder.mask_features.weight": (c, c, 1, 1),
        "pixel_decoder.mask_features.bias": (c,),
    }
    shapes |= {
        "pixel_decoder.adapter_1.weight": (c, channels[0], 1, 1),
        "pixel_decoder.layer_1.weight": (c, c, 3, 3),
    }
    shapes |= norm("pixel_decoder.adapter_1.norm") | norm("pixel_decoder.layer_1.norm")
    for i in range(layers):
        for attention in (
            f"self_attention_layers.{i}.self_attn",
            f"cross_attention_layers.{i}.multihead_attn",
        ):
            shapes |= {f"predictor.transformer_{attention}.in_proj_weight": (3 * c, c)}
            shapes |= {f"predictor.transformer_{attention}.in_proj_bias": (3 * c,)}
            shapes |= dense(f"predictor.transformer_{attention}.out_proj", c, c)
        for part in ("self_attention", "cross_attention", "ffn"):
            shapes |= norm(f"predictor.transformer_{part}_layers.{i}.norm")
        shapes |= dense(f"predictor.transformer_ffn_layers.{i}.linear1", ffn, c)
        shapes |= dense(f"predictor.transformer_ffn_layers.{i}.linear2", c, ffn)
    shapes |= norm("predictor.decoder_norm") | dense("predictor.class_embed", classes + 1, c)
    shapes |= {f"predictor.{name}.weight": (queries, c) for name in (queries_name, "query_embed")}
    shapes |= {"predictor.level_embed.weight": (3, c)}
    for i in range(3):
        shapes |= dense(f"predictor.mask_embed.layers.{i}", c, c)
    shapes = {f"sem_seg_head.{name}": shape for name, shape in shapes.items()}
    shapes |= {
        "backbone.res2.0.conv1.weight": (8, 4, 1, 1),
        "backbone.stem.conv1.norm.running_var": (4,),
    }
    shapes |= {"criterion.empty_weight": (classes + 1,)}
    rng = np.random.default_rng(0)
    return {name: rng.standard_normal(shape, np.float32) for name, shape in shapes.items()}


def mapped(tensors):
    """The head alone."""
    return {name: tensor for name, tensor in tensors.items() if name.startswith("sem_seg_head.")}


# Below `sem_seg_head.` of the original, and what transformers calls the same tensor below `model.`;
# of layers, the second.
PIXEL = "pixel_level_module.decoder"
LAYER = "transformer_module.decoder.layers.1"
ENCODER = f"{PIXEL}.encoder.layers.1"
THEIRS = "pixel_decoder.transformer.encoder.layers.1"
SELF, CROSS, FFN = (
    f"predictor.transformer_{kind}_layers.1"
    for kind in ("self_attention", "cross_attention", "ffn")
)
RENAMED = {
    "pixel_decoder.input_proj.1.0.weight": f"{PIXEL}.input_projections.1.0.weight",
    "pixel_decoder.input_proj.2.1.bias": f"{PIXEL}.input_projections.2.1.bias",
    "pixel_decoder.transformer.level_embed": f"{PIXEL}.level_embed",
    f"{THEIRS}.self_attn.sampling_offsets.weight": f"{ENCODER}.self_attn.sampling_offsets.weight",
    f"{THEIRS}.self_attn.attention_weights.bias": f"{ENCODER}.self_attn.attention_weights.bias",
    f"{THEIRS}.self_attn.value_proj.bias": f"{ENCODER}.self_attn.value_proj.bias",
    f"{THEIRS}.self_attn.output_proj.weight": f"{ENCODER}.self_attn.output_proj.weight",
    f"{THEIRS}.norm1.weight": f"{ENCODER}.self_attn_layer_norm.weight",
    f"{THEIRS}.linear1.weight": f"{ENCODER}.fc1.weight",
    f"{THEIRS}.linear2.bias": f"{ENCODER}.fc2.bias",
    f"{THEIRS}.norm2.bias": f"{ENCODER}.final_layer_norm.bias",
    "pixel_decoder.mask_features.weight": f"{PIXEL}.mask_projection.weight",
    "pixel_decoder.adapter_1.weight": f"{PIXEL}.adapter_1.0.weight",
    "pixel_decoder.adapter_1.norm.weight": f"{PIXEL}.adapter_1.1.weight",
    "pixel_decoder.layer_1.weight": f"{PIXEL}.layer_1.0.weight",
    "pixel_decoder.layer_1.norm.bias": f"{PIXEL}.layer_1.1.bias",
    f"{SELF}.self_attn.out_proj.weight": f"{LAYER}.self_attn.out_proj.weight",
    f"{SELF}.norm.weight": f"{LAYER}.self_attn_layer_norm.weight",
    f"{CROSS}.multihead_attn.in_proj_weight": f"{LAYER}.cross_attn.in_proj_weight",
    f"{CROSS}.multihead_attn.out_proj.bias": f"{LAYER}.cross_attn.out_proj.bias",
    f"{CROSS}.norm.bias": f"{LAYER}.cross_attn_layer_norm.bias",
    f"{FFN}.linear1.bias": f"{LAYER}.fc1.bias",
    f"{FFN}.linear2.weight": f"{LAYER}.fc2.weight",
    f"{FFN}.norm.weight": f"{LAYER}.final_layer_norm.weight",
    "predictor.decoder_norm.weight": "transformer_module.decoder.layernorm.weight",
    "predictor.query_embed.weight": "transformer_module.queries_embedder.weight",
    "predictor.query_feat.weight": "transformer_module.queries_features.weight",
    "predictor.level_embed.weight": "transformer_module.level_embed.weight",
    "predictor.mask_embed.layers.1.weight": (
        "transformer_module.decoder.mask_predictor.mask_embedder.1.0.weight"
    ),
    "predictor.mask_embed.layers.2.bias": (
        "transformer_module.decoder.mask_predictor.mask_embedder.2.0.bias"
    ),
}


abstract = functools.cache(mask2former.abstract)


@pytest.fixture(autouse=True, scope="module")
def shapes_found_once():
    """No name changes its meaning between these tests."""
    with pytest.MonkeyPatch.context() as patch:
        find_shapes_once(patch)
        yield


@pytest.fixture(autouse=True)
def shapes_once(monkeypatch):
    """The same few heads are asked for again and again, and nobody changes them."""
    monkeypatch.setattr(mask2former, "abstract", abstract)


@pytest.fixture
def command(command):
    """The conversion command for a head."""
    return functools.partial(command, model="mask2former")


def test_the_real_keys_are_exactly_those_expected(weights_path):
    """At full size: names and shapes of the published head are those of the defaults, and its sizes
    are read from them.
    """
    listed = json.loads(weights_path("keys/mask2former_head_facebook.json").read_text())["keys"]
    keys = {key: tuple(shape) for key, (shape, _) in listed.items()}
    config, channels = mask2former.of_checkpoint(
        keys, lambda name: np.broadcast_to(np.float32(0), keys[name])
    )
    assert (config, channels) == (Mask2FormerConfig(num_classes=19), (256, 512, 1024, 2048))
    layout = mask2former.layouts()[0]
    assert mapping.source_shapes(mask2former.abstract(config, channels), layout) == mapped(keys)
    assert keys.keys() - mapped(keys).keys() == {"criterion.empty_weight"}


def test_the_real_keys_convert_and_come_back(command, weights_path):
    """All real names and layers with random values at a reduced width: every tensor is used, and
    --reverse gives the same bits.
    """
    reduce = {256: 32, 768: 96, 512: 12, 1024: 24, 2048: 40}
    listed = json.loads(weights_path("keys/mask2former_head_facebook.json").read_text())["keys"]
    rng = np.random.default_rng(0)
    source = {
        key: rng.standard_normal([reduce.get(n, n) for n in shape], np.float32)
        for key, (shape, _) in listed.items()
    }
    code, report, err, out = command(source)
    assert (code, err) == (0, "")
    assert "292 of 293 tensors mapped (layout: Mask2Former)" in report
    assert "criterion.empty_weight (class weights of the loss" in report
    assert (
        "19 classes, 100 queries, 9 layers after 6 of the pixel decoder, 32 channels, 8 heads"
        in report
    )
    back = converted(command(out, "--reverse", out="back.safetensors"))
    assert_identical(load_file(back), mapped(source))


def test_every_tensor_lands_where_its_meaning_says(command):
    """Values after conversion equal a plain reading of both conventions: torch [out, in] and OIHW,
    query key value one after another.
    """
    source = original(**SMALL)
    c = SMALL["hidden"]
    got = load_file(converted(command(source)))
    rng = np.random.default_rng(1)
    x = rng.standard_normal(c).astype(np.float32)
    head = "sem_seg_head."
    near = functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-5)
    cross = source[f"{head}{CROSS}.multihead_attn.in_proj_weight"]
    for i, part in enumerate(np.split(got["layers.1.cross_attn.in_proj.kernel"], 3, axis=1)):
        near(x @ part, cross[i * c : (i + 1) * c] @ x)
    near(x @ got["layers.1.linear1.kernel"], source[f"{head}{FFN}.linear1.weight"] @ x)
    map5 = rng.standard_normal(20).astype(np.float32)  # the coarsest map is projected first
    near(
        map5 @ got["pixel_decoder.input_proj.0.conv.kernel"],
        source[f"{head}pixel_decoder.input_proj.0.0.weight"][:, :, 0, 0] @ map5,
    )
    patch = rng.standard_normal((3, 3, c)).astype(np.float32)
    ours = np.einsum("yxc,yxcd->d", patch, got["pixel_decoder.layer_1.conv.kernel"])
    near(
        ours,
        np.einsum(
            "cyx,dcyx->d", patch.transpose(2, 0, 1), source[f"{head}pixel_decoder.layer_1.weight"]
        ),
    )
    np.testing.assert_array_equal(got["query_feat"], source[f"{head}predictor.query_feat.weight"])
    np.testing.assert_array_equal(
        got["pixel_decoder.level_embed"], source[f"{head}pixel_decoder.transformer.level_embed"]
    )
    np.testing.assert_array_equal(got["level_embed"], source[f"{head}predictor.level_embed.weight"])
    np.testing.assert_array_equal(
        got["layers.1.self_norm.scale"], source[f"{head}{SELF}.norm.weight"]
    )


def test_attention_equals_torchs(command):
    """The decoder's attention, loaded from a file, computes what torch's `nn.MultiheadAttention`
    does with the source's tensors.
    """
    torch = pytest.importorskip("torch")
    source = original(**SMALL)
    c = SMALL["hidden"]
    prefix = f"sem_seg_head.{CROSS}.multihead_attn."
    theirs = torch.nn.MultiheadAttention(c, SMALL["heads"], batch_first=True)
    theirs.load_state_dict(
        {
            name.removeprefix(prefix): torch.from_numpy(t)
            for name, t in source.items()
            if name.startswith(prefix)
        }
    )
    head = built(converted(command(source)))
    rng = np.random.default_rng(2)
    q, k, v = (rng.standard_normal((2, n, c)).astype(np.float32) for n in (3, 6, 6))
    mask = rng.random((2, 3, 6)) < 0.6
    mask[..., 0] = True
    with torch.no_grad():
        closed = torch.from_numpy(~mask).repeat_interleave(SMALL["heads"], 0)
        want = theirs(*map(torch.from_numpy, (q, k, v)), attn_mask=closed)[0].numpy()
    got = head.layers[1].cross_attn(*map(jnp.asarray, (q, k, v, mask)))
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-4)


def built(path):
    """The head that a converted file says it holds, loaded."""
    about = weights.metadata(path)
    config = Mask2FormerConfig(**json.loads(about["config"]))
    head = nnx.eval_shape(
        lambda: Mask2Former(config, json.loads(about["channels"]), rngs=nnx.Rngs(0))
    )
    weights.load(head, path)
    return head


def test_transformers_names_and_the_originals_name_the_same_tensors(command):
    """Transformers' names to jaxdg's to the original's and back to jaxdg's: the same bits, each
    where it belongs.
    """
    source = original(**SMALL)
    ours = converted(command(source, out="ours.safetensors"))
    hub = load_file(
        converted(command(ours, "--reverse", "--layout", "transformers", out="hub.safetensors"))
    )
    for theirs, name in RENAMED.items():
        np.testing.assert_array_equal(
            hub[f"model.{name}"], source[f"sem_seg_head.{theirs}"], err_msg=name
        )
    for kind in ("weight", "bias"):
        np.testing.assert_array_equal(
            hub[f"class_predictor.{kind}"], source[f"sem_seg_head.predictor.class_embed.{kind}"]
        )
        fused = source[
            f"sem_seg_head.predictor.transformer_self_attention_layers.1.self_attn.in_proj_{kind}"
        ]
        parts = [
            hub[f"model.transformer_module.decoder.layers.1.self_attn.{part}_proj.{kind}"]
            for part in "qkv"
        ]
        np.testing.assert_array_equal(np.concatenate(parts), fused)
    assert len(hub) == len(mapped(source)) + 4 * SMALL["layers"], (
        "self-attention's projections are three there"
    )
    hub |= {
        "model.pixel_level_module.encoder.stem.weight": np.ones(3, np.float32),
        "criterion.empty_weight": np.ones(6, np.float32),
    }
    code, report, err, again = command(hub, out="again.safetensors")
    assert (code, err) == (0, "")
    assert "(layout: transformers)" in report
    assert "model.pixel_level_module.encoder.stem.weight (the backbone" in report
    assert_identical(load_file(again), load_file(ours))
    back = converted(command(again, "--reverse", out="back.safetensors"))
    assert_identical(load_file(back), mapped(source))


def test_the_released_files_name_the_queries_otherwise(command):
    """`static_query`, which the original's code renames as it loads: the same head; --layout writes
    that name again.
    """
    released = original("static_query", **SMALL)
    today = original(**SMALL)
    code, report, err, out = command(released, out="released.safetensors")
    assert (code, err) == (0, "")
    assert "(layout: Mask2Former-released)" in report
    assert_identical(load_file(out), load_file(converted(command(today, out="today.safetensors"))))
    assert_identical(
        load_file(converted(command(out, "--reverse", out="back.safetensors"))), mapped(today)
    )
    again = command(out, "--reverse", "--layout", "Mask2Former-released", out="again.npz")
    with np.load(converted(again)) as archive:
        assert_identical(dict(archive), mapped(released))


@pytest.mark.parametrize(
    "changed",
    [
        {},
        dict(classes=150, queries=100),
        dict(hidden=64, heads=4, channels=(96, 192, 384, 768)),
        dict(layers=1, pixel_layers=1, ffn=32, pixel_ffn=32, channels=(32, 32, 32, 32)),
    ],
    ids=["small", "ADE20K", "wide", "square"],
)
def test_the_file_says_which_head_it_is(command, changed):
    """Sizes are read from the tensors and written beside them, so that the head is built from its
    file alone and loads it.
    """
    sizes = {**SMALL, **changed}
    source = original(**sizes)
    out = converted(command(source))
    head = built(out)
    config = dataclasses.asdict(head.config)
    assert {
        name: config[{"classes": "num_classes"}.get(name, name)]
        for name in sizes
        if name != "channels"
    } == {name: size for name, size in sizes.items() if name != "channels"}
    assert json.loads(weights.metadata(out)["channels"]) == list(sizes["channels"])
    np.testing.assert_array_equal(
        head.class_embed.bias[...], source["sem_seg_head.predictor.class_embed.bias"]
    )
    assert_identical(
        load_file(converted(command(out, "--reverse", out="back.safetensors"))), mapped(source)
    )


def test_metadata_says_what_was_done(command):
    """Model, layout, and what was left out with reasons."""
    about = weights.metadata(converted(command(original(**SMALL))))
    assert about["model"] == "mask2former"
    assert about["layout"] == "Mask2Former"
    left_out = json.loads(about["left_out"])
    assert left_out.keys() == {
        "backbone.res2.0.conv1.weight",
        "backbone.stem.conv1.norm.running_var",
        "criterion.empty_weight",
    }
    assert "only the head" in left_out["backbone.res2.0.conv1.weight"]


P = "sem_seg_head.predictor."
E = "sem_seg_head.pixel_decoder.transformer.encoder.layers."


def rename(tensors):
    tensors[f"{P}decoder_norms.weight"] = tensors.pop(f"{P}decoder_norm.weight")
    return f"1 unknown ({P}decoder_norms.weight)", f"1 missing ({P}decoder_norm.weight)"


def drop(tensors):
    del (
        tensors[f"{P}class_embed.bias"],
        tensors[f"{P}query_feat.weight"],
        tensors[f"{E}1.norm2.bias"],
    )
    return "3 missing", f"{E}1.norm2.bias", f"{P}class_embed.bias", f"{P}query_feat.weight"


def add(tensors):
    tensors |= {
        f"{P}input_proj.0.weight": np.ones((32, 16, 1, 1), np.float32),
        "sem_seg_head.pixel_decoder.adapter_1.bias": np.ones(32, np.float32),
    }
    return (f"2 unknown (sem_seg_head.pixel_decoder.adapter_1.bias, {P}input_proj.0.weight)",)


def both_queries(tensors):
    tensors[f"{P}static_query.weight"] = tensors[f"{P}query_feat.weight"]
    return (f"1 unknown ({P}static_query.weight)",)


def transpose(tensors):
    for name in (
        f"{P}transformer_ffn_layers.0.linear1.weight",
        "sem_seg_head.pixel_decoder.layer_1.weight",
    ):
        tensors[name] = np.ascontiguousarray(tensors[name].T)
    return (
        "2 of another shape",
        "ffn_layers.0.linear1.weight is (32, 40), not (40, 32)",
        "layer_1.weight is (3, 3, 32, 32), not (32, 32, 3, 3)",
    )


def misshape(tensors):
    tensors[f"{P}transformer_ffn_layers.0.linear1.bias"] = np.ones(9, np.float32)
    tensors[f"{P}level_embed.weight"] = np.ones((4, 32), np.float32)
    tensors[f"{E}0.self_attn.sampling_offsets.bias"] = np.ones(96, np.float32)
    tensors["sem_seg_head.pixel_decoder.mask_features.weight"] = np.ones((32, 32), np.float32)
    return (
        "4 of another shape",
        "ffn_layers.0.linear1.bias is (9,), not (40,)",
        "level_embed.weight is (4, 32), not (3, 32)",
        "sampling_offsets.bias is (96,), not (192,)",
        "mask_features.weight is (32, 32), not (32, 32, 1, 1)",
    )


def scalars(tensors):
    for name in (f"{P}class_embed.weight", f"{P}query_embed.weight", f"{E}0.linear1.bias"):
        tensors[name] = np.ones((), np.float32)
    return (
        "3 of another shape",
        "class_embed.weight is (), not (6, 32)",
        "query_embed.weight is (), not (7, 32)",
    )


def integers(tensors):
    tensors[f"{P}decoder_norm.bias"] = np.ones(32, np.int32)
    return (f"{P}decoder_norm.bias holds int32",)


def lose_part_of_a_layer(tensors):
    for name in [name for name in tensors if "transformer_ffn_layers.1." in name]:
        del tensors[name]
    return "6 missing", f"{P}transformer_ffn_layers.1.linear1.bias"


def lose_a_layer(tensors):
    for name in [name for name in tensors if name.startswith(P) and "_layers.0." in name]:
        del tensors[name]
    return (
        "18 unknown",
        "18 missing",
        "attention_layers.0.multihead_attn.in_proj_bias",
        "of whose 84 tensors 66 fit",
    )


def odd_width(tensors):
    for name, tensor in original(**{**SMALL, "hidden": 40}).items():
        tensors[name] = tensor
    return "sizes of its tensors do not fit together", "hidden is 40"


def without_head(tensors):
    for name in mapped(tensors):
        del tensors[name]
    return "292 missing", "of whose 292 tensors 0 fit"


def as_panoptic_fpn(tensors):
    tensors.clear()
    tensors |= {
        f"sem_seg_head.{name}": np.ones((8, 8, 1, 1), np.float32)
        for name in ("p2.0.weight", "predictor.weight")
    }
    return (
        "of whose 292 tensors 0 fit",
        "2 unknown (sem_seg_head.p2.0.weight, sem_seg_head.predictor.weight)",
    )


DAMAGES = [
    rename, drop, add, both_queries, transpose, misshape, scalars, integers,
    lose_part_of_a_layer, lose_a_layer, odd_width, without_head, as_panoptic_fpn,
]  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda f: f.__name__)
def test_what_does_not_fit_is_refused_whole(command, damage):
    """Every offender is named, in the source's own names and shapes, none that is none, and nothing
    is written.
    """
    tensors = original(**SMALL)
    offenders = damage(tensors)
    error = refused(
        command(tensors), "source.safetensors is no checkpoint of mask2former", *offenders
    )
    assert f"{E}0.norm1.weight" not in error or "another model" in error


def test_transformers_model_without_its_classes_is_refused(command):
    """`Mask2FormerModel` has no class predictor: both its tensors are missing."""
    ours = converted(command(original(**SMALL)))
    hub = load_file(
        converted(command(ours, "--reverse", "--layout", "transformers", out="hub.safetensors"))
    )
    source = {name: tensor for name, tensor in hub.items() if name.startswith("model.")}
    refused(
        command(source, out="x.safetensors"),
        "2 missing (class_predictor.bias, class_predictor.weight) (nearest layout:"
        " transformers, of",
    )


def test_files_of_jaxdg_that_do_not_fit_are_refused(command, tmp_path):
    """On the way back: offenders by jaxdg's names; a layout that is none, with those there are;
    another model's file.
    """
    out = converted(command(original(**SMALL)))
    refused(
        command(out, "--reverse", "--layout", "timm", out="x.pth"),
        "--layout timm",
        "Mask2Former, Mask2Former-released, transformers",
    )
    tensors = load_file(out)
    tensors["query"] = tensors.pop("query_feat")
    tensors["level_embed"] = tensors["level_embed"][:2]
    save_file(tensors, tmp_path / "amiss.safetensors")
    result = command(tmp_path / "amiss.safetensors", "--reverse", out="x.safetensors")
    refused(
        result,
        "amiss.safetensors",
        "1 missing (query_feat)",
        "1 unexpected (query)",
        "level_embed is (2, 32), not (3, 32)",
    )
    refused(
        command(out, "--reverse", model="augreg_ti16", out="x.pth"),
        "holds the weights of mask2former, not of augreg_ti16",
    )
    with pytest.raises(SystemExit):
        command(original(**SMALL), "--layout", "transformers", out="x.safetensors")


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16], ids=["float16", "bfloat16"])
def test_half_precision_becomes_float32_of_equal_values(command, dtype):
    """Widening is exact for both half formats."""
    half = {name: tensor.astype(dtype) for name, tensor in original(**SMALL).items()}
    back = converted(command(converted(command(half)), "--reverse", out="back.safetensors"))
    assert_identical(
        load_file(back), mapped({name: tensor.astype(np.float32) for name, tensor in half.items()})
    )


def pickle_of(tensors, path, protocol):
    """A file as detectron2 publishes: arrays under "model", in an ordered dict that carries torch's
    notes as an attribute.
    """
    model = OrderedDict(tensors)
    model.__dict__["_metadata"] = OrderedDict({"": {"version": 1}, "sem_seg_head": {"version": 2}})
    path.write_bytes(
        pickle.dumps(
            {"model": model, "__author__": "the authors", "iteration": np.int64(7)},
            protocol=protocol,
        )
    )
    return path


@pytest.mark.parametrize("protocol", range(6))
def test_pickled_arrays_are_read_as_they_are(tmp_path, protocol):
    """Every protocol, both memory orders, both byte orders, other precisions, no dimension, no
    element; also as NumPy 1 named its parts.
    """
    rng = np.random.default_rng(0)
    arrays = {
        kind: rng.standard_normal((3, 4, 5)).astype(kind)
        for kind in ("<f4", ">f4", "<f8", "<f2", "<i8", "|u1", "|b1")
    }
    arrays |= {"fortran": np.asfortranarray(arrays["<f4"]), "strided": arrays["<f4"][:, ::2].T}
    arrays |= {"point": np.float32(3.5).reshape(()), "none": np.ones((0, 4), np.float32)}
    path = pickle_of(arrays, tmp_path / "model.pkl", protocol)
    assert b"numpy" in path.read_bytes()
    for _ in range(2):
        with checkpoint.opened(path) as file:
            got = {name: file.read(name) for name in file.names}
        assert got.keys() == arrays.keys()
        for name, array in arrays.items():
            assert (got[name].dtype, got[name].shape) == (array.dtype, array.shape)
            np.testing.assert_array_equal(got[name], array)
        if protocol < 4:  # later ones note the length of names
            path.write_bytes(path.read_bytes().replace(b"numpy._core.", b"numpy.core."))


def test_released_pickles_convert(command, tmp_path):
    """A file as it is published gives what the same tensors give in safetensors."""
    source = original("static_query", **SMALL)
    expected = load_file(converted(command(source, out="expected.safetensors")))
    assert_identical(
        load_file(converted(command(pickle_of(source, tmp_path / "model_final.pkl", 4)))), expected
    )


def test_pickled_code_is_refused_and_not_run(command, tmp_path):
    """Beside the tensors, in place of one, inside an array of objects, or as NumPy's own loader of
    files: named, and never run.
    """
    for content in (
        {"model": original(**SMALL), "extra": Evil(tmp_path / "ran")},
        {"model": {"x": Evil(tmp_path / "ran")}},
        {"model": {"x": np.array([Evil(tmp_path / "ran")], dtype=object)}},
    ):
        (tmp_path / "evil.pkl").write_bytes(pickle.dumps(content))
        refused(
            command(tmp_path / "evil.pkl"),
            "evil.pkl is refused: it holds pickled code",
            "mkdir",
            "could run anything",
        )
    (tmp_path / "evil.pkl").write_bytes(b"cnumpy\nload\n(V/tmp/x\ntR.")
    refused(command(tmp_path / "evil.pkl"), "evil.pkl is refused", "(numpy.load)")
    (tmp_path / "evil.pkl").write_bytes(b"cbuiltins\neval\n(V1\ntR.")
    refused(command(tmp_path / "evil.pkl"), "evil.pkl is refused", "(builtins.eval)")
    assert not (tmp_path / "ran").exists()


def test_damaged_and_odd_pickles_are_refused(command, tmp_path):
    """Cut, empty, no pickle, arrays of objects or of a wrong length, and what is no state dict: the
    file (and the tensor) is named.
    """
    source = original(**SMALL)
    whole = pickle_of(source, tmp_path / "whole.pkl", 4).read_bytes()
    for name, content in (
        ("cut", whole[: len(whole) // 2]),
        ("empty", b""),
        ("page", b"<html>404</html>"),
    ):
        (tmp_path / f"{name}.pkl").write_bytes(content)
        refused(command(tmp_path / f"{name}.pkl"), f"{name}.pkl cannot be read")
    array = f"{P}decoder_norm.bias"
    path = pickle_of(
        {**source, array: np.array(["a"] * 32, dtype=object)}, tmp_path / "objects.pkl", 4
    )
    refused(command(path), f"objects.pkl cannot be read at {array}", "not of numbers")
    short = pickle.dumps({array: source[array]}, protocol=2).replace(
        b"K \x85", b"K!\x85"
    )  # 33 numbers, bytes of 32
    (tmp_path / "short.pkl").write_bytes(short)
    refused(command(tmp_path / "short.pkl"), f"short.pkl cannot be read at {array}")
    for name, content, words in (
        ("list", [1], "list, no state dict"),
        ("odd", {"epoch": 3}, "no state dict; there is only epoch"),
    ):
        (tmp_path / f"{name}.pkl").write_bytes(pickle.dumps(content))
        refused(command(tmp_path / f"{name}.pkl"), f"{name}.pkl holds", words)
    (tmp_path / "more.pkl").write_bytes(pickle.dumps({**source, "epoch": 3}))
    code, report, _, _ = command(tmp_path / "more.pkl")
    assert code == 0
    assert "no tensors: epoch" in report


def test_torch_files_say_that_they_are_of_today(command, tmp_path):
    """A state dict without module versions counts as old for the original's code, which then
    renames the pixel decoder's tensors away.
    """
    torch = pytest.importorskip("torch")
    source = original(**SMALL)
    torch.save(
        {
            "model": {name: torch.from_numpy(tensor) for name, tensor in source.items()},
            "iteration": 3,
        },
        tmp_path / "final.pth",
    )
    back = converted(
        command(converted(command(tmp_path / "final.pth")), "--reverse", out="back.pth")
    )
    state = torch.load(back, weights_only=True)
    assert_identical({name: tensor.numpy() for name, tensor in state.items()}, mapped(source))
    seen = {}

    class Versioned(torch.nn.Module):
        def _load_from_state_dict(self, state_dict, prefix, local_metadata, *rest):
            seen[prefix] = local_metadata.get("version")

    model = torch.nn.Module()
    head = Versioned()
    model.add_module("sem_seg_head", head)
    head.add_module("predictor", Versioned())
    model.load_state_dict(state, strict=False)
    assert seen == {"sem_seg_head.": 2, "sem_seg_head.predictor.": 2}


def test_the_list_names_it(capsys):
    """With its licence and where it is."""
    assert torch_to_flax.main(["--list"]) == 0
    line = next(
        line for line in capsys.readouterr().out.splitlines() if line.startswith("mask2former ")
    )
    assert "CC-BY-NC-4.0" in line
    assert "facebookresearch/Mask2Former" in line
