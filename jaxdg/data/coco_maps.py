"""Label maps drawn from a COCO file, of its polygons and its run lengths, compressed or not.

A map shows the annotations of an image by their classes, the larger below the smaller; of two with
as many pixels the later in the file is on top. Regions of crowds are ignored. What no annotation
covers is the class `background` if there is one, else it is ignored. pycocotools (Lin et al. 2014)
rasterises, so that the pixels of an annotation are those of its `annToMask`. What it would read
past its memory or take for something else is refused: run lengths that do not fill the image,
points that are no numbers, and outlines of fewer than three points, of which it takes two for a
box. Points up to one pixel beyond the image are clipped, as boxes are.

Everything is rasterised once, when the file is checked, and kept as compressed run lengths. So
pycocotools is needed for that alone.
"""

from collections.abc import Collection, Hashable, Mapping, Sequence
import dataclasses
import os
from reprlib import repr as short
import types
from typing import Any

from jaxtyping import Int16, Int64, Integer, UInt8
import numpy as np

from jaxdg.data import coco_json, index
from jaxdg.data.annotations import cache_key, look_at, report
from jaxdg.data.box_fields import flag
from jaxdg.data.cache import cached, decoded, encoded
from jaxdg.data.coco_json import CocoPart, Entries, Entry
from jaxdg.data.datasets import Files, FolderOptions
from jaxdg.data.index import Defect
from jaxdg.data.labels import IGNORE, LabelSet, id_table
from jaxdg.data.tree import Tree

VERSION = 1  # of the kept arrays
BACKGROUND = "background"  # the class of what no annotation covers


@dataclasses.dataclass(frozen=True)
class Regions:
    """The annotations of all images in the order in which they are drawn.

    Attributes:
        ends: for each image, the number of annotations of it and the images before.
        classes: train id of each annotation, 255 if it is ignored.
        runs: compressed run lengths of all annotations, one after another.
        run_ends: for each annotation, the length of its run lengths and those before.
    """

    ends: Integer[np.ndarray, " n"]
    classes: UInt8[np.ndarray, " m"]
    runs: UInt8[np.ndarray, " r"]
    run_ends: Integer[np.ndarray, " m"]


class CocoMaps(Files):
    """Image files with the label maps of a COCO file.

    Attributes:
        regions: the annotations.
        background: train id of what none of them covers.
    """

    def __init__(
        self,
        domain: str,
        pairs: index.Pairs,
        table: np.ndarray,
        labels: LabelSet,
        regions: Regions,
    ):
        super().__init__(domain, pairs, table, labels)
        self.regions = regions
        names = [name.lower() for name in labels.names]
        self.background = names.index(BACKGROUND) if BACKGROUND in names else IGNORE

    @property
    def unlabelled(self) -> bool:
        """Whether there are no annotations but ignored ones."""
        return bool((self.regions.classes == IGNORE).all())

    def label(self, i: int) -> UInt8[np.ndarray, "h w"]:
        h, w = self.size(i)
        label = np.full(w * h, self.background, np.uint8)  # column by column, as run lengths count
        for k in range(self.regions.ends[i - 1] if i else 0, self.regions.ends[i]):
            start = self.regions.run_ends[k - 1] if k else 0
            runs = self.regions.runs[start : self.regions.run_ends[k]].tobytes()
            lengths = lengths_of(runs)
            assert lengths is not None  # it was checked
            edges = lengths.cumsum().tolist()
            for low, high in zip(edges[::2], edges[1::2], strict=False):
                label[low:high] = self.regions.classes[k]
        return np.ascontiguousarray(label.reshape(w, h).T)

    def ids(self, i: int) -> tuple[Integer[np.ndarray, " m"], Integer[np.ndarray, " m"]]:
        """The train ids in the label of image `i`, ascending, and the pixels of each."""
        counts = np.bincount(self.label(i).ravel(), minlength=1)
        ids = np.flatnonzero(counts)
        return ids, counts[ids]


def is_coco(options: FolderOptions) -> bool:
    """Whether the labels of a folder are a COCO file."""
    return options.labels.lower().endswith(".json")


def category_table(names: Sequence[str], options: FolderOptions) -> Int16[np.ndarray, "65536"]:
    """The train ids of categories by their ids, as `labels.id_table`.

    Without an `id_map`, categories are classes by their names, and the table has every class at its
    own number.
    """
    mapping = options.id_map or {k: k for k in range(len(names))}
    return id_table({**mapping, **dict.fromkeys(_ignored(options), IGNORE)})


def open_maps(
    domain: str,
    tree: Tree,
    part: CocoPart,
    options: FolderOptions,
    labels: LabelSet,
    table: Int16[np.ndarray, "65536"],
    skip: Collection[str],
    defects: list[Defect] | None,
) -> CocoMaps:
    """Opens and checks the images of a COCO file, or recalls an earlier check.

    Args:
        domain: its name.
        tree: the files below the data root.
        part: the images and the file.
        options: says which category is which class.
        labels: the classes.
        table: made by `category_table`.
        skip: paths of images to leave out.
        defects: receives the faults of images and annotations, which then are no errors; nothing is
            recalled.

    Raises:
        FileNotFoundError: the image folder or the file does not exist.
        ValueError: as for `annotations.index_coco`, or annotations without a region; or pycocotools
            is not installed.
    """
    if options.image_suffix or options.label_suffix != FolderOptions.label_suffix:
        raise ValueError(
            f"data.folder.labels is the file {part.file}, which names its images: leave"
            " data.folder.image_suffix and label_suffix as they are"
        )

    def make() -> dict[str, np.ndarray]:
        wrong: list[Defect] = []
        path = tree.file((part.annotations,), part.file)
        found = coco_json.read_entries(
            tree,
            part,
            path,
            coco_json.load(path),
            names=labels.names,
            class_of=_Classes(labels.names, options),
            remedy=_remedy(options),
            skip=frozenset(skip),
            look=look_at,
            wrong=wrong,
        )
        regions = _rasterised(found, _pycocotools())
        report(wrong, defects)
        if not found.images:
            raise ValueError(f"no images of {path} are left; see its list, and data.skip")
        pairs = {"images": encoded(found.images.values()), "sizes": found.sizes}
        return {**pairs, "fingerprints": found.fingerprints, **dataclasses.asdict(regions)}

    classes = [labels.names, sorted(options.id_map.items()), options.ignore]
    key = cache_key(f"maps {VERSION}", tree, [part], classes, skip)
    arrays = cached(key, tree.modified, make) if defects is None else make()
    images = decoded(arrays["images"])
    files = (images, [""] * len(images), arrays["sizes"], arrays["fingerprints"])
    pairs = index.Pairs(*files, tree.skipped.notes())
    regions = Regions(**{f.name: arrays[f.name] for f in dataclasses.fields(Regions)})
    return CocoMaps(domain, pairs, table, labels, regions)


@dataclasses.dataclass(frozen=True)
class _Classes:
    """The train id of a category, by its id if there is an `id_map`, else by its name."""

    names: Sequence[str]
    options: FolderOptions

    def __call__(self, category_id: Hashable, name: str) -> int | None:
        if category_id in _ignored(self.options):
            return IGNORE
        mapping: Mapping[Any, int] = {**self.options.id_map}
        if mapping:
            return mapping.get(category_id)
        return self.names.index(name) if name in self.names else None


def _ignored(options: FolderOptions) -> tuple[int, ...]:
    """The ids of ignored categories; the default, 255, is a mask's and no category's."""
    return () if options.ignore == FolderOptions.ignore else tuple(options.ignore)


def _remedy(options: FolderOptions) -> str:
    way = "map its id in data.folder.id_map" if options.id_map else "name it in data.folder.classes"
    return f"{way}, list its id in data.folder.ignore"


def _rasterised(found: Entries, mask: types.ModuleType) -> Regions:
    """The regions of all annotations without defects, in the order in which they are drawn."""
    kept: list[Entry] = []
    classes: list[int] = []
    runs: list[bytes] = []
    entries = [e for e, _ in found.annotations]
    owners = found.owners(entries)
    for (e, class_id), owner in zip(found.annotations, owners.tolist(), strict=True):
        h, w = found.sizes[owner].tolist()
        crowd = flag(e.get("iscrowd"))
        encoded_runs, fault = _runs(e.get("segmentation"), h, w, mask)
        if crowd is None:
            fault = f"has the iscrowd {short(e['iscrowd'])}, which is neither yes (1) nor no (0)"
        if fault:
            found.add(e, fault)
            continue
        kept.append(e)
        classes.append(IGNORE if crowd else class_id)
        runs.append(encoded_runs)
    owners = found.owners(kept)
    sizes = found.sizes[owners].tolist()
    rles = [{"size": size, "counts": one} for size, one in zip(sizes, runs, strict=True)]
    areas = np.array([mask.area(rle) for rle in rles], np.int64)
    order = np.lexsort((-areas, owners))  # keeps the order of equal ones
    return Regions(
        np.bincount(owners, minlength=len(found.images)).cumsum(),
        np.array(classes, np.uint8)[order],
        np.frombuffer(b"".join(runs[k] for k in order), np.uint8),
        np.array([len(runs[k]) for k in order], np.int64).cumsum(),
    )


def _runs(segmentation: Any, h: int, w: int, mask: types.ModuleType) -> tuple[bytes, str]:
    """The compressed run lengths of a segmentation, and the reason if there are none."""
    if isinstance(segmentation, dict):
        return _checked_runs(segmentation, h, w, mask)
    if not segmentation:
        return b"", "has no segmentation, of which a label map is drawn"
    if not isinstance(segmentation, list):
        return b"", f"has the segmentation {short(segmentation)}, neither polygons nor run lengths"
    for polygon in segmentation:
        try:
            points = np.asarray(polygon)
        except ValueError:  # lists of several lengths
            points = np.zeros(0)
        if points.ndim != 1 or points.dtype.kind not in "iuf" or not np.isfinite(points).all():
            return b"", f"has the polygon {short(polygon)}; allowed is a list x1 y1 x2 y2 .."
        if len(points) < 6 or len(points) % 2:
            return b"", (
                f"has a polygon of {len(points)} numbers; allowed are x and y of three or more"
                " points"
            )
        limits = np.array([w, h]) + 1
        x, y = points[::2], points[1::2]
        if min(x.min(), y.min()) < -1 or x.max() > limits[0] or y.max() > limits[1]:
            place = f"x {x.min():g} to {x.max():g}, y {y.min():g} to {y.max():g} of {w}x{h}"
            return b"", f"has a polygon outside the image ({place})"
    return mask.merge(mask.frPyObjects(segmentation, h, w))["counts"], ""


def _checked_runs(
    segmentation: Mapping[str, Any], h: int, w: int, mask: types.ModuleType
) -> tuple[bytes, str]:
    size = segmentation.get("size")
    if size != [h, w]:
        return b"", f"has run lengths of the size {short(size)} (height, width) in an image {w}x{h}"
    counts: Any = segmentation.get("counts")
    text = counts.encode(errors="surrogateescape") if isinstance(counts, str) else b""
    lengths: Any = counts
    if not isinstance(counts, list):
        found = lengths_of(text)
        lengths = None if found is None else found.tolist()
    if lengths is None or not all(type(n) is int and n >= 0 for n in lengths):
        return b"", f"has the run lengths {short(counts)}, which are none of COCO's"
    if sum(lengths) != h * w:
        return b"", f"has run lengths of {sum(lengths)} pixels in an image of {h * w}"
    if isinstance(counts, list):
        return mask.frPyObjects({"size": size, "counts": counts}, h, w)["counts"], ""
    return text, ""


def lengths_of(text: bytes) -> Int64[np.ndarray, " n"] | None:
    """The run lengths in COCO's compressed form.

    A character holds five bits of a number, lowest first, and whether more follow. From the fourth
    on, a number is the difference to the second before.

    Args:
        text: as a file states it.

    Returns:
        The lengths; None if the text is none of this form.
    """
    codes = np.frombuffer(text, np.uint8).astype(np.int64) - 48
    last = np.flatnonzero(codes & 32 == 0)  # the last character of each number
    if not len(codes) or codes.min() < 0 or codes.max() > 63 or codes[-1] & 32:
        return None
    first = np.append(0, last[:-1] + 1)
    digits = last - first + 1
    if digits.max() > 7:  # beyond the 32 bits of a length
        return None
    bits = 5 * (np.arange(len(codes)) - np.repeat(first, digits))
    lengths = np.add.reduceat((codes & 31) << bits, first)
    lengths -= np.where(codes[last] & 16, 1 << 5 * digits, 0)  # negative numbers
    lengths[1::2] = lengths[1::2].cumsum()
    lengths[2::2] = lengths[2::2].cumsum()
    return lengths


def _pycocotools() -> types.ModuleType:
    """Its functions on masks.

    Raises:
        ValueError: it is not installed.
    """
    try:
        from pycocotools import mask
    except ImportError as error:
        raise ValueError(
            'label maps of a COCO file need pycocotools: `pip install "jaxdg[coco]"`, or name a'
            " folder of label maps in data.folder.labels"
        ) from error
    return mask


def part_of(images: str, labels: str) -> CocoPart:
    """The images and the file, by their paths below the data root."""
    return CocoPart(images, *os.path.split(labels))
