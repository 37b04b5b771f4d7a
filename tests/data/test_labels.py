"""Label tables and class lists."""

import numpy as np
import pytest

from jaxdg.data.labels import (
    CAMVID,
    CITYSCAPES,
    LabelSet,
    apply_table,
    class_ids,
    id_table,
    join_names,
    own_table,
    palette,
    palette_fault,
)


def test_cityscapes_classes_and_colors_are_the_official_ones():
    """Names, order and colours equal those of cityscapesscripts, where it is installed."""
    helpers = pytest.importorskip("cityscapesscripts.helpers.labels")
    official = sorted(
        (label for label in helpers.labels if 0 <= label.trainId < 255),
        key=lambda label: label.trainId,
    )
    assert CITYSCAPES.names == tuple(label.name for label in official)
    assert CITYSCAPES.colors == tuple(label.color for label in official)


def test_every_class_list_has_one_distinct_color_a_class():
    """No two classes share a colour, so an overlay can be read."""
    assert (len(CITYSCAPES.names), len(CAMVID.names)) == (19, 11)
    for colors in (CITYSCAPES.colors, CAMVID.colors, palette(60)):
        assert len(set(colors)) == len(colors)
        assert np.array(colors).min() >= 0
        assert np.array(colors).max() <= 255
    assert palette(60)[:5] == palette(5)


def test_any_distinct_text_is_a_class_name():
    """Commas, brackets, quotes, other scripts and other case stay; messages quote commas."""
    names = (
        "road, route",
        "[red]a[/red]",
        "a/b",
        "50 % & c_d #1",
        "it's",
        ' "x" ',
        "道路",
        "Car",
        "car",
        "a+b",
        ":smile:",
    )
    assert LabelSet(names, palette(len(names))).names == names
    assert join_names(names[:3] + names[5:6]) == "'road, route', [red]a[/red], a/b, ' \"x\" '"


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (("a", ""), r"class names\[1\] is ''; allowed: text"),
        ((" ", "a"), r"class names\[0\] is ' '; allowed: text"),
        (("a", "b\nc"), r"class names\[1\] is 'b\\nc'; allowed: text in one line"),
        (("a\x1b[31m", "b"), r"class names\[0\] is .*; allowed: text in one line"),
        (
            ("car", "bus", "car"),
            r"class names\[0\] and \[2\] are both 'car'; give every class a name of its own",
        ),
        (("car", "car "), r"class names\[0\] and \[1\] are both 'car ', which is read as 'car'"),
        (("caf\u00e9", "cafe\u0301"), r"class names\[0\] and \[1\] are both "),
    ],
)
def test_names_that_are_none_or_alike_are_refused(names, message):
    """Results are kept by name, so one of two equal names would be lost."""
    with pytest.raises(ValueError, match=message) as error:
        LabelSet(names, palette(len(names)))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.int32, np.dtype(">u2")])
def test_table_maps_like_a_dictionary(dtype):
    """The table equals a dictionary look-up of each pixel, for every type of file."""
    id_map = {7: 0, 8: 1, 33: 18, 200: 2}
    label = np.random.default_rng(0).choice([7, 8, 33, 200, 0, 255], (20, 30)).astype(dtype)
    expected = np.array(
        [[{**id_map, 0: 255, 255: 255}[int(i)] for i in row] for row in label], np.uint8
    )
    got = apply_table(label, id_table(id_map, ignore=(0, 255)), "a.png")
    assert got.dtype == np.uint8
    np.testing.assert_array_equal(got, expected)


def test_sixteen_bit_ids_are_not_folded():
    """Ids above 255 differ from their low bytes."""
    table = id_table({65535: 3, 256: 1, 0: 0})
    np.testing.assert_array_equal(
        apply_table(np.array([[65535, 256, 0]], np.uint16), table, "a.png"), [[3, 1, 0]]
    )


@pytest.mark.parametrize("bad", [9, -1, 65536 + 7, -65529])
def test_an_id_outside_the_table_is_named_with_file_and_remedy(bad):
    """No id passes, not even one that wraps round to a known id; the proposed list works."""
    can = -32768 <= bad <= 65535
    remedy = (
        "add .*data\\.folder\\.id_map.*data\\.folder\\.ignore"
        if can
        else "ids are -32768 to 65535: these are no classes"
    )
    label = np.array([[7, bad], [bad, 7]], np.int32)
    with pytest.raises(ValueError, match=rf"town/a\.png: 2 pixels .* {bad}; {remedy}") as error:
        apply_table(label, id_table({7: 0}), "town/a.png")
    assert "\n" not in str(error.value)
    if can:
        np.testing.assert_array_equal(
            apply_table(label, id_table({7: 0}, ignore=(bad,)), "town/a.png"), [[0, 255], [255, 0]]
        )


def test_negative_ids_are_those_of_the_same_16_bits():
    """-1 of 16 and 32 bits is 65535 of unsigned files, and the two cannot differ."""
    table = id_table({0: 0, -2: 1}, ignore=(-1,))
    for dtype in (np.int16, np.int32, np.int64):
        np.testing.assert_array_equal(
            apply_table(np.array([[0, -2, -1]], dtype), table, "a.png"), [[0, 1, 255]]
        )
    np.testing.assert_array_equal(
        apply_table(np.array([[0, 65534, 65535]], np.uint16), table, "a.png"), [[0, 1, 255]]
    )
    with pytest.raises(ValueError, match="label id 65535 is in the id map"):
        id_table({-1: 0}, ignore=(65535,))


COLORS = LabelSet(
    ("road", "car", "sky", "pole"), ((128, 64, 128), (0, 0, 142), (70, 130, 180), (153, 153, 153))
)


def palette_of(**indices: int) -> list[int]:
    """A palette with the colours of some classes and distinct other colours."""
    colors = [[i, 1, 2] for i in range(40)]
    for name, i in indices.items():
        colors[i] = list(COLORS.colors[COLORS.names.index(name)])
    return [value for color in colors for value in color]


@pytest.mark.parametrize(
    ("palette", "fault"),
    [
        pytest.param(palette_of(road=7, car=26, sky=23, pole=17), None, id="expected"),
        pytest.param(
            palette_of(road=0, car=1, sky=2),
            "index 0 the colour of road (id 7, 8), 1 the colour of car (id 26), 2 the colour of sky"
            " (id 23)",
            id="train-ids",
        ),
        pytest.param(
            palette_of(road=8, car=23, sky=26),
            "index 23 the colour of car (id 26), 26 the colour of sky (id 23)",
            id="swapped",
        ),
        pytest.param(palette_of(road=8, car=26, sky=23), None, id="one-of-two-ids"),
        pytest.param([*palette_of(road=7, car=26), 0, 0, 142], None, id="a-colour-twice"),
        pytest.param(palette_of(), None, id="other-colours"),
        pytest.param(palette_of(road=3), None, id="one-by-chance"),
        pytest.param([i for i in range(256) for _ in range(3)], None, id="grey"),
        pytest.param([0] * 768, None, id="black"),
        pytest.param([], None, id="none"),
    ],
)
def test_palettes_are_compared_with_the_colors_of_the_classes(palette, fault):
    """A palette with classes' colours at other ids is refused; one of other colours passes."""
    found = palette_fault(palette, class_ids(id_table({7: 0, 8: 0, 26: 1, 23: 2, 17: 3}), COLORS))
    if fault is None:
        assert found is None
    else:
        assert (
            found
            == f"its palette gives {fault}; correct the file ids (data.folder.id_map), or use the"
            " files of class ids"
        )


def test_the_palette_of_pascal_voc_tells_nothing():
    """Labelling tools give it to any classes, although it has CamVid's colours at other ids."""
    voc = [
        sum(((i >> 3 * j + c) & 1) << 7 - j for j in range(3)) for i in range(256) for c in range(3)
    ]
    assert voc[3:12] == [128, 0, 0, 0, 128, 0, 128, 128, 0]
    assert sum(list(color) in np.reshape(voc, (-1, 3)).tolist() for color in CAMVID.colors) >= 8
    assert palette_fault(voc, class_ids(id_table({i: i for i in range(11)}), CAMVID)) is None


def test_tables_that_contradict_themselves_are_refused():
    """An id is either mapped or ignored, and file ids and train ids are in range."""
    with pytest.raises(ValueError, match=r"label id 7 is in the id map .* ignore list"):
        id_table({7: 0}, ignore=(7,))
    for bad in ({-32769: 0}, {65536: 0}, {7: -1}, {7: 256}):
        with pytest.raises(ValueError, match="out of range"):
            id_table(bad)
    assert id_table({7: 255}, ignore=(7,))[7] == 255


def test_label_sets_need_one_color_a_class():
    """Names and colours of different lengths, and too many classes, are refused."""
    with pytest.raises(ValueError, match="2 class names but 1 colours"):
        LabelSet(("a", "b"), ((0, 0, 0),))
    with pytest.raises(ValueError, match="256 classes"):
        LabelSet(("a",) * 256, ((0, 0, 0),) * 256)


def test_an_own_id_map_adds_to_the_train_ids_or_replaces_them():
    """Every entry of the table follows the rule in `FolderOptions`."""

    def entries(table):
        return {i: int(table[i]) for i in np.flatnonzero(table >= 0).tolist()}

    two = ("background", "crack")
    three = ("a", "b", "c")
    assert entries(own_table(two, {}, (255,))) == {0: 0, 1: 1, 255: 255}
    assert entries(own_table(two, {255: 1}, (255,))) == {0: 0, 255: 1}
    assert entries(own_table(three, {128: 1, 255: 2}, (255,))) == {0: 0, 128: 1, 255: 2}
    assert entries(own_table(two, {7: 0, 22: 1}, (0, 255))) == {7: 0, 22: 1, 0: 255, 255: 255}
    assert entries(own_table(three, {7: 1}, (0,))) == {
        7: 1,
        2: 2,
        0: 255,
    }  # an ignored id is no class's
    assert entries(own_table(three, {1: 0, 2: 1}, (255,))) == {
        1: 0,
        2: 1,
        255: 255,
    }  # numbers of classes mean what the map says
    with pytest.raises(ValueError, match="label id 255 is in the id map"):
        own_table(two, {255: 1}, (0, 255))
    with pytest.raises(
        ValueError, match=r"data\.folder\.ignore lists 2 \(c\), which is the id of a class"
    ):
        own_table(three, {}, (2, 255))
