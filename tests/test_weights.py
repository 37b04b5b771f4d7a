"""Names of parameters do not depend on how blocks are stacked, and files that do not fit are told
apart by name.
"""

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import save_file

from jaxdg import weights
from jaxdg.backbones import Pyramid, Vit, VitConfig


def encoder(taps, boundaries=()):
    """A small abstract encoder of 13 blocks: past ten, the order of names and of numbers part."""
    config = VitConfig(
        image_size=(8, 8),
        patch_size=4,
        width=8,
        depth=13,
        heads=2,
        taps=taps,
        boundaries=boundaries,
    )
    return nnx.eval_shape(lambda: Vit(config, rngs=nnx.Rngs(0)))


def numbered(taps, boundaries):
    """An encoder each of whose blocks holds its own number everywhere, plus a hundredth for each
    kind of parameter: 7.03 is block 7.
    """
    module = encoder(taps, boundaries)
    kinds = sorted({path[-2:] for path, _ in nnx.to_flat_state(nnx.state(module, nnx.Param))})
    for path, variable in nnx.to_flat_state(nnx.state(module, nnx.Param)):
        value = np.full(variable.shape, kinds.index(path[-2:]) / 100, np.float32)
        if "segments" in path:
            first = int(path[path.index("segments") + 1])
            assert first in (
                0,
                *(end + 1 for end in module.blocks.ends),
            ), "a segment is called by its first block"
            value += first + np.arange(len(value), dtype=np.float32).reshape(
                -1, *[1] * (value.ndim - 1)
            )
        variable.set_value(jnp.asarray(value))
    return module


CUTS = [((12,), ()), ((2, 5, 12), ()), ((0, 11, 12), (4,)), (tuple(range(13)), ())]


@pytest.mark.parametrize(("taps", "boundaries"), CUTS)
def test_names_and_shapes_do_not_depend_on_segments(taps, boundaries):
    """All cuts of the stack speak of the same tensors, one name a block, also past block 9."""
    shapes = weights.shapes(encoder(taps, boundaries))
    assert shapes == weights.shapes(encoder((12,)))
    assert len(shapes) == 4 + 13 * 12
    assert shapes["blocks.10.attn.qkv.kernel"] == (8, 24)
    assert shapes["pos_embed"] == (1, 5, 8)
    assert not any("segments" in name for name in shapes)


@pytest.mark.parametrize(("taps", "boundaries"), CUTS)
def test_slots_point_at_the_right_layer(taps, boundaries):
    """Following a slot by hand finds the numbers that were put into that block."""
    module = numbered(taps, boundaries)
    flat = dict(nnx.to_flat_state(nnx.state(module, nnx.Param)))
    found = weights.tensors(module)
    slots = weights.slots(nnx.state(module, nnx.Param))
    for block in (0, 3, 9, 10, 12):
        path, layer, stack = slots[f"blocks.{block}.mlp.fc2.bias"]
        assert stack == "blocks"
        assert path[-2:] == ("fc2", "bias")
        value = np.asarray(flat[path][...])[layer]
        assert {int(v) for v in value} == {block}
        np.testing.assert_array_equal(found[f"blocks.{block}.mlp.fc2.bias"], value)
    assert slots["cls_token"] == weights.Slot(("cls_token",))


@pytest.mark.parametrize(("taps", "boundaries"), CUTS)
def test_factors_land_on_their_layer(taps, boundaries):
    """A factor tree times the parameters scales each named tensor by its own factor, whatever the
    cut.
    """
    module = numbered(taps, boundaries)
    before = {name: tensor.copy() for name, tensor in weights.tensors(module).items()}

    def factor(name):
        block = int(name.split(".")[1]) if name.startswith("blocks.") else -5
        return 1 + block * 0.5 + (100 if name.endswith("kernel") else 0)

    state = nnx.state(module, nnx.Param)
    factors = weights.tree_by_name(state, factor)
    assert jax.tree.structure(factors) == jax.tree.structure(state)
    assert {leaf.dtype for leaf in jax.tree.leaves(factors)} == {np.dtype(np.float32)}
    nnx.update(module, jax.tree.map(lambda p, f: p * f, state, factors))
    for name, tensor in weights.tensors(module).items():
        np.testing.assert_allclose(tensor, before[name] * factor(name), rtol=1e-6, err_msg=name)


def test_statistics_are_stored_and_named_too(tmp_path):
    """BatchNorm's running statistics are part of a weights file."""
    shapes = weights.shapes(nnx.eval_shape(lambda: Pyramid(4, "batch", rngs=nnx.Rngs(0))))
    assert {"fpn1_norm.mean", "fpn1_norm.var", "fpn1_norm.scale", "fpn1_norm.bias"} <= shapes.keys()
    first, second = (Pyramid(4, "batch", rngs=nnx.Rngs(seed)) for seed in (0, 1))
    first.fpn1_norm.mean[...] = jnp.arange(4.0)
    weights.save(weights.tensors(first), tmp_path / "p.safetensors", {})
    weights.load(second, tmp_path / "p.safetensors")
    for name, tensor in weights.tensors(second).items():
        np.testing.assert_array_equal(tensor, weights.tensors(first)[name], err_msg=name)


def test_mismatches_name_every_offender():
    """One phrase for each kind of offence with all names in it, and none where everything fits."""
    wanted = {"a": (1, 2), "b": (3,), "c": (4,), "d": ()}
    assert weights.mismatches(wanted, dict(wanted)) == []
    assert weights.mismatches(
        wanted, {"a": (2, 1), "b": (3,), "y": (1,), "x": (1,), "d": (1,)}
    ) == [
        "1 missing (c)",
        "2 unexpected (x, y)",
        "2 of another shape (a is (2, 1), not (1, 2), d is (1,), not ())",
    ]


def test_load_keeps_placement(tmp_path):
    """Parameters that are spread over devices stay where they are."""
    mesh = jax.make_mesh((8,), ("fsdp",), axis_types=(jax.sharding.AxisType.Auto,))
    spread = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(None, None, None, "fsdp"))
    pyramid = Pyramid(8, rngs=nnx.Rngs(0))
    pyramid.fpn2.kernel.set_value(jax.device_put(pyramid.fpn2.kernel.get_value(), spread))
    weights.save(weights.tensors(Pyramid(8, rngs=nnx.Rngs(1))), tmp_path / "p.safetensors", {})
    weights.load(pyramid, tmp_path / "p.safetensors")
    kernel = pyramid.fpn2.kernel.get_value()
    assert kernel.sharding == spread
    np.testing.assert_array_equal(kernel, weights.read(tmp_path / "p.safetensors")["fpn2.kernel"])


def test_unreadable_files_are_named(tmp_path):
    """An absent file says how to make one; a cut one says that it is damaged."""
    pyramid = Pyramid(4, rngs=nnx.Rngs(0))
    with pytest.raises(
        FileNotFoundError, match=r"no weights at .*absent\.safetensors; convert a checkpoint"
    ):
        weights.load(pyramid, tmp_path / "absent.safetensors")
    save_file({"a": np.ones(1000, np.float32)}, tmp_path / "whole.safetensors")
    (tmp_path / "cut.safetensors").write_bytes((tmp_path / "whole.safetensors").read_bytes()[:2000])
    with pytest.raises(ValueError, match=r"cut\.safetensors is no readable safetensors file"):
        weights.load(pyramid, tmp_path / "cut.safetensors")


def test_rules_are_first_match():
    """The first regex that is found decides; none leaves the default."""
    rules = (("norm", 0.0), (r"^blocks\.1\.", 0.5))
    names = ("blocks.1.norm1.scale", "blocks.1.mlp.fc1.bias", "blocks.11.mlp.fc1.bias")
    assert [weights.first_match(name, rules, 1.0) for name in names] == [0.0, 0.5, 1.0]
