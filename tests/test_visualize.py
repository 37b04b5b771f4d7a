"""Pictures of label maps: exact colours, lines, legends and sizes."""

import subprocess
import sys

import numpy as np
import pytest

from jaxdg.visualize import colorize, grid, legend_rows, overlay, panel

COLORS = [(200, 10, 20), (0, 128, 255), (90, 240, 30), (255, 255, 0)]
NAMES = ["road", "sky", "tree", "traffic sign"]


@pytest.fixture
def image():
    """A picture of random colours, 60 x 320."""
    return np.random.default_rng(0).integers(0, 256, (60, 320, 3), dtype=np.uint8)


@pytest.fixture
def label():
    """Sky above road, a tree on the right, and an ignored corner; no sign."""
    label = np.zeros((60, 320), np.uint8)
    label[:20] = 1
    label[:, 240:] = 2
    label[40:, :50] = 255
    return label


def counts(rgb):
    """How many pixels have each colour."""
    packed, number = np.unique(rgb.astype(np.int64) @ np.array([65536, 256, 1]), return_counts=True)
    return {(c >> 16, c >> 8 & 255, c & 255): n for c, n in zip(packed.tolist(), number.tolist(), strict=True)}


def test_colorize_is_a_table_look_up():
    """Each pixel has exactly its class's colour, ignored ones are black, for any integer type and any `ignore`."""
    label = np.array([[0, 1, 2], [3, 255, 1]], np.uint8)
    expected = [[COLORS[0], COLORS[1], COLORS[2]], [COLORS[3], (0, 0, 0), COLORS[1]]]
    assert colorize(label, COLORS).tolist() == np.array(expected).tolist()
    assert colorize(label.astype(np.int64), COLORS).dtype == np.uint8
    np.testing.assert_array_equal(colorize(np.array([[-1, 3]]), COLORS, ignore=-1), [[(0, 0, 0), COLORS[3]]])


def test_legend_lists_exactly_the_classes_present(label):
    """Names, colours and shares of what occurs, the largest first, ignored pixels in no share."""
    rows = legend_rows(label, COLORS, NAMES)
    assert [row.name for row in rows] == ["road", "sky", "tree"]
    assert [row.color for row in rows] == [COLORS[0], COLORS[1], COLORS[2]]
    total = 60 * 320 - 20 * 50
    np.testing.assert_allclose([row.share for row in rows], [(40 * 240 - 1000) / total, 20 * 240 / total, 60 * 80 / total])
    assert legend_rows(np.full((3, 3), 255, np.uint8), COLORS, NAMES) == []


def test_overlay_blends_leaves_ignored_pixels_and_draws_lines_only_at_class_changes(image, label):
    """Away from class changes a pixel is the exact blend, ignored pixels are the image, and lines are darker and one pixel wide."""
    picture = overlay(image, label, COLORS, NAMES, alpha=0.25)[:60]
    edge = np.zeros(label.shape, bool)
    edge[19, :240] = edge[:, 239] = True  # sky over road, both beside the tree
    edge[39, :50] = edge[40:, 49] = True  # the ignored corner
    blend = 0.75 * image + 0.25 * np.array([*COLORS, *[(0, 0, 0)] * 252])[label]
    ignored = label == 255
    np.testing.assert_array_equal(picture[ignored], image[ignored])
    plain = ~edge & ~ignored
    assert np.abs(picture[plain] - blend[plain]).max() <= 0.5
    line = edge & ~ignored
    assert (picture[line] < 0.5 * blend[line] + 1).all()


def test_overlay_keeps_the_picture_free_of_the_legend(image, label):
    """The legend is below: it shows each present class's colour and no other, and a label without classes needs none."""
    result = overlay(image, label, COLORS, NAMES)
    assert result.dtype == np.uint8
    assert result.shape[0] > 60
    assert result.shape[1] == 320
    legend = counts(result[60:])
    assert min(legend.get(color, 0) for color in COLORS[:3]) > 60
    assert COLORS[3] not in legend
    empty = np.full_like(label, 255)
    np.testing.assert_array_equal(overlay(image, empty, COLORS, NAMES), image)


@pytest.mark.parametrize("width", [16, 256, 480, 1024, 2048])
def test_a_legend_fits_any_width(width):
    """With 19 long names no swatch is cut off: each shows its whole area, also where the picture is narrower than one entry."""
    colors = [(10 * k + 20, 255 - 10 * k, 77) for k in range(19)]
    names = [f"a rather long class name {k}" for k in range(19)]
    label = (np.arange(38 * width).reshape(38, width) % 19).astype(np.int32)
    result = overlay(np.zeros((38, width, 3), np.uint8), label, colors, names, alpha=0.0)
    found = counts(result[38:])
    areas = [found.get(color, 0) for color in colors]
    assert min(areas) > 80
    assert max(areas) == min(areas)


def test_lines_grow_with_the_picture():
    """On a picture 2048 wide the line between two classes is two pixels wide, on a small one a single pixel."""
    for width, expected in ((512, 1), (2048, 2)):
        label = np.zeros((4, width), np.uint8)
        label[:, width // 2 :] = 1
        row = overlay(np.full((4, width, 3), 200, np.uint8), label, [(200, 200, 200)] * 2, ["a", "b"])[0, :, 0]
        assert (row < 200).sum() == expected


def test_panel_shows_image_truth_prediction_and_errors(image, label):
    """Four tiles below their captions: the image, two exact colourings, and red exactly where a judged pixel is wrong."""
    prediction = label.copy()
    prediction[label == 255] = 3
    prediction[:10, :30] = 0
    result = panel(image, label, prediction, COLORS, NAMES)
    top = next(y for y in range(result.shape[0]) if (result[y : y + 60, :320] == image).all())
    tile = lambda i: result[top : top + 60, i * 324 : i * 324 + 320]
    np.testing.assert_array_equal(tile(1), colorize(label, COLORS))
    np.testing.assert_array_equal(tile(2), colorize(prediction, COLORS))
    errors = tile(3).astype(int)
    wrong = np.zeros(label.shape, bool)
    wrong[:10, :30] = True
    red = errors[..., 0] - errors[..., 1]
    assert (red[wrong] > 100).all()
    assert (red[~wrong] == 0).all()
    assert errors[label == 255].max() < 40 <= errors[~wrong & (label != 255)].min()
    legend = counts(result[top + 60 :])
    assert min(legend.get(color, 0) for color in COLORS) > 60  # the sign is predicted only


def test_panel_shrinks_large_images(image, label):
    """Tiles are no wider than asked, and the panel is four of them and three gaps wide."""
    assert panel(image, label, label, COLORS, NAMES, tile_width=200).shape[1] == 4 * 200 + 3 * 4


def test_grid_stacks_rows_of_any_width():
    """Rows come below one another unchanged, narrower ones centred."""
    first, second = np.full((10, 40, 3), 200, np.uint8), np.full((6, 20, 3), 100, np.uint8)
    result = grid([first, second], gap=4)
    assert result.shape == (20, 40, 3)
    np.testing.assert_array_equal(result[:10], first)
    np.testing.assert_array_equal(result[14:, 10:30], second)


def test_mistakes_are_said(image, label):
    """Another size, an id without a colour, missing names and an empty grid are refused, each with its reason."""
    with pytest.raises(ValueError, match="the label is 100x60 pixels, the image 320x60"):
        overlay(image, label[:, :100], COLORS, NAMES)
    with pytest.raises(ValueError, match="the prediction is"):
        panel(image, label, label[:30], COLORS, NAMES)
    with pytest.raises(ValueError, match="id 4, but there are 4 colours"):
        colorize(np.full((2, 2), 4, np.uint8), COLORS)
    with pytest.raises(ValueError, match="4 colours but 3 names"):
        legend_rows(label, COLORS, NAMES[:3])
    with pytest.raises(ValueError, match="at least one"):
        grid([])


def test_drawing_needs_no_jax():
    """The module loads without importing jax or matplotlib, so a script that only draws starts at once."""
    code = "import sys, jaxdg.visualize; print([m for m in ('jax', 'flax', 'matplotlib') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"
