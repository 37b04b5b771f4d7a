"""Released models of tqdm: the same numbers and class maps as by their authors' code, a workdir
that opens, and what is refused.

The golden files are made by tests/oracles/golden_released_tqdm.py.
"""

import dataclasses
import json
from typing import Any

from flax import nnx
import jax
import numpy as np
import pytest
from safetensors.numpy import save_file

import jaxdg
from jaxdg import backbones, weights
from jaxdg import config as config_lib
from jaxdg.conversion import checkpoint, convert, mapping, tqdm, vltseg
from jaxdg.segmentation.tqdm.head import name_ids
from jaxdg.tasks.run_state import stored_tensors
from jaxdg.text.clip_text import TEXT_TOWERS, ProjectionConfig
from tests.conversion import released as r
from tests.conversion.checks import make_models_once, refuses
from tests.conversion.torch_files import torch_file

KINDS = dict(zip(("eva", "clip"), tqdm.ENCODERS, strict=True))
PUBLISHED: dict[str, Any] = {
    name: (backbones.ZOO[name], TEXT_TOWERS[f"{name}_text"]) for name in tqdm.ENCODERS
}
ABSTRACT = vltseg.abstract


@pytest.fixture(scope="module")
def golden_of(golden):
    """Outputs of the authors' code, by kind."""
    found = {}
    for kind in KINDS:
        with np.load(golden / f"released_tqdm_{kind}.npz") as archive:
            found[kind] = dict(archive)
    return found


@pytest.fixture(scope="module")
def files(golden_of):
    """The saved models: drawn numbers but for the last biases."""
    found = {}
    for kind, theirs in golden_of.items():
        own = {name: r.drawn(name, shape) for name, shape in r.named_shapes(theirs, "").items()}
        own |= {
            name.removeprefix("balanced/"): bias
            for name, bias in theirs.items()
            if name.startswith("balanced/")
        }
        found[kind] = own
    return found


@pytest.fixture(scope="module")
def tiny():
    """Towers of the golden files' size in the places of the published ones."""
    with pytest.MonkeyPatch.context() as patch:
        for name, (entry, tower) in PUBLISHED.items():
            config = dataclasses.replace(entry.config, width=r.WIDTH, heads=r.HEADS)
            config = dataclasses.replace(config, depth=r.TQDM_DEPTH, taps=r.TQDM_TAPS)
            patch.setitem(backbones.ZOO, name, dataclasses.replace(entry, config=config))
            text = dataclasses.replace(
                tower,
                width=r.TEXT_WIDTH,
                heads=r.TEXT_HEADS,
                embedding=r.EMBEDDING,
                depth=r.TEXT_DEPTH,
                image_projection=dataclasses.replace(
                    tower.image_projection, width=r.WIDTH, embedding=r.EMBEDDING
                ),
            )
            assert isinstance(text.image_projection, ProjectionConfig)
            patch.setitem(TEXT_TOWERS, f"{name}_text", text)
        patch.setattr(tqdm, "CROP", r.TQDM_WINDOW)
        make_models_once(patch)
        yield


@pytest.fixture(scope="module")
def workdirs(files, tiny, tmp_path_factory):
    """What the command makes of each, without saying what model it is; one of them is a file as
    mmcv's training saves it.
    """
    folder = tmp_path_factory.mktemp("released")
    save_file(files["eva"], folder / "eva.safetensors")
    saved = {"meta": {"iter": 20_000}, "state_dict": files["clip"], "optimizer": {"state": {}}}
    path = torch_file(folder / "clip.pth", saved)
    for out, *command in (
        ("eva", "--checkpoint", str(folder / "eva.safetensors")),
        ("clip", "--checkpoint", str(path), "--source", "cityscapes"),
    ):
        assert convert.main([*command, "--out", str(folder / out)]) == 0
    return folder


@pytest.mark.parametrize("kind", KINDS)
def test_a_window_gets_the_numbers_of_the_authors_code(kind, golden_of, workdirs):
    """Queries, class logits, mask logits of up to 15 and class scores within 1e-4, and every
    pixel's class but for one in a thousand, where two scores are equal within rounding.
    """
    theirs = golden_of[kind]
    model: Any = vltseg.abstract(config_lib.load(workdirs / kind))
    weights.fill(model, stored_tensors(workdirs / kind), "workdir")
    graph, state = nnx.split(model)
    config: Any = backbones.entry(KINDS[kind]).config
    image = r.picture(r.TQDM_WINDOW, r.TQDM_WINDOW)[None].astype(np.float32) / 255
    image = (image - np.float32(config.mean)) / np.float32(config.std)

    @jax.jit
    def run(state, image):
        model: Any = nnx.merge(graph, state)
        output = model(image)
        scores = model.head.scores(output, (r.TQDM_WINDOW, r.TQDM_WINDOW))
        return output.texts, *output, scores

    texts, class_logits, mask_logits, scores = run(state, image)
    np.testing.assert_allclose(texts[0], theirs["texts"], atol=1e-4)
    np.testing.assert_allclose(class_logits[-1, 0], theirs["class_logits"], atol=1e-4)
    np.testing.assert_allclose(mask_logits[-1, 0], theirs["mask_logits"], atol=1e-4)
    few = np.moveaxis(scores[0], -1, 0)[:, ::8, ::8]
    np.testing.assert_allclose(few, theirs["scores"], atol=1e-4)
    same = np.argmax(scores[0], axis=-1) == theirs["window/label"]
    assert same.mean() > 1 - 1e-3


@pytest.mark.parametrize("kind", KINDS)
def test_what_their_code_computes_at_every_start_is_computed_once(kind, golden_of, files, workdirs):
    """The embeddings that queries stay near within 1e-5; the rows of the names from the table."""
    stored = stored_tensors(workdirs / kind)
    np.testing.assert_allclose(stored["head.text.anchors"], golden_of[kind]["anchors"], atol=1e-5)
    ids = golden_of[kind]["ids"]
    names = tqdm.class_names(config_lib.load(workdirs / kind))
    own = name_ids(names)
    np.testing.assert_array_equal(ids[:, : own.shape[1]], own)
    assert not ids[:, own.shape[1] :].any()
    table = files[kind][tqdm.TABLE]
    np.testing.assert_array_equal(stored["head.text.tokens"], table[own])


def test_the_workdir_opens_and_gives_their_class_map(golden_of, workdirs):
    """`jaxdg.load` and windows with overlap, on a picture larger than the window: all but a
    thousandth of the pixels.
    """
    model = jaxdg.load(workdirs / "eva")
    assert model.step == 20_000
    same = model.predict(r.picture(*r.PICTURE)) == golden_of["eva"]["picture/label"]
    assert same.mean() > 1 - 1e-3


@pytest.mark.parametrize("kind", KINDS)
def test_the_workdir_says_what_run_it_is_and_what_was_left_out(kind, workdirs):
    """Sizes come from the tensors, what it was trained on from the command."""
    config = config_lib.load(workdirs / kind)
    m, o = config.model, config.model.tqdm
    assert (m.encoder, m.decoder, m.pyramid, m.taps) == (KINDS[kind], "tqdm", "batch", ())
    assert (o.hidden, o.layers, o.pixel_layers, o.ffn) == (64, r.LAYERS, r.PIXEL_LAYERS, r.FFN)
    assert (o.pixel_ffn, o.context_width, o.context_layers) == (r.PIXEL_FFN, r.CONTEXT_WIDTH, 2)
    assert o.contexts == (8 if kind == "eva" else 5)
    assert config.data.source == ("gta5" if kind == "eva" else "cityscapes")
    assert config.evaluation.protocol == "tqdm"
    assert config.evaluation.stride == (r.TQDM_STRIDE, r.TQDM_STRIDE)
    about = json.loads((workdirs / kind / "conversion.json").read_text())
    assert about["model"] == "tqdm"
    roots = {name.split(".")[0] for name in about["left_out"]}
    assert roots == {"reg_E0", "backbone"}
    assert set(about["left_out"].values()) <= {tqdm.BEFORE, tqdm.eva02.ROPE, vltseg.COUNT}


@pytest.mark.parametrize("kind", KINDS)
def test_a_file_of_the_published_size_fits(kind, golden_of, monkeypatch):
    """All tensors by the names and shapes that the authors' code has in full are mapped, or left
    out for a reason; a run of the published sizes comes out.
    """
    name = KINDS[kind]
    entry, tower = PUBLISHED[name]
    monkeypatch.setitem(backbones.ZOO, name, entry)
    monkeypatch.setitem(TEXT_TOWERS, f"{name}_text", tower)
    monkeypatch.setattr(tqdm, "CROP", 512)
    shapes = r.named_shapes(golden_of[kind], "published/")
    file = checkpoint.Checkpoint(
        list(shapes), lambda name: np.broadcast_to(np.float32(0), shapes[name])
    )
    run = tqdm.of_checkpoint(file)
    ours = vltseg.recipe("gta5_methods", f"tqdm,{name}")
    assert run.model.tqdm == dataclasses.replace(
        ours.model.tqdm, contexts=8 if kind == "eva" else 5
    )
    assert run.evaluation.stride == (341, 341)
    layout = tqdm.of_run(run, file)
    expected = mapping.source_shapes(ABSTRACT(run), layout)
    assert expected.pop(tqdm.ANCHORS) == (19, tower.embedding)
    left = {key for key in shapes if key not in expected}
    assert {key.split(".")[0] for key in left} == {"backbone", "reg_E0"}
    assert all(key.startswith("reg_E0.") or "rope" in key or "batches" in key for key in left)
    assert expected == {key: shape for key, shape in shapes.items() if key not in left}


@pytest.mark.parametrize("kind", KINDS)
def test_what_does_not_fit_is_refused_by_name(kind, files, workdirs, tmp_path, capsys):
    """Renamed, missing, foreign and misshapen tensors in every part; nothing is written."""
    damaged = dict(files[kind])
    renamed = "text_encoder.transformer.resblocks.1.mlp.c_fc.bias"
    damaged[f"{renamed}es"] = damaged.pop(renamed)
    missing = "context_decoder.decoder.1.cross_attn.proj.bias"
    del damaged[missing]
    damaged["decode_head.query_feat.weight"] = np.ones((19, r.HIDDEN), np.float32)
    damaged[tqdm.TABLE] = damaged[tqdm.TABLE][:-1]
    save_file(damaged, tmp_path / "file.safetensors")
    refused(
        ["--model", "tqdm", "--checkpoint", str(tmp_path / "file.safetensors")],
        tmp_path / "out",
        capsys,
        "file.safetensors is no checkpoint of tqdm",
        "2 unknown (decode_head.query_feat.weight",
        f"{renamed}es",
        "2 missing (",
        renamed,
        missing,
        f"{tqdm.TABLE} is (49407, {r.TEXT_WIDTH}), not (49408, {r.TEXT_WIDTH})",
    )


def test_files_of_other_runs_are_refused(files, workdirs, tmp_path, capsys):
    """Positions of another crop, too few for a name in its context, none; a source without a
    recipe, and an option of other models.
    """
    for name, tensor, told in (
        ("backbone.pos_embed", np.zeros((1, 50, r.WIDTH), np.float32), "has 50 rows, not 37"),
        (
            tqdm.ROWS,
            np.zeros((11, r.TEXT_WIDTH), np.float32),
            "has 11 rows, not 12 or more for 8 tokens",
        ),
        ("contexts", None, "1 missing (contexts)"),
    ):
        changed = {key: value for key, value in files["eva"].items() if key != name}
        changed |= {} if tensor is None else {name: tensor}
        save_file(changed, tmp_path / "file.safetensors")
        command = ["--model", "tqdm", "--checkpoint", str(tmp_path / "file.safetensors")]
        refused(command, tmp_path / "out", capsys, told)
    command = ["--checkpoint", str(workdirs / "eva.safetensors")]
    refused([*command, "--source", "acdc"], tmp_path / "out", capsys, "SOURCE of gta5,")
    refused([*command, "--crop", "512"], tmp_path / "out", capsys, "--encoder and --crop are for")


def refused(arguments, out, capsys, *offenders):
    """One line on stderr that names every offender, exit code 1, nothing written."""
    refuses(convert.main, [*arguments, "--out", str(out)], capsys, *offenders)
    assert not out.exists()
