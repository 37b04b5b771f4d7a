"""What holds for the files of every encoder in the zoo, in each layout: what does not fit is
refused whole, what fits comes back.

Cases are derived from the zoo: each architecture at a small size (variants that differ in size
alone are one), each of its layouts, and a file with exactly the tensors that the layout says.
"""

import functools
import hashlib
import json
import re

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from jaxdg import backbones
from jaxdg.conversion import mapping, models
from tests.conversion.checks import assert_identical, converted, find_shapes_once, kinds, refused
from tests.small_zoo import DEPTH, reduced


def published():
    """Layout names by encoder, one encoder for each architecture of which checkpoints are published
    and converted; for Stable Diffusion, which takes longer to make, see test_latent_diffusion.py.
    """
    seen = set()
    found = {}
    for name, entry in backbones.ZOO.items():
        try:
            layouts = models.layouts(name)
        except ValueError:  # trained from scratch, or for planning
            continue
        small = reduced(entry.config)
        if small not in seen and not isinstance(small, backbones.LatentDiffusionConfig):
            seen.add(small)
            found[name] = tuple(layout.name for layout in layouts)
    return found


LAYOUTS = published()
every_layout = pytest.mark.parametrize(
    ("name", "layout"), [(name, layout) for name, layouts in LAYOUTS.items() for layout in layouts]
)


@pytest.fixture(autouse=True, scope="module")
def small():
    """The zoo at small sizes, and with half the blocks under the names `half_..`; shapes are found
    once, which only saves time.
    """
    with pytest.MonkeyPatch.context() as patch:
        for name in LAYOUTS:
            config = backbones.ZOO[name].config
            for key, depth in ((name, DEPTH), (f"half_{name}", DEPTH // 2)):
                patch.setitem(
                    backbones.ZOO,
                    key,
                    backbones.zoo.Entry(reduced(config, depth), "made by a test", "none", 1),
                )
        find_shapes_once(patch)
        patch.setattr(models, "converted_encoders", lambda: list(LAYOUTS))
        patch.setattr(models, "_best", once_a_file(models._best))
        yield


def once_a_file(best):
    """`models._best`, which is the same for files of the same bytes, found once for each."""
    found = {}

    def remembered(file):
        content = b"".join(path.read_bytes() for path in file.files)
        key = (hashlib.sha256(content).digest(), *file.names, file.wanted, *file.outside)
        if key not in found:
            found[key] = best(file)
        return found[key]

    return remembered


@functools.cache
def shapes(name, layout):
    """Every tensor of a file of `name` in this layout."""
    table = next(known for known in models.layouts(name) if known.name == layout)
    return mapping.source_shapes(models.abstract(name), table)


def file(name, layout):
    """Random tensors of such a file, in a dictionary of their own."""
    return dict(drawn(name, layout))


@functools.cache
def drawn(name, layout):
    """The same tensors at every call."""
    rng = np.random.default_rng(0)
    tensors = {
        key: rng.standard_normal(shape).astype(np.float32)
        for key, shape in shapes(name, layout).items()
    }
    for key in tensors:
        if key.endswith(".bias_mask"):  # of DINOv3, whose keys have no bias
            tensors[key] = np.repeat(np.float32([1, 0, 1]), len(tensors[key]) // 3)
            tensors[key.removesuffix("_mask")] *= tensors[key]
    return tensors


def named(error, names):
    """Those of `names` that an error speaks of."""
    return set(re.split(r"[\s,;()]+", error)) & set(names)


@every_layout
def test_files_come_back_bit_by_bit(command, name, layout):
    """A file of exactly these tensors is taken as of this layout; --reverse gives them again, and
    what it adds changes nothing.
    """
    source = file(name, layout)
    code, report, err, out = command(source, model=name)
    assert (code, err) == (0, "")
    taken = re.search(r"\(layout: (.+)\)", report)[1]
    assert shapes(name, taken) == shapes(name, layout), (
        "layouts may share all names, as some do for some variants"
    )
    _, _, err, back = command(
        out, "--reverse", "--layout", layout, model=name, out="back.safetensors"
    )
    assert err == ""
    returned = load_file(back)
    assert_identical({key: returned[key] for key in source}, source)
    assert_identical(
        load_file(converted(command(back, model=name, out="again.safetensors"))), load_file(out)
    )


@every_layout
@pytest.mark.parametrize(
    "misshape",
    [np.transpose, np.ravel, lambda tensor: tensor[None]],
    ids=["transposed", "flattened", "wrapped"],
)
def test_what_does_not_fit_is_refused_whole(command, name, layout, misshape):
    """One tensor dropped, one added, all others misshapen that this changes: one line tells these
    by kind, and nothing is written.
    """
    source = file(name, layout)
    keys = sorted(source)
    dropped = keys[len(keys) // 2]
    added = f"{keys[len(keys) // 3]}_2"
    was = source.pop(dropped)
    misshapen = {
        key: np.array(misshape(tensor))
        for key, tensor in source.items()
        if misshape(tensor).shape != tensor.shape
    }
    assert len(misshapen) > DEPTH
    error = refused(
        command(source | misshapen | {added: was}, model=name),
        f"source.safetensors is no checkpoint of {name}",
        f"1 unknown ({added})",
        f"1 missing ({dropped})",
        f"{len(misshapen)} of another shape",
    )
    said = {
        f"{key} is {tensor.shape}, not {source[key].shape}" for key, tensor in misshapen.items()
    }
    assert any(phrase in error for phrase in kinds(said) | said)
    offenders = {dropped, added, *misshapen}
    assert named(error, source) <= offenders, "only offenders"
    assert named(error, kinds(source) - set(source)) <= kinds(misshapen)


@every_layout
def test_half_the_blocks_are_refused(command, name, layout):
    """A file of the same architecture with half the blocks: the tensors of the others are told by
    kind, or those that stack too few.
    """
    half = shapes(f"half_{name}", layout)
    whole = shapes(name, layout)
    assert half.keys() <= whole.keys()
    offenders = {key for key in whole if half.get(key) != whole[key]}
    error = refused(command(file(f"half_{name}", layout), model=name), f"{len(offenders)} ")
    assert named(error, kinds(whole) | whole.keys())
    assert named(error, kinds(whole) | whole.keys()) <= kinds(offenders) | offenders
    missing = whole.keys() - half.keys()
    assert not missing or f"{len(missing)} missing" in error


@pytest.mark.parametrize("name", LAYOUTS)
def test_files_of_other_families_are_refused(command, name):
    """The file that each other family is published in is refused in one line that tells the nearest
    layout and how much of it fits.
    """
    kind = type(backbones.ZOO[name].config)
    for other, (layout, *_) in LAYOUTS.items():
        given = shapes(other, layout)
        # Tensors alone do not tell a MoCo-v3 in timm's layout from a plain vision transformer.
        if type(backbones.ZOO[other].config) is kind or any(
            shapes(name, known) == given for known in LAYOUTS[name]
        ):
            continue
        error = refused(
            command(file(other, layout), model=name, out=f"{other}.safetensors"),
            f"is no checkpoint of {name}",
        )
        if (
            "its names are those of" in error
        ):  # and would fit by others: the base encoder of MoCo-v3 is a plain vision transformer
            assert other in named(error, LAYOUTS)
            continue
        best, total, fit = re.search(
            r"\(nearest layout: (.+), of whose (\d+) tensors (\d+) fit", error
        ).groups()
        expected = shapes(name, best)
        assert int(total) == len(expected)
        assert int(fit) <= int(total)


LIES = {
    "a tensor past the end": lambda header: header["b"]["data_offsets"].__setitem__(1, 4_000),
    "fewer bytes than the shape has": lambda header: header["b"].update(shape=[3, 400]),
    "more bytes than the shape has": lambda header: header["b"].update(shape=[1]),
    "tensors that overlap": lambda header: header["b"].update(data_offsets=[0, 24]),
    "a hole": lambda header: header.pop("a"),
    "offsets backwards": lambda header: header["b"].update(data_offsets=[32, 8]),
    "a negative side": lambda header: header["b"].update(shape=[-2, -3]),
    "a product past 64 bits": lambda header: header["b"].update(shape=[2**32, 2**32, 6]),
    "a type that is none": lambda header: header["b"].update(dtype="F33"),
}


@pytest.mark.parametrize(
    "what", [*LIES, "a header longer than the file", "a header longer than anything"]
)
def test_a_safetensors_header_that_lies_is_refused(command, tmp_path, what):
    """Sizes in the header that the file does not have: refused in one line that names it, by
    conversion, on the way back and by load.
    """
    save_file(
        {"a": np.ones(2, np.float32), "b": np.ones((2, 3), np.float32)},
        tmp_path / "honest.safetensors",
    )
    honest = (tmp_path / "honest.safetensors").read_bytes()
    length = int.from_bytes(honest[:8], "little")
    if what in LIES:
        header = json.loads(honest[8 : 8 + length])
        LIES[what](header)
        text = json.dumps(header).encode()
        lying = len(text).to_bytes(8, "little") + text + honest[8 + length :]
    else:
        lying = (len(honest) if "file" in what else 2**63).to_bytes(8, "little") + honest[8:]
    path = tmp_path / "lying.safetensors"
    path.write_bytes(lying)
    name = next(iter(LAYOUTS))
    refused(command(path, model=name), f"{path} cannot be read")
    refused(
        command(path, "--reverse", model=name, out="back.safetensors"),
        f"{path} is no readable safetensors file",
    )
    with pytest.raises(
        ValueError, match=r"lying.safetensors is no readable safetensors file"
    ) as caught:
        backbones.create(name, weights=path)
    assert "\n" not in str(caught.value)


# Encoders that share all tensors in some layout; at full size positions tell the last two apart.
TWINS = (
    {"clip_l14", "clip_l14_gelu"},
    {"augreg_ti16", "mocov3_b16"},
    {"eva02_l14", "eva02_clip_l14_vltseg_repro"},
)


@every_layout
def test_without_a_name_the_tensors_tell(command, monkeypatch, name, layout):
    """--model left out: the file is taken for its encoder; where two encoders share all tensors,
    both are named and nothing is written.
    """
    monkeypatch.setattr(
        backbones, "ZOO", {key: entry for key, entry in backbones.ZOO.items() if key in LAYOUTS}
    )
    result = command(file(name, layout), model=None)
    if result[0] == 0:
        assert result[1].startswith(f"{name} from source.safetensors")
    else:
        error = refused(result, "say with --model which of them it is")
        assert next(twins for twins in TWINS if name in twins) == named(error, LAYOUTS)


def test_what_no_table_knows_is_refused_without_a_name(command):
    """A file of another model altogether: one line says so."""
    refused(
        command({"conv.weight": np.zeros((2, 3), np.float32)}, model=None),
        "no model that --list shows",
    )
