"""Class lists, their colours, and the tables that turn the ids of label files into train ids.

Train ids count the classes of a `LabelSet` from 0. The train id 255 marks pixels that neither the
loss nor a score sees. The 19 Cityscapes classes and their colours are those of `cityscapesscripts`
(Cordts et al. 2016); CamVid's 11 classes are those of the SegNet release. Ids that a `*_IDS`
dictionary does not name are ignored; `published.py` says which ids a dataset has.
"""

from collections.abc import Collection, Iterable, Mapping, Sequence
import colorsys
import dataclasses
from typing import Final
import unicodedata

from jaxtyping import Int16, Integer, UInt8
import numpy as np

IGNORE = 255
LOWEST = -(2**15)  # id of a label file
HIGHEST = 2**16 - 1
# By colour: the name of a class and its ids in label files.
ClassIds = Mapping[tuple[int, int, int], tuple[str, Collection[int]]]


@dataclasses.dataclass(frozen=True)
class LabelSet:
    """Class names and display colours, in the order of the train ids.

    Attributes:
        names: one a class.
        colors: RGB, 0-255, one a class.
    """

    names: tuple[str, ...]
    colors: tuple[tuple[int, int, int], ...]

    def __post_init__(self):
        if len(self.names) != len(self.colors):
            raise ValueError(
                f"{len(self.names)} class names but {len(self.colors)} colours; give one colour a"
                " class"
            )
        if not 1 <= len(self.names) <= IGNORE:
            raise ValueError(
                f"{len(self.names)} classes; label maps are 8-bit and hold between 1 and {IGNORE}"
            )
        check_names(self.names, "class names")


def check_names(names: Sequence[str], what: str, *, any_case: bool = False) -> None:
    """Refuses class names that are empty or that could be taken for one another.

    Args:
        names: in the order of their ids.
        what: the kind of names, for the error message.
        any_case: names that differ only in the case of their letters are the same.

    Raises:
        ValueError: a name is empty, holds control characters such as line breaks, or occurs twice;
            spaces around it, and how its accents are composed, make no difference.
    """
    seen: dict[str, int] = {}
    for i, name in enumerate(names):
        if not name.strip() or any(unicodedata.category(c) == "Cc" for c in name):
            raise ValueError(
                f"{what}[{i}] is {name!r}; allowed: text in one line that is not empty, as every"
                " class needs a name"
            )
        key = unicodedata.normalize("NFC", name).strip()
        first = seen.setdefault(key.casefold() if any_case else key, i)
        if first != i:
            alike = "" if name == names[first] else f", which is read as {names[first]!r}"
            raise ValueError(
                f"{what}[{first}] and [{i}] are both {name!r}{alike}; give every class a name of"
                " its own"
            )


def join_names(names: Iterable[str]) -> str:
    """Names for a message, separated by commas; those that hold commas are in quotes."""
    return ", ".join(repr(name) if "," in name or name != name.strip() else name for name in names)


CITYSCAPES = LabelSet(
    names=(
        "road", "sidewalk", "building", "wall", "fence", "pole", "traffic light", "traffic sign",
        "vegetation", "terrain", "sky", "person", "rider", "car", "truck", "bus", "train",
        "motorcycle", "bicycle",
    ),
    colors=(
        (128, 64, 128), (244, 35, 232), (70, 70, 70), (102, 102, 156), (190, 153, 153),
        (153, 153, 153), (250, 170, 30), (220, 220, 0), (107, 142, 35), (152, 251, 152),
        (70, 130, 180), (220, 20, 60), (255, 0, 0), (0, 0, 142), (0, 0, 70), (0, 60, 100),
        (0, 80, 100), (0, 0, 230), (119, 11, 32),
    ),
)  # fmt: skip

CAMVID = LabelSet(
    names=(
        "sky", "building", "pole", "road", "pavement", "tree", "sign", "fence", "car", "pedestrian",
        "bicyclist",
    ),
    colors=(
        (128, 128, 128), (128, 0, 0), (192, 192, 128), (128, 64, 128), (60, 40, 222), (128, 128, 0),
        (192, 128, 128), (64, 64, 128), (64, 0, 128), (64, 64, 0), (0, 128, 192),
    ),
)  # fmt: skip

CITYSCAPES_IDS: Final = {7: 0, 8: 1, 11: 2, 12: 3, 13: 4, 17: 5, 31: 16, 32: 17, 33: 18} | {
    i: i - 13 for i in range(19, 29)
}
SYNTHIA_IDS: Final = {
    3: 0, 4: 1, 2: 2, 21: 3, 5: 4, 7: 5, 15: 6, 9: 7, 6: 8, 16: 9, 1: 10, 10: 11, 17: 12, 8: 13,
    18: 14, 19: 15, 20: 16, 12: 17, 11: 18,
}  # fmt: skip
# Mapillary Vistas v1.2 as VLTSeg and its public re-implementation map it: 13 road, 24 general lane
# marking, 41 manhole, 2 curb, ..
MAPILLARY_VLTSEG_IDS: Final = {
    13: 0, 24: 0, 41: 0, 2: 1, 15: 1, 17: 2, 6: 3, 3: 4, 45: 5, 47: 5, 48: 6, 50: 7, 30: 8, 29: 9,
    27: 10, 19: 11, 20: 12, 21: 12, 22: 12,
    55: 13, 61: 14, 54: 15, 58: 16, 57: 17, 52: 18,
}  # fmt: skip
# As Rein maps it (github.com/w1oves/Rein, tools/convert_datasets/mapillary2cityscape.py, by class
# names): bike lane, plain crosswalk, parking, service lane and the crosswalk's marking are road;
# curb cut and pedestrian area are sidewalk; street lights are poles; frames and backs of signs are
# signs; manholes are ignored.
MAPILLARY_REIN_IDS: Final = {i: train for i, train in MAPILLARY_VLTSEG_IDS.items() if i != 41} | {
    7: 0, 8: 0, 10: 0, 14: 0, 23: 0, 9: 1, 11: 1, 44: 5, 46: 7, 49: 7,
}  # fmt: skip
# The ids of Cityscapes, and from 34 on those that WildDash 2 added, by its unified policy.
WILDDASH2_IDS: Final = CITYSCAPES_IDS | {
    34: 14, 35: 13, 38: 0, 41: 0, 43: 0, 61: 0, 64: 0, 70: 0, 74: 0, 75: 0, 76: 0, 79: 0, 45: 5,
    46: 5, 47: 12, 48: 12, 49: 12,
    52: 1, 65: 1, 77: 1, 80: 1, 56: 3, 58: 17, 78: 9,
}  # fmt: skip


def palette(count: int) -> tuple[tuple[int, int, int], ...]:
    """Distinct colours for classes that have none: hues by the golden ratio, three brightnesses.

    Args:
        count: number of classes.

    Returns:
        RGB, 0-255, one a class; the first colours do not change with `count`.
    """
    colors = []
    for i in range(count):
        brightness = (0.95, 0.75, 0.55)[i % 3]
        rgb = colorsys.hsv_to_rgb(i * 0.618034 % 1.0, 0.85 - 0.3 * (i % 2), brightness)
        r, g, b = (round(255 * c) for c in rgb)
        colors.append((r, g, b))
    return tuple(colors)


def id_table(id_map: Mapping[int, int], ignore: Iterable[int] = ()) -> Int16[np.ndarray, "65536"]:
    """A look-up table from the ids of label files to train ids.

    Args:
        id_map: label file id (-32768 to 65535) to train id (0-254, or 255 to ignore). A negative id
            is the one of the same 16 bits: -1 in a file of signed numbers is 65535 in one of 16
            bits.
        ignore: further label file ids to ignore.

    Returns:
        The train id of each label file id, of negative ones from the end; 255 where ignored, -1
        where the id is outside the table.

    Raises:
        ValueError: an id is out of range, or both mapped and ignored.
    """
    table = np.full(65536, -1, np.int16)
    for source, target in [*id_map.items(), *((i, IGNORE) for i in ignore)]:
        if not (LOWEST <= source <= HIGHEST and 0 <= target <= IGNORE):
            raise ValueError(
                f"id map entry {source}: {target} is out of range; file ids are {LOWEST} to"
                f" {HIGHEST}, train ids 0 to {IGNORE}"
            )
        if table[source] not in (-1, target):
            raise ValueError(
                f"label id {source} is in the id map (as {table[source]}) and in the ignore list;"
                " keep one of the two"
            )
        table[source] = target
    return table


def own_table(
    names: Sequence[str], id_map: Mapping[int, int], ignore: Sequence[int]
) -> Int16[np.ndarray, "65536"]:
    """The look-up table of the user's own label files, see `datasets.FolderOptions`.

    Args:
        names: of the classes.
        id_map: label file id to train id. If all its file ids lie beyond the train ids, it adds to
            them: a class that it does not mention keeps its train id as file id, unless that is
            ignored.
        ignore: further label file ids to ignore. The default, 255 alone, gives way to an `id_map`
            that maps 255.

    Returns:
        As `id_table`.

    Raises:
        ValueError: as `id_table`, or there is no `id_map` and the id of a class is ignored.
    """
    numbers = range(len(names))
    if not id_map and (both := [i for i in ignore if i in numbers]):
        meant = ", ".join(f"{i} ({names[i]})" for i in both)
        raise ValueError(
            f"data.folder.ignore lists {meant}, which is the id of a class as there is no"
            " data.folder.id_map; take it off the list, or say in data.folder.id_map which id is"
            " which class"
        )
    ignored = () if tuple(ignore) == (IGNORE,) and IGNORE in id_map else tuple(ignore)
    unchanged: dict[int, int] = {}
    if all(i >= len(names) for i in id_map):
        unchanged = {i: i for i in numbers if i not in id_map.values() and i not in ignored}
    return id_table({**unchanged, **id_map}, ignored)


def apply_table(
    label: Integer[np.ndarray, "h w"], table: Int16[np.ndarray, "65536"], path: str
) -> UInt8[np.ndarray, "h w"]:
    """Maps a label image to train ids.

    Args:
        label: ids as the file holds them.
        table: made by `id_table`.
        path: the file, for the error message.

    Returns:
        Train ids, 255 where ignored.

    Raises:
        ValueError: the image holds ids outside the table.
    """
    fits = label.dtype in (np.uint8, np.uint16)
    inside = label if fits else np.clip(label, LOWEST, HIGHEST)
    train = np.take(table, inside)  # four times as fast as an index
    unknown = train < 0
    if inside is not label:
        unknown |= inside != label
    if unknown.any():
        ids, counts = np.unique(label[unknown], return_counts=True)
        remedy = (
            "add them to the id map or to the ignore list (data.folder.id_map, data.folder.ignore),"
            " or fetch the file again if it is a published one"
        )
        if ids[0] < LOWEST or ids[-1] > HIGHEST:
            remedy = (
                f"ids are {LOWEST} to {HIGHEST}: these are no classes but perhaps colours or"
                " instances; use the files of class ids"
            )
        raise ValueError(
            f"{path}: {counts.sum()} pixels have label ids outside the id map:"
            f" {_some(ids.tolist())}; {remedy}"
        )
    return train.astype(np.uint8)


def class_ids(table: Int16[np.ndarray, "65536"], labels: LabelSet) -> ClassIds:
    """The ids of classes in label files by their colours.

    Args:
        table: made by `id_table`.
        labels: the classes. Grey ones and those that share a colour are left out, because other
            things may have such colours.
    """
    return {
        color: (name, np.flatnonzero(table == k).tolist())
        for k, (name, color) in enumerate(zip(labels.names, labels.colors, strict=True))
        if len(set(color)) > 1 and labels.colors.count(color) == 1
    }


def palette_fault(palette: Sequence[int], expected: ClassIds) -> str | None:
    """Whether a palette has the colours of the classes at the ids of other classes.

    Args:
        palette: red, green and blue of index 0, of index 1, ..
        expected: from `class_ids`.

    Returns:
        What is wrong, with a remedy. None for a palette in the expected order, and for one of other
        colours, which tells nothing.
    """
    if list(palette[3:12]) == [128, 0, 0, 0, 128, 0, 128, 128, 0]:
        # Labelling tools give PASCAL VOC's palette, which has nearly every colour, to any classes.
        return None
    places: dict[tuple[int, int, int], list[int]] = {}
    for i, (r, g, b) in enumerate(zip(palette[::3], palette[1::3], palette[2::3], strict=False)):
        places.setdefault((r, g, b), []).append(i)
    known = {color: ids for color, (_, ids) in expected.items() if color in places and ids}
    strange = [color for color, ids in known.items() if not set(places[color]) & set(ids)]
    strange.sort(key=lambda color: places[color])
    if len(known) < max(2, len(expected) / 2) or len(strange) < 2:
        return None
    told = ", ".join(
        f"{places[c][0]} the colour of {expected[c][0]} (id {', '.join(map(str, known[c]))})"
        for c in strange[:5]
    )
    more = f" and {len(strange) - 5} more" if len(strange) > 5 else ""
    return (
        f"its palette gives index {told}{more}; correct the file ids (data.folder.id_map), or use"
        " the files of class ids"
    )


def _some(ids: Sequence[int], limit: int = 10) -> str:
    more = f" and {len(ids) - limit} more" if len(ids) > limit else ""
    return ", ".join(map(str, ids[:limit])) + more
