"""What tells that files of Diverse Weather are not as published.

The loader of CLIP the Gap (vidit09/domaingen, data/datasets/diverse_weather.py), which PDDOC
shares, subtracts 1 from all corners at its first run, cuts decimals off, and writes the XML files
back in place. Such a copy of the data moves every box by a pixel. Without the archive nothing
proves it, but three things tell it:

- the list that the loader keeps in a folder `cache` beside `VOC2007`;
- an element `<pose>0</pose>` behind the box of an object. The loader adds it where there is none;
- whole numbers in all corners of some files, and decimals in others.

The numbers of boxes do not change by that. Others than the published ones tell of other
annotations.
"""

from collections.abc import Sequence
import os
from typing import NamedTuple
from xml.etree import ElementTree

import numpy as np

from jaxdg.commands.check.decoding import SAMPLE, OpenedSplit, evenly_spaced
from jaxdg.data import storage
from jaxdg.data.boxes import DIVERSE_WEATHER, BoxFiles
from jaxdg.data.voc_xml import CORNERS

LOADER = "the loader of CLIP the Gap and PDDOC, which moves every box by a pixel"
REMEDY = "unpack the archive again, or compare a few files with it"
# Published numbers of boxes (README of WoojuLee24/OA-DG and logs of Daniel00008/PDOC agree), in the
# order of the classes; and of images with a box, where it is known.
BOXES = {
    "daytime_clear/val": ((1738, 1046, 95339, 537, 12309, 787, 5029), None),
    "night_sunny/val": ((2012, 1410, 241616, 665, 17566, 841, 4853), 25870),
    "dusk_rainy/val": ((820, 322, 34240, 110, 5144, 169, 2235), 3485),
    "night_rainy/val": ((248, 121, 21655, 49, 1532, 71, 499), 2475),
    "daytime_foggy/val": ((554, 4920, 33392, 911, 21530, 2363, 736), 3756),
}


class Look(NamedTuple):
    """What some files of a split say.

    Attributes:
        files: that hold a box.
        posed: of these, with the element that the loader adds.
        whole: of these, with whole numbers alone.
    """

    files: int
    posed: int
    whole: int


def warnings(opened: Sequence[OpenedSplit], everything: bool) -> list[str]:
    """A line for each split that is not as published, as far as that can be told.

    Args:
        opened: splits of Diverse Weather, after they were decoded.
        everything: all images were decoded, so that boxes are counted by class; then all files are
            looked at.
    """
    lines = [line for o in opened if (line := _miscounted(o, everything))]
    looks = {o.split.name: _look(o, everything) for o in opened}
    for o in opened:
        look = looks[o.split.name]
        listed = _cached(o)
        if listed or look.posed:
            found = [f"{listed} is there"] if listed else []
            if look.posed:
                found.append(f"{look.posed} of {look.files} files have what it adds to them")
            lines.append(
                f"{o.split.name} was probably written back by {LOADER} ({'; '.join(found)});"
                f" {REMEDY}"
            )
    files = sum(look.files for look in looks.values())
    whole = sum(look.whole for look in looks.values())
    if 0 < whole < files:
        most = max(looks, key=lambda name: looks[name].whole)
        lines.append(
            f"corners are whole numbers in {whole} of {files} files, most of them in {most}, and"
            f" have decimals in the others: some were perhaps written back by {LOADER}; {REMEDY}"
        )
    return lines


def _miscounted(o: OpenedSplit, everything: bool) -> str:
    """What is said of a split with all its images and other numbers of boxes; else nothing."""
    counts = o.dataset.box_counts if isinstance(o.dataset, BoxFiles) else None
    if counts is None or o.split.name not in BOXES or len(o.dataset) != o.split.count:
        return ""
    published, with_box = BOXES[o.split.name]
    found = []
    if everything and len(o.intact) == len(o.dataset):
        found = [
            f"{mine} of {name} (published {theirs})"
            for name, mine, theirs in zip(
                DIVERSE_WEATHER.names, o.counts.tolist(), published, strict=False
            )
            if mine != theirs
        ]
    elif int(counts.sum()) != sum(published):
        found = [f"{int(counts.sum())} boxes (published {sum(published)})"]
    filled = int(np.count_nonzero(counts))
    if with_box is not None and filled != with_box:
        found.append(f"{filled} images with a box (published {with_box})")
    return f"{o.split.name} has {', '.join(found)}: other annotations" if found else ""


def _look(o: OpenedSplit, everything: bool) -> Look:
    """Reads the files of the images that were decoded, or of some of them."""
    chosen = o.intact if everything else evenly_spaced(o.intact, SAMPLE)
    files = posed = whole = 0
    for i in chosen:
        root = ElementTree.fromstring(storage.read(o.dataset.pairs.labels[i]))
        objects = root.findall("object")
        corners = [thing.findtext(f"bndbox/{key}", "") for thing in objects for key in CORNERS]
        files += bool(objects)
        posed += any(map(_is_posed, objects))
        whole += bool(objects) and not any("." in text for text in corners)
    return Look(files, posed, whole)


def _is_posed(thing: ElementTree.Element) -> bool:
    tags = [child.tag for child in thing]
    if thing.findtext("pose") != "0" or "bndbox" not in tags:
        return False
    return tags.index("pose") > tags.index("bndbox")


def _cached(o: OpenedSplit) -> str:
    """The list that the loader wrote, by the name of its folder; "" if there is none."""
    if not len(o.dataset):
        return ""
    domain = o.dataset.name(0).partition("/VOC2007/")[0]
    split = "test" if o.split.name == "daytime_clear/val" else "train"
    path = os.path.join(domain, "cache", f"{os.path.basename(domain)}_{split}.pkl")
    return path if os.path.isfile(path) else ""
