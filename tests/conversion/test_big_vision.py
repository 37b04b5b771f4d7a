"""Parameters of plain ViTs exchanged with big_vision: what its model asks for is written, what it
writes is read, and nothing is lost.
"""

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image
import pytest
from safetensors.numpy import load_file

from jaxdg import backbones, weights
from jaxdg.backbones import VitConfig
from jaxdg.conversion import mapping, models, vit
from tests.backbones.drawn import drawn
from tests.conversion.checks import assert_identical, converted, find_shapes_once, refused

TINY = VitConfig(image_size=(20, 20), patch_size=4, width=24, depth=4, heads=2, taps=(0, 1, 2, 3))
LAYOUTS = {layout.name: layout for layout in vit.layouts(TINY)}
NORM = "Transformer/encoder_norm/"


@pytest.fixture(autouse=True, scope="module")
def shapes_found_once():
    """No name changes its meaning between these tests."""
    with pytest.MonkeyPatch.context() as patch:
        find_shapes_once(patch)
        yield


@pytest.fixture(autouse=True)
def tiny(monkeypatch):
    """An encoder of four blocks."""
    monkeypatch.setitem(backbones.ZOO, "tiny", backbones.zoo.Entry(TINY, "made by a test"))


@pytest.fixture
def ours(tmp_path):
    """A jaxdg file of the tiny encoder with drawn weights."""
    tensors = {
        name: drawn(name, shape) for name, shape in weights.shapes(models.abstract("tiny")).items()
    }
    weights.save(tensors, tmp_path / "ours.safetensors", {"model": "tiny"})
    return tmp_path / "ours.safetensors"


@pytest.mark.parametrize("layout", [name for name in LAYOUTS if name.startswith("big_vision")])
def test_what_is_written_is_what_its_model_has(command, ours, golden, layout):
    """Names and shapes are all that big_vision's own model has with `pool_type="tok"` (golden
    file), blocks stacked or numbered.
    """
    code, report, err, out = command(ours, "--reverse", "--layout", layout, out="bv.npz")
    assert (code, err) == (0, "")
    scan = "-scan" in layout
    assert f'pool_type="tok", scan={scan}' in report
    assert "of scale 1 and bias 0" in report
    with np.load(golden / "big_vision.npz") as archive:
        listed = [str(line).split() for line in archive["vit-scan/names" if scan else "vit/names"]]
    prefix = "" if layout.endswith("-bare") else "params/"
    with np.load(out) as written:
        wanted = {
            prefix + name.removeprefix("params/"): tuple(map(int, shape)) for name, *shape in listed
        }
        assert {name: written[name].shape for name in written.files} == wanted
        assert {written[name].dtype for name in written.files} == {np.dtype(np.float32)}
        np.testing.assert_array_equal(written[f"{prefix}{NORM}scale"], 1)
        np.testing.assert_array_equal(written[f"{prefix}{NORM}bias"], 0)


@pytest.mark.parametrize("layout", [name for name in LAYOUTS if name.startswith("big_vision")])
def test_a_round_trip_keeps_all_but_where_the_class_tokens_position_is(command, ours, layout):
    """To big_vision and back every tensor is the same but for the class token, which now holds its
    position; further trips change none.
    """
    bits = {}
    source = ours
    for trip in (1, 2):
        there = converted(command(source, "--reverse", "--layout", layout, out=f"{trip}.npz"))
        source = converted(command(there, out=f"{trip}.safetensors"))
        bits[trip] = load_file(source)
    assert weights.metadata(source)["layout"] == layout
    assert_identical(bits[2], bits[1])
    before = load_file(ours)
    after = bits[1]
    np.testing.assert_array_equal(
        after["cls_token"] + after["pos_embed"][:, :1],
        before["cls_token"] + before["pos_embed"][:, :1],
    )
    np.testing.assert_array_equal(after["pos_embed"][:, 0], 0)
    np.testing.assert_array_equal(after["pos_embed"][:, 1:], before["pos_embed"][:, 1:])
    for name in before.keys() - {"cls_token", "pos_embed"}:
        np.testing.assert_array_equal(after[name], before[name], err_msg=name)


def test_what_big_vision_trained_comes_back_to_it_unchanged(command, ours):
    """Its own file, read and written again: the same tensors, but for those that jaxdg keeps none
    of.
    """
    there = converted(command(ours, "--reverse", "--layout", "big_vision-scan", out="there.npz"))
    with np.load(there) as archive:
        source = dict(archive)
    source[f"params/{NORM}scale"] = drawn("norm", (24,))
    source |= {
        "params/head/kernel": np.ones((24, 7), np.float32),
        "params/head/bias": np.ones(7, np.float32),
    }
    np.savez(there, **source)
    code, report, err, read = command(there)
    assert (code, err) == (0, "")
    assert "final norm and classifier" in report
    back = dict(
        np.load(
            converted(command(read, "--reverse", "--layout", "big_vision-scan", out="back.npz"))
        )
    )
    kept = {
        name: tensor
        for name, tensor in source.items()
        if "encoder_norm" not in name and "/head/" not in name
    }
    assert_identical(
        {name: tensor for name, tensor in back.items() if "encoder_norm" not in name}, kept
    )


def test_older_files_whose_positions_count_the_class_token_are_read(command, ours):
    """As big_vision's loader does it, the number of positions tells: one more than a square has the
    class token's.
    """
    there = converted(command(ours, "--reverse", "--layout", "big_vision", out="there.npz"))
    with np.load(there) as archive:
        source = dict(archive)
    stored = load_file(ours)
    source |= {"params/pos_embedding": stored["pos_embed"], "params/cls": stored["cls_token"]}
    np.savez(there, **source)
    assert_identical(load_file(converted(command(there))), stored)


def test_what_does_not_fit_is_refused_whole(command, ours, tmp_path):
    """A dropped and an extra tensor, half the blocks, transposed and misshapen ones, object arrays:
    every offender is named.
    """
    with np.load(
        converted(command(ours, "--reverse", "--layout", "big_vision", out="there.npz"))
    ) as archive:
        source = dict(archive)
    block = "params/Transformer/encoderblock_2/"

    def attempt(tensors, *offenders):
        np.savez(tmp_path / "bad.npz", **tensors)
        refused(command(tmp_path / "bad.npz"), *offenders)

    attempt(
        {k: v for k, v in source.items() if k != "params/cls"}
        | {"params/mask": source["params/cls"]},
        "1 missing (params/cls)",
        "/mask",
    )
    attempt(
        {k: v for k, v in source.items() if not k.startswith((block, block.replace("2", "3")))},
        "32 missing",
        f"{block}LayerNorm_1/bias",
    )
    name = f"{block}MultiHeadDotProductAttention_0/query/kernel"
    attempt(
        source | {name: source[name].reshape(24, 3, 8)}, f"{name} is (24, 3, 8), not (24, 2, 12)"
    )
    attempt(
        source | {"params/pos_embedding": np.ones(25, np.float32)},
        "params/pos_embedding is (25,), not (1, 25, 24)",
    )
    attempt(
        source | {"params/pos_embedding": np.ones((1, 24, 24), np.float32)},
        "params/pos_embedding is (1, 24, 24), not (1, 25, 24)",
    )
    attempt(
        source | {"params/cls": np.array([None], object)},
        "bad.npz is refused: it holds pickled code",
    )


def test_a_table_may_not_use_a_stacked_tensor_twice():
    """Two kinds of blocks made of one source tensor is an error of the table, as it is with one
    tensor a block.
    """
    layout = LAYOUTS["big_vision-scan"]
    scale = next(row for row in layout.rows if row.target == "blocks.*.norm1.scale")
    rows = tuple(
        row._replace(source=scale.source) if row.target == "blocks.*.norm2.scale" else row
        for row in layout.rows
    )
    with pytest.raises(
        ValueError,
        match=(
            r"uses params/Transformer/encoderblock/LayerNorm_0/scale for both"
            r" blocks.\*.norm[12].scale and"
        ),
    ):
        mapping.source_shapes(models.abstract("tiny"), layout._replace(rows=rows))


def as_augreg(timm):
    """The tensors of timm's ViT-Ti under the names and axes of an AugReg `.npz`, written out by
    hand.
    """
    tensors = {
        "cls": timm["cls_token"],
        "Transformer/posembed_input/pos_embedding": timm["pos_embed"],
    }
    tensors |= {
        "embedding/kernel": timm["patch_embed.proj.weight"].transpose(2, 3, 1, 0),
        "embedding/bias": timm["patch_embed.proj.bias"],
    }
    tensors |= {"head/kernel": timm["head.weight"].T, "head/bias": timm["head.bias"]}
    tensors |= {
        "Transformer/encoder_norm/scale": timm["norm.weight"],
        "Transformer/encoder_norm/bias": timm["norm.bias"],
    }
    for i in range(12):
        ours = f"blocks.{i}."
        theirs = f"Transformer/encoderblock_{i}/"
        attention = f"{theirs}MultiHeadDotProductAttention_1/"
        for k, part in enumerate(("query", "key", "value")):
            rows = slice(192 * k, 192 * (k + 1))
            tensors[f"{attention}{part}/kernel"] = timm[f"{ours}attn.qkv.weight"][rows].T.reshape(
                192, 3, 64
            )
            tensors[f"{attention}{part}/bias"] = timm[f"{ours}attn.qkv.bias"][rows].reshape(3, 64)
        tensors[f"{attention}out/kernel"] = timm[f"{ours}attn.proj.weight"].T.reshape(3, 64, 192)
        tensors[f"{attention}out/bias"] = timm[f"{ours}attn.proj.bias"]
        for here, there in (("mlp.fc1", "MlpBlock_3/Dense_0"), ("mlp.fc2", "MlpBlock_3/Dense_1")):
            tensors |= {
                f"{theirs}{there}/kernel": timm[f"{ours}{here}.weight"].T,
                f"{theirs}{there}/bias": timm[f"{ours}{here}.bias"],
            }
        for here, there in (("norm1", "LayerNorm_0"), ("norm2", "LayerNorm_2")):
            tensors |= {
                f"{theirs}{there}/scale": timm[f"{ours}{here}.weight"],
                f"{theirs}{there}/bias": timm[f"{ours}{here}.bias"],
            }
    return tensors


def test_the_real_weights_give_the_same_features_from_every_layout(
    command, weights_path, data_path, golden, tmp_path
):
    """The pre-trained ViT-Ti from timm's file, from an AugReg `.npz` of it and from big_vision's
    files, and after each way back.
    """
    timm = weights_path("vit_tiny_patch16_224.safetensors")
    give = {"model": "augreg_ti16"}
    own = converted(command(timm, **give, out="own.safetensors"))
    np.savez(tmp_path / "augreg.npz", **as_augreg(load_file(timm)))
    assert_identical(
        load_file(converted(command(tmp_path / "augreg.npz", **give, out="augreg.safetensors"))),
        load_file(own),
    )
    back = {}
    for layout in ("AugReg npz", "big_vision", "big_vision-scan"):
        there = converted(
            command(own, "--reverse", "--layout", layout, **give, out=f"{layout}.npz")
        )
        back[layout] = converted(command(there, **give, out=f"{layout}.safetensors"))
    assert_identical(load_file(back["AugReg npz"]), load_file(own))
    assert_identical(load_file(back["big_vision-scan"]), load_file(back["big_vision"]))
    again = converted(command(back["big_vision"], "--reverse", **give, out="timm.safetensors"))
    assert_identical(
        load_file(converted(command(again, **give, out="again.safetensors"))),
        load_file(back["big_vision"]),
    )

    pixels = np.asarray(Image.open(data_path("camvid") / "test" / "Seq05VD_f00000.jpg"))[
        68:292, 128:352
    ]
    images = jnp.asarray((pixels[None] / np.float32(255) - np.float32(0.5)) / np.float32(0.5))
    with np.load(golden / "vit_tiny_logits.npz") as archive:
        blocks = archive["blocks"].tolist()
        norms = archive["norms"]
    # Two sets of tensors are left: as timm has them, and with the class token's position in that
    # token.
    encoders = [
        nnx.split(backbones.create("augreg_ti16", weights=path, taps=blocks))
        for path in (own, back["big_vision"])
    ]
    tokens = jax.jit(lambda state: nnx.merge(encoders[0][0], state).tokens(images))
    expected, got = (tokens(state) for _, state in encoders)
    np.testing.assert_allclose(np.linalg.norm(np.concatenate(expected), axis=-1), norms, rtol=1e-5)
    for a, b in zip(got, expected, strict=True):
        np.testing.assert_array_equal(a, b)
