"""SAM's image encoder against timm, and the laws of its windows and relative positions.

The golden file is made by tests/oracles/golden_sam.py.
"""

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdg import backbones, weights
from jaxdg.backbones import Sam, SamConfig
from jaxdg.backbones.attention import from_windows, to_windows
from jaxdg.backbones.sam import Attention, WindowAttention, resize_distances
from jaxdg.conversion import sam
from tests.backbones.drawn import random_file, run, trained_steps, wave

SIZES = (
    (32, 32),
    (16, 36),
    (23, 30),
    (44, 8),
)  # as trained; oblong; not divided by the patch; narrower than a window
DEPTH = 6
TRAINED = SamConfig(
    image_size=(32, 32),
    patch_size=4,
    width=16,
    depth=DEPTH,
    heads=2,
    taps=tuple(range(DEPTH)),
    window=3,
    global_blocks=(2, 4),
)


def changed(**fields):
    return SamConfig(**{**vars(TRAINED), **fields})


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    """The golden random encoder by its authors' names, through the conversion, as a jaxdg file."""
    module = nnx.eval_shape(lambda: Sam(TRAINED, rngs=nnx.Rngs(0)))
    return random_file(
        module, sam.layouts()[0], tmp_path_factory.mktemp("sam") / "random.safetensors"
    )


@pytest.fixture(scope="module")
def build(file):
    """`build(taps=.., ..)`: an encoder that differs from the trained one in these fields, with the
    golden weights.
    """

    def make(**fields):
        encoder = nnx.eval_shape(lambda: Sam(changed(**fields), rngs=nnx.Rngs(0)))
        weights.load(encoder, file)
        return encoder

    return make


@pytest.fixture(scope="module")
def expected(golden):
    """`expected(height, width)`: timm's maps after every block."""
    with np.load(golden / "sam.npz") as archive:
        arrays = dict(archive)
    return lambda *size: arrays["maps/{}x{}".format(*size)]


@pytest.mark.parametrize("size", SIZES, ids=lambda size: "{}x{}".format(*size))
def test_features_equal_timm(build, expected, size):
    """Every block's map equals timm's, at the trained grid and at others, where windows fit, stick
    out or hold the whole width.
    """
    features = run(build(image_size=size), wave(*size), method="__call__")
    assert [f.shape for f in features] == [(1, size[0] // 4, size[1] // 4, 16)] * DEPTH
    np.testing.assert_allclose(np.stack(features), expected(*size), rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    "segments",
    [dict(taps=(5,)), dict(taps=(1, 3), boundaries=(0,)), dict(taps=(2, 4)), dict(taps=(0, 1))],
)
def test_where_segments_end_changes_no_value(build, expected, segments):
    """Segments end where windows do, at taps and at boundaries; blocks past the last tap are not
    built; values do not depend on it.
    """
    encoder = build(**segments)
    last = segments["taps"][-1]
    changes = {1, 2, 3, 4} | {last, *segments["taps"], *segments.get("boundaries", ())}
    assert encoder.blocks.ends == tuple(sorted(end for end in changes if end <= last))
    kinds = {start: type(segment.attn) for start, segment in encoder.blocks.segments.items()}
    assert all(
        kind is (Attention if int(start) in (2, 4) else WindowAttention)
        for start, kind in kinds.items()
    )
    names = weights.tensors(encoder)
    assert {int(name.split(".")[1]) for name in names if name.startswith("blocks.")} == set(
        range(last + 1)
    )
    for tap, features in zip(
        segments["taps"], run(encoder, wave(32, 32), method="__call__"), strict=True
    ):
        np.testing.assert_allclose(features, expected(32, 32)[tap], rtol=0, atol=1e-4)


def test_attention_equals_a_slow_one(build):
    """Relative positions enter as defined: for each head, query and key alone, the unscaled query
    times the vectors of both distances.
    """
    attn = build(image_size=(12, 20), taps=(2,)).blocks.segments["2"].attn
    graph, state = nnx.split(attn)
    attn = nnx.merge(graph, jax.tree.map(lambda p: jnp.asarray(np.asarray(p)[0]), state))
    grid = (3, 5)
    heads = 2
    x = np.random.default_rng(0).standard_normal((2, 15, 16)).astype(np.float32)
    q, k, v = np.moveaxis((x @ attn.qkv.kernel + attn.qkv.bias).reshape(2, 15, 3, heads, 8), 2, 0)
    down = np.asarray(attn.rel_pos_h[...])
    across = np.asarray(attn.rel_pos_w[...])
    assert (down.shape, across.shape) == ((5, 8), (9, 8))
    joined = np.zeros((2, 15, heads, 8))
    for b, head, i in np.ndindex(2, heads, 15):
        logits = np.zeros(15)
        for j in range(15):
            row, column = divmod(i, grid[1])
            key_row, key_column = divmod(j, grid[1])
            vector = (
                k[b, j, head] / 8**0.5 + down[row - key_row + 2] + across[column - key_column + 4]
            )
            logits[j] = q[b, i, head] @ vector
        joined[b, i, head] = np.exp(logits) / np.exp(logits).sum() @ v[b, :, head]
    slow = joined.reshape(2, 15, 16) @ attn.proj.kernel + attn.proj.bias
    np.testing.assert_allclose(jax.jit(lambda x: attn(x))(x), slow, atol=1e-5)


@pytest.mark.parametrize("grid", [(6, 9), (4, 4), (7, 2)])
def test_windows_are_squares_of_the_map(grid):
    """Window by window the map's own squares, zeros where they stick out; joining them gives the
    map again.
    """
    maps = np.random.default_rng(0).standard_normal((2, *grid, 5)).astype(np.float32)
    windows = to_windows(jnp.asarray(maps), 3)
    padded = np.pad(maps, ((0, 0), (0, -grid[0] % 3), (0, -grid[1] % 3), (0, 0)))
    squares = [
        padded[b, y : y + 3, x : x + 3].reshape(9, 5)
        for b in range(2)
        for y in range(0, grid[0], 3)
        for x in range(0, grid[1], 3)
    ]
    np.testing.assert_array_equal(windows, np.stack(squares))
    np.testing.assert_array_equal(from_windows(windows, grid, 3), maps)


def test_relative_positions_equal_torch_linear():
    """Resized tables equal `F.interpolate(mode="linear")`, longer, shorter and of the same length,
    to which nothing is done.
    """
    torch = pytest.importorskip("torch")
    table = np.random.default_rng(0).standard_normal((127, 6)).astype(np.float32)
    for length in (127, 63, 95, 1, 255, 7):
        theirs = torch.nn.functional.interpolate(
            torch.from_numpy(table.T[None]), size=length, mode="linear"
        )[0].T.numpy()
        np.testing.assert_allclose(
            resize_distances(table, length), theirs, atol=1e-5, err_msg=str(length)
        )
    np.testing.assert_array_equal(resize_distances(table, 127), table)


def test_what_load_fits_to_the_grid(build, file):
    """Positions and the tables of global blocks are resized, rows and columns each to their own
    grid; windows keep theirs.
    """
    stored = weights.read(file)
    for name, tensor in weights.tensors(build()).items():
        np.testing.assert_array_equal(tensor, stored[name], err_msg=name)
    fitted = weights.tensors(build(image_size=(16, 36)))
    assert fitted.pop("pos_embed").shape == (1, 4, 9, 16)
    for name, tensor in fitted.items():
        if name in {f"blocks.{i}.attn.rel_pos_{side}" for i in (2, 4) for side in "hw"}:
            assert tensor.shape == ((7 if name.endswith("h") else 17), 8), name
        else:
            np.testing.assert_array_equal(tensor, stored[name], err_msg=name)


def test_it_learns(monkeypatch):
    """From scratch, with windows that stick out: a loss falls, and its gradients are finite;
    relative positions start at zero and learn.
    """
    monkeypatch.setitem(
        backbones.ZOO, "tiny", backbones.zoo.Entry(changed(depth=2, taps=(1,), global_blocks=(1,)))
    )
    encoder = backbones.create("tiny", image_size=(23, 30))
    np.testing.assert_array_equal(weights.tensors(encoder)["blocks.1.attn.rel_pos_h"], 0)
    losses, first = trained_steps(encoder, jnp.asarray(wave(23, 30)))
    assert losses[-1] < 0.8 * losses[0], losses
    for path, leaf in nnx.to_flat_state(first):
        assert np.isfinite(leaf[...]).all(), path
        assert np.abs(leaf[...]).max() > 0, path


def test_bfloat16_compute_is_close(build, expected):
    """Half precision in the matrix products, float32 parameters and relative terms: within 2 % of
    timm's float32 maps.
    """
    features = run(build(dtype="bfloat16"), wave(32, 32), method="__call__")
    assert {f.dtype for f in features} == {jnp.dtype("bfloat16")}
    exact = expected(32, 32)
    error = np.linalg.norm(
        np.stack([np.asarray(f, np.float32) for f in features]) - exact
    ) / np.linalg.norm(exact)
    assert 0 < error < 2e-2, error


def test_the_zoo_states_the_published_encoders():
    """Sizes and global blocks are those of `build_sam`, features are read after the global blocks,
    and a crop's sizes follow it.
    """
    for name, width, depth, heads, blocks in (
        ("sam_b16", 768, 12, 12, (2, 5, 8, 11)),
        ("sam_l16", 1024, 24, 16, (5, 11, 17, 23)),
        ("sam_h16", 1280, 32, 16, (7, 15, 23, 31)),
    ):
        config = backbones.entry(name).config
        assert (config.width, config.depth, config.heads, config.global_blocks, config.taps) == (
            width,
            depth,
            heads,
            blocks,
            blocks,
        )
        assert (config.grid, config.window, config.prefix) == ((64, 64), 14, 0)
        np.testing.assert_allclose(255 * np.array(config.mean), (123.675, 116.28, 103.53))
        np.testing.assert_allclose(255 * np.array(config.std), (58.395, 57.12, 57.375))
    encoder = nnx.eval_shape(
        lambda: backbones.create("sam_l16", image_size=(512, 1024), rngs=nnx.Rngs(0))
    )
    shapes = weights.shapes(encoder)
    assert shapes["pos_embed"] == (1, 32, 64, 1024)
    assert [shapes[f"blocks.{i}.attn.rel_pos_h"] for i in (4, 5)] == [(27, 64), (63, 64)]
    assert sorted(encoder.blocks.segments, key=int) == ["0", "5", "6", "11", "12", "17", "18", "23"]
