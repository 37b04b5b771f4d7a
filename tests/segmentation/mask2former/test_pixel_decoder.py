"""The pixel decoder against transformers (golden), with weights under its names."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdg.segmentation.mask2former.layers import row_major
from jaxdg.segmentation.mask2former.pixel_decoder import sine_positions


@pytest.mark.parametrize("case", ["even", "odd"])
def test_mask_features_and_levels_equal_the_oracle(golden, head, features, case):
    """Within 1e-4, for maps that halve exactly and for maps that do not; the levels come coarsest
    first.
    """
    with np.load(golden / "mask2former_pixels.npz") as file:
        want = {
            name.removeprefix(f"{case}/"): file[name]
            for name in file.files
            if name.startswith(case)
        }
    mask_features, levels = jax.jit(lambda x: head.pixel_decoder(x))(features(case))
    assert [level.shape[1] for level in levels] == sorted(level.shape[1] for level in levels)
    for name, got in {
        "mask_features": mask_features,
        **{f"level{i}": level for i, level in enumerate(levels)},
    }.items():
        np.testing.assert_allclose(got, want.pop(name), rtol=0, atol=1e-4, err_msg=name)
    assert not want


@pytest.mark.parametrize(("height", "width", "channels"), [(3, 5, 8), (1, 1, 64), (7, 2, 12)])
def test_positions_equal_the_formula(height, width, channels):
    """Pixel by pixel as DETR's paper and code say: (1 ..

    side) / side * 2 pi over 10000 ** (2i / half), y first, sine at even places.
    """
    half = channels // 2
    got = sine_positions(height, width, channels)
    for y, x, i in np.ndindex(height, width, channels):
        place, side = (y + 1, height) if i < half else (x + 1, width)
        j = i % half
        angle = place / (side + 1e-6) * 2 * np.pi / 10_000 ** (2 * (j // 2) / half)
        assert abs(got[y, x, i] - (np.cos(angle) if j % 2 else np.sin(angle))) < 1e-6


def test_every_level_sees_every_other(head, features):
    """A change in one corner of one coarse map reaches all three levels, the mask features too; the
    finest map reaches those alone.
    """
    maps = features("even")
    run = jax.jit(lambda x: jax.tree.leaves(head.pixel_decoder(x)))
    before = run(maps)
    for i in range(4):
        changed = tuple(x.at[0, 0, 0].add(3.0) if i == j else x for j, x in enumerate(maps))
        moved = [not jnp.array_equal(a, b) for a, b in zip(before, run(changed), strict=True)]
        assert moved == ([True] * 4 if i else [True, False, False, False])


@pytest.mark.parametrize(("platform", "devices"), [("cuda", 1), ("cuda", 8), ("cpu", 1)])
def test_tokens_keep_their_layout_on_one_gpu(platform, devices):
    """On several the partitioner would gather the whole batch for it, and a CPU needs no help."""
    mesh = jax.sharding.AbstractMesh((devices,), ("data",))
    x = jnp.ones((8, 3, 4))
    with jax.sharding.use_abstract_mesh(mesh):
        traced = jax.jit(jax.grad(lambda x: jnp.sum(row_major(x) ** 2))).trace(x)
    text = traced.lower(lowering_platforms=(platform,)).as_text()
    assert ("LayoutConstraint" in text) == (platform == "cuda" and devices == 1)
