"""Domains opened by their names, as label maps; `boxes.py` opens them with boxes.

A domain is a string. `clear`, `night`, `rain`, `fog` and `dusk_rain` are generated street scenes.
`gta5`, `cityscapes`, `acdc/night` and the others of `published.py` are read as downloaded, from
folders or unopened zip archives. Any other name is a pair of folders described by `FolderOptions`.
`gta5+synthia` is both.
"""

from collections.abc import Collection, Sequence
import os
from typing import Any

from jaxtyping import Int16
import numpy as np

from jaxdg.data import coco_maps, index, published, records
from jaxdg.data.datasets import (
    STREETS,
    Dataset,
    Files,
    FolderOptions,
    Mixture,
    Streets,
    StreetsOptions,
)
from jaxdg.data.labels import CITYSCAPES, IGNORE, LabelSet, id_table, own_table, palette
from jaxdg.data.skip import skip_list, without
from jaxdg.data.tree import Tree


def open_domain(
    domain: str,
    *,
    root: str,
    train: bool,
    streets: StreetsOptions,
    folder: FolderOptions | None,
    mapillary_labels: str = "vltseg",
    skip: str | None = None,
) -> Dataset:
    """Opens the labelled images of a domain.

    Args:
        domain: `clear`, `night`, `rain`, `fog`, `dusk_rain` (generated), a published one, with or
            without its split (`acdc/night`, `cityscapes/test`), the name of a folder, or several of
            these joined by `+`.
        root: data root; a published dataset is read from `root/NAME`, folders as `folder` says.
            Records may be on `gs://..` or `s3://..`.
        train: the images to train on, else those to judge on.
        streets: the generated scenes.
        folder: the images and labels of any other domain.
        mapillary_labels: mapping of the ids of Mapillary Vistas to classes: vltseg or rein.
        skip: a text file of paths to leave out with their partners, see `skip.py`.

    Returns:
        The dataset: records where the root holds them, else files, which are paired and checked.

    Raises:
        FileNotFoundError: the data root, a folder of the domain or the skip list does not exist.
        ValueError: an unknown domain, an empty folder, files that do not pair up or are damaged, or
            records that are unfinished, damaged or written with another label map.
    """
    options: dict[str, Any] = {"root": root, "train": train, "folder": folder}
    options |= {"mapillary_labels": mapillary_labels, "skip": skip}
    if len(parts := domain_names(domain)) > 1:
        return Mixture([open_domain(part, streets=streets, **options) for part in parts])
    if domain in STREETS:
        return Streets(domain, streets, train)
    found = records.open_records(root, domain, train=train)
    if found is None:
        return open_files(domain, **options)
    table = label_table(domain, folder, mapillary_labels)
    # Ids that had no class when the records were written occur in none of their labels.
    same_table = found.table is not None and (
        np.array_equal(np.where(found.table < 0, table, found.table), table)
    )
    if not same_table or found.labels.names != label_set(domain, folder).names:
        raise ValueError(
            f"the records {found.directory} were written with other classes or label ids than"
            " data.folder or data.mapillary_labels say; change these or prepare the records again"
        )
    return without(found, skip, root, strict=train) if skip else found


def domain_names(domain: str) -> list[str]:
    """The domains that are joined by `+`.

    Raises:
        ValueError: one of them is empty or named twice, or leads to the folder of another one, such
            as `..`.
    """
    names = domain.split("+")
    for name in names:
        if not name.strip() or not set(name.split("/")).isdisjoint(("", ".", "..")):
            raise ValueError(
                f"domain {domain!r} names {name!r}, which is no domain's name; give one such as"
                " clear, acdc/night or gta5+synthia"
            )
    if len(set(names)) < len(names):
        raise ValueError(
            f"domain {domain!r} names one domain twice; name each once (data.source_weights draws"
            " one more often)"
        )
    return names


def folder_of_files(root: str, domain: str) -> str:
    """The data root as a folder that files are read from.

    Raises:
        FileNotFoundError: it is a URL, where only records are read, or no folder.
    """
    if "://" in root:
        raise FileNotFoundError(
            f"{root} has no records of {domain}; only they are read from there: run `python -m"
            " jaxdg.data.prepare`"
        )
    root = os.path.normpath(root)
    if not os.path.isdir(root):
        raise FileNotFoundError(
            f"data root {os.path.abspath(root)} does not exist; set JAXDG_DATA or"
            " --config.data.root"
        )
    return root


def open_files(
    domain: str,
    *,
    root: str,
    train: bool,
    folder: FolderOptions | None,
    mapillary_labels: str = "vltseg",
    skip: str | None = None,
    defects: list[index.Defect] | None = None,
) -> Files:
    """Opens the files of a domain, whether or not there are records of it; see `open_domain`.

    Args:
        domain: one that is not generated, and not several.
        root: as for `open_domain`.
        train: as for `open_domain`.
        folder: as for `open_domain`.
        mapillary_labels: as for `open_domain`.
        skip: as for `open_domain`.
        defects: receives the faults of files, which then are no errors; the outcome of an earlier
            check is not used.
    """
    labels = label_set(domain, folder)
    root = folder_of_files(root, domain)
    left_out = skip_list(skip, root, strict=train) if skip else ()
    if dataset := published.find(domain, mapillary_labels):
        return _published(domain, dataset, root, train, left_out, defects)
    assert folder is not None  # else label_set raises an error
    return _folder(domain, root, train, folder, labels, left_out, defects)


def label_set(domain: str, folder: FolderOptions | None) -> LabelSet:
    """The classes of a domain, without looking at its files.

    Args:
        domain: as for `open_domain`.
        folder: as for `open_domain`.

    Raises:
        ValueError: an unknown domain.
    """
    domain = domain_names(domain)[0]
    if domain in STREETS:
        return CITYSCAPES
    if dataset := published.find(domain):
        return dataset.labels
    if folder is None:
        datasets = published.PUBLISHED.values()
        known = [*STREETS, *(name for dataset in datasets for name in dataset.domains)]
        raise ValueError(
            f"unknown domain {domain!r}; known are {', '.join(known)}; for images of your own set"
            " data.folder"
            " (its images and labels folders, where {domain} stands for the name)"
        )
    names = tuple(folder.classes)
    standard = CITYSCAPES.colors if names == CITYSCAPES.names else palette(len(names))
    return LabelSet(names, tuple((r, g, b) for r, g, b in folder.colors) or standard)


def label_table(
    domain: str, folder: FolderOptions | None, mapillary_labels: str
) -> Int16[np.ndarray, "65536"]:
    """Label file id to train id, see `labels.id_table`; arguments as for `open_domain`."""
    if dataset := published.find(domain, mapillary_labels):
        return id_table(dataset.table())
    names = label_set(domain, folder).names
    assert folder is not None  # else label_set raises an error
    train_ids = set(folder.id_map.values()) - {IGNORE}
    if outside := sorted(i for i in train_ids if i >= len(names)):
        raise ValueError(
            f"data.folder.id_map maps to train ids {outside}, but data.folder.classes has"
            f" {len(names)} classes"
        )
    if coco_maps.is_coco(folder):
        return coco_maps.category_table(names, folder)
    return own_table(names, folder.id_map, folder.ignore)


def _published(
    domain: str,
    dataset: published.Published,
    root: str,
    train: bool,
    skip: Collection[str],
    defects: list[index.Defect] | None,
) -> Files:
    parts = dataset.select(domain, train)
    tree = Tree(os.path.join(root, dataset.name))
    folders = [(part.images, part.labels) for part in parts]
    suffixes = {"image_suffix": dataset.image_suffix, "label_suffix": dataset.label_suffix}
    pairs = pair_files(tree, folders, defects, skip=skip, **suffixes)
    start = tuple(start for part in parts for start in part.start)
    listed = {number for part in parts if part.listed for number in _numbers(tree, part)}
    if start or listed:
        stems = [os.path.splitext(os.path.basename(path))[0] for path in pairs.images]
        if listed:
            keep = [i for i, stem in enumerate(stems) if int(stem) in listed]
        else:
            keep = [i for i, stem in enumerate(stems) if stem.startswith(start)]
        if not keep:
            raise ValueError(
                f"{os.path.abspath(tree.base)} holds no images of {', '.join(start) or domain} in "
                f"{', '.join(part.images for part in parts)}; fetch {dataset.name} again"
            )
        pairs = pairs.take(keep)
    return Files(domain, pairs, id_table(dataset.table()), dataset.labels, dataset.red)


def _numbers(tree: Tree, part: published.Part) -> list[int]:
    """The image numbers of an official split in a MATLAB file, as `trainIds`."""
    import scipy.io  # the import takes a third of a second

    path = os.path.join(tree.base, part.listed)
    if not os.path.isfile(path):
        raise FileNotFoundError(
            f"{os.path.abspath(path)} does not exist; {part.domain}/{part.split} needs it,"
            f" {part.domain} is all images"
        )
    try:
        return scipy.io.loadmat(path)[f"{part.split}Ids"].ravel().tolist()
    except Exception as error:  # scipy raises many types for damaged files
        raise ValueError(
            f"{path}: no {part.split}Ids in it ({type(error).__name__}: {error}); fetch the file"
            " again"
        ) from error


def _folder(
    domain: str,
    root: str,
    train: bool,
    options: FolderOptions,
    labels: LabelSet,
    skip: Collection[str],
    defects: list[index.Defect] | None,
) -> Files:
    split = "train" if train else "val"
    image_folder, label_folder = (
        path.replace("{domain}", domain).replace("{split}", split)
        for path in (options.images, options.labels)
    )
    tree = Tree(root, exact=True)
    table = label_table(domain, options, "")
    if coco_maps.is_coco(options):
        part = coco_maps.part_of(image_folder, label_folder)
        return coco_maps.open_maps(domain, tree, part, options, labels, table, skip, defects)
    folders = [(image_folder, (label_folder,))]
    suffixes = {"image_suffix": options.image_suffix, "label_suffix": options.label_suffix}
    pairs = pair_files(tree, folders, defects, skip=skip, **suffixes)
    return Files(domain, pairs, table, labels)


def pair_files(
    tree: Tree,
    folders: Sequence[tuple[str, Sequence[str]]],
    defects: list[index.Defect] | None,
    **files: Any,
) -> index.Pairs:
    """As `index.index_pairs`, or as `index.examine` if there is a list of defects."""
    if defects is None:
        return index.index_pairs(tree, folders, **files)
    pairs, found = index.examine(tree, folders, **files)
    defects += found
    return pairs
