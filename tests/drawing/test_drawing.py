"""Pictures of label maps and boxes: exact colours, lines, legends and sizes."""

import subprocess
import sys

import numpy as np
import pytest

from jaxdg.drawing import overlays
from jaxdg.drawing.legends import legend_rows
from jaxdg.drawing.overlays import box_overlay, overlay
from jaxdg.drawing.palettes import colorize
from jaxdg.drawing.panels import box_panel, grid, panel

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
    return {
        (c >> 16, c >> 8 & 255, c & 255): n
        for c, n in zip(packed.tolist(), number.tolist(), strict=True)
    }


def test_colorize_is_a_table_look_up():
    """Each pixel has its class's colour, ignored ones are black, for any type and `ignore`."""
    label = np.array([[0, 1, 2], [3, 255, 1]], np.uint8)
    expected = [[COLORS[0], COLORS[1], COLORS[2]], [COLORS[3], (0, 0, 0), COLORS[1]]]
    assert colorize(label, COLORS).tolist() == np.array(expected).tolist()
    assert colorize(label.astype(np.int64), COLORS).dtype == np.uint8
    np.testing.assert_array_equal(
        colorize(np.array([[-1, 3]]), COLORS, ignore=-1), [[(0, 0, 0), COLORS[3]]]
    )


def test_legend_lists_exactly_the_classes_present(label):
    """Names, colours and shares are right, the largest first; ignored pixels do not count."""
    rows = legend_rows(label, COLORS, NAMES)
    assert [row.name for row in rows] == ["road", "sky", "tree"]
    assert [row.color for row in rows] == [COLORS[0], COLORS[1], COLORS[2]]
    total = 60 * 320 - 20 * 50
    np.testing.assert_allclose(
        [row.share for row in rows], [(40 * 240 - 1000) / total, 20 * 240 / total, 60 * 80 / total]
    )
    assert legend_rows(np.full((3, 3), 255, np.uint8), COLORS, NAMES) == []


def test_overlay_blends_leaves_ignored_pixels_and_draws_lines_only_at_class_changes(image, label):
    """A pixel is the exact blend away from class changes; ignored pixels are the image.

    Lines are darker and one pixel wide.
    """
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
    """The legend lies below and shows the present classes; without classes there is none."""
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
    """No swatch of 19 long names is cut off, even if the picture is narrower than an entry."""
    colors = [(10 * k + 20, 255 - 10 * k, 77) for k in range(19)]
    names = [f"a rather long class name {k}" for k in range(19)]
    label = (np.arange(38 * width).reshape(38, width) % 19).astype(np.int32)
    result = overlay(np.zeros((38, width, 3), np.uint8), label, colors, names, alpha=0.0)
    found = counts(result[38:])
    areas = [found.get(color, 0) for color in colors]
    assert min(areas) > 80
    assert max(areas) == min(areas)


def test_lines_grow_with_the_picture():
    """The line between classes is two pixels wide on a picture of 2048, else one pixel."""
    for width, expected in ((512, 1), (2048, 2)):
        label = np.zeros((4, width), np.uint8)
        label[:, width // 2 :] = 1
        row = overlay(
            np.full((4, width, 3), 200, np.uint8), label, [(200, 200, 200)] * 2, ["a", "b"]
        )[0, :, 0]
        assert (row < 200).sum() == expected


def test_panel_shows_image_truth_prediction_and_errors(image, label):
    """Four captioned tiles are exact, and red marks exactly the wrong judged pixels."""
    prediction = label.copy()
    prediction[label == 255] = 3
    prediction[:10, :30] = 0
    result = panel(image, label, prediction, COLORS, NAMES)
    top = next(y for y in range(result.shape[0]) if (result[y : y + 60, :320] == image).all())

    def tile(i):
        return result[top : top + 60, i * 324 : i * 324 + 320]

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
    """Tiles have at most the given width; the panel is four of them and three gaps wide."""
    assert panel(image, label, label, COLORS, NAMES, tile_width=200).shape[1] == 4 * 200 + 3 * 4


def test_grid_stacks_rows_of_any_width():
    """Rows lie below one another unchanged, narrower ones centred."""
    first = np.full((10, 40, 3), 200, np.uint8)
    second = np.full((6, 20, 3), 100, np.uint8)
    result = grid([first, second], gap=4)
    assert result.shape == (20, 40, 3)
    np.testing.assert_array_equal(result[:10], first)
    np.testing.assert_array_equal(result[14:, 10:30], second)


def test_a_frame_lies_on_the_border_pixels_of_its_box():
    """The outermost pixels of [x0, x1) x [y0, y1) have the class's colour.

    A line of contrast lies outside, and the inside is the image.
    """
    background = np.full((300, 320, 3), 77, np.uint8)
    boxes = np.array([[40, 50, 100, 110], [200.4, 59.6, 280.0, 140.2]], np.float32)
    picture = box_overlay(background, boxes, np.array([0, 1]), COLORS, NAMES)[:300]
    for (x0, y0, x1, y1), color, contrast in (
        ((40, 50, 100, 110), COLORS[0], 255),
        ((200, 60, 280, 140), COLORS[1], 255),
    ):
        frame = picture[y0:y1, x0:x1].copy()
        assert (frame[[0, -1]] == color).all()
        assert (frame[:, [0, -1]] == color).all()
        assert (frame[1:-1, 1:-1] == 77).all()
        ring = picture[y0 - 1 : y1 + 1, x1]  # tags stand above the boxes
        assert (ring == contrast).all()


def test_boxes_without_a_pixel_in_the_image_are_not_drawn_and_others_are_cut_off():
    """Boxes outside and empty ones are not drawn; one beyond the border is framed along it."""
    image = np.full((60, 200, 3), 77, np.uint8)
    gone = np.array([[-50, -50, 0, 0], [300, 10, 400, 40], [20, 20, 20, 40]], np.float32)
    np.testing.assert_array_equal(
        box_overlay(image, gone, np.array([0, 1, 2]), COLORS, NAMES)[:60], image
    )
    picture = box_overlay(
        image, np.array([[-50, -50, 500, 500]], np.float32), np.array([0]), COLORS, NAMES
    )[:60]
    assert (picture[[0, -1]] == COLORS[0]).all(axis=2).all()
    assert (picture[:, [0, -1]] == COLORS[0]).all(axis=2).all()


@pytest.mark.parametrize("corner", [(0, 0), (1, 0), (0, 1), (1, 1)])
@pytest.mark.parametrize("width", [120, 320, 2048])
def test_a_tag_is_wholly_inside_the_picture(width, corner):
    """In every corner and at every size a tag is as large as in the middle."""
    height = width // 2
    side = width // 10
    image = np.full((height, width, 3), 77, np.uint8)
    areas = []
    for x, y in (corner, (0.5, 0.5)):
        start = np.array([x * (width - side), y * (height - side)], np.float32)
        picture = box_overlay(
            image,
            np.concatenate([start, start + side])[None],
            np.array([0]),
            COLORS,
            NAMES,
            np.array([0.875]),
        )[:height]
        plain = box_overlay(
            image, np.concatenate([start, start + side])[None], np.array([0]), COLORS, [""] * 4
        )[:height]
        areas.append((picture != plain).any(axis=2).sum())
    assert areas[0] == pytest.approx(areas[1], rel=0.25)  # up to the part that lies on the frame
    assert areas[0] > 100


def test_tags_never_hide_one_another_nor_boxes():
    """Of 200 boxes every tag is a whole rectangle that hides at most half of any box.

    The best box has a tag.
    """
    rng = np.random.default_rng(0)
    start = rng.uniform(0, [400, 200], (200, 2))
    boxes = np.concatenate([start, start + rng.uniform(4, 60, (200, 2))], axis=1)
    scores = rng.random(200)
    edges = np.clip(np.rint(boxes), 0, [400, 200, 400, 200]).astype(int)
    sizes = dict.fromkeys(np.argsort(-scores).tolist(), (60, 16))
    tags = overlays._place_tags(edges, sizes, (200, 400))
    assert np.argmax(scores) in tags
    assert len(tags) > 5
    covered = np.zeros((200, 400), int)
    for x0, y0, x1, y1 in tags.values():
        assert (x1 - x0, y1 - y0) == (60, 16)
        assert min(x0, y0) >= 0
        covered[y0:y1, x0:x1] += 1
        for a, b, c, d in edges.tolist():
            hidden = max(0, min(x1, c) - max(x0, a)) * max(0, min(y1, d) - max(y0, b))
            assert hidden <= 0.5 * (c - a) * (d - b)
    assert covered.max() == 1
    assert covered.sum() == 60 * 16 * len(tags)


def test_box_overlay_has_a_legend_of_the_classes_present():
    """Only classes with boxes are in the legend; without boxes there is none."""
    image = np.full((80, 320, 3), 77, np.uint8)
    boxes = np.array([[10, 20, 40, 60], [50, 20, 90, 60], [100, 20, 140, 60]], np.float32)
    legend = counts(box_overlay(image, boxes, np.array([2, 0, 2]), COLORS, NAMES)[80:])
    assert min(legend.get(COLORS[k], 0) for k in (0, 2)) > 60
    assert not {COLORS[1], COLORS[3]} & set(legend)
    np.testing.assert_array_equal(
        box_overlay(image, boxes[:0], np.zeros(0, int), COLORS, NAMES), image
    )


def test_box_panel_shows_image_truth_and_detections():
    """Three captioned tiles show the image and the boxes at the scale of the tile."""
    image = np.full((100, 960, 3), 77, np.uint8)
    truth = (np.array([[100, 20, 300, 80]], np.float32), np.array([0]))
    found = (
        np.array([[500, 40, 700, 90], [20, 40, 60, 90]], np.float32),
        np.array([1, 2]),
        np.array([0.5, 0.25], np.float32),
    )
    result = box_panel(image, truth, found, COLORS, NAMES, tile_width=480)
    assert result.shape[1] == 3 * 480 + 2 * 4
    top = next(y for y in range(result.shape[0]) if (result[y : y + 50, :480] == 77).all())

    def tile(i):
        return result[top : top + 50, i * 484 : i * 484 + 480]

    assert (tile(1)[40 - 1, 50:150] == COLORS[0]).all()  # the lower edges of the boxes
    assert (tile(2)[45 - 1, 250:350] == COLORS[1]).all()
    assert (tile(2)[45 - 1, 10:30] == COLORS[2]).all()
    legend = counts(result[top + 50 :])
    assert min(legend.get(color, 0) for color in COLORS[:3]) > 60
    assert COLORS[3] not in legend


def test_mistakes_with_boxes_are_said(image):
    """A class without a colour, missing names and unequal lengths are errors with a reason."""
    boxes = np.array([[10, 10, 30, 30], [40, 10, 60, 30]], np.float32)
    with pytest.raises(ValueError, match="class 4, but there are 4 colours"):
        box_overlay(image, boxes, np.array([0, 4]), COLORS, NAMES)
    with pytest.raises(ValueError, match="4 colours but 3 names"):
        box_overlay(image, boxes, np.array([0, 1]), COLORS, NAMES[:3])
    with pytest.raises(ValueError, match="2 boxes, 2 classes, 1 scores"):
        box_overlay(image, boxes, np.array([0, 1]), COLORS, NAMES, np.array([0.5]))


def test_mistakes_are_said(image, label):
    """Another size, an id without a colour, missing names and an empty grid are errors."""
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
    """The module imports neither jax nor matplotlib, so that a script starts at once."""
    code = (
        "import sys, jaxdg.drawing.panels; print([m for m in ('jax', 'flax', 'matplotlib') if m"
        " in sys.modules])"
    )
    assert (
        subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, check=True
        ).stdout.strip()
        == "[]"
    )
